-- write_ring: KEYS ring; ARGV bytes, expected version.
local stored = redis.call('HMGET', KEYS[1], 'version', 'packed')
local version, expected = tonumber(stored[1] or (stored[2] and '' or 0)), tonumber(ARGV[2])
-- Bytes without a version included: what cannot be read is never replaced.
if not version then return redis.error_reply('ERR the version of the key ring is no number') end
if version ~= expected then return 0 end
redis.call('HSET', KEYS[1], 'version', string.format('%.0f', expected + 1), 'packed', ARGV[1])
return 1
