"""What the rules about risk remember of each account, in the server's database.

Decides the stored form (one line of JSON, bounded as `core.risk.History` is) and that a history is written only on the
very version that was read, in one statement: of any number of servers that judge at once, each judges what the one
before has remembered. It must never judge anything, and holds neither an address nor the value of a cookie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from coatcheck.core.geo import Location
from coatcheck.core.risk import SIGNALS, History, Refusal, Signal
from coatcheck.errors import StoreUnavailable
from coatcheck.server.database_port import Database
from coatcheck.system import System

FORMAT: Final = 1
MAX_CHARACTERS: Final = 32_768
"""A full history takes a quarter of it."""

_TRIES: Final = 16


class _Located(msgspec.Struct, frozen=True, kw_only=True):
    latitude: float
    longitude: float
    radius_km: float = 0.0
    country: str | None = None
    asn: int | None = None
    at: float = 0.0


class _Stored(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    v: int
    devices: tuple[str, ...] = ()
    countries: tuple[str, ...] = ()
    located: _Located | None = None
    counts: dict[str, tuple[float, ...]] = {}
    refused: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A history as it was read. `version` is 0 while nothing is stored."""

    history: History
    version: int


class RiskHistories:
    """Read and replace. Any number of servers may do so at once; all raise StoreUnavailable."""

    def __init__(self, database: Database, *, system: System) -> None:
        self._database = database
        self._system = system

    async def read(self, subject: str) -> Kept:
        """What is remembered of an account; an empty history for one that nothing is remembered of."""
        rows = await self._database.fetch(
            "select version, history from {namespace}_risk_history where subject = ?", subject
        )
        if not rows:
            return Kept(history=History(), version=0)
        version, text = rows[0]
        history = unpack_history(text) if isinstance(text, str) else None
        if not isinstance(version, int) or history is None:
            raise StoreUnavailable("database: a row of risk histories is not what this release writes")
        return Kept(history=history, version=version)

    async def replace(self, subject: str, history: History, *, read: Kept) -> bool:
        """Remember this instead of what was read; False, and nothing is written, if somebody else was first."""
        text, now_us = pack_history(history), self._system.now_us()
        if read.version == 0:
            rows = await self._database.fetch(
                "insert into {namespace}_risk_history (subject, version, history, changed_us) values (?, 1, ?, ?) "
                "on conflict (subject) do nothing returning version",
                subject,
                text,
                now_us,
            )
        else:
            rows = await self._database.fetch(
                "update {namespace}_risk_history set version = version + 1, history = ?, changed_us = ? "
                "where subject = ? and version = ? returning version",
                text,
                now_us,
                subject,
                read.version,
            )
        return bool(rows)

    async def lift(self, subject: str) -> None:
        """Let unknown browsers sign in to an account again at once, and forget what was counted: an operator says so.

        What is known of its browsers and places stays."""
        for _ in range(_TRIES):
            read = await self.read(subject)
            if not (read.history.refused or read.history.counts):
                return
            if await self.replace(subject, replace(read.history, refused=(), counts={}), read=read):
                return
        raise StoreUnavailable("database: somebody signs in all the time; a refusal could not be lifted")


def pack_history(history: History) -> str:
    """The text that is stored."""
    where = history.located
    located = None
    if where is not None and where.position is not None:
        located = _Located(
            latitude=where.position[0],
            longitude=where.position[1],
            radius_km=where.radius_km,
            country=where.country,
            asn=where.asn,
            at=history.located_at,
        )
    return msgspec.json.encode(
        _Stored(
            v=FORMAT,
            devices=history.devices,
            countries=history.countries,
            located=located,
            counts={name: times for name, times in history.counts.items() if times},
            refused=tuple((each.place, each.until) for each in history.refused),
        )
    ).decode("utf-8")


def unpack_history(text: str) -> History | None:
    """What `pack_history` made; None for any other text."""
    if len(text) > MAX_CHARACTERS:
        return None
    try:
        stored = msgspec.json.decode(text, type=_Stored)
    except (msgspec.MsgspecError, RecursionError):
        return None
    if stored.v != FORMAT:
        return None
    return History(
        devices=stored.devices,
        countries=stored.countries,
        located=None if stored.located is None else _location(stored.located),
        located_at=0.0 if stored.located is None else stored.located.at,
        counts=_counts(stored.counts),
        refused=tuple(Refusal(place=place, until=until) for place, until in stored.refused),
    )


def _location(found: _Located) -> Location:
    return Location(
        country=found.country,
        position=(found.latitude, found.longitude),
        radius_km=found.radius_km,
        asn=found.asn,
    )


def _counts(found: Mapping[str, tuple[float, ...]]) -> dict[Signal, tuple[float, ...]]:
    # What a newer release counts is nothing to this one.
    return {name: times for name, times in found.items() if name in SIGNALS}
