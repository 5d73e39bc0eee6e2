"""One SQLite file as a store: opened, brought up to this release, its clock and its keys.

Decides what is made when the file is new and what is refused when it is another release's. It knows no session and no
token; the verbs build on it. It must never sit on a network drive, and never be opened by two hosts.
"""

from __future__ import annotations

from typing import Final

from coatcheck.core.ids import IdKeys
from coatcheck.core.ports import Colour, Feed, Listener
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.migrations import COMPONENT_STORE, Migration, load_migrations
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite.announcing import Announcements
from coatcheck.stores.sqlite.changes import Changes
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.driver import Announcer, BlockingDriver, Driver, path_of
from coatcheck.stores.sqlite.feed import SqliteFeed
from coatcheck.stores.sqlite.key_file import read_or_make_key
from coatcheck.stores.sqlite.migrations import apply_sqlite, missing_sqlite
from coatcheck.stores.sqlite.statements import statements_of

_ID_KEYS: Final = "id_keys"


class SqliteFile:
    """The file, in one colour."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        """Raises: ConfigurationError when the URL names no file."""
        self._options = options
        self._path = path_of(url)
        self._sql = statements_of(options.namespace)
        self._changes = Changes(self._sql, options.namespace)
        self._driver = _driver(self._path, options, Announcements(self._path, self._changes))
        self._opened = False

    @property
    def colour(self) -> Colour:
        """Which face may use this store."""
        return self._options.colour

    @property
    def shared(self) -> bool:
        """True: every process of this host sees the same sessions."""
        return True

    async def open(self) -> None:
        """Connect, and bring the file's tables up to this release; a file that is not there is made (mode 0600).

        Safe to call again and from several processes at once.
        Raises: StoreUnavailable; ConfigurationError when a newer release wrote the file or it cannot be kept there.
        """
        try:
            await self._migrate()
        except Exception:
            # A store that could not be opened is dropped, not closed: it must hold nothing.
            await self._driver.close()
            raise
        self._opened = True

    async def close(self) -> None:
        """Close every connection and end the writer thread. The store may be opened again."""
        self._opened = False
        await self._driver.close()

    async def ping(self) -> int:
        """Read from the file; returns the host's clock, Unix microseconds."""

        def work(connection: Connection) -> int:
            connection.execute(self._sql.meta, ("",)).fetchall()
            return self._now()

        return await self._use().read(work)

    async def id_keys(self, candidate: IdKeys) -> IdKeys:
        """The stored keys, or `candidate` where there were none. See `core.ports`."""

        def read(connection: Connection) -> IdKeys | None:
            rows = connection.execute(self._sql.meta, (_ID_KEYS,)).fetchall()
            if not rows:
                return None
            keys = IdKeys.unpack(rows[0][0]) if isinstance(rows[0][0], bytes) else None
            if keys is None:
                # Never replaced: with other keys every id in every browser would be unknown.
                raise StoreUnavailable("sqlite: the keys of ids in the database are damaged; restore a backup")
            return keys

        def write(connection: Connection) -> IdKeys:
            stored = read(connection)
            if stored is None:
                connection.execute(self._sql.write_meta, (_ID_KEYS, candidate.pack()))
            return candidate if stored is None else stored

        stored = await self._use().read(read)
        return await self._use().write(write) if stored is None else stored

    async def local_key(self, candidate: bytes) -> bytes | None:
        """The 32-byte server key in `<database>.key`, made once with mode 0600.

        Raises: ConfigurationError when other users can read it.
        """
        return await self._use().aside(lambda _: read_or_make_key(f"{self._path}.key", candidate))

    def feed(self, listener: Listener, *, lease: float) -> Feed:
        """What changed in this file, whoever changes it. See `core.ports` and docs/decisions/0014."""
        return SqliteFeed(
            self._path,
            self._driver,
            self._changes,
            listener,
            lease=lease,
            deadline=self._options.deadline,
            elapsed=self._options.system.elapsed,
            clock_us=self._now,
            is_open=lambda: self._opened,
            prepare=self._bring_up,
        )

    async def _migrate(self) -> None:
        if not await self._driver.read(self._is_current, point=False):
            await self._driver.aside(self._bring_up)

    def _is_current(self, connection: Connection) -> bool:
        missing = missing_sqlite(
            connection, self._migrations(), component=COMPONENT_STORE, namespace=self._options.namespace
        )
        return not missing and self._changes.are_counted(connection)

    def _bring_up(self, connection: Connection) -> None:
        """Make what this release needs, in transactions of its own."""
        if self._is_current(connection):
            return
        apply_sqlite(
            connection,
            self._migrations(),
            component=COMPONENT_STORE,
            namespace=self._options.namespace,
            now_us=self._now(),
        )
        self._changes.make(connection)

    def _migrations(self) -> tuple[Migration, ...]:
        return load_migrations("coatcheck.stores", "sqlite")

    def _use(self) -> Driver:
        if not self._opened:
            raise StoreUnavailable("the SQLite store is not open")
        return self._driver

    def _now(self) -> int:
        return self._options.system.now_us() + self._options.clock_offset_us()


def _driver(path: str, options: StoreOptions, announcer: Announcer) -> Driver:
    if options.colour == "blocking":
        return BlockingDriver(path, deadline=options.deadline, announcer=announcer)
    from coatcheck.stores.sqlite.writer import SuspendingDriver

    return SuspendingDriver(path, waits=options.waits, deadline=options.deadline, announcer=announcer)
