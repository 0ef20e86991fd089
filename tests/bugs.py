"""Bugs planted in the rules, each by a decorator above the test that has to die of it: this tests the tests.

    @kills("no owner check on release", in_script(RELEASE_OR_DEQUEUE, "if holder == me then", "if holder then"))
    async def test_force_release_hands_the_lock_on(redis): ...

The test runs as it is, and once more for each bug as `test_...[bug: no owner check on release]`, in the same process
and with the same fixtures; that run passes only if the test fails. A parametrized test meets each bug in the first of
its cases, or in the one that `case` names.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest

from distsys._support.redis import Script

F = TypeVar("F", bound=Callable[..., Any])
Plant = Callable[[pytest.MonkeyPatch], None]
SECONDS = 8.0  # a test that a bug makes hang is dead
_inside_test: ContextVar[bool] = ContextVar("inside_test", default=False)


@dataclass(frozen=True)
class Bug:
    """A bug by name, how to plant it, and the parameters of the test under which it shows."""

    name: str
    plant: Plant
    case: dict[str, Any] = field(default_factory=dict)

    def shows(self, params: dict[str, Any]) -> bool:
        """Whether these are the parameters that the bug names."""
        return all(repr(params.get(name)) == repr(value) for name, value in self.case.items())


def kills(name: str, plant: Plant, **case: Any) -> Callable[[F], F]:
    """The decorated test has to die when this bug is planted."""

    def mark(test: F) -> F:
        bugs = test.__dict__.setdefault("bugs", [])
        bugs.insert(0, Bug(name, plant, case))
        return test

    return mark


def replaced(home: Any, attribute: str, broken: Any) -> Plant:
    """Plant by putting something else in the place of `home.attribute`."""
    return lambda patch: patch.setattr(home, attribute, broken)


def in_script(script: Script, old: str, new: str) -> Plant:
    """Plant by editing the text of a Lua script."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        assert script.text.count(old) == 1, f"the script no longer has this text once: {old}"
        broken = Script(script.text.replace(old, new))
        patch.setattr(script, "text", broken.text)
        patch.setattr(script, "sha", broken.sha)

    return plant


def edited(home: Any, attribute: str, old: str, new: str, **names: Any) -> Plant:
    """Plant by editing the text of a function, a property or a str; `names` are added to the function's globals."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        found = inspect.getattr_static(home, attribute)
        if isinstance(found, str):
            assert old in found, f"{attribute} no longer has this text: {old}"
            patch.setattr(home, attribute, found.replace(old, new))
            return
        function = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", found))
        text = textwrap.dedent(inspect.getsource(function))
        assert old in text, f"{attribute} no longer has this text: {old}"
        for name, value in names.items():
            patch.setitem(function.__globals__, name, value)
        patch.setattr(function, "__code__", _code_of(function, text.replace(old, new)))

    return plant


def _code_of(function: Any, text: str) -> Any:
    """What that source compiles to, for whoever holds the function already; its closure stays as it is."""
    made: dict[str, Any] = dict(function.__globals__)
    if free := function.__code__.co_freevars:
        closure = "".join(f"    {name} = None\n" for name in free)
        text = f"def outer():\n{closure}{textwrap.indent(text, '    ')}\n    return {function.__name__}\n"
        exec(text, made)
        broken = made["outer"]()
    else:  # at module level: a function may call a global of its own name
        exec(text, made)
        broken = made[function.__name__]
    return inspect.unwrap(getattr(broken, "fget", None) or broken).__code__


# ---- for conftest.py


def parametrize(metafunc: pytest.Metafunc) -> None:
    """Give a test with bugs a run for each of them."""
    bugs = getattr(metafunc.function, "bugs", None)
    if bugs:
        metafunc.fixturenames.append("planted_bug")
        runs = [pytest.param(None, id=pytest.HIDDEN_PARAM), *(pytest.param(bug, id=f"bug: {bug.name}") for bug in bugs)]
        metafunc.parametrize("planted_bug", runs, indirect=True)


def bug_of(item: pytest.Item) -> Bug | None:
    """The bug that this run has to die of."""
    found: Bug | None = getattr(item, "callspec", None) and item.callspec.params.get("planted_bug")  # type: ignore[attr-defined]
    return found


def select(items: list[pytest.Item]) -> list[pytest.Item]:
    """Keep one case for each bug."""
    kept, met = list[pytest.Item](), set[Any]()
    for item in items:
        bug = bug_of(item)
        if bug is not None:
            who = item.nodeid.partition("[")[0], bug.name
            params: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
            if who in met or not bug.shows(params):
                continue
            met.add(who)
            item.add_marker(pytest.mark.filterwarnings("ignore"))
        kept.append(item)
    lost = {(i.nodeid.partition("[")[0], b.name) for i in items if (b := bug_of(i))} - met
    assert not lost, f"no case shows these bugs: {lost}"
    return kept


def run(item: Any, bug: Bug) -> Iterator[None]:
    """Run the test under its bug: it has to fail."""
    test = item.obj
    if inspect.iscoroutinefunction(test) and not hasattr(test, "hypothesis"):
        item.obj = _bounded(test)
    with pytest.MonkeyPatch.context() as patch:
        bug.plant(patch)
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # noqa: BLE001  pytest's own Failed is no Exception
            return
        finally:
            item.obj = test
            gc.collect()  # what a broken rule leaves open is not to trouble another test
    pytest.fail(f"the test lives with this bug: {bug.name}")


def _bounded(test: Callable[..., Any]) -> Callable[..., Any]:
    """A test that hangs is dead, and what it leaves running is ended."""

    @functools.wraps(test)
    async def bounded(**fixtures: Any) -> None:
        loop = asyncio.get_running_loop()
        started = weakref.WeakSet[asyncio.Task[Any]]()  # by the test, and not by a fixture's pool meanwhile

        def make_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
            task = asyncio.Task(coro, loop=loop, **options)
            if _inside_test.get():
                started.add(task)
            return task

        before = loop.get_task_factory()
        loop.set_task_factory(make_task)
        token = _inside_test.set(True)
        try:
            async with asyncio.timeout(SECONDS):
                await test(**fixtures)
        finally:
            _inside_test.reset(token)
            loop.set_task_factory(before)
            for _ in range(100):  # Python 3.11's wait_for can swallow a cancellation
                left = [task for task in started if not task.done()]
                if not left:
                    break
                for task in left:
                    task.cancel()
                await asyncio.wait(left, timeout=0.1)

    return bounded
