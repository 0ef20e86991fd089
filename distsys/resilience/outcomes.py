"""Outcomes: what an error says about the call that raised it: not done, perhaps done, or not worth repeating.

Promise  NOT_DONE only where nothing can have happened; an ambiguous error is UNKNOWN; one that no table names is OTHER.
Not      for responses that were not raised: call raise_for_status(), or raise an error of your own.
Units    seconds.
Errors   none of its own.
Source   RFC 9110 9.2.2 (idempotent methods), 15.5, 15.6; PostgreSQL appendix A (SQLSTATE); gRPC status codes.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping
from contextlib import suppress
from enum import Enum
from typing import Any

from distsys._support.http import epoch_of
from distsys.errors import DistsysError, Rejected


class Outcome(Enum):
    """What a call that raised has done, and whether it is worth repeating."""

    NOT_DONE = "it certainly did not happen, and may pass later"
    UNKNOWN = "it may have happened"
    FATAL = "the same call would fail again"
    BROKEN = "the same call would fail again, and not by the caller's fault"  # a breaker counts it
    OTHER = "no table knows this error"


NOT_DONE, UNKNOWN, FATAL, BROKEN, OTHER = Outcome


def _table(rows: Mapping[Outcome, str]) -> dict[str, Outcome]:
    """Return the outcome of each word."""
    return {word: outcome for outcome, words in rows.items() for word in words.split()}


# Other 4xx: FATAL, other 5xx: BROKEN. 408: the request never arrived whole. A proxy that lost the reply answers 503;
# with Retry-After it is a refusal: NOT_DONE.
HTTP_STATUS = dict.fromkeys((408, 425, 429), NOT_DONE) | dict.fromkeys((500, 502, 503, 504), UNKNOWN)

_CODES = "UNAVAILABLE DEADLINE_EXCEEDED CANCELLED INTERNAL UNKNOWN"
GRPC_CODE = _table({NOT_DONE: "ABORTED RESOURCE_EXHAUSTED", UNKNOWN: _CODES, BROKEN: "DATA_LOSS"})  # others: FATAL

# The longest prefix that matches counts; others: FATAL.
# 08     the connection broke; in 08001 and 08004 it was never made
# 25006  read only: a primary that became a replica
# 40     rolled back, as in 40001 serialization failure and 40P01 deadlock; but in 40003 the completion is unknown
# 53     too many connections, out of memory
# 55P03  lock not available
# 57P    shut down or crashed, perhaps in the middle of a commit; in 57P03 it is starting and can't connect now
# 57014  cancelled, by a server timeout or by a request
# 58     system error, such as a full disk
# XX     internal errors, corrupted data
SQLSTATE = _table({NOT_DONE: "08001 08004 25006 40 53 55P03 57P03", UNKNOWN: "08 40003 57P 57014", BROKEN: "58 XX"})

_CLASSES = {  # by package
    ("builtins", NOT_DONE): "ConnectionRefusedError",
    ("builtins", UNKNOWN): "ConnectionError TimeoutError EOFError",
    ("builtins", FATAL): "ArithmeticError AssertionError AttributeError ImportError LookupError NameError "
    "SyntaxError TypeError ValueError NotImplementedError RecursionError",
    ("socket", NOT_DONE): "gaierror",  # the name was not resolved
    ("ssl", BROKEN): "SSLCertVerificationError",
    ("ssl", UNKNOWN): "SSLError",
    ("http", UNKNOWN): "HTTPException",
    ("http", FATAL): "InvalidURL",
    ("httpx", NOT_DONE): "ConnectError ConnectTimeout PoolTimeout",
    ("httpx", UNKNOWN): "TransportError",
    ("httpx", FATAL): "LocalProtocolError UnsupportedProtocol RequestError",
    ("requests", NOT_DONE): "ConnectTimeout",
    ("requests", UNKNOWN): "Timeout ConnectionError ChunkedEncodingError",
    ("requests", BROKEN): "SSLError",
    ("urllib3", NOT_DONE): "NewConnectionError ConnectTimeoutError",
    ("urllib3", UNKNOWN): "ProtocolError ReadTimeoutError",
    ("aiohttp", NOT_DONE): "ClientConnectorError ConnectionTimeoutError",
    ("aiohttp", UNKNOWN): "ClientConnectionError ClientPayloadError",
    ("aiohttp", BROKEN): "ClientConnectorCertificateError",
    ("redis", NOT_DONE): "BusyLoadingError MaxConnectionsError ReadOnlyError OutOfMemoryError TryAgainError "
    "ClusterDownError MasterDownError",
    ("redis", UNKNOWN): "ConnectionError TimeoutError",
    ("redis", FATAL): "AuthenticationError AuthorizationError ResponseError",
    ("psycopg", NOT_DONE): "ConnectionTimeout",
    ("psycopg", UNKNOWN): "OperationalError",
    ("psycopg_pool", NOT_DONE): "PoolTimeout TooManyRequests",
}
# By package.name; a class that is not listed counts as the next of its bases that is.
EXCEPTION = {f"{home}.{name}": outcome for (home, outcome), names in _CLASSES.items() for name in names.split()}

ERRNO = dict.fromkeys((errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN), NOT_DONE)
ERRNO |= dict.fromkeys((errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT), UNKNOWN)


def classify(error: BaseException) -> Outcome:
    """Return the outcome: by our own classes, then SQLSTATE, gRPC code, HTTP status, wrapped error, class, errno."""
    if _carries_no_attributes(error):
        return _by_class(type(error))
    if isinstance(error, DistsysError):
        return UNKNOWN if not isinstance(error, Rejected) else NOT_DONE if error.retryable else FATAL
    sqlstate = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if isinstance(sqlstate, str) and len(sqlstate) == 5:
        return next((SQLSTATE[sqlstate[:end]] for end in (5, 3, 2) if sqlstate[:end] in SQLSTATE), FATAL)
    code = getattr(error, "code", None)
    if callable(code) and isinstance(name := getattr(code(), "name", None), str):
        return GRPC_CODE.get(name, FATAL)
    if (status := http_status(error)) is not None:
        if status == 503 and retry_after(error) is not None:
            return NOT_DONE
        return HTTP_STATUS.get(status, FATAL if status < 500 else BROKEN)
    if isinstance(reason := getattr(error, "reason", None), Exception):  # urllib and urllib3 wrap the reason
        return classify(reason)
    found = _by_class(type(error))
    return ERRNO.get(error.errno or 0, OTHER) if found is OTHER and isinstance(error, OSError) else found


_KNOWN_CLASSES: dict[type[BaseException], Outcome] = {}


def _by_class(kind: type[BaseException]) -> Outcome:
    if (known := _KNOWN_CLASSES.get(kind)) is None:
        names = (f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in kind.__mro__)
        known = next((EXCEPTION[name] for name in names if name in EXCEPTION), OTHER)
        if len(_KNOWN_CLASSES) < 1_000:
            _KNOWN_CLASSES[kind] = known
    return known


def _carries_no_attributes(error: BaseException) -> bool:
    """Return whether only the class matters, as for nearly every builtin error."""
    return type(error).__module__ == "builtins" and type(error) is not OSError


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of httpx, requests, aiohttp, Starlette or urllib carries; else None."""
    response = getattr(error, "response", None)
    found = [getattr(response, name, None) for name in ("status_code", "status")]
    found += [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return next((status for status in found if isinstance(status, int) and 400 <= status <= 599), None)


def retry_after(error: BaseException) -> float | None:
    """Return the seconds that the other side asks to wait: the error's `retry_after`, or a Retry-After header.

    The header may hold seconds or a date. None if there is no such wish, or it can't be read.
    """
    if _carries_no_attributes(error):
        return None
    own = getattr(error, "retry_after", None)
    if isinstance(own, (int, float)) and not isinstance(own, bool):
        return max(0.0, float(own)) if own == own else None
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    if not hasattr(headers, "get") or not (value := headers.get("Retry-After") or headers.get("retry-after")):
        return None
    with suppress(TypeError, ValueError, OverflowError):
        return max(0.0, float(int(value)))
    with suppress(TypeError, ValueError, OverflowError):
        now = headers.get("Date") or headers.get("date")  # the server's clock, if it sends it
        return max(0.0, epoch_of(str(value)) - (epoch_of(str(now)) if now else time.time()))
    return None
