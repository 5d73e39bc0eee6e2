-- A tombstone's denial is in the log: KEYS session; ARGV offset, the time it was announced with.
local kind, tombstone = read(KEYS[1])
if kind ~= 'ended' or tombstone[DENIED] ~= tonumber(ARGV[2]) then return 0 end
tombstone[DENIED] = 0
redis.call('SET', KEYS[1], cmsgpack.pack(tombstone), 'KEEPTTL')
return 1
