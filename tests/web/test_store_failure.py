"""The store goes away and comes back: who does not touch the session does not notice, nobody is signed out."""

from __future__ import annotations

from typing import Any

import pytest

from coatcheck import SessionLimit, Settings, StoreUnavailable
from tests.web.faces import Answer, Ask, Browser, Reply, World
from tests.web.test_required_behaviours import signed_in, standard

pytestmark = pytest.mark.anyio
ALL: frozenset[str] = frozenset()


def is_503(answer: Answer) -> bool:
    assert answer.status == 503
    assert answer.problem["code"] == "store_unavailable"
    assert answer.one("retry-after") == "1"
    assert answer.one("cache-control") == "no-store"
    return answer.all("set-cookie") == []


async def test_a_view_that_does_not_touch_the_session_answers_during_the_outage(world: World) -> None:
    # R6
    standard(world)
    browser = await signed_in(world)
    cookie = browser.cookie
    world.store.away = ALL
    answer = await browser.get("/static")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "same for all", [])
    assert browser.cookie == cookie


@pytest.mark.parametrize("path", ["/who", "/cart", "/rotate"])
async def test_a_view_that_touches_the_session_is_told_to_come_back(world: World, path: str) -> None:
    # R6
    standard(world)
    browser = await signed_in(world)
    world.events.clear()
    world.store.away = ALL
    assert is_503(await browser.post(path))
    assert "store.unavailable" in world.events.kinds()


async def test_after_the_outage_the_same_cookie_is_still_signed_in(world: World) -> None:
    # R7
    standard(world)
    browser = await signed_in(world)
    cookie = browser.cookie
    world.store.away = ALL
    assert is_503(await browser.get("/who"))
    world.store.away = None
    assert (await browser.get("/who")).text == "50"
    assert browser.cookie == cookie


async def test_a_commit_that_fails_answers_503_instead_of_a_lie(world: World) -> None:
    standard(world)
    browser = await signed_in(world)
    world.store.away = frozenset({"commit", "create"})
    assert is_503(await browser.post("/cart"))
    assert is_503(await world.browser().post("/cart"))
    world.store.away = None
    assert (await browser.get("/see")).text == "{}"


async def test_a_sign_in_during_the_outage_sets_no_cookie(world: World) -> None:
    standard(world)
    await world.coat.engine.ready()
    world.store.away = ALL
    browser = world.browser()
    assert is_503(await browser.post("/login"))
    assert browser.cookie is None


async def test_a_sign_out_during_the_outage_clears_the_cookie_and_admits_that_it_failed(world: World) -> None:
    # SEMANTICS 11: where the sign-out cannot be kept it is a 503 with the cookie cleared.
    standard(world)
    browser = await signed_in(world)
    world.store.away = ALL
    answer = await browser.post("/logout")
    assert answer.status == 503
    assert answer.one("retry-after") == "1"
    assert browser.cookie is None


async def test_a_view_may_catch_the_failure_and_answer_itself(small: World) -> None:
    standard(small)

    @small.view("/robust")
    async def robust(ask: Ask) -> str:
        try:
            return str((await ask.load()).subject)
        except StoreUnavailable:
            return "try later"

    browser = await signed_in(small)
    small.store.away = ALL
    answer = await browser.get("/robust")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "try later", [])
    assert answer.one("cache-control") == "no-store"


async def test_a_framework_that_turns_the_failure_into_a_500_is_corrected(small: World) -> None:
    standard(small)

    @small.view("/swallowed")
    async def swallowed(ask: Ask) -> Reply:
        try:
            await ask.load()
        except StoreUnavailable:
            return Reply(status=500, body="Internal Server Error")
        raise AssertionError

    browser = await signed_in(small)
    small.store.away = ALL
    assert is_503(await browser.get("/swallowed"))


async def test_a_sign_in_whose_answer_never_came_is_ended_by_the_upkeep(world: World) -> None:
    standard(world)
    await world.coat.engine.ready()
    world.store.answers_lost = frozenset({"admit"})
    browser = world.browser()
    assert is_503(await browser.post("/login"))
    page = await world.do(world.coat.list_sessions("50"))
    assert len(page.items) == 1, "the store has made a session of which nobody holds the id"
    world.store.answers_lost = frozenset()
    assert world.coat.engine.has_work
    await world.maintain()
    assert (await world.do(world.coat.list_sessions("50"))).items == ()
    assert not world.coat.engine.has_work


async def test_a_sign_in_that_cannot_end_the_old_subject_is_taken_back(small: World) -> None:
    standard(small)

    @small.view("/other")
    async def other(ask: Ask) -> str:
        await ask.do(ask.session.login("51"))
        return "in"

    browser = await signed_in(small)
    small.store.away = frozenset({"revoke"})
    assert is_503(await browser.post("/other"))
    # The first attempt to take it back failed as well: the upkeep does it.
    assert len((await small.do(small.coat.list_sessions("51"))).items) == 1
    small.store.away = None
    await small.maintain()
    assert (await small.do(small.coat.list_sessions("51"))).items == ()
    assert (await browser.get("/who")).text == "50"


async def test_a_sign_in_over_an_anonymous_session_stands_when_the_latter_cannot_be_ended(small: World) -> None:
    standard(small)
    browser = small.browser()
    await browser.post("/cart")
    small.store.away = frozenset({"revoke"})
    assert (await browser.post("/login")).status == 200
    small.store.away = None
    assert (await browser.get("/who")).text == "50"


async def test_activity_that_cannot_be_written_does_not_stop_the_request(small: World) -> None:
    standard(small)
    browser = await signed_in(small)
    # The last tenth of the idle timeout: written at once, if it can be.
    small.advance(small.settings.idle_timeout.total_seconds() * 0.95)
    small.store.away = frozenset({"touch"})
    assert (await browser.get("/who")).text == "50"
    small.store.away = None
    await small.maintain()
    small.advance(small.settings.idle_timeout.total_seconds() * 0.5)
    assert (await browser.get("/who")).text == "50"


async def test_the_first_contact_may_fail_and_the_next_one_succeeds(small: World) -> None:
    standard(small)
    small.store.away = ALL
    browser = Browser(small.face, "A" * 64)
    assert is_503(await browser.get("/who"))
    small.store.away = None
    assert (await browser.get("/who")).text == "None"


async def test_a_limit_that_refuses_names_the_open_sessions(make_world: Any) -> None:
    world: World = make_world(Settings(limit=SessionLimit(maximum=1, on_reached="refuse")))
    standard(world)
    browser = await signed_in(world)
    answer = await world.browser().post("/login")
    assert (answer.status, answer.problem["code"], answer.problem["ask"]) == (409, "session_limit", False)
    [open_one] = (await world.do(world.coat.list_sessions("50"))).items
    assert answer.problem["sessions"] == [{"sid": open_one.sid}]
    assert "session.limit_reached" in world.events.kinds()
    assert (await browser.get("/who")).text == "50"
