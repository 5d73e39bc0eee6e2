"""Keys that sign and verify access tokens: how they are made, kept, published and read back (RFC 7515, 7517, 7518).

Decides which keys are too weak to be used at all, and that a signature has exactly one accepted spelling: ES256 is
signed with the lower of its two `s` values and the higher one is refused, so nobody can turn one token of ours into
a second one that verifies. A key serves one algorithm, its own; what a token asks for decides nothing here. This file
must never follow an address found in a key (`x5u`, `jku`), publish a secret, or name key bytes in an error.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from binascii import Error as BadBase64
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import gcd, prod
from typing import Final, Literal, TypeAlias, assert_never

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    ECDSA,
    SECP256R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    EllipticCurvePublicNumbers,
)
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_curve_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey, RSAPublicNumbers
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa_key
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
    load_der_public_key,
)

Algorithm = Literal["ES256", "HS256", "RS256", "EdDSA"]

MAX_JWKS_BYTES: Final = 64 * 1024
MAX_JWKS_KEYS: Final = 32
MAX_KEY_ID_CHARACTERS: Final = 128
MAX_PACKED_BYTES: Final = 16 * 1024
MIN_SECRET_BYTES: Final = 32
"""RFC 7518 s3.2: a key of the size of the hash output or larger."""
MIN_RSA_BITS_TO_VERIFY: Final = 2048
MIN_RSA_BITS_TO_SIGN: Final = 3072
MAX_RSA_BITS: Final = 8192
"""A larger modulus only makes every verification slow, which is what its sender may want."""

_PrivateKey: TypeAlias = EllipticCurvePrivateKey | RSAPrivateKey | Ed25519PrivateKey
_PublicKey: TypeAlias = EllipticCurvePublicKey | RSAPublicKey | Ed25519PublicKey
_Check: TypeAlias = Callable[[bytes, bytes], bool]
_Sign: TypeAlias = Callable[[bytes], bytes]

_KEY_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_KTY_OF: Final[Mapping[str, Algorithm]] = {"EC": "ES256", "RSA": "RS256", "OKP": "EdDSA"}
_CURVE_OF: Final[Mapping[str, str]] = {"EC": "P-256", "OKP": "Ed25519"}
_PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})

# The order of P-256 (FIPS 186-5, SP 800-186 s3.2.1.3).
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
_HALF_ORDER: Final = _ORDER // 2
_PKCS1: Final = PKCS1v15()
_SHA256: Final = SHA256()


class KeyRefused(ValueError):
    """A key or key set that is not used: malformed, weak, ambiguous or of the wrong kind.

    The message names the reason and never key bytes.
    """


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class VerifyingKey:
    """A key that checks signatures of one algorithm. Made by this module only; safe to share between threads."""

    kid: str
    algorithm: Algorithm
    _check: _Check
    _members: Mapping[str, str] | None

    def verify(self, data: bytes, signature: bytes) -> bool:
        """Whether `signature` (JOSE form, raw octets) is the one accepted spelling of a signature of `data`.

        Never raises. Refuses other lengths than the algorithm's own and the `n - s` twin of an ES256 signature.
        """
        return self._check(data, signature)

    def public_jwk(self) -> dict[str, str]:
        """The members to publish in a JWK Set. Raises: KeyRefused for HS256, because that would be the secret."""
        if self._members is None:
            raise KeyRefused("an HS256 key is a secret and is never published")
        return {**self._members, "kid": self.kid, "alg": self.algorithm, "use": "sig"}

    def __repr__(self) -> str:
        return f"VerifyingKey({self.kid!r}, {self.algorithm})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class SigningKey:
    """A key that signs with one algorithm. Made by this module only; safe to share between threads.

    `header` is the whole first segment of an access token (RFC 9068 s2.1), encoded once.
    """

    kid: str
    algorithm: Algorithm
    header: bytes
    verifying: VerifyingKey
    _sign: _Sign
    _pack: Callable[[], bytes]

    def sign(self, data: bytes) -> bytes:
        """Sign; the answer is the JOSE form (RFC 7518 s3), for ES256 with the lower `s`."""
        return self._sign(data)

    def pack(self) -> bytes:
        """The private key as PKCS#8 DER, or the raw secret: to be sealed before it is kept anywhere."""
        return self._pack()

    def __repr__(self) -> str:
        return f"SigningKey({self.kid!r}, {self.algorithm}, redacted)"


def generate_signing_key(algorithm: Algorithm, *, random: Callable[[int], bytes]) -> SigningKey:
    """Make a new key. Its `kid` is the RFC 7638 thumbprint, for HS256 a random name (a digest would confirm guesses).

    `random` serves HS256 secrets and names; the cryptography library draws its own randomness for the others. RS256
    has 3072 bits and takes up to some seconds.
    """
    match algorithm:
        case "HS256":
            return _signing_secret(random(MIN_SECRET_BYTES), encode_base64url(random(12)).decode("ascii"))
        case "ES256":
            return _signing_key(generate_curve_key(SECP256R1()), None)
        case "RS256":
            return _signing_key(generate_rsa_key(65537, MIN_RSA_BITS_TO_SIGN), None)
        case "EdDSA":
            return _signing_key(Ed25519PrivateKey.generate(), None)
        case _:
            assert_never(algorithm)


def unpack_signing_key(packed: bytes, *, kid: str, algorithm: Algorithm) -> SigningKey:
    """Read what `SigningKey.pack` wrote, and check all its strength again. Raises: KeyRefused."""
    if not _KEY_ID.fullmatch(kid):
        raise KeyRefused(f"a kid has 1 to {MAX_KEY_ID_CHARACTERS} visible ASCII characters")
    if len(packed) > MAX_PACKED_BYTES:
        raise KeyRefused("a packed key is never that large")
    if algorithm == "HS256":
        return _signing_secret(packed, kid)
    try:
        private = load_der_private_key(packed, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as broken:
        raise KeyRefused("not a private key in PKCS#8") from broken
    if not isinstance(private, _PrivateKey):
        raise KeyRefused("a private key of a kind that signs no token of ours")
    found = _signing_key(private, kid)
    if found.algorithm != algorithm:
        raise KeyRefused(f"this is a key for {found.algorithm}, not for {algorithm}")
    return found


def load_jwks(document: bytes) -> dict[str, VerifyingKey]:
    """Read a JWK Set (RFC 7517 s5) that came from outside; the keys that may be used, by `kid`.

    A set that is ambiguous as a whole is refused: symmetric beside asymmetric keys, a `kid` that is missing or occurs
    twice. One bad, weak or unknown key inside a good set is left out, so that it cannot blind a verifier to the others
    (CVE-2026-102274). Symmetric keys are never taken from outside. Bounded before parsing; fetches nothing.
    Raises: KeyRefused, also when no key is left.
    """
    if len(document) > MAX_JWKS_BYTES:
        raise KeyRefused(f"a key set has at most {MAX_JWKS_BYTES} octets")
    keys = [found for found in map(_members_or_none, _listed(document)) if found is not None]
    names = [_text(found, "kid") for found in keys]
    if not all(names):
        raise KeyRefused("a key in the set has no kid")
    if len(set(names)) != len(names):
        raise KeyRefused("two keys in the set have the same kid")
    kinds = {_text(found, "kty") == "oct" for found in keys}
    if len(kinds) > 1:
        raise KeyRefused("the set mixes symmetric and asymmetric keys")
    usable = {key.kid: key for key in map(_key_or_none, keys) if key is not None}
    if not usable:
        raise KeyRefused("the set has no key that may be used")
    return usable


def encode_base64url(data: bytes) -> bytes:
    """Base64url without padding (RFC 7515 s2)."""
    return b2a_base64(data, newline=False).translate(_FROM_STANDARD).rstrip(b"=")


def decode_base64url(text: bytes) -> bytes | None:
    """The octets of which `text` is *the* base64url encoding; `None` for padding, spaces, other letters, spare bits."""
    rest = len(text) % 4
    # The decoder ignores spare bits, so that up to sixteen texts would mean the same octets (RFC 4648 s3.5).
    if rest and text[-1] not in _LAST_LETTERS[rest]:
        return None
    try:
        return a2b_base64(text.translate(_TO_STANDARD) + _PADDING[rest], strict_mode=True)
    except BadBase64:
        return None


# `+`, `/` and `=` become letters that the strict decoder refuses.
_TO_STANDARD: Final = bytes.maketrans(b"-_+/=", b"+/!!!")
_FROM_STANDARD: Final = bytes.maketrans(b"+/", b"-_")
_PADDING: Final = (b"", b"", b"==", b"=")
_LAST_LETTERS: Final = (b"", b"", b"AQgw", b"AEIMQUYcgkosw048")


# Signing and verifying.


def _deterministic_ecdsa() -> ECDSA:
    """ECDSA whose nonce comes from key and data (RFC 6979), so that a bad generator cannot betray the key."""
    try:
        return ECDSA(_SHA256, deterministic_signing=True)
    except UnsupportedAlgorithm:
        # OpenSSL before 3.2: its nonces are random, mixed with key and data.
        return ECDSA(_SHA256)


_ECDSA: Final = _deterministic_ecdsa()


def _signing_secret(secret: bytes, kid: str) -> SigningKey:
    _check_secret(secret)

    def sign(data: bytes) -> bytes:
        return hmac.digest(secret, data, "sha256")

    def check(data: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(hmac.digest(secret, data, "sha256"), signature)

    return SigningKey(
        kid, "HS256", _header("HS256", kid), VerifyingKey(kid, "HS256", check, None), sign, lambda: secret
    )


def _signing_key(private: _PrivateKey, kid: str | None) -> SigningKey:
    verifying = _verifying_key(private.public_key(), kid, smallest_rsa=MIN_RSA_BITS_TO_SIGN)
    if isinstance(private, EllipticCurvePrivateKey):
        sign = _sign_curve(private)
    elif isinstance(private, RSAPrivateKey):
        sign = _sign_rsa(private)
    else:
        sign = private.sign

    def pack() -> bytes:
        return private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())

    header = _header(verifying.algorithm, verifying.kid)
    return SigningKey(verifying.kid, verifying.algorithm, header, verifying, sign, pack)


def _header(algorithm: Algorithm, kid: str) -> bytes:
    return encode_base64url(msgspec.json.encode({"alg": algorithm, "kid": kid, "typ": "at+jwt"}))


def _sign_curve(private: EllipticCurvePrivateKey) -> _Sign:
    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(private.sign(data, _ECDSA))
        # (r, s) and (r, n - s) both verify in any library: ours is always the lower one, and only it is accepted.
        return r.to_bytes(32, "big") + min(s, _ORDER - s).to_bytes(32, "big")

    return sign


def _sign_rsa(private: RSAPrivateKey) -> _Sign:
    return lambda data: private.sign(data, _PKCS1, _SHA256)


def _verifying_key(public: _PublicKey, kid: str | None, *, smallest_rsa: int = MIN_RSA_BITS_TO_VERIFY) -> VerifyingKey:
    algorithm: Algorithm
    if isinstance(public, EllipticCurvePublicKey):
        if not isinstance(public.curve, SECP256R1):
            raise KeyRefused("the curve is not P-256")
        point = public.public_numbers()
        algorithm, check = "ES256", _check_curve(public)
        members = {"kty": "EC", "crv": "P-256", "x": _number(point.x, 32), "y": _number(point.y, 32)}
    elif isinstance(public, RSAPublicKey):
        numbers = public.public_numbers()
        _check_rsa_numbers(numbers.n, numbers.e, smallest_rsa)
        algorithm, check = "RS256", _check_rsa(public)
        members = {"kty": "RSA", "n": _number(numbers.n), "e": _number(numbers.e)}
    else:
        raw = public.public_bytes_raw()
        _check_edwards_point(raw)
        algorithm, check = "EdDSA", _check_edwards(public)
        members = {"kty": "OKP", "crv": "Ed25519", "x": encode_base64url(raw).decode("ascii")}
    return VerifyingKey(_thumbprint(members) if kid is None else kid, algorithm, check, members)


def _check_curve(public: EllipticCurvePublicKey) -> _Check:
    def check(data: bytes, signature: bytes) -> bool:
        if len(signature) != 64:
            return False
        r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
        if not (0 < r < _ORDER and 0 < s <= _HALF_ORDER):
            return False
        try:
            public.verify(encode_dss_signature(r, s), data, _ECDSA)
        except InvalidSignature:
            return False
        return True

    return check


def _check_rsa(public: RSAPublicKey) -> _Check:
    size = (public.key_size + 7) // 8

    def check(data: bytes, signature: bytes) -> bool:
        if len(signature) != size:
            return False
        try:
            public.verify(signature, data, _PKCS1, _SHA256)
        except InvalidSignature:
            return False
        return True

    return check


def _check_edwards(public: Ed25519PublicKey) -> _Check:
    def check(data: bytes, signature: bytes) -> bool:
        if len(signature) != 64:
            return False
        try:
            public.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    return check


def _thumbprint(members: Mapping[str, str]) -> str:
    # RFC 7638 s3: the required members only, in the order of their names, without spaces.
    ordered = msgspec.json.encode(dict(sorted(members.items())))
    return encode_base64url(hashlib.sha256(ordered).digest()).decode("ascii")


def _number(value: int, size: int | None = None) -> str:
    return encode_base64url(value.to_bytes(size or (value.bit_length() + 7) // 8, "big")).decode("ascii")


# Weak keys.


def _primes(below: int) -> Iterable[int]:
    return (each for each in range(2, below) if all(each % lower for lower in range(2, int(each**0.5) + 1)))


def _powers_of_65537(prime: int) -> frozenset[int]:
    return frozenset(pow(65537, exponent, prime) for exponent in range(prime - 1))


_SMALL_FACTORS: Final = prod(_primes(1000))
# Primes of Infineon's RSALib have the form k*M + (65537^a mod M), M a product of the first primes (ROCA,
# CVE-2017-15361). So modulo each of those primes the modulus is a power of 65537 as well, which a random one is with a
# chance below 2^-27. Primes for which every residue is such a power tell nothing and are left out.
_ROCA: Final = tuple(
    (prime, powers)
    for prime, powers in ((prime, _powers_of_65537(prime)) for prime in _primes(168) if prime > 2)
    if len(powers) < prime - 1
)


def _check_rsa_numbers(n: int, e: int, smallest: int) -> None:
    if not smallest <= n.bit_length() <= MAX_RSA_BITS:
        raise KeyRefused(f"an RSA modulus has {smallest} to {MAX_RSA_BITS} bits here, this one has {n.bit_length()}")
    # FIPS 186-5 s5.4: odd, above 2^16, below 2^256.
    if e % 2 == 0 or not 65536 < e < 2**256:
        raise KeyRefused("an RSA exponent is 65537 or another odd number above 65536")
    if gcd(n, _SMALL_FACTORS) != 1:
        raise KeyRefused("the RSA modulus has a small factor")
    if all(n % prime in powers for prime, powers in _ROCA):
        raise KeyRefused("the RSA modulus has the ROCA fingerprint (CVE-2017-15361)")


def _check_secret(secret: bytes) -> None:
    if len(secret) < MIN_SECRET_BYTES:
        raise KeyRefused(f"an HS256 secret has at least {MIN_SECRET_BYTES} octets")
    # A public key as HMAC secret is known to everybody (CVE-2022-29217, CVE-2024-33663, CVE-2026-48526).
    looks = secret.lstrip()
    if looks.startswith((b"-----BEGIN", b"---- BEGIN", b"ssh-", b"ecdsa-", b"sk-")) or (
        looks.startswith(b"{") and b'"kty"' in looks
    ):
        raise KeyRefused("this HS256 secret is the text of a key of another kind")
    for load in (load_der_public_key, lambda data: load_der_private_key(data, None)):
        try:
            load(secret)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        raise KeyRefused("this HS256 secret is the DER form of a key of another kind")


_P25519: Final = 2**255 - 19
_D25519: Final = -121665 * pow(121666, -1, _P25519) % _P25519


def _check_edwards_point(encoded: bytes) -> None:
    y = int.from_bytes(encoded, "little") & (2**255 - 1)
    square = y * y % _P25519
    # On the curve -x^2 + y^2 = 1 + d*x^2*y^2 (RFC 8032 s5.1.3); d is no square, so the divisor is never zero.
    x_square = (square - 1) * pow(_D25519 * square + 1, -1, _P25519) % _P25519
    if y >= _P25519 or (x_square and pow(x_square, (_P25519 - 1) // 2, _P25519) != 1):
        raise KeyRefused("not a point of Ed25519")
    # Orders 1, 2 and 4 have y = 1, -1, 0; order 8 has x^2 = -y^2. Under such a key one signature fits many messages.
    if square in (0, 1) or (_D25519 * square * square + 2 * square - 1) % _P25519 == 0:
        raise KeyRefused("a point of small order")


# Key sets from outside. Values nobody asks for are never built, only skipped: a hostile document costs its own size.


def _members(text: bytes | msgspec.Raw) -> dict[str, msgspec.Raw]:
    """The members of one JSON object, unread. Raises: KeyRefused for any other text and when a name occurs twice."""
    try:
        members = _MEMBERS.decode(text)
        again = b",".join(msgspec.json.encode(name) + b":" + bytes(value) for name, value in members.items())
    except (msgspec.MsgspecError, ValueError, RecursionError) as broken:
        raise KeyRefused("not a JSON object") from broken
    # A repeated name is missing when the object is written again; so is a name in another spelling, which nobody needs.
    if (b"{" + again + b"}").translate(None, _JSON_SPACE) != bytes(text).translate(None, _JSON_SPACE):
        raise KeyRefused("a JSON object names a member twice")
    return members


_MEMBERS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TEXT: Final = msgspec.json.Decoder(str)
_LIST: Final = msgspec.json.Decoder(list[msgspec.Raw])
_OPERATIONS: Final = msgspec.json.Decoder(list[str])
_JSON_SPACE: Final = b" \t\r\n"


def _listed(document: bytes) -> list[msgspec.Raw]:
    raw = _members(document).get("keys")
    try:
        listed = [] if raw is None else _LIST.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as broken:
        raise KeyRefused("`keys` is not a list") from broken
    if not 0 < len(listed) <= MAX_JWKS_KEYS:
        raise KeyRefused(f"a key set has 1 to {MAX_JWKS_KEYS} keys")
    return listed


def _members_or_none(raw: msgspec.Raw) -> dict[str, msgspec.Raw] | None:
    try:
        return _members(raw)
    except KeyRefused:
        return None


def _text(members: Mapping[str, msgspec.Raw], name: str) -> str | None:
    """A member that is text; `None` when it is absent or anything else."""
    raw = members.get(name)
    try:
        return None if raw is None else _TEXT.decode(raw)
    except (msgspec.MsgspecError, ValueError):
        return None


def _key_or_none(members: Mapping[str, msgspec.Raw]) -> VerifyingKey | None:
    try:
        return _public_key(members)
    except KeyRefused:
        return None


def _public_key(members: Mapping[str, msgspec.Raw]) -> VerifyingKey:
    kty, kid = _text(members, "kty") or "", _text(members, "kid") or ""
    if kty not in _KTY_OF or not _KEY_ID.fullmatch(kid):
        raise KeyRefused("unknown kty or unusable kid")
    if not members.keys().isdisjoint(_PRIVATE_MEMBERS):
        raise KeyRefused("a published key has private members")
    if (kty in _CURVE_OF or "crv" in members) and _text(members, "crv") != _CURVE_OF.get(kty, ""):
        raise KeyRefused("another curve")
    for name, only in (("alg", _KTY_OF[kty]), ("use", "sig")):
        if name in members and _text(members, name) != only:
            raise KeyRefused(f"wrong {name}")
    if "key_ops" in members and not _is_for_verifying(members["key_ops"]):
        raise KeyRefused("wrong key_ops")
    try:
        return _verifying_key(_read_public(kty, members), kid)
    except (ValueError, UnsupportedAlgorithm) as refused:
        raise KeyRefused("not a key of its kind") from refused


def _is_for_verifying(key_ops: msgspec.Raw) -> bool:
    try:
        return _OPERATIONS.decode(key_ops) == ["verify"]
    except (msgspec.MsgspecError, ValueError):
        return False


def _read_public(kty: str, members: Mapping[str, msgspec.Raw]) -> _PublicKey:
    if kty == "EC":
        # RFC 7518 s6.2.1.2: coordinates are never shortened.
        x, y = _octets(members, "x", 32), _octets(members, "y", 32)
        return EllipticCurvePublicNumbers(int.from_bytes(x, "big"), int.from_bytes(y, "big"), SECP256R1()).public_key()
    if kty == "RSA":
        n, e = _octets(members, "n"), _octets(members, "e")
        if n[0] == 0 or e[0] == 0:
            raise KeyRefused("a number begins with zero octets")
        # The cheap checks first: the library may spend long on absurd numbers.
        numbers = RSAPublicNumbers(int.from_bytes(e, "big"), int.from_bytes(n, "big"))
        _check_rsa_numbers(numbers.n, numbers.e, MIN_RSA_BITS_TO_VERIFY)
        return numbers.public_key()
    return Ed25519PublicKey.from_public_bytes(_octets(members, "x", 32))


def _octets(members: Mapping[str, msgspec.Raw], name: str, size: int | None = None) -> bytes:
    text = _text(members, name)
    data = decode_base64url(text.encode("ascii", "replace")) if text else None
    if not data or (size is not None and len(data) != size):
        raise KeyRefused(f"`{name}` is missing or malformed")
    return data
