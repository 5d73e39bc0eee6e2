"""How long something learned elsewhere may be trusted, and the bounded table it is kept in.

Decides the lease: knowledge counts from the moment the question was *sent*, less what the answer admits to lag behind,
and never from the moment the answer came (an answer may sit in a queue while the truth changes). It is judged at each
use, on a clock that runs through suspend, so a frozen thread or a laptop that slept fails the same comparison. Decides
too what a full table forgets. Time is handed in; this file must never read a clock or wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from coatcheck.errors import ConfigurationError

NEVER: Final = float("-inf")
"""The end of a lease that never began."""

FOR_EVER: Final = float("inf")
"""The end of a lease where nobody is asked: only for what is configured by name to go without."""

_Value = TypeVar("_Value")


class Lease:
    """When knowledge was last confirmed, and until when it counts. All times are seconds on one boot-time clock."""

    __slots__ = ("confirmed", "span")

    def __init__(self, span: float) -> None:
        self.span: Final = span
        self.confirmed = NEVER

    def confirm(self, sent: float, lag: float) -> None:
        """An answer came to a question sent at `sent`, by somebody who may be `lag` seconds behind the truth.

        An answer that vouches for less than is known already changes nothing: what was known stays known.
        """
        self.confirmed = max(self.confirmed, sent - lag)

    @property
    def until(self) -> float:
        """Fresh while the clock is below this."""
        return self.confirmed + self.span

    def is_fresh(self, now: float) -> bool:
        """Whether the knowledge still counts; at exactly `until` it does not."""
        return now < self.until


class BoundedTable(Generic[_Value]):
    """A table of at most `limit` entries that forgets the oldest first.

    First in, first out, because nothing here outlives its credential by much: what came first ends first, and a hit
    writes nothing. Look-ups are those of a dictionary (`get` is its method). Threads may use it together: a race
    costs an entry that is forgotten early, never one that is mixed up.
    """

    __slots__ = ("_entries", "_order", "get", "limit")

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ConfigurationError("a bounded table has room for one entry at least")
        self.limit: Final = limit
        self._entries: dict[bytes | str, _Value] = {}
        # Beside the dictionary: finding its first key costs as much as it has holes at the front.
        self._order: deque[bytes | str] = deque()
        self.get: Final[Callable[[bytes | str], _Value | None]] = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: bytes | str, value: _Value) -> None:
        """Keep a value; the oldest gives way when there is no room. A known key keeps its place."""
        entries, order = self._entries, self._order
        if key not in entries:
            order.append(key)
        entries[key] = value
        while len(entries) > self.limit and order:
            entries.pop(order.popleft(), None)
