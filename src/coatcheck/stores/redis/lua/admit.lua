-- create and admit: KEYS session; ARGV offset, digest, owner, subject, idle, absolute (a length), authority,
-- what to do at the limit, the limit, handle to supersede or '', how long to deny what ends, log or '', reason for who
-- gives way, handles that were shown and handles to end (each list in one word, between blanks; only for 'choice'), then
-- names and texts of the fields. Answers also whether the superseded session was ended, and the handles that were evicted.
local function created_answer(now, created, replaced, evicted)
  local answer = {'created', now, created, replaced and 1 or 0}
  for _, handle in ipairs(evicted) do answer[#answer + 1] = handle end
  return answer
end

local function handles_in(words)
  local known, count = {}, 0
  for each in string.gmatch(words, '%S+') do
    known[each], count = true, count + 1
  end
  return {known = known, count = count}
end

local key_of, handle = place(KEYS[1])
local digest, owner, on_limit, maximum, supersedes = ARGV[2], ARGV[3], ARGV[8], tonumber(ARGV[9]), ARGV[10]
local deny_us, log, reason = tonumber(ARGV[11]), ARGV[12], ARGV[13]
local now = clock()
local taken = look(key_of, handle, now)
if taken.kind == 'record' and taken.value[DIGEST] == digest then
  -- The call again: on a Cluster whoever gave way may be missing on the denylist, and once more does no harm.
  return created_answer(now, taken.value[CREATED], supersedes ~= '', taken.value[EVICTED])
elseif taken.kind == 'ended' and taken.value[ENDED_DIGEST] == digest then
  return created_answer(now, taken.value[ENDED_CREATED], supersedes ~= '', {})
elseif taken.kind ~= 'none' then
  return {'taken', now}
end

local evicted, replaced, denied = {}, nil, {}
if on_limit ~= 'create' then
  local index = owned(key_of, 'u', owner)
  local alive, dead = members(key_of, index, now)
  local counted = {}
  for _, member in ipairs(alive) do
    if member[1] == supersedes then replaced = member else counted[#counted + 1] = member end
  end
  local surplus = on_limit == 'allow' and 0 or math.max(0, #counted + 1 - maximum)
  local refused = surplus > 0 and on_limit ~= 'evict_oldest'
  local leaving = {}
  if on_limit == 'choice' then
    local shown, unseen, ending = handles_in(ARGV[14]), 0, handles_in(ARGV[15])
    for _, member in ipairs(counted) do
      if shown.known[member[1]] then shown.count = shown.count - 1 else unseen = unseen + 1 end
      if ending.known[member[1]] then leaving[#leaving + 1] = member end
    end
    refused = unseen > 0 or shown.count > 0 or #leaving < ending.count or #leaving < surplus
  else
    for rank = 1, math.min(surplus, #counted) do leaving[rank] = counted[rank] end
  end
  if refused then
    local answer = {'limit', now}
    for _, member in ipairs(counted) do answer[#answer + 1] = member[1] end
    return answer
  end
  for _, member in ipairs(dead) do redis.call('ZREM', index, member) end
  local function give_way(member, why)
    bury(key_of, member[1], {kind = 'record', value = member[2]}, why, now, owed(log, deny_us, now))
    denied[#denied + 1] = sid_entry(key_of, member[1], deny_us, now)
  end
  if replaced then give_way(replaced, 'superseded') end
  for rank, member in ipairs(leaving) do
    give_way(member, reason)
    evicted[rank] = member[1]
  end
else
  -- Without a count nobody walks the index, so two that were silent longest are looked at: it stays bounded.
  local index = owned(key_of, 'u', owner)
  local oldest = redis.pcall('ZRANGE', index, 0, 1)
  for _, member in ipairs(oldest.err and {} or oldest) do
    if look(key_of, member, now).why then redis.call('ZREM', index, member) end
  end
end

local cut = owner ~= '' and cut_of(key_of, owner)
local created = cut and math.max(now, cut[1] + 1) or now
local fields = {}
for position = 16, #ARGV do fields[#fields + 1] = ARGV[position] end
local record = {
  SCHEMA, 1, digest, owner, ARGV[4], created, owner ~= '' and 0 or -1, packed_length(tonumber(ARGV[5])),
  packed_length(tonumber(ARGV[6])), ARGV[7], fields, evicted,
}
save(key_of, handle, record, now)
enlist(key_of, handle, record, created, now)
if deny_us > 0 then announce(log, denied, now) end
return created_answer(now, created, replaced, evicted)
