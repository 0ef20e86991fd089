"""What circuit breaker, retry and bulkhead must withstand, and the usual ones that do not.

The dependency is a real HTTP service in a process of its own. The lab gives a candidate what its parameters name of
call, clock, sleep, failure_threshold (5), recovery_timeout (30 s), max_attempts (3) and base_delay; it returns the
guarded call, or is a decorator, or has a method call(fn, ...). The clock is virtual and waits take no time, so no
verdict depends on the machine's speed.
"""

from __future__ import annotations

import signal
from functools import partial

from distsys.lab.check.calls import answered, at_most_sent, refused_at_once
from distsys.lab.check.combine import all_of
from distsys.lab.check.effects import exactly_once
from distsys.lab.experiments.resilience import candidates as guards
from distsys.lab.experiments.resilience.service import HANGS, calls, dependency
from distsys.lab.run.experiment import Actor, Experiment, Run, Signal, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy
from distsys.resilience.circuit_breaker import circuit_breaker
from distsys.resilience.retry import retry

BREAKER = {"failure_threshold": 5, "recovery_timeout": 30.0}
RETRY = {"max_attempts": 3, "base_delay": 0.01}  # for who sleeps by itself
FAILS, WORKS = [503], [200]
LATER = 100.0  # past the recovery time and all that is added to it


async def anew(run: Run) -> None:
    """Each run has a service of its own, on a port of its own; its script starts it."""


guarding = partial(Experiment, workload=calls, prepare=anew, params=BREAKER | RETRY)


async def both(run: Run, *answers: int | str) -> tuple[Actor, Actor]:
    """The service, which gives these answers in turn, over and over; and one process of callers."""
    service = await dependency(run)
    (w1,) = await run.start(1)
    if answers:
        await service.ask(answers=answers)
    return service, w1


async def down_and_back(run: Run) -> None:
    """15 calls while the service is stopped, killed or slow; it comes back; then 5 more."""
    how = run.arm.point or "killed"
    service, w1 = await both(run)
    await w1.ask()
    if how == "stopped":
        service.signal(signal.SIGSTOP)
        await service.process.stopped()
    elif how == "killed":
        service.kill()
        await run.until(service.ended)
    else:
        await service.ask(answers=[HANGS])
    run.record(*("server", "dependency", "is slow") if how == "slow" else (how, "dependency"))
    for _ in range(3):
        await w1.ask(5, together=True, timeout=0.2)
    if how == "stopped":
        service.resume()
    elif how == "killed":
        await dependency(run)
        run.record("restarted", "dependency")
    else:
        await service.ask(answers=WORKS)
        run.record("healed", "dependency")
    await w1.ask(5, at=LATER)


down = guarding(
    name="dependency-down",
    claim="When a dependency is down, a few callers find out and the others are refused at once, until it is back.",
    arms=tuple(
        arm
        for how in ("stopped", "killed", "slow")
        for arm in (
            expect_violated(f"no breaker, dependency {how}", guards.nothing, point=how),
            expect_held(f"circuit_breaker, dependency {how}", circuit_breaker, point=how),
        )
    ),
    script=down_and_back,
    check=all_of(at_most_sent(5), answered),
)


async def three_of_ten(run: Run) -> None:
    """40 calls, of which the 1st, 4th and 7th of each ten fail: never two in a row. Three open the breaker."""
    _, w1 = await both(run, *(FAILS + WORKS * 2) * 3, 200)
    await w1.ask(40)


window = guarding(
    name="counter-or-window",
    claim="A counter of failures in a row never opens at 30 % failures: each success sets it back. A window does.",
    arms=(
        expect_violated("counter of failures in a row", guards.Textbook),
        expect_violated("circuit_breaker, window=None", partial(circuit_breaker, window=None)),
        expect_held("circuit_breaker, 3 of the last 10", circuit_breaker),
        expect_held("circuit_breaker, 25 % of the last 10", partial(circuit_breaker, failure_rate=0.25)),
    ),
    params=BREAKER | RETRY | {"failure_threshold": 3},
    script=three_of_ten,
    check=at_most_sent(20),
)


async def each(run: Run, times: int, *signals: Signal) -> None:
    """Waits until one of them has come so many times."""
    for _ in range(times):
        await run.until(*signals)


async def opened(run: Run) -> tuple[Actor, Actor]:
    """A breaker that five failures have opened."""
    service, w1 = await both(run, *FAILS)
    await w1.ask(5)
    await each(run, 5, service.called("arrive"))
    await each(run, 5, w1.broke("call"))
    return service, w1


async def fifty_at_once(run: Run) -> None:
    """The recovery time is over, and 50 come before the first has its answer."""
    service, w1 = await opened(run)
    await service.ask(answers=[HANGS])
    run.record("server", "100 s", "later")
    w1.order(50, together=True, at=LATER)
    await each(run, 50, service.called("arrive"), w1.failed("call"), w1.broke("call"))
    await service.ask(answers=WORKS)


stampede = guarding(
    name="half-open-stampede",
    claim="Half open means one probe: of 50 who come when the recovery time is over, one reaches the dependency.",
    arms=(expect_violated("textbook breaker", guards.Textbook), expect_held("circuit_breaker", circuit_breaker)),
    script=fifty_at_once,
    check=at_most_sent(1, name="arrive"),
)


async def answer_from_before(run: Run) -> None:
    """One call waits for its answer while five others fail and open the breaker; then it succeeds."""
    service, w1 = await both(run, HANGS, *FAILS * 9)
    w1.order(task="early")
    await run.until(service.called("arrive"))
    await w1.ask(5)
    await service.ask(answers=WORKS)
    await run.until(w1.did("call", "w1.early"))
    run.record("server", "a late", "success")
    await service.ask(answers=FAILS)
    await w1.ask(5)


late = guarding(
    name="late-success",
    claim="A success that began before the breaker opened says nothing about now: it must not close it.",
    arms=(expect_violated("textbook breaker", guards.Textbook), expect_held("circuit_breaker", circuit_breaker)),
    script=answer_from_before,
    check=at_most_sent(0, name="arrive"),
)


async def probe_cancelled(run: Run) -> None:
    """The probe is cancelled while it waits; the dependency is well again."""
    service, w1 = await opened(run)
    await service.ask(answers=[HANGS])
    w1.order(at=LATER, task="probe")
    await run.until(service.called("arrive"))
    w1.cancel("probe")
    await run.until(w1.broke("call", "w1.probe"))
    await service.ask(answers=WORKS)
    run.record("healed", "dependency")
    await w1.ask(5, at=2 * LATER)


cancelled = guarding(
    name="cancelled-probe",
    claim="A probe that is cancelled has to give its place back, or the breaker never closes again.",
    arms=(
        expect_violated("probes counted, not given back", guards.CountedProbes),
        expect_held("circuit_breaker", circuit_breaker),
    ),
    script=probe_cancelled,
    check=answered,
)


async def passing_failure(run: Run) -> None:
    """One call; its first two requests fail, all others succeed."""
    _, w1 = await both(run, *FAILS * 2, *WORKS * 9)
    await w1.ask()


passing = guarding(
    name="passing-failure",
    claim="A failure that passes is worth another try.",
    arms=(expect_violated("no retry", guards.nothing), expect_held("retry", retry)),
    script=passing_failure,
    check=answered,
)


async def ten_calls(run: Run) -> None:
    """Ten calls in turn while every request fails."""
    _, w1 = await both(run, *FAILS)
    run.record("server", "dependency", "fails")
    await w1.ask(10)


order = guarding(
    name="retry-outside-breaker",
    claim="Retry belongs inside of the breaker: outside it waits and knocks again at a door known to be closed.",
    arms=(expect_violated("retry outside", guards.retry_outside), expect_held("retry inside", guards.retry_inside)),
    script=ten_calls,
    check=refused_at_once,
)


async def wrong_password(run: Run) -> None:
    """A login with a wrong password; then with the right one. Three wrong tries lock the account."""
    _, w1 = await both(run)
    await w1.ask(path="/login?password=wrong")
    run.record("server", "password", "corrected")
    await w1.ask(path="/login?password=right")


refused = guarding(
    name="retry-of-401",
    claim="A refused password stays refused: trying it again only locks the account.",
    arms=(expect_violated("retry on Exception", guards.RetryEverything), expect_held("retry, by its tables", retry)),
    script=wrong_password,
    check=answered,
)


nested = guarding(
    name="retry-layers",
    claim="Layers of retry multiply: three of three attempts send 27 requests for one call, when it hurts the most.",
    arms=(
        expect_violated("three layers", guards.layers),
        expect_held("one layer", partial(guards.layers, count=1)),
        expect_held("three layers, one budget", partial(guards.layers, shared=True)),
    ),
    script=ten_calls,
    check=at_most_sent(3, per_call=True, name="arrive"),
)


async def reply_lost(run: Run) -> None:
    """A charge is carried out, and its reply is cut on the way."""
    service = await dependency(run)
    port = run.urls["dependency"]
    link = await run.cleanup.enter_async_context(TcpProxy("127.0.0.1", port))
    (w1,) = await run.start(1, dependency=[link.port])
    link.cut_reply()
    run.record("server", "the reply", "is cut")
    await w1.ask(path="/charge")
    await service.ask(answers=WORKS)


lost = guarding(
    name="lost-reply",
    claim="A lost reply is not a lost request: who retries a charge without a key charges twice.",
    arms=(
        expect_violated("retry on Exception", guards.RetryEverything),
        expect_violated("retry, nothing said", retry),
        expect_held("retry, idempotent=False", partial(retry, idempotent=False)),
        expect_held("retry, one key per intent", guards.one_key_per_intent),
    ),
    script=reply_lost,
    check=exactly_once,
)


async def one_slow_tenant(run: Run) -> None:
    """20 calls for what is slow; then one for what is fast, which has an answer or is still waiting."""
    service, w1 = await both(run)
    await service.ask(answers=[HANGS], path="/slow")
    w1.order(20, path="/slow", task="slow", together=True)
    await each(run, 8, service.called("arrive"))
    run.record("server", "the neighbour", "took its slots")
    w1.order(path="/fast", task="fast")
    ended = [w1.did("call", "w1.fast"), w1.failed("call", "w1.fast"), w1.waiting("call", "w1.fast")]
    if await run.until(*ended) == w1.waiting("call", "w1.fast"):
        w1.kill()
    await service.ask(answers=WORKS, path="/slow")


noisy = guarding(
    name="noisy-neighbour",
    claim="One slow tenant takes every slot of a shared pool; with a bulkhead each, the neighbours do not notice.",
    arms=(
        expect_violated("shared pool of ten", guards.shared_pool),
        expect_held("bulkheads of eight and two", guards.bulkheads),
    ),
    script=one_slow_tenant,
    check=partial(answered, process="w1.fast"),
    patience=1.0,
)

EXPERIMENTS = (down, window, stampede, late, cancelled, passing, order, refused, nested, lost, noisy)
