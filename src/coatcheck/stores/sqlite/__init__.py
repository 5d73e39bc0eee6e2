"""The SQLite store: one file, every process of one host.

`store` holds the verbs about sessions, `tokens` those about refresh tokens, both on the opened `file`; `endings` says
what a session's end takes with it. `rows`, `families`, `denials`, `cells` and `statements` are what is in the file,
`driver`, `connection` and `writer` the connections of the two colours, `migrations` and `key_file` what is made when it
is new. For near copies, `changes` counts in the file what was written, `words` are beside it and tell other processes,
`announcing` writes them and `feed` reads them.
"""

from __future__ import annotations

from coatcheck.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
