"""Redlock: every promise of the rule, on real nodes that die, hang, refuse and lose their data."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import Any

import pytest
import redis as sync_redis
import redis.asyncio
from redis.exceptions import AuthenticationError, ConnectionError  # noqa: A004  the client's own word for it

from distsys.errors import LockLost, LockNotAcquired
from distsys.lab.testbed.proxy import TcpProxy
from distsys.lab.testbed.servers import Server, Servers
from distsys.locks import redlock as module
from distsys.locks.fencing import current_token
from distsys.locks.lease import Lease
from distsys.locks.redis_lock import RedisLock
from distsys.locks.redlock import _GRANT, _RELEASE, EXTEND, Redlock, _Votes
from tests.bugs import in_script, kills, replaced
from tests.locks.broken import decide_when_all_have_answered, init_with_quorum_1, never, silence_is_a_no

Redis = redis.asyncio.Redis
KEY = "distsys:redlock:{%s}"


@pytest.fixture
async def servers_5(servers: Servers) -> list[Server]:
    """Five nodes; a test may kill and pause them, the next test finds them empty and running."""
    return [await servers.redis(f"n{i}") for i in range(1, 6)]


@pytest.fixture
async def nodes(servers_5: list[Server]) -> AsyncIterator[list[Redis]]:
    """Clients of five empty nodes, closed when the last request to them has been answered."""
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Redis.from_url(node.url)) for node in servers_5]
        for client in clients:
            await client.flushall()
            await client.config_resetstat()
        yield clients
        await all_well(servers_5)


async def all_well(servers: Iterable[Server] = ()) -> None:
    """Every node is up again, and no request of a lock is under way."""
    for server in servers:
        assert server.process is not None
        if server.process.state == "exited":
            await server.restart()
        elif server.process.state == "stopped":
            await server.resume()
    async with asyncio.timeout(20):
        while under_way := [
            task for task in asyncio.all_tasks() if "distsys/locks/" in task.get_coro().cr_code.co_filename
        ]:
            await asyncio.wait(under_way)


@pytest.fixture
def three(nodes: list[Redis]) -> list[Redis]:
    return nodes[:3]


def redlock(nodes: Iterable[Redis], name: str, **options: Any) -> Redlock:
    """Build a lock with times that no slow machine comes near, unless a test is about them."""
    return Redlock(list(nodes), name, **{"ttl": 3600, "node_timeout": 100, **options})


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    """Wait for a fact about the servers, asked again and again."""
    async with asyncio.timeout(20):
        while not await fact():
            await asyncio.sleep(0)


async def owners(nodes: list[Redis], name: str) -> list[str | None]:
    """Return the owner of the lock on each node."""
    found = [await node.get(KEY % name) for node in nodes]
    return [owner.decode() if isinstance(owner, bytes) else owner for owner in found]


async def free(nodes: list[Redis], name: str) -> None:
    async def is_free() -> bool:
        return not any(await owners(nodes, name))

    await until(is_free)


async def answers(node: Redis) -> bool:
    try:
        return bool(await node.ping())
    except ConnectionError:
        return False


async def tombstones(node: Redis) -> list[bytes]:
    """Return the tombstones of a node, which refuse grants that are still on their way."""
    return [key async for key in node.scan_iter("*:tombstone:*")]


async def occupy(nodes: list[Redis], name: str) -> None:
    """Let another owner hold the lock on these nodes for an hour."""
    for node in nodes:
        await node.set(KEY % name, "somebody-else", px=3_600_000)


def steps(*times: float) -> Callable[[], float]:
    """Return a clock that shows these times one after the other, then stands still."""
    shown: Iterator[float] = itertools.chain(times, itertools.repeat(times[-1]))
    return lambda: next(shown)


class Rounds(random.Random):
    """Random source that draws no pause between two rounds, and counts them."""

    count = 0
    asked: tuple[float, float] | None = None

    def uniform(self, a: float, b: float) -> float:
        self.count, self.asked = self.count + 1, (a, b)
        return 0.0


# ---- granting


@kills(
    "the ttl taken for seconds",
    in_script(
        _GRANT,
        "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])",
        "redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])",
    ),
)
@kills(
    "granted without a TTL",
    in_script(_GRANT, "redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])", "redis.call('SET', KEYS[1], ARGV[1])"),
)
async def test_a_grant_stands_on_every_node_with_a_ttl_until_it_is_released(three: list[Redis]) -> None:
    """All nodes have the same random owner; the end of the body releases all of them."""
    async with redlock(three, "everywhere", ttl=10, node_timeout=4) as lease:

        async def on_all() -> bool:
            return await owners(three, "everywhere") == [lease.owner] * 3

        await until(on_all)
        assert all([0 < await node.pttl(KEY % "everywhere") <= 10_000 for node in three])
        assert lease.held
        assert 0 < lease.remaining() < 10
    await free(three, "everywhere")


async def test_only_one_of_many_holds_it(three: list[Redis]) -> None:
    """Ten tasks that split the votes among them: each enters in the end, and no increment is lost."""
    await three[0].set("counter", 0)

    async def increment() -> None:
        async with redlock(three, "counter-lock", retry_delay=0.005):
            value = int(await three[0].get("counter"))
            await asyncio.sleep(0)
            await three[0].set("counter", value + 1)

    await asyncio.gather(*(increment() for _ in range(10)))
    assert int(await three[0].get("counter")) == 10


async def test_a_minority_in_other_hands_does_not_matter(nodes: list[Redis]) -> None:
    """Two of five nodes have granted another owner: three votes are enough, and those grants stay as they are."""
    await occupy(nodes[:2], "minority")
    async with redlock(nodes, "minority", timeout=0) as lease:
        assert (await owners(nodes, "minority"))[2:] == [lease.owner] * 3
    assert await owners(nodes[:2], "minority") == ["somebody-else"] * 2


@kills("a failed round keeps its grants", replaced(Redlock, "_release_all", never))
@kills("one vote is enough", replaced(Redlock, "__init__", init_with_quorum_1))
@kills("granted to any owner", in_script(_GRANT, "if holder then return holder == ARGV[1] and 1 or 0 end", ""))
async def test_a_minority_of_grants_is_released_and_the_error_counts_them(three: list[Redis]) -> None:
    """LockNotAcquired carries granted, needed and errors; only the others' grants are left."""
    await occupy(three[:2], "lost-round")
    with pytest.raises(LockNotAcquired, match="1 of 3 nodes granted it, 2 are needed") as refused:
        await redlock(three, "lost-round", timeout=0).acquire()
    assert (refused.value.granted, refused.value.needed, refused.value.errors) == (1, 2, [])
    assert refused.value.problem()["status"] == 423
    assert await owners(three, "lost-round") == ["somebody-else"] * 2 + [None]
    assert await redlock(three, "lost-round").try_acquire() is None


async def test_a_failed_round_leaves_no_trace_on_the_nodes(three: list[Redis]) -> None:
    """It writes nothing where another owner holds the lock: waiting does not fill the nodes' memory."""
    await occupy(three, "trace")
    with pytest.raises(LockNotAcquired):
        await redlock(three, "trace", timeout=0).acquire()
    assert [await node.dbsize() for node in three] == [1, 1, 1]


@kills(
    "the time it took does not count",
    replaced(module, "local_deadline", lambda *_: float("inf")),
    took=20.0,
    granted=False,
)
@pytest.mark.parametrize(("took", "granted"), [(0.0, True), (9.89, True), (9.9, False), (20.0, False)])
async def test_a_grant_with_too_little_validity_left_does_not_count(
    three: list[Redis], took: float, granted: bool
) -> None:
    """Validity is ttl - elapsed - 1 % - 2 ms: of 10 s, 9.898 may pass. A grant that came too late is released."""
    lock = redlock(three, "validity", ttl=10, node_timeout=4, timeout=0, clock=steps(0, 100, 100 + took))
    if granted:
        lease = await lock.acquire()
        assert lease.remaining() == pytest.approx(9.898 - took)
        assert await lease.release()
    else:
        with pytest.raises(LockNotAcquired, match=r"too late for ttl=10"):
            await lock.acquire()
    await free(three, "validity")


async def test_the_pause_between_rounds_is_drawn_at_random(three: list[Redis]) -> None:
    """Between 0 and twice the retry delay; without a timeout it goes on until the lock is free."""
    await occupy(three, "rounds")

    class Freeing(Rounds):
        def uniform(self, a: float, b: float) -> float:
            if self.count == 3:
                freed.append(asyncio.create_task(three[0].delete(KEY % "rounds")))
                freed.append(asyncio.create_task(three[1].delete(KEY % "rounds")))
            return super().uniform(a, b)

    freed: list[asyncio.Task[Any]] = []
    rng = Freeing()
    async with redlock(three, "rounds", retry_delay=0.25, rng=rng):
        assert rng.count > 3
        assert rng.asked == (0, 0.5)


async def test_a_timeout_ends_the_rounds(three: list[Redis]) -> None:
    """By the lock's clock: a round at 0, 1 and 2 s, then 3 s have passed."""
    await occupy(three, "timeout")
    rng = Rounds()
    clock = steps(*(float(second) for second in (0, 0, 0, 0, 1, 1, 1, 2, 2, 3)))
    with pytest.raises(LockNotAcquired):
        await redlock(three, "timeout", timeout=3, rng=rng, clock=clock).acquire()
    assert rng.count == 3


async def test_scripts_that_the_nodes_forgot_are_brought_along(three: list[Redis]) -> None:
    """SCRIPT FLUSH on all nodes between any two calls changes nothing."""

    async def forget() -> None:
        for node in three:
            await node.script_flush()

    await forget()
    async with redlock(three, "scripts") as lease:
        await forget()
        await lease.extend()
        await forget()
    await free(three, "scripts")


@kills(
    "a retry gains time",
    in_script(
        _GRANT,
        "if holder then return holder == ARGV[1] and 1 or 0 end",
        "if holder and holder ~= ARGV[1] then return 0 end",
    ),
)
async def test_asking_again_is_the_same_grant(three: list[Redis]) -> None:
    """A client that retries after a lost reply still holds the grant, and gains no time by it."""
    lock, node = redlock(three, "again"), three[0]
    assert await lock._run(0, _GRANT, "me", 5_000)
    assert await lock._run(0, _GRANT, "me", 60_000)
    assert await node.pttl(KEY % "again") <= 5_000
    assert not await lock._run(0, _GRANT, "other", 5_000)


# ---- nodes that fail


@contextlib.asynccontextmanager
async def linked(servers: list[Server]) -> AsyncIterator[tuple[list[TcpProxy], list[Redis]]]:
    """Nodes behind links that can be slow and lose replies, and clients that retry, connected already."""
    async with contextlib.AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(TcpProxy(node.host, node.port)) for node in servers]
        clients = [await stack.enter_async_context(Redis(host="127.0.0.1", port=proxy.port)) for proxy in proxies]
        for client in clients:
            await asyncio.gather(client.ping(), client.ping())  # two connections: what is sent may overtake
        yield proxies, clients
        for proxy in proxies:
            proxy.delay(0)
        await all_well()


@contextlib.asynccontextmanager
async def failing(fault: str, servers: list[Server]) -> AsyncIterator[list[Redis]]:
    """Clients of nodes that are dead, hang, or refuse."""
    async with contextlib.AsyncExitStack() as stack:
        user = "nobody:wrong@" if fault == "refusing" else ""
        urls = [server.url.replace("redis://", f"redis://{user}") for server in servers]
        clients = [await stack.enter_async_context(Redis.from_url(url)) for url in urls]
        for server, client in zip(servers, clients, strict=True):
            if fault == "dead":
                await server.kill()
            elif fault == "hung":
                await client.ping()
                await server.pause()
        yield clients
        await all_well(servers)


@kills("all nodes are waited for", replaced(_Votes, "_decide", decide_when_all_have_answered), fault="hung", count=3)
@pytest.mark.parametrize("fault", ["dead", "hung", "refusing"])
@pytest.mark.parametrize("count", [3, 5])
async def test_a_failing_minority_changes_nothing(
    servers_5: list[Server], nodes: list[Redis], fault: str, count: int
) -> None:
    """One of three, two of five: acquired, extended and released by the others, no waiting for the node timeout."""
    bad, well = servers_5[: count // 2], nodes[count // 2 : count]
    async with failing(fault, bad) as ill:
        lock = redlock([*ill, *well], "ill", timeout=0)
        async with asyncio.timeout(20), lock as lease:
            await lease.extend()
            assert (await owners(well, "ill")).count(lease.owner) > count // 2
        await free(well, "ill")


@kills("no node timeout", replaced(_Votes, "_time_out", lambda _: None), fault="hung")
@pytest.mark.parametrize("fault", ["dead", "hung", "refusing"])
async def test_a_failing_majority_is_an_error_that_names_the_cause(
    servers_5: list[Server], nodes: list[Redis], fault: str
) -> None:
    """After the node timeout at the latest; the survivor keeps nothing of the grant it gave."""
    async with failing(fault, servers_5[:2]) as ill:
        async with asyncio.timeout(20):
            with pytest.raises(LockNotAcquired, match="1 of 3 nodes granted it") as refused:
                await redlock([*ill, nodes[2]], "majority", timeout=0, node_timeout=0.2).acquire()
        kinds = {"dead": ConnectionError, "hung": TimeoutError, "refusing": AuthenticationError}
        assert [type(error) for error in refused.value.errors] == [kinds[fault]] * 2
        assert (refused.value.granted, refused.value.needed) == (1, 2)
        await free(nodes[2:], "majority")


async def test_grants_of_nodes_that_hung_are_released_when_they_wake_up(
    servers_5: list[Server], three: list[Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests waited in their sockets; without the release the lock would be held for an hour."""
    monkeypatch.setattr(module, "UNDO_SECONDS", 30)
    for node in three:
        await node.ping()
    for server in servers_5[:2]:
        await server.pause()
    with pytest.raises(LockNotAcquired):
        await redlock(three, "woken", timeout=0, node_timeout=0.05).acquire()
    for server in servers_5[:2]:
        await server.resume()
    await free(three, "woken")
    async with asyncio.timeout(20), redlock(three, "woken"):
        pass


async def test_grants_that_arrive_late_are_released(
    servers_5: list[Server], three: list[Redis], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round fails because two nodes answer after the node timeout: their grants don't stay for an hour."""
    monkeypatch.setattr(module, "UNDO_SECONDS", 30)
    async with linked(servers_5[:2]) as (proxies, slow):
        for proxy in proxies:
            proxy.delay(0.04)
        with pytest.raises(LockNotAcquired):
            await redlock([*slow, three[2]], "late", timeout=0, node_timeout=0.03).acquire()

        async def all_have_tombstones() -> bool:
            return all([await tombstones(node) for node in three[:2]])

        await until(all_have_tombstones)
        await free(three, "late")


@kills("every release leaves a tombstone", in_script(_RELEASE, "if ARGV[2] == '1' then", "if true then"))
@kills("a grant is accepted after its release", in_script(_RELEASE, "if ARGV[2] == '1' then", "if false then"))
async def test_a_grant_that_arrives_after_its_release_is_refused(three: list[Redis]) -> None:
    """Undoing a round leaves a tombstone for grants that may still be on their way; a normal release leaves nothing."""
    lock = redlock(three, "mark")
    await lock._run(0, _RELEASE, "late", "1")
    assert not await lock._run(0, _GRANT, "late", 10_000)
    async with lock:
        pass
    await free(three, "mark")
    assert [await node.dbsize() for node in three] == [1, 0, 0]


@kills("a straggler is released before it is granted", replaced(_Votes, "answered", never))
async def test_a_straggler_is_released_with_the_rest(servers_5: list[Server], three: list[Redis]) -> None:
    """The third node's grant arrives when the lock has been released already, by two votes of three."""
    async with linked(servers_5[:1]) as (proxies, slow):
        proxies[0].delay(0.05)
        lease = await redlock([*slow, *three[1:]], "straggler").acquire()
        assert await owners(three, "straggler") == [None, lease.owner, lease.owner]
        assert await lease.release()
        proxies[0].delay(0)
        await all_well()
        assert [await node.dbsize() for node in three] == [0, 0, 0]


@kills(
    "a retry after a lost reply is refused",
    in_script(_GRANT, "if holder then return holder == ARGV[1] and 1 or 0 end", "if holder then return 0 end"),
    cut=3,
)
@pytest.mark.parametrize("cut", [1, 2, 3])
async def test_a_lost_reply_is_not_a_lost_vote(servers_5: list[Server], nodes: list[Redis], cut: int) -> None:
    """The client's retry finds the owner granted already; on so many of the three nodes at once."""
    async with linked(servers_5[:3]) as (proxies, clients):
        async with redlock(clients, "warm"):
            pass
        await all_well()
        for proxy in proxies[:cut]:
            proxy.cut_reply()
        async with asyncio.timeout(20):
            lease = await redlock(clients, "cut", timeout=0).acquire()

        async def on_all() -> bool:
            return await owners(nodes[:3], "cut") == [lease.owner] * 3

        await until(on_all)
        assert await lease.release()


async def test_a_node_that_restarts_empty_is_outvoted(servers_5: list[Server], three: list[Redis]) -> None:
    """One of three forgets: the lease goes on, and no rival gets a majority."""
    async with redlock(three, "restart") as lease:
        await all_well()
        await servers_5[0].restart()
        await until(lambda: answers(three[0]))
        rival = redlock(three, "restart", timeout=0)
        with pytest.raises(LockNotAcquired, match="1 of 3"):
            await asyncio.create_task(rival.acquire())
        await lease.extend()
        assert lease.held


async def test_a_majority_that_forgets_grants_twice_and_the_holder_learns_of_it(three: list[Redis]) -> None:
    """Redlock does not survive two nodes that restart empty inside a lease. The next extension finds it out."""
    lease = await redlock(three, "forgot", renew=False).acquire()
    await all_well()
    for node in three[:2]:
        await node.flushall()
    second = await asyncio.create_task(redlock(three, "forgot", timeout=0).acquire())
    assert lease.held
    assert second.held
    with pytest.raises(LockLost, match="taken away"):
        await lease.extend()
    assert not await lease.release()
    assert await second.release()


# ---- keeping the lease, and losing it


@kills(
    "no owner check on extension", in_script(EXTEND, "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end", "")
)
async def test_extension_takes_a_majority(three: list[Redis]) -> None:
    """One node has forgotten: the other two extend. Two have: the lease is lost."""
    lease = await redlock(three, "extend", ttl=10, node_timeout=4).acquire()
    await all_well()
    await three[0].flushall()
    await lease.extend(60)
    assert 10 < lease.remaining() < 60
    assert all([10_000 < await node.pttl(KEY % "extend") <= 60_000 for node in three[1:]])
    await three[1].flushall()
    with pytest.raises(LockLost, match="taken away") as lost:
        await lease.extend()
    assert lost.value.token is None
    assert lease.lost
    await free(three, "extend")


@kills(
    "a slow extension shortens a longer one",
    in_script(EXTEND, "if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then", "if true then"),
)
async def test_an_extension_never_shortens_what_a_node_has_promised(three: list[Redis]) -> None:
    """A slow renewal that arrives after a longer extension takes nothing away from it."""
    lease = await redlock(three, "longer", ttl=60, node_timeout=20).acquire()
    await all_well()
    await lease.extend(5)
    assert lease.remaining() > 5
    assert all([await node.pttl(KEY % "longer") > 5_000 for node in three])
    assert await lease.release()


@kills("silence is a no", replaced(Redlock, "_majority_confirms", silence_is_a_no))
async def test_silent_nodes_are_an_error_of_the_extension_and_no_loss(
    servers_5: list[Server], three: list[Redis]
) -> None:
    """One node has forgotten, one hangs, one agrees: the hung one may still hold it, so the lease's time decides."""
    lease = await redlock(three, "silent", node_timeout=0.1).acquire()
    await all_well()
    await three[0].flushall()
    await servers_5[1].pause()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.1 s"):
        await lease.extend()
    assert lease.held
    await servers_5[1].resume()
    for _ in range(100):  # a node that has just woken up may miss the node timeout
        with contextlib.suppress(TimeoutError):
            await lease.extend()
            break
    assert await lease.release()


async def test_a_quick_no_and_a_quick_error_don_t_outvote_a_slow_yes(
    servers_5: list[Server], three: list[Redis]
) -> None:
    """One node forgot, one refuses connections, the third takes its time: no majority says the lease is lost."""
    async with linked(servers_5[2:3]) as (proxies, slow):
        lease = await redlock([*three[:2], *slow], "slow-yes").acquire()
        await all_well()
        await three[0].flushall()
        await servers_5[1].kill()
        proxies[0].delay(0.02)
        with pytest.raises(ConnectionError):
            await lease.extend()
        assert lease.held
        with pytest.raises(ConnectionError):
            await lease.release()


async def test_a_lease_is_renewed_while_a_minority_is_dead(servers_5: list[Server], three: list[Redis]) -> None:
    """A body longer than the ttl keeps the lock on the two nodes left: they are asked three times per ttl."""
    async with redlock(three, "renewed", ttl=0.6, node_timeout=0.2) as lease:
        await servers_5[0].kill()

        async def four_times() -> bool:
            return int((await three[1].info("commandstats")).get("cmdstat_pexpire", {"calls": 0})["calls"]) >= 4

        await until(four_times)
        assert lease.held
        assert await owners(three[1:], "renewed") == [lease.owner] * 2


async def test_a_lease_whose_majority_dies_ends_the_body_with_lock_lost(
    servers_5: list[Server], three: list[Redis]
) -> None:
    """Before any node's own lease can end; the cause is what the nodes answered."""
    with pytest.raises(LockLost, match="before it could be renewed") as lost:
        async with redlock(three, "dying", ttl=0.3, node_timeout=0.1):
            for server in servers_5[:2]:
                await server.kill()
            await asyncio.Event().wait()
    assert isinstance(lost.value.__cause__, (ConnectionError, TimeoutError))
    await free(three[2:], "dying")


@kills(
    "no owner check on release", in_script(_RELEASE, "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end", "")
)
async def test_a_body_that_finished_under_foreign_votes_raises_lock_lost(three: list[Redis]) -> None:
    """Another owner had a majority at the end; on_lost="flag" makes no difference."""
    with pytest.raises(LockLost, match="no longer ours"):
        async with redlock(three, "foreign", on_lost="flag"):
            await occupy(three[:2], "foreign")
    assert await owners(three, "foreign") == ["somebody-else"] * 2 + [None]


async def test_a_release_that_no_majority_confirms_is_logged_when_the_body_was_covered(
    servers_5: list[Server], three: list[Redis], caplog: pytest.LogCaptureFixture
) -> None:
    """Two nodes died inside the lease: the work was alone from start to end, and is not failed."""
    async with redlock(three, "unconfirmed"):
        for server in servers_5[:2]:
            await server.kill()
    assert "could not be released and ends by its TTL" in caplog.text
    assert await owners(three[2:], "unconfirmed") == [None]


async def test_release_is_false_when_a_majority_had_forgotten(three: list[Redis]) -> None:
    """By the lock object too; True as long as two of three still held it."""
    lock = redlock(three, "release")
    await lock.acquire()
    await all_well()  # a grant that comes after the majority's must not come after the flush as well
    await three[0].flushall()
    assert await lock.release()
    await lock.acquire()
    await all_well()
    for node in three[:2]:
        await node.flushall()
    assert not await lock.release()
    with pytest.raises(RuntimeError, match="does not hold"):
        await lock.release()


# ---- no fencing token


@kills(
    "a token nobody agreed on",
    replaced(module, "Lease", lambda *args, **options: Lease(*args, **{**options, "token": 1})),
)
async def test_it_hands_out_no_fencing_token(three: list[Redis]) -> None:
    """The lease's token is None; nested code is told to write under a lock that has one."""
    async with redlock(three, "no-token") as lease:
        assert lease.token is None
        with pytest.raises(LookupError, match="no lease with a fencing token"):
            current_token()
        with pytest.raises(LookupError, match="'no-token'"):
            current_token("no-token")


async def test_nested_code_finds_the_token_of_the_lock_around_it(redis: Redis, three: list[Redis]) -> None:
    """A Redlock inside a RedisLock does not hide that one's token."""
    async with RedisLock(redis, "outer") as outer, redlock(three, "inner"):
        assert current_token() == outer.token


# ---- cancellation


@kills("a cancelled acquire keeps its grants", replaced(Redlock, "_release_all", never), turns=6)
@pytest.mark.parametrize("turns", [*range(24), 30, 40, 60])
async def test_an_acquire_cancelled_at_any_await_leaves_no_grant_behind(three: list[Redis], turns: int) -> None:
    """After so many turns of the event loop; whatever each node has granted, the next one enters at once."""
    task = asyncio.create_task(redlock(three, "cancel").acquire())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        assert await (await task).release()
    lease = await redlock(three, "cancel", timeout=0).acquire()
    assert await lease.release()


@pytest.mark.parametrize("turns", [*range(24), 30, 40, 60])
async def test_a_release_cancelled_at_any_await_still_releases(three: list[Redis], turns: int) -> None:
    """All nodes are freed though the task that released was cancelled midway."""
    leaving = asyncio.Event()

    async def hold() -> None:
        async with redlock(three, "cancel-release"):
            leaving.set()

    task = asyncio.create_task(hold())
    await leaving.wait()
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await free(three, "cancel-release")


async def test_a_waiter_cancelled_between_two_rounds_leaves_nothing(three: list[Redis]) -> None:
    """It sleeps until its next round; a timeout around it is a TimeoutError."""
    await occupy(three[:2], "between")
    rng = Rounds()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await redlock(three, "between", rng=rng).acquire()
    assert rng.count
    await free(three[2:], "between")


async def test_a_cancelled_acquire_waits_no_longer_than_the_node_timeout_for_its_undoing(
    servers_5: list[Server], three: list[Redis]
) -> None:
    """Two nodes hang: what they may have granted is taken back in the background."""
    for node in three:
        await node.ping()
    for server in servers_5[:2]:
        await server.pause()
    task = asyncio.create_task(redlock(three, "cancel-hung", node_timeout=0.1).acquire())

    async def granted_by_the_third() -> bool:
        return await owners(three[2:], "cancel-hung") != [None]

    await until(granted_by_the_third)
    task.cancel()
    async with asyncio.timeout(20):
        with pytest.raises(asyncio.CancelledError):
            await task
        await free(three[2:], "cancel-hung")


async def test_nothing_is_lost_to_the_garbage_collector(three: list[Redis]) -> None:
    """A collection in every turn of the event loop: tasks under way are not dropped."""
    rounds: list[None] = []

    async def enter() -> None:
        for _ in range(3):
            async with redlock(three, "gc", retry_delay=0.001):
                rounds.append(None)

    gc.freeze()  # what exists by now is left alone: a collection takes microseconds
    task = asyncio.gather(enter(), enter())
    while not task.done():
        gc.collect()
        await asyncio.sleep(0)
    gc.unfreeze()
    await task
    assert len(rounds) == 6
    await free(three, "gc")


# ---- sharing, event loops, clients


async def test_two_tasks_may_share_one_lock_object(three: list[Redis]) -> None:
    """Each acquisition is a lease of its own, with its own owner."""
    lock, leases, inside = redlock(three, "shared", retry_delay=0.005), [], 0

    async def enter() -> None:
        nonlocal inside
        async with lock as lease:
            inside += 1
            assert inside == 1
            leases.append(lease)
            await asyncio.sleep(0)
            inside -= 1

    await asyncio.gather(*(enter() for _ in range(4)))
    assert len({lease.owner for lease in leases}) == 4


@kills("a task waits for itself", replaced(Redlock, "_refuse_reentry", lambda _: None))
async def test_acquiring_again_in_the_same_task_raises_instead_of_deadlocking(three: list[Redis]) -> None:
    """By another object of the same name too; another task may wait."""
    async with redlock(three, "reentry"):
        with pytest.raises(RuntimeError, match="not re-entrant"):
            await redlock(three, "reentry").acquire()
        assert await asyncio.create_task(redlock(three, "reentry").try_acquire()) is None
    async with redlock(three, "reentry"):
        pass


def test_one_lock_object_serves_two_event_loops_one_after_the_other(
    redis_server: Server, servers_5: list[Server]
) -> None:
    """As long as the clients are closed in between, as redis-py asks."""
    clients = [Redis.from_url(node.url) for node in servers_5[:3]]
    lock = redlock(clients, "loops")

    async def once() -> None:
        async with lock:
            pass
        await all_well()
        for client in clients:
            await client.aclose()

    asyncio.run(once())
    asyncio.run(once())


async def test_any_kind_of_client_will_do(servers_5: list[Server]) -> None:
    """Answers as text, RESP3, a blocking pool, one connection, a unix socket."""
    urls = [node.url for node in servers_5]
    pool = redis.asyncio.BlockingConnectionPool.from_url(urls[2], max_connections=1, timeout=1)
    async with Redis.from_url(urls[4], decode_responses=True) as last:
        path = (await last.config_get("unixsocket"))["unixsocket"]
    async with (
        Redis.from_url(urls[0], decode_responses=True) as text,
        Redis.from_url(urls[1], protocol=3) as resp3,
        Redis.from_pool(pool) as blocking,
        Redis.from_url(urls[3], single_connection_client=True) as single,
        Redis(unix_socket_path=path) as unix,
    ):
        clients = [text, resp3, blocking, single, unix]
        async with asyncio.timeout(20), redlock(clients, "kinds") as lease:
            await lease.extend()
            assert await asyncio.create_task(redlock(clients, "kinds").try_acquire()) is None
        async with asyncio.timeout(20), redlock(clients, "kinds"):
            pass
        await all_well()


async def test_an_exhausted_pool_is_a_node_that_does_not_answer(servers_5: list[Server], three: list[Redis]) -> None:
    """The application uses up one client's connections: the two others decide."""
    pool = redis.asyncio.BlockingConnectionPool.from_url(servers_5[0].url, max_connections=1, timeout=None)
    async with Redis.from_pool(pool) as busy:
        blocked = asyncio.create_task(busy.blpop(["nothing"], timeout=0))

        async def connected() -> bool:
            return bool(await three[0].client_list(_type="normal")) and "blpop" in str(await three[0].client_list())

        await until(connected)
        async with asyncio.timeout(20), redlock([busy, *three[1:]], "pool", node_timeout=0.1):
            pass
        await three[0].rpush("nothing", 1)
        await blocked
        await all_well()
    await free(three, "pool")


# ---- bad input


@pytest.mark.parametrize("name", ["two words", "ключ ✓", "{braces}", "}{", "%7B", "x" * 10_000])
async def test_any_text_is_a_name(three: list[Redis], name: str) -> None:
    """Spaces, unicode, braces, ten kilobytes."""
    async with redlock(three, name):
        assert await asyncio.create_task(redlock(three, name).try_acquire()) is None
        async with redlock(three, name + "}"):
            pass


SAME = Redis()


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"clients": []}, ValueError, "0 client.*needs at least 3 nodes"),
        ({"clients": [Redis(port=1), Redis(port=2)]}, ValueError, "2 client.*needs at least 3 nodes"),
        ({"clients": [SAME, Redis(port=1), SAME]}, ValueError, "names the same node twice"),
        ({"clients": [Redis(port=1), Redis(port=2), Redis(port=1)]}, ValueError, "its vote would count twice"),
        ({"clients": [sync_redis.Redis(port=p) for p in (1, 2, 3)]}, TypeError, "not an asyncio client"),
        ({"name": ""}, ValueError, "is empty"),
        ({"name": b"bytes"}, TypeError, "is a bytes"),
        ({"ttl": 0}, ValueError, "ttl=0: a lease must last longer than the 2 ms"),
        ({"ttl": 0.002}, ValueError, "longer than the 2 ms allowed for drift"),
        ({"ttl": -1}, ValueError, "ttl=-1"),
        ({"ttl": float("nan")}, ValueError, "ttl=nan"),
        ({"ttl": 90_000}, ValueError, "longer than a day"),
        ({"ttl": "30"}, TypeError, "give seconds as a number"),
        ({"timeout": -1}, ValueError, "0 is one try, None waits for ever"),
        ({"timeout": "5"}, TypeError, "timeout='5'"),
        ({"node_timeout": 0}, ValueError, "node_timeout=0: above 0"),
        ({"node_timeout": 5}, ValueError, "far below ttl=10, or a dead node uses up the lease"),
        ({"node_timeout": float("nan")}, ValueError, "node_timeout=nan"),
        ({"ttl": 0.1}, ValueError, r"node_timeout=0\.05: .* far below ttl=0\.1"),
        ({"retry_delay": -1}, ValueError, "retry_delay=-1"),
        ({"on_lost": "ignore"}, ValueError, "'cancel' ends the body"),
    ],
)
def test_bad_input_gets_an_error_that_names_value_and_remedy(
    wrong: dict[str, Any], error: type[Exception], message: str
) -> None:
    """At construction, before anything reaches a node."""
    given = {"clients": [Redis(port=port) for port in (1, 2, 3)], "name": "n", "ttl": 10, **wrong}
    with pytest.raises(error, match=message):
        Redlock(given.pop("clients"), given.pop("name"), **given)
