"""Every refusal in the caller's language and form: a page for a browser, a problem document for a program.

The outermost place that sees answers, so it holds for what the session middleware refuses, for what an endpoint
raises and for what no route takes alike. Decides that a browser without a session is sent to sign in, and one whose
session wants a proof to give it, and that a crash tells the client nothing. It must never change a status, a cookie or
a Retry-After.
"""

from __future__ import annotations

import logging
from typing import Final
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from coatcheck.errors import CoatcheckError, LoginRequired, PlaceRefused, SessionEnded, StepUpRequired
from coatcheck.server.page_sign_in import SIGN_IN
from coatcheck.server.page_step_up import CONFIRM
from coatcheck.server.pages import wants_page
from coatcheck.server.rendering import go_to, render
from coatcheck.server.return_path import parse_return_path
from coatcheck.server.service import Service
from coatcheck.server.texts import Language, language_of, say, say_problem
from coatcheck.web.asgi import App, Message, Receive, Scope, Send
from coatcheck.web.problems import problem

log = logging.getLogger("coatcheck.server")

_PROBLEM: Final = b"application/problem+json"
_OF_THE_BODY: Final = frozenset({b"content-type", b"content-length", b"cache-control"})
_SIGN_IN: Final = frozenset({LoginRequired.code, SessionEnded.code, PlaceRefused.code, StepUpRequired.code})


class ErrorAnswers:
    """ASGI middleware that rewrites problem documents and answers crashes."""

    def __init__(self, app: App, *, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(self._service, scope, receive, send)
        try:
            await self.app(scope, receive, answer.send)
        except Exception as crash:
            if answer.begun:
                raise
            log.error("%s failed", scope.get("method"), exc_info=crash)
            found = problem(CoatcheckError("unexpected"))
            await answer.send({"type": "http.response.start", "status": found.status, "headers": found.headers})
            await answer.send({"type": "http.response.body", "body": found.body})


class _Answer:
    """The send side of one request: holds a problem document back until it is whole."""

    def __init__(self, service: Service, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun = False
        self._service = service
        self._scope = scope
        self._receive = receive
        self._send = send
        self._held: Message | None = None
        self._body = b""

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_problem(message):
            self._held = message
            return
        if self._held is None:
            self.begun = True
            await self._send(message)
            return
        self._body += message.get("body", b"")
        if not message.get("more_body", False):
            held, self._held = self._held, None
            self.begun = True
            await self._rewrite(held)

    async def _rewrite(self, held: Message) -> None:
        request = Request(self._scope)
        language = language_of(request.headers.get("accept-language"))
        if self._scope["method"] == "HEAD":
            await self._pass(held, self._body)
            return
        members: dict[str, object] = msgspec.json.decode(self._body)
        code = str(members.get("code", ""))
        if not wants_page(request):
            members["title"] = say_problem(code, language)
            await self._pass(held, msgspec.json.encode(members))
            return
        response = self._page(request, code, held["status"], language)
        left = _OF_THE_BODY | {b"www-authenticate"} if response.status_code == 303 else _OF_THE_BODY
        response.raw_headers.extend(header for header in held["headers"] if header[0].lower() not in left)
        await response(self._scope, self._receive, self._send)

    async def _pass(self, held: Message, body: bytes) -> None:
        headers = [header for header in held["headers"] if header[0].lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode("ascii")))
        await self._send({**held, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _page(self, request: Request, code: str, status: int, language: Language) -> Response:
        if code in _SIGN_IN:
            return go_to(_sign_in_address(request, CONFIRM if code == StepUpRequired.code else SIGN_IN))
        not_kept = request.scope["path"] == "/logout" and status == 503
        return render(
            self._service,
            language,
            "problem.html",
            status=status,
            who=None,
            heading=say_problem(code, language),
            text=say("sign_in.not_kept", language) if not_kept else None,
        )


def _sign_in_address(request: Request, page: str) -> str:
    if request.method != "GET":
        return page
    query = request.scope.get("query_string", b"").decode("latin-1")
    goal = parse_return_path(request.scope["path"] + (f"?{query}" if query else ""))
    return page if goal is None else f"{page}?next={quote(goal, safe='/')}"


def _is_problem(message: Message) -> bool:
    return any(name.lower() == b"content-type" and value == _PROBLEM for name, value in message.get("headers", ()))
