"""Rows of refresh families: reading them with suspicion, and the statements that write them.

Decides what a row means, and that only what a later question needs is kept in it. It must never decide what becomes
of a presented token (`tokens` does), and nothing here may raise on what a row contains. The families of a session are
removed where the session is (`rows`), not here.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import MAX_FAMILIES
from coatcheck.core.refresh_token import FamilyRef, StoredFamily
from coatcheck.stores.sqlite.cells import integer, is_count, octets, text
from coatcheck.stores.sqlite.statements import FAMILY_COLUMNS, Statements


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptFamily:
    """A family with what it remembers of its last rotation, and its end if it was ended.

    Once it was ended, its digests, owner, subject and grant are empty: nobody asks for them any more.
    """

    family: StoredFamily
    prev_digest: str | None
    sealed: bytes | None
    grace_until_us: int
    ended: tuple[str, int] | None


@dataclass(frozen=True, slots=True)
class DamagedFamily:
    """A row that cannot be read back."""


FoundFamily: TypeAlias = KeptFamily | DamagedFamily

_AT: Final = {name: place for place, name in enumerate(FAMILY_COLUMNS)}


class Families:
    """The statements on one name space's families. Every method runs inside the caller's transaction."""

    def __init__(self, statements: Statements) -> None:
        self._sql = statements

    def find(self, connection: sqlite3.Connection, ref: FamilyRef) -> FoundFamily | None:
        """The row under this key."""
        rows = connection.execute(self._sql.find_family, _key(ref)).fetchall()
        return _decode(rows[0], ref) if rows else None

    def insert(self, connection: sqlite3.Connection, family: StoredFamily) -> None:
        """Write a new family. It has no predecessor, so its grace is over."""
        values = {
            **_names(family.ref),
            "due": _ends_at(family),
            "owner": family.owner,
            "subject": family.subject,
            "client": family.client,
            "holder_key": family.key,
            "grant": family.grant,
            "created": family.created_us,
            "rotated": family.rotated_us,
            "idle": family.idle_us,
            "absolute": family.absolute_us,
            "generation": family.generation,
            "digest": family.digest,
        }
        connection.execute(self._sql.insert_family, values)

    def make_room(self, connection: sqlite3.Connection, session: SessionRef, now: int) -> None:
        """Drop families of a session until one more fits: those that are over, then the oldest."""
        values = {"tag": session.tag, "root": session.handle, "now": now, "maximum": MAX_FAMILIES}
        connection.execute(self._sql.drop_over_families, values)
        connection.execute(self._sql.drop_oldest_families, (session.tag, session.handle, MAX_FAMILIES - 1))

    def write_rotation(
        self,
        connection: sqlite3.Connection,
        family: StoredFamily,
        *,
        prev_digest: str,
        sealed: bytes | None,
        grace_until_us: int,
    ) -> None:
        """Write what a rotation changes. An older sealed successor is overwritten with it."""
        values = {
            **_names(family.ref),
            "generation": family.generation,
            "digest": family.digest,
            "rotated": family.rotated_us,
            "prev_digest": prev_digest,
            "sealed": sealed,
            "until": grace_until_us,
        }
        connection.execute(self._sql.rotate_family, values)

    def forget_sealed(self, connection: sqlite3.Connection, ref: FamilyRef) -> None:
        """Erase the sealed successor: it was used."""
        connection.execute(self._sql.forget_sealed, _key(ref))

    def end(self, connection: sqlite3.Connection, ref: FamilyRef, *, reason: str, at_us: int) -> None:
        """Mark a family as ended and erase what it held."""
        connection.execute(self._sql.end_family, {**_names(ref), "reason": reason, "at": at_us})

    def newest_alone(self, connection: sqlite3.Connection, tag: int, owner: str) -> int:
        """When the youngest family of this owner that stands alone was created; 0 without one."""
        newest = connection.execute(self._sql.newest_alone, (tag, owner)).fetchall()[0][0]
        return newest if is_count(newest) else 0

    def end_alone(self, connection: sqlite3.Connection, tag: int, owner: str, *, reason: str, at_us: int) -> None:
        """End every family of this owner that stands alone. Those of sessions end with them."""
        connection.execute(self._sql.end_alone, {"tag": tag, "owner": owner, "reason": reason, "at": at_us})

    def sweep(self, connection: sqlite3.Connection, now: int, limit: int) -> tuple[int, int]:
        """Remove families whose time is over, or set when they are due next: how many were looked at and removed."""
        rows = connection.execute(self._sql.due_families, (now, limit)).fetchall()
        removed = 0
        for rotated, idle, absolute, place in rows:
            # Times that are no times never come: such a row is nobody's, and goes when it is met.
            due = min(rotated + idle, absolute) if is_count(rotated) and is_count(idle) and is_count(absolute) else 0
            if due <= now:
                connection.execute(self._sql.remove_family, (place,))
                removed += 1
            else:
                connection.execute(self._sql.put_off_family, (due, place))
        return len(rows), removed

    def sweep_sealed(self, connection: sqlite3.Connection, now: int, limit: int) -> int:
        """Erase up to `limit` sealed successors whose grace is over; returns how many."""
        return connection.execute(self._sql.sweep_sealed, (now, limit)).rowcount


def _key(ref: FamilyRef) -> tuple[int, int, str, str]:
    return ref.tag, int(ref.of_session), ref.root, ref.name


def _names(ref: FamilyRef) -> dict[str, object]:
    return {"tag": ref.tag, "of_session": int(ref.of_session), "root": ref.root, "name": ref.name}


def _ends_at(family: StoredFamily) -> int:
    return min(family.rotated_us + family.idle_us, family.absolute_us)


def _decode(row: tuple[Any, ...], ref: FamilyRef) -> FoundFamily:
    try:
        ended = row[_AT["ended_us"]]
        return KeptFamily(
            family=StoredFamily(
                ref=ref,
                generation=_integer(row, "generation"),
                digest=_text(row, "digest"),
                owner=_text(row, "owner"),
                subject=_text(row, "subject"),
                client=_text(row, "client"),
                key=_text(row, "key"),
                grant=_text(row, "grant"),
                created_us=_integer(row, "created_us"),
                rotated_us=_integer(row, "rotated_us"),
                idle_us=_integer(row, "idle_us"),
                absolute_us=_integer(row, "absolute_us"),
            ),
            prev_digest=None if row[_AT["prev_digest"]] is None else _text(row, "prev_digest"),
            sealed=None if row[_AT["sealed"]] is None else octets(row[_AT["sealed"]], "sealed"),
            grace_until_us=_integer(row, "grace_until_us"),
            ended=None if ended is None else (_text(row, "reason"), integer(ended, "ended_us")),
        )
    except ValueError:
        return DamagedFamily()


def _integer(row: tuple[Any, ...], name: str) -> int:
    return integer(row[_AT[name]], name)


def _text(row: tuple[Any, ...], name: str) -> str:
    return text(row[_AT[name]], name)
