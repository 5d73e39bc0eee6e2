"""What changed in a PostgreSQL database, for near copies: LISTEN, and the proof that it is heard.

Decides when a line may be trusted. It is made after the connection has heard a message of its own, in the very server
process it was connected to (a pooler lets messages go astray), in a server that is not a replica, with every trigger
there and on. It is confirmed by each answer of that connection, from the moment the question was sent: what had been
committed before that moment is told before the answer. Whatever is odd cuts it: another process, another timeline,
another table, a trigger that is off, a clock that was stepped, a connection that ended, a fork. An answer that does
not come cuts nothing before the store's deadline: the lease runs out by itself, and a late answer still counts from
when it was asked for.

It must never raise, never hold a request beyond its bound, and never read through the store's pool.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from typing import Any, Final
from weakref import WeakSet

import psycopg

from coatcheck.core.freshness import Line
from coatcheck.core.ports import CLOCK_STEP_SECONDS, Listener
from coatcheck.core.session import SECOND_US
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres.connection import dial
from coatcheck.stores.postgres.driver import Address
from coatcheck.stores.postgres.wire import Answer, Wire

RENEW_SECONDS: Final = 0.25
"""How long a request may wait for the feed at most; never more than a quarter of the store's deadline."""

_TRIGGERS: Final = 4
_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.5
# What is in the way then does not go away by itself.
_UNFIT_SECONDS: Final = 10.0

_HANDLE: Final = re.compile(rb"s([A-Za-z0-9_-]{16})")
_TAG: Final = re.compile(rb"o([0-9]{1,5})")

_LISTEN: Final = "LISTEN {n}_feed"
_PROVE: Final = "SELECT pg_notify('{n}_feed', $1)"
_IDENTIFY: Final = "SELECT system_identifier, pg_is_in_recovery() FROM pg_control_system()"
# The timeline of what is being written: that of the last checkpoint would still be the old one after a promotion.
_PING: Final = (
    "SELECT pg_backend_pid(), {n}_clock($1::bigint), "
    "CASE WHEN NOT pg_is_in_recovery() THEN left(pg_walfile_name(pg_current_wal_insert_lsn()), 8) END, "
    "(SELECT string_agg(concat(t.tgrelid, '.', t.oid), ' ' ORDER BY t.tgname) FROM pg_trigger t "
    "WHERE t.tgrelid IN (to_regclass('{n}_sessions'), to_regclass('{n}_cuts')) "
    "AND t.tgname LIKE '{n}\\_feed\\_%' AND t.tgenabled = 'A')"
)

log: Final = logging.getLogger("coatcheck")


class _Unfit(Exception):
    """This server can be asked, but not be listened to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ping:
    """What the server says of itself. `told_by`: the triggers that are on; empty where one is missing."""

    backend: int
    clock_us: int
    timeline: str | None
    told_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bond:
    """A line, and what its first answer said; everything later must say the same."""

    line: Line
    ping: _Ping
    sent: float
    heard: float


class PostgresFeed:
    """See `core.ports.Feed`. There is one primary, so every tag has the same line.

    Safe for threads, tasks, several event loops and forks. In the asynchronous colour the connection belongs to the
    loop that made it; another loop takes over, with a connection of its own, when the lease has run out there.
    """

    def __init__(self, address: Address, options: StoreOptions, listener: Listener, *, lease: float) -> None:
        self._address: Final = address
        self._parameters: Final[dict[str, Any]] = {**address.parameters, "fallback_application_name": "coatcheck feed"}
        self._options: Final = options
        self._listener: Final = listener
        self._lease: Final = lease
        self._now: Final = options.system.elapsed
        self._bound: Final = min(RENEW_SECONDS, options.deadline / 4)
        self._listen, self._prove, self._ping = (
            text.replace("{n}", options.namespace).encode() for text in (_LISTEN, _PROVE, _PING)
        )
        self._complaints: Final[set[str]] = set()
        self._line: Line | None = None
        self._begin()
        _feeds.add(self)

    def _begin(self) -> None:
        # Whoever asks holds the turn; whoever reads holds the mouthpiece, and never while it waits.
        self._turn = threading.Lock()
        self._reading = threading.Lock()
        self._wire: Wire | None = None
        self._bond: _Bond | None = None
        self._word = b""
        self._proven = False
        self._answer: Answer | None = None
        self._refusal: Exception | None = None
        self._sent = self._sent_at = 0.0
        self._failures = 0
        self._again = float("-inf")
        self._closed = 0

    # -- what a near copy asks -------------------------------------------------------------------------------------

    def line(self, tag: int) -> Line | None:
        """See `core.ports.Feed`."""
        line = self._line
        return line if line is not None and not line.broken else None

    def slot(self, tag: int) -> int:
        """Always 0: a line has no marks here."""
        return 0

    def drain(self) -> None:
        """See `core.ports.Feed`. About half a microsecond when there is nothing; an event loop hears by itself."""
        wire = self._wire
        # While another thread reads, what has arrived is being told.
        if wire is None or wire.loop is not None or not self._reading.acquire(blocking=False):
            return
        try:
            self._hear(wire)
        finally:
            self._reading.release()

    async def renew(self, tag: int) -> Line | None:
        """See `core.ports.Feed`. Ends within `RENEW_SECONDS`, and a quarter of the store's deadline."""
        return await self._take_turn(self._bound)

    async def beat(self) -> None:
        """See `core.ports.Feed`. A new connection may take as long as a verb of the store."""
        await self._take_turn(self._options.deadline)

    async def close(self) -> None:
        """See `core.ports.Feed`. Whoever is connecting at this moment lets go when that is done."""
        with self._reading:
            self._closed += 1
            if self._wire is not None:
                self._cut(self._wire)

    # -- one question ----------------------------------------------------------------------------------------------

    async def _take_turn(self, seconds: float) -> Line | None:
        turn, closed = self._turn, self._closed
        if time.monotonic() < self._again or not turn.acquire(blocking=False):
            return None
        try:
            async with self._options.waits.deadline(seconds):
                line = await self._ask(time.monotonic() + seconds, closed)
        except (_Unfit, psycopg.Error, StoreUnavailable, OSError, ValueError) as error:
            self._note_failure(error)
            return None
        finally:
            turn.release()
        self._failures = 0
        return line

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        pause = min(_LONGEST_PAUSE_SECONDS, _PAUSE_SECONDS * 2 ** min(self._failures - 1, 10))
        if isinstance(error, _Unfit):
            pause = _UNFIT_SECONDS
            self._complain(str(error))
        elif isinstance(error, psycopg.Error) and error.sqlstate in _LASTING:
            self._complain(self._address.scrub(" ".join((error.diag.message_primary or type(error).__name__).split())))
        # From half to the whole of it, so that many processes do not come back at one moment.
        share = int.from_bytes(self._options.system.random(2), "big") / 0xFFFF
        self._again = time.monotonic() + pause * (1 + share) / 2

    def _complain(self, why: str) -> None:
        if why not in self._complaints:
            self._complaints.add(why)
            log.error("store: %s: no near copy, every check reads the database: %s", self._address.place, why)

    async def _ask(self, until: float, closed: int) -> Line:
        loop = asyncio.get_running_loop() if self._options.colour == "async" else None
        wire, bond = self._wire, self._bond
        if wire is not None and bond is not None and wire.loop is not loop:
            # Whoever runs in the connection's own loop keeps the lease; this loop has nothing to wait for.
            if bond.line.is_fresh(self._now()) and wire.loop is not None and not wire.loop.is_closed():
                return bond.line
            self._cut_held(wire)
        elif wire is not None and (bond is None or self._is_lost(wire)):
            self._cut_held(wire)
        if (wire := self._wire) is not None:
            try:
                line = await self._renewed(wire, until)
            except psycopg.Error:
                line = None
            if line is not None:
                return line
        # It was cut just now: by the server's end, or by what the answer said. A new one is at hand within the bound.
        return await self._connect(loop, until, closed)

    def _is_lost(self, wire: Wire) -> bool:
        return wire.asking and time.monotonic() - self._sent_at > self._options.deadline

    async def _renewed(self, wire: Wire, until: float) -> Line | None:
        """The line once it is fresh, or None when it was cut. The rest of a wait that was given up comes first."""
        until = min(until, time.monotonic() + self._bound)
        while self._wire is wire and (bond := self._bond) is not None:
            if not wire.asking:
                self._send(wire, self._ping, str(self._options.clock_offset_us()).encode())
            await self._answered(wire, until)
            if not bond.line.broken and bond.line.is_fresh(self._now()):
                return bond.line
            if time.monotonic() >= until:
                raise TimeoutError
        return None

    def _send(self, wire: Wire, question: bytes, *values: bytes) -> None:
        with self._reading:
            if wire.over:
                raise psycopg.OperationalError("the connection of the feed was let go")
            self._answer = self._refusal = None
            # Before it is sent: what is committed between this and the server's look may or may not be told before
            # the answer.
            self._sent, self._sent_at = self._now(), time.monotonic()
            try:
                wire.ask(question, values)
            except psycopg.Error:
                self._cut(wire)
                raise

    async def _answered(self, wire: Wire, until: float) -> None:
        if wire.loop is None:
            await wire.answered(lambda: self._hear_held(wire), until=until)
            return
        # A beat may connect for longer than one answer is waited for.
        async with self._options.waits.deadline(max(0.0, until - time.monotonic())):
            await wire.answered(lambda: None, until=until)

    # -- hearing ---------------------------------------------------------------------------------------------------

    def _hear_held(self, wire: Wire) -> None:
        with self._reading:
            self._hear(wire)

    def _hear(self, wire: Wire) -> None:
        if wire is not self._wire:
            return
        try:
            answer = wire.read()
            if answer is None:
                return
            if self._bond is None:
                self._answer = answer
            else:
                self._judge(wire, self._bond, _ping_of(answer))
        except (psycopg.Error, ValueError) as error:
            self._refusal = error
            self._cut(wire)

    def _judge(self, wire: Wire, bond: _Bond, ping: _Ping) -> None:
        first = bond.ping
        if (ping.timeline, ping.told_by) != (first.timeline, first.told_by):
            # Another store, as far as anybody can tell: it may have lost what was acknowledged.
            bond.line.void()
            self._cut(wire)
        elif ping.backend != first.backend or self._was_stepped(bond, ping):
            self._cut(wire)
        else:
            bond.line.confirm(self._sent)

    def _was_stepped(self, bond: _Bond, ping: _Ping) -> bool:
        """Whether the two clocks cannot agree, wherever within question and answer each was read."""
        moved = (ping.clock_us - bond.ping.clock_us) / SECOND_US
        least, most = self._sent - bond.heard, self._now() - bond.sent
        return not least - CLOCK_STEP_SECONDS <= moved <= most + CLOCK_STEP_SECONDS

    def _tell(self, message: bytes) -> None:
        if found := _HANDLE.fullmatch(message):
            self._listener.changed(found[1].decode("ascii"))
        elif found := _TAG.fullmatch(message):
            self._listener.cut_off(int(found[1]))
        elif message[:1] == b"p":
            # Somebody else's says nothing. It needs no guarding: who could forge it could write the tables too.
            self._proven = self._proven or message[1:] == self._word
        else:
            # The table was emptied, or it is nothing we understand: anything may have changed.
            self._listener.emptied()

    # -- making and cutting ----------------------------------------------------------------------------------------

    async def _connect(self, loop: asyncio.AbstractEventLoop | None, until: float, closed: int) -> Line:
        seconds = max(0.0, until - time.monotonic())
        connection = await dial(self._options.colour, self._parameters, seconds=seconds, until=until)
        wire = Wire(connection, self._tell, loop)
        with self._reading:
            if closed != self._closed:
                wire.finish()
                raise StoreUnavailable("the feed was closed")
            self._wire, self._bond, self._proven = wire, None, False
            self._word = self._options.system.random(16).hex().encode()
        wire.listen(lambda: self._hear_held(wire))
        try:
            return await self._bind(wire, until)
        except BaseException:
            self._cut_held(wire)
            raise

    async def _bind(self, wire: Wire, until: float) -> Line:
        identifier, replica = await self._reply(wire, until, _IDENTIFY.encode())
        if replica != "f":
            raise _Unfit("it is a replica: a change may be answered there before it is told")
        await self._reply(wire, until, self._listen)
        # In a transaction of its own: a pooler gives the server away between the two.
        await self._reply(wire, until, self._prove, b"p" + self._word)
        if not self._proven:
            raise _Unfit("it does not hear what it tells itself; is there a pooler? It needs a direct address")
        ping = _ping_of(await self._reply(wire, until, self._ping, str(self._options.clock_offset_us()).encode()))
        if ping.backend != wire.backend:
            # Messages of a process that is lent to us for one question reach whoever borrows it next.
            raise _Unfit("there is a pooler in between, which loses messages; it needs a direct address")
        if not ping.told_by:
            raise _Unfit("triggers of the feed are missing or off; `coatcheck migrate` makes them")
        # The tables too: a dump that was read in again is another store on the same server.
        line = Line(self._lease, source=f"{identifier} {ping.timeline} {ping.told_by}")
        with self._reading:
            if self._wire is not wire:
                raise psycopg.OperationalError("the connection of the feed ended while it was made")
            if self._line is not None and self._line.source != line.source:
                self._line.void()
            line.confirm(self._sent)
            self._bond = _Bond(line=line, ping=ping, sent=self._sent, heard=self._now())
            self._line = line
        return line

    async def _reply(self, wire: Wire, until: float, question: bytes, *values: bytes) -> Answer:
        self._send(wire, question, *values)
        await self._answered(wire, until)
        if self._answer is None:
            raise self._refusal or psycopg.OperationalError("the connection of the feed was let go")
        return self._answer

    def _cut_held(self, wire: Wire) -> None:
        with self._reading:
            self._cut(wire)

    def _cut(self, wire: Wire) -> None:
        if self._wire is wire:
            if self._bond is not None:
                self._bond.line.cut()
            self._wire = self._bond = None
        wire.finish()

    def cut_in_child(self) -> None:
        """After a fork, in the child: the connection is the parent's, and locks may be held by threads left there."""
        wire, line = self._wire, self._line
        self._begin()
        if line is not None:
            line.cut()
        if wire is not None:
            wire.abandon()


def _ping_of(answer: Answer) -> _Ping:
    """Read the answer. Raises: ValueError."""
    backend, clock_us, timeline, told_by = answer
    triggers = told_by or ""
    return _Ping(
        backend=int(backend or ""),
        clock_us=int(clock_us or ""),
        timeline=timeline,
        told_by=triggers if len(triggers.split()) == _TRIGGERS else "",
    )


# Refused for good, until somebody does something: no right, no such table or function, a password.
_LASTING: Final = frozenset({"42501", "42P01", "42883", "28000", "28P01"})

_feeds: Final[WeakSet[PostgresFeed]] = WeakSet()


def _after_fork() -> None:
    for feed in list(_feeds):
        feed.cut_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
