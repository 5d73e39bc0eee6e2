"""A whole server inside the test: real parts on SQLite, a clock to turn, a store that can be switched off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, parse_password
from coatcheck.core.ports import Store
from coatcheck.errors import StoreUnavailable
from coatcheck.server.accounts import Accounts, Role, User
from coatcheck.server.app import create_app
from coatcheck.server.audit import AuditLog
from coatcheck.server.database_port import Database
from coatcheck.server.service import Service, build
from coatcheck.server.settings import JOURNAL, ServerSettings
from coatcheck.testing import DEFAULT_START_US, FakeSystem
from tests.server.account_parts import DIALECTS, opened, url_for

PASSWORD = "tangled lamp under rivers 7"
NEW_PASSWORD = "seven brittle umbrellas hum"
CHROME = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/150.0.0.0 Safari/537.36"
COOKIE = "coatcheck_session"
REFRESH = "coatcheck_refresh"
BROWSER = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8", "user-agent": CHROME}


class Switch:
    """A real part behind a switch: the verbs in `off` (or all, when it is None) fail as if nobody answered.

    A store behind it tells nobody what changes, so nothing keeps near copies of it.
    """

    def __init__(self, part: object) -> None:
        self.part = part
        self.off: frozenset[str] | None = frozenset()

    def __getattr__(self, name: str) -> Any:
        if name == "feed":
            raise AttributeError(name)
        found: Any = getattr(self.part, name)
        if not callable(found) or name in ("open", "close", "peek"):
            return found

        async def verb(*args: Any, **kwargs: Any) -> Any:
            if self.off is None or name in self.off:
                raise StoreUnavailable(f"{name}: switched off by the test", retry_after=3)
            answer: Any = found(*args, **kwargs)
            return await answer

        return verb


def spoil_journal(site: Site) -> None:
    """Let no sign-out be kept on this node: where its directory should be there is a file."""
    (site.service.settings.home / JOURNAL).write_text("in the way")


_HASHED: dict[str, str] = {}


@dataclass(frozen=True, kw_only=True)
class Site:
    """One running server, and whoever visits it."""

    app: Starlette
    service: Service
    clock: FakeSystem
    store: Switch
    accounts: Switch
    first: TestClient
    base_url: str

    def client(self, *, peer: str = "127.0.0.1", headers: Mapping[str, str] | None = None) -> TestClient:
        """A visitor with a cookie jar of its own, in the event loop of the server."""
        made = TestClient(
            self.app,
            base_url=self.base_url,
            raise_server_exceptions=False,
            follow_redirects=False,
            client=(peer, 50_000),
            headers={"user-agent": "curl/8.5.0", **(headers or {})},
        )
        made.portal = self.first.portal
        return made

    def browser(self, **headers: str) -> TestClient:
        """A visitor that wants pages."""
        return self.client(headers={**BROWSER, **{name.replace("_", "-"): text for name, text in headers.items()}})

    def call(self, function: Callable[..., Any], *args: object, **kwargs: object) -> Any:
        """Await a coroutine function in the server's own event loop."""

        async def run() -> Any:
            return await function(*args, **kwargs)

        assert self.first.portal is not None
        return self.first.portal.call(run)

    def add_user(self, name: str = "minsu", *, role: Role = "user", password: str = PASSWORD) -> User:
        """Make an account that can sign in."""
        named = parse_user_name(name)
        secret = parse_password(password, policy=self.service.passwords)
        assert isinstance(named, UserName)
        assert isinstance(secret, Password)
        if password not in _HASHED:
            # Once for all tests of a process: a sign-in still verifies it.
            _HASHED[password] = self.call(self.service.hasher.hash, secret, known_device=True)
        stored = _HASHED[password]
        made = self.call(self.service.accounts.create_user, named, role=role, password_hash=stored)
        assert isinstance(made, User)
        return made

    def signed_in(self, name: str = "minsu", *, peer: str = "127.0.0.1") -> TestClient:
        """A program that has signed in."""
        client = self.client(peer=peer)
        answer = client.post("/api/login", json={"username": name, "password": PASSWORD})
        assert answer.status_code == 200, answer.text
        return client

    def at_account(self, name: str = "minsu", **headers: str) -> TestClient:
        """A browser that has signed in by the form."""
        browser = self.browser(**headers)
        answer = browser.post("/login", data={"username": name, "password": PASSWORD})
        assert answer.status_code == 303, answer.text
        return browser

    def set_up_path(self) -> str:
        """The path of a fresh set-up link."""
        token = self.call(self.service.set_up.issue)
        assert token is not None
        return f"/setup/{token.text}"


MakeSite = Callable[..., Site]


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[MakeSite]:
    """`make_site(public_url=...)` starts a server with these settings; another `seed` draws other random bytes."""
    with ExitStack() as stack:

        def make(*, seed: bytes = b"coatcheck", start_us: int = DEFAULT_START_US, **settings: Any) -> Site:
            clock = FakeSystem(start_us=start_us, seed=seed)
            # Most tests sign one person in several times, in several browsers.
            settings.setdefault("on_limit", "evict_oldest" if "max_sessions" in settings else "allow")
            service = build(ServerSettings(home=tmp_path / "home", **settings), system=clock)
            store, accounts = Switch(service.store), Switch(service.accounts)
            service.coat.engine.store = cast(Store, store)
            service = replace(service, store=cast(Store, store), accounts=cast(Accounts, accounts))
            app = create_app(service)
            base_url = service.settings.browser_url
            first = stack.enter_context(TestClient(app, base_url=base_url, raise_server_exceptions=False))
            return Site(
                app=app, service=service, clock=clock, store=store, accounts=accounts, first=first, base_url=base_url
            )

        yield make


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    """A server on this machine, over http."""
    return make_site()


@pytest.fixture
def b2c(make_site: MakeSite) -> Site:
    """A server on this machine that hands out tokens."""
    return make_site(profile="b2c")


@pytest.fixture(params=DIALECTS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database, once in each dialect."""
    return url_for(request, tmp_path)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """That database, open and migrated; its clock stands still."""
    async with opened(url) as database:
        yield database


@pytest.fixture
def log(database: Database) -> AuditLog:
    """The audit log in it."""
    return AuditLog(database)
