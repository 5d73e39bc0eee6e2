"""The denylist as a log: entries in the order of commits, each with the moment after which it decides nothing.

Decides what a position is: the number of the last entry a reader has passed. Writers of one file take turns, so an
entry that is not visible yet gets a higher number than any that was given out. A number is at least the time in
microseconds, so that holds across a backup that was put back: who read further than it reaches is told so, or finds
all that is new. It must never remove an entry before its time, and nothing here may raise on what a row contains.
"""

from __future__ import annotations

import re
import sqlite3
from typing import Any, Final, get_args

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Denial, DenialKind, DenialPage, PositionLost, session_denial_id
from coatcheck.stores.sqlite.cells import integer, is_count, text
from coatcheck.stores.sqlite.statements import Statements

_POSITION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_KINDS: Final[dict[str, DenialKind]] = {kind: kind for kind in get_args(DenialKind)}


class Denials:
    """The statements on one name space's denylist. Every method runs inside the caller's transaction."""

    def __init__(self, statements: Statements) -> None:
        self._sql = statements

    def add(self, connection: sqlite3.Connection, denial: Denial, now: int) -> None:
        """Put an entry at the end of the log, unless the very same is in it."""
        values = {
            "kind": denial.kind,
            "id": denial.id,
            "until": denial.until_us,
            "not_before": denial.not_before_us,
            "now": now,
        }
        connection.execute(self._sql.add_denial, values)

    def add_session(self, connection: sqlite3.Connection, ref: SessionRef, now: int, *, deny_us: int) -> None:
        """Deny a session's tokens for `deny_us`; nothing for 0."""
        if deny_us > 0:
            denial = Denial(kind="sid", id=session_denial_id(ref), until_us=now + deny_us)
            self.add(connection, denial, now)

    def page(self, connection: sqlite3.Connection, *, after: int, limit: int, now: int) -> DenialPage | PositionLost:
        """The entries behind a position, and the end of the log, as of one moment: one statement."""
        values = {"after": after, "now": now, "limit": limit + 1}
        rows = connection.execute(self._sql.denials, values).fetchall()
        end = rows[0][0] if is_count(rows[0][0]) else 0
        if after > end:
            return PositionLost(now_us=now)
        entries = [row for row in rows if row[1] is not None]
        more = len(entries) > limit
        shown = entries[:limit]
        read = [each for each in map(_decode, shown) if each is not None]
        # At the end of the log the position is its end: entries that are over need not be passed again.
        position = shown[-1][1] if more else end
        return DenialPage(entries=tuple(read), position=str(position), more=more, now_us=now)

    def sweep(self, connection: sqlite3.Connection, now: int, limit: int) -> int:
        """Remove up to `limit` entries whose time is over; returns how many."""
        return connection.execute(self._sql.sweep_denials, (now, limit)).rowcount


def position_of(after: str | None) -> int | None:
    """The number in a position, 0 for the start; `None` when it is none of ours."""
    if after is None:
        return 0
    return int(after) if _POSITION.fullmatch(after) else None


def _decode(row: tuple[Any, ...]) -> Denial | None:
    _, _, kind, name, until, not_before = row
    try:
        known = _KINDS.get(text(kind, "kind"))
        if known is None:
            return None
        return Denial(
            kind=known,
            id=text(name, "id"),
            until_us=integer(until, "until_us"),
            not_before_us=integer(not_before, "not_before_us"),
        )
    except ValueError:
        return None
