"""Starlette's own names: `request.session`, `request.user`, `request.auth`, `@requires`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, cast

import pytest
from starlette.applications import Starlette
from starlette.authentication import AuthCredentials, BaseUser, requires
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from coatcheck import AsyncCoatcheck, AsyncSession, LoginRequired, SessionClosed, SessionNotLoaded, StoreUnavailable
from coatcheck.core.ports import SessionStore
from coatcheck.stores.open import open_store
from coatcheck.testing import command_budget, login_as
from coatcheck.web.starlette import CoatcheckMiddleware
from tests.web.faces import Store


class Node:
    """A coat over memory with its counted store."""

    def __init__(self) -> None:
        self.store = Store(open_store("memory:", colour="async"))
        self.coat = AsyncCoatcheck(cast(SessionStore, self.store))


async def home(request: Request) -> Response:
    return PlainTextResponse("home")


async def login(request: Request) -> Response:
    await cast(Any, request.session).login("50", claims={"name": "Ada"}, scopes=("read",), keep=("cart",))
    return PlainTextResponse(request.user.display_name)


async def logout(request: Request) -> Response:
    await cast(Any, request.session).logout()
    return PlainTextResponse("out")


async def me(request: Request) -> Response:
    user = request.user
    return PlainTextResponse(f"{user.is_authenticated} {user.display_name!r} {user.identity!r} {request.auth.scopes}")


async def cart(request: Request) -> Response:
    request.session.setdefault("cart", []).append("coat")
    return PlainTextResponse(str(len(request.session["cart"])))


@requires("read")
async def read(request: Request) -> Response:
    return PlainTextResponse("may read")


@requires(["authenticated", "write"], status_code=403)
def write(request: Request) -> Response:
    return PlainTextResponse("may write")


@requires("authenticated", redirect="sign-in")
async def account(request: Request) -> Response:
    return PlainTextResponse(f"account of {request.user.subject}")


async def must(request: Request) -> Response:
    raise LoginRequired


async def teapot(request: Request) -> Response:
    request.session["tea"] = 1
    raise HTTPException(418)


async def crash(request: Request) -> Response:
    await cast(Any, request.session).login("50")
    raise ZeroDivisionError


async def background(request: Request) -> Response:
    session = request.session

    async def later() -> None:
        assert session.get("cart") is None
        with pytest.raises(SessionClosed):
            session["late"] = 1
        session_seen.append(request.user.identity)

    session_seen: list[str] = request.app.state.seen
    return PlainTextResponse("soon", background=BackgroundTask(later))


async def stream(request: Request) -> Response:
    request.session["before"] = 1

    async def lines() -> AsyncIterator[str]:
        yield "one"
        with pytest.raises(SessionClosed):
            request.session["after"] = 1
        yield "two"

    return StreamingResponse(lines())


async def echo(websocket: WebSocket) -> None:
    websocket.session["talks"] = websocket.session.get("talks", 0) + 1
    await websocket.accept()
    await websocket.send_text(f"{websocket.user.identity} {websocket.session['talks']}")
    await websocket.close()


@requires("authenticated")
async def members(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.close()


ROUTES = [
    Route("/", home),
    Route("/login", login, methods=["POST"], name="sign-in"),
    Route("/logout", logout, methods=["POST"]),
    Route("/me", me),
    Route("/cart", cart, methods=["POST"]),
    Route("/read", read),
    Route("/write", write),
    Route("/account", account),
    Route("/must", must),
    Route("/teapot", teapot),
    Route("/crash", crash, methods=["POST"]),
    Route("/background", background),
    Route("/stream", stream, methods=["POST"]),
    Route("/health", home),
    WebSocketRoute("/echo", echo),
    WebSocketRoute("/members", members),
]


def application(node: Node, **options: Any) -> Starlette:
    app = Starlette(routes=ROUTES, middleware=[Middleware(CoatcheckMiddleware, coat=node.coat, **options)])
    app.state.seen = []
    return app


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def client(node: Node) -> Iterator[TestClient]:
    with TestClient(application(node, exclude=("/health",)), base_url="https://testserver") as client:
        yield client


def test_user_auth_and_session_follow_the_sign_in(client: TestClient) -> None:
    assert client.get("/me").text == "False '' '' []"
    assert client.post("/cart").text == "1"
    assert client.post("/login").text == "Ada"
    assert client.get("/me").text == "True 'Ada' '50' ['authenticated', 'read']"
    assert client.post("/cart").text == "2"
    assert client.post("/logout").text == "out"
    assert client.get("/me").text == "False '' '' []"


def test_requires_lets_through_refuses_and_redirects(client: TestClient, node: Node) -> None:
    for path in ("/read", "/write"):
        assert client.get(path).status_code == 403
    answer = client.get("/account", follow_redirects=False)
    assert (answer.status_code, answer.headers["cache-control"]) == (303, "no-store")
    assert answer.headers["location"].startswith("https://testserver/login?next=")
    login_as(client, node.coat, "50", scopes=["read"])
    assert client.get("/read").text == "may read"
    assert client.get("/write").status_code == 403
    assert client.get("/account").text == "account of 50"
    login_as(client, node.coat, "50", scopes=["write"])
    assert client.get("/write").text == "may write"


def test_autoload_costs_one_command_with_a_cookie_and_none_without(client: TestClient, node: Node) -> None:
    client.get("/me")
    with command_budget(node.coat, 0):
        client.get("/me")
    login_as(client, node.coat, "50")
    with command_budget(node.coat, 1) as counted:
        client.get("/me")
        assert counted.verbs == ["load"]
    with command_budget(node.coat, 0):
        client.get("/health")
        client.get("/health", headers={"Cookie": "__Host-Http-session=" + "A" * 64})


def test_a_handler_that_does_not_look_is_cacheable_although_the_session_was_loaded(
    client: TestClient, node: Node
) -> None:
    login_as(client, node.coat, "50")
    answer = client.get("/")
    assert not {"vary", "cache-control", "set-cookie"} & set(answer.headers)


def test_a_store_failure_is_raised_only_where_a_handler_looks(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    node.store.away = frozenset()
    answer = client.get("/")
    assert (answer.status_code, answer.text, "set-cookie" in answer.headers) == (200, "home", False)
    for path in ("/me", "/read", "/account"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), path
        assert "set-cookie" not in answer.headers
    node.store.away = None
    assert client.get("/me").text.startswith("True")


def test_without_autoload_a_handler_loads_first(node: Node) -> None:
    async def loaded(request: Request) -> Response:
        session = request.session
        assert isinstance(session, AsyncSession)
        await session.load()
        return await me(request)

    app = application(node, autoload=False)
    app.add_route("/loaded", loaded)
    with TestClient(app, base_url="https://testserver") as client:
        login_as(client, node.coat, "50")
        with pytest.raises(SessionNotLoaded):
            client.get("/me")
        assert client.get("/loaded").text.startswith("True")


def test_errors_of_ours_become_problem_documents_and_http_exceptions_stay(client: TestClient) -> None:
    answer = client.get("/must")
    assert (answer.status_code, answer.json()["code"]) == (401, "login_required")
    answer = client.get("/teapot")
    assert (answer.status_code, answer.text) == (418, "I'm a Teapot")
    assert "set-cookie" in answer.headers, "an HTTPException is an answer of the handler: its fields are kept"


def test_a_handler_of_the_application_for_our_errors_comes_first(node: Node) -> None:
    async def to_login(request: Request, error: Exception) -> Response:
        return PlainTextResponse("please", status_code=401)

    app = application(node)
    app.add_exception_handler(LoginRequired, to_login)
    with TestClient(app, base_url="https://testserver") as client:
        assert client.get("/must").text == "please"


def test_an_exception_after_a_sign_in_revokes_the_session(node: Node) -> None:
    with TestClient(application(node), base_url="https://testserver", raise_server_exceptions=False) as client:
        answer = client.post("/crash")
        assert (answer.status_code, "set-cookie" in answer.headers) == (500, False)
        assert client.portal is not None
        page = client.portal.call(node.coat.list_sessions, "50")
        assert page.items == ()


def test_background_tasks_may_read_and_not_write(node: Node) -> None:
    app = application(node)
    with TestClient(app, base_url="https://testserver") as client:
        login_as(client, node.coat, "50")
        assert client.get("/background").text == "soon"
    assert app.state.seen == ["50"]


def test_a_stream_is_committed_before_it_begins(client: TestClient) -> None:
    answer = client.post("/stream")
    assert answer.text == "onetwo"
    assert "set-cookie" in answer.headers


def test_base_http_middleware_around_does_not_break_it(node: Node) -> None:
    class Around(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            response = await call_next(request)
            response.headers["x-around"] = "1"
            return response

    inside = Starlette(routes=ROUTES, middleware=[Middleware(CoatcheckMiddleware, coat=node.coat), Middleware(Around)])
    outside = Starlette(routes=ROUTES, middleware=[Middleware(Around), Middleware(CoatcheckMiddleware, coat=node.coat)])
    for app in (inside, outside):
        with TestClient(app, base_url="https://testserver") as client:
            assert client.post("/login").headers["x-around"] == "1"
            assert client.get("/me").text.startswith("True")
            assert client.get("/must").status_code == 401


def test_a_mounted_application_without_a_lifespan_works(node: Node) -> None:
    app = Starlette(routes=[Mount("/sub", app=application(node))])
    with TestClient(app, base_url="https://testserver") as client:
        assert client.post("/sub/login").status_code == 200
        assert client.get("/sub/me").text.startswith("True")


def test_a_client_without_a_lifespan_works(node: Node) -> None:
    client = TestClient(application(node), base_url="https://testserver")
    assert client.post("/login").status_code == 200
    assert client.get("/me").text.startswith("True")


def test_websockets_have_session_and_user(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    for talks in (1, 2):
        with client.websocket_connect("wss://testserver/echo") as socket:
            assert socket.receive_text() == f"50 {talks}"
    with client.websocket_connect("wss://testserver/members"):
        pass


def test_websockets_of_nobody_or_of_another_site_are_refused(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("wss://testserver/members"):
        pass
    with (
        pytest.raises(WebSocketDenialResponse) as refused,
        client.websocket_connect("wss://testserver/echo", headers={"Origin": "https://evil.example"}),
    ):
        pass
    assert refused.value.status_code == 403


def test_the_surface_is_starlettes(client: TestClient, node: Node) -> None:
    kinds: list[bool] = []

    async def look(request: Request) -> Response:
        session = cast(Any, request.session)
        kinds.extend([isinstance(request.user, BaseUser), isinstance(request.auth, AuthCredentials)])
        kinds.extend([not session.accessed, not session.modified])
        session["a"] = {"b": 1}
        kinds.extend([session.accessed, session.modified, session == {"a": {"b": 1}}, "a" in session, bool(session)])
        session.update(c=1)
        assert session.pop("c") == 1
        session.popitem()
        session.clear()
        with pytest.raises(AttributeError):
            request.auth.scopes = ["root"]
        return PlainTextResponse(str(session.modified))

    cast(Starlette, client.app).add_route("/look", look)
    assert client.get("/look").text == "False"
    assert kinds == [True] * 9


def test_session_principal_is_on_the_user(node: Node) -> None:
    async def look(request: Request) -> Response:
        return PlainTextResponse(f"{request.user.principal.subject} {request.user.principal.scopes}")

    app = application(node)
    app.add_route("/look", look)
    with TestClient(app, base_url="https://testserver") as client:
        login_as(client, node.coat, "50", scopes=["a", "b"])
        assert client.get("/look").text == "50 ('a', 'b')"


def test_a_kept_failure_is_the_stores_own_error(node: Node) -> None:
    seen: list[str] = []

    async def look(request: Request) -> Response:
        for touch in (lambda: request.user.identity, lambda: request.auth.scopes, lambda: dict(request.session)):
            with pytest.raises(StoreUnavailable) as lost:
                touch()
            seen.append(lost.value.detail)
        return PlainTextResponse("caught")

    app = application(node)
    app.add_route("/look", look)
    with TestClient(app, base_url="https://testserver") as client:
        login_as(client, node.coat, "50")
        node.store.away = frozenset()
        answer = client.get("/look")
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        node.store.away = None
    assert seen == ["the test took the store away"] * 3
