"""Whoever arrives by a link on another site, where the session cookie is `SameSite=Strict`.

The browser leaves the cookie out of that one request, so somebody who is signed in would look like a stranger. He gets
a small page that opens the same address again from here, once, and then the cookie comes along (SEMANTICS 8). Decides
who gets it. It must never answer twice in a row, and never lead anywhere but to the address that was asked for.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from starlette.requests import Request

from coatcheck.core.cookie import Missing, find_cookie
from coatcheck.server.service import Service

MARK: Final = "arrived"
"""The query parameter of the second look: a browser that still brings no cookie has none."""


def second_look(service: Service, request: Request) -> str | None:
    """The address to open once more from here; None for everybody who is not to."""
    cookie = service.coat.settings.session_cookie
    headers = request.headers
    if (
        request.method != "GET"
        or cookie.same_site != "Strict"
        or headers.get("sec-fetch-site") != "cross-site"
        or headers.get("sec-fetch-mode", "navigate") != "navigate"
        or MARK in request.query_params
    ):
        return None
    values = [value for name, value in request.scope["headers"] if name == b"cookie"]
    if not isinstance(find_cookie(values, cookie.wire_name), Missing):
        return None
    query = request.scope.get("query_string", b"").decode("latin-1")
    # The path was decoded on its way here; `safe` keeps every character that means nothing else in an address.
    path = quote(request.scope["path"], safe="/~")
    return f"{path}?{query}&{MARK}" if query else f"{path}?{MARK}"
