"""Feed octets to the key loaders: any exception but `KeyRefused`, and any key that may not be used, is a find.

Run: `python -m tests.fuzz.fuzz_jwks -max_total_time=60 [corpus directory]`. The first octet chooses the loader.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import get_args

from coatcheck.primitives.jwk import MAX_JWKS_KEYS, Algorithm, KeyRefused, load_jwks, unpack_signing_key

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
PUBLIC = {"kty", "crv", "x", "y", "n", "e", "kid", "alg", "use"}
SEED = (
    b'j{"keys":[{"kty":"EC","kid":"a","crv":"P-256","alg":"ES256","use":"sig","key_ops":["verify"],'
    b'"x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"},'
    b'{"kty":"OKP","kid":"b","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}'
)


def one_input(data: bytes) -> None:
    """Load one input; whatever is accepted must be publishable, named and unable to raise."""
    kind, body = data[:1], data[1:]
    try:
        if kind == b"p":
            for algorithm in ALGORITHMS:
                unpack_signing_key(body, kid="fuzz", algorithm=algorithm).sign(b"data")
            return
        found = load_jwks(body)
    except KeyRefused:
        return
    assert 0 < len(found) <= MAX_JWKS_KEYS
    for kid, key in found.items():
        assert key.kid == kid
        assert key.algorithm != "HS256"
        assert key.public_jwk().keys() <= PUBLIC
        assert not key.verify(b"data", body[:64])


def main() -> None:
    if find_spec("atheris") is None:
        raise SystemExit("this fuzzer needs the package atheris")
    one_input(SEED)
    atheris = import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
