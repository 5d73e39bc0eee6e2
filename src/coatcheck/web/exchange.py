"""One request and its response, without a framework: headers in, headers out.

Decides which cookie counts, whether the request may change anything (cross-origin check), when fields are written and
which headers the response needs. Written once as `async def`; adapters await it or step it. It must never see a store
and never send anything itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Final, Generic, TypeVar

from coatcheck.core.cookie import (
    Duplicated,
    Found,
    find_cookie,
    render_delete_cookie,
    render_set_cookie,
)
from coatcheck.core.csrf import Refused, check_origin
from coatcheck.core.network import client_address
from coatcheck.engine import ClientPlace, Engine
from coatcheck.errors import CrossOriginRefused, SessionGone
from coatcheck.session import AsyncSession, SendCookie, Session
from coatcheck.settings import Settings

log = logging.getLogger("coatcheck")

S = TypeVar("S", Session, AsyncSession)

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_WANTED: Final = frozenset(
    {b"cookie", b"authorization", b"origin", b"sec-fetch-site", b"host", b"x-forwarded-for", b"user-agent"}
)


class Exchange(Generic[S]):
    """The session of one request, and what it does to the response."""

    __slots__ = ("_method", "_websocket", "engine", "forged_address", "place", "refused", "session")

    def __init__(
        self,
        engine: Engine,
        session_type: type[S],
        *,
        headers: Iterable[tuple[bytes, bytes]],
        method: str,
        scheme: str,
        peer: str | None,
        websocket: bool = False,
    ) -> None:
        """`headers` are raw, with lower-case names; `peer` is the address at the other end of the connection."""
        self.engine = engine
        self._method = method
        self._websocket = websocket
        settings = engine.settings
        seen: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            if name in _WANTED:
                seen.setdefault(name, []).append(value)
        self.refused = self._check_origin(settings, seen, scheme)
        self.place = self._place(settings, seen, peer)
        presented = None if b"authorization" in seen else self._cookie(settings, seen.get(b"cookie", ()))
        self.session: S = session_type(engine, presented, self.place)

    async def finish(self, status: int, headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Write the fields and return the headers to add, just before the response begins.

        `status` is the response's own; on 5xx the fields are dropped. Raises: StoreUnavailable, RecordTooLarge,
        SessionGone (unsafe methods alone: a page that only showed something stays as it is).
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

    def finish_without_fields(self) -> list[tuple[bytes, bytes]]:
        """The headers of an error response: fields are dropped, a sign-in or sign-out still counts."""
        self.session.close()
        return self._response_headers(())

    async def abandon(self) -> None:
        """No response of ours will be sent: a sign-in of this request is taken back."""
        await self.session.abandon()

    def _response_headers(self, present: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        session = self.session
        action = session.cookie_action
        if not session.accessed and action is None:
            return []
        added = [(b"vary", b"Cookie")]
        cookie = self.engine.settings.session_cookie
        if isinstance(action, SendCookie):
            lifetime: timedelta | None = self.engine.settings.absolute_timeout if action.persistent else None
            added.append((b"set-cookie", render_set_cookie(cookie, action.id.text, max_age=lifetime)))
        elif action is not None:
            added.append((b"set-cookie", render_delete_cookie(cookie)))
        # CVE-2023-30861: a shared cache must neither keep nor mix answers that depend on a session; no-store also
        # keeps the page out of the browser's back button after sign-out.
        if not any(name.lower() == b"cache-control" for name, _ in present):
            added.append((b"cache-control", b"no-store"))
        return added

    def _check_origin(
        self, settings: Settings, seen: dict[bytes, list[bytes]], scheme: str
    ) -> CrossOriginRefused | None:
        if self._method in SAFE_METHODS and not self._websocket:
            return None
        host = seen.get(b"host")
        decision = check_origin(
            settings.origins,
            method=self._method,
            websocket=self._websocket,
            sec_fetch_site=seen.get(b"sec-fetch-site", ()),
            origin=seen.get(b"origin", ()),
            scheme=scheme,
            host=host[0] if host is not None and len(host) == 1 else None,
        )
        if not isinstance(decision, Refused):
            return None
        self.engine.publish_kind("request.cross_origin_refused", reason=str(decision.reason), method=self._method[:16])
        return CrossOriginRefused(str(decision.reason))

    def _cookie(self, settings: Settings, values: Sequence[bytes]) -> bytes | None:
        if not values:
            return None
        found = find_cookie(values, settings.session_cookie.wire_name)
        if isinstance(found, Found):
            return found.value
        if isinstance(found, Duplicated):
            # Cookie tossing: a twin from a sibling host or a script cannot be told from ours, so neither counts.
            self.engine.publish_kind("session_id.duplicated")
        return None

    def _place(self, settings: Settings, seen: dict[bytes, list[bytes]], peer: str | None) -> ClientPlace:
        client = client_address(peer, seen.get(b"x-forwarded-for", ()), settings.proxies)
        self.forged_address = client.forged
        agent = seen.get(b"user-agent")
        return ClientPlace(address=client.address, user_agent="" if agent is None else agent[0].decode("latin-1"))


def is_excluded(path: str, exclude: Sequence[str]) -> bool:
    """Whether a path lies at or below one of the excluded ones (`/static` means `/static` and `/static/…`)."""
    return any(path == each or path.startswith(each.rstrip("/") + "/") for each in exclude)
