"""Connections that outlast their request are ended with the session: WebSockets, ASGI streams, WSGI bodies.

Time is turned by hand and so are the timers; the store is taken away on command. One test asks a real server.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, cast

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketState

from coatcheck import AsyncCoatcheck, Coatcheck, Settings, TokenSettings
from coatcheck.blocking import run_blocking
from coatcheck.core.ports import Colour
from coatcheck.session import AsyncSession, SendCookie
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem, command_budget
from coatcheck.web import asgi, wsgi
from coatcheck.web.asgi import App, Message, Receive, Scope, Send, session_of
from tests.manager.test_outage import Node as OutageNode
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import accepts, until
from tests.servers.valkey import ValkeySingle
from tests.web.faces import COOKIE

pytestmark = pytest.mark.anyio

LEASE = 1.0
STEP = 0.001
PUBLIC = "https://app.example"


class Timers:
    """What would be called later, called when a test says so."""

    def __init__(self) -> None:
        self.pending: list[_Timer] = []
        self.made = 0
        self.armed = asyncio.Event()

    def __call__(self, seconds: float, call: Callable[[], None]) -> _Timer:
        timer = _Timer(self, seconds, call)
        self.pending.append(timer)
        self.made += 1
        self.armed.set()
        return timer

    def fire(self) -> None:
        """The only timer there is goes off."""
        (timer,) = self.pending
        self.pending.clear()
        self.armed.clear()
        timer.call()


class _Timer:
    def __init__(self, timers: Timers, seconds: float, call: Callable[[], None]) -> None:
        self.timers, self.seconds, self.call = timers, seconds, call

    def cancel(self) -> None:
        if self in self.timers.pending:
            self.timers.pending.remove(self)


class Node(OutageNode):
    """A node whose store and feed can be taken away, with an application behind the ASGI gateway."""

    def __init__(self, inner: object, system: FakeSystem, settings: Settings) -> None:
        super().__init__("async", inner, system, settings)
        self.timers = Timers()

    @property
    def face(self) -> AsyncCoatcheck:
        assert isinstance(self.coat, AsyncCoatcheck)
        return self.coat

    def wrap(self, app: App) -> asgi.CoatcheckMiddleware:
        wrapped = asgi.CoatcheckMiddleware(app, self.face)
        wrapped.later = self.timers
        return wrapped

    async def token(self, subject: str = "ann") -> tuple[str, str]:
        """An access token, and the sid of its session."""
        session = self.face.session(None)
        await session.login(subject)
        issued = await session.tokens(carrier="body")
        assert session.sid is not None
        return issued.access_token, session.sid


@pytest.fixture
def make() -> Iterator[Callable[..., Node]]:
    """`make(outage="near")`: nodes over one store, on one clock."""
    system = FakeSystem()
    inner = open_store("memory:", colour="async", system=system)
    made: list[Node] = []

    def one(**changes: Any) -> Node:
        chosen: dict[str, Any] = {"server_key": b"k" * 32, "public_url": PUBLIC, **changes}
        made.append(Node(inner, system, Settings(**chosen)))
        return made[-1]

    yield one
    for node in made:
        assert node.timers.pending == [], "a timer outlived its connection"


@pytest.fixture
def node(make: Callable[..., Node]) -> Node:
    return make()


class Connection:
    """One WebSocket or request as a server would run it."""

    def __init__(
        self, app: App, *, cookie: str | None = None, token: str | None = None, kind: str = "websocket", spec: str = ""
    ) -> None:
        headers = [(b"host", b"app.example")]
        if cookie is not None:
            headers.append((b"cookie", f"{COOKIE}={cookie}".encode()))
        if token is not None:
            headers.append((b"authorization", f"Bearer {token}".encode()))
        self.scope: Scope = {
            "type": kind,
            "path": "/live",
            "scheme": "wss" if kind == "websocket" else "https",
            "headers": headers,
            "client": ("203.0.113.7", 4711),
        }
        if kind == "http":
            self.scope["method"] = "GET"
        if spec:
            self.scope["asgi"] = {"version": "3.0", "spec_version": spec}
        self.sent: list[Message] = []
        self.inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.ended = asyncio.Event()
        """The server was told that this is the end."""
        self.opened = asyncio.Event()
        self.server_send: Callable[[Message], Awaitable[None]] = self.take
        self.task = asyncio.create_task(cast(Any, app(self.scope, self.inbox.get, lambda it: self.server_send(it))))

    async def take(self, message: Message) -> None:
        assert not self.ended.is_set(), f"the server would refuse {message['type']} after the end"
        self.sent.append(message)
        if message["type"] == "websocket.close" or message.get("more_body") is False:
            self.ended.set()
        elif message["type"] != "http.response.start":
            self.opened.set()

    def say(self, text: str) -> None:
        self.inbox.put_nowait({"type": "websocket.receive", "text": text})

    @property
    def types(self) -> list[str]:
        return [message["type"].rpartition(".")[2] for message in self.sent]


class Held:
    """An application that takes what it is told and stays until it is let go."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.heard: list[Message] = []
        self.heard_something = asyncio.Event()
        self.left = asyncio.Event()
        self.send: Send = cast(Any, None)
        self.session: AsyncSession = cast(Any, None)
        self.before: Callable[[AsyncSession], Awaitable[None]] = self._load

    @staticmethod
    async def _load(session: AsyncSession) -> None:
        await session.load()

    async def _open(self, scope: Scope, send: Send) -> None:
        self.send, self.session = send, session_of(scope)
        await self.before(self.session)
        if scope["type"] == "websocket":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"1", "more_body": True})

    async def silent(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The attack: it never sends and never receives."""
        await self._open(scope, send)
        await self.go.wait()

    async def listening(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._open(scope, send)
        while not self.heard or not self.heard[-1]["type"].endswith(".disconnect"):
            self.heard.append(await receive())
            self.heard_something.set()

    async def tidying(self, scope: Scope, receive: Receive, send: Send) -> None:
        """It stays for a while when its client has left."""
        await self.listening(scope, receive, send)
        self.left.set()
        await self.go.wait()


KINDS = pytest.mark.parametrize("kind", ["websocket", "http"])


def ending(kind: str, code: int = 1008, reason: str = "session_ended") -> Message:
    if kind == "websocket":
        return {"type": "websocket.close", "code": code, "reason": reason}
    return {"type": "http.response.body", "body": b"", "more_body": False}


# -- the end of the session ----------------------------------------------------------------------------------------


@KINDS
async def test_an_application_that_never_sends_and_never_receives_is_closed_all_the_same(node: Node, kind: str) -> None:
    # The attack: a page left open by whoever was signed out shows what the server goes on holding for it.
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind=kind)
    await connection.opened.wait()
    await node.sign_out(cookie)
    assert not connection.ended.is_set()
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.ended.wait()
    assert connection.sent[-1] == ending(kind)
    assert app.session.ended is not None
    assert app.session.ended.reason == "logout"
    app.go.set()
    await connection.task


@KINDS
async def test_an_application_that_waits_for_its_client_hears_that_it_is_gone(node: Node, kind: str) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.listening), cookie=cookie, kind=kind)
    await connection.opened.wait()
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.task
    gone = {"type": "websocket.disconnect", "code": 1008, "reason": "session_ended"}
    assert app.heard == [gone if kind == "websocket" else {"type": "http.disconnect"}]
    assert connection.sent[-1] == ending(kind)


@KINDS
async def test_a_look_comes_at_least_once_a_lease_and_asks_no_store_while_the_session_is_known(
    node: Node, kind: str
) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind=kind)
    await connection.opened.wait()
    with command_budget(node.coat, 0):
        for _ in range(5):
            assert 0 < node.timers.pending[0].seconds <= LEASE
            node.system.advance(node.timers.pending[0].seconds / 2)
            await node.feed.beat()
            node.system.advance(node.timers.pending[0].seconds / 2)
            node.timers.fire()
    assert not connection.ended.is_set()
    app.go.set()
    await connection.task


@KINDS
async def test_what_the_application_sends_after_the_push_does_not_leave(node: Node, kind: str) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind=kind)
    await connection.opened.wait()
    before = len(connection.sent)
    await node.sign_out(cookie)
    secret = {"type": "websocket.send", "text": "x"} if kind == "websocket" else {"type": "http.response.body"}
    for _ in range(2):
        await app.send({**secret, "body": b"x", "more_body": True})
    await connection.ended.wait()
    assert connection.sent[before:] == [ending(kind)]
    app.go.set()
    await connection.task


async def test_what_a_client_says_after_the_push_does_not_arrive(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.listening), cookie=cookie)
    await connection.opened.wait()
    connection.say("while signed in")
    await app.heard_something.wait()
    await node.sign_out(cookie)
    connection.say("pay everything to me")
    await connection.task
    assert [each.get("text") for each in app.heard] == ["while signed in", None]
    assert connection.sent[-1] == ending("websocket")


async def test_a_push_that_is_lost_is_caught_exactly_when_the_lease_is_over(make: Callable[..., Node]) -> None:
    node, other = make(), make()
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    # Nothing is heard any more on this node, and the other one ends the session.
    node.feed.up = False
    await other.sign_out(cookie)
    node.system.advance(LEASE - STEP)
    await app.send({"type": "websocket.send", "text": "within the reach"})
    assert node.timers.pending[0].seconds == LEASE
    node.system.advance(STEP)
    await app.send({"type": "websocket.send", "text": "beyond it"})
    await connection.ended.wait()
    assert connection.types == ["accept", "send", "close"]
    app.go.set()
    await connection.task


async def test_all_who_wait_for_a_look_ask_once(make: Callable[..., Node]) -> None:
    node = make(near_copies=0)
    cookie, app = await node.sign_in(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    node.system.advance(LEASE)
    node.store.verbs.clear()
    await asyncio.gather(*(app.send({"type": "websocket.send", "text": str(each)}) for each in range(9)))
    assert node.store.verbs == ["load"]
    assert len(connection.sent) == 10
    app.go.set()
    await connection.task


async def test_an_end_at_the_session_s_own_deadline_is_an_end(make: Callable[..., Node]) -> None:
    node = make(absolute_timeout=timedelta(minutes=20), idle_timeout=timedelta(minutes=20))
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    node.system.advance(timedelta(minutes=20))
    node.timers.fire()
    await connection.ended.wait()
    assert connection.sent[-1] == ending("websocket")
    app.go.set()
    await connection.task


@KINDS
@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_sends_after_the_end_are_what_the_version_of_asgi_says(node: Node, kind: str, spec: str) -> None:
    # From 2.4 on an endless generator that only sends would otherwise run for ever.
    cookie, told = await node.warm(), []

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        app = Held()
        await app._open(scope, send)
        await node.sign_out(cookie)
        message = {"type": "websocket.send"} if kind == "websocket" else {"type": "http.response.body"}
        for each in range(100):
            try:
                await send({**message, "text": "x", "body": b"x", "more_body": True})
            except OSError:
                told.append(each)
                raise

    connection = Connection(node.wrap(endless), cookie=cookie, kind=kind, spec=spec)
    await connection.task
    assert told == ([0] if spec == "2.4" else [])
    assert connection.sent[-1] == ending(kind)


async def test_a_client_that_reads_nothing_does_not_keep_the_application_from_hearing_of_the_end(node: Node) -> None:
    cookie, app, reads = await node.warm(), Held(), asyncio.Event()
    connection = Connection(node.wrap(app.listening), cookie=cookie)
    await connection.opened.wait()

    async def full(message: Message) -> None:
        await reads.wait()
        await connection.take(message)

    connection.server_send = full
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await app.heard_something.wait()
    assert app.heard[0]["type"] == "websocket.disconnect"
    assert not connection.task.done(), "the close is on its way"
    reads.set()
    await connection.task
    assert connection.sent[-1] == ending("websocket")


async def test_a_server_whose_client_has_just_left_does_not_make_it_a_failure(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.listening), cookie=cookie)
    await connection.opened.wait()

    async def gone(message: Message) -> None:
        raise OSError("connection reset")

    connection.server_send = gone
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.task


async def test_a_session_read_a_moment_ago_is_not_taken_for_alive_after_the_push(node: Node) -> None:
    # What the store said on this very connection does not outlive what it has told since.
    cookie, app = await node.sign_in(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    await node.sign_out(cookie)
    await app.send({"type": "websocket.send", "text": "x"})
    await connection.ended.wait()
    assert connection.types == ["accept", "close"]
    app.go.set()
    await connection.task


async def test_the_next_look_comes_when_what_was_known_has_run_out_and_not_a_lease_later(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    node.system.advance(0.75)
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    assert [timer.seconds for timer in node.timers.pending] == [LEASE - 0.75]
    app.go.set()
    await connection.task


async def test_an_end_that_overtakes_a_send_is_no_error_of_the_application(node: Node) -> None:
    cookie, app, under_way, free = await node.warm(), Held(), asyncio.Event(), asyncio.Event()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()

    async def overtaken(message: Message) -> None:
        if message["type"] == "websocket.send":
            under_way.set()
            await free.wait()
            raise RuntimeError("a send after the close")
        await connection.take(message)

    connection.server_send = overtaken
    sending = asyncio.ensure_future(app.send({"type": "websocket.send", "text": "x"}))
    await under_way.wait()
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.ended.wait()
    free.set()
    await sending
    app.go.set()
    await connection.task


# -- what stays ----------------------------------------------------------------------------------------------------


async def test_a_connection_that_has_rotated_its_own_session_stays(node: Node) -> None:
    cookie, app = await node.warm(), Held()

    async def rotate(session: AsyncSession) -> None:
        await session.load()
        await session.rotate(claims={"role": "owner"})

    app.before = rotate
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    for _ in range(3):
        node.system.advance(LEASE)
        node.timers.fire()
        await node.timers.armed.wait()
    assert connection.types == ["accept"]
    app.go.set()
    await connection.task


async def test_a_rotation_by_another_request_is_followed_beyond_the_alias(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    other = await node.load(cookie)
    await node.do(other.rotate())
    alias = node.coat.settings.rotation_alias.total_seconds()
    for seconds in (LEASE, alias + LEASE, LEASE):
        node.system.advance(seconds)
        node.timers.fire()
        await node.timers.armed.wait()
    assert connection.types == ["accept"]
    app.go.set()
    await connection.task


async def test_an_id_that_is_dead_at_once_takes_the_connections_of_its_thief_with_it(node: Node) -> None:
    # The attack: a stolen cookie opens a socket; the owner's new privileges, under a new id, must not be the thief's.
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    await node.do((await node.load(cookie)).rotate(claims={"role": "owner"}))
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.ended.wait()
    app.go.set()
    await connection.task


async def test_a_commit_elsewhere_costs_one_look_and_nothing_else(make: Callable[..., Node]) -> None:
    node = make()
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    other = await node.load(cookie)
    other["cart"] = 1
    await node.do(other.commit())
    with command_budget(node.coat, 1):
        for _ in range(3):
            await app.send({"type": "websocket.send", "text": "x"})
    assert connection.types == ["accept", "send", "send", "send"]
    app.go.set()
    await connection.task


async def test_an_open_connection_counts_as_use_until_the_absolute_timeout(make: Callable[..., Node]) -> None:
    node = make(idle_timeout=timedelta(minutes=10), absolute_timeout=timedelta(minutes=25))
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    for _ in range(24):
        node.system.advance(timedelta(minutes=1))
        node.timers.fire()
        await node.timers.armed.wait()
        await node.coat.engine.maintain()
    assert connection.types == ["accept"]
    node.system.advance(timedelta(minutes=1))
    node.timers.fire()
    await connection.ended.wait()
    app.go.set()
    await connection.task


@KINDS
async def test_nobody_is_looked_after_where_nobody_is_signed_in(node: Node, kind: str) -> None:
    app = Held()
    connection = Connection(node.wrap(app.silent), kind=kind)
    await connection.opened.wait()
    assert node.timers.made == 0
    app.go.set()
    await connection.task


async def test_a_session_that_is_loaded_only_after_the_accept_is_looked_at(node: Node) -> None:
    cookie, app = await node.warm(), Held()

    async def nothing(session: AsyncSession) -> None:
        """Who it is matters later."""

    app.before = nothing
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    node.system.advance(LEASE)
    node.timers.fire()
    await app.session.load()
    assert app.session.subject == "ann"
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.ended.wait()
    app.go.set()
    await connection.task


@KINDS
async def test_after_its_own_end_a_connection_is_not_looked_at(node: Node, kind: str) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind=kind)
    await connection.opened.wait()
    assert len(node.timers.pending) == 1
    own = {"type": "websocket.close", "code": 1000}
    await app.send(own if kind == "websocket" else {**ending("http"), "body": b"last"})
    assert node.timers.pending == []
    await node.sign_out(cookie)
    sent = list(connection.sent)
    # As Starlette runs background tasks: after the last octet.
    app.go.set()
    await connection.task
    assert connection.sent == sent


async def test_after_the_client_has_left_nothing_is_sent_to_it(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.tidying), cookie=cookie)
    await connection.opened.wait()
    connection.inbox.put_nowait({"type": "websocket.disconnect", "code": 1001})
    await app.left.wait()
    assert node.timers.pending == [], "while the application tidies up"
    app.go.set()
    await connection.task
    assert connection.types == ["accept"]


async def test_a_cancelled_receive_is_the_application_s_own_affair(node: Node) -> None:
    cookie = await node.warm()
    caught: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).load()
        await send({"type": "websocket.accept"})
        try:
            async with asyncio.timeout(0):
                await receive()
        except TimeoutError:
            caught.append("timeout")
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    connection = Connection(node.wrap(app), cookie=cookie)
    await connection.task
    assert caught == ["timeout"]


async def test_a_cancelled_connection_leaves_nothing_behind(make: Callable[..., Node]) -> None:
    node = make(near_copies=0)
    cookie, app, asked, never = await node.sign_in(), Held(), asyncio.Event(), asyncio.Event()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    inner = node.store.inner

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        async def load(self, *args: Any) -> None:
            asked.set()
            await never.wait()

    node.store.inner = Slow()
    node.system.advance(LEASE)
    node.timers.fire()
    await asked.wait()
    connection.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connection.task
    assert [task.get_name() for task in asyncio.all_tasks() if "stream" in task.get_name()] == []
    node.store.inner = inner


async def test_a_node_that_hears_of_no_changes_asks_once_a_lease_and_not_at_every_message(node: Node) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    node.feed.up = False
    node.feed.cut()
    with command_budget(node.coat, 1):
        for _ in range(5):
            await app.send({"type": "websocket.send", "text": "x"})
    node.system.advance(LEASE)
    with command_budget(node.coat, 1):
        for _ in range(5):
            await app.send({"type": "websocket.send", "text": "x"})
    app.go.set()
    await connection.task


async def test_whoever_is_not_signed_in_has_nothing_to_lose(node: Node) -> None:
    session = node.face.session(None)
    await session.load()
    assert await session.still_lives()


# -- what costs nothing --------------------------------------------------------------------------------------------


async def test_an_ordinary_response_has_no_timer_no_task_and_no_coroutine_of_ours(node: Node) -> None:
    cookie = await node.warm()
    returned: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).load()
        for message in (
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": b"ok"},
        ):
            awaitable = send(message)
            returned.append(awaitable is inner[-1])
            await awaitable

    inner: list[Awaitable[None]] = []
    connection = Connection(node.wrap(app), cookie=cookie, kind="http")

    def take(message: Message) -> Awaitable[None]:
        inner.append(connection.take(message))
        return inner[-1]

    connection.server_send = take
    wrapped = connection.scope, connection.inbox.get, take
    connection.task.cancel()
    await node.wrap(app)(*wrapped)
    assert returned == [True, True]
    assert node.timers.made == 0


async def test_a_stream_shorter_than_a_lease_asks_nobody(node: Node) -> None:
    cookie = await node.warm()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).load()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    with command_budget(node.coat, 0):
        await Connection(node.wrap(app), cookie=cookie, kind="http").task
    assert node.timers.made == 1
    assert node.timers.pending == []


async def test_a_body_of_stated_length_that_is_being_sent_is_not_recalled(node: Node) -> None:
    cookie = await node.warm()

    async def download(scope: Scope, receive: Receive, send: Send) -> None:
        await session_of(scope).load()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"3")]})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await node.sign_out(cookie)
        await send({"type": "http.response.body", "body": b"2", "more_body": True})
        await send({"type": "http.response.body", "body": b"3", "more_body": False})

    connection = Connection(node.wrap(download), cookie=cookie, kind="http")
    await connection.task
    assert b"".join(message.get("body", b"") for message in connection.sent) == b"123"
    assert node.timers.made == 0


async def test_looks_do_not_use_up_the_request_s_time_for_the_store(make: Callable[..., Node]) -> None:
    node = make(near_copies=0)
    cookie, app = await node.sign_in(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind="http")
    await connection.opened.wait()
    before = app.session.lasting
    node.system.advance(LEASE)
    node.timers.fire()
    await node.timers.armed.wait()
    assert (before, app.session.lasting) == (False, True)
    app.go.set()
    await connection.task


# -- a store that is away ------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("policy", ["refuse", "anonymous"])
async def test_without_a_store_a_connection_ends_when_the_lease_is_over(
    make: Callable[..., Node], kind: str, policy: str
) -> None:
    node = make(outage=policy)
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie, kind=kind)
    await connection.opened.wait()
    node.store.take_away("frozen")
    node.system.advance(LEASE - STEP)
    await app.send({"type": "websocket.send", "more_body": True})
    assert not connection.ended.is_set()
    node.system.advance(STEP)
    node.timers.fire()
    await connection.ended.wait()
    assert connection.sent[-1] == ending(kind, 1013, "store_unavailable")
    app.go.set()
    await connection.task


async def test_the_policy_that_goes_on_with_what_was_known_keeps_connections_for_its_grace(
    make: Callable[..., Node],
) -> None:
    node = make(outage="near", outage_grace=timedelta(seconds=5))
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.silent), cookie=cookie)
    await connection.opened.wait()
    node.store.take_away("cut")
    for _ in range(5):
        node.system.advance(LEASE)
        node.timers.fire()
        await node.timers.armed.wait()
    assert app.session.through_outage
    node.system.advance(LEASE - STEP)
    assert connection.types == ["accept"]
    node.system.advance(STEP)
    await app.send({"type": "websocket.send", "text": "beyond the grace"})
    await connection.ended.wait()
    assert connection.sent[-1] == ending("websocket", 1013, "store_unavailable")
    app.go.set()
    await connection.task


async def test_a_look_that_fails_for_whatever_reason_ends_the_connection(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    cookie, app = await node.warm(), Held()
    connection = Connection(node.wrap(app.listening), cookie=cookie)
    await connection.opened.wait()
    await node.do((await node.load(cookie)).logout())

    def broken(verb: str) -> None:
        raise ZeroDivisionError("a mistake of ours")

    node.store.before = broken
    node.system.advance(LEASE)
    with caplog.at_level(logging.ERROR, "coatcheck"):
        node.timers.fire()
        await connection.task
    assert connection.sent[-1] == ending("websocket", 1011, "internal_error")
    assert "a mistake of ours" in caplog.text
    node.store.before = lambda verb: None


# -- access tokens -------------------------------------------------------------------------------------------------


@KINDS
async def test_a_connection_by_access_token_ends_with_its_session(make: Callable[..., Node], kind: str) -> None:
    node = make(tokens=TokenSettings())
    app = Held()
    token, sid = await node.token()
    connection = Connection(node.wrap(app.silent), token=token, kind=kind)
    await connection.opened.wait()
    node.store.verbs.clear()
    for _ in range(3):
        await app.send({"type": "websocket.send", "more_body": True})
    assert node.store.verbs == [], "what was asked at the start counts for a lease"
    node.system.advance(LEASE)
    node.timers.fire()
    await node.timers.armed.wait()
    assert node.store.verbs == ["standing"]
    await node.face.revoke_session(sid, reason="stolen")
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.ended.wait()
    assert connection.sent[-1] == ending(kind)
    app.go.set()
    await connection.task


@pytest.mark.parametrize("how", ["denied", "expired"])
async def test_a_connection_lasts_no_longer_than_its_access_token(make: Callable[..., Node], how: str) -> None:
    node = make(tokens=TokenSettings())
    app = Held()
    token, _ = await node.token()
    connection = Connection(node.wrap(app.silent), token=token)
    await connection.opened.wait()
    if how == "denied":
        await node.face.deny_token(token)
        node.system.advance(LEASE)
    else:
        node.system.advance(timedelta(hours=1))
    node.timers.fire()
    await connection.ended.wait()
    app.go.set()
    await connection.task


# -- Starlette -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_an_endless_starlette_stream_ends(node: Node, spec: str) -> None:
    cookie = await node.warm()

    async def page(request: Request) -> StreamingResponse:
        await session_of(request.scope).load()

        async def endless() -> AsyncIterator[str]:
            while True:
                yield "data: tick\n\n"
                await node.sign_out(cookie)

        return StreamingResponse(endless(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/live", page)])
    connection = Connection(node.wrap(app), cookie=cookie, kind="http", spec=spec)
    connection.inbox.put_nowait({"type": "http.request"})
    # From 2.4 on Starlette makes a ClientDisconnect of what it is told; the server need not log that.
    await connection.task
    assert connection.sent[-1] == ending("http")


async def test_a_mistake_of_the_application_after_the_end_is_still_told(node: Node) -> None:
    cookie, app = await node.warm(), Held()

    async def clumsy(scope: Scope, receive: Receive, send: Send) -> None:
        await app.listening(scope, receive, send)
        raise ZeroDivisionError

    connection = Connection(node.wrap(clumsy), cookie=cookie)
    await connection.opened.wait()
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    with pytest.raises(ZeroDivisionError):
        await connection.task


async def test_a_starlette_websocket_ends(node: Node) -> None:
    cookie = await node.warm()
    states: list[WebSocketState] = []

    async def live(websocket: WebSocket) -> None:
        await session_of(websocket.scope).load()
        await websocket.accept()
        async for _ in websocket.iter_text():
            """Nobody says anything."""
        states.append(websocket.client_state)

    app = Starlette(routes=[WebSocketRoute("/live", live)])
    connection = Connection(node.wrap(app), cookie=cookie)
    connection.inbox.put_nowait({"type": "websocket.connect"})
    await connection.opened.wait()
    await node.sign_out(cookie)
    node.system.advance(LEASE)
    node.timers.fire()
    await connection.task
    assert states == [WebSocketState.DISCONNECTED]
    assert connection.sent[-1] == ending("websocket")


# -- WSGI ----------------------------------------------------------------------------------------------------------


class Blocking(OutageNode):
    """A blocking node; its requests are sent here."""

    def ask(self, app: wsgi.App, cookie: str, headers: dict[str, str] | None = None) -> Iterator[bytes]:
        assert isinstance(self.coat, Coatcheck)
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": "/live",
            "HTTP_HOST": "app.example",
            "HTTP_COOKIE": f"{COOKIE}={cookie}",
            "wsgi.url_scheme": "https",
            "wsgi.input": io.BytesIO(),
        }
        written: list[bytes] = []
        body = wsgi.CoatcheckMiddleware(app, self.coat)(environ, lambda *_: written.append)
        return iter(body)

    def warm_cookie(self) -> str:
        return run_blocking(self.warm())

    def end(self, cookie: str) -> None:
        run_blocking(self.sign_out(cookie))


@pytest.fixture
def make_blocking() -> Callable[..., Blocking]:
    """`make_blocking(near_copies=0)`: a blocking node."""
    system = FakeSystem()
    colour: Colour = "blocking"
    inner = open_store("memory:", colour=colour, system=system)

    def one(**changes: Any) -> Blocking:
        chosen: dict[str, Any] = {"server_key": b"k" * 32, "public_url": PUBLIC, **changes}
        return Blocking(colour, inner, system, Settings(**chosen))

    return one


class Body:
    """Chunks without an end, and whether they were closed."""

    def __init__(self, headers: list[tuple[str, str]] | None = None, chunks: Iterable[bytes] = ()) -> None:
        self.headers, self.chunks = headers or [], chunks
        self.closed = False

    def app(self, environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Iterable[bytes]:
        wsgi.session_of(environ).load()
        start_response("200 OK", self.headers)
        return self

    def __iter__(self) -> Iterator[bytes]:
        yield from self.chunks or iter(lambda: b"x", b"")

    def close(self) -> None:
        self.closed = True


def test_a_wsgi_body_stops_after_the_chunk_that_was_sent(make_blocking: Callable[..., Blocking]) -> None:
    node, body = make_blocking(), Body()
    cookie = node.warm_cookie()
    chunks = node.ask(body.app, cookie)
    assert [next(chunks) for _ in range(3)] == [b"x"] * 3
    node.end(cookie)
    assert list(chunks) == []
    assert body.closed


def test_a_wsgi_body_asks_no_store_while_the_session_is_known(make_blocking: Callable[..., Blocking]) -> None:
    node, body = make_blocking(), Body()
    cookie = node.warm_cookie()
    with command_budget(node.coat, 0):
        chunks = node.ask(body.app, cookie)
        for _ in range(5):
            next(chunks)
            node.system.advance(LEASE / 2)
            run_blocking(node.feed.beat())
    cast(Any, chunks).close()
    assert body.closed


def test_a_wsgi_body_stops_exactly_at_the_end_of_the_lease_when_the_store_is_away(
    make_blocking: Callable[..., Blocking],
) -> None:
    node, body = make_blocking(), Body()
    chunks = node.ask(body.app, node.warm_cookie())
    next(chunks)
    node.store.take_away("frozen")
    node.system.advance(LEASE - STEP)
    assert next(chunks) == b"x"
    node.system.advance(STEP)
    assert list(chunks) == []
    assert body.closed


def test_a_wsgi_body_without_near_copies_asks_once_a_lease(make_blocking: Callable[..., Blocking]) -> None:
    node, body = make_blocking(near_copies=0), Body()
    chunks = node.ask(body.app, run_blocking(node.sign_in()))
    next(chunks)
    node.store.verbs.clear()
    for _ in range(5):
        next(chunks)
    assert node.store.verbs == []
    node.system.advance(LEASE)
    for _ in range(5):
        next(chunks)
    assert node.store.verbs == ["load"]
    cast(Any, chunks).close()


def test_a_wsgi_body_of_stated_length_is_not_cut_short(make_blocking: Callable[..., Blocking]) -> None:
    # The attack: a body shorter than its length lets the next response of the connection be read as its rest.
    node, body = make_blocking(), Body([("Content-Length", "3")], [b"1", b"2", b"3"])
    cookie = node.warm_cookie()
    chunks = node.ask(body.app, cookie)
    assert next(chunks) == b"1"
    node.end(cookie)
    assert list(chunks) == [b"2", b"3"]


def test_a_wsgi_application_that_writes_by_itself_is_told_like_one_whose_client_has_left(
    make_blocking: Callable[..., Blocking],
) -> None:
    node = make_blocking()
    cookie = node.warm_cookie()
    written: list[int] = []

    def app(environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Iterable[bytes]:
        wsgi.session_of(environ).load()
        write = start_response("200 OK", [])
        for each in range(9):
            write(b"x")
            written.append(each)
            if each == 2:
                node.end(cookie)
        return []

    assert list(node.ask(app, cookie)) == []
    assert written == [0, 1, 2]


# -- a real server -------------------------------------------------------------------------------------------------


@pytest.mark.servers
def test_a_stream_of_a_real_server_ends_when_another_node_ends_the_session(
    valkey_single: ValkeySingle, namespace: str
) -> None:
    reserved = reserve_port()
    settings = Settings(
        server_key=b"k" * 32,
        public_url=f"http://{LOOPBACK}:{reserved.port}",
        namespace=namespace,
    )
    coat = AsyncCoatcheck(valkey_single.url, settings=settings)
    silent = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        session = session_of(scope)
        await session.load()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(session.subject).encode(), "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            """The request itself."""
        silent.set()

    config = uvicorn.Config(
        asgi.CoatcheckMiddleware(app, coat), host=LOOPBACK, port=reserved.port, log_config=None, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    connection = http.client.HTTPConnection(LOOPBACK, reserved.port, timeout=20)
    try:
        until(lambda: accepts(reserved.port), within=20, what="the server")
        with Coatcheck(valkey_single.url, settings=settings) as other:
            session = other.session(None)
            session.login("50")
            action, sid = session.cookie_action, session.sid
            assert isinstance(action, SendCookie)
            assert sid is not None
            name = settings.session_cookie.wire_name.decode()
            connection.request("GET", "/live", headers={"cookie": f"{name}={action.id.text}"})
            answer = connection.getresponse()
            assert answer.read(2) == b"50"
            other.revoke_session(sid, reason="stolen")
            assert answer.read() == b""
            assert silent.wait(20)
    finally:
        connection.close()
        server.should_exit = True
        thread.join(20)
        reserved.release()
