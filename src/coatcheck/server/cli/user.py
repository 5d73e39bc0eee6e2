"""`coatcheck user`: people who may sign in.

Decides the order of what belongs together: first nobody can sign in any more, then the sessions end, so that none is
made in between. A password is read from the terminal or from standard input, never from an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import Failed, Refused, emit, json_option, moment, table, talk

if TYPE_CHECKING:
    from coatcheck.events import Event
    from coatcheck.server.accounts import Role, User
    from coatcheck.server.service import Service
    from coatcheck.server.settings import ServerSettings

_MAX_PASSWORD_OCTETS: Final = 16 * 1024
_SECOND_US: Final = 1_000_000

_password_flag = click.option(
    "--password-stdin", is_flag=True, help="Read the password from standard input instead of asking for it."
)


@click.group()
def user() -> None:
    """Add, list, disable and unlock people."""


@user.command(
    epilog="""\b
Examples:
  coatcheck user add minsu --role admin
  pass show coatcheck/minsu | coatcheck user add minsu --password-stdin"""
)
@click.argument("name")
@click.option("--role", type=click.Choice(("admin", "user")), default="user", show_default=True)
@_password_flag
@setting_flags(*WHERE)
@json_option
def add(name: str, role: Role, password_stdin: bool, as_json: bool, **flags: Any) -> None:
    """Add somebody who may sign in."""
    from coatcheck.server.cli.work import name_of, run

    settings = gathered(flags).settings
    name_of(name)
    password = _read_password(from_stdin=password_stdin)
    made = run(_add(settings, name, role, password))
    emit({"user": facts(made)}, f"added {made.name} ({made.role})", as_json=as_json)


@user.command("list")
@setting_flags(*WHERE)
@json_option
def list_(as_json: bool, **flags: Any) -> None:
    """List everybody."""
    from coatcheck.server.cli.work import run

    users = run(_list(gathered(flags).settings))
    emit(
        {"users": [facts(each) for each in users]},
        *table(
            ("NAME", "ROLE", "STATE", "FAILURES", "CREATED", "ID"),
            [
                (
                    each.name,
                    each.role,
                    "disabled" if each.is_disabled else "active",
                    str(each.failures),
                    moment(each.created_us / _SECOND_US),
                    each.id,
                )
                for each in users
            ],
        ),
        as_json=as_json,
    )
    if not users:
        talk("nobody yet: open the set-up link that `coatcheck serve` prints, or use `coatcheck user add`")


@user.command()
@click.argument("name")
@setting_flags(*WHERE)
@json_option
def disable(name: str, as_json: bool, **flags: Any) -> None:
    """Let somebody sign in no more, and end all their sessions."""
    from coatcheck.server.cli.work import run

    changed, ended = run(_disable(gathered(flags).settings, name))
    emit(
        {"user": facts(changed), "ended": ended},
        f"disabled {changed.name}; {_sessions(ended)} ended",
        as_json=as_json,
    )


@user.command()
@click.argument("name")
@setting_flags(*WHERE)
@json_option
def enable(name: str, as_json: bool, **flags: Any) -> None:
    """Let somebody who was disabled sign in again."""
    from coatcheck.server.audit import account_enabled
    from coatcheck.server.cli.work import run

    changed = run(_change(gathered(flags).settings, name, lambda service: service.accounts.enable, account_enabled))
    emit({"user": facts(changed)}, f"enabled {changed.name}", as_json=as_json)


@user.command()
@click.argument("name")
@setting_flags(*WHERE)
@json_option
def unlock(name: str, as_json: bool, **flags: Any) -> None:
    """Forget somebody's failed sign-ins, after too many of them in a row, and what a rule refused for them."""
    from coatcheck.server.audit import account_unlocked
    from coatcheck.server.cli.work import run

    settings = gathered(flags).settings
    changed = run(_change(settings, name, _unlocking, account_unlocked))
    emit({"user": facts(changed)}, f"unlocked {changed.name}", as_json=as_json)


@user.command()
@click.argument("name")
@_password_flag
@setting_flags(*WHERE)
@json_option
def password(name: str, password_stdin: bool, as_json: bool, **flags: Any) -> None:
    """Give somebody a new password, and end all their sessions."""
    from coatcheck.server.cli.work import name_of, run

    settings = gathered(flags).settings
    name_of(name)
    changed, ended = run(_password(settings, name, _read_password(from_stdin=password_stdin)))
    emit(
        {"user": facts(changed), "ended": ended},
        f"{changed.name} has a new password; {_sessions(ended)} ended",
        as_json=as_json,
    )


def facts(user: User) -> dict[str, object]:
    """What JSON tells of an account; times are Unix seconds."""
    return {
        "id": user.id,
        "name": user.name,
        "role": user.role,
        "disabled": user.is_disabled,
        "failures": user.failures,
        "created_at": user.created_us / _SECOND_US,
        "password_changed_at": _seconds(user.password_changed_us),
        "disabled_at": _seconds(user.disabled_us),
    }


async def _add(settings: ServerSettings, typed: str, role: Role, password: str) -> User:
    from coatcheck.server.accounts import NameTaken
    from coatcheck.server.audit import account_created
    from coatcheck.server.cli.work import name_of, working

    async with working(settings, passwords=True, make=True) as service:
        name = name_of(typed)
        stored = await service.hasher.hash(_acceptable(service, password, name.shown))
        made = await service.accounts.create_user(name, role=role, password_hash=stored)
        if isinstance(made, NameTaken):
            raise Failed(f"somebody has the name {name.shown} already, or one that reads the same")
        service.coat.engine.publish(account_created(made, at=_now(service), by="command_line"))
        return made


async def _list(settings: ServerSettings) -> list[User]:
    from coatcheck.server.accounts import MAX_LISTED
    from coatcheck.server.cli.work import working

    users: list[User] = []
    async with working(settings) as service:
        while page := await service.accounts.list_users(after=users[-1].name_key if users else None, limit=MAX_LISTED):
            users += page
    return users


async def _disable(settings: ServerSettings, typed: str) -> tuple[User, int]:
    from coatcheck.server.audit import account_disabled
    from coatcheck.server.cli.work import user_of, working
    from coatcheck.server.sign_in import REASON_DISABLED

    async with working(settings, sessions=True) as service:
        changed = _still_there(await service.accounts.disable((await user_of(service, typed)).id))
        service.coat.engine.publish(account_disabled(changed, at=_now(service)))
        done = await service.coat.revoke_subject(changed.id, reason=REASON_DISABLED)
        return changed, done.ended


async def _password(settings: ServerSettings, typed: str, password: str) -> tuple[User, int]:
    from coatcheck.server.audit import password_changed
    from coatcheck.server.cli.work import user_of, working
    from coatcheck.server.sign_in import REASON_PASSWORD

    async with working(settings, sessions=True, passwords=True) as service:
        found = await user_of(service, typed)
        stored = await service.hasher.hash(_acceptable(service, password, found.name))
        changed = _still_there(await service.accounts.set_password(found.id, stored))
        service.coat.engine.publish(password_changed(changed, at=_now(service)))
        done = await service.coat.revoke_subject(changed.id, reason=REASON_PASSWORD)
        return changed, done.ended


async def _change(
    settings: ServerSettings, typed: str, verb: Callable[[Service], Any], told: Callable[..., Event]
) -> User:
    from coatcheck.server.cli.work import user_of, working

    async with working(settings) as service:
        changed = _still_there(await verb(service)((await user_of(service, typed)).id))
        await service.audit.append([told(changed, at=_now(service))])
        return changed


def _unlocking(service: Service) -> Callable[[str], Awaitable[User | None]]:
    async def unlock(user_id: str) -> User | None:
        await service.risk.lift(user_id)
        return await service.accounts.clear_failures(user_id)

    return unlock


def _still_there(user: User | None) -> User:
    if user is None:
        raise Failed("the account was removed meanwhile")
    return user


def _acceptable(service: Service, typed: str, name: str) -> Any:
    from coatcheck.errors import PasswordUnacceptable
    from coatcheck.server.sign_in import acceptable_password
    from coatcheck.server.texts import say

    policy = service.passwords
    try:
        return acceptable_password(service, typed, names=(name,))
    except PasswordUnacceptable as refused:
        text = say(f"password.{refused.reason}", "en", minimum=policy.minimum, maximum=policy.maximum)
        raise Refused(text) from refused


def _read_password(*, from_stdin: bool) -> str:
    """The new password. Raises: Refused."""
    if from_stdin:
        given = sys.stdin.buffer.read(_MAX_PASSWORD_OCTETS + 1)
        if len(given) > _MAX_PASSWORD_OCTETS:
            raise Refused("the password on standard input is too long")
        try:
            # One line end is from `echo` or an editor; any other belongs to no password that can be typed.
            text = given.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as broken:
            raise Refused("the password on standard input is not UTF-8") from broken
        if not text or "\n" in text:
            raise Refused("standard input must hold the password and nothing else, on one line")
        return text
    if not sys.stdin.isatty():
        raise Refused("there is no terminal to ask for a password on; send it with --password-stdin")
    asked: str = click.prompt("Password", hide_input=True, confirmation_prompt="Once more", err=True)
    return asked


def _sessions(count: int) -> str:
    return f"{count} session{'' if count == 1 else 's'}"


def _seconds(microseconds: int | None) -> float | None:
    return None if microseconds is None else microseconds / _SECOND_US


def _now(service: Service) -> float:
    return service.system.now_us() / _SECOND_US
