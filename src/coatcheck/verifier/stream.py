"""Event streams as the feed uses them: octets in, the data of events out.

Decides how chunks (RFC 9112 s7.1) and lines (WHATWG HTML s9.2.6) are put together, under bounds: nobody can make a
verifier keep more than one page. It knows nothing of what the data says, and must never read from anywhere itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from coatcheck.core.denylist import MAX_PAGE_OCTETS

_MAX_CHUNK_HEAD: Final = 256
_CHUNK_HEAD: Final = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
# The data of one event on one line, its name and the colon.
_MAX_LINE: Final = MAX_PAGE_OCTETS + 64


class StreamBroken(ValueError):
    """Octets that are no stream of events, or too many for one event."""


class Chunks:
    """Takes the framing of chunks off."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0
        self._in_chunk = False
        self.ended = False

    def take(self, data: bytes) -> bytes:
        """The content of what has come. Raises: StreamBroken."""
        data = self._rest + data
        out: list[bytes] = []
        while data and not self.ended:
            if self._left:
                part, data = data[: self._left], data[self._left :]
                self._left -= len(part)
                out.append(part)
                continue
            head, end, after = data.partition(b"\r\n")
            if not end:
                break
            data = after
            if self._in_chunk:
                if head:
                    raise StreamBroken("a chunk is longer than it says")
                self._in_chunk = False
                continue
            size = _CHUNK_HEAD.fullmatch(head)
            if size is None:
                raise StreamBroken("the size of a chunk cannot be read")
            self._left = int(size[1], 16)
            self._in_chunk = True
            self.ended = self._left == 0
        if len(data) > _MAX_CHUNK_HEAD and not self.ended:
            raise StreamBroken("the size of a chunk is too long")
        self._rest = b"" if self.ended else data
        return b"".join(out)


class Events:
    """Puts lines together to events."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._name = b""
        self._data: bytes | None = None

    def take(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Name and data of each event that is complete now; comments and ids are passed over. Raises: StreamBroken."""
        self._rest += data
        lines: list[bytes] = []
        if b"\n" in data:
            *lines, rest = bytes(self._rest).split(b"\n")
            self._rest = bytearray(rest)
        if max(map(len, (self._rest, *lines))) > _MAX_LINE:
            raise StreamBroken("a line is too long")
        for line in lines:
            if (event := self._line(line.removesuffix(b"\r"))) is not None:
                yield event

    def _line(self, line: bytes) -> tuple[bytes, bytes] | None:
        if not line:
            name, data = self._name, self._data
            self._name, self._data = b"", None
            return None if data is None else (name, data)
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"event":
            self._name = value
        elif field == b"data":
            if self._data is not None:
                # An event of the feed has one line; several could grow past every bound.
                raise StreamBroken("an event has several lines of data")
            self._data = value
        return None
