"""One connection to PostgreSQL in either colour: how it is made, bounded in time and given up.

Every wait ends at the deadline, also for a server that is frozen, a network that swallows packets and a name server
that is silent. A statement that was sent is answered, or its connection closed: nobody reads another's answer. This
file must never send anything twice.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol, TypeVar

import psycopg
from psycopg import waiting
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg.types.numeric import Int8Dumper

from coatcheck.core.ports import Colour

T = TypeVar("T")
Row = tuple[Any, ...]

_LOOK_SECONDS: Final = 0.05
# A deposed primary refuses every write; a migration may change what a prepared statement was planned for, a pooler may
# lose it. A new connection knows better.
_OUTDATED: Final = frozenset({"25006", "0A000", "26000", "42P05"})


class Link(Protocol):
    """One connection in one colour, for one caller at a time."""

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        """Send one statement and read its answer. Raises: psycopg.Error, TimeoutError after `until`."""
        ...

    def prepare(self, backend: int) -> None:
        """Prepare statements on the server from now on, if `backend` is the process we were connected to."""
        ...

    def usable(self) -> bool:
        """Whether it is idle, and nothing says that the server has gone."""
        ...

    def close(self) -> None:
        """Let go of it, without waiting."""
        ...

    def abandon(self) -> None:
        """Give up a connection that a parent process still uses, without a word to the server."""
        ...


async def dial(
    colour: Colour, parameters: dict[str, Any], *, seconds: float, until: float
) -> BlockingConnection | SuspendingConnection:
    """Connect, and no more. Raises: psycopg.Error, OSError."""
    settings: dict[str, Any] = {
        **parameters,
        # libpq counts whole seconds; the deadline proper is ours.
        "connect_timeout": max(2, round(seconds + 1)),
        "autocommit": True,
        "prepare_threshold": None,
    }
    if colour == "blocking":
        return _connect_aside(settings, until)
    return await SuspendingConnection.connect(**settings)


async def connect(colour: Colour, parameters: dict[str, Any], *, seconds: float, until: float) -> Link:
    """Connect, and bound what the server itself may wait for by `seconds`. Raises: psycopg.Error, OSError."""
    connection = await dial(colour, parameters, seconds=seconds, until=until)
    link: Link = (
        _BlockingLink(connection) if isinstance(connection, BlockingConnection) else _SuspendingLink(connection)
    )
    try:
        ((backend, *_),) = await link.run(_PREPARE, _limits_ms(seconds), until=until)
        link.prepare(backend)
    except BaseException:
        link.close()
        raise
    return link


_PREPARE: Final = (
    "SELECT pg_backend_pid(), set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false), "
    # A snapshot older than a lock would judge by what was true before the wait.
    "set_config('default_transaction_isolation', 'read committed', false), "
    # What was answered must survive a crash; stricter settings (replicas) stay as they are.
    "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END"
)


def _limits_ms(seconds: float) -> tuple[str, str]:
    # Below our own deadline, so that the server's refusal, which is certain, arrives before we stop to wait.
    return str(max(1, round(seconds * 900))), str(max(1, round(seconds * 750)))


def _connect_aside(settings: dict[str, Any], until: float) -> BlockingConnection:
    """Connect in a thread of its own: looking up a name cannot be interrupted, so it must not be waited for."""
    promise: Future[BlockingConnection] = Future()

    def work() -> None:
        try:
            connection = BlockingConnection.connect(**settings)
        except BaseException as error:
            if promise.set_running_or_notify_cancel():
                promise.set_exception(error)
            return
        if promise.set_running_or_notify_cancel():
            promise.set_result(connection)
        else:
            connection.close()

    threading.Thread(target=work, name="coatcheck-postgres-connect", daemon=True).start()
    try:
        return promise.result(max(0.0, until - time.monotonic()))
    except TimeoutError:
        if promise.cancel():
            raise
        # It arrived, or failed, at the last moment.
        return promise.result()
    except BaseException:
        promise.cancel()
        raise


class _Late(TimeoutError):
    pass


def _bounded(work: Generator[Any, Any, T], until: float) -> Generator[Any, Any, T]:
    """Pass through what a driver's generator waits for, and raise once the time has passed.

    Looked at whenever the wait wakes up, not only when it times out: a server that sends a byte now and then must
    not hold a thread either.
    """
    try:
        wanted = next(work)
        while True:
            ready = yield wanted
            # What has arrived is taken first: an answer that came in time counts.
            wanted = work.send(ready)
            if time.monotonic() >= until:
                raise _Late
    except StopIteration as finished:
        answer: T = finished.value
        return answer


class BlockingConnection(psycopg.Connection[TupleRow]):
    """The driver's connection for threads, with waits that end."""

    until = float("inf")

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait as the driver does, but not beyond `until`. An interrupted connection is closed, not repaired: its
        server may be the very one that does not answer."""
        try:
            return waiting.wait(_bounded(gen, self.until), self.pgconn.socket, _LOOK_SECONDS)
        except (_Late, KeyboardInterrupt, SystemExit):
            self.pgconn.finish()
            raise


class SuspendingConnection(psycopg.AsyncConnection[TupleRow]):
    """The driver's connection for tasks, which leaves at once when it is cancelled."""

    async def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait as the driver does; a cancelled connection is closed at once. The driver's own way, to ask the server
        to cancel and to wait for its agreement, would wait for a server that does not answer."""
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, 60.0)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            self.pgconn.finish()
            raise


class _BlockingLink:
    def __init__(self, connection: BlockingConnection) -> None:
        self._connection = connection

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        self._connection.until = until
        try:
            cursor = self._connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            _close_if_outdated(self._connection, error)
            raise

    def prepare(self, backend: int) -> None:
        _prepare(self._connection, backend)

    def usable(self) -> bool:
        return _usable(self._connection)

    def close(self) -> None:
        self._connection.pgconn.finish()

    def abandon(self) -> None:
        abandon(self._connection)


class _SuspendingLink:
    def __init__(self, connection: SuspendingConnection) -> None:
        self._connection = connection

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        try:
            cursor = await self._connection.execute(statement.encode(), values or None)
            return await cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            _close_if_outdated(self._connection, error)
            raise

    def prepare(self, backend: int) -> None:
        _prepare(self._connection, backend)

    def usable(self) -> bool:
        return _usable(self._connection)

    def close(self) -> None:
        self._connection.pgconn.finish()

    def abandon(self) -> None:
        abandon(self._connection)


def _usable(connection: BlockingConnection | SuspendingConnection) -> bool:
    if connection.closed or connection.pgconn.transaction_status != TransactionStatus.IDLE:
        return False
    # An idle server has nothing to say but farewell; after a restart this spares a write its unknown outcome.
    return not readable(connection.pgconn.socket, 0.0)


def readable(descriptor: int, seconds: float) -> bool:
    """Whether there is something to read, now or within so many seconds."""
    if hasattr(select, "poll"):
        # Made anew: one that threads share may be used by one of them only.
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return bool(look.poll(seconds * 1000))
    return bool(select.select([descriptor], [], [], seconds)[0])


def _prepare(connection: BlockingConnection | SuspendingConnection, backend: int) -> None:
    # A pooler answers under a number of its own. Behind it the next transaction may run on a server that does not know
    # our statement, or knows another one by its name; without one, preparing takes a load from 115 to 45 us.
    if connection.pgconn.backend_pid == backend:
        connection.prepare_threshold = 1
    # One width for all: by default the type of a parameter, and with it the statement, follows the size of a number.
    connection.adapters.register_dumper(int, Int8Dumper)


def _close_if_outdated(connection: BlockingConnection | SuspendingConnection, error: psycopg.Error) -> None:
    if error.sqlstate in _OUTDATED:
        connection.pgconn.finish()


def abandon(connection: BlockingConnection | SuspendingConnection) -> None:
    """Close the descriptor that a parent process still uses, without a word to the server. The caller keeps the object
    for ever: one that is collected would speak."""
    if not connection.closed:
        os.close(connection.pgconn.socket)
