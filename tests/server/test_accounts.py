from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from coatcheck.core.names import UserName
from coatcheck.errors import ConfigurationError, MigrationRequired, StoreUnavailable, ValueRefused
from coatcheck.server.accounts import (
    MAX_LISTED,
    Accounts,
    AdministratorExists,
    NameTaken,
    PasswordHash,
    User,
)
from coatcheck.server.database import open_database
from coatcheck.server.database_port import Database
from coatcheck.testing import FakeSystem
from tests.server.account_parts import DIALECTS, HASH, at_once, name_of, opened, servers, url_for, user_of
from tests.servers.postgres import Postgres

ALL = ("0001_accounts", "0002_clients", "0003_audit_subject", "0004_risk_history")
pytestmark = pytest.mark.anyio

START_US = FakeSystem().now_us()
NOBODY = "A" * 22
HOSTILE_IDS = [
    "",
    "A" * 21,
    "A" * 23,
    "A" * 21 + "\n",
    "A" * 21 + "\x00",
    "\ud800" * 22,
    "' or 1=1 --" + "A" * 11,
    "é" * 22,
]


@pytest.fixture(params=DIALECTS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_for(request, tmp_path)


@pytest.fixture
def system() -> FakeSystem:
    return FakeSystem()


@pytest.fixture
async def database(url: str, system: FakeSystem) -> AsyncIterator[Database]:
    async with opened(url, system=system) as database:
        yield database


@pytest.fixture
def accounts(database: Database, system: FakeSystem) -> Accounts:
    return Accounts(database, system=system)


# -- accounts ------------------------------------------------------------------------------------------------------


async def test_a_fresh_installation_has_no_account(accounts: Accounts) -> None:
    assert await accounts.list_users() == ()
    assert not await accounts.has_administrator()


async def test_an_account_is_found_by_any_spelling_of_its_name_and_by_its_id(accounts: Accounts) -> None:
    user = await user_of(accounts, "Zoë@Example.org")
    assert user.name == "Zoë@Example.org"
    assert user.password_hash == HASH
    assert (user.role, user.failures, user.created_us, user.password_changed_us) == ("user", 0, START_US, START_US)
    assert len(user.id) == 22
    assert not user.is_disabled
    for typed in ("zoë@example.org", " ZOE\u0308@EXAMPLE.ORG "):
        assert await accounts.find_by_name(name_of(typed)) == user
    assert await accounts.get(user.id) == user
    assert await accounts.find_by_name(name_of("zoe@example.org")) is None


async def test_an_account_may_be_made_without_a_password(accounts: Accounts) -> None:
    user = await user_of(accounts, password_hash=None)
    assert user.password_hash is None
    assert user.password_changed_us is None


async def test_a_name_that_reads_the_same_is_taken(accounts: Accounts) -> None:
    await user_of(accounts, "minsu")
    assert await accounts.create_user(name_of("ＭＩＮＳＵ"), role="user", password_hash=HASH) == NameTaken()
    assert len(await accounts.list_users()) == 1


async def test_of_fifty_who_want_one_name_exactly_one_gets_it(url: str) -> None:
    async with servers(url) as databases:
        # Their own systems, each with another seed: two servers never draw the same id.
        people = [Accounts(each, system=FakeSystem(seed=bytes([n]))) for n, each in enumerate(databases)]
        made = await at_once(
            [partial(people[n % 3].create_user, name_of("minsu"), role="user", password_hash=HASH) for n in range(50)]
        )
        winners = [each for each in made if isinstance(each, User)]
        assert len(winners) == 1
        assert await people[0].list_users() == (winners[0],)


async def test_of_fifty_who_want_to_be_the_first_administrator_exactly_one_is(url: str) -> None:
    async with servers(url) as databases:
        people = [Accounts(each, system=FakeSystem(seed=bytes([n]))) for n, each in enumerate(databases)]
        made = await at_once(
            [
                partial(people[n % 3].create_first_administrator, name_of(f"admin{n}"), password_hash=HASH)
                for n in range(50)
            ]
        )
        winners = [each for each in made if isinstance(each, User)]
        assert len(winners) == 1
        assert winners[0].role == "admin"
        assert made.count(AdministratorExists()) == 49
        assert await people[0].list_users() == (winners[0],)


@pytest.mark.servers
async def test_who_cannot_see_the_first_administrator_yet_waits_for_it(postgres_database: str) -> None:
    # Both statements see no administrator, because neither has committed: only the unique first_admin decides.
    async with opened(postgres_database) as database:
        accounts = Accounts(database)
        async with await psycopg.AsyncConnection.connect(postgres_database) as first:
            await first.execute(
                "insert into coatcheck_users (id, name, name_key, role, created_us, first_admin) "
                "values ('first', 'first', 'first', 'admin', 0, 1)"
            )
            second = asyncio.create_task(accounts.create_first_administrator(name_of("second"), password_hash=HASH))
            waiting = "select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'"
            while not second.done() and not await database.fetch(waiting):
                pass
            await first.commit()
        assert await second == AdministratorExists()
        assert len(await accounts.list_users()) == 1


async def test_no_first_administrator_beside_one_from_the_command_line(accounts: Accounts) -> None:
    admin = await user_of(accounts, "root", role="admin")
    assert await accounts.has_administrator()
    made = await accounts.create_first_administrator(name_of("mallory"), password_hash=HASH)
    assert made == AdministratorExists()
    # A disabled administrator does not open the set-up again.
    await accounts.disable(admin.id)
    assert await accounts.has_administrator()
    assert await accounts.create_first_administrator(name_of("mallory"), password_hash=HASH) == AdministratorExists()


async def test_the_first_administrator_needs_a_free_name(accounts: Accounts) -> None:
    await user_of(accounts, "minsu")
    assert await accounts.create_first_administrator(name_of("Minsu"), password_hash=HASH) == NameTaken()
    assert not await accounts.has_administrator()
    assert isinstance(await accounts.create_first_administrator(name_of("root"), password_hash=HASH), User)


async def test_disabling_keeps_the_first_time_and_enabling_undoes_it(accounts: Accounts, system: FakeSystem) -> None:
    user = await user_of(accounts)
    system.advance(10)
    disabled = await accounts.disable(user.id)
    system.advance(10)
    again = await accounts.disable(user.id)
    assert disabled is not None
    assert disabled.disabled_us == START_US + 10_000_000
    assert disabled.is_disabled
    assert again == disabled
    assert await accounts.enable(user.id) == user


async def test_a_new_password_is_dated_and_forgets_failures(accounts: Accounts, system: FakeSystem) -> None:
    user = await user_of(accounts)
    await accounts.count_failure(user)
    system.advance(5)
    changed = await accounts.set_password(user.id, PasswordHash("new"))
    assert changed is not None
    assert (changed.password_hash, changed.failures) == (PasswordHash("new"), 0)
    assert changed.password_changed_us == START_US + 5_000_000


async def test_a_proof_of_the_old_password_overwrites_no_newer_one(accounts: Accounts) -> None:
    user = await user_of(accounts)
    await accounts.set_password(user.id, PasswordHash("set by an administrator"))
    assert await accounts.set_password(user.id, PasswordHash("late"), expected=HASH) is None
    assert not await accounts.replace_hash(user.id, old=HASH, new=PasswordHash("rehashed old password"))
    stored = await accounts.get(user.id)
    assert stored is not None
    assert stored.password_hash == PasswordHash("set by an administrator")


async def test_a_rehash_is_no_change_of_password(accounts: Accounts, system: FakeSystem) -> None:
    user = await user_of(accounts)
    system.advance(5)
    assert await accounts.replace_hash(user.id, old=HASH, new=PasswordHash("stronger"))
    stored = await accounts.get(user.id)
    assert stored is not None
    assert stored.password_hash == PasswordHash("stronger")
    assert stored.password_changed_us == user.password_changed_us


async def test_of_fifty_changes_that_prove_one_password_exactly_one_counts(url: str) -> None:
    async with servers(url) as databases:
        people = [Accounts(each) for each in databases]
        user = await user_of(people[0])
        made = await at_once(
            [partial(people[n % 3].set_password, user.id, PasswordHash(f"new {n}"), expected=HASH) for n in range(50)]
        )
        assert sum(each is not None for each in made) == 1


async def test_parallel_attempts_get_different_numbers(url: str) -> None:
    # What makes the limit of consecutive failures exact: no two attempts see the same count (CVE-2024-4629).
    async with servers(url) as databases:
        people = [Accounts(each) for each in databases]
        user = await user_of(people[0])
        numbers = await at_once([partial(people[n % 3].count_failure, user) for n in range(50)])
        assert sorted(numbers) == list(range(1, 51))


async def test_failures_are_taken_back_and_cleared_but_never_below_zero(accounts: Accounts) -> None:
    user = await user_of(accounts)
    other = await user_of(accounts, "other")
    for _ in range(3):
        await accounts.count_failure(user)
    await accounts.count_failure(other)
    await accounts.uncount_failure(user)
    assert await accounts.count_failure(user) == 3
    cleared = await accounts.clear_failures(user.id)
    assert cleared is not None
    assert cleared.failures == 0
    await accounts.uncount_failure(user)
    assert await accounts.count_failure(user) == 1
    assert await accounts.count_failure(other) == 2


async def test_an_account_that_does_not_exist_costs_the_same_write(accounts: Accounts, database: Database) -> None:
    assert [await accounts.count_failure(None) for _ in range(3)] == [0, 0, 0]
    await accounts.uncount_failure(None)
    assert await database.fetch("select failures from {namespace}_nobody") == [(3,)]


async def test_users_are_listed_in_pages_in_the_order_of_their_keys(accounts: Accounts) -> None:
    names = ["Bea", "anna", "Zoë", "carl", "ㄱ김", "émile", "dora"]
    for name in names:
        await user_of(accounts, name)
    seen: list[User] = []
    after: str | None = None
    while page := await accounts.list_users(after=after, limit=3):
        seen += page
        after = page[-1].name_key
    # By code point on both databases, whatever locale they were made with.
    assert [user.name_key for user in seen] == sorted(name_of(name).key for name in names)


@pytest.mark.parametrize("limit", [0, -1, MAX_LISTED + 1])
async def test_a_page_has_one_to_a_thousand(accounts: Accounts, limit: int) -> None:
    with pytest.raises(ValueRefused):
        await accounts.list_users(limit=limit)


@pytest.mark.parametrize("after", ["\x00", "\ud800", "a\nb", "a" * 129])
async def test_a_cursor_nobody_gave_is_refused(accounts: Accounts, after: str) -> None:
    with pytest.raises(ValueRefused):
        await accounts.list_users(after=after)


@pytest.mark.parametrize("user_id", [*HOSTILE_IDS, NOBODY])
async def test_an_id_of_nobody_changes_nothing(accounts: Accounts, user_id: str) -> None:
    user = await user_of(accounts)
    assert await accounts.get(user_id) is None
    assert await accounts.disable(user_id) is None
    assert await accounts.enable(user_id) is None
    assert await accounts.clear_failures(user_id) is None
    assert await accounts.set_password(user_id, PasswordHash("x")) is None
    assert await accounts.set_password(user_id, PasswordHash("x"), expected=HASH) is None
    assert not await accounts.replace_hash(user_id, old=HASH, new=PasswordHash("x"))
    assert await accounts.list_users() == (user,)


async def test_a_name_with_sql_in_it_is_only_a_name(accounts: Accounts) -> None:
    typed = "x');drop\u2044table--%s?{namespace}%"
    user = await user_of(accounts, typed)
    assert user.name == typed
    assert await accounts.find_by_name(name_of(typed)) == user


async def test_a_row_of_another_shape_is_an_error_of_ours(accounts: Accounts, database: Database) -> None:
    user = await user_of(accounts)
    if database.dialect == "sqlite":
        await database.fetch("update {namespace}_users set created_us = 'yesterday' where id = ? returning id", user.id)
        with pytest.raises(StoreUnavailable, match="not what this release writes"):
            await accounts.get(user.id)


async def test_a_user_is_shown_without_the_hash(accounts: Accounts) -> None:
    assert "argon2" not in repr(await user_of(accounts))


# -- the database --------------------------------------------------------------------------------------------------


async def test_an_empty_database_asks_for_migration_and_says_what_it_would_do(url: str) -> None:
    database = open_database(url, deadline=30, system=FakeSystem())
    await database.open()
    try:
        with pytest.raises(MigrationRequired, match="0001_accounts"):
            await database.check()
        assert await database.migrate(dry_run=True) == ALL
        with pytest.raises(MigrationRequired):
            await database.check()
        assert await database.migrate() == ALL
        assert await database.migrate() == ()
        await database.check()
    finally:
        await database.close()


async def test_of_servers_that_migrate_at_once_one_does_it(url: str) -> None:
    databases = [open_database(url, deadline=30) for _ in range(5)]
    try:
        await at_once([each.open for each in databases])
        done = await at_once([each.migrate for each in databases])
        assert sorted(done) == [(), (), (), (), ALL]
    finally:
        for each in databases:
            await each.close()


async def test_a_database_of_a_newer_release_is_refused(database: Database) -> None:
    await database.fetch("insert into {namespace}_migrations values ('server', 999, 'later', 'x', 0)")
    with pytest.raises(ConfigurationError, match="newer release"):
        await database.check()
    with pytest.raises(ConfigurationError, match="newer release"):
        await database.migrate()


async def test_two_name_spaces_share_a_database_without_meeting(url: str, accounts: Accounts) -> None:
    await user_of(accounts)
    other = open_database(url, deadline=30, namespace="other")
    await other.open()
    try:
        await other.migrate()
        assert await Accounts(other).list_users() == ()
    finally:
        await other.close()


async def test_a_failed_statement_changes_nothing_and_leaves_the_database_usable(
    accounts: Accounts, database: Database
) -> None:
    user = await user_of(accounts)
    with pytest.raises(StoreUnavailable) as caught:
        await database.fetch("update {namespace}_users set role = 'god'")
    assert caught.value.__cause__ is not None
    assert HASH.text not in caught.value.detail
    with pytest.raises(StoreUnavailable):
        await database.fetch("no such statement")
    assert await accounts.list_users() == (user,)


async def test_a_closed_database_answers_nothing_and_opens_again(accounts: Accounts, database: Database) -> None:
    user = await user_of(accounts)
    await database.close()
    await database.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        await accounts.list_users()
    await database.open()
    await database.open()
    assert await accounts.list_users() == (user,)


async def test_a_second_release_of_python_sees_the_key_the_first_one_wrote(accounts: Accounts) -> None:
    # The key is stored, so the normalisation is a format: these must never change.
    user = await user_of(accounts, "Straße_Ⅷ@EXAMPLE.org")
    assert user.name_key == "strasse_viii@example.org"
    assert await accounts.find_by_name(UserName(shown="", key="strasse_viii@example.org")) == user


@pytest.mark.parametrize(
    "url",
    [
        "",
        "users.db",
        "mysql://user:hunter2@host/db",
        "sqlite:",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://host/path.db",
        "sqlite:///a.db?mode=rw",
        "postgresql://user:hunter2@host:port/db",
    ],
)
async def test_a_url_that_cannot_be_used_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_database(url)
    assert "hunter2" not in str(caught.value)
    assert "store:" not in str(caught.value)


@pytest.mark.parametrize("deadline", [0, -1, 61])
async def test_a_deadline_is_bounded(deadline: float) -> None:
    with pytest.raises(ConfigurationError, match="deadline"):
        open_database("sqlite:///x.db", deadline=deadline)


async def test_a_name_space_is_a_plain_word() -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        open_database("sqlite:///x.db", namespace="x; drop table users")


async def test_the_file_and_its_log_are_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "server.db"
    async with opened(f"sqlite:///{path}") as database:
        await user_of(Accounts(database))
        for name in ("server.db", "server.db-wal", "server.db-shm"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name


async def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    database = open_database(f"sqlite:///{tmp_path}/absent/server.db")
    with pytest.raises(ConfigurationError, match="absent"):
        await database.open()
    with pytest.raises(StoreUnavailable, match="not open"):
        await database.check()


async def test_a_file_that_is_no_database_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "server.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(StoreUnavailable, match="not a database"):
        async with opened(f"sqlite:///{tmp_path}/server.db"):
            pass


async def test_a_locked_file_ends_at_the_deadline(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/server.db"
    async with opened(url) as holder, opened(url, deadline=0.05) as waiting:
        await holder.fetch("begin immediate")
        with pytest.raises(StoreUnavailable):
            await waiting.fetch("insert into {namespace}_audit (at_us, type, envelope) values (0, 'x', '{}')")
        await holder.fetch("rollback")


@pytest.mark.servers
async def test_a_frozen_server_ends_at_the_deadline_and_answers_nobody_else_later(postgres: Postgres) -> None:
    with postgres.database() as url:
        async with opened(url, deadline=2.0) as database:
            accounts = Accounts(database)
            user = await user_of(accounts)
            postgres.freeze()
            with pytest.raises(StoreUnavailable, match="did not answer within"):
                await accounts.list_users()
            postgres.thaw()
            assert await accounts.list_users() == (user,)


@pytest.mark.servers
async def test_a_server_that_is_away_is_unavailable_and_tells_no_password(postgres: Postgres) -> None:
    with postgres.database() as url:
        secret_url = url.replace("postgres@", "postgres:hunter2@")
        postgres.kill()
        database = open_database(secret_url, deadline=0.5)
        with pytest.raises(StoreUnavailable) as caught:
            await database.open()
        assert "hunter2" not in str(caught.value)
        assert "127.0.0.1" in str(caught.value)
        postgres.ensure_running()
        await database.open()
        await database.close()


@pytest.mark.servers
async def test_a_cancelled_caller_takes_its_connection_along(postgres: Postgres) -> None:
    # CVE-2023-28858: the answer of a cancelled command stayed on a pooled connection and went to the next user.
    with postgres.database() as url:
        async with opened(url) as database:
            for number in range(20):
                task = asyncio.create_task(database.fetch("select 'late', pg_sleep(10)"))
                for _ in range(number):
                    await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert await database.fetch("select ?::bigint", number) == [(number,)]
