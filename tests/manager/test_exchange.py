"""`session.exchange()` in both colours: what it costs, and what the place of a session has to say."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest

from coatcheck import (
    Forbidden,
    IssuedTokens,
    LoginRequired,
    RefreshInvalid,
    Settings,
    TokenSettings,
)
from coatcheck.core.binding import BindingPolicy, Outcome
from coatcheck.core.ports import Colour, SessionStore
from coatcheck.core.refresh_token import parse_refresh_token
from coatcheck.core.session import SECOND_US
from coatcheck.core.taking_up import session_id_of
from coatcheck.errors import PlaceRefused, SessionEnded, StepUpRequired
from coatcheck.places import ClientPlace
from coatcheck.session import ClearRefresh, SendCookie, SendRefresh
from tests.manager.conftest import Bench, id_of

pytestmark = pytest.mark.anyio

GRACE = 30
HOME = ClientPlace(address="198.51.100.7", user_agent="curl/8")
AWAY = ClientPlace(address="192.0.2.9", user_agent="curl/8")
ON = Settings(
    public_url="https://id.example",
    idle_timeout=timedelta(days=7),
    absolute_timeout=timedelta(days=30),
    tokens=TokenSettings(),
)
OFF = replace(ON, tokens=None)


class Pair:
    """A node with tokens, `issuing`, and nodes with other settings on its store."""

    def __init__(self, colour: Colour) -> None:
        self.issuing = Bench(colour, "memory:", ON)
        self.faces: list[Any] = []

    def node(self, settings: Settings = OFF) -> Any:
        """Another node. The store behind counts its commands."""
        kind = type(self.issuing.coat)
        self.faces.append(
            kind(
                cast(SessionStore, self.issuing.store),
                settings=settings,
                on_event=self.issuing.events,
                system=self.issuing.system,
            )
        )
        return self.faces[-1]

    async def do(self, result: Any) -> Any:
        return await self.issuing.do(result)

    async def issued(self, **more: Any) -> IssuedTokens:
        session = await self.issuing.sign_in("50", **more)
        found: IssuedTokens = await self.do(session.tokens(carrier="body"))
        return found

    async def exchanged(self, node: Any, token: str | None, *, place: ClientPlace | None = None) -> Any:
        session = node.session(None, place=place)
        assert await self.do(session.exchange(token)) is None
        return session


@pytest.fixture
async def pair(colour: Colour) -> AsyncIterator[Pair]:
    made = Pair(colour)
    yield made
    for face in made.faces:
        await made.do(face.close())
    await made.do(made.issuing.coat.close())


async def test_the_session_goes_on_with_its_fields_and_claims(pair: Pair) -> None:
    session = await pair.issuing.sign_in("50", claims={"role": "admin"}, amr=("pwd", "otp"))
    session["cart"] = [7]
    await pair.do(session.commit())
    issued = await pair.do(session.tokens(carrier="body"))
    later = await pair.exchanged(pair.node(), issued.refresh_token)
    assert (later.sid, later.subject, dict(later.claims), later.amr) == (
        issued.sid, "50", {"role": "admin"}, ("pwd", "otp")
    )  # fmt: skip
    assert later["cart"] == [7]
    later["cart"] = [7, 8]
    await pair.do(later.commit())
    anew = await pair.issuing.load(id_of(later))
    assert (anew.sid, anew["cart"]) == (issued.sid, [7, 8])


async def test_it_costs_two_commands_and_the_second_time_one(pair: Pair) -> None:
    issued, node = await pair.issued(), pair.node()
    await pair.do(node.start())
    pair.issuing.system.advance(GRACE)
    for verbs in (["rotate_refresh", "rotate_id"], ["rotate_refresh"]):
        pair.issuing.store.forget()
        await pair.exchanged(node, issued.refresh_token)
        # Half a minute later the keys are looked at again.
        assert [verb for verb in pair.issuing.store.verbs if verb not in ("id_keys", "read_ring")] == verbs


async def test_an_id_that_came_between_the_two_commands_counts_if_it_follows_from_the_same_token(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued, node = await pair.issued(), pair.node()
    await pair.do(node.start())
    token = parse_refresh_token(node.engine.keys, (issued.refresh_token or "").encode())
    assert token is not None
    rotate, made = node.engine.store.rotate_id, []

    async def overtaken(ref: Any, **more: Any) -> Any:
        # Somebody exchanged the token within its grace, when it was not rotated, and is answered only now.
        monkeypatch.undo()
        made.append(
            session_id_of(node.engine.keys, token, ref, authority=more["authority"], server_key=node.engine._server_key)
        )
        await rotate(ref, **{**more, "new_digest": made[0].digest})
        return await rotate(ref, **more)

    monkeypatch.setattr(node.engine.store, "rotate_id", overtaken, raising=False)
    pair.issuing.system.advance(GRACE)
    session = await pair.exchanged(node, issued.refresh_token)
    assert id_of(session) == made[0].text
    assert (await pair.issuing.load(made[0].text)).sid == issued.sid


async def test_a_straggler_whose_successor_has_been_used_takes_nothing_away(pair: Pair) -> None:
    session = await pair.issuing.sign_in("50")
    issued, node = await pair.do(session.tokens(carrier="body")), pair.node()
    pair.issuing.system.advance(GRACE)
    newer = await pair.do(pair.issuing.coat.refresh(issued.refresh_token))
    await pair.do(pair.issuing.coat.refresh(newer.refresh_token))
    with pytest.raises(RefreshInvalid):
        await pair.exchanged(node, issued.refresh_token)
    assert (await pair.issuing.load(id_of(session))).sid == issued.sid
    assert pair.issuing.events.of("refresh.reused") == []


async def test_from_a_session_cookie_it_is_what_tokens_does(pair: Pair) -> None:
    session = pair.node().session(None)
    await pair.do(session.login("50"))
    later = pair.issuing.coat.session(id_of(session))
    issued = await pair.do(later.exchange())
    assert (issued.sid, issued.refresh_token) == (session.sid, None)
    assert isinstance(later.refresh_action, SendRefresh)
    assert later.cookie_action is None


async def test_nothing_to_turn_is_fine_and_nobody_is_not(pair: Pair) -> None:
    node = pair.node()
    session = node.session(None)
    await pair.do(session.login("50"))
    same = node.session(id_of(session))
    assert await pair.do(same.exchange()) is None
    assert (same.sid, same.cookie_action, same.refresh_action) == (session.sid, None, None)
    for nobody in (node.session(None), node.session("x" * 64)):
        with pytest.raises(LoginRequired):
            await pair.do(nobody.exchange())


async def test_an_anonymous_session_gives_way(pair: Pair) -> None:
    issued, node = await pair.issued(), pair.node()
    session = node.session(None)
    await pair.do(session.load())
    session["cart"] = 1
    await pair.do(session.commit())
    later = node.session(id_of(session))
    await pair.do(later.exchange(issued.refresh_token))
    assert (later.sid, "cart" in later) == (issued.sid, False)


async def test_a_session_that_has_ended_gives_way_to_one_that_lives(pair: Pair) -> None:
    issued, node = await pair.issued(), pair.node()
    session = node.session(None)
    await pair.do(session.login("51"))
    ended = id_of(session)
    await pair.do(session.logout())
    later = node.session(ended)
    await pair.do(later.exchange(issued.refresh_token))
    assert (later.sid, later.ended) == (issued.sid, None)


async def test_a_shared_store_without_a_server_key_exchanges_no_refresh_token(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued, node = await pair.issued(), pair.node()
    await pair.do(node.start())
    monkeypatch.setattr(node.engine, "_server_key", None)
    with pytest.raises(RefreshInvalid):
        await pair.exchanged(node, issued.refresh_token)
    # And it was not spent by that.
    monkeypatch.undo()
    pair.issuing.system.advance(GRACE)
    assert (await pair.exchanged(node, issued.refresh_token)).sid == issued.sid


async def test_signing_out_with_a_refresh_token_alone_ends_its_session_where_tokens_are_off(pair: Pair) -> None:
    issued, node = await pair.issued(), pair.node()
    await pair.do(node.session(None).logout(refresh_token=issued.refresh_token))
    with pytest.raises(SessionEnded):
        await pair.exchanged(node, issued.refresh_token)


async def test_a_request_with_an_access_token_is_turned_into_nothing(pair: Pair) -> None:
    issued = await pair.issued()
    kind = type(pair.issuing.coat.session(None))
    bearer = kind(pair.issuing.coat.engine, None, lambda: HOME, bearer=issued.access_token.encode())
    with pytest.raises(Forbidden):
        await pair.do(bearer.exchange())


# Cookies, as a gateway brings them.


def brought(pair: Pair, node: Any, refresh: str | None, place: ClientPlace = HOME) -> Any:
    assert refresh is not None
    kind = type(pair.issuing.coat.session(None))
    return kind(node.engine, None, lambda: place, refresh=refresh.encode())


async def test_the_refresh_cookie_that_was_turned_is_cleared_and_one_beside_a_token_is_not(pair: Pair) -> None:
    one, other, node = await pair.issued(), await pair.issued(), pair.node()
    await pair.do(node.start())
    session = brought(pair, node, one.refresh_token)
    await pair.do(session.load())
    assert session.may_be_taken_up
    assert await pair.do(session.exchange()) is None
    assert isinstance(session.cookie_action, SendCookie)
    assert isinstance(session.refresh_action, ClearRefresh)
    assert not session.may_be_taken_up
    session = brought(pair, node, one.refresh_token)
    await pair.do(session.exchange(other.refresh_token))
    assert (session.sid, session.refresh_action) == (other.sid, None)


async def test_where_tokens_are_on_the_cookie_is_replaced(pair: Pair) -> None:
    issued = await pair.issued()
    session = brought(pair, pair.issuing.coat, issued.refresh_token)
    assert (await pair.do(session.exchange())).sid == issued.sid
    assert isinstance(session.cookie_action, SendCookie)
    assert isinstance(session.refresh_action, SendRefresh)


# Places.


def bound(outcome: Outcome) -> Settings:
    return replace(OFF, binding=BindingPolicy(network="exact", on_mismatch=outcome))


@pytest.mark.parametrize(
    ("outcome", "error"), [("step_up", StepUpRequired), ("block", PlaceRefused), ("revoke", SessionEnded)]
)
async def test_a_refresh_token_in_another_place_gets_no_session(
    pair: Pair, outcome: Outcome, error: type[Exception]
) -> None:
    issued, node = await pair.issued(place=HOME), pair.node(bound(outcome))
    session = node.session(None, place=AWAY)
    with pytest.raises(error):
        await pair.do(session.exchange(issued.refresh_token))
    assert session.cookie_action is None


@pytest.mark.parametrize("place", [HOME, AWAY])
async def test_where_places_are_only_told_about_it_goes_on(pair: Pair, place: ClientPlace) -> None:
    issued, node = await pair.issued(place=HOME), pair.node(bound("notify"))
    later = await pair.exchanged(node, issued.refresh_token, place=place)
    assert later.sid == issued.sid
    assert len(pair.issuing.events.of("risk.decided")) == (place is AWAY)


@pytest.mark.parametrize(("outcome", "error"), [("step_up", StepUpRequired), ("block", PlaceRefused)])
async def test_a_session_that_is_refused_is_not_got_around_by_its_refresh_token(
    pair: Pair, outcome: Outcome, error: type[Exception]
) -> None:
    session = await pair.issuing.sign_in("50", place=HOME)
    issued = await pair.do(session.tokens(carrier="body"))
    node = pair.node(bound(outcome))
    stolen = node.session(id_of(session), place=AWAY)
    with pytest.raises(error):
        await pair.do(stolen.exchange(issued.refresh_token))
    # It was not even spent.
    assert pair.issuing.events.of("refresh.exchanged") == []


# Limits of today.


async def test_a_refresh_under_stricter_limits_knows_who_was_active_when_they_began(pair: Pair) -> None:
    issued, system = await pair.issued(), pair.issuing.system
    # Nothing is noted for hours under an idle timeout of seven days.
    system.advance(timedelta(hours=2))
    strict = pair.node(replace(ON, idle_timeout=timedelta(minutes=30)))
    assert (await pair.do(strict.refresh(issued.refresh_token))).sid == issued.sid


async def test_a_refresh_that_is_over_by_todays_limits_is_over_the_second_time_too(pair: Pair) -> None:
    issued, system = await pair.issued(), pair.issuing.system
    strict = pair.node(replace(ON, idle_timeout=timedelta(minutes=30)))
    system.advance(timedelta(minutes=30))
    for _ in range(2):
        with pytest.raises(SessionEnded) as over:
            await pair.do(strict.refresh(issued.refresh_token))
        assert over.value.reason == "idle_timeout"
    (ended,) = pair.issuing.events.of("session.ended")
    assert (ended.sid, ended.at) == (issued.sid, system.now_us() / SECOND_US)
