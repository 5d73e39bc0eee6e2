"""How many commands a request costs, counted by the real servers themselves rather than by us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from coatcheck import AsyncCoatcheck, Coatcheck, Settings
from coatcheck.blocking import run_blocking
from coatcheck.session import SessionBase
from coatcheck.stores.open import open_store
from coatcheck.web.asgi import CoatcheckMiddleware as AsgiMiddleware
from coatcheck.web.asgi import session_of as asgi_session
from coatcheck.web.wsgi import CoatcheckMiddleware as WsgiMiddleware
from coatcheck.web.wsgi import session_of as wsgi_session
from tests.servers.postgres import Postgres
from tests.servers.valkey import ValkeySingle

pytestmark = pytest.mark.servers

NAME = "__Host-Http-session"
Record = Callable[[], AbstractContextManager[list[Any]]]


class Node:
    """One application in one colour; a request is one of the four things a handler can do."""

    def __init__(self, colour: str, url: str, settings: Settings) -> None:
        self.colour = colour
        self.runner = asyncio.Runner() if colour == "async" else None
        if self.runner is not None:
            self.coat: AsyncCoatcheck | Coatcheck = AsyncCoatcheck(url, settings=settings)
        else:
            self.coat = Coatcheck(url, settings=settings)

    def close(self) -> None:
        if isinstance(self.coat, AsyncCoatcheck):
            assert self.runner is not None
            self.runner.run(self.coat.close())
            self.runner.close()
        else:
            self.coat.close()

    def request(self, act: str, cookie: str = "") -> str:
        return self._asgi(act, cookie) if self.colour == "async" else self._wsgi(act, cookie)

    def _asgi(self, act: str, cookie: str) -> str:
        sent: list[Any] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            session = asgi_session(scope)
            if act != "untouched":
                await session.load()
            if act == "login":
                await session.login("50", keep=("cart",))
            elif act == "logout":
                await session.logout()
            else:
                use(session, act)
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            raise AssertionError("nobody reads the body")

        assert self.runner is not None
        assert isinstance(self.coat, AsyncCoatcheck)
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "scheme": "https",
            "headers": [(b"cookie", f"a=1; {NAME}={cookie}".encode())] if cookie else [],
        }
        self.runner.run(AsgiMiddleware(app, self.coat)(scope, receive, send))
        assert sent[0]["status"] == 200
        return cookie_in([value.decode() for name, value in sent[0]["headers"] if name == b"set-cookie"])

    def _wsgi(self, act: str, cookie: str) -> str:
        sent: list[tuple[str, str]] = []

        def app(environ: Any, start_response: Any) -> list[bytes]:
            session = wsgi_session(environ)
            if act == "login":
                session.login("50", keep=("cart",))
            elif act == "logout":
                session.logout()
            elif act != "untouched":
                use(session, act)
            start_response("200 OK", [])
            return [b""]

        def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            assert status.startswith("200"), status
            sent.extend(headers)
            return lambda data: None

        assert isinstance(self.coat, Coatcheck)
        environ = {"REQUEST_METHOD": "POST", "PATH_INFO": "/", "wsgi.url_scheme": "https", "REMOTE_ADDR": "127.0.0.1"}
        if cookie:
            environ["HTTP_COOKIE"] = f"a=1; {NAME}={cookie}"
        b"".join(WsgiMiddleware(app, self.coat)(environ, start_response))
        return cookie_in([value for name, value in sent if name.lower() == "set-cookie"])


def use(session: SessionBase, act: str) -> None:
    if act == "read":
        list(session)
    elif act == "change":
        count = session.get("n", 0)
        session["n"] = (count if isinstance(count, int) else 0) + 1


def is_heartbeat(command: str) -> bool:
    """What keeps the lease of near copies, a few times a second whatever the number of requests."""
    return any(
        sign in command for sign in (":beat", "TIME", "TRACKING", "HELLO", "INFO", "pg_is_in_recovery", "LISTEN")
    )


def cookie_in(values: list[str]) -> str:
    return values[0].split(";")[0].split("=", 1)[1] if values else ""


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def valkey_node(valkey_single: ValkeySingle, namespace: str, colour: str) -> Iterator[tuple[Node, Record]]:
    node = Node(colour, valkey_single.url, Settings(namespace=namespace))
    yield node, valkey_single.record
    node.close()


@pytest.fixture
def postgres_node(
    postgres: Postgres, postgres_database: str, namespace: str, colour: str
) -> Iterator[tuple[Node, Record]]:
    store: Any = open_store(postgres_database, colour="blocking", namespace=namespace)
    run_blocking(store.migrate())
    run_blocking(store.close())
    database = postgres_database.rsplit("/", 1)[1].split("?")[0]

    @contextmanager
    def record() -> Iterator[list[str]]:
        with postgres.record(database) as found:
            yield found

    node = Node(colour, postgres_database, Settings(namespace=namespace))
    yield node, record
    node.close()


@pytest.fixture(params=["valkey", "postgres"])
def node_and_record(request: pytest.FixtureRequest, colour: str) -> tuple[Node, Record]:
    found: tuple[Node, Record] = request.getfixturevalue(f"{request.param}_node")
    return found


@pytest.mark.xdist_group("wire")
def test_a_request_costs_what_the_readme_says(node_and_record: tuple[Node, Record]) -> None:
    node, record = node_and_record
    anonymous = node.request("change")
    signed_in = node.request("login", node.request("change"))
    node.request("read", signed_in)

    def cost(times: int, act: str, cookie: str) -> int:
        with record() as commands:
            for _ in range(times):
                node.request(act, cookie)
        return sum(not is_heartbeat(str(command)) for command in commands)

    assert cost(100, "untouched", signed_in) == 0
    assert cost(100, "untouched", "E" * 64) == 0, "a forged id in an untouched request"
    assert cost(20, "read", "E" * 64) == 0, "junk is refused without a trip to the store"
    assert cost(20, "read", "") == 0
    assert cost(10_000, "read", signed_in) == 0, "a warm session is read without a trip"
    assert cost(1, "change", signed_in) == 1
    assert cost(1, "read", signed_in) == 1, "after a change the next read is a cold one"
    node.request("change", signed_in)
    assert cost(20, "change", signed_in) == 40, "one to read, one to change"
    assert cost(1, "login", anonymous) == 3, "one to read the anonymous session, two for the sign-in that replaces it"
    assert cost(1, "login", "") == 1
    assert cost(1, "login", signed_in) == 2, "one to read, one that replaces the subject's own session"


def test_nothing_of_an_id_is_in_the_store_or_on_its_wire(valkey_node: tuple[Node, Record]) -> None:
    node, record = valkey_node
    with record() as commands:
        signed_in = node.request("login", node.request("change"))
        node.request("change", signed_in)
        node.request("logout", signed_in)
    # The handle is public; the 32 characters behind it are the secret.
    secret = signed_in[20:52]
    assert commands
    assert not any(secret in str(command) for command in commands)


def test_set_cookie_is_sent_when_something_changed_and_at_no_other_time(valkey_node: tuple[Node, Record]) -> None:
    node, _ = valkey_node
    signed_in = node.request("login")
    assert len(signed_in) == 64
    assert [node.request(act, signed_in) for act in ("untouched", "read", "change")] == ["", "", ""]
    assert node.request("read", signed_in) == ""
    assert node.request("logout", signed_in) == "", "cleared: the value is empty"
