"""What a rate limit must withstand, and the usual limiters that do not.

The lab gives a candidate what its parameters name (redis, url, name, limit, window, clock); it answers allow(key),
try_acquire(key) or is_allowed(key). With a virtual `clock` a run takes no time, and no verdict depends on it.
"""

from __future__ import annotations

from functools import partial

from distsys.lab.check.combine import all_of
from distsys.lab.check.limits import Allowance, at_most, no_needless_refusal
from distsys.lab.check.locks import progress
from distsys.lab.experiments.rate_limiting import candidates as limiters
from distsys.lab.experiments.rate_limiting.workload import requests
from distsys.lab.experiments.servers import on_redis, own_redis
from distsys.lab.run.experiment import Experiments, Run, Script, expect_held, expect_violated
from distsys.lab.testbed.nginx import nginx
from distsys.rate_limiting.fallback import OnFailure
from distsys.rate_limiting.sliding_window import SlidingWindowLimiter
from distsys.rate_limiting.token_bucket import TokenBucketLimiter, TokenLease

SLOW = 0.01  # tokens a second: no token comes back while a run lasts
SLOWLY = partial(TokenBucketLimiter, capacity=10, refill_rate=SLOW)
FAST = partial(TokenBucketLimiter, capacity=10, refill_rate=10)
TEN = Allowance(10, refill_rate=SLOW)
TEN_A_SECOND = Allowance(10, window_seconds=1.0)
TEN_A_MINUTE = partial(TokenBucketLimiter, capacity=10, refill_rate=10 / 60)
CLIENT = {"clock": "client"}

RULES = (expect_held("TokenBucketLimiter", SLOWLY), expect_held("SlidingWindowLimiter", SlidingWindowLimiter))
EXPERIMENTS = experiment = Experiments(workload=requests, prepare=on_redis)
experiment_in_virtual_time = partial(experiment, params={"clock": "virtual", "window": 1.0})


def asks(*orders: tuple[int, int, float]) -> Script:
    """Return a script that gives these orders in turn: (which worker, how many times, at which second)."""

    async def script(run: Run) -> None:
        actors = await run.start(max(which for which, _, _ in orders))
        for which, times, at in orders:
            await actors[which - 1].ask(times, at=at)

    return script


async def one_after_the_other(run: Run) -> None:
    """Let every worker in turn ask for the whole limit."""
    for actor in await run.start(run.workers):
        await actor.ask(10)


experiment(
    "counter-per-process",
    "A counter in memory limits one process: four processes let four times as much pass.",
    expect_violated("counter in memory", limiters.CounterInMemory),
    expect_violated("SlowAPI, its default storage", partial(limiters.SlowAPI, url="memory://")),
    expect_held("SlowAPI, Redis as storage", limiters.SlowAPI),
    *RULES,
    check=at_most(TEN),
)(one_after_the_other)


@experiment(
    "count-by-get-then-set",
    "Reading the count and writing it must be one step: a late write takes back what others have used.",
    expect_violated("GET, then SET", limiters.GetThenSet),
    *RULES,
    check=at_most(TEN),
)
async def between_get_and_set(run: Run) -> None:
    """Let w1 read the count, w2 use up the limit, w1 write what it read plus one, and w2 ask again."""
    w1, w2 = await run.start(2)
    w1.send(do="arm", point="between-get-and-set", action="hold")
    w1.order()
    await run.until(w1.at("between-get-and-set"), w1.did("admit"))
    await w2.ask(10)
    w1.release("between-get-and-set")
    await w1.served()
    await w2.ask(10)


experiment_in_virtual_time(
    "refusals-that-count",
    "A refused request must not count, or a client that keeps asking is never let in again.",
    expect_violated("pipeline: ZADD, then ZCARD", limiters.RefusalsCount),
    expect_held("TokenBucketLimiter", FAST),
    expect_held("SlidingWindowLimiter", SlidingWindowLimiter),
    check=no_needless_refusal(TEN_A_SECOND),  # what a bucket of the same size and rate refuses, the window does, too
    # w1 uses up the limit and goes on asking, five times as fast as it may, for four windows
)(asks((1, 10, 0.0), *((1, 10, n / 5 + 0.01) for n in range(1, 21))))


experiment_in_virtual_time(
    "fixed-window-boundary",
    "Ten a second means in any second. Around the end of a fixed window twenty pass. A bucket admits "
    "its capacity and its refill, so both together have to stay below ten.",
    expect_violated("fixed window", limiters.FixedWindow),
    expect_violated("TokenBucketLimiter, 10 and 10 a second", FAST),
    expect_held("TokenBucketLimiter, 5 and 5 a second", partial(TokenBucketLimiter, capacity=5, refill_rate=5)),
    expect_held("SlidingWindowLimiter", SlidingWindowLimiter),
    check=at_most(TEN_A_SECOND),
)(asks((1, 10, 0.9), (2, 10, 1.05)))  # at the end of one second, and at the beginning of the next


experiment_in_virtual_time(
    "burst-then-steady",
    "After a burst a token bucket admits again as soon as a token is back; a window waits until the burst left.",
    expect_violated("fixed window", limiters.FixedWindow),
    expect_violated("SlidingWindowLimiter", SlidingWindowLimiter),  # it makes another promise
    expect_held("TokenBucketLimiter", FAST),
    check=no_needless_refusal(Allowance(10, refill_rate=10)),
    # w1 uses up the limit at once, then asks ten times a second, which is its rate
)(asks((1, 11, 0.0), *((1, 1, n / 10 + 0.01) for n in range(1, 15))))

experiment(
    "client-clocks",
    "Four clocks, each a minute ahead of the one before: a client that trusts its own empties the window.",
    expect_violated("log by the client's clock", limiters.Log, params=CLIENT),
    expect_violated("TokenBucketLimiter, the client's clock", TEN_A_MINUTE, params=CLIENT),
    expect_held("TokenBucketLimiter, the server's clock", TEN_A_MINUTE),
    expect_held("SlidingWindowLimiter, the server's clock", SlidingWindowLimiter),
    check=at_most(Allowance(10, refill_rate=10 / 60)),
)(one_after_the_other)


experiment_in_virtual_time(
    "same-millisecond",
    "A log needs a member of its own for each request: members of one millisecond overwrite each other.",
    expect_violated("log, member by millisecond", limiters.LogByMillisecond),
    expect_held("log, member by uuid4", limiters.Log),
    expect_held("SlidingWindowLimiter", SlidingWindowLimiter),
    check=at_most(TEN_A_SECOND),
)(asks((1, 10, 0.5), (2, 10, 0.5)))  # within one millisecond


BOTH = [Allowance(q.capacity, refill_rate=q.refill_rate, per=q.per) for q in (limiters.USER, limiters.ORGANISATION)]


@experiment(
    "two-limits",
    "Two quotas must be decided at once, or a request that one refuses uses up the other, for everybody.",
    expect_violated("one after the other", limiters.OneAfterTheOther),
    expect_held("TieredLimiter", limiters.AllAtOnce),
    check=all_of(at_most(*BOTH), no_needless_refusal(*BOTH)),
)
async def greedy_user(run: Run) -> None:
    """Let w1's user ask for twice its quota, then w2 for another user of the same organisation."""
    for actor, user in zip(await run.start(2), ("ann", "bob"), strict=True):
        await actor.ask(10, user=user, organisation="acme")


async def on_its_own_redis(run: Run) -> None:
    """Give the run a Redis of its own, which it may stop."""
    run.nodes = [await own_redis(run, "redis")]
    run.urls["redis"] = run.nodes[0].url


@experiment(
    "redis-does-not-answer",
    "Without Redis a limiter can admit everybody, or nobody, or limit each process to its share.",
    *(
        expect(f"{policy}, Redis {fault}", limiter, point=fault)
        for fault in ("hung", "killed")
        for policy, expect, limiter in (
            ("open", expect_violated, partial(SLOWLY, on_failure=OnFailure(policy="open"))),
            ("closed", expect_violated, partial(SLOWLY, on_failure=OnFailure(policy="closed"))),
            ("local", expect_held, partial(SLOWLY, on_failure=OnFailure(policy="local", fraction=1 / 2))),
        )
    ),
    check=all_of(at_most(TEN), partial(progress, name="admit", done="admitted")), prepare=on_its_own_redis,
)  # fmt: skip
async def without_redis(run: Run) -> None:
    """Stop Redis (SIGSTOP) or kill it, then let both workers ask."""
    actors = await run.start(2)
    await (run.nodes[0].kill() if run.point() == "killed" else run.nodes[0].pause())
    run.record("server", "redis", run.point())
    for actor in actors:
        await actor.ask(6)


# Both workers ask once, and get a slice; then both ask for much.
SLICES = ((1, 1, 0.0), (2, 1, 0.0))
LEASE = "TokenBucketLimiter, TokenLease(tokens=4, seconds=0.5)"
LEASED = partial(FAST, lease=TokenLease(tokens=4, seconds=0.5))

experiment_in_virtual_time(
    "price-of-a-lease",
    "Tokens taken before a span of time can be used in it: leases admit more than the bucket alone would.",
    expect_violated(LEASE, LEASED),
    expect_held("TokenBucketLimiter", FAST),
    check=at_most(Allowance(10, refill_rate=10)),
)(asks(*SLICES, (1, 15, 0.45), (2, 15, 0.45)))  # before the lease ends

experiment_in_virtual_time(
    "bound-of-a-lease",
    "A lease that ends bounds what it costs: at most min(processes * tokens, refill_rate * seconds) too many.",
    expect_violated("slices of 5, kept for ever", limiters.SlicesForEver),
    expect_held(LEASE, LEASED),
    check=at_most(Allowance(10 + min(2 * 4, 10 * 0.5), refill_rate=10)),
)(asks(*SLICES, (1, 15, 1.5), (2, 15, 1.5)))  # when the bucket is full again


async def behind_nginx(run: Run) -> None:
    """Start two nginx, each with ten requests at once and one a minute."""
    await on_redis(run)
    run.nodes = [await nginx(run.testbed.servers, "rate=1r/m burst=9", f"nginx{n}") for n in (1, 2)]


@experiment(
    "nginx-limit-req",
    "One nginx in front limits without Redis; two of them have a limit each.",
    expect_violated("limit_req, two nginx", limiters.LimitReq, point="two"),
    expect_held("limit_req, one nginx", limiters.LimitReq, point="one"),
    expect_held("TokenBucketLimiter", partial(TokenBucketLimiter, capacity=10, refill_rate=1 / 60)),
    check=at_most(Allowance(10, refill_rate=1 / 60)), prepare=behind_nginx,
)  # fmt: skip
async def over_nginx(run: Run) -> None:
    """Let each worker ask through one nginx: the same, or one each."""
    one, two = (node.url for node in run.nodes)
    for actor in await run.start(2, nginx=[one, two if run.point() == "two" else one]):
        await actor.ask(12)
