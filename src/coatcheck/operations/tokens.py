"""Tokens of a session: begin a refresh family, exchange a refresh token.

Decides what each answer of the store means for whoever presented the token, and which token goes out with it. It
never mints an access token itself (`core.access_token` does) and never ends a session, except by the one store command
that has found a consumed token presented again (RFC 9700 s4.14.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

from coatcheck.core.admission import cause_of
from coatcheck.core.ids import IdKeys, SessionRef, sid_of
from coatcheck.core.ports import (
    REASON_REUSED,
    REASON_SUPERSEDED,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Gone,
    TokenStore,
    WrongHolder,
)
from coatcheck.core.refresh_token import (
    Grant,
    NewFamily,
    RefreshToken,
    StoredFamily,
    decode_grant,
    open_next,
    seal_next,
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
from coatcheck.errors import SessionGone
from coatcheck.events import Event
from coatcheck.operations.resume import LifeLimits

Exchange = Literal["rotated", "kept", "replayed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A family was begun; `now_us` is the store's time, from which the access token counts."""

    family: StoredFamily
    session: StoredSession | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refreshed:
    """The exchange was granted. `token` is the refresh token to go on with: the presented one when `how` is `kept`;
    `None` when the client must be left with whatever it has by now."""

    family: StoredFamily
    session: StoredSession
    authority: Authority
    grant: Grant
    token: RefreshToken | None
    how: Exchange
    now_us: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NotRefreshed:
    """The exchange was refused; `reason` and `at_us` belong to `ended`.

    `outlived`: a session that lives on in the store and is over by today's limits. The command that found it has noted
    a use of it; whoever gets this ends it, or the next exchange would find it in use.
    """

    why: Literal["unknown", "wrong_holder", "reused", "ended"]
    reason: str = ""
    at_us: int = 0
    outlived: SessionRef | None = None
    events: tuple[Event, ...] = ()


Refreshal: TypeAlias = Refreshed | NotRefreshed


async def begin_family(store: TokenStore, new: NewFamily) -> Begun:
    """Keep the first token of a new family: one store command. Raises: SessionGone, StoreUnavailable."""
    outcome = await store.create_family(new)
    if isinstance(outcome, Gone):
        raise SessionGone(cause_of(outcome.reason)[0])
    return Begun(family=outcome.family, session=outcome.session, now_us=outcome.now_us)


async def refresh(
    store: TokenStore,
    keys: IdKeys,
    *,
    presented: RefreshToken,
    successor: RefreshToken,
    server_key: bytes,
    nonce: bytes,
    grace_us: int,
    client: str,
    key: str,
    limits: LifeLimits,
    deny_us: int,
) -> Refreshal:
    """Exchange a refresh token whose check is right: one store command, whoever else presents it at this moment.

    Raises: StoreUnavailable; presenting the same token again afterwards is safe.
    """
    outcome = await store.rotate_refresh(
        presented.family,
        generation=presented.generation,
        digest=presented.digest,
        successor=successor.digest,
        sealed=seal_next(presented, successor, server_key=server_key, nonce=nonce),
        grace_us=grace_us,
        client=client,
        key=key,
        deny_us=deny_us,
    )
    match outcome:
        case FamilyRotated():
            return _granted(keys, outcome, successor, "rotated", limits)
        case FamilyKept():
            return _granted(keys, outcome, presented, "kept", limits)
        case FamilyReplayed():
            # Without a sealed successor somebody has used that already: this straggler gets an access token, and the
            # refresh token its browser has by now stays. See docs/decisions/0008.
            sealed = outcome.sealed
            token = None if sealed is None else open_next(keys, presented, sealed, server_key=server_key)
            return _granted(keys, outcome, token, "replayed", limits)
        case FamilyReused():
            return NotRefreshed(why="reused", events=_reused(keys, outcome))
        case FamilyEnded():
            if outcome.reason == REASON_SUPERSEDED:
                # The same browser signed in again; its new token is on the way.
                return NotRefreshed(why="unknown")
            return NotRefreshed(why="ended", reason=outcome.reason, at_us=outcome.at_us)
        case WrongHolder():
            event = Event(kind="refresh.wrong_holder", at=outcome.now_us / SECOND_US, sid=_sid(keys, presented))
            return NotRefreshed(why="wrong_holder", events=(event,))
        case FamilyUnknown():
            return NotRefreshed(why="unknown")
        case _:
            assert_never(outcome)


def _granted(
    keys: IdKeys,
    outcome: FamilyRotated | FamilyKept | FamilyReplayed,
    token: RefreshToken | None,
    how: Exchange,
    limits: LifeLimits,
) -> Refreshal:
    family, now_us = outcome.family, outcome.now_us
    if outcome.session is None:
        # No application of this release begins a family without a session.
        return NotRefreshed(why="unknown")
    session = tightened(outcome.session, idle_us=limits.idle_us, absolute_us=limits.absolute_us)
    # What was used shortly before they were taken up may not have been noted under the longer timeout.
    seen_us = last_use_us(outcome.session, seen_us=outcome.seen_us, since_us=limits.since_us)
    death = cause_of_death(session, seen_us=seen_us, now_us=now_us)
    if death is not None:
        # Today's limits are stricter than those of the sign-in, and they count.
        at_us = session.absolute_us if death == "absolute_timeout" else seen_us + session.idle_us
        return NotRefreshed(why="ended", reason=death, at_us=at_us, outlived=session.ref)
    try:
        authority, grant = decode_authority(session.authority), decode_grant(family.grant)
    except ValueError as broken:
        event = Event(
            kind="session.record_unreadable",
            at=now_us / SECOND_US,
            sid=sid_of(keys, session.ref),
            data={"detail": str(broken)[:200]},
        )
        return NotRefreshed(why="unknown", events=(event,))
    if grant.proofs != authority.proofs:
        # A copy from before the subject proved himself again. Both numbers are of one read, and no session id leads
        # back: whoever begins a family in the same moment with the old id begins a dead one.
        return NotRefreshed(why="unknown")
    event = Event(
        kind="refresh.exchanged",
        at=now_us / SECOND_US,
        sid=sid_of(keys, session.ref),
        subject=session.subject or None,
        data={"how": how},
    )
    return Refreshed(
        family=family,
        session=session,
        authority=authority,
        grant=grant,
        token=token,
        how=how,
        now_us=now_us,
        events=(event,),
    )


def _reused(keys: IdKeys, outcome: FamilyReused) -> tuple[Event, ...]:
    at, family = outcome.now_us / SECOND_US, outcome.family
    of = family.ref.session
    sid = None if of is None else sid_of(keys, of)
    events = [
        Event(
            kind="refresh.reused",
            at=at,
            sid=sid,
            subject=family.subject or None,
            data={"client": family.client, "generation": family.generation},
        )
    ]
    if outcome.session is not None:
        events.append(
            Event(
                kind="session.ended",
                at=at,
                sid=sid_of(keys, outcome.session),
                subject=family.subject or None,
                data={"reason": REASON_REUSED},
            )
        )
    return tuple(events)


def _sid(keys: IdKeys, presented: RefreshToken) -> str | None:
    of = presented.family.session
    return None if of is None else sid_of(keys, of)
