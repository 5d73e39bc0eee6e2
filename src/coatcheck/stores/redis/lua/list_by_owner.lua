-- list_by_owner: KEYS index; ARGV offset, what the keys of the tag's sessions begin with, creation time and handle of the
-- last session of the page before (0 and '' for the first), size of the page. Writes nothing.
local after_us, after_handle, limit = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
local now = clock()
local answer, taken = {now, 0}, 0
for _, member in ipairs((members(keys_beside(ARGV[2]), KEYS[1], now))) do
  local created = member[2][CREATED]
  if created > after_us or (created == after_us and member[1] > after_handle) then
    if taken == limit then
      answer[2] = 1
      break
    end
    taken = taken + 1
    answer[#answer + 1] = member[1]
    answer[#answer + 1] = member[3]
    answer[#answer + 1] = member[4]
  end
end
return answer
