"""The asynchronous colour of SQLite: one writer thread behind a bounded queue, point reads on the loop's thread.

Decides what happens to work whose caller is gone. Work that has not begun when its caller gives up never begins;
work that has begun runs to its commit or rollback and its answer is dropped. So a cancelled task leaves nothing half
done, and the next one finds the writer ready. A reader in WAL waits for no writer, which is why point reads need no
thread; one that meets a lock all the same (recovery after a crash) goes to the thread. Belongs to no event loop: an
answer finds the loop that asked, and a loop that is gone is answered no more.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

from coatcheck.core.ports import Waits
from coatcheck.deadlines import time_left
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.stores.sqlite.driver import Announcer, Link, Links, Locked, Work

T = TypeVar("T")

QUEUE_LENGTH: Final = 1024
# The rest is for the answer's way back, so that "locked, nothing was written" arrives before the caller's own timer.
_SHARE_OF_DEADLINE: Final = 0.8


class SuspendingDriver:
    """The asynchronous colour. May be used from any number of event loops."""

    def __init__(
        self,
        path: str,
        *,
        waits: Waits,
        deadline: float,
        queue_length: int = QUEUE_LENGTH,
        announcer: Announcer | None = None,
    ) -> None:
        self._links = Links(path, deadline, announcer)
        self._waits = waits
        self._deadline = deadline
        self._queue_length = queue_length
        self._writer: _Writer | None = None

    @property
    def links(self) -> Links:
        """The connections of this process."""
        return self._links

    async def read(self, work: Work[T], *, point: bool = True) -> T:
        """On the loop's thread where that cannot wait, else on the writer's."""
        if point:
            # It does not wait; but a request whose time is over is told so, whichever store it asks.
            time_left(self._deadline)
            try:
                return self._links.mine().read(work, until=0.0, deadline=self._deadline)
            except Locked:
                pass
        return await self.aside(work)

    async def write(self, work: Work[T], *, durable: bool = True) -> T:
        """One transaction on the writer's thread. Raises: StoreUnavailable, OutcomeUnknown."""
        return await self._send(
            lambda link, until: link.write(work, durable=durable, until=until, deadline=self._deadline)
        )

    async def aside(self, work: Work[T]) -> T:
        """On the writer's thread, without a transaction."""
        return await self._send(lambda link, until: link.read(work, until=until, deadline=self._deadline))

    async def apart(self, step: Callable[[], T], *, seconds: float) -> T:
        """On the writer's thread. A step whose caller gave up runs to its end all the same, once it has begun."""
        async with self._waits.deadline(seconds):
            return await self._send(lambda link, until: step())

    async def close(self) -> None:
        """End the thread after what is queued, then close every connection."""
        with self._links.starting:
            writer, self._writer = self._writer, None
        if writer is not None and writer.alive():
            # The thread closes its own connection before it answers: the last to close tidies the log away.
            stop: _Job[None] = _Job(lambda link, until: link.finish(), until=0.0, last=True)
            writer.jobs.put(stop)
            try:
                async with self._waits.deadline(self._deadline):
                    await stop.future
            except OutcomeUnknown:
                # A disk that does not answer holds the thread; it ends by itself when the disk does.
                return
        self._links.close()

    async def _send(self, step: Callable[[Link, float], T]) -> T:
        seconds = time_left(self._deadline)
        writer = self._running()
        if not writer.room.acquire(blocking=False):
            raise StoreUnavailable("sqlite: the writer's queue is full; nothing was written")
        job = _Job(step, until=time.monotonic() + seconds * _SHARE_OF_DEADLINE)
        writer.jobs.put(job)
        try:
            async with self._waits.deadline(seconds):
                return await job.future
        except OutcomeUnknown as late:
            if job.claim():
                raise StoreUnavailable("sqlite: the writer was busy until the deadline; nothing was written") from late
            raise
        finally:
            # A task that was cancelled while it waited in the queue must not write afterwards.
            job.claim()

    def _running(self) -> _Writer:
        writer = self._writer
        if writer is not None and writer.alive():
            return writer
        with self._links.starting:
            if self._writer is None or not self._writer.alive():
                self._writer = _Writer(self._links, self._queue_length)
                # A store that is dropped without being closed must not leave a thread behind for ever.
                weakref.finalize(self, self._writer.jobs.put, None).atexit = False
            return self._writer


class _Job(Generic[T]):
    """One piece of work and the future of its caller. Whoever claims it first decides whether it runs."""

    __slots__ = ("_claimed", "_loop", "_step", "_until", "future", "last")

    def __init__(self, step: Callable[[Link, float], T], *, until: float, last: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        self._claimed = threading.Lock()
        self._step = step
        self._until = until
        self.future: asyncio.Future[T] = self._loop.create_future()
        self.last = last

    def claim(self) -> bool:
        """True for the first caller only."""
        return self._claimed.acquire(blocking=False)

    def run(self, link: Link) -> None:
        if not self.claim():
            return
        answer: Callable[[], None]
        try:
            answer = partial(self._succeed, self._step(link, self._until))
        except BaseException as error:
            # Whatever it is belongs to the caller; this thread has to go on.
            answer = partial(self._fail, error)
        # A loop that was closed meanwhile has nobody left to be told.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(answer)

    def _succeed(self, result: T) -> None:
        if not self.future.done():
            self.future.set_result(result)

    def _fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Writer:
    """The thread, its queue, and the room that is left in it."""

    def __init__(self, links: Links, length: int) -> None:
        self.jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self.room = threading.BoundedSemaphore(length)
        # A daemon: an application that ends without closing must end. A transaction it cuts off is rolled back.
        self._thread = threading.Thread(
            target=_serve, args=(self.jobs, self.room, links), name="coatcheck-sqlite", daemon=True
        )
        self._thread.start()

    def alive(self) -> bool:
        """False after a stop, and in a child process, where no thread but the forking one goes on."""
        return self._thread.is_alive()


def _serve(jobs: SimpleQueue[_Job[Any] | None], room: threading.BoundedSemaphore, links: Links) -> None:
    while (job := jobs.get()) is not None:
        job.run(links.mine())
        if job.last:
            return
        room.release()
        # The last job must not be kept alive, with its caller's data, until the next one comes.
        del job
