-- KEYS    {window, start, at, previous, current}, packed doubles: the length of the fixed window, when it began, when
--         this was written, the units of the window before, and its own; times in microseconds. No key: nothing admitted.
-- ARGV    [1] now in microseconds, or "" for the server's own clock
--         [2] {limit, window in microseconds, cost, mode}, doubles; mode 1 takes, 0 only looks, -1 gives back
-- Returns {1 if it passes, units counted afterwards, microseconds until it can pass, and until none is counted}
local ceil, floor, max, min = math.ceil, math.floor, math.max, math.min
local key, limit, window, cost, mode = KEYS[1], struct.unpack('<dddd', ARGV[2])
local now = tonumber(ARGV[1])
if not now then
  local t = redis.call('TIME')
  now = t[1] * 1000000 + t[2]
end

local start, previous, current, changed = now, 0, 0, false
local state = redis.call('GET', key)
if state then
  local length, at
  length, start, at, previous, current = struct.unpack('<ddddd', state)
  if at > now then  -- the clock was set back: go on as if no time had passed
    start, changed = start - (at - now), true
  end
  local passed = floor((now - start) / length)
  if passed == 1 then start, previous, current = start + length, current, 0 end
  if passed > 1 then start, previous, current = now, 0, 0 end
  if length ~= window then  -- another limit's window: let the same share of it have passed
    start, changed = now - min(window - 1, floor((now - start) * (window / length))), true
  end
end
local elapsed = now - start

local function weighted() return ceil(previous * (window - elapsed) / window) end
local function time_to_fit(count, room)  -- microseconds of a window until `count` is weighted to at most `room`
  return count > room and window - floor(room * window / count) or 0
end

local passes, wait, room = 1, 0, limit - cost - current
if mode < 0 then
  local older = min(cost, previous)
  previous, current, changed = previous - older, max(0, current - (cost - older)), true
elseif weighted() > room then
  passes = 0
  wait = room >= 0 and time_to_fit(previous, room) - elapsed or window - elapsed + time_to_fit(current, limit - cost)
  wait = max(1, wait)  -- beyond 2^53 the two roundings may differ by a microsecond
elseif mode > 0 then
  current, changed = current + cost, true
end
local reset = current > 0 and start + 2 * window - now or previous > 0 and start + window - now or 0
if changed and reset == 0 then
  redis.call('DEL', key)
elseif changed then
  local packed = struct.pack('<ddddd', window, start, now, previous, current)
  redis.call('SET', key, packed, 'PX', math.min(ceil(reset / 1000) + 1000, 2 ^ 53))
end
return {passes, current + weighted(), wait, reset}
