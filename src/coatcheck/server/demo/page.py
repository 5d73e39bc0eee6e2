"""The demonstration as a page: who accepts the session, a button that ends it, and how late each node refused it.

Decides who may press: pages of this address alone, asked for under the name it has on this machine (a page of another
site can send a form to any address, and a name can be made to lead here). It works without JavaScript; with it,
the page follows by server-sent events. A page that falls behind skips to what is true now. It must never show an id.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Final

import msgspec
import uvicorn
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from coatcheck.server.bounded_http import BoundedHttp
from coatcheck.server.demo.measuring import Stage, Tally
from coatcheck.server.demo.nodes import DemoFailed
from coatcheck.server.demo.table import milliseconds
from coatcheck.server.headers import SecurityHeaders
from coatcheck.server.serving import listen
from coatcheck.server.static_files import load_static_files, static_route
from coatcheck.server.texts import Language, language_of

HOST: Final = "127.0.0.1"
MAX_PAGES: Final = 16
"""Pages that follow at once; one more has to be reloaded by hand."""

SHOWN_SECONDS: Final = 1.5
"""How long an ended session is shown before the sample user is signed in again."""

_BREATH_SECONDS: Final = 15.0
_NO_STORE: Final = {"cache-control": "no-store"}
_ASSETS: Final = {"demo.css": "text/css; charset=utf-8", "demo.js": "text/javascript; charset=utf-8"}
_TEMPLATES: Final = Environment(
    loader=PackageLoader("coatcheck.server.demo", "assets"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)

TEXTS: Final[Mapping[str, tuple[str, str]]] = {
    "title": ("One session, {count} processes", "세션 하나, 프로세스 {count}개"),
    "lead": (
        "Each line is a process of its own. All of them know one session and answer from memory. End it on one of "
        "them, and see how soon the others refuse it.",
        "한 줄이 프로세스 하나입니다. 모두 같은 세션을 알고 메모리에서 바로 응답합니다. 한 곳에서 세션을 끝내면 "
        "나머지가 얼마나 빨리 거부하는지 볼 수 있습니다.",
    ),
    "button": ("End the session", "세션 끝내기"),
    "node": ("Process", "프로세스"),
    "now": ("Session", "세션"),
    "last": ("Refused after", "거부까지"),
    "median": ("Median", "중앙값"),
    "worst": ("Worst", "최댓값"),
    "lost": ("Lost", "놓침"),
    "commands": ("Commands asked", "저장소 조회"),
    "in": ("signed in", "로그인됨"),
    "asking": ("being ended", "끝내는 중"),
    "out": ("refused", "거부함"),
    "here": ("ended here", "여기서 끝냄"),
    "never": ("STILL ACCEPTED", "아직 받아들임"),
    "cut": ("feed cut", "소식 끊김"),
    "rounds": ("{count} ended so far", "지금까지 {count}번 끝냄"),
    "lease": (
        "Process {node} hears nothing from the store. It refuses when its lease of {lease} s runs out.",
        "프로세스 {node}번은 저장소 소식을 듣지 못합니다. {lease}초 기한이 지나면 스스로 거부합니다.",
    ),
    "away": ("The demonstration has ended.", "시연이 끝났습니다."),
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One node as the page shows it; every text is ready to be shown."""

    node: int
    state: str
    now: str
    last: str
    median: str
    worst: str
    lost: str
    commands: str


class View(msgspec.Struct, frozen=True, kw_only=True):
    """The page at one moment."""

    can_end: bool
    rounds: str
    rows: list[Row]


def say(key: str, language: Language, **values: object) -> str:
    """One text of the page."""
    english, korean = TEXTS[key]
    return (korean if language == "ko" else english).format_map(values)


def view_of(stage: Stage, language: Language) -> View:
    """What there is to see now."""
    return View(
        can_end=stage.is_signed_in,
        rounds=say("rounds", language, count=len(stage.rounds)),
        rows=[_row(stage, tally, language) for tally in stage.tallies.values()],
    )


def _row(stage: Stage, tally: Tally, language: Language) -> Row:
    if tally.node == stage.ended_on:
        state = "here"
    elif tally.node in stage.refused:
        state = "never" if stage.refused[tally.node] is None else "out"
    else:
        state = "in" if stage.ended_on is None else "asking"
    last = tally.last if state == "in" else stage.refused.get(tally.node)
    return Row(
        node=tally.node,
        state=state,
        now=say(state, language),
        last=milliseconds(last),
        median=milliseconds(tally.middle),
        worst=milliseconds(tally.worst),
        lost=str(tally.lost),
        commands=str(tally.warm_commands),
    )


class Page:
    """The page of one demonstration."""

    def __init__(self, stage: Stage, port: int) -> None:
        self.address: Final = f"http://{HOST}:{port}"
        self._stage = stage
        self._names = {f"{HOST}:{port}", f"localhost:{port}"}
        self._following: set[asyncio.Event] = set()
        self._returning: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._failure: DemoFailed | None = None
        self._static = load_static_files()
        self._assets = {name: files("coatcheck.server.demo").joinpath("assets", name).read_bytes() for name in _ASSETS}
        before = stage.told

        def told() -> None:
            before()
            self._wake()

        stage.told = told
        self.app: Final = Starlette(
            routes=[
                Route("/", self._show, methods=["GET"]),
                Route("/end", self._end, methods=["POST"]),
                Route("/events", self._follow, methods=["GET"]),
                Route("/demo/{name}", self._asset, methods=["GET"]),
                static_route(self._static),
            ],
            middleware=[Middleware(SecurityHeaders, https=False)],
        )

    async def stay(self, seconds: float) -> None:
        """Return after so long. Raises: DemoFailed, as soon as a node cannot go on."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), seconds)
        if self._failure is not None:
            raise self._failure

    def end(self) -> None:
        """End what would go on for ever."""
        self._over.set()
        self._wake()
        if self._returning is not None:
            self._returning.cancel()

    def _wake(self) -> None:
        for each in self._following:
            each.set()

    def _is_ours(self, request: Request) -> bool:
        host = request.headers.get("host", "")
        if host not in self._names:
            return False
        # A browser says where a form comes from; a program has no reason to say anything.
        return request.headers.get("origin", f"http://{host}") == f"http://{host}" and request.headers.get(
            "sec-fetch-site", "same-origin"
        ) in ("same-origin", "none")

    async def _show(self, request: Request) -> Response:
        if request.headers.get("host", "") not in self._names:
            return _misdirected()
        language, stage = _language(request), self._stage
        text = _TEMPLATES.get_template("demo.html").render(
            language=language,
            style=self._static["coatcheck.css"].address,
            icon=self._static["icon.svg"].address,
            t=lambda key, **values: say(key, language, **values),
            view=view_of(stage, language),
            cut=None if stage.cut is None else stage.cut.number,
            lease=f"{stage.lease:g}",
        )
        return Response(text, media_type="text/html", headers={**_NO_STORE, "vary": "Accept-Language"})

    async def _end(self, request: Request) -> Response:
        if not self._is_ours(request):
            return _misdirected()
        try:
            done = await self._stage.end()
        except DemoFailed as failure:
            self._failure = failure
            self._over.set()
            return PlainTextResponse("The demonstration cannot go on.\n", status_code=503, headers=_NO_STORE)
        if done is not None and (self._returning is None or self._returning.done()):
            self._returning = asyncio.get_running_loop().create_task(self._sign_in_again())
        return RedirectResponse("/", status_code=303, headers=_NO_STORE)

    async def _sign_in_again(self) -> None:
        await asyncio.sleep(SHOWN_SECONDS)
        try:
            await self._stage.sign_in()
        except DemoFailed as failure:
            self._failure = failure
            self._over.set()

    async def _follow(self, request: Request) -> Response:
        if request.headers.get("host", "") not in self._names:
            return _misdirected()
        if len(self._following) >= MAX_PAGES:
            return PlainTextResponse("Too many pages follow.\n", status_code=503, headers=_NO_STORE)
        return StreamingResponse(self._events(_language(request)), media_type="text/event-stream", headers=_NO_STORE)

    async def _events(self, language: Language) -> AsyncIterator[bytes]:
        news = asyncio.Event()
        self._following.add(news)
        try:
            while not self._over.is_set():
                news.clear()
                yield b"data: " + msgspec.json.encode(view_of(self._stage, language)) + b"\n\n"
                while not news.is_set():
                    try:
                        await asyncio.wait_for(news.wait(), _BREATH_SECONDS)
                    except TimeoutError:
                        # Finds out whether anybody still listens.
                        yield b":\n\n"
            yield b"event: over\ndata:\n\n"
        finally:
            self._following.discard(news)

    async def _asset(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in _ASSETS:
            return PlainTextResponse("no such file\n", status_code=404)
        return Response(self._assets[name], media_type=_ASSETS[name], headers={"cache-control": "no-cache"})


@asynccontextmanager
async def serving(stage: Stage, port: int) -> AsyncIterator[Page]:
    """Serve the page on this machine for the length of the block. Raises: ConfigurationError when the port is taken."""
    listeners = listen(HOST, port)
    try:
        page = Page(stage, int(listeners[0].getsockname()[1]))
        server = _Server(
            uvicorn.Config(
                page.app,
                http=BoundedHttp,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=64,
                timeout_graceful_shutdown=2,
            )
        )
        task = asyncio.get_running_loop().create_task(server.serve(sockets=listeners))
        try:
            yield page
        finally:
            page.end()
            server.should_exit = True
            await asyncio.wait({task}, timeout=5)
            task.cancel()
    finally:
        for listener in listeners:
            listener.close()


class _Server(uvicorn.Server):
    """uvicorn's server without its signals: whoever runs the demonstration handles them."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _language(request: Request) -> Language:
    return language_of(request.headers.get("accept-language"))


def _misdirected() -> Response:
    return PlainTextResponse("Open this page under its own address.\n", status_code=403, headers=_NO_STORE)
