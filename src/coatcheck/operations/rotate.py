"""Give a session a new id.

Decides when the old id may still be answered for a moment (plain rotation) and when it is dead at once (a change of
claims). Simultaneous plain rotations of one id end with one successor.
"""

from __future__ import annotations

from dataclasses import dataclass

from coatcheck.core.admission import cause_of
from coatcheck.core.alias import open_successor, seal_successor
from coatcheck.core.ids import IdKeys, SessionId, sid_of
from coatcheck.core.ports import Converged, Gone, Rotated, SessionStore
from coatcheck.core.session import SECOND_US
from coatcheck.errors import SessionGone
from coatcheck.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class NewId:
    """The id to go on with; `version` is 0 where another request made the rotation."""

    id: SessionId
    version: int
    events: tuple[Event, ...] = ()


async def rotate(
    store: SessionStore,
    keys: IdKeys,
    *,
    old: SessionId,
    new: SessionId,
    server_key: bytes | None,
    nonce: bytes,
    alias_us: int,
    authority: str | None,
) -> NewId:
    """Replace the id, in one store command. With `authority` the privileges change and nothing leads on from the old.

    Raises: SessionGone when the session ended, or when the id had been replaced before and its alias cannot be
    followed; StoreUnavailable.
    """
    aliased = authority is None and server_key is not None and alias_us > 0
    sealed = seal_successor(old, new, server_key=server_key, nonce=nonce) if aliased and server_key else b""
    outcome = await store.rotate_id(
        old.ref,
        old_digest=old.digest,
        new_digest=new.digest,
        sealed=sealed,
        alias_us=alias_us if aliased else 0,
        authority=authority,
    )
    match outcome:
        case Rotated():
            event = Event(kind="session.rotated", at=outcome.now_us / SECOND_US, sid=sid_of(keys, old.ref))
            return NewId(id=new, version=outcome.version, events=(event,))
        case Converged():
            successor = None if server_key is None else open_successor(keys, old, outcome.sealed, server_key=server_key)
            if successor is None:
                raise SessionGone("replaced")
            return NewId(id=successor, version=0)
        case Gone():
            raise SessionGone(cause_of(outcome.reason)[0])
