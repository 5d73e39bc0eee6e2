"""The server's parts, put together once: sessions, accounts, passwords, limits, audit.

The only place that turns settings into parts. It decides the order in which they open and close; the endpoints, the
pages and the command line all take what they need from here.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Final

from coatcheck.core.cookie import CookieSettings
from coatcheck.core.passwords import PasswordPolicy
from coatcheck.core.ports import Store
from coatcheck.core.throttle import ThrottlePolicy
from coatcheck.errors import ConfigurationError, StoreUnavailable
from coatcheck.events import Event, EventKind
from coatcheck.manager import AsyncCoatcheck
from coatcheck.primitives.digest import keyed
from coatcheck.profile_settings import DEVELOPMENT_DEVICE_COOKIE, DEVICE_COOKIE
from coatcheck.server.accounts import Accounts
from coatcheck.server.audit import AuditLog
from coatcheck.server.clients import Clients
from coatcheck.server.continuing import CONTINUE_LIFE
from coatcheck.server.database import open_database
from coatcheck.server.database_port import Database
from coatcheck.server.geo_file import geography_of
from coatcheck.server.metrics import Metrics
from coatcheck.server.one_time import SetUpLinks
from coatcheck.server.password_hashing import PasswordHasher
from coatcheck.server.revocations import DENYING, RevocationFeed
from coatcheck.server.risk_history import RiskHistories
from coatcheck.server.risk_rules import rules_of
from coatcheck.server.risk_watch import RiskWatch
from coatcheck.server.settings import ServerSettings
from coatcheck.server.sign_in_limits import SignInLimits
from coatcheck.stores.open import open_store
from coatcheck.stores.sqlite.key_file import KEY_BYTES, read_or_make_key
from coatcheck.system import REAL, System

log = logging.getLogger("coatcheck.server")

KEY_FILE: Final = "server.key"
MAX_AUDIT_WAITING: Final = 100_000
ANYBODYS: Final[frozenset[EventKind]] = frozenset(
    {
        "session_id.forged",
        "session_id.duplicated",
        "session_id.replaced",
        "request.cross_origin_refused",
        "session.created",
        "store.unavailable",
        "refresh.exchanged",
        "refresh.wrong_holder",
        "token.issued",
    }
)
"""What anybody can cause without signing in, as often as he likes, and what every browser causes many times a day:
counted in the metrics, but never a row of a table that is never emptied, nor in the way of events that matter."""

CONTINUE_COOKIE: Final = "__Host-Http-continue"
DEVELOPMENT_CONTINUE_COOKIE: Final = "coatcheck_continue"


@dataclass(frozen=True, kw_only=True)
class Service:
    """Everything an endpoint may use. Open it before, close it after."""

    settings: ServerSettings
    coat: AsyncCoatcheck
    store: Store
    database: Database
    accounts: Accounts
    hasher: PasswordHasher
    set_up: SetUpLinks
    clients: Clients
    revocations: RevocationFeed
    audit: AuditLog
    metrics: Metrics
    risk: RiskWatch
    passwords: PasswordPolicy
    throttle: ThrottlePolicy
    device_cookie: CookieSettings
    continue_cookie: CookieSettings
    system: System
    _trail: AuditTrail = field(repr=False)
    _tables: ExitStack = field(repr=False)

    async def open(self, *, migrate_files: bool = True) -> None:
        """Connect to everything. An embedded database is brought up to date by itself.

        Raises: StoreUnavailable, MigrationRequired, ConfigurationError.
        """
        try:
            await self.database.open()
            if not self.database.shared and migrate_files:
                await self.database.migrate()
            await self.database.check()
            await self.coat.start()
            await self.hasher.open()
        except BaseException:
            await self.close()
            raise
        self._trail.start()

    async def close(self) -> None:
        """Write what waits, then let go of everything, also of what was opened by halves."""
        async with AsyncExitStack() as behind:
            # Backwards: each step runs whatever became of the one before.
            behind.callback(self._tables.close)
            behind.push_async_callback(self.database.close)
            behind.push_async_callback(self.hasher.close)
            behind.push_async_callback(self._trail.stop)
            behind.push_async_callback(self.risk.settle)
            behind.push_async_callback(self.store.close)
            behind.push_async_callback(self.coat.close)
            behind.push_async_callback(self.revocations.stop)

    @property
    def audit_dropped(self) -> int:
        """Events the audit log never got."""
        return self._trail.dropped

    @property
    def limits(self) -> SignInLimits:
        """Sign-in limits, shared with every server on the same store."""
        return SignInLimits(self.store, policy=self.throttle, key=self._shared_key(b"cc-limit"))

    @property
    def device_key(self) -> bytes:
        """The key of device cookies, the same on every server of one store."""
        return self._shared_key(b"cc-devky")

    @property
    def continue_key(self) -> bytes:
        """Half of what seals a `continue`; the other half is a cookie. The same on every server of one store."""
        return self._shared_key(b"cc-contn")

    def _shared_key(self, purpose: bytes) -> bytes:
        # The store's own keys never change and never leave it, so nothing has to be configured.
        return keyed(b"server", key=self.coat.engine.keys.check_key, size=32, purpose=purpose)


def build(settings: ServerSettings, *, system: System = REAL) -> Service:
    """Make the parts; nothing connects yet. Makes the home directory and the server key where they are needed.

    Raises: ConfigurationError.
    """
    embedded = settings.database is None or settings.server_key is None
    if embedded:
        prepare_home(settings.home)
    server_key = None if settings.server_key is not None else _server_key(settings, system)
    database = open_database(settings.database_url, namespace=settings.namespace, system=system)
    audit = AuditLog(database)
    trail = AuditTrail(audit)
    metrics = Metrics()

    def on_event(event: Event) -> None:
        metrics.count(event)
        if event.kind in DENYING:
            revocations.wake()
        if event.kind not in ANYBODYS:
            trail.add(event)
        risk.hear(event)

    deadline = settings.store_deadline.total_seconds()
    store = open_store(
        settings.store_url,
        colour="async",
        namespace=settings.namespace,
        deadline=deadline,
        replicas=settings.replicas,
        system=system,
    )
    tables = ExitStack()
    geography = tables.enter_context(geography_of([Path(each) for each in settings.geo])) if settings.geo else None
    sessions = settings.sessions(server_key, geography=geography)
    secure = sessions.is_https
    coat = AsyncCoatcheck(store, settings=sessions, on_event=on_event, system=system)
    revocations = RevocationFeed(coat, system=system)
    risk = RiskWatch(
        coat,
        RiskHistories(database, system=system),
        rules=rules_of(settings.profile, settings.risk_rules),
        system=system,
    )
    return Service(
        settings=settings,
        coat=coat,
        clients=Clients(database, system=system),
        revocations=revocations,
        store=store,
        database=database,
        accounts=Accounts(database, system=system),
        hasher=PasswordHasher(system=system),
        set_up=SetUpLinks(database, system=system),
        audit=audit,
        metrics=metrics,
        risk=risk,
        passwords=PasswordPolicy(),
        throttle=ThrottlePolicy(),
        device_cookie=CookieSettings(
            name=DEVICE_COOKIE if secure else DEVELOPMENT_DEVICE_COOKIE,
            secure=secure,
            max_age=timedelta(days=400),
        ),
        continue_cookie=CookieSettings(
            name=CONTINUE_COOKIE if secure else DEVELOPMENT_CONTINUE_COOKIE,
            secure=secure,
            same_site="Strict",
            max_age=CONTINUE_LIFE,
        ),
        system=system,
        _trail=trail,
        _tables=tables,
    )


def prepare_home(home: Path) -> None:
    """Make the home directory for its owner alone. Raises: ConfigurationError when others can enter it."""
    if home.resolve() == Path.cwd():
        raise ConfigurationError("home: must be a directory of its own, not the present one; give --home .coatcheck")
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = home.stat().st_mode
    except OSError as broken:
        raise ConfigurationError(f"home: {home} cannot be made: {broken.strerror}") from broken
    if mode & 0o077:
        raise ConfigurationError(f"home: others can enter {home}; run: chmod 700 {home}")


def _server_key(settings: ServerSettings, system: System) -> bytes | None:
    """The key that opens sealed successors: a file of this machine, unless several machines share the store."""
    if not settings.store_url.startswith(("sqlite", "memory")):
        return None
    # Of two servers that start together on one home, one makes the key and both have the whole of it.
    return read_or_make_key(str(settings.home / KEY_FILE), system.random(KEY_BYTES))


class AuditTrail:
    """Events on their way to the audit log: taken without waiting, written by one task, in order."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit
        self._waiting: list[Event] = []
        self._wake: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def add(self, event: Event) -> None:
        """Take one event; never blocks. A full queue counts what it drops and says so in the log."""
        if len(self._waiting) >= MAX_AUDIT_WAITING:
            self.dropped += 1
            if self.dropped == 1:
                log.error("the audit log cannot be written and its queue is full; events are being dropped")
            return
        self._waiting.append(event)
        if self._wake is not None:
            self._wake.set()

    def start(self) -> None:
        """Begin to write, in the running event loop."""
        self._wake = asyncio.Event()
        self._wake.set()
        self._task = asyncio.get_running_loop().create_task(self._run(self._wake), name="coatcheck-audit")

    async def stop(self) -> None:
        """Write what waits, once more, and end."""
        task, self._task, self._wake = self._task, None, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if not await self._write():
            self.dropped += len(self._waiting)
            log.error("%d events could not be written to the audit log before the end", len(self._waiting))
            self._waiting = []

    async def _run(self, wake: asyncio.Event) -> None:
        while True:
            await wake.wait()
            wake.clear()
            if not await self._write():
                await asyncio.sleep(1)
                wake.set()

    async def _write(self) -> bool:
        taken, self._waiting = self._waiting, []
        if not taken:
            return True
        try:
            await self._audit.append(taken)
        except StoreUnavailable as lost:
            log.warning("the audit log will be written later: %s", lost.detail)
            self._waiting = taken + self._waiting
            return False
        except BaseException:
            self._waiting = taken + self._waiting
            raise
        return True
