"""What this node ended in the last minutes, for a store that turns out not to know of it.

Decides when a revocation is made again: before anything is answered from a store that is another one than where it was
made (a replica that was promoted, a restored backup; `Line.source` tells), and once for each such store (SEMANTICS 4).
It must never make one again that its own store has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from coatcheck.core.freshness import NEVER, Line
from coatcheck.core.ports import Signal, Waits
from coatcheck.deadlines import time_left
from coatcheck.errors import StoreUnavailable

KEPT_ENDINGS: Final = 10_000
KEPT_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class _Ending:
    """A revocation: its number, when it was made, in which tag, how to make it again, and the stores that have it."""

    number: int
    at: float
    tag: int
    again: Callable[[], Awaitable[object]]
    known_to: set[str] = field(default_factory=set)


class Ledger:
    """The revocations of one node. Threads and tasks may use it together."""

    def __init__(
        self, *, waits: Waits, now: Callable[[], float], line_of: Callable[[int], Line | None], deadline: float
    ) -> None:
        self._waits: Final = waits
        self._now: Final = now
        self._line_of: Final = line_of
        self._deadline: Final = deadline
        self._mutex: Final = waits.mutex()
        self._endings: deque[_Ending] = deque(maxlen=KEPT_ENDINGS)
        self._numbered = 0
        self._noted_at = NEVER
        # By source: up to which number its store has everything.
        self._told: dict[str, int] = {}
        self._telling: Signal | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ended here lately."""
        return self._now() >= self._noted_at + KEPT_SECONDS

    def source_of(self, tag: int) -> str | None:
        """Which store would take a revocation now. To be asked before it is sent: after its answer another store may
        have taken the place of the one that gave it."""
        line = self._line_of(tag)
        return None if line is None else line.source

    def note(self, tag: int, again: Callable[[], Awaitable[object]], *, source: str | None) -> None:
        """A revocation was answered; `source` is what `source_of` said before it was sent. None: no feed was up, and
        whether a store that is met later is another one cannot be told; nothing is noted."""
        if source is None:
            return
        known_to = {source} if source == self.source_of(tag) else set()
        with self._mutex:
            self._numbered += 1
            self._noted_at = self._now()
            self._endings.append(_Ending(self._numbered, self._noted_at, tag, again, known_to))

    async def tell(self, line: Line) -> None:
        """Let the store behind a line have everything; nothing is to be answered from it before. Raises:
        StoreUnavailable; the next call goes on where this one stopped."""
        while self._told.get(line.source, 0) < self._numbered:
            with self._mutex:
                telling = self._telling
                mine = self._waits.signal()
                if telling is None:
                    self._telling = mine
            if telling is not None:
                if not await telling.wait(time_left(self._deadline)):
                    raise StoreUnavailable("what was ended here lately is being ended again in another store")
                continue
            try:
                await self._tell(line.source)
            finally:
                with self._mutex:
                    self._telling = None
                mine.give()
            return

    async def _tell(self, source: str) -> None:
        with self._mutex:
            up_to, since = self._numbered, self._told.get(source, 0)
            endings = list(islice(reversed(self._endings), up_to - since))
        oldest = self._now() - KEPT_SECONDS
        told = up_to
        for ending in reversed(endings):
            if ending.at < oldest or source in ending.known_to:
                continue
            line = self._line_of(ending.tag)
            if line is None:
                # Its primary is away, so this one is not its store; should it become that, it is told then.
                told = min(told, ending.number - 1)
            elif line.source == source:
                await ending.again()
                ending.known_to.add(source)
        self._told[source] = told
