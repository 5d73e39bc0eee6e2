"""The connections that a process, or one event loop of it, shares among its callers.

Our own, and small enough to prove. psycopg_pool retries a refused connection after 1, 2, 4 s and sleeps as long
between two dead ones, so one restart of the server would outlast a deadline of 2 s; its callers wait for their whole
deadline where a refusal is known at once; and giving a connection back may wait, where a cancelled caller can lose
it. Here a caller connects for itself, and giving back never waits. A connection that is known to be dead must never
be handed out.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from coatcheck.stores.postgres.connection import Link

MAX_CONNECTIONS: Final = 10
"""Connections of one process (asynchronous: of one event loop). More callers wait for their turn."""

MAX_IDLE_SECONDS: Final = 300.0
"""A connection unused for longer is not trusted: firewalls forget a silent flow and drop what comes later."""


class Gate(Protocol):
    """Lets `MAX_CONNECTIONS` callers in."""

    async def enter(self, until: float) -> None:
        """Wait for a place. Raises: TimeoutError after `until` in the blocking colour; a task is cancelled instead."""
        ...

    def leave(self) -> None:
        """Give the place to the next one; never waits."""
        ...


class ThreadGate:
    """The gate of the blocking colour."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(MAX_CONNECTIONS)

    async def enter(self, until: float) -> None:
        """See `Gate`."""
        if not self._places.acquire(timeout=max(0.0, until - time.monotonic())):
            raise TimeoutError

    def leave(self) -> None:
        """See `Gate`."""
        self._places.release()


class TaskGate:
    """The gate of the asynchronous colour, for one event loop."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)

    async def enter(self, until: float) -> None:
        """See `Gate`."""
        await self._places.acquire()

    def leave(self) -> None:
        """See `Gate`."""
        self._places.release()


class Pool:
    """Connections of one process and one event loop. The one that was used last is used next."""

    def __init__(self, gate: Gate, connect: Callable[[float], Awaitable[Link]]) -> None:
        self._gate = gate
        self._connect = connect
        self._idle: list[tuple[Link, float]] = []
        self._shut = False

    async def take(self, until: float) -> Link:
        """A connection that was alive a moment ago. Raises: TimeoutError, psycopg.Error."""
        await self._gate.enter(until)
        try:
            while True:
                try:
                    link, since = self._idle.pop()
                except IndexError:
                    return await self._connect(until)
                if time.monotonic() - since < MAX_IDLE_SECONDS and link.usable():
                    return link
                link.close()
        except BaseException:
            self._gate.leave()
            raise

    def give(self, link: Link) -> None:
        """Take a connection back; one that is in the middle of something is closed. Never waits."""
        if link.usable():
            self._idle.append((link, time.monotonic()))
        else:
            link.close()
        self._gate.leave()
        # After the append: whoever shuts the pool at this moment closes this connection, or we do.
        if self._shut:
            self.shut()
        if len(self._idle) > 1 and time.monotonic() - self._idle[0][1] >= MAX_IDLE_SECONDS:
            self._close_oldest()

    def shut(self) -> None:
        """Close what is idle now, and everything else when it is given back."""
        self._shut = True
        while self._idle:
            self._close_oldest()

    def abandon(self) -> None:
        """Forget connections that a parent process uses; their descriptors are closed unused."""
        self._shut = True
        for link, _ in self._idle:
            link.abandon()
        _inherited.append(self._idle)
        self._idle = []

    def _close_oldest(self) -> None:
        try:
            link, _ = self._idle.pop(0)
        except IndexError:
            return
        link.close()


# Never collected: a connection object that is collected would speak to the server.
_inherited: list[list[tuple[Link, float]]] = []
