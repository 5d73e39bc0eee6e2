"""Map a store URL and a colour to a store.

The one place that knows every backend; a driver is imported only when its scheme is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from coatcheck.core.ports import Colour, Store, Waits
from coatcheck.errors import ConfigurationError
from coatcheck.stores.options import StoreOptions
from coatcheck.system import REAL, System

SCHEMES: Final = (
    "memory",
    "sqlite",
    "postgresql",
    "postgres",
    "redis",
    "rediss",
    "valkey",
    "valkeys",
    "redis+sentinel",
    "redis+cluster",
)


def open_store(
    url: str,
    *,
    colour: Colour,
    namespace: str = "coatcheck",
    deadline: float = 2.0,
    replicas: int = 0,
    system: System = REAL,
    clock_offset_us: Callable[[], int] | None = None,
) -> Store:
    """Make the store a URL names; it connects when it is first opened.

    `memory:` · `sqlite:///relative.db` · `sqlite:////absolute.db` · `postgresql://…` · `redis://…` · `rediss://…` ·
    `valkey://…` · `redis+sentinel://host:port,host:port/service/db` · `redis+cluster://host:port,host:port`.

    Raises: ConfigurationError for an unknown scheme or a driver that is not installed.
    """
    # Not urlsplit: what it raises about a strange password repeats the password.
    scheme = url.partition(":")[0].lower() if ":" in url else ""
    options = StoreOptions(
        colour=colour,
        waits=waits_of(colour),
        system=system,
        namespace=namespace,
        deadline=deadline,
        replicas=replicas,
        **({} if clock_offset_us is None else {"clock_offset_us": clock_offset_us}),
    )
    try:
        return _open(scheme, url, options)
    except ModuleNotFoundError as missing:
        extra = "redis" if missing.name in ("hiredis", "redis") else "postgres"
        if missing.name not in ("hiredis", "redis", "psycopg", "psycopg_pool"):
            raise
        raise ConfigurationError(f"store: {scheme} needs a driver: pip install 'coatcheck[{extra}]'") from missing


def waits_of(colour: Colour) -> Waits:
    """The waits of a colour; asyncio is imported for the asynchronous one alone."""
    if colour == "blocking":
        from coatcheck.blocking import BlockingWaits

        return BlockingWaits()
    from coatcheck.suspending import SuspendingWaits

    return SuspendingWaits()


def _open(scheme: str, url: str, options: StoreOptions) -> Store:
    if scheme == "memory":
        from coatcheck.stores.memory import MemoryStore

        return MemoryStore(options)
    if scheme == "sqlite":
        from coatcheck.stores.sqlite import SqliteStore

        return SqliteStore(url, options)
    if scheme in ("postgresql", "postgres"):
        from coatcheck.stores.postgres import PostgresStore

        return PostgresStore(url, options)
    if scheme in SCHEMES:
        from coatcheck.stores.redis import RedisStore

        return RedisStore(url, options)
    # The URL may hold a password: say what was read of it, never the whole.
    raise ConfigurationError(f"store: unknown scheme {scheme[:20]!r}; use one of {', '.join(SCHEMES)}")
