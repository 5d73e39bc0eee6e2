-- revoke: KEYS session; ARGV offset, reason.
local prefix, handle = place(KEYS[1])
local now = clock()
local state = look(prefix, handle, now)
if state.kind == 'record' then
  bury(prefix, handle, state, state.why or ARGV[2], now)
elseif state.kind == 'broken' then
  -- Perhaps a record of a newer release: whoever can read it must find it ended.
  bury(prefix, handle, state, ARGV[2], now)
end
return {(not state.why or state.kind == 'broken') and 1 or 0, now}
