-- load: KEYS session; ARGV offset, digest. Writes nothing.
local key_of, handle = place(KEYS[1])
local now = clock()
local state = look(key_of, handle, now)
if state.kind == 'none' then return {'absent', now, 'unknown'} end
if state.kind == 'broken' then return {'broken', now} end
if state.kind == 'ended' then return {'ended', now, state.why, state.value[AT]} end
if state.cut_at then return {'ended', now, state.why, state.cut_at} end
if state.value[DIGEST] == ARGV[2] then return {'live', now, state.seen, state.bytes} end
local sealed = alias_of(key_of, handle, ARGV[2], now)
if sealed then return {'aliased', now, state.seen, state.bytes, sealed} end
return {'absent', now, 'replaced'}
