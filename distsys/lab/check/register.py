"""Is the account a linearizable register?"""

from __future__ import annotations

from distsys.lab.check.combine import _in_time, _unclear
from distsys.lab.history.history import Finding, History, Op
from distsys.lab.history.words import count


def linearizable_register(history: History, *, bound: int = 1_000_000) -> Finding:
    """Each read and write takes place at one moment between its call and its return (Wing and Gong 1993).

    The search for such an order is exponential at worst: after `bound` steps it gives up as INCONCLUSIVE.
    """
    ops = [op for op in history if op.name in ("read", "write") and op.status != "fail"]
    ops = [op for op in ops if op.status == "ok" or op.name == "write"]
    ops.sort(key=lambda op: op.called)
    must, total = {i for i, op in enumerate(ops) if op.status == "ok"}, count(len(ops), "operation")
    if len({op.process for op in ops}) < 2 or len({op.name for op in ops}) < 2:
        return _unclear(f"not two processes that read and write, {total}")
    todo: list[tuple[frozenset[int], str, Op | None]]
    todo = [(frozenset(), repr(history.facts.get("initial")), None)]  # ops placed, the value, the write it is from
    seen, deepest, steps = {todo[0][:2]}, todo[0], 0
    while todo:
        placed, value, source = state = todo.pop()
        open_ = [i for i in range(len(ops)) if i not in placed]
        steps += len(ops)
        if must <= placed:
            return Finding("HELD", f"an order explains all of {total}")
        if steps > bound:
            return _unclear(f"search given up after {bound:,} steps, {total}")
        deepest = max(deepest, state, key=lambda s: len(s[0]))
        horizon = min(ops[i].end for i in open_ if i in must)  # what was called later cannot come first
        for i in reversed(open_):
            op = ops[i]
            if op.called <= horizon and (op.name == "write" or repr(op.value) == value):
                then = (placed | {i}, repr(op.value), op if op.name == "write" else source)
                if then[:2] not in seen:
                    seen.add(then[:2])
                    todo.append(then)
    stuck = min((ops[i] for i in must - deepest[0]), key=lambda op: op.end)
    summary = f"{stuck.process}'s {stuck.name} of {stuck.value!r} fits no order of {total}"
    row = (history.at(stuck.called), stuck.process, f"{stuck.name} {stuck.value!r}, the value was {deepest[1]}")
    return Finding("VIOLATED", summary, _in_time([deepest[2], stuck]), (row,))
