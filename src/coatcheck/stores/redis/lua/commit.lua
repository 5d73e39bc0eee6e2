-- commit: KEYS session; ARGV offset, expected version or '', octets, number of fields, how many to put, then names and
-- texts to put, then names to delete.
local key_of, handle = place(KEYS[1])
local now = clock()
local state = look(key_of, handle, now)
if state.why then return {'gone', now, state.why} end
local record = state.value
if ARGV[2] ~= '' and tonumber(ARGV[2]) ~= record[VERSION] then return {'conflict', now, record[VERSION]} end

local put, deleted, last = {}, {}, 5 + 2 * tonumber(ARGV[5])
for position = 6, last, 2 do put[ARGV[position]] = ARGV[position + 1] end
for position = last + 1, #ARGV do deleted[ARGV[position]] = true end

local merged, octets = {}, 0
local function keep(name, text)
  merged[#merged + 1] = name
  merged[#merged + 1] = text
  octets = octets + #name + #text
end
local old = record[FIELDS]
for position = 1, #old, 2 do
  local name = old[position]
  if put[name] then
    keep(name, put[name])
    put[name] = nil
  elseif not deleted[name] then
    keep(name, old[position + 1])
  end
end
-- In the order they were given, so that the same commits make the same bytes everywhere.
for position = 6, last, 2 do
  local name = ARGV[position]
  if put[name] then
    keep(name, put[name])
    put[name] = nil
  end
end
if octets > tonumber(ARGV[3]) or #merged > 2 * tonumber(ARGV[4]) then return {'oversized', now} end
record[FIELDS] = merged
record[VERSION] = record[VERSION] + 1
save(key_of, handle, record, now)
return {'committed', now, record[VERSION]}
