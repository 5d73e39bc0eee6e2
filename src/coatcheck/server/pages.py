"""The pages, and which addresses have one. They work without JavaScript: forms, POST, redirect.

Decides the start page and who is sent a page at all. Each other page has its own file.
"""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from coatcheck.server.negotiation import preferences, quality_of
from coatcheck.server.page_account import end_one, end_others, new_password, show_account
from coatcheck.server.page_set_up import do_set_up, show_set_up
from coatcheck.server.page_sign_in import SIGN_IN, do_continue, do_sign_in, do_sign_out, show_sign_in, wants_more
from coatcheck.server.page_step_up import CONFIRM, do_confirm, show_confirm
from coatcheck.server.page_take_up import TAKE_UP, do_take_up, or_take_up
from coatcheck.server.rendering import STATIC, Visit, go_to, moment, page, show
from coatcheck.server.service import Service
from coatcheck.server.static_files import static_route
from coatcheck.server.texts import say_reason

SET_UP_FILE: Final = "setup-link"
"""Where `serve` leaves the set-up link when it has no terminal, below its home directory."""

_FOR_PROGRAMS: Final = ("/api", "/openapi.json", "/health", "/metrics", "/static", "/.well-known", "/revocations")


def page_routes(service: Service) -> list[BaseRoute]:
    """Every page."""
    return [
        Route("/", page(service, or_take_up(show_start)), methods=["GET"]),
        Route("/login", page(service, or_take_up(show_sign_in)), methods=["GET"]),
        Route("/login", page(service, do_sign_in), methods=["POST"]),
        Route(CONFIRM, page(service, show_confirm), methods=["GET"]),
        Route(CONFIRM, page(service, do_confirm), methods=["POST"]),
        Route(TAKE_UP, page(service, do_take_up), methods=["POST"]),
        Route("/login/continue", page(service, do_continue), methods=["POST"]),
        Route("/logout", page(service, do_sign_out, loads=False), methods=["POST"]),
        Route("/setup/{token}", page(service, show_set_up), methods=["GET"]),
        Route("/setup/{token}", page(service, do_set_up), methods=["POST"]),
        Route("/account", page(service, show_account), methods=["GET"]),
        Route("/account/sessions/end", page(service, end_one), methods=["POST"]),
        Route("/account/sessions/end-others", page(service, end_others), methods=["POST"]),
        Route("/account/password", page(service, new_password), methods=["POST"]),
        static_route(STATIC),
    ]


def wants_page(request: Request) -> bool:
    """Whether an error should be a page: a browser asks, and not at an address for programs."""
    path = request.scope["path"]
    if any(path == each or path.startswith(f"{each}/") for each in _FOR_PROGRAMS):
        return False
    wanted = preferences(request.headers.get("accept"))
    for_page = quality_of(wanted, "text/html")
    return for_page > max(quality_of(wanted, "application/problem+json"), quality_of(wanted, "application/json"))


async def show_start(visit: Visit) -> Response:
    """Who you are; before there is anybody, where the set-up link is. A session that asks for more is asked there."""
    if wants_more(visit.session):
        return go_to(SIGN_IN)
    principal = visit.session.principal
    if principal is None and not await visit.service.accounts.has_administrator():
        return show(visit, "unready.html", file=SET_UP_FILE)
    end = visit.session.ended
    return show(
        visit,
        "start.html",
        is_admin=principal is not None and principal.claims.get("role") == "admin",
        ended=None if end is None else say_reason(end.reason, visit.language),
        ended_at=None if end is None else moment(end.at, visit.language),
        ended_from=None if end is None else end.network,
    )
