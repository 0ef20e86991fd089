"""Claims: who carries out an intent, for how long nobody else may, and what later attempts are told.

Promise  of all attempts with a key one at a time carries it out; what it answered is what all others are answered. A
         claim is a lease with a heartbeat and a fencing number: an owner that was overtaken can't end what is another's
         now. An attempt that ended without a word leaves its outcome UNKNOWN, and a policy decides.
Not      one effect by itself: a worker that dies after the effect leaves it to the policy. Only where effect and answer
         commit together there is no such gap: database.py.
Units    seconds.
Errors   KeyReused, KeyInProgress, OutcomeUnknown, AnswerNotKept, StoreUnavailable.
Source   Gray & Cheriton 1989 (leases); draft-ietf-httpapi-idempotency-key-header-07, 2.6.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from distsys._support.arguments import check_seconds
from distsys._support.cancellation import in_background
from distsys.errors import (
    AnswerNotKept,
    BadKey,
    Indeterminate,
    KeyInProgress,
    KeyReused,
    OutcomeUnknown,
    StoreUnavailable,
)
from distsys.idempotency.answers import json_of
from distsys.idempotency.keys import fingerprint_of

logger = logging.getLogger("distsys.idempotency")
NOT_KEPT = b"\0not kept"  # instead of an answer too long to be kept
DAY = 86_400.0
FINGERPRINT = 32  # bytes: a record has its place
End = Literal["done", "unknown", "free"]
OnUnknown = Literal["block", "rerun"] | Callable[[str], Awaitable[bytes | None]]


def unchanged(data: bytes) -> bytes:
    return data


class Found(NamedTuple):
    """What a store has for a key."""

    state: Literal["claimed", "running", "done", "unknown"]  # claimed: by this very question
    owner: int  # of the claim; no two claims of a key have the same
    fingerprint: bytes
    answer: bytes
    left: float  # seconds of the owner's lease


class Store(Protocol):
    """What is decided is decided at the server, in one step, never by what an earlier step has seen."""

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, over: int = 0, waits: bool = False
    ) -> Found:
        """Claims what is free, or whose outcome is unknown and whose owner is `over`; else says what there is.

        One that failed or was cancelled leaves no claim behind that nobody knows of, as far as the store can be told.
        """

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        """False, and nothing happens, when the claim of that owner is over; done twice is done."""

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        """The same."""

    async def fence(self, key: str, owner: int) -> int:
        """The claim's number, larger than those of all claims before it; 0 when it is over."""

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        """Until the claim ends, which claim(waits=True) asked to be told of; at most for the timeout."""

    def unavailable(self, error: Exception) -> bool:
        """Whether the store could not be asked."""


class Claim:
    """One attempt: either `answer` is that of an earlier one, or it is None and the attempt is yours.

    `async with claim:` carry it out, then `await claim.done(answer)`. A block that ends otherwise frees the key;
    unless it set `effect_began`, or raised Indeterminate: then nobody knows. Write with `await claim.fence()` where
    that is possible.
    """

    def __init__(
        self, claims: Claims, key: str, owner: int, answer: bytes | None = None, until: float = 0.0, name: str = ""
    ) -> None:
        self.claims, self.key, self.owner, self.answer = claims, key, owner, answer
        self.name = name or key  # what errors call it
        self.effect_began = self._overtaken = False
        self.open = answer is None and owner > 0
        self._until = until  # when the lease ends at the latest, by time.monotonic
        self._beating = claims.keep_alive(self) if self.open else set()

    @property
    def lost(self) -> bool:
        """Its lease is over, or could not be prolonged: another attempt may be under way."""
        return self._overtaken or (self.open and time.monotonic() > self._until)

    async def done(self, answer: bytes) -> None:
        """OutcomeUnknown when another attempt has taken over."""
        self.effect_began = True
        if self.open and not await self._end("done", self.claims.sealed(answer)):
            raise self._overtaken_by_another("what this one did is on no record")

    async def fence(self) -> int:
        """A number to write with, larger than those of all attempts before; 0 without the store (on_failure="open").

        The resource refuses a write with a smaller number than it has seen. OutcomeUnknown as from `done`.
        """
        if not self.owner:
            return 0
        number = await self.claims.store.fence(self.key, self.owner)
        if not number:
            raise self._overtaken_by_another("write nothing")
        return number

    def _overtaken_by_another(self, advice: str) -> OutcomeUnknown:
        return OutcomeUnknown(
            f"{self.name!r}: this attempt was silent for longer than its lease of {self.claims.lease:g} s and "
            f"another took over, or the store lost its claim; {advice}",
            key=self.name,
        )

    async def __aenter__(self) -> Claim:
        return self

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.open:
            unsure = self.effect_began or isinstance(error, Indeterminate)
            try:
                await self._end("unknown" if unsure else "free", b"")
            except Exception as failure:  # noqa: BLE001  the block's own error is what counts; the lease ends by itself
                logger.warning("the claim of %r could not be ended: %r", self.key, failure)

    async def _end(self, state: End, answer: bytes) -> bool:
        store, ttl, self.open = self.claims.store, self.claims.ttl, False
        self._beating.discard(self)
        try:
            return await store.end(self.key, self.owner, state, answer, ttl)
        except asyncio.CancelledError:  # what has happened has to be written down all the same; twice does no harm
            in_background(store.end(self.key, self.owner, state, answer, ttl), f"ending the claim of {self.key!r}")
            raise

    def beat(self) -> None:
        if self in self._beating:
            in_background(self.extend(), f"the heartbeat of {self.key!r}")

    async def extend(self) -> None:
        """One heartbeat. One that fails is not the last."""
        lease, asked = self.claims.lease, time.monotonic()
        async with asyncio.timeout(lease / 3):
            if await self.claims.store.extend(self.key, self.owner, lease):
                self._until = asked + lease
            else:
                self._overtaken = self.open  # else it is this very attempt that ended it
                self._beating.discard(self)


class Claims:
    """Claims in one store.

    ttl         how long an answer is kept: longer than anybody retries
    lease       how long a silent owner is waited for; it says that it lives three times in a lease
    wait        how long an attempt waits for the one that is running, instead of KeyInProgress
    on_unknown  when an owner fell silent, and may have done it: "block" raises OutcomeUnknown until the ttl is over,
                "rerun" does it again, or a function of the key finds out, and says the answer or None: not done
    on_failure  without the store: "open" carries out unprotected, "closed" raises StoreUnavailable, None: its error
    encrypt, decrypt  of answers, as they are kept
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl: float = DAY,
        lease: float = 30.0,
        wait: float = 0.0,
        on_unknown: OnUnknown = "block",
        on_failure: Literal["open", "closed"] | None = None,
        encrypt: Callable[[bytes], bytes] = unchanged,
        decrypt: Callable[[bytes], bytes] = unchanged,
    ) -> None:
        self.ttl, self.lease = check_seconds("ttl", ttl), check_seconds("lease", lease)
        self.wait = check_seconds("wait", wait, least=0.0)
        if on_unknown not in ("block", "rerun") and not callable(on_unknown):
            raise ValueError(f"on_unknown={on_unknown!r}: 'block', 'rerun' or an async function of the key")
        if on_failure not in ("open", "closed", None):
            raise ValueError(f"on_failure={on_failure!r}: 'open', 'closed' or None")
        self.store, self.on_unknown, self.on_failure = store, on_unknown, on_failure
        self._encrypt, self._decrypt = encrypt, decrypt
        self._open: WeakKeyDictionary[asyncio.AbstractEventLoop, set[Claim]] = WeakKeyDictionary()

    async def run(self, key: str, operation: Callable[[], Awaitable[Any]], *, request: Any = None) -> Any:
        """What `operation()` answers, as JSON: carried out once, and then remembered."""
        async with await self.begin(key, fingerprint_of(request)) as claim:
            if claim.answer is None:
                result = await operation()
                claim.effect_began = True
                claim.answer = json_of(result).encode()
                await claim.done(claim.answer)
        return _decode(claim.answer.decode())

    async def begin(self, key: str, fingerprint: bytes, *, name: str = "") -> Claim:
        """The attempt of a request with this fingerprint; errors call the key by `name`, if its owner knows it so."""
        if not key:
            raise BadKey("the key is empty: an intent has a name")
        if len(fingerprint) != FINGERPRINT:
            raise ValueError(f"fingerprint={fingerprint!r}: {FINGERPRINT} bytes, as fingerprint_of(request) makes them")
        name, over, found = name or key, 0, None
        deadline = time.monotonic() + self.wait
        try:
            while True:
                asked = time.monotonic()
                waits = asked < deadline
                found = await self.store.claim(key, fingerprint, lease=self.lease, ttl=self.ttl, over=over, waits=waits)
                if found.state == "claimed":
                    return Claim(self, key, found.owner, until=asked + self.lease, name=name)
                check_same(found, fingerprint, name)
                if found.state == "done":
                    if found.answer == NOT_KEPT:
                        raise AnswerNotKept(key=name)  # noqa: TRY301  it passes, as KeyInProgress does
                    return Claim(self, key, found.owner, self._decrypt(found.answer))
                if found.state == "unknown":
                    over = await self._may_take_over(key, found.owner, name)
                elif (left := min(found.left, deadline - time.monotonic())) > 0:
                    await self.store.wait(key, found.owner, left)
                else:
                    raise KeyInProgress(  # noqa: TRY301
                        f"{name!r}: an earlier attempt is running; its lease has {found.left:.3g} s left",
                        key=name,
                        retry_after=min(1.0, found.left),
                    )
        except Exception as error:
            if self.on_failure is None or not self.store.unavailable(error):
                raise
            if self.on_failure == "closed" or found:  # an earlier attempt may be under way
                raise StoreUnavailable(retry_after=1.0) from error
            logger.warning("%r is carried out unprotected: %r", key, error)
            return Claim(self, key, 0)

    def keep_alive(self, claim: Claim) -> set[Claim]:
        """Those that share a timer: one for each is a fifth of what a claim costs here, for nothing mostly."""
        loop = asyncio.get_running_loop()
        if (claims := self._open.get(loop)) is None:
            claims = self._open[loop] = set()
            loop.call_later(self.lease / 4, self._beat, loop, claims)
        claims.add(claim)
        return claims

    def _beat(self, loop: asyncio.AbstractEventLoop, claims: set[Claim]) -> None:
        """One after the other: a pool has not a connection for each, and would refuse the same ones every time.

        What each is late by, and the time between two beats, are a third of the lease together.
        """
        for number, claim in enumerate(claims):
            loop.call_later(self.lease / 12 * number / len(claims), claim.beat)
        if claims:
            loop.call_later(self.lease / 4, self._beat, loop, claims)
        else:
            del self._open[loop]

    async def _may_take_over(self, key: str, owner: int, name: str) -> int:
        """The owner of the claim whose outcome is unknown, if the policy lets another attempt begin."""
        if self.on_unknown == "block":
            raise OutcomeUnknown(
                f"{name!r}: an earlier attempt fell silent, and may have done it: find out, or say on_unknown", key=name
            )
        if callable(self.on_unknown):
            try:
                answer = await self.on_unknown(key)
            except Exception as error:
                logger.warning("what became of %r could not be found out: %r", key, error)
                text = f"{name!r}: what became of an earlier attempt is not known yet"
                raise OutcomeUnknown(text, key=name) from error
            if answer is not None:
                await self.store.end(key, owner, "done", self.sealed(answer), self.ttl)
        return owner

    def sealed(self, answer: bytes) -> bytes:
        return answer if answer == NOT_KEPT else self._encrypt(answer)


_decode = json.JSONDecoder().decode  # json.loads is two calls around this one


def check_same(found: Found, fingerprint: bytes, key: str) -> None:
    if not hmac.compare_digest(found.fingerprint, fingerprint):
        raise KeyReused(f"{key!r} belongs to another request: make a key for each intent", key=key)
