-- touch: KEYS sessions; ARGV offset, then the time of each session's activity.
local now = clock()
for position, key in ipairs(KEYS) do
  local prefix, handle = place(key)
  local state = look(prefix, handle, now)
  local seen = math.min(tonumber(ARGV[position + 1]), now)
  if not state.why and seen > state.seen then enlist(prefix, handle, state.value, seen, now) end
end
return now
