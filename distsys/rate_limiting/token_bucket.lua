-- Numbers come packed, as little-endian doubles: unpacking costs a third of parsing.
-- KEYS    buckets, each {used, at, rest}: microtokens taken and not refilled yet; the server's microsecond for which that
--         holds; and a remainder of refill below one microtoken, in units of 1/den. No key: nothing is used.
-- ARGV    [1] now in microseconds, or "" for the server's own clock
--         [1 + i] of KEYS[i]: {capacity in microtokens, num, den}; it refills num/den microtokens per microsecond
--         then groups: {times, cost, i, j ..}, `times` requests in a row, each for `cost` microtokens from KEYS[i],
--         KEYS[j] .. (from all keys if none is named), together or not at all. A cost of 0 takes nothing, a negative one
--         gives back.
-- Returns for each group: how many requests were granted, then what was used in each of its buckets before.
local floor, max, min, pack, unpack = math.floor, math.max, math.min, struct.pack, struct.unpack
local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000000 + t[2]
end
local CAPACITY, NUM, DEN, USED, AT, REST, CHANGED = 1, 2, 3, 4, 5, 6, 7
local buckets, count = {}, #KEYS
for i = 1, count do
  local capacity, num, den = unpack('<ddd', ARGV[i + 1])
  local bucket = {capacity, num, den, 0, now, 0, false}
  local state = redis.call('GET', KEYS[i])
  if state then
    local used, at, rest = unpack('<ddd', state)
    -- After the clock was set back nothing refills until it has caught up: no microsecond counts twice.
    local elapsed = max(0, now - at)
    -- Whole multiples of den first: then no product reaches 2^53 before the bucket is full, so all of this is exact.
    local part = elapsed % den * num + min(rest, den - 1)
    used = used - floor(elapsed / den) * num - floor(part / den)
    if used > 0 then bucket[USED], bucket[REST] = used, part % den end
    bucket[AT] = max(now, at)
  end
  buckets[i] = bucket
end
local reply, length = {}, 0
for group = count + 2, #ARGV do
  local packed = ARGV[group]
  local granted, cost, at = unpack('<dd', packed)
  local own = at > #packed and buckets or {}
  while at <= #packed do
    local i
    i, at = unpack('<d', packed, at)
    own[#own + 1] = buckets[i]
  end
  for n = 1, cost > 0 and #own or 0 do
    granted = min(granted, max(0, floor((own[n][CAPACITY] - own[n][USED]) / cost)))
  end
  length = length + 1
  reply[length] = granted
  for n = 1, #own do
    local bucket = own[n]
    reply[length + n] = bucket[USED]
    if granted > 0 and cost ~= 0 then bucket[USED], bucket[CHANGED] = max(0, bucket[USED] + granted * cost), true end
  end
  length = length + #own
end
for i = 1, count do
  local bucket = buckets[i]
  if bucket[CHANGED] and bucket[USED] == 0 then
    redis.call('DEL', KEYS[i])
  elseif bucket[CHANGED] then
    local ms = math.ceil(bucket[USED] / bucket[NUM] * bucket[DEN] / 1000) + 1000  -- until it is full again; never 0
    redis.call('SET', KEYS[i], pack('<ddd', bucket[USED], bucket[AT], bucket[REST]), 'PX', min(ms, 2 ^ 53))
  end
end
return reply
