"""The device cookie: proof that this browser once signed in to this very account.

Decides its layout (version 1) and which texts are ours. It opens nothing: all it changes is which throttling
bucket an attempt falls into (`core/throttle.py`), so that a stranger who guesses at an account cannot keep its owner
out. It is bound to one account; one earned with the attacker's own account is worth nothing elsewhere. It must never
count as a factor of authentication, and this file must never draw randomness.

    device cookie   kind(1) id(17) check(12)   30 bytes, 40 characters of base64url
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from coatcheck.primitives.digest import keyed, same

KIND_DEVICE: Final = 0x51
DEVICE_RANDOM_BYTES: Final = 17
DEVICE_CHARACTERS: Final = 40
DEVICE_ID_CHARACTERS: Final = 24
MAX_VALUE_CHARACTERS: Final = 256
"""The longest value of a device cookie, also of an application's own."""

_CHECK_BYTES: Final = 12
_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{40}")


@dataclass(frozen=True, slots=True)
class KnownDevice:
    """A device that has signed in to the account before; `id` (24 characters) is no secret."""

    id: str


def mint_device(account: str, *, key: bytes, random: bytes) -> str:
    """The cookie value for a device that has just signed in to `account` (a `UserName.key`).

    `key` is 32 bytes, the same on every node; `random` is 17 fresh bytes.
    """
    if len(random) != DEVICE_RANDOM_BYTES:
        raise ValueError(f"a device id takes {DEVICE_RANDOM_BYTES} random bytes")
    body = bytes((KIND_DEVICE,)) + random
    return urlsafe_b64encode(body + _check(account, body, key)).decode("ascii")


def parse_device(value: str, account: str, *, key: bytes) -> KnownDevice | None:
    """The device a cookie value names, if it has signed in to `account` before; else `None`."""
    # One bounded look at the shape first: a forged cookie must cost as little as a missing one.
    if len(value) != DEVICE_CHARACTERS or not _SHAPE.fullmatch(value):
        return None
    raw = urlsafe_b64decode(value)
    body = raw[:-_CHECK_BYTES]
    if body[0] != KIND_DEVICE or not same(raw[-_CHECK_BYTES:], _check(account, body, key)):
        return None
    return KnownDevice(value[:DEVICE_ID_CHARACTERS])


def device_of(value: str) -> str | None:
    """What a session keeps of the browser it was signed in with: 24 characters of the digest of the cookie's value, so
    that whoever reads the session does not have the cookie. None for a value that cannot be a device cookie."""
    if not 1 <= len(value) <= MAX_VALUE_CHARACTERS:
        return None
    return urlsafe_b64encode(sha256(value.encode("utf-8", "surrogatepass")).digest()[:18]).decode("ascii")


def _check(account: str, body: bytes, key: bytes) -> bytes:
    # The body has one length only, so body and account cannot be shifted against each other. Surrogates pass,
    # because a hostile name must make a miss here and not an exception.
    data = body + account.encode("utf-8", "surrogatepass")
    return keyed(data, key=key, size=_CHECK_BYTES, purpose=b"cc-devic")
