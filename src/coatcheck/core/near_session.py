"""What a near copy keeps of a session: what most requests ask for at hand, the rest packed.

Decides the form in this process's memory, which nobody else ever reads. It holds no id: its key is the public part,
and the credential is kept as its SHA-256. Unpacking makes the very record that was packed.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Final

import msgspec

from coatcheck.core.freshness import Fill, Held
from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.session import StoredSession

_BESIDES: Final = 420
"""Octets that one copy takes besides what it packs, its key and its place in the table included."""

_STEP: Final = 32
# The same number for many copies is one object: a number of its own would add to the size it tells of.
_SIZES: Final = tuple(_BESIDES + _STEP * (step + 1) for step in range(256))


class NearSession(Held, gc=False, kw_only=True):
    """One alive session, as of its last read.

    `subject` is None for an anonymous session. `seen_us` is its last activity that the store knows of, by the store's
    clock. `until` is when the next use has to be noted.
    """

    subject: str | None
    seen_us: int
    packed: bytes


def pack(session: StoredSession, *, fill: Fill, seen_us: int, until: float, ends: float) -> NearSession | None:
    """A copy of a session, read by `fill`. None for a record that would not come out as it went in: somebody's hand was
    in the store."""
    digest = _raw(session.digest)
    # Nearly always its subject leads to the owner; a tenant's is kept.
    subject = session.subject if session.owner else None
    owner = b"" if session.owner == _owner_by_itself(subject) else _raw(session.owner)
    if digest is None or owner is None or (session.subject != "" and not session.owner):
        return None
    packed = _encoder.encode(
        (
            session.ref.tag,
            session.schema,
            session.version,
            owner,
            session.created_us,
            session.auth_us - session.created_us if session.owner else session.auth_us,
            session.idle_us,
            session.absolute_us - session.created_us,
            session.authority,
            dict(session.fields),
        )
    )
    return NearSession(
        digest=digest,
        line=fill.line,
        since=fill.since,
        until=until,
        ends=ends,
        size=_size(len(packed)),
        subject=subject,
        seen_us=seen_us,
        packed=packed,
    )


def unpack(near: NearSession, handle: str) -> StoredSession:
    """The record of a copy."""
    tag, schema, version, owner, created, auth, idle, absolute, authority, fields = _decoder.decode(near.packed)
    return StoredSession(
        schema=schema,
        version=version,
        ref=SessionRef(tag, handle),
        digest=_text(near.digest),
        owner=_text(owner) if owner else _owner_by_itself(near.subject),
        subject=near.subject or "",
        created_us=created,
        auth_us=auth + created if near.subject is not None else auth,
        idle_us=idle,
        absolute_us=absolute + created,
        authority=authority,
        fields=fields,
    )


def _size(octets: int) -> int:
    return _SIZES[octets // _STEP] if octets < _STEP * len(_SIZES) else _BESIDES + octets


def _owner_by_itself(subject: str | None) -> str:
    return owner_of("", subject)


def _raw(text: str) -> bytes | None:
    try:
        raw = urlsafe_b64decode(text + "=") if text else b""
    except ValueError:
        return None
    return raw if _text(raw) == text else None


def _text(raw: bytes) -> str:
    return urlsafe_b64encode(raw)[:43].decode("ascii") if raw else ""


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(tuple[int, int, int, bytes, int, int, int, int, str, dict[str, str]])
