"""The id that follows from a refresh token: the same for who exchanges it twice, another one for everything else."""

from __future__ import annotations

import pytest

from coatcheck.core.ids import IdKeys, SessionRef, mint_session_id, parse_session_id
from coatcheck.core.refresh_token import RefreshToken, family_of_session, mint_refresh_token
from coatcheck.core.taking_up import session_id_of

KEYS = IdKeys(b"t" * 32, b"c" * 32)
SERVER_KEY = b"k" * 32
SESSION = mint_session_id(KEYS, tag=7, handle=b"h" * 12, secret=b"s" * 24)
AUTHORITY = '{"amr":["pwd"]}'


def token(*, secret: bytes = b"r" * 33, generation: int = 1) -> RefreshToken:
    family = family_of_session(SESSION.ref, random=b"f" * 6)
    return mint_refresh_token(KEYS, family, generation=generation, secret=secret)


def followed(
    presented: RefreshToken | None = None, *, authority: str = AUTHORITY, server_key: bytes = SERVER_KEY
) -> str:
    chosen = token() if presented is None else presented
    return session_id_of(KEYS, chosen, SESSION.ref, authority=authority, server_key=server_key).text


def test_it_is_an_id_of_that_very_session() -> None:
    parsed = parse_session_id(KEYS, followed().encode())
    assert parsed is not None
    assert parsed.ref == SESSION.ref == SessionRef(7, SESSION.ref.handle)
    assert parsed.text != SESSION.text


def test_one_token_leads_to_one_id() -> None:
    assert followed() == followed()


@pytest.mark.parametrize(
    "other",
    [
        followed(token(secret=b"R" * 33)),
        followed(token(generation=2)),
        followed(authority='{"amr":["pwd","otp"]}'),
        followed(authority=""),
        followed(server_key=b"K" * 32),
    ],
    ids=["secret", "generation", "authority", "no authority", "server key"],
)
def test_everything_else_leads_to_another(other: str) -> None:
    assert other != followed()


def test_the_secret_of_the_token_is_not_in_the_id() -> None:
    assert not any(token().text[at : at + 8] in followed()[20:52] for at in range(28, 72))
