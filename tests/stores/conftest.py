"""Every store in both colours, on its real server, as a bench for the tests of this folder.

`BACKENDS` is the one table of stores; a test that takes `bench` runs once a store and colour. A store's module is
imported when its first test runs, so that one that cannot be imported fails its own tests only.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import secrets
import sqlite3
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Colour, Store
from coatcheck.stores.conformance import Bench, Clock
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.system import REAL, System
from tests.servers.postgres import Postgres
from tests.servers.resp import ReplyError

T = TypeVar("T")
COLOURS: tuple[Colour, ...] = ("blocking", "async")


class StoppedSystem:
    """A clock that stands still, for stores that live in this process."""

    def now_us(self) -> int:
        return 1_800_000_000_000_000

    def elapsed(self) -> float:
        return 1000.0

    def random(self, size: int) -> bytes:
        return random.SystemRandom().randbytes(size)


Corruption: TypeAlias = Callable[[str, Any, str, SessionRef, bytes], None]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One kind of store.

    `server` is the fixture of its server; `address` makes a store's URL of it and of a fresh directory; `make` makes
    one store. `stopped`: the store's clock is the system that is handed in. `alone`: nobody else can open the same
    data. `prepare` makes the tables of a new name space. `group`: tests that share one server. `corrupt` writes bytes
    over a session, past the store: it is given URL, server, name space, session and bytes.
    """

    name: str
    make: Callable[[str, StoreOptions], Store]
    server: str | None = None
    address: Callable[[Any, Path], str] = lambda server, directory: ""
    stopped: bool = False
    group: str | None = None
    alone: bool = False
    prepare: Callable[[Any], Coroutine[Any, Any, object]] | None = None
    corrupt: Corruption | None = None


def _memory(url: str, options: StoreOptions) -> Store:
    from coatcheck.stores.memory import MemoryStore

    return MemoryStore(options)


def _sqlite(url: str, options: StoreOptions) -> Store:
    from coatcheck.stores.sqlite import SqliteStore

    return SqliteStore(url, options)


def _postgres(url: str, options: StoreOptions) -> Store:
    from coatcheck.stores.postgres import PostgresStore

    return PostgresStore(url, options)


def _redis(url: str, options: StoreOptions) -> Store:
    from coatcheck.stores.redis import RedisStore

    return RedisStore(url, options)


def _corrupt_sqlite(url: str, server: Any, namespace: str, ref: SessionRef, raw: bytes) -> None:
    columns = ("schema", "version", "digest", "subject", "created_us", "seen_us", "authority", "fields")
    changes = ", ".join(f"{name} = :raw" for name in columns)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        changed = connection.execute(
            f"update {namespace}_sessions set {changes} where tag = :tag and handle = :handle",
            {"raw": raw, "tag": ref.tag, "handle": ref.handle},
        )
        assert changed.rowcount == 1


def _corrupt_postgres(url: str, server: Any, namespace: str, ref: SessionRef, raw: bytes) -> None:
    import psycopg

    # The database keeps the types of its columns whoever writes; inside a text anything may stand but NUL.
    text = raw.decode("latin-1").replace("\x00", "")
    with psycopg.connect(url, autocommit=True) as connection:
        changed = connection.execute(
            f"UPDATE {namespace}_sessions SET fields = to_jsonb(%s::text), authority = %s WHERE handle = %s".encode(),
            (text, text, ref.handle),
        )
        assert changed.rowcount == 1


def _corrupt_redis(url: str, server: Any, namespace: str, ref: SessionRef, raw: bytes) -> None:
    key = f"{namespace}:s:{{{ref.tag:04x}}}{ref.handle}"
    for node in server.primaries:
        # On a Cluster all nodes but one refuse.
        with contextlib.suppress(ReplyError):
            if node.ask("SET", key, raw, "XX", "KEEPTTL") is not None:
                return
    raise AssertionError(f"{key} is nowhere")


BACKENDS = (
    Backend(name="memory", make=_memory, stopped=True, alone=True),
    Backend(
        name="sqlite",
        make=_sqlite,
        stopped=True,
        address=lambda _, directory: f"sqlite:///{directory / 'sessions.db'}",
        corrupt=_corrupt_sqlite,
    ),
    Backend(
        name="postgres",
        make=_postgres,
        server="stores_database",
        prepare=lambda store: store.migrate(),
        address=lambda url, _: url,
        corrupt=_corrupt_postgres,
    ),
    Backend(
        name="valkey",
        make=_redis,
        server="valkey_single",
        address=lambda server, _: server.url,
        corrupt=_corrupt_redis,
    ),
    Backend(
        name="cluster",
        make=_redis,
        server="valkey_cluster",
        address=lambda server, _: server.url,
        group="cluster",
        corrupt=_corrupt_redis,
    ),
    Backend(
        name="sentinel",
        make=_redis,
        server="valkey_sentinel",
        address=lambda server, _: server.url,
        group="cluster",
        corrupt=_corrupt_redis,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A backend in a colour, on its running server: makes benches and runs coroutines over them."""

    backend: Backend
    colour: Colour
    server: Any
    directory: Path
    runner: asyncio.Runner | None
    numbers: Iterator[int]

    def __str__(self) -> str:
        return f"{self.backend.name} {self.colour}"

    @property
    def networked(self) -> bool:
        """Whether each verb is a trip to another process."""
        return self.backend.server is not None

    def bench(self, *, seed: int = 0) -> Bench:
        """A bench on data of its own. Its stores are not open yet."""
        directory = self.directory / f"bench-{next(self.numbers)}"
        directory.mkdir(mode=0o700)
        url = self.backend.address(self.server, directory)
        clock = Clock()
        system: System = StoppedSystem() if self.backend.stopped else REAL
        namespace = f"t{secrets.token_hex(5)}"

        def store() -> Store:
            options = StoreOptions(
                colour=self.colour,
                waits=waits_of(self.colour),
                system=system,
                namespace=namespace,
                # A slow machine must not look like a store that is away.
                deadline=30.0,
                clock_offset_us=clock,
            )
            return self.backend.make(url, options)

        first = store()
        if self.backend.prepare is not None:
            self.run(self.backend.prepare(first))
        write_over = self.backend.corrupt

        async def corrupt(ref: SessionRef, raw: bytes) -> None:
            assert write_over is not None
            write_over(url, self.server, namespace, ref, raw)

        return Bench(
            store=first,
            other=first if self.backend.alone else store(),
            clock=clock,
            stopped=self.backend.stopped,
            seed=seed,
            corrupt=None if write_over is None else corrupt,
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, as the colour does it."""
        if self.runner is None:
            return run_blocking(work)
        return self.runner.run(work)


def places() -> list[Any]:
    """Every backend in every colour, as test parameters."""
    return [
        pytest.param(
            (backend, colour),
            id=f"{backend.name}-{colour}",
            marks=[
                *([pytest.mark.servers] if backend.server else []),
                *([pytest.mark.xdist_group(backend.group)] if backend.group else []),
            ],
        )
        for backend in BACKENDS
        for colour in COLOURS
    ]


@pytest.fixture(scope="session")
def stores_database(postgres: Postgres) -> str:
    """The address of one database for all tests of this folder; each bench has tables of its own in it."""
    # Never dropped: that takes seconds for so many tables, and the server's directory is removed after it anyway.
    return postgres.create_database()


@pytest.fixture(params=places())
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A backend in a colour, ready to make benches."""
    backend, colour = request.param
    server = request.getfixturevalue(backend.server) if backend.server else None
    numbers = itertools.count()
    if colour == "blocking":
        yield Place(backend=backend, colour=colour, server=server, directory=tmp_path, runner=None, numbers=numbers)
        return
    with asyncio.Runner() as runner:
        yield Place(backend=backend, colour=colour, server=server, directory=tmp_path, runner=runner, numbers=numbers)


@pytest.fixture
def long_form(full: bool) -> bool:
    """Whether races run ten times as often."""
    return full or os.environ.get("COATCHECK_TEST_FULL") == "1"
