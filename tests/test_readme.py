"""The code that the README shows is run as it stands there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from starlette.testclient import TestClient

from coatcheck import Coatcheck, Settings
from tests.server.command_parts import PASSWORD, call, run, serving

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", README.read_text("utf-8"), flags=re.DOTALL)


def block(marker: str) -> str:
    found = [text for text in BLOCKS if marker in text]
    assert len(found) == 1, f"{len(found)} blocks hold {marker!r}"
    return str(found[0])


def test_every_block_is_one_of_those_that_are_run() -> None:
    assert len(BLOCKS) == 4


def test_the_fastapi_application_signs_in_and_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # FastAPI resolves annotations by the module's globals, as in a file of one's own.
    names: dict[str, Any] = {"__name__": "readme"}
    exec(block('keep=("cart",)'), names)  # noqa: S102 - our own README
    with TestClient(names["app"], base_url="https://shop.test") as client:
        assert client.get("/dashboard").status_code == 401
        assert client.post("/login").json() == {"message": "ok"}
        assert client.get("/dashboard").json() == {"user": "50", "role": "admin"}
        assert client.post("/logout").json() == {"message": "bye"}
        assert client.get("/dashboard").status_code == 401


def test_the_application_with_tokens_signs_in_and_refreshes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(block("TokenSettings()"), names)  # noqa: S102 - our own README
    with (
        TestClient(names["app"], base_url="https://shop.example") as browser,
        TestClient(names["app"], base_url="https://shop.example") as api,
    ):
        assert api.get("/dashboard").status_code == 401
        assert browser.post("/refresh").status_code == 401
        answer = browser.post("/login")
        assert answer.json()["expires_in"] == 900
        assert {line.partition("=")[0] for line in answer.headers.get_list("set-cookie")} == {
            "__Host-Http-session",
            "__Host-Http-refresh",
        }
        assert "httponly" in answer.headers.get_list("set-cookie")[1].lower()
        for tokens in (answer.json(), browser.post("/refresh").json()):
            held = {"authorization": f"Bearer {tokens['access_token']}"}
            assert api.get("/dashboard", headers=held).json() == {"user": "50", "role": "admin"}
        assert browser.get("/dashboard").json() == {"user": "50", "role": "admin"}


def test_the_commands_about_tokens_serve_what_their_comments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (shell,) = [text for text in SHELL if "b2c" in text]
    serve, add = (shlex.split(line, comments=True) for line in shell.splitlines())
    assert (serve[:2], add[0]) == (["./run", "serve"], "./run")
    with serving(*serve[2:], directory=tmp_path) as running:
        credential = run(*add[1:]).stdout.strip()
        assert run("user", "add", "ratia", "--password-stdin", stdin=PASSWORD).exit_code == 0
        sent = {"username": "ratia", "password": PASSWORD, "carrier": "body"}
        status, told, _ = call(running.address, "/api/login", sent)
        assert (status, told["token_type"]) == (200, "Bearer")
        held = {"authorization": f"Bearer {told['access_token']}"}
        renewed = {"carrier": "body", "refresh_token": told["refresh_token"]}
        assert call(running.address, "/api/refresh", renewed)[0] == 200
        assert call(running.address, "/api/me", headers=held)[0] == 200
        assert call(running.address, "/.well-known/jwks.json")[1]["keys"][0]["alg"] == "ES256"
        assert call(running.address, "/api/logout", {}, headers=held)[0] == 200
        assert call(running.address, "/api/me", headers=held)[0] == 401
        status, page, _ = call(running.address, "/revocations", headers={"authorization": f"Bearer {credential}"})
        assert (status, [entry["kind"] for entry in page["entries"]]) == (200, ["sid"])


def test_the_flask_lines_sign_in(tmp_path: Path) -> None:
    app = Flask(__name__)
    wiring, _, view = block("CoatcheckMiddleware(app.wsgi_app").partition("# in a view:\n")
    url = f"sqlite:///{tmp_path / 'app.db'}"
    names: dict[str, Any] = {"app": app, "request": request}
    exec(wiring.replace("redis://cache", url), names)  # noqa: S102 - our own README

    @app.post("/login")
    def login() -> str:
        exec(view, names)  # noqa: S102 - our own README
        return "ok"

    client = app.test_client()
    assert client.post("/login", base_url="https://shop.test").status_code == 200
    with Coatcheck(url) as coat:
        assert [each.subject for each in coat.list_sessions("50").items] == ["50"]


def test_the_flask_lines_answer_503_when_the_store_is_away() -> None:
    app = Flask(__name__)
    wiring, _, view = block("CoatcheckMiddleware(app.wsgi_app").partition("# in a view:\n")
    names: dict[str, Any] = {"app": app, "request": request}
    # Nothing listens on port 1 of this machine: a dead store.
    exec(wiring.replace("redis://cache", "redis://127.0.0.1:1"), names)  # noqa: S102 - our own README

    @app.post("/login")
    def login() -> str:
        exec(view, names)  # noqa: S102 - our own README
        return "ok"

    answered = app.test_client().post("/login", base_url="https://shop.test")
    assert (answered.status_code, answered.headers["Retry-After"]) == (503, "1")
    assert "Set-Cookie" not in answered.headers


def test_the_operators_lines_end_every_session_of_a_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path / 'app.db'}"
    monkeypatch.setenv("COATCHECK_STORE", url)
    with Coatcheck(url, settings=Settings()) as coat:
        coat.session(None).login("50")
        exec(block("Coatcheck.from_env()"), {"Coatcheck": Coatcheck})  # noqa: S102 - our own README
        assert coat.list_sessions("50").items == ()
