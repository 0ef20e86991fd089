"""Claims kept in Redis: one script claims or says what there is, another ends or extends.

The fencing number is the server's time in microseconds, made larger than the one before: it grows also where the record
in between was deleted, so that a stale owner never meets its own number again.
"""

from __future__ import annotations

import asyncio
from os import urandom
from typing import Any

from distsys.idempotency.claims import End, Found
from distsys.redis_scripts import Script, Timed, hash_tag, milliseconds, unavailable
from distsys.tasks import in_background

# A record is one string, so that each script reads and writes it in one command. Its parts, from 1 as Lua counts:
#   1 r(unning), d(one), u(nknown)     2 whether somebody is to be told of its end     3-18 number
#   19-31 end of the lease, ms     32-95 fingerprint     96-111 who asked     112- answer
# KEYS[1] - the record
# ARGV - fingerprint and who asks, lease in ms, ttl in ms, number of a claim to take over, "1" to be told of the end
# Returns the number of the new claim; else the record that is there, with the ms that are left of its lease. A running
# one past its lease is unknown. Who heard no answer asks again, and is not held up by a claim of its own.
CLAIM = Script("""
local record = redis.call('GET', KEYS[1])
local state = record and string.sub(record, 1, 1)
if state == 'd' then return record end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local fence = time[1] * 1000000 + time[2]
if record then
  local number, left = string.sub(record, 3, 18), string.sub(record, 19, 31) - now
  if state == 'r' and left <= 0 then state = 'u' end
  local free = state == 'u' and tonumber(number) == tonumber(ARGV[4])
  if state == 'r' and string.sub(record, 96, 111) == string.sub(ARGV[1], 65) then free = true end
  if not free then
    if ARGV[5] == '1' then redis.call('SETRANGE', KEYS[1], 1, '1') end
    return state .. string.sub(record, 2, 18) .. string.format('%013.0f', math.max(0, left)) .. string.sub(record, 32)
  end
  fence = math.max(fence, number + 1)
end
record = string.format('r0%016.0f%013.0f', fence, now + ARGV[2]) .. ARGV[1]
redis.call('SET', KEYS[1], record, 'PX', ARGV[2] + ARGV[3])
return fence
""")

# KEYS[1] - the record    KEYS[2] - a list, one for each number, which gets an element if somebody is to be told
# ARGV - number, "d", "u", "f"(ree) or "r", answer, ttl or lease in ms
# Returns 0 when the claim with that number is over; but who is not heard may say that it is done again.
END = Script("""
local record = redis.call('GET', KEYS[1])
if not record or string.sub(record, 3, 18) ~= ARGV[1] then return 0 end
if string.sub(record, 1, 1) == 'd' then return ARGV[2] == 'd' and 1 or 0 end
if ARGV[2] == 'r' then
  local time = redis.call('TIME')
  redis.call('SETRANGE', KEYS[1], 18, string.format('%013.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[4]))
  if redis.call('PTTL', KEYS[1]) < 2 * ARGV[4] then redis.call('PEXPIRE', KEYS[1], 2 * ARGV[4]) end
  return 1
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
        asks = fingerprint.hex() + urandom(8).hex()
        args = asks, milliseconds(lease), milliseconds(ttl), over, "1" if waits else ""
        try:
            reply = await self._scripts.run(CLAIM, self._keys(key)[:1], *args)
        except BaseException:  # not heard, or cancelled: the server may have done it, and nobody would ever end it
            in_background(self._give_back(key, over, args), f"giving back what may be claimed of {key!r}")
            raise
        if isinstance(reply, int):
            return Found("claimed", reply, fingerprint, b"", lease)
        record: str = reply.decode() if isinstance(reply, bytes) else reply
        before, answer = bytes.fromhex(record[31:95]), record[111:].encode("latin-1")
        return Found(STATES[record[0]], int(record[2:18]), before, answer, int(record[18:31]) / 1000)

    async def _give_back(self, key: str, over: int, args: tuple[Any, ...]) -> None:
        reply = await self._scripts.run(CLAIM, self._keys(key)[:1], *args)
        if isinstance(reply, int):
            await self.end(key, reply, "unknown" if over else "free", b"", args[2] / 1000)

    async def end(self, key: str, fence: int, state: End, answer: bytes, ttl: float) -> bool:
        text = answer.decode("latin-1")  # a client with decode_responses=True has to read it back
        return bool(
            await self._scripts.run(END, self._keys(key, fence), _number(fence), state[0], text, milliseconds(ttl))
        )

    async def extend(self, key: str, fence: int, lease: float) -> bool:
        return bool(await self._scripts.run(END, self._keys(key, fence), _number(fence), "r", "", milliseconds(lease)))

    async def wait(self, key: str, fence: int, timeout: float) -> None:
        """The element goes round, so that it wakes all who wait."""
        ended, now = self._keys(key, fence)[1], asyncio.get_running_loop().time
        patience = self._redis.get_connection_kwargs().get("socket_timeout") or 2 * SLICE
        deadline, slice_ = now() + timeout, min(SLICE, patience / 2)
        while (left := deadline - now()) > 0:
            seconds = max(0.001, min(left, slice_))  # 0 would be for ever
            if await self._redis.blmove(ended, ended, seconds, "LEFT", "RIGHT") is not None:
                return

    def unavailable(self, error: Exception) -> bool:
        return unavailable(error)

    def _keys(self, key: str, fence: int = 0) -> tuple[str, str]:
        record = f"{self._prefix}{{{hash_tag(key)}}}"
        return record, f"{record}:{fence}"


def _number(fence: int) -> str:
    """As it stands in the record."""
    return f"{fence:016d}"
