"""Who gives way to a new session, and what is left in their place."""

from __future__ import annotations

import pytest

from coatcheck.core.admission import cause_of, giving_way, reason_of_eviction
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Choice, OnLimit

ALIVE = tuple(SessionRef(7, handle) for handle in ("old", "mid", "new"))


@pytest.mark.parametrize(
    ("on_limit", "maximum", "leaving"),
    [
        ("allow", 1, ()),
        ("evict_oldest", 4, ()),
        ("evict_oldest", 3, ALIVE[:1]),
        ("evict_oldest", 1, ALIVE),
        ("refuse", 4, ()),
        ("refuse", 3, None),
        ("ask", 4, ()),
        ("ask", 3, None),
    ],
)
def test_without_a_choice_the_limit_answers(
    on_limit: OnLimit, maximum: int, leaving: tuple[SessionRef, ...] | None
) -> None:
    assert giving_way(ALIVE, maximum=maximum, on_limit=on_limit, choice=None) == leaving


@pytest.mark.parametrize(
    ("shown", "ending", "maximum", "leaving"),
    [
        ("old mid new", "mid", 3, ALIVE[1:2]),
        ("old mid new", "new mid", 2, ALIVE[1:]),
        ("old mid new", "mid", 2, None),
        ("old mid new", "", 4, ()),
        ("old mid new", "", 3, None),
        ("old mid", "mid", 9, None),
        ("old mid new gone", "mid", 9, None),
        ("old mid new", "mid gone", 9, None),
        ("", "", 9, None),
    ],
)
def test_a_choice_counts_only_for_the_sessions_that_were_shown(
    shown: str, ending: str, maximum: int, leaving: tuple[SessionRef, ...] | None
) -> None:
    choice = Choice(shown=frozenset(shown.split()), ending=frozenset(ending.split()))
    assert giving_way(ALIVE, maximum=maximum, on_limit="evict_oldest", choice=choice) == leaving


@pytest.mark.parametrize("network", [None, "203.0.113.7", "2001:db8::7"])
def test_a_tombstone_tells_where_the_sign_in_came_from_that_took_the_place(network: str | None) -> None:
    assert cause_of(reason_of_eviction(network)) == ("session_limit", network)


@pytest.mark.parametrize("reason", ["logout", "moved from Seoul", "session_limit from ", " from x", ""])
def test_any_other_reason_is_left_as_it_is(reason: str) -> None:
    assert cause_of(reason) == (reason, None)
