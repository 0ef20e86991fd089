"""Candidates for the resilience experiments: common breakers and retries, each with a well-known mistake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distsys.errors import CircuitOpen
from distsys.resilience.bulkhead import Bulkhead, OnFull
from distsys.resilience.circuit_breaker import circuit_breaker
from distsys.resilience.retry import RetryBudget, retry

Call = Callable[..., Awaitable[Any]]
Sleep = Callable[[float], Awaitable[None]]


def nothing(call: Call) -> Call:
    """Guard nothing: every call is made, and waits as long as it takes."""
    return call


@dataclass
class Textbook:
    """A breaker that failures in a row open; after the recovery time it is half open; a success closes it."""

    failure_threshold: int
    recovery_timeout: float
    clock: Callable[[], float]
    state: str = field(default="closed", init=False)
    failures: int = field(default=0, init=False)
    opened_at: float = field(default=0.0, init=False)

    def admits(self) -> bool:
        """Return whether a call may be made."""
        if self.state == "open" and self.clock() >= self.opened_at + self.recovery_timeout:
            self.state = "half_open"
        return self.state != "open"  # the mistake: half open admits every caller

    def failed(self) -> None:
        """Count a failure."""
        self.failures += 1
        if self.state == "half_open" or self.failures >= self.failure_threshold:
            self.state, self.opened_at = "open", self.clock()

    def succeeded(self) -> None:
        """Close the breaker."""
        self.state, self.failures = "closed", 0  # the mistake: whenever that call began

    async def call(self, fn: Call, *args: Any) -> Any:
        """Await `fn(*args)`, or raise CircuitOpen."""
        if not self.admits():
            raise CircuitOpen
        try:
            result = await fn(*args)
        except Exception:
            self.failed()
            raise
        self.succeeded()
        return result


class CountedProbes(Textbook):
    """A breaker with one probe at a time, which never gives its permit back if it is cancelled."""

    probing = False

    def admits(self) -> bool:
        """Return whether a call may be made; half open, the permit of the probe is then taken."""
        admitted = super().admits() and not (self.state == "half_open" and self.probing)
        self.probing = self.probing or (admitted and self.state == "half_open")
        return admitted

    def failed(self) -> None:
        """Count a failure, and give the permit back."""
        self.probing = False
        super().failed()

    def succeeded(self) -> None:
        """Close the breaker, and give the permit back."""
        self.probing = False
        super().succeeded()


@dataclass
class RetryEverything:
    """A retry with three attempts, whatever the error is."""

    sleep: Sleep

    async def call(self, fn: Call, *args: Any) -> Any:
        """Await `fn(*args)` up to three times."""
        for delay in (1, 2):
            try:
                return await fn(*args)
            except Exception:  # noqa: BLE001  the mistake
                await self.sleep(delay)
        return await fn(*args)


def retry_outside(call: Call, clock: Callable[[], float], sleep: Sleep) -> Call:
    """Retry outside of the breaker: refusals are retried, too."""
    return partial(RetryEverything(sleep).call, circuit_breaker(clock=clock)(call))


def retry_inside(call: Call, clock: Callable[[], float], sleep: Sleep) -> Call:
    """Retry inside of the breaker: a refusal is final, an admitted call may take three attempts."""
    return circuit_breaker(clock=clock)(retry(sleep=sleep)(call))


def layers(call: Call, sleep: Sleep, *, count: int = 3, shared: bool = False) -> Call:
    """Nest retries: a client that retries, in a service that retries, behind a gateway that retries.

    `shared`: all layers share one budget of a retry for ten calls, with two saved up.
    """
    budget = RetryBudget(0.1, floor=0, burst=2) if shared else None
    for _ in range(count):
        call = retry(sleep=sleep, budget=budget)(call)
    return call


def one_key_per_intent(call: Call, sleep: Sleep) -> Call:
    """Make the key once per intent, so that all attempts carry the same one."""
    return lambda path: retry(sleep=sleep).call(call, path, key=path)


def shared_pool(call: Call) -> Call:
    """Share ten slots, first come, first served."""
    slots = asyncio.Semaphore(10)

    async def with_slot(path: str) -> Any:
        async with slots:
            return await call(path)

    return with_slot


def bulkheads(call: Call) -> Call:
    """Split the ten slots, eight for one tenant and two for the other; no call waits."""
    permits = {"/slow": 8, "/fast": 2}
    gates = {path: Bulkhead(max_concurrent=n, policy=OnFull.ABORT) for path, n in permits.items()}
    return lambda path: gates[path].call(call, path)
