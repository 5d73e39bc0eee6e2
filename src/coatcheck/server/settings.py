"""What an operator chooses: flags, then environment, then `coatcheck.toml`, then defaults.

Decides where each value comes from, which combinations are unsafe, and what is said about it: one line that names the
field and the cure. It opens no file but the settings file and the secrets it is pointed to.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal, cast, get_type_hints
from urllib.parse import quote, urlsplit

from coatcheck.core.forwarded import parse_rules
from coatcheck.core.geo import Geography
from coatcheck.core.network import is_loopback, parse_proxies
from coatcheck.core.ports import OnLimit
from coatcheck.core.profiles import Profile, RoleLimit
from coatcheck.errors import ConfigurationError
from coatcheck.primitives.jwk import Algorithm
from coatcheck.profile_settings import settings_of
from coatcheck.settings import Settings, TokenSettings, parse_server_key

SETTINGS_FILE: Final = "coatcheck.toml"
DATABASE_FILE: Final = "coatcheck.db"
JOURNAL: Final = "journal"
SECRETS: Final = frozenset({"server_key", "metrics_token"})
"""Fields that are never a flag: arguments of a process can be read by everybody on the machine."""

OVERRIDES: Final = (
    "idle_timeout",
    "absolute_timeout",
    "access_lifetime",
    "same_site",
    "max_sessions",
    "on_limit",
    "outage",
    "persistent",
)
"""Settings that take the place of the profile's field of the same name."""

BINDING: Final = {
    "bind_network": "network",
    "bind_user_agent": "user_agent",
    "bind_device": "device",
    "on_mismatch": "on_mismatch",
    "block_for": "block_for",
}
"""Settings that take the place of a member of the profile's binding."""

Source = Literal["flag", "environment", "file", "default"]
_EVERY_ADDRESS: Final = ("0.0.0.0", "::", "")  # noqa: S104 - recognized in order to be refused


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """One server's settings: `COATCHECK_FIELD_NAME`, in the file, and (but for secrets) as a flag of `serve`."""

    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's own needs `public_url` with https."""

    port: int = 8000
    """Port to listen on."""

    home: Path = Path(".coatcheck")
    """Directory for the database and keys, mode 0700."""

    database: str | None = None
    """Users and the audit log: `sqlite:///path` or `postgresql://…`. None: a file in the home directory."""

    store: str | None = None
    """Sessions: any store URL. None: the database."""

    public_url: str | None = None
    """Where browsers reach the server, as `https://id.example`. None: http on the host and port, for this machine."""

    name: str = "Coatcheck"
    """The name people see on pages."""

    namespace: str = "coatcheck"
    """Prefix of everything in the store and of the tables."""

    profile: str = "admin"
    """The decisions in one word: `admin`, `b2c`, `bank`, `microservices` or `oauth` (`coatcheck profile list`)."""

    idle_timeout: timedelta | None = None
    """A session ends after this long without a request; seconds. None: as the profile says."""

    absolute_timeout: timedelta | None = None
    """A session ends this long after sign-in; seconds. None: as the profile says."""

    access_lifetime: timedelta | None = None
    """An access token lives this long; seconds. None: as the profile says."""

    same_site: str | None = None
    """Of the session cookie: `Lax` or `Strict`. None: as the profile says."""

    max_sessions: int | None = None
    """Sessions one person may have at once. None: as the profile says."""

    on_limit: str | None = None
    """What the next sign-in gets then: `allow`, `evict_oldest`, `refuse` or `ask`; `allow` sets the profile's limit
    aside. None: as the profile says."""

    reuse_grace: timedelta = timedelta(seconds=30)
    """How long a refresh token that was just exchanged is forgiven; 0 to 300 seconds."""

    token_algorithm: str = "ES256"  # noqa: S105 - a name, not a secret
    """Signature of access tokens: `ES256`, `EdDSA`, `RS256`, or `HS256` where nobody else verifies them."""

    audiences: tuple[str, ...] = ()
    """Services an access token may be asked for, beside this server itself."""

    store_deadline: timedelta = timedelta(seconds=2)
    """All store work of one request lasts no longer; seconds."""

    near_copies: int = 100_000
    """Sessions of which the server keeps a copy, so that a warm request asks no store; 0: every check asks."""

    lease: timedelta = timedelta(seconds=1)
    """How long a near copy may be believed after the store was last heard of; seconds, the same on every server."""

    outage: str | None = None
    """While the store is away: `refuse`, `near` or `anonymous`. None: as the profile says."""

    outage_grace: timedelta = timedelta(seconds=60)
    """How long `near` goes on when the lease has run out; seconds."""

    replicas: int = 0
    """Replicas that must confirm the end of a session before it counts (Redis and Valkey)."""

    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks of the reverse proxies in front; only their X-Forwarded-For is believed."""

    trusted_origins: tuple[str, ...] = ()
    """Other origins whose pages may send unsafe requests."""

    role_limits: tuple[str, ...] = ()
    """Limits of single roles: `admin=1:refuse` lets an administrator have one session, `guest=allow` guests any number.
    Empty: as the profile says."""

    persistent: bool | None = None
    """Whether the session cookie outlives the browser's window. None: as the profile says."""

    bind_network: str | None = None
    """What of the address a session is bound to: `off`, `exact`, `prefix`, `asn` or `country` (the last two need
    `geo`). None: as the profile says."""

    bind_user_agent: bool | None = None
    """Whether a session is bound to the family of its browser. None: as the profile says."""

    bind_device: bool | None = None
    """Whether a session is bound to the device cookie. None: as the profile says."""

    on_mismatch: str | None = None
    """What follows when one of these differs: `notify`, `step_up`, `block` or `revoke`. None: as the profile says."""

    block_for: int | None = None
    """Seconds for which `block` refuses a place. None: as the profile says."""

    geo: tuple[str, ...] = ()
    """Files with tables of addresses (.mmdb), for countries, operators and travel; the first that tells decides."""

    risk_rules: Path | None = None
    """Rules about risk at sign-in, as TOML (`coatcheck risk replay` tries them on the past). None: as the profile
    says."""

    forward: bool = False
    """Answer gateways at /forward/…: who is signed in on the requests they hold back. Needs `trusted_proxies`."""

    forward_rules: tuple[str, ...] = ()
    """Who else is kept out: `staff=admin+editor` makes /forward/nginx:staff let in who has one of these roles."""

    forward_audience: str | None = None
    """One of `audiences`: the service behind the gateway gets an access token of a minute for it. None: it gets the
    identity headers alone."""

    insecure_http: bool = False
    """Serve plain http beyond this machine. Everybody on the way can take the cookie."""

    server_key: str | None = field(default=None, repr=False)
    """64 hexadecimal digits, the same on every server that shares a store. None: a file in the home directory where
    the store is a file too; on a shared store there is then no key, and a rotated id ends at once."""

    metrics_token: str | None = field(default=None, repr=False)
    """Bearer that may read /metrics from elsewhere. None: this machine alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigurationError("port: from 0 to 65535")
        if not 1 <= len(self.name) <= 60 or not self.name.isprintable():
            raise ConfigurationError("name: 1 to 60 printable characters")
        _ = Profile.named(self.profile)
        parse_proxies(self.trusted_proxies)
        parse_rules(self.forward_rules)
        scheme, local = self._reached_by()
        if scheme == "http" and not local and not self.insecure_http:
            raise ConfigurationError(
                f"host: {self.host} is reachable from elsewhere, so set public_url to an https address and let a "
                "proxy end TLS in front, or give --insecure-http and know that anybody on the way can take the cookie"
            )
        if self.public_url is None and not local and self.host in _EVERY_ADDRESS:
            # Plain http carries no Sec-Fetch-Site beyond this machine: every form would be refused by its Origin.
            raise ConfigurationError(
                f"public_url: {self.host} means every address of this machine, and browsers type only one of them; "
                "set it, for example to http://192.0.2.10:8000"
            )
        if self.store is not None and self.database is None and _is_shared(self.store) and not is_loopback(self.host):
            raise ConfigurationError(
                "database: this store is shared but users would live in a file of this server alone; "
                "set database to postgresql://… so that every server knows the same users"
            )
        if self.store is not None and self.store.lower().startswith("memory:") and not is_loopback(self.host):
            raise ConfigurationError("store: memory: is for trying things on this machine; use a file or a server")

    @property
    def browser_url(self) -> str:
        """The address people type."""
        if self.public_url is not None:
            return self.public_url.rstrip("/")
        host = f"[{self.host}]" if ":" in self.host else self.host
        # Port 0 becomes a real one when the server listens; until then there is none to name.
        return f"http://{host}:{self.port}" if self.port else f"http://{host}"

    @property
    def database_url(self) -> str:
        """Where users are kept."""
        if self.database is not None:
            return self.database
        return f"sqlite:///{quote((self.home / DATABASE_FILE).as_posix())}"

    @property
    def store_url(self) -> str:
        """Where sessions are kept."""
        return self.database_url if self.store is None else self.store

    @property
    def decided(self) -> Profile:
        """The profile with the settings that take the place of its fields.

        Raises: ConfigurationError naming the setting that contradicts the profile or another setting, and the cure.
        """
        profile = Profile.named(self.profile)
        given: dict[str, Any] = {name: value for name in OVERRIDES if (value := getattr(self, name)) is not None}
        bound = {member: value for name, member in BINDING.items() if (value := getattr(self, name)) is not None}
        if self.role_limits:
            given["role_limits"] = tuple(map(_role_limit, self.role_limits))
        if self.on_limit == "allow" and self.max_sessions is None:
            # To allow is to have no limit; the profile's would contradict the operator who has just set it aside.
            given["max_sessions"] = None
        if self.outage is None and profile.outage == "near" and not self.near_copies:
            # Without near copies there is nothing to go on with; a profile's wish is not a mistake of the operator's.
            given["outage"] = "refuse"
        try:
            if bound:
                given["binding"] = replace(profile.binding, **bound)
            return replace(profile, **given)
        except ConfigurationError as wrong:
            raise ConfigurationError(f"{wrong.detail} (profile {self.profile})") from wrong

    def sessions(self, server_key: bytes | None, *, geography: Geography | None = None) -> Settings:
        """The settings of the session engine; `geography` is what `geo` names, opened. Raises: ConfigurationError, also
        for a profile that cannot run yet."""
        profile = self.decided
        if profile.awaits:
            raise ConfigurationError(
                f"profile: {profile.name} needs what this release does not have: {profile.awaits}; take another one, "
                "and set what you want of it by its fields (`coatcheck profile diff`)"
            )
        if profile.carries == "audience_tokens" and not self.audiences:
            raise ConfigurationError(
                f"audiences: the profile {profile.name} has an audience for each service; name them with --audience"
            )
        self._check_forward(profile)
        base = Settings(
            tokens=self._tokens() if profile.carries_tokens else None,
            namespace=self.namespace,
            store_deadline=self.store_deadline,
            near_copies=self.near_copies,
            lease=self.lease,
            outage_grace=self.outage_grace,
            replicas=self.replicas,
            geography=geography,
            journal=self.home / JOURNAL,
            public_url=self.browser_url,
            trusted_origins=frozenset(self.trusted_origins),
            trusted_proxies=self.trusted_proxies,
            insecure_http_for_development=self.insecure_http,
            server_key=parse_server_key(self.server_key) if self.server_key is not None else server_key,
        )
        return settings_of(profile, base)

    def _check_forward(self, profile: Profile) -> None:
        """Raises: ConfigurationError for what must not answer a gateway."""
        if not self.forward:
            if self.forward_rules or self.forward_audience is not None:
                raise ConfigurationError(
                    "forward: is off, so forward_rules and forward_audience change nothing; give --forward as well"
                )
            return
        if not self.trusted_proxies:
            raise ConfigurationError(
                "forward: anybody could ask who is signed in; name the gateway with --trusted-proxy, for example "
                "--trusted-proxy 127.0.0.1"
            )
        if self.forward_audience is None:
            return
        if not profile.carries_tokens:
            raise ConfigurationError(
                "forward_audience: this profile has no keys to sign with; use --profile b2c, or leave it out"
            )
        if self.forward_audience not in self.audiences or self.forward_audience == self.browser_url:
            # A token for this server itself would let the service behind act here as whoever visits it.
            raise ConfigurationError(
                "forward_audience: must be one of audiences, and not this server; add --audience "
                f"{self.forward_audience[:80]}"
            )
        if not self.near_copies:
            raise ConfigurationError("forward_audience: needs near_copies, by which the time of a token is told")

    def _tokens(self) -> TokenSettings:
        return TokenSettings(
            algorithm=cast(Algorithm, self.token_algorithm), reuse_grace=self.reuse_grace, audiences=self.audiences
        )

    def _reached_by(self) -> tuple[str, bool]:
        """The scheme browsers use, and whether they must be on this machine. Raises: ConfigurationError."""
        try:
            url = urlsplit(self.browser_url)
            return url.scheme, is_loopback(self.host) and is_loopback(url.hostname or "")
        except ValueError as broken:
            raise ConfigurationError("public_url: scheme and host alone, as https://id.example") from broken


@dataclass(frozen=True, slots=True)
class Gathered:
    """Settings and where each value came from."""

    settings: ServerSettings
    sources: Mapping[str, Source]


def gather(flags: Mapping[str, object], environ: Mapping[str, str], directory: Path) -> Gathered:
    """Settings from flags, environment and `coatcheck.toml` in `directory` (or `COATCHECK_CONFIG`), in that order.

    A secret can be given as `COATCHECK_<NAME>_FILE`. Raises: ConfigurationError naming the field and its source.
    """
    hints = get_type_hints(ServerSettings)
    known = {each.name for each in fields(ServerSettings)}
    path = Path(environ.get("COATCHECK_CONFIG", directory / SETTINGS_FILE))
    from_file = _read_file(path, required="COATCHECK_CONFIG" in environ)
    unknown = sorted(set(from_file) - known)
    if unknown:
        raise ConfigurationError(f"{path.name}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for name in known:
        given: object = None
        source: Source = "default"
        if flags.get(name) is not None:
            given, source = flags[name], "flag"
        elif (text := _environment(environ, name)) is not None:
            given, source = text, "environment"
        elif name in from_file:
            given, source = from_file[name], "file"
        sources[name] = source
        if given is not None:
            values[name] = _convert(name, given, str(hints[name]), source)
    return Gathered(settings=ServerSettings(**values), sources=sources)


def unknown_variables(environ: Mapping[str, str]) -> tuple[str, ...]:
    """`COATCHECK_*` variables that name no setting: a mistyped one is a setting that silently stays at its default."""
    known = {f"COATCHECK_{each.name.upper()}" for each in fields(ServerSettings)} | {"COATCHECK_CONFIG"}
    given = {name for name in environ if name.startswith("COATCHECK_")}
    return tuple(sorted(name for name in given if name.removesuffix("_FILE") not in known))


def _environment(environ: Mapping[str, str], name: str) -> str | None:
    key = f"COATCHECK_{name.upper()}"
    path = environ.get(f"{key}_FILE")
    if path:
        try:
            return Path(path).read_text("utf-8").strip()
        except (OSError, ValueError) as broken:
            raise ConfigurationError(f"{key}_FILE: cannot be read") from broken
    given = environ.get(key) or None
    if given is None and name in SECRETS and "CREDENTIALS_DIRECTORY" in environ:
        # systemd hands secrets to a service as files of a directory only it can read (LoadCredential=).
        credential = Path(environ["CREDENTIALS_DIRECTORY"]) / f"coatcheck.{name}"
        try:
            return credential.read_text("utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as broken:
            raise ConfigurationError(f"{credential.name}: the credential cannot be read") from broken
    return given


def _read_file(path: Path, *, required: bool) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as missing:
        if not required:
            return {}
        raise ConfigurationError(f"{path}: there is no such file (COATCHECK_CONFIG names it)") from missing
    except OSError as broken:
        raise ConfigurationError(f"{path}: cannot be read: {broken.strerror}") from broken
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as broken:
        raise ConfigurationError(f"{path.name}: {broken}") from broken


def _convert(name: str, given: object, hint: str, source: Source) -> object:
    try:
        if "timedelta" in hint:
            return given if isinstance(given, timedelta) else timedelta(seconds=float(str(given)))
        if "tuple" in hint:
            items = str(given).split(",") if isinstance(given, str) else list(given)  # type: ignore[call-overload]
            return tuple(str(item).strip() for item in items if str(item).strip())
        if hint.endswith("'bool'>") or hint == "bool | None":
            return given if isinstance(given, bool) else _boolean(str(given))
        if hint.endswith("'int'>") or hint == "int | None":
            return int(str(given))
        if "Path" in hint:
            return Path(_text(given))
        return _text(given)
    except (TypeError, ValueError, OverflowError) as broken:
        raise ConfigurationError(f"{name} (from the {source}): not a value for this setting") from broken


def _text(given: object) -> str:
    """Text or a path, as it may reach the operating system."""
    if isinstance(given, Path):
        return str(given)
    if not isinstance(given, str) or "\x00" in given:
        raise TypeError("text is expected")
    return given


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(text)


def _role_limit(text: str) -> RoleLimit:
    """`role=maximum:answer`, or `role=allow`. Raises: ConfigurationError."""
    role, _, rule = text.partition("=")
    number, _, answer = rule.partition(":")
    if not role or (rule != "allow" and not (number.isascii() and number.isdigit() and answer)):
        raise ConfigurationError(
            f"role_limits: {text[:60]!a} is no limit of a role; write admin=1:refuse, or guest=allow"
        )
    if rule == "allow":
        return RoleLimit(role=role, max_sessions=None, on_limit="allow")
    return RoleLimit(role=role, max_sessions=int(number[:9]), on_limit=cast(OnLimit, answer))


def _is_shared(url: str) -> bool:
    return url.partition(":")[0].lower() not in ("memory", "sqlite")
