"""The keeper: one task a loop, one thread a process, and nothing while nothing waits."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.errors import StoreUnavailable
from coatcheck.keeper import AsyncKeeper, BlockingKeeper

WAIT = 20.0


class Work:
    """Counts how often it is done; `left` is how often it has to be."""

    def __init__(self, left: int, *, failing: int = 0) -> None:
        self.left = left
        self.failing = failing
        self.done = threading.Event()
        self.runs = 0

    async def __call__(self) -> None:
        self.runs += 1
        if self.failing:
            self.failing -= 1
            raise StoreUnavailable("not now")
        self.left -= 1
        if not self.left:
            self.done.set()

    def has_work(self) -> bool:
        return self.left > 0


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coatcheck.keeper.TICK_SECONDS", 0.001)


@pytest.mark.anyio
async def test_a_task_runs_until_nothing_waits() -> None:
    work = Work(3)
    keeper = AsyncKeeper(work, work.has_work)
    for _ in range(10):
        keeper.poke()
    assert len([task for task in asyncio.all_tasks() if task.get_name() == "coatcheck-keeper"]) == 1
    [task] = [task for task in asyncio.all_tasks() if task.get_name() == "coatcheck-keeper"]
    await task
    assert (work.runs, work.left) == (3, 0)
    work.left = 1
    keeper.poke()
    await keeper.stop()
    assert work.left == 1


@pytest.mark.anyio
async def test_a_task_tries_again_when_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    work = Work(1, failing=2)
    keeper = AsyncKeeper(work, work.has_work)
    with caplog.at_level(logging.WARNING, "coatcheck"):
        keeper.poke()
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "coatcheck-keeper"]
        await task
    assert work.runs == 3
    assert caplog.text.count("not now") == 2


def test_a_new_event_loop_gets_a_new_task_and_no_loop_gets_none() -> None:
    work = Work(1)
    keeper = AsyncKeeper(work, work.has_work)
    keeper.poke()

    async def poke_and_leave() -> None:
        keeper.poke()

    asyncio.run(poke_and_leave())
    assert work.left == 1, "the loop ended before the upkeep"

    async def poke_and_wait() -> None:
        keeper.poke()
        [task] = [task for task in asyncio.all_tasks() if task.get_name() == "coatcheck-keeper"]
        await task

    asyncio.run(poke_and_wait())
    assert work.left == 0

    async def stop() -> None:
        await keeper.stop()

    asyncio.run(stop())


def keepers() -> set[threading.Thread]:
    """Threads of keepers; other tests of this process may have left theirs waiting for the next sweep."""
    return {thread for thread in threading.enumerate() if thread.name == "coatcheck-keeper"}


def test_a_thread_runs_until_nothing_waits_and_starts_again_after_a_stop() -> None:
    work = Work(3, failing=1)
    keeper = BlockingKeeper(work, work.has_work)
    strangers = keepers()
    keeper.poke()
    keeper.poke()
    assert work.done.wait(WAIT)
    assert work.runs == 4
    run_blocking(keeper.stop())
    run_blocking(keeper.stop())
    assert not keepers() - strangers
    work.left, work.done = 1, threading.Event()
    keeper.poke()
    assert work.done.wait(WAIT)
    run_blocking(keeper.stop())


def test_threads_that_poke_at_once_start_one_keeper() -> None:
    work = Work(1)
    keeper = BlockingKeeper(work, work.has_work)
    strangers = keepers()
    barrier = threading.Barrier(16)

    def poke() -> None:
        barrier.wait()
        keeper.poke()

    threads = [threading.Thread(target=poke) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keepers() - strangers) <= 1
    assert work.done.wait(WAIT)
    run_blocking(keeper.stop())
