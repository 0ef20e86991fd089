"""Idempotency over HTTP: every promise, called over ASGI and over sockets, with real servers behind."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Header
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from pydantic import BaseModel
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from distsys._support.http import problem_response
from distsys.errors import DistsysError
from distsys.idempotency import answers, claims, http, redis_store
from distsys.idempotency.answers import http_answer
from distsys.idempotency.database import PostgresStore, idempotent_execute
from distsys.idempotency.http import IdempotencyMiddleware, idempotency_key_header
from distsys.idempotency.redis_store import RedisStore
from distsys.lab.testbed.servers import Server
from distsys.schema import ensure_schema
from tests.bugs import edited, in_script, kills

App = Callable[..., Awaitable[None]]


def caller(scope: Any) -> str:
    return dict(scope["headers"]).get(b"x-user", b"ada").decode()


def guarded(app: Any, redis: Any, **options: Any) -> IdempotencyMiddleware:
    """Wrap the app; X-User identifies the caller."""
    options = {"lease": 60} | options
    if not options.get("public"):
        options = {"scope": caller} | options
    store = redis if hasattr(redis, "claim") else RedisStore(redis)
    return IdempotencyMiddleware(app, store, **options)


class Shop:
    """Counts its effects, and answers what it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.effects = 0
        self.answers = list(answers)
        routes = [
            Route("/pay", self.pay, methods=["GET", "POST", "PATCH", "PUT"]),
            Route("/other", self.pay, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def pay(self, request: Request) -> Response:
        await request.body()
        self.effects += 1
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, BaseException):
            raise answer
        if callable(answer) and not isinstance(answer, Response):
            answer = await answer(request)
        return answer or JSONResponse({"effect": self.effects}, 201)


def client_of(app: App) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://app")


def key(text: str = "k", **more: str) -> dict[str, str]:
    return {"Idempotency-Key": text, **{name.replace("_", "-"): value for name, value in more.items()}}


def scope_of(
    method: str = "POST", path: str = "/pay", keys: tuple[bytes, ...] = (b"k",), **more: Any
) -> dict[str, Any]:
    headers = [(b"idempotency-key", each) for each in keys]
    return {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers, **more}


async def call(app: App, scope: dict[str, Any], *requests: dict[str, Any]) -> list[dict[str, Any]]:
    """What a server would be sent."""
    sent: list[dict[str, Any]] = []
    left = list(requests or ({"type": "http.request", "body": b""},))

    async def receive() -> dict[str, Any]:
        return left.pop(0) if left else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def is_problem(response: httpx.Response, status: int, kind: str) -> bool:
    problem = response.json()
    assert response.headers.get_list("content-type") == ["application/problem+json"]
    return (response.status_code, problem["status"], problem["type"]) == (status, status, f"urn:distsys:{kind}")


# ---- replays


@kills(
    "headers are dropped by their small letters only",
    edited(answers, "http_answer", "name.lower() not in dropped", "name not in dropped"),
)
async def test_the_first_answer_is_replayed_byte_for_byte(redis: Redis) -> None:
    """Status, headers also where one comes twice, and any bytes; but not what was true of the first exchange alone."""
    first = Response(bytes(range(256)) * 100, 203, {"X-A": "1", "Location": "/pay/1", "Content-Type": "image/x"})
    first.raw_headers += [(b"x-twice", b"1"), (b"X-Twice", b"2"), (b"x-latin", "größe".encode("latin-1"))]
    first.raw_headers += [(b"set-cookie", b"s=secret"), (b"Date", b"now"), (b"connection", b"close"), (b"age", b"1")]
    shop = Shop(first)
    async with client_of(guarded(shop.app, redis)) as client:
        one = await client.post("/pay", headers=key(), content=b"\0\xff")
        replays = [await client.post("/pay", headers=key(), content=b"\0\xff") for _ in range(2)]
    assert "idempotent-replayed" not in one.headers
    assert "idempotency-stored" not in one.headers
    assert one.headers["set-cookie"] == "s=secret"
    for other in replays:
        assert (other.status_code, other.content) == (203, one.content)
        kept = [
            each for each in one.headers.raw if each[0].lower() not in (b"set-cookie", b"date", b"connection", b"age")
        ]
        assert other.headers.raw == [*kept, (b"idempotent-replayed", b"true")]
    assert shop.effects == 1
    (record,) = await redis.keys()
    assert b"secret" not in (await redis.get(record))


async def test_chosen_headers_are_not_kept(redis: Redis) -> None:
    shop = Shop(Response(b"paid", headers={"X-Token": "secret", "X-A": "1"}))
    async with client_of(guarded(shop.app, redis, dropped=["x-TOKEN"])) as client:
        one, other = [await client.post("/pay", headers=key()) for _ in range(2)]
    assert (one.headers["x-token"], other.headers.get("x-token"), other.headers["x-a"]) == ("secret", None, "1")
    with pytest.raises(TypeError, match="dropped='x-token' is a str: give a list"):
        guarded(shop.app, redis, dropped="x-token")


async def test_quoted_and_bare_keys_are_one(redis: Redis) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis)) as client:
        answers = [await client.post("/pay", headers=key(each)) for each in ('"a-1"', "a-1", ' "a-1" ')]
    assert [each.json() for each in answers] == [{"effect": 1}] * 3


async def test_other_keys_other_methods_and_no_key_are_carried_out_each_time(redis: Redis) -> None:
    """GET, HEAD and PUT with a key too: they are not looked at."""
    shop = Shop()
    async with client_of(guarded(shop.app, redis)) as client:
        for number, options in enumerate([{"headers": key("a")}, {"headers": key("b")}, {}, {}], start=1):
            assert (await client.post("/pay", **options)).json() == {"effect": number}  # type: ignore[arg-type]
        for method in ("GET", "GET", "HEAD", "PUT", "PUT"):
            answer = await client.request(method, "/pay", headers=key("a"))
            assert "idempotent-replayed" not in answer.headers
    assert shop.effects == 9


async def test_other_scopes_pass_untouched() -> None:
    for kind in ("websocket", "lifespan"):
        scope = {"type": kind, "headers": [(b"idempotency-key", b"k")]}
        seen: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any, seen: list[Any] = seen) -> None:
            seen.extend((scope, receive, send))

        given = (scope, object(), object())
        await IdempotencyMiddleware(app, None, public=True)(*given)  # type: ignore[arg-type]
        assert all(one is other for one, other in zip(seen, given, strict=True))


async def test_methods_may_be_chosen_in_any_case(redis: Redis) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis, methods=["put"])) as client:
        assert [(await client.put("/pay", headers=key())).json() for _ in range(2)] == [{"effect": 1}] * 2
        assert (await client.post("/pay", headers=key())).json() == {"effect": 2}


async def test_answers_may_be_kept_in_postgresql_too(pg_pool: AsyncConnectionPool) -> None:
    await ensure_schema(pg_pool)
    shop = Shop(Response(bytes(range(256))))
    async with client_of(guarded(shop.app, PostgresStore(pg_pool))) as client:
        assert [(await client.post("/pay", headers=key())).content for _ in range(2)] == [bytes(range(256))] * 2
    assert shop.effects == 1


async def test_a_cluster_keeps_answers_too(redis_cluster: RedisCluster) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, RedisStore(redis_cluster, name="http"), ttl=60)) as client:
        answers = [await client.post("/pay", headers=key(), json=1) for _ in range(2)]
    assert [each.json() for each in answers] == [{"effect": 1}] * 2


# ---- whose key it is, and of what


@kills("a key is everybody's", edited(IdempotencyMiddleware, "__call__", "{await self._caller_of(scope)}\\0", ""))
async def test_a_callers_key_is_nobody_elses(redis: Redis) -> None:
    """A caller learns neither the answer of another nor that it exists; no name can be mistaken for another."""
    shop = Shop()
    async with client_of(guarded(shop.app, redis)) as client:
        for number, user in enumerate(["ada", "bob", "ad", "ada\0", "", "ada k"], start=1):
            answer = await client.post("/pay", headers=key("k", x_user=user), json={"by": user})
            if user:
                assert answer.json()["effect"] <= number
                assert "idempotent-replayed" not in answer.headers
            else:
                assert is_problem(answer, 401, "caller-unknown")
    assert shop.effects == 5


async def test_the_caller_may_be_found_out_asynchronously_and_no_caller_is_401(redis: Redis) -> None:
    users = iter(["ada", "ada", "bob", "", None])

    async def who(_: Any) -> Any:
        await asyncio.sleep(0)
        return next(users)

    shop = Shop()
    async with client_of(guarded(shop.app, redis, scope=who)) as client:
        answers = [await client.post("/pay", headers=key()) for _ in range(5)]
    assert [each.status_code for each in answers] == [201, 201, 201, 401, 401]
    assert [each.json().get("effect") for each in answers] == [1, 1, 2, None, None]


async def test_sharing_answers_between_callers_must_be_explicit(redis: Redis) -> None:
    shop = Shop()
    with pytest.raises(ValueError, match="public=True if everybody"):
        IdempotencyMiddleware(shop.app, RedisStore(redis))
    with pytest.raises(ValueError, match="whose keys"):
        IdempotencyMiddleware(shop.app, RedisStore(redis), scope=caller, public=True)
    async with client_of(guarded(shop.app, redis, public=True)) as client:
        answers = [await client.post("/pay", headers=key("k", x_user=user)) for user in ("ada", "bob")]
    assert [each.json() for each in answers] == [{"effect": 1}] * 2


@kills(
    "any request is the same",
    edited(claims, "check_same_request", "if not hmac.compare_digest(found.fingerprint, fingerprint):", "if False:"),
    method="POST",
    url="/pay?a=1&b=3",
    body=b"x",
)
@kills(
    "the query does not count",
    edited(IdempotencyMiddleware, "_fingerprint", 'scope["query_string"].decode("latin-1")', '""'),
    method="POST",
    url="/pay?a=1&b=3",
    body=b"x",
)
@pytest.mark.parametrize(
    ("method", "url", "body"),
    [
        ("POST", "/other?a=1&b=2", b"x"),
        ("PATCH", "/pay?a=1&b=2", b"x"),
        ("POST", "/pay?a=1&b=3", b"x"),
        ("POST", "/pay?a=1", b"x"),
        ("POST", "/pay?a=1&b=2&a=2", b"x"),
        ("POST", "/pay?a=1&b=2&c", b"x"),
        ("POST", "/pay?a=1&b=2", b"y"),
        ("POST", "/pay?a=1&b=2", b""),
        ("POST", "/pay?a=1&b=%ff", b"x"),
    ],
)
async def test_another_request_with_the_same_key_is_422(redis: Redis, method: str, url: str, body: bytes) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis)) as client:
        first = "/pay?a=1&b=%fe" if "%ff" in url else "/pay?b=2&a=1"
        await client.post(first, headers=key(), content=b"x")
        refused = await client.request(method, url, headers=key(), content=body)
        again = await client.post(first.replace("b=2&a=1", "a=%31&b=2"), headers=key(), content=b"x")
    assert is_problem(refused, 422, "key-reused")
    assert refused.json()["key"] == "k", "by the client's name, not by the store's"
    assert refused.json()["detail"].startswith("'k' belongs to another request")
    assert (again.json(), again.headers["idempotent-replayed"]) == ({"effect": 1}, "true"), "the order does not count"
    assert shop.effects == 1


async def test_chosen_fields_of_a_json_body_tell_requests_apart(redis: Redis) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis, fields=["amount", "to"])) as client:

        async def post(body: bytes) -> int:
            return (await client.post("/pay", headers=key(), content=body)).status_code

        assert await post(b'{"amount": 10.50, "to": {"a": 1, "b": 2}, "sent_at": 1}') == 201
        assert await post(b'{"sent_at": 2, "to": {"b": 2.0, "a": 1}, "amount": 1.05e1}') == 201
        for other in (
            b'{"amount": 10.51, "to": {"a": 1, "b": 2}}',
            b'{"amount": 10.500000000000000000000001, "to": {"a": 1, "b": 2}}',
            b'{"amount": "10.50", "to": {"a": 1, "b": 2}}',
            b'{"amount": 10.50}',
            b'{"amount": 10.50, "to": null}',
            b"{}",
        ):
            assert await post(other) == 422
    assert shop.effects == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"no json", b"[]", b'["amount"]', b'"amount"', b"1", b"null", b"\xff", b'{"amount": NaN}'),
        *(b'{"amount": 1e99999999999999999999}', b'{"amount": "\\ud800"}', b'{"amount": -Infinity}'),
        b'{"amount":' + b"[" * 500 + b"]" * 500 + b"}",
        b"[" * 100_000,
        b'{"amount": ' + b"9" * 100_000 + b"}",
    ],
    ids=range(15),
)
async def test_a_body_without_the_fields_of_an_object_is_400(redis: Redis, body: bytes) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis, fields=["amount"])) as client:
        refused = await client.post("/pay", headers=key(), content=body)
    assert is_problem(refused, 400, "bad-key")
    assert len(refused.content) < 600
    assert shop.effects == 0
    assert await redis.keys() == []


async def test_the_same_path_under_two_mounts_is_two_routes(redis: Redis) -> None:
    """Within a mounted app, and behind a proxy that takes a prefix away."""
    shops = {"/a": Shop(), "/b": Shop()}
    app = Starlette(routes=[Mount(prefix, guarded(shop.app, redis)) for prefix, shop in shops.items()])
    async with client_of(app) as client:
        assert (await client.post("/a/pay", headers=key())).status_code == 201
        assert (await client.post("/a/pay", headers=key())).headers["idempotent-replayed"] == "true"
        assert (await client.post("/b/pay", headers=key())).status_code == 422
    prefixed = guarded(Shop().app, redis)
    sent = [await call(prefixed, scope_of(keys=(b"p",), root_path=root)) for root in ("/v1", "/v1", "/v2")]
    assert [each[0]["status"] for each in sent] == [201, 201, 422]


# ---- what is refused


@pytest.mark.parametrize(
    "keys",
    [
        *((b"",), (b'""',), (b"a b",), (b'"a',), (b"a", b"b"), (b'"a"', b'"b"'), (b"a,b",), (b"k" * 256,), (b"\xff",)),
        *((b"a\r\nset-cookie: x=1",), (b"k" * 100_000,), ("🦆".encode(),)),
    ],
    ids=range(12),
)
async def test_a_malformed_key_is_400_and_nothing_of_it_becomes_a_header(redis: Redis, keys: tuple[bytes, ...]) -> None:
    shop = Shop()
    start, body = await call(guarded(shop.app, redis), scope_of(keys=keys))
    assert start["status"] == 400
    assert sorted(name for name, _ in start["headers"]) == [b"content-length", b"content-type"]
    assert json.loads(body["body"])["type"] == "urn:distsys:bad-key"
    assert len(body["body"]) < 600
    assert (shop.effects, await redis.keys()) == (0, [])


async def test_a_key_may_be_required_of_all_or_of_some(redis: Redis) -> None:
    async with client_of(guarded(Shop().app, redis, required=True)) as client:
        assert is_problem(await client.post("/pay"), 400, "bad-key")
        assert (await client.get("/pay")).status_code == 201
    app = guarded(Shop().app, redis, required=lambda scope: scope["path"] == "/pay")
    async with client_of(app) as client:
        assert is_problem(await client.post("/pay"), 400, "bad-key")
        assert (await client.post("/other")).status_code == 201


async def test_a_key_of_255_characters_is_good(redis: Redis) -> None:
    async with client_of(guarded(Shop().app, redis)) as client:
        assert (await client.post("/pay", headers=key("k" * 255))).status_code == 201


async def test_a_request_that_is_too_large_to_compare_is_413(redis: Redis) -> None:
    shop = Shop()
    async with client_of(guarded(shop.app, redis, max_request=1000)) as client:
        assert is_problem(await client.post("/pay", headers=key(), content=b"x" * 1001), 413, "too-large")
        assert (await client.post("/pay", headers=key(), content=b"x" * 1000)).status_code == 201
        assert (await client.post("/pay", content=b"x" * 10_000)).status_code == 201, (
            "without a key nothing is compared"
        )


async def test_while_it_runs_another_request_is_409_with_retry_after(redis: Redis) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: Any) -> None:
        began.set()
        await go_on.wait()

    shop = Shop(slowly)
    async with client_of(guarded(shop.app, redis)) as client:
        first = asyncio.create_task(client.post("/pay", headers=key()))
        await began.wait()
        refused = await client.post("/pay", headers=key())
        other = await client.post("/pay", headers=key(), content=b"other")
        go_on.set()
        assert is_problem(refused, 409, "key-in-progress")
        assert refused.headers["retry-after"] == "1"
        assert other.status_code == 422
        assert (await first).json() == (await client.post("/pay", headers=key())).json() == {"effect": 1}


@kills("waiters are not woken", in_script(redis_store.END, "if string.sub(record, 2, 2) == '1' then", "if false then"))
async def test_a_waiter_is_woken_and_does_not_poll(redis: Redis) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: Any) -> None:
        began.set()
        await go_on.wait()

    app = guarded(Shop(slowly).app, redis, wait=60)
    async with client_of(app) as client:
        first = asyncio.create_task(client.post("/pay", headers=key()))
        await began.wait()
        await redis.config_resetstat()
        second = asyncio.create_task(client.post("/pay", headers=key()))
        (record,) = await redis.keys()
        while (await redis.getrange(record, 1, 1)) != b"1":
            pass
        go_on.set()
        assert (await first).json() == (await second).json() == {"effect": 1}
    assert "idempotent-replayed" in (await second).headers
    calls = {name: each["calls"] for name, each in (await redis.info("commandstats")).items()}
    assert calls["cmdstat_evalsha"] == 2, "to be told of the end, and to end"
    assert calls["cmdstat_set"] == 3, "to claim, to be done, and to claim once more"


# ---- what frees the key, and what does not


@kills(
    "errors are kept", edited(http._HeldResponse, "__call__", '200 <= int(message["status"]) < 300', "True"), status=500
)
@pytest.mark.parametrize("status", [300, 303, 400, 404, 409, 422, 429, 500, 503])
async def test_only_2xx_are_kept(redis: Redis, status: int) -> None:
    shop = Shop(Response(b"no", status))
    async with client_of(guarded(shop.app, redis)) as client:
        refused = await client.post("/pay", headers=key())
        answer = await client.post("/pay", headers=key(), content=b"may even be another request")
    assert (refused.status_code, refused.content) == (status, b"no")
    assert answer.json() == {"effect": 2}


async def test_an_exception_frees_the_key_and_passes(redis: Redis) -> None:
    shop = Shop(RuntimeError("broken"))
    app = guarded(shop.app, redis)
    with pytest.raises(RuntimeError, match="broken"):
        await call(app, scope_of())
    assert (await call(app, scope_of()))[0]["status"] == 201


async def test_a_cancelled_request_frees_the_key(redis: Redis) -> None:
    began = asyncio.Event()

    async def for_ever(_: Any) -> None:
        began.set()
        await asyncio.Event().wait()

    app = guarded(Shop(for_ever).app, redis)
    request = asyncio.create_task(call(app, scope_of()))
    await began.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert (await call(app, scope_of()))[0]["status"] == 201


@pytest.mark.parametrize("ends", ["exception", "status 500", "cancel"])
async def test_once_the_effect_began_a_failure_leaves_the_outcome_unknown(redis: Redis, ends: str) -> None:
    """409, until a policy says what to do: here it is run again."""
    began = asyncio.Event()

    async def charge(request: Request) -> Response:
        request.scope["distsys.idempotency"].effect_began = True
        began.set()
        if ends == "exception":
            raise RuntimeError
        if ends == "cancel":
            await asyncio.Event().wait()
        return Response(status_code=500)

    shop = Shop(charge)
    request = asyncio.create_task(call(guarded(shop.app, redis), scope_of()))
    await began.wait()
    if ends == "cancel":
        request.cancel()
    await asyncio.wait([request])
    assert request.cancelled() or request.exception() or request.result()[0]["status"] == 500
    async with client_of(guarded(shop.app, redis)) as client:
        unknown = await client.post("/pay", headers=key())
        assert is_problem(unknown, 409, "outcome-unknown")
        assert unknown.json()["key"] == "k", "by the client's name, not by the store's"
    async with client_of(guarded(shop.app, redis, on_unknown="rerun")) as client:
        assert (await client.post("/pay", headers=key())).json() == {"effect": 2}


async def test_a_policy_finds_the_effect_by_the_key_of_its_claim(redis: Redis) -> None:
    """And what it says is kept and replayed, encrypted as the others."""
    ledger: dict[str, int] = {}

    async def charge(request: Request) -> None:
        claim = request.scope["distsys.idempotency"]
        claim.effect_began = True
        ledger[claim.key] = 7
        raise RuntimeError

    async def reconcile(name: str) -> bytes | None:
        paid = ledger.get(name)
        return paid and http_answer(200, [(b"content-type", b"text/plain")], str(paid).encode())  # type: ignore[return-value]

    options: dict[str, Any] = {"encrypt": lambda data: data[::-1], "decrypt": lambda data: data[::-1]}
    shop = Shop(charge)
    async with client_of(guarded(shop.app, redis, on_unknown=reconcile, **options)) as client:
        assert (await client.post("/pay", headers=key())).status_code == 500
        for _ in range(2):
            answer = await client.post("/pay", headers=key())
            assert (answer.status_code, answer.text, answer.headers["idempotent-replayed"]) == (200, "7", "true")
    assert shop.effects == 1


async def test_what_is_kept_may_be_encrypted(redis: Redis) -> None:
    flip: dict[str, Any] = dict.fromkeys(("encrypt", "decrypt"), lambda data: bytes(each ^ 0x5A for each in data))
    shop = Shop(Response(b"card 4111", headers={"X-Secret": "token"}))
    async with client_of(guarded(shop.app, redis, **flip)) as client:
        answers = [await client.post("/pay", headers=key()) for _ in range(2)]
    assert [(each.content, each.headers["x-secret"]) for each in answers] == [(b"card 4111", "token")] * 2
    (record,) = await redis.keys()
    stored = await redis.get(record)
    assert b"4111" not in stored
    assert b"token" not in stored


# ---- what is not kept


@kills("a stream is waited for", edited(http._HeldResponse, "__call__", "not has_length or ", ""), size=0)
@pytest.mark.parametrize("size", [0, 5_000])
async def test_a_stream_passes_as_it_comes_and_is_remembered_as_done(redis: Redis, size: int) -> None:
    """Also where it says how long it is, but is longer than what is kept."""
    go_on, received = asyncio.Event(), list[bytes]()

    async def parts() -> AsyncIterator[bytes]:
        yield b"x" * (size or 1)
        await go_on.wait()
        yield b"end"

    headers = {"content-length": str(size + 3)} if size else {}
    shop = Shop(StreamingResponse(parts(), 200, headers))
    app = guarded(shop.app, redis, max_response=1000)

    async def receive() -> Any:
        if not received:
            received.append(b"")
            return {"type": "http.request"}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message.get("body"):
            received.append(message["body"])
            go_on.set()
        elif message["type"] == "http.response.start":
            assert (b"idempotency-stored", b"false") in message["headers"]

    await app(scope_of(), receive, send)
    assert received == [b"", b"x" * (size or 1), b"end"]
    async with client_of(app) as client:
        assert is_problem(await client.post("/pay", headers=key()), 409, "answer-not-kept")
    assert shop.effects == 1


async def test_an_answer_of_the_largest_size_is_kept_and_one_byte_more_is_not(redis: Redis) -> None:
    for size, status in ((1000, 200), (1001, 409)):
        shop = Shop(Response(b"x" * size))
        async with client_of(guarded(shop.app, redis, max_response=1000)) as client:
            first = await client.post("/pay", headers=key(str(size)))
            again = await client.post("/pay", headers=key(str(size)))
        assert first.content == b"x" * size
        assert first.headers.get("idempotency-stored") == (None if status == 200 else "false")
        assert (again.status_code, shop.effects) == (status, 1)


async def test_a_stream_of_an_error_frees_the_key(redis: Redis) -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield b"sorry"
        yield b"!"

    shop = Shop(StreamingResponse(parts(), 503))
    async with client_of(guarded(shop.app, redis)) as client:
        assert (await client.post("/pay", headers=key())).content == b"sorry!"
        assert (await client.post("/pay", headers=key())).json() == {"effect": 2}


@kills(
    "what began to answer 2xx is free",
    edited(http._HeldResponse, "__call__", "self._claim.effect_began |= self._succeeded", "pass"),
    passed=False,
)
@pytest.mark.parametrize("passed", [False, True])
async def test_an_app_that_fails_after_it_said_2xx_may_have_done_it(redis: Redis, passed: bool) -> None:
    """It does not matter whether the client has received the beginning."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [] if passed else [(b"content-length", b"100")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        raise RuntimeError("lost the rest")

    with pytest.raises(RuntimeError, match="lost the rest"):
        await call(guarded(app, redis), scope_of())
    (start, _) = await call(guarded(app, redis), scope_of())
    assert start["status"] == 409


async def test_an_app_that_never_answers_frees_the_key(redis: Redis) -> None:
    ran: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ran.append(1)

    assert [await call(guarded(app, redis), scope_of()) for _ in range(2)] == [[], []]
    assert ran == [1, 1]


async def test_a_server_that_could_send_files_by_itself_is_not_asked_to(redis: Redis) -> None:
    """What is sent by its path can't be kept; other extensions stay."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["extensions"])
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    extensions: dict[str, Any] = {"http.response.pathsend": {}, "http.response.trailers": {}, "tls": {"a": 1}}
    sent = [await call(guarded(app, redis), scope_of(extensions=extensions)) for _ in range(2)]
    assert seen == [{"tls": {"a": 1}}]
    assert [each[0]["status"] for each in sent] == [200, 200]


async def test_a_client_that_disconnects_before_it_sent_all_has_begun_nothing(redis: Redis) -> None:
    shop = Shop()
    part = {"type": "http.request", "body": b"half", "more_body": True}
    assert await call(guarded(shop.app, redis), scope_of(), part, {"type": "http.disconnect"}) == []
    assert (shop.effects, await redis.keys()) == (0, [])


async def test_a_body_in_parts_reaches_the_app_whole_and_then_the_disconnect(redis: Redis) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend([await receive(), await receive()])

    parts = [{"type": "http.request", "body": each, "more_body": each != b"c"} for each in (b"a", b"", b"b", b"c")]
    await call(guarded(app, redis), scope_of(), *parts)
    assert seen == [{"type": "http.request", "body": b"abc", "more_body": False}, {"type": "http.disconnect"}]


# ---- among other middleware


async def pass_on(request: Request, call_next: Any) -> Response:
    response: Response = await call_next(request)
    response.headers["x-seen"] = "yes"
    return response


@pytest.mark.parametrize("order", ["inside", "outside", "both", "gzip inside", "gzip outside"])
async def test_beside_other_middleware_answers_are_kept_and_replayed(redis: Redis, order: str) -> None:
    """BaseHTTPMiddleware makes a stream of every answer."""
    shop = Shop(JSONResponse({"text": "x" * 3000}))
    other: tuple[Any, dict[str, Any]] = (
        (GZipMiddleware, {}) if "gzip" in order else (BaseHTTPMiddleware, {"dispatch": pass_on})
    )
    if "outside" not in order:
        shop.app.add_middleware(other[0], **other[1])
    shop.app.add_middleware(IdempotencyMiddleware, store=RedisStore(redis), scope=caller)
    if "inside" not in order:
        shop.app.add_middleware(other[0], **other[1])
    async with client_of(shop.app) as client:
        first = await client.post("/pay", headers=key(), json={"a": 1})
        second = await client.post("/pay", headers=key(), json={"a": 1})
        broken = await client.post("/missing", headers=key("missing"))
    assert (first.status_code, first.json()) == (second.status_code, second.json()) == (200, {"text": "x" * 3000})
    assert [each.headers.get("idempotent-replayed") for each in (first, second)] == [None, "true"]
    assert first.headers.get("x-seen") == second.headers.get("x-seen")
    assert broken.status_code == 404
    assert shop.effects == 1


async def test_what_goes_on_in_the_background_runs_once_and_its_failure_changes_nothing(redis: Redis) -> None:
    ran: list[int] = []

    async def after() -> None:
        ran.append(1)
        raise RuntimeError("in the background")

    shop = Shop(JSONResponse("ok", background=BackgroundTask(after)))
    app = guarded(shop.app, redis)
    with pytest.raises(RuntimeError, match="in the background"):
        await call(app, scope_of())
    async with client_of(app) as client:
        replay = await client.post("/pay", headers=key())
    assert (replay.json(), ran, shop.effects) == ("ok", [1], 1)


async def test_an_answer_that_was_received_can_be_replayed_at_once(redis: Redis) -> None:
    """A second request that races the end of the first: when the first byte leaves, the answer is kept."""
    shop = Shop()
    app = guarded(shop.app, redis)
    replays: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request"}

    async def send(message: Any) -> None:
        replays.append(await call(app, scope_of()))

    await app(scope_of(), receive, send)
    assert [(b"idempotent-replayed", b"true") in sent[0]["headers"] for sent in replays] == [True, True]
    assert shop.effects == 1


# ---- without Redis


@pytest.mark.parametrize("policy", ["open", "closed", None])
async def test_without_redis_the_policy_answers(policy: Any) -> None:
    nowhere = Redis(host="127.0.0.1", port=1, retry=Retry(NoBackoff(), 0))
    shop = Shop()
    async with client_of(guarded(shop.app, nowhere, on_failure=policy)) as client:
        answers = [await client.post("/pay", headers=key()) for _ in range(2)]
        assert (await client.post("/pay")).status_code == 201, "nothing is asked for a request without a key"
    if policy == "open":
        assert [each.json() for each in answers] == [{"effect": 1}, {"effect": 2}]
        assert all(each.headers["idempotency-stored"] == "false" for each in answers)
    elif policy == "closed":
        assert is_problem(answers[0], 503, "store-unavailable")
        assert answers[0].headers["retry-after"] == "1"
    else:
        assert [each.status_code for each in answers] == [500, 500]
    assert shop.effects == (3 if policy == "open" else 1)


async def test_an_answer_is_sent_as_not_stored_when_redis_is_lost_meanwhile(own_redis: Server) -> None:
    async def lose(_: Any) -> None:
        await own_redis.kill()

    async with Redis.from_url(own_redis.url, retry=Retry(NoBackoff(), 0)) as redis:
        shop = Shop(lose)
        async with client_of(guarded(shop.app, redis, on_failure="closed")) as client:
            answer = await client.post("/pay", headers=key())
            assert (answer.json(), answer.headers["idempotency-stored"]) == ({"effect": 1}, "false")
            assert (await client.post("/pay", headers=key())).status_code == 503
    assert shop.effects == 1


async def test_a_restarted_redis_forgets_and_carries_on(servers: Any) -> None:
    """It knows neither the answers nor the scripts any more; one that keeps an append-only file knows the answers."""
    server = await servers.redis("keeps-answers", args=["--appendonly", "yes", "--appendfsync", "always"])
    async with Redis.from_url(server.url, retry=Retry(NoBackoff(), 3)) as redis:
        shop = Shop()
        async with client_of(guarded(shop.app, redis)) as client:
            await client.post("/pay", headers=key())
            await server.restart()
            assert (await client.post("/pay", headers=key())).json() == {"effect": 1}
            await redis.flushall()
            await redis.script_flush()
            assert (await client.post("/pay", headers=key())).json() == {"effect": 2}
    await server.kill()


# ---- over sockets


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The app behind uvicorn, on a socket of 127.0.0.1."""
    config = uvicorn.Config(app, port=0, log_level="critical", proxy_headers=False, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:
            await asyncio.sleep(0)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


async def test_fifty_at_once_over_sockets_have_one_effect(redis: Redis) -> None:
    async def turn(_: Any) -> None:
        await asyncio.sleep(0)

    shop = Shop(*[turn] * 50)
    async with served(guarded(shop.app, redis, wait=60)) as url:
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=50)) as client:
            answers = await asyncio.gather(*(client.post("/pay", headers=key(), json={"a": 1}) for _ in range(50)))
    assert [each.json() for each in answers] == [{"effect": 1}] * 50
    assert sum("idempotent-replayed" in each.headers for each in answers) == 49
    assert shop.effects == 1


async def test_over_a_socket_a_replay_is_the_first_answer(redis: Redis) -> None:
    """As HTTP/1.1 has it: lengths, chunks, binary bodies, and problems."""
    bodies = {
        "/bytes": Response(bytes(range(256))),
        "/empty": Response(status_code=204),
        "/big": Response(b"x" * 500_000),
    }

    async def answer(request: Request) -> Response:
        return bodies[request.url.path]

    app = Starlette(routes=[Route(path, answer, methods=["POST"]) for path in bodies])
    async with served(guarded(app, redis)) as url, httpx.AsyncClient(base_url=url) as client:
        for path, wanted in bodies.items():
            first, second = [await client.post(path, headers=key(path), content=b"y" * 300_000) for _ in range(2)]
            assert (first.status_code, first.content) == (second.status_code, second.content)
            assert first.content == wanted.body
            assert second.headers["idempotent-replayed"] == "true"
            assert first.headers.get("content-length") == second.headers.get("content-length")
            assert len(second.headers.get_list("date")) == 1
        assert is_problem(await client.post("/bytes", headers=key("/empty")), 422, "key-reused")
        assert is_problem(await client.post("/bytes", headers=key("a b")), 400, "bad-key")


async def test_a_client_that_disconnects_gets_the_answer_when_it_retries(redis: Redis) -> None:
    """The app goes on, as it may have begun: what it answers is kept."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(_: Any) -> None:
        began.set()
        await go_on.wait()

    shop = Shop(slowly)
    async with served(guarded(shop.app, redis, wait=60)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        first = asyncio.create_task(client.post("/pay", headers=key()))
        await began.wait()
        first.cancel()
        await asyncio.wait([first])
        second = asyncio.create_task(client.post("/pay", headers=key()))
        await asyncio.sleep(0)
        go_on.set()
        assert (await second).json() == {"effect": 1}
    assert shop.effects == 1


class PaymentCreate(BaseModel):
    amount: int


async def test_the_quick_start_runs_as_written(pg_pool: AsyncConnectionPool) -> None:
    """A FastAPI endpoint over HTTP, on a pool: replayed, refused, rolled back, and many at once."""
    db = pg_pool
    await ensure_schema(db)
    async with db.connection() as conn:
        await conn.execute("CREATE TABLE ledger (amount int)")
    router = APIRouter()

    async def process(conn: AsyncConnection[Any]) -> dict[str, int]:
        await conn.execute("INSERT INTO ledger VALUES (5)")
        return {"charged": 5}

    @router.post("/payments")
    async def create_payment(
        data: PaymentCreate, idempotency_key: str = Header(..., alias="Idempotency-Key")
    ) -> dict[str, int]:
        return await idempotent_execute(db, idempotency_key, "/payments", process)  # type: ignore[no-any-return]

    app = FastAPI()
    app.include_router(router)
    app.add_exception_handler(DistsysError, problem_response)

    async def charged() -> int:
        async with db.connection() as conn:
            row = await (await conn.execute("SELECT count(*) FROM ledger")).fetchone()
            assert row is not None
            return int(row[0])

    async with served(app) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        answers = [await client.post("/payments", json={"amount": 5}, headers=key()) for _ in range(3)]
        assert [(each.status_code, each.json()) for each in answers] == [(200, {"charged": 5})] * 3
        assert await charged() == 1
        many = await asyncio.gather(
            *(client.post("/payments", json={"amount": 5}, headers=key("many")) for _ in range(20))
        )
        assert {each.status_code for each in many} == {200}
        assert await charged() == 2
        assert is_problem(await client.post("/payments", json={"amount": 5}, headers=key("a b")), 400, "bad-key")
        assert (await client.post("/payments", json={"amount": 5})).status_code == 422, (
            "FastAPI's: the header is missing"
        )


# ---- FastAPI


def fast(**options: Any) -> FastAPI:
    app = FastAPI()

    @app.post("/pay")
    async def pay(name: str | None = Depends(idempotency_key_header(**options))) -> str | None:
        return name

    return app


async def test_the_dependency_gives_the_key_without_quotes(redis: Redis) -> None:
    async with client_of(fast()) as client:
        assert (await client.post("/pay", headers=key('"a \\"b\\""'))).json() == 'a "b"'
        assert (await client.post("/pay", headers=key("a-b"))).json() == "a-b"
        for headers in ({}, key("a b"), key("k" * 256), [("Idempotency-Key", "a"), ("idempotency-key", "b")]):
            refused = await client.post("/pay", headers=headers)  # type: ignore[arg-type]
            assert (refused.status_code, list(refused.json())) == (400, ["detail"])
            assert refused.headers.get_list("content-type") == ["application/problem+json"]
            assert "Idempotency-Key" in refused.json()["detail"]
    async with client_of(fast(required=False)) as client:
        assert (await client.post("/pay")).json() is None
        assert (await client.post("/pay", headers=key("a b"))).status_code == 400


@pytest.mark.parametrize("required", [True, False])
def test_the_header_stands_in_openapi(required: bool) -> None:
    (header,) = fast(required=required).openapi()["paths"]["/pay"]["post"]["parameters"]
    assert (header["name"], header["in"]) == ("Idempotency-Key", "header")
    assert ("required" if required else "optional") in header["description"]


async def test_the_app_finds_its_claim_in_the_scope(redis: Redis) -> None:
    """With the number to write with, which grows."""
    fences: list[int] = []

    async def look(request: Request) -> Response:
        fences.append(await request.scope["distsys.idempotency"].fence())
        return Response(status_code=500)

    async with client_of(guarded(Shop(look, look, look).app, redis)) as client:
        for _ in range(3):
            await client.post("/pay", headers=key())
    assert fences == sorted(set(fences))
    assert len(fences) == 3


async def test_stored_keys_tell_nothing(redis: Redis) -> None:
    """Neither the key nor the caller stands in Redis, only the hash of both."""
    async with client_of(guarded(Shop().app, redis)) as client:
        await client.post("/pay", headers=key("my-key", x_user="ada"))
    (record,) = await redis.keys()
    assert hashlib.sha256(b"ada\0my-key").hexdigest().encode() in record
    assert b"my-key" not in record


@pytest.mark.parametrize(
    ("options", "text"),
    [({"methods": "POST"}, "methods='POST' is a str"), ({"fields": "amount"}, "fields='amount' is a str")],
)
def test_a_name_in_place_of_a_list_is_noticed(options: dict[str, Any], text: str) -> None:
    """Its letters would be taken for methods, and nothing would be protected."""
    with pytest.raises(TypeError, match=text):
        IdempotencyMiddleware(Shop().app, None, public=True, **options)  # type: ignore[arg-type]


def test_the_middleware_needs_no_framework() -> None:
    code = """
import sys
for name in ("starlette", "fastapi", "httpx"):
    sys.modules[name] = None
from distsys.idempotency.http import IdempotencyMiddleware
IdempotencyMiddleware(None, None, public=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
