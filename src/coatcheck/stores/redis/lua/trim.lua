-- One step of sweep over the log: KEYS log; ARGV offset, position to begin after or '', how many to look at. Removes what
-- decides nothing any more, behind longer-lived entries too; answers how many, and where to go on ('' at the end).
local after, most = ARGV[2], tonumber(ARGV[3])
local now, removed, position = clock(), 0, ''
local step = redis.pcall('XRANGE', KEYS[1], after == '' and '-' or '(' .. after, '+', 'COUNT', most)
if step.err then return {0, ''} end
for _, entry in ipairs(step) do
  position = entry[1]
  if deciding(entry) <= now then removed = removed + redis.call('XDEL', KEYS[1], position) end
end
return {removed, #step < most and '' or position}
