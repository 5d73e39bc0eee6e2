"""The promise: which names there are, what importing them costs, and which types they have."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import coatcheck
from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    Coatcheck,
    CoatcheckError,
    Event,
    Page,
    Principal,
    Revocation,
    Session,
    SessionFilter,
    SessionSummary,
    Settings,
)

PACKAGE = Path(coatcheck.__file__).parent


# -- names ---------------------------------------------------------------------------------------------------------


def test_all_is_sorted_and_every_name_resolves() -> None:
    assert coatcheck.__all__ == sorted(coatcheck.__all__)
    assert dir(coatcheck) == sorted(coatcheck.__all__)
    for name in coatcheck.__all__:
        assert getattr(coatcheck, name) is not None


def test_all_is_complete() -> None:
    # The three lists of __init__ (for readers, for type checkers, for the interpreter) must not drift apart.
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coatcheck")
        for alias in node.names
    }
    homes: Mapping[str, str] = coatcheck._HOME_OF
    assert set(coatcheck.__all__) == typed | {"__version__"} == set(homes) | {"__version__"}


def test_the_names_of_this_release_are_there() -> None:
    promised = {
        "AsyncCoatcheck",
        "AsyncSession",
        "Coatcheck",
        "CoatcheckError",
        "ConfigurationError",
        "CookieSettings",
        "Event",
        "Forbidden",
        "LoginRequired",
        "Page",
        "Principal",
        "Revocation",
        "Session",
        "SessionClosed",
        "SessionFilter",
        "SessionLimitReached",
        "SessionNotLoaded",
        "SessionSummary",
        "Settings",
        "StoreUnavailable",
        "__version__",
        "device_name",
        "device_of",
        "settings_of",
    }
    assert promised <= set(coatcheck.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coatcheck.nothing


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("module", ["asgi", "wsgi", "starlette", "fastapi"])
def test_every_adapter_has_its_middleware(module: str) -> None:
    adapter = __import__(f"coatcheck.web.{module}", fromlist=["x"])
    assert hasattr(adapter, "CoatcheckMiddleware")
    if module in ("asgi", "wsgi"):
        assert hasattr(adapter, "session_of")
    if module == "fastapi":
        assert hasattr(adapter, "Auth")


def all_errors(root: type[CoatcheckError] = CoatcheckError) -> list[type[CoatcheckError]]:
    return [root, *(each for below in root.__subclasses__() for each in all_errors(below))]


def test_error_codes_are_unique_and_texts_give_nothing_away() -> None:
    codes = [each.__dict__["code"] for each in all_errors() if "code" in each.__dict__]
    assert len(codes) == len(set(codes))
    for each in all_errors():
        assert each.code == each.code.lower()
        assert 400 <= each.status < 600
        assert each.title.endswith(".")


# -- what importing costs ------------------------------------------------------------------------------------------


def loaded_by(statement: str) -> set[str]:
    """Top-level names of what a fresh interpreter has loaded afterwards, beyond its own start."""
    script = f"import sys, json; old = set(sys.modules); {statement}; print(json.dumps(sorted(set(sys.modules) - old)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


def third_party(names: set[str]) -> set[str]:
    return {name for name in names if name not in sys.stdlib_module_names and name != "coatcheck"}


def test_importing_the_package_loads_no_other() -> None:
    names = loaded_by("import coatcheck")
    assert third_party(names) == set()
    assert "asyncio" not in names


FRAMEWORKS = {"django", "fastapi", "flask", "litestar", "starlette", "pydantic"}
DRIVERS = {"psycopg", "psycopg_pool", "redis", "valkey", "hiredis", "sqlite3"}
SERVER = {"argon2", "click", "jinja2", "prometheus_client", "rich", "uvicorn"}


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import coatcheck.web.asgi", set[str]()),
        ("import coatcheck.web.wsgi", set[str]()),
        ("from coatcheck import Coatcheck; Coatcheck('memory:')", set[str]()),
        ("from coatcheck import AsyncCoatcheck; AsyncCoatcheck('memory:')", set[str]()),
        ("from coatcheck import Coatcheck; Coatcheck('sqlite:///x.db')", {"sqlite3"}),
        ("from coatcheck import device_name, device_of, settings_of", set[str]()),
        ("import coatcheck.testing", set[str]()),
        ("import coatcheck.web.starlette", {"starlette"}),
        ("import coatcheck.web.fastapi", {"fastapi", "starlette", "pydantic"}),
    ],
)
def test_an_import_loads_what_it_needs_and_nothing_else(statement: str, allowed: set[str]) -> None:
    names = loaded_by(statement)
    assert names & (FRAMEWORKS | DRIVERS | SERVER | {"joserfc"}) - allowed - {"rich"} == set()


@pytest.mark.parametrize("statement", ["import coatcheck.web.asgi", "import coatcheck.web.wsgi"])
def test_a_session_without_tokens_needs_two_packages(statement: str) -> None:
    assert third_party(loaded_by(statement)) <= {
        "msgspec",
        "cryptography",
        # What these two bring along.
        "_cffi_backend",
        "_openssl",
        "typing_extensions",
        # Read by cryptography where something else has installed it.
        "bcrypt",
    }


# -- types, checked by mypy and basedpyright; never called ---------------------------------------------------------

if TYPE_CHECKING:
    from typing import assert_type

    from coatcheck.core.values import Json
    from coatcheck.web import asgi, wsgi
    from coatcheck.web.fastapi import Auth

    def blocking(coat: Coatcheck, session: Session) -> None:
        assert_type(Coatcheck.from_env(), Coatcheck)
        assert_type(coat.session(None), Session)
        assert_type(coat.list_sessions("50"), Page[SessionSummary])
        assert_type(coat.find_sessions(SessionFilter()), Page[SessionSummary])
        assert_type(coat.revoke_session("sid", reason="x"), Revocation)
        assert_type(coat.revoke_subject("50", reason="x", keep_sid=None, wait=True), Revocation)
        assert_type(coat.revoke_where(SessionFilter(), reason="x"), Revocation)
        assert_type(session.subject, str | None)
        assert_type(session.principal, Principal | None)
        assert_type(session.require_login(), Principal)
        assert_type(session.claims, Mapping[str, Json])
        assert_type(session["x"], Json)
        assert_type(session.login("50"), None)
        fields: MutableMapping[str, Json] = session
        fields["x"] = {"nested": [1, 2.5, None, "text"]}
        with coat as same:
            assert_type(same, Coatcheck)

    async def asynchronous(coat: AsyncCoatcheck, session: AsyncSession) -> None:
        assert_type(AsyncCoatcheck.from_env(), AsyncCoatcheck)
        assert_type(coat.session(None), AsyncSession)
        assert_type(await coat.list_sessions("50"), Page[SessionSummary])
        assert_type(await coat.revoke_subject("50", reason="x"), Revocation)
        assert_type(await session.login("50", claims={"role": "admin"}, keep=("cart",)), None)
        assert_type(await session.logout(), None)
        async with coat as same:
            assert_type(same, AsyncCoatcheck)

    def web(scope: asgi.Scope, environ: wsgi.Environ, auth: Auth, page: Page[SessionSummary], event: Event) -> None:
        assert_type(asgi.session_of(scope), AsyncSession)
        assert_type(wsgi.session_of(environ), Session)
        assert_type(page.items, tuple[SessionSummary, ...])
        assert_type(page.cursor, str | None)
        assert_type(Settings().idle_timeout, timedelta)
        on_event: Callable[[Event], None] = lambda event: None  # noqa: E731
        Coatcheck("memory:", on_event=on_event)
        anything: Any = event.data
        del anything
