"""What all three decorators share: one decorator for sync and async functions, which knows the layers below it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def decorate(rule: str, policy: Any, fn: Function) -> Function:
    """fn, guarded by the policy and dressed as before; it knows its layers, outermost first. Names the policy."""
    if isinstance(fn, staticmethod) or not callable(fn):
        raise TypeError(f"@{rule} got {fn!r}: put it below @classmethod and @staticmethod, directly on the function")
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in _ways_to_call(fn)):
        raise TypeError(f"@{rule} got {name_of(fn)}, a generator, which runs after the call is over: wrap its calls")
    policy.name = policy.name or name_of(fn)
    wrapper: Any = functools.update_wrapper((policy.for_async if is_async(fn) else policy.for_sync)(fn), fn)
    wrapper.__distsys__ = (rule, *layers(fn))
    return cast(Function, wrapper)


def layers(fn: Any) -> tuple[str, ...]:
    while isinstance(fn, functools.partial):
        fn = fn.func
    found: tuple[str, ...] = getattr(fn, "__distsys__", ())
    return found


def name_of(fn: Any) -> str:
    return getattr(fn, "__qualname__", "") or repr(fn)


def is_async(fn: Any) -> bool:
    return any(inspect.iscoroutinefunction(each) for each in _ways_to_call(fn))


def _ways_to_call(fn: Any) -> tuple[Any, ...]:
    """The function itself, or the method of what can be called like one."""
    return fn, None if isinstance(fn, type) else getattr(fn, "__call__", None)  # noqa: B004
