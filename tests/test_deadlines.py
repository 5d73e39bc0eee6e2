"""One deadline for all the store work of a request, in threads and tasks, nested and left again."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time

import pytest

from coatcheck.deadlines import Allowance, is_urgent, outside, time_left, within
from coatcheck.errors import StoreUnavailable

USED_UP = "the request has used up its time for the store"


def test_without_a_request_a_verb_has_its_own_time() -> None:
    assert time_left(2.0) == 2.0
    assert not is_urgent()


def test_a_verb_has_what_is_left_of_the_request_and_never_more_than_its_own_time() -> None:
    with within(time.monotonic() + 1.0):
        assert time_left(0.25) == 0.25
        assert 0.5 < time_left(2.0) <= 1.0
    assert time_left(2.0) == 2.0


def test_at_the_very_end_nothing_is_left() -> None:
    # The clock is read again inside: it is at this moment exactly, or a tick later.
    with within(time.monotonic()), pytest.raises(StoreUnavailable, match=USED_UP) as caught:
        time_left(2.0)
    assert caught.value.retry_after == 1


def test_a_request_whose_time_is_over_has_none_for_the_shortest_verb() -> None:
    with within(time.monotonic() - 60.0), pytest.raises(StoreUnavailable, match=USED_UP):
        time_left(0.001)


def test_inside_another_the_earlier_end_holds() -> None:
    soon, late = time.monotonic() + 1.0, time.monotonic() + 50.0
    with within(soon), within(late):
        assert time_left(60.0) <= 1.0, "a handler cannot give itself more time"
    with within(late), within(soon):
        assert time_left(60.0) <= 1.0
    with within(soon):
        with within(None):
            assert time_left(60.0) <= 1.0
        with within(soon - 60.0), pytest.raises(StoreUnavailable):
            time_left(60.0)
        assert 0 < time_left(60.0) <= 1.0, "and what was inside is over"


def test_urgency_covers_what_is_inside_and_nothing_after() -> None:
    with within(None, urgent=True):
        assert is_urgent()
        assert time_left(2.0) == 2.0
        with within(time.monotonic() + 1.0):
            assert is_urgent()
    assert not is_urgent()
    with within(time.monotonic() + 1.0):
        assert not is_urgent()
        with within(None, urgent=True):
            assert is_urgent()
            assert time_left(60.0) <= 1.0, "urgent work has no more time than its request"
        assert not is_urgent()


def test_an_exception_leaves_nothing_behind() -> None:
    with pytest.raises(LookupError), within(time.monotonic() - 1.0, urgent=True):
        raise LookupError
    assert time_left(2.0) == 2.0
    assert not is_urgent()


def test_what_outlives_the_request_is_outside_of_it() -> None:
    with within(time.monotonic() - 1.0, urgent=True):
        with outside():
            assert time_left(2.0) == 2.0
            assert not is_urgent()
            with within(time.monotonic() + 1.0):
                assert time_left(60.0) <= 1.0
        assert is_urgent()
        with pytest.raises(StoreUnavailable):
            time_left(2.0)


def test_a_thread_does_not_share_the_time_of_another() -> None:
    found: list[float] = []
    with within(time.monotonic() - 1.0):
        # A context of its own, which is what a thread has by default before Python 3.14.
        alone = threading.Thread(target=lambda: contextvars.Context().run(lambda: found.append(time_left(2.0))))
        alone.start()
        alone.join()
    assert found == [2.0]


@pytest.mark.anyio
async def test_tasks_side_by_side_have_their_own_time_and_children_that_of_their_parent() -> None:
    both = asyncio.Barrier(2)

    async def child() -> float:
        return time_left(60.0)

    async def request(seconds: float) -> tuple[float, float]:
        with within(time.monotonic() + seconds):
            await both.wait()
            own = time_left(60.0)
            inherited = await asyncio.create_task(child())
            await both.wait()
            return own, inherited

    (short, short_child), (long, long_child) = await asyncio.gather(request(1.0), request(50.0))
    assert 0 < short <= 1.0 < long <= 50.0
    assert 0 < short_child <= 1.0 < long_child <= 50.0
    assert time_left(60.0) == 60.0


@pytest.mark.anyio
async def test_a_task_that_is_started_outside_does_not_end_with_the_request() -> None:
    async def keeper() -> tuple[float, bool]:
        return time_left(2.0), is_urgent()

    with within(time.monotonic() - 1.0, urgent=True), outside():
        task = asyncio.create_task(keeper())
    assert await task == (2.0, False)


@pytest.mark.anyio
async def test_an_exit_in_another_context_than_the_entry_is_fine() -> None:
    # A framework may open and close what surrounds a handler in two tasks.
    scope = within(time.monotonic() + 1.0)

    async def enter() -> None:
        scope.__enter__()

    async def leave() -> bool:
        scope.__exit__(None, None, None)
        return time_left(60.0) == 60.0

    await asyncio.create_task(enter())
    assert await asyncio.create_task(leave())


# -- in pieces -----------------------------------------------------------------------------------------------------


def test_what_one_piece_used_the_next_one_lacks() -> None:
    allowance = Allowance(50.0)
    with allowance.piece():
        first = time_left(60.0)
        assert 49.0 < first <= 50.0
        at_the_end = time_left(60.0)
    with allowance.piece():
        assert time_left(60.0) <= at_the_end
        assert time_left(2.0) == 2.0
    assert time_left(60.0) == 60.0, "between the pieces nothing is bounded"


def test_an_allowance_that_is_used_up_stays_so() -> None:
    allowance = Allowance(1e-9)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match=USED_UP), allowance.piece():
            time_left(2.0)
    assert time_left(2.0) == 2.0


def test_a_piece_within_a_piece_is_part_of_it() -> None:
    allowance = Allowance(50.0)
    with allowance.piece():
        with allowance.piece():
            assert 49.0 < time_left(60.0) <= 50.0
        assert 49.0 < time_left(60.0) <= 50.0, "and its end does not end the outer one"
    assert time_left(60.0) == 60.0


def test_an_allowance_gives_no_more_than_its_surroundings() -> None:
    with within(time.monotonic() + 1.0, urgent=True), Allowance(50.0).piece():
        assert time_left(60.0) <= 1.0
        assert is_urgent()


def test_a_task_that_ends_its_piece_before_another_leaves_nothing_behind() -> None:
    """Two tasks of one request: whoever comes last must not leave its deadline with the other for life."""
    allowance = Allowance(50.0)

    async def request() -> None:
        entered, leave = asyncio.Event(), asyncio.Event()

        async def helper() -> None:
            with allowance.piece():
                entered.set()
                await leave.wait()

        with allowance.piece():
            task = asyncio.create_task(helper())
            await entered.wait()
        assert time_left(90.0) == 90.0, "this task's piece is over"
        leave.set()
        await task
        assert time_left(90.0) == 90.0

    asyncio.run(request())
