"""The waits of the asynchronous colour, over asyncio.

The one place below the drivers that knows an event loop. It decides nothing: it turns a passed deadline into
`StoreUnavailable` and leaves every other cancellation alone.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import TypeVar

from coatcheck.errors import OutcomeUnknown

T = TypeVar("T")


class _Deadline:
    __slots__ = ("_seconds", "_timeout")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            raise OutcomeUnknown(f"the store did not answer within {self._seconds:g} s") from late


class SuspendingLock:
    """An asyncio lock whose `async with` binds nothing."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> None:
        await self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class SuspendingSignal:
    """A signal for tasks, also of several event loops: whoever gives it may run in another one."""

    __slots__ = ("_given", "_mutex", "_waiting")

    def __init__(self) -> None:
        self._given = False
        self._mutex = threading.Lock()
        self._waiting: list[asyncio.Future[None]] = []

    def give(self) -> None:
        """It has happened."""
        with self._mutex:
            self._given, waiting = True, self._waiting
        for future in waiting:
            try:
                future.get_loop().call_soon_threadsafe(_wake, future)
            except RuntimeError:
                # Its event loop was closed: nobody waits there any more.
                continue

    async def wait(self, seconds: float) -> bool:
        """Let other tasks run until it has happened, at most so long."""
        future = asyncio.get_running_loop().create_future()
        with self._mutex:
            if self._given:
                return True
            self._waiting.append(future)
        try:
            async with asyncio.timeout(seconds):
                await future
        except TimeoutError:
            return False
        return True


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class SuspendingWaits:
    """The waits of `core.ports.Waits`, for one event loop."""

    def lock(self) -> AbstractAsyncContextManager[None]:
        """A new task lock."""
        return SuspendingLock()

    def mutex(self) -> AbstractContextManager[object]:
        """A new thread lock: what it guards may be shared by several event loops."""
        return threading.Lock()

    def signal(self) -> SuspendingSignal:
        """A new signal."""
        return SuspendingSignal()

    def deadline(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Cancel what is awaited inside when the time has passed, and raise OutcomeUnknown."""
        return _Deadline(seconds)

    async def aside(self, work: Callable[[], T]) -> T:
        """Do it on another thread."""
        return await asyncio.to_thread(work)

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run."""
        await asyncio.sleep(seconds)
