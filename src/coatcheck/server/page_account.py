"""The page of one's own account: where one is signed in, what happened lately, ending sessions, the password.

Decides what is shown of a session (never an id) and that every change ends in a redirect, so that a reload repeats
nothing. What was done is kept in the session until the next look, because an address that carries it could be sent
to somebody by anybody.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from starlette.responses import Response

from coatcheck.errors import (
    CoatcheckError,
    InvalidCredentials,
    NotFound,
    PasswordUnacceptable,
    StoreUnavailable,
    Throttled,
)
from coatcheck.manager import SessionSummary
from coatcheck.server.api import REASON_BY_USER, end_own_session, own_sessions
from coatcheck.server.forms import read_form
from coatcheck.server.notices import Told, told_to_owner
from coatcheck.server.page_set_up import password_text
from coatcheck.server.page_sign_in import signed_out
from coatcheck.server.rendering import Moment, Notice, Visit, device_text, explain, go_to, moment, show
from coatcheck.server.sign_in import change_password
from coatcheck.session import Principal

log = logging.getLogger("coatcheck.server")

ACCOUNT: Final = "/account"
DONE: Final = "done"
"""The session field that holds what was just done: how many sessions ended, or that the password was changed."""

_PASSWORD_CHANGED: Final = "password"  # noqa: S105 - a word for what was done


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionRow:
    """One session as the table shows it."""

    sid: str
    device: str
    network: str
    created: Moment
    seen: Moment
    is_current: bool


async def show_account(visit: Visit) -> Response:
    """The page, with what was just done."""
    visit.session.require_login()
    return await _page(visit, notice=_take_done(visit))


async def end_one(visit: Visit) -> Response:
    """End one of one's own sessions; the present one is a sign-out."""
    principal = visit.session.require_login()
    sid = (await read_form(visit.request)).get("sid", "")
    try:
        ended = await end_own_session(visit.service, visit.session, sid)
    except NotFound as gone:
        # Somebody else's, an invented one, or one that ended a moment ago: the answer is the same.
        notice = Notice(text=visit.say("done.already_ended"), tone="bad")
        return await _page(visit, notice=notice, error=gone)
    if sid == principal.sid:
        return signed_out(visit)
    visit.session[DONE] = ended
    return go_to(ACCOUNT)


async def end_others(visit: Visit) -> Response:
    """End every session but this one."""
    principal = visit.session.require_login()
    await read_form(visit.request)
    done = await visit.service.coat.revoke_subject(principal.subject, reason=REASON_BY_USER, keep_sid=principal.sid)
    visit.session[DONE] = done.ended
    return go_to(ACCOUNT)


async def new_password(visit: Visit) -> Response:
    """Change the password; a refusal shows the page again, with the reason beside the form."""
    visit.session.require_login()
    form = await read_form(visit.request)
    wanted = form.get("new", "")
    if wanted != form.get("again", ""):
        return await _refused(visit, visit.say("password.differ"), PasswordUnacceptable("differ"))
    try:
        await change_password(visit.service, visit.session, visit.caller, current=form.get("current", ""), new=wanted)
    except InvalidCredentials as wrong:
        return await _refused(visit, visit.say("password.wrong_current"), wrong)
    except PasswordUnacceptable as refused:
        return await _refused(visit, password_text(visit, refused), refused)
    except Throttled as wait:
        return await _refused(visit, explain(visit, wait), wait)
    visit.session[DONE] = _PASSWORD_CHANGED
    return go_to(ACCOUNT)


async def _refused(visit: Visit, text: str, error: CoatcheckError) -> Response:
    return await _page(visit, password_notice=Notice(text=text, tone="bad"), error=error)


async def _page(
    visit: Visit,
    *,
    notice: Notice | None = None,
    password_notice: Notice | None = None,
    error: CoatcheckError | None = None,
) -> Response:
    principal = visit.session.require_login()
    rows = [_row(visit, each, principal) for each in await own_sessions(visit.service, principal)]
    rows.sort(key=lambda row: (row.is_current, row.seen.machine), reverse=True)
    told = await _told(visit, principal)
    return show(
        visit,
        "account.html",
        error=error,
        notice=notice,
        password_notice=password_notice,
        rows=rows,
        told=None if told is None else [(moment(each.at, visit.language), each.text) for each in told],
        minimum=visit.service.passwords.minimum,
    )


async def _told(visit: Visit, principal: Principal) -> list[Told] | None:
    """What its owner is told; None while the log cannot be read, which is no reason to hide the sessions."""
    try:
        return await told_to_owner(visit.service, principal.subject, visit.language)
    except StoreUnavailable as lost:
        log.warning("what happened on an account cannot be told: %s", lost.detail)
        return None


def _row(visit: Visit, each: SessionSummary, principal: Principal) -> SessionRow:
    return SessionRow(
        sid=each.sid,
        device=device_text(each.user_agent, visit.language),
        network=each.network or visit.say("network.unknown"),
        created=moment(each.created_at, visit.language),
        seen=moment(each.last_seen_at, visit.language),
        is_current=each.sid == principal.sid,
    )


def _take_done(visit: Visit) -> Notice | None:
    found = visit.session.pop(DONE, None)
    if found == _PASSWORD_CHANGED:
        return Notice(text=visit.say("done.password"), tone="good")
    if isinstance(found, int):
        key = {0: "done.ended_none", 1: "done.ended"}.get(found, "done.ended_many")
        return Notice(text=visit.say(key, count=found), tone="good")
    return None
