"""How much time a request has left for the store, wherever in it the store is asked.

Decides that all store work of one request shares one deadline: ten reads of a server that does not answer take as long
as one. It travels in a context variable, so that it need not be handed through every call between the request and a
driver; threads and tasks see their own. Work that outlives the request it was started in belongs `outside`: a task
inherits the context of whoever starts it. This file must never wait, and never give a verb more time than it has.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from types import TracebackType
from typing import Final

from coatcheck.errors import StoreUnavailable

# The end, and whether it is urgent. A plain tuple: this is entered and asked on every request.
_FREE: Final[tuple[float | None, bool]] = (None, False)
_bounds: Final[ContextVar[tuple[float | None, bool]]] = ContextVar("coatcheck_store_bounds", default=_FREE)


class within:
    """All store work inside ends by `until`, a moment of the monotonic clock; `None` sets no end.

    Inside another one the earlier end holds, and what is urgent stays so. `urgent`: this must reach the store if
    anything can (a revoke, a revoke from the journal), so it tries a server that is being left alone. For one `with`.
    """

    __slots__ = ("_before", "_until", "_urgent")

    _before: tuple[float | None, bool]

    def __init__(self, until: float | None, *, urgent: bool = False) -> None:
        self._until = until
        self._urgent = urgent

    def __enter__(self) -> None:
        before = self._before = _bounds.get()
        outer, urgent = before
        _bounds.set((_earlier(self._until, outer), self._urgent or urgent))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Not by a token: one is refused where the exit runs in another context than the entry.
        _bounds.set(self._before)


class outside:
    """What runs inside belongs to no request, although one may have started it: no end, and not urgent."""

    __slots__ = ("_before",)

    _before: tuple[float | None, bool]

    def __enter__(self) -> None:
        self._before = _bounds.get()
        _bounds.set(_FREE)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _bounds.set(self._before)


class Allowance:
    """So many seconds of store work, in as many pieces as it comes: what one piece used the next one lacks.

    For one request. Pieces of several of its tasks at once, and pieces within pieces, count once and end together.
    """

    __slots__ = ("begun", "depth", "left")

    def __init__(self, seconds: float) -> None:
        self.left = seconds
        self.depth = 0
        self.begun = 0.0

    def piece(self) -> Piece:
        """Some store work, for one `with` of one task or thread."""
        return Piece(self)


class Piece:
    """One piece of an `Allowance`."""

    __slots__ = ("_before", "_of")

    _before: tuple[float | None, bool]

    def __init__(self, of: Allowance) -> None:
        self._of = of

    def __enter__(self) -> None:
        of = self._of
        if of.depth == 0:
            of.begun = time.monotonic()
        of.depth += 1
        # As `within` does it, without another object: this is entered by every request that reads.
        before = self._before = _bounds.get()
        _bounds.set((_earlier(of.begun + of.left, before[0]), before[1]))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _bounds.set(self._before)
        of = self._of
        of.depth -= 1
        if of.depth == 0:
            of.left -= time.monotonic() - of.begun


def _earlier(until: float | None, outer: float | None) -> float | None:
    return outer if until is None or (outer is not None and outer < until) else until


def time_left(seconds: float) -> float:
    """What a store verb that may take so many seconds has: no more than is left of the request it is part of.

    Raises: StoreUnavailable when nothing is left.
    """
    until = _bounds.get()[0]
    if until is None:
        return seconds
    left = until - time.monotonic()
    if left <= 0:
        raise StoreUnavailable("the request has used up its time for the store")
    return left if left < seconds else seconds


def is_urgent() -> bool:
    """Whether the work that runs now was said to be urgent."""
    return _bounds.get()[1]
