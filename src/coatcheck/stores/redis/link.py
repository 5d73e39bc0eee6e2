"""One RESP3 connection that also brings messages, in both colours: a socket for threads, a protocol for event loops.

Decides the order in which a stream is heard: every message is handed over before any answer behind it, and an answer
belongs to the oldest open question, whether or not somebody still waits for it. One octet that cannot be understood
ends the connection: what came behind it may have been a message. The only file that imports hiredis. It must never wait
longer than it is told, know what a message means, or write on a connection inherited by a fork.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import ssl
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, cast

import hiredis

from coatcheck.stores.redis.nodes import Address, Reply

if TYPE_CHECKING:
    from coatcheck.stores.redis.driver import Word

Refusal: TypeAlias = hiredis.ReplyError
"""A server's error reply; its text may repeat what it was sent."""

Answer: TypeAlias = "Reply | Refusal"
Give: TypeAlias = Callable[[list[Answer]], None]

LOST: Final = Refusal("LOST no answer in time")
"""What a read is answered with when its answer did not come; the read may be made elsewhere."""

_MORE: Final = object()
_CHUNK: Final = 1 << 16
# An answer or message may be long, but what never ends must not fill the memory.
_MOST_OCTETS: Final = 1 << 26
# Another thread may have read what this one waits for.
_SLICE_SECONDS: Final = 0.005
# Reads of one script. A server does nothing else while it runs, about a tenth of a millisecond; and while it runs the
# next ones are got ready here.
_MOST_GATHERED: Final = 24
_HAS_POLL: Final = hasattr(select, "poll")


class Hearer(Protocol):
    """Who owns a link."""

    def told(self, link: Link, message: list[object]) -> bool:
        """A message came; false when it cannot be understood, which ends the link."""
        ...

    def ended(self, link: Link, reason: str, *, garbled: bool) -> None:
        """The link is over: called once, before open questions learn that they get no answer."""
        ...


class Question:
    """Commands that were sent together at `sent` (monotonic clock); `over` once answered, or once nobody will."""

    __slots__ = ("_give", "_waiting", "answers", "expected", "over", "sent")

    def __init__(self, expected: int, give: Give | None = None) -> None:
        self.expected: Final = expected
        self.sent: Final = time.monotonic()
        self.answers: list[Answer] = []
        self.over = False
        self._give: Final = give
        self._waiting: list[asyncio.Future[None]] = []

    @property
    def answered(self) -> bool:
        """Whether every answer has come."""
        return len(self.answers) == self.expected

    def take(self, answer: Answer) -> bool:
        """The next answer; whether it was the last."""
        self.answers.append(answer)
        if not self.answered:
            return False
        if self._give is not None:
            self._give(self.answers)
        self.lost()
        return True

    def lost(self) -> None:
        """No further answer will come."""
        self.over = True
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)

    def await_by(self, waiter: asyncio.Future[None]) -> None:
        """Set `waiter` once this is over."""
        if self.over:
            waiter.set_result(None)
        else:
            self._waiting.append(waiter)


class _Gathered:
    """Reads of several that go as one script. Each is answered by what that says to all, and then of it."""

    __slots__ = ("arguments", "futures", "keys", "sent")

    def __init__(self) -> None:
        self.keys: list[Word] = []
        self.arguments: list[Word] = []
        self.futures: list[asyncio.Future[Answer]] = []
        self.sent: Final = time.monotonic()

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.futures)

    def take(self, answer: Answer) -> bool:
        if not isinstance(answer, list) or len(answer) != len(self.futures) + 1:
            # Refused for all of them alike; or not by our script.
            answer = answer if isinstance(answer, Refusal) else LOST
            for future in self.futures:
                if not future.done():
                    future.set_result(answer)
            return True
        to_all, *to_each = answer
        for future, own in zip(self.futures, to_each, strict=True):
            if not future.done():
                future.set_result([to_all, own])
        return True

    def lost(self) -> None:
        self.take(LOST)


class Link(ABC):
    """What both colours share: the stream, its questions and its end."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, hearer: Hearer) -> None:
        self.address: Final = address
        self.over = False
        self._context: Final = context
        self._hearer: Final = hearer
        self._reader = hiredis.Reader(notEnoughData=_MORE)
        self._questions: deque[Question | _Gathered] = deque()

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.address[0]}:{self.address[1]}"

    @abstractmethod
    async def open(self, until: float) -> None:
        """Connect. Raises: OSError."""

    @abstractmethod
    def ask(self, commands: Sequence[Sequence[Word]], give: Give | None, until: float) -> Question:
        """Send commands; `give` is called with their answers, in the order of the stream, by whoever reads it."""

    @abstractmethod
    async def settled(self, question: Question, until: float) -> bool:
        """Wait until a question is over, at most until then; whether it was answered."""

    @abstractmethod
    def drain(self) -> None:
        """Hear what has come, without waiting."""

    def is_slow(self, seconds: float) -> bool:
        """Whether the oldest open question is older than that."""
        questions = self._questions
        try:
            return bool(questions) and time.monotonic() - questions[0].sent > seconds
        except IndexError:
            return False

    def close(self) -> None:
        """Close at once. Whoever is told of the end is not told of this one."""
        self.over = True
        self._shut()
        self._abandon_questions()

    @abstractmethod
    def abandon(self) -> None:
        """In the child of a fork: close our copy of the descriptor without an octet on it."""

    @abstractmethod
    def _shut(self) -> None:
        """Close the descriptor."""

    def _abandon_questions(self) -> None:
        with suppress(IndexError):
            while True:
                self._questions.popleft().lost()

    def _fail(self, reason: str, *, garbled: bool = False) -> None:
        if self.over:
            return
        self.over = True
        self._shut()
        self._hearer.ended(self, f"{self.name}: {reason}", garbled=garbled)
        self._abandon_questions()

    def _hear(self, octets: bytes) -> None:
        """Take in the next octets of the stream."""
        questions, gets = self._questions, self._reader.gets
        self._reader.feed(octets)
        while not self.over:
            try:
                item = gets()
            except Exception as error:
                # hiredis raises what building the value raised, whatever a server sent.
                self._fail(f"cannot be understood: {type(error).__name__}", garbled=True)
                return
            if item is _MORE:
                break
            if isinstance(item, hiredis.PushNotification):
                if not self._hearer.told(self, cast("list[object]", item)):
                    self._fail("sent a message that cannot be understood", garbled=True)
                continue
            try:
                question = questions[0]
            except IndexError:
                self._fail("answered what was not asked", garbled=True)
                return
            if question.take(cast("Answer", item)):
                # Gone already where the answer led to the end of this link.
                with suppress(IndexError):
                    questions.popleft()
        if self._reader.len() > _MOST_OCTETS:
            self._fail("sent more than one answer can be", garbled=True)


class BlockingLink(Link):
    """For threads: whoever has a question, or looks, reads for all."""

    def __init__(self, address: Address, context: ssl.SSLContext | None, hearer: Hearer) -> None:
        super().__init__(address, context, hearer)
        self._socket: socket.socket | None = None
        # Not re-entrant: whoever is told must not come back here.
        self._lock = threading.Lock()

    @property
    def descriptor(self) -> int:
        """For a poll object; -1 when closed."""
        return -1 if self._socket is None else self._socket.fileno()

    async def open(self, until: float) -> None:
        """Connect. Raises: OSError."""
        wire = socket.create_connection(self.address, timeout=max(0.001, until - time.monotonic()))
        self._socket = wire
        try:
            wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            wire.setblocking(False)
            if self._context is not None:
                wire = self._socket = self._context.wrap_socket(
                    wire, server_hostname=self.address[0], do_handshake_on_connect=False
                )
                self._shake_hands(wire, until)
        except BaseException:
            self._shut()
            raise

    def _shake_hands(self, wire: ssl.SSLSocket, until: float) -> None:
        while True:
            try:
                wire.do_handshake()
                return
            except ssl.SSLWantReadError:
                ready = _wait(wire.fileno(), until, to_write=False)
            except ssl.SSLWantWriteError:
                ready = _wait(wire.fileno(), until, to_write=True)
            if not ready:
                raise TimeoutError("no TLS in time")

    def ask(self, commands: Sequence[Sequence[Word]], give: Give | None, until: float) -> Question:
        """See `Link.ask`."""
        packed = b"".join(map(_pack, commands))
        with self._lock:
            question = Question(len(commands), give)
            if self.over:
                question.lost()
            else:
                self._questions.append(question)
                self._send(packed, until)
        return question

    def _send(self, packed: bytes, until: float) -> None:
        rest = memoryview(packed)
        while rest and self._socket is not None:
            try:
                rest = rest[self._socket.send(rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                if not _wait(self.descriptor, until, to_write=True):
                    # Half a command is on its way: the stream cannot be used any more.
                    self._fail("takes nothing in")
                    return
            except OSError as error:
                self._fail(_said(error))
                return

    async def settled(self, question: Question, until: float) -> bool:
        """See `Link.settled`. Other threads may hear what comes, and this one hears for them."""
        while not question.over and (now := time.monotonic()) < until:
            if _wait(self.descriptor, min(until, now + _SLICE_SECONDS), to_write=False):
                self.drain()
        return question.answered

    def drain(self) -> None:
        """See `Link.drain`. Where another thread is at it, it hears for this one."""
        if self._lock.acquire(blocking=False):
            try:
                self._listen()
            finally:
                self._lock.release()

    def _listen(self) -> None:
        while not self.over and self._socket is not None:
            try:
                octets = self._socket.recv(_CHUNK)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._fail(_said(error))
                return
            if not octets:
                self._fail("closed the connection")
                return
            self._hear(octets)
            if self._context is None and len(octets) < _CHUNK:
                return

    def abandon(self) -> None:
        """See `Link.abandon`."""
        self.over = True
        self._lock = threading.Lock()
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            # Without TLS's farewell: the other side knows what an end is.
            self._socket.close()


class SuspendingLink(Link, asyncio.Protocol):
    """For one event loop: what is written in one of its turns goes as one, and messages are heard as they come."""

    def __init__(
        self, address: Address, context: ssl.SSLContext | None, hearer: Hearer, *, patience: float = 0.25
    ) -> None:
        super().__init__(address, context, hearer)
        self.loop: Final = asyncio.get_running_loop()
        self.patience: Final = patience
        """After so many seconds a read is given up, in seconds."""
        self._transport: asyncio.Transport | None = None
        self._outgoing: list[bytes] = []
        self._gathered: dict[tuple[str, Word, int], _Gathered] = {}
        self._is_due = False
        self._watch: asyncio.TimerHandle | None = None

    async def open(self, until: float) -> None:
        """Connect. Raises: OSError."""
        host, port = self.address
        name = None if self._context is None else host
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            await self.loop.create_connection(lambda: self, host, port, ssl=self._context, server_hostname=name)

    def ask(self, commands: Sequence[Sequence[Word]], give: Give | None, until: float) -> Question:
        """See `Link.ask`."""
        question = Question(len(commands), give)
        if self.over:
            question.lost()
        else:
            self._questions.append(question)
            self._write(b"".join(map(_pack, commands)))
        return question

    async def settled(self, question: Question, until: float) -> bool:
        """See `Link.settled`."""
        if not question.over:
            waiter: asyncio.Future[None] = self.loop.create_future()
            question.await_by(waiter)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, until - time.monotonic())):
                    await waiter
        return question.answered

    def gather(self, sha: str, told: Word, group: int, key: Word, argument: Word) -> asyncio.Future[Answer]:
        """Ask a script that changes nothing about one key, together with whoever asks it in this turn of the loop.

        The script is given the keys of one group, `told` and an argument for each key, and answers a list: something
        for all, then something for each. The answer here is the first of these with what belongs to this key; or a
        refusal, or `LOST` after `patience` at the latest.
        """
        future: asyncio.Future[Answer] = self.loop.create_future()
        if self.over:
            future.set_result(LOST)
            return future
        name = sha, told, group
        gathered = self._gathered.get(name)
        if gathered is None:
            gathered = self._gathered[name] = _Gathered()
            self._rouse()
        gathered.keys.append(key)
        gathered.arguments.append(argument)
        gathered.futures.append(future)
        if len(gathered.keys) >= _MOST_GATHERED:
            self._send_gathered(name)
            self._flush()
        return future

    def _send_gathered(self, name: tuple[str, Word, int]) -> None:
        gathered = self._gathered.pop(name)
        sha, told, _ = name
        self._questions.append(gathered)
        self._outgoing.append(_pack(("EVALSHA", sha, len(gathered.keys), *gathered.keys, told, *gathered.arguments)))
        if self._watch is None:
            self._watch = self.loop.call_later(self.patience, self._look)

    def _abandon_questions(self) -> None:
        super()._abandon_questions()
        # What was never sent is lost like what was.
        while self._gathered:
            self._gathered.popitem()[1].lost()

    def _look(self) -> None:
        # One timer for all: a timer for each read would cost more than the read.
        self._watch = None
        limit = time.monotonic() - self.patience
        young: list[float] = []
        for each in self._questions:
            if isinstance(each, _Gathered) and not each.done:
                if each.sent <= limit:
                    each.lost()
                else:
                    young.append(each.sent)
        if young and not self.over:
            self._watch = self.loop.call_later(min(young) - limit, self._look)

    def drain(self) -> None:
        """See `Link.drain`. The event loop does it by itself."""

    def _write(self, packed: bytes) -> None:
        self._outgoing.append(packed)
        self._rouse()

    def _rouse(self) -> None:
        if not self._is_due:
            self._is_due = True
            self.loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._is_due = False
        for name in list(self._gathered):
            self._send_gathered(name)
        self._flush()

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        if outgoing and self._transport is not None and not self.over:
            self._transport.write(b"".join(outgoing))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)
        if self.over:
            self._shut()

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if not self.over:
            self._hear(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._fail("closed the connection" if exc is None else _said(exc))
        self._transport = None

    def abandon(self) -> None:
        """See `Link.abandon`."""
        self.over = True
        transport, self._transport = self._transport, None
        if transport is None or transport.is_closing():
            return
        descriptor = transport.get_extra_info("socket").fileno()
        if descriptor >= 0:
            # The inherited transport still believes in its descriptor, and its event loop in a poll set shared with
            # the parent: both get a hole instead.
            hole = os.open(os.devnull, os.O_RDWR)
            os.dup2(hole, descriptor, inheritable=False)
            os.close(hole)

    def _shut(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        if self._transport is not None and not self.loop.is_closed():
            self._transport.abort()


def _pack(words: Sequence[Word]) -> bytes:
    return cast("bytes", hiredis.pack_command(tuple(words)))  # type: ignore[arg-type]


def _wait(descriptor: int, until: float, *, to_write: bool) -> bool:
    """Wait for a socket, at most until then; whether it is ready, an end of stream included."""
    left = max(0.0, until - time.monotonic())
    if descriptor < 0:
        return False
    if not _HAS_POLL:
        wanted = [descriptor]
        return any(select.select([] if to_write else wanted, wanted if to_write else [], [], left))
    look = select.poll()
    look.register(descriptor, select.POLLOUT if to_write else select.POLLIN)
    return bool(look.poll(left * 1000))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]
