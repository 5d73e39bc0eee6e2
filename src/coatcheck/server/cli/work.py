"""The server's parts for the length of one verb.

Decides which parts a verb opens, that a verb never makes a database somebody else has not made, and that a verb whose
trace is missing from the audit log does not end as if all were well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from coatcheck.core.names import UserName, parse_user_name
from coatcheck.errors import ConfigurationError
from coatcheck.server.accounts import User
from coatcheck.server.cli.output import Failed, Refused, talk
from coatcheck.server.service import Service, build
from coatcheck.server.settings import ServerSettings
from coatcheck.server.texts import say
from coatcheck.server.upgrade import embedded_file

T = TypeVar("T")


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run one verb's work. What matters of it is raised; the parts' own logging is for servers."""
    logger = logging.getLogger("coatcheck")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return asyncio.run(work)
    finally:
        logger.setLevel(level)


@asynccontextmanager
async def working(
    settings: ServerSettings, *, sessions: bool = False, passwords: bool = False, make: bool = False
) -> AsyncIterator[Service]:
    """The service with its database, and with sessions and the password hasher where they are needed.

    Without `make` the database must exist: in a wrong directory a list must not look empty.
    Raises: ConfigurationError, StoreUnavailable; Failed when the audit log could not be written.
    """
    file = embedded_file(settings.database_url)
    if not make and file is not None and not file.exists():
        raise ConfigurationError(
            f"database: {file} is not there yet; start `coatcheck serve`, or say where it is with --home or --database"
        )
    if sessions and settings.store_url.lower().startswith("memory:"):
        # This process's memory is not the server's.
        talk("coatcheck: sessions are kept in the server's memory (store memory:), where this command cannot reach")
    service = build(settings)
    try:
        await service.database.open()
        if not service.database.shared:
            await service.database.migrate()
        await service.database.check()
        if sessions:
            await service.coat.start()
        if passwords:
            await service.hasher.open()
        yield service
    finally:
        await service.close()
    if service.audit_dropped:
        raise Failed("it is done, but the audit log could not be written")


def name_of(typed: str) -> UserName:
    """The name somebody typed. Raises: Refused."""
    name = parse_user_name(typed)
    if not isinstance(name, UserName):
        raise Refused(say(f"name.{name.reason}", "en"))
    return name


async def user_of(service: Service, typed: str) -> User:
    """The account of a name. Raises: Failed when there is none."""
    user = await service.accounts.find_by_name(name_of(typed))
    if user is None:
        raise Failed(f"nobody has the name {typed}; `coatcheck user list` shows the names")
    return user
