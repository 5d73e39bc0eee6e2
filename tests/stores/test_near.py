"""Near copies in front of a store: what costs no trip, what must cost one, and what is never kept.

The store behind is the memory store with a counter; the feed is moved by hand. A hook runs inside a read, after the
store has served it and before the answer arrives: that is where the races are, and nothing has to be timed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import Line
from coatcheck.core.ids import IdKeys, SessionId, SessionRef, mint_session_id, owner_of, subject_tag, successor_of
from coatcheck.core.ports import (
    Absent,
    Activity,
    Aliased,
    Changes,
    Colour,
    Committed,
    Ended,
    Feed,
    Listener,
    Live,
    Loaded,
    OnLimit,
    RecordLimits,
    Unreadable,
)
from coatcheck.core.session import NewSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.stores.ledger import KEPT_SECONDS
from coatcheck.stores.memory import MemoryStore
from coatcheck.stores.near import IDLE_SECONDS, REST_SECONDS, NearLimits, NearStore
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions

T = TypeVar("T")
LEASE = 1.0
HOUR = 3600
MICROSECOND = 1 / 1_000_000
KEYS = IdKeys(b"t" * 32, b"c" * 32)
LIMITS = RecordLimits(octets=10_000, fields=100)


class Hands:
    """Both clocks, moved by hand and together."""

    def __init__(self) -> None:
        # A whole number of seconds in which a microsecond can be told apart.
        self.seconds = 1024.0

    def now_us(self) -> int:
        return 1_800_000_000_000_000 + round(self.seconds * 1_000_000)

    def elapsed(self) -> float:
        return self.seconds

    def random(self, size: int) -> bytes:
        return b"r" * size


class HandFeed:
    """A feed whose line comes, is confirmed and breaks when the test says so."""

    def __init__(self, system: Hands, listener: Listener, lease: float) -> None:
        self.system, self.listener, self.lease = system, listener, lease
        self.source = "store A"
        self.up = self.answers = True
        self.current: Line | None = None
        self.renewals = self.beats = 0
        self.inbox: list[Callable[[], None]] = []

    def line(self, tag: int) -> Line | None:
        return None if self.current is None or self.current.broken else self.current

    def slot(self, tag: int) -> int:
        return 0

    def drain(self) -> None:
        inbox, self.inbox = self.inbox, []
        for message in inbox:
            message()

    async def renew(self, tag: int) -> Line | None:
        self.renewals += 1
        if not self.up or not self.answers:
            return None
        if self.line(tag) is None:
            self.current = Line(self.lease, source=self.source)
        assert self.current is not None
        self.current.confirm(self.system.elapsed())
        return self.current

    async def beat(self) -> None:
        self.beats += 1

    async def close(self) -> None:
        self.cut()

    def cut(self) -> None:
        if self.current is not None:
            self.current.cut()


class Watched(MemoryStore):
    """The memory store, and what it was asked for."""

    def __init__(self, options: StoreOptions, system: Hands) -> None:
        super().__init__(options)
        self.system = system
        self.verbs: list[str] = []
        self.hook: Callable[[], Awaitable[object]] | None = None
        self.write_hook: Callable[[], Awaitable[object]] | None = None
        self.answer: Loaded | None = None
        self.away = False
        self.revoked: list[SessionRef] = []
        self.fed: HandFeed | None = None

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        self.fed = HandFeed(self.system, listener, lease)
        return self.fed

    async def load(self, ref: SessionRef, digest: str) -> Loaded:
        self.verbs.append("load")
        if self.away:
            raise StoreUnavailable("away")
        found = await super().load(ref, digest)
        hook, self.hook = self.hook, None
        if hook is not None:
            await hook()
        return found if self.answer is None else self.answer

    async def commit(self, ref: SessionRef, *args: Any, **named: Any) -> Any:
        await self._before_writing("commit")
        return await super().commit(ref, *args, **named)

    async def rotate_id(self, ref: SessionRef, **named: Any) -> Any:
        await self._before_writing("rotate_id")
        return await super().rotate_id(ref, **named)

    async def expire_idle(self, ref: SessionRef) -> Any:
        await self._before_writing("expire_idle")
        return await super().expire_idle(ref)

    async def revoke(self, ref: SessionRef, *, reason: str, deny_us: int = 0) -> Any:
        await self._before_writing("revoke")
        self.revoked.append(ref)
        return await super().revoke(ref, reason=reason, deny_us=deny_us)

    async def touch(self, activities: Sequence[Activity]) -> None:
        await super().touch(activities)
        await self._before_writing("touch")

    async def revoke_owner(self, tag: int, owner: str, **named: Any) -> Any:
        await self._before_writing("revoke_owner")
        return await super().revoke_owner(tag, owner, **named)

    async def admit(self, new: NewSession, **named: Any) -> Any:
        await self._before_writing("admit")
        return await super().admit(new, **named)

    async def _before_writing(self, verb: str) -> None:
        self.verbs.append(verb)
        hook, self.write_hook = self.write_hook, None
        if hook is not None:
            await hook()
        if self.away:
            raise OutcomeUnknown("away")


@dataclass
class Desk:
    """One node: its near copy, the store behind it and its feed."""

    colour: Colour
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    system: Hands
    store: Watched
    near: NearStore
    count: int = 0
    ids: list[SessionId] = field(default_factory=list)

    @property
    def feed(self) -> HandFeed:
        assert self.store.fed is not None
        return self.store.fed

    def new(self, subject: str | None = "ann", *, idle: int = HOUR, absolute: int = 24 * HOUR) -> SessionId:
        """A session that exists in the store and was never read."""
        self.count += 1
        tag = 7 if subject is None else subject_tag(KEYS, "", subject)
        made = mint_session_id(KEYS, tag=tag, handle=b"%012d" % self.count, secret=b"s" * 24)
        self.run(self.store.create(self.fresh(made, subject, idle=idle, absolute=absolute)))
        return made

    def fresh(
        self, made: SessionId, subject: str | None = "ann", *, idle: int = HOUR, absolute: int = 24 * HOUR
    ) -> NewSession:
        return NewSession(
            ref=made.ref,
            digest=made.digest,
            owner=owner_of("", subject),
            subject=subject or "",
            idle_us=idle * 1_000_000,
            absolute_us=absolute * 1_000_000,
            authority="{}",
            fields={"a": "1"},
        )

    def load(self, made: SessionId) -> Loaded:
        return self.run(self.near.load(made.ref, made.digest))  # type: ignore[no-any-return]

    def warm(self, subject: str | None = "ann", *, idle: int = HOUR, absolute: int = 24 * HOUR) -> SessionId:
        """A session whose copy is at hand."""
        made = self.new(subject, idle=idle, absolute=absolute)
        assert isinstance(self.load(made), Live)
        assert self.knows(made)
        self.store.verbs.clear()
        return made

    def knows(self, made: SessionId) -> bool:
        return self.near.peek(made.text.encode()) is not None

    def confirm(self) -> None:
        """A heartbeat went through."""
        assert self.feed.current is not None
        self.feed.current.confirm(self.system.elapsed())

    def advance(self, seconds: float) -> None:
        self.system.seconds += seconds

    def commit(self, made: SessionId, value: str = "2") -> Any:
        return self.run(self.near.commit(made.ref, Changes(put={"a": value}), limits=LIMITS))


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    colour: Colour = request.param
    system = Hands()
    waits = waits_of(colour)
    store = Watched(StoreOptions(colour=colour, waits=waits, system=system), system)
    limits = NearLimits(
        entries=1000,
        octets=10**7,
        lease=LEASE,
        deadline=20.0,
        idle_us=30 * 24 * HOUR * 1_000_000,
        absolute_us=300 * 24 * HOUR * 1_000_000,
    )
    with asyncio.Runner() as runner:
        run = run_blocking if colour == "blocking" else runner.run
        near = NearStore(store, waits=waits, system=system, limits=limits)
        run(near.open())
        yield Desk(colour=colour, run=run, system=system, store=store, near=near)
        run(near.close())


def limited(desk: Desk, *, idle: int = 30 * 24 * HOUR, absolute: int = 300 * 24 * HOUR, entries: int = 1000) -> Desk:
    """Another node over the same store, with other settings."""
    limits = NearLimits(
        entries=entries,
        octets=10**7,
        lease=LEASE,
        deadline=20.0,
        idle_us=idle * 1_000_000,
        absolute_us=absolute * 1_000_000,
    )
    near = NearStore(desk.store, waits=waits_of(desk.colour), system=desk.system, limits=limits)
    return replace(desk, near=near)


# -- what costs no trip ----------------------------------------------------------------------------------------------


def test_a_cold_read_is_one_command_and_a_warm_check_is_none(desk: Desk) -> None:
    made = desk.new()
    assert not desk.knows(made)
    assert desk.store.verbs == []
    found = desk.load(made)
    assert isinstance(found, Live)
    assert desk.store.verbs == ["load"]
    for _ in range(5):
        held = desk.near.peek(made.text.encode())
        assert held is not None
        assert held.subject == "ann"
        assert desk.near.opened(held, made.ref.handle) == found
        assert desk.load(made) == found
    assert desk.store.verbs == ["load"]
    assert (desk.near.hits, desk.near.reads) == (5, 1)


def test_an_anonymous_session_is_kept_without_a_subject(desk: Desk) -> None:
    made = desk.warm(None)
    held = desk.near.peek(made.text.encode())
    assert held is not None
    assert held.subject is None


@pytest.mark.parametrize("change", ["tail", "head", "half", "none", "binary", "long"])
def test_a_forged_id_with_the_handle_of_a_warm_session_is_not_known(desk: Desk, change: str) -> None:
    text = desk.warm().text.encode()
    forged = {
        "tail": text[:-1] + (b"A" if text[-1:] != b"A" else b"B"),
        "head": b"E" + text[1:] if text[:1] != b"E" else b"F" + text[1:],
        "half": text[:32],
        "none": b"",
        "binary": text[:20] + b"\x00\xff" * 22,
        "long": text * 1000,
    }[change]
    assert desk.near.peek(forged) is None


def test_another_digest_under_a_warm_handle_goes_to_the_store_and_spoils_nothing(desk: Desk) -> None:
    made = desk.warm()
    other = successor_of(KEYS, made, secret=b"x" * 24)
    assert not isinstance(desk.load(other), Live)
    assert desk.store.verbs == ["load"]
    assert not desk.knows(other)
    assert desk.knows(made)


# -- many at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desk", ["async"], indirect=True)
def test_many_tasks_that_load_one_cold_session_cost_one_command(desk: Desk) -> None:
    made = desk.new()

    async def turns() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def crowd() -> list[Loaded]:
        desk.store.hook = turns
        return await asyncio.gather(*(desk.near.load(made.ref, made.digest) for _ in range(50)))

    found = desk.run(crowd())
    assert len(found) == 50
    assert all(each == found[0] for each in found)
    assert isinstance(found[0], Live)
    assert desk.store.verbs == ["load"]


@pytest.mark.parametrize("desk", ["blocking"], indirect=True)
def test_many_threads_that_load_one_cold_session_cost_one_command(desk: Desk) -> None:
    made = desk.new()
    served, go = threading.Event(), threading.Event()

    async def hold() -> None:
        served.set()
        assert go.wait(30)

    desk.store.hook = hold
    found: list[Loaded] = []
    threads = [threading.Thread(target=lambda: found.append(desk.load(made))) for _ in range(16)]
    threads[0].start()
    assert served.wait(30)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(found) == 16
    assert all(isinstance(each, Live) for each in found)
    assert desk.store.verbs == ["load"]


@pytest.mark.parametrize("desk", ["async"], indirect=True)
def test_two_event_loops_that_load_one_cold_session_wait_for_one_command(desk: Desk) -> None:
    made = desk.new()
    desk.run(desk.feed.renew(made.ref.tag))
    served, go = threading.Event(), threading.Event()

    async def hold() -> None:
        served.set()
        await asyncio.to_thread(go.wait, 30)

    desk.store.hook = hold
    found: list[Loaded] = []

    def leader() -> None:
        found.append(asyncio.run(desk.near.load(made.ref, made.digest)))

    async def follow() -> None:
        follower = asyncio.ensure_future(desk.near.load(made.ref, made.digest))
        await asyncio.sleep(0)
        assert not follower.done()
        go.set()
        found.append(await follower)

    thread = threading.Thread(target=leader)
    thread.start()
    assert served.wait(30)
    asyncio.run(follow())
    thread.join(30)
    assert len(found) == 2
    assert all(isinstance(each, Live) for each in found)
    assert desk.store.verbs == ["load"]


@pytest.mark.parametrize("desk", ["async"], indirect=True)
def test_a_leader_that_is_cancelled_leaves_nobody_waiting(desk: Desk) -> None:
    made = desk.new()

    async def story() -> list[Loaded]:
        started = asyncio.Event()

        async def stuck() -> None:
            started.set()
            await asyncio.Event().wait()

        desk.store.hook = stuck
        leader = asyncio.ensure_future(desk.near.load(made.ref, made.digest))
        await started.wait()
        followers = [asyncio.ensure_future(desk.near.load(made.ref, made.digest)) for _ in range(5)]
        await asyncio.sleep(0)
        leader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leader
        async with asyncio.timeout(10):
            return await asyncio.gather(*followers)

    assert all(isinstance(each, Live) for each in desk.run(story()))
    assert desk.knows(made)


def test_a_leader_whose_read_failed_fails_alone(desk: Desk) -> None:
    made = desk.new()
    desk.store.away = True
    with pytest.raises(StoreUnavailable):
        desk.load(made)
    desk.store.away = False
    assert isinstance(desk.load(made), Live)
    assert desk.knows(made)


# -- this node's own writes ------------------------------------------------------------------------------------------


def rotate(desk: Desk, made: SessionId) -> SessionId:
    after = successor_of(KEYS, made, secret=b"n" * 24)
    desk.run(
        desk.near.rotate_id(
            made.ref, old_digest=made.digest, new_digest=after.digest, sealed=b"sealed", alias_us=30_000_000
        )
    )
    return after


def test_an_own_commit_is_read_back_at_once(desk: Desk) -> None:
    made = desk.warm()
    desk.commit(made, "2")
    assert not desk.knows(made)
    found = desk.load(made)
    assert isinstance(found, Live)
    assert (found.session.version, found.session.fields["a"]) == (2, "2")
    assert desk.knows(made)


def test_an_own_rotation_is_seen_at_once_and_an_alias_is_never_kept(desk: Desk) -> None:
    made = desk.warm()
    after = rotate(desk, made)
    desk.store.verbs.clear()
    assert not desk.knows(made)
    for _ in range(2):
        assert isinstance(desk.load(made), Aliased)
        assert not desk.knows(made)
    assert desk.store.verbs == ["load", "load"]
    assert isinstance(desk.load(after), Live)
    assert desk.knows(after)
    assert not desk.knows(made)


def test_an_own_revoke_is_seen_at_once_and_an_end_is_never_kept(desk: Desk) -> None:
    made = desk.warm()
    desk.run(desk.near.revoke(made.ref, reason="logout"))
    assert not desk.knows(made)
    desk.store.verbs.clear()
    for _ in range(2):
        found = desk.load(made)
        assert isinstance(found, Ended)
        assert found.reason == "logout"
    assert desk.store.verbs == ["load", "load"]


def test_an_own_end_of_all_sessions_of_a_subject_is_seen_at_once(desk: Desk) -> None:
    mine, others = [desk.warm("ann") for _ in range(3)], desk.warm("bob")
    desk.run(desk.near.revoke_owner(mine[0].ref.tag, owner_of("", "ann"), reason="stolen", keep=mine[2].ref))
    assert [desk.knows(each) for each in mine] == [False, False, False]
    assert desk.knows(others)
    desk.advance(0.5)
    assert [isinstance(desk.load(each), Live) for each in mine] == [False, False, True]
    assert desk.knows(mine[2])


@pytest.mark.parametrize("on_limit", ["evict_oldest", "allow"])
def test_who_gave_way_to_an_own_sign_in_is_not_known_any_more(desk: Desk, on_limit: OnLimit) -> None:
    oldest = desk.warm()
    desk.advance(0.25)
    replaced = desk.warm()
    desk.advance(0.25)
    made = mint_session_id(KEYS, tag=oldest.ref.tag, handle=b"n" * 12, secret=b"s" * 24)
    desk.run(desk.near.admit(desk.fresh(made), maximum=1, on_limit=on_limit, supersedes=replaced.ref))
    assert not desk.knows(replaced)
    assert desk.knows(oldest) is (on_limit == "allow")
    assert isinstance(desk.load(replaced), Ended)


WRITES = ("commit", "revoke", "rotate", "owner", "supersede")


async def write_to(desk: Desk, made: SessionId, how: str) -> None:
    match how:
        case "commit":
            await desk.near.commit(made.ref, Changes(put={"a": "2"}), limits=LIMITS)
        case "revoke":
            await desk.near.revoke(made.ref, reason="logout")
        case "rotate":
            after = successor_of(KEYS, made, secret=b"n" * 24)
            await desk.near.rotate_id(made.ref, old_digest=made.digest, new_digest=after.digest, sealed=b"", alias_us=0)
        case "owner":
            await desk.near.revoke_owner(made.ref.tag, owner_of("", "ann"), reason="stolen")
        case _:
            new = mint_session_id(KEYS, tag=made.ref.tag, handle=b"n" * 12, secret=b"s" * 24)
            await desk.near.admit(desk.fresh(new), maximum=9, on_limit="allow", supersedes=made.ref)


def expect_written(desk: Desk, made: SessionId, how: str) -> None:
    assert not desk.knows(made)
    desk.store.verbs.clear()
    found = desk.load(made)
    assert desk.store.verbs == ["load"]
    if how == "commit":
        assert isinstance(found, Live)
        assert found.session.version == 2
    else:
        assert not isinstance(found, Live)


@pytest.mark.parametrize("how", WRITES)
def test_a_read_that_an_own_write_overtook_leaves_no_copy(desk: Desk, how: str) -> None:
    made = desk.new()
    desk.store.hook = lambda: write_to(desk, made, how)
    assert isinstance(desk.load(made), Live), "it was alive when it was served"
    expect_written(desk, made, how)


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("warm", [False, True])
def test_a_read_that_fits_between_an_own_write_and_its_answer_leaves_no_copy(desk: Desk, how: str, warm: bool) -> None:
    made = desk.warm() if warm else desk.new()
    seen: list[bool] = []

    async def read() -> None:
        seen.append(desk.knows(made))
        desk.advance(0.125)
        await desk.near.load(made.ref, made.digest)
        seen.append(desk.knows(made))

    desk.store.write_hook = read
    desk.run(write_to(desk, made, how))
    assert seen == [False, True], "thrown away before it is sent, and read again before it is served"
    expect_written(desk, made, how)


def test_an_own_write_whose_answer_never_came_leaves_no_copy(desk: Desk) -> None:
    made = desk.warm()
    desk.store.away = True
    with pytest.raises(OutcomeUnknown):
        desk.run(desk.near.revoke(made.ref, reason="logout"))
    assert not desk.knows(made)
    desk.store.away = False
    assert isinstance(desk.load(made), Live)


# -- what the feed tells ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", ["changed", "cut off", "emptied"])
def test_a_message_between_question_and_answer_leaves_no_copy(desk: Desk, message: str) -> None:
    made = desk.new()
    tell = {
        "changed": lambda: desk.near.changed(made.ref.handle),
        "cut off": lambda: desk.near.cut_off(made.ref.tag),
        "emptied": desk.near.emptied,
    }[message]

    async def push() -> None:
        tell()

    desk.store.hook = push
    assert isinstance(desk.load(made), Live)
    assert not desk.knows(made)
    desk.store.verbs.clear()
    desk.advance(0.125)
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == ["load"]
    assert desk.knows(made)


@pytest.mark.parametrize("message", ["changed", "cut off", "emptied"])
def test_a_message_takes_the_copy_away(desk: Desk, message: str) -> None:
    made, other, stranger = desk.warm(), desk.warm(), desk.warm("bob")
    match message:
        case "changed":
            desk.near.changed(made.ref.handle)
        case "cut off":
            desk.near.cut_off(made.ref.tag)
        case _:
            desk.near.emptied()
    assert not desk.knows(made)
    assert desk.knows(other) is (message == "changed")
    assert desk.knows(stranger) is (message != "emptied")


@pytest.mark.parametrize("handle", ["", "ü☃", "x" * 10_000, "\x00", "\udc80"])
def test_a_message_about_nobody_does_no_harm(desk: Desk, handle: str) -> None:
    made = desk.warm()
    desk.near.changed(handle)
    assert desk.knows(made)


def test_a_thread_looks_for_messages_before_it_answers(desk: Desk) -> None:
    made = desk.warm()
    desk.feed.inbox.append(lambda: desk.near.changed(made.ref.handle))
    assert desk.knows(made) is (desk.colour == "async"), "an event loop is told by itself"
    desk.feed.drain()
    assert not desk.knows(made)


def test_a_line_that_broke_while_a_read_was_on_its_way_keeps_nothing(desk: Desk) -> None:
    made = desk.new()

    async def break_it() -> None:
        desk.feed.cut()

    desk.store.hook = break_it
    assert isinstance(desk.load(made), Live)
    assert not desk.knows(made)
    desk.store.verbs.clear()
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == ["load"]
    assert desk.knows(made)


# -- the lease -------------------------------------------------------------------------------------------------------


def test_a_copy_is_believed_until_the_lease_ends_exactly(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(LEASE - MICROSECOND)
    assert desk.knows(made)
    desk.advance(MICROSECOND)
    assert not desk.knows(made)


def test_after_a_silence_one_answer_makes_every_copy_good_again(desk: Desk) -> None:
    many = [desk.warm(subject) for subject in ("ann", "bob", "eve")]
    before = desk.feed.renewals
    desk.advance(LEASE)
    assert not any(desk.knows(each) for each in many)
    assert isinstance(desk.load(many[0]), Live)
    assert all(desk.knows(each) for each in many)
    assert (desk.feed.renewals - before, desk.store.verbs) == (1, [])


def test_a_copy_that_changed_during_the_silence_is_read_again(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(LEASE)
    desk.run(desk.store.revoke(made.ref, reason="logout"))
    answer = desk.feed.renew

    async def renew(tag: int) -> Line | None:
        # What was told before the answer has reached the listener before it counts.
        desk.near.changed(made.ref.handle)
        return await answer(tag)

    desk.feed.renew = renew  # type: ignore[method-assign]
    assert isinstance(desk.load(made), Ended)


def test_without_a_feed_every_check_asks_the_store(desk: Desk) -> None:
    made = desk.new()
    desk.feed.up = False
    for number in range(3):
        assert isinstance(desk.load(made), Live)
        assert not desk.knows(made)
        assert len(desk.store.verbs) == number + 1
    desk.feed.up = True
    assert isinstance(desk.load(made), Live)
    assert desk.knows(made)


def test_a_lease_that_cannot_be_renewed_costs_a_read_and_never_an_answer(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(LEASE)
    desk.feed.answers = False
    for number in range(3):
        assert isinstance(desk.load(made), Live)
        assert not desk.knows(made)
        assert len(desk.store.verbs) == number + 1


def test_a_broken_line_is_followed_by_a_new_one_and_old_copies_stay_dead(desk: Desk) -> None:
    made, other = desk.warm(), desk.warm("bob")
    desk.feed.cut()
    assert not desk.knows(made)
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == ["load"]
    assert desk.knows(made)
    assert not desk.knows(other), "what was read under the old line stays dead"


def wants_beat(desk: Desk) -> bool:
    return desk.near.wants_beat


def beats(desk: Desk) -> int:
    desk.run(desk.near.beat())
    return desk.feed.beats


def test_the_lease_is_kept_only_while_somebody_asks(desk: Desk) -> None:
    assert beats(desk) == 0, "nobody has asked yet"
    made = desk.warm()
    assert beats(desk) == 1
    desk.advance(IDLE_SECONDS - MICROSECOND)
    desk.confirm()
    assert desk.knows(made)
    assert beats(desk) == 2
    desk.advance(IDLE_SECONDS - MICROSECOND)
    assert beats(desk) == 3, "a hit counts from the heartbeat that saw it"
    desk.advance(MICROSECOND)
    assert beats(desk) == 3


def test_a_node_that_nobody_asks_still_hears_what_it_is_told(desk: Desk) -> None:
    desk.warm()
    beats(desk)
    desk.advance(IDLE_SECONDS)
    heard: list[bool] = []
    desk.feed.inbox.append(lambda: heard.append(True))
    beats(desk)
    assert heard == [True]


@pytest.mark.parametrize(("rest", "closed"), [(REST_SECONDS - MICROSECOND, False), (REST_SECONDS, True)])
def test_a_long_rest_lets_go_of_the_feed_and_the_next_question_has_it_again(
    desk: Desk, rest: float, closed: bool
) -> None:
    made = desk.warm(idle=24 * HOUR)
    beats(desk)
    line = desk.feed.current
    assert line is not None
    desk.advance(rest)
    beats(desk)
    assert line.broken is closed
    assert wants_beat(desk) is not closed
    assert isinstance(desk.load(made), Live)
    assert desk.knows(made)
    assert wants_beat(desk)


# -- through an outage -----------------------------------------------------------------------------------------------


def test_a_copy_serves_an_outage_for_exactly_its_grace(desk: Desk) -> None:
    made = desk.warm()
    desk.feed.cut()
    desk.store.away = True
    desk.advance(LEASE + 60 - MICROSECOND)
    spared = desk.near.through_outage(made.ref, made.digest, grace=60)
    assert spared is not None
    assert spared.session.subject == "ann"
    desk.advance(MICROSECOND)
    assert desk.near.through_outage(made.ref, made.digest, grace=60) is None


def test_who_was_ended_here_does_not_come_back_in_an_outage(desk: Desk) -> None:
    made = desk.warm()
    desk.feed.cut()
    desk.store.away = True
    with pytest.raises(OutcomeUnknown):
        desk.run(desk.near.revoke(made.ref, reason="logout"))
    assert desk.near.through_outage(made.ref, made.digest, grace=60) is None


# -- the session's own end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("idle", "absolute", "settings", "ends"),
    [
        (HOUR, 24 * HOUR, {}, HOUR),
        (24 * HOUR, HOUR, {}, HOUR),
        (24 * HOUR, 24 * HOUR, {"idle": HOUR}, HOUR),
        (24 * HOUR, 24 * HOUR, {"absolute": HOUR}, HOUR),
        (HOUR, HOUR, {"idle": 2 * HOUR, "absolute": 2 * HOUR}, HOUR),
    ],
    ids=["idle", "absolute", "idle tightened", "absolute tightened", "loosened"],
)
def test_a_copy_ends_by_itself_at_the_exact_instant(
    desk: Desk, idle: int, absolute: int, settings: dict[str, int], ends: int
) -> None:
    node = limited(desk, **settings)
    made = node.warm(idle=idle, absolute=absolute)
    node.advance(ends - MICROSECOND)
    node.confirm()
    node.load(made)
    assert node.store.verbs == []
    node.advance(MICROSECOND)
    assert not node.knows(made)
    node.load(made)
    assert node.store.verbs == ["load"]
    assert not node.knows(made), "an end that has come is not kept"


def test_a_slow_answer_makes_no_session_longer(desk: Desk) -> None:
    made = desk.new()

    async def slow() -> None:
        desk.advance(10)

    desk.store.hook = slow
    assert isinstance(desk.load(made), Live)
    desk.advance(HOUR - 10 - MICROSECOND)
    desk.confirm()
    desk.store.verbs.clear()
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == []
    desk.advance(MICROSECOND)
    desk.confirm()
    desk.load(made)
    assert desk.store.verbs == ["load"]


def test_a_use_that_must_be_noted_is_not_answered_without_a_closer_look(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(HOUR / 20 - MICROSECOND)
    desk.confirm()
    assert desk.knows(made)
    desk.advance(MICROSECOND)
    desk.confirm()
    assert not desk.knows(made)
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == []
    assert desk.knows(made), "its use is being noted"


def touched(desk: Desk, made: SessionId, seen_us: int) -> Sequence[Activity]:
    return [Activity(ref=made.ref, owner=owner_of("", "ann"), seen_us=seen_us)]


def test_a_noted_use_prolongs_the_copy(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(HOUR / 2)
    seen_us = desk.system.now_us()
    desk.run(desk.near.touch(touched(desk, made, seen_us)))
    desk.store.verbs.clear()
    desk.advance(HOUR - MICROSECOND)
    desk.confirm()
    found = desk.load(made)
    assert isinstance(found, Live)
    assert found.seen_us == seen_us
    assert desk.store.verbs == []
    desk.advance(MICROSECOND)
    desk.confirm()
    desk.load(made)
    assert desk.store.verbs == ["load"]


def test_a_slow_answer_to_a_noted_use_makes_no_session_longer(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(HOUR / 2)

    async def slow() -> None:
        desk.advance(10)

    desk.store.write_hook = slow
    desk.run(desk.near.touch(touched(desk, made, desk.system.now_us())))
    desk.store.verbs.clear()
    desk.advance(HOUR - 10 - MICROSECOND)
    desk.confirm()
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == []
    desk.advance(MICROSECOND)
    desk.confirm()
    desk.load(made)
    assert desk.store.verbs == ["load"]


def test_a_noted_use_never_passes_the_absolute_end(desk: Desk) -> None:
    made = desk.warm(idle=HOUR, absolute=HOUR + 60)
    desk.advance(HOUR - 60)
    desk.run(desk.near.touch(touched(desk, made, desk.system.now_us())))
    desk.store.verbs.clear()
    desk.advance(120 - MICROSECOND)
    desk.confirm()
    assert isinstance(desk.load(made), Live)
    assert desk.store.verbs == []
    desk.advance(MICROSECOND)
    desk.confirm()
    desk.load(made)
    assert desk.store.verbs == ["load"]


@pytest.mark.parametrize("late", [0.0, 1.0])
def test_a_use_that_was_noted_too_late_revives_nobody(desk: Desk, late: float) -> None:
    made = desk.warm()
    desk.advance(HOUR - 1)
    seen_us = desk.system.now_us()
    desk.advance(1 + late)
    desk.confirm()
    desk.run(desk.near.touch(touched(desk, made, seen_us)))
    desk.store.verbs.clear()
    assert not desk.knows(made)
    found = desk.load(made)
    assert desk.store.verbs == ["load"]
    assert isinstance(found, Live)
    assert found.seen_us < seen_us, "the store did not take it either"


def test_an_older_use_takes_nothing_back(desk: Desk) -> None:
    made = desk.warm()
    desk.advance(100)
    desk.run(desk.near.touch(touched(desk, made, desk.system.now_us())))
    desk.run(desk.near.touch(touched(desk, made, desk.system.now_us() - 50_000_000)))
    held = desk.near.table.known(made.ref.handle.encode())
    assert held is not None
    assert held.seen_us == desk.system.now_us()


# -- what is never kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ended", "unreadable", "absent", "replaced"])
def test_only_a_live_answer_is_kept(desk: Desk, kind: str) -> None:
    made, now = desk.new(), desk.system.now_us()
    answers: dict[str, Loaded] = {
        "ended": Ended(reason="logout", at_us=now, now_us=now),
        "unreadable": Unreadable(detail="no session", now_us=now),
        "absent": Absent(why="unknown", now_us=now),
        "replaced": Absent(why="replaced", now_us=now),
    }
    desk.store.answer = answers[kind]
    for number in range(3):
        assert desk.load(made) is answers[kind]
        assert not desk.knows(made)
        assert len(desk.store.verbs) == number + 1
    assert desk.near.table.known(made.ref.handle.encode()) is None


@pytest.mark.parametrize(
    "strange",
    [{"authority": "no json"}, {"authority": "[]"}, {"owner": "by hand"}, {"owner": ""}],
    ids=["no authority", "another authority", "owner", "no owner"],
)
def test_a_record_that_cannot_be_read_is_passed_on_and_not_kept(desk: Desk, strange: dict[str, str]) -> None:
    made = desk.new()
    found = desk.run(desk.store.load(made.ref, made.digest))
    assert isinstance(found, Live)
    desk.store.answer = replace(found, session=replace(found.session, **strange))  # type: ignore[arg-type]
    desk.store.verbs.clear()
    for number in range(2):
        assert desk.load(made) is desk.store.answer
        assert not desk.knows(made)
        assert len(desk.store.verbs) == number + 1


def test_whoever_is_told_that_it_is_over_does_not_find_it_alive_a_moment_later(desk: Desk) -> None:
    """An earlier read, slower than a later one, must not bring back what the later one saw ended."""
    made = desk.new()

    async def later() -> None:
        await desk.store.revoke(made.ref, reason="logout")
        other = successor_of(KEYS, made, secret=b"x" * 24)
        assert isinstance(await desk.near.load(made.ref, other.digest), Ended)

    desk.store.hook = later
    assert isinstance(desk.load(made), Live)
    assert not desk.knows(made)


def test_invented_ids_take_no_room(desk: Desk) -> None:
    for number in range(50):
        invented = mint_session_id(KEYS, tag=number, handle=b"%012d" % (1000 + number), secret=b"s" * 24)
        assert not isinstance(desk.load(invented), Live)
    assert len(desk.near.table) == 0
    assert not desk.near._flights


def test_the_near_copy_keeps_its_bounds(desk: Desk) -> None:
    node = limited(desk, entries=3)
    for number in range(10):
        node.load(node.new(f"subject {number}"))
        assert len(node.near.table) <= 3


# -- another store ---------------------------------------------------------------------------------------------------


def promote(desk: Desk, source: str = "store B") -> None:
    """Another store answers from here on."""
    desk.feed.cut()
    desk.feed.source = source
    desk.store.verbs.clear()
    desk.store.revoked.clear()


def end(desk: Desk, count: int = 1) -> list[SessionId]:
    ended = [desk.warm(f"subject {number}") for number in range(count)]
    for each in ended:
        desk.run(desk.near.revoke(each.ref, reason="logout"))
    return ended


def test_what_was_ended_here_is_ended_again_in_another_store_before_it_answers(desk: Desk) -> None:
    ended, other = end(desk, 3), desk.new("bob")
    promote(desk)
    assert isinstance(desk.load(other), Live)
    assert desk.store.verbs == ["revoke"] * 3 + ["load"]
    assert desk.store.revoked == [each.ref for each in ended]
    desk.store.verbs.clear()
    desk.near.changed(other.ref.handle)
    desk.load(other)
    assert desk.store.verbs == ["load"], "once is enough"


def test_a_new_connection_to_the_same_store_ends_nothing_again(desk: Desk) -> None:
    end(desk, 3)
    other = desk.new("bob")
    promote(desk, "store A")
    desk.load(other)
    assert desk.store.verbs == ["load"]


def test_sessions_of_a_subject_that_were_ended_at_once_are_ended_again_one_by_one(desk: Desk) -> None:
    mine, kept = [desk.warm("ann") for _ in range(2)], desk.warm("ann")
    desk.run(desk.near.revoke_owner(kept.ref.tag, owner_of("", "ann"), reason="stolen", keep=kept.ref))
    promote(desk)
    assert isinstance(desk.load(kept), Live)
    assert {ref.handle for ref in desk.store.revoked} == {each.ref.handle for each in mine}


@pytest.mark.parametrize(("after", "again"), [(KEPT_SECONDS, True), (KEPT_SECONDS + MICROSECOND, False)])
def test_own_endings_are_remembered_for_exactly_ten_minutes(desk: Desk, after: float, again: bool) -> None:
    ended, other = end(desk), desk.new("bob")
    desk.advance(after)
    promote(desk)
    desk.load(other)
    assert desk.store.revoked == ([ended[0].ref] if again else [])


def test_the_first_store_is_told_again_when_it_comes_back_without_what_was_ended_since(desk: Desk) -> None:
    end(desk)
    other = desk.new("bob")
    promote(desk)
    desk.load(other)
    second = desk.warm("eve")
    desk.run(desk.near.revoke(second.ref, reason="logout"))
    promote(desk, "store A")
    desk.near.changed(other.ref.handle)
    desk.load(other)
    assert second.ref in desk.store.revoked


def test_another_store_that_fails_meanwhile_is_told_the_rest_later_and_answers_nothing_before(desk: Desk) -> None:
    ended, other = end(desk, 2), desk.new("bob")
    promote(desk)
    desk.store.away = True
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            desk.load(other)
    assert "load" not in desk.store.verbs
    desk.store.away = False
    assert isinstance(desk.load(other), Live)
    assert desk.store.revoked == [each.ref for each in ended]


def test_a_line_that_breaks_while_another_store_is_told_does_not_count_as_told(desk: Desk) -> None:
    ended, other = end(desk, 3), desk.new("bob")
    promote(desk)

    async def break_it() -> None:
        desk.feed.cut()
        await desk.feed.renew(other.ref.tag)

    desk.store.write_hook = break_it
    desk.load(other)
    desk.near.changed(other.ref.handle)
    desk.load(other)
    assert set(desk.store.revoked) == {each.ref for each in ended}


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("desk", ["blocking"], indirect=True)
def test_sixteen_threads_read_nothing_older_than_what_was_written_before_they_asked(desk: Desk) -> None:
    made = desk.new()
    written = [1]
    wrong: list[object] = []
    barrier, over = threading.Barrier(16), threading.Event()

    def write() -> None:
        barrier.wait()
        while not over.is_set():
            done = run_blocking(desk.near.commit(made.ref, Changes(put={"a": "2"}), limits=LIMITS))
            assert isinstance(done, Committed)
            written[0] = done.version

    def read(number: int) -> None:
        barrier.wait()
        for _ in range(100):
            before = written[0]
            found: Loaded | None
            match number % 3:
                case 0:
                    held = desk.near.peek(made.text.encode())
                    found = None if held is None else desk.near.opened(held, made.ref.handle)
                case 1:
                    found = run_blocking(desk.near.load(made.ref, made.digest))
                case _:
                    desk.near.changed(made.ref.handle)
                    found = run_blocking(desk.near.load(made.ref, made.digest))
            if found is not None and (not isinstance(found, Live) or found.session.version < before):
                wrong.append((before, found))

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as failed:
            wrong.append(failed)
            barrier.abort()

    writer = threading.Thread(target=guarded, args=(write,))
    readers = [threading.Thread(target=guarded, args=(lambda number=number: read(number),)) for number in range(15)]
    for thread in (writer, *readers):
        thread.start()
    for thread in readers:
        thread.join(60)
    over.set()
    writer.join(60)
    assert wrong == []
    run_blocking(desk.near.revoke(made.ref, reason="logout"))
    assert not desk.knows(made)
    assert isinstance(desk.load(made), Ended)
