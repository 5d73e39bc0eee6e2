"""Where an address is: country, position and the network operator, as far as a table tells.

Decides what of a table's record counts, and how far apart two positions are at least. A table is optional and somebody
else's: every member is checked before it is believed, and what is missing or odd is not known, never guessed. This file
must never open a table or ask anybody; `server/geo_file.py` opens one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

EARTH_RADIUS_KM: Final = 6371.0
"""The mean radius; the sphere is wrong by 0.5 % at most."""

MAX_ASN: Final = 2**32 - 1
_MAX_RADIUS_KM: Final = 20_015.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """What is known of where an address is; every member may be missing.

    `country` is ISO 3166-1 alpha-2 in capitals. `position` is latitude and longitude in degrees, `radius_km` how far
    the truth may be from it. `asn` is the number of the network operator (RFC 6793).
    """

    country: str | None = None
    position: tuple[float, float] | None = None
    radius_km: float = 0.0
    asn: int | None = None


NOWHERE: Final = Location()
"""Nothing is known."""


class Geography(Protocol):
    """A table of addresses."""

    def locate(self, address: str) -> Location:
        """Where a valid address is; `NOWHERE` for one that is not in the table. Asks nobody; never raises."""
        ...


class RecordReader(Protocol):
    """An open table in the MaxMind format, as `maxminddb.open_database` returns it."""

    def get(self, ip_address: str) -> object:
        """The record of an address, or None."""
        ...


class MaxMindGeography:
    """Tables in the MaxMind format: one of cities or countries, one of network operators, or both.

    The first table that tells a member decides it. Threads may share it if they may share the readers.
    """

    def __init__(self, readers: Sequence[RecordReader]) -> None:
        self._readers = tuple(readers)

    def locate(self, address: str) -> Location:
        """See `Geography.locate`."""
        country: str | None = None
        position: tuple[float, float] | None = None
        radius = 0.0
        asn: int | None = None
        for reader in self._readers:
            try:
                record = reader.get(address)
            except ValueError:
                # An address of the other family in a table of one, or a damaged table: it tells nothing.
                continue
            if not isinstance(record, Mapping):
                continue
            country = country or _country(record)
            if position is None:
                position, radius = _position(record)
            asn = asn if asn is not None else _asn(record)
        return Location(country=country, position=position, radius_km=radius, asn=asn)


def distance_km(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The length of the shortest way over the ground between two positions (haversine)."""
    latitude, longitude = math.radians(one[0]), math.radians(one[1])
    latitude_2, longitude_2 = math.radians(other[0]), math.radians(other[1])
    share = (
        math.sin((latitude_2 - latitude) / 2) ** 2
        + math.cos(latitude) * math.cos(latitude_2) * math.sin((longitude_2 - longitude) / 2) ** 2
    )
    # Rounding may lift it above one for opposite ends of the world.
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, share)))


def least_distance_km(one: Location, other: Location) -> float | None:
    """How far apart two places are at least, whatever the truth within their radii is; None where one is not known."""
    if one.position is None or other.position is None:
        return None
    return max(0.0, distance_km(one.position, other.position) - one.radius_km - other.radius_km)


def _country(record: Mapping[str, object]) -> str | None:
    # Where the address is, and only else where its owner is registered.
    for name in ("country", "registered_country"):
        member = record.get(name)
        code = member.get("iso_code") if isinstance(member, Mapping) else None
        if isinstance(code, str) and len(code) == 2 and code.isascii() and code.isalpha() and code.isupper():
            return code
    return None


def _position(record: Mapping[str, object]) -> tuple[tuple[float, float] | None, float]:
    member = record.get("location")
    if not isinstance(member, Mapping):
        return None, 0.0
    latitude, longitude = _number(member.get("latitude"), 90.0), _number(member.get("longitude"), 180.0)
    if latitude is None or longitude is None:
        return None, 0.0
    radius = _number(member.get("accuracy_radius"), _MAX_RADIUS_KM)
    return (latitude, longitude), radius if radius is not None and radius >= 0 else 0.0


def _asn(record: Mapping[str, object]) -> int | None:
    number = record.get("autonomous_system_number")
    return number if type(number) is int and 0 < number <= MAX_ASN else None


def _number(value: object, most: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -most <= value <= most else None
