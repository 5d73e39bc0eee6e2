"""A feed that can be cut off without anybody noticing: the worst that can happen to a node's connection to its store.

Decides what "cut" means, the same for every store: no message arrives, no question is answered, and nothing says so (no
connection is closed, no error is raised). What the node knew stays believable for the lease and not longer; that is
what the demonstration shows. Commands to the store go on. After `mend` nothing learned before counts.
"""

from __future__ import annotations

from typing import Any, cast

from coatcheck.core.freshness import Line
from coatcheck.core.ports import Feed, Listener, Store


class CuttableFeed:
    """See `core.ports.Feed`; between the real feed and the near copies."""

    def __init__(self, store: Store, listener: Listener, *, lease: float) -> None:
        self._listener = listener
        self._feed: Feed = store.feed(self, lease=lease)
        self._lines: set[Line] = set()
        self._is_cut = False

    async def cut(self) -> None:
        """Hear nothing from now on. Heard of a moment before, so that the lease is whole: the worst case."""
        await self._feed.beat()
        self._is_cut = True
        for line in self._lines:
            if line.marks is not None:
                # Words in shared memory need no connection: to hear nothing is to see them as they were.
                object.__setattr__(line, "marks", tuple(line.marks))

    def mend(self) -> None:
        """Hear again; what was missed is gone, so everything is read anew."""
        for line in self._lines:
            if isinstance(line.marks, tuple):
                line.void()
        self._is_cut = False
        self._listener.emptied()

    # -- what the store tells --------------------------------------------------------------------------------------

    def changed(self, handle: str) -> None:
        """See `core.ports.Listener`."""
        if not self._is_cut:
            self._listener.changed(handle)

    def cut_off(self, tag: int) -> None:
        """See `core.ports.Listener`."""
        if not self._is_cut:
            self._listener.cut_off(tag)

    def emptied(self) -> None:
        """See `core.ports.Listener`."""
        if not self._is_cut:
            self._listener.emptied()

    # -- what the near copies ask ----------------------------------------------------------------------------------

    def line(self, tag: int) -> Line | None:
        """See `core.ports.Feed`. While it is cut there is none to read under."""
        return None if self._is_cut else self._noted(self._feed.line(tag))

    def slot(self, tag: int) -> int:
        """See `core.ports.Feed`."""
        return self._feed.slot(tag)

    def drain(self) -> None:
        """See `core.ports.Feed`."""
        self._feed.drain()

    async def renew(self, tag: int) -> Line | None:
        """See `core.ports.Feed`."""
        return None if self._is_cut else self._noted(await self._feed.renew(tag))

    async def beat(self) -> None:
        """See `core.ports.Feed`."""
        if not self._is_cut:
            await self._feed.beat()

    async def close(self) -> None:
        """See `core.ports.Feed`."""
        await self._feed.close()

    def _noted(self, line: Line | None) -> Line | None:
        if line is not None:
            self._lines = {each for each in self._lines if not each.broken} | {line}
        return line


class CuttableStore:
    """A store whose feed can be cut; everything else is the store's own."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.cuttable: CuttableFeed | None = None
        """The feed of the near copies, once they have asked for one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def feed(self, listener: Listener, *, lease: float) -> CuttableFeed:
        """See `core.ports.FedStore`."""
        self.cuttable = CuttableFeed(self._store, listener, lease=lease)
        return self.cuttable

    def as_store(self) -> Store:
        """This, for whoever takes a store."""
        return cast(Store, self)
