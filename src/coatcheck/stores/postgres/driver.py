"""Statements in, rows out: PostgreSQL for both colours, within the deadline, with failures named.

Decides what a failure of the driver means: whether a write has an unknown outcome or did certainly not happen, and
whether it counts for the breaker (`core.breaker`) of the store, which refuses at once what a silent server would hold
until the deadline. Nothing is ever sent twice: a dead connection is replaced *before* a statement is sent. This file
must never know a table, and never put a password into a text.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import psycopg
from psycopg import conninfo

from coatcheck.core.breaker import Breaker, is_fair
from coatcheck.deadlines import is_urgent, time_left
from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres.connection import Link, Row, connect
from coatcheck.stores.postgres.pool import MAX_CONNECTIONS, Gate, Pool, TaskGate, ThreadGate

T = TypeVar("T")

SCHEMA_CHANGE_SECONDS: Final = 60.0
"""How long a migration may take."""

_UNREADABLE: Final = (
    "store: this postgresql: URL cannot be read; in user name and password write %2F for /, %40 for @, %3A for : "
    "and %25 for %"
)
# What the server said while it went away: it may have committed before.
_UNKNOWN_STATES: Final = frozenset({"57P01", "57P02", "57P03", "57P05", "40003"})
# An event loop counts in coarser steps than the clock.
_EARLY_SECONDS: Final = 0.01
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
        # `from None`: libpq quotes the part it did not understand, which may be the password.
        raise ConfigurationError(_UNREADABLE) from None
    host = parameters.get("host") or parameters.get("hostaddr") or "localhost"
    ports = str(parameters.get("port") or "5432")
    database = str(parameters.get("dbname") or "")
    # A "/" in a password makes libpq take the user for the host, the password for the port and the rest for the
    # database; every error would then show it.
    if "@" in database or not all(port.isdecimal() for port in ports.split(",") if port):
        raise ConfigurationError(_UNREADABLE)
    secrets = tuple(str(value) for name, value in parameters.items() if name in ("password", "sslpassword") and value)
    parameters.setdefault("fallback_application_name", "coatcheck")
    parameters["client_encoding"] = "UTF8"
    return Address(parameters=parameters, place=f"postgresql://{host}:{ports}/{database}", secrets=secrets)


class Run(Protocol):
    """Send one statement over the connection of a schema change, and read its answer."""

    def __call__(self, statement: str, values: Sequence[object] = (), /) -> Awaitable[list[Row]]:
        """Raises: what the driver raises."""
        ...


class Driver:
    """Statements in, rows out, within the deadline. Made in any process or loop, used in all of them."""

    def __init__(self, address: Address, options: StoreOptions) -> None:
        self._address = address
        self._options = options
        self._pools: dict[tuple[int, object], Pool] = {}
        self._breakers: dict[int, Breaker] = {}

    @property
    def place(self) -> str:
        """The database, for people."""
        return self._address.place

    async def ask(self, statement: str, values: Sequence[object] = (), *, writes: bool) -> list[Row]:
        """Send one statement, which is one transaction, over a pooled connection.

        Raises: StoreUnavailable when nothing was written, OutcomeUnknown when that cannot be said.
        """
        seconds = time_left(self._options.deadline)
        began = time.monotonic()
        until = began + seconds
        breaker = self._breaker()
        era = breaker.enter(began, urgent=is_urgent())
        if era is None:
            away = began - (breaker.since or began)
            raise StoreUnavailable(f"{self.place}: not asked: it has been silent for {away:.1f} s")
        sent = False
        try:
            async with self._options.waits.deadline(seconds):
                pool = self._pool()
                link = await pool.take(until)
                try:
                    began = time.monotonic()
                    sent = True
                    rows = await link.run(statement, values, until=until)
                    breaker.answered()
                    return rows
                finally:
                    pool.give(link)
        except (psycopg.Error, OutcomeUnknown, OSError) as error:
            # `_connect` has reported what was not sent. A wait for one of our own connections is nobody's silence.
            if sent and not isinstance(error, psycopg.Error):
                self._silent(breaker, era, granted=until - began)
            elif isinstance(error, psycopg.Error) and error.sqlstate is not None:
                breaker.answered()
            raise self._translated(error, sent=sent, writes=writes, seconds=seconds) from self._cause(error)
        finally:
            breaker.left(era)

    async def change(self, work: Callable[[Run], Awaitable[T]]) -> T:
        """Let `work` run statements one by one, over a connection of its own that is closed afterwards.

        Raises: ConfigurationError when the role may not do it, StoreUnavailable, OutcomeUnknown.
        """
        until = time.monotonic() + SCHEMA_CHANGE_SECONDS
        sent = False
        try:
            async with self._options.waits.deadline(SCHEMA_CHANGE_SECONDS):
                link = await connect(
                    self._options.colour, self._address.parameters, seconds=SCHEMA_CHANGE_SECONDS, until=until
                )
                try:
                    sent = True
                    return await work(lambda statement, values=(): link.run(statement, values, until=until))
                finally:
                    link.close()
        except (psycopg.Error, OutcomeUnknown, OSError) as error:
            if isinstance(error, psycopg.Error) and error.sqlstate in _FORBIDDEN:
                raise ConfigurationError(
                    f"store: {self.place}: {self._words(error)}: grant this role CREATE on the schema, or migrate "
                    "with another role"
                ) from self._cause(error)
            raise self._translated(error, sent=sent, writes=True, seconds=SCHEMA_CHANGE_SECONDS) from self._cause(error)

    async def close(self) -> None:
        """Close what is idle now and what is in use when it comes back."""
        for key in list(self._pools):
            self._drop(key)

    def _pool(self) -> Pool:
        loop = asyncio.get_running_loop() if self._options.colour == "async" else None
        key = (os.getpid(), loop)
        return self._pools.get(key) or self._new_pool(key)

    def _new_pool(self, key: tuple[int, object]) -> Pool:
        for other in list(self._pools):
            over = isinstance(other[1], asyncio.AbstractEventLoop) and other[1].is_closed()
            if over or other[0] != key[0]:
                self._drop(other)
        gate: Gate = ThreadGate() if self._options.colour == "blocking" else TaskGate()
        # Threads may meet here: all get the one that was first.
        return self._pools.setdefault(key, Pool(gate, self._connect))

    def _drop(self, key: tuple[int, object]) -> None:
        pool = self._pools.pop(key, None)
        if pool is not None and key[0] == os.getpid():
            pool.shut()
        elif pool is not None:
            # Copied by fork: the parent goes on using these sockets.
            pool.abandon()

    async def _connect(self, until: float) -> Link:
        breaker, granted = self._breaker(), until - time.monotonic()
        era = breaker.era
        try:
            return await connect(
                self._options.colour, self._address.parameters, seconds=self._options.deadline, until=until
            )
        except (psycopg.Error, OSError) as error:
            # A refusal to connect has no state, only a text that begins with the server's own word for how bad it is.
            if "FATAL" in str(error):
                breaker.answered()
            else:
                self._silent(breaker, era, granted=granted)
            raise
        except asyncio.CancelledError:
            # A caller who goes away says nothing of the server; one whose time is over does.
            if time.monotonic() >= until - _EARLY_SECONDS:
                self._silent(breaker, era, granted=granted)
            raise

    def _breaker(self) -> Breaker:
        pid, breakers = os.getpid(), self._breakers
        if pid not in breakers:
            # Not the parent's: one of its threads may have held the lock at the fork, and then it stays locked here.
            breakers = self._breakers = {pid: Breaker(self._options.waits.mutex())}
        return breakers[pid]

    def _silent(self, breaker: Breaker, era: int, *, granted: float) -> None:
        breaker.failed(era, time.monotonic(), fair=is_fair(granted, self._options.deadline))

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
        # On one line: what a server says must not be able to forge lines of a log.
        return self._address.scrub(" ".join((primary or str(error) or type(error).__name__).split()))

    def _cause(self, error: Exception) -> Exception | None:
        return None if self._address.scrub(str(error)) != str(error) else error


def _is_unknown(error: psycopg.Error) -> bool:
    """Whether a write that failed so may have happened all the same."""
    if error.sqlstate is None:
        # No word from the server: the connection broke. Other errors without a state are raised before sending.
        return isinstance(error, psycopg.OperationalError)
    return error.sqlstate in _UNKNOWN_STATES or error.sqlstate.startswith("08")
