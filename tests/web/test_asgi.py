"""What is ASGI's own: the order of messages, WebSockets, the lifespan, several installations, several loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import pytest

from coatcheck import (
    AsyncCoatcheck,
    Coatcheck,
    ConfigurationError,
    CookieSettings,
    LoginRequired,
    SessionClosed,
    Settings,
)
from coatcheck.core.ports import SessionStore
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from coatcheck.testing import CapturedEvents, FakeSystem
from coatcheck.web.asgi import App, CoatcheckMiddleware, Message, Receive, Scope, Send, session_of
from tests.web.faces import COOKIE, AsgiFace, Browser, Store

pytestmark = pytest.mark.anyio


class Node:
    """A coat over memory with its counted store."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.events = CapturedEvents()
        system = FakeSystem()
        self.store = Store(open_store("memory:", colour="async", system=system))
        self.coat = AsyncCoatcheck(
            cast(SessionStore, self.store), settings=settings or Settings(), on_event=self.events, system=system
        )

    async def cookie(self, subject: str = "50") -> str:
        session = self.coat.session(None)
        await session.login(subject)
        action = session.cookie_action
        assert action is not None
        return cast(SendCookie, action).id.text


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    yield node
    await node.coat.close()


def ok(status: int = 200) -> list[Message]:
    return [
        {"type": "http.response.start", "status": status, "headers": []},
        {"type": "http.response.body", "body": b"ok"},
    ]


async def socket(
    app: App, headers: Sequence[tuple[bytes, bytes]] = (), *, extensions: dict[str, Any] | None = None
) -> list[Message]:
    """One WebSocket handshake; the messages that came back."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"} if not sent else {"type": "websocket.disconnect", "code": 1005}

    async def send(message: Message) -> None:
        sent.append(message)

    scope: Scope = {
        "type": "websocket",
        "path": "/ws",
        "scheme": "wss",
        "headers": [(b"host", b"app.example"), *headers],
        "client": ("203.0.113.7", 4711),
    }
    if extensions is not None:
        scope["extensions"] = extensions
    await app(scope, receive, send)
    return sent


# -- order of messages ---------------------------------------------------------------------------------------------


async def test_a_write_in_a_background_task_is_refused_and_reading_is_not(node: Node) -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await session.load()
        for message in ok():
            await send(message)
        # As Starlette runs background tasks: after the last octet.
        seen.append(session.subject)
        with pytest.raises(SessionClosed):
            session["late"] = 1
        with pytest.raises(SessionClosed):
            await session.login("51")
        with pytest.raises(SessionClosed):
            await session.logout()
        with pytest.raises(SessionClosed):
            await session.rotate()

    await Browser(AsgiFace(CoatcheckMiddleware(app, node.coat)), await node.cookie()).get("/")
    assert seen == ["50"]
    assert len((await node.coat.list_sessions("50")).items) == 1
    assert (await node.coat.list_sessions("51")).items == ()


async def test_an_error_after_the_response_has_begun_is_the_servers(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(ok()[0])
        raise LoginRequired

    with pytest.raises(LoginRequired):
        await AsgiFace(CoatcheckMiddleware(app, node.coat)).request("GET", "/")


async def test_a_sign_in_whose_response_was_never_sent_is_taken_back(node: Node) -> None:
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).login("50")

    with pytest.raises(AssertionError):
        await AsgiFace(CoatcheckMiddleware(silent, node.coat)).request("POST", "/")
    assert (await node.coat.list_sessions("50")).items == ()


async def test_a_sign_in_of_a_cancelled_request_is_taken_back(node: Node) -> None:
    started = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).login("50")
        started.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(AsgiFace(CoatcheckMiddleware(slow, node.coat)).request("POST", "/"))
    await started.wait()
    assert len((await node.coat.list_sessions("50")).items) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await node.coat.list_sessions("50")).items == ()


async def test_a_sign_in_cancelled_on_its_way_is_ended_by_the_upkeep(node: Node) -> None:
    await node.coat.start()
    arrived, hold = asyncio.Event(), asyncio.Event()
    inner = node.store.inner.admit

    async def admit(*args: Any, **kwargs: Any) -> Any:
        admitted = await inner(*args, **kwargs)
        arrived.set()
        await hold.wait()
        return admitted

    cast(Any, node.store).admit = admit
    task = asyncio.create_task(node.coat.session(None).login("50"))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await node.coat.list_sessions("50")).items) == 1
    await node.coat.engine.maintain()
    assert (await node.coat.list_sessions("50")).items == ()


async def test_a_client_that_is_gone_before_the_head_takes_the_sign_in_back(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).login("50")
        for message in ok():
            await send(message)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise OSError("connection reset")

    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "client": None}
    with pytest.raises(OSError, match="reset"):
        await CoatcheckMiddleware(app, node.coat)(scope, receive, send)
    assert (await node.coat.list_sessions("50")).items == ()


async def test_a_framework_outside_that_raises_again_after_its_500_is_quiet_about_a_store_failure(node: Node) -> None:
    # Starlette's outermost layer answers 500 and raises; our answer took the place of the 500, the rest is dropped.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await session_of(scope).load()
        except Exception:
            for message in ok(500):
                await send(message)
            raise

    cookie = await node.cookie()
    node.store.away = frozenset()
    answer = await Browser(AsgiFace(CoatcheckMiddleware(app, node.coat)), cookie).get("/")
    assert (answer.status, answer.problem["code"]) == (503, "store_unavailable")


# -- WebSocket -----------------------------------------------------------------------------------------------------


async def test_a_websocket_has_the_session_and_commits_in_accept(node: Node) -> None:
    verbs: list[list[str]] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await session.load()
        session["seen"] = 1
        node.store.forget()
        await send({"type": "websocket.accept"})
        verbs.append(list(node.store.verbs))
        await send({"type": "websocket.send", "text": str(session.subject)})

    cookie = await node.cookie()
    sent = await socket(CoatcheckMiddleware(app, node.coat), [(b"cookie", f"{COOKIE}={cookie}".encode())])
    assert verbs == [["commit"]]
    assert [message["type"] for message in sent] == ["websocket.accept", "websocket.send"]
    assert dict(sent[0]["headers"])[b"vary"] == b"Cookie"
    assert sent[1]["text"] == "50"
    again = node.coat.session(cookie)
    await again.load()
    assert dict(again) == {"seen": 1}


async def test_a_websocket_accept_carries_a_new_cookie(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).login("50")
        await send({"type": "websocket.accept", "headers": [(b"x-own", b"1")]})

    [accept] = await socket(CoatcheckMiddleware(app, node.coat))
    names = [name for name, _ in accept["headers"]]
    assert names == [b"x-own", b"vary", b"cache-control", b"set-cookie"]


@pytest.mark.parametrize(
    "origin", [(b"origin", b"https://evil.example"), (b"sec-fetch-site", b"cross-site"), (b"origin", b"null")]
)
@pytest.mark.parametrize("extension", [True, False])
async def test_a_websocket_of_another_site_is_refused(node: Node, origin: tuple[bytes, bytes], extension: bool) -> None:
    # Cross-site WebSocket hijacking: the browser sends the cookie, and no preflight asks anybody.
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the application must not see it")

    wrapped = CoatcheckMiddleware(app, node.coat)
    cookie = (b"cookie", f"{COOKIE}={await node.cookie()}".encode())
    sent = await socket(wrapped, [cookie, origin], extensions={"websocket.http.response": {}} if extension else None)
    if extension:
        assert [message["type"] for message in sent] == [
            "websocket.http.response.start",
            "websocket.http.response.body",
        ]
        assert sent[0]["status"] == 403
    else:
        assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_websocket_of_our_own_page_is_accepted(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "websocket.accept"})

    sent = await socket(CoatcheckMiddleware(app, node.coat), [(b"origin", b"https://app.example")])
    assert sent == [{"type": "websocket.accept", "headers": []}]


@pytest.mark.parametrize("extension", [True, False])
async def test_a_websocket_that_needs_a_sign_in_is_refused_and_hears_no_more(node: Node, extension: bool) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await session.load()
        session.require_login()

    sent = await socket(
        CoatcheckMiddleware(app, node.coat), extensions={"websocket.http.response": {}} if extension else {}
    )
    assert sent[0].get("status", 1008) == (401 if extension else 1008)


async def test_a_websocket_whose_commit_fails_is_not_accepted(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = session_of(scope)
        await session.load()
        session["a"] = 1
        node.store.away = frozenset({"commit"})
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "text": "never"})
        await send({"type": "websocket.close"})

    cookie = (b"cookie", f"{COOKIE}={await node.cookie()}".encode())
    assert await socket(CoatcheckMiddleware(app, node.coat), [cookie]) == [{"type": "websocket.close", "code": 1008}]


async def test_a_sign_in_on_a_websocket_that_is_not_accepted_is_taken_back(node: Node) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).login("50")
        await send({"type": "websocket.close"})

    await socket(CoatcheckMiddleware(app, node.coat))
    assert (await node.coat.list_sessions("50")).items == ()


# -- lifespan ------------------------------------------------------------------------------------------------------


async def lifespan(app: App, requests: Sequence[str] = ()) -> list[str]:
    """Start and stop an application as a server does; what it answered."""
    sent: list[str] = []
    queue: asyncio.Queue[Message] = asyncio.Queue()
    heard = asyncio.Event()

    async def send(message: Message) -> None:
        sent.append(message["type"])
        heard.set()

    task = asyncio.create_task(cast(Any, app({"type": "lifespan"}, queue.get, send)))
    await queue.put({"type": "lifespan.startup"})
    waiting = asyncio.create_task(heard.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done() and sent == ["lifespan.startup.complete"]:
        for path in requests:
            await AsgiFace(app).request("GET", path)
        await queue.put({"type": "lifespan.shutdown"})
    await asyncio.wait({task})
    task.exception()
    return sent


def living(log: list[str]) -> App:
    """A small application with a lifespan of its own."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await session_of(scope).load()
            for message in ok():
                await send(message)
            return
        await receive()
        log.append("open")
        try:
            await send({"type": "lifespan.startup.complete"})
            await receive()
        except ConfigurationError:
            # As Starlette does it: it reports what went wrong, and raises.
            await send({"type": "lifespan.startup.failed", "message": ""})
            raise
        finally:
            log.append("close")
        await send({"type": "lifespan.shutdown.complete"})

    return app


async def test_the_store_opens_and_closes_with_the_application(node: Node) -> None:
    opened: list[bool] = []
    inner_close = node.store.inner.close

    async def close() -> None:
        opened.append(False)
        await inner_close()

    cast(Any, node.store).close = close
    app = CoatcheckMiddleware(living([]), node.coat)
    assert await lifespan(app, ["/"]) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert opened == [False]
    # A second start of the same application, as test clients do it.
    assert await lifespan(app, ["/"]) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    assert opened == [False, False]


async def test_a_store_that_is_away_does_not_keep_the_application_from_starting(node: Node) -> None:
    node.store.away = frozenset()
    app = CoatcheckMiddleware(living([]), node.coat)
    assert await lifespan(app) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_wrong_setting_stops_the_start_and_lets_the_application_clean_up(node: Node) -> None:
    async def refuse() -> None:
        raise ConfigurationError("store: wrong")

    cast(Any, node.store).open = refuse
    log: list[str] = []
    assert await lifespan(CoatcheckMiddleware(living(log), node.coat)) == ["lifespan.startup.failed"]
    assert log == ["open", "close"]


async def test_a_mounted_application_without_a_lifespan_starts_at_its_first_request(node: Node) -> None:
    face = AsgiFace(CoatcheckMiddleware(living([]), node.coat))
    cookie = await Node().cookie()
    assert (await Browser(face, cookie).get("/")).status == 200
    assert node.store.verbs[:1] == ["id_keys"]


async def test_after_the_end_a_late_request_opens_the_store_again(node: Node) -> None:
    app = CoatcheckMiddleware(living([]), node.coat)
    cookie = await node.cookie()
    await lifespan(app)
    node.store.forget()
    assert (await Browser(AsgiFace(app), cookie).get("/")).status == 200
    assert node.store.verbs == ["id_keys", "read_ring", "load"]


def test_one_coat_serves_several_event_loops_one_after_the_other() -> None:
    node = Node()
    face = AsgiFace(CoatcheckMiddleware(living([]), node.coat))
    cookie = asyncio.run(node.cookie())
    for _ in range(3):
        # Old enough to be noted: the keeper's task of the ended loop must not be taken for a living one.
        cast(FakeSystem, node.coat.engine.system).advance(600)
        assert asyncio.run(Browser(face, cookie).get("/")).status == 200
    asyncio.run(node.coat.close())


# -- several installations -----------------------------------------------------------------------------------------


async def test_the_same_coat_twice_is_one_session(node: Node) -> None:
    seen: list[object] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(session_of(scope))
        await session_of(scope).login("50")
        for message in ok():
            await send(message)

    inner = CoatcheckMiddleware(app, node.coat)

    async def between(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(session_of(scope))
        await inner(scope, receive, send)

    answer = await AsgiFace(CoatcheckMiddleware(between, node.coat)).request("POST", "/")
    assert seen[0] is seen[1]
    assert len(answer.all("set-cookie")) == len(answer.all("vary")) == 1
    assert len((await node.coat.list_sessions("50")).items) == 1


async def test_two_coats_around_one_application_keep_apart(node: Node) -> None:
    staff = Node(Settings(namespace="staff", cookie=CookieSettings(name="__Host-Http-staff")))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope, coat=node.coat).login("50")
        await session_of(scope, coat=staff.coat).login("7")
        assert session_of(scope) is session_of(scope, coat=node.coat), "the innermost"
        for message in ok():
            await send(message)

    both = CoatcheckMiddleware(CoatcheckMiddleware(app, node.coat), staff.coat)
    answer = await AsgiFace(both).request("POST", "/")
    assert [line.partition("=")[0] for line in answer.all("set-cookie")] == [COOKIE, "__Host-Http-staff"]
    await staff.coat.close()


def test_a_coat_of_the_other_colour_is_refused() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None: ...

    with pytest.raises(ConfigurationError, match="AsyncCoatcheck"):
        CoatcheckMiddleware(app, cast(Any, Coatcheck("memory:")))


async def test_a_scope_without_middleware_names_the_cure(node: Node) -> None:
    with pytest.raises(RuntimeError, match="CoatcheckMiddleware"):
        session_of({"type": "http"})
    with pytest.raises(RuntimeError, match="CoatcheckMiddleware"):
        session_of({"type": "http"}, coat=node.coat)
