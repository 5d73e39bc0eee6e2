"""Access tokens: what is written, what is read back, and the exact edges of both."""

from __future__ import annotations

import json
import math
import secrets
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, get_args
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core import access_token
from coatcheck.core.access_token import (
    MAX_LIFETIME,
    MAX_TOKEN,
    RESERVED_CLAIMS,
    AccessToken,
    TokenRules,
    mint_access_token,
    new_jti,
    tag_of_jti,
    verify_access_token,
)
from coatcheck.core.values import encode_value
from coatcheck.errors import CoatcheckError, ConfigurationError, TokenInvalid, ValueRefused
from coatcheck.primitives.jwk import Algorithm, SigningKey, generate_signing_key

NOW = 1_795_000_000
ISSUER = "https://id.example.test"
API = "https://api.example.test"
RULES = TokenRules(issuer=ISSUER, audiences=frozenset({API}))
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
KEYS: dict[Algorithm, SigningKey] = {
    each: generate_signing_key(each, random=secrets.token_bytes) for each in ALGORITHMS
}
KEY = KEYS["ES256"]
RING = {key.kid: key.verifying for key in KEYS.values()}
STANDARD: dict[str, Any] = {
    "issuer": ISSUER,
    "subject": "u-42",
    "audience": API,
    "client_id": "web",
    "sid": "IRERERERERERERERERERERERERER",
    "jti": new_jti(7, b"r" * 15),
    "issued_at": NOW,
    "expires_at": NOW + 600,
    "scopes": ("read", "write"),
    "auth_time": NOW - 30,
    "acr": "urn:example:2",
    "amr": ("pwd", "otp"),
    "claims": {},
}


def mint(key: SigningKey = KEY, **changes: Any) -> str:
    return mint_access_token(key, **{**STANDARD, **changes})


def verify(token: str | bytes, *, now: float = NOW, rules: TokenRules = RULES) -> AccessToken:
    return verify_access_token(token, RING, rules, now=now)


def cause_of(token: str | bytes, *, now: float = NOW, rules: TokenRules = RULES) -> str:
    with pytest.raises(TokenInvalid) as refused:
        verify(token, now=now, rules=rules)
    return refused.value.cause


def part(token: str, index: int) -> Any:
    text = token.split(".")[index]
    return json.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4)))


# Writing and reading.


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_says_what_it_was_given(algorithm: Algorithm) -> None:
    expected = AccessToken(
        issuer=ISSUER,
        subject="u-42",
        audience=(API,),
        client_id="web",
        id=STANDARD["jti"],
        sid=STANDARD["sid"],
        issued_at=NOW,
        expires_at=NOW + 600,
        scopes=("read", "write"),
        auth_time=NOW - 30,
        acr="urn:example:2",
        amr=("pwd", "otp"),
        claims={},
    )
    token = mint(KEYS[algorithm])
    assert verify(token) == verify(token.encode()) == expected


def test_a_token_is_what_rfc_9068_describes() -> None:
    token = mint(claims={"role": '"admin"'})
    assert part(token, 0) == {"alg": "ES256", "kid": KEY.kid, "typ": "at+jwt"}
    assert part(token, 1) == {
        "iss": ISSUER,
        "sub": "u-42",
        "aud": API,
        "client_id": "web",
        "jti": STANDARD["jti"],
        "iat": NOW,
        "exp": NOW + 600,
        "sid": STANDARD["sid"],
        "scope": "read write",
        "auth_time": NOW - 30,
        "acr": "urn:example:2",
        "amr": ["pwd", "otp"],
        "role": "admin",
    }
    assert "=" not in token


def test_what_is_absent_is_not_written() -> None:
    token = mint(sid=None, scopes=(), acr=None, amr=(), client_id="")
    assert part(token, 1).keys() == {"iss", "sub", "aud", "client_id", "jti", "iat", "exp", "auth_time"}
    found = verify(token)
    assert (found.sid, found.scopes, found.acr, found.amr, found.client_id) == (None, (), None, (), "")


def test_several_audiences_are_kept_in_order_and_one_match_is_enough() -> None:
    found = verify(mint(audience=("https://other.test", API)))
    assert found.audience == ("https://other.test", API)
    assert part(mint(audience=(API,)), 1)["aud"] == [API]
    assert cause_of(mint(audience=("https://other.test",))) == "audience"


CLAIMS: dict[str, Any] = {
    "text": '한글 \u2028 \\ " </script>',
    "none": None,
    "yes": True,
    "number": 2**63 - 1,
    "real": 0.1,
    "list": [1, ["a", None]],
    "map": {"a": {"b": 1}},
    "dollar": {"$": "map", "v": 1},
    "when": datetime(2026, 11, 23, 12, 0, 0, 1, tzinfo=UTC),
    "octets": b"\x00\xff",
    "uuid": UUID(int=7),
    "money": Decimal("1.10"),
    "$": "a name like the tag",
    "ünïcode": 1,
}


def test_claims_of_the_application_come_back_with_their_types() -> None:
    found = verify(mint(claims={name: encode_value(value) for name, value in CLAIMS.items()}))
    assert found.claims == CLAIMS
    assert list(found.claims) == list(CLAIMS)
    assert {name: type(value) for name, value in found.claims.items()} == {n: type(v) for n, v in CLAIMS.items()}


def test_a_token_can_be_shared_because_nothing_on_it_can_be_set() -> None:
    found = verify(mint(claims={"role": '"user"'}))
    with pytest.raises(FrozenInstanceError):
        found.subject = "root"  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.claims["role"] = "admin"  # type: ignore[index]


def test_a_representation_holds_no_part_of_the_text() -> None:
    token = mint()
    assert not any(segment in repr(verify(token)) for segment in token.split("."))


@given(
    subject=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40),
    audience=st.lists(st.sampled_from(["a", "b", API]), min_size=1, max_size=4).map(tuple),
    scopes=st.lists(st.text("abc!#[]~", min_size=1, max_size=5), max_size=4).map(tuple),
    lifetime=st.integers(1, MAX_LIFETIME),
    auth_time=st.integers(0, 2**53),
    claims=st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=8),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**63 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(codec="utf-8"), max_size=10)
            | st.binary(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("$vab", max_size=2), inner, max_size=3),
            max_leaves=6,
        ),
        max_size=4,
    ),
)
def test_whatever_is_minted_is_verified(
    subject: str,
    audience: tuple[str, ...],
    scopes: tuple[str, ...],
    lifetime: int,
    auth_time: int,
    claims: dict[str, Any],
) -> None:
    own = {name: value for name, value in claims.items() if name not in RESERVED_CLAIMS}
    try:
        texts = {name: encode_value(value) for name, value in own.items()}
    except ValueRefused:
        return
    token = mint(
        KEYS["HS256"],
        subject=subject,
        audience=audience,
        scopes=scopes,
        expires_at=NOW + lifetime,
        auth_time=auth_time,
        claims=texts,
    )
    found = verify(token, rules=TokenRules(issuer=ISSUER, audiences=frozenset(audience)))
    assert (found.subject, found.audience, found.scopes) == (subject, audience, scopes)
    assert found.claims == own


# Refusing to mint.


@pytest.mark.parametrize("name", sorted(RESERVED_CLAIMS))
def test_a_registered_name_is_no_name_for_a_claim(name: str) -> None:
    with pytest.raises(ValueRefused, match="registered"):
        mint(claims={name: '"x"'})


def test_every_name_that_a_token_needs_is_reserved() -> None:
    assert part(mint(), 1).keys() | {"nbf", "cnf"} <= RESERVED_CLAIMS
    assert RESERVED_CLAIMS.isdisjoint({"role", "roles", "email", "name", "tenant", "groups"})


@pytest.mark.parametrize(
    "text",
    [
        '1,"admin":true',
        '1,"nbf":0',
        '1,"sub":"root"',
        "1}",
        "",
        " ",
        "{",
        '"a',
        "NaN",
        "Infinity",
        "1 2",
        "'a'",
        '"\ud800"',
        "[" * 5000,
        "[" * 3000 + "]" * 3000,
        '{"$":"datetime","v":"soon"}',
        '{"$":"unknown","v":"x"}',
        '{"$":"uuid"}',
        '{"a":1,"a":2}',
        '[{"a":{"b":1,"b":1}}]',
        "1" * 5000,
        "1e999",
    ],
)
def test_a_text_that_is_not_one_value_is_not_spliced_in(text: str) -> None:
    with pytest.raises(ValueRefused):
        mint(claims={"role": text})


def test_a_name_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(ValueRefused):
        mint(claims={"\ud800": "1"})


def test_a_claim_written_with_spaces_still_reads_back() -> None:
    assert verify(mint(claims={"role": ' {"a" : [ 1 , 2.50 ] , "b":"\\u00e9"} '})).claims == {
        "role": {"a": [1, 2.5], "b": "é"}
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": ""},
        {"subject": ""},
        {"subject": "\ud800"},
        {"subject": "s" * 1025},
        {"audience": ""},
        {"audience": ()},
        {"audience": ("a",) * 33},
        {"audience": (API, "")},
        {"client_id": "c" * 1025},
        {"jti": ""},
        {"jti": "j" * 129},
        {"sid": ""},
        {"acr": ""},
        {"amr": ("",)},
        {"amr": ("a",) * 33},
        {"scopes": ("",)},
        {"scopes": ("a b",)},
        {"scopes": ("a", 'b"')},
        {"scopes": ("a\\",)},
        {"scopes": ("a\n",)},
        {"scopes": ("é",)},
        {"issued_at": -1},
        {"issued_at": 2**53, "expires_at": 2**53 + 1},
        {"issued_at": 2**64, "expires_at": 2**64 + 1},
        {"auth_time": -1},
        {"auth_time": 2**53 + 1},
        {"expires_at": NOW},
        {"expires_at": NOW - 1},
        {"expires_at": NOW + MAX_LIFETIME + 1},
    ],
)
def test_nothing_is_signed_that_would_not_be_read(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueRefused):
        mint(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": "s" * 1024},
        {"audience": (API, *["a"] * 31)},
        {"jti": "j" * 128},
        {"expires_at": NOW + 1},
        {"expires_at": NOW + MAX_LIFETIME},
        {"auth_time": 0},
        {"auth_time": 2**53},
        {"amr": ("a",) * 32},
        {"scopes": ("!", "#", "[", "]", "~")},
    ],
)
def test_values_at_their_bounds_are_minted_and_read(changes: dict[str, Any]) -> None:
    assert verify(mint(**changes)).issuer == ISSUER


def test_a_token_has_at_most_8192_octets() -> None:
    key = KEYS["HS256"]
    room = MAX_TOKEN - len(mint(key, claims={"fill": '""'}))
    sizes = {
        size: mint(key, claims={"fill": json.dumps("x" * size)}) for size in range(room * 3 // 4 - 3, room * 3 // 4)
    }
    longest = max(sizes.values(), key=len)
    assert MAX_TOKEN - 3 <= len(longest) <= MAX_TOKEN
    assert verify(longest).subject == "u-42"
    with pytest.raises(ValueRefused, match="at most 8192 octets"):
        mint(key, claims={"fill": json.dumps("x" * (max(sizes) + 4))})


# Time.


@pytest.mark.parametrize("leeway", [0, 1, 60])
def test_a_token_ends_exactly_at_its_expiry_plus_the_leeway(leeway: int) -> None:
    rules, token = replace(RULES, leeway=leeway), mint()
    end = NOW + 600 + leeway
    assert verify(token, now=math.nextafter(end, 0), rules=rules).expires_at == NOW + 600
    assert verify(token, now=end - 0.000_001, rules=rules).expires_at == NOW + 600
    assert cause_of(token, now=end, rules=rules) == "expired"
    assert cause_of(token, now=end + 0.000_001, rules=rules) == "expired"


@pytest.mark.parametrize("leeway", [0, 1, 60])
def test_a_token_begins_exactly_at_its_issue_less_the_leeway(leeway: int) -> None:
    rules, token = replace(RULES, leeway=leeway), mint()
    assert verify(token, now=NOW - leeway, rules=rules).issued_at == NOW
    assert cause_of(token, now=NOW - leeway - 0.000_001, rules=rules) == "not_yet_valid"


@pytest.mark.parametrize(
    ("now", "cause"), [(math.nan, "expired"), (math.inf, "expired"), (-math.inf, "not_yet_valid"), (0, "not_yet_valid")]
)
def test_a_clock_that_makes_no_sense_accepts_nothing(now: float, cause: str) -> None:
    assert cause_of(mint(), now=now) == cause


def test_without_a_clock_only_time_is_not_judged() -> None:
    token = mint()
    assert verify_access_token(token, RING, RULES, now=None).expires_at == NOW + 600
    for other in (token[:-8] + "AAAAAAAA", mint(issuer="https://other.test"), mint(audience="other")):
        with pytest.raises(TokenInvalid):
            verify_access_token(other, RING, RULES, now=None)


# Rules.


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": ""},
        {"audiences": frozenset()},
        {"audiences": frozenset({""})},
        {"audiences": API},
        {"audiences": [API]},
        {"leeway": -1},
        {"leeway": 61},
    ],
)
def test_rules_that_would_let_anything_in_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        replace(RULES, **changes)


def test_every_refusal_looks_alike_to_the_client() -> None:
    causes = set()
    for token in ("", "a.b.c", mint(audience="x"), mint(issuer="x"), mint()[:-1]):
        with pytest.raises(TokenInvalid) as refused:
            verify(token)
        assert isinstance(refused.value, CoatcheckError)
        assert (refused.value.status, refused.value.code) == (401, "invalid_token")
        assert refused.value.title == "The access token is not valid."
        assert refused.value.cause in get_args(access_token.Cause)
        causes.add(refused.value.cause)
    assert len(causes) > 3


# The name of a token.


@given(st.integers(0, 65535), st.binary(min_size=15, max_size=15))
def test_a_token_name_says_where_its_session_lives(tag: int, random: bytes) -> None:
    name = new_jti(tag, random)
    assert len(name) == 24
    assert urlsafe_b64decode(name) == b"\x41" + tag.to_bytes(2, "big") + random
    assert tag_of_jti(name) == tag


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Q",
        new_jti(7, b"r" * 15)[:-1],
        new_jti(7, b"r" * 15) + "A",
        new_jti(7, b"r" * 15) + "\n",
        urlsafe_b64encode(b"\x42" + bytes(17)).decode(),
        "+" * 24,
        "é" * 24,
        "٣" * 24,
    ],
)
def test_other_texts_are_no_token_names(name: str) -> None:
    assert tag_of_jti(name) is None


@given(st.text(max_size=30))
def test_invented_token_names_are_refused_quietly(name: str) -> None:
    assert tag_of_jti(name) is None or len(name) == 24


# The headers kept.


def test_a_header_is_kept_only_after_its_signature_was_right() -> None:
    access_token._headers.clear()
    token = mint()
    assert cause_of(token[:-8] + "AAAAAAAA") == "signature"
    assert not access_token._headers
    verify(token)
    assert access_token._headers == {token.split(".")[0].encode(): (KEY.kid, "ES256")}
    verify(token)
    assert len(access_token._headers) == 1


def test_the_headers_kept_are_bounded() -> None:
    access_token._headers.clear()
    for _ in range(access_token._MAX_HEADERS_KEPT * 2 + 1):
        key = generate_signing_key("HS256", random=secrets.token_bytes)
        verify_access_token(mint(key), {key.kid: key.verifying}, RULES, now=NOW)
        assert 0 < len(access_token._headers) <= access_token._MAX_HEADERS_KEPT


def test_a_kept_header_vouches_for_no_key_that_is_gone() -> None:
    token = mint()
    verify(token)
    with pytest.raises(TokenInvalid, match="unknown_key"):
        verify_access_token(token, {}, RULES, now=NOW)
    other = {KEY.kid: KEYS["EdDSA"].verifying}
    with pytest.raises(TokenInvalid, match="algorithm"):
        verify_access_token(token, other, RULES, now=NOW)
