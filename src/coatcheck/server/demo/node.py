"""One node of the demonstration: a process of its own with an `AsyncCoatcheck`, as a server process would have it.

Decides how a check is made and timed. It checks only while it is told to, and ends when its standard input does: a
demonstration that was killed leaves no process behind. It must never print anything but answers, and never an id in
any but the one answer that is asked for.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import sys
import threading
import time
from datetime import timedelta
from typing import BinaryIO, Final

import msgspec

from coatcheck.errors import CoatcheckError, StoreUnavailable
from coatcheck.manager import AsyncCoatcheck
from coatcheck.server.demo.cut import CuttableFeed, CuttableStore
from coatcheck.server.demo.messages import (
    Answer,
    Begin,
    Cut,
    Done,
    Failed,
    Mend,
    Order,
    Ready,
    Revoke,
    Revoked,
    SignedIn,
    SignIn,
    Stop,
    Warm,
    Warmed,
    Watch,
    Watched,
    Watching,
    line_of,
    read_begin,
    read_order,
)
from coatcheck.session import SendCookie
from coatcheck.settings import Settings
from coatcheck.stores.near import NearStore
from coatcheck.stores.open import open_store
from coatcheck.system import REAL

SUBJECT: Final = "demo"
WARM_CHECKS: Final = 100
CHECKS_AFTER_REFUSAL: Final = 20
REST_SECONDS: Final = 0.0002
"""Between two checks of a watch: what is measured is finer than that, and the store keeps the processor."""

_WARM_SECONDS: Final = 5.0
_STEP_SECONDS: Final = 0.01
_END_SECONDS: Final = 5.0


def settings_for(begin: Begin) -> Settings:
    """What every node decides alike. The sample user's sessions end by themselves if nobody ends them."""
    return Settings(
        namespace=begin.namespace,
        lease=timedelta(seconds=begin.lease),
        server_key=bytes.fromhex(begin.server_key),
        idle_timeout=timedelta(minutes=30),
        absolute_timeout=timedelta(hours=1),
    )


class Node:
    """What one process does when it is told."""

    def __init__(self, begin: Begin) -> None:
        settings = settings_for(begin)
        deadline = settings.store_deadline.total_seconds()
        store = CuttableStore(
            open_store(begin.store, colour="async", namespace=begin.namespace, deadline=deadline, system=REAL)
        )
        self._coat = AsyncCoatcheck(store.as_store(), settings=settings)
        near, feed = self._coat.engine.near, store.cuttable
        if near is None or feed is None:
            raise StoreUnavailable("this store tells nobody what changes")
        self._near: NearStore = near
        self._feed: CuttableFeed = feed

    async def start(self) -> None:
        """Reach the store. Raises: CoatcheckError."""
        await self._coat.start()

    async def close(self) -> None:
        """Let go of the store."""
        await self._coat.close()

    async def answer(self, order: SignIn | Warm | Revoke | Cut | Mend) -> Answer:
        """Do what one order says. Raises: CoatcheckError."""
        match order:
            case SignIn():
                return await self._sign_in()
            case Warm():
                return await self._warm(order.id)
            case Revoke():
                return await self._revoke(order)
            case Cut():
                await self._feed.cut()
            case Mend():
                self._feed.mend()
        return Done()

    async def accepts(self, session_id: str) -> bool:
        """Whether this node accepts the session now: one check as a request would make it."""
        if self._coat.engine.peek(session_id.encode("ascii")) is not None:
            return True
        session = self._coat.session(session_id)
        await session.load()
        return session.principal is not None

    async def watch(self, order: Watch) -> Watched:
        """Check until the session is refused, and some times more: nobody may accept it again."""
        checks = near = again = 0
        hits, reads = self._near.hits, self._near.reads
        until = REAL.elapsed() + order.seconds
        accepted_at, refused_at = REAL.elapsed(), None
        while refused_at is None and (began := REAL.elapsed()) < until:
            try:
                accepted = await self.accepts(order.id)
            except StoreUnavailable:
                # Neither yes nor no: a server would answer 503.
                await asyncio.sleep(_STEP_SECONDS)
                continue
            if accepted:
                checks, accepted_at = checks + 1, began
                _rest()
                await asyncio.sleep(0)
            else:
                refused_at = REAL.elapsed()
        near, commands = self._near.hits - hits, self._near.reads - reads
        if refused_at is not None:
            for _ in range(CHECKS_AFTER_REFUSAL):
                again += await self.accepts(order.id)
                await asyncio.sleep(0)
        return Watched(
            refused_at=refused_at, accepted_at=accepted_at, checks=checks, near=near, commands=commands, again=again
        )

    async def _sign_in(self) -> SignedIn:
        session = self._coat.session(None)
        await session.login(SUBJECT)
        if session.sid is None or not isinstance(session.cookie_action, SendCookie):
            raise StoreUnavailable("the sign-in left no session")
        return SignedIn(id=session.cookie_action.id.text, sid=session.sid)

    async def _warm(self, session_id: str) -> Warmed:
        until = REAL.elapsed() + _WARM_SECONDS
        while await self.accepts(session_id):
            # Without a feed there is no copy, and every check below asks the store; that is a result too.
            if self._coat.engine.peek(session_id.encode("ascii")) is not None or REAL.elapsed() >= until:
                break
            await asyncio.sleep(_STEP_SECONDS)
        else:
            raise StoreUnavailable("a session that nobody has ended is refused")
        hits, reads = self._near.hits, self._near.reads
        for _ in range(WARM_CHECKS):
            await self.accepts(session_id)
        return Warmed(checks=WARM_CHECKS, near=self._near.hits - hits, commands=self._near.reads - reads)

    async def _revoke(self, order: Revoke) -> Revoked:
        sent_at = REAL.elapsed()
        await self._coat.revoke_session(order.sid, reason="demo")
        answered_at = REAL.elapsed()
        return Revoked(sent_at=sent_at, answered_at=answered_at, refused=not await self.accepts(order.id))


def _rest() -> None:
    # The timers of an event loop count whole milliseconds, which is more than what is measured.
    time.sleep(REST_SECONDS)


def _say(answer: Answer) -> None:
    sys.stdout.buffer.write(line_of(answer))
    sys.stdout.buffer.flush()


async def _serve(begin: Begin, orders: asyncio.Queue[Order | None]) -> bool:
    """Do what comes until nothing comes any more; whether the demonstration said that it is over."""
    node = Node(begin)
    try:
        await node.start()
        _say(Ready(pid=os.getpid()))
        while True:
            order = await orders.get()
            if order is None or isinstance(order, Stop):
                return order is not None
            try:
                if isinstance(order, Watch):
                    if await node.accepts(order.id):
                        _say(Watching())
                        _say(await node.watch(order))
                    else:
                        _say(Failed(why="the session was refused before it was ended"))
                else:
                    _say(await node.answer(order))
            except CoatcheckError as wrong:
                _say(Failed(why=wrong.detail))
    finally:
        await node.close()


async def _run(begin: Begin, lines: BinaryIO) -> bool:
    loop = asyncio.get_running_loop()
    orders: asyncio.Queue[Order | None] = asyncio.Queue()

    def read() -> None:
        try:
            for line in lines:
                loop.call_soon_threadsafe(orders.put_nowait, read_order(line))
        except (msgspec.DecodeError, OSError, RuntimeError):
            pass
        # Whatever the loop is doing: whoever started this process has gone, and it goes too.
        leaving = threading.Timer(_END_SECONDS, _leave, (begin.scratch,))
        leaving.daemon = True
        leaving.start()
        try:
            loop.call_soon_threadsafe(over.set)
        except RuntimeError:
            return

    over = asyncio.Event()
    threading.Thread(target=read, name="coatcheck-demo-orders", daemon=True).start()
    work = loop.create_task(_serve(begin, orders))
    ending = loop.create_task(over.wait())
    await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
    ending.cancel()
    if not work.done():
        # What was read before the end may say that it is over.
        orders.put_nowait(None)
        await asyncio.wait({work}, timeout=0.5)
    if not work.done():
        work.cancel()
        await asyncio.wait({work})
    return not work.cancelled() and work.result()


def _leave(scratch: str | None) -> None:
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def main() -> int:
    """Run one node on this process's pipes; returns its exit status."""
    # Ctrl-C is for whoever started this; it ends by its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("coatcheck").setLevel(logging.CRITICAL)
    logging.getLogger("psycopg.pool").setLevel(logging.CRITICAL)
    begin: Begin | None = None
    in_order = False
    try:
        # Without a buffer: its lock, held by a thread that waits for a line, would spoil the end of the process.
        with open(sys.stdin.fileno(), "rb", buffering=0, closefd=False) as lines:
            line = lines.readline()
            if line:
                begin = read_begin(line)
                in_order = asyncio.run(_run(begin, lines))
    except CoatcheckError as wrong:
        _say(Failed(why=wrong.detail))
        return 1
    except BrokenPipeError:
        # Nobody listens any more.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the interpreter's last flush
    if not in_order and begin is not None and begin.scratch is not None:
        shutil.rmtree(begin.scratch, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
