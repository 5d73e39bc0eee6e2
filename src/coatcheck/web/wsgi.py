"""WSGI middleware: sessions for Flask, Django and any other WSGI application (PEP 3333).

Decides when the session is written: after the application has called `start_response` and before the first octet of
the body leaves, so that a view may still write while it builds its answer. It must never buffer the body.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, TypeAlias

from coatcheck.blocking import run_blocking
from coatcheck.errors import CoatcheckError, StoreUnavailable
from coatcheck.manager import Coatcheck
from coatcheck.session import Session
from coatcheck.web.exchange import Exchange, is_excluded
from coatcheck.web.problems import ProblemAnswer, is_answer, problem

log = logging.getLogger("coatcheck")

Environ: TypeAlias = dict[str, Any]
ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
Write: TypeAlias = Callable[[bytes], object]
StartResponse: TypeAlias = Callable[..., Write]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]

SESSION_KEY: Final = "coatcheck.session"


class CoatcheckMiddleware:
    """Gives every request a session: `session_of(environ)`.

    `exclude` names paths that are left alone entirely. Unsafe requests from other sites are refused with 403.
    """

    def __init__(self, app: App, coat: Coatcheck, *, exclude: Iterable[str] = ()) -> None:
        self.app = app
        self.coat = coat
        self.exclude = tuple(exclude)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if is_excluded(environ.get("PATH_INFO", ""), self.exclude):
            return self.app(environ, start_response)
        exchange = Exchange(
            self.coat.engine,
            Session,
            headers=_headers(environ),
            method=environ.get("REQUEST_METHOD", "GET"),
            scheme=environ.get("wsgi.url_scheme", "http"),
            peer=environ.get("REMOTE_ADDR"),
        )
        if exchange.refused is not None:
            answer = problem(exchange.refused)
            start_response(_status(answer), _text(answer.headers))
            return _body(environ, answer)
        environ[SESSION_KEY] = exchange.session
        return _Response(self.app, exchange, environ, start_response).run()


def session_of(environ: Environ) -> Session:
    """The session of a WSGI environ. Raises: RuntimeError where the middleware is missing or the path excluded."""
    session = environ.get(SESSION_KEY)
    if session is None:
        raise RuntimeError(
            "no session here: app.wsgi_app = coatcheck.web.wsgi.CoatcheckMiddleware(app.wsgi_app, coat), "
            "and do not list this path under exclude="
        )
    found: Session = session
    return found


class _Response:
    """The response of one request: holds back the head until the session is written."""

    def __init__(self, app: App, exchange: Exchange[Session], environ: Environ, start_response: StartResponse) -> None:
        self._app = app
        self._exchange = exchange
        self._environ = environ
        self._start_response = start_response
        self._head: tuple[str, list[tuple[str, str]], ExcInfo | None] | None = None
        self._write: Write | None = None

    def run(self) -> Iterator[bytes]:
        """The body. The application is called at the first step, its head is sent before its first octet."""
        body: Iterable[bytes] = ()
        try:
            try:
                body = self._app(self._environ, self._start)
                for chunk in body:
                    # An empty chunk does not start the response (PEP 3333), so the session stays open.
                    if chunk:
                        self._begin()
                    yield chunk
                self._begin()
            except CoatcheckError as error:
                if self._write is not None or not is_answer(error):
                    raise
                yield from self._replace(error)
        finally:
            try:
                close = getattr(body, "close", None)
                if close is not None:
                    close()
            finally:
                if self._write is None:
                    run_blocking(self._exchange.abandon())

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None) -> Write:
        if self._write is not None and exc_info is not None and exc_info[1] is not None:
            raise exc_info[1].with_traceback(exc_info[2])
        self._head = (status, headers, exc_info)
        return self._legacy_write

    def _legacy_write(self, data: bytes) -> object:
        return self._begin()(data)

    def _begin(self) -> Write:
        if self._write is None:
            if self._head is None:
                raise RuntimeError("the application returned a body before it called start_response")
            status, headers, exc_info = self._head
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            added = run_blocking(self._exchange.finish(int(status[:3]), raw))
            more = () if exc_info is None else (exc_info,)
            self._write = self._start_response(status, headers + _text(added), *more)
        return self._write

    def _replace(self, error: CoatcheckError) -> Iterable[bytes]:
        if isinstance(error, StoreUnavailable):
            self._exchange.engine.publish_kind("store.unavailable")
            log.warning("coatcheck: %s", error.detail)
        answer = problem(error)
        answer.headers.extend(
            header for header in self._exchange.finish_without_fields() if header[0] != b"cache-control"
        )
        self._write = self._start_response(_status(answer), _text(answer.headers))
        return _body(self._environ, answer)


def _headers(environ: Environ) -> Iterator[tuple[bytes, bytes]]:
    for key, name in _WANTED:
        value = environ.get(key)
        if value is not None:
            yield name, value.encode("latin-1", "replace")


# WSGI servers join repeated headers by a comma, or drop all but one; a joined Sec-Fetch-Site or Origin matches nothing.
_WANTED: Final = (
    ("HTTP_COOKIE", b"cookie"),
    ("HTTP_AUTHORIZATION", b"authorization"),
    ("HTTP_ORIGIN", b"origin"),
    ("HTTP_SEC_FETCH_SITE", b"sec-fetch-site"),
    ("HTTP_HOST", b"host"),
    ("HTTP_X_FORWARDED_FOR", b"x-forwarded-for"),
    ("HTTP_USER_AGENT", b"user-agent"),
)


def _text(headers: list[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    return [(name.decode("latin-1").title(), value.decode("latin-1")) for name, value in headers]


def _status(answer: ProblemAnswer) -> str:
    return f"{answer.status} {HTTPStatus(answer.status).phrase}"


def _body(environ: Environ, answer: ProblemAnswer) -> list[bytes]:
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]
