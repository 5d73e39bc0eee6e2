"""The page behind the set-up link, where the first administrator is made.

Decides the order: the link is looked at, name and password are judged, the password is hashed, and only then is the
link spent and the account made, each in one statement; so a typing mistake costs no link, and of any number of people
with the link exactly one gets in. A link that does not work answers like a page that does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from coatcheck.core.cookie import render_set_cookie
from coatcheck.core.device import device_of
from coatcheck.core.names import MAX_NAME_CHARACTERS, UserName, parse_user_name
from coatcheck.core.passwords import Password
from coatcheck.core.session import SECOND_US
from coatcheck.errors import NotFound, PasswordUnacceptable
from coatcheck.server.accounts import User
from coatcheck.server.audit import account_created
from coatcheck.server.forms import read_form
from coatcheck.server.rendering import Visit, go_to, show
from coatcheck.server.sign_in import acceptable_password, first_tokens, new_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """Why the form cannot be taken: a text beside the name or beside the password, and what stood in the field."""

    name: str = ""
    name_text: str | None = None
    password_text: str | None = None


async def show_set_up(visit: Visit) -> Response:
    """The form, while the link works."""
    if not await visit.service.set_up.peek(visit.request.path_params["token"]):
        return _gone(visit)
    return _form(visit, Wrong())


async def do_set_up(visit: Visit) -> Response:
    """Make the first administrator, sign him in and show his account."""
    service = visit.service
    token = visit.request.path_params["token"]
    form = await read_form(visit.request)
    # Before anything is hashed: otherwise everybody could keep the processor busy with an invented link.
    if not await service.set_up.peek(token):
        return _gone(visit)
    judged = await _judge(visit, form.get("username", ""), form.get("password", ""), form.get("again", ""))
    if isinstance(judged, Wrong):
        return _form(visit, judged)
    name, password = judged
    stored = await service.hasher.hash(password, known_device=True)
    if not await service.set_up.consume(token):
        return _gone(visit)
    made = await service.accounts.create_first_administrator(name, password_hash=stored)
    if not isinstance(made, User):
        return _gone(visit)
    at = service.system.now_us() / SECOND_US
    service.coat.engine.publish(account_created(made, at=at, by="set_up"))
    # Whatever cookie this browser had, of another installation: its session belongs to the one that it gets now.
    device = new_device(service, made)
    await visit.session.login(
        made.id, claims={"name": made.name, "role": made.role}, amr=("pwd",), device=device_of(device)
    )
    await first_tokens(service, visit.session)
    response = go_to("/account")
    response.raw_headers.append((b"set-cookie", render_set_cookie(service.device_cookie, device)))
    return response


async def _judge(visit: Visit, typed: str, password: str, again: str) -> tuple[UserName, Password] | Wrong:
    service = visit.service
    named = parse_user_name(typed)
    shown = typed[:MAX_NAME_CHARACTERS]
    if not isinstance(named, UserName):
        return Wrong(name=shown, name_text=visit.say(f"name.{named.reason}"))
    if await service.accounts.find_by_name(named) is not None:
        # Made on the command line before; found out now, the link is still good.
        return Wrong(name=shown, name_text=visit.say("name.taken"))
    try:
        wanted = acceptable_password(service, password, names=(named.shown,))
    except PasswordUnacceptable as refused:
        return Wrong(name=shown, password_text=password_text(visit, refused))
    if password != again:
        return Wrong(name=shown, password_text=visit.say("password.differ"))
    return named, wanted


def password_text(visit: Visit, refused: PasswordUnacceptable) -> str:
    """Which rule a new password breaks, for the person who chose it (NIST SP 800-63B-4 s3.1.1)."""
    policy = visit.service.passwords
    return visit.say(f"password.{refused.reason}", minimum=policy.minimum, maximum=policy.maximum)


def _form(visit: Visit, wrong: Wrong) -> Response:
    fine = wrong.name_text is None and wrong.password_text is None
    return show(
        visit,
        "set_up.html",
        status=200 if fine else PasswordUnacceptable.status,
        wrong=wrong,
        minimum=visit.service.passwords.minimum,
    )


def _gone(visit: Visit) -> Response:
    return show(visit, "set_up_gone.html", status=NotFound.status)
