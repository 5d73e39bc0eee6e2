"""What is denied, told to verifiers: pages on request, and a stream that only makes it faster.

Decides when this server may vouch for the list: a page is read from the store while the caller waits, and every
stream ends as soon as the one reader behind them has not heard from the store for a lease. One task reads the log for
all streams, four times a second and at once when this server itself has ended something; it begins where the first
stream has read to. A reader that falls behind loses its stream and asks again with its cursor. Entries may come twice,
none is ever left out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from coatcheck.core.denylist import MAX_PAGE_ENTRIES, PAGE_ENTRIES, entry_of
from coatcheck.core.freshness import Lease
from coatcheck.core.ports import DenialPage, PositionLost
from coatcheck.errors import CursorLost, StoreUnavailable
from coatcheck.events import EventKind
from coatcheck.manager import AsyncCoatcheck
from coatcheck.primitives.digest import keyed
from coatcheck.settings import FEED_SERVER_LEASE_SECONDS
from coatcheck.system import System

log = logging.getLogger("coatcheck.server")

DENYING: Final[frozenset[EventKind]] = frozenset({"session.ended", "refresh.reused", "token.denied", "key.withdrawn"})
"""Events after which the log has a new entry."""

POLL_SECONDS: Final = 0.25
KEEP_ALIVE_SECONDS: Final = 0.5
STREAM_SECONDS: Final = 60.0
"""A stream ends after so long, and whoever comes back shows its credential again: a client that was removed cannot."""

MAX_STREAMS: Final = 500
MAX_STREAMS_PER_CLIENT: Final = 100
MAX_BEHIND: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """One page as it goes out: the JSON and its cursor. `asked`: when the store was asked, boot-time seconds."""

    octets: bytes
    cursor: str
    more: bool
    asked: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedStream:
    """One reader's place among the streams. Iterate `events` once, and call `close` whatever became of that."""

    events: AsyncGenerator[bytes, None]
    leave: Callable[[], None]

    async def close(self) -> None:
        """Give the place back."""
        # First: closing a generator that was never begun runs none of it.
        self.leave()
        await self.events.aclose()


class RevocationFeed:
    """The feed of one server. `wake` may be called from any task of its event loop."""

    def __init__(self, coat: AsyncCoatcheck, *, system: System) -> None:
        self._coat = coat
        self._system = system
        self._streams: dict[asyncio.Queue[FeedPage | None], str] = {}
        self._news: asyncio.Event | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False

    def wake(self) -> None:
        """Something was denied here: tell it now."""
        if self._news is not None:
            self._news.set()

    async def page(self, cursor: str | None, *, limit: int) -> FeedPage:
        """What was denied after the cursor; from the start without one. Raises: CursorLost, StoreUnavailable."""
        engine = self._coat.engine
        await engine.ready()
        # Another server may have lengthened the life of tokens meanwhile.
        await engine.keep_keys()
        asked = self._system.elapsed()
        found = await engine.issuer.denials(after=self._position(cursor), limit=min(limit, MAX_PAGE_ENTRIES))
        if isinstance(found, PositionLost):
            raise CursorLost("the position lies ahead of the log: the store was restored, or is another one")
        return self._written(found, asked=asked)

    async def stream(self, cursor: str | None, *, client: str, limit: int = PAGE_ENTRIES) -> FeedStream:
        """Server-sent events from the cursor on; they end when this server cannot vouch any more, or after a while.

        Raises before the first event: CursorLost, StoreUnavailable (also for one stream too many, in all or of one
        client).
        """
        if self._stopped:
            raise StoreUnavailable("this server is stopping")
        if len(self._streams) >= MAX_STREAMS:
            raise StoreUnavailable("there are as many streams of the feed as this server keeps")
        if list(self._streams.values()).count(client) >= MAX_STREAMS_PER_CLIENT:
            raise StoreUnavailable(f"client {client} has as many streams of the feed as one may have")
        waiting: asyncio.Queue[FeedPage | None] = asyncio.Queue(MAX_BEHIND)
        # Before the log is read: what is denied from here on comes through one of the two.
        self._streams[waiting] = client
        followed = self._following
        try:
            page = await self.page(cursor, limit=limit)
        except BaseException:
            self._leave(waiting)
            raise
        return FeedStream(
            events=self._events(page, waiting, limit=limit, followed=followed),
            leave=lambda: self._leave(waiting),
        )

    async def stop(self) -> None:
        """End every stream and the task behind them, for good."""
        self._stopped = True
        task, self._task, self._news = self._task, None, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._end_streams()

    async def _events(
        self, page: FeedPage, waiting: asyncio.Queue[FeedPage | None], *, limit: int, followed: bool
    ) -> AsyncGenerator[bytes, None]:
        until = self._system.elapsed() + STREAM_SECONDS
        try:
            yield _event(page)
            # Until a page that was asked for with the one reader at work leaves nothing: the rest is in the queue.
            while page.more or not followed:
                if not page.more and self._begin(page):
                    break
                followed = self._following
                page = await self.page(page.cursor, limit=limit)
                yield _event(page)
            while self._system.elapsed() < until:
                try:
                    news = await asyncio.wait_for(waiting.get(), KEEP_ALIVE_SECONDS)
                except TimeoutError:
                    yield b":\n\n"
                    continue
                if news is None:
                    return
                yield _event(news)
        except (CursorLost, StoreUnavailable):
            # The verifier asks again and is told why; its own lease runs out meanwhile.
            return
        finally:
            self._leave(waiting)

    def _leave(self, waiting: asyncio.Queue[FeedPage | None]) -> None:
        self._streams.pop(waiting, None)
        if not self._streams:
            # The one reader looks whether anybody is left, and ends.
            self.wake()

    # -- the one reader --------------------------------------------------------------------------------------------

    @property
    def _following(self) -> bool:
        return self._task is not None and not self._task.done()

    def _begin(self, page: FeedPage) -> bool:
        """Follow the log from the end of a page; False where that is done already, from somewhere else."""
        if self._following:
            return False
        if self._stopped:
            return True
        self._news = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(
            self._follow(page, self._news), name="coatcheck-revocations"
        )
        return True

    async def _follow(self, page: FeedPage, news: asyncio.Event) -> None:
        try:
            await self._read_on(page, news)
        except TimeoutError:
            log.warning("the streams of the revocation feed are closed: the store does not answer")
        except (CursorLost, StoreUnavailable) as lost:
            log.warning("the streams of the revocation feed are closed: %s", lost.detail)
        except Exception:
            # Whatever it was: a stream that goes on without its reader would vouch for what nobody knows.
            log.exception("the revocation feed failed; its streams are closed")
        finally:
            self._end_streams()

    async def _read_on(self, page: FeedPage, news: asyncio.Event) -> None:
        lease = Lease(FEED_SERVER_LEASE_SECONDS)
        lease.confirm(page.asked, 0)
        while self._streams:
            try:
                async with asyncio.timeout(FEED_SERVER_LEASE_SECONDS):
                    read = await self.page(page.cursor, limit=PAGE_ENTRIES)
            except StoreUnavailable:
                if not lease.is_fresh(self._system.elapsed()):
                    raise
            else:
                lease.confirm(read.asked, 0)
                if read.cursor != page.cursor:
                    self._tell(read)
                page = read
                if page.more:
                    continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(news.wait(), POLL_SECONDS)
            news.clear()

    def _tell(self, page: FeedPage) -> None:
        for waiting in list(self._streams):
            try:
                waiting.put_nowait(page)
            except asyncio.QueueFull:
                self._drop(waiting)

    def _end_streams(self) -> None:
        for waiting in list(self._streams):
            self._drop(waiting)

    def _drop(self, waiting: asyncio.Queue[FeedPage | None]) -> None:
        self._streams.pop(waiting, None)
        while not waiting.empty():
            waiting.get_nowait()
        waiting.put_nowait(None)

    # -- the form --------------------------------------------------------------------------------------------------

    def _written(self, found: DenialPage, *, asked: float) -> FeedPage:
        engine = self._coat.engine
        cursor = f"{self._identity}.{found.position}"
        body = {
            "cursor": cursor,
            "more": found.more,
            "lag": round(self._system.elapsed() - asked, 6),
            "longest": engine.issuer.ring.longest,
            "entries": [entry_of(denial, issuer=engine.settings.issuer, sid_of=engine.sid) for denial in found.entries],
        }
        return FeedPage(octets=msgspec.json.encode(body), cursor=cursor, more=found.more, asked=asked)

    def _position(self, cursor: str | None) -> str | None:
        if cursor is None:
            return None
        identity, _, position = cursor.partition(".")
        if identity != self._identity or not position or len(position) > 64:
            raise CursorLost("a cursor of another store")
        return position

    @property
    def _identity(self) -> str:
        # The same on every server of one store; a store that was emptied makes new keys and is another one.
        return keyed(b"feed", key=self._coat.engine.keys.check_key, size=8, purpose=b"cc-ident").hex()


def _event(page: FeedPage) -> bytes:
    return b"event: revoked\nid: " + page.cursor.encode("ascii") + b"\ndata: " + page.octets + b"\n\n"
