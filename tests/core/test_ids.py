"""Session ids, handles and the keyed check that refuses junk without a trip to the store."""

from __future__ import annotations

from base64 import urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.ids import (
    IdKeys,
    mint_session_id,
    owner_of,
    parse_session_id,
    parse_sid,
    sid_of,
    subject_tag,
    successor_of,
)

KEYS = IdKeys(b"t" * 32, b"c" * 32)
OTHER = IdKeys(b"t" * 32, b"d" * 32)
ID = mint_session_id(KEYS, tag=0xBEEF, handle=b"h" * 12, secret=b"s" * 24)


def test_an_id_reads_back_as_itself() -> None:
    assert parse_session_id(KEYS, ID.text.encode()) == ID
    assert ID.ref.tag == 0xBEEF


def test_formats_are_what_the_decision_record_fixes() -> None:
    # Literal examples: a change here signs everybody out.
    assert ID.text[:52] == "Eb7vaGhoaGhoaGhoaGhoc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nz"
    assert (len(ID.text), ID.text[:4], ID.text[4:20]) == (64, "Eb7v", ID.ref.handle)
    sid = sid_of(KEYS, ID.ref)
    assert (len(sid), sid[4:20]) == (28, ID.ref.handle)
    assert KEYS.pack() == b"\x01" + b"t" * 32 + b"c" * 32
    assert IdKeys.unpack(KEYS.pack()) == KEYS


@given(st.integers(0, 63), st.characters(codec="ascii", categories=["L", "N"]))
def test_every_changed_character_is_refused(position: int, character: str) -> None:
    changed = ID.text[:position] + character + ID.text[position + 1 :]
    assert (parse_session_id(KEYS, changed.encode()) is None) == (changed != ID.text)


@given(st.binary(max_size=200))
def test_arbitrary_octets_are_refused_quietly(value: bytes) -> None:
    assert parse_session_id(KEYS, value) is None


@pytest.mark.parametrize(
    "value",
    [
        b"",
        ID.text.encode()[:-1],
        ID.text.encode() + b"=",
        ID.text.encode() + b"A",
        b'"' + ID.text.encode() + b'"',
        ID.text.encode() + b"\n",
        ID.text.replace("z", "+").encode(),
        b"\xff" * 64,
    ],
)
def test_other_spellings_of_an_id_are_refused(value: bytes) -> None:
    assert parse_session_id(KEYS, value) is None


def test_an_id_of_another_store_is_refused() -> None:
    assert parse_session_id(OTHER, ID.text.encode()) is None


def test_another_kind_under_a_right_check_is_refused() -> None:
    from coatcheck.primitives.digest import keyed

    body = b"\x12" + bytes(2 + 12 + 24)
    forged = urlsafe_b64encode(body + keyed(body, key=KEYS.check_key, size=9, purpose=b"cc-check"))
    assert parse_session_id(KEYS, forged) is None


def test_a_handle_is_not_an_id_and_an_id_no_handle() -> None:
    assert parse_sid(KEYS, ID.text) is None
    assert parse_session_id(KEYS, sid_of(KEYS, ID.ref).encode()) is None


@given(st.text(max_size=60))
def test_invented_handles_are_refused(text: str) -> None:
    assert parse_sid(KEYS, text) is None


def test_a_handle_survives_rotation() -> None:
    successor = successor_of(KEYS, ID, secret=b"n" * 24)
    assert successor.ref == ID.ref
    assert successor.digest != ID.digest
    assert sid_of(KEYS, successor.ref) == sid_of(KEYS, ID.ref)
    assert parse_session_id(KEYS, successor.text.encode()) == successor


def test_no_secret_shows_in_a_representation() -> None:
    assert ID.text[20:52] not in repr(ID)
    assert "tttt" not in repr(KEYS)
    assert "cccc" not in repr(KEYS)


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_tenant_and_subject_cannot_be_shifted_against_each_other(a: str, b: str, c: str) -> None:
    if b:
        assert owner_of(a + b, c) != owner_of(a, b + c)
        assert owner_of(a, c) != ""


def test_subjects_are_placed_by_a_secret_key() -> None:
    here = [subject_tag(KEYS, "", str(number)) for number in range(2000)]
    there = [subject_tag(IdKeys(b"u" * 32, b"c" * 32), "", str(number)) for number in range(2000)]
    assert len(set(here)) > 1900
    assert sum(a == b for a, b in zip(here, there, strict=True)) < 5
    assert owner_of("", None) == ""
