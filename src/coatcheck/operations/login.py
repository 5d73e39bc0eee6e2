"""Sign in: a new session takes the place of whatever the browser carried.

Decides the order of the two commands of a sign-in, and what is undone when the second one fails. The new session
always has a new id and a new handle, so an id that was known before sign-in never leads to it (session fixation). It
must never be called before every factor has been checked.
"""

from __future__ import annotations

from dataclasses import dataclass

from coatcheck.core.admission import reason_of_eviction
from coatcheck.core.ids import IdKeys, SessionId, SessionRef, sid_of
from coatcheck.core.ports import REASON_EVICTED, REASON_SUPERSEDED, Choice, LimitReached, OnLimit, SessionStore
from coatcheck.core.session import SECOND_US, NewSession, StoredSession
from coatcheck.errors import StoreUnavailable
from coatcheck.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class OldSession:
    """What the browser carried before. `owner` is empty for an anonymous session."""

    ref: SessionRef
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """The new session and its id; the old one is over."""

    id: SessionId
    session: StoredSession
    now_us: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SignInRefused:
    """The limit of sessions says no (or: ask). Nothing was written, the old session is untouched."""

    sids: tuple[str, ...]
    events: tuple[Event, ...]


async def login(
    store: SessionStore,
    keys: IdKeys,
    *,
    id_: SessionId,
    new: NewSession,
    old: OldSession | None,
    maximum: int,
    on_limit: OnLimit,
    replaces: SessionRef | None = None,
    choice: Choice | None = None,
    network: str | None = None,
    device: str | None = None,
    country: str | None = None,
    deny_us: int = 0,
) -> SignedIn | SignInRefused:
    """Create the signed-in session and supersede the old one: one store command, or two across owners.

    Exact under concurrency: `admit` never lets more than `maximum` sessions of the subject live. Raises:
    StoreUnavailable (when a signed-in old session could not be ended, the new one is revoked first); OutcomeUnknown
    when nobody knows whether the new session exists: the caller revokes it later. `replaces` is an older session of the
    subject in the same browser, where `old` is none. `choice`: see `admit`. `network` is where this sign-in comes from,
    for whoever gives way; `device` and `country` go beside it into the event. `deny_us` is how long access tokens of
    the sessions that give way must be denied.
    """
    same_owner = old is not None and old.owner == new.owner
    if replaces is not None and replaces.tag != new.ref.tag:
        replaces = None
    admitted = await store.admit(
        new,
        maximum=maximum,
        on_limit=on_limit,
        supersedes=old.ref if old is not None and same_owner else replaces,
        choice=choice,
        reason=reason_of_eviction(network),
        deny_us=deny_us,
    )
    if isinstance(admitted, LimitReached):
        sids = tuple(sid_of(keys, ref) for ref in admitted.alive)
        refused = Event(
            kind="session.limit_reached",
            at=admitted.now_us / SECOND_US,
            subject=new.subject,
            data={"alive": len(sids)},
        )
        return SignInRefused(sids=sids, events=(refused,))
    if old is not None and not same_owner:
        await _supersede(store, old, admitted.session.ref, deny_us=deny_us)
    at = admitted.now_us / SECOND_US
    data = {"reason": REASON_EVICTED} if network is None else {"reason": REASON_EVICTED, "network": network}
    events = [
        Event(
            kind="session.ended",
            at=at,
            sid=sid_of(keys, ref),
            subject=new.subject,
            data=data,
        )
        for ref in admitted.evicted
    ]
    # What a rule about risk has to know to judge it later (`coatcheck risk replay`).
    place = {"network": network, "device": device, "country": country}
    events.append(
        Event(
            kind="session.signed_in",
            at=at,
            sid=sid_of(keys, new.ref),
            subject=new.subject,
            data={name: value for name, value in place.items() if value},
        )
    )
    return SignedIn(id=id_, session=admitted.session, now_us=admitted.now_us, events=tuple(events))


async def _supersede(store: SessionStore, old: OldSession, new: SessionRef, *, deny_us: int) -> None:
    try:
        # An anonymous session has no access tokens to deny.
        await store.revoke(old.ref, reason=REASON_SUPERSEDED, deny_us=deny_us if old.owner else 0)
    except StoreUnavailable:
        if not old.owner:
            # An anonymous session proves nothing and dies by its own timeouts; the sign-in stands.
            return
        await store.revoke(new, reason=REASON_SUPERSEDED)
        raise
