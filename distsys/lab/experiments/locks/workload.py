"""What workers do: the guarded work of the lock experiments, and the requests that a limiter has to decide.

Guarded is this: read a balance, think, write it back with something added. It is the smallest work that a broken lock
damages visibly: when two workers are inside at once, one increment is lost.
Each worker adds an amount of its own (w1 adds 1, w2 adds 10, ...), so that the balance tells whose.
"""

from __future__ import annotations

import asyncio
from typing import Any

from distsys.errors import LockLost, Rejected
from distsys.lab.run.guard import Guard
from distsys.lab.run.worker import Worker, task_name
from distsys.locks.fencing import fenced_get, fenced_set, fenced_update


class Account:
    """A balance. Behind a fence a token older than the newest seen is refused; without one nobody looks at tokens."""

    def __init__(self, client: Any, name: str, fence: str) -> None:
        self.client, self.name, self.fence = client, name, fence

    def needed(self, token: int | None) -> int | None:
        """The token that has to pass the fence; None where there is no fence, or only one for locks with tokens."""
        if not self.fence or (token is None and self.fence == IF_ANY):
            return None
        if token is None:
            raise TypeError("this lock hands out no fencing token, and the account asks for one")
        return token


class RedisAccount(Account):
    async def read(self, token: int | None) -> int:
        key = f"{{{self.name}}}:balance"
        if self.fence == READS and (passed := self.needed(token)) is not None:
            return int(await fenced_get(self.client, key, token=passed) or 0)
        return int(await self.client.get(key) or 0)

    async def write(self, balance: int, token: int | None) -> None:
        key = f"{{{self.name}}}:balance"
        if (passed := self.needed(token)) is None:
            await self.client.set(key, balance)
        else:
            await fenced_set(self.client, key, balance, token=passed)


class PostgresAccount(Account):
    """In a table: `accounts(name, balance, fence_token)` of the lab's own schema."""

    async def read(self, token: int | None) -> int:
        cursor = await self.client.execute("SELECT balance FROM accounts WHERE name = %s", (self.name,))
        return int((await cursor.fetchone())[0])

    async def write(self, balance: int, token: int | None) -> None:
        if (passed := self.needed(token)) is None:
            await self.client.execute("UPDATE accounts SET balance = %s WHERE name = %s", (balance, self.name))
        else:
            where, values = {"name": self.name}, {"balance": balance}
            await fenced_update(self.client, "accounts", values, where=where, token=passed)


WRITES = "writes"
READS = "writes and reads"  # from a holder's read on, nobody older writes
IF_ANY = "writes, with a token if there is one"  # what the ladder asks of your lock
# By the name an experiment gives them: their class, the client they need, their fence.
ACCOUNTS: dict[str, tuple[type[RedisAccount | PostgresAccount], str, str]] = {
    "redis": (RedisAccount, "bank", ""),
    "redis, fenced": (RedisAccount, "bank", WRITES),
    "redis, reads fenced too": (RedisAccount, "bank", READS),
    "redis, fenced where it can be": (RedisAccount, "bank", IF_ANY),
    "postgres": (PostgresAccount, "conn", ""),
    "postgres, fenced": (PostgresAccount, "conn", WRITES),
}


async def opened(account: str, worker: Worker) -> RedisAccount | PostgresAccount:
    of, client, fence = ACCOUNTS[account]
    return of(await worker.client(client), worker.resource, fence)


async def increments(worker: Worker, candidate: Any, *, rounds: int = 1, account: str = "redis") -> None:
    """`rounds` times: build the lock anew, enter, read, write it with this worker's amount added, leave."""
    ledger = await opened(account, worker)
    base = 10 ** len(str(rounds))  # no sum of one worker's amounts reaches the next one's
    for _ in range(rounds):
        await increment(worker, await worker.build(candidate), ledger, base ** (int(worker.name[1:]) - 1))


async def increments_by_tasks(worker: Worker, candidate: Any, *, tasks: str, account: str = "redis") -> None:
    """One lock object (or pool) shared by several tasks of one process, each started at its own checkpoint."""
    ledger = await opened(account, worker)
    lock = await worker.build(candidate)

    async def one(name: str) -> None:
        task_name.set(f"{worker.name}.{name}")
        await worker.checkpoint(f"start-{name}")
        await increment(worker, lock, ledger, 10 ** (2 * int(worker.name[1:]) - 2 + tasks.index(name)), f"{name}-")

    for name in tasks:
        worker.tasks[name] = asyncio.create_task(one(name))
    await asyncio.gather(*worker.tasks.values(), return_exceptions=True)


async def increment(
    worker: Worker, lock: Any, ledger: RedisAccount | PostgresAccount, amount: int, prefix: str = ""
) -> None:
    """One critical section, with the points "acquiring", "before-write" and "before-release" for faults."""
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
    except BaseException as error:  # noqa: BLE001  the lock decides what becomes of it, as in `async with`
        failure = error
    try:
        async with worker.op("release"):
            await guard.exit(failure)
    except LockLost:
        return  # on the record: the holder was told
    if failure is not None and not isinstance(failure, Rejected):
        raise failure


def token_of(lease: Any, lock: Any) -> int | None:
    """The fencing token, from wherever a lock keeps one: the lease, the lock, or what acquire() returned."""
    places = [getattr(source, "token", getattr(source, "fencing_token", None)) for source in (lease, lock)]
    return next((token for token in (*places, lease) if isinstance(token, int) and not isinstance(token, bool)), None)
