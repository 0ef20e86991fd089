"""Rate limits over HTTP: ASGI middleware, FastAPI dependency, and headers that tell clients how much is left.

Promise  a refused request never reaches the app; it gets 429 as application/problem+json, which names the policies that
         refused, and Retry-After: whole seconds, at least 1, never before the same request can pass. Every response for
         which a limit was asked says what is left: RateLimit, RateLimit-Policy and, if you want, X-RateLimit-*.
Not      for websockets, which pass unlimited. The keys, which say who is limited, are made in keys.py.
Units    whole seconds, rounded up; tokens, rounded down; X-RateLimit-Reset in seconds since 1970, as GitHub has it.
Errors   what Redis raises without `on_failure`, and what your key or cost function raises, passes: the server says 500.
         The policy `closed` answers 503 and not 429, because the client did nothing wrong. Under `open` a response does
         not say what is left, because nobody knows.
Source   draft-ietf-httpapi-ratelimit-headers-11; RFC 9651 (structured fields), 9457 (problems), 6585 (429), 9110 10.2.3
"""

from __future__ import annotations

import hashlib
import math
import time
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

from distsys._support.arguments import optional
from distsys._support.http import PROBLEM, App, Headers, Message, Receive, Scope, Send, header, send_problem
from distsys.errors import MAX_SECONDS, RateLimited, whole_seconds
from distsys.rate_limiting.decision import Decision
from distsys.rate_limiting.keys import awaited, hashed
from distsys.rate_limiting.keys import by_client as by_client
from distsys.rate_limiting.keys import client_address as client_address

Who = str | tuple[str, Mapping[str, str]] | None  # a key; tier and subjects; None: this request is not limited
Key = Callable[[Scope], Who | Awaitable[Who]]
Cost = float | Callable[[Scope], float | Awaitable[float]]

PLAIN_TYPES = (str, tuple, int, float, type(None))  # of a result that needs no await
MAX_KEY = 200  # characters of a key; a longer one is hashed, so that nobody can fill Redis with keys
REDUCED_CAPACITY = (
    "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity",
    "Request cannot be satisfied due to temporary server capacity constraints",
)


class Limiter(Protocol):
    """What can stand behind a rate limit over HTTP: TokenBucketLimiter, SlidingWindowLimiter, TieredLimiter, or yours.

    Besides try_acquire, these attributes are read: `name`; and for RateLimit-Policy either `limit` and `window`, or
    `limit.capacity` and `limit.refill_rate`, or `tiers`.
    """

    @property
    def try_acquire(self) -> Callable[..., Awaitable[Any]]:
        """The function that decides a request: (key, cost=) -> Decision, or with tiers (tier, subjects, cost=)."""


class Policy:
    """One entry of RateLimit-Policy: `quota` tokens in `window` seconds.

    name     percent-encoded where it is not ASCII, as a structured field demands
    per      whose tokens these are, if it is a quota of a tier
    refills  whether tokens come back one by one, as in a bucket, or as in a sliding window with their admissions
    """

    def __init__(self, name: str, quota: float, window: float, per: str | None = None, refills: bool = True) -> None:
        self.name = "".join(c if " " <= c <= "~" else quote(c, safe="", errors="replace") for c in name)
        self.quota, self.window = quota, window
        self.per, self.refills = per, refills
        self.quoted = '"' + self.name.replace("\\", r"\\").replace('"', r"\"") + '"'
        self.item = f"{self.quoted};q={math.floor(quota)};w={min(max(1, math.ceil(window)), MAX_SECONDS)}"
        self.header = (b"ratelimit-policy", self.item.encode())

    @classmethod
    def of(cls, limiter: Any, name: str, per: str | None = None) -> Policy:
        """Return the policy of a limiter or of a tier's quota."""
        if (window := getattr(limiter, "window", None)) is not None:
            return cls(name, limiter.limit, window, per, refills=False)
        return cls(name, limiter.limit.capacity, limiter.limit.capacity / limiter.limit.refill_rate, per)

    def wait(self, one: Decision) -> int:
        """Return the parameter t: whole seconds until the next token, in which nobody gets more than what is left."""
        if not one.allowed:
            return whole_seconds(one.retry_after)
        wait, taken = one.reset_after, one.limit - one.remaining - 1
        if self.refills and taken > 0:
            wait -= taken * self.window / one.limit
        # A difference of floats may be half a microsecond too large.
        return min(math.ceil(wait - 5e-7), MAX_SECONDS) if wait > 0 else 0


class Answer(NamedTuple):
    """The headers that the response gets, and the refusal that takes the response's place, if there is one."""

    headers: Headers
    refusal: RateLimited | None = None


@dataclass(eq=False, repr=False)
class RateLimit:
    """A limiter behind HTTP: it turns decisions into headers and refusals.

    key             who is limited: a function of the ASGI scope that returns a key, (tier, subjects) for a
                    TieredLimiter, or None for a request that is not limited; may be async
    cost            how many tokens a request takes: a number, or a function as for `key`; 0 is free
    name            of the policy; by default the limiter's own, or "default"
    x_headers       send X-RateLimit-Limit, -Remaining and -Reset too; of several quotas, those of the tightest
    partition_keys  send the parameter pk, the first 8 bytes of the SHA-256 of the key. Off by default: a shared cache
                    that stores the response would tell others that hash, from which an address can be guessed
    clock           seconds since 1970, for X-RateLimit-Reset
    """

    limiter: Limiter
    _: KW_ONLY
    key: Key
    cost: Cost = 1
    name: str | None = None
    x_headers: bool = False
    partition_keys: bool = False
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        tiers: Mapping[str, Any] = getattr(self.limiter, "tiers", {})
        self._tiers = {tier: [Policy.of(quota, quota.name, quota.per) for quota in tiers[tier]] for tier in tiers}
        name = self.name or getattr(self.limiter, "name", "") or "default"
        self._own = [] if tiers else [Policy.of(self.limiter, name)]
        self._plain = bool(self._own) and not self.x_headers and not self.partition_keys

    async def check(self, scope: Scope) -> Answer | None:
        """Ask the limiter and return what to tell the client; None for a request that is not limited.

        Errors of the key and cost functions and of the limiter pass.
        """
        who = self.key(scope)
        if not isinstance(who, PLAIN_TYPES):
            who = await awaited(who)
        cost: Any = self.cost
        if callable(cost) and not isinstance(cost := cost(scope), PLAIN_TYPES):
            cost = await awaited(cost)
        if who is None or cost == 0:
            return None
        if self._tiers:
            tier, subjects = who if isinstance(who, tuple) else (who, {})
            return await self._check_tier(tier, subjects, cost)
        key, (policy,) = _bounded(who), self._own
        if cost > policy.quota:
            return _refusal(429, [policy.name], None, [policy.header])
        decision = await self.limiter.try_acquire(key, cost=cost)
        if decision.allowed and self._plain and decision.source != "open":
            # Nearly always: what _headers_for says, in one line.
            now = f"{policy.quoted};r={decision.remaining};t={policy.wait(decision)}"
            return Answer([policy.header, (b"ratelimit", now.encode())])
        return self._headers_for(self._own, [decision], {None: key})

    async def _check_tier(self, tier: str, subjects: Mapping[str, str], cost: float) -> Answer:
        subjects, policies = {per: _bounded(subject) for per, subject in subjects.items()}, self._tiers.get(tier, [])
        if too_small := [policy.name for policy in policies if cost > policy.quota]:
            item = header("ratelimit-policy", ", ".join(policy.item for policy in policies))
            return _refusal(429, too_small, None, [item])
        decision = await self.limiter.try_acquire(tier, subjects, cost=cost)
        return self._headers_for(policies, list(decision.quotas.values()), subjects)

    def _headers_for(self, policies: list[Policy], decisions: list[Decision], subjects: Mapping[Any, str]) -> Answer:
        """Return the answer that states these decisions.

        subjects  by the `per` of the policy; None stands for a limiter without tiers
        """
        pks = [_partition(policy.per, subjects) if self.partition_keys else "" for policy in policies]
        headers = [header("ratelimit-policy", ", ".join(p.item + pk for p, pk in zip(policies, pks, strict=True)))]
        refused = [policy.name for policy, one in zip(policies, decisions, strict=True) if not one]
        source, wait = decisions[0].source, max(one.retry_after for one in decisions)
        if source == "open":
            return Answer(headers)
        if source == "closed":
            return _refusal(503, [], wait, headers)
        waits = [policy.wait(one) for policy, one in zip(policies, decisions, strict=True)]
        if refused:  # Retry-After is never before the end of an effective window
            waits = [min(each, whole_seconds(wait)) for each in waits]
        rows = zip(policies, decisions, waits, pks, strict=True)
        items = [f"{policy.quoted};r={one.remaining};t={wait}{pk}" for policy, one, wait, pk in rows]
        headers.append(header("ratelimit", ", ".join(items)))
        if self.x_headers:
            one, seconds = max(zip(decisions, waits, strict=True), key=lambda pair: pair[0].tightness)
            reset = math.ceil(self.clock()) + seconds
            values = {"limit": math.floor(one.limit), "remaining": one.remaining, "reset": reset}
            headers += [header(f"x-ratelimit-{word}", value) for word, value in values.items()]
        return _refusal(429, refused, wait, headers) if refused else Answer(headers)


class RateLimitMiddleware:
    """`app.add_middleware(RateLimitMiddleware, limiter=limiter, key=by_client())`; the options are those of RateLimit.

    Add CORSMiddleware after this one. It then stands outside, so browsers may read a refusal and preflight requests
    are not counted.
    """

    def __init__(self, app: App, limiter: Limiter, **options: Any) -> None:
        self.app, self._limit = app, RateLimit(limiter, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through with its headers, or answer with the refusal."""
        answer = await self._limit.check(scope) if scope["type"] == "http" else None
        if answer is None:
            return await self.app(scope, receive, send)
        if answer.refusal is not None:
            return await send_problem(send, answer.refusal)

        def send_with_headers(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": _merge(message.get("headers", ()), answer.headers)}
            return send(message)

        return await self.app(scope, receive, send_with_headers)


def rate_limit(limiter: Limiter, **options: Any) -> Callable[..., Awaitable[None]]:
    """Return a FastAPI dependency: `@app.get("/", dependencies=[Depends(rate_limit(limiter, key=by_client()))])`.

    The options are those of RateLimit. A refusal is RateLimited and HTTPException in one. Without a handler the client
    gets the status and `detail` alone; with `app.add_exception_handler(DistsysError, problem_response)` it gets the
    whole problem. FastAPI adds no headers of a dependency to a Response that the route makes itself; the middleware
    does. ImportError says which extra to install if FastAPI is missing.
    """
    http_exception: Any = optional("starlette.exceptions", "web").HTTPException
    limit = RateLimit(limiter, **options)

    class Refused(RateLimited, http_exception):  # type: ignore[misc]
        """The limit is used up for now."""

        __str__ = Exception.__str__

        def __init__(self, refusal: RateLimited) -> None:
            Exception.__init__(self, str(refusal))  # the two base classes disagree on the first argument
            self.__dict__ |= vars(refusal)
            self.status_code, self.detail = refusal.status, refusal.problem()["detail"]
            headers = {name.decode(): value.decode() for name, value in refusal.http_headers or ()}
            self.headers = {"content-type": PROBLEM, **headers}

    async def check(request: Any = None, response: Any = None) -> None:
        if request is None:  # a websocket, if the whole app has this dependency
            return
        answer = await limit.check(request.scope)
        if answer is not None and answer.refusal is not None:
            raise Refused(answer.refusal)
        response.headers.raw.extend(_merge((), answer.headers if answer else []))

    request, response = optional("starlette.requests", "web").Request, optional("fastapi", "web").Response
    check.__annotations__ = {"request": request, "response": response, "return": None}
    return check


# ---- responses


def _refusal(status: int, names: list[str], wait: float | None, headers: Headers) -> Answer:
    """Return the answer for a refused request; `wait` in seconds, or None if no wait would help."""
    headers = [*headers, header("cache-control", "no-store")]
    if wait is not None:
        headers.append(header("retry-after", whole_seconds(wait)))
    facts: dict[str, Any] = {"violated-policies": names, "retry_after": wait}
    refusal = RateLimited("The request asks for more than the quota ever holds.", **facts)
    refusal.status, refusal.http_headers = status, headers
    refusal.problem_type = REDUCED_CAPACITY if status == 503 else RateLimited.problem_type
    return Answer(headers, refusal)


def _partition(per: str | None, subjects: Mapping[Any, str]) -> str:
    if per not in subjects:  # a quota of everybody has no partitions
        return ""
    key = f"{per}:{subjects[per]}" if per else subjects[per]
    return f";pk=:{b64encode(hashlib.sha256(key.encode()).digest()[:8]).decode()}:"


def _merge(own: Iterable[tuple[bytes, bytes]], more: Headers) -> Headers:
    """Return the headers of both; RateLimit is a list and may come twice, of X-RateLimit-* those of `own` stay."""
    if len(more) > 2:  # more than RateLimit and its policy
        own = list(own)
        names = {name.lower() for name, _ in own}
        more = [(name, value) for name, value in more if not (name.startswith(b"x-") and name in names)]
    return [*own, *more]


def _bounded(key: Any) -> Any:
    return hashed(key) if isinstance(key, str) and (len(key) > MAX_KEY or not key.isprintable()) else key
