"""A TCP relay between a client and a server that can be told to misbehave.

All sockets belong to one thread; every order is carried out on that thread before the call that
gave it returns, so a test knows what the next byte will meet. The relay knows nothing of what it
carries, and adds no delay: what is late is late because a test holds it.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import queue
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import until

_CHUNK = 65_536
_FULL = 1 << 20
# Closing then sends RST instead of FIN, as a crashed host or a firewall does.
_RESET = struct.pack("ii", 1, 0)


class Mode(enum.Enum):
    """What happens to bytes."""

    PASS = "pass"
    HOLD = "hold"
    SWALLOW = "swallow"
    SWALLOW_ANSWERS = "swallow answers"


@dataclass(kw_only=True, eq=False)
class _End:
    """One socket of a pair, with the bytes that wait to be written to it."""

    socket: socket.socket
    is_client: bool
    pending: bytearray = field(default_factory=bytearray)
    finished: bool = False
    ended: bool = False


@dataclass(kw_only=True, eq=False)
class _Pair:
    client: _End
    server: _End
    # Bytes were lost on the way: both sides disagree about the stream from here on.
    damaged: bool = False

    def other(self, end: _End) -> _End:
        return self.server if end is self.client else self.client


class Relay:
    """Listens on `port` and carries every connection to `target_port`, both on loopback.

    `accepted` counts connections and `swallowed` bytes since the start. Safe to order about from
    any thread.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.accepted = 0
        self.swallowed = 0
        self._reservation = reserve_port()
        self._mode = Mode.PASS
        self._answer_budget: int | None = None
        self._listener: socket.socket | None = None
        self._pairs: set[_Pair] = set()
        self._selector = selectors.DefaultSelector()
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)

    @property
    def port(self) -> int:
        return self._reservation.port

    @property
    def open_connections(self) -> int:
        """Connections that the relay carries now."""
        return len(self._pairs)

    def address_in(self, url: str) -> str:
        """The same URL, leading through the relay. For URLs with a single host."""
        parts = urlsplit(url)
        account, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{account}{at}{LOOPBACK}:{self.port}"))

    def forward(self) -> None:
        """Carry everything, the bytes held so far first; connections that have lost bytes are reset."""

        def order() -> None:
            self._listen()
            self._mode = Mode.PASS
            self._answer_budget = None
            for pair in list(self._pairs):
                if pair.damaged:
                    self._reset(pair)

        self._do(order)

    def hold(self) -> None:
        """Take in nothing more on either side; `forward()` delivers it all, late."""
        self._do(lambda: self._change(Mode.HOLD))

    def swallow(self) -> None:
        """Black hole: connections are accepted, bytes vanish both ways, nothing is ever closed."""
        self._do(lambda: self._change(Mode.SWALLOW))

    def swallow_answers(self) -> None:
        """Requests arrive and are executed; their answers vanish."""
        self._do(lambda: self._change(Mode.SWALLOW_ANSWERS))

    def reset_after(self, answer_bytes: int) -> None:
        """Let this many more bytes of answers through, over all connections, then reset the one that sends more.

        The limit is spent by one reset; new connections are carried normally.
        """
        if answer_bytes < 0:
            raise ValueError("answer_bytes must not be negative")

        def order() -> None:
            self._change(Mode.PASS)
            self._answer_budget = answer_bytes

        self._do(order)

    def cut(self) -> None:
        """Reset every open connection, on both sides; new ones are carried as before."""

        def order() -> None:
            for pair in list(self._pairs):
                self._reset(pair)

        self._do(order)

    def refuse(self) -> None:
        """Be gone like a dead process: open connections are reset, new ones refused, until `forward()`."""

        def order() -> None:
            for pair in list(self._pairs):
                self._reset(pair)
            if self._listener is not None:
                self._selector.unregister(self._listener)
                self._listener.close()
                self._listener = None

        self._do(order)

    def await_accepted(self, count: int, *, within: float = 10.0) -> None:
        """Wait until `count` connections have been accepted since the start. Raises: TimeoutError."""
        until(lambda: self.accepted >= count, within=within, what=f"{count} connections accepted")

    def start(self) -> None:
        """Begin to listen."""
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        self._listen()
        self._thread.start()

    def close(self) -> None:
        """Reset what is open and end the thread; fine to call twice."""
        if self._thread.is_alive():
            self.refuse()
            self._stopping = True
            self._do(lambda: None)
            self._thread.join(timeout=10.0)
        self._selector.close()
        self._wake_in.close()
        self._wake_out.close()
        self._reservation.release()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, order: Callable[[], None]) -> None:
        done = threading.Event()
        self._orders.put((order, done))
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"!")
        if not done.wait(timeout=10.0) or self._failure is not None:
            raise RuntimeError("the relay's thread has failed") from self._failure

    # Everything below runs on the relay's thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, events in self._selector.select():
                    if key.fileobj is self._wake_out:
                        with contextlib.suppress(BlockingIOError):
                            self._wake_out.recv(_CHUNK)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, tuple):
                        pair, end = key.data
                        # An earlier event of the same round may have ended the pair.
                        if pair in self._pairs:
                            self._serve(pair, end, events)
                self._obey()
        except BaseException as failure:
            self._failure = failure
            raise
        finally:
            self._obey()

    def _obey(self) -> None:
        while not self._orders.empty():
            order, done = self._orders.get()
            try:
                if self._failure is None:
                    order()
                    for pair in list(self._pairs):
                        self._attend(pair)
            except BaseException as failure:
                self._failure = failure
                raise
            finally:
                done.set()

    def _change(self, mode: Mode) -> None:
        self._mode = mode
        self._answer_budget = None

    def _listen(self) -> None:
        if self._listener is None:
            listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, self.port))
            listener.listen(256)
            listener.setblocking(False)
            self._listener = listener
            self._selector.register(listener, selectors.EVENT_READ)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            # The client has already given up.
            return
        self.accepted += 1
        server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for each in (client, server):
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pair = _Pair(client=_End(socket=client, is_client=True), server=_End(socket=server, is_client=False))
        self._pairs.add(pair)
        status = server.connect_ex((LOOPBACK, self.target_port))
        if status not in (0, errno.EINPROGRESS):
            self._reset(pair)
            return
        self._attend(pair)

    def _serve(self, pair: _Pair, end: _End, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                self._read(pair, end)
            if events & selectors.EVENT_WRITE and pair in self._pairs and end.pending:
                sent = end.socket.send(end.pending)
                del end.pending[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._reset(pair)
        if pair in self._pairs:
            self._attend(pair)

    def _read(self, pair: _Pair, end: _End) -> None:
        data = end.socket.recv(_CHUNK)
        swallowed = self._mode is Mode.SWALLOW or (self._mode is Mode.SWALLOW_ANSWERS and not end.is_client)
        if not data:
            end.ended = True
        elif swallowed:
            pair.damaged = True
            self.swallowed += len(data)
        elif end.is_client or self._answer_budget is None:
            pair.other(end).pending += data
        else:
            allowed = data[: self._answer_budget]
            self._answer_budget -= len(allowed)
            # Handed over at once: what the reset overtakes in a buffer would never arrive.
            self._deliver(pair.client, allowed)
            if len(allowed) < len(data):
                self._answer_budget = None
                self._reset(pair)

    def _deliver(self, end: _End, data: bytes) -> None:
        end.socket.setblocking(True)
        end.socket.settimeout(5.0)
        try:
            end.socket.sendall(bytes(end.pending) + data)
        finally:
            end.socket.setblocking(False)
        end.pending.clear()

    def _attend(self, pair: _Pair) -> None:
        """Close what is over, and tell the selector what the pair waits for."""
        passing = self._mode is not Mode.HOLD
        vanishing = self._mode is Mode.SWALLOW
        for end in (pair.client, pair.server):
            source = pair.other(end)
            # A half-closed stream is passed on as such, after its last byte, but never out of a black hole.
            if source.ended and passing and not vanishing and not end.pending and not end.finished:
                end.finished = True
                with contextlib.suppress(OSError):
                    end.socket.shutdown(socket.SHUT_WR)
        if pair.client.finished and pair.server.finished:
            self._close(pair)
            return
        for end in (pair.client, pair.server):
            events = 0
            if passing and not end.ended and len(pair.other(end).pending) < _FULL:
                events |= selectors.EVENT_READ
            if passing and end.pending and not vanishing:
                events |= selectors.EVENT_WRITE
            self._watch(pair, end, events)

    def _watch(self, pair: _Pair, end: _End, events: int) -> None:
        known = self._selector.get_map().get(end.socket)
        if known is None:
            if events:
                self._selector.register(end.socket, events, (pair, end))
        elif not events:
            self._selector.unregister(end.socket)
        elif known.events != events:
            self._selector.modify(end.socket, events, (pair, end))

    def _reset(self, pair: _Pair) -> None:
        for end in (pair.client, pair.server):
            with contextlib.suppress(OSError):
                end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._close(pair)

    def _close(self, pair: _Pair) -> None:
        self._pairs.discard(pair)
        for end in (pair.client, pair.server):
            self._watch(pair, end, 0)
            end.socket.close()
