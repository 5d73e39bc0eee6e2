-- expire_idle: KEYS session; ARGV offset.
local key_of, handle = place(KEYS[1])
local now = clock()
local state = look(key_of, handle, now)
if not state.why then return {'alive', now, state.seen} end
if state.kind == 'record' then bury(key_of, handle, state, state.why, now) end
return {'gone', now, state.why}
