"""The thread of a verifier: it fetches the issuer's keys and follows its revocations.

Decides when to ask what, and what each answer is worth. Only a complete answer to a poll makes the verifier fresh, and
it counts from the moment its question was sent; the stream brings revocations sooner and proves nothing by its silence.
Whatever else comes (refusals, redirects, garbage, nothing) changes nothing that is known, is said once in the log, and
is tried again after a growing, jittered pause. One thread waits on all connections at once, so that an answer that
does not come holds up no other question. Correctness never depends on this thread: when it dies or freezes, the lease
runs out.
"""

from __future__ import annotations

import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from coatcheck.core.denylist import (
    KEYS_AT_MOST,
    MAX_PAGE_OCTETS,
    PAGE_ENTRIES,
    DenylistFull,
    FeedPage,
    PageRefused,
    read_page,
)
from coatcheck.primitives.jwk import MAX_JWKS_BYTES, KeyRefused, load_jwks
from coatcheck.system import System
from coatcheck.verifier.knowledge import Knowledge
from coatcheck.verifier.stream import Chunks, Events, StreamBroken
from coatcheck.verifier.wire import Address, Answer, Bell, ExchangeFailed, Line, wait_for

log: Final = logging.getLogger("coatcheck")

KEYS_AT_LEAST: Final = 60.0
"""Seconds between two looks at the keys, whatever `max-age` says. Keys are published long before they sign."""

COOL_DOWN: Final = 10.0
"""Seconds between two fetches of the keys at least, however many tokens name a key that is not there."""

STREAM_SILENCE: Final = 3.0
"""Seconds without as much as a comment after which a stream counts as dead; the issuer writes one every second."""

_FIRST_PAUSE: Final = 0.1
_STREAM_PAUSE_AT_MOST: Final = 15.0
_REFUSED_PAUSE: Final = 10.0
_PRUNE_SECONDS: Final = 30.0
_LONGEST_WAIT: Final = 5.0
_READS_A_TURN: Final = 64
_KINDS_REMEMBERED: Final = 16

_MAX_AGE: Final = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})", re.IGNORECASE)
_ETAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e]{0,256}"')
_REDIRECTS: Final = frozenset({300, 301, 302, 303, 305, 307, 308})
_KEY_TYPES: Final = frozenset({"application/jwk-set+json", "application/json"})


class Follower:
    """Everything the thread does. `feed` and `credential` are `None` where nothing is followed but the keys."""

    def __init__(
        self,
        *,
        known: Knowledge,
        system: System,
        keys: Address,
        feed: Address | None,
        credential: str | None,
        feed_lease: float,
        bell: Bell,
        on_ready: Callable[[], None],
    ) -> None:
        self._known = known
        self._system = system
        self._bell = bell
        self._on_ready = on_ready
        self._halted = False
        self._pruned = system.elapsed()
        self._keys = _Keys(known, system, keys, feed_lease)
        self._errands: list[_Errand] = [self._keys]
        if feed is not None and credential is not None:
            self._errands.append(_Poll(known, system, feed, feed_lease, credential))
            self._errands.append(_Stream(known, system, feed, feed_lease, credential))

    def run(self) -> None:
        """Work until `halt`. Never raises."""
        try:
            while not self._halted:
                try:
                    self._turn()
                except Exception:
                    # Whatever it was: without this thread the service would refuse everybody until its restart.
                    log.exception("coatcheck: the verifier's thread failed and goes on")
                    for errand in self._errands:
                        errand.fail("an error of this program")
        finally:
            for errand in self._errands:
                errand.close()
            self._bell.close()

    def halt(self) -> None:
        """Let `run` end soon."""
        self._halted = True
        self._bell.ring()

    def abandon(self) -> None:
        """After a fork: this thread does not exist here; close this process's copies of its descriptors."""
        for errand in self._errands:
            errand.line.abandon()
        self._bell.abandon()

    def _turn(self) -> None:
        now = self._system.elapsed()
        if self._known.keys_wanted:
            self._keys.want()
        for errand in self._errands:
            errand.attend(now)
        if self._known.is_ready:
            self._on_ready()
        if now - self._pruned >= _PRUNE_SECONDS:
            self._pruned = now
            self._known.prune(now=self._system.now_us() / 1_000_000)
        next_at = min(errand.wakes_at() for errand in self._errands)
        seconds = min(max(next_at - self._system.elapsed(), 0.0), _LONGEST_WAIT)
        waiting: list[Line | Bell] = [self._bell, *(errand.line for errand in self._errands if errand.is_waiting)]
        ready = wait_for(waiting, seconds)
        if self._bell in ready:
            self._bell.hush()
        for errand in self._errands:
            if errand.line in ready:
                errand.collect()


class _Errand(ABC):
    """One question that is asked again and again over a line of its own."""

    name: str
    pause_at_most: float

    def __init__(self, known: Knowledge, system: System, address: Address, feed_lease: float) -> None:
        self.known = known
        self.system = system
        self.line = Line(address, system)
        # A third of the lease: a question that hangs is given up early enough to ask another one in time.
        self.within = min(max(feed_lease / 3, 0.25), 5.0)
        self.due = system.elapsed()
        self.sent: float | None = None
        self.failures = 0
        self._said = ""

    @property
    def is_waiting(self) -> bool:
        """Whether an octet on the line would be news."""
        return self.sent is not None

    def wakes_at(self) -> float:
        """When there is something to do, if nothing comes before."""
        return self.due if self.sent is None else self.sent + self.within

    def attend(self, now: float) -> None:
        """Ask if it is time to, or give up waiting."""
        if self.sent is not None:
            if now >= self.sent + self.within:
                self.fail("no answer in time")
        elif now >= self.due:
            try:
                self.sent = self.ask()
            except ExchangeFailed as failed:
                self.fail(str(failed))

    def collect(self) -> None:
        """Read what has come."""
        try:
            self.read()
        except (ExchangeFailed, PageRefused, StreamBroken, KeyRefused, DenylistFull) as failed:
            self.fail(str(failed))

    def fail(self, reason: str, *, pause_at_most: float | None = None) -> None:
        """Close the line and try again later; each failure in a row doubles the pause."""
        self.line.close()
        self.sent = None
        most = self.pause_at_most if pause_at_most is None else pause_at_most
        pause = min(_FIRST_PAUSE * 2 ** min(self.failures, 16), most)
        self.failures += 1
        # From half to the whole: a restarted issuer must not meet all its verifiers at one moment.
        self.due = self.system.elapsed() + pause * (0.5 + self.chance() / 2)
        if reason != self._said:
            self._said = reason
            log.warning("coatcheck: %s: %s; trying again", self.name, reason)

    def succeed(self, due: float) -> None:
        """It went well; ask again at `due`."""
        self.sent = None
        self.failures = 0
        self.due = due
        if self._said:
            self._said = ""
            log.info("coatcheck: %s: well again", self.name)

    def chance(self) -> float:
        """A random number from 0 to 1."""
        return self.system.random(1)[0] / 255

    def receive(self, limit: int) -> tuple[Answer, float]:
        """The answer, and when its question was sent. Raises: ExchangeFailed."""
        sent = self.sent
        if sent is None:
            raise ExchangeFailed("an answer without a question")
        return self.line.answer(deadline=sent + self.within, limit=limit), sent

    def now(self) -> float:
        """Unix seconds."""
        return self.system.now_us() / 1_000_000

    def close(self) -> None:
        """Let go of the connection."""
        self.line.close()

    @abstractmethod
    def ask(self) -> float:
        """Send the question; returns when."""

    @abstractmethod
    def read(self) -> None:
        """Something has come."""


class _Keys(_Errand):
    """The issuer's keys. Good keys stay until better ones are there: a broken answer takes nothing away."""

    name = "the issuer's keys"
    pause_at_most = KEYS_AT_MOST / 60

    def __init__(self, known: Knowledge, system: System, address: Address, feed_lease: float) -> None:
        super().__init__(known, system, address, feed_lease)
        self._etag: str | None = None
        self._asked: float | None = None

    def want(self) -> None:
        """Somebody met a key that is not there: ask as soon as the cool-down allows."""
        if self.sent is None and self._asked is not None:
            self.due = min(self.due, self._asked + COOL_DOWN)

    def ask(self) -> float:
        """Send the question; returns when."""
        self._asked = self.system.elapsed()
        self.known.keys_wanted = False
        fields = {"Accept": "application/jwk-set+json, application/json"}
        if self._etag is not None:
            fields["If-None-Match"] = self._etag
        return self.line.ask("", fields, within=self.within)

    def read(self) -> None:
        """Take the keys, if they are keys."""
        answer, sent = self.receive(MAX_JWKS_BYTES)
        if not (answer.status == 304 and self._etag is not None):
            _check_status(answer, 200)
            if answer.media_type not in _KEY_TYPES:
                raise ExchangeFailed("the answer is no JWK Set")
            self.known.use_keys(load_jwks(answer.body), now=self.now())
            etag = answer.fields.get("etag", "")
            self._etag = etag if _ETAG.fullmatch(etag) else None
        # Without a key nobody is let in, so the cool-down alone counts: the issuer makes another one at any moment.
        self.succeed(sent + (_seconds_between_keys(answer) if self.known.trust.keys else COOL_DOWN))


class _Poll(_Errand):
    """Asks for what was revoked since the last answer. The only thing that makes a verifier fresh."""

    name = "the revocation feed"

    def __init__(self, known: Knowledge, system: System, address: Address, feed_lease: float, credential: str) -> None:
        super().__init__(known, system, address, feed_lease)
        self._every = feed_lease / 3
        self.pause_at_most = self._every
        self._credential = credential
        self._unknown: set[str] = set()

    def ask(self) -> float:
        """Send the question; returns when."""
        fields = {"Accept": "application/json", "Authorization": f"Bearer {self._credential}"}
        return self.line.ask(_query(self.line, self.known), fields, within=self.within)

    def read(self) -> None:
        """Take the answer to a poll, or one page of a snapshot."""
        answer, sent = self.receive(MAX_PAGE_OCTETS)
        if answer.status == 410 and self.known.feed.cursor is not None:
            self.known.feed.lose()
            # At once, but with a pause if the next one is lost as well.
            self.fail("the place in the feed is lost; reading it from the start")
            self.due = self.system.elapsed() if self.failures == 1 else self.due
            return
        if answer.status in (401, 403):
            self.fail(f"the credential was refused ({answer.status})", pause_at_most=_REFUSED_PAUSE)
            return
        _check_status(answer, 200)
        if answer.media_type != "application/json":
            raise ExchangeFailed("the answer is no page of the feed")
        page = read_page(answer.body)
        self._mention(page)
        if not self.known.take(page, now=self.now()):
            self.sent, self.due = None, self.system.elapsed()
            return
        self.known.confirm(sent, page.lag)
        self.succeed(sent + self._every * (0.8 + self.chance() / 5))

    def _mention(self, page: FeedPage) -> None:
        new = page.unknown - self._unknown
        if new and len(self._unknown) < _KINDS_REMEMBERED:
            self._unknown |= new
            log.warning("coatcheck: %s: entries of a kind this release does not know; update it", self.name)


class _Stream(_Errand):
    """Keeps one long answer open, on which revocations come at once."""

    name = "the stream of revocations"
    pause_at_most = _STREAM_PAUSE_AT_MOST

    def __init__(self, known: Knowledge, system: System, address: Address, feed_lease: float, credential: str) -> None:
        super().__init__(known, system, address, feed_lease)
        self._credential = credential
        self._opened = False
        self._heard = 0.0
        self._more = False
        self._chunks: Chunks | None = None
        self._events = Events()

    def attend(self, now: float) -> None:
        """Open the stream once there is a place to follow from; give up one that has gone silent."""
        if self._opened:
            if self._more:
                self.collect()
            elif now >= self._heard + STREAM_SILENCE:
                self.fail("the stream has gone silent")
        elif self.sent is not None or self.known.feed.is_complete:
            super().attend(now)

    def wakes_at(self) -> float:
        """When there is something to do, if nothing comes before."""
        if self._opened:
            return self._heard if self._more else self._heard + STREAM_SILENCE
        if self.sent is None and not self.known.feed.is_complete:
            # The poll wakes the thread when the snapshot is there.
            return float("inf")
        return super().wakes_at()

    def fail(self, reason: str, *, pause_at_most: float | None = None) -> None:
        """Close the stream and open another one later."""
        if self._opened and self.sent is not None and self.system.elapsed() - self.sent >= STREAM_SILENCE:
            # It lived: servers restart, and proxies end long answers after their time.
            self.failures = 0
        self._opened = self._more = False
        super().fail(reason, pause_at_most=pause_at_most)

    def ask(self) -> float:
        """Send the question; returns when."""
        fields = {"Accept": "text/event-stream", "Authorization": f"Bearer {self._credential}"}
        return self.line.ask(_query(self.line, self.known), fields, within=self.within)

    def read(self) -> None:
        """Open the stream, or take what has come on it."""
        if not self._opened:
            self._open()
        for _ in range(_READS_A_TURN):
            data = self.line.read_stream()
            if data is None:
                self._more = False
                return
            self._heard = self.system.elapsed()
            self._take(data)
        # Others want their turn, too.
        self._more = True

    def _open(self) -> None:
        sent = self.sent if self.sent is not None else self.system.elapsed()
        answer = self.line.open_stream(deadline=sent + self.within)
        if answer is not None:
            raise ExchangeFailed(f"no stream is offered ({answer.status})")
        self._opened = True
        self._heard = self.system.elapsed()
        self._chunks = Chunks() if self.line.is_chunked else None
        self._events = Events()
        if self._said:
            self._said = ""
            log.info("coatcheck: %s: well again", self.name)

    def _take(self, data: bytes) -> None:
        if self._chunks is not None:
            data = self._chunks.take(data)
        for name, value in self._events.take(data):
            if name == b"revoked":
                self.known.take_pushed(read_page(value), now=self.now())
        if self._chunks is not None and self._chunks.ended:
            raise ExchangeFailed("the stream ended")


def _query(line: Line, known: Knowledge) -> str:
    cursor = known.feed.cursor
    after = "" if cursor is None else f"&after={quote(cursor, safe='')}"
    return f"{line.query_mark}limit={PAGE_ENTRIES}{after}"


def _check_status(answer: Answer, wanted: int) -> None:
    if answer.status in _REDIRECTS:
        # An answer from where a redirect leads would be believed like the issuer's own.
        raise ExchangeFailed(f"a redirect is not followed ({answer.status})")
    if answer.status != wanted:
        raise ExchangeFailed(f"the answer was {answer.status}")


def _seconds_between_keys(answer: Answer) -> float:
    found = _MAX_AGE.search(answer.fields.get("cache-control", ""))
    return min(max(float(found[1]) if found else 0.0, KEYS_AT_LEAST), KEYS_AT_MOST)
