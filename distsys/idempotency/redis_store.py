"""Claims kept in Redis: one plain command claims a free key or reads a finished one; scripts do the rest.

Most keys only ever see a first attempt and replays, and a plain command is the cheapest way to serve both. Therefore a
record's time to live says how much of the lease is left, and a fencing number is drawn only when somebody asks for it.
The number is the server's time in microseconds, raised above the one before; so it grows even if the record in between
was deleted. Needs Redis 7.0.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from os import urandom
from typing import Any

from distsys._support.cancellation import in_background
from distsys._support.redis import Command, Script, Timed, hash_tag, milliseconds, unavailable
from distsys.idempotency.claims import End, Found

# A record is one string, so that each step reads and writes it in one command. Its parts, from 1 as Lua counts:
#   1 r(unning), d(one), u(nknown)     2 whether waiters are to be woken at its end     3-18 owner, in hexadecimal
#   19-34 fencing number, 0 before it is drawn     35-98 fingerprint     99-111 ttl, ms     112- answer
# A running record expires a ttl after its lease. If less than the ttl is left, the lease is over: it counts as unknown.
CLAIM = Command("SET", get=True)  # with NX GET: sets the record unless there is one; then it returns that one

# KEYS[1] - the record
# ARGV - record of the new claim, its time to live in ms, owner of a claim to take over, "1" to wake waiters at the end
# Returns 1 if the key is claimed; else the record, with the ms that are left of its lease in the place of the ttl.
CLAIM_OR_WAIT = Script("""
local record = redis.call('GET', KEYS[1])
local number = 0
if record then
  local state, owner = string.sub(record, 1, 1), string.sub(record, 3, 18)
  local left = redis.call('PTTL', KEYS[1]) - string.sub(record, 99, 111)
  if state == 'r' and owner == string.sub(ARGV[1], 3, 18) then return 1 end
  if state == 'r' and left <= 0 then state = 'u' end
  if state ~= 'u' or owner ~= ARGV[3] then
    if ARGV[4] == '1' then redis.call('SETRANGE', KEYS[1], 1, '1') end
    return state .. string.sub(record, 2, 98) .. string.format('%013.0f', math.max(0, left)) .. string.sub(record, 112)
  end
  local time = redis.call('TIME')
  number = math.max(time[1] * 1000000 + time[2], string.sub(record, 19, 34) + 1)
end
record = string.sub(ARGV[1], 1, 18) .. string.format('%016.0f', number) .. string.sub(ARGV[1], 35)
redis.call('SET', KEYS[1], record, 'PX', ARGV[2])
return 1
""")

# KEYS[1] - the record    KEYS[2] - a list, one for each owner, which gets an element if waiters are to be woken
# ARGV - owner, "d", "u", "f"(ree), "r" to extend or "n" for its number, answer, ttl or lease in ms
# Returns 0 if this owner no longer holds the claim. Repeating 'done' returns 1: the first reply may have been lost.
END = Script("""
local record = redis.call('GET', KEYS[1])
if not record or string.sub(record, 3, 18) ~= ARGV[1] then return 0 end
if string.sub(record, 1, 1) == 'd' then return ARGV[2] == 'd' and 1 or 0 end
if string.sub(record, 1, 1) == 'u' and (ARGV[2] == 'r' or ARGV[2] == 'n') then return 0 end
if ARGV[2] == 'r' then return redis.call('PEXPIRE', KEYS[1], ARGV[4] + string.sub(record, 99, 111)) end
if ARGV[2] == 'n' then
  local number = tonumber(string.sub(record, 19, 34))
  if number == 0 then
    local time = redis.call('TIME')
    number = time[1] * 1000000 + time[2]
    redis.call('SETRANGE', KEYS[1], 18, string.format('%016.0f', number))
  end
  return number
end
if ARGV[2] == 'f' then
  redis.call('DEL', KEYS[1])
else
  redis.call('SET', KEYS[1], ARGV[2] .. '0' .. string.sub(record, 3, 111) .. ARGV[3], 'PX', ARGV[4])
end
if string.sub(record, 2, 2) == '1' then
  redis.call('RPUSH', KEYS[2], 1)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
return 1
""")
STATES: dict[str, Any] = {"r": "running", "d": "done", "u": "unknown"}
MAX_BLOCK_SECONDS = 1.0  # of a single wait: it must end before the client's socket timeout


class RedisStore:
    """Store for `Claims(RedisStore(redis))`.

    redis    a redis.asyncio client, of one server, a Sentinel or a cluster
    name     keeps the claims of one use apart from those of others
    timeout  how long each step may take, in seconds; None: as long as the client waits
    """

    def __init__(self, redis: Any, *, name: str = "", timeout: float | None = None) -> None:
        self._scripts, self._redis = Timed(redis, timeout), redis
        self._prefix = f"distsys:idempotency:{hash_tag(name)}:"

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, takeover_from: int = 0, notify: bool = False
    ) -> Found:
        """Claim the key, as `Store.claim` says, in one plain command if it is free or done."""
        owner, keys, kept = 1 + int.from_bytes(urandom(7)), self._keys(key)[:1], milliseconds(ttl)
        mine, expires_in = f"r0{owner:016x}{0:016d}{fingerprint.hex()}{kept:013d}", milliseconds(lease) + kept
        there: Any = None
        try:
            if not takeover_from:
                there = await self._scripts.run(CLAIM, keys, mine, "NX", "GET", "PX", expires_in)
                if there is None:
                    return Found("claimed", owner, fingerprint, b"", lease)
            if takeover_from or there[:1] not in ("d", b"d"):
                wake = "1" if notify else ""
                there = await self._scripts.run(CLAIM_OR_WAIT, keys, mine, expires_in, f"{takeover_from:016x}", wake)
        except BaseException as error:  # the server may have claimed it all the same, and nobody else would end it
            if str(error) == "syntax error":
                error.add_note("claims need Redis 7.0 or Valkey: SET with both NX and GET")
            ended = self.end(key, owner, "unknown" if takeover_from else "free", b"", ttl)
            in_background(ended, f"giving back what may be claimed of {key!r}")
            raise
        if there == 1:
            return Found("claimed", owner, fingerprint, b"", lease)
        record: str = there.decode() if isinstance(there, bytes) else there
        before, answer = bytes.fromhex(record[34:98]), record[111:].encode("latin-1")
        return Found(STATES[record[0]], int(record[2:18], 16), before, answer, int(record[98:111]) / 1000)

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        """End the claim; return False, without effect, if this owner no longer holds it. Idempotent for 'done'."""
        text = answer.decode("latin-1")  # a client with decode_responses=True has to read it back
        return bool(await self._run_end(key, owner, state[0], text, ttl))

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        """Extend the lease; return False, without effect, if this owner no longer holds the claim."""
        return bool(await self._run_end(key, owner, "r", "", lease))

    async def fence(self, key: str, owner: int) -> int:
        """Return the claim's number, drawn when it is first asked for; 0 if this owner no longer holds the claim."""
        return int(await self._run_end(key, owner, "n", "", 0))

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        """Wait at most `timeout` seconds for the end of the claim.

        The waiter moves the element from the left end of the list to the right, so that it wakes all waiters.
        """
        ended, now = self._keys(key, owner)[1], asyncio.get_running_loop().time
        socket_timeout = self._redis.get_connection_kwargs().get("socket_timeout") or 2 * MAX_BLOCK_SECONDS
        deadline, longest_block = now() + timeout, min(MAX_BLOCK_SECONDS, socket_timeout / 2)
        while (left := deadline - now()) > 0:
            seconds = max(0.001, min(left, longest_block))  # 0 would block for ever
            if await self._redis.blmove(ended, ended, seconds, "LEFT", "RIGHT") is not None:
                return

    def unavailable(self, error: Exception) -> bool:
        """Return whether the error means that Redis could not be reached."""
        return unavailable(error)

    def _run_end(self, key: str, owner: int, action: str, answer: str, seconds: float) -> Awaitable[Any]:
        return self._scripts.run(END, self._keys(key, owner), f"{owner:016x}", action, answer, milliseconds(seconds))

    def _keys(self, key: str, owner: int = 0) -> tuple[str, str]:
        record = f"{self._prefix}{{{hash_tag(key)}}}"
        return record, f"{record}:{owner}"
