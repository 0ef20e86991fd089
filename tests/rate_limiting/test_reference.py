"""The client that references/distributed_limits.md shows, executed as it stands there."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis.asyncio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from distsys.rate_limiting.http import RateLimitMiddleware
from distsys.rate_limiting.token_bucket import TokenBucketLimiter

REFERENCE = Path(__file__).parents[2] / "references/distributed_limits.md"


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture(scope="module")
def send() -> Callable[..., Any]:
    """The function of the page's Python block."""
    (block,) = re.findall(r"```python\n(.*?)```", REFERENCE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    return names["send"]  # type: ignore[no-any-return]


async def ask(send: Any, answers: list[httpx.Response], budget: float) -> tuple[int, list[bytes], float]:
    """Return the last status, the bodies that the server got and the seconds waited; the last answer is repeated."""
    bodies, time = list[bytes](), Time()

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(request.content)
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://api") as client:
        response = await send(client, client.build_request("POST", "/", json={"a": 1}), budget, time.sleep)
    return response.status_code, bodies, time.now - 1_000_000


def refusal(after: str | None) -> httpx.Response:
    return httpx.Response(429, headers={} if after is None else {"Retry-After": after})


async def test_client_and_server_understand_each_other(redis: redis.asyncio.Redis, send: Any) -> None:
    """Three tokens, one every ten seconds: seven requests all pass, after forty seconds and not a second later."""
    time = Time()
    limiter = TokenBucketLimiter(redis, capacity=3, refill_rate=0.1, clock=time)

    async def hello(_: Request) -> Response:
        return PlainTextResponse("hello")

    app = RateLimitMiddleware(Starlette(routes=[Route("/", hello)]), limiter, key=lambda _: "me")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app") as client:
        answers = [await send(client, client.build_request("GET", "/"), 60, time.sleep) for _ in range(7)]
    assert [answer.status_code for answer in answers] == [200] * 7
    assert time.now == 1_000_040


async def test_a_refused_request_is_sent_again_after_retry_after(send: Any) -> None:
    """With its body, a POST too."""
    assert await ask(send, [refusal("7"), httpx.Response(200)], 60) == (200, [b'{"a":1}'] * 2, 7)


async def test_the_budget_bounds_all_waits_together(send: Any) -> None:
    """7 + 7 fit in 20 seconds, a third 7 does not: then the caller gets the refusal."""
    status, bodies, waited = await ask(send, [refusal("7")], 20)
    assert (status, len(bodies), waited) == (429, 3, 14)


async def test_a_server_that_says_at_once_is_not_asked_for_ever(send: Any) -> None:
    """Each attempt costs a second of the budget at least."""
    status, bodies, waited = await ask(send, [refusal("0")], 5)
    assert (status, len(bodies), waited) == (429, 6, 5)


@pytest.mark.parametrize("after", [None, "", "soon", "9" * 5_000, "1e3", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"])
async def test_a_retry_after_that_is_no_number_is_left_to_the_caller(send: Any, after: str | None) -> None:
    """As without this function."""
    status, bodies, waited = await ask(send, [refusal(after)], 60)
    assert (status, len(bodies), waited) == (429, 1, 0)


@pytest.mark.parametrize("status", [200, 500, 503])
async def test_only_a_429_is_sent_again(send: Any, status: int) -> None:
    """After any other error the request may have been done."""
    answer = httpx.Response(status, headers={"Retry-After": "1"})
    assert await ask(send, [answer], 60) == (status, [b'{"a":1}'], 0)
