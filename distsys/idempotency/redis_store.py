"""Claims kept in Redis: one plain command claims what is free or reads what is done; scripts do the rest.

A first attempt and a replay are all that most keys ever see, and a plain command is the least that they can cost. So a
record says for itself how long a lease there is, in its time to live; and a fencing number is drawn by who asks for it.
It is the server's time in microseconds, made larger than the one before: it grows also where the record in between was
deleted. Needs Redis 7.0: SET with NX and GET.
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
#   1 r(unning), d(one), u(nknown)     2 whether somebody is to be told of its end     3-18 owner, in hexadecimal
#   19-34 fencing number, 0 before it is drawn     35-98 fingerprint     99-111 ttl, ms     112- answer
# A running one expires a ttl after its lease: less than that is left when the lease is over, and it counts as unknown.
CLAIM = Command("SET", get=True)  # the record unless there is one: then that

# KEYS[1] - the record
# ARGV - record of the new claim, its time to live in ms, owner of a claim to take over, "1" to be told of the end
# Returns 1 when it is claimed; else the record that is there, with the ms that are left of its lease for the ttl.
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

# KEYS[1] - the record    KEYS[2] - a list, one for each owner, which gets an element if somebody is to be told
# ARGV - owner, "d", "u", "f"(ree), "r" to extend or "n" for its number, answer, ttl or lease in ms
# Returns 0 when the claim of that owner is over; but who is not heard may say that it is done again.
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
SLICE = 1.0  # longest single wait: it must end before the client's socket timeout


class RedisStore:
    """`Claims(RedisStore(redis))`. `timeout` bounds each step, in seconds; None: as long as the client waits."""

    def __init__(self, redis: Any, *, name: str = "", timeout: float | None = None) -> None:
        self._scripts = Timed(redis, timeout)
        self._redis, self._prefix = self._scripts.redis, f"distsys:idempotency:{hash_tag(name)}:"

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, over: int = 0, waits: bool = False
    ) -> Found:
        owner, keys, kept = 1 + int.from_bytes(urandom(7)), self._keys(key)[:1], milliseconds(ttl)
        mine, lives = f"r0{owner:016x}{0:016d}{fingerprint.hex()}{kept:013d}", milliseconds(lease) + kept
        try:
            there: Any = None if over else await self._scripts.run(CLAIM, keys, mine, "NX", "GET", "PX", lives)
            if there is None and not over:
                return Found("claimed", owner, fingerprint, b"", lease)
            if over or there[:1] not in ("d", b"d"):
                told = "1" if waits else ""
                there = await self._scripts.run(CLAIM_OR_WAIT, keys, mine, lives, f"{over:016x}", told)
        except BaseException as error:  # not heard, or cancelled: the server may have done it, and nobody would end it
            if str(error) == "syntax error":
                error.add_note("claims need Redis 7.0 or Valkey: SET with both NX and GET")
            ended = self.end(key, owner, "unknown" if over else "free", b"", ttl)
            in_background(ended, f"giving back what may be claimed of {key!r}")
            raise
        if there == 1:
            return Found("claimed", owner, fingerprint, b"", lease)
        record: str = there.decode() if isinstance(there, bytes) else there
        before, answer = bytes.fromhex(record[34:98]), record[111:].encode("latin-1")
        return Found(STATES[record[0]], int(record[2:18], 16), before, answer, int(record[98:111]) / 1000)

    async def end(self, key: str, owner: int, state: End, answer: bytes, ttl: float) -> bool:
        text = answer.decode("latin-1")  # a client with decode_responses=True has to read it back
        return bool(await self._end(key, owner, state[0], text, ttl))

    async def extend(self, key: str, owner: int, lease: float) -> bool:
        return bool(await self._end(key, owner, "r", "", lease))

    async def fence(self, key: str, owner: int) -> int:
        return int(await self._end(key, owner, "n", "", 0))

    def _end(self, key: str, owner: int, what: str, answer: str, seconds: float) -> Awaitable[Any]:
        return self._scripts.run(END, self._keys(key, owner), f"{owner:016x}", what, answer, milliseconds(seconds))

    async def wait(self, key: str, owner: int, timeout: float) -> None:
        """The element goes round, so that it wakes all who wait."""
        ended, now = self._keys(key, owner)[1], asyncio.get_running_loop().time
        patience = self._redis.get_connection_kwargs().get("socket_timeout") or 2 * SLICE
        deadline, slice_ = now() + timeout, min(SLICE, patience / 2)
        while (left := deadline - now()) > 0:
            seconds = max(0.001, min(left, slice_))  # 0 would be for ever
            if await self._redis.blmove(ended, ended, seconds, "LEFT", "RIGHT") is not None:
                return

    def unavailable(self, error: Exception) -> bool:
        return unavailable(error)

    def _keys(self, key: str, owner: int = 0) -> tuple[str, str]:
        record = f"{self._prefix}{{{hash_tag(key)}}}"
        return record, f"{record}:{owner}"
