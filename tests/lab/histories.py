"""Histories for the tests: a few words to write one by hand, four scenes, and histories of any kind."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from distsys.lab.history.history import Fault, History, Op


def op(process: str, name: str, called: float, returned: float | None, value: Any = None, **more: Any) -> Op:
    status = more.pop("status", "info" if returned is None else "ok")
    return Op(process, name, status, called, returned, value, **more)


def history(*ops: Op, faults: list[tuple[Any, ...]] | None = None, ended: float = 10.0, **facts: Any) -> History:
    return History(tuple(sorted(ops, key=lambda o: o.called)), tuple(Fault(*f) for f in faults or []), 0, ended, facts)


def section(process: str, asked: float, start: float, end: float, **more: Any) -> list[Op]:
    """One critical section: acquire returned at `start`, release called at `end`."""
    return [op(process, "acquire", asked, start, **more), op(process, "release", end, end + 0.01)]


# --- scenes: what the experiments leave behind, to the letter


def paused(last: str = "ok") -> History:
    """w1 is stopped past its lease of 0.2 s, w2 enters and writes, then w1 writes too; w3 and w4 follow."""
    lease, token = {"ttl": 0.2}, 1763880000000000
    ops = [op("w1", "acquire", 0.05, 0.06, lease, token=token), op("w1", "read", 0.08, 0.081, 100)]
    ops += [op("w2", "acquire", 0.07, 0.301, lease, token=token + 7), op("w2", "read", 0.31, 0.312, 100)]
    ops += [op("w2", "write", 0.33, 0.333, 101, token=token + 7), op("w2", "release", 0.46, 0.462)]
    ops += [op("w1", "write", 0.42, 0.422, 101, token=token, status=last), op("w1", "release", 0.43, 0.432)]
    for who, start, value in (("w3", 0.48, 101), ("w4", 0.53, 102)):
        ops += [
            op(who, "acquire", 0.1, start, lease, token=token + value),
            op(who, "release", start + 0.04, start + 0.041),
        ]
        ops += [op(who, "read", start + 0.01, start + 0.011, value)]
        ops += [op(who, "write", start + 0.02, start + 0.021, value + 1, token=token + value)]
    faults = [(0.09, "stopped", "w1", "before-write"), (0.4, "resumed", "w1", "")]
    return history(*ops, faults=faults, ended=0.6, initial=100, final=103)


def queue(rounds: int = 10, workers: int = 4) -> History:
    """Workers that take turns, each asking again at once."""
    ops, asked = [], [0.001 * n for n in range(workers)]
    for n in range(rounds * workers):
        who, t = f"w{n % workers + 1}", 0.01 + 0.02 * n
        ops += [
            op(who, "acquire", asked[n % workers], t, {"ttl": 2.0}, token=n + 10**15),
            op(who, "read", t + 0.002, t + 0.003, n),
        ]
        ops += [
            op(who, "write", t + 0.01, t + 0.012, n + 1, token=n + 10**15),
            op(who, "release", t + 0.015, t + 0.016),
        ]
        asked[n % workers] = t + 0.017
    return history(*ops, ended=0.02 + 0.02 * rounds * workers, initial=0, final=rounds * workers)


def killed(ttl: float | None) -> History:
    """w1 is killed inside; w2 gets the lock when the lease ends, or never."""
    lease = {"ttl": ttl} if ttl else None
    ops = [op("w1", "acquire", 0.05, 0.06, lease), op("w1", "write", 0.2, None, 1)]
    ops += [op("w2", "acquire", 0.1, 0.07 + ttl if ttl else None, lease)]
    return history(*ops, faults=[(0.25, "killed", "w1", "before-release")], ended=2.0)


def requests(*asked: tuple[str, float, int, int], **more: Any) -> History:
    """(process, when, how many are admitted, how many refused then), each taking 0.1 ms."""
    ops = []
    for who, t, admitted, refused in asked:
        for n in range(admitted + refused):
            start, status = t + n / 5000, "ok" if n < admitted else "fail"
            ops.append(op(who, "admit", start, start + 1e-4, status=status))
    return history(*ops, **more)


@st.composite
def anything(draw: st.DrawFn) -> History:
    """Histories that no lock would make: the checks, the story and the picture must still cope."""
    names = ["acquire", "release", "read", "write", "admit", "request", "apply"]
    names += ["call", "call", "arrive", "wait"] if draw(st.booleans()) else []
    values = st.sampled_from([None, 0, 1, 2, "k", {"ttl": 0.5}, {"ttl": 3}, {"key": "b", "cost": 2}, True, [1]])
    ops = []
    for _ in range(draw(st.integers(0, 14))):
        called = draw(st.floats(0, 9, allow_nan=False))
        status = draw(st.sampled_from(["ok", "ok", "ok", "fail", "info"]))
        returned = None if status == "info" and draw(st.booleans()) else called + draw(st.floats(0, 3))
        token = draw(st.none() | st.integers(10**15, 10**15 + 4))
        who = draw(st.sampled_from(["w1", "w2", "w3.a", "w3.b"]))
        ops.append(op(who, draw(st.sampled_from(names)), called, returned, draw(values), status=status, token=token))
    kinds = st.sampled_from(["stopped", "resumed", "held", "released", "killed", "server", "cancelled"])
    fault = st.tuples(st.floats(0, 9), kinds, st.sampled_from(["w1", "w2", "w3", "redis"]))
    faults = sorted(draw(st.lists(fault, max_size=4)))
    return history(
        *ops, faults=faults, ended=draw(st.sampled_from([0.0, 12.0])), final=draw(st.sampled_from([None, 0, 3]))
    )
