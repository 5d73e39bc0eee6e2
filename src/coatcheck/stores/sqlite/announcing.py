"""Saying in the words what a transaction changes: before it commits, and once more when that is over.

Decides that a change is announced when the words of its slots are odd before anybody can see it. What cannot be said
is written all the same: it is missing in `announced` then, and every near copy hears of it at its next beat. It must
never let a change count as announced that was not, and never leave a word odd that could be closed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from coatcheck.stores.sqlite.changes import Changes
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.driver import Locked
from coatcheck.stores.sqlite.words import CLOSING_SECONDS, Words, slot_of


class Announcements:
    """What the writers of one store say. They take turns, so nothing here is locked."""

    def __init__(self, path: str, changes: Changes) -> None:
        self._path = path
        self._changes = changes
        self._words: Words | None = None

    def announce(self, connection: Connection, until: float) -> Callable[[], None] | None:
        """Say what this transaction has changed; what is returned has to be called when it was committed or not.

        The connection holds the write lock. `until` is monotonic. Raises: Locked, sqlite3.Error.
        """
        words = self._words_told(connection)
        if words is None:
            return None
        opened = words.open({slot_of(tag) for tag in connection.tags}, until=until)
        if opened is None:
            raise Locked("sqlite: another process held the file of words until the deadline; nothing was written")
        return lambda: words.close(opened, until=time.monotonic() + CLOSING_SECONDS)

    def _words_told(self, connection: Connection) -> Words | None:
        words = self._words
        # A child shares its parent's lock as long as it uses the same descriptor.
        if words is not None and (words.identity != connection.identity or words.pid != os.getpid()):
            words = None
        if words is not None and self._changes.announce(connection, rows=connection.rows, words=words.name):
            return words
        # The first time, or the file was removed and made anew since.
        words = self._words = None if connection.identity is None else Words.of(self._path, connection.identity)
        if words is not None and self._changes.announce(connection, rows=connection.rows, words=words.name):
            return words
        return None
