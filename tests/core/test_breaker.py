from __future__ import annotations

import contextlib
import threading
from math import inf, nextafter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from coatcheck.core.breaker import FAILURES, PATIENCE_SECONDS, REST_SECONDS, Breaker, is_fair

START = 1000.0


def breaker() -> Breaker:
    return Breaker(contextlib.nullcontext())


def opened(at: float = START) -> Breaker:
    made = breaker()
    for _ in range(FAILURES):
        era = made.enter(at)
        assert era is not None
        made.failed(era, at)
    assert made.since == at
    return made


def passing(made: Breaker, now: float, *, urgent: bool = False) -> int:
    era = made.enter(now, urgent=urgent)
    assert era is not None
    return era


def is_open(made: Breaker) -> bool:
    return made.since is not None


def just_before(moment: float) -> float:
    return nextafter(moment, -inf)


# -- opening -------------------------------------------------------------------------------------------------------


def test_the_third_failure_in_a_row_opens_it_and_the_second_does_not() -> None:
    made = breaker()
    for _ in range(FAILURES - 1):
        made.failed(passing(made, START), START)
    assert not is_open(made)
    made.failed(passing(made, START), START + 7.0)
    assert made.since == START + 7.0
    assert made.enter(START + 7.0) is None


def test_an_answer_in_between_begins_the_count_anew() -> None:
    made = breaker()
    for _ in range(5):
        for _ in range(FAILURES - 1):
            made.failed(passing(made, START), START)
        made.answered()
    assert made.since is None


def test_calls_that_passed_together_open_it_once_and_do_not_make_it_rest_longer() -> None:
    made = breaker()
    eras = [passing(made, START) for _ in range(50)]
    for number, era in enumerate(eras):
        made.failed(era, START + 2.0 + number / 1000)
    third = START + 2.0 + (FAILURES - 1) / 1000
    assert made.since == third
    assert made.enter(just_before(third + REST_SECONDS)) is None
    passing(made, third + REST_SECONDS)


def test_a_call_that_had_no_time_to_be_answered_opens_nothing() -> None:
    # One primary is away and takes a request's time; the healthy one it asks next gets a millisecond.
    made = breaker()
    for _ in range(10):
        made.failed(passing(made, START), START, fair=False)
    assert made.since is None
    # Nor does it undo what others have seen.
    for _ in range(FAILURES):
        made.failed(passing(made, START), START, fair=False)
        made.failed(passing(made, START), START)
    assert made.since == START


@pytest.mark.parametrize(("granted", "fair"), [(2.0, True), (0.5, True), (just_before(0.5), False), (0.0, False)])
def test_a_quarter_of_the_deadline_is_fair(granted: float, fair: bool) -> None:
    assert is_fair(granted, 2.0) is fair


# -- half open -----------------------------------------------------------------------------------------------------


def test_after_its_rest_one_call_passes_and_every_other_is_refused_at_once() -> None:
    made = opened()
    assert made.enter(just_before(START + REST_SECONDS)) is None
    passing(made, START + REST_SECONDS)
    for later in (START + REST_SECONDS, START + 1.0, just_before(START + REST_SECONDS + PATIENCE_SECONDS)):
        assert made.enter(later) is None


def test_an_answer_to_the_probe_closes_it() -> None:
    made = opened()
    passing(made, START + REST_SECONDS)
    made.answered()
    assert made.since is None
    for _ in range(FAILURES - 1):
        made.failed(passing(made, START + 1), START + 1)
    assert made.since is None, "and the count begins anew"


def test_a_probe_without_an_answer_lets_it_rest_again_and_it_stays_open_since_the_first_time() -> None:
    made = opened()
    now = START
    for _ in range(4):
        now += REST_SECONDS
        probe = passing(made, now)
        now += 0.25
        made.failed(probe, now, fair=False)
        assert made.since == START
        assert made.enter(just_before(now + REST_SECONDS)) is None


def test_a_probe_whose_caller_left_gives_its_place_to_the_next_at_once() -> None:
    made = opened()
    now = START + REST_SECONDS
    made.left(passing(made, now))
    probe = passing(made, now)
    assert made.enter(now) is None
    # Who left says so once; a second word is not about the probe that runs now.
    made.left(probe - 1)
    assert made.enter(now) is None


def test_a_probe_that_never_reports_does_not_keep_the_next_one_out_for_ever() -> None:
    made = opened()
    first = passing(made, START + REST_SECONDS)
    late = START + REST_SECONDS + PATIENCE_SECONDS
    assert made.enter(just_before(late)) is None
    second = passing(made, late)
    # The one that was taken for lost fails after all: that is not the word of the probe that runs now.
    made.failed(first, late + 0.1)
    assert made.enter(late + 0.1 + REST_SECONDS) is None, "the second probe is still on its way"
    made.failed(second, late + 0.2)
    passing(made, late + 0.2 + REST_SECONDS)


def test_an_answer_closes_it_whoever_gets_it() -> None:
    made = breaker()
    slow = passing(made, START)
    for _ in range(FAILURES):
        made.failed(passing(made, START), START)
    assert is_open(made)
    made.answered()
    assert not is_open(made)
    # What was sent before, and fails only now, is old news.
    for _ in range(FAILURES):
        made.failed(slow, START + 1)
    assert not is_open(made)


def test_a_probe_that_fails_after_it_was_closed_by_another_answer_is_old_news() -> None:
    made = opened()
    probe = passing(made, START + REST_SECONDS)
    made.answered()
    made.failed(probe, START + 1)
    for _ in range(FAILURES - 1):
        made.failed(passing(made, START + 1), START + 1)
    assert not is_open(made)


def test_leaving_a_closed_breaker_counts_for_nothing() -> None:
    made = breaker()
    made.failed(passing(made, START), START)
    made.failed(passing(made, START), START)
    made.left(passing(made, START))
    made.failed(passing(made, START), START)
    assert made.since == START


# -- urgent calls --------------------------------------------------------------------------------------------------


def test_an_urgent_call_passes_a_breaker_that_rests_as_its_probe() -> None:
    made = opened()
    probe = passing(made, START, urgent=True)
    assert made.enter(START + REST_SECONDS) is None, "one probe at a time"
    made.failed(probe, START + 0.8)
    assert made.enter(just_before(START + 0.8 + REST_SECONDS)) is None
    passing(made, START + 0.8, urgent=True)
    made.answered()
    assert made.since is None


def test_an_urgent_call_takes_over_from_a_probe_that_is_not() -> None:
    made = opened()
    ordinary = passing(made, START + REST_SECONDS)
    urgent = passing(made, START + REST_SECONDS, urgent=True)
    assert made.enter(START + REST_SECONDS, urgent=True) is None, "but not from one that is"
    made.failed(ordinary, START + 1.0)
    assert made.enter(START + 1.0, urgent=True) is None
    made.failed(urgent, START + 1.2)
    passing(made, START + 1.2, urgent=True)


def test_an_urgent_probe_that_was_left_does_not_end_the_rest() -> None:
    made = opened()
    made.left(passing(made, START, urgent=True))
    assert made.enter(just_before(START + REST_SECONDS)) is None
    passing(made, START + REST_SECONDS)


def test_an_urgent_call_finds_a_closed_breaker_as_others_do() -> None:
    made = breaker()
    assert passing(made, START, urgent=True) == passing(made, START)


# -- threads -------------------------------------------------------------------------------------------------------


def test_of_many_threads_one_is_the_probe() -> None:
    made = Breaker(threading.Lock())
    for _ in range(FAILURES):
        made.failed(passing(made, START), START)
    together = threading.Barrier(8)
    passed: list[int] = []

    def ask(now: float) -> None:
        together.wait(timeout=10)
        era = made.enter(now)
        if era is not None:
            passed.append(era)

    for round_ in range(20):
        now = START + (round_ + 1) * PATIENCE_SECONDS
        threads = [threading.Thread(target=ask, args=(now,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(passed) == round_ + 1


# -- the property --------------------------------------------------------------------------------------------------


class Calls(RuleBasedStateMachine):
    """Calls that begin, end, fail, are cancelled or are never heard of again, against what was promised.

    The promise is kept here as a history, not as states: when a call was refused, and when a probe was let through.
    """

    running = Bundle("running")

    @initialize()
    def begin(self) -> None:
        self.breaker = breaker()
        self.now = START
        self.row = 0
        """Fair failures in a row, of calls that passed since the last answer."""
        self.turns = 0
        """How often it has opened and closed."""
        self.opened: float | None = None
        self.failed_at = -inf
        self.probe: tuple[int, float, bool] | None = None

    @rule(seconds=st.sampled_from([0.001, 0.1, REST_SECONDS / 2, REST_SECONDS, PATIENCE_SECONDS, 5.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=running, urgent=st.booleans())
    def call(self, urgent: bool) -> tuple[int, int] | None:
        era = self.breaker.enter(self.now, urgent=urgent)
        if self.opened is None:
            assert era is not None, "a closed breaker refuses nobody"
            return (era, self.turns)
        if self.probe is not None:
            _, sent, was_urgent = self.probe
            free = self.now >= sent + PATIENCE_SECONDS or (urgent and not was_urgent)
        else:
            free = urgent or self.now >= self.failed_at + REST_SECONDS
        assert (era is not None) is free
        if era is None:
            return None
        self.probe = (era, self.now, urgent)
        return (era, self.turns)

    @rule(one=consumes(running))
    def is_answered(self, one: tuple[int, int] | None) -> None:
        if one is not None:
            self.heard()

    @rule(one=consumes(running), fair=st.booleans())
    def fails(self, one: tuple[int, int] | None, fair: bool) -> None:
        if one is None:
            return
        era, turns = one
        self.breaker.failed(era, self.now, fair=fair)
        if self.opened is not None:
            if self.probe is not None and self.probe[0] == era:
                self.probe, self.failed_at = None, self.now
        elif turns == self.turns:
            self.row += fair
            if self.row == FAILURES:
                self.opened = self.failed_at = self.now
                self.turns += 1

    @rule(one=consumes(running))
    def is_cancelled(self, one: tuple[int, int] | None) -> None:
        if one is not None:
            self.breaker.left(one[0])
            if self.probe is not None and self.probe[0] == one[0]:
                self.probe = None

    @precondition(lambda self: self.opened is not None)
    @rule()
    def is_found_again_by_whoever_keeps_asking(self) -> None:
        # However it got here: within the patience and the rest, somebody who asks every 100 ms passes.
        for _ in range(round((PATIENCE_SECONDS + REST_SECONDS) * 10) + 1):
            era = self.breaker.enter(self.now)
            if era is not None:
                break
            self.now += 0.1
        else:
            raise AssertionError("nobody was let through")
        self.heard()

    @invariant()
    def tells_since_when(self) -> None:
        if hasattr(self, "breaker"):
            assert self.breaker.since == self.opened

    def heard(self) -> None:
        self.breaker.answered()
        self.turns += self.opened is not None
        self.row, self.opened, self.probe = 0, None, None


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
