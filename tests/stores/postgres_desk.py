"""What the tests of the PostgreSQL store share: one database in one colour, and sessions to put there."""

from __future__ import annotations

import asyncio
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    Changes,
    Colour,
    RecordLimits,
)
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.stores.conformance import Clock
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres import PostgresStore
from coatcheck.system import REAL
from tests.servers.postgres import Postgres

WIDE = RecordLimits(octets=1 << 20, fields=1000)
HOUR_US = 3600 * SECOND_US
DAY_US = 24 * HOUR_US
SHORT = 0.6
"""A deadline for tests that wait for it."""
SLACK = 1.5
"""What a busy machine may add to a deadline before a test calls it missed."""


@dataclass(kw_only=True)
class Desk:
    """One empty database and a way to run coroutines over it, in one colour."""

    colour: Colour
    server: Postgres
    url: str
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    clock: Clock = field(default_factory=Clock)
    stores: list[PostgresStore] = field(default_factory=list)

    def store(self, *, deadline: float = 20.0, url: str | None = None, namespace: str = "coatcheck") -> PostgresStore:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=REAL,
            namespace=namespace,
            deadline=deadline,
            clock_offset_us=self.clock,
        )
        made = PostgresStore(self.url if url is None else url, options)
        self.stores.append(made)
        return made

    def opened(self, *, deadline: float = 20.0, url: str | None = None) -> PostgresStore:
        self.run(self.store().migrate())
        store = self.store(deadline=deadline, url=url)
        self.run(store.open())
        return store

    def call(self, verb: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        return self.run(verb())

    def sql(self, statement: str, *values: object) -> list[Any]:
        """What an administrator's shell does to the database beside the store."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    @property
    def database(self) -> str:
        return self.url.rpartition("/")[2]


def desks(colour: Colour, server: Postgres, url: str) -> Iterator[Desk]:
    """The body of a `desk` fixture: one desk, whose stores are closed afterwards."""
    if colour == "blocking":
        desk = Desk(colour=colour, server=server, url=url, run=run_blocking)
        yield desk
        for store in desk.stores:
            run_blocking(store.close())
        return
    with asyncio.Runner() as runner:
        desk = Desk(colour=colour, server=server, url=url, run=runner.run)
        yield desk
        for store in desk.stores:
            runner.run(store.close())


def new_session(number: int = 0, *, tag: int = 7, owner: str = "o" * 43, **more: Any) -> NewSession:
    values: dict[str, Any] = {
        "ref": SessionRef(tag, urlsafe_b64encode(number.to_bytes(12, "big")).decode()),
        "digest": f"digest-of-session-number-{number:018d}",
        "owner": owner,
        "subject": "subject-text",
        "idle_us": HOUR_US,
        "absolute_us": 30 * DAY_US,
        "authority": '{"tenant":"authority-text"}',
        "fields": {"cart": '"field-text"'},
    }
    return NewSession(**{**values, **more})


def commit(store: PostgresStore, new: NewSession, name: str = "a") -> Coroutine[Any, Any, Any]:
    return store.commit(new.ref, Changes(put={name: "1"}), limits=WIDE)


def within(seconds: float, call: Callable[[], object]) -> None:
    began = time.monotonic()
    call()
    assert time.monotonic() - began < seconds
