"""The short alias from a rotated id to its successor.

Decides how the successor is sealed: readable only by who holds both the old id and the server key, bound to the
session it belongs to. An alias is made by plain rotation alone, never by a sign-in or a change of privilege, so an id
that was known before sign-in never leads to the signed-in session.
"""

from __future__ import annotations

from coatcheck.core.ids import IdKeys, SessionId, parse_session_id
from coatcheck.primitives.seal import seal, unseal


def seal_successor(old: SessionId, new: SessionId, *, server_key: bytes, nonce: bytes) -> bytes:
    """Encrypt the new id for the holder of the old one; `nonce` is 12 fresh random bytes."""
    return seal(
        new.text.encode("ascii"),
        secret=old.text.encode("ascii"),
        salt=server_key,
        context=_context(old),
        nonce=nonce,
    )


def open_successor(keys: IdKeys, old: SessionId, sealed: bytes, *, server_key: bytes) -> SessionId | None:
    """The successor of `old`, or `None` when it cannot be opened or is not an id of the same session."""
    plain = unseal(sealed, secret=old.text.encode("ascii"), salt=server_key, context=_context(old))
    if plain is None:
        return None
    successor = parse_session_id(keys, plain)
    return successor if successor is not None and successor.ref == old.ref else None


def _context(old: SessionId) -> bytes:
    return b"coatcheck/alias/1/" + old.ref.handle.encode("ascii")
