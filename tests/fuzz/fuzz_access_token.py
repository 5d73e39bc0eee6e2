"""Feed octets to the access token verifier: any exception but `TokenInvalid`, and any accepted change, is a find.

Run: `python -m tests.fuzz.fuzz_access_token -max_total_time=60 [corpus directory]`. The first octet chooses how deep
the input goes: the whole token, the signature, or the header or claims under a right signature.
"""

from __future__ import annotations

import sys
from base64 import urlsafe_b64encode
from importlib import import_module
from importlib.util import find_spec

from coatcheck.core import access_token
from coatcheck.core.access_token import RESERVED_CLAIMS, TokenRules, verify_access_token
from coatcheck.errors import TokenInvalid
from coatcheck.primitives.jwk import unpack_signing_key

NOW = 1_795_000_000
KEY = unpack_signing_key(bytes(range(32)), kid="fuzz", algorithm="HS256")
RING = {KEY.kid: KEY.verifying}
RULES = TokenRules(issuer="https://id.test", audiences=frozenset({"api"}))
HEADER = b'{"alg":"HS256","kid":"fuzz","typ":"at+jwt"}'
CLAIMS = b'{"iss":"https://id.test","sub":"u","aud":"api","client_id":"","jti":"j","iat":1795000000,"exp":1795000600}'


def _b64(data: bytes) -> bytes:
    return urlsafe_b64encode(data).rstrip(b"=")


def _sign(data: bytes) -> bytes:
    return data + b"." + _b64(KEY.sign(data))


GOOD = _sign(_b64(HEADER) + b"." + _b64(CLAIMS))


def one_input(data: bytes) -> None:
    """Verify one input; whatever is accepted must say what the rules demand."""
    depth, body = data[:1], data[1:]
    match depth:
        case b"h":
            token = _sign(_b64(body) + b"." + _b64(CLAIMS))
        case b"c":
            token = _sign(_b64(HEADER) + b"." + _b64(body))
        case b"r":
            token = _sign(body)
        case b"s":
            token = GOOD.rpartition(b".")[0] + b"." + body
        case _:
            token = body
    try:
        found = verify_access_token(token, RING, RULES, now=NOW)
    except TokenInvalid:
        return
    assert found.issuer == RULES.issuer
    assert "api" in found.audience
    assert found.issued_at <= NOW < found.expires_at
    assert RESERVED_CLAIMS.isdisjoint(found.claims)
    assert len(access_token._headers) <= 64
    # Without the signing key only the one good token is accepted.
    assert depth in (b"h", b"c", b"r") or token == GOOD


def main() -> None:
    if find_spec("atheris") is None:
        raise SystemExit("this fuzzer needs the package atheris")
    one_input(b"x" + GOOD)
    atheris = import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
