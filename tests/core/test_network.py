"""Whose address a request came from. CVE-2024-47070, allauth 65.14.1: forged forwarding headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.network import (
    MAX_FORWARDED_OCTETS,
    ClientAddress,
    client_address,
    family_of,
    is_loopback,
    network_of,
    parse_proxies,
)
from coatcheck.errors import ConfigurationError

PROXIES = parse_proxies(["10.0.0.0/8", "2001:db8:1::/48"])


@pytest.mark.parametrize(
    ("peer", "forwarded", "address", "forged"),
    [
        ("203.0.113.7", [], "203.0.113.7", False),
        ("203.0.113.7", [b"198.51.100.1"], "203.0.113.7", True),
        ("10.0.0.1", [], "10.0.0.1", False),
        ("10.0.0.1", [b"198.51.100.1"], "198.51.100.1", False),
        ("10.0.0.1", [b"6.6.6.6, 198.51.100.1"], "198.51.100.1", False),
        ("10.0.0.1", [b"6.6.6.6", b"198.51.100.1"], "198.51.100.1", False),
        ("10.0.0.1", [b"198.51.100.1, 10.2.3.4"], "198.51.100.1", False),
        ("10.0.0.1", [b"10.9.9.9, 10.2.3.4"], "10.9.9.9", False),
        ("10.0.0.1", [b"198.51.100.1, nonsense"], "10.0.0.1", True),
        ("10.0.0.1", [b"nonsense, 198.51.100.1"], "198.51.100.1", False),
        ("10.0.0.1", [b""], "10.0.0.1", True),
        ("2001:db8:1::5", [b"2001:db8:2::9"], "2001:db8:2::9", False),
        ("::ffff:10.0.0.1", [b"198.51.100.1"], "198.51.100.1", False),
        ("testclient", [], None, False),
        (None, [b"1.2.3.4"], None, True),
    ],
)
def test_only_a_configured_proxy_is_believed(
    peer: str | None, forwarded: list[bytes], address: str | None, forged: bool
) -> None:
    assert client_address(peer, forwarded, PROXIES) == ClientAddress(address=address, forged=forged)


def test_junk_in_front_cannot_hide_the_address_a_proxy_has_added() -> None:
    for junk in (b"1.1.1.1," * 200, b"x" * 2 * MAX_FORWARDED_OCTETS + b","):
        found = client_address("10.0.0.1", [junk + b"198.51.100.1"], PROXIES)
        assert found == ClientAddress(address="198.51.100.1", forged=False)


def test_a_line_is_bounded_before_it_is_parsed() -> None:
    # Nothing but our own proxies as far as is read: the farthest of them is the best that is known.
    line = b"10.0.0.2," * 1000 + b"10.0.0.3"
    assert client_address("10.0.0.1", [line], PROXIES).address is not None


@given(st.lists(st.binary(max_size=60), max_size=4))
def test_hostile_lines_never_raise(forwarded: list[bytes]) -> None:
    client_address("10.0.0.1", forwarded, PROXIES)


@pytest.mark.parametrize("entry", ["0.0.0.0/0", "::/0", "nonsense", "10.0.0.0/33", ""])
def test_a_proxy_that_is_everybody_or_nobody_stops_the_start(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="trusted_proxies"):
        parse_proxies([entry])


def test_what_counts_as_this_machine_and_as_one_network() -> None:
    assert all(map(is_loopback, ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["10.0.0.1", "localhost.evil.test", "example"]))
    assert network_of("203.0.113.7") == "203.0.113.7"
    assert network_of("2001:db8:1:2:3:4:5:6") == "2001:db8:1:2::/64"
    assert (family_of("203.0.113.7"), family_of("::1")) == ("4", "6")
