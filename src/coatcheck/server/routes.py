"""The route table of the JSON API: one row serves requests and describes them in OpenAPI.

Decides how a body is read: bounded before it is parsed, JSON alone, unknown members refused. Handlers get a decoded
call and return a value; they know no framework.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from coatcheck.core.cookie import Found, find_cookie, render_set_cookie
from coatcheck.core.ids import parse_session_id
from coatcheck.errors import BodyTooLarge, CoatcheckError, RequestRefused, UnsupportedMediaType
from coatcheck.server.service import Service
from coatcheck.server.session_limits import Halted
from coatcheck.server.sign_in import Caller
from coatcheck.server.texts import Language, language_of
from coatcheck.session import AsyncSession
from coatcheck.web.asgi import EXCHANGE_KEY
from coatcheck.web.exchange import Exchange
from coatcheck.web.problems import problem

log = logging.getLogger("coatcheck.server")

MAX_BODY: Final = 16 * 1024


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A body that comes in."""

    def __repr__(self) -> str:
        # Bodies hold passwords, and error trackers record local variables.
        return f"{type(self).__name__}(redacted)"


class Reply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """A body that goes out."""

    def __repr__(self) -> str:
        # Some hold tokens, and error trackers record local variables.
        return f"{type(self).__name__}(redacted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, decoded. `body` is the row's `body` type; `query` holds the last value of each parameter.

    `from_browser`: it carries a header that every browser adds and no other client needs.
    """

    service: Service
    session: AsyncSession
    caller: Caller
    language: Language
    path: Mapping[str, str]
    query: Mapping[str, str]
    body: Any = None
    from_browser: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What a handler answers: a reply, and Set-Cookie values beside the session's own. `accepted`: it is promised, and
    not done yet (202)."""

    reply: Reply
    accepted: bool = False
    cookies: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One query parameter as the description tells it: what it means, its JSON Schema, whether it must come."""

    text: str
    schema: Mapping[str, Any]
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiRoute:
    """One row. `errors` are the refusals a client should expect beside those that any route may give.

    `body_required=False`: a request without a body is fine, and then without a Content-Type too. `loads=False`: the
    handler loads the session itself, because it has something to do even when the store is away. `may_accept`: it may
    promise rather than do (202).
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Answered]]
    summary: str
    reply: type[Reply]
    body: type[Wire] | None = None
    body_required: bool = True
    query: Mapping[str, Parameter] = field(default_factory=dict)
    errors: tuple[type[CoatcheckError], ...] = ()
    signed_in: bool = True
    loads: bool = True
    may_accept: bool = False


def endpoint(service: Service, route: ApiRoute) -> Callable[[Request], Awaitable[Response]]:
    """The Starlette endpoint of a row."""
    decoder = None if route.body is None else msgspec.json.Decoder(route.body)

    async def serve(request: Request) -> Response:
        body = None if decoder is None else await _read(request, decoder, required=route.body_required)
        exchange = exchange_of(request)
        if route.loads:
            await exchange.session.load()
        call = Call(
            service=service,
            session=exchange.session,
            caller=caller_of(service, request),
            language=language_of(request.headers.get("accept-language")),
            path=request.path_params,
            query=dict(request.query_params),
            body=body,
            from_browser="origin" in request.headers or "sec-fetch-site" in request.headers,
        )
        try:
            answered = await route.handler(call)
        except Halted as halted:
            log.info("%s: %s", halted.code, halted.detail)
            return _halted(service, halted)
        status = 202 if answered.accepted else 200
        response = Response(msgspec.json.encode(answered.reply), status_code=status, media_type="application/json")
        for cookie in answered.cookies:
            response.raw_headers.append((b"set-cookie", cookie))
        return response

    serve.__name__ = route.handler.__name__
    return serve


def continue_cookie(service: Service, halted: Halted) -> tuple[bytes, bytes]:
    """The header that binds what a refused sign-in was given to its browser."""
    return b"set-cookie", render_set_cookie(service.continue_cookie, halted.cookie)


def _halted(service: Service, halted: Halted) -> Response:
    found = problem(halted)
    response = Response(found.body, status_code=found.status)
    response.raw_headers = [*found.headers, continue_cookie(service, halted)]
    return response


def exchange_of(request: Request) -> Exchange[AsyncSession]:
    """The exchange the middleware has put into the scope."""
    exchange: Exchange[AsyncSession] = request.scope[EXCHANGE_KEY]
    return exchange


def caller_of(service: Service, request: Request) -> Caller:
    """Address of a request, and its cookies beside the session's."""
    exchange = exchange_of(request)
    values = [value for name, value in request.scope["headers"] if name == b"cookie"]
    found = find_cookie(values, service.device_cookie.wire_name)
    bound = find_cookie(values, service.continue_cookie.wire_name)
    return Caller(
        address=exchange.place.address,
        forged_address=exchange.forged_address,
        device=found.value.decode("latin-1") if isinstance(found, Found) else None,
        continuing=bound.value.decode("latin-1") if isinstance(bound, Found) else None,
        sid=_presented_sid(service, values),
    )


def _presented_sid(service: Service, cookies: Sequence[bytes]) -> str | None:
    engine = service.coat.engine
    found = find_cookie(cookies, service.coat.settings.session_cookie.wire_name)
    if not isinstance(found, Found) or not engine.knows_keys:
        return None
    presented = parse_session_id(engine.keys, found.value)
    return None if presented is None else engine.sid(presented.ref)


async def read_body(request: Request, *, limit: int = MAX_BODY) -> bytes:
    """The body, refused as soon as it passes the limit. Raises: BodyTooLarge, RequestRefused."""
    declared = request.headers.get("content-length", "0")
    if not declared.isascii() or not declared.isdigit():
        raise RequestRefused("Content-Length is not a number")
    if len(declared) > 12 or int(declared) > limit:
        raise BodyTooLarge(f"{declared[:12]} octets declared, {limit} allowed")
    chunks: list[bytes] = []
    size = 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                raise BodyTooLarge(f"more than {limit} octets")
            chunks.append(chunk)
    except ClientDisconnect as gone:
        raise RequestRefused("the client left before its body was whole") from gone
    return b"".join(chunks)


async def _read(request: Request, decoder: msgspec.json.Decoder[Any], *, required: bool) -> object:
    if not required and "content-type" not in request.headers and not await read_body(request):
        return None
    # A form or text/plain body can be sent across origins without a preflight; JSON cannot (ASVS 3.5.2).
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("not application/json")
    body = await read_body(request)
    try:
        decoded: object = decoder.decode(body)
        # A filter in front may read the first of two members where we read the last (ASVS 15.3.7, RFC 8259 s4).
        json.loads(body, object_pairs_hook=_once)
    except (msgspec.MsgspecError, RecursionError, ValueError) as broken:
        # The text names our members and types; of what came it repeats a member we do not know, which may be a secret
        # that somebody pasted into the wrong place.
        text, unknown, _ = str(broken).partition("unknown field")
        raise RequestRefused(f"body: {text[:200]!a}{unknown}") from broken
    return decoded


def _once(pairs: list[tuple[str, object]]) -> None:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError("a member came twice")
