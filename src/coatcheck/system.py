"""The real clock and the real random source, behind one small interface.

Everything above takes a `System`; nothing above may read a clock or a random source by itself. Tests hand in
`coatcheck.testing.FakeSystem`.
"""

from __future__ import annotations

import os
import time
from typing import Protocol


class System(Protocol):
    """Where time and randomness come from."""

    def now_us(self) -> int:
        """Wall clock, Unix microseconds."""
        ...

    def elapsed(self) -> float:
        """Seconds on a clock that never goes back and runs through suspend; only differences mean anything."""
        ...

    def random(self, size: int) -> bytes:
        """`size` bytes from the operating system's generator."""
        ...


class RealSystem:
    """The machine's own clock and generator."""

    def now_us(self) -> int:
        """Wall clock, Unix microseconds."""
        return time.time_ns() // 1000

    def elapsed(self) -> float:
        """Seconds since boot, suspend included."""
        # CLOCK_BOOTTIME counts suspend; a laptop that slept must not believe that no time has passed.
        return time.clock_gettime(_BOOT_CLOCK)

    def random(self, size: int) -> bytes:
        """Bytes from the kernel."""
        return os.urandom(size)


_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

REAL = RealSystem()
