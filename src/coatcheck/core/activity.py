"""When a use of a session has to be written down.

Decides how lazily last activity may reach the store: nothing while the stored time is younger than 1/20 of the idle
timeout, then with the next batch (within a second), and at once in the last tenth or the last two seconds. So a
session never ends early while its node lives, and ends late by at most 1/20 of the idle timeout and one second.
"""

from __future__ import annotations

from typing import Final, Literal

QUIET_SHARE: Final = 20
URGENT_SHARE: Final = 10
FLUSH_SECONDS: Final = 1.0
_BATCH_US: Final = int(2 * FLUSH_SECONDS * 1_000_000)

Due = Literal["no", "batch", "now"]


def activity_due(*, seen_us: int, now_us: int, idle_us: int) -> Due:
    """Whether a use at `now_us` must be written, given the stored time. All three in microseconds."""
    age = now_us - seen_us
    if age * URGENT_SHARE >= idle_us * (URGENT_SHARE - 1) or idle_us - age <= _BATCH_US:
        return "now"
    return "batch" if age * QUIET_SHARE > idle_us else "no"
