"""Connections to one SQLite file: how they are opened, used by threads, kept out of forks and closed.

Decides durability, locking and the translation of SQLite's errors. Every thread has its own connection. Writes of
one process take turns in memory, so that only other processes are waited for by SQLite's polling; each is one
`BEGIN IMMEDIATE` transaction, committed or rolled back before the next begins. What it has changed is announced
before the commit and after it (`announcing`). Every wait ends at the deadline, except that for a disk that does not
answer. The asynchronous colour stands in `writer`.

Two traps of POSIX locks are closed here and must stay closed. Closing *any* descriptor of the database file drops
all locks this process has on it, so this file never opens the database except through SQLite. And a child that
inherits an open connection believes to hold locks that only its parent has: when the parent lets go, another
process deletes the log under the child, and what the child was told is written is lost. So connections are closed
before `fork` and opened again after it, in parent and child alike.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from coatcheck.deadlines import time_left
from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable, ValueRefused
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.words import Identity, identity_of

T = TypeVar("T")
Work = Callable[[Connection], T]

OLDEST_SQLITE: Final = (3, 31, 0)

_PRAGMAS: Final = (
    "pragma foreign_keys=on",
    # A file that somebody else could write must not run functions through its views and triggers.
    "pragma trusted_schema=off",
    "pragma cell_size_check=on",
    # What a session held must not stay readable in pages that are free.
    "pragma secure_delete=on",
    # Apple's fsync does not reach the disk's plate without this; elsewhere it does nothing.
    "pragma fullfsync=on",
    "pragma temp_store=memory",
    "pragma journal_size_limit=67108864",
    "pragma synchronous=full",
)
_BUSY_STEPS: Final = 8
_RETRY_SECONDS: Final = 0.005
_NO_TEXT: Final = "a text with half of a surrogate pair cannot be kept here"


class Driver(Protocol):
    """What the verbs see of either colour. `work` runs on one thread, with a connection that is its alone."""

    async def read(self, work: Work[T], *, point: bool = True) -> T:
        """Run a query of one statement. `point`: it touches a few rows and may run on an event loop's thread."""
        ...

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        """Run `work` in one immediate transaction. `durable`: its effect survives a power loss.

        Raises: StoreUnavailable when nothing was written, OutcomeUnknown when that cannot be said.
        """
        ...

    async def aside(self, work: Work[T]) -> T:
        """Run `work` in the writers' turn, without a transaction: it opens its own."""
        ...

    async def apart(self, step: Callable[[], T], *, seconds: float) -> T:
        """Run what may wait for so many seconds where that holds up nobody but the caller.

        Raises: StoreUnavailable, OutcomeUnknown when it has not ended by then.
        """
        ...

    @property
    def links(self) -> Links:
        """The connections of this process."""
        ...

    async def close(self) -> None:
        """Let go of every connection and thread."""
        ...


class Announcer(Protocol):
    """Who says what a transaction changes."""

    def announce(self, connection: Connection, until: float) -> Callable[[], None] | None:
        """Called before the commit of a transaction that has notes; what it returns is called after it, however it
        ended. `until` is monotonic. Raises: Locked, sqlite3.Error."""
        ...


class Locked(StoreUnavailable):
    """Another process held the database until the deadline; nothing was read or written."""


def path_of(url: str) -> str:
    """The absolute path a store URL names. Raises: ConfigurationError with the cure for any other form."""
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ConfigurationError("store: an sqlite: URL has no options; write %3F or %23 for ? or # in a file name")
    if parts.netloc:
        raise ConfigurationError(
            "store: use three slashes for a relative path (sqlite:///app.db), four for an absolute one"
        )
    path = unquote(parts.path)
    if path.lstrip("/") in ("", ":memory:"):
        raise ConfigurationError("store: sqlite: needs a file (sqlite:///app.db); use memory: to keep nothing")
    if not path.startswith("/") or path.endswith("/") or "\x00" in path:
        raise ConfigurationError("store: write sqlite:///app.db, or sqlite:////srv/app.db for an absolute path")
    return os.path.abspath(path[1:])


class Link:
    """One connection, opened when first used. Its lock is held during every use, so that closing can wait."""

    __slots__ = ("_busy_ms", "_connection", "_durable", "_expected", "_owner", "lock")

    def __init__(self, owner: Links) -> None:
        self.lock = threading.Lock()
        self._owner = weakref.proxy(owner)
        self._connection: Connection | None = None
        self._durable = True
        self._busy_ms = -1
        self._expected: Identity | None = None

    @property
    def is_open(self) -> bool:
        """Whether the next use finds a connection; a look without the lock."""
        return self._connection is not None

    def read(self, work: Work[T], *, until: float, deadline: float) -> T:
        """Run a query. Raises: Locked, StoreUnavailable, ValueRefused."""
        with self.lock:
            try:
                return work(self._ready(until, deadline))
            except sqlite3.Error as error:
                raise self._translated(error) from error
            except UnicodeEncodeError as error:
                raise ValueRefused(_NO_TEXT) from error

    def write(self, work: Work[T], *, durable: bool, until: float, deadline: float) -> T:
        """Run `work` in one transaction. Raises: Locked, StoreUnavailable, OutcomeUnknown, ValueRefused."""
        with self.lock:
            said: Callable[[], None] | None = None
            try:
                try:
                    connection = self._ready(until, deadline)
                    if self._durable is not durable:
                        # Not possible inside a transaction. In WAL, FULL syncs the log at each commit, NORMAL never.
                        connection.execute(f"pragma synchronous={'full' if durable else 'normal'}")
                        self._durable = durable
                    connection.execute("begin immediate")
                    connection.forget_notes()
                    answer = work(connection)
                    announcer = self._owner.announcer
                    if connection.rows and announcer is not None:
                        said = announcer.announce(connection, until)
                except sqlite3.Error as error:
                    raise self._translated(error) from error
                except UnicodeEncodeError as error:
                    self._roll_back()
                    raise ValueRefused(_NO_TEXT) from error
                except BaseException:
                    self._roll_back()
                    raise
                try:
                    connection.execute("commit")
                except sqlite3.Error as error:
                    self._discard()
                    raise OutcomeUnknown(f"sqlite: commit failed: {_told(error)}") from error
                return answer
            finally:
                # Whatever became of the commit is final now: even one whose outcome nobody knows is over.
                if said is not None:
                    said()

    def close(self) -> None:
        """Let go of the connection; the next use opens another. The caller holds the lock."""
        self._discard()

    def finish(self) -> None:
        """Let go of the connection when it is free."""
        with self.lock:
            self._discard()

    def _ready(self, until: float, deadline: float) -> Connection:
        connection, expected = self._connection, self._owner.expected
        if self._expected is not expected:
            self._expected = expected
            if connection is not None and connection.identity != expected:
                # The file was replaced: this connection goes on in one that nobody else will ever see.
                self._discard()
                connection = None
        if connection is None:
            connection = self._connection = _connect(self._owner.path, until)
            self._durable = True
            self._busy_ms = -1
        elif connection.in_transaction:
            # A signal handler's exception got between a statement and its guard.
            connection.execute("rollback")
        busy_ms = _busy_ms(until, deadline)
        if busy_ms != self._busy_ms:
            connection.execute(f"pragma busy_timeout={busy_ms}")
            self._busy_ms = busy_ms
        return connection

    def _translated(self, error: sqlite3.Error) -> StoreUnavailable:
        if _is_busy(error):
            self._roll_back()
            return Locked("sqlite: the database was locked by another process until the deadline")
        # A connection that failed is not trusted again: the file may have been repaired or replaced.
        self._discard()
        return StoreUnavailable(f"sqlite: {_told(error)}")

    def _roll_back(self) -> None:
        try:
            if self._connection is not None and self._connection.in_transaction:
                self._connection.execute("rollback")
        except sqlite3.Error:
            self._discard()

    def _discard(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class Links:
    """The connections of this process, one a thread.

    `turn` is the lock by which writers take turns, `starting` the one under which a writer thread is started.
    """

    def __init__(self, path: str, deadline: float, announcer: Announcer | None = None) -> None:
        self.turn = threading.Lock()
        self.starting = threading.Lock()
        self.path: Final = path
        self.announcer: Final = announcer
        self.expected: Identity | None = None
        """The file that the path led to when that was last looked at, if it ever was; connections to another one
        are not used again."""
        self._deadline = deadline
        self._pid = os.getpid()
        self._local = threading.local()
        self._links: dict[object, Link] = {}
        self._held: list[Link] = []
        _all_links.add(self)

    def mine(self) -> Link:
        """The calling thread's connection."""
        if self._pid != os.getpid():
            self.forked()
        link: Link | None = getattr(self._local, "link", None)
        return self._join() if link is None else link

    def spare(self) -> Link:
        """A connection that belongs to no thread. Closed with the others, and not to be used after a fork."""
        link = Link(self)
        self._links[object()] = link
        return link

    def close(self) -> None:
        """Close every connection that comes free within the deadline. The next use opens another."""
        until = time.monotonic() + self._deadline
        for link in list(self._links.values()):
            if link.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                try:
                    link.close()
                finally:
                    link.lock.release()

    def before_fork(self) -> None:
        """Close every connection and keep it closed, so that the child inherits none."""
        until = time.monotonic() + self._deadline
        for link in list(self._links.values()):
            if link.lock.acquire(timeout=max(0.0, until - time.monotonic())):
                self._held.append(link)
                link.close()

    def after_fork(self) -> None:
        """Let the parent's threads go on."""
        while self._held:
            self._held.pop().lock.release()

    def forked(self) -> None:
        """Begin anew in a child. A connection that was inherited open is neither used nor closed, ever."""
        _inherited.append(self._links)
        self._pid = os.getpid()
        self._links = {}
        self._held = []
        self._local = threading.local()
        # Whoever held them was not copied into this process.
        self.turn = threading.Lock()
        self.starting = threading.Lock()

    def _join(self) -> Link:
        link, mark, key = Link(self), _Mark(), object()
        self._links[key] = link
        self._local.link, self._local.mark = link, mark
        # The mark dies with the thread. The callback holds no strong way back to it.
        weakref.finalize(mark, _leave, weakref.ref(self), key).atexit = False
        return link

    def leave(self, key: object) -> None:
        """A thread has ended; close its connection."""
        if self._pid != os.getpid():
            return
        link = self._links.pop(key, None)
        # Never wait here: this may run inside the garbage collector of the very thread that holds the lock.
        if link is not None and link.lock.acquire(blocking=False):
            link.close()
            link.lock.release()


class BlockingDriver:
    """The blocking colour: work runs on the calling thread."""

    def __init__(self, path: str, *, deadline: float, announcer: Announcer | None = None) -> None:
        self._links = Links(path, deadline, announcer)
        self._deadline = deadline

    @property
    def links(self) -> Links:
        """The connections of this process."""
        return self._links

    async def read(self, work: Work[T], *, point: bool = True) -> T:
        """On the calling thread."""
        until = time.monotonic() + time_left(self._deadline)
        return self._links.mine().read(work, until=until, deadline=self._deadline)

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        """On the calling thread, in its turn. Raises: StoreUnavailable, OutcomeUnknown."""
        return self._in_turn(
            lambda link, until: link.write(work, durable=durable, until=until, deadline=self._deadline)
        )

    async def aside(self, work: Work[T]) -> T:
        """On the calling thread, in its turn, without a transaction."""
        return self._in_turn(lambda link, until: link.read(work, until=until, deadline=self._deadline))

    async def apart(self, step: Callable[[], T], *, seconds: float) -> T:
        """On the calling thread, which holds up nobody else; the step keeps its own time."""
        return step()

    async def close(self) -> None:
        """Close every thread's connection."""
        self._links.close()

    def _in_turn(self, step: Callable[[Link, float], T]) -> T:
        seconds = time_left(self._deadline)
        until = time.monotonic() + seconds
        link = self._links.mine()
        turn = self._links.turn
        if not turn.acquire(timeout=seconds):
            raise Locked("sqlite: other threads of this process wrote until the deadline; nothing was written")
        try:
            return step(link, until)
        finally:
            turn.release()


class _Mark:
    __slots__ = ("__weakref__",)


def _leave(links: weakref.ref[Links], key: object) -> None:
    alive = links()
    if alive is not None:
        alive.leave(key)


def _connect(path: str, until: float) -> Connection:
    _check_place(path)
    try:
        # Sessions are nobody else's business. SQLite gives its log the same mode as the file it belongs to.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise StoreUnavailable(f"sqlite: {path} cannot be created: {error.strerror}") from error
    identity = identity_of(path)
    connection = sqlite3.connect(
        Path(path).as_uri() + "?mode=rw",
        uri=True,
        timeout=max(0.0, until - time.monotonic()),
        isolation_level=None,
        # A link's lock sees to it that one thread at a time uses it; closing may come from another thread.
        check_same_thread=False,
        cached_statements=64,
        factory=Connection,
    )
    try:
        # Text that is not UTF-8 must become a broken record, not an exception of the driver in the middle of a list.
        connection.text_factory = bytes
        for pragma in _PRAGMAS:
            connection.execute(pragma)
        _enter_wal(connection, path, until)
        # SQLite does not tell which file it has opened. The same one before and after is the one.
        if identity is None or identity_of(path) != identity:
            raise StoreUnavailable(f"sqlite: {path} was replaced while it was opened")
        connection.identity = identity
        connection.forget_notes()
    except BaseException:
        connection.close()
        raise
    return connection


def _check_place(path: str) -> None:
    if sqlite3.sqlite_version_info < OLDEST_SQLITE:
        raise ConfigurationError(
            f"store: this Python has SQLite {sqlite3.sqlite_version}; "
            f"{'.'.join(map(str, OLDEST_SQLITE))} or later is needed"
        )
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise ConfigurationError(f"store: the folder {folder} does not exist: mkdir -p {folder}")
    if os.path.isdir(path):
        raise ConfigurationError(f"store: {path} is a folder; name a file in it")


def _enter_wal(connection: sqlite3.Connection, path: str, until: float) -> None:
    # The change of mode takes an exclusive lock without SQLite's own waiting, when two processes meet a new file.
    while True:
        try:
            mode: bytes = connection.execute("pragma journal_mode=wal").fetchall()[0][0]
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() + _RETRY_SECONDS >= until:
                raise
            time.sleep(_RETRY_SECONDS)
            continue
        if mode != b"wal":
            raise ConfigurationError(
                f"store: {path} is on a file system without shared memory (a network drive?): use a local disk, or "
                "a store with a server"
            )
        return


def _busy_ms(until: float, deadline: float) -> int:
    # Rounded down to a few values: each is another statement for the cache, and none may pass the deadline.
    step = deadline / _BUSY_STEPS
    return int(max(0.0, until - time.monotonic() + step / 64) // step * step * 1000)


def _is_busy(error: sqlite3.Error) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def _told(error: sqlite3.Error) -> str:
    return f"{error} ({getattr(error, 'sqlite_errorname', type(error).__name__)})"


_all_links: weakref.WeakSet[Links] = weakref.WeakSet()
_inherited: list[dict[object, Link]] = []


def _before_fork() -> None:
    for links in list(_all_links):
        links.before_fork()


def _after_fork_in_parent() -> None:
    for links in list(_all_links):
        links.after_fork()


def _after_fork_in_child() -> None:
    for links in list(_all_links):
        links.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
