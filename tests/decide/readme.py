"""`make readme`: write the table of the rules into README.md."""

from __future__ import annotations

from pathlib import Path

from distsys.decide.tables import rules_markdown

README = Path(__file__).parents[2] / "README.md"
MARKS = "<!-- the rules: written by `make readme` -->", "<!-- end of the rules -->"


def refresh(text: str) -> str:
    """Return a README with a new table between its two marks."""
    head, rest = text.split(MARKS[0])
    return f"{head}{MARKS[0]}\n{rules_markdown()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    README.write_text(refresh(README.read_text("utf-8")), "utf-8")
