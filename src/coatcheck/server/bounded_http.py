"""HTTP with an end: how large the part of a request that is no body may be, and how long a request may take to come.

The parser below has no bound of its own on headers, trailers and chunk extensions, so one connection could fill the
memory (the class of CVE-2024-22019) or hold its place for ever by sending an octet a minute (slowloris). How large a
body may be is decided where it is read.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_OCTETS: Final = 64 * 1024
"""Target and fields of one request, four octets of punctuation a field; one more is answered 431 (RFC 6585 s5)."""

REQUEST_SECONDS: Final = 30.0
"""From the connection, or from the first octet of a later request, to the end of its body."""

# Above the exact bound by what is not counted there: method, version, line ends.
_MAX_BESIDE_BODY: Final = MAX_HEAD_OCTETS + 1024

_TOO_LARGE: Final = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain; charset=utf-8\r\n\r\n"
)


class TooLarge(Exception):
    """The head of a request passes its bound; the parser stops at once."""


class BoundedHttp(HttpToolsProtocol):
    """uvicorn's protocol with both bounds."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._head = 0
        self._beside_body = 0
        self._refused = False
        self._complete = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection."""
        super().connection_made(transport)
        self._begin_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take octets."""
        self._beside_body += len(data)
        if self._complete:
            # Also for line ends between two requests, which begin none and yet stop the timer of idle connections.
            self._begin_waiting()
        super().data_received(data)
        # A field that never ends is not told to `on_header`, so what came is counted as well.
        if self._beside_body > _MAX_BESIDE_BODY:
            self._refuse()

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head = self._beside_body = 0
        self._begin_waiting()

    def on_url(self, url: bytes) -> None:
        """A piece of the address."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header or trailer field."""
        self._count(len(name) + len(value) + 4)
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._beside_body -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request is there."""
        self._complete = True
        self._stop_waiting()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what the parser refused."""
        if self._refused:
            return
        super().send_400_response(msg)

    def _count(self, octets: int) -> None:
        self._head += octets
        if self._head > MAX_HEAD_OCTETS:
            self._refuse()
            raise TooLarge

    def _refuse(self) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.transport.write(_TOO_LARGE)
        self.transport.close()

    def _begin_waiting(self) -> None:
        self._complete = False
        if self._timer is None:
            self._timer = self.loop.call_later(REQUEST_SECONDS, self._too_late)

    def _stop_waiting(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _too_late(self) -> None:
        self._timer = None
        # Whoever has not finished asking is owed no answer.
        self.transport.close()
