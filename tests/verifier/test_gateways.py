"""A service without a store behind ASGI, WSGI, Starlette and FastAPI: who is let in, and what the others are told."""

from __future__ import annotations

import io
import json
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.authentication import requires
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck import ConfigurationError
from coatcheck.errors import ScopesMissing
from coatcheck.verifier import Verifier
from coatcheck.web import asgi, wsgi
from coatcheck.web.bearer import require_scopes
from coatcheck.web.starlette import VerifierMiddleware
from tests.verifier.issuer import Bench


class Answer:
    """What came back, whichever gateway it was."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.text = body.decode()

    @property
    def code(self) -> str:
        return str(json.loads(self.text)["code"])


async def _view(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
    found = asgi.bearer_of(scope)
    if scope["path"] == "/scoped":
        require_scopes(found.principal(), ("admin",))
    who = found.optional_principal
    text = "nobody" if who is None else f"{who.subject} {who.claims['role']} {who.scopes}"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


def _wsgi_view(environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Any:
    found = wsgi.bearer_of(environ)
    if environ["PATH_INFO"] == "/scoped":
        try:
            require_scopes(found.principal(), ("admin",))
        except ScopesMissing as missing:
            return wsgi.problem_response(missing)(environ, start_response)
    who = found.optional_principal
    start_response("200 OK", [])
    return [b"nobody" if who is None else f"{who.subject} {who.claims['role']} {who.scopes}".encode()]


class Door:
    """One application behind the gateway that is under test."""

    def __init__(self, kind: str, verifier: Verifier, **options: Any) -> None:
        self._asgi = asgi.VerifierMiddleware(_view, verifier, **options)
        self._wsgi = wsgi.VerifierMiddleware(_wsgi_view, verifier, **options)
        self._kind = kind

    def ask(self, path: str = "/", *authorization: str, cookie: str = "") -> Answer:
        if self._kind == "wsgi":
            return self._ask_wsgi(path, authorization, cookie)
        sent: list[asgi.Message] = []
        headers = [(b"authorization", value.encode("latin-1")) for value in authorization]
        scope = {"type": "http", "method": "GET", "path": path, "headers": [*headers, (b"cookie", cookie.encode())]}

        async def receive() -> asgi.Message:
            return {"type": "http.disconnect"}

        async def send(message: asgi.Message) -> None:
            sent.append(message)

        anyio.run(self._asgi, scope, receive, send)
        told = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], told, sent[1]["body"])

    def _ask_wsgi(self, path: str, authorization: tuple[str, ...], cookie: str) -> Answer:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "HTTP_COOKIE": cookie, "wsgi.input": io.BytesIO()}
        if authorization:
            environ["HTTP_AUTHORIZATION"] = ",".join(authorization)
        told: list[Any] = []

        def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
            told.append((int(status[:3]), {name.lower(): value for name, value in headers}))

        body = b"".join(self._wsgi(environ, start_response))
        return Answer(told[0][0], told[0][1], body)


@pytest.fixture(params=["asgi", "wsgi"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_good_token_is_let_in_with_everything_it_says(kind: str, bench: Bench) -> None:
    door = Door(kind, bench.ready())
    assert door.ask("/", f"Bearer {bench.mint()}").text == "50 admin ('read',)"
    assert door.ask("/", f"bearer {bench.mint()}").status == 200


def test_without_a_token_the_challenge_names_no_error(kind: str, bench: Bench) -> None:
    answer = Door(kind, bench.ready()).ask("/", cookie="__Host-Http-session=x; access_token=y")
    assert (answer.status, answer.code) == (401, "login_required")
    assert answer.headers["www-authenticate"].endswith('Bearer realm="session"')


@pytest.mark.parametrize("value", ["Bearer", "Bearer x.y.z", "Basic YTpi", "Token x", "Bearer \xff", ""])
def test_a_bad_credential_is_refused_in_one_way(kind: str, value: str, bench: Bench) -> None:
    answer = Door(kind, bench.ready()).ask("/", value)
    assert (answer.status, answer.code) == (401, "invalid_token")
    assert answer.headers["www-authenticate"] == 'Bearer error="invalid_token"'


def test_two_credentials_are_none(kind: str, bench: Bench) -> None:
    good = f"Bearer {bench.mint()}"
    assert Door(kind, bench.ready()).ask("/", good, good).code == "invalid_token"


def test_a_revoked_token_is_refused_at_the_next_request(kind: str, bench: Bench) -> None:
    door = Door(kind, bench.following())
    token = f"Bearer {bench.mint()}"
    assert door.ask("/", token).status == 200
    bench.desk.wait_again(
        "take_pushed", lambda: bench.issuer.push({"kind": "sid", "sid": "the-session", "until": bench.until})
    )
    assert door.ask("/", token).code == "invalid_token"


def test_silence_is_a_503_and_nobody_is_told_to_sign_in(kind: str, bench: Bench) -> None:
    door = Door(kind, bench.verifier())
    answer = door.ask("/", f"Bearer {bench.mint()}")
    assert (answer.status, answer.code) == (503, "revocations_unknown")
    assert int(answer.headers["retry-after"]) >= 1


def test_sensitive_paths_rest_on_no_old_list(kind: str, bench: Bench) -> None:
    verifier = bench.ready(on_silence="serve")
    door = Door(kind, verifier, sensitive=("/transfer",))
    token = f"Bearer {bench.mint()}"
    bench.issuer.on_poll = lambda handler: handler.reply(503)
    bench.issuer.on_stream = lambda handler: handler.reply(503)
    bench.issuer.end_streams()
    bench.system.advance(6)
    assert door.ask("/", token).status == 200
    # What is not written plainly might be routed there, so it counts as sensitive.
    for path in ("/transfer", "/transfer/all", "/transfer/./now", "/x/../transfer", "//transfer", "/%74ransfer"):
        assert door.ask(path, token).code == "revocations_unknown", path
    assert door.ask("/transferred", token).status == 200


def test_optional_lets_everybody_in_but_no_bad_token(kind: str, bench: Bench) -> None:
    door = Door(kind, bench.ready(), optional=True, exclude=("/static",))
    assert door.ask("/").text == "nobody"
    if kind == "asgi":
        assert door.ask("/", "Bearer x.y.z").code == "invalid_token"
    with pytest.raises(RuntimeError, match="exclude="):
        door.ask("/static/x")


def test_missing_scopes_are_named(kind: str, bench: Bench) -> None:
    answer = Door(kind, bench.ready()).ask("/scoped", f"Bearer {bench.mint()}")
    assert (answer.status, answer.code) == (403, "forbidden")
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="admin"'


@pytest.mark.parametrize("gateway", [asgi.VerifierMiddleware, wsgi.VerifierMiddleware])
def test_only_a_verifier_is_taken_for_one(gateway: Any) -> None:
    with pytest.raises(ConfigurationError, match="verifier"):
        gateway(_view, object())


def test_starlette_sees_the_user_and_the_scopes(bench: Bench) -> None:
    @requires("read")
    async def read(request: Request) -> Response:
        return PlainTextResponse(f"{request.user.display_name} {request.user.is_authenticated}")

    @requires("write")
    async def write(request: Request) -> Response:
        return PlainTextResponse("written")

    app = Starlette(
        routes=[Route("/read", read), Route("/write", write)],
        middleware=[Middleware(VerifierMiddleware, verifier=bench.ready(), optional=True)],
    )
    with TestClient(app) as client:
        good = {"Authorization": f"Bearer {bench.mint()}"}
        assert client.get("/read", headers=good).text == "50 True"
        assert client.get("/write", headers=good).status_code == 403
        assert client.get("/read").status_code == 403
        assert client.get("/read", headers={"Authorization": "Bearer x"}).status_code == 401


def test_the_lifespan_starts_the_verifier_and_closes_it(bench: Bench) -> None:
    verifier = bench.verifier()
    app = Starlette(middleware=[Middleware(VerifierMiddleware, verifier=verifier, optional=True)])
    seen = [verifier.status.running]
    with TestClient(app):
        seen.append(verifier.status.running)
    seen.append(verifier.status.running)
    assert seen == [False, True, False]
