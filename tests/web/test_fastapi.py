"""FastAPI: the twenty lines of the documentation, scopes, overrides, OpenAPI, two installations."""

import asyncio
from collections.abc import Iterator
from typing import Annotated, Any, cast

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request, Security, WebSocket
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel
from starlette.testclient import WebSocketDenialResponse

from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    Coatcheck,
    ConfigurationError,
    CookieSettings,
    LoginRequired,
    Principal,
    Settings,
)
from coatcheck.core.ports import SessionStore
from coatcheck.stores.open import open_store
from coatcheck.testing import command_budget, login_as
from coatcheck.web.fastapi import Auth
from tests.web.faces import Store


class Form(BaseModel):
    name: str
    password: str


async def check(form: Form) -> bool:
    return form.password == "right"


# The sample of the documentation, over memory in place of a file.
coat = AsyncCoatcheck("memory:")
auth = Auth(coat)
sample = FastAPI()
auth.install(sample)
Live = Annotated[AsyncSession, Depends(auth.session)]
Me = Annotated[Principal, Depends(auth.user)]


@sample.post("/login")
async def login(form: Form, session: Live) -> dict[str, str]:
    if not await check(form):
        raise HTTPException(401)
    await session.login("50", claims={"role": "admin"}, keep=("cart",))
    return {"message": "ok"}


@sample.get("/dashboard")
async def dashboard(me: Me) -> dict[str, Any]:
    return {"user": me.subject, "role": me.claims["role"]}


@sample.post("/logout")
async def logout(session: Live) -> dict[str, str]:
    await session.logout()
    return {"message": "bye"}


def test_the_twenty_lines_of_the_documentation() -> None:
    with TestClient(sample, base_url="https://testserver") as client:
        answer = client.get("/dashboard")
        assert (answer.status_code, answer.json()["code"]) == (401, "login_required")
        assert answer.headers["content-type"] == "application/problem+json"
        assert "www-authenticate" in answer.headers
        wrong = client.post("/login", json={"name": "ada", "password": "wrong"})
        assert (wrong.status_code, wrong.json()) == (401, {"detail": "Unauthorized"})
        assert "set-cookie" not in wrong.headers
        assert client.post("/login", json={"name": "ada", "password": "right"}).json() == {"message": "ok"}
        assert client.get("/dashboard").json() == {"user": "50", "role": "admin"}
        assert client.post("/logout").json() == {"message": "bye"}
        assert client.get("/dashboard").status_code == 401


class Node:
    """An application with every dependency, over a counted store."""

    def __init__(self) -> None:
        self.store = Store(open_store("memory:", colour="async"))
        self.coat = AsyncCoatcheck(cast(SessionStore, self.store))
        self.auth = auth = Auth(self.coat, sign_in_url="/sign-in")
        self.app = app = FastAPI()
        auth.install(app)

        @app.post("/login")
        async def login(form: Form, session: Annotated[AsyncSession, Depends(auth.session)]) -> dict[str, str]:
            await session.login("50", claims={"role": "admin"})
            return {"message": "ok"}

        @app.get("/dashboard")
        async def dashboard(me: Annotated[Principal, Depends(auth.user)]) -> dict[str, Any]:
            return {"user": me.subject, "role": me.claims["role"]}

        @app.get("/open")
        async def open_page() -> str:
            return "open"

        @app.get("/maybe")
        async def maybe(me: Annotated[Principal | None, Depends(auth.optional_user)]) -> str | None:
            return None if me is None else me.subject

        @app.get("/plain")
        def plain(
            me: Annotated[Principal, Depends(auth.user)], session: Annotated[AsyncSession, Depends(auth.session)]
        ) -> str:
            session["from"] = "a thread"
            return me.subject

        @app.get("/reports")
        async def reports(me: Annotated[Principal, Security(auth.user, scopes=["reports:read"])]) -> str:
            return me.subject

        @app.get("/several")
        async def several(
            session: Annotated[AsyncSession, Depends(auth.session)],
            me: Annotated[Principal, Depends(auth.user)],
            again: Annotated[Principal, Security(auth.user, scopes=["reports:read"])],
            maybe: Annotated[Principal | None, Depends(auth.optional_user)],
        ) -> bool:
            return me == again == maybe and session.subject == me.subject

        @app.websocket("/ws")
        async def ws(websocket: WebSocket, me: Annotated[Principal, Depends(auth.user)]) -> None:
            await websocket.accept()
            await websocket.send_text(me.subject)
            await websocket.close()


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def client(node: Node) -> Iterator[TestClient]:
    with TestClient(node.app, base_url="https://testserver") as client:
        yield client


def test_an_endpoint_without_dependencies_costs_nothing_and_says_nothing(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    with command_budget(node.coat, 0):
        answer = client.get("/open")
    assert not {"vary", "cache-control", "set-cookie"} & set(answer.headers)


def test_several_dependencies_load_once(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50", scopes=["reports:read"])
    with command_budget(node.coat, 1):
        assert client.get("/several").json() is True


def test_scopes_are_demanded(client: TestClient, node: Node) -> None:
    assert client.get("/reports").json()["code"] == "login_required"
    login_as(client, node.coat, "50", scopes=["reports:write"])
    answer = client.get("/reports")
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert "reports:read" not in answer.text
    login_as(client, node.coat, "50", scopes=["reports:read"])
    assert client.get("/reports").json() == "50"


def test_optional_user_is_none_or_somebody(client: TestClient, node: Node) -> None:
    assert client.get("/maybe").json() is None
    login_as(client, node.coat, "50")
    assert client.get("/maybe").json() == "50"


def test_an_ended_session_says_why(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    assert client.portal is not None
    client.portal.call(lambda: node.coat.revoke_subject("50", reason="stolen laptop"))
    answer = client.get("/dashboard")
    assert (answer.json()["code"], answer.json()["reason"]) == ("session_ended", "stolen laptop")


def test_plain_functions_may_use_the_session(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    assert client.get("/plain").json() == "50"


def test_dependencies_can_be_overridden(client: TestClient, node: Node) -> None:
    assert node.auth.user is node.auth.user
    node.app.dependency_overrides[node.auth.user] = lambda: Principal(subject="7", sid="x", claims={"role": "test"})
    assert client.get("/dashboard").json() == {"user": "7", "role": "test"}
    node.app.dependency_overrides[node.auth.optional_user] = lambda: None
    assert client.get("/maybe").json() is None


def test_a_handler_of_the_application_for_our_errors_comes_first(node: Node) -> None:
    async def mine(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"mine": True}, status_code=401)

    node.app.add_exception_handler(LoginRequired, mine)
    with TestClient(node.app, base_url="https://testserver") as fresh:
        assert fresh.get("/dashboard").json() == {"mine": True}


def test_a_store_that_is_away_is_a_503(client: TestClient, node: Node) -> None:
    login_as(client, node.coat, "50")
    node.store.away = frozenset()
    answer = client.get("/dashboard")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "set-cookie" not in answer.headers
    assert client.get("/open").status_code == 200
    node.store.away = None
    assert client.get("/plain").json() == "50"


def test_the_documentation_shows_the_scheme_and_how_to_authorize(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    [(name, scheme)] = document["components"]["securitySchemes"].items()
    assert (scheme["type"], scheme["in"], scheme["name"]) == ("apiKey", "cookie", "__Host-Http-session")
    assert "[here](/sign-in)" in scheme["description"]
    paths = document["paths"]
    assert paths["/dashboard"]["get"]["security"] == [{name: []}]
    assert paths["/reports"]["get"]["security"] == [{name: ["reports:read"]}]
    assert "security" not in paths["/login"]["post"]
    assert "parameters" not in paths["/dashboard"]["get"]


def test_installing_twice_changes_nothing(node: Node) -> None:
    node.auth.install(node.app)
    Auth(node.coat).install(node.app)
    assert len(node.app.user_middleware) == 1


def test_two_installations_keep_apart(node: Node) -> None:
    staff_coat = AsyncCoatcheck(
        "memory:", settings=Settings(namespace="staff", cookie=CookieSettings(name="__Host-Http-staff"))
    )
    staff = Auth(staff_coat)
    staff.install(node.app)

    @node.app.get("/both")
    async def both(
        customer: Annotated[Principal | None, Depends(node.auth.optional_user)],
        member: Annotated[Principal | None, Depends(staff.optional_user)],
    ) -> list[str | None]:
        return [None if each is None else each.subject for each in (customer, member)]

    @node.app.get("/staff")
    async def staff_only(me: Annotated[Principal, Depends(staff.user)]) -> str:
        return me.subject

    with TestClient(node.app, base_url="https://testserver") as client:
        assert client.get("/both").json() == [None, None]
        login_as(client, node.coat, "50")
        assert client.get("/both").json() == ["50", None]
        login_as(client, staff_coat, "7")
        assert client.get("/both").json() == ["50", "7"]
        assert len(client.get("/openapi.json").json()["components"]["securitySchemes"]) == 2


def test_two_installations_with_one_cookie_name_are_refused(node: Node) -> None:
    with pytest.raises(ConfigurationError, match="CookieSettings"):
        Auth(AsyncCoatcheck("memory:")).install(node.app)


def test_a_dependency_without_install_names_the_cure(node: Node) -> None:
    app = FastAPI()

    @app.get("/me")
    async def me(me: Annotated[Principal, Depends(node.auth.user)]) -> str:
        return me.subject

    with TestClient(app) as client, pytest.raises(RuntimeError, match="CoatcheckMiddleware"):
        client.get("/me")


def test_a_blocking_coat_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="AsyncCoatcheck"):
        Auth(cast(Any, Coatcheck("memory:")))


def test_websockets_take_the_same_dependencies(client: TestClient, node: Node) -> None:
    with pytest.raises(WebSocketDenialResponse) as refused, client.websocket_connect("wss://testserver/ws"):
        pass
    assert refused.value.status_code == 401
    login_as(client, node.coat, "50")
    with client.websocket_connect("wss://testserver/ws") as socket:
        assert socket.receive_text() == "50"


def test_excluded_paths_are_left_alone() -> None:
    node = Node()
    app = FastAPI()
    node.auth.install(app, exclude=("/open",))

    @app.post("/open")
    async def open_page() -> str:
        return "open"

    with TestClient(app, base_url="https://testserver") as client:
        assert client.post("/open", headers={"Sec-Fetch-Site": "cross-site"}).json() == "open"
        assert client.post("/other", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_login_as_replaces_what_the_client_has_and_later_cookies_replace_it(client: TestClient, node: Node) -> None:
    client.post("/login", json={"name": "ada", "password": "right"})
    login_as(client, node.coat, "51", claims={"role": "guest"})
    assert client.get("/dashboard").json() == {"user": "51", "role": "guest"}
    client.post("/login", json={"name": "ada", "password": "right"})
    assert client.get("/dashboard").json() == {"user": "50", "role": "admin"}
    assert len(list(client.cookies.jar)) == 1
    asyncio.run(node.coat.close())
