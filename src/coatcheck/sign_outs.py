"""Sign-outs that came while the store was away: refused here at once, carried out before anything else later.

Decides the order (SEMANTICS 11): what this node promised is refused on this node from the moment it was kept, and is in
the store before the store is asked anything else. Carrying out may stop half way and is then gone on with; done twice
it changes nothing. It must never answer for the store, only against it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Final
from weakref import WeakSet

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Signal, Waits
from coatcheck.deadlines import time_left
from coatcheck.errors import StoreUnavailable, Unconfirmed
from coatcheck.journal import Journal, SignOut

log: Final = logging.getLogger("coatcheck")

_all: WeakSet[SignOuts] = WeakSet()


def _after_fork() -> None:
    for each in list(_all):
        each.begin_again()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_AT_ONCE: Final = 200


class SignOuts:
    """What one process knows of its node's journal. Threads and tasks may use it together."""

    def __init__(self, journal: Journal, *, waits: Waits, deadline: float) -> None:
        self._journal: Final = journal
        self._waits: Final = waits
        self._deadline: Final = deadline
        self._kept: dict[SessionRef, SignOut] = {}
        # The store has them; the journal could not be told.
        self._carried: set[SessionRef] = set()
        self._empty_at: object = None
        self.begin_again()
        _all.add(self)

    def begin_again(self) -> None:
        """After a fork: whoever was at it is not in this process."""
        self._mutex = self._waits.mutex()
        self._carrying: Signal | None = None

    def of(self, ref: SessionRef) -> SignOut | None:
        """The sign-out of a session that this process keeps."""
        return self._kept.get(ref)

    async def keep(self, sign_outs: Iterable[SignOut]) -> None:
        """On the disk, and refused from now on. Raises: StoreUnavailable."""
        kept = list(sign_outs)
        await self._waits.aside(lambda: self._journal.add(kept))
        with self._mutex:
            for each in kept:
                self._kept[each.ref] = each
                self._carried.discard(each.ref)

    async def is_kept(self, ref: SessionRef) -> bool:
        """Whether any process of this node keeps a sign-out of this session. Raises: StoreUnavailable."""
        return ref in self._kept or await self._waits.aside(lambda: self._journal.holds(ref))

    @property
    def may_wait(self) -> bool:
        """Whether something may have to be carried out; never false when something has. Costs a look at a file."""
        return bool(self._kept) or self._journal.stamp() != self._empty_at

    async def carry_out(self, end: Callable[[SignOut], Awaitable[None]]) -> None:
        """Let the store have everything that waits, for whoever comes first; the others wait for him.

        Raises: StoreUnavailable; what was done is done, and the next call goes on. Unconfirmed when the store has all
        of them and its replicas do not.
        """
        while self.may_wait:
            with self._mutex:
                carrying = self._carrying
                mine = self._waits.signal()
                if carrying is None:
                    self._carrying = mine
            if carrying is not None:
                if not await carrying.wait(time_left(self._deadline)):
                    raise StoreUnavailable("sign-outs that were kept are being carried out")
                continue
            try:
                await self._carry_out(end)
            finally:
                with self._mutex:
                    self._carrying = None
                mine.give()

    async def _carry_out(self, end: Callable[[SignOut], Awaitable[None]]) -> None:
        before, stamp = list(self._kept), self._journal.stamp()
        waiting = [each for each in await self._waits.aside(self._journal.waiting) if each.ref not in self._carried]
        unconfirmed: dict[SessionRef, Unconfirmed] = {}
        for start in range(0, len(waiting), _AT_ONCE):
            ended: list[SignOut] = []
            try:
                for each in waiting[start : start + _AT_ONCE]:
                    try:
                        await end(each)
                    except Unconfirmed as lost:
                        # The store has it; it stays until replicas have it too, and keeps no other one waiting.
                        unconfirmed[each.ref] = lost
                    else:
                        ended.append(each)
            finally:
                if ended:
                    await self._done(ended)
        with self._mutex:
            # What another process has carried out meanwhile is not in the journal any more, and not here either.
            for ref in before:
                if ref not in unconfirmed:
                    self._kept.pop(ref, None)
        for first in unconfirmed.values():
            raise first
        if not waiting:
            if self._carried:
                await self._done([])
            # If that failed they stay; the next process to start finds them, and it changes nothing.
            self._empty_at = stamp

    async def _done(self, batch: list[SignOut]) -> None:
        batch = [*batch, *(SignOut(ref=ref, reason="", at_us=0) for ref in self._carried)]
        try:
            await self._waits.aside(lambda: self._journal.done(batch))
        except StoreUnavailable as lost:
            # The store has them; a disk that is full must not keep everybody out.
            log.warning("coatcheck: sign-outs were carried out and stay in the journal: %s", lost.detail)
            self._carried.update(each.ref for each in batch)
        else:
            self._carried.clear()
