"""Refresh tokens when answers are lost, processes and servers die, and a backup falls into the wrong hands.

Through the real faces on every durable store. What must hold each time: whoever has the old or the new token stays
signed in, with one family; and what rests in a store opens nothing. A failure names its seed; `--seed N` repeats it.
COATCHECK_TEST_FULL=1 (or `--full`) tries every byte of an answer and kills ten times as often.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
from base64 import b64encode, urlsafe_b64decode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from coatcheck import ConfigurationError, IssuedTokens, RefreshInvalid, StoreUnavailable
from coatcheck.core.ports import FamilyReplayed
from coatcheck.core.refresh_token import FamilyRef, RefreshToken, open_next, parse_refresh_token
from coatcheck.errors import OutcomeUnknown
from tests.servers.postgres import Postgres
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.stores.conftest import Place, places
from tests.stores.test_token_races import (
    GRACE_US,
    SERVER_KEY,
    SETTINGS,
    Nodes,
    accepted,
    attempt,
    do,
    granted,
    kept_families,
    nodes_on,
    sign_in,
)
from tests.web.faces import Store

KILLS = 20


def of(*names: str) -> pytest.MarkDecorator:
    """These stores in both colours."""
    chosen = [each for each in places() if each.values[0][0].name in names]
    return pytest.mark.parametrize("place", chosen, indirect=True)


durable = of("sqlite", "postgres", "valkey", "cluster", "sentinel")


@pytest.fixture(scope="session")
def stores_database(postgres: Postgres) -> str:
    """The address of one database for all tests of this file; each has tables of its own in it."""
    return postgres.create_database()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A backend in a colour on its running server."""
    backend, colour = request.param
    server = request.getfixturevalue(backend.server) if backend.server else None
    with contextlib.nullcontext() if colour == "blocking" else asyncio.Runner() as runner:
        yield Place(
            backend=backend,
            colour=colour,
            server=server,
            directory=tmp_path,
            runner=runner,
            numbers=itertools.count(),
        )


@pytest.fixture
def many(full: bool) -> int:
    """How often the long form repeats what the ordinary one does once."""
    return 10 if full or os.environ.get("COATCHECK_TEST_FULL") == "1" else 1


# -- the answer is lost --------------------------------------------------------------------------------------------


class Cutter(Relay):
    """A relay that can also end a connection within a request."""

    _request_budget: int | None = None

    def cut_request_after(self, request_bytes: int) -> None:
        """Let this many more bytes of requests through, then reset the connection that sends more; once."""

        def order() -> None:
            self._request_budget = request_bytes

        self._do(order)

    def restore(self) -> None:
        """Carry everything again; whatever limit was not reached is gone."""
        self._request_budget = None
        self.forward()

    def _read(self, pair: Any, end: Any) -> None:
        if self._request_budget is None or not end.is_client:
            super()._read(pair, end)
            return
        data = end.socket.recv(65_536)
        if not data:
            end.ended = True
            return
        allowed, self._request_budget = data[: self._request_budget], self._request_budget - len(data)
        self._deliver(pair.server, allowed)
        if len(allowed) < len(data):
            self._request_budget = None
            self._reset(pair)


@asynccontextmanager
async def cutter_before(place: Place) -> AsyncIterator[tuple[Cutter, str]]:
    """A relay in front of the server, and the store's address through it."""
    url = place.backend.address(place.server, place.directory)
    port = int(url.rpartition("@")[2].removeprefix("redis://").split("/")[0].rpartition(":")[2])
    with Cutter(port) as between:
        yield between, between.address_in(url)


@of("valkey", "postgres")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["request", "answer"])
def test_a_connection_cut_at_any_byte_of_an_exchange_signs_nobody_out(
    place: Place, part: str, seed: int, many: int
) -> None:
    """Each round cuts one byte further; the client presents the same token again and goes on with what it gets."""
    dice = random.Random(f"{seed}-{place}-{part}")

    async def play() -> None:
        async with cutter_before(place) as (between, url), nodes_on(place, count=1) as nodes:
            far, near = nodes.all[0], nodes.node(nodes.store(url=url))
            await do(near.start())
            session, issued = await sign_in(near, "ann")
            token, rotations, lost, position = issued.refresh_token, 0, 0, 0
            while True:
                nodes.advance(GRACE_US)
                # The first byte, the last and the ends of what lies between; every byte in the long form.
                (between.cut_request_after if part == "request" else between.reset_after)(position)
                first = await attempt(near, token)
                between.restore()
                rotations += 1
                name = f"{place}, cut after {position} bytes of the {part}, seed {seed}"
                if isinstance(first, IssuedTokens):
                    # The whole of it came through: there is nothing more to cut.
                    granted(first, name)
                    assert lost >= 10, name
                    break
                assert isinstance(first, StoreUnavailable), f"{name}: {first!r}"
                lost += 1
                # By turns: three connections lost in a row would open the near node's breaker.
                again = granted(await attempt((near, far)[rotations % 2], token), name)
                assert again.refresh_token not in (None, token), name
                assert await accepted(far, again.access_token), name
                token = again.refresh_token
                assert nodes.generation(token or "") == rotations + 1, name
                position += 1 if many > 1 or position < 8 else dice.randint(1, 24)
            assert kept_families(nodes) == 1
            assert nodes.events.of("refresh.reused") == []
            await do(nodes.all[0].session(session.cookie_action.id.text).recheck())

    place.run(play())


@of("valkey", "postgres")
def test_an_exchange_that_vanishes_in_the_network_signs_nobody_out(place: Place) -> None:
    """Nothing is ever closed: the deadline ends the wait, with the rotation written or not."""

    async def play() -> None:
        async with cutter_before(place) as (between, url), nodes_on(place, count=1) as nodes:
            near = nodes.node(nodes.store(url=url, deadline=0.3))
            await do(near.start())
            token = (await sign_in(near, "ann"))[1].refresh_token
            for fault in (between.swallow, between.swallow_answers):
                nodes.advance(GRACE_US)
                fault()
                assert isinstance(await attempt(near, token), OutcomeUnknown)
                between.restore()
                again = granted(await attempt(near, token), f"{place}")
                assert again.refresh_token not in (None, token)
                token = again.refresh_token
            assert nodes.generation(token or "") == 3

    place.run(play())


@durable
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_lost_answer_is_made_up_for_by_presenting_the_token_again(place: Place, moment: str) -> None:
    """Four tabs lose their answer at once, and all come again, two of them at another node."""

    async def play() -> None:
        async with nodes_on(place, count=1) as nodes:
            store = Store(nodes.store())
            near, far = nodes.node(store), nodes.all[0]
            await do(near.start())
            token = (await sign_in(near, "ann"))[1].refresh_token
            for generation in range(2, 7):
                nodes.advance(GRACE_US)
                verb = frozenset({"rotate_refresh"})
                store.away, store.answers_lost = (verb, frozenset()) if moment == "before" else (None, verb)
                lost = await nodes.at_once([partial(attempt, near, token) for _ in range(4)])
                assert all(isinstance(each, StoreUnavailable) for each in lost), lost
                store.away, store.answers_lost = None, frozenset()
                again = await nodes.at_once([partial(attempt, (near, far)[n % 2], token) for n in range(4)])
                (token,) = {granted(each, f"{place}").refresh_token for each in again}
                assert token is not None
                assert nodes.generation(token) == generation
            assert kept_families(nodes) == 1
            assert nodes.events.of("refresh.reused") == []

    place.run(play())


@durable
def test_a_successor_nobody_received_is_in_force_only_while_it_can_be_learned(place: Place) -> None:
    """The answer is lost and the client comes back after the grace: RFC 9700 cannot tell it from a thief."""

    async def play() -> None:
        async with nodes_on(place, count=1) as nodes:
            store = Store(nodes.store())
            near = nodes.node(store)
            token = (await sign_in(near, "ann"))[1].refresh_token
            nodes.advance(GRACE_US)
            store.answers_lost = frozenset({"rotate_refresh"})
            assert isinstance(await attempt(near, token), OutcomeUnknown)
            store.answers_lost = frozenset()
            nodes.advance(GRACE_US)
            assert isinstance(await attempt(near, token), RefreshInvalid)
            assert len(nodes.events.of("refresh.reused")) == 1

    place.run(play())


# -- kill -9 -------------------------------------------------------------------------------------------------------

# Starts once and forks a client for each line it is told: "<offset> <most rotations> <token>". The client tells what
# it is about to do and what it got, each in one write, so that what the pipe holds when it dies is the truth.
_CLIENTS = """
import asyncio, os, sys
from datetime import timedelta
from inspect import isawaitable
from coatcheck import AsyncCoatcheck, Coatcheck, CoatcheckError, Settings, TokenSettings
from coatcheck.stores.open import open_store
from coatcheck.system import REAL

url, colour, namespace, key, grace = sys.argv[1:6]
grace, offset = int(grace), 0
# Every driver is imported before the first fork.
open_store(url, colour=colour, namespace=namespace)
settings = Settings(
    public_url="https://id.example", server_key=bytes.fromhex(key), idle_timeout=timedelta(days=7),
    absolute_timeout=timedelta(days=30), tokens=TokenSettings(reuse_grace=timedelta(microseconds=grace)))

class Moved:
    elapsed, random = REAL.elapsed, REAL.random
    def now_us(self):
        return REAL.now_us() + offset

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

async def do(result):
    return await result if isawaitable(result) else result

async def rotate(most, token):
    global offset
    store = open_store(url, colour=colour, namespace=namespace, deadline=20.0, clock_offset_us=lambda: offset)
    coat = (AsyncCoatcheck if colour == "async" else Coatcheck)(store, settings=settings, system=Moved())
    try:
        await do(coat.start())
        for _ in range(most):
            offset += grace
            tell("ask", offset)
            token = (await do(coat.refresh(token))).refresh_token
            tell("got", token)
        await do(coat.close())
    except CoatcheckError as lost:
        tell("lost", type(lost).__name__)

for line in sys.stdin:
    offset, most, token = line.split()
    offset = int(offset)
    child = os.fork()
    if child == 0:
        tell("pid", os.getpid())
        if colour == "async":
            asyncio.run(rotate(int(most), token))
        else:
            from coatcheck.blocking import run_blocking
            run_blocking(rotate(int(most), token))
        os._exit(0)
    tell("over", os.waitpid(child, 0)[1])
"""


@dataclass(frozen=True)
class Told:
    """What one client told before it was over: times it went by, tokens it got, how it lost the store, its status."""

    asked: list[int]
    got: list[str]
    lost: str
    status: int


class Clients:
    """Other processes that rotate one token as fast as they can."""

    def __init__(self, nodes: Nodes) -> None:
        values = (nodes.url, nodes.place.colour, nodes.namespace, SERVER_KEY.hex(), str(GRACE_US))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CLIENTS, *values],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout.fileno()
        self._rest = b""

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(timeout=20)

    def run(self, token: str, *, offset_us: int, most: int, after: int, strike: Callable[[int], object]) -> Told:
        """Start one; once it has got `after` tokens, `strike(its process)`; read on until it is over."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{offset_us} {most} {token}\n".encode())
        asked, got, lost, pid = list[int](), list[str](), "", 0
        struck = False
        while True:
            word, value = self._line().split()
            match word:
                case "pid":
                    pid = int(value)
                case "ask":
                    asked.append(int(value))
                case "got":
                    got.append(value)
                case "lost":
                    lost = value
                case _:
                    return Told(asked, got, lost, int(value))
            if not struck and pid and len(got) >= after:
                struck = True
                strike(pid)

    def wait(self, seconds: float) -> None:
        """Let the client go on for so long, or until it tells something."""
        select.select([self._lines], [], [], seconds)

    def _line(self) -> str:
        while b"\n" not in self._rest:
            data = os.read(self._lines, 65_536)
            assert data, "the clients are gone"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()


@asynccontextmanager
async def a_signed_in_client(place: Place) -> AsyncIterator[tuple[Nodes, Clients, str]]:
    async with nodes_on(place, count=2) as nodes:
        token = (await sign_in(nodes.all[0], "ann"))[1].refresh_token
        assert token is not None
        with closing(Clients(nodes)) as clients:
            yield nodes, clients, token


@durable
@pytest.mark.timeout(900)
def test_a_client_killed_at_any_moment_stays_signed_in_with_one_family(place: Place, seed: int, many: int) -> None:
    dice = random.Random(f"{seed}-{place}-kill")

    async def play() -> None:
        async with a_signed_in_client(place) as (nodes, clients, token):
            for number in range(KILLS * many):
                name = f"{place}, kill {number}, seed {seed}"
                after, pause = dice.choice((0, 1, 1, 2, 5)), dice.uniform(0, 0.02 if number % 4 == 0 else 0.003)

                def strike(pid: int, pause: float = pause) -> None:
                    clients.wait(pause)
                    os.kill(pid, signal.SIGKILL)

                backends = backends_of(nodes)
                told = clients.run(token, offset_us=nodes.clock.offset_us, most=10_000, after=after, strike=strike)
                # What it had sent is still carried out. A request that arrives two rotations later is a replay: here
                # these take milliseconds, so it has to be waited for.
                until(partial(are_gone, nodes, backends), within=10.0, what="the work of a dead client done")
                assert os.WIFSIGNALED(told.status), f"{name}: {told}"
                token = await go_on(nodes, dice, (told.got or [token])[-1], told, name)

    place.run(play())


def backends_of(nodes: Nodes) -> set[int]:
    """The processes that work for clients; of PostgreSQL alone, where each client has one."""
    if nodes.place.backend.name != "postgres":
        return set()
    import psycopg

    with psycopg.connect(nodes.url, autocommit=True) as database:
        found = database.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return {pid for (pid,) in found.fetchall()}


def are_gone(nodes: Nodes, known: set[int]) -> bool:
    """Whether none is left but those that were there before."""
    return backends_of(nodes) <= known


async def go_on(nodes: Nodes, dice: random.Random, token: str, told: Told, name: str) -> str:
    """The last token that was received works: the client learns the successor it may have missed."""
    nodes.clock.offset_us = max([nodes.clock.offset_us, *told.asked])
    if not told.asked:
        nodes.advance(GRACE_US)
    found = granted(await attempt(dice.choice(nodes.all), token), f"{name}: {told.asked[-1:]} {len(told.got)}")
    following = found.refresh_token
    assert following is not None, name
    # It is the same one that is kept when the last answer had just arrived, else the next.
    assert nodes.generation(following) - nodes.generation(token) in (0, 1), name
    nodes.advance(GRACE_US)
    last = granted(await attempt(dice.choice(nodes.all), following), name).refresh_token
    assert last not in (None, following), name
    assert last is not None
    assert kept_families(nodes) == 1, name
    assert nodes.events.of("refresh.reused") == [], name
    return last


@of("valkey", "postgres", "cluster")
@pytest.mark.timeout(600)
def test_a_server_killed_between_rotations_comes_back_with_the_old_or_the_new_token(
    place: Place, request: pytest.FixtureRequest, seed: int, many: int
) -> None:
    """kill -9 of the server; Valkey with `appendfsync always`, which keeps every answered write."""
    dice = random.Random(f"{seed}-{place}-server")
    server = request.getfixturevalue("postgres") if place.backend.name == "postgres" else place.server

    async def play() -> None:
        async with a_signed_in_client(place) as (nodes, clients, token):
            for number in range((1 if place.backend.name == "cluster" else 2) * many):
                name = f"{place}, kill {number}, seed {seed}"
                killed = holder_of(nodes, token)
                if killed is not None:
                    killed.ask("CONFIG", "SET", "appendfsync", "always")
                pause = dice.uniform(0, 0.01)

                def strike(_: int, pause: float = pause, killed: Any = killed) -> None:
                    clients.wait(pause)
                    (server if killed is None else killed).kill()

                told = clients.run(
                    token, offset_us=nodes.clock.offset_us, most=100_000, after=dice.randrange(20), strike=strike
                )
                assert told.lost in ("StoreUnavailable", "OutcomeUnknown"), f"{name}: {told.lost} {told.status}"
                server.ensure_running()
                token = await go_on(nodes, dice, (told.got or [token])[-1], told, name)

    place.run(play())


@of("valkey", "sentinel")
@pytest.mark.timeout(600)
def test_a_server_that_forgets_its_last_second_leaves_the_old_or_the_new_token(
    place: Place, seed: int, many: int
) -> None:
    """Valkey with `appendfsync everysec`, and a failover to a replica that may lag: an answered rotation can be lost.

    A client that keeps the token before until the new one has worked loses nothing. What the store forgot is no reuse.
    """
    dice = random.Random(f"{seed}-{place}-second")

    async def play() -> None:
        async with a_signed_in_client(place) as (nodes, clients, token):
            # Sentinels let seconds pass between two failovers, so there is one of them.
            for number in range(1 if place.backend.name == "sentinel" else 2 * many):
                name = f"{place}, kill {number}, seed {seed}"
                killed = settle(place)
                if place.backend.name == "valkey":
                    killed.ask("CONFIG", "SET", "appendfsync", "everysec")
                pause = dice.uniform(0, 0.01)

                def strike(_: int, pause: float = pause, killed: Any = killed) -> None:
                    clients.wait(pause)
                    killed.kill()

                told = clients.run(
                    token, offset_us=nodes.clock.offset_us, most=1, after=dice.randrange(2), strike=strike
                )
                if place.backend.name == "sentinel":
                    place.server.await_promotion(next(each for each in place.server.nodes if each is not killed))
                place.server.ensure_running()
                newest = (told.got or [token])[-1]
                nodes.clock.offset_us = max([nodes.clock.offset_us, *told.asked])
                if isinstance(await attempt(nodes.all[0], newest), RefreshInvalid):
                    newest = token
                token = await go_on(nodes, dice, newest, told, name)

    place.run(play())


def holder_of(nodes: Nodes, token: str) -> Any:
    """The Valkey that has the family of this token; `None` for other stores."""
    if nodes.place.backend.name == "postgres":
        return None
    parsed = parse_refresh_token(nodes.all[0].engine.keys, token.encode())
    assert parsed is not None
    if nodes.place.backend.name == "cluster":
        return nodes.place.server.node_of(f"{{{parsed.family.tag:04x}}}")
    return nodes.place.server.primaries[0]


def settle(place: Place) -> Any:
    """The Valkey that takes writes, once all that it has answered so far would outlive it."""
    (primary,) = place.server.primaries
    primary.ask("CONFIG", "SET", "appendfsync", "always")
    if place.backend.name == "sentinel":
        offset = int(primary.ask_fields("INFO", "replication")["master_repl_offset"])
        follower = place.server.replica

        def followed() -> bool:
            return int(follower.ask_fields("INFO", "replication").get("slave_repl_offset", "-1")) >= offset

        until(followed, within=10.0, what="replica up to date")
    return primary


# -- a backup in the wrong hands -----------------------------------------------------------------------------------


def stored_bytes(nodes: Nodes) -> bytes:
    """Everything of this name space at rest, as whoever steals a backup has it."""
    name, place = nodes.namespace, nodes.place
    if place.backend.name == "sqlite":
        directory = Path(nodes.url.removeprefix("sqlite:///")).parent
        return b"\n".join(each.read_bytes() for each in sorted(directory.rglob("*")) if each.is_file())
    found: list[object] = []
    if place.backend.name == "postgres":
        import psycopg

        with psycopg.connect(nodes.url, autocommit=True) as database:
            tables = database.execute("SELECT tablename FROM pg_tables WHERE tablename LIKE %s", (f"{name}\\_%",))
            for (table,) in tables.fetchall():
                for row in database.execute(f'SELECT * FROM "{table}"'.encode()).fetchall():
                    found.extend(row)
    else:
        for server in place.server.primaries:
            for key in server.ask("KEYS", f"{name}:*"):
                found += [key, server.ask("DUMP", key), *contents(server, key)]
            # The append-only file holds every command of this server, this name space's and others'.
            logs = sorted((server.directory.path / "appendonlydir").glob("*"))
            assert logs
            found += [log.read_bytes() for log in logs]
    return b"\n".join(each if isinstance(each, bytes) else str(each).encode() for each in found)


def contents(server: Any, key: bytes) -> list[bytes]:
    """The bare bytes of a key: a dump may pack them."""
    kind = server.ask("TYPE", key)
    match kind if isinstance(kind, str) else kind.decode():
        case "string":
            answer = [server.ask("GET", key)]
        case "hash":
            answer = server.ask("HGETALL", key)
        case "zset":
            answer = server.ask("ZRANGE", key, 0, -1)
        case "stream":
            answer = [part for _, parts in server.ask("XRANGE", key, "-", "+") for part in parts]
        case other:
            raise AssertionError(other)
    return list(answer)


def sealed_in(nodes: Nodes, family: FamilyRef) -> bytes | None:
    """The sealed successor of a family, read past the store."""
    name, place = nodes.namespace, nodes.place
    if place.backend.name == "sqlite":
        with closing(sqlite3.connect(nodes.url.removeprefix("sqlite:///"))) as connection:
            found = connection.execute(f"select sealed from {name}_families where name = ?", (family.name,))
            (sealed,) = found.fetchone()
    elif place.backend.name == "postgres":
        import psycopg

        with psycopg.connect(nodes.url, autocommit=True) as database:
            # Wherever the tables keep it: it need not be a column of the family.
            where = database.execute(
                "SELECT table_name FROM information_schema.columns WHERE column_name = 'sealed' AND table_name LIKE %s",
                (f"{name}\\_%",),
            ).fetchall()
            ((table,),) = where
            row = database.execute(f'SELECT sealed FROM "{table}" WHERE name = %s'.encode(), (family.name,))
            (sealed,) = row.fetchone() or (None,)
    else:
        key = f"{name}:n:{{{family.tag:04x}}}{family.root}:{family.name}"
        found_at = [server.ask("GET", key) for server in place.server.primaries if server.ask("KEYS", key)]
        sealed = found_at[0] if found_at else None
    assert sealed is None or isinstance(sealed, bytes)
    return sealed


def forms_of(token: str) -> dict[str, bytes]:
    """Every form in which a refresh token, or the secret in it, could rest somewhere."""
    raw = urlsafe_b64decode(token)
    secret = raw[24:57]
    return {
        "text": token.encode(),
        "secret text": token[32:76].encode(),
        "bytes": raw,
        "secret bytes": secret,
        "hexadecimal": raw.hex().encode(),
        "secret hexadecimal": secret.hex().encode(),
        "base64": b64encode(raw),
        "secret base64": b64encode(secret),
    }


@durable
def test_an_old_backup_and_a_spent_token_open_nothing(place: Place) -> None:
    """Attack: take the bytes right after a rotation, and the token that it spent; what is missing is the key."""

    async def play() -> None:
        async with nodes_on(place, count=1) as nodes:
            coat = nodes.all[0]
            tokens = [(await sign_in(coat, "ann"))[1].refresh_token]
            for _ in range(2):
                nodes.advance(GRACE_US)
                tokens.append(granted(await attempt(coat, tokens[-1]), f"{place}").refresh_token)
            keys = coat.engine.keys
            known = [parse_refresh_token(keys, (each or "").encode()) for each in tokens]
            first, spent, current = (each for each in known if each is not None)
            backup, sealed = stored_bytes(nodes), sealed_in(nodes, spent.family)

            assert current.digest.encode() in backup, "the search finds what is there"
            assert sealed is not None
            for each in (first, spent, current):
                for form, octets in forms_of(each.text).items():
                    assert octets not in backup, f"a refresh token is at rest as {form}"
            assert SERVER_KEY not in backup
            assert SERVER_KEY.hex().encode() not in backup
            opened = open_next(keys, spent, sealed, server_key=SERVER_KEY)
            assert opened == current, "with the key its holder reads it"
            # All that the backup holds, and what a careless server might have taken for a key.
            guesses = [b"", bytes(32), keys.tag_key, keys.check_key, sealed[:32], spent.text.encode()[:32]]
            guesses += [each.digest.encode() for each in (first, spent, current)]
            for guess in guesses:
                assert open_next(keys, spent, sealed, server_key=guess) is None
            for holder in (first, current, replace_text(current, spent)):
                assert open_next(keys, holder, sealed, server_key=SERVER_KEY) is None, "not with another token either"
            await restored(nodes, spent)

            # Used: from now on not even the key helps.
            assert isinstance(await attempt(coat, current.text), IssuedTokens)
            assert sealed_in(nodes, spent.family) is None

    place.run(play())


def replace_text(other: RefreshToken, spent: RefreshToken) -> RefreshToken:
    """A token that claims to be the spent one, with another secret."""
    return RefreshToken(other.text, spent.family, spent.generation)


async def restored(nodes: Nodes, spent: RefreshToken) -> None:
    """The data under a server of the thief's with a key of its own: no ring, and no replay that it could open."""
    thief = replace(nodes, settings=replace(SETTINGS, server_key=b"what a thief might have for a key"[:32]), all=[])
    node = thief.node(thief.store())
    with pytest.raises(ConfigurationError, match="server_key"):
        await do(node.start())
    store = thief.store()
    await store.open()
    answer = await store.rotate_refresh(
        spent.family,
        generation=spent.generation,
        digest=spent.digest,
        successor="a" * 43,
        sealed=b"",
        grace_us=GRACE_US,
        client="",
        key="",
    )
    await store.close()
    await do(node.close())
    await do(node.engine.store.close())
    assert isinstance(answer, FamilyReplayed)
    assert answer.sealed is not None
    keys = nodes.all[0].engine.keys
    assert open_next(keys, spent, answer.sealed, server_key=thief.settings.server_key or b"") is None
