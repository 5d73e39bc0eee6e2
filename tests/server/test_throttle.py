from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from coatcheck.core.device import DEVICE_RANDOM_BYTES, KnownDevice, mint_device, parse_device
from coatcheck.core.ports import Hit, RateLimit, Store
from coatcheck.core.throttle import Attempt, ThrottlePolicy
from coatcheck.errors import StoreUnavailable, Throttled
from coatcheck.server.sign_in_limits import Reserved, SignInLimits
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem
from tests.server.account_parts import at_once

pytestmark = pytest.mark.anyio

KEY = bytes(range(32))
POLICY = ThrottlePolicy()


@pytest.fixture
def system() -> FakeSystem:
    return FakeSystem()


@pytest.fixture
async def store(system: FakeSystem) -> AsyncIterator[Store]:
    store = open_store("memory:", colour="async", system=system)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
def limits(store: Store) -> SignInLimits:
    return SignInLimits(store, policy=POLICY, key=KEY)


def stranger(account: str = "minsu", address: str | None = "192.0.2.1") -> Attempt:
    return Attempt(account=account, address=address)


def device(number: int = 0, account: str = "minsu") -> KnownDevice:
    value = mint_device(account, key=KEY, random=bytes([number]) * DEVICE_RANDOM_BYTES)
    found = parse_device(value, account, key=KEY)
    assert found is not None
    return found


def owner(number: int = 0) -> Attempt:
    return Attempt(account="minsu", address="192.0.2.1", device=device(number))


async def passes(limits: SignInLimits, attempt: Attempt) -> bool:
    try:
        await limits.reserve(attempt)
    except Throttled:
        return False
    return True


async def passed(limits: SignInLimits, attempt: Attempt, tries: int) -> int:
    return sum([await passes(limits, attempt) for _ in range(tries)])


async def test_strangers_have_ten_attempts_on_an_account_from_wherever_they_come(limits: SignInLimits) -> None:
    assert sum([await passes(limits, stranger(address=f"192.0.2.{n}")) for n in range(30)]) == 10


async def test_strangers_are_slowed_and_never_locked_for_good(limits: SignInLimits, system: FakeSystem) -> None:
    assert await passed(limits, stranger(), 11) == 10
    with pytest.raises(Throttled) as caught:
        await limits.reserve(stranger())
    assert caught.value.retry_after == 90
    system.advance(89)
    assert not await passes(limits, stranger())
    system.advance(1)
    assert await passes(limits, stranger())
    assert not await passes(limits, stranger())
    system.advance(900)
    assert await passed(limits, stranger(), 30) == 10


async def test_while_strangers_guess_the_owners_browser_signs_in(limits: SignInLimits) -> None:
    await passed(limits, stranger(), 200)
    assert await passed(limits, owner(), 21) == 20
    # Another of his browsers has a bucket of its own.
    assert await passes(limits, owner(1))


async def test_all_known_devices_of_an_account_share_a_wide_bucket(limits: SignInLimits) -> None:
    # Cookies collected at one's own account must not buy unlimited hashing.
    assert sum([await passes(limits, owner(n)) for n in range(120)]) == 100


async def test_one_network_has_a_hundred_attempts_over_all_accounts(limits: SignInLimits) -> None:
    tries = [await passes(limits, stranger(account=f"user{n}")) for n in range(150)]
    assert sum(tries) == 100
    assert await passes(limits, stranger(account="elsewhere", address="192.0.2.2"))


async def test_an_ipv6_network_is_one_client(limits: SignInLimits) -> None:
    tries = [await passes(limits, stranger(account=f"user{n}", address=f"2001:db8::{n + 1:x}")) for n in range(150)]
    assert sum(tries) == 100


async def test_an_attackers_own_success_does_not_clear_the_networks_count(limits: SignInLimits) -> None:
    # allauth 65.8: sign in to your own account every few guesses, and guess for ever.
    guesses = 0
    for n in range(200):
        guesses += await passes(limits, stranger(account=f"victim{n}"))
        try:
            await limits.succeeded(await limits.reserve(stranger(account="mallory")))
        except Throttled:
            continue
    assert guesses == 50


async def test_success_clears_the_accounts_bucket_and_no_other_accounts(limits: SignInLimits) -> None:
    await passed(limits, stranger("other"), 10)
    assert await passed(limits, stranger(), 9) == 9
    await limits.succeeded(await limits.reserve(stranger()))
    assert await passed(limits, stranger(), 11) == 10
    assert not await passes(limits, stranger("other"))


async def test_success_on_a_known_device_leaves_strangers_slowed(limits: SignInLimits) -> None:
    await passed(limits, stranger(), 10)
    await limits.succeeded(await limits.reserve(owner()))
    assert not await passes(limits, stranger())


async def test_of_two_hundred_parallel_attempts_exactly_ten_pass(limits: SignInLimits) -> None:
    # CVE-2024-4629: the count was read before the check and written after it.
    assert sum(await at_once([lambda: passes(limits, stranger()) for _ in range(200)])) == 10


async def test_without_a_believable_address_the_accounts_limit_remains(limits: SignInLimits) -> None:
    attempt = Attempt(account="minsu", address="192.0.2.1", forwarded_by_untrusted_peer=True)
    assert await passed(limits, attempt, 30) == 10
    others = [
        await passes(limits, Attempt(account=f"user{n}", address="192.0.2.1", forwarded_by_untrusted_peer=True))
        for n in range(150)
    ]
    assert all(others)


class Recorder:
    """Rate limits that answer as told and keep what they were asked."""

    def __init__(self, *waits: float) -> None:
        self.waits = list(waits)
        self.hits: list[str] = []
        self.cleared: list[str] = []

    async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
        wait = self.waits[len(self.hits)]
        self.hits.append(key)
        return Hit(allowed=wait == 0, remaining=0, retry_after=wait)

    async def clear(self, key: str) -> None:
        self.cleared.append(key)


async def test_every_bucket_is_charged_even_after_one_refused() -> None:
    recorder = Recorder(3.0, 7.5)
    with pytest.raises(Throttled) as caught:
        await SignInLimits(recorder, policy=POLICY, key=KEY).reserve(stranger())
    assert caught.value.retry_after == 8
    assert len(recorder.hits) == 2


async def test_success_clears_exactly_one_bucket() -> None:
    for attempt in (stranger(), owner()):
        recorder = Recorder(0, 0)
        limits = SignInLimits(recorder, policy=POLICY, key=KEY)
        reserved = await limits.reserve(attempt)
        assert isinstance(reserved, Reserved)
        await limits.succeeded(reserved)
        assert recorder.cleared == recorder.hits[:1]


async def test_without_the_limits_nobody_signs_in() -> None:
    class Away(Recorder):
        async def hit(self, key: str, limit: RateLimit, *, cost: int = 1) -> Hit:
            raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        await SignInLimits(Away(), policy=POLICY, key=KEY).reserve(stranger())


async def test_a_short_key_is_refused() -> None:
    with pytest.raises(ValueError, match="32"):
        SignInLimits(Recorder(), policy=POLICY, key=b"short")
