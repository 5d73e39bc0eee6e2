"""Simultaneous calls in both colours: threads behind a barrier, or tasks of one event loop.

The one file of the suite that knows threads and event loops. It decides nothing about stores, and it must never
sleep: it gives the scheduler its turn and nothing else.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from coatcheck.blocking import run_blocking
from coatcheck.core.ports import Colour

T = TypeVar("T")

THREADS: Final = 16
PATIENCE_S: Final = 60.0


async def together(colour: Colour, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    """Run all calls as simultaneously as the colour can; their results in order. Raises: what the first one raised.

    In the blocking colour 16 threads share the calls and start behind a barrier.
    """
    if colour == "async":
        return list(await asyncio.gather(*(call() for call in calls)))
    return _in_threads(calls) if calls else []


async def interrupted(colour: Colour, call: Callable[[], Coroutine[Any, Any, object]], *, turns: int) -> None:
    """Start a call and cancel it after so many turns of the event loop; a blocking call runs to its end."""
    if colour == "blocking":
        await call()
        return
    task = asyncio.ensure_future(call())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _in_threads(calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    width = min(THREADS, len(calls))
    barrier = threading.Barrier(width)

    def work(first: int) -> None:
        try:
            barrier.wait(timeout=PATIENCE_S)
            for number in range(first, len(calls), width):
                results[number] = run_blocking(calls[number]())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(first,), daemon=True) for first in range(width)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [results[number] for number in range(len(calls))]
