"""The checks on histories written by hand, on broken variants of each check, and on random histories with an oracle."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsys.lab.check.calls import answered, at_most_sent, refused_at_once
from distsys.lab.check.combine import all_of
from distsys.lab.check.effects import exactly_once
from distsys.lab.check.limits import Allowance, at_most, no_needless_refusal
from distsys.lab.check.locks import mutual_exclusion, progress
from distsys.lab.check.register import linearizable_register
from distsys.lab.check.tokens import monotonic_tokens, no_stale_write
from distsys.lab.check.updates import no_lost_update
from distsys.lab.history.history import Check, Fault, Finding, History, Op
from distsys.lab.history.spans import holds
from tests.lab.histories import anything, history, op, section

at_most_2 = at_most(Allowance(2, window_seconds=1.0))
bucket_of_2 = at_most(Allowance(2, refill_rate=1.0))
USERS, ORGANISATION = Allowance(2, window_seconds=1.0, per="user"), Allowance(3, window_seconds=1.0, per="organisation")
needless = no_needless_refusal(USERS, ORGANISATION)
sends_2, sends_2_each = at_most_sent(2), at_most_sent(2, per_call=True)
fast_answered = partial(answered, process="w1.fast")
DANGER = {"ttl": 0.2}


# --- histories by hand: name -> history. Each says which danger it holds.

IN_TURN = history(*section("w1", 0, 1, 2), *section("w2", 1.5, 3, 4))
APART = history(*section("w1", 0, 1, 2), *section("w2", 3, 4, 5))  # nobody ever had to wait
OVERLAP = history(*section("w1", 0, 1, 3), *section("w2", 0.5, 2, 4))
EXPIRED = history(*section("w1", 0, 1, 3, value=DANGER), *section("w2", 0.5, 2, 4))  # the same, behind a lease
TOUCHING = history(  # w2 is granted while w1's release is on its way
    op("w1", "acquire", 0, 1), op("w1", "release", 2, 4), op("w2", "acquire", 1.5, 3), op("w2", "release", 5, 6)
)
DEAD = history(op("w1", "acquire", 0, 1), *section("w2", 1.5, 4, 5), faults=[(2, "killed", "w1")])
UNANSWERED = history(*section("w1", 0, 1, 3), op("w2", "acquire", 2, None))
STOPPED = history(
    *section("w1", 0, 1, 5), *section("w2", 1.5, 3, 4), faults=[(2, "stopped", "w1"), (4.5, "resumed", "w1")]
)
STOPPED_THEN_TOLD = history(  # it runs again only to learn that it lost the lock: it did nothing while w2 held
    op("w1", "acquire", 0, 1),
    op("w1", "release", 5, 5.1, status="info"),
    *section("w2", 1.5, 3, 4),
    faults=[(2, "stopped", "w1"), (4.5, "resumed", "w1")],
)
STOPPED_AND_WROTE = history(
    op("w1", "acquire", 0, 1),
    op("w1", "write", 4.6, 4.7, 1),
    op("w1", "release", 5, 5.1, status="info"),
    *section("w2", 1.5, 3, 4),
    faults=[(2, "stopped", "w1"), (4.5, "resumed", "w1")],
)
TASKS_DIE = history(op("w1.a", "acquire", 0, 1), *section("w2", 1.5, 4, 5), faults=[(2, "killed", "w1")])
REBORN = history(  # what a new w1 does later says nothing about the dead one
    op("w1", "acquire", 0, 1), *section("w2", 1.5, 4, 5), *section("w1", 4.5, 6, 7), faults=[(2, "killed", "w1")]
)
NAMESAKE = history(op("w10", "acquire", 0, 1), *section("w2", 1.5, 4, 5), faults=[(2, "killed", "w1")])

LOST = history(
    op("w1", "read", 0, 1, 5), op("w2", "read", 0.5, 1.5, 5), op("w1", "write", 2, 3, 6), op("w2", "write", 4, 5, 6)
)
COUNTED = history(
    *section("w1", 0, 1, 3), op("w1", "read", 1, 1.2, 5), op("w1", "write", 2, 2.5, 6),
    *section("w2", 0.5, 4, 6), op("w2", "read", 4.1, 4.2, 6), op("w2", "write", 4.3, 4.4, 7), initial=5, final=7,
)  # fmt: skip
VANISHED = replace(COUNTED, facts={"initial": 5, "final": 6})  # no two writes met, and yet one is gone
MAYBE_LANDED = replace(COUNTED, ops=(*COUNTED.ops, op("w3", "write", 7, None, 8)), facts={"initial": 5, "final": 8})
MAYBE_NOT = replace(MAYBE_LANDED, facts={"initial": 5, "final": 7})
ADDS_A_LOT = replace(COUNTED, ops=(*COUNTED.ops, op("w3", "read", 6, 6.5, 7), op("w3", "write", 7, None, 17)))
LOT_LANDED = replace(ADDS_A_LOT, facts={"initial": 5, "final": 17})
LOT_IN_PART = replace(ADDS_A_LOT, facts={"initial": 5, "final": 9})  # between the bounds, and yet no sum gives it
MAYBE_TWIN = history(  # the write that read the same value may never have happened
    op("w1", "read", 0, 1, 5), op("w2", "read", 0.5, 1.5, 5), op("w1", "write", 2, None, 6), op("w2", "write", 4, 5, 6)
)
REFUSED_TWIN = history(
    *section("w1", 0, 1, 6), op("w1", "read", 1, 1.2, 5), op("w1", "write", 5, 5.5, 6, status="fail"),
    *section("w2", 0.5, 2, 4), op("w2", "read", 2.1, 2.2, 5), op("w2", "write", 2.3, 2.4, 6), initial=5, final=6,
)  # fmt: skip
TWICE_BY_ONE = history(  # one process, two writes after one read: the second is computed from the first
    *section("w1", 0, 1, 6), op("w1", "read", 1, 1.2, 5), op("w1", "write", 2, 2.1, 6), op("w1", "write", 3, 3.1, 7),
    op("w2", "acquire", 2, None), initial=5, final=7,
)  # fmt: skip
ALONE = history(
    op("w1", "read", 0, 1, 5), op("w1", "write", 2, 3, 6), op("w2", "read", 4, 5, 6), op("w2", "write", 6, 7, 7)
)


def grant(process: str, called: float, returned: float, token: int, status: str = "ok") -> Op:
    return op(process, "acquire", called, returned, token=token, status=status)


def put(process: str, called: float, returned: float | None, token: int, **more: Any) -> Op:
    return op(process, "write", called, returned, 1, token=token, **more)


RISING = history(grant("w1", 0, 1, 10**15), grant("w2", 2, 3, 10**15 + 1))
SAME_TOKEN = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 7))
FALLING = history(grant("w1", 0, 1, 8), grant("w2", 2, 3, 7))
SIDE_BY_SIDE = history(grant("w1", 0, 3, 8), grant("w2", 1, 2, 7))  # either may have been first
REFUSED_TOKEN = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), grant("w1", 4, 5, 7, "fail"))
STALE = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), put("w2", 4, 5, 8), put("w1", 6, 7, 7))
STALE_REFUSED = history(
    grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), put("w2", 4, 5, 8), put("w1", 6, 7, 7, status="fail")
)
STALE_UNKNOWN = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), put("w2", 4, 5, 8), put("w1", 6, None, 7))
STALE_FIRST = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), put("w1", 4, 5, 7))  # granted is not yet written
SAME_TOKEN_TWICE = history(grant("w1", 0, 1, 7), grant("w2", 2, 3, 8), put("w2", 4, 5, 8), put("w2", 6, 7, 8))
STALE_MEANWHILE = history(put("w2", 4, 7, 8), put("w1", 5, 6, 7))

GOES_ON = history(op("w1", "acquire", 0, 1), op("w2", "acquire", 1.5, 4), faults=[(2, "killed", "w1")])
STUCK = history(op("w1", "acquire", 0, 1), op("w2", "acquire", 1.5, None), faults=[(2, "killed", "w1")])
STUCK_SINCE = history(*section("w2", 0, 0.1, 0.2), *STUCK.ops, faults=[(2, "killed", "w1")])
TOO_SHORT = history(
    op("w1", "acquire", 0, 1, {"ttl": 30}), op("w2", "acquire", 1.5, None), faults=[(2, "killed", "w1")]
)
NOT_THE_HOLDER = history(*section("w1", 0, 1, 1.5), op("w2", "acquire", 1.7, 4), faults=[(2, "killed", "w1")])
KILLED_WHILE_ASKING = history(op("w1", "acquire", 0, None), op("w2", "acquire", 1.5, 4), faults=[(2, "killed", "w1")])
REDIS_DIED = history(*section("w1", 0, 1, 1.5), op("w2", "acquire", 1.7, 4), faults=[(2, "server", "redis")])
GOES_ON_THEN_RESUMED = replace(GOES_ON, faults=(*GOES_ON.faults, Fault(5, "resumed", "w3")))
GOES_ON_THEN_HELD = replace(GOES_ON, faults=(*GOES_ON.faults, Fault(5, "held", "w2")))
ONLY_THE_DEAD_ASKED = history(op("w1", "acquire", 0, None), faults=[(2, "killed", "w1")])


def call(name: str, t: float, key: str, status: str = "ok") -> Op:
    return op("w1", name, t, t + 0.1, key, status=status)


ONCE = history(call("request", 0, "a", "info"), call("request", 1, "a"), call("apply", 0.5, "a"))
TWICE = history(call("request", 0, "a"), call("request", 1, "a"), call("apply", 0.5, "a"), call("apply", 1.5, "a"))
NEVER = history(call("request", 0, "a"), call("request", 1, "a"))
LOST_AND_UNKNOWN = history(call("request", 0, "a", "info"), call("request", 1, "a", "info"))
REFUSED_YET_DONE = history(call("request", 0, "a", "fail"), call("request", 1, "a", "fail"), call("apply", 0, "a"))
MAYBE_APPLIED = history(call("request", 0, "a"), call("request", 1, "a"), call("apply", 0, "a", "info"))
ASKED_ONCE = history(call("request", 0, "a"), call("apply", 0, "a"))
PHANTOM = history(*ONCE.ops, call("apply", 3, "z"))
STORE_KNOWS = replace(ONCE, facts={"applied": {"a": 2}})


def asks(*times: float, status: str = "ok", lasting: float = 0.01, **who: Any) -> list[Op]:
    return [op("w1", "admit", t, t + lasting, who or None, status=status) for t in times]


WITHIN = history(*asks(0, 0.2, 1.3), *asks(0.3, status="fail"))
BURST = history(*asks(0, 0.2, 0.4))
SPIKE = history(*asks(0.8, 0.9, 1.1, 1.2))  # two in each second, four within one
SLOW_CALLS = history(*asks(0, 0.1, 0.2, lasting=5))  # let through at any moment of five seconds
IDLE = history(*asks(0, 5), *asks(7, status="fail"))
REFILLED = history(*asks(0, 0.1, 1.2), *asks(0.3, status="fail"))
TRICKLE = history(*asks(0, 0.5, 1, 1.5, 2, 2.5))  # two in each second, one a second too many in the long run
TWO_KEYS = history(*asks(0, 0.1, key="a"), *asks(0, 0.1, key="b"))
COSTLY = history(*asks(0, cost=3))
NO_ANSWER = history(op("w1", "admit", 0, None), op("w1", "admit", 0.1, None), *asks(2, 2.1, 2.2, status="fail"))

REFUSING = history(*asks(3, status="fail"), faults=[(2, "server", "redis", "hung")])
STARVED = history(*asks(0, 0.2), *asks(0.5, 1.5, status="fail"))
SO_FAR = history(*asks(0, 0.2), *asks(0.5, status="fail"))  # without a later request nothing is shown
MAYBE_USED = history(*asks(0, 0.1, status="info"), *asks(0.3, status="fail"), *asks(2))
STILL_MAYBE = history(*asks(0, 0.1, status="info"), *asks(1.9, status="fail"), *asks(2))  # it may land late
IN_FLIGHT = history(*asks(0, 0.1, lasting=5), *asks(4, status="fail"), *asks(5.5))
JUST_ADMITTED = history(*asks(0), *asks(0.02, lasting=0.2), *asks(0.01, lasting=0.3, status="fail"), *asks(3))
ORGANISATION_FULL = history(
    *asks(0, 0.1, user="ann", organisation="acme"), *asks(0.2, user="bob", organisation="acme"),
    *asks(0.3, status="fail", user="bob", organisation="acme"), *asks(2, user="bob", organisation="acme"),
)  # fmt: skip
BURNED = history(
    *asks(0, 0.1, user="ann", organisation="acme"), *asks(0.2, 0.3, status="fail", user="ann", organisation="acme"),
    *asks(0.4, status="fail", user="bob", organisation="acme"), *asks(2, user="bob", organisation="acme"),
)  # fmt: skip


def guarded(*calls: tuple[str, int], every: float = 1.0, begin: float = 0.0) -> list[Op]:
    """(status, requests it sends), one call after the other; of these only the last of an answered call succeeds."""
    ops = []
    for n, (status, sent) in enumerate(calls):
        t = begin + n * every
        ops.append(op("w1", "call", t, t + 0.5, status=status))
        for i in range(sent):
            good = "ok" if status == "ok" and i == sent - 1 else "info"
            ops.append(op("w1", "request", t + 0.1 + i / 50, t + 0.11 + i / 50, status=good))
    return ops


def sleeps(*times: float) -> list[Op]:
    return [op("w1", "wait", t, t + 0.001, 1.0) for t in times]


DOWN, BACK = (2.0, "killed", "dependency"), (6.0, "restarted", "dependency")
TRIED, SHUT, WELL = ("info", 1), ("fail", 0), ("ok", 1)
OPENS = history(*guarded(TRIED, TRIED, SHUT, SHUT))
ONE_TOO_MANY = history(*guarded(TRIED, TRIED, TRIED, SHUT))
GOES_ON_ASKING = history(*guarded(TRIED, TRIED, TRIED, TRIED))
FEW_CALLS = history(*guarded(TRIED, TRIED))
OPENS_AND_CLOSES = history(*guarded(WELL, WELL, TRIED, TRIED, SHUT, SHUT, WELL, WELL), faults=[DOWN, BACK])
STAYS_OPEN = history(*guarded(WELL, WELL, TRIED, TRIED, SHUT, SHUT, SHUT, WELL), faults=[DOWN, BACK])
HELD_BACK_BY_A_SCRIPT = history(*STAYS_OPEN.ops, faults=[DOWN, BACK, (7.5, "held", "w1")])
RELEASED_BY_A_SCRIPT = history(op("w1", "call", 3, None), op("w1", "call", 5, 6), faults=[DOWN, (4, "released", "w2")])
NOBODY_CAME = history(*guarded(WELL, TRIED), faults=[DOWN])
MAYBE_SENT = history(*guarded(TRIED, TRIED, SHUT), op("w1", "request", 9, None))
CALL_UNANSWERED = history(op("w1", "call", 3, None), faults=[DOWN])
OTHERS_WAIT = history(op("w1.slow", "call", 3, None), op("w1.fast", "call", 3, 4), faults=[DOWN])
FAST_WAITS = history(op("w1.slow", "call", 3, 4), op("w1.fast", "call", 3, None), faults=[DOWN])
ALL_IS_WELL = history(*guarded(WELL, WELL, WELL))
THREE_EACH = history(*guarded(("info", 3), ("info", 3)))
PASSES_LATER = history(*guarded(("ok", 2), ("info", 2)))
WAITS_THEN_SENDS = history(*guarded(("info", 2), SHUT), *sleeps(0.11))
WAITS_IN_VAIN = history(*guarded(TRIED, SHUT), *sleeps(1.1, 1.2))
ANOTHER_WAITS = history(*guarded(TRIED, SHUT), op("w2", "wait", 1.1, 1.2, 1.0))
MAYBE_REFUSED = history(op("w1", "call", 0, None))
LOST_REPLY = history(call("request", 0, "a", "info"), call("apply", 0, "a"))

CONCURRENT = history(op("w1", "write", 0, 3, 1), op("w2", "read", 1, 2, 1), op("w3", "read", 1.5, 2.5, 1))
FRESH_WHILE_WRITING = history(op("w1", "write", 0, 3, 1), op("w2", "read", 1, 2, None), op("w3", "read", 1.5, 2.5, 1))
STALE_READ = history(op("w1", "write", 0, 1, 1), op("w1", "write", 2, 3, 2), op("w2", "read", 4, 5, 1))
UNKNOWN_WRITE = history(op("w1", "write", 0, 1, 1), op("w1", "write", 2, None, 2), op("w2", "read", 8, 9, 2))
FAILED_WRITE_READ = history(
    op("w1", "write", 0, 1, 1, status="fail"), op("w2", "read", 2, 3, 1), op("w1", "write", 5, 6, 2)
)
BACK_AND_FORTH = history(op("w1", "write", 0, 9, 1), op("w2", "read", 1, 2, 1), op("w3", "read", 3, 4, None))
ONE_PROCESS = history(op("w1", "write", 0, 1, 1), op("w1", "read", 2, 3, 1))

EMPTY = history()

VERDICTS: dict[Check, dict[str, str]] = {
    mutual_exclusion: {
        "HELD": "IN_TURN TOUCHING STOPPED_THEN_TOLD UNANSWERED DEAD TASKS_DIE REBORN",
        "VIOLATED": "OVERLAP EXPIRED STOPPED STOPPED_AND_WROTE NAMESAKE",
        "INCONCLUSIVE": "EMPTY APART ALONE",
    },
    no_lost_update: {
        "HELD": "COUNTED MAYBE_LANDED MAYBE_NOT LOT_LANDED REFUSED_TWIN TWICE_BY_ONE",
        "VIOLATED": "LOST VANISHED LOT_IN_PART",
        "INCONCLUSIVE": "EMPTY ALONE MAYBE_TWIN",
    },
    monotonic_tokens: {
        "HELD": "RISING SIDE_BY_SIDE REFUSED_TOKEN STALE_REFUSED STALE_UNKNOWN SAME_TOKEN_TWICE",
        "VIOLATED": "SAME_TOKEN FALLING STALE",
        "INCONCLUSIVE": "EMPTY IN_TURN",
    },
    no_stale_write: {
        "HELD": "STALE_REFUSED",
        "VIOLATED": "STALE",
        "INCONCLUSIVE": "EMPTY RISING STALE_UNKNOWN STALE_FIRST STALE_MEANWHILE SAME_TOKEN_TWICE",
    },
    progress: {
        "HELD": "GOES_ON GOES_ON_THEN_RESUMED KILLED_WHILE_ASKING REDIS_DIED GOES_ON_THEN_HELD",
        "VIOLATED": "STUCK STUCK_SINCE",
        "INCONCLUSIVE": "EMPTY IN_TURN TOO_SHORT NOT_THE_HOLDER ONLY_THE_DEAD_ASKED",
    },
    exactly_once: {
        "HELD": "ONCE LOST_AND_UNKNOWN MAYBE_APPLIED LOST_REPLY",
        "VIOLATED": "TWICE NEVER REFUSED_YET_DONE PHANTOM STORE_KNOWS",
        "INCONCLUSIVE": "EMPTY ASKED_ONCE",
    },
    at_most_2: {"HELD": "WITHIN", "VIOLATED": "BURST SPIKE COSTLY", "INCONCLUSIVE": "EMPTY IDLE SLOW_CALLS TRICKLE"},
    bucket_of_2: {
        "HELD": "REFILLED",
        "VIOLATED": "BURST SPIKE TRICKLE COSTLY",
        "INCONCLUSIVE": "EMPTY IDLE SLOW_CALLS TWO_KEYS",
    },
    needless: {
        "HELD": "WITHIN REFILLED MAYBE_USED STILL_MAYBE IN_FLIGHT JUST_ADMITTED ORGANISATION_FULL",
        "VIOLATED": "STARVED IDLE BURNED",
        "INCONCLUSIVE": "EMPTY BURST SO_FAR NO_ANSWER",
    },
    sends_2: {
        "HELD": "OPENS OPENS_AND_CLOSES STAYS_OPEN MAYBE_SENT",
        "VIOLATED": "GOES_ON_ASKING THREE_EACH ONE_TOO_MANY",
        "INCONCLUSIVE": "EMPTY FEW_CALLS NOBODY_CAME",
    },
    sends_2_each: {
        "HELD": "OPENS PASSES_LATER FEW_CALLS GOES_ON_ASKING MAYBE_SENT",
        "VIOLATED": "THREE_EACH",
        "INCONCLUSIVE": "EMPTY ALL_IS_WELL",
    },
    answered: {
        "HELD": "OPENS_AND_CLOSES ALL_IS_WELL",
        "VIOLATED": "STAYS_OPEN HELD_BACK_BY_A_SCRIPT RELEASED_BY_A_SCRIPT CALL_UNANSWERED OTHERS_WAIT OPENS",
        "INCONCLUSIVE": "EMPTY NOBODY_CAME",
    },
    fast_answered: {"HELD": "OTHERS_WAIT", "VIOLATED": "FAST_WAITS", "INCONCLUSIVE": "EMPTY ALL_IS_WELL"},
    refused_at_once: {
        "HELD": "OPENS WAITS_THEN_SENDS ANOTHER_WAITS",
        "VIOLATED": "WAITS_IN_VAIN",
        "INCONCLUSIVE": "EMPTY ALL_IS_WELL GOES_ON_ASKING",
    },
    linearizable_register: {
        "HELD": "CONCURRENT FRESH_WHILE_WRITING UNKNOWN_WRITE",
        "VIOLATED": "STALE_READ FAILED_WRITE_READ BACK_AND_FORTH",
        "INCONCLUSIVE": "EMPTY ONE_PROCESS",
    },
}
CASES = [(c, s, n) for c, by in VERDICTS.items() for s, names in by.items() for n in names.split()]


NAMES = {at_most_2: "at_most_2", bucket_of_2: "bucket_of_2", needless: "no_needless_refusal"}
NAMES |= {sends_2: "at_most_2_sent", sends_2_each: "at_most_2_sent_each", fast_answered: "fast_answered"}


def name_of(part: Any) -> str:
    return part if isinstance(part, str) else NAMES.get(part) or part.__name__


@pytest.mark.parametrize(("check", "status", "name"), CASES, ids=name_of)
def test_each_check_judges_the_histories_written_by_hand(check: Check, status: str, name: str) -> None:
    """Empty, valid, invalid and indeterminate histories get the one right answer of three."""
    finding = check(globals()[name])
    assert finding.status == status, finding
    if status == "VIOLATED":
        assert finding.witness
        assert all(o in globals()[name].ops for o in finding.witness)
        assert all(len(row) == 3 for row in finding.violations)
    assert finding.summary
    assert "\n" not in finding.summary


def test_slow_calls_count_only_where_all_of_them_lies_in_the_window() -> None:
    """A call of five seconds was let through at some moment of the five: no window of one second can accuse it."""
    assert at_most_2(SLOW_CALLS).status == "INCONCLUSIVE"


def test_summaries_carry_the_numbers() -> None:
    """The one line on the badge says how many, of how many, and what was counted."""
    assert mutual_exclusion(OVERLAP).summary == "2 holders at once, 1 of 2 acquisitions"
    assert no_lost_update(VANISHED).summary == "1 of 2 updates lost, the counter is at 6 instead of 7"
    assert progress(STUCK).summary == "nobody acquired in the 8.00 s after w1 was killed, 1 tried"
    assert progress(GOES_ON).summary == "acquired again 2.00 s after w1 was killed"
    assert at_most_2(SPIKE).summary == "4 admitted within 410 ms, allowed: 2 within 1.00 s"
    assert bucket_of_2(BURST).summary == "3 admitted within 410 ms, allowed: 2 at once and 1 a second"
    assert bucket_of_2(REFILLED).summary == "3 of 4 admitted, allowed: 2 at once and 1 a second"
    assert needless(STARVED).summary == "1 of 2 refusals needless: w1 was refused with 2 of 2 left and 3 of 3 left"
    assert needless(WITHIN).summary == "1 refusal, none while there was room; 1 admitted later"
    assert progress(REFUSING, "admit", "admitted").summary.startswith("nobody admitted in the 8.00 s after")


def test_rows_say_when_who_and_what() -> None:
    """Every violation is a row of the table under the story."""
    assert mutual_exclusion(OVERLAP).violations == (("2.00-3.00 s", "w1, w2", "both held, 1.00 s"),)
    assert no_lost_update(LOST).violations == (("5.00 s", "w2", "wrote 6 over w1's 6, both from 5"),)
    assert at_most_2(SPIKE).violations == (("0.80-1.21 s", "", "4 admitted, 2 too many"),)
    assert needless(BURNED).violations == (
        ("0.41 s", "w1", "refused with 2 of 2 left for bob and 1 of 3 left for acme"),
    )
    assert monotonic_tokens(STALE).violations == (("7.00 s", "w1 (#1)", "after w2 (#2)"),)


def test_three_holders_are_counted_as_three() -> None:
    """The badge names the largest crowd, and every acquisition that should have waited."""
    crowd = history(
        *section("w1", 0, 1, 9), *section("w2", 0, 2, 8), *section("w3", 0, 3, 7), *section("w4", 0, 9.5, 9.9)
    )
    assert mutual_exclusion(crowd).summary == "3 holders at once, 2 of 4 acquisitions"


def test_the_search_for_an_order_gives_up_at_its_bound() -> None:
    """Twelve concurrent writes and a read of none of them need more orders than allowed: neither held nor violated."""
    writes = [op(f"w{i}", "write", 0, 9, i) for i in range(12)]
    hard = history(*writes, op("w99", "read", 0, 9, "never written"))
    assert linearizable_register(hard, bound=1000).status == "INCONCLUSIVE"
    assert "given up" in linearizable_register(hard, bound=1000).summary


def test_all_of_reports_the_first_broken_promise_then_the_first_untested_one() -> None:
    """One broken promise decides; one that was not put to the test leaves the whole open."""
    both = all_of(mutual_exclusion, no_lost_update)
    assert both(LOST).summary == no_lost_update(LOST).summary
    assert both(IN_TURN) == no_lost_update(IN_TURN)
    assert both(COUNTED).status == "HELD"
    assert mutual_exclusion(COUNTED).summary in both(COUNTED).summary


def test_tokens_are_shown_by_their_order() -> None:
    """Sixteen digits become #1 and #2."""
    assert RISING.labels == {10**15: "#1", 10**15 + 1: "#2"}


def test_a_hold_ends_with_the_next_grant_and_only_by_what_came_after_it() -> None:
    """A process runs one section at a time; a release sent before the grant arrived was for something else."""
    again = history(op("w1", "acquire", 0, 1), op("w1", "acquire", 2, 3), op("w1", "release", 4, 5))
    assert [(h.start, h.end) for h in holds(again)] == [(1, 3), (3, 4)]
    early = history(op("w1", "acquire", 0, 2), op("w1", "release", 1, 1.5), op("w1", "release", 3, 4))
    assert [(h.start, h.end) for h in holds(early)] == [(2, 3)]


# --- Broken variants of each check, each told from the real one by a history: this tests the tests


def edited(check: Check, edit: Any) -> Check:
    """The check, looking at history through a mistake; `edit` maps an Op, or says None to overlook it."""
    return lambda h: check(replace(h, ops=tuple(new for o in h if (new := edit(o)) is not None)))


def becomes(name: str, old: str, new: Any) -> Any:
    """Takes ops of one name and status for something else."""
    return lambda o: replace(o, status=new) if (o.name, o.status) == (name, old) else o


def at_once(o: Op) -> Op:
    """A call takes no time."""
    return replace(o, returned=o.called)


def release_returned(o: Op) -> Op:
    return replace(o, called=o.end) if o.name == "release" else o


def in_the_end(o: Op) -> Op:
    return replace(o, status="ok", returned=9.0) if o.returned is None else o


def without(name: str, status: str | None = None) -> Any:
    return lambda o: None if o.name == name and status in (None, o.status) else o


def with_answer(o: Op) -> Op:
    return replace(o, status="ok", returned=o.called) if o.returned is None else o


def faultless(check: Check, *kinds: str) -> Check:
    return lambda h: check(replace(h, faults=tuple(f for f in h.faults if f.kind not in kinds)))


def faults(check: Check, **change: Any) -> Check:
    return lambda h: check(replace(h, faults=tuple(replace(f, **change) for f in h.faults)))


def factless(check: Check) -> Check:
    return lambda h: check(replace(h, facts={}))


def held_if(test: Any) -> Check:
    return lambda h: Finding("HELD" if test(h) else "VIOLATED", "")


def unless_violated(check: Check) -> Check:
    """Does not ask whether the danger was reached."""
    return held_if(lambda h: check(h).status != "VIOLATED")


def lease_as_hold(h: History) -> Finding:
    """Trusts the lease's clock: a holder is gone when its ttl is over."""
    ends = {id(s.op): s.lease_end for s in holds(h) if s.lease_end}
    lost = [op(o.process, "release", ends[id(o)], ends[id(o)]) for o in h if id(o) in ends]
    return mutual_exclusion(replace(h, ops=tuple(sorted([*h.ops, *lost], key=lambda o: o.called))))


def fixed_windows(h: History) -> bool:
    return max(Counter(int(o.called) for o in h.where("admit", status="ok")).values(), default=0) <= 2


def not_short(h: History) -> bool:
    return h.facts.get("final", 0) >= h.facts.get("initial", 0)


def first_write_unseen(o: Op) -> Op:
    return replace(o, value=5) if (o.name, o.value) == ("write", 6) else o


def within_bounds(h: History) -> bool:
    return h.facts["initial"] + 2 <= h.facts["final"] <= h.facts["initial"] + 12


def never_falls(h: History) -> bool:
    return all((a.token or 0) <= (b.token or 0) for a, b in pairwise(h.where("acquire")))


def at_least_once(h: History) -> bool:
    return {o.value for o in h.where("request")} <= {o.value for o in h.where("apply")}


def at_most_once(h: History) -> bool:
    return max(Counter(o.value for o in h.where("apply")).values(), default=0) <= 1


def ever_written(h: History) -> bool:
    values = {o.value for o in h.where("write")} | {h.facts.get("initial")}
    return all(o.value in values for o in h.where("read"))


exclusion, lost_update, tokens = mutual_exclusion, no_lost_update, monotonic_tokens
stale, progress, once, register = (
    no_stale_write,
    progress,
    exactly_once,
    linearizable_register,
)
refused = refused_at_once
MUTANTS: list[tuple[Check, str, Check, str]] = [
    (exclusion, "counts dead holders", faultless(exclusion, "killed"), "DEAD"),
    (exclusion, "forgets that a process takes its tasks along", faultless(exclusion, "killed"), "TASKS_DIE"),
    (exclusion, "believes the lease", lease_as_hold, "EXPIRED"),
    (exclusion, "holds until the release returned", edited(exclusion, release_returned), "TOUCHING"),
    (exclusion, "takes no answer for a grant", edited(exclusion, with_answer), "UNANSWERED"),
    (exclusion, "calls an untested lock held", unless_violated(exclusion), "APART"),
    (exclusion, "excuses a stopped holder", edited(exclusion, becomes("release", "ok", "info")), "STOPPED"),
    (exclusion, "blames a stopped holder that was told", faultless(exclusion, "stopped"), "STOPPED_THEN_TOLD"),
    (lost_update, "trusts the final count alone", held_if(not_short), "LOST"),
    (lost_update, "looks at pairs alone", factless(lost_update), "VANISHED"),
    (lost_update, "ignores info writes", edited(lost_update, without("write", "info")), "MAYBE_LANDED"),
    (lost_update, "counts info writes as done", edited(lost_update, becomes("write", "info", "ok")), "MAYBE_NOT"),
    (lost_update, "counts every write as one more", edited(lost_update, without("read")), "LOT_LANDED"),
    (lost_update, "looks at the bounds alone", held_if(within_bounds), "LOT_IN_PART"),
    (lost_update, "counts refused writes as done", edited(lost_update, becomes("write", "fail", "ok")), "REFUSED_TWIN"),
    (lost_update, "computes every write from the last read", edited(lost_update, first_write_unseen), "TWICE_BY_ONE"),
    (tokens, "lets a token return", held_if(never_falls), "SAME_TOKEN"),
    (tokens, "orders grants by their call", edited(tokens, at_once), "SIDE_BY_SIDE"),
    (tokens, "counts refused grants", edited(tokens, becomes("acquire", "fail", "ok")), "REFUSED_TOKEN"),
    (tokens, "does not look at writes", edited(tokens, without("write")), "STALE"),
    (tokens, "counts refused writes", edited(tokens, becomes("write", "fail", "ok")), "STALE_REFUSED"),
    (stale, "takes no answer for a refusal", edited(stale, becomes("write", "info", "fail")), "STALE_UNKNOWN"),
    (stale, "takes a refusal for an answer", edited(stale, becomes("write", "fail", "ok")), "STALE_REFUSED"),
    (stale, "compares with grants", edited(stale, lambda o: replace(o, name="write")), "STALE_FIRST"),
    (stale, "orders writes by their call", edited(stale, at_once), "STALE_MEANWHILE"),
    (stale, "asks for no attempt", unless_violated(stale), "RISING"),
    (progress, "looks at the whole run", faults(progress, at=0), "STUCK_SINCE"),
    (progress, "takes a recovery for the last fault", faults(progress, kind="killed"), "GOES_ON_THEN_RESUMED"),
    (progress, "takes a script's hold for a fault", faults(progress, kind="stopped"), "GOES_ON_THEN_HELD"),
    (progress, "takes no answer for a grant", edited(progress, in_the_end), "STUCK"),
    (progress, "does not wait for the lease", edited(progress, lambda o: replace(o, value=None)), "TOO_SHORT"),
    (progress, "accepts any victim", unless_violated(progress), "NOT_THE_HOLDER"),
    (once, "ignores unknown outcomes", edited(once, without("request", "info")), "LOST_AND_UNKNOWN"),
    (once, "takes an unknown apply for none", edited(once, without("apply", "info")), "MAYBE_APPLIED"),
    (once, "counts at least once", held_if(at_least_once), "TWICE"),
    (once, "counts at most once", held_if(at_most_once), "NEVER"),
    (once, "forgives what was refused", edited(once, becomes("request", "fail", "info")), "REFUSED_YET_DONE"),
    (once, "does not ask the store", factless(once), "STORE_KNOWS"),
    (once, "asks for no repetition", unless_violated(once), "ASKED_ONCE"),
    (at_most_2, "has fixed windows", held_if(fixed_windows), "SPIKE"),
    (at_most_2, "counts refused calls", edited(at_most_2, becomes("admit", "fail", "ok")), "WITHIN"),
    (at_most_2, "is off by one", at_most(Allowance(3, window_seconds=1.0)), "BURST"),
    (at_most_2, "takes a call for its begin", edited(at_most_2, at_once), "SLOW_CALLS"),
    (bucket_of_2, "forgets the refill", at_most(Allowance(2)), "REFILLED"),
    (bucket_of_2, "has a window", at_most_2, "TRICKLE"),
    (bucket_of_2, "counts refused requests", edited(bucket_of_2, becomes("admit", "fail", "ok")), "REFILLED"),
    (bucket_of_2, "has one bucket for all", edited(bucket_of_2, lambda o: replace(o, value=None)), "TWO_KEYS"),
    (bucket_of_2, "counts requests, not tokens", edited(bucket_of_2, lambda o: replace(o, value=None)), "COSTLY"),
    (bucket_of_2, "takes a call for its begin", edited(bucket_of_2, at_once), "SLOW_CALLS"),
    (bucket_of_2, "calls an idle limiter held", unless_violated(bucket_of_2), "IDLE"),
    (needless, "looks at one quota", no_needless_refusal(USERS), "ORGANISATION_FULL"),
    (needless, "overlooks that another is burned", edited(needless, lambda o: replace(o, value=None)), "BURNED"),
    (needless, "takes a call for its begin", edited(needless, at_once), "IN_FLIGHT"),
    (needless, "orders requests by their call", edited(needless, at_once), "JUST_ADMITTED"),
    (needless, "takes no answer for a refusal", edited(needless, without("admit", "info")), "MAYBE_USED"),
    (needless, "lets unknown requests happen at once", edited(needless, becomes("admit", "info", "ok")), "STILL_MAYBE"),
    (needless, "forgets nobody", no_needless_refusal(Allowance(2)), "STARVED"),
    (needless, "asks for no later admission", unless_violated(needless), "SO_FAR"),
    (once, "takes a lost reply for no test", edited(once, becomes("request", "info", "ok")), "LOST_REPLY"),
    (sends_2, "is off by one", at_most_sent(3), "ONE_TOO_MANY"),
    (sends_2, "counts what may not have been sent", edited(sends_2, with_answer), "MAYBE_SENT"),
    (sends_2, "looks at the whole run", faultless(sends_2, "killed", "restarted"), "OPENS_AND_CLOSES"),
    (sends_2, "goes on when the fault is over", faultless(sends_2, "restarted"), "OPENS_AND_CLOSES"),
    (sends_2, "asks for no call too many", unless_violated(sends_2), "FEW_CALLS"),
    (sends_2_each, "counts all together", sends_2, "GOES_ON_ASKING"),
    (sends_2_each, "counts calls that were answered alone", edited(sends_2_each, without("call", "info")), "FEW_CALLS"),
    (sends_2_each, "asks for no failure", unless_violated(sends_2_each), "ALL_IS_WELL"),
    (answered, "is content with one", edited(answered, without("call", "fail")), "STAYS_OPEN"),
    (answered, "looks at the whole run", faultless(answered, "killed", "restarted"), "OPENS_AND_CLOSES"),
    (answered, "overlooks a call that waits for ever", edited(answered, in_the_end), "CALL_UNANSWERED"),
    (answered, "takes a script's hold for a fault", faults(answered, kind="x"), "HELD_BACK_BY_A_SCRIPT"),
    (answered, "takes a script's release for a recovery", faults(answered, kind="x"), "RELEASED_BY_A_SCRIPT"),
    (fast_answered, "looks at all", answered, "OTHERS_WAIT"),
    (fast_answered, "overlooks a call that waits for ever", edited(fast_answered, in_the_end), "FAST_WAITS"),
    (fast_answered, "takes nobody for everybody", unless_violated(fast_answered), "ALL_IS_WELL"),
    (refused, "takes every wait for one in vain", edited(refused, without("request")), "WAITS_THEN_SENDS"),
    (refused, "blames the wrong process", edited(refused, lambda o: replace(o, process="w1")), "ANOTHER_WAITS"),
    (refused, "asks for no refusal", unless_violated(refused), "GOES_ON_ASKING"),
    (register, "takes calls one by one", edited(register, at_once), "FRESH_WHILE_WRITING"),
    (register, "ignores info writes", edited(register, without("write", "info")), "UNKNOWN_WRITE"),
    (register, "forgives refused writes", edited(register, becomes("write", "fail", "info")), "FAILED_WRITE_READ"),
    (register, "knows no real time", edited(register, lambda o: replace(o, called=0.0)), "STALE_READ"),
    (register, "accepts any value ever written", held_if(ever_written), "BACK_AND_FORTH"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "mistake", "mutant", "name"),
    MUTANTS,
    ids=lambda x: name_of(x) if isinstance(x, str) or x in VERDICTS else "",
)
def test_a_broken_check_is_told_from_the_real_one(check: Check, mistake: str, mutant: Check, name: str) -> None:
    """Each mistake, named, gives a wrong answer on a history written by hand."""
    assert mutant(globals()[name]).status != check(globals()[name]).status


def test_every_check_has_three_mutants() -> None:
    """A check without a killed mutant may be testing nothing."""
    per_check = Counter(check for check, *_ in MUTANTS)
    assert all(per_check[check] >= 3 for check in VERDICTS), per_check


@pytest.mark.parametrize(
    ("mistake", "pick"),
    [
        ("lets the last one decide", lambda found: found[-1]),
        ("lets the first one decide", lambda found: found[0]),
        (
            "prefers open to broken",
            lambda found: min(found, key=lambda f: "INCONCLUSIVE HELD VIOLATED".index(f.status)),
        ),
    ],
)
def test_a_broken_all_of_is_told_from_the_real_one(mistake: str, pick: Any) -> None:
    """Broken before open before held, whatever the order of the checks."""

    def answers(combine: Any) -> list[str]:
        pairs = [(exclusion, lost_update), (lost_update, exclusion)]
        return [combine(pair, h).status for pair in pairs for h in (LOST, OVERLAP, COUNTED, IN_TURN)]

    real = answers(lambda pair, h: all_of(*pair)(h))
    assert answers(lambda pair, h: pick([check(h) for check in pair])) != real


# --- Random histories, each with an oracle


@st.composite
def sections(draw: st.DrawFn) -> list[tuple[str, float, float]]:
    """(process, start, end) of critical sections; each process's own do not overlap. Whole numbers: ends may touch."""
    found = []
    for n in range(draw(st.integers(1, 4))):
        times = sorted(draw(st.lists(st.integers(0, 40), max_size=8, unique=True)))
        found += [(f"w{n}", float(a), float(b)) for a, b in zip(times[::2], times[1::2], strict=False)]
    return found


@given(sections())
def test_exclusion_agrees_with_comparing_every_pair(spans: list[tuple[str, float, float]]) -> None:
    """Violated exactly if some two sections of two processes share time."""
    ops = [
        o for who, start, end in spans for o in (op(who, "acquire", start - 0.5, start), op(who, "release", end, end))
    ]
    shared = [(a, b) for a in spans for b in spans if a[0] < b[0] and a[1] < b[2] and b[1] < a[2]]
    assert (exclusion(history(*ops, ended=50)).status == "VIOLATED") == bool(shared)


@given(st.lists(st.tuples(st.sampled_from(["w1", "w2", "w3"]), st.floats(0.1, 5)), min_size=2, max_size=30))
def test_a_serial_history_of_waiting_workers_is_held(turns: list[tuple[str, float]]) -> None:
    """A process that asks while another holds, and enters after it left, was kept out."""
    ops, now = [], 0.0
    for n, (who, lasting) in enumerate(turns):
        asked = now - 0.05 if n and turns[n - 1][0] != who else now
        ops += [op(who, "acquire", asked, now + 0.02), op(who, "release", now + lasting, now + lasting + 0.01)]
        now += lasting + 0.02
    someone_waited = any(a[0] != b[0] for a, b in pairwise(turns))
    assert exclusion(history(*ops, ended=now)).status == ("HELD" if someone_waited else "INCONCLUSIVE")


@given(st.lists(st.integers(0, 3), max_size=40))
def test_lost_updates_are_found_exactly_if_the_counter_is_short(schedule: list[int]) -> None:
    """Four processes read, then write one more, in any interleaving: pairs and final count must agree."""
    counter, seen, writes, ops = 0, dict[int, int](), 0, []
    for t, who in enumerate(schedule):
        if who in seen:
            counter, writes = seen.pop(who) + 1, writes + 1
            ops.append(op(f"w{who}", "write", t, t + 0.5, counter))
        else:
            seen[who] = counter
            ops.append(op(f"w{who}", "read", t, t + 0.5, counter))
    for facts in ({}, {"initial": 0, "final": counter}):
        found = lost_update(history(*ops, ended=50, **facts))
        assert (found.status == "VIOLATED") == (counter != writes)


@given(st.lists(st.integers(0, 30), max_size=25), st.integers(1, 4), st.integers(1, 10))
def test_at_most_agrees_with_counting_from_every_call(times: list[int], n: int, window: int) -> None:
    """Calls that take no time: violated exactly if some half-open window that begins at a call holds more than n."""
    most = max((sum(s <= t < s + window for t in times) for s in times), default=0)
    found = at_most(Allowance(n, window_seconds=window))(history(*asks(*times, lasting=0.0)))
    assert found.status == ("VIOLATED" if most > n else "INCONCLUSIVE")


@st.composite
def asked(draw: st.DrawFn) -> list[tuple[float, float, float, int]]:
    """(when it is decided, when it was called, when it returned, its cost), in the order of decisions."""
    moments = sorted(draw(st.lists(st.integers(0, 80), max_size=25)))
    delays = st.floats(0, 2)
    return [(t / 8, t / 8 - draw(delays), t / 8 + draw(delays), draw(st.integers(1, 3))) for t in moments]


@given(asked(), st.integers(3, 5), st.sampled_from([0.5, 1.0, 2.0]))
def test_an_exact_bucket_is_never_accused(requests: list[tuple[float, float, float, int]], n: int, rate: float) -> None:
    """However long its answers take, neither of too much nor of a needless refusal."""
    used, last, ops = 0.0, 0.0, []
    for t, called, returned, cost in requests:
        used, last = max(0.0, used - (t - last) * rate), t
        passes = used + cost <= n
        used += cost * passes
        ops.append(op("w1", "admit", called, returned, {"cost": cost}, status="ok" if passes else "fail"))
    allowed = Allowance(n, refill_rate=rate)
    for check in (at_most(allowed), no_needless_refusal(allowed)):
        assert check(history(*ops, ended=50)).status != "VIOLATED"


@given(asked(), st.integers(3, 5), st.sampled_from([0.5, 1.0, 2.0]))
def test_an_exact_window_is_never_accused(
    requests: list[tuple[float, float, float, int]], n: int, window: float
) -> None:
    """It is accused of nothing, and it refuses what a bucket of the same size and rate refuses."""
    log, bucket, used, last = list[tuple[float, int]](), list[Op](), 0.0, 0.0
    ops = []
    for t, called, returned, cost in requests:
        log = [(then, tokens) for then, tokens in log if then > t - window]
        passes = sum(tokens for _, tokens in log) + cost <= n
        log += [(t, cost)] * passes
        ops.append(op("w1", "admit", called, returned, {"cost": cost}, status="ok" if passes else "fail"))
        used, last = max(0.0, used - (t - last) * n / window), t
        fits = used + cost <= n
        used += cost * fits
        bucket.append(replace(ops[-1], status="ok" if fits else "fail"))
    allowed = Allowance(n, window_seconds=window)
    assert at_most(allowed)(history(*ops, ended=50)).status != "VIOLATED"
    assert at_most(Allowance(n, refill_rate=n / window))(history(*ops, ended=50)).status != "VIOLATED"
    for past in (ops, bucket):
        assert no_needless_refusal(allowed)(history(*past, ended=50)).status != "VIOLATED"


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 3), st.floats(0, 3)), max_size=12))
def test_a_register_that_is_atomic_is_never_accused(steps: list[tuple[int, bool, float, float]]) -> None:
    """Each call takes effect at t=n, and is seen from some time before to some time after."""
    value, ops = None, []
    for n, (who, writes, before, after) in enumerate(steps):
        value = n if writes else value
        ops.append(op(f"w{who}", "write" if writes else "read", n - before, n + after, value))
    assert register(history(*ops, ended=50)).status != "VIOLATED"


@settings(max_examples=200)
@given(anything())
def test_no_history_breaks_a_check_and_every_accusation_has_its_witness(past: History) -> None:
    """Whatever happened, each check answers, and what it holds against the rule is in the history, in order of time."""
    for check in VERDICTS:
        found = check(past)
        assert all(any(o is p for p in past) for o in found.witness)
        assert [o.called for o in found.witness] == sorted(o.called for o in found.witness)
        assert bool(found.witness) == (found.status == "VIOLATED") or check in (lost_update, once)
