"""Session ids and their public handles: one layout, one keyed check.

Decides what an id looks like (version 1, fixed in docs/decisions/0001-formats.md) and which texts are ids of ours at
all. The check is verified before any routing, so an invented id costs no trip to the store and can steer no request
to a chosen Cluster slot. It must never draw randomness: the caller hands it in.

    session id   kind(1) tag(2) handle(12) secret(24) check(9)   48 bytes, 64 characters of base64url
    sid          kind(1) tag(2) handle(12) check(6)              21 bytes, 28 characters of base64url

Every part starts on a multiple of three bytes, so every part has its own characters in the text.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Final

from coatcheck.primitives.digest import keyed, same, sha256_text

KIND_SESSION_ID: Final = 0x11
KIND_SID: Final = 0x21
HANDLE_BYTES: Final = 12
SECRET_BYTES: Final = 24
SESSION_ID_CHARACTERS: Final = 64
SID_CHARACTERS: Final = 28
ID_CHECK_BYTES: Final = 9
SID_CHECK_BYTES: Final = 6

KEY_OF: Final = slice(4, 20)
"""Where a session id has its handle, which is no secret."""
GROUP_OF: Final = slice(0, 4)
"""Where a session id has its kind and tag: the same in all ids of one subject."""

_ID_SHAPE = re.compile(rb"[A-Za-z0-9_-]{64}")
_SID_SHAPE = re.compile(r"[A-Za-z0-9_-]{28}")


@dataclass(frozen=True, slots=True, repr=False)
class IdKeys:
    """The two keys a store makes on first use and never rotates: one places, one refuses forgeries.

    They protect routing and cost, not accounts: knowing them lets nobody guess the 192 secret bits of an id.
    """

    tag_key: bytes
    check_key: bytes

    def __repr__(self) -> str:
        return "IdKeys(redacted)"

    def pack(self) -> bytes:
        """The stored form: version byte, then both keys."""
        return b"\x01" + self.tag_key + self.check_key

    @classmethod
    def unpack(cls, stored: bytes) -> IdKeys | None:
        """Read the stored form; `None` when it is not ours."""
        if len(stored) != 65 or stored[0] != 1:
            return None
        return cls(stored[1:33], stored[33:65])


@dataclass(frozen=True, slots=True)
class SessionRef:
    """Where a session lives: its tag (0 to 65535, the part that places it) and its handle (16 characters)."""

    tag: int
    handle: str


@dataclass(frozen=True, slots=True, repr=False)
class SessionId:
    """The secret in the cookie. Its check has been verified; whether it is alive only the store can say."""

    text: str
    ref: SessionRef

    @property
    def digest(self) -> str:
        """The form at rest: SHA-256 of the text, 43 characters."""
        return sha256_text(self.text.encode("ascii"))

    def __repr__(self) -> str:
        return f"SessionId({self.ref.handle}, redacted)"


def subject_tag(keys: IdKeys, tenant: str, subject: str) -> int:
    """Where all sessions of a subject live: 16 bits of a keyed hash, so nobody outside can aim at a slot."""
    return int.from_bytes(keyed(_owner(tenant, subject), key=keys.tag_key, size=2, purpose=b"cc-tag"), "big")


def group_of(tag: int) -> bytes:
    """What the ids of all sessions with this tag begin with."""
    return urlsafe_b64encode(bytes((KIND_SESSION_ID,)) + tag.to_bytes(2, "big"))


def random_tag(random: bytes) -> int:
    """Where an anonymous session lives: any two random bytes."""
    return int.from_bytes(random[:2], "big")


def owner_of(tenant: str, subject: str | None) -> str:
    """Name of a subject's index in a store: 43 characters, or the empty text for anonymous sessions."""
    return "" if subject is None else sha256_text(_owner(tenant, subject))


def mint_session_id(keys: IdKeys, *, tag: int, handle: bytes, secret: bytes) -> SessionId:
    """Make an id from 12 and 24 fresh random bytes."""
    body = bytes((KIND_SESSION_ID,)) + tag.to_bytes(2, "big") + handle + secret
    text = _encode(body + _check(keys, body, ID_CHECK_BYTES))
    return SessionId(text, SessionRef(tag, text[4:20]))


def successor_of(keys: IdKeys, old: SessionId, *, secret: bytes) -> SessionId:
    """The next id of the same session: same place and handle, 24 fresh secret bytes."""
    return mint_session_id(keys, tag=old.ref.tag, handle=urlsafe_b64decode(old.ref.handle), secret=secret)


def parse_session_id(keys: IdKeys, value: bytes) -> SessionId | None:
    """Read an id out of a cookie; `None` unless shape, version and keyed check are all right."""
    # One bounded look at the shape first: a forged header must cost as little as a missing one.
    if len(value) != SESSION_ID_CHARACTERS or not _ID_SHAPE.fullmatch(value):
        return None
    raw = urlsafe_b64decode(value)
    body = raw[:-ID_CHECK_BYTES]
    if raw[0] != KIND_SESSION_ID or not same(raw[-ID_CHECK_BYTES:], _check(keys, body, ID_CHECK_BYTES)):
        return None
    text = value.decode("ascii")
    return SessionId(text, SessionRef(int.from_bytes(raw[1:3], "big"), text[4:20]))


def sid_of(keys: IdKeys, ref: SessionRef) -> str:
    """The public handle of a session, for lists, logs and administration; it survives id rotation."""
    body = bytes((KIND_SID,)) + ref.tag.to_bytes(2, "big") + urlsafe_b64decode(ref.handle)
    return _encode(body + _check(keys, body, SID_CHECK_BYTES))


def parse_sid(keys: IdKeys, sid: str) -> SessionRef | None:
    """Read a public handle; `None` when it was never one of ours."""
    if len(sid) != SID_CHARACTERS or not _SID_SHAPE.fullmatch(sid):
        return None
    raw = urlsafe_b64decode(sid)
    body = raw[:-SID_CHECK_BYTES]
    if raw[0] != KIND_SID or not same(raw[-SID_CHECK_BYTES:], _check(keys, body, SID_CHECK_BYTES)):
        return None
    return SessionRef(int.from_bytes(raw[1:3], "big"), sid[4:20])


def _owner(tenant: str, subject: str) -> bytes:
    # The length in front keeps ("a", "bc") and ("ab", "c") apart.
    tenant_bytes = tenant.encode()
    return len(tenant_bytes).to_bytes(4, "big") + tenant_bytes + subject.encode()


def _check(keys: IdKeys, body: bytes, size: int) -> bytes:
    return keyed(body, key=keys.check_key, size=size, purpose=b"cc-check")


def _encode(raw: bytes) -> str:
    return urlsafe_b64encode(raw).decode("ascii")
