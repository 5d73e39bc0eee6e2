"""Who gives way to a new session, and what is left in their place.

Decides `admit` for stores that decide in Python, from the sessions that are alive at this moment and count, and how a
tombstone says where the sign-in came from that took the place. The first rule is carried out by `redis/lua/admit.lua`
and by the `create` function of `schema/postgres/`; the conformance suite holds all of them to it. Whoever calls it must
let nothing happen to those sessions between looking and writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import REASON_EVICTED, Choice, OnLimit

_FROM: Final = " from "


def giving_way(
    alive: Sequence[SessionRef], *, maximum: int, on_limit: OnLimit, choice: Choice | None
) -> tuple[SessionRef, ...] | None:
    """The sessions to end before the new one is written; None: the limit is reached, nothing may be written.

    `alive` are those that count, oldest first, without the one that is replaced anyway.
    """
    if choice is not None:
        leaving = tuple(ref for ref in alive if ref.handle in choice.ending)
        as_shown = choice.shown == frozenset(ref.handle for ref in alive) and len(leaving) == len(choice.ending)
        return leaving if as_shown and len(alive) - len(leaving) < maximum else None
    surplus = 0 if on_limit == "allow" else max(0, len(alive) + 1 - maximum)
    return tuple(alive[:surplus]) if not surplus or on_limit == "evict_oldest" else None


def reason_of_eviction(network: str | None) -> str:
    """What the tombstone of whoever gives way says: a newer sign-in took the place, and where it came from."""
    return REASON_EVICTED if network is None else f"{REASON_EVICTED}{_FROM}{network}"


def cause_of(reason: str) -> tuple[str, str | None]:
    """The reason a tombstone gives, and where the sign-in came from that took the place, if that is why."""
    cause, _, network = reason.partition(_FROM)
    return (cause, network) if cause == REASON_EVICTED and network else (reason, None)
