"""The scenes of a circuit breaker: what it promises when its dependency fails, and when it comes back."""

from __future__ import annotations

import asyncio

from distsys.lab.explore.guards import HttpError, Result, Scripts, Stage, must

THRESHOLD = 5
SETTINGS = {"failure_threshold": THRESHOLD, "recovery_timeout": 30.0}
MOST_FAILURES = 200  # of a breaker that says itself when it opens
MOST_PROBES = 10  # at once
MOST_FAILED_PROBES = 3  # one after the other
TO_CLOSE = 10  # good calls after which a breaker is closed again
CROWD = 50
WAITS = (1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 3600.0)

SCENES = scene = Scripts()


def _sent(results: list[Result]) -> int:
    return sum(len(result.sent) for result in results)


async def _opened(stage: Stage) -> list[Result]:
    """Let calls fail until the breaker refuses, and check that it does."""
    stage.fails()
    if "failure_threshold" in stage.given:
        results = await stage.ask(THRESHOLD)
        must(
            _sent(results) == THRESHOLD,
            f"it refused after {_sent(results)} failures; failure_threshold is {THRESHOLD}",
        )
    else:
        results = [(await stage.ask())[0]]
        while not results[-1].refused and len(results) < MOST_FAILURES:
            results += await stage.ask()
    must(all(r.tells for r in results if r.sent), "a call failed, and its caller was not told")
    (refused,) = await stage.ask()
    must(refused.error is not None, f"a refused call returned {refused.answer!r}: its caller takes that for an answer")
    must(not refused.sent, f"call {len(results) + 1} was sent although {len(results)} in a row had failed")
    return results


async def _closed(stage: Stage) -> None:
    """Let calls succeed until the breaker is closed, and check that it is."""
    stage.works()
    results = await stage.ask(TO_CLOSE)
    must(any(r.sent for r in results), f"{stage.late:g} s and more after it opened, nobody is let through to ask again")
    crowd = await stage.ask(CROWD, together=True)
    refused = sum(r.refused for r in crowd)
    must(not refused, f"it does not close: {refused} of {CROWD} calls were refused after {TO_CLOSE} good ones")


@scene(
    "a healthy dependency is called, and its answers and errors come through",
    "What does your guard do with what it is given, and with what comes back?",
)
async def healthy(stage: Stage) -> None:
    """Compare answers, arguments and errors with what the dependency gave."""
    answer, error = object(), ConnectionResetError("the very one")
    stage.answers = lambda: answer
    results = [*await stage.ask(20), *await stage.ask(20, together=True)]
    must(
        not any(r.error for r in results), f"a healthy dependency: {next((r.error for r in results if r.error), '')!r}"
    )
    must(all(r.answer is answer for r in results), f"the answer was changed to {results[0].answer!r}")
    must(all(len(r.sent) == 1 for r in results), f"one call sent {len(results[0].sent)} requests")
    stage.answers = lambda: error
    (failed,) = await stage.ask()
    must(failed.error is not None, f"the dependency failed, and the caller got {failed.answer!r}")
    told = failed.error
    while told is not None and told is not error:
        told = told.__cause__ or told.__context__
    must(told is error, f"the dependency's error became {type(failed.error).__name__}, which does not name it")


@scene(
    "one call in a hundred fails",
    "What does a success say about the failures before it?",
)
async def one_in_a_hundred(stage: Stage) -> None:
    """Let a thousand calls go by, one a second."""
    for n in range(1000):
        failing = n % 100 == 50
        stage.answers = (lambda: ConnectionResetError("once")) if failing else (lambda: "done")
        (result,) = await stage.ask()
        must(result.sent, f"call {n} was refused: {n // 100 + 1} failures among {n} calls opened it")
        await stage.pass_time(1.0)


@scene(
    "the dependency is down: callers are refused at once, until it is back",
    "Who counts the failures, who is refused once there were enough, and who asks again when the time is over?",
)
async def down_and_back(stage: Stage) -> None:
    """Fail until it opens; ask early and late; close."""
    await _opened(stage)
    crowd = await stage.ask(CROWD, together=True)
    must(not _sent(crowd), f"{_sent(crowd)} of {CROWD} calls were sent while it was open")
    slow = max(r.ended for r in crowd) - stage.loop.now
    must(slow <= 0, "a refused caller had to wait")
    if "recovery_timeout" not in stage.given:
        await _learn_recovery(stage)
        return
    await stage.pass_time(stage.early)
    must(not _sent(await stage.ask()), f"{stage.early:g} s after it opened a call was sent; recovery_timeout is 30 s")
    await stage.pass_time(stage.late - stage.early)
    await _closed(stage)


async def _learn_recovery(stage: Stage) -> None:
    before = 0.0
    for wait in WAITS:
        await stage.pass_time(wait - before)
        if _sent(await stage.ask()):
            stage.learned.update(early=0.4 * before, late=1.5 * wait)
            await stage.pass_time(1.5 * wait)
            await _closed(stage)
            return
        before = wait
    must(False, "an hour after it opened, nobody is let through to ask again")


@scene(
    "refused callers go on asking",
    "Is a refusal a failure of the dependency?",
)
async def impatient_callers(stage: Stage) -> None:
    """Ask every second while it is open: a refusal is no failure, and does not make the wait longer."""
    await _opened(stage)
    stage.works()
    step = stage.late / 45
    for _ in range(45):
        await stage.pass_time(step)
        await stage.ask()
    await _closed(stage)


@scene(
    "50 callers when the recovery time is over",
    "All of them look before the first has its answer. What is there to count, and when?",
)
async def stampede(stage: Stage) -> None:
    """Let all of them ask before the first has its answer."""
    await _opened(stage)
    await stage.pass_time(stage.late)
    waiting = stage.hangs()
    callers = stage.begin(CROWD)
    await stage.pass_time(0.1)
    must(waiting, f"{stage.late:g} s after it opened, nobody is let through to ask again")
    must(len(waiting) <= MOST_PROBES, f"{len(waiting)} of {CROWD} callers reached a dependency that may still be down")
    for future in waiting:
        future.set_result("done")
    await asyncio.gather(*callers)
    await _closed(stage)


@scene(
    "the probe fails",
    "From when on does the recovery time count now?",
)
async def failed_probe(stage: Stage) -> None:
    """Fail all probes: it is open again, for a full recovery time, and then probes again."""
    await _opened(stage)
    for n in range(3):
        await stage.pass_time(stage.late * 4**n)  # some wait longer each time
        probes = await stage.ask(MOST_FAILED_PROBES + 1)
        must(all(r.tells for r in probes if r.sent), "a probe failed, and its caller was not told")
        must(_sent(probes), f"{stage.late:g} s after it opened, nobody is let through to ask again")
        must(
            _sent(probes) <= MOST_FAILED_PROBES,
            f"{_sent(probes)} calls were sent, and failed, when the recovery time was over",
        )
        await stage.pass_time(stage.early)
        must(not _sent(await stage.ask(3)), f"a probe failed, and {stage.early:g} s later it asks again")
    await stage.pass_time(stage.late * 64)
    await _closed(stage)


async def _is_closed(stage: Stage) -> bool:
    """Return whether a crowd would be let through, all of it."""
    waiting = stage.hangs()
    callers = stage.begin(MOST_PROBES + 2)
    await stage.pass_time(0.01)
    stage.works()
    for future in waiting:
        future.set_result("done")
    return not any(r.refused for r in await asyncio.gather(*callers))


@scene(
    "it closes, and counts anew",
    "What has to be forgotten when it closes?",
)
async def counts_anew(stage: Stage) -> None:
    """Open, close, and fail once: that opens nothing. Then fail often: that does."""
    for to_close in range(TO_CLOSE + 1):
        await _reopened(stage, to_close)
        closed = await _is_closed(stage)
        await stage.ask(2 * TO_CLOSE)
        if closed:
            break
    for _ in range(2):
        await _reopened(stage, max(1, to_close))
        stage.fails()
        await stage.ask()
        stage.works()
        (after,) = await stage.ask()
        must(after.sent, "it had closed; then one failure opened it again")
        await stage.ask(2 * TO_CLOSE)


async def _reopened(stage: Stage, good_calls: int) -> None:
    await _opened(stage)
    await stage.pass_time(stage.late)
    stage.works()
    await stage.ask(good_calls)


@scene(
    "failures come all at once",
    "The failures after the one that opened it: what do they still change?",
)
async def failures_together(stage: Stage) -> None:
    """Let 50 calls fail together: it opens, and recovers as after any other opening."""
    stage.fails()
    await stage.ask(CROWD if "failure_threshold" in stage.given else MOST_FAILURES, together=True)
    must(not _sent(await stage.ask(5)), f"{CROWD} calls failed together, and it still lets callers through")
    await stage.pass_time(stage.early)
    must(not _sent(await stage.ask()), f"{stage.early:g} s after it opened a call was sent")
    await stage.pass_time(stage.late - stage.early)
    await _closed(stage)


@scene(
    "a success comes late, from before the opening",
    "When a call returns, was it this breaker, in this state, that let it go? What could it carry to tell?",
)
async def late_success(stage: Stage) -> None:
    """Let a call begin, open the breaker, and answer the call: that says nothing about now."""
    (waiting,), early = await _begun(stage, 1)
    await _opened(stage)
    waiting.set_result("done")
    await asyncio.gather(*early)
    stage.fails()
    must(not _sent(await stage.ask(5)), "an answer to a call from before the opening closed it")


@scene(
    "a call from before the opening ends while a probe is under way",
    "Who had taken the place that this call gives back?",
)
async def late_beside_probe(stage: Stage) -> None:
    """End it: that gives no place back, for it had taken none."""
    (waiting,), early = await _begun(stage, 1)
    await _opened(stage)
    await stage.pass_time(stage.late)
    probing = stage.hangs()
    crowd = stage.begin(CROWD)
    await stage.pass_time(0.1)
    probes = len(probing)
    waiting.set_result("done")
    await asyncio.gather(*early)
    crowd += stage.begin(CROWD)
    await stage.pass_time(0.1)
    more = len(probing) - probes
    must(not more, f"{probes} probes were under way; a call from before the opening ended, and {more} more were sent")
    for future in probing:
        future.set_result("done")
    await asyncio.gather(*crowd)


@scene(
    "failures come late, from before the opening",
    "When a call fails, was it this breaker, in this state, that let it go? What could it carry to tell?",
)
async def late_failures(stage: Stage) -> None:
    """Let calls begin, open and close the breaker; then let those calls fail: that says nothing about now."""
    waiting, early = await _begun(stage, 10)
    await _opened(stage)
    await stage.pass_time(stage.late)
    await _closed(stage)
    for future in waiting:
        future.set_exception(ConnectionResetError("late"))
    await asyncio.gather(*early)
    stage.works()
    (after,) = await stage.ask()
    must(after.sent, "failures of calls from before the opening opened it again, though the dependency is healthy")


@scene(
    "a failure comes late, while it is open",
    "Does a failure from before the opening say anything new about the dependency?",
)
async def late_failure_while_open(stage: Stage) -> None:
    """Open it; a call from before fails just before the recovery time is over: the wait does not begin anew."""
    (waiting,), early = await _begun(stage, 1)
    await _opened(stage)
    await stage.pass_time(max(stage.early, 0.6 * stage.late))
    waiting.set_exception(ConnectionResetError("late"))
    await asyncio.gather(*early)
    await stage.pass_time(stage.late - max(stage.early, 0.6 * stage.late))
    stage.works()
    must(_sent(await stage.ask(3)), "a failure from before the opening made the wait begin anew")


async def _begun(stage: Stage, times: int) -> tuple[list[asyncio.Future[str]], list[asyncio.Task[Result]]]:
    waiting = stage.hangs()
    callers = stage.begin(times)
    await stage.pass_time(0.1)
    must(len(waiting) == times, f"{len(waiting)} of {times} calls at once were sent to a healthy dependency")
    return waiting, callers


@scene(
    "the probe is cancelled",
    "A task can end without a result and without an Exception. Who gives its place back then?",
)
async def cancelled_probe(stage: Stage) -> None:
    """Cancel the callers of all probes: their places are given back, or nobody ever asks again."""
    await _opened(stage)
    await stage.pass_time(stage.late)
    stage.hangs()
    callers = stage.begin(MOST_PROBES + 2)
    await stage.pass_time(0.1)
    for caller in callers:
        caller.cancel()
    ended = await asyncio.gather(*callers, return_exceptions=True)
    swallowed = [r for r in ended if isinstance(r, Result) and not r.refused]
    must(not swallowed, "a cancelled caller was not cancelled: the breaker swallowed its CancelledError")
    await stage.pass_time(3 * stage.late)
    await _closed(stage)


@scene(
    "the probe is answered 404",
    "Every way out of a probe has to decide something. Which one does not?",
)
async def probe_of_the_caller(stage: Stage) -> None:
    """Answer the first probes with an error of their callers: whatever it makes of that, it closes at last."""
    await _opened(stage)
    await stage.pass_time(stage.late)
    stage.answers = lambda: HttpError(404)
    await stage.ask(MOST_PROBES)
    await stage.pass_time(4 * stage.late)
    await _closed(stage)


@scene(
    "callers go away",
    "Does a caller that gives up say anything about the dependency?",
)
async def cancel_storm(stage: Stage) -> None:
    """Cancel many callers of a healthy dependency: that says nothing about the dependency."""
    waiting = stage.hangs()
    callers = stage.begin(CROWD)
    await stage.pass_time(0.1)
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    left = sum(not future.done() for future in waiting)
    must(not left, f"{CROWD} callers went away, and {left} of their calls go on without them")
    stage.works()
    refused = sum(r.refused for r in await stage.ask(5))
    must(not refused, f"{CROWD} callers went away, which opened it: {refused} of 5 calls were refused")


@scene(
    "errors of the caller: 404 and 422",
    "Whose fault is a 404?",
)
async def callers_errors(stage: Stage) -> None:
    """Answer with 4xx: who looks at the status must not count them. Who never looks has promised nothing of it."""
    error = HttpError(404)
    stage.answers = lambda: error
    results = await stage.ask(MOST_FAILURES if "failure_threshold" not in stage.given else CROWD)
    refused = sum(r.refused for r in results)
    must(not (refused and error.looked), f"it looked at the status 404, and opened all the same: {refused} refused")


@scene(
    "two dependencies: one is down",
    "Where does the state live, and how many are there of it?",
)
async def two_dependencies(stage: Stage) -> None:
    """Open the breaker of one dependency: the other's callers are let through."""
    first = stage.guarded
    stage.guarded = stage.another()
    stage.works()
    await stage.ask(2)
    second, stage.guarded = stage.guarded, first
    await _opened(stage)
    stage.works()
    stage.guarded = second
    must(not any(r.refused for r in await stage.ask(5)), "the failures of one dependency opened the breaker of another")
