"""Listeners: tell metrics, logs and alerts what the policies do.

Promise  each listener gets each event, on the thread where it happened, and a breaker's state changes in their order.
Not      for slow work: a listener runs inside the call that it is told of, and at a change of state inside the
         breaker's lock, so it must not wait for another thread. What it raises is logged and goes no further.
Units    seconds.
Errors   none.
Source   OpenTelemetry metrics API, semantic conventions for names.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
logger = logging.getLogger("distsys.resilience")


class Event(NamedTuple):
    """An event of a policy. The kinds are in the table of references/circuit_breaker.md."""

    rule: str  # circuit_breaker, retry, bulkhead
    name: str  # of the policy
    kind: str  # state_change, rejected, retry, suppressed, gave_up, shed
    facts: Mapping[str, Any]


Listener = Callable[[Event], None]
_listeners: dict[object, Listener] = {}


def listen(listener: Listener) -> Callable[[], None]:
    """Call `listener(event)` for every event of this process from now on; return a function that ends this."""
    _listeners[key := object()] = listener

    def stop() -> None:
        _listeners.pop(key, None)

    return stop


def emit(rule: str, name: str, kind: str, **facts: Any) -> None:
    """Tell every listener of an event; the policies call this."""
    for listener in tuple(_listeners.values()):
        tell(listener, Event(rule, name, kind, facts))


def tell(listener: Callable[[T], object], event: T) -> None:
    """Call one listener, and log what it raises: a listener must not change the outcome of the call."""
    try:
        listener(event)
    except Exception:
        logger.exception("listener %r failed at %r", listener, event)


def opentelemetry(meter: Any = None) -> Callable[[], None]:
    """Count events as OpenTelemetry metrics; return a function that ends this. Needs `opentelemetry-api`.

    distsys.events            counter: every event, by rule, name and kind
    distsys.breaker.state     gauge per state: 1 for the present state of the breaker, 0 for those it has left
    distsys.retry.delay       histogram, seconds: the waits before retries
    """
    if meter is None:
        try:
            from opentelemetry import metrics
        except ImportError as error:
            raise ImportError("opentelemetry is missing: pip install 'distsys[otel]', or pass a meter") from error
        meter = metrics.get_meter("distsys")
    events = meter.create_counter("distsys.events", description="what the policies did")
    states = meter.create_gauge("distsys.breaker.state", description="1 for the present state")
    seconds = {"unit": "s", "explicit_bucket_boundaries_advisory": [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]}
    delays = meter.create_histogram("distsys.retry.delay", description="waits before a retry", **seconds)

    def listener(event: Event) -> None:
        labels = {"rule": event.rule, "name": event.name}
        events.add(1, {**labels, "kind": event.kind})
        if event.kind == "state_change":
            states.set(0, {"name": event.name, "state": event.facts["old"]})
            states.set(1, {"name": event.name, "state": event.facts["new"]})
        elif event.kind == "retry":
            delays.record(event.facts["delay"], labels)

    return listen(listener)
