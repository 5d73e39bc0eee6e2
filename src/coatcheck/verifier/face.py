"""`Verifier`: access tokens accepted and refused in a service that holds no store.

Decides the order of every check: a token seen before (found by its SHA-256), or else its signature and claims; then its
end, then the lease on the denylist, then the denylist. `verify` reads memory and nothing else; one thread
(`follower.py`) keeps that memory true, and everything it has not confirmed for too long counts as unknown, never as
fine. It must never wait for an answer, accept anything before the first snapshot, or keep the text of a token.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from types import TracebackType
from typing import Final, Literal, NoReturn
from weakref import WeakSet

from coatcheck.core.access_token import MAX_TOKEN, AccessToken, TokenRules, verify_access_token
from coatcheck.core.freshness import FOR_EVER, NEVER
from coatcheck.errors import ConfigurationError, FeedSilent, TokenInvalid
from coatcheck.system import REAL, System
from coatcheck.verifier.follower import Follower
from coatcheck.verifier.knowledge import Knowledge, Verified
from coatcheck.verifier.wire import Bell, parse_address

OnSilence = Literal["refuse", "serve"]

MAX_CACHE_SIZE: Final = 1_000_000
_LEASES: Final = (timedelta(milliseconds=300), timedelta(minutes=5))
_MAX_SILENCE: Final = timedelta(hours=1)
# What may stand in an Authorization field, and nothing that could begin another one.
_CREDENTIAL: Final = re.compile(r"[\x21-\x7e]{1,4096}")
_CLOSE_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierStatus:
    """How a verifier is doing, for metrics and health checks.

    `feed_age`: seconds since the denylist was last known to be complete, `None` before the first time and without a
    feed. `fresh`: whether a sensitive token could be accepted now. `entries`: what is denied. `cached`: tokens that
    need no signature check next time. `running`: whether the thread lives; a dead one lets `feed_age` grow.
    """

    keys: int
    feed_age: float | None
    fresh: bool
    entries: int
    cached: int
    running: bool


class Verifier:
    """Checks the access tokens of one issuer, and knows within a lease which of them were revoked.

    After a revoke has returned at the issuer, no token of it is accepted later than the issuer's own lease plus
    `feed_lease` (`silence_bound` for tokens that are not sensitive, where `on_silence` is "serve"). Any number of
    threads and event loops may share one. Every service process has its own; after a fork the child's is empty and
    starts anew by itself.
    """

    def __init__(
        self,
        issuer: str,
        *,
        audience: str | Iterable[str],
        feed_credential: str | None,
        leeway: int = 0,
        on_silence: OnSilence = "refuse",
        feed_lease: timedelta = timedelta(seconds=5),
        silence_bound: timedelta = timedelta(seconds=60),
        cache_size: int = 10_000,
        jwks_url: str | None = None,
        feed_url: str | None = None,
        without_revocations: bool = False,
        system: System = REAL,
    ) -> None:
        """Set up; nothing is asked before `start`. Raises: ConfigurationError.

        `issuer`: the URL that tokens name as `iss`; keys and feed are below it unless `jwks_url` and `feed_url` say
            otherwise. https, or http on this machine.
        `audience`: the names of this service in `aud`; a token must carry one of them.
        `feed_credential`: what this service shows the issuer to read the feed. `None` only with
            `without_revocations`.
        `leeway`: 0 to 60 s of clock difference forgiven; every second lengthens the life of each token.
        `on_silence`: what happens when the issuer is not heard for longer than `feed_lease`. "refuse" answers every
            token with `FeedSilent`. "serve" does so for sensitive ones alone until `silence_bound` is over: weaker,
            because a revoke during an outage is then seen that much later.
        `feed_lease`: 0.3 s to 5 min; the issuer is asked three times as often.
        `silence_bound`: from `feed_lease` to 1 h.
        `cache_size`: verified tokens kept, about 2 KiB each; more only cost a signature check each time.
        `without_revocations`: trust every token until its `exp`. A logout, a stolen session and a disabled account
            are then not noticed before that.
        """
        try:
            audiences = frozenset((audience,) if isinstance(audience, str) else audience)
        except TypeError as wrong:
            raise ConfigurationError("audience: a text, or several") from wrong
        if not all(isinstance(name, str) for name in audiences):
            raise ConfigurationError("audience: a text, or several")
        if isinstance(leeway, bool) or not isinstance(leeway, int):
            raise ConfigurationError("leeway: whole seconds")
        if isinstance(cache_size, bool) or not isinstance(cache_size, int) or not 1 <= cache_size <= MAX_CACHE_SIZE:
            raise ConfigurationError(f"cache_size: 1 to {MAX_CACHE_SIZE} tokens")
        if on_silence not in ("refuse", "serve"):
            raise ConfigurationError('on_silence: "refuse" or "serve"')
        _check_spans(feed_lease, silence_bound)
        _check_credential(feed_credential, without_revocations)
        parse_address(issuer, name="issuer")
        below = issuer.rstrip("/")
        self._keys_at: Final = parse_address(jwks_url or f"{below}/.well-known/jwks.json", name="jwks_url")
        self._feed_at: Final = parse_address(feed_url or f"{below}/revocations", name="feed_url")
        self._rules: Final = TokenRules(issuer=issuer, audiences=audiences, leeway=leeway)
        self._credential: Final = feed_credential
        self._with_feed: Final = not without_revocations
        self._sure_span: Final = feed_lease.total_seconds() if self._with_feed else FOR_EVER
        served = silence_bound if on_silence == "serve" else feed_lease
        self._served_span: Final = served.total_seconds() if self._with_feed else FOR_EVER
        # How often something is asked; also what the time limits of an exchange follow from.
        self._pace: Final = feed_lease.total_seconds()
        self._room: Final = cache_size
        self._system: Final = system
        self._now_us: Final = system.now_us
        self._elapsed: Final = system.elapsed
        self._lock = threading.Lock()
        self._follower: Follower | None = None
        self._thread: threading.Thread | None = None
        self._ready = threading.Event()
        self._known = self._know_nothing(_nobody)
        _verifiers.add(self)

    def start(self) -> None:
        """Begin to fetch the keys and follow the feed, in one daemon thread. Safe to call again, and cheap; starts a
        thread that has died anew. Returns at once: until the first snapshot is there tokens are answered `FeedSilent`.
        """
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return
            self._forget()
            bell = Bell()
            self._ready = threading.Event()
            self._known = self._know_nothing(bell.ring)
            if not self._with_feed:
                self._known.confirm(self._elapsed(), 0.0)
            self._follower = Follower(
                known=self._known,
                system=self._system,
                keys=self._keys_at,
                feed=self._feed_at if self._with_feed else None,
                credential=self._credential,
                feed_lease=self._pace,
                bell=bell,
                on_ready=self._ready.set,
            )
            self._thread = threading.Thread(target=self._follower.run, name="coatcheck-verifier", daemon=True)
            self._thread.start()

    def wait_until_ready(self, timeout: float) -> bool:
        """Wait until there are keys and a first snapshot, at most so many seconds; returns whether there are.

        For the start of a process, so that its first requests are not refused. Never on a request path.
        """
        return self._ready.wait(timeout)

    def close(self) -> None:
        """End the thread and forget everything; tokens are answered `FeedSilent` from here on. Safe to call again."""
        with self._lock:
            thread = self._thread
            self._forget()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_CLOSE_SECONDS)

    def __enter__(self) -> Verifier:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def verify(self, token: str | bytes, *, sensitive: bool = False) -> AccessToken:
        """Return what an access token says, or refuse it. Reads memory alone: never waits, never asks anybody.

        `sensitive`: refuse as soon as the feed has been silent for `feed_lease`, whatever `on_silence` says.
        Raises: TokenInvalid (401), FeedSilent (503), and nothing else, whatever comes in.
        """
        # Every name is looked up once, and what a hit does not need stands behind a branch: this is the hot path.
        known = self._known
        try:
            # A text that is not ASCII has a key, too: under it nothing is ever found, and then it is refused.
            key = sha256(token.encode()).digest() if type(token) is str and len(token) <= MAX_TOKEN else _key_of(token)
        except UnicodeEncodeError:
            raise TokenInvalid("shape") from None
        found = known.trust.find(key)
        if found is None:
            found = self._verify_unseen(known, key, token)
        if self._now_us() >= found.ends_us:
            raise TokenInvalid("expired")
        if self._elapsed() >= (known.sure_until if sensitive else known.served_until):
            _silent(known)
        if found.checked != known.version:
            self._ask_denylist(known, found)
        return found.token

    @property
    def status(self) -> VerifierStatus:
        """How it is doing. Cheap; for metrics and health checks."""
        known, thread = self._known, self._thread
        now = self._elapsed()
        confirmed = known.lease.confirmed
        return VerifierStatus(
            keys=len(known.trust.keys),
            feed_age=now - confirmed if self._with_feed and confirmed != NEVER else None,
            fresh=known.is_ready and now < known.sure_until,
            entries=len(known.feed.denied),
            cached=len(known.trust.verified),
            running=thread is not None and thread.is_alive(),
        )

    def __repr__(self) -> str:
        return f"Verifier({self._rules.issuer!r})"

    def _verify_unseen(self, known: Knowledge, key: bytes, token: str | bytes) -> Verified:
        trust = known.trust
        if not trust.keys:
            # Nobody can tell a good token from a bad one yet: a 401 would make clients throw good ones away.
            raise FeedSilent("no keys of the issuer are known yet")
        token_now = verify_access_token(token, trust.keys, self._rules, now=self._now_us() / 1_000_000)
        verified = Verified(token_now, (token_now.expires_at + self._rules.leeway) * 1_000_000)
        trust.verified.put(key, verified)
        return verified

    def _ask_denylist(self, known: Knowledge, found: Verified) -> None:
        # Before the list: what is added meanwhile then raises the version above what is kept here.
        version = known.version
        token = found.token
        if token.expires_at - token.issued_at > known.feed.longest:
            # Its denial would be forgotten before its end.
            raise TokenInvalid("lifetime")
        why = known.feed.denied.why(token, now=self._now_us() / 1_000_000)
        if why is not None:
            raise TokenInvalid(f"denied_{why}")
        found.checked = version

    def _know_nothing(self, wake: Callable[[], None]) -> Knowledge:
        return Knowledge(
            self._rules.issuer,
            room=self._room,
            feed_lease=self._sure_span,
            served=self._served_span,
            elapsed=self._elapsed,
            wake=wake,
        )

    def _forget(self) -> None:
        follower, self._follower, self._thread = self._follower, None, None
        self._known = self._know_nothing(_nobody)
        if follower is not None:
            follower.halt()

    def _after_fork(self) -> None:
        follower, self._follower = self._follower, None
        started, self._thread = self._thread is not None, None
        # Another thread of the parent may have held the old ones at the fork; here nobody would ever let go of them.
        self._lock, self._ready = threading.Lock(), threading.Event()
        self._known = self._know_nothing(_nobody)
        if follower is not None:
            follower.abandon()
        if started:
            self.start()


def _nobody() -> None:
    """Nobody has to be woken."""


def _key_of(token: object) -> bytes:
    # Before hashing: ten megabytes must cost as little as ten octets.
    if not isinstance(token, (str, bytes)):
        raise TokenInvalid("shape")
    if len(token) > MAX_TOKEN:
        raise TokenInvalid("size")
    if isinstance(token, bytes):
        return sha256(token).digest()
    if not token.isascii():
        raise TokenInvalid("shape")
    return sha256(token.encode()).digest()


def _silent(known: Knowledge) -> NoReturn:
    if known.lease.confirmed == NEVER:
        raise FeedSilent("the issuer's revocations are not known yet")
    raise FeedSilent("the issuer's revocations have not been confirmed for too long")


def _check_spans(feed_lease: timedelta, silence_bound: timedelta) -> None:
    for name, span in (("feed_lease", feed_lease), ("silence_bound", silence_bound)):
        if not isinstance(span, timedelta):
            raise ConfigurationError(f"{name}: a timedelta, such as timedelta(seconds=5)")
    if not _LEASES[0] <= feed_lease <= _LEASES[1]:
        raise ConfigurationError("feed_lease: from 0.3 seconds to 5 minutes")
    if not feed_lease <= silence_bound <= _MAX_SILENCE:
        raise ConfigurationError("silence_bound: from feed_lease to 1 hour")


def _check_credential(credential: str | None, without_revocations: bool) -> None:
    if credential is None:
        if not without_revocations:
            raise ConfigurationError(
                "feed_credential: needed to read the issuer's revocations; `without_revocations=True` goes without, "
                "and then a logout is noticed only when the token ends"
            )
        return
    if without_revocations:
        raise ConfigurationError("without_revocations: contradicts feed_credential; give one of them")
    if not isinstance(credential, str) or not _CREDENTIAL.fullmatch(credential):
        # The text is not repeated: it is a secret, also when it is a wrong one.
        raise ConfigurationError("feed_credential: 1 to 4096 visible ASCII characters without spaces")


_verifiers: Final[WeakSet[Verifier]] = WeakSet()


def _after_fork_in_child() -> None:
    for verifier in list(_verifiers):
        verifier._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
