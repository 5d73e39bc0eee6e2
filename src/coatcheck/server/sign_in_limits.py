"""Charge a sign-in attempt to its buckets before anything else is done with it.

Decides the order: all buckets first, then one answer. Which buckets, with which limits, stands in `core/throttle.py`.

A sign-in goes: `reserve` (429 otherwise), find the account, `Accounts.count_failure`, verify the password (against
nothing where `core.throttle.needs_recovery` says so), and after a success `Accounts.clear_failures` and `succeeded`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from coatcheck.core.ports import RateLimits
from coatcheck.core.throttle import Attempt, Bucket, ThrottlePolicy, buckets_of, wait_of
from coatcheck.errors import Throttled

KEY_BYTES: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A charged attempt: its password may be looked at."""

    buckets: tuple[Bucket, ...]


class SignInLimits:
    """The limits of sign-in over a store's rate limits; any number of servers share them through the store.

    `key` is 32 bytes, the same on every node.
    """

    def __init__(self, limits: RateLimits, *, policy: ThrottlePolicy, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"the key of sign-in limits has {KEY_BYTES} bytes")
        self.policy: Final = policy
        self._limits = limits
        self._key = key

    async def reserve(self, attempt: Attempt) -> Reserved:
        """Charge every bucket of the attempt, the refusing ones too.

        Raises: Throttled with the longest wait of any bucket; StoreUnavailable (without the limits nobody signs in).
        """
        buckets = buckets_of(attempt, policy=self.policy, key=self._key)
        wait = wait_of([await self._limits.hit(bucket.key, bucket.limit) for bucket in buckets])
        if wait is not None:
            raise Throttled(wait)
        return Reserved(buckets=buckets)

    async def succeeded(self, reserved: Reserved) -> None:
        """Forget the attempts in the attempt's own bucket; the network keeps its count."""
        for bucket in reserved.buckets:
            if bucket.cleared_by_success:
                await self._limits.clear(bucket.key)
