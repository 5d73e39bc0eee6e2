"""The server's database in one SQLite file.

Decides how the file is made (mode 0600, write-ahead log) and that all its statements run on one thread with a bounded
queue, so that a slow disk can hold one thread and no event loop. Every statement commits by itself. Losing power must
not lose an acknowledged password change: `synchronous` is FULL.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Final, TypeVar

from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.server.database_port import PACKAGE, Dialect, Row, Value
from coatcheck.stores.migrations import COMPONENT_SERVER, Migration, load_migrations, require_current
from coatcheck.stores.sqlite.driver import path_of
from coatcheck.stores.sqlite.migrations import apply_sqlite, missing_sqlite
from coatcheck.system import System

T = TypeVar("T")

MAX_WAITING: Final = 256
"""Statements that may wait for the thread; one more is refused at once."""

OLDEST_SQLITE: Final = (3, 35, 0)
"""The first version whose statements return the rows they wrote."""

_PRAGMAS: Final = (
    "pragma synchronous = full",
    # Apple's fsync does not reach the disk's plate without this; elsewhere it does nothing.
    "pragma fullfsync = on",
    "pragma trusted_schema = off",
    # An old password hash must not stay readable in pages that are free.
    "pragma secure_delete = on",
)
_MIGRATION_SECONDS: Final = 300.0
_WAL_ATTEMPTS: Final = 50


class SqliteDatabase:
    """One file, one thread, one connection."""

    def __init__(self, url: str, *, deadline: float, namespace: str, system: System) -> None:
        self.path: Final = _path_of(url)
        self._deadline = deadline
        self._namespace = namespace
        self._system = system
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._waiting = 0

    @property
    def dialect(self) -> Dialect:
        """Which SQL it speaks."""
        return "sqlite"

    @property
    def shared(self) -> bool:
        """Whether servers on other machines may use it too."""
        return False

    async def open(self) -> None:
        """Connect. Safe to call again. Raises: StoreUnavailable, ConfigurationError."""
        if self._thread is not None:
            return
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="coatcheck-database")
        try:
            await self._run(self._connect, self._deadline)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Let go of everything, after what was begun has ended; it may be opened again."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        # Behind everything that was begun: the thread works in order.
        thread.submit(self._disconnect)
        await asyncio.to_thread(thread.shutdown)

    async def fetch(self, sql: str, *parameters: Value) -> list[Row]:
        """One statement in a transaction of its own; see `Database.fetch`."""
        statement = _in_namespace(sql, self._namespace)

        def work() -> list[Row]:
            return self._open_connection().execute(statement, parameters).fetchall()

        return await self._run(work, self._deadline)

    async def migrate(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Bring the tables up to this release, all or nothing; see `Database.migrate`."""
        return await self._run(lambda: self._migrate(dry_run=dry_run), _MIGRATION_SECONDS)

    async def check(self) -> None:
        """Raises: MigrationRequired while `migrate` has something to do."""
        require_current(await self._run(self._missing, self._deadline), component=COMPONENT_SERVER)

    async def _run(self, work: Callable[[], T], seconds: float) -> T:
        thread = self._thread
        if thread is None:
            raise StoreUnavailable("database: not open")
        if self._waiting >= MAX_WAITING:
            raise StoreUnavailable(f"database: {MAX_WAITING} statements are waiting for {self.path}")
        self._waiting += 1
        job = thread.submit(self._translated, work)
        try:
            async with asyncio.timeout(seconds):
                # A job that has begun cannot be stopped: it ends by itself, and its transaction with it.
                return await asyncio.wrap_future(job)
        except TimeoutError as late:
            detail = f"database: {self.path} did not answer within {seconds:g} s"
            raise (StoreUnavailable if job.cancelled() else OutcomeUnknown)(detail) from late
        finally:
            self._waiting -= 1

    # -- on the thread ---------------------------------------------------------------------------------------------

    def _translated(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (sqlite3.Error, OSError) as error:
            raise StoreUnavailable(f"database: {self.path}: {error}") from error

    def _connect(self) -> None:
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise ConfigurationError(f"database: SQLite 3.35 or later is needed, this is {sqlite3.sqlite_version}")
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"database: the directory {self.path.parent} does not exist")
        with suppress(FileExistsError):
            # Before SQLite would make it readable for everybody; the log beside it inherits the mode. Only where
            # there is none: closing a descriptor of a database in use drops this process's locks on it.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(
            f"{self.path.as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=self._deadline
        )
        try:
            _write_ahead(connection)
            for pragma in _PRAGMAS:
                connection.execute(pragma)
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open_connection(self) -> sqlite3.Connection:
        if self._connection is None:
            raise StoreUnavailable("database: not open")
        return self._connection

    def _missing(self) -> tuple[Migration, ...]:
        return missing_sqlite(
            self._open_connection(),
            load_migrations(PACKAGE, self.dialect),
            component=COMPONENT_SERVER,
            namespace=self._namespace,
        )

    def _migrate(self, *, dry_run: bool) -> tuple[str, ...]:
        migrations = apply_sqlite(
            self._open_connection(),
            load_migrations(PACKAGE, self.dialect),
            component=COMPONENT_SERVER,
            namespace=self._namespace,
            now_us=self._system.now_us(),
            dry_run=dry_run,
        )
        return tuple(map(str, migrations))


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; the change does not wait for other connections by itself, so it is tried again."""
    for attempt in range(_WAL_ATTEMPTS):
        try:
            connection.execute("pragma journal_mode = wal")
            return
        except sqlite3.OperationalError:
            if attempt == _WAL_ATTEMPTS - 1:
                raise
            time.sleep(0.01)


@lru_cache(maxsize=256)
def _in_namespace(sql: str, namespace: str) -> str:
    return sql.replace("{namespace}", namespace)


def _path_of(url: str) -> Path:
    try:
        return Path(path_of(url))
    except ConfigurationError as refused:
        # One meaning of the URL for store and database; only the name of the setting differs.
        raise ConfigurationError(refused.detail.replace("store:", "database:", 1)) from refused
