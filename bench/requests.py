"""What does a session cost a request? Bare, ours on every store in both colours, and two peers, in one process.

No HTTP server is between: an ASGI or WSGI call with the headers a browser sends. 1,000 different sessions take turns,
each of which was read before. Three kinds of request: the session is not touched, it is read, one field is changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.harness import Candidate, Result, compare
from coatcheck import AsyncCoatcheck, Coatcheck, Settings
from coatcheck.blocking import run_blocking
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from coatcheck.web.asgi import CoatcheckMiddleware as AsgiMiddleware
from coatcheck.web.asgi import session_of as asgi_session
from coatcheck.web.wsgi import CoatcheckMiddleware as WsgiMiddleware
from coatcheck.web.wsgi import session_of as wsgi_session
from tests.servers.postgres import Postgres
from tests.servers.valkey import ValkeySingle

SESSIONS = 1_000
KINDS = ("untouched", "read", "changed")
OTHER_COOKIES = b"_ga=GA1.2.1234567890.1700000000; theme=dark; lang=ko; cart=3; "


def run(*, rounds: int, full: bool) -> list[Result]:
    results = []
    with ExitStack() as stack:
        valkey = stack.enter_context(ValkeySingle())
        postgres = stack.enter_context(Postgres(log_statements=False))
        directory = Path(stack.enter_context(TemporaryDirectory()))
        stores = {
            "memory": "memory:",
            "sqlite": f"sqlite:///{directory / 'bench.db'}",
            "postgresql": postgres.create_database(),
            "valkey": valkey.url,
        }
        for kind in KINDS:
            _migrate(stores["postgresql"], f"b{kind}")
            _migrate(stores["postgresql"], f"w{kind}")
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        for kind in KINDS:
            candidates = [Candidate(name="bare Starlette-like ASGI", run=_asgi(loop, _bare(kind), [b""]), repeat=200)]
            closing: list[Callable[[], None]] = []
            for name, url in stores.items():
                coat = AsyncCoatcheck(url, settings=Settings(namespace=f"b{kind}"))
                cookies = loop.run_until_complete(_sign_in_async(coat))
                app = AsgiMiddleware(_asgi_view(kind), coat)
                candidates.append(Candidate(name=f"coatcheck ASGI, {name}", run=_asgi(loop, app, cookies)))
                closing.append(lambda coat=coat: loop.run_until_complete(coat.close()))  # type: ignore[misc]
            candidates += _peers(loop, kind, valkey.url)
            _warm(candidates)
            results.append(compare(f"ASGI request, session {kind}", candidates, rounds=rounds))
            for close in closing:
                close()
        for kind in KINDS:
            candidates = [Candidate(name="bare WSGI", run=_wsgi(_wsgi_view("bare"), [""]), repeat=200)]
            opened = []
            for name, url in stores.items():
                blocking = Coatcheck(url, settings=Settings(namespace=f"w{kind}"))
                names = _sign_in(blocking)
                candidates.append(
                    Candidate(
                        name=f"coatcheck WSGI, {name}", run=_wsgi(WsgiMiddleware(_wsgi_view(kind), blocking), names)
                    )
                )
                opened.append(blocking)
            _warm(candidates)
            results.append(compare(f"WSGI request, session {kind}", candidates, rounds=rounds))
            for each in opened:
                each.close()
    return results


def _warm(candidates: list[Candidate]) -> None:
    # Twice round: the first request of a node has yet to find who tells it what changes.
    for each in candidates:
        each.run(2 * SESSIONS)


def _peers(loop: asyncio.AbstractEventLoop, kind: str, url: str) -> list[Candidate]:
    from starlette.middleware.sessions import SessionMiddleware
    from starsessions import SessionAutoloadMiddleware
    from starsessions import SessionMiddleware as StarSessions
    from starsessions.stores.redis import RedisStore

    signed = SessionMiddleware(_peer_view(kind), secret_key="k" * 32, https_only=True)
    redis = StarSessions(
        SessionAutoloadMiddleware(_peer_view(kind)), store=RedisStore(url), cookie_https_only=True, lifetime=3600
    )
    found = []
    for name, app in (("Starlette SessionMiddleware", signed), ("starsessions, valkey", redis)):
        cookies = [loop.run_until_complete(_peer_sign_in(app)) for _ in range(200)]
        found.append(Candidate(name=name, run=_asgi(loop, app, cookies)))
    return found


# -- applications ---------------------------------------------------------------------------------------------------


async def _answer(send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"ok"})


def _bare(kind: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await _answer(send)

    return app


def _asgi_view(kind: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if kind != "untouched":
            session = asgi_session(scope)
            await session.load()
            if session.subject is None:
                raise RuntimeError("nobody is signed in: the benchmark measures nothing")
            if kind == "changed":
                count = session.get("n", 0)
                session["n"] = (count if isinstance(count, int) else 0) + 1
        await _answer(send)

    return app


def _peer_view(kind: str) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = scope["session"]
        if scope["path"] == "/login":
            session["user"] = "50"
        elif kind != "untouched":
            if session["user"] != "50":
                raise RuntimeError("nobody is signed in: the benchmark measures nothing")
            if kind == "changed":
                session["n"] = session.get("n", 0) + 1
        await _answer(send)

    return app


def _wsgi_view(kind: str) -> Any:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        if kind in ("read", "changed"):
            session = wsgi_session(environ)
            if session.subject is None:
                raise RuntimeError("nobody is signed in: the benchmark measures nothing")
            if kind == "changed":
                count = session.get("n", 0)
                session["n"] = (count if isinstance(count, int) else 0) + 1
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"ok"]

    return app


# -- calls ----------------------------------------------------------------------------------------------------------


def _scope(path: str, cookie: bytes) -> dict[str, Any]:
    headers = [
        (b"host", b"shop.example"),
        (b"user-agent", b"Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 Safari/537.36"),
        (b"accept", b"text/html,application/xhtml+xml"),
        (b"accept-language", b"ko-KR,ko;q=0.9,en;q=0.8"),
        (b"sec-fetch-site", b"same-origin"),
        (b"cookie", OTHER_COOKIES + cookie),
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("203.0.113.7", 1),
        "server": ("shop.example", 443),
        "state": {},
    }


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(message: Any) -> None:
    return None


def _asgi(loop: asyncio.AbstractEventLoop, app: Any, cookies: list[bytes]) -> Callable[[int], None]:
    turn = cycle(cookies)

    async def many(count: int) -> None:
        for _ in range(count):
            await app(_scope("/", next(turn)), _receive, _ignore)

    return lambda count: loop.run_until_complete(many(count))


def _wsgi(app: Any, cookies: list[str]) -> Callable[[int], None]:
    turn = cycle(cookies)

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return _ignore

    def many(count: int) -> None:
        for _ in range(count):
            environ = {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": "/",
                "wsgi.url_scheme": "https",
                "REMOTE_ADDR": "203.0.113.7",
                "HTTP_HOST": "shop.example",
                "HTTP_USER_AGENT": "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/156.0 Safari/537.36",
                "HTTP_SEC_FETCH_SITE": "same-origin",
                "HTTP_COOKIE": OTHER_COOKIES.decode() + next(turn),
            }
            for _ in app(environ, start_response):
                pass

    return many


async def _sign_in_async(coat: AsyncCoatcheck) -> list[bytes]:
    cookies = []
    for number in range(SESSIONS):
        session = coat.session(None)
        await session.login(str(number), claims={"role": "user", "name": "Somebody"})
        cookies.append(_pair(coat, session.cookie_action).encode())
    return cookies


def _sign_in(coat: Coatcheck) -> list[str]:
    cookies = []
    for number in range(SESSIONS):
        session = coat.session(None)
        session.login(str(number), claims={"role": "user", "name": "Somebody"})
        cookies.append(_pair(coat, session.cookie_action))
    return cookies


def _pair(coat: AsyncCoatcheck | Coatcheck, action: object) -> str:
    if not isinstance(action, SendCookie):
        raise RuntimeError("the sign-in made no cookie")
    return f"{coat.settings.session_cookie.name}={action.id.text}"


async def _peer_sign_in(app: Callable[[Any, Any, Any], Awaitable[None]]) -> bytes:
    found: list[bytes] = []

    async def send(message: Any) -> None:
        found.extend(value for name, value in message.get("headers", ()) if name == b"set-cookie")

    await app(_scope("/login", b""), _receive, send)
    return found[0].split(b";")[0]


def _migrate(url: str, namespace: str) -> None:
    store = open_store(url, colour="blocking", namespace=namespace)
    migrate = getattr(store, "migrate", None)
    if migrate is not None:
        run_blocking(migrate())
        run_blocking(store.close())
