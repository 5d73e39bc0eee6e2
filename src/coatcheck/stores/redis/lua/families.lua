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

local function sealed_key(key_of, root, name)
  return key_of('n', root) .. ':' .. name
end

-- When a family is over at the latest.
local function end_of(family)
  return math.min(family[LIMIT], family[ROTATED] + family[SILENCE])
end

-- When and why a family that stands alone was cut off: the first cut since it began stays. Nothing while it was not.
local function cut_off(cut, family)
  if not cut or family[BORN] > cut[1] then return nil end
  local known = type(cut[CUT_OFF]) == 'table' and cut[CUT_OFF] or {}
  for position = 1, #known - 2, 3 do
    local at, reason = known[position], known[position + 1]
    if type(at) == 'number' and type(reason) == 'string' and family[BORN] <= at then return at, reason end
  end
  return cut[1], cut[2]
end
