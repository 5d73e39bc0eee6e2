"""The reference pages say what the code does: every claim, every number."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from base64 import urlsafe_b64decode
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from coatcheck import Verifier
from coatcheck.core.access_token import RESERVED_CLAIMS, _Claims, mint_access_token, new_jti
from coatcheck.core.ids import IdKeys, SessionRef, sid_of
from coatcheck.core.profiles import PROFILES
from coatcheck.core.values import decode_value, encode_value
from coatcheck.primitives.jwk import generate_signing_key
from coatcheck.system import REAL

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
CLAIMS = (REFERENCE / "access-token-claims.md").read_text("utf-8")
LIFETIMES = (REFERENCE / "token-lifetimes.md").read_text("utf-8")

Row = list[str]


def rows(page: str, *first: str) -> list[Row]:
    """The rows of every table whose heading begins with these cells."""
    found: list[Row] = []
    inside = False
    for line in page.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if tuple(cells[: len(first)]) == first:
            inside = True
        elif inside and not set(line) <= set("|- "):
            found.append(cells)
    return found


def minted(**claims: object) -> dict[str, Any]:
    key = generate_signing_key("ES256", random=REAL.random)
    token = mint_access_token(
        key,
        issuer="https://id.example",
        subject="50",
        audience="orders",
        client_id="first-party",
        sid="IQAHAAAAAAAAAAAAAAAAAAAAAAAA",
        jti=new_jti(7, bytes(15)),
        issued_at=1_800_000_000,
        expires_at=1_800_000_900,
        scopes=("orders:read",),
        auth_time=1_799_999_000,
        acr="2",
        amr=("pwd",),
        claims={name: encode_value(value) for name, value in claims.items()},
    )
    payload: dict[str, Any] = json.loads(urlsafe_b64decode(token.split(".")[1] + "=="))
    return payload


def test_every_claim_is_described_and_nothing_else() -> None:
    described = [row[0].strip("`") for row in rows(CLAIMS, "claim")]
    assert sorted(described) == sorted(_Claims.__struct_fields__)
    assert set(described) <= RESERVED_CLAIMS


def test_the_members_of_a_header_are_described() -> None:
    key = generate_signing_key("ES256", random=REAL.random)
    header = json.loads(urlsafe_b64decode(key.header + b"=="))
    assert sorted(row[0].strip("`") for row in rows(CLAIMS, "member")) == sorted(header)


def test_the_example_is_what_is_minted() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", CLAIMS, flags=re.DOTALL)
    assert json.loads(example) == minted(role="admin", hired=datetime(2026, 11, 1, 9, tzinfo=UTC))
    assert list(json.loads(example)) == list(minted(role="admin", hired=datetime(2026, 11, 1, 9, tzinfo=UTC)))


def test_the_examples_of_single_claims_are_those_of_the_whole_token() -> None:
    whole = minted()
    for row in rows(CLAIMS, "claim"):
        name, when, example = row[0].strip("`"), row[2], row[4].strip("`")
        assert (name in whole) == (when != "never"), name
        if example:
            assert json.loads(example) == whole[name], name


def test_a_sid_has_as_many_characters_as_it_says() -> None:
    keys = IdKeys(tag_key=bytes(32), check_key=bytes(32))
    assert len(sid_of(keys, SessionRef(7, "A" * 16))) == 28
    assert len(minted()["jti"]) == 24


@pytest.mark.parametrize(
    "value",
    [
        datetime(2026, 11, 1, 9, tzinfo=UTC),
        b"\x00\xff",
        UUID("12345678-1234-5678-1234-567812345678"),
        Decimal("19.90"),
        {"$": 5},
    ],
)
def test_tagged_forms_are_as_written(value: object) -> None:
    forms = [json.loads(form) for form in re.findall(r"`(\{\"\$\".*?\})`", CLAIMS)]
    text = encode_value(value)
    assert json.loads(text) in forms
    assert decode_value(text) == value


def resolved(name: str) -> object:
    """What stands under a dotted name below the package; of a dataclass field, its default."""
    words = name.split(".")
    for size in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["coatcheck", *words[:size]]))
        except ModuleNotFoundError:
            continue
        for word in words[size:]:
            found = getattr(found, word)
        return found
    raise AssertionError(name)


def seconds(value: object) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    assert isinstance(value, (int, float))
    return float(value)


def test_every_number_is_that_of_the_code() -> None:
    found = rows(LIFETIMES, "what", "code name", "default")
    assert len(found) == 20
    for what, name, default in found:
        told = re.fullmatch(r"([0-9.]+) s", default)
        assert told is not None, what
        assert seconds(resolved(name.strip("`"))) == float(told[1]), name


def test_the_profiles_are_as_written() -> None:
    def told(span: timedelta) -> str:
        return f"{span.total_seconds():g} s" if span.total_seconds() < 1e6 else f"{int(span.total_seconds())} s"

    assert rows(LIFETIMES, "profile") == [
        [
            f"`{each.name}`",
            told(each.access_lifetime) if each.carries_tokens else "none",
            told(each.idle_timeout),
            told(each.absolute_timeout),
        ]
        for each in PROFILES.values()
    ]


def test_the_parameters_of_a_verifier_are_as_written() -> None:
    parameters = inspect.signature(Verifier).parameters
    assert "`feed_lease` (5 s unless given), `silence_bound` (60 s unless given)" in LIFETIMES
    assert [seconds(parameters[name].default) for name in ("feed_lease", "silence_bound", "leeway")] == [5, 60, 0]


def test_every_kind_of_entry_is_described() -> None:
    described = {name for row in rows(LIFETIMES, "entry") for name in re.findall(r"`(\w+)`", row[0])}
    assert described == {"sid", "jti", "kid", "sub", "client_sub", "all"}
