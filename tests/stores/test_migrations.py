"""Migration files, what a database needs of them, and applying them to SQLite from several processes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from coatcheck.errors import ConfigurationError, MigrationRequired
from coatcheck.stores.migrations import (
    Migration,
    create_history,
    history_table,
    insert_history,
    load_migrations,
    number_migrations,
    pending,
    require_current,
    select_history,
)
from coatcheck.stores.sqlite.migrations import apply_sqlite, missing_sqlite

FIRST = "create table {namespace}_a (x);\n---\ncreate table {namespace}_b (x);\n"
SECOND = "-- why\ninsert into {namespace}_a values ('---; {\"json\": 1}');\n"
TWO = number_migrations({"0001_first.sql": FIRST, "0002_second.sql": SECOND}, source="here")
CHECKSUMS = {each.number: each.checksum for each in TWO}


@pytest.fixture
def connection(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(tmp_path / "m.db", isolation_level=None)) as opened:
        yield opened


def _apply(connection: sqlite3.Connection, migrations: tuple[Migration, ...], **more: bool) -> list[str]:
    done = apply_sqlite(connection, migrations, component="store", namespace="cc", now_us=7, **more)
    return [str(each) for each in done]


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}


def test_a_line_of_three_dashes_is_the_only_separator() -> None:
    assert TWO[0].statements("cc") == ("create table cc_a (x);", "create table cc_b (x);")
    assert TWO[1].statements("cc") == ("-- why\ninsert into cc_a values ('---; {\"json\": 1}');",)


def test_line_ends_of_another_system_are_not_another_migration() -> None:
    other = number_migrations({"0001_first.sql": FIRST.replace("\n", "\r\n")}, source="here")
    assert other == TWO[:1]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("0002_a.sql",), "number 1 is due"),
        (("0001_a.sql", "0003_b.sql"), "number 2 is due"),
        (("0001_a.sql", "0001_b.sql"), "number 2 is due"),
        (("0000_a.sql",), "number 1 is due"),
        (("1_a.sql",), "is not named"),
        (("0001_A.sql",), "is not named"),
        (("0001.sql",), "is not named"),
    ],
)
def test_gaps_duplicates_and_other_names_are_refused(names: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        number_migrations(dict.fromkeys(names, "select 1;"), source="here")


@pytest.mark.parametrize("text", ["", "\n", "-- nothing\n", "select 1;\n---\n", "select 1;\n---\n---\nselect 2;\n"])
def test_a_statement_that_says_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="empty statement"):
        number_migrations({"0001_a.sql": text}, source="here")


def test_pending_are_those_not_applied_in_order() -> None:
    assert pending(TWO, {}) == TWO
    assert pending(TWO, {1: CHECKSUMS[1]}) == TWO[1:]
    assert pending(TWO, CHECKSUMS) == ()


@pytest.mark.parametrize(
    ("applied", "cure"),
    [
        ({**CHECKSUMS, 3: "x"}, "install that release or a later one"),
        ({0: "x"}, "install that release or a later one"),
        ({1: "changed"}, "install the release that applied it"),
        ({2: CHECKSUMS[2]}, "restore it from a backup"),
    ],
)
def test_a_database_that_does_not_fit_is_refused_with_the_cure(applied: dict[int, str], cure: str) -> None:
    with pytest.raises(ConfigurationError, match=cure):
        pending(TWO, applied)


def test_what_is_missing_is_named_with_the_command() -> None:
    require_current(())
    with pytest.raises(MigrationRequired, match=r"0002_second.*coatcheck migrate"):
        require_current(TWO[1:])


def test_the_shipped_migrations_load() -> None:
    shipped = load_migrations("coatcheck.stores", "sqlite")
    assert [each.number for each in shipped] == list(range(1, len(shipped) + 1))
    with pytest.raises(ConfigurationError, match="none for oracle"):
        load_migrations("coatcheck.stores", "oracle")


def test_migrations_are_applied_once_and_remembered(connection: sqlite3.Connection) -> None:
    assert missing_sqlite(connection, TWO, component="store", namespace="cc") == TWO
    assert _apply(connection, TWO[:1]) == ["0001_first"]
    assert missing_sqlite(connection, TWO, component="store", namespace="cc") == TWO[1:]
    assert _apply(connection, TWO) == ["0002_second"]
    assert _apply(connection, TWO) == []
    assert connection.execute("select x from cc_a").fetchall() == [('---; {"json": 1}',)]
    rows = connection.execute(f"select * from {history_table('cc')}").fetchall()
    assert rows == [("store", each.number, each.name, each.checksum, 7) for each in TWO]


def test_components_and_name_spaces_do_not_know_each_other(connection: sqlite3.Connection) -> None:
    _apply(connection, TWO)
    other = number_migrations({"0001_x.sql": "create table {namespace}_x (x);"}, source="there")
    apply_sqlite(connection, other, component="server", namespace="cc", now_us=1)
    apply_sqlite(connection, TWO, component="store", namespace="dd", now_us=1)
    assert _tables(connection) == {"cc_migrations", "cc_a", "cc_b", "cc_x", "dd_migrations", "dd_a", "dd_b"}
    assert missing_sqlite(connection, TWO, component="store", namespace="cc") == ()


def test_a_failing_migration_leaves_nothing(connection: sqlite3.Connection) -> None:
    bad = number_migrations({"0001_a.sql": FIRST, "0002_b.sql": "insert into nowhere values (1);"}, source="here")
    with pytest.raises(sqlite3.OperationalError, match="nowhere"):
        _apply(connection, bad)
    assert not connection.in_transaction
    assert _tables(connection) == set()


def test_a_dry_run_proves_the_statements_and_changes_nothing(connection: sqlite3.Connection) -> None:
    assert _apply(connection, TWO, dry_run=True) == ["0001_first", "0002_second"]
    assert _tables(connection) == set()


def test_a_changed_file_is_noticed_before_anything_runs(connection: sqlite3.Connection) -> None:
    _apply(connection, TWO[:1])
    changed = number_migrations({"0001_first.sql": FIRST + "-- later\n", "0002_second.sql": SECOND}, source="here")
    with pytest.raises(ConfigurationError, match="another text"):
        _apply(connection, changed)
    assert not connection.in_transaction
    assert missing_sqlite(connection, TWO, component="store", namespace="cc") == TWO[1:]


def test_statements_about_the_history_take_the_drivers_mark() -> None:
    assert "%s" in select_history("cc", "%s")
    assert insert_history("cc", "%s").count("%s") == 5
    assert "?" not in insert_history("cc", "%s")
    assert create_history("cc").startswith("create table if not exists cc_migrations")


_OPEN = """
import sys
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import IdKeys
from coatcheck.stores.open import open_store
from coatcheck.system import REAL
store = open_store(sys.argv[1], colour="blocking", deadline=30)
sys.stdin.readline()
run_blocking(store.open())
print(run_blocking(store.id_keys(IdKeys(REAL.random(32), REAL.random(32)))).pack().hex())
print(run_blocking(store.local_key(REAL.random(32))).hex())
"""


def test_processes_that_start_at_once_apply_once_and_share_keys(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'm.db'}"
    running = [
        subprocess.Popen([sys.executable, "-c", _OPEN, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for each in running:
        # All have imported what they need before the first goes; the line is read when it is.
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    answers = {each.communicate(timeout=60)[0] for each in running}
    assert [each.returncode for each in running] == [0, 0, 0, 0]
    assert len(answers) == 1
    with closing(sqlite3.connect(tmp_path / "m.db")) as connection:
        applied = connection.execute("select name from coatcheck_migrations order by number").fetchall()
    assert applied == [(each.name,) for each in load_migrations("coatcheck.stores", "sqlite")]
    assert sorted(each.name for each in tmp_path.iterdir() if "-" not in each.name) == ["m.db", "m.db.key"]
