-- revoke: KEYS session; ARGV offset, reason, how long to deny or 0, log or ''.
local key_of, handle = place(KEYS[1])
local deny_us, log = tonumber(ARGV[3]), ARGV[4]
local now = clock()
local state = look(key_of, handle, now)
local denied = owed(log, deny_us, now)
if state.kind == 'record' then
  bury(key_of, handle, state, state.why or ARGV[2], now, denied)
elseif state.kind == 'broken' then
  -- Perhaps a record of a newer release: whoever can read it must find it ended.
  bury(key_of, handle, state, ARGV[2], now, denied)
elseif state.kind == 'ended' and denied > state.value[DENIED] then
  state.value[DENIED] = denied
  local left = milliseconds(math.max(state.value[UNTIL], denied) - now)
  redis.call('SET', KEYS[1], cmsgpack.pack(state.value), 'PX', left)
end
if deny_us > 0 then announce(log, {sid_entry(key_of, handle, deny_us, now)}, now) end
return {(not state.why or state.kind == 'broken') and 1 or 0, now}
