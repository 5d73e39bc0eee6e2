"""What the server's own database promises: users, one-time links, audit log.

Not the session store, though both may share a file. A `fetch` is one statement in one transaction, ends within the
deadline, and raises nothing but this package's errors. Rules about accounts must never appear here.
"""

from __future__ import annotations

from typing import Final, Literal, Protocol, TypeAlias

Dialect = Literal["sqlite", "postgres"]
Value: TypeAlias = "str | int | None"
Row: TypeAlias = "tuple[Value, ...]"

PACKAGE: Final = "coatcheck.server"
"""Where the migrations of this database are."""


class Database(Protocol):
    """One open database. Safe for any number of tasks of one event loop."""

    @property
    def dialect(self) -> Dialect:
        """Which SQL it speaks."""
        ...

    @property
    def shared(self) -> bool:
        """Whether servers on other machines may use it too."""
        ...

    async def open(self) -> None:
        """Connect. Safe to call again. Raises: StoreUnavailable, ConfigurationError."""
        ...

    async def close(self) -> None:
        """Let go of every connection and thread, after what was begun has ended. It may be opened again."""
        ...

    async def fetch(self, sql: str, *parameters: Value) -> list[Row]:
        """Run one statement in a transaction of its own and return its rows.

        `?` stands for a parameter and `{namespace}` for the prefix of table names; neither character sequence, nor a
        `%`, may be in the SQL for another purpose. Raises: StoreUnavailable, OutcomeUnknown (a write whose answer
        did not come in time).
        """
        ...

    async def migrate(self, *, dry_run: bool = False) -> tuple[str, ...]:
        """Bring the tables up to this release, all or nothing; returns what was applied (or would be).

        Of several processes at once one applies it and the others find nothing left. Raises: StoreUnavailable,
        ConfigurationError when a newer release wrote the database.
        """
        ...

    async def check(self) -> None:
        """Raises: MigrationRequired while `migrate` has something to do; StoreUnavailable."""
        ...
