"""Named checks of one installation, each with what was found and the cure.

Decides what is fine, what is weak (`warn`) and what is wrong (`fail`). It looks and changes nothing: no file is made,
no table brought up, and one broken part does not hide the others. Nothing it says may hold a secret.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from coatcheck.core.cookie import CookieSettings
from coatcheck.core.key_ring import KeyRing, unseal_key
from coatcheck.core.network import is_loopback
from coatcheck.core.ports import Store, TokenStore
from coatcheck.core.profiles import PROFILES
from coatcheck.errors import CoatcheckError, MigrationRequired
from coatcheck.operations.keys import read
from coatcheck.server.accounts import Accounts
from coatcheck.server.database import open_database
from coatcheck.server.service import KEY_FILE
from coatcheck.server.settings import JOURNAL, ServerSettings, unknown_variables
from coatcheck.server.upgrade import embedded_file, missing_in_file
from coatcheck.settings import Settings, TokenSettings, reach_of, told_after
from coatcheck.stores.open import open_store
from coatcheck.system import REAL, System

Status = Literal["ok", "warn", "fail"]

WARN_OFFSET: Final = 2.0
FAIL_OFFSET: Final = 30.0
"""Seconds between the store's clock, which decides when a session ends, and this machine's."""

LONGEST_ACCESS: Final = timedelta(hours=1)
"""What an access token may live without a word: so long a revoke goes unheard where nobody follows the feed."""

SHORTEST_TOKEN: Final = 16
_SECOND_US: Final = 1_000_000
_KEY_BYTES: Final = 32
_WIDEST: Final = {4: 8, 6: 16}
_SERVE_MIGRATES: Final = "`coatcheck serve` does that at its start, or run: coatcheck migrate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What one check found. `cure` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    cure: str = ""


async def examine(settings: ServerSettings, *, environ: Mapping[str, str], system: System = REAL) -> tuple[Check, ...]:
    """Run all checks, in the order in which a person would mend things. Raises nothing for what it finds broken."""
    stored = await _store(settings, system)
    return (
        _home(settings),
        _key_file(settings),
        _environment(environ),
        _public_url(settings),
        _cookie(settings),
        _proxies(settings),
        _metrics(settings),
        *_tokens(settings),
        *await _database(settings),
        *stored,
        *_usual_reach(settings, stored),
        _server_key(settings),
        _journal(settings),
    )


# -- this machine --------------------------------------------------------------------------------------------------


def _home(settings: ServerSettings) -> Check:
    return _private("home directory", settings.home, 0o700, absent="it is made at the first start")


def _key_file(settings: ServerSettings) -> Check:
    name = "key file"
    if settings.server_key is not None:
        return Check(name=name, status="ok", found="not needed: server_key is set")
    return _private(name, settings.home / KEY_FILE, 0o600, absent="it is made when it is needed")


def _private(name: str, path: Path, mode: int, *, absent: str) -> Check:
    try:
        found = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return Check(name=name, status="ok", found=f"{path} is not there yet; {absent}")
    except OSError as broken:
        return Check(
            name=name,
            status="fail",
            found=f"{path}: {broken.strerror}",
            cure="let the server's user read it, or choose another place with --home",
        )
    if os.name == "posix" and found & 0o077:
        return Check(
            name=name, status="fail", found=f"others can use {path} (mode {found:04o})", cure=f"chmod {mode:o} {path}"
        )
    return Check(name=name, status="ok", found=f"{path} is for its owner alone")


def _environment(environ: Mapping[str, str]) -> Check:
    given = {name for name in environ if name.startswith("COATCHECK_")}
    unknown = unknown_variables(environ)
    if unknown:
        # A mistyped name is a setting that silently stays at its default.
        return Check(
            name="environment",
            status="warn",
            found=f"no setting of the server: {', '.join(unknown)}",
            cure="correct the name, or unset it; `coatcheck config show` lists the settings",
        )
    return Check(name="environment", status="ok", found=f"{len(given)} settings from COATCHECK_*")


# -- how browsers reach us -----------------------------------------------------------------------------------------


def _public_url(settings: ServerSettings) -> Check:
    url = urlsplit(settings.browser_url)
    address = f"{url.scheme}://{url.hostname}"
    if url.scheme == "https":
        return Check(name="public address", status="ok", found=address)
    cure = "put a proxy with TLS in front and set public_url to its https address"
    if is_loopback(url.hostname or "") and is_loopback(settings.host):
        return Check(name="public address", status="warn", found=f"{address}, for this machine alone", cure=cure)
    return Check(
        name="public address",
        status="fail",
        found=f"{address}: anybody on the way can read passwords and take cookies",
        cure=cure,
    )


def _cookie(settings: ServerSettings) -> Check:
    try:
        # What is wrong with tokens is told by their own check.
        cookie = _without_tokens(settings).sessions(None).session_cookie
    except CoatcheckError as wrong:
        return Check(name="session cookie", status="fail", found=wrong.detail, cure="correct the setting it names")
    default = CookieSettings()
    weaker = [
        text
        for text, is_weaker in (
            ("without Secure", default.secure and not cookie.secure),
            ("readable by scripts", default.http_only and not cookie.http_only),
            ("sent by other sites' pages", cookie.same_site == "None"),
            ("for a whole domain", cookie.domain is not None),
            ("without the __Host- prefix", not cookie.name.startswith("__Host-")),
        )
        if is_weaker
    ]
    if weaker:
        return Check(
            name="session cookie",
            status="warn",
            found=f"{cookie.name} is {', '.join(weaker)}",
            cure="an https public_url gives the cookie its full protection",
        )
    return Check(name="session cookie", status="ok", found=cookie.name)


def _proxies(settings: ServerSettings) -> Check:
    name = "trusted proxies"
    wide = [text for text in settings.trusted_proxies if _is_wide(text)]
    if wide:
        return Check(
            name=name,
            status="warn",
            found=f"{', '.join(wide)} covers many machines, and each can invent client addresses",
            cure="name the proxies alone",
        )
    if settings.trusted_proxies:
        return Check(name=name, status="ok", found=", ".join(settings.trusted_proxies))
    if urlsplit(settings.browser_url).scheme == "https":
        return Check(
            name=name,
            status="warn",
            found="none, though public_url is https: every client has the proxy's address",
            cure="name the proxy with --trusted-proxy",
        )
    return Check(name=name, status="ok", found="none, and none is needed")


def _is_wide(text: str) -> bool:
    network = ip_network(text, strict=False)
    return network.prefixlen < _WIDEST[network.version] and not network.is_loopback


def _metrics(settings: ServerSettings) -> Check:
    if settings.metrics_token is None:
        return Check(name="metrics", status="ok", found="for this machine alone")
    if len(settings.metrics_token) < SHORTEST_TOKEN:
        return Check(
            name="metrics",
            status="warn",
            found=f"the token has fewer than {SHORTEST_TOKEN} characters",
            cure="make a longer one, for example with `coatcheck key new`",
        )
    return Check(name="metrics", status="ok", found="for who has the token")


# -- tokens --------------------------------------------------------------------------------------------------------


def _tokens(settings: ServerSettings) -> tuple[Check, ...]:
    name = "tokens"
    if not _carries_tokens(settings):
        return (Check(name=name, status="ok", found=f"the profile {settings.profile} hands out none"),)
    try:
        tokens = settings.sessions(None).tokens or TokenSettings()
    except CoatcheckError as wrong:
        return (Check(name=name, status="fail", found=wrong.detail, cure="correct the setting it names"),)
    return (
        Check(name=name, status="ok", found=f"handed out by the profile {settings.profile}"),
        _algorithm(tokens),
        _access_lifetime(tokens),
        _reuse_grace(tokens),
    )


def _algorithm(tokens: TokenSettings) -> Check:
    name = "token algorithm"
    if tokens.algorithm == "HS256":
        return Check(
            name=name,
            status="warn",
            found="HS256 has no public key, so no Verifier can be used: this server alone can check tokens",
            cure="take ES256 with --token-algorithm, unless no other service checks tokens",
        )
    return Check(name=name, status="ok", found=tokens.algorithm)


def _access_lifetime(tokens: TokenSettings) -> Check:
    name = "access token lifetime"
    found = f"{tokens.access_lifetime.total_seconds():g} s"
    if tokens.access_lifetime > LONGEST_ACCESS:
        return Check(
            name=name,
            status="warn",
            found=f"{found}: so long a stolen token is good wherever revocations are not followed",
            cure="shorten it with --access-lifetime; a client refreshes without anybody noticing",
        )
    return Check(name=name, status="ok", found=found)


def _reuse_grace(tokens: TokenSettings) -> Check:
    name = "reuse grace"
    if not tokens.reuse_grace:
        return Check(
            name=name,
            status="warn",
            found="0 s: who loses one answer to a refresh is signed out, and so is who has two tabs",
            cure="leave --reuse-grace at its default",
        )
    return Check(name=name, status="ok", found=f"{tokens.reuse_grace.total_seconds():g} s")


def _carries_tokens(settings: ServerSettings) -> bool:
    return PROFILES[settings.profile].carries_tokens


def _without_tokens(settings: ServerSettings) -> ServerSettings:
    """The same sessions under a profile that hands out no tokens."""
    profile = PROFILES[settings.profile]
    return replace(
        settings,
        profile="admin",
        idle_timeout=profile.idle_timeout if settings.idle_timeout is None else settings.idle_timeout,
        absolute_timeout=profile.absolute_timeout if settings.absolute_timeout is None else settings.absolute_timeout,
    )


async def _key_ring(settings: ServerSettings, store: TokenStore, system: System) -> tuple[Check, ...]:
    """The keys that sign, as they stand in an open store."""
    name = "key ring"
    if not _carries_tokens(settings):
        return ()
    try:
        _, ring = await read(store)
    except CoatcheckError as wrong:
        cure = "see that the store is whole; a ring that is damaged comes back from a backup alone"
        return (Check(name=name, status="fail", found=wrong.detail, cure=cure),)
    if not ring.keys:
        return (Check(name=name, status="ok", found="there is none yet; the first server makes it"),)
    try:
        server_key = _key_of(settings)
    except CoatcheckError as wrong:
        return (Check(name=name, status="fail", found=wrong.detail, cure="correct the setting it names"),)
    cure = "give this server the key that the servers before it had; without it every token they signed is lost"
    if server_key is None:
        return (Check(name=name, status="fail", found="sealed, and there is no server key here", cure=cure),)
    foreign = sum(unseal_key(key, server_key=server_key) is None for key in ring.keys)
    if foreign:
        found = f"{foreign} of {len(ring.keys)} keys were sealed under another server key: this server cannot start"
        return (Check(name=name, status="fail", found=found, cure=cure),)
    readable = Check(name=name, status="ok", found=f"{len(ring.keys)} keys, all readable with this server key")
    return (readable, *key_checks(ring, settings, now=system.now_us() / _SECOND_US))


def key_checks(ring: KeyRing, settings: ServerSettings, *, now: float) -> tuple[Check, ...]:
    """Whether the keys of a ring take turns as they should; `now` is Unix seconds."""
    try:
        tokens = settings.sessions(None).tokens or TokenSettings()
    except CoatcheckError:
        # Told by another check already.
        return ()
    return (_signing_key(ring, tokens, now), *_waiting_key(ring, tokens, now))


def _signing_key(ring: KeyRing, tokens: TokenSettings, now: float) -> Check:
    name = "signing key"
    signing = ring.signing(now)
    if signing is None:
        return Check(
            name=name,
            status="warn",
            found="no key's time has come: one server's clock is ahead, or this machine's behind",
            cure="let all machines take the time from NTP",
        )
    age = now - signing.signs_at
    found = f"{signing.algorithm}, signs since {_span(age)}"
    if age > tokens.key_period.total_seconds():
        return Check(
            name=name,
            status="warn",
            found=f"{found}, and its turn is {_span(tokens.key_period.total_seconds())}",
            cure="any server rotates at its next request; is one running? else: coatcheck key rotate",
        )
    return Check(name=name, status="ok", found=found)


def _waiting_key(ring: KeyRing, tokens: TokenSettings, now: float) -> tuple[Check, ...]:
    waiting = ring.waiting(now)
    if waiting is None:
        return ()
    name = "waiting key"
    left = waiting.signs_at - now
    found = f"{waiting.kid[:16]} signs in {_span(left)}"
    if left > tokens.publish_ahead.total_seconds():
        return (
            Check(
                name=name,
                status="warn",
                found=f"{found}, and {_span(tokens.publish_ahead.total_seconds())} would do: who published it has a "
                "clock that is ahead, and until then no other key can be",
                cure=f"let all machines take the time from NTP, then: coatcheck key retire {waiting.kid}",
            ),
        )
    return (Check(name=name, status="ok", found=found),)


def _key_of(settings: ServerSettings) -> bytes | None:
    """The server key as a server here would have it; makes none. Raises: ConfigurationError."""
    given = _without_tokens(settings).sessions(None).server_key
    if given is not None or not _is_embedded(settings):
        return given
    try:
        found = (settings.home / KEY_FILE).read_bytes()
    except OSError:
        return None
    return found if len(found) == _KEY_BYTES else None


def _span(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} s"


# -- what is kept --------------------------------------------------------------------------------------------------


async def _database(settings: ServerSettings) -> tuple[Check, ...]:
    name = "database"
    try:
        file = embedded_file(settings.database_url)
        if file is not None and not file.exists():
            cure = "`coatcheck serve` makes it; is --home or --database right?"
            return (Check(name=name, status="warn", found=f"{file} is not there yet", cure=cure),)
        database = open_database(settings.database_url, namespace=settings.namespace)
        try:
            await database.open()
            try:
                await database.check()
            except MigrationRequired as missing:
                return (_not_migrated(name, missing, embedded=file is not None),)
            administrator = await _administrator(Accounts(database))
        finally:
            await database.close()
    except CoatcheckError as wrong:
        return (_unreachable(name, wrong),)
    return (
        Check(name=name, status="ok", found=f"{database.dialect}, reachable and up to date"),
        administrator,
    )


async def _administrator(accounts: Accounts) -> Check:
    name = "administrator"
    if await accounts.has_active_administrator():
        return Check(name=name, status="ok", found="there is one")
    if await accounts.has_administrator():
        # No set-up link comes back by disabling: that would hand the server to whoever reads its terminal next.
        cure = "coatcheck user enable NAME, or: coatcheck user add NAME --role admin"
        return Check(name=name, status="warn", found="every administrator is disabled", cure=cure)
    cure = "open the set-up link that `coatcheck serve` shows, or: coatcheck user add NAME --role admin"
    return Check(name=name, status="warn", found="there is none yet", cure=cure)


async def _store(settings: ServerSettings, system: System) -> tuple[Check, ...]:
    name = "store"
    try:
        file = embedded_file(settings.store_url)
        if file is not None and not file.exists():
            cure = "`coatcheck serve` makes it; is --home or --store right?"
            return (Check(name=name, status="warn", found=f"{file} is not there yet", cure=cure),)
        if file is not None:
            return await _store_file(name, settings, system)
        store = _opening(settings)
        try:
            await store.open()
            return await _open_store(name, settings, store, system)
        finally:
            await store.close()
    except MigrationRequired as missing:
        return (_not_migrated(name, missing, embedded=False),)
    except CoatcheckError as wrong:
        return (_unreachable(name, wrong),)


async def _store_file(name: str, settings: ServerSettings, system: System) -> tuple[Check, ...]:
    # Not by opening the store at once: that would bring the file up to date, and a doctor changes nothing.
    missing = await missing_in_file(settings)
    if missing:
        found = f"sqlite, needs {', '.join(missing)}"
        return (Check(name=name, status="warn", found=found, cure=_SERVE_MIGRATES),)
    fine = Check(name=name, status="ok", found="sqlite, reachable and up to date, on this machine's clock")
    kept = Check(name="durability", status="ok", found="the end of a session is on the disk before it is answered")
    looked = (fine, kept, *_no_replicas(settings, "SQLite"))
    if not _carries_tokens(settings):
        return looked
    store = _opening(settings)
    try:
        await store.open()
        return (*looked, *await _key_ring(settings, store, system))
    finally:
        await store.close()


def _opening(settings: ServerSettings) -> Store:
    deadline = settings.store_deadline.total_seconds()
    return open_store(settings.store_url, colour="async", namespace=settings.namespace, deadline=deadline)


async def _open_store(name: str, settings: ServerSettings, store: Store, system: System) -> tuple[Check, ...]:
    if not store.shared:
        return (
            Check(
                name=name,
                status="warn",
                found="sessions are kept in memory: every restart signs everybody out",
                cure="leave store out to keep them in the database, or name a server",
            ),
        )
    return (
        Check(name=name, status="ok", found=f"{settings.store_url.partition(':')[0]}, reachable"),
        await clock_check(store.ping, system),
        *await _durability(settings, store),
        *await _key_ring(settings, store, system),
    )


async def clock_check(ping: Callable[[], Awaitable[int]], system: System) -> Check:
    """How far the store's clock is from this machine's; what the round trip may hide is in favour of the clock.

    Raises: StoreUnavailable.
    """
    before = system.now_us()
    theirs = await ping()
    after = system.now_us()
    # Somewhere between `before` and `after` the store looked at its clock.
    offset = max(before - theirs, theirs - after, 0) / 1_000_000
    found = f"{offset:.1f} s from this machine's"
    cure = "let both machines take the time from NTP"
    if offset > FAIL_OFFSET:
        return Check(name="store clock", status="fail", found=found, cure=cure)
    if offset > WARN_OFFSET:
        return Check(name="store clock", status="warn", found=found, cure=cure)
    return Check(name="store clock", status="ok", found=found)


# -- what a revoke is worth ----------------------------------------------------------------------------------------


async def _durability(settings: ServerSettings, store: Store) -> tuple[Check, ...]:
    """Whether a shared store may forget the end of a session, and how late others hear of it."""
    if settings.store_url.partition(":")[0].lower() in ("postgresql", "postgres"):
        kept = await _in_postgresql(settings)
        return (kept, *_no_replicas(settings, "PostgreSQL"))
    # Its driver need not be installed where no such store is used.
    from coatcheck.stores.redis import RedisStore
    from coatcheck.stores.redis.durability import findings

    sessions = _sessions(settings)
    if not isinstance(store, RedisStore) or sessions is None:
        return ()
    looked = findings(
        await store.durability(),
        replicas=settings.replicas,
        lease=sessions.lease.total_seconds() if sessions.near_copies else 0.0,
        reach=reach_of(sessions).total_seconds(),
        usual=_reach_in_words(sessions),
    )
    return tuple(Check(name=each.name, status=each.status, found=each.found, cure=each.cure) for each in looked)


_POSTGRESQL_SETTINGS: Final = (
    "SELECT current_setting('fsync'), current_setting('full_page_writes'), current_setting('synchronous_commit'), "
    "current_setting('synchronous_standby_names'), (SELECT count(*) FROM pg_stat_replication)"
)


async def _in_postgresql(settings: ServerSettings) -> Check:
    database = open_database(settings.store_url, namespace=settings.namespace)
    try:
        await database.open()
        ((fsync, full_pages, commit, names, standbys),) = await database.fetch(_POSTGRESQL_SETTINGS)
    finally:
        await database.close()
    following = standbys if isinstance(standbys, int) else 0
    return judge_postgresql(str(fsync), str(full_pages), str(commit), str(names), standbys=following)


def judge_postgresql(fsync: str, full_pages: str, commit: str, names: str, *, standbys: int) -> Check:
    """What the settings of a PostgreSQL store mean; the worst first."""
    name = "durability"
    if fsync != "on":
        found = "fsync is off: a machine that loses power may lose or damage everything"
        return Check(name=name, status="fail", found=found, cure="fsync = on")
    if full_pages != "on":
        found = "full_page_writes is off: a machine that loses power may damage what is stored"
        return Check(name=name, status="warn", found=found, cure="full_page_writes = on")
    if commit == "off":
        found = (
            "synchronous_commit is off: what was answered may be lost with the machine; ends of sessions are written "
            "as if it were on, users and the audit log are not"
        )
        return Check(name=name, status="warn", found=found, cure="synchronous_commit = on, for this role at least")
    if standbys and (not names or commit == "local"):
        found = f"standbys ({standbys}) are not waited for: a failover may forget the latest revocations"
        cure = "name them in synchronous_standby_names, with synchronous_commit = on"
        return Check(name=name, status="warn", found=found, cure=cure)
    waited = f", and what synchronous_standby_names asks for ({names}) has it" if names else ""
    found = f"the end of a session is on the disk before it is answered{waited}"
    return Check(name=name, status="ok", found=found)


def _no_replicas(settings: ServerSettings, store: str) -> tuple[Check, ...]:
    if not settings.replicas:
        return ()
    found = f"{settings.replicas} should confirm, and {store} is not asked for that"
    cure = "leave --replicas out; synchronous_standby_names is PostgreSQL's own way"
    return (Check(name="replicas", status="warn", found=found, cure=cure),)


def _usual_reach(settings: ServerSettings, stored: tuple[Check, ...]) -> tuple[Check, ...]:
    """How late a revoke is heard, where the store has nothing to add."""
    sessions = _sessions(settings)
    if sessions is None or any(check.name == "reach" for check in stored):
        return ()
    return (Check(name="reach", status="ok", found=_reach_in_words(sessions)),)


def _reach_in_words(sessions: Settings) -> str:
    reach = reach_of(sessions).total_seconds()
    words = "a revoke holds everywhere at once"
    if sessions.near_copies:
        words = f"a revoke holds everywhere within {sessions.lease.total_seconds():g} s"
        if sessions.outage == "near":
            words = f"{words}, on a node without its store within {reach:g} s"
    if sessions.tokens is not None:
        verifiers = told_after(sessions.tokens.verifier_lease.total_seconds()).total_seconds()
        words = f"{words}; for an access token at a verifier within {verifiers:g} s"
    return words


def _sessions(settings: ServerSettings) -> Settings | None:
    """The settings of sessions, or `None` where another check tells what is wrong with them."""
    for each in (settings, _without_tokens(settings)):
        try:
            return each.sessions(None)
        except CoatcheckError:
            continue
    return None


def _journal(settings: ServerSettings) -> Check:
    name, directory = "journal", settings.home / JOURNAL
    # Made with its parents when it is first needed: the nearest of them that is there has to let us.
    present = next((each for each in (directory, *directory.absolute().parents) if each.exists()), directory)
    if not present.is_dir() or not os.access(present, os.W_OK | os.X_OK):
        return Check(
            name=name,
            status="warn",
            found=f"{directory} cannot be written: a sign-out while the store is away is refused",
            cure=f"let the server's user write in {present}, or choose another place with --home",
        )
    when = "" if directory.exists() else ", made when it is first needed"
    return Check(name=name, status="ok", found=f"sign-outs wait in {directory} while the store is away{when}")


def _server_key(settings: ServerSettings) -> Check:
    name = "server key"
    if settings.server_key is not None:
        return Check(name=name, status="ok", found="set")
    if _is_embedded(settings):
        return Check(name=name, status="ok", found=f"{KEY_FILE} in the home directory")
    cure = "make one with `coatcheck key new` and give it to every server by COATCHECK_SERVER_KEY_FILE"
    if _carries_tokens(settings):
        found = "none on a shared store: signing keys cannot be sealed, so a server that hands out tokens cannot start"
        return Check(name=name, status="fail", found=found, cure=cure)
    return Check(
        name=name,
        status="warn",
        found="none on a shared store: a rotated session id ends at once, and a request under way may be refused",
        cure=cure,
    )


def _is_embedded(settings: ServerSettings) -> bool:
    return settings.store_url.partition(":")[0].lower() in ("sqlite", "memory")


def _not_migrated(name: str, missing: MigrationRequired, *, embedded: bool) -> Check:
    found = missing.detail.removeprefix("store: ")
    if embedded:
        return Check(name=name, status="warn", found=found, cure=_SERVE_MIGRATES)
    return Check(name=name, status="fail", found=found, cure="coatcheck migrate")


def _unreachable(name: str, wrong: CoatcheckError) -> Check:
    found = wrong.detail.removeprefix("database: ").removeprefix("store: ")
    return Check(name=name, status="fail", found=found, cure=f"see that it runs, and that --{name} is right")
