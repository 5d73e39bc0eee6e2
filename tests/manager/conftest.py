"""`bench`: a face in either colour, over memory or a SQLite file, with a clock to turn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from inspect import isawaitable
from pathlib import Path
from typing import Any, cast

import pytest

from coatcheck import AsyncCoatcheck, AsyncSession, Coatcheck, Session, SessionFilter, Settings
from coatcheck.core.ports import Colour, SessionStore
from coatcheck.places import ClientPlace
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from coatcheck.testing import CapturedEvents, FakeSystem
from tests.web.faces import Store


class Bench:
    """One node. `do` finishes what a method of either colour returned."""

    def __init__(self, colour: Colour, url: str, settings: Settings) -> None:
        self.colour = colour
        self.system = FakeSystem()
        self.events = CapturedEvents()
        self.store = Store(open_store(url, colour=colour, system=self.system))
        kind = AsyncCoatcheck if colour == "async" else Coatcheck
        self.coat = kind(cast(SessionStore, self.store), settings=settings, on_event=self.events, system=self.system)

    def waits(self) -> bool:
        """Whether the engine has upkeep to do."""
        return self.coat.engine.has_work

    async def do(self, result: Any) -> Any:
        return await result if isawaitable(result) else result

    async def sign_in(self, subject: str, *, place: ClientPlace | None = None, **more: Any) -> Session | AsyncSession:
        session = self.coat.session(None, place=place)
        await self.do(session.login(subject, **more))
        return session

    async def load(self, cookie: str | None) -> Session | AsyncSession:
        session = self.coat.session(cookie)
        await self.do(session.load())
        return session

    async def subjects(self) -> list[str | None]:
        page = await self.do(self.coat.find_sessions(SessionFilter(signed_in=None)))
        return sorted((each.subject for each in page.items), key=str)


def id_of(session: Session | AsyncSession) -> str:
    """The text the browser would get."""
    assert isinstance(session.cookie_action, SendCookie)
    return session.cookie_action.id.text


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    """Both colours."""
    return cast(Colour, request.param)


@pytest.fixture
async def make_bench(colour: Colour) -> AsyncIterator[Callable[..., Bench]]:
    """`make_bench(settings)` over memory."""
    made: list[Bench] = []

    def make(settings: Settings | None = None) -> Bench:
        made.append(Bench(colour, "memory:", settings or Settings()))
        return made[-1]

    yield make
    for bench in made:
        bench.store.away = None
        await bench.do(bench.coat.close())


@pytest.fixture(params=["memory", "sqlite"])
async def bench(request: pytest.FixtureRequest, colour: Colour, tmp_path: Path) -> AsyncIterator[Bench]:
    """A node with ordinary settings."""
    url = "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'sessions.db'}"
    bench = Bench(colour, url, Settings())
    yield bench
    bench.store.away = None
    await bench.do(bench.coat.close())
