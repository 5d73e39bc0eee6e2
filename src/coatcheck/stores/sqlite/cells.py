"""What a single value of a row may be: SQLite keeps any type in any column.

Decides which values are numbers and texts of ours. It must never convert one type into another: a text that looks
like a number was not written by this package.
"""

from __future__ import annotations

from typing import Final, TypeGuard

_LARGEST: Final = 2**62


def is_count(value: object) -> TypeGuard[int]:
    """Whether a column's value can be a time, a length or a version: others would overflow when counted on."""
    return type(value) is int and 0 <= value <= _LARGEST


def integer(value: object, name: str) -> int:
    """A time, a length or a version. Raises: ValueError with the column's name."""
    if not is_count(value):
        raise ValueError(f"{name} is no integer of ours")
    return value


def octets(value: object, name: str) -> bytes:
    """Octets as the driver gives them, which is how it gives texts too. Raises: ValueError."""
    if not isinstance(value, bytes):
        raise ValueError(f"{name} is no text")
    return value


def text(value: object, name: str) -> str:
    """UTF-8 text. Raises: ValueError."""
    try:
        return str(octets(value, name), "utf-8")
    except UnicodeDecodeError as broken:
        raise ValueError(f"{name} is no UTF-8") from broken
