"""WSGI middleware: sessions for Flask, Django and any other WSGI application (PEP 3333).

Decides when the session is written: after the application has called `start_response` and before the first octet of
the body leaves, so that a view may still write while it builds its answer; and that a body without a length goes on
only while its session lives. It must never buffer the body.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from http import HTTPStatus
from types import MappingProxyType, TracebackType
from typing import Any, Final, TypeAlias

from coatcheck.blocking import run_blocking
from coatcheck.core.cookie import sole_value
from coatcheck.core.csrf import SAFE_METHODS
from coatcheck.core.profiles import OutagePolicy
from coatcheck.engine import Engine
from coatcheck.errors import CoatcheckError, ConfigurationError
from coatcheck.manager import Coatcheck
from coatcheck.places import ClientPlace
from coatcheck.session import Session
from coatcheck.verifier import Verifier
from coatcheck.web.bearer import Bearer, VerifierGateway
from coatcheck.web.exchange import Exchange, finish_quietly, place_of
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

_SESSION_OF: Final = "coatcheck.session."


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
        self._key = _key_of(coat)
        self._cookie_name = coat.settings.session_cookie.wire_name
        self.exclude: tuple[str, ...] = tuple(exclude)
        self.outage: tuple[tuple[str, OutagePolicy], ...] = outage_paths(outage, otherwise=coat.settings.outage)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Handle one request."""
        if self.exclude and is_excluded(environ.get("PATH_INFO", ""), self.exclude):
            return self.app(environ, start_response)
        if self._key in environ:
            return self.app(environ, start_response)
        method = environ.get("REQUEST_METHOD", "GET")
        session, exchange = self._quick(environ, method), None
        if session is None:
            exchange = Exchange(
                self.coat.engine,
                Session,
                headers=_headers(environ),
                method=method,
                scheme=environ.get("wsgi.url_scheme", "http"),
                peer=environ.get("REMOTE_ADDR"),
                outage=outage_of(environ.get("PATH_INFO", ""), self.outage) if self.outage else None,
            )
            if exchange.refused is not None:
                answer = problem(exchange.refused)
                start_response(_status(answer), _text(answer.headers))
                return _body(environ, answer)
            session = exchange.session
        environ[self._key] = environ[SESSION_KEY] = session
        return _Response(self, environ, start_response, method, session, exchange).run()

    def _quick(self, environ: Environ, method: str) -> Session | None:
        """The session of a request that needs no closer look, which are almost all: a safe method, and one cookie of
        ours or none at all. Found as an `Exchange` finds it, without the cost of one."""
        engine = self.coat.engine
        if method not in SAFE_METHODS or "HTTP_AUTHORIZATION" in environ or self.outage or engine.tokens is not None:
            return None
        get = environ.get
        cookie = get("HTTP_COOKIE")
        presented = None
        if cookie is not None:
            presented = sole_value(cookie.encode("latin-1", "replace"), self._cookie_name)
            if presented is None:
                return None
        # Not the environ itself, which holds the session: every request would be left to the garbage collector.
        where = partial(_place, engine, get("REMOTE_ADDR"), get("HTTP_X_FORWARDED_FOR"), get("HTTP_USER_AGENT"), cookie)
        return Session(engine, presented, where)


def session_of(environ: Environ, *, coat: Coatcheck | None = None) -> Session:
    """The session of a WSGI environ; `coat` tells which, where several surround one application.

    Raises: RuntimeError where the middleware is missing or the path excluded.
    """
    found: Session | None = environ.get(SESSION_KEY) if coat is None else environ.get(_key_of(coat))
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

    # Here rather than in `__init__`: one of these is made for every request.
    _head: tuple[str, list[tuple[str, str]], ExcInfo | None] | None = None
    _begun = False
    """Not told by the write callable: some servers and test doubles hand out none."""
    _fixed: bool | None = None
    _write: Write | None = None

    def __init__(
        self,
        gate: CoatcheckMiddleware,
        environ: Environ,
        start_response: StartResponse,
        method: str,
        session: Session,
        exchange: Exchange[Session] | None,
    ) -> None:
        self._gate = gate
        self._environ = environ
        self._start_response = start_response
        self._method = method
        self._session = session
        self._known_exchange = exchange

    def run(self) -> Iterator[bytes]:
        """The body. The application is called at the first step, its head is sent before its first octet."""
        body: Iterable[bytes] = ()
        try:
            try:
                body = self._gate.app(self._environ, self._start)
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
                    run_blocking(self._session.abandon())

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
        return self._fixed or goes_on(self._session)

    def _legacy_write(self, data: bytes) -> object:
        if self._begun and not self._may_go_on():
            raise Over("the response was ended with its session")
        self._begin()
        if self._write is None:
            raise RuntimeError("the server's start_response gave no write callable (PEP 3333)")
        return self._write(data)

    def _begin(self) -> None:
        if self._begun:
            return
        if self._head is None:
            raise RuntimeError("the application returned a body before it called start_response")
        status, headers, exc_info = self._head
        exchange = self._known_exchange
        added = finish_quietly(self._session, headers) if exchange is None else exchange.finish_now(headers)
        if added is None:
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            headers = _text(run_blocking(self._exchange().finish(int(status[:3]), raw)))
        else:
            headers = [*headers, *added]
        if exc_info is None:
            self._write = self._start_response(status, headers)
        else:
            self._write = self._start_response(status, headers, exc_info)
        self._begun = True

    def _exchange(self) -> Exchange[Session]:
        """The exchange, for a response that has more to tell than that it depends on the session."""
        exchange = self._known_exchange
        if exchange is None:
            exchange = self._known_exchange = Exchange(
                self._gate.coat.engine, Session, headers=[], method=self._method, scheme="", peer=None
            )
            # Found at the beginning; the headers were looked at then.
            exchange.session = self._session
        return exchange

    def _replace(self, error: CoatcheckError) -> Iterable[bytes]:
        answer = self._exchange().refuse(error)
        self._start_response(_status(answer), _text(answer.headers))
        self._begun = True
        return _body(self._environ, answer)


def _key_of(coat: Coatcheck) -> str:
    return f"{_SESSION_OF}{id(coat)}"


def _place(
    engine: Engine, peer: str | None, forwarded: str | None, agent: str | None, cookie: str | None
) -> ClientPlace:
    environ: Environ = {"HTTP_X_FORWARDED_FOR": forwarded, "HTTP_USER_AGENT": agent, "HTTP_COOKIE": cookie}
    return place_of(engine, _headers({key: value for key, value in environ.items() if value is not None}), peer)


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
