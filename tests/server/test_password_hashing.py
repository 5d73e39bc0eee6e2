from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from coatcheck.core.passwords import Password
from coatcheck.errors import ConfigurationError, StoreUnavailable
from coatcheck.server.accounts import PasswordHash, User
from coatcheck.server.password_hashing import (
    FEWEST_WAITING,
    MOST_WAITING,
    Argon2id,
    HashingQueue,
    HashParameters,
    PasswordHasher,
    Verified,
    Wrong,
)
from coatcheck.testing import FakeSystem
from tests.server.account_parts import password_of

pytestmark = pytest.mark.anyio

CHEAP = HashParameters(memory_kib=12 * 1024, passes=3)
RIGHT = "violet kettle drums"
OUT_OF_BOUNDS = [
    "",
    "plain text",
    "$argon2id$",
    "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ",
    "$argon2i$v=19$m=19456,t=2,p=1$c2FsdHNhbHRzYWx0$" + "A" * 43,
    "$argon2id$v=19$m=4194304,t=2,p=1$c2FsdHNhbHRzYWx0$" + "A" * 43,
    "$argon2id$v=19$m=19456,t=1000000,p=1$c2FsdHNhbHRzYWx0$" + "A" * 43,
    "$argon2id$v=19$m=x,t=y,p=z$c2FsdHNhbHRzYWx0$" + "A" * 43,
    "$argon2id$v=19$m=19456,t=2,p=1$" + "é" * 8 + "$" + "A" * 43,
    "$2b$12$abcdefghijklmnopqrstuuABCDEFGHIJKLMNOPQRSTUVWXYZ01234",
]


class Counting(Argon2id):
    """argon2id that counts its computations, by the parameters they used."""

    def __init__(self) -> None:
        self.hashed = 0
        self.verified: list[HashParameters | None] = []

    def hash(self, password: bytes, *, salt: bytes, parameters: HashParameters) -> str:
        self.hashed += 1
        return super().hash(password, salt=salt, parameters=parameters)

    def matches(self, stored: str, password: bytes) -> bool:
        answer = super().matches(stored, password)
        self.verified.append(self.parameters(stored))
        return answer


class Held:
    """An algorithm that computes nothing until it is let go; says how many computations run at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.done = 0
        self.running = 0
        self.most_running = 0
        self._lock = threading.Lock()

    def hash(self, password: bytes, *, salt: bytes, parameters: HashParameters) -> str:
        return self._compute("hash")

    def matches(self, stored: str, password: bytes) -> bool:
        self._compute("match")
        return stored == password.decode()

    def parameters(self, stored: str) -> HashParameters | None:
        return HashParameters()

    def _compute(self, answer: str) -> str:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        assert self.gate.wait(60)
        with self._lock:
            self.running -= 1
            self.done += 1
        return answer


def account(stored: str | None) -> User:
    return User(
        id="A" * 22,
        name="minsu",
        name_key="minsu",
        role="user",
        password_hash=None if stored is None else PasswordHash(stored),
        failures=0,
        created_us=0,
        password_changed_us=None,
        disabled_us=None,
    )


@asynccontextmanager
async def opened(hasher: PasswordHasher) -> AsyncIterator[PasswordHasher]:
    await hasher.open()
    try:
        yield hasher
    finally:
        await hasher.close()


@pytest.fixture
def counting() -> Counting:
    return Counting()


@pytest.fixture
async def hasher(counting: Counting) -> AsyncIterator[PasswordHasher]:
    async with opened(PasswordHasher(parameters=CHEAP, algorithm=counting, system=FakeSystem())) as hasher:
        yield hasher


async def test_the_right_password_is_verified_and_another_is_wrong(hasher: PasswordHasher) -> None:
    user = account((await hasher.hash(password_of(RIGHT))).text)
    assert await hasher.verify(user, password_of(RIGHT)) == Verified(needs_rehash=False)
    assert await hasher.verify(user, password_of(RIGHT + "!")) == Wrong(why="mismatch")


async def test_the_default_is_what_owasp_asks_for() -> None:
    stored = Argon2id().hash(b"x", salt=b"s" * 16, parameters=HashParameters())
    assert stored.startswith("$argon2id$v=19$m=19456,t=2,p=1$")


async def test_every_attempt_costs_exactly_one_computation_with_todays_parameters(
    hasher: PasswordHasher, counting: Counting
) -> None:
    # A time oracle for accounts (CVE-2024-39329, CVE-2025-13473) is a difference in this list.
    known = account((await hasher.hash(password_of(RIGHT))).text)
    disabled = account((await hasher.hash(password_of(RIGHT))).text)
    hashed = counting.hashed
    for user, typed in (
        (known, RIGHT),
        (known, "wrong wrong wrong wrong"),
        (disabled, RIGHT),
        (None, RIGHT),
        (account(None), RIGHT),
        *((account(stored), RIGHT) for stored in OUT_OF_BOUNDS),
    ):
        counting.verified.clear()
        await hasher.verify(user, password_of(typed))
        assert counting.verified == [CHEAP]
    assert counting.hashed == hashed


async def test_the_reason_is_there_for_the_log(hasher: PasswordHasher) -> None:
    assert await hasher.verify(None, password_of(RIGHT)) == Wrong(why="no_account")
    assert await hasher.verify(account(None), password_of(RIGHT)) == Wrong(why="no_password")


@pytest.mark.parametrize("stored", OUT_OF_BOUNDS)
async def test_a_hash_that_cannot_be_read_lets_nobody_in(hasher: PasswordHasher, stored: str) -> None:
    assert await hasher.verify(account(stored), password_of(RIGHT)) == Wrong(why="unreadable_hash")


async def test_nobody_can_guess_the_password_of_the_account_that_does_not_exist(hasher: PasswordHasher) -> None:
    for octets in (b"", b"\x00", b"password"):
        assert await hasher.verify(None, Password(octets)) == Wrong(why="no_account")


@pytest.mark.parametrize("place", [0, 71, 72, 73, 127, 128, 129, 1022, 1023])
async def test_no_octet_is_ignored(hasher: PasswordHasher, place: int) -> None:
    # bcrypt stopped at 72 (CVE-2025-22228).
    text = "x" * 1024
    user = account((await hasher.hash(password_of(text))).text)
    changed = text[:place] + "y" + text[place + 1 :]
    assert await hasher.verify(user, password_of(text)) == Verified(needs_rehash=False)
    assert isinstance(await hasher.verify(user, password_of(changed)), Wrong)
    assert isinstance(await hasher.verify(user, password_of(text[:place])), Wrong)


async def test_what_follows_a_nul_counts(hasher: PasswordHasher) -> None:
    user = account((await hasher.hash(password_of("before\x00after"))).text)
    assert await hasher.verify(user, password_of("before\x00after")) == Verified(needs_rehash=False)
    for typed in ("before", "before\x00", "before\x00other"):
        assert isinstance(await hasher.verify(user, password_of(typed)), Wrong)


async def test_one_password_has_another_hash_each_time(hasher: PasswordHasher) -> None:
    assert await hasher.hash(password_of(RIGHT)) != await hasher.hash(password_of(RIGHT))


async def test_other_parameters_ask_for_a_rehash_and_still_verify(hasher: PasswordHasher) -> None:
    old = Argon2id().hash(RIGHT.encode(), salt=b"s" * 16, parameters=HashParameters(memory_kib=13 * 1024, passes=3))
    assert await hasher.verify(account(old), password_of(RIGHT)) == Verified(needs_rehash=True)
    assert await hasher.verify(account(old), password_of("wrong wrong wrong")) == Wrong(why="mismatch")


@pytest.mark.parametrize(
    ("memory_kib", "passes", "lanes"),
    [
        (46 * 1024 - 1, 1, 1),
        (19 * 1024 - 1, 2, 1),
        (12 * 1024 - 1, 3, 1),
        (1024 * 1024 + 1, 3, 1),
        (19 * 1024, 0, 1),
        (19 * 1024, 65, 1),
        (19 * 1024, 2, 0),
        (19 * 1024, 2, 17),
    ],
)
async def test_parameters_below_the_standard_are_refused(memory_kib: int, passes: int, lanes: int) -> None:
    with pytest.raises(ConfigurationError, match="password_hash"):
        HashParameters(memory_kib=memory_kib, passes=passes, lanes=lanes)


@pytest.mark.parametrize(("memory_kib", "passes"), [(46 * 1024, 1), (19 * 1024, 2), (12 * 1024, 3)])
async def test_parameters_at_the_standard_are_accepted(memory_kib: int, passes: int) -> None:
    HashParameters(memory_kib=memory_kib, passes=passes)


# -- the queue -----------------------------------------------------------------------------------------------------


@pytest.fixture
def held() -> Held:
    return Held()


@asynccontextmanager
async def holding(held: Held, queue: HashingQueue) -> AsyncIterator[PasswordHasher]:
    """An open hasher whose threads stand still until `held.gate` is set."""
    async with opened(PasswordHasher(algorithm=held, queue=queue, system=FakeSystem())) as hasher:
        held.gate.clear()
        try:
            yield hasher
        finally:
            held.gate.set()


async def submit(hasher: PasswordHasher, *, known_device: bool = False) -> asyncio.Task[object]:
    """An attempt that has reached the queue, or was refused."""
    task: asyncio.Task[object] = asyncio.create_task(hasher.verify(None, password_of(RIGHT), known_device=known_device))
    await asyncio.sleep(0)
    return task


async def until_running(held: Held, count: int) -> None:
    """Wait until so many computations have begun; they run on threads, so no event of the loop tells."""
    while held.running < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def test_strangers_fill_three_quarters_and_known_devices_the_rest(held: Held) -> None:
    async with holding(held, HashingQueue(waiting=8)) as hasher:
        tasks = [await submit(hasher) for _ in range(6)]
        refused = await submit(hasher)
        with pytest.raises(StoreUnavailable) as caught:
            await refused
        assert caught.value.retry_after == 2
        assert caught.value.status == 503
        tasks += [await submit(hasher, known_device=True) for _ in range(2)]
        with pytest.raises(StoreUnavailable):
            await (await submit(hasher, known_device=True))
        assert hasher.waiting == 8
        held.gate.set()
        assert await asyncio.gather(*tasks) == [Wrong(why="no_account")] * 8
        # There is room again, and what was refused was not computed.
        assert await hasher.verify(None, password_of(RIGHT)) == Wrong(why="no_account")
        assert held.done == 1 + 8 + 1


async def test_new_passwords_wait_in_the_same_queue(held: Held) -> None:
    async with holding(held, HashingQueue(waiting=4)) as hasher:
        tasks = [await submit(hasher) for _ in range(3)]
        with pytest.raises(StoreUnavailable):
            await hasher.hash(password_of(RIGHT))
        held.gate.set()
        await asyncio.gather(*tasks)


async def test_a_cancelled_caller_frees_its_place_only_when_the_thread_is_free(held: Held) -> None:
    async with holding(held, HashingQueue(waiting=4)) as hasher:
        running = await submit(hasher)
        await until_running(held, 1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert hasher.waiting == 1
        waiting = await submit(hasher)
        assert hasher.waiting == 2
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # It had not begun: its place is free at once and nothing is computed for it.
        assert hasher.waiting == 1
        held.gate.set()
        assert await hasher.verify(None, password_of(RIGHT)) == Wrong(why="no_account")
        assert held.done == 3
        assert hasher.waiting <= 1


async def test_never_more_run_at_once_than_there_are_threads(held: Held) -> None:
    for threads in (1, 3):
        held.most_running = 0
        async with holding(held, HashingQueue(threads=threads, waiting=50)) as hasher:
            tasks = [await submit(hasher) for _ in range(30)]
            await until_running(held, threads)
            held.gate.set()
            await asyncio.gather(*tasks)
        assert held.most_running == threads


async def test_closing_finishes_what_was_accepted_and_takes_nothing_new(held: Held) -> None:
    async with holding(held, HashingQueue(waiting=8)) as hasher:
        tasks = [await submit(hasher) for _ in range(5)]
        closing = asyncio.create_task(hasher.close())
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="closed"):
            await hasher.verify(None, password_of(RIGHT))
        held.gate.set()
        await closing
        assert await asyncio.gather(*tasks) == [Wrong(why="no_account")] * 5
        await hasher.close()
        await hasher.open()
        assert await hasher.verify(None, password_of(RIGHT)) == Wrong(why="no_account")


async def test_a_hasher_that_was_never_opened_judges_nothing() -> None:
    with pytest.raises(StoreUnavailable, match="closed"):
        await PasswordHasher().verify(None, password_of(RIGHT))


@pytest.mark.parametrize(
    ("seconds_per_hash", "threads", "capacity"),
    [
        (0.025, 1, 80),
        (0.025, 2, 160),
        (0.5, 1, FEWEST_WAITING),
        (60.0, 1, FEWEST_WAITING),
        (0.0, 1, MOST_WAITING),
        (1e-9, 1, MOST_WAITING),
    ],
)
async def test_the_queue_holds_about_two_seconds_of_work(seconds_per_hash: float, threads: int, capacity: int) -> None:
    assert HashingQueue(threads=threads).capacity(seconds_per_hash=seconds_per_hash) == capacity


async def test_the_time_of_one_hash_is_taken_when_the_hasher_opens() -> None:
    system = FakeSystem()

    class Slow(Held):
        def hash(self, password: bytes, *, salt: bytes, parameters: HashParameters) -> str:
            system.advance(0.1)
            return "hash"

    async with opened(PasswordHasher(algorithm=Slow(), system=system)) as hasher:
        assert hasher.capacity == 20
    assert hasher.capacity == 0


@pytest.mark.parametrize(
    "settings", [{"threads": 0}, {"threads": 65}, {"seconds": 0}, {"seconds": 61}, {"waiting": 0}, {"waiting": 513}]
)
async def test_an_unbounded_queue_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="password_hash_queue"):
        HashingQueue(**settings)
