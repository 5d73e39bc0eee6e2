-- One step of scan: KEYS session; ARGV offset. Writes nothing.
local prefix, handle = place(KEYS[1])
local now = clock()
local state = look(prefix, handle, now)
if state.why then return {now} end
return {now, state.seen, state.bytes}
