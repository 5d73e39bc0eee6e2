"""Pure ASGI middleware: sessions for any ASGI application, HTTP and WebSocket.

Decides where in the ASGI conversation the session is written: in the first response message, and in `accept` for a
WebSocket; and how a connection that outlasts its session is closed. It must never buffer a body and never wait for the
store by itself before the application does.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import CoatcheckError, ConfigurationError, StoreUnavailable
from coatcheck.manager import AsyncCoatcheck
from coatcheck.session import AsyncSession
from coatcheck.verifier import Verifier
from coatcheck.web.bearer import Bearer, VerifierGateway
from coatcheck.web.exchange import DEPENDS_ON_COOKIE, Exchange, Headers
from coatcheck.web.paths import is_excluded, outage_of, outage_paths
from coatcheck.web.problems import ProblemAnswer, is_answer, problem
from coatcheck.web.streams import Later, Over, Watch, Why, in_this_loop

log: Final = logging.getLogger("coatcheck")

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

EXCHANGE_KEY: Final = "coatcheck.exchange"
"""Where the innermost exchange stands in a scope."""

BEARER_KEY: Final = "coatcheck.bearer"
"""Where the bearer stands in a scope, in a service that holds no store."""

_ENDS: Final = frozenset({"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"})
_DEPENDS_ON_COOKIE: Final = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in DEPENDS_ON_COOKIE]
_STARTS: Final = frozenset({"http.response.start", "websocket.http.response.start", "websocket.accept"})
_LASTS: Final = frozenset({"http.response.body", "websocket.close"})
_LEFT: Final = frozenset({"http.disconnect", "websocket.disconnect"})
_CODES: Final[Mapping[Why, int]] = {"session_ended": 1008, "store_unavailable": 1013, "internal_error": 1011}


class CoatcheckMiddleware:
    """Gives every request a session: `session_of(scope)`.

    `exclude` names paths that are left alone entirely (static files, health checks), `outage` paths for which the
    settings' word on a store that is away does not hold: `{"/shop": "anonymous"}`. Unsafe requests from other sites
    are refused with 403 before the application sees them. Opens and closes the store with the application's lifespan;
    where no lifespan arrives (a mounted application, some test clients) the first request that needs it does.

    A WebSocket and a response without a length that goes on are ended when their session ends, a lease later at most:
    the socket with code 1008 (1013 where the store is away and the outage policy refuses), the response with an empty
    last part. The application hears that the client is gone.

    Errors that leave the application become problem documents. Starlette and FastAPI answer errors themselves in
    their outermost layer, so hand it to them by `add_middleware`, which places it inside that layer. The same `coat`
    twice around one application is one session, not two.
    """

    later: Later = staticmethod(in_this_loop)
    """Who wakes the looks at connections that last."""

    def __init__(
        self,
        app: App,
        coat: AsyncCoatcheck,
        *,
        exclude: Iterable[str] = (),
        outage: Mapping[str, OutagePolicy] = MappingProxyType({}),
    ) -> None:
        if not isinstance(coat, AsyncCoatcheck):
            raise ConfigurationError("coat: an ASGI application needs an AsyncCoatcheck, Coatcheck is for WSGI")
        self.app: App = app
        self.coat: AsyncCoatcheck = coat
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.outage: tuple[tuple[str, OutagePolicy], ...] = outage_paths(outage, otherwise=coat.settings.outage)
        # Most applications have nothing to prepare: they need not pay for asking.
        self._prepares = type(self).prepare is not CoatcheckMiddleware.prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI 3)."""
        kind = scope["type"]
        if kind == "lifespan":
            await self.app(scope, receive, _Lifespan(self.coat, send).send)
            return
        if kind not in ("http", "websocket") or (self.exclude and is_excluded(scope["path"], self.exclude)):
            await self.app(scope, receive, send)
            return
        outer: Exchange[AsyncSession] | None = scope.get(EXCHANGE_KEY)
        known = None if outer is None else _of(outer, self.coat)
        if known is not None:
            await self.prepare(known.session, scope)
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
            outage=outage_of(scope["path"], self.outage) if self.outage else None,
        )
        if exchange.refused is not None:
            await _answer(scope, send, problem(exchange.refused))
            return
        exchange.outer = outer
        if kind == "websocket":
            exchange.session.lasting = True
        scope[EXCHANGE_KEY] = exchange
        responder = _Responder(exchange, scope, receive, send, self.later)
        try:
            if self._prepares:
                await self.prepare(exchange.session, scope)
            await self.app(scope, responder.receive, responder.send)
        except CoatcheckError as error:
            if responder.replaced_for is error:
                return
            if responder.started or not is_answer(error):
                raise
            await responder.answer(error)
        except Exception as error:
            if not _stems_from_the_end(error):
                raise
        finally:
            # Whatever the reason: without a head the cookie never left (a failure, a cancelled request, a
            # WebSocket that was not accepted).
            if not responder.started:
                await exchange.abandon()
            if responder.watch is not None:
                await responder.watch.close()

    async def prepare(self, session: AsyncSession, scope: Scope) -> None:
        """Called before the application: adapters for a framework put the framework's own names into the scope."""


class VerifierMiddleware(VerifierGateway):
    """Lets requests with a good access token in, for a service that holds no store: `bearer_of(scope)`.

    `exclude` names paths that are left alone entirely, `sensitive` those that must not rest on an old list of
    revocations. With `optional` a request is let in whatever it carries, and the application asks. Starts and closes
    the verifier with the application's lifespan; where none arrives the first request starts it.
    """

    def __init__(
        self,
        app: App,
        verifier: Verifier,
        *,
        optional: bool = False,
        exclude: Iterable[str] = (),
        sensitive: Iterable[str] = (),
    ) -> None:
        super().__init__(verifier, optional=optional, exclude=exclude, sensitive=sensitive)
        self.app: App = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection (ASGI 3)."""
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        if scope["type"] not in ("http", "websocket") or self.leaves_alone(scope["path"]):
            await self.app(scope, receive, send)
            return
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        bearer = scope[BEARER_KEY] = self.bearer(values)
        started = False

        async def note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] in _STARTS
            await send(message)

        try:
            self.check(bearer, scope["path"])
            self.prepare(bearer, scope)
            await self.app(scope, receive, note)
        except CoatcheckError as error:
            if started or not is_answer(error):
                raise
            log.info("coatcheck: %s: %s", error.code, error.detail)
            await _answer(scope, send, problem(error))

    def prepare(self, bearer: Bearer, scope: Scope) -> None:
        """Called before the application: adapters for a framework put the framework's own names into the scope."""

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def follow(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                self.verifier.start()
            elif message["type"] in _ENDS:
                self.verifier.close()
            await send(message)

        await self.app(scope, receive, follow)


def bearer_of(scope: Scope) -> Bearer:
    """The bearer of an ASGI scope. Raises: RuntimeError where the middleware is missing or the path excluded."""
    bearer: Bearer | None = scope.get(BEARER_KEY)
    if bearer is None:
        raise RuntimeError(
            "no bearer here: wrap the application in coatcheck.web.asgi.VerifierMiddleware, and do not list this path "
            "under exclude="
        )
    return bearer


def exchange_of(scope: Scope, coat: AsyncCoatcheck | None = None) -> Exchange[AsyncSession]:
    """The exchange of an ASGI scope: of this `coat`, or the innermost. Raises: RuntimeError where there is none."""
    exchange: Exchange[AsyncSession] | None = scope.get(EXCHANGE_KEY)
    if coat is not None and exchange is not None:
        exchange = _of(exchange, coat)
    if exchange is None:
        raise RuntimeError(
            "no session here: wrap the application in coatcheck.web.asgi.CoatcheckMiddleware, "
            "and do not list this path under exclude="
        )
    return exchange


def session_of(scope: Scope, *, coat: AsyncCoatcheck | None = None) -> AsyncSession:
    """The session of an ASGI scope; `coat` tells which, where several surround one application.

    Raises: RuntimeError where the middleware is missing or the path excluded.
    """
    return exchange_of(scope, coat).session


def _of(exchange: Exchange[AsyncSession] | None, coat: AsyncCoatcheck) -> Exchange[AsyncSession] | None:
    while exchange is not None and exchange.engine is not coat.engine:
        exchange = exchange.outer
    return exchange


class _Responder:
    """Both sides of one conversation."""

    __slots__ = (
        "_asked",
        "_exchange",
        "_head",
        "_later",
        "_receive",
        "_scope",
        "_send",
        "_settled",
        "replaced_for",
        "started",
        "watch",
    )

    def __init__(
        self, exchange: Exchange[AsyncSession], scope: Scope, receive: Receive, send: Send, later: Later
    ) -> None:
        self._exchange = exchange
        self._scope = scope
        self._receive = receive
        self._send = send
        self._later = later
        self._head: Iterable[tuple[bytes, bytes]] = ()
        self._asked = False
        self._settled = False
        self.started = False
        self.replaced_for: CoatcheckError | None = None
        self.watch: Watch | None = None

    def send(self, message: Message) -> Awaitable[None]:
        # No coroutine of its own where it has nothing to wait for: two frames less for almost every request.
        if self.replaced_for is None:
            if self.started:
                if self._settled:
                    return self._send_on(message)
                if message.get("more_body"):
                    self._settle()
                    return self._send_on(message)
                return self._send(message)
            if message["type"] in _STARTS:
                # Any iterable may come, also one that can be walked once.
                headers: Headers = list(message.get("headers") or ())
                message = {**message, "headers": headers}
                added = self._exchange.finish_now(headers)
                if added is not None:
                    if added:
                        headers += _DEPENDS_ON_COOKIE
                    # Nothing was signed in here, so whether the head gets through is nobody's business.
                    self.started = True
                    self._begin(message["type"], headers)
                    return self._send(message)
        return self._send_slowly(message)

    def receive(self) -> Awaitable[Message]:
        """The next message, or the client's leaving as soon as the connection is ended here."""
        if not self._asked and not self.started and self._scope["type"] == "http":
            # The request's own body, which most requests with one bring in one piece: no more than it cost before.
            self._asked = True
            return self._receive()
        return self._receive_watched()

    async def _receive_watched(self) -> Message:
        watch = self._watched()
        message = await watch.until_over(self._receive)
        if message is None:
            return self._gone(watch)
        if watch.looks:
            if message["type"] in _LEFT:
                watch.stop()
            elif not await watch.passes():
                # What came after the end of the session is nobody's word any more.
                return self._gone(watch)
        return message

    def _gone(self, watch: Watch) -> Message:
        if self._scope["type"] == "websocket" and watch.over is not None:
            return {"type": "websocket.disconnect", "code": _CODES[watch.over], "reason": watch.over}
        return {"type": "http.disconnect"}

    def _begin(self, kind: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self._head = headers
        if kind == "websocket.accept":
            self._settled = True
            self._watched().start()

    def _settle(self) -> None:
        """A response that goes on. One of a stated length is a body that is already being sent (SEMANTICS 1)."""
        self._settled = True
        if all(name.lower() != b"content-length" for name, _ in self._head):
            self._watched().start()

    def _watched(self) -> Watch:
        if self.watch is None:
            self.watch = Watch(self._exchange.session, self._exchange.engine.system, end=self._end, later=self._later)
        return self.watch

    def _send_on(self, message: Message) -> Awaitable[None]:
        watch = self.watch
        if watch is None or not (watch.looks or watch.over is not None):
            return self._send(message)
        return self._send_watched(watch, message)

    async def _send_watched(self, watch: Watch, message: Message) -> None:
        if not watch.passes_now():
            await watch.passes()
        if watch.over is None:
            if not message.get("more_body") and message["type"] in _LASTS:
                watch.stop()
            try:
                await self._send(message)
            except Exception:
                # Ended under its hands: what the server says to that is no news to the application.
                if watch.over is None:
                    raise
        if watch.over is not None and _hears_of_the_end(self._scope):
            raise Over("the connection was ended with its session")

    async def _end(self, why: Why) -> None:
        if self._scope["type"] == "websocket":
            await self._send({"type": "websocket.close", "code": _CODES[why], "reason": why})
        else:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_slowly(self, message: Message) -> None:
        if self.replaced_for is not None:
            # The application's answer was replaced by an error; the rest of it has nowhere to go.
            return
        if message["type"] in _STARTS and not self.started:
            try:
                headers = await self._exchange.finish(message.get("status", 101), message.get("headers") or ())
            except CoatcheckError as error:
                if not is_answer(error):
                    raise
                await self.answer(error)
                return
            await self._send({**message, "headers": headers})
            self.started = True
            self._begin(message["type"], headers)
            return
        await self._send(message)

    async def answer(self, error: CoatcheckError) -> None:
        self.replaced_for = error
        await _answer(self._scope, self._send, self._exchange.refuse(error))
        self.started = True


def _hears_of_the_end(scope: Scope) -> bool:
    """Whether a send after the client has left is an OSError, as ASGI has it since 2.4; before, it goes nowhere."""
    try:
        major, minor = scope.get("asgi", {}).get("spec_version", "2.0").split(".")
        return (int(major), int(minor)) >= (2, 4)
    except ValueError:
        return False


def _stems_from_the_end(error: BaseException | None) -> bool:
    """Whether an error is what the application was told at the end of its connection, or a framework's word for it.
    That is no failure of the server's: a log must not fill up when everybody is signed out."""
    while error is not None and not isinstance(error, Over):
        error = error.__context__
    return error is not None


async def _answer(scope: Scope, send: Send, answer: ProblemAnswer) -> None:
    prefix = ""
    if scope["type"] == "websocket":
        if "websocket.http.response" not in (scope.get("extensions") or {}):
            # Without the extension a close before accept is all that can be said; servers turn it into a 403.
            await send({"type": "websocket.close", "code": 1008})
            return
        prefix = "websocket."
    await send({"type": f"{prefix}http.response.start", "status": answer.status, "headers": answer.headers})
    body = b"" if scope.get("method") == "HEAD" else answer.body
    await send({"type": f"{prefix}http.response.body", "body": body})


class _Lifespan:
    """The send side of the lifespan conversation: the store opens after the application and closes before it."""

    def __init__(self, coat: AsyncCoatcheck, send: Send) -> None:
        self._coat = coat
        self._send = send
        self._failed = False

    async def send(self, message: Message) -> None:
        if self._failed:
            return
        kind = message["type"]
        if kind == "lifespan.startup.complete":
            try:
                await self._coat.start()
            except StoreUnavailable as lost:
                # The application may serve pages that need no session; the first one that does tries again.
                log.warning("coatcheck: the store is away at start: %s", lost.detail)
            except CoatcheckError as wrong:
                # Raised into the application as well, so that it lets go of what it has opened.
                await self._send({"type": "lifespan.startup.failed", "message": wrong.detail})
                self._failed = True
                raise
        elif kind in _ENDS:
            await self._coat.close()
        await self._send(message)
