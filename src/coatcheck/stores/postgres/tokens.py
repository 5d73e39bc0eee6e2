"""Refresh families, the denylist and the key ring in PostgreSQL: the verbs of `core.ports.TokenStore`.

Decides how these values travel to the functions of `schema/postgres/0002_tokens.sql` and what their answers mean.
The table of `rotate_refresh` is decided there, under the row locks; nothing here may decide any of its rows.

A position of the denylist is the number of its last entry. Entries are numbered under one lock that is held until the
commit, so their order is the order of commits, and every follower may share a number with every process. A number is
at least the time in microseconds: after a restore from a backup none is given out again.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, Final, cast, get_args

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    REASON_REUSED,
    TOMBSTONE_US,
    Denial,
    DenialKind,
    DenialPage,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Gone,
    PositionLost,
    RefreshOutcome,
    Standing,
    WrongHolder,
)
from coatcheck.core.refresh_token import FIRST_GENERATION, FamilyRef, NewFamily, StoredFamily
from coatcheck.core.session import StoredSession
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.stores.postgres.connection import Row
from coatcheck.stores.postgres.rows import escaped, session_of, unescaped

MAX_RING_BYTES: Final = 256 * 1024
"""How large a sealed key ring may be."""

_POSITION: Final = re.compile(r"0|[1-9][0-9]{0,17}")
_KINDS: Final = frozenset(get_args(DenialKind))
_FAMILY: Final = 11


class TokenVerbs(ABC):
    """The token verbs of a store that can call the functions of its database."""

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """Begin a family with its first token. See `core.ports`. Raises: StoreUnavailable, OutcomeUnknown."""
        (row,) = await self._write(
            "create_family",
            new.ref.tag,
            new.ref.root,
            new.ref.name,
            new.ref.of_session,
            new.digest,
            new.owner,
            new.subject,
            escaped(new.client),
            escaped(new.key),
            escaped(new.grant),
            new.idle_us,
            new.absolute_us,
            MAX_FAMILIES,
            self._offset(),
        )
        outcome, cause, written_us, now_us, *columns = row
        if outcome == "gone":
            return Gone(reason=cause, now_us=now_us)
        if outcome != "created":
            raise StoreUnavailable("a new family met a name in use: the random source repeats itself")
        family = StoredFamily(
            ref=new.ref,
            generation=FIRST_GENERATION,
            digest=new.digest,
            owner=new.owner,
            subject=new.subject,
            client=new.client,
            key=new.key,
            grant=new.grant,
            created_us=written_us,
            rotated_us=written_us,
            idle_us=new.idle_us,
            absolute_us=written_us + new.absolute_us,
        )
        return FamilyCreated(family=family, session=_session(new.ref, columns), now_us=now_us)

    async def rotate_refresh(
        self,
        ref: FamilyRef,
        *,
        generation: int,
        digest: str,
        successor: str,
        sealed: bytes,
        grace_us: int,
        client: str,
        key: str,
        deny_us: int = 0,
    ) -> RefreshOutcome:
        """Exchange a refresh token; of many at once the first wins. See the table in `core.ports`.

        Raises: StoreUnavailable, OutcomeUnknown.
        """
        (row,) = await self._write(
            "rotate_refresh",
            ref.tag,
            ref.root,
            ref.name,
            ref.of_session,
            generation,
            digest,
            successor,
            sealed,
            grace_us,
            escaped(client),
            escaped(key),
            REASON_REUSED,
            TOMBSTONE_US,
            self._offset(),
            deny_us,
        )
        outcome, cause, at_us, session_ended, seen_us, now_us, successor_sealed, *columns = row
        if outcome == "unknown":
            return FamilyUnknown(now_us=now_us)
        if outcome == "ended":
            return FamilyEnded(reason=cause, at_us=at_us, now_us=now_us)
        if outcome == "wrong_holder":
            return WrongHolder(now_us=now_us)
        family, session = _family(ref, columns[:_FAMILY]), _session(ref, columns[_FAMILY:])
        if outcome == "reused":
            return FamilyReused(family=family, session=ref.session if session_ended else None, now_us=now_us)
        if outcome == "rotated":
            return FamilyRotated(family=family, session=session, seen_us=seen_us, now_us=now_us)
        if outcome == "kept":
            return FamilyKept(family=family, session=session, seen_us=seen_us, now_us=now_us)
        return FamilyReplayed(family=family, session=session, seen_us=seen_us, sealed=successor_sealed, now_us=now_us)

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """Whether an access token of this session may still be accepted; writes nothing."""
        ((why, at_us, now_us),) = await self._read("standing", ref.tag, ref.handle, escaped(jti), self._offset())
        return Standing(why=why, at_us=at_us, now_us=now_us)

    async def deny(self, tag: int, denial: Denial) -> None:
        """Put one entry on the denylist, unless the very same stands there. One log for all tags."""
        values = (denial.kind, [escaped(denial.id)], denial.until_us, denial.not_before_us, self._offset())
        await self._write("deny", *values)

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist after a position, in the order of commits; a position stays good when its entry has gone."""
        known = after is None or _POSITION.fullmatch(after) is not None
        start = int(after) if known and after is not None else 0
        rows = await self._read("denials", start, limit + 1, self._offset())
        now_us, latest = rows[0][:2]
        if not known or start > latest:
            return PositionLost(now_us=now_us)
        found = [row[2:] for row in rows if row[2] is not None]
        more = len(found) > limit
        return DenialPage(
            # A kind that only a newer release knows is for that one to heed.
            entries=tuple(
                Denial(kind=cast(DenialKind, kind), id=unescaped(name), until_us=until_us, not_before_us=not_before_us)
                for _, kind, name, until_us, not_before_us in found[:limit]
                if kind in _KINDS
            ),
            position=str(found[limit - 1][0] if more else latest),
            more=more,
            now_us=now_us,
        )

    async def read_ring(self) -> tuple[int, bytes] | None:
        """The sealed key ring with its version, or `None` before there is one."""
        ((version, packed),) = await self._read("read_ring")
        return None if version is None else (version, packed)

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """Replace the ring if it is still at `expected`; of many at once one does. Raises: ValueRefused (size)."""
        if len(packed) > MAX_RING_BYTES:
            raise ValueRefused(f"a key ring has at most {MAX_RING_BYTES} octets")
        ((written,),) = await self._write("write_ring", packed, expected)
        return bool(written)

    @abstractmethod
    async def _read(self, verb: str, *values: object) -> list[Row]: ...

    @abstractmethod
    async def _write(self, verb: str, *values: object) -> list[Row]: ...

    @abstractmethod
    def _offset(self) -> int: ...


def _columns(row: str, names: str) -> str:
    return ", ".join(f"(e.{row}).{name}" for name in names.split())


_SESSION_COLUMNS: Final = _columns(
    "session",
    "schema_number version digest owner subject created_us auth_us idle_us absolute_us seen_us authority fields::text",
)
_FAMILY_COLUMNS: Final = _columns(
    "family",
    "generation digest owner subject client key granted created_us rotated_us idle_us absolute_us",
)

TOKEN_STATEMENTS: Final[dict[str, str]] = {
    "create_family": f"SELECT e.outcome, e.cause, e.written_us, e.now_us, {_SESSION_COLUMNS} "  # noqa: S608
    "FROM {n}_create_family(%s::integer, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) AS e",
    "rotate_refresh": "SELECT e.outcome, e.cause, e.at_us, e.session_ended, e.last_seen_us, e.now_us, e.successor, "  # noqa: S608
    f"{_FAMILY_COLUMNS}, {_SESSION_COLUMNS} "
    "FROM {n}_rotate_refresh(%s::integer, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s) AS e",
    "standing": "SELECT * FROM {n}_standing(%s::integer, %s, %s, %s)",
    "deny": "SELECT {n}_deny(%s, %s::text[], %s, %s, {n}_clock(%s))",
    "denials": "SELECT * FROM {n}_denials_after(%s, %s, %s)",
    "read_ring": "SELECT * FROM {n}_read_ring()",
    "write_ring": "SELECT {n}_write_ring(%s, %s)",
}


def _family(ref: FamilyRef, columns: list[Any]) -> StoredFamily:
    generation, digest, owner, subject, client, key, granted, created_us, rotated_us, idle_us, absolute_us = columns
    return StoredFamily(
        ref=ref,
        generation=generation,
        digest=digest,
        owner=owner,
        subject=subject,
        client=unescaped(client),
        key=unescaped(key),
        grant=unescaped(granted),
        created_us=created_us,
        rotated_us=rotated_us,
        idle_us=idle_us,
        absolute_us=absolute_us,
    )


def _session(ref: FamilyRef, columns: list[Any]) -> StoredSession | None:
    # The function has judged it: only what this release can read gets so far.
    return None if ref.session is None else session_of(ref.session, columns)[0]
