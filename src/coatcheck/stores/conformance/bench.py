"""What a conformance check works with: two stores on the same data, a clock that can be moved, fresh sessions.

Decides how one check runs in both colours: a check is a coroutine; in the blocking colour it never suspends and
simultaneous calls are threads, in the asynchronous colour it is awaited and simultaneous calls are tasks. It must
never sleep: where a store's clock cannot be stopped, answers are judged by the time they carry.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

from coatcheck.core.ids import IdKeys, SessionRef, owner_of, subject_tag
from coatcheck.core.ports import Changes, Colour, Created, Loaded, RecordLimits, Seen, Store
from coatcheck.core.refresh_token import FAMILY_BYTES, FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.primitives.digest import keyed, sha256_text
from coatcheck.stores.conformance.colours import interrupted, together

MINUTE_US: Final = 60 * SECOND_US
HOUR_US: Final = 60 * MINUTE_US
DAY_US: Final = 24 * HOUR_US
WIDE: Final = RecordLimits(octets=1 << 20, fields=1000)
"""Limits that no check reaches by accident."""

# Set where the clock cannot be stopped: how long before a moment the store is asked, coarse to fine, so that a slow
# machine still sees both sides and a fast one comes close.
_APPROACH_US: Final = (2_000_000, 200_000, 20_000, 5_000, 2_000, 1_000, 500, 200, 100, 50, 0)

T = TypeVar("T")
Corrupt: TypeAlias = Callable[[SessionRef, bytes], Awaitable[None]]


class ContractBroken(AssertionError):
    """A store did not do what `core.ports` promises."""


class Clock:
    """The lever of `StoreOptions.clock_offset_us`: hand the object itself in, and move it."""

    def __init__(self) -> None:
        self.offset_us = 0

    def __call__(self) -> int:
        """The offset as it is now, in microseconds."""
        return self.offset_us


@dataclass(kw_only=True)
class Bench:
    """One check's work place. `store` and `other` see the same data, under a name space nobody else uses.

    `clock` must be the offset of both stores. `stopped` says that their clock moves by nothing else. `corrupt`
    replaces the stored bytes of a session; `None` where a store keeps no bytes. Not for use by two checks at once.
    """

    store: Store
    other: Store
    clock: Clock
    stopped: bool
    seed: int = 0
    corrupt: Corrupt | None = None
    _drawn: int = field(init=False, default=0)

    @property
    def colour(self) -> Colour:
        """The colour of both stores."""
        return self.store.colour

    def either(self, number: int) -> Store:
        """The one store for even numbers, the other for odd ones."""
        return self.other if number % 2 else self.store

    def draw(self, size: int) -> bytes:
        """Up to 32 bytes that depend on the seed and on nothing else."""
        self._drawn += 1
        return keyed(self._drawn.to_bytes(8, "big"), key=b"%d" % self.seed, size=size, purpose=b"cc-bench")

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1."""
        return int.from_bytes(self.draw(8), "big") % limit

    def handle(self) -> str:
        """A handle nobody else has."""
        return urlsafe_b64encode(self.draw(12)).decode("ascii")

    def digest(self) -> str:
        """The digest of a fresh session id."""
        return sha256_text(self.draw(32))

    def new_session(
        self,
        subject: str | None = "ann",
        *,
        fields: Mapping[str, str] | None = None,
        authority: str = '{"tenant":""}',
        idle_us: int = HOUR_US,
        absolute_us: int = 30 * DAY_US,
    ) -> NewSession:
        """A session that was never created; `subject=None` makes it anonymous."""
        tag = self.below(65536) if subject is None else tag_of(subject)
        return NewSession(
            ref=SessionRef(tag, self.handle()),
            digest=self.digest(),
            owner=owner_of("", subject),
            subject=subject or "",
            idle_us=idle_us,
            absolute_us=absolute_us,
            authority=authority,
            fields={} if fields is None else dict(fields),
        )

    def new_family(
        self,
        session: NewSession | None,
        subject: str = "ann",
        *,
        client: str = "",
        key: str = "",
        idle_us: int = 10 * DAY_US,
        absolute_us: int = 30 * DAY_US,
    ) -> NewFamily:
        """A family that was never created, of this session, or (`None`) one of the subject that stands alone."""
        name = urlsafe_b64encode(self.draw(FAMILY_BYTES)).decode("ascii")
        if session is None:
            ref = FamilyRef(tag_of(subject), self.handle(), name, of_session=False)
        else:
            ref = FamilyRef(session.ref.tag, session.ref.handle, name)
        return NewFamily(
            ref=ref,
            digest=self.digest(),
            owner=owner_of("", subject) if session is None else session.owner,
            subject=subject if session is None else session.subject,
            client=client,
            key=key,
            grant='{"scope":"profile"}',
            idle_us=idle_us,
            absolute_us=absolute_us,
        )

    async def created(self, new: NewSession) -> Created:
        """Create it, and let the clock go on, so that no two sessions are of the same age."""
        answer = await self.store.create(new)
        self.advance(1000)
        return answer

    async def load(self, new: NewSession) -> Loaded:
        """Load by the id it was created with."""
        return await self.store.load(new.ref, new.digest)

    async def alive_of(self, subject: str, *, limit: int = 1000) -> list[Seen]:
        """All pages of a subject's list."""
        found: list[Seen] = []
        after: str | None = None
        for _ in range(10_000):
            page = await self.store.list_by_owner(tag_of(subject), owner_of("", subject), after=after, limit=limit)
            hold(len(page.sessions) <= limit, f"a page holds at most {limit} sessions")
            found.extend(page.sessions)
            if page.cursor is None:
                return found
            after = page.cursor
        raise ContractBroken("a list must come to an end")

    async def handles_of(self, subject: str, *, limit: int = 1000) -> list[str]:
        """The handles of a subject's alive sessions, oldest first."""
        return [each.session.ref.handle for each in await self.alive_of(subject, limit=limit)]

    async def put(self, ref: SessionRef, name: str, text: str) -> object:
        """Commit one field."""
        return await self.store.commit(ref, Changes(put={name: text}), limits=WIDE)

    def advance(self, by_us: int) -> None:
        """Move the stores' clock forward."""
        self.clock.offset_us += by_us

    async def move_to(self, moment_us: int) -> None:
        """Set the stores' clock, never back. A clock that cannot be stopped has gone on when this returns."""
        now = await self.store.ping()
        self.advance(max(0, moment_us - now))

    async def across(self, moment_us: int, ask: Callable[[], Awaitable[T]], *, before: Callable[[T], bool]) -> None:
        """Ask on both sides of a moment; `before(answer)` must be true exactly while `answer.now_us` is before it.

        With a stopped clock the sides are the last microsecond before the moment, and the moment.
        """
        early_seen = False
        for early in (1, 0) if self.stopped else _APPROACH_US:
            await self.move_to(moment_us - early)
            answer = await ask()
            now = _time_of(answer)
            if self.stopped:
                agree(now, moment_us - early, "the time in the answer")
            agree(before(answer), now < moment_us, f"{moment_us - now} us before the moment, {answer!r}: before")
            if now >= moment_us:
                hold(early_seen, "the machine was too slow to see the side before the moment")
                return
            early_seen = True
        raise ContractBroken("the moment never came")

    async def gather(self, calls: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Run all calls as simultaneously as the colour can; their results in order."""
        return await together(self.colour, calls)

    async def interrupted(self, call: Callable[[], Coroutine[Any, Any, object]], *, turns: int) -> None:
        """Start a call and cancel it after so many turns of the event loop; a blocking call runs to its end."""
        await interrupted(self.colour, call, turns=turns)


def tag_of(subject: str) -> int:
    """Where a subject's sessions live, under the keys that all checks use."""
    return subject_tag(_KEYS, "", subject)


def hold(claim: bool, promise: str) -> None:
    """Raises: ContractBroken unless the claim is true."""
    if not claim:
        raise ContractBroken(promise)


def agree(found: object, wanted: object, what: str) -> None:
    """Raises: ContractBroken unless both are equal."""
    if found != wanted:
        raise ContractBroken(f"{what}: {found!r}, not {wanted!r}")


def expect(kind: type[T], answer: object) -> T:
    """The answer, known to be of this kind. Raises: ContractBroken."""
    if not isinstance(answer, kind):
        raise ContractBroken(f"the answer is {answer!r}, not {kind.__name__}")
    return answer


def _time_of(answer: object) -> int:
    now = getattr(answer, "now_us", None)
    return expect(int, now)


_KEYS: Final = IdKeys(b"t" * 32, b"c" * 32)
