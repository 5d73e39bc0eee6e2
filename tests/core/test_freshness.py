"""The lease counts from the question, near copies obey the rule at its exact limits, and tables forget the oldest."""

from __future__ import annotations

import gc
import threading
from array import array
from collections.abc import Callable, Sequence
from hashlib import sha256

import pytest

from coatcheck.core.freshness import FOR_EVER, NEVER, BoundedTable, Fill, Held, Lease, Line, NearTable
from coatcheck.errors import ConfigurationError

MICROSECOND = 1 / 1_000_000

KEY = slice(2, 4)
GROUP = slice(0, 2)
ANN = b"g1k1-secret"
BOB = b"g1k2-secret"
EVE = b"g2k3-secret"


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


# -- lines -----------------------------------------------------------------------------------------------------------


def a_line(
    confirmed: float = 100.0, *, span: float = 5.0, source: str = "", marks: Sequence[int] | None = None
) -> Line:
    line = Line(span, source=source, marks=marks)
    line.confirm(confirmed)
    return line


def test_a_new_line_is_not_fresh_and_serves_no_grace_before_its_first_answer() -> None:
    line = Line(5.0, source="run 1")
    assert not line.is_fresh(0.0)
    assert not line.graced(0.0, 60.0)
    assert (line.source, line.broken) == ("run 1", False)


def test_a_cut_line_is_over_at_once_and_for_good() -> None:
    line = a_line()
    assert line.is_fresh(100.0)
    line.cut()
    assert not line.is_fresh(100.0)
    line.confirm(101.0)
    assert line.until == NEVER
    assert not line.is_fresh(101.0)


def test_an_answer_that_comes_after_the_cut_prolongs_no_grace() -> None:
    line = a_line()
    line.cut()
    line.confirm(103.0)
    assert line.confirmed == 100.0
    assert line.graced(165.0 - MICROSECOND, 60.0)
    assert not line.graced(165.0, 60.0)


def test_grace_counts_from_the_last_answer_and_ends_exactly() -> None:
    line = a_line()
    assert line.graced(105.0 + 60.0 - MICROSECOND, 60.0)
    assert not line.graced(105.0 + 60.0, 60.0)
    assert not line.graced(105.0, 0.0)


@pytest.mark.parametrize("span", [5.0, FOR_EVER])
@pytest.mark.parametrize("answered_after", [False, True])
def test_a_void_line_serves_no_grace(span: float, answered_after: bool) -> None:
    line = a_line(span=span)
    line.void()
    if answered_after:
        line.confirm(101.0)
    assert line.broken
    assert not line.is_fresh(100.0)
    assert not line.graced(100.0, 60.0)
    assert not line.graced(100.0, FOR_EVER)


def test_a_line_may_be_void_after_it_was_cut() -> None:
    line = a_line()
    line.cut()
    assert line.graced(100.0, 60.0)
    line.void()
    assert not line.graced(100.0, 60.0)


def test_a_line_that_one_thread_cuts_while_another_confirms_it_stays_cut() -> None:
    class CutMeanwhile(float):
        """A time that is subtracted from at the worst moment."""

        line: Line

        def __sub__(self, other: float) -> float:
            self.line.cut()
            return float(self) - other

    line = a_line()
    sent = CutMeanwhile(101.0)
    sent.line = line
    line.confirm(sent)
    assert line.until == NEVER


# -- near copies -----------------------------------------------------------------------------------------------------


def a_table(*, entries: int = 100, octets: int = 10**6) -> NearTable[Held]:
    return NearTable(entries=entries, octets=octets, key_of=KEY, group_of=GROUP, mutex=threading.Lock())


def digest(credential: bytes) -> bytes:
    return sha256(credential).digest()


def a_copy(credential: bytes, fill: Fill, *, until: float = 1000.0, ends: float = 2000.0, size: int = 1) -> Held:
    return Held(digest=digest(credential), line=fill.line, since=fill.since, until=until, ends=ends, size=size)


def fetch(
    table: NearTable[Held],
    credential: bytes,
    line: Line,
    now: float,
    *,
    until: float = 1000.0,
    ends: float = 2000.0,
    size: int = 1,
    slot: int = 0,
) -> bool:
    fill = table.begin(credential[KEY], line, now, slot=slot)
    return table.settle(credential[KEY], fill, a_copy(credential, fill, until=until, ends=ends, size=size))


def find(table: NearTable[Held], credential: bytes, now: float) -> Held | None:
    return table.find(credential[KEY], credential[GROUP], digest(credential), now)


def awaiting(table: NearTable[Held], credential: bytes, now: float) -> Held | None:
    return table.awaiting(credential[KEY], credential[GROUP], digest(credential), now)


def through_outage(table: NearTable[Held], credential: bytes, now: float, grace: float) -> Held | None:
    return table.through_outage(credential[KEY], credential[GROUP], digest(credential), now, grace=grace)


def test_a_copy_is_believed_until_the_lease_of_its_line_ends_exactly() -> None:
    table, line = a_table(), a_line()
    assert fetch(table, ANN, line, 100.0)
    for look in (table.look(ANN, 105.0 - MICROSECOND), find(table, ANN, 105.0 - MICROSECOND)):
        assert look is table.known(ANN[KEY])
    assert table.look(ANN, 105.0) is None
    assert find(table, ANN, 105.0) is None


def test_a_copy_under_a_line_that_was_never_confirmed_is_not_believed_yet() -> None:
    table, line = a_table(), Line(5.0)
    assert fetch(table, ANN, line, 100.0)
    assert table.look(ANN, 100.0) is None
    assert awaiting(table, ANN, 100.0) is not None
    line.confirm(100.0)
    assert table.look(ANN, 100.0) is not None


def test_look_ends_at_until_and_find_at_the_end_of_the_copy_itself() -> None:
    table, line = a_table(), a_line(span=FOR_EVER)
    fetch(table, ANN, line, 100.0, until=200.0, ends=300.0)
    assert table.look(ANN, 200.0 - MICROSECOND) is not None
    assert table.look(ANN, 200.0) is None
    assert find(table, ANN, 300.0 - MICROSECOND) is not None
    assert find(table, ANN, 300.0) is None
    assert through_outage(table, ANN, 300.0, FOR_EVER) is None


def test_another_credential_with_the_same_key_is_not_answered() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    for forged in (b"g1k1-secreT", b"g1k1-secret ", b"g1k1", b"g2k1-secret"):
        assert table.look(forged, 100.0) is None
        assert find(table, forged, 100.0) is None
        assert awaiting(table, forged, 106.0) is None
        assert through_outage(table, forged, 106.0, 60.0) is None
    assert table.look(ANN, 100.0) is not None


@pytest.mark.parametrize("value", [b"", b"g", b"g1k", b"\x00" * 64, b"g1k1", b"\xff" * 100_000])
def test_whatever_stands_in_a_cookie_is_looked_up_without_harm(value: bytes) -> None:
    table = a_table()
    fetch(table, ANN, a_line(), 100.0)
    assert table.look(value, 100.0) is None


def test_a_copy_that_awaits_an_answer_is_good_again_with_the_answer() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    assert awaiting(table, ANN, 105.0 - MICROSECOND) is None
    assert awaiting(table, ANN, 105.0) is table.known(ANN[KEY])
    line.confirm(105.0)
    assert awaiting(table, ANN, 105.0) is None
    assert table.look(ANN, 105.0) is not None


def test_nobody_awaits_an_answer_on_a_broken_line() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    line.cut()
    assert awaiting(table, ANN, 106.0) is None
    assert table.look(ANN, 100.0) is None
    assert find(table, ANN, 100.0) is None


def test_a_copy_serves_an_outage_until_exactly_the_end_of_its_grace() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    line.cut()
    assert through_outage(table, ANN, 165.0 - MICROSECOND, 60.0) is table.known(ANN[KEY])
    assert through_outage(table, ANN, 165.0, 60.0) is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table, line: table.changed(ANN[KEY]),
        lambda table, line: table.cut_off(ANN[GROUP], 101.0),
        lambda table, line: table.emptied(101.0),
        lambda table, line: line.void(),
    ],
    ids=["changed", "cut off", "emptied", "another store"],
)
def test_what_was_spoken_against_serves_no_outage(spoil: Callable[[NearTable[Held], Line], None]) -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    assert through_outage(table, ANN, 106.0, 60.0) is not None
    spoil(table, line)
    assert through_outage(table, ANN, 106.0, 60.0) is None
    assert table.look(ANN, 101.0) is None


def test_a_change_throws_away_this_copy_and_no_other() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    fetch(table, BOB, line, 100.0)
    table.changed(ANN[KEY])
    assert table.known(ANN[KEY]) is None
    assert table.look(BOB, 100.0) is not None
    table.changed(b"unknown")
    assert fetch(table, ANN, line, 100.0)
    assert table.look(ANN, 100.0) is not None


def test_a_read_begun_at_the_instant_of_a_cut_does_not_count_and_one_later_does() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 101.0)
    fetch(table, EVE, line, 101.0)
    table.cut_off(ANN[GROUP], 101.0)
    assert table.look(ANN, 101.0) is None
    assert find(table, ANN, 101.0) is None
    assert table.look(EVE, 101.0) is not None, "another subject"
    fetch(table, ANN, line, 101.0)
    assert table.look(ANN, 101.0) is None
    fetch(table, ANN, line, 101.0 + MICROSECOND)
    assert table.look(ANN, 101.0 + MICROSECOND) is not None
    fetch(table, BOB, line, 101.0)
    assert table.look(BOB, 102.0) is None, "the same subject, not read before"


def test_an_earlier_cut_takes_nothing_back_from_a_later_one() -> None:
    table, line = a_table(), a_line()
    table.cut_off(ANN[GROUP], 102.0)
    table.cut_off(ANN[GROUP], 101.0)
    fetch(table, ANN, line, 101.5)
    assert table.look(ANN, 102.0) is None


def test_nothing_read_until_the_emptying_counts_and_everything_read_later_does() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 101.0)
    table.emptied(101.0)
    table.emptied(100.0)
    assert table.look(ANN, 101.0) is None
    assert find(table, ANN, 101.0) is None
    assert awaiting(table, ANN, 106.0) is None
    fetch(table, EVE, line, 101.0)
    assert table.look(EVE, 101.0) is None
    fetch(table, EVE, line, 101.0 + MICROSECOND)
    assert table.look(EVE, 101.0 + MICROSECOND) is not None


@pytest.mark.parametrize(
    "told",
    [
        lambda table: table.changed(ANN[KEY]),
        lambda table: table.cut_off(ANN[GROUP], 101.0),
        lambda table: table.emptied(101.0),
    ],
    ids=["changed", "cut off", "emptied"],
)
def test_a_read_that_a_message_overtook_leaves_no_copy_to_be_believed(told: Callable[[NearTable[Held]], None]) -> None:
    table, line = a_table(), a_line()
    fill = table.begin(ANN[KEY], line, 100.5)
    told(table)
    table.settle(ANN[KEY], fill, a_copy(ANN, fill))
    assert table.look(ANN, 101.0) is None
    assert find(table, ANN, 101.0) is None
    assert through_outage(table, ANN, 101.0, 60.0) is None


def test_a_read_that_a_change_overtook_does_not_spoil_the_next_one() -> None:
    table, line = a_table(), a_line()
    first = table.begin(ANN[KEY], line, 100.0)
    table.changed(ANN[KEY])
    second = table.begin(ANN[KEY], line, 100.5)
    assert not table.settle(ANN[KEY], first, a_copy(ANN, first))
    assert table.settle(ANN[KEY], second, a_copy(ANN, second))
    held = table.look(ANN, 101.0)
    assert held is not None
    assert held.since == 100.5
    table.changed(ANN[KEY])
    assert table.look(ANN, 101.0) is None


def test_a_change_voids_every_read_of_its_session_and_none_of_another() -> None:
    table, line = a_table(), a_line()
    mine = [table.begin(ANN[KEY], line, 100.0) for _ in range(3)]
    others = table.begin(BOB[KEY], line, 100.0)
    table.changed(ANN[KEY])
    assert [fill.void for fill in mine] == [True] * 3
    assert not any(table.settle(ANN[KEY], fill, a_copy(ANN, fill)) for fill in mine)
    assert table.settle(BOB[KEY], others, a_copy(BOB, others))


def test_a_read_that_was_sent_earlier_does_not_replace_one_that_was_sent_later() -> None:
    table, line = a_table(), a_line()
    early = table.begin(ANN[KEY], line, 100.0)
    late = table.begin(ANN[KEY], line, 100.5)
    assert table.settle(ANN[KEY], late, a_copy(ANN, late))
    assert not table.settle(ANN[KEY], early, a_copy(ANN, early))
    held = table.look(ANN, 101.0)
    assert held is not None
    assert held.since == 100.5


def test_a_read_under_a_line_that_was_cut_meanwhile_is_not_kept() -> None:
    table, line = a_table(), a_line()
    fill = table.begin(ANN[KEY], line, 100.0)
    line.cut()
    assert not table.settle(ANN[KEY], fill, a_copy(ANN, fill))
    assert table.known(ANN[KEY]) is None
    assert fetch(table, ANN, a_line(101.0), 101.0)


def test_a_copy_belongs_to_the_line_that_was_up_when_its_read_began_whatever_it_claims() -> None:
    table, old, new = a_table(), a_line(100.0), a_line(101.0)
    fill = table.begin(ANN[KEY], old, 100.0)
    held = a_copy(ANN, fill)
    held.line, held.since = new, 101.0
    assert table.settle(ANN[KEY], fill, held)
    assert (held.line, held.since) == (old, 100.0)
    old.cut()
    assert table.look(ANN, 101.0) is None


def test_a_read_that_brought_nothing_leaves_what_is_there_and_can_be_settled_twice() -> None:
    table, line = a_table(), a_line()
    fetch(table, ANN, line, 100.0)
    fill = table.begin(ANN[KEY], line, 101.0)
    assert not table.settle(ANN[KEY], fill, None)
    assert not table.settle(ANN[KEY], fill, None)
    assert table.look(ANN, 101.0) is not None


def test_reads_on_their_way_are_forgotten_when_they_are_settled() -> None:
    table, line = a_table(), a_line()
    fill = table.begin(ANN[KEY], line, 100.0)
    table.settle(ANN[KEY], fill, None)
    table.changed(ANN[KEY])
    assert not fill.void, "nobody remembers it"


# -- marks -----------------------------------------------------------------------------------------------------------


def test_a_copy_counts_only_while_the_word_of_its_slot_is_the_one_it_was_read_under() -> None:
    marks = array("Q", [2, 4])
    table, line = a_table(), a_line(marks=marks)
    assert fetch(table, ANN, line, 100.0, slot=1)
    marks[0] += 1
    assert table.look(ANN, 100.0) is not None, "another slot"
    marks[1] += 1
    for answer in (table.look(ANN, 100.0), find(table, ANN, 100.0), awaiting(table, ANN, 106.0)):
        assert answer is None
    assert through_outage(table, ANN, 106.0, 60.0) is None
    marks[1] += 1
    assert table.look(ANN, 100.0) is None
    assert fetch(table, ANN, line, 101.0, slot=1)
    assert table.look(ANN, 101.0) is not None


def test_a_read_that_began_while_somebody_wrote_is_not_kept() -> None:
    marks = array("Q", [3])
    table, line = a_table(), a_line(marks=marks)
    assert not fetch(table, ANN, line, 100.0)
    fill = table.begin(ANN[KEY], line, 100.0)
    marks[0] = 4
    assert not table.settle(ANN[KEY], fill, a_copy(ANN, fill))


@pytest.mark.parametrize("after", [3, 4])
def test_a_read_around_which_somebody_wrote_is_not_kept(after: int) -> None:
    marks = array("Q", [2])
    table, line = a_table(), a_line(marks=marks)
    fill = table.begin(ANN[KEY], line, 100.0)
    marks[0] = after
    assert not table.settle(ANN[KEY], fill, a_copy(ANN, fill))
    assert table.known(ANN[KEY]) is None


# -- bounds ----------------------------------------------------------------------------------------------------------


def credentials(count: int) -> list[bytes]:
    return [b"g1%c%c-secret" % divmod(number, 256) for number in range(count)]


def kept(table: NearTable[Held], each: Sequence[bytes]) -> list[int]:
    return [number for number, credential in enumerate(each) if table.known(credential[KEY]) is not None]


def test_a_full_table_forgets_the_copy_that_came_first() -> None:
    table, line, many = a_table(entries=3), a_line(), credentials(5)
    for credential in many:
        assert fetch(table, credential, line, 100.0, size=10)
        assert len(table) <= 3
    assert kept(table, many) == [2, 3, 4]
    assert table.size == 30


def test_octets_are_a_bound_of_their_own_met_exactly() -> None:
    table, line, many = a_table(octets=100), a_line(), credentials(4)
    fetch(table, many[0], line, 100.0, size=50)
    fetch(table, many[1], line, 100.0, size=50)
    assert (table.size, kept(table, many)) == (100, [0, 1])
    fetch(table, many[2], line, 100.0, size=1)
    assert (table.size, kept(table, many)) == (51, [1, 2])
    fetch(table, many[1], line, 101.0, size=99)
    assert (table.size, kept(table, many)) == (100, [1, 2])


def test_a_copy_larger_than_the_whole_table_pushes_nobody_out() -> None:
    table, line, many = a_table(octets=100), a_line(), credentials(3)
    fetch(table, many[0], line, 100.0, size=50)
    assert not fetch(table, many[1], line, 100.0, size=101)
    assert kept(table, many) == [0]
    assert fetch(table, many[2], line, 100.0, size=100)
    assert kept(table, many) == [2]


def test_what_was_used_gets_a_second_chance_against_a_crowd_that_comes_once() -> None:
    table, line, many = a_table(entries=4), a_line(), credentials(40)
    for credential in many[:4]:
        fetch(table, credential, line, 100.0)
    for credential in many[4:]:
        assert table.look(many[1], 100.0) is not None
        fetch(table, credential, line, 100.0)
    assert kept(table, many) == [1, 37, 38, 39]


def test_looking_closely_spares_nobody() -> None:
    table, line, many = a_table(entries=2), a_line(), credentials(3)
    fetch(table, many[0], line, 100.0)
    fetch(table, many[1], line, 100.0)
    assert find(table, many[0], 100.0) is not None
    fetch(table, many[2], line, 100.0)
    assert kept(table, many) == [1, 2]


def test_a_copy_that_had_to_give_way_at_once_is_not_said_to_be_kept() -> None:
    table, line, many = a_table(entries=2), a_line(), credentials(3)
    for credential in many[:2]:
        fetch(table, credential, line, 100.0)
        table.look(credential, 100.0)
    assert fetch(table, many[2], line, 100.0) is (table.known(many[2][KEY]) is not None)
    assert len(table) == 2


def test_one_fill_walks_a_bounded_part_of_a_table_that_is_all_in_use() -> None:
    table, line, many = a_table(entries=200), a_line(), credentials(201)
    for credential in many[:200]:
        fetch(table, credential, line, 100.0)
        table.look(credential, 100.0)
    assert fetch(table, many[200], line, 100.0)
    spared = [held for held in map(table.known, (each[KEY] for each in many)) if held is not None and not held.used]
    assert len(spared) == 16 + 1, "sixteen lost their second chance, and the new one was never used"
    assert len(table) == 200


def test_a_session_that_changes_all_the_time_is_kept_each_time_and_pushes_nobody_out() -> None:
    table, line, many = a_table(entries=4), a_line(), credentials(4)
    for credential in many:
        fetch(table, credential, line, 100.0)
    for _ in range(100):
        table.changed(many[0][KEY])
        assert fetch(table, many[0], line, 100.0)
        assert table.look(many[0], 100.0) is not None
    assert kept(table, many) == [0, 1, 2, 3]
    assert (len(table), table.size) == (4, 4)


def test_changes_and_invented_keys_take_no_place_without_end() -> None:
    table, line, many = a_table(entries=4), a_line(), credentials(500)
    for credential in many:
        table.changed(credential[KEY])
        table.look(credential, 100.0)
    assert len(table) == 0
    for credential in many:
        fetch(table, credential, line, 100.0)
        table.changed(credential[KEY])
        assert len(table) <= 4
    assert table.size == 0


def test_octets_are_counted_right_when_copies_are_replaced_changed_and_pushed_out() -> None:
    table, line, many = a_table(entries=3), a_line(), credentials(6)
    for turn, credential in enumerate(many * 3):
        fetch(table, credential, line, 100.0 + turn, size=turn + 1)
        if turn % 4 == 0:
            table.changed(credential[KEY])
        there = [held for held in map(table.known, (each[KEY] for each in many)) if held is not None]
        assert table.size == sum(held.size for held in there)
        assert len(there) <= 3


def test_a_full_collection_does_not_visit_the_copies() -> None:
    line = a_line()
    held = a_copy(ANN, Fill(line, 100.0, 0))
    assert not gc.is_tracked(held)


def test_threads_that_fill_look_and_change_at_once_leave_the_table_in_order() -> None:
    table, line, many = a_table(entries=20, octets=150), a_line(span=FOR_EVER), credentials(40)
    barrier = threading.Barrier(8)
    wrong: list[object] = []

    def work(number: int) -> None:
        barrier.wait()
        for turn in range(1500):
            credential = many[(turn * 7 + number * 13) % 40]
            held = table.look(credential, 100.0)
            if held is not None and held.digest != digest(credential):
                wrong.append(held)
            match (turn + number) % 5:
                case 0:
                    table.changed(credential[KEY])
                case _:
                    fetch(table, credential, line, 100.0, size=10)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = [held for held in map(table.known, (each[KEY] for each in many)) if held is not None]
    assert not wrong
    assert len(table) <= 20
    assert table.size == 10 * len(there) <= 150
    for credential in many:
        table.changed(credential[KEY])
    assert table.size == 0
