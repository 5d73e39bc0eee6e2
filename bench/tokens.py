"""What do an access token's strict rules cost beyond its signature, and what do other libraries take?

Every candidate verifies the signature and checks `iss`, `aud` and `exp` of the same token, which it has not seen before
(but in the last table, which asks what a token costs that was seen before). The first one of a table is the floor: the
signature, and the claims decoded into a struct without looking at them. Libraries that are not installed are left out.
"""

from __future__ import annotations

import hmac
import json
import secrets
import time
import warnings
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, get_args

import msgspec
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from bench.harness import Candidate, Result, compare
from coatcheck.core.access_token import TokenRules, mint_access_token, new_jti, verify_access_token
from coatcheck.primitives.jwk import Algorithm, SigningKey, generate_signing_key
from coatcheck.verifier import Verifier
from tests.verifier.issuer import CREDENTIAL, Issuer

ISSUER, API = "https://id.example.test", "https://api.example.test"
RULES = TokenRules(issuer=ISSUER, audiences=frozenset({API}))
PEERS = {"PyJWT": "jwt", "joserfc": "joserfc", "Authlib": "authlib", "python-jose": "jose"}
Work = Callable[[], object]


class Claims(msgspec.Struct):
    """As little as a verifier can decode."""

    iss: str
    sub: str
    aud: str
    exp: int
    iat: int
    jti: str
    client_id: str
    sid: str
    scope: str


DECODER = msgspec.json.Decoder(Claims)


def run(*, rounds: int, full: bool) -> list[Result]:
    results = []
    peers = {name: module for name, module in PEERS.items() if find_spec(module) is not None}
    for algorithm in get_args(Algorithm):
        key = generate_signing_key(algorithm, random=secrets.token_bytes)
        now = int(time.time())
        mint = partial(_mint, key, now)
        token = mint()
        # Only what was checked to accept the token is measured.
        verifying: dict[str, Work] = {
            "floor: signature, base64, claims": _bare_verify(key, token),
            "coatcheck verify": _ours(key, token.encode("ascii"), now),
        }
        minting: dict[str, Work] = {"floor: signature": _bare_sign(key, token), "coatcheck mint": mint}
        for name in peers:
            found = _peer(name, key, token)
            if found is not None:
                verifying[name], minting[name] = found
        facts = {name: version(name) for name in peers}
        slow = algorithm == "RS256"
        results.append(_compare(f"Verify {algorithm}, cold", verifying, rounds, 100, facts))
        results.append(_compare(f"Mint {algorithm}", minting, 5 if slow else rounds, 5 if slow else 100, facts))
    results.append(_warm(rounds, peers))
    return results


def _warm(rounds: int, peers: Mapping[str, str]) -> Result:
    """A token that was seen before: a `Verifier` with a feed and 10,000 denials, against a peer's cheapest check."""
    key = generate_signing_key("ES256", random=secrets.token_bytes)
    issuer = Issuer(key)
    issuer.entries = [{"kind": "sid", "sid": f"s{number}", "until": time.time() + 3600} for number in range(10_000)]
    verifier = Verifier(issuer.url, audience=API, feed_credential=CREDENTIAL)
    verifier.start()
    try:
        if not verifier.wait_until_ready(20):
            raise RuntimeError("the verifier did not become ready")
        token = _mint(key, int(time.time()), issuer=issuer.url, lifetime=900)
        works: dict[str, Work] = {"coatcheck Verifier, warm": lambda: verifier.verify(token)}
        if "PyJWT" in peers:
            secret = generate_signing_key("HS256", random=secrets.token_bytes)
            found = _peer("PyJWT", secret, _mint(secret, int(time.time())))
            if found is not None:
                works["PyJWT HS256"] = found[0]
        facts = {"denied sessions": verifier.status.entries, **{name: version(name) for name in peers}}
        return _compare("Verify, warm: seen before, still not expired and not denied", works, rounds, 2000, facts)
    finally:
        verifier.close()
        issuer.close()


def _compare(question: str, works: Mapping[str, Work], rounds: int, repeat: int, facts: Mapping[str, object]) -> Result:
    for work in works.values():
        work()
    found = compare(
        question,
        [Candidate(name=name, run=_repeat(work), repeat=repeat) for name, work in works.items()],
        rounds=rounds,
        cpu=True,
    )
    return Result(question=found.question, rows=found.rows, rounds=found.rounds, facts=facts)


def _mint(key: SigningKey, now: int, *, issuer: str = ISSUER, lifetime: int = 3600) -> str:
    return mint_access_token(
        key,
        issuer=issuer,
        subject="u-1234567890",
        audience=API,
        client_id="web",
        sid="IRERERERERERERERERERERERERER",
        jti=new_jti(7, b"r" * 15),
        issued_at=now,
        expires_at=now + lifetime,
        scopes=("read", "write"),
        auth_time=now - 30,
        acr="urn:example:2",
        amr=("pwd", "otp"),
        claims={"role": '"admin"', "organisation": "42"},
    )


def _ours(key: SigningKey, token: bytes, now: int) -> Work:
    keys = {key.kid: key.verifying}
    return lambda: verify_access_token(token, keys, RULES, now=now)


def _private(key: SigningKey) -> Any:
    return serialization.load_der_private_key(key.pack(), None)


def _bare_sign(key: SigningKey, token: str) -> Work:
    data = token.rpartition(".")[0].encode("ascii")
    if key.algorithm == "HS256":
        return partial(hmac.digest, key.pack(), data, "sha256")
    private = _private(key)
    if isinstance(private, EllipticCurvePrivateKey):
        ecdsa = ECDSA(hashes.SHA256())
        return lambda: decode_dss_signature(private.sign(data, ecdsa))
    if isinstance(private, Ed25519PrivateKey):
        return partial(private.sign, data)
    return partial(private.sign, data, PKCS1v15(), hashes.SHA256())


def _bare_verify(key: SigningKey, token: str) -> Work:
    signed, _, signature = token.encode("ascii").rpartition(b".")
    payload = signed.partition(b".")[2]
    check = _bare_check(key, signed)

    def work() -> None:
        check(urlsafe_b64decode(signature + b"=" * (-len(signature) % 4)))
        DECODER.decode(urlsafe_b64decode(payload + b"=" * (-len(payload) % 4)))

    return work


def _bare_check(key: SigningKey, signed: bytes) -> Callable[[bytes], object]:
    if key.algorithm == "HS256":
        secret = key.pack()
        return lambda signature: hmac.compare_digest(hmac.digest(secret, signed, "sha256"), signature)
    public, sha256 = _private(key).public_key(), hashes.SHA256()
    if key.algorithm == "ES256":
        ecdsa = ECDSA(sha256)
        return lambda raw: public.verify(
            encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big")), signed, ecdsa
        )
    if key.algorithm == "EdDSA":
        return lambda signature: public.verify(signature, signed)
    pkcs1 = PKCS1v15()
    return lambda signature: public.verify(signature, signed, pkcs1, sha256)


def _peer(name: str, key: SigningKey, token: str) -> tuple[Work, Work] | None:
    """Verify and mint with another library; `None` where it does not know the algorithm."""
    payload = token.split(".")[1]
    claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    header = {"alg": key.algorithm, "kid": key.kid, "typ": "at+jwt"}
    if key.algorithm == "HS256":
        private: Any = key.pack()
        public: Any = private
    else:
        opened = _private(key)
        private = opened.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = opened.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    match name:
        case "PyJWT":
            return _pyjwt(key.algorithm, private, public, token, claims, header)
        case "joserfc":
            return _joserfc(key, private, public, token, claims, header)
        case "Authlib":
            return _authlib(key, private, public, token, claims, header)
        case _:
            return None if key.algorithm == "EdDSA" else _jose(key.algorithm, private, public, token, claims, header)


def _pyjwt(
    algorithm: str, private: bytes, public: bytes, token: str, claims: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[Work, Work]:
    jwt = import_module("jwt")
    known = jwt.get_algorithm_by_name(algorithm)
    signing, checking = known.prepare_key(private), known.prepare_key(public)
    return (
        lambda: jwt.decode(token, checking, algorithms=[algorithm], audience=API, issuer=ISSUER),
        lambda: jwt.encode(dict(claims), signing, algorithm=algorithm, headers=dict(header)),
    )


def _joserfc(
    key: SigningKey, private: bytes, public: bytes, token: str, claims: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[Work, Work]:
    jwk, jwt = import_module("joserfc.jwk"), import_module("joserfc.jwt")
    kind = {"HS256": "oct", "ES256": "EC", "RS256": "RSA", "EdDSA": "OKP"}[key.algorithm]
    signing, checking = jwk.import_key(private, kind), jwk.import_key(public, kind)
    registry = jwt.JWTClaimsRegistry(
        iss={"essential": True, "value": ISSUER}, aud={"essential": True, "value": API}, exp={"essential": True}
    )

    def verify() -> None:
        registry.validate(jwt.decode(token, checking, algorithms=[key.algorithm]).claims)

    return verify, lambda: jwt.encode(dict(header), dict(claims), signing, algorithms=[key.algorithm])


def _authlib(
    key: SigningKey, private: bytes, public: bytes, token: str, claims: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[Work, Work]:
    with warnings.catch_warnings():
        # Deprecated in favour of joserfc, and still what many run.
        warnings.simplefilter("ignore")
        jose = import_module("authlib.jose")
        jwt = jose.JsonWebToken([key.algorithm])
        kind = {"HS256": "oct", "ES256": "EC", "RS256": "RSA", "EdDSA": "OKP"}[key.algorithm]
        signing, checking = (jose.JsonWebKey.import_key(each, {"kty": kind}) for each in (private, public))
    options = {"iss": {"essential": True, "value": ISSUER}, "aud": {"essential": True, "value": API}}

    def verify() -> None:
        jwt.decode(token, checking, claims_options=options).validate()

    return verify, lambda: jwt.encode(dict(header), dict(claims), signing)


def _jose(
    algorithm: str, private: bytes, public: bytes, token: str, claims: Mapping[str, Any], header: Mapping[str, Any]
) -> tuple[Work, Work]:
    jwk, jwt = import_module("jose.jwk"), import_module("jose.jwt")
    signing, checking = jwk.construct(private, algorithm), jwk.construct(public, algorithm)
    return (
        lambda: jwt.decode(token, checking, algorithms=[algorithm], audience=API, issuer=ISSUER),
        lambda: jwt.encode(dict(claims), signing, algorithm=algorithm, headers=dict(header)),
    )


def _repeat(work: Work) -> Callable[[int], None]:
    def run_many(count: int) -> None:
        for _ in range(count):
            work()

    return run_many
