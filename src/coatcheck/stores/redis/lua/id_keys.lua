-- id_keys: KEYS id keys; ARGV candidate. The first candidate stays; SET NX GET in one needs a newer server.
local stored = redis.call('GET', KEYS[1])
if stored then return stored end
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
