"""Sessions and rate limits in PostgreSQL, shared by any number of processes; tokens are in `tokens`.

Every verb is one call of one function in the database (`schema/postgres`): one round trip and one transaction, with
the locks, the clock and the rule of life inside. This file decides how values travel there and back, and what an
answer means; it must never decide by the clock of this process, and never read first and write later.

Sessions lie in `<namespace>_sessions` under their handle, one row for the record, its last activity and the alias of
its last rotation; a tombstone is the same row with its content erased.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from coatcheck.core.ids import IdKeys, SessionRef
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
    Colour,
    Committed,
    Conflict,
    Converged,
    Created,
    Ended,
    Gone,
    Hit,
    LimitReached,
    Listener,
    Live,
    Loaded,
    OnLimit,
    Oversized,
    RateLimit,
    RecordLimits,
    Revoked,
    RevokedMany,
    Rotated,
    StoredPage,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession, StoredSession
from coatcheck.errors import ConfigurationError, MigrationRequired, StoreUnavailable, ValueRefused
from coatcheck.primitives.digest import same, sha256_text
from coatcheck.stores.migrations import COMPONENT_STORE, Migration, load_migrations
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres.connection import Row
from coatcheck.stores.postgres.driver import Driver, Run, parse_address
from coatcheck.stores.postgres.feed import PostgresFeed
from coatcheck.stores.postgres.migrations import apply_postgres, missing_postgres
from coatcheck.stores.postgres.rows import can_hold, escaped, fields_to_json, seen_of, session_of
from coatcheck.stores.postgres.tokens import TOKEN_STATEMENTS, TokenVerbs

_OWNER_CURSOR: Final = re.compile(r"([0-9]{1,18})\.([A-Za-z0-9_-]{16})")
_SCAN_CURSOR: Final = re.compile(r"[A-Za-z0-9_-]{16}")
# Rows that one page of a scan looks at, or as many as it may return.
_SCAN_EXAMINED: Final = 1000


class PostgresStore(TokenVerbs):
    """A store in one PostgreSQL database (13 or later). Exact under any number of processes."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._options = options
        self._address = parse_address(url)
        self._driver = Driver(self._address, options)
        texts = _STATEMENTS | TOKEN_STATEMENTS
        self._statements = {name: text.format(n=options.namespace) for name, text in texts.items()}

    @property
    def colour(self) -> Colour:
        """Which face may use this store."""
        return self._options.colour

    @property
    def shared(self) -> bool:
        """Always true."""
        return True

    async def open(self) -> None:
        """Connect, and check that the database fits. Raises: StoreUnavailable, MigrationRequired, ConfigurationError.

        Connections belong to the process and event loop that use them; a forked child makes its own.
        """
        ((encoding,),) = await self._driver.ask("SELECT current_setting('server_encoding')", writes=False)
        if encoding != "UTF8":
            raise ConfigurationError(
                f"store: {self._driver.place}: the database's encoding is {encoding}; it must be UTF8"
            )
        await self.check()

    async def close(self) -> None:
        """Let go of every connection. The store may be opened again."""
        await self._driver.close()

    async def migrate(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Make or change the tables, in one transaction; returns what was applied. Safe to run at once.

        `dry_run` runs everything and rolls back. Raises: ConfigurationError when the role may not, or when a newer
        release wrote the database; StoreUnavailable.
        """

        async def work(run: Run) -> tuple[Migration, ...]:
            return await apply_postgres(
                run, _migrations(), component=COMPONENT_STORE, namespace=self._options.namespace, dry_run=dry_run
            )

        return tuple(map(str, await self._driver.change(work)))

    async def check(self) -> None:
        """Raises: MigrationRequired while `migrate` has something to do; ConfigurationError, StoreUnavailable."""

        async def run(statement: str, values: Sequence[object] = (), /) -> list[Row]:
            return await self._driver.ask(statement, values, writes=False)

        missing = await missing_postgres(
            run, _migrations(), component=COMPONENT_STORE, namespace=self._options.namespace
        )
        if missing:
            names = ", ".join(map(str, missing))
            raise MigrationRequired(
                f"store: {self._driver.place} needs {names}: run `coatcheck migrate --store {self._driver.place}`"
            )

    async def ping(self) -> int:
        """One round trip; the database's clock in Unix microseconds."""
        ((now_us,),) = await self._read("clock", self._offset())
        return int(now_us)

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """The keys of this store's ids; of many candidates at once one is kept. Raises: StoreUnavailable."""
        ((packed,),) = await self._write("id_keys", candidate.pack())
        keys = IdKeys.unpack(packed)
        if keys is None:
            raise StoreUnavailable(f"{self._driver.place}: the stored keys of ids cannot be read")
        return keys

    async def local_key(self, candidate: bytes) -> bytes | None:
        """Always `None`: the database is shared, so the operator sets the server key."""
        return None

    def peek(self, value: bytes) -> NearSession | None:
        """Always `None`: nothing is known here without asking."""
        return None

    def feed(self, listener: Listener, *, lease: float) -> PostgresFeed:
        """What changed in this database, over a connection of its own. See `core.ports.FedStore`."""
        return PostgresFeed(self._address, self._options, listener, lease=lease)

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. See `core.ports`. Raises: StoreUnavailable, OutcomeUnknown."""
        outcome, written_us, _, now_us = await self._create(new, maximum=None, evict=False, supersedes=None)
        return Created(session=self._written(new, outcome, written_us), now_us=now_us)

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
        """Create under a limit, exactly: sign-ins of one owner take turns in the database. See `core.ports`."""
        outcome, written_us, handles, now_us = await self._create(
            new,
            maximum=None if on_limit == "allow" and choice is None else maximum,
            evict=on_limit == "evict_oldest" and choice is None,
            supersedes=supersedes,
            choice=choice,
            reason=reason,
            deny_us=deny_us,
        )
        others = tuple(SessionRef(new.ref.tag, handle) for handle in handles)
        if outcome == "limit":
            return LimitReached(alive=others, now_us=now_us)
        return Admitted(session=self._written(new, outcome, written_us), evicted=others, now_us=now_us)

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone; writes nothing."""
        (row,) = await self._read("load", ref.tag, ref.handle, self._offset())
        now_us, cut_us, cut_reason, *columns = row
        record, (ended_us, reason, alias_until_us, alias_digest, alias_sealed) = columns[:12], columns[12:]
        if record[0] is None:
            return Absent(why="unknown", now_us=now_us)
        if ended_us is not None:
            return Ended(reason=reason, at_us=ended_us, now_us=now_us)
        try:
            session, seen_us = session_of(ref, record)
        except ValueError as broken:
            return Unreadable(detail=f"session {ref.handle}: {broken}", now_us=now_us)
        if cut_us is not None:
            return Ended(reason=cut_reason, at_us=cut_us, now_us=now_us)
        if _matches(session.digest, digest):
            return Live(session=session, seen_us=seen_us, now_us=now_us)
        if alias_sealed is not None and now_us < alias_until_us and _matches(alias_digest, digest):
            return Aliased(session=session, seen_us=seen_us, now_us=now_us, sealed=alias_sealed)
        return Absent(why="replaced", now_us=now_us)

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record; never creates. Raises: StoreUnavailable, OutcomeUnknown."""
        (row,) = await self._write(
            "commit",
            ref.tag,
            ref.handle,
            fields_to_json(changes.put),
            [escaped(name) for name in changes.delete],
            limits.octets,
            limits.fields,
            expected,
            self._offset(),
        )
        outcome, version, cause, now_us = row
        if outcome == "committed":
            return Committed(version=version, now_us=now_us)
        if outcome == "conflict":
            return Conflict(version=version, now_us=now_us)
        if outcome == "oversized":
            return Oversized(now_us=now_us)
        return Gone(reason=cause, now_us=now_us)

    async def touch(self, activities: Sequence[Activity]) -> None:
        """Move last activity of alive sessions forward, at most to the database's clock."""
        if activities:
            await self._write(
                "touch",
                [each.ref.tag for each in activities],
                [each.ref.handle for each in activities],
                [each.seen_us for each in activities],
                self._offset(),
            )

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
        """Let a new id take the old one's place; of simultaneous rotations the first wins. See `core.ports`."""
        (row,) = await self._write(
            "rotate", ref.tag, ref.handle, old_digest, new_digest, sealed, alias_us, authority, self._offset()
        )
        outcome, version, cause, successor, now_us = row
        if outcome == "rotated":
            return Rotated(version=version, now_us=now_us)
        if outcome == "converged":
            return Converged(sealed=successor, now_us=now_us)
        return Gone(reason=cause, now_us=now_us)

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose time has passed, judged by its last activity as it is now."""
        ((cause, seen_us, now_us),) = await self._write(
            "expire_idle", ref.tag, ref.handle, TOMBSTONE_US, self._offset()
        )
        if cause is None:
            return Alive(seen_us=seen_us, now_us=now_us)
        return Gone(reason=cause, now_us=now_us)

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """End one session and leave a tombstone; the first reason stays. Raises: StoreUnavailable, OutcomeUnknown."""
        ((ended, now_us),) = await self._write(
            "revoke", ref.tag, ref.handle, reason, TOMBSTONE_US, self._offset(), deny_us
        )
        return Revoked(ended=ended, now_us=now_us)

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """End every session of a subject created until now, but `keep`; takes its turn among the sign-ins."""
        ((handles, now_us),) = await self._write(
            "revoke_owner",
            tag,
            owner,
            reason,
            keep.handle if keep is not None and keep.tag == tag else None,
            TOMBSTONE_US,
            self._offset(),
            deny_us,
        )
        return RevokedMany(ended=tuple(SessionRef(tag, handle) for handle in handles), now_us=now_us)

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Raises: ValueRefused on a bad cursor."""
        created_us, handle = _owner_start(after)
        rows = await self._read("list_by_owner", tag, owner, created_us, handle, limit + 1, self._offset())
        found = [row for row in rows if row[3] is not None]
        # Two keys: many sessions may be of one microsecond.
        cursor = f"{found[limit - 1][9]}.{found[limit - 1][3]}" if len(found) > limit else None
        return StoredPage(sessions=seen_of(found[:limit]), cursor=cursor, now_us=rows[0][0])

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of everybody, by handle. Raises: ValueRefused on a bad cursor."""
        if after is not None and not _SCAN_CURSOR.fullmatch(after):
            raise ValueRefused("not a cursor of this list")
        rows = await self._read("scan", after or "", limit + 1, max(_SCAN_EXAMINED, limit + 1), self._offset())
        found = [row for row in rows if row[3] is not None]
        cursor = found[limit - 1][3] if len(found) > limit else rows[0][1]
        return StoredPage(sessions=seen_of(found[:limit]), cursor=cursor, now_us=rows[0][0])

    async def sweep(self, *, limit: int) -> int:
        """Remove what decides nothing any more, up to `limit` of each kind, and the seals of a grace that is over.

        Returns how many sessions, families and denials went, or `limit` if they were more or more of anything waits.
        """
        ((removed,),) = await self._write("sweep", limit, TOMBSTONE_US, self._offset())
        return int(removed)

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room; exactly `attempts` pass out of any number at once."""
        # Rounded up and multiplied again, so that whole microseconds never cost the last attempt of a burst.
        interval = max(1, -(-round(limit.period * SECOND_US) // limit.attempts))
        burst = interval * limit.attempts
        wanted = cost * interval
        ((allowed, reached_us, now_us),) = await self._write("hit", _key(key), interval, burst, wanted, self._offset())
        remaining = max(0, (burst - (reached_us - now_us)) // interval)
        if allowed:
            return Hit(allowed=True, remaining=remaining, retry_after=0.0)
        return Hit(allowed=False, remaining=remaining, retry_after=(reached_us + wanted - now_us - burst) / SECOND_US)

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key."""
        await self._write("clear", _key(key))

    async def _create(
        self,
        new: NewSession,
        *,
        maximum: int | None,
        evict: bool,
        supersedes: SessionRef | None,
        choice: Choice | None = None,
        reason: str = REASON_EVICTED,
        deny_us: int = 0,
    ) -> Row:
        replaced = supersedes.handle if supersedes is not None and supersedes.tag == new.ref.tag else None
        (row,) = await self._write(
            "create",
            new.ref.tag,
            new.ref.handle,
            new.digest,
            new.owner,
            new.subject,
            new.idle_us,
            new.absolute_us,
            new.authority,
            fields_to_json(new.fields),
            maximum,
            evict,
            replaced,
            REASON_SUPERSEDED,
            reason,
            TOMBSTONE_US,
            self._offset(),
            deny_us,
            None if choice is None else sorted(choice.shown),
            None if choice is None else sorted(choice.ending),
        )
        return row

    def _written(self, new: NewSession, outcome: str, written_us: int) -> StoredSession:
        if outcome != "created":
            raise StoreUnavailable("a new session met a handle in use: the random source repeats itself")
        return new.at(written_us)

    async def _read(self, verb: str, *values: object) -> list[Row]:
        return await self._ask(verb, values, writes=False)

    async def _write(self, verb: str, *values: object) -> list[Row]:
        return await self._ask(verb, values, writes=True)

    async def _ask(self, verb: str, values: tuple[object, ...], *, writes: bool) -> list[Row]:
        # Before it is sent: the driver would take a caller's text for a fault of its own.
        if not all(map(can_hold, values)):
            raise ValueRefused("a text with U+0000 or half of a surrogate pair cannot be kept here")
        return await self._driver.ask(self._statements[verb], values, writes=writes)

    def _offset(self) -> int:
        return self._options.clock_offset_us()


_STATEMENTS: Final[dict[str, str]] = {
    "clock": "SELECT {n}_clock(%s)",
    "id_keys": "SELECT {n}_id_keys(%s)",
    "create": "SELECT * FROM {n}_create("
    "%s::integer, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s::text[], %s::text[])",
    "load": "SELECT * FROM {n}_load(%s::integer, %s, %s)",
    "commit": "SELECT * FROM {n}_commit(%s::integer, %s, %s, %s, %s, %s, %s, %s)",
    "touch": "SELECT {n}_touch(%s::integer[], %s::text[], %s::bigint[], %s)",
    "rotate": "SELECT * FROM {n}_rotate(%s::integer, %s, %s, %s, %s, %s, %s, %s)",
    "expire_idle": "SELECT * FROM {n}_expire_idle(%s::integer, %s, %s, %s)",
    "revoke": "SELECT * FROM {n}_revoke(%s::integer, %s, %s, %s, %s, %s)",
    "revoke_owner": "SELECT * FROM {n}_revoke_owner(%s::integer, %s, %s, %s, %s, %s, %s)",
    "list_by_owner": "SELECT * FROM {n}_list_by_owner(%s::integer, %s, %s, %s, %s, %s)",
    "scan": "SELECT * FROM {n}_scan(%s, %s, %s, %s)",
    "sweep": "SELECT {n}_sweep(%s, %s, %s)",
    "hit": "SELECT * FROM {n}_hit(%s, %s, %s, %s, %s)",
    "clear": "DELETE FROM {n}_limits WHERE key = %s",
}


def _migrations() -> tuple[Migration, ...]:
    return load_migrations("coatcheck.stores", "postgres")


def _matches(stored: str, presented: str) -> bool:
    return same(stored.encode(), presented.encode())


def _key(key: str) -> str:
    # Hashed: keys hold addresses and account names, and any text must be possible.
    return sha256_text(key.encode("utf-8", "surrogatepass"))


def _owner_start(cursor: str | None) -> tuple[int, str]:
    if cursor is None:
        return 0, ""
    parts = _OWNER_CURSOR.fullmatch(cursor)
    if parts is None:
        raise ValueRefused("not a cursor of this list")
    return int(parts[1]), parts[2]
