"""Background upkeep: keep the lease of near copies, write waiting activity within a second; in either colour.

Decides when `Engine.tick` runs, never what it does. It sleeps while nobody asks for anything. Correctness never depends
on it: without a keeper a session merely looks less active than it is, and a check that finds its lease run out asks the
store. After a fork, and in a new event loop, it starts anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

from coatcheck.blocking import run_blocking
from coatcheck.deadlines import outside
from coatcheck.errors import StoreUnavailable

log: Final = logging.getLogger("coatcheck")

TICK_SECONDS: Final = 0.3
"""Between two ticks: three chances in a lease of one second."""


class Keeper(Protocol):
    """Whoever calls the upkeep."""

    def poke(self) -> None:
        """Something waits: run the upkeep within a second."""
        ...

    async def stop(self) -> None:
        """Run no more."""
        ...


class AsyncKeeper:
    """One task in the event loop that was running when something began to wait."""

    def __init__(self, work: Callable[[], Awaitable[None]], has_work: Callable[[], bool]) -> None:
        self._work = work
        self._has_work = has_work
        self._tasks: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Task[None]] = WeakKeyDictionary()

    def poke(self) -> None:
        """Run the upkeep within a second, in this event loop."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            # A coroutine thrown away after its loop had ended: what waits is found by the next one who pokes.
            return
        task = self._tasks.get(loop)
        if task is None or task.done():
            with outside():
                # A task inherits the deadline of the request that starts it.
                self._tasks[loop] = loop.create_task(self._run(), name="coatcheck-keeper")

    async def stop(self) -> None:
        """Cancel the task and wait for its end."""
        task = self._tasks.pop(asyncio.get_running_loop(), None)
        if task is None or task.done():
            return
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while self._has_work():
            await asyncio.sleep(TICK_SECONDS)
            try:
                await self._work()
            except StoreUnavailable as lost:
                log.warning("coatcheck: upkeep will be tried again: %s", lost.detail)
            except Exception:
                # Whatever it was: without upkeep sessions in use would idle out one after the other.
                log.exception("coatcheck: upkeep failed and will be tried again")


class BlockingKeeper:
    """One daemon thread a process, started when something first waits."""

    def __init__(self, work: Callable[[], Any], has_work: Callable[[], bool]) -> None:
        self._work = work
        self._has_work = has_work
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = 0

    def poke(self) -> None:
        """Run the upkeep within a second, in a thread of this process."""
        if self._pid == os.getpid() and self._wake.is_set():
            return
        if self._pid not in (0, os.getpid()):
            # Another thread of the parent may have held it at the fork; here nobody would ever release it.
            self._lock = threading.Lock()
        with self._lock:
            if self._pid != os.getpid():
                # After a fork the parent's thread does not exist here, and its events may be in any state.
                self._pid, self._thread = os.getpid(), None
                self._wake, self._halt = threading.Event(), threading.Event()
            self._wake.set()
            if self._thread is None or not self._thread.is_alive():
                self._halt.clear()
                self._thread = threading.Thread(target=self._run, name="coatcheck-keeper", daemon=True)
                self._thread.start()

    async def stop(self) -> None:
        """End the thread and wait for it."""
        with self._lock:
            thread, self._thread = self._thread, None
            self._halt.set()
            self._wake.set()
            # New ones for whoever pokes after a restart; the old thread keeps its own until it has ended.
            self._wake, self._halt = threading.Event(), threading.Event()
        if thread is not None and self._pid == os.getpid() and thread is not threading.current_thread():
            thread.join(timeout=5)

    def _run(self) -> None:
        wake, halt = self._wake, self._halt
        while not halt.is_set():
            wake.wait()
            if halt.wait(TICK_SECONDS):
                return
            wake.clear()
            try:
                run_blocking(self._work())
            except StoreUnavailable as lost:
                log.warning("coatcheck: upkeep will be tried again: %s", lost.detail)
            except Exception:
                # Whatever it was: without upkeep sessions in use would idle out one after the other.
                log.exception("coatcheck: upkeep failed and will be tried again")
            if self._has_work():
                wake.set()
