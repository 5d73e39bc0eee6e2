-- rotate_refresh: KEYS session and its families, or the family that stands alone; ARGV offset, name, generation, digest,
-- successor, sealed successor, grace, client, key, how long to deny or 0, log or '', then, where the owner's cut was asked
-- for before because a slot moves, '' or the cut. Answers last the sealed successor, or 1: on a Cluster it has to be put,
-- or asked for, by a command of its own.
local key_of, root = place(KEYS[1])
local bound = #KEYS == 2
local families = bound and KEYS[2] or KEYS[1]
local name, generation, digest, successor, sealed = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6]
local grace_us, deny_us, log = tonumber(ARGV[7]), tonumber(ARGV[10]), ARGV[11]
local now = clock()

local state = {}
if bound then
  state = look(key_of, root, now)
  -- What cannot be read is nobody's session, so nobody learns that there was one.
  if state.kind == 'none' or state.kind == 'broken' then return {'unknown', now} end
  if state.why then return {'ended', now, state.why, state.at} end
end
local stored = redis.pcall('HGET', families, name)
local family = family_from(stored)
if not family then return {'unknown', now} end
if family[CLIENT] ~= ARGV[8] or family[HOLDER] ~= ARGV[9] then return {'holder', now} end
if family[OVER] ~= '' then return {'ended', now, family[OVER], family[OVER_AT]} end
if not bound and family[OWNED_BY] ~= '' then
  local cut
  if ARGV[12] then
    cut = cut_from(ARGV[12])
  else
    local reply = redis.pcall('GET', owned(key_of, 'c', family[OWNED_BY]))
    if type(reply) == 'table' and reply.err and not string.find(reply.err, 'WRONGTYPE', 1, true) then
      -- While a slot moves the cut may be elsewhere, and nothing else ends this family: it has to be asked for first.
      return redis.error_reply('TRYAGAIN the cut of an owner is out of reach')
    end
    cut = cut_from(reply)
  end
  local at, reason = cut_off(cut, family)
  if at then return {'ended', now, reason, at} end
end
if now >= family[LIMIT] then return {'ended', now, 'absolute_timeout', family[LIMIT]} end
if now >= end_of(family) then return {'ended', now, 'idle_timeout', end_of(family)} end

local hidden = sealed_key(key_of, root, name)
-- The activity first, the family last: while a slot moves the index may be out of reach, and then no rotation has
-- happened.
local function active()
  if bound and now > state.seen then enlist(key_of, root, state.value, now, now) end
end
local function answer(what, extra)
  return {what, now, stored, state.seen or 0, state.bytes or '', extra}
end
local function save_family()
  stored = cmsgpack.pack(family)
  redis.call('HSET', families, name, stored)
end

if generation == family[GENERATION] then
  if digest ~= family[CURRENT] then return {'unknown', now} end
  active()
  if now < family[ROTATED] + grace_us then
    if family[HELD] == 1 then
      family[HELD] = 0
      redis.pcall('DEL', hidden)
      save_family()
    end
    return answer('kept')
  end
  local held, apart = grace_us > 0 and sealed ~= '', nil
  if held then
    local put = redis.pcall('SET', hidden, sealed, 'PX', exact(math.ceil(grace_us / 1000)))
    if put.err then
      -- A slot that moves takes no new keys where it was; a full server has to stop the rotation.
      if not string.find(put.err, 'non local key', 1, true) then return put end
      apart = 1
    end
  elseif family[HELD] == 1 then
    redis.pcall('DEL', hidden)
  end
  family[BEFORE], family[GRACE], family[HELD] = family[CURRENT], now + grace_us, held and 1 or 0
  family[CURRENT], family[GENERATION], family[ROTATED] = successor, generation + 1, now
  save_family()
  return answer('rotated', apart)
end
if generation > family[GENERATION] or generation < 1 then return {'unknown', now} end
if generation == family[GENERATION] - 1 then
  if digest ~= family[BEFORE] then return {'unknown', now} end
  if successor == family[CURRENT] then
    active()
    return answer('rotated')
  end
  if now < family[GRACE] then
    active()
    local bytes = family[HELD] == 1 and redis.pcall('GET', hidden)
    if family[HELD] ~= 1 then return answer('replayed') end
    return answer('replayed', type(bytes) == 'string' and bytes or 1)
  end
end

-- Reused: whoever has the current token may be the thief.
if bound and family[CLIENT] == '' then
  bury(key_of, root, state, 'refresh_reused', now, owed(log, deny_us, now))
  if deny_us > 0 then announce(log, {sid_entry(key_of, root, deny_us, now)}, now) end
  return {'reused', now, stored, 1}
end
local before = stored
family[OVER], family[OVER_AT], family[HELD] = 'refresh_reused', now, 0
redis.pcall('DEL', hidden)
save_family()
return {'reused', now, before, 0}
