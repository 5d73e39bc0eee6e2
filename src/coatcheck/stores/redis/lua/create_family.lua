-- create_family: KEYS session and its families, or, standing alone: family, cut and mark of its owner; ARGV offset, name,
-- digest, owner, subject, client, key, grant, idle, absolute (a length), most families of a session.
local key_of, root = place(KEYS[1])
local bound = #KEYS == 2
local families = bound and KEYS[2] or KEYS[1]
local name, digest, owner, most = ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[11])
local now = clock()
local state, created = {}, now
if bound then
  state = look(key_of, root, now)
  if state.why then return {'gone', now, state.why} end
end
local cut = not bound and owner ~= '' and cut_of(key_of, owner) or nil
local stored = redis.pcall('HGET', families, name)
if type(stored) == 'string' then
  local family = family_from(stored)
  -- The call again, and nothing has happened since. Anything later must not look like a family that begins.
  if not family or family[CURRENT] ~= digest or family[OVER] ~= '' or cut_off(cut, family) then return {'taken', now} end
  return {'created', now, stored, state.bytes}
end
if cut then created = math.max(now, cut[1] + 1) end
local absolute = created + tonumber(ARGV[10])
local family = cmsgpack.pack({
  SCHEMA, 1, digest, owner, ARGV[5], ARGV[6], ARGV[7], ARGV[8], created, created, tonumber(ARGV[9]), absolute,
  '', 0, 0, '', 0,
})

if not bound then
  -- A cut must outlive, and be later than, every family it ends.
  local latest = math.max(created, latest_alone(KEYS[3]))
  local left = math.max(redis.call('PTTL', KEYS[3]), tonumber(milliseconds(absolute - now)))
  redis.call('SET', KEYS[3], exact(latest), 'PX', exact(left))
end
local kind = redis.call('TYPE', families)
if kind.ok ~= 'hash' and kind.ok ~= 'none' then redis.call('DEL', families) end
if bound and redis.call('HLEN', families) >= most then
  local others, pairs_of = {}, redis.call('HGETALL', families)
  local function drop(other)
    redis.call('HDEL', families, other)
    redis.pcall('DEL', sealed_key(key_of, root, other))
  end
  -- Nobody may lose a live token to one that is worth nothing any more.
  for position = 1, #pairs_of, 2 do
    local other = family_from(pairs_of[position + 1])
    if not other or other[OVER] ~= '' or now >= end_of(other) then
      drop(pairs_of[position])
    else
      others[#others + 1] = {other[BORN], pairs_of[position]}
    end
  end
  table.sort(others, function(one, other)
    if one[1] ~= other[1] then return one[1] < other[1] end
    return one[2] < other[2]
  end)
  for rank = 1, #others - most + 1 do drop(others[rank][2]) end
end
redis.call('HSET', families, name, family)
local wanted = milliseconds((bound and absolute_of(state.value) or absolute) - now)
if redis.call('PTTL', families) < tonumber(wanted) then redis.call('PEXPIRE', families, wanted) end
return {'created', now, family, state.bytes}
