"""Sessions, refresh families and denials in the memory of one process.

For development, tests and a service that is one process: nothing survives a restart and no other process sees it.
Decides nothing that the contract (`core.ports`) does not say; it is the plainest reading of it. Every verb does its
work between taking and releasing one lock and never waits in between, so every verb is atomic in both colours. It
must never serve after a fork: parent and child would each believe that their copy is the truth, and a logout in
one would not be seen in the other.
"""

from __future__ import annotations

import bisect
import heapq
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, TypeAlias

from coatcheck.blocking import BlockingLock
from coatcheck.core.admission import giving_way
from coatcheck.core.freshness import FOR_EVER, Line
from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.near_session import NearSession
from coatcheck.core.ports import (
    CLOCK_STEP_SECONDS,
    MAX_FAMILIES,
    REASON_EVICTED,
    REASON_REUSED,
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
    Denial,
    DenialPage,
    Ended,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Feed,
    Gone,
    Hit,
    LimitReached,
    Listener,
    Live,
    Loaded,
    OnLimit,
    Oversized,
    PositionLost,
    RateLimit,
    RecordLimits,
    RefreshOutcome,
    Revoked,
    RevokedMany,
    Rotated,
    Seen,
    Standing,
    StoredPage,
    WrongHolder,
    session_denial_id,
)
from coatcheck.core.refresh_token import FIRST_GENERATION, FamilyRef, NewFamily, StoredFamily
from coatcheck.core.session import SECOND_US, NewSession, StoredSession, cause_of_death
from coatcheck.errors import ConfigurationError, StoreUnavailable, ValueRefused
from coatcheck.stores.options import StoreOptions

# Looked at by every verb that adds something, so that memory stays in proportion to what is alive without a timer.
_CLEAN_STEPS: Final = 8
_OWNER_CURSOR: Final = re.compile(r"([0-9]{1,19})\.([A-Za-z0-9_-]{16})")
_SCAN_CURSOR: Final = re.compile(r"[0-9]{1,19}")
_POSITION: Final = re.compile(r"([0-9a-f]{16})\.([0-9]{1,19})")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Alias:
    digest: str
    sealed: bytes
    until_us: int


@dataclass(slots=True, kw_only=True)
class _Record:
    session: StoredSession
    seen_us: int
    place: int
    evicted: tuple[SessionRef, ...] = ()
    alias: _Alias | None = None
    families: set[FamilyRef] = field(default_factory=set)

    @property
    def due_us(self) -> int:
        return min(self.seen_us + self.session.idle_us + TOMBSTONE_US, self.session.absolute_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tombstone:
    reason: str
    at_us: int
    due_us: int
    place: int
    origin: StoredSession


@dataclass(slots=True, kw_only=True)
class _Family:
    """`previous`, `forgiven_us` and `sealed` are of the latest rotation."""

    family: StoredFamily
    previous: str | None = None
    forgiven_us: int = 0
    sealed: bytes | None = None
    end: tuple[str, int] | None = None

    @property
    def over_us(self) -> int:
        return min(self.family.absolute_us, self.family.rotated_us + self.family.idle_us)

    @property
    def due_us(self) -> int:
        return self.over_us if self.sealed is None else min(self.over_us, self.forgiven_us)


_Owner: TypeAlias = "tuple[int, str]"
_Slot: TypeAlias = "_Record | _Tombstone"
# What may be cleared away: a session, a family, an owner's cut, a counter, a place in the log of denials.
_Key: TypeAlias = "SessionRef | FamilyRef | _Owner | str | int"


class MemoryStore:
    """A store of one process. Exact under any number of threads or tasks; gone with the process."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        # A thread lock in both colours: it is never held across a wait, so it cannot stop an event loop for longer
        # than one verb's work, and unlike an asyncio lock it is bound to no loop.
        self._lock = BlockingLock()
        self._pid: int | None = None
        self._opened = False
        self._places = 0
        self._slots: dict[SessionRef, _Slot] = {}
        self._owners: dict[_Owner, set[SessionRef]] = {}
        self._cuts: dict[_Owner, int] = {}
        self._arrivals: dict[str, int] = {}
        self._families: dict[FamilyRef, _Family] = {}
        self._alone: dict[_Owner, set[FamilyRef]] = {}
        self._log_name = ""
        self._logged = 0
        self._log: dict[int, tuple[int, Denial]] = {}
        # In order, some of them gone already: where a reader begins is found without passing what it has read.
        self._numbers: list[int] = []
        self._denied: dict[tuple[int, str], int] = {}
        self._ring: tuple[int, bytes] | None = None
        self._queue: list[tuple[int, int, _Key]] = []
        self._id_keys: IdKeys | None = None
        self._local_key: bytes | None = None
        self._listeners: tuple[Listener, ...] = ()

    @property
    def colour(self) -> Colour:
        """Which face may use this store."""
        return self._options.colour

    @property
    def shared(self) -> bool:
        """Always false: no other process sees these sessions."""
        return False

    async def open(self) -> None:
        """Start to serve in this process. Raises: ConfigurationError in a child of the process that opened it."""
        if self._pid is None:
            self._pid = os.getpid()
        self._opened = True
        self._check_process()

    async def close(self) -> None:
        """Stop to serve; what is kept stays until the process ends."""
        self._opened = False

    async def ping(self) -> int:
        """The clock of this process, Unix microseconds."""
        self._check_process()
        return self._now()

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """The first candidate that was ever given."""
        self._check_process()
        async with self._lock:
            if self._id_keys is None:
                self._id_keys = candidate
            return self._id_keys

    async def local_key(self, candidate: bytes) -> bytes | None:
        """The first candidate that was ever given; like everything here it ends with the process."""
        self._check_process()
        async with self._lock:
            if self._local_key is None:
                self._local_key = candidate
            return self._local_key

    def peek(self, value: bytes) -> NearSession | None:
        """Always `None`, although the answer would be at hand: near copies stand in front of every store alike, so
        that what is developed on this one goes the way it will go on a store across a network."""
        return None

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        """Tells of a change inside the verb that makes it, before that returns. `lease` decides nothing here: a line
        that cannot break while the process lives needs no answers."""
        return _MemoryFeed(self, listener)

    @property
    def is_open(self) -> bool:
        """Whether a verb would be served, in this process."""
        return self._opened and self._pid == os.getpid()

    def elapsed(self) -> float:
        """Seconds since boot, as this store's system tells them."""
        return self._options.system.elapsed()

    async def listen(self, listener: Listener) -> None:
        """Tell this listener of every change from here on."""
        async with self._lock:
            if all(each is not listener for each in self._listeners):
                self._listeners = (*self._listeners, listener)

    async def unlisten(self, listener: Listener) -> None:
        """Tell this listener no more."""
        async with self._lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. See `core.ports`. Raises: StoreUnavailable."""
        self._check_process()
        async with self._lock:
            now = self._now()
            repeated = self._repeated(new)
            if repeated is not None:
                return Created(session=_origin(repeated), now_us=now)
            return Created(session=self._insert(new, now, evicted=()), now_us=now)

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
        self._check_process()
        async with self._lock:
            now = self._now()
            repeated = self._repeated(new)
            if repeated is not None:
                evicted = repeated.evicted if isinstance(repeated, _Record) else ()
                return Admitted(session=_origin(repeated), evicted=evicted, now_us=now)
            older = self._alive_of((new.ref.tag, new.owner), now)
            replaced = next((each for each in older if each.session.ref == supersedes), None)
            counted = [each for each in older if each is not replaced]
            leaving = giving_way(_refs(counted), maximum=maximum, on_limit=on_limit, choice=choice)
            if leaving is None:
                return LimitReached(alive=_refs(counted), now_us=now)
            if replaced is not None:
                self._end(replaced, REASON_SUPERSEDED, now, deny_us=deny_us)
            for each in counted:
                if each.session.ref in leaving:
                    self._end(each, reason, now, deny_us=deny_us)
            return Admitted(session=self._insert(new, now, evicted=leaving), evicted=leaving, now_us=now)

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone; writes nothing."""
        self._check_process()
        async with self._lock:
            now = self._now()
            slot = self._slots.get(ref)
            if slot is None:
                return Absent(why="unknown", now_us=now)
            if isinstance(slot, _Tombstone):
                return Ended(reason=slot.reason, at_us=slot.at_us, now_us=now)
            if slot.session.digest == digest:
                return Live(session=slot.session, seen_us=slot.seen_us, now_us=now)
            alias = _valid_alias(slot, digest, now)
            if alias is None:
                return Absent(why="replaced", now_us=now)
            return Aliased(session=slot.session, seen_us=slot.seen_us, now_us=now, sealed=alias.sealed)

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record; never creates."""
        self._check_process()
        async with self._lock:
            now = self._now()
            record = self._alive(ref, now)
            if isinstance(record, str):
                return Gone(reason=record, now_us=now)
            session = record.session
            if expected is not None and expected != session.version:
                return Conflict(version=session.version, now_us=now)
            merged = {name: text for name, text in session.fields.items() if name not in changes.delete}
            merged.update(changes.put)
            if len(merged) > limits.fields or _octets(merged) > limits.octets:
                return Oversized(now_us=now)
            record.session = replace(session, version=session.version + 1, fields=MappingProxyType(merged))
            self._tell(ref)
            return Committed(version=session.version + 1, now_us=now)

    async def touch(self, activities: Sequence[Activity]) -> None:
        """Move last activity of alive sessions forward, at most to this store's clock."""
        self._check_process()
        async with self._lock:
            now = self._now()
            for activity in activities:
                record = self._alive(activity.ref, now)
                if isinstance(record, _Record):
                    record.seen_us = max(record.seen_us, min(activity.seen_us, now))

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
        self._check_process()
        async with self._lock:
            now = self._now()
            record = self._alive(ref, now)
            if isinstance(record, str):
                return Gone(reason=record, now_us=now)
            session = record.session
            # Nobody else can know 192 fresh bits: the same call again, whose answer was lost.
            if session.digest == new_digest:
                return Rotated(version=session.version, now_us=now)
            if session.digest != old_digest:
                alias = _valid_alias(record, old_digest, now)
                # A change of privileges must not be answered by a successor without them.
                if alias is None or authority is not None:
                    return Gone(reason="replaced", now_us=now)
                return Converged(sealed=alias.sealed, now_us=now)
            record.session = replace(
                session,
                version=session.version + 1,
                digest=new_digest,
                authority=session.authority if authority is None else authority,
            )
            # An earlier predecessor's alias goes with the change, or a stolen old id would gain the new authority.
            record.alias = None
            if authority is None and alias_us > 0:
                record.alias = _Alias(digest=old_digest, sealed=sealed, until_us=now + alias_us)
            self._tell(ref)
            return Rotated(version=record.session.version, now_us=now)

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose time has passed, judged by its last activity as it is now."""
        self._check_process()
        async with self._lock:
            now = self._now()
            record = self._alive(ref, now)
            if isinstance(record, _Record):
                return Alive(seen_us=record.seen_us, now_us=now)
            slot = self._slots.get(ref)
            if isinstance(slot, _Record):
                self._end(slot, record, now)
            return Gone(reason=record, now_us=now)

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """End one session and its families, and leave a tombstone; the first reason stays."""
        self._check_process()
        async with self._lock:
            now = self._now()
            record = self._alive(ref, now)
            slot = self._slots.get(ref)
            if isinstance(slot, _Record):
                self._end(slot, record if isinstance(record, str) else reason, now)
            self._deny_session(ref, now, deny_us)
            return Revoked(ended=isinstance(record, _Record), now_us=now)

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """End every session of a subject created until now, but `keep`, and the families that stand alone."""
        self._check_process()
        async with self._lock:
            now = self._now()
            key = (tag, owner)
            alive = self._alive_of(key, now)
            # A session made in the very microsecond of an earlier cut was dated after it: this cut is later still.
            newest = max((each.session.created_us for each in alive), default=now)
            cut = max(now, newest, self._cuts.get(key, now))
            if key not in self._cuts:
                self._await_cleaning(cut + TOMBSTONE_US, key)
            self._cuts[key] = cut
            ended = [each for each in alive if each.session.ref != keep]
            for each in ended:
                self._end(each, reason, now, deny_us=deny_us)
            # At once, because they may outlive the cut by weeks.
            for ref in self._alone.get(key, ()):
                _end_family(self._families[ref], reason, now)
            return RevokedMany(ended=_refs(ended), now_us=now)

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Raises: ValueRefused on a bad cursor."""
        start = _owner_start(after)
        self._check_process()
        async with self._lock:
            now = self._now()
            found = [each for each in self._alive_of((tag, owner), now) if start is None or _age(each) > start]
            cursor = None
            if len(found) > limit:
                created, handle = _age(found[limit - 1])
                cursor = f"{created}.{handle}"
            return StoredPage(sessions=tuple(map(_seen, found[:limit])), cursor=cursor, now_us=now)

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of everybody, in the order in which they came. Raises: ValueRefused on a bad cursor."""
        if after is not None and not _SCAN_CURSOR.fullmatch(after):
            raise ValueRefused("not a cursor of this list")
        start = 0 if after is None else int(after)
        self._check_process()
        async with self._lock:
            now = self._now()
            found: list[_Record] = []
            # A dictionary keeps the order of arrival, and places are given out in it.
            for slot in self._slots.values():
                if slot.place > start and isinstance(slot, _Record) and _alive_at(slot, now):
                    found.append(slot)
                    if len(found) > limit:
                        break
            cursor = str(found[limit - 1].place) if len(found) > limit else None
            return StoredPage(sessions=tuple(map(_seen, found[:limit])), cursor=cursor, now_us=now)

    async def sweep(self, *, limit: int) -> int:
        """Remove up to `limit` records, tombstones, families and denials that no longer decide anything."""
        self._check_process()
        async with self._lock:
            return self._clean(self._now(), removals=limit, steps=len(self._queue))

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room; exactly `attempts` pass out of any number at once."""
        # Rounded up and multiplied again, so that whole microseconds never cost the last attempt of a burst.
        interval = max(1, -(-round(limit.period * SECOND_US) // limit.attempts))
        burst = interval * limit.attempts
        self._check_process()
        async with self._lock:
            now = self._now()
            self._clean(now, removals=_CLEAN_STEPS, steps=_CLEAN_STEPS)
            arrival = max(self._arrivals.get(key, now), now)
            wanted = arrival + cost * interval
            if wanted - now > burst:
                left = max(0, (burst - (arrival - now)) // interval)
                return Hit(allowed=False, remaining=left, retry_after=(wanted - now - burst) / SECOND_US)
            if key not in self._arrivals:
                self._await_cleaning(wanted, key)
            self._arrivals[key] = wanted
            return Hit(allowed=True, remaining=(burst - (wanted - now)) // interval, retry_after=0.0)

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key."""
        self._check_process()
        async with self._lock:
            self._arrivals.pop(key, None)

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """Begin a family with its first token. See `core.ports`. Raises: StoreUnavailable."""
        self._check_process()
        async with self._lock:
            now = self._now()
            record = None if new.ref.session is None else self._alive(new.ref.session, now)
            if isinstance(record, str):
                return Gone(reason=record, now_us=now)
            session = None if record is None else record.session
            held = self._families.get(new.ref)
            if held is None:
                held = self._begin(new, record, now)
            elif held.family.digest != new.digest or held.end is not None:
                raise StoreUnavailable(
                    "a new family met a name in use: it was begun before and has moved on or ended, or the random "
                    "source repeats itself"
                )
            return FamilyCreated(family=held.family, session=session, now_us=now)

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
        """Exchange a refresh token, exactly once; the table in `core.ports` row by row (RFC 9700 s4.14.2)."""
        self._check_process()
        async with self._lock:
            now = self._now()
            record: _Record | None = None
            if ref.session is not None:
                slot = self._slots.get(ref.session)
                if slot is None:
                    return FamilyUnknown(now_us=now)
                ended = _end_of(slot, now)
                if ended is not None:
                    return FamilyEnded(reason=ended[0], at_us=ended[1], now_us=now)
                record = slot if isinstance(slot, _Record) else None
            held = self._families.get(ref)
            if held is None:
                return FamilyUnknown(now_us=now)
            family = held.family
            # Before everything that writes: a thief without the key must not even be able to end the family.
            if (client, key) != (family.client, family.key):
                return WrongHolder(now_us=now)
            ended = _end_of_family(held, now)
            if ended is not None:
                return FamilyEnded(reason=ended[0], at_us=ended[1], now_us=now)
            seen = 0 if record is None else record.seen_us
            outcome = self._exchange(
                held,
                record,
                seen,
                now,
                presented=(generation, digest),
                successor=successor,
                sealed=sealed,
                grace_us=grace_us,
            )
            if outcome is not None:
                if record is not None and not isinstance(outcome, FamilyUnknown):
                    record.seen_us = max(seen, now)
                return outcome
            if record is None or family.client:
                _end_family(held, REASON_REUSED, now)
                return FamilyReused(family=family, session=None, now_us=now)
            self._end(record, REASON_REUSED, now, deny_us=deny_us)
            return FamilyReused(family=family, session=ref.session, now_us=now)

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """Whether an access token of this session may still be accepted; writes nothing."""
        self._check_process()
        async with self._lock:
            now = self._now()
            if now < self._denied.get((ref.tag, jti), now):
                return Standing(why="denied", at_us=0, now_us=now)
            slot = self._slots.get(ref)
            why, at = ("unknown", 0) if slot is None else _end_of(slot, now) or (None, 0)
            return Standing(why=why, at_us=at, now_us=now)

    async def deny(self, tag: int, denial: Denial) -> None:
        """Put one entry on the denylist. Repeating adds another entry of the same content."""
        self._check_process()
        async with self._lock:
            self._clean(self._now(), removals=_CLEAN_STEPS, steps=_CLEAN_STEPS)
            self._deny(tag, denial)

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist in the order of commits. A position of an earlier process is lost, as its log is."""
        parts = None if after is None else _POSITION.fullmatch(after)
        self._check_process()
        async with self._lock:
            now = self._now()
            # Drawn when it is first needed: most programs never follow the denylist of their own process.
            self._log_name = self._log_name or self._options.system.random(8).hex()
            start = 0
            if after is not None:
                if parts is None or parts[1] != self._log_name or int(parts[2]) > self._logged:
                    return PositionLost(now_us=now)
                start = int(parts[2])
            found: list[tuple[int, Denial]] = []
            for place in range(bisect.bisect_right(self._numbers, start), len(self._numbers)):
                number = self._numbers[place]
                entry = self._log.get(number)
                if entry is not None and now < entry[1].until_us:
                    found.append((number, entry[1]))
                    if len(found) > limit:
                        break
            more = len(found) > limit
            end = found[limit - 1][0] if more else self._logged
            entries = tuple(denial for _, denial in found[:limit])
            return DenialPage(entries=entries, position=f"{self._log_name}.{end}", more=more, now_us=now)

    async def read_ring(self) -> tuple[int, bytes] | None:
        """The sealed key ring with its version, or `None` before there is one."""
        self._check_process()
        async with self._lock:
            return self._ring

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """Replace the ring if it is still at `expected` (0: none yet)."""
        self._check_process()
        async with self._lock:
            if expected != (0 if self._ring is None else self._ring[0]):
                return False
            self._ring = (expected + 1, packed)
            return True

    # What follows runs with the lock held, the first two methods aside.

    def _check_process(self) -> None:
        if self._pid is not None and self._pid != os.getpid():
            raise ConfigurationError(
                "store: memory: was opened before this process was forked, so each process would have its own "
                "sessions and a logout would not be seen everywhere; use one worker process, or a shared store "
                "(sqlite:, postgresql:, redis:)"
            )
        if not self._opened:
            raise StoreUnavailable("the memory store is not open")

    def _now(self) -> int:
        return self._options.system.now_us() + self._options.clock_offset_us()

    def _tell(self, ref: SessionRef) -> None:
        for each in self._listeners:
            each.changed(ref.handle)

    def _repeated(self, new: NewSession) -> _Slot | None:
        slot = self._slots.get(new.ref)
        if slot is not None and _origin(slot).digest != new.digest:
            raise StoreUnavailable("a new session met a handle in use: the random source repeats itself")
        return slot

    def _insert(self, new: NewSession, now: int, *, evicted: tuple[SessionRef, ...]) -> StoredSession:
        self._clean(now, removals=_CLEAN_STEPS, steps=_CLEAN_STEPS)
        key = (new.ref.tag, new.owner)
        created = self._after_cut(key, now)
        session = new.at(created)
        session = replace(session, fields=MappingProxyType(dict(session.fields)))
        self._places += 1
        record = _Record(session=session, seen_us=created, place=self._places, evicted=evicted)
        self._slots[new.ref] = record
        # Anonymous sessions are in no index: nobody lists or ends them by owner.
        if new.owner:
            self._owners.setdefault(key, set()).add(new.ref)
        self._await_cleaning(record.due_us, new.ref)
        return session

    def _begin(self, new: NewFamily, record: _Record | None, now: int) -> _Family:
        self._clean(now, removals=_CLEAN_STEPS, steps=_CLEAN_STEPS)
        owner = (new.ref.tag, new.owner)
        created = self._after_cut(owner, now)
        family = StoredFamily(
            ref=new.ref,
            generation=FIRST_GENERATION,
            digest=new.digest,
            owner=new.owner,
            subject=new.subject,
            client=new.client,
            key=new.key,
            grant=new.grant,
            created_us=created,
            rotated_us=created,
            idle_us=new.idle_us,
            absolute_us=created + new.absolute_us,
        )
        siblings = self._alone.setdefault(owner, set()) if record is None else record.families
        if record is not None and len(siblings) >= MAX_FAMILIES:
            self._make_room(siblings, now)
        siblings.add(new.ref)
        held = self._families[new.ref] = _Family(family=family)
        self._await_cleaning(held.due_us, new.ref)
        return held

    def _make_room(self, siblings: set[FamilyRef], now: int) -> None:
        # Nobody may lose a live token to one that is worth nothing any more.
        for each in [each for each in siblings if _end_of_family(self._families[each], now) is not None]:
            self._drop_family(each)
        if len(siblings) >= MAX_FAMILIES:
            self._drop_family(min(siblings, key=lambda each: (self._families[each].family.created_us, each.name)))

    def _exchange(
        self,
        held: _Family,
        record: _Record | None,
        seen: int,
        now: int,
        *,
        presented: tuple[int, str],
        successor: str,
        sealed: bytes,
        grace_us: int,
    ) -> FamilyRotated | FamilyKept | FamilyReplayed | FamilyUnknown | None:
        """The rows about generations; `None` is reuse."""
        family = held.family
        session = None if record is None else record.session
        generation, digest = presented
        if presented == (family.generation, family.digest):
            # Its holder has it, so nobody needs the sealed copy any more.
            held.sealed = None
            if now < family.rotated_us + grace_us:
                return FamilyKept(family=family, session=session, seen_us=seen, now_us=now)
            held.family = replace(family, generation=generation + 1, digest=successor, rotated_us=now)
            held.previous, held.forgiven_us, held.sealed = digest, now + grace_us, sealed
            self._await_cleaning(held.due_us, family.ref)
            return FamilyRotated(family=held.family, session=session, seen_us=seen, now_us=now)
        if generation >= family.generation:
            return FamilyUnknown(now_us=now)
        if generation < family.generation - 1:
            return None
        if digest != held.previous:
            return FamilyUnknown(now_us=now)
        # Nobody else can know 264 fresh bits: the same call again, whose answer was lost.
        if successor == family.digest:
            return FamilyRotated(family=family, session=session, seen_us=seen, now_us=now)
        if now < held.forgiven_us:
            return FamilyReplayed(family=family, session=session, seen_us=seen, sealed=held.sealed, now_us=now)
        return None

    def _drop_family(self, ref: FamilyRef) -> None:
        family = self._families.pop(ref).family
        owner = (ref.tag, family.owner)
        slot = None if ref.session is None else self._slots.get(ref.session)
        siblings = slot.families if isinstance(slot, _Record) else self._alone.get(owner, set())
        siblings.discard(ref)
        if not siblings and ref.session is None:
            del self._alone[owner]

    def _deny(self, tag: int, denial: Denial) -> None:
        self._logged += 1
        self._log[self._logged] = (tag, denial)
        self._numbers.append(self._logged)
        if denial.kind == "jti":
            place = (tag, denial.id)
            self._denied[place] = max(denial.until_us, self._denied.get(place, 0))
        self._await_cleaning(denial.until_us, self._logged)

    def _deny_session(self, ref: SessionRef, now: int, deny_us: int) -> None:
        if deny_us > 0:
            self._deny(ref.tag, Denial(kind="sid", id=session_denial_id(ref), until_us=now + deny_us))

    def _after_cut(self, owner: _Owner, now: int) -> int:
        return max(now, self._cuts.get(owner, now - 1) + 1)

    def _alive(self, ref: SessionRef, now: int) -> _Record | str:
        """The record, or the reason why there is nothing alive to act on."""
        slot = self._slots.get(ref)
        if slot is None:
            return "unknown"
        if isinstance(slot, _Tombstone):
            return slot.reason
        return cause_of_death(slot.session, seen_us=slot.seen_us, now_us=now) or slot

    def _alive_of(self, key: _Owner, now: int) -> list[_Record]:
        slots = (self._slots[ref] for ref in self._owners.get(key, ()))
        return sorted((s for s in slots if isinstance(s, _Record) and _alive_at(s, now)), key=_age)

    def _end(self, record: _Record, reason: str, now: int, *, deny_us: int = 0) -> None:
        session = record.session
        self._drop_families(record)
        # What the session held goes at once: a tombstone keeps its identity, not its content.
        origin = replace(session, authority="", fields=MappingProxyType({}))
        due = min(now + TOMBSTONE_US, session.absolute_us)
        self._slots[session.ref] = _Tombstone(reason=reason, at_us=now, due_us=due, place=record.place, origin=origin)
        self._tell(session.ref)
        self._leave_index(session)
        self._await_cleaning(due, session.ref)
        self._deny_session(session.ref, now, deny_us)

    def _drop_families(self, record: _Record) -> None:
        for ref in record.families:
            del self._families[ref]
        record.families.clear()

    def _leave_index(self, session: StoredSession) -> None:
        key = (session.ref.tag, session.owner)
        members = self._owners.get(key)
        if members is not None:
            members.discard(session.ref)
            if not members:
                del self._owners[key]

    def _await_cleaning(self, due_us: int, key: _Key) -> None:
        # Each ended session leaves a stale entry behind; without this a login loop would grow the queue for weeks.
        kept = len(self._slots) + len(self._cuts) + len(self._arrivals) + len(self._families) + len(self._log)
        if len(self._queue) > 4 * kept + 64:
            self._queue = [(due, place, each) for place, (due, each) in enumerate(self._everything())]
            heapq.heapify(self._queue)
        self._places += 1
        heapq.heappush(self._queue, (due_us, self._places, key))

    def _everything(self) -> Iterator[tuple[int, _Key]]:
        for ref, slot in self._slots.items():
            yield slot.due_us, ref
        for owner, cut in self._cuts.items():
            yield cut + TOMBSTONE_US, owner
        yield from ((arrival, key) for key, arrival in self._arrivals.items())
        yield from ((held.due_us, family) for family, held in self._families.items())
        yield from ((denial.until_us, number) for number, (_, denial) in self._log.items())

    def _clean(self, now: int, *, removals: int, steps: int) -> int:
        removed = 0
        while self._queue and self._queue[0][0] <= now and removed < removals and steps > 0:
            steps -= 1
            _, place, key = heapq.heappop(self._queue)
            due = self._due(key)
            if due is None:
                continue
            if due > now:
                heapq.heappush(self._queue, (due, place, key))
                continue
            removed += self._forget(key)
        return removed

    def _due(self, key: _Key) -> int | None:
        if isinstance(key, SessionRef):
            slot = self._slots.get(key)
            return None if slot is None else slot.due_us
        if isinstance(key, FamilyRef):
            held = self._families.get(key)
            return None if held is None else held.due_us
        if isinstance(key, str):
            return self._arrivals.get(key)
        if isinstance(key, int):
            entry = self._log.get(key)
            return None if entry is None else entry[1].until_us
        cut = self._cuts.get(key)
        return None if cut is None else cut + TOMBSTONE_US

    def _forget(self, key: _Key) -> int:
        if isinstance(key, SessionRef):
            slot = self._slots.pop(key)
            self._tell(key)
            if isinstance(slot, _Record):
                self._drop_families(slot)
            self._leave_index(_origin(slot))
            return 1
        if isinstance(key, FamilyRef):
            return self._forget_family(key)
        if isinstance(key, int):
            tag, denial = self._log.pop(key)
            if self._denied.get((tag, denial.id)) == denial.until_us and denial.kind == "jti":
                del self._denied[tag, denial.id]
            if len(self._numbers) > 2 * len(self._log) + 64:
                self._numbers = list(self._log)
            return 1
        if isinstance(key, str):
            del self._arrivals[key]
        else:
            del self._cuts[key]
        return 0

    def _forget_family(self, ref: FamilyRef) -> int:
        held = self._families[ref]
        if held.due_us < held.over_us:
            # Only the grace is over: the sealed successor goes, the family stays.
            held.sealed = None
            self._await_cleaning(held.due_us, ref)
            return 0
        self._drop_family(ref)
        return 1


class _MemoryFeed:
    """The line of one near copy: unbroken from the first question until `close`, a step of the clock or a fork."""

    def __init__(self, store: MemoryStore, listener: Listener) -> None:
        self._store = store
        self._listener = listener
        self._line: Line | None = None
        self._skew = 0.0
        self._pid = os.getpid()

    def line(self, tag: int) -> Line | None:
        """The line, in the process that asked for it and while its store is open."""
        line = self._line
        if line is None or line.broken or self._pid != os.getpid() or not self._store.is_open:
            return None
        return line

    def slot(self, tag: int) -> int:
        """There are no marks."""
        return 0

    def drain(self) -> None:
        """Nothing: whoever changes a session tells of it himself."""

    async def renew(self, tag: int) -> Line | None:
        """See `beat`."""
        await self.beat()
        return self.line(tag)

    async def beat(self) -> None:
        """Make the line if there is none, and a new one after a step of the clock."""
        if self._pid != os.getpid() or not self._store.is_open:
            if self._line is not None:
                self._line.cut()
            return
        elapsed = self._store.elapsed()
        skew = await self._store.ping() / SECOND_US - elapsed
        line = self._line
        if line is not None and not line.broken:
            if abs(skew - self._skew) <= CLOCK_STEP_SECONDS:
                self._skew = skew
                return
            line.cut()
        # Listening comes before the line: no change falls between the two.
        await self._store.listen(self._listener)
        line = Line(FOR_EVER, source="memory")
        line.confirm(elapsed)
        self._line, self._skew = line, skew

    async def close(self) -> None:
        """Cut the line and listen no more."""
        line, self._line = self._line, None
        if line is not None:
            line.cut()
        # In a child the lock may be somebody's who is not there.
        if self._pid == os.getpid():
            await self._store.unlisten(self._listener)


def _origin(slot: _Slot) -> StoredSession:
    return slot.session if isinstance(slot, _Record) else slot.origin


def _end_of(slot: _Slot, now: int) -> tuple[str, int] | None:
    """Why a session is over, and since when; `None` while it is alive."""
    if isinstance(slot, _Tombstone):
        return slot.reason, slot.at_us
    session = slot.session
    cause = cause_of_death(session, seen_us=slot.seen_us, now_us=now)
    if cause is None:
        return None
    return cause, session.absolute_us if cause == "absolute_timeout" else slot.seen_us + session.idle_us


def _end_of_family(held: _Family, now: int) -> tuple[str, int] | None:
    family = held.family
    if held.end is not None or now < held.over_us:
        return held.end
    if now >= family.absolute_us:
        return "absolute_timeout", family.absolute_us
    return "idle_timeout", held.over_us


def _end_family(held: _Family, reason: str, now: int) -> None:
    if held.end is None:
        held.end, held.sealed = (reason, now), None


def _valid_alias(record: _Record, digest: str, now: int) -> _Alias | None:
    alias = record.alias
    if alias is not None and now >= alias.until_us:
        record.alias = alias = None
    return alias if alias is not None and alias.digest == digest else None


def _alive_at(record: _Record, now: int) -> bool:
    return cause_of_death(record.session, seen_us=record.seen_us, now_us=now) is None


def _age(record: _Record) -> tuple[int, str]:
    return record.session.created_us, record.session.ref.handle


def _refs(records: Iterable[_Record]) -> tuple[SessionRef, ...]:
    return tuple(each.session.ref for each in records)


def _seen(record: _Record) -> Seen:
    return Seen(session=record.session, seen_us=record.seen_us)


def _octets(fields: Mapping[str, str]) -> int:
    return sum(len(name.encode()) + len(text.encode()) for name, text in fields.items())


def _owner_start(cursor: str | None) -> tuple[int, str] | None:
    if cursor is None:
        return None
    parts = _OWNER_CURSOR.fullmatch(cursor)
    if parts is None:
        raise ValueRefused("not a cursor of this list")
    return int(parts[1]), parts[2]
