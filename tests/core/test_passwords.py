from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.passwords import (
    Password,
    PasswordPolicy,
    PasswordRefused,
    check_new_password,
    parse_password,
)
from coatcheck.errors import ConfigurationError

POLICY = PasswordPolicy()
LONG_UNOBVIOUS = "violet kettle drums past a quiet harbour, twice each winter "


def parsed(typed: object) -> Password:
    password = parse_password(typed, policy=POLICY)
    assert isinstance(password, Password), password
    return password


def refusal(typed: str, *names: str, policy: PasswordPolicy = POLICY) -> str | None:
    password = parse_password(typed, policy=policy)
    if isinstance(password, PasswordRefused):
        return password.reason
    refused = check_new_password(password, policy=policy, names=names)
    return None if refused is None else refused.reason


def test_composed_and_decomposed_spellings_are_one_password() -> None:
    for text in ("wörter und zähne", "한국어로 쓴 암호입니다 정말"):
        assert parsed(unicodedata.normalize("NFD", text)).octets == parsed(text).octets == text.encode()


def test_nothing_but_composition_is_changed() -> None:
    # No case folding, no trimming, no compatibility forms (ASVS 6.2.8).
    for text in (" leading", "trailing ", "UPPER", "ｗｉｄｅ", "nul\x00inside", "line\nend", "tab\t"):
        assert parsed(text).octets == text.encode()


@pytest.mark.parametrize("typed", [None, 7, b"bytes", [], {}])
def test_what_is_not_text_is_refused(typed: object) -> None:
    assert parse_password(typed, policy=POLICY) == PasswordRefused(reason="not_text")


def test_lone_surrogates_are_refused() -> None:
    assert parse_password("long enough to be one \ud800", policy=POLICY) == PasswordRefused(reason="not_unicode")


def test_the_upper_limit_is_exact_before_and_after_normalising() -> None:
    assert len(parsed("x" * 1024).octets) == 1024
    assert parse_password("x" * 1025, policy=POLICY) == PasswordRefused(reason="too_long")
    # U+0958 is written as two code points in NFC.
    assert len(parsed("\u0958" * 512).octets) == 512 * 6
    assert parse_password("\u0958" * 513, policy=POLICY) == PasswordRefused(reason="too_long")


def test_ten_megabytes_are_refused() -> None:
    assert parse_password("\u0301" * 10_000_000, policy=POLICY) == PasswordRefused(reason="too_long")


def test_the_lower_limit_counts_code_points_after_composition() -> None:
    assert refusal("gyre wabe mimsy"[:14]) == "too_short"
    assert refusal("gyre wabe mimsy") is None
    assert refusal("ë한국 wabe mimsy gy"[:15]) is None
    assert refusal(unicodedata.normalize("NFD", "gyre wabe mims") + "\u0301") == "too_short"


@pytest.mark.parametrize("length", [64, 128, 1024])
def test_long_passwords_are_allowed(length: int) -> None:
    text = (LONG_UNOBVIOUS * 20)[:length]
    assert refusal(text) is None


@pytest.mark.parametrize(
    "typed",
    [
        "all lower case without digits",
        "ALL UPPER AND NOTHING ELSE",
        " " * 15,
        "🦊🐙🦜🌵🍜🧊🪁🎷🛶🧵🪗🦔🍋🌘🧲",
        "59 17 02 88 46 31 90",
    ],
)
def test_any_composition_is_allowed(typed: str) -> None:
    assert refusal(typed) is None


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("aaaaaaaaaaaaaaa", "repeated"),
        ("abcabcabcabcabc", "repeated"),
        ("비밀번호비밀번호비밀번호비밀번호", "repeated"),
        ("password1234567", "common"),
        ("passwordpassword", "common"),
        ("Password Password", "common"),
        ("P@ssw0rd!2024!!!", "common"),
        ("123456789012345", "common"),
        ("987654321098765", "common"),
        ("abcdefghijklmnop", "common"),
        ("qwertyuiopasdfg", "common"),
        ("qwertyuiop12345", "common"),
        ("1qaz2wsx3edc4rfv", "common"),
        ("iloveyouiloveyou", "common"),
        ("welcome2024welcome2024", "common"),
        ("correct horse battery staple", "common"),
        ("correcthorsebatterystaple", "common"),
        ("thisismypassword", "common"),
        ("qlalfqjsghqlalfqjsgh", "common"),
        ("!@#$%^&*()!@#$%", "common"),
        ("coatcheckcoatcheck", "context"),
        ("Coatcheck-2024-2024", "context"),
        ("minsukim minsukim", "context"),
        ("minsukimpassword", "context"),
        ("m1nsukim@example.org", "context"),
    ],
)
def test_what_guessing_programs_try_first_is_refused_with_the_reason(typed: str, why: str) -> None:
    assert refusal(typed, "Minsukim@example.org") == why


@pytest.mark.parametrize(
    "typed",
    ["my dog eats blue cheese at noon", "ooTh6aiyo4eexeek", "letmein837264951038", "비 오는 날에는 부침개를 먹는다"],
)
def test_common_words_among_others_are_allowed(typed: str) -> None:
    assert refusal(typed, "minsu@example.org") is None


def test_names_of_the_account_are_refused_only_for_that_account() -> None:
    assert refusal("gwendolyn gwendolyn", "gwendolyn") == "context"
    assert refusal("gwendolyn gwendolyn", "minsu") is None


def test_a_list_of_compromised_passwords_is_compared_without_regard_to_case() -> None:
    policy = PasswordPolicy(blocked=frozenset({"Ooth6Aiyo4eexeek"}))
    assert refusal("ooTh6aiyo4eexeek", policy=policy) == "blocked"
    assert refusal("ooTh6aiyo4eexeek!", policy=policy) is None


def test_the_worst_texts_cost_little() -> None:
    for text in ("\ufdfa" * 1024, "qwertyuiop" * 102, "a" * 1023 + "b", "12345678" * 128, "pass" * 255 + "x"):
        refusal(text, "a" * 128)


@pytest.mark.parametrize(("field", "value"), [("minimum", 7), ("minimum", 65), ("maximum", 63), ("maximum", 4097)])
def test_an_unsafe_policy_is_refused(field: str, value: int) -> None:
    with pytest.raises(ConfigurationError, match=field):
        PasswordPolicy(**{field: value})  # type: ignore[arg-type]


def test_a_password_is_never_shown() -> None:
    assert "violet" not in f"{parsed('violet kettle drums')!r} {parsed('violet kettle drums')}"


@given(st.text(alphabet=st.characters(), max_size=60))
def test_no_text_raises(typed: str) -> None:
    refusal(typed, typed)


@given(st.text(alphabet="abcxyz019@ ", min_size=15, max_size=30))
def test_doubling_an_obvious_password_does_not_make_it_better(typed: str) -> None:
    if refusal(typed) == "common":
        assert refusal(typed + typed) in ("common", "repeated")
