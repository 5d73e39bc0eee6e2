"""Keys: the vectors of the RFCs, what is too weak to be used, and key sets that came from outside."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import tracemalloc
from base64 import urlsafe_b64decode, urlsafe_b64encode
from contextlib import suppress
from time import perf_counter
from typing import Any, get_args

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, padding, rsa, x25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.primitives import jwk
from coatcheck.primitives.jwk import (
    MAX_JWKS_BYTES,
    MAX_JWKS_KEYS,
    MAX_PACKED_BYTES,
    Algorithm,
    KeyRefused,
    SigningKey,
    decode_base64url,
    encode_base64url,
    generate_signing_key,
    load_jwks,
    unpack_signing_key,
)

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
P256_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
KEYS: dict[Algorithm, SigningKey] = {
    each: generate_signing_key(each, random=secrets.token_bytes) for each in ALGORITHMS
}
SIZES: dict[Algorithm, int] = {"ES256": 64, "HS256": 32, "RS256": 384, "EdDSA": 64}


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def raw(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def number(text: str) -> int:
    return int.from_bytes(raw(text), "big")


def jwks(*keys: object) -> bytes:
    return json.dumps({"keys": keys}).encode()


def published(algorithm: Algorithm = "ES256", /, **changes: object) -> dict[str, object]:
    members: dict[str, object] = {**KEYS[algorithm].verifying.public_jwk(), **changes}
    return {name: value for name, value in members.items() if value is not ...}


def der(private: Any) -> bytes:
    encoded: bytes = private.private_bytes(
        serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return encoded


# Vectors, written down from the RFCs.

HS_KEY = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
JOE = "eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ"
RS_N = (
    "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMs"
    "D1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdV"
    "MTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ"
)
RS_SIGNATURE = (
    "cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZ"
    "cAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-e"
    "OkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw"
)
ES_X, ES_Y = "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU", "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"
ES_D = "jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"
ES_SIGNATURE = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q"
ED_D, ED_X = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A", "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"
ED_SIGNATURE = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
THUMBED_N = (
    "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMst"
    "n64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajr"
    "n1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
)


def test_hs256_vector_of_rfc_7515_a_1() -> None:
    key = unpack_signing_key(raw(HS_KEY), kid="a1", algorithm="HS256")
    data = f"eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.{JOE}".encode()
    signature = raw("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk")
    assert key.sign(data) == signature
    assert key.verifying.verify(data, signature)


def test_rs256_vector_of_rfc_7515_a_2() -> None:
    key = load_jwks(jwks({"kty": "RSA", "kid": "a2", "n": RS_N, "e": "AQAB"}))["a2"]
    assert key.verify(f"eyJhbGciOiJSUzI1NiJ9.{JOE}".encode(), raw(RS_SIGNATURE))


def test_es256_vector_of_rfc_7515_a_3_has_the_higher_s_so_only_its_twin_is_accepted() -> None:
    key = load_jwks(jwks({"kty": "EC", "kid": "a3", "crv": "P-256", "x": ES_X, "y": ES_Y}))["a3"]
    data, signature = f"eyJhbGciOiJFUzI1NiJ9.{JOE}".encode(), raw(ES_SIGNATURE)
    s = int.from_bytes(signature[32:], "big")
    assert s > P256_ORDER // 2
    assert not key.verify(data, signature)
    assert key.verify(data, signature[:32] + (P256_ORDER - s).to_bytes(32, "big"))


@pytest.mark.parametrize(
    ("message", "r", "s"),
    [
        (
            b"sample",
            0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
            P256_ORDER - 0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
        ),
        (
            b"test",
            0xF1ABB023518351CD71D881567B1EA663ED3EFCF6C5132B354F28D3B0B7D38367,
            0x019F4113742A2B14BD25926B49C649155F267E60D3814B4C0CC84250E46F0083,
        ),
    ],
)
def test_es256_nonces_are_those_of_rfc_6979_a_2_5(message: bytes, r: int, s: int) -> None:
    private = ec.derive_private_key(0xC9AFA9D845BA75166B5C215767B1D6934E50C3DB36E89B127B8A622B120F6721, ec.SECP256R1())
    key = unpack_signing_key(der(private), kid="6979", algorithm="ES256")
    assert key.sign(message) == r.to_bytes(32, "big") + s.to_bytes(32, "big")


def test_eddsa_vector_of_rfc_8037_a_4() -> None:
    private = ed25519.Ed25519PrivateKey.from_private_bytes(raw(ED_D))
    key = unpack_signing_key(der(private), kid="a4", algorithm="EdDSA")
    data = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
    assert key.sign(data) == raw(ED_SIGNATURE)
    assert key.verifying.verify(data, raw(ED_SIGNATURE))
    assert key.verifying.public_jwk()["x"] == ED_X


def test_thumbprints_are_those_of_rfc_7638_and_8037() -> None:
    assert jwk._thumbprint({"kty": "RSA", "n": THUMBED_N, "e": "AQAB"}) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert jwk._thumbprint({"kty": "OKP", "crv": "Ed25519", "x": ED_X}) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_of_the_public_set_of_rfc_7517_a_1_only_the_key_for_signatures_is_taken() -> None:
    document = f"""
        {{"keys":
          [
            {{"kty":"EC",
             "crv":"P-256",
             "x":"MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
             "y":"4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
             "use":"enc",
             "kid":"1"}},

            {{"kty":"RSA",
             "n": "{THUMBED_N}",
             "e":"AQAB",
             "alg":"RS256",
             "kid":"2011-04-29"}}
          ]
        }}"""
    found = load_jwks(document.encode())
    assert list(found) == ["2011-04-29"]
    assert load_jwks(document.replace('"enc"', '"sig"').encode()).keys() == {"1", "2011-04-29"}


def test_the_private_and_the_symmetric_sets_of_rfc_7517_a_2_and_a_3_are_refused() -> None:
    private = {
        "kty": "EC",
        "crv": "P-256",
        "x": "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4",
        "y": "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM",
        "d": "870MB6gfuTJ4HtUnUvYMyJpr5eUZNP4Bk43bVdj3eAE",
        "use": "enc",
        "kid": "1",
    }
    with pytest.raises(KeyRefused, match="no key"):
        load_jwks(jwks(private | {"use": "sig"}))
    secret = {"kty": "oct", "k": HS_KEY, "kid": "HMAC key used in JWS spec Appendix A.1 example"}
    with pytest.raises(KeyRefused, match="no kid"):
        load_jwks(jwks({"kty": "oct", "alg": "A128KW", "k": "GawgguFyGrWKav7AX4VKUg"}, secret))
    with pytest.raises(KeyRefused, match="no key"):
        load_jwks(jwks(secret))


# Base64url has one spelling.


@given(st.binary(max_size=100))
def test_base64url_reads_back(data: bytes) -> None:
    assert encode_base64url(data).decode() == b64(data)
    assert decode_base64url(encode_base64url(data)) == data


@given(st.one_of(st.binary(max_size=12), st.text("AQgwEIMZz09-_+/= \n", max_size=9).map(str.encode)))
def test_only_the_encoding_of_octets_is_read(text: bytes) -> None:
    found = decode_base64url(text)
    assert found is None or b64(found).encode() == text


@pytest.mark.parametrize(
    "text", [b"A", b"AB", b"AAB", b"AA==", b"AA=", b"AA\n", b" AA", b"A+A", b"A/A", b"AA AA", b"\xc3\xa4A"]
)
def test_other_spellings_of_base64url_are_refused(text: bytes) -> None:
    assert decode_base64url(text) is None


# Signing keys.


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_new_key_signs_what_its_other_half_verifies(algorithm: Algorithm) -> None:
    key = KEYS[algorithm]
    signature = key.sign(b"data")
    assert len(signature) == SIZES[algorithm]
    assert key.verifying.verify(b"data", signature)
    assert not key.verifying.verify(b"date", signature)
    assert (key.verifying.kid, key.verifying.algorithm, key.algorithm) == (key.kid, algorithm, algorithm)
    assert json.loads(raw(key.header.decode())) == {"alg": algorithm, "kid": key.kid, "typ": "at+jwt"}
    assert key.header.decode() == b64(raw(key.header.decode()))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_packed_key_comes_back_as_itself(algorithm: Algorithm) -> None:
    key = KEYS[algorithm]
    again = unpack_signing_key(key.pack(), kid=key.kid, algorithm=algorithm)
    assert again.pack() == key.pack()
    assert again.header == key.header
    assert key.verifying.verify(b"data", again.sign(b"data"))


@pytest.mark.parametrize("algorithm", [each for each in ALGORITHMS if each != "HS256"])
def test_the_name_of_a_key_is_its_thumbprint(algorithm: Algorithm) -> None:
    members = KEYS[algorithm].verifying.public_jwk()
    needed = {name: members[name] for name in sorted({"kty", "crv", "x", "y", "n", "e"} & members.keys())}
    digest = hashlib.sha256(json.dumps(needed, separators=(",", ":")).encode()).digest()
    assert KEYS[algorithm].kid == b64(digest) == members["kid"]


def test_the_name_of_a_secret_says_nothing_about_it() -> None:
    given_out: list[int] = []

    def random(size: int) -> bytes:
        given_out.append(size)
        return bytes([len(given_out)]) * size

    key = generate_signing_key("HS256", random=random)
    assert given_out == [32, 12]
    assert (key.pack(), key.kid) == (b"\x01" * 32, b64(b"\x02" * 12))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_secret_shows_in_a_representation(algorithm: Algorithm) -> None:
    key = KEYS[algorithm]
    for shown in (repr(key), str(key), repr(key.verifying)):
        assert key.kid in shown
        assert "<" not in shown
        assert len(shown) < 120


def test_new_rsa_keys_have_3072_bits() -> None:
    assert number(KEYS["RS256"].verifying.public_jwk()["n"]).bit_length() == 3072


@given(st.binary(max_size=64))
def test_es256_signs_with_the_lower_s(data: bytes) -> None:
    assert 0 < int.from_bytes(KEYS["ES256"].sign(data)[32:], "big") <= P256_ORDER // 2


def test_without_deterministic_ecdsa_signatures_are_random_and_still_low(monkeypatch: pytest.MonkeyPatch) -> None:
    def old(algorithm: hashes.HashAlgorithm | Prehashed, deterministic_signing: bool = False) -> ec.ECDSA:
        if deterministic_signing:
            raise UnsupportedAlgorithm("OpenSSL before 3.2")
        return ec.ECDSA(algorithm)

    monkeypatch.setattr(jwk, "ECDSA", old)
    monkeypatch.setattr(jwk, "_ECDSA", jwk._deterministic_ecdsa())
    made = {KEYS["ES256"].sign(b"data") for _ in range(8)}
    assert len(made) == 8
    assert all(KEYS["ES256"].verifying.verify(b"data", each) for each in made)
    assert all(int.from_bytes(each[32:], "big") <= P256_ORDER // 2 for each in made)


# One signature, one spelling.


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_signatures_have_exactly_one_length(algorithm: Algorithm) -> None:
    key, good = KEYS[algorithm], KEYS[algorithm].sign(b"data")
    for other in (b"", good[:-1], good + b"\x00", b"\x00" + good, good[1:], good * 2, bytes(len(good)), b"\xff" * 500):
        assert not key.verifying.verify(b"data", other)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(data=st.data())
def test_no_other_octets_verify(algorithm: Algorithm, data: st.DataObject) -> None:
    good = KEYS[algorithm].sign(b"data")
    position = data.draw(st.integers(0, len(good) - 1))
    changed = bytearray(good)
    changed[position] ^= data.draw(st.integers(1, 255))
    assert not KEYS[algorithm].verifying.verify(b"data", bytes(changed))


def test_the_high_s_twin_the_der_form_and_psychic_signatures_are_refused() -> None:
    key = KEYS["ES256"]
    good = key.sign(b"data")
    r, s = good[:32], int.from_bytes(good[32:], "big")
    private = serialization.load_der_private_key(key.pack(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    as_der = private.sign(b"data", ec.ECDSA(hashes.SHA256()))
    assert decode_dss_signature(as_der) > (0, 0)
    zero, one, order = bytes(32), (1).to_bytes(32, "big"), P256_ORDER.to_bytes(32, "big")
    for other in (
        r + (P256_ORDER - s).to_bytes(32, "big"),
        as_der,
        zero + zero,  # CVE-2022-21449
        zero + good[32:],
        r + zero,
        order + good[32:],
        r + order,
        one + one,
        good[32:] + r,
    ):
        assert not key.verifying.verify(b"data", other)


def test_the_lower_half_ends_exactly_at_half_the_order() -> None:
    # With a public key made for it, s = n // 2 is a valid signature and s = n // 2 + 1 is its twin.
    private = ec.derive_private_key(7, ec.SECP256R1())
    key = unpack_signing_key(der(private), kid="half", algorithm="ES256")
    half = P256_ORDER // 2
    for s, expected in ((half, True), (half + 1, False)):
        # s = (e + r*d) / k, so choose k, and from it the digest that gives this s.
        k = 12345
        r = ec.derive_private_key(k, ec.SECP256R1()).public_key().public_numbers().x % P256_ORDER
        digest = ((s * k - r * 7) % P256_ORDER).to_bytes(32, "big")
        signature = r.to_bytes(32, "big") + s.to_bytes(32, "big")
        with pytest.MonkeyPatch.context() as patch:
            # The digest is chosen, not computed: any data stands for it.
            patch.setattr(jwk, "_ECDSA", ec.ECDSA(Prehashed(hashes.SHA256())))
            assert key.verifying.verify(digest, signature) is expected


def test_a_signature_with_another_padding_or_hash_is_refused() -> None:
    private = serialization.load_der_private_key(KEYS["RS256"].pack(), None)
    assert isinstance(private, rsa.RSAPrivateKey)
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    for other in (
        private.sign(b"data", pss, hashes.SHA256()),
        private.sign(b"data", padding.PKCS1v15(), hashes.SHA512()),
        private.sign(b"data", padding.PKCS1v15(), hashes.SHA1()),  # noqa: S303
    ):
        assert not KEYS["RS256"].verifying.verify(b"data", other)


def test_an_rsa_signature_plus_the_modulus_is_no_second_spelling() -> None:
    n = number(KEYS["RS256"].verifying.public_jwk()["n"])
    for attempt in range(64):
        data = bytes([attempt])
        twin = int.from_bytes(KEYS["RS256"].sign(data), "big") + n
        # Most moduli leave room for a twin of the same length; one octet longer it must be refused just the same.
        octets = twin.to_bytes(384 if twin.bit_length() <= 3072 else 385, "big")
        assert not KEYS["RS256"].verifying.verify(data, octets)


def test_an_ed25519_signature_plus_the_order_is_no_second_spelling() -> None:
    order = 2**252 + 27742317777372353535851937790883648493
    good = KEYS["EdDSA"].sign(b"data")
    twin = int.from_bytes(good[32:], "little") + order
    assert not KEYS["EdDSA"].verifying.verify(b"data", good[:32] + twin.to_bytes(32, "little"))


# Weak keys.


@pytest.mark.parametrize("size", [0, 1, 16, 31])
def test_empty_and_short_secrets_are_refused(size: int) -> None:
    # CVE-2026-49852, CVE-2026-102266, CVE-2026-114616; RFC 7518 s3.2.
    with pytest.raises(KeyRefused, match="at least 32"):
        unpack_signing_key(b"\x01" * size, kid="k", algorithm="HS256")


def test_a_secret_of_32_octets_is_long_enough() -> None:
    data = secrets.token_bytes(32)
    key = unpack_signing_key(data, kid="k", algorithm="HS256")
    assert key.sign(b"data") == hmac.digest(data, b"data", "sha256")


def encodings_of(algorithm: Algorithm) -> dict[str, bytes]:
    private: Any = serialization.load_der_private_key(KEYS[algorithm].pack(), None)
    public = private.public_key()
    encoding, form = serialization.Encoding, serialization.PublicFormat
    found = {
        "pem": public.public_bytes(encoding.PEM, form.SubjectPublicKeyInfo),
        "der": public.public_bytes(encoding.DER, form.SubjectPublicKeyInfo),
        "ssh": public.public_bytes(encoding.OpenSSH, form.OpenSSH),
        "private pem": private.private_bytes(
            encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        "private der": KEYS[algorithm].pack(),
        "jwk": json.dumps(KEYS[algorithm].verifying.public_jwk()).encode(),
        "jwks": jwks(KEYS[algorithm].verifying.public_jwk()),
    }
    found["pem after a line end"] = b"\n" + found["pem"]
    found["pem without its last line end"] = found["pem"].rstrip()
    found["ssh2"] = b"---- BEGIN SSH2 PUBLIC KEY ----\nAAAA\n---- END SSH2 PUBLIC KEY ----\n"
    if algorithm == "RS256":
        found["pkcs1 pem"] = public.public_bytes(encoding.PEM, form.PKCS1)
        found["pkcs1 der"] = public.public_bytes(encoding.DER, form.PKCS1)
    return found


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_a_key_of_another_kind_is_no_secret_in_any_encoding(algorithm: Algorithm) -> None:
    # CVE-2022-29217, CVE-2024-33663, CVE-2024-37568, CVE-2026-48526, CVE-2026-102273.
    for encoding in encodings_of(algorithm).values():
        with pytest.raises(KeyRefused, match="key of another kind"):
            unpack_signing_key(encoding, kid="k", algorithm="HS256")


def test_rsa_keys_sign_from_3072_bits_and_verify_from_2048() -> None:
    keys = {size: rsa.generate_private_key(65537, size) for size in (1024, 2048, 3072)}
    for size, private in keys.items():
        numbers = private.public_key().public_numbers()
        document = jwks({"kty": "RSA", "kid": "k", "n": b64(numbers.n.to_bytes(-(-size // 8), "big")), "e": "AQAB"})
        if size >= 2048:
            assert load_jwks(document).keys() == {"k"}
        else:
            with pytest.raises(KeyRefused):
                load_jwks(document)
        if size >= 3072:
            unpack_signing_key(der(private), kid="k", algorithm="RS256")
        else:
            with pytest.raises(KeyRefused, match=f"this one has {size}"):
                unpack_signing_key(der(private), kid="k", algorithm="RS256")


@pytest.mark.parametrize(("bits", "good"), [(2047, False), (2048, True), (8192, True), (8193, False)])
def test_the_bounds_of_a_modulus_are_exact(bits: int, good: bool) -> None:
    n = 2 ** (bits - 1) + 1
    while any(n % prime == 0 for prime in range(2, 1000)):
        n += 2
    assert n.bit_length() == bits
    members = published("RS256", n=b64(n.to_bytes(-(-bits // 8), "big")))
    assert len(load_jwks(jwks(members, published()))) == 1 + good


@pytest.mark.parametrize("e", [0, 1, 2, 3, 17, 65535, 65536, 65538, 2**256 + 1])
def test_other_rsa_exponents_are_refused(e: int) -> None:
    with pytest.raises(KeyRefused):
        load_jwks(jwks(published("RS256", e=b64(e.to_bytes(-(-e.bit_length() // 8) or 1, "big")))))


def test_a_larger_odd_rsa_exponent_is_accepted() -> None:
    assert load_jwks(jwks(published("RS256", e=b64((65539).to_bytes(3, "big")))))


def test_a_private_key_with_a_small_exponent_is_refused() -> None:
    private = rsa.generate_private_key(3, 3072)
    with pytest.raises(KeyRefused, match="exponent"):
        unpack_signing_key(der(private), kid="k", algorithm="RS256")


@pytest.mark.parametrize("factor", [2, 3, 997])
def test_a_modulus_with_a_small_factor_is_refused(factor: int) -> None:
    n = factor * (2**3071 // factor + 2)
    with pytest.raises(KeyRefused, match="small factor"):
        jwk._check_rsa_numbers(n, 65537, 2048)


def test_an_enormous_modulus_is_refused_quickly() -> None:
    begun = perf_counter()
    with pytest.raises(KeyRefused):
        load_jwks(jwks(published("RS256", n=b64(b"\xff" * 40_000))))
    assert perf_counter() - begun < 0.5


def vulnerable_prime(start: int, offset: int, exponent: int) -> int:
    """A prime as Infineon's library made them for moduli of 1984 to 3936 bits (CVE-2017-15361)."""
    primes = [each for each in range(2, 702) if all(each % lower for lower in range(2, each))]
    assert len(primes) == 126
    product = 1
    for each in primes:
        product *= each
    prime = (start + offset) * product + pow(65537, exponent, product)
    assert pow(2, prime - 1, prime) == 1
    return prime


def test_a_modulus_with_the_roca_structure_is_refused_for_signing_and_for_verifying() -> None:
    p = vulnerable_prime(2**564 + 2**563 + 2**562, 24, 1000003)
    q = vulnerable_prime(2**564 + 2**563 + 2**562 + 2**500, 69, 2000003)
    n, d = p * q, pow(65537, -1, (p - 1) * (q - 1))
    assert n.bit_length() == 3072
    private = rsa.RSAPrivateNumbers(
        p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(65537, n)
    ).private_key()
    with pytest.raises(KeyRefused, match="ROCA"):
        unpack_signing_key(der(private), kid="k", algorithm="RS256")
    with pytest.raises(KeyRefused):
        load_jwks(jwks({"kty": "RSA", "kid": "k", "n": b64(n.to_bytes(384, "big")), "e": "AQAB"}))


def test_honest_moduli_do_not_have_the_roca_fingerprint() -> None:
    # The chance of one false alarm here is below 2000 * 2**-27.
    for _ in range(2000):
        n = int.from_bytes(os.urandom(256), "big") | 2**2047 | 1
        assert not all(n % prime in powers for prime, powers in jwk._ROCA)


def test_a_private_key_of_another_kind_or_for_another_algorithm_is_refused() -> None:
    for private in (x25519.X25519PrivateKey.generate(), ed448.Ed448PrivateKey.generate()):
        with pytest.raises(KeyRefused, match="signs no token"):
            unpack_signing_key(der(private), kid="k", algorithm="EdDSA")
    for curve in (ec.SECP384R1(), ec.SECP256K1(), ec.SECP224R1()):
        with pytest.raises(KeyRefused, match="not P-256"):
            unpack_signing_key(der(ec.generate_private_key(curve)), kid="k", algorithm="ES256")
    for algorithm in ALGORITHMS:
        for other in ALGORITHMS:
            if "HS256" not in (algorithm, other) and algorithm != other:
                with pytest.raises(KeyRefused, match=f"for {algorithm}, not for {other}"):
                    unpack_signing_key(KEYS[algorithm].pack(), kid="k", algorithm=other)


@given(st.binary(max_size=300))
def test_no_octets_make_unpacking_fail_otherwise(packed: bytes) -> None:
    for algorithm in ALGORITHMS:
        try:
            unpack_signing_key(packed, kid="k", algorithm=algorithm)
        except KeyRefused:
            continue
        assert algorithm == "HS256"


def test_a_packed_key_that_was_cut_or_is_too_large_is_refused() -> None:
    for algorithm in ALGORITHMS:
        packed = KEYS[algorithm].pack()
        with pytest.raises(KeyRefused):
            unpack_signing_key(packed[:-1], kid="k", algorithm=algorithm)
        with pytest.raises(KeyRefused, match="never that large"):
            unpack_signing_key(packed + bytes(MAX_PACKED_BYTES), kid="k", algorithm=algorithm)


@pytest.mark.parametrize("kid", ["", "a b", "a\n", "\x7f", "ä", "k" * 129])
def test_a_key_needs_a_name_of_visible_ascii(kid: str) -> None:
    with pytest.raises(KeyRefused, match="kid"):
        unpack_signing_key(KEYS["ES256"].pack(), kid=kid, algorithm="ES256")


def test_the_longest_name_is_accepted() -> None:
    assert unpack_signing_key(KEYS["ES256"].pack(), kid='"' * 128, algorithm="ES256").kid == '"' * 128


# Key sets.


def test_a_published_set_reads_back() -> None:
    asymmetric = [KEYS[each].verifying for each in ALGORITHMS if each != "HS256"]
    found = load_jwks(jwks(*[each.public_jwk() for each in asymmetric]))
    assert list(found) == [each.kid for each in asymmetric]
    for each in asymmetric:
        assert found[each.kid].public_jwk() == each.public_jwk()
        assert found[each.kid].verify(b"data", KEYS[each.algorithm].sign(b"data"))
        assert each.public_jwk()["use"] == "sig"
        assert each.public_jwk()["alg"] == each.algorithm == found[each.kid].algorithm


def test_a_published_key_has_no_private_member() -> None:
    for each in ALGORITHMS:
        if each == "HS256":
            with pytest.raises(KeyRefused, match="never published"):
                KEYS[each].verifying.public_jwk()
        else:
            assert KEYS[each].verifying.public_jwk().keys() <= {"kty", "crv", "x", "y", "n", "e", "kid", "alg", "use"}


def test_a_key_without_alg_use_and_key_ops_is_accepted_and_unknown_members_are_ignored() -> None:
    found = load_jwks(
        jwks(published(alg=..., use=..., x5u="https://attacker.test/", x5c=["AAAA"], jku="x", future={"a": [1]}))
    )
    assert [key.algorithm for key in found.values()] == ["ES256"]
    assert load_jwks(jwks(published(use=..., key_ops=["verify"])))


OFF_CURVE = b64((number(ES_Y) ^ 1).to_bytes(32, "big"))
BAD_MEMBERS: list[tuple[Algorithm, dict[str, object]]] = [
    ("ES256", {"kty": "ec"}),
    ("ES256", {"kty": "AKP"}),
    ("ES256", {"kty": ...}),
    ("ES256", {"kty": 1}),
    ("ES256", {"kty": "RSA"}),
    ("ES256", {"kty": "OKP"}),
    ("ES256", {"crv": "P-384"}),
    ("ES256", {"crv": "p-256"}),
    ("ES256", {"crv": "secp256k1"}),
    ("ES256", {"alg": "HS256"}),
    ("ES256", {"alg": "none"}),
    ("ES256", {"alg": "ES384"}),
    ("ES256", {"alg": "es256"}),
    ("ES256", {"alg": None}),
    ("ES256", {"alg": ["ES256"]}),
    ("ES256", {"use": "enc"}),
    ("ES256", {"use": None}),
    ("ES256", {"use": ""}),
    ("ES256", {"key_ops": ["sign"]}),
    ("ES256", {"key_ops": ["verify", "sign"]}),
    ("ES256", {"key_ops": ["verify", "verify"]}),
    ("ES256", {"key_ops": []}),
    ("ES256", {"key_ops": "verify"}),
    ("ES256", {"key_ops": [1]}),
    ("ES256", {"d": ES_D}),
    ("ES256", {"d": None}),
    ("ES256", {"k": "AAAA"}),
    ("ES256", {"x": ES_X, "y": OFF_CURVE}),
    ("ES256", {"x": b64(bytes(32)), "y": b64(bytes(32))}),
    ("ES256", {"x": b64(b"\xff" * 32)}),
    ("ES256", {"x": b64(bytes(1) + raw(ES_X)), "y": ES_Y}),
    ("ES256", {"x": b64(raw(ES_X)[1:]), "y": ES_Y}),
    ("ES256", {"x": ES_X + "=", "y": ES_Y}),
    ("ES256", {"x": ES_X[:-1] + "V", "y": ES_Y}),
    ("ES256", {"x": ES_X + "\n", "y": ES_Y}),
    ("ES256", {"x": "ä" * 43, "y": ES_Y}),
    ("ES256", {"x": 5}),
    ("ES256", {"x": ...}),
    ("ES256", {"y": ""}),
    ("ES256", {"kid": "ключ"}),
    ("ES256", {"kid": "k" * 129}),
    ("ES256", {"kid": "a b"}),
    ("RS256", {"alg": "PS256"}),
    ("RS256", {"n": ...}),
    ("RS256", {"e": ...}),
    ("RS256", {"n": "AQAB"}),
    ("RS256", {"n": b64(bytes(1) + raw(RS_N))}),
    ("RS256", {"e": "AAEAAQ"}),
    ("RS256", {"d": "AQAB", "p": "AQ", "q": "AQ", "dp": "AQ", "dq": "AQ", "qi": "AQ"}),
    ("RS256", {"oth": []}),
    ("RS256", {"crv": "P-256"}),
    ("EdDSA", {"crv": "Ed448"}),
    ("EdDSA", {"crv": "X25519"}),
    ("EdDSA", {"crv": ...}),
    ("EdDSA", {"alg": "ES256"}),
    ("EdDSA", {"x": b64(bytes(31))}),
    ("EdDSA", {"x": b64((2).to_bytes(32, "little"))}),
    ("EdDSA", {"d": ED_D}),
]


@pytest.mark.parametrize(("algorithm", "changes"), BAD_MEMBERS)
def test_one_bad_key_is_left_out_and_the_others_stay(algorithm: Algorithm, changes: dict[str, object]) -> None:
    # CVE-2026-102274: one bad key made the whole set raise.
    bad = published(algorithm, **changes)
    good = published("EdDSA" if algorithm == "ES256" else "ES256")
    assert load_jwks(jwks(bad, good)).keys() == {good["kid"]} == load_jwks(jwks(good, bad)).keys()
    with pytest.raises(KeyRefused, match="no key"):
        load_jwks(jwks(bad))


@pytest.mark.parametrize("entry", [None, 1, "x", [], [[]], True, 1.5])
def test_an_entry_that_is_no_object_is_left_out(entry: object) -> None:
    assert len(load_jwks(jwks(entry, published()))) == 1


def test_a_key_that_names_a_member_twice_is_left_out() -> None:
    twice = json.dumps(published()).replace('"crv"', '"alg": "ES256", "crv"')
    good = json.dumps(published("EdDSA"))
    assert len(load_jwks(f'{{"keys": [{twice}, {good}]}}'.encode())) == 1
    with pytest.raises(KeyRefused):
        load_jwks(f'{{"keys": [{twice}]}}'.encode())


Y_OF_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7


@pytest.mark.parametrize("y", [0, 1, 2**255 - 20, Y_OF_ORDER_8, 2**255 - 19 - Y_OF_ORDER_8])
@pytest.mark.parametrize("sign", [0, 1])
def test_ed25519_points_of_small_order_are_refused(y: int, sign: int) -> None:
    encoded = (y | sign << 255).to_bytes(32, "little")
    with pytest.raises(KeyRefused, match="small order"):
        jwk._check_edwards_point(encoded)
    with pytest.raises(KeyRefused):
        load_jwks(jwks(published("EdDSA", x=b64(encoded))))


@pytest.mark.parametrize("y", [2**255 - 19, 2**255 - 18, 2**255 - 1])
def test_ed25519_points_in_a_second_spelling_are_refused(y: int) -> None:
    with pytest.raises(KeyRefused, match="not a point"):
        jwk._check_edwards_point(y.to_bytes(32, "little"))


@given(st.binary(min_size=32, max_size=32))
def test_every_ed25519_key_is_a_point(seed: bytes) -> None:
    jwk._check_edwards_point(ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw())


SECRET = {"kty": "oct", "kid": "s", "k": b64(b"s" * 32)}


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (jwks(published(), SECRET), "mixes"),
        (jwks(SECRET, published("RS256")), "mixes"),
        (jwks({"kty": "oct", "kid": "x"}, published()), "mixes"),
        (jwks(SECRET), "no key"),
        (jwks(published(), published()), "same kid"),
        (jwks(published(kid="k"), published("RS256", kid="k")), "same kid"),
        (jwks(published(kid="k"), {"kty": "unknown", "kid": "k"}), "same kid"),
        (jwks(published(), published("RS256", kid=...)), "no kid"),
        (jwks(published(), published("RS256", kid="")), "no kid"),
        (jwks(published(), published("RS256", kid=None)), "no kid"),
        (jwks(published(), published("RS256", kid=7)), "no kid"),
        (jwks(published(), {}), "no kid"),
        (jwks(), "1 to 32"),
        (b'{"keys": {}}', "not a list"),
        (b'{"keys": null}', "not a list"),
        (b"{}", "1 to 32"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"", "not a JSON object"),
        (b"{", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
        (b"\xef\xbb\xbf" + jwks(published()), "not a JSON object"),
        (json.dumps({"keys": [published()]}).encode("utf-16"), "not a JSON object"),
        (jwks(published()) + b"x", "not a JSON object"),
        (b"[" * 60_000, "not a JSON object"),
        (b'{"keys":' + b"[" * 30_000 + b"]" * 30_000 + b"}", "not a"),
        (b'{"keys": [], ' + jwks(published())[1:], "twice"),
        (json.dumps(published()).encode(), "1 to 32"),
    ],
)
def test_an_ambiguous_or_malformed_set_is_refused_as_a_whole(document: bytes, reason: str) -> None:
    with pytest.raises(KeyRefused, match=reason):
        load_jwks(document)


def test_a_set_is_bounded_before_it_is_parsed() -> None:
    document = jwks(published())
    assert load_jwks(document + b" " * (MAX_JWKS_BYTES - len(document)))
    with pytest.raises(KeyRefused, match="at most 65536 octets"):
        load_jwks(document + b" " * (MAX_JWKS_BYTES - len(document) + 1))


def test_a_set_has_at_most_32_keys() -> None:
    many = [published(kid=f"k{index}") for index in range(MAX_JWKS_KEYS + 1)]
    assert len(load_jwks(jwks(*many[:-1]))) == MAX_JWKS_KEYS
    with pytest.raises(KeyRefused, match="1 to 32 keys"):
        load_jwks(jwks(*many))


@pytest.mark.parametrize(
    "document",
    [
        b'{"keys":[' + b"[]," * 21_000 + b"[]]}",
        b'{"keys":[{"kid":"a","kty":"EC","x":[' + b"[]," * 21_000 + b"[]]}]}",
        b'{"keys":[{' + b'"a":1,' * 10_000 + b'"b":1}]}',
        b'{"keys":[{"key_ops":[' + b'"",' * 21_000 + b'""],"kid":"a","kty":"EC"}]}',
        b'{"keys":[{"kid":"' + b"\\ud800" * 10_000 + b'"}]}',
    ],
)
def test_a_hostile_set_costs_little_time_and_memory(document: bytes) -> None:
    begun = perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(KeyRefused):
            load_jwks(document)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert perf_counter() - begun < 1


def test_no_refusal_names_key_bytes() -> None:
    secret = b"\x01CANARY-secret-\x02" * 1024
    for algorithm in ALGORITHMS:
        with pytest.raises(KeyRefused) as refused:
            unpack_signing_key(secret + bytes(MAX_PACKED_BYTES), kid="k", algorithm=algorithm)
        assert "CANARY" not in str(refused.value)
    with pytest.raises(KeyRefused) as refused:
        load_jwks(jwks({"kty": "oct", "kid": "CANARY", "k": "CANARY"}))
    assert "CANARY" not in str(refused.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
MEMBER = st.sampled_from(["kty", "kid", "alg", "use", "key_ops", "crv", "x", "y", "n", "e", "d", "k", "x5c", "keys"])
VALUE = st.sampled_from(["EC", "RSA", "OKP", "oct", "P-256", "Ed25519", "sig", ES_X, ES_Y, ED_X, RS_N, "AQAB"]) | JSON


@given(
    st.lists(
        st.one_of(st.dictionaries(MEMBER, VALUE), st.sampled_from(ALGORITHMS[:1]).map(published), JSON), max_size=4
    )
)
def test_no_key_set_raises_anything_else(keys: list[object]) -> None:
    with suppress(KeyRefused):
        assert load_jwks(jwks(*keys))


@given(st.binary(max_size=400), st.integers(0, 10_000))
def test_no_octets_raise_anything_else(noise: bytes, position: int) -> None:
    document = jwks(published(), published("EdDSA"))
    cut = position % len(document)
    for text in (noise, document[:cut] + noise + document[cut:], document[:cut] + noise + document[cut + len(noise) :]):
        with suppress(KeyRefused):
            assert load_jwks(text)
