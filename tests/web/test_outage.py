"""The store is away behind a gateway: what each policy answers, which path has which, what becomes of cookies."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck import AsyncCoatcheck, ConfigurationError, Principal, Settings
from coatcheck.core.ports import Colour
from coatcheck.core.profiles import OutagePolicy
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem, async_login_as
from coatcheck.web import asgi, starlette, wsgi
from coatcheck.web.fastapi import Auth
from tests.docs.test_how_to import Desk, Page, client
from tests.docs.test_how_to import desk as desk
from tests.manager.test_outage import GRACE, LEASE, STEP, NoKeeper, Removable, Silence, was_never_used
from tests.manager.test_outage import journal as journal
from tests.manager.test_outage import silence as silence
from tests.web.faces import Answer, AsgiFace, Ask, Browser, Reply, Store, View, World, WsgiFace
from tests.web.test_required_behaviours import signed_in, standard

pytestmark = pytest.mark.anyio

NOWHERE: Mapping[str, OutagePolicy] = {}


class Views(dict[str, View]):
    """Views by path; a path without one answers who is asking."""

    def __missing__(self, path: str) -> View:
        return self["/who"]


class Outpost(World):
    """A world whose store can be taken away together with its feed."""

    def __init__(self, colour: Colour, outage: Mapping[str, OutagePolicy], settings: Settings) -> None:
        super().__init__(
            colour, lambda colour, system: open_store("memory:", colour=colour, system=system), settings=settings
        )
        self.removable = Removable(self.store.inner, self.system)
        self.store = cast(Store, self.removable)
        self.coat = self.another()
        self.coat._keeper = NoKeeper()
        self.views = Views()
        standard(self)
        self.face = self.gateway(outage)

        @self.view("/outage")
        async def outage_of(ask: Ask) -> str:
            return str((await ask.load()).through_outage)

        @self.view("/leave")
        async def leave(ask: Ask) -> Reply:
            await ask.do(ask.session.logout())
            # As a template does that greets whoever is there.
            return Reply(202 if ask.session.logout_pending else 200, body=str(ask.session.subject))

    def gateway(self, outage: Mapping[str, OutagePolicy]) -> AsgiFace | WsgiFace:
        if isinstance(self.coat, AsyncCoatcheck):
            return AsgiFace(asgi.CoatcheckMiddleware(self._asgi_app, self.coat, outage=outage))
        return WsgiFace(wsgi.CoatcheckMiddleware(self._wsgi_app, self.coat, outage=outage))

    async def warm(self) -> Browser:
        """Somebody who is signed in and whom this process knows."""
        browser = await signed_in(self)
        assert (await browser.get("/who")).text == "50"
        self.removable.verbs.clear()
        return browser

    def take_away(self, silence: Silence = "cut") -> None:
        """The store is away, and the lease has run out."""
        self.removable.take_away(silence)
        self.system.advance(LEASE)

    async def close(self) -> None:
        self.removable.bring_back()
        await self.do(self.coat.close())


MakeOutpost = Callable[..., Outpost]


@pytest.fixture(params=["blocking", "async"], ids=["wsgi", "asgi"])
async def make_outpost(request: pytest.FixtureRequest) -> AsyncIterator[MakeOutpost]:
    """`make_outpost(outage={...}, **settings)`: an application behind either gateway."""
    made: list[Outpost] = []

    def make(policy: OutagePolicy = "refuse", *, paths: Mapping[str, OutagePolicy] = NOWHERE, **more: Any) -> Outpost:
        made.append(Outpost(request.param, paths, Settings(server_key=b"k" * 32, outage=policy, **more)))
        return made[-1]

    yield make
    for outpost in made:
        await outpost.close()


def is_refused(answer: Answer) -> bool:
    """Whether this is the 503 that costs nobody a cookie."""
    if answer.status != 503:
        return False
    assert answer.problem["code"] == "store_unavailable"
    assert answer.one("retry-after") == "1"
    assert answer.one("cache-control") == "no-store"
    return answer.all("set-cookie") == []


def clears(answer: Answer) -> bool:
    """Whether the answer deletes the session cookie and does nothing else to cookies."""
    (line,) = answer.all("set-cookie")
    return "Max-Age=0" in line.split("; ")


# -- the three policies ----------------------------------------------------------------------------------------------


async def test_refuse_is_503_and_costs_nobody_a_cookie(make_outpost: MakeOutpost, silence: Silence) -> None:
    outpost = make_outpost()
    browser = await outpost.warm()
    cookie = browser.cookie
    outpost.take_away(silence)
    for path in ("/who", "/cart", "/rotate", "/login"):
        assert is_refused(await browser.post(path)), path
    assert is_refused(await browser.get("/who"))
    assert browser.cookie == cookie
    outpost.removable.bring_back()
    assert (await browser.get("/who")).text == "50"


@pytest.mark.parametrize("policy", ["refuse", "near", "anonymous"])
async def test_a_request_that_never_touches_its_session_never_notices(
    make_outpost: MakeOutpost, silence: Silence, policy: OutagePolicy
) -> None:
    outpost = make_outpost(policy)
    browser = await outpost.warm()
    outpost.take_away(silence)
    answer = await browser.post("/static")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "same for all", [])
    assert outpost.removable.verbs == []
    assert outpost.events.of("store.unavailable") == []


async def test_near_serves_the_copy_until_the_grace_is_over(make_outpost: MakeOutpost, silence: Silence) -> None:
    outpost = make_outpost("near")
    browser = await outpost.warm()
    cookie = browser.cookie
    outpost.take_away(silence)
    for remaining in (GRACE, STEP):
        outpost.system.advance(0 if remaining == GRACE else GRACE - STEP)
        answer = await browser.get("/outage")
        assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "True", [])
    outpost.system.advance(STEP)
    assert is_refused(await browser.get("/outage"))
    assert browser.cookie == cookie
    outpost.removable.bring_back()
    assert (await browser.get("/outage")).text == "False"


async def test_near_writes_nothing_and_signs_nobody_in(make_outpost: MakeOutpost, silence: Silence) -> None:
    outpost = make_outpost("near")
    browser, other = await outpost.warm(), outpost.browser()
    outpost.take_away(silence)
    assert is_refused(await browser.post("/login"))
    assert is_refused(await browser.post("/cart"))
    assert is_refused(await other.post("/login"))
    assert is_refused(await other.post("/cart"))


async def test_a_page_that_only_shows_sends_one_command_at_most_through_an_outage(
    make_outpost: MakeOutpost, silence: Silence, journal: Path
) -> None:
    outpost = make_outpost("near", journal=journal)
    browser = await outpost.warm()
    outpost.take_away(silence)
    for _ in range(3):
        outpost.removable.verbs.clear()
        assert (await browser.get("/who")).text == "50"
        assert len(outpost.removable.verbs) <= 1
    assert was_never_used(journal)


async def test_a_page_that_only_shows_asks_nothing_within_the_lease(make_outpost: MakeOutpost, journal: Path) -> None:
    outpost = make_outpost("near", journal=journal)
    browser = await outpost.warm()
    outpost.removable.take_away("frozen")
    assert (await browser.get("/who")).text == "50"
    assert outpost.removable.verbs == []


async def test_anonymous_shows_the_page_of_nobody_and_keeps_the_cookie(
    make_outpost: MakeOutpost, silence: Silence
) -> None:
    outpost = make_outpost("anonymous")
    browser = await outpost.warm()
    cookie = browser.cookie
    outpost.take_away(silence)
    answer = await browser.get("/who")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "None", [])
    assert (await browser.get("/see")).text == "{}"
    assert browser.cookie == cookie
    outpost.removable.bring_back()
    assert (await browser.get("/who")).text == "50"


async def test_anonymous_writes_nothing_and_signs_nobody_in(make_outpost: MakeOutpost, silence: Silence) -> None:
    outpost = make_outpost("anonymous")
    browser, other = await outpost.warm(), outpost.browser()
    outpost.take_away(silence)
    for each in (browser, other):
        assert is_refused(await each.post("/cart"))
        assert is_refused(await each.get("/cart"))
        assert is_refused(await each.post("/login"))


# -- paths -----------------------------------------------------------------------------------------------------------

PATHS: Mapping[str, OutagePolicy] = {
    "/shop": "near",
    "/shop/admin": "refuse",
    "/shop/admin/help": "anonymous",
    "/news/": "anonymous",
}


@pytest.mark.parametrize("settled", ["refuse", "near", "anonymous"])
@pytest.mark.parametrize("paths", [PATHS, dict(reversed(list(PATHS.items())))], ids=["short first", "long first"])
async def test_the_longest_path_wins_over_the_settings(
    make_outpost: MakeOutpost, settled: OutagePolicy, paths: Mapping[str, OutagePolicy]
) -> None:
    outpost = make_outpost("near", paths={**paths, "/": settled})
    browser = await outpost.warm()
    outpost.take_away()

    async def policy(path: str) -> str:
        answer = await browser.get(path)
        return "refuse" if is_refused(answer) else {"50": "near", "None": "anonymous"}[answer.text]

    assert await policy("/who") == settled
    assert await policy("/shop") == await policy("/shop/") == await policy("/shop/coat/7") == "near"
    assert await policy("/shop/admin") == await policy("/shop/admin/users") == "refuse"
    assert await policy("/shop/admin/help") == await policy("/shop/admin/help/me") == "anonymous"
    assert await policy("/news/today") == "anonymous"
    # Another name, however it begins.
    assert await policy("/shopping") == settled
    assert await policy("/shop/administration") == "near"


@pytest.mark.parametrize(
    "path",
    [
        "/shop/../who",
        "/shop/./coat",
        "/shop/..",
        "//shop",
        "/shop//admin",
        "/shop/%61dmin",
        "/shop%2fadmin",
        "/shop\\admin",
        "/who/..\\shop",
    ],
)
@pytest.mark.parametrize("otherwise", ["near", "anonymous"])
async def test_a_path_that_may_mean_something_else_is_refused(
    make_outpost: MakeOutpost, path: str, otherwise: OutagePolicy
) -> None:
    outpost = make_outpost("near", paths={**PATHS, "/": otherwise})
    browser = await outpost.warm()
    assert (await browser.get(path)).text == "50"
    outpost.take_away()
    assert is_refused(await browser.get(path))


@pytest.mark.parametrize("settled", ["refuse", "anonymous"])
async def test_near_for_a_path_alone_is_refused_because_nobody_could_tell_the_reach(
    make_outpost: MakeOutpost, settled: OutagePolicy
) -> None:
    with pytest.raises(ConfigurationError, match="outage: near on a path needs"):
        make_outpost(settled, paths={"/shop": "near"})


@pytest.mark.parametrize(
    "paths", [{"shop": "near"}, {"": "near"}, {"/shop": "open"}, {"/shop": ""}, {"/shop": None}], ids=str
)
async def test_paths_that_make_no_sense_are_refused_when_they_are_given(
    make_outpost: MakeOutpost, paths: Mapping[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match="outage"):
        make_outpost(paths=paths)


def test_settings_check_the_policy_and_its_grace() -> None:
    for wrong in (
        {"outage": "open"},
        {"outage": "near", "near_copies": 0},
        {"outage_grace": timedelta(seconds=-1)},
        {"outage_grace": timedelta(hours=1, microseconds=1)},
        {"lease": timedelta(milliseconds=99)},
        {"lease": timedelta(seconds=61)},
    ):
        more: dict[str, Any] = wrong
        with pytest.raises(ConfigurationError, match=next(iter(wrong))):
            Settings(**more)
    assert Settings(outage="near", outage_grace=timedelta(0)).outage_grace == timedelta(0)


# -- signing out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["refuse", "near", "anonymous"])
async def test_a_sign_out_is_kept_and_the_view_may_say_so(
    make_outpost: MakeOutpost, silence: Silence, policy: OutagePolicy, journal: Path
) -> None:
    outpost = make_outpost(policy, journal=journal)
    browser = await outpost.warm()
    tab = Browser(outpost.face, browser.cookie)
    outpost.take_away(silence)
    answer = await browser.post("/leave")
    assert (answer.status, answer.text) == (202, "None")
    assert clears(answer)
    assert browser.cookie is None
    # Another tab with the old cookie: refused here at once, and nobody touches its cookie.
    after = await tab.get("/who")
    assert (after.status, after.text, after.all("set-cookie")) == (200, "None", [])
    outpost.removable.bring_back()
    assert (await tab.get("/who")).text == "None"


@pytest.mark.parametrize("policy", ["refuse", "near", "anonymous"])
async def test_a_sign_out_that_cannot_be_kept_is_503_with_the_cookie_cleared(
    make_outpost: MakeOutpost, silence: Silence, policy: OutagePolicy
) -> None:
    outpost = make_outpost(policy)
    browser = await outpost.warm()
    tab = Browser(outpost.face, browser.cookie)
    outpost.take_away(silence)
    answer = await browser.post("/leave")
    assert (answer.status, answer.problem["code"], answer.one("retry-after")) == (503, "store_unavailable", "1")
    assert clears(answer)
    outpost.removable.bring_back()
    # Nobody has promised anything: the session lives, and the browser has let go of it.
    assert (await tab.get("/who")).text == "50"


async def test_a_sign_out_on_a_path_of_its_own_policy_is_kept_as_well(make_outpost: MakeOutpost, journal: Path) -> None:
    outpost = make_outpost("near", paths={"/leave": "anonymous", "/who": "refuse"}, journal=journal)
    browser = await outpost.warm()
    tab = Browser(outpost.face, browser.cookie)
    outpost.take_away()
    assert (await browser.post("/leave")).status == 202
    outpost.removable.bring_back()
    await outpost.maintain()
    assert (await tab.get("/who")).text == "None"


async def test_two_cookies_of_one_name_are_both_signed_out(make_outpost: MakeOutpost, journal: Path) -> None:
    """Cookie tossing: neither counts, and nobody who signs out is told so while one of them lives on."""
    outpost = make_outpost("anonymous", journal=journal)
    one, other = await outpost.warm(), await outpost.warm()
    tossed = Browser(outpost.face, f"{one.cookie}; {one.name}={other.cookie}")
    outpost.take_away()
    assert (await tossed.post("/leave")).status == 202
    outpost.removable.bring_back()
    await outpost.maintain()
    for each in (one, other):
        assert (await each.get("/who")).text == "None"


# -- Starlette -------------------------------------------------------------------------------------------------------


def test_starlette_s_own_names_follow_the_policy_of_their_path() -> None:
    settings = Settings(server_key=b"k" * 32, public_url="https://testserver", outage="near")
    outpost = Outpost("async", NOWHERE, settings)
    coat = cast(AsyncCoatcheck, outpost.coat)

    def who(request: Request) -> Response:
        return JSONResponse({"who": request.user.identity, "scopes": list(request.auth.scopes)})

    def still(request: Request) -> Response:
        return JSONResponse({})

    app = Starlette(routes=[Route(path, who) for path in ("/near", "/anonymous", "/refuse")] + [Route("/still", still)])
    app.add_middleware(
        starlette.CoatcheckMiddleware, coat=coat, outage={"/refuse": "refuse", "/anonymous": "anonymous"}
    )
    with TestClient(app, base_url="https://testserver") as browser:
        assert browser.portal is not None
        browser.portal.call(_sign_in, browser, coat)
        assert browser.get("/near").json() == {"who": "50", "scopes": ["authenticated"]}
        outpost.take_away()
        assert browser.get("/near").json() == {"who": "50", "scopes": ["authenticated"]}
        assert browser.get("/anonymous").json() == {"who": "", "scopes": []}
        assert browser.get("/still").status_code == 200
        refused = browser.get("/refuse")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert "set-cookie" not in refused.headers
        outpost.removable.bring_back()
        assert browser.get("/refuse").json()["who"] == "50"


def test_fastapi_s_routes_follow_the_policy_of_their_path() -> None:
    settings = Settings(server_key=b"k" * 32, public_url="https://testserver", outage="near")
    outpost = Outpost("async", NOWHERE, settings)
    coat = cast(AsyncCoatcheck, outpost.coat)
    auth, app = Auth(coat), FastAPI()
    auth.install(app, outage={"/refuse": "refuse", "/anonymous": "anonymous"})

    async def who(user: Principal | None = Depends(auth.optional_user)) -> dict[str, str | None]:
        return {"who": None if user is None else user.subject}

    for path in ("/near", "/anonymous", "/refuse"):
        app.get(path)(who)
    with TestClient(app, base_url="https://testserver") as browser:
        assert browser.portal is not None
        browser.portal.call(_sign_in, browser, coat)
        assert browser.get("/near").json() == {"who": "50"}
        outpost.take_away()
        assert browser.get("/near").json() == {"who": "50"}
        assert browser.get("/anonymous").json() == {"who": None}
        refused = browser.get("/refuse")
        assert (refused.status_code, "set-cookie" in refused.headers) == (503, False)


async def _sign_in(browser: TestClient, coat: AsyncCoatcheck) -> None:
    await async_login_as(browser, coat, "50")


# -- the how-to page ---------------------------------------------------------------------------------------------------

PAGE = Page("when-the-store-is-away.md")


def test_every_block_of_the_page_is_one_of_those_that_are_run() -> None:
    assert PAGE.names() == ["settings.py", "shop.py"]
    assert PAGE.lines() == ["coatcheck doctor --profile b2c --outage near --outage-grace 30"]


def test_the_shop_of_the_page_goes_through_an_outage_as_the_page_says(desk: Desk) -> None:
    for name in PAGE.names():
        desk.write(PAGE.files(name)[0])
    settings, shop = desk.load("settings", "shop")
    near = settings.coat.engine.near
    with client(shop.app, "https://shop.example") as browser, client(shop.app, "https://shop.example") as thief:
        assert browser.post("/login").status_code == 200
        assert browser.get("/").json() == {"shelf": [], "of": "50"}
        assert browser.post("/pay").json() == {"paid": True}
        thief.cookies.update(browser.cookies)
        # Real time passes here: nothing waits for it, the line of the feed is cut.
        here, near.behind = near.behind, Removable(near.behind, FakeSystem())
        near.behind.take_away()
        assert browser.portal is not None
        browser.portal.call(near._feed.close)
        near._feed, feed = NoFeed(), near._feed
        assert browser.get("/").json()["of"] == "50"
        assert browser.get("/about").json()["of"] is None
        assert browser.get("/account").status_code == 503
        assert browser.post("/pay").status_code == 503
        assert thief.get("/").json()["of"] == "50"
        assert browser.post("/login").status_code == 503
        answer = browser.post("/logout")
        assert (answer.status_code, answer.json()) == (202, {"message": "bye"})
        assert thief.get("/").json()["of"] is None
        near.behind, near._feed = here, feed
        assert thief.get("/").json()["of"] is None
        assert (desk.directory / "sign-outs").is_dir()


class NoFeed:
    """The feed of a store that is away."""

    def line(self, tag: int) -> None:
        return None

    async def renew(self, tag: int) -> None:
        return None

    async def beat(self) -> None:
        """Nobody answers."""

    async def close(self) -> None:
        """There is nothing to let go of."""


def test_doctor_prints_the_reach_that_the_page_names(desk: Desk) -> None:
    assert "on a node without its store within 31 s" in desk.run(PAGE.lines()[0])
