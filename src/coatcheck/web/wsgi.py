"""WSGI middleware: sessions for Flask, Django and any other WSGI application (PEP 3333).

Decides when the session is written: after the application has called `start_response` and before the first octet of
the body leaves, so that a view may still write while it builds its answer; and that a body without a length goes on
only while its session lives. It must never buffer the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from http import HTTPStatus
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeAlias

from coatcheck.blocking import run_blocking
from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import CoatcheckError, ConfigurationError
from coatcheck.manager import Coatcheck
from coatcheck.session import Session
from coatcheck.verifier import Verifier
from coatcheck.web.bearer import Bearer, VerifierGateway
from coatcheck.web.exchange import Exchange
from coatcheck.web.paths import is_excluded, outage_of, outage_paths
from coatcheck.web.problems import ProblemAnswer, is_answer, problem
from coatcheck.web.streams import Over, goes_on

Environ: TypeAlias = dict[str, Any]
ExcInfo: TypeAlias = tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None]
Write: TypeAlias = Callable[[bytes], object]
StartResponse: TypeAlias = Callable[..., Write]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]

SESSION_KEY: Final = "coatcheck.session"
"""Where the innermost session stands in an environ."""

BEARER_KEY: Final = "coatcheck.bearer"
"""Where the bearer stands in an environ, in a service that holds no store."""

_SESSIONS_KEY: Final = "coatcheck.sessions"


class CoatcheckMiddleware:
    """Gives every request a session: `session_of(environ)`.

    `exclude` names paths that are left alone entirely, `outage` paths for which the settings' word on a store that is
    away does not hold. Unsafe requests from other sites are refused with 403 before the application sees them. Errors
    that leave the application become problem documents; a framework that turns exceptions into answers by itself is
    given `problem_response`. The same `coat` twice around one application is
    one session, not two.

    A response without a length that goes on stops between two chunks when its session has ended, or when the store is
    away and the outage policy refuses.
    """

    def __init__(
        self,
        app: App,
        coat: Coatcheck,
        *,
        exclude: Iterable[str] = (),
        outage: Mapping[str, OutagePolicy] = MappingProxyType({}),
    ) -> None:
        if not isinstance(coat, Coatcheck):
            raise ConfigurationError("coat: a WSGI application needs a Coatcheck, AsyncCoatcheck is for ASGI")
        self.app: App = app
        self.coat: Coatcheck = coat
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.outage: tuple[tuple[str, OutagePolicy], ...] = outage_paths(outage, otherwise=coat.settings.outage)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if self.exclude and is_excluded(environ.get("PATH_INFO", ""), self.exclude):
            return self.app(environ, start_response)
        sessions: dict[int, Session] = environ.setdefault(_SESSIONS_KEY, {})
        if id(self.coat) in sessions:
            return self.app(environ, start_response)
        exchange = Exchange(
            self.coat.engine,
            Session,
            headers=_headers(environ),
            method=environ.get("REQUEST_METHOD", "GET"),
            scheme=environ.get("wsgi.url_scheme", "http"),
            peer=environ.get("REMOTE_ADDR"),
            outage=outage_of(environ.get("PATH_INFO", ""), self.outage) if self.outage else None,
        )
        if exchange.refused is not None:
            answer = problem(exchange.refused)
            start_response(_status(answer), _text(answer.headers))
            return _body(environ, answer)
        sessions[id(self.coat)] = environ[SESSION_KEY] = exchange.session
        return _Response(self.app, exchange, environ, start_response).run()


def session_of(environ: Environ, *, coat: Coatcheck | None = None) -> Session:
    """The session of a WSGI environ; `coat` tells which, where several surround one application.

    Raises: RuntimeError where the middleware is missing or the path excluded.
    """
    found: Session | None = environ.get(SESSION_KEY) if coat is None else environ.get(_SESSIONS_KEY, {}).get(id(coat))
    if found is None:
        raise RuntimeError(
            "no session here: app.wsgi_app = coatcheck.web.wsgi.CoatcheckMiddleware(app.wsgi_app, coat), "
            "and do not list this path under exclude="
        )
    return found


class VerifierMiddleware(VerifierGateway):
    """Lets requests with a good access token in, for a service that holds no store: `bearer_of(environ)`.

    `exclude` names paths that are left alone entirely, `sensitive` those that must not rest on an old list of
    revocations. With `optional` a request is let in whatever it carries, and the application asks. The first request
    starts the verifier; close it when the process ends.
    """

    def __init__(
        self,
        app: App,
        verifier: Verifier,
        *,
        optional: bool = False,
        exclude: Iterable[str] = (),
        sensitive: Iterable[str] = (),
    ) -> None:
        super().__init__(verifier, optional=optional, exclude=exclude, sensitive=sensitive)
        self.app: App = app

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request. An application that raises our errors itself uses `problem_response`."""
        path = environ.get("PATH_INFO", "")
        if self.leaves_alone(path):
            return self.app(environ, start_response)
        given = environ.get("HTTP_AUTHORIZATION")
        values = () if given is None else (given.encode("latin-1", "replace"),)
        bearer = environ[BEARER_KEY] = self.bearer(values)
        try:
            self.check(bearer, path)
        except CoatcheckError as error:
            return problem_response(error)(environ, start_response)
        return self.app(environ, start_response)


def bearer_of(environ: Environ) -> Bearer:
    """The bearer of a WSGI environ. Raises: RuntimeError where the middleware is missing or the path excluded."""
    bearer: Bearer | None = environ.get(BEARER_KEY)
    if bearer is None:
        raise RuntimeError(
            "no bearer here: wrap the application in coatcheck.web.wsgi.VerifierMiddleware, and do not list this path "
            "under exclude="
        )
    return bearer


def problem_response(error: CoatcheckError) -> App:
    """The answer for an error, as a WSGI application.

    For frameworks that answer exceptions themselves, so that a view may raise `LoginRequired` or `Forbidden`. Flask
    takes it as it is: `app.register_error_handler(CoatcheckError, problem_response)`. An error that is a mistake of
    the application is raised again, for the framework to log and to answer.
    """
    if not is_answer(error):
        raise error
    answer = problem(error)

    def respond(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response(_status(answer), _text(answer.headers))
        return _body(environ, answer)

    return respond


class _Response:
    """The response of one request: holds back the head until the session is written."""

    def __init__(self, app: App, exchange: Exchange[Session], environ: Environ, start_response: StartResponse) -> None:
        self._app = app
        self._exchange = exchange
        self._environ = environ
        self._start_response = start_response
        self._head: tuple[str, list[tuple[str, str]], ExcInfo | None] | None = None
        # Not told by the write callable: some servers and test doubles hand out none.
        self._begun = False
        self._fixed: bool | None = None
        self._write: Write | None = None

    def run(self) -> Iterator[bytes]:
        """The body. The application is called at the first step, its head is sent before its first octet."""
        body: Iterable[bytes] = ()
        try:
            try:
                body = self._app(self._environ, self._start)
                for chunk in body:
                    # An empty chunk does not start the response (PEP 3333), so the session stays open. It goes
                    # no further: a server must not see a chunk before the head.
                    if self._begun:
                        if not self._may_go_on():
                            return
                        yield chunk
                    elif chunk:
                        self._begin()
                        yield chunk
                self._begin()
            except Over:
                return
            except CoatcheckError as error:
                if self._begun or not is_answer(error):
                    raise
                yield from self._replace(error)
        finally:
            try:
                close = getattr(body, "close", None)
                if close is not None:
                    close()
            finally:
                if not self._begun:
                    run_blocking(self._exchange.abandon())

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: ExcInfo | None = None) -> Write:
        if self._begun and exc_info is not None and exc_info[1] is not None:
            raise exc_info[1].with_traceback(exc_info[2])
        self._head = (status, headers, exc_info)
        return self._legacy_write

    def _may_go_on(self) -> bool:
        if self._fixed is None:
            # A body of stated length is one that is already being sent (SEMANTICS 1); cut short, it would let the next
            # response of the connection be read as its rest.
            headers = () if self._head is None else self._head[1]
            self._fixed = any(name.lower() == "content-length" for name, _ in headers)
        return self._fixed or goes_on(self._exchange.session)

    def _legacy_write(self, data: bytes) -> object:
        if self._begun and not self._may_go_on():
            raise Over("the response was ended with its session")
        self._begin()
        if self._write is None:
            raise RuntimeError("the server's start_response gave no write callable (PEP 3333)")
        return self._write(data)

    def _begin(self) -> None:
        if not self._begun:
            if self._head is None:
                raise RuntimeError("the application returned a body before it called start_response")
            status, headers, exc_info = self._head
            added = self._exchange.finish_now([name for name, _ in headers])
            if added is None:
                raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
                answer = _text(run_blocking(self._exchange.finish(int(status[:3]), raw)))
            else:
                answer = [*headers, *added]
            more = () if exc_info is None else (exc_info,)
            self._write = self._start_response(status, answer, *more)
            self._begun = True

    def _replace(self, error: CoatcheckError) -> Iterable[bytes]:
        answer = self._exchange.refuse(error)
        self._start_response(_status(answer), _text(answer.headers))
        self._begun = True
        return _body(self._environ, answer)


def _headers(environ: Environ) -> list[tuple[bytes, bytes]]:
    return [(name, environ[key].encode("latin-1", "replace")) for key, name in _WANTED if key in environ]


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
    # Ours come in lower case as ASGI wants them; the application's stay as it has written them.
    return [
        ((name.title() if name.islower() else name).decode("latin-1"), value.decode("latin-1"))
        for name, value in headers
    ]


def _status(answer: ProblemAnswer) -> str:
    return f"{answer.status} {HTTPStatus(answer.status).phrase}"


def _body(environ: Environ, answer: ProblemAnswer) -> list[bytes]:
    return [] if environ.get("REQUEST_METHOD") == "HEAD" else [answer.body]
