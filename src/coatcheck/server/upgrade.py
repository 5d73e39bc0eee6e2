"""Both sets of tables, the server's and the session store's: what they still need, and bringing them up.

Decides which parts there are to bring up: a store without tables (Redis, memory) is none, and SQLite files bring
themselves up when they are opened. Looking must never make a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, runtime_checkable

from coatcheck.errors import ConfigurationError
from coatcheck.server.database import open_database
from coatcheck.server.database_port import PACKAGE
from coatcheck.server.settings import ServerSettings
from coatcheck.stores.migrations import (
    COMPONENT_SERVER,
    COMPONENT_STORE,
    history_table,
    load_migrations,
    pending,
    select_history,
)
from coatcheck.stores.open import open_store
from coatcheck.stores.sqlite.driver import path_of

_STORES: Final = "coatcheck.stores"


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One set of tables: the migrations that were applied, or that are missing when nothing was changed."""

    name: str
    migrations: tuple[str, ...]


@runtime_checkable
class Migrating(Protocol):
    """A store with tables of its own that does not bring them up by itself."""

    async def open(self) -> None:
        """Connect; refuses to while migrations are missing."""
        ...

    async def close(self) -> None:
        """Let go of every connection."""
        ...

    async def migrate(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Bring the tables up, all or nothing; returns what was (or would be) applied."""
        ...


def embedded_file(url: str) -> Path | None:
    """The file of a `sqlite:` URL; None for any other. Raises: ConfigurationError."""
    if url.partition(":")[0].lower() != "sqlite":
        return None
    return Path(path_of(url))


async def upgrade(settings: ServerSettings, *, dry_run: bool) -> tuple[Component, ...]:
    """Apply what is missing in the database and in the store, or only tell it.

    Raises: ConfigurationError when a newer release wrote the tables, StoreUnavailable.
    """
    return (await _database(settings, dry_run=dry_run), *await _store(settings, dry_run=dry_run))


async def _database(settings: ServerSettings, *, dry_run: bool) -> Component:
    file = embedded_file(settings.database_url)
    if dry_run and file is not None and not file.exists():
        return Component(name=COMPONENT_SERVER, migrations=tuple(map(str, load_migrations(PACKAGE, "sqlite"))))
    database = open_database(settings.database_url, namespace=settings.namespace)
    await database.open()
    try:
        return Component(name=COMPONENT_SERVER, migrations=await database.migrate(dry_run=dry_run))
    finally:
        await database.close()


async def _store(settings: ServerSettings, *, dry_run: bool) -> tuple[Component, ...]:
    embedded = embedded_file(settings.store_url) is not None
    missing = await missing_in_file(settings) if embedded else ()
    if embedded and dry_run:
        return (Component(name=COMPONENT_STORE, migrations=missing),)
    deadline = settings.store_deadline.total_seconds()
    store = open_store(settings.store_url, colour="async", namespace=settings.namespace, deadline=deadline)
    try:
        if isinstance(store, Migrating):
            return (Component(name=COMPONENT_STORE, migrations=await store.migrate(dry_run=dry_run)),)
        if embedded:
            await store.open()
            return (Component(name=COMPONENT_STORE, migrations=missing),)
        return ()
    finally:
        await store.close()


async def missing_in_file(settings: ServerSettings) -> tuple[str, ...]:
    """What the store's SQLite file still needs. Makes no file and no table.

    Raises: ConfigurationError when a newer release wrote it, StoreUnavailable when it cannot be read.
    """
    file = embedded_file(settings.store_url)
    known = load_migrations(_STORES, "sqlite")
    if file is None or not file.exists():
        return tuple(map(str, known))
    database = open_database(settings.store_url, namespace=settings.namespace)
    await database.open()
    try:
        table = history_table(settings.namespace)
        if not await database.fetch("select 1 from sqlite_master where type = 'table' and name = ?", table):
            return tuple(map(str, known))
        rows = await database.fetch(select_history(settings.namespace, "?"), COMPONENT_STORE)
    finally:
        await database.close()
    applied = {int(number or 0): str(checksum) for number, checksum in rows}
    return tuple(map(str, pending(known, applied, component=COMPONENT_STORE)))


def make_ready(settings: ServerSettings) -> None:
    """See that the directory of an embedded database exists. Raises: ConfigurationError."""
    from coatcheck.server.service import prepare_home

    if settings.database is None:
        prepare_home(settings.home)
    file = embedded_file(settings.store_url)
    if file is not None and not file.parent.is_dir():
        raise ConfigurationError(f"store: the directory {file.parent} does not exist")
