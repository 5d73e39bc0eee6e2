"""Where a request comes from, as the gateways read it: every face alike, and no header can confuse it.

The peer of each request is a proxy of ours here, so that a test says where it comes from by `X-Forwarded-For`; who is
not behind a trusted proxy says nothing by it. Each hostile header is named by its test.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast

import pytest
from flask import Flask
from hypothesis import example, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from coatcheck import AsyncCoatcheck, Coatcheck, CoatcheckError, Settings
from coatcheck.core.binding import BindingPolicy, Outcome
from coatcheck.core.device import device_of
from coatcheck.core.ports import Colour
from coatcheck.engine import Engine
from coatcheck.stores.open import open_store
from coatcheck.testing import CapturedEvents, command_budget
from coatcheck.web import wsgi
from coatcheck.web.exchange import place_of
from coatcheck.web.starlette import CoatcheckMiddleware
from tests.web.faces import COOKIE, Ask, Browser, World

pytestmark = pytest.mark.anyio

PROXY = "203.0.113.7"
HOME = {"X-Forwarded-For": "198.51.100.7"}
AWAY = {"X-Forwarded-For": "192.0.2.9"}
DEVICE = "__Host-device"
CHROME = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 Chrome/130.0 Safari/537.36"


def policy(outcome: Outcome = "block", *, device: bool = False) -> Settings:
    binding = BindingPolicy(network="prefix", user_agent=True, on_mismatch=outcome, device=device)
    cookie = DEVICE if device else None
    return Settings(server_key=b"k" * 32, trusted_proxies=(PROXY,), binding=binding, device_cookie=cookie)


Make = Callable[..., World]


@pytest.fixture
async def site(make_world: Make) -> AsyncIterator[Make]:
    """`site(settings)`: either gateway over a node that keeps near copies."""
    coats: list[tuple[World, Any]] = []

    def make(chosen: Settings) -> World:
        world = make_world(chosen)
        colour: Colour = "async" if world.colour == "async" else "blocking"
        kind = AsyncCoatcheck if colour == "async" else Coatcheck
        coat = kind(
            open_store("memory:", colour=colour, system=world.system),
            settings=chosen,
            on_event=world.events,
            system=world.system,
        )
        coats.append((world, coat))
        world.face = world.face_of(coat)
        world.coat = coat

        @world.view("/in")
        async def enter(ask: Ask) -> str:
            await ask.do(ask.session.login("ann"))
            return "in"

        @world.view("/me")
        async def me(ask: Ask) -> str:
            return (await ask.load()).require_login().subject

        @world.view("/prove")
        async def prove(ask: Ask) -> str:
            await ask.do(ask.session.step_up())
            return "proven"

        return world

    yield make
    for world, coat in coats:
        await world.do(coat.close())


async def signed_in(world: World, headers: dict[str, str] | None = None) -> Browser:
    browser = world.browser()
    assert (await browser.post("/in", headers if headers is not None else HOME)).text == "in"
    return browser


async def code(browser: Browser, headers: dict[str, str], *, path: str = "/me", method: str = "GET") -> str:
    """Whom a request finds, or the code of its refusal."""
    answer = await (browser.get(path, headers) if method == "GET" else browser.post(path, headers))
    return answer.text if answer.status == 200 else str(answer.problem["code"])


# -- every face --------------------------------------------------------------------------------------------------------


async def test_a_copied_cookie_is_refused_and_its_owner_stays_in_after_a_proof(site: Make) -> None:
    world = site(policy("block"))
    owner = await signed_in(world)
    thief = world.browser()
    thief.cookie = owner.cookie
    answer = await thief.get("/me", AWAY)
    assert (answer.status, answer.problem["code"]) == (403, "place_refused")
    assert answer.problem["until"] == world.system.now_us() / 1_000_000 + 900
    assert answer.all("set-cookie") == []
    assert owner.cookie is not None
    assert all(told not in answer.text for told in ('"ann"', owner.cookie, "198.51.100"))
    assert answer.one("cache-control") == "no-store"
    asked = await owner.get("/me", HOME)
    assert (asked.status, asked.problem["code"]) == (403, "step_up_required")
    assert asked.one("www-authenticate") == 'Bearer error="insufficient_user_authentication"'
    assert await code(thief, AWAY, path="/prove", method="POST") == "place_refused"
    stolen = owner.cookie
    assert await code(owner, HOME, path="/prove", method="POST") == "proven"
    assert owner.cookie != stolen
    assert await code(owner, HOME) == "ann"
    assert [await code(thief, AWAY), thief.cookie] == ["login_required", stolen]
    assert len(world.events.of("risk.decided")) == 1


async def test_a_warm_request_asks_nothing_by_whichever_way_a_gateway_reads_it(site: Make) -> None:
    """GET goes the quick way through the WSGI gateway, POST the long one: both see one place."""
    world = site(policy("block", device=True))
    browser = world.browser()
    device = {**HOME, "User-Agent": CHROME, "Cookie": f"{DEVICE}=abc"}

    @world.view("/in")
    async def enter(ask: Ask) -> str:
        await ask.do(ask.session.login("ann", device=device_of("abc")))
        return "in"

    await browser.post("/in", device)
    assert await code(browser, device) == "ann"
    with command_budget(world.coat, 0):
        for method in ("GET", "POST", "GET"):
            assert await code(browser, device, method=method) == "ann"
    assert world.events.of("risk.decided") == []
    assert await code(browser, {**device, "Cookie": f"{DEVICE}=abd"}) == "place_refused"
    assert await code(browser, {**HOME, "User-Agent": CHROME}) == "place_refused"


async def test_a_sign_in_that_names_no_device_is_bound_to_the_device_cookie_it_came_with(site: Make) -> None:
    world = site(policy("block", device=True))
    browser = await signed_in(world, {**HOME, "Cookie": f"{DEVICE}=abc"})
    assert await code(browser, {**HOME, "Cookie": f"{DEVICE}=abc"}) == "ann"
    assert await code(browser, {**HOME, "Cookie": f"{DEVICE}=abd"}) == "place_refused"


async def test_the_same_place_written_in_another_way_is_the_same_place(site: Make) -> None:
    world = site(policy("block"))
    browser = await signed_in(world, {**HOME, "User-Agent": CHROME})
    for forwarded in ("198.51.100.200", "::ffff:198.51.100.7", "6.6.6.6, 198.51.100.7", "junk,198.51.100.7 "):
        chrome = CHROME.replace("130.0", "131.7")
        assert await code(browser, {"X-Forwarded-For": forwarded, "User-Agent": chrome}) == "ann"


async def test_a_proof_that_cannot_be_written_is_a_503_that_brings_the_new_cookie(site: Make) -> None:
    world = site(policy("block"))
    owner = await signed_in(world)
    assert await code(owner, AWAY) == "place_refused"
    stolen = owner.cookie
    near = world.coat.engine.near
    assert near is not None
    whole = near.behind
    near.behind = cast(Any, _WithoutCommit(whole))
    answer = await owner.post("/prove", HOME)
    near.behind = whole
    assert answer.status == 503
    assert owner.cookie != stolen
    assert await code(owner, HOME) == "step_up_required"
    assert await code(owner, HOME, path="/prove", method="POST") == "proven"
    assert await code(owner, HOME) == "ann"


class _WithoutCommit:
    def __init__(self, inner: object) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        from coatcheck import StoreUnavailable

        if name == "commit":
            raise StoreUnavailable("the test took the store away")
        return getattr(self.inner, name)


def _starlette(coat: AsyncCoatcheck) -> TestClient:
    async def enter(request: Request) -> Response:
        await cast(Any, request.session).login("ann")
        return PlainTextResponse("in")

    async def me(request: Request) -> Response:
        return PlainTextResponse(cast(Any, request.session).require_login().subject)

    async def prove(request: Request) -> Response:
        await cast(Any, request.session).step_up()
        return PlainTextResponse("proven")

    async def socket(websocket: WebSocket) -> None:
        await cast(Any, websocket.session).load()
        cast(Any, websocket.session).require_login()
        await websocket.accept()
        await websocket.send_text("open")
        with suppress(WebSocketDisconnect):
            await websocket.receive_text()

    routes = [
        Route("/in", enter, methods=["POST"]),
        Route("/me", me),
        Route("/prove", prove, methods=["POST"]),
        WebSocketRoute("/socket", socket),
    ]
    app = Starlette(routes=routes, middleware=[Middleware(CoatcheckMiddleware, coat=coat)])
    return TestClient(app, base_url="https://testserver", client=(PROXY, 4711))


def _flask(coat: Coatcheck) -> Any:
    app = Flask(__name__)
    app.wsgi_app = wsgi.CoatcheckMiddleware(app.wsgi_app, coat)  # type: ignore[method-assign]
    app.register_error_handler(CoatcheckError, wsgi.problem_response)

    from flask import request

    @app.post("/in")
    def enter() -> str:
        wsgi.session_of(request.environ).login("ann")
        return "in"

    @app.get("/me")
    def me() -> str:
        return wsgi.session_of(request.environ).require_login().subject

    @app.post("/prove")
    def prove() -> str:
        wsgi.session_of(request.environ).step_up()
        return "proven"

    return app


def test_starlette_refuses_a_copied_cookie_a_page_and_a_socket() -> None:
    events = CapturedEvents()
    with _starlette(AsyncCoatcheck("memory:", settings=policy("block"), on_event=events)) as client:
        client.post("/in", headers=HOME)
        assert client.get("/me", headers=HOME).text == "ann"
        with client.websocket_connect("wss://testserver/socket", headers={**HOME, "Origin": "https://testserver"}) as s:
            assert s.receive_text() == "open"
            # The second one fills the near copy again, which must not vouch for the socket.
            _, refused = client.get("/me", headers=AWAY), client.get("/me", headers=AWAY)
            s.send_text("still there?")
            with pytest.raises(WebSocketDisconnect) as over:
                s.receive_text()
            assert over.value.reason == "session_ended"
        assert (refused.status_code, refused.json()["code"]) == (403, "place_refused")
        for headers in (AWAY, HOME):
            with (
                pytest.raises(WebSocketDisconnect),
                client.websocket_connect(
                    "wss://testserver/socket", headers={**headers, "Origin": "https://testserver"}
                ) as s,
            ):
                s.receive_text()
        assert client.get("/me", headers=HOME).json()["code"] == "step_up_required"
        assert client.post("/prove", headers=HOME).text == "proven"
        assert client.get("/me", headers=HOME).text == "ann"
    assert len(events.of("risk.decided")) == 1


def test_flask_refuses_a_copied_cookie() -> None:
    events = CapturedEvents()
    with Coatcheck("memory:", settings=policy("block"), on_event=events) as coat:
        client = _flask(coat).test_client()
        given: dict[str, Any] = {"base_url": "https://localhost", "environ_base": {"REMOTE_ADDR": PROXY}}
        client.post("/in", headers=HOME, **given)
        assert client.get("/me", headers=HOME, **given).text == "ann"
        with command_budget(coat, 0):
            assert client.get("/me", headers=HOME, **given).text == "ann"
        refused = client.get("/me", headers=AWAY, **given)
        assert (refused.status_code, refused.json["code"]) == (403, "place_refused")
        assert client.get("/me", headers=HOME, **given).json["code"] == "step_up_required"
        assert client.post("/prove", headers=HOME, **given).text == "proven"
        assert client.get("/me", headers=HOME, **given).text == "ann"
    assert len(events.of("risk.decided")) == 1


# -- hostile headers ---------------------------------------------------------------------------------------------------


async def test_a_forwarded_address_from_who_is_no_proxy_of_ours_decides_nothing(make_world: Make) -> None:
    """A thief who claims the address of the owner, and an owner whose browser claims another one."""
    world = make_world(Settings(binding=BindingPolicy(network="exact", on_mismatch="block")))

    @world.view("/in")
    async def enter(ask: Ask) -> str:
        await ask.do(ask.session.login("ann"))
        return "in"

    @world.view("/me")
    async def me(ask: Ask) -> str:
        return (await ask.load()).require_login().subject

    browser = await signed_in(world)
    for headers in (AWAY, {}, {"X-Forwarded-For": "junk"}):
        assert await code(browser, headers) == "ann"
    assert world.events.of("risk.decided") == []


HOSTILE: list[list[tuple[bytes, bytes]]] = [
    [(b"x-forwarded-for", b"")],
    [(b"x-forwarded-for", b"\x00")],
    [(b"x-forwarded-for", b"1.2.3.4\x00")],
    [(b"x-forwarded-for", b"\xff" * 5000)],
    [(b"x-forwarded-for", b"9.9.9.9," * 5000)],
    [(b"x-forwarded-for", b"fe80::1%" + b"z" * 900)],
    [(b"x-forwarded-for", b"2001:db8::1%\xe9\x00\n")],
    [(b"x-forwarded-for", b"198.51.100.7")] * 50,
    [(b"user-agent", b"\x00\xff\n" * 10_000)],
    [(b"user-agent", b"one"), (b"user-agent", b"two")],
    [(b"cookie", f"{DEVICE}=".encode() + b"\xff\x00" * 4000)],
    [(b"cookie", f"{DEVICE}=a; {DEVICE}=b".encode())],
    [(b"cookie", f'{DEVICE}="; \\"'.encode())],
    [(b"cookie", b";" * 20_000)],
]


@pytest.mark.parametrize("headers", HOSTILE, ids=range(len(HOSTILE)))
async def test_no_header_makes_a_place_fail(site: Make, headers: list[tuple[bytes, bytes]]) -> None:
    world = site(policy("notify", device=True))
    owner = await signed_in(world)
    assert owner.cookie is not None
    ours = (b"cookie", f"{COOKIE}={owner.cookie}".encode())
    for _ in range(2):
        answer = await world.face.request("GET", "/me", headers=[ours, *headers])
        # Where the cookies together are too long, none of them counts.
        assert answer.status in (200, 401)


def test_thousands_of_addresses_agents_and_devices_do_not_grow_the_memory_of_a_node() -> None:
    engine = _engine()
    binding = engine.binding
    assert binding is not None
    for number in range(10_000):
        headers = [
            (b"x-forwarded-for", f"198.{number >> 8}.{number & 255}.7".encode()),
            (b"user-agent", f"Agent{number}/1".encode() + b"x" * 400),
            (b"cookie", f"{DEVICE}=device{number}".encode()),
        ]
        place_of(engine, headers, PROXY)
    tables = [binding.known, *(value for value in vars(binding.surveyor).values() if hasattr(value, "limit"))]
    assert len(tables) == 3
    for table in tables:
        assert len(table) <= table.limit <= 4096
    before = len(binding.known)
    place_of(engine, [(b"user-agent", b"y" * 100_000)], PROXY)
    assert len(binding.known) == before


def _engine() -> Engine:
    return Coatcheck("memory:", settings=policy("block", device=True)).engine


_PIECES = st.lists(st.sampled_from([b"1.2.3.4", b",", b"\n", b"dev"]), max_size=4).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([PROXY, "192.0.2.1", None, "None", "", "unix:\udcff"]),
            st.lists(_PIECES, max_size=2),
            st.lists(_PIECES, max_size=2),
            st.lists(_PIECES, max_size=2),
        ),
        max_size=12,
    )
)
@example([(PROXY, [b"1.2.3.4", b"dev"], [], []), (PROXY, [b"1.2.3.4"], [], [b"dev,"])])
@example([(PROXY, [b"1.2.3.4\ndev"], [b"UA"], []), (PROXY, [b"1.2.3.4"], [b"\nUA"], [b"dev"])])
@example([(PROXY, [b"1.2.3.4"], [b"dev"], []), (PROXY, [b"1.2.3.4"], [], [b"dev,"])])
@example([(PROXY, [b"1.2.3.4"], [], []), (None, [b"1.2.3.4"], [], []), ("None", [b"1.2.3.4"], [], [])])
def test_what_is_remembered_of_one_request_is_never_taken_for_another(requests: list[Any]) -> None:
    """Line feeds and commas where a server should not let them through: two requests never share what was read."""
    remembering = _engine()
    for peer, forwarded, agents, devices in requests:
        headers = [
            *((b"x-forwarded-for", value) for value in forwarded),
            *((b"user-agent", value) for value in agents),
            *((b"cookie", f"{DEVICE}=".encode() + value) for value in devices),
        ]
        seen, fresh = place_of(remembering, headers, peer), place_of(_FRESH, headers, peer)
        _FRESH.binding.known = type(_FRESH.binding.known)(1)  # type: ignore[union-attr]
        assert (seen.address, seen.user_agent, seen.device) == (fresh.address, fresh.user_agent, fresh.device)


_FRESH = _engine()
