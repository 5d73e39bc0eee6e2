"""What changed in a SQLite file, for near copies in any number of processes of its host.

Decides who is believed: the words (`words`) from one look to the next, and once a lease the database itself, which
tells of those that write past the words. `PRAGMA data_version` says whether anybody committed anything. If somebody
did, `changes` says whether all that matters was announced; if so, every copy stays. If not, or when the path leads to
another file, the line ends and a new one begins. Decides too that words which a dead writer left odd are closed under
the database's write lock, where no writer can be in between. It must never confirm on less than an answer of the file
that the path leads to, never make a file, and never wait on an event loop's thread.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from coatcheck.core.freshness import Line
from coatcheck.core.ports import CLOCK_STEP_SECONDS, Listener
from coatcheck.core.session import SECOND_US
from coatcheck.errors import CoatcheckError, StoreUnavailable
from coatcheck.stores.sqlite.changes import Changes, Tally
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.driver import Driver
from coatcheck.stores.sqlite.words import Identity, Words, identity_of, slot_of

# A feed that hangs must leave a request the time to read the store.
_SHARE_OF_DEADLINE: Final = 0.5
_PAUSE_SECONDS: Final = 0.25


@dataclass(slots=True, kw_only=True)
class _Watch:
    """One line and what it stands on. `version` is the file's version as `connection` counts it."""

    line: Line
    words: Words
    identity: Identity
    connection: Connection
    version: int
    tally: Tally
    skew: float


@dataclass(frozen=True, slots=True)
class _Look:
    """What the file says. No `tally`: nobody has committed since it was last asked for."""

    connection: Connection
    version: int
    tally: Tally | None


class SqliteFeed:
    """The line of one near copy. Safe for threads, tasks and forks."""

    def __init__(
        self,
        path: str,
        driver: Driver,
        changes: Changes,
        listener: Listener,
        *,
        lease: float,
        deadline: float,
        elapsed: Callable[[], float],
        clock_us: Callable[[], int],
        is_open: Callable[[], bool],
        prepare: Callable[[Connection], object],
    ) -> None:
        self._path = path
        self._driver = driver
        self._changes = changes
        self._listener = listener
        self._lease = lease
        self._deadline = deadline
        self._elapsed = elapsed
        self._clock_us = clock_us
        self._is_open = is_open
        self._prepare = prepare
        self._restored = 0
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._link = self._driver.links.spare()
        # Held by whoever is asking; never waited for.
        self._asking = threading.Lock()
        self._watch: _Watch | None = None
        self._odd: dict[int, int] = {}
        self._rests_until = float("-inf")

    def line(self, tag: int) -> Line | None:
        """The line of the file; `None` before it was first asked for, and in a child until that has asked."""
        watch = self._watch
        if watch is None or watch.line.broken or self._pid != os.getpid():
            return None
        return watch.line

    def slot(self, tag: int) -> int:
        """Which word speaks for this tag."""
        return slot_of(tag)

    def drain(self) -> None:
        """Nothing: what is told is in the words already."""

    async def renew(self, tag: int) -> Line | None:
        """Ask the file once. See `core.ports`."""
        if self._pid == os.getpid() and self._elapsed() < self._rests_until:
            return None
        return await self._ask()

    async def beat(self) -> None:
        """Confirm the line or make a new one, and close the words of writers that died."""
        if await self._ask() is not None:
            self._repair()

    async def close(self) -> None:
        """Cut the line and let go of the connection."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.line.cut()
        # Whoever uses it now ends soon, and closing the store waits for him.
        if self._pid == os.getpid() and self._link.lock.acquire(blocking=False):
            self._link.close()
            self._link.lock.release()

    # -- asking ----------------------------------------------------------------------------------------------------

    async def _ask(self) -> Line | None:
        if self._pid != os.getpid():
            self._forked()
        if not self._is_open():
            return None
        try:
            answered = self._ask_here()
            if answered is None:
                seconds = self._deadline * _SHARE_OF_DEADLINE
                answered = await self._driver.apart(partial(self._ask_or_begin, self._watch), seconds=seconds)
        except CoatcheckError:
            self._rests_until = self._elapsed() + _PAUSE_SECONDS
            return None
        return answered

    def _forked(self) -> None:
        watch = self._watch
        if watch is not None:
            watch.line.cut()
        self._begin()

    def _ask_here(self) -> Line | None:
        """Three microseconds on an open connection, which waits for nobody."""
        watch = self._watch
        if watch is None or watch.line.broken or not self._link.is_open or not self._asking.acquire(blocking=False):
            return None
        try:
            return watch.line if self._hear(watch, until=0.0) else None
        finally:
            self._asking.release()

    def _ask_or_begin(self, known: _Watch | None) -> Line | None:
        """The same where waiting and writing is allowed. `known`: what there was when the caller came."""
        if not self._asking.acquire(blocking=False):
            return None
        try:
            watch = self._watch
            if watch is not known and watch is not None and not watch.line.broken:
                # Somebody else was here first.
                return watch.line
            until = time.monotonic() + self._deadline * _SHARE_OF_DEADLINE
            if watch is None or watch.line.broken or not self._hear(watch, until=until):
                watch = self._watch = self._watch_anew(until)
            return watch.line
        finally:
            self._asking.release()

    def _hear(self, watch: _Watch, *, until: float) -> bool:
        """Confirm a line if the file says that nothing was missed; else end it."""
        sent = self._elapsed()
        if abs(self._skew() - watch.skew) > CLOCK_STEP_SECONDS:
            watch.line.cut()
            return False
        if identity_of(self._path) != watch.identity:
            return self._distrust(watch)
        try:
            look = self._link.read(partial(self._look, watch), until=until, deadline=self._deadline)
        except CoatcheckError:
            watch.line.cut()
            return False
        tally = look.tally
        if look.connection.identity != watch.identity:
            return self._distrust(watch)
        if tally is not None:
            if tally.changed < watch.tally.changed:
                # Counters never go back: a backup was put in the place of what was there.
                self._restored += 1
                return self._distrust(watch)
            if tally.unsaid != watch.tally.unsaid or tally.words != watch.words.name:
                return self._distrust(watch)
            watch.tally = tally
        watch.connection, watch.version, watch.skew = look.connection, look.version, self._skew()
        watch.line.confirm(sent)
        return True

    def _distrust(self, watch: _Watch) -> bool:
        watch.line.void()
        self._listener.emptied()
        return False

    def _look(self, watch: _Watch | None, connection: Connection) -> _Look:
        version = connection.execute("pragma data_version").fetchall()[0][0]
        # Two connections count from different numbers.
        if watch is not None and watch.connection is connection and watch.version == version:
            return _Look(connection, version, None)
        # After the version: what is committed in between makes another one, and is looked at again.
        tally = self._changes.tally(connection)
        if tally is None:
            raise StoreUnavailable("sqlite: the count of changes in the database is damaged")
        return _Look(connection, version, tally)

    def _watch_anew(self, until: float) -> _Watch:
        sent, deadline = self._elapsed(), self._deadline
        identity = identity_of(self._path)
        if identity is None:
            raise StoreUnavailable(f"sqlite: {self._path} is not there")
        # What is read from here on is read from this file, or a copy would come from one that nobody watches.
        self._driver.links.expected = identity
        self._link.read(self._prepare, until=until, deadline=deadline)
        words = Words.of(self._path, identity)
        if words is None:
            raise StoreUnavailable("sqlite: the file of words beside the database cannot be had")
        look = self._link.read(partial(self._look, None), until=until, deadline=deadline)
        if look.tally is not None and look.tally.words != words.name:
            claim = partial(self._changes.claim, words=words.name)
            self._link.write(claim, durable=False, until=until, deadline=deadline)
            look = self._link.read(partial(self._look, None), until=until, deadline=deadline)
        if look.tally is None or look.tally.words != words.name or look.connection.identity != identity:
            raise StoreUnavailable("sqlite: the database is being replaced")
        source = f"{identity.device:x}-{identity.inode:x}-{self._restored}"
        line = Line(self._lease, source=source, marks=words.marks)
        line.confirm(sent)
        return _Watch(
            line=line,
            words=words,
            identity=identity,
            connection=look.connection,
            version=look.version,
            tally=look.tally,
            skew=self._skew(),
        )

    def _skew(self) -> float:
        return self._clock_us() / SECOND_US - self._elapsed()

    # -- writers that died -----------------------------------------------------------------------------------------

    def _repair(self) -> None:
        watch = self._watch
        if watch is None or not self._asking.acquire(blocking=False):
            return
        try:
            odd = watch.words.being_written()
            left = {slot: word for slot, word in odd.items() if self._odd.get(slot) == word}
            self._odd = odd
            if left:
                # With the write lock held nobody is between his first word and his commit. Whoever has committed and
                # not closed his words yet finds others in their place.
                self._link.write(
                    lambda _: watch.words.close(left, until=0.0), durable=False, until=0.0, deadline=self._deadline
                )
        except CoatcheckError:
            # Somebody is writing; the next beat comes soon.
            return
        finally:
            self._asking.release()
