"""Judge where a request comes from against where its session belongs, and let a person prove a place.

Decides the order: first by what the record says, with no command; only what nobody has decided yet is written, once
for all nodes, by a commit that lands only on the very version it was decided on (docs/decisions/0017-places.md).
`core/binding.py` has the rule. It must never let a request pass because nothing could be written: it fails closed
wherever the policy does more than tell.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from coatcheck.core.binding import (
    MAX_PLACES_OCTETS,
    PLACES_FIELD,
    Family,
    Match,
    Mismatch,
    NewFamily,
    Outcome,
    Place,
    Places,
    Surveyor,
    add_family,
    compare,
    decision_at,
    explain_mismatch,
    observe,
    pack_places,
    prove,
    refusal_of,
    severity,
    unpack_places,
)
from coatcheck.core.ports import Changes, Committed, Oversized, RecordLimits, SessionStore
from coatcheck.core.session import SECOND_US
from coatcheck.errors import PlaceRefused, SessionGone, StoreUnavailable
from coatcheck.events import Event
from coatcheck.operations.resume import NotResumed, Resumed, Resumption

log: Final = logging.getLogger("coatcheck")

MAX_TRIES: Final = 6
"""How often a decision is made anew because somebody else wrote first. Each time it was somebody who got on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Where a request comes from: as the policy sees it, and its address."""

    place: Place
    address: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What holds for the request. `found` is the session as of the decision; `until_us`: how long a block lasts.
    `kept`: it stands in the record, or there is nothing to keep; else the next request from there is judged anew."""

    outcome: Outcome
    found: Resumed
    until_us: int = 0
    events: tuple[Event, ...] = ()
    kept: bool = True


Again: TypeAlias = Callable[[], Awaitable[Resumption]]
"""Reads the session anew, past every copy."""


async def judge_place(
    store: SessionStore,
    surveyor: Surveyor,
    found: Resumed,
    seen: Seen,
    *,
    sid: str,
    limits: RecordLimits,
    again: Again,
) -> Judged | NotResumed:
    """What holds for a request of a session that was found alive. No command where it matches or is known; one where
    it is decided; of any number of simultaneous first requests from one place exactly one answers with an event.

    Raises: StoreUnavailable where the policy does more than tell and the decision could not be kept; ValueError for
    places that cannot be read.
    """
    policy = surveyor.policy
    limits = _with_room(limits)
    events: tuple[Event, ...] = ()
    for _ in range(MAX_TRIES):
        places = unpack_places(found.session.fields.get(PLACES_FIELD, ""))
        recorded = _belongs(surveyor, found, places)
        comparison = compare(policy, recorded, seen.place)
        if isinstance(comparison, Match):
            asked = decision_at(places, b"", matches=True, least="allow", now_us=found.now_us)
            return Judged(outcome=asked or "allow", found=found, events=events)
        outcome: Outcome = "notify"
        until_us = 0
        if isinstance(comparison, NewFamily):
            if places.challenged_us:
                # Never refused; but while the session's own place is asked for a proof, so is one that nobody knows:
                # who was refused at one address must not get in by the other family's. Nor is it recorded: that
                # would make it the session's own.
                return Judged(outcome="step_up", found=found, events=events)
            changed, told = add_family(places, comparison.family, seen.address or "")
        else:
            observed = observe(
                places,
                seen.place.pack(),
                outcome=policy.on_mismatch,
                now_us=found.now_us,
                block_us=policy.block_for * SECOND_US,
            )
            changed, told = observed.places, observed.decided
            outcome, until_us = observed.outcome, observed.until_us
        if changed == places or found.through_outage:
            return Judged(outcome=outcome, found=found, until_us=until_us, events=events)
        text = pack_places(changed)
        try:
            written = await store.commit(
                found.session.ref,
                Changes(put={PLACES_FIELD: text}),
                limits=limits,
                expected=found.session.version,
            )
        except StoreUnavailable as lost:
            if severity(outcome) > severity("notify"):
                raise
            log.warning("coatcheck: a place is recorded later: %s", lost.detail)
            return Judged(outcome=outcome, found=found, events=events, kept=False)
        if isinstance(written, Oversized):
            # Only where today's limits are narrower than those it was filled under.
            log.warning("coatcheck: a session is too large to remember a place; it is judged anew at each request")
            return Judged(outcome=outcome, found=found, until_us=until_us, events=events, kept=False)
        if not isinstance(written, Committed):
            newer = await again()
            if isinstance(newer, NotResumed):
                return newer
            found = newer
            continue
        found = _with_places(found, text, version=written.version)
        if told:
            data = {"judged": "request", "outcome": outcome, **explain_mismatch(recorded, seen.place, comparison)}
            events += (_decided(found, sid, written.now_us, data),)
        if isinstance(comparison, Mismatch):
            return Judged(outcome=outcome, found=found, until_us=until_us, events=events)
    if severity(policy.on_mismatch) > severity("notify"):
        raise StoreUnavailable("whether this place may use the session could not be written: too many write at once")
    return Judged(outcome="notify", found=found, events=events, kept=False)


async def prove_place(
    store: SessionStore, surveyor: Surveyor, found: Resumed, seen: Seen, *, limits: RecordLimits, again: Again
) -> Resumed:
    """Whoever is at this place has proven himself, and the session has a new id since: what was asked of it is met.

    The new id comes first: until this is written the place is asked once more, and a copy of the old id gains nothing.
    An address of the other family becomes the session's own. Raises: PlaceRefused for a place that is refused
    meanwhile, SessionGone, StoreUnavailable; ValueError for places that cannot be read.
    """
    limits, packed = _with_room(limits), seen.place.pack()
    for _ in range(MAX_TRIES):
        places = unpack_places(found.session.fields.get(PLACES_FIELD, ""))
        comparison = compare(surveyor.policy, _belongs(surveyor, found, places), seen.place)
        if isinstance(comparison, Mismatch):
            refused = refusal_of(places, packed, now_us=found.now_us)
            if refused is not None:
                raise PlaceRefused(refused.until_us / SECOND_US)
            changed = prove(places, packed, matches=False, family=None, now_us=found.now_us)
        else:
            family: Family = "6" if seen.place.six else "4"
            changed = prove(places, packed, matches=True, family=family, now_us=found.now_us)
            if isinstance(comparison, NewFamily):
                changed, _told = add_family(changed, comparison.family, seen.address or "")
        if changed == places:
            return found
        text = pack_places(changed)
        changes = Changes(put={PLACES_FIELD: text})
        written = await store.commit(found.session.ref, changes, limits=limits, expected=found.session.version)
        if isinstance(written, Committed):
            return _with_places(found, text, version=written.version)
        newer = await again()
        if isinstance(newer, NotResumed):
            raise SessionGone(newer.reason or newer.why)
        found = newer
    raise StoreUnavailable("that this place was proven could not be written: too many write at once")


def _with_room(limits: RecordLimits) -> RecordLimits:
    # Whatever an application has put there: what it may take ends where this begins.
    return RecordLimits(octets=limits.octets + len(PLACES_FIELD) + MAX_PLACES_OCTETS, fields=limits.fields + 1)


def _belongs(surveyor: Surveyor, found: Resumed, places: Places) -> Place:
    authority = found.authority
    # What was recorded at sign-in counts; what appeared later fills the family that was missing.
    networks: Mapping[str, str] = {**dict(places.networks), **authority.networks}
    return surveyor.recorded(networks, authority.user_agent, authority.device_id)


def _with_places(found: Resumed, text: str, *, version: int) -> Resumed:
    fields = {**found.session.fields, PLACES_FIELD: text}
    return replace(found, session=replace(found.session, version=version, fields=fields))


def _decided(found: Resumed, sid: str, now_us: int, data: Mapping[str, str | int | float | bool]) -> Event:
    return Event(kind="risk.decided", at=now_us / SECOND_US, sid=sid, subject=found.session.subject, data=data)
