"""The processes of the demonstration: started together, told what to do, and gone when it ends.

Decides that no process outlives the demonstration: each ends when its input does, and one that does not is killed. It
must never put a store's address where others can read it (`messages`).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec

from coatcheck.server.demo.messages import Begin, Failed, Order, Ready, Stop, line_of, read_answer

START_SECONDS: Final = 30.0
ANSWER_SECONDS: Final = 15.0
_END_SECONDS: Final = 6.0
_COMMAND: Final = (sys.executable, "-P", "-m", "coatcheck.server.demo.node")

T = TypeVar("T")


class DemoFailed(Exception):
    """The demonstration cannot go on; the text is one line."""


class Node:
    """One process, seen from outside."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number: Final = number
        self._process = process

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ask(self, order: Order, wanted: type[T]) -> T:
        """Tell it to do something; its answer. Raises: DemoFailed."""
        self.tell(order)
        return await self.hear(wanted)

    def tell(self, order: Order | Begin) -> None:
        """Send one line."""
        assert self._process.stdin is not None  # noqa: S101 - it was started with a pipe
        self._process.stdin.write(line_of(order))

    async def hear(self, wanted: type[T], *, seconds: float = ANSWER_SECONDS) -> T:
        """Its next answer. Raises: DemoFailed when it is another one, or none."""
        assert self._process.stdout is not None  # noqa: S101 - it was started with a pipe
        try:
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
            answer = read_answer(line)
        except TimeoutError as late:
            raise DemoFailed(f"node {self.number} has not answered for {seconds:g} seconds") from late
        except (msgspec.DecodeError, ValueError, OSError) as broken:
            raise DemoFailed(f"node {self.number} has ended by itself") from broken
        if isinstance(answer, Failed):
            raise DemoFailed(f"node {self.number}: {answer.why}")
        if not isinstance(answer, wanted):
            raise DemoFailed(f"node {self.number} answered something else than it was asked")
        return answer

    def let_go(self) -> None:
        """Ask it to end."""
        assert self._process.stdin is not None  # noqa: S101 - it was started with a pipe
        with contextlib.suppress(OSError, RuntimeError):
            self.tell(Stop())
            self._process.stdin.close()

    async def end(self) -> None:
        """Wait until it is gone; kill it if it does not go."""
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


@asynccontextmanager
async def running(count: int, begin: Begin) -> AsyncIterator[list[Node]]:
    """So many nodes over one store, ready, for the length of the block. Raises: DemoFailed."""
    nodes: list[Node] = []
    try:
        for number in range(1, count + 1):
            process = await asyncio.create_subprocess_exec(
                *_COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # A Ctrl-C in the terminal is for the demonstration, which then lets them go.
                start_new_session=True,
            )
            node = Node(number, process)
            nodes.append(node)
            node.tell(begin)
        for node in nodes:
            await node.hear(Ready, seconds=START_SECONDS)
        yield nodes
    finally:
        for node in nodes:
            node.let_go()
        await asyncio.gather(*(node.end() for node in nodes))
