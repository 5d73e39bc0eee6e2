"""The people who may sign in: who they are, and how often in a row they failed.

Decides what an account consists of and makes each change one statement, so that two servers cannot undo each other's.
An account's `id` is the subject of its sessions; names may be shown, ids decide. It hashes no password and ends no
session: whoever disables an account or changes a password revokes its sessions too.
"""

# ruff: noqa: S608 - the parts of a statement are constants of this file; every value is a parameter

from __future__ import annotations

from base64 import urlsafe_b64encode
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from coatcheck.core.names import MAX_NAME_CHARACTERS, UserName
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.server.database_port import Database, Row
from coatcheck.system import REAL, System

Role = Literal["admin", "user"]

MAX_LISTED: Final = 1000
_ID_BYTES: Final = 16


@dataclass(frozen=True, slots=True, repr=False)
class PasswordHash:
    """The stored form of a password, with its salt and parameters. Never shown."""

    text: str

    def __repr__(self) -> str:
        return "PasswordHash(redacted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """One account, as of when it was read. Times are Unix microseconds by the server's clock.

    `id` is the session subject. `failures` counts sign-ins in a row that did not succeed, those under way included.
    """

    id: str
    name: str
    name_key: str
    role: Role
    password_hash: PasswordHash | None
    failures: int
    created_us: int
    password_changed_us: int | None
    disabled_us: int | None

    @property
    def is_disabled(self) -> bool:
        """Whether nobody may sign in to it."""
        return self.disabled_us is not None


@dataclass(frozen=True, slots=True)
class NameTaken:
    """Somebody has this name, or one that reads the same; nothing was written."""


@dataclass(frozen=True, slots=True)
class AdministratorExists:
    """There is an administrator already; nothing was written."""


CreatedUser: TypeAlias = "User | NameTaken"
CreatedAdministrator: TypeAlias = "User | NameTaken | AdministratorExists"


class Accounts:
    """The verbs on accounts. Each is atomic; any number of servers may call them at once.

    All raise StoreUnavailable.
    """

    def __init__(self, database: Database, *, system: System = REAL) -> None:
        self._database = database
        self._system = system

    async def create_user(self, name: UserName, *, role: Role, password_hash: PasswordHash | None) -> CreatedUser:
        """Make an account that must be new; of simultaneous calls with one name exactly one makes it.

        Without a hash nobody can sign in to it by password.
        """
        now_us = self._system.now_us()
        rows = await self._database.fetch(
            f"insert into {{namespace}}_users ({_WRITTEN}) values (?, ?, ?, ?, ?, ?, ?) "
            f"on conflict do nothing returning {_COLUMNS}",
            *self._new(name, role, password_hash, now_us),
        )
        return _user(rows[0]) if rows else NameTaken()

    async def create_first_administrator(self, name: UserName, *, password_hash: PasswordHash) -> CreatedAdministrator:
        """Make an administrator, only while there is none (a disabled one counts); exact under concurrency."""
        now_us = self._system.now_us()
        # Two statements that both see no administrator meet again at the unique first_admin: the second writes nothing.
        rows = await self._database.fetch(
            f"insert into {{namespace}}_users ({_WRITTEN}, first_admin) select ?, ?, ?, ?, ?, ?, ?, 1 "
            "where not exists (select 1 from {namespace}_users where role = 'admin') "
            f"on conflict do nothing returning {_COLUMNS}",
            *self._new(name, "admin", password_hash, now_us),
        )
        if rows:
            return _user(rows[0])
        return AdministratorExists() if await self.has_administrator() else NameTaken()

    async def has_administrator(self) -> bool:
        """Whether any administrator exists, disabled or not: the set-up link works only until then."""
        return bool(await self._database.fetch("select 1 from {namespace}_users where role = 'admin' limit 1"))

    async def has_active_administrator(self) -> bool:
        """Whether any administrator can sign in: with a password and not disabled."""
        return bool(
            await self._database.fetch(
                "select 1 from {namespace}_users where role = 'admin' and disabled_us is null "
                "and password_hash is not null limit 1"
            )
        )

    async def find_by_name(self, name: UserName) -> User | None:
        """The account of a name, whatever its spelling was when it was made."""
        return await self._one(f"select {_COLUMNS} from {{namespace}}_users where name_key = ?", name.key)

    async def get(self, user_id: str) -> User | None:
        """The account of an id; `None` for any text that is none."""
        return await self._one(f"select {_COLUMNS} from {{namespace}}_users where id = ?", user_id)

    async def list_users(self, *, after: str | None = None, limit: int = 100) -> tuple[User, ...]:
        """Accounts in the order of their name keys, from the one behind `after` (the last `name_key` seen).

        Raises: ValueRefused for a cursor that no list gave, or a limit outside 1 to `MAX_LISTED`.
        """
        if not 1 <= limit <= MAX_LISTED:
            raise ValueRefused(f"limit: 1 to {MAX_LISTED}")
        if after is not None and (len(after) > MAX_NAME_CHARACTERS or not after.isprintable()):
            raise ValueRefused("after: not a cursor of this list")
        rows = await self._database.fetch(
            f"select {_COLUMNS} from {{namespace}}_users where name_key > ? order by name_key limit ?",
            after or "",
            limit,
        )
        return tuple(map(_user, rows))

    async def disable(self, user_id: str) -> User | None:
        """Let nobody sign in to this account; the first time stays. The caller ends its sessions afterwards."""
        return await self._one(
            f"update {{namespace}}_users set disabled_us = coalesce(disabled_us, ?) where id = ? returning {_COLUMNS}",
            self._system.now_us(),
            user_id,
        )

    async def enable(self, user_id: str) -> User | None:
        """Let a disabled account sign in again."""
        return await self._one(
            f"update {{namespace}}_users set disabled_us = null where id = ? returning {_COLUMNS}", user_id
        )

    async def set_password(
        self, user_id: str, password_hash: PasswordHash, *, expected: PasswordHash | None = None
    ) -> User | None:
        """Give an account a new password and forget its failures.

        With `expected`, only while that hash is still the stored one: somebody who proved the old password must not
        overwrite what an administrator set in between. `None`: no such account, or another hash by now. The caller
        ends the account's other sessions.
        """
        now_us = self._system.now_us()
        change = "update {namespace}_users set password_hash = ?, password_changed_us = ?, failures = 0 where id = ?"
        if expected is None:
            return await self._one(f"{change} returning {_COLUMNS}", password_hash.text, now_us, user_id)
        return await self._one(
            f"{change} and password_hash = ? returning {_COLUMNS}",
            password_hash.text,
            now_us,
            user_id,
            expected.text,
        )

    async def replace_hash(self, user_id: str, *, old: PasswordHash, new: PasswordHash) -> bool:
        """Store the same password under newer parameters, unless it was changed meanwhile."""
        kept = await self._one(
            f"update {{namespace}}_users set password_hash = ? where id = ? and password_hash = ? returning {_COLUMNS}",
            new.text,
            user_id,
            old.text,
        )
        return kept is not None

    async def count_failure(self, user: User | None) -> int:
        """Count an attempt as failed *before* its password is checked; returns the number it has in the row.

        Counting first makes the limit exact: parallel attempts get different numbers. An account that does not exist
        costs the same write, or the time would tell it from one that does; its number is 0.
        """
        if user is None:
            await self._database.fetch("update {namespace}_nobody set failures = failures + 1 returning failures")
            return 0
        rows = await self._database.fetch(
            "update {namespace}_users set failures = failures + 1 where id = ? returning failures", user.id
        )
        return int(rows[0][0] or 0) if rows else 0

    async def uncount_failure(self, user: User | None) -> None:
        """Take one counted attempt back: it was not judged (the hashing queue was full)."""
        if user is not None:
            await self._database.fetch(
                "update {namespace}_users set failures = failures - 1 where id = ? and failures > 0 returning id",
                user.id,
            )

    async def clear_failures(self, user_id: str) -> User | None:
        """Forget the failures: after a success, or when an administrator unlocks the account."""
        return await self._one(
            f"update {{namespace}}_users set failures = 0 where id = ? returning {_COLUMNS}", user_id
        )

    async def _one(self, sql: str, *parameters: str | int) -> User | None:
        """The account a statement returns, if any; every text among the parameters may have come from outside."""
        # A NUL or a lone surrogate would be an error in one driver and a miss in another.
        if any(isinstance(each, str) and not each.isprintable() for each in parameters):
            return None
        return _first(await self._database.fetch(sql, *parameters))

    def _new(
        self, name: UserName, role: Role, password_hash: PasswordHash | None, now_us: int
    ) -> tuple[str | int | None, ...]:
        user_id = urlsafe_b64encode(self._system.random(_ID_BYTES))[:22].decode("ascii")
        stored = None if password_hash is None else password_hash.text
        return (user_id, name.shown, name.key, role, stored, now_us, None if stored is None else now_us)


_WRITTEN: Final = "id, name, name_key, role, password_hash, created_us, password_changed_us"
_COLUMNS: Final = "id, name, name_key, role, password_hash, failures, created_us, password_changed_us, disabled_us"


def _first(rows: list[Row]) -> User | None:
    return _user(rows[0]) if rows else None


def _user(row: Row) -> User:
    match row:
        case (
            str(user_id),
            str(name),
            str(name_key),
            ("admin" | "user") as role,
            str() | None as stored,
            int(failures),
            int(created_us),
            int() | None as password_changed_us,
            int() | None as disabled_us,
        ):
            return User(
                id=user_id,
                name=name,
                name_key=name_key,
                role=role,
                password_hash=None if stored is None else PasswordHash(stored),
                failures=failures,
                created_us=created_us,
                password_changed_us=password_changed_us,
                disabled_us=disabled_us,
            )
        case _:
            raise StoreUnavailable("database: a row of the users table is not what this release writes")
