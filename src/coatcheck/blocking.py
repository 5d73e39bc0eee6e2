"""Run a coroutine that never waits, and the waits of the blocking colour.

`operations` and `stores` are written once as `async def`. Over blocking drivers such a coroutine runs to its end in
one step; `run_blocking` takes that step. It must never start an event loop and never wait by itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Step a coroutine once, to its end, and return its result.

    Raises: RuntimeError when the coroutine suspended, which means that an asynchronous driver was handed to a
    blocking face; whatever the coroutine raises.
    """
    try:
        work.send(None)
    except StopIteration as finished:
        return finished.value  # type: ignore[no-any-return]
    work.close()
    raise RuntimeError("a blocking face met code that waits: its store or driver is of the asynchronous colour")


class BlockingLock:
    """A thread lock in the clothes of an asynchronous one: entering it never suspends."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


class BlockingSignal:
    """A signal for threads."""

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = threading.Event()

    def give(self) -> None:
        """It has happened."""
        self._event.set()

    async def wait(self, seconds: float) -> bool:
        """Hold this thread until it has happened, at most so long."""
        return self._event.wait(seconds)


class _NoTimer:
    """The blocking colour has no timer of its own: its drivers carry the deadline on the socket."""

    __slots__ = ()

    async def __aenter__(self) -> None:
        return None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class BlockingWaits:
    """The waits of `core.ports.Waits`, for threads."""

    def lock(self) -> AbstractAsyncContextManager[None]:
        """A new thread lock."""
        return BlockingLock()

    def mutex(self) -> AbstractContextManager[object]:
        """A new thread lock."""
        return threading.Lock()

    def signal(self) -> BlockingSignal:
        """A new signal."""
        return BlockingSignal()

    def deadline(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Nothing: a thread cannot be called back from a driver, so drivers carry the deadline themselves."""
        return _NO_TIMER

    async def aside(self, work: Callable[[], T]) -> T:
        """Do it here: this thread may wait for a disk."""
        return work()

    async def sleep(self, seconds: float) -> None:
        """Hold this thread."""
        time.sleep(seconds)  # noqa: ASYNC251 - the blocking colour has no event loop to hold up


_NO_TIMER = _NoTimer()
