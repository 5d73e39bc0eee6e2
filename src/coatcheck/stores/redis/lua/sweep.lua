-- One step of sweep: KEYS session; ARGV offset. Unreadable bytes stay, for whoever has to find out.
local prefix, handle = place(KEYS[1])
local now = clock()
local state = look(prefix, handle, now)
local due = nil
if state.kind == 'ended' then
  due = state.value[UNTIL]
elseif state.kind == 'record' then
  due = math.min(state.value[ABSOLUTE], state.seen + state.value[IDLE] + TOMBSTONE_US)
end
if not due or now < due then return 0 end
if state.kind == 'record' then redis.pcall('ZREM', prefix .. 'u:' .. state.value[OWNER], handle) end
redis.call('DEL', KEYS[1], prefix .. 'r:' .. handle)
return 1
