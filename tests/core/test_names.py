from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.names import MAX_NAME_CHARACTERS, NameRefused, UserName, parse_user_name


def key(typed: object) -> str:
    name = parse_user_name(typed)
    assert isinstance(name, UserName), name
    return name.key


def reason(typed: object) -> str:
    refused = parse_user_name(typed)
    assert isinstance(refused, NameRefused), refused
    return refused.reason


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("Minsu", "minsu"),
        ("MINSU@EXAMPLE.ORG", "minsu@example.org"),
        ("  minsu ", "minsu"),
        ("straße", "STRASSE"),
        ("\u212aelvin", "kelvin"),
        ("\u017fun", "sun"),
        ("ｍｉｎｓｕ", "minsu"),
        ("ﬁnn", "finn"),
        (unicodedata.normalize("NFD", "김민수"), "김민수"),
        (unicodedata.normalize("NFD", "zoë"), "ZOË"),
        ("ΣΊΣΥΦΟς", "σίσυφοσ"),
    ],
)
def test_names_that_read_the_same_have_one_key(left: str, right: str) -> None:
    assert key(left) == key(right)


def test_a_unicode_twin_of_an_address_is_another_account() -> None:
    # CVE-2019-19844: upper-casing made these one, and the reset link went to the typed address.
    assert key("mıke@example.org") != key("mike@example.org")
    assert key("mike@exampl\u0435.org") != key("mike@example.org")


def test_the_shown_name_keeps_its_spelling() -> None:
    name = parse_user_name("  Zoe\u0308 ")
    assert name == UserName(shown="Zoë", key="zoë")


@pytest.mark.parametrize(
    "typed",
    [
        "a\x00b",
        "a\nb",
        "a\x1b[31m",
        "a\u200bb",
        "a\u202eb",
        "a\u2028b",
        "a\ufeffb",
        "a\ud800b",
        "\ud83d",
        "a\ue000b",
        "a\U000e0041b",
        "a\u0378b",
        "\x85a",
    ],
)
def test_invisible_and_broken_characters_are_refused(typed: str) -> None:
    assert reason(typed) == "characters"


@pytest.mark.parametrize("typed", ["min su", "min\u00a0su", "min\u3000su", "min\u00a8su"])
def test_spaces_inside_are_refused_whatever_they_are_written_as(typed: str) -> None:
    assert reason(typed) == "spaces"


@pytest.mark.parametrize("typed", ["", "   "])
def test_an_empty_name_is_refused(typed: str) -> None:
    assert reason(typed) == "empty"


@pytest.mark.parametrize("typed", [None, 7, b"minsu", ["minsu"], {"name": "minsu"}])
def test_what_is_not_text_is_refused(typed: object) -> None:
    assert reason(typed) == "not_text"


def test_the_length_limit_is_exact() -> None:
    assert key("a" * MAX_NAME_CHARACTERS) == "a" * MAX_NAME_CHARACTERS
    assert reason("a" * (MAX_NAME_CHARACTERS + 1)) == "too_long"


def test_the_limit_holds_for_the_key_as_well() -> None:
    assert key("ß" * 64) == "ss" * 64
    assert reason("ß" * 65) == "too_long"


def test_ten_megabytes_are_refused_before_they_are_looked_at() -> None:
    assert reason(" " * 10_000_000) == "too_long"


@given(st.text(max_size=40))
def test_a_key_is_its_own_key_and_bounded(typed: str) -> None:
    name = parse_user_name(typed)
    if isinstance(name, UserName):
        assert key(name.key) == name.key
        assert key(name.shown) == name.key
        assert 1 <= len(name.key) <= MAX_NAME_CHARACTERS
        assert name.key.isprintable()


@given(st.text(alphabet=st.characters(), max_size=20))
def test_no_text_raises(typed: str) -> None:
    parse_user_name(typed)
