"""The settings an application gets from a profile.

Decides which field of `Settings` each decision of a profile becomes, and that nobody decides one of them twice: a
decision is changed in the profile (`dataclasses.replace`), where it is checked against the others, and never beside it.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Final

from coatcheck.core.cookie import CookieSettings
from coatcheck.core.profiles import Profile
from coatcheck.errors import ConfigurationError
from coatcheck.settings import SessionLimit, Settings, TokenSettings

DEVICE_COOKIE: Final = "__Host-Http-device"
DEVELOPMENT_DEVICE_COOKIE: Final = "coatcheck_device"

_DECIDED: Final = ("idle_timeout", "absolute_timeout", "limit", "outage", "binding")
"""Fields of `Settings` that a profile decides whatever it is; the same-site policy and tokens are looked at by
themselves."""


def settings_of(profile: Profile, base: Settings | None = None) -> Settings:
    """What an application under this profile runs with; `base` holds all that no profile decides.

    Tokens of the base keep their issuer, algorithm and audiences; how long an access token lives is the profile's. A
    profile that compares devices gets a device cookie, if the base names none. To change a decision, give
    `replace(Profile.named("b2c"), idle_timeout=...)`.

    Raises: ConfigurationError naming the field: for a profile that cannot run yet, one that needs what the base lacks,
    and a base that decides what the profile does.
    """
    base = Settings() if base is None else base
    if profile.awaits:
        raise ConfigurationError(
            f"profile: {profile.name} needs what this release does not have: {profile.awaits}; take another one"
        )
    for name in _DECIDED:
        if getattr(base, name) != getattr(_UNDECIDED, name):
            raise ConfigurationError(
                f"{name}: the profile decides it; leave it out, or change it there: "
                f"replace(Profile.named({profile.name!r}), ...)"
            )
    limit = None
    if profile.max_sessions is not None:
        limit = SessionLimit(maximum=profile.max_sessions, on_reached=profile.on_limit)
    return replace(
        base,
        profile=profile.name,
        profile_version=profile.version,
        idle_timeout=profile.idle_timeout,
        absolute_timeout=profile.absolute_timeout,
        limit=limit,
        cookie=_cookie(profile, base),
        tokens=_tokens(profile, base.tokens),
        outage=profile.outage,
        binding=profile.binding,
        device_cookie=_device_cookie(profile, base),
    )


def _cookie(profile: Profile, base: Settings) -> CookieSettings | None:
    if base.cookie is not None and base.cookie.same_site != profile.same_site:
        raise ConfigurationError(
            f"cookie.same_site: the profile {profile.name} says {profile.same_site}; say the same, or leave cookie out"
        )
    if base.cookie is not None or profile.same_site == base.session_cookie.same_site:
        return base.cookie
    return replace(base.session_cookie, same_site=profile.same_site)


def _tokens(profile: Profile, given: TokenSettings | None) -> TokenSettings | None:
    if not profile.carries_tokens:
        if given is not None:
            raise ConfigurationError(
                f"tokens: the profile {profile.name} hands out none; leave them out, or take another profile"
            )
        return None
    tokens = TokenSettings() if given is None else given
    if tokens.access_lifetime not in (_DEFAULT_LIFETIME, profile.access_lifetime):
        raise ConfigurationError(
            "tokens.access_lifetime: the profile decides it; leave it out, or change it there: "
            f"replace(Profile.named({profile.name!r}), access_lifetime=...)"
        )
    if profile.carries == "audience_tokens" and not tokens.audiences:
        raise ConfigurationError(
            f"tokens.audiences: the profile {profile.name} has an audience for each service; name them with "
            "tokens=TokenSettings(audiences=(...))"
        )
    return replace(tokens, access_lifetime=profile.access_lifetime)


def _device_cookie(profile: Profile, base: Settings) -> str | None:
    if base.device_cookie is not None or not profile.binding.device:
        return base.device_cookie
    return DEVICE_COOKIE if base.is_https else DEVELOPMENT_DEVICE_COOKIE


_UNDECIDED: Final = Settings()
_DEFAULT_LIFETIME: Final[timedelta] = TokenSettings().access_lifetime
