-- The second step of denying on a Cluster: KEYS log; ARGV offset, then kind, id, until and not before of each entry.
local now, entries = clock(), {}
for position = 2, #ARGV, 4 do
  entries[#entries + 1] = {ARGV[position], ARGV[position + 1], tonumber(ARGV[position + 2]), tonumber(ARGV[position + 3])}
end
announce(KEYS[1], entries, now)
return now
