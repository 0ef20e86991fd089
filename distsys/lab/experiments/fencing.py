"""What no lock can prevent, and a fence can: the write of a holder that does not know it is one no longer."""

from __future__ import annotations

from functools import partial

from distsys.lab.checks import no_lost_update
from distsys.lab.experiment import Arm, Experiment
from distsys.lab.experiments.lock_scripts import (
    blocked_loop,
    either_balance,
    on_both,
    on_redis,
    overtaken_reader,
    paused_holder,
)
from distsys.lab.workloads import increments
from distsys.locks.redis_lock import RedisLock

FENCED = {"account": "redis, fenced"}
# on_lost="cancel" ends the body too late as well, on the answer to its write; "flag" waits for it, and so shows it.
PERSISTENT = partial(RedisLock, on_lost="flag")


paused = Experiment(
    name="paused-holder",
    claim="A process that stands still past its lease writes when it wakes up. Only the resource can refuse it.",
    arms=(
        Arm(name="RedisLock, no fence", candidate=PERSISTENT, expected="VIOLATED"),
        Arm(name="RedisLock, fence in Redis", candidate=PERSISTENT, expected="HELD", params=FENCED),
        Arm(
            name="RedisLock, fence in PostgreSQL",
            candidate=PERSISTENT,
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
        Arm(name="RedisLock, no fence", candidate=PERSISTENT, expected="VIOLATED"),
        Arm(name="RedisLock, fence in Redis", candidate=PERSISTENT, expected="HELD", params=FENCED),
    ),
    workload=increments,
    script=blocked_loop,
    check=no_lost_update,
    prepare=on_redis,
    final=either_balance,
    patience_ttls=4,
)

overtaken = Experiment(
    name="overtaken-reader",
    claim="A fence refuses what is older than it has seen: a successor must show its token when it reads, too.",
    arms=(
        Arm(name="fence on writes", candidate=PERSISTENT, expected="VIOLATED", params=FENCED),
        Arm(
            name="fence on reads and writes",
            candidate=PERSISTENT,
            expected="HELD",
            params={"account": "redis, reads fenced too"},
        ),
    ),
    workload=increments,
    script=overtaken_reader,
    check=no_lost_update,
    prepare=on_redis,
    final=either_balance,
    patience_ttls=4,
)

EXPERIMENTS = (paused, blocked, overtaken)
