"""Hashes and comparisons; thin names over the standard library.

Decides which hash serves what: SHA-256 for credentials at rest, keyed BLAKE2s where a key is at hand. It must
never see a policy, and never compare secrets with `==`.
"""

from __future__ import annotations

import hashlib
import hmac
from base64 import urlsafe_b64encode


def sha256_text(data: bytes) -> str:
    """SHA-256 as 43 characters of base64url, the form in which credentials are kept at rest."""
    return urlsafe_b64encode(hashlib.sha256(data).digest())[:43].decode("ascii")


def keyed(data: bytes, *, key: bytes, size: int, purpose: bytes) -> bytes:
    """Keyed BLAKE2s of `size` bytes (at most 32); `purpose` (at most 8 bytes) separates uses of one key."""
    return hashlib.blake2s(data, key=key, digest_size=size, person=purpose).digest()


def same(left: bytes, right: bytes) -> bool:
    """Compare in a time that does not depend on where the first difference is."""
    return hmac.compare_digest(left, right)
