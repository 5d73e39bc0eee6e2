-- hit: KEYS limit; ARGV offset, interval between attempts, burst, cost; whole microseconds all. Answers allowed (0 or
-- 1), what is left of the burst, and how long to wait. The value is the time at which the limit is full again.
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2]) + tonumber(ARGV[1])
local interval, burst = tonumber(ARGV[2]), tonumber(ARGV[3])
local stored = redis.pcall('GET', KEYS[1])
local full = type(stored) == 'string' and tonumber(stored) or now
local function keep(moment)
  local left = string.format('%.0f', math.ceil((moment - now) / 1000))
  redis.call('SET', KEYS[1], string.format('%.0f', moment), 'PX', left)
end
-- Written so that what is not a number fails both: a hostile value must not lock anybody out for ever.
if not (full > now) then full = now end
if not (full <= now + burst) then
  full = now + burst
  keep(full)
end
local wanted = full + tonumber(ARGV[4]) * interval
if wanted - now > burst then return {0, burst - (full - now), wanted - now - burst} end
keep(wanted)
return {1, burst - (wanted - now), 0}
