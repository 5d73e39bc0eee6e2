"""One connection that listens: it asks a question now and then, and hears what is told between the answers.

Decides the order that a feed stands on: everything that the server sent before it was ready again has been told before
an answer is handed out. It speaks to libpq directly, because the driver hands out notifications only while it waits
for an answer. It must never wait, but in `answered`; and what is not marked otherwise is for one thread at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Final

from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from coatcheck.stores.postgres.connection import BlockingConnection, SuspendingConnection, abandon, readable

Answer = tuple[str | None, ...]

# Another thread may have read the answer that this one waits for; it looks for itself so often.
_LOOK_SECONDS: Final = 0.002


class Wire:
    """A connection of one process, and in the asynchronous colour of one event loop."""

    def __init__(
        self,
        connection: BlockingConnection | SuspendingConnection,
        tell: Callable[[bytes], None],
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        self._connection: Final = connection
        self._pgconn: Final = connection.pgconn
        self._pgconn.nonblocking = 1
        self._tell: Final = tell
        self._descriptor: Final = self._pgconn.socket
        # A TLS record holds 16 KiB and one read takes half of that: what is left lies in libpq, and no poll shows it.
        self._reads: Final = (0, 1, 2) if self._pgconn.ssl_in_use else (0,)
        self._row: Answer = ()
        self._landed: Final = asyncio.Event()
        self.loop: Final = loop
        self.backend: Final = self._pgconn.backend_pid
        """The server process we were connected to, by its own account."""
        self.asking = False
        """Whether a question is on its way."""
        self.over = False

    def ask(self, question: bytes, values: Sequence[bytes] = ()) -> None:
        """Send a question; there must be none on its way. Raises: psycopg.Error."""
        self._row = ()
        self._landed.clear()
        if values:
            self._pgconn.send_query_params(question, values)
        else:
            self._pgconn.send_query(question)
        self.asking = True
        # What does not fit into the socket now is sent by the next read.
        self._pgconn.flush()

    def read(self) -> Answer | None:
        """Tell what has arrived, in the order of the server; the answer, once all before it and with it was told.

        Raises: psycopg.Error when the connection is gone, or the answer is a refusal.
        """
        pgconn = self._pgconn
        for _ in self._reads:
            pgconn.consume_input()
            # Here and not in a method: this is what a check pays for when nothing has arrived.
            while (notified := pgconn.notifies()) is not None:
                self._tell(notified.extra)
        if not self.asking:
            return None
        while not pgconn.is_busy():
            result = pgconn.get_result()
            if result is None:
                # The server is ready again. Between its answer and this word it told what had been committed before.
                while (notified := pgconn.notifies()) is not None:
                    self._tell(notified.extra)
                self.asking = False
                self._landed.set()
                return self._row
            if result.status == ExecStatus.TUPLES_OK and result.ntuples == 1:
                values = (result.get_value(0, column) for column in range(result.nfields))
                self._row = tuple(None if each is None else each.decode() for each in values)
            elif result.status != ExecStatus.COMMAND_OK:
                raise error_from_result(result)
        return None

    def listen(self, hear: Callable[[], object]) -> None:
        """Call `hear` whenever something has arrived; in the event loop's colour, and from within the loop."""
        if self.loop is not None:
            self.loop.add_reader(self._descriptor, hear)

    async def answered(self, hear: Callable[[], object], *, until: float) -> None:
        """Wait until no question is on its way any more. Raises: TimeoutError after `until` in the blocking colour;
        a task is cancelled instead. Any thread may call it: it reads nothing but through `hear`."""
        while self.asking and not self.over:
            if self.loop is not None:
                await self._landed.wait()
                continue
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            # A descriptor that was closed meanwhile is of no harm: nothing is read from it here.
            with contextlib.suppress(OSError, ValueError):
                readable(self._descriptor, min(left, _LOOK_SECONDS))
            hear()

    def finish(self) -> None:
        """Let go of the connection, without waiting."""
        if self.over:
            return
        self.over = True
        self._landed.set()
        loop = self.loop
        if loop is None or loop.is_closed():
            self._pgconn.finish()
        elif not loop.is_running() or loop is _running_loop():
            # The loop forgets the descriptor before it is closed, or it would never hear the next one of that number.
            self._leave()
        else:
            try:
                loop.call_soon_threadsafe(self._leave)
            except RuntimeError:
                # It was closed at this moment.
                self._pgconn.finish()

    def _leave(self) -> None:
        if self.loop is not None:
            self.loop.remove_reader(self._descriptor)
        self._pgconn.finish()

    def abandon(self) -> None:
        """Give up a connection that a parent process uses: its descriptor is closed unused."""
        # The loop is left alone: its list of descriptors is shared with the parent, which must go on hearing.
        self.over = True
        _inherited.append(self._connection)
        with contextlib.suppress(OSError):
            abandon(self._connection)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


# Never collected: a connection object that is collected would speak to the server.
_inherited: Final[list[object]] = []
