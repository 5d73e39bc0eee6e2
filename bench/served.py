"""`python -m bench.served NAME STORE PORT WORKERS`: one application under uvicorn, for `end_to_end`.

The same endpoint in each: it asks who the subject is and answers with it, or with 401; the names that begin with
`auth` are what nginx asks, and answer an empty 204 instead. A process of its own, so that it is pinned, and measured,
alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from bench.peers import LIFETIME, SECRET, BearerCheck, pyjwt_check
from bench.traffic import subject
from coatcheck import AsyncCoatcheck, Settings
from coatcheck.web import asgi

NAMES = ("bare", "coatcheck", "signed", "pyjwt", "starsessions")
NAMESPACE = "served"


def settings() -> Settings:
    """What the sessions are signed in with and the servers look for."""
    return Settings(namespace=NAMESPACE, server_key=b"k" * 32)


def application() -> Any:
    """The application that the environment names; a factory, so that each worker makes its own."""
    return make(os.environ["BENCH_SERVED"], os.environ["BENCH_STORE"])


def make(name: str, store: str) -> Any:
    """The application of this name. Raises: KeyError."""
    kind = name.removeprefix("auth-")
    who, middleware = _STACKS[kind](store)

    async def me(request: Request) -> Response:
        if kind == "coatcheck":
            await asgi.session_of(request.scope).load()
        found = who(request)
        if found is None:
            return Response(status_code=401)
        # nginx drops the connection when there is a body that it does not read.
        return Response(status_code=204) if kind != name else PlainTextResponse(found)

    async def login(request: Request) -> Response:
        request.session["user"] = request.path_params["subject"]
        return PlainTextResponse("")

    return Starlette(routes=[Route("/me", me), Route("/login/{subject}", login)], middleware=middleware)


def _bare(store: str) -> tuple[Callable[[Request], str | None], list[Middleware]]:
    return lambda _: subject(0), []


def _coatcheck(store: str) -> tuple[Callable[[Request], str | None], list[Middleware]]:
    coat = AsyncCoatcheck(store, settings=settings())
    return (
        lambda request: asgi.session_of(request.scope).subject,
        [Middleware(asgi.CoatcheckMiddleware, coat=coat)],
    )


def _signed(store: str) -> tuple[Callable[[Request], str | None], list[Middleware]]:
    from starlette.middleware.sessions import SessionMiddleware

    return (
        lambda request: request.session.get("user"),
        [Middleware(SessionMiddleware, secret_key=SECRET, https_only=True)],
    )


def _pyjwt(store: str) -> tuple[Callable[[Request], str | None], list[Middleware]]:
    return lambda request: request.scope["subject"], [Middleware(BearerCheck, check=pyjwt_check)]


def _starsessions(store: str) -> tuple[Callable[[Request], str | None], list[Middleware]]:
    from starsessions import SessionAutoloadMiddleware, SessionMiddleware
    from starsessions.stores.redis import RedisStore

    return (
        lambda request: request.session.get("user"),
        [
            Middleware(SessionMiddleware, store=RedisStore(store), cookie_https_only=True, lifetime=LIFETIME),
            Middleware(SessionAutoloadMiddleware),
        ],
    )


_STACKS = {
    "bare": _bare,
    "coatcheck": _coatcheck,
    "signed": _signed,
    "pyjwt": _pyjwt,
    "starsessions": _starsessions,
}


def main() -> None:
    name, store, port, workers = sys.argv[1:]
    os.environ.update(BENCH_SERVED=name, BENCH_STORE=store)
    uvicorn.run(
        "bench.served:application",
        factory=True,
        host="127.0.0.1",
        port=int(port),
        workers=int(workers),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
        # Nothing stands before it that could say what the scheme is.
        proxy_headers=False,
    )


if __name__ == "__main__":
    main()
