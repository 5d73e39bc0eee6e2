"""Sessions, rate limits and tokens in Redis or Valkey: see `store` for the key layout.

From top to bottom: `store` (verbs of sessions), `tokens` (verbs of tokens), `calls` (keys and scripts), `walk` (SCAN),
`feed` (what changes, for near copies) and its `link`, `dispatch` (which node, what is asked again), `driver`
(connections; the only file that imports redis-py), `nodes` (URLs and primaries), and `lua/` (the rules inside each
verb).
"""

from coatcheck.stores.redis.store import RedisStore

__all__ = ["RedisStore"]
