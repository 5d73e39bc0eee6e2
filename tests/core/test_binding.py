"""Whether a request comes from the place of its session. ASVS 8.2.4; SEMANTICS 8."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.binding import (
    MAX_PLACE_OCTETS,
    BindingPolicy,
    Comparison,
    Match,
    Mismatch,
    NetworkRule,
    NewFamily,
    Place,
    Surveyor,
    compare,
    explain_mismatch,
    network_text,
    unpack_place,
)
from coatcheck.core.geo import NOWHERE, Location
from coatcheck.errors import ConfigurationError

CHROME = "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/{} Safari/537.36"
FIREFOX = "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:145.0) Gecko/20100101 Firefox/145.0"
ALL = BindingPolicy(network="prefix", user_agent=True, device=True)


class Table:
    """Four addresses; everybody else is nowhere."""

    rows = {  # noqa: RUF012 - a table
        "203.0.113.7": Location(country="KR", asn=64496),
        "198.51.100.1": Location(country="KR", asn=64497),
        "192.0.2.1": Location(country="FR", asn=64496),
        "2001:db8::1": Location(country="KR", asn=64496),
    }

    def locate(self, address: str) -> Location:
        return self.rows.get(address, NOWHERE)


def judged(policy: BindingPolicy, recorded: dict[str, str], seen: str | None) -> Comparison:
    surveyor = Surveyor(policy, Table())
    return compare(policy, surveyor.recorded(recorded, "", None), surveyor.seen(seen, "", None))


@pytest.mark.parametrize(
    ("rule", "recorded", "seen", "matches"),
    [
        ("off", "203.0.113.7", "8.8.8.8", True),
        ("exact", "203.0.113.7", "203.0.113.7", True),
        ("exact", "203.0.113.7", "203.0.113.8", False),
        ("exact", "203.0.113.7", "::ffff:203.0.113.7", True),
        ("exact", "2001:db8::1", "2001:db8:0:0::1", True),
        ("exact", "2001:db8::1", "2001:db8::2", False),
        ("prefix", "203.0.113.0", "203.0.113.255", True),
        ("prefix", "203.0.113.255", "203.0.114.0", False),
        ("prefix", "203.0.113.0", "203.0.112.255", False),
        ("prefix", "2001:db8:0:1::", "2001:db8:0:1:ffff:ffff:ffff:ffff", True),
        ("prefix", "2001:db8:0:1:ffff:ffff:ffff:ffff", "2001:db8:0:2::", False),
        ("asn", "203.0.113.7", "192.0.2.1", True),
        ("asn", "203.0.113.7", "198.51.100.1", False),
        ("country", "203.0.113.7", "198.51.100.1", True),
        ("country", "203.0.113.7", "192.0.2.1", False),
        # Not in the table: the prefix decides.
        ("asn", "10.0.0.1", "10.0.0.255", True),
        ("country", "10.0.0.1", "10.0.1.1", False),
        ("country", "203.0.113.7", "10.0.0.1", False),
    ],
)
def test_the_network_is_compared_to_its_very_boundary(
    rule: NetworkRule, recorded: str, seen: str, matches: bool
) -> None:
    family = "6" if ":" in recorded else "4"
    found = judged(BindingPolicy(network=rule), {family: recorded}, seen)
    assert found == (Match() if matches else Mismatch(traits=("network",)))


def test_the_first_appearance_of_the_other_family_is_told_and_never_refused() -> None:
    policy = BindingPolicy(network="exact", on_mismatch="block")
    assert judged(policy, {"4": "203.0.113.7"}, "2001:db8::1") == NewFamily(family="6")
    assert judged(policy, {"6": "2001:db8::1"}, "203.0.113.7") == NewFamily(family="4")
    assert judged(policy, {}, "203.0.113.7") == NewFamily(family="4")
    both = {"4": "203.0.113.7", "6": "2001:db8::1"}
    assert judged(policy, both, "2001:db8::1") == judged(policy, both, "203.0.113.7") == Match()
    assert judged(policy, both, "2001:db8::2") == Mismatch(traits=("network",))


def test_a_new_family_does_not_hide_another_browser() -> None:
    surveyor = Surveyor(ALL)
    recorded = surveyor.recorded({"4": "203.0.113.7"}, FIREFOX, "d1")
    found = compare(ALL, recorded, surveyor.seen("2001:db8::1", "curl/8.0", "d1"))
    assert found == Mismatch(traits=("user_agent",))


def test_a_stolen_cookie_elsewhere_differs_in_everything_in_a_fixed_order() -> None:
    surveyor = Surveyor(ALL)
    recorded = surveyor.recorded({"4": "203.0.113.7"}, CHROME.format("142.0"), "d1")
    seen = surveyor.seen("198.51.100.9", "curl/8.0", None)
    found = compare(ALL, recorded, seen)
    assert found == Mismatch(traits=("network", "user_agent", "device"))
    assert isinstance(found, Mismatch)
    assert explain_mismatch(recorded, seen, found) == {
        "differs": "network user_agent device",
        "network_recorded": "203.0.113.0/24",
        "network": "198.51.100.0/24",
        "agent_recorded": "Chrome/Windows",
        "agent": "curl",
        "device": "none",
    }


def test_who_hides_a_trait_is_no_better_off_than_who_changes_it() -> None:
    surveyor = Surveyor(ALL)
    recorded = surveyor.recorded({"4": "203.0.113.7"}, FIREFOX, "d1")
    assert compare(ALL, recorded, surveyor.seen(None, FIREFOX, "d1")) == Mismatch(traits=("network",))
    assert compare(ALL, recorded, surveyor.seen("203.0.113.7", "", "d1")) == Mismatch(traits=("user_agent",))
    assert compare(ALL, recorded, surveyor.seen("203.0.113.7", FIREFOX, None)) == Mismatch(traits=("device",))
    assert compare(ALL, recorded, surveyor.seen("203.0.113.7", FIREFOX, "d2")) == Mismatch(traits=("device",))


def test_what_was_not_recorded_cannot_differ() -> None:
    surveyor = Surveyor(ALL)
    recorded = surveyor.recorded({"4": "203.0.113.7"}, "", None)
    assert compare(ALL, recorded, surveyor.seen("203.0.113.7", FIREFOX, "d1")) == Match()


def test_an_update_of_the_browser_is_the_same_place_in_the_same_octets() -> None:
    surveyor = Surveyor(ALL)
    before = surveyor.seen("203.0.113.7", CHROME.format("142.0.1"), "d1").pack()
    assert surveyor.seen("203.0.113.99", CHROME.format("143.0.0"), "d1").pack() == before
    assert surveyor.seen("203.0.114.7", CHROME.format("142.0.1"), "d1").pack() != before
    assert len(before) < 40


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "1.2.3.4.5",
        "256.1.1.1",
        "010.0.0.1",
        "1" * 1_000_000,
        "::1" + "%" + "x" * 100,
        "1.2.3.4/24",
        "\x00",
    ],
)
def test_a_hostile_address_is_no_address(address: str) -> None:
    assert Surveyor(ALL).seen(address, "", None) == Place()


def test_a_zone_is_no_part_of_an_address() -> None:
    surveyor = Surveyor(BindingPolicy(network="exact"))
    assert surveyor.seen("fe80::1%eth0", "", None) == surveyor.seen("fe80::1%eth1", "", None)


def test_a_crowd_of_made_up_names_does_not_fill_the_memory() -> None:
    surveyor = Surveyor(ALL)
    for number in range(5000):
        surveyor.seen(f"10.{number >> 8}.{number & 255}.1", f"agent-{number}", None)
    assert len(surveyor._networks) == len(surveyor._agents) == 4096


@pytest.mark.parametrize("rule", ["asn", "country"])
def test_a_rule_that_needs_a_table_does_not_start_without_one(rule: NetworkRule) -> None:
    with pytest.raises(ConfigurationError, match=f"binding.network: {rule} needs a table of addresses"):
        Surveyor(BindingPolicy(network=rule))


@pytest.mark.parametrize(
    ("field", "value"),
    [("network", "near"), ("on_mismatch", "allow"), ("on_mismatch", "x"), ("block_for", 0), ("block_for", 86_401)],
)
def test_a_policy_checks_itself(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"binding.{field}"):
        replace(ALL, **{field: value})  # type: ignore[arg-type]


def test_the_default_policy_compares_nothing() -> None:
    assert not BindingPolicy().compares
    assert Surveyor(BindingPolicy()).seen("203.0.113.7", FIREFOX, "d1") == Place()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (b"", "unknown"),
        (b"x\x01\x02\x03\x04", "1.2.3.4"),
        (b"p\x01\x02\x03", "1.2.3.0/24"),
        (b"p\x20\x01\x0d\xb8\0\0\0\x01", "2001:db8:0:1::/64"),
        (b"a\0\0\xfb\xf0", "AS64496"),
        (b"cKR", "KR"),
    ],
)
def test_a_network_is_told_as_people_read_it(key: bytes, text: str) -> None:
    assert network_text(key) == text


places = st.builds(
    Place,
    four=st.binary(max_size=5),
    six=st.binary(max_size=17),
    agent=st.text(st.characters(max_codepoint=127), max_size=33).map(str.encode),
    device=st.binary(max_size=9),
)


@given(places, places)
def test_packed_places_are_equal_exactly_when_the_places_are(one: Place, other: Place) -> None:
    assert unpack_place(one.pack()) == one
    assert (one.pack() == other.pack()) == (one == other)
    assert len(one.pack()) <= MAX_PLACE_OCTETS


@given(st.binary(max_size=80))
def test_octets_that_are_no_place_are_refused(octets: bytes) -> None:
    with suppress(ValueError):
        assert unpack_place(octets).pack() == octets


@given(st.text(max_size=80), st.text(max_size=600), st.none() | st.text(max_size=80))
def test_any_request_has_a_place_that_can_be_packed_and_equals_itself(
    address: str, user_agent: str, device: str | None
) -> None:
    place = Surveyor(ALL).seen(address, user_agent, device)
    assert len(place.pack()) <= MAX_PLACE_OCTETS
    assert compare(ALL, place, place) == Match()
