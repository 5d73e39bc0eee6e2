"""What changed in Redis or Valkey, told by the primaries themselves: one connection and one line for each.

Decides when a line is made, confirmed and cut. The server broadcasts every write under `<namespace>:s:{` and
`<namespace>:c:{`, whoever made it: a script, an operator, expiry. It queues a message before it acknowledges the write,
so what was acknowledged before a heartbeat was sent is told before the heartbeat's answer, and the send time is what
the answer confirms. The heartbeat is

    DEL <namespace>:beat:{…}     a write with a key of this primary: a primary that was deposed, that has too few
                                 replicas or that lost its Cluster refuses it, where it would answer PING; nothing is
                                 written, so it needs no room and leaves nothing
    TIME                         whether the server's clock was stepped
    CLUSTER NODES                on a Cluster: which slots are this node's, and none that is on its way

A line speaks for the slots its node had when it was made; a slot that is moved key by key belongs to nobody until the
move is over. It must never mend a line, confirm one by anything else, ask a replica, or raise to its caller. What was
considered besides stands in docs/decisions/0015-redis-feed.md.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import select
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeAlias
from weakref import WeakSet

from coatcheck.core.freshness import FOR_EVER, NEVER, Line
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import CLOCK_STEP_SECONDS, Listener
from coatcheck.core.session import SECOND_US
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.dispatch import Dispatcher
from coatcheck.stores.redis.driver import Word
from coatcheck.stores.redis.link import Answer, BlockingLink, Link, Question, Refusal, SuspendingLink
from coatcheck.stores.redis.nodes import SLOTS, Address, slot_of

log: Final = logging.getLogger("coatcheck")

RENEW_SECONDS: Final = 0.25
"""How long a question of `renew`, or a read on the link, is waited for at most."""

_FIRST_PAUSE_SECONDS: Final = 0.01
_LONGEST_PAUSE_SECONDS: Final = 0.5
# A server that knows no tracking will not learn it soon, but it may be replaced by one that does.
_UNAVAILABLE_SECONDS: Final = 30.0
_SESSION: Final = re.compile(rb"[0-9a-f]{4}\}([A-Za-z0-9_-]{16})")
_SLOTS: Final = re.compile(rb"[0-9]{1,5}(-[0-9]{1,5})?|\[[0-9]{1,5}-[<>]-.*\]")
_CUT: Final = re.compile(rb"([0-9a-f]{4})\}.*", re.DOTALL)

_Key: TypeAlias = "Address | None"


class _NotHad(Exception):
    """No line can be had; `lasting` when asking again soon is of no use."""

    def __init__(self, reason: str, *, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


@dataclass(slots=True, eq=False, kw_only=True)
class _Primary:
    """One primary (`key` is its address on a Cluster, else `None`), its connection and its line.

    `busy` is held by whoever connects or waits for an answer. `asked` is the latest heartbeat. `clock`: between which
    two values the server's clock, less ours, was at the last answer.
    """

    key: _Key
    busy: threading.Lock = field(default_factory=threading.Lock)
    link: Link | None = None
    opening: Link | None = None
    line: Line | None = None
    slots: frozenset[int] = frozenset()
    shown: tuple[bytes, ...] = ()
    beat_key: str = ""
    asked: Question | None = None
    clock: tuple[float, float] | None = None
    failures: int = 0
    not_before: float = NEVER


class RedisFeed:
    """See `core.ports.Feed`. Any number of threads; the asynchronous colour belongs to one event loop at a time."""

    def __init__(self, listener: Listener, *, lease: float, dispatcher: Dispatcher, options: StoreOptions) -> None:
        self._listener: Final = listener
        self._lease: Final = lease
        self._target: Final = dispatcher.target
        self._dispatcher: Final = dispatcher
        self._options: Final = options
        self._now: Final = options.system.elapsed
        self._suspends: Final = options.colour == "async"
        self._spread: Final = dispatcher.target.shape == "cluster"
        self._bound: Final = min(RENEW_SECONDS, options.deadline / 4)
        self._sessions: Final = f"{options.namespace}:s:{{".encode()
        self._cuts: Final = f"{options.namespace}:c:{{".encode()
        self._context: ssl.SSLContext | None = None
        self._said: str | None = None
        self._begin()
        _feeds.add(self)

    def _begin(self) -> None:
        # What a fork leaves behind is never used: a lock that another thread held would stay locked for ever.
        self._mutex = threading.Lock()
        self._home: asyncio.AbstractEventLoop | None = None
        self._primaries: dict[_Key, _Primary] = {}
        self._sources: dict[Address, str] = {}
        self._search = _Primary(key=None)
        self._map: Sequence[_Primary | None] = ()
        self._wires: tuple[BlockingLink, ...] = ()
        self._here = _Here()

    # -- asked at every check ----------------------------------------------------------------------------------------

    def line(self, tag: int) -> Line | None:
        """See `core.ports.Feed`."""
        primary = self._speaker(tag)
        line = None if primary is None else primary.line
        return None if line is None or line.broken else line

    def slot(self, tag: int) -> int:
        """Always 0: a line of this store has no marks."""
        return 0

    def drain(self) -> None:
        """See `core.ports.Feed`. About a microsecond when nothing has come."""
        wires, here = self._wires, self._here
        if not wires:
            return
        if here.wires is not wires:
            here.watch(wires)
        if here.ready(0):
            for wire in wires:
                wire.drain()

    def gathering(self, tag: int, sha: str, told: Word, key: Word, argument: Word) -> Awaitable[Answer] | None:
        """Ask a script that changes nothing about one key, over the line's own connection, if there is one in this
        event loop; together with whoever asks at this moment (`SuspendingLink.gather`).

        It is answered within a quarter of a second, with `link.LOST` if by nothing else; any refusal is to be asked
        again in the ordinary way.
        """
        primary = self._speaker(tag)
        link = None if primary is None else primary.link
        if not isinstance(link, SuspendingLink) or link.over or link.is_slow(link.patience):
            return None
        if link.loop is not asyncio.get_running_loop():
            return None
        # On a Cluster the keys of one command have one slot.
        return link.gather(sha, told, slot_of(f"{tag:04x}") if self._spread else 0, key, argument)

    def answered(self, ref: SessionRef, address: Address) -> None:
        """A session was read at this address in the ordinary way. If that is not where its line leads, what was read
        may be older than what the line has told, and must not be kept under it."""
        primary = self._speaker(ref.tag)
        link = None if primary is None else primary.link
        if link is None and not self._spread:
            # Whatever line the read began under is cut, and keeps nothing.
            return
        if link is None or link.address != address:
            self._listener.changed(ref.handle)

    def _speaker(self, tag: int) -> _Primary | None:
        if not self._spread:
            return self._primaries.get(None)
        known = self._map
        return known[slot_of(f"{tag:04x}")] if known else None

    # -- keeping it --------------------------------------------------------------------------------------------------

    async def renew(self, tag: int) -> Line | None:
        """See `core.ports.Feed`. Ends within a quarter of a second, and a quarter of the store's deadline."""
        if not self._is_ours_to_ask():
            return None
        until = time.monotonic() + self._bound
        primary = await self._primary_of(tag, until)
        if primary is None or not await self._try(primary, until):
            return None
        return self.line(tag)

    async def beat(self) -> None:
        """See `core.ports.Feed`. Ends within a lease, and half of the store's deadline."""
        if not self._is_ours_to_ask():
            return
        until, began = time.monotonic() + min(self._lease, self._options.deadline / 2), self._now()
        # All that can be asked are, before anything is waited for.
        for primary in list(self._primaries.values()):
            if primary.link is not None and self._is_usable(primary.link):
                primary.link.drain()
                self._ask(primary, until)
        primaries = await self._survey(until)
        for done, primary in enumerate(primaries):
            now = time.monotonic()
            await self._try(primary, now + (until - now) / (len(primaries) - done), since=began)

    async def close(self) -> None:
        """See `core.ports.Feed`."""
        self._leave()
        # A transport closes its socket in the next turn of its loop.
        await self._options.waits.sleep(0)

    def _is_ours_to_ask(self) -> bool:
        """Whether this event loop keeps the connections, or takes them over because whoever did has let go."""
        if not self._suspends:
            return True
        here = asyncio.get_running_loop()
        if self._home is here:
            return True
        with self._mutex:
            if self._home is not None and not self._home.is_closed() and self._is_kept():
                return False
        self._leave()
        self._home = here
        return True

    def _is_kept(self) -> bool:
        now = self._now()
        return any(each.line is not None and each.line.is_fresh(now) for each in self._primaries.values())

    def _leave(self) -> None:
        with self._mutex:
            left, self._primaries = list(self._primaries.values()), {}
            self._search = _Primary(key=None)
            self._home = None
            self._remap()
        for primary in left:
            if primary.line is not None:
                primary.line.cut()
            for link in (primary.link, primary.opening):
                if link is not None:
                    _close(link)

    async def _primary_of(self, tag: int, until: float) -> _Primary | None:
        if not self._spread:
            return self._known(None)
        found = self._speaker(tag)
        if found is not None:
            return found
        search = self._search
        if not search.busy.acquire(blocking=False):
            return None
        try:
            if self._now() < search.not_before:
                return None
            address = await self._dispatcher.primary(slot_of(f"{tag:04x}"), until)
            search.failures = 0
            primary = self._known(address)
        except StoreUnavailable:
            self._pause(search)
            return None
        finally:
            search.busy.release()
        line = primary.line
        # It does not speak for this slot, which is on its way: asking it again would change nothing.
        return None if line is not None and line.is_fresh(self._now()) else primary

    async def _survey(self, until: float) -> list[_Primary]:
        """The primaries that there are now, as far as can be learned."""
        if not self._spread:
            await self._recheck()
            return [self._known(None)]
        try:
            named = [address for _, address in await self._dispatcher.primaries(until)]
        except StoreUnavailable:
            return list(self._primaries.values())
        with self._mutex:
            for key, primary in list(self._primaries.items()):
                # One that serves nothing any more; whoever still has a line is asked until it says so itself.
                if key not in named and primary.link is None and not primary.busy.locked():
                    del self._primaries[key]
        for address in named:
            self._known(address)
        return list(self._primaries.values())

    async def _recheck(self) -> None:
        """Under Sentinel: hear of a failover from a sentinel, before the old primary refuses a write."""
        primary = self._primaries.get(None)
        link = None if primary is None else primary.link
        if self._target.shape != "sentinel" or primary is None or link is None:
            return
        named = await self._dispatcher.recheck(time.monotonic() + self._bound / 2)
        if named is not None and named != link.address:
            self._end(primary, link, "the sentinels name another primary")

    def _known(self, key: _Key) -> _Primary:
        primary = self._primaries.get(key)
        if primary is None:
            with self._mutex:
                primary = self._primaries.setdefault(key, _Primary(key=key))
        return primary

    async def _try(self, primary: _Primary, until: float, *, since: float = FOR_EVER) -> bool:
        """Have this primary's line confirmed; whether it was. One caller at a time, and none soon after a failure.

        A confirmation not older than `since` is enough.
        """
        if self._now() < primary.not_before or not primary.busy.acquire(blocking=False):
            return False
        try:
            line = primary.line
            if line is not None and not line.broken and line.confirmed >= since:
                return True
            if await self._confirmed(primary, until):
                return True
            asked = primary.asked
            if asked is not None and not asked.over and time.monotonic() - asked.sent < self._lease:
                # Its answer may still come, and then confirms.
                raise _NotHad("no answer yet")
            greeted = await self._open(primary, until)
            kept = primary.link
            if kept is not None and not kept.over:
                kept.drain()
                if primary.asked is not None and primary.asked.over:
                    # It was slow, and has caught up while the new one came: no message was missed.
                    _close(greeted.link)
                    return await self._confirmed(primary, until)
                self._end(primary, kept, "does not answer any more")
            self._install(primary, greeted)
            if not await self._confirmed(primary, until):
                raise _NotHad("no answer yet")
            return True
        except (_NotHad, StoreUnavailable, OSError, UnicodeError) as error:
            self._pause(primary, lasting=isinstance(error, _NotHad) and error.lasting)
            return False
        finally:
            primary.busy.release()

    async def _confirmed(self, primary: _Primary, until: float) -> bool:
        """Ask over the connection there is. False without another word when there is none, or one that is stuck."""
        for _ in range(2):
            link = primary.link
            if link is None or not self._is_usable(link):
                return False
            link.drain()
            question = self._ask(primary, until)
            if question is None or time.monotonic() - question.sent >= self._lease:
                # What it could confirm is over. A new connection is tried beside it.
                return False
            if not await link.settled(question, until):
                return False
            line = primary.line
            if line is not None and line.is_fresh(self._now()):
                primary.failures, primary.not_before = 0, NEVER
                return True
        return False

    def _is_usable(self, link: Link) -> bool:
        return not link.over and (not isinstance(link, SuspendingLink) or link.loop is asyncio.get_running_loop())

    def _pause(self, primary: _Primary, *, lasting: bool = False) -> None:
        primary.failures = min(primary.failures + 1, 16)
        longest = _UNAVAILABLE_SECONDS if lasting else _LONGEST_PAUSE_SECONDS
        seconds = longest if lasting else min(longest, _FIRST_PAUSE_SECONDS * 2 ** (primary.failures - 1))
        # From half to all of it, so that a hundred processes do not come back at once.
        jitter = self._options.system.random(1)[0] / 255
        primary.not_before = self._now() + seconds * (1 + jitter) / 2

    # -- connecting --------------------------------------------------------------------------------------------------

    async def _open(self, primary: _Primary, until: float) -> _Greeted:
        """A new connection that brings messages. Raises: _NotHad, StoreUnavailable, OSError."""
        address = primary.key or await self._dispatcher.primary(0, until)
        link = self._new_link(address)
        primary.opening = link
        greeted: _Greeted | None = None
        try:
            await link.open(until)
            question = link.ask(self._greeting(), None, until)
            if not await link.settled(question, until):
                raise _NotHad(f"{link.name}: no greeting in time")
            greeted = self._judge(link, question.answers)
            return greeted
        finally:
            primary.opening = None
            if greeted is None:
                self._dispatcher.doubt(address)
                _close(link)

    def _new_link(self, address: Address) -> Link:
        if self._target.tls is not None and self._context is None:
            self._context = _context_of(self._target.tls)
        if self._suspends:
            return SuspendingLink(address, self._context, self, patience=self._bound)
        return BlockingLink(address, self._context, self)

    def _greeting(self) -> list[Sequence[Word]]:
        who, hello = self._target.credentials, ["HELLO", "3"]
        if who.password is not None:
            hello += ["AUTH", who.username or "default", who.password]
        words: list[Sequence[Word]] = [hello]
        if self._target.database:
            words.append(("SELECT", self._target.database))
        prefixes = ("PREFIX", self._sessions, "PREFIX", self._cuts)
        words += [("CLIENT", "TRACKING", "ON", "BCAST", *prefixes), ("INFO", "server"), ("INFO", "replication")]
        if self._spread:
            words.append(("CLUSTER", "NODES"))
        return words

    def _judge(self, link: Link, answers: Sequence[Answer]) -> _Greeted:
        """What a server said of itself. Raises: _NotHad."""
        refused = next((each for each in answers if isinstance(each, Refusal)), None)
        if refused is not None:
            text = self._clean(refused)
            # Anything else, loading, a wrong password, too many clients, is no trait of the server.
            lasting = text.startswith(("ERR", "NOPERM", "NOPROTO")) and "max number of clients" not in text
            self._say_once(f"{link.name}: {text}", loudly=lasting)
            raise _NotHad(text, lasting=lasting)
        count = 2 if self._spread else 1
        server, replication = (_fields(each) for each in answers[-count - 1 :][:2])
        if replication.get(b"role") != b"master" or b"run_id" not in server:
            raise _NotHad(f"{link.name} is no primary")
        shown: tuple[bytes, ...] = ()
        if self._spread:
            own = _own_slots(answers[-1])
            if own is None or not _slots_of(own):
                raise _NotHad(f"{link.name} serves no slot")
            shown = own
        source = server[b"run_id"] + b"/" + replication.get(b"master_replid", b"")
        return _Greeted(link=link, source=source.decode("ascii", "replace"), shown=shown)

    def _install(self, primary: _Primary, greeted: _Greeted) -> None:
        """Make a line of a new connection. Raises: _NotHad when it is not wanted any more."""
        link = greeted.link
        if self._sources.get(link.address) != greeted.source:
            # Another server answers there than before: what the others still hold open leads to the old one.
            self._sources[link.address] = greeted.source
            self._dispatcher.forget(link.address)
        with self._mutex:
            wanted = self._primaries.get(primary.key) is primary
            wanted = wanted and (not self._suspends or self._home is _running_loop())
            if wanted:
                primary.link, primary.asked, primary.clock = link, None, None
                primary.line = Line(self._lease, source=greeted.source)
                self._take_slots(primary, greeted.shown)
                self._remap()
        if not wanted:
            _close(link)
            raise _NotHad("let go meanwhile")
        if link.over:
            self._end(primary, link, "ended at once")

    def _take_slots(self, primary: _Primary, shown: tuple[bytes, ...]) -> None:
        primary.shown = shown
        primary.slots = _slots_of(shown)
        primary.beat_key = f"{self._options.namespace}:beat"
        if primary.slots:
            number = 0
            while slot_of(f"{number:x}") not in primary.slots:
                number += 1
            primary.beat_key += f":{{{number:x}}}"

    def _remap(self) -> None:
        """Whose line speaks for a slot. Under the mutex."""
        primaries = list(self._primaries.values())
        self._wires = tuple(
            each.link for each in primaries if isinstance(each.link, BlockingLink) and not each.link.over
        )
        if not self._spread:
            return
        known: list[_Primary | None] = [None] * SLOTS
        contested: set[int] = set()
        for primary in primaries:
            if primary.line is None or primary.line.broken:
                continue
            for slot in primary.slots:
                if known[slot] is not None:
                    contested.add(slot)
                known[slot] = primary
        # Two nodes claim it: one of them does not know yet that it lost it, and nobody here can tell which.
        for slot in contested:
            known[slot] = None
        self._map = known

    # -- the heartbeat -----------------------------------------------------------------------------------------------

    def _ask(self, primary: _Primary, until: float) -> Question | None:
        """Send a heartbeat, unless one is on its way: then that one."""
        link, asked = primary.link, primary.asked
        if link is None or link.over:
            return None
        if asked is not None and not asked.over:
            return asked
        words: list[Sequence[Word]] = [("DEL", primary.beat_key), ("TIME",)]
        if self._spread:
            words.append(("CLUSTER", "NODES"))
        primary.asked = link.ask(words, partial(self._heard, primary, link, self._now()), until)
        return primary.asked

    def _heard(self, primary: _Primary, link: Link, sent: float, answers: Sequence[Answer]) -> None:
        """A heartbeat was answered, and everything before its answer has been told."""
        line = primary.line
        if primary.link is not link or line is None:
            return
        refused = next((each for each in answers if isinstance(each, Refusal)), None)
        if refused is not None:
            self._end(primary, link, self._clean(refused))
            return
        clock = self._clock(answers[1], sent)
        own = _own_slots(answers[2]) if self._spread else ()
        if clock is None or own is None or not isinstance(answers[0], int):
            self._end(primary, link, "its heartbeat was answered strangely", garbled=True)
            return
        before, primary.clock = primary.clock, clock
        if before is not None and _is_step(before, clock):
            self._end(primary, link, "its clock was stepped")
            return
        if own != primary.shown:
            if not _slots_of(own):
                self._end(primary, link, "it serves no slot any more")
                return
            line.cut()
            # A read under the new line is later than this answer, so the answer may confirm it.
            line = Line(self._lease, source=line.source)
            with self._mutex:
                primary.line = line
                self._take_slots(primary, own)
                self._remap()
            self._dispatcher.doubt(link.address)
        line.confirm(sent)

    def _clock(self, answer: Answer, sent: float) -> tuple[float, float] | None:
        """Between which two values the server's clock, less ours, must be."""
        match answer:
            case [bytes(seconds), bytes(rest)] if seconds.isdigit() and rest.isdigit():
                offset = self._options.clock_offset_us() / SECOND_US
                server = int(seconds) + int(rest) / SECOND_US + offset
                return server - self._now(), server - sent
            case _:
                return None

    def _end(self, primary: _Primary, link: Link, reason: str, *, garbled: bool = False) -> None:
        """Cut the line of this connection and let go of it."""
        with self._mutex:
            if primary.link is not link:
                return
            line, primary.link, primary.asked = primary.line, None, None
            if line is not None:
                line.cut()
            self._remap()
        if garbled:
            self._listener.emptied()
        self._dispatcher.doubt(link.address)
        _close(link)
        if line is not None and line.confirmed > NEVER:
            log.info("coatcheck: sessions at %s are read again: %s", link.name, reason)

    # -- told by the link --------------------------------------------------------------------------------------------

    def told(self, link: Link, message: list[object]) -> bool:
        """See `link.Hearer`."""
        match message:
            case [b"invalidate", None]:
                self._listener.emptied()
                return True
            case [b"invalidate", [*keys]]:
                return all(isinstance(key, bytes) and self._tell(key) for key in keys)
            case _:
                return False

    def _tell(self, key: bytes) -> bool:
        if key.startswith(self._sessions):
            session = _SESSION.fullmatch(key, len(self._sessions))
            if session is not None:
                self._listener.changed(session[1].decode("ascii"))
            return session is not None
        cut = _CUT.fullmatch(key, len(self._cuts)) if key.startswith(self._cuts) else None
        if cut is not None:
            self._listener.cut_off(int(cut[1], 16))
        return cut is not None

    def ended(self, link: Link, reason: str, *, garbled: bool) -> None:
        """See `link.Hearer`."""
        for primary in list(self._primaries.values()):
            if primary.link is link:
                self._end(primary, link, reason, garbled=garbled)
                return
        if garbled:
            self._listener.emptied()

    # -- texts and forks ---------------------------------------------------------------------------------------------

    def _say_once(self, text: str, *, loudly: bool) -> None:
        if loudly and self._said is None:
            self._said = text
            log.error("coatcheck: no near copies, every check reads the store: %s", text)

    def _clean(self, refused: Exception) -> str:
        # Servers that do not know a command repeat it, password included.
        text = " ".join(str(refused).split())[:300]
        password = self._target.credentials.password
        return text.replace(password, "***") if password else text

    def forked(self) -> None:
        """In the child of a fork: the connections are the parent's."""
        left = list(self._primaries.values())
        self._begin()
        for primary in left:
            if primary.line is not None:
                primary.line.cut()
            for link in (primary.link, primary.opening):
                if link is not None:
                    link.abandon()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Greeted:
    """A connection that brings messages, which server it leads to, and on a Cluster which slots that shows."""

    link: Link
    source: str
    shown: tuple[bytes, ...]


class _Here(threading.local):
    """One thread's own poll object: a poll object is not for several at once."""

    wires: tuple[BlockingLink, ...] = ()
    ready: Callable[[int], object] = bool

    def watch(self, wires: tuple[BlockingLink, ...]) -> None:
        """Look at these connections from now on."""
        descriptors = [wire.descriptor for wire in wires if wire.descriptor >= 0]
        if hasattr(select, "poll"):
            look = select.poll()
            for descriptor in descriptors:
                look.register(descriptor, select.POLLIN)
            self.ready = look.poll
        else:
            self.ready = lambda wait: descriptors and select.select(descriptors, [], [], wait)[0]
        self.wires = wires


def _close(link: Link) -> None:
    """Close a connection, in its own event loop."""
    if not isinstance(link, SuspendingLink) or link.loop is _running_loop():
        link.close()
        return
    link.over = True
    try:
        link.loop.call_soon_threadsafe(link.close)
    except RuntimeError:
        # The loop is closed: its transports cannot be used any more, but the descriptor need not stay.
        link.abandon()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _context_of(tls: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.get("ssl_ca_certs"))
    certificate = tls.get("ssl_certfile")
    if certificate is not None:
        context.load_cert_chain(certificate, tls.get("ssl_keyfile"))
    return context


def _is_step(before: tuple[float, float], now: tuple[float, float]) -> bool:
    return now[0] - before[1] > CLOCK_STEP_SECONDS or before[0] - now[1] > CLOCK_STEP_SECONDS


def _fields(answer: Answer) -> dict[bytes, bytes]:
    """The `name:value` lines of INFO."""
    if not isinstance(answer, bytes):
        return {}
    pairs = (line.partition(b":") for line in answer.splitlines())
    return {name: value for name, colon, value in pairs if colon}


def _own_slots(answer: Answer) -> tuple[bytes, ...] | None:
    """What CLUSTER NODES says of the node itself: its slots and those on their way; nothing when it is no primary."""
    if not isinstance(answer, bytes):
        return None
    for row in answer.splitlines():
        words = row.split()
        if len(words) < 8 or b"myself" not in words[2].split(b","):
            continue
        if b"master" not in words[2].split(b","):
            return ()
        shown = tuple(words[8:])
        return shown if all(_SLOTS.fullmatch(word) for word in shown) else None
    return None


def _slots_of(shown: Sequence[bytes]) -> frozenset[int]:
    """The slots in `5 7-9 [8->-node]`, without those on their way."""
    slots: set[int] = set()
    moving: set[int] = set()
    for word in shown:
        if word.startswith(b"["):
            moving.add(int(word[1:].partition(b"-")[0]))
        else:
            first, _, last = word.partition(b"-")
            slots.update(range(int(first), min(int(last or first) + 1, SLOTS)))
    return frozenset(slots - moving)


_feeds: Final[WeakSet[RedisFeed]] = WeakSet()


def _in_child() -> None:
    for feed in list(_feeds):
        feed.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
