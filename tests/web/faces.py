"""One application behind either gateway, a browser in front of it, and a store that fails on command.

Views are written once, as coroutines: over WSGI they are stepped to their end, over ASGI they are awaited. A view may
send another request while it runs, so two requests overlap without a thread and without waiting.
"""

from __future__ import annotations

import io
import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import isawaitable
from typing import Any, TypeAlias, cast

from coatcheck import AsyncCoatcheck, AsyncSession, Coatcheck, Event, Session, Settings, StoreUnavailable
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef, parse_session_id
from coatcheck.core.ports import Colour, SessionStore
from coatcheck.errors import OutcomeUnknown
from coatcheck.system import System
from coatcheck.testing import CapturedEvents, FakeSystem
from coatcheck.web import asgi, wsgi

COOKIE = "__Host-Http-session"
Header: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Reply:
    """What a view answers; `chunks` makes the body while it is sent."""

    status: int = 200
    body: str = ""
    headers: tuple[Header, ...] = (("Content-Type", "text/plain"),)
    chunks: Callable[[], Iterable[bytes]] | None = None


@dataclass(frozen=True)
class Ask:
    """One request as a view sees it."""

    session: Session | AsyncSession
    method: str

    async def do(self, result: Any) -> Any:
        """Finish what a session method returned, in either colour: `await ask.do(ask.session.logout())`."""
        return await result if isawaitable(result) else result

    async def load(self) -> Session | AsyncSession:
        """The session, ready to be read."""
        await self.do(self.session.load())
        return self.session


View: TypeAlias = Callable[[Ask], Awaitable[Reply | str]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    headers: list[Header]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for each, value in self.headers if each.lower() == name]

    def one(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, f"{name} came {len(values)} times"
        return values[0] if values else None

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def problem(self) -> dict[str, Any]:
        assert self.one("content-type") == "application/problem+json"
        return cast(dict[str, Any], json.loads(self.body))


class Store:
    """A store that counts what it is asked and fails on command.

    It tells nobody what changes, so nothing in front of it keeps near copies: what is counted is what was asked.
    """

    def __init__(self, inner: SessionStore) -> None:
        self.inner = inner
        self.verbs: list[str] = []
        self.away: frozenset[str] | None = None
        """Verbs that fail before anything is done; empty: all."""
        self.answers_lost: frozenset[str] = frozenset()
        """Verbs that are done, but whose answer never comes."""
        self.tamper: Callable[[Any], Any] | None = None
        """Changes what `load` answers."""

    def __getattr__(self, name: str) -> Any:
        if name == "feed":
            raise AttributeError(name)
        found = getattr(self.inner, name)
        if name in ("colour", "shared", "peek", "local_key", "close"):
            return found

        async def verb(*args: Any, **kwargs: Any) -> Any:
            if name != "open":
                self.verbs.append(name)
            if self.away is not None and (not self.away or name in self.away):
                raise StoreUnavailable("the test took the store away")
            answer = await found(*args, **kwargs)
            if name in self.answers_lost:
                raise OutcomeUnknown("the test lost the answer")
            return self.tamper(answer) if self.tamper is not None and name == "load" else answer

        return verb

    def forget(self) -> None:
        self.verbs.clear()


class World:
    """A coat over one store, an application behind one gateway, and time."""

    def __init__(
        self,
        colour: Colour,
        make_store: Callable[[Colour, System], SessionStore],
        *,
        settings: Settings | None = None,
        advance_store: Callable[[float], None] = lambda seconds: None,
        write_over: Callable[[SessionRef, bytes], None] | None = None,
    ) -> None:
        """`advance_store` moves a store's own clock; `write_over` replaces the stored bytes of a session."""
        self.write_over = write_over
        self.colour = colour
        self.system = FakeSystem()
        self.events = CapturedEvents()
        self.store = Store(make_store(colour, self.system))
        self._advance_store = advance_store
        self.views: dict[str, View] = {}
        self.settings = Settings(server_key=b"k" * 32) if settings is None else settings
        self.coat = self.another()
        self.face = self.face_of(self.coat)

    def another(
        self, *, on_event: Callable[[Event], None] | None = None, seed: bytes = b""
    ) -> Coatcheck | AsyncCoatcheck:
        """One more node over the same store."""
        kind = AsyncCoatcheck if self.colour == "async" else Coatcheck
        return kind(
            cast(SessionStore, self.store),
            settings=self.settings,
            on_event=on_event or self.events,
            system=self.system if not seed else FakeSystem(start_us=self.system.now_us(), seed=seed),
        )

    def face_of(self, coat: Coatcheck | AsyncCoatcheck, *, exclude: Sequence[str] = ()) -> Face:
        if isinstance(coat, AsyncCoatcheck):
            return AsgiFace(asgi.CoatcheckMiddleware(self._asgi_app, coat, exclude=exclude))
        return WsgiFace(wsgi.CoatcheckMiddleware(self._wsgi_app, coat, exclude=exclude))

    def browser(self) -> Browser:
        return Browser(self.face)

    def advance(self, seconds: float) -> None:
        """Time passes for nodes and store alike."""
        self.system.advance(seconds)
        self._advance_store(seconds)

    def ref_of(self, cookie: str | None) -> SessionRef:
        """Where the store keeps the session of a cookie."""
        assert cookie is not None
        id_ = parse_session_id(self.coat.engine.keys, cookie.encode())
        assert id_ is not None
        return id_.ref

    def view(self, path: str) -> Callable[[View], View]:
        """Decorator: answer a path."""

        def keep(view: View) -> View:
            self.views[path] = view
            return view

        return keep

    async def do(self, result: Any) -> Any:
        return await result if isawaitable(result) else result

    async def close(self) -> None:
        self.store.away = None
        await self.do(self.coat.close())

    async def maintain(self) -> None:
        """What the keeper does once a second."""
        await self.coat.engine.maintain()

    async def _asgi_app(self, scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        reply = _reply(await self.views[scope["path"]](Ask(asgi.session_of(scope), scope["method"])))
        headers = [(name.encode(), value.encode()) for name, value in reply.headers]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for chunk in _chunks(reply):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _wsgi_app(self, environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Iterable[bytes]:
        view = self.views[environ["PATH_INFO"]](Ask(wsgi.session_of(environ), environ["REQUEST_METHOD"]))

        async def step() -> Reply | str:
            return await view

        reply = _reply(run_blocking(step()))
        start_response(f"{reply.status} Something", list(reply.headers))
        return _chunks(reply)


def _reply(answer: Reply | str) -> Reply:
    return Reply(body=answer) if isinstance(answer, str) else answer


def _chunks(reply: Reply) -> Iterable[bytes]:
    return [reply.body.encode()] if reply.chunks is None else reply.chunks()


class AsgiFace:
    """Sends requests into an ASGI application."""

    def __init__(self, app: asgi.App) -> None:
        self.app = app

    async def request(
        self, method: str, path: str, *, headers: Iterable[tuple[bytes, bytes]] = (), root: str = ""
    ) -> Answer:
        sent: list[asgi.Message] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "method": method,
            "path": path,
            "root_path": root,
            "query_string": b"",
            "scheme": "https",
            "headers": [(b"host", b"app.example"), *headers],
            "client": ("203.0.113.7", 4711),
        }

        async def receive() -> asgi.Message:
            return {"type": "http.disconnect"}

        async def send(message: asgi.Message) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        starts = [message for message in sent if message["type"] == "http.response.start"]
        assert len(starts) == 1
        assert sent[0] is starts[0], "a body came before its head"
        return Answer(
            status=starts[0]["status"],
            headers=[(name.decode("latin-1"), value.decode("latin-1")) for name, value in starts[0]["headers"]],
            body=b"".join(message["body"] for message in sent[1:]),
        )


class WsgiFace:
    """Sends requests into a WSGI application. It never suspends."""

    def __init__(self, app: wsgi.App) -> None:
        self.app = app

    async def request(
        self, method: str, path: str, *, headers: Iterable[tuple[bytes, bytes]] = (), root: str = ""
    ) -> Answer:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": root,
            "PATH_INFO": path,
            "QUERY_STRING": "",
            "SERVER_NAME": "app.example",
            "SERVER_PORT": "443",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "203.0.113.7",
            "HTTP_HOST": "app.example",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "https",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": False,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in headers:
            # As servers do: repeated headers are joined, cookies by a semicolon.
            key = "HTTP_" + name.decode("latin-1").upper().replace("-", "_")
            text = value.decode("latin-1")
            environ[key] = f"{environ[key]}{'; ' if name == b'cookie' else ','}{text}" if key in environ else text
        started: list[tuple[str, list[Header]]] = []

        def start_response(status: str, given: list[Header], exc_info: Any = None) -> Callable[[bytes], object]:
            started.append((status, given))
            return body.append

        body: list[bytes] = []
        chunks = self.app(environ, start_response)
        try:
            for chunk in chunks:
                assert started, "a body came before its head"
                body.append(chunk)
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                close()
        assert len(started) == 1
        status, given = started[0]
        return Answer(status=int(status[:3]), headers=given, body=b"".join(body))


Face: TypeAlias = AsgiFace | WsgiFace


@dataclass
class Browser:
    """Keeps the one session cookie as browsers do."""

    face: Face
    cookie: str | None = None
    name: str = COOKIE
    sent: list[str | None] = field(default_factory=list)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("GET", path, headers)

    async def post(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        return await self.request("POST", path, {"Sec-Fetch-Site": "same-origin", **(headers or {})})

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        if self.cookie is not None:
            raw.append((b"cookie", f"{self.name}={self.cookie}".encode()))
        answer = await self.face.request(method, path, headers=raw)
        self.take(answer)
        return answer

    def take(self, answer: Answer) -> None:
        for line in answer.all("set-cookie"):
            pair, *attributes = line.split("; ")
            name, _, value = pair.partition("=")
            if name == self.name:
                self.cookie = None if "Max-Age=0" in attributes else value
