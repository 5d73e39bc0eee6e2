"""Logout against slow requests, and many sign-ins at once: drawn by a seed, the same for every store.

A failure names its seed; `--seed N` repeats it. COATCHECK_TEST_FULL=1 (or `--full`) runs ten times as many.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest

from coatcheck.core.ports import (
    REASON_EVICTED,
    Absent,
    Activity,
    Admitted,
    Aliased,
    Alive,
    Changes,
    Committed,
    Converged,
    Ended,
    Gone,
    LimitReached,
    Live,
    OnLimit,
    RecordLimits,
    Rotated,
)
from coatcheck.core.session import NewSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance import Bench
from tests.stores.conftest import Place

INTERLEAVINGS = 1000
BATCH = 50
MINUTE_US = 60_000_000
WIDE = RecordLimits(octets=10_000, fields=100)

Step = Callable[[], Coroutine[Any, Any, object]]
KINDS = ("load", "commit", "commit expected", "touch", "rotate", "rotate authority", "expire_idle", "create")


@dataclass
class Race:
    """One session, the requests that are under way, and the logout among them."""

    bench: Bench
    new: NewSession
    schedule: list[tuple[str, int, str]]
    # What each of the slow requests has in hand: the digest it read last.
    in_hand: dict[int, str] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)
    ended_by_logout: list[bool] = field(default_factory=list)
    late: list[str] = field(default_factory=list)

    async def step(self, kind: str, actor: int, successor: str) -> None:
        store, new = self.bench.either(actor), self.new
        digest = self.in_hand.get(actor, new.digest)
        over = bool(self.ended_by_logout)
        answer: object = None
        if kind == "load":
            answer = await store.load(new.ref, digest)
            if isinstance(answer, Live):
                self.in_hand[actor] = answer.session.digest
        elif kind == "commit":
            answer = await store.commit(new.ref, Changes(put={f"by{actor}": "1"}), limits=WIDE)
        elif kind == "commit expected":
            answer = await store.commit(new.ref, Changes(put={"a": "1"}), limits=WIDE, expected=1)
        elif kind == "touch":
            await store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=await store.ping())])
        elif kind in ("rotate", "rotate authority"):
            answer = await store.rotate_id(
                new.ref,
                old_digest=digest,
                new_digest=successor,
                sealed=successor.encode(),
                alias_us=MINUTE_US,
                authority="{}" if kind == "rotate authority" else None,
            )
            self.digests.append(successor)
            if isinstance(answer, Rotated):
                self.in_hand[actor] = successor
        elif kind == "expire_idle":
            answer = await store.expire_idle(new.ref)
        elif kind == "create":
            # The sign-in is delivered again; once its id was rotated or has ended a store may refuse that.
            with contextlib.suppress(StoreUnavailable):
                await store.create(new)
        elif kind == "logout":
            self.ended_by_logout.append((await store.revoke(new.ref, reason="logout")).ended)
        elif kind == "logout everywhere":
            ended = await store.revoke_owner(new.ref.tag, new.owner, reason="logout")
            self.ended_by_logout.append(new.ref in ended.ended)
        if over and isinstance(answer, (Alive, Aliased, Committed, Converged, Live, Rotated)):
            self.late.append(f"{kind} by {actor}: {answer!r}")

    async def verdict(self) -> str | None:
        """What is wrong, or nothing."""
        if self.late:
            return f"accepted after the logout had returned: {self.late}"
        for digest in self.digests:
            for store in (self.bench.store, self.bench.other):
                loaded = await store.load(self.new.ref, digest)
                if not isinstance(loaded, Ended) or loaded.reason != "logout":
                    return f"came back: {loaded!r}"
        written = await self.bench.store.commit(self.new.ref, Changes(put={"ghost": "1"}), limits=WIDE)
        if not isinstance(written, Gone):
            return f"took a write: {written!r}"
        return None


def draw_schedule(dice: random.Random, bench: Bench) -> list[tuple[str, int, str]]:
    """Steps of four slow requests with a logout among them; each step has a fresh id at hand, should it rotate."""
    kinds = [dice.choice(KINDS) for _ in range(dice.randint(3, 9))]
    logout = dice.choices(("logout", "logout everywhere"), (4, 1))[0]
    kinds.insert(dice.randint(0, len(kinds)), logout)
    return [(kind, dice.randrange(4), bench.digest()) for kind in kinds]


@pytest.mark.timeout(900)
def test_no_session_comes_back_after_logout(place: Place, seed: int, long_form: bool) -> None:
    dice = random.Random(f"{seed}-{place}")
    bench = place.bench(seed=seed)

    async def play() -> None:
        await bench.store.open()
        await bench.other.open()
        for number in range((INTERLEAVINGS * (10 if long_form else 1)) // BATCH):
            await play_batch(bench, dice, number, f"{place}, batch {number}, seed {seed}")
        await bench.other.close()
        await bench.store.close()

    place.run(play())


async def play_batch(bench: Bench, dice: random.Random, number: int, name: str) -> None:
    races: list[Race] = []
    for each in range(BATCH):
        # Every session of its own owner: one of the two logouts ends all that an owner has.
        new = bench.new_session(f"user-{number}-{each}")
        races.append(Race(bench=bench, new=new, schedule=draw_schedule(dice, bench), digests=[new.digest]))
    await bench.gather([partial(bench.either(n).create, race.new) for n, race in enumerate(races)])
    in_order = number % 2 == 0
    if in_order:
        # Exactly the drawn order within a session, beside all the other sessions.
        async def follow(race: Race) -> None:
            for kind, actor, successor in race.schedule:
                await race.step(kind, actor, successor)

        await bench.gather([partial(follow, race) for race in races])
    else:
        # The drawn steps of all sessions at once, in whatever order they arrive.
        steps: list[Step] = [partial(race.step, *step) for race in races for step in race.schedule]
        dice.shuffle(steps)
        await bench.gather(steps)
        for race in races:
            race.late.extend(() if race.ended_by_logout == [True] else ("the logout did not end it",))
    verdicts = await bench.gather([race.verdict for race in races])
    for race, verdict in zip(races, verdicts, strict=True):
        assert verdict is None, f"{name}: {race.schedule}: {verdict}"
        assert race.ended_by_logout == [True], f"{name}: {race.schedule}: the logout ended {race.ended_by_logout}"
    page = await bench.store.scan(after=None, limit=1000)
    assert page.sessions == (), f"{name}: still in the list of everybody"


@pytest.mark.parametrize("on_limit", ["allow", "evict_oldest", "refuse", "ask"])
def test_two_hundred_sign_ins_at_once_under_a_limit_of_one(place: Place, on_limit: OnLimit, seed: int) -> None:
    bench = place.bench(seed=seed)
    sessions = [bench.new_session() for _ in range(200)]

    async def play() -> None:
        await bench.store.open()
        await bench.other.open()
        answers = await bench.gather(
            [partial(bench.either(n).admit, new, maximum=1, on_limit=on_limit) for n, new in enumerate(sessions)]
        )
        alive = set(await bench.handles_of("ann"))
        inside = {each.session.ref.handle for each in answers if isinstance(each, Admitted)}
        loaded = await bench.gather([partial(bench.load, new) for new in sessions])
        assert {each.session.ref.handle for each in loaded if isinstance(each, Live)} == alive
        if on_limit == "allow":
            assert len(alive) == 200
        elif on_limit == "evict_oldest":
            assert len(alive) == 1
            assert len(inside) == 200
            assert [each.reason for each in loaded if isinstance(each, Ended)] == [REASON_EVICTED] * 199
        else:
            assert len(alive) == 1
            assert inside == alive
            refused = [each for each in answers if isinstance(each, LimitReached)]
            assert len(refused) == 199
            assert all({ref.handle for ref in each.alive} == alive for each in refused)
            assert sum(isinstance(each, Absent) for each in loaded) == 199
        await bench.other.close()
        await bench.store.close()

    place.run(play())
