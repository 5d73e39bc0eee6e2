"""Find the session behind an id.

Decides what a loaded record means for this request: alive, ended (and why), replaced, or nothing at all. It never
creates a session and never ends one, except one whose idle timeout the store itself has just confirmed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, assert_never

from coatcheck.core.alias import open_successor
from coatcheck.core.ids import IdKeys, SessionId, SessionRef, sid_of
from coatcheck.core.ports import (
    REASON_SUPERSEDED,
    Absent,
    Activity,
    Aliased,
    Alive,
    Ended,
    Live,
    Loaded,
    SessionStore,
    Unreadable,
)
from coatcheck.core.session import (
    SECOND_US,
    Authority,
    StoredSession,
    cause_of_death,
    decode_authority,
    last_use_us,
    tightened,
)
from coatcheck.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class LifeLimits:
    """Today's limits of a session's life, in microseconds; the stricter of these and the recorded ones count.

    `since_us` is when this node took them up, by the store's clock: what was used shortly before is still in use. 0:
    they have always held.
    """

    idle_us: int
    absolute_us: int
    since_us: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """The session is alive. `id` is the id to go on with: another one than presented if that was rotated.

    `through_outage`: the store is away, and this is what was known when it was last heard of. `wants_proof`: it came
    from a place where it goes on only after somebody has proven himself once more.
    """

    id: SessionId
    session: StoredSession
    authority: Authority
    seen_us: int
    now_us: int
    through_outage: bool = False
    wants_proof: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NotResumed:
    """There is no session to go on with.

    `unknown`: never ours, or long gone. `replaced`: it lives on under another id (`lives_as`, unless a sign-in took
    its place). `ended`: with a reason and a time. `elsewhere`: it lives, and is refused from this place until `at_us`.
    `unavailable`: nobody can say while the store is away.
    """

    why: Literal["unknown", "replaced", "ended", "elsewhere", "unavailable"]
    reason: str = ""
    at_us: int = 0
    lives_as: SessionRef | None = None
    events: tuple[Event, ...] = ()


Resumption: TypeAlias = Resumed | NotResumed


async def resume(
    store: SessionStore,
    keys: IdKeys,
    presented: SessionId,
    *,
    limits: LifeLimits,
    server_key: bytes | None,
    load: Callable[[SessionRef, str], Awaitable[Loaded]] | None = None,
) -> Resumption:
    """Load the session of a checked id. One store command, or two when its idle timeout has just run out, or when it
    may have been used, without a note of it, shortly before a shorter one was taken up.

    `load` instead of the store's own, for whoever wants it read anew. Raises: StoreUnavailable.
    """
    found: Loaded = await (store.load if load is None else load)(presented.ref, presented.digest)
    match found:
        case Live():
            return await _judge(store, keys, presented, found, limits)
        case Aliased():
            successor = (
                None if server_key is None else open_successor(keys, presented, found.sealed, server_key=server_key)
            )
            if successor is None:
                return NotResumed(why="replaced", lives_as=presented.ref)
            live = Live(session=found.session, seen_us=found.seen_us, now_us=found.now_us)
            return await _judge(store, keys, successor, live, limits)
        case Ended():
            if found.reason == REASON_SUPERSEDED:
                # The same browser signed in again; its new cookie is on the way. This is nobody's news.
                return NotResumed(why="replaced")
            return NotResumed(why="ended", reason=found.reason, at_us=found.at_us)
        case Absent():
            if found.why == "replaced":
                event = _event("session_id.replaced", keys, presented, found.now_us)
                return NotResumed(why="replaced", lives_as=presented.ref, events=(event,))
            return NotResumed(why="unknown")
        case Unreadable():
            return _unreadable(keys, presented, found.now_us, found.detail)
        case _:
            assert_never(found)


def open_copy(known: Live, *, limits: LifeLimits) -> tuple[StoredSession, Authority]:
    """The record of a near copy under today's limits, and what it proves."""
    session = tightened(known.session, idle_us=limits.idle_us, absolute_us=limits.absolute_us)
    return session, decode_authority(session.authority)


def reopen(presented: SessionId, known: Live, *, limits: LifeLimits, through_outage: bool = False) -> Resumed:
    """The session of a checked id, as a near copy has it that was found alive and readable."""
    session, authority = open_copy(known, limits=limits)
    return Resumed(
        id=presented,
        session=session,
        authority=authority,
        seen_us=known.seen_us,
        now_us=known.now_us,
        through_outage=through_outage,
    )


async def _judge(store: SessionStore, keys: IdKeys, id_: SessionId, live: Live, limits: LifeLimits) -> Resumption:
    session = tightened(live.session, idle_us=limits.idle_us, absolute_us=limits.absolute_us)
    death = cause_of_death(session, seen_us=live.seen_us, now_us=live.now_us)
    if death == "idle_timeout" and session.idle_us == live.session.idle_us:
        # Activity may have been written since this copy was read: the store looks once more and decides for all.
        looked = await store.expire_idle(id_.ref)
        if isinstance(looked, Alive):
            live = replace(live, seen_us=looked.seen_us, now_us=looked.now_us)
            death = cause_of_death(session, seen_us=live.seen_us, now_us=live.now_us)
    elif death == "idle_timeout" and _was_in_use(live, session, limits):
        # Written at once, so that every node knows and the next judgement rests on what is known.
        await store.touch([Activity(ref=id_.ref, owner=session.owner, seen_us=live.now_us)])
        live, death = replace(live, seen_us=live.now_us), None
    if death is not None:
        at_us = session.absolute_us if death == "absolute_timeout" else live.seen_us + session.idle_us
        return NotResumed(why="ended", reason=death, at_us=at_us)
    try:
        authority = decode_authority(session.authority)
    except ValueError as broken:
        return _unreadable(keys, id_, live.now_us, str(broken))
    return Resumed(id=id_, session=session, authority=authority, seen_us=live.seen_us, now_us=live.now_us)


def _was_in_use(live: Live, session: StoredSession, limits: LifeLimits) -> bool:
    """Whether a session that today's idle timeout would end was alive when that was taken up, for all anybody knows."""
    if cause_of_death(live.session, seen_us=live.seen_us, now_us=live.now_us) is not None:
        return False
    used_us = last_use_us(live.session, seen_us=live.seen_us, since_us=limits.since_us)
    return cause_of_death(session, seen_us=used_us, now_us=live.now_us) is None


def _unreadable(keys: IdKeys, id_: SessionId, now_us: int, detail: str) -> NotResumed:
    event = Event(
        kind="session.record_unreadable",
        at=now_us / SECOND_US,
        sid=sid_of(keys, id_.ref),
        data={"detail": detail[:200]},
    )
    return NotResumed(why="unknown", events=(event,))


def _event(kind: Literal["session_id.replaced"], keys: IdKeys, id_: SessionId, now_us: int) -> Event:
    return Event(kind=kind, at=now_us / SECOND_US, sid=sid_of(keys, id_.ref))
