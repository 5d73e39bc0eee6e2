-- revoke_owner: KEYS index, cut; ARGV offset, what all keys of the tag begin with, owner, reason, handle to spare or ''.
local prefix, owner, reason, spared = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local now = clock()
local alive, dead = members(prefix, KEYS[1], now)
local earlier = cut_of(prefix, owner)
-- A session made in the very microsecond of an earlier cut was dated after it: this cut is later still.
local cut_us = math.max(now, earlier and earlier[1] or 0)
for _, member in ipairs(alive) do cut_us = math.max(cut_us, member[2][CREATED]) end
-- The cut first: whatever happens to the rest of this script, from here on nobody of them is alive.
local left = math.max(redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2]), TOMBSTONE_US / 1000)
redis.call('SET', KEYS[2], cmsgpack.pack({cut_us, reason, spared}), 'PX', exact(left))
for _, member in ipairs(dead) do redis.call('ZREM', KEYS[1], member) end
local answer = {now}
for _, member in ipairs(alive) do
  if member[1] ~= spared then
    bury(prefix, member[1], {kind = 'record', value = member[2]}, reason, now)
    answer[#answer + 1] = member[1]
  end
end
return answer
