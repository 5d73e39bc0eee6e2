"""Coatcheck: login state for Python. One sign-in, known on every server, ended everywhere at once.

Names are resolved at first use (PEP 562): importing this package loads no other.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coatcheck.core.access_token import AccessToken
    from coatcheck.core.binding import BindingPolicy
    from coatcheck.core.cookie import CookieSettings
    from coatcheck.core.device import device_of
    from coatcheck.core.filter import SessionFilter
    from coatcheck.core.geo import MaxMindGeography
    from coatcheck.core.profiles import Profile
    from coatcheck.core.user_agent import device_name
    from coatcheck.errors import (
        CoatcheckError,
        ConfigurationError,
        Forbidden,
        LoginRequired,
        RefreshInvalid,
        RefreshReused,
        SessionClosed,
        SessionEnded,
        SessionGone,
        SessionLimitReached,
        SessionNotLoaded,
        StoreUnavailable,
        Throttled,
        TokenInvalid,
    )
    from coatcheck.events import Event
    from coatcheck.issuer import IssuedTokens
    from coatcheck.manager import AsyncCoatcheck, Coatcheck, Page, Revocation, SessionSummary
    from coatcheck.profile_settings import settings_of
    from coatcheck.session import AsyncSession, Principal, Session
    from coatcheck.settings import SessionLimit, Settings, TokenSettings
    from coatcheck.verifier import Verifier

__version__ = "0.1.0"

__all__ = [
    "AccessToken",
    "AsyncCoatcheck",
    "AsyncSession",
    "BindingPolicy",
    "Coatcheck",
    "CoatcheckError",
    "ConfigurationError",
    "CookieSettings",
    "Event",
    "Forbidden",
    "IssuedTokens",
    "LoginRequired",
    "MaxMindGeography",
    "Page",
    "Principal",
    "Profile",
    "RefreshInvalid",
    "RefreshReused",
    "Revocation",
    "Session",
    "SessionClosed",
    "SessionEnded",
    "SessionFilter",
    "SessionGone",
    "SessionLimit",
    "SessionLimitReached",
    "SessionNotLoaded",
    "SessionSummary",
    "Settings",
    "StoreUnavailable",
    "Throttled",
    "TokenInvalid",
    "TokenSettings",
    "Verifier",
    "__version__",
    "device_name",
    "device_of",
    "settings_of",
]

_HOMES: Final = {
    "coatcheck.core.access_token": ("AccessToken",),
    "coatcheck.core.binding": ("BindingPolicy",),
    "coatcheck.core.cookie": ("CookieSettings",),
    "coatcheck.core.device": ("device_of",),
    "coatcheck.core.filter": ("SessionFilter",),
    "coatcheck.core.geo": ("MaxMindGeography",),
    "coatcheck.core.profiles": ("Profile",),
    "coatcheck.core.user_agent": ("device_name",),
    "coatcheck.errors": (
        "CoatcheckError",
        "ConfigurationError",
        "Forbidden",
        "LoginRequired",
        "RefreshInvalid",
        "RefreshReused",
        "SessionClosed",
        "SessionEnded",
        "SessionGone",
        "SessionLimitReached",
        "SessionNotLoaded",
        "StoreUnavailable",
        "Throttled",
        "TokenInvalid",
    ),
    "coatcheck.events": ("Event",),
    "coatcheck.issuer": ("IssuedTokens",),
    "coatcheck.manager": ("AsyncCoatcheck", "Coatcheck", "Page", "Revocation", "SessionSummary"),
    "coatcheck.profile_settings": ("settings_of",),
    "coatcheck.session": ("AsyncSession", "Principal", "Session"),
    "coatcheck.settings": ("SessionLimit", "Settings", "TokenSettings"),
    "coatcheck.verifier": ("Verifier",),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'coatcheck' has no attribute {name!r}")
    value: object = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
