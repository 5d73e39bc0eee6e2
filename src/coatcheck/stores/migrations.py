"""Numbered SQL files, and which of them a database still needs.

Decides the form of a migration file, how its statements are kept apart, and when a database and this release do not
fit together. Shared by both SQL stores and by the server's own tables; a dialect's module runs what is decided here.
It must never touch a database, and a file that was released must never be changed: its checksum is remembered.

A file is `schema/<dialect>/NNNN_name.sql` inside a package, numbered from 1 without gaps. A line that is exactly
`---` stands between two statements, and nothing else separates them: a semicolon may stand in a text, a trigger or
a function body. Each statement ends with a semicolon all the same, so that the file also runs in the database's
shell. `{namespace}` is replaced by the store's name space, which `StoreOptions` has checked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from typing import Final

from coatcheck.errors import ConfigurationError, MigrationRequired

COMPONENT_STORE: Final = "store"
COMPONENT_SERVER: Final = "server"

_FILE_NAME: Final = re.compile(r"([0-9]{4})_([a-z0-9_]+)\.sql")
_SEPARATOR: Final = "---"
_NAMESPACE: Final = "{namespace}"
_HISTORY: Final = "{namespace}_migrations"
_CREATE_HISTORY: Final = (
    "create table if not exists {namespace}_migrations (component text not null, number bigint not null, "
    "name text not null, checksum text not null, applied_at bigint not null, primary key (component, number))"
)
_SELECT_HISTORY: Final = "select number, checksum from {namespace}_migrations where component = ?"
_INSERT_HISTORY: Final = (
    "insert into {namespace}_migrations (component, number, name, checksum, applied_at) values (?, ?, ?, ?, ?)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Migration:
    """One released step of a schema. `checksum` is the SHA-256 of its text with line feeds, in hexadecimal."""

    number: int
    name: str
    sql: str
    checksum: str

    def __str__(self) -> str:
        return f"{self.number:04d}_{self.name}"

    def statements(self, namespace: str) -> tuple[str, ...]:
        """The statements in order, for this name space; each is one statement for a driver that takes only one."""
        parts: list[list[str]] = [[]]
        for line in self.sql.split("\n"):
            if line.rstrip() == _SEPARATOR:
                parts.append([])
            else:
                parts[-1].append(line)
        return tuple("\n".join(part).strip().replace(_NAMESPACE, namespace) for part in parts)


def history_table(namespace: str) -> str:
    """Name of the table that remembers what was applied."""
    return _HISTORY.replace(_NAMESPACE, namespace)


def create_history(namespace: str) -> str:
    """The statement that makes that table where there is none; the same in both dialects."""
    return _CREATE_HISTORY.replace(_NAMESPACE, namespace)


def select_history(namespace: str, mark: str) -> str:
    """Read number and checksum of what was applied to one component. `mark` is the driver's mark for a value."""
    return _SELECT_HISTORY.replace(_NAMESPACE, namespace).replace("?", mark)


def insert_history(namespace: str, mark: str) -> str:
    """Remember component, number, name, checksum and Unix microseconds. `mark` is the driver's mark for a value."""
    return _INSERT_HISTORY.replace(_NAMESPACE, namespace).replace("?", mark)


def load_migrations(package: str, dialect: str) -> tuple[Migration, ...]:
    """Read the migrations a package ships for a dialect, in order.

    Raises: ConfigurationError for a missing folder, a gap, a duplicate or a name of another form.
    """
    folder = files(package).joinpath("schema", dialect)
    if not folder.is_dir():
        raise ConfigurationError(f"migrations: {package} has none for {dialect}; the installation is incomplete")
    texts = {entry.name: entry.read_text(encoding="utf-8") for entry in folder.iterdir() if entry.name.endswith(".sql")}
    return number_migrations(texts, source=f"{package}/schema/{dialect}")


def number_migrations(texts: Mapping[str, str], *, source: str) -> tuple[Migration, ...]:
    """Order migration texts by file name, and check that they are a whole. `source` is named in errors.

    Raises: ConfigurationError for a gap, a duplicate, an empty statement or a name of another form.
    """
    found: list[Migration] = []
    for file_name in sorted(texts):
        parts = _FILE_NAME.fullmatch(file_name)
        if parts is None:
            raise ConfigurationError(f"migrations: {source}/{file_name} is not named NNNN_name.sql")
        # A checkout on Windows may have other line ends; that is not another migration.
        text = texts[file_name].replace("\r\n", "\n")
        migration = Migration(number=int(parts[1]), name=parts[2], sql=text, checksum=sha256(text.encode()).hexdigest())
        if migration.number != len(found) + 1:
            raise ConfigurationError(
                f"migrations: {source} has {migration} where number {len(found) + 1} is due (a gap or a duplicate)"
            )
        if not all(_says_something(statement) for statement in migration.statements("x")):
            raise ConfigurationError(f"migrations: {source}/{file_name} has an empty statement")
        found.append(migration)
    return tuple(found)


def pending(
    known: Sequence[Migration], applied: Mapping[int, str], *, component: str = COMPONENT_STORE
) -> tuple[Migration, ...]:
    """The migrations a database still needs, in order; `applied` maps numbers to the checksums it remembers.

    Raises: ConfigurationError when the database was written by a newer release, when an applied file was changed
    since, or when an earlier one is missing between applied ones.
    """
    newest = len(known)
    beyond = [number for number in applied if not 1 <= number <= newest]
    if beyond:
        raise ConfigurationError(
            f"migrations: the database is at number {max(beyond)} of component {component!r} and this release knows "
            f"{newest}: a newer release wrote it; install that release or a later one"
        )
    for migration in known:
        if migration.number in applied and applied[migration.number] != migration.checksum:
            raise ConfigurationError(
                f"migrations: {migration} of component {component!r} was applied with another text than this release "
                "ships: install the release that applied it, or restore the database from before"
            )
    missing = tuple(each for each in known if each.number not in applied)
    if missing and any(number > missing[0].number for number in applied):
        raise ConfigurationError(
            f"migrations: {missing[0]} of component {component!r} is not applied but a later one is: the table of "
            "migrations was changed by hand; restore it from a backup"
        )
    return missing


def require_current(missing: Iterable[Migration], *, component: str = COMPONENT_STORE) -> None:
    """Refuse to serve while migrations are missing. Raises: MigrationRequired, naming them and the command."""
    names = ", ".join(map(str, missing))
    if names:
        raise MigrationRequired(f"migrations: component {component!r} needs {names}: run `coatcheck migrate`")


def _says_something(statement: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith("--") for line in statement.split("\n"))
