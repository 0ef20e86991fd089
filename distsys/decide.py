"""Whether to use a pattern at all: the decision matrix, the rule of thumb, the key decisions, the map of the rules.

Data first, one pure function over it: `recommend(pattern, stage, instances)`. Nothing here imports a driver or the lab.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Stage = Literal["Interview", "Hackathon", "MVP", "Growth", "Enterprise"]
Word = Literal[
    "IN-PROCESS", "OVERKILL", "BORDERLINE", "SIMPLE ONLY", "SELECTIVE", "WHEN JUSTIFIED", "APPROPRIATE", "REQUIRED"
]
STAGES: tuple[Stage, ...] = get_args(Stage)

RULE_OF_THUMB = (
    "A single server process needs none of these patterns: use the in-process alternative, "
    "and distribute only when there really are several instances."
)

MEANING: dict[Word, str] = {
    "IN-PROCESS": "One instance has nobody to coordinate with.",
    "OVERKILL": "It costs more than it can save here.",
    "BORDERLINE": "It may pay, but try the simpler alternative first.",
    "SIMPLE ONLY": "Only in its simplest form.",
    "SELECTIVE": "Only on the few paths that would hurt without it.",
    "WHEN JUSTIFIED": "Only when a written reason outweighs what it costs for years.",
    "APPROPRIATE": "It earns its keep here.",
    "REQUIRED": "Going without it is the risk now.",
}


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A row of the matrix. `ours` marks a row that is this project's own opinion."""

    name: str
    cells: tuple[Word, Word, Word, Word, Word]
    alternative: str  # simpler, and enough until the matrix says otherwise
    in_process: str  # what one instance does instead
    when: str  # the fact that makes it necessary
    rules: tuple[str, ...]
    ours: bool = False

    def at(self, stage: Stage) -> Word:
        return self.cells[STAGES.index(stage)]


PATTERNS: tuple[Pattern, ...] = (
    Pattern(
        name="Event sourcing",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "OVERKILL", "WHEN JUSTIFIED"),
        alternative="append-only table with a status column",
        in_process="an append-only table with a status column, written in the same transaction as the change",
        when="It is needed when the history itself is the product: audit, replay, questions about the past.",
        rules=("Event sourcing",),
    ),
    Pattern(
        name="Saga orchestration",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "SELECTIVE", "APPROPRIATE"),
        alternative="sequential calls with manual rollback",
        in_process="one database transaction, or sequential calls in a try / except that undoes them",
        when="It is needed when one business step spans services that share no transaction.",
        rules=("Event messaging",),
    ),
    Pattern(
        name="Circuit breaker",
        cells=("OVERKILL", "OVERKILL", "BORDERLINE", "APPROPRIATE", "REQUIRED"),
        alternative="try/except with a timeout",
        in_process="try / except with a timeout around each call that leaves the process",
        when="It is needed when callers pile up behind a dependency that is slow rather than dead.",
        rules=("Circuit breaker",),
    ),
    Pattern(
        name="Distributed locks",
        cells=("OVERKILL", "OVERKILL", "BORDERLINE", "APPROPRIATE", "REQUIRED"),
        alternative="row lock (SELECT ... FOR UPDATE)",
        in_process="asyncio.Lock, or threading.Lock between threads: it never expires and nobody can lose it",
        when="It is needed when several processes must not do one thing at once and no row or constraint settles it.",
        rules=("Redis & Redlock", "PostgreSQL advisory", "Fencing tokens"),
    ),
    Pattern(
        name="CQRS",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "OVERKILL", "WHEN JUSTIFIED"),
        alternative="one model for reads and writes",
        in_process="one model for reads and writes, with an index or a view where a read is slow",
        when="It is needed when reads and writes differ so much in shape or load that one model serves neither.",
        rules=("Event sourcing",),
    ),
    Pattern(
        name="Transactional outbox",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "SELECTIVE", "APPROPRIATE"),
        alternative="publish directly after commit",
        in_process="call the handler directly after commit, in the same process",
        when="It is needed when a committed change whose message was never sent costs more than a relay to run.",
        rules=("Event messaging",),
    ),
    Pattern(
        name="Rate limiting",
        cells=("OVERKILL", "OVERKILL", "SIMPLE ONLY", "APPROPRIATE", "REQUIRED"),
        alternative="nginx limit or cloud WAF",
        in_process="a counter in memory: with one instance it is exact, and it costs no round trip",
        when="It is needed when one client can use up what all of them share.",
        rules=("Token bucket", "Sliding window", "Distributed limits"),
    ),
    Pattern(
        name="Retry & backoff",
        cells=("OVERKILL", "SIMPLE ONLY", "APPROPRIATE", "APPROPRIATE", "REQUIRED"),
        alternative="one more attempt after a fixed pause, on timeouts only",
        in_process="the same decorator: it keeps no shared state, so there is nothing to distribute",
        when="It is needed when a call can fail for a moment, and repeating it is safe.",
        rules=("Retry & backoff",),
        ours=True,
    ),
    Pattern(
        name="Bulkhead isolation",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "SELECTIVE", "APPROPRIATE"),
        alternative="one asyncio.Semaphore, or the connection pool's own limit",
        in_process="asyncio.Semaphore per dependency",
        when="It is needed when optional work can take the connections that critical work needs.",
        rules=("Bulkhead isolation",),
        ours=True,
    ),
    Pattern(
        name="Idempotency",
        cells=("OVERKILL", "OVERKILL", "SELECTIVE", "APPROPRIATE", "REQUIRED"),
        alternative="a UNIQUE constraint and INSERT ... ON CONFLICT DO NOTHING",
        in_process="a UNIQUE constraint: clients retry against one instance too, and it survives a restart",
        when="It is needed when a request may arrive twice and its effect must not: money, mail, stock.",
        rules=("Idempotency keys", "Request dedup", "Database-backed"),
        ours=True,
    ),
    Pattern(
        name="Fencing tokens",
        cells=("OVERKILL", "OVERKILL", "BORDERLINE", "APPROPRIATE", "REQUIRED"),
        alternative="a version column: UPDATE ... WHERE version = the one you read",
        in_process="nothing: an in-process lock cannot expire, so no holder can be stale",
        when="It is needed wherever a lock with a TTL guards a write: a paused holder wakes up and still believes.",
        rules=("Fencing tokens",),
        ours=True,
    ),
    Pattern(
        name="Edge computing",
        cells=("OVERKILL", "OVERKILL", "OVERKILL", "SELECTIVE", "WHEN JUSTIFIED"),
        alternative="Cache-Control headers and the CDN you already have",
        in_process="functools.lru_cache or a cache in memory, and Cache-Control headers",
        when="It is needed when distance, not work, dominates the time a user waits.",
        rules=("Edge workers", "Edge caching"),
        ours=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A claim the notebooks back with evidence; `caveat` and `evidence` are filled in when an experiment has spoken."""

    topic: str
    claim: str
    patterns: tuple[str, ...]
    caveat: str | None = None
    evidence: str | None = None

    def __str__(self) -> str:
        return f"{self.topic}: {self.claim}.{f' Caveat: {self.caveat}.' if self.caveat else ''}"


DECISIONS: tuple[Decision, ...] = (
    Decision(
        topic="Lock backend",
        claim="Redis for speed, PostgreSQL if already there, Redlock for high availability",
        patterns=("Distributed locks", "Fencing tokens"),
        caveat="each of them can let a second holder in; where a double write costs money, add a fence",
        evidence="`failover`, `majority-forgets`, `node-fails`, `select-for-update`",
    ),
    Decision(
        topic="Lock TTL",
        claim="2-3x the expected operation",
        patterns=("Distributed locks", "Fencing tokens"),
        caveat="renew the lease, and the TTL bounds only the wait after a crash; no TTL outlasts a paused process",
        evidence="`slow-holder`, `killed-holder`, `paused-holder`",
    ),
    Decision(topic="Breaker recovery", claim="half-open probe with a sliding window", patterns=("Circuit breaker",)),
    Decision(topic="Retry", claim="exponential backoff + full jitter", patterns=("Retry & backoff",)),
    Decision(
        topic="Bulkhead", claim="semaphore tiers (Critical / Standard / Optional)", patterns=("Bulkhead isolation",)
    ),
    Decision(
        topic="Idempotency storage",
        claim="Redis (speed) + database (durability), 24-72 h TTL",
        patterns=("Idempotency",),
    ),
    Decision(
        topic="Rate-limit algorithm",
        claim="token bucket for most APIs, sliding window for strict quotas",
        patterns=("Rate limiting",),
        caveat="a bucket of N that refills N per window admits up to 2 N in its worst window",
        evidence="`fixed-window-boundary`, `burst-then-steady`",
    ),
    Decision(
        topic="Rate-limit storage",
        claim="Redis, atomic Lua",
        patterns=("Rate limiting",),
        caveat="say what happens without it: open, closed, or local with 1 / processes of the limit",
        evidence="`counter-per-process`, `count-by-get-then-set`, `redis-does-not-answer`",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One of the sixteen. `modules` is empty until it is built; paths are relative to the project's folder."""

    category: str
    impact: Literal["critical", "high"]
    name: str
    key_pattern: str
    modules: tuple[str, ...] = ()
    notebook: str
    checklist: str
    references: tuple[str, ...] = ()

    @property
    def links(self) -> tuple[tuple[str, str], ...]:
        """(label, path) of what a reader opens next; none while the rule is not built."""
        if not self.modules:
            return ()
        deep = tuple((Path(path).stem.replace("_", " "), path) for path in self.references)
        return (("notebook", self.notebook), ("checklist", self.checklist), *deep)


def _rules(
    category: str,
    impact: Literal["critical", "high"],
    notebook: str,
    *rows: tuple[str, str] | tuple[str, str, tuple[str, ...], tuple[str, ...]],
) -> tuple[Rule, ...]:
    return tuple(
        Rule(
            category=category,
            impact=impact,
            name=row[0],
            key_pattern=row[1],
            modules=row[2] if len(row) > 2 else (),
            references=row[3] if len(row) > 2 else (),
            notebook=f"notebooks/{notebook}.ipynb",
            checklist=f"checklists/{notebook[3:]}.md",
        )
        for row in rows
    )


RULES: tuple[Rule, ...] = (
    *_rules(
        "Distributed locks",
        "critical",
        "01_locks",
        (
            "Redis & Redlock",
            "Lua scripts, SET NX, multi-node quorum",
            ("distsys/locks/redis_lock.py", "distsys/locks/redlock.py"),
            ("references/redis_lock.md", "references/redlock.md"),
        ),
        (
            "PostgreSQL advisory",
            "session / transaction locks, lock-id strategy",
            ("distsys/locks/advisory_lock.py",),
            ("references/advisory_locks.md",),
        ),
        (
            "Fencing tokens",
            "owner validation, TTL, heartbeat extension",
            ("distsys/locks/fencing.py",),
            ("references/fencing.md",),
        ),
    ),
    *_rules(
        "Resilience",
        "critical",
        "02_resilience",
        ("Circuit breaker", "CLOSED / OPEN / HALF_OPEN, sliding window"),
        ("Retry & backoff", "exponential backoff, jitter, error classification"),
        ("Bulkhead isolation", "semaphore tiers, rejection policies, queue depth"),
    ),
    *_rules(
        "Idempotency",
        "high",
        "03_idempotency",
        ("Idempotency keys", "deterministic hashing, Stripe-style header"),
        ("Request dedup", "event-consumer dedup, Redis + database dual layer"),
        ("Database-backed", "unique constraint, upsert, TTL cleanup"),
    ),
    *_rules(
        "Rate limiting",
        "high",
        "04_rate_limiting",
        (
            "Token bucket",
            "Redis Lua, burst capacity, refill rate",
            ("distsys/ratelimit/token_bucket.py",),
            ("references/token_bucket.md",),
        ),
        (
            "Sliding window",
            "sorted sets, exact counting, no boundary spike",
            ("distsys/ratelimit/sliding_window.py",),
            ("references/sliding_window.md",),
        ),
        (
            "Distributed limits",
            "SlowAPI + Redis, tiered limits, response headers",
            ("distsys/ratelimit/distributed.py", "distsys/ratelimit/http.py"),
            ("references/distributed_limits.md",),
        ),
    ),
    *_rules(
        "Edge computing",
        "high",
        "05_edge",
        (
            "Edge workers",
            "V8 isolate limits, Web APIs, geo-routing, auth at the edge (Cloudflare Workers, Vercel Edge, Deno Deploy)",
        ),
        ("Edge caching", "cache-aside at the edge, CDN headers, KV storage, stale-while-revalidate"),
    ),
    *_rules(
        "Event-driven",
        "high",
        "06_events",
        ("Event sourcing", "event-sourced aggregates, CQRS read models, optimistic concurrency"),
        ("Event messaging", "transactional outbox, saga compensation, idempotent consumers (Kafka, queues)"),
    ),
)


@dataclass(frozen=True)
class Recommendation:
    pattern: Pattern
    stage: Stage
    instances: int
    verdict: Word
    reason: str
    alternative: str
    decisions: tuple[Decision, ...]
    links: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        lines = [f"{self.pattern.name} at {self.stage}, {_count(self.instances)}: {self.verdict}", self.reason]
        lines.append(f"{'Instead' if self.verdict in DONT else 'Simpler, where it is enough'}: {self.alternative}.")
        lines += [str(decision) for decision in self.decisions if self.verdict not in DONT]
        lines += [f"{label}: {path}" for label, path in self.links]
        return "\n".join(lines)


DONT: tuple[Word, ...] = ("IN-PROCESS", "OVERKILL")


def recommend(pattern: str, stage: str, instances: int) -> Recommendation:
    """What to do about `pattern` at this stage, with this many server processes running at the same time.

    Four workers of one web server are four instances. One instance gets the in-process alternative whatever the stage:
    the matrix answers a question that only arises with the second one.
    """
    row = find(pattern)
    if stage not in STAGES:
        raise ValueError(f"stage {stage!r} is none of {', '.join(STAGES)}")
    if instances < 1:
        raise ValueError(f"instances is {instances}: it counts running server processes, so at least 1")
    rules = [rule for name in row.rules for rule in RULES if rule.name == name]
    verdict = row.at(stage) if instances > 1 else "IN-PROCESS"
    thumb = (
        "Count again before a rolling deploy or a second worker: then there are two." if instances == 1 else row.when
    )
    return Recommendation(
        pattern=row,
        stage=stage,
        instances=instances,
        verdict=verdict,
        reason=f"{MEANING[verdict]} {thumb}",
        alternative=row.in_process if instances == 1 else row.alternative,
        decisions=tuple(d for d in DECISIONS if row.name in d.patterns),
        links=tuple(dict.fromkeys(link for rule in rules for link in rule.links)),
    )


def find(pattern: str) -> Pattern:
    """The row whose name is, or alone contains, `pattern`, whatever its case; a hyphen may stand for a space."""
    wanted = pattern.strip().lower().replace("-", " ")
    hits = [row for row in PATTERNS if wanted == row.name.lower()] or [
        row for row in PATTERNS if wanted and wanted in row.name.lower()
    ]
    if len(hits) == 1:
        return hits[0]
    names = ", ".join(row.name for row in hits or PATTERNS)
    raise ValueError(f"pattern {pattern!r} {'may be any' if hits else 'is none'} of {names}")


def stage_strip(pattern: str) -> str:
    """The row of the matrix alone, for a notebook's title."""
    rows = (STAGES, ("---",) * len(STAGES), [word.lower() for word in find(pattern).cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def matrix_markdown() -> str:
    """The whole matrix as a table, the project's own rows marked."""
    rows = [("pattern", *STAGES, "simpler alternative"), ("---",) * 7]
    rows += [(p.name + (" (ours)" if p.ours else ""), *p.cells, p.alternative) for p in PATTERNS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def decisions_markdown() -> str:
    """The eight key decisions, with what the experiments had to say so far."""
    rows = [("decision", "claim", "caveat", "evidence"), ("---",) * 4]
    rows += [(d.topic, d.claim, d.caveat or "", d.evidence or "coming") for d in DECISIONS]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def rules_markdown(base: str = "", *, root: Path | None = None) -> str:
    """The sixteen rules as a table: promises from the modules' docstrings, links below `base` ("../" in a notebook)."""
    rows = [("category (impact)", "rule", "key pattern", "promise", "learn"), ("---",) * 5]
    for i, rule in enumerate(RULES):
        new = i == 0 or RULES[i - 1].category != rule.category
        modules = [f"[`{Path(m).stem}`]({base}{m})" for m in rule.modules]
        links = [f"[{label}]({base}{path})" for label, path in rule.links]
        rows.append(
            (
                f"{rule.category} ({rule.impact})" if new else "",
                rule.name,
                rule.key_pattern,
                promise(rule, root) if modules else "coming",
                " · ".join(modules + links),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def promise(rule: Rule, root: Path | None = None) -> str:
    """The first clause of the Promise of the rule's first module, read from its source: nothing is imported."""
    path = (root or Path(__file__).parents[1]) / rule.modules[0]
    lines = (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Promise ")), None)
    if start is None:
        raise ValueError(f"{path}: its docstring has no line that begins with 'Promise'")
    text = [lines[start].removeprefix("Promise ")]
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        text.append(line)
    return re.split(r"[;:.] |\.$", " ".join(" ".join(text).split()))[0]


MARKS = "<!-- the rules: written by `make readme` -->", "<!-- end of the rules -->"


def refresh(text: str) -> str:
    """A README with the table between its two marks written anew."""
    head, rest = text.split(MARKS[0])
    return f"{head}{MARKS[0]}\n{rules_markdown()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def _count(instances: int) -> str:
    return "one instance" if instances == 1 else f"{instances} instances"


if __name__ == "__main__":
    readme = Path(sys.argv[1])
    readme.write_text(refresh(readme.read_text("utf-8")), "utf-8")
