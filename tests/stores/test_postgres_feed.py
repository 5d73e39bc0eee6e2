"""The feed of the PostgreSQL store: who is told what, what a line promises, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg.pq import ExecStatus

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import Line
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Activity, Colour
from coatcheck.core.session import SECOND_US
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres import PostgresStore
from coatcheck.stores.postgres.feed import RENEW_SECONDS, PostgresFeed
from coatcheck.stores.postgres.wire import Wire
from coatcheck.system import REAL, System
from coatcheck.testing import FakeSystem
from tests.servers.ports import LOOPBACK
from tests.servers.postgres import Postgres
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.stores.postgres_desk import SHORT, SLACK, Desk, commit, desks, new_session, within

pytestmark = pytest.mark.servers

TAG = 7
LEASE = 30.0
Said = tuple[str, object]


@dataclass(kw_only=True)
class Recorder:
    """A listener that remembers what it was told, and what the line said at that moment."""

    said: list[Said] = field(default_factory=list)
    feed: PostgresFeed | None = None
    confirmed: list[float] = field(default_factory=list)

    def changed(self, handle: str) -> None:
        self._note(("changed", handle))

    def cut_off(self, tag: int) -> None:
        self._note(("cut_off", tag))

    def emptied(self) -> None:
        self._note(("emptied", None))

    def _note(self, said: Said) -> None:
        line = self.feed.line(TAG) if self.feed is not None else None
        self.confirmed.append(float("-inf") if line is None else line.confirmed)
        self.said.append(said)


@dataclass(kw_only=True)
class Post:
    """A desk with a feed, and somebody who listens to it."""

    desk: Desk
    store: PostgresStore
    system: System
    feed: PostgresFeed
    told: Recorder

    def renew(self) -> Line | None:
        return self.desk.run(self.feed.renew(TAG))  # type: ignore[no-any-return]

    def renewed(self) -> Line:
        line = self.renew()
        assert line is not None
        return line

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait, with nobody asking the database for anything: a thread looks, a loop merely runs."""
        end = time.monotonic() + 10.0

        if self.desk.colour == "async":
            self.desk.run(running_until(holds))
        while not holds() and time.monotonic() < end:
            self.feed.drain()
        assert holds()

    def answer(self) -> list[Said]:
        """Everything told up to now: what was committed before a question is told before its answer."""
        self.renewed()
        said, self.told.said[:] = list(self.told.said), []
        return said

    def pass_time(self, seconds: float) -> None:
        """Let time pass, here and in the database."""
        assert isinstance(self.system, FakeSystem)
        self.system.advance(seconds)
        self.desk.clock.offset_us += round(seconds * SECOND_US)

    def forget_failures(self) -> None:
        self.feed._again = float("-inf")


async def running_until(holds: Callable[[], bool]) -> None:
    """Let this loop run until something holds; it may be a thread or a server that makes it so."""
    end = time.monotonic() + 10.0
    while not holds() and time.monotonic() < end:  # noqa: ASYNC110 - nothing in this loop makes it so
        await asyncio.sleep(0.001)
    assert holds()


MakePost = Callable[..., Post]


def store_of(desk: Desk, *, url: str | None, system: System, deadline: float) -> PostgresStore:
    options = StoreOptions(
        colour=desk.colour, waits=waits_of(desk.colour), system=system, deadline=deadline, clock_offset_us=desk.clock
    )
    store = PostgresStore(desk.url if url is None else url, options)
    desk.stores.append(store)
    return store


@contextlib.contextmanager
def posts(colour: Colour, server: Postgres, url: str) -> Iterator[MakePost]:
    feeds: list[PostgresFeed] = []
    made = desks(colour, server, url)
    desk = next(made)
    desk.run(desk.store().migrate())

    def make(
        *, relay: Relay | None = None, system: System = REAL, lease: float = LEASE, deadline: float = 20.0
    ) -> Post:
        address = None if relay is None else relay.address_in(desk.url)
        direct = store_of(desk, url=None, system=system, deadline=20.0)
        told = Recorder()
        feed = store_of(desk, url=address, system=system, deadline=deadline).feed(told, lease=lease)
        feeds.append(feed)
        told.feed = feed
        return Post(desk=desk, store=direct, system=system, feed=feed, told=told)

    try:
        yield make
    finally:
        server.ensure_running()
        for feed in feeds:
            desk.run(feed.close())
        for _ in made:
            pass


@pytest.fixture(params=["blocking", "async"])
def post(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> Iterator[MakePost]:
    with posts(request.param, postgres, postgres_database) as make:
        yield make


@pytest.fixture
def blocking_post(postgres: Postgres, postgres_database: str) -> Iterator[MakePost]:
    with posts("blocking", postgres, postgres_database) as make:
        yield make


# -- who is told what --------------------------------------------------------------------------------------------------


def test_whoever_writes_or_ends_a_session_it_is_told_once_and_before_the_answer(post: MakePost) -> None:
    at = post()
    one, run, sql = new_session(1), at.desk.run, at.desk.sql
    run(at.store.create(one))
    at.renewed()
    handle = one.ref.handle
    rotate = partial(at.store.rotate_id, one.ref, new_digest="n" * 43, sealed=b"sealed", alias_us=SECOND_US)
    writes: list[Callable[[], object]] = [
        lambda: run(commit(at.store, one)),
        lambda: run(rotate(old_digest=one.digest)),
        lambda: sql("UPDATE coatcheck_sessions SET subject = 'somebody else'"),
        lambda: run(at.store.revoke(one.ref, reason="logout")),
        lambda: sql("DELETE FROM coatcheck_sessions"),
    ]
    for write in writes:
        write()
        assert at.answer() == [("changed", handle)]


def test_what_a_replica_applies_is_told_too(post: MakePost) -> None:
    at, one = post(), new_session(1)
    at.desk.run(at.store.create(one))
    at.renewed()
    with psycopg.connect(at.desk.url, autocommit=True) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("DELETE FROM coatcheck_sessions")
    assert at.answer() == [("changed", one.ref.handle)]


def test_activity_a_new_session_and_what_changes_nothing_are_not_told(post: MakePost) -> None:
    at, one = post(), new_session(1)
    at.renewed()
    run = at.desk.run
    run(at.store.create(one))
    run(at.store.create(one))
    run(at.store.touch([Activity(ref=one.ref, owner=one.owner, seen_us=2**60)]))
    run(at.store.expire_idle(one.ref))
    run(at.store.revoke(SessionRef(TAG, "h" * 16), reason="logout"))
    at.desk.sql("UPDATE coatcheck_sessions SET seen_us = seen_us + 1, due_us = due_us + 1")
    with psycopg.connect(at.desk.url) as connection:
        connection.execute("DELETE FROM coatcheck_sessions")
        connection.rollback()
    assert at.answer() == []


def test_a_session_that_gives_way_to_another_is_told(post: MakePost) -> None:
    at, one, two, three = post(), *(new_session(number) for number in range(3))
    at.desk.run(at.store.create(one))
    at.renewed()
    at.desk.run(at.store.admit(two, maximum=1, on_limit="evict_oldest"))
    assert at.answer() == [("changed", one.ref.handle)]
    at.desk.run(at.store.admit(three, maximum=9, on_limit="refuse", supersedes=two.ref))
    assert at.answer() == [("changed", two.ref.handle)]


def test_signing_a_subject_out_tells_its_tag_even_where_no_session_is_left(post: MakePost) -> None:
    at, one, two = post(), new_session(1), new_session(2)
    for each in (one, two):
        at.desk.run(at.store.create(each))
    at.renewed()
    at.desk.run(at.store.revoke_owner(TAG, one.owner, reason="logout", keep=two.ref))
    assert at.answer() == [("changed", one.ref.handle), ("cut_off", TAG)]
    for tag in (0, 65535):
        at.desk.run(at.store.revoke_owner(tag, "p" * 43, reason="logout"))
    assert at.answer() == [("cut_off", 0), ("cut_off", 65535)]


def test_an_emptied_table_is_told(post: MakePost) -> None:
    at = post()
    at.desk.run(at.store.create(new_session(1)))
    at.renewed()
    at.desk.sql("TRUNCATE coatcheck_sessions")
    assert at.answer() == [("emptied", None)]


@pytest.mark.parametrize(
    "message", ["", "s", "s" + "h" * 15, "s" + "h" * 17, "s" + "\u00e9" * 16, "o", "o-1", "o999999"]
)
def test_a_message_that_cannot_be_understood_throws_everything_away(blocking_post: MakePost, message: str) -> None:
    at = blocking_post()
    at.renewed()
    at.desk.sql("SELECT pg_notify('coatcheck_feed', %s)", message)
    assert at.answer() == [("emptied", None)]


def test_another_name_space_and_the_proof_of_another_feed_say_nothing(post: MakePost) -> None:
    at = post()
    at.renewed()
    post().renewed()
    at.desk.sql("SELECT pg_notify('other_feed', 'x')")
    assert at.answer() == []


def test_a_handle_of_any_length_can_be_deleted(post: MakePost) -> None:
    at = post()
    at.desk.run(at.store.create(new_session(1)))
    at.renewed()
    # More than a message holds, and no compression makes it short enough for an index to be in the way.
    at.desk.sql("UPDATE coatcheck_sessions SET handle = repeat('h', 9000)")
    assert at.answer() == [("changed", new_session(1).ref.handle), ("changed", "h" * 16)]
    at.desk.sql("DELETE FROM coatcheck_sessions")
    assert at.answer() == [("changed", "h" * 16)]


def test_a_change_is_heard_without_any_request(post: MakePost) -> None:
    at, one = post(), new_session(1)
    at.desk.run(at.store.create(one))
    at.renewed()
    at.desk.sql("DELETE FROM coatcheck_sessions")
    at.until(lambda: at.told.said == [("changed", one.ref.handle)])


# -- what a line promises ----------------------------------------------------------------------------------------------


def test_an_answer_counts_from_when_it_was_asked_for(post: MakePost, relay: Callable[[int], Relay]) -> None:
    system = FakeSystem()
    between = relay(post().desk.server.port)
    at = post(relay=between, system=system)
    line = at.renewed()
    assert (line.confirmed, line.until) == (0.0, LEASE)
    at.pass_time(10.0)
    between.hold()
    assert at.renew() is None
    at.pass_time(LEASE - 10.0)
    # The lease is over, the line is not: one answer makes it good again.
    assert at.feed.line(TAG) is line
    assert not line.is_fresh(system.elapsed())
    between.forward()
    at.until(lambda: line.confirmed == 10.0)
    assert line.is_fresh(system.elapsed())
    assert at.feed.line(TAG) is line


def test_what_was_sent_before_the_answer_is_told_before_the_line_is_confirmed(
    post: MakePost, relay: Callable[[int], Relay]
) -> None:
    system, one = FakeSystem(), new_session(1)
    between = relay(post().desk.server.port)
    at = post(relay=between, system=system)
    at.desk.run(at.store.create(one))
    line = at.renewed()
    at.pass_time(10.0)
    between.hold()
    for name in "abc":
        at.desk.run(commit(at.store, one, name))
    assert at.renew() is None
    between.forward()
    at.until(lambda: line.confirmed == 10.0)
    # Message and answer arrived together.
    assert at.told.said == [("changed", one.ref.handle)] * 3
    assert at.told.confirmed == [0.0] * 3


def test_a_renewal_with_an_old_answer_still_due_asks_again_if_that_is_too_old(
    post: MakePost, relay: Callable[[int], Relay]
) -> None:
    system = FakeSystem()
    between = relay(post().desk.server.port)
    at = post(relay=between, system=system)
    line = at.renewed()
    at.pass_time(1.0)
    between.hold()
    assert at.renew() is None
    at.pass_time(LEASE)
    between.forward()
    at.forget_failures()
    # The answer to the first question arrives, and vouches for a moment that is over.
    assert at.renew() is line
    assert line.confirmed == LEASE + 1.0


@pytest.mark.parametrize("step", [-3.5, -1.0, 1.0, 3.5])
def test_a_stepped_clock_cuts_the_line(post: MakePost, step: float) -> None:
    at = post()
    line = at.renewed()
    at.desk.clock.offset_us = round(step * SECOND_US)
    after = at.renewed()
    assert (after is line, line.broken) == ((True, False) if abs(step) < 2 else (False, True))
    # The same store all the same: a profile that serves through an outage may go on.
    assert after.source == line.source
    assert not line.voided


def test_tables_that_were_made_anew_are_another_store(post: MakePost) -> None:
    at = post()
    line = at.renewed()
    at.desk.sql("DROP SCHEMA public CASCADE")
    at.desk.sql("CREATE SCHEMA public")
    assert at.renew() is None
    assert line.broken
    at.desk.run(at.store.migrate())
    at.forget_failures()
    after = at.renewed()
    assert after.source != line.source
    # What was learned under it may be wrong altogether.
    assert line.voided


def test_a_trigger_that_is_off_ends_the_near_copy_and_is_said_once(
    post: MakePost, caplog: pytest.LogCaptureFixture
) -> None:
    at = post()
    line = at.renewed()
    at.desk.sql("ALTER TABLE coatcheck_cuts DISABLE TRIGGER coatcheck_feed_cut")
    with caplog.at_level(logging.ERROR, "coatcheck"):
        for _ in range(3):
            at.forget_failures()
            assert at.renew() is None
    assert (line.broken, line.voided) == (True, True)
    assert at.feed.line(TAG) is None
    (record,) = caplog.records
    assert "no near copy" in record.getMessage()
    at.desk.sql("ALTER TABLE coatcheck_cuts ENABLE ALWAYS TRIGGER coatcheck_feed_cut")
    # It is not tried at each request.
    assert at.renew() is None
    at.forget_failures()
    at.renewed()


def test_a_role_without_its_password_is_said_once_and_without_the_password(
    blocking_post: MakePost, caplog: pytest.LogCaptureFixture
) -> None:
    at = blocking_post()
    url = at.desk.url.replace("postgres@", "nobody-of-this-name:hunter2@")
    feed = store_of(at.desk, url=url, system=REAL, deadline=20.0).feed(at.told, lease=LEASE)
    for _ in range(3):
        feed._again = float("-inf")
        assert run_blocking(feed.renew(TAG)) is None
    assert all("hunter2" not in record.getMessage() for record in caplog.records)


def test_a_replica_is_not_believed_and_a_promoted_one_is_another_store(
    blocking_post: MakePost, caplog: pytest.LogCaptureFixture
) -> None:
    at = blocking_post()
    server, line = at.desk.server, at.renewed()
    signal = server._data / "standby.signal"
    signal.touch()
    owner = server._data.stat()
    shutil.chown(signal, owner.st_uid, owner.st_gid)
    server.restart()

    def refused() -> bool:
        at.forget_failures()
        assert at.renew() is None
        return "replica" in caplog.text

    try:
        # It is starting up for a moment yet.
        until(refused, within=20.0, what="a replica to answer")
        assert line.broken
    finally:
        at.desk.sql("SELECT pg_promote()")
    at.forget_failures()
    after = at.renewed()
    assert after.source != line.source
    assert line.voided


class Scripted:
    """What libpq makes of what arrives: notifications are put aside whenever it looks, up to the next answer."""

    def __init__(self, *reads: list[object]) -> None:
        self.reads, self.arrived, self.noted = list(reads), list[object](), list[bytes]()
        self.nonblocking, self.socket, self.ssl_in_use, self.backend_pid = 0, -1, False, 1

    def send_query(self, question: bytes) -> None:
        pass

    def flush(self) -> int:
        return 0

    def consume_input(self) -> None:
        self.arrived += self.reads.pop(0)

    def notifies(self) -> Any:
        self._parse()
        return SimpleNamespace(extra=self.noted.pop(0)) if self.noted else None

    def _parse(self) -> None:
        while self.arrived and isinstance(self.arrived[0], bytes):
            self.noted.append(self.arrived.pop(0))  # type: ignore[arg-type]

    def is_busy(self) -> bool:
        self._parse()
        return not self.arrived

    def get_result(self) -> Any:
        result = self.arrived.pop(0)
        if result == "ready":
            return None
        return SimpleNamespace(status=ExecStatus.TUPLES_OK, ntuples=1, nfields=1, get_value=lambda row, column: b"yes")


@pytest.mark.parametrize(
    "reads",
    [
        [[b"one", "answer", b"two", "ready"]],
        [[b"one", "answer"], [b"two", "ready"]],
        [[b"one"], ["answer"], [b"two"], ["ready"]],
        [[b"one", "answer", b"two"], ["ready"]],
    ],
)
def test_however_the_octets_arrive_an_answer_comes_after_what_stands_before_the_servers_ready(
    reads: list[list[object]],
) -> None:
    told: list[bytes] = []
    pgconn = Scripted(*reads)
    wire = Wire(SimpleNamespace(pgconn=pgconn), told.append, None)  # type: ignore[arg-type]
    wire.ask(b"SELECT 1")
    for _ in reads[:-1]:
        assert wire.read() is None
    assert wire.read() == ("yes",)
    assert told == [b"one", b"two"]


# -- poolers -----------------------------------------------------------------------------------------------------------


class Pooler:
    """Carries one connection after the other, as a pooler does: under a number of its own, or without messages."""

    def __init__(self, target: int, *, drop_messages: bool, own_number: bool) -> None:
        self._drop_messages, self._own_number, self._target = drop_messages, own_number, target
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10.0)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, socket.create_connection((LOOPBACK, self._target)) as server:
                    # Neither encryption of the connection is offered.
                    while len(first := client.recv(65536)) == 8:
                        client.sendall(b"N")
                    server.sendall(first)
                    back = threading.Thread(target=self._answer, args=(server, client), daemon=True)
                    back.start()
                    with contextlib.suppress(OSError):
                        while data := client.recv(65536):
                            server.sendall(data)
                    with contextlib.suppress(OSError):
                        server.shutdown(socket.SHUT_RDWR)
                    back.join(10.0)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError), server.makefile("rb") as stream:
            while head := stream.read(5):
                body = stream.read(struct.unpack(">I", head[1:])[0] - 4)
                if self._own_number and head[:1] == b"K":
                    body = struct.pack(">I", 999_999) + body[4:]
                if not (self._drop_messages and head[:1] == b"A"):
                    client.sendall(head + body)


@pytest.mark.parametrize("fault", ["drop_messages", "own_number"])
def test_behind_a_pooler_there_is_no_near_copy_and_one_loud_line(
    post: MakePost, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    at = post()
    faults = {"drop_messages": False, "own_number": False, fault: True}
    pooler = Pooler(at.desk.server.port, **faults)
    try:
        url = at.desk.url.replace(str(at.desk.server.port), str(pooler.port))
        feed = store_of(at.desk, url=url, system=REAL, deadline=20.0).feed(at.told, lease=LEASE)
        for _ in range(2):
            feed._again = float("-inf")
            assert at.desk.run(feed.renew(TAG)) is None
            assert feed.line(TAG) is None
    finally:
        pooler.close()
    # Threads that other tests have left may say something of their own.
    assert len([record for record in caplog.records if "pooler" in record.getMessage()]) == 1


# -- connections that end, and servers that are silent -----------------------------------------------------------------


def test_a_connection_ended_by_an_administrator_cuts_the_line_and_the_next_renewal_makes_a_new_one(
    post: MakePost,
) -> None:
    at = post()
    line = at.renewed()
    at.desk.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'coatcheck feed'")
    at.until(lambda: line.broken)
    assert at.feed.line(TAG) is None
    after = at.renewed()
    assert after is not line
    assert after.source == line.source
    assert at.feed.line(TAG) is after


def test_a_renewal_that_finds_its_connection_dead_makes_a_new_one_at_once(post: MakePost) -> None:
    at = post()
    line = at.renewed()
    at.desk.server.restart()
    after = at.renewed()
    assert (line.broken, after.broken) == (True, False)


def test_a_server_that_is_away_costs_one_attempt_now_and_then(post: MakePost, relay: Callable[[int], Relay]) -> None:
    between = relay(post().desk.server.port)
    at = post(relay=between)
    line = at.renewed()
    between.refuse()
    pauses = []
    for _ in range(12):
        at.forget_failures()
        assert at.renew() is None
        pauses.append(at.feed._again - time.monotonic())
    assert line.broken
    assert pauses[0] <= 0.01
    assert 0.2 <= pauses[-1] <= 0.5
    between.forward()
    accepted = between.accepted
    # The pause is not over.
    assert at.renew() is None
    assert between.accepted == accepted
    at.forget_failures()
    at.renewed()


def test_a_frozen_server_never_holds_a_renewal_past_its_bound(post: MakePost) -> None:
    at = post(deadline=SHORT)
    line = at.renewed()
    at.desk.server.freeze()
    began = time.monotonic()
    assert at.renew() is None
    assert SHORT / 4 * 0.9 <= time.monotonic() - began < SHORT / 4 + SLACK
    # Shortly after a failure nobody waits again.
    within(0.1, lambda: at.renew() is None)
    assert at.feed.line(TAG) is line
    # Silent for a whole deadline: it is given up, and the attempt to have another is bounded too.
    until(lambda: time.monotonic() - began > SHORT, within=5.0, what="the deadline")
    at.forget_failures()
    within(SHORT / 4 + SLACK, lambda: at.renew())
    assert line.broken
    assert at.feed.line(TAG) is None
    at.desk.server.thaw()
    at.forget_failures()
    at.renewed()


def test_a_renewal_is_bounded_by_a_quarter_of_a_second_too(post: MakePost) -> None:
    at = post(deadline=20.0)
    at.renewed()
    at.desk.server.freeze()
    within(RENEW_SECONDS + SLACK, lambda: at.renew())
    at.forget_failures()
    # A beat may connect for longer, but waits no longer for an answer.
    within(RENEW_SECONDS + SLACK, lambda: at.desk.run(at.feed.beat()))
    at.desk.server.thaw()


def test_one_asks_at_a_time_and_the_others_go_on_at_once(post: MakePost, relay: Callable[[int], Relay]) -> None:
    between = relay(post().desk.server.port)
    at = post(relay=between)
    line = at.renewed()
    between.hold()
    if at.desk.colour == "async":

        async def both() -> tuple[Line | None, Line | None]:
            first = asyncio.ensure_future(at.feed.renew(TAG))
            await asyncio.sleep(0)
            second = await at.feed.renew(TAG)
            assert not first.done()
            between.forward()
            return await first, second

        assert at.desk.run(both()) == (line, None)
        return
    found: list[Line | None] = []
    thread = threading.Thread(target=lambda: found.append(at.renew()))
    thread.start()
    until(at.feed._turn.locked, within=5.0, what="the first to be at it")
    assert at.renew() is None
    between.forward()
    thread.join(10.0)
    assert found == [line]


@pytest.mark.anyio
async def test_a_cancelled_renewal_leaves_the_line_and_its_answer_to_the_next_one(
    postgres: Postgres, postgres_database: str
) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=REAL))
    await store.migrate()
    feed = store.feed(Recorder(), lease=LEASE)
    for turns in range(12):
        task = asyncio.ensure_future(feed.renew(TAG))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    line = await feed.renew(TAG)
    assert line is not None
    postgres.freeze()
    task = asyncio.ensure_future(feed.renew(TAG))
    for _ in range(5):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    postgres.thaw()
    assert await feed.renew(TAG) is line
    await feed.close()
    await store.close()


# -- threads, processes and loops --------------------------------------------------------------------------------------


def test_threads_that_drain_and_renew_at_once_lose_no_message(blocking_post: MakePost) -> None:
    at = blocking_post()
    sessions = [new_session(number, owner="") for number in range(60)]
    for each in sessions:
        run_blocking(at.store.create(each))
    line, done = at.renewed(), threading.Event()

    def drain() -> None:
        while not done.is_set():
            at.feed.drain()
            run_blocking(at.feed.renew(TAG))

    threads = [threading.Thread(target=drain) for _ in range(4)]
    for thread in threads:
        thread.start()
    for each in sessions:
        run_blocking(at.store.revoke(each.ref, reason="logout"))
    done.set()
    for thread in threads:
        thread.join(10.0)
    assert at.renew() is line
    assert at.told.said == [("changed", each.ref.handle) for each in sessions]


FORKING = """
import asyncio, os, sys, time
from coatcheck.blocking import run_blocking
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres import PostgresStore
from coatcheck.system import REAL
import psycopg

class Listener:
    said = []
    changed = cut_off = said.append
    def emptied(self): self.said.append("emptied")

url, colour = sys.argv[1:]
store = PostgresStore(url, StoreOptions(colour=colour, waits=waits_of(colour), system=REAL))
feed = store.feed(Listener(), lease=30.0)

def tell(number):
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_notify('coatcheck_feed', %s)", (f"o{number}",))

async def main():
    line = await feed.renew(7)
    descriptor, wire = feed._wire._descriptor, feed._wire
    # A thread that is in the middle of something at the fork.
    feed._turn.acquire(), feed._reading.acquire()
    turn, reading = feed._turn, feed._reading
    child = os.fork()
    if child == 0:
        good = line.broken and feed.line(7) is None and feed._wire is None
        try:
            os.fstat(descriptor)
            good = False
        except OSError:
            pass
        # The child makes one of its own, in whatever runs there.
        if colour == "blocking":
            other = await feed.renew(7)
            good = good and other is not None and other is not line and feed._wire is not wire
            await feed.close()
        os._exit(0 if good else 1)
    turn.release(), reading.release()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    tell(5)
    same = await feed.renew(7) is line and not line.broken and Listener.said == [5]
    tell(6)
    give_up = time.monotonic() + 10
    while Listener.said != [5, 6] and time.monotonic() < give_up:
        if colour == "blocking":
            feed.drain()
        else:
            await asyncio.sleep(0.001)
    await feed.close()
    return 0 if status == 0 and same and Listener.said == [5, 6] else 10 + status

sys.exit(run_blocking(main()) if colour == "blocking" else asyncio.run(main()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("colour", ["blocking", "async"])
def test_a_fork_cuts_the_childs_line_and_leaves_the_parents_connection_alone(
    postgres_database: str, colour: Colour
) -> None:
    maker = PostgresStore(postgres_database, StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL))
    run_blocking(maker.migrate())
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORKING, postgres_database, colour],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_loop_that_ended_takes_its_line_with_it(postgres_database: str) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=REAL))
    asyncio.run(store.migrate())
    feed = store.feed(Recorder(), lease=LEASE)
    first = asyncio.run(feed.renew(TAG))
    second = asyncio.run(feed.renew(TAG))
    assert first is not None
    assert second is not None
    assert (first.broken, second.broken) == (True, False)
    asyncio.run(feed.close())
    assert second.broken
    asyncio.run(store.close())


def test_another_loop_takes_over_when_the_lease_has_run_out(postgres_database: str) -> None:
    system = FakeSystem()
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=system))
    told = Recorder()
    feed = store.feed(told, lease=1.0)
    with asyncio.Runner() as home:
        home.run(store.migrate())
        line = home.run(feed.renew(TAG))
        assert line is not None

        async def elsewhere(work: Callable[[], Coroutine[Any, Any, Line | None]]) -> Line | None:
            # This loop keeps running while the other one asks.
            return await asyncio.to_thread(lambda: asyncio.run(work()))

        async def heard() -> Line | None:
            taken = await feed.renew(TAG)
            with psycopg.connect(postgres_database, autocommit=True) as connection:
                connection.execute("SELECT pg_notify('coatcheck_feed', 'o5')")
            await running_until(lambda: bool(told.said))
            return taken

        # As long as the lease lasts there is nothing to ask.
        assert home.run(elsewhere(lambda: feed.renew(TAG))) is line
        system.advance(1.0)
        taken = home.run(elsewhere(heard))
        assert taken is not None
        assert (line.broken, taken.broken) == (True, False)
        assert told.said == [("cut_off", 5)]
        # And back again: the descriptors of the first connection are forgotten, whatever their numbers were.
        again = home.run(feed.renew(TAG))
        assert again is not None
        assert taken.broken
        with psycopg.connect(postgres_database, autocommit=True) as connection:
            connection.execute("SELECT pg_notify('coatcheck_feed', 'o6')")

        home.run(running_until(lambda: len(told.said) == 2))
        home.run(feed.close())
        home.run(store.close())


def test_a_closed_feed_has_no_line_and_connects_when_it_is_used_again(post: MakePost) -> None:
    at = post()
    line = at.renewed()
    for _ in range(2):
        at.desk.run(at.feed.close())
    assert line.broken
    assert at.feed.line(TAG) is None
    at.feed.drain()
    assert at.renewed() is not line


def test_a_beat_makes_a_line_and_keeps_it(post: MakePost) -> None:
    system = FakeSystem()
    at = post(system=system)
    assert at.feed.line(TAG) is None
    at.desk.run(at.feed.beat())
    line = at.feed.line(TAG)
    assert line is not None
    at.pass_time(LEASE)
    assert not line.is_fresh(system.elapsed())
    at.desk.run(at.feed.beat())
    assert at.feed.line(TAG) is line
    assert line.confirmed == LEASE
    assert at.feed.slot(TAG) == 0
