-- What the scripts of refresh families add to the prelude: the family's record and where it lives.
--
-- A record is an array like a session's; members of a newer release survive. OVER is '' while the family was not ended.
-- HELD is 1 while the sealed successor of the last rotation may be handed out: its bytes are under a key of their own,
-- which dies with the grace by itself, so that they never rest here.

local GENERATION, CURRENT, OWNED_BY, CLIENT, HOLDER, BORN, ROTATED, SILENCE, LIMIT, BEFORE, GRACE, HELD, OVER, OVER_AT =
  2, 3, 4, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17
local FAMILY_TYPES = {
  'number', 'number', 'string', 'string', 'string', 'string', 'string', 'string', 'number', 'number', 'number',
  'number', 'string', 'number', 'number', 'string', 'number',
}

local function family_from(bytes)
  local family = type(bytes) == 'string' and unpacked(bytes, FAMILY_TYPES)
  return family and family[1] == SCHEMA and family or nil
end

local function sealed_key(prefix, root, name)
  return prefix .. 'n:' .. root .. ':' .. name
end

-- When a family is over at the latest, and why.
local function end_of(family)
  local idle = family[ROTATED] + family[SILENCE]
  if family[LIMIT] <= idle then return family[LIMIT], 'absolute_timeout' end
  return idle, 'idle_timeout'
end
