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
    """Return one row of the matrix as a table, for the title of a notebook."""
    return _markdown(STAGES, [[word.lower() for word in find(pattern).cells]])


def matrix_markdown() -> str:
    """Return the whole matrix as a table; rows that are this project's opinion are marked "(ours)"."""
    rows = [(p.name + (" (ours)" if p.ours else ""), *p.cells, p.alternative) for p in PATTERNS]
    return _markdown(("pattern", *STAGES, "simpler alternative"), rows)


def decisions_markdown() -> str:
    """Return the key decisions as a table, with caveats and evidence."""
    rows = [(d.topic, d.claim, d.caveat or "", d.evidence or "coming") for d in DECISIONS]
    return _markdown(("decision", "claim", "caveat", "evidence"), rows)


def rules_markdown(base: str = "") -> str:
    """Return the sixteen rules as a table, with the promises in their modules' docstrings.

    base  put before each link: "../" in a notebook
    """
    rows, last = [], ""
    for rule in RULES:
        category = f"{rule.category} ({rule.impact})" if rule.category != last else ""
        modules = [f"[`{Path(module).stem}`]({base}{module})" for module in rule.modules]
        learn = " · ".join(modules + [f"[{label}]({base}{path})" for label, path in rule.links])
        rows.append((category, rule.name, rule.key_pattern, promise(rule) if modules else "coming", learn))
        last = rule.category
    return _markdown(("category (impact)", "rule", "key pattern", "promise", "learn"), rows)


def promise(rule: Rule) -> str:
    """Return the first clause of Promise in the docstring of the rule's first module, which is not imported."""
    path = Path(__file__).parents[2] / rule.modules[0]
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    found = re.search(r"^Promise (.*(?:\n .*)*)", docstring, re.MULTILINE)  # with the indented lines below it
    if found is None:
        raise ValueError(f"{path}: its docstring has no line that begins with 'Promise'")
    return re.split(r"[;:.] |\.$", " ".join(found[1].split()))[0]
