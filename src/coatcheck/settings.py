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

from coatcheck.core.binding import MAX_PLACES_OCTETS, PLACES_FIELD, BindingPolicy, Surveyor, severity
from coatcheck.core.cookie import CookieSettings
from coatcheck.core.csrf import OriginPolicy
from coatcheck.core.geo import Geography
from coatcheck.core.network import Network, is_loopback, parse_proxies
from coatcheck.core.ports import OnLimit, RecordLimits
from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import ConfigurationError
from coatcheck.operations.resume import LifeLimits
from coatcheck.primitives.jwk import Algorithm

_MICROSECOND: Final = timedelta(microseconds=1)
_YEAR: Final = timedelta(days=400)
DEVELOPMENT_COOKIE: Final = "coatcheck_session"
REFRESH_COOKIE: Final = "__Host-Http-refresh"
DEVELOPMENT_REFRESH_COOKIE: Final = "coatcheck_refresh"
FEED_SERVER_LEASE_SECONDS: Final = 1.0
"""How long a server that has not heard from its store may go on telling verifiers that nothing was denied."""
PUBLISH_SLACK_SECONDS: Final = 90
"""A new key waits this much longer than the JWKS may be cached: every server has read the ring again by then."""


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
class TokenSettings:
    """Access and refresh tokens of a session. A refresh token lives as long as its session: `Settings.idle_timeout`
    and `Settings.absolute_timeout` are its lifetimes too (a large consumer service takes 7 and 30 days)."""

    issuer: str | None = None
    """Claim `iss`, the address verifiers trust. None: `public_url`."""

    audience: str | None = None
    """Claim `aud` of a token nobody asked a special one for, and the one this application accepts. None: the issuer."""

    audiences: tuple[str, ...] = ()
    """Further audiences a token may be asked for, one a service."""

    client_id: str = "first-party"
    """Claim `client_id` of this application's own tokens (RFC 9068 s2.2)."""

    algorithm: Algorithm = "ES256"
    """`ES256`, `EdDSA` or `RS256`; `HS256` only where issuer and verifier are one service, it has no public key."""

    access_lifetime: timedelta = timedelta(minutes=15)
    """How long an access token lives. Shorter narrows what a stolen one is worth where no revocation is heard."""

    reuse_grace: timedelta = timedelta(seconds=30)
    """How long the immediate predecessor of a refresh token is answered with the same successor, and how old a token
    is before it is exchanged at all. 0 to 300 s; 0 signs people out when an answer is lost."""

    leeway: timedelta = timedelta(0)
    """Tolerated difference of clocks when this application checks a token. 0 to 60 s."""

    key_period: timedelta = timedelta(days=30)
    """How long a key signs before the next one does."""

    keys_max_age: timedelta = timedelta(minutes=5)
    """How long verifiers may keep the published keys; a new key is published at least this long before it signs."""

    verifier_lease: timedelta = timedelta(seconds=5)
    """The longest `feed_lease` of your verifiers: by it a revoke knows when nobody can still be accepting a token."""

    refresh_cookie: CookieSettings | None = None
    """Name and attributes of the refresh cookie. None: what follows from `public_url`, which is right almost always."""

    def __post_init__(self) -> None:
        if self.algorithm not in get_args(Algorithm):
            raise ConfigurationError(f"tokens.algorithm: one of {', '.join(get_args(Algorithm))}")
        for name, least, most in (
            ("access_lifetime", timedelta(seconds=10), timedelta(hours=24)),
            ("reuse_grace", timedelta(0), timedelta(seconds=300)),
            ("leeway", timedelta(0), timedelta(seconds=60)),
            ("key_period", timedelta(hours=1), _YEAR),
            ("keys_max_age", timedelta(0), timedelta(hours=24)),
            ("verifier_lease", timedelta(0), timedelta(minutes=5)),
        ):
            value = getattr(self, name)
            if not isinstance(value, timedelta) or not least <= value <= most:
                raise ConfigurationError(f"tokens.{name}: a timedelta from {least} to {most}")
            if value % timedelta(seconds=1):
                raise ConfigurationError(f"tokens.{name}: whole seconds")
        if self.key_period < 2 * self.publish_ahead:
            raise ConfigurationError("tokens.key_period: at least twice keys_max_age and three minutes")
        for name in ("issuer", "audience", "client_id"):
            text = getattr(self, name)
            if text is not None and not _is_identifier(text):
                raise ConfigurationError(f"tokens.{name}: 1 to 255 printable ASCII characters without spaces")
        audiences: object = self.audiences
        if not isinstance(audiences, tuple) or not all(map(_is_identifier, audiences)):
            raise ConfigurationError("tokens.audiences: a tuple of names without spaces")
        if self.issuer is not None and (
            not self.issuer.startswith(("https://", "http://")) or set(self.issuer) & set("?#@")
        ):
            raise ConfigurationError("tokens.issuer: an address such as https://id.example, without query or fragment")

    @property
    def publish_ahead(self) -> timedelta:
        """How long a key is published before it signs."""
        return self.keys_max_age + timedelta(seconds=PUBLISH_SLACK_SECONDS)


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

    profile: str = ""
    """Name of the profile these settings were made of; recorded in every session."""

    profile_version: int = 0
    """Its version, recorded beside the name."""

    tenant: str = ""
    """Separates subjects of the same name in one namespace."""

    store_deadline: timedelta = timedelta(seconds=2)
    """All store work of one request together lasts no longer. Shorter sheds load earlier when the store is slow."""

    near_copies: int = 100_000
    """Sessions of which this process keeps a copy, so that a warm request asks no store. 0: every check reads the
    store, and a revoke holds everywhere the moment it returns."""

    near_octets: int = 64 * 1024 * 1024
    """What all near copies of this process may take together."""

    lease: timedelta = timedelta(seconds=1)
    """How long a near copy may be believed after the store was last heard of. It bounds how late a revoke can be seen
    when the push that tells of it is lost; the same on every node, or the longest counts. From 100 ms to 60 s."""

    outage: OutagePolicy = "refuse"
    """What a request that needs its session gets while the store is away. `refuse`: 503. `near`: the near copy, for
    `outage_grace`; a session that was ended just before may be accepted for so long. `anonymous`: nobody is signed in.
    Middleware can say otherwise for single paths."""

    outage_grace: timedelta = timedelta(seconds=60)
    """How long `outage="near"` goes on after the lease has run out. It adds to the reach of every revoke."""

    journal: Path | None = None
    """A directory on this node's disk where a sign-out is kept while the store is away: refused on this node at once,
    and carried out before anything else when the store is back. None: such a sign-out is a 503."""

    replicas: int = 0
    """How many replicas have to confirm the end of a session before it counts (Redis and Valkey, `WAIT`). When they do
    not, the revoke raises StoreUnavailable: repeat it. 0 where losing the primary may lose the latest writes."""

    public_url: str | None = None
    """Where browsers reach the application, as `https://shop.example`. It fixes the cookie's name and attributes and
    the origin that may send unsafe requests. None: https is assumed, and the origin is compared with `Host`."""

    trusted_origins: frozenset[str] = frozenset()
    """Other origins whose pages may send unsafe requests. Each can act as the signed-in user."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of your reverse proxies. Only their `X-Forwarded-For` is believed."""

    binding: BindingPolicy = field(default_factory=BindingPolicy)
    """What of the place of a session counts on every request, and what follows when it is another one."""

    device_cookie: str | None = None
    """Name of the cookie by which your application knows a browser again, for `binding.device`; what `login(device=)`
    gets is `core.device.device_of` of its value. It outlives the session and is set by the application."""

    geography: Geography | None = field(default=None, repr=False)
    """Table of addresses, for `binding.network` `asn` and `country`."""

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

    tokens: TokenSettings | None = None
    """Access and refresh tokens beside the session cookie. None: the session cookie alone."""

    max_sessions_per_subject: int = 100
    """Upper bound whatever `limit` says, so that nobody can fill the store under one account."""

    def __post_init__(self) -> None:
        for name in (
            "idle_timeout",
            "absolute_timeout",
            "store_deadline",
            "rotation_alias",
            "lease",
            "outage_grace",
        ):
            if not isinstance(getattr(self, name), timedelta):
                raise ConfigurationError(f"{name}: a timedelta, such as timedelta(minutes=30)")
        for name in ("idle_timeout", "absolute_timeout"):
            value: timedelta = getattr(self, name)
            if not timedelta(seconds=1) <= value <= _YEAR:
                raise ConfigurationError(f"{name}: from 1 second to 400 days")
        if self.idle_timeout > self.absolute_timeout:
            raise ConfigurationError("idle_timeout: must not be longer than absolute_timeout")
        if not timedelta(milliseconds=100) <= self.lease <= timedelta(seconds=60):
            raise ConfigurationError("lease: from 0.1 to 60 seconds")
        if self.outage not in get_args(OutagePolicy):
            raise ConfigurationError(f"outage: one of {', '.join(get_args(OutagePolicy))}")
        if not timedelta(0) <= self.outage_grace <= timedelta(hours=1):
            raise ConfigurationError("outage_grace: from 0 to 3600 seconds")
        if self.outage == "near" and not self.near_copies:
            raise ConfigurationError("outage: near needs near_copies")
        if self.near_copies < 0 or self.near_octets < 1 or self.replicas < 0:
            raise ConfigurationError("near_copies, near_octets, replicas: not negative, and room for something")
        if not timedelta(0) <= self.rotation_alias <= timedelta(seconds=30):
            raise ConfigurationError("rotation_alias: from 0 to 30 seconds")
        if self.server_key is not None and not (isinstance(self.server_key, bytes) and len(self.server_key) == 32):
            raise ConfigurationError("server_key: exactly 32 bytes; make one with `coatcheck key new`")
        for name in ("max_fields", "max_field_octets", "max_sessions_per_subject"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name}: at least 1")
        if self.limit is not None and self.limit.maximum > self.max_sessions_per_subject:
            raise ConfigurationError("limit: larger than max_sessions_per_subject")
        self._check_binding()
        _ = self.session_cookie, self.origins, self.proxies
        if self.tokens is not None:
            self._check_tokens(self.tokens)

    def _check_binding(self) -> None:
        if not self.binding.compares:
            return
        if self.binding.device and self.device_cookie is None:
            raise ConfigurationError(
                "binding.device: needs device_cookie, the name of the cookie that tells browsers apart"
            )
        if self.binding.device and self.device_cookie is not None:
            _ = CookieSettings(name=self.device_cookie)
            ours = [self.session_cookie, *([] if self.tokens is None else [self.refresh_cookie])]
            if self.device_cookie in {each.name for each in ours}:
                raise ConfigurationError(
                    "device_cookie: another name than that of the session or of its refresh token, which change while "
                    "the browser stays the same"
                )
        if self.outage == "near" and severity(self.binding.on_mismatch) >= severity("block"):
            raise ConfigurationError(
                f"outage: near serves requests that nobody can {self.binding.on_mismatch} while the store is away; set "
                "outage to refuse, or binding.on_mismatch to notify or step_up"
            )
        _ = Surveyor(self.binding, self.geography)

    def _check_tokens(self, tokens: TokenSettings) -> None:
        if tokens.issuer is None and self.public_url is None:
            raise ConfigurationError("tokens.issuer: set it, or public_url, so that verifiers know whom to trust")
        if tokens.access_lifetime > self.idle_timeout:
            raise ConfigurationError(
                "tokens.access_lifetime: must not be longer than idle_timeout, or a token would outlive its session"
            )
        _ = self.refresh_cookie

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
    def issuer(self) -> str:
        """Claim `iss`; empty where tokens are off and no public URL is set."""
        own = None if self.tokens is None else self.tokens.issuer
        return own or (self.public_url or "").rstrip("/")

    @cached_property
    def refresh_cookie(self) -> CookieSettings:
        """The cookie that carries a refresh token: for our own pages alone, out of reach of scripts."""
        given = None if self.tokens is None else self.tokens.refresh_cookie
        if given is None:
            if self.is_https:
                return CookieSettings(name=REFRESH_COOKIE, same_site="Strict")
            return CookieSettings(name=DEVELOPMENT_REFRESH_COOKIE, same_site="Strict", secure=False)
        if given.name == self.session_cookie.name:
            raise ConfigurationError("tokens.refresh_cookie: needs another name than the session cookie")
        if given.secure != self.is_https:
            raise ConfigurationError("tokens.refresh_cookie: secure must be true over https and false over plain http")
        if not given.http_only:
            raise ConfigurationError("tokens.refresh_cookie: http_only must be true, or any script could take it")
        return given

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
        """How much one session may hold, what the library keeps in it for itself included."""
        own, octets = (1, len(PLACES_FIELD) + MAX_PLACES_OCTETS) if self.binding.compares else (0, 0)
        return RecordLimits(octets=self.max_field_octets + octets, fields=self.max_fields + own)

    @cached_property
    def admission(self) -> SessionLimit:
        """The limit of every sign-in that has none of its own."""
        return self.admission_under(self.limit)

    def admission_under(self, limit: SessionLimit | None) -> SessionLimit:
        """What `limit` comes to: nobody ever has more sessions than `max_sessions_per_subject`."""
        if limit is None or limit.on_reached == "allow":
            return SessionLimit(maximum=self.max_sessions_per_subject)
        return replace(limit, maximum=min(limit.maximum, self.max_sessions_per_subject))


def reach_of(settings: Settings) -> timedelta:
    """How late after a revoke a node with these settings may still accept the session (SEMANTICS 1)."""
    if not settings.near_copies:
        return timedelta(0)
    return settings.lease + (settings.outage_grace if settings.outage == "near" else timedelta(0))


def told_after(verifier_lease: float) -> timedelta:
    """How late after a revoke a verifier may still accept an access token (SEMANTICS 1): the lease of the server that
    tells it, and its own, in seconds."""
    return timedelta(seconds=FEED_SERVER_LEASE_SECONDS + verifier_lease)


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
    for name in ("idle_timeout", "absolute_timeout", "store_deadline", "rotation_alias", "lease", "outage_grace"):
        value = environ.get(f"COATCHECK_{name.upper()}")
        if value:
            found[name] = _seconds(name, value)
    for name in ("near_copies", "near_octets", "replicas"):
        value = environ.get(f"COATCHECK_{name.upper()}")
        if value:
            found[name] = _number(name, value)
    if environ.get("COATCHECK_OUTAGE"):
        found["outage"] = environ["COATCHECK_OUTAGE"]
    if environ.get("COATCHECK_JOURNAL"):
        found["journal"] = Path(environ["COATCHECK_JOURNAL"])
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


def _is_identifier(text: object) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= 255 and text.isascii() and text.isprintable() and " " not in text


def _seconds(name: str, value: str) -> timedelta:
    try:
        return timedelta(seconds=float(value))
    except (ValueError, OverflowError) as broken:
        raise ConfigurationError(f"COATCHECK_{name.upper()}: a number of seconds") from broken


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as broken:
        raise ConfigurationError(f"COATCHECK_{name.upper()}: a whole number") from broken


def _secret(environ: Mapping[str, str], name: str) -> str | None:
    path = environ.get(f"{name}_FILE")
    if path:
        try:
            return Path(path).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as broken:
            raise ConfigurationError(f"{name}_FILE: cannot be read") from broken
    return environ.get(name)
