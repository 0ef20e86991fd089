"""Check of an account: is it a linearizable register?"""

from __future__ import annotations

from distsys.lab.check.combine import inconclusive, violated
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count


def linearizable_register(history: History, *, bound: int = 1_000_000) -> Finding:
    """Check that each read and write takes place at one moment between its call and its return.

    The search for such an order (Wing and Gong 1993) is exponential at worst; after `bound` steps it gives up as
    INCONCLUSIVE.
    """
    ops = [op for op in history if (op.name, op.status) in (("read", "ok"), ("write", "ok"), ("write", "info"))]
    ops.sort(key=lambda op: op.called)
    total = count(len(ops), "operation")
    if len({op.process for op in ops}) < 2 or len({op.name for op in ops}) < 2:
        return inconclusive(f"not two processes that read and write, {total}")
    required = {i for i, op in enumerate(ops) if op.status == "ok"}
    # A state is the set of ops placed so far, the value they leave, and the write which left it.
    start: tuple[frozenset[int], str, Op | None] = (frozenset(), repr(history.facts.get("initial")), None)
    todo, seen, deepest, steps = [start], {start[:2]}, start, 0
    while todo:
        placed, value, source = state = todo.pop()
        unplaced = [i for i in range(len(ops)) if i not in placed]
        steps += len(ops)
        if required <= placed:
            return Finding("HELD", f"an order explains all of {total}")
        if steps > bound:
            return inconclusive(f"search given up after {bound:,} steps, {total}")
        deepest = max(deepest, state, key=lambda s: len(s[0]))
        horizon = min(ops[i].end for i in unplaced if i in required)  # an op called after it cannot come first
        for i in reversed(unplaced):
            op = ops[i]
            if op.called <= horizon and (op.name == "write" or repr(op.value) == value):
                then = (placed | {i}, repr(op.value), op if op.name == "write" else source)
                if then[:2] not in seen:
                    seen.add(then[:2])
                    todo.append(then)
    stuck = min((ops[i] for i in required - deepest[0]), key=lambda op: op.end)
    summary = f"{stuck.process}'s {stuck.name} of {stuck.value!r} fits no order of {total}"
    row = (history.at(stuck.called), stuck.process, f"{stuck.name} {stuck.value!r}, the value was {deepest[1]}")
    return violated(summary, [deepest[2], stuck], row)
