"""Connections to Redis and Valkey in both colours: deadlines, pools, errors.

The only file that imports redis-py, of which it uses the connection classes and nothing above them: its clients
retry by themselves and its pools hand out a connection whatever state a cancelled caller left it in. Decides when a
connection may be used again (every answer of what was sent has been read), whether a command that failed may have
been carried out, and whether that counts for the breaker of the node (`core.breaker`). It must never wait longer than
the deadline, return a connection with an unread answer to the pool (CVE-2023-28858: the next caller would read somebody
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, cast

import redis.asyncio.connection
import redis.connection
from redis import exceptions

from coatcheck.core.breaker import Breaker, is_fair
from coatcheck.deadlines import is_urgent
from coatcheck.errors import OutcomeUnknown
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.nodes import Address, Credentials, NodeFailed, Reply, Target

Word: TypeAlias = "str | bytes | int"
_Answer: TypeAlias = "Reply | exceptions.ResponseError"

CONNECTIONS_PER_NODE: Final = 64
"""Open connections of one process and event loop to one node; callers beyond wait within their deadline."""

_LATE: Final = (exceptions.TimeoutError, TimeoutError, OutcomeUnknown)
# redis-py takes the code off the text of the errors it knows; order matters, MOVED is a kind of ASK there.
_CODES: Final[tuple[tuple[type[Exception], str], ...]] = (
    (exceptions.NoScriptError, "NOSCRIPT"),
    (exceptions.MovedError, "MOVED"),
    (exceptions.AskError, "ASK"),
    (exceptions.TryAgainError, "TRYAGAIN"),
    (exceptions.ReadOnlyError, "READONLY"),
    (exceptions.MasterDownError, "MASTERDOWN"),
    (exceptions.ClusterDownError, "CLUSTERDOWN"),
    (exceptions.OutOfMemoryError, "OOM"),
    (exceptions.NoPermissionError, "NOPERM"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A server's error reply: it carried out nothing. `elsewhere` is the node that MOVED and ASK name."""

    code: str
    text: str
    cause: Exception
    elsewhere: Address | None = None


class _Silence(NodeFailed):
    """No connection to a node, or no answer in time; it was given so many seconds."""

    def __init__(self, detail: str, *, sent: bool, granted: float) -> None:
        super().__init__(detail, sent=sent)
        self.granted = granted


class Driver:
    """Exchanges commands for answers with single nodes. Any number of threads or tasks, event loops and forks."""

    def __init__(self, target: Target, options: StoreOptions) -> None:
        self._target = target
        self._options = options
        self._suspends = options.colour == "async"
        self._home = _Home(os.getpid())

    async def exchange(
        self, address: Address, commands: Sequence[Sequence[Word]], until: float, *, sentinel: bool = False
    ) -> list[Reply | Refused]:
        """Send commands on a connection of their own and read all answers; refusals are among them.

        `until` is a moment of the monotonic clock. Raises: NodeFailed, at once while the node is left alone.
        """
        if sentinel:
            # Left alone by whoever asks them: the one that failed is asked last.
            return await self._exchange(address, commands, until, sentinel=True)
        now, breaker = time.monotonic(), self._breaker(address)
        era = breaker.enter(now, urgent=is_urgent())
        if era is None:
            away = now - (breaker.since or now)
            text = f"{address[0]}:{address[1]}: not asked: it has been silent for {away:.1f} s"
            raise NodeFailed(text, sent=False)
        try:
            answers = await self._exchange(address, commands, until, sentinel=False)
            breaker.answered()
            return answers
        except _Silence as silence:
            breaker.failed(era, time.monotonic(), fair=is_fair(silence.granted, self._options.deadline))
            raise
        finally:
            breaker.left(era)

    async def _exchange(
        self, address: Address, commands: Sequence[Sequence[Word]], until: float, *, sentinel: bool
    ) -> list[Reply | Refused]:
        name = f"{address[0]}:{address[1]}"
        pool = self._pool(address, sentinel)
        wire: _Wire | None = None
        sent = False
        granted: float | None = None
        left = until - time.monotonic()
        if left <= 0:
            raise NodeFailed(f"{name}: no time left", sent=False)
        try:
            async with self._options.waits.deadline(left):
                await pool.gate.enter(until)
                granted = until - time.monotonic()
                try:
                    wire = await self._fresh(pool)
                    pool.busy.add(wire)
                    if not wire.connected:
                        await wire.connect(until)
                        if self._target.shape == "sentinel" and not sentinel:
                            await _check_role(wire, until)
                    sent = True
                    answers = await wire.exchange(commands, until)
                    pool.give_back(wire)
                    wire = None
                finally:
                    # Whatever ended this, a cancellation included: an answer may still be on its way.
                    if wire is not None:
                        pool.busy.discard(wire)
                        wire.drop()
                    pool.gate.leave()
        except (exceptions.RedisError, OSError, OutcomeUnknown) as error:
            # These refusals come as exceptions in redis-py, and nothing was carried out.
            refused = isinstance(error, (exceptions.BusyLoadingError, exceptions.AuthenticationError))
            refused = refused or "max number of clients" in str(error)
            text = f"{name}: {self._clean(error)}"
            unreached = not sent and isinstance(error, (exceptions.ConnectionError, OSError))
            # Who waited for one of our own connections, and had none when the time was over, knows nothing of the node.
            if granted is not None and not refused and (unreached or isinstance(error, _LATE)):
                raise _Silence(text, sent=sent, granted=granted) from self._harmless(error)
            raise NodeFailed(text, sent=sent and not refused) from self._harmless(error)
        return [self._refused(name, each) if isinstance(each, Exception) else each for each in answers]

    async def close(self) -> None:
        """Close every connection; one in use is closed by its user. The driver may be used again."""
        home, here = self._at_home(), self._loop()
        for loop, pools in list(home.pools.items()):
            home.pools.pop(loop, None)
            for pool in pools.values():
                _empty(pool, loop, here)
        # A transport closes its socket in the next turn of its loop.
        await self._options.waits.sleep(0)

    def forget(self, address: Address) -> None:
        """Use no connection to this address again that was made until now; one in use is closed by its user."""
        home, here = self._at_home(), self._loop()
        home.breakers.pop(address, None)
        for loop, pools in list(home.pools.items()):
            pool = pools.pop((address, False), None)
            if pool is not None:
                _empty(pool, loop, here)

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

    # -- pools: one for each process, event loop (or all threads) and address --------------------------------------

    def _pool(self, address: Address, sentinel: bool) -> _Pool:
        home, loop = self._at_home(), self._loop()
        pools = home.pools.get(loop)
        if pools is None:
            for other in [each for each in home.pools if _is_closed(each)]:
                # Its transports cannot be used or closed in order any more; they end with their last reference.
                home.pools.pop(other, None)
            pools = home.pools.setdefault(loop, {})
        pool = pools.get((address, sentinel))
        if pool is None:
            gate = _SuspendingGate() if self._suspends else _BlockingGate()
            pool = pools.setdefault((address, sentinel), _Pool(address, sentinel, gate))
        return pool

    def _breaker(self, address: Address) -> Breaker:
        breakers = self._at_home().breakers
        return breakers.get(address) or breakers.setdefault(address, Breaker(self._options.waits.mutex()))

    def _loop(self) -> object:
        return asyncio.get_running_loop() if self._suspends else None

    def _at_home(self) -> _Home:
        """The connections of this process. In a child, those inherited are let go: the parent goes on using them."""
        home = self._home
        if home.pid == os.getpid():
            return home
        # No lock: one that another thread held at the fork would stay locked here for ever. Of two threads that come
        # first the later one's home stays; each inherited connection is taken off its list once.
        self._home = _Home(os.getpid())
        for pools in list(home.pools.values()):
            for pool in pools.values():
                pool.closed = True
                while pool.idle:
                    pool.idle.pop().abandon()
                while pool.busy:
                    pool.busy.pop().abandon()
        return self._home

    # -- texts without passwords -----------------------------------------------------------------------------------

    def _refused(self, name: str, error: Exception) -> Refused:
        text = str(error)
        code = next((code for kind, code in _CODES if isinstance(error, kind)), "")
        if not code and "READONLY" in text:
            # Before Redis 7 an error inside a script has its code in the middle of the text.
            code = "READONLY"
        elsewhere = None
        if isinstance(error, exceptions.AskError):
            # An empty host means: the one you have asked.
            host = str(error.host)
            elsewhere = (host if host not in ("", "?") else name.rpartition(":")[0], int(error.port))
        cause = self._harmless(error)
        return Refused(code=code, text=f"{name} refused: {code} {self._clean(error)}", cause=cause, elsewhere=elsewhere)

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


class _Home:
    """All connections of one process, by event loop (`None` in the blocking colour), and what it knows of the nodes.

    Breakers are not taken over by a child: one of the parent's threads may have held their lock at the fork.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pools: dict[object, dict[tuple[Address, bool], _Pool]] = {}
        self.breakers: dict[Address, Breaker] = {}


class _Gate(Protocol):
    async def enter(self, until: float) -> None: ...
    def leave(self) -> None: ...


class _Wire(Protocol):
    """One connection. Between `connect` and `drop` used by one caller at a time."""

    @property
    def connected(self) -> bool: ...
    async def connect(self, until: float) -> None: ...
    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[_Answer]: ...
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
        raise exceptions.ResponseError("the node that the sentinels name is not a primary")


def _empty(pool: _Pool, loop: object, here: object) -> None:
    """Close what is idle, in its own event loop, and let its users close what is in use."""
    pool.closed = True
    while pool.idle:
        wire = pool.idle.pop()
        if loop is here:
            wire.drop()
        elif isinstance(loop, asyncio.AbstractEventLoop) and not loop.is_closed():
            loop.call_soon_threadsafe(wire.drop)


def _is_closed(loop: object) -> bool:
    return isinstance(loop, asyncio.AbstractEventLoop) and loop.is_closed()


def _is_quiet(descriptor: int) -> bool:
    """Whether nothing waits to be read, an end of stream included; asked of the kernel, without reading or waiting."""
    if descriptor < 0:
        return False
    if not hasattr(select, "poll"):
        return not select.select([descriptor], [], [], 0)[0]
    look = select.poll()
    look.register(descriptor, select.POLLIN)
    return not look.poll(0)


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

    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[_Answer]:
        self._connection.until = until
        packed = self._connection.pack_commands(commands)
        self._connection.send_packed_command(packed, check_health=False)
        replies: list[_Answer] = []
        for _ in commands:
            try:
                replies.append(self._connection.read_response())
            except exceptions.ResponseError as refused:
                replies.append(refused)
        return replies

    async def is_sound(self) -> bool:
        return bool(self._connection.is_connected) and _is_quiet(self._connection._sock.fileno())

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
        # The event loop may not have heard yet what the kernel knows.
        return not reader.at_eof() and _is_quiet(writer.get_extra_info("socket").fileno())

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

    async def exchange(self, commands: Sequence[Sequence[Word]], until: float) -> list[_Answer]:
        packed = self._connection.pack_commands(commands)
        await self._connection.send_packed_command(packed, check_health=False)
        replies: list[_Answer] = []
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
