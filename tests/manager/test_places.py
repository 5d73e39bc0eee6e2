"""Two nodes with near copies, the place of the owner, and whoever has copied the cookie: what each of them gets.

Both nodes are faces over one store in this process, so that a decision on one of them is known on the other as soon as
it is made, and time moves by hand. Each attack is named by its test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from inspect import isawaitable
from typing import Any, Literal, cast

import pytest

from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    Coatcheck,
    ConfigurationError,
    LoginRequired,
    Session,
    SessionEnded,
    SessionGone,
    Settings,
    StoreUnavailable,
    TokenSettings,
)
from coatcheck.core.binding import PLACES_FIELD, BindingPolicy, Outcome
from coatcheck.core.near_session import MARK, UNMARKED
from coatcheck.core.ports import Changes, Colour, RecordLimits, SessionStore
from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import PlaceRefused, StepUpRequired, ValueRefused
from coatcheck.events import Event
from coatcheck.places import ClientPlace
from coatcheck.stores.conformance import together
from coatcheck.stores.open import open_store
from coatcheck.testing import CapturedEvents, FakeSystem, command_budget
from tests.manager.conftest import id_of
from tests.manager.test_outage import Node as OutageNode
from tests.manager.test_outage import NoKeeper

pytestmark = pytest.mark.anyio

CHROME = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/130.0 Safari/537.36"
HOME = ClientPlace(address="198.51.100.7", user_agent=CHROME)
AWAY = ClientPlace(address="203.0.113.9", user_agent=CHROME)
HOME_SIX = ClientPlace(address="2001:db8:1:1::7", user_agent=CHROME)
BLOCK_FOR = 900
WIDE = RecordLimits(octets=100_000, fields=100)


class Behind:
    """The store, which fails on command; it tells what changes, so near copies stand before it."""

    def __init__(self, inner: SessionStore) -> None:
        self.inner = inner
        self.away: frozenset[str] = frozenset()
        """Verbs that fail before anything is done."""
        self.before: tuple[str, Callable[[], Any]] | None = None
        """Called once, when the next call of this verb arrives and before it is done."""

    async def close(self) -> None:
        """The other node may still use what is behind."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name in ("colour", "shared", "peek", "feed"):
            return found

        async def verb(*args: Any, **kwargs: Any) -> Any:
            if name in self.away:
                raise StoreUnavailable("the test took the store away")
            if self.before is not None and self.before[0] == name:
                hook, self.before = self.before[1], None
                await hook()
            return await found(*args, **kwargs)

        return verb


class Pair:
    """Two nodes over one store."""

    def __init__(self, colour: Colour, settings: Settings) -> None:
        self.colour: Colour = colour
        self.settings = settings
        self.system = FakeSystem()
        self.events = CapturedEvents()
        self.store = Behind(open_store("memory:", colour=colour, system=self.system))
        self.nodes = [self.node(), self.node()]

    def node(self, settings: Settings | None = None) -> Coatcheck | AsyncCoatcheck:
        kind = AsyncCoatcheck if self.colour == "async" else Coatcheck
        coat: Coatcheck | AsyncCoatcheck = kind(
            cast(SessionStore, self.store),
            settings=settings or self.settings,
            on_event=self.events,
            system=self.system,
        )
        coat._keeper = NoKeeper()
        return coat

    async def do(self, result: Any) -> Any:
        return await result if isawaitable(result) else result

    async def sign_in(self, place: ClientPlace | None = HOME, *, node: int = 0, **more: Any) -> str:
        session = self.nodes[node].session(None, place=place)
        await self.do(session.login("ann", **more))
        return id_of(session)

    async def ask(self, cookie: str, place: ClientPlace | None = HOME, *, node: int = 0) -> Session | AsyncSession:
        session = self.nodes[node].session(cookie, place=place)
        await self.do(session.load())
        return session

    async def who(self, cookie: str, place: ClientPlace | None = HOME, *, node: int = 0) -> str:
        """Whom a request finds, or the code of the refusal."""
        session = await self.ask(cookie, place, node=node)
        try:
            return session.require_login().subject
        except (PlaceRefused, StepUpRequired) as refused:
            assert not session.is_signed_in
            assert session.subject is None
            assert session.principal is None
            assert list(session) == []
            return refused.code
        except SessionEnded as ended:
            return ended.reason
        except LoginRequired as nobody:
            return nobody.code

    async def warm(self, cookie: str, place: ClientPlace = HOME) -> None:
        """Both nodes know the session and where it was used."""
        for node in range(2):
            assert await self.who(cookie, place, node=node) == "ann"
            with command_budget(self.nodes[node], 0):
                assert await self.who(cookie, place, node=node) == "ann"

    def decided(self) -> list[Event]:
        return self.events.of("risk.decided")

    async def close(self) -> None:
        self.store.away = frozenset()
        for node in self.nodes:
            await self.do(node.close())
        await self.store.inner.close()


Make = Callable[..., Pair]


@pytest.fixture
async def pair(colour: Colour) -> AsyncIterator[Make]:
    """`pair("block")`: two nodes whose policy does this on a mismatch."""
    made: list[Pair] = []

    def make(outcome: Outcome = "block", **more: Any) -> Pair:
        policy = BindingPolicy(network="prefix", user_agent=True, on_mismatch=outcome, block_for=BLOCK_FOR)
        made.append(Pair(colour, replace(Settings(binding=policy, server_key=b"k" * 32), **more)))
        return made[-1]

    yield make
    for each in made:
        await each.close()


# -- what it costs ----------------------------------------------------------------------------------------------------


async def test_a_request_from_its_own_place_asks_the_store_nothing(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    moved = replace(HOME, address="198.51.100.250", user_agent=CHROME.replace("130.0", "131.0"))
    for node in range(2):
        with command_budget(site.nodes[node], 0):
            assert await site.who(cookie, moved, node=node) == "ann"
    assert site.decided() == []


async def test_a_known_place_asks_nothing_and_a_new_one_writes_once(pair: Make) -> None:
    site = pair("notify")
    cookie = await site.sign_in()
    await site.warm(cookie)
    with command_budget(site.nodes[0], 1) as asked:
        assert await site.who(cookie, AWAY) == "ann"
    assert asked.verbs == ["commit"]
    await site.warm(cookie, AWAY)
    for node in (0, 1, 0):
        # Two tabs at two places, in turn.
        with command_budget(site.nodes[node], 0):
            assert await site.who(cookie, AWAY, node=node) == "ann"
            assert await site.who(cookie, HOME, node=node) == "ann"
    assert [event.data["outcome"] for event in site.decided()] == ["notify"]


@pytest.mark.parametrize(("outcome", "code"), [("step_up", "step_up_required"), ("block", "place_refused")])
async def test_a_place_that_was_refused_once_is_refused_without_a_command(
    pair: Make, outcome: Outcome, code: str
) -> None:
    site = pair(outcome)
    cookie = await site.sign_in()
    await site.warm(cookie)
    # The last one finds what the first one wrote.
    assert [await site.who(cookie, AWAY, node=node) for node in (0, 1, 0)] == [code] * 3
    for node in (0, 1, 0):
        with command_budget(site.nodes[node], 0):
            assert await site.who(cookie, AWAY, node=node) == code
    assert len(site.decided()) == 1


# -- what each outcome does -------------------------------------------------------------------------------------------


async def test_a_copied_cookie_is_refused_at_its_first_request_on_every_node(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    assert await site.who(cookie, AWAY, node=1) == "place_refused"
    refused = await site.ask(cookie, AWAY, node=0)
    with pytest.raises(PlaceRefused) as told:
        refused.require_login()
    assert told.value.until == site.system.now_us() / 1_000_000 + BLOCK_FOR
    assert refused.sid is None
    # Of two who hold one cookie nobody can say which one is the owner.
    for node in range(2):
        home = await site.ask(cookie, HOME, node=node)
        assert (home.wants_proof_of, home.subject) == ("ann", None)
    (event,) = site.decided()
    assert (event.subject, event.data["outcome"], event.data["differs"]) == ("ann", "block", "network")


async def test_a_block_ends_at_that_very_moment(pair: Make) -> None:
    site = pair("block", idle_timeout=timedelta(hours=2))
    cookie = await site.sign_in()
    assert await site.who(cookie, AWAY) == "place_refused"
    site.system.advance(BLOCK_FOR - 1e-6)
    assert await site.who(cookie, AWAY) == "place_refused"
    assert len(site.decided()) == 1
    site.system.advance(1e-6)
    # The policy has not changed: it is decided anew, and the owner is told once more.
    assert await site.who(cookie, AWAY, node=1) == "place_refused"
    assert len(site.decided()) == 2


async def test_the_owner_is_told_once_however_many_nodes_and_tabs_there_are(pair: Make) -> None:
    site = pair("notify")
    cookie = await site.sign_in()
    for turn in range(6):
        assert await site.who(cookie, AWAY, node=turn % 2) == "ann"
    assert len(site.decided()) == 1


async def test_a_revoked_session_says_why_and_its_owner_is_out_as_well(pair: Make) -> None:
    site = pair("revoke")
    cookie = await site.sign_in()
    await site.warm(cookie)
    assert await site.who(cookie, AWAY, node=1) == "other_place"
    assert await site.who(cookie, HOME, node=0) == "other_place"
    assert [event.data["outcome"] for event in site.decided()] == ["revoke"]
    assert [event.data["reason"] for event in site.events.of("session.ended")] == ["other_place"]


@pytest.mark.parametrize("outcome", ["notify", "step_up", "block", "revoke"])
async def test_of_32_first_requests_at_once_over_two_nodes_one_is_told(pair: Make, outcome: Outcome) -> None:
    site = pair(outcome)
    cookie = await site.sign_in()
    await site.warm(cookie)

    async def request(number: int) -> str:
        return await site.who(cookie, AWAY, node=number % 2)

    answers = await together(site.colour, [partial(request, n) for n in range(32)])
    expected = {"notify": "ann", "step_up": "step_up_required", "block": "place_refused", "revoke": "other_place"}
    assert set(answers) == {expected[outcome]}
    assert len(site.decided()) == 1


async def test_the_other_address_family_of_the_same_browser_is_told_and_let_in(pair: Make) -> None:
    site = pair("revoke")
    cookie = await site.sign_in()
    await site.warm(cookie)
    assert [await site.who(cookie, HOME_SIX, node=node) for node in (0, 1, 0)] == ["ann"] * 3
    assert [event.data["outcome"] for event in site.decided()] == ["notify"]
    assert await site.who(cookie, HOME) == "ann"


async def test_who_was_refused_does_not_get_in_by_the_other_address_family(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    assert await site.who(cookie, AWAY) == "place_refused"
    assert await site.who(cookie, replace(AWAY, address="2001:db8:bad::1"), node=1) == "step_up_required"


# -- proving it -------------------------------------------------------------------------------------------------------


async def test_after_a_proof_the_old_id_is_dead_and_the_session_goes_on(pair: Make) -> None:
    site = pair("block")
    session = site.nodes[0].session(None, place=HOME)
    await site.do(session.login("ann", claims={"role": "teller"}))
    session["cart"] = 3
    await site.do(session.commit())
    cookie = id_of(session)
    await site.warm(cookie)
    assert await site.who(cookie, AWAY, node=1) == "place_refused"
    home = await site.ask(cookie, HOME)
    await site.do(home.step_up(amr=("otp",), acr="2"))
    assert (home.subject, home["cart"], home.claims, home.acr) == ("ann", 3, {"role": "teller"}, "2")
    assert (home.amr, home.wants_proof_of) == (("pwd", "otp"), None)
    fresh = id_of(home)
    # Within the alias of a plain rotation, too: nothing leads on from the old id.
    for node in range(2):
        for place in (HOME, AWAY):
            assert await site.who(cookie, place, node=node) == "login_required"
    await site.warm(fresh)
    again = await site.ask(fresh)
    assert (again["cart"], again.acr, again.amr) == (3, "2", ("pwd", "otp"))
    assert await site.who(fresh, AWAY) == "place_refused"


async def test_a_proven_place_is_one_of_the_owners_on_every_node(pair: Make) -> None:
    site = pair("step_up")
    cookie = await site.sign_in()
    await site.warm(cookie)
    away = await site.ask(cookie, AWAY, node=1)
    assert (away.wants_proof_of, away.cookie_action) == ("ann", None)
    await site.do(away.step_up())
    fresh = id_of(away)
    await site.warm(fresh, AWAY)
    await site.warm(fresh, HOME)
    assert await site.who(cookie, HOME) == "login_required"
    assert len(site.decided()) == 1


async def test_a_refused_place_cannot_be_proven(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    away = await site.ask(cookie, AWAY)
    with pytest.raises(PlaceRefused):
        await site.do(away.step_up())
    assert away.cookie_action is None
    assert await site.who(cookie, AWAY) == "place_refused"
    assert await site.who(cookie, HOME) == "step_up_required"


async def test_a_proof_given_where_another_node_has_refused_meanwhile_is_refused(pair: Make) -> None:
    """Two nodes of which one has the stricter settings already: what was decided there counts here."""
    site = pair("step_up")
    site.nodes.append(site.node(replace(site.settings, binding=replace(site.settings.binding, on_mismatch="block"))))
    cookie = await site.sign_in()
    away = await site.ask(cookie, AWAY)
    assert away.wants_proof_of == "ann"
    assert await site.who(cookie, AWAY, node=2) == "place_refused"
    with pytest.raises(PlaceRefused):
        await site.do(away.step_up())
    assert await site.who(cookie, HOME) == "step_up_required"


async def test_what_is_decided_while_somebody_proves_himself_is_not_written_over(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    await site.who(cookie, AWAY)
    home = await site.ask(cookie, HOME)
    third = replace(AWAY, address="192.0.2.1")
    assert await site.who(cookie, third, node=1) == "place_refused"
    await site.do(home.step_up())
    fresh = id_of(home)
    assert [await site.who(fresh, place) for place in (AWAY, third, HOME)] == ["place_refused"] * 2 + ["ann"]
    assert len(site.decided()) == 2


async def test_what_is_decided_between_the_read_of_a_proof_and_its_new_id_is_kept(pair: Make) -> None:
    site = pair("step_up")
    cookie = await site.sign_in()
    third = replace(AWAY, address="192.0.2.1")
    away = await site.ask(cookie, AWAY)

    async def elsewhere() -> None:
        assert await site.who(cookie, third, node=1) == "step_up_required"

    site.store.before = ("rotate_id", elsewhere)
    await site.do(away.step_up())
    fresh = id_of(away)
    assert [await site.who(fresh, place) for place in (AWAY, third)] == ["ann", "step_up_required"]
    assert len(site.decided()) == 2


async def test_who_comes_elsewhere_with_an_id_that_is_replaced_meanwhile_is_told_of_once(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    session = await site.ask(cookie)

    async def prove() -> None:
        await site.do(session.step_up())

    site.store.before = ("commit", prove)
    assert await site.who(cookie, AWAY, node=1) == "login_required"
    assert (site.decided(), len(site.events.of("session_id.replaced"))) == ([], 1)
    await site.warm(id_of(session))


async def test_a_proof_that_cannot_be_written_leaves_the_browser_with_the_id_that_lives(pair: Make) -> None:
    """The store goes away between the new id and the proof: the owner must not be signed out by it."""
    site = pair("block")
    cookie = await site.sign_in()
    await site.who(cookie, AWAY)
    home = await site.ask(cookie, HOME)
    site.store.away = frozenset({"commit"})
    with pytest.raises(StoreUnavailable):
        await site.do(home.step_up())
    assert (home.subject, home.wants_proof_of) == (None, "ann")
    fresh = id_of(home)
    site.store.away = frozenset()
    assert await site.who(cookie, HOME) == "login_required"
    again = await site.ask(fresh, HOME, node=1)
    assert again.wants_proof_of == "ann"
    await site.do(again.step_up())
    await site.warm(id_of(again))


async def test_nobody_proves_himself_without_a_session(pair: Make) -> None:
    site = pair("block")
    with pytest.raises(LoginRequired):
        await site.do(site.nodes[0].session(None, place=HOME).step_up())


async def test_the_second_of_two_proofs_with_one_id_is_told_that_it_was_replaced(pair: Make) -> None:
    """A form that is sent twice."""
    site = pair("block")
    cookie = await site.sign_in()
    await site.who(cookie, AWAY)
    first, second = await site.ask(cookie, HOME), await site.ask(cookie, HOME, node=1)
    await site.do(first.step_up())
    with pytest.raises(SessionGone):
        await site.do(second.step_up())
    assert second.cookie_action is None
    await site.warm(id_of(first))


async def test_a_proof_on_an_own_initiative_works_without_any_policy(pair: Make) -> None:
    site = pair(binding=BindingPolicy())
    cookie = await site.sign_in()
    session = await site.ask(cookie, AWAY)
    await site.do(session.step_up(amr=("otp",)))
    assert await site.who(cookie) == "login_required"
    assert await site.who(id_of(session), HOME, node=1) == "ann"


async def test_whoever_holds_an_old_id_elsewhere_is_not_handed_the_new_one(pair: Make) -> None:
    """A copied cookie within the alias of a rotation."""
    site = pair("step_up")
    cookie = await site.sign_in()
    home = await site.ask(cookie, HOME)
    await site.do(home.rotate())
    away = await site.ask(cookie, AWAY, node=1)
    assert (away.wants_proof_of, away.cookie_action) == ("ann", None)
    assert id_of(await site.ask(cookie, HOME, node=1)) == id_of(home)


# -- the other ways in and out ----------------------------------------------------------------------------------------


async def test_a_job_is_no_place_and_challenges_nobody(pair: Make) -> None:
    """`coat.session(id)` without a place: no request was made, so none is compared, and near copies stay whole."""
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    for node in (0, 1, 0):
        assert await site.who(cookie, None, node=node) == "ann"
    assert site.decided() == []
    await site.warm(cookie)


async def test_a_place_made_by_hand_is_compared_like_any_other(pair: Make) -> None:
    site = pair("notify")
    cookie = await site.sign_in(ClientPlace(address="198.51.100.7"))
    assert await site.who(cookie, ClientPlace(address="203.0.113.9")) == "ann"
    for node in (0, 1, 0):
        assert await site.who(cookie, ClientPlace(address="203.0.113.9", mark=b"short"), node=node) == "ann"
    assert len(site.decided()) == 1


async def test_a_held_session_writes_nothing_and_makes_no_other(pair: Make) -> None:
    site = pair("step_up", tokens=TokenSettings(), public_url="https://id.example")
    cookie = await site.sign_in()
    held = await site.ask(cookie, AWAY)
    with pytest.raises(StepUpRequired):
        await site.do(held.rotate())
    with pytest.raises(StepUpRequired):
        await site.do(held.tokens())
    with pytest.raises(SessionGone):
        await site.do(held.recheck())
    held["cart"] = 1
    with pytest.raises(SessionGone):
        await site.do(held.commit())
    assert "cart" not in await site.ask(cookie, HOME)


async def test_signing_in_where_a_session_is_held_takes_its_place(pair: Make) -> None:
    site = pair("step_up")
    cookie = await site.sign_in()
    held = await site.ask(cookie, AWAY)
    await site.do(held.login("ann"))
    assert await site.who(cookie, HOME) == "login_required"
    await site.warm(id_of(held), AWAY)


async def test_signing_in_where_a_session_is_refused_leaves_it_to_its_owner(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    refused = await site.ask(cookie, AWAY)
    await site.do(refused.login("bob"))
    assert await site.who(id_of(refused), AWAY) == "bob"
    home = await site.ask(cookie, HOME)
    await site.do(home.step_up())
    await site.warm(id_of(home))


@pytest.mark.parametrize("outcome", ["step_up", "block"])
async def test_signing_out_ends_the_session_from_wherever_it_is_asked(pair: Make, outcome: Outcome) -> None:
    """Whoever holds the cookie may end the session: that is the safe direction."""
    site = pair(outcome)
    cookie = await site.sign_in()
    away = await site.ask(cookie, AWAY)
    await site.do(away.logout())
    assert await site.who(cookie, HOME, node=1) == "logout"


async def test_a_recheck_sees_a_challenge_that_came_during_the_request(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    home = await site.ask(cookie, HOME)
    await site.do(home.recheck())
    await site.who(cookie, AWAY, node=1)
    with pytest.raises(StepUpRequired):
        await site.do(home.recheck())


async def test_a_socket_is_over_once_its_place_is_challenged_whoever_asks_in_between(pair: Make) -> None:
    """The thief's second request fills the copy again: that must not vouch for the socket."""
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    socket = await site.ask(cookie, HOME)
    assert socket.is_signed_in
    assert socket.vouched_until() is not None
    for _ in range(3):
        await site.who(cookie, AWAY, node=1)
        await site.who(cookie, AWAY, node=0)
    assert socket.vouched_until() is None
    assert not await site.do(socket.still_lives())
    assert socket.ended is not None
    assert socket.ended.reason == "step_up_required"


async def test_a_socket_is_over_where_its_place_is_refused_by_a_stricter_node(pair: Make) -> None:
    site = pair("notify")
    site.nodes.append(site.node(replace(site.settings, binding=replace(site.settings.binding, on_mismatch="block"))))
    cookie = await site.sign_in()
    socket = await site.ask(cookie, AWAY)
    assert await site.do(socket.still_lives())
    assert await site.who(cookie, AWAY, node=2) == "place_refused"
    assert not await site.do(socket.still_lives())
    assert socket.ended is not None
    assert (socket.ended.reason, socket.ended.at) == ("place_refused", site.system.now_us() / 1_000_000)


@pytest.mark.parametrize("outcome", ["step_up", "block"])
async def test_refused_requests_never_keep_a_session_alive(pair: Make, outcome: Outcome) -> None:
    site = pair(outcome, idle_timeout=timedelta(seconds=100))
    cookie = await site.sign_in()
    for _ in range(100):
        site.system.advance(1)
        session = await site.ask(cookie, AWAY)
        assert not session.is_signed_in
        await site.nodes[0].engine.maintain()
    assert await site.who(cookie, HOME) == "idle_timeout"


async def test_a_thief_who_asks_all_the_time_does_not_let_the_session_of_its_owner_die(pair: Make) -> None:
    """Each refused request comes first when a use is due to be noted; the owner's, right behind it, must be."""
    site = pair("step_up", idle_timeout=timedelta(seconds=50))
    cookie = await site.sign_in()
    await site.warm(cookie)
    for _ in range(60):
        site.system.advance(1)
        assert await site.who(cookie, AWAY) == "step_up_required"
        assert await site.who(cookie, HOME) == "ann"
        await site.nodes[0].engine.maintain()


# -- while the store is away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["step_up", "block", "revoke"])
async def test_nobody_gets_in_from_elsewhere_while_a_decision_cannot_be_written(pair: Make, outcome: Outcome) -> None:
    site = pair(outcome)
    cookie = await site.sign_in()
    await site.warm(cookie)
    site.store.away = frozenset({"commit"})
    with pytest.raises(StoreUnavailable):
        await site.ask(cookie, AWAY)
    assert site.decided() == []
    site.store.away = frozenset()
    assert await site.who(cookie, AWAY) in ("step_up_required", "place_refused", "other_place")


async def test_a_revoke_that_cannot_be_carried_out_lets_nobody_in(pair: Make) -> None:
    site = pair("revoke")
    cookie = await site.sign_in()
    site.store.away = frozenset({"revoke"})
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await site.ask(cookie, AWAY)
    site.store.away = frozenset()
    assert await site.who(cookie, AWAY, node=1) == "other_place"
    assert await site.who(cookie, HOME) == "other_place"


async def test_the_owner_is_told_later_where_that_was_all_and_the_store_was_away(pair: Make) -> None:
    site = pair("notify")
    cookie = await site.sign_in()
    await site.warm(cookie)
    site.store.away = frozenset({"commit"})
    assert await site.who(cookie, AWAY) == "ann"
    assert site.decided() == []
    site.store.away = frozenset()
    for _ in range(2):
        assert await site.who(cookie, AWAY) == "ann"
    assert len(site.decided()) == 1


async def test_a_place_that_nobody_could_be_told_of_is_judged_again_at_the_next_request(
    pair: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write failed before it was sent, so the near copy stayed: no mark may stand for what was never kept."""
    site = pair("notify")
    cookie = await site.sign_in()
    await site.warm(cookie)

    async def refuse(*args: object, **named: object) -> None:
        raise StoreUnavailable("the test took the store away")

    with monkeypatch.context() as patched:
        patched.setattr(site.nodes[0].engine.near, "commit", refuse)
        assert await site.who(cookie, AWAY) == "ann"
    assert await site.who(cookie, AWAY) == "ann"
    assert len(site.decided()) == 1


@pytest.mark.parametrize("silence", ["cut", "frozen"])
@pytest.mark.parametrize(("outcome", "route"), [("step_up", None), ("block", "near"), ("notify", None)])
async def test_through_an_outage_the_owner_goes_on_and_a_copied_cookie_gets_nothing(
    colour: Colour, outcome: Outcome, route: OutagePolicy | None, silence: Literal["cut", "frozen"]
) -> None:
    """Judged by what was known: also on a path for which a gateway says `near` where the settings refuse."""
    policy = BindingPolicy(network="prefix", on_mismatch=outcome)
    chosen = Settings(binding=policy, server_key=b"k" * 32, outage="near" if route is None else "refuse")
    system = FakeSystem()
    node = OutageNode(colour, open_store("memory:", colour=colour, system=system), system, chosen)
    binding = node.coat.engine.binding
    assert binding is not None
    kind = AsyncSession if colour == "async" else Session

    async def ask(place: ClientPlace) -> Session | AsyncSession:
        here = binding.marked(place.address, place.user_agent, None)
        session = kind(node.coat.engine, cookie.encode(), lambda: here, outage=route)
        await node.do(session.load())
        return session

    session = node.coat.session(None, place=HOME)
    await node.do(session.login("ann"))
    cookie = id_of(session)
    assert (await ask(HOME)).subject == "ann"
    node.store.take_away(silence)
    system.advance(2 * chosen.lease.total_seconds())
    for _ in range(2):
        home, away = await ask(HOME), await ask(AWAY)
        assert (home.subject, home.through_outage) == ("ann", True)
        assert away.subject == ("ann" if outcome == "notify" else None)
    assert node.events.of("risk.decided") == []
    with pytest.raises((StoreUnavailable, PlaceRefused)):
        await node.do((await ask(AWAY)).step_up())
    node.store.bring_back()
    await ask(AWAY)
    assert [event.data["outcome"] for event in node.events.of("risk.decided")] == [outcome]
    await node.do(node.coat.close())


# -- what is kept of it -----------------------------------------------------------------------------------------------


async def test_no_application_sees_or_writes_what_is_kept_of_places(pair: Make) -> None:
    site = pair("notify")
    cookie = await site.sign_in()
    await site.who(cookie, AWAY)
    session = await site.ask(cookie, AWAY)
    session["cart"] = 1
    assert (list(session), len(session), PLACES_FIELD in session) == (["cart"], 1, False)
    assert session.get(PLACES_FIELD) is None
    with pytest.raises(ValueRefused):
        session[PLACES_FIELD] = "[0,[],[]]"
    with pytest.raises(ValueRefused):
        session.update({PLACES_FIELD: "x"})
    with pytest.raises(ValueRefused):
        session.setdefault("coatcheck:other", 1)
    with pytest.raises(KeyError):
        del session[PLACES_FIELD]
    session.clear()
    await site.do(session.commit())
    with pytest.raises(ValueRefused):
        await site.do(session.login("ann", keep=(PLACES_FIELD,)))
    await site.do(session.login("ann", keep=("cart",)))
    site.events.clear()
    # Nothing was carried along: the new session begins here, and HOME is another place.
    assert await site.who(id_of(session), AWAY) == "ann"
    assert site.decided() == []
    assert await site.who(id_of(session), HOME) == "ann"
    assert len(site.decided()) == 1


async def test_an_applications_clear_does_not_forget_a_block(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    home = await site.ask(cookie, HOME)
    home["cart"] = 1
    await site.who(cookie, AWAY, node=1)
    home.clear()
    home["cart"] = 2
    await site.do(home.commit())
    assert [await site.who(cookie, place) for place in (AWAY, HOME)] == ["place_refused", "step_up_required"]


async def test_a_session_that_its_application_has_filled_still_gets_its_decision(pair: Make) -> None:
    site = pair("block", max_field_octets=2000)
    session = site.nodes[0].session(None, place=HOME)
    await site.do(session.login("ann"))
    session["f"] = "x" * (2000 - 3)
    await site.do(session.commit())
    cookie = id_of(session)
    for number in range(8):
        assert await site.who(cookie, replace(AWAY, address=f"192.0.{number}.1")) == "place_refused"
    assert len(site.decided()) == 8
    assert await site.who(cookie, HOME) == "step_up_required"


@pytest.mark.parametrize("text", ["x", "[]", "\x00", "9" * 3000])
async def test_garbage_among_what_is_kept_is_an_event_and_nobodys_session(pair: Make, text: str) -> None:
    site = pair("notify")
    cookie = await site.sign_in()
    session = await site.ask(cookie)
    assert session.sid is not None
    ref = cast(Any, session)._record.ref
    await site.store.inner.commit(ref, Changes(put={PLACES_FIELD: text}), limits=WIDE)
    for place in (HOME, AWAY):
        assert await site.who(cookie, place) == "login_required"
    (event, *_) = site.events.of("session.record_unreadable")
    assert event.sid is not None
    assert "places" in str(event.data["detail"])


async def test_a_session_from_before_places_were_kept_goes_on(pair: Make) -> None:
    site = pair("block")
    site.nodes.append(site.node(replace(site.settings, binding=BindingPolicy())))
    cookie = await site.sign_in(node=2)
    assert await site.who(cookie, AWAY, node=2) == "ann"
    assert await site.who(cookie, HOME) == "ann"
    assert await site.who(cookie, AWAY) == "place_refused"
    # A node without a policy asks nothing, and shows nothing of what the others keep.
    assert await site.who(cookie, AWAY, node=2) == "ann"
    assert list(await site.ask(cookie, AWAY, node=2)) == []


# -- the mark in a near copy ------------------------------------------------------------------------------------------


def _copy(site: Pair, cookie: str, node: int = 0) -> Any:
    near = site.nodes[node].engine.peek(cookie.encode())
    assert near is not None
    return near


async def test_a_mark_does_not_stick_to_a_copy_of_a_newer_record(pair: Make) -> None:
    """The place was judged on one version while another request changed it, and its copy has come already."""
    site = pair("notify")
    cookie = await site.sign_in()
    await site.warm(cookie)
    session = await site.ask(cookie)
    near = site.nodes[0].engine.near
    assert near is not None
    assert session.version is not None
    older = cast(Any, session)._record
    session["cart"] = 1
    await site.do(session.commit())
    await site.do(site.nodes[0].session(cookie).load())
    copy = _copy(site, cookie)
    before = copy.place
    near.note_place(older, b"12345678")
    assert copy.place == before
    near.note_place(replace(older, version=older.version + 1), b"12345678")
    assert copy.place == b"12345678"


async def test_the_mark_and_the_last_activity_do_not_disturb_each_other(pair: Make) -> None:
    site = pair("block", idle_timeout=timedelta(seconds=100))
    cookie = await site.sign_in()
    await site.warm(cookie)
    copy = _copy(site, cookie)
    mark, seen = copy.place, copy.seen_us
    assert (len(mark), mark == UNMARKED) == (MARK, False)
    site.system.advance(20)
    assert await site.who(cookie) == "ann"
    await site.nodes[0].engine.maintain()
    assert _copy(site, cookie) is copy
    assert (copy.place, copy.seen_us) == (mark, seen + 20_000_000)
    assert (await site.ask(cookie)).subject == "ann"


async def test_a_mark_of_another_process_is_another_mark(pair: Make) -> None:
    site = pair("block")
    cookie = await site.sign_in()
    await site.warm(cookie)
    assert _copy(site, cookie, 0).place != _copy(site, cookie, 1).place


# -- refresh tokens ---------------------------------------------------------------------------------------------------

LONG: dict[str, Any] = {
    "tokens": TokenSettings(),
    "public_url": "https://id.example",
    "idle_timeout": timedelta(days=7),
    "absolute_timeout": timedelta(days=30),
}


async def _refresh(site: Pair, token: str, place: ClientPlace, *, node: int = 0) -> str:
    session = site.nodes[node].session(None, place=place)
    tokens = await site.do(session.refresh(token))
    assert isinstance(tokens.refresh_token, str)
    return tokens.refresh_token


@pytest.mark.parametrize(
    ("outcome", "refusal"), [("step_up", StepUpRequired), ("block", PlaceRefused), ("revoke", SessionEnded)]
)
async def test_a_copied_refresh_token_gets_no_token_elsewhere(
    pair: Make, outcome: Outcome, refusal: type[Exception]
) -> None:
    site = pair(outcome, **LONG)
    cookie = await site.sign_in()
    tokens = await site.do((await site.ask(cookie)).tokens(carrier="body"))
    site.system.advance(60)
    with pytest.raises(refusal):
        await _refresh(site, tokens.refresh_token, AWAY, node=1)
    assert len(site.decided()) == 1


async def test_a_refresh_over_the_other_address_family_survives_a_write_in_between(pair: Make) -> None:
    """The decision is made anew, on a record that was found without a session id."""
    site = pair("block", **LONG)
    cookie = await site.sign_in()
    session = await site.ask(cookie)
    tokens = await site.do(session.tokens(carrier="body"))
    assert session.sid is not None
    ref = cast(Any, session)._record.ref
    site.system.advance(60)

    async def write() -> None:
        await site.store.inner.commit(ref, Changes(put={"cart": "1"}), limits=WIDE)

    site.store.before = ("commit", write)
    await _refresh(site, tokens.refresh_token, HOME_SIX)
    assert [event.data["outcome"] for event in site.decided()] == ["notify"]


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "", "a b", "device;", "ünï", "__Host-Http-session", "__Host-Http-refresh"])
def test_a_device_cookie_that_cannot_tell_browsers_apart_is_refused_by_name(name: str | None) -> None:
    policy, tokens = BindingPolicy(device=True), TokenSettings()
    with pytest.raises(ConfigurationError) as refused:
        Settings(binding=policy, device_cookie=name, tokens=tokens, public_url="https://id.example")
    assert "cookie" in refused.value.detail
