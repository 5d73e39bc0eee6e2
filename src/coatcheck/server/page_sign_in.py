"""The pages of signing in and out.

Decides what a person is told: one text whatever was wrong with name or password, the reason why a session is over,
and where to go afterwards (`return_path.py`). Signing in itself is `sign_in.py`, the same for pages and API.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from starlette.responses import Response

from coatcheck.core.cookie import render_delete_cookie, render_set_cookie
from coatcheck.core.names import MAX_NAME_CHARACTERS
from coatcheck.errors import InvalidCredentials, SessionLimitReached, Throttled
from coatcheck.server.forms import read_form
from coatcheck.server.rendering import Notice, Visit, explain, go_to, moment, show
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.sign_in import sign_in
from coatcheck.server.texts import say_reason

AFTER_SIGN_IN = "/account"
AFTER_SIGN_OUT = "/login?signed_out"


async def show_sign_in(visit: Visit) -> Response:
    """The form, with the reason when a session has ended."""
    query = visit.request.query_params
    notice = None
    if "signed_out" in query and not visit.session.is_signed_in:
        notice = Notice(text=visit.say("sign_in.signed_out"), tone="good")
    return _form(visit, goal=parse_return_path(query.get("next")), notice=notice)


async def do_sign_in(visit: Visit) -> Response:
    """Sign in and go on; a refusal shows the form again with what was typed as name."""
    form = await read_form(visit.request)
    goal = parse_return_path(form.get("next"))
    name = form.get("username", "")
    try:
        welcome = await sign_in(
            visit.service, visit.session, visit.caller, name=name, password=form.get("password", "")
        )
    except (InvalidCredentials, SessionLimitReached, Throttled) as refused:
        notice = Notice(text=explain(visit, refused), tone="bad")
        return _form(visit, goal=goal, notice=notice, name=name[:MAX_NAME_CHARACTERS], error=refused)
    response = go_to(goal or AFTER_SIGN_IN)
    response.raw_headers.append((b"set-cookie", welcome.device_cookie))
    return response


async def do_sign_out(visit: Visit) -> Response:
    """Sign out; fine when nobody is signed in. The cookie goes even when the store is away (`error_answers.py`)."""
    await visit.session.logout()
    return signed_out(visit)


def signed_out(visit: Visit) -> Response:
    """Send somebody who has just signed out to the sign-in page, and leave nothing private behind the back button.

    Chromium keeps pages in memory in spite of `no-store` and drops them when an HttpOnly cookie changes; but it takes
    off as many changes as the navigation made that brought the page. A page that a sign-in led to (two cookies) would
    survive the one change of a sign-out: observed in Chromium 156. So a third cookie comes and goes, which makes three.
    """
    response = go_to(AFTER_SIGN_OUT)
    device = visit.service.device_cookie
    passing = replace(device, name=f"{device.name}_left", max_age=timedelta(seconds=1))
    response.raw_headers.append((b"set-cookie", render_set_cookie(passing, "1")))
    response.raw_headers.append((b"set-cookie", render_delete_cookie(passing)))
    return response


def _form(
    visit: Visit,
    *,
    goal: str | None,
    notice: Notice | None,
    name: str = "",
    error: InvalidCredentials | SessionLimitReached | Throttled | None = None,
) -> Response:
    end = visit.session.ended
    return show(
        visit,
        "sign_in.html",
        error=error,
        notice=notice,
        name=name,
        goal=goal or "",
        go_on=goal or AFTER_SIGN_IN,
        ended=None if end is None or notice is not None else say_reason(end.reason, visit.language),
        ended_at=None if end is None else moment(end.at, visit.language),
    )
