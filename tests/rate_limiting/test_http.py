"""Rate limits over HTTP: every promise, called over ASGI and once over a socket, with real Redis behind."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import http_sfv
import httpx
import pytest
import redis.asyncio
import uvicorn
from fastapi import Depends, FastAPI, HTTPException, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from slowapi import Limiter as SlowApi
from slowapi import _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIMiddleware
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from distsys import problem_response
from distsys.errors import DistsysError, RateLimited
from distsys.rate_limiting.decision import Decision
from distsys.rate_limiting.distributed import EVERYBODY, Quota, TieredLimiter
from distsys.rate_limiting.fallback import OnFailure
from distsys.rate_limiting.http import (
    MAX_KEY,
    REDUCED_CAPACITY,
    Policy,
    RateLimit,
    RateLimitMiddleware,
    by_client,
    client_address,
    rate_limit,
)
from distsys.rate_limiting.keys import hashed
from distsys.rate_limiting.token_bucket import TokenBucketLimiter

Redis = redis.asyncio.Redis
App = Callable[..., Awaitable[None]]


def everybody(_: Any) -> str:
    return "everybody"


def frozen() -> float:
    return 1_000_000.0


def limiter(redis: Redis, capacity: float = 2, refill_rate: float = 0.1, **options: Any) -> TokenBucketLimiter:
    """Make a limiter of two requests, then one every ten seconds, on a clock that stands still."""
    return TokenBucketLimiter(redis, capacity=capacity, refill_rate=refill_rate, **{"clock": frozen, **options})


async def hello(_: Request) -> Response:
    return PlainTextResponse("hello")


def app_of(limiter: Any, *routes: Route, key: Any = everybody, **options: Any) -> App:
    return RateLimitMiddleware(Starlette(routes=[Route("/", hello), *routes]), limiter, key=key, **options)


def client_of(app: App, address: str = "192.0.2.1", **options: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, client=(address, 1234), **options)
    return httpx.AsyncClient(transport=transport, base_url="http://app")


def fields(response: httpx.Response, name: str) -> dict[str, dict[str, Any]]:
    """Parse a structured list with an independent parser: item -> parameters."""
    parsed = http_sfv.List()
    parsed.parse(response.headers[name].encode())
    return {item.value: dict(item.params) for item in parsed}


def scope_of(address: str | None = "192.0.2.1", **headers: str) -> dict[str, Any]:
    raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http", "path": "/", "client": None if address is None else (address, 1), "headers": raw}


def unreachable() -> Redis:
    return Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))


# ---- what a response says


async def test_every_answer_says_what_is_left(redis: Redis) -> None:
    """The policy stays and r goes down; at r=0, t is the wait for the next token, not for all."""
    async with client_of(app_of(limiter(redis, name="burst"))) as client:
        first, second = await client.get("/"), await client.get("/")
    assert fields(first, "RateLimit-Policy") == fields(second, "RateLimit-Policy") == {"burst": {"q": 2, "w": 20}}
    assert fields(first, "RateLimit") == {"burst": {"r": 1, "t": 10}}
    assert fields(second, "RateLimit") == {"burst": {"r": 0, "t": 10}}
    for response in (first, second):
        assert response.text == "hello"
        assert "Retry-After" not in response.headers
        assert not [name for name in response.headers if name.startswith("x-")]


async def test_a_refusal_is_a_problem_that_names_the_policy(redis: Redis) -> None:
    """It is a 429 with the draft's problem type and Retry-After no earlier than t; the app was not called."""
    async with client_of(app_of(limiter(redis, name="burst"))) as client:
        for _ in range(2):
            await client.get("/")
        response = await client.get("/missing")
    assert response.status_code == 429
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Retry-After"] == "10"
    assert response.headers["Cache-Control"] == "no-store"
    assert fields(response, "RateLimit") == {"burst": {"r": 0, "t": 10}}
    assert response.json() == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "detail": "Try again in 10 s.",
        "violated-policies": ["burst"],
    }


async def test_a_client_that_waits_retry_after_passes(redis: Redis) -> None:
    """The number is rounded up, so that the next attempt is not refused too."""
    now = [1_000_000.0]
    app = app_of(limiter(redis, 1, 0.3, clock=lambda: now[0]))
    async with client_of(app) as client:
        for _ in range(5):
            assert (await client.get("/")).status_code == 200
            refused = await client.get("/")
            assert refused.status_code == 429
            now[0] += int(refused.headers["Retry-After"])


async def test_retry_after_is_never_0(redis: Redis) -> None:
    """This holds even if the next token comes in a millisecond."""
    async with client_of(app_of(limiter(redis, 1, 1000))) as client:
        await client.get("/")
        response = await client.get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")


async def test_x_headers_come_by_switch(redis: Redis) -> None:
    """They are the limit, what remains, and when the next token comes, in seconds since 1970."""
    app = app_of(limiter(redis), x_headers=True, clock=lambda: 1_699_999_999.5)
    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(3)]
    said = [[r.headers[f"X-RateLimit-{word}"] for word in ("Limit", "Remaining", "Reset")] for r in responses]
    assert said == [["2", "1", "1700000010"], ["2", "0", "1700000010"], ["2", "0", "1700000010"]]
    assert [r.headers.get("Retry-After") for r in responses] == [None, None, "10"]


async def test_partition_keys_come_by_switch_and_tell_no_secret(redis: Redis) -> None:
    """pk is the start of a hash, equal in both fields and different for another key."""
    app = app_of(limiter(redis), key=by_client(), partition_keys=True)
    async with client_of(app) as one, client_of(app, "192.0.2.2") as other:
        first, second = await one.get("/"), await other.get("/")
    expected = hashlib.sha256(b"address:192.0.2.1").digest()[:8]
    assert fields(first, "RateLimit")["default"]["pk"] == fields(first, "RateLimit-Policy")["default"]["pk"] == expected
    assert base64.b64encode(expected).decode() in first.headers["RateLimit"]
    assert fields(second, "RateLimit")["default"]["pk"] != expected


@pytest.mark.parametrize(
    "name", ['a "b" \\c', "größe", "a\r\nSet-Cookie: x=1", "tab\there", "🦆", "x;r=0", "a, b", "\ud800"]
)
async def test_a_name_stays_one_string(redis: Redis, name: str) -> None:
    """The name is escaped, and percent-encoded where it is not ASCII; the problem names it the same way."""
    async with client_of(app_of(limiter(redis, 1), name=name)) as client:
        await client.get("/")
        response = await client.get("/")
    (policy,) = fields(response, "RateLimit")
    assert list(fields(response, "RateLimit-Policy")) == response.json()["violated-policies"] == [policy]
    assert "set-cookie" not in response.headers
    assert fields(response, "RateLimit")[policy] == {"r": 0, "t": 10}


@given(st.text(), st.floats(1e-6, 1e9), st.floats(1e-6, 1e15))
def test_every_policy_is_a_structured_field(name: str, quota: float, window: float) -> None:
    """This holds for any name and numbers."""
    item = http_sfv.Item()
    item.parse(Policy(name, quota, window).item.encode("ascii"))
    assert isinstance(item.value, str)
    assert item.params["q"] == int(quota)
    assert item.params["w"] >= 1


decisions = st.builds(
    lambda limit, left, wait, reset: Decision(wait == 0, limit, min(left, int(limit)), wait, max(wait, reset)),
    st.floats(0.1, 1e9),
    st.integers(0, 1_000_000_000),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e9)),
    st.floats(0, 1e9),
)


@given(st.lists(decisions, min_size=1, max_size=4), st.booleans())
def test_retry_after_is_never_before_the_end_of_a_window(all_of_them: list[Decision], refills: bool) -> None:
    """Nor is it before any quota lets the request pass, and it comes with refusals only."""
    policies = [Policy(f"p{i}", one.limit, 1e9, None, refills) for i, one in enumerate(all_of_them)]
    rule = RateLimit(TokenBucketLimiter(Redis(), capacity=1, refill_rate=1), key=everybody)
    answer = rule._headers_for(policies, all_of_them, {None: "key"})
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    items = http_sfv.List()
    items.parse(headers["ratelimit"].encode())
    assert all(item.params["t"] >= 0 and item.params["r"] >= 0 for item in items)
    if all(all_of_them):
        assert (answer.refusal, headers.get("retry-after")) == (None, None)
    else:
        after = int(headers["retry-after"])
        assert answer.refusal is not None
        assert after >= max(1.0, *(one.retry_after for one in all_of_them))
        assert after >= max(item.params["t"] for item in items)
        names = [policy.name for policy, one in zip(policies, all_of_them, strict=True) if not one]
        assert answer.refusal.problem()["violated-policies"] == names


async def test_a_limiter_that_refuses_without_a_wait_is_not_asked_again_at_once() -> None:
    """Retry-After is 1 at least, whatever the limiter says."""

    class Hasty:
        name, limit, window = "hasty", 1, 1.0

        async def try_acquire(self, key: str, cost: float = 1) -> Decision:
            return Decision(False, 1, 0, 0.0, 0.0)

    async with client_of(app_of(Hasty())) as client:
        response = await client.get("/")
    assert (response.status_code, response.headers["Retry-After"]) == (429, "1")


async def test_a_sliding_window_says_when_all_is_back() -> None:
    """Its tokens don't come back one by one: without a refusal nobody knows when the next one comes."""

    class Window:
        name, limit, window = "perhour", 100, 3600.0

        async def try_acquire(self, key: str, cost: float = 1) -> Decision:
            return Decision(True, 100, 0, 0.0, 1234.5)

    async with client_of(app_of(Window())) as client:
        response = await client.get("/")
    assert fields(response, "RateLimit-Policy") == {"perhour": {"q": 100, "w": 3600}}
    assert fields(response, "RateLimit") == {"perhour": {"r": 0, "t": 1235}}


# ---- tiers


def tiers(redis: Redis, **options: Any) -> TieredLimiter:
    pro = [
        Quota(per="user", capacity=2, refill_rate=0.1),
        Quota(per="organisation", capacity=3, refill_rate=0.01),
        Quota(per=EVERYBODY, capacity=100, refill_rate=1, name="all"),
    ]
    return TieredLimiter(redis, {"pro": pro, "free": pro[:1]}, clock=frozen, **options)


def tier_of(scope: Any) -> tuple[str, dict[str, str]]:
    headers = dict(scope["headers"])
    return headers[b"x-tier"].decode(), {"user": headers[b"x-user"].decode(), "organisation": "acme"}


async def test_every_quota_of_the_tier_is_listed_and_those_that_refused_are_named(redis: Redis) -> None:
    """The key function names tier and subjects. Retry-After is the longest wait, X-RateLimit-* the tightest quota."""
    app = app_of(tiers(redis), key=tier_of, x_headers=True, clock=lambda: 0.0, partition_keys=True)
    async with client_of(app) as client:
        ada, bob = {"X-Tier": "pro", "X-User": "ada"}, {"X-Tier": "pro", "X-User": "bob"}
        first = await client.get("/", headers=ada)
        await client.get("/", headers=bob)
        await client.get("/", headers=ada)
        refused = await client.get("/", headers=bob)
        both = await client.get("/", headers=ada)
        free = await client.get("/", headers={**bob, "X-Tier": "free"})
    policies = {name: (p["q"], p["w"]) for name, p in fields(first, "RateLimit-Policy").items()}
    assert policies == {"user": (2, 20), "organisation": (3, 300), "all": (100, 100)}
    left = {name: (p["r"], p["t"]) for name, p in fields(first, "RateLimit").items()}
    assert left == {"user": (1, 10), "organisation": (2, 100), "all": (99, 1)}
    assert [first.headers[f"X-RateLimit-{w}"] for w in ("Limit", "Remaining", "Reset")] == ["2", "1", "10"]
    assert ("pk" in fields(first, "RateLimit")["user"], "pk" in fields(first, "RateLimit")["all"]) == (True, False)

    assert refused.json()["violated-policies"] == ["organisation"]
    assert refused.headers["Retry-After"] == "100"
    assert [refused.headers[f"X-RateLimit-{w}"] for w in ("Limit", "Remaining", "Reset")] == ["3", "0", "100"]
    assert both.json()["violated-policies"] == ["user", "organisation"]
    assert (free.status_code, list(fields(free, "RateLimit"))) == (200, ["user"])


async def test_the_trio_speaks_of_the_smallest_share(redis: Redis) -> None:
    """One left of two is a larger share than ten left of a hundred."""
    quotas = [Quota(per="user", capacity=2, refill_rate=1), Quota(per=EVERYBODY, capacity=100, refill_rate=1)]
    own = TieredLimiter(redis, {"free": quotas}, clock=frozen)
    for i in range(89):
        assert await own.try_acquire("free", {"user": str(i)})
    async with client_of(app_of(own, key=lambda _: ("free", {"user": "ada"}), x_headers=True)) as client:
        response = await client.get("/")
    assert [response.headers[f"X-RateLimit-{word}"] for word in ("Limit", "Remaining")] == ["100", "10"]


# ---- who is it


async def test_a_request_without_a_key_is_not_limited(redis: Redis) -> None:
    """If the key function returns None, no headers are sent and Redis is not asked."""
    app = app_of(limiter(unreachable()), key=lambda scope: None if scope["path"] == "/" else "x")
    async with client_of(app) as client:
        response = await client.get("/")
    assert (response.status_code, "RateLimit" in response.headers) == (200, False)


async def test_keys_that_were_given_out_have_a_limit_each(redis: Redis, caplog: pytest.LogCaptureFixture) -> None:
    """Keys that a client makes up share the limit of its address; neither Redis nor the log ever sees a key."""
    caplog.set_level(logging.DEBUG)
    known = {"secret-of-ada", "secret-of-bob"}

    async def is_known(key: str) -> bool:
        return key in known

    app = app_of(limiter(redis, 1), key=by_client(api_key=is_known))
    async with client_of(app) as client:
        statuses = [(await client.get("/", headers={"X-API-Key": key})).status_code for key in sorted(known) * 2]
        made_up = [(await client.get("/", headers={"X-API-Key": f"guess-{i}"})).status_code for i in range(4)]
    assert statuses == [200, 200, 429, 429]
    assert made_up == [200, 429, 429, 429]
    kept = " ".join(key.decode() for key in await redis.keys("*"))
    assert kept.count("key:") == 2
    assert hashed("secret-of-ada") in kept
    assert "secret" not in kept
    assert "secret" not in caplog.text


async def test_a_user_comes_before_the_key_and_the_address(redis: Redis) -> None:
    """A user who is logged in has one limit, whatever the key or address."""
    key = by_client(user=lambda scope: scope.get("user"), api_key=bool)
    scope = scope_of(x_api_key="abc")
    assert await key({**scope, "user": 42}) == "user:42"
    assert await key({**scope, "user": None}) == f"key:{hashed('abc')}"
    assert await key({**scope, "user": ""}) == f"key:{hashed('abc')}"
    assert await key(scope_of(x_api_key="")) == "address:192.0.2.1"


CHAIN = "198.51.100.66, 203.0.113.7, 10.0.0.2"


@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "expected"),
    [
        (0, "10.0.0.1", CHAIN, "10.0.0.1"),
        (1, "10.0.0.1", CHAIN, "10.0.0.2"),
        (2, "10.0.0.1", CHAIN, "203.0.113.7"),
        (9, "10.0.0.1", CHAIN, "198.51.100.66"),
        (1, "10.0.0.1", None, "10.0.0.1"),
        (1, None, "203.0.113.7", "203.0.113.7"),
        (0, None, "203.0.113.7", "unknown"),
        (["10.0.0.0/8"], "10.0.0.1", CHAIN, "203.0.113.7"),
        ("10.0.0.0/8", "10.0.0.1", CHAIN, "203.0.113.7"),
        (["10.0.0.0/8"], "192.0.2.1", CHAIN, "192.0.2.1"),
        (["10.0.0.0/8", "203.0.113.0/24"], "10.0.0.1", CHAIN, "198.51.100.66"),
        (["10.0.0.0/8"], "::ffff:10.0.0.1", CHAIN, "203.0.113.7"),
        (["2001:db8:f::/48"], "2001:db8:f::1", "2001:db8:1:2:3::4", "2001:db8:1:2::/64"),
        (["10.0.0.0/8"], None, CHAIN, "unknown"),
        (["10.0.0.0/8"], "10.0.0.1", "198.51.100.66, garbage, 10.0.0.2", "10.0.0.2"),
        (1, "10.0.0.1", "203.0.113.7:5678", "203.0.113.7"),
        (1, "10.0.0.1", "[2001:db8::1]:5678", "2001:db8::/64"),
        (1, "10.0.0.1", "::ffff:203.0.113.7", "203.0.113.7"),
        (1, "10.0.0.1", "fe80::1%eth0", "fe80::/64"),
        (1, "10.0.0.1", "unknown", "10.0.0.1"),
        (2, "10.0.0.1", "<script>, 10.0.0.2", "10.0.0.2"),
        (1, "10.0.0.1", "203.0.113.7,", "10.0.0.1"),
        (1, "10.0.0.1", "\xe9\xff" * 30_000, "10.0.0.1"),
        (["10.0.0.0/8"], "10.0.0.1", ",".join(["10.0.0.9"] * 7_000), "10.0.0.9"),
        (0, "2001:db8::1", None, "2001:db8::/64"),
        (0, "::ffff:192.0.2.9", None, "192.0.2.9"),
    ],
)  # fmt: skip
def test_x_forwarded_for_is_believed_as_far_as_you_trust(
    proxies: Any, peer: str | None, forwarded: str | None, expected: str
) -> None:
    """Entries are read from the right, and only those that a trusted proxy wrote."""
    headers = {} if forwarded is None else {"x_forwarded_for": forwarded}
    assert client_address(proxies=proxies)(scope_of(peer, **headers)) == expected


def test_several_x_forwarded_for_fields_are_one_list() -> None:
    """An attacker's own field comes first, the proxy's last."""
    scope = scope_of("10.0.0.1")
    scope["headers"] = [(b"X-Forwarded-For", b"198.51.100.66"), (b"x-forwarded-for", b"203.0.113.7")]
    assert client_address(proxies=1)(scope) == "203.0.113.7"


@given(st.text(st.characters(max_codepoint=255)), st.sampled_from([0, 1, 5, "10.0.0.0/8"]))
def test_no_x_forwarded_for_breaks_anything(forwarded: str, proxies: int | str) -> None:
    """Whatever the header holds, the key is an address, and as short as one."""
    address = client_address(proxies=proxies)(scope_of("10.0.0.1", x_forwarded_for=forwarded))
    assert len(address) <= len("ffff:ffff:ffff:ffff::/64")


def test_a_wrong_proxies_setting_is_refused() -> None:
    """A wrong setting raises at construction."""
    with pytest.raises(ValueError, match="proxies=-1"):
        client_address(proxies=-1)
    with pytest.raises(ValueError, match=r"10\.0\.0\.1/8"):
        client_address(proxies=["10.0.0.1/8"])


async def test_a_spoofed_address_makes_no_new_limit(redis: Redis) -> None:
    """A client that sends another X-Forwarded-For each time has one limit. So has a /64; the next /64 has another."""
    app = app_of(limiter(redis), key=by_client())
    async with client_of(app) as client:
        spoofed = [(await client.get("/", headers={"X-Forwarded-For": f"10.0.0.{i}"})).status_code for i in range(4)]
    assert spoofed == [200, 200, 429, 429]
    statuses = []
    for address in ("2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:1::3", "2001:db8:0:2::1"):
        async with client_of(app, address) as client:
            statuses.append((await client.get("/")).status_code)
    assert statuses == [200, 200, 429, 200]


@pytest.mark.parametrize("key", ["k" * 100_000, "a\r\nb", "\ud800", "{tag}%", "ключ"])
async def test_a_key_of_any_kind_is_a_short_one(redis: Redis, key: str) -> None:
    """Long or unprintable keys are hashed, so nobody can fill Redis with keys."""
    async with client_of(app_of(limiter(redis, 1), key=lambda _: key, partition_keys=True)) as client:
        assert [(await client.get("/")).status_code for _ in range(2)] == [200, 429]
    (kept,) = await redis.keys("*")
    assert len(kept) < MAX_KEY


async def test_tiers_have_short_keys_too(redis: Redis) -> None:
    """Subjects come from clients, as keys do, and are hashed too."""
    async with client_of(app_of(tiers(redis), key=lambda _: ("free", {"user": "u" * 100_000}))) as client:
        assert [(await client.get("/")).status_code for _ in range(3)] == [200, 200, 429]
    assert all(len(kept) < MAX_KEY for kept in await redis.keys("*"))


# ---- costs


async def test_a_request_costs_what_you_say(redis: Redis) -> None:
    """A function, also an async one, says the cost. At 0 Redis is not asked; above the quota no wait would help."""

    async def cost(scope: Any) -> float:
        return float(dict(scope["headers"])[b"x-cost"])

    async with client_of(app_of(limiter(redis, 10, name="tokens"), cost=cost)) as client:
        costly, free, more, never = [
            await client.get("/", headers={"X-Cost": each}) for each in ("8", "0", "3", "11")
        ]  # fmt: skip
    assert fields(costly, "RateLimit")["tokens"]["r"] == 2
    assert (free.status_code, "RateLimit" in free.headers) == (200, False)
    assert (more.status_code, more.headers["Retry-After"]) == (429, "10")
    assert fields(more, "RateLimit") == {"tokens": {"r": 2, "t": 10}}
    assert (never.status_code, "Retry-After" in never.headers) == (429, False)
    assert never.json()["violated-policies"] == ["tokens"]


# ---- when Redis or a function of yours fails


@pytest.mark.parametrize(
    ("policy", "statuses", "left"),
    [("open", [200, 200, 200], [None] * 3), ("closed", [503] * 3, [None] * 3), ("local", [200, 200, 429], [1, 0, 0])],
)
async def test_each_policy_has_its_answer_without_redis(
    policy: Any, statuses: list[int], left: list[int | None]
) -> None:
    """Open does not say what is left; closed answers 503, not the client's fault; local counts here."""
    app = app_of(limiter(unreachable(), on_failure=OnFailure(policy=policy)), x_headers=True)
    async with client_of(app) as client:
        responses = [await client.get("/") for _ in statuses]
    assert [r.status_code for r in responses] == statuses
    said = [fields(r, "RateLimit")["default"]["r"] if "RateLimit" in r.headers else None for r in responses]
    assert said == left
    assert [("X-RateLimit-Remaining" in r.headers) for r in responses] == [one is not None for one in left]
    assert all(fields(r, "RateLimit-Policy") == {"default": {"q": 2, "w": 20}} for r in responses)
    assert ["Retry-After" in r.headers for r in responses] == [status != 200 for status in statuses]
    if policy == "closed":
        problem = responses[0].json()
        assert problem["type"] == REDUCED_CAPACITY[0]
        assert (problem["status"], problem["violated-policies"]) == (503, [])


async def test_tiers_close_with_503_too() -> None:
    """No quota was exceeded, so none is named."""
    app = app_of(tiers(unreachable(), on_failure=OnFailure(policy="closed")), key=lambda _: ("free", {"user": "a"}))
    async with client_of(app) as client:
        response = await client.get("/")
    assert (response.status_code, response.json()["violated-policies"]) == (503, [])


async def test_without_a_policy_the_error_passes() -> None:
    """A limiter that silently limits nothing would be worse than a 500."""
    async with client_of(app_of(limiter(unreachable()))) as client:
        with pytest.raises(redis.exceptions.ConnectionError):
            await client.get("/")


async def test_an_error_of_your_functions_passes_and_takes_nothing(redis: Redis) -> None:
    """The request does not pass unlimited, and no tokens are taken."""

    def broken(_: Any) -> str:
        raise LookupError("no such tenant")

    for options in (
        {"key": broken},
        {"cost": broken},
        {"key": lambda _: ""},
        {"key": lambda _: 42},
        {"cost": -1},
        {"cost": math.nan},
    ):
        async with client_of(app_of(limiter(redis), **options)) as client:  # type: ignore[arg-type]
            with pytest.raises((LookupError, ValueError, TypeError)):
                await client.get("/")
    assert await redis.keys("*") == []


# ---- what passes untouched


async def test_an_error_of_the_app_passes(redis: Redis) -> None:
    """This holds before and after the response has started; what was taken stays taken."""

    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/after":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise ZeroDivisionError

    own = limiter(redis, 3)
    async with client_of(RateLimitMiddleware(broken, own, key=everybody)) as client:
        for path in ("/before", "/after"):
            with pytest.raises(ZeroDivisionError):
                await client.get(path)
    assert (await own.peek("everybody")).remaining == 1


async def test_a_stream_passes_as_it_comes(redis: Redis) -> None:
    """Headers are added to the start; each part goes out before the next is made."""
    sent: list[dict[str, Any]] = []
    seen: list[int] = []

    async def stream(_: Request) -> Response:
        async def body() -> AsyncIterator[bytes]:
            for i in range(3):
                yield b"%d" % i
                seen.append(len(sent))

        return StreamingResponse(body())

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return await asyncio.Event().wait()

    app = app_of(limiter(redis), Route("/stream", stream))
    await app({**scope_of(), "path": "/stream", "method": "GET", "query_string": b""}, receive, send)
    assert b"ratelimit" in dict(sent[0]["headers"])
    assert [message["body"] for message in sent[1:]] == [b"0", b"1", b"2", b""]
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "something-new"])
async def test_other_scopes_pass_untouched(kind: str) -> None:
    """The app gets the same objects, and Redis is not asked."""
    got: list[Any] = []

    async def app(*arguments: Any) -> None:
        got.extend(arguments)

    async def receive() -> Any: ...

    async def send(_: Any) -> None: ...

    scope = {"type": kind}
    await RateLimitMiddleware(app, limiter(unreachable()), key=everybody)(scope, receive, send)
    assert got[0] is scope
    assert got[1] is receive
    assert got[2] is send


async def test_headers_that_are_there_stay(redis: Redis) -> None:
    """RateLimit is a list and gets longer; of X-RateLimit-* only the inner one's stay, because two would contradict."""

    async def theirs(_: Request) -> Response:
        return PlainTextResponse("", headers={"RateLimit": '"theirs";r=1;t=2', "X-RateLimit-Limit": "7"})

    inner = app_of(limiter(redis, name="inner"), Route("/theirs", theirs), x_headers=True)
    app = RateLimitMiddleware(inner, limiter(redis, 5, name="outer"), key=everybody, x_headers=True)
    async with client_of(app) as client:
        response = await client.get("/theirs")
    assert list(fields(response, "RateLimit")) == ["theirs", "inner", "outer"]
    assert response.headers.get_list("X-RateLimit-Limit") == ["7"]
    assert response.headers.get_list("X-RateLimit-Remaining") == ["1"]


async def test_many_at_once_get_what_is_there(redis: Redis) -> None:
    """Of fifty at once ten pass, and each gets a different remainder."""
    async with client_of(app_of(limiter(redis, 10))) as client:
        responses = await asyncio.gather(*(client.get("/") for _ in range(50)))
    passed = [r for r in responses if r.status_code == 200]
    assert sorted(fields(r, "RateLimit")["default"]["r"] for r in passed) == list(range(10))
    assert {r.status_code for r in responses} == {200, 429}


async def test_a_client_that_went_away_leaves_nothing_behind(redis: Redis) -> None:
    """Whenever it is cancelled, the error passes and the next request is served."""
    app = app_of(limiter(redis, 100))
    async with client_of(app) as client:
        for turns in range(12):
            task = asyncio.create_task(client.get("/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert (await client.get("/")).status_code == 200


# ---- a server


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """Serve the app behind uvicorn, on a socket of 127.0.0.1."""
    config = uvicorn.Config(app, port=0, log_level="critical", proxy_headers=False, ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


async def test_it_works_on_a_socket(redis: Redis) -> None:
    """It works with HEAD, with a body that nobody reads, and with a lifespan."""
    started = []

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        started.append(True)
        yield

    app = Starlette(routes=[Route("/", hello, methods=["GET", "HEAD", "POST"])], lifespan=lifespan)
    app.add_middleware(RateLimitMiddleware, limiter=limiter(redis, name="größe"), key=by_client())
    async with served(app) as url, httpx.AsyncClient(base_url=url) as client:
        first = await client.get("/")
        second = await client.head("/")
        third = await client.post("/", content=b"x" * 1_000_000)
        fourth = await client.head("/")
        fifth = await client.get("/")
    assert started
    assert [r.status_code for r in (first, second, third, fourth, fifth)] == [200, 200, 429, 429, 429]
    assert fields(first, "RateLimit") == {"gr%C3%B6%C3%9Fe": {"r": 1, "t": 10}}
    assert (fourth.content, third.json()) == (b"", fifth.json())


# ---- FastAPI


def fast(limiter: Any, **options: Any) -> FastAPI:
    app = FastAPI()
    limit = rate_limit(limiter, **{"key": everybody, **options})

    @app.get("/items/{item_id}", dependencies=[Depends(limit)])
    async def item(item_id: int) -> dict[str, int]:
        return {"item": item_id}

    @app.get("/teapot", dependencies=[Depends(limit)])
    async def teapot() -> None:
        raise HTTPException(418, "short and stout")

    return app


async def test_the_dependency_limits_a_route(redis: Redis) -> None:
    """What passes gets headers, what does not a problem; the key function may read the path's parameters."""
    app = fast(limiter(redis, name="item"), key=lambda scope: f"item:{scope['path_params'].get('item_id')}")
    app.add_exception_handler(RateLimited, problem_response)
    async with client_of(app) as client:
        first, _, refused, other = [await client.get(f"/items/{i}") for i in (1, 1, 1, 2)]
    assert (first.json(), fields(first, "RateLimit")) == ({"item": 1}, {"item": {"r": 1, "t": 10}})
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
    assert refused.headers.get_list("Content-Type") == ["application/problem+json"]
    assert refused.json()["violated-policies"] == ["item"]
    assert fields(refused, "RateLimit") == {"item": {"r": 0, "t": 10}}
    assert other.status_code == 200
    assert "ratelimit" not in json.dumps(app.openapi())


async def test_the_dependency_refuses_without_a_handler_too(redis: Redis) -> None:
    """The problem is smaller: `detail` is one of its members, and the others may be absent."""
    async with client_of(fast(limiter(redis, 1))) as client:
        await client.get("/items/1")
        refused = await client.get("/items/1")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
    assert refused.headers.get_list("Content-Type") == ["application/problem+json"]
    assert refused.json() == {"detail": "Try again in 10 s."}


async def test_the_dependency_closes_with_503(redis: Redis) -> None:
    """The dependency behaves like the middleware."""
    app = fast(limiter(unreachable(), on_failure=OnFailure(policy="closed")))
    async with client_of(app) as client:
        assert (await client.get("/items/1")).status_code == 503
    app.add_exception_handler(RateLimited, problem_response)
    app.middleware_stack = None
    async with client_of(app) as client:
        response = await client.get("/items/1")
    assert (response.status_code, response.json()["status"]) == (503, 503)


async def test_a_handler_of_your_own_gets_the_problem_too(redis: Redis) -> None:
    """One handler serves all errors of the package: error.problem() is what problem_response would have sent."""
    app = fast(limiter(redis, 1, name="item"))

    @app.exception_handler(DistsysError)
    async def handler(_: Request, error: DistsysError) -> Response:
        return JSONResponse(error.problem(), error.status)

    async with client_of(app) as client:
        await client.get("/items/1")
        refused = await client.get("/items/1")
    assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["item"])


async def test_a_dependency_of_the_whole_app_lets_websockets_pass() -> None:
    """The dependency behaves like the middleware."""
    app, sent = FastAPI(dependencies=[Depends(rate_limit(limiter(unreachable()), key=everybody))]), []

    @app.websocket("/")
    async def route(socket: WebSocket) -> None:
        await socket.accept()

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await app({**scope_of(), "type": "websocket", "query_string": b"", "subprotocols": []}, receive, send)
    assert sent == ["websocket.accept"]


async def test_what_acquire_raises_is_a_problem_too(redis: Redis) -> None:
    """A route calls acquire() itself, and its timeout is too short."""
    app, own = FastAPI(), limiter(redis, 1)
    app.add_exception_handler(RateLimited, problem_response)

    @app.get("/")
    async def route() -> None:
        await own.acquire("user:secret", timeout=0.1)

    async with client_of(app) as client:
        assert (await client.get("/")).status_code == 200
        refused = await client.get("/")
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
    assert "secret" not in refused.text


async def test_the_quick_start_runs_as_written(redis: Redis) -> None:
    """`if await limiter.is_allowed(f"user:{user_id}")` inside a route."""
    app, limiter = FastAPI(), TokenBucketLimiter(redis, capacity=1, refill_rate=1, clock=frozen)

    @app.get("/{user_id}")
    async def route(user_id: int) -> str:
        if await limiter.is_allowed(f"user:{user_id}"):
            return "process"
        raise HTTPException(429)

    async with client_of(app) as client:
        assert [(await client.get(f"/{user}")).status_code for user in (1, 1, 2)] == [200, 429, 200]


async def test_beside_slowapi_each_keeps_its_own_limit(redis: Redis) -> None:
    """A route has both limits: each refuses in its own format, and the headers don't mix."""
    slow = SlowApi(key_func=get_remote_address, default_limits=["2/minute"], headers_enabled=True)
    app = FastAPI()
    app.state.limiter = slow
    app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
    app.add_middleware(SlowAPIMiddleware)
    app.add_middleware(RateLimitMiddleware, limiter=limiter(redis, 3), key=by_client(), x_headers=True)

    @app.get("/")
    async def route() -> str:
        return "hello"

    async with client_of(app) as client:
        responses = [await client.get("/") for _ in range(4)]
    assert [r.status_code for r in responses] == [200, 200, 429, 429]
    assert [r.headers["Content-Type"] for r in responses[2:]] == ["application/json", "application/problem+json"]
    assert [fields(r, "RateLimit")["default"]["r"] for r in responses] == [2, 1, 0, 0]
    assert [r.headers.get_list("X-RateLimit-Limit") for r in responses] == [["2"], ["2"], ["2"], ["3"]]


# ---- imports


def test_the_middleware_needs_no_framework() -> None:
    """Neither Starlette nor FastAPI nor httpx is loaded; if one is missing, the error says what to install."""
    code = """
import sys
for name in ("starlette", "fastapi", "httpx"):
    sys.modules[name] = None
from distsys.rate_limiting.http import RateLimitMiddleware, rate_limit
try:
    rate_limit(None, key=None)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert "pip install 'distsys[web]'" in line


async def test_the_headers_are_the_same_with_and_without_the_older_trio(redis: Redis) -> None:
    """Most answers are formatted in one line, the others piece by piece: both must be equal."""
    short = RateLimit(limiter(redis, 3, name="short"), key=everybody, name="api")
    long = RateLimit(limiter(redis, 3, name="long"), key=everybody, name="api", x_headers=True)
    for _ in range(5):
        one, other = await short.check({}), await long.check({})
        assert one
        assert other
        assert one.headers == [header for header in other.headers if not header[0].startswith(b"x-")]
        assert (one.refusal is None) == (other.refusal is None)
        if one.refusal and other.refusal:
            assert one.refusal.problem() == other.refusal.problem()
