"""A decision about another place is made once, by whoever comes first, and lost by nobody. Over every store.

Each attack is named by its test: the copied cookie that comes everywhere at once, the copied cookie that hides behind
other writes, the node that has not heard of a decision, the second address family as a way around a block.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest

from coatcheck.core.binding import (
    MAX_PLACES_OCTETS,
    PLACES_FIELD,
    BindingPolicy,
    KnownPlace,
    Outcome,
    Places,
    Surveyor,
    pack_places,
    unpack_places,
)
from coatcheck.core.ids import IdKeys, SessionId, mint_session_id, owner_of, subject_tag
from coatcheck.core.ports import Changes, Colour, Committed, RecordLimits, SessionStore
from coatcheck.core.session import SECOND_US, Authority, NewSession, encode_authority
from coatcheck.errors import PlaceRefused, StoreUnavailable
from coatcheck.operations.place import Judged, Seen, judge_place, prove_place
from coatcheck.operations.resume import LifeLimits, NotResumed, Resumed, resume
from coatcheck.stores.conformance import Bench, together
from coatcheck.system import REAL
from tests.operations.conftest import Desk
from tests.stores.conftest import BACKENDS, COLOURS, Place, stores_database

# A fixture, found by its name here.
__all__ = ["stores_database"]

T = TypeVar("T")
LIMITS = RecordLimits(octets=1000, fields=10)
LIFE = LifeLimits(idle_us=600 * SECOND_US, absolute_us=3600 * SECOND_US)
HOME, AWAY, SIX, OTHER_SIX = "198.51.100.7", "203.0.113.9", "2001:db8:1:1::7", "2001:db8:2:2::7"
BLOCK_FOR = 300
MANY = 32


@dataclass
class Site:
    """One session in a store, signed in at HOME, and two nodes' ways to it."""

    bench: Bench
    keys: IdKeys
    id: SessionId
    surveyor: Surveyor
    events: list[str] = field(default_factory=list)

    def seen(self, address: str | None) -> Seen:
        return Seen(place=self.surveyor.seen(address, "", None), address=address)

    def again(self, store: SessionStore) -> Callable[[], Awaitable[Resumed | NotResumed]]:
        return lambda: resume(store, self.keys, self.id, limits=LIFE, server_key=None)

    async def found(self, node: int = 0) -> Resumed:
        found = await self.again(self.bench.either(node))()
        assert isinstance(found, Resumed)
        return found

    async def judge(self, address: str | None, *, node: int = 0, of: Resumed | None = None) -> Judged:
        store = self.bench.either(node)
        judged = await judge_place(
            store,
            self.surveyor,
            of or await self.found(node),
            self.seen(address),
            sid="sid",
            limits=LIMITS,
            again=self.again(store),
        )
        assert isinstance(judged, Judged)
        self.events += [event.kind for event in judged.events]
        return judged

    async def prove(self, address: str, *, of: Resumed | None = None) -> Resumed:
        store = self.bench.store
        return await prove_place(
            store,
            self.surveyor,
            of or await self.found(),
            self.seen(address),
            limits=LIMITS,
            again=self.again(store),
        )

    async def places(self) -> Places:
        return unpack_places((await self.found()).session.fields.get(PLACES_FIELD, ""))


async def site_of(bench: Bench, outcome: Outcome = "block", *, fields: dict[str, str] | None = None) -> Site:
    keys = IdKeys(b"t" * 32, b"c" * 32)
    await bench.store.open()
    await bench.other.open()
    random = REAL.random
    id_ = mint_session_id(keys, tag=subject_tag(keys, "", "ann"), handle=random(12), secret=random(24))
    await bench.store.create(
        NewSession(
            ref=id_.ref,
            digest=id_.digest,
            owner=owner_of("", "ann"),
            subject="ann",
            idle_us=LIFE.idle_us,
            absolute_us=LIFE.absolute_us,
            authority=encode_authority(Authority(networks={"4": HOME})),
            fields=fields or {},
        )
    )
    policy = BindingPolicy(network="prefix", on_mismatch=outcome, block_for=BLOCK_FOR)
    return Site(bench=bench, keys=keys, id=id_, surveyor=Surveyor(policy))


SERVED = [
    pytest.param(
        (backend, colour), id=f"{backend.name}-{colour}", marks=[pytest.mark.servers] if backend.server else []
    )
    for backend in BACKENDS
    if backend.group is None
    for colour in COLOURS
]


Run = Callable[[Callable[[Bench], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=SERVED)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Run]:
    """`run(scenario)` on a fresh bench of each store, in each colour."""
    backend, colour = cast(tuple[Any, Colour], request.param)
    server = request.getfixturevalue(backend.server) if backend.server else None
    runner = asyncio.Runner() if colour == "async" else None
    place = Place(
        backend=backend, colour=colour, server=server, directory=tmp_path, runner=runner, numbers=iter(range(9))
    )
    benches: list[Bench] = []

    def run(scenario: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        benches.append(place.bench())
        place.run(scenario(benches[-1]))

    yield run
    for bench in benches:
        place.run(bench.store.close())
        place.run(bench.other.close())
    if runner is not None:
        runner.close()


# -- over every store ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["notify", "step_up", "block", "revoke"])
def test_of_32_simultaneous_first_requests_over_two_nodes_one_is_told_and_all_get_the_same(
    run: Run, outcome: Outcome
) -> None:
    async def scenario(bench: Bench) -> None:
        site = await site_of(bench, outcome)
        asked = [await site.found(node) for node in range(MANY)]
        judged = await together(bench.colour, [partial(site.judge, AWAY, node=n, of=asked[n]) for n in range(MANY)])
        assert {(each.outcome, each.until_us) for each in judged} == {(outcome, judged[0].until_us)}
        assert site.events == ["risk.decided"]
        assert [each.outcome for each in (await site.places()).known] == [outcome]

    run(scenario)


def test_what_is_written_to_the_session_meanwhile_is_not_lost_and_does_not_make_the_decision_fail(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        site = await site_of(bench, "block")
        asked = [await site.found(node) for node in range(8)]

        async def write(number: int) -> object:
            changes = Changes(put={f"f{number % 8}": f'"{number}"'})
            return await bench.either(number).commit(site.id.ref, changes, limits=LIMITS)

        # Each of them is written once, so a decision is overtaken five times at most.
        work: list[Callable[[], Coroutine[Any, Any, object]]] = [partial(write, n) for n in range(5)]
        work += [partial(site.judge, AWAY, node=n, of=asked[n]) for n in range(8)]
        answers = await together(bench.colour, work)
        assert {each.outcome for each in answers if isinstance(each, Judged)} == {"block"}
        fields = (await site.found()).session.fields
        assert {name: fields[name] for name in fields if name != PLACES_FIELD} == {f"f{n}": f'"{n}"' for n in range(5)}
        assert site.events == ["risk.decided"]

    run(scenario)


def test_a_decision_on_an_older_copy_of_the_record_is_made_anew(run: Run) -> None:
    """A node that has not heard yet of what another one decided writes nothing over it."""

    async def scenario(bench: Bench) -> None:
        site = await site_of(bench, "step_up")
        old = await site.found()
        first = await site.judge(AWAY)
        await bench.other.commit(site.id.ref, Changes(put={"cart": "3"}), limits=LIMITS)
        elsewhere = await site.judge("192.0.2.1", node=1, of=old)
        again = await site.judge(AWAY, node=1, of=old)
        assert (first.outcome, elsewhere.outcome, again.outcome) == ("step_up", "step_up", "step_up")
        assert again.found.session.fields["cart"] == "3"
        assert len((await site.places()).known) == 2
        assert site.events == ["risk.decided"] * 2

    run(scenario)


def test_a_proof_on_an_older_copy_keeps_what_was_decided_meanwhile(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        site = await site_of(bench, "block")
        await site.judge(AWAY)
        old = await site.found()
        await site.judge("192.0.2.1", node=1)
        proven = await site.prove(HOME, of=old)
        assert unpack_places(proven.session.fields[PLACES_FIELD]) == await site.places()
        places = await site.places()
        assert ([each.outcome for each in places.known], places.challenged_us) == (["block", "block"], 0)

    run(scenario)


def test_neither_a_decision_nor_a_refused_request_moves_last_activity(run: Run) -> None:
    """A thief who knocks must not keep the session alive."""

    async def scenario(bench: Bench) -> None:
        site = await site_of(bench, "block")
        before = (await site.found()).seen_us
        bench.clock.offset_us += 60 * SECOND_US
        for _ in range(3):
            await site.judge(AWAY)
            bench.clock.offset_us += 60 * SECOND_US
        assert (await site.found()).seen_us == before

    run(scenario)


def test_a_session_filled_by_its_application_still_has_room_for_the_decision(run: Run) -> None:
    async def scenario(bench: Bench) -> None:
        full = {f"f{number}": "1" * 98 for number in range(9)}
        full["f9"] = "1" * (LIMITS.octets - sum(len(name) + len(text) for name, text in full.items()) - 2)
        site = await site_of(bench, "block", fields=full)
        written = await bench.store.commit(site.id.ref, Changes(put={"f0": full["f0"]}), limits=LIMITS)
        assert isinstance(written, Committed)
        assert (await site.judge(AWAY)).outcome == "block"
        assert site.events == ["risk.decided"]
        assert (await site.judge(HOME)).outcome == "step_up"

    run(scenario)


# -- once, over memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def at(desk: Desk) -> Callable[..., Site]:
    """`at("block")`: a site whose clock is the desk's."""

    def make(outcome: Outcome = "block", **more: Any) -> Site:
        return desk.run(site_of(cast(Bench, _DeskBench(desk)), outcome, **more))

    return make


class _DeskBench:
    """The desk's store as the part of a bench that a site needs; it counts."""

    def __init__(self, desk: Desk) -> None:
        self.store = self.other = desk.store

    def either(self, number: int) -> SessionStore:
        return self.store


@pytest.mark.parametrize(("outcome", "expected"), [("notify", "notify"), ("step_up", "step_up"), ("block", "block")])
def test_what_matches_or_is_known_costs_nothing_and_what_is_new_one_write(
    desk: Desk, at: Callable[..., Site], outcome: Outcome, expected: str
) -> None:
    site = at(outcome)
    found = desk.run(site.found())
    desk.wrapped.forget()
    assert desk.run(site.judge(HOME, of=found)).outcome == "allow"
    assert desk.wrapped.verbs == []
    first = desk.run(site.judge(AWAY, of=found))
    assert (first.outcome, desk.wrapped.verbs) == (expected, ["commit"])
    desk.wrapped.forget()
    for _ in range(3):
        assert desk.run(site.judge(AWAY, of=first.found)).outcome == expected
    assert desk.wrapped.verbs == []


def test_a_block_runs_out_at_that_very_moment_and_is_decided_anew(desk: Desk, at: Callable[..., Site]) -> None:
    site = at("block")
    first = desk.run(site.judge(AWAY))
    assert first.until_us == desk.system.now_us() + BLOCK_FOR * SECOND_US
    desk.system.advance(BLOCK_FOR - 1e-6)
    last = desk.run(site.judge(AWAY))
    assert (last.until_us, site.events) == (first.until_us, ["risk.decided"])
    desk.system.advance(1e-6)
    anew = desk.run(site.judge(AWAY))
    assert (anew.outcome, anew.until_us) == ("block", desk.system.now_us() + BLOCK_FOR * SECOND_US)
    assert site.events == ["risk.decided"] * 2


def test_another_address_family_is_told_once_and_never_refused(desk: Desk, at: Callable[..., Site]) -> None:
    """Happy eyeballs (RFC 8305): the same browser comes over IPv6 a moment later."""
    site = at("revoke")
    assert [desk.run(site.judge(SIX)).outcome for _ in range(3)] == ["allow"] * 3
    assert site.events == ["risk.decided"]
    assert desk.run(site.judge(HOME)).outcome == "allow"
    assert desk.run(site.judge(OTHER_SIX)).outcome == "revoke"


def test_a_thief_who_is_refused_at_one_address_family_does_not_get_in_by_the_other(
    desk: Desk, at: Callable[..., Site]
) -> None:
    site = at("block")
    assert desk.run(site.judge(AWAY)).outcome == "block"
    assert desk.run(site.judge(OTHER_SIX)).outcome == "step_up"
    assert desk.run(site.places()).networks == ()
    # What is asked of nobody's place and of the session's own is the same; the owner proves himself, also over IPv6.
    desk.run(site.prove(SIX))
    places = desk.run(site.places())
    assert (places.networks, places.challenged_us) == ((("6", SIX),), 0)
    assert [desk.run(site.judge(address)).outcome for address in (SIX, HOME)] == ["allow", "allow"]
    assert desk.run(site.judge(OTHER_SIX)).outcome == "block"


def test_an_address_that_cannot_be_told_any_more_is_another_place(desk: Desk, at: Callable[..., Site]) -> None:
    site = at("block")
    assert desk.run(site.judge(None)).outcome == "block"


def test_a_refused_place_proves_nothing(desk: Desk, at: Callable[..., Site]) -> None:
    site = at("block")
    until = desk.run(site.judge(AWAY)).until_us
    with pytest.raises(PlaceRefused) as refused:
        desk.run(site.prove(AWAY))
    assert refused.value.until == until / SECOND_US
    assert desk.run(site.judge(AWAY)).outcome == "block"


@pytest.mark.parametrize("outcome", ["step_up", "block", "revoke"])
def test_nobody_is_let_in_because_a_decision_could_not_be_written(
    desk: Desk, at: Callable[..., Site], outcome: Outcome
) -> None:
    site = at(outcome)
    found = desk.run(site.found())
    desk.wrapped.away = frozenset({"commit"})
    with pytest.raises(StoreUnavailable):
        desk.run(site.judge(AWAY, of=found))
    assert site.events == []
    desk.wrapped.away = None
    assert desk.run(site.judge(AWAY)).outcome == outcome


def test_who_is_only_to_be_told_of_is_let_in_and_told_of_later(desk: Desk, at: Callable[..., Site]) -> None:
    site = at("notify")
    found = desk.run(site.found())
    desk.wrapped.away = frozenset({"commit"})
    away = desk.run(site.judge(AWAY, of=found))
    assert (away.outcome, away.kept, site.events) == ("notify", False, [])
    desk.wrapped.away = None
    assert (desk.run(site.judge(AWAY)).kept, site.events) == (True, ["risk.decided"])


def test_a_session_that_is_written_to_without_pause_lets_nobody_in(desk: Desk, at: Callable[..., Site]) -> None:
    """A copied cookie behind a stream of other writes: the decision loses each time, and the request is refused."""
    site, store = at("block"), desk.store
    stale = desk.run(site.found())

    async def overtaken() -> Resumed | NotResumed:
        found = await resume(store, site.keys, site.id, limits=LIFE, server_key=None)
        await store.commit(site.id.ref, Changes(put={"n": "1"}), limits=LIMITS)
        return found

    desk.run(store.commit(site.id.ref, Changes(put={"n": "1"}), limits=LIMITS))
    with pytest.raises(StoreUnavailable):
        desk.run(judge_place(store, site.surveyor, stale, site.seen(AWAY), sid="sid", limits=LIMITS, again=overtaken))


def test_a_ninth_refused_place_is_refused_and_writes_nothing(desk: Desk, at: Callable[..., Site]) -> None:
    """A copied cookie that is sent from everywhere must not make a write of every request."""
    site = at("block")
    for number in range(8):
        assert desk.run(site.judge(f"192.0.{number}.1")).outcome == "block"
    desk.system.advance(1)
    found = desk.run(site.found())
    desk.wrapped.forget()
    assert [desk.run(site.judge(f"203.0.{number}.9", of=found)).outcome for number in range(3)] == ["block"] * 3
    assert desk.wrapped.verbs == []


GARBAGE = [
    "x",
    "[]",
    "[0,[],[[]]]",
    '[0,[["5",""]],[]]',
    '["0",[],[]]',
    '[0,[],[["*","block",0,0,0]]]',
    '[0,[],[["AAAA","block",0,0,0]]]',
    '[0,[],[["AAAAAA==","often",0,0,0]]]',
    "[" * 1000,
    "\ud800",
]


@pytest.mark.parametrize("text", [*GARBAGE, "[0,[],[]]" + " " * MAX_PLACES_OCTETS])
def test_garbage_where_the_places_are_kept_is_no_places(text: str) -> None:
    with pytest.raises(ValueError, match="places"):
        unpack_places(text)


def test_the_largest_places_fit_and_come_back() -> None:
    from coatcheck.core.binding import MAX_PLACE_OCTETS, MAX_PLACES

    known = tuple(
        KnownPlace(
            place=bytes([n]) * MAX_PLACE_OCTETS, outcome="step_up", decided_us=2**62, until_us=2**62, seen_us=2**62
        )
        for n in range(MAX_PLACES)
    )
    # An address with a zone may hold anything; what JSON has to escape takes six octets.
    strange = ("fe80::1%" + "\x00" * 64)[:64]
    places = Places(known=known, challenged_us=2**62, networks=(("4", "1" * 64), ("6", strange)))
    text = pack_places(places)
    assert len(text.encode()) <= MAX_PLACES_OCTETS
    assert unpack_places(text) == places
