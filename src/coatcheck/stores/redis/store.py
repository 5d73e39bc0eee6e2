"""Sessions and rate limits in Redis 6.2+ or Valkey 8+: one server, Sentinel or Cluster.

Decides the key layout and what each verb's script is given and answers; the rules inside a verb stand in `lua/`. All
keys of one subject carry one hash tag, so a script is atomic on a Cluster too. Layout (schema 1):

    <namespace>:{<tag>}:s:<handle>   record or tombstone, one value packed by cmsgpack:
        [1, version, digest, owner, subject, created, auth, idle, absolute, authority, [name, text, ...],
         [handles that gave way at sign-in]]; members that a newer release appends survive a commit;
        [1, "ended", reason, at, until, digest, created]
    <namespace>:{<tag>}:u:<owner>    sorted set: member = handle, score = last activity (anonymous: owner is empty)
    <namespace>:{<tag>}:c:<owner>    the latest revoke_owner: [time, reason, handle that was kept or ""]
    <namespace>:{<tag>}:r:<handle>   alias of the last rotation: [old digest, sealed successor, until]
    <namespace>:{l:<hash>}:l         rate limit: the time at which it is full again, as decimal text
    <namespace>:keys                 the keys of ids

The tag is four hexadecimal digits; times are Unix microseconds. Expiry of keys only cleans up: deadlines are stored
and compared. A record or tombstone goes two minutes after its last moment, an index after the last of its sessions.
It must never touch a session's key for activity (every near copy would be thrown away), never read from a replica,
and use no KEYS, and SCAN in `scan` and `sweep` alone. While a Cluster moves a slot key by key, a script may find a
record and miss its index: sessions of that slot can look idle too early until the move is over.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Final

import msgspec

from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.ports import (
    Absent,
    Activity,
    Admitted,
    Aliased,
    Alive,
    Changes,
    Colour,
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
from coatcheck.stores.redis.dispatch import Call, Dispatcher, Script
from coatcheck.stores.redis.driver import Word
from coatcheck.stores.redis.nodes import Reply, slot_of
from coatcheck.stores.redis.walk import Step, Walk

SCRIPTS: Final = (
    "admit",
    "commit",
    "expire_idle",
    "hit",
    "id_keys",
    "list_by_owner",
    "load",
    "look",
    "revoke",
    "revoke_owner",
    "rotate_id",
    "sweep",
    "touch",
)
# These two know nothing of sessions and run without the prelude.
_BARE: Final = frozenset({"hit", "id_keys"})

_OWNER_CURSOR: Final = re.compile(r"([0-9]{1,16})\.([A-Za-z0-9_-]{16})")
_TOUCHES_PER_COMMAND: Final = 64
# A sweep continues where the last one stopped, so that the largest store is never walked in one go.
_SWEPT_PER_CALL: Final = 10_000


class RedisStore:
    """Sessions and rate limits behind a Redis protocol. See `core.ports` for what each verb promises."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._options = options
        self._dispatcher = Dispatcher(url, options)
        self._scripts = _scripts()
        self._swept: str | None = None

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
        await self._dispatcher.close()

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

    def peek(self, ref: SessionRef, digest: str) -> Live | None:
        """Always `None`: this store keeps no near copy."""
        return None

    async def create(self, new: NewSession) -> Created:
        """Write a session that must be new. Raises: StoreUnavailable, OutcomeUnknown."""
        session, _, now = self._created(new, await self._admit(new, on_limit="create", maximum=0))
        return Created(session=session, now_us=now)

    async def admit(
        self, new: NewSession, *, maximum: int, on_limit: OnLimit, supersedes: SessionRef | None = None
    ) -> Admitted | LimitReached:
        """Create under a limit, exactly. Raises: StoreUnavailable, OutcomeUnknown."""
        # A session of the same owner has the same tag; any other is in another slot and not ours to end here.
        older = supersedes.handle if supersedes is not None and supersedes.tag == new.ref.tag else ""
        reply = await self._admit(new, on_limit=on_limit, maximum=maximum, supersedes=older)
        if reply[0] == b"limit":
            return LimitReached(alive=_refs(new.ref.tag, reply[2:]), now_us=_int(reply[1]))
        session, evicted, now = self._created(new, reply)
        return Admitted(session=session, evicted=evicted, now_us=now)

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        """Read the session, its last activity and its tombstone in one command. Raises: StoreUnavailable."""
        reply = _answer(await self._session("load", ref, [digest], write=False))
        what, now = reply[0], _int(reply[1])
        if what == b"absent":
            return Absent(why="replaced" if reply[2] == b"replaced" else "unknown", now_us=now)
        if what == b"ended":
            return Ended(reason=_text(reply[2]), at_us=_int(reply[3]), now_us=now)
        if what == b"broken":
            return Unreadable(detail=f"the bytes of session {ref.handle} are not a session", now_us=now)
        session = _decode(ref, reply[3])
        if session is None:
            return Unreadable(detail=f"the bytes of session {ref.handle} are not a session", now_us=now)
        if what == b"aliased":
            return Aliased(session=session, seen_us=_int(reply[2]), now_us=now, sealed=_bytes(reply[4]))
        return Live(session=session, seen_us=_int(reply[2]), now_us=now)

    async def commit(
        self, ref: SessionRef, changes: Changes, *, limits: RecordLimits, expected: int | None = None
    ) -> Committed | Conflict | Oversized | Gone:
        """Merge fields into an alive record. Raises: StoreUnavailable, OutcomeUnknown."""
        arguments: list[Word] = ["" if expected is None else expected, limits.octets, limits.fields, len(changes.put)]
        for name, text in changes.put.items():
            arguments += (name, text)
        arguments += sorted(changes.delete)
        reply = _answer(await self._session("commit", ref, arguments, write=True))
        what, now = reply[0], _int(reply[1])
        if what == b"committed":
            return Committed(version=_int(reply[2]), now_us=now)
        if what == b"conflict":
            return Conflict(version=_int(reply[2]), now_us=now)
        if what == b"oversized":
            return Oversized(now_us=now)
        return Gone(reason=_text(reply[2]), now_us=now)

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
        arguments: list[Word] = [old_digest, new_digest, sealed, alias_us, *privileges]
        reply = _answer(await self._session("rotate_id", ref, arguments, write=True))
        what, now = reply[0], _int(reply[1])
        if what == b"rotated":
            return Rotated(version=_int(reply[2]), now_us=now)
        if what == b"converged":
            return Converged(sealed=_bytes(reply[2]), now_us=now)
        return Gone(reason=_text(reply[2]), now_us=now)

    async def expire_idle(self, ref: SessionRef) -> Alive | Gone:
        """End a session whose time has passed. Raises: StoreUnavailable, OutcomeUnknown."""
        reply = _answer(await self._session("expire_idle", ref, [], write=True))
        if reply[0] == b"alive":
            return Alive(seen_us=_int(reply[2]), now_us=_int(reply[1]))
        return Gone(reason=_text(reply[2]), now_us=_int(reply[1]))

    async def revoke(self, ref: SessionRef, *, reason: str) -> Revoked:
        """End one session and leave a tombstone. Raises: StoreUnavailable, OutcomeUnknown."""
        reply = _answer(await self._session("revoke", ref, [reason], write=True))
        return Revoked(ended=reply[0] == 1, now_us=_int(reply[1]))

    async def revoke_owner(self, tag: int, owner: str, *, reason: str, keep: SessionRef | None = None) -> RevokedMany:
        """End every session of a subject created until now. Raises: StoreUnavailable, OutcomeUnknown."""
        keys = [self._key(tag, "u", owner), self._key(tag, "c", owner)]
        spared = keep.handle if keep is not None and keep.tag == tag else ""
        arguments: list[Word] = [self._offset(), self._prefix(tag), owner, reason, spared]
        reply = _list(await self._run("revoke_owner", keys, arguments, slot=self._slot(tag), write=True))
        return RevokedMany(ended=_refs(tag, reply[1:]), now_us=_int(reply[0]))

    async def list_by_owner(self, tag: int, owner: str, *, after: str | None, limit: int) -> StoredPage:
        """Alive sessions of a subject, oldest first. Raises: ValueRefused on a bad cursor, StoreUnavailable."""
        created, handle = "0", ""
        if after is not None:
            parts = _OWNER_CURSOR.fullmatch(after)
            if parts is None:
                raise ValueRefused("not a cursor of this list")
            created, handle = parts[1], parts[2]
        arguments: list[Word] = [self._offset(), self._prefix(tag), created, handle, limit]
        keys = [self._key(tag, "u", owner)]
        reply = _list(await self._run("list_by_owner", keys, arguments, slot=self._slot(tag), write=False), at_least=2)
        found: list[Seen] = []
        cursor = None
        for position in range(2, len(reply), 3):
            ref = SessionRef(tag, _text(reply[position]))
            session = _decode(ref, reply[position + 2])
            if session is not None:
                found.append(Seen(session=session, seen_us=_int(reply[position + 1])))
                cursor = f"{session.created_us}.{ref.handle}"
        more = reply[1] == 1
        return StoredPage(sessions=tuple(found), cursor=cursor if more else None, now_us=_int(reply[0]))

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
            for ref, reply in zip(step.refs, replies, strict=True):
                answer = _list(reply)
                now = _int(answer[0])
                session = _decode(ref, answer[2]) if len(answer) == 3 else None
                if session is not None:
                    found.append(Seen(session=session, seen_us=_int(answer[1])))
            if walk.cursor is None or walk.late:
                break
        return StoredPage(sessions=tuple(found), cursor=walk.cursor, now_us=now or await self._clock(until))

    async def sweep(self, *, limit: int) -> int:
        """Remove up to `limit` records and tombstones that no longer decide anything; returns how many.

        Keys expire by themselves; this also takes sessions that have been idle for long. It goes on where the last
        call stopped. Raises: StoreUnavailable, OutcomeUnknown.
        """
        until = self._dispatcher.until()
        removed = looked_at = 0
        # The rest of the lap that an earlier call began, then a lap from the start.
        for start in dict.fromkeys((self._swept, None)):
            walk = Walk(self._dispatcher, self._options.namespace, start, until=until)
            while removed < limit and looked_at < _SWEPT_PER_CALL and not walk.late:
                step = await walk.next(limit - removed)
                replies = await self._dispatcher.perform(self._steps("sweep", step), write=True, until=until)
                removed += sum(reply == 1 for reply in replies)
                looked_at += step.looked_at
                self._swept = walk.cursor
                if self._swept is None:
                    break
            else:
                return removed
        return removed

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        """Take `cost` attempts if there is room. Raises: StoreUnavailable, OutcomeUnknown."""
        # Rounded up and multiplied again, so that whole microseconds never cost the last attempt of a burst.
        interval = max(1, -(-round(limit.period * SECOND_US) // limit.attempts))
        tag, name = self._limit_key(key)
        arguments = [self._offset(), interval, interval * limit.attempts, cost]
        reply = _answer(await self._run("hit", [name], arguments, slot=slot_of(tag), write=True))
        return Hit(
            allowed=reply[0] == 1, remaining=max(0, _int(reply[1]) // interval), retry_after=_int(reply[2]) / SECOND_US
        )

    async def clear(self, key: str) -> None:
        """Forget the attempts under this key. Raises: StoreUnavailable, OutcomeUnknown."""
        tag, name = self._limit_key(key)
        await self._dispatcher.perform([Call(slot=slot_of(tag), words=("DEL", name))], write=True)

    # -- keys, clock and calls -------------------------------------------------------------------------------------

    def _prefix(self, tag: int) -> str:
        return f"{self._options.namespace}:{{{tag:04x}}}:"

    def _key(self, tag: int, kind: str, name: str) -> str:
        return f"{self._prefix(tag)}{kind}:{name}"

    def _slot(self, tag: int) -> int:
        return slot_of(f"{tag:04x}")

    def _limit_key(self, key: str) -> tuple[str, str]:
        # Hashed: a caller's text must not choose a slot, end a hash tag or grow a key.
        tag = f"l:{sha256_text(key.encode('utf-8', 'surrogatepass'))[:22]}"
        return tag, f"{self._options.namespace}:{{{tag}}}:l"

    def _offset(self) -> int:
        return self._options.clock_offset_us()

    def _time(self, reply: Reply) -> int:
        seconds, microseconds, *_ = _list(reply, at_least=2)
        return int(_bytes(seconds)) * SECOND_US + int(_bytes(microseconds)) + self._offset()

    def _call(self, name: str, keys: Sequence[str], arguments: Sequence[Word], *, slot: int) -> Call:
        script = self._scripts[name]
        return Call(slot=slot, words=("EVALSHA", script.sha, len(keys), *keys, *arguments), script=script)

    async def _run(self, name: str, keys: Sequence[str], arguments: Sequence[Word], *, slot: int, write: bool) -> Reply:
        (reply,) = await self._dispatcher.perform([self._call(name, keys, arguments, slot=slot)], write=write)
        return reply

    async def _session(self, name: str, ref: SessionRef, arguments: Sequence[Word], *, write: bool) -> Reply:
        key = self._key(ref.tag, "s", ref.handle)
        return await self._run(name, [key], [self._offset(), *arguments], slot=self._slot(ref.tag), write=write)

    def _steps(self, name: str, step: Step) -> list[Call]:
        return [
            self._call(name, [self._key(ref.tag, "s", ref.handle)], [self._offset()], slot=self._slot(ref.tag))
            for ref in step.refs
        ]

    async def _admit(self, new: NewSession, *, on_limit: str, maximum: int, supersedes: str = "") -> list[Reply]:
        arguments: list[Word] = [new.digest, new.owner, new.subject, new.idle_us, new.absolute_us, new.authority]
        arguments += [on_limit, maximum, supersedes]
        for name, text in new.fields.items():
            arguments += (name, text)
        tag = new.ref.tag
        # The index is declared too: while a slot moves, a node that has only one of them must not count the other as
        # empty and let one session too many in.
        keys = [self._key(tag, "s", new.ref.handle), self._key(tag, "u", new.owner)]
        reply = _list(
            await self._run("admit", keys, [self._offset(), *arguments], slot=self._slot(tag), write=True), at_least=2
        )
        if reply[0] == b"taken":
            raise StoreUnavailable("redis: a new session met a handle in use: the random source repeats itself")
        return reply

    def _created(self, new: NewSession, reply: list[Reply]) -> tuple[StoredSession, tuple[SessionRef, ...], int]:
        return new.at(_int(reply[2])), _refs(new.ref.tag, reply[3:]), _int(reply[1])


class _Record(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A stored record as the scripts pack it; members behind the last one belong to a newer release."""

    schema: int
    version: int
    digest: str
    owner: str
    subject: str
    created_us: int
    auth_us: int
    idle_us: int
    absolute_us: int
    authority: str
    fields: list[str]


_decoder: Final = msgspec.msgpack.Decoder(_Record)


def _decode(ref: SessionRef, packed: Reply) -> StoredSession | None:
    """The session, or `None` for bytes that the scripts took for one and that are none (text that is not UTF-8)."""
    try:
        record = _decoder.decode(_bytes(packed))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return StoredSession(
        schema=record.schema,
        version=record.version,
        ref=ref,
        digest=record.digest,
        owner=record.owner,
        subject=record.subject,
        created_us=record.created_us,
        auth_us=record.auth_us,
        idle_us=record.idle_us,
        absolute_us=record.absolute_us,
        authority=record.authority,
        fields=dict(zip(record.fields[::2], record.fields[1::2], strict=True)),
    )


@cache
def _scripts() -> dict[str, Script]:
    folder = files("coatcheck.stores.redis").joinpath("lua")
    prelude = folder.joinpath("prelude.lua").read_text("utf-8")
    scripts: dict[str, Script] = {}
    for name in SCRIPTS:
        source = folder.joinpath(f"{name}.lua").read_text("utf-8")
        source = source if name in _BARE else prelude + source
        # The name by which Redis knows a script; nothing rests on its strength.
        sha = hashlib.sha1(source.encode("utf-8"), usedforsecurity=False).hexdigest()
        scripts[name] = Script(source, sha)
    return scripts


# What scripts answer is fixed; anything else comes from something that is not Redis and ends the verb.


def _list(reply: Reply, at_least: int = 1) -> list[Reply]:
    if not isinstance(reply, list) or len(reply) < at_least:
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def _answer(reply: Reply) -> list[Reply]:
    """An answer whose first member tells which; up to five, what is missing is `None` and fails where it is read."""
    return [*_list(reply), None, None, None, None]


def _int(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def _bytes(reply: Reply) -> bytes:
    if not isinstance(reply, bytes):
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def _text(reply: Reply) -> str:
    return _bytes(reply).decode("utf-8", "replace")


def _refs(tag: int, handles: Sequence[Reply]) -> tuple[SessionRef, ...]:
    return tuple(SessionRef(tag, _text(handle)) for handle in handles)
