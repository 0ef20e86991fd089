"""An httpx transport that obeys rate limits: waits where a server asks to, holds back where nothing is left.

Promise  a request that was refused with Retry-After is sent again, not earlier, and waits `budget` seconds in all; if
         that is not enough, you get the refusal. While RateLimit or Retry-After says so, nothing else is sent either,
         unless that takes longer than its budget: then the server decides.
Not      a retry of anything else; of a body that can be read only once; of a POST or PATCH after 503, which may have
         been done. httpx's timeouts count each try, not the waiting.
Units    seconds, float.
Errors   those of the transport inside. A header that can't be read is ignored.
Source   draft-ietf-httpapi-ratelimit-headers-11, section 7; RFC 9110, 10.2.3; RFC 9111, 5.1.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Hashable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from distsys._support.arguments import optional

if TYPE_CHECKING:
    import httpx
else:
    httpx = optional("httpx", "web")

PARTITIONS = 1_000  # held back at a time; beyond, the oldest is forgotten
IDEMPOTENT = {"GET", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"}
_STRING = r'"(?:[ !#-\[\]-~]|\\["\\])*"'
_WORD = r"[A-Za-z*][A-Za-z0-9!#$%&'*+.^_`|~:/-]*"
_BARE = rf"{_STRING}|{_WORD}|-?[0-9]{{1,12}}\.[0-9]{{1,3}}|-?[0-9]{{1,15}}|:[A-Za-z0-9+/=]*:|\?[01]"
_PARAMETER = rf"; *([a-z*][a-z0-9_.*-]*)(?:=({_BARE}))?"
_ITEM = re.compile(rf"(?:{_STRING}|{_WORD})((?:{_PARAMETER})*)(?:[ \t]*,[ \t]*(?=[^ \t])| *$)")
_PARAMETERS = re.compile(_PARAMETER)


class RateLimitTransport(httpx.AsyncBaseTransport):
    """`httpx.AsyncClient(transport=RateLimitTransport(budget=30))`

    transport  that sends; httpx.AsyncHTTPTransport() if none is given
    budget     seconds that one request may wait in all
    partition  whose limit a request uses, so that one that is used up does not hold back the others: by default the
               server and the Authorization or X-API-Key
    sleep, clock, wall_clock, rng   for tests; rng spreads those who wait for the same moment over a tenth more
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        budget: float,
        partition: Callable[[httpx.Request], Hashable] | None = None,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        rng: Callable[[], float] = random.random,
    ) -> None:
        if not 0 <= budget < float("inf"):
            raise ValueError(f"budget={budget!r}: seconds that one request may wait, 0 or more")
        self._transport = transport or httpx.AsyncHTTPTransport()
        self._budget, self._partition = budget, partition or _server_and_credentials
        self._sleep, self._clock, self._wall_clock, self._rng = sleep, clock, wall_clock, rng
        self._until: dict[Hashable, float] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        partition, left = self._partition(request), self._budget
        again = isinstance(request.stream, httpx.ByteStream)  # a body that can be sent twice
        while True:
            # What is held back longer than the budget is sent: the server decides, and its refusal says more.
            while 0 < (wait := self._until.get(partition, 0.0) - self._clock()) <= left:
                left -= await self._wait(wait, left)
            response = await self._transport.handle_async_request(request)
            refused = response.status_code == 429 or (response.status_code == 503 and request.method in IDEMPOTENT)
            after = self._retry_after(response.headers) if refused else None
            self._note(partition, response.headers, after)
            if after is None or after > left or not again:
                return response
            await response.aclose()  # without reading: a refusal may be of any length
            left -= await self._wait(after, left)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _wait(self, seconds: float, most: float) -> float:
        seconds = min(seconds * (1 + 0.1 * self._rng()), most)
        await self._sleep(seconds)
        return seconds

    def _note(self, partition: Hashable, headers: httpx.Headers, after: float | None) -> None:
        """Until when nothing is sent. Retry-After comes first; what a cache kept says nothing about now."""
        items = parse(", ".join(headers.get_list("RateLimit"))) if headers.get("Age", "0") == "0" else []
        wait: float = max((t for r, t in items if r == 0), default=0)
        if after is not None and (not items or any(r == 0 for r, _ in items)):
            wait = after  # else only this request was too much: others may fit in what is left
        if items or wait:
            self._until.pop(partition, None)
        if wait:
            if len(self._until) >= PARTITIONS:
                del self._until[next(iter(self._until))]
            self._until[partition] = self._clock() + wait

    def _retry_after(self, headers: httpx.Headers) -> float | None:
        """At least a second, so that the budget is a bound on the tries as well."""
        text = headers.get("Retry-After", "").strip()
        if re.fullmatch(r"[0-9]{1,15}", text):
            return max(1.0, float(text))
        try:
            return max(1.0, parsedate_to_datetime(text).timestamp() - self._wall_clock())
        except (ValueError, TypeError, OverflowError):
            return None


def parse(field: str) -> list[tuple[int, int]]:
    """(r, t) of each item of a RateLimit field that has both; nothing of a malformed one."""
    found, at, field = [], 0, field.lstrip(" ")
    while at < len(field):
        if (item := _ITEM.match(field, at)) is None:
            return []
        given = dict(_PARAMETERS.findall(item[1]))
        r, t = given.get("r", ""), given.get("t", "")
        if re.fullmatch(r"[0-9]{1,15} [0-9]{1,15}", f"{r} {t}"):
            found.append((int(r), int(t)))
        at = item.end()
    return found


def _server_and_credentials(request: httpx.Request) -> Hashable:
    headers = request.headers
    return request.url.scheme, request.url.netloc, headers.get("Authorization"), headers.get("X-API-Key")
