-- touch: KEYS sessions; ARGV offset, then the time of each session's activity.
local now = clock()
for position, key in ipairs(KEYS) do
  local key_of, handle = place(key)
  local state = look(key_of, handle, now)
  local seen = math.min(tonumber(ARGV[position + 1]), now)
  if not state.why and seen > state.seen then enlist(key_of, handle, state.value, seen, now) end
end
return now
