"""Events: who listens hears all of them, and changes nothing; the OpenTelemetry adapter, read by its SDK."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from distsys import RetryBudget, SharedCapacity, Tier, bulkhead, circuit_breaker, listen, retry
from distsys.errors import BulkheadFull, CircuitOpen
from distsys.resilience import listeners
from distsys.resilience.listeners import Event, opentelemetry
from tests.resilience.threads import in_threads
from tests.resilience.virtual import Clock, run


@pytest.fixture
def heard() -> Iterator[list[Event]]:
    events: list[Event] = []
    stop = listen(events.append)
    yield events
    stop()


def resets(*_: object) -> None:
    raise ConnectionResetError


def kinds(events: list[Event]) -> list[tuple[str, str, str]]:
    return [(event.rule, event.name, event.kind) for event in events]


def test_a_breaker_tells_of_each_change_and_each_refusal(heard: list[Event]) -> None:
    """The facts show why."""
    clock = Clock()
    policy = circuit_breaker(1, 30, success_threshold=1, clock=clock, name="api", rng=lambda: 0.0)
    with pytest.raises(ConnectionResetError):
        policy(resets)()
    with pytest.raises(CircuitOpen):
        policy(int)()
    clock.now += 30
    policy(int)()
    told = ("state_change", "rejected", "state_change", "state_change")
    assert kinds(heard) == [("circuit_breaker", "api", kind) for kind in told]
    assert [event.facts.get("new") for event in heard] == ["open", None, "half_open", "closed"]
    assert heard[0].facts["reason"] == "1 of 1 calls failed, the last one: ConnectionResetError()"
    assert heard[1].facts == {"state": "open", "retry_after": 30.0}


def test_retry_tells_of_each_retry_and_of_giving_up(heard: list[Event]) -> None:
    """So does a retry that budget or deadline suppressed; a success makes no event."""
    policy = retry(2, name="api", sleep=lambda _: None, rng=lambda: 1.0)
    empty = retry(budget=RetryBudget(0, floor=0), name="poor", sleep=lambda _: None)
    empty.budget._saved = 0.0  # type: ignore[union-attr]
    for each in (policy, empty):
        with pytest.raises(ConnectionResetError):
            each(resets)()
    policy(int)()
    assert [event.kind for event in heard] == ["retry", "gave_up", "suppressed"]
    assert (heard[0].facts["attempt"], heard[0].facts["delay"], heard[1].facts["attempts"]) == (1, 1.0, 2)
    assert "budget" in heard[2].facts["reason"]


def test_a_bulkhead_tells_of_refusals_and_of_shed_calls(heard: list[Event]) -> None:
    """The facts are tier, depth and running calls."""
    shared = SharedCapacity(1, {Tier.CRITICAL: 1, Tier.OPTIONAL: 0}, max_waiting=1)
    high, low = (bulkhead(tier, capacity=shared, name=tier.name) for tier in (Tier.CRITICAL, Tier.OPTIONAL))

    async def main() -> None:
        async with high:
            calls = [asyncio.create_task(low.call(asyncio.sleep, 0))]
            await asyncio.sleep(0)
            calls.append(asyncio.create_task(high.call(asyncio.sleep, 0)))
            await asyncio.sleep(0)
            with pytest.raises(BulkheadFull):
                await low.call(asyncio.sleep, 0)
        await asyncio.gather(*calls, return_exceptions=True)

    run(main())
    assert sorted(kinds(heard)) == [("bulkhead", "OPTIONAL", "rejected"), ("bulkhead", "OPTIONAL", "shed")]
    assert all(event.facts["tier"] == "OPTIONAL" for event in heard)


def test_a_listener_that_raises_changes_nothing_and_is_logged(
    heard: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """The other listeners get the event, too."""

    def broken(event: Event) -> None:
        raise LookupError("a bug of the listener")

    stops = [listen(broken), listen(heard.append)]
    policy = circuit_breaker(1)
    with pytest.raises(ConnectionResetError):
        policy(resets)()
    assert policy.state == "open"
    assert len(heard) == 2
    assert "LookupError: a bug of the listener" in caplog.text
    for stop in stops:
        stop()


def test_a_listener_hears_until_it_is_stopped_and_once_per_registration() -> None:
    """Twice added, twice told; stopped twice is stopped once; adding and stopping from many threads loses none."""
    events: list[Event] = []
    stops = [listen(events.append), listen(events.append)]
    policy = circuit_breaker()
    for left in (2, 1, 0):
        events.clear()
        policy.reset()
        assert len(events) == left
        if stops:
            stop = stops.pop()
            stop()
            stop()
    before = len(listeners._listeners)
    added = in_threads(8, lambda: [listen(events.append) for _ in range(200)])
    assert len(listeners._listeners) == before + 1_600
    in_threads(8, lambda: [stop() for stop in added.pop()])
    assert len(listeners._listeners) == before


# ---- OpenTelemetry


def points(reader: InMemoryMetricReader) -> dict[str, dict[tuple[Any, ...], Any]]:
    """{metric: {values of its attributes: number}}; of a histogram, (count, sum)."""
    data: Any = reader.get_metrics_data()
    found: dict[str, dict[tuple[Any, ...], Any]] = {}
    for resource in data.resource_metrics if data else ():
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in metric.data.data_points:
                value = point.value if hasattr(point, "value") else (point.count, point.sum)
                found.setdefault(metric.name, {})[tuple(point.attributes.values())] = value
    return found


def test_opentelemetry_counts_events_and_shows_the_present_state() -> None:
    """Read through the SDK: 1 for the state a breaker is in, 0 for those it was in; delays as a histogram."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    stop = opentelemetry(provider.get_meter("test"))
    clock = Clock()
    policy = circuit_breaker(1, 30, success_threshold=1, clock=clock, name="api", rng=lambda: 0.0)
    with pytest.raises(ConnectionResetError):
        policy(retry(3, name="api", sleep=lambda _: None, rng=lambda: 0.5)(resets))()
    with pytest.raises(CircuitOpen):
        policy(int)()
    found = points(reader)
    assert found["distsys.breaker.state"] == {("api", "closed"): 0, ("api", "open"): 1}
    assert found["distsys.retry.delay"] == {("retry", "api"): (2, 1.5)}
    assert found["distsys.events"] == {
        ("circuit_breaker", "api", "state_change"): 1,
        ("circuit_breaker", "api", "rejected"): 1,
        ("retry", "api", "retry"): 2,
        ("retry", "api", "gave_up"): 1,
    }
    clock.now += 30
    policy(int)()
    policy.force_open()
    policy.force_open()
    states = {"closed": 0, "open": 1, "half_open": 0}
    assert points(reader)["distsys.breaker.state"] == {("api", name): value for name, value in states.items()}
    stop()
    policy.reset()
    assert points(reader)["distsys.breaker.state"][("api", "open")] == 1
    provider.shutdown()


def test_without_opentelemetry_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra; with it, the meter of the process is taken."""
    opentelemetry()()
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'distsys\[otel\]', or pass a meter"):
        opentelemetry()
