"""What was decided about other places of a session holds for every node. SEMANTICS 8."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.binding import (
    MAX_PLACES,
    OBSERVE_EVERY_US,
    OUTCOMES,
    Outcome,
    Place,
    Places,
    add_family,
    decision_at,
    observe,
    prove,
    severity,
)
from coatcheck.errors import ValueRefused

NOW = 1_800_000_000_000_000
BLOCK = 900_000_000
THIEF = Place(four=b"p\x01\x02\x03").pack()


def place(number: int) -> bytes:
    return Place(four=b"p\x0a\0" + bytes((number,))).pack()


def after(outcome: Outcome, *numbers: int, before: Places | None = None) -> Places:
    """These places, decided about one after the other."""
    places = before or Places()
    for number in numbers:
        places = observe(places, place(number), outcome=outcome, now_us=NOW + number, block_us=BLOCK).places
    return places


def test_one_of_many_observers_decides_and_the_others_get_its_decision() -> None:
    first = observe(Places(), THIEF, outcome="block", now_us=NOW, block_us=BLOCK)
    assert (first.outcome, first.until_us, first.decided) == ("block", NOW + BLOCK, True)
    second = observe(first.places, THIEF, outcome="block", now_us=NOW + 5, block_us=BLOCK)
    assert (second.outcome, second.until_us, second.decided) == ("block", NOW + BLOCK, False)
    assert second.places is first.places


def test_a_mild_decision_of_another_node_does_not_replace_a_sterner_one() -> None:
    blocked = observe(Places(), THIEF, outcome="block", now_us=NOW, block_us=BLOCK).places
    again = observe(blocked, THIEF, outcome="notify", now_us=NOW + 1, block_us=BLOCK)
    assert (again.outcome, again.decided) == ("block", False)
    sterner = observe(blocked, THIEF, outcome="revoke", now_us=NOW + 1, block_us=BLOCK)
    assert (sterner.outcome, sterner.decided) == ("revoke", True)


def test_a_block_ends_at_its_very_microsecond() -> None:
    blocked = observe(Places(), THIEF, outcome="block", now_us=NOW, block_us=BLOCK).places
    at_end = NOW + BLOCK
    assert decision_at(blocked, THIEF, matches=False, least="block", now_us=at_end - 1) == "block"
    assert decision_at(blocked, THIEF, matches=False, least="block", now_us=at_end) is None
    assert not observe(blocked, THIEF, outcome="block", now_us=at_end - 1, block_us=BLOCK).decided
    assert observe(blocked, THIEF, outcome="block", now_us=at_end, block_us=BLOCK).decided


def test_within_a_minute_a_known_place_writes_nothing() -> None:
    told = observe(Places(), THIEF, outcome="notify", now_us=NOW, block_us=BLOCK).places
    just_before = observe(told, THIEF, outcome="notify", now_us=NOW + OBSERVE_EVERY_US - 1, block_us=BLOCK)
    assert just_before.places is told
    then = observe(told, THIEF, outcome="notify", now_us=NOW + OBSERVE_EVERY_US, block_us=BLOCK)
    assert then.places.known[0].seen_us == NOW + OBSERVE_EVERY_US
    assert (then.places.known[0].decided_us, then.decided) == (NOW, False)


def test_the_owner_is_asked_for_the_password_when_a_copied_cookie_was_blocked_and_stays_in() -> None:
    blocked = observe(Places(), THIEF, outcome="block", now_us=NOW, block_us=BLOCK).places
    assert decision_at(blocked, place(1), matches=True, least="block", now_us=NOW) == "step_up"
    proven = prove(blocked, place(1), matches=True, family="4", now_us=NOW + 1)
    assert decision_at(proven, place(1), matches=True, least="block", now_us=NOW + 2) == "allow"
    assert decision_at(proven, THIEF, matches=False, least="block", now_us=NOW + 2) == "block"


def test_a_refused_place_proves_nothing_while_it_is_refused() -> None:
    blocked = observe(Places(), THIEF, outcome="block", now_us=NOW, block_us=BLOCK).places
    assert prove(blocked, THIEF, matches=False, family="4", now_us=NOW + BLOCK - 1) is blocked


def test_a_proof_at_home_does_not_open_the_place_of_a_thief() -> None:
    asked = observe(Places(), THIEF, outcome="step_up", now_us=NOW, block_us=BLOCK).places
    asked = prove(asked, place(1), matches=True, family="4", now_us=NOW + 1)
    assert decision_at(asked, THIEF, matches=False, least="step_up", now_us=NOW + 2) == "step_up"


def test_a_proven_place_stays_open_even_for_a_node_that_has_not_heard_of_it() -> None:
    asked = observe(Places(), THIEF, outcome="step_up", now_us=NOW, block_us=BLOCK).places
    proven = prove(asked, THIEF, matches=False, family="4", now_us=NOW + 1)
    late = observe(proven, THIEF, outcome="step_up", now_us=NOW + 2, block_us=BLOCK)
    assert (late.outcome, late.decided) == ("allow", False)


def test_a_stricter_policy_decides_anew_about_places_of_which_the_owner_was_only_told() -> None:
    told = after("notify", 1)
    assert decision_at(told, place(1), matches=False, least="notify", now_us=NOW) == "notify"
    assert decision_at(told, place(1), matches=False, least="step_up", now_us=NOW) is None


def test_the_ninth_place_takes_that_of_the_one_the_owner_was_told_of_longest_ago() -> None:
    full = after("notify", *range(1, MAX_PLACES), before=after("block", 0))
    ninth = observe(full, THIEF, outcome="notify", now_us=NOW + OBSERVE_EVERY_US + MAX_PLACES, block_us=BLOCK)
    kept = {each.place for each in ninth.places.known}
    assert kept == {place(0), THIEF, *map(place, range(2, MAX_PLACES))}


def test_who_changes_his_user_agent_with_each_request_writes_eight_times_a_minute_and_no_more() -> None:
    places, decided = Places(), 0
    for number in range(100):
        found = observe(places, place(number), outcome="notify", now_us=NOW + number, block_us=BLOCK)
        places, decided = found.places, decided + found.decided
    assert decided == MAX_PLACES
    before = observe(places, THIEF, outcome="notify", now_us=NOW + OBSERVE_EVERY_US - 1, block_us=BLOCK)
    assert (before.outcome, before.full, before.places) == ("notify", True, places)
    assert observe(places, THIEF, outcome="notify", now_us=NOW + OBSERVE_EVERY_US, block_us=BLOCK).decided


def test_a_network_of_a_thief_is_not_the_owners_any_more_after_a_proof_at_home() -> None:
    told, _ = add_family(Places(), "6", "2001:db8:bad::1")
    assert prove(told, place(1), matches=True, family="4", now_us=NOW + 1).networks == ()
    assert prove(told, place(1), matches=True, family="6", now_us=NOW + 1).networks == told.networks


def test_visiting_many_places_does_not_make_a_refused_one_forgotten() -> None:
    full = after("block", *range(MAX_PLACES))
    ninth = observe(full, THIEF, outcome="block", now_us=NOW + 100, block_us=BLOCK)
    assert (ninth.full, ninth.outcome, ninth.decided) == (True, "block", False)
    assert ninth.places.known == full.known
    # Once one has run out, there is room.
    later = observe(full, THIEF, outcome="block", now_us=NOW + BLOCK, block_us=BLOCK)
    assert (later.full, later.decided) == (False, True)


def test_a_thief_at_eight_places_cannot_keep_the_owner_from_proving_himself() -> None:
    full = after("step_up", *range(MAX_PLACES))
    proven = prove(full, THIEF, matches=False, family="4", now_us=NOW + 100)
    assert decision_at(proven, THIEF, matches=False, least="step_up", now_us=NOW + 101) == "allow"
    assert len(proven.known) == MAX_PLACES


def test_of_two_first_appearances_of_a_family_one_is_recorded() -> None:
    places, first = add_family(Places(), "6", "2001:db8::1")
    again, second = add_family(places, "6", "2001:db8:bad::1")
    assert (first, second) == (True, False)
    assert again.networks == (("6", "2001:db8::1"),)


@pytest.mark.parametrize("octets", [b"", b"abc", b"x" * 1000])
def test_what_is_no_place_is_not_kept(octets: bytes) -> None:
    with pytest.raises(ValueRefused):
        observe(Places(), octets, outcome="notify", now_us=NOW, block_us=BLOCK)


steps = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from(OUTCOMES[1:]), st.integers(0, 2 * BLOCK), st.booleans()), max_size=40
)


@given(steps)
def test_never_more_places_than_allowed_never_twice_and_never_milder_than_asked(
    taken: list[tuple[int, Outcome, int, bool]],
) -> None:
    places, now = Places(), NOW
    proven: set[bytes] = set()
    for number, outcome, pause, proves in taken:
        now += pause
        at = place(number)
        found = observe(places, at, outcome=outcome, now_us=now, block_us=BLOCK)
        assert severity(found.outcome) >= severity(outcome) or (found.outcome == "allow" and at in proven)
        places = found.places
        if proves:
            places = prove(places, at, matches=False, family="4", now_us=now)
            proven.add(at)
        assert len(places.known) <= MAX_PLACES
        assert len({each.place for each in places.known}) == len(places.known)
        if not found.full:
            held = decision_at(places, at, matches=False, least=outcome, now_us=now)
            if held is None:
                # Proven after a block had run out, and this policy asks for more than a proof.
                assert proves
                assert outcome == "block"
            else:
                assert severity(held) >= severity(outcome) or (held == "allow" and at in proven)
