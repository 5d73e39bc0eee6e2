"""Rows of the SQLite store: reading them with suspicion, and the statements that write them.

Decides what a row means: a record, a tombstone, or bytes that are neither. Decides too which statements change what
somebody may hold a copy of: those note it. SQLite keeps any type in any column, so
nothing of a row is believed before it was looked at. It must never decide when a session is alive, and nothing here
may raise on what a row contains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import TOMBSTONE_US
from coatcheck.core.session import SCHEMA, StoredSession
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.sqlite.cells import integer, octets, text
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.statements import COLUMNS, Statements


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A session that has not been ended, with its last activity and the alias of its last rotation."""

    session: StoredSession
    seen_us: int
    prev_digest: str | None
    sealed: bytes | None
    alias_until_us: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """What is left of an ended session. `mark` tells the digest it was created under, without being it."""

    ref: SessionRef
    reason: str
    at_us: int
    created_us: int
    mark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """A row that cannot be read back; `detail` names the column or the schema."""

    ref: SessionRef
    detail: str


Found: TypeAlias = Record | Tombstone | Broken

# Any type may come out of any column.
Row: TypeAlias = tuple[Any, ...]

_AT: Final = {name: place for place, name in enumerate(COLUMNS)}
_fields_decoder = msgspec.json.Decoder(dict[str, str])


def mark_of(digest: str) -> str:
    """What a tombstone keeps of a digest, so that a repeated `create` is known and nothing else is."""
    return sha256_text(digest.encode("utf-8", "surrogatepass"))


class Rows:
    """The statements on one name space's sessions. Every method runs inside the caller's transaction."""

    def __init__(self, statements: Statements) -> None:
        self._sql = statements

    def find(self, connection: Connection, ref: SessionRef) -> Found | None:
        """The row under this key."""
        rows = connection.execute(self._sql.find, (ref.tag, ref.handle)).fetchall()
        return decode(rows[0], ref) if rows else None

    def of_owner(self, connection: Connection, tag: int, owner: str) -> list[Record | Broken]:
        """Everything of this owner that has not been ended, oldest first, alive or not."""
        rows = connection.execute(self._sql.of_owner, (tag, owner)).fetchall()
        found = [decode(row, _ref_of(row)) for row in rows]
        return [each for each in found if not isinstance(each, Tombstone)]

    def list_by_owner(
        self, connection: Connection, tag: int, owner: str, *, after: tuple[int, str], now: int, limit: int
    ) -> list[Row]:
        """Alive rows of this owner by creation and handle, later than `after`."""
        number, handle = after
        values = {"tag": tag, "owner": owner, "number": number, "handle": handle, "now": now, "limit": limit}
        return connection.execute(self._sql.list_by_owner, values).fetchall()

    def scan(self, connection: Connection, *, after: tuple[int, str], now: int, limit: int) -> list[Row]:
        """Alive rows of everybody by tag and handle, later than `after`."""
        number, handle = after
        values = {"number": number, "handle": handle, "now": now, "limit": limit}
        return connection.execute(self._sql.scan, values).fetchall()

    def evicted_by(self, connection: Connection, ref: SessionRef) -> tuple[SessionRef, ...]:
        """The sessions that gave way to this one, oldest first, as far as their tombstones are still there."""
        rows = connection.execute(self._sql.evicted_by, (ref.tag, ref.handle)).fetchall()
        return tuple(SessionRef(tag, str(handle, "utf-8", "replace")) for tag, handle in rows)

    def insert(self, connection: Connection, session: StoredSession) -> None:
        """Write a new record, used at the moment of its creation."""
        due = min(session.created_us + session.idle_us + TOMBSTONE_US, session.absolute_us)
        connection.execute(
            self._sql.insert,
            (
                session.ref.tag,
                session.ref.handle,
                due,
                session.schema,
                session.version,
                session.digest,
                session.owner,
                session.subject,
                session.created_us,
                session.auth_us,
                session.idle_us,
                session.absolute_us,
                session.created_us,
                session.authority,
                _encode_fields(session.fields),
            ),
        )

    def end(
        self,
        connection: Connection,
        found: Record | Broken,
        *,
        reason: str,
        now: int,
        ended_by: str | None = None,
    ) -> None:
        """Put a tombstone in the row's place. What the session held is overwritten with it, its families are gone."""
        if isinstance(found, Record):
            ref, created, absolute = found.session.ref, found.session.created_us, found.session.absolute_us
            mark = mark_of(found.session.digest)
        else:
            # Nothing of the row can be believed: the tombstone lives its whole time.
            ref, created, absolute, mark = found.ref, now, now + TOMBSTONE_US, ""
        values = {
            "tag": ref.tag,
            "handle": ref.handle,
            "now": now,
            "reason": reason,
            "ended_by": ended_by,
            "due": min(now + TOMBSTONE_US, absolute),
            "created": created,
            "absolute": absolute,
            "mark": mark,
            "schema": SCHEMA,
        }
        connection.note(ref.tag, connection.execute(self._sql.end, values).rowcount)
        connection.execute(self._sql.forget_families, (ref.tag, ref.handle))

    def write_fields(self, connection: Connection, ref: SessionRef, fields: Mapping[str, str], version: int) -> None:
        """Replace the fields and set the version."""
        values = (_encode_fields(fields), version, ref.tag, ref.handle)
        connection.note(ref.tag, connection.execute(self._sql.write_fields, values).rowcount)

    def write_rotation(self, connection: Connection, record: Record) -> None:
        """Write what a rotation changes: digest, authority, version and alias."""
        session = record.session
        values = {
            "tag": session.ref.tag,
            "handle": session.ref.handle,
            "version": session.version,
            "digest": session.digest,
            "authority": session.authority,
            "prev_digest": record.prev_digest,
            "sealed": record.sealed,
            "until": record.alias_until_us,
        }
        connection.note(session.ref.tag, connection.execute(self._sql.write_rotation, values).rowcount)

    def touch(self, connection: Connection, ref: SessionRef, *, seen_us: int, now: int) -> None:
        """Move the last activity of an alive record forward."""
        values = {"tag": ref.tag, "handle": ref.handle, "seen": seen_us, "now": now}
        connection.execute(self._sql.touch, values)

    def due(self, connection: Connection, now: int, limit: int) -> list[Row]:
        """Rows whose lower bound has come, the earliest first, for `settle`."""
        return connection.execute(self._sql.due, (now, limit)).fetchall()

    def settle(self, connection: Connection, row: Row, now: int) -> bool:
        """Remove a due row with its families, or drop its old alias and set when it is due next: whether it went."""
        alias, place = row[_AT["alias_until_us"]], row[-1]
        due = _removable_at(row)
        if due <= now:
            ref = _ref_of(row)
            connection.note(ref.tag, connection.execute(self._sql.remove, (place,)).rowcount)
            connection.execute(self._sql.forget_families, (ref.tag, ref.handle))
            return True
        if type(alias) is int and alias > now:
            connection.execute(self._sql.put_off, (min(due, alias), place))
        else:
            connection.execute(self._sql.forget_alias, (due, place))
        return False


def decode(row: Row, ref: SessionRef) -> Found:
    """What a row is. Never raises: other bytes than ours are `Broken`."""
    try:
        if row[_AT["ended_us"]] is not None:
            return Tombstone(
                ref=ref,
                reason=_text(row, "reason"),
                at_us=_integer(row, "ended_us"),
                created_us=_integer(row, "created_us"),
                mark=_text(row, "digest"),
            )
        # A newer release may mean other things by the same columns: better nobody's session than half of one.
        if _integer(row, "schema") != SCHEMA:
            raise ValueError(f"schema {row[_AT['schema']]}, this release reads {SCHEMA}")
        return Record(
            session=StoredSession(
                schema=SCHEMA,
                version=_integer(row, "version"),
                ref=ref,
                digest=_text(row, "digest"),
                owner=_text(row, "owner"),
                subject=_text(row, "subject"),
                created_us=_integer(row, "created_us"),
                auth_us=_integer(row, "auth_us"),
                idle_us=_integer(row, "idle_us"),
                absolute_us=_integer(row, "absolute_us"),
                authority=_text(row, "authority"),
                fields=_fields(row),
            ),
            seen_us=_integer(row, "seen_us"),
            prev_digest=None if row[_AT["prev_digest"]] is None else _text(row, "prev_digest"),
            sealed=None if row[_AT["sealed"]] is None else _bytes(row, "sealed"),
            alias_until_us=None if row[_AT["alias_until_us"]] is None else _integer(row, "alias_until_us"),
        )
    except ValueError as broken:
        return Broken(ref=ref, detail=f"stored session: {broken}")


def key_of(row: Row) -> tuple[int, str, int]:
    """Tag, handle and creation of a row that a list gave, which has looked at their types."""
    return row[_AT["tag"]], str(row[_AT["handle"]], "ascii"), row[_AT["created_us"]]


def _encode_fields(fields: Mapping[str, str]) -> str:
    return msgspec.json.encode(dict(fields)).decode("utf-8")


def _removable_at(row: Row) -> int:
    ended, absolute = row[_AT["ended_us"]], row[_AT["absolute_us"]]
    died = ended if ended is not None else _sum(row[_AT["seen_us"]], row[_AT["idle_us"]])
    # Times that are no times never come: such a row is nobody's, and goes when it is met.
    return min(died + TOMBSTONE_US, absolute) if type(died) is int and type(absolute) is int else 0


def _sum(left: object, right: object) -> int | None:
    return left + right if type(left) is int and type(right) is int else None


def _ref_of(row: Row) -> SessionRef:
    tag, handle = row[_AT["tag"]], row[_AT["handle"]]
    return SessionRef(
        tag if type(tag) is int else -1, str(handle, "utf-8", "replace") if isinstance(handle, bytes) else ""
    )


def _integer(row: Row, name: str) -> int:
    return integer(row[_AT[name]], name)


def _bytes(row: Row, name: str) -> bytes:
    return octets(row[_AT[name]], name)


def _text(row: Row, name: str) -> str:
    return text(row[_AT[name]], name)


def _fields(row: Row) -> dict[str, str]:
    try:
        return _fields_decoder.decode(_bytes(row, "fields"))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as broken:
        raise ValueError("fields are not what was written") from broken
