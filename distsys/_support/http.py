"""Shared by the rules over HTTP: the ASGI types, errors as RFC 9457 problems, and dates in headers."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any

from distsys._support.arguments import optional
from distsys.errors import DistsysError, whole_seconds

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

PROBLEM = "application/problem+json"


async def problem_response(request: Any, error: Exception) -> Any:
    """Answer with an RFC 9457 problem: `app.add_exception_handler(DistsysError, problem_response)`.

    The status, the headers (Retry-After, and RateLimit of a limiter) and the facts are those of the error. Any other
    exception, for which this was registered by mistake, is raised again.
    """
    if not isinstance(error, DistsysError):
        raise error
    status, headers, body = problem(error)
    response = optional("starlette.responses", "web").Response(body, status)
    response.raw_headers = headers
    return response


def problem(error: DistsysError) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of the problem that tells a client of this error."""
    body = json.dumps(error.problem()).encode()
    headers = [header("content-type", PROBLEM), header("content-length", len(body))]
    wait = error.facts.get("retry_after")
    if error.http_headers is not None:
        headers += error.http_headers
    elif wait is not None:
        headers.append(header("retry-after", whole_seconds(wait)))
    return error.status, headers, body


async def send_problem(send: Send, error: DistsysError) -> None:
    """Send the problem of this error as a whole ASGI response."""
    await respond(send, *problem(error))


async def respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    """Send a whole ASGI response."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def header(name: str, value: object) -> tuple[bytes, bytes]:
    """Return a header in the form of ASGI: name and value as bytes."""
    return name.encode(), str(value).encode()


def epoch_of(date: str) -> float:
    """Return the seconds since 1970 of an HTTP date. The asctime form names no time zone and means UTC."""
    at = parsedate_to_datetime(date)
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
