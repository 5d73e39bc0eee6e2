"""Hashing and verifying passwords: argon2id, in threads of its own, behind a bounded queue.

Decides the parameters (OWASP, ASVS 11.4.2: 19 MiB, two passes, one lane), that a sign-in costs one hash whether the
account exists or not (no time oracle: CVE-2024-39329, CVE-2025-13473), and who is turned away when more comes than
the processor can do: a quarter of the queue is kept for devices that have signed in before, so a flood from strangers
does not keep them out. More threads than one make a serving process slower, not faster.

It must never see an unbounded password (`core/passwords.py` bounds it) and never shorten one: the hash takes octets
with their length, so a NUL, octet 73 and the last octet all count (CVE-2025-22228).

Known limit: an account whose hash has older parameters takes as long as these take, until its next sign-in.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, TypeVar

from argon2 import extract_parameters
from argon2.exceptions import Argon2Error, InvalidHashError, VerifyMismatchError
from argon2.low_level import Type, hash_secret, verify_secret

from coatcheck.core.passwords import Password
from coatcheck.errors import ConfigurationError, StoreUnavailable
from coatcheck.server.accounts import PasswordHash, User
from coatcheck.system import REAL, System

T = TypeVar("T")

FEWEST_WAITING: Final = 8
MOST_WAITING: Final = 512
_SALT_BYTES: Final = 16
_HASH_BYTES: Final = 32
_MOST_MEMORY_KIB: Final = 1024 * 1024
_MOST_PASSES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HashParameters:
    """What one hash costs: memory in KiB, passes over it, lanes.

    Raise memory first, where logins per second allow it. Refused below what ASVS 11.4.2 lists for argon2id.
    """

    memory_kib: int = 19 * 1024
    passes: int = 2
    lanes: int = 1

    def __post_init__(self) -> None:
        least = {1: 46 * 1024, 2: 19 * 1024}.get(self.passes, 12 * 1024)
        if not 1 <= self.passes <= _MOST_PASSES or not least <= self.memory_kib <= _MOST_MEMORY_KIB:
            raise ConfigurationError(
                "password_hash: argon2id takes at least 46 MiB with one pass, 19 MiB with two, 12 MiB with more; "
                f"at most {_MOST_MEMORY_KIB // 1024} MiB and {_MOST_PASSES} passes"
            )
        if not 1 <= self.lanes <= 16:
            raise ConfigurationError("password_hash: 1 to 16 lanes")


@dataclass(frozen=True, slots=True, kw_only=True)
class HashingQueue:
    """How much hashing may be under way: threads, and seconds of work that may wait for them.

    `threads` is 1 in a process that also serves. `waiting` fixes the number of waiting hashes; `None` derives it from
    the time of one hash, taken when the hasher opens.
    """

    threads: int = 1
    seconds: float = 2.0
    waiting: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.threads <= 64 or not 0 < self.seconds <= 60:
            raise ConfigurationError("password_hash_queue: 1 to 64 threads, up to 60 seconds")
        if self.waiting is not None and not 1 <= self.waiting <= MOST_WAITING:
            raise ConfigurationError(f"password_hash_queue: 1 to {MOST_WAITING} may wait")

    def capacity(self, *, seconds_per_hash: float) -> int:
        """Hashes that may be under way or wait at once."""
        if self.waiting is not None:
            return self.waiting
        fitting = self.seconds * self.threads / seconds_per_hash if seconds_per_hash > 0 else math.inf
        return max(FEWEST_WAITING, int(min(fitting, MOST_WAITING)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """The password is the account's. `needs_rehash`: its hash was made with other parameters than today's."""

    needs_rehash: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong:
    """The password is not the account's. `why` is for the audit log; the client must not be able to tell."""

    why: Literal["mismatch", "no_account", "no_password", "unreadable_hash"]


Verification: TypeAlias = "Verified | Wrong"


class Algorithm(Protocol):
    """One hash computation a call; runs on the hasher's threads."""

    def hash(self, password: bytes, *, salt: bytes, parameters: HashParameters) -> str:
        """The stored form, with salt and parameters in it."""
        ...

    def matches(self, stored: str, password: bytes) -> bool:
        """Raises: ValueError when `stored` is not a hash of this algorithm within bounds; nothing was computed."""
        ...

    def parameters(self, stored: str) -> HashParameters | None:
        """What a stored hash was made with; `None` when it is not a hash that is made today."""
        ...


class Argon2id:
    """argon2id, version 1.3 (RFC 9106). The computation releases the interpreter lock."""

    def hash(self, password: bytes, *, salt: bytes, parameters: HashParameters) -> str:
        """The stored form, as `$argon2id$...`."""
        return hash_secret(
            password,
            salt,
            time_cost=parameters.passes,
            memory_cost=parameters.memory_kib,
            parallelism=parameters.lanes,
            hash_len=_HASH_BYTES,
            type=Type.ID,
        ).decode("ascii")

    def matches(self, stored: str, password: bytes) -> bool:
        """Raises: ValueError when `stored` is not argon2id, or asks for more than may be computed."""
        try:
            found = extract_parameters(stored)
        except InvalidHashError as broken:
            raise ValueError("not an argon2 hash") from broken
        # A row that says four gigabytes must not be believed.
        if found.type is not Type.ID or found.memory_cost > _MOST_MEMORY_KIB or found.time_cost > _MOST_PASSES:
            raise ValueError("argon2 parameters out of bounds")
        try:
            return verify_secret(stored.encode("ascii"), password, Type.ID)
        except VerifyMismatchError:
            return False
        except (Argon2Error, UnicodeEncodeError) as broken:
            raise ValueError("not an argon2 hash") from broken

    def parameters(self, stored: str) -> HashParameters | None:
        """What a stored hash was made with; `None` when it is not a hash that is made today."""
        try:
            found = extract_parameters(stored)
            if found.type is not Type.ID or found.version != 19 or found.hash_len != _HASH_BYTES:
                return None
            return HashParameters(memory_kib=found.memory_cost, passes=found.time_cost, lanes=found.parallelism)
        except (InvalidHashError, ConfigurationError):
            return None


class PasswordHasher:
    """Verifies and hashes for one process. Safe for any number of tasks; open it before, close it after.

    A caller that is cancelled leaves its computation to end by itself: its place in the queue is free again when the
    thread is, not earlier.
    """

    def __init__(
        self,
        *,
        parameters: HashParameters | None = None,
        queue: HashingQueue | None = None,
        system: System = REAL,
        algorithm: Algorithm | None = None,
    ) -> None:
        self.parameters: Final = parameters or HashParameters()
        self._queue = queue or HashingQueue()
        self._system = system
        self._algorithm: Algorithm = algorithm or Argon2id()
        self._threads: ThreadPoolExecutor | None = None
        self._nobody = ""
        self._capacity = 0
        self._waiting = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Hashes that may be under way or wait at once; 0 while closed."""
        return self._capacity

    @property
    def waiting(self) -> int:
        """Hashes under way or waiting now."""
        return self._waiting

    async def open(self) -> None:
        """Start the threads and make the hash that stands for accounts that do not exist. Safe to call again."""
        if self._threads is not None:
            return
        threads = ThreadPoolExecutor(self._queue.threads, thread_name_prefix="coatcheck-password")
        self._threads = threads
        try:
            # A password nobody knows: verifying against it always fails, after the same work as any other.
            begun = self._system.elapsed()
            self._nobody = await asyncio.wrap_future(threads.submit(self._hash, self._system.random(32)))
            took = self._system.elapsed() - begun
        except BaseException:
            await self.close()
            raise
        self._capacity = self._queue.capacity(seconds_per_hash=took)

    async def close(self) -> None:
        """Take nothing new, finish what was accepted, let the threads go. It may be opened again."""
        threads, self._threads = self._threads, None
        self._capacity = 0
        if threads is not None:
            await asyncio.to_thread(threads.shutdown)

    async def verify(self, user: User | None, password: Password, *, known_device: bool = False) -> Verification:
        """Judge a password, with exactly one hash computation whatever the account is.

        `known_device`: the attempt may use the reserved part of the queue. Raises: StoreUnavailable with
        `retry_after` when the queue is full; nothing was judged then.
        """
        stored = None if user is None or user.password_hash is None else user.password_hash.text
        verdict = await self._compute(lambda: self._verify(stored, password.octets), known_device=known_device)
        if isinstance(verdict, Wrong) and stored is None:
            return Wrong(why="no_account" if user is None else "no_password")
        return verdict

    async def hash(self, password: Password, *, known_device: bool = False) -> PasswordHash:
        """The stored form of a new password. Raises: StoreUnavailable when the queue is full."""
        return PasswordHash(await self._compute(lambda: self._hash(password.octets), known_device=known_device))

    async def _compute(self, work: Callable[[], T], *, known_device: bool) -> T:
        return await asyncio.wrap_future(self._submit(work, known_device=known_device))

    def _submit(self, work: Callable[[], T], *, known_device: bool) -> Future[T]:
        threads = self._threads
        if threads is None or not self._capacity:
            raise StoreUnavailable("passwords: the hasher is closed")
        room = self._capacity if known_device else self._capacity - self._capacity // 4
        with self._lock:
            if self._waiting >= room:
                raise StoreUnavailable(
                    f"passwords: {self._waiting} hashes are waiting", retry_after=math.ceil(self._queue.seconds)
                )
            self._waiting += 1
        try:
            job = threads.submit(work)
        except BaseException:
            self._leave()
            raise
        # On the job and not on the caller: a cancelled caller must not let a second one in beside its running hash.
        job.add_done_callback(self._leave)
        return job

    def _leave(self, _: object = None) -> None:
        with self._lock:
            self._waiting -= 1

    # -- on the threads --------------------------------------------------------------------------------------------

    def _hash(self, password: bytes) -> str:
        return self._algorithm.hash(password, salt=self._system.random(_SALT_BYTES), parameters=self.parameters)

    def _verify(self, stored: str | None, password: bytes) -> Verification:
        why: Literal["mismatch", "unreadable_hash"] = "mismatch"
        if stored is not None:
            try:
                if self._algorithm.matches(stored, password):
                    return Verified(needs_rehash=self._algorithm.parameters(stored) != self.parameters)
                return Wrong(why="mismatch")
            except ValueError:
                why = "unreadable_hash"
        # The answer does not matter: nobody is signed in by it.
        self._algorithm.matches(self._nobody, password)
        return Wrong(why=why)
