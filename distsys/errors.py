"""The errors of all rules. Two roots say what matters most: the guarded work certainly did not happen, or it may have.

Every other error derives from `Rejected` or `Indeterminate`, carries the facts that the caller needs next, and maps to
an RFC 9457 problem. The first line of an error's docstring is its default message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

MAX_SECONDS = 999_999_999_999_999  # the largest integer of a structured field


class DistsysError(Exception):
    """A rule of distsys refused or lost something."""

    status = 500  # HTTP status of the RFC 9457 problem
    problem_type: tuple[str, str] | None = None  # type and title, where IANA has registered a type
    http_headers: Sequence[tuple[bytes, bytes]] | None = None  # headers of the response; None: only Retry-After

    def __init__(self, message: str | None = None, /, **facts: Any) -> None:
        super().__init__(message or (type(self).__doc__ or "").splitlines()[0])
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(f"{type(self).__name__} carries no {name!r}; it carries {sorted(facts)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.facts)

    def problem(self) -> dict[str, Any]:
        """Return the RFC 9457 problem: status, type, title, detail, and the facts as extension members."""
        facts = {k: v for k, v in self.facts.items() if isinstance(v, (str, int, float, bool, type(None)))}
        ours = f"urn:distsys:{_kebab(type(self).__name__)}", (type(self).__doc__ or "").splitlines()[0].rstrip(".")
        kind, title = self.problem_type or ours
        return {
            **facts,
            "type": kind,
            "title": title,
            "status": self.status,
            "detail": str(self),
        }


class Rejected(DistsysError):
    """The guarded work certainly did not happen: retrying is safe."""

    status = 409
    retryable = True  # False where a retry is safe but can't help


class Indeterminate(DistsysError):
    """The guarded work may have happened, or may still happen: retry only what is idempotent."""

    status = 503


class LockNotAcquired(Rejected):
    """The lock was not obtained in the time allowed."""  # holder, waited

    status = 423


class LockDeadlock(Rejected):
    """Two transactions waited for each other and the database ended this one."""


class SharedSession(Rejected):
    """Other clients share the server session behind this connection, and would share its session locks too."""

    status = 500
    retryable = False


class StaleToken(Rejected):
    """A newer holder has written here already."""  # expected (the newest token seen), actual (the token presented)

    retryable = False


class RateLimited(Rejected):
    """The limit is used up for now."""  # key, limit, retry_after

    status = 429
    problem_type = (
        "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "Request cannot be satisfied as assigned quota has been exceeded",
    )

    def problem(self) -> dict[str, Any]:
        """Return the RFC 9457 problem without the key, which may name a person, and with the violated policies."""
        private = ("key", "limit", "retry_after")
        shown = {name: value for name, value in super().problem().items() if name not in private}
        shown["violated-policies"] = self.facts.get("violated-policies", [])
        wait = self.facts.get("retry_after")
        return shown if wait is None else shown | {"detail": f"Try again in {whole_seconds(wait)} s."}


class CircuitOpen(Rejected):
    """The dependency fails too often, so it is not called for a while."""  # name, state, retry_after

    status = 503
    retryable = False  # the breaker is there to prevent immediate retries


class BulkheadFull(Rejected):
    """As many calls are running and waiting as the bulkhead allows."""  # name, depth, expected_wait, retry_after

    status = 503


class BadKey(Rejected):
    """The idempotency key is missing or can't be read."""

    status = 400
    retryable = False


class CallerUnknown(Rejected):
    """The caller is unknown, so the idempotency key has no owner."""

    status = 401
    retryable = False


class KeyReused(Rejected):
    """This key belongs to another request."""  # key

    status = 422
    retryable = False


class KeyInProgress(Rejected):
    """An earlier attempt with this key is still running."""  # key, retry_after


class AnswerNotKept(Rejected):
    """The request was carried out before, but its answer was not kept."""  # key

    retryable = False


class StoreUnavailable(Rejected):
    """The store of idempotency keys can't be reached, and nothing is carried out without it."""  # retry_after

    status = 503


class PatternOrderError(Rejected):
    """These decorators are harmful in this order."""

    status = 500
    retryable = False


class LockLost(Indeterminate):
    """The lease ended, or could not be confirmed, while the work was running."""  # name, token


class OutcomeUnknown(Indeterminate):
    """An earlier attempt ended without saying whether it took effect."""  # key

    status = 409


def whole_seconds(seconds: float) -> int:
    """Return the seconds for a Retry-After: rounded up, at least 1, and no larger than a structured field allows."""
    return max(1, math.ceil(min(seconds, MAX_SECONDS)))


def _kebab(name: str) -> str:
    return "".join(f"-{c.lower()}" if c.isupper() else c for c in name).lstrip("-")


def _rebuild(cls: type[DistsysError], message: str, facts: dict[str, Any]) -> DistsysError:
    return cls(message, **facts)
