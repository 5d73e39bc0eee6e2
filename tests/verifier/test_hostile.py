"""Answers that never end, never come, or mean something else: each has an end, and none is believed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from coatcheck.errors import FeedSilent
from coatcheck.system import REAL
from coatcheck.testing import FakeSystem
from coatcheck.verifier.wire import Answer, Bell, ExchangeFailed, Line, parse_address, wait_for
from tests.verifier.issuer import WAIT, Bench, Handler

Script = Callable[[socket.socket], None]


class RawServer:
    """Answers each connection by a script, octet by octet."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                try:
                    connection.recv(65536)
                    self._script(connection)
                except OSError:
                    pass

    def close(self) -> None:
        # A listening socket that is only closed stays in accept().
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(WAIT)


@pytest.fixture
def raw() -> Iterator[Callable[[Script], RawServer]]:
    made: list[RawServer] = []

    def start(script: Script) -> RawServer:
        made.append(RawServer(script))
        return made[-1]

    yield start
    for server in made:
        server.close()


def ask(port: int, *, limit: int = 1000, system: FakeSystem | None = None) -> Answer:
    clock = system or FakeSystem()
    line = Line(parse_address(f"http://127.0.0.1:{port}/x", name="x"), clock)
    try:
        sent = line.ask("", {}, within=WAIT)
        assert wait_for([line], WAIT) == {line}
        return line.answer(deadline=sent + WAIT, limit=limit)
    finally:
        line.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 " + b"O" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1001,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Encoding: gzip\r\n\r\n{}",
    ],
)
def test_an_answer_that_cannot_be_read_fails_and_leaves_no_connection(
    raw: Callable[[Script], RawServer], answer: bytes
) -> None:
    server = raw(lambda connection: connection.sendall(answer))
    with pytest.raises(ExchangeFailed):
        ask(server.port)


def test_an_answer_of_exactly_the_limit_is_read(raw: Callable[[Script], RawServer]) -> None:
    server = raw(
        lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"x" * 1000)
    )
    assert ask(server.port).body == b"x" * 1000


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n"])
def test_a_slow_loris_has_the_same_end_as_silence(raw: Callable[[Script], RawServer], start: bytes) -> None:
    # Drop by drop, each drop in time for a limit per read: only the limit of the whole ends it.
    system = FakeSystem()
    gone = threading.Event()
    drops = 0

    def drip_without_end(connection: socket.socket) -> None:
        nonlocal drops
        connection.sendall(start or b"H")
        try:
            while not gone.is_set():
                drops += 1
                if drops == 10:
                    system.advance(WAIT)
                connection.sendall(b"x")
        except OSError:
            pass

    server = raw(drip_without_end)
    with pytest.raises(ExchangeFailed):
        ask(server.port, limit=10**9, system=system)
    gone.set()
    assert drops >= 10


def test_a_kept_connection_with_octets_nobody_asked_for_is_not_used_again(raw: Callable[[Script], RawServer]) -> None:
    # Else the leftover of one answer would be read as the answer to the next question.
    smuggled = threading.Event()

    def script(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        smuggled.wait(WAIT)
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"forged"')

    server = raw(script)
    line = Line(parse_address(f"http://127.0.0.1:{server.port}/x", name="x"), FakeSystem())
    sent = line.ask("", {}, within=WAIT)
    assert line.answer(deadline=sent + WAIT, limit=1000).body == b"{}"
    smuggled.set()
    assert wait_for([line], WAIT) == {line}
    sent = line.ask("", {}, within=WAIT)
    assert line.answer(deadline=sent + WAIT, limit=1000).body == b"{}"
    assert server.connections == 2
    line.close()


def test_nobody_listens(raw: Callable[[Script], RawServer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    line = Line(parse_address(f"http://127.0.0.1:{port}", name="x"), FakeSystem())
    with pytest.raises(ExchangeFailed, match="no connection"):
        line.ask("", {}, within=1.0)


def test_a_certificate_nobody_vouches_for_is_refused(raw: Callable[[Script], RawServer]) -> None:
    server = raw(lambda connection: connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n"))
    line = Line(parse_address(f"https://127.0.0.1:{server.port}", name="x"), FakeSystem())
    with pytest.raises(ExchangeFailed, match="SSL"):
        line.ask("", {}, within=WAIT)


def test_a_field_cannot_begin_another_one() -> None:
    with pytest.raises(ExchangeFailed):
        Line(parse_address("http://127.0.0.1:1", name="x"), FakeSystem()).ask("", {"A": "é"}, within=1.0)


def test_a_bell_wakes_and_is_silent_again_and_never_waits() -> None:
    bell = Bell()
    for _ in range(100_000):
        bell.ring()
    assert wait_for([bell], WAIT) == {bell}
    bell.hush()
    assert wait_for([bell], 0.0) == set()
    bell.close()
    bell.ring()
    assert wait_for([bell], 0.0) == set()


# -- seen by a verifier --------------------------------------------------------------------------------------------


def test_an_answer_that_never_comes_is_given_up_in_time_to_ask_again(bench: Bench) -> None:
    held = threading.Event()
    verifier, text = bench.following(), bench.mint()
    bench.issuer.on_poll = lambda handler: bench.issuer.give_page(handler) if held.wait(WAIT) else None
    polls = bench.issuer.count("poll")
    bench.turn(1.7)
    bench.issuer.wait_asked("poll", polls + 1)
    bench.issuer.on_poll = None
    bench.desk.wait_again("fail: the revocation feed: no answer in time", lambda: bench.jump(1.7))
    bench.desk.wait_again("confirm", lambda: bench.turn(0.2))
    assert verifier.verify(text).subject
    assert verifier.status.feed_age == 0.0
    held.set()


def test_a_push_comes_through_while_a_poll_hangs(bench: Bench) -> None:
    held = threading.Event()
    bench.following()
    bench.issuer.on_poll = lambda handler: bench.issuer.give_page(handler) if held.wait(WAIT) else None
    polls = bench.issuer.count("poll")
    bench.turn(1.7)
    bench.issuer.wait_asked("poll", polls + 1)
    bench.desk.wait_again("take_pushed", lambda: bench.issuer.push({"kind": "sid", "sid": "a", "until": bench.until}))
    held.set()


@pytest.mark.parametrize(
    "data",
    [
        b"event: revoked\ndata: {}\n\n",
        b"event: revoked\ndata: " + b"[" * 50_000 + b"\n\n",
        b"event: revoked\ndata: {\ndata: }\n\n",
        b"event: revoked\ndata: \xff\n\n",
    ],
)
def test_a_stream_of_garbage_is_closed_and_opened_again(bench: Bench, data: bytes) -> None:
    verifier, text = bench.following(), bench.mint()
    bench.desk.wait_again("fail: the stream", lambda: bench.issuer.wait_stream().chunk(data))
    bench.desk.wait_again("_open", lambda: bench.turn(0.2))
    assert verifier.verify(text).subject


def test_a_stream_that_breaks_its_framing_is_closed(bench: Bench) -> None:
    bench.following()
    bench.desk.wait_again("fail: the stream", lambda: bench.issuer.wait_stream().wfile.write(b"no chunk\r\n"))


def test_a_silent_stream_is_given_up(bench: Bench) -> None:
    bench.following()
    bench.desk.wait_again("fail: the stream of revocations: the stream has gone silent", lambda: bench.turn(3.0))


def test_an_endless_event_is_given_up_at_its_bound(bench: Bench) -> None:
    verifier = bench.following()
    handler = bench.issuer.wait_stream()

    def flood() -> None:
        handler.chunk(b"data: ")
        try:
            for _ in range(200):
                handler.chunk(b"x" * 64 * 1024)
        except OSError:
            pass

    bench.desk.wait_again("fail: the stream of revocations: a line is too long", flood)
    assert verifier.status.running


def test_a_stream_that_never_stops_talking_does_not_stop_the_polls(bench: Bench) -> None:
    bench.following()
    handler = bench.issuer.wait_stream()
    stop = threading.Event()

    def talk() -> None:
        try:
            while not stop.is_set():
                handler.chunk(b":" * 1000 + b"\n")
        except OSError:
            pass

    talking = threading.Thread(target=talk)
    talking.start()
    try:
        for _ in range(3):
            bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    finally:
        stop.set()
        talking.join(WAIT)


def test_a_stream_that_is_refused_leaves_the_polls_alone(bench: Bench) -> None:
    bench.issuer.on_stream = lambda handler: handler.reply(302, Location="https://elsewhere.example/")
    verifier = bench.ready()
    bench.desk.wait("fail: the stream of revocations: no stream is offered (302)")
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(bench.mint()).subject


def test_endless_pages_are_never_fresh(bench: Bench) -> None:
    pages = 0

    def more(handler: Handler) -> None:
        nonlocal pages
        pages += 1
        handler.reply(200, bench.issuer.body([], f"e1:{pages}", more=True))

    bench.issuer.on_poll = more
    verifier = bench.verifier()
    verifier.start()
    bench.desk.wait("use_keys")
    bench.desk.wait("take", 50)
    with pytest.raises(FeedSilent):
        verifier.verify(bench.mint())
    assert verifier.status.running


def test_the_real_clock_serves_as_well(bench: Bench) -> None:
    verifier = bench.following(system=REAL)
    bench.system.step_clock((REAL.now_us() - bench.system.now_us()) / 1_000_000)
    assert verifier.verify(bench.mint()).subject
