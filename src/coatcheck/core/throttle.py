"""How many sign-in attempts may be made: which buckets an attempt falls into, and what refuses it.

Decides the limits of OWASP ASVS 5.0 6.1.1 and 6.3.1 and of NIST SP 800-63B-4 s3.2.2:

- An attempt from a device that has signed in to the account before falls into that device's own bucket and a wide one
  of all the account's known devices. Any other attempt falls into the account's bucket of unknown devices and into
  the bucket of its network. So a stranger can slow down strangers, never the owner's own browser.
- Buckets refill evenly, so nobody is locked out for good by them. What does end is the count of consecutive failures
  (`needs_recovery`): the standard wants an end to guessing, whoever guesses and from however many places.
- All buckets are charged before the password is looked at, so parallel attempts cannot outrun the count
  (the class of CVE-2024-4629).
- A success clears the one bucket it was made in and never the network's: otherwise an attacker who signs in to his
  own account now and then guesses at other accounts for ever (allauth 65.8).
- When forwarding headers came from a peer that is not trusted, the address is that of an unknown proxy and everybody
  behind it. The network bucket is then off, and the caller must say so loudly; the account's buckets stay.

Bucket keys hold no name and no address, only a keyed hash. This file must never read a clock or count by itself.
"""

from __future__ import annotations

import math
from base64 import urlsafe_b64encode
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from coatcheck.core.device import KnownDevice
from coatcheck.core.network import network_of
from coatcheck.core.ports import Hit, RateLimit
from coatcheck.errors import ConfigurationError
from coatcheck.primitives.digest import keyed

MAX_CONSECUTIVE_FAILURES: Final = 100
"""NIST SP 800-63B-4 s3.2.2: no more than 100 consecutive failures on one account."""

_KEY_BYTES: Final = 18
_QUARTER_HOUR: Final = 900.0
_TEN: Final = RateLimit(attempts=10, period=_QUARTER_HOUR)
_TWENTY: Final = RateLimit(attempts=20, period=_QUARTER_HOUR)
_HUNDRED: Final = RateLimit(attempts=100, period=_QUARTER_HOUR)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottlePolicy:
    """Every number of sign-in throttling; periods are seconds.

    `unknown_devices`: attempts on one account by browsers that never signed in to it, all together. Ten cover a
    person who tries all the passwords he remembers; then one more every 90 s. Raising it helps guessers most.
    `known_device`: attempts on one account by one browser that signed in to it before.
    `known_devices`: the same for all such browsers together; a bound on hashing work that can be had with cookies
    collected at one's own account.
    `network`: attempts from one IPv4 address or IPv6 /64 by unknown devices, over all accounts (stuffing). Raise it
    where many people first sign in behind one address.
    `consecutive_failures`: failures on one account without a success in between, after which it needs recovery.
    """

    unknown_devices: RateLimit = _TEN
    known_device: RateLimit = _TWENTY
    known_devices: RateLimit = _HUNDRED
    network: RateLimit = _HUNDRED
    consecutive_failures: int = MAX_CONSECUTIVE_FAILURES

    def __post_init__(self) -> None:
        for name in ("unknown_devices", "known_device", "known_devices", "network"):
            limit: RateLimit = getattr(self, name)
            if limit.attempts < 1 or not 0 < limit.period < math.inf:
                raise ConfigurationError(f"throttle.{name}: at least one attempt in a finite period")
        if not 1 <= self.consecutive_failures <= MAX_CONSECUTIVE_FAILURES:
            raise ConfigurationError(
                f"throttle.consecutive_failures: 1 to {MAX_CONSECUTIVE_FAILURES} (NIST SP 800-63B-4 s3.2.2)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One sign-in attempt, before anything was looked up.

    `account` is the `UserName.key` that was named, or the typed text itself where it cannot name an account: an
    unknown account has the same buckets as a known one, or the limits would tell them apart. `address` and
    `forwarded_by_untrusted_peer` are `ClientAddress.address` and `ClientAddress.forged` of `core/network.py`.
    """

    account: str
    address: str | None
    device: KnownDevice | None = None
    forwarded_by_untrusted_peer: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """One counter an attempt is charged to; `cleared_by_success` is true for its own bucket alone."""

    key: str
    limit: RateLimit
    cleared_by_success: bool


def buckets_of(attempt: Attempt, *, policy: ThrottlePolicy, key: bytes) -> tuple[Bucket, ...]:
    """The buckets to charge, all of them, before the password is checked.

    `key` is 32 bytes, the same on every node.
    """
    account = attempt.account.encode("utf-8", "surrogatepass")
    if attempt.device is not None:
        # Exempt from the network's bucket: a guesser behind the same address must not keep the owner out.
        of_device = account + b"\x00" + attempt.device.id.encode("ascii")
        return (
            _bucket("device", of_device, policy.known_device, key, own=True),
            _bucket("devices", account, policy.known_devices, key, own=False),
        )
    unknown = _bucket("account", account, policy.unknown_devices, key, own=True)
    if attempt.address is None or attempt.forwarded_by_untrusted_peer:
        return (unknown,)
    network = network_of(attempt.address).encode("ascii")
    return (unknown, _bucket("network", network, policy.network, key, own=False))


def wait_of(hits: Iterable[Hit]) -> int | None:
    """Whole seconds until the attempt may be repeated (at least 1), or `None` when every bucket let it pass."""
    waits = [hit.retry_after for hit in hits if not hit.allowed]
    return max(1, math.ceil(max(waits))) if waits else None


def needs_recovery(failures: int, *, policy: ThrottlePolicy) -> bool:
    """Whether an attempt may not be answered by its password any more.

    `failures` counts this attempt too (it is counted before its password is checked): exactly
    `policy.consecutive_failures` guesses are ever judged. The refusal reads like a wrong password.
    """
    return failures > policy.consecutive_failures


def _bucket(kind: str, data: bytes, limit: RateLimit, key: bytes, *, own: bool) -> Bucket:
    # Keyed, because names and addresses can be guessed from a plain hash; the kind keeps a name and an address apart.
    digest = keyed(kind.encode("ascii") + b"\x00" + data, key=key, size=_KEY_BYTES, purpose=b"cc-throt")
    return Bucket(
        key=f"sign-in:{kind}:{urlsafe_b64encode(digest).decode('ascii')}", limit=limit, cleared_by_success=own
    )
