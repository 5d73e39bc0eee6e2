"""From values to a page: templates, language, the headers every page has.

Decides that everything is escaped (nothing on a page comes from a template string), that a value a template lacks is
an error and not an empty place, and that no page is kept by any cache. For the back button `no-store` alone is not
enough any more: `static/back.js` and the sign-out page (`page_sign_in.py`) do the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import Response

from coatcheck.core.user_agent import read_device
from coatcheck.errors import CoatcheckError, SignInBlocked, StoreUnavailable, Throttled
from coatcheck.server.arrival import second_look
from coatcheck.server.routes import caller_of, exchange_of
from coatcheck.server.service import Service
from coatcheck.server.sign_in import Caller
from coatcheck.server.static_files import load_static_files
from coatcheck.server.texts import Language, language_of, reasons, say, say_blocked, say_problem, say_wait
from coatcheck.session import AsyncSession

STATIC: Final = load_static_files()
_TEMPLATES: Final = Environment(
    loader=PackageLoader("coatcheck.server", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)

Tone: TypeAlias = Literal["good", "bad", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request for a page, its session loaded."""

    service: Service
    request: Request
    session: AsyncSession
    caller: Caller
    language: Language

    def say(self, key: str, **values: object) -> str:
        """A text in the visitor's language."""
        return say(key, self.language, **values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """A sentence on top of a page or a form."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A time as pages show it: `machine` for the attribute, `shown` for people. Always UTC."""

    machine: str
    shown: str


Handler: TypeAlias = Callable[[Visit], Awaitable[Response]]


def page(service: Service, handler: Handler, *, loads: bool = True) -> Callable[[Request], Awaitable[Response]]:
    """The Starlette endpoint of a page; the session is loaded before the handler runs, unless that does it itself.
    Whoever arrives without the cookie he may have is shown how to look again first (`arrival.py`)."""

    async def serve(request: Request) -> Response:
        exchange = exchange_of(request)
        language = language_of(request.headers.get("accept-language"))
        again = second_look(service, request)
        if again is not None:
            return render(service, language, "arrival.html", status=200, who=None, address=again)
        if loads:
            await exchange.session.load()
        return await handler(
            Visit(
                service=service,
                request=request,
                session=exchange.session,
                caller=caller_of(service, request),
                language=language,
            )
        )

    serve.__name__ = handler.__name__
    return serve


def show(
    visit: Visit, template: str, *, status: int = 200, error: CoatcheckError | None = None, **values: object
) -> Response:
    """A page for this visit. With `error` its status is the error's, and Retry-After is said where there is one."""
    principal = visit.session.principal
    response = render(
        visit.service,
        visit.language,
        template,
        status=status if error is None else error.status,
        who=None if principal is None else str(principal.claims.get("name", "")),
        **values,
    )
    if isinstance(error, StoreUnavailable | Throttled):
        response.headers["retry-after"] = str(error.retry_after)
    return response


def render(
    service: Service, language: Language, template: str, *, status: int, who: str | None, **values: object
) -> Response:
    """A page without a visit: what an error page can be sure of."""
    text = _TEMPLATES.get_template(template).render(
        t=partial(_say_to, language),
        language=language,
        site=service.settings.name,
        style=STATIC["coatcheck.css"].address,
        icon=STATIC["icon.svg"].address,
        back_script=STATIC["back.js"].address,
        session_script=None if service.coat.settings.tokens is None else STATIC["session.js"].address,
        reasons=reasons(language),
        who=who,
        **values,
    )
    headers = {"cache-control": "no-store", "content-language": language, "vary": "Accept-Language"}
    return Response(text, status_code=status, media_type="text/html", headers=headers)


def go_to(address: str) -> Response:
    """Send the browser on with a GET, so that a reload repeats nothing (POST, redirect, GET)."""
    return Response(status_code=303, headers={"location": address, "cache-control": "no-store"})


def explain(visit: Visit, error: CoatcheckError) -> str:
    """The sentence for an error beside a form."""
    if isinstance(error, SignInBlocked):
        # He has given the right password, perhaps at once: nobody tried too often.
        return say_blocked(error.retry_after, visit.language)
    if isinstance(error, Throttled):
        return say_wait(error.retry_after, visit.language)
    return say_problem(error.code, visit.language)


def moment(seconds: float, language: Language) -> Moment:
    """Unix seconds as pages show them."""
    at = datetime.fromtimestamp(int(seconds), UTC)
    machine = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    if language == "ko":
        return Moment(machine=machine, shown=f"{at.year}년 {at.month}월 {at.day}일 {at:%H:%M} UTC")
    # Not strftime's month: that one follows the machine's locale, not the reader's.
    return Moment(machine=machine, shown=f"{at.day} {_MONTHS[at.month - 1]} {at.year}, {at:%H:%M} UTC")


def device_text(user_agent: str, language: Language) -> str:
    """A browser and its system in the reader's language."""
    device = read_device(user_agent)
    if device.browser is not None and device.system is not None:
        return say("device.both", language, browser=device.browser, system=device.system)
    return device.browser or device.system or say("device.unknown", language)


def _say_to(language: Language, key: str, **values: object) -> str:
    return say(key, language, **values)


_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
