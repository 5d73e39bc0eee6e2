"""`coatcheck session`: who is signed in where, and ending it.

Decides that ending everybody's sessions needs a yes. It must never print a session id: lists show public handles.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import Refused, emit, json_option, moment, table, talk

if TYPE_CHECKING:
    from coatcheck.manager import SessionSummary
    from coatcheck.server.settings import ServerSettings

REASON: Final = "ended_by_administrator"
"""Recorded, and shown to whoever was signed in, unless a reason is given."""

_PAGE: Final = 200


@click.group()
def session() -> None:
    """List sessions and end them."""


@session.command("list")
@click.option("--user", "user_name", metavar="NAME", default=None, help="Only this account's.")
@click.option(
    "--limit", type=click.IntRange(1, 1_000_000), default=1000, show_default=True, help="At most so many sessions."
)
@setting_flags(*WHERE)
@json_option
def list_(user_name: str | None, limit: int, as_json: bool, **flags: Any) -> None:
    """List sessions that are alive."""
    from coatcheck.core.user_agent import device_name
    from coatcheck.server.cli.work import run

    found, names, more = run(_list(gathered(flags).settings, user_name, limit))
    emit(
        {"sessions": [_facts(each, names) for each in found], "more": more},
        *table(
            ("SID", "USER", "NETWORK", "DEVICE", "CREATED", "LAST SEEN", "EXPIRES"),
            [
                (
                    each.sid,
                    names.get(each.subject or "", each.subject or "-"),
                    each.network or "-",
                    device_name(each.user_agent),
                    moment(each.created_at),
                    moment(each.last_seen_at),
                    moment(each.expires_at),
                )
                for each in found
            ],
        ),
        as_json=as_json,
    )
    if more:
        talk(f"there are more than {limit}; --limit shows more of them")
    elif not found:
        talk("nobody is signed in" if user_name is None else f"{user_name} is not signed in")


@session.command(
    epilog="""\b
Examples:
  coatcheck session revoke --user minsu --reason "stolen laptop"
  coatcheck session revoke --all --yes"""
)
@click.argument("sid", required=False)
@click.option("--user", "user_name", metavar="NAME", default=None, help="All sessions of this account.")
@click.option("--all", "everybody", is_flag=True, help="All sessions of everybody.")
@click.option("--reason", metavar="TEXT", default=REASON, help="Recorded, and shown to whoever was signed in.")
@click.option("--yes", is_flag=True, help="Do not ask before --all.")
@setting_flags(*WHERE)
@json_option
def revoke(
    sid: str | None, user_name: str | None, everybody: bool, reason: str, yes: bool, as_json: bool, **flags: Any
) -> None:
    """End one session, all of one account, or all."""
    from coatcheck.core.session import check_reason
    from coatcheck.server.cli.work import run

    if [sid is not None, user_name is not None, everybody].count(True) != 1:
        raise click.UsageError("Give exactly one of SID, --user NAME and --all.")
    check_reason(reason)
    settings = gathered(flags).settings
    if everybody and not yes:
        if as_json or not sys.stdin.isatty():
            raise Refused("--all signs everybody out; say --yes as well")
        click.confirm("Sign everybody out?", abort=True, err=True)
    ended = run(_revoke(settings, sid, user_name, reason))
    emit({"ended": ended}, f"{ended} session{'' if ended == 1 else 's'} ended", as_json=as_json)


async def _list(
    settings: ServerSettings, user_name: str | None, limit: int
) -> tuple[list[SessionSummary], dict[str, str], bool]:
    from coatcheck.core.filter import SessionFilter
    from coatcheck.server.cli.work import user_of, working

    found: dict[str, SessionSummary] = {}
    names: dict[str, str] = {}
    async with working(settings, sessions=True) as service:
        subject = None if user_name is None else (await user_of(service, user_name)).id
        cursor: str | None = None
        while len(found) <= limit:
            page = await service.coat.find_sessions(SessionFilter(subject=subject), after=cursor, limit=_PAGE)
            # A walk may meet a session twice; its handle is listed once.
            found |= {each.sid: each for each in page.items}
            cursor = page.cursor
            if cursor is None:
                break
        shown = list(found.values())[:limit]
        for each in shown:
            if each.subject is not None and each.subject not in names:
                user = await service.accounts.get(each.subject)
                names[each.subject] = each.subject if user is None else user.name
    return shown, names, len(found) > limit


async def _revoke(settings: ServerSettings, sid: str | None, user_name: str | None, reason: str) -> int:
    from coatcheck.core.filter import SessionFilter
    from coatcheck.core.ids import parse_sid
    from coatcheck.server.cli.work import user_of, working

    async with working(settings, sessions=True) as service:
        if user_name is not None:
            subject = (await user_of(service, user_name)).id
            done = await service.coat.revoke_subject(subject, reason=reason)
        elif sid is None:
            done = await service.coat.revoke_where(SessionFilter(), reason=reason)
        else:
            # A mistyped handle must not look like a session that is safely gone.
            if parse_sid(service.coat.engine.keys, sid) is None:
                raise Refused(f"{sid} is no session of this store; `coatcheck session list` shows them")
            done = await service.coat.revoke_session(sid, reason=reason)
        return done.ended


def _facts(each: SessionSummary, names: dict[str, str]) -> dict[str, object]:
    return {
        "sid": each.sid,
        "subject": each.subject,
        "user": names.get(each.subject or ""),
        "network": each.network,
        "user_agent": each.user_agent,
        "created_at": each.created_at,
        "last_seen_at": each.last_seen_at,
        "expires_at": each.expires_at,
    }
