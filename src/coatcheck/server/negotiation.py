"""What a client would rather have: the members of an `Accept` header and how much it wants each (RFC 9110 s12.4.2).

Decides how far a hostile header is read. It never raises: what cannot be read was not said.
"""

from __future__ import annotations

import re
from typing import Final

MAX_HEADER: Final = 1024
"""Octets; a longer header is taken as none. Browsers send less than 300."""

MAX_MEMBERS: Final = 32

_QUALITY: Final = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")


def preferences(header: str | None) -> tuple[tuple[str, float], ...]:
    """Members in lower case with their quality, in the order of the header; unreadable ones are left out."""
    if header is None or len(header) > MAX_HEADER:
        return ()
    found: list[tuple[str, float]] = []
    for member in header.split(",", MAX_MEMBERS)[:MAX_MEMBERS]:
        name, *parameters = (part.strip().lower() for part in member.split(";"))
        quality = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if name and _QUALITY.fullmatch(quality):
            found.append((name, float(quality)))
    return tuple(found)


def quality_of(wanted: tuple[tuple[str, float], ...], media_type: str) -> float:
    """How much a media type is wanted: by its own name, else its kind's, else anything's; 0 when not at all."""
    kind = media_type.partition("/")[0]
    for name in (media_type, f"{kind}/*", "*/*"):
        for member, quality in wanted:
            if member == name:
                return quality
    return 0.0
