"""Checks of rate limits: exactly as many as allowed, regained evenly, keys apart from each other."""

from __future__ import annotations

from functools import partial
from typing import Final

from coatcheck.core.ports import Hit, RateLimit
from coatcheck.core.session import SECOND_US
from coatcheck.stores.conformance.bench import DAY_US, HOUR_US, MINUTE_US, Bench, agree, hold

SLOW: Final = RateLimit(attempts=5, period=5 * 3600.0)
"""One attempt is regained an hour: no machine is so slow that it matters."""


async def check_exactly_the_limit_passes_at_once(bench: Bench) -> None:
    """Of fifty simultaneous hits as many pass as the limit says (and each knows what is left)."""
    answers = await bench.gather([partial(bench.either(n).hit, "login:ann", SLOW) for n in range(50)])
    passed = [each for each in answers if each.allowed]
    agree(len(passed), 5, "hits that passed")
    agree(sorted(each.remaining for each in passed), [0, 1, 2, 3, 4], "what was left for those that passed")
    agree({each.remaining for each in answers if not each.allowed}, {0}, "what was left for the others")


async def check_a_limit_that_does_not_divide_is_exact(bench: Bench) -> None:
    """Rounding neither gives an attempt away nor takes one."""
    for attempts, period in ((3, 1000.0), (7, 3600.0), (1, 3600.0), (11, 86400.0)):
        limit = RateLimit(attempts=attempts, period=period)
        answers = [await bench.store.hit(f"key-{attempts}", limit) for _ in range(attempts + 2)]
        agree([each.allowed for each in answers], [True] * attempts + [False] * 2, f"{attempts} attempts")


async def check_attempts_are_regained_evenly(bench: Bench) -> None:
    """A refused caller is told when to come again: before that it is refused, then one attempt passes."""
    for _ in range(5):
        await bench.store.hit("key", SLOW)
    refused = await bench.store.hit("key", SLOW)
    agree(refused.allowed, False, "a sixth hit passed")
    hold(3590 < refused.retry_after <= 3600, f"an attempt is regained in an hour, not in {refused.retry_after} s")
    # A clock that runs on is approached to a second; a stopped one to the microsecond.
    margin = 1 if bench.stopped else SECOND_US
    bench.advance(round(refused.retry_after * SECOND_US) - margin)
    again = await bench.store.hit("key", SLOW)
    agree(again.allowed, False, "a hit before the time passed")
    hold(again.retry_after > 0, "a refusal says when to come again")
    bench.advance(margin)
    agree((await bench.other.hit("key", SLOW)).allowed, True, "a hit at the time passed")
    agree((await bench.store.hit("key", SLOW)).allowed, False, "one more hit passed")


async def check_a_refused_hit_costs_nothing(bench: Bench) -> None:
    """Knocking at a closed door does not keep it closed longer."""
    for _ in range(5):
        await bench.store.hit("key", SLOW)
    for _ in range(20):
        await bench.store.hit("key", SLOW)
        bench.advance(MINUTE_US)
    bench.advance(40 * MINUTE_US)
    agree((await bench.store.hit("key", SLOW)).allowed, True, "a hit after an hour passed")


async def check_a_whole_period_regains_everything(bench: Bench) -> None:
    """After a quiet period the full number passes again, and not more, however many others are counted."""
    for number in range(100):
        await bench.store.hit(f"other {number}", SLOW)
    for _ in range(5):
        await bench.store.hit("key", SLOW)
    bench.advance(5 * HOUR_US)
    answers = [await bench.store.hit("key", SLOW) for _ in range(6)]
    agree([each.allowed for each in answers], [True] * 5 + [False], "hits after a period")
    bench.advance(30 * DAY_US)
    answers = [await bench.store.hit("key", SLOW) for _ in range(6)]
    agree([each.allowed for each in answers], [True] * 5 + [False], "hits after a month")


async def check_cost_is_taken_whole_or_not_at_all(bench: Bench) -> None:
    """A dear attempt that does not fit leaves room for a cheap one."""
    first = await bench.store.hit("key", SLOW, cost=3)
    agree((first.allowed, first.remaining), (True, 2), "three of five")
    second = await bench.store.hit("key", SLOW, cost=3)
    agree((second.allowed, second.remaining), (False, 2), "three more")
    third = await bench.store.hit("key", SLOW, cost=2)
    agree((third.allowed, third.remaining), (True, 0), "the last two")
    agree((await bench.store.hit("dear", SLOW, cost=6)).allowed, False, "more than the limit at once passed")
    agree((await bench.store.hit("dear", SLOW, cost=5)).allowed, True, "the whole limit at once passed")


async def check_keys_do_not_touch_each_other(bench: Bench) -> None:
    """Any text is a key of its own: separators, wildcards, NUL, other scripts and 200 characters."""
    keys = ["a", "A", "a ", "{a}", "a:b", "a:{b}", "*", "é", "e\u0301", "☃" * 200, "x" * 199, "x" * 200, "a\x00b", ""]
    limit = RateLimit(attempts=1, period=3600.0)
    for key in keys:
        agree((await bench.store.hit(key, limit)).allowed, True, f"the first hit of {key[:10]!r} passed")
    for key in keys:
        agree((await bench.other.hit(key, limit)).allowed, False, f"the second hit of {key[:10]!r} passed")


async def check_clear_forgets_one_key(bench: Bench) -> None:
    """Success clears its own attempts only; clearing what was never counted is fine."""
    limit = RateLimit(attempts=1, period=3600.0)
    for key in ("ann", "bob"):
        await bench.store.hit(key, limit)
    await bench.other.clear("ann")
    await bench.store.clear("never")
    answers: list[Hit] = [await bench.store.hit(key, limit) for key in ("ann", "bob")]
    agree([each.allowed for each in answers], [True, False], "hits after clearing one")


CHECKS: Final = (
    check_exactly_the_limit_passes_at_once,
    check_a_limit_that_does_not_divide_is_exact,
    check_attempts_are_regained_evenly,
    check_a_refused_hit_costs_nothing,
    check_a_whole_period_regains_everything,
    check_cost_is_taken_whole_or_not_at_all,
    check_keys_do_not_touch_each_other,
    check_clear_forgets_one_key,
)
