-- KEYS    one sorted set: a member for each admission that is still in the window, whatever its cost. The score is the
--         server's microsecond of the admission. The member is {units admitted so far, its cost}: a count, so no two
--         members are equal, and big-endian, so those of one microsecond stay in order. No key: nothing admitted.
-- ARGV    [1] now in microseconds, or "" for the server's own clock
--         [2] {limit, window in microseconds, cost, mode}, doubles; mode 1 takes, 0 only looks, -1 gives back
-- Returns {1 if it passes, units in the window afterwards, microseconds until it can pass, and until all have left}
local key, limit, window, cost, mode = KEYS[1], struct.unpack('<dddd', ARGV[2])
local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000000 + t[2]
end

local function member(rank)
  local found = redis.call('ZRANGE', key, rank, rank, 'WITHSCORES')
  if not found[1] then return end
  local total, own = struct.unpack('>dI4', found[1])
  return total, own, tonumber(found[2])
end

local total, _, newest = member(-1)
if newest and newest > now then
  -- The clock was set back. How long ago the members with a later time were admitted is unknown: count them from now.
  for _, ahead in ipairs(redis.call('ZRANGEBYSCORE', key, '(' .. string.format('%.0f', now), '+inf')) do
    redis.call('ZADD', key, now, ahead)
  end
  newest = now
end
local first, own, oldest
if total then first, own, oldest = member(0) end
if oldest and oldest <= now - window then
  redis.call('ZREMRANGEBYSCORE', key, '-inf', now - window)
  first, own, oldest = member(0)
end
if not first then total, first, own = 0, 0, 0 end
local base = first - own  -- units admitted before the window
local used = total - base

local function holder(units)  -- rank of the member that holds this unit, counted from the oldest
  local low, high = 0, math.min(units, redis.call('ZCARD', key)) - 1  -- each member holds at least one
  while low < high do
    local middle = math.floor((low + high) / 2)
    if member(middle) - base >= units then high = middle else low = middle + 1 end
  end
  return low
end

if mode < 0 then
  local units = math.min(cost, used)
  if units > 0 then
    local rank = holder(units)
    local upto, _, at = member(rank)
    redis.call('ZREMRANGEBYRANK', key, 0, rank)
    base, used = base + units, used - units
    if upto > base then redis.call('ZADD', key, at, struct.pack('>dI4', upto, upto - base)) end
    if used > 0 then redis.call('PEXPIRE', key, math.ceil((newest + window - now) / 1000) + 1000) end
  end
  return {1, used, 0, used > 0 and newest + window - now or 0}
end

local over = used + cost - limit  -- units that have to leave first
if total + cost > 9007199254740991 then over = used end  -- 2^53 - 1: the count begins anew when all have left
if over > 0 then
  local _, at = nil, oldest
  if over > own then _, _, at = member(holder(over)) end
  redis.call('PEXPIRE', key, math.ceil((newest + window - now) / 1000) + 1000)  -- a window may be longer than it was
  return {0, used, at + window - now, newest + window - now}
end
if mode > 0 then
  redis.call('ZADD', key, now, struct.pack('>dI4', total + cost, cost))
  redis.call('PEXPIRE', key, math.ceil(window / 1000) + 1000)  -- a second more than needed; never 0
  used, newest = used + cost, now
end
return {1, used, 0, used > 0 and newest + window - now or 0}
