from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.device import (
    DEVICE_CHARACTERS,
    DEVICE_RANDOM_BYTES,
    KnownDevice,
    mint_device,
    parse_device,
)
from coatcheck.core.network import client_address
from coatcheck.core.ports import Hit, RateLimit
from coatcheck.core.throttle import Attempt, Bucket, ThrottlePolicy, buckets_of, needs_recovery, wait_of
from coatcheck.errors import ConfigurationError

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
POLICY = ThrottlePolicy()
DEVICE = KnownDevice("D" * 24)


def buckets(attempt: Attempt, key: bytes = KEY) -> tuple[Bucket, ...]:
    return buckets_of(attempt, policy=POLICY, key=key)


def kinds(attempt: Attempt) -> list[str]:
    return [bucket.key.split(":")[1] for bucket in buckets(attempt)]


def key_of(kind: str, attempt: Attempt) -> str:
    (found,) = [bucket.key for bucket in buckets(attempt) if bucket.key.split(":")[1] == kind]
    return found


def test_a_stranger_falls_into_the_buckets_of_the_account_and_of_his_network() -> None:
    found = buckets(Attempt(account="minsu", address="192.0.2.1"))
    assert [(bucket.key.split(":")[1], bucket.limit) for bucket in found] == [
        ("account", POLICY.unknown_devices),
        ("network", POLICY.network),
    ]


def test_a_known_device_shares_no_bucket_with_strangers() -> None:
    known = buckets(Attempt(account="minsu", address="192.0.2.1", device=DEVICE))
    stranger = buckets(Attempt(account="minsu", address="192.0.2.1"))
    assert [(bucket.key.split(":")[1], bucket.limit) for bucket in known] == [
        ("device", POLICY.known_device),
        ("devices", POLICY.known_devices),
    ]
    assert not {bucket.key for bucket in known} & {bucket.key for bucket in stranger}


def test_success_clears_the_attempts_own_bucket_and_never_the_networks() -> None:
    for attempt, own in (
        (Attempt(account="minsu", address="192.0.2.1"), "account"),
        (Attempt(account="minsu", address="192.0.2.1", device=DEVICE), "device"),
    ):
        assert [bucket.key.split(":")[1] for bucket in buckets(attempt) if bucket.cleared_by_success] == [own]


def test_forwarding_headers_from_an_untrusted_peer_switch_the_network_bucket_off() -> None:
    attempt = Attempt(account="minsu", address="192.0.2.1", forwarded_by_untrusted_peer=True)
    assert kinds(attempt) == ["account"]


def test_without_an_address_the_accounts_bucket_remains() -> None:
    assert kinds(Attempt(account="minsu", address=None)) == ["account"]


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
    ],
)
def test_networks_are_an_ipv4_address_or_an_ipv6_64(left: str, right: str, same: bool) -> None:
    found = [
        key_of("network", Attempt(account="minsu", address=client_address(peer, [], ()).address))
        for peer in (left, right)
    ]
    assert (found[0] == found[1]) is same


def test_keys_tell_neither_name_nor_address_and_need_the_key() -> None:
    attempt = Attempt(account="minsu@example.org", address="192.0.2.1")
    for bucket in buckets(attempt):
        assert "minsu" not in bucket.key
        assert "192" not in bucket.key
        assert len(bucket.key) <= 200
    assert not {b.key for b in buckets(attempt)} & {b.key for b in buckets(attempt, OTHER_KEY)}


def test_a_name_that_looks_like_a_network_is_another_bucket() -> None:
    attempt = Attempt(account="192.0.2.1", address="192.0.2.1")
    assert len({bucket.key.split(":")[2] for bucket in buckets(attempt)}) == 2


@pytest.mark.parametrize("account", ["", "\ud800", "\x00", "a" * 1_000_000])
def test_hostile_names_have_buckets_like_any_other(account: str) -> None:
    assert len(buckets(Attempt(account=account, address="192.0.2.1"))[0].key) <= 200


def test_the_longest_wait_decides_in_whole_seconds() -> None:
    passed = Hit(allowed=True, remaining=1, retry_after=90.0)
    assert wait_of([passed]) is None
    assert wait_of([]) is None
    assert wait_of([passed, Hit(allowed=False, remaining=0, retry_after=2.0)]) == 2
    late = Hit(allowed=False, remaining=0, retry_after=8.1)
    assert wait_of([late, Hit(allowed=False, remaining=0, retry_after=2.0), passed]) == 9
    assert wait_of([Hit(allowed=False, remaining=0, retry_after=0.0)]) == 1


def test_exactly_a_hundred_guesses_are_judged() -> None:
    assert not needs_recovery(100, policy=POLICY)
    assert needs_recovery(101, policy=POLICY)


@pytest.mark.parametrize("failures", [0, 101])
def test_no_policy_allows_more_failures_than_the_standard(failures: int) -> None:
    with pytest.raises(ConfigurationError, match="consecutive_failures"):
        ThrottlePolicy(consecutive_failures=failures)


@pytest.mark.parametrize("name", ["unknown_devices", "known_device", "known_devices", "network"])
@pytest.mark.parametrize(
    "limit",
    [RateLimit(attempts=0, period=1), RateLimit(attempts=1, period=0), RateLimit(attempts=1, period=float("inf"))],
)
def test_a_limit_that_limits_nothing_is_refused(name: str, limit: RateLimit) -> None:
    with pytest.raises(ConfigurationError, match=name):
        ThrottlePolicy(**{name: limit})  # type: ignore[arg-type]


# -- the device cookie ---------------------------------------------------------------------------------------------


def cookie(account: str = "minsu", key: bytes = KEY) -> str:
    return mint_device(account, key=key, random=bytes(range(DEVICE_RANDOM_BYTES)))


def test_a_device_is_known_to_the_account_it_signed_in_to() -> None:
    device = parse_device(cookie(), "minsu", key=KEY)
    assert device == KnownDevice(cookie()[:24])
    assert len(cookie()) == DEVICE_CHARACTERS


def test_a_cookie_earned_with_ones_own_account_is_worth_nothing_for_another() -> None:
    assert parse_device(cookie("mallory"), "minsu", key=KEY) is None


def test_a_cookie_under_another_key_is_unknown() -> None:
    assert parse_device(cookie(key=OTHER_KEY), "minsu", key=KEY) is None


def test_changing_any_character_makes_the_device_unknown() -> None:
    good = cookie()
    for place, character in enumerate(good):
        changed = good[:place] + ("A" if character != "A" else "B") + good[place + 1 :]
        assert parse_device(changed, "minsu", key=KEY) is None


@pytest.mark.parametrize(
    "value",
    ["", "A" * 39, "A" * 41, "A" * 40, "é" * 40, "\ud800" * 40, "A" * 38 + "==", "A" * 1_000_000, "\n" + "A" * 39],
)
def test_what_is_no_device_cookie_is_refused(value: str) -> None:
    assert parse_device(value, "minsu", key=KEY) is None
    assert parse_device(cookie() + "\n", "minsu", key=KEY) is None


def test_a_hostile_name_is_a_miss_and_no_error() -> None:
    assert parse_device(cookie(), "\ud800", key=KEY) is None


def test_a_device_id_takes_its_full_randomness() -> None:
    with pytest.raises(ValueError, match="17"):
        mint_device("minsu", key=KEY, random=b"short")


@given(account=st.text(max_size=30), random=st.binary(min_size=17, max_size=17))
def test_what_is_minted_is_read_back(account: str, random: bytes) -> None:
    value = mint_device(account, key=KEY, random=random)
    device = parse_device(value, account, key=KEY)
    assert device is not None
    assert device.id == value[:24]
