"""Refresh tokens and their families: one layout, one keyed check, one sealed successor.

Decides what a refresh token looks like (docs/decisions/0001-formats.md), what a family is (all refresh tokens that
descend from one grant, RFC 9700 s4.14.2), and how the successor of a rotated token is sealed: readable only by who
holds both the predecessor and the server key. A token names its family and its generation under a keyed check, so a
genuine older generation is recognized without its digest being kept, and an invented one can end nobody's family.
What becomes of a presented token is decided inside one store verb (`core.ports.TokenStore.rotate_refresh`). It must
never draw randomness or read a clock.

    refresh token   kind(1) tag(2) root(12) family(6) generation(3) secret(33) check(9)   66 bytes, 88 characters

The root of a family that belongs to a session is the session's handle; else it is random, and the kind tells which.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Final

import msgspec

from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.primitives.digest import keyed, same, sha256_text
from coatcheck.primitives.seal import seal, unseal

KIND_OF_SESSION: Final = 0x31
KIND_ALONE: Final = 0x32
ROOT_BYTES: Final = 12
FAMILY_BYTES: Final = 6
SECRET_BYTES: Final = 33
REFRESH_TOKEN_CHARACTERS: Final = 88
CHECK_BYTES: Final = 9
FIRST_GENERATION: Final = 1
LAST_GENERATION: Final = 2**24 - 1

_SHAPE: Final = re.compile(rb"[A-Za-z0-9_-]{88}")


@dataclass(frozen=True, slots=True)
class FamilyRef:
    """Where a family lives: its tag, its root (16 characters), its own name (8 characters), and whether the root is
    a session."""

    tag: int
    root: str
    name: str
    of_session: bool = True

    @property
    def session(self) -> SessionRef | None:
        """The session the family belongs to, if it belongs to one."""
        return SessionRef(self.tag, self.root) if self.of_session else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFamily:
    """A family to be created. The store adds the times: `absolute_us` is a length here.

    `client` is empty for the first party (reuse then ends the session too); `key` is the thumbprint of the key the
    client must prove, or empty; `grant` is opaque text to a store (scope and resources).
    """

    ref: FamilyRef
    digest: str
    owner: str
    subject: str
    client: str
    key: str
    grant: str
    idle_us: int
    absolute_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFamily:
    """One family as a store keeps it. Times are Unix microseconds by the store's clock; `absolute_us` is a point."""

    ref: FamilyRef
    generation: int
    digest: str
    owner: str
    subject: str
    client: str
    key: str
    grant: str
    created_us: int
    rotated_us: int
    idle_us: int
    absolute_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a family may be exchanged for: scopes, and the resources (RFC 8707) beside the usual audience.

    `proofs` is that of its session when the family was begun. Whoever proves himself leaves every copy of his
    credentials behind: a family of before hands out nothing any more.
    """

    scopes: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    proofs: int = 0


def encode_grant(grant: Grant) -> str:
    """The opaque text a store keeps."""
    members: dict[str, object] = {"scope": " ".join(grant.scopes), "resource": grant.resources}
    if grant.proofs:
        members["proofs"] = grant.proofs
    return msgspec.json.encode(members).decode("utf-8")


def decode_grant(text: str) -> Grant:
    """Read the opaque text. Raises: ValueError on bytes that no release could have written."""
    try:
        wire = _grants.decode(text)
    except (msgspec.DecodeError, RecursionError) as broken:
        raise ValueError("not a grant") from broken
    return Grant(scopes=tuple(wire.scope.split()), resources=wire.resource, proofs=wire.proofs)


class _Grant(msgspec.Struct, frozen=True):
    scope: str = ""
    resource: tuple[str, ...] = ()
    proofs: int = 0


_grants: Final = msgspec.json.Decoder(_Grant)


@dataclass(frozen=True, slots=True, repr=False)
class RefreshToken:
    """The secret a client exchanges. Its check has been verified; whether it still counts only the store can say."""

    text: str
    family: FamilyRef
    generation: int

    @property
    def digest(self) -> str:
        """The form at rest: SHA-256 of the text, 43 characters."""
        return sha256_text(self.text.encode("ascii"))

    def __repr__(self) -> str:
        return f"RefreshToken({self.family.name}, generation {self.generation}, redacted)"


def mint_refresh_token(keys: IdKeys, family: FamilyRef, *, generation: int, secret: bytes) -> RefreshToken:
    """Make the token of one generation from 33 fresh random bytes."""
    body = (
        bytes((KIND_OF_SESSION if family.of_session else KIND_ALONE,))
        + family.tag.to_bytes(2, "big")
        + urlsafe_b64decode(family.root)
        + urlsafe_b64decode(family.name)
        + generation.to_bytes(3, "big")
        + secret
    )
    return RefreshToken(_encode(body + _check(keys, body)), family, generation)


def family_of_session(session: SessionRef, *, random: bytes) -> FamilyRef:
    """A new family of a session, from 6 fresh random bytes."""
    return FamilyRef(session.tag, session.handle, _encode(random))


def parse_refresh_token(keys: IdKeys, value: bytes) -> RefreshToken | None:
    """Read a refresh token; `None` unless shape, version and keyed check are all right."""
    if len(value) != REFRESH_TOKEN_CHARACTERS or not _SHAPE.fullmatch(value):
        return None
    raw = urlsafe_b64decode(value)
    body = raw[:-CHECK_BYTES]
    if raw[0] not in (KIND_OF_SESSION, KIND_ALONE) or not same(raw[-CHECK_BYTES:], _check(keys, body)):
        return None
    text = value.decode("ascii")
    family = FamilyRef(int.from_bytes(raw[1:3], "big"), text[4:20], text[20:28], raw[0] == KIND_OF_SESSION)
    return RefreshToken(text, family, int.from_bytes(raw[21:24], "big"))


def seal_next(old: RefreshToken, new: RefreshToken, *, server_key: bytes, nonce: bytes) -> bytes:
    """Encrypt the successor for the holder of its predecessor; `nonce` is 12 fresh random bytes."""
    return seal(
        new.text.encode("ascii"),
        secret=old.text.encode("ascii"),
        salt=server_key,
        context=_context(old),
        nonce=nonce,
    )


def open_next(keys: IdKeys, old: RefreshToken, sealed: bytes, *, server_key: bytes) -> RefreshToken | None:
    """The successor of `old`, or `None` when it cannot be opened or is not the next generation of its family."""
    plain = unseal(sealed, secret=old.text.encode("ascii"), salt=server_key, context=_context(old))
    found = None if plain is None else parse_refresh_token(keys, plain)
    if found is None or found.family != old.family or found.generation != old.generation + 1:
        return None
    return found


def _context(old: RefreshToken) -> bytes:
    family = old.family
    return f"coatcheck/refresh/1/{family.root}.{family.name}/{old.generation}".encode("ascii")


def _check(keys: IdKeys, body: bytes) -> bytes:
    return keyed(body, key=keys.check_key, size=CHECK_BYTES, purpose=b"cc-refr")


def _encode(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode("ascii")
