"""Rules about risk: exact boundaries, and that a stricter rule never weakens what follows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.binding import OUTCOMES, Outcome, severity
from coatcheck.core.geo import EARTH_RADIUS_KM, Location, distance_km
from coatcheck.core.risk import (
    ACCEPTED,
    EVERYWHERE,
    MAX_ATTEMPTS,
    MAX_COUNTRIES,
    MAX_DEVICES,
    MAX_REFUSALS,
    SIGNALS,
    CountRule,
    History,
    Kind,
    Observation,
    Refusal,
    Rule,
    Rules,
    TravelRule,
    Verdict,
    at_the_door,
    decide,
    explain,
    parse_rules,
    remember,
)
from coatcheck.errors import ConfigurationError

AT = 1_800_000_000.0
OFF: dict[str, Any] = dict.fromkeys(SIGNALS)
SEOUL = Location(country="KR", position=(37.5665, 126.9780), asn=64496)
PARIS = Location(country="FR", position=(48.8566, 2.3522), asn=64497)
ORIGIN = Location(position=(0.0, 0.0))


def only(**rules: Any) -> Rules:
    return Rules(**{**OFF, **rules})


def east(km: float, **more: Any) -> Location:
    """So far from the origin along the equator."""
    return Location(position=(0.0, km / (EARTH_RADIUS_KM * 3.141592653589793) * 180.0), **more)


def travelled(
    km: float, seconds: float, *, start: Location = ORIGIN, rule: TravelRule | None = None, **end: Any
) -> str:
    history = remember(History(), Observation(kind="sign_in", at=AT, location=start), ACCEPTED)
    seen = Observation(kind="request", at=AT + seconds, location=east(km, **end))
    return decide(only(impossible_travel=rule or TravelRule()), history, seen).outcome


@pytest.mark.parametrize(
    ("km", "hours", "outcome"),
    [
        (899.9, 1, "allow"),
        (900.1, 1, "step_up"),
        (99.9, 0.0001, "allow"),
        (100.1, 0.0001, "step_up"),
        (99.9, 0, "allow"),
        (100.1, 0, "step_up"),
        (8999, 10, "allow"),
        (9001, 10, "step_up"),
        (9001, -10, "step_up"),
    ],
)
def test_travel_is_impossible_above_900_km_an_hour_and_from_100_km(km: float, hours: float, outcome: str) -> None:
    assert travelled(km, hours * 3600) == outcome


def test_the_radii_of_both_positions_are_in_favour_of_the_traveller() -> None:
    assert travelled(200, 0, radius_km=50, start=replace(ORIGIN, radius_km=49.9)) == "step_up"
    assert travelled(200, 0, radius_km=50, start=replace(ORIGIN, radius_km=50.1)) == "allow"


def test_one_network_operator_is_no_travel_unless_the_rule_says_so() -> None:
    start = replace(ORIGIN, asn=64496)
    assert travelled(500, 0, start=start, asn=64496) == "allow"
    assert travelled(500, 0, start=start, asn=64497) == "step_up"
    assert travelled(500, 0, start=start) == "step_up"
    assert travelled(500, 0, start=start, asn=64496, rule=TravelRule(same_operator_counts=True)) == "step_up"


def test_distances_are_those_of_the_globe() -> None:
    assert SEOUL.position is not None
    assert PARIS.position is not None
    assert distance_km(SEOUL.position, PARIS.position) == pytest.approx(8970, abs=20)
    assert distance_km((0, 179.9), (0, -179.9)) == pytest.approx(22.2, abs=0.1)
    assert distance_km((90, 0), (-90, 0)) == pytest.approx(20015, abs=1)


def test_a_second_browser_is_new_and_the_first_one_is_not() -> None:
    rules = only(new_device=Rule())
    first = Observation(kind="sign_in", at=AT, device="a")
    assert decide(rules, History(), first).outcome == "allow"
    history = remember(History(), first, ACCEPTED)
    assert decide(rules, history, replace(first, device="b")).outcome == "notify"
    assert decide(rules, history, replace(first, device="")).outcome == "notify"
    assert decide(rules, history, replace(first, device=None)).outcome == "allow"
    assert decide(rules, history, first).outcome == "allow"


def test_another_country_is_new_and_an_unknown_one_is_not() -> None:
    rules = only(new_country=Rule(outcome="step_up"))
    history = remember(History(), Observation(kind="sign_in", at=AT, location=SEOUL), ACCEPTED)
    decision = decide(rules, history, Observation(kind="request", at=AT, location=PARIS))
    assert decision.outcome == "step_up"
    assert decision.reasons[0].figures == {"country": "FR", "before": "KR"}
    assert decide(rules, history, Observation(kind="request", at=AT)).outcome == "allow"


@pytest.mark.parametrize(("kind", "signal"), [("sign_in_failed", "velocity"), ("id_forged", "id_guessing")])
def test_attempts_are_counted_within_the_window_to_its_very_end(kind: Kind, signal: str) -> None:
    rules = only(**{signal: CountRule(attempts=3, window=60)})
    history = History()
    for at in (AT, AT + 30):
        seen = Observation(kind=kind, at=at)
        assert decide(rules, history, seen).outcome == "allow"
        history = remember(history, seen, decide(rules, history, seen))
    assert decide(rules, history, Observation(kind=kind, at=AT + 59.9)).outcome == "block"
    assert decide(rules, history, Observation(kind=kind, at=AT + 60)).outcome == "allow"


def test_a_consumed_refresh_token_ends_the_session() -> None:
    decision = decide(Rules(), History(), Observation(kind="refresh_reused", at=AT))
    assert decision.outcome == "revoke"


def test_the_sternest_outcome_and_the_longest_block_count_and_every_reason_is_told_in_order() -> None:
    rules = only(
        velocity=CountRule(attempts=2, outcome="block", block_for=60),
        impossible_travel=TravelRule(outcome="revoke"),
        new_country=Rule(outcome="step_up"),
        new_device=Rule(),
    )
    before = Observation(kind="sign_in", at=AT, device="a", location=SEOUL)
    history = remember(History(), before, decide(rules, History(), before))
    seen = Observation(kind="sign_in", at=AT + 3600, device="b", location=PARIS)
    decision = decide(replace(rules, velocity=CountRule(attempts=2, window=7200, block_for=60)), history, seen)
    assert (decision.outcome, decision.block_for) == ("revoke", 60)
    assert [reason.signal for reason in decision.reasons] == [
        "new_device",
        "new_country",
        "impossible_travel",
        "velocity",
    ]
    told = explain(seen, decision)
    assert told["reasons"] == "new_device new_country impossible_travel velocity"
    assert (told["outcome"], told["block_for"], told["new_country.country"]) == ("revoke", 60, "FR")
    assert told["impossible_travel.kmh"] == pytest.approx(8970, abs=20)
    assert json.loads(json.dumps(told, allow_nan=False)) == told


def test_an_explanation_names_no_device() -> None:
    history = remember(History(), Observation(kind="sign_in", at=AT, device="Uq-secret-one"), ACCEPTED)
    seen = Observation(kind="sign_in", at=AT, device="Uq-secret-two")
    assert "secret" not in json.dumps(explain(seen, decide(Rules(), history, seen)))


def test_who_was_refused_is_not_known_the_second_time_until_he_has_proven_himself() -> None:
    rules = only(new_country=Rule(outcome="step_up"))
    history = remember(History(), Observation(kind="sign_in", at=AT, location=SEOUL), ACCEPTED)
    seen = Observation(kind="sign_in", at=AT + 86_400, location=PARIS)
    refused = remember(history, seen, decide(rules, history, seen))
    assert decide(rules, refused, seen).outcome == "step_up"
    assert decide(rules, remember(refused, seen, ACCEPTED), seen).outcome == "allow"


def test_a_history_is_bounded() -> None:
    history = History()
    for number in range(200):
        code = chr(65 + number // 26) + chr(65 + number % 26)
        seen = Observation(kind="sign_in", at=AT + number, device=str(number), location=Location(country=code))
        history = remember(history, seen, decide(only(), history, seen))
    assert (len(history.devices), len(history.countries)) == (MAX_DEVICES, MAX_COUNTRIES)
    assert len(history.counts["velocity"]) == MAX_ATTEMPTS
    assert history.devices[-1] == "199"


# -- at the door -----------------------------------------------------------------------------------------------------

SIGN_IN = Observation(kind="sign_in", at=AT, device="a", location=SEOUL, place="home")
ABROAD = replace(SIGN_IN, device="b", location=PARIS, place="paris")
FAILED = Observation(kind="sign_in_failed", at=AT, place="somewhere")
ONE = remember(History(), SIGN_IN, ACCEPTED)
BLOCKS_ABROAD = only(new_country=Rule(outcome="block", block_for=60))


def outcome_of(verdict: Verdict) -> str:
    assert verdict.decision is not None
    return verdict.decision.outcome


def test_an_unknown_browser_is_refused_at_its_place_to_the_end_of_the_block_and_not_longer() -> None:
    verdict = at_the_door(BLOCKS_ABROAD, ONE, ABROAD)
    assert (outcome_of(verdict), verdict.refused_until) == ("block", AT + 60)
    assert verdict.history.refused == (Refusal(place="paris", until=AT + 60),)
    assert verdict.history.countries == ("KR",)
    again = at_the_door(BLOCKS_ABROAD, verdict.history, replace(ABROAD, at=AT + 59.999, location=SEOUL))
    assert (again.decision, again.refused_until) == (None, AT + 60)
    then = at_the_door(BLOCKS_ABROAD, verdict.history, replace(ABROAD, at=AT + 60, location=SEOUL))
    assert (outcome_of(then), then.refused_until, then.history.refused) == ("allow", 0.0, ())
    elsewhere = at_the_door(BLOCKS_ABROAD, verdict.history, replace(ABROAD, place="busan", location=SEOUL))
    assert elsewhere.refused_until == 0.0


def test_a_browser_that_the_account_knows_is_never_refused() -> None:
    refused = at_the_door(BLOCKS_ABROAD, ONE, ABROAD).history
    verdict = at_the_door(BLOCKS_ABROAD, refused, replace(ABROAD, device="a"))
    assert (outcome_of(verdict), verdict.refused_until) == ("step_up", 0.0)
    assert verdict.decision is not None
    assert (verdict.decision.instead_of, verdict.decision.block_for) == ("block", 0)
    assert explain(ABROAD, verdict.decision)["instead_of"] == "block"
    assert verdict.history.countries == ("KR", "FR")
    assert verdict.history.refused == refused.refused


@pytest.mark.parametrize("device", [None, "", "b"])
def test_revoke_without_a_block_lets_in_whoever_has_just_given_the_password(device: str | None) -> None:
    rules = only(new_country=Rule(outcome="revoke"))
    verdict = at_the_door(rules, ONE, replace(ABROAD, device=device))
    assert (outcome_of(verdict), verdict.refused_until, verdict.history.countries) == ("revoke", 0.0, ("KR", "FR"))
    barred = only(new_country=Rule(outcome="revoke", block_for=5))
    verdict = at_the_door(barred, ONE, replace(ABROAD, device=device))
    assert (outcome_of(verdict), verdict.refused_until, verdict.history.countries) == ("revoke", AT + 5, ("KR",))


def test_a_failure_ends_no_session_because_anybody_can_fail() -> None:
    for block_for, outcome in ((0, "notify"), (5, "block")):
        rules = only(velocity=CountRule(outcome="revoke", block_for=block_for, attempts=2))
        verdict = at_the_door(rules, at_the_door(rules, ONE, FAILED).history, FAILED)
        assert (outcome_of(verdict), verdict.refused_until) == (outcome, 0.0)
        assert verdict.decision is not None
        assert verdict.decision.instead_of == "revoke"


def test_whoever_goes_on_failing_cannot_keep_a_refusal_alive() -> None:
    rules = only(velocity=CountRule(attempts=3, window=50, block_for=60))
    history = ONE
    for second in range(3):
        history = at_the_door(rules, history, replace(FAILED, at=AT + second)).history
    assert history.refused == (Refusal(place=EVERYWHERE, until=AT + 62),)
    for second in range(3, 62):
        verdict = at_the_door(rules, history, replace(FAILED, at=AT + second))
        assert (verdict.decision, verdict.history) == (None, history)
    newcomer = replace(SIGN_IN, device="", place="elsewhere")
    stopped = at_the_door(rules, history, replace(newcomer, at=AT + 61.9))
    assert (stopped.decision, stopped.refused_until, stopped.history) == (None, AT + 62, history)
    known = at_the_door(rules, history, replace(SIGN_IN, at=AT + 61.9))
    assert (outcome_of(known), known.refused_until, known.history.counts) == ("allow", 0.0, history.counts)
    assert outcome_of(at_the_door(rules, history, replace(newcomer, at=AT + 62))) == "allow"


def test_a_refresh_token_that_comes_again_may_refuse_unknown_browsers_everywhere() -> None:
    rules = only(refresh_reuse=Rule(outcome="revoke", block_for=60))
    verdict = at_the_door(rules, ONE, Observation(kind="refresh_reused", at=AT))
    assert (outcome_of(verdict), verdict.refused_until) == ("revoke", 0.0)
    assert at_the_door(rules, verdict.history, replace(SIGN_IN, device="b")).refused_until == AT + 60
    assert at_the_door(rules, verdict.history, SIGN_IN).refused_until == 0.0


def test_refusals_are_bounded_and_one_place_has_one_that_is_never_shortened() -> None:
    history = ONE
    for number in range(MAX_REFUSALS + 5):
        seen = replace(ABROAD, at=AT + number, place=str(number))
        history = at_the_door(BLOCKS_ABROAD, history, seen).history
    assert len(history.refused) == MAX_REFUSALS
    assert history.refused[-1].place == str(MAX_REFUSALS + 4)
    longer = replace(ONE, refused=(Refusal(place=EVERYWHERE, until=AT + 500),))
    rules = only(refresh_reuse=Rule(outcome="block", block_for=60))
    after = at_the_door(rules, longer, Observation(kind="refresh_reused", at=AT)).history
    assert after.refused == longer.refused


# -- rules as data ---------------------------------------------------------------------------------------------------


def test_only_the_rules_that_are_named_are_on() -> None:
    rules = parse_rules(
        {"impossible_travel": {"outcome": "revoke", "speed_kmh": 1000}, "velocity": {"outcome": "notify"}}
    )
    assert rules == only(
        impossible_travel=TravelRule(outcome="revoke", speed_kmh=1000),
        velocity=CountRule(outcome="notify", block_for=0),
    )
    assert parse_rules({}) == only()


@pytest.mark.parametrize(
    ("tables", "told"),
    [
        ({"teleport": {}}, "risk.teleport: no rule of this name"),
        ({"new_device": "notify"}, "risk.new_device: a table"),
        ({"new_device": {"speed_kmh": 1}}, "risk.new_device.speed_kmh: no member"),
        ({"new_device": {"outcome": "allow"}}, "risk.new_device.outcome: one of"),
        ({"new_device": {"outcome": ["notify"]}}, "risk.new_device.outcome: one of"),
        ({"new_device": {"outcome": "block"}}, "risk.new_device.block_for: block needs"),
        ({"new_device": {"block_for": 5}}, "risk.new_device.block_for: only with"),
        ({"new_device": {"outcome": "block", "block_for": 86_401}}, "risk.new_device.block_for: whole seconds"),
        ({"velocity": {"attempts": 1}}, "risk.velocity.attempts: 2 to 100"),
        ({"velocity": {"attempts": True}}, "risk.velocity.attempts: 2 to 100"),
        ({"velocity": {"window": float("nan")}}, "risk.velocity.window: 1 to 86400"),
        ({"impossible_travel": {"speed_kmh": 0}}, "risk.impossible_travel.speed_kmh: 1 to"),
        ({"impossible_travel": {"minimum_km": "far"}}, "risk.impossible_travel.minimum_km: 0 to"),
        ({"impossible_travel": {"same_operator_counts": 1}}, "risk.impossible_travel.same_operator_counts: true"),
        ({"\x1b[2J": {}}, r"risk.\\x1b"),
    ],
)
def test_a_bad_rule_is_refused_by_its_name(tables: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_rules(tables)
    assert told.replace("\\\\", "\\") in refused.value.detail


# -- properties ------------------------------------------------------------------------------------------------------

outcomes = st.sampled_from(OUTCOMES[1:])


@st.composite
def plain(draw: st.DrawFn) -> Rule:
    outcome = draw(outcomes)
    return Rule(outcome=outcome, block_for=_seconds(draw, outcome))


@st.composite
def travel(draw: st.DrawFn) -> TravelRule:
    outcome = draw(outcomes)
    return TravelRule(
        outcome=outcome,
        block_for=_seconds(draw, outcome),
        speed_kmh=draw(st.floats(1, 3000)),
        minimum_km=draw(st.floats(0, 3000)),
        same_operator_counts=draw(st.booleans()),
    )


@st.composite
def count(draw: st.DrawFn) -> CountRule:
    outcome = draw(outcomes)
    return CountRule(
        outcome=outcome,
        block_for=_seconds(draw, outcome),
        attempts=draw(st.integers(2, 6)),
        window=draw(st.floats(1, 7200)),
    )


def _seconds(draw: st.DrawFn, outcome: Outcome) -> int:
    return 0 if outcome in ("notify", "step_up") else draw(st.integers(1, 1000))


locations = st.builds(
    Location,
    country=st.sampled_from([None, "KR", "FR", "US"]),
    position=st.none() | st.tuples(st.floats(-90, 90), st.floats(-180, 180)),
    radius_km=st.floats(0, 500),
    asn=st.sampled_from([None, 1, 2]),
)
observations = st.builds(
    Observation,
    kind=st.sampled_from(["sign_in", "sign_in_failed", "request", "id_forged", "refresh_reused"]),
    at=st.floats(0, 7200),
    device=st.sampled_from([None, "", "a", "b", "c"]),
    location=locations,
)
rule_sets = st.builds(
    Rules,
    new_device=st.none() | plain(),
    new_country=st.none() | plain(),
    impossible_travel=st.none() | travel(),
    velocity=st.none() | count(),
    id_guessing=st.none() | count(),
    refresh_reuse=st.none() | plain(),
)


@st.composite
def stricter(draw: st.DrawFn, rules: Rules) -> Rules:
    """The same rules, each as strict or stricter in every respect; those that are off may be on."""
    made: dict[str, Any] = {}
    for name, new in zip(SIGNALS, (plain(), plain(), travel(), count(), count(), plain()), strict=True):
        rule: Rule | None = getattr(rules, name)
        if rule is None:
            made[name] = draw(st.none() | new)
            continue
        outcome = draw(st.sampled_from(OUTCOMES[severity(rule.outcome) :]))
        longer = 0 if outcome in ("notify", "step_up") else max(1, rule.block_for) + draw(st.integers(0, 100))
        changes: dict[str, Any] = {"outcome": outcome, "block_for": longer}
        if isinstance(rule, TravelRule):
            changes["speed_kmh"] = draw(st.floats(1, rule.speed_kmh))
            changes["minimum_km"] = draw(st.floats(0, rule.minimum_km))
            changes["same_operator_counts"] = rule.same_operator_counts or draw(st.booleans())
        elif isinstance(rule, CountRule):
            changes["attempts"] = draw(st.integers(2, rule.attempts))
            changes["window"] = draw(st.floats(rule.window, 8000))
        made[name] = replace(rule, **changes)
    return Rules(**made)


def _history(past: list[Observation]) -> History:
    history = History()
    for each in past:
        history = remember(history, each, decide(only(), history, each))
    return history


@given(st.data(), rule_sets, st.lists(observations, max_size=8), observations)
def test_a_stricter_rule_never_weakens_what_follows(
    data: st.DataObject, rules: Rules, past: list[Observation], seen: Observation
) -> None:
    history = _history(past)
    before = decide(rules, history, seen)
    then = decide(data.draw(stricter(rules)), history, seen)
    assert severity(then.outcome) >= severity(before.outcome)
    assert then.block_for >= before.block_for
    assert [each.signal for each in before.reasons if each.signal not in {one.signal for one in then.reasons}] == []


@given(rule_sets, st.lists(observations, max_size=8), observations)
def test_the_same_is_decided_alike_and_reasons_keep_their_order(
    rules: Rules, past: list[Observation], seen: Observation
) -> None:
    decision = decide(rules, _history(past), seen)
    assert decide(rules, _history(past), seen) == decision
    told = [SIGNALS.index(reason.signal) for reason in decision.reasons]
    assert told == sorted(set(told))
    assert (decision.outcome == "allow") == (not decision.reasons)
    json.dumps(explain(seen, decision), allow_nan=False)


@given(rule_sets, st.lists(observations, max_size=12))
def test_no_known_browser_is_ever_refused_and_no_refusal_outlasts_the_longest_block(
    rules: Rules, past: list[Observation]
) -> None:
    history = History()
    for seen in past:
        verdict = at_the_door(rules, history, seen)
        if seen.kind != "sign_in" or seen.device in history.devices:
            assert verdict.refused_until == 0.0
        latest = max((each.until for each in history.refused), default=0.0)
        assert verdict.refused_until <= max(latest, seen.at + 1000)
        if verdict.refused_until:
            assert verdict.history.devices == history.devices
        elif seen.kind == "sign_in" and seen.device:
            assert seen.device in verdict.history.devices
        history = verdict.history
        assert len(history.refused) <= MAX_REFUSALS
