-- expire_idle: KEYS session; ARGV offset.
local prefix, handle = place(KEYS[1])
local now = clock()
local state = look(prefix, handle, now)
if not state.why then return {'alive', now, state.seen} end
if state.kind == 'record' then bury(prefix, handle, state, state.why, now) end
return {'gone', now, state.why}
