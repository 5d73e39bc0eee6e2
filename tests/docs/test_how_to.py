"""The how-to pages about tokens do what they say: their files are written and imported, their commands are run.

Python blocks begin with the name of their file. Addresses are the only thing that is exchanged: a server of a test
listens on a free port.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocketDisconnect

from coatcheck import Coatcheck, ConfigurationError, Settings, TokenInvalid, TokenSettings, Verifier
from coatcheck.core.binding import OUTCOMES
from coatcheck.server.cli.serve import serve
from tests.docs.test_reference import rows
from tests.server.command_parts import PASSWORD, Server, answer, call, clean_environment, refused, serving
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import Child, accepts, until

ROOT = Path(__file__).resolve().parents[2]
SHOP = "http://127.0.0.1:3000"
ISSUER = "http://127.0.0.1:8000"
EXAMPLE = "https://id.example"
RIGHT = {"username": "ratia", "password": "secret"}
WAIT = 20.0


class Page:
    """The blocks of one page, in order."""

    def __init__(self, name: str) -> None:
        text = (ROOT / "docs" / "how-to" / name).read_text("utf-8")
        blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
        self.shell = [body for language, body in blocks if language == "sh"]
        self.python = [body for language, body in blocks if language == "python"]
        assert len(self.shell) + len(self.python) == len(blocks), "another kind of block, which nobody runs"

    def files(self, name: str) -> list[str]:
        """Every version of a file that the page shows."""
        return [body for body in self.python if body.startswith(f"# {name}\n")]

    def names(self) -> list[str]:
        return [body.split("\n", 1)[0].removeprefix("# ") for body in self.python]

    def lines(self) -> list[str]:
        """Every command of the page."""
        return [line for body in self.shell for line in body.splitlines()]


def environment_of(directory: Path) -> dict[str, str]:
    """What a command of a page finds: the tools of this Python, and nobody's settings."""
    return clean_environment(
        {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "HOME": str(directory)}
    )


def typed(line: str, directory: Path, environment: Mapping[str, str]) -> str:
    """One command, as a person's shell would run it; what it prints."""
    done = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


class Desk:
    """A directory where the files of a page are kept and its commands run."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.environment = environment_of(directory)
        monkeypatch.chdir(directory)
        monkeypatch.syspath_prepend(str(directory))
        self._monkeypatch = monkeypatch

    def run(self, line: str) -> str:
        """One command, as a person's shell would run it; what it prints."""
        return typed(line, self.directory, self.environment)

    def write(self, text: str, **exchanged: str) -> None:
        """Keep one block under the name in its first line."""
        name = text.split("\n", 1)[0].removeprefix("# ")
        for old, new in exchanged.items():
            text = text.replace({"issuer": ISSUER, "shop": SHOP, "example": EXAMPLE}[old], new)
        (self.directory / name).write_text(text)

    def load(self, *names: str) -> list[ModuleType]:
        """The files as modules, read anew."""
        for path in self.directory.glob("*.py"):
            self._monkeypatch.delitem(sys.modules, path.stem, raising=False)
        importlib.invalidate_caches()
        return [importlib.import_module(name) for name in names]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    known = set(sys.modules)
    # A second version of one file may have the size and the second of the first.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield Desk(tmp_path, monkeypatch)
    for path in tmp_path.glob("*.py"):
        if path.stem not in known:
            sys.modules.pop(path.stem, None)


def client(app: Any, base_url: str = SHOP) -> TestClient:
    return TestClient(app, base_url=base_url)


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


# -- tokens with FastAPI -------------------------------------------------------------------------------------------

FASTAPI = Page("tokens-with-fastapi.md")


def test_every_block_about_fastapi_is_one_of_those_that_are_run() -> None:
    assert FASTAPI.names() == ["settings.py", "shop.py", "end_sessions.py", "settings.py", "orders.py"]
    assert [line.split()[0] for line in FASTAPI.lines()] == [
        "pip",
        "uvicorn",
        *["curl"] * 4,
        "(umask",
        "export",
        "coatcheck",
        "(umask",
    ]


def test_the_extra_that_is_installed_is_there() -> None:
    (line,) = [line for line in FASTAPI.lines() if line.startswith("pip")]
    assert 'fastapi = ["fastapi' in (ROOT / "pyproject.toml").read_text("utf-8")
    assert line == 'pip install "coatcheck[fastapi]" uvicorn'


def test_the_shop_signs_in_refreshes_asks_for_scopes_and_signs_out(desk: Desk) -> None:
    for name in ("settings.py", "shop.py"):
        desk.write(FASTAPI.files(name)[0])
    (shop,) = desk.load("shop")
    with client(shop.app) as browser, client(shop.app) as api:
        assert browser.get("/dashboard").status_code == 401
        assert browser.post("/login", json={**RIGHT, "password": "guess"}).status_code == 401
        answer = browser.post("/login", json=RIGHT)
        token = answer.json()["access_token"]
        assert (answer.json()["token_type"], answer.json()["expires_in"]) == ("Bearer", 900)
        (cookie,) = [line for line in answer.headers.get_list("set-cookie") if "refresh" in line.partition("=")[0]]
        assert {"HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        assert api.get("/dashboard", headers=bearer(token)).json() == {"user": "50", "role": "admin"}
        assert api.get("/orders", headers=bearer(token)).json() == {"orders": []}
        refused = api.delete("/orders/7", headers=bearer(token))
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
        assert refused.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="orders:write"'
        renewed = browser.post("/refresh")
        assert "set-cookie" not in renewed.headers, "within the reuse grace the refresh token stays"
        assert browser.post("/logout").json() == {"message": "bye"}
        for each in (token, renewed.json()["access_token"]):
            said = api.get("/dashboard", headers=bearer(each))
            assert (said.status_code, said.json()["code"]) == (401, "invalid_token")
        assert api.get("/dashboard").json()["code"] == "login_required"
        assert api.post("/refresh").json()["code"] == "refresh_invalid"


def test_an_operator_ends_what_the_shop_has_handed_out(desk: Desk) -> None:
    for name in ("settings.py", "shop.py", "end_sessions.py"):
        desk.write(FASTAPI.files(name)[0])
    (shop,) = desk.load("shop")
    with client(shop.app) as browser, client(shop.app) as api:
        token = browser.post("/login", json=RIGHT).json()["access_token"]
        assert api.get("/dashboard", headers=bearer(token)).status_code == 200
        desk.load("end_sessions")
        assert api.get("/dashboard", headers=bearer(token)).json()["code"] == "invalid_token"
        ended = browser.post("/refresh")
        assert (ended.json()["code"], ended.json()["reason"]) == ("session_ended", "stolen laptop")


def test_the_commands_talk_to_the_shop(desk: Desk) -> None:
    reserved = reserve_port()
    port, here = reserved.port, f"http://{LOOPBACK}:{reserved.port}"
    desk.write(FASTAPI.files("settings.py")[0], shop=here)
    desk.write(FASTAPI.files("shop.py")[0])
    (start,) = [line for line in FASTAPI.lines() if line.startswith("uvicorn")]
    words = [sys.executable, "-m", *shlex.split(start.replace("3000", str(port)))]
    child = Child(words, log=desk.directory / "shop.log", directory=desk.directory, environment={})
    try:
        child.await_ready(lambda: accepts(port))
        told = [desk.run(line.replace(SHOP, here)) for line in FASTAPI.lines() if line.startswith("curl")]
    finally:
        child.stop()
        reserved.release()
    login, refresh, dashboard, logout = map(json.loads, told)
    assert login.keys() == refresh.keys() == {"access_token", "token_type", "expires_in"}
    assert dashboard == {"user": "50", "role": "admin"}
    assert logout == {"message": "bye"}


@pytest.mark.parametrize("server_key", ["a new one", "the one of app.db"])
def test_a_second_service_hears_of_the_logout(server_key: str, desk: Desk) -> None:
    desk.write(FASTAPI.files("shop.py")[0])
    make, name_it, serve, add = FASTAPI.lines()[-4:]
    if server_key == "a new one":
        desk.run(make)
    else:
        desk.write(FASTAPI.files("settings.py")[0])
        (shop,) = desk.load("shop")
        with client(shop.app) as browser:
            browser.post("/login", json=RIGHT)
        (desk.directory / "server.key").write_text((desk.directory / "app.db.key").read_bytes().hex())
    assert name_it == "export COATCHECK_SERVER_KEY_FILE=server.key"
    desk.environment["COATCHECK_SERVER_KEY_FILE"] = "server.key"
    flags = shlex.split(serve.removeprefix("coatcheck serve"))
    with serving(*flags, directory=desk.directory, env={"COATCHECK_SERVER_KEY_FILE": "server.key"}) as running:
        desk.run(add)
        desk.write(FASTAPI.files("settings.py")[1], issuer=running.address)
        desk.write(FASTAPI.files("orders.py")[0], issuer=running.address)
        shop, orders = desk.load("shop", "orders")
        with client(shop.app) as browser, client(orders.app) as api:
            assert orders.verifier.wait_until_ready(WAIT)
            own = browser.post("/login", json=RIGHT).json()["access_token"]
            token = browser.post("/refresh?audience=orders").json()["access_token"]
            assert api.get("/orders", headers=bearer(token)).json() == {"orders": [], "of": "50"}
            assert api.get("/orders", headers=bearer(own)).status_code == 401, "meant for the shop"
            assert browser.get("/dashboard", headers=bearer(token)).status_code == 401, "meant for orders"
            assert browser.post("/refresh?audience=elsewhere").status_code == 400
            assert api.get("/orders").json()["code"] == "login_required"
            browser.post("/logout")
            until(lambda: api.get("/orders", headers=bearer(token)).status_code == 401, within=WAIT, what="the logout")


def test_another_server_key_is_refused_by_name(desk: Desk) -> None:
    desk.write(FASTAPI.files("settings.py")[0])
    desk.write(FASTAPI.files("shop.py")[0])
    (shop,) = desk.load("shop")
    with client(shop.app) as browser:
        browser.post("/login", json=RIGHT)
    strange = Settings(public_url=SHOP, server_key=b"k" * 32, tokens=TokenSettings())
    with pytest.raises(ConfigurationError, match="server_key"), Coatcheck("sqlite:///app.db", settings=strange):
        pass


# -- verify in another service -------------------------------------------------------------------------------------

VERIFY = Page("verify-in-another-service.md")
APPLICATIONS = ("fastapi_app", "starlette_app", "asgi_app", "flask_app")
Ask = Callable[[str, str, str | None], int]


def test_every_block_about_verifying_is_one_of_those_that_are_run() -> None:
    assert VERIFY.names() == ["verifying.py", *(f"{name}.py" for name in APPLICATIONS), "patient.py"]
    assert VERIFY.lines() == [
        "(umask 077 && coatcheck client add orders > feed.credential)",
        "coatcheck client list",
    ]


class Premises:
    """Where the issuer lives: its home is made once, by the commands of the page."""

    def __init__(self, directory: Path, running: ExitStack) -> None:
        self._directory = directory
        self._running = running
        self._server = self._start()
        environment = environment_of(directory)
        add, listing = VERIFY.lines()
        typed(add, directory, environment)
        assert "orders" in typed(listing, directory, environment)
        typed(f"echo '{PASSWORD}' | coatcheck user add ratia --password-stdin", directory, environment)
        self.credential = (directory / "feed.credential").read_text().strip()

    def server(self) -> Server:
        """The server; a new one on the same home when a test has killed it."""
        if not self._server.child.running:
            self._server = self._start()
        return self._server

    def _start(self) -> Server:
        # A log of its own: what the one before said is not what this one says.
        log = f"server{len(list(self._directory.glob('server*.log')))}"
        return self._running.enter_context(serving("--profile", "b2c", directory=self._directory, name=log))


@pytest.fixture(scope="module")
def premises(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Premises]:
    """One issuer for the tests about verifying: each has a verifier and sessions of its own."""
    with ExitStack() as running:
        yield Premises(tmp_path_factory.mktemp("issuer"), running)


@pytest.fixture
def issuer(premises: Premises, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server with a profile that hands out tokens; the credential of a service is in the environment."""
    monkeypatch.setenv("FEED_CREDENTIAL", premises.credential)
    return premises.server()


def signed_in(issuer: Server) -> dict[str, str]:
    sent = {"username": "ratia", "password": PASSWORD, "carrier": "body"}
    status, told, _ = call(issuer.address, "/api/login", sent)
    assert status == 200, told
    found: dict[str, str] = told
    return found


def asking(name: str, app: Any) -> Ask:
    """How to ask an application, whichever gateway it speaks; the status it answers."""
    if name == "flask_app":
        visitor = app.test_client()
        return lambda method, path, token: int(
            visitor.open(path, method=method, headers=bearer(token) if token else {}).status_code
        )
    other = client(app)
    return lambda method, path, token: other.request(method, path, headers=bearer(token) if token else {}).status_code


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_service_accepts_tokens_of_the_issuer_and_hears_of_a_logout(name: str, issuer: Server, desk: Desk) -> None:
    desk.write(VERIFY.files("verifying.py")[0], example=issuer.address)
    desk.write(VERIFY.files(f"{name}.py")[0])
    verifying, module = desk.load("verifying", name)
    verifier: Verifier = verifying.verifier
    try:
        verifier.start()
        assert verifier.wait_until_ready(WAIT)
        ask = asking(name, module.app)
        token = signed_in(issuer)["access_token"]
        assert ask("GET", "/orders", None) == 401
        assert ask("GET", "/orders", "a.b.c") == 401
        assert ask("GET", "/orders", token) == 200
        if name != "asgi_app":
            assert ask("POST", "/payments", token) == 200
            assert ask("POST", "/payments", None) == 401
        status, _, _ = call(issuer.address, "/api/logout", {}, headers=bearer(token))
        assert status == 200
        until(lambda: ask("GET", "/orders", token) == 401, within=WAIT, what="the logout")
    finally:
        verifier.close()


@pytest.mark.parametrize("name", APPLICATIONS)
def test_when_the_issuer_is_not_heard_sensitive_routes_stop_first(name: str, issuer: Server, desk: Desk) -> None:
    patient = VERIFY.files("patient.py")[0]
    # The page's lease is five seconds; a test does not wait for that.
    assert "feed_lease=timedelta(seconds=5)" in patient
    patient = patient.replace("feed_lease=timedelta(seconds=5)", "feed_lease=timedelta(milliseconds=600)")
    desk.write(patient.replace("# patient.py", "# verifying.py"), example=issuer.address)
    desk.write(VERIFY.files(f"{name}.py")[0])
    verifying, module = desk.load("verifying", name)
    verifier: Verifier = verifying.verifier
    try:
        verifier.start()
        assert verifier.wait_until_ready(WAIT)
        token = signed_in(issuer)["access_token"]
        ask = asking(name, module.app)
        until(lambda: ask("POST", "/payments", token) != 503, within=WAIT, what="a fresh list")
        issuer.child.kill()
        until(lambda: ask("POST", "/payments", token) == 503, within=WAIT, what="the end of the lease")
        assert not verifier.status.fresh
        assert ask("GET", "/orders", token) == 200, "until silence_bound"
        assert ask("GET", "/orders", "a.b.c") == 401, "a bad token is bad at any time"
    finally:
        verifier.close()


def test_by_default_silence_stops_every_route_and_nothing_is_accepted_before_the_first_list(
    issuer: Server, desk: Desk
) -> None:
    text = VERIFY.files("verifying.py")[0]
    quick = "\n    feed_lease=__import__('datetime').timedelta(milliseconds=600),\n)"
    desk.write(text.rstrip()[:-2] + quick + "\n", example=issuer.address)
    desk.write(VERIFY.files("fastapi_app.py")[0])
    verifying, module = desk.load("verifying", "fastapi_app")
    verifier: Verifier = verifying.verifier
    try:
        token = signed_in(issuer)["access_token"]
        service = client(module.app)
        early = service.get("/orders", headers=bearer(token))
        if early.status_code == 503:
            assert (early.json()["code"], early.headers["retry-after"]) == ("revocations_unknown", "1")
        assert verifier.wait_until_ready(WAIT)
        until(
            lambda: service.get("/orders", headers=bearer(token)).status_code == 200, within=WAIT, what="a fresh list"
        )
        issuer.child.kill()
        until(lambda: service.get("/orders", headers=bearer(token)).status_code == 503, within=WAIT, what="silence")
        told = service.get("/orders", headers=bearer(token))
        assert (told.json()["code"], "retry-after" in told.headers) == ("revocations_unknown", True)
    finally:
        verifier.close()


def test_there_is_no_session_over_a_verifier(issuer: Server, desk: Desk) -> None:
    desk.write(VERIFY.files("verifying.py")[0], example=issuer.address)
    desk.write(VERIFY.files("fastapi_app.py")[0])
    verifying, module = desk.load("verifying", "fastapi_app")
    try:
        with pytest.raises(ConfigurationError, match=r"auth\.session"):
            module.auth.session().send(None)
    finally:
        verifying.verifier.close()


# -- rotate signing keys -------------------------------------------------------------------------------------------

ROTATE = Page("rotate-signing-keys.md")


def test_the_commands_about_keys_do_what_the_page_says(desk: Desk) -> None:
    look, rotate, retire, retire_all = ROTATE.lines()
    with serving("--profile", "b2c", directory=desk.directory) as running:
        _, *words = shlex.split(look)

        def keys() -> list[dict[str, Any]]:
            """What the command says; it is run as a person types it once, below."""
            found: list[dict[str, Any]] = answer(*words)["keys"]
            return found

        def states() -> list[str]:
            return [each["state"] for each in keys()]

        as_typed = json.loads(desk.run(f"{look} --json"))["keys"]
        assert [each["state"] for each in as_typed] == ["signing"]
        assert keys() == as_typed
        assert "published" in desk.run(rotate)
        assert states() == ["published", "signing"]
        first = keys()[1]
        assert first["verifies_until"] is not None
        assert "wait for that" in refused(*shlex.split(rotate)[1:], status=1)
        assert "withdrew" in desk.run(retire.replace("KID", first["kid"]))
        assert states() == ["signing"]
        credential = answer("client", "add", "orders")["feed_credential"]
        _, page, _ = call(running.address, "/revocations", headers=bearer(credential))
        assert [entry["kid"] for entry in page["entries"] if entry["kind"] == "kid"] == [first["kid"]]
        told = subprocess.run(
            ["/bin/sh", "-c", "coatcheck doctor --profile b2c"],
            cwd=desk.directory,
            env=desk.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "key ring:" in told.stdout
        assert "signing key:" in told.stdout
        assert "withdrew 1 key;" in desk.run(retire_all)
        assert states() == []


def test_an_empty_ring_and_a_new_server_key_end_access_tokens_and_nothing_else(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'app.db'}"

    def settings(key: bytes) -> Settings:
        return Settings(public_url=SHOP, server_key=key * 32, tokens=TokenSettings())

    with Coatcheck(url, settings=settings(b"a")) as coat:
        session = coat.session(None)
        session.login("50")
        old = session.tokens(carrier="body")
    with sqlite3.connect(tmp_path / "app.db") as database:
        database.execute("delete from coatcheck_ring")
    database.close()
    with Coatcheck(url, settings=settings(b"b")) as coat:
        with pytest.raises(TokenInvalid):
            coat.verify(old.access_token)
        assert old.refresh_token is not None
        assert coat.verify(coat.refresh(old.refresh_token).access_token).subject == "50"


# -- streams and WebSockets ----------------------------------------------------------------------------------------

STREAMS = Page("streams-and-websockets.md")


def test_the_page_about_streams_shows_one_file() -> None:
    assert STREAMS.names() == ["live.py"]
    assert STREAMS.lines() == []


def test_a_chat_and_a_stream_are_closed_when_their_session_is_ended(desk: Desk) -> None:
    desk.write(STREAMS.python[0])
    (live,) = desk.load("live")
    chat_address = f"{SHOP.replace('http:', 'ws:')}/chat"
    with client(live.app) as browser, ThreadPoolExecutor(1) as aside:
        assert browser.get("/news").status_code == 401
        with pytest.raises(WebSocketDenialResponse), browser.websocket_connect(chat_address):
            pass
        browser.post("/login")
        # The test client hands out a response when it is whole.
        news = aside.submit(browser.get, "/news")
        with browser.websocket_connect(chat_address) as chat:
            chat.send_text("hello")
            assert chat.receive_text() == "50: hello"
            assert not news.done()
            assert browser.post("/end").json() == {"ended": 1}
            with pytest.raises(WebSocketDisconnect) as closed:
                chat.receive_text()
        assert (closed.value.code, closed.value.reason) == (1008, "session_ended")
        told = news.result(WAIT)
        # On a slow machine the request may come after the end.
        assert (told.status_code, told.text) == (200, "data: hello\n\n") or told.json()["code"] == "session_ended"


# -- change the profile --------------------------------------------------------------------------------------------

SWITCH = Page("change-profile.md")


def test_the_commands_about_another_profile_keep_somebody_signed_in(desk: Desk) -> None:
    compare, serve, login, to_tokens, refresh, forget, to_session, me = SWITCH.lines()
    assert "carries" in desk.run(compare)
    flags = tuple(shlex.split(serve.removeprefix("coatcheck serve")))

    def said(line: str, running: Server) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(desk.run(line.replace(ISSUER, running.address)))
        return found

    with serving(directory=desk.directory, name="admin") as admin:
        answer("user", "add", "ratia", "--password-stdin", stdin=f"{PASSWORD}\n")
        sid = said(login, admin)["session"]["sid"]
    with serving(*flags, directory=desk.directory, name="b2c") as b2c:
        told = said(to_tokens, b2c)
        assert told.keys() == {"sid", "access_token", "token_type", "expires_in"}
        assert told["sid"] == sid
        assert said(refresh, b2c)["token_type"] == "Bearer"
    with serving(directory=desk.directory, name="admin again") as admin:
        assert said(me.replace("alone", "jar"), admin)["session"]["sid"] == sid, "the session cookie still counts"
        desk.run(forget)
        assert said(me, admin)["code"] == "login_required"
        assert said(to_session, admin) == {"sid": sid}
        assert said(me, admin)["session"]["sid"] == sid


def test_the_page_about_another_profile_shows_no_file() -> None:
    assert SWITCH.names() == []


# -- bind a session to its place -----------------------------------------------------------------------------------

BIND = Page("bind-a-session-to-its-place.md")
HOME, NEXT_DOOR, AWAY = "203.0.113.7", "203.0.114.7", "198.51.100.66"
IN = (200, None)


def visitor(shop: ModuleType, peer: str, like: TestClient | None = None) -> TestClient:
    """Somebody at this address; with `like`, the holder of a copy of all cookies."""
    made = TestClient(shop.app, base_url=SHOP, client=(peer, 50_000))
    if like is not None:
        made.cookies.update(like.cookies)
    return made


def seen(browser: TestClient) -> tuple[int, str | None]:
    answer = browser.get("/dashboard")
    return answer.status_code, answer.json().get("code")


def bound(desk: Desk, version: int = 0, *, on_mismatch: str = "block") -> ModuleType:
    text = BIND.files("settings.py")[version]
    assert text.count('on_mismatch="block"') == 1
    desk.write(text.replace('on_mismatch="block"', f'on_mismatch="{on_mismatch}"'))
    desk.write(BIND.files("shop.py")[0])
    (shop,) = desk.load("shop")
    return shop


def test_every_block_about_places_is_one_of_those_that_are_run() -> None:
    assert BIND.names() == ["settings.py", "shop.py", "settings.py"]
    assert BIND.lines() == []


def test_the_page_about_places_has_every_outcome_and_every_flag_of_the_server() -> None:
    text = (ROOT / "docs" / "how-to" / "bind-a-session-to-its-place.md").read_text("utf-8")
    assert [row[0] for row in rows(text, "`on_mismatch`", "who comes from elsewhere")] == [
        f"`{each}`" for each in OUTCOMES if each != "allow"
    ]
    flags = {flag for option in serve.params for flag in option.opts}
    named = set(re.findall(r"`(--[a-z-]+)`", text))
    assert {"--geo", "--on-mismatch"} < named <= flags


@pytest.mark.parametrize(
    ("on_mismatch", "elsewhere", "at_home"),
    [
        ("notify", IN, IN),
        ("step_up", (403, "step_up_required"), IN),
        ("block", (403, "place_refused"), (403, "step_up_required")),
        ("revoke", (401, "session_ended"), (401, "session_ended")),
    ],
)
def test_a_copied_cookie_meets_what_the_page_says(
    on_mismatch: str,
    elsewhere: tuple[int, str | None],
    at_home: tuple[int, str | None],
    desk: Desk,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shop = bound(desk, on_mismatch=on_mismatch)
    with visitor(shop, HOME) as owner:
        assert owner.post("/login", json=RIGHT).status_code == 200
        assert seen(owner) == IN
        thief = visitor(shop, AWAY, like=owner)
        thief.portal = owner.portal
        assert [seen(thief), seen(owner)] == [elsewhere, at_home]
        seen(thief)
        told = [each.getMessage() for each in caplog.records if each.name == "shop"]
        assert told == [f"50: {on_mismatch}, network"]
        if on_mismatch == "revoke":
            return
        # He guesses where the password is asked for, and where it is not.
        assert thief.post("/step-up", json={**RIGHT, "password": "guess"}).status_code == 401
        assert owner.post("/step-up", json=RIGHT).status_code == 200
        assert seen(owner) == IN
        assert seen(thief)[0] == 401, "his copy is of the old id"


def test_whoever_has_moved_goes_on_after_the_password(desk: Desk) -> None:
    shop = bound(desk, on_mismatch="step_up")
    with visitor(shop, HOME) as owner:
        owner.post("/login", json=RIGHT)
        moved = visitor(shop, AWAY, like=owner)
        moved.portal = owner.portal
        assert seen(moved) == (403, "step_up_required")
        assert moved.post("/step-up", json=RIGHT).status_code == 200
        assert seen(moved) == IN


def test_the_other_address_family_is_told_and_let_in(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    shop = bound(desk)
    with visitor(shop, HOME) as owner:
        owner.post("/login", json=RIGHT)
        by_six = visitor(shop, "2001:db8::7", like=owner)
        by_six.portal = owner.portal
        assert [seen(by_six), seen(owner)] == [IN, IN]
    told = [each.getMessage() for each in caplog.records if each.name == "shop"]
    assert told == ["50: notify, another address family"]


def test_no_password_opens_a_blocked_place(desk: Desk) -> None:
    shop = bound(desk)
    with visitor(shop, HOME) as owner:
        owner.post("/login", json=RIGHT)
        thief = visitor(shop, AWAY, like=owner)
        thief.portal = owner.portal
        assert seen(thief) == (403, "place_refused")
        assert thief.post("/step-up", json=RIGHT).status_code == 401
        assert seen(thief) == (403, "place_refused")


def test_another_device_in_the_same_network_is_another_place(desk: Desk) -> None:
    shop = bound(desk)
    with visitor(shop, HOME) as owner:
        owner.post("/login", json=RIGHT)
        device = owner.cookies["shop_device"]
        thief = visitor(shop, HOME, like=owner)
        thief.portal = owner.portal
        del thief.cookies["shop_device"]
        assert seen(thief) == (403, "place_refused")
        assert owner.post("/step-up", json=RIGHT).status_code == 200
        assert owner.post("/login", json=RIGHT).status_code == 200
        assert owner.cookies["shop_device"] == device, "the same browser at its next sign-in"


def test_the_network_of_an_operator_is_one_place_with_a_table_of_addresses(desk: Desk) -> None:
    writer = pytest.importorskip("mmdb_writer")
    netaddr = pytest.importorskip("netaddr")
    pytest.importorskip("maxminddb")
    made = writer.MMDBWriter(ip_version=6, ipv4_compatible=True)
    made.insert_network(netaddr.IPSet(["203.0.112.0/22"]), {"autonomous_system_number": 64496})
    made.insert_network(netaddr.IPSet(["198.51.100.0/24"]), {"autonomous_system_number": 64497})
    made.to_db_file(str(desk.directory / "asn.mmdb"))
    shop = bound(desk, 1)
    with visitor(shop, HOME) as owner:
        owner.post("/login", json=RIGHT)
        for peer, found in ((NEXT_DOOR, IN), (AWAY, (403, "place_refused"))):
            holder = visitor(shop, peer, like=owner)
            holder.portal = owner.portal
            assert seen(holder) == found
