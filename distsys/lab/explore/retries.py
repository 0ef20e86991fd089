"""The scenes of a retry: how often, how long apart, of which errors, and what the caller gets in the end."""

from __future__ import annotations

import asyncio
from functools import partial
from statistics import mean
from typing import Any

from distsys.lab.explore.guards import TRANSIENT, HttpError, Result, Scripts, Stage, must
from distsys.lab.history.words import count

SETTINGS = {"max_attempts": 3, "base_delay": 0.1, "max_delay": 1.0, "idempotent": True}
MOST_ATTEMPTS = 20  # of a retry that says itself how often
CROWD = 200
LONGEST = 3600.0  # seconds: a wait that no caller will live to see the end of

SCENES = scene = Scripts()


class Stop(BaseException):
    """As SystemExit: it ends the program, and is no failure to be tried again."""


def _same(answer: Any) -> Any:
    return answer


def _next(left: list[Any]) -> Any:
    return left.pop() if left else "done"


def _attempts(stage: Stage) -> int:
    """How many attempts are allowed."""
    return 3 if "max_attempts" in stage.given else MOST_ATTEMPTS


async def _failing(stage: Stage) -> Result:
    stage.fails()
    (result,) = await stage.ask()
    return result


@scene(
    "a success is returned, whatever it is",
    "What tells a failure from a success? An exception, or the value?",
)
async def success(stage: Stage) -> None:
    """Answer with values that are easily taken for no answer; each call is sent once, as it was made."""
    for answer in (object(), None, 0, "", False, []):
        stage.answers = partial(_same, answer)
        (result,) = await stage.ask()
        must(result.error is None, f"a success became {result.error!r}")
        must(result.answer is answer, f"the answer {answer!r} became {result.answer!r}")
        must(len(result.sent) == 1, f"the answer {answer!r} was taken for a failure: {len(result.sent)} requests")
    if "call" not in stage.given:
        result = await stage.one("/a", "/b")
        must(result.error is None and len(result.sent) == 1, f"a call with two arguments: {result.error!r}")


@scene(
    "it fails, and then it works",
    "How often is a call tried before its error is final?",
)
async def passing_failure(stage: Stage) -> None:
    """Fail the first request, and in a second call the first two, with an error that it tries again."""
    for kind in TRANSIENT:
        stage.learned["transient"] = kind
        stage.fails()
        (result,) = await stage.ask()
        if len(result.sent) > 1:
            break
    else:
        must(False, "no failure that passes is tried again: no broken connection, no 503, no timeout")
    for failures in (1, 2):
        stage.answers = partial(_next, [stage.failure() for _ in range(failures)])
        (result,) = await stage.ask()
        enough = failures < 3 if "max_attempts" in stage.given else failures == 1
        if enough:
            times = count(failures, "failure")
            must(result.answer == "done", f"{times}, then an answer: the caller got {result.error!r}")


@scene(
    "it fails for good",
    "Does max_attempts include the first? What is done between the last failure and the caller's error?",
)
async def fails_for_good(stage: Stage) -> None:
    """Count the requests, look at the error, and at what is waited for after the last."""
    for _ in range(3):
        result = await _failing(stage)
        sent, allowed = len(result.sent), _attempts(stage)
        must(result.error is not None, f"every attempt failed, and the caller got {result.answer!r}")
        must(sent <= allowed, f"{sent} requests of one call; {allowed} attempts are allowed")
        must(sent > 1, "one failure, and no second attempt")
        if "max_attempts" in stage.given:
            must(sent == allowed, f"it gave up after {sent} of {allowed} attempts")
        must(result.tells, f"the caller got {result.error!r}; the last failure was {result.failures[-1]!r}")
        idle = result.ended - result.sent[-1]
        must(idle < 0.01, f"after the last attempt it waited {idle:.2f} s for nothing")


@scene(
    "200 callers fail at one moment",
    "All of them failed at the same moment. When will they meet again?",
)
async def apart(stage: Stage) -> None:
    """Look at the gaps between attempts: they grow, and callers that failed together don't come back together."""
    stage.fails()
    results = await stage.ask(CROWD, together=True)
    first = [r.gaps[0] for r in results if r.gaps]
    must(first, "one failure, and no second attempt")
    must(mean(first) > 1e-3, "it does not wait between attempts")
    rush = max(sum(abs(gap - other) < 1e-6 for gap in first) for other in first[:20])
    must(rush < CROWD / 4, f"{rush} of {CROWD} callers that failed together came back in the same moment: no jitter")
    must(min(first) >= 0, "it waited a negative time")
    second = [r.gaps[1] for r in results if len(r.gaps) > 1]
    if second and "base_delay" in stage.given:
        grows = mean(second) > 1.08 * mean(first)
        must(grows, f"the waits do not grow: {mean(first):.3f} s, then {mean(second):.3f} s on average")
    if "max_delay" in stage.given:
        longest = max(gap for r in results for gap in r.gaps)
        must(longest <= 2.0, f"it waited {longest:.2f} s; max_delay is 1 s")


@scene(
    "many attempts: the waits stay within bounds",
    "What is the longest wait that a caller can live with?",
)
async def bounded(stage: Stage) -> None:
    """Fail for good with 24 attempts."""
    if "max_attempts" not in stage.given:
        return
    stage.guarded = stage.another(max_attempts=24)
    result = await _failing(stage)
    longest = max(result.gaps, default=0.0)
    bound = 2.0 if "max_delay" in stage.given else LONGEST
    must(
        longest <= bound,
        f"before attempt {result.gaps.index(longest) + 2 if result.gaps else 0} it waits {longest:,.0f} s",
    )
    must(result.tells, f"with 24 attempts the caller got {result.error!r}")


@scene(
    "the caller is cancelled between two attempts",
    "A CancelledError is no failure of the dependency. Who catches it?",
)
async def cancelled_between(stage: Stage) -> None:
    """Cancel in the first wait, for several callers: they end at once, and nothing more is sent."""
    stage.fails()
    callers = stage.begin(20)
    await stage.pass_time(0.0015)
    await _all_end(stage, callers)


@scene(
    "the caller is cancelled while a request is under way",
    "A CancelledError is no failure of the dependency. Who catches it?",
)
async def cancelled_within(stage: Stage) -> None:
    """Cancel while requests hang."""
    stage.hangs()
    callers = stage.begin(20)
    await stage.pass_time(0.1)
    await _all_end(stage, callers)


async def _all_end(stage: Stage, callers: list[asyncio.Task[Result]]) -> None:
    before, sent = stage.loop.now, sum(op.name == "arrive" for op in stage.ops)
    running = [caller for caller in callers if not caller.done()]
    for caller in running:
        caller.cancel()
    ended = await asyncio.gather(*running, return_exceptions=True)
    must(
        not any(isinstance(r, Result) for r in ended),
        "a cancelled caller was not cancelled: it swallowed CancelledError",
    )
    must(stage.loop.now - before < 0.01, "a cancelled caller had to wait before it ended")
    stage.works()
    await stage.pass_time(10.0)
    more = sum(op.name == "arrive" for op in stage.ops) - sent
    must(not more, f"{more} requests were sent after their callers had been cancelled")


@scene(
    "the caller has a deadline",
    "Whose clock decides how long a call may take?",
)
async def deadline(stage: Stage) -> None:
    """Give each call 50 ms: it ends then, with a TimeoutError."""
    stage.hangs()
    began = stage.loop.now
    with_deadline = asyncio.create_task(_within(stage, 0.05))
    outcome = (await asyncio.gather(with_deadline, return_exceptions=True))[0]
    must(isinstance(outcome, TimeoutError), f"the caller's deadline passed, and it got {outcome!r}")
    must(stage.loop.now - began < 0.06, f"a deadline of 0.05 s, and it ended after {stage.loop.now - began:.2f} s")


async def _within(stage: Stage, seconds: float) -> Result:
    async with asyncio.timeout(seconds):
        return await stage.one()


@scene(
    "errors of the caller: 400, 401, 404, 422",
    "Which errors would be the same a second later? The status says so.",
)
async def callers_errors(stage: Stage) -> None:
    """Answer with 4xx: another attempt gets the same answer."""
    for status in (400, 401, 404, 422):
        stage.answers = partial(HttpError, status)
        (result,) = await stage.ask()
        must(result.error is not None, f"the answer was {status}, and the caller got {result.answer!r}")
        must(len(result.sent) == 1, f"a {status} was tried {len(result.sent)} times: it is the same a second later")
        must(result.tells, f"the answer was {status}, and the caller got {result.error!r}")


@scene(
    "the program is to end",
    "Which exceptions are no Exception, and why?",
)
async def program_ends(stage: Stage) -> None:
    """Raise what is no Exception: it passes through at once."""
    stage.answers = lambda: Stop("stop")
    (result,) = await stage.ask()
    must(len(result.sent) == 1, f"a BaseException, as SystemExit is, was tried {len(result.sent)} times")
    must(isinstance(result.error, Stop), f"a BaseException, as SystemExit is, became {result.error!r}")


@scene(
    "the server says when to come back",
    "Is what the server asks for a lower or an upper bound of your wait?",
)
async def retry_after(stage: Stage) -> None:
    """Answer 503 with retry_after=0.7. Who looks at it must not come earlier."""
    errors = [HttpError(503, retry_after=0.7) for _ in range(CROWD)]
    stage.answers = partial(_next, list(errors))
    results = await stage.ask(CROWD, together=True)
    gaps = [r.gaps[0] for r in results if r.gaps]
    if gaps and any("retry_after" in error.looked for error in errors):
        must(min(gaps) >= 0.69, f"it read retry_after=0.7, and came back after {min(gaps):.2f} s")
    stage.answers = partial(HttpError, 429, retry_after=0.2)
    (refused,) = await stage.ask()
    sent = len(refused.sent)
    must(sent <= _attempts(stage), f"429 with a retry_after, again and again: {sent} requests of one call")


@scene(
    "a slow call, beside others",
    "What do two calls share that should not be shared?",
)
async def slow_call(stage: Stage) -> None:
    """Let one call take three seconds: it is sent once and answered, and another call does not wait for it."""
    (slow,) = stage.begin()
    waiting = stage.hangs()
    await stage.pass_time(1.0)
    stage.works()
    (other,) = await asyncio.gather(*stage.begin(), return_exceptions=False)
    must(stage.loop.now < 1.5, "a call had to wait for another one that was slow")
    must(other.answer == "done", f"beside a slow call, another got {other.error!r}")
    await stage.pass_time(2.0)
    for future in waiting:
        if not future.done():
            future.set_result("done")
    result = await slow
    must(result.answer == "done", f"a call that takes 3 s was cut off: {result.error!r}")
    must(len(result.sent) == 1, f"a call that takes 3 s was sent {len(result.sent)} times")


@scene(
    "many callers share the retry",
    "Where does the count of attempts live, and whose count is it?",
)
async def shared(stage: Stage) -> None:
    """Let calls at once fail twice each; then one after the other: each has its own count and its own answer."""
    (alone,) = await _own_failures(stage, 1)
    together = await _own_failures(stage, 3)  # few, because a budget of retries may refuse more
    for result in together:
        same = (len(result.sent), result.error is None) == (len(alone.sent), alone.error is None)
        must(same, f"alone a call takes {len(alone.sent)} requests; beside others one took {len(result.sent)}")
    for result in [*await _own_failures(stage, 1), *await _own_failures(stage, 1)]:
        must(
            len(result.sent) == len(alone.sent),
            f"first a call took {len(alone.sent)} requests, later {len(result.sent)}",
        )


async def _own_failures(stage: Stage, times: int) -> list[Result]:
    stage.answers = lambda: stage.failure() if stage.request_number < 2 else "done"
    return await stage.ask(times, together=True)


@scene(
    "the reply to a charge is lost, and the call is not idempotent",
    "What does the caller know when the connection breaks after sending?",
)
async def not_idempotent(stage: Stage) -> None:
    """Ask only a retry that names `idempotent`: it is told False, and must not send again what may have happened."""
    if "idempotent" not in stage.given:
        return
    stage.guarded = stage.another(idempotent=False)
    stage.answers = partial(ConnectionResetError, 104, "reset by peer")
    (result,) = await stage.ask()
    must(len(result.sent) == 1, f"idempotent=False, the reply was lost, and it sent {len(result.sent)} requests")
