"""The experiments by name. Each module holds those of one rule, as `EXPERIMENTS`."""

from __future__ import annotations

from importlib import import_module

from distsys.lab.run.experiment import Experiment

_MODULES = (
    "locks.redis_lock", "locks.redlock", "locks.advisory_lock", "locks.fencing",
    "rate_limiting.experiments", "resilience.experiments", "idempotency.experiments",
)  # fmt: skip


def every() -> dict[str, Experiment]:
    """All experiments, in the order of the rules."""
    return {e.name: e for module in _MODULES for e in import_module(f"{__name__}.{module}").EXPERIMENTS}


def load(name: str) -> Experiment:
    """Return an experiment by its name. LookupError names those there are."""
    known = every()
    if name not in known:
        raise LookupError(f"no experiment is called {name!r}; there are: {', '.join(known)}")
    return known[name]
