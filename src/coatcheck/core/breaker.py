"""When a server that does not answer is left alone, and how it is found to be back.

Decides the breaker of one server. Closed, every call passes. After `FAILURES` calls in a row that got no answer it is
open: calls are refused at once, where each would have held its caller until the deadline. When it has rested for
`REST_SECONDS`, one call passes as its probe. An answer closes it, whoever gets it; a probe without one lets it rest
again. A call that cannot be made good later (a revoke, a revoke from the journal) is urgent: it is the probe of an open
breaker that still rests, and takes over from a probe that is on its way and is not urgent.

- What counts is silence: no connection, or no answer in time. A refusal is an answer. A connection that breaks while
  it is used is neither: it cost its caller no time, and the next call finds out whether there is another.
- A call that was given too little time to be answered proves nothing (`is_fair`): a request that spent its time at one
  server must not open the breaker of the next.
- A failure counts only for the breaker as the call found it: what was sent before the server went, and fails after it
  came back, does not open it again.
- A probe that never reports (its task was cancelled, its thread was stopped) is taken for lost after
  `PATIENCE_SECONDS`; so a server that is back is found within that and the rest, whatever the deadline.

Time is handed in, in seconds on one monotonic clock. This file must never read a clock, wait, or know a server.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

FAILURES: Final = 3
"""Unanswered calls in a row that open a breaker."""

REST_SECONDS: Final = 0.5
"""How long an open breaker refuses everything that is not urgent, before it tries."""

PATIENCE_SECONDS: Final = 1.0
"""How long a probe that has not reported keeps the next one out."""

_FAIR_SHARE: Final = 0.25


def is_fair(granted: float, deadline: float) -> bool:
    """Whether a call that was given so many seconds, where a verb may take `deadline`, should have been answered."""
    return granted >= deadline * _FAIR_SHARE


class Breaker:
    """The breaker of one server. Any number of threads; `mutex` is theirs, and held for a few instructions only.

    A call that `enter` lets pass reports `answered` or `failed` where it knows, and `left` at its end in any case.
    """

    __slots__ = ("_failures", "_mutex", "_probed", "_rested", "_urgent", "era", "since")

    def __init__(self, mutex: AbstractContextManager[object]) -> None:
        self._mutex = mutex
        self._failures = 0
        self._rested = 0.0
        self._probed: float | None = None
        self._urgent = False
        self.era = 0
        """Changes whenever the breaker sends a probe or closes."""
        self.since: float | None = None
        """When it opened; `None` while it is closed."""

    def enter(self, now: float, *, urgent: bool = False) -> int | None:
        """The era under which a call passes, to be handed back with its report; `None`: refused."""
        # In this order: a breaker that opens in between is seen by the second look.
        era = self.era
        if self.since is None:
            return era
        with self._mutex:
            if self._is_closed():
                return self.era
            if self._probed is not None:
                if now < self._probed + PATIENCE_SECONDS and (self._urgent or not urgent):
                    return None
            elif now < self._rested and not urgent:
                return None
            self.era += 1
            self._probed, self._urgent = now, urgent
            return self.era

    def answered(self) -> None:
        """The server said something, be it a refusal. Whoever hears it in another way may say so too."""
        if self.since is None and not self._failures:
            return
        with self._mutex:
            self._failures = 0
            if self.since is not None:
                self.since = self._probed = None
                self.era += 1

    def failed(self, era: int, now: float, *, fair: bool = True) -> None:
        """The server said nothing to a call that passed under `era`. `fair`: it had the time to (`is_fair`)."""
        with self._mutex:
            if era != self.era:
                return
            if self.since is None:
                self._failures += fair
                if self._failures >= FAILURES:
                    self.since = now
                    self._rested = now + REST_SECONDS
            elif self._probed is not None:
                self._probed = None
                self._rested = now + REST_SECONDS

    def left(self, era: int) -> None:
        """A call that passed under `era` is over. Where it was the probe and told nothing, its place is free."""
        if self.since is None:
            return
        with self._mutex:
            if era == self.era:
                self._probed = None

    def _is_closed(self) -> bool:
        return self.since is None
