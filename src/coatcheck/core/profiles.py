"""Profiles: named sets of decisions, one a kind of application.

Decides what each name stands for (the table of situations and techniques), what contradicts what inside one profile,
and what a profile costs. A profile is a frozen value that checks itself when it is built; `dataclasses.replace` makes a
variant, and a setting of a server takes the place of the field of its name. It must never hold a rule, only the choice
between them: how a choice is carried out stands where it is carried out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, Literal, TypeAlias, get_args

from coatcheck.core.activity import QUIET_SHARE
from coatcheck.core.binding import BindingPolicy
from coatcheck.core.ports import OnLimit
from coatcheck.errors import ConfigurationError

OutagePolicy = Literal["refuse", "near", "anonymous"]
"""What a request that needs its session gets while the store is away."""

Carrier: TypeAlias = Literal["session", "tokens", "audience_tokens"]
"""What a sign-in hands out. `session`: the session cookie alone. `tokens`: an access token and a refresh cookie beside
it. `audience_tokens`: the same, with short tokens, one audience a service."""

ProfileSameSite: TypeAlias = Literal["Strict", "Lax"]

LONGEST: Final = timedelta(days=400)
SHORT_TOKEN: Final = timedelta(minutes=15)
"""No `audience_tokens` live longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleLimit:
    """How many sessions somebody of one role may have, in place of the profile's own limit."""

    role: str
    max_sessions: int | None
    on_limit: OnLimit


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One set of decisions. Raises: ConfigurationError naming the field that contradicts another one, and the cure."""

    name: str
    """What it is called; recorded in every session that was signed in under it."""

    version: int
    """Raised whenever a decision changes; recorded beside the name."""

    summary: str
    """What it is, in a line."""

    audience: str
    """Whom it is for."""

    carries: Carrier
    """What a sign-in hands out."""

    idle_timeout: timedelta
    """A session ends after this long without a request. A refresh token lives as long."""

    absolute_timeout: timedelta
    """A session ends this long after sign-in, whatever happens, and with it every token it gave."""

    access_lifetime: timedelta = timedelta(minutes=15)
    """Of an access token; means nothing where none is handed out."""

    same_site: ProfileSameSite = "Lax"
    """Of the session cookie. `Strict`: whoever arrives by a link looks signed out on that one page. The refresh cookie
    is always `Strict`."""

    persistent: bool = False
    """Whether the session cookie outlives the browser's window. The refresh cookie always does."""

    max_sessions: int | None = None
    """How many sessions a subject may have at once. None: as many as the engine allows anybody."""

    on_limit: OnLimit = "allow"
    """What the next sign-in gets when there are `max_sessions`: `allow` lets it in, `evict_oldest` ends the oldest,
    `refuse` and `ask` answer 409 `session_limit`."""

    role_limits: tuple[RoleLimit, ...] = ()
    """Limits of single roles, in place of the two fields above."""

    binding: BindingPolicy = field(default_factory=BindingPolicy)
    """What of the place of a session counts during its life, and what follows when it is another one."""

    step_up: timedelta = timedelta(minutes=5)
    """How old the last proof of the password may be for a sensitive act."""

    outage: OutagePolicy = "refuse"
    """What a request that needs its session gets while the store is away."""

    awaits: str = ""
    """What this release lacks to keep the profile's promise; a server does not start with such a profile. Empty: it
    runs."""

    def __post_init__(self) -> None:
        if not self.name or not self.name.isidentifier() or not self.name.isascii():
            raise ConfigurationError("name: letters, digits and underscores, such as back_office")
        if self.version < 1:
            raise ConfigurationError("version: 1 or more")
        self._check_choices()
        self._check_times()
        _check_limit("max_sessions", "on_limit", self.max_sessions, self.on_limit)
        for each in self.role_limits:
            where = f"role_limits: {each.role!r}: "
            _check_limit(f"{where}max_sessions", f"{where}on_limit", each.max_sessions, each.on_limit)
        if len({each.role for each in self.role_limits}) < len(self.role_limits):
            raise ConfigurationError("role_limits: one role stands there twice; keep one of the two")
        if self.outage == "near" and self.binding.compares and self.binding.on_mismatch in ("block", "revoke"):
            raise ConfigurationError(
                f"outage: near serves requests that nobody can {self.binding.on_mismatch} while the store is away; "
                "set outage to refuse, or binding.on_mismatch to notify or step_up"
            )

    @classmethod
    def named(cls, name: str) -> Profile:
        """The profile of this name. Raises: ConfigurationError naming those that there are."""
        found = PROFILES.get(name)
        if found is None:
            raise ConfigurationError(f"profile: one of {', '.join(PROFILES)}")
        return found

    @property
    def carries_tokens(self) -> bool:
        """Whether a sign-in hands out an access token and a refresh cookie beside the session cookie."""
        return self.carries != "session"

    def limit_of(self, role: str | None) -> tuple[int | None, OnLimit]:
        """`max_sessions` and `on_limit` for somebody of this role."""
        own = next((each for each in self.role_limits if each.role == role), None)
        return (self.max_sessions, self.on_limit) if own is None else (own.max_sessions, own.on_limit)

    def _check_choices(self) -> None:
        for name, value, choices in (
            ("carries", self.carries, get_args(Carrier)),
            ("same_site", self.same_site, get_args(ProfileSameSite)),
            ("outage", self.outage, get_args(OutagePolicy)),
        ):
            if value not in choices:
                raise ConfigurationError(f"{name}: one of {', '.join(choices)}")

    def _check_times(self) -> None:
        for name in ("idle_timeout", "absolute_timeout", "access_lifetime", "step_up"):
            value: object = getattr(self, name)
            if not isinstance(value, timedelta):
                raise ConfigurationError(f"{name}: a timedelta, such as timedelta(minutes=30)")
            if not timedelta(seconds=1) <= value <= LONGEST:
                raise ConfigurationError(f"{name}: from 1 second to {LONGEST.days} days")
        if self.idle_timeout > self.absolute_timeout:
            raise ConfigurationError(
                "idle_timeout: must not be longer than absolute_timeout; shorten it, or raise absolute_timeout"
            )
        if self.carries_tokens and self.access_lifetime > self.idle_timeout:
            raise ConfigurationError(
                "access_lifetime: must not be longer than idle_timeout, or a token would outlive its session; shorten "
                "it, or raise idle_timeout"
            )
        if self.carries == "audience_tokens" and self.access_lifetime > SHORT_TOKEN:
            raise ConfigurationError(
                f"access_lifetime: tokens of one audience are short, {SHORT_TOKEN.total_seconds():g} seconds at most; "
                "shorten it, or take the profile b2c"
            )


def _check_limit(maximum_name: str, answer_name: str, maximum: int | None, answer: OnLimit) -> None:
    if answer not in get_args(OnLimit):
        raise ConfigurationError(f"{answer_name}: one of {', '.join(get_args(OnLimit))}")
    if maximum is not None and maximum < 1:
        raise ConfigurationError(f"{maximum_name}: at least 1")
    if maximum is None and answer != "allow":
        raise ConfigurationError(
            f"{answer_name}: {answer} needs a limit to be reached; set max_sessions, or on_limit to allow"
        )
    if maximum is not None and answer == "allow":
        raise ConfigurationError(
            f"{maximum_name}: a limit that allows the next sign-in is none; leave it out, or set on_limit to "
            "evict_oldest, refuse or ask"
        )


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile(
            name="admin",
            version=1,
            summary="the session cookie alone, short, one sign-in at a time",
            audience="a back office",
            carries="session",
            idle_timeout=timedelta(minutes=30),
            absolute_timeout=timedelta(hours=12),
            max_sessions=1,
            on_limit="evict_oldest",
            binding=BindingPolicy(user_agent=True, device=True, on_mismatch="notify"),
            outage="refuse",
        ),
        Profile(
            name="b2c",
            version=1,
            summary="an access token in memory and a refresh cookie, on several devices",
            audience="a large consumer service, web and mobile",
            carries="tokens",
            idle_timeout=timedelta(days=7),
            absolute_timeout=timedelta(days=30),
            max_sessions=10,
            on_limit="evict_oldest",
            binding=BindingPolicy(device=True, on_mismatch="notify"),
            outage="near",
        ),
        Profile(
            name="bank",
            version=1,
            summary="the session cookie alone, very short, bound to the place it was given at",
            audience="finance",
            carries="session",
            idle_timeout=timedelta(minutes=5),
            absolute_timeout=timedelta(hours=1),
            same_site="Strict",
            max_sessions=1,
            on_limit="refuse",
            binding=BindingPolicy(network="prefix", user_agent=True, device=True, on_mismatch="block"),
            outage="refuse",
        ),
        Profile(
            name="microservices",
            version=1,
            summary="short access tokens, one audience a service, checked at the gateway or in the service",
            audience="internal APIs",
            carries="audience_tokens",
            idle_timeout=timedelta(minutes=30),
            absolute_timeout=timedelta(hours=12),
            access_lifetime=timedelta(minutes=5),
            outage="near",
        ),
        Profile(
            name="oauth",
            version=1,
            summary="access tokens and rotating refresh tokens for clients of others; it follows with the provider",
            audience="third-party applications",
            carries="tokens",
            idle_timeout=timedelta(days=7),
            absolute_timeout=timedelta(days=30),
            outage="refuse",
            awaits="the OAuth 2.0 provider: consent of the user, and a client of its own for each application",
        ),
    )
}
"""Every profile by its name."""

UNENFORCED: Final[Mapping[str, str]] = {
    "step_up": "the password may be asked for again, and no act of the server is called sensitive yet",
}
"""Fields that this release prints and does not carry out, and why."""


# -- what it costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Commands that one kind of request sends to the session store. The accounts, the limits of sign-in and the audit
    log of a server are not in it."""

    request: str
    commands: int
    note: str = ""
    at_most_every: float | None = None
    """Seconds between two of them for one session; None: each time."""


def costs_of(profile: Profile) -> tuple[Cost, ...]:
    """What the requests of this profile ask of the session store, kind by kind, with near copies."""
    quiet = (profile.idle_timeout / QUIET_SHARE).total_seconds()
    costs = [
        Cost(request="a session this process knows", commands=0),
        Cost(request="a session it has not met, or that has changed", commands=1),
        Cost(
            request="noting that a session is used",
            commands=1,
            note="for many sessions together",
            at_most_every=quiet,
        ),
    ]
    if profile.carries_tokens:
        costs += [
            Cost(request="an access token, in a service with a Verifier", commands=0),
            Cost(request="a refresh", commands=1),
        ]
    if profile.binding.compares:
        costs += [
            Cost(request="a request from where the last one came, or from a place that was decided about", commands=0),
            Cost(request="the first request of a session from another place", commands=1),
        ]
    sign_in, note = 1, "the limit of sessions is in it"
    if profile.carries_tokens:
        sign_in, note = sign_in + 1, f"{note}, then the first refresh token"
    costs.append(Cost(request="a sign-in", commands=sign_in, note=note))
    if profile.on_limit == "evict_oldest":
        costs.append(Cost(request="a sign-in at a server, besides", commands=1, note="which sessions are there"))
    return (*costs, Cost(request="a sign-out", commands=1))
