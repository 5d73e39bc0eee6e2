"""A walk over all sessions of a name space, and over what else is swept, node by node, by SCAN.

Decides the cursor: it holds all there is to know about a walk, so that any process can go on with it, and keys that
did not fit a page travel in it, because SCAN answers more than it was asked for. A cursor of SCAN means nothing to
another server process, so the walk begins the node again after a failover: keys come twice rather than never. It
must never be used on a request path, and never trust a cursor or the name of a key.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Final

from coatcheck.core.ids import SessionRef
from coatcheck.errors import ValueRefused
from coatcheck.stores.redis.dispatch import Dispatcher
from coatcheck.stores.redis.nodes import SLOTS, Address

_CURSOR: Final = re.compile(r"([0-9]{1,5})\.([0-9a-f]{8}|)\.([0-9]{1,20})((?:[.:][0-9a-f]{4}[A-Za-z0-9_-]{16})*)")
_LEFT: Final = re.compile(r"([.:])([0-9a-f]{4})(.{16})")
# How a cursor writes the kind of a key.
_SIGNS: Final = {"s": ".", "g": ":"}
_LONGEST_CURSOR: Final = 24_000
_RUN_ID: Final = re.compile(rb"run_id:([0-9a-f]{8})")

# How many keys a step looks at: few where most are ours, more while none of them is. Keys beyond the page travel in
# the cursor, 21 characters each.
_FEWEST: Final = 10
_MOST: Final = 256


@dataclass(frozen=True, slots=True)
class Found:
    """A key that may exist: of a session (kind `s`), or of a family that stands alone (kind `g`)."""

    kind: str
    tag: int
    name: str

    @property
    def ref(self) -> SessionRef:
        """The session, where it is one."""
        return SessionRef(self.tag, self.name)


@dataclass(frozen=True, slots=True)
class Step:
    """What was found, and how many keys were looked at to find it."""

    found: tuple[Found, ...]
    looked_at: int


class Walk:
    """One stretch of a walk, from a cursor to wherever its caller stops. Not for two callers at once."""

    def __init__(
        self, dispatcher: Dispatcher, namespace: str, cursor: str | None, *, until: float, kinds: str = "s"
    ) -> None:
        """Raises: ValueRefused on a cursor that no walk gave."""
        self._dispatcher = dispatcher
        self._pattern = f"{namespace}:[{kinds}]:{{*"
        shape = f"{namespace}:([{kinds}]):\\{{([0-9a-f]{{4}})\\}}([A-Za-z0-9_-]{{16}})"
        self._key = re.compile(shape.encode("ascii"))
        self._until = until
        # Half of the time is for starting steps, the other half for ending the last one.
        self._late_at = time.monotonic() + (until - time.monotonic()) / 2
        self._slot, self._run, self._scan, self._left = _parse(cursor, kinds)
        self._count = _FEWEST
        self._node: Address | None = None

    @property
    def cursor(self) -> str | None:
        """Where to go on; `None` when everything has been walked."""
        if self._slot == SLOTS and not self._left:
            return None
        left = "".join(f"{_SIGNS[each.kind]}{each.tag:04x}{each.name}" for each in self._left)
        return f"{self._slot}.{self._run}.{self._scan}{left}"

    @property
    def late(self) -> bool:
        """Whether no further step should be taken within this verb."""
        return time.monotonic() >= self._late_at

    async def next(self, want: int) -> Step:
        """At most `want` keys. Raises: StoreUnavailable."""
        looked_at = 0
        if not self._left and self._slot < SLOTS:
            looked_at = await self._scan_once(want)
        found, self._left = tuple(self._left[:want]), self._left[want:]
        return Step(found, looked_at)

    async def _scan_once(self, want: int) -> int:
        node = self._node or await self._find_node()
        words = ("SCAN", self._scan, "MATCH", self._pattern, "COUNT", max(self._count, min(want, _MOST)))
        (reply,) = await self._dispatcher.at(node, words, until=self._until)
        match reply:
            case [bytes(scan), list(keys)]:
                found = [self._key.fullmatch(key) for key in keys if isinstance(key, bytes)]
            case _:
                scan, found = b"0", []
        self._left = [
            Found(each[1].decode("ascii"), int(each[2], 16), each[3].decode("ascii"))
            for each in found
            if each is not None
        ]
        self._count = _FEWEST if self._left else min(2 * self._count, _MOST)
        self._scan = scan.decode("ascii")
        if scan == b"0":
            await self._leave_node()
        return self._count

    async def _find_node(self) -> Address:
        primaries = await self._dispatcher.primaries(self._until)
        # Nodes are walked in the order of their first slots; after a change whoever has the slot now is walked.
        self._slot, node = max((each for each in primaries if each[0] <= self._slot), default=primaries[0])
        (information,) = await self._dispatcher.at(node, ("INFO", "server"), until=self._until)
        run = _RUN_ID.search(information) if isinstance(information, bytes) else None
        name = run[1].decode("ascii") if run is not None else ""
        if name != self._run:
            self._run, self._scan = name, "0"
        self._node = node
        return node

    async def _leave_node(self) -> None:
        primaries = await self._dispatcher.primaries(self._until)
        self._slot = min((first for first, _ in primaries if first > self._slot), default=SLOTS)
        self._run, self._scan, self._node = "", "0", None


def _parse(cursor: str | None, kinds: str) -> tuple[int, str, str, list[Found]]:
    if cursor is None:
        return 0, "", "0", []
    parts = _CURSOR.fullmatch(cursor) if len(cursor) <= _LONGEST_CURSOR else None
    if parts is None or int(parts[1]) > SLOTS or int(parts[3]) >= 1 << 64:
        raise ValueRefused("not a cursor of this list")
    kind_of = {sign: kind for kind, sign in _SIGNS.items()}
    left = [Found(kind_of[each[1]], int(each[2], 16), each[3]) for each in _LEFT.finditer(parts[4])]
    if any(each.kind not in kinds for each in left):
        raise ValueRefused("not a cursor of this list")
    return int(parts[1]), parts[2], parts[3], left
