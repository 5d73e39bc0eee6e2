-- judge: what `load` answers about one session, whatever its key holds. With the prelude before it this is the body of a
-- function of `key`, `digest` and `now`: see `calls.all_scripts`.
local key_of, handle = place(key)
local state = look(key_of, handle, now)
if state.kind == 'none' then return {'absent', 'unknown'} end
if state.kind == 'broken' then return {'broken'} end
if state.kind == 'ended' then return {'ended', state.why, state.value[AT]} end
if state.cut_at then return {'ended', state.why, state.cut_at} end
if state.value[DIGEST] == digest then return {'live', state.seen, state.bytes} end
local sealed = alias_of(key_of, handle, digest, now)
if sealed then return {'aliased', state.seen, state.bytes, sealed} end
return {'absent', 'replaced'}
