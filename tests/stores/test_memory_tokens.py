"""What only the memory store promises about tokens: nothing of a family stays behind, and its log is its process's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ports import (
    MAX_FAMILIES,
    TOMBSTONE_US,
    Denial,
    DenialPage,
    FamilyCreated,
    FamilyKept,
    FamilyReplayed,
    FamilyRotated,
    PositionLost,
    RefreshOutcome,
    Store,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.stores.conformance import Bench, Clock
from coatcheck.stores.memory import MemoryStore
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from tests.stores.conftest import StoppedSystem

SECOND_US = 1_000_000
GRACE_US = 10 * SECOND_US


def a_bench() -> Bench:
    clock = Clock()
    options = StoreOptions(colour="blocking", waits=waits_of("blocking"), system=StoppedSystem(), clock_offset_us=clock)
    store = MemoryStore(options)
    run_blocking(store.open())
    return Bench(store=store, other=store, clock=clock, stopped=True)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = a_bench()
    yield made
    run_blocking(made.store.close())


@pytest.fixture
def store(bench: Bench) -> MemoryStore:
    assert isinstance(bench.store, MemoryStore)
    return bench.store


def begin(bench: Bench, *, alone: bool = False, idle_us: int = TOMBSTONE_US) -> NewFamily:
    session = None
    if not alone:
        session = bench.new_session(idle_us=30 * TOMBSTONE_US, absolute_us=90 * TOMBSTONE_US)
        run_blocking(bench.store.create(session))
    new = bench.new_family(session, idle_us=idle_us)
    assert isinstance(run_blocking(bench.store.create_family(new)), FamilyCreated)
    return new


def present(
    store: Store, ref: FamilyRef, generation: int, digest: str, successor: str = "-", *, grace_us: int = GRACE_US
) -> RefreshOutcome:
    return run_blocking(
        store.rotate_refresh(
            ref,
            generation=generation,
            digest=digest,
            successor=successor,
            sealed=b"sealed " + successor.encode(),
            grace_us=grace_us,
            client="",
            key="",
        )
    )


@pytest.mark.parametrize("alone", [False, True], ids=["of a session", "alone"])
def test_a_sealed_successor_does_not_stay_at_rest_after_the_grace(
    bench: Bench, store: MemoryStore, alone: bool
) -> None:
    new = begin(bench, alone=alone)
    bench.advance(GRACE_US)
    assert isinstance(present(store, new.ref, 1, new.digest, "second"), FamilyRotated)
    bench.advance(GRACE_US - 1)
    run_blocking(store.sweep(limit=10))
    assert store._families[new.ref].sealed == b"sealed second"
    bench.advance(1)
    assert run_blocking(store.sweep(limit=10)) == 0, "a family that goes on is not removed"
    assert store._families[new.ref].sealed is None
    assert isinstance(present(store, new.ref, 2, "second", grace_us=2 * GRACE_US), FamilyKept)


def test_a_sealed_successor_goes_with_whoever_comes_next(bench: Bench, store: MemoryStore) -> None:
    new = begin(bench)
    assert isinstance(present(store, new.ref, 1, new.digest, "second", grace_us=0), FamilyRotated)
    begin(bench)
    assert store._families[new.ref].sealed is None


def test_a_sealed_successor_is_forgotten_when_it_is_used(bench: Bench, store: MemoryStore) -> None:
    new = begin(bench)
    bench.advance(GRACE_US)
    assert isinstance(present(store, new.ref, 1, new.digest, "second"), FamilyRotated)
    assert isinstance(present(store, new.ref, 2, "second"), FamilyKept)
    assert store._families[new.ref].sealed is None
    late = present(store, new.ref, 1, new.digest)
    assert isinstance(late, FamilyReplayed)
    assert late.sealed is None


def test_a_session_that_ends_leaves_no_family_behind(bench: Bench, store: MemoryStore) -> None:
    first, second, third = begin(bench), begin(bench), begin(bench)
    assert first.ref.session is not None
    run_blocking(store.revoke(first.ref.session, reason="logout"))
    assert set(store._families) == {second.ref, third.ref}
    run_blocking(store.revoke_owner(second.ref.tag, second.owner, reason="password changed"))
    assert not store._families
    begin(bench)
    bench.advance(100 * TOMBSTONE_US)
    run_blocking(store.sweep(limit=100))
    assert (store._families, store._slots, store._alone, store._queue) == ({}, {}, {}, [])


def test_refreshing_for_weeks_keeps_memory_in_proportion(bench: Bench, store: MemoryStore) -> None:
    new = begin(bench, alone=True)
    digest = new.digest
    for generation in range(1, 3000):
        bench.advance(GRACE_US)
        successor = bench.digest()
        assert isinstance(present(store, new.ref, generation, digest, successor), FamilyRotated)
        digest = successor
    assert len(store._queue) <= 4 * 2 + 65
    bench.advance(TOMBSTONE_US)
    assert [run_blocking(store.sweep(limit=10)) for _ in range(2)] == [1, 0]
    assert (store._families, store._alone, store._queue) == ({}, {}, [])


def test_families_begun_for_weeks_keep_memory_in_proportion(bench: Bench, store: MemoryStore) -> None:
    session = bench.new_session(idle_us=900 * TOMBSTONE_US, absolute_us=900 * TOMBSTONE_US)
    run_blocking(store.create(session))
    for number in range(1000):
        owner = session if number % 2 else None
        run_blocking(store.create_family(bench.new_family(owner, idle_us=SECOND_US * 100)))
        bench.advance(SECOND_US)
    assert len(store._families) <= 50 + MAX_FAMILIES + 60
    assert len(store._queue) <= 4 * (len(store._families) + 1) + 65


def test_denials_that_are_over_are_cleared_by_those_that_come(bench: Bench, store: MemoryStore) -> None:
    for number in range(1000):
        until = run_blocking(store.ping()) + 100 * SECOND_US
        run_blocking(store.deny(7, Denial(kind="jti", id=f"jti {number}", until_us=until)))
        bench.advance(SECOND_US)
    assert len(store._log) <= 101
    assert len(store._denied) <= 101
    bench.advance(100 * SECOND_US)
    assert run_blocking(store.sweep(limit=1000)) <= 101
    assert (store._log, store._denied, store._queue) == ({}, {}, [])


def test_a_shorter_denial_that_ends_leaves_the_longer_one(bench: Bench, store: MemoryStore) -> None:
    now = run_blocking(store.ping())
    session = begin(bench).ref.session
    assert session is not None
    for seconds in (20, 10, 20):
        run_blocking(store.deny(session.tag, Denial(kind="jti", id="a", until_us=now + seconds * SECOND_US)))
    bench.advance(10 * SECOND_US)
    assert run_blocking(store.sweep(limit=10)) == 1
    assert run_blocking(store.standing(session, "a")).why == "denied"
    bench.advance(10 * SECOND_US)
    assert run_blocking(store.standing(session, "a")).why is None
    assert run_blocking(store.sweep(limit=10)) == 2
    assert not store._denied


def test_a_follower_passes_no_entry_that_it_has_read(bench: Bench, store: MemoryStore) -> None:
    """Read in pages from its start the log costs its length, not its length for each page."""

    class Counting(dict[int, tuple[int, Denial]]):
        looked_at = 0

        def get(self, *place: Any) -> Any:
            self.looked_at += 1
            return super().get(*place)

    until = run_blocking(store.ping()) + TOMBSTONE_US
    for number in range(1000):
        ends = until if number % 2 else until - SECOND_US
        run_blocking(store.deny(0, Denial(kind="kid", id=f"key {number}", until_us=ends)))
    bench.advance(TOMBSTONE_US - SECOND_US)
    log = store._log = Counting(store._log)
    found: list[str] = []
    after: str | None = None
    while True:
        page = run_blocking(store.denials(after=after, limit=10))
        assert isinstance(page, DenialPage)
        found += [each.id for each in page.entries]
        after = page.position
        if not page.more:
            break
    assert found == [f"key {number}" for number in range(1, 1000, 2)]
    assert log.looked_at <= 1000 + 2 * 50
    log.looked_at = 0
    run_blocking(store.denials(after=after, limit=10))
    assert log.looked_at == 0
    run_blocking(store.sweep(limit=1000))
    log.looked_at = 0
    run_blocking(store.denials(after=None, limit=1))
    assert log.looked_at <= 4
    assert len(store._numbers) <= 2 * 500 + 64


def test_the_log_of_an_earlier_process_is_lost(bench: Bench, store: MemoryStore) -> None:
    """After a restart a position of old must not stand for entries of the new log that it never saw."""
    earlier = a_bench().store
    denial = Denial(kind="kid", id="a", until_us=run_blocking(store.ping()) + SECOND_US)
    for each in (earlier, store, store):
        run_blocking(each.deny(0, denial))
    old = run_blocking(earlier.denials(after=None, limit=10))
    assert isinstance(old, DenialPage)
    assert isinstance(run_blocking(store.denials(after=old.position, limit=10)), PositionLost)
    again = run_blocking(store.denials(after=None, limit=10))
    assert isinstance(again, DenialPage)
    assert again.entries == (denial, denial)
