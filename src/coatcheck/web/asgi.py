"""Pure ASGI middleware: sessions for any ASGI application, HTTP and WebSocket.

Decides where in the ASGI conversation the session is written: in the first response message, and in `accept` for a
WebSocket. It must never buffer a body and never wait for the store by itself before the application does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final, TypeAlias

from coatcheck.errors import CoatcheckError, StoreUnavailable
from coatcheck.manager import AsyncCoatcheck
from coatcheck.session import AsyncSession
from coatcheck.web.exchange import Exchange, is_excluded
from coatcheck.web.problems import ProblemAnswer, is_answer, problem

log = logging.getLogger("coatcheck")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

EXCHANGE_KEY: Final = "coatcheck.exchange"
_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start", "websocket.accept"})
_BODIES: Final = frozenset({"http.response.body", "websocket.http.response.body"})


class CoatcheckMiddleware:
    """Gives every request a session: `session_of(scope)`.

    `exclude` names paths that are left alone entirely (static files, health checks). Unsafe requests from other sites
    are refused with 403 before the application sees them. Opens and closes the store with the application's lifespan.
    """

    def __init__(self, app: App, coat: AsyncCoatcheck, *, exclude: Iterable[str] = ()) -> None:
        self.app = app
        self.coat = coat
        self.exclude = tuple(exclude)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI 3)."""
        kind = scope["type"]
        if kind == "lifespan":
            await self.app(scope, receive, _with_lifespan(self.coat, send))
            return
        if kind not in ("http", "websocket") or is_excluded(scope["path"], self.exclude):
            await self.app(scope, receive, send)
            return
        client = scope.get("client")
        exchange = Exchange(
            self.coat.engine,
            AsyncSession,
            headers=scope["headers"],
            method=scope.get("method", "GET"),
            scheme=scope.get("scheme", "http"),
            peer=client[0] if client else None,
            websocket=kind == "websocket",
        )
        if exchange.refused is not None:
            await _answer(scope, receive, send, problem(exchange.refused))
            return
        scope[EXCHANGE_KEY] = exchange
        await self.handle(exchange, scope, receive, send)

    async def handle(self, exchange: Exchange[AsyncSession], scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application with a session in its scope; adapters for a framework build on this."""
        responder = _Responder(exchange, scope, receive, send)
        try:
            await self.app(scope, receive, responder.send)
        except CoatcheckError as error:
            if responder.started or not is_answer(error):
                await responder.fail()
                raise
            await responder.answer(error)
        except BaseException:
            await responder.fail()
            raise


def session_of(scope: Scope) -> AsyncSession:
    """The session of an ASGI scope. Raises: RuntimeError where the middleware is missing or the path excluded."""
    exchange = scope.get(EXCHANGE_KEY)
    if exchange is None:
        raise RuntimeError(
            "no session here: wrap the application in coatcheck.web.asgi.CoatcheckMiddleware, "
            "and do not list this path under exclude="
        )
    session: AsyncSession = exchange.session
    return session


class _Responder:
    """The send side of one conversation."""

    def __init__(self, exchange: Exchange[AsyncSession], scope: Scope, receive: Receive, send: Send) -> None:
        self._exchange = exchange
        self._scope = scope
        self._receive = receive
        self._send = send
        self.started = False
        self._replaced = False

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind in _STARTS and not self.started:
            status = message.get("status", 101)
            headers = list(message.get("headers") or ())
            try:
                headers += await self._exchange.finish(status, headers)
            except CoatcheckError as error:
                if not is_answer(error):
                    raise
                await self.answer(error)
                return
            self.started = True
            message = {**message, "headers": headers}
        elif self._replaced and kind in _BODIES | _STARTS:
            # The application's answer was replaced by an error; the rest of it has nowhere to go.
            return
        await self._send(message)

    async def answer(self, error: CoatcheckError) -> None:
        self.started = self._replaced = True
        if isinstance(error, StoreUnavailable):
            self._exchange.engine.publish_kind("store.unavailable")
            log.warning("coatcheck: %s", error.detail)
        answer = problem(error)
        answer.headers.extend(
            header for header in self._exchange.finish_without_fields() if header[0] != b"cache-control"
        )
        await _answer(self._scope, self._receive, self._send, answer)

    async def fail(self) -> None:
        if not self.started:
            await self._exchange.abandon()


async def _answer(scope: Scope, receive: Receive, send: Send, answer: ProblemAnswer) -> None:
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in scope.get("extensions", {}):
            # Without the extension a close before accept is all that can be said; servers turn it into a 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        prefix = "websocket."
    await send({"type": f"{prefix}http.response.start", "status": answer.status, "headers": answer.headers})
    body = b"" if scope.get("method") == "HEAD" else answer.body
    await send({"type": f"{prefix}http.response.body", "body": body})


def _with_lifespan(coat: AsyncCoatcheck, send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "lifespan.startup.complete":
            try:
                await coat.start()
            except StoreUnavailable as lost:
                # The application may serve pages that need no session; the first one that does tries again.
                log.warning("coatcheck: the store is away at start: %s", lost.detail)
            except CoatcheckError as wrong:
                await send({"type": "lifespan.startup.failed", "message": wrong.detail})
                return
        elif message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
            await coat.close()
        await send(message)

    return wrapped
