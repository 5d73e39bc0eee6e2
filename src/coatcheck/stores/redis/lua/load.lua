-- load: KEYS sessions; ARGV offset, then the digest of each. Writes nothing. Answers the time, then something for each.
--
-- Nearly always a record stands under the digest that was presented, and its owner was never cut off. That is found here
-- with the first members of the record alone, and answered by last activity (or none) and bytes: who reads the rest of
-- them judges their shape by the prelude's rule (`calls.session_of`). Anything else is what `judge` says of it: as a
-- function inside, because to make all of the prelude's functions costs more than to read three sessions.
local get, take, sub, first = redis.pcall, cmsgpack.unpack_limit, string.sub, string.byte
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2]) + tonumber(ARGV[1])

local function plain(key, digest)
  local bytes = get('GET', key)
  -- An array of twelve to fifteen members; of those the second to the fourth are of no use but to get past them.
  if type(bytes) ~= 'string' then return nil end
  local beginning = first(bytes)
  if not beginning or beginning < 0x9c or beginning > 0x9f then return nil end
  local fine, _, schema, _, stored, owner = pcall(take, bytes, 4, 1)
  if not fine or schema ~= 1 or stored ~= digest or type(owner) ~= 'string' then return nil end
  -- "<namespace>:s:{<tag>}<handle>" -> "<namespace>:", ":{<tag>}<owner>"; see `place` and `owned`.
  local namespace, named = sub(key, 1, -25), sub(key, -23, -17) .. sub(owner, 1, 16)
  if owner ~= '' and get('GET', namespace .. 'c' .. named) then return nil end
  local score = get('ZSCORE', namespace .. 'u' .. named, sub(key, -16))
  return {type(score) == 'string' and tonumber(score), bytes}
end

local answers = {now}
for position, key in ipairs(KEYS) do
  local digest = ARGV[position + 1]
  answers[position + 1] = plain(key, digest) or judge(key, digest, now)
end
return answers
