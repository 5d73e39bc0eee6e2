"""How often session records were changed, and how often that was said in the words: one row in the database.

Decides which changes count: those of what a near copy holds, whoever makes them, because triggers of the database do
the counting. A writer of this package adds what he said to `announced` in the very transaction he changes the records
in, so that both sides are one commit. Where `changed` is ahead, somebody wrote past us. Use (`seen_us`), new
sessions and the log of a sweep do not count: nobody's copy is wrong after them. It must never say `announced` for
words that the readers of the database do not look at; `words` is the name of their file.

Made when it is missing instead of by a migration: a release that knows no words may go on writing beside this one,
and is noticed like any other tool.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Final

from coatcheck.stores.sqlite.cells import is_count
from coatcheck.stores.sqlite.statements import Statements

_HAS_TRIGGER: Final = "select 1 from sqlite_master where type = 'trigger' and name = ?"
_LAST: Final = "{namespace}_sessions_overwritten"
_MAKE: Final = (
    "create table if not exists {namespace}_changes (place integer not null primary key check (place = 1), "
    "changed integer not null, announced integer not null, words integer not null)",
    "insert into {namespace}_changes values (1, 0, 0, 0) on conflict do nothing",
    "create trigger if not exists {namespace}_sessions_changed after update of tag, handle, owner, created_us, "
    "idle_us, absolute_us, ended_us, schema, version, digest, subject, auth_us, authority, fields "
    "on {namespace}_sessions {count}",
    "create trigger if not exists {namespace}_sessions_removed after delete on {namespace}_sessions {count}",
    # INSERT OR REPLACE removes a row without a word to the trigger above.
    "create trigger if not exists {namespace}_sessions_overwritten before insert on {namespace}_sessions when exists "
    "(select 1 from {namespace}_sessions where tag = new.tag and handle = new.handle) {count}",
)
_COUNT: Final = "begin update {namespace}_changes set changed = changed + 1; end"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """The row at one moment."""

    changed: int
    announced: int
    words: int

    @property
    def unsaid(self) -> int:
        """Changes that nobody announced since the database was made."""
        return self.changed - self.announced


class Changes:
    """The statements on one name space's row. Every method but `make` runs inside the caller's transaction."""

    def __init__(self, statements: Statements, namespace: str) -> None:
        self._sql = statements
        self._namespace = namespace

    def are_counted(self, connection: sqlite3.Connection) -> bool:
        """Whether the row and its triggers are there."""
        return bool(connection.execute(_HAS_TRIGGER, (self._filled(_LAST),)).fetchall())

    def make(self, connection: sqlite3.Connection) -> None:
        """Make what is missing, in one transaction. The connection is in none."""
        connection.execute("begin immediate")
        try:
            for statement in _MAKE:
                connection.execute(self._filled(statement))
            connection.execute("commit")
        except BaseException:
            if connection.in_transaction:
                connection.execute("rollback")
            raise

    def announce(self, connection: sqlite3.Connection, *, rows: int, words: int) -> bool:
        """Note that so many changes of this transaction were said in the words of this name; false when the readers
        look at other words."""
        return connection.execute(self._sql.announce_changes, (rows, words)).rowcount == 1

    def claim(self, connection: sqlite3.Connection, words: int) -> None:
        """The readers of this database look at the words of this name from now on."""
        connection.execute(self._sql.claim_changes, (words,))

    def tally(self, connection: sqlite3.Connection) -> Tally | None:
        """The row; `None` when it is not one of ours."""
        rows = connection.execute(self._sql.tally_changes).fetchall()
        if len(rows) != 1 or not all(map(is_count, rows[0])):
            return None
        changed, announced, words = rows[0]
        return Tally(changed=changed, announced=announced, words=words)

    def _filled(self, template: str) -> str:
        return template.replace("{count}", _COUNT).replace("{namespace}", self._namespace)
