"""One issuer and one bench a test; keys are made once."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from coatcheck.primitives.jwk import SigningKey, generate_signing_key
from tests.verifier.issuer import Bench, Desk, Issuer


@pytest.fixture(scope="session")
def signing_keys() -> tuple[SigningKey, SigningKey]:
    return generate_signing_key("ES256", random=os.urandom), generate_signing_key("EdDSA", random=os.urandom)


@pytest.fixture
def issuer(signing_keys: tuple[SigningKey, SigningKey]) -> Iterator[Issuer]:
    made = Issuer(signing_keys[0])
    yield made
    made.close()


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


@pytest.fixture
def bench(issuer: Issuer, desk: Desk) -> Iterator[Bench]:
    with Bench(issuer, desk) as made:
        yield made
