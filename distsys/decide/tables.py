"""The decision matrix, the key decisions and the map of the rules as Markdown tables, for README and notebooks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from distsys.decide.matrix import DECISIONS, PATTERNS, RULES, STAGES, Rule, find


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def stage_strip(pattern: str) -> str:
    """The row of the matrix alone, for a notebook's title."""
    return _markdown(STAGES, [[word.lower() for word in find(pattern).cells]])


def matrix_markdown() -> str:
    """The whole matrix as a table, the project's own rows marked."""
    rows = [(p.name + (" (ours)" if p.ours else ""), *p.cells, p.alternative) for p in PATTERNS]
    return _markdown(("pattern", *STAGES, "simpler alternative"), rows)


def decisions_markdown() -> str:
    """The eight key decisions, with what the experiments had to say so far."""
    rows = [(d.topic, d.claim, d.caveat or "", d.evidence or "coming") for d in DECISIONS]
    return _markdown(("decision", "claim", "caveat", "evidence"), rows)


def rules_markdown(base: str = "") -> str:
    """The sixteen rules as a table: promises from the modules' docstrings, links below `base` ("../" in a notebook)."""
    rows, last = [], ""
    for rule in RULES:
        category = f"{rule.category} ({rule.impact})" if rule.category != last else ""
        modules = [f"[`{Path(module).stem}`]({base}{module})" for module in rule.modules]
        learn = " · ".join(modules + [f"[{label}]({base}{path})" for label, path in rule.links])
        rows.append((category, rule.name, rule.key_pattern, promise(rule) if modules else "coming", learn))
        last = rule.category
    return _markdown(("category (impact)", "rule", "key pattern", "promise", "learn"), rows)


def promise(rule: Rule) -> str:
    """The first clause of the Promise of the rule's first module, read from its source: nothing is imported."""
    path = Path(__file__).parents[2] / rule.modules[0]
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    found = re.search(r"^Promise (.*(?:\n .*)*)", docstring, re.MULTILINE)  # with the indented lines that follow
    if found is None:
        raise ValueError(f"{path}: its docstring has no line that begins with 'Promise'")
    return re.split(r"[;:.] |\.$", " ".join(found[1].split()))[0]


MARKS = "<!-- the rules: written by `make readme` -->", "<!-- end of the rules -->"


def refresh(text: str) -> str:
    """A README with the table between its two marks written anew."""
    head, rest = text.split(MARKS[0])
    return f"{head}{MARKS[0]}\n{rules_markdown()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
