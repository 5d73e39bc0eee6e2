"""Sessions in one SQLite file, for every process of one host.

Decides how each verb of the contract (`core.ports`) is one transaction on a file. Nothing is read outside the
transaction that writes, so no verb can decide on what has changed meanwhile. The clock is the host's, read when the
transaction has its turn. Refresh tokens stand in `tokens`; what a session's end takes with it, in `endings`. It must
never write anything of a session outside the transaction that has looked at it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from coatcheck.core.admission import giving_way
from coatcheck.core.ids import SessionRef
from coatcheck.core.near_session import NearSession
from coatcheck.core.ports import (
    REASON_EVICTED,
    REASON_SUPERSEDED,
    TOMBSTONE_US,
    Absent,
    Activity,
    Admitted,
    Aliased,
    Alive,
    Changes,
    Choice,
    Committed,
    Conflict,
    Converged,
    Created,
    Ended,
    Gone,
    Hit,
    LimitReached,
    Live,
    Loaded,
    OnLimit,
    Oversized,
    RateLimit,
    RecordLimits,
    Revoked,
    RevokedMany,
    Rotated,
    Seen,
    StoredPage,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession, StoredSession
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite.cells import is_count
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.endings import alive
from coatcheck.stores.sqlite.rows import Broken, Record, Row, Tombstone, decode, key_of, mark_of
from coatcheck.stores.sqlite.tokens import TokenVerbs

# Rows one write transaction of a sweep looks at: other writers wait a few milliseconds, not seconds.
_SWEEP_ROWS: Final = 200
# Rate limits that a sweep looks at for each row it may remove: one attempt makes one, and most are idle soon.
_RATES_LOOKED_AT: Final = 20
_BEFORE_ALL: Final = (-1, "")
_CURSOR: Final = re.compile(r"([0-9]{1,18})\.([A-Za-z0-9_-]{1,64})")


class SqliteStore(TokenVerbs):
    """A store of one host. Exact under any number of threads, tasks and processes.

    What a caller was told survives the end of the process, and, except for activity and rate limits, a power loss.
    """

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Raises: ConfigurationError when the URL names no file."""
        super().__init__(url, options)
        self._swept_key = ""

    def peek(self, value: bytes) -> NearSession | None:
        """Always `None`: near copies stand in front of a store (`stores.near`), not in it."""
        return None

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. See `core.ports`. Raises: StoreUnavailable."""

        def work(connection: Connection) -> Created:
            now = self._now()
            session = self._repeated(connection, new) or self._insert(connection, new, now)
            return Created(session=session, now_us=now)

        return await self._use().write(work)

    async def admit(
        self,
        new: NewSession,
        *,
        maximum: int,
        on_limit: OnLimit,
        supersedes: SessionRef | None = None,
        choice: Choice | None = None,
        reason: str = REASON_EVICTED,
        deny_us: int = 0,
    ) -> Admitted | LimitReached:
        """Create under a limit, exactly. See `core.ports`. Raises: StoreUnavailable."""

        def work(connection: Connection) -> Admitted | LimitReached:
            now = self._now()
            repeated = self._repeated(connection, new)
            if repeated is not None:
                evicted = self._rows.evicted_by(connection, new.ref)
                return Admitted(session=repeated, evicted=evicted, now_us=now)
            older = self._alive_of(connection, new.ref.tag, new.owner, now)
            counted = [each for each in older if each.session.ref != supersedes]
            refs = tuple(each.session.ref for each in counted)
            leaving = giving_way(refs, maximum=maximum, on_limit=on_limit, choice=choice)
            if leaving is None:
                return LimitReached(alive=refs, now_us=now)
            for each in older:
                if each.session.ref == supersedes:
                    self._endings.bury(connection, each, reason=REASON_SUPERSEDED, now=now, deny_us=deny_us)
            for each in counted:
                if each.session.ref in leaving:
                    self._endings.bury(
                        connection, each, reason=reason, now=now, deny_us=deny_us, ended_by=new.ref.handle
                    )
            session = self._insert(connection, new, now)
            return Admitted(session=session, evicted=leaving, now_us=now)

        return await self._use().write(work)

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone; one statement that writes nothing."""
        found, now = await self._use().read(lambda c: (self._rows.find(c, ref), self._now()))
        if found is None:
            return Absent(why="unknown", now_us=now)
        if isinstance(found, Tombstone):
            return Ended(reason=found.reason, at_us=found.at_us, now_us=now)
        if isinstance(found, Broken):
            return Unreadable(detail=found.detail, now_us=now)
        if found.session.digest == digest:
            return Live(session=found.session, seen_us=found.seen_us, now_us=now)
        sealed = _alias(found, digest, now)
        if sealed is None:
            return Absent(why="replaced", now_us=now)
        return Aliased(session=found.session, seen_us=found.seen_us, now_us=now, sealed=sealed)

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record; never creates."""

        def work(connection: Connection) -> Committed | Conflict | Oversized | Gone:
            now = self._now()
            record = alive(self._rows.find(connection, ref), now)
            if isinstance(record, str):
                return Gone(reason=record, now_us=now)
            version = record.session.version
            if expected is not None and expected != version:
                return Conflict(version=version, now_us=now)
            merged = {name: text for name, text in record.session.fields.items() if name not in changes.delete}
            merged.update(changes.put)
            if len(merged) > limits.fields or _octets(merged) > limits.octets:
                return Oversized(now_us=now)
            self._rows.write_fields(connection, ref, merged, version + 1)
            return Committed(version=version + 1, now_us=now)

        return await self._use().write(work)

    async def touch(self, activities: Sequence[Activity]) -> None:
        """Move last activity of alive sessions forward, at most to the host's clock."""

        def work(connection: Connection) -> None:
            now = self._now()
            for activity in activities:
                self._rows.touch(connection, activity.ref, seen_us=min(activity.seen_us, now), now=now)

        if activities:
            # Not synced: what a power loss takes back is at worst an earlier idle timeout.
            await self._use().write(work, durable=False)

    async def rotate_id(
        self,
        ref: SessionRef,
        *,
        old_digest: str,
        new_digest: str,
        sealed: bytes,
        alias_us: int,
        authority: str | None = None,
    ) -> Rotated | Converged | Gone:
        """Let a new id take the old one's place. Only the latest predecessor of an id is ever answered."""

        def work(connection: Connection) -> Rotated | Converged | Gone:
            now = self._now()
            record = alive(self._rows.find(connection, ref), now)
            if isinstance(record, str):
                return Gone(reason=record, now_us=now)
            session = record.session
            # Nobody else can know 192 fresh bits: the same call again, whose answer was lost.
            if session.digest == new_digest:
                return Rotated(version=session.version, now_us=now)
            if session.digest != old_digest:
                successor = _alias(record, old_digest, now)
                # A change of privileges must not be answered by a successor without them.
                if successor is None or authority is not None:
                    return Gone(reason="replaced", now_us=now)
                return Converged(sealed=successor, now_us=now)
            version = session.version + 1
            changed = replace(
                session,
                version=version,
                digest=new_digest,
                authority=session.authority if authority is None else authority,
            )
            if authority is None and alias_us > 0:
                rotated = replace(
                    record, session=changed, prev_digest=old_digest, sealed=sealed, alias_until_us=now + alias_us
                )
            else:
                # An earlier alias goes too, or a stolen older id would gain the new authority.
                rotated = replace(record, session=changed, prev_digest=None, sealed=None, alias_until_us=None)
            self._rows.write_rotation(connection, rotated)
            return Rotated(version=version, now_us=now)

        return await self._use().write(work)

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose time has passed, judged by its last activity as it is now."""

        def work(connection: Connection) -> Alive | Gone:
            now = self._now()
            found = self._rows.find(connection, ref)
            state = alive(found, now)
            if isinstance(state, Record):
                return Alive(seen_us=state.seen_us, now_us=now)
            if isinstance(found, Record):
                self._endings.bury(connection, found, reason=state, now=now)
            return Gone(reason=state, now_us=now)

        return await self._use().write(work)

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """End one session and leave a tombstone; the first reason stays. See `core.ports` for `deny_us`."""

        def work(connection: Connection) -> Revoked:
            now = self._now()
            ended = self._endings.end(connection, self._rows.find(connection, ref), reason=reason, now=now)
            # Whether or not it was over: the call that ended it may have asked for no entry, or for a shorter one.
            self._denials.add_session(connection, ref, now, deny_us=deny_us)
            return Revoked(ended=ended, now_us=now)

        return await self._use().write(work)

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """End every session of a subject created until now, but `keep`, and the families that stand alone."""

        def work(connection: Connection) -> RevokedMany:
            now = self._now()
            everything = self._rows.of_owner(connection, tag, owner)
            newest = [each.session.created_us for each in everything if isinstance(each, Record)]
            # What was made in the very microsecond of an earlier cut was dated after it: this cut is later still.
            cut = max([now, self._families.newest_alone(connection, tag, owner), *newest])
            connection.execute(self._sql.raise_cut, (owner, cut))
            self._families.end_alone(connection, tag, owner, reason=reason, at_us=now)
            ended: list[SessionRef] = []
            for each in everything:
                ref = each.session.ref if isinstance(each, Record) else each.ref
                if ref != keep and self._endings.end(connection, each, reason=reason, now=now, deny_us=deny_us):
                    ended.append(ref)
            return RevokedMany(ended=tuple(ended), now_us=now)

        return await self._use().write(work)

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Raises: ValueRefused on a bad cursor."""
        start = _start(after)

        def work(connection: Connection) -> StoredPage:
            now = self._now()
            rows = self._rows.list_by_owner(connection, tag, owner, after=start, now=now, limit=limit + 1)
            last = key_of(rows[limit - 1]) if len(rows) > limit else None
            return _page(rows[:limit], now, None if last is None else f"{last[2]}.{last[1]}")

        return await self._use().read(work)

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of everybody, in the order of their keys. Raises: ValueRefused on a bad cursor."""
        start = _start(after)

        def work(connection: Connection) -> StoredPage:
            now = self._now()
            rows = self._rows.scan(connection, after=start, now=now, limit=limit + 1)
            last = key_of(rows[limit - 1]) if len(rows) > limit else None
            return _page(rows[:limit], now, None if last is None else f"{last[0]}.{last[1]}")

        return await self._use().read(work, point=False)

    async def sweep(self, *, limit: int) -> int:
        """Remove what no longer decides anything: up to `limit` sessions and tombstones, as many families, and denials.

        Returns how many, or `limit` if they were more. Also erases aliases and sealed successors whose time is over,
        old cuts and idle rate limits, which do not count. Other writers get their turn between batches.
        """
        removed = 0
        for batch in (self._sweep_sessions, self._sweep_families, self._sweep_denials):
            # A bound of their own: a busy hour of one kind must not let another grow.
            left = limit
            while left > 0:
                room = min(left, _SWEEP_ROWS)
                looked_at, gone = await self._use().write(partial(batch, limit=room), durable=False)
                left -= gone
                if looked_at < room:
                    break
            removed += limit - left
        # All of them, whatever the limit: an old backup plus one spent token must not open the live one.
        while await self._use().write(self._sweep_sealed, durable=False) == _SWEEP_ROWS:
            pass
        while await self._use().write(self._sweep_cuts, durable=False) == _SWEEP_ROWS:
            pass
        for _ in range(0, _RATES_LOOKED_AT * limit, _SWEEP_ROWS):
            if await self._use().write(self._sweep_rates, durable=False) < _SWEEP_ROWS:
                break
        return min(removed, limit)

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room; exactly `attempts` pass out of any number at once."""
        # Rounded up and multiplied again, so that whole microseconds never cost the last attempt of a burst.
        interval = max(1, -(-round(limit.period * SECOND_US) // limit.attempts))
        burst = interval * limit.attempts
        digest = _rate_key(key)

        def work(connection: Connection) -> Hit:
            now = self._now()
            rows = connection.execute(self._sql.rate, (digest,)).fetchall()
            arrival = max(rows[0][0], now) if rows and is_count(rows[0][0]) else now
            wanted = arrival + cost * interval
            if wanted - now > burst:
                left = max(0, (burst - (arrival - now)) // interval)
                return Hit(allowed=False, remaining=left, retry_after=(wanted - now - burst) / SECOND_US)
            connection.execute(self._sql.write_rate, (digest, wanted))
            return Hit(allowed=True, remaining=(burst - (wanted - now)) // interval, retry_after=0.0)

        # Not synced: a power loss gives back the attempts of the last moments.
        return await self._use().write(work, durable=False)

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key."""
        digest = _rate_key(key)

        def work(connection: Connection) -> None:
            connection.execute(self._sql.forget_rate, (digest,))

        await self._use().write(work, durable=False)

    # What follows runs inside a transaction.

    def _repeated(self, connection: Connection, new: NewSession) -> StoredSession | None:
        """The session of a call that is made again, as it was written; `None` when the handle is free."""
        found = self._rows.find(connection, new.ref)
        if found is None:
            return None
        if isinstance(found, Record) and found.session.digest == new.digest:
            return found.session
        # It was ended meanwhile. The repeat is answered all the same, and the next load tells the reason.
        if isinstance(found, Tombstone) and found.mark == mark_of(new.digest):
            return new.at(found.created_us)
        raise StoreUnavailable("a new session met a handle in use: the random source repeats itself")

    def _insert(self, connection: Connection, new: NewSession, now: int) -> StoredSession:
        session = new.at(self._after_cut(connection, new.owner, now))
        self._rows.insert(connection, session)
        return session

    def _alive_of(self, connection: Connection, tag: int, owner: str, now: int) -> list[Record]:
        states = (alive(each, now) for each in self._rows.of_owner(connection, tag, owner))
        return [each for each in states if isinstance(each, Record)]

    def _sweep_sessions(self, connection: Connection, *, limit: int) -> tuple[int, int]:
        now = self._now()
        rows = self._rows.due(connection, now, limit)
        return len(rows), sum(self._rows.settle(connection, row, now) for row in rows)

    def _sweep_families(self, connection: Connection, *, limit: int) -> tuple[int, int]:
        return self._families.sweep(connection, self._now(), limit)

    def _sweep_denials(self, connection: Connection, *, limit: int) -> tuple[int, int]:
        gone = self._denials.sweep(connection, self._now(), limit)
        return gone, gone

    def _sweep_sealed(self, connection: Connection) -> int:
        return self._families.sweep_sealed(connection, self._now(), _SWEEP_ROWS)

    def _sweep_cuts(self, connection: Connection) -> int:
        return connection.execute(self._sql.forget_cuts, (self._now() - TOMBSTONE_US, _SWEEP_ROWS)).rowcount

    def _sweep_rates(self, connection: Connection) -> int:
        now = self._now()
        # No index on what every attempt changes; each sweep looks at the next stretch of keys instead.
        rows = connection.execute(self._sql.rates_after, (self._swept_key, _SWEEP_ROWS)).fetchall()
        idle = [(str(key, "ascii", "replace"),) for key, tat in rows if not is_count(tat) or tat <= now]
        connection.executemany(self._sql.forget_rate, idle)
        self._swept_key = str(rows[-1][0], "ascii", "replace") if len(rows) == _SWEEP_ROWS else ""
        return len(rows)


def _alias(record: Record, digest: str, now: int) -> bytes | None:
    if record.alias_until_us is None or now >= record.alias_until_us or record.prev_digest != digest:
        return None
    return record.sealed


def _page(rows: Sequence[Row], now: int, cursor: str | None) -> StoredPage:
    seen: list[Seen] = []
    for row in rows:
        tag, handle, _ = key_of(row)
        record = alive(decode(row, SessionRef(tag, handle)), now)
        if isinstance(record, Record):
            seen.append(Seen(session=record.session, seen_us=record.seen_us))
    return StoredPage(sessions=tuple(seen), cursor=cursor, now_us=now)


def _start(after: str | None) -> tuple[int, str]:
    if after is None:
        return _BEFORE_ALL
    parts = _CURSOR.fullmatch(after)
    if parts is None:
        raise ValueRefused("not a cursor of this list")
    return int(parts[1]), parts[2]


def _rate_key(key: str) -> str:
    # Keys hold addresses and names; the file has no use for them in clear.
    return sha256_text(key.encode("utf-8", "surrogatepass"))


def _octets(fields: Mapping[str, str]) -> int:
    return sum(len(name.encode()) + len(text.encode()) for name, text in fields.items())
