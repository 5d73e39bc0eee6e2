-- One step of sweep: KEYS session or family that stands alone; ARGV offset, how much may be removed. Unreadable sessions
-- stay, for whoever has to find out. Answers how much was removed, and until when the session of this tombstone has to be
-- on the denylist of a Cluster, or 0.
local key_of, root = place(KEYS[1])
local allowance = tonumber(ARGV[2])
local now = clock()

-- Families whose time is over, ended ones too; their sealed successors.
local function families_swept(key)
  local removed, found = 0, redis.pcall('HGETALL', key)
  for position = 1, found.err and 0 or #found, 2 do
    if removed >= allowance then break end
    local family = family_from(found[position + 1])
    if not family or now >= end_of(family) then
      removed = removed + redis.call('HDEL', key, found[position])
      redis.pcall('DEL', sealed_key(key_of, root, found[position]))
    end
  end
  return removed
end

if string.sub(KEYS[1], -24, -24) == 'g' then return {families_swept(KEYS[1]), 0} end
local state = look(key_of, root, now)
local due, denied = nil, 0
if state.kind == 'ended' then
  denied = state.value[DENIED]
  due = math.max(state.value[UNTIL], denied)
elseif state.kind == 'record' then
  due = math.min(absolute_of(state.value), state.seen + length(state.value[IDLE]) + TOMBSTONE_US)
end
if not due or now < due then
  return {state.kind == 'record' and families_swept(key_of('f', root)) or 0, denied > now and denied or 0}
end
if state.kind == 'record' then redis.pcall('ZREM', owned(key_of, 'u', state.value[OWNER]), root) end
disown(key_of, root)
redis.call('DEL', KEYS[1], key_of('r', root))
return {1, 0}
