"""What the three decorators share: one decorator for sync and async functions, which knows the layers below it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, TypeVar, cast

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])


class Policy:
    """The base of the three rules: a decorator, and `call` for a single call."""

    rule: ClassVar[str]
    name: str

    def __call__(self, fn: Function) -> Function:
        """Return `fn`, sync or async, guarded, with its name, docstring and layers; a policy without a name takes its.

        Raises TypeError for what can't be guarded: a staticmethod or classmethod object, a generator function.
        """
        got = f"@{self.rule} got"
        if isinstance(fn, staticmethod) or not callable(fn):
            raise TypeError(f"{got} {fn!r}: put it below @classmethod and @staticmethod, directly on the function")
        if any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in _callables_of(fn)):
            raise TypeError(f"{got} {name_of(fn)}, a generator, which runs after the call is over: wrap its calls")
        self.name = self.name or name_of(fn)
        wrapper: Any = functools.update_wrapper((self.for_async if is_async(fn) else self.for_sync)(fn), fn)
        wrapper.__distsys__ = (self.rule, *layers(fn))
        return cast(Function, wrapper)

    async def call(self, fn: Callable[..., Awaitable[T]], /, *args: Any, **kwargs: Any) -> T:
        """Await `fn(*args, **kwargs)`, guarded by this policy."""
        return await self.for_async(fn)(*args, **kwargs)

    def for_async(self, fn: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        """Return the async function `fn`, guarded."""
        raise NotImplementedError

    def for_sync(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function `fn`, guarded."""
        raise NotImplementedError


def layers(fn: Any) -> tuple[str, ...]:
    """Return the names of the rules around a function, outermost first."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    found: tuple[str, ...] = getattr(fn, "__distsys__", ())
    return found


def name_of(fn: Any) -> str:
    """Return the qualified name of a function, or its repr."""
    return getattr(fn, "__qualname__", "") or repr(fn)


def is_async(fn: Any) -> bool:
    """Return whether a call of `fn` has to be awaited."""
    return any(inspect.iscoroutinefunction(f) for f in _callables_of(fn))


def _callables_of(fn: Any) -> tuple[Any, ...]:
    """Return the function itself, and the `__call__` of an object that can be called like one."""
    return fn, None if isinstance(fn, type) else getattr(fn, "__call__", None)  # noqa: B004
