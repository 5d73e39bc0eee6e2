"""The word by which a sign-in that met a limit goes on: what it carries, and who can read it.

Decides its form and its life. It carries what has been proven (who, when, and with which password) and the sessions
that were shown, sealed under a secret that only a cookie of the same browser holds, and a key that only the servers
have: neither the word alone nor the cookie alone is good for anything, and the word lives two minutes. That it is used
once is `session_limits.py`'s to see to. This file must never decide who may sign in.
"""

from __future__ import annotations

import binascii
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

import msgspec

from coatcheck.primitives.seal import NONCE_SIZE, seal, unseal

CONTINUE_LIFE: Final = timedelta(minutes=2)
"""A word works for two minutes, to the microsecond: at its end it is over."""

PROOF_LIFE: Final = timedelta(minutes=10)
"""For so long the password counts through any number of words; then it is asked for again."""

SECRET_BYTES: Final = 32
MAX_CHARACTERS: Final = 8192
"""A hundred sessions take less than half of it."""

_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]+={0,2}")
_SECRET: Final = re.compile(rb"[A-Za-z0-9_-]{43}=")
_CONTEXT: Final = b"coatcheck/continue/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Standstill:
    """A sign-in that stopped at the limit. Times are Unix microseconds.

    `password_changed_us` names the password that was given at `proved_us`. `device` is the value of the browser's
    device cookie. `audience` and `carrier` are what the sign-in asked for.
    """

    user: str
    password_changed_us: int | None
    proved_us: int
    expires_us: int
    shown: tuple[str, ...]
    device: str
    carrier: Literal["cookie", "body"]
    audience: str | None


def seal_standstill(standstill: Standstill, *, cookie: bytes, key: bytes, nonce: bytes) -> str:
    """The word. `cookie` is the value that the same browser gets, `key` 32 bytes, `nonce` 12 fresh bytes."""
    plain = msgspec.json.encode(standstill)
    return urlsafe_b64encode(seal(plain, secret=cookie, salt=key, context=_CONTEXT, nonce=nonce)).decode("ascii")


def open_standstill(word: str, *, cookie: bytes, key: bytes, now_us: int) -> Standstill | None:
    """What a word carries; None for one that is not ours, is over, or came without the cookie it belongs to."""
    # One bounded look at both shapes first: an invented word must cost as little as a missing one.
    if not 0 < len(word) <= MAX_CHARACTERS or not _SHAPE.fullmatch(word) or not _SECRET.fullmatch(cookie):
        return None
    try:
        plain = unseal(urlsafe_b64decode(word), secret=cookie, salt=key, context=_CONTEXT)
        found = None if plain is None else msgspec.json.decode(plain, type=Standstill)
    except (binascii.Error, msgspec.MsgspecError):
        return None
    return found if found is not None and now_us < found.expires_us else None


def continue_secret(random: bytes) -> str:
    """The cookie value of 32 fresh random bytes."""
    if len(random) != SECRET_BYTES:
        raise ValueError(f"a continue cookie takes {SECRET_BYTES} random bytes")
    return urlsafe_b64encode(random).decode("ascii")


__all__ = [
    "CONTINUE_LIFE",
    "NONCE_SIZE",
    "PROOF_LIFE",
    "SECRET_BYTES",
    "Standstill",
    "continue_secret",
    "open_standstill",
    "seal_standstill",
]
