"""The page for a browser that has a refresh cookie and no session cookie: one button, and the session goes on.

Decides what it says: nothing about whose session it is, nor whether it still counts, before the button was pressed. A
GET turns nothing into anything (SEMANTICS 8): whoever can make a browser open an address must not be able to spend its
refresh token. The exchange itself is `exchanging.py`, the same for pages and API.
"""

from __future__ import annotations

import logging
from typing import Final
from urllib.parse import quote

from starlette.responses import Response

from coatcheck.errors import CoatcheckError, PlaceRefused, RefreshInvalid, SessionEnded, SessionGone, StepUpRequired
from coatcheck.server.exchanging import exchange
from coatcheck.server.forms import read_form
from coatcheck.server.rendering import Handler, Notice, Visit, explain, go_to, show
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.texts import say_reason

log = logging.getLogger("coatcheck.server")

TAKE_UP: Final = "/login/go-on"
ANEW: Final = "anew"
"""The query parameter of who wants the sign-in form all the same."""

_SIGN_IN: Final = "/login"
_AFTERWARDS: Final = "/account"


def or_take_up(handler: Handler) -> Handler:
    """A page that whoever has nothing but a refresh cookie gets to see after the button, or by asking for it."""

    async def offer(visit: Visit) -> Response:
        query = visit.request.query_params
        if not visit.session.may_be_taken_up or ANEW in query or "signed_out" in query:
            return await handler(visit)
        path = visit.request.scope["path"]
        return take_up(visit, goal=parse_return_path(query.get("next") if path == _SIGN_IN else path))

    offer.__name__ = handler.__name__
    return offer


async def do_take_up(visit: Visit) -> Response:
    """Turn the refresh cookie into a session and go on; where that is refused, say that it is over."""
    form = await read_form(visit.request)
    goal = parse_return_path(form.get("next"))
    try:
        await exchange(visit.service, visit.session)
    except (RefreshInvalid, SessionEnded, SessionGone, StepUpRequired, PlaceRefused) as over:
        log.info("%s: %s", over.code, over.detail)
        return take_up(visit, goal=goal, over=over)
    return go_to(goal or _AFTERWARDS)


def take_up(visit: Visit, *, goal: str | None, over: CoatcheckError | None = None) -> Response:
    """The page; with `over` it leads to the sign-in form instead."""
    notice = None
    if isinstance(over, SessionEnded):
        notice = Notice(text=say_reason(over.reason, visit.language), tone="bad")
    elif over is not None:
        notice = Notice(text=explain(visit, over), tone="bad")
    return show(
        visit,
        "take_up.html",
        error=over,
        notice=notice,
        action=TAKE_UP,
        goal=goal or "",
        anew=f"{_SIGN_IN}?{ANEW}" + ("" if goal is None else f"&next={quote(goal, safe='/')}"),
    )
