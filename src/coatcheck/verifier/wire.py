"""One HTTP exchange at a time over one connection, with an end to everything an issuer may send.

Decides which addresses may be asked at all, how long an exchange may take in all (not per octet: an answer that comes
drop by drop has the same end), and how large an answer may be. It follows no redirect, uses no proxy, takes no
compressed answer, and reads nothing it did not ask for. What answers mean is decided elsewhere. One thread uses a line.
"""

from __future__ import annotations

import io
import os
import re
import selectors
import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from coatcheck.core.network import is_loopback
from coatcheck.errors import ConfigurationError
from coatcheck.system import System

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_VISIBLE: Final = re.compile(r"[\x21-\x7e]+")
_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_SELECTOR: Final = getattr(selectors, "PollSelector", selectors.SelectSelector)


class ExchangeFailed(Exception):
    """An exchange came to nothing; the text says why, for the log, and repeats nothing that was received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where to ask. `target` is the path with its query, if there is one."""

    secure: bool
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The `Host` field."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(text: str, *, name: str) -> Address:
    """Read an address to ask. http is taken for this machine alone: anybody on the way could add or remove keys.

    Raises: ConfigurationError, which calls the address `name`.
    """
    try:
        if not isinstance(text, str) or not _VISIBLE.fullmatch(text):
            raise ValueError("it is no address")
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError as broken:
        raise ConfigurationError(f"{name}: an https URL is needed, such as https://id.example") from broken
    if parts.scheme not in ("https", "http") or not host or not _HOST.fullmatch(host):
        raise ConfigurationError(f"{name}: an https URL is needed, such as https://id.example")
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(f"{name}: http is only for this machine itself; use https")
    if parts.username is not None or parts.password is not None or "#" in text:
        raise ConfigurationError(f"{name}: an address without user, password and fragment is needed")
    secure = parts.scheme == "https"
    return Address(
        secure=secure,
        host=host,
        port=port if port is not None else (443 if secure else 80),
        target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A complete answer. Names of fields are in lower case; of a repeated field the first counts."""

    status: int
    fields: Mapping[str, str]
    body: bytes

    @property
    def media_type(self) -> str:
        """The type of the body, without parameters, in lower case."""
        return self.fields.get("content-type", "").partition(";")[0].strip().lower()


class _Bounded(io.RawIOBase):
    """Reads from a socket until a moment of the boot-time clock, whatever comes in between."""

    def __init__(self, sock: socket.socket, system: System, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._raw = sock.makefile("rb", buffering=0)
        self._system = system
        self._deadline: float | None = deadline
        self.ended = False

    def readable(self) -> bool:
        return True

    def read_without_waiting(self) -> None:
        """From now on a read returns what is there."""
        self._deadline = None
        self._sock.settimeout(0.0)

    def readinto(self, buffer: WriteableBuffer, /) -> int | None:
        if self._deadline is not None:
            left = self._deadline - self._system.elapsed()
            if left <= 0:
                raise TimeoutError("no complete answer in time")
            self._sock.settimeout(left)
        try:
            count = self._raw.readinto(buffer)
        except ssl.SSLWantReadError:
            return None
        self.ended = count == 0
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(HTTPResponse):
    """The standard library's reader of answers, over a bounded socket."""

    def __init__(self, sock: socket.socket, bounded: _Bounded) -> None:
        super().__init__(sock, method="GET")
        self.fp.close()
        self.fp = io.BufferedReader(bounded, 64 * 1024)


class Line:
    """A connection to one address, kept between exchanges while the other side keeps it."""

    def __init__(self, address: Address, system: System) -> None:
        self._address = address
        self._system = system
        self._context: ssl.SSLContext | None = None
        self._sock: socket.socket | None = None
        self._response: _Response | None = None
        self._bounded: _Bounded | None = None

    @property
    def query_mark(self) -> str:
        """What goes in front of a query at this address."""
        return "&" if "?" in self._address.target else "?"

    def fileno(self) -> int:
        """The descriptor to wait on; -1 without a connection."""
        return -1 if self._sock is None else self._sock.fileno()

    def ask(self, query: str, fields: Mapping[str, str], *, within: float) -> float:
        """Send a GET, connecting first where it must; returns the moment just before sending.

        `query` begins with ? or & or is empty. Raises: ExchangeFailed.
        """
        deadline = self._system.elapsed() + within
        lines = [f"GET {self._address.target}{query} HTTP/1.1", f"Host: {self._address.authority}"]
        lines += ["Accept-Encoding: identity", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
        try:
            sock = self._usable(deadline)
            sock.settimeout(max(deadline - self._system.elapsed(), 0.001))
            sent = self._system.elapsed()
            sock.sendall("\r\n".join(lines).encode("ascii"))
        except (OSError, UnicodeError) as lost:
            self.close()
            raise ExchangeFailed(f"no connection: {_kind_of(lost)}") from lost
        return sent

    def answer(self, *, deadline: float, limit: int) -> Answer:
        """Read the answer to what was asked, at most `limit` octets of body. Raises: ExchangeFailed."""
        try:
            response = self._begin(deadline)
            length = response.length
            if length is not None and length > limit:
                raise ExchangeFailed(f"the answer is longer than {limit} octets")
            body = response.read(limit + 1)
            if len(body) > limit:
                raise ExchangeFailed(f"the answer is longer than {limit} octets")
            if response.length:
                raise ExchangeFailed("the answer was cut off")
            fields = _fields_of(response)
            if fields.get("content-encoding", "identity").lower() != "identity":
                raise ExchangeFailed("the answer is compressed, which was not asked for")
            keep = not response.will_close and response.isclosed()
        except (OSError, HTTPException, ValueError) as broken:
            self.close()
            raise ExchangeFailed(f"no answer: {_kind_of(broken)}") from broken
        except ExchangeFailed:
            self.close()
            raise
        if not keep:
            self.close()
        return Answer(status=response.status, fields=fields, body=body)

    def open_stream(self, *, deadline: float) -> Answer | None:
        """Read the head of an answer that goes on; `None` once `read_stream` may be used, or the complete answer of
        somebody who does not stream. Raises: ExchangeFailed."""
        try:
            response = self._begin(deadline)
            fields = _fields_of(response)
        except (OSError, HTTPException, ValueError) as broken:
            self.close()
            raise ExchangeFailed(f"no answer: {_kind_of(broken)}") from broken
        answer = Answer(status=response.status, fields=fields, body=b"")
        if answer.status == 200 and answer.media_type == "text/event-stream" and self._bounded is not None:
            self._bounded.read_without_waiting()
            return None
        self.close()
        return answer

    @property
    def is_chunked(self) -> bool:
        """Whether the open stream comes in chunks (RFC 9112 s7.1)."""
        return self._response is not None and bool(self._response.chunked)

    def read_stream(self) -> bytes | None:
        """What has come on the open stream, without waiting; `None`: nothing yet. Raises: ExchangeFailed at its end."""
        if self._response is None or self._bounded is None:
            raise ExchangeFailed("the stream is closed")
        try:
            data = self._response.fp.read1(64 * 1024)
        except (OSError, ValueError) as lost:
            self.close()
            raise ExchangeFailed(f"the stream broke: {_kind_of(lost)}") from lost
        if data:
            return data
        if self._bounded.ended:
            self.close()
            raise ExchangeFailed("the stream ended")
        return None

    def close(self) -> None:
        """Let go of the connection."""
        response, sock, bounded = self._response, self._sock, self._bounded
        self._response, self._sock, self._bounded = None, None, None
        with suppress(OSError, ValueError):
            if response is not None:
                response.close()
        with suppress(OSError, ValueError):
            if bounded is not None:
                bounded.close()
        with suppress(OSError):
            if sock is not None:
                sock.close()

    def abandon(self) -> None:
        """After a fork: close this process's copy of the descriptor, and touch nothing that a thread which does not
        exist here may have locked. The other process goes on with its own."""
        sock, self._sock = self._sock, None
        with suppress(OSError):
            if sock is not None:
                os.close(sock.detach())

    def _begin(self, deadline: float) -> _Response:
        if self._sock is None:
            raise ExchangeFailed("the connection is closed")
        if self._bounded is not None:
            self._bounded.close()
        self._bounded = _Bounded(self._sock, self._system, deadline)
        self._response = _Response(self._sock, self._bounded)
        self._response.begin()
        return self._response

    def _usable(self, deadline: float) -> socket.socket:
        if self._sock is not None and _has_something(self._sock):
            # Closed by the other side, or octets nobody asked for: the next answer would be misread.
            self.close()
        if self._sock is None:
            self._sock = self._connect(deadline)
        return self._sock

    def _connect(self, deadline: float) -> socket.socket:
        address = self._address
        # Only the look-up of the name has no end of its own; the lease runs out meanwhile.
        plain = socket.create_connection((address.host, address.port), max(deadline - self._system.elapsed(), 0.001))
        if not address.secure:
            return plain
        try:
            if self._context is None:
                self._context = ssl.create_default_context()
            plain.settimeout(max(deadline - self._system.elapsed(), 0.001))
            return self._context.wrap_socket(plain, server_hostname=address.host)
        except BaseException:
            plain.close()
            raise


class Bell:
    """Wakes a thread that waits on lines. Ringing never waits."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._in.fileno()

    def ring(self) -> None:
        """Wake the thread, now or when it next waits."""
        # A full buffer means that it has been rung before; a closed one that nobody waits.
        with suppress(OSError):
            self._out.send(b"\0")

    def hush(self) -> None:
        """Forget the ringing."""
        with suppress(OSError):
            while self._in.recv(4096):
                pass

    def close(self) -> None:
        """Let go of both ends."""
        self._in.close()
        self._out.close()

    def abandon(self) -> None:
        """After a fork: close this process's copies."""
        with suppress(OSError):
            os.close(self._in.detach())
        with suppress(OSError):
            os.close(self._out.detach())


def wait_for(waiting: list[Line | Bell], seconds: float) -> set[Line | Bell]:
    """Those of `waiting` that have something to read, after at most so many seconds."""
    with _SELECTOR() as selector:
        for one in waiting:
            if one.fileno() >= 0:
                selector.register(one.fileno(), selectors.EVENT_READ, one)
        return {key.data for key, _ in selector.select(max(seconds, 0.0))}


def _has_something(sock: socket.socket) -> bool:
    with _SELECTOR() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


def _fields_of(response: HTTPResponse) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in response.getheaders():
        found.setdefault(name.lower(), value)
    return found


def _kind_of(error: Exception) -> str:
    # The type, and of a system error its own text: an exception of a parser may quote what was received.
    if isinstance(error, OSError) and error.strerror:
        return f"{type(error).__name__} ({error.strerror})"
    return type(error).__name__
