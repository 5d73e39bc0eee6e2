"""The demonstration from beginning to end: a store, nodes over it, rounds, perhaps a page.

Decides what it refuses to begin with, where it keeps its state (a fresh SQLite file in a temporary directory, removed
at the end, or the store that was named, under a namespace of its own: sessions of an application are never touched),
and that it ends: after its rounds, when it is interrupted, and a page after `PAGE_SECONDS`.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

from coatcheck.errors import ConfigurationError
from coatcheck.server.demo.measuring import Stage
from coatcheck.server.demo.messages import Begin
from coatcheck.server.demo.node import settings_for
from coatcheck.server.demo.nodes import running
from coatcheck.server.upgrade import Migrating
from coatcheck.stores.open import open_store

if TYPE_CHECKING:
    from coatcheck.server.demo.page import Page

NAMESPACE: Final = "coatcheck_demo"
MAX_NODES: Final = 16
MAX_ROUNDS: Final = 1000
PAGE_SECONDS: Final = 600.0
"""How long a page stays after the rounds; then the demonstration ends by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be shown. `store`: None for a SQLite file of its own. `lease` and `pause`, between rounds, in
    seconds. `port`: of the page, 0 for a free one; None for no page. Raises: ConfigurationError."""

    store: str | None = None
    nodes: int = 4
    rounds: int = 20
    lease: float = 1.0
    cut: bool = False
    port: int | None = None
    pause: float = 0.0

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= MAX_NODES:
            raise ConfigurationError(
                f"nodes: from 2 to {MAX_NODES}; one ends the session, the others are measured: --nodes 4"
            )
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise ConfigurationError(f"rounds: from 1 to {MAX_ROUNDS}: --rounds 20")
        if not 0.1 <= self.lease <= 10:
            raise ConfigurationError("lease: from 0.1 to 10 seconds: --lease 1")
        if self.port is not None and not 0 <= self.port <= 65535:
            raise ConfigurationError("port: from 0 (a free one) to 65535")
        if self.kind == "memory":
            raise ConfigurationError(
                "store: memory: is known to one process alone, and here are several; leave --store out, or name a "
                "sqlite:, postgresql: or redis: store"
            )

    @property
    def kind(self) -> str:
        """The scheme of the store: all that is ever said of its address, which may hold a password."""
        return "sqlite" if self.store is None else self.store.partition(":")[0].lower()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Who hears how it goes: when the nodes are ready (with the page's address, if there is one), when all are warm for
    the first time, and after each step."""

    ready: Callable[[Stage, str | None], None]
    warm: Callable[[Stage], None]
    step: Callable[[Stage], None]


async def perform(plan: Plan, told: Told) -> bool:
    """Show it; whether all rounds were shown (False: interrupted before).

    Raises: ConfigurationError, StoreUnavailable before it begins; DemoFailed when it cannot go on.
    """
    shown = False
    with _interruptible() as was_interrupted, _scratch(plan) as (url, scratch):
        try:
            begin = Begin(
                store=url,
                namespace=NAMESPACE,
                lease=plan.lease,
                server_key=secrets.token_hex(32),
                scratch=scratch,
            )
            await _prepare(begin)
            async with running(plan.nodes, begin) as nodes:
                stage = Stage(nodes, lease=plan.lease, cut=plan.cut)
                stage.told = lambda: told.step(stage)
                async with _page(plan, stage) as page:
                    told.ready(stage, None if page is None else page.address)
                    await stage.sign_in()
                    told.warm(stage)
                    for number in range(plan.rounds):
                        await stage.sign_in()
                        await stage.end()
                        if number + 1 < plan.rounds:
                            await asyncio.sleep(plan.pause)
                    shown = True
                    if page is not None:
                        await stage.sign_in()
                        await page.stay(PAGE_SECONDS)
        except asyncio.CancelledError:
            if not was_interrupted():
                raise
    return shown


async def _prepare(begin: Begin) -> None:
    """See that the store is there and has its tables, before any process is started."""
    deadline = settings_for(begin).store_deadline.total_seconds()
    store = open_store(begin.store, colour="async", namespace=begin.namespace, deadline=deadline)
    try:
        if isinstance(store, Migrating):
            await store.migrate()
        await store.open()
        await store.ping()
    finally:
        await store.close()


@contextmanager
def _scratch(plan: Plan) -> Iterator[tuple[str, str | None]]:
    """The store's address, and the directory that goes with the demonstration."""
    if plan.store is not None:
        yield plan.store, None
        return
    with TemporaryDirectory(prefix="coatcheck-demo-", ignore_cleanup_errors=True) as directory:
        yield f"sqlite:///{Path(directory, 'demo.db')}", directory


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C and SIGTERM cancel this task, so that everything is put away; tells whether one did."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        interrupted = True
        if task is not None:
            task.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM)
    # Not on Windows, and not in a thread: there Ctrl-C ends the program in its own way.
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        for number in numbers:
            loop.add_signal_handler(number, interrupt)
    try:
        yield lambda: interrupted
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            for number in numbers:
                loop.remove_signal_handler(number)


@asynccontextmanager
async def _page(plan: Plan, stage: Stage) -> AsyncIterator[Page | None]:
    if plan.port is None:
        yield None
        return
    from coatcheck.server.demo.page import serving

    async with serving(stage, plan.port) as page:
        yield page
