-- deny: KEYS denied token, or the log for an entry of another kind; ARGV offset, log or '', kind, id, until, not before.
local log, kind, until_us = ARGV[2], ARGV[3], tonumber(ARGV[5])
local now = clock()
if now >= until_us then return now end
if kind == 'jti' then
  local bytes = redis.pcall('GET', KEYS[1])
  local denial = type(bytes) == 'string' and unpacked(bytes, {'number', 'number'})
  -- Again, or shorter: what was promised stays.
  if not denial or denial[1] < until_us then
    redis.call('SET', KEYS[1], cmsgpack.pack({until_us, denial and denial[2] or now}), 'PX', milliseconds(until_us - now))
  end
end
announce(log, {{kind, ARGV[4], until_us, tonumber(ARGV[6])}}, now)
return now
