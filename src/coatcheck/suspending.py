"""The waits of the asynchronous colour, over asyncio.

The one place below the drivers that knows an event loop. It decides nothing: it turns a passed deadline into
`StoreUnavailable` and leaves every other cancellation alone.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from coatcheck.errors import OutcomeUnknown


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


class SuspendingWaits:
    """The waits of `core.ports.Waits`, for one event loop."""

    def lock(self) -> AbstractAsyncContextManager[None]:
        """A new task lock."""
        return SuspendingLock()

    def deadline(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Cancel what is awaited inside when the time has passed, and raise OutcomeUnknown."""
        return _Deadline(seconds)

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run."""
        await asyncio.sleep(seconds)
