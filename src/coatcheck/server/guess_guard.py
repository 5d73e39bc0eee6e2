"""No answer for a network that guesses at session ids, while it is refused for that.

Decides who is let through all the same: whoever carries a credential that is genuine by its own check (a session id, a
refresh cookie, an access token; whether it is still good is found out behind), and the paths where somebody gets one,
which look at the browser themselves (`RiskWatch.check_network`). While nobody is refused a request costs one look at
a flag. It must never ask a store.
"""

from __future__ import annotations

from coatcheck.core.cookie import Found, find_cookie
from coatcheck.core.ids import parse_session_id
from coatcheck.core.network import client_address
from coatcheck.core.refresh_token import parse_refresh_token
from coatcheck.errors import Throttled, TokenInvalid
from coatcheck.server.service import Service
from coatcheck.web.asgi import App, Receive, Scope, Send
from coatcheck.web.bearer import bearer_of
from coatcheck.web.exchange import Headers
from coatcheck.web.paths import is_excluded
from coatcheck.web.problems import problem


class GuessGuard:
    """ASGI middleware in front of the sessions; `exclude` names paths that are left alone."""

    def __init__(self, app: App, *, service: Service, exclude: tuple[str, ...]) -> None:
        self.app = app
        self._service = service
        self._exclude = exclude

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on, or refuse it."""
        if not self._service.risk.guesses.refuses or scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            if not is_excluded(scope["path"], self._exclude):
                self._check(scope)
        except Throttled as refused:
            answer = problem(refused)
            await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
            body = b"" if scope["method"] == "HEAD" else answer.body
            await send({"type": "http.response.body", "body": body})
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        """Raises: Throttled."""
        headers: Headers = scope["headers"]
        client = scope.get("client")
        forwarded = [value for name, value in headers if name == b"x-forwarded-for"]
        found = client_address(client[0] if client else None, forwarded, self._service.coat.settings.proxies)
        if found.forged:
            # The address of a proxy that nobody named, and of everybody behind it: it is nobody's, as at the door.
            return
        try:
            self._service.risk.check_network(found.address)
        except Throttled:
            if not self._is_genuine(headers):
                raise

    def _is_genuine(self, headers: Headers) -> bool:
        """Whether the credential that counts is one of ours by its own check."""
        engine = self._service.coat.engine
        if not engine.knows_keys:
            return False
        authorization = [value for name, value in headers if name == b"authorization"]
        if authorization:
            if engine.tokens is None:
                return False
            try:
                engine.tokens.inspect(bearer_of(authorization) or b"")
            except TokenInvalid:
                return False
            return True
        settings = self._service.coat.settings
        cookies = [value for name, value in headers if name == b"cookie"]
        session = find_cookie(cookies, settings.session_cookie.wire_name)
        if isinstance(session, Found):
            # Beside a forged one a genuine refresh cookie does not count: who carries both is still guessing.
            return parse_session_id(engine.keys, session.value) is not None
        refresh = find_cookie(cookies, settings.refresh_cookie.wire_name)
        return isinstance(refresh, Found) and parse_refresh_token(engine.keys, refresh.value) is not None
