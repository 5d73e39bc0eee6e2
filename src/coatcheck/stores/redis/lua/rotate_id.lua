-- rotate_id: KEYS session; ARGV offset, old digest, new digest, sealed successor, length of the alias, whether the
-- privileges change ('1' or '0'), authority.
local key_of, handle = place(KEYS[1])
local old, new, alias_us, privileged = ARGV[2], ARGV[3], tonumber(ARGV[5]), ARGV[6] == '1'
local now = clock()
local state = look(key_of, handle, now)
if state.why then return {'gone', now, state.why} end
local record = state.value
-- Nobody else can know the fresh bits of the new id: the same call again, whose answer was lost.
if record[DIGEST] == new then return {'rotated', now, record[VERSION]} end
if record[DIGEST] ~= old then
  -- A change of privileges must not be answered by a successor without them.
  local sealed = not privileged and alias_of(key_of, handle, old, now)
  if sealed then return {'converged', now, sealed} end
  return {'gone', now, 'replaced'}
end
record[DIGEST] = new
record[VERSION] = record[VERSION] + 1
if privileged then record[AUTHORITY] = ARGV[7] end
-- The alias first: while a slot moves it may be out of reach, and then nothing at all may be written.
local alias = key_of('r', handle)
if alias_us > 0 and not privileged then
  local ending = now + alias_us
  -- Only cleaning up: rounded up to the next millisecond, the time inside decides.
  redis.call('SET', alias, cmsgpack.pack({old, ARGV[4], ending}), 'PX', exact(math.ceil(alias_us / 1000)))
else
  -- An earlier predecessor's alias goes with the change, or a stolen old id would gain the new privileges.
  redis.call('DEL', alias)
end
save(key_of, handle, record, now)
return {'rotated', now, record[VERSION]}
