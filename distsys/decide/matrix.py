"""The decision matrix: whether to use a pattern at all. Also the key decisions and the map of the rules.

The data is in matrix.toml. `recommend(pattern, stage, instances)` is a pure function of it. Nothing here imports a
driver or the lab.
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
    """A row of the matrix."""

    name: str
    cells: Sequence[Word]  # one for each stage
    alternative: str  # simpler, and enough unless the cell says otherwise
    in_process: str  # what one instance does instead
    when: str  # the fact that makes it necessary
    rules: Sequence[str]
    ours: bool = False  # an opinion of this project


@dataclass(frozen=True, kw_only=True)
class KeyDecision:
    """A claim about a choice inside a pattern, with the caveat and the evidence that experiments gave."""

    topic: str
    claim: str
    patterns: Sequence[str]
    caveat: str | None = None
    evidence: str | None = None

    def __str__(self) -> str:
        return f"{self.topic}: {self.claim}.{f' Caveat: {self.caveat}.' if self.caveat else ''}"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One of the sixteen rules. `modules` is empty until it is built. Paths are relative to the project's folder."""

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
        """The pages to read next, as (label, path). Empty while the rule is not built."""
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
    Rule(category=part["category"], impact=part["impact"], notebook=f"notebooks/{part['notebook']}.ipynb",
         checklist=f"checklists/{part['notebook'][3:]}.md", **table)
    for part in _DATA["categories"] for table in part["rules"]
)  # fmt: skip


@dataclass(frozen=True)
class Recommendation:
    """What to do about one pattern at one stage: the verdict, the reason, and a simpler alternative."""

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
    """Return what to do about a pattern at this stage.

    pattern    its name, or a part that only one name has
    instances  server processes that run at the same time; four workers of one web server are four
    One instance gets the in-process alternative at every stage, because it has nobody to coordinate with.
    Raises ValueError, which names the choices.
    """
    row, column = find(pattern), next((n for n, name in enumerate(STAGES) if name.lower() == stage.lower()), None)
    if column is None:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if instances < 1:
        raise ValueError(f"instances must be at least 1 (got {instances}): count running server processes")
    verdict, why, alternative = row.cells[column], row.when, row.alternative
    if instances == 1:
        why = "A rolling deploy or a second worker makes two: ask again before that."
        verdict, alternative = "IN-PROCESS", row.in_process
    decisions = tuple(choice for choice in DECISIONS if row.name in choice.patterns and verdict not in DONT)
    links = dict.fromkeys(link for rule in RULES if rule.name in row.rules for link in rule.links)
    reason = f"{MEANING[verdict]} {why}"
    return Recommendation(row, STAGES[column], instances, verdict, reason, alternative, decisions, tuple(links))


def find(pattern: str) -> Pattern:
    """Return the row whose name is `pattern`, or the only one that contains it. Case and hyphens do not matter."""
    wanted = pattern.strip().lower().replace("-", " ")
    hits = [row for row in PATTERNS if wanted and wanted in row.name.lower()]
    hits = [row for row in hits if wanted == row.name.lower()] or hits
    if len(hits) == 1:
        return hits[0]
    names = ", ".join(row.name for row in hits or PATTERNS)
    raise ValueError(f"pattern {pattern!r} {'may be any' if hits else 'is none'} of {names}")
