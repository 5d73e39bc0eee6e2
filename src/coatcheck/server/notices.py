"""What happened on an account, in words for its owner.

Decides which events he is told, how far back, and how a place is named: by the network the event has, never by what a
client called itself. Also what may be told to somebody who has not proven yet that he is the owner: where copies of his
session were refused, and nothing to whoever is at such a place himself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from coatcheck.core.binding import network_text
from coatcheck.core.session import SECOND_US
from coatcheck.events import EventKind
from coatcheck.server.service import Service
from coatcheck.server.texts import Language, say

TOLD: Final[tuple[EventKind, ...]] = ("risk.decided", "session.limit_overruled", "session.eviction_contest")
"""What its owner is told. Other events are for administrators, or he has done them himself."""

TOLD_FOR: Final = timedelta(days=30)
MAX_TOLD: Final = 10
REFUSED_WITHIN: Final = timedelta(days=1)
MAX_REFUSED: Final = 3
_READ: Final = 50
_DECIDED: Final[tuple[EventKind, ...]] = ("risk.decided",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """One thing that happened: when (Unix seconds), and the sentence."""

    at: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A place a session was refused from, and when (Unix seconds)."""

    at: float
    place: str


async def told_to_owner(service: Service, subject: str, language: Language) -> list[Told]:
    """What happened on an account lately, newest first. Raises: StoreUnavailable."""
    since = service.system.now_us() / SECOND_US - TOLD_FOR.total_seconds()
    entries = await service.audit.of_subject(subject, kinds=TOLD, since=since, limit=MAX_TOLD)
    return [_told(entry.envelope, language) for entry in entries]


async def refusals_of(
    service: Service, subject: str, sid: str | None, *, address: str | None, language: Language
) -> list[Refusal]:
    """Where this session was refused lately, newest first, for somebody at `address` who holds its cookie and has
    proven nothing. Empty when he is at such a place himself: a thief must not learn where the owner is.

    Raises: StoreUnavailable.
    """
    since = service.system.now_us() / SECOND_US - REFUSED_WITHIN.total_seconds()
    found = await service.audit.of_subject(subject, kinds=_DECIDED, since=since, limit=_READ)
    of_session = [entry.envelope for entry in found if entry.envelope.get("sid") == sid]
    here = _network_of(service, address)
    if here is not None and any(_data(envelope).get("network") == here for envelope in of_session):
        return []
    refused = [envelope for envelope in of_session if _data(envelope).get("outcome") == "block"]
    return [Refusal(at=_at(each), place=_place(_data(each), language)) for each in refused[:MAX_REFUSED]]


def _told(envelope: Mapping[str, object], language: Language) -> Told:
    data = _data(envelope)
    place = _place(data, language)
    match envelope.get("type"):
        case "session.limit_overruled":
            text = say("told.overruled", language, place=place, count=data.get("ended", 1))
        case "session.eviction_contest":
            text = say("told.contest", language, place=place)
        case _:
            text = say(_decision(data), language, place=place)
    return Told(at=_at(envelope), text=text)


def _decision(data: Mapping[str, object]) -> str:
    if "new_family" in data:
        return "told.family"
    if data.get("judged") == "request":
        outcome = data.get("outcome")
        return f"told.{outcome}" if outcome in _OUTCOMES else "told.notify"
    # By a rule about sign-ins; the first one that spoke says enough.
    first = str(data.get("reasons", "")).partition(" ")[0]
    return f"told.{first}" if first in _SIGNALS else "told.unusual"


def _place(data: Mapping[str, object], language: Language) -> str:
    network = data.get("network")
    if isinstance(network, str) and network != "unknown":
        return network
    return say("told.another_browser" if "agent" in data or "device" in data else "network.unknown", language)


def _network_of(service: Service, address: str | None) -> str | None:
    """The network of an address, as events name it."""
    binding = service.coat.engine.binding
    if binding is None:
        return None
    seen = binding.surveyor.seen(address, "", None)
    return network_text(seen.four or seen.six) if seen.four or seen.six else None


def _data(envelope: Mapping[str, object]) -> Mapping[str, object]:
    data = envelope.get("data")
    return data if isinstance(data, dict) else {}


def _at(envelope: Mapping[str, object]) -> float:
    at = envelope.get("at")
    return float(at) if isinstance(at, int | float) else 0.0


_OUTCOMES: Final = frozenset({"notify", "step_up", "block", "revoke"})
_SIGNALS: Final = frozenset({"new_device", "new_country", "impossible_travel", "velocity", "refresh_reuse"})
