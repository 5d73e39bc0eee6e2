"""How long something learned elsewhere may be trusted, and the bounded tables it is kept in.

Decides the lease: knowledge counts from the moment the question was *sent*, less what the answer admits to lag behind,
and never from the moment the answer came (an answer may sit in a queue while the truth changes). It is judged at each
use, on a clock that runs through suspend, so a frozen thread or a laptop that slept fails the same comparison.

Decides the rule of near copies (SEMANTICS 1 and 2). A copy is believed at an instant when all of this holds:

- the line that was up when its read began is unbroken, and what it last confirmed is younger than the lease;
- nothing was told about the session since *before* that read began: a fill that a change overtook is never stored;
- its own end has not come.

Decides too what a full table forgets. Time is handed in; this file must never read a clock or wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Final, Generic, TypeVar

import msgspec

from coatcheck.errors import ConfigurationError

NEVER: Final = float("-inf")
"""The end of a lease that never began."""

FOR_EVER: Final = float("inf")
"""The end of a lease where nobody is asked: only for what is configured by name to go without."""

_Value = TypeVar("_Value")


class Lease:
    """When knowledge was last confirmed, and until when it counts. All times are seconds on one boot-time clock."""

    __slots__ = ("confirmed", "span", "until")

    def __init__(self, span: float) -> None:
        self.span: Final = span
        self.confirmed = NEVER
        self.until = NEVER
        """Fresh while the clock is below this."""

    def confirm(self, sent: float, lag: float = 0.0) -> None:
        """An answer came to a question sent at `sent`, by somebody who may be `lag` seconds behind the truth.

        An answer that vouches for less than is known already changes nothing: what was known stays known.
        """
        self.confirmed = max(self.confirmed, sent - lag)
        self.until = self.confirmed + self.span

    def is_fresh(self, now: float) -> bool:
        """Whether the knowledge still counts; at exactly `until` it does not."""
        return now < self.until


class Line(Lease):
    """One unbroken connection to whoever tells of changes. What was learned under it dies with it.

    A feed makes a new line for every connection and never mends an old one, so that throwing away every copy is one
    assignment. `source` names the store behind it (run id, timeline): another name is another store, which may have
    lost what the first one had acknowledged. `marks`, where there are any, are words that a writer changes when a
    session changes; a copy counts only while the word of its slot is the one it was read under.
    """

    __slots__ = ("broken", "marks", "source", "voided")

    def __init__(self, span: float, *, source: str = "", marks: Sequence[int] | None = None) -> None:
        super().__init__(span)
        self.source: Final = source
        self.marks: Final = marks
        self.broken = self.voided = False

    def confirm(self, sent: float, lag: float = 0.0) -> None:
        """See `Lease.confirm`; a broken line confirms nothing any more."""
        if not self.broken:
            super().confirm(sent, lag)
        self._stay_cut()

    def _stay_cut(self) -> None:
        # Another thread may have cut it while this one confirmed.
        if self.broken:
            self.until = NEVER

    def cut(self) -> None:
        """The connection broke, or changes may have been missed. `confirmed` stays: a profile that serves near copies
        through an outage counts its grace from there."""
        self.broken = True
        self.until = NEVER

    def void(self) -> None:
        """What was learned under this line may be wrong altogether: it serves no grace either."""
        self.voided = True
        self.cut()

    def graced(self, now: float, grace: float) -> bool:
        """Whether what was learned here may serve an outage: `grace` seconds beyond the lease."""
        return not self.voided and now < self.confirmed + self.span + grace


class Held(msgspec.Struct, gc=False, kw_only=True):
    """What a near copy carries besides its content. Never tracked by the garbage collector: a million of them would
    stop the process for a tenth of a second at each full collection; so nothing in it may refer back to it.

    `digest`: SHA-256 of the credential. On the boot-time clock: `since`, when its read began; `ends`, when it is over
    by itself; `until`, not later, when somebody has to look at it more closely than `look` does. `slot` and `mark`: see
    `Line.marks`. `used`: looked at since it was last spared from eviction.
    """

    digest: bytes
    line: Line
    since: float
    until: float
    ends: float
    slot: int = 0
    mark: int = 0
    size: int = 0
    used: bool = False


_Held = TypeVar("_Held", bound=Held)


class Fill:
    """A read on its way. `void` once something was told about its session: the answer may be older than that."""

    __slots__ = ("line", "mark", "since", "slot", "void")

    def __init__(self, line: Line, since: float, slot: int) -> None:
        self.line: Final = line
        self.since: Final = since
        self.slot: Final = slot
        self.mark: Final = 0 if line.marks is None else line.marks[slot]
        self.void = False


class NearTable(Generic[_Held]):
    """Near copies by the key of their credential; bounded by number and octets.

    `key_of`, part of a credential that is no secret, finds the copy; SHA-256 of the whole decides whether it is the
    one. `group_of` is the part that all credentials of one subject share. Threads may use it together: what has two
    steps is done under the mutex, `look` alone is not, and reads one entry once.
    """

    __slots__ = (
        "_cuts",
        "_filling",
        "_floor",
        "_group_of",
        "_held",
        "_key_of",
        "_mutex",
        "_order",
        "entries",
        "octets",
        "size",
    )

    def __init__(
        self, *, entries: int, octets: int, key_of: slice, group_of: slice, mutex: AbstractContextManager[object]
    ) -> None:
        self.entries: Final = entries
        self.octets: Final = octets
        self.size = 0
        self._key_of: Final = key_of
        self._group_of: Final = group_of
        self._mutex: Final = mutex
        # None: somebody's place who is to be read again. Every key has exactly one place in the order.
        self._held: dict[bytes, _Held | None] = {}
        self._order: deque[bytes] = deque()
        self._filling: dict[bytes, list[Fill]] = {}
        # When a subject's sessions were all ended, by group: as many as there are tags at most.
        self._cuts: dict[bytes, float] = {}
        self._floor = NEVER

    def __len__(self) -> int:
        """How many places are taken, those of copies that were thrown away included."""
        return len(self._held)

    # -- looking ---------------------------------------------------------------------------------------------------

    def look(self, credential: bytes, now: float) -> _Held | None:
        """The copy of this credential, if it is to be believed at `now`."""
        held = self._held.get(credential[self._key_of])
        if held is None:
            return None
        line = held.line
        if now >= line.until or now >= held.until or held.since <= self._floor:
            return None
        if held.digest != sha256(credential).digest():
            return None
        if self._cuts and held.since <= self._cuts.get(credential[self._group_of], NEVER):
            return None
        if line.marks is not None and line.marks[held.slot] != held.mark:
            return None
        if not held.used:
            held.used = True
        return held

    def find(self, key: bytes, group: bytes, digest: bytes, now: float) -> _Held | None:
        """Like `look`, for somebody who looks closely, and who has the digest alone."""
        held = self._sound(key, group, digest, now)
        return held if held is not None and now < held.line.until else None

    def awaiting(self, key: bytes, group: bytes, digest: bytes, now: float) -> _Held | None:
        """The copy that nothing speaks against but the silence of its line: one answer would make it good again."""
        held = self._sound(key, group, digest, now)
        return held if held is not None and not held.line.broken and now >= held.line.until else None

    def through_outage(self, key: bytes, group: bytes, digest: bytes, now: float, *, grace: float) -> _Held | None:
        """The copy that was good when the store was last heard of, for `grace` seconds beyond the lease."""
        held = self._sound(key, group, digest, now)
        return held if held is not None and held.line.graced(now, grace) else None

    def known(self, key: bytes) -> _Held | None:
        """Whatever is kept under this key, to be believed or not."""
        return self._held.get(key)

    def _sound(self, key: bytes, group: bytes, digest: bytes, now: float) -> _Held | None:
        held = self._held.get(key)
        if held is None or now >= held.ends or held.since <= self._floor or held.digest != digest:
            return None
        if held.since <= self._cuts.get(group, NEVER):
            return None
        if held.line.marks is not None and held.line.marks[held.slot] != held.mark:
            return None
        return held

    # -- filling ---------------------------------------------------------------------------------------------------

    def begin(self, key: bytes, line: Line, now: float, *, slot: int = 0) -> Fill:
        """Note that a read is about to be sent. Everything told about `key` from here on voids it."""
        fill = Fill(line, now, slot)
        with self._mutex:
            self._filling.setdefault(key, []).append(fill)
        return fill

    def settle(self, key: bytes, fill: Fill, held: _Held | None) -> bool:
        """The read was answered, by `held` if that may be kept. Returns whether it is kept."""
        with self._mutex:
            reads = self._filling.get(key)
            if reads is not None and fill in reads:
                reads.remove(fill)
                if not reads:
                    del self._filling[key]
            line = fill.line
            if held is None or fill.void or line.broken or held.size > self.octets:
                return False
            # Odd: somebody was writing when the read began.
            if line.marks is not None and (fill.mark & 1 or line.marks[fill.slot] != fill.mark):
                return False
            known = self._held.get(key)
            if known is not None and known.line is line and known.since > fill.since:
                # A read that was sent later has been answered before: nobody goes back in time.
                return False
            held.line, held.since, held.slot, held.mark = line, fill.since, fill.slot, fill.mark
            self._keep(key, held)
            return self._held.get(key) is held

    def _keep(self, key: bytes, held: _Held) -> None:
        if key not in self._held:
            self._order.append(key)
        self._forget(key)
        self._held[key] = held
        self.size += held.size
        spared = 0
        while len(self._held) > self.entries or self.size > self.octets:
            oldest = self._order.popleft()
            candidate = self._held[oldest]
            # A second chance for what was used meanwhile: a crowd that comes once does not push out who stays. But
            # not without end, or one fill would walk the whole table.
            if candidate is not None and candidate.used and spared < _SPARED_AT_MOST and oldest != key:
                candidate.used = False
                self._order.append(oldest)
                spared += 1
                continue
            self._forget(oldest)
            del self._held[oldest]

    def _forget(self, key: bytes) -> None:
        """Keep the place of a copy and nothing else: what is read again takes it."""
        gone = self._held.get(key)
        if gone is not None:
            self._held[key] = None
            self.size -= gone.size

    # -- being told ------------------------------------------------------------------------------------------------

    def changed(self, key: bytes) -> None:
        """The session of this key is not what it was."""
        with self._mutex:
            for fill in self._filling.pop(key, ()):
                fill.void = True
            self._forget(key)

    def cut_off(self, group: bytes, now: float) -> None:
        """Every session of a subject ended: whatever was read until now, or is being read, does not count."""
        with self._mutex:
            self._cuts[group] = max(now, self._cuts.get(group, NEVER))

    def emptied(self, now: float) -> None:
        """Nothing that was learned until now counts any more, not through an outage either. Takes constant time:
        letting go of a hundred thousand entries at once would hold up everybody; they go one by one."""
        with self._mutex:
            self._floor = max(now, self._floor)


_SPARED_AT_MOST: Final = 16


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
        self._entries: dict[Hashable, _Value] = {}
        # Beside the dictionary: finding its first key costs as much as it has holes at the front.
        self._order: deque[Hashable] = deque()
        self.get: Final[Callable[[Hashable], _Value | None]] = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: Hashable, value: _Value) -> None:
        """Keep a value; the oldest gives way when there is no room. A known key keeps its place."""
        entries, order = self._entries, self._order
        if key not in entries:
            order.append(key)
        entries[key] = value
        while len(entries) > self.limit and order:
            entries.pop(order.popleft(), None)
