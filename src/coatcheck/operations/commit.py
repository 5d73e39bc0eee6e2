"""Write what a request changed, and nothing else.

Decides that only changed fields are sent, that a session which has ended is never created again, and that an
anonymous session comes into being only where the browser carried none. It must never write for a request that only
read.
"""

from __future__ import annotations

from coatcheck.core.admission import cause_of
from coatcheck.core.ids import IdKeys, SessionRef, sid_of
from coatcheck.core.ports import (
    Changes,
    Committed,
    Conflict,
    Created,
    Gone,
    Oversized,
    RecordLimits,
    SessionStore,
)
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import RecordTooLarge, SessionConflict, SessionGone
from coatcheck.events import Event


async def commit(
    store: SessionStore,
    ref: SessionRef,
    changes: Changes,
    *,
    limits: RecordLimits,
    expected: int | None = None,
) -> Committed:
    """Merge the changed fields into the session: one store command.

    Raises: SessionGone when the session is no longer alive (nothing is written), RecordTooLarge, SessionConflict
    when `expected` was asked for, StoreUnavailable.
    """
    outcome = await store.commit(ref, changes, limits=limits, expected=expected)
    match outcome:
        case Committed():
            return outcome
        case Gone():
            raise SessionGone(cause_of(outcome.reason)[0])
        case Conflict():
            raise SessionConflict(outcome.version)
        case Oversized():
            raise too_large(limits)


async def create_anonymous(
    store: SessionStore, keys: IdKeys, new: NewSession, *, limits: RecordLimits
) -> tuple[Created, Event]:
    """Keep fields for somebody who is not signed in: one store command. Raises: RecordTooLarge, StoreUnavailable."""
    octets = sum(len(name.encode()) + len(text.encode()) for name, text in new.fields.items())
    if octets > limits.octets or len(new.fields) > limits.fields:
        raise too_large(limits)
    created = await store.create(new)
    return created, Event(kind="session.created", at=created.now_us / SECOND_US, sid=sid_of(keys, new.ref))


def too_large(limits: RecordLimits) -> RecordTooLarge:
    """The one text for a session that would hold too much."""
    return RecordTooLarge(
        f"a session holds at most {limits.fields} fields and {limits.octets} octets "
        "(settings max_fields, max_field_octets); keep large things in your own database"
    )
