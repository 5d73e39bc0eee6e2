-- revoke_owner: KEYS index, cut, mark of the families that stand alone; ARGV offset, what the keys of the tag's sessions
-- begin with, owner, reason, handle to spare or '', how long to deny or 0, log or ''. Answers how many handles of sessions
-- it ended follow; behind them, on a Cluster, those that an earlier call ended and the denylist may lack.
local key_of, owner, reason, spared = keys_beside(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local deny_us, log = tonumber(ARGV[6]), ARGV[7]
local MAX_PENDING, MAX_CUT_OFF = 1000, 32
local now = clock()
local alive, dead = members(key_of, KEYS[1], now)
local earlier = cut_of(key_of, owner)
-- A session made in the very microsecond of an earlier cut was dated after it: this cut is later still.
local cut_us = math.max(now, earlier and earlier[1] or 0, latest_alone(KEYS[3]))
local denied, answer, pending = {}, {now, 0}, {}
for _, member in ipairs(alive) do
  cut_us = math.max(cut_us, member[2][CREATED])
  if member[1] ~= spared then
    answer[#answer + 1] = member[1]
    denied[#denied + 1] = sid_entry(key_of, member[1], deny_us, now)
  end
end
answer[2] = #denied
local until_us = owed(log, deny_us, now)
if until_us > 0 then
  -- The call again, whose answer was lost, must be able to name whom the first one ended. Only the latest call that
  -- ended anybody is remembered, or every sign-out would tell of all before it; older ones are left to the sweep.
  for position = 3, math.min(#answer, MAX_PENDING + 2) do pending[#pending + 1] = answer[position] end
  local known = earlier and type(earlier[4]) == 'table' and type(earlier[5]) == 'number' and now < earlier[5]
  for _, handle in ipairs(known and earlier[4] or {}) do
    if answer[2] == 0 then pending[#pending + 1] = handle end
    answer[#answer + 1] = handle
  end
end
-- Families that stand alone are judged by their owner's cut when they are presented: of those that an earlier cut ended
-- the reason and the time stay, while any of them may be kept. Beyond the most that are remembered the next one is told.
local known, cuts = earlier and type(earlier[CUT_OFF]) == 'table' and earlier[CUT_OFF] or {}, {}
for position = 1, #known - 2, 3 do
  if type(known[position + 2]) == 'number' and now < known[position + 2] then
    for member = position, position + 2 do cuts[#cuts + 1] = known[member] end
  end
end
if latest_alone(KEYS[3]) > (earlier and earlier[1] or 0) then
  cuts[#cuts + 1], cuts[#cuts + 2], cuts[#cuts + 3] = cut_us, reason, now + 1000 * redis.call('PTTL', KEYS[3])
end
while #cuts > 3 * MAX_CUT_OFF do table.remove(cuts, 1) end
-- The cut first: whatever happens to the rest of this script, from here on nobody of them is alive. It stays as long as
-- anything it ends could have lived.
local left = math.max(redis.call('PTTL', KEYS[1]), redis.call('PTTL', KEYS[2]), redis.call('PTTL', KEYS[3]))
left = math.max(left, TOMBSTONE_US / 1000)
redis.call('SET', KEYS[2], cmsgpack.pack({cut_us, reason, spared, pending, until_us, cuts}), 'PX', exact(left))
for _, member in ipairs(dead) do redis.call('ZREM', KEYS[1], member) end
for _, member in ipairs(alive) do
  if member[1] ~= spared then
    bury(key_of, member[1], {kind = 'record', value = member[2]}, reason, now, until_us)
  end
end
if deny_us > 0 then announce(log, denied, now) end
return answer
