"""Answers as they are kept: what an operation returned, as JSON, or a response with its status, headers and body."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable
from datetime import date
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

from distsys._support.arguments import optional

Headers = list[tuple[bytes, bytes]]
# Headers that are never kept: secrets of one exchange, and facts about that exchange alone.
DROPPED = frozenset(
    b"set-cookie date age authorization proxy-authorization www-authenticate proxy-authenticate connection keep-alive "
    b"te trailer transfer-encoding upgrade".split()
)


def kept(result: Any) -> bytes:
    """Return the result as it is kept: JSON, or http_answer of a Starlette Response.

    TypeError if it can't be kept: a stream, or a value that has no form in JSON.
    """
    if is_response(result):
        if not hasattr(result, "body"):
            raise TypeError(f"{result!r} is a stream, which can't be kept: return a complete response")
        return http_answer(result.status_code, result.raw_headers, result.body)
    return json_of(result).encode()


def json_of(value: Any) -> str:
    """Return the value as JSON, pydantic models, dataclasses, dates, Decimals, UUIDs and Enums included."""
    return _encode(value)


def answer_of(answer: bytes) -> Any:
    """Return what `kept` was given, read back from JSON, or as a Starlette Response."""
    if not answer.startswith(b"\0"):
        return json.loads(answer)
    status, headers, body = http_response(answer)
    response = optional("starlette.responses", "web").Response(body, status)
    response.raw_headers = [*headers, (b"idempotent-replayed", b"true")]
    return response


def status_of(result: Any) -> int:
    """Return the status of a Starlette Response; 200 for any other result."""
    return int(result.status_code) if is_response(result) else 200


def is_response(result: Any) -> bool:
    """Return whether the result is a Response of Starlette, or of FastAPI."""
    return hasattr(result, "raw_headers") and hasattr(result, "status_code")


def http_answer(
    status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes, dropped: Collection[bytes] = DROPPED
) -> bytes:
    """Return a response as it is kept: a zero byte, which no JSON begins with; status and headers as a line; the body.

    dropped  names of headers that are not kept, in lower case
    """
    safe = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name.lower() not in dropped]
    return b"\0" + json.dumps([status, safe]).encode() + b"\n" + body


def http_response(answer: bytes) -> tuple[int, Headers, bytes]:
    """Return status, headers and body of what http_answer made."""
    head, _, body = answer[1:].partition(b"\n")
    status, headers = json.loads(head)
    return status, [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers], body


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):  # pydantic
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    raise TypeError(f"an answer is kept as JSON, but {value!r} is a {type(value).__name__}: return plain values")


_encode = json.JSONEncoder(default=_plain).encode  # made once: json.dumps makes an encoder for each call
