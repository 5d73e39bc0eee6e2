"""The server's database in PostgreSQL, over a small pool of connections.

Decides how a statement keeps its deadline: a connection whose answer is late, or whose caller went away, is closed and
never used again, so that no answer can reach the wrong caller (the class of CVE-2023-28858). Texts of errors carry the
SQLSTATE and our own words only: the server's own detail may quote a row.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache, partial
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.server.database_port import PACKAGE, Dialect, Row, Value
from coatcheck.stores.migrations import COMPONENT_SERVER, Migration, load_migrations, require_current
from coatcheck.stores.postgres.driver import Run
from coatcheck.stores.postgres.migrations import apply_postgres, missing_postgres
from coatcheck.system import System

T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]

POOL_SIZE: Final = 4
MAX_WAITING: Final = 256
"""Statements that may wait for a connection; one more is refused at once."""

_MIGRATION_SECONDS: Final = 300.0


class PostgresDatabase:
    """A pool of at most `POOL_SIZE` connections, each statement its own transaction."""

    def __init__(self, url: str, *, deadline: float, namespace: str, system: System) -> None:
        self._url = url
        self._where = _where(url)
        self._deadline = deadline
        self._namespace = namespace
        self._system = system
        self._pool: AsyncConnectionPool[Connection] | None = None
        self._abandoned: set[asyncio.Task[Any]] = set()

    @property
    def dialect(self) -> Dialect:
        """Which SQL it speaks."""
        return "postgres"

    @property
    def shared(self) -> bool:
        """Whether servers on other machines may use it too."""
        return True

    async def open(self) -> None:
        """Connect. Safe to call again. Raises: StoreUnavailable, ConfigurationError."""
        if self._pool is not None:
            return
        pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            self._url,
            kwargs={"autocommit": True, "application_name": "coatcheck"},
            min_size=1,
            max_size=POOL_SIZE,
            max_waiting=MAX_WAITING,
            timeout=self._deadline,
            reconnect_timeout=self._deadline,
            configure=self._configure,
            name="coatcheck-database",
            open=False,
        )
        self._pool = pool
        try:
            await pool.open(wait=True, timeout=self._deadline)
        except BaseException as failure:
            await self.close()
            if isinstance(failure, (psycopg.Error, PoolTimeout)):
                raise self._unavailable(failure) from failure
            raise

    async def close(self) -> None:
        """Let go of everything, after what was begun has ended; it may be opened again."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await pool.close()
        if self._abandoned:
            await asyncio.wait(self._abandoned)

    async def fetch(self, sql: str, *parameters: Value) -> list[Row]:
        """One statement in a transaction of its own; see `Database.fetch`."""
        statement = _in_psycopg(sql, self._namespace)

        async def work(connection: Connection) -> list[Row]:
            cursor = await connection.execute(statement, parameters)
            return await cursor.fetchall() if cursor.description else []

        return await self._run(work, self._deadline)

    async def migrate(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Bring the tables up to this release, all or nothing; see `Database.migrate`."""
        return await self._run(partial(self._migrate, dry_run=dry_run), _MIGRATION_SECONDS)

    async def check(self) -> None:
        """Raises: MigrationRequired while `migrate` has something to do."""
        require_current(await self._run(self._missing, self._deadline), component=COMPONENT_SERVER)

    async def _run(self, work: Callable[[Connection], Awaitable[T]], seconds: float) -> T:
        pool = self._pool
        if pool is None:
            raise StoreUnavailable("database: not open")
        held: list[Connection] = []

        async def with_connection() -> T:
            async with pool.connection() as connection:
                held.append(connection)
                return await work(connection)

        task = asyncio.create_task(with_connection())
        try:
            done, _ = await asyncio.wait({task}, timeout=seconds)
        except asyncio.CancelledError:
            self._abandon(task, held)
            raise
        if not done:
            self._abandon(task, held)
            kind = OutcomeUnknown if held else StoreUnavailable
            raise kind(f"database: {self._where} did not answer within {seconds:g} s")
        try:
            return task.result()
        except (psycopg.Error, PoolTimeout, OSError) as error:
            raise self._unavailable(error) from error

    def _abandon(self, task: asyncio.Task[Any], held: list[Connection]) -> None:
        # Close first: a driver that finds the connection open asks the server to cancel and waits for its answer,
        # which a frozen server never gives.
        for connection in held:
            connection.pgconn.finish()
        self._abandoned.add(task)
        task.add_done_callback(self._forget)
        task.cancel()

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            # Looked at, so that the loop does not report it: the caller was told already.
            task.exception()

    async def _configure(self, connection: Connection) -> None:
        # The server gives up as well, or a statement that waits for a lock would outlive its caller.
        await connection.execute(f"set statement_timeout = {int(self._deadline * 1000) or 1}".encode())

    async def _missing(self, connection: Connection) -> tuple[Migration, ...]:
        return await missing_postgres(
            _run_on(connection), self._migrations(), component=COMPONENT_SERVER, namespace=self._namespace
        )

    async def _migrate(self, connection: Connection, *, dry_run: bool) -> tuple[str, ...]:
        try:
            # The next one waits for the one before it, and a large table takes its time.
            await connection.execute("set statement_timeout = 0")
            applied = await apply_postgres(
                _run_on(connection),
                self._migrations(),
                component=COMPONENT_SERVER,
                namespace=self._namespace,
                dry_run=dry_run,
            )
        finally:
            await connection.close()
        return tuple(map(str, applied))

    def _migrations(self) -> tuple[Migration, ...]:
        return load_migrations(PACKAGE, self.dialect)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        state = getattr(error, "sqlstate", None)
        return StoreUnavailable(f"database: {self._where}: {type(error).__name__}{f' {state}' if state else ''}")


def _run_on(connection: Connection) -> Run:
    async def run(statement: str, parameters: Sequence[object] = (), /) -> list[tuple[Any, ...]]:
        # Without parameters a statement may hold a per cent sign and need not be one the driver can prepare.
        cursor = await connection.execute(statement.encode(), parameters or None)
        return await cursor.fetchall() if cursor.description else []

    return run


@lru_cache(maxsize=256)
def _in_psycopg(sql: str, namespace: str) -> bytes:
    return sql.replace("{namespace}", namespace).replace("?", "%s").encode()


def _where(url: str) -> str:
    """Host and port of a URL for messages: never the user, the password or the options."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "local socket", parts.port or 5432
    except ValueError as broken:
        raise ConfigurationError("database: the host or port in the URL cannot be read") from broken
    return f"postgresql at {host}:{port}"
