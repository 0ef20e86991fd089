"""What no lock can prevent, and a fence can: the write of a holder that does not know it is one no longer."""

from __future__ import annotations

from functools import partial

from distsys.lab.experiments.arms import breaks, holds
from distsys.lab.experiments.lock_scripts import FENCED, locking, on_both, overlap
from distsys.locks.redis_lock import RedisLock

fencing = partial(locking, patience_ttls=4)
# on_lost="cancel" ends the body too late as well, on the answer to its write; "flag" waits for it, and so shows it.
PERSISTENT = partial(RedisLock, on_lost="flag")


paused = fencing(
    name="paused-holder",
    claim="A process that stands still past its lease writes when it wakes up. Only the resource can refuse it.",
    arms=(
        breaks("RedisLock, no fence", PERSISTENT),
        holds("RedisLock, fence in Redis", PERSISTENT, params=FENCED),
        holds("RedisLock, fence in PostgreSQL", PERSISTENT, params={"account": "postgres, fenced"}, prepare=on_both),
    ),
    script=partial(overlap, how="stop"),
)

blocked = fencing(
    name="blocked-loop",
    claim="A blocked event loop is a paused process: no timer can renew the lease or cancel the body in time.",
    arms=(
        breaks("RedisLock, no fence", PERSISTENT),
        holds("RedisLock, fence in Redis", PERSISTENT, params=FENCED),
    ),
    script=partial(overlap, how="block"),
)

overtaken = fencing(
    name="overtaken-reader",
    claim="A fence refuses what is older than it has seen: a successor must show its token when it reads, too.",
    arms=(
        breaks("fence on writes", PERSISTENT, params=FENCED),
        holds("fence on reads and writes", PERSISTENT, params={"account": "redis, reads fenced too"}),
    ),
    script=partial(overlap, how="stop", hold="before-write"),
)

EXPERIMENTS = (paused, blocked, overtaken)
