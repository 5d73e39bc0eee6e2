"""Apply migrations to a PostgreSQL database.

All that are missing run in one transaction behind an advisory lock: of many deployments that start at once one
applies them and the others find them applied, and a failure leaves the database as it was. Needs a role that may
create tables, types and functions in the first schema of its search path, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from coatcheck.stores.migrations import Migration, create_history, history_table, pending
from coatcheck.stores.postgres.driver import Run


async def missing_postgres(
    run: Run, migrations: Sequence[Migration], *, component: str, namespace: str
) -> tuple[Migration, ...]:
    """What this database still needs; writes nothing. Raises: ConfigurationError (see `migrations.pending`)."""
    table = history_table(namespace)
    ((exists,),) = await run("SELECT to_regclass(%s) IS NOT NULL", (table,))
    if not exists:
        return tuple(migrations)
    rows = await run(f"SELECT number, checksum FROM {table} WHERE component = %s", (component,))  # noqa: S608
    return pending(migrations, {int(number): str(checksum) for number, checksum in rows}, component=component)


async def apply_postgres(
    run: Run, migrations: Sequence[Migration], *, component: str, namespace: str, dry_run: bool = False
) -> tuple[Migration, ...]:
    """Apply what is missing and return it. The connection is in autocommit mode and is closed by the caller.

    `dry_run` runs every statement and rolls back: what it returns would be applied, and can be.
    Raises: ConfigurationError (see `migrations.pending`), and what the driver raises.
    """
    table = history_table(namespace)
    await run("BEGIN")
    await run("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (table,))
    await run(create_history(namespace))
    missing = await missing_postgres(run, migrations, component=component, namespace=namespace)
    for migration in missing:
        for statement in migration.statements(namespace):
            await run(statement)
        await run(
            f"INSERT INTO {table} (component, number, name, checksum, applied_at) "  # noqa: S608
            "VALUES (%s, %s, %s, %s, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)",
            (component, migration.number, migration.name, migration.checksum),
        )
    await run("ROLLBACK" if dry_run else "COMMIT")
    return missing
