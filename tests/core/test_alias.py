"""The sealed successor: only the old id's holder and the server key together open it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.alias import open_successor, seal_successor
from coatcheck.core.ids import IdKeys, mint_session_id, successor_of

KEYS = IdKeys(b"t" * 32, b"c" * 32)
OLD = mint_session_id(KEYS, tag=1, handle=b"h" * 12, secret=b"1" * 24)
NEW = successor_of(KEYS, OLD, secret=b"2" * 24)
SERVER = b"k" * 32
SEALED = seal_successor(OLD, NEW, server_key=SERVER, nonce=b"n" * 12)


def test_the_old_id_opens_its_successor() -> None:
    assert open_successor(KEYS, OLD, SEALED, server_key=SERVER) == NEW


def test_a_stolen_store_alone_opens_nothing() -> None:
    assert open_successor(KEYS, OLD, SEALED, server_key=b"x" * 32) is None
    assert NEW.text.encode() not in SEALED


def test_another_id_opens_nothing() -> None:
    other = mint_session_id(KEYS, tag=1, handle=b"h" * 12, secret=b"3" * 24)
    assert open_successor(KEYS, other, SEALED, server_key=SERVER) is None


def test_a_successor_of_another_session_is_not_followed() -> None:
    stranger = mint_session_id(KEYS, tag=1, handle=b"x" * 12, secret=b"2" * 24)
    sealed = seal_successor(OLD, stranger, server_key=SERVER, nonce=b"n" * 12)
    assert open_successor(KEYS, OLD, sealed, server_key=SERVER) is None


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_a_changed_octet_opens_nothing(position: int, flip: int) -> None:
    changed = SEALED[:position] + bytes([SEALED[position] ^ flip]) + SEALED[position + 1 :]
    assert open_successor(KEYS, OLD, changed, server_key=SERVER) is None


@given(st.binary(max_size=120))
def test_arbitrary_octets_open_nothing(sealed: bytes) -> None:
    assert open_successor(KEYS, OLD, sealed, server_key=SERVER) is None
