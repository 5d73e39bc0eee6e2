"""One connection to the file, which remembers whose sessions its transaction has changed.

Decides nothing: those who write records note them here, the driver says so in the words (`announcing`) before it
commits. It must never forget a note before that.
"""

from __future__ import annotations

import sqlite3

from coatcheck.stores.sqlite.words import Identity


class Connection(sqlite3.Connection):
    """`identity`: the file it was opened on, whatever its path leads to today."""

    identity: Identity | None = None
    tags: set[int]
    rows: int = 0

    def note(self, tag: int, rows: int) -> None:
        """So many records of sessions with this tag were changed or removed in this transaction."""
        if rows:
            self.tags.add(tag)
            self.rows += rows

    def forget_notes(self) -> None:
        """A new transaction begins."""
        self.tags = set()
        self.rows = 0
