"""Forward auth: a gateway holds a request back and asks here who is signed in on it.

Decides what each gateway is told: 204 (Envoy: 200) with identity headers, 401, 403, 503, or for a person without a
session the way to the sign-in page where the gateway passes that on. Who is signed in is found as everywhere else, by
the session of the exchange: cookie or access token, near copy or store. Answers have no body: nginx drops the
connection behind a sub-request whose body it does not read, which made it three times slower.

It must never answer a peer that is no configured proxy, never believe an identity header that came in, and never let
anything of the request behind the gateway decide but its credential, its method and whose page sent it. It runs before
every other layer of the server and makes no request and no response object.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, urlsplit

from coatcheck.core.forwarded import (
    GATEWAYS,
    Asked,
    Gateway,
    Rule,
    cookies_without,
    identity_text,
    is_trusted_peer,
    parse_rules,
    read_asked,
)
from coatcheck.core.freshness import BoundedTable
from coatcheck.core.near_session import NearSession
from coatcheck.engine import MAX_OPENED, MAX_OPENED_OCTETS
from coatcheck.errors import (
    CoatcheckError,
    Forbidden,
    LoginRequired,
    NotFound,
    RequestRefused,
    StepUpRequired,
    StoreUnavailable,
)
from coatcheck.server.forward_token import ForwardTokens
from coatcheck.server.negotiation import preferences, quality_of
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.service import Service
from coatcheck.session import AsyncSession, Principal
from coatcheck.web.asgi import App, Receive, Scope, Send
from coatcheck.web.exchange import Exchange, Headers
from coatcheck.web.problems import problem

log: Final = logging.getLogger("coatcheck.server")

PREFIX: Final = "/forward"
IDENTITY_HEADERS: Final = ("Remote-User", "Remote-Name", "Remote-Session", "Remote-Roles", "Remote-Level")
"""What the service behind reads. Every answer that lets in has all of them, so that no copy of a client stays."""

MAX_PEERS: Final = 1024

_SIGN_IN: Final = (LoginRequired, StepUpRequired)
_PASSED_ON: Final = frozenset({b"www-authenticate", b"retry-after"})
_NO_STORE: Final = (b"cache-control", b"no-store")
_EMPTY: Final = (b"content-length", b"0")
# Traefik and Envoy cannot take single cookies out of a request; they can put a header in the place of another.
_GETS_COOKIES: Final[frozenset[Gateway]] = frozenset({"traefik", "envoy"})


@dataclass(frozen=True, slots=True)
class _Known:
    """What is told of one session, made once for as long as the copy of it that is kept near is the same object."""

    near: NearSession
    principal: Principal
    roles: frozenset[str]
    headers: Headers


class ForwardAuth:
    """ASGI middleware around everything else: answers below `/forward`, and passes the rest on."""

    def __init__(self, app: App, *, service: Service) -> None:
        self.app = app
        self._service = service
        self._addresses: dict[bytes, tuple[Gateway, Rule]] = {}
        self._tokens: ForwardTokens | None = None
        settings = service.settings
        if settings.forward:
            for gateway in GATEWAYS:
                for rule in (Rule(), *parse_rules(settings.forward_rules)):
                    spelled = f"{gateway}:{rule.name}" if rule.name else gateway
                    self._addresses[spelled.encode("ascii")] = (gateway, rule)
            if settings.forward_audience is not None:
                self._tokens = ForwardTokens(service.coat.engine, settings.forward_audience)
        sessions = service.coat.settings
        self._ours = frozenset(
            {
                sessions.session_cookie.wire_name,
                sessions.refresh_cookie.wire_name,
                service.device_cookie.wire_name,
                service.continue_cookie.wire_name,
            }
        )
        self._public = settings.browser_url
        url = urlsplit(self._public)
        self._origin = (url.scheme.encode("ascii"), url.netloc.lower().encode("latin-1", "replace"))
        self._peers: dict[str, bool] = {}
        self._known: BoundedTable[_Known] = BoundedTable(MAX_OPENED)
        self._seen: dict[tuple[bytes, int], Callable[[float], None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection, or pass it on."""
        if scope["type"] != "http" or not _is_ours(scope["path"]):
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        spelled, status, headers = await self._answer(scope)
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})
        self._observe(spelled, status, time.perf_counter() - begun)

    async def _answer(self, scope: Scope) -> tuple[bytes, int, Headers]:
        # As it was sent: an address that is spelled in another way is another address.
        path: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
        spelled, slash, below = path.partition(b"?")[0][len(PREFIX) + 1 :].partition(b"/")
        client = scope.get("client")
        peer: str | None = client[0] if client else None
        known = self._addresses.get(spelled) if path.startswith(b"/forward/") else None
        if known is None or (slash and known[0] != "envoy"):
            # Who may not ask is not told either which addresses there are; where there are none, nobody may.
            stranger = bool(self._addresses) and not self._is_trusted(peer)
            return b"other", *_refusal(Forbidden() if stranger else NotFound())
        gateway, rule = known
        asked: Asked | None = None
        try:
            if not self._is_trusted(peer):
                # CVE-2026-40575, CVE-2026-76835: what anybody may say about a request, anybody may make up.
                raise Forbidden(f"forward auth: {peer} is no trusted proxy")
            if scope.get("query_string"):
                # Envoy adds it to the address; it is only ever part of where to return to.
                below += b"?" + scope["query_string"]
            headers: Headers = scope["headers"]
            read = read_asked(gateway, method=scope["method"], below=slash + below, headers=headers)
            if isinstance(read, str):
                raise RequestRefused(f"forward auth for {gateway}: {read}")
            asked = read
            session, principal, told = await self._who(asked, rule, headers, peer)
            added = [*told]
            if self._tokens is not None:
                token = await self._tokens.mint(session, principal)
                added.append((b"authorization", b"Bearer " + token.encode("ascii")))
        except CoatcheckError as error:
            _tell(error)
            return spelled, *self._refuse(error, gateway, asked)
        if gateway in _GETS_COOKIES:
            values = [value for name, value in headers if name == b"cookie"]
            added.append((b"cookie", cookies_without(values, self._ours)))
        if gateway == "envoy":
            return spelled, 200, [*added, _NO_STORE, _EMPTY]
        return spelled, 204, [*added, _NO_STORE]

    def _is_trusted(self, peer: str | None) -> bool:
        known = self._peers.get(peer or "")
        if known is None:
            known = is_trusted_peer(peer, self._service.coat.settings.proxies)
            if len(self._peers) >= MAX_PEERS:
                self._peers.clear()
            self._peers[peer or ""] = known
        return known

    async def _who(
        self, asked: Asked, rule: Rule, headers: Headers, peer: str | None
    ) -> tuple[AsyncSession, Principal, Headers]:
        """Who is signed in, and what is told of him. Raises: LoginRequired, TokenInvalid, Forbidden,
        CrossOriginRefused, StoreUnavailable."""
        exchange = Exchange(
            self._service.coat.engine,
            AsyncSession,
            headers=headers,
            method=asked.method,
            scheme="http",
            peer=peer,
            websocket=asked.websocket,
            # What only some may see must not rest on what was known before the store went away.
            outage="refuse" if rule.roles else None,
        )
        if exchange.refused is not None:
            # The service behind does not know our cookie, so nobody but us can tell whose page sent it.
            raise exchange.refused
        session = exchange.session
        await session.load()
        principal, roles, told = self._told(session)
        if rule.roles and not rule.roles & roles:
            raise Forbidden(f"forward auth: rule {rule.name} wants another role")
        # A successor of a rotated id is not sent on this way: what a gateway is told, others may read.
        session.close()
        return session, principal, told

    def _told(self, session: AsyncSession) -> tuple[Principal, frozenset[str], Headers]:
        near = session.near
        if near is not None and near.subject is not None:
            known = self._known.get(near.digest)
            if known is not None and known.near is near:
                return known.principal, known.roles, known.headers
        principal = session.require_login()
        roles = _roles(principal)
        told = _identity(principal, roles)
        if near is not None and len(near.packed) <= MAX_OPENED_OCTETS:
            self._known.put(near.digest, _Known(near, principal, roles, told))
        return principal, roles, told

    def _refuse(self, error: CoatcheckError, gateway: Gateway, asked: Asked | None) -> tuple[int, Headers]:
        # nginx takes 2xx, 401 and 403 and nothing else; its configuration sends people to sign in.
        if gateway != "nginx" and asked is not None and isinstance(error, _SIGN_IN) and _wants_page(asked):
            return 302, [(b"location", self._sign_in(asked)), _NO_STORE, _EMPTY]
        return _refusal(error)

    def _sign_in(self, asked: Asked) -> bytes:
        """The sign-in page at the public address, whatever host was asked for: that is anybody's to choose."""
        goal: str | None = None
        # Envoy asks without saying how it was asked itself.
        scheme = self._origin[0] if asked.scheme is None else asked.scheme.lower()
        if asked.address is not None and asked.host is not None and (scheme, asked.host.lower()) == self._origin:
            goal = parse_return_path(asked.address.decode("latin-1"))
        where = f"{self._public}/login" if goal is None else f"{self._public}/login?next={quote(goal, safe='/')}"
        return where.encode("ascii", "replace")

    def _observe(self, spelled: bytes, status: int, seconds: float) -> None:
        observe = self._seen.get((spelled, status))
        if observe is None:
            # Addresses that exist and `other`: an invented one makes no new time series.
            route = f"{PREFIX}/{spelled.decode('ascii')}"
            observe = self._service.metrics.requests.labels(route, str(status)).observe
            self._seen[spelled, status] = observe
        observe(seconds)


def _is_ours(path: str) -> bool:
    return path.startswith(PREFIX) and path[len(PREFIX) : len(PREFIX) + 1] in ("", "/")


def _identity(principal: Principal, roles: frozenset[str]) -> Headers:
    claims = principal.claims
    return [
        (b"remote-user", identity_text(principal.subject)),
        (b"remote-name", identity_text(str(claims.get("name") or ""))),
        (b"remote-session", principal.sid.encode("ascii")),
        (b"remote-roles", b",".join(sorted(map(identity_text, roles)))),
        (b"remote-level", _level(principal)),
    ]


def _roles(principal: Principal) -> frozenset[str]:
    """The claims `role` (a text) and `roles` (a list of texts); anything else there is no role."""
    several = principal.claims.get("roles")
    found = [principal.claims.get("role"), *(several if isinstance(several, list) else ())]
    return frozenset(each for each in found if isinstance(each, str) and each)


def _level(principal: Principal) -> bytes:
    """The authentication context class, or where there is none the methods of the sign-in."""
    return identity_text(principal.acr) if principal.acr else b",".join(map(identity_text, principal.amr))


def _wants_page(asked: Asked) -> bool:
    if asked.method != "GET" or asked.websocket or asked.accept is None:
        return False
    wanted = preferences(asked.accept.decode("latin-1"))
    return quality_of(wanted, "text/html") > quality_of(wanted, "application/json")


def _refusal(error: CoatcheckError) -> tuple[int, Headers]:
    # A proof is given where people sign in: a gateway sends them there alike.
    known = 401 if isinstance(error, StepUpRequired) else error.status
    status = 503 if known >= 500 else known if known in (401, 404) else 403
    headers = [header for header in problem(error).headers if header[0] in _PASSED_ON]
    return status, [*headers, _NO_STORE, _EMPTY]


def _tell(error: CoatcheckError) -> None:
    if isinstance(error, StoreUnavailable) or error.status >= 500:
        log.warning("forward auth: %s: %s", error.code, error.detail)
    else:
        log.info("%s: %s", error.code, error.detail)
