-- standing: KEYS session, denied token; ARGV offset. Writes nothing. Both keys are declared: while a slot moves, a denial
-- that is elsewhere must not look like none. Where it was asked for before, KEYS session; ARGV offset, and it if there is
-- one.
local key_of, handle = place(KEYS[1])
local now = clock()
local bytes = ARGV[2]
if KEYS[2] then bytes = redis.pcall('GET', KEYS[2]) end
if bytes then
  local denial = type(bytes) == 'string' and unpacked(bytes, {'number', 'number'})
  -- Somebody denied this token, and until when is lost.
  if not denial then return {now, 'unreadable', 0} end
  if now < denial[1] then return {now, 'denied', denial[2]} end
end
local state = look(key_of, handle, now)
if state.why then return {now, state.why, state.at or 0} end
return {now, '', 0}
