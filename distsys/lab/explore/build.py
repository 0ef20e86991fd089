"""From a reader's candidate to what a worker uses: a copy of its module per process, called with what it names."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

from distsys.lab.run.guard import looks_sync
from distsys.lab.run.worker import ALIASES


class WrongShape(TypeError):
    """The candidate can't be used as this kind of rule. The message says what it lacks."""


def loader(candidate: Any) -> Callable[[], Any]:
    """Return a function that makes a copy of the candidate's module for each process.

    Libraries are shared, and so is a candidate that can't be copied, as one with a lock or a socket in a global.
    """
    from cloudpickle import cloudpickle

    module = sys.modules.get(getattr(candidate, "__module__", "") or "")
    own = module is not None and not _is_library(module)
    if own and module is not None and module.__name__ != "__main__":
        cloudpickle.register_pickle_by_value(module)
    try:
        data = cloudpickle.dumps(candidate)
    except Exception:  # noqa: BLE001  whatever its globals raise
        return lambda: candidate

    def load() -> Any:
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_ID.clear()  # or every process gets the same class
        cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS.clear()
        return cloudpickle.loads(data)

    return load


def _is_library(module: Any) -> bool:
    path = getattr(module, "__file__", None) or ""
    return module.__name__.partition(".")[0] == "distsys" or any(
        path.startswith(folder) for folder in sysconfig.get_paths().values() if folder
    )


def named(candidate: Any) -> set[str]:
    """Return what the candidate's parameters name, by the lab's own names."""
    return {ALIASES.get(name, name) for name in inspect.signature(candidate).parameters}


def build(candidate: Any, **facts: Any) -> Any:
    """Call the candidate with those facts that its parameters name. A fact that is a function of one is not called."""
    arguments, positional = dict[str, Any](), list[Any]()
    given = getattr(candidate, "keywords", ())
    for name, parameter in inspect.signature(candidate).parameters.items():
        kind = ALIASES.get(name, name)
        if kind in facts and name not in given:
            if parameter.kind is parameter.POSITIONAL_ONLY:
                positional.append(facts[kind])
            else:
                arguments[name] = facts[kind]
        elif parameter.default is parameter.empty and name not in given and "VAR_" not in parameter.kind.name:
            label = getattr(candidate, "__qualname__", repr(candidate))
            raise WrongShape(
                f"{label} asks for {name!r}; it can be given {', '.join(facts)}: wrap it in a function of those"
            )
    try:
        return candidate(*positional, **arguments)
    except Exception as error:
        label = getattr(candidate, "__qualname__", repr(candidate))
        given_to = ", ".join([*("?" for _ in positional), *arguments])
        raise WrongShape(f"{label}({given_to}) raised {type(error).__name__}: {error}") from error


def blocks(candidate: Any) -> bool:
    """Return whether the candidate is a class whose objects block: a lock with `with`, a limiter that is not async."""
    deciding = method_of(candidate, "allow", "try_acquire", "is_allowed")
    if not isinstance(candidate, type) or deciding in (None, candidate):
        return looks_sync(candidate)
    return not inspect.iscoroutinefunction(deciding)


def method_of(made: Any, *names: str) -> Callable[..., Any] | None:
    """Return the first of these methods, or the thing itself if it is a function; None if it is neither."""
    for name in names:
        if (found := getattr(made, name, None)) is not None:
            return found  # type: ignore[no-any-return]
    return made if callable(made) else None
