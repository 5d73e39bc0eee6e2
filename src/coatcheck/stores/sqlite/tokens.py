"""Refresh families, the denylist and the key ring in one SQLite file.

Decides what becomes of a presented refresh token, row by row as `core.ports.TokenStore` says, inside one transaction:
of any number of callers at once the first to have its turn rotates and the others see what it has written. Every write
here is durable like a revoke (docs/decisions/0006): a successor that was handed out and then forgotten by a power cut
would make its holder look like a thief. It must never look at a token's grant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Literal

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    REASON_REUSED,
    Denial,
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
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite.cells import is_count
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.denials import Denials, position_of
from coatcheck.stores.sqlite.endings import Endings, alive, end_of
from coatcheck.stores.sqlite.families import DamagedFamily, Families, KeptFamily
from coatcheck.stores.sqlite.file import SqliteFile
from coatcheck.stores.sqlite.rows import Record, Rows, decode

MAX_RING_OCTETS: Final = 256 * 1024

_Verdict = Literal["kept", "rotate", "repeated", "replayed", "reused", "unknown"]


class TokenVerbs(SqliteFile):
    """The verbs of `TokenStore`. Exact under any number of threads, tasks and processes."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Raises: ConfigurationError when the URL names no file."""
        super().__init__(url, options)
        self._rows = Rows(self._sql)
        self._families = Families(self._sql)
        self._denials = Denials(self._sql)
        self._endings = Endings(self._rows, self._denials)

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """Begin a family with its first token. See `core.ports`. Raises: StoreUnavailable."""

        def work(connection: Connection) -> FamilyCreated | Gone:
            now, of = self._now(), new.ref.session
            session = None
            if of is not None:
                record = alive(self._rows.find(connection, of), now)
                if isinstance(record, str):
                    return Gone(reason=record, now_us=now)
                session = record.session
            found = self._families.find(connection, new.ref)
            # A holder whose token was exchanged or ended since must not be told that it is good.
            if isinstance(found, KeptFamily) and found.ended is None and found.family.digest == new.digest:
                return FamilyCreated(family=_begun(new, found.family.created_us), session=session, now_us=now)
            if found is not None:
                raise StoreUnavailable("a new family met a name in use: the random source repeats itself")
            if of is None:
                family = _begun(new, self._after_cut(connection, new.owner, now))
            else:
                family = _begun(new, now)
                self._families.make_room(connection, of, now)
            self._families.insert(connection, family)
            return FamilyCreated(family=family, session=session, now_us=now)

        return await self._use().write(work)

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
        """Exchange a refresh token; see the table in `core.ports`. Raises: StoreUnavailable."""

        def work(connection: Connection) -> RefreshOutcome:
            now = self._now()
            record = self._session_of(connection, ref, now)
            if isinstance(record, (FamilyEnded, FamilyUnknown)):
                return record
            found = self._families.find(connection, ref)
            if found is None or isinstance(found, DamagedFamily):
                return FamilyUnknown(now_us=now)
            family = found.family
            if (client, key) != (family.client, family.key):
                return WrongHolder(now_us=now)
            over = _over(found, now)
            if over is not None:
                return FamilyEnded(reason=over[0], at_us=over[1], now_us=now)
            verdict = _verdict(
                found, now=now, generation=generation, digest=digest, successor=successor, grace_us=grace_us
            )
            if verdict == "unknown":
                return FamilyUnknown(now_us=now)
            if verdict == "reused":
                return self._reused(connection, family, record, now, deny_us=deny_us)
            session, seen = (None, 0) if record is None else (record.session, record.seen_us)
            if record is not None:
                self._rows.touch(connection, record.session.ref, seen_us=now, now=now)
            if verdict == "kept":
                # Whoever presents the successor has it; from now on the predecessor must not open it again.
                self._families.forget_sealed(connection, ref)
                return FamilyKept(family=family, session=session, seen_us=seen, now_us=now)
            if verdict == "replayed":
                return FamilyReplayed(family=family, session=session, seen_us=seen, sealed=found.sealed, now_us=now)
            if verdict == "rotate":
                family = replace(family, generation=generation + 1, digest=successor, rotated_us=now)
                self._families.write_rotation(
                    connection,
                    family,
                    prev_digest=digest,
                    sealed=sealed if grace_us > 0 else None,
                    grace_until_us=now + grace_us,
                )
            return FamilyRotated(family=family, session=session, seen_us=seen, now_us=now)

        return await self._use().write(work)

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """Whether an access token of this session may still be accepted; one statement that writes nothing."""

        def work(connection: Connection) -> Standing:
            now = self._now()
            values = {"tag": ref.tag, "handle": ref.handle, "jti": jti, "now": now}
            row = connection.execute(self._sql.standing, values).fetchall()[0]
            denied, there = row[-2:]
            if denied:
                return Standing(why="denied", at_us=0, now_us=now)
            why, at_us = end_of(decode(row, ref) if there else None, now) or (None, 0)
            return Standing(why=why, at_us=at_us, now_us=now)

        return await self._use().read(work)

    async def deny(self, tag: int, denial: Denial) -> None:
        """Put one entry on the denylist; there is one log in the file, whatever the tag. Raises: StoreUnavailable."""
        await self._use().write(lambda connection: self._denials.add(connection, denial, self._now()))

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist in the order of commits; one statement that writes nothing."""
        start = position_of(after)

        def work(connection: Connection) -> DenialPage | PositionLost:
            now = self._now()
            if start is None:
                return PositionLost(now_us=now)
            return self._denials.page(connection, after=start, limit=limit, now=now)

        # Who follows the log finds little behind a position; who begins may find thousands of entries.
        return await self._use().read(work, point=after is not None)

    async def read_ring(self) -> tuple[int, bytes] | None:
        """The sealed key ring with its version. Raises: StoreUnavailable, also when what is stored is no ring."""

        def work(connection: Connection) -> tuple[int, bytes] | None:
            rows = connection.execute(self._sql.ring).fetchall()
            if not rows:
                return None
            version, packed = rows[0]
            if not is_count(version) or version < 1 or not isinstance(packed, bytes):
                # Never replaced in passing: it may be the only copy of the keys that sign.
                raise StoreUnavailable("sqlite: the key ring in the database is damaged; restore a backup")
            return version, packed

        return await self._use().read(work)

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """Replace the ring if it is still at `expected` (0: none yet). Raises: ValueRefused above 256 KiB."""
        if len(packed) > MAX_RING_OCTETS:
            raise ValueRefused(f"a key ring has at most {MAX_RING_OCTETS} octets")

        def work(connection: Connection) -> bool:
            if expected == 0:
                return connection.execute(self._sql.first_ring, (packed,)).rowcount == 1
            return connection.execute(self._sql.next_ring, (packed, expected)).rowcount == 1

        return await self._use().write(work)

    # What follows runs inside a transaction.

    def _after_cut(self, connection: Connection, owner: str, now: int) -> int:
        """The time of a creation: now, but later than every cut of the owner."""
        rows = connection.execute(self._sql.cut, (owner,)).fetchall()
        cut = rows[0][0] if rows and is_count(rows[0][0]) else now - 1
        return max(now, cut + 1)

    def _session_of(
        self, connection: Connection, ref: FamilyRef, now: int
    ) -> Record | FamilyEnded | FamilyUnknown | None:
        of = ref.session
        if of is None:
            return None
        found = self._rows.find(connection, of)
        state = alive(found, now)
        if isinstance(state, Record):
            return state
        over = end_of(found, now)
        if found is None or over is None:
            return FamilyUnknown(now_us=now)
        return FamilyEnded(reason=over[0], at_us=over[1], now_us=now)

    def _reused(
        self, connection: Connection, family: StoredFamily, record: Record | None, now: int, *, deny_us: int
    ) -> FamilyReused:
        # A thief of the first party's token has all the session gives; a client's has only what it was granted.
        if record is None or family.client:
            self._families.end(connection, family.ref, reason=REASON_REUSED, at_us=now)
            return FamilyReused(family=family, session=None, now_us=now)
        self._endings.bury(connection, record, reason=REASON_REUSED, now=now, deny_us=deny_us)
        return FamilyReused(family=family, session=record.session.ref, now_us=now)


def _verdict(found: KeptFamily, *, now: int, generation: int, digest: str, successor: str, grace_us: int) -> _Verdict:
    """What a presented token is to a family that goes on. Source: RFC 9700 s4.14.2."""
    family = found.family
    if generation > family.generation:
        return "unknown"
    if generation == family.generation:
        if digest != family.digest:
            return "unknown"
        return "kept" if now < family.rotated_us + grace_us else "rotate"
    if generation < family.generation - 1:
        return "reused"
    # The generation is genuine, the secret is not: a guess must end nobody's family.
    if digest != found.prev_digest:
        return "unknown"
    # Nobody else can know a fresh successor: the same call again, whose answer was lost.
    if successor == family.digest:
        return "repeated"
    return "replayed" if now < found.grace_until_us else "reused"


def _over(found: KeptFamily, now: int) -> tuple[str, int] | None:
    # A cut of the owner needs no look here: `revoke_owner` has ended each family that stands alone.
    if found.ended is not None:
        return found.ended
    family = found.family
    if now >= family.absolute_us:
        return "absolute_timeout", family.absolute_us
    if now >= family.rotated_us + family.idle_us:
        return "idle_timeout", family.rotated_us + family.idle_us
    return None


def _begun(new: NewFamily, created_us: int) -> StoredFamily:
    return StoredFamily(
        ref=new.ref,
        generation=FIRST_GENERATION,
        digest=new.digest,
        owner=new.owner,
        subject=new.subject,
        client=new.client,
        key=new.key,
        grant=new.grant,
        created_us=created_us,
        rotated_us=created_us,
        idle_us=new.idle_us,
        absolute_us=created_us + new.absolute_us,
    )
