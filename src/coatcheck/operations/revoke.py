"""End sessions: one, all of a subject, all that a filter means; and list them.

Decides how a filtered revoke walks the store: sessions created until its cut, page by page, safe to repeat. A revoke
is fine when there is nothing to end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coatcheck.core.filter import SessionFilter
from coatcheck.core.ids import IdKeys, SessionRef, owner_of, sid_of, subject_tag
from coatcheck.core.ports import Seen, SessionStore
from coatcheck.core.session import SECOND_US, Authority, decode_authority
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.events import Event

PAGE = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Sessions with what they prove, and where to go on."""

    sessions: tuple[tuple[Seen, Authority], ...]
    cursor: str | None
    now_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How many this call ended, by the store's clock."""

    ended: int
    now_us: int
    events: tuple[Event, ...]


class HalfDone(StoreUnavailable):
    """The store went away in the middle of a page; `ending` is what had been ended by then. Repeat the call."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(f"the store went away after {ending.ended} sessions of a page were ended; repeat the call")
        self.ending = ending


async def revoke_session(
    store: SessionStore, keys: IdKeys, ref: SessionRef, *, reason: str, deny_us: int = 0
) -> Ending:
    """End one session: one store command, which writes the tombstone and denies its access tokens for `deny_us`."""
    outcome = await store.revoke(ref, reason=reason, deny_us=deny_us)
    ended = (ref,) if outcome.ended else ()
    return _ending(keys, ended, None, reason, outcome.now_us)


async def revoke_subject(
    store: SessionStore,
    keys: IdKeys,
    *,
    tenant: str,
    subject: str,
    reason: str,
    keep: SessionRef | None,
    deny_us: int = 0,
) -> Ending:
    """End every session of a subject but `keep`, those being created at this moment included."""
    outcome = await store.revoke_owner(
        subject_tag(keys, tenant, subject), owner_of(tenant, subject), reason=reason, keep=keep, deny_us=deny_us
    )
    return _ending(keys, outcome.ended, subject, reason, outcome.now_us)


async def revoke_page(
    store: SessionStore,
    keys: IdKeys,
    filter_: SessionFilter,
    *,
    tenant: str,
    reason: str,
    cut_us: int,
    after: str | None,
    deny_us: int = 0,
) -> tuple[Ending, str | None]:
    """End what the filter means on one page, among sessions created until `cut_us`; returns where to go on.

    The caller follows the cursor to its end and publishes page by page: what was ended is told even if a later page
    fails. Safe to repeat.
    """
    page = await find(store, keys, filter_, tenant=tenant, after=after, limit=PAGE)
    ended: list[Event] = []
    now_us = page.now_us
    try:
        for seen, _ in page.sessions:
            if seen.session.created_us <= cut_us:
                outcome = await store.revoke(seen.session.ref, reason=reason, deny_us=deny_us)
                now_us = outcome.now_us
                if outcome.ended:
                    ended += _ending(keys, (seen.session.ref,), seen.session.subject or None, reason, now_us).events
    except StoreUnavailable as lost:
        raise HalfDone(Ending(ended=len(ended), now_us=now_us, events=tuple(ended))) from lost
    return Ending(ended=len(ended), now_us=now_us, events=tuple(ended)), page.cursor


async def find(
    store: SessionStore, keys: IdKeys, filter_: SessionFilter, *, tenant: str, after: str | None, limit: int
) -> Found:
    """One page of what the filter means. A page may be empty and still go on: follow the cursor.

    With a subject the subject's own index is read, else the whole store is walked. Raises: ValueRefused for a cursor
    the store did not give, StoreUnavailable.
    """
    if not 1 <= limit <= 1000:
        raise ValueRefused("limit: from 1 to 1000")
    if filter_.subject is not None:
        page = await store.list_by_owner(
            subject_tag(keys, tenant, filter_.subject),
            owner_of(tenant, filter_.subject),
            after=after,
            limit=limit,
        )
    else:
        page = await store.scan(after=after, limit=limit)
    return Found(sessions=tuple(_meant(page.sessions, filter_.matches)), cursor=page.cursor, now_us=page.now_us)


def _meant(sessions: tuple[Seen, ...], matches: Callable[[Seen, Authority], bool]) -> list[tuple[Seen, Authority]]:
    meant: list[tuple[Seen, Authority]] = []
    for seen in sessions:
        try:
            authority = decode_authority(seen.session.authority)
        except ValueError:
            # An unreadable session can prove nothing; resume reports it when somebody presents it.
            continue
        if matches(seen, authority):
            meant.append((seen, authority))
    return meant


def _ending(keys: IdKeys, ended: tuple[SessionRef, ...], subject: str | None, reason: str, now_us: int) -> Ending:
    return Ending(
        ended=len(ended),
        now_us=now_us,
        events=tuple(
            Event(
                kind="session.ended",
                at=now_us / SECOND_US,
                sid=sid_of(keys, ref),
                subject=subject,
                data={"reason": reason},
            )
            for ref in ended
        ),
    )
