"""The audit log: what happened to accounts and sessions, one row an event, appended and never changed.

Decides the stored form of an event (its envelope as one line of ASCII JSON, so that no name can break a log line:
ASVS 16.4.1), its bound, and what the accounts' own events say. The database refuses to change or delete a row. No event
holds a password, a token or what was typed as a name: people type their password into the wrong field (ASVS 16.2.5).
"""

# ruff: noqa: S608 - only the number of rows or kinds is put into the statement; every value is a parameter

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from coatcheck.core.session import MAX_SUBJECT_BYTES
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.events import Event, EventKind
from coatcheck.server.accounts import User
from coatcheck.server.database_port import Database, Value

MAX_ENVELOPE_CHARACTERS: Final = 16_384
"""A longer envelope is stored without its data and says so; the event itself is never dropped."""

MAX_READ: Final = 1000
_ROWS_A_STATEMENT: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One stored event. `position` grows in the order of commits; `envelope` is `Event.envelope()`."""

    position: int
    envelope: Mapping[str, object]


class AuditLog:
    """Append and read. Any number of servers may append at once; all raise StoreUnavailable."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def append(self, events: Sequence[Event]) -> None:
        """Write events in order. Up to 100 are written all or none; more go in groups of 100."""
        for start in range(0, len(events), _ROWS_A_STATEMENT):
            group = events[start : start + _ROWS_A_STATEMENT]
            parameters: list[Value] = []
            for event in group:
                parameters += (_microseconds(event.at), event.kind, _line(event), _indexed(event.subject))
            await self._database.fetch(
                "insert into {namespace}_audit (at_us, type, envelope, subject) values "
                + ", ".join(["(?, ?, ?, ?)"] * len(group)),
                *parameters,
            )

    async def read(self, *, after: int = 0, limit: int = 100) -> tuple[AuditEntry, ...]:
        """Events behind a position, oldest first. Whoever reads on from the last position misses none.

        Raises: ValueRefused for a negative position or a limit outside 1 to `MAX_READ`.
        """
        if not 0 <= after < 2**63 or not 1 <= limit <= MAX_READ:
            raise ValueRefused(f"after: not negative; limit: 1 to {MAX_READ}")
        rows = await self._database.fetch(
            "select position, envelope from {namespace}_audit where position > ? order by position limit ?",
            after,
            limit,
        )
        return tuple(_entry(position, envelope) for position, envelope in rows)

    async def of_subject(
        self, subject: str, *, kinds: Collection[EventKind], since: float, limit: int = 10
    ) -> tuple[AuditEntry, ...]:
        """The latest events of these kinds about one account, newest first; `since` is Unix seconds, and counts.

        Reads that account's events of these kinds alone, by an index. Raises: ValueRefused for no kinds or a limit
        outside 1 to `MAX_READ`.
        """
        if not kinds or not 1 <= limit <= MAX_READ:
            raise ValueRefused(f"kinds: at least one; limit: 1 to {MAX_READ}")
        marks = ", ".join("?" * len(kinds))
        rows = await self._database.fetch(
            f"select position, envelope from {{namespace}}_audit where subject = ? and type in ({marks}) "
            "and at_us >= ? order by at_us desc, position desc limit ?",
            subject,
            *kinds,
            _microseconds(since),
            limit,
        )
        return tuple(_entry(position, envelope) for position, envelope in rows)


# -- what the accounts tell ----------------------------------------------------------------------------------------


def account_created(user: User, *, at: float, by: Literal["set_up", "command_line", "console"]) -> Event:
    """An account was made; `at` is Unix seconds, here and below."""
    return Event(kind="account.created", at=at, subject=user.id, data={"role": user.role, "by": by})


def account_disabled(user: User, *, at: float) -> Event:
    """Nobody can sign in to the account any more."""
    return Event(kind="account.disabled", at=at, subject=user.id)


def account_enabled(user: User, *, at: float) -> Event:
    """An account may sign in again."""
    return Event(kind="account.enabled", at=at, subject=user.id)


def account_unlocked(user: User, *, at: float) -> Event:
    """The failures of an account were forgotten by an operator."""
    return Event(kind="account.unlocked", at=at, subject=user.id)


def password_changed(user: User, *, at: float) -> Event:
    """The account has a new password; which one it was before or is now is not told."""
    return Event(kind="account.password_changed", at=at, subject=user.id)


def login_failed(user: User | None, *, at: float, why: str, network: str | None) -> Event:
    """A password was judged and refused, or the account may not sign in. `why` is one of our own words."""
    return _attempt("login.failed", user, at, {"why": why}, network)


def login_throttled(*, at: float, retry_after: int, network: str | None) -> Event:
    """An attempt was turned away before anything was looked up; so no account is named."""
    return _attempt("login.throttled", None, at, {"retry_after": retry_after}, network)


def _attempt(
    kind: Literal["login.failed", "login.throttled"],
    user: User | None,
    at: float,
    data: dict[str, str | int | float | bool],
    network: str | None,
) -> Event:
    if network is not None:
        data["network"] = network
    return Event(kind=kind, at=at, subject=None if user is None else user.id, data=data)


# -- the stored form -----------------------------------------------------------------------------------------------


def _line(event: Event) -> str:
    envelope = event.envelope()
    envelope["data"] = {name: _finite(value) for name, value in event.data.items()}
    line = _encode(envelope)
    if len(line) > MAX_ENVELOPE_CHARACTERS:
        envelope["data"] = {"truncated": True}
        line = _encode(envelope)
    if len(line) > MAX_ENVELOPE_CHARACTERS:
        raise ValueRefused("an event's sid or subject is too long for the audit log")
    return line


def _indexed(subject: str | None) -> str | None:
    # The id of an account is plain text. What is not can stand in the envelope, and not in every database's column.
    return subject if subject is not None and len(subject) <= MAX_SUBJECT_BYTES and subject.isprintable() else None


def _encode(envelope: Mapping[str, object]) -> str:
    # ASCII only: line ends, escapes and surrogates leave as \u sequences and cannot forge a second line.
    return json.dumps(envelope, ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def _finite(value: str | int | float | bool) -> str | int | float | bool:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _microseconds(at: float) -> int:
    return round(at * 1_000_000)


def _entry(position: Value, envelope: Value) -> AuditEntry:
    try:
        read = json.loads(envelope) if isinstance(envelope, str) else None
    except (ValueError, RecursionError):
        read = None
    if not isinstance(position, int) or not isinstance(read, dict):
        raise StoreUnavailable("database: a row of the audit log is not what this release writes")
    return AuditEntry(position=position, envelope=read)
