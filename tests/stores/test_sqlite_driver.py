"""Threads, forks, the writer's queue and cancelled callers over one SQLite file."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.stores.sqlite import driver as driver_module
from coatcheck.stores.sqlite.driver import BlockingDriver
from coatcheck.stores.sqlite.writer import SuspendingDriver
from coatcheck.suspending import SuspendingWaits


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "d.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute("create table t (x)")
    return str(file)


def add(number: int) -> Callable[[sqlite3.Connection], None]:
    def work(connection: sqlite3.Connection) -> None:
        connection.execute("insert into t values (?)", (number,))

    return work


def numbers(connection: sqlite3.Connection) -> list[int]:
    return [row[0] for row in connection.execute("select x from t order by x").fetchall()]


def pragma(name: str) -> Callable[[sqlite3.Connection], object]:
    return lambda connection: connection.execute(f"pragma {name}").fetchall()[0][0]


# -- either colour -------------------------------------------------------------------------------------------------


def test_a_connection_is_set_up_as_promised(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)
    expected = {"journal_mode": b"wal", "synchronous": 2, "foreign_keys": 1, "trusted_schema": 0, "secure_delete": 1}
    expected |= {"cell_size_check": 1, "busy_timeout": 60_000}
    assert {name: run_blocking(driver.read(pragma(name))) for name in expected} == expected
    run_blocking(driver.close())


def test_only_what_is_durable_is_synced(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)
    for durable, level in ((False, 1), (True, 2), (True, 2), (False, 1)):
        assert run_blocking(driver.write(pragma("synchronous"), durable=durable)) == level
    run_blocking(driver.close())


def test_an_exception_rolls_back_and_the_next_work_goes_on(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)

    def fail(connection: sqlite3.Connection) -> None:
        add(1)(connection)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_blocking(driver.write(fail))
    with pytest.raises(StoreUnavailable, match="no such table"):
        run_blocking(driver.write(lambda c: (add(2)(c), c.execute("insert into nowhere values (1)"))))
    run_blocking(driver.write(add(3)))
    assert run_blocking(driver.read(numbers)) == [3]
    run_blocking(driver.close())


def test_a_commit_that_fails_has_an_unknown_outcome(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)

    def doom(connection: sqlite3.Connection) -> None:
        connection.execute("create table parent (id primary key)")
        connection.execute("create table child (id references parent deferrable initially deferred)")
        connection.execute("insert into child values (1)")

    with pytest.raises(OutcomeUnknown, match="commit failed"):
        run_blocking(driver.write(doom))
    run_blocking(driver.write(add(1)))
    assert run_blocking(driver.read(numbers)) == [1]
    run_blocking(driver.close())


# -- threads -------------------------------------------------------------------------------------------------------


def test_threads_have_their_own_connections_and_give_them_back(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)
    used: list[int] = []
    together = threading.Barrier(8, timeout=60)

    def visit() -> None:
        together.wait()
        for number in range(20):
            run_blocking(driver.write(add(number), durable=False))
        used.append(run_blocking(driver.read(id)))
        together.wait()

    threads = [threading.Thread(target=visit) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(set(used)) == 8
    gc.collect()
    assert driver._links._links == {}
    assert len(run_blocking(driver.read(numbers))) == 160
    run_blocking(driver.close())


def test_closing_waits_for_work_and_the_store_may_be_used_again(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)
    inside, go_on = threading.Event(), threading.Event()

    def slow(connection: sqlite3.Connection) -> None:
        add(1)(connection)
        inside.set()
        assert go_on.wait(60)

    writing = threading.Thread(target=lambda: run_blocking(driver.write(slow)))
    writing.start()
    assert inside.wait(60)
    closing_ = threading.Thread(target=lambda: run_blocking(driver.close()))
    closing_.start()
    go_on.set()
    writing.join()
    closing_.join()
    assert run_blocking(driver.read(numbers)) == [1]
    run_blocking(driver.close())


def test_a_thread_that_waits_for_its_turn_too_long_writes_nothing(path: str) -> None:
    driver = BlockingDriver(path, deadline=0.2)
    began = time.monotonic()
    # As another thread holds it while it writes.
    with driver._links.turn, pytest.raises(StoreUnavailable, match="nothing was written"):
        run_blocking(driver.write(add(1)))
    assert 0.2 <= time.monotonic() - began < 3
    assert run_blocking(driver.read(numbers)) == []
    run_blocking(driver.close())


# -- forks ---------------------------------------------------------------------------------------------------------

_FORK = """
import os, sqlite3, subprocess, sys, threading
from coatcheck.blocking import run_blocking as run
from coatcheck.stores.sqlite import driver as module
from coatcheck.stores.sqlite.driver import BlockingDriver
path = sys.argv[1]
driver = BlockingDriver(path, deadline=60)
add = lambda n: (lambda c: c.execute("insert into t values (?)", (n,)) and None)
count = lambda c: c.execute("select count(*) from t").fetchall()[0][0]
run(driver.write(add(0)))
# A second thread has a connection too, and goes on after the fork.
ready, done = threading.Event(), threading.Event()
def other():
    run(driver.write(add(1))); ready.set(); done.wait(60); run(driver.write(add(2)))
thread = threading.Thread(target=other); thread.start(); ready.wait(60)
def descriptors():
    names = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(name) for name in names if os.path.lexists(name)]
hears, tells = os.pipe(); waits, goes = os.pipe()
child = os.fork()
if child == 0:
    inherited = [name for name in descriptors() if name.startswith(path)]
    assert inherited == [], inherited
    assert all(link._connection is None for links in module._inherited for link in links.values())
    run(driver.write(add(3)))
    os.write(tells, b"x"); os.read(waits, 1)
    # The parent has let go, and somebody else was the last to close: our log must still be there.
    run(driver.write(add(4)))
    os._exit(0 if run(driver.read(count)) == 5 else 1)
os.read(hears, 1)
done.set(); thread.join()
assert run(driver.read(count)) == 4
run(driver.close())
look = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('select count(*) from t'); c.close()"
subprocess.run([sys.executable, "-c", look, path], check=True)
os.write(goes, b"x")
_, status = os.waitpid(child, 0)
assert status == 0, status
assert run(driver.read(count)) == 5
print("well")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the descriptors of a process are read from /proc")
def test_a_child_inherits_no_connection_and_loses_nothing(path: str) -> None:
    # Later Pythons warn of a fork beside threads; that it goes well here is what this is about.
    python = [sys.executable, "-W", "ignore::DeprecationWarning"]
    done = subprocess.run([*python, "-c", _FORK, path], capture_output=True, text=True, timeout=110, check=False)
    assert (done.stdout, done.stderr) == ("well\n", "")


def test_a_connection_inherited_behind_our_back_is_neither_used_nor_closed(path: str) -> None:
    driver = BlockingDriver(path, deadline=60.0)
    run_blocking(driver.write(add(1)))
    links = driver._links
    inherited = links.mine()
    try:
        # As after a fork by a C extension that calls none of Python's hooks.
        links._pid = -1
        assert links.mine() is not inherited
        run_blocking(driver.write(add(2)))
        run_blocking(driver.close())
        gc.collect()
        connection = inherited._connection
        assert connection is not None
        assert numbers(connection) == [1, 2]
    finally:
        inherited.close()
        driver_module._inherited.clear()


# -- the asynchronous colour ---------------------------------------------------------------------------------------


class Held:
    """Work that holds the writer until it is let go."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, connection: sqlite3.Connection) -> None:
        add(99)(connection)
        self.inside.set()
        assert self.go_on.wait(60)


def _driver(path: str, *, deadline: float = 60.0, queue_length: int = 10) -> SuspendingDriver:
    return SuspendingDriver(path, waits=SuspendingWaits(), deadline=deadline, queue_length=queue_length)


async def _turns(driver: SuspendingDriver, waiting: int) -> None:
    """Let tasks run until so many pieces of work are in the queue."""
    for _ in range(1000):
        await asyncio.sleep(0)
        writer = driver._writer
        if writer is not None and writer.jobs.qsize() >= waiting:
            return
    raise AssertionError("the work never came into the queue")


@pytest.mark.anyio
async def test_a_full_queue_is_refused_at_once_and_drains(path: str) -> None:
    driver, held = _driver(path, queue_length=3), Held()
    tasks = [asyncio.create_task(driver.write(held))]
    assert await asyncio.to_thread(held.inside.wait, 60)
    tasks += [asyncio.create_task(driver.write(add(number))) for number in range(2)]
    await _turns(driver, 2)
    with pytest.raises(StoreUnavailable, match="queue is full"):
        await driver.write(add(7))
    held.go_on.set()
    await asyncio.gather(*tasks)
    await driver.write(add(8))
    assert await driver.read(numbers) == [0, 1, 8, 99]
    await driver.close()


@pytest.mark.anyio
async def test_reads_do_not_wait_for_the_writer(path: str) -> None:
    driver, held = _driver(path), Held()
    task = asyncio.create_task(driver.write(held))
    assert await asyncio.to_thread(held.inside.wait, 60)
    assert await driver.read(numbers) == []
    held.go_on.set()
    await task
    assert await driver.read(numbers) == [99]
    await driver.close()


@pytest.mark.anyio
async def test_work_that_was_cancelled_in_the_queue_never_runs(path: str) -> None:
    driver, held = _driver(path), Held()
    first = asyncio.create_task(driver.write(held))
    assert await asyncio.to_thread(held.inside.wait, 60)
    second = asyncio.create_task(driver.write(add(1)))
    third = asyncio.create_task(driver.write(add(2)))
    await _turns(driver, 2)
    second.cancel()
    held.go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await second
    await asyncio.gather(first, third)
    assert await driver.read(numbers) == [2, 99]
    await driver.close()


@pytest.mark.anyio
async def test_work_that_was_cancelled_while_it_ran_is_whole(path: str) -> None:
    driver, held = _driver(path), Held()
    task = asyncio.create_task(driver.write(held))
    assert await asyncio.to_thread(held.inside.wait, 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    held.go_on.set()
    await driver.write(add(1))
    assert await driver.read(numbers) == [1, 99]
    await driver.close()


@pytest.mark.anyio
async def test_work_that_did_not_begin_by_the_deadline_never_does(path: str) -> None:
    driver, held = _driver(path, deadline=1.0), Held()
    first = asyncio.create_task(driver.write(held))
    assert await asyncio.to_thread(held.inside.wait, 60)
    with pytest.raises(StoreUnavailable, match="nothing was written") as caught:
        await driver.write(add(1))
    assert not isinstance(caught.value, OutcomeUnknown)
    with pytest.raises(OutcomeUnknown):
        await first
    held.go_on.set()
    await driver.write(add(2), durable=False)
    assert await driver.read(numbers) == [2, 99]
    await driver.close()


@pytest.mark.anyio
async def test_closing_ends_the_thread_after_what_is_queued(path: str) -> None:
    driver = _driver(path)
    task = asyncio.create_task(driver.write(add(1)))
    await asyncio.sleep(0)
    assert driver._writer is not None
    thread = driver._writer._thread
    await driver.close()
    await task
    thread.join(60)
    assert not thread.is_alive()
    assert await driver.read(numbers) == [1]
    await driver.write(add(2))
    await driver.close()


def test_a_loop_that_is_gone_does_not_stop_the_next_one(path: str) -> None:
    driver, held = _driver(path), Held()

    async def leave() -> None:
        task = asyncio.create_task(driver.write(held))
        assert await asyncio.to_thread(held.inside.wait, 60)
        task.cancel()

    asyncio.run(leave())
    held.go_on.set()
    asyncio.run(driver.write(add(1)))

    async def look_and_close() -> list[int]:
        found = await driver.read(numbers)
        await driver.close()
        return found

    assert asyncio.run(look_and_close()) == [1, 99]


def test_a_store_that_is_dropped_leaves_no_thread_behind(path: str) -> None:
    driver = _driver(path)
    asyncio.run(driver.write(add(1)))
    assert driver._writer is not None
    thread, gone = driver._writer._thread, weakref.ref(driver)
    del driver
    gc.collect()
    assert gone() is None
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.anyio
async def test_exceptions_of_work_reach_the_caller_and_not_the_thread(path: str) -> None:
    driver = _driver(path)

    def fail(connection: sqlite3.Connection) -> None:
        add(1)(connection)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await driver.write(fail)
    await driver.write(add(2))
    assert await driver.read(numbers) == [2]
    await driver.close()
