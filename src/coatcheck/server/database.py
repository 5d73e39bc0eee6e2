"""Map the URL of the server's own database to its driver.

Decides which scheme opens what; a driver is imported only when its scheme is used. What every database promises
stands in `database_port.py`.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

from coatcheck.errors import ConfigurationError
from coatcheck.server.database_port import Database
from coatcheck.system import REAL, System

SCHEMES: Final = ("sqlite", "postgresql", "postgres")

_NAMESPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


def open_database(url: str, *, deadline: float = 2.0, namespace: str = "coatcheck", system: System = REAL) -> Database:
    """Make the database a URL names; it connects when it is opened.

    `sqlite:///relative.db` · `sqlite:////absolute.db` · `postgresql://user@host/name`. `deadline` bounds each
    statement, in seconds. Raises: ConfigurationError for an unknown scheme or a driver that is not installed.
    """
    if not 0 < deadline <= 60:
        raise ConfigurationError("database_deadline: between 0 and 60 seconds")
    if not _NAMESPACE.fullmatch(namespace):
        raise ConfigurationError(
            "namespace: use 1 to 32 lower-case letters, digits and underscores, starting with a letter"
        )
    scheme = urlsplit(url).scheme.lower() if ":" in url else ""
    if scheme == "sqlite":
        from coatcheck.server.database_sqlite import SqliteDatabase

        return SqliteDatabase(url, deadline=deadline, namespace=namespace, system=system)
    if scheme in SCHEMES:
        try:
            from coatcheck.server.database_postgres import PostgresDatabase
        except ModuleNotFoundError as missing:
            if missing.name not in ("psycopg", "psycopg_pool"):
                raise
            raise ConfigurationError(
                "database: postgresql needs a driver: pip install 'coatcheck[postgres]'"
            ) from missing
        return PostgresDatabase(url, deadline=deadline, namespace=namespace, system=system)
    # The URL may hold a password: say what was read of it, never the whole.
    raise ConfigurationError(f"database: unknown scheme {scheme[:20]!r}; use one of sqlite, postgresql")
