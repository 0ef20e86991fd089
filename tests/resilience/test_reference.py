"""The tables of references/retry.md are those of outcomes.py; the events in circuit_breaker.md are all there are."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from pathlib import Path

from distsys.resilience import outcomes
from distsys.resilience.outcomes import BROKEN, FATAL, NOT_DONE, UNKNOWN, Outcome

ROOT = Path(__file__).parents[2]
KNOWN = NOT_DONE, UNKNOWN, FATAL, BROKEN


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| - |").replace("|  |", "| - |") for line in lines)


def codes() -> str:
    """Return the table of statuses, codes and errnos by outcome."""
    tables = (outcomes.HTTP_STATUS, outcomes.GRPC_CODE, outcomes.SQLSTATE, outcomes.ERRNO)

    def names(table: dict[int, Outcome] | dict[str, Outcome], outcome: Outcome) -> str:
        found = [code for code, means in table.items() if means is outcome]
        if table is outcomes.ERRNO:
            return ", ".join(errno.errorcode[code] for code in outcomes.ERRNO if code in found)
        if table is outcomes.HTTP_STATUS and outcome in (FATAL, BROKEN):
            return "any other 4xx" if outcome is FATAL else "any other 5xx"
        return ", ".join(map(str, found)) or "any other" * (outcome is FATAL)

    rows = [(means.name, *(names(table, means) for table in tables)) for means in KNOWN]
    return _table(("outcome", "HTTP status", "gRPC code", "SQLSTATE begins with", "errno"), rows)


def exceptions() -> str:
    """Return the table of exception classes by package and outcome."""
    packages = dict.fromkeys(name.partition(".")[0] for name in outcomes.EXCEPTION)

    def names(package: str, outcome: Outcome) -> str:
        every = (name.partition(".") for name, means in outcomes.EXCEPTION.items() if means is outcome)
        return ", ".join(name for of, _, name in every if of == package)

    rows = [(package, *(names(package, means) for means in KNOWN)) for package in packages]
    return _table(("package", *(means.name for means in KNOWN)), rows)


def test_the_reference_lists_what_the_tables_of_the_code_say() -> None:
    """Each status, code and class, with its outcome; paste what is missing here."""
    text = (ROOT / "references/retry.md").read_text("utf-8")
    assert codes() in text, codes()
    assert exceptions() in text, exceptions()


def test_the_reference_lists_every_kind_of_event_with_its_facts() -> None:
    """The events are read from the source of the rules."""
    text = (ROOT / "references/circuit_breaker.md").read_text("utf-8")
    rows = re.findall(r"^\| (\w+) \| (\w+) \| .* \| (.*) \|$", text, re.MULTILINE)
    listed = {(rule, kind): facts for rule, kind, facts in rows if rule in ("circuit_breaker", "retry", "bulkhead")}
    found = set()
    for module in ROOT.glob("distsys/resilience/*.py"):
        source = module.read_text("utf-8")
        for rule, kind, facts in re.findall(r'\bemit\("(\w+)", self\.name, "?(\w+)"?, (.*)\)$', source, re.MULTILINE):
            names = "old, new, reason, snapshot, at" if "**" in facts else ", ".join(re.findall(r"(\w+)=", facts))
            for each in ("rejected", "shed") if kind == "kind" else (kind,):
                assert listed[rule, each] == names
                found.add((rule, each))
    assert found == set(listed)
