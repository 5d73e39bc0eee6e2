"""Field values: what may be kept in a session and the one text it is kept as.

Decides the accepted types (JSON's, datetime, bytes, UUID, Decimal), their bounds and their canonical encoding, by
which a nested change is noticed: a value has changed exactly when its text has. Only data comes out of a text, never
code: there is no pickle and no class look-up here, and there must never be.
"""

from __future__ import annotations

import math
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from typing import Final, TypeAlias
from uuid import UUID

import msgspec

from coatcheck.errors import ValueRefused

Scalar: TypeAlias = bool | int | float | str | datetime | bytes | UUID | Decimal | None
# What may be put in: wider than what comes out, so that a list[str] or a dict[str, int] needs no cast.
Storable: TypeAlias = "Scalar | Sequence[Storable] | Mapping[str, Storable]"
Json: TypeAlias = "Scalar | list[Json] | tuple[Json, ...] | dict[str, Json]"

MAX_DEPTH: Final = 32
MAX_NAME_BYTES: Final = 64
RESERVED: Final = "coatcheck:"
"""How the names of fields begin that the library keeps for itself; no application sees them."""

MAX_INTEGER: Final = 2**63 - 1
# A JSON object with this one member is not a plain object but a tagged value.
_TAG: Final = "$"

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder()


def encode_value(value: object) -> str:
    """The canonical text of a value. Raises: ValueRefused for any other type, NaN, depth over 32, huge integers."""
    try:
        return _encoder.encode(_to_plain(value, 0)).decode("utf-8")
    except (UnicodeEncodeError, OverflowError) as refused:
        raise ValueRefused("text in a session must be valid Unicode") from refused


def decode_value(text: str) -> Json:
    """Read a value back. Raises: ValueError on anything `encode_value` could not have written."""
    try:
        return _from_plain(_decoder.decode(text))
    except (msgspec.DecodeError, RecursionError) as broken:
        raise ValueError("not an encoded value") from broken


def check_name(name: object) -> str:
    """Return a field or claim name that may be kept: 1 to 64 octets of valid UTF-8. Raises: ValueRefused."""
    if not isinstance(name, str):
        raise ValueRefused(f"names in a session are text, not {type(name).__name__}")
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as broken:
        raise ValueRefused("a name in a session must be valid Unicode") from broken
    if not 1 <= size <= MAX_NAME_BYTES:
        raise ValueRefused(f"a name in a session has 1 to {MAX_NAME_BYTES} octets, this one has {size}")
    if name.startswith(RESERVED):
        raise ValueRefused(f"names that begin with {RESERVED} are the library's own")
    return name


def _to_plain(value: object, depth: int) -> object:
    if depth > MAX_DEPTH:
        raise ValueRefused(f"a session value is nested deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    # Subclasses (enumerations, markup, numpy's floats) are kept as what they are underneath.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        if abs(value) > MAX_INTEGER:
            raise ValueRefused("an integer in a session has at most 64 bits")
        return int.__int__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueRefused("NaN and infinity cannot be kept in a session")
        return float.__float__(value)
    if isinstance(value, (list, tuple)):
        return [_to_plain(item, depth + 1) for item in value]
    if isinstance(value, Mapping):
        plain = {_member(name): _to_plain(item, depth + 1) for name, item in value.items()}
        return {_TAG: "map", "v": plain} if _TAG in plain else plain
    return _tagged(value)


def _member(name: object) -> str:
    if not isinstance(name, str):
        raise ValueRefused(f"keys inside a session value are text, not {type(name).__name__}")
    return str.__str__(name)


def _tagged(value: object) -> dict[str, str]:
    if isinstance(value, datetime):
        return {_TAG: "datetime", "v": value.isoformat()}
    if isinstance(value, (bytes, bytearray)):
        return {_TAG: "bytes", "v": b64encode(value).decode("ascii")}
    if isinstance(value, UUID):
        return {_TAG: "uuid", "v": str(value)}
    if isinstance(value, Decimal):
        if not value.is_finite():
            raise ValueRefused("NaN and infinity cannot be kept in a session")
        return {_TAG: "decimal", "v": str(value)}
    raise ValueRefused(
        f"a {type(value).__name__} cannot be kept in a session: use JSON values, datetime, bytes, UUID or Decimal"
    )


def _from_plain(value: object) -> Json:
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if isinstance(value, dict):
        if _TAG in value:
            return _untagged(value)
        return {name: _from_plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError("not an encoded value")


def _untagged(tagged: dict[str, object]) -> Json:
    kind, inner = tagged.get(_TAG), tagged.get("v")
    if len(tagged) != 2:
        raise ValueError("not an encoded value")
    if kind == "map" and isinstance(inner, dict):
        return {name: _from_plain(item) for name, item in inner.items()}
    if not isinstance(inner, str):
        raise ValueError("not an encoded value")
    try:
        if kind == "datetime":
            return datetime.fromisoformat(inner)
        if kind == "bytes":
            return b64decode(inner, validate=True)
        if kind == "uuid":
            return UUID(inner)
        if kind == "decimal":
            return Decimal(inner)
    except InvalidOperation as broken:
        raise ValueError("not an encoded value") from broken
    raise ValueError("not an encoded value")
