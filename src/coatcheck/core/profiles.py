"""Profiles: named sets of decisions, one a kind of application.

Decides what each name stands for: what a browser carries, and how long. A profile is a frozen value; any field can be
overridden in settings. It must never hold a rule, only the choice between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

OutagePolicy = Literal["refuse", "near", "anonymous"]
"""What a request that needs its session gets while the store is away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One set of decisions; `version` is raised when a decision changes."""

    name: str
    version: int
    summary: str
    carries_tokens: bool
    """Whether a sign-in hands out an access token and a refresh cookie beside the session cookie."""
    idle_timeout: timedelta
    absolute_timeout: timedelta
    access_lifetime: timedelta
    """Of an access token; means nothing where none is handed out."""
    outage: OutagePolicy


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(
            name="admin",
            version=1,
            summary="a back office: the session cookie alone, short",
            carries_tokens=False,
            idle_timeout=timedelta(minutes=30),
            absolute_timeout=timedelta(hours=12),
            access_lifetime=timedelta(minutes=15),
            outage="refuse",
        ),
        Profile(
            name="b2c",
            version=1,
            summary="a large consumer service: an access token in memory and a refresh cookie",
            carries_tokens=True,
            idle_timeout=timedelta(days=7),
            absolute_timeout=timedelta(days=30),
            access_lifetime=timedelta(minutes=15),
            outage="near",
        ),
    )
}
"""Every profile by its name."""
