"""Every choice an application makes, one documented field each.

Decides defaults (safe ones), what contradicts what, and what follows from the public URL: cookie name and attributes,
and the origins that may change something. Settings check themselves when built; the error names the field and the
cure. Nothing here may read the environment except `settings_from_env`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Final, get_args
from urllib.parse import urlsplit

from coatcheck.core.cookie import CookieSettings
from coatcheck.core.csrf import OriginPolicy
from coatcheck.core.network import Network, is_loopback, parse_proxies
from coatcheck.core.ports import OnLimit, RecordLimits
from coatcheck.errors import ConfigurationError
from coatcheck.operations.resume import LifeLimits

_MICROSECOND: Final = timedelta(microseconds=1)
_YEAR: Final = timedelta(days=400)
DEVELOPMENT_COOKIE: Final = "coatcheck_session"


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionLimit:
    """How many sessions a subject may have at once, and what happens to the next sign-in.

    `allow` lets it in (the limit only warns), `evict_oldest` ends the oldest, `refuse` and `ask` raise
    `SessionLimitReached`. Exact under any number of simultaneous sign-ins.
    """

    maximum: int
    on_reached: OnLimit = "evict_oldest"

    def __post_init__(self) -> None:
        if self.maximum < 1:
            raise ConfigurationError("limit: at least one session")
        if self.on_reached not in get_args(OnLimit):
            raise ConfigurationError(f"limit: on_reached is one of {', '.join(get_args(OnLimit))}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one application decides. Frozen; `dataclasses.replace` makes a variant."""

    idle_timeout: timedelta = timedelta(minutes=30)
    """A session ends after this long without a request. Longer is more comfortable and leaves a forgotten browser
    signed in for longer."""

    absolute_timeout: timedelta = timedelta(hours=12)
    """A session ends this long after sign-in whatever happens. Rotation never extends it."""

    limit: SessionLimit | None = None
    """Sessions per subject. None: as many as `max_sessions_per_subject`, the oldest gives way."""

    cookie: CookieSettings | None = None
    """Name and attributes of the session cookie. None: what follows from `public_url`, which is right almost always."""

    namespace: str = "coatcheck"
    """Prefix of everything in the store. Applications that share a store and a namespace share their sessions."""

    tenant: str = ""
    """Separates subjects of the same name in one namespace."""

    store_deadline: timedelta = timedelta(seconds=2)
    """No store call lasts longer. Shorter sheds load earlier when the store is slow."""

    public_url: str | None = None
    """Where browsers reach the application, as `https://shop.example`. It fixes the cookie's name and attributes and
    the origin that may send unsafe requests. None: https is assumed, and the origin is compared with `Host`."""

    trusted_origins: frozenset[str] = frozenset()
    """Other origins whose pages may send unsafe requests. Each can act as the signed-in user."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of your reverse proxies. Only their `X-Forwarded-For` is believed."""

    insecure_http_for_development: bool = False
    """Allow an http `public_url` that is not this machine. The cookie then crosses the network in clear."""

    rotation_alias: timedelta = timedelta(seconds=10)
    """How long a rotated id still leads to its successor, for requests that were already on their way. 0 to 30 s."""

    server_key: bytes | None = field(default=None, repr=False)
    """32 secret bytes shared by all nodes, never kept in the store. None: embedded stores keep one of their own; on a
    shared store rotation then has no alias."""

    max_fields: int = 64
    """Fields in one session."""

    max_field_octets: int = 16 * 1024
    """Octets of all field names and values of one session together."""

    max_sessions_per_subject: int = 100
    """Upper bound whatever `limit` says, so that nobody can fill the store under one account."""

    def __post_init__(self) -> None:
        for name in ("idle_timeout", "absolute_timeout", "store_deadline", "rotation_alias"):
            if not isinstance(getattr(self, name), timedelta):
                raise ConfigurationError(f"{name}: a timedelta, such as timedelta(minutes=30)")
        for name in ("idle_timeout", "absolute_timeout"):
            value: timedelta = getattr(self, name)
            if not timedelta(seconds=1) <= value <= _YEAR:
                raise ConfigurationError(f"{name}: from 1 second to 400 days")
        if self.idle_timeout > self.absolute_timeout:
            raise ConfigurationError("idle_timeout: must not be longer than absolute_timeout")
        if not timedelta(0) <= self.rotation_alias <= timedelta(seconds=30):
            raise ConfigurationError("rotation_alias: from 0 to 30 seconds")
        if self.server_key is not None and not (isinstance(self.server_key, bytes) and len(self.server_key) == 32):
            raise ConfigurationError("server_key: exactly 32 bytes; make one with `coatcheck key new`")
        for name in ("max_fields", "max_field_octets", "max_sessions_per_subject"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}: at least 1")
        if self.limit is not None and self.limit.maximum > self.max_sessions_per_subject:
            raise ConfigurationError("limit: larger than max_sessions_per_subject")
        _ = self.session_cookie, self.origins, self.proxies

    @cached_property
    def is_https(self) -> bool:
        """Whether browsers reach us over https. Raises: ConfigurationError."""
        if self.public_url is None:
            return True
        try:
            url = urlsplit(self.public_url)
        except ValueError as broken:
            raise ConfigurationError("public_url: scheme and host alone, as https://shop.example") from broken
        if url.scheme not in ("http", "https") or not url.hostname or url.path not in ("", "/") or url.query:
            raise ConfigurationError("public_url: scheme and host alone, as https://shop.example")
        if url.scheme == "http" and not is_loopback(url.hostname) and not self.insecure_http_for_development:
            raise ConfigurationError(
                "public_url: http is for this machine alone; use https, or set insecure_http_for_development "
                "and know that everybody on the way can take the cookie"
            )
        return url.scheme == "https"

    @cached_property
    def session_cookie(self) -> CookieSettings:
        """The one cookie that is written and read; its name follows from the public URL's scheme alone."""
        if self.cookie is None:
            if self.is_https:
                return CookieSettings()
            return CookieSettings(name=DEVELOPMENT_COOKIE, secure=False)
        if not self.cookie.secure and self.is_https:
            raise ConfigurationError("cookie.secure: must be true when browsers come over https")
        if self.cookie.secure and not self.is_https:
            raise ConfigurationError(
                "cookie.secure: an http public_url cannot use a Secure cookie everywhere; leave `cookie` unset"
            )
        return self.cookie

    @cached_property
    def origins(self) -> OriginPolicy:
        """Whose pages may change something."""
        own = frozenset() if self.public_url is None else frozenset({self.public_url.rstrip("/")})
        try:
            _ = OriginPolicy(public_origins=own)
        except ConfigurationError as wrong:
            raise ConfigurationError("public_url: scheme and host alone, as https://shop.example") from wrong
        return OriginPolicy(public_origins=own, trusted_origins=self.trusted_origins)

    @cached_property
    def proxies(self) -> tuple[Network, ...]:
        """The parsed `trusted_proxies`."""
        return parse_proxies(self.trusted_proxies)

    @cached_property
    def life(self) -> LifeLimits:
        """Both timeouts in microseconds."""
        return LifeLimits(idle_us=self.idle_timeout // _MICROSECOND, absolute_us=self.absolute_timeout // _MICROSECOND)

    @cached_property
    def record(self) -> RecordLimits:
        """How much one session may hold."""
        return RecordLimits(octets=self.max_field_octets, fields=self.max_fields)

    @cached_property
    def admission(self) -> SessionLimit:
        """The limit that every sign-in runs under."""
        if self.limit is None:
            return SessionLimit(maximum=self.max_sessions_per_subject)
        if self.limit.on_reached == "allow":
            return replace(self.limit, maximum=self.max_sessions_per_subject, on_reached="evict_oldest")
        return self.limit


def settings_from_env(environ: Mapping[str, str]) -> tuple[str, Settings]:
    """Store URL and settings from `COATCHECK_*` variables; `COATCHECK_SERVER_KEY_FILE` names a file.

    Raises: ConfigurationError naming the variable.
    """
    store = environ.get("COATCHECK_STORE") or environ.get("COATCHECK_DATABASE")
    if not store:
        raise ConfigurationError("COATCHECK_STORE: not set; for example redis://cache:6379 or sqlite:///app.db")
    found: dict[str, object] = {}
    for name in ("namespace", "tenant", "public_url"):
        value = environ.get(f"COATCHECK_{name.upper()}")
        if value:
            found[name] = value
    for name in ("idle_timeout", "absolute_timeout", "store_deadline", "rotation_alias"):
        value = environ.get(f"COATCHECK_{name.upper()}")
        if value:
            found[name] = _seconds(name, value)
    for name in ("trusted_proxies", "trusted_origins"):
        value = environ.get(f"COATCHECK_{name.upper()}")
        if value:
            items = [item.strip() for item in value.split(",") if item.strip()]
            found[name] = tuple(items) if name == "trusted_proxies" else frozenset(items)
    # The server calls the same setting insecure_http; a script beside it reads the server's environment.
    for name in ("COATCHECK_INSECURE_HTTP_FOR_DEVELOPMENT", "COATCHECK_INSECURE_HTTP"):
        if environ.get(name, "").lower() in ("1", "true", "yes", "on"):
            found["insecure_http_for_development"] = True
    key = _secret(environ, "COATCHECK_SERVER_KEY")
    if key is not None:
        found["server_key"] = parse_server_key(key)
    return store, replace(Settings(), **found)  # type: ignore[arg-type]


def parse_server_key(text: str) -> bytes:
    """Read a server key from 64 hexadecimal digits. Raises: ConfigurationError; the text is never repeated."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError as broken:
        raise ConfigurationError("server_key: 64 hexadecimal digits; make one with `coatcheck key new`") from broken
    if len(key) != 32:
        raise ConfigurationError("server_key: 64 hexadecimal digits; make one with `coatcheck key new`")
    return key


def _seconds(name: str, value: str) -> timedelta:
    try:
        return timedelta(seconds=float(value))
    except (ValueError, OverflowError) as broken:
        raise ConfigurationError(f"COATCHECK_{name.upper()}: a number of seconds") from broken


def _secret(environ: Mapping[str, str], name: str) -> str | None:
    path = environ.get(f"{name}_FILE")
    if path:
        try:
            return Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as broken:
            raise ConfigurationError(f"{name}_FILE: cannot be read") from broken
    return environ.get(name)
