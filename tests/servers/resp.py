"""The Redis protocol (RESP2) on one blocking socket: enough to start, watch and count servers.

Not redis-py, so that a fault in the driver under test cannot hide itself in what tests observe.
"""

from __future__ import annotations

import re
import socket
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeAlias

from tests.servers.ports import LOOPBACK

Reply: TypeAlias = "bytes | int | list[Reply] | None"


class ReplyError(Exception):
    """The server answered with an error."""


@dataclass(frozen=True, kw_only=True)
class ClientCommand:
    """One command as a client sent it; commands that a script runs inside are not seen."""

    name: str
    arguments: tuple[str, ...]


class RespConnection:
    """A connection to one server on loopback, for one thread."""

    def __init__(self, port: int, *, timeout: float = 5.0) -> None:
        self._socket = socket.create_connection((LOOPBACK, port), timeout=timeout)
        self._input = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._input.close()
        self._socket.close()

    def command(self, *words: str | int | bytes) -> Reply:
        """Send one command and return its reply. Raises: ReplyError, OSError."""
        encoded = [word if isinstance(word, bytes) else str(word).encode() for word in words]
        parts = [b"*%d\r\n" % len(encoded)]
        parts += [b"$%d\r\n%s\r\n" % (len(word), word) for word in encoded]
        self._socket.sendall(b"".join(parts))
        return self.read()

    def read(self) -> Reply:
        """Read one reply. Raises: ReplyError, OSError."""
        line = self._input.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionResetError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        match kind:
            case b"+":
                return rest
            case b":":
                return int(rest)
            case b"-":
                raise ReplyError(rest.decode(errors="replace"))
            case b"$":
                size = int(rest)
                return None if size < 0 else self._input.read(size + 2)[:-2]
            case b"*":
                count = int(rest)
                return None if count < 0 else [self.read() for _ in range(count)]
            case _:
                raise ReplyError(f"not RESP2: {line!r}")


def ask(port: int, *words: str | int | bytes, timeout: float = 5.0) -> Reply:
    """One command on a connection of its own. Raises: ReplyError, OSError."""
    with RespConnection(port, timeout=timeout) as connection:
        return connection.command(*words)


def ask_fields(port: int, *words: str | int | bytes) -> dict[str, str]:
    """The `name:value` lines of INFO and CLUSTER INFO."""
    reply = ask(port, *words)
    assert isinstance(reply, bytes)
    pairs = (line.partition(":") for line in reply.decode().splitlines())
    return {name: value for name, colon, value in pairs if colon}


class CommandMonitor:
    """Everything clients send to one server between the start and `finish()`, by MONITOR."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream = RespConnection(port)
        self._stream.command("MONITOR")

    def finish(self) -> list[ClientCommand]:
        """Stop, and return the commands that were executed before this call."""
        # Our own last word in the stream: everything executed earlier stands before it.
        mark = f"end-{uuid.uuid4().hex}"
        ask(self._port, "ECHO", mark)
        seen: list[ClientCommand] = []
        with self._stream:
            while True:
                line = self._stream.read()
                assert isinstance(line, bytes)
                text = line.decode(errors="replace")
                if mark in text:
                    return seen
                command = _parse_monitor_line(text)
                if command is not None:
                    seen.append(command)


_MONITOR_LINE = re.compile(r'^[\d.]+ \[\d+ (?P<source>.*?)\] (?P<words>".*")$')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


def _parse_monitor_line(text: str) -> ClientCommand | None:
    line = _MONITOR_LINE.match(text)
    if line is None or line["source"] == "lua":
        return None
    name, *arguments = _QUOTED.findall(line["words"])
    return ClientCommand(name=name.upper(), arguments=tuple(arguments))
