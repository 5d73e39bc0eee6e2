"""`python -m bench.load PORT CONNECTIONS SECONDS FILE`: keep a server busy and print what it did, as JSON.

Each connection sends one request, reads the whole answer, and sends the next; requests come from FILE in turn,
separated by a NUL. It stands in for wrk, and a Python client may be busier than the server it measures: its figures
say less, and whoever prints them says so.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import uvloop


class Connection(asyncio.Protocol):
    """One client that waits for each answer."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: Any = None
        self._buffer = b""
        self._sent = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._load.over:
            self._load.lost += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.split(b"\r\n"):
            if line[:15].lower() == b"content-length:":
                length = int(line[15:])
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._load.answered(head[9:12], time.perf_counter() - self._sent)
        if self._load.over:
            self._transport.close()
        else:
            self._ask()

    def _ask(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(next(self._load.requests))


class Load:
    """All connections of one burst."""

    def __init__(self, requests: list[bytes]) -> None:
        self.requests = cycle(requests)
        self.over = False
        self.refused = self.lost = 0
        self.seconds: list[float] = []

    def answered(self, status: bytes, seconds: float) -> None:
        self.seconds.append(seconds)
        if not status.startswith(b"2"):
            self.refused += 1

    async def burst(self, port: int, connections: int, seconds: float) -> dict[str, float]:
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        opened = [await loop.create_connection(lambda: Connection(self), "127.0.0.1", port) for _ in range(connections)]
        await asyncio.sleep(seconds)
        self.over = True
        taken = time.perf_counter() - begun
        for transport, _ in opened:
            transport.close()
        parts = statistics.quantiles(self.seconds, n=100)
        return {
            "requests": len(self.seconds),
            "seconds": taken,
            "p50_ms": parts[49] * 1000,
            "p99_ms": parts[98] * 1000,
            "refused": self.refused,
            "lost": self.lost,
        }


def main() -> None:
    port, connections, seconds, path = sys.argv[1:]
    requests = [each for each in Path(path).read_bytes().split(b"\0") if each]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(Load(requests).burst(int(port), int(connections), float(seconds)))))


if __name__ == "__main__":
    main()
