"""Authenticated encryption of a short secret under a key derived from another secret.

Decides the construction: HKDF-SHA256 (RFC 5869) over a secret and a salt, then AES-256-GCM with a handed-in nonce.
Successors of ids and tokens are sealed under the holder's secret, salted with the server key: opening needs both, so
neither the store nor an old backup of it can open anything. It must never keep a key or draw randomness.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE_SIZE: Final = 12


def seal(plain: bytes, *, secret: bytes, salt: bytes, context: bytes, nonce: bytes) -> bytes:
    """Encrypt `plain` for whoever holds `secret` and `salt`; `context` is authenticated with it.

    `nonce` is 12 fresh random bytes: several writers may seal under the same derived key at once.
    """
    return nonce + AESGCM(_key(secret, salt, context)).encrypt(nonce, plain, context)


def unseal(sealed: bytes, *, secret: bytes, salt: bytes, context: bytes) -> bytes | None:
    """Decrypt, or `None` when the secret, the salt or the context is another one, or a byte was changed."""
    if len(sealed) < NONCE_SIZE + 16:
        return None
    try:
        return AESGCM(_key(secret, salt, context)).decrypt(sealed[:NONCE_SIZE], sealed[NONCE_SIZE:], context)
    except InvalidTag:
        return None


def _key(secret: bytes, salt: bytes, context: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=context).derive(secret)
