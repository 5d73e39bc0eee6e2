"""Migrations of a PostgreSQL database: who may, what is refused, and many at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coatcheck.core.ports import (
    Absent,
    Live,
)
from coatcheck.errors import ConfigurationError, MigrationRequired, StoreUnavailable
from coatcheck.stores.conformance import together
from tests.servers.postgres import Postgres
from tests.stores.postgres_desk import Desk, desks, new_session

pytestmark = pytest.mark.servers
ALL = ("0001_sessions", "0002_tokens", "0003_feed", "0004_choice")


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> Iterator[Desk]:
    yield from desks(request.param, postgres, postgres_database)


def test_an_empty_database_is_refused_with_the_command(desk: Desk) -> None:
    with pytest.raises(
        MigrationRequired,
        match=r"0001_sessions, 0002_tokens, 0003_feed, 0004_choice: .*coatcheck migrate --store postgresql://",
    ):
        desk.run(desk.store().open())
    assert desk.run(desk.store().migrate()) == ALL
    desk.run(desk.store().open())
    assert desk.run(desk.store().migrate()) == ()


def test_a_dry_run_says_what_it_would_do_and_does_nothing(desk: Desk) -> None:
    assert desk.run(desk.store().migrate(dry_run=True)) == ALL
    assert desk.sql("SELECT count(*) FROM pg_class WHERE relname LIKE 'coatcheck%%' AND %s", True) == [(0,)]
    with pytest.raises(MigrationRequired):
        desk.run(desk.store().open())


def test_of_many_deployments_at_once_one_migrates(desk: Desk) -> None:
    stores = [desk.store() for _ in range(8)]

    async def work() -> list[tuple[str, ...]]:
        return await together(desk.colour, [each.migrate for each in stores])

    assert sorted(desk.run(work())) == [()] * 7 + [ALL]
    desk.run(stores[0].open())


def test_name_spaces_of_one_database_know_nothing_of_each_other(desk: Desk) -> None:
    one, two = desk.store(namespace="one"), desk.store(namespace="two")
    desk.run(one.migrate())
    with pytest.raises(MigrationRequired):
        desk.run(two.open())
    desk.run(two.migrate())
    new = new_session()
    desk.run(one.create(new))
    assert isinstance(desk.run(two.load(new.ref, new.digest)), Absent)
    desk.run(two.revoke_owner(7, new.owner, reason="logout"))
    assert isinstance(desk.run(one.load(new.ref, new.digest)), Live)


def test_a_changed_or_newer_schema_is_refused(desk: Desk) -> None:
    store = desk.opened()
    desk.sql("UPDATE coatcheck_migrations SET checksum = 'x'")
    with pytest.raises(ConfigurationError, match="another text"):
        desk.run(store.open())
    desk.sql("UPDATE coatcheck_migrations SET number = number + 8")
    with pytest.raises(ConfigurationError, match="newer release"):
        desk.run(store.open())
    with pytest.raises(ConfigurationError, match="newer release"):
        desk.run(store.migrate())


def test_a_role_with_one_schema_of_its_own_is_enough(desk: Desk) -> None:
    role = f"r_{desk.database}"
    desk.sql(f'CREATE ROLE "{role}" LOGIN')
    try:
        url = desk.url.replace("postgres@", f"{role}@")
        # PostgreSQL 15 and later give nobody the right to create in "public".
        desk.sql("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
        with pytest.raises(ConfigurationError, match="CREATE"):
            desk.run(desk.store(url=url).migrate())
        desk.sql(f'CREATE SCHEMA "{role}" AUTHORIZATION "{role}"')
        store = desk.store(url=url)
        assert desk.run(store.migrate()) == ALL
        desk.run(store.open())
        new = new_session()
        desk.run(store.create(new))
        assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
        desk.run(store.close())
    finally:
        desk.sql(f'DROP OWNED BY "{role}"')
        desk.sql(f'DROP ROLE "{role}"')


def test_another_encoding_is_refused(desk: Desk) -> None:
    name = f"l_{desk.database}"
    desk.sql(f"CREATE DATABASE \"{name}\" TEMPLATE template0 ENCODING 'LATIN1' LOCALE 'C'")
    try:
        store = desk.store(url=desk.server.url_of(name))
        with pytest.raises(ConfigurationError, match="LATIN1"):
            desk.run(store.open())
        desk.run(store.close())
    finally:
        desk.server.drop_database(name)


def test_tables_that_vanish_make_the_store_unavailable_not_anonymous(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.sql("ALTER TABLE coatcheck_sessions RENAME TO gone")
    with pytest.raises(StoreUnavailable, match="coatcheck migrate"):
        desk.run(store.load(new.ref, new.digest))
    desk.sql("ALTER TABLE gone RENAME TO coatcheck_sessions")
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
