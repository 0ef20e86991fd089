"""Candidates for the resilience experiments: the usual breakers and retries, each with the mistake it is known for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from distsys.errors import CircuitOpen
from distsys.resilience.bulkhead import Bulkhead, OnFull
from distsys.resilience.circuit_breaker import circuit_breaker
from distsys.resilience.retry import RetryBudget, retry

Call = Callable[..., Awaitable[Any]]
Sleep = Callable[[float], Awaitable[None]]


def nothing(call: Call) -> Call:
    """Hope: every call is made, and waits as long as it takes."""
    return call


class Textbook:
    """Failures in a row open it, after the recovery time it is half open, a success closes it."""

    def __init__(self, failure_threshold: int, recovery_timeout: float, clock: Callable[[], float]) -> None:
        self.failure_threshold, self.recovery_timeout, self.clock = failure_threshold, recovery_timeout, clock
        self.state, self.failures, self.opened = "closed", 0, 0.0

    def admits(self) -> bool:
        if self.state == "open" and self.clock() >= self.opened + self.recovery_timeout:
            self.state = "half_open"
        return self.state != "open"  # and so half open for everybody who comes

    def failed(self) -> None:
        self.failures += 1
        if self.state == "half_open" or self.failures >= self.failure_threshold:
            self.state, self.opened = "open", self.clock()

    def succeeded(self) -> None:
        self.state, self.failures = "closed", 0  # whenever that call began

    async def call(self, fn: Call, *args: Any) -> Any:
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
    """Lets one probe through; a cancelled one never gives its place back."""

    probing = False

    def admits(self) -> bool:
        admitted = super().admits() and not (self.state == "half_open" and self.probing)
        self.probing = self.probing or (admitted and self.state == "half_open")
        return admitted

    def failed(self) -> None:
        self.probing = False
        super().failed()

    def succeeded(self) -> None:
        self.probing = False
        super().succeeded()


class RetryEverything:
    """Three attempts, whatever went wrong."""

    def __init__(self, sleep: Sleep) -> None:
        self.sleep = sleep

    async def call(self, fn: Call, *args: Any) -> Any:
        for delay in (1, 2):
            try:
                return await fn(*args)
            except Exception:  # noqa: BLE001  the mistake
                await self.sleep(delay)
        return await fn(*args)


def retry_outside(call: Call, clock: Callable[[], float], sleep: Sleep) -> Call:
    """Retries what the breaker refuses, too."""
    return partial(RetryEverything(sleep).call, circuit_breaker(clock=clock)(call))


def retry_inside(call: Call, clock: Callable[[], float], sleep: Sleep) -> Call:
    """What the breaker refuses is refused; what it admits may take three attempts."""
    return circuit_breaker(clock=clock)(retry(sleep=sleep)(call))


def layers(call: Call, sleep: Sleep, *, count: int = 3, shared: bool = False) -> Call:
    """A client that retries, in a service that retries, behind a gateway that retries.

    `shared`: they share what may be spent on retries, one for ten calls and two saved up.
    """
    budget = RetryBudget(0.1, floor=0, burst=2) if shared else None
    for _ in range(count):
        call = retry(sleep=sleep, budget=budget)(call)
    return call


def one_key_per_intent(call: Call, sleep: Sleep) -> Call:
    """The key is made where the intent is, and all attempts carry it."""

    async def charge(path: str) -> Any:
        return await retry(sleep=sleep).call(call, path, key=path)

    return charge


def shared_pool(call: Call) -> Call:
    """Ten slots, for whoever comes first."""
    slots = asyncio.Semaphore(10)

    async def with_slot(path: str) -> Any:
        async with slots:
            return await call(path)

    return with_slot


def bulkheads(call: Call) -> Call:
    """The same ten slots: eight for the one, two for the other, and nobody waits."""
    parts = {
        "/slow": Bulkhead(max_concurrent=8, policy=OnFull.ABORT),
        "/fast": Bulkhead(max_concurrent=2, policy=OnFull.ABORT),
    }

    async def with_permit(path: str) -> Any:
        return await parts[path].call(call, path)

    return with_permit
