"""The word file of one database: 4096 words that its writers change, mapped by every process.

Decides what a word says: even, and the same as before, means that no session of its slot was written in between; odd
means that somebody is writing. Values are random and never come back, so that two writers can never undo each other's
news. A word is changed under a file lock of its own, for an instant: whoever finishes closes only what he opened
himself, and the odd word of a writer that came after stays odd. It must never hold anything about anybody, and never
open the database: that would drop SQLite's locks (see `driver`).

    octets 0-7    "ccwords1"
    octets 8-15   name of this file, 62 random bits
    octets 64-    4096 words of 8 octets, in the machine's own order
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import secrets
import stat
import struct
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, NamedTuple

SLOTS: Final = 4096
_MAGIC: Final = b"ccwords1"
_HEADER: Final = struct.Struct("=8sQ48x")
_SIZE: Final = _HEADER.size + 8 * SLOTS
_RETRY_SECONDS: Final = 0.0005
CLOSING_SECONDS: Final = 0.05
"""How long a writer tries to close his words. The lock is held for a few stores by those who live; without it the words
stay odd, and a beat closes them (`feed`)."""
_ODD: Final = re.compile(b"[" + b"".join(re.escape(bytes((octet,))) for octet in range(1, 256, 2)) + b"]")
_LOW_OCTET: Final = 0 if sys.byteorder == "little" else 7


class Identity(NamedTuple):
    """Which file a path led to."""

    device: int
    inode: int


def identity_of(path: str) -> Identity | None:
    """The file at this path; `None` when there is none. Looks, never opens."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return Identity(state.st_dev, state.st_ino)


def slot_of(tag: int) -> int:
    """Which word speaks for the sessions with this tag."""
    return tag % SLOTS


class Words:
    """One mapped word file. Threads may read together; those of one process that write take turns."""

    def __init__(self, descriptor: int, identity: Identity, name: int) -> None:
        self.identity: Final = identity
        self.name: Final = name
        """What tells this file from another one of the same path."""
        self.pid: Final = os.getpid()
        self._descriptor = descriptor
        mapped = mmap.mmap(descriptor, _SIZE)
        self._octets: Final = memoryview(mapped)[_HEADER.size :]
        self.marks: Final = self._octets.cast("Q")
        # Whoever holds `marks` keeps the mapping; the descriptor is only there for its lock.
        weakref.finalize(self, os.close, descriptor).atexit = False

    @classmethod
    def of(cls, database: str, identity: Identity) -> Words | None:
        """The words of the database at this path, which is this file; made when there are none.

        `None` where they cannot be had or are not to be trusted: then nobody may believe a copy.
        """
        if sys.platform == "win32":
            return None
        # SQLite keeps its log beside what a link points to, and so do we.
        path = f"{os.path.realpath(database)}-words-{identity.device:x}-{identity.inode:x}"
        try:
            descriptor = _open(path)
            if descriptor is None:
                _make(path)
                descriptor = _open(path)
        except OSError:
            return None
        if descriptor is None:
            return None
        name = _name_in(descriptor)
        if name is None:
            os.close(descriptor)
            return None
        return cls(descriptor, identity, name)

    def open(self, slots: set[int], *, until: float) -> dict[int, int] | None:
        """Say that these slots are being written, with fresh odd words; what they are is what `close` needs.

        The caller holds the database's write lock, so nobody else is between this and his commit. `None` when the
        file's lock was not to be had until `until`, monotonic.
        """
        opened = {slot: secrets.randbits(63) << 1 | 1 for slot in slots}
        with self._locked(until) as locked:
            if not locked:
                return None
            self._put(opened)
        return opened

    def close(self, opened: Mapping[int, int], *, until: float) -> None:
        """Say that what was written is over, committed or not: fresh even words in place of one's own odd ones."""
        with self._locked(until) as locked:
            if not locked:
                return
            # Another word was put there after this one: by a writer that is at it, or after the commit.
            mine = [slot for slot, word in opened.items() if self.marks[slot] == word]
            self._put({slot: secrets.randbits(63) << 1 for slot in mine})

    def being_written(self) -> dict[int, int]:
        """The odd words by slot. A few microseconds when there are none."""
        odd = [found.start() for found in _ODD.finditer(bytes(self._octets[_LOW_OCTET::8]))]
        return {slot: word for slot in odd if (word := self.marks[slot]) & 1}

    def _put(self, words: Mapping[int, int]) -> None:
        for slot, word in words.items():
            # One store of eight aligned octets: nobody ever sees half of it.
            self.marks[slot] = word

    @contextmanager
    def _locked(self, until: float) -> Iterator[bool]:
        # Not a POSIX lock: those belong to a process as a whole, and two stores in one would share it.
        while not _take(self._descriptor):
            if time.monotonic() + _RETRY_SECONDS >= until:
                yield False
                return
            time.sleep(_RETRY_SECONDS)
        try:
            yield True
        finally:
            _give(self._descriptor)


if sys.platform == "win32":
    # Nobody gets this far: there are no words.
    def _take(descriptor: int) -> bool:
        return False

    def _give(descriptor: int) -> None:
        return
else:
    import fcntl

    def _take(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def _give(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def _open(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _name_in(descriptor: int) -> int | None:
    """The name of a word file, if that is what this is and nobody else could have written it."""
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_size != _SIZE or stat.S_IMODE(state.st_mode) & 0o077:
        return None
    magic, name = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    return int(name) if magic == _MAGIC else None


def _make(path: str) -> None:
    draft = f"{path}.{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            content = _HEADER.pack(_MAGIC, secrets.randbits(62)) + bytes(8 * SLOTS)
            if os.write(descriptor, content) != len(content):
                # Half a file would never be replaced: it has its name for good.
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
        # A link fails where there is a file already, and the name never shows half of one.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
