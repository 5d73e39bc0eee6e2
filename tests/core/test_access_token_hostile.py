"""Hostile access tokens: each known attack by its name, and every malformed, misused or respelled token refused.

The forger below holds our signing keys, so that what is refused here is refused for what it says, and not only because
its signature is wrong.
"""

from __future__ import annotations

import hmac
import json
import secrets
import sys
import tracemalloc
import zlib
from base64 import b64encode, urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any, get_args
from urllib.parse import quote

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from hypothesis import example, given
from hypothesis import strategies as st

from coatcheck.core.access_token import (
    MAX_LIFETIME,
    MAX_TOKEN,
    AccessToken,
    Cause,
    TokenRules,
    mint_access_token,
    new_jti,
    verify_access_token,
)
from coatcheck.errors import TokenInvalid
from coatcheck.primitives.jwk import Algorithm, KeyRefused, SigningKey, VerifyingKey, generate_signing_key, load_jwks
from coatcheck.primitives.jwk import unpack_signing_key as unpack

NOW = 1_795_000_000
ISSUER, API = "https://id.example.test", "https://api.example.test"
RULES = TokenRules(issuer=ISSUER, audiences=frozenset({API}))
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
CAUSES = frozenset(get_args(Cause))
KEYS: dict[Algorithm, SigningKey] = {
    each: generate_signing_key(each, random=secrets.token_bytes) for each in ALGORITHMS
}
# A fixed name, because tests are named after headers that hold it.
KEYS["HS256"] = unpack(secrets.token_bytes(32), kid="hs", algorithm="HS256")
EC, HS = KEYS["ES256"], KEYS["HS256"]
RING: dict[str, VerifyingKey] = {key.kid: key.verifying for key in KEYS.values()}
CLAIMS: dict[str, Any] = {
    "iss": ISSUER,
    "sub": "u-42",
    "aud": API,
    "client_id": "web",
    "jti": new_jti(7, b"r" * 15),
    "iat": NOW,
    "exp": NOW + 600,
}
ABSENT = object()


def b64(data: bytes) -> bytes:
    return urlsafe_b64encode(data).rstrip(b"=")


def compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


def signed(header: bytes, payload: bytes, sign: Callable[[bytes], bytes] = HS.sign) -> bytes:
    data = b64(header) + b"." + b64(payload)
    return data + b"." + b64(sign(data))


def with_header(changes: Mapping[str, object], key: SigningKey = HS) -> bytes:
    members: dict[str, object] = {"alg": key.algorithm, "kid": key.kid, "typ": "at+jwt", **changes}
    header = {name: value for name, value in members.items() if value is not ABSENT}
    return signed(compact(header), compact(CLAIMS), key.sign)


def with_claims(changes: Mapping[str, object], key: SigningKey = HS) -> bytes:
    claims = {name: value for name, value in {**CLAIMS, **changes}.items() if value is not ABSENT}
    return with_payload(compact(claims), key)


def with_payload(payload: bytes, key: SigningKey = HS) -> bytes:
    return signed(compact({"alg": key.algorithm, "kid": key.kid, "typ": "at+jwt"}), payload, key.sign)


def verify(token: Any, ring: Mapping[str, VerifyingKey] = RING, rules: TokenRules = RULES) -> AccessToken:
    return verify_access_token(token, ring, rules, now=NOW + 1)


def cause_of(token: Any, ring: Mapping[str, VerifyingKey] = RING, rules: TokenRules = RULES) -> str:
    with pytest.raises(TokenInvalid) as refused:
        verify(token, ring, rules)
    assert refused.value.cause in CAUSES
    # No part of a token may travel in an exception chain to a log.
    assert refused.value.__cause__ is None
    assert refused.value.__context__ is None
    return refused.value.cause


def mint(key: SigningKey) -> bytes:
    return mint_access_token(
        key,
        issuer=ISSUER,
        subject="u-42",
        audience=API,
        client_id="web",
        sid=None,
        jti=new_jti(7, secrets.token_bytes(15)),
        issued_at=NOW,
        expires_at=NOW + 600,
        scopes=("read",),
        auth_time=NOW,
        acr=None,
        amr=(),
        claims={"role": '"user"'},
    ).encode()


def encodings_of(key: SigningKey) -> dict[str, bytes]:
    private: Any = serialization.load_der_private_key(key.pack(), None)
    public, encoding, form = private.public_key(), serialization.Encoding, serialization.PublicFormat
    jwk = key.verifying.public_jwk()
    found = {
        "pem": public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo),
        "der": public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        "ssh": public.public_bytes(encoding.OpenSSH, form.OpenSSH),
        "jwk": compact(jwk),
        "jwk with spaces": json.dumps(jwk).encode(),
        "jwks": compact({"keys": [jwk]}),
        "coordinates": b"".join(urlsafe_b64decode(jwk[each] + "==") for each in ("x", "y", "n") if each in jwk),
        "kid": key.kid.encode(),
        "nothing": b"",
    }
    if key.algorithm == "RS256":
        found["pkcs1 pem"] = public.public_bytes(encoding.PEM, form.PKCS1)
        found["pkcs1 der"] = public.public_bytes(encoding.DER, form.PKCS1)
    found.update({f"{name} stripped": value.strip() for name, value in found.items()})
    found.update({f"{name} in base64": b64encode(value) for name, value in found.items()})
    return found


def test_the_forger_can_make_good_tokens() -> None:
    for key in KEYS.values():
        assert verify(with_claims({}, key)).subject == "u-42"
        assert verify(with_header({}, key)).subject == "u-42"
        assert verify(mint(key)).subject == "u-42"


# The attacks of the record.


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_a_public_key_is_no_hmac_key_cve_2022_29217_2024_33663_2024_37568_2026_102273(algorithm: Algorithm) -> None:
    key = KEYS[algorithm]
    for encoding in encodings_of(key).values():

        def sign(data: bytes, secret: bytes = encoding) -> bytes:
            return hmac.digest(secret, data, "sha256")

        for kid in (key.kid, HS.kid):
            header = compact({"alg": "HS256", "kid": kid, "typ": "at+jwt"})
            cause = cause_of(signed(header, compact(CLAIMS), sign))
            assert cause == ("algorithm" if kid == key.kid else "signature")


def test_a_jwk_is_no_hmac_key_cve_2026_48526() -> None:
    for key in KEYS.values():
        if key.algorithm != "HS256":
            with pytest.raises(KeyRefused):
                unpack(compact(key.verifying.public_jwk()), kid="k", algorithm="HS256")


def test_an_empty_hmac_key_is_no_key_cve_2026_49852_2026_102266_2026_114616() -> None:
    for secret in (b"", b"\x00" * 31):
        with pytest.raises(KeyRefused):
            unpack(secret, kid="k", algorithm="HS256")

        def sign(data: bytes, secret: bytes = secret) -> bytes:
            return hmac.digest(secret, data, "sha256")

        for kid in (HS.kid, "", "unknown"):
            header = compact({"alg": "HS256", "kid": kid, "typ": "at+jwt"})
            assert cause_of(signed(header, compact(CLAIMS), sign)) in ("signature", "unknown_key")


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "nOnE", "none ", "", None, ABSENT, False, 0, [], ["none"]])
def test_unsigned_tokens_are_refused_cve_2026_28802_2022_23540(alg: object) -> None:
    for key in KEYS.values():
        for kid in (key.kid, ABSENT):
            good = with_header({"alg": alg, "kid": kid}, key)
            body = good.rpartition(b".")[0]
            assert cause_of(good) in ("algorithm", "header")
            assert cause_of(body + b".") == "shape"
            assert cause_of(body) == "shape"
            assert cause_of(body + b".AA") in ("algorithm", "header")


def test_a_key_in_the_header_is_never_used_cve_2026_27962() -> None:
    attacker = generate_signing_key("ES256", random=secrets.token_bytes)
    jwk = attacker.verifying.public_jwk()
    for kid in (attacker.kid, EC.kid, ABSENT):
        for extra in ({"jwk": jwk}, {"jwk": EC.verifying.public_jwk()}, {"x5c": ["AAAA"]}, {"x5t": "AA"}):
            token = with_header({"kid": kid, **extra}, attacker)
            assert cause_of(token) == "header"
    assert cause_of(with_header({"kid": attacker.kid}, attacker)) == "unknown_key"
    assert cause_of(with_header({"kid": EC.kid}, attacker)) == "signature"


@pytest.mark.parametrize("crit", [[], ["b64"], ["exp"], ["alg"], ["unknown"], "exp", None, {}, [1], ["crit"]])
def test_critical_extensions_are_not_ignored_cve_2026_32597_2025_59420(crit: object) -> None:
    assert cause_of(with_header({"crit": crit})) == "header"
    assert cause_of(with_header({"crit": crit, "b64": False, "unknown": 1})) == "header"


@pytest.mark.parametrize(
    "issuer",
    [
        "https",
        "https://id.example",
        ISSUER + "/",
        ISSUER.upper(),
        ISSUER + ".attacker.test",
        "x" + ISSUER,
        ISSUER + " ",
        " " + ISSUER,
        ISSUER.replace("id", "ID"),
        ISSUER.replace(".", "\u3002"),
        "http://id.example.test",
        [ISSUER],
        [],
        None,
        {"iss": ISSUER},
        "",
    ],
)
def test_the_issuer_is_compared_as_a_whole_cve_2024_53861(issuer: object) -> None:
    assert cause_of(with_claims({"iss": issuer})) in ("issuer", "claims")


CONNECTIONS: list[str] = []
_watching: list[bool] = []


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _watching and event.startswith(("socket.", "urllib.", "http.", "subprocess.", "os.system", "open")):
        CONNECTIONS.append(event)


@pytest.fixture
def watched() -> Iterator[list[str]]:
    if not CONNECTIONS:
        sys.addaudithook(_watch)
        CONNECTIONS.append("hooked")
    del CONNECTIONS[1:]
    _watching.append(True)
    try:
        yield CONNECTIONS
    finally:
        _watching.clear()


def test_no_address_in_a_token_or_a_key_set_is_followed_cve_2026_102267(watched: list[str]) -> None:
    for address in ("http://127.0.0.1:9/jwks", "https://attacker.test/", "file:///etc/passwd", "//attacker.test"):
        for name in ("jku", "x5u", "kid", "iss", "jwk", "zip"):
            cause_of(with_header({name: address}))
        cause_of(with_claims({"iss": address}))
        with pytest.raises(KeyRefused):
            load_jwks(compact({"keys": [{"kty": "EC", "kid": "a", "x5u": address}], "jwks_uri": address}))
    assert verify(mint(EC)).subject == "u-42"
    assert watched == ["hooked"]


def test_one_bad_published_key_does_not_blind_a_verifier_cve_2026_102274() -> None:
    bad = [{"kty": "EC", "kid": "bad", "crv": "P-256", "x": "AA", "y": "AA"}, {"kty": "future", "kid": "new"}]
    ring = load_jwks(compact({"keys": [*bad, EC.verifying.public_jwk()]}))
    assert verify(mint(EC), ring).subject == "u-42"


class Watched(Mapping[str, VerifyingKey]):
    """A key ring that remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[object] = []

    def __getitem__(self, kid: str) -> VerifyingKey:
        self.asked.append(kid)
        return RING[kid]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("keys are never tried one after another")

    def __len__(self) -> int:
        return len(RING)


@pytest.mark.parametrize(
    "kid",
    [
        "../../dev/null",
        "' OR 1=1 --",
        "/proc/self/environ",
        "x\x00y",
        "*",
        "kid\nlog line",
        "http://127.0.0.1/",
        "a" * 300,
    ],
)
def test_a_hostile_kid_is_only_looked_up_cve_2025_65945(kid: str) -> None:
    ring = Watched()
    assert cause_of(with_header({"kid": kid}), ring) == "unknown_key"
    assert ring.asked == [kid]


def test_a_kid_finds_only_the_key_of_that_name() -> None:
    for kid in (HS.kid.upper(), HS.kid + " ", HS.kid[:-1], "", EC.kid):
        assert cause_of(with_header({"kid": kid})) in ("unknown_key", "algorithm")
    for nothing in (ABSENT, None, 0, [HS.kid], {"kid": HS.kid}):
        assert cause_of(with_header({"kid": nothing})) == "header"


BOMBS: dict[str, Callable[[], bytes]] = {
    "a megabyte of a": lambda: b"a" * 2**20,
    "a megabyte of dots": lambda: b"." * 2**20,
    "a megabyte in the header": lambda: b"a" * 2**20 + b".e30.AA",
    "a megabyte in the signature": lambda: with_claims({}) + b"A" * 2**20,
    "deep nesting in the header": lambda: signed(b'{"a":' * 380, b"{}"),
    "deep nesting in the claims": lambda: with_payload(b"[" * 5000),
    "deep closed nesting in the claims": lambda: with_payload(
        compact(CLAIMS)[:-1] + b',"a":' + b"[" * 2400 + b"]" * 2400 + b"}"
    ),
    "deep objects in the claims": lambda: with_payload(
        compact(CLAIMS)[:-1] + b',"a":' + b'{"a":' * 700 + b"1" + b"}" * 701
    ),
    "many members": lambda: with_payload(b"{" + b",".join(b'"%d":1' % index for index in range(600)) + b"}"),
    "a long number": lambda: with_payload(compact(CLAIMS).replace(b'"iat":', b'"iat":' + b"1" * 5000)),
    "a long fraction": lambda: with_payload(compact(CLAIMS).replace(b'"iat":', b'"iat":0.' + b"1" * 5000)),
    "a compressed payload": lambda: signed(
        compact({"alg": "HS256", "kid": HS.kid, "typ": "at+jwt", "zip": "DEF"}),
        zlib.compress(b"{" + b" " * 10**6 + b"}"),
    ),
    "a large p2c": lambda: signed(
        compact({"alg": "PBES2-HS256+A128KW", "enc": "A128GCM", "p2c": 2**31, "p2s": "AA", "kid": HS.kid}), b"{}"
    ),
    "an encrypted token": lambda: b".".join(
        [b64(compact({"alg": "dir", "enc": "A256GCM"})), b"AA", b"AA", b"AA", b"AA"]
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_time_and_memory_cve_2025_61920_2024_33664_2023_6681(name: str) -> None:
    token = BOMBS[name]()
    tracemalloc.start()
    begun = perf_counter()
    try:
        cause_of(token)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20
    # The work is under a millisecond; the rest is room for a machine that is busy with something else.
    assert perf_counter() - begun < 0.5


def test_after_rotation_the_new_key_signs_ghsa_4grg_w6v8_c28g() -> None:
    old, new = (generate_signing_key("ES256", random=secrets.token_bytes) for _ in range(2))
    ring = {old.kid: old.verifying, new.kid: new.verifying}
    token = mint(new)
    assert json.loads(urlsafe_b64decode(token.split(b".")[0] + b"=="))["kid"] == new.kid
    assert verify(token, {new.kid: new.verifying}).subject == "u-42"
    assert verify(mint(old), ring).subject == "u-42"
    assert cause_of(mint(old), {new.kid: new.verifying}) == "unknown_key"
    assert cause_of(token, {new.kid: old.verifying}) == "signature"


@pytest.mark.parametrize(
    "typ",
    [ABSENT, None, "", "JWT", "jwt", "at+JWT", "AT+JWT", "application/at+jwt", "at jwt", "at+jwt ", "id+jwt",
     "logout+jwt", "dpop+jwt", "secevent+jwt", "refresh", "token-introspection+jwt", ["at+jwt"], True],
)  # fmt: skip
def test_tokens_of_another_kind_are_refused_cve_2026_101023(typ: object) -> None:
    assert cause_of(with_header({"typ": typ})) == "header"


def test_psychic_signatures_are_refused_cve_2022_21449() -> None:
    body = with_claims({}, EC).rpartition(b".")[0]
    for signature in (bytes(64), bytes(63) + b"\x01", P256_ORDER.to_bytes(32, "big") * 2, b"\xff" * 64):
        assert cause_of(body + b"." + b64(signature)) == "signature"


def test_a_key_of_another_issuer_is_no_key_of_ours_storm_0558() -> None:
    other = generate_signing_key("ES256", random=secrets.token_bytes)
    assert cause_of(with_claims({}, other)) == "unknown_key"
    assert cause_of(with_claims({}, other), {EC.kid: EC.verifying, other.kid: EC.verifying}) == "signature"
    assert cause_of(with_claims({"iss": "https://other.test"}, EC)) == "issuer"


# Headers.


@pytest.mark.parametrize("key", KEYS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize(
    "alg", [*ALGORITHMS, "es256", "HS384", "HS512", "PS256", "ES384", "ES256K", "Ed25519", "ed25519"]
)
def test_the_key_decides_the_algorithm(alg: str, key: SigningKey) -> None:
    if alg != key.algorithm:
        assert cause_of(with_header({"alg": alg}, key)) == "algorithm"


@pytest.mark.parametrize(
    "name",
    ["jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "cty", "crit", "b64", "zip", "enc", "epk", "apu", "apv", "iv",
     "tag", "p2s", "p2c", "url", "nonce", "iss", "sub", "aud", "exp", "ppt", "svt", "Alg", "kid ", "", "x"],
)  # fmt: skip
@pytest.mark.parametrize("value", [None, "", "x", True, 1, [], {}])
def test_every_other_member_of_a_header_is_refused(name: str, value: object) -> None:
    assert cause_of(with_header({name: value})) == "header"


GOOD_HEADER = compact({"alg": "HS256", "kid": HS.kid, "typ": "at+jwt"})


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"x"',
        b"[]",
        b"{}",
        b"[" + GOOD_HEADER + b"]",
        GOOD_HEADER + b"{}",
        GOOD_HEADER + b"\x00",
        GOOD_HEADER[:-1],
        GOOD_HEADER[:-1] + b",}",
        b"\xef\xbb\xbf" + GOOD_HEADER,
        GOOD_HEADER.decode().encode("utf-16"),
        GOOD_HEADER.decode().encode("utf-16-le"),
        GOOD_HEADER.decode().encode("utf-32"),
        GOOD_HEADER.replace(b'"', b"'"),
        GOOD_HEADER.replace(b"at+jwt", b"at+jwt\xff"),
        GOOD_HEADER.replace(b"at+jwt", b"at+jwt\\ud800"),
        GOOD_HEADER.replace(b"HS256", b"HS256\x00"),
        b"/**/" + GOOD_HEADER,
        b'{"a":NaN,' + GOOD_HEADER[1:],
        GOOD_HEADER + b" " * 500,
    ],
)
def test_a_header_that_is_not_one_plain_object_is_refused(header: bytes) -> None:
    assert cause_of(signed(header, compact(CLAIMS))) in ("header", "shape", "duplicate_member")


@pytest.mark.parametrize("name", ["alg", "kid", "typ", "a\\u006cg", "\\u0061lg"])
@pytest.mark.parametrize("first", [True, False])
def test_a_header_that_names_a_member_twice_is_refused(name: str, first: bool) -> None:
    value = {"kid": HS.kid, "typ": "at+jwt"}.get(name, "HS256")
    again = f'"{name}":"{value}"'.encode()
    header = b"{" + again + b"," + GOOD_HEADER[1:] if first else GOOD_HEADER[:-1] + b"," + again + b"}"
    assert cause_of(signed(header, compact(CLAIMS))) == "duplicate_member"


def test_a_header_in_another_order_and_with_spaces_is_still_a_header() -> None:
    # Only our issuer can sign one, and it names the same key: nothing is gained by refusing it.
    header = json.dumps({"typ": "at+jwt", "kid": HS.kid, "alg": "HS256"}).encode()
    assert verify(signed(header, compact(CLAIMS))).subject == "u-42"


# Claims.

TEXTS = ["iss", "sub", "jti", "sid", "acr"]
NOT_TEXT: list[object] = [None, 1, 1.5, True, [], ["x"], {}, ""]
NOT_SECONDS: list[object] = [
    None,
    "1",
    str(NOW),
    1.5,
    NOW + 0.5,
    True,
    [],
    [NOW],
    {},
    "",
    -1,
    2**53 + 1,
    2**64,
    10**22,
    -(2**63),
]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("value", [*NOT_TEXT, "x" * 1025])
def test_text_claims_are_text(name: str, value: object) -> None:
    assert cause_of(with_claims({name: value})) == "claims"


@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
@pytest.mark.parametrize("value", NOT_SECONDS)
def test_times_are_whole_seconds_within_bounds(name: str, value: object) -> None:
    assert cause_of(with_claims({name: value})) == "claims"


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e400", "1.0", "1e9", "0x10", "01", "+1", "1_0", "-0.5"]
)
@pytest.mark.parametrize("name", ["iat", "exp", "nbf"])
def test_times_in_other_notations_are_refused(name: str, value: str) -> None:
    payload = compact({**CLAIMS, name: "@"}).replace(b'"@"', value.encode())
    assert cause_of(with_payload(payload)) == "claims"


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "client_id", "jti", "iat", "exp"])
def test_required_claims_are_required(name: str) -> None:
    assert cause_of(with_claims({name: ABSENT})) == "claims"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"exp": NOW + 1}, "expired"),
        ({"iat": NOW + 2}, "not_yet_valid"),
        ({"nbf": NOW + 2}, "not_yet_valid"),
        ({"nbf": 2**53}, "not_yet_valid"),
        ({"exp": NOW}, "claims"),
        ({"exp": NOW - 1}, "claims"),
        ({"exp": NOW + 10 * 365 * 86_400}, "claims"),
        ({"exp": 2**53}, "claims"),
        ({"exp": NOW + MAX_LIFETIME + 1}, "claims"),
        ({"iat": 0}, "claims"),
        ({"iat": 0, "exp": 60}, "expired"),
        ({"iat": 2**53 - 600, "exp": 2**53}, "not_yet_valid"),
    ],
)
def test_times_far_away_or_in_the_wrong_order_are_refused(changes: dict[str, object], cause: str) -> None:
    assert cause_of(with_claims(changes)) == cause


@pytest.mark.parametrize(
    "changes", [{"nbf": NOW + 1}, {"nbf": 0}, {"iat": NOW + 1}, {"exp": NOW + 2}, {"exp": NOW + MAX_LIFETIME}]
)
def test_times_exactly_at_their_edge_are_accepted(changes: dict[str, object]) -> None:
    assert verify(with_claims(changes)).subject == "u-42"


@pytest.mark.parametrize(
    "audience",
    [None, "", [], [""], [API, ""], [[API]], [None], [API, None], [API, 1], {"aud": API}, {API: True}, 1, True,
     API + "/", API.upper(), API[:-1], "https://api", f"{API} x", f"x,{API}", f"{API}.attacker.test", [API[:-1]], "*",
     ["*"], [f"{API},x"], [API] * 33, "https://other.test"],
)  # fmt: skip
def test_an_audience_is_ours_exactly_or_not_at_all(audience: object) -> None:
    assert cause_of(with_claims({"aud": audience})) in ("audience", "claims")


@pytest.mark.parametrize("audience", [API, [API], ["https://other.test", API], [API] * 32])
def test_good_audiences_are_accepted(audience: object) -> None:
    assert verify(with_claims({"aud": audience})).subject == "u-42"


@pytest.mark.parametrize(
    "scope", [None, "", " ", "a ", " a", "a  b", "a\tb", "a\nb", "a\u00a0b", 'a"', "a\\b", "é", "\x00", ["a"], 1, {}]
)
def test_malformed_scopes_are_refused(scope: object) -> None:
    assert cause_of(with_claims({"scope": scope})) == "claims"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("client_id", None),
        ("client_id", 1),
        ("client_id", ["web"]),
        ("auth_time", None),
        ("auth_time", "now"),
        ("auth_time", True),
        ("auth_time", -1),
        ("auth_time", 2**53 + 1),
        ("amr", "pwd"),
        ("amr", [""]),
        ("amr", [1]),
        ("amr", {}),
        ("amr", None),
        ("amr", ["x"] * 33),
        ("jti", "j" * 129),
    ],
)
def test_other_claims_of_the_wrong_type_are_refused(name: str, value: object) -> None:
    assert cause_of(with_claims({name: value})) == "claims"


def test_a_token_without_a_time_of_authentication_is_never_fresh() -> None:
    assert verify(with_claims({})).auth_time == 0.0
    assert verify(with_claims({"auth_time": NOW - 0.5})).auth_time == NOW - 0.5


@pytest.mark.parametrize(
    "name",
    ["cnf", "act", "may_act", "azp", "nonce", "at_hash", "c_hash", "s_hash", "events", "htm", "htu", "ath", "active"],
)
def test_what_limits_a_token_or_marks_another_kind_is_not_ignored(name: str) -> None:
    # A DPoP-bound token taken as a bearer token would be worth more to the thief (RFC 9449 s7.1).
    assert cause_of(with_claims({name: {"jkt": "x"}})) == "claims"


@pytest.mark.parametrize("name", ["iss", "sub", "aud", "exp", "role", "ex\\u0070"])
@pytest.mark.parametrize("first", [True, False])
def test_claims_that_name_a_member_twice_are_refused(name: str, first: bool) -> None:
    payload = compact({**CLAIMS, "role": "user"})
    value = compact({**CLAIMS, "role": "user"}.get(name, NOW + 600))
    again = f'"{name}":'.encode() + value
    twice = b"{" + again + b"," + payload[1:] if first else payload[:-1] + b"," + again + b"}"
    assert cause_of(with_payload(twice)) == "duplicate_member"


def test_a_member_named_twice_deep_inside_is_refused() -> None:
    payload = compact(CLAIMS)[:-1] + b',"own":[{"a":{"b":1,"c":2,"b":1}}]}'
    assert cause_of(with_payload(payload)) == "duplicate_member"


@pytest.mark.parametrize(
    "payload",
    [
        b" ",
        b"null",
        b"[]",
        b"{}",
        b'"' + b64(compact(CLAIMS)) + b'"',
        b"[" + compact(CLAIMS) + b"]",
        compact(CLAIMS)[:-1],
        compact(CLAIMS) + b"x",
        compact(CLAIMS) + compact(CLAIMS),
        compact(CLAIMS) + b"\x00",
        b"\xef\xbb\xbf" + compact(CLAIMS),
        compact(CLAIMS).decode().encode("utf-16"),
        compact(CLAIMS).decode().encode("utf-16-be"),
        compact(CLAIMS).replace(b"u-42", b"u-\xff"),
        compact(CLAIMS).replace(b"u-42", b"u-\xc0\x80"),
        compact(CLAIMS).replace(b"u-42", b"u-\xed\xa0\x80"),
        compact(CLAIMS).replace(b"u-42", b"u-\\ud800"),
        compact(CLAIMS).replace(b"u-42", b"u-\n"),
        compact(CLAIMS).replace(b'"', b"'"),
        compact(CLAIMS)[:-1] + b",}",
        compact(CLAIMS)[:-1] + b',"own":NaN}',
        compact(CLAIMS)[:-1] + b',"own":1e999}',
        compact(CLAIMS)[:-1] + b',"own":{"$":"datetime","v":"soon"}}',
        compact(CLAIMS)[:-1] + b',"own":{"$":"decimal","v":"x"}}',
        compact(CLAIMS)[:-1] + b',"own":{"$":"pickle","v":"gASV"}}',
    ],
)
def test_claims_that_are_not_one_plain_object_are_refused(payload: bytes) -> None:
    assert cause_of(with_payload(payload)) == "claims"


# Spellings.


def respellings(token: bytes) -> dict[str, object]:
    header, payload, signature = token.split(b".")
    raw = urlsafe_b64decode(signature + b"==")
    letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    found: dict[str, object] = {
        "line end after": token + b"\n",
        "space before": b" " + token,
        "tab after": token + b"\t",
        "zero after": token + b"\x00",
        "zero before": b"\x00" + token,
        "bearer before": b"Bearer " + token,
        "quoted": b'"' + token + b'"',
        "a dot after": token + b".",
        "a dot before": b"." + token,
        "two dots": token.replace(b".", b"..", 1),
        "four segments": token + b".AA",
        "percent": quote(token.decode(), safe="").replace("e", "%65").encode(),
        "full stops of another script": token.decode().replace(".", "\u3002"),
        "wide letters": token.decode().replace("e", "\uff45"),
        "letters without ASCII": token.decode() + "\u0131",
        "a surrogate": token.decode() + "\ud800",
        "byte order mark": b"\xef\xbb\xbf" + token,
        "standard alphabet": b".".join([header, payload, b64encode(raw).rstrip(b"=")])
        if b"-" in signature or b"_" in signature
        else token + b"+",
        "JSON": compact({"protected": header.decode(), "payload": payload.decode(), "signature": signature.decode()}),
        "flattened in a list": compact([token.decode()]),
        "a line end inside": header + b"." + payload + b".\n" + signature,
        "wrapped": header + b"." + payload[:20] + b"\r\n" + payload[20:] + b"." + signature,
        "detached": header + b".." + signature,
        "lower case": token.lower(),
        "upper case": token.upper(),
        "twice": token + token,
        "with a comma": token + b"," + token,
        "a longer signature": header + b"." + payload + b"." + b64(raw + b"\x00"),
        "a shorter signature": header + b"." + payload + b"." + b64(raw[:-1]),
        "an octet before": header + b"." + payload + b"." + b64(b"\x00" + raw),
    }
    for place, segment in enumerate((header, payload, signature)):
        rest = [header, payload, signature]
        for name, other in {
            "=": segment + b"=",
            "==": segment + b"==",
            "===": segment + b"===",
            "= inside": segment[:4] + b"=" + segment[4:],
            "space inside": segment[:4] + b" " + segment[4:],
            "junk inside": segment[:4] + b"!" + segment[4:],
            "AA after": segment + b"AA",
            "AAAA after": segment + b"AAAA",
            "one more letter": segment + b"A",
        }.items():
            rest[place] = other
            found[f"{name} in segment {place}"] = b".".join(rest)
        # The last letter carries bits that decoders ignore.
        for letter in letters:
            if letter != segment[-1]:
                rest[place] = segment[:-1] + bytes([letter])
                found[f"last letter {letter} in segment {place}"] = b".".join(rest)
    return found


@pytest.mark.parametrize("key", KEYS.values(), ids=ALGORITHMS)
def test_every_respelling_of_a_token_is_refused(key: SigningKey) -> None:
    token = mint(key)
    assert verify(token).subject == "u-42"
    for name, other in respellings(token).items():
        assert other != token
        assert refusal_of(other) in CAUSES, name


def test_the_twin_and_the_der_form_of_an_es256_signature_are_refused() -> None:
    for _ in range(16):
        body, _, signature = mint(EC).rpartition(b".")
        raw = urlsafe_b64decode(signature + b"==")
        r, s = int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")
        twin = raw[:32] + (P256_ORDER - s).to_bytes(32, "big")
        assert cause_of(body + b"." + b64(twin)) == "signature"
        for value in (s, P256_ORDER - s):
            assert cause_of(body + b"." + b64(encode_dss_signature(r, value))) == "signature"


@pytest.mark.parametrize("place", [0, 1])
def test_a_segment_in_a_second_spelling_is_refused_even_when_it_was_signed_so(place: int) -> None:
    spellings = 0
    for fill in range(3):
        # One or two octets beyond a multiple of three leave spare bits in the last letter.
        plain = [GOOD_HEADER + b" " * fill, compact({**CLAIMS, "sub": "u" + "x" * fill})]
        segments = [b64(each) for each in plain]
        if len(plain[place]) % 3:
            last = segments[place][-1]
            segments[place] = segments[place][:-1] + bytes([last + 1])
            data = b".".join(segments)
            assert cause_of(data + b"." + b64(HS.sign(data))) == "spelling"
            spellings += 1
    assert spellings == 2


@given(position=st.integers(0, 10_000), octet=st.integers(0, 255), key=st.sampled_from([HS, EC]))
def test_every_changed_octet_is_refused(position: int, octet: int, key: SigningKey) -> None:
    token = bytearray(TOKENS[key.kid])
    before = bytes(token)
    token[position % len(token)] = octet
    if bytes(token) != before:
        cause_of(bytes(token))


TOKENS = {key.kid: mint(key) for key in KEYS.values()}


@pytest.mark.parametrize(
    "junk", [None, 1, 1.5, True, [], {}, (), bytearray(b"a.b.c"), memoryview(b"a.b.c"), object(), ["a"]]
)
def test_what_is_no_text_is_refused_quietly(junk: object) -> None:
    assert cause_of(junk) == "shape"


@pytest.mark.parametrize(
    "token", ["", ".", "..", "...", "a..", ".a.", "..a", "a.b", "a.b.", ".b.c", "a..c", "a.b.c.d", "a b.c.d"]
)
def test_other_shapes_are_refused(token: str) -> None:
    assert cause_of(token) == cause_of(token.encode()) == "shape"


def test_the_size_is_judged_before_anything_else() -> None:
    assert cause_of(b"!" * (MAX_TOKEN + 1)) == cause_of("\ud800" * (MAX_TOKEN + 1)) == "size"
    assert cause_of(b"!" * MAX_TOKEN) == "shape"


def test_nothing_of_the_claims_is_parsed_before_the_signature_is_right() -> None:
    for payload in (b"{", b"[" * 4000, compact({**CLAIMS, "exp": 1}), compact({**CLAIMS, "iss": "x"})):
        assert cause_of(with_payload(payload)[:-4] + b"AAAA") == "signature"


# Whatever comes in.

SEGMENT = st.binary(max_size=60).map(b64) | st.text("AZaz09-_=+/. ", max_size=20).map(str.encode)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from([ISSUER, API, NOW]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("$"), inner, max_size=3),
    max_leaves=10,
)


def refusal_of(token: Any) -> str | None:
    """Why a token is refused; `None` when it is accepted."""
    try:
        found = verify(token)
    except TokenInvalid as refused:
        return refused.cause
    assert found.issuer == ISSUER
    assert API in found.audience
    return None


def only_verdicts(token: Any) -> None:
    assert refusal_of(token) in (None, *CAUSES)


@given(st.one_of(st.binary(max_size=300), st.text(max_size=200), st.lists(SEGMENT, max_size=5).map(b".".join)))
@example("")
def test_no_input_raises_anything_else(token: str | bytes) -> None:
    only_verdicts(token)


@given(st.binary(max_size=120))
def test_no_signed_octets_raise_anything_else(payload: bytes) -> None:
    only_verdicts(with_payload(payload or b" "))


@given(
    st.dictionaries(st.sampled_from([*CLAIMS, "nbf", "scope", "sid", "auth_time", "acr", "amr", "own", "cnf"]), JSON)
)
def test_no_signed_claims_raise_anything_else(changes: dict[str, object]) -> None:
    only_verdicts(with_claims(changes))


@given(st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "jwk", "x"]), JSON), st.sampled_from([HS, EC]))
def test_no_signed_header_raises_anything_else(changes: dict[str, object], key: SigningKey) -> None:
    only_verdicts(with_header(changes, key))


@given(st.integers(0, 10_000), st.integers(0, 40), st.binary(max_size=40), st.sampled_from(sorted(TOKENS)))
def test_no_damaged_token_raises_anything_else(position: int, length: int, noise: bytes, kid: str) -> None:
    token = TOKENS[kid]
    position %= len(token)
    damaged = token[:position] + noise + token[position + length :]
    if damaged != token:
        cause_of(damaged)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=12))
def test_no_damaged_but_signed_claims_raise_anything_else(position: int, noise: bytes) -> None:
    payload = compact({**CLAIMS, "own": {"$": "map", "v": {"a": [1, 2.5, None]}}})
    position %= len(payload)
    only_verdicts(with_payload(payload[:position] + noise + payload[position + len(noise) :]))
