"""The server as one ASGI application: pages, JSON API, health and metrics behind the session middleware.

Decides composition alone: which addresses exist, which headers every answer carries, and which problem document an
error becomes (`error_answers.py` brings it into the caller's language and form).
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Match, Route

from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import (
    CoatcheckError,
    Forbidden,
    MethodNotAllowed,
    NotFound,
    RequestRefused,
    StoreUnavailable,
)
from coatcheck.primitives.digest import same
from coatcheck.server.api import ROUTES
from coatcheck.server.error_answers import ErrorAnswers
from coatcheck.server.forward import ForwardAuth
from coatcheck.server.guess_guard import GuessGuard
from coatcheck.server.headers import SecurityHeaders
from coatcheck.server.metrics import CONTENT_TYPE
from coatcheck.server.openapi import document
from coatcheck.server.pages import page_routes
from coatcheck.server.request_metrics import RequestMetrics
from coatcheck.server.routes import endpoint
from coatcheck.server.service import Service
from coatcheck.server.token_endpoints import PATHS, token_routes
from coatcheck.web.asgi import CoatcheckMiddleware
from coatcheck.web.problems import problem

log = logging.getLogger("coatcheck.server")

_FORWARDING: Final = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")
HEALTH: Final = ("/health/live", "/health/ready", "/metrics")
UNGUARDED: Final = (*HEALTH, *PATHS, "/static", "/openapi.json", "/login", "/api/login", "/api/refresh")
"""Where a network that guesses at session ids is answered all the same: what tells nothing of a session, and where
somebody gets one. Signing in looks at the browser itself."""


def create_app(service: Service, *, on_ready: Callable[[], Awaitable[None]] | None = None) -> Starlette:
    """The application of one service; it opens the service when the server starts and closes it at the end."""
    health = Health(service)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await service.open()
        if on_ready is not None:
            await on_ready()
        try:
            yield
        finally:
            health.stopping = True
            await service.close()

    sessions = service.coat.settings
    openapi = document(
        ROUTES,
        title=service.settings.name,
        cookie=sessions.session_cookie.name,
        tokens=sessions.tokens is not None,
    )

    async def describe(_: Request) -> Response:
        return JSONResponse(openapi)

    routes: list[BaseRoute] = [Route("/openapi.json", describe, methods=["GET"])]
    routes += health.routes()
    routes += [Route(row.path, endpoint(service, row), methods=[row.method]) for row in ROUTES]
    routes += token_routes(service)
    routes += page_routes(service)
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[
            # Outermost: a gateway asks for every request of everything behind it.
            Middleware(ForwardAuth, service=service),
            Middleware(SecurityHeaders, https=service.coat.settings.is_https),
            Middleware(RequestMetrics, metrics=service.metrics),
            Middleware(ErrorAnswers, service=service),
            *([Middleware(GuessGuard, service=service, exclude=UNGUARDED)] if service.risk.guesses.counts else []),
            Middleware(
                CoatcheckMiddleware,
                coat=service.coat,
                exclude=(*HEALTH, *PATHS, "/static", "/openapi.json"),
                outage=OUTAGE,
            ),
        ],
        exception_handlers={CoatcheckError: _answer_error, HTTPException: _answer_http},
    )
    # Starlette would answer `/login/` with an absolute address made from the Host header, which anybody can choose.
    app.router.redirect_slashes = False
    return app


OUTAGE: Final[Mapping[str, OutagePolicy]] = dict.fromkeys(
    (
        "/api/admin",
        "/api/password",
        "/api/sessions",
        "/api/step-up",
        "/account",
        "/login/confirm",
        "/setup",
        "/console",
    ),
    "refuse",
)
"""What nobody may do on the strength of a near copy while the store is away, whatever the profile says."""


class Health:
    """Is the process alive, and can it do its work?"""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.stopping = False

    def routes(self) -> list[BaseRoute]:
        """The addresses of health and metrics; they see no session and no limit."""
        return [
            Route("/health/live", self.live, methods=["GET"]),
            Route("/health/ready", self.ready, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def live(self, _: Request) -> Response:
        """Alive as long as it can answer; asks nobody."""
        return _no_store(JSONResponse({"status": "ok"}))

    async def ready(self, _: Request) -> Response:
        """Ready when store and database answer and nobody has asked the process to stop."""
        checks = [
            await self._check("store", self._service.store.ping),
            await self._check("database", self._service.database.check),
            {"name": "running", "status": "stopping" if self.stopping else "ok"},
        ]
        well = all(check["status"] == "ok" for check in checks)
        body = {"status": "ok" if well else "unavailable", "checks": checks}
        return _no_store(JSONResponse(body, status_code=200 if well else 503))

    async def metrics(self, request: Request) -> Response:
        """Counters, for this machine or for who knows the bearer."""
        token = self._service.settings.metrics_token
        given = request.headers.get("authorization", "")
        if token is not None:
            allowed = same(given.encode("utf-8", "replace"), f"Bearer {token}".encode())
        else:
            # A proxy on this machine makes everybody look local: with forwarding headers nobody is.
            allowed = _is_local(request) and not any(name in request.headers for name in _FORWARDING)
        if not allowed:
            return _no_store(PlainTextResponse("forbidden\n", status_code=403))
        self._service.metrics.hash_queue.set(self._service.hasher.waiting)
        self._service.metrics.audit_dropped.set(self._service.audit_dropped)
        engine = self._service.coat.engine
        self._service.metrics.reach.set(engine.reach.total_seconds())
        if engine.near is not None:
            self._service.metrics.set_near(engine.near, now_us=self._service.system.now_us())
        return _no_store(Response(self._service.metrics.render(), media_type=CONTENT_TYPE))

    async def _check(self, name: str, ask: Callable[[], Awaitable[object]]) -> dict[str, str]:
        try:
            await ask()
        except CoatcheckError as wrong:
            log.warning("not ready: %s: %s", name, wrong.detail)
            return {"name": name, "status": wrong.code}
        return {"name": name, "status": "ok"}


def _is_local(request: Request) -> bool:
    try:
        return request.client is not None and ipaddress.ip_address(request.client.host).is_loopback
    except ValueError:
        return False


def _no_store(response: Response) -> Response:
    response.headers["cache-control"] = "no-store"
    return response


async def _answer_error(_: Request, error: Exception) -> Response:
    if not isinstance(error, CoatcheckError):
        raise error
    if isinstance(error, StoreUnavailable):
        log.warning("store unavailable: %s", error.detail)
    elif error.status >= 500:
        log.error("%s: %s", error.code, error.detail, exc_info=error)
    else:
        log.info("%s: %s", error.code, error.detail)
    found = problem(error)
    response = Response(found.body, status_code=found.status)
    response.raw_headers = list(found.headers)
    return response


async def _answer_http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    meant: CoatcheckError
    if status == 404:
        meant = NotFound()
    elif status == 405:
        meant = MethodNotAllowed()
    elif status == 403:
        meant = Forbidden()
    else:
        meant = RequestRefused()
    response = await _answer_error(request, meant)
    if status == 405:
        response.headers["allow"] = ", ".join(sorted(_methods_at(request)))
    return response


def _methods_at(request: Request) -> set[str]:
    # Several routes may share a path, and Allow names what all of them take (RFC 9110 s10.2.1).
    routes: list[BaseRoute] = request.app.routes
    found: set[str] = set()
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            found |= route.methods or set()
    return found
