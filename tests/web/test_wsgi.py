"""What is WSGI's own: when the head leaves, what a server may expect (PEP 3333), and Flask in front of it."""

from __future__ import annotations

import gc
import io
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from flask import Flask, Response, request, stream_with_context
from flask.testing import FlaskClient

from coatcheck import (
    AsyncCoatcheck,
    Coatcheck,
    CoatcheckError,
    ConfigurationError,
    CookieSettings,
    Forbidden,
    LoginRequired,
    SessionClosed,
    Settings,
)
from coatcheck.core.ports import SessionStore
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem, login_as
from coatcheck.web.wsgi import App, CoatcheckMiddleware, Environ, StartResponse, problem_response, session_of
from tests.web.faces import COOKIE, Store


class Node:
    """A coat over memory with its counted store."""

    def __init__(self, settings: Settings | None = None) -> None:
        system = FakeSystem()
        self.store = Store(open_store("memory:", colour="blocking", system=system))
        self.coat = Coatcheck(cast(SessionStore, self.store), settings=settings or Settings(), system=system)

    def alive(self, subject: str) -> int:
        return len(self.coat.list_sessions(subject).items)


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node()
    yield node
    node.coat.close()


def environ_of(method: str = "GET", **more: str) -> Environ:
    environ: Environ = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": "/", "QUERY_STRING": ""}
    setup_testing_defaults(environ)
    environ.update(more)
    return environ


def call(app: App, environ: Environ | None = None) -> tuple[str, dict[str, str], bytes]:
    """One request as a strict server makes it."""
    started: list[tuple[str, list[tuple[str, str]]]] = []
    written: list[bytes] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        started.append((status, headers))
        return written.append

    body = app(environ or environ_of(), start_response)
    try:
        written += body
    finally:
        cast(Any, body).close()
    [(status, headers)] = started
    return status, dict(headers), b"".join(written)


# -- PEP 3333 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["list", "generator", "write", "empty"])
def test_every_way_to_answer_passes_the_validator_and_commits(node: Node, way: str) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = session_of(environ)
        write = start_response("200 OK", [("Content-Type", "text/plain"), ("ETag", '"1"')])
        session["way"] = way
        if way == "write":
            write(b"hello")
            return []
        if way == "generator":
            return (chunk for chunk in (b"hel", b"lo"))
        return [] if way == "empty" else [b"hello"]

    wrapped = cast(App, validator(cast(Any, CoatcheckMiddleware(cast(App, validator(cast(Any, app))), node.coat))))
    status, headers, body = call(wrapped)
    assert (status, body) == ("200 OK", b"" if way == "empty" else b"hello")
    assert set(headers) == {"Content-Type", "ETag", "Vary", "Cache-Control", "Set-Cookie"}
    session = node.coat.session(headers["Set-Cookie"].partition(";")[0].partition("=")[2])
    assert session["way"] == way


def test_empty_chunks_do_not_begin_the_response(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        yield b""
        session_of(environ)["late"] = 1
        yield b"x"
        with pytest.raises(SessionClosed):
            session_of(environ)["later"] = 1

    _, headers, body = call(CoatcheckMiddleware(app, node.coat))
    assert body == b"x"
    assert "Set-Cookie" in headers


def test_a_generator_may_start_its_response_late(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        yield b""
        start_response("200 OK", [])
        yield b"x"

    assert call(CoatcheckMiddleware(app, node.coat)) == ("200 OK", {}, b"x")


def test_the_applications_close_is_called_once(node: Node) -> None:
    closed: list[bool] = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            yield b"x"

        def close(self) -> None:
            closed.append(True)

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        return Body()

    call(CoatcheckMiddleware(app, node.coat))
    assert closed == [True]


def test_an_error_page_in_place_of_a_begun_one_keeps_its_trace(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [("X-First", "1")])
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            start_response("500 Oops", [("X-Second", "1")], (type(error), error, error.__traceback__))
        return [b"sorry"]

    assert call(CoatcheckMiddleware(app, node.coat)) == ("500 Oops", {"X-Second": "1"}, b"sorry")


def test_an_application_without_start_response_is_an_error(node: Node) -> None:
    with pytest.raises(RuntimeError, match="start_response"):
        call(CoatcheckMiddleware(lambda environ, start: [b"x"], node.coat))


def test_a_client_that_is_gone_before_the_head_takes_the_sign_in_back(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", [])
        session_of(environ).login("50")
        return [b"x"]

    def broken(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken pipe"):
        list(CoatcheckMiddleware(app, node.coat)(environ_of("POST"), broken))
    assert node.alive("50") == 0


def test_the_same_coat_twice_is_one_session_and_two_coats_keep_apart(node: Node) -> None:
    staff = Node(Settings(namespace="staff", cookie=CookieSettings(name="__Host-Http-staff")))

    seen: list[object] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(session_of(environ))
        session_of(environ, coat=node.coat).login("50")
        session_of(environ, coat=staff.coat).login("7")
        start_response("200 OK", [])
        return []

    inner = CoatcheckMiddleware(app, node.coat)

    def between(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(session_of(environ))
        return inner(environ, start_response)

    lines: list[tuple[str, str]] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], object]:
        lines.extend(headers)
        return io.BytesIO().write

    twice = CoatcheckMiddleware(between, node.coat)
    list(CoatcheckMiddleware(twice, staff.coat)(environ_of("POST"), start_response))
    assert seen[0] is seen[1]
    cookies = [value.partition("=")[0] for name, value in lines if name == "Set-Cookie"]
    assert cookies == [COOKIE, "__Host-Http-staff"]
    assert (node.alive("50"), staff.alive("7")) == (1, 1)
    staff.coat.close()


def test_a_coat_of_the_other_colour_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="Coatcheck"):
        CoatcheckMiddleware(lambda environ, start: [], cast(Any, AsyncCoatcheck("memory:")))


def test_an_environ_without_middleware_names_the_cure() -> None:
    with pytest.raises(RuntimeError, match=r"app\.wsgi_app"):
        session_of(environ_of())


# -- what needs no closer look -------------------------------------------------------------------------------------


def test_a_request_without_a_closer_look_is_read_as_one_with_it(node: Node) -> None:
    # An outage path has every request looked at closely.
    seen: list[str | None] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        seen.append(session_of(environ).subject)
        start_response("200 OK", [])
        return []

    quick, close = CoatcheckMiddleware(app, node.coat), CoatcheckMiddleware(app, node.coat, outage={"/x": "anonymous"})
    session = node.coat.session(None)
    session.login("50")
    good = f"{COOKIE}={cast(SendCookie, session.cookie_action).id.text}"
    cookies = {
        good: "50",
        f"a=1; {good}; b=2": "50",
        f"a=1;{good}": "50",
        f"{good} ": "50",
        f"{good}; {good}": None,
        f"{good}; {COOKIE}=": None,
        f"x{good}": None,
        f"a=1, {good}": None,
        f"{COOKIE} = {good.partition('=')[2]}": None,
        f"{COOKIE}=": None,
        f"{COOKIE}=\xff\u20ac": None,
        "": None,
        f"a={'x' * 20_000}; {good}": None,
    }
    for cookie, subject in cookies.items():
        for more in ({}, {"HTTP_AUTHORIZATION": ""}, {"HTTP_AUTHORIZATION": "Bearer x"}):
            for gate in (quick, close):
                call(gate, environ_of(HTTP_COOKIE=cookie, **more))
            assert seen == [seen[0]] * 2, (cookie, more)
            if not more and cookie != f"{COOKIE} = {good.partition('=')[2]}":
                assert seen[0] == subject, cookie
            seen.clear()
    call(quick, environ_of())
    assert seen == [None]


def test_a_sign_in_in_a_safe_request_keeps_where_it_came_from(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        # Whatever the application makes of its environ, the request came as it came.
        environ.update(REMOTE_ADDR="203.0.113.9", HTTP_USER_AGENT="other", REQUEST_METHOD="POST")
        session_of(environ).login("50")
        start_response("200 OK", [("Vary", "Accept")])
        return []

    came = environ_of(REMOTE_ADDR="192.0.2.7", HTTP_USER_AGENT="Browser/1")
    _, headers, _ = call(CoatcheckMiddleware(app, node.coat), came)
    assert headers["Set-Cookie"].startswith(f"{COOKIE}=")
    [info] = node.coat.list_sessions("50").items
    assert (info.network, info.user_agent) == ("192.0.2.7", "Browser/1")


def test_a_request_leaves_nothing_to_the_garbage_collector(node: Node) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        kept.append(weakref.ref(session_of(environ)))
        start_response("200 OK", [])
        return [str(session_of(environ).subject).encode()]

    kept: list[weakref.ref[object]] = []
    gc.disable()
    try:
        for method in ("GET", "POST"):
            call(CoatcheckMiddleware(app, node.coat), environ_of(method, HTTP_COOKIE=f"{COOKIE}=x"))
        assert [each() for each in kept] == [None, None]
    finally:
        gc.enable()


# -- Flask ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def app(node: Node) -> Flask:
    """A Flask application as it runs in production: exceptions of views become answers."""
    app = Flask(__name__)
    app.wsgi_app = CoatcheckMiddleware(app.wsgi_app, node.coat)  # type: ignore[method-assign]

    @app.post("/login")
    def login() -> str:
        session_of(request.environ).login("50", claims={"role": "admin"})
        return "in"

    @app.post("/logout")
    def logout() -> str:
        session_of(request.environ).logout()
        return "out"

    @app.get("/who")
    def who() -> str:
        return str(session_of(request.environ).subject)

    @app.get("/must")
    def must() -> str:
        return session_of(request.environ).require_login().subject

    @app.get("/static-page")
    def static_page() -> str:
        return "same for all"

    return app


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    """Speaks https, as the cookie's name demands."""
    return app.test_client()


def test_flask_signs_in_and_out(node: Node, client: FlaskClient) -> None:
    assert client.get("/who").text == "None"
    assert client.post("/login").text == "in"
    assert client.get("/who").text == "50"
    assert client.post("/logout").text == "out"
    assert client.get("/who").text == "None"
    assert node.alive("50") == 0


def test_flask_view_that_touches_the_session_answers_503_while_the_store_is_away(
    node: Node, client: FlaskClient, caplog: pytest.LogCaptureFixture
) -> None:
    # Flask turns the exception into a 500 before we see it.
    client.post("/login")
    node.store.away = frozenset()
    with caplog.at_level(logging.CRITICAL, "flask.app"):
        answer = client.get("/who")
    assert (answer.status_code, answer.headers["Retry-After"], answer.mimetype) == (
        503,
        "1",
        "application/problem+json",
    )
    assert "Set-Cookie" not in answer.headers
    untouched = client.get("/static-page")
    assert (untouched.status_code, "Set-Cookie" in untouched.headers) == (200, False)
    node.store.away = None
    assert client.get("/who").text == "50"


@pytest.mark.parametrize("testing", [True, False])
def test_flask_answers_our_errors_with_the_handler(app: Flask, client: FlaskClient, testing: bool) -> None:
    app.testing = testing
    app.register_error_handler(CoatcheckError, problem_response)

    @app.get("/forbidden")
    def forbidden() -> str:
        raise Forbidden

    answer = client.get("/must")
    assert (answer.status_code, cast(Any, answer.json)["code"]) == (401, "login_required")
    assert answer.headers["WWW-Authenticate"] == 'Cookie realm="session"'
    assert (answer.headers["Vary"], answer.headers["Cache-Control"]) == ("Cookie", "no-store")
    assert client.get("/forbidden").status_code == 403
    head = client.head("/must")
    assert (head.status_code, head.data) == (401, b"")
    client.post("/login")
    assert client.get("/must").text == "50"


def test_flask_handler_leaves_mistakes_of_the_application_to_flask(app: Flask, client: FlaskClient) -> None:
    app.register_error_handler(CoatcheckError, problem_response)

    @app.get("/late")
    def late() -> str:
        raise SessionClosed("a mistake")

    answer = client.get("/late")
    assert answer.status_code == 500
    assert "a mistake" not in answer.text


def test_flask_store_failure_with_the_handler_is_a_503_as_well(app: Flask, node: Node, client: FlaskClient) -> None:
    app.register_error_handler(CoatcheckError, problem_response)
    client.post("/login")
    node.store.away = frozenset()
    answer = client.get("/who")
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_flask_without_the_handler_answers_when_it_propagates(app: Flask, client: FlaskClient) -> None:
    app.testing = True
    assert client.get("/must").status_code == 401


def test_flask_exception_after_a_sign_in_still_sends_the_cookie(app: Flask, node: Node, client: FlaskClient) -> None:
    # Flask answers, so the cookie arrives and the sign-in counts; an answer that is never sent takes it back.
    @app.post("/crash")
    def crash() -> str:
        session_of(request.environ).login("50")
        session_of(request.environ)["note"] = 1
        raise ZeroDivisionError

    assert client.post("/crash").status_code == 500
    assert client.get("/who").text == "50"
    assert node.alive("50") == 1
    app.testing = True
    with pytest.raises(ZeroDivisionError):
        client.post("/crash")
    assert node.alive("50") == 0


def test_flask_streams_after_the_commit(app: Flask, node: Node, client: FlaskClient) -> None:
    @app.post("/stream")
    def stream() -> Response:
        session = session_of(request.environ)
        session["before"] = 1

        def lines() -> Iterator[str]:
            yield "one"
            with pytest.raises(SessionClosed):
                session["after"] = 1
            yield "two"

        return Response(stream_with_context(lines()))

    assert client.post("/stream").text == "onetwo"
    assert "create" in node.store.verbs


def test_flask_refuses_another_sites_post(client: FlaskClient) -> None:
    answer = client.post("/login", headers={"Sec-Fetch-Site": "cross-site"})
    assert (answer.status_code, answer.mimetype) == (403, "application/problem+json")


def test_login_as_signs_a_flask_client_in(node: Node, client: FlaskClient) -> None:
    sid = login_as(client, node.coat, "50", scopes=["admin"])
    assert client.get("/who").text == "50"
    assert [each.sid for each in node.coat.list_sessions("50").items] == [sid]


def test_problem_response_raises_mistakes_again() -> None:
    with pytest.raises(SessionClosed):
        problem_response(SessionClosed())
    assert callable(problem_response(LoginRequired()))
