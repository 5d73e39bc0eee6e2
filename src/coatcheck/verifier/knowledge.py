"""What a verifier knows at one moment: the issuer's keys, the denylist, the tokens it has verified, and for how long.

Decides what follows from each answer of the issuer. The verifier's thread writes, and every `verify` of every thread
reads without a lock: so whatever is read together is replaced together, and a version is raised after what it stands
for. A fork or a close throws the whole of it away. This file must never wait, fetch or read a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from coatcheck.core.access_token import AccessToken
from coatcheck.core.denylist import FeedPage, FeedReader, KeyDenied
from coatcheck.core.freshness import NEVER, BoundedTable, Lease
from coatcheck.primitives.jwk import VerifyingKey

UNCHECKED: Final = -1
"""The version of a token that the denylist was never asked about."""

MISSING_SECONDS: Final = 60.0
"""How long an unknown `kid` stays a reason to do nothing after it was one to ask for the keys."""

_MAX_MISSING: Final = 256


class Verified:
    """A token whose signature and claims are right. `checked` is the version of the denylist that let it pass."""

    __slots__ = ("checked", "ends_us", "token")

    def __init__(self, token: AccessToken, ends_us: int) -> None:
        self.token = token
        self.ends_us = ends_us
        self.checked = UNCHECKED


class Trust:
    """A set of keys, and the tokens that these very keys have proven; dropping one drops the other.

    Whoever verifies takes both from one `Trust`: what a key that has just been denied proves at the last moment then
    lands in a table that nobody looks into any more.
    """

    __slots__ = ("find", "keys", "verified")

    def __init__(self, keys: Mapping[str, VerifyingKey], verified: BoundedTable[Verified]) -> None:
        self.keys: Final = keys
        self.verified: Final = verified
        self.find: Final = verified.get


class NoticingKeys(Mapping[str, VerifyingKey]):
    """Keys by `kid` that tell somebody about each one that is missing."""

    __slots__ = ("_keys", "_on_missing")

    def __init__(self, keys: Mapping[str, VerifyingKey], on_missing: Callable[[str], None]) -> None:
        self._keys = keys
        self._on_missing = on_missing

    def __getitem__(self, kid: str) -> VerifyingKey:
        found = self._keys.get(kid)
        if found is None:
            self._on_missing(kid)
            raise KeyError(kid)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Knowledge:
    """Everything one verifier has been told. Times are seconds on the boot-time clock unless they say otherwise."""

    __slots__ = (
        "_elapsed",
        "_missing",
        "_published",
        "_room",
        "_served_span",
        "_wake",
        "feed",
        "keys_wanted",
        "lease",
        "served_until",
        "sure_until",
        "trust",
        "version",
    )

    def __init__(
        self,
        issuer: str,
        *,
        room: int,
        feed_lease: float,
        served: float,
        elapsed: Callable[[], float],
        wake: Callable[[], None],
    ) -> None:
        self._room = room
        self._served_span = served
        self._elapsed = elapsed
        self._wake = wake
        self._missing: BoundedTable[float] = BoundedTable(_MAX_MISSING)
        self._published: dict[str, VerifyingKey] = {}
        self.trust = self._trusting({}, None)
        self.feed = FeedReader(issuer)
        self.version = self.feed.version
        self.lease = Lease(feed_lease)
        self.sure_until = NEVER
        self.served_until = NEVER
        self.keys_wanted = False

    @property
    def is_ready(self) -> bool:
        """Whether anything could be accepted: there are keys, and the feed was confirmed once."""
        return bool(self.trust.keys) and self.lease.confirmed != NEVER

    def take(self, page: FeedPage, *, now: float) -> bool:
        """Take a page that was asked for; returns whether it makes the list complete. `now` is Unix seconds.

        Raises: PageRefused, DenylistFull.
        """
        try:
            return self.feed.take(page)
        finally:
            self._publish(page, now)

    def take_pushed(self, page: FeedPage, *, now: float) -> None:
        """Take a page that the stream brought. Raises: DenylistFull."""
        try:
            self.feed.take_pushed(page)
        finally:
            self._publish(page, now)

    def confirm(self, sent: float, lag: float) -> None:
        """The list was complete for a question sent at `sent`, by somebody `lag` seconds behind."""
        self.lease.confirm(sent, lag)
        self.served_until = self.lease.confirmed + self._served_span
        self.sure_until = self.lease.until

    def prune(self, *, now: float) -> None:
        """Forget denials whose time is over. `now` is Unix seconds."""
        self.feed.denied.prune(now=now)

    def use_keys(self, keys: Mapping[str, VerifyingKey], *, now: float) -> None:
        """The issuer publishes these keys, and no others. `now` is Unix seconds."""
        self._published = dict(keys)
        self._sift(now)

    def miss(self, kid: str) -> None:
        """A token named a key that is not there: ask for the keys, unless this name was a reason a moment ago."""
        now = self._elapsed()
        until = self._missing.get(kid)
        if until is not None and now < until:
            return
        self._missing.put(kid, now + MISSING_SECONDS)
        self._want_keys()

    def _want_keys(self) -> None:
        # One signal for a storm of invented names: the flag stays until the thread has asked.
        if not self.keys_wanted:
            self.keys_wanted = True
            self._wake()

    def _publish(self, page: FeedPage, now: float) -> None:
        if any(isinstance(entry, KeyDenied) for entry in page.entries) or self._has_denied_key(now):
            self._sift(now)
        self.version = self.feed.version

    def _has_denied_key(self, now: float) -> bool:
        return any(self.feed.denied.denies_key(kid, now=now) for kid in self.trust.keys)

    def _sift(self, now: float) -> None:
        denied = self.feed.denied
        keys = {kid: key for kid, key in self._published.items() if not denied.denies_key(kid, now=now)}
        self.trust = self._trusting(keys, self.trust)
        if self._published and not keys:
            # The only key was withdrawn. The issuer has another one by now, or will have at the next look.
            self._want_keys()

    def _trusting(self, keys: dict[str, VerifyingKey], old: Trust | None) -> Trust:
        if old is not None and all(kid in keys and _are_same(keys[kid], key) for kid, key in old.keys.items()):
            # Nothing was taken away: what the old keys have proven stays proven.
            return Trust(NoticingKeys(keys, self.miss), old.verified)
        return Trust(NoticingKeys(keys, self.miss), BoundedTable(self._room))


def _are_same(left: VerifyingKey, right: VerifyingKey) -> bool:
    return left.public_jwk() == right.public_jwk()
