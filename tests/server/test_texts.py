"""The server's sentences: complete in both languages, and whoever asks gets his own."""

from __future__ import annotations

import string
from typing import get_args

import pytest
from jinja2 import Environment, PackageLoader, nodes

from coatcheck import errors
from coatcheck.core.names import NameRefusal
from coatcheck.core.passwords import PasswordRefusal
from coatcheck.core.ports import REASON_EVICTED, REASON_REUSED
from coatcheck.core.session import Death
from coatcheck.server.api import REASON_BY_USER
from coatcheck.server.negotiation import MAX_HEADER, MAX_MEMBERS
from coatcheck.server.sign_in import REASON_DISABLED, REASON_PASSWORD
from coatcheck.server.texts import TEXTS, Language, language_of, say, say_blocked, say_problem, say_reason, say_wait


def every_error() -> list[type[errors.CoatcheckError]]:
    found = [errors.CoatcheckError]
    for each in found:
        found += each.__subclasses__()
    return [each for each in found if each.__module__ == errors.__name__]


def fields_of(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


@pytest.mark.parametrize("key", TEXTS)
def test_both_languages_have_a_text_with_the_same_values(key: str) -> None:
    english, korean = TEXTS[key]
    assert english.strip() == english != ""
    assert korean.strip() == korean != ""
    assert fields_of(english) == fields_of(korean)
    assert english.isascii() or set(english) - set(map(chr, range(128))) <= set("’“”…")
    assert any("가" <= letter <= "힣" for letter in korean)


def test_every_error_code_has_a_text() -> None:
    assert {f"problem.{each.code}" for each in every_error()} == {key for key in TEXTS if key.startswith("problem.")}


def test_english_problem_texts_are_the_errors_own() -> None:
    own = {f"problem.{each.code}": each.title for each in every_error()}
    # Pages are no JSON API: there the advice to send JSON would be wrong.
    own["problem.unsupported_media_type"] = TEXTS["problem.unsupported_media_type"][0]
    own["problem.migration_required"] = errors.ConfigurationError.title
    assert {key: TEXTS[key][0] for key in own} == own


@pytest.mark.parametrize("reason", get_args(NameRefusal))
def test_every_refused_name_has_a_text(reason: str) -> None:
    assert say(f"name.{reason}", "ko")


@pytest.mark.parametrize("reason", get_args(PasswordRefusal))
def test_every_refused_password_has_a_text(reason: str) -> None:
    assert say(f"password.{reason}", "ko", minimum=15, maximum=1024)


@pytest.mark.parametrize(
    "reason",
    [*get_args(Death), REASON_BY_USER, REASON_DISABLED, REASON_EVICTED, REASON_PASSWORD, REASON_REUSED, "logout"],
)
@pytest.mark.parametrize("language", get_args(Language))
def test_every_reason_of_ours_is_said_in_plain_words(reason: str, language: Language) -> None:
    assert reason not in say_reason(reason, language)


def test_an_administrators_own_reason_is_shown_as_it_is() -> None:
    assert say_reason("stolen laptop {x} %s", "en").endswith("stolen laptop {x} %s")


def test_every_key_in_the_templates_exists() -> None:
    environment = Environment(loader=PackageLoader("coatcheck.server", "templates"), autoescape=True)
    used = set()
    for name in environment.list_templates():
        source, _, _ = environment.loader.get_source(environment, name)  # type: ignore[union-attr]
        for call in environment.parse(source).find_all(nodes.Call):
            if isinstance(call.node, nodes.Name) and call.node.name == "t":
                assert isinstance(call.args[0], nodes.Const)
                used.add(call.args[0].value)
    assert used <= set(TEXTS)
    assert len(used) > 40


@pytest.mark.parametrize(
    ("header", "language"),
    [
        (None, "en"),
        ("", "en"),
        ("ko", "ko"),
        ("KO-kr", "ko"),
        ("ko-KR,ko;q=0.9,en-US;q=0.8,en;q=0.7", "ko"),
        ("en-US,en;q=0.9,ko;q=0.8", "en"),
        ("fr,ko;q=0.5,en;q=0.1", "ko"),
        ("fr;q=1,de;q=0.9", "en"),
        ("*", "en"),
        ("ko;q=0", "en"),
        ("ko;q=0.001", "ko"),
        ("en;q=0.5, ko;q=0.5", "en"),
        ("ko;q=0.5, en;q=0.5", "ko"),
        ("ko;q=2", "en"),
        ("ko;q=-1", "en"),
        ("ko;q=nan", "en"),
        ("ko;q=0.1234", "en"),
        ("ko;q=", "en"),
        ("ko;;;q=0.9", "ko"),
        ("korean", "en"),
        (";,;,=,,,q=1", "en"),
        ("\x00\udcff", "en"),
        ("ko" + " " * (MAX_HEADER - 2), "ko"),
        ("ko" + " " * (MAX_HEADER - 1), "en"),
        ("x," * (MAX_MEMBERS - 1) + "ko", "ko"),
        ("x," * MAX_MEMBERS + "ko", "en"),
        ("ko," * 10_000_000, "en"),
    ],
)
def test_the_language_that_is_wanted_most_is_spoken(header: str | None, language: Language) -> None:
    assert language_of(header) == language


def test_waits_are_whole_minutes_from_where_seconds_are_hard_to_read() -> None:
    assert "90 s" in say_wait(90, "en")
    assert "2 min" in say_wait(91, "en")
    assert "2 min" in say_wait(120, "en")
    assert "3분" in say_wait(121, "ko")
    assert "refused for 90 s." in say_blocked(90, "en")
    assert "refused for 2 min." in say_blocked(91, "en")
    assert "3분 동안" in say_blocked(121, "ko")


def test_an_unknown_code_has_the_text_of_any_error() -> None:
    assert say_problem("from_a_newer_release", "en") == errors.CoatcheckError.title
