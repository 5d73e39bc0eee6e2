"""What the primaries tell a near copy: every cause is heard, and a line is believed no longer than it may be."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socketserver
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import Line
from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.ports import (
    CLOCK_STEP_SECONDS,
    Absent,
    Activity,
    Changes,
    Colour,
    Ended,
    Live,
    RecordLimits,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.calls import all_scripts
from coatcheck.stores.redis.feed import RENEW_SECONDS, RedisFeed, _own_slots, _slots_of
from coatcheck.stores.redis.link import LOST
from coatcheck.stores.redis.nodes import slot_of
from coatcheck.system import REAL
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.servers.resp import RespConnection
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeyServers, ValkeySingle
from tests.servers.valkey_node import ValkeyNode
from tests.stores.test_redis_faults import _give_back
from tests.stores.test_redis_faults import behind_tls as behind_tls

pytestmark = pytest.mark.servers

TAG = 0x1A2B
LEASE = 1.0
# What a busy machine may add to a bound before a test calls it missed.
ROOM = 0.4
WIDE = RecordLimits(octets=1 << 16, fields=100)


@dataclass
class Heard:
    """A listener that remembers what it was told, and what was confirmed then."""

    handles: list[str] = field(default_factory=list)
    tags: list[int] = field(default_factory=list)
    emptied_times: int = 0
    at_a_change: Callable[[], object] = lambda: None

    def changed(self, handle: str) -> None:
        self.handles.append(handle)
        self.at_a_change()

    def cut_off(self, tag: int) -> None:
        self.tags.append(tag)

    def emptied(self) -> None:
        self.emptied_times += 1

    def forget(self) -> None:
        self.handles.clear()
        self.tags.clear()
        self.emptied_times = 0


class Desk:
    """Stores and feeds of one colour, closed after the test."""

    def __init__(self, colour: Colour, namespace: str, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self.colour: Colour = colour
        self.namespace, self.run = namespace, run
        self.offset_us = 0
        self.random = random.Random(namespace)
        self.stores: list[RedisStore] = []

    def store(self, url: str, *, deadline: float = 2.0) -> RedisStore:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=REAL,
            namespace=self.namespace,
            deadline=deadline,
            clock_offset_us=lambda: self.offset_us,
        )
        self.stores.append(RedisStore(url, options))
        return self.stores[-1]

    def fed(self, url: str, *, lease: float = LEASE, deadline: float = 2.0) -> tuple[RedisStore, RedisFeed, Heard]:
        store, heard = self.store(url, deadline=deadline), Heard()
        return store, store.feed(heard, lease=lease), heard

    def line(self, feed: RedisFeed, tag: int = TAG) -> Line:
        """A line that was confirmed, however long that takes a busy machine."""
        found: list[Line] = []

        def confirmed() -> bool:
            line = self.run(feed.renew(tag))
            if line is not None:
                found.append(line)
            return bool(found)

        until(confirmed, within=10.0, what="a confirmed line")
        return found[0]

    def until(self, feed: RedisFeed, question: Callable[[], bool], *, what: str, within: float = 10.0) -> None:
        """Let the feed hear until the answer is yes."""

        def answered() -> bool:
            self.pause()
            feed.drain()
            return question()

        until(answered, within=within, what=what)

    def pause(self) -> None:
        """Let an event loop turn."""
        if self.colour == "async":
            self.run(asyncio.sleep(0.001))

    def new(self, *, tag: int = TAG, owner: str = "ann") -> NewSession:
        return NewSession(
            ref=SessionRef(tag, sha256_text(self.random.randbytes(8))[:16]),
            digest=sha256_text(self.random.randbytes(8)),
            owner=owner_of("", owner),
            subject=owner,
            idle_us=3600 * SECOND_US,
            absolute_us=86400 * SECOND_US,
            authority="{}",
            fields={"me": '"ann"'},
        )


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, namespace: str) -> Iterator[Desk]:
    if request.param == "blocking":
        desk = Desk("blocking", namespace, run_blocking)
        yield desk
        for store in desk.stores:
            run_blocking(store.close())
        return
    with asyncio.Runner() as runner:
        desk = Desk("async", namespace, runner.run)
        yield desk
        for store in desk.stores:
            runner.run(store.close())


def _followers(server: ValkeyServers) -> list[dict[str, str]]:
    """The connections of feeds, as the primaries list them."""
    found: list[dict[str, str]] = []
    for node in server.primaries:
        listing = node.ask("CLIENT", "LIST")
        assert isinstance(listing, bytes)
        for row in listing.decode().splitlines():
            pairs = (item.partition("=") for item in row.split())
            fields = {name: value for name, _, value in pairs}
            if "t" in fields["flags"]:
                found.append(fields)
    return found


def _commit(store: RedisStore, new: NewSession) -> Coroutine[Any, Any, object]:
    return store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE)


# -- every cause is heard ------------------------------------------------------------------------------------------


def test_whatever_ends_or_changes_a_session_is_told(valkey_single: ValkeySingle, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_single.url)
    other = desk.store(valkey_single.url)
    desk.line(feed)
    new = desk.new()
    node, key = valkey_single.node, f"{desk.namespace}:s:{{{TAG:04x}}}{new.ref.handle}"
    desk.run(other.create(new))
    desk.until(feed, lambda: new.ref.handle in heard.handles, what="told of the creation")
    rotation = store.rotate_id(new.ref, old_digest=new.digest, new_digest="d2", sealed=b"s", alias_us=SECOND_US)
    causes: dict[str, Callable[[], object]] = {
        "commit": lambda: desk.run(_commit(other, new)),
        "our own commit": lambda: desk.run(_commit(store, new)),
        "rotate_id": lambda: desk.run(rotation),
        "revoke": lambda: desk.run(other.revoke(new.ref, reason="logout")),
        "an operator's DEL": lambda: node.ask("DEL", key),
        "an operator's SET": lambda: node.ask("SET", key, "x"),
        "an operator's PEXPIRE": lambda: node.ask("PEXPIRE", key, 100_000),
    }
    for what, cause in causes.items():
        heard.forget()
        cause()
        desk.until(feed, lambda: bool(heard.handles), what=f"told of {what}")
        assert set(heard.handles) == {new.ref.handle}
    node.ask("SET", key, "x", "PX", 30)
    desk.until(feed, lambda: len(heard.handles) >= 2, what="told of the write")
    heard.forget()
    # Asked for it, the server finds the key expired: a write of its own.
    until(lambda: node.ask("GET", key) is None, within=5.0, what="expired")
    desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told of the expiry")
    assert heard.tags == []
    assert heard.emptied_times == 0


def test_a_cut_and_an_emptied_store_are_told(valkey_single: ValkeySingle, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_single.url)
    desk.line(feed)
    new = desk.new()
    desk.run(store.create(new))
    desk.run(store.revoke_owner(TAG, new.owner, reason="password"))
    desk.until(feed, lambda: heard.tags == [TAG], what="told of the cut")
    for words in (("FLUSHDB",), ("FLUSHALL", "ASYNC")):
        heard.forget()
        valkey_single.node.ask(*words)
        desk.until(feed, lambda: heard.emptied_times == 1, what=f"told of {words}")
    assert desk.line(feed) is feed.line(TAG), "the line outlives it"


def test_every_make_of_server_tells(every_valkey: ValkeySingle, desk: Desk) -> None:
    store, feed, heard = desk.fed(every_valkey.url)
    line = desk.line(feed)
    new = desk.new()
    desk.run(store.create(new))
    desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told of the creation")
    every_valkey.node.ask("FLUSHDB")
    desk.until(feed, lambda: heard.emptied_times == 1, what="told of the end of all")
    assert desk.line(feed) is line


def test_activity_and_families_are_not_told(valkey_single: ValkeySingle, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_single.url)
    desk.line(feed)
    new = desk.new()
    desk.run(store.create(new))
    desk.run(feed.renew(TAG))
    desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told of the creation")
    heard.forget()
    now = desk.run(store.ping())
    desk.run(store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=now)]))
    family = NewFamily(
        ref=FamilyRef(TAG, new.ref.handle, "name"),
        digest="f1",
        owner=new.owner,
        subject="ann",
        client="",
        key="",
        grant="{}",
        idle_us=3600 * SECOND_US,
        absolute_us=86400 * SECOND_US,
    )
    desk.run(store.create_family(family))
    desk.run(
        store.rotate_refresh(
            family.ref, generation=1, digest="f1", successor="f2", sealed=b"s", grace_us=1, client="", key=""
        )
    )
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
    desk.line(feed)
    assert (heard.handles, heard.tags, heard.emptied_times) == ([], [], 0)


def test_a_thousand_changes_at_once_are_all_told(valkey_single: ValkeySingle, desk: Desk) -> None:
    _, feed, heard = desk.fed(valkey_single.url)
    desk.line(feed)
    script = "for i = 1, 1000 do redis.call('SET', ARGV[1] .. string.format('%016d', i), 'x') end"
    valkey_single.node.ask("EVAL", script, 0, f"{desk.namespace}:s:{{{TAG:04x}}}")
    desk.line(feed)
    desk.until(feed, lambda: len(heard.handles) == 1000, what="all told")
    assert len(set(heard.handles)) == 1000


def test_whatever_was_acknowledged_before_a_confirmation_was_told_before_it(
    valkey_single: ValkeySingle, desk: Desk, full: bool
) -> None:
    """The law of the line, with writers, threads and connections that are killed on the way."""
    _, feed, heard = desk.fed(valkey_single.url)
    desk.line(feed)
    writes = 3000 if full else 300
    wrong: list[object] = []
    ended = threading.Event()
    held = 0

    def keep() -> None:
        async def work() -> None:
            while not ended.is_set():
                await feed.renew(TAG)
                feed.drain()
                await waits_of(desk.colour).sleep(0)

        try:
            desk.run(work())
        except BaseException as failure:
            wrong.append(failure)

    def lasted(line: Line, moment: float) -> bool:
        until(
            lambda: line.broken or line.confirmed >= moment or bool(wrong),
            within=10.0,
            what="an end or a confirmation",
        )
        return not line.broken and not wrong

    def write() -> None:
        nonlocal held
        prefix = f"{desk.namespace}:s:{{{TAG:04x}}}"
        with RespConnection(valkey_single.node.port) as connection:
            for number in range(writes):
                if number % 50 == 25:
                    connection.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                handle = f"{number:016d}"
                until(lambda: feed.line(TAG) is not None or bool(wrong), within=10.0, what="a line")
                line = feed.line(TAG)
                connection.command("SET", f"{prefix}{handle}", "x")
                acknowledged = REAL.elapsed()
                if line is not None and lasted(line, acknowledged):
                    held += 1
                    if handle not in heard.handles:
                        wrong.append(handle)

    # An event loop is used by one thread; the other colour by several.
    threads = [threading.Thread(target=keep) for _ in range(3 if desk.colour == "blocking" else 1)]
    for thread in threads:
        thread.start()
    try:
        write()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert held > writes / 2, "most lines lived long enough to say so"


# -- a line is confirmed from the moment of the question ------------------------------------------------------------


def test_an_answer_confirms_from_when_it_was_asked_for_even_if_it_comes_late(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    _, feed, _ = desk.fed(between.address_in(valkey_single.url), lease=30.0)
    line = desk.line(feed)
    between.hold()
    before = REAL.elapsed()
    assert desk.run(feed.renew(TAG)) is None
    after = REAL.elapsed()
    assert after - before < RENEW_SECONDS + ROOM, "it hangs nobody"
    assert line.confirmed < before
    between.forward()
    desk.until(feed, lambda: line.confirmed >= before, what="the late answer")
    assert before <= line.confirmed <= after - RENEW_SECONDS / 2
    assert line.until == line.confirmed + 30.0
    assert feed.line(TAG) is line, "slow is not broken"


def test_what_stands_before_an_answer_is_told_before_it_confirms(desk: Desk) -> None:
    handle = "h" * 16
    with _Impostor() as server:
        _, feed, heard = desk.fed(server.url)
        line = desk.line(feed)
        seen: list[float] = []
        heard.at_a_change = lambda: seen.append(line.confirmed)
        before = line.confirmed
        server.before_heartbeats = _push(f"{desk.namespace}:s:{{{TAG:04x}}}{handle}")
        assert desk.run(feed.renew(TAG)) is line
        assert heard.handles == [handle]
        assert seen == [before]
        assert line.confirmed > before


def test_one_caller_asks_at_a_time_and_the_others_are_not_held(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    _, feed, _ = desk.fed(between.address_in(valkey_single.url))
    desk.line(feed)
    between.hold()
    durations: list[float] = []

    def once() -> None:
        began = time.monotonic()
        assert run_blocking(feed.renew(TAG)) is None
        durations.append(time.monotonic() - began)

    async def together() -> None:
        async def task() -> None:
            began = time.monotonic()
            assert await feed.renew(TAG) is None
            durations.append(time.monotonic() - began)

        await asyncio.gather(*(task() for _ in range(4)))

    if desk.colour == "async":
        desk.run(together())
    else:
        threads = [threading.Thread(target=once) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len([each for each in durations if each > RENEW_SECONDS / 2]) == 1
    began = time.monotonic()
    assert desk.run(feed.renew(TAG)) is None, "not again so soon"
    assert time.monotonic() - began < RENEW_SECONDS + ROOM


# -- what ends a line ----------------------------------------------------------------------------------------------


def test_a_connection_that_ends_cuts_the_line_and_the_next_one_is_another(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    _, feed, _ = desk.fed(between.address_in(valkey_single.url))
    first = desk.line(feed)
    (follower,) = _followers(valkey_single)
    valkey_single.node.ask("CLIENT", "KILL", "ID", follower["id"])
    desk.until(feed, lambda: first.broken, what="the kill was noticed")
    assert feed.line(TAG) is None
    second = desk.line(feed)
    assert second is not first
    assert second.source == first.source
    between.cut()
    desk.until(feed, lambda: second.broken, what="the cut was noticed")
    assert desk.line(feed) not in (first, second)


def test_a_frozen_server_ends_no_line_but_its_lease(valkey_single: ValkeySingle, desk: Desk) -> None:
    _, feed, _ = desk.fed(valkey_single.url, lease=0.4)
    line = desk.line(feed)
    valkey_single.freeze()
    until(lambda: not line.is_fresh(REAL.elapsed()), within=5.0, what="the lease is over")
    for _ in range(4):
        began = time.monotonic()
        assert desk.run(feed.renew(TAG)) is None
        assert time.monotonic() - began < RENEW_SECONDS + ROOM
    began = time.monotonic()
    desk.run(feed.beat())
    assert time.monotonic() - began < LEASE + ROOM
    assert feed.line(TAG) is line
    valkey_single.thaw()
    assert desk.line(feed) is line, "no message was missed, so no copy is thrown away"


def test_a_connection_that_catches_up_while_another_is_tried_is_kept(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    between = relay(valkey_single.node.port)
    _, feed, _ = desk.fed(between.address_in(valkey_single.url), lease=0.3)
    line = desk.line(feed)
    (primary,) = feed._primaries.values()
    between.hold()
    assert desk.run(feed.renew(TAG)) is None
    until(lambda: not line.is_fresh(REAL.elapsed()), within=5.0, what="the lease is over")
    opens, opened = feed._open, 0

    async def after_the_old_one(*arguments: Any) -> Any:
        nonlocal opened
        between.forward()
        old, asked = primary.link, primary.asked
        assert old is not None
        assert asked is not None
        assert await old.settled(asked, time.monotonic() + 5.0)
        opened += 1
        return await opens(arguments[0], time.monotonic() + 5.0)

    monkeypatch.setattr(feed, "_open", after_the_old_one)
    assert desk.line(feed) is line
    assert opened == 1
    desk.until(feed, lambda: len(_followers(valkey_single)) == 1, what="the new one is closed")


def test_a_connection_that_is_a_black_hole_is_replaced(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    _, feed, _ = desk.fed(between.address_in(valkey_single.url), lease=0.4)
    line = desk.line(feed)
    between.swallow()
    assert desk.run(feed.renew(TAG)) is None
    # The lost octets stay lost, but new connections are carried again: the old one is not told of that.
    between._do(lambda: between._change(type(between._mode).PASS))
    began = time.monotonic()
    assert desk.line(feed) is not line
    assert time.monotonic() - began < 2.0, "it recovers alone"
    assert line.broken


def test_connections_made_before_it_is_known_which_server_answers_are_not_used_again(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    store, feed, _ = desk.fed(between.address_in(valkey_single.url))
    desk.run(store.ping())
    # An address may lead to another server meanwhile, and a pooled connection still to the old one.
    desk.line(feed)
    desk.until(feed, lambda: between.open_connections == 1, what="the feed's alone is left")
    desk.run(store.ping())
    desk.line(feed)
    assert between.open_connections == 2, "while it is the same server they stay"


def test_a_restarted_server_is_another_source(valkey_single: ValkeySingle, desk: Desk) -> None:
    store, feed, _ = desk.fed(valkey_single.url)
    line = desk.line(feed)
    new = desk.new()
    desk.run(store.create(new))
    valkey_single.kill()
    desk.until(feed, lambda: line.broken, what="the end was noticed")
    assert desk.run(feed.renew(TAG)) is None
    valkey_single.ensure_running()
    assert desk.line(feed).source != line.source
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)


@pytest.mark.parametrize(
    ("hurt", "heal"),
    [
        (("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
        (("REPLICAOF", LOOPBACK, "1"), ("REPLICAOF", "NO", "ONE")),
    ],
    ids=["NOREPLICAS", "READONLY"],
)
def test_a_primary_that_refuses_writes_ends_its_line(
    hurt: tuple[str, ...], heal: tuple[str, ...], valkey_single: ValkeySingle, desk: Desk
) -> None:
    _, feed, _ = desk.fed(valkey_single.url)
    line = desk.line(feed)
    confirmed = line.confirmed
    valkey_single.node.ask(*hurt)
    try:
        assert desk.run(feed.renew(TAG)) is None
        assert line.broken
        assert line.confirmed == confirmed
        desk.run(feed.beat())
        assert feed.line(TAG) is None or not feed.line(TAG).is_fresh(REAL.elapsed())  # type: ignore[union-attr]
    finally:
        valkey_single.node.ask(*heal)
    assert desk.line(feed) is not line


def test_a_full_server_keeps_its_line(valkey_single: ValkeySingle, desk: Desk) -> None:
    _, feed, _ = desk.fed(valkey_single.url)
    line = desk.line(feed)
    valkey_single.node.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        assert desk.run(feed.renew(TAG)) is line
    finally:
        valkey_single.node.ask("CONFIG", "SET", "maxmemory", "0")


@pytest.mark.parametrize("direction", [1, -1])
def test_a_stepped_clock_cuts_the_line_and_a_drifting_one_does_not(
    direction: int, valkey_single: ValkeySingle, desk: Desk
) -> None:
    _, feed, _ = desk.fed(valkey_single.url)
    line = desk.line(feed)
    for _ in range(4):
        desk.offset_us += direction * int((CLOCK_STEP_SECONDS - 0.1) * SECOND_US)
        assert desk.line(feed) is line
    desk.offset_us += direction * int((CLOCK_STEP_SECONDS + 0.5) * SECOND_US)
    assert desk.line(feed) is not line
    assert line.broken


# -- servers that are none, and what they send -----------------------------------------------------------------------


def _bulk(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return b"$%d\r\n%s\r\n" % (len(raw), raw)


def _push(*keys: str | bytes) -> bytes:
    return b">2\r\n" + _bulk("invalidate") + b"*%d\r\n" % len(keys) + b"".join(map(_bulk, keys))


class _Impostor(socketserver.ThreadingTCPServer):
    """Answers like a primary, as far as a feed asks, and says what a test wants besides."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        self.greetings: dict[bytes, bytes] = {}
        self.before_heartbeats = b""
        self.heartbeat = b":0\r\n*2\r\n%s%s" % (_bulk("1800000000"), _bulk("5"))
        self.port = reserve_port()
        super().__init__((LOOPBACK, self.port.port), _ImpostorSpeaks)

    @property
    def url(self) -> str:
        return f"redis://user:hunter2@{LOOPBACK}:{self.port.port}"

    def answer(self, octets: bytes) -> bytes:
        if b"TIME" in octets:
            return self.before_heartbeats + self.heartbeat
        usual = {
            b"HELLO": b"%1\r\n+proto\r\n:3\r\n",
            b"TRACKING": b"+OK\r\n",
            b"server": _bulk("# Server\r\nrun_id:abc\r\n"),
            b"replication": _bulk("role:master\r\nmaster_replid:def\r\n"),
        }
        return b"".join(text for word, text in (usual | self.greetings).items() if word in octets)

    def __enter__(self) -> _Impostor:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()
        self.port.release()


class _ImpostorSpeaks(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        impostor = self.server
        assert isinstance(impostor, _Impostor)
        with contextlib.suppress(OSError):
            while octets := self.request.recv(1 << 20):
                self.request.sendall(impostor.answer(octets))


GARBAGE = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an answer to nothing": b"+OK\r\n" * 10,
    "a key of another shape": _push("NS:s:{1a2b}tooshort"),
    "a key with strange octets": _push("NS:s:{1a2b}" + "\xff" * 8),
    "a strange tag": _push("NS:c:{zzzz}owner"),
    "a strange prefix": _push("other"),
    "a number for a key": b">2\r\n+invalidate\r\n*1\r\n:1\r\n",
    "keys that are no list": b">2\r\n+invalidate\r\n+all\r\n",
    "an unknown message": b">2\r\n+surprise\r\n*0\r\n",
    "an empty message": b">0\r\n",
    "a map with a list for a key": b"%1\r\n*0\r\n+a\r\n",
    "a length below zero": b"$-5\r\n",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_cannot_be_understood_empties_and_cuts(garbage: bytes, desk: Desk) -> None:
    with _Impostor() as server:
        _, feed, heard = desk.fed(server.url)
        line = desk.line(feed)
        confirmed = line.confirmed
        server.before_heartbeats = garbage.replace(b"NS:", desk.namespace.encode() + b":")
        if b"NS:" in garbage:
            # The lengths have to fit again.
            key = garbage.split(b"\r\n")[-2].replace(b"NS:", desk.namespace.encode() + b":")
            server.before_heartbeats = _push(key)
        assert desk.run(feed.renew(TAG)) is None
        assert line.broken
        assert line.confirmed == confirmed
        assert heard.emptied_times >= 1
        assert heard.handles == []
        server.before_heartbeats = b""
        assert desk.line(feed) is not line, "and it goes on"


@pytest.mark.parametrize(
    "answer",
    [b"+OK\r\n" * 2, b":0\r\n*2\r\n+a\r\n+b\r\n", b":0\r\n:5\r\n", b"_\r\n*0\r\n", b":0\r\n%0\r\n"],
)
def test_a_heartbeat_that_is_answered_strangely_confirms_nothing(answer: bytes, desk: Desk) -> None:
    with _Impostor() as server:
        _, feed, heard = desk.fed(server.url)
        line = desk.line(feed)
        server.heartbeat = answer
        assert desk.run(feed.renew(TAG)) is None
        assert line.broken
        assert heard.emptied_times >= 1


@pytest.mark.parametrize("word", ["HELLO", "TRACKING", "server"])
def test_a_server_without_tracking_is_told_once_and_loudly(
    word: str, desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    with _Impostor() as server, caplog.at_level(logging.INFO, "coatcheck"):
        server.greetings[word.encode()] = b"-ERR unknown command 'X', with args beginning with: 'user' 'hunter2'\r\n"
        _, feed, _ = desk.fed(server.url)
        for _ in range(3):
            assert desk.run(feed.renew(TAG)) is None
            desk.run(feed.beat())
            assert feed.line(TAG) is None
    (record,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "unknown command" in record.getMessage()
    assert "hunter2" not in caplog.text


def test_a_replica_and_a_server_that_is_loading_have_no_line_and_may_have_one_later(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    with _Impostor() as server, caplog.at_level(logging.INFO, "coatcheck"):
        _, feed, _ = desk.fed(server.url)
        for word, answer in (
            (b"replication", _bulk("role:slave\r\nmaster_replid:def\r\n")),
            (b"server", b"-LOADING Redis is loading the dataset in memory\r\n"),
        ):
            server.greetings[word] = answer
            assert desk.run(feed.renew(TAG)) is None
            del server.greetings[word]
            desk.line(feed)
            desk.run(feed.close())
    assert [each for each in caplog.records if each.levelno >= logging.ERROR] == []


# -- accounts, databases, TLS ----------------------------------------------------------------------------------------


def test_it_speaks_as_the_account_of_the_url_and_in_its_database(valkey_single: ValkeySingle, desk: Desk) -> None:
    node = valkey_single.node
    node.ask("ACL", "SETUSER", desk.namespace, "on", ">hunter2", f"~{desk.namespace}:*", "+@all")
    try:
        url = f"redis://{desk.namespace}:hunter2@{LOOPBACK}:{node.port}/3"
        store, feed, heard = desk.fed(url)
        desk.line(feed)
        (follower,) = _followers(valkey_single)
        assert (follower["user"], follower["db"]) == (desk.namespace, "3")
        new = desk.new()
        desk.run(store.create(new))
        desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told")
        _, refused, _ = desk.fed(url.replace("hunter2", "hunter3"))
        assert desk.run(refused.renew(TAG)) is None
    finally:
        node.ask("ACL", "DELUSER", desk.namespace)


def test_it_speaks_tls_and_checks_the_certificate(behind_tls: tuple[int, Path], desk: Desk) -> None:
    port, trusted = behind_tls
    store, feed, heard = desk.fed(f"rediss://localhost:{port}?ssl_ca_certs={trusted}", deadline=20.0)
    desk.line(feed)
    new = desk.new()
    desk.run(store.create(new))
    desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told")
    _, unknown, _ = desk.fed(f"rediss://localhost:{port}", deadline=20.0)
    assert desk.run(unknown.renew(TAG)) is None


# -- Sentinel and Cluster ------------------------------------------------------------------------------------------


@pytest.mark.xdist_group("cluster")
def test_after_a_failover_the_line_is_the_new_primarys(valkey_sentinel: ValkeySentinel, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_sentinel.url)
    first = desk.line(feed)
    valkey_sentinel.failover()
    second = desk.line(feed)
    assert first.broken, "the old primary refused the heartbeat"
    assert second.source != first.source
    new = desk.new()
    desk.run(store.create(new))
    desk.until(feed, lambda: heard.handles == [new.ref.handle], what="told by the new primary")


@pytest.mark.xdist_group("cluster")
def test_a_word_of_the_sentinels_is_enough(valkey_sentinel: ValkeySentinel, desk: Desk) -> None:
    _, feed, _ = desk.fed(valkey_sentinel.url)
    line = desk.line(feed)
    # As in a split brain: the old primary still takes writes, and answers every heartbeat.
    link = feed._primaries[None].link
    assert link is not None
    object.__setattr__(link, "address", (LOOPBACK, 1))
    desk.run(feed.beat())
    assert line.broken


def _ids(*nodes: ValkeyNode) -> list[bytes]:
    found = [node.ask("CLUSTER", "MYID") for node in nodes]
    return [each for each in found if isinstance(each, bytes)]


@pytest.mark.xdist_group("cluster")
def test_each_primary_has_a_line_of_its_own(valkey_cluster: ValkeyCluster, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_cluster.url)
    tags: dict[ValkeyNode, int] = {}
    for tag in range(0x100):
        tags.setdefault(valkey_cluster.node_of(f"{{{tag:04x}}}"), tag)
    assert len(tags) == len(valkey_cluster.nodes)
    lines = {node: desk.line(feed, tag) for node, tag in tags.items()}
    assert len(set(map(id, lines.values()))) == len(lines)
    handles = []
    for tag in tags.values():
        new = desk.new(tag=tag)
        desk.run(store.create(new))
        handles.append(new.ref.handle)
    desk.until(feed, lambda: set(handles) <= set(heard.handles), what="told by each")
    away = next(iter(tags))
    away.freeze()
    try:
        began = time.monotonic()
        desk.run(feed.beat())
        assert time.monotonic() - began < LEASE + ROOM
        for node, tag in tags.items():
            if node is not away:
                assert desk.line(feed, tag) is lines[node], "one that is away stops no other"
    finally:
        away.thaw()
        valkey_cluster.await_ready()
    desk.line(feed, tags[away])


@pytest.mark.xdist_group("cluster")
def test_a_slot_on_its_way_has_no_line_and_then_that_of_its_new_node(valkey_cluster: ValkeyCluster, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_cluster.url)
    tag, slot = 0xBEEF, slot_of("beef")
    source = valkey_cluster.node_of("{beef}")
    target = next(node for node in valkey_cluster.nodes if node is not source)
    stays = next(each for each in range(0x100) if valkey_cluster.node_of(f"{{{each:04x}}}") is source)
    source_id, target_id = _ids(source, target)
    new = desk.new(tag=tag)
    desk.run(store.create(new))
    line = desk.line(feed, tag)
    try:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        heard.forget()
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100)
        assert isinstance(keys, list)
        for key in keys:
            assert isinstance(key, bytes)
            source.ask("MIGRATE", LOOPBACK, target.port, key, 0, 5000)
        desk.until(feed, lambda: new.ref.handle in heard.handles, what="told that it went")
        heard.forget()
        assert isinstance(desk.run(store.load(new.ref, new.digest)), Live), "answered by the target"
        assert heard.handles == [new.ref.handle], "not to be kept under the source's line"
        assert desk.run(feed.renew(tag)) is None
        assert line.broken
        assert feed.line(stays) is not None, "the other slots of the node have a new line at once"
    finally:
        for node in (target, source, *valkey_cluster.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    try:
        until(lambda: desk.run(feed.beat()) is None and feed.line(tag) is not None, within=10.0, what="a line again")
        assert desk.line(feed, tag) is not desk.line(feed, stays)
        heard.forget()
        desk.run(_commit(store, new))
        desk.until(feed, lambda: new.ref.handle in heard.handles, what="told by the target")
    finally:
        _give_back(valkey_cluster, slot, source, target, source_id)


@pytest.mark.xdist_group("cluster")
def test_a_slot_that_two_nodes_claim_has_no_line(valkey_cluster: ValkeyCluster, desk: Desk) -> None:
    _, feed, _ = desk.fed(valkey_cluster.url)
    desk.line(feed)
    desk.run(feed.beat())
    slot = slot_of(f"{TAG:04x}")
    owner = feed._speaker(TAG)
    assert owner is not None
    (other, *_) = [each for each in feed._primaries.values() if each is not owner and each.line is not None]
    # As told by a node that was cut off before it lost the slot.
    other.slots |= {slot}
    feed._remap()
    assert feed.line(TAG) is None
    assert desk.run(feed.renew(TAG)) is None
    assert owner.line is not None
    assert not owner.line.broken


@pytest.mark.parametrize(
    ("shown", "slots"),
    [
        (b"0-2", {0, 1, 2}),
        (b"5 7-8", {5, 7, 8}),
        (b"5 7-8 [8->-0123abcd] [9-<-0123abcd]", {5, 7}),
        (b"16383-16384", {16383}),
        (b"", set[int]()),
        (b"a", None),
        (b"1-", None),
        (b"[x->-y]", None),
        (b"123456", None),
    ],
)
def test_what_a_node_says_of_its_slots_is_read_or_refused(shown: bytes, slots: set[int] | None) -> None:
    other = b"77 127.0.0.1:2@3 master - 0 0 1 connected 100-200"
    text = other + b"\n76 127.0.0.1:1@2 myself,master - 0 0 1 connected " + shown + b"\n"
    own = _own_slots(text)
    assert (None if own is None else _slots_of(own)) == slots


def test_a_node_that_is_no_primary_has_no_slots_and_other_texts_are_none() -> None:
    assert _own_slots(b"76 127.0.0.1:1@2 myself,slave 77 0 0 1 connected 1-2\n") == ()
    for text in (b"", b"ERR", b"\xff" * 40, 5, None):
        assert _own_slots(text) is None


# -- reads ---------------------------------------------------------------------------------------------------------


def test_what_another_node_answered_is_not_kept(valkey_single: ValkeySingle, desk: Desk) -> None:
    store, feed, heard = desk.fed(valkey_single.url)
    desk.line(feed)
    new = desk.new()
    feed.answered(new.ref, (LOOPBACK, valkey_single.node.port))
    assert heard.handles == []
    feed.answered(new.ref, (LOOPBACK, 1))
    assert heard.handles == [new.ref.handle]
    desk.run(store.create(new))
    desk.run(feed.renew(TAG))
    desk.until(feed, lambda: heard.handles == [new.ref.handle] * 2, what="told")
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
    assert heard.handles == [new.ref.handle] * 2, "an ordinary read is kept"


@pytest.mark.anyio
async def test_reads_share_the_connection_and_fall_back_when_it_cannot_answer(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], namespace: str
) -> None:
    between = relay(valkey_single.node.port)
    options = StoreOptions(colour="async", waits=waits_of("async"), system=REAL, namespace=namespace)
    store = RedisStore(between.address_in(valkey_single.url), options)
    desk = Desk("async", namespace, run_blocking)
    new, heard = desk.new(), Heard()
    await store.create(new)
    feed = store.feed(heard, lease=LEASE)
    assert await feed.renew(TAG) is not None
    accepted = between.accepted
    answers = await asyncio.gather(*(store.load(new.ref, new.digest) for _ in range(50)))
    assert all(isinstance(each, Live) for each in answers)
    assert between.accepted == accepted, "nobody had to connect"
    (follower,) = _followers(valkey_single)
    assert follower["cmd"] == "evalsha"
    valkey_single.node.ask("SCRIPT", "FLUSH")
    assert isinstance(await store.load(new.ref, new.digest), Live), "a script that was forgotten is brought again"
    link = feed._primaries[None].link
    assert link is not None
    question = (TAG, all_scripts()["load"].sha, 0, f"{namespace}:s:{{{TAG:04x}}}{'n' * 16}", b"nothing")
    reading = feed.gathering(*question)
    assert reading is not None
    valkey_single.freeze()
    lost = feed.gathering(*question)
    assert lost is not None
    began = time.monotonic()
    await reading
    assert await lost is LOST
    assert time.monotonic() - began < RENEW_SECONDS + ROOM
    assert feed.gathering(*question) is None, "and the next ones do not wait for it"
    valkey_single.thaw()
    async with asyncio.timeout(10.0):
        while feed.gathering(*question) is None:
            await feed.beat()
    # A caller who goes away takes nobody's answer along.
    abandoned = asyncio.ensure_future(store.load(new.ref, new.digest))
    await asyncio.sleep(0)
    abandoned.cancel()
    assert isinstance(await store.load(new.ref, new.digest), Live)
    await store.close()


async def _fed(url: str, namespace: str) -> tuple[RedisStore, RedisFeed]:
    options = StoreOptions(colour="async", waits=waits_of("async"), system=REAL, namespace=namespace, deadline=10.0)
    store = RedisStore(url, options)
    await store.open()
    feed = store.feed(Heard(), lease=LEASE)
    return store, feed


@pytest.mark.anyio
@pytest.mark.parametrize("many", [1, 2, 24, 25, 50])
async def test_reads_at_once_go_as_few_commands_and_each_gets_its_own_answer(
    many: int, valkey_single: ValkeySingle, namespace: str
) -> None:
    store, feed = await _fed(valkey_single.url, namespace)
    desk = Desk("async", namespace, run_blocking)
    sessions = [desk.new(tag=number, owner=f"user-{number}") for number in range(many)]
    for number, new in enumerate(sessions):
        if number % 3 != 2:
            await store.create(new)
        if number % 3 == 1:
            await store.revoke(new.ref, reason="logout")
    assert await feed.renew(TAG) is not None
    with valkey_single.record() as sent:
        answers = await asyncio.gather(*(store.load(new.ref, new.digest) for new in sessions))
    for number, (new, answer) in enumerate(zip(sessions, answers, strict=True)):
        assert isinstance(answer, (Live, Ended, Absent)[number % 3])
        if isinstance(answer, Live):
            assert (answer.session.ref, answer.session.subject) == (new.ref, new.subject)
    assert [each.name for each in sent] == ["EVALSHA"] * -(-many // 24)
    await store.close()


@pytest.mark.anyio
@pytest.mark.xdist_group("cluster")
async def test_reads_of_several_slots_at_once_are_not_put_into_one_command(
    valkey_cluster: ValkeyCluster, namespace: str
) -> None:
    store, feed = await _fed(valkey_cluster.url, namespace)
    desk = Desk("async", namespace, run_blocking)
    sessions = [desk.new(tag=number % 4 * 4000, owner=f"user-{number}") for number in range(12)]
    for new in sessions:
        await store.create(new)
        assert await feed.renew(new.ref.tag) is not None
    with valkey_cluster.record(ignore={"ping", "info", "cluster"}) as sent:
        answers = await asyncio.gather(*(store.load(new.ref, new.digest) for new in sessions))
    assert [each.session.subject for each in answers if isinstance(each, Live)] == [new.subject for new in sessions]
    assert [each.name for each in sent] == ["EVALSHA"] * 4
    await store.close()


@pytest.mark.anyio
async def test_a_read_that_was_never_sent_is_lost_with_its_connection(
    valkey_single: ValkeySingle, namespace: str
) -> None:
    store, feed = await _fed(valkey_single.url, namespace)
    assert await feed.renew(TAG) is not None
    link = feed._primaries[None].link
    waiting = feed.gathering(TAG, "0" * 40, 0, "key", b"")
    assert waiting is not None
    assert link is not None
    link.close()
    assert await waiting is LOST
    # What is not an answer of the script belongs to nobody in particular.
    assert await feed.renew(TAG) is not None
    sha = valkey_single.node.ask("SCRIPT", "LOAD", "return {1}")
    assert isinstance(sha, bytes)
    with valkey_single.record() as sent:
        waiting = feed.gathering(TAG, sha.decode(), 0, "key", b"")
        assert waiting is not None
        assert await waiting is LOST
    assert [each.name for each in sent if each.name == "EVALSHA"] == ["EVALSHA"]
    await store.close()


# -- loops, forks, the end -------------------------------------------------------------------------------------------


def test_closing_leaves_nothing_and_it_can_be_used_again(valkey_single: ValkeySingle, desk: Desk) -> None:
    _, feed, _ = desk.fed(valkey_single.url)
    for _ in range(2):
        line = desk.line(feed)
        desk.run(feed.close())
        assert line.broken
        assert feed.line(TAG) is None
        until(lambda: _followers(valkey_single) == [], within=5.0, what="the connection is gone")


@pytest.mark.anyio
async def test_another_event_loop_takes_over_when_the_first_has_let_go(
    valkey_single: ValkeySingle, namespace: str
) -> None:
    options = StoreOptions(colour="async", waits=waits_of("async"), system=REAL, namespace=namespace)
    store = RedisStore(valkey_single.url, options)
    feed = store.feed(Heard(), lease=0.5)
    first = await feed.renew(TAG)
    assert first is not None

    async def elsewhere() -> Line | None:
        return await feed.renew(TAG)

    def in_another_loop(work: Callable[[], Coroutine[Any, Any, Line | None]]) -> Line | None:
        with asyncio.Runner() as runner:
            line = runner.run(work())
            if line is not None:
                runner.run(feed.close())
            return line

    assert await asyncio.to_thread(in_another_loop, elsewhere) is None, "the first loop keeps it"
    assert feed.line(TAG) is first
    until(lambda: not first.is_fresh(REAL.elapsed()), within=5.0, what="the lease is over")
    second = await asyncio.to_thread(in_another_loop, elsewhere)
    assert second is not None
    assert second is not first
    assert first.broken
    await asyncio.sleep(0)
    third = await feed.renew(TAG)
    assert third not in (None, first, second)
    await store.close()


FORKED = """
    import asyncio, gc, os, stat, sys
    from coatcheck.blocking import run_blocking
    from coatcheck.stores.open import waits_of
    from coatcheck.stores.options import StoreOptions
    from coatcheck.stores.redis import RedisStore
    from coatcheck.system import REAL
    url, namespace, colour = sys.argv[1:]
    options = StoreOptions(colour=colour, waits=waits_of(colour), system=REAL, namespace=namespace, deadline=20.0)
    class Silent:
        def changed(self, handle): pass
        def cut_off(self, tag): pass
        def emptied(self): pass
    feed = RedisStore(url, options).feed(Silent(), lease=60.0)
    if colour == "blocking":
        run = run_blocking
    else:
        runner = asyncio.Runner()
        run = runner.run
    line = run(feed.renew(1))
    assert line is not None
    link = feed._primaries[None].link
    descriptor = link.descriptor if colour == "blocking" else link._transport.get_extra_info("socket").fileno()
    def is_socket():
        try:
            return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
        except OSError:
            return False
    assert is_socket()
    pid = os.fork()
    if pid == 0:
        try:
            assert not is_socket(), "our copy of the parent's connection is closed"
            assert line.broken
            assert feed.line(1) is None
            feed.drain()
            own = run_blocking(feed.renew(1)) if colour == "blocking" else asyncio.run(feed.renew(1))
            assert own is not None and own is not line
            gc.collect()
        except BaseException as failure:
            print("child", repr(failure), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert run(feed.renew(1)) is line and not line.broken
    run(feed.close())
    print(code)
"""


def test_the_child_of_a_fork_has_a_line_of_its_own(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], desk: Desk
) -> None:
    between = relay(valkey_single.node.port)
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(FORKED),
            between.address_in(valkey_single.url),
            desk.namespace,
            desk.colour,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "0"), ran.stderr
    assert between.accepted == 2, "one each"
