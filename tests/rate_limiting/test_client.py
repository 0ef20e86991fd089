"""The httpx transport: it waits where servers ask to. Time is a variable, and sleeping moves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import http_sfv
import httpx
import pytest
import redis.asyncio
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from distsys.rate_limiting.client import PARTITIONS, RateLimitTransport, parse
from distsys.rate_limiting.http import RateLimitMiddleware
from distsys.rate_limiting.token_bucket import TokenBucketLimiter

Redis = redis.asyncio.Redis
START = 1_000_000.0


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = START, list[float]()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds
        await asyncio.sleep(0)


class Closing(httpx.AsyncByteStream):
    """A body without end, which says whether it was closed."""

    closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1_000

    async def aclose(self) -> None:
        self.closed = True


def refusal(after: str | None = "7", status: int = 429, **headers: str) -> httpx.Response:
    given = {} if after is None else {"Retry-After": after}
    return httpx.Response(status, headers={**given, **{k.replace("_", "-"): v for k, v in headers.items()}})


def client_of(
    answers: list[httpx.Response] | Callable[[httpx.Request], httpx.Response],
    time: Time,
    budget: float = 60,
    **options: Any,
) -> tuple[httpx.AsyncClient, list[tuple[float, httpx.Request]]]:
    """A client whose server gives these answers, the last one again and again; and when it was asked what."""
    asked: list[tuple[float, httpx.Request]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append((time.now - START, request))
        if callable(answers):
            return answers(request)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    options = {"rng": lambda: 0.0, "sleep": time.sleep, "clock": time, "wall_clock": time, **options}
    transport = RateLimitTransport(httpx.MockTransport(answer), budget=budget, **options)
    return httpx.AsyncClient(transport=transport, base_url="http://api"), asked


# ---- with our own server


async def test_client_and_server_understand_each_other(redis: Redis) -> None:
    """Three tokens, one every ten seconds: seven requests all pass, none is refused, for nothing is sent at r=0."""
    time = Time()
    limiter = TokenBucketLimiter(redis, capacity=3, refill_rate=0.1, clock=time)
    statuses: list[int] = []

    async def hello(_: Request) -> Response:
        return PlainTextResponse("hello")

    app = RateLimitMiddleware(Starlette(routes=[Route("/", hello)]), limiter, key=lambda _: "me")

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        async def watch(message: Any) -> None:
            statuses.extend([message["status"]] if "status" in message else [])
            await send(message)

        await app(scope, receive, watch)

    transport = RateLimitTransport(httpx.ASGITransport(watched), budget=60, sleep=time.sleep, clock=time, rng=lambda: 0)
    async with httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        for _ in range(7):
            assert (await client.get("/")).text == "hello"
        assert time.slept == [10.0] * 4
        assert statuses == [200] * 7

        time.slept.clear()
        together = await asyncio.gather(*(client.get("/") for _ in range(4)))
    assert [r.status_code for r in together] == [200] * 4
    assert time.now - START >= 80


# ---- refusals


@pytest.mark.parametrize("after", ["7", " 7 ", formatdate(START + 7, usegmt=True)])
async def test_a_refused_request_is_sent_again_after_retry_after(after: str) -> None:
    """Seconds or a date; the body goes along again, also that of a POST, for 429 says that nothing was done."""
    time = Time()
    client, asked = client_of([refusal(after), httpx.Response(200)], time)
    async with client:
        assert (await client.post("/", json={"a": 1})).status_code == 200
    assert [(at, request.content) for at, request in asked] == [(0, b'{"a":1}'), (7, b'{"a":1}')]


async def test_the_budget_bounds_all_waits_together() -> None:
    """7 + 7 fit in 20 seconds, a third 7 does not: then you get the refusal."""
    time = Time()
    client, asked = client_of([refusal()], time, budget=20)
    async with client:
        response = await client.get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert [at for at, _ in asked] == [0, 7, 14]


@pytest.mark.parametrize("after", ["0", "-5", formatdate(0, usegmt=True), "Thu, 01 Jan 1970 00:00:00 -0000"])
async def test_a_server_that_says_at_once_is_not_asked_forever(after: str) -> None:
    """Each try costs a second of the budget at least."""
    time = Time()
    client, asked = client_of([refusal(after)], time, budget=5)
    async with client:
        assert (await client.get("/")).status_code == 429
    assert len(asked) == (1 if after == "-5" else 6)


@pytest.mark.parametrize(
    "after", [None, "", "soon", "9" * 5_000, "1e3", "٣", "99 Foo", "Mon, 99 Foo 2026 99:99:99 GMT"]
)
async def test_a_retry_after_that_cannot_be_read_is_ignored(after: str | None) -> None:
    """You get the refusal, as without this transport."""
    time = Time()
    client, asked = client_of(
        [httpx.Response(429, headers=[] if after is None else [(b"retry-after", after.encode())])], time
    )
    async with client:
        assert (await client.get("/")).status_code == 429
    assert (len(asked), time.slept) == (1, [])


async def test_a_503_is_tried_again_where_that_can_do_no_harm() -> None:
    """GET, PUT and DELETE; a POST may have been done. An error without Retry-After is yours."""
    for method, tries in (("GET", 2), ("PUT", 2), ("DELETE", 2), ("POST", 1), ("PATCH", 1)):
        client, asked = client_of([refusal(status=503), httpx.Response(200)], Time())
        async with client:
            await client.request(method, "/")
        assert len(asked) == tries, method
    client, asked = client_of([httpx.Response(500, headers={"Retry-After": "1"})], Time())
    async with client:
        assert (await client.get("/")).status_code == 500
    assert len(asked) == 1


async def test_a_body_that_can_be_read_only_once_is_sent_once() -> None:
    """The refusal is yours: nobody could send the rest."""

    async def body() -> AsyncIterator[bytes]:
        yield b"some"

    client, asked = client_of([refusal()], Time())
    async with client:
        assert (await client.post("/", content=body())).status_code == 429
    assert len(asked) == 1


async def test_the_body_of_a_refusal_is_not_waited_for() -> None:
    """It may be of any length: it is closed unread, and also when the waiting is cancelled."""
    stream = Closing()
    client, _ = client_of(
        [httpx.Response(429, headers={"Retry-After": "7"}, stream=stream), httpx.Response(200)], Time()
    )
    async with client:
        assert (await client.get("/")).status_code == 200
    assert stream.closed

    stream, sleeping = Closing(), asyncio.Event()

    async def sleep(_: float) -> None:
        sleeping.set()
        await asyncio.Event().wait()

    client, _ = client_of([httpx.Response(429, headers={"Retry-After": "7"}, stream=stream)], Time(), sleep=sleep)
    async with client:
        task = asyncio.create_task(client.get("/"))
        await sleeping.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert stream.closed


async def test_who_waits_for_the_same_moment_comes_spread() -> None:
    """Up to a tenth later, never earlier, never beyond the budget."""
    for rng, budget, slept in ((0.0, 60, 7.0), (0.5, 60, 7.35), (1.0, 7.2, 7.2)):
        time = Time()
        client, _ = client_of([refusal(), httpx.Response(200)], time, budget, rng=lambda rng=rng: rng)
        async with client:
            await client.get("/")
        assert time.slept == [slept]


# ---- holding back


async def test_nothing_is_sent_while_nothing_is_left() -> None:
    """r=0;t=5: the next request waits five seconds; of several policies the longest counts."""
    time = Time()
    left = httpx.Response(200, headers=[("RateLimit", '"a";r=0;t=5, "b";r=3;t=90'), ("RateLimit", '"c";r=0;t=4')])
    client, asked = client_of([left, httpx.Response(200)], time)
    async with client:
        await client.get("/")
        await client.get("/")
        await client.get("/")
    assert [at for at, _ in asked] == [0, 5, 5]


async def test_a_refusal_holds_back_the_others_too() -> None:
    """Unless RateLimit says that something is left: then only this one request was too much."""
    for header, at in (("", 7), ('"a";r=0;t=2', 7), ('"a";r=3;t=7', 0)):
        time = Time()
        client, asked = client_of([refusal(RateLimit=header), httpx.Response(200)], time, budget=60)
        async with client:
            first = asyncio.create_task(client.get("/first"))
            while not time.slept:
                await asyncio.sleep(0)
            time.now = START
            await client.get("/second")
            await first
        second = next(when for when, request in asked if request.url.path == "/second")
        assert second == at, header


async def test_what_is_held_back_longer_than_the_budget_is_sent() -> None:
    """The server decides; its refusal says more than an error of ours."""
    for seconds, second in ((60, 60), (61, 0)):
        time = Time()
        client, asked = client_of([httpx.Response(200, headers={"RateLimit": f'"a";r=0;t={seconds}'})], time, budget=60)
        async with client:
            await client.get("/")
            await client.get("/")
        assert [at for at, _ in asked] == [0, second]


async def test_news_replace_what_was_known() -> None:
    """A later answer with something left ends the holding back; one without the field does not."""
    for news, third in (({"RateLimit": '"a";r=3;t=90'}, 40), ({}, 90)):
        time = Time()
        answers = [httpx.Response(200, headers={"RateLimit": '"a";r=0;t=90'}), httpx.Response(200, headers=news)]
        client, asked = client_of([*answers, httpx.Response(200)], time)
        async with client:
            await client.get("/")
            await client.get("/")  # at once: 90 s are more than the budget
            time.now += 40
            await client.get("/")
        assert [at for at, _ in asked] == [0, 0, third]


async def test_holding_back_counts_in_the_budget() -> None:
    """Five seconds until it is sent; seven more after the refusal would be one too many."""
    time = Time()
    client, asked = client_of(
        [httpx.Response(200, headers={"RateLimit": '"a";r=0;t=5'}), refusal("7")], time, budget=11
    )
    async with client:
        await client.get("/")
        assert (await client.get("/")).status_code == 429
    assert [at for at, _ in asked] == [0, 5]


async def test_what_a_cache_kept_says_nothing_about_now() -> None:
    """A response with an Age above 0."""
    time = Time()
    client, asked = client_of([httpx.Response(200, headers={"RateLimit": '"a";r=0;t=5', "Age": "3"})], time)
    async with client:
        await client.get("/")
        await client.get("/")
    assert [at for at, _ in asked] == [0, 0]


async def test_one_limit_does_not_hold_back_another() -> None:
    """Another server, another Authorization, another API key; or whatever you say."""
    time = Time()
    headers = ({}, {"Authorization": "a"}, {"Authorization": "b"}, {"X-API-Key": "a"})
    client, asked = client_of([httpx.Response(200, headers={"RateLimit": '"a";r=0;t=5'})], time)
    async with client:
        for each in headers:
            await client.get("/", headers=each)
        await client.get("http://other/")
        assert [at for at, _ in asked] == [0] * 5
        await client.get("/", headers={"Authorization": "a"})
        assert asked[-1][0] == 5

    time = Time()
    client, asked = client_of(
        [httpx.Response(200, headers={"RateLimit": '"a";r=0;t=5'})], time, partition=lambda request: request.url.path
    )
    async with client:
        for path in ("/a", "/b", "/a"):
            await client.get(path)
    assert [at for at, _ in asked] == [0, 0, 5]


async def test_what_is_remembered_is_bounded() -> None:
    """A thousand partitions; the oldest is forgotten."""
    time = Time()
    client, _ = client_of([httpx.Response(200, headers={"RateLimit": '"a";r=0;t=5'})], time)
    async with client:
        for i in range(PARTITIONS + 5):
            await client.get("/", headers={"Authorization": str(i)})
        assert len(client._transport._until) == PARTITIONS  # type: ignore[attr-defined]
        await client.get("/", headers={"Authorization": "0"})
    assert time.slept == []


async def test_without_a_transport_it_makes_its_own() -> None:
    """And closes it with the client."""
    transport = RateLimitTransport(budget=1)
    async with httpx.AsyncClient(transport=transport):
        assert isinstance(transport._transport, httpx.AsyncHTTPTransport)
    with pytest.raises(ValueError, match="budget=-1"):
        RateLimitTransport(budget=-1)


# ---- the field


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("", []),
        ('"default";r=50;t=30', [(50, 30)]),
        ('"a";r=0;t=1;pk=:QXBwLTk5OQ==:,"b";t=2;acme="x;r=9,;t=9";r=1', [(0, 1), (1, 2)]),
        ('  "a \\"quoted\\" \\\\";  r=1;t=2\t,\t"b";r=3  ', [(1, 2)]),
        ("default;r=0;t=5", [(0, 5)]),
        ('"a";r=0;t=5,', []),
        ('"a";r=0;t=5, ,"b";r=1;t=1', []),
        ('"a";r=0;t=5 "b"', []),
        ('"a;r=0;t=5', []),
        ('"ü";r=0;t=5', []),
        ('"a";r=-1;t=5, "b";r=1.5;t=5, "c";r="0";t=5, "d";r;t=5, "e";r=?1;t=1', []),
        ('"a";r=0;t=5, "b";r=1;t=' + "9" * 16, []),
        ('"a";r=0;t=5;x=1.2.3', []),
        ('"a";r=0;t=5;x=é', []),
        ('"a";r=0;r=1;t=5', [(1, 5)]),
    ],
)
def test_a_field_is_read_or_ignored(field: str, expected: list[tuple[int, int]]) -> None:
    """Malformed as a whole: nothing counts. Malformed numbers: this item does not."""
    assert parse(field) == expected


parameters = st.dictionaries(
    st.from_regex(r"[a-z][a-z0-9_.*-]{0,3}", fullmatch=True) | st.sampled_from(["r", "t"]),
    st.integers(0, 10**15 - 1)
    | st.text(st.characters(min_codepoint=32, max_codepoint=126))
    | st.binary()
    | st.booleans(),
    max_size=4,
)


@given(st.lists(st.tuples(st.text(st.characters(min_codepoint=32, max_codepoint=126)), parameters), max_size=4))
def test_what_an_independent_writer_writes_is_read(items: list[tuple[str, dict[str, Any]]]) -> None:
    """Every list of strings with parameters."""
    written, expected = http_sfv.List(), []
    for name, given_parameters in items:
        item = http_sfv.Item(name)
        item.params.update(given_parameters)
        written.append(item)
        r, t = given_parameters.get("r"), given_parameters.get("t")
        if type(r) is int and type(t) is int:
            expected.append((r, t))
    assert parse(str(written) if items else "") == expected


@given(st.text(st.sampled_from(list('"\\;=,rt01 a:*-é\t')), max_size=40))
def test_what_is_no_list_is_ignored(field: str) -> None:
    """Where an independent parser reads no list, neither do we."""
    theirs = http_sfv.List()
    try:
        theirs.parse(field.encode())
    except (ValueError, UnicodeError):
        assert parse(field) == []


def test_a_long_malformed_field_takes_no_long_time() -> None:
    """Each character is looked at a few times, not once for every other one."""
    for field in ('"a"' + ";r=0;t" * 10_000 + "!", '"' + "\\" * 60_000, '"a"' + " " * 60_000 + "x", ", " * 30_000):
        assert parse(field) == []
