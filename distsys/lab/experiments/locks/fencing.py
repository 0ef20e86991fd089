"""Late writes of a holder that does not know it has lost the lock: a fence can refuse them, no lock can."""

from __future__ import annotations

from functools import partial

from distsys.lab.experiments.locks.scripts import FENCED, locking, overlap
from distsys.lab.experiments.servers import on_both
from distsys.lab.run.experiment import expect_held, expect_violated
from distsys.locks.redis_lock import RedisLock

EXPERIMENTS = experiment = locking(patience_ttls=4)
# on_lost="cancel" would end the body too late as well, at the answer to its write; "flag" lets the write be recorded.
PERSISTENT = partial(RedisLock, on_lost="flag")


experiment(
    "paused-holder",
    "A process that is paused past its lease writes when it wakes up. Only the resource can refuse the write.",
    expect_violated("RedisLock, no fence", PERSISTENT),
    expect_held("RedisLock, fence in Redis", PERSISTENT, params=FENCED),
    expect_held("RedisLock, fence in PostgreSQL", PERSISTENT, params={"account": "postgres, fenced"}, prepare=on_both),
)(partial(overlap, fault="stop"))

experiment(
    "blocked-loop",
    "A blocked event loop is a paused process: no timer can renew the lease or cancel the body in time.",
    expect_violated("RedisLock, no fence", PERSISTENT),
    expect_held("RedisLock, fence in Redis", PERSISTENT, params=FENCED),
)(partial(overlap, fault="block"))

experiment(
    "overtaken-reader",
    "A fence refuses tokens older than it has seen: a successor must present its token when it reads, too.",
    expect_violated("fence on writes", PERSISTENT, params=FENCED),
    expect_held("fence on reads and writes", PERSISTENT, params={"account": "redis, reads fenced too"}),
)(partial(overlap, fault="stop", hold="before-write"))
