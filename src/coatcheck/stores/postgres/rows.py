"""Rows of the PostgreSQL store: what a session's columns mean, and how texts are kept that PostgreSQL cannot hold.

Decides when columns are not a session of this release; it must never decide whether a session is alive.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Seen
from coatcheck.core.session import SCHEMA, StoredSession
from coatcheck.stores.postgres.connection import Row

_encoder: Final = msgspec.json.Encoder()
_fields_decoder: Final = msgspec.json.Decoder(dict[str, str])


def session_of(ref: SessionRef, columns: Sequence[Any]) -> tuple[StoredSession, int]:
    """Read a record and its last activity. Raises: ValueError when this release cannot read it."""
    (
        schema,
        version,
        digest,
        owner,
        subject,
        created_us,
        auth_us,
        idle_us,
        absolute_us,
        seen_us,
        authority,
        fields,
    ) = columns
    if schema != SCHEMA:
        raise ValueError(f"schema {schema}")
    session = StoredSession(
        schema=schema,
        version=version,
        ref=ref,
        digest=digest,
        owner=owner,
        subject=subject,
        created_us=created_us,
        auth_us=auth_us,
        idle_us=idle_us,
        absolute_us=absolute_us,
        authority=authority,
        fields=fields_from_json(fields),
    )
    return session, seen_us


def seen_of(rows: Sequence[Row]) -> tuple[Seen, ...]:
    """The sessions of a page's rows, without those that this release cannot read."""
    seen: list[Seen] = []
    for row in rows:
        try:
            session, seen_us = session_of(SessionRef(row[2], row[3]), row[4:])
        except ValueError:
            # Unreadable is nobody's session; `load` tells the operator when somebody presents it.
            continue
        seen.append(Seen(session=session, seen_us=seen_us))
    return tuple(seen)


def fields_to_json(fields: Mapping[str, str]) -> str:
    """Fields as one JSON object of escaped texts."""
    return _encoder.encode({escaped(name): escaped(text) for name, text in fields.items()}).decode()


def fields_from_json(text: str) -> dict[str, str]:
    """What `fields_to_json` wrote. Raises: ValueError for anything else."""
    try:
        fields = _fields_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError) as broken:
        raise ValueError("fields are not an object of texts") from broken
    # Escaped by JSON itself when it is there at all.
    if "\\u0001" not in text:
        return fields
    return {unescaped(name): unescaped(value) for name, value in fields.items()}


def escaped(text: str) -> str:
    """The text without U+0000, which PostgreSQL keeps nowhere.

    U+0001 stands before what replaces it, and before itself; the size of a record is counted without (`_commit` in the
    schema).
    """
    if "\x00" in text or "\x01" in text:
        return text.replace("\x01", "\x01b").replace("\x00", "\x01a")
    return text


def can_hold(value: object) -> bool:
    """Whether PostgreSQL can be given this value: no text in it has U+0000 or half of a surrogate pair."""
    if isinstance(value, list):
        return all(map(can_hold, value))
    if not isinstance(value, str):
        return True
    if "\x00" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def unescaped(text: str) -> str:
    """The text that was escaped."""
    return text.replace("\x01a", "\x00").replace("\x01b", "\x01")
