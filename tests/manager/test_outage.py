"""The store goes away with the line of its feed, and comes back: what each policy lets a session do meanwhile.

A node here is a face over a store that can be taken away as a whole. Its feed is moved by hand: when the store goes,
the line is cut, or it stays as it is and is never confirmed again. Time is turned; upkeep runs when a test calls it.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from inspect import isawaitable
from pathlib import Path
from typing import Any, Literal, cast

import pytest

from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    Coatcheck,
    ConfigurationError,
    Session,
    SessionEnded,
    SessionFilter,
    SessionGone,
    Settings,
    StoreUnavailable,
    TokenInvalid,
    TokenSettings,
)
from coatcheck.core.freshness import Line
from coatcheck.core.ports import Colour, Feed, Listener, SessionStore
from coatcheck.engine import TICKS_TO_UPKEEP
from coatcheck.places import ClientPlace
from coatcheck.session import ClearCookie, ClearRefresh, SendCookie, SendRefresh
from coatcheck.settings import reach_of, settings_from_env
from coatcheck.stores.open import open_store
from coatcheck.testing import CapturedEvents, FakeSystem

pytestmark = pytest.mark.anyio

Silence = Literal["cut", "frozen"]
LEASE = 1.0
GRACE = 60.0
STEP = 1 / 64
"""A step of time that both clocks can tell exactly."""
PUBLIC_URL = "https://app.example"
TOKENS = TokenSettings()


class HandFeed:
    """A feed whose line comes, is confirmed and breaks when the test says so."""

    def __init__(self, system: FakeSystem, listener: Listener, lease: float) -> None:
        self.system, self.listener, self.lease = system, listener, lease
        self.up = True
        self.current: Line | None = None
        self.inbox: list[Callable[[], None]] = []
        """What was told while nobody could hear it."""

    def line(self, tag: int) -> Line | None:
        return None if self.current is None or self.current.broken else self.current

    def slot(self, tag: int) -> int:
        return 0

    def drain(self) -> None:
        """Nothing arrives by itself."""

    async def renew(self, tag: int) -> Line | None:
        if not self.up:
            return None
        inbox, self.inbox = self.inbox, []
        for message in inbox:
            message()
        if self.line(tag) is None:
            self.current = Line(self.lease, source="a store")
        assert self.current is not None
        self.current.confirm(self.system.elapsed())
        return self.current

    async def beat(self) -> None:
        await self.renew(0)

    async def close(self) -> None:
        self.cut()

    def cut(self) -> None:
        # What was on its way is lost with the connection.
        self.inbox = []
        if self.current is not None:
            self.current.cut()


class Removable:
    """A store that counts what it is asked, and can be taken away together with its feed."""

    def __init__(self, inner: object, system: FakeSystem) -> None:
        self.inner, self.system = inner, system
        self.away = False
        self.verbs: list[str] = []
        self.fed: HandFeed | None = None
        self.before: Callable[[str], object] = lambda verb: None
        """Called with each verb before it is done; awaited if need be."""

    def __getattr__(self, name: str) -> Any:
        found: Any = getattr(self.inner, name)
        if not callable(found) or name == "peek":
            return found

        async def verb(*args: Any, **kwargs: Any) -> Any:
            hook = self.before(name)
            if isawaitable(hook):
                await hook
            self.verbs.append(name)
            if self.away:
                raise StoreUnavailable("the test took the store away")
            answer: Any = found(*args, **kwargs)
            return await answer

        return verb

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        self.fed = HandFeed(self.system, listener, lease)
        return self.fed

    async def close(self) -> None:
        """Other nodes may still use what is behind."""

    def take_away(self, silence: Silence = "cut") -> None:
        self.away = True
        if self.fed is not None:
            self.fed.up = False
            if silence == "cut":
                self.fed.cut()

    def bring_back(self) -> None:
        self.away = False
        if self.fed is not None:
            self.fed.up = True


class NoKeeper:
    """Upkeep runs when a test calls it."""

    def poke(self) -> None:
        """Somebody would like it to run."""

    async def stop(self) -> None:
        """It never ran."""


class Node:
    """One process: a face in either colour over its own way to the store."""

    def __init__(self, colour: Colour, inner: object, system: FakeSystem, settings: Settings) -> None:
        self.system = system
        self.events = CapturedEvents()
        self.store = Removable(inner, system)
        kind = AsyncCoatcheck if colour == "async" else Coatcheck
        self.coat: Coatcheck | AsyncCoatcheck = kind(
            cast(SessionStore, self.store), settings=settings, on_event=self.events, system=system
        )
        self.coat._keeper = NoKeeper()

    @property
    def feed(self) -> HandFeed:
        assert self.store.fed is not None
        return self.store.fed

    async def do(self, result: Any) -> Any:
        return await result if isawaitable(result) else result

    async def sign_in(self, subject: str = "ann") -> str:
        """The cookie of somebody who has just signed in; no copy of the session is kept yet."""
        session = self.coat.session(None)
        await self.do(session.login(subject, claims={"role": "admin"}))
        return id_of(session)

    async def load(self, cookie: str | None, **more: Any) -> Session | AsyncSession:
        session = self.session(cookie, **more)
        await self.do(session.load())
        return session

    def session(self, cookie: str | None, **more: Any) -> Session | AsyncSession:
        """A session as the gateways make it."""
        kind = AsyncSession if isinstance(self.coat, AsyncCoatcheck) else Session
        presented = None if cookie is None else cookie.encode()
        return kind(self.coat.engine, presented, ClientPlace, **more)

    async def warm(self, subject: str = "ann") -> str:
        """A cookie whose session this node knows."""
        cookie = await self.sign_in(subject)
        assert (await self.load(cookie)).subject == subject
        return cookie

    async def is_served(self, cookie: str) -> bool:
        """Whether a request with this cookie is signed in; False: it is told to come back."""
        try:
            session = await self.load(cookie)
        except StoreUnavailable:
            return False
        assert session.cookie_action is None
        return session.is_signed_in

    async def sign_out(self, cookie: str) -> Session | AsyncSession:
        session = self.session(cookie)
        await self.do(session.logout())
        return session

    def has_work(self) -> bool:
        """Whether its upkeep would do something."""
        return self.coat.engine.has_work

    async def refuses(self, act: Callable[[], Any]) -> None:
        with pytest.raises(StoreUnavailable):
            await self.do(act())


MakeNode = Callable[..., Node]


def id_of(session: Session | AsyncSession) -> str:
    """The text the browser would get."""
    assert isinstance(session.cookie_action, SendCookie)
    return session.cookie_action.id.text


def handle_of(cookie: str) -> str:
    """Where a session lives: the part of an id that is no secret."""
    return cookie[4:20]


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    """Both colours."""
    return cast(Colour, request.param)


@pytest.fixture(params=["memory", "sqlite"])
async def make_node(request: pytest.FixtureRequest, colour: Colour, tmp_path: Path) -> AsyncIterator[MakeNode]:
    """`make_node(outage="near")`: nodes over one store, on one clock."""
    url = "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'sessions.db'}"
    system = FakeSystem()
    inner = open_store(url, colour=colour, system=system)
    made: list[Node] = []

    def make(**changes: Any) -> Node:
        chosen: dict[str, Any] = {"server_key": b"k" * 32, "public_url": PUBLIC_URL, **changes}
        made.append(Node(colour, inner, system, Settings(**chosen)))
        return made[-1]

    yield make
    for node in made:
        node.store.bring_back()
        await node.do(node.coat.close())
    await inner.close()


@pytest.fixture(params=["cut", "frozen"])
def silence(request: pytest.FixtureRequest) -> Silence:
    """Whether the feed's line breaks with the store, or is merely never confirmed again."""
    return cast(Silence, request.param)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Where a node keeps sign-outs; it does not exist yet."""
    return tmp_path / "home" / "journal"


def file_of(journal: Path) -> Path:
    """The one file of a journal."""
    (path,) = journal.glob("*.db")
    return path


def kept(journal: Path) -> list[tuple[Any, ...]]:
    """What waits in a journal."""
    with closing(sqlite3.connect(file_of(journal))) as connection:
        return connection.execute("select handle, tag, reason, at_us from sign_outs order by at_us").fetchall()


def read(journal: Path) -> bytes:
    """Every octet of it."""
    return file_of(journal).read_bytes()


def is_private(journal: Path) -> bool:
    """Whether nobody else of this machine may look into it."""
    return not (journal.stat().st_mode | file_of(journal).stat().st_mode) & 0o077


def touch(journal: Path, statement: str, rows: Sequence[tuple[Any, ...]] = ((),)) -> None:
    """Change a journal behind its owner's back."""
    with closing(sqlite3.connect(file_of(journal))) as connection, connection:
        connection.executemany(statement, rows)


def was_never_used(journal: Path) -> bool:
    """Whether nothing was ever kept."""
    return not journal.exists()


def is_empty(journal: Path) -> bool:
    """Whether nothing waits."""
    return was_never_used(journal) or not kept(journal)


def block(journal: Path) -> None:
    """Put a file where the directory would be."""
    journal.parent.mkdir(parents=True)
    journal.write_text("in the way")


# -- refuse --------------------------------------------------------------------------------------------------------


async def test_refuse_signs_nobody_out(make_node: MakeNode, silence: Silence) -> None:
    node = make_node()
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = node.session(cookie)
    await node.refuses(session.load)
    assert (session.cookie_action, session.refresh_action) == (None, None)
    assert isinstance(session.store_failure, StoreUnavailable)
    node.store.bring_back()
    again = await node.load(cookie)
    assert (again.subject, again.through_outage, again.cookie_action) == ("ann", False, None)


async def test_within_the_lease_an_outage_is_not_noticed_unless_the_line_broke(make_node: MakeNode) -> None:
    node = make_node()
    cookie = await node.warm()
    node.store.take_away("frozen")
    node.system.advance(LEASE - STEP)
    assert (await node.load(cookie)).through_outage is False
    node.system.advance(STEP)
    assert not await node.is_served(cookie)


async def test_a_session_that_nobody_touches_asks_nothing(make_node: MakeNode, silence: Silence) -> None:
    node = make_node()
    cookie = await node.sign_in()
    node.store.take_away(silence)
    node.store.verbs.clear()
    session = node.session(cookie)
    await session.finish()
    await session.abandon()
    assert (node.store.verbs, session.accessed, session.is_quiet) == ([], False, True)


async def test_whoever_has_no_cookie_needs_no_store_to_be_nobody(make_node: MakeNode) -> None:
    node = make_node()
    await node.sign_in()
    node.store.take_away()
    assert (await node.load(None)).is_signed_in is False
    assert (await node.load("no id of ours")).is_signed_in is False


# -- near ----------------------------------------------------------------------------------------------------------


async def test_near_serves_until_lease_and_grace_are_over_and_not_an_instant_longer(
    make_node: MakeNode, silence: Silence
) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    for _ in range(3):
        session = await node.load(cookie)
        assert (session.subject, session.through_outage, session.cookie_action) == ("ann", True, None)
        assert session.claims == {"role": "admin"}
    node.system.advance(GRACE - STEP)
    assert (await node.load(cookie)).through_outage is True
    node.system.advance(STEP)
    assert not await node.is_served(cookie)


async def test_the_grace_counts_from_the_last_answered_heartbeat(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.system.advance(10.0)
    await node.feed.beat()
    node.system.advance(0.5)
    node.store.take_away(silence)
    node.system.advance(LEASE + GRACE - 0.5 - STEP)
    assert await node.is_served(cookie)
    node.system.advance(STEP)
    assert not await node.is_served(cookie)


async def test_a_request_through_an_outage_does_not_prolong_it(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near", outage_grace=timedelta(seconds=5))
    cookie = await node.warm()
    node.store.take_away(silence)
    for _ in range(5):
        node.system.advance(1.0)
        assert await node.is_served(cookie)
        await node.feed.beat()
    node.system.advance(1.0)
    assert not await node.is_served(cookie)


async def test_a_cut_line_is_through_the_outage_at_once(make_node: MakeNode) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away("cut")
    assert (await node.load(cookie)).through_outage is True


@pytest.mark.parametrize(
    "changes",
    [
        {"idle_timeout": timedelta(seconds=20)},
        {"idle_timeout": timedelta(seconds=20), "absolute_timeout": timedelta(seconds=20)},
    ],
    ids=["idle", "absolute"],
)
async def test_near_never_goes_past_a_session_s_own_deadlines(
    make_node: MakeNode, silence: Silence, changes: dict[str, Any]
) -> None:
    node = make_node(outage="near", **changes)
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(10.0)
    # Its use cannot be written, so it does not live longer for it.
    assert await node.is_served(cookie)
    node.system.advance(10.0 - STEP)
    assert await node.is_served(cookie)
    node.system.advance(STEP)
    assert not await node.is_served(cookie)


async def test_near_keeps_to_today_s_limits_when_they_are_stricter(make_node: MakeNode, silence: Silence) -> None:
    loose, strict = make_node(), make_node(outage="near", idle_timeout=timedelta(seconds=20))
    cookie = await loose.sign_in()
    assert await strict.is_served(cookie)
    strict.store.take_away(silence)
    strict.system.advance(20.0 - STEP)
    assert await strict.is_served(cookie)
    strict.system.advance(STEP)
    assert not await strict.is_served(cookie)


async def test_near_serves_nobody_whom_this_node_has_not_met(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.sign_in()
    node.store.take_away(silence)
    assert not await node.is_served(cookie)


async def test_near_serves_no_other_secret_than_the_one_it_has_read(make_node: MakeNode, silence: Silence) -> None:
    """A rotated id is genuine and names the same session; the copy is of another one."""
    node = make_node(outage="near", rotation_alias=timedelta(0))
    old = await node.warm()
    session = await node.load(old)
    await node.do(session.rotate())
    new = id_of(session)
    assert (await node.load(new)).subject == "ann"
    node.store.take_away(silence)
    node.system.advance(LEASE)
    assert await node.is_served(new)
    assert not await node.is_served(old)


async def test_a_void_line_serves_no_outage(make_node: MakeNode) -> None:
    """FLUSHDB, a store that lost its data: what was learned may be wrong altogether."""
    node = make_node(outage="near")
    cookie = await node.warm()
    assert node.feed.current is not None
    node.feed.current.void()
    node.store.take_away()
    assert not await node.is_served(cookie)


async def test_what_was_emptied_serves_no_outage(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.feed.listener.emptied()
    node.store.take_away(silence)
    assert not await node.is_served(cookie)


async def test_what_the_feed_told_before_the_outage_counts_in_it(make_node: MakeNode, silence: Silence) -> None:
    node, other = make_node(outage="near"), make_node()
    cookie, mate = await node.warm("ann"), await node.warm("bob")
    session = await other.load(cookie)
    await node.do(other.coat.revoke_session(str(session.sid), reason="admin"))
    node.feed.listener.changed(handle_of(cookie))
    node.store.take_away(silence)
    node.system.advance(LEASE)
    assert not await node.is_served(cookie)
    assert await node.is_served(mate)


async def test_a_revoke_that_this_node_tried_in_vain_is_refused_here_all_the_same(
    make_node: MakeNode, silence: Silence, journal: Path
) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    sid = str((await node.load(cookie)).sid)
    node.store.take_away(silence)
    await node.refuses(lambda: node.coat.revoke_session(sid, reason="admin"))
    assert not await node.is_served(cookie)


async def test_a_recheck_asks_the_store_and_refuses_without_it(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = await node.load(cookie)
    assert session.through_outage
    await node.refuses(session.recheck)
    assert await node.is_served(cookie), "one careful page must not end the others"


async def test_a_recheck_hears_what_the_lease_still_hides(make_node: MakeNode) -> None:
    node, other = make_node(outage="near"), make_node()
    cookie = await node.warm()
    session = await node.load(cookie)
    await node.do(other.coat.revoke_session(str(session.sid), reason="admin"))
    assert await node.is_served(cookie), "nobody has told this node, and its lease has not run out"
    with pytest.raises(SessionGone):
        await node.do(session.recheck())
    assert not (await node.load(cookie)).is_signed_in, "now it knows"


async def test_writing_a_field_through_an_outage_is_refused(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away(silence)
    session = await node.load(cookie)
    session["cart"] = 1
    await node.refuses(session.commit)
    assert session.cookie_action is None


async def test_signing_in_through_an_outage_is_refused(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away(silence)
    session = await node.load(cookie)
    await node.refuses(lambda: session.login("bob"))
    assert session.cookie_action is None


async def test_an_outage_is_told_once_a_second_and_not_for_every_request(make_node: MakeNode) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away()
    node.system.advance(LEASE)
    for _ in range(5):
        await node.load(cookie)
    (told,) = node.events.of("store.unavailable")
    assert told.data == {"policy": "near"}
    node.system.advance(1.0)
    await node.load(cookie)
    assert len(node.events.of("store.unavailable")) == 2


# -- recovery ------------------------------------------------------------------------------------------------------


async def test_after_recovery_a_copy_of_the_broken_line_is_read_again(make_node: MakeNode) -> None:
    node = make_node(outage="near")
    cookie = await node.warm()
    node.store.take_away("cut")
    assert (await node.load(cookie)).through_outage
    node.store.bring_back()
    await node.feed.beat()
    node.store.verbs.clear()
    session = await node.load(cookie)
    assert (session.subject, session.through_outage) == ("ann", False)
    assert node.store.verbs == ["load"]


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_what_was_ended_elsewhere_meanwhile_is_refused_from_the_first_request_on(
    make_node: MakeNode, silence: Silence, outage: str
) -> None:
    node, other = make_node(outage=outage), make_node()
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(2.0)
    session = await other.load(cookie)
    await node.do(other.coat.revoke_session(str(session.sid), reason="admin"))
    if silence == "frozen":
        node.feed.inbox.append(lambda: node.feed.listener.changed(handle_of(cookie)))
    node.store.bring_back()
    after = await node.load(cookie)
    assert after.is_signed_in is False
    assert after.ended is not None
    assert after.ended.reason == "admin"


async def test_a_second_outage_serves_nothing_that_was_not_read_since_the_first(make_node: MakeNode) -> None:
    """The message of a revoke was lost with the first line: only a new read can tell."""
    node = make_node(outage="near")
    cookie, mate = await node.warm("ann"), await node.warm("bob")
    node.store.take_away("cut")
    node.system.advance(1.0)
    node.store.bring_back()
    assert (await node.load(mate)).through_outage is False
    node.store.take_away("cut")
    assert await node.is_served(mate)
    assert not await node.is_served(cookie)


async def test_after_recovery_warm_requests_ask_nothing_again(
    make_node: MakeNode, silence: Silence, journal: Path
) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    assert await node.is_served(cookie)
    node.store.bring_back()
    assert await node.is_served(cookie)
    node.store.verbs.clear()
    for _ in range(3):
        assert (await node.load(cookie)).through_outage is False
    assert node.store.verbs == []


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_while_the_feed_is_heard_a_store_that_answers_no_command_signs_nobody_out(
    make_node: MakeNode, outage: str
) -> None:
    node = make_node(outage=outage)
    cookie, unmet = await node.warm("ann"), await node.sign_in("bob")
    node.store.away = True
    for _ in range(5):
        node.system.advance(LEASE - STEP)
        await node.feed.beat()
        session = await node.load(cookie)
        assert (session.subject, session.through_outage) == ("ann", False)
        # A failure in between changes nothing for those who are known.
        with suppress(StoreUnavailable):
            assert not (await node.load(unmet)).is_signed_in


async def test_while_the_feed_is_lost_every_request_asks_the_store_and_hears_the_truth(
    make_node: MakeNode, silence: Silence
) -> None:
    node, other = make_node(outage="near"), make_node()
    cookie = await node.warm()
    node.store.take_away(silence)
    node.store.away = False
    node.system.advance(LEASE)
    for _ in range(2):
        node.store.verbs.clear()
        assert (await node.load(cookie)).through_outage is False
        assert node.store.verbs == ["load"]
    session = await other.load(cookie)
    await node.do(other.coat.revoke_session(str(session.sid), reason="admin"))
    assert not (await node.load(cookie)).is_signed_in


# -- anonymous -----------------------------------------------------------------------------------------------------


async def test_anonymous_means_that_nobody_is_signed_in(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = await node.load(cookie)
    assert (session.is_signed_in, session.subject, session.sid, session.ended) == (False, None, None, None)
    assert (dict(session), session.through_outage, session.cookie_action) == ({}, False, None)
    await session.finish()
    assert session.cookie_action is None
    node.store.bring_back()
    assert (await node.load(cookie)).subject == "ann"


async def test_anonymous_keeps_no_field(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = await node.load(cookie)
    session["cart"] = 1
    await node.refuses(session.commit)
    node.store.bring_back()
    # Nor when it is back a moment later: the browser has a session, which a new one must not push out.
    await node.refuses(session.commit)
    assert session.cookie_action is None


async def test_anonymous_signs_nobody_in(make_node: MakeNode, silence: Silence) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = await node.load(cookie)
    await node.refuses(lambda: session.login("bob"))
    assert (session.cookie_action, session.is_signed_in) == (None, False)


async def test_a_store_that_comes_back_during_a_sign_in_leaves_no_second_session_in_the_browser(
    make_node: MakeNode,
) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm("ann")
    node.store.take_away()
    session = await node.load(cookie)
    node.store.bring_back()
    try:
        await node.do(session.login("bob"))
    except StoreUnavailable:
        assert session.cookie_action is None
    else:
        assert not (await node.load(cookie)).is_signed_in


async def test_a_recheck_of_nobody_in_an_outage_says_that_the_store_is_away(make_node: MakeNode) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm()
    node.store.take_away()
    session = await node.load(cookie)
    await node.refuses(session.recheck)


async def test_anonymous_is_told_as_well(make_node: MakeNode) -> None:
    node = make_node(outage="anonymous")
    cookie = await node.warm()
    node.store.take_away()
    await node.load(cookie)
    (told,) = node.events.of("store.unavailable")
    assert told.data == {"policy": "anonymous"}


# -- signing out while the store is away -----------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_a_sign_out_is_kept_and_holds_here_at_once(
    make_node: MakeNode, silence: Silence, outage: str, journal: Path
) -> None:
    node = make_node(outage=outage, journal=journal)
    cookie = await node.warm()
    node.store.take_away(silence)
    node.system.advance(LEASE)
    session = await node.sign_out(cookie)
    assert session.logout_pending
    assert isinstance(session.cookie_action, ClearCookie)
    for _ in range(2):
        later = await node.load(cookie)
        assert (later.is_signed_in, later.cookie_action) == (False, None)
        assert later.ended is not None
        assert later.ended.reason == "logout"
        with pytest.raises(SessionEnded):
            later.require_login()
    assert len(node.events.of("session.sign_out_kept")) == 1


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_after_a_kept_sign_out_the_request_goes_on_as_nobody(
    make_node: MakeNode, outage: str, journal: Path
) -> None:
    node = make_node(outage=outage, journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    session = await node.sign_out(cookie)
    assert (session.is_signed_in, session.subject, session.store_failure) == (False, None, None)
    await session.finish()
    assert isinstance(session.cookie_action, ClearCookie)


async def test_a_sign_out_within_the_lease_is_kept_too(make_node: MakeNode, journal: Path) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    node.store.take_away("frozen")
    session = await node.sign_out(cookie)
    assert session.logout_pending
    assert (await node.load(cookie)).is_signed_in is False


async def test_the_journal_holds_no_credential(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal)
    cookie = await node.warm("a subject with a name")
    node.store.take_away()
    await node.sign_out(cookie)
    ((handle, _, reason, _),) = kept(journal)
    assert (handle, reason) == (handle_of(cookie), "logout")
    raw = read(journal)
    digest = sha256(cookie.encode())
    for secret in (cookie.encode(), cookie[20:52].encode(), digest.digest(), digest.hexdigest().encode()):
        assert secret not in raw
    assert b"a subject with a name" not in raw
    assert is_private(journal)


async def test_events_and_logs_of_a_kept_sign_out_hold_no_secret(
    make_node: MakeNode, journal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    node.system.advance(LEASE)
    await node.load(cookie)
    await node.sign_out(cookie)
    await node.refuses(node.coat.engine.maintain)
    node.store.bring_back()
    await node.coat.engine.maintain()
    told = caplog.text + json.dumps([each.envelope() for each in node.events.all])
    told += repr([record.__dict__ for record in caplog.records])
    assert cookie not in told
    assert cookie[20:52] not in told
    assert "session.sign_out_kept" in told


async def test_a_kept_sign_out_is_carried_out_when_the_store_is_back(make_node: MakeNode, journal: Path) -> None:
    node, other = make_node(journal=journal), make_node()
    cookie = await node.warm()
    node.store.take_away()
    await node.sign_out(cookie)
    await node.refuses(node.coat.engine.maintain)
    assert node.has_work()
    node.store.bring_back()
    await node.coat.engine.maintain()
    assert kept(journal) == []
    assert not node.has_work()
    seen = await other.load(cookie)
    assert seen.ended is not None
    assert seen.ended.reason == "logout"


async def test_the_first_request_after_recovery_waits_for_the_kept_sign_outs(
    make_node: MakeNode, journal: Path
) -> None:
    node = make_node(journal=journal)
    cookie, mate = await node.warm("ann"), await node.sign_in("bob")
    node.store.take_away()
    await node.sign_out(cookie)
    node.store.bring_back()
    node.store.verbs.clear()
    assert (await node.load(mate)).subject == "bob"
    assert node.store.verbs.index("revoke") < node.store.verbs.index("load")
    assert kept(journal) == []


async def test_a_new_process_carries_out_what_waits_before_it_answers_anything(
    make_node: MakeNode, journal: Path
) -> None:
    first = make_node(journal=journal)
    cookie = await first.warm()
    first.store.take_away()
    await first.sign_out(cookie)
    second = make_node(journal=journal)
    loaded = await second.load(cookie)
    assert loaded.ended is not None
    assert loaded.ended.reason == "logout"
    assert second.store.verbs.index("revoke") < second.store.verbs.index("load")
    assert kept(journal) == []


async def test_a_new_process_answers_nothing_while_it_cannot_carry_out_what_waits(
    make_node: MakeNode, journal: Path
) -> None:
    first = make_node(journal=journal)
    cookie, mate = await first.warm("ann"), await first.warm("bob")
    first.store.take_away()
    await first.sign_out(cookie)
    second = make_node(journal=journal, outage="near")

    def lose(verb: str) -> None:
        second.store.away = verb == "revoke"

    second.store.before = lose
    assert not await second.is_served(mate)
    await second.refuses(second.coat.engine.start)
    second.store.before = lambda verb: None
    second.store.away = False
    assert await second.is_served(mate)
    assert not (await second.load(cookie)).is_signed_in


@pytest.mark.parametrize("met", [True, False], ids=["met the outage", "did not"])
async def test_another_process_of_the_node_refuses_what_was_signed_out_in_the_outage(
    make_node: MakeNode, silence: Silence, met: bool, journal: Path
) -> None:
    mine, other = make_node(outage="near", journal=journal), make_node(outage="near", journal=journal)
    leaving, mate = [await mine.warm(name) for name in ("ann", "bob", "cid")], await mine.warm("dan")
    for cookie in (*leaving, mate):
        assert await other.is_served(cookie)
    for node in (mine, other):
        node.store.take_away(silence)
    mine.system.advance(LEASE)
    if met:
        assert await other.is_served(leaving[0])
    for cookie in leaving:
        await mine.sign_out(cookie)
    for cookie in reversed(leaving):
        assert not await other.is_served(cookie)
    assert await other.is_served(mate)


@pytest.mark.parametrize("met", ["the outage", "the sign-out", "nothing"])
async def test_a_sign_out_of_a_killed_process_holds_when_the_line_of_another_is_good_again(
    make_node: MakeNode, met: str, journal: Path
) -> None:
    """Whatever the other process was asked in the meantime."""
    mine, other = make_node(outage="near", journal=journal), make_node(outage="near", journal=journal)
    cookie = await mine.warm()
    assert await other.is_served(cookie)
    for node in (mine, other):
        node.store.take_away("frozen")
    mine.system.advance(LEASE)
    if met != "nothing":
        assert await other.is_served(cookie)
    await mine.sign_out(cookie)
    if met == "the sign-out":
        assert not await other.is_served(cookie)
    # `mine` is gone for good; a heartbeat of `other` is answered before anybody asks it anything.
    other.store.bring_back()
    if met == "nothing":
        for _ in range(TICKS_TO_UPKEEP):
            await other.coat.engine.tick()
    else:
        await other.feed.beat()
    assert not await other.is_served(cookie)
    assert kept(journal) == []


async def test_two_processes_carry_out_one_journal_and_both_come_to_rest(make_node: MakeNode, journal: Path) -> None:
    mine, other = make_node(journal=journal), make_node(journal=journal)
    cookie, mate = await mine.warm("ann"), await mine.warm("bob")
    await other.load(cookie)
    for node in (mine, other):
        node.store.take_away()
    await mine.sign_out(cookie)
    await other.sign_out(mate)
    for node in (other, mine):
        node.store.bring_back()
        await node.coat.engine.maintain()
    assert kept(journal) == []
    for node in (mine, other):
        assert not node.has_work()
        assert not (await node.load(cookie)).is_signed_in
        assert not (await node.load(mate)).is_signed_in


async def test_carrying_it_out_again_changes_nothing(make_node: MakeNode, journal: Path) -> None:
    """The process was killed after the store had it and before the journal knew."""
    node, other = make_node(journal=journal), make_node()
    cookie, mate = await node.warm("ann"), await node.warm("ann")
    node.store.take_away()
    await node.sign_out(cookie)
    raw = kept(journal)
    node.store.bring_back()
    await node.coat.engine.maintain()
    touch(journal, "insert into sign_outs values (?, ?, ?, ?)", raw)
    third = make_node(journal=journal)
    assert (await third.load(mate)).subject == "ann"
    assert kept(journal) == []
    assert not (await other.load(cookie)).is_signed_in


async def test_a_store_that_goes_again_half_way_is_not_asked_twice_for_what_it_has(
    make_node: MakeNode, journal: Path
) -> None:
    node = make_node(journal=journal)
    cookies = [await node.warm(name) for name in ("ann", "bob", "cid")]
    node.store.take_away()
    for cookie in cookies:
        await node.sign_out(cookie)
    node.store.bring_back()
    node.store.verbs.clear()

    def lose(verb: str) -> None:
        node.store.away = node.store.verbs.count("revoke") == 2

    node.store.before = lose
    await node.refuses(node.coat.engine.maintain)
    assert len(kept(journal)) == 1
    node.store.before = lambda verb: None
    node.store.away = False
    node.store.verbs.clear()
    await node.coat.engine.maintain()
    assert node.store.verbs.count("revoke") == 1
    assert kept(journal) == []
    for cookie in cookies:
        assert not (await node.load(cookie)).is_signed_in


async def test_a_request_that_is_being_read_while_somebody_signs_out_is_refused(
    make_node: MakeNode, journal: Path
) -> None:
    """The store had answered it, and went away before it could take the sign-out of another tab."""
    # Without near copies: the sign-out would wait for the read that it happens in.
    node = make_node(journal=journal, near_copies=0)
    cookie = await node.sign_in()

    async def leave(verb: str) -> None:
        if verb == "load":
            node.store.before = lambda verb: None
            node.store.away = True
            assert (await node.sign_out(cookie)).logout_pending
            node.store.away = False

    node.store.before = leave
    assert not (await node.load(cookie)).is_signed_in


async def test_signing_out_twice_in_an_outage_is_one_sign_out(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    for _ in range(2):
        session = await node.sign_out(cookie)
        assert isinstance(session.cookie_action, ClearCookie)
        assert session.logout_pending, "it does not hold everywhere yet"
    assert len(kept(journal)) == 1


async def test_a_sign_out_wins_over_a_commit_that_arrives_after_recovery(make_node: MakeNode, journal: Path) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    slow = await node.load(cookie)
    slow["cart"] = 1
    await node.sign_out(cookie)
    node.store.bring_back()
    with suppress(SessionGone):
        await node.do(slow.commit())
    await node.coat.engine.maintain()
    after = await node.load(cookie)
    assert (after.is_signed_in, dict(after)) == (False, {})


async def test_a_sign_out_wins_over_a_rotation_that_arrives_after_recovery(make_node: MakeNode, journal: Path) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    slow = await node.load(cookie)
    await node.sign_out(cookie)
    node.store.bring_back()
    with suppress(SessionGone):
        await node.do(slow.rotate())
    await node.coat.engine.maintain()
    assert not (await node.load(cookie)).is_signed_in
    if isinstance(slow.cookie_action, SendCookie):
        assert not (await node.load(id_of(slow))).is_signed_in


async def test_a_sign_out_beside_a_sign_in_that_the_outage_broke_ends_the_new_session(
    make_node: MakeNode, journal: Path
) -> None:
    node, other = make_node(journal=journal), make_node()
    session = node.session(None)
    await node.do(session.login("ann"))
    cookie = id_of(session)
    node.store.take_away()
    await node.do(session.logout())
    assert session.logout_pending
    assert isinstance(session.cookie_action, ClearCookie)
    node.store.bring_back()
    await node.coat.engine.maintain()
    assert not (await other.load(cookie)).is_signed_in


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_a_sign_out_ends_every_twin_of_the_cookie(make_node: MakeNode, outage: str, journal: Path) -> None:
    """Two cookies of one name: neither counts, and signing out means both (cookie tossing)."""
    node, other = make_node(outage=outage, journal=journal), make_node()
    cookie, mate = await node.warm("ann"), await node.sign_in("bob")
    node.store.take_away()
    session = node.session(None, aside=(cookie.encode(), mate.encode(), b"forged"))
    await node.do(session.logout())
    assert session.logout_pending
    node.store.bring_back()
    await node.coat.engine.maintain()
    assert not (await other.load(cookie)).is_signed_in
    assert not (await other.load(mate)).is_signed_in


async def test_forged_credentials_are_never_kept(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal, tokens=TOKENS)
    cookie = await node.warm()
    node.store.take_away()
    altered = ("A" if cookie[-1] != "A" else "B").join((cookie[:-1], ""))
    wrong_secret = cookie[:30] + ("A" if cookie[30] != "A" else "B") + cookie[31:]
    for forged in (altered, wrong_secret, cookie[:-1], "x" * 64, "", "é" * 64):
        session = node.session(
            None,
            aside=(forged.encode(),),
            bearer=forged.encode(),
            refresh=forged.encode(),
            refresh_aside=(forged.encode(),),
        )
        await node.do(session.logout(refresh_token=forged))
        assert isinstance(session.cookie_action, ClearCookie)
    assert is_empty(journal)
    assert not node.has_work()
    node.store.bring_back()
    assert (await node.load(cookie)).subject == "ann"


async def test_a_forgery_beside_a_kept_sign_out_tells_of_nothing(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal)
    cookie = await node.warm()
    node.store.take_away()
    await node.sign_out(cookie)
    forged = node.session("x" * 64)
    with suppress(StoreUnavailable):
        await node.do(forged.logout())
    assert isinstance(forged.cookie_action, ClearCookie)
    assert len(kept(journal)) == 1
    assert len(node.events.of("session.sign_out_kept")) == 1


async def test_nobody_has_nothing_to_wait_for(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal)
    await node.sign_in()
    node.store.take_away()
    session = node.session(None)
    await node.do(session.logout())
    assert not session.logout_pending
    assert was_never_used(journal)


# -- where it cannot be kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", ["refuse", "near", "anonymous"])
async def test_without_a_journal_the_cookies_go_and_the_store_is_told_away(
    make_node: MakeNode, silence: Silence, outage: str
) -> None:
    node = make_node(outage=outage, tokens=TOKENS)
    cookie = await node.warm()
    node.store.take_away(silence)
    session = node.session(cookie)
    await node.refuses(session.logout)
    assert not session.logout_pending
    assert isinstance(session.cookie_action, ClearCookie)
    assert isinstance(session.refresh_action, ClearRefresh)


async def test_a_full_journal_refuses_the_next_sign_out_and_keeps_the_others(
    make_node: MakeNode, journal: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatcheck.journal.MOST", 2)
    node = make_node(journal=journal)
    cookies = [await node.warm(name) for name in ("ann", "bob", "cid")]
    node.store.take_away()
    for cookie in cookies[:2]:
        assert (await node.sign_out(cookie)).logout_pending
    third = node.session(cookies[2])
    await node.refuses(third.logout)
    assert not third.logout_pending
    assert isinstance(third.cookie_action, ClearCookie)
    assert len(kept(journal)) == 2


async def test_an_unusable_journal_refuses_the_sign_out(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal)
    cookie = await node.warm()
    block(journal)
    node.store.take_away()
    session = node.session(cookie)
    await node.refuses(session.logout)
    assert isinstance(session.cookie_action, ClearCookie)


async def test_before_the_first_contact_nobody_can_tell_a_forgery_so_nothing_is_kept(
    make_node: MakeNode, journal: Path
) -> None:
    """The keys of ids are in the store: whoever has never seen them would keep whatever anybody sends."""
    first, fresh = make_node(), make_node(journal=journal, tokens=TOKENS)
    cookie = await first.warm()
    fresh.store.take_away()
    session = fresh.session(cookie)
    await fresh.refuses(session.logout)
    assert isinstance(session.cookie_action, ClearCookie)
    assert isinstance(session.refresh_action, ClearRefresh)
    assert was_never_used(journal)


@pytest.mark.parametrize("outage", ["near", "anonymous"])
async def test_before_the_first_contact_a_policy_serves_nobody(make_node: MakeNode, outage: str) -> None:
    first, fresh = make_node(), make_node(outage=outage)
    cookie = await first.warm()
    fresh.store.take_away()
    assert not await fresh.is_served(cookie)


async def test_a_journal_that_cannot_be_cleared_does_not_keep_the_node_away(make_node: MakeNode, journal: Path) -> None:
    """The disk is full: the store has the sign-out, so there is nothing to protect by refusing everybody."""
    node = make_node(journal=journal)
    cookie, mate = await node.warm("ann"), await node.warm("bob")
    node.store.take_away()
    await node.sign_out(cookie)
    touch(journal, "create trigger full before delete on sign_outs begin select raise(abort, 'full'); end")
    node.store.bring_back()
    assert await node.is_served(mate)
    assert not (await node.load(cookie)).is_signed_in


async def test_administrative_revokes_are_never_kept(make_node: MakeNode, silence: Silence, journal: Path) -> None:
    node = make_node(outage="near", journal=journal)
    cookie = await node.warm()
    sid = str((await node.load(cookie)).sid)
    node.store.take_away(silence)
    coat = node.coat
    await node.refuses(lambda: coat.revoke_session(sid, reason="admin"))
    await node.refuses(lambda: coat.revoke_subject("ann", reason="admin"))
    await node.refuses(lambda: coat.revoke_where(SessionFilter(signed_in=None), reason="admin"))
    assert was_never_used(journal)
    assert node.events.of("session.sign_out_kept") == []
    node.store.bring_back()
    assert (await node.load(cookie)).subject == "ann"


# -- tokens --------------------------------------------------------------------------------------------------------


async def tokens_of(node: Node, cookie: str) -> tuple[str, str]:
    """An access token and a refresh token of a session."""
    session = await node.load(cookie)
    issued = await node.do(session.tokens())
    assert isinstance(session.refresh_action, SendRefresh)
    return issued.access_token, session.refresh_action.text


@pytest.mark.parametrize("carried", ["bearer", "expired bearer", "refresh", "refresh_aside", "body", "aside"])
async def test_whatever_a_sign_out_carries_is_kept(make_node: MakeNode, carried: str, journal: Path) -> None:
    node, other = make_node(journal=journal, tokens=TOKENS), make_node(tokens=TOKENS)
    cookie = await node.warm()
    access, refresh = await tokens_of(node, cookie)
    node.store.take_away()
    carriers: dict[str, dict[str, Any]] = {
        "bearer": {"bearer": access.encode()},
        "expired bearer": {"bearer": access.encode()},
        "refresh": {"refresh": refresh.encode()},
        "refresh_aside": {"refresh_aside": (refresh.encode(),)},
        "body": {},
        "aside": {"bearer": b"a.b.c", "aside": (cookie.encode(),)},
    }
    if carried == "expired bearer":
        node.system.advance(TOKENS.access_lifetime)
    session = node.session(None, **carriers[carried])
    await node.do(session.logout(refresh_token=refresh if carried == "body" else None))
    assert session.logout_pending
    assert isinstance(session.cookie_action, ClearCookie)
    assert isinstance(session.refresh_action, ClearRefresh)
    assert [row[0] for row in kept(journal)] == [handle_of(cookie)]
    raw = read(journal)
    assert refresh[28:].encode() not in raw
    node.store.bring_back()
    await node.coat.engine.maintain()
    assert not (await other.load(cookie)).is_signed_in


async def test_a_sign_out_wins_over_a_refresh_that_arrives_after_recovery(make_node: MakeNode, journal: Path) -> None:
    node = make_node(journal=journal, tokens=TOKENS)
    cookie = await node.warm()
    _, refresh = await tokens_of(node, cookie)
    node.system.advance(TOKENS.reuse_grace)
    node.store.take_away()
    await node.sign_out(cookie)
    node.store.bring_back()
    with pytest.raises(SessionEnded):
        await node.do(node.coat.refresh(refresh))
    assert kept(journal) == []


async def test_an_access_token_of_a_signed_out_session_is_refused_from_the_first_check_on(
    make_node: MakeNode, journal: Path
) -> None:
    mine, other = make_node(journal=journal, tokens=TOKENS), make_node(journal=journal, tokens=TOKENS)
    cookie = await mine.warm()
    access, _ = await tokens_of(mine, cookie)
    await other.do(other.coat.verify(access))
    for node in (mine, other):
        node.store.take_away()
    await mine.sign_out(cookie)
    for node in (mine, other):
        await node.refuses(lambda node=node: node.coat.verify(access))  # type: ignore[misc]
    # `mine` is gone for good.
    other.store.bring_back()
    with pytest.raises(TokenInvalid):
        await other.do(other.coat.verify(access))


async def test_a_token_that_is_being_checked_while_somebody_signs_out_is_refused(
    make_node: MakeNode, journal: Path
) -> None:
    node = make_node(journal=journal, tokens=TOKENS)
    cookie = await node.warm()
    access, _ = await tokens_of(node, cookie)

    async def leave(verb: str) -> None:
        if verb == "standing":
            node.store.before = lambda verb: None
            node.store.away = True
            assert (await node.sign_out(cookie)).logout_pending
            node.store.away = False

    node.store.before = leave
    with pytest.raises(TokenInvalid):
        await node.do(node.coat.verify(access))


# -- settings ------------------------------------------------------------------------------------------------------


def test_the_environment_may_choose() -> None:
    _, chosen = settings_from_env(
        {
            "COATCHECK_STORE": "memory:",
            "COATCHECK_OUTAGE": "near",
            "COATCHECK_OUTAGE_GRACE": "30",
            "COATCHECK_LEASE": "0.5",
            "COATCHECK_JOURNAL": "/var/lib/app",
            "COATCHECK_NEAR_COPIES": "7",
        }
    )
    assert (chosen.outage, chosen.outage_grace, chosen.lease) == ("near", timedelta(seconds=30), timedelta(seconds=0.5))
    assert (chosen.journal, chosen.near_copies) == (Path("/var/lib/app"), 7)
    assert reach_of(chosen) == timedelta(seconds=30.5)
    assert reach_of(replace(chosen, outage="refuse")) == reach_of(replace(chosen, outage="anonymous")) == chosen.lease
    with pytest.raises(ConfigurationError, match="outage"):
        settings_from_env({"COATCHECK_STORE": "memory:", "COATCHECK_OUTAGE": "open"})
