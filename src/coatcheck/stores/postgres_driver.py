"""Connections to PostgreSQL in both colours: how they are made, shared, bounded in time and given up.

Decides when a call is late, which connection may be used again, and what a failure of the driver means: whether a
write has an unknown outcome or did certainly not happen. Every wait ends at the deadline, also for a server that is
frozen, a network that swallows packets and a name server that is silent. Nothing is ever sent twice: a connection
that is known to be dead is replaced *before* a statement is sent, and a statement that was sent is answered or its
connection closed.

The pool is our own, small enough to prove. psycopg_pool retries a refused connection after 1, 2, 4 s and sleeps as
long between two dead ones, so one restart of the server would outlast a deadline of 2 s; its callers wait for their
whole deadline where a refusal is known at once; and giving a connection back may wait, where a cancelled caller can
lose it. Here a caller connects for itself, and giving back never waits.

This file must never know a table, and never put a password into a text.
"""

from __future__ import annotations

import asyncio
import os
import select
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import psycopg
from psycopg import conninfo, waiting
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow

from coatcheck.core.ports import Colour
from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.stores.options import StoreOptions

T = TypeVar("T")
Row = tuple[Any, ...]

MAX_CONNECTIONS: Final = 10
"""Connections of one process (asynchronous: of one event loop). More callers wait for their turn."""

MAX_IDLE_SECONDS: Final = 300.0
"""A connection unused for longer is not trusted: firewalls forget a silent flow and drop what comes later."""

SCHEMA_CHANGE_SECONDS: Final = 60.0
"""How long a migration may take."""

_LOOK_SECONDS: Final = 0.05
# What the server said while it went away: it may have committed before.
_UNKNOWN_STATES: Final = frozenset({"57P01", "57P02", "57P03", "57P05", "40003"})
# A deposed primary answers, but every write will be refused: look for the new one with a new connection.
_READ_ONLY: Final = "25006"
_FORBIDDEN: Final = frozenset({"42501", "3F000"})
_NOT_MIGRATED: Final = frozenset({"42P01", "42883"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the database is. `place` is for people and holds no secret."""

    parameters: dict[str, Any]
    place: str
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Address({self.place})"

    def scrub(self, text: str) -> str:
        """The text without a password, should the driver have repeated one."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text


def parse_address(url: str) -> Address:
    """Read a `postgresql://` URL as libpq does. Raises: ConfigurationError, without repeating the URL."""
    try:
        parameters: dict[str, Any] = conninfo.conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError, ValueError):
        # `from None`: libpq quotes the part it did not understand, and with a "/" in a password that is the password.
        raise ConfigurationError(
            "store: this postgresql: URL cannot be read; in user name and password write %2F for /, %40 for @ "
            "and %3A for :"
        ) from None
    secrets = tuple(
        str(value) for name, value in parameters.items() if name in ("password", "sslpassword") and value
    )
    parameters.setdefault("fallback_application_name", "coatcheck")
    parameters["client_encoding"] = "UTF8"
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    port = parameters.get("port") or "5432"
    return Address(
        parameters=parameters,
        place=f"postgresql://{host}:{port}/{parameters.get('dbname') or ''}",
        secrets=secrets,
    )


class Run(Protocol):
    """Send one statement over the connection of a schema change, and read its answer."""

    def __call__(self, statement: str, values: Sequence[object] = (), /) -> Awaitable[list[Row]]: ...


class Link(Protocol):
    """One connection in one colour, for one caller at a time."""

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        """Send one statement and read its answer. Raises: psycopg.Error, TimeoutError after `until`."""
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


class Driver:
    """Statements in, rows out, within the deadline. Made in any process or loop, used in all of them."""

    def __init__(self, address: Address, options: StoreOptions) -> None:
        self._address = address
        self._options = options
        self._pools: dict[tuple[int, object], _Pool] = {}

    @property
    def place(self) -> str:
        """The database, for people."""
        return self._address.place

    async def ask(self, statement: str, values: Sequence[object] = (), *, writes: bool) -> list[Row]:
        """Send one statement, which is one transaction, over a pooled connection.

        Raises: StoreUnavailable when nothing was written, OutcomeUnknown when that cannot be said.
        """
        deadline = self._options.deadline
        until = time.monotonic() + deadline
        sent = False
        try:
            async with self._options.waits.deadline(deadline):
                pool = self._pool()
                link = await pool.take(until)
                try:
                    sent = True
                    return await link.run(statement, values, until=until)
                finally:
                    pool.give(link)
        except (psycopg.Error, OutcomeUnknown, OSError) as error:
            raise self._translated(error, sent=sent, writes=writes, seconds=deadline) from self._cause(error)

    async def change(self, work: Callable[[Run], Awaitable[T]]) -> T:
        """Let `work` run statements one by one, over a connection of its own that is closed afterwards.

        Raises: ConfigurationError when the role may not do it, StoreUnavailable, OutcomeUnknown.
        """
        until = time.monotonic() + SCHEMA_CHANGE_SECONDS
        try:
            async with self._options.waits.deadline(SCHEMA_CHANGE_SECONDS):
                link = await _connect(self._options.colour, self._address, SCHEMA_CHANGE_SECONDS, until)
                try:
                    return await work(lambda statement, values=(): link.run(statement, values, until=until))
                finally:
                    link.close()
        except (psycopg.Error, OutcomeUnknown, OSError) as error:
            if isinstance(error, psycopg.Error) and error.sqlstate in _FORBIDDEN:
                raise ConfigurationError(
                    f"store: {self.place}: {self._words(error)}: grant this role CREATE on the schema, or migrate "
                    "with another role"
                ) from self._cause(error)
            raise self._translated(
                error, sent=True, writes=True, seconds=SCHEMA_CHANGE_SECONDS
            ) from self._cause(error)

    async def close(self) -> None:
        """Close what is idle now and what is in use when it comes back."""
        for key in list(self._pools):
            pool = self._pools.pop(key, None)
            if pool is not None and key[0] == os.getpid():
                pool.shut()
            elif pool is not None:
                pool.abandon()

    def _pool(self) -> _Pool:
        loop = asyncio.get_running_loop() if self._options.colour == "async" else None
        key = (os.getpid(), loop)
        return self._pools.get(key) or self._new_pool(key)

    def _new_pool(self, key: tuple[int, object]) -> _Pool:
        for other in list(self._pools):
            if other[0] != key[0]:
                # Copied by fork: the parent goes on using these sockets.
                self._pools.pop(other).abandon()
            elif isinstance(other[1], asyncio.AbstractEventLoop) and other[1].is_closed():
                self._pools.pop(other).shut()
        gate: _Gate = _ThreadGate() if self._options.colour == "blocking" else _TaskGate()
        # Threads may meet here: all get the one that was first.
        return self._pools.setdefault(key, _Pool(gate, self._connect))

    async def _connect(self, until: float) -> Link:
        return await _connect(self._options.colour, self._address, self._options.deadline, until)

    def _translated(self, error: Exception, *, sent: bool, writes: bool, seconds: float) -> StoreUnavailable:
        if isinstance(error, (OutcomeUnknown, TimeoutError)):
            what = "answer" if sent else f"connection (of {MAX_CONNECTIONS})"
            text = f"{self.place}: no {what} within {seconds:g} s"
            return OutcomeUnknown(text) if sent and writes else StoreUnavailable(text)
        text = f"{self.place}: {self._words(error)}"
        if isinstance(error, psycopg.Error) and error.sqlstate in _NOT_MIGRATED:
            text += ": was it migrated? `coatcheck migrate`"
        unknown = sent and writes and (not isinstance(error, psycopg.Error) or _is_unknown(error))
        return OutcomeUnknown(text) if unknown else StoreUnavailable(text)

    def _words(self, error: Exception) -> str:
        # A full message may quote the row it is about; the primary line does not.
        primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
        return self._address.scrub(primary or str(error) or type(error).__name__)

    def _cause(self, error: Exception) -> Exception | None:
        return None if self._address.scrub(str(error)) != str(error) else error


def _is_unknown(error: psycopg.Error) -> bool:
    """Whether a write that failed so may have happened all the same."""
    if error.sqlstate is None:
        # No word from the server: the connection broke. Other errors without a state are raised before sending.
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate in _UNKNOWN_STATES or error.sqlstate.startswith("08")


# -- sharing -------------------------------------------------------------------------------------------------------


class _Gate(Protocol):
    """Lets `MAX_CONNECTIONS` callers in."""

    async def enter(self, until: float) -> None: ...

    def leave(self) -> None: ...


class _ThreadGate:
    def __init__(self) -> None:
        self._places = threading.Semaphore(MAX_CONNECTIONS)

    async def enter(self, until: float) -> None:
        if not self._places.acquire(timeout=max(0.0, until - time.monotonic())):
            raise TimeoutError

    def leave(self) -> None:
        self._places.release()


class _TaskGate:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def enter(self, until: float) -> None:
        await self._places.acquire()

    def leave(self) -> None:
        self._places.release()


class _Pool:
    """Connections of one process and one event loop. The one that was used last is used next."""

    def __init__(self, gate: _Gate, connect: Callable[[float], Awaitable[Link]]) -> None:
        self._gate = gate
        self._connect = connect
        self._idle: list[tuple[Link, float]] = []
        self._shut = False

    async def take(self, until: float) -> Link:
        """A connection that was alive a moment ago. Raises: TimeoutError, psycopg.Error."""
        await self._gate.enter(until)
        try:
            while True:
                try:
                    link, since = self._idle.pop()
                except IndexError:
                    return await self._connect(until)
                if time.monotonic() - since < MAX_IDLE_SECONDS and link.usable():
                    return link
                link.close()
        except BaseException:
            self._gate.leave()
            raise

    def give(self, link: Link) -> None:
        """Take a connection back; one that is in the middle of something is closed. Never waits."""
        if self._shut or not link.usable():
            link.close()
        else:
            self._idle.append((link, time.monotonic()))
            if self._shut:
                # Shut between the question and the answer.
                self.shut()
        self._gate.leave()
        if len(self._idle) > 1 and time.monotonic() - self._idle[0][1] >= MAX_IDLE_SECONDS:
            self._close_oldest()

    def shut(self) -> None:
        self._shut = True
        while self._idle:
            self._close_oldest()

    def abandon(self) -> None:
        self._shut = True
        for link, _ in self._idle:
            link.abandon()
        _inherited.append(self._idle)
        self._idle = []

    def _close_oldest(self) -> None:
        try:
            link, _ = self._idle.pop(0)
        except IndexError:
            return
        link.close()


# Never collected: a connection object that is collected would speak to the server.
_inherited: list[list[tuple[Link, float]]] = []


# -- one connection ------------------------------------------------------------------------------------------------


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


class _BlockingConnection(psycopg.Connection[TupleRow]):
    until = float("inf")

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait as the driver does, but not beyond `until`. An interrupted connection is closed, not repaired: its
        server may be the very one that does not answer."""
        try:
            return waiting.wait(_bounded(gen, self.until), self.pgconn.socket, _LOOK_SECONDS)
        except (_Late, KeyboardInterrupt, SystemExit):
            self.pgconn.finish()
            raise


class _SuspendingConnection(psycopg.AsyncConnection[TupleRow]):
    async def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        """Wait as the driver does; a cancelled connection is closed at once. The driver's own way, to ask the server
        to cancel and to wait for its agreement, would wait for a server that does not answer."""
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, 60.0)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            self.pgconn.finish()
            raise


class _BlockingLink:
    def __init__(self, connection: _BlockingConnection) -> None:
        self._connection = connection

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        self._connection.until = until
        try:
            cursor = self._connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            _close_if_deposed(self._connection, error)
            raise

    def usable(self) -> bool:
        return _usable(self._connection)

    def close(self) -> None:
        self._connection.pgconn.finish()

    def abandon(self) -> None:
        _abandon(self._connection)


class _SuspendingLink:
    def __init__(self, connection: _SuspendingConnection) -> None:
        self._connection = connection

    async def run(self, statement: str, values: Sequence[object], *, until: float) -> list[Row]:
        try:
            cursor = await self._connection.execute(statement.encode(), values or None)
            return await cursor.fetchall() if cursor.description else []
        except psycopg.Error as error:
            _close_if_deposed(self._connection, error)
            raise

    def usable(self) -> bool:
        return _usable(self._connection)

    def close(self) -> None:
        self._connection.pgconn.finish()

    def abandon(self) -> None:
        _abandon(self._connection)


def _usable(connection: _BlockingConnection | _SuspendingConnection) -> bool:
    if connection.closed or connection.pgconn.transaction_status != TransactionStatus.IDLE:
        return False
    # An idle server has nothing to say but farewell; after a restart this spares a write its unknown outcome.
    descriptor = connection.pgconn.socket
    if hasattr(select, "poll"):
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return not look.poll(0)
    return not select.select([descriptor], [], [], 0)[0]


def _close_if_deposed(connection: _BlockingConnection | _SuspendingConnection, error: psycopg.Error) -> None:
    if error.sqlstate == _READ_ONLY:
        connection.pgconn.finish()


def _abandon(connection: _BlockingConnection | _SuspendingConnection) -> None:
    if not connection.closed:
        os.close(connection.pgconn.socket)


# -- connecting ----------------------------------------------------------------------------------------------------


async def _connect(colour: Colour, address: Address, seconds: float, until: float) -> Link:
    # No prepared statements: a transaction pooler would hand the next transaction to a server without them, and a
    # call of a function has next to nothing to plan.
    settings: dict[str, Any] = {
        **address.parameters,
        # libpq counts whole seconds; the deadline proper is ours.
        "connect_timeout": max(2, round(seconds + 1)),
        "autocommit": True,
        "prepare_threshold": None,
    }
    link: Link
    if colour == "blocking":
        link = _BlockingLink(_connect_aside(settings, until))
    else:
        link = _SuspendingLink(await _SuspendingConnection.connect(**settings))
    try:
        await link.run(_PREPARE, _limits_ms(seconds), until=until)
    except BaseException:
        link.close()
        raise
    return link


_PREPARE: Final = (
    "SELECT set_config('statement_timeout', %s, false), set_config('lock_timeout', %s, false), "
    # A snapshot older than a lock would judge by what was true before the wait.
    "set_config('default_transaction_isolation', 'read committed', false), "
    # What was answered must survive a crash; stricter settings (replicas) stay as they are.
    "CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END"
)


def _limits_ms(seconds: float) -> tuple[str, str]:
    # Below our own deadline, so that the server's refusal, which is certain, arrives before we stop to wait.
    return str(max(1, round(seconds * 900))), str(max(1, round(seconds * 750)))


def _connect_aside(settings: dict[str, Any], until: float) -> _BlockingConnection:
    """Connect in a thread of its own: looking up a name cannot be interrupted, so it must not be waited for."""
    promise: Future[_BlockingConnection] = Future()

    def work() -> None:
        try:
            connection = _BlockingConnection.connect(**settings)
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
    except BaseException:
        if promise.cancel() or not promise.done():
            raise
        # It arrived, or failed, at the last moment.
        return promise.result()
