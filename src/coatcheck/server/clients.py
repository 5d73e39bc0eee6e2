"""Clients of this server: programs with a name and a credential of their own.

Decides what a feed credential looks like and that only its digest is kept. It lets a verifier read what is denied and
nothing else; it must never open a session or a page.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass
from typing import Final

from coatcheck.errors import ConfigurationError
from coatcheck.primitives.digest import sha256_text
from coatcheck.server.database_port import Database
from coatcheck.system import System

KIND_FEED: Final = 0x61
SECRET_BYTES: Final = 32
CREDENTIAL_CHARACTERS: Final = 44

_SHAPE: Final = re.compile(r"[A-Za-z0-9_-]{44}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One client; `created_us` is Unix microseconds."""

    name: str
    created_us: int


class Clients:
    """The clients in the database. Each verb is one statement; all raise StoreUnavailable."""

    def __init__(self, database: Database, *, system: System) -> None:
        self._database = database
        self._system = system

    async def add(self, name: str) -> str:
        """Make a client that may follow the revocation feed; returns its credential, which is kept nowhere.

        Raises: ConfigurationError for a name that cannot be used or is taken.
        """
        if not _NAME.fullmatch(name):
            raise ConfigurationError("client: a name is 1 to 64 letters, digits, dots, hyphens and underscores")
        raw = bytes((KIND_FEED,)) + self._system.random(SECRET_BYTES)
        credential = urlsafe_b64encode(raw).decode("ascii")
        rows = await self._database.fetch(
            "insert into {namespace}_clients (name, digest, created_us) values (?, ?, ?) "
            "on conflict (name) do nothing returning name",
            name,
            sha256_text(credential.encode("ascii")),
            self._system.now_us(),
        )
        if not rows:
            raise ConfigurationError(f"client: {name} is taken; remove it first, or choose another name")
        return credential

    async def remove(self, name: str) -> bool:
        """Forget a client; its credential opens nothing from the next request on. False when there was none."""
        rows = await self._database.fetch("delete from {namespace}_clients where name = ? returning name", name)
        return bool(rows)

    async def list(self) -> tuple[Client, ...]:
        """Every client, by name."""
        rows = await self._database.fetch("select name, created_us from {namespace}_clients order by name")
        return tuple(Client(name=str(name), created_us=int(created or 0)) for name, created in rows)

    async def find(self, credential: str) -> Client | None:
        """The client of a credential, whatever text it is."""
        if len(credential) != CREDENTIAL_CHARACTERS or not _SHAPE.fullmatch(credential):
            return None
        if urlsafe_b64decode(credential)[0] != KIND_FEED:
            return None
        # 256 random bits: found by the digest, so how long the look-up takes tells nothing about the credential.
        rows = await self._database.fetch(
            "select name, created_us from {namespace}_clients where digest = ?", sha256_text(credential.encode("ascii"))
        )
        return Client(name=str(rows[0][0]), created_us=int(rows[0][1] or 0)) if rows else None
