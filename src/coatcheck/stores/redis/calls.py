"""How a verb becomes a command: keys, scripts and arguments, and what is read out of the answers.

Decides the names of keys, how a record's members are spelled (docs/decisions/0012-redis-layout.md), which files make up
a script, and that an answer of another kind than a script gives ends the verb. It must never know what a verb means.
"""

from __future__ import annotations

import hashlib
from binascii import a2b_base64, b2a_base64
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Annotated, Final, Literal, TypeAlias

import msgspec

from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.session import SECOND_US, StoredSession
from coatcheck.errors import StoreUnavailable
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis.dispatch import Call, Dispatcher, Script
from coatcheck.stores.redis.driver import Word
from coatcheck.stores.redis.nodes import Reply, slot_of

OWNER_CHARACTERS: Final = 16
"""How much of an owner names its keys: 96 bits of a hash, under a tag of another 16."""

MOST: Final = 2**53 - 1
"""The largest number in a record: scripts reckon in doubles."""

_DIGEST_CHARACTERS: Final = 43
_DIGEST_OCTETS: Final = 32
_FROM_URL: Final = bytes.maketrans(b"-_", b"+/")
_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
_BARE: Final = ()
_SESSIONS: Final = ("prelude",)
_FAMILIES: Final = ("prelude", "families")

SCRIPTS: Final = {
    "admit": _SESSIONS,
    "announce": _SESSIONS,
    "commit": _SESSIONS,
    "create_family": _FAMILIES,
    "denials": _SESSIONS,
    "deny": _SESSIONS,
    "expire_idle": _SESSIONS,
    "hit": _BARE,
    "id_keys": _BARE,
    "list_by_owner": _SESSIONS,
    "load": _BARE,
    "look": _SESSIONS,
    "revoke": _SESSIONS,
    "revoke_owner": _SESSIONS,
    "rotate_id": _SESSIONS,
    "rotate_refresh": _FAMILIES,
    "settle": _SESSIONS,
    "standing": _SESSIONS,
    "sweep": _FAMILIES,
    "touch": _SESSIONS,
    "trim": _SESSIONS,
    "write_ring": _BARE,
}
"""Every script, and the files it begins with."""

ASIDE: Final = {"load": ("judge", ("key", "digest", "now"), ("prelude",))}
"""A script that seldom needs what other scripts begin with: the name of a function before it, what that is given, and
the files that the file of this name begins with inside of it."""


class Calls:
    """Keys, clock and scripts of one store: what the verbs stand on."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._options = options
        self._dispatcher = Dispatcher(url, options)
        self._scripts = all_scripts()

    def _key(self, tag: int, kind: str, name: str) -> str:
        return f"{self._options.namespace}:{kind}:{{{tag:04x}}}{name}"

    def _owner_key(self, tag: int, kind: str, owner: str) -> str:
        return self._key(tag, kind, owner[:OWNER_CHARACTERS])

    def _sessions_of(self, tag: int) -> str:
        """What the keys of the tag's sessions begin with, from which a script makes all others."""
        return self._key(tag, "s", "")

    def _slot(self, tag: int) -> int:
        return slot_of(f"{tag:04x}")

    def _limit_key(self, key: str) -> tuple[str, str]:
        # Hashed: a caller's text must not choose a slot, end a hash tag or grow a key.
        tag = f"l:{sha256_text(key.encode('utf-8', 'surrogatepass'))[:22]}"
        return tag, f"{self._options.namespace}:{{{tag}}}:l"

    def _offset(self) -> int:
        return self._options.clock_offset_us()

    def _time(self, reply: Reply) -> int:
        seconds, microseconds, *_ = list_of(reply, at_least=2)
        return int(bytes_of(seconds)) * SECOND_US + int(bytes_of(microseconds)) + self._offset()

    def _call(
        self, name: str, keys: Sequence[Word], arguments: Sequence[Word], *, slot: int, divisible: bool = False
    ) -> Call:
        script = self._scripts[name]
        words = ("EVALSHA", script.sha, len(keys), *keys, *arguments)
        return Call(slot=slot, words=words, script=script, divisible=divisible)

    async def _run(
        self,
        name: str,
        keys: Sequence[Word],
        arguments: Sequence[Word],
        *,
        slot: int,
        write: bool,
        until: float | None = None,
    ) -> Reply:
        call = self._call(name, keys, arguments, slot=slot)
        (reply,) = await self._dispatcher.perform([call], write=write, until=until)
        return reply

    async def _session(
        self, name: str, ref: SessionRef, arguments: Sequence[Word], *, write: bool, until: float | None = None
    ) -> Reply:
        key, told = self._key(ref.tag, "s", ref.handle), [self._offset(), *arguments]
        return await self._run(name, [key], told, slot=self._slot(ref.tag), write=write, until=until)


_Whole: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MOST)]


class _SessionRecord(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A stored record as the scripts pack it; members behind the last one belong to a newer release. What the prelude
    calls sound is sound here: `load` hands out records that no script has looked at.

    `digest` is text to cmsgpack, and 32 octets to everybody else. `auth`: -1 without a sign-in, 0 for the moment of the
    creation, else the time. `idle` and `absolute` are lengths: seconds, or microseconds below zero.
    """

    schema: Literal[1]
    version: _Whole
    digest: msgspec.Raw
    owner: str
    subject: str
    created_us: _Whole
    auth: Annotated[int, msgspec.Meta(ge=-1, lt=MOST)]
    idle: int
    absolute: int
    authority: str
    fields: list[str]
    evicted: list[msgspec.Raw]


_decoder: Final = msgspec.msgpack.Decoder(_SessionRecord)
_text_decoder: Final = msgspec.msgpack.Decoder(str)
# How a packed text of 32 octets begins: in eight bits of length, and in sixteen, as some packers write all of them.
_DIGEST_BEGINNINGS: Final = (b"\xd9\x20", b"\xda\x00\x20")


def session_of(ref: SessionRef, packed: Reply, digest: str | None = None) -> StoredSession | None:
    """The session, or `None` for bytes that are none, also where a script took them for one (text that is not UTF-8).

    `digest` where it is known already.
    """
    try:
        record = _decoder.decode(bytes_of(packed))
        if digest is None:
            digest = _digest_of(bytes(record.digest))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    auth, created_us, fields = record.auth, record.created_us, record.fields
    idle_us, absolute_us = _length_of(record.idle), created_us + _length_of(record.absolute)
    if idle_us > MOST or absolute_us > MOST or len(fields) % 2:
        return None
    return StoredSession(
        schema=record.schema,
        version=record.version,
        ref=ref,
        digest=digest,
        owner=_owner_of(record.owner, record.subject),
        subject=record.subject,
        created_us=created_us,
        auth_us=created_us if auth == 0 else max(0, auth),
        idle_us=idle_us,
        absolute_us=absolute_us,
        authority=record.authority,
        fields=dict(zip(fields[::2], fields[1::2], strict=True)),
    )


def stored_digest(digest: str) -> bytes:
    """A digest as it is kept and compared: its 32 octets. What is no digest of ours is kept as the text it is."""
    if len(digest) == _DIGEST_CHARACTERS and digest.isascii():
        text = digest.encode("ascii")
        try:
            raw = a2b_base64(text.translate(_FROM_URL) + b"=")
        except ValueError:
            return text
        # Decoding forgives: of several spellings only one is ours.
        return raw if _spelled(raw) == text else text
    return digest.encode("utf-8", "surrogatepass")


def is_digest(digest: str, stored: bytes) -> bool:
    """Whether `stored_digest` took this for a digest of ours, which is spelled in one way only."""
    return len(digest) == _DIGEST_CHARACTERS and len(stored) == _DIGEST_OCTETS


def stored_owner(owner: str, subject: str) -> str:
    """An owner as a record keeps it: what names its keys, where the rest follows from the subject alone; else whole."""
    return owner[:OWNER_CHARACTERS] if owner == owner_of("", subject) else owner


def _digest_of(packed: bytes) -> str:
    if packed[:-_DIGEST_OCTETS] in _DIGEST_BEGINNINGS:
        return _text_of_digest(packed[-_DIGEST_OCTETS:])
    return _text_decoder.decode(packed)


def _text_of_digest(raw: bytes) -> str:
    return _spelled(raw).decode("ascii")


def _spelled(raw: bytes) -> bytes:
    return b2a_base64(raw, newline=False).translate(_TO_URL)[:_DIGEST_CHARACTERS]


def _owner_of(stored: str, subject: str) -> str:
    if len(stored) != OWNER_CHARACTERS:
        return stored
    whole = owner_of("", subject)
    return whole if whole.startswith(stored) else stored


def _length_of(stored: int) -> int:
    return stored * SECOND_US if stored >= 0 else -stored


@cache
def all_scripts() -> dict[str, Script]:
    """The scripts by name, as they are sent."""
    folder = files("coatcheck.stores.redis").joinpath("lua")
    scripts: dict[str, Script] = {}
    for name, beginning in SCRIPTS.items():
        source = "".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in (*beginning, name))
        if name in ASIDE:
            called, given, before = ASIDE[name]
            body = "".join(folder.joinpath(f"{part}.lua").read_text("utf-8") for part in (*before, called))
            source = f"local function {called}({', '.join(given)})\n{body}end\n{source}"
        # The name by which Redis knows a script; nothing rests on its strength.
        sha = hashlib.sha1(source.encode("utf-8"), usedforsecurity=False).hexdigest()
        scripts[name] = Script(source, sha)
    return scripts


# What scripts answer is fixed; anything else comes from something that is not Redis and ends the verb.


def list_of(reply: Reply, at_least: int = 1) -> list[Reply]:
    """The answer as a list of at least so many members. Raises: StoreUnavailable."""
    if not isinstance(reply, list) or len(reply) < at_least:
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def answer_of(reply: Reply) -> list[Reply]:
    """An answer whose first member tells which; up to five, what is missing is `None` and fails where it is read."""
    return [*list_of(reply), None, None, None, None]


def int_of(reply: Reply) -> int:
    """The answer as a number. Raises: StoreUnavailable."""
    if not isinstance(reply, int):
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def bytes_of(reply: Reply) -> bytes:
    """The answer as bytes. Raises: StoreUnavailable."""
    if not isinstance(reply, bytes):
        raise StoreUnavailable("redis: an answer of another kind than the script gives")
    return reply


def text_of(reply: Reply) -> str:
    """The answer as text, whatever bytes are in it. Raises: StoreUnavailable."""
    return bytes_of(reply).decode("utf-8", "replace")


def refs_of(tag: int, handles: Sequence[Reply]) -> tuple[SessionRef, ...]:
    """Sessions of one tag by their handles. Raises: StoreUnavailable."""
    return tuple(SessionRef(tag, text_of(handle)) for handle in handles)
