"""Whether a stored session is alive, and what ends with it.

Decides that the end of a session is one step: tombstone, its families, and its entry on the denylist where one is
asked for. Every verb that ends a session goes through here. It must never end one that it was not told to.
"""

from __future__ import annotations

from coatcheck.core.session import cause_of_death
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.denials import Denials
from coatcheck.stores.sqlite.rows import Broken, Found, Record, Rows, Tombstone


def alive(found: Found | None, now: int) -> Record | str:
    """The record, or the reason why there is nothing alive to act on."""
    if found is None:
        return "unknown"
    if isinstance(found, Tombstone):
        return found.reason
    if isinstance(found, Broken):
        return "unreadable"
    return cause_of_death(found.session, seen_us=found.seen_us, now_us=now) or found


def end_of(found: Found | None, now: int) -> tuple[str, int] | None:
    """Why a session is over and since when; `None` while it is alive. The time is 0 where nothing tells it."""
    state = alive(found, now)
    if isinstance(state, Record):
        return None
    if isinstance(found, Tombstone):
        return state, found.at_us
    if isinstance(found, Record):
        session = found.session
        return state, session.absolute_us if state == "absolute_timeout" else found.seen_us + session.idle_us
    return state, 0


class Endings:
    """Ends sessions inside the caller's transaction."""

    def __init__(self, rows: Rows, denials: Denials) -> None:
        self._rows = rows
        self._denials = denials

    def bury(
        self,
        connection: Connection,
        found: Record | Broken,
        *,
        reason: str,
        now: int,
        deny_us: int = 0,
        ended_by: str | None = None,
    ) -> None:
        """Put a tombstone in the session's place, remove its families, and deny its tokens for `deny_us`."""
        self._rows.end(connection, found, reason=reason, now=now, ended_by=ended_by)
        ref = found.session.ref if isinstance(found, Record) else found.ref
        self._denials.add_session(connection, ref, now, deny_us=deny_us)

    def end(self, connection: Connection, found: Found | None, *, reason: str, now: int, deny_us: int = 0) -> bool:
        """Bury what is not over yet; returns whether this call ended it."""
        if found is None or isinstance(found, Tombstone):
            return False
        state = alive(found, now)
        if isinstance(found, Record) and isinstance(state, str):
            # It died before. Its tombstone keeps it dead, should the clock be set back.
            self.bury(connection, found, reason=state, now=now)
            return False
        # What cannot be read here may be alive to a newer release, so it is ended like the rest.
        self.bury(connection, found, reason=reason, now=now, deny_us=deny_us)
        return True
