"""The lease counts from the question, and the table forgets the oldest."""

from __future__ import annotations

import threading

import pytest

from coatcheck.core.freshness import FOR_EVER, NEVER, BoundedTable, Lease
from coatcheck.errors import ConfigurationError

MICROSECOND = 1 / 1_000_000


def test_nothing_is_fresh_before_the_first_answer() -> None:
    lease = Lease(5.0)
    assert lease.confirmed == NEVER
    assert not lease.is_fresh(0.0)
    assert not lease.is_fresh(-1e12)


def test_a_lease_ends_exactly_at_its_span_after_the_question() -> None:
    lease = Lease(5.0)
    lease.confirm(100.0, 0.0)
    assert lease.until == 105.0
    assert lease.is_fresh(105.0 - MICROSECOND)
    assert not lease.is_fresh(105.0)


def test_what_the_answer_lags_behind_is_taken_off() -> None:
    lease = Lease(5.0)
    lease.confirm(100.0, 2.5)
    assert lease.is_fresh(102.5 - MICROSECOND)
    assert not lease.is_fresh(102.5)


def test_a_lag_longer_than_the_lease_makes_nothing_fresh() -> None:
    lease = Lease(5.0)
    lease.confirm(100.0, 5.0)
    assert not lease.is_fresh(100.0)


def test_an_older_answer_takes_nothing_back() -> None:
    lease = Lease(5.0)
    lease.confirm(100.0, 0.0)
    lease.confirm(101.0, 3.0)
    lease.confirm(99.0, 0.0)
    assert lease.until == 105.0


def test_a_lease_for_ever_has_no_end() -> None:
    lease = Lease(FOR_EVER)
    lease.confirm(0.0, 0.0)
    assert lease.is_fresh(1e18)


def test_a_full_table_forgets_the_oldest() -> None:
    table: BoundedTable[int] = BoundedTable(3)
    for number in range(5):
        table.put(b"%d" % number, number)
        assert len(table) <= 3
    assert [table.get(b"%d" % number) for number in range(5)] == [None, None, 2, 3, 4]


def test_a_key_that_is_put_again_takes_no_second_place() -> None:
    table: BoundedTable[int] = BoundedTable(2)
    table.put(b"a", 1)
    table.put(b"a", 2)
    table.put(b"b", 3)
    assert (table.get(b"a"), table.get(b"b"), len(table)) == (2, 3, 2)
    table.put(b"c", 4)
    assert (table.get(b"a"), table.get(b"b"), table.get(b"c")) == (None, 3, 4)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_table_without_room_is_refused(limit: int) -> None:
    with pytest.raises(ConfigurationError):
        BoundedTable[int](limit)


def test_threads_that_fill_a_table_at_once_stay_within_its_limit() -> None:
    table: BoundedTable[int] = BoundedTable(50)
    barrier = threading.Barrier(8)

    def fill() -> None:
        barrier.wait()
        for number in range(2000):
            table.put(b"%d" % number, number)

    threads = [threading.Thread(target=fill) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(table) <= 50
    for number in range(2000):
        assert table.get(b"%d" % number) in (None, number)
    for number in range(5000, 5060):
        table.put(b"%d" % number, number)
    assert [table.get(b"%d" % number) for number in range(5010, 5060)] == list(range(5010, 5060))
