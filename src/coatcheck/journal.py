"""Sign-outs that came while the store was away, kept on this node's disk until the store has them.

Decides what is written down: where the session lives, never an id or its digest (nobody has to prove anything again),
the reason and the time. A record is on the disk before `add` returns, and survives a process that is killed and a
machine that loses power. Several processes of one node share the file. Administrative revocations must never be kept
here: whoever makes them has to know that they hold.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coatcheck.core.ids import SessionRef
from coatcheck.errors import StoreUnavailable

if TYPE_CHECKING:
    import sqlite3

MOST: Final = 100_000
"""Sign-outs that may wait; further ones are answered 503."""

log: Final = logging.getLogger("coatcheck")

_HANDLE: Final = re.compile(r"[A-Za-z0-9_-]{16}")
_BUSY_SECONDS: Final = 1.0
# The head of an SQLite file; its octets 24 to 27 count the changes. (The time of a file is only as fine as a tick.)
_HEAD: Final = 28
_TABLE: Final = """
create table if not exists sign_outs (
  handle text primary key, tag integer not null, reason text not null, at_us integer not null
) without rowid
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SignOut:
    """One session that somebody has signed out of, when (Unix microseconds) and why."""

    ref: SessionRef
    reason: str
    at_us: int


class Journal:
    """The journal of one name space on one node. Safe for threads, processes and forks: nothing stays open."""

    def __init__(self, directory: Path, namespace: str) -> None:
        self._path: Final = directory / f"sign-outs-{namespace}.db"

    def add(self, sign_outs: Sequence[SignOut]) -> None:
        """Keep them; on the disk when this returns. Raises: StoreUnavailable where that cannot be done, or when
        `MOST` wait already."""
        with self._open() as connection:
            connection.execute("begin immediate")
            (waiting,) = connection.execute("select count(*) from sign_outs").fetchone()
            if waiting + len(sign_outs) > MOST:
                raise StoreUnavailable("journal: full; no further sign-out can be kept until the store is back")
            connection.executemany(
                "insert or ignore into sign_outs values (?, ?, ?, ?)",
                [(each.ref.handle, each.ref.tag, each.reason, each.at_us) for each in sign_outs],
            )
            connection.execute("commit")

    def waiting(self) -> tuple[SignOut, ...]:
        """All that wait, oldest first. Raises: StoreUnavailable."""
        if not self._path.exists():
            return ()
        with self._open() as connection:
            rows = connection.execute("select handle, tag, reason, at_us from sign_outs order by at_us").fetchall()
        found = [_sign_out(row) for row in rows]
        if None in found:
            log.warning("coatcheck: the journal %s holds rows that are no sign-outs; they are left", self._path.name)
        return tuple(each for each in found if each is not None)

    def holds(self, ref: SessionRef) -> bool:
        """Whether a sign-out of this session waits. Raises: StoreUnavailable."""
        if not self._path.exists():
            return False
        with self._open() as connection:
            return connection.execute("select 1 from sign_outs where handle = ?", (ref.handle,)).fetchone() is not None

    def stamp(self) -> object:
        """Something else after every change of the journal; None where there is none yet."""
        try:
            with self._path.open("rb") as file:
                head = file.read(_HEAD)
                return os.fstat(file.fileno()).st_ino, head[24:28]
        except OSError:
            return None

    def done(self, sign_outs: Sequence[SignOut]) -> None:
        """The store has them. Raises: StoreUnavailable; then they are carried out once more, which changes nothing."""
        with self._open() as connection:
            connection.execute("begin immediate")
            connection.executemany("delete from sign_outs where handle = ?", [(each.ref.handle,) for each in sign_outs])
            connection.execute("commit")

    def _claim(self) -> None:
        """Make the file before SQLite does, which would let everybody read it; and use none that others can write."""
        descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            found = os.fstat(descriptor)
            foreign = hasattr(os, "geteuid") and found.st_uid != os.geteuid()
            if not stat.S_ISREG(found.st_mode) or foreign or (os.name == "posix" and found.st_mode & 0o077):
                raise StoreUnavailable(f"journal: {self._path.name} is open to others, or is no file of this user")
        finally:
            os.close(descriptor)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        # Imported by whoever has something to keep: few applications ever load it.
        import sqlite3

        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim()
            with closing(sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None)) as connection:
                connection.execute("pragma synchronous=extra")
                connection.execute(_TABLE)
                yield connection
        except (OSError, sqlite3.Error) as broken:
            raise StoreUnavailable(f"journal: {self._path.name} cannot be used: {broken}") from broken


def _sign_out(row: tuple[object, object, object, object]) -> SignOut | None:
    handle, tag, reason, at_us = row
    if not (isinstance(handle, str) and _HANDLE.fullmatch(handle) and isinstance(tag, int) and 0 <= tag <= 0xFFFF):
        return None
    if not (isinstance(reason, str) and isinstance(at_us, int)):
        return None
    return SignOut(ref=SessionRef(tag, handle), reason=reason, at_us=at_us)
