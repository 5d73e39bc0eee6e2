"""The record, its opaque part, and the one rule of life."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.activity import activity_due
from coatcheck.core.ids import SessionRef
from coatcheck.core.session import (
    SECOND_US,
    Authentication,
    Authority,
    BoundKey,
    NewSession,
    cause_of_death,
    check_reason,
    check_subject,
    decode_authority,
    encode_authority,
    last_use_us,
    tightened,
)
from coatcheck.errors import ValueRefused

NEW = NewSession(
    ref=SessionRef(1, "h" * 16),
    digest="d" * 43,
    owner="o" * 43,
    subject="50",
    idle_us=100,
    absolute_us=1000,
    authority=encode_authority(Authority()),
    fields={},
)
FULL = Authority(
    tenant="acme",
    profile="bank",
    profile_version=3,
    authentications=(Authentication(method="pwd", at=1.5, level=1), Authentication(method="otp", at=2.5, level=2)),
    acr="urn:two",
    amr=("pwd", "otp"),
    scopes=("read",),
    claims={"role": '"admin"'},
    device_id="dev",
    user_agent="UA",
    networks={"4": "203.0.113.7", "6": "2001:db8::1"},
    keys=(
        BoundKey(
            kind="dbsc",
            algorithm="ES256",
            thumbprint="t",
            public_jwk={"kty": "EC"},
            since=1.0,
            state="bound",
            challenges=("c",),
        ),
    ),
    binding="required",
    persistent=True,
)


@pytest.mark.parametrize(
    ("now_us", "seen_us", "death"),
    [
        (1_099, 1_000, None),
        (1_100, 1_000, "idle_timeout"),
        (1_101, 1_000, "idle_timeout"),
        (1_999, 1_999, None),
        (2_000, 1_999, "absolute_timeout"),
        (2_001, 2_001, "absolute_timeout"),
    ],
)
def test_a_session_is_over_at_the_very_microsecond_of_a_deadline(now_us: int, seen_us: int, death: str | None) -> None:
    assert cause_of_death(NEW.at(1_000), seen_us=seen_us, now_us=now_us) == death


def test_only_a_session_of_somebody_was_authenticated() -> None:
    assert NEW.at(7).auth_us == 7
    assert replace(NEW, owner="", subject="").at(7).auth_us == 0


def test_tightening_applies_at_once_and_loosening_does_not() -> None:
    session = NEW.at(0)
    tight = tightened(session, idle_us=10, absolute_us=500)
    assert (tight.idle_us, tight.absolute_us) == (10, 500)
    assert tightened(session, idle_us=10_000, absolute_us=10_000) == session


def test_an_authority_comes_back_whole() -> None:
    assert decode_authority(encode_authority(FULL)) == FULL
    assert decode_authority(encode_authority(Authority())) == Authority()


def test_members_of_a_newer_release_survive_an_older_ones_change() -> None:
    newer = json.loads(encode_authority(FULL)) | {"risk": {"score": 3}, "zone": "x"}
    read = decode_authority(json.dumps(newer))
    written = json.loads(encode_authority(replace(read, claims={})))
    assert written["risk"] == {"score": 3}
    assert written["zone"] == "x"
    assert "claims" not in written, "a member at its default is left out"


def test_an_authority_costs_little_while_it_says_little() -> None:
    assert encode_authority(Authority()) == "{}"


@given(st.text())
def test_hostile_text_is_an_authority_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        decode_authority(text)


@pytest.mark.parametrize("text", ["", "[]", "1", '{"claims":[1]}', '{"keys":[[1]]}', '{"binding":"x"}', "{" * 10_000])
def test_bytes_that_are_no_authority_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="authority"):
        decode_authority(text)


def test_a_subject_is_text_and_says_how_to_make_it() -> None:
    with pytest.raises(TypeError, match=r"str\(user.id\)"):
        check_subject(50)
    assert check_subject("s" * 255)
    for bad in ("", "s" * 256, "a\x00b", "\ud800"):
        with pytest.raises(ValueRefused):
            check_subject(bad)


def test_a_reason_is_short_and_printable() -> None:
    assert check_reason("r" * 200)
    for bad in ("", "r" * 201, "a\nb", "\x1b[31m", None):
        with pytest.raises(ValueRefused):
            check_reason(bad)


@pytest.mark.parametrize(
    ("age", "due"),
    [
        (0, "no"),
        (5_000_000, "no"),
        (5_000_001, "batch"),
        (89_999_999, "batch"),
        (90_000_000, "now"),
        (99_999_999, "now"),
        (500_000_000, "now"),
    ],
)
def test_activity_is_written_lazily_and_in_the_last_tenth_at_once(age: int, due: str) -> None:
    assert activity_due(seen_us=10_000, now_us=10_000 + age, idle_us=100_000_000) == due


@pytest.mark.parametrize(
    ("age", "due"), [(200_000, "no"), (200_001, "batch"), (1_999_999, "batch"), (2_000_000, "now")]
)
def test_a_batch_never_comes_too_late_for_a_short_idle_timeout(age: int, due: str) -> None:
    assert activity_due(seen_us=0, now_us=age, idle_us=4_000_000) == due


@pytest.mark.parametrize(
    ("seen", "since", "used"),
    [
        (1000, 0, 1000),
        (1000, 1000, 1000),
        (1000, 1010, 1010),
        (1000, 1000 + 31, 1031),
        (1000, 1000 + 32, 1031),
        (1000, 10_000, 1031),
        (2000, 1000, 2000),
    ],
)
def test_a_use_goes_unwritten_for_a_twentieth_of_the_timeout_and_one_batch(seen: int, since: int, used: int) -> None:
    session = replace(NEW.at(0), idle_us=600 * SECOND_US)
    assert last_use_us(session, seen_us=seen * SECOND_US, since_us=since * SECOND_US) == used * SECOND_US
