-- One step of scan: KEYS session; ARGV offset. Writes nothing.
local key_of, handle = place(KEYS[1])
local now = clock()
local state = look(key_of, handle, now)
if state.why then return {now} end
return {now, state.seen, state.bytes}
