"""Guarded work of the lock experiments: read a balance, think, write it back with an amount added.

It is the smallest work that a broken lock damages visibly: when two workers are inside at once, one increment is lost.
Each worker adds an amount of its own (w1 adds 1, w2 adds 10, ...), so the final balance tells whose increment was lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from distsys.errors import LockLost, Rejected
from distsys.lab.run.guard import Guard
from distsys.lab.run.worker import Worker, task_name
from distsys.locks.fencing import fenced_get, fenced_set, fenced_update


@dataclass
class _Fenced:
    """The balance of `name` in a store. With a `fence`, writes of a token older than the newest seen are refused."""

    client: Any
    name: str
    fence: str

    def token_for_fence(self, token: int | None) -> int | None:
        """Return the token that has to pass the fence; None without a fence, or with one that is optional."""
        if not self.fence or (token is None and self.fence == IF_ANY):
            return None
        if token is None:
            raise TypeError("this lock hands out no fencing token, and the account asks for one")
        return token


class RedisAccount(_Fenced):
    """Balance in a Redis key."""

    async def read(self, token: int | None) -> int:
        """Return the balance; a fence on reads gets the token."""
        key = f"{{{self.name}}}:balance"
        if self.fence == READS and (passed := self.token_for_fence(token)) is not None:
            return int(await fenced_get(self.client, key, token=passed) or 0)
        return int(await self.client.get(key) or 0)

    async def write(self, balance: int, token: int | None) -> None:
        """Set the balance. Raises StaleToken if the fence refuses the token."""
        key = f"{{{self.name}}}:balance"
        if (passed := self.token_for_fence(token)) is None:
            await self.client.set(key, balance)
        else:
            await fenced_set(self.client, key, balance, token=passed)


class PostgresAccount(_Fenced):
    """Balance in a table of the lab's own: `accounts(name, balance, fence_token)`."""

    async def read(self, token: int | None) -> int:
        """Return the balance; the token is not needed."""
        cursor = await self.client.execute("SELECT balance FROM accounts WHERE name = %s", (self.name,))
        return int((await cursor.fetchone())[0])

    async def write(self, balance: int, token: int | None) -> None:
        """Set the balance. Raises StaleToken if the fence refuses the token."""
        if (passed := self.token_for_fence(token)) is None:
            await self.client.execute("UPDATE accounts SET balance = %s WHERE name = %s", (balance, self.name))
        else:
            where, values = {"name": self.name}, {"balance": balance}
            await fenced_update(self.client, "accounts", values, where=where, token=passed)


Account = RedisAccount | PostgresAccount
WRITES = "writes"
READS = "writes and reads"  # after a holder's read, an older token can't write
IF_ANY = "writes, if the lock has tokens"  # used by the ladder, for any lock of the reader
# Class, client and fence of each account, by the name that an experiment gives it.
ACCOUNTS: dict[str, tuple[type[RedisAccount | PostgresAccount], str, str]] = {
    "redis": (RedisAccount, "bank", ""),
    "redis, fenced": (RedisAccount, "bank", WRITES),
    "redis, reads fenced too": (RedisAccount, "bank", READS),
    "redis, fenced where it can be": (RedisAccount, "bank", IF_ANY),
    "postgres": (PostgresAccount, "conn", ""),
    "postgres, fenced": (PostgresAccount, "conn", WRITES),
}


async def open_account(account: str, worker: Worker) -> Account:
    """Return the account of this run, with a client of the worker's."""
    kind, client, fence = ACCOUNTS[account]
    return kind(await worker.client(client), worker.resource, fence)


async def increments(worker: Worker, candidate: Any, *, rounds: int = 1, account: str = "redis") -> None:
    """Increment the balance `rounds` times, each time under a lock built anew."""
    ledger = await open_account(account, worker)
    base = 10 ** len(str(rounds))  # no sum of one worker's amounts reaches the next one's
    for _ in range(rounds):
        await increment(worker, await worker.build(candidate), ledger, base ** (int(worker.name[1:]) - 1))


async def increments_by_tasks(worker: Worker, candidate: Any, *, tasks: str, account: str = "redis") -> None:
    """Share one lock object (or pool) between several tasks of one process, each started at its own checkpoint."""
    ledger = await open_account(account, worker)
    lock = await worker.build(candidate)

    async def increment_once(name: str) -> None:
        task_name.set(f"{worker.name}.{name}")
        await worker.checkpoint(f"start-{name}")
        await increment(worker, lock, ledger, 10 ** (2 * int(worker.name[1:]) - 2 + tasks.index(name)), f"{name}-")

    for name in tasks:
        worker.tasks[name] = asyncio.create_task(increment_once(name))
    await asyncio.gather(*worker.tasks.values(), return_exceptions=True)


async def increment(worker: Worker, lock: Any, ledger: Account, amount: int, prefix: str = "") -> None:
    """Run one critical section, with the points "acquiring", "before-write" and "before-release" for faults."""
    guard, failure = Guard(lock), None
    await worker.checkpoint(f"{prefix}acquiring")
    try:
        async with worker.op("acquire", {"ttl": worker.ttl} if worker.leased else None) as call:
            lease = await guard.enter()
            call.token = token = token_of(lease, lock)
    except Rejected:
        return  # on the record as failed
    try:
        async with worker.op("read") as call:
            call.value = await ledger.read(token)
        balance = call.value + amount
        await worker.checkpoint(f"{prefix}before-write")
        async with worker.op("write", balance, token=token):
            await ledger.write(balance, token)
        await worker.checkpoint(f"{prefix}before-release")
    except BaseException as error:  # noqa: BLE001  the lock gets it, as in `async with`
        failure = error
    try:
        async with worker.op("release"):
            await guard.exit(failure)
    except LockLost:
        return  # on the record: the holder was told
    if failure is not None and not isinstance(failure, Rejected):
        raise failure


def token_of(lease: Any, lock: Any) -> int | None:
    """Return the fencing token, wherever it is: in the lease, in the lock, or as what acquire() returned."""
    places = [getattr(source, "token", getattr(source, "fencing_token", None)) for source in (lease, lock)]
    return next((token for token in (*places, lease) if isinstance(token, int) and not isinstance(token, bool)), None)
