"""One-time links: the set-up link by which the first administrator is made.

Decides its form, how long it lives, and that of any number of people who present it exactly one is let in. There is
no default password (ASVS 6.3.2, 6.4.1): whoever can read the terminal or the 0600 file of the server is the operator.
Only the digest is stored. It must never work once an administrator exists, and never be written to a log.
"""

# ruff: noqa: S608 - the parts of a statement are constants of this file; every value is a parameter

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Final

from coatcheck.primitives.digest import sha256_text
from coatcheck.server.database_port import Database
from coatcheck.system import REAL, System

KIND_SET_UP: Final = 0x71
SECRET_BYTES: Final = 32
TOKEN_CHARACTERS: Final = 44
LIFE_US: Final = 24 * 3600 * 1_000_000
"""A link works for 24 hours, to the microsecond: at its end it is over."""

_PURPOSE: Final = "set_up"
_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{44}")


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SetUpToken:
    """The secret in the set-up link: 256 random bits, kept nowhere. `text` goes into the link alone."""

    text: str
    expires_us: int

    def __repr__(self) -> str:
        return "SetUpToken(redacted)"


class SetUpLinks:
    """Issue and spend the set-up link. Each verb is one statement; all raise StoreUnavailable."""

    def __init__(self, database: Database, *, system: System = REAL) -> None:
        self._database = database
        self._system = system

    async def issue(self) -> SetUpToken | None:
        """A new link, which voids the one before; `None` once an administrator exists.

        Called at each start: of several servers that start together, the link of the last one works.
        """
        now_us = self._system.now_us()
        raw = bytes((KIND_SET_UP,)) + self._system.random(SECRET_BYTES)
        token = SetUpToken(urlsafe_b64encode(raw).decode("ascii"), now_us + LIFE_US)
        rows = await self._database.fetch(
            "insert into {namespace}_one_time (purpose, subject, digest, created_us, expires_us, consumed_us) "
            f"select ?, '', ?, ?, ?, null where not exists ({_ADMINISTRATOR}) "
            "on conflict (purpose, subject) do update set digest = excluded.digest, created_us = excluded.created_us, "
            "expires_us = excluded.expires_us, consumed_us = null returning purpose",
            _PURPOSE,
            _digest(token.text),
            now_us,
            token.expires_us,
        )
        return token if rows else None

    async def peek(self, token: str) -> bool:
        """Whether the link would work now; for showing the form. It decides nothing."""
        if not _is_token(token):
            return False
        rows = await self._database.fetch(
            f"select 1 from {{namespace}}_one_time where {_LIVE}", _PURPOSE, _digest(token), self._system.now_us()
        )
        return bool(rows)

    async def consume(self, token: str) -> bool:
        """Spend the link: true for the first caller only, while it lives and no administrator exists."""
        if not _is_token(token):
            return False
        now_us = self._system.now_us()
        rows = await self._database.fetch(
            f"update {{namespace}}_one_time set consumed_us = ? where {_LIVE} returning purpose",
            now_us,
            _PURPOSE,
            _digest(token),
            now_us,
        )
        return bool(rows)


_ADMINISTRATOR: Final = "select 1 from {namespace}_users where role = 'admin'"
_LIVE: Final = (
    "purpose = ? and subject = '' and digest = ? and consumed_us is null and expires_us > ? "
    f"and not exists ({_ADMINISTRATOR})"
)


def _is_token(text: str) -> bool:
    if len(text) != TOKEN_CHARACTERS or not _SHAPE.fullmatch(text):
        return False
    return urlsafe_b64decode(text)[0] == KIND_SET_UP


def _digest(text: str) -> str:
    return sha256_text(text.encode("ascii"))
