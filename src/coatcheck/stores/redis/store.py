"""Sessions, rate limits and tokens in Redis 6.2+ or Valkey 8+: one server, Sentinel or Cluster.

Decides the key layout and what each verb's script is given and answers; the rules inside a verb stand in `lua/`. All
keys of one subject carry one hash tag, so a script is atomic on a Cluster too; how the denylist, which is elsewhere
there, still learns of every end stands in `tokens`. Layout (schema 1):

    <namespace>:s:{<tag>}<handle>   record or tombstone, one value packed by cmsgpack:
        [1, version, digest, owner, subject, created, auth, idle, absolute, authority, [name, text, ...],
         [handles that gave way at sign-in]]; members that a newer release appends survive a commit;
        [1, "ended", reason, at, until, digest, created, until when a Cluster's denylist may lack it or 0]
    <namespace>:u:{<tag>}<owner>    sorted set: member = handle, score = last activity (anonymous: owner is empty)
    <namespace>:c:{<tag>}<owner>    the latest revoke_owner: [time, reason, handle that was kept or "",
        [handles that a Cluster's denylist may lack], until when, [time, reason and until when it matters of every cut
        that ended a family standing alone]]
    <namespace>:r:{<tag>}<handle>   alias of the last rotation: [old digest, sealed successor, until]
    <namespace>:f:{<tag>}<handle>   the families of a session, a hash by name of
        [1, generation, digest, owner, subject, client, key, grant, created, rotated, idle, absolute, digest before,
         end of its grace, 1 while its sealed successor may be told, reason or "", ended at]
    <namespace>:g:{<tag>}<root>     a family that stands alone, a hash of the same
    <namespace>:n:{<tag>}<handle or root>:<name>    sealed successor of the last rotation; dies with its grace
    <namespace>:a:{<tag>}<owner>    when the owner's latest family that stands alone was created, as decimal text
    <namespace>:j:{<tag>}<jti>      a denied access token: [until, since]
    <namespace>:{log}:d             the denylist, a stream of kind, id, until and not_before
    <namespace>:{l:<hash>}:l        rate limit: the time at which it is full again, as decimal text
    <namespace>:keys                the keys of ids
    <namespace>:ring                the sealed key ring, a hash of version and packed

The kind comes before the tag so that a near copy can follow `<namespace>:s:{` and `<namespace>:c:{`, what ends and
changes sessions, and hear nothing of activity. The tag is four hexadecimal digits, an owner in a key its first 16
characters. Times are Unix microseconds. A session's record (not a family's) is packed small: a digest is its 32 octets,
in the tombstone and the alias too; the owner is as in keys where the subject alone leads to it (no tenant), else whole;
auth is -1 (nobody signed in), 0 (at the creation) or the time; idle and absolute are lengths, the latter from the
creation on, in seconds, or in microseconds below zero where seconds are not exact. docs/decisions/0012-redis-layout.md
says why.

Expiry of keys only cleans up: deadlines are stored and compared. A record or tombstone goes two minutes after its last
moment, an index after the last of its sessions, families after their session. The log has no expiry: its last id is
what tells a position of it from a strange one. It must never touch a session's key for activity (every near copy would
be thrown away), never read from a replica, and use no KEYS, and SCAN in `scan` and `sweep` alone. While a Cluster moves
a slot key by key, a script may find a record and miss its index: sessions of that slot can look idle too early until
the move is over; `tokens` says which verbs wait for its end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.near_session import NearSession
from coatcheck.core.ports import (
    REASON_EVICTED,
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
    Seen,
    StoredPage,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession, StoredSession
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.calls import (
    answer_of,
    bytes_of,
    int_of,
    is_digest,
    list_of,
    refs_of,
    session_of,
    stored_digest,
    stored_owner,
    text_of,
)
from coatcheck.stores.redis.dispatch import Call
from coatcheck.stores.redis.driver import Word
from coatcheck.stores.redis.durability import Durability, read_durability
from coatcheck.stores.redis.feed import RedisFeed
from coatcheck.stores.redis.nodes import Address, Reply, slot_of
from coatcheck.stores.redis.tokens import TokenVerbs
from coatcheck.stores.redis.walk import Step, Walk

_OWNER_CURSOR: Final = re.compile(r"([0-9]{1,16})\.([A-Za-z0-9_-]{16})")
_TOUCHES_PER_COMMAND: Final = 64
# A sweep continues where the last one stopped, so that the largest store is never walked in one go.
_SWEPT_PER_CALL: Final = 10_000


class RedisStore(TokenVerbs):
    """Sessions, rate limits and tokens behind a Redis protocol. See `core.ports` for what each verb promises."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        super().__init__(url, options)
        self._swept: str | None = None
        self._feeds: tuple[RedisFeed, ...] = ()

    @property
    def colour(self) -> Colour:
        """Which face may use this store."""
        return self._options.colour

    @property
    def shared(self) -> bool:
        """Always true: every process with the same URL and name space sees the same sessions."""
        return True

    async def open(self) -> None:
        """Find the primaries and give them the scripts. Raises: StoreUnavailable."""
        until = self._dispatcher.until()
        load = [("SCRIPT", "LOAD", script.source) for script in self._scripts.values()]
        for _, address in await self._dispatcher.primaries(until):
            await self._dispatcher.at(address, *load, until=until)

    async def close(self) -> None:
        """Close every connection of this process. The store may be opened again."""
        for feed in self._feeds:
            await feed.close()
        await self._dispatcher.close()

    def feed(self, listener: Listener, *, lease: float) -> RedisFeed:
        """What changes, told by the primaries: see `feed`. Reads of sessions then go over its connections too, in the
        asynchronous colour."""
        feed = RedisFeed(listener, lease=lease, dispatcher=self._dispatcher, options=self._options)
        self._feeds = (*self._feeds, feed)
        return feed

    async def durability(self) -> Durability:
        """What the servers say of how they keep what is written. Changes nothing. Raises: StoreUnavailable."""
        return await read_durability(self._dispatcher)

    async def ping(self) -> int:
        """The clock of the server, Unix microseconds. Raises: StoreUnavailable."""
        return await self._clock(self._dispatcher.until())

    async def _clock(self, until: float) -> int:
        (reply,) = await self._dispatcher.perform([Call(slot=0, words=("TIME",))], write=False, until=until)
        return self._time(reply)

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """The keys of this store's ids. Raises: StoreUnavailable, also when what is stored are no keys."""
        key = f"{self._options.namespace}:keys"
        stored = await self._run("id_keys", [key], [candidate.pack()], slot=slot_of(key), write=True)
        keys = IdKeys.unpack(stored) if isinstance(stored, bytes) else None
        if keys is None:
            # Never replaced: with other keys every cookie in the world would turn into a forgery.
            raise StoreUnavailable(f"redis: {key} does not hold the keys of ids")
        return keys

    async def local_key(self, candidate: bytes) -> bytes | None:
        """Always `None`: a shared store keeps no key that has to stay outside of it."""
        return None

    def peek(self, value: bytes) -> NearSession | None:
        """Always `None`: this store keeps no near copy."""
        return None

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. Raises: StoreUnavailable, OutcomeUnknown."""
        session, _, now = self._created(new, await self._admit(new, on_limit="create", maximum=0))
        return Created(session=session, now_us=now)

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
        """Create under a limit, exactly. Raises: StoreUnavailable, OutcomeUnknown."""
        # A session of the same owner has the same tag; any other is in another slot and not ours to end here.
        until = self._dispatcher.until()
        older = supersedes.handle if supersedes is not None and supersedes.tag == new.ref.tag else ""
        admit = partial(
            self._admit,
            new,
            on_limit=on_limit,
            maximum=maximum,
            supersedes=older,
            choice=choice,
            reason=reason,
            deny_us=deny_us,
            until=until,
        )
        reply = await admit(confirm=bool(older))
        if reply[0] == b"limit":
            return LimitReached(alive=refs_of(new.ref.tag, reply[2:]), now_us=int_of(reply[1]))
        session, evicted, now = self._created(new, reply)
        if evicted and not older and self._options.replicas:
            # Who ends nobody waits for no replica: what did is repeated, answers alike, and is confirmed then.
            await admit(confirm=True)
        replaced = (SessionRef(new.ref.tag, older),) if reply[3] == 1 else ()
        await self._tell((*replaced, *evicted), now, deny_us, until)
        return Admitted(session=session, evicted=evicted, now_us=now)

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone in one command. Raises: StoreUnavailable."""
        stored = stored_digest(digest)
        reply = list_of(await self._read(ref, stored), at_least=2)
        now, told = int_of(reply[0]), list_of(reply[1])
        if not isinstance(told[0], bytes):
            # Alive, unless the shape of its bytes says otherwise: the script has looked at the first of them only.
            seen_us, packed = told[0], told[-1]
            session = session_of(ref, packed, digest if is_digest(digest, stored) else None)
            if session is None:
                return _unreadable(ref, now)
            # Without a place in the index it was last used when it was created.
            return Live(session=session, seen_us=session.created_us if seen_us is None else int_of(seen_us), now_us=now)
        what, *rest = answer_of(told)
        if what == b"absent":
            return Absent(why="replaced" if rest[0] == b"replaced" else "unknown", now_us=now)
        if what == b"ended":
            return Ended(reason=text_of(rest[0]), at_us=int_of(rest[1]), now_us=now)
        session = None if what == b"broken" else session_of(ref, rest[1])
        if session is None:
            return _unreadable(ref, now)
        if what == b"aliased":
            return Aliased(session=session, seen_us=int_of(rest[0]), now_us=now, sealed=bytes_of(rest[2]))
        return Live(session=session, seen_us=int_of(rest[0]), now_us=now)

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record. Raises: StoreUnavailable, OutcomeUnknown."""
        arguments: list[Word] = ["" if expected is None else expected, limits.octets, limits.fields, len(changes.put)]
        for name, text in changes.put.items():
            arguments += (name, text)
        arguments += sorted(changes.delete)
        reply = answer_of(await self._session("commit", ref, arguments, write=True))
        what, now = reply[0], int_of(reply[1])
        if what == b"committed":
            return Committed(version=int_of(reply[2]), now_us=now)
        if what == b"conflict":
            return Conflict(version=int_of(reply[2]), now_us=now)
        if what == b"oversized":
            return Oversized(now_us=now)
        return Gone(reason=text_of(reply[2]), now_us=now)

    async def touch(self, activities: Sequence[Activity]) -> None:
        """Move last activity of alive sessions forward. Raises: StoreUnavailable, OutcomeUnknown."""
        slots: dict[int, list[Activity]] = {}
        for activity in activities:
            slots.setdefault(self._slot(activity.ref.tag), []).append(activity)
        calls: list[Call] = []
        for slot, group in slots.items():
            for start in range(0, len(group), _TOUCHES_PER_COMMAND):
                batch = group[start : start + _TOUCHES_PER_COMMAND]
                keys = [self._key(each.ref.tag, "s", each.ref.handle) for each in batch]
                seen = [each.seen_us for each in batch]
                calls.append(self._call("touch", keys, [self._offset(), *seen], slot=slot))
        await self._dispatcher.perform(calls, write=True)

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
        """Let a new id take the old one's place. Raises: StoreUnavailable, OutcomeUnknown."""
        privileges = ("0", "") if authority is None else ("1", authority)
        digests = (stored_digest(old_digest), stored_digest(new_digest))
        arguments: list[Word] = [*digests, sealed, alias_us, *privileges]
        reply = answer_of(await self._session("rotate_id", ref, arguments, write=True))
        what, now = reply[0], int_of(reply[1])
        if what == b"rotated":
            return Rotated(version=int_of(reply[2]), now_us=now)
        if what == b"converged":
            return Converged(sealed=bytes_of(reply[2]), now_us=now)
        return Gone(reason=text_of(reply[2]), now_us=now)

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose time has passed. Raises: StoreUnavailable, OutcomeUnknown."""
        until = self._dispatcher.until()
        reply = answer_of(await self._session("expire_idle", ref, [], write=True, until=until))
        if reply[0] == b"alive":
            return Alive(seen_us=int_of(reply[2]), now_us=int_of(reply[1]))
        if self._options.replicas:
            key = self._key(ref.tag, "s", ref.handle)
            await self._ending("expire_idle", [key], [self._offset()], slot=self._slot(ref.tag), until=until)
        return Gone(reason=text_of(reply[2]), now_us=int_of(reply[1]))

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Revoked:
        """End one session and leave a tombstone. Raises: StoreUnavailable, OutcomeUnknown."""
        until = self._dispatcher.until()
        key, slot = self._key(ref.tag, "s", ref.handle), self._slot(ref.tag)
        arguments: list[Word] = [self._offset(), reason, deny_us, self._log_argument()]
        reply = answer_of(await self._ending("revoke", [key], arguments, slot=slot, until=until))
        await self._tell([ref], int_of(reply[1]), deny_us, until)
        return Revoked(ended=reply[0] == 1, now_us=int_of(reply[1]))

    async def revoke_owner(
        self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None, deny_us: int = 0
    ) -> RevokedMany:
        """End every session of a subject created until now. Raises: StoreUnavailable, OutcomeUnknown."""
        until = self._dispatcher.until()
        keys = [self._owner_key(tag, kind, owner) for kind in ("u", "c", "a")]
        spared = keep.handle if keep is not None and keep.tag == tag else ""
        arguments: list[Word] = [self._offset(), self._sessions_of(tag), owner, reason, spared, deny_us]
        arguments.append(self._log_argument())
        slot = self._slot(tag)
        # The cut is written anew by every call, and stays.
        reply = list_of(
            await self._ending("revoke_owner", keys, arguments, slot=slot, until=until, left=keys[1]), at_least=2
        )
        now, named = int_of(reply[0]), refs_of(tag, reply[2:])
        await self._tell(named, now, deny_us, until)
        return RevokedMany(ended=named[: int_of(reply[1])], now_us=now)

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Raises: ValueRefused on a bad cursor, StoreUnavailable."""
        created, handle = "0", ""
        if after is not None:
            parts = _OWNER_CURSOR.fullmatch(after)
            if parts is None:
                raise ValueRefused("not a cursor of this list")
            created, handle = parts[1], parts[2]
        arguments: list[Word] = [self._offset(), self._sessions_of(tag), created, handle, limit]
        keys = [self._owner_key(tag, "u", owner)]
        reply = list_of(
            await self._run("list_by_owner", keys, arguments, slot=self._slot(tag), write=False), at_least=2
        )
        found: list[Seen] = []
        cursor = None
        for position in range(2, len(reply), 3):
            ref = SessionRef(tag, text_of(reply[position]))
            session = session_of(ref, reply[position + 2])
            if session is not None:
                found.append(Seen(session=session, seen_us=int_of(reply[position + 1])))
                cursor = f"{session.created_us}.{ref.handle}"
        more = reply[1] == 1
        return StoredPage(sessions=tuple(found), cursor=cursor if more else None, now_us=int_of(reply[0]))

    async def scan(self, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of everybody, in the order of the nodes and their tables.

        A page ends when it is full or half the deadline has passed. Raises: ValueRefused on a cursor this store did
        not give, StoreUnavailable.
        """
        until = self._dispatcher.until()
        walk = Walk(self._dispatcher, self._options.namespace, after, until=until)
        found: list[Seen] = []
        now = 0
        while len(found) < limit:
            step = await walk.next(limit - len(found))
            replies = await self._dispatcher.perform(self._steps("look", step), write=False, until=until)
            for each, reply in zip(step.found, replies, strict=True):
                answer = list_of(reply)
                now = int_of(answer[0])
                session = session_of(each.ref, answer[2]) if len(answer) == 3 else None
                if session is not None:
                    found.append(Seen(session=session, seen_us=int_of(answer[1])))
            if walk.cursor is None or walk.late:
                break
        return StoredPage(sessions=tuple(found), cursor=walk.cursor, now_us=now or await self._clock(until))

    async def sweep(self, *, limit: int) -> int:
        """Remove up to `limit` records, tombstones, families and denials whose time is over; returns how many.

        Keys expire by themselves; this also takes sessions and families that have been idle for long, and entries of
        the denylist: at most half of what may be taken, and what the others leave. On a Cluster it tells the denylist
        what a crash kept from it. It goes on where the last call stopped. Raises: StoreUnavailable, OutcomeUnknown.
        """
        until = self._dispatcher.until()
        await self._append([], until)
        share = max(1, limit // 2)
        entries = await self._sweep_log(min(share, limit), until)
        removed = entries + await self._sweep_records(limit - entries, until)
        if entries == share and removed < limit:
            removed += await self._sweep_log(limit - removed, until)
        return removed

    async def _sweep_records(self, limit: int, until: float) -> int:
        removed = looked_at = 0
        # The rest of the lap that an earlier call began, then a lap from the start.
        for start in dict.fromkeys((self._swept, None)):
            walk = Walk(self._dispatcher, self._options.namespace, start, until=until, kinds="sg")
            while removed < limit and looked_at < _SWEPT_PER_CALL and not walk.late:
                step = await walk.next(limit - removed)
                removed += await self._sweep_step(step, limit - removed, until)
                looked_at += step.looked_at
                self._swept = walk.cursor
                if self._swept is None:
                    break
            else:
                return removed
        return removed

    async def _sweep_step(self, step: Step, limit: int, until: float) -> int:
        removed = 0
        owed: list[tuple[SessionRef, int]] = []
        calls = self._steps("sweep", step, limit // max(1, len(step.found)))
        replies = await self._dispatcher.perform(calls, write=True, until=until)
        for each, reply in zip(step.found, replies, strict=True):
            answer = list_of(reply, at_least=2)
            removed += int_of(answer[0])
            if int_of(answer[1]) > 0:
                owed.append((each.ref, int_of(answer[1])))
        if owed:
            await self._settle(owed, until)
        return removed

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room. Raises: StoreUnavailable, OutcomeUnknown."""
        # Rounded up and multiplied again, so that whole microseconds never cost the last attempt of a burst.
        interval = max(1, -(-round(limit.period * SECOND_US) // limit.attempts))
        tag, name = self._limit_key(key)
        arguments = [self._offset(), interval, interval * limit.attempts, cost]
        reply = answer_of(await self._run("hit", [name], arguments, slot=slot_of(tag), write=True))
        return Hit(
            allowed=reply[0] == 1,
            remaining=max(0, int_of(reply[1]) // interval),
            retry_after=int_of(reply[2]) / SECOND_US,
        )

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key. Raises: StoreUnavailable, OutcomeUnknown."""
        tag, name = self._limit_key(key)
        await self._dispatcher.perform([Call(slot=slot_of(tag), words=("DEL", name))], write=True)

    # -- calls of several verbs ----------------------------------------------------------------------------------------

    def _steps(self, name: str, step: Step, *arguments: Word) -> list[Call]:
        calls: list[Call] = []
        for each in step.found:
            key = self._key(each.tag, each.kind, each.name)
            calls.append(self._call(name, [key], [self._offset(), *arguments], slot=self._slot(each.tag)))
        return calls

    async def _read(self, ref: SessionRef, stored: bytes) -> Reply:
        until = self._dispatcher.until()
        key, offset, feeds = self._key(ref.tag, "s", ref.handle), self._offset(), self._feeds
        for feed in feeds:
            reading = feed.gathering(ref.tag, self._scripts["load"].sha, offset, key, stored)
            if reading is not None:
                answer = await reading
                if isinstance(answer, list):
                    return answer
                # Refused or late: the ordinary way brings the script, follows the slot, and says what is wrong.
                break

        def answered(address: Address) -> None:
            for feed in feeds:
                feed.answered(ref, address)

        call = self._call("load", [key], [offset, stored], slot=self._slot(ref.tag))
        (reply,) = await self._dispatcher.perform(
            [call], write=False, until=until, answered=answered if feeds else None
        )
        return reply

    async def _admit(
        self,
        new: NewSession,
        *,
        on_limit: str,
        maximum: int,
        supersedes: str = "",
        choice: Choice | None = None,
        reason: str = REASON_EVICTED,
        deny_us: int = 0,
        until: float | None = None,
        confirm: bool = False,
    ) -> list[Reply]:
        owner = stored_owner(new.owner, new.subject)
        arguments: list[Word] = [stored_digest(new.digest), owner, new.subject]
        arguments += [new.idle_us, new.absolute_us, new.authority]
        if choice is not None:
            on_limit = "choice"
        arguments += [on_limit, maximum, supersedes, deny_us, self._log_argument(), reason]
        arguments += ["", ""] if choice is None else [" ".join(choice.shown), " ".join(choice.ending)]
        for name, text in new.fields.items():
            arguments += (name, text)
        tag, told = new.ref.tag, [self._offset(), *arguments]
        # The index is declared too: while a slot moves, a node that has only one of them must not count the other as
        # empty and let one session too many in.
        keys = [self._key(tag, "s", new.ref.handle), self._owner_key(tag, "u", new.owner)]
        call = self._call("admit", keys, told, slot=self._slot(tag))
        call = replace(call, confirm=keys[0] if confirm else None)
        (answer,) = await self._dispatcher.perform([call], write=True, until=until)
        reply = list_of(answer, at_least=2)
        if reply[0] == b"taken":
            raise StoreUnavailable("redis: a new session met a handle in use: the random source repeats itself")
        return reply

    def _created(self, new: NewSession, reply: list[Reply]) -> tuple[StoredSession, tuple[SessionRef, ...], int]:
        return new.at(int_of(reply[2])), refs_of(new.ref.tag, reply[4:]), int_of(reply[1])


def _unreadable(ref: SessionRef, now_us: int) -> Unreadable:
    return Unreadable(detail=f"the bytes of session {ref.handle} are not a session", now_us=now_us)
