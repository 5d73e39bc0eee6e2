"""The page that asks for the password once more.

Decides what somebody is told who holds the cookie of a session and has not proven yet that it is his: that it was used
elsewhere, and where (`notices.py`); never whose session it is. The proof itself is `step_up.py`, the same for pages and
API.
"""

from __future__ import annotations

import logging
from typing import Final

from starlette.responses import Response

from coatcheck.errors import CoatcheckError, InvalidCredentials, StoreUnavailable, Throttled
from coatcheck.server.forms import read_form
from coatcheck.server.notices import Refusal, refusals_of
from coatcheck.server.rendering import Notice, Visit, explain, go_to, moment, show
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.step_up import step_up

log = logging.getLogger("coatcheck.server")

CONFIRM: Final = "/login/confirm"
_SIGN_IN: Final = "/login"
_AFTERWARDS: Final = "/account"


async def show_confirm(visit: Visit) -> Response:
    """The form; who is not signed in is sent to do that."""
    if visit.session.wants_proof_of is None and not visit.session.is_signed_in:
        return go_to(_SIGN_IN)
    return await confirm(visit, goal=parse_return_path(visit.request.query_params.get("next")))


async def do_confirm(visit: Visit) -> Response:
    """Check the password and go on; a refusal shows the form again."""
    form = await read_form(visit.request)
    goal = parse_return_path(form.get("next"))
    try:
        await step_up(visit.service, visit.session, visit.caller, password=form.get("password", ""))
    except InvalidCredentials as wrong:
        if visit.session.wants_proof_of is None and not visit.session.is_signed_in:
            # The account was disabled meanwhile, and the session is over.
            return go_to(_SIGN_IN)
        return await confirm(visit, goal=goal, refused=visit.say("confirm.wrong"), error=wrong)
    except Throttled as wait:
        return await confirm(visit, goal=goal, refused=explain(visit, wait), error=wait)
    return go_to(goal or _AFTERWARDS)


async def confirm(
    visit: Visit, *, goal: str | None, refused: str | None = None, error: CoatcheckError | None = None
) -> Response:
    """The page for a session that wants a proof, or for somebody signed in."""
    subject = visit.session.wants_proof_of
    refusals: list[Refusal] = []
    key = "confirm.again"
    if subject is not None:
        refusals = await _refusals(visit, subject)
        key = "confirm.refused" if refusals else "confirm.elsewhere"
    return show(
        visit,
        "confirm.html",
        error=error,
        notice=None if refused is None else Notice(text=refused, tone="bad"),
        text=visit.say(key),
        refusals=[(moment(each.at, visit.language), each.place) for each in refusals],
        goal=goal or "",
    )


async def _refusals(visit: Visit, subject: str) -> list[Refusal]:
    try:
        return await refusals_of(
            visit.service, subject, visit.caller.sid, address=visit.caller.address, language=visit.language
        )
    except StoreUnavailable as lost:
        # Whoever can prove himself must not be kept out because the log cannot be read.
        log.warning("where a session was refused cannot be told: %s", lost.detail)
        return []
