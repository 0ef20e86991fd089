"""What an exploration found: a verdict for each scene, the counterexamples, and how much was searched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from distsys.lab.history.history import Status
from distsys.lab.history.words import count
from distsys.lab.show.html import escape, table
from distsys.lab.show.verdict import MARK, Verdict


@dataclass
class SceneVerdict:
    """What one scene showed: how many schedules, and the counterexample if there is one."""

    scene: str
    status: Status
    summary: str
    schedules: int
    number: int = 0  # of the scene
    schedule: str = ""  # "w1#4 hold"
    story: list[str] = field(default_factory=list)
    hint: str = ""
    card: Verdict | None = None  # on the run that showed the counterexample


@dataclass
class Exploration:
    """A candidate explored: one verdict for each scene, and how much was searched."""

    candidate: str
    searched: str  # "three workers, each command disturbed in turn"
    server: str  # on which a counterexample was seen again in real time; "" where none took part
    scenes: dict[int, str]  # those that were to be tried, by their numbers
    verdicts: list[SceneVerdict]
    broken_shape: str = ""  # why it could not be tried at all

    @property
    def status(self) -> Status:
        """VIOLATED if one scene is; else INCONCLUSIVE if one is, or nothing was tried; else HELD."""
        statuses = {found.status for found in self.verdicts}
        return "VIOLATED" if "VIOLATED" in statuses else "INCONCLUSIVE" if statuses != {"HELD"} else "HELD"

    @property
    def schedules(self) -> int:
        """How many schedules were run."""
        return sum(found.schedules for found in self.verdicts)

    @property
    def passed(self) -> bool:
        """Whether every scene that was to be tried held."""
        return self.status == "HELD"

    @property
    def level(self) -> int:
        """How many scenes it held, up to the first that it did not."""
        return next((n for n, found in enumerate(self.verdicts) if found.status != "HELD"), len(self.verdicts))

    def __str__(self) -> str:
        lines = [f"{self.candidate}: {self.status}, held in {self.level} of {count(len(self.scenes), 'scene')}"]
        lines += [f"  searched: {count(self.schedules, 'schedule')}; {self.searched}"]
        tried = {found.number: found for found in self.verdicts}
        for n, scene in self.scenes.items():
            found = tried.get(n)
            what = f" - {found.summary}" if found and found.status != "HELD" else "" if found else " - not tried"
            lines.append(f"  {MARK[found.status] if found else '·'} {n}. {scene}{what}")
        for found in self.violated():
            lines += ["", f"  {found.summary}", f"  {self._seen(found)}", *(f"    {line}" for line in found.story)]
            lines += [f"  hint: {found.hint}"] if found.hint else []
        return "\n".join(lines)

    __repr__ = __str__

    def violated(self) -> list[SceneVerdict]:
        """Return the scenes that were violated."""
        return [found for found in self.verdicts if found.status == "VIOLATED"]

    def _seen(self, found: SceneVerdict) -> str:
        again = f", seen again in real time on {self.server}" if self.server else ""
        replay = f' (--only {found.number} --schedule "{found.schedule}")' if found.schedule else ""
        return f"schedule: {found.schedule or 'no disturbance'}{again}{replay}"

    def _repr_html_(self) -> str:
        head = f"<p><b>{escape(str(self).partition(chr(10))[0])}</b></p>"
        rows = [
            (str(f.number), MARK[f.status], f.scene, f"{f.schedules:,}", "" if f.status == "HELD" else f.summary)
            for f in self.verdicts
        ]
        rows += [(str(n), "·", scene, "", "not tried") for n, scene in [*self.scenes.items()][len(rows) :]]
        page = head + table(("", "", "scene", "schedules", "what happened"), rows)
        page += f"<p>Searched: {escape(self.searched)}.</p>"
        for n, found in enumerate(self.violated()):
            card = found.card._repr_html_() if found.card else ""
            story = f"<pre>{escape(chr(10).join(found.story))}</pre>"
            line = f"{self._seen(found)}: {found.summary}"
            page += f"<details{'' if n else ' open'}><summary>{escape(line)}</summary>{card}{story}</details>"
            page += f"<details><summary>a hint</summary><p>{escape(found.hint)}</p></details>" if found.hint else ""
        return f"<div>{page}</div>"

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON knows it."""
        found = [{**vars(found), "card": found.card and found.card.to_dict()} for found in self.verdicts]
        facts = {"candidate": self.candidate, "status": self.status, "passed": self.passed, "level": self.level}
        return {**facts, "searched": self.searched, "schedules": self.schedules, "scenes": found}
