"""What a near copy keeps of a session: what most requests ask for at hand, the rest packed.

Decides the form in this process's memory, which nobody else ever reads. It holds no id: its key is the public part,
and the credential is kept as its SHA-256. Unpacking makes the very record that was packed.
"""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from sys import getsizeof
from typing import Final

import msgspec

from coatcheck.core.freshness import Fill, Held
from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.session import StoredSession

_BESIDES: Final = 452
"""Octets that one copy takes at most besides its subject and what it packs: itself, its digest and its moments, its
key, and its place in the table after much coming and going, when the dictionary has grown to six slots for each key."""

_WORD: Final = 64
"""What the two numbers take that say which word a copy was read under, where lines have marks."""

_STEP: Final = 32
# The same number for many copies is one object: a number of its own would add to the size it tells of.
_SIZES: Final = tuple(_BESIDES + _STEP * (step + 1) for step in range(256))

_SEEN: Final = 8
"""As many octets of what is packed are the last activity: a number of its own would take four times as much."""

MARK: Final = 8
"""As many octets after them are the mark of a place (`places.Binding`)."""

_HEAD: Final = _SEEN + MARK
UNMARKED: Final = bytes(MARK)

_SEEN_BELOW: Final = 1 << 8 * _SEEN

# Nearly every authority is made of these, and JSON as any release writes it has none of the signs.
_PHRASES: Final = (
    ('{"authentications":[["', "\x01"),
    (']],"amr":["', "\x02"),
    ('"],"claims":{"', "\x03"),
    ('":"\\"', "\x04"),
    ('\\"","', "\x05"),
    ('\\""}', "\x06"),
    ('"user_agent":"', "\x07"),
    ('"networks":{"', "\x08"),
    ('"profile":"', "\x0e"),
    ('"persistent":true', "\x0f"),
)
_WHOLE: Final = "\x00"
"""What stands before an authority that was not shortened."""


class NearSession(Held, gc=False, kw_only=True):
    """One alive session, as of its last read.

    `subject` is None for an anonymous session. `until` is when the next use has to be noted. Everything else is in
    `packed`, the last activity first, then the mark of the place of the last request that was let in.
    """

    subject: str | None
    packed: bytes

    @property
    def seen_us(self) -> int:
        """The last activity that the store knows of, by the store's clock."""
        return int.from_bytes(self.packed[:_SEEN], "big")

    @seen_us.setter
    def seen_us(self, value: int) -> None:
        # Of two threads that set something in it the later one counts, and no more is lost than a note of it.
        self.packed = value.to_bytes(_SEEN, "big") + self.packed[_SEEN:]

    @property
    def place(self) -> bytes:
        """The mark of the place that was let in last; `UNMARKED` for none. Never leaves this process."""
        return self.packed[_SEEN:_HEAD]

    @place.setter
    def place(self, mark: bytes) -> None:
        self.packed = self.packed[:_SEEN] + mark + self.packed[_HEAD:]


def pack(session: StoredSession, *, fill: Fill, seen_us: int, until: float, ends: float) -> NearSession | None:
    """A copy of a session, read by `fill`. None for a record that would not come out as it went in: somebody's hand was
    in the store."""
    digest = _raw(session.digest)
    # Nearly always its subject leads to the owner; a tenant's is kept.
    subject = session.subject if session.owner else None
    owner = b"" if session.owner == _owner_by_itself(subject) else _raw(session.owner)
    if digest is None or owner is None or (session.subject != "" and not session.owner):
        return None
    if not 0 <= seen_us < _SEEN_BELOW:
        return None
    encoded = _encoder.encode(
        (
            session.ref.tag,
            session.schema,
            session.version,
            owner,
            session.created_us,
            session.auth_us - session.created_us if session.owner else session.auth_us,
            session.idle_us,
            session.absolute_us - session.created_us,
            _shortened(session.authority),
            dict(session.fields),
        )
    )
    # A new object: the encoder's own keeps the room that it had reserved.
    packed = b"".join((seen_us.to_bytes(_SEEN, "big"), UNMARKED, encoded))
    words = 0 if fill.line.marks is None else _WORD
    return NearSession(
        digest=digest,
        line=fill.line,
        since=fill.since,
        until=until,
        ends=ends,
        size=_size(len(packed) + words + (0 if subject is None else getsizeof(subject))),
        subject=subject,
        packed=packed,
    )


def unpack(near: NearSession, handle: str) -> StoredSession:
    """The record of a copy."""
    tag, schema, version, owner, created, auth, idle, absolute, authority, fields = _decoder.decode(near.packed[_HEAD:])
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
        authority=_whole(authority),
        fields=fields,
    )


def _size(octets: int) -> int:
    return _SIZES[octets // _STEP] if octets < _STEP * len(_SIZES) else _BESIDES + octets


def _shortened(authority: str) -> str:
    # Somebody's hand may have written the signs themselves.
    if not authority.isprintable():
        return _WHOLE + authority
    for phrase, sign in _PHRASES:
        authority = authority.replace(phrase, sign)
    return authority


def _whole(short: str) -> str:
    if short.startswith(_WHOLE):
        return short[1:]
    for phrase, sign in _PHRASES:
        short = short.replace(sign, phrase)
    return short


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
