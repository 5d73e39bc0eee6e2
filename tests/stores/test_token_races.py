"""One refresh token in many hands at once, and refreshes against everything that ends a session: drawn by a seed.

All of it goes through the real faces, two or three nodes on one store, each with connections of its own. The stores'
clock is moved, so nobody waits for a grace. A failure names its seed; `--seed N` repeats it. COATCHECK_TEST_FULL=1
(or `--full`) runs ten times as many.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from inspect import isawaitable
from typing import Any, TypeAlias, TypeVar

import pytest

from coatcheck import (
    AsyncCoatcheck,
    Coatcheck,
    CoatcheckError,
    IssuedTokens,
    LoginRequired,
    RefreshInvalid,
    RefreshReused,
    SessionGone,
    SessionLimit,
    Settings,
    TokenInvalid,
    TokenSettings,
)
from coatcheck.core.ids import parse_sid
from coatcheck.core.ports import REASON_EVICTED, REASON_REUSED, Denial, DenialPage, Store, session_denial_id
from coatcheck.core.refresh_token import parse_refresh_token
from coatcheck.core.session import SECOND_US
from coatcheck.errors import SessionEnded
from coatcheck.stores.conformance import Clock
from coatcheck.stores.conformance.colours import together
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.system import REAL
from coatcheck.testing import CapturedEvents
from tests.stores.conftest import Place, places

T = TypeVar("T")
Call: TypeAlias = Callable[[], Coroutine[Any, Any, T]]

ROUNDS = 20
CALLERS = 50
REPLAYS = 4
BATCHES = 8
BATCH = 20
SERVER_KEY = b"the servers share this, 32 bytes"
GRACE_US = 30 * SECOND_US
# The longest access token, and the leeway of the most tolerant verifier.
DENIED_US = (900 + 60) * SECOND_US
SETTINGS = Settings(
    public_url="https://id.example",
    server_key=SERVER_KEY,
    idle_timeout=timedelta(days=7),
    absolute_timeout=timedelta(days=30),
    tokens=TokenSettings(reuse_grace=timedelta(microseconds=GRACE_US)),
)

durable = pytest.mark.parametrize(
    "place", [each for each in places() if each.values[0][0].name != "memory"], indirect=True
)


class Moved:
    """The machine's clock, moved by the lever that moves the stores'."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now_us(self) -> int:
        return REAL.now_us() + self._clock.offset_us

    def elapsed(self) -> float:
        return REAL.elapsed()

    def random(self, size: int) -> bytes:
        return REAL.random(size)


@dataclass(kw_only=True)
class Nodes:
    """Servers of one application: each has its own face and its own store on the same data."""

    place: Place
    url: str
    namespace: str
    settings: Settings
    clock: Clock = field(default_factory=Clock)
    events: CapturedEvents = field(default_factory=CapturedEvents)
    all: list[Any] = field(default_factory=list)

    def store(self, *, url: str | None = None, deadline: float = 30.0) -> Store:
        """One more store on the data, opened by whoever uses it."""
        options = StoreOptions(
            colour=self.place.colour,
            waits=waits_of(self.place.colour),
            system=REAL,
            namespace=self.namespace,
            # A slow machine must not look like a store that is away.
            deadline=deadline,
            clock_offset_us=self.clock,
        )
        return self.place.backend.make(self.url if url is None else url, options)

    def node(self, store: Any) -> Any:
        """A face over this store; closed with the others."""
        kind = AsyncCoatcheck if self.place.colour == "async" else Coatcheck
        self.all.append(kind(store, settings=self.settings, on_event=self.events, system=Moved(self.clock)))
        return self.all[-1]

    def advance(self, by_us: int) -> None:
        self.clock.offset_us += by_us

    async def at_once(self, calls: Sequence[Call[T]]) -> list[T]:
        """Run all calls as simultaneously as the colour can; their results in order."""
        return await together(self.place.colour, calls)

    async def denied_since(self, position: str | None) -> tuple[dict[str, Denial], str]:
        """Sessions on the denylist after a position, and its end."""
        found: dict[str, Denial] = {}
        while True:
            page = await self.all[0].engine.issuer.denials(after=position, limit=1000)
            assert isinstance(page, DenialPage)
            found.update({each.id: each for each in page.entries if each.kind == "sid"})
            position = page.position
            if not page.more:
                return found, position

    def generation(self, token: str) -> int:
        parsed = parse_refresh_token(self.all[0].engine.keys, token.encode())
        assert parsed is not None
        return parsed.generation

    def denial_id(self, sid: str) -> str:
        ref = parse_sid(self.all[0].engine.keys, sid)
        assert ref is not None
        return session_denial_id(ref)


@asynccontextmanager
async def nodes_on(place: Place, *, count: int = 3, settings: Settings = SETTINGS) -> AsyncIterator[Nodes]:
    """Nodes on data of their own, started."""
    directory = place.directory / secrets.token_hex(4)
    directory.mkdir(mode=0o700)
    nodes = Nodes(
        place=place,
        url=place.backend.address(place.server, directory),
        namespace=f"t{secrets.token_hex(5)}",
        settings=settings,
    )
    if place.backend.prepare is not None:
        bare = nodes.store()
        await place.backend.prepare(bare)
        await bare.close()
    for _ in range(count):
        await do(nodes.node(nodes.store()).start())
    try:
        yield nodes
    finally:
        for each in nodes.all:
            await do(each.close())


async def do(result: Any) -> Any:
    """Finish what a method of either colour returned."""
    return await result if isawaitable(result) else result


async def sign_in(node: Any, subject: str) -> tuple[Any, IssuedTokens]:
    """A session of this subject, and its first tokens."""
    session = node.session(None)
    await do(session.login(subject))
    return session, await do(session.tokens(carrier="body"))


async def attempt(node: Any, token: str | None) -> IssuedTokens | CoatcheckError:
    """Present a refresh token; a refusal is an answer like any other."""
    assert token is not None
    try:
        issued: IssuedTokens = await do(node.refresh(token))
    except CoatcheckError as refused:
        return refused
    return issued


async def accepted(node: Any, token: str) -> bool:
    """Whether an access token is accepted now."""
    try:
        await do(node.verify(token))
    except TokenInvalid:
        return False
    return True


def granted(answer: IssuedTokens | CoatcheckError, context: str) -> IssuedTokens:
    assert isinstance(answer, IssuedTokens), f"{context}: {answer!r}"
    return answer


def kept_families(nodes: Nodes) -> int:
    """How many refresh families rest in the store, counted past it."""
    name, place = nodes.namespace, nodes.place
    if place.backend.name == "sqlite":
        with closing(sqlite3.connect(nodes.url.removeprefix("sqlite:///"))) as connection:
            return int(connection.execute(f"select count(*) from {name}_families").fetchone()[0])
    if place.backend.name == "postgres":
        import psycopg

        with psycopg.connect(nodes.url, autocommit=True) as database:
            row = database.execute(f"SELECT count(*) FROM {name}_families".encode()).fetchone()
            assert row is not None
            return int(row[0])
    return sum(
        server.ask("HLEN", key) for server in place.server.primaries for key in server.ask("KEYS", f"{name}:f:*")
    )


# -- one token in fifty hands --------------------------------------------------------------------------------------


@durable
@pytest.mark.timeout(900)
def test_of_fifty_who_present_one_token_all_get_the_one_successor(place: Place, seed: int, long_form: bool) -> None:
    dice = random.Random(f"{seed}-{place}-fifty")

    async def play() -> None:
        async with nodes_on(place, count=dice.choice((2, 3))) as nodes:
            _, issued = await sign_in(nodes.all[0], "ann")
            token = issued.refresh_token
            for number in range(ROUNDS * (10 if long_form else 1)):
                nodes.advance(GRACE_US + dice.randrange(GRACE_US))
                token = await play_round(nodes, dice, token, f"{place}, round {number}, seed {seed}")
                assert nodes.generation(token) == number + 2
            assert kept_families(nodes) == 1

    place.run(play())


async def play_round(nodes: Nodes, dice: random.Random, token: str | None, name: str) -> str:
    nodes.events.clear()
    calls: list[Call[Any]] = [partial(attempt, dice.choice(nodes.all), token) for _ in range(CALLERS)]
    # Whoever cleans up meanwhile must not take what the callers are about to be given.
    sweep = partial(dice.choice(nodes.all).engine.store.sweep, limit=100)
    calls.insert(dice.randrange(CALLERS), sweep)
    answers = [each for each in await nodes.at_once(calls) if not isinstance(each, int)]
    got = [granted(each, name) for each in answers]
    successors = {each.refresh_token for each in got}
    assert len(successors) == 1, f"{name}: {len(successors)} successors"
    (successor,) = successors
    assert successor is not None, name
    assert successor != token, name
    how = Counter(event.data["how"] for event in nodes.events.of("refresh.exchanged"))
    assert how == {"rotated": 1, "replayed": CALLERS - 1}, name
    assert nodes.events.of("refresh.reused") == [], name
    for each in dice.sample(got, 2):
        assert await accepted(dice.choice(nodes.all), each.access_token), name
    return successor


# -- a consumed token again ----------------------------------------------------------------------------------------


@durable
@pytest.mark.timeout(900)
def test_a_replay_after_the_grace_ends_that_session_alone_and_is_told_once(
    place: Place, seed: int, long_form: bool
) -> None:
    """Ten thieves with a consumed token beside the owner with the current one: whoever comes first, one end."""
    dice = random.Random(f"{seed}-{place}-replay")

    async def play() -> None:
        async with nodes_on(place) as nodes:
            for number in range(REPLAYS * (10 if long_form else 1)):
                await play_replay(nodes, dice, f"ann-{number}", f"{place}, replay {number}, seed {seed}")

    place.run(play())


async def play_replay(nodes: Nodes, dice: random.Random, subject: str, name: str) -> None:
    _, position = await nodes.denied_since(None)
    # Three sessions of one user, one of which was robbed; and somebody else's.
    robbed, *others = [(await sign_in(dice.choice(nodes.all), who))[1] for who in (subject, subject, subject, "bob")]
    tokens, access = [robbed.refresh_token], [robbed.access_token]
    for _ in range(dice.randint(1, 4)):
        nodes.advance(GRACE_US)
        got = granted(await attempt(dice.choice(nodes.all), tokens[-1]), name)
        tokens.append(got.refresh_token)
        access.append(got.access_token)
    # The immediate predecessor after its grace, or any older one; the owner's own is due for its next rotation.
    nodes.advance(GRACE_US + dice.randrange(SECOND_US))
    spent = dice.choice(tokens[:-1])
    nodes.events.clear()
    calls = [partial(attempt, dice.choice(nodes.all), spent) for _ in range(10)]
    owner = dice.randrange(len(calls) + 1)
    calls.insert(owner, partial(attempt, dice.choice(nodes.all), tokens[-1]))
    answers = await nodes.at_once(calls)
    of_owner = answers.pop(owner)
    if isinstance(of_owner, IssuedTokens):
        # The owner came first; what it got must fall with the rest. What it presented may now be the immediate
        # predecessor of that, but then a thief's token is older still.
        tokens.append(of_owner.refresh_token)
        access.append(of_owner.access_token)
    else:
        assert isinstance(of_owner, SessionEnded), f"{name}: {of_owner!r}"
    reused = [each for each in answers if isinstance(each, RefreshReused)]
    late = [each for each in answers if isinstance(each, SessionEnded) and each.reason == REASON_REUSED]
    assert (len(reused), len(late)) == (1, 9), f"{name}: {answers!r}"

    (told,) = nodes.events.of("refresh.reused")
    assert (told.sid, told.subject) == (robbed.sid, subject), name
    (ended,) = nodes.events.of("session.ended")
    assert (ended.sid, ended.data["reason"]) == (robbed.sid, REASON_REUSED), name
    for token in tokens:
        answer = await attempt(dice.choice(nodes.all), token)
        assert isinstance(answer, SessionEnded), f"{name}: {answer!r}"
        assert answer.reason == REASON_REUSED, name
    for each in access:
        assert not await accepted(dice.choice(nodes.all), each), name
    denied, _ = await nodes.denied_since(position)
    assert denied.keys() == {nodes.denial_id(robbed.sid)}, name

    listed = await do(dice.choice(nodes.all).list_sessions(subject))
    assert {each.sid for each in listed.items} == {each.sid for each in others[:2]}, name
    for other in others:
        assert await accepted(dice.choice(nodes.all), other.access_token), name
        assert granted(await attempt(dice.choice(nodes.all), other.refresh_token), name).refresh_token, name


# -- refreshes against the end of a session ------------------------------------------------------------------------

ENDINGS = {
    "revoke": "stolen laptop",
    "logout": "logout",
    "everywhere": "sign out everywhere",
    "eviction": REASON_EVICTED,
    "password change": "password changed",
}
KINDS = ("refresh", "refresh", "refresh", "predecessor", "issue", "check")


@dataclass(kw_only=True)
class Race:
    """One session with its tokens, the requests under way, and what ends it; beside it another of the same user."""

    nodes: Nodes
    subject: str
    ending: str
    session: Any
    sid: str
    tokens: list[str]
    access: list[str]
    companion: Any = None
    schedule: list[tuple[str, int]] = field(default_factory=list)
    over: bool = False
    wrong: list[str] = field(default_factory=list)

    @property
    def reason(self) -> str:
        return ENDINGS[self.ending]

    async def step(self, kind: str, number: int) -> None:
        node, late = self.nodes.all[number], self.over
        if kind in ("refresh", "predecessor"):
            answer = await attempt(node, self.tokens[-1 if kind == "refresh" else 0])
            self.judge(answer, late, f"{kind} at node {number}")
        elif kind == "issue":
            with contextlib.suppress(SessionGone, LoginRequired):
                self.judge(await do(self.again(node).tokens(carrier="body")), late, f"issue at node {number}")
        elif kind == "check":
            if await accepted(node, self.access[0]) and late:
                self.wrong.append(f"an access token was accepted at node {number} after the end")
        else:
            await self.end(node)
            self.over = True

    def again(self, node: Any) -> Any:
        """The session in a request of its own."""
        return node.session(self.session.cookie_action.id.text)

    def judge(self, answer: IssuedTokens | CoatcheckError, late: bool, what: str) -> None:
        if isinstance(answer, IssuedTokens):
            # Kept whatever the order was: it is tried again when all is over.
            self.access.append(answer.access_token)
            if answer.refresh_token is not None:
                self.tokens.append(answer.refresh_token)
            if late:
                self.wrong.append(f"{what} was granted after the end")
        elif not isinstance(answer, SessionEnded) or answer.reason != self.reason:
            self.wrong.append(f"{what}: {answer!r}")

    async def end(self, node: Any) -> None:
        if self.ending == "revoke":
            await do(node.revoke_session(self.sid, reason=self.reason))
        elif self.ending == "logout":
            await do(self.again(node).logout())
        elif self.ending == "everywhere":
            await do(node.revoke_subject(self.subject, reason=self.reason))
        elif self.ending == "eviction":
            await do(node.session(None).login(self.subject))
        else:
            await do(node.revoke_subject(self.subject, reason=self.reason, keep_sid=self.companion.sid))

    async def verdict(self, denied: dict[str, Denial], before_us: int) -> str | None:
        """What is wrong, or nothing."""
        if self.wrong:
            return "; ".join(self.wrong)
        for number, token in enumerate(self.tokens):
            answer = await attempt(self.nodes.all[number % len(self.nodes.all)], token)
            if not isinstance(answer, SessionEnded) or answer.reason != self.reason:
                return f"a refresh token survived: {answer!r}"
        for number, access in enumerate(self.access):
            if await accepted(self.nodes.all[number % len(self.nodes.all)], access):
                return "an access token survived"
        entry = denied.get(self.nodes.denial_id(self.sid))
        if entry is None:
            return "its access tokens were not denied"
        if entry.until_us < before_us + DENIED_US:
            return f"its access tokens were denied too briefly: {entry}"
        answer = await attempt(self.nodes.all[0], self.companion.refresh_token)
        lives = isinstance(answer, IssuedTokens)
        if lives == (self.ending == "everywhere"):
            return f"the user's other session: {answer!r}"
        return None


@durable
@pytest.mark.timeout(900)
def test_no_token_survives_the_end_of_its_session(place: Place, seed: int, long_form: bool) -> None:
    """A revoke, a logout, a sign-out of all, an eviction and a changed password, each against refreshes."""
    dice = random.Random(f"{seed}-{place}-end")
    # Every user has two sessions, so a third sign-in is the eviction.
    settings = replace(SETTINGS, limit=SessionLimit(maximum=2, on_reached="evict_oldest"))

    async def play() -> None:
        async with nodes_on(place, settings=settings) as nodes:
            for number in range(BATCHES * (10 if long_form else 1)):
                await play_batch(nodes, dice, number, f"{place}, batch {number}, seed {seed}")

    place.run(play())


async def play_batch(nodes: Nodes, dice: random.Random, number: int, name: str) -> None:
    races = [await begin(nodes, dice, f"user-{number}-{each}") for each in range(BATCH)]
    # Half of the tokens are older than the grace and rotate, the others stay the current ones.
    aged = races[::2]
    young = races[1::2]
    nodes.advance(GRACE_US)
    for race in young:
        again = await do(race.session.tokens(carrier="body"))
        race.tokens, race.access = [again.refresh_token], [again.access_token]
    for race in dice.sample(aged, len(aged) // 2):
        # Some have been rotated a moment ago: both generations are out.
        race.judge(await attempt(dice.choice(nodes.all), race.tokens[0]), False, "the rotation before")
    for race in races:
        race.companion = (await sign_in(dice.choice(nodes.all), race.subject))[1]
        steps = [dice.choice(KINDS) for _ in range(dice.randint(2, 5))]
        steps.insert(dice.randint(0, len(steps)), "end")
        race.schedule = [(kind, dice.randrange(len(nodes.all))) for kind in steps]
    _, position = await nodes.denied_since(None)
    before_us = await nodes.all[0].engine.store.ping()
    if number % 2 == 0:
        # Exactly the drawn order within a session, beside all the other sessions.
        async def follow(race: Race) -> None:
            for kind, where in race.schedule:
                await race.step(kind, where)

        await nodes.at_once([partial(follow, race) for race in races])
    else:
        # The drawn steps of all sessions at once, in whatever order they arrive.
        calls = [partial(race.step, *step) for race in races for step in race.schedule]
        dice.shuffle(calls)
        await nodes.at_once(calls)
    denied, _ = await nodes.denied_since(position)
    for race, verdict in zip(
        races, await nodes.at_once([partial(race.verdict, denied, before_us) for race in races]), strict=True
    ):
        assert verdict is None, f"{name}: {race.ending} against {race.schedule}: {verdict}"


async def begin(nodes: Nodes, dice: random.Random, subject: str) -> Race:
    session, issued = await sign_in(dice.choice(nodes.all), subject)
    assert issued.refresh_token is not None
    return Race(
        nodes=nodes,
        subject=subject,
        ending=dice.choice(tuple(ENDINGS)),
        session=session,
        sid=issued.sid,
        tokens=[issued.refresh_token],
        access=[issued.access_token],
    )


# -- two orders, step by step --------------------------------------------------------------------------------------


@durable
@pytest.mark.parametrize("ending", ENDINGS)
def test_refresh_and_end_in_both_orders(place: Place, ending: str) -> None:
    settings = replace(SETTINGS, limit=SessionLimit(maximum=2, on_reached="evict_oldest"))

    async def play() -> None:
        async with nodes_on(place, count=2, settings=settings) as nodes:
            here, there = nodes.all
            for subject, order in (("ann", "refresh first"), ("bob", "end first")):
                session, issued = await sign_in(here, subject)
                assert issued.refresh_token is not None
                race = Race(
                    nodes=nodes,
                    subject=subject,
                    ending=ending,
                    session=session,
                    sid=issued.sid,
                    tokens=[issued.refresh_token],
                    access=[issued.access_token],
                )
                nodes.advance(GRACE_US)
                race.companion = (await sign_in(there, subject))[1]
                before_us = await here.engine.store.ping()
                steps = (("refresh", 1), ("end", 0)) if order == "refresh first" else (("end", 0), ("refresh", 1))
                for step in steps:
                    await race.step(*step)
                assert len(race.tokens) == (2 if order == "refresh first" else 1)
                denied, _ = await nodes.denied_since(None)
                assert await race.verdict(denied, before_us) is None

    place.run(play())


@durable
def test_an_invented_token_beside_genuine_ones_ends_nothing(place: Place) -> None:
    """Denial of service: whoever can make others' families look reused would sign them out."""

    async def play() -> None:
        async with nodes_on(place, count=2) as nodes:
            _, issued = await sign_in(nodes.all[0], "ann")
            token = issued.refresh_token
            assert token is not None
            nodes.advance(GRACE_US)
            forged = [token[:60] + letter + token[61:] for letter in "ABCDEFGH" if letter != token[60]]
            calls = [partial(attempt, nodes.all[n % 2], each) for n, each in enumerate((*forged, token))]
            *refused, answer = await nodes.at_once(calls)
            assert {type(each) for each in refused} == {RefreshInvalid}
            assert granted(answer, "the genuine one").refresh_token != token
            assert nodes.events.of("refresh.reused") == []

    place.run(play())
