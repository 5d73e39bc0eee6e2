"""A server that does not answer is left alone, found again, and never charged with what others did.

One deadline for all store work of a request, too: what a frozen server may cost is spent once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest

from coatcheck import deadlines
from coatcheck.blocking import run_blocking
from coatcheck.core.breaker import FAILURES, REST_SECONDS
from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.ports import Changes, Colour, Committed, Ended, Live, RecordLimits, Revoked, Store
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.conformance import together
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres import PostgresStore
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.sqlite import SqliteStore
from coatcheck.system import REAL
from tests.servers.ports import LOOPBACK
from tests.servers.postgres import Postgres
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeySingle

DEADLINE = 0.5
# What a busy machine may add before a test calls a moment missed.
ROOM = 0.4
RECOVERY_SECONDS = 2.0
WIDE = RecordLimits(octets=1 << 16, fields=100)
SILENT = "not asked: it has been silent for"

servers = pytest.mark.servers
cluster = pytest.mark.xdist_group("cluster")


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    chosen: Colour = request.param
    return chosen


@dataclass(kw_only=True)
class Caller:
    """Makes stores and calls their verbs, in one colour."""

    colour: Colour
    namespace: str
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    made: list[Store]

    def store(self, url: str, *, deadline: float = DEADLINE) -> Store:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=REAL,
            namespace=self.namespace,
            deadline=deadline,
        )
        kinds: dict[str, Callable[[str, StoreOptions], Store]] = {"sqlite": SqliteStore, "postgresql": PostgresStore}
        self.made.append(kinds.get(url.partition(":")[0], RedisStore)(url, options))
        return self.made[-1]

    def opened(self, url: str, **options: Any) -> Store:
        store = self.store(url, **options)
        self.run(store.open())
        return store

    def failing(self, work: Coroutine[Any, Any, object]) -> StoreUnavailable:
        with pytest.raises(StoreUnavailable) as caught:
            self.run(work)
        return caught.value

    def all_failing(self, verb: Callable[[], Coroutine[Any, Any, object]], times: int = FAILURES) -> list[str]:
        """What so many calls at once end with, which cost no more than one."""

        async def failing() -> str:
            try:
                await verb()
            except StoreUnavailable as error:
                return str(error)
            return "answered"

        async def all_of_them() -> list[str]:
            return await together(self.colour, [failing] * times)

        answers: list[str] = self.run(all_of_them())
        return answers

    def silenced(self, store: Store, new: NewSession) -> None:
        """Let as many loads get no answer as open a breaker."""
        began = time.monotonic()
        answers = self.all_failing(partial(store.load, new.ref, new.digest))
        assert time.monotonic() - began < DEADLINE + 2 * ROOM
        assert not any(SILENT in answer or answer == "answered" for answer in answers), answers

    def refused_at_once(self, store: Store, new: NewSession) -> None:
        began = time.monotonic()
        for _ in range(10):
            refused = self.failing(store.load(new.ref, new.digest))
            assert SILENT in str(refused)
            assert refused.retry_after == 1
            assert not isinstance(refused, OutcomeUnknown)
        # All ten: less than half of what one would have waited.
        assert time.monotonic() - began < DEADLINE / 2

    def answers_soon(self, store: Store, new: NewSession) -> None:
        """Nothing is done to help it: whoever asks finds it back."""

        def answers() -> bool:
            try:
                return isinstance(self.run(store.load(new.ref, new.digest)), Live)
            except StoreUnavailable:
                return False

        until(answers, within=RECOVERY_SECONDS, what="the store answers again")


@pytest.fixture
def caller(colour: Colour, namespace: str) -> Iterator[Caller]:
    with contextlib.ExitStack() as stack:
        run = run_blocking if colour == "blocking" else stack.enter_context(asyncio.Runner()).run
        caller = Caller(colour=colour, namespace=namespace, run=run, made=[])
        yield caller
        for store in caller.made:
            run(store.close())


@dataclass(frozen=True, kw_only=True)
class Place:
    """One server with one primary."""

    server: Any
    port: int
    url: str


KINDS = [pytest.param("valkey", marks=servers), pytest.param("postgres", marks=servers)]


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest) -> Place:
    return _place(request, request.param)


def _place(request: pytest.FixtureRequest, kind: str) -> Place:
    if kind == "valkey":
        valkey: ValkeySingle = request.getfixturevalue("valkey_single")
        return Place(server=valkey, port=valkey.node.port, url=valkey.url)
    postgres: Postgres = request.getfixturevalue("postgres")
    url: str = request.getfixturevalue("postgres_database")
    caller = _blocking(request.getfixturevalue("namespace"))
    migrated = caller.store(url, deadline=20.0)
    assert isinstance(migrated, PostgresStore)
    run_blocking(migrated.migrate())
    run_blocking(migrated.close())
    return Place(server=postgres, port=postgres.port, url=url)


def _blocking(namespace: str) -> Caller:
    return Caller(colour="blocking", namespace=namespace, run=run_blocking, made=[])


def _new(subject: str = "ann", *, tag: int = 0x1A2B) -> NewSession:
    return NewSession(
        ref=SessionRef(tag, sha256_text(subject.encode())[:16]),
        digest=sha256_text(b"id of " + subject.encode()),
        owner=owner_of("", subject),
        subject=subject,
        idle_us=3600 * SECOND_US,
        absolute_us=86400 * SECOND_US,
        authority="{}",
        fields={"me": f'"{subject}"'},
    )


def _commit(store: Store, new: NewSession) -> Coroutine[Any, Any, object]:
    return store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE)


async def _revoke_urgently(store: Store, new: NewSession) -> Revoked:
    with deadlines.within(None, urgent=True):
        return await store.revoke(new.ref, reason="logout")


# -- a server that is away -----------------------------------------------------------------------------------------


def test_a_frozen_server_is_left_alone_and_found_again(place: Place, caller: Caller) -> None:
    store, new = caller.store(place.url), _new()
    caller.run(store.create(new))
    place.server.freeze()
    caller.silenced(store, new)
    caller.refused_at_once(store, new)
    unsent = caller.failing(_commit(store, new))
    assert not isinstance(unsent, OutcomeUnknown), "what was refused here was never sent"
    place.server.thaw()
    caller.answers_soon(store, new)
    assert isinstance(caller.run(_commit(store, new)), Committed)


def test_a_server_that_was_killed_is_found_again_after_its_restart(place: Place, caller: Caller) -> None:
    store, new = caller.store(place.url), _new()
    caller.run(store.create(new))
    place.server.kill()
    # The first of them meets a connection that broke, the others get none.
    for _ in range(FAILURES):
        assert SILENT not in str(caller.failing(store.load(new.ref, new.digest)))
    caller.refused_at_once(store, new)
    place.server.ensure_running()
    if isinstance(place.server, ValkeySingle):
        # It keeps nothing.
        until(lambda: not isinstance(_outcome(caller, store.create(new)), StoreUnavailable), within=2.0, what="created")
    caller.answers_soon(store, new)


def test_while_it_is_away_one_call_at_a_time_pays_the_deadline(place: Place, caller: Caller) -> None:
    store, new = caller.store(place.url), _new()
    caller.run(store.create(new))
    place.server.freeze()
    caller.silenced(store, new)
    probed: list[list[str]] = []

    def one_probe() -> bool:
        answers = caller.all_failing(partial(store.load, new.ref, new.digest), times=8)
        probes = [answer for answer in answers if SILENT not in answer]
        assert len(probes) <= 1
        probed.append(probes)
        return bool(probes)

    until(one_probe, within=REST_SECONDS + DEADLINE + 2.0, what="a probe")
    assert probed[0] == [], "not before its rest is over"
    caller.refused_at_once(store, new)


def test_a_revoke_passes_an_open_breaker_as_its_probe(place: Place, caller: Caller) -> None:
    store, new = caller.store(place.url), _new()
    caller.run(store.create(new))
    place.server.freeze()
    caller.silenced(store, new)
    assert SILENT in str(caller.failing(store.load(new.ref, new.digest)))
    tried = caller.failing(_revoke_urgently(store, new))
    assert SILENT not in str(tried), "it was sent, or tried to connect"
    caller.refused_at_once(store, new)
    place.server.thaw()
    assert isinstance(caller.run(_revoke_urgently(store, new)), Revoked)
    # And its answer closed the breaker for everybody.
    assert isinstance(caller.run(store.load(new.ref, new.digest)), Ended)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_child_process_begins_with_a_closed_breaker(
    kind: str, request: pytest.FixtureRequest, namespace: str
) -> None:
    place, caller = _place(request, kind), _blocking(namespace)
    store, new = caller.store(place.url), _new()
    place.server.freeze()
    caller.silenced(store, new)
    assert SILENT in str(caller.failing(store.load(new.ref, new.digest)))
    place.server.thaw()
    child = os.fork()
    if child == 0:
        try:
            run_blocking(store.ping())
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run_blocking(store.close())


# -- what does not count -------------------------------------------------------------------------------------------


def test_a_request_with_no_time_to_spare_opens_nothing(
    place: Place, caller: Caller, relay: Callable[[int], Relay]
) -> None:
    # Somebody else took the request's time; what is left is too little for a server in perfect health.
    between = relay(place.port)
    store, new = caller.store(_through(between, place), deadline=20.0), _new()
    caller.run(store.create(new))
    between.hold()

    async def hurried() -> object:
        with deadlines.within(time.monotonic() + 0.02):
            return await store.load(new.ref, new.digest)

    for _ in range(FAILURES + 2):
        assert SILENT not in str(caller.failing(hurried()))
    between.forward()
    assert isinstance(caller.run(store.load(new.ref, new.digest)), Live)


@servers
def test_a_connection_that_breaks_in_use_opens_nothing(
    valkey_single: ValkeySingle, caller: Caller, relay: Callable[[int], Relay]
) -> None:
    between = relay(valkey_single.node.port)
    store, new = caller.store(between.address_in(valkey_single.url)), _new()
    caller.run(store.create(new))
    for _ in range(FAILURES + 2):
        between.reset_after(0)
        assert isinstance(caller.failing(_commit(store, new)), OutcomeUnknown)
    between.forward()
    assert isinstance(caller.run(store.load(new.ref, new.digest)), Live)


@servers
def test_a_write_that_a_replica_refuses_opens_nothing(caller: Caller, valkey_single: ValkeySingle) -> None:
    store, new = caller.store(valkey_single.url), _new()
    caller.run(store.create(new))
    valkey_single.node.ask("REPLICAOF", LOOPBACK, "1")
    try:
        for _ in range(FAILURES + 2):
            assert "READONLY" in str(caller.failing(_commit(store, new)))
    finally:
        valkey_single.node.ask("REPLICAOF", "NO", "ONE")
    assert isinstance(caller.run(_commit(store, new)), Committed)


@servers
def test_a_lock_that_somebody_holds_opens_nothing(caller: Caller, postgres_database: str) -> None:
    store, new = caller.store(postgres_database), _new()
    assert isinstance(store, PostgresStore)
    caller.run(store.migrate())
    caller.run(store.create(new))
    with psycopg.connect(postgres_database) as holder:
        holder.execute(f"SELECT * FROM {caller.namespace}_sessions FOR UPDATE".encode())
        for answer in caller.all_failing(partial(_commit, store, new), times=FAILURES + 2):
            assert "timeout" in answer
    assert isinstance(caller.run(_commit(store, new)), Committed)


@servers
def test_a_server_that_refuses_the_connection_by_word_opens_nothing(caller: Caller, postgres: Postgres) -> None:
    store = caller.store(postgres.url_of("no_such_database"))
    for _ in range(FAILURES + 2):
        assert SILENT not in str(caller.failing(store.ping()))


@servers
@pytest.mark.anyio
async def test_a_probe_whose_caller_left_gives_its_place_to_the_next(
    valkey_single: ValkeySingle, namespace: str
) -> None:
    options = StoreOptions(colour="async", waits=waits_of("async"), system=REAL, namespace=namespace, deadline=DEADLINE)
    store, new = RedisStore(valkey_single.url, options), _new()
    await store.create(new)
    valkey_single.freeze()
    await asyncio.gather(*(store.load(new.ref, new.digest) for _ in range(FAILURES)), return_exceptions=True)
    first = asyncio.ensure_future(_revoke_urgently(store, new))
    for _ in range(20):
        await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match=SILENT):
        await _revoke_urgently(store, new)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    valkey_single.thaw()
    assert isinstance(await _revoke_urgently(store, new), Revoked)
    await store.close()


# -- one primary among several -------------------------------------------------------------------------------------


@servers
@cluster
def test_one_dead_primary_neither_slows_nor_refuses_the_slots_of_the_others(
    valkey_cluster: ValkeyCluster, caller: Caller
) -> None:
    store = caller.store(valkey_cluster.url)
    sessions = [_new(f"user-{n}", tag=n * 1500) for n in range(30)]
    for each in sessions:
        caller.run(store.create(each))
    frozen = valkey_cluster.nodes[0]
    theirs = [each for each in sessions if valkey_cluster.node_of(f"{{{each.ref.tag:04x}}}") is frozen]
    others = [each for each in sessions if each not in theirs]
    assert len(theirs) > 3 < len(others)
    frozen.freeze()
    try:
        caller.silenced(store, theirs[0])
        caller.refused_at_once(store, theirs[1])
        began = time.monotonic()
        for each in others:
            assert isinstance(caller.run(store.load(each.ref, each.digest)), Live)
        assert time.monotonic() - began < DEADLINE
    finally:
        valkey_cluster.thaw()
    caller.answers_soon(store, theirs[0])


@servers
@cluster
def test_a_failover_is_followed_past_an_open_breaker(valkey_sentinel: ValkeySentinel, caller: Caller) -> None:
    store, new = caller.store(valkey_sentinel.url), _new()
    caller.run(store.create(new))
    old, replica = valkey_sentinel.primary, valkey_sentinel.replica
    until(lambda: replica.ask("DBSIZE") == old.ask("DBSIZE"), within=5.0, what="the replica has the session")
    old.freeze()
    try:
        caller.silenced(store, new)
        valkey_sentinel.await_promotion(replica)
        # The breaker is of the old primary's address; the new one has its own.
        caller.answers_soon(store, new)
    finally:
        old.thaw()


# -- one deadline for a request ------------------------------------------------------------------------------------


async def _twice(store: Store, new: NewSession, seconds: float) -> tuple[Exception, Exception, float]:
    """Two verbs of one request, the second of which is tried although the first failed; and how long both took."""
    began = time.monotonic()
    failures: list[Exception] = []
    with deadlines.within(began + seconds):
        for _ in range(2):
            try:
                await _commit(store, new)
            except StoreUnavailable as error:
                failures.append(error)
    took = time.monotonic() - began
    first, second = failures
    return first, second, took


def test_two_verbs_of_one_request_share_one_deadline(place: Place, caller: Caller) -> None:
    # The store alone would wait for twenty seconds each time.
    store, new = caller.store(place.url, deadline=20.0), _new()
    caller.run(store.create(new))
    place.server.freeze()
    first, second, took = caller.run(_twice(store, new, DEADLINE))
    place.server.thaw()
    assert isinstance(first, OutcomeUnknown)
    assert "used up its time" in str(second)
    assert took < DEADLINE + ROOM
    assert isinstance(caller.run(_commit(store, new)), Committed), "and the next request has its own"


def test_two_verbs_share_one_deadline_before_a_file_that_is_locked(caller: Caller, tmp_path: Path) -> None:
    store, new = caller.opened(f"sqlite:///{tmp_path / 'sessions.db'}", deadline=2 * DEADLINE), _new()
    caller.run(store.create(new))
    with contextlib.closing(sqlite3.connect(tmp_path / "sessions.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        first, second, took = caller.run(_twice(store, new, DEADLINE))
        other.execute("rollback")
    # Whoever waits for SQLite's lock does so in steps, and may stop a little early.
    assert not isinstance(first, OutcomeUnknown)
    assert "locked" in str(first) or "busy" in str(first)
    assert isinstance(second, StoreUnavailable)
    assert took < DEADLINE + ROOM
    assert isinstance(caller.run(_commit(store, new)), Committed)


def test_a_request_that_has_used_up_its_time_reads_no_file_either(caller: Caller, tmp_path: Path) -> None:
    store, new = caller.opened(f"sqlite:///{tmp_path / 'sessions.db'}"), _new()
    caller.run(store.create(new))

    async def late() -> object:
        with deadlines.within(time.monotonic()):
            return await store.load(new.ref, new.digest)

    assert "used up its time" in str(caller.failing(late()))
    assert isinstance(caller.run(store.load(new.ref, new.digest)), Live)


def _through(between: Relay, place: Place) -> str:
    return between.address_in(place.url)


def _outcome(caller: Caller, work: Coroutine[Any, Any, object]) -> object:
    try:
        return caller.run(work)
    except StoreUnavailable as error:
        return error
