"""Where somebody is sent after signing in: never to another site (CWE-601, ASVS 3.7.2)."""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.server.return_path import MAX_CHARACTERS, parse_return_path

HOSTILE = [
    "",
    "account",
    "//evil.example",
    "///evil.example",
    "/\\evil.example",
    "\\\\evil.example",
    "/%09/evil.example",
    "/\t/evil.example",
    "/\n/evil.example",
    "/%0d%0aset-cookie:a=b",
    "/%2f/evil.example",
    "/%5cevil.example",
    "https://evil.example/",
    "https:evil.example",
    "javascript:alert(1)",
    "/@evil.example",
    "//user@evil.example",
    "/a//evil.example",
    "/../evil",
    "/./account",
    "/account/..",
    "/account#x",
    "/account\x00",
    "/account ",
    " /account",
    "/account\x7f",
    "/계정",
    "/account?x=\\",
    '/account?x="',
    "/account?x=<y>",
    "/account?x=\r\n",
    "/login",
    "/login?next=/login",
    "/logout",
    "/setup/abc",
    "/api/me",
    "/" + "a" * MAX_CHARACTERS,
    "/" + "a" * 50 + "!" * 50,
    "/a/" * 300 + "!",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_address_of_ours_is_none(text: str) -> None:
    assert parse_return_path(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "/",
        "/account",
        "/account/",
        "/a/b.c/d-e_f~g",
        "/account?tab=sessions&x=1",
        "/oauth/authorize?redirect_uri=https%3A%2F%2Fshop.example%2Fcb&scope=a+b",
        "/?x=//evil.example",
        "/" + "a" * (MAX_CHARACTERS - 1),
    ],
)
def test_an_address_of_ours_is_kept_as_it_is(text: str) -> None:
    assert parse_return_path(text) == text


def test_no_address_is_none() -> None:
    assert parse_return_path(None) is None


@given(st.text(alphabet="/\\.@:?#%09afx\t ", max_size=12))
def test_whatever_passes_stays_on_our_host(text: str) -> None:
    goal = parse_return_path(text)
    if goal is not None:
        for base in ("https://id.example/login", "http://127.0.0.1:8000/login"):
            assert urlsplit(urljoin(base, goal))[:2] == urlsplit(base)[:2]
