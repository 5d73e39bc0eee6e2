-- One step of sweep over the log: KEYS log; ARGV offset, position to begin after or '', how many to look at and to
-- remove. Removes what decides nothing any more, behind longer-lived entries too; answers how many, where to go on ('' at
-- the end), and how many were looked at.
local after, most, allowance = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local now, removed, position = clock(), 0, ''
local step = redis.pcall('XRANGE', KEYS[1], after == '' and '-' or '(' .. after, '+', 'COUNT', most)
if step.err then return {0, '', 0} end
for rank, entry in ipairs(step) do
  position = entry[1]
  if deciding(entry) <= now then removed = removed + redis.call('XDEL', KEYS[1], position) end
  if removed >= allowance then return {removed, position, rank} end
end
return {removed, #step < most and '' or position, #step}
