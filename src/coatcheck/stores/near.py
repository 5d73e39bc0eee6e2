"""Near copies of sessions, over any store that has a feed.

Decides when a session is answered from this process's memory: when the rule of `core.freshness` says so. Everything
else goes to the store behind. Decides too what this node's own writes mean for its copies (they are thrown away before
the write is sent and once more when it was answered; a result is never kept) and that what this node ended in the last
minutes is ended again in a store that turns out to be another one than before. It must never keep an id, answer from a
copy that the rule does not allow, or let a feed's failure become a request's.
"""

from __future__ import annotations

import logging
import os
from base64 import urlsafe_b64decode
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple
from weakref import WeakSet

from coatcheck.core.activity import FLUSH_SECONDS, QUIET_SHARE
from coatcheck.core.freshness import FOR_EVER, NEVER, Fill, Line, NearTable
from coatcheck.core.ids import GROUP_OF, KEY_OF, IdKeys, SessionRef, group_of
from coatcheck.core.near_session import NearSession, pack, unpack
from coatcheck.core.ports import (
    REASON_EVICTED,
    REASON_REUSED,
    REASON_SUPERSEDED,
    Activity,
    Admitted,
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
    FamilyReused,
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
    Signal,
    Standing,
    Store,
    StoredPage,
    Waits,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession, StoredSession, decode_authority, tightened
from coatcheck.deadlines import time_left
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.ledger import Ledger
from coatcheck.system import System

log: Final = logging.getLogger("coatcheck")

IDLE_SECONDS: Final = 30.0
"""For how long after the last question the lease is kept: then the next one pays for one trip."""

PATIENCE_SECONDS: Final = 0.25
"""For how long a read waits at most for a feed that somebody else is connecting at this moment."""

_LOOK_SECONDS: Final = 0.01

REST_SECONDS: Final = 600.0
"""After how long without a question the connection is let go: then the next one pays for a new one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearLimits:
    """How much is kept, for how long it counts in seconds, and today's limits of a session's life."""

    entries: int
    octets: int
    lease: float
    deadline: float
    idle_us: int
    absolute_us: int


class _Flight:
    """A read that others may wait for. Hardly ever anybody does: what that needs is made by who waits."""

    __slots__ = ("_landed", "_waiting", "fill")

    def __init__(self, fill: Fill) -> None:
        self.fill: Final = fill
        self._landed = False
        self._waiting: list[Signal] = []

    def land(self) -> None:
        """It was answered, or never will be."""
        # In this order: who begins to wait meanwhile sees that it has landed.
        self._landed = True
        for each in self._waiting:
            each.give()

    async def landed(self, signal: Signal, seconds: float) -> bool:
        """Wait until it has landed, at most so long; whether it has."""
        self._waiting.append(signal)
        return self._landed or await signal.wait(seconds)


class _Clock(NamedTuple):
    """What the store's clock said, and between which two moments of ours."""

    now_us: int
    sent: float
    received: float


class NearStore:
    """A store with near copies in front. Safe for threads, tasks, several event loops and forks.

    What `core.ports` promises of a store holds for it, except that `peek` knows something and `load` may answer from
    what was read within the lease.
    """

    def __init__(self, store: Store, *, waits: Waits, system: System, limits: NearLimits) -> None:
        self.behind = store
        self._waits: Final = waits
        self._now: Final = system.elapsed
        self._limits: Final = limits
        self.hits = 0
        """How often `peek` knew the answer; counted without a lock, so about."""
        self.reads = 0
        """How often the store was asked for a session."""
        self._clock = _Clock(0, 0.0, 0.0)
        self._line: Line | None = None
        self._lines: list[Line] = []
        self._sources: set[str] = set()
        self.met = 0
        """How many stores this node has met behind its URL: more than primaries when one was lost or replaced."""
        # No feed could be had when it was waited for: it is not waited for again before there is one.
        self._deaf = False
        self._used_at = NEVER
        self._hits_then = 0
        self._resting = True
        self._begin()
        self._feed: Final[Feed] = store.feed(self, lease=limits.lease)
        # An event loop hears by itself; a thread has to look.
        self._drains: Final = store.colour == "blocking"
        _stores.add(self)

    def _begin(self) -> None:
        self.table: NearTable[NearSession] = NearTable(
            entries=self._limits.entries,
            octets=self._limits.octets,
            key_of=KEY_OF,
            group_of=GROUP_OF,
            mutex=self._waits.mutex(),
        )
        self._flights: dict[tuple[str, str], _Flight] = {}
        self._ledger = Ledger(
            waits=self._waits, now=self._now, line_of=lambda tag: self._feed.line(tag), deadline=self._limits.deadline
        )

    # -- what changed, told by the feed ----------------------------------------------------------------------------

    def changed(self, handle: str) -> None:
        """See `core.ports.Listener`."""
        self.table.changed(handle.encode("ascii", "replace"))

    def cut_off(self, tag: int) -> None:
        """See `core.ports.Listener`."""
        self.table.cut_off(group_of(tag), self._now())

    def emptied(self) -> None:
        """See `core.ports.Listener`."""
        self.table.emptied(self._now())

    # -- upkeep ----------------------------------------------------------------------------------------------------

    @property
    def wants_beat(self) -> bool:
        """Whether `beat` should be called again: until nobody has asked for a long while."""
        return not self._resting

    async def beat(self) -> None:
        """Keep the lease while sessions are asked for; let go of the feed when nobody has asked for a long while."""
        now = self._now()
        if self.hits != self._hits_then:
            self._hits_then, self._used_at = self.hits, now
        if now < self._used_at + IDLE_SECONDS:
            await self._feed.beat()
            for line in self._lines:
                if not line.broken:
                    # Not only when somebody is checked: a node that has stopped to check may have ended somebody.
                    await self._tell(line)
        elif now < self._used_at + REST_SECONDS:
            # What is not read piles up at the server.
            self._feed.drain()
        else:
            self._resting = True
            await self._feed.close()

    @property
    def staleness(self) -> float:
        """Seconds since the line that was last used was confirmed; infinite before there was one."""
        return self._now() - (NEVER if self._line is None else self._line.confirmed)

    @property
    def lost(self) -> Line | None:
        """The line that was last used, if it has broken since: behind it may be another store than before."""
        if self._drains:
            self._feed.drain()
        return self._line if self._line is not None and self._line.broken else None

    def store_clock_us(self) -> int:
        """The store's clock, as far as this node knows: late by one answer's way at most."""
        clock = self._clock
        return clock.now_us + int((self._now() - clock.received) * SECOND_US)

    # -- one session -----------------------------------------------------------------------------------------------

    def peek(self, value: bytes) -> NearSession | None:
        """The copy of this cookie's session, if it is to be believed now. Zero trips; about a microsecond."""
        if self._drains:
            self._feed.drain()
        held = self.table.look(value, self._now())
        if held is not None:
            self.hits += 1
        return held

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """From the copy, or one store command for all who ask at this moment. Raises: StoreUnavailable."""
        if self._drains:
            self._feed.drain()
        key = ref.handle.encode("ascii")
        self._used_at = now = self._now()
        self._resting = False
        if self.table.known(key) is None:
            # Nothing is kept: there is nothing to compare.
            line = await self._recognise(ref.tag) or await self._feed.renew(ref.tag)
        else:
            group, raw = group_of(ref.tag), urlsafe_b64decode(digest + "=")
            held = self.table.find(key, group, raw, now)
            if held is not None:
                if now >= held.until:
                    # Its use is being noted; not once more for every request until the batch is written.
                    held.until = min(held.ends, now + FLUSH_SECONDS)
                return self.opened(held, ref.handle)
            line = await self._recognise(ref.tag)
            if line is None:
                line = await self._feed.renew(ref.tag)
            elif self.table.awaiting(key, group, raw, now) is not None:
                # After a longer silence: one answer makes every copy of this line good again.
                line = await self._feed.renew(ref.tag) or line
                held = self.table.find(key, group, raw, self._now())
                if held is not None:
                    return self.opened(held, ref.handle)
        if line is None:
            self.reads += 1
            return await self.behind.load(ref, digest)
        if line is not self._line:
            self._meet(line)
        await self._ledger.tell(line)
        flight = self._flights.get((ref.handle, digest))
        # A read that something was told about since is not joined: what it brings may be older than the question.
        if flight is not None and not flight.fill.void and await self._joined(flight):
            group, raw = group_of(ref.tag), urlsafe_b64decode(digest + "=")
            held = self.table.find(key, group, raw, self._now())
            if held is not None:
                return self.opened(held, ref.handle)
        return await self._read(ref, digest, key, line)

    async def _joined(self, flight: _Flight) -> bool:
        return await flight.landed(self._waits.signal(), time_left(self._limits.deadline))

    async def _read(self, ref: SessionRef, digest: str, key: bytes, line: Line) -> Loaded:
        sent, name = self._now(), (ref.handle, digest)
        flight = _Flight(self.table.begin(key, line, sent, slot=self._feed.slot(ref.tag)))
        self._flights[name] = flight
        kept: NearSession | None = None
        self.reads += 1
        try:
            found = await self.behind.load(ref, digest)
            if isinstance(found, Live):
                kept = self._copy(found, flight.fill, sent)
            elif isinstance(found, Ended):
                # Whoever is told that it is over must not find it alive a moment later.
                self.changed(ref.handle)
            return found
        finally:
            self.table.settle(key, flight.fill, kept)
            if self._flights.get(name) is flight:
                del self._flights[name]
            flight.land()

    async def _tell(self, line: Line) -> None:
        try:
            await self._ledger.tell(line)
        except StoreUnavailable as lost:
            log.info("coatcheck: what was ended here is told to its store later: %s", lost.detail)

    async def load_anew(self, ref: SessionRef, digest: str) -> Loaded:
        """As the store has it now, whatever is near. Raises: StoreUnavailable."""
        await self._recognise(ref.tag)
        return await self.behind.load(ref, digest)

    async def _recognise(self, tag: int) -> Line | None:
        """Before a store answers, let it have what this node ended lately if it may be another one than before. Without
        anything to tell, or with a line that was heard of within the lease, this asks nobody."""
        line = self._feed.line(tag)
        if self._ledger.is_empty:
            return line
        if line is None or not line.is_fresh(self._now()):
            line = await self._feed.renew(tag)
            if line is None and not self._deaf:
                # Somebody else may be connecting at this moment: for as long as he takes, and once.
                for _ in range(int(min(PATIENCE_SECONDS, self._limits.deadline / 4) / _LOOK_SECONDS)):
                    await self._waits.sleep(_LOOK_SECONDS)
                    line = self._feed.line(tag)
                    if line is not None:
                        break
                self._deaf = line is None
        if line is not None:
            self._deaf = False
            await self._ledger.tell(line)
        return line

    def _meet(self, line: Line) -> None:
        """After a recovery nothing of before is trusted, not through the next outage either."""
        self._line = line
        if line.source not in self._sources:
            self._sources.add(line.source)
            self.met += 1
        if line not in self._lines:
            for old in self._lines:
                if old.broken:
                    old.void()
            self._lines = [*(old for old in self._lines if not old.broken), line]

    def through_outage(self, ref: SessionRef, digest: str, *, grace: float) -> Live | None:
        """The session as it was when the store was last heard of, for `grace` seconds beyond the lease."""
        key, raw = ref.handle.encode("ascii"), urlsafe_b64decode(digest + "=")
        held = self.table.through_outage(key, group_of(ref.tag), raw, self._now(), grace=grace)
        return None if held is None else self.opened(held, ref.handle)

    def vouches_until(self, ref: SessionRef, *, grace: float) -> float:
        """Until when the copy of a session may be believed at most: while its line is silent, through the outage."""
        held = self.table.known(ref.handle.encode("ascii"))
        if held is None:
            return FOR_EVER
        line = held.line
        return line.until if self._now() < line.until else line.confirmed + line.span + grace

    def opened(self, held: NearSession, handle: str) -> Live:
        """The whole of a copy."""
        return Live(session=unpack(held, handle), seen_us=held.seen_us, now_us=self.store_clock_us())

    def _copy(self, found: Live, fill: Fill, sent: float) -> NearSession | None:
        self._clock = _Clock(found.now_us, sent, self._now())
        until, ends = self._span(found.session, found.seen_us, found.now_us, sent)
        if ends <= sent or not _is_readable(found.session.authority):
            return None
        return pack(found.session, fill=fill, seen_us=found.seen_us, until=until, ends=ends)

    def _span(self, session: StoredSession, seen_us: int, now_us: int, at: float) -> tuple[float, float]:
        """When the use of a copy is to be noted, and when it is over by itself, if the store's clock was `now_us` not
        before `at`: too early by an answer's way at most, and then the store is asked."""
        session = tightened(session, idle_us=self._limits.idle_us, absolute_us=self._limits.absolute_us)
        ends_us = min(session.absolute_us, seen_us + session.idle_us)
        due_us = seen_us + session.idle_us // QUIET_SHARE
        return at + (min(due_us, ends_us) - now_us) / SECOND_US, at + (ends_us - now_us) / SECOND_US

    def note_place(self, session: StoredSession, mark: bytes) -> None:
        """A request from the place with this mark was let in, by this very record: the next one from there need not
        be judged. A copy of another version was not judged, and keeps its own mark."""
        held = self.table.known(session.ref.handle.encode("ascii"))
        if held is not None and unpack(held, session.ref.handle).version == session.version:
            held.place = mark

    def note_due(self, ref: SessionRef) -> None:
        """Whoever asked was not let in: the next use is still to be noted."""
        held = self.table.known(ref.handle.encode("ascii"))
        if held is not None:
            held.until = min(held.until, self._now())

    # -- this node's own writes ------------------------------------------------------------------------------------

    async def create(self, new: NewSession) -> Created:
        """See `core.ports`."""
        return await self.behind.create(new)

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
        """See `core.ports`."""
        source = self._ledger.source_of(new.ref.tag)
        if supersedes is not None:
            self.changed(supersedes.handle)
        try:
            done = await self.behind.admit(
                new,
                maximum=maximum,
                on_limit=on_limit,
                supersedes=supersedes,
                choice=choice,
                reason=reason,
                deny_us=deny_us,
            )
        finally:
            if supersedes is not None:
                self.changed(supersedes.handle)
        if isinstance(done, Admitted):
            for ref in done.evicted:
                self.changed(ref.handle)
                self._ended(ref, reason, deny_us, source)
            if supersedes is not None:
                self._ended(supersedes, REASON_SUPERSEDED, deny_us, source)
        return done

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """See `core.ports`."""
        await self._recognise(ref.tag)
        with self._writing(ref):
            return await self.behind.commit(ref, changes, limits=limits, expected=expected)

    async def touch(self, activities: Sequence[Activity]) -> None:
        """See `core.ports`."""
        at, clock = self._now(), self._clock
        # Early rather than late: as if the last answer had been given the moment it was asked for.
        clock_us = clock.now_us + int((at - clock.sent) * SECOND_US)
        await self.behind.touch(activities)
        now = self._now()
        for activity in activities:
            held = self.table.known(activity.ref.handle.encode("ascii"))
            # A copy whose own end had come when the store answered may have been dead there, and is dead.
            if held is not None and activity.seen_us > held.seen_us and now < held.ends:
                session = unpack(held, activity.ref.handle)
                held.until, held.ends = self._span(session, activity.seen_us, clock_us, at)
                held.seen_us = activity.seen_us

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
        """See `core.ports`."""
        await self._recognise(ref.tag)
        with self._writing(ref):
            return await self.behind.rotate_id(
                ref,
                old_digest=old_digest,
                new_digest=new_digest,
                sealed=sealed,
                alias_us=alias_us,
                authority=authority,
            )

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """See `core.ports`."""
        with self._writing(ref):
            return await self.behind.expire_idle(ref)

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """See `core.ports`."""
        source = self._ledger.source_of(ref.tag)
        with self._writing(ref):
            done = await self.behind.revoke(ref, reason=reason, deny_us=deny_us)
        self._ended(ref, reason, deny_us, source)
        return done

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """See `core.ports`."""
        source = self._ledger.source_of(tag)
        self.cut_off(tag)
        try:
            done = await self.behind.revoke_owner(tag, owner, reason=reason, keep=keep, deny_us=deny_us)
        finally:
            self.cut_off(tag)
        # One by one: made again as a whole it would end who has signed in since.
        for ref in done.ended:
            self._ended(ref, reason, deny_us, source)
        return done

    def _ended(self, ref: SessionRef, reason: str, deny_us: int, source: str | None) -> None:
        again = partial(self.behind.revoke, ref, reason=reason, deny_us=deny_us)
        self._ledger.note(ref.tag, again, source=source)

    @contextmanager
    def _writing(self, ref: SessionRef) -> Iterator[None]:
        self.changed(ref.handle)
        try:
            yield
        finally:
            # Once more: what was read meanwhile may be older than what was written.
            self.changed(ref.handle)

    # -- refresh families and denials --------------------------------------------------------------------------------

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """See `core.ports`."""
        await self._recognise(new.ref.tag)
        return await self.behind.create_family(new)

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
        """See `core.ports`."""
        await self._recognise(ref.tag)
        source = self._ledger.source_of(ref.tag)
        done = await self.behind.rotate_refresh(
            ref,
            generation=generation,
            digest=digest,
            successor=successor,
            sealed=sealed,
            grace_us=grace_us,
            client=client,
            key=key,
            deny_us=deny_us,
        )
        if isinstance(done, FamilyReused) and done.session is not None:
            self.changed(done.session.handle)
            self._ended(done.session, REASON_REUSED, deny_us, source)
        return done

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """See `core.ports`."""
        await self._recognise(ref.tag)
        return await self.behind.standing(ref, jti)

    async def deny(self, tag: int, denial: Denial) -> None:
        """See `core.ports`."""
        source = self._ledger.source_of(tag)
        await self.behind.deny(tag, denial)
        self._ledger.note(tag, partial(self.behind.deny, tag, denial), source=source)

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """See `core.ports`."""
        return await self.behind.denials(after=after, limit=limit)

    async def read_ring(self) -> tuple[int, bytes] | None:
        """See `core.ports`."""
        return await self.behind.read_ring()

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """See `core.ports`."""
        return await self.behind.write_ring(packed, expected=expected)

    # -- everything else goes through ------------------------------------------------------------------------------

    @property
    def colour(self) -> Colour:
        """See `core.ports`."""
        return self.behind.colour

    @property
    def shared(self) -> bool:
        """See `core.ports`."""
        return self.behind.shared

    async def open(self) -> None:
        """See `core.ports`. The feed connects when it is first needed."""
        await self.behind.open()

    async def close(self) -> None:
        """See `core.ports`."""
        await self._feed.close()
        await self.behind.close()

    async def ping(self) -> int:
        """See `core.ports`."""
        return await self.behind.ping()

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """See `core.ports`."""
        return await self.behind.id_keys(candidate)

    async def local_key(self, candidate: bytes) -> bytes | None:
        """See `core.ports`."""
        return await self.behind.local_key(candidate)

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """See `core.ports`."""
        return await self.behind.list_by_owner(tag, owner, after=after, limit=limit)

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """See `core.ports`."""
        return await self.behind.scan(after=after, limit=limit)

    async def sweep(self, *, limit: int) -> int:
        """See `core.ports`."""
        return await self.behind.sweep(limit=limit)

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """See `core.ports`."""
        return await self.behind.hit(key, limit, cost=cost)

    async def clear(self, key: str) -> None:
        """See `core.ports`."""
        await self.behind.clear(key)

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        """See `core.ports`."""
        return self.behind.feed(listener, lease=lease)


def _is_readable(authority: str) -> bool:
    try:
        decode_authority(authority)
    except ValueError:
        return False
    return True


_stores: WeakSet[NearStore] = WeakSet()


def _after_fork() -> None:
    # Whatever another thread of the parent was doing to a table is half done here, its mutex held for ever.
    for store in list(_stores):
        store._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
