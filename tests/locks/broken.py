"""Parts of the locks with a bug in them, for the tests that have to find it."""

from __future__ import annotations

from typing import Any

from redis.exceptions import NoScriptError

from distsys._support.redis import Script
from distsys.locks import lease as leases
from distsys.locks.lease import Lease, LeasedLock, held_leases
from distsys.locks.redis_lock import RedisLock
from distsys.locks.redlock import Redlock, _Votes

enter, exit_body, init = RedisLock.__aenter__, Lease.exit_body, Redlock.__init__


async def never(*_: Any, **__: Any) -> None:
    """Stand in for a call that the bug leaves out."""


async def released_at_once(lock: RedisLock) -> Lease:
    """Enter with a lease that is released already."""
    lease = await enter(lock)
    await lease.release()
    return lease


async def exit_without_error(lease: Lease, _: BaseException | None) -> bool:
    """End the body as if it had raised nothing."""
    return await exit_body(lease, None)


async def run_without_look(self: Script, redis: Any, keys: Any, *args: Any) -> Any:
    """Run a script and return what the client answers, whatever was cancelled meanwhile."""
    try:
        return await redis.execute_command("EVALSHA", self.sha, len(keys), *keys, *args)
    except NoScriptError:
        return await redis.eval(self.text, len(keys), *keys, *args)


def start_ttl_even_if_shorter(lease: Lease, asked_at: float, ttl: float) -> None:
    """Take the deadline of the last answer, though an earlier one reached further."""
    lease.ttl = ttl
    lease._deadline = leases.local_deadline(asked_at, ttl)


def add_and_keep(lock: LeasedLock, lease: Lease) -> Lease:
    """Add a lease and forget none."""
    lock._holds.append(lease)
    return lease


def init_with_quorum_1(lock: Redlock, *args: Any, **options: Any) -> None:
    """Build a lock that one vote is enough for."""
    init(lock, *args, **options)
    lock.quorum = 1


async def silence_is_a_no(lock: Redlock, *question: Any) -> bool:
    """Take a silent majority for a loss."""
    votes = lock._ask_all(*question)
    await votes.decided
    return votes.yes >= lock.quorum


def decide_when_all_have_answered(votes: _Votes) -> None:
    """Wait for every node."""
    if None not in votes.answers and not votes.decided.done():
        votes.decided.set_result(None)


def outermost_token(name: str | None = None) -> int:
    """Return the token of the outermost lease."""
    return _token_of(held_leases.get(), name)


def token_without_check(name: str | None = None) -> int:
    """Return the token of the innermost lease, lost or not."""
    return _token_of(held_leases.get()[::-1], name)


def _token_of(leases: tuple[Lease, ...], name: str | None) -> int:
    for lease in leases:
        if lease.token is not None and name in (None, lease.name):
            return lease.token
    raise LookupError("no lease with a fencing token is held here; write under a lock")
