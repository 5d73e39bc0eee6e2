"""Connections that outlast their request: looked at again at least once a lease, and ended when the sign-in ends.

Decides when a WebSocket or a response that goes on is looked at (at every message of it, and when what was known has
run out), and that nothing passes in between. What was known is the session's word (`vouched_until`), so a look at a
session of which there is a near copy asks no store. It must never cost an ordinary response anything, never let a
message through while nobody knows whether the session lives, and never send anything by itself: how a connection is
ended is handed in.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import FOR_EVER
from coatcheck.deadlines import outside
from coatcheck.errors import StoreUnavailable
from coatcheck.session import AsyncSession, Session
from coatcheck.system import System

log: Final = logging.getLogger("coatcheck")

T = TypeVar("T")

Why: TypeAlias = Literal["session_ended", "store_unavailable", "internal_error"]
"""Why a connection is ended."""


class Timer(Protocol):
    """Something that will be called later, unless it is cancelled."""

    def cancel(self) -> None:
        """Do not call it."""
        ...


Later: TypeAlias = Callable[[float, Callable[[], None]], Timer]
"""Calls something after so many seconds."""


def in_this_loop(seconds: float, call: Callable[[], None]) -> Timer:
    """By the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, call)


class Over(OSError):
    """The connection was ended while the application used it, as a client may end it at any time."""


class Watch:
    """Who looks again at one connection of an event loop.

    Between two looks it is a timer; a task there is only while the store is asked. `end` is called once at most, and
    `close` waits for it.
    """

    __slots__ = (
        "_end",
        "_ending",
        "_interrupted",
        "_later",
        "_session",
        "_system",
        "_task",
        "_timer",
        "_waiting",
        "looks",
        "over",
    )

    def __init__(
        self, session: AsyncSession, system: System, *, end: Callable[[Why], Awaitable[None]], later: Later
    ) -> None:
        self._session = session
        self._system = system
        self._end = end
        self._later = later
        self._timer: Timer | None = None
        self._task: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._waiting: set[asyncio.Task[object]] = set()
        self._interrupted: set[asyncio.Task[object]] = set()
        self.looks = False
        """Whether the connection lasts and has not come to its end."""
        self.over: Why | None = None
        """Why it was ended here, if it was."""

    def start(self) -> None:
        """The connection has begun to last. Nothing comes of it where nobody is signed in."""
        until = self._session.vouched_until()
        if until == FOR_EVER:
            return
        self.looks = True
        # Asked at once where nobody vouches: whoever goes on sending waits for it, whoever is silent does not.
        self._arm(self._system.elapsed() if until is None else until)

    def stop(self) -> None:
        """The connection has come to its own end: look no more. One that is being ended here is ended."""
        self.looks = False
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if self._task is not None and self.over is None:
            self._task.cancel()

    async def close(self) -> None:
        """Look no more, and wait until nothing runs here any more."""
        self.stop()
        tasks = [task for task in (self._task, self._ending) if task is not None]
        if not tasks:
            return
        try:
            await asyncio.wait(tasks)
        finally:
            for task in tasks:
                task.cancel()

    def passes_now(self) -> bool:
        """Whether the next message may pass without a question. Asks nobody. Where it is `over` nothing may."""
        return not self.looks or self._session.vouched_until() is not None

    async def passes(self) -> bool:
        """Whether the next message may pass; asks where nobody knows. All who wait at once ask once."""
        if self.looks and self._session.vouched_until() is None:
            await asyncio.wait((self._ask(),))
        return self.over is None

    async def until_over(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """What `work` returns, or None as soon as the connection is over."""
        if self.over is not None:
            return None
        task = asyncio.current_task()
        assert task is not None, "awaited in a task, as everything of a connection is"  # noqa: S101
        cancels = task.cancelling()
        # By hand: `asyncio.timeout` would cost every request with a body three microseconds more.
        self._waiting.add(task)
        try:
            return await work()
        except asyncio.CancelledError:
            if task not in self._interrupted or task.cancelling() > cancels + 1:
                # Somebody else cancels it.
                raise
            return None
        finally:
            self._waiting.discard(task)
            if task in self._interrupted:
                self._interrupted.discard(task)
                task.uncancel()

    def _arm(self, until: float) -> None:
        if self._timer is None and self.looks:
            # Not at once: a store that answers more slowly than the lease lasts would be asked without a pause.
            delay = max(until - self._system.elapsed(), _AT_LEAST_SECONDS)
            with outside():
                self._timer = self._later(delay, self._look)

    def _look(self) -> None:
        self._timer = None
        until = self._session.vouched_until()
        if until is None:
            self._ask()
        elif until != FOR_EVER:
            self._arm(until)

    def _ask(self) -> asyncio.Task[None]:
        task = self._task
        if task is None or task.done():
            # It outlasts the request by now, whose time for the store must not run out over it.
            self._session.lasting = True
            with outside():
                task = self._task = asyncio.get_running_loop().create_task(self._check(), name="coatcheck-stream")
        return task

    async def _check(self) -> None:
        why = await _why_over(self._session)
        if why is None:
            self._arm(self._session.vouched_until() or 0.0)
            return
        self.over = why
        self.stop()
        self._interrupted, self._waiting = self._waiting, set()
        for each in self._interrupted:
            each.cancel()
        # On its own: a client that reads nothing may hold up its end, but not the application's hearing of it.
        self._ending = asyncio.get_running_loop().create_task(self._finish(why), name="coatcheck-stream-end")

    async def _finish(self, why: Why) -> None:
        try:
            await self._end(why)
        except Exception as gone:
            # Most often the other side has just left; nothing more can be told to it.
            log.info("coatcheck: a connection could not be closed in order: %r", gone)


def goes_on(session: Session) -> bool:
    """Whether the next chunk of a response in blocking code may leave. Asks the store where nobody vouches."""
    if session.vouched_until() is not None:
        return True
    session.lasting = True
    return run_blocking(_why_over(session)) is None


async def _why_over(session: AsyncSession | Session) -> Why | None:
    try:
        if await session.still_lives():
            return None
    except StoreUnavailable as lost:
        log.warning("coatcheck: a connection is ended, its session cannot be looked at: %s", lost.detail)
        return "store_unavailable"
    except Exception:
        # Whatever it was: a connection that nobody can look at any more must not go on for ever.
        log.exception("coatcheck: a connection is ended, looking at its session failed")
        return "internal_error"
    ended = session.ended
    log.info("coatcheck: a connection is ended with its session: %s", "" if ended is None else ended.reason)
    return "session_ended"


_AT_LEAST_SECONDS: Final = 0.02
