"""Claims: which attempt carries out an intent, for how long no other may, and which answer later attempts get.

Promise  one attempt at a time carries out the intent of a key, and all other attempts get its answer. A claim is a
         lease with a heartbeat and a fencing number: an owner that was overtaken can no longer complete the claim. If
         a lease ends because its process died, the outcome is UNKNOWN, and a policy decides what happens next.
Not      one effect by itself: if a worker dies after the effect, the policy decides. Only where effect and answer
         commit together there is no such gap: database.py.
Units    seconds.
Errors   KeyReused, KeyInProgress, OutcomeUnknown, AnswerNotKept, StoreUnavailable, BadKey for an empty key.
Source   Gray & Cheriton 1989 (leases); draft-ietf-httpapi-idempotency-key-header-07, 2.6.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from distsys import errors
from distsys._support.arguments import check_seconds
from distsys._support.cancellation import in_background
from distsys.idempotency.answers import json_of
from distsys.idempotency.keys import fingerprint_of

logger = logging.getLogger("distsys.idempotency")
NOT_KEPT = b"\0not kept"  # stored instead of an answer that is too long
DAY = 86_400.0  # seconds
FINGERPRINT_BYTES = 32  # a record of Redis has a fixed place for it
End = Literal["done", "unknown", "free"]
OnUnknown = Literal["block", "rerun"] | Callable[[str], Awaitable[bytes | None]]


class Found(NamedTuple):
    """A store's record of a key."""

    state: Literal["claimed", "running", "done", "unknown"]  # claimed: by this very call
    owner: int  # of the claim; no two claims of a key have the same
    fingerprint: bytes
    answer: bytes
    lease_left: float  # seconds


class Store(Protocol):
    """A place for claims. The server makes each decision in one step, never from what an earlier step has read."""

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, takeover_from: int = 0, notify: bool = False
    ) -> Found:
        """Claim the key if it is free, or if its outcome is unknown and its owner is `takeover_from`; else read it.

        notify  the end of a running claim has to wake those who `wait`

        A call that failed or was cancelled gives back what it may have claimed, as far as the store can be reached.
        """

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        """End the claim; return False, without effect, if this owner no longer holds it. Idempotent for 'done'."""

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        """Set the lease to `lease` seconds from now; return False, without effect, if this owner no longer holds it."""

    async def fence(self, key: str, owner: int) -> int:
        """Return the claim's number, larger than all before it; 0 if this owner no longer holds the claim."""

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of a claim that was found with notify=True."""

    def unavailable(self, error: Exception) -> bool:
        """Return whether the error means that the store could not be reached."""


class Claim:
    """One attempt: `answer` is that of an earlier attempt, or None, and then the caller has to carry out the intent.

    `async with claim:` carry it out, then `await claim.done(answer)`. A block that ends in another way frees the key,
    unless it set `effect_began` or raised Indeterminate: then the outcome is unknown. Write with
    `await claim.fence()` where that is possible.
    """

    def __init__(
        self, claims: Claims, key: str, owner: int, answer: bytes | None = None, until: float = 0.0, name: str = ""
    ) -> None:
        self.claims, self.key = claims, key
        self.name = name or key  # what errors call it
        self.owner, self.answer = owner, answer
        self.effect_began = self._overtaken = False
        self.open = answer is None and owner > 0
        self._lease_end = until  # at the latest, by time.monotonic
        self._heartbeats = claims.start_heartbeat(self) if self.open else set()

    @property
    def lost(self) -> bool:
        """Whether the lease is over or could not be extended: another attempt may be under way."""
        return self._overtaken or (self.open and time.monotonic() > self._lease_end)

    async def done(self, answer: bytes) -> None:
        """Store the answer and end the claim. OutcomeUnknown when another attempt has taken over."""
        self.effect_began = True
        if self.open and not await self._end("done", self.claims.encrypted(answer)):
            raise self._overtaken_error("what this attempt did is not recorded")

    async def fence(self) -> int:
        """Return a number to write with, larger than those of all attempts before.

        0 without the store (on_failure="open"). The resource refuses a write with a smaller number than it has seen.
        OutcomeUnknown when another attempt has taken over.
        """
        if not self.owner:
            return 0
        number = await self.claims.store.fence(self.key, self.owner)
        if not number:
            raise self._overtaken_error("write nothing")
        return number

    async def give_up(self, *, unsure: bool = False) -> None:
        """End a claim that is not done: its outcome is unknown if `effect_began` or `unsure`, else the key is free.

        An error of the store is logged, not raised: the lease ends by itself.
        """
        if self.open:
            try:
                await self._end("unknown" if unsure or self.effect_began else "free", b"")
            except Exception as failure:  # noqa: BLE001  the caller's own error is what counts
                logger.warning("the claim of %r could not be ended: %r", self.key, failure)

    async def extend(self) -> None:
        """Send one heartbeat. A failed one is not the last."""
        lease, asked = self.claims.lease, time.monotonic()
        async with asyncio.timeout(lease / 3):
            if await self.claims.store.extend(self.key, self.owner, lease):
                self._lease_end = asked + lease
            else:
                self._overtaken = self.open  # if it is not open, this very attempt has ended it
                self._heartbeats.discard(self)

    def extend_in_background(self) -> None:
        """Send one heartbeat without waiting for it, unless the claim has ended."""
        if self in self._heartbeats:
            in_background(self.extend(), f"the heartbeat of {self.key!r}")

    async def __aenter__(self) -> Claim:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        await self.give_up(unsure=isinstance(error, errors.Indeterminate))

    async def _end(self, state: End, answer: bytes) -> bool:
        store, ttl = self.claims.store, self.claims.ttl
        self.open = False
        self._heartbeats.discard(self)
        try:
            return await store.end(self.key, self.owner, state, answer, ttl)
        except asyncio.CancelledError:  # the end has to be recorded all the same; recording it twice does no harm
            in_background(store.end(self.key, self.owner, state, answer, ttl), f"ending the claim of {self.key!r}")
            raise

    def _overtaken_error(self, advice: str) -> errors.OutcomeUnknown:
        cause = f"this attempt sent no heartbeat within its lease of {self.claims.lease:g} s and another took over"
        return errors.OutcomeUnknown(f"{self.name!r}: {cause}, or the store lost its claim; {advice}", key=self.name)


@dataclass(eq=False)
class Claims:
    """Claims in one store.

    ttl         how long an answer is kept: longer than anybody retries
    lease       how long an owner counts as alive without a heartbeat; it sends three in a lease
    wait        how long an attempt waits for the one that is running, instead of KeyInProgress
    on_unknown  what happens when an owner fell silent and may have done it: "block" raises OutcomeUnknown until the ttl
                is over, "rerun" carries it out again, a function of the key finds out and returns the answer, or None
                if it was not done
    on_failure  what happens without the store: "open" carries out unprotected, "closed" raises StoreUnavailable, None
                lets the store's error pass
    encrypt, decrypt  of answers, as they are kept; bytes() leaves them as they are
    """

    store: Store
    _: KW_ONLY
    ttl: float = DAY
    lease: float = 30.0
    wait: float = 0.0
    on_unknown: OnUnknown = "block"
    on_failure: Literal["open", "closed"] | None = None
    encrypt: Callable[[bytes], bytes] = bytes
    decrypt: Callable[[bytes], bytes] = bytes

    def __post_init__(self) -> None:
        check_seconds("ttl", self.ttl)
        check_seconds("lease", self.lease)
        check_seconds("wait", self.wait, least=0.0)
        if self.on_unknown not in ("block", "rerun") and not callable(self.on_unknown):
            raise ValueError(f"on_unknown={self.on_unknown!r}: give 'block', 'rerun' or an async function of the key")
        if self.on_failure not in ("open", "closed", None):
            raise ValueError(f"on_failure={self.on_failure!r}: give 'open', 'closed' or None")
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, set[Claim]] = WeakKeyDictionary()

    async def run(self, key: str, operation: Callable[[], Awaitable[Any]], *, request: Any = None) -> Any:
        """Return what `operation()` returns, as JSON: carried out once, and then remembered.

        request  what has to be equal in all attempts, in JSON: another one raises KeyReused

        The errors of `begin` and `Claim.done`; the operation's own errors pass, and free the key.
        """
        async with await self.begin(key, fingerprint_of(request)) as claim:
            if claim.answer is None:
                result = await operation()
                claim.effect_began = True
                claim.answer = json_of(result).encode()
                await claim.done(claim.answer)
        return _decode(claim.answer.decode())

    async def begin(self, key: str, fingerprint: bytes, *, name: str = "") -> Claim:
        """Begin an attempt at a request with this fingerprint of 32 bytes.

        name  what errors call the key, if its owner knows it by another name

        KeyReused, KeyInProgress, OutcomeUnknown, AnswerNotKept, StoreUnavailable; BadKey for an empty key.
        """
        if not key:
            raise errors.BadKey("the key is empty: give the intent a name")
        if len(fingerprint) != FINGERPRINT_BYTES:
            advice = f"give {FINGERPRINT_BYTES} bytes, as fingerprint_of(request) makes them"
            raise ValueError(f"fingerprint={fingerprint!r}: {advice}")
        name, deadline = name or key, time.monotonic() + self.wait
        silent, found = 0, None  # the owner to take over from, and the record
        try:
            while True:
                asked = time.monotonic()
                found = await self.store.claim(
                    key, fingerprint, lease=self.lease, ttl=self.ttl, takeover_from=silent, notify=asked < deadline
                )
                if found.state == "claimed":
                    return Claim(self, key, found.owner, until=asked + self.lease, name=name)
                check_same_request(found, fingerprint, name)
                if found.state == "done":
                    if found.answer == NOT_KEPT:
                        raise errors.AnswerNotKept(key=name)  # noqa: TRY301  it passes, as KeyInProgress does
                    return Claim(self, key, found.owner, self.decrypt(found.answer))
                if found.state == "unknown":
                    silent = await self._owner_to_take_over(key, found.owner, name)
                elif (left := min(found.lease_left, deadline - time.monotonic())) > 0:
                    await self.store.wait(key, found.owner, left)
                else:
                    left = found.lease_left
                    text = f"{name!r}: an earlier attempt is running; its lease has {left:.3g} s left"
                    raise errors.KeyInProgress(text, key=name, retry_after=min(1.0, left))  # noqa: TRY301
        except Exception as error:
            if self.on_failure is None or not self.store.unavailable(error):
                raise
            if self.on_failure == "closed" or found:  # an earlier attempt may be under way
                raise errors.StoreUnavailable(retry_after=1.0) from error
            logger.warning("%r is carried out unprotected: %r", key, error)
            return Claim(self, key, 0)

    def encrypted(self, answer: bytes) -> bytes:
        """Return the answer as it is kept."""
        return answer if answer == NOT_KEPT else self.encrypt(answer)

    def start_heartbeat(self, claim: Claim) -> set[Claim]:
        """Send heartbeats for the claim while it is in the returned set.

        One shared timer: one per claim costs ~20 % of a claim, and most claims end before their first heartbeat.
        """
        loop = asyncio.get_running_loop()
        if (claims := self._open.get(loop)) is None:
            claims = self._open[loop] = set()
            loop.call_later(self.lease / 4, self._send_heartbeats, loop, claims)
        claims.add(claim)
        return claims

    def _send_heartbeats(self, loop: asyncio.AbstractEventLoop, claims: set[Claim]) -> None:
        """Stagger heartbeats over lease/12, so that a small pool is not exhausted; lease/4 + lease/12 = lease/3."""
        for number, claim in enumerate(claims):
            loop.call_later(self.lease / 12 * number / len(claims), claim.extend_in_background)
        if claims:
            loop.call_later(self.lease / 4, self._send_heartbeats, loop, claims)
        else:
            del self._open[loop]

    async def _owner_to_take_over(self, key: str, owner: int, name: str) -> int:
        """Return the owner of the claim whose outcome is unknown, if the policy lets another attempt take over."""
        if self.on_unknown == "block":
            text = f"{name!r}: an earlier attempt fell silent, and may have done it: find out, or set on_unknown="
            raise errors.OutcomeUnknown(text, key=name)
        if callable(self.on_unknown):
            try:
                answer = await self.on_unknown(key)
            except Exception as error:
                logger.warning("on_unknown could not find out the outcome of %r: %r", key, error)
                text = f"{name!r}: the outcome of an earlier attempt is not known yet"
                raise errors.OutcomeUnknown(text, key=name) from error
            if answer is not None:
                await self.store.end(key, owner, "done", self.encrypted(answer), self.ttl)
        return owner


def check_same_request(found: Found, fingerprint: bytes, key: str) -> None:
    """Raise KeyReused if the record belongs to a request with another fingerprint."""
    if not hmac.compare_digest(found.fingerprint, fingerprint):
        raise errors.KeyReused(f"{key!r} belongs to another request: make a key for each intent", key=key)


_decode = json.JSONDecoder().decode  # json.loads wraps two more calls around this one
