"""The PostgreSQL store: one database, any number of processes and hosts.

`store` holds the verbs, `stores/schema/postgres` the tables and functions they call, `driver`, `pool` and `connection`
the way there, `feed` and `wire` what is told of changes, `migrations` what is made when the database is new.
"""

from __future__ import annotations

from coatcheck.stores.postgres.store import PostgresStore

__all__ = ["PostgresStore"]
