"""What circuit breaker, retry and bulkhead must withstand, and common versions of them that do not.

The dependency is a real HTTP service in a process of its own. The lab gives a candidate those of call, clock, sleep,
failure_threshold (5), recovery_timeout (30 s), max_attempts (3) and base_delay that its parameters name. The candidate
returns the guarded call, or is a decorator, or has a method call(fn, ...). The clock is virtual and waits take no time,
so no verdict depends on the machine's speed.
"""

from __future__ import annotations

import signal
from functools import partial

from distsys.lab.check.calls import answered, at_most_sent, refused_at_once
from distsys.lab.check.combine import all_of
from distsys.lab.check.effects import exactly_once
from distsys.lab.experiments.resilience import candidates as guards
from distsys.lab.experiments.resilience.service import HANGS, calls, dependency
from distsys.lab.run.experiment import Actor, Experiments, Run, Signal, expect_held, expect_violated
from distsys.lab.testbed.proxy import TcpProxy
from distsys.resilience.circuit_breaker import circuit_breaker
from distsys.resilience.retry import retry

BREAKER = {"failure_threshold": 5, "recovery_timeout": 30.0}
RETRY = {"max_attempts": 3, "base_delay": 0.01}  # the delay is real for a candidate that does not use the lab's sleep
FAILS, WORKS = [503], [200]
LATER = 100.0  # past the recovery time and all that is added to it


async def no_preparation(run: Run) -> None:
    """Prepare nothing: the script of each run starts a service of its own, on a port of its own."""


EXPERIMENTS = experiment = Experiments(workload=calls, prepare=no_preparation, params=BREAKER | RETRY)


async def service_and_caller(run: Run, *answers: int | str) -> tuple[Actor, Actor]:
    """Start the service, which gives these answers in turn, over and over, and one process of callers."""
    service = await dependency(run)
    (w1,) = await run.start(1)
    if answers:
        await service.ask(answers=answers)
    return service, w1


async def wait_for(run: Run, times: int, *signals: Signal) -> None:
    """Wait until `times` of these signals have come."""
    for _ in range(times):
        await run.until(*signals)


async def opened(run: Run) -> tuple[Actor, Actor]:
    """Start the service and the callers, and open the breaker by five failures."""
    service, w1 = await service_and_caller(run, *FAILS)
    await w1.ask(5)
    await wait_for(run, 5, service.called("arrive"))
    await wait_for(run, 5, w1.broke("call"))
    return service, w1


# ---- circuit breaker


@experiment(
    "dependency-down",
    "When a dependency is down, a few callers find out and the others are refused at once, until it is back.",
    *(
        arm
        for fault in ("stopped", "killed", "slow")
        for arm in (
            expect_violated(f"no breaker, dependency {fault}", guards.nothing, point=fault),
            expect_held(f"circuit_breaker, dependency {fault}", circuit_breaker, point=fault),
        )
    ),
    check=all_of(at_most_sent(5), answered),
)
async def down_and_back(run: Run) -> None:
    """Make 15 calls while the service is stopped, killed or slow; it comes back; then make 5 more."""
    fault = run.point() or "killed"
    service, w1 = await service_and_caller(run)
    await w1.ask()
    if fault == "stopped":
        service.signal(signal.SIGSTOP)
        await service.process.stopped()
    elif fault == "killed":
        service.kill()
        await run.until(service.ended)
    else:
        await service.ask(answers=[HANGS])
    run.record(*("server", "dependency", "is slow") if fault == "slow" else (fault, "dependency"))
    for _ in range(3):
        await w1.ask(5, together=True, timeout=0.2)
    if fault == "stopped":
        service.resume()
    elif fault == "killed":
        await dependency(run)
        run.record("restarted", "dependency")
    else:
        await service.ask(answers=WORKS)
        run.record("healed", "dependency")
    await w1.ask(5, at=LATER)


@experiment(
    "counter-or-window",
    "A counter of failures in a row never opens at 30 % failures: each success sets it back. A window does.",
    expect_violated("counter of failures in a row", guards.Textbook),
    expect_violated("circuit_breaker, window=None", partial(circuit_breaker, window=None)),
    expect_held("circuit_breaker, 3 of the last 10", circuit_breaker),
    expect_held("circuit_breaker, 25 % of the last 10", partial(circuit_breaker, failure_rate=0.25)),
    params=BREAKER | RETRY | {"failure_threshold": 3}, check=at_most_sent(20),
)  # fmt: skip
async def three_of_ten(run: Run) -> None:
    """Make 40 calls. The 1st, 4th and 7th of each ten fail: never two in a row. Three failures open the breaker."""
    _, w1 = await service_and_caller(run, *(FAILS + WORKS * 2) * 3, 200)
    await w1.ask(40)


@experiment(
    "half-open-stampede",
    "Half open means one probe: of 50 callers at the end of the recovery time, one reaches the dependency.",
    expect_violated("textbook breaker", guards.Textbook),
    expect_held("circuit_breaker", circuit_breaker),
    check=at_most_sent(1, name="arrive"),
)
async def fifty_at_once(run: Run) -> None:
    """Make 50 calls when the recovery time is over, all before the first has its answer."""
    service, w1 = await opened(run)
    await service.ask(answers=[HANGS])
    run.record("server", "100 s", "later")
    w1.order(50, together=True, at=LATER)
    await wait_for(run, 50, service.called("arrive"), w1.failed("call"), w1.broke("call"))
    await service.ask(answers=WORKS)


@experiment(
    "late-success",
    "A success that began before the breaker opened says nothing about now: it must not close it.",
    expect_violated("textbook breaker", guards.Textbook),
    expect_held("circuit_breaker", circuit_breaker),
    check=at_most_sent(0, name="arrive"),
)
async def answer_from_before(run: Run) -> None:
    """Let one call wait for its answer while five others fail and open the breaker; then let it succeed."""
    service, w1 = await service_and_caller(run, HANGS, *FAILS * 9)
    w1.order(task="early")
    await run.until(service.called("arrive"))
    await w1.ask(5)
    await service.ask(answers=WORKS)
    await run.until(w1.did("call", "w1.early"))
    run.record("server", "a late", "success")
    await service.ask(answers=FAILS)
    await w1.ask(5)


@experiment(
    "cancelled-probe",
    "A cancelled probe has to give its permit back, or the breaker never closes again.",
    expect_violated("probes counted, not given back", guards.CountedProbes),
    expect_held("circuit_breaker", circuit_breaker),
    check=answered,
)
async def probe_cancelled(run: Run) -> None:
    """Cancel the probe while it waits; the dependency is healthy again."""
    service, w1 = await opened(run)
    await service.ask(answers=[HANGS])
    w1.order(at=LATER, task="probe")
    await run.until(service.called("arrive"))
    w1.cancel("probe")
    await run.until(w1.broke("call", "w1.probe"))
    await service.ask(answers=WORKS)
    run.record("healed", "dependency")
    await w1.ask(5, at=2 * LATER)


# ---- retry


@experiment(
    "passing-failure",
    "A transient failure is worth another attempt.",
    expect_violated("no retry", guards.nothing),
    expect_held("retry", retry),
    check=answered,
)
async def passing_failure(run: Run) -> None:
    """Make one call. Its first two requests fail, all others succeed."""
    _, w1 = await service_and_caller(run, *FAILS * 2, *WORKS * 9)
    await w1.ask()


@experiment(
    "retry-outside-breaker",
    "Retry belongs inside of the breaker: outside, it waits and then retries refusals.",
    expect_violated("retry outside", guards.retry_outside),
    expect_held("retry inside", guards.retry_inside),
    check=refused_at_once,
)
async def ten_calls(run: Run) -> None:
    """Make ten calls in turn while every request fails."""
    _, w1 = await service_and_caller(run, *FAILS)
    run.record("server", "dependency", "fails")
    await w1.ask(10)


@experiment(
    "retry-of-401",
    "A refused password stays refused: another attempt only locks the account.",
    expect_violated("retry on Exception", guards.RetryEverything),
    expect_held("retry, by its tables", retry),
    check=answered,
)
async def wrong_password(run: Run) -> None:
    """Log in with a wrong password, then with the right one. Three wrong attempts lock the account."""
    _, w1 = await service_and_caller(run)
    await w1.ask(path="/login?password=wrong")
    run.record("server", "password", "corrected")
    await w1.ask(path="/login?password=right")


experiment(
    "retry-layers",
    "Layers of retry multiply: three of three attempts send 27 requests for one call, when it hurts the most.",
    expect_violated("three layers", guards.layers),
    expect_held("one layer", partial(guards.layers, count=1)),
    expect_held("three layers, one budget", partial(guards.layers, shared=True)),
    check=at_most_sent(3, per_call=True, name="arrive"),
)(ten_calls)


@experiment(
    "lost-reply",
    "A lost reply is not a lost request: a retry of a charge without a key charges twice.",
    expect_violated("retry on Exception", guards.RetryEverything),
    expect_violated("retry, nothing said", retry),
    expect_held("retry, idempotent=False", partial(retry, idempotent=False)),
    expect_held("retry, one key per intent", guards.one_key_per_intent),
    check=exactly_once,
)
async def reply_lost(run: Run) -> None:
    """Let a charge take effect, and cut the connection before its reply arrives."""
    service = await dependency(run)
    port = run.urls["dependency"]
    link = await run.cleanup.enter_async_context(TcpProxy("127.0.0.1", port))
    (w1,) = await run.start(1, dependency=[link.port])
    link.cut_reply()
    run.record("server", "the reply", "is cut")
    await w1.ask(path="/charge")
    await service.ask(answers=WORKS)


# ---- bulkhead


@experiment(
    "noisy-neighbour",
    "One slow tenant takes every slot of a shared pool; with a bulkhead each, the neighbours do not notice.",
    expect_violated("shared pool of ten", guards.shared_pool),
    expect_held("bulkheads of eight and two", guards.bulkheads),
    check=partial(answered, process="w1.fast"), patience=1.0,
)  # fmt: skip
async def one_slow_tenant(run: Run) -> None:
    """Make 20 calls of the slow tenant, then one of the fast tenant, which is answered or still waits."""
    service, w1 = await service_and_caller(run)
    await service.ask(answers=[HANGS], path="/slow")
    w1.order(20, path="/slow", task="slow", together=True)
    await wait_for(run, 8, service.called("arrive"))
    run.record("server", "the neighbour", "took its slots")
    w1.order(path="/fast", task="fast")
    ended = [w1.did("call", "w1.fast"), w1.failed("call", "w1.fast"), w1.waiting("call", "w1.fast")]
    if await run.until(*ended) == w1.waiting("call", "w1.fast"):
        w1.kill()
    await service.ask(answers=WORKS, path="/slow")
