"""Refresh families, the denylist and the key ring in Redis: see `store` for the key layout.

Decides what the token verbs' scripts are given and answer, and how an entry gets into the denylist. The log is one
stream; a position is an id of it, handed out by one server in the order of commits. Ids are times: a follower ahead of
a log that was restored or emptied is told so, and what is added later comes behind its position. (Unless the clock of a
server that took over without the last entries is behind by more than it took: then what it adds until it has caught up
may be missed by whoever had read those entries.) On a single server or under Sentinel the script that ends a session
also appends, so both happen or neither.

On a Cluster the log is in another slot, and no script reaches two. There this process appends, with a second command
before the verb returns. If that command fails the verb raises OutcomeUnknown, though its first step stands: repeating
it appends again. The entries are kept in memory, at most `MOST_OWED`, and go with the next verb that denies, or sweep.
If the process dies between the steps, the tombstone still says until when its session must be on the denylist, and
`sweep` appends it when its walk comes by. (A denied `jti` leaves no tombstone: its caller was never told that it is
denied, and `standing` knows it from the first step on. Nor does a session that was unknown.) An entry may therefore
come twice, which changes nothing.

While a Cluster moves a slot, a command over keys that are not all at one node is refused (TRYAGAIN), and one over an
absent key is refused until the move is over. `standing` and the refresh of a family that stands alone then ask for the
absent key on its own, first, and following ASK: what a denial or a cut adds meanwhile is simultaneous with the verb. A
sealed successor that cannot be put beside its family is put by a second command. What makes new keys beside older ones
cannot be divided without losing atomicity, so it raises StoreUnavailable until the move is over: `create` and `admit`,
the first family of a session, a family that stands alone, and `revoke_owner` where the owner has no cut, index or
family standing alone yet.

An entry must never be removed before its time is over, whoever else's is, and a sealed successor never rest beyond
its grace: it has a key of its own, which the server drops by itself.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Final, get_args

import msgspec

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    REASON_REUSED,
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
    session_denial_id,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily, StoredFamily
from coatcheck.core.session import StoredSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable, ValueRefused
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.calls import Calls, answer_of, bytes_of, int_of, list_of, session_of, text_of
from coatcheck.stores.redis.dispatch import Call, SlotMoves
from coatcheck.stores.redis.driver import Word
from coatcheck.stores.redis.nodes import Reply, slot_of

MOST_OWED: Final = 4096
"""Entries that a process remembers while a Cluster's log is away; of more the oldest are left to `sweep`."""

MAX_RING_OCTETS: Final = 256 * 1024

_POSITION: Final = re.compile(r"(0|[1-9][0-9]{0,19})-(0|[1-9][0-9]{0,19})")
_KINDS: Final = {kind.encode(): kind for kind in get_args(DenialKind)}
_ENTRIES_PER_COMMAND: Final = 256
_LOOKED_AT_PER_COMMAND: Final = 1000
_LOOKED_AT_PER_SWEEP: Final = 10_000


class TokenVerbs(Calls):
    """The verbs of `core.ports.TokenStore`, and what the verbs of sessions need of the denylist."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        super().__init__(url, options)
        self._log = f"{options.namespace}:{{log}}:d"
        self._log_slot = slot_of("log")
        self._spread = self._dispatcher.spread
        # Both ends of a deque may be used by any threads at once.
        self._owed: deque[Denial] = deque(maxlen=MOST_OWED)
        self._log_swept = ""

    async def create_family(self, new: NewFamily) -> FamilyCreated | Gone:
        """Begin a family with its first token. Raises: StoreUnavailable, OutcomeUnknown."""
        ref = new.ref
        keys = self._family_keys(ref)
        if not ref.of_session:
            # Declared, so that a slot that moves cannot hide a cut from the family it precedes.
            keys += [self._owner_key(ref.tag, "c", new.owner), self._owner_key(ref.tag, "a", new.owner)]
        arguments: list[Word] = [self._offset(), ref.name, new.digest, new.owner, new.subject, new.client, new.key]
        arguments += [new.grant, new.idle_us, new.absolute_us, MAX_FAMILIES]
        reply = answer_of(await self._run("create_family", keys, arguments, slot=self._slot(ref.tag), write=True))
        what, now = reply[0], int_of(reply[1])
        if what == b"gone":
            return Gone(reason=text_of(reply[2]), now_us=now)
        family = _family(ref, reply[2]) if what == b"created" else None
        if family is None:
            raise StoreUnavailable(
                "redis: a new family met a name in use: it was begun before and has moved on or ended, or the random "
                "source repeats itself"
            )
        session = _session_with(ref, reply[3])
        if session is None and ref.of_session:
            return Gone(reason="unreadable", now_us=now)
        return FamilyCreated(family=family, session=session, now_us=now)

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
        """Exchange a refresh token: one script, on a Cluster a second command after reuse, more while a slot moves.

        Raises: StoreUnavailable, OutcomeUnknown.
        """
        until = self._dispatcher.until()
        arguments: list[Word] = [self._offset(), ref.name, generation, digest, successor, sealed, grace_us]
        arguments += [client, key, deny_us, self._log_argument()]
        reply = answer_of(await self._refresh(ref, arguments, until))
        # A repeated call finds it ended by the first, which may have been refused for want of a replica.
        ends = reply[0] == b"reused" or (reply[0] == b"ended" and reply[2] == REASON_REUSED.encode())
        if ends and self._options.replicas:
            # What ended something is repeated, changes nothing more, and is confirmed then; others wait for nobody.
            await self._refresh(ref, arguments, until, confirm=True)
        what, now = reply[0], int_of(reply[1])
        if what == b"ended":
            return FamilyEnded(reason=text_of(reply[2]), at_us=min(now, int_of(reply[3])), now_us=now)
        if what == b"holder":
            return WrongHolder(now_us=now)
        if what == b"unknown":
            return FamilyUnknown(now_us=now)
        ended = ref.session if what == b"reused" and reply[3] == 1 else None
        if ended is not None:
            await self._tell([ended], now, deny_us, until)
        family = _family(ref, reply[2])
        if family is None:
            return FamilyUnknown(now_us=now)
        if what == b"reused":
            return FamilyReused(family=family, session=ended, now_us=now)
        session, seen = _session_with(ref, reply[4]), int_of(reply[3])
        if session is None and ref.of_session:
            return FamilyUnknown(now_us=now)
        if what == b"rotated":
            if reply[5] == 1:
                await self._put_sealed(ref, sealed, grace_us, until)
            return FamilyRotated(family=family, session=session, seen_us=seen, now_us=now)
        if what == b"kept":
            return FamilyKept(family=family, session=session, seen_us=seen, now_us=now)
        hidden = await self._sealed(ref, until) if reply[5] == 1 else reply[5]
        hidden = None if hidden is None else bytes_of(hidden)
        return FamilyReplayed(family=family, session=session, seen_us=seen, sealed=hidden, now_us=now)

    async def standing(self, ref: SessionRef, jti: str) -> Standing:
        """Whether an access token of this session may still be accepted. Raises: StoreUnavailable."""
        until, slot = self._dispatcher.until(), self._slot(ref.tag)
        session, denied = self._key(ref.tag, "s", ref.handle), self._token_key(ref.tag, jti)
        whole = self._call("standing", [session, denied], [self._offset()], slot=slot, divisible=self._spread)
        try:
            (answer,) = await self._dispatcher.perform([whole], write=False, until=until)
        except SlotMoves:
            # The denial first: a session that is alive after it was so before, so both are true at that moment.
            denial = await self._at_its_place(ref.tag, ("GET", denied), until)
            told: list[Word] = [self._offset()] if denial is None else [self._offset(), bytes_of(denial)]
            answer = await self._run("standing", [session], told, slot=slot, write=False, until=until)
        reply = list_of(answer, at_least=3)
        return Standing(why=text_of(reply[1]) or None, at_us=int_of(reply[2]), now_us=int_of(reply[0]))

    async def deny(self, tag: int, denial: Denial) -> None:
        """Put one entry on the denylist. Raises: StoreUnavailable, OutcomeUnknown."""
        until = self._dispatcher.until()
        of_token = denial.kind == "jti"
        if of_token or not self._spread:
            key: Word = self._token_key(tag, denial.id) if of_token else self._log
            slot = self._slot(tag) if of_token else self._log_slot
            arguments: list[Word] = [self._offset(), self._log_argument(), *_words(denial)]
            await self._ending("deny", [key], arguments, slot=slot, until=until)
        await self._append([denial], until)

    async def denials(self, *, after: str | None, limit: int) -> DenialPage | PositionLost:
        """The denylist in the order of commits. Raises: StoreUnavailable."""
        start = "" if after is None else after if _POSITION.fullmatch(after) else "lost"
        arguments: list[Word] = [self._offset(), start, limit]
        reply = answer_of(await self._run("denials", [self._log], arguments, slot=self._log_slot, write=False))
        now = int_of(reply[1])
        if reply[0] == b"lost":
            return PositionLost(now_us=now)
        told = list_of(reply[4:-4], at_least=0)
        entries = [_denial(told[place : place + 4]) for place in range(0, len(told), 4)]
        return DenialPage(
            entries=tuple(entry for entry in entries if entry is not None),
            position=text_of(reply[3]),
            more=reply[2] == 1,
            now_us=now,
        )

    async def read_ring(self) -> tuple[int, bytes] | None:
        """The sealed key ring with its version. Raises: StoreUnavailable, also when what is stored is no ring."""
        key = self._ring_key()
        words = ("HMGET", key, "version", "packed")
        (reply,) = await self._dispatcher.perform([Call(slot=slot_of(key), words=words)], write=False)
        version, packed = list_of(reply, at_least=2)[:2]
        if version is None and packed is None:
            return None
        if not isinstance(version, bytes) or not version.isdigit() or not isinstance(packed, bytes):
            # Never replaced: whoever holds the key of the ring may still be able to mend it.
            raise StoreUnavailable(f"redis: {key} does not hold a key ring")
        return int(version), packed

    async def write_ring(self, packed: bytes, *, expected: int) -> bool:
        """Replace the ring if it is still at `expected`. Raises: ValueRefused, StoreUnavailable, OutcomeUnknown."""
        if len(packed) > MAX_RING_OCTETS:
            raise ValueRefused(f"the key ring is larger than {MAX_RING_OCTETS} octets")
        key = self._ring_key()
        return await self._run("write_ring", [key], [packed, expected], slot=slot_of(key), write=True) == 1

    # -- what replicas have to confirm ---------------------------------------------------------------------------------

    async def _ending(
        self,
        name: str,
        keys: Sequence[Word],
        arguments: Sequence[Word],
        *,
        slot: int,
        until: float,
        left: Word | None = None,
    ) -> Reply:
        """Run a script that ends something, and have the replicas confirm it; `left` is the key that tells of the end.

        Raises: StoreUnavailable, OutcomeUnknown (also when too few of them did).
        """
        call = replace(self._call(name, keys, arguments, slot=slot), confirm=keys[0] if left is None else left)
        (reply,) = await self._dispatcher.perform([call], write=True, until=until)
        return reply

    # -- a slot on its way ---------------------------------------------------------------------------------------------

    async def _at_its_place(self, tag: int, words: tuple[Word, ...], until: float, *, write: bool = False) -> Reply:
        """A command over one key, which is found wherever the slot is on its way."""
        call = Call(slot=self._slot(tag), words=words)
        (reply,) = await self._dispatcher.perform([call], write=write, until=until)
        return reply

    async def _refresh(self, ref: FamilyRef, arguments: list[Word], until: float, *, confirm: bool = False) -> Reply:
        keys, slot = self._family_keys(ref), self._slot(ref.tag)
        divisible = self._spread and not ref.of_session
        whole = self._call("rotate_refresh", keys, arguments, slot=slot, divisible=divisible)
        whole = replace(whole, confirm=keys[0] if confirm else None)
        try:
            (reply,) = await self._dispatcher.perform([whole], write=True, until=until)
        except SlotMoves:
            # Where the family is now, a cut that is elsewhere would look like none. Whose it is never changes.
            stored = await self._at_its_place(ref.tag, ("HGET", keys[0], ref.name), until)
            family = None if stored is None else _family(ref, stored)
            cut = None
            if family is not None and family.owner:
                cut = await self._at_its_place(ref.tag, ("GET", self._owner_key(ref.tag, "c", family.owner)), until)
            told = [*arguments, b"" if cut is None else bytes_of(cut)]
            whole = self._call("rotate_refresh", keys, told, slot=slot)
            whole = replace(whole, confirm=keys[0] if confirm else None)
            (reply,) = await self._dispatcher.perform([whole], write=True, until=until)
        return reply

    async def _put_sealed(self, ref: FamilyRef, sealed: bytes, grace_us: int, until: float) -> None:
        """The second step of a rotation whose slot takes no new keys where the family is. Raises: OutcomeUnknown."""
        words: tuple[Word, ...] = ("SET", self._sealed_key(ref), sealed, "PX", -(-grace_us // 1000))
        try:
            await self._at_its_place(ref.tag, words, until, write=True)
        except StoreUnavailable as error:
            raise OutcomeUnknown("redis: rotated, but the sealed successor could not be put") from error

    async def _sealed(self, ref: FamilyRef, until: float) -> Reply:
        if not self._spread:
            return None
        return await self._at_its_place(ref.tag, ("GET", self._sealed_key(ref)), until)

    # -- the denylist --------------------------------------------------------------------------------------------------

    def _log_argument(self) -> str:
        """What a script is told about the log: nothing where it is out of its reach."""
        return "" if self._spread else self._log

    async def _tell(self, ended: Sequence[SessionRef], now_us: int, deny_us: int, until: float) -> None:
        """The second step of a verb that denied sessions. Raises: OutcomeUnknown."""
        if deny_us > 0:
            until_us = now_us + deny_us
            await self._append(
                [Denial(kind="sid", id=session_denial_id(ref), until_us=until_us) for ref in ended], until
            )

    async def _append(self, entries: Sequence[Denial], until: float) -> None:
        """On a Cluster: append entries, and before them those that are still owed. Raises: OutcomeUnknown."""
        if not self._spread:
            return
        batch: list[Denial] = []
        while self._owed:
            try:
                batch.append(self._owed.popleft())
            except IndexError:
                break
        batch += entries
        calls: list[Call] = []
        for start in range(0, len(batch), _ENTRIES_PER_COMMAND):
            arguments: list[Word] = [self._offset()]
            for denial in batch[start : start + _ENTRIES_PER_COMMAND]:
                arguments += _words(denial)
            call = self._call("announce", [self._log], arguments, slot=self._log_slot)
            calls.append(replace(call, confirm=self._log))
        try:
            if calls:
                await self._dispatcher.perform(calls, write=True, until=until)
        except BaseException as error:
            self._owed.extend(batch)
            if isinstance(error, StoreUnavailable):
                raise OutcomeUnknown("redis: done, but the denylist could not be told") from error
            raise

    async def _sweep_log(self, limit: int, until: float) -> int:
        """Remove up to `limit` entries whose time is over, those behind longer-lived ones too; returns how many."""
        removed = looked_at = 0
        # The rest of the lap that an earlier call began, then a lap from the start.
        for start in dict.fromkeys((self._log_swept, "")):
            self._log_swept = start
            while removed < limit and looked_at < _LOOKED_AT_PER_SWEEP:
                arguments: list[Word] = [self._offset(), self._log_swept, _LOOKED_AT_PER_COMMAND, limit - removed]
                reply = list_of(
                    await self._run("trim", [self._log], arguments, slot=self._log_slot, write=True, until=until),
                    at_least=3,
                )
                removed, looked_at = removed + int_of(reply[0]), looked_at + int_of(reply[2])
                self._log_swept = text_of(reply[1])
                if not self._log_swept:
                    break
            else:
                return removed
        return removed

    async def _settle(self, ended: Sequence[tuple[SessionRef, int]], until: float) -> None:
        """Append what tombstones say is owed, each until its time, and note on them that it is done."""
        entries = [Denial(kind="sid", id=session_denial_id(ref), until_us=until_us) for ref, until_us in ended]
        await self._append(entries, until)
        calls = [
            self._call(
                "settle", [self._key(ref.tag, "s", ref.handle)], [self._offset(), until_us], slot=self._slot(ref.tag)
            )
            for ref, until_us in ended
        ]
        await self._dispatcher.perform(calls, write=True, until=until)

    # -- keys ----------------------------------------------------------------------------------------------------------

    def _family_keys(self, ref: FamilyRef) -> list[Word]:
        if ref.of_session:
            return [self._key(ref.tag, "s", ref.root), self._key(ref.tag, "f", ref.root)]
        return [self._key(ref.tag, "g", ref.root)]

    def _sealed_key(self, ref: FamilyRef) -> str:
        return self._key(ref.tag, "n", f"{ref.root}:{ref.name}")

    def _token_key(self, tag: int, jti: str) -> bytes:
        return _octets(self._key(tag, "j", jti))

    def _ring_key(self) -> str:
        return f"{self._options.namespace}:ring"


class _FamilyRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A stored family as the scripts pack it; what follows is the scripts' own."""

    schema: int
    generation: int
    digest: str
    owner: str
    subject: str
    client: str
    key: str
    grant: str
    created_us: int
    rotated_us: int
    idle_us: int
    absolute_us: int


_decoder: Final = msgspec.msgpack.Decoder(_FamilyRecord)


def _family(ref: FamilyRef, packed: Reply) -> StoredFamily | None:
    """The family, or `None` for bytes that the scripts took for one and that are none (text that is not UTF-8)."""
    try:
        record = _decoder.decode(bytes_of(packed))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return StoredFamily(
        ref=ref,
        generation=record.generation,
        digest=record.digest,
        owner=record.owner,
        subject=record.subject,
        client=record.client,
        key=record.key,
        grant=record.grant,
        created_us=record.created_us,
        rotated_us=record.rotated_us,
        idle_us=record.idle_us,
        absolute_us=record.absolute_us,
    )


def _session_with(ref: FamilyRef, packed: Reply) -> StoredSession | None:
    return None if ref.session is None else session_of(ref.session, packed)


def _words(denial: Denial) -> tuple[Word, ...]:
    return denial.kind, _octets(denial.id), denial.until_us, denial.not_before_us


def _denial(told: Sequence[Reply]) -> Denial | None:
    """An entry of the log, or `None` for one of a newer release or of another hand."""
    match told:
        case [bytes(kind), bytes(name), bytes(until_us), bytes(before_us)] if (
            kind in _KINDS and until_us.isdigit() and before_us.isdigit()
        ):
            return Denial(
                kind=_KINDS[kind],
                id=name.decode("utf-8", "surrogatepass"),
                until_us=int(until_us),
                not_before_us=int(before_us),
            )
        case _:
            return None


def _octets(text: str) -> bytes:
    # Half a character that came in through JSON must not turn a denial into an error.
    return text.encode("utf-8", "surrogatepass")
