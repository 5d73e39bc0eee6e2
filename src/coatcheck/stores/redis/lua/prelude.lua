-- What every script of sessions starts with: the clock, the keys, the record, the one rule of life and the denylist.
--
-- A script never trusts what it reads: a key of another type or bytes of another shape are "broken", never an error,
-- because an error in the middle would leave half of a write behind. Times are microseconds: doubles hold them
-- exactly, but only %.0f prints them exactly. No member of a record may be nil or an empty map: cmsgpack would turn
-- the array into something else. A record's members stay as they are stored while a script holds it, so that whatever
-- is not changed is written back as it was: OWNER, IDLE and ABSOLUTE are read by the functions below.

local SCHEMA = 1
local TOMBSTONE_US = 86400000000
-- Keys outlive their deadlines by this, so that it is the deadline in the record that decides.
local SLACK_MS = 120000

local VERSION, DIGEST, OWNER, SUBJECT, CREATED, AUTH, IDLE, ABSOLUTE, AUTHORITY, FIELDS, EVICTED =
  2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
local RECORD_TYPES = {
  'number', 'number', 'string', 'string', 'string', 'number', 'number', 'number', 'number', 'string', 'table', 'table',
}
-- DENIED: until when the session has to be on a denylist that was out of the script's reach; 0 once it is there. A
-- tombstone of an older release ends before it.
local REASON, AT, UNTIL, ENDED_DIGEST, ENDED_CREATED, DENIED = 3, 4, 5, 6, 7, 8
local ENDED_TYPES = {'number', 'string', 'string', 'number', 'number', 'string', 'number'}

local function exact(number)
  return string.format('%.0f', number)
end

-- The largest number up to which doubles hold every whole one.
local MOST = 9007199254740991

local function whole(number)
  return number >= 0 and number <= MOST and number == math.floor(number)
end

-- A length of time is stored in seconds where these are whole, else as microseconds below zero: a third of the octets,
-- and nothing is rounded.
local function packed_length(microseconds)
  if microseconds % 1000000 == 0 then return microseconds / 1000000 end
  return -microseconds
end

local function length(stored)
  return stored >= 0 and stored * 1000000 or -stored
end

-- ABSOLUTE is stored as a length, from the creation on.
local function absolute_of(record)
  return record[CREATED] + length(record[ABSOLUTE])
end

local function clock()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000000 + tonumber(time[2]) + tonumber(ARGV[1])
end

-- "<namespace>:s:{<tag>}" -> the function that names the keys of this tag: key_of(kind, name)
local function keys_beside(beginning)
  local namespace, tag = string.sub(beginning, 1, -9), string.sub(beginning, -7)
  return function(kind, name) return namespace .. kind .. tag .. name end
end

-- "<namespace>:s:{<tag>}<handle>" -> key_of, "<handle>"
local function place(key)
  return keys_beside(string.sub(key, 1, -17)), string.sub(key, -16)
end

-- The key of something an owner has one of: named by the first 16 characters of the owner.
local function owned(key_of, kind, owner)
  return key_of(kind, string.sub(owner, 1, 16))
end

local function shaped(value, types)
  for position, wanted in ipairs(types) do
    if type(value[position]) ~= wanted then return false end
  end
  return true
end

-- One array and nothing behind it, or nil. (`unpack` would put every one of a hostile million of values on the stack.)
local function unpacked(bytes, types)
  local fine, rest, value = pcall(cmsgpack.unpack_one, bytes)
  if fine and rest == -1 and type(value) == 'table' and shaped(value, types) then return value end
  return nil
end

local function sound_record(record)
  return record[1] == SCHEMA and whole(record[VERSION]) and whole(record[CREATED]) and whole(record[AUTH] + 1)
    and whole(length(record[IDLE])) and whole(absolute_of(record)) and #record[FIELDS] % 2 == 0
end

local function sound_tombstone(tombstone)
  return tombstone[1] == SCHEMA and tombstone[2] == 'ended' and whole(tombstone[AT]) and whole(tombstone[UNTIL])
    and whole(tombstone[ENDED_CREATED]) and whole(tombstone[DENIED])
end

-- 'none' | 'broken' | 'ended', tombstone | 'record', record, bytes
local function read(key)
  local bytes = redis.pcall('GET', key)
  if not bytes then return 'none' end
  if type(bytes) ~= 'string' then return 'broken' end
  local record = unpacked(bytes, RECORD_TYPES)
  if record and sound_record(record) then return 'record', record, bytes end
  local tombstone = unpacked(bytes, ENDED_TYPES)
  if not tombstone then return 'broken' end
  if type(tombstone[DENIED]) ~= 'number' then tombstone[DENIED] = 0 end
  if sound_tombstone(tombstone) then return 'ended', tombstone end
  return 'broken'
end

-- The latest "everybody out" of an owner: {time, reason, handle that was spared, handles that a Cluster's denylist may
-- still lack, until when they matter, cuts that ended families standing alone}, or nil. Of the last: time, reason and
-- until when any of those families may be kept, one after the other, oldest first, this cut included if it ended any.
local CUT_OFF = 6
local function cut_from(bytes)
  return type(bytes) == 'string' and unpacked(bytes, {'number', 'string', 'string'}) or nil
end
local function cut_of(key_of, owner)
  return cut_from(redis.pcall('GET', owned(key_of, 'c', owner)))
end

-- When the latest family of an owner that stands alone was created; the mark lives as long as any of them may.
local function latest_alone(mark)
  local text = redis.pcall('GET', mark)
  return type(text) == 'string' and #text <= 16 and string.match(text, '^%d+$') and tonumber(text) or 0
end

-- Everything about one session. `why` is nil exactly while it is alive; `at` is when it ended.
local function look(key_of, handle, now)
  local kind, value, bytes = read(key_of('s', handle))
  local state = {kind = kind, value = value, bytes = bytes}
  if kind == 'none' then
    state.why = 'unknown'
  elseif kind == 'broken' then
    state.why = 'unreadable'
  elseif kind == 'ended' then
    state.why, state.at = value[REASON], value[AT]
  else
    local score = redis.pcall('ZSCORE', owned(key_of, 'u', value[OWNER]), handle)
    -- An index that was lost must not prolong a session: the record knows when it was created.
    state.seen = type(score) == 'string' and tonumber(score) or value[CREATED]
    local absolute = absolute_of(value)
    local last = math.min(absolute, state.seen + length(value[IDLE]))
    local natural, since = 'idle_timeout', last
    if now >= absolute then natural, since = 'absolute_timeout', absolute end
    local cut = value[OWNER] ~= '' and cut_of(key_of, value[OWNER])
    if cut and value[CREATED] <= cut[1] and handle ~= cut[3] then
      -- The first reason stays: what was over before the cut was not ended by it.
      state.why, state.at = natural, since
      if cut[1] < last then state.why, state.at, state.cut_at = cut[2], cut[1], cut[1] end
    elseif now >= last then
      state.why, state.at = natural, since
    end
  end
  return state
end

-- The successor that the immediate predecessor of an id may still have, or nil.
local function alias_of(key_of, handle, digest, now)
  local bytes = redis.pcall('GET', key_of('r', handle))
  local alias = type(bytes) == 'string' and unpacked(bytes, {'string', 'string', 'number'})
  if alias and alias[1] == digest and now < alias[3] then return alias[2] end
  return nil
end

local function milliseconds(microseconds)
  return exact(math.max(0, math.ceil(microseconds / 1000)) + SLACK_MS)
end

local function save(key_of, handle, record, now)
  redis.call('SET', key_of('s', handle), cmsgpack.pack(record), 'PX', milliseconds(absolute_of(record) - now))
end

-- Remove the families of a session. While a slot moves they may be out of reach: behind a tombstone they open nothing,
-- and they go with the session's deadline.
local function disown(key_of, handle)
  local families = key_of('f', handle)
  local names = redis.pcall('HKEYS', families)
  for _, name in ipairs(names.err and {} or names) do redis.pcall('DEL', key_of('n', handle) .. ':' .. name) end
  redis.pcall('DEL', families)
end

-- Replace a record by its tombstone, under its own key; the alias, the families and the place in the index go with it.
-- `denied`: see DENIED.
local function bury(key_of, handle, state, reason, now, denied)
  local key, ending, digest, created = key_of('s', handle), now + TOMBSTONE_US, '', 0
  if state.kind == 'record' then
    ending = math.min(ending, absolute_of(state.value))
    digest, created = state.value[DIGEST], state.value[CREATED]
    redis.pcall('ZREM', owned(key_of, 'u', state.value[OWNER]), handle)
  end
  -- While a slot moves, the alias may be out of reach: behind a tombstone it opens nothing and dies within its window.
  redis.pcall('DEL', key_of('r', handle))
  disown(key_of, handle)
  denied = denied or 0
  local tombstone = cmsgpack.pack({SCHEMA, 'ended', reason, now, ending, digest, created, denied})
  redis.call('SET', key, tombstone, 'PX', milliseconds(math.max(ending, denied) - now))
end

-- Note the last activity; the index lives as long as the longest of its sessions may.
local function enlist(key_of, handle, record, seen, now)
  local index = owned(key_of, 'u', record[OWNER])
  -- Only a key of another type is thrown away. Any other error (a full server) leaves the script as it came, before
  -- this verb has written: an index lost here would sign the owner's other sessions out.
  local kind = redis.call('TYPE', index)
  if kind.ok ~= 'zset' and kind.ok ~= 'none' then redis.call('DEL', index) end
  redis.call('ZADD', index, exact(seen), handle)
  local wanted = milliseconds(absolute_of(record) - now)
  if redis.call('PTTL', index) < tonumber(wanted) then redis.call('PEXPIRE', index, wanted) end
end

-- The alive sessions of an index, oldest first, each {handle, record, seen, bytes}; and the handles of the others.
local function members(key_of, index, now)
  local alive, dead = {}, {}
  local handles = redis.pcall('ZRANGE', index, 0, -1)
  if handles.err then handles = {} end
  for _, handle in ipairs(handles) do
    local state = look(key_of, handle, now)
    if state.why then
      dead[#dead + 1] = handle
    else
      alive[#alive + 1] = {handle, state.value, state.seen, state.bytes}
    end
  end
  table.sort(alive, function(one, other)
    if one[2][CREATED] ~= other[2][CREATED] then return one[2][CREATED] < other[2][CREATED] end
    return one[1] < other[1]
  end)
  return alive, dead
end

-- Until when an entry of the denylist decides something; what is no entry decides nothing.
local function deciding(entry)
  return entry[2][5] == 'until' and tonumber(entry[2][6]) or 0
end

-- Append entries, each {kind, id, until, not before}. `log` is '' where the log is in another slot: the caller appends.
local function announce(log, entries, now)
  if log == '' or #entries == 0 then return end
  local kind = redis.call('TYPE', log)
  if kind.ok ~= 'stream' and kind.ok ~= 'none' then redis.call('DEL', log) end
  -- Old entries go first, up to the first that still decides something. (A server that is full refuses the first
  -- write of a script if it takes room; this one takes none, and a denial must get through.)
  local first = '0-0'
  for _, entry in ipairs(redis.call('XRANGE', log, '-', '+', 'COUNT', 16)) do
    first = entry[1]
    if deciding(entry) > now then break end
  end
  redis.call('XTRIM', log, 'MINID', first)
  for _, entry in ipairs(entries) do
    if entry[3] > now then
      local ending, before = exact(entry[3]), exact(entry[4])
      redis.call('XADD', log, '*', 'kind', entry[1], 'id', entry[2], 'until', ending, 'not_before', before)
    end
  end
end

-- How the denylist names a session: core.ports.session_denial_id.
local function sid_entry(key_of, handle, deny_us, now)
  return {'sid', string.sub(key_of('s', ''), -5, -2) .. '.' .. handle, now + deny_us, 0}
end

-- What a tombstone has to remember of its denial: nothing where the script itself makes the entry.
local function owed(log, deny_us, now)
  return log == '' and deny_us > 0 and now + deny_us or 0
end
