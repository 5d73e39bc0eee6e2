"""The pages of signing in and out.

Decides what a person is told: one text whatever was wrong with name or password, the reason why a session is over,
which sessions fill a limit, and where to go afterwards (`return_path.py`). Signing in itself is `sign_in.py`, the same
for pages and API.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from starlette.responses import Response

from coatcheck.core.cookie import render_delete_cookie, render_set_cookie
from coatcheck.core.names import MAX_NAME_CHARACTERS
from coatcheck.core.session import SECOND_US
from coatcheck.errors import CoatcheckError, InvalidCredentials, LoginRequired, PlaceRefused, Throttled
from coatcheck.server.forms import read_form
from coatcheck.server.page_step_up import confirm
from coatcheck.server.rendering import Moment, Notice, Visit, device_text, explain, go_to, moment, show
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.routes import continue_cookie
from coatcheck.server.session_limits import Halted
from coatcheck.server.sign_in import Welcome, continue_sign_in, sign_in
from coatcheck.server.texts import say_reason
from coatcheck.session import AsyncSession

SIGN_IN: Final = "/login"
AFTER_SIGN_IN = "/account"
AFTER_SIGN_OUT = "/login?signed_out"
TICKED: Final = "end-"
"""What the name of a check box begins with; the rest is the session's `sid`. A field must not come twice."""

MAX_TICKED: Final = 1000
"""Fields of that form at most; `Settings.max_sessions_per_subject` is far below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRow:
    """One session as the page of the limit shows it."""

    sid: str
    device: str
    network: str
    created: Moment
    seen: Moment
    is_ticked: bool


async def show_sign_in(visit: Visit) -> Response:
    """The form, with the reason when a session has ended or is refused from here; a session that wants a proof is asked
    for the password alone."""
    query = visit.request.query_params
    goal = parse_return_path(query.get("next"))
    if visit.session.wants_proof_of is not None:
        return await confirm(visit, goal=goal)
    notice = None
    if "signed_out" in query and not visit.session.is_signed_in:
        notice = Notice(text=visit.say("sign_in.signed_out"), tone="good")
    return _form(visit, goal=goal, notice=notice)


def wants_more(session: AsyncSession) -> bool:
    """Whether there is a session, and nobody is signed in before it is proven or taken to its place."""
    return session.wants_proof_of is not None or _refused_until(session) is not None


def _refused_until(session: AsyncSession) -> float | None:
    try:
        session.require_login()
    except PlaceRefused as refused:
        return refused.until
    except CoatcheckError:
        # Nobody is signed in, for another reason.
        return None
    return None


async def do_sign_in(visit: Visit) -> Response:
    """Sign in and go on; a refusal shows the form again with what was typed as name."""
    form = await read_form(visit.request)
    goal = parse_return_path(form.get("next"))
    name = form.get("username", "")
    try:
        welcome = await sign_in(
            visit.service, visit.session, visit.caller, name=name, password=form.get("password", "")
        )
    except Halted as halted:
        return _limit(visit, halted, goal=goal)
    except (InvalidCredentials, Throttled) as refused:
        notice = Notice(text=explain(visit, refused), tone="bad")
        return _form(visit, goal=goal, notice=notice, name=name[:MAX_NAME_CHARACTERS], error=refused)
    return _signed_in(welcome, goal)


async def do_continue(visit: Visit) -> Response:
    """End the sessions that were ticked and sign in; the list again when it has changed or too few were ticked."""
    form = await read_form(visit.request, most=MAX_TICKED)
    goal = parse_return_path(form.get("next"))
    ending = [name.removeprefix(TICKED) for name in form if name.startswith(TICKED)]
    try:
        welcome = await continue_sign_in(
            visit.service, visit.session, visit.caller, word=form.get("continue", ""), ending=ending
        )
    except Halted as halted:
        return _limit(visit, halted, goal=goal, again=True)
    except (InvalidCredentials, LoginRequired) as over:
        notice = Notice(text=visit.say("limit.over"), tone="bad")
        return _form(visit, goal=goal, notice=notice, error=over)
    return _signed_in(welcome, goal)


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


def _signed_in(welcome: Welcome, goal: str | None) -> Response:
    response = go_to(goal or AFTER_SIGN_IN)
    response.raw_headers.append((b"set-cookie", welcome.device_cookie))
    return response


def _limit(visit: Visit, halted: Halted, *, goal: str | None, again: bool = False) -> Response:
    """The sessions that fill the limit, to choose from; the oldest are ticked, as many as have to give way."""
    rows = [
        LimitRow(
            sid=each.sid,
            device=device_text(each.user_agent, visit.language),
            network=each.network or visit.say("network.unknown"),
            created=moment(each.created_at, visit.language),
            seen=moment(each.last_seen_at, visit.language),
            is_ticked=number <= halted.surplus,
        )
        for number, each in enumerate(halted.filling, start=1)
    ]
    response = show(
        visit,
        "sign_in_limit.html",
        error=halted,
        notice=Notice(text=visit.say("limit.again"), tone="bad") if again else None,
        text=visit.say("limit.ask" if halted.ask else "limit.refused"),
        rows=rows,
        surplus=halted.surplus,
        ticked=TICKED,
        word=halted.continue_with,
        goal=goal or "",
    )
    response.raw_headers.append(continue_cookie(visit.service, halted))
    return response


def _form(
    visit: Visit,
    *,
    goal: str | None,
    notice: Notice | None,
    name: str = "",
    error: InvalidCredentials | LoginRequired | Throttled | None = None,
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
        ended_from=None if end is None else end.network,
        refused_minutes=_minutes_refused(visit),
    )


def _minutes_refused(visit: Visit) -> int | None:
    until = _refused_until(visit.session)
    if until is None:
        return None
    return max(1, math.ceil((until - visit.service.system.now_us() / SECOND_US) / 60))
