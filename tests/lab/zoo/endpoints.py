"""Endpoints as engineers write them: right ones, and wrong ones with one plausible mistake each."""

import asyncio
import functools
import json
import os
import uuid

import psycopg
import redis.exceptions as redis_errors
from psycopg import errors as pg_errors


class PaymentError(Exception):
    pass


class InProgress(PaymentError):
    pass


class OutcomeUnknown(PaymentError):
    pass


class KeyReused(PaymentError):
    pass


def text(value):
    return value.decode() if isinstance(value, bytes) else value


BROKEN = (redis_errors.ConnectionError, redis_errors.TimeoutError, psycopg.OperationalError, psycopg.InterfaceError)


async def persistently(call, attempts=5):
    for n in range(attempts):
        try:
            return await call()
        except BROKEN:
            if n + 1 == attempts:
                raise
            await asyncio.sleep(0.05 * 2**n)


async def create_tables(conn, ddl):
    async with conn.transaction():
        await conn.execute("SELECT pg_advisory_xact_lock(5417781)")
        await conn.execute(ddl)


# --- Redis, outside provider --------------------------------------------------------------------------------------------


class RedisTwoPhase:
    LEASE_MS = 1500
    KEEP_MS = 30 * 86_400_000
    RESERVE = """
    local row = redis.call('HMGET', KEYS[1], 'state', 'amount', 'receipt', 'token')
    if row[1] then
      if row[2] ~= ARGV[2] then return {'conflict', ''} end
      if row[1] == 'done' then return {'done', row[3] or ''} end
      if row[4] ~= ARGV[1] or row[1] ~= 'reserved' then return {row[1], ''} end
    end
    redis.call('HSET', KEYS[1], 'state', 'reserved', 'amount', ARGV[2], 'token', ARGV[1])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return {'mine', ''}"""
    BEGIN = """
    local row = redis.call('HMGET', KEYS[1], 'token', 'state')
    if row[1] ~= ARGV[1] or row[2] == 'done' then return 0 end
    redis.call('HSET', KEYS[1], 'state', 'charging')
    redis.call('PERSIST', KEYS[1])
    return 1"""
    FINISH = """
    if redis.call('HGET', KEYS[1], 'token') ~= ARGV[1] then return 0 end
    redis.call('HSET', KEYS[1], 'state', 'done', 'receipt', ARGV[2])
    redis.call('PEXPIRE', KEYS[1], ARGV[3])
    return 1"""
    RELEASE = "if redis.call('HGET', KEYS[1], 'token') == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

    def __init__(self, redis, charge):
        self.redis = redis
        self.charge = charge

    def slot(self, user, key, amount):
        return "payment:" + json.dumps([user, key])

    def owner(self):
        return uuid.uuid4().hex

    def fingerprint(self, amount):
        return str(amount)

    async def run(self, script, slot, *args):
        return await persistently(lambda: self.redis.eval(script, 1, slot, *args))

    async def pay(self, key: str, amount: int, user: str) -> str:
        slot, token = self.slot(user, key, amount), self.owner()
        state, receipt = map(text, await self.run(self.RESERVE, slot, token, self.fingerprint(amount), self.LEASE_MS))
        if state == "conflict":
            raise KeyReused(key)
        if state == "done":
            return self.replay(receipt)
        if state != "mine":
            raise InProgress(state)
        if not await self.run(self.BEGIN, slot, token):
            raise InProgress(key)
        return await self.settle(slot, token, amount)

    def replay(self, receipt):
        return receipt

    async def settle(self, slot, token, amount):
        try:
            receipt = await self.charge(amount)
        except TimeoutError as error:
            raise OutcomeUnknown("ask support") from error
        except Exception:
            await self.run(self.RELEASE, slot, token)
            raise
        await self.finish(slot, token, receipt)
        return receipt

    async def finish(self, slot, token, receipt):
        await self.run(self.FINISH, slot, token, receipt, self.KEEP_MS)


class RedisTokenMark:
    """SET NX of a mark which is never taken over; whoever reads its own token back may charge."""

    DROP = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

    def __init__(self, redis, charge):
        self.redis, self.charge = redis, charge

    async def give_up(self, name, mark):
        await persistently(lambda: self.redis.eval(self.DROP, 1, name, mark))

    async def pay(self, key, amount, user):
        name = f"idem:{len(user)}:{user}:{key}"
        mine = json.dumps({"amount": amount, "by": str(uuid.uuid4()), "receipt": None})

        async def claim():
            await self.redis.set(name, mine, nx=True)
            return text(await self.redis.get(name))

        current = await persistently(claim)
        if current is None:
            raise InProgress("was just given up, try again")
        if current != mine:
            seen = json.loads(current)
            if seen["amount"] != amount:
                raise KeyReused(key)
            if seen["receipt"] is None:
                raise InProgress("running, or its outcome is unknown")
            return seen["receipt"]
        try:
            receipt = await self.charge(amount)
        except TimeoutError:
            raise OutcomeUnknown(key) from None
        except Exception:
            await self.give_up(name, mine)
            raise
        await persistently(lambda: self.redis.set(name, json.dumps({**json.loads(mine), "receipt": receipt})))
        return receipt


class HashedIntent(RedisTwoPhase):
    def slot(self, user, key, amount):
        return f"payment:{hash((user, key)):x}"


class RequestDigestKey(RedisTwoPhase):
    def slot(self, user, key, amount):
        return "payment:" + json.dumps({"user": user, "key": key, "amount": amount}, sort_keys=True)


class KeyOnlyReplay(RedisTwoPhase):
    def fingerprint(self, amount):
        return "v1"


class WorkerOwned(RedisTwoPhase):
    def owner(self):
        return f"worker-{os.getpid()}"


class ReleaseOnFailure(RedisTwoPhase):
    async def settle(self, slot, token, amount):
        try:
            receipt = await self.charge(amount)
        except Exception:
            await self.run(self.RELEASE, slot, token)
            raise
        await self.finish(slot, token, receipt)
        return receipt


class ReplaysErrors(RedisTwoPhase):
    async def settle(self, slot, token, amount):
        try:
            receipt = await self.charge(amount)
        except TimeoutError as error:
            raise OutcomeUnknown("ask support") from error
        except Exception as error:
            await self.finish(slot, token, json.dumps({"error": str(error)}))
            raise
        await self.finish(slot, token, json.dumps({"receipt": receipt}))
        return receipt

    def replay(self, stored):
        answer = json.loads(stored)
        if "error" in answer:
            raise PaymentError(answer["error"])
        return answer["receipt"]


class FieldByField(RedisTwoPhase):
    async def finish(self, slot, token, receipt):
        await persistently(lambda: self.redis.hset(slot, "state", "done"))
        await persistently(lambda: self.redis.hset(slot, "receipt", receipt))
        await persistently(lambda: self.redis.pexpire(slot, self.KEEP_MS))


class HourLongMark(RedisTokenMark):
    pending_ttl = 3600
    answer_ttl = 7 * 86400

    async def pay(self, key, amount, user):
        name, token = "pay:" + json.dumps([user, key]), uuid.uuid4().hex
        mark = json.dumps(["pending", amount, token])
        if not await self.redis.set(name, mark, nx=True, px=self.pending_ttl):
            seen = text(await self.redis.get(name))
            if seen is None:
                raise InProgress(key)
            if seen != mark:
                state, known_amount, value = json.loads(seen)
                if known_amount != amount:
                    raise KeyReused(key)
                if state == "pending":
                    raise InProgress(key)
                return value
        try:
            receipt = await self.charge(amount)
        except TimeoutError as error:
            raise OutcomeUnknown(key) from error
        except Exception:
            await self.give_up(name, mark)
            raise
        await persistently(lambda: self.redis.set(name, json.dumps(["done", amount, receipt]), ex=self.answer_ttl))
        return receipt


def cached_payments(redis, charge):
    async def pay(key: str, amount: int, user: str) -> str:
        name = f"receipt:{json.dumps([user, key])}"
        if cached := await redis.get(name):
            known = json.loads(cached)
            if known["amount"] != amount:
                raise KeyReused(key)
            if known["receipt"] is None:
                raise OutcomeUnknown(key)
            return known["receipt"]
        try:
            receipt = await charge(amount)
        except TimeoutError:
            await redis.set(name, json.dumps({"amount": amount, "receipt": None}))
            raise
        await persistently(lambda: redis.set(name, json.dumps({"amount": amount, "receipt": receipt})))
        return receipt

    return pay


class ProcessedFlag(RedisTokenMark):
    async def pay(self, key, amount, user):
        name, token = f"processed:{json.dumps([user, key])}", uuid.uuid4().hex
        mark = json.dumps({"amount": amount, "receipt": token})
        first = await self.redis.set(name, mark, nx=True)
        record = json.loads(await self.redis.get(name) or "null")
        if record is None:
            raise InProgress(key)
        if record["amount"] != amount:
            raise KeyReused(key)
        if not first and record["receipt"] != token:
            return record["receipt"]
        try:
            receipt = await self.charge(amount)
        except TimeoutError:
            raise
        except Exception:
            await self.give_up(name, mark)
            raise
        await persistently(lambda: self.redis.set(name, json.dumps({"amount": amount, "receipt": receipt})))
        return receipt


class LockAndAnswer:
    def __init__(self, redis, charge):
        self.redis, self.charge = redis, charge

    async def _answer(self, name, amount):
        stored = await self.redis.get(name)
        if stored is None:
            return None
        known_amount, receipt = json.loads(stored)
        if known_amount != amount:
            raise KeyReused(name)
        if receipt is None:
            raise OutcomeUnknown(name)
        return receipt

    async def pay(self, key, amount, user):
        intent = json.dumps([user, key])
        name, lock = f"answer:{intent}", f"running:{intent}"
        if receipt := await self._answer(name, amount):
            return receipt
        try:
            if not await self.redis.set(lock, "1", nx=True):
                raise InProgress(key)
            if receipt := await self._answer(name, amount):
                return receipt
            try:
                receipt = await self.charge(amount)
            except TimeoutError:
                await self.redis.set(name, json.dumps([amount, None]))
                raise
            await persistently(lambda: self.redis.set(name, json.dumps([amount, receipt])))
            return receipt
        finally:
            await self.redis.delete(lock)


class LocalKeyedPayments:
    def __init__(self, charge):
        self.charge = charge
        self.answers = {}
        self.locks = {}

    async def pay(self, key, amount, user):
        async with self.locks.setdefault((user, key), asyncio.Lock()):
            if (user, key) in self.answers:
                known, receipt = self.answers[user, key]
                if known != amount:
                    raise KeyReused(key)
                if receipt is None:
                    raise OutcomeUnknown(key)
                return receipt
            try:
                receipt = await self.charge(amount)
            except (TimeoutError, asyncio.CancelledError):
                self.answers[user, key] = amount, None
                raise
            self.answers[user, key] = amount, receipt
            return receipt


# --- PostgreSQL, the charge in the transaction ----------------------------------------------------------------------------


class PgSameTransaction:
    DDL = """CREATE TABLE IF NOT EXISTS payment_keys (
        user_id text, key text, amount bigint NOT NULL, receipt text, PRIMARY KEY (user_id, key))"""

    def __init__(self, pool, charge):
        self.pool, self.charge = pool, charge
        self._made = False

    async def setup(self):
        if not self._made:
            async with self.pool.connection() as conn:
                await create_tables(conn, self.DDL)
            self._made = True

    async def pay(self, key: str, amount: int, user: str) -> str:
        await self.setup()
        async with self.pool.connection() as conn, conn.transaction():
            await conn.execute("SET LOCAL lock_timeout = '4s'")
            return await self.once(conn, key, amount, user)

    async def lookup(self, conn, key, amount, user, suffix=""):
        cursor = await conn.execute(
            "SELECT amount, receipt FROM payment_keys WHERE user_id = %s AND key = %s" + suffix, (user, key)
        )
        row = await cursor.fetchone()
        if row and row[0] != amount:
            raise KeyReused(key)
        return row

    async def once(self, conn, key, amount, user):
        await conn.execute(
            "INSERT INTO payment_keys (user_id, key, amount) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (user, key, amount),
        )
        row = await self.lookup(conn, key, amount, user, " FOR UPDATE")
        if row[1] is not None:
            return row[1]
        receipt = await self.charge(amount, conn)
        await conn.execute("UPDATE payment_keys SET receipt = %s WHERE user_id = %s AND key = %s", (receipt, user, key))
        return receipt


class PgOptimistic(PgSameTransaction):
    """Charges first; the primary key throws the loser's whole transaction away, its charge with it."""

    async def pay(self, key, amount, user):
        await self.setup()
        try:
            async with self.pool.connection() as conn, conn.transaction():
                row = await self.lookup(conn, key, amount, user)
                if row:
                    return row[1]
                receipt = await self.charge(amount, conn)
                await conn.execute("INSERT INTO payment_keys VALUES (%s, %s, %s, %s)", (user, key, amount, receipt))
            return receipt
        except pg_errors.UniqueViolation:
            async with self.pool.connection() as conn:
                row = await self.lookup(conn, key, amount, user)
            if row is None:
                raise InProgress(key) from None
            return row[1]


def pg_conn_payments(conn, charge):
    ready = False
    turn = asyncio.Lock()

    async def pay(key: str, amount: int, user: str) -> str:
        nonlocal ready
        async with turn:
            if not ready:
                await create_tables(
                    conn,
                    "CREATE TABLE IF NOT EXISTS receipts (owner text, key text, amount bigint, receipt text, "
                    "PRIMARY KEY (owner, key))",
                )
                ready = True
            async with conn.transaction():
                await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [json.dumps([user, key])])
                cursor = await conn.execute(
                    "SELECT amount, receipt FROM receipts WHERE owner = %s AND key = %s", [user, key]
                )
                if row := await cursor.fetchone():
                    if row[0] != amount:
                        raise KeyReused(key)
                    return row[1]
                receipt = await charge(amount, conn)
                await conn.execute("INSERT INTO receipts VALUES (%s, %s, %s, %s)", [user, key, amount, receipt])
            return receipt

    return pay


def idempotent(pool, table):
    made = False

    def decorate(operation):
        @functools.wraps(operation)
        async def call(key, amount, user):
            nonlocal made
            if not made:
                async with pool.connection() as conn:
                    await create_tables(
                        conn,
                        f"CREATE TABLE IF NOT EXISTS {table} (id text PRIMARY KEY, request jsonb NOT NULL, response jsonb)",
                    )
                made = True
            intent, request = json.dumps([user, key]), json.dumps({"amount": amount})
            async with pool.connection() as conn, conn.transaction():
                cursor = await conn.execute(
                    f"INSERT INTO {table} (id, request) VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET id = excluded.id "
                    f"RETURNING request = %s::jsonb, response",
                    (intent, request, request),
                )
                same, response = await cursor.fetchone()
                if not same:
                    raise KeyReused(key)
                if response is None:
                    response = await operation(conn, amount)
                    await conn.execute(
                        f"UPDATE {table} SET response = %s WHERE id = %s", (json.dumps(response), intent)
                    )
            return response

        return call

    return decorate


def decorated_payments(pool, charge):
    @idempotent(pool, "idempotent_calls")
    async def pay(conn, amount):
        return await charge(amount, conn)

    return pay


class PgForUpdate(PgSameTransaction):
    async def once(self, conn, key, amount, user):
        row = await self.lookup(conn, key, amount, user, " FOR UPDATE")
        if row:
            return row[1]
        receipt = await self.charge(amount, conn)
        await conn.execute(
            "INSERT INTO payment_keys VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING", (user, key, amount, receipt)
        )
        return receipt


class PgUpsert(PgSameTransaction):
    async def once(self, conn, key, amount, user):
        row = await self.lookup(conn, key, amount, user)
        if row:
            return row[1]
        receipt = await self.charge(amount, conn)
        await conn.execute(
            "INSERT INTO payment_keys VALUES (%s, %s, %s, %s) "
            "ON CONFLICT (user_id, key) DO UPDATE SET amount = excluded.amount, receipt = excluded.receipt",
            (user, key, amount, receipt),
        )
        return receipt


class PgPoolBlock(PgSameTransaction):
    async def pay(self, key, amount, user):
        await self.setup()
        async with self.pool.connection() as conn:  # commits at the end, rolls back on error
            return await self.once(conn, key, amount, user)


class PgSavepointInsert(PgSameTransaction):
    async def once(self, conn, key, amount, user):
        row = await self.lookup(conn, key, amount, user)
        if row:
            return row[1]
        receipt = await self.charge(amount, conn)
        try:
            async with conn.transaction():
                await conn.execute("INSERT INTO payment_keys VALUES (%s, %s, %s, %s)", (user, key, amount, receipt))
        except pg_errors.UniqueViolation:
            row = await self.lookup(conn, key, amount, user)
            return row[1]
        return receipt


class PgBestEffort(PgSameTransaction):
    async def once(self, conn, key, amount, user):
        await conn.execute(
            "INSERT INTO payment_keys (user_id, key, amount) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (user, key, amount),
        )
        row = await self.lookup(conn, key, amount, user, " FOR UPDATE")
        if row[1] is not None:
            return row[1]
        try:
            receipt = await self.charge(amount, conn)
        except ConnectionError:
            receipt = f"accepted-{uuid.uuid4()}"
        await conn.execute("UPDATE payment_keys SET receipt = %s WHERE user_id = %s AND key = %s", (receipt, user, key))
        return receipt


class PgKeyTable:
    """One row per idempotency key; the owner is kept for the audit."""

    DDL = "CREATE TABLE IF NOT EXISTS request_keys (key text PRIMARY KEY, owner text, amount bigint, receipt text)"

    def __init__(self, pool, charge):
        self.pool, self.charge, self._made = pool, charge, False

    async def pay(self, key, amount, user):
        if not self._made:
            async with self.pool.connection() as conn:
                await create_tables(conn, self.DDL)
            self._made = True
        async with self.pool.connection() as conn, conn.transaction():
            cursor = await conn.execute(
                "INSERT INTO request_keys (key, owner, amount) VALUES (%s, %s, %s) ON CONFLICT (key) DO NOTHING RETURNING key",
                (key, user, amount),
            )
            if await cursor.fetchone() is None:
                cursor = await conn.execute("SELECT amount, receipt FROM request_keys WHERE key = %s", (key,))
                known, receipt = await cursor.fetchone()
                if known != amount:
                    raise KeyReused(key)
                return receipt
            receipt = await self.charge(amount, conn)
            await conn.execute("UPDATE request_keys SET receipt = %s WHERE key = %s", (receipt, key))
        return receipt


class PgChargeThenRecord(PgSameTransaction):
    async def pay(self, key, amount, user):
        await self.setup()
        lock = (json.dumps([user, key]),)
        async with self.pool.connection() as conn:
            await conn.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", lock)
            try:
                row = await self.lookup(conn, key, amount, user)
                if row:
                    return row[1]
                async with conn.transaction():
                    receipt = await self.charge(amount, conn)
                async with conn.transaction():
                    await conn.execute("INSERT INTO payment_keys VALUES (%s, %s, %s, %s)", (user, key, amount, receipt))
                return receipt
            finally:
                if not conn.closed:
                    await conn.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", lock)


class PgSessionLock(PgSameTransaction):
    async def pay(self, key, amount, user):
        await self.setup()
        lock = (json.dumps([user, key]),)
        async with self.pool.connection() as conn:
            cursor = await conn.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", lock)
            if not (await cursor.fetchone())[0]:
                raise InProgress(key)
            async with conn.transaction():
                receipt = await self.once(conn, key, amount, user)
            await conn.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", lock)
            return receipt


class PgSnapshotLedger:
    DDL = """CREATE TABLE IF NOT EXISTS payment_log (
        id bigserial PRIMARY KEY, user_id text, key text, amount bigint, receipt text)"""

    def __init__(self, pool, charge):
        self.pool, self.charge, self._made = pool, charge, False

    async def pay(self, key, amount, user):
        if not self._made:
            async with self.pool.connection() as conn:
                await create_tables(conn, self.DDL)
            self._made = True
        async with self.pool.connection() as conn, conn.transaction():
            await conn.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            await conn.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 7))", (json.dumps([user, key]),))
            cursor = await conn.execute(
                "SELECT amount, receipt FROM payment_log WHERE user_id = %s AND key = %s", (user, key)
            )
            if row := await cursor.fetchone():
                if row[0] != amount:
                    raise KeyReused(key)
                return row[1]
            receipt = await self.charge(amount, conn)
            await conn.execute(
                "INSERT INTO payment_log (user_id, key, amount, receipt) VALUES (%s, %s, %s, %s)",
                (user, key, amount, receipt),
            )
        return receipt


# --- PostgreSQL, outside provider -----------------------------------------------------------------------------------------


class PgTwoPhase:
    DDL = """CREATE TABLE IF NOT EXISTS charges (
        user_id text, key text, amount bigint NOT NULL, state text NOT NULL, token uuid NOT NULL,
        since timestamptz NOT NULL DEFAULT clock_timestamp(), receipt text, PRIMARY KEY (user_id, key))"""
    OWN = "(charges.state = 'reserved' AND charges.token = excluded.token)"
    STALE = "charges.state = 'reserved' AND charges.since < clock_timestamp() - interval '1500 ms'"

    def __init__(self, pool, charge):
        self.pool, self.charge, self._made = pool, charge, False

    async def run(self, sql, **values):
        async def once():
            async with self.pool.connection() as conn:
                return await (await conn.execute(sql, values)).fetchone()

        return await persistently(once)

    async def pay(self, key, amount, user):
        if not self._made:
            async with self.pool.connection() as conn:
                await create_tables(conn, self.DDL)
            self._made = True
        values = {"user": user, "key": key, "amount": amount, "token": uuid.uuid4()}
        mine = await self.run(
            f"""INSERT INTO charges (user_id, key, amount, state, token)
                VALUES (%(user)s, %(key)s, %(amount)s, 'reserved', %(token)s)
                ON CONFLICT (user_id, key) DO UPDATE SET token = excluded.token, since = clock_timestamp(), state = 'reserved'
                WHERE charges.amount = excluded.amount AND ({self.OWN} OR {self.STALE}) RETURNING 1""",
            **values,
        )
        if not mine:
            row = await self.run(
                "SELECT amount, state, receipt FROM charges WHERE user_id = %(user)s AND key = %(key)s", **values
            )
            if row is None:
                raise InProgress(key)
            if row[0] != amount:
                raise KeyReused(key)
            if row[1] == "done":
                return row[2]
            raise InProgress(row[1])
        begun = await self.run(
            """UPDATE charges SET state = 'charging'
               WHERE user_id = %(user)s AND key = %(key)s AND token = %(token)s AND state <> 'done' RETURNING 1""",
            **values,
        )
        if not begun:
            raise InProgress(key)
        try:
            receipt = await self.charge(amount)
        except TimeoutError as error:
            raise OutcomeUnknown(key) from error
        except Exception:
            await self.run(
                "DELETE FROM charges WHERE user_id = %(user)s AND key = %(key)s AND token = %(token)s RETURNING 1",
                **values,
            )
            raise
        await self.run(
            """UPDATE charges SET state = 'done', receipt = %(receipt)s
               WHERE user_id = %(user)s AND key = %(key)s AND token = %(token)s RETURNING 1""",
            **values,
            receipt=receipt,
        )
        return receipt


class PgStaleTakeover(PgTwoPhase):
    STALE = "charges.state <> 'done' AND charges.since < clock_timestamp() - interval '2 seconds'"


class PgAtomicOutside(PgSameTransaction):
    async def once(self, conn, key, amount, user):
        await conn.execute(
            "INSERT INTO payment_keys (user_id, key, amount) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (user, key, amount),
        )
        row = await self.lookup(conn, key, amount, user, " FOR UPDATE")
        if row[1] is not None:
            return row[1]
        receipt = await self.charge(amount)
        await conn.execute("UPDATE payment_keys SET receipt = %s WHERE user_id = %s AND key = %s", (receipt, user, key))
        return receipt


# --- Redis in front of PostgreSQL -----------------------------------------------------------------------------------------


class RedisGate(PgSameTransaction):
    """A lock and a cache in Redis spare the database; the truth is its primary key."""

    TTL = 2.0
    RENEW = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end return 0"
    FREE = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

    def __init__(self, redis, pool, charge):
        super().__init__(pool, charge)
        self.redis = redis

    async def enter(self, gate, token):
        return await self.redis.set(gate, token, nx=True, px=int(self.TTL * 1000))

    async def renew(self, gate, token):
        while True:
            await asyncio.sleep(self.TTL / 3)
            try:
                await self.redis.eval(self.RENEW, 1, gate, token, int(self.TTL * 1000))
            except BROKEN:
                pass

    async def pay(self, key, amount, user):
        intent, token = json.dumps([user, key]), uuid.uuid4().hex
        if cached := await self.redis.get(f"cache:{intent}"):
            known, receipt = json.loads(cached)
            if known != amount:
                raise KeyReused(key)
            return receipt
        if not await self.enter(f"gate:{intent}", token):
            raise InProgress(key)
        receipt = await self.guarded(f"gate:{intent}", token, key, amount, user)
        await self.redis.set(f"cache:{intent}", json.dumps([amount, receipt]), ex=3600)
        return receipt

    async def guarded(self, gate, token, key, amount, user):
        beat = asyncio.create_task(self.renew(gate, token))
        try:
            return await super().pay(key, amount, user)
        finally:
            beat.cancel()
            await self.redis.eval(self.FREE, 1, gate, token)


class RedisGateForever(RedisGate):
    async def enter(self, gate, token):
        return await self.redis.set(gate, token, nx=True)

    async def guarded(self, gate, token, key, amount, user):
        try:
            return await PgSameTransaction.pay(self, key, amount, user)
        finally:
            await self.redis.eval(self.FREE, 1, gate, token)


class RedisGateHeartbeat(RedisGate):
    async def guarded(self, gate, token, key, amount, user):
        beat = asyncio.create_task(self.renew(gate, token))
        receipt = await PgSameTransaction.pay(self, key, amount, user)
        beat.cancel()
        await self.redis.eval(self.FREE, 1, gate, token)
        return receipt


class WriteThroughCache(PgSameTransaction):
    def __init__(self, redis, pool, charge):
        super().__init__(pool, charge)
        self.redis = redis

    async def pay(self, key, amount, user):
        if cached := await self.redis.get(f"receipt:{json.dumps([user, key])}"):
            known, receipt = json.loads(cached)
            if known != amount:
                raise KeyReused(key)
            return receipt
        return await super().pay(key, amount, user)

    async def once(self, conn, key, amount, user):
        receipt = await super().once(conn, key, amount, user)
        await self.redis.set(f"receipt:{json.dumps([user, key])}", json.dumps([amount, receipt]), ex=86400)
        return receipt


WRONG = {
    HashedIntent: (
        "one attempt after the other, two users, two keys",
        "Python's hash() of the strings is salted per process, so a retry in another process finds no mark and charges again",
    ),
    RequestDigestKey: (
        "the key comes back with another amount",
        "the amount is part of the key, so the same key with another amount is charged as a new intent instead of refused",
    ),
    KeyOnlyReplay: (
        "the key comes back with another amount",
        "no fingerprint: the same key with another amount is answered with the first receipt",
    ),
    ReleaseOnFailure: (
        "a connection breaks",
        "a TimeoutError (outcome unknown) frees the mark too, so a retry charges again though the first may have gone through",
    ),
    ReplaysErrors: (
        "the card is declined, and then it is not",
        "errors are stored as the answer, so a declined card can never be tried again with the same key",
    ),
    FieldByField: (
        "a server is killed",
        "state=done is written before the receipt by another command; a crash or a retry in between is answered with an empty receipt",
    ),
    HourLongMark: (
        "a server is killed",
        "px gets seconds, so the in-progress mark lives 3.6 s instead of an hour and a retry after a crash, a timeout or in a slow charge charges again",
    ),
    cached_payments: (
        "two attempts at once, one of them late",
        "GET, then charge, then SET: two concurrent attempts both find nothing and both charge",
    ),
    ProcessedFlag: (
        "two attempts at once, one of them late",
        "the mark made before the charge counts as the answer: a concurrent retry, or one after a crash or timeout, is answered with a token that is no receipt",
    ),
    LockAndAnswer: (
        "a server is killed",
        "finally deletes the lock though it was never acquired: a refused concurrent attempt frees the holder's lock and the next one charges too",
    ),
    LocalKeyedPayments: (
        "one attempt after the other, two users, two keys",
        "locks and answers live in one process: another process, or one after a restart, charges again",
    ),
    PgForUpdate: (
        "two attempts at once, one of them late",
        "FOR UPDATE locks no row that does not exist yet and ON CONFLICT DO NOTHING hides the conflict: two concurrent attempts both commit a charge",
    ),
    PgUpsert: (
        "two attempts at once, one of them late",
        "two concurrent attempts both find no row and charge; DO UPDATE overwrites the first receipt instead of failing",
    ),
    PgPoolBlock: (
        "two attempts at once, one of them late",
        "the pool's connections are in autocommit: no transaction, FOR UPDATE holds nothing; concurrent attempts both charge, a crash after the charge is followed by another",
    ),
    PgSavepointInsert: (
        "two attempts at once, one of them late",
        "the unique violation rolls only the savepoint back, the loser's charge outside of it commits too",
    ),
    PgBestEffort: (
        "the provider can't be reached, and then it can",
        "a ConnectionError (nothing charged) is stored and answered as a success, so it is never charged",
    ),
    PgKeyTable: (
        "one attempt after the other, two users, two keys",
        "the primary key is the key without its user: another user's payment with the same key is answered with the first user's receipt and never charged",
    ),
    PgChargeThenRecord: (
        "a server is killed",
        "the charge and its record are two transactions: a crash or connection error between them lets the retry charge again",
    ),
    PgSessionLock: (
        "the client goes away",
        "after a declined card the session-level advisory lock stays with the pooled connection, so other connections are refused for ever",
    ),
    PgSnapshotLedger: (
        "two attempts at once, one of them late",
        "REPEATABLE READ takes its snapshot before it waits for the advisory lock, so the waiter does not see the committed receipt and charges again (no unique constraint)",
    ),
    PgStaleTakeover: (
        "two attempts at once, one of them late",
        "a charge in progress for 2 seconds is taken over, so a slow charge, a timeout or a crash after the charge is followed by a second one",
    ),
    PgAtomicOutside: (
        "a server is killed",
        "the outside charge is in the transaction of its mark: a crash or error after it rolls the mark back and a retry charges again",
    ),
    RedisGateForever: (
        "a server is killed",
        "the lock in Redis has no TTL, so after a crash it refuses the intent for ever though nothing was charged",
    ),
    WriteThroughCache: (
        "a server is killed",
        "the receipt is cached before the commit: if the commit fails or the process dies, later attempts are answered with a charge that was rolled back",
    ),
}
NOT_FOUND = {
    WorkerOwned: "the pid is the owner token, so two concurrent attempts in one process both own the reservation and both charge",
    RedisGateHeartbeat: "an error leaves the heartbeat running and the lock held, so a declined card cannot be tried again while the process lives",
}
RIGHT = [
    RedisTwoPhase,
    RedisTokenMark,
    PgSameTransaction,
    PgOptimistic,
    pg_conn_payments,
    decorated_payments,
    PgTwoPhase,
    RedisGate,
]
