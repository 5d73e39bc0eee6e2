"""What only the memory store promises: one process, any number of loops, and memory that does not grow."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ports import TOMBSTONE_US, Admitted, Changes, Live, RateLimit, RecordLimits
from coatcheck.errors import StoreUnavailable
from coatcheck.stores import open_store
from coatcheck.stores.conformance import CHECKS, TOKEN_CHECKS, Bench, Check, Clock, run_check
from coatcheck.stores.memory import MemoryStore
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from tests.stores.conftest import StoppedSystem

WIDE = RecordLimits(octets=1000, fields=10)


@pytest.fixture
def bench() -> Iterator[Bench]:
    clock = Clock()
    options = StoreOptions(colour="blocking", waits=waits_of("blocking"), system=StoppedSystem(), clock_offset_us=clock)
    store = MemoryStore(options)
    run_blocking(store.open())
    yield Bench(store=store, other=store, clock=clock, stopped=True)
    run_blocking(store.close())


def test_the_url_opens_a_store_of_one_process() -> None:
    store = open_store("memory:", colour="async")
    assert isinstance(store, MemoryStore)
    assert store.colour == "async"
    assert not store.shared


def test_a_store_that_is_not_open_serves_nobody() -> None:
    store = open_store("memory:", colour="blocking")
    with pytest.raises(StoreUnavailable):
        run_blocking(store.ping())
    run_blocking(store.open())
    assert run_blocking(store.ping()) > 0
    run_blocking(store.close())
    with pytest.raises(StoreUnavailable):
        run_blocking(store.ping())


FORKING = """
import os, sys
from coatcheck.blocking import run_blocking
from coatcheck.errors import ConfigurationError
from coatcheck.stores import open_store

store = open_store("memory:", colour="blocking")
run_blocking(store.open())
child = os.fork()
if child == 0:
    for verb in (store.ping, store.open, lambda: store.clear("key"), lambda: store.sweep(limit=1), store.read_ring):
        try:
            run_blocking(verb())
        except ConfigurationError as refused:
            assert "shared store" in refused.detail, refused.detail
        else:
            os._exit(1)
    os._exit(0)
_, status = os.waitpid(child, 0)
run_blocking(store.ping())
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_after_a_fork_the_child_is_refused_with_the_cure() -> None:
    # A program of its own: the process of a test runner has threads, and forking it is another program's risk.
    ended = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


def test_event_loops_in_several_threads_share_one_store_exactly() -> None:
    store = open_store("memory:", colour="async")
    asyncio.run(store.open())
    bench = Bench(store=store, other=store, clock=Clock(), stopped=False)
    sessions = [bench.new_session() for _ in range(80)]
    admitted: list[object] = []

    async def sign_in(first: int) -> None:
        answers = await asyncio.gather(*(store.admit(new, maximum=3, on_limit="refuse") for new in sessions[first::4]))
        admitted.extend(each for each in answers if isinstance(each, Admitted))

    threads = [threading.Thread(target=lambda n=n: asyncio.run(sign_in(n))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(admitted) == 3


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Threads change places after every few instructions, not after milliseconds: without the lock, verbs tear."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


AT_ONCE = [check for check in (*CHECKS, *TOKEN_CHECKS) if "at_once" in check.__name__ or "of_many" in check.__name__]


@pytest.mark.usefixtures("restless_threads")
@pytest.mark.parametrize("check", AT_ONCE, ids=lambda check: check.__name__)
def test_restless_threads_meet_exactly(bench: Bench, check: Check) -> None:
    run_blocking(run_check(check, bench))


def test_an_answer_cannot_be_used_to_change_the_store(bench: Bench) -> None:
    fields = {"a": "1"}
    new = bench.new_session(fields=fields)
    created = run_blocking(bench.store.create(new))
    dict(new.fields).clear()
    fields["a"] = "2"
    with pytest.raises(TypeError):
        created.session.fields["a"] = "3"  # type: ignore[index]
    live = run_blocking(bench.load(new))
    assert isinstance(live, Live)
    assert dict(live.session.fields) == {"a": "1"}
    changes = {"b": "1"}
    run_blocking(bench.store.commit(new.ref, Changes(put=changes), limits=WIDE))
    changes["b"] = "2"
    again = run_blocking(bench.load(new))
    assert isinstance(again, Live)
    assert dict(again.session.fields) == {"a": "1", "b": "1"}
    assert dict(live.session.fields) == {"a": "1"}, "an answer is of its moment"


def test_peek_never_knows(bench: Bench) -> None:
    new = bench.new_session()
    run_blocking(bench.store.create(new))
    assert bench.store.peek(new.ref.handle.encode().ljust(64)) is None


def test_signing_in_and_out_for_weeks_keeps_memory_in_proportion(bench: Bench) -> None:
    store = bench.store
    assert isinstance(store, MemoryStore)
    for number in range(5000):
        # Sessions that would have lived for weeks are ended at once, a hundred within the life of a tombstone.
        new = bench.new_session(f"user-{number % 50}", idle_us=20 * TOMBSTONE_US)
        run_blocking(store.create(new))
        run_blocking(store.revoke(new.ref, reason="logout"))
        if number % 7 == 0:
            run_blocking(store.revoke_owner(new.ref.tag, new.owner, reason="password changed"))
        bench.advance(TOMBSTONE_US // 100)
    assert len(store._slots) <= 110
    assert len(store._owners) == 0
    assert len(store._cuts) <= 60
    assert len(store._queue) <= 4 * 170 + 65
    bench.advance(40 * TOMBSTONE_US)
    assert run_blocking(store.sweep(limit=10_000)) <= 110
    assert (len(store._slots), len(store._cuts), len(store._queue)) == (0, 0, 0)


def test_abandoned_sessions_are_cleared_by_those_who_come(bench: Bench) -> None:
    store = bench.store
    assert isinstance(store, MemoryStore)
    for number in range(1000):
        run_blocking(store.create(bench.new_session(f"user-{number}", absolute_us=100)))
        bench.advance(10)
    assert len(store._slots) <= 20
    assert len(store._owners) <= 20


def test_counting_attempts_of_strangers_keeps_memory_in_proportion(bench: Bench) -> None:
    store = bench.store
    assert isinstance(store, MemoryStore)
    for number in range(1000):
        run_blocking(store.hit(f"login:{number}", RateLimit(attempts=6, period=60)))
        bench.advance(1_000_000)
    assert len(store._arrivals) <= 20
    assert len(store._queue) <= 20


def test_a_sweep_of_one_removes_one(bench: Bench) -> None:
    for number in range(5):
        run_blocking(bench.store.create(bench.new_session(f"user-{number}", absolute_us=100)))
    bench.advance(100)
    assert [run_blocking(bench.store.sweep(limit=2)) for _ in range(4)] == [2, 2, 1, 0]
