"""The tools for the tests of applications."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck import AsyncCoatcheck, Coatcheck
from coatcheck.testing import CapturedEvents, FakeSystem, async_login_as, command_budget, login_as
from coatcheck.web.starlette import CoatcheckMiddleware


def test_the_fake_clock_moves_when_told() -> None:
    system = FakeSystem(start_us=1_000_000)
    system.advance(1.5)
    system.advance(timedelta(seconds=1))
    assert (system.now_us(), system.elapsed()) == (3_500_000, 2.5)
    system.step_clock(-3)
    system.step_clock(timedelta(seconds=1))
    assert (system.now_us(), system.elapsed()) == (1_500_000, 2.5)
    with pytest.raises(ValueError, match="step_clock"):
        system.advance(-1)


def test_fake_randomness_repeats_between_systems_and_never_within_one() -> None:
    first, second, third = FakeSystem(), FakeSystem(), FakeSystem(seed=b"other")
    drawn = [first.random(32) for _ in range(100)]
    assert len(set(drawn)) == 100
    assert drawn == [second.random(32) for _ in range(100)]
    assert third.random(32) not in drawn
    assert len(first.random(7)) == 7


def test_captured_events_can_be_asked() -> None:
    events = CapturedEvents()
    with Coatcheck("memory:", on_event=events) as coat:
        coat.session(None).login("50")
        coat.revoke_subject("50", reason="x")
    assert events.kinds() == ["session.signed_in", "session.ended"]
    assert [event.subject for event in events.of("session.ended")] == ["50"]
    events.clear()
    assert events.all == []


def sign_in_twice(coat: Coatcheck, at_most: int) -> None:
    with command_budget(coat, at_most):
        coat.session(None).login("50")
        coat.session(None).login("50")


def fail_inside(coat: Coatcheck) -> None:
    with command_budget(coat, 0):
        coat.session(None).login("50")
        raise ZeroDivisionError


def test_a_budget_fails_when_it_is_passed_and_names_the_commands() -> None:
    with Coatcheck("memory:") as coat:
        with command_budget(coat, 1) as counted:
            coat.session(None).login("50")
        assert counted.verbs == ["admit"]
        store = coat.engine.store
        with pytest.raises(AssertionError, match="2 store commands, 1 allowed: admit, admit"):
            sign_in_twice(coat, 1)
        with pytest.raises(ZeroDivisionError):
            fail_inside(coat)
        assert coat.engine.store is store


async def whoami(request: Request) -> Response:
    return PlainTextResponse(request.user.identity)


@pytest.fixture
def coat() -> Iterator[AsyncCoatcheck]:
    coat = AsyncCoatcheck("memory:")
    yield coat
    asyncio.run(coat.close())


def test_login_as_signs_a_client_in(coat: AsyncCoatcheck) -> None:
    app = Starlette(routes=[Route("/", whoami)])
    app.add_middleware(CoatcheckMiddleware, coat=coat)
    with TestClient(app, base_url="https://testserver") as client:
        first = login_as(client, coat, "50", claims={"role": "admin"}, scopes=["read"])
        assert client.get("/").text == "50"
        second = login_as(client, coat, "51")
        assert client.get("/").text == "51"
        assert first != second
        assert len(list(client.cookies.jar)) == 1


@pytest.mark.anyio
async def test_async_login_as_signs_a_client_in() -> None:
    async with AsyncCoatcheck("memory:") as coat:
        client = TestClient(Starlette(), base_url="https://app.example")
        sid = await async_login_as(client, coat, "50")
        [cookie] = list(client.cookies.jar)
        assert (cookie.name, cookie.domain) == ("__Host-Http-session", "app.example")
        [summary] = (await coat.list_sessions("50")).items
        assert summary.sid == sid
