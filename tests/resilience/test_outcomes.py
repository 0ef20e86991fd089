"""Outcomes of errors: the real exceptions of the clients, caused by real servers where possible."""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import socket
import ssl
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import psycopg
import pytest
import redis.asyncio
import redis.exceptions
import requests
import urllib3
from psycopg import errors as sql
from psycopg_pool import AsyncConnectionPool, PoolTimeout, TooManyRequests
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from distsys.errors import BulkheadFull, CircuitOpen, Indeterminate, LockLost, RateLimited, Rejected
from distsys.resilience import outcomes
from distsys.resilience.outcomes import (
    BROKEN,
    FATAL,
    NOT_DONE,
    OTHER,
    UNKNOWN,
    Outcome,
    classify,
    http_status,
    retry_after,
)
from tests.bugs import kills, replaced

# ---- HTTP clients, against a server that answers as its path says


class Answers(BaseHTTPRequestHandler):
    """/503?7 answers 503 with Retry-After: 7; /0 closes without an answer."""

    def do_GET(self) -> None:
        status, _, wait = self.path[1:].partition("?")
        if status == "0":
            self.close_connection = True
            return
        self.send_response(int(status))
        if wait:
            self.send_header("Retry-After", urllib.parse.unquote(wait))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def nobody() -> str:
    """An address where connections are refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def by_httpx(url: str) -> None:
    httpx.get(url, trust_env=False).raise_for_status()


def by_requests(url: str) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.get(url).raise_for_status()


def by_urllib(url: str) -> None:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()


def by_urllib3(url: str) -> None:
    with urllib3.PoolManager(retries=urllib3.Retry(0)) as pool:
        pool.request("GET", url)


def raised(call: Callable[[str], None], url: str) -> Exception:
    try:
        call(url)
    except Exception as error:  # noqa: BLE001
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return error
    raise AssertionError("it did not raise")


CLIENTS = [by_httpx, by_requests, by_urllib]
STATUS = {400: FATAL, 401: FATAL, 403: FATAL, 404: FATAL, 409: FATAL, 422: FATAL, 501: BROKEN, 505: BROKEN}
STATUS |= {408: NOT_DONE, 425: NOT_DONE, 429: NOT_DONE, 500: UNKNOWN, 502: UNKNOWN, 503: UNKNOWN, 504: UNKNOWN}


@kills(
    "a 401 is tried again",
    replaced(outcomes, "HTTP_STATUS", {**outcomes.HTTP_STATUS, 401: UNKNOWN}),
    client=by_httpx,
    status=401,
)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
@pytest.mark.parametrize(("status", "outcome"), STATUS.items())
def test_a_status_decides_whichever_client_raised_it(
    server: str, client: Callable[[str], None], status: int, outcome: Outcome
) -> None:
    """408 425 429 500 502 503 504 may pass; 400 401 403 404 409 422 never."""
    error = raised(client, f"{server}/{status}")
    assert (http_status(error), classify(error), retry_after(error)) == (status, outcome, None)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_retry_after_is_read_whichever_client_raised_it(server: str, client: Callable[[str], None]) -> None:
    """The header holds seconds or an HTTP date; with it, a 503 is a refusal."""
    date = urllib.parse.quote(formatdate(4e9, usegmt=True))
    errors = [raised(client, f"{server}/{path}") for path in ("503?7", "429?120", f"503?{date}")]
    assert [classify(error) for error in errors] == [NOT_DONE] * 3
    assert [retry_after(error) for error in errors[:2]] == [7, 120]
    assert (retry_after(errors[2]) or 0) > 1e9


@pytest.mark.parametrize(
    ("client", "outcome"),
    [(by_httpx, NOT_DONE), (by_requests, UNKNOWN), (by_urllib, NOT_DONE), (by_urllib3, NOT_DONE)],
    ids=["httpx", "requests", "urllib", "urllib3"],
)
def test_a_refused_connection_did_nothing(nobody: str, client: Callable[[str], None], outcome: Outcome) -> None:
    """requests says no more than ConnectionError, which may be a reset as well."""
    assert classify(raised(client, nobody)) is outcome


@pytest.mark.parametrize("client", [*CLIENTS, by_urllib3], ids=lambda client: client.__name__)
def test_a_connection_that_ends_without_an_answer_may_have_done_it(server: str, client: Callable[[str], None]) -> None:
    """The request had been sent."""
    assert classify(raised(client, f"{server}/0")) is UNKNOWN


# ---- PostgreSQL and Redis


async def test_what_postgres_says_decides(pg: str) -> None:
    """SQLSTATE decides: a rollback is certain, a session that ended is not, a mistake stays a mistake."""
    async with await psycopg.AsyncConnection.connect(pg, autocommit=True) as one:
        await one.execute("CREATE TABLE t (id int PRIMARY KEY, n int)")
        await one.execute("INSERT INTO t VALUES (1, 0)")
        statements = [
            ("SELECT 1 / 0", FATAL),
            ("INSERT INTO t VALUES (1, 0)", FATAL),
            ("SELEC", FATAL),
            ("SET statement_timeout = 1; SELECT pg_sleep(9)", UNKNOWN),
            ("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$", NOT_DONE),
            ("DO $$ BEGIN RAISE SQLSTATE '40P01'; END $$", NOT_DONE),
            ("DO $$ BEGIN RAISE SQLSTATE '57P01'; END $$", UNKNOWN),
            ("SELECT pg_terminate_backend(pg_backend_pid())", UNKNOWN),
        ]
        for statement, outcome in statements:
            with pytest.raises(psycopg.Error) as error:
                await one.execute(statement)
            assert classify(error.value) is outcome, statement
    with pytest.raises(psycopg.OperationalError) as error:
        await psycopg.AsyncConnection.connect(pg, dbname="nowhere")
    assert classify(error.value) is UNKNOWN
    async with AsyncConnectionPool(pg, min_size=1, max_size=1, max_waiting=1, open=False) as pool:
        async with pool.connection():
            with pytest.raises(PoolTimeout) as late:
                async with pool.connection(timeout=0.01):
                    pass
    assert classify(late.value) is NOT_DONE


async def test_what_redis_says_decides(redis: redis.asyncio.Redis) -> None:
    """A mistake stays one; a server that is loading, read-only or full has done nothing."""
    await redis.set("text", "x")
    for call in (redis.incr("text"), redis.execute_command("NONSENSE"), redis.evalsha("0" * 40, 0)):
        with pytest.raises(Exception) as error:  # noqa: PT011
            await call
        assert classify(error.value) is FATAL
    nobody = type(redis)(port=1, retry=Retry(NoBackoff(), 0))
    with pytest.raises(Exception) as error:  # noqa: PT011
        await nobody.ping()
    assert classify(error.value) is UNKNOWN


# ---- by shape


class Code(Enum):
    """An enum like grpc.StatusCode."""

    UNAVAILABLE = 14
    ABORTED = 10
    INVALID_ARGUMENT = 3
    RESOURCE_EXHAUSTED = 8
    DEADLINE_EXCEEDED = 4
    PERMISSION_DENIED = 7


class RpcError(Exception):
    """An error like that of grpc: its code is a method."""

    def __init__(self, code: Code) -> None:
        self.code = lambda: code


def like(module: str, name: str, *bases: type[Exception], **facts: Any) -> Exception:
    """An error of a package that is not installed here."""
    error = type(name, bases or (Exception,), {"__module__": module})()
    vars(error).update(facts)
    return error


connector_error = type("ClientConnectorError", (OSError,), {"__module__": "aiohttp.client_exceptions"})
connection_error = type("ClientConnectionError", (Exception,), {"__module__": "aiohttp.client_exceptions"})
request = httpx.Request("GET", "http://x")
KINDS: list[tuple[BaseException, Outcome]] = [
    (RpcError(Code.UNAVAILABLE), UNKNOWN),
    (RpcError(Code.DEADLINE_EXCEEDED), UNKNOWN),
    (RpcError(Code.ABORTED), NOT_DONE),
    (RpcError(Code.RESOURCE_EXHAUSTED), NOT_DONE),
    (RpcError(Code.INVALID_ARGUMENT), FATAL),
    (RpcError(Code.PERMISSION_DENIED), FATAL),
    (like("aiohttp.client_exceptions", "ClientResponseError", status=503, headers=None), UNKNOWN),
    (like("aiohttp.client_exceptions", "ClientResponseError", status=429, headers={"Retry-After": "5"}), NOT_DONE),
    (like("aiohttp.client_exceptions", "ClientResponseError", status=401), FATAL),
    (connector_error(), NOT_DONE),
    (like("aiohttp.client_exceptions", "ClientConnectorCertificateError", connector_error), BROKEN),
    (like("aiohttp.client_exceptions", "ServerDisconnectedError", connection_error), UNKNOWN),
    (like("starlette.exceptions", "HTTPException", status_code=409), FATAL),
    (like("somebody", "SerializationFailure", pgcode="40001"), NOT_DONE),
    (like("somebody", "Odd", code=503), UNKNOWN),
    (like("somebody", "Odd", code=17, status="no", response="neither"), OTHER),
    (sql.SerializationFailure(), NOT_DONE),
    (sql.DeadlockDetected(), NOT_DONE),
    (sql.ConnectionFailure(), UNKNOWN),
    (sql.SqlclientUnableToEstablishSqlconnection(), NOT_DONE),
    (sql.StatementCompletionUnknown(), UNKNOWN),
    (sql.TooManyConnections(), NOT_DONE),
    (sql.LockNotAvailable(), NOT_DONE),
    (sql.AdminShutdown(), UNKNOWN),
    (sql.CannotConnectNow(), NOT_DONE),
    (sql.UniqueViolation(), FATAL),
    (psycopg.OperationalError("lost"), UNKNOWN),
    (sql.ConnectionTimeout(), NOT_DONE),
    (TooManyRequests(), NOT_DONE),
    (redis.exceptions.ConnectionError(), UNKNOWN),
    (redis.exceptions.TimeoutError(), UNKNOWN),
    (redis.exceptions.AuthenticationError(), FATAL),
    (redis.exceptions.BusyLoadingError(), NOT_DONE),
    (redis.exceptions.ReadOnlyError(), NOT_DONE),
    (redis.exceptions.OutOfMemoryError(), NOT_DONE),
    (redis.exceptions.ClusterDownError("down"), NOT_DONE),
    (redis.exceptions.NoPermissionError(), FATAL),
    (httpx.ConnectTimeout("", request=request), NOT_DONE),
    (httpx.PoolTimeout("", request=request), NOT_DONE),
    (httpx.ReadTimeout("", request=request), UNKNOWN),
    (httpx.WriteError("", request=request), UNKNOWN),
    (httpx.RemoteProtocolError("", request=request), UNKNOWN),
    (httpx.UnsupportedProtocol("", request=request), FATAL),
    (httpx.TooManyRedirects("", request=request), FATAL),
    (requests.exceptions.ConnectTimeout(), NOT_DONE),
    (requests.exceptions.ReadTimeout(), UNKNOWN),
    (requests.exceptions.SSLError(), BROKEN),
    (requests.exceptions.ChunkedEncodingError(), UNKNOWN),
    (requests.exceptions.InvalidURL(), FATAL),
    (urllib.error.URLError(socket.gaierror()), NOT_DONE),
    (urllib.error.URLError(TimeoutError()), UNKNOWN),
    (urllib.error.URLError(ssl.SSLCertVerificationError()), BROKEN),
    (urllib.error.URLError("unknown url type: x"), OTHER),
    (http.client.RemoteDisconnected(), UNKNOWN),
    (http.client.InvalidURL(), FATAL),
    (OSError(errno.EHOSTUNREACH, ""), NOT_DONE),
    (OSError(errno.EPIPE, ""), UNKNOWN),
    (OSError(errno.ENOENT, ""), OTHER),
    (OSError(), OTHER),
    (asyncio.IncompleteReadError(b"", 1), UNKNOWN),
    (json.JSONDecodeError("", "", 0), FATAL),
    (ZeroDivisionError(), FATAL),
    (ModuleNotFoundError(), FATAL),
    (NotImplementedError(), FATAL),
    (RuntimeError(), OTHER),
    (type("MyTimeout", (TimeoutError,), {})(), UNKNOWN),
    (RateLimited("later"), NOT_DONE),
    (BulkheadFull(), NOT_DONE),
    (Rejected(), NOT_DONE),
    (CircuitOpen(), FATAL),
    (Indeterminate(), UNKNOWN),
    (LockLost(), UNKNOWN),
]


@kills(
    "a commit that was cut off did not happen",
    replaced(outcomes, "SQLSTATE", {"08": NOT_DONE}),
    error=sql.ConnectionFailure(),
)
@pytest.mark.parametrize(("error", "outcome"), KINDS, ids=[f"{n} {type(e).__name__}" for n, (e, _) in enumerate(KINDS)])
def test_an_error_is_what_its_code_or_class_says(error: BaseException, outcome: Outcome) -> None:
    """Twice, for the second answer comes from memory."""
    assert [classify(error), classify(error)] == [outcome, outcome]


@pytest.mark.parametrize("name", outcomes.EXCEPTION)
def test_every_name_of_the_table_that_is_installed_is_a_class(name: str) -> None:
    """One that a package has renamed would never match."""
    package, _, kind = name.partition(".")
    homes: dict[str, list[Any]] = {"requests": [requests.exceptions], "urllib3": [urllib3.exceptions]}
    homes |= {"redis": [redis.exceptions], "psycopg": [psycopg, sql], "httpx": [httpx], "http": [http.client]}
    homes |= {"socket": [socket], "ssl": [ssl], "builtins": [__import__("builtins")]}
    homes |= {"psycopg_pool": [__import__("psycopg_pool")]}
    if package == "aiohttp":
        return
    found = [getattr(home, kind) for home in homes[package] if hasattr(home, kind)]
    assert issubclass(found[0], BaseException)
    assert found[0].__module__.partition(".")[0] == package or package in ("socket", "ssl")


# ---- Retry-After

NOW = "Sun, 06 Nov 1994 08:48:37 GMT"


@pytest.mark.parametrize(
    ("said", "wait"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        (b"5", 5.0),
        (5, 5.0),
        ("0", 0.0),
        ("-3", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 60.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 60.0),
        ("Sun Nov  6 08:49:37 1994", 60.0),
        ("Sun, 06 Nov 1994 08:47:37 GMT", 0.0),
        ("soon", None),
        ("", None),
        ("1.5", None),
        ("inf", None),
        ("9" * 400, None),
        ("9" * 5_000, None),
        ("Wed, 01 Jan 2020 00:00:00 +9999", None),
        (["5"], None),
        (("5",), None),
    ],
    ids=lambda value: "" if isinstance(value, float) else str(value) if len(str(value)) < 99 else len(str(value)),
)
def test_retry_after_is_seconds_or_a_date_and_nothing_breaks_it(
    said: Any, wait: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted from the Date of the same answer, without one from now; the zone of the machine does not matter."""
    error = like("somebody", "Error", headers={"Retry-After": said, "Date": NOW})
    assert retry_after(error) == wait
    response = httpx.Response(503, headers={"retry-after": said} if isinstance(said, str) else {})
    monkeypatch.setattr("time.time", lambda: 784_111_717.0)  # NOW
    if isinstance(said, str):
        assert retry_after(httpx.HTTPStatusError("", request=request, response=response)) == wait


def test_an_error_of_ours_says_itself_how_long() -> None:
    """A `retry_after` that is no number is ignored."""
    assert retry_after(RateLimited("later", retry_after=2.5)) == 2.5
    for odd in (float("nan"), True, "7", None):
        assert retry_after(like("somebody", "Error", retry_after=odd)) is None
    assert retry_after(RateLimited("later")) is None
    assert retry_after(ValueError()) is None
