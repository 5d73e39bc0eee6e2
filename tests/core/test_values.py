"""What may be kept in a session, and that it comes back as it was."""

from __future__ import annotations

import math
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from enum import IntEnum, StrEnum
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.values import MAX_DEPTH, MAX_INTEGER, check_name, decode_value, encode_value
from coatcheck.errors import ValueRefused

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-MAX_INTEGER, MAX_INTEGER),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8")),
    st.binary(),
    st.uuids(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.datetimes(timezones=st.just(UTC)),
)
NAMES = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(NAMES, inner)), max_leaves=20)


@given(VALUES)
def test_every_acceptable_value_comes_back_with_its_type(value: Any) -> None:
    text = encode_value(value)
    back = decode_value(text)
    assert back == value
    assert type(back) is type(value)
    assert encode_value(back) == text


@given(VALUES, VALUES)
def test_two_values_have_one_text_only_if_they_are_equal(one: Any, other: Any) -> None:
    if encode_value(one) == encode_value(other):
        assert one == other


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, Decimal("NaN"), Decimal("Infinity")])
def test_numbers_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(ValueRefused, match="NaN and infinity"):
        encode_value(value)


def test_integers_end_at_64_bits() -> None:
    assert decode_value(encode_value(MAX_INTEGER)) == MAX_INTEGER
    with pytest.raises(ValueRefused, match="64 bits"):
        encode_value(MAX_INTEGER + 1)


def test_depth_ends_at_its_limit() -> None:
    value: Any = 1
    for _ in range(MAX_DEPTH):
        value = [value]
    encode_value(value)
    with pytest.raises(ValueRefused, match="nested deeper"):
        encode_value([value])


def test_an_endless_value_is_refused_and_does_not_hang() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueRefused, match="nested deeper"):
        encode_value(endless)


@pytest.mark.parametrize("value", [object(), {1: 2}, {1, 2}, timedelta(1), "\ud800", {"\ud800": 1}, lambda: 0])
def test_other_types_are_refused_with_a_name(value: Any) -> None:
    with pytest.raises(ValueRefused):
        encode_value(value)


def test_a_subclass_is_kept_as_what_it_is_underneath() -> None:
    class Markup(str):
        pass

    class Real(float):
        pass

    class Level(IntEnum):
        HIGH = 3

    class Colour(StrEnum):
        RED = "red"

    for value, plain in ((Markup("a"), "a"), (Real(1.5), 1.5), (Level.HIGH, 3), (Colour.RED, "red")):
        back = decode_value(encode_value(value))
        assert (back, type(back)) == (plain, type(plain))
    assert decode_value(encode_value({Markup("a"): 1})) == {"a": 1}


def test_an_application_may_use_the_tag_itself() -> None:
    for value in ({"$": "bytes", "v": "AAAA"}, {"$": {"$": 1}}, {"$": "map", "v": {}}):
        assert decode_value(encode_value(value)) == value


def test_a_time_zone_survives() -> None:
    value = datetime(2026, 11, 23, 12, tzinfo=timezone(timedelta(hours=9)))
    assert decode_value(encode_value(value)) == value


def test_the_texts_are_what_the_decision_record_fixes() -> None:
    assert encode_value({"a": [1, "x", None]}) == '{"a":[1,"x",null]}'
    assert encode_value(b"\x00\xff") == '{"$":"bytes","v":"AP8="}'
    assert encode_value(UUID(int=1)) == '{"$":"uuid","v":"00000000-0000-0000-0000-000000000001"}'
    assert encode_value(Decimal("1.10")) == '{"$":"decimal","v":"1.10"}'
    assert encode_value(datetime(2026, 1, 2, tzinfo=UTC)) == '{"$":"datetime","v":"2026-01-02T00:00:00+00:00"}'


@given(st.text())
def test_hostile_text_is_a_value_or_a_value_error(text: str) -> None:
    with suppress(ValueError):
        decode_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"$":"python/object","v":"os.system"}',
        '{"$":"bytes","v":"%%%"}',
        '{"$":"uuid","v":1}',
        '{"$":"decimal","v":"x"}',
        '{"$":"map","v":[1]}',
        '{"$":"map"}',
        '{"$":"bytes","v":"AA==","x":1}',
        "[" * 100_000,
    ],
)
def test_bytes_in_the_store_that_no_release_wrote_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"encoded value|badly formed|padding|base64"):
        decode_value(text)


def test_names_have_an_exact_limit() -> None:
    assert check_name("n" * 64)
    assert check_name("이름")
    for name in ("", "n" * 65, "이" * 22, "\ud800", 1, None):
        with pytest.raises(ValueRefused):
            check_name(name)
