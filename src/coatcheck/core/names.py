"""User names and e-mail addresses: the one normalisation by which they are compared.

Decides which texts may name an account, and the key under which an account is found. Two names are one account
exactly when their keys are equal; the database compares keys byte by byte and never folds by itself. Otherwise two
rules disagree and `mıke@example.org` receives what was meant for `mike@example.org` (CVE-2019-19844): whoever
writes to an account's owner uses the stored name, never the typed one.

Known limit: letters of different scripts that look alike (Latin `a`, Cyrillic `а`) stay different keys. This file
must never be bypassed by a comparison of its own elsewhere.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Final, Literal

MAX_NAME_CHARACTERS: Final = 128
"""Code points a name may have, as typed, as shown and as a key. No normalisation runs on a longer text."""

NameRefusal = Literal["not_text", "empty", "too_long", "characters", "spaces"]

# Controls, format characters (zero width, direction overrides), surrogates, private use, unassigned, line ends.
# Unassigned ones also because a later Unicode may fold them: a key must mean the same for ever.
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_MOST_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class UserName:
    """A name that may stand for an account: `shown` as typed (NFC, without outer spaces), `key` for comparing."""

    shown: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRefused:
    """Why a text cannot name an account; `reason` is stable and safe to show."""

    reason: NameRefusal


def parse_user_name(typed: object) -> UserName | NameRefused:
    """Read a user name or an e-mail address as somebody typed it. Never raises, whatever comes."""
    if not isinstance(typed, str):
        return NameRefused(reason="not_text")
    # Length before everything: ten megabytes must cost as little as ten letters.
    if len(typed) > MAX_NAME_CHARACTERS:
        return NameRefused(reason="too_long")
    # Keyboards of telephones add a space after a suggestion; only plain spaces are forgiven.
    name = typed.strip(" ")
    if not name:
        return NameRefused(reason="empty")
    refusal = _refusal_of(name)
    if refusal is not None:
        return NameRefused(reason=refusal)
    shown, key = unicodedata.normalize("NFC", name), _fold(name)
    if key is None:
        return NameRefused(reason="characters")
    # Folding can make what was refused above: U+00A8 becomes a space and a mark, U+FDFA eighteen letters.
    refusal = _refusal_of(key)
    if refusal is not None:
        return NameRefused(reason=refusal)
    if max(len(shown), len(key)) > MAX_NAME_CHARACTERS:
        return NameRefused(reason="too_long")
    return UserName(shown=shown, key=key)


def _refusal_of(name: str) -> NameRefusal | None:
    categories = {unicodedata.category(character) for character in name}
    if categories & _REFUSED_CATEGORIES:
        return "characters"
    # A space inside is where two names look like one, and where logs and command lines cut.
    return "spaces" if "Zs" in categories else None


def _fold(name: str) -> str | None:
    """NFKC and case folding, repeated until nothing changes; `None` for a text that does not settle."""
    for _ in range(_MOST_ROUNDS):
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
        if folded == name:
            return folded
        name = folded
    return None
