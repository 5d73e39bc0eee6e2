"""What verifiers fetch: the published keys and the revocation feed.

Decides the headers of both and who may read the feed: a client with a credential of its own, sent as a bearer. Both
are without a session, so no cookie is ever looked at here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from coatcheck.core.denylist import MAX_PAGE_ENTRIES, PAGE_ENTRIES
from coatcheck.errors import NotFound, RequestRefused, TokenInvalid
from coatcheck.server.clients import Client
from coatcheck.server.revocations import FeedStream
from coatcheck.server.service import Service
from coatcheck.web.asgi import Receive, Scope, Send

JWKS_PATH: Final = "/.well-known/jwks.json"
FEED_PATH: Final = "/revocations"
PATHS: Final = (JWKS_PATH, FEED_PATH)
MAX_CURSOR_CHARACTERS: Final = 128


def token_routes(service: Service) -> list[BaseRoute]:
    """The addresses; where the profile hands out no tokens they answer 404."""

    async def keys(request: Request) -> Response:
        _require_tokens(service)
        issuer = service.coat.engine.issuer
        await service.coat.engine.ready()
        await service.coat.engine.keep_keys()
        found = issuer.published()
        headers = {
            "cache-control": f"public, max-age={found.max_age}",
            "etag": found.etag,
            # Public keys: any page may read them.
            "access-control-allow-origin": "*",
            "cross-origin-resource-policy": "cross-origin",
        }
        if _matches(request.headers.get("if-none-match"), found.etag):
            return Response(status_code=304, headers=headers)
        return Response(found.document, media_type="application/jwk-set+json", headers=headers)

    async def revocations(request: Request) -> Response:
        _require_tokens(service)
        client = await _require_client(service, request)
        cursor = request.query_params.get("after")
        if cursor is not None and not 1 <= len(cursor) <= MAX_CURSOR_CHARACTERS:
            raise RequestRefused("after: not a cursor")
        headers = {"cache-control": "no-store", "vary": "Accept, Authorization"}
        limit = _limit(request.query_params.get("limit"))
        # HEAD asks for the head of an answer, and a stream has no end to wait for.
        if request.method == "GET" and "text/event-stream" in request.headers.get("accept", "").lower():
            return _Streamed(await service.revocations.stream(cursor, client=client.name, limit=limit), headers)
        page = await service.revocations.page(cursor, limit=limit)
        return Response(page.octets, media_type="application/json", headers=headers)

    return [Route(JWKS_PATH, keys, methods=["GET"]), Route(FEED_PATH, revocations, methods=["GET"])]


class _Streamed(StreamingResponse):
    """A stream, whose place is given back however the answer ends, also when it never began."""

    def __init__(self, stream: FeedStream, headers: Mapping[str, str]) -> None:
        super().__init__(stream.events, media_type="text/event-stream", headers={**headers, "x-accel-buffering": "no"})
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._stream.close()


def _require_tokens(service: Service) -> None:
    if service.coat.settings.tokens is None:
        raise NotFound("this profile hands out no tokens")


async def _require_client(service: Service, request: Request) -> Client:
    given = request.headers.getlist("authorization")
    scheme, _, credential = (given[0] if len(given) == 1 else "").partition(" ")
    client = await service.clients.find(credential.strip(" ")) if scheme.lower() == "bearer" else None
    if client is None:
        raise TokenInvalid("the feed needs the credential of a client")
    return client


def _limit(text: str | None) -> int:
    if text is None:
        # So many that a verifier never finds the page too long, whatever the names in it.
        return PAGE_ENTRIES
    if not text.isascii() or not text.isdigit() or len(text) > 6 or int(text) < 1:
        raise RequestRefused("limit: a number from 1")
    return min(int(text), MAX_PAGE_ENTRIES)


def _matches(header: str | None, etag: str) -> bool:
    if header is None or len(header) > 1024:
        return False
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in header.split(","))
