"""Where sessions are kept: memory, SQLite, PostgreSQL, Redis and Valkey, behind one contract (`core.ports`).

`open_store(url, colour=...)` maps a URL to a store. Nothing else is imported until it is used.
"""

from __future__ import annotations

from coatcheck.stores.open import open_store

__all__ = ["open_store"]
