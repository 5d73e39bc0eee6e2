"""The pages about standards name tests that exist, links in the documentation lead somewhere, and what only these
pages say is shown here."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from fastapi import Depends, FastAPI, Security
from starlette.testclient import TestClient

from coatcheck import AsyncCoatcheck, AsyncSession, Coatcheck, Principal, Settings, TokenSettings
from coatcheck.testing import FakeSystem
from coatcheck.web.fastapi import Auth

ROOT = Path(__file__).resolve().parents[2]
STANDARDS = ROOT / "docs" / "rfc"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "examples" / "README.md"])
SITE = "https://shop.test"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    for path, name in re.findall(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", page.read_text("utf-8")):
        assert (ROOT / path).is_file(), path
        assert not name or name in functions(ROOT / path), f"{path}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_standard_has_a_row_and_a_page() -> None:
    listed = re.findall(r"^\| \[(\d+)\]\((\d+)\.md\) \|", (STANDARDS / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(name for name, _ in listed) == sorted(page.stem for page in STANDARDS.glob("[0-9]*.md"))
    assert all(name == file for name, file in listed)


@pytest.mark.parametrize("page", sorted(STANDARDS.glob("[0-9]*.md")), ids=name_of)
def test_every_implemented_section_has_a_test(page: Path) -> None:
    text = page.read_text("utf-8")
    assert f"RFC {page.stem}" in text.splitlines()[0]
    told = [line for line in text.partition("## Refused")[0].splitlines() if re.match(r"\| [0-9A-Z]", line)]
    assert len(told) >= 5
    for line in told:
        assert "::test_" in line, line


def test_every_code_name_on_the_pages_exists() -> None:
    for page in sorted(STANDARDS.glob("[0-9]*.md")):
        for path in re.findall(r"`([\w/]+\.py)`", page.read_text("utf-8")):
            assert (ROOT / "src" / "coatcheck" / path).is_file(), f"{page.name}: {path}"


# -- RFC 6750, what no other test shows ----------------------------------------------------------------------------


@pytest.fixture
def visitor() -> Iterator[tuple[TestClient, str]]:
    """Somebody with nothing but an access token, and the token."""
    settings = Settings(public_url=SITE, tokens=TokenSettings())
    coat = AsyncCoatcheck("memory:", settings=settings)
    app = FastAPI()
    auth = Auth(coat)
    auth.install(app)

    async def login(session: AsyncSession = Depends(auth.session)) -> str:
        await session.login("50", scopes=("read",))
        return (await session.tokens(carrier="body")).access_token

    async def me(principal: Principal = Security(auth.user, scopes=["read"])) -> str:
        return principal.subject

    async def write(principal: Principal = Security(auth.user, scopes=["read", "write"])) -> str:
        return principal.subject

    app.add_api_route("/login", login, methods=["POST"])
    app.add_api_route("/me", me, methods=["GET", "POST"])
    app.add_api_route("/write", write, methods=["POST"])
    with TestClient(app, base_url=SITE) as client:
        token = client.post("/login").json()
        client.cookies.clear()
        yield client, token


def test_a_token_in_a_form_or_a_query_is_not_read(visitor: tuple[TestClient, str]) -> None:
    client, token = visitor
    assert client.get("/me", headers={"authorization": f"Bearer {token}"}).json() == "50"
    for answer in (
        client.get("/me", params={"access_token": token}),
        client.post("/me", data={"access_token": token}),
    ):
        assert (answer.status_code, answer.json()["code"]) == (401, "login_required")


def test_two_headers_and_other_schemes_are_refused(visitor: tuple[TestClient, str]) -> None:
    client, token = visitor
    good = ("authorization", f"Bearer {token}")
    for headers in ([good, good], [("authorization", f"DPoP {token}")], [("authorization", token)]):
        answer = client.get("/me", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, 'Bearer error="invalid_token"')


def test_missing_scopes_are_named(visitor: tuple[TestClient, str]) -> None:
    client, token = visitor
    answer = client.post("/write", headers={"authorization": f"Bearer {token}"})
    assert answer.status_code == 403
    assert answer.headers["www-authenticate"] == 'Bearer error="insufficient_scope", scope="write"'


# -- RFC 7515, RFC 7519, RFC 9068, what no other test shows --------------------------------------------------------


def test_json_detached_and_encrypted_forms_are_refused(visitor: tuple[TestClient, str]) -> None:
    client, token = visitor
    header, payload, signature = token.split(".")
    for form in (
        json.dumps({"protected": header, "payload": payload, "signature": signature}),
        json.dumps({"payload": payload, "signatures": [{"protected": header, "signature": signature}]}),
        f"{header}..{signature}",
        f"{header}.{payload}.{signature}.{signature}.{signature}",
    ):
        answer = client.get("/me", headers={"authorization": f"Bearer {form}"})
        assert (answer.status_code, answer.json()["code"]) == (401, "invalid_token"), form


def test_a_refresh_does_not_change_when_somebody_signed_in() -> None:
    clock = FakeSystem()
    with Coatcheck("memory:", settings=Settings(public_url=SITE, tokens=TokenSettings()), system=clock) as coat:
        session = coat.session(None)
        session.login("50", acr="2", amr=("pwd", "otp"))
        first = session.tokens(carrier="body")
        clock.advance(60)
        assert first.refresh_token is not None
        before, after = coat.verify(first.access_token), coat.verify(coat.refresh(first.refresh_token).access_token)
    assert after.issued_at == before.issued_at + 60
    assert (after.auth_time, after.acr, after.amr) == (before.auth_time, "2", ("pwd", "otp"))
