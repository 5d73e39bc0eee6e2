"""What the tests of the accounts layer share: databases on both dialects, users, the cheapest hash that is allowed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, PasswordPolicy, parse_password
from coatcheck.server.accounts import Accounts, PasswordHash, Role, User
from coatcheck.server.database import open_database
from coatcheck.server.database_port import Database
from coatcheck.system import System
from coatcheck.testing import FakeSystem

T = TypeVar("T")

DIALECTS = [pytest.param("sqlite"), pytest.param("postgres", marks=pytest.mark.servers)]
POLICY = PasswordPolicy()
HASH = PasswordHash("$argon2id$not-a-real-one")


def url_for(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of the dialect the fixture is parametrized with."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'server.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


@asynccontextmanager
async def opened(url: str, *, deadline: float = 30.0, system: System | None = None) -> AsyncIterator[Database]:
    """An open, migrated database. The long deadline keeps a loaded machine out of the result."""
    database = open_database(url, deadline=deadline, system=system or FakeSystem())
    await database.open()
    try:
        await database.migrate()
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def servers(url: str, count: int = 3) -> AsyncIterator[list[Database]]:
    """Several servers on one database."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened(url)) for _ in range(count)]


async def at_once(calls: list[Callable[[], Awaitable[T]]]) -> list[T]:
    """Start all calls before any can end; their answers in order."""
    gate = asyncio.Event()

    async def wait_and_call(call: Callable[[], Awaitable[T]]) -> T:
        await gate.wait()
        return await call()

    tasks = [asyncio.create_task(wait_and_call(call)) for call in calls]
    gate.set()
    return list(await asyncio.gather(*tasks))


def name_of(typed: str) -> UserName:
    """A name that must be acceptable."""
    name = parse_user_name(typed)
    assert isinstance(name, UserName)
    return name


def password_of(typed: str) -> Password:
    """A password that must be acceptable in form."""
    password = parse_password(typed, policy=POLICY)
    assert isinstance(password, Password)
    return password


async def user_of(
    accounts: Accounts, typed: str = "minsu", *, role: Role = "user", password_hash: PasswordHash | None = HASH
) -> User:
    """A new account."""
    user = await accounts.create_user(name_of(typed), role=role, password_hash=password_hash)
    assert isinstance(user, User)
    return user
