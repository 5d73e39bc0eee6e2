"""The SQLite store: one file, every process of one host.

`store` holds the verbs about sessions, `tokens` those about refresh tokens, both on the opened `file`; `endings` says
what a session's end takes with it. `rows`, `families`, `denials`, `cells` and `statements` are what is in the file,
`driver` and `writer` the connections of the two colours, `migrations` and `key_file` what is made when it is new.
"""

from __future__ import annotations

from coatcheck.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
