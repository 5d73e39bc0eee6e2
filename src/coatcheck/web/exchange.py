"""One request and its response, without a framework: headers in, headers out.

Decides which cookie counts, whether the request may change anything (cross-origin check), when fields are written and
which headers the response needs. Written once as `async def`; adapters await it or step it. It must never see a store
and never send anything itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final, Generic, TypeAlias, TypeVar

from coatcheck.core.cookie import (
    Duplicated,
    Found,
    Missing,
    every_value,
    find_cookie,
    render_delete_cookie,
    render_set_cookie,
    sole_value,
)
from coatcheck.core.csrf import SAFE_METHODS, Refused, check_origin
from coatcheck.core.device import device_of
from coatcheck.core.network import ClientAddress, client_address
from coatcheck.core.profiles import OutagePolicy
from coatcheck.engine import Engine
from coatcheck.errors import CoatcheckError, CrossOriginRefused, SessionGone, StoreUnavailable, ValueRefused
from coatcheck.places import Binding, ClientPlace
from coatcheck.session import AsyncSession, SendCookie, SendRefresh, Session, SessionBase
from coatcheck.settings import Settings
from coatcheck.web.bearer import bearer_of
from coatcheck.web.problems import ProblemAnswer, problem

log: Final = logging.getLogger("coatcheck")

S = TypeVar("S", Session, AsyncSession)

Headers: TypeAlias = list[tuple[bytes, bytes]]

_OURS: Final = frozenset({"vary", "cache-control", b"vary", b"cache-control"})
_CREDENTIALS: Final = frozenset({b"cookie", b"authorization"})
_MAX_KEPT: Final = 1024
_LENGTHS: Final = frozenset(map(len, _OURS))
DEPENDS_ON_COOKIE: Final = (("Vary", "Cookie"), ("Cache-Control", "no-store"))
"""What says that an answer depends on the session, and that nobody keeps it."""


class Exchange(Generic[S]):
    """The session of one request, and what it does to the response."""

    __slots__ = ("_headers", "_method", "_peer", "_websocket", "engine", "outer", "refused", "session")

    def __init__(
        self,
        engine: Engine,
        session_type: type[S],
        *,
        headers: Headers,
        method: str,
        scheme: str,
        peer: str | None,
        websocket: bool = False,
        outage: OutagePolicy | None = None,
    ) -> None:
        """`headers` are raw, with lower-case names; `peer` is the address at the other end of the connection.
        `outage`: what to do when the store is away, if not what the settings say."""
        self.engine: Engine = engine
        self.outer: Exchange[S] | None = None
        """The exchange of another installation around this one."""
        self._method = method
        self._websocket = websocket
        self._headers = headers
        self._peer = peer
        settings = engine.settings
        safe = method in SAFE_METHODS and not websocket
        self.refused: CrossOriginRefused | None = None if safe else self._check_origin(settings, scheme)
        # Not a method of this exchange: the two would hold each other, and every request would be left to the garbage
        # collector.
        where = partial(place_of, engine, headers, peer)
        if engine.tokens is None:
            # What almost every request looks like; everything else is looked at closely.
            sole = _sole_cookie(headers, settings.session_cookie.wire_name)
            if sole is not None and (safe or not _bring(_values(headers, b"cookie"), engine.refresh_left)):
                self.session: S = session_type(engine, sole, where, outage=outage)
                return
        cookies = _values(headers, b"cookie")
        authorization = _values(headers, b"authorization")
        presented, aside = self._cookie(settings, cookies, bearer=bool(authorization)) if cookies else (None, ())
        if engine.tokens is None and not _bring(cookies, engine.refresh_left):
            self.session = session_type(engine, presented, where, aside=aside, outage=outage)
            return
        refresh, refresh_aside = self._refresh(settings, cookies, bearer=bool(authorization))
        self.session = session_type(
            engine,
            presented,
            where,
            aside=aside,
            bearer=bearer_of(authorization),
            refresh=refresh,
            refresh_aside=refresh_aside,
            outage=outage,
        )

    def finish_now(
        self, headers: Iterable[tuple[str, str]] | Iterable[tuple[bytes, bytes]]
    ) -> Sequence[tuple[str, str]] | None:
        """`finish` where nothing has to be waited for and nothing can go wrong: almost every request. Else None.

        `headers` are the application's, in whatever type and case; what is returned is to be added to them.
        """
        session = self.session
        if session.accessed and self.engine.tokens is not None:
            return None
        return finish_quietly(session, headers)

    async def finish(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> Headers:
        """Write the fields and return all headers of the response, just before it begins.

        `status` and `headers` are the application's own; on 5xx the fields are dropped. Raises: StoreUnavailable,
        RecordTooLarge, SessionGone (unsafe methods alone: a page that only showed something stays as it is),
        RuntimeError for a `login()` that nobody awaited.
        """
        session = self.session
        if session.unfinished_login:
            raise RuntimeError("session.login() was called but never awaited: nobody has been signed in")
        if status == 500 and session.store_failure is not None:
            # Flask and Django turn every exception of a view into a 500; a store that is away is a 503.
            raise session.store_failure
        if status < 500:
            try:
                await session.finish()
            except SessionGone:
                if self._method not in SAFE_METHODS:
                    raise
                log.info("coatcheck: fields were dropped, their session ended during a safe request")
        session.close()
        return self._response_headers(headers)

    def finish_with(self, answer: ProblemAnswer) -> ProblemAnswer:
        """The answer that takes the place of the application's: fields are dropped, a sign-in or sign-out counts."""
        self.session.close()
        return ProblemAnswer(status=answer.status, headers=self._response_headers(answer.headers), body=answer.body)

    def refuse(self, error: CoatcheckError) -> ProblemAnswer:
        """The answer for an error that left the application; tells the log, which knows more than the client."""
        if isinstance(error, StoreUnavailable):
            self.engine.publish_kind("store.unavailable")
            log.warning("coatcheck: %s", error.detail)
        elif isinstance(error, ValueRefused):
            # Most often a mistake of the application, which a client's 400 alone would hide.
            log.warning("coatcheck: %s: %s", error.code, error.detail)
        else:
            log.info("coatcheck: %s: %s", error.code, error.detail)
        return self.finish_with(problem(error))

    async def abandon(self) -> None:
        """No response of ours will be sent: a sign-in of this request is taken back."""
        await self.session.abandon()

    def _response_headers(self, present: Iterable[tuple[bytes, bytes]]) -> Headers:
        headers = [(name, value) for name, value in present]
        session = self.session
        action, refresh = session.cookie_action, session.refresh_action
        if not session.accessed and action is None and refresh is None:
            return headers
        for read in (b"Cookie", b"Authorization") if self.engine.tokens is not None else (b"Cookie",):
            if not {read.lower(), b"*"} & _listed(headers, b"vary"):
                headers.append((b"vary", read))
        # CVE-2023-30861: a shared cache must neither keep nor mix answers that depend on a session; no-store also
        # keeps the page out of the browser's back button after sign-out. `public` from the application is
        # overruled; `private` is its own well-considered word, unless an id is in the answer.
        stated = _listed(headers, b"cache-control")
        if b"no-store" not in stated and (action is not None or refresh is not None or b"private" not in stated):
            headers = [header for header in headers if header[0].lower() != b"cache-control"]
            headers.append((b"cache-control", b"no-store"))
        cookie = self.engine.settings.session_cookie
        if isinstance(action, SendCookie):
            lifetime: timedelta | None = self.engine.settings.absolute_timeout if action.persistent else None
            headers.append((b"set-cookie", render_set_cookie(cookie, action.id.text, max_age=lifetime)))
        elif action is not None:
            headers.append((b"set-cookie", render_delete_cookie(cookie)))
        if isinstance(refresh, SendRefresh):
            held = self.engine.settings.refresh_cookie
            headers.append((b"set-cookie", render_set_cookie(held, refresh.text, max_age=refresh.max_age)))
        elif refresh is not None:
            headers.append((b"set-cookie", render_delete_cookie(self.engine.settings.refresh_cookie)))
        return headers

    def _check_origin(self, settings: Settings, scheme: str) -> CrossOriginRefused | None:
        host = _values(self._headers, b"host")
        decision = check_origin(
            settings.origins,
            method=self._method,
            websocket=self._websocket,
            sec_fetch_site=_values(self._headers, b"sec-fetch-site"),
            origin=_values(self._headers, b"origin"),
            scheme=scheme,
            host=host[0] if len(host) == 1 else None,
        )
        if not isinstance(decision, Refused):
            return None
        self.engine.publish_kind("request.cross_origin_refused", reason=str(decision.reason), method=self._method[:16])
        return CrossOriginRefused(str(decision.reason))

    def _cookie(
        self, settings: Settings, values: Sequence[bytes], *, bearer: bool
    ) -> tuple[bytes | None, tuple[bytes, ...]]:
        """The cookie that counts, and those that came but do not."""
        name = settings.session_cookie.wire_name
        found = find_cookie(values, name)
        if isinstance(found, Found):
            # Two credentials are never merged: beside an Authorization header the cookie does not count.
            return (None, (found.value,)) if bearer else (found.value, ())
        if isinstance(found, Missing):
            return None, ()
        if isinstance(found, Duplicated):
            # Cookie tossing: a twin from a sibling host or a script cannot be told from ours, so neither counts.
            self.engine.publish_kind("session_id.duplicated")
        return None, every_value(values, name)

    def _refresh(
        self, settings: Settings, values: Sequence[bytes], *, bearer: bool
    ) -> tuple[bytes | None, tuple[bytes, ...]]:
        """The refresh cookie that counts, and those that came but do not: twins, or beside an Authorization header."""
        if not values:
            return None, ()
        name = settings.refresh_cookie.wire_name
        found = find_cookie(values, name)
        if isinstance(found, Found) and not bearer:
            return found.value, ()
        return None, () if isinstance(found, Missing) else every_value(values, name)

    @property
    def place(self) -> ClientPlace:
        """Where the request came from. Found out when somebody asks: most requests need not know."""
        return place_of(self.engine, self._headers, self._peer)

    @property
    def forged_address(self) -> bool:
        """Whether forwarding headers came from a peer that is no trusted proxy."""
        return _client(self.engine, self._headers, self._peer).forged


def _sole_cookie(headers: Headers, wire_name: bytes) -> bytes | None:
    """The value of the only credential of a request, if it is a cookie of this name as browsers write it."""
    cookie: bytes | None = None
    for name, value in headers:
        if name in _CREDENTIALS:
            if cookie is not None or name != b"cookie":
                return None
            cookie = value
    return None if cookie is None else sole_value(cookie, wire_name)


def _bring(cookies: Sequence[bytes], wire_name: bytes | None) -> bool:
    """Whether a cookie of this name may have come; whoever reads it looks closely."""
    return wire_name is not None and any(wire_name in value for value in cookies)


def finish_quietly(
    session: SessionBase, headers: Iterable[tuple[str, str]] | Iterable[tuple[bytes, bytes]]
) -> Sequence[tuple[str, str]] | None:
    """See `Exchange.finish_now`, which this is where no tokens are handed out."""
    if not session.is_quiet:
        return None
    accessed = session.accessed
    if accessed:
        for name, _ in headers:
            # Told by their lengths first: looking closely at every header of every response would cost more.
            if len(name) in _LENGTHS and name.lower() in _OURS:
                return None
    session.close()
    return DEPENDS_ON_COOKIE if accessed else ()


def place_of(engine: Engine, headers: Headers, peer: str | None) -> ClientPlace:
    """Where a request with these headers came from, over a connection from `peer`."""
    binding = engine.binding
    if binding is None:
        agents = _values(headers, b"user-agent")
        return ClientPlace(
            address=_client(engine, headers, peer).address, user_agent=agents[0].decode("latin-1") if agents else ""
        )
    return _place_under(binding, engine, headers, peer)


def _place_under(binding: Binding, engine: Engine, headers: Headers, peer: str | None) -> ClientPlace:
    once = dict(headers)
    if len(once) != len(headers):
        # Something came twice: each line of it is looked at.
        return _place_among(binding, engine, headers, peer)
    get, name = once.get, engine.device_cookie
    forwarded, agent, device = get(b"x-forwarded-for"), get(b"user-agent"), None
    if name:
        cookie = get(b"cookie")
        if cookie is not None:
            device = sole_value(cookie, name) or _device([cookie], name)
    known = binding.known.get((peer, forwarded, device, agent))
    return _read_place(binding, engine, peer, forwarded, device, agent) if known is None else known


def _place_among(binding: Binding, engine: Engine, headers: Headers, peer: str | None) -> ClientPlace:
    lines, agents = _values(headers, b"x-forwarded-for"), _values(headers, b"user-agent")
    # In one line, as the rule reads them.
    forwarded, agent = b",".join(lines) if lines else None, agents[0] if agents else None
    cookies = _values(headers, b"cookie") if engine.device_cookie else []
    return _read_place(binding, engine, peer, forwarded, _device(cookies, engine.device_cookie), agent)


def _device(cookies: Sequence[bytes], name: bytes) -> bytes | None:
    found = find_cookie(cookies, name) if cookies else None
    return (found.value or None) if isinstance(found, Found) else None


def _read_place(
    binding: Binding,
    engine: Engine,
    peer: str | None,
    forwarded: bytes | None,
    device: bytes | None,
    agent: bytes | None,
) -> ClientPlace:
    key = (peer, forwarded, device, agent)
    known = binding.known.get(key)
    if known is None:
        known = binding.marked(
            client_address(peer, [] if forwarded is None else [forwarded], engine.settings.proxies).address,
            "" if agent is None else agent.decode("latin-1"),
            None if device is None else device_of(device.decode("latin-1")),
        )
        if sum(len(part) for part in (forwarded, device, agent) if part is not None) <= _MAX_KEPT:
            binding.known.put(key, known)
    return known


def _values(headers: Headers, wanted: bytes) -> list[bytes]:
    return [value for name, value in headers if name == wanted]


def _client(engine: Engine, headers: Headers, peer: str | None) -> ClientAddress:
    return client_address(peer, _values(headers, b"x-forwarded-for"), engine.settings.proxies)


def _listed(headers: Headers, wanted: bytes) -> set[bytes]:
    """The members of a comma-separated header, in lower case."""
    return {member.strip().lower() for name, value in headers if name.lower() == wanted for member in value.split(b",")}
