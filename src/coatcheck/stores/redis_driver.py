"""Connections to Redis and Valkey in both colours: deadlines, pools, redirections, error mapping.

The only file that imports redis-py, of which it uses the connection classes and nothing above them: its clients
retry by themselves and its pools hand out a connection whatever state a cancelled caller left it in. Decides when a
connection may be used again (every answer of what was sent has been read), which failure means that a write may have
happened, and what is asked again (only what a node refused to carry out). It must never wait longer than the
deadline, return a connection with an unread answer to the pool (CVE-2023-28858: the next caller would read somebody
else's session), write on a connection inherited by a fork, or put a password into a text.

A blocking name look-up (`getaddrinfo`) knows no time limit; it is the one wait the deadline does not cover.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, cast

import redis.asyncio.connection
import redis.connection
from redis import exceptions

from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis_nodes import (
    Address,
    Credentials,
    NodeFailed,
    Reply,
    Target,
    nodes_of,
    parse_target,
)

Word: TypeAlias = "str | bytes | int"

CONNECTIONS_PER_NODE: Final = 64
"""Open connections of one process and event loop to one node; callers beyond wait within their deadline."""

# Redirections and refusals that one verb follows: enough for a slot that moves twice while a script is not loaded.
_ROUNDS: Final = 6
_TRYAGAIN_SECONDS: Final = 0.02


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and its SHA-1, by which a server knows it."""

    source: str
    sha: str


@dataclass(frozen=True, slots=True)
class Call:
    """One command for the primary of a slot; with a script the command is its EVALSHA."""

    slot: int
    words: tuple[Word, ...]
    script: Script | None = None


class Driver:
    """Sends commands to the right primary, within the deadline. Any number of threads or tasks, loops and forks."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._target: Target = parse_target(url)
        self._options = options
        self._nodes = nodes_of(self._target)
        self._suspends = options.colour == "async"
        self._pid = os.getpid()
        self._pools: dict[object, dict[tuple[Address, bool], _Pool]] = {}

    def until(self) -> float:
        """The moment of the monotonic clock by which a verb that starts now has ended."""
        return time.monotonic() + self._options.deadline

    async def perform(self, calls: Sequence[Call], *, write: bool, until: float | None = None) -> list[Reply]:
        """Carry out commands, pipelined per node, and return their answers in order.

        Raises: StoreUnavailable; OutcomeUnknown for a `write` that may have happened. Where one of several nodes
        fails, the calls to the others are still made.
        """
        end = self.until() if until is None else until
        tasks = [_Task(number, call) for number, call in enumerate(calls)]
        answers: dict[int, Reply] = {}
        for _ in range(_ROUNDS):
            tasks = await self._round(tasks, answers, write, end)
            if not tasks:
                return [answers[number] for number in range(len(calls))]
        raise StoreUnavailable(f"redis: gave up after {_ROUNDS} redirections")

    async def at(self, address: Address, *commands: Sequence[Word], until: float) -> list[Reply]:
        """Carry out commands that change nothing at one node. Raises: StoreUnavailable."""
        try:
            answers = await self._exchange(address, commands, until)
        except NodeFailed as failed:
            raise self._failure(failed, write=False) from failed.__cause__
        for answer in answers:
            if isinstance(answer, Exception):
                raise self._refusal(address, answer) from self._harmless(answer)
        return cast("list[Reply]", answers)

    async def primaries(self, until: float) -> Sequence[tuple[int, Address]]:
        """Every primary with its first slot. Raises: StoreUnavailable."""
        try:
            return await self._nodes.primaries(self._ask, until)
        except NodeFailed as failed:
            raise self._failure(failed, write=False) from failed.__cause__

    async def close(self) -> None:
        """Close every connection; one in use is closed by its user. The driver may be used again."""
        self._leave_fork()
        here = self._loop()
        for loop, pools in list(self._pools.items()):
            self._pools.pop(loop, None)
            for pool in pools.values():
                pool.closed = True
                while pool.idle:
                    wire = pool.idle.pop()
                    if loop is here:
                        wire.drop()
                    elif isinstance(loop, asyncio.AbstractEventLoop) and not loop.is_closed():
                        loop.call_soon_threadsafe(wire.drop)
        # A transport closes its socket in the next turn of its loop.
        await self._options.waits.sleep(0)

    # -- one round: every pending call once ------------------------------------------------------------------------

    async def _round(
        self, tasks: list[_Task], answers: dict[int, Reply], write: bool, until: float
    ) -> list[_Task]:
        groups: dict[Address, list[_Task]] = {}
        try:
            for task in tasks:
                address = task.asked or await self._nodes.primary_of(task.call.slot, self._ask, until)
                groups.setdefault(address, []).append(task)
        except NodeFailed as failed:
            raise self._failure(failed, write=False) from failed.__cause__
        again: list[_Task] = []
        first: Exception | None = None
        for done, (address, group) in enumerate(groups.items()):
            now = time.monotonic()
            share = now + (until - now) / (len(groups) - done)
            try:
                again += await self._at_node(address, group, answers, write, share)
            except StoreUnavailable as unavailable:
                first = first or unavailable
        if first is not None:
            raise first
        if any(task.wait for task in again):
            await self._options.waits.sleep(max(0.0, min(_TRYAGAIN_SECONDS, until - time.monotonic())))
        return again

    async def _at_node(
        self, address: Address, group: list[_Task], answers: dict[int, Reply], write: bool, until: float
    ) -> list[_Task]:
        """Send a node its calls; those it refused for a reason that another try cures are returned."""
        commands = [command for task in group for command in task.commands()]
        try:
            replies = iter(await self._exchange(address, commands, until))
        except NodeFailed as failed:
            elsewhere = self._nodes.doubt(address)
            if failed.sent or not elsewhere or any(task.failed for task in group):
                raise self._failure(failed, write=write) from failed.__cause__
            for task in group:
                task.failed, task.asked = True, None
            return group
        again: list[_Task] = []
        for task in group:
            answer = [next(replies) for _ in task.commands()]
            refused = next((each for each in answer if isinstance(each, Exception)), None)
            if refused is None:
                answers[task.number] = cast(Reply, answer[-1])
            elif self._cured(task, address, refused):
                again.append(task)
            else:
                raise self._refusal(address, refused) from self._harmless(refused)
        return again

    def _cured(self, task: _Task, address: Address, refused: Exception) -> bool:
        """Whether the node carried out nothing and another try, as arranged here, may succeed."""
        asked, task.asked, task.load, task.wait = task.asked, None, False, False
        if isinstance(refused, exceptions.NoScriptError) and task.call.script is not None:
            task.load, task.asked = True, asked
            return True
        if isinstance(refused, exceptions.AskError):
            # Moved is a kind of Ask in redis-py. An empty host means: the one you have asked.
            host = str(refused.host)
            there = (host if host not in ("", "?") else address[0], int(refused.port))
            if isinstance(refused, exceptions.MovedError):
                self._nodes.moved(task.call.slot, there)
            else:
                task.asked = there
            return True
        if isinstance(refused, exceptions.TryAgainError):
            task.wait, task.asked = True, asked
            return True
        text = str(refused)
        if isinstance(refused, exceptions.ClusterDownError):
            self._nodes.doubt(address)
            return False
        # Inside a script, before Redis 7, the code stands in the middle of the text.
        if isinstance(refused, exceptions.ReadOnlyError) or "READONLY" in text:
            elsewhere = self._nodes.doubt(address)
            again, task.failed = elsewhere and not task.failed, True
            return again
        return False

    # -- one exchange with one node --------------------------------------------------------------------------------

    async def _ask(self, address: Address, words: Sequence[str], until: float) -> Reply:
        sentinel = self._target.shape == "sentinel"
        (answer,) = await self._exchange(address, [words], until, sentinel=sentinel)
        if isinstance(answer, Exception):
            raise NodeFailed(f"{_name(address)}: {self._clean(answer)}", sent=False) from self._harmless(answer)
        return answer

    async def _exchange(
        self, address: Address, commands: Sequence[Sequence[Word]], until: float, *, sentinel: bool = False
    ) -> list[Reply | Exception]:
        """Send commands on a connection of their own and read all answers; refusals are among them.

        Raises: NodeFailed.
        """
        pool = self._pool(address, sentinel)
        wire: _Wire | None = None
        sent = False
        left = until - time.monotonic()
        if left <= 0:
            raise NodeFailed(f"{_name(address)}: no time left", sent=False)
        try:
            async with self._options.waits.deadline(left):
                await pool.gate.enter(until)
                try:
                    wire = await self._fresh(pool)
                    pool.busy.add(wire)
                    if not wire.connected:
                        await wire.connect(until)
                        if self._target.shape == "sentinel" and not sentinel:
                            await _check_role(wire, until)
                    sent = True
                    replies = await wire.exchange(commands, until)
                    pool.give_back(wire)
                    wire = None
                    return replies
                finally:
                    # Whatever ended this, a cancellation included: an answer may still be on its way.
                    if wire is not None:
                        pool.busy.discard(wire)
                        wire.drop()
                    pool.gate.leave()
        except NodeFailed:
            raise
        except (exceptions.RedisError, OSError, OutcomeUnknown) as error:
            # These refusals come as exceptions in redis-py, and nothing was carried out.
            refused = isinstance(error, (exceptions.BusyLoadingError, exceptions.AuthenticationError))
            refused = refused or "max number of clients" in str(error)
            detail = f"{_name(address)}: {self._clean(error)}"
            raise NodeFailed(detail, sent=sent and not refused) from self._harmless(error)

    async def _fresh(self, pool: _Pool) -> _Wire:
        """A connection that is idle and sound, or a new one that is not connected yet."""
        while pool.idle:
            wire = pool.idle.pop()
            if await wire.is_sound():
                return wire
            wire.drop()
        make = _SuspendingWire if self._suspends else _BlockingWire
        return make(self._arguments(pool.address, pool.sentinel))

    def _arguments(self, address: Address, sentinel: bool) -> dict[str, Any]:
        who: Credentials = self._target.sentinel_credentials if sentinel else self._target.credentials
        arguments: dict[str, Any] = {
            "host": address[0],
            "port": address[1],
            "db": 0 if sentinel else self._target.database,
            "username": who.username,
            "password": who.password,
            # RESP2 needs no greeting: one round trip less for each new connection.
            "protocol": 2,
            "driver_info": None,
            "health_check_interval": 0,
        }
        if self._target.tls is not None:
            arguments |= {"ssl_check_hostname": True, **self._target.tls}
        return {"tls": self._target.tls is not None, **arguments}

    # -- pools: one for each event loop (or for all threads), address and process ----------------------------------

    def _pool(self, address: Address, sentinel: bool) -> _Pool:
        self._leave_fork()
        loop = self._loop()
        pools = self._pools.get(loop)
        if pools is None:
            for other in [each for each in self._pools if _is_closed(each)]:
                # Its transports cannot be used or closed in order any more; they end with their last reference.
                self._pools.pop(other, None)
            pools = self._pools.setdefault(loop, {})
        pool = pools.get((address, sentinel))
        if pool is None:
            gate = _SuspendingGate() if self._suspends else _BlockingGate()
            pool = pools.setdefault((address, sentinel), _Pool(address, sentinel, gate))
        return pool

    def _loop(self) -> object:
        return asyncio.get_running_loop() if self._suspends else None

    def _leave_fork(self) -> None:
        """In a child process: let go of inherited connections. The parent goes on using them."""
        pid = os.getpid()
        if pid == self._pid:
            return
        self._pid = pid
        inherited, self._pools = self._pools, {}
        for pools in inherited.values():
            for pool in pools.values():
                pool.closed = True
                while pool.idle:
                    pool.idle.pop().abandon()
                while pool.busy:
                    pool.busy.pop().abandon()

    # -- failures as ours ------------------------------------------------------------------------------------------

    def _failure(self, failed: NodeFailed, *, write: bool) -> StoreUnavailable:
        if failed.sent and write:
            return OutcomeUnknown(f"redis: no answer, the write may have happened: {failed}")
        return StoreUnavailable(f"redis: {failed}")

    def _refusal(self, address: Address, refused: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"redis: {_name(address)} refused: {self._clean(refused)}")

    def _clean(self, error: BaseException) -> str:
        """The text of an error without our passwords: some servers repeat a command they do not know."""
        text = " ".join(str(error).split()) or type(error).__name__
        for secret in self._secrets():
            text = text.replace(secret, "***")
        return text[:300]

    def _harmless(self, error: Exception) -> Exception:
        """The error itself as a cause, or one of its kind without our passwords."""
        if any(secret in str(error) for secret in self._secrets()):
            return exceptions.RedisError(self._clean(error))
        return error

    def _secrets(self) -> list[str]:
        both = (self._target.credentials.password, self._target.sentinel_credentials.password)
        return [secret for secret in both if secret]


@dataclass(slots=True)
class _Task:
    """A call on its way: what has to go before it, and where it was told to go."""

    number: int
    call: Call
    load: bool = False
    wait: bool = False
    failed: bool = False
    asked: Address | None = None

    def commands(self) -> list[Sequence[Word]]:
        before: list[Sequence[Word]] = []
        if self.load and self.call.script is not None:
            before.append(("SCRIPT", "LOAD", self.call.script.source))
        if self.asked is not None:
            # Holds for the one command after it.
            before.append(("ASKING",))
        return [*before, self.call.words]


class _Gate(Protocol):
    async def enter(self, until: float) -> None: ...
    def leave(self) -> None: ...


class _Wire(Protocol):
    """One connection. Between `connect` and `drop` used by one caller at a time."""

    @property
    def connected(self) -> bool: ...
    async def connect(self, until: float) -> None: ...
    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[Reply | Exception]: ...
    async def is_sound(self) -> bool:
        """Whether nothing is waiting to be read on it, an end of stream included."""
        ...

    def drop(self) -> None:
        """Close at once; what was not sent yet is not sent any more."""
        ...

    def abandon(self) -> None:
        """Close our copy of a descriptor that belongs to another process, without a byte on it."""
        ...


@dataclass(slots=True)
class _Pool:
    """Idle connections to one address; the last one used is the first to be used again."""

    address: Address
    sentinel: bool
    gate: _Gate
    idle: list[_Wire] = field(default_factory=list)
    busy: set[_Wire] = field(default_factory=set)
    closed: bool = False

    def give_back(self, wire: _Wire) -> None:
        self.busy.discard(wire)
        if self.closed:
            wire.drop()
        else:
            self.idle.append(wire)


class _BlockingGate:
    def __init__(self) -> None:
        self._places = threading.BoundedSemaphore(CONNECTIONS_PER_NODE)

    async def enter(self, until: float) -> None:
        if not self._places.acquire(timeout=max(0.0, until - time.monotonic())):
            raise NodeFailed(f"all {CONNECTIONS_PER_NODE} connections are in use", sent=False)

    def leave(self) -> None:
        self._places.release()


class _SuspendingGate:
    def __init__(self) -> None:
        self._places = asyncio.Semaphore(CONNECTIONS_PER_NODE)

    async def enter(self, until: float) -> None:
        await self._places.acquire()

    def leave(self) -> None:
        self._places.release()


async def _check_role(wire: _Wire, until: float) -> None:
    # A sentinel that was cut off names the old primary, which may be a replica by now: it would answer reads.
    (answer,) = await wire.exchange([("ROLE",)], until)
    if isinstance(answer, Exception):
        raise answer
    if not isinstance(answer, list) or answer[0] != b"master":
        raise exceptions.ConnectionError("the node that the sentinels name is not a primary")


def _is_closed(loop: object) -> bool:
    return isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()


def _name(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


# -- the blocking colour -------------------------------------------------------------------------------------------


class _BoundedSocket:
    """A socket whose operations share one deadline, so that an answer that drips cannot add them up."""

    def __init__(self, inner: socket.socket, left: Callable[[], float]) -> None:
        self._inner = inner
        self._left = left

    def settimeout(self, seconds: float | None) -> None:
        """The deadline decides, not who uses the socket."""

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._inner.settimeout(self._left())
            view = view[self._inner.send(view) :]

    def recv(self, size: int, flags: int = 0) -> bytes:
        self._inner.settimeout(self._left())
        return self._inner.recv(size, flags) if flags else self._inner.recv(size)

    def recv_into(self, buffer: bytearray) -> int:
        self._inner.settimeout(self._left())
        return self._inner.recv_into(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Bounded:
    """What makes a blocking connection of redis-py end in time: every limit is what is left until `until`."""

    until: float = 0.0

    def left(self) -> float:
        # Zero would mean "do not block" to a socket; a millisecond means "too late".
        return max(0.001, self.until - time.monotonic())

    @property
    def socket_timeout(self) -> float:
        return self.left()

    @socket_timeout.setter
    def socket_timeout(self, value: float | None) -> None: ...

    @property
    def socket_connect_timeout(self) -> float:
        return self.left()

    @socket_connect_timeout.setter
    def socket_connect_timeout(self, value: float | None) -> None: ...

    def _connect(self) -> _BoundedSocket:
        connect = cast("Callable[[], socket.socket]", super()._connect)  # type: ignore[misc]
        return _BoundedSocket(connect(), self.left)


class _BoundedTcp(_Bounded, redis.connection.Connection):  # type: ignore[misc]
    pass


class _BoundedTls(_Bounded, redis.connection.SSLConnection):  # type: ignore[misc]
    pass


class _BlockingWire:
    def __init__(self, arguments: dict[str, Any]) -> None:
        kind = _BoundedTls if arguments.pop("tls") else _BoundedTcp
        self._connection: Any = kind(**arguments)

    @property
    def connected(self) -> bool:
        return bool(self._connection.is_connected)

    async def connect(self, until: float) -> None:
        self._connection.until = until
        self._connection.connect()

    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[Reply | Exception]:
        self._connection.until = until
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        replies: list[Reply | Exception] = []
        for _ in commands:
            try:
                replies.append(self._connection.read_response())
            except exceptions.ResponseError as refused:
                replies.append(refused)
        return replies

    async def is_sound(self) -> bool:
        # Only a look, by the operating system: it neither reads nor waits.
        descriptor = self._connection._sock.fileno()
        if not hasattr(select, "poll"):
            return not select.select([descriptor], [], [], 0)[0]
        look = select.poll()
        look.register(descriptor, select.POLLIN)
        return not look.poll(0)

    def drop(self) -> None:
        self._connection.disconnect()

    def abandon(self) -> None:
        # redis-py remembers the process that connected and only closes the descriptor in another one.
        self._connection.disconnect()


# -- the asynchronous colour ---------------------------------------------------------------------------------------


class _Abortable:
    """What an asynchronous connection of redis-py lacks: an end that neither waits nor sends what is left."""

    _reader: asyncio.StreamReader | None
    _writer: asyncio.StreamWriter | None
    _parser: Any

    def is_sound(self) -> bool:
        reader, writer = self._reader, self._writer
        if reader is None or writer is None or writer.is_closing() or reader.exception() is not None:
            return False
        return not reader.at_eof()

    def abort(self) -> None:
        writer, self._writer, self._reader = self._writer, None, None
        self._parser.on_disconnect()
        if writer is not None:
            writer.transport.abort()

    def abandon(self) -> None:
        writer, self._writer, self._reader = self._writer, None, None
        if writer is None or writer.is_closing():
            return
        descriptor = writer.get_extra_info("socket").fileno()
        if descriptor >= 0:
            # The inherited transport still believes in its descriptor and would say goodbye on the parent's
            # connection when it is collected, or take it out of the parent's poll set: give it a hole instead.
            hole = os.open(os.devnull, os.O_RDWR)
            os.dup2(hole, descriptor, inheritable=False)
            os.close(hole)


class _AbortableTcp(_Abortable, redis.asyncio.connection.Connection):
    pass


class _AbortableTls(_Abortable, redis.asyncio.connection.SSLConnection):
    pass


class _SuspendingWire:
    def __init__(self, arguments: dict[str, Any]) -> None:
        kind = _AbortableTls if arguments.pop("tls") else _AbortableTcp
        # No time limits of its own: the deadline around every exchange is the limit.
        self._connection: Any = kind(socket_timeout=None, socket_connect_timeout=None, **arguments)

    @property
    def connected(self) -> bool:
        return bool(self._connection.is_connected)

    async def connect(self, until: float) -> None:
        await self._connection.connect()

    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[Reply | Exception]:
        packed = self._connection.pack_commands(commands)
        await self._connection.send_packed_command(packed, check_health=False)
        replies: list[Reply | Exception] = []
        for _ in commands:
            try:
                replies.append(await self._connection.read_response())
            except exceptions.ResponseError as refused:
                replies.append(refused)
        return replies

    async def is_sound(self) -> bool:
        return bool(self._connection.is_sound()) and not await self._connection.can_read()

    def drop(self) -> None:
        self._connection.abort()

    def abandon(self) -> None:
        self._connection.abandon()
