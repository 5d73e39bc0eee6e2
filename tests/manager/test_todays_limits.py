"""The stricter of the limits of the sign-in and of today counts: to the microsecond, near copies too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from coatcheck import Settings
from coatcheck.core.ports import Colour
from coatcheck.core.profiles import PROFILES
from coatcheck.server.settings import ServerSettings
from tests.manager.conftest import Bench, id_of

pytestmark = pytest.mark.anyio

MICROSECOND = timedelta(microseconds=1)
MINUTE = timedelta(minutes=1)
LONG = Settings(idle_timeout=timedelta(hours=1), absolute_timeout=timedelta(hours=4))


class Switch:
    """Two nodes on one store: `old` with the settings of the sign-in, and one with other settings beside it."""

    def __init__(self, colour: Colour, settings: Settings) -> None:
        self.old = Bench(colour, "memory:", settings)
        self.faces: list[Any] = []

    def today(self, settings: Settings) -> Any:
        """A face on the same store. It keeps near copies as far as the settings let it."""
        kind = type(self.old.coat)
        # Its own near copies stand before the very store, not before the wrapped one that counts.
        inner = self.old.store.inner
        self.faces.append(kind(inner, settings=settings, system=self.old.system))
        return self.faces[-1]

    async def end_of(self, face: Any, cookie: str) -> str | None:
        """Why the session has ended for this face; None while it is alive."""
        session = face.session(cookie)
        await self.old.do(session.load())
        if session.is_signed_in:
            return None
        return "?" if session.ended is None else str(session.ended.reason)


@pytest.fixture
async def make_switch(colour: Colour) -> AsyncIterator[Callable[[Settings], Switch]]:
    """`make_switch(settings of the sign-in)`."""
    made: list[Switch] = []

    def make(settings: Settings) -> Switch:
        made.append(Switch(colour, settings))
        return made[-1]

    yield make
    for switch in made:
        for face in switch.faces:
            await switch.old.do(face.close())
        await switch.old.do(switch.old.coat.close())


@pytest.mark.parametrize("near_copies", [0, 1000])
@pytest.mark.parametrize(
    ("changes", "lives", "reason"),
    [
        ({"idle_timeout": 10 * MINUTE}, 10 * MINUTE, "idle_timeout"),
        ({"idle_timeout": 10 * MINUTE, "absolute_timeout": 10 * MINUTE}, 10 * MINUTE, "absolute_timeout"),
        ({"idle_timeout": 3 * 60 * MINUTE}, 60 * MINUTE, "idle_timeout"),
        ({"idle_timeout": 60 * MINUTE, "absolute_timeout": 24 * 60 * MINUTE}, 60 * MINUTE, "idle_timeout"),
    ],
    ids=["idle tightened", "absolute tightened", "idle loosened", "absolute loosened"],
)
async def test_the_stricter_limit_ends_a_session_to_the_microsecond(
    make_switch: Callable[[Settings], Switch],
    near_copies: int,
    changes: dict[str, timedelta],
    lives: timedelta,
    reason: str,
) -> None:
    switch = make_switch(LONG)
    cookie = id_of(await switch.old.sign_in("50"))
    today = switch.today(replace(LONG, near_copies=near_copies, **changes))  # type: ignore[arg-type]
    assert await switch.end_of(today, cookie) is None
    switch.old.system.advance(lives)
    assert await switch.end_of(today, cookie) == reason


@pytest.mark.parametrize("near_copies", [0, 1000])
async def test_a_microsecond_before_the_stricter_limit_a_session_lives(
    make_switch: Callable[[Settings], Switch], near_copies: int
) -> None:
    switch = make_switch(LONG)
    cookie = id_of(await switch.old.sign_in("50"))
    today = switch.today(replace(LONG, near_copies=near_copies, idle_timeout=10 * MINUTE))
    switch.old.system.advance(10 * MINUTE - MICROSECOND)
    assert await switch.end_of(today, cookie) is None


async def test_who_is_inside_the_new_limits_stays_through_a_switch_and_back(
    make_switch: Callable[[Settings], Switch],
) -> None:
    admin = replace(ServerSettings(profile="admin").sessions(None), journal=None)
    b2c = replace(ServerSettings(profile="b2c").sessions(None), journal=None)
    switch = make_switch(admin)
    cookie = id_of(await switch.old.sign_in("50"))
    loose, strict = switch.today(b2c), switch.today(admin)
    for _ in range(3):
        switch.old.system.advance(28 * MINUTE)
        assert await switch.end_of(loose, cookie) is None
        switch.old.system.advance(28 * MINUTE)
        assert await switch.end_of(strict, cookie) is None
    # Loosening is for new sign-ins: this session keeps the timeout it was given.
    switch.old.system.advance(PROFILES["admin"].idle_timeout)
    assert await switch.end_of(loose, cookie) == "idle_timeout"
    cookie = id_of(await switch.old.sign_in("50"))
    switch.old.system.advance(PROFILES["admin"].idle_timeout - MICROSECOND)
    assert await switch.end_of(loose, cookie) is None


async def test_a_session_of_a_looser_profile_ends_with_the_stricter_one_and_its_near_copy_too(
    make_switch: Callable[[Settings], Switch],
) -> None:
    admin = replace(ServerSettings(profile="admin").sessions(None), journal=None)
    b2c = replace(ServerSettings(profile="b2c").sessions(None), journal=None)
    switch = make_switch(b2c)
    cookie = id_of(await switch.old.sign_in("50"))
    strict = switch.today(admin)
    for _ in range(24):
        switch.old.system.advance(timedelta(minutes=29))
        assert await switch.end_of(strict, cookie) is None
    switch.old.system.advance(timedelta(hours=12) - 24 * timedelta(minutes=29) - MICROSECOND)
    assert await switch.end_of(strict, cookie) is None
    switch.old.system.advance(MICROSECOND)
    assert await switch.end_of(strict, cookie) == "absolute_timeout"
    assert await switch.end_of(switch.old.coat, cookie) is None, "a node of the looser profile goes on"


async def test_who_was_active_under_a_lazy_profile_is_not_signed_out_by_a_strict_one(
    make_switch: Callable[[Settings], Switch],
) -> None:
    """Under a timeout of 7 days a use of hours ago need not be written; the switch must not end it."""
    admin = replace(ServerSettings(profile="admin").sessions(None), journal=None)
    switch = make_switch(replace(ServerSettings(profile="b2c").sessions(None), journal=None))
    used, forgotten = id_of(await switch.old.sign_in("50")), id_of(await switch.old.sign_in("51"))
    switch.old.system.advance(timedelta(hours=5))
    assert await switch.end_of(switch.old.coat, used) is None
    strict = switch.today(admin)
    switch.old.system.advance(timedelta(minutes=29))
    assert await switch.end_of(strict, used) is None
    switch.old.system.advance(timedelta(minutes=1))
    assert await switch.end_of(strict, forgotten) == "idle_timeout"
    switch.old.system.advance(timedelta(minutes=28))
    assert await switch.end_of(strict, used) is None


async def test_a_session_says_under_which_profile_it_was_signed_in(make_switch: Callable[[Settings], Switch]) -> None:
    switch = make_switch(replace(ServerSettings(profile="b2c").sessions(None), journal=None))
    cookie = id_of(await switch.old.sign_in("50"))
    session = switch.old.coat.session(cookie)
    await switch.old.do(session.load())
    assert (session._authority.profile, session._authority.profile_version) == ("b2c", 1)
