"""Claims kept in Redis: one script claims or says what there is, another ends or extends.

The fencing number is the server's time in microseconds, made larger than the one before: it grows also where the record
in between was deleted, so that a stale owner never meets its own number again.
"""

from __future__ import annotations

import asyncio
from secrets import token_hex
from typing import Any

from distsys.idempotency.claims import End, Found
from distsys.redis_scripts import Script, Timed, hash_tag, milliseconds, unavailable
from distsys.tasks import in_background

# KEYS[1] - the record
# ARGV - fingerprint, lease in ms, ttl in ms, number of a claim to take over, "1" to be told of the end, who asks
# Who heard no answer asks again, and is not held up by a claim of its own.
# Returns {state, number, fingerprint, answer, ms of the lease left}. A running one past its lease is unknown.
CLAIM = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local record = redis.call('HMGET', KEYS[1], 'state', 'fence', 'until', 'fingerprint', 'answer', 'by')
local state, fence = record[1], tonumber(record[2] or 0)
if state == 'running' and record[6] == ARGV[6] then state = nil end
if state == 'running' and tonumber(record[3]) <= now then state = 'unknown' end
if state and not (state == 'unknown' and record[2] == ARGV[4]) then
  if ARGV[5] == '1' then redis.call('HSET', KEYS[1], 'awaited', 1) end
  return {state, fence, record[4], record[5] or '', state == 'running' and record[3] - now or 0}
end
fence = math.max(time[1] * 1000000 + time[2], fence + 1)
redis.call('HSET', KEYS[1], 'state', 'running', 'fence', string.format('%.0f', fence),
  'until', string.format('%.0f', now + ARGV[2]), 'fingerprint', ARGV[1], 'by', ARGV[6])
redis.call('PEXPIRE', KEYS[1], ARGV[2] + ARGV[3])
return {'claimed', fence, ARGV[1], '', ARGV[2]}
""")

# KEYS[1] - the record    KEYS[2] - a list, one for each number, which gets an element if somebody is to be told
# ARGV - number, "done", "unknown", "free" or "running", answer, ttl or lease in ms
# Returns 0 when the claim with that number is over; but who is not heard may say "done" again.
END = Script("""
local record = redis.call('HMGET', KEYS[1], 'state', 'fence', 'awaited')
if record[2] ~= ARGV[1] then return 0 end
if record[1] == 'done' then return ARGV[2] == 'done' and 1 or 0 end
if ARGV[2] == 'running' then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'until', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[4]))
  if redis.call('PTTL', KEYS[1]) < 2 * ARGV[4] then redis.call('PEXPIRE', KEYS[1], 2 * ARGV[4]) end
  return 1
end
if ARGV[2] == 'free' then
  redis.call('DEL', KEYS[1])
else
  redis.call('HSET', KEYS[1], 'state', ARGV[2], 'answer', ARGV[3])
  redis.call('PEXPIRE', KEYS[1], ARGV[4])
end
if record[3] then
  redis.call('RPUSH', KEYS[2], 1)
  redis.call('PEXPIRE', KEYS[2], 60000)
end
return 1
""")
SLICE = 1.0  # longest single wait: it must end before the client's socket timeout


class RedisStore:
    """`Claims(RedisStore(redis))`. `timeout` bounds each step, in seconds; None: as long as the client waits."""

    def __init__(self, redis: Any, *, name: str = "", timeout: float | None = None) -> None:
        self._scripts = Timed(redis, timeout)
        self._redis, self._prefix = self._scripts.redis, f"distsys:idempotency:{hash_tag(name)}:"

    async def claim(
        self, key: str, fingerprint: bytes, *, lease: float, ttl: float, over: int = 0, waits: bool = False
    ) -> Found:
        asked = "1" if waits else "", token_hex(8)
        args = fingerprint.hex(), milliseconds(lease), milliseconds(ttl), over, *asked
        try:
            reply = await self._scripts.run(CLAIM, self._keys(key)[:1], *args)
        except BaseException:  # not heard, or cancelled: the server may have done it, and nobody would ever end it
            in_background(self._give_back(key, over, args), f"giving back what may be claimed of {key!r}")
            raise
        return self._found(reply)

    async def _give_back(self, key: str, over: int, args: tuple[Any, ...]) -> None:
        found = self._found(await self._scripts.run(CLAIM, self._keys(key)[:1], *args))
        if found.state == "claimed":
            await self.end(key, found.fence, "unknown" if over else "free", b"", args[2] / 1000)

    def _found(self, reply: Any) -> Found:
        state, fence, before, answer, left = reply
        found: Any = _text(state)
        return Found(found, fence, bytes.fromhex(_text(before)), _text(answer).encode("latin-1"), int(left) / 1000)

    async def end(self, key: str, fence: int, state: End, answer: bytes, ttl: float) -> bool:
        text = answer.decode("latin-1")  # a client with decode_responses=True has to read it back
        return bool(await self._scripts.run(END, self._keys(key, fence), fence, state, text, milliseconds(ttl)))

    async def extend(self, key: str, fence: int, lease: float) -> bool:
        return bool(await self._scripts.run(END, self._keys(key, fence), fence, "running", "", milliseconds(lease)))

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


def _text(reply: bytes | str) -> str:
    return reply.decode() if isinstance(reply, bytes) else reply
