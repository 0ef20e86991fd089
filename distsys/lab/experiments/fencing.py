"""What no lock can prevent, and a fence can: the write of a holder that does not know it is one no longer."""

from __future__ import annotations

from distsys.lab.checks import no_lost_update
from distsys.lab.experiment import Arm, Experiment
from distsys.lab.experiments.lock_scripts import (
    blocked_loop,
    either_balance,
    on_both,
    on_redis,
    paused_holder,
    redis_balance,
)
from distsys.lab.workloads import increments
from distsys.locks.redis_lock import RedisLock

FENCED = {"account": "redis, fenced"}


paused = Experiment(
    name="paused-holder",
    claim="A process that stands still past its lease writes when it wakes up. Only the resource can refuse it.",
    arms=(
        Arm(name="RedisLock, no fence", candidate=RedisLock, expected="VIOLATED"),
        Arm(name="RedisLock, fence in Redis", candidate=RedisLock, expected="HELD", params=FENCED),
        Arm(
            name="RedisLock, fence in PostgreSQL",
            candidate=RedisLock,
            expected="HELD",
            params={"account": "postgres, fenced"},
            prepare=on_both,
        ),
    ),
    workload=increments,
    script=paused_holder,
    check=no_lost_update,
    prepare=on_redis,
    final=either_balance,
    patience_ttls=4,
)

blocked = Experiment(
    name="blocked-loop",
    claim="A blocked event loop is a paused process: no timer can renew the lease or cancel the body in time.",
    arms=(
        Arm(name="RedisLock, no fence", candidate=RedisLock, expected="VIOLATED"),
        Arm(name="RedisLock, fence in Redis", candidate=RedisLock, expected="HELD", params=FENCED),
    ),
    workload=increments,
    script=blocked_loop,
    check=no_lost_update,
    prepare=on_redis,
    final=redis_balance,
    patience_ttls=4,
)

EXPERIMENTS = (paused, blocked)
