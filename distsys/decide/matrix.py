"""Whether to use a pattern at all: the decision matrix, the rule of thumb, the key decisions, the map of the rules.

The data stands in matrix.toml; here is one pure function over it, `recommend(pattern, stage, instances)`, and its
tables for README and notebooks. Nothing here imports a driver or the lab.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

Stage = Literal["Interview", "Hackathon", "MVP", "Growth", "Enterprise"]
Word = Literal[
    "IN-PROCESS", "OVERKILL", "BORDERLINE", "SIMPLE ONLY", "SELECTIVE", "WHEN JUSTIFIED", "APPROPRIATE", "REQUIRED"
]
STAGES: tuple[Stage, ...] = get_args(Stage)
DONT: tuple[Word, ...] = ("IN-PROCESS", "OVERKILL")


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A row of the matrix. `ours` marks a row that is this project's own opinion."""

    name: str
    cells: Sequence[Word]  # one for each stage
    alternative: str  # simpler, and enough until the matrix says otherwise
    in_process: str  # what one instance does instead
    when: str  # the fact that makes it necessary
    rules: Sequence[str]
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class KeyDecision:
    """A claim the notebooks back with evidence; `caveat` and `evidence` are filled in when an experiment has spoken."""

    topic: str
    claim: str
    patterns: Sequence[str]
    caveat: str | None = None
    evidence: str | None = None

    def __str__(self) -> str:
        return f"{self.topic}: {self.claim}.{f' Caveat: {self.caveat}.' if self.caveat else ''}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One of the sixteen. `modules` is empty until it is built; paths are relative to the project's folder."""

    category: str
    impact: Literal["critical", "high"]
    name: str
    key_pattern: str
    modules: Sequence[str] = ()
    notebook: str
    checklist: str
    references: Sequence[str] = ()

    @property
    def links(self) -> tuple[tuple[str, str], ...]:
        """(label, path) of what a reader opens next; none while the rule is not built."""
        if not self.modules:
            return ()
        deep = tuple((Path(path).stem.replace("_", " "), path) for path in self.references)
        return (("notebook", self.notebook), ("checklist", self.checklist), *deep)


_DATA = tomllib.loads(files("distsys.decide").joinpath("matrix.toml").read_text("utf-8"))
RULE_OF_THUMB: str = _DATA["rule_of_thumb"]
MEANING: dict[Word, str] = _DATA["meaning"]
PATTERNS = tuple(Pattern(**table) for table in _DATA["patterns"])
DECISIONS = tuple(KeyDecision(**table) for table in _DATA["decisions"])
RULES = tuple(
    Rule(
        category=part["category"],
        impact=part["impact"],
        notebook=f"notebooks/{part['notebook']}.ipynb",
        checklist=f"checklists/{part['notebook'][3:]}.md",
        **table,
    )
    for part in _DATA["categories"]
    for table in part["rules"]
)


@dataclass(frozen=True)
class Recommendation:
    pattern: Pattern
    stage: Stage
    instances: int
    verdict: Word
    reason: str
    alternative: str
    decisions: tuple[KeyDecision, ...]  # choices inside the pattern; none where it is not needed
    links: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        number = "one instance" if self.instances == 1 else f"{self.instances} instances"
        lines = [f"{self.pattern.name} at {self.stage}, {number}: {self.verdict}", self.reason]
        lines.append(f"{'Instead' if self.verdict in DONT else 'Simpler, where it is enough'}: {self.alternative}.")
        lines += [*map(str, self.decisions), *(f"{label}: {path}" for label, path in self.links)]
        return "\n".join(lines)


def recommend(pattern: str, stage: str, instances: int) -> Recommendation:
    """What to do about `pattern` at this stage, with this many server processes running at the same time.

    Four workers of one web server are four instances. One instance gets the in-process alternative whatever the stage:
    the matrix answers a question that only arises with the second one.
    """
    row, column = find(pattern), next((n for n, name in enumerate(STAGES) if name.lower() == stage.lower()), None)
    if column is None:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if instances < 1:
        raise ValueError(f"instances is {instances}: it counts running server processes, so at least 1")
    verdict, why, alternative = row.cells[column], row.when, row.alternative
    if instances == 1:
        why = "Count again before a rolling deploy or a second worker: then there are two."
        verdict, alternative = "IN-PROCESS", row.in_process
    decisions = tuple(one for one in DECISIONS if row.name in one.patterns and verdict not in DONT)
    links = dict.fromkeys(link for rule in RULES if rule.name in row.rules for link in rule.links)
    reason = f"{MEANING[verdict]} {why}"
    return Recommendation(row, STAGES[column], instances, verdict, reason, alternative, decisions, tuple(links))


def find(pattern: str) -> Pattern:
    """The row whose name is, or alone contains, `pattern`, whatever its case; a hyphen may stand for a space."""
    wanted = pattern.strip().lower().replace("-", " ")
    hits = [row for row in PATTERNS if wanted and wanted in row.name.lower()]
    hits = [row for row in hits if wanted == row.name.lower()] or hits
    if len(hits) == 1:
        return hits[0]
    names = ", ".join(row.name for row in hits or PATTERNS)
    raise ValueError(f"pattern {pattern!r} {'may be any' if hits else 'is none'} of {names}")
