"""Apply migrations to a SQLite database.

All that are missing run in one immediate transaction: of many processes that start at once one applies them and the
others find them applied, and a failure leaves the database as it was. It must never run outside such a transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from coatcheck.stores.migrations import (
    Migration,
    create_history,
    history_table,
    insert_history,
    pending,
    select_history,
)

_HAS_HISTORY: Final = "select 1 from sqlite_master where type = 'table' and name = ?"


def missing_sqlite(
    connection: sqlite3.Connection, migrations: Sequence[Migration], *, component: str, namespace: str
) -> tuple[Migration, ...]:
    """What this database still needs; writes nothing. Raises: ConfigurationError (see `migrations.pending`)."""
    if not connection.execute(_HAS_HISTORY, (history_table(namespace),)).fetchall():
        return tuple(migrations)
    rows = connection.execute(select_history(namespace, "?"), (component,))
    return pending(
        migrations, {int(number): _text(checksum) for number, checksum in rows.fetchall()}, component=component
    )


def apply_sqlite(
    connection: sqlite3.Connection,
    migrations: Sequence[Migration],
    *,
    component: str,
    namespace: str,
    now_us: int,
    dry_run: bool = False,
) -> tuple[Migration, ...]:
    """Apply what is missing and return it. The connection is in autocommit mode and in no transaction.

    `dry_run` runs every statement and rolls back: what it returns would be applied, and can be.
    Raises: ConfigurationError (see `migrations.pending`), sqlite3.Error.
    """
    connection.execute("begin immediate")
    try:
        connection.execute(create_history(namespace))
        missing = missing_sqlite(connection, migrations, component=component, namespace=namespace)
        for migration in missing:
            for statement in migration.statements(namespace):
                connection.execute(statement)
            connection.execute(
                insert_history(namespace, "?"),
                (component, migration.number, migration.name, migration.checksum, now_us),
            )
        connection.execute("rollback" if dry_run else "commit")
    except BaseException:
        if connection.in_transaction:
            connection.execute("rollback")
        raise
    return missing


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
