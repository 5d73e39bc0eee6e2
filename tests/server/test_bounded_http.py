"""The bound in time; the bounds in size are tested on a real server in `test_serving.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest
import uvicorn
from uvicorn.server import ServerState

from coatcheck.server.bounded_http import REQUEST_SECONDS, BoundedHttp


class _Handle:
    def __init__(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel


class _Task:
    def add_done_callback(self, _: object) -> None:
        pass


class Timers:
    """A loop that only notes what is to be called later."""

    def __init__(self) -> None:
        self.pending: list[tuple[float, Callable[..., object]]] = []

    def call_later(self, delay: float, callback: Callable[[], object]) -> _Handle:
        entry = (delay, callback)
        self.pending.append(entry)
        return _Handle(lambda: self.pending.remove(entry))

    def create_task(self, work: Coroutine[Any, Any, None], **_: object) -> _Task:
        work.close()
        return _Task()

    @property
    def seconds(self) -> list[float]:
        return [delay for delay, _ in self.pending]


class Wire(asyncio.Transport):
    """A transport that only remembers whether it was closed."""

    closed = False

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: object) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connected() -> tuple[BoundedHttp, Timers, Wire]:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("not reached")

    config = uvicorn.Config(app, log_config=None, lifespan="off")
    config.load()
    timers, wire = Timers(), Wire()
    protocol = BoundedHttp(config, ServerState(), {}, _loop=cast(Any, timers))
    protocol.connection_made(wire)
    return protocol, timers, wire


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\nhost: a\r\nx:", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n12345678"],
)
def test_a_request_that_does_not_end_in_time_is_cut_off(sent: bytes) -> None:
    protocol, timers, wire = connected()
    for octet in sent:
        protocol.data_received(bytes((octet,)))
    # One timer for the whole request: another octet in time buys no more of it.
    ((seconds, fire),) = timers.pending
    assert seconds == REQUEST_SECONDS
    assert not wire.closed
    fire()
    assert wire.closed


def test_a_whole_request_stops_the_timer_and_line_ends_behind_it_start_it_again() -> None:
    protocol, timers, _ = connected()
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert timers.seconds == []
    protocol.data_received(b"\r\n")
    assert timers.seconds == [REQUEST_SECONDS]
    protocol.connection_lost(None)
    assert timers.seconds == []
