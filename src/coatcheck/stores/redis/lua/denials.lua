-- denials: KEYS log; ARGV offset, position to begin after ('' for the start, 'lost' for what is none), most entries.
-- Writes nothing. Answers whether there are more, the position reached, then kind, id, until and not before of each.
local after, limit = ARGV[2], tonumber(ARGV[3])
local STEP, MOST_LOOKED_AT = 128, 4096
local now = clock()

-- Both halves are up to 64 bits, which a double cannot hold: compared as text without leading zeros.
local function later(one, other)
  if #one ~= #other then return #one > #other end
  return one > other
end
local function behind(one, other)
  local time, number = string.match(one, '^(%d+)-(%d+)$')
  local other_time, other_number = string.match(other, '^(%d+)-(%d+)$')
  if time == other_time then return later(number, other_number) end
  return later(time, other_time)
end

local last = '0-0'
local about = redis.pcall('XINFO', 'STREAM', KEYS[1])
for position = 1, about.err and 0 or #about, 2 do
  if about[position] == 'last-generated-id' then last = about[position + 1] end
end
if after == 'lost' or (after ~= '' and behind(after, last)) then return {'lost', now} end
if last == '0-0' or after == last then return {'page', now, 0, last} end

local answer, taken, looked_at, position = {'page', now, 1, ''}, 0, 0, after
repeat
  local step = redis.call('XRANGE', KEYS[1], position == '' and '-' or '(' .. position, '+', 'COUNT', STEP)
  for _, entry in ipairs(step) do
    if deciding(entry) > now then
      if taken == limit then
        answer[4] = position == '' and '0-0' or position
        return answer
      end
      taken = taken + 1
      for field = 2, 8, 2 do answer[#answer + 1] = entry[2][field] or '' end
    end
    position = entry[1]
  end
  looked_at = looked_at + #step
  if #step < STEP then
    answer[3], answer[4] = 0, last
    return answer
  end
until looked_at >= MOST_LOOKED_AT
answer[4] = position
return answer
