"""The SQLite store: one file, every process of one host.

`store` holds the verbs, `rows` and `statements` what is in the file, `driver` and `writer` the connections of the two
colours, `migrations` and `key_file` what is made when the file is new.
"""

from __future__ import annotations

from coatcheck.stores.sqlite.store import SqliteStore

__all__ = ["SqliteStore"]
