"""Refresh tokens on paper: the layout, the keyed check, the sealed successor, the grant."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.refresh_token import (
    FIRST_GENERATION,
    LAST_GENERATION,
    REFRESH_TOKEN_CHARACTERS,
    FamilyRef,
    Grant,
    RefreshToken,
    decode_grant,
    encode_grant,
    family_of_session,
    mint_refresh_token,
    open_next,
    parse_refresh_token,
    seal_next,
)

KEYS = IdKeys(b"t" * 32, b"c" * 32)
SESSION = SessionRef(0x1234, "AAECAwQFBgcICQoL")
FAMILY = family_of_session(SESSION, random=b"family")
SERVER_KEY = b"s" * 32


def token(generation: int = FIRST_GENERATION, *, family: FamilyRef = FAMILY, secret: bytes = b"x" * 33) -> RefreshToken:
    return mint_refresh_token(KEYS, family, generation=generation, secret=secret)


def test_the_layout_of_version_1_is_fixed() -> None:
    text = token(7).text
    assert len(text) == REFRESH_TOKEN_CHARACTERS
    raw = urlsafe_b64decode(text)
    assert raw[:3] == b"\x31\x12\x34"
    assert raw[3:15] == bytes(range(12))
    assert raw[15:21] == b"family"
    assert raw[21:24] == b"\x00\x00\x07"
    assert raw[24:57] == b"x" * 33
    # The check of this release for these keys: another one would sign everybody out at an upgrade.
    assert text[76:] == "OftxQJi3Y_uR"


def test_a_token_names_its_family_and_its_generation() -> None:
    read = parse_refresh_token(KEYS, token(9).text.encode())
    assert read is not None
    assert (read.family, read.generation) == (FAMILY, 9)
    assert read.family.session == SESSION


def test_a_family_that_stands_alone_has_no_session() -> None:
    alone = FamilyRef(7, SESSION.handle, FAMILY.name, of_session=False)
    read = parse_refresh_token(KEYS, token(family=alone).text.encode())
    assert read is not None
    assert read.family == alone
    assert read.family.session is None
    # The kind is part of what is checked: nobody can turn one into the other.
    assert token(family=alone).text != token().text


@given(place=st.integers(0, REFRESH_TOKEN_CHARACTERS - 1), letter=st.sampled_from("ABab01-_"))
def test_one_changed_character_is_an_invented_token(place: int, letter: str) -> None:
    text = token().text
    other = text[:place] + letter + text[place + 1 :]
    assert other == text or parse_refresh_token(KEYS, other.encode()) is None


@given(st.binary(max_size=200))
def test_any_other_bytes_are_no_token(value: bytes) -> None:
    assert parse_refresh_token(KEYS, value) is None


def test_a_token_of_another_store_is_invented() -> None:
    assert parse_refresh_token(IdKeys(b"t" * 32, b"d" * 32), token().text.encode()) is None


def test_other_kinds_are_no_refresh_tokens() -> None:
    # CVE-2026-101023: an access token, a session id or a public handle presented as a refresh token.
    raw = bytearray(urlsafe_b64decode(token().text))
    for kind in (0x11, 0x21, 0x41, 0x51, 0x61, 0x71):
        raw[0] = kind
        assert parse_refresh_token(KEYS, urlsafe_b64encode(bytes(raw))) is None


def test_neither_text_nor_digest_is_in_the_repr() -> None:
    assert token().text not in repr(token())
    assert token().digest not in repr(token())


def test_only_predecessor_and_server_key_together_open_the_successor() -> None:
    old, new = token(3), token(4, secret=b"y" * 33)
    sealed = seal_next(old, new, server_key=SERVER_KEY, nonce=b"n" * 12)
    assert open_next(KEYS, old, sealed, server_key=SERVER_KEY) == new
    assert new.text.encode() not in sealed
    # An old backup and a spent token (SEMANTICS 5): the server key is in no backup of the store.
    assert open_next(KEYS, old, sealed, server_key=b"z" * 32) is None
    assert open_next(KEYS, token(3, secret=b"z" * 33), sealed, server_key=SERVER_KEY) is None


def test_a_sealed_successor_belongs_to_one_generation_of_one_family() -> None:
    old, new = token(3), token(4, secret=b"y" * 33)
    other = family_of_session(SESSION, random=b"others")
    assert (
        open_next(KEYS, old, seal_next(old, token(5), server_key=SERVER_KEY, nonce=b"n" * 12), server_key=SERVER_KEY)
        is None
    )
    stranger = mint_refresh_token(KEYS, other, generation=4, secret=b"y" * 33)
    assert (
        open_next(KEYS, old, seal_next(old, stranger, server_key=SERVER_KEY, nonce=b"n" * 12), server_key=SERVER_KEY)
        is None
    )
    sealed = bytearray(seal_next(old, new, server_key=SERVER_KEY, nonce=b"n" * 12))
    sealed[20] ^= 1
    assert open_next(KEYS, old, bytes(sealed), server_key=SERVER_KEY) is None


def test_generations_fit_into_their_three_octets() -> None:
    last = parse_refresh_token(KEYS, token(LAST_GENERATION).text.encode())
    assert last is not None
    assert last.generation == LAST_GENERATION
    with pytest.raises(OverflowError):
        token(LAST_GENERATION + 1)


def test_a_grant_comes_back_as_it_was() -> None:
    grant = Grant(scopes=("read", "write"), resources=("https://orders.example",))
    assert decode_grant(encode_grant(grant)) == grant
    assert decode_grant(encode_grant(Grant())) == Grant()


@pytest.mark.parametrize("text", ["", "[]", '{"scope":1}', '{"resource":"x"}', "\x00", "{" * 2000])
def test_a_damaged_grant_is_an_error_of_ours(text: str) -> None:
    with pytest.raises(ValueError, match="not a grant"):
        decode_grant(text)
