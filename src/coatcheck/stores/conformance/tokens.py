"""Checks of refresh families, of the denylist (`deny_us` included), of `standing` and of the key ring.

The table in `core.ports.TokenStore.rotate_refresh` is the promise; here each of its rows is asked for, at both sides
of its boundary. A successor is told by its digest alone, and a sealed successor is any bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    REASON_EVICTED,
    REASON_REUSED,
    REASON_SUPERSEDED,
    TOMBSTONE_US,
    Admitted,
    Committed,
    Denial,
    DenialPage,
    Ended,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Gone,
    LimitReached,
    Live,
    PositionLost,
    RefreshOutcome,
    RevokedMany,
    Rotated,
    Store,
    WrongHolder,
    session_denial_id,
)
from coatcheck.core.refresh_token import FIRST_GENERATION, FamilyRef, NewFamily, StoredFamily
from coatcheck.core.session import NewSession, StoredSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance.bench import (
    DAY_US,
    HOUR_US,
    MINUTE_US,
    Bench,
    ContractBroken,
    agree,
    expect,
    hold,
    tag_of,
)

GRACE_US: Final = MINUTE_US
SIMULTANEOUS: Final = 50
ROUNDS: Final = 5
RING_OCTETS: Final = 256 * 1024
CLIENT: Final = "a third party"


@dataclass(frozen=True, slots=True)
class Held:
    """A refresh token as its holder presents it."""

    ref: FamilyRef
    generation: int
    digest: str
    client: str = ""
    key: str = ""

    def next(self, digest: str) -> Held:
        """The token that took its place."""
        return replace(self, generation=self.generation + 1, digest=digest)


# -- beginning a family --------------------------------------------------------------------------------------------


async def check_a_family_keeps_what_it_was_given(bench: Bench) -> None:
    """Every member comes back as it went in, with its session or alone; the times are the store's."""
    session = await _signed_in(bench, "Zoë 🦉", fields={"a": "1"})
    for owner in (session, None):
        new = replace(
            bench.new_family(owner, "Zoë 🦉", client="https://client.example/☃", key="k" * 43),
            grant='{"scope":"a b","näme":"{x}:*\'\\n"}',
        )
        created = expect(FamilyCreated, await bench.store.create_family(new))
        family = created.family
        hold(family.created_us <= created.now_us, "a family is created at the store's time")
        agree(family, _as_written(new, family.created_us), "the family")
        agree(created.session, None if owner is None else await _record(bench, session), "its session")
        held = Held(new.ref, FIRST_GENERATION, new.digest, new.client, new.key)
        kept = expect(FamilyKept, await _present(bench, held, store=bench.other, grace_us=GRACE_US))
        agree((kept.family, kept.session), (family, created.session), "family and session, read elsewhere")


async def check_create_family_repeated_answers_alike(bench: Bench) -> None:
    """Twenty deliveries of one call are one call, and a late one changes nothing."""
    session = await _signed_in(bench)
    for owner in (session, None):
        new = bench.new_family(owner)
        answers = await bench.gather([partial(bench.either(n).create_family, new) for n in range(20)])
        families = {expect(FamilyCreated, each).family.created_us for each in answers}
        agree(len(families), 1, "different answers")
        bench.advance(MINUTE_US)
        again = expect(FamilyCreated, await bench.other.create_family(new))
        agree(again.family, _as_written(new, families.pop()), "the repeated answer")


async def check_create_family_is_not_repeated_later(bench: Bench) -> None:
    """Once its first token was exchanged, or it ended or was cut off, the same call is an exception, no answer."""
    session = await _signed_in(bench)
    for owner in (session, None):
        for ending in ("one rotation", "two rotations", "reuse", "a cut"):
            new = bench.new_family(owner, client=CLIENT)
            expect(FamilyCreated, await bench.store.create_family(new))
            held = first = Held(new.ref, FIRST_GENERATION, new.digest, CLIENT)
            if ending == "a cut":
                if owner is not None:
                    continue
                await bench.store.revoke_owner(new.ref.tag, new.owner, reason="password changed")
            else:
                for _ in range(1 if ending == "one rotation" else 2):
                    held = await _rotated(bench, held)
            if ending == "reuse":
                expect(FamilyReused, await _present(bench, first))
            for store in (bench.store, bench.other):
                try:
                    answer: object = await store.create_family(new)
                except StoreUnavailable:
                    answer = None
                agree(answer, None, f"the answer after {ending}")
            now = await _present(bench, held, grace_us=HOUR_US)
            hold(isinstance(now, FamilyKept if "rotation" in ending else FamilyEnded), f"changed nothing: {now!r}")


async def check_create_family_refuses_a_name_in_use(bench: Bench) -> None:
    """A second family never takes the place of a first: the broken random source is an exception."""
    session = await _signed_in(bench)
    for owner in (session, None):
        new = bench.new_family(owner)
        expect(FamilyCreated, await bench.store.create_family(new))
        try:
            answer: object = await bench.other.create_family(replace(new, digest=bench.digest()))
        except StoreUnavailable:
            answer = None
        agree(answer, None, "the answer for a name in use")
        expect(FamilyKept, await _present(bench, Held(new.ref, 1, new.digest), grace_us=GRACE_US))


async def check_no_family_begins_on_a_session_that_is_over(bench: Bench) -> None:
    """Ended, idle, too old or never there: no family, and the reason is told."""
    revoked, idle = await _signed_in(bench), await _signed_in(bench, idle_us=5 * MINUTE_US)
    old = await _signed_in(bench, absolute_us=9 * MINUTE_US)
    await bench.store.revoke(revoked.ref, reason="logout")
    bench.advance(10 * MINUTE_US)
    cases = (
        (revoked, "logout"),
        (idle, "idle_timeout"),
        (old, "absolute_timeout"),
        (bench.new_session(), "unknown"),
    )
    for session, reason in cases:
        new = bench.new_family(session)
        agree(expect(Gone, await bench.store.create_family(new)).reason, reason, "reason")
        hold(not _works(await _present(bench, Held(new.ref, 1, new.digest))), f"a token of no family ({reason})")


async def check_one_family_too_many_drops_the_oldest(bench: Bench) -> None:
    """The oldest by creation goes, however recently it was used; families elsewhere take no place."""
    session, other = await _signed_in(bench), await _signed_in(bench)
    elsewhere = [await _begin(bench, owner) for owner in (other, None)]
    held = [await _begin(bench, session) for _ in range(MAX_FAMILIES)]
    held[0] = await _rotated(bench, held[0])
    newest = await _begin(bench, session)
    expect(FamilyUnknown, await _present(bench, held[0], grace_us=0))
    for each in (*held[1:], newest, *elsewhere):
        expect(FamilyRotated, await _present(bench, each, grace_us=0))


async def check_one_family_too_many_drops_those_that_are_over_first(bench: Bench) -> None:
    """A live family, the oldest of all, outlives those that are lapsed or ended."""
    session = await _signed_in(bench, idle_us=DAY_US)
    oldest = await _begin(bench, session)
    spent = await _begin(bench, session, client=CLIENT)
    after = await _rotated(bench, await _rotated(bench, spent))
    lapsed = [await _begin(bench, session, idle_us=10 * MINUTE_US) for _ in range(2)]
    lapsed += [await _begin(bench, session, absolute_us=10 * MINUTE_US) for _ in range(2)]
    fill = [await _begin(bench, session) for _ in range(MAX_FAMILIES - 6)]
    expect(FamilyReused, await _present(bench, spent))
    bench.advance(10 * MINUTE_US)
    fill += [await _begin(bench, session) for _ in range(5)]
    for held in (*lapsed, after):
        expect(FamilyUnknown, await _present(bench, held))
    expect(FamilyKept, await _present(bench, oldest, grace_us=DAY_US))
    fill.append(await _begin(bench, session))
    expect(FamilyUnknown, await _present(bench, oldest))
    for held in fill:
        expect(FamilyRotated, await _present(bench, held))


async def check_families_begun_at_once_keep_the_limit(bench: Bench) -> None:
    """However many begin simultaneously, so many are left as a session may have, and all of them work."""
    session = await _signed_in(bench)
    families = [bench.new_family(session) for _ in range(MAX_FAMILIES + 20)]
    answers = await bench.gather([partial(bench.either(n).create_family, new) for n, new in enumerate(families)])
    for each in answers:
        expect(FamilyCreated, each)
    left = [await _present(bench, Held(new.ref, 1, new.digest), grace_us=HOUR_US) for new in families]
    agree(sum(isinstance(each, FamilyKept) for each in left), MAX_FAMILIES, "families that are left")
    agree(sum(isinstance(each, FamilyUnknown) for each in left), 20, "families that were dropped")


# -- the rows of the table -----------------------------------------------------------------------------------------


async def check_a_rotation_makes_the_successor_current(bench: Bench) -> None:
    """Only generation, digest and time of rotation change; the session comes along untouched."""
    session = await _signed_in(bench, fields={"a": "1"})
    for owner in (session, None):
        held = await _begin(bench, owner)
        before = expect(FamilyKept, await _present(bench, held, grace_us=HOUR_US))
        bench.advance(GRACE_US)
        successor = bench.digest()
        answer = expect(FamilyRotated, await _present(bench, held, successor, grace_us=GRACE_US))
        wanted = replace(before.family, generation=2, digest=successor, rotated_us=answer.now_us)
        agree(answer.family, wanted, "the family after the rotation")
        agree(answer.session, None if owner is None else await _record(bench, session), "its session")
        kept = await _present(bench, held.next(successor), store=bench.other, grace_us=GRACE_US)
        agree(expect(FamilyKept, kept).family, wanted, "the family, read elsewhere")
    agree(expect(Live, await bench.load(session)).session.version, 1, "a refresh is no change of the record")


async def check_a_young_token_is_kept_to_the_microsecond(bench: Bench) -> None:
    """Six restored tabs bring the same current token: it stays the current one until it is as old as the grace."""
    for owner in (await _signed_in(bench), None):
        held = await _begin(bench, owner)
        for _ in range(2):
            first = await _present(bench, held, grace_us=GRACE_US)
            rotated_us = expect(FamilyKept, first).family.rotated_us
            successor = bench.digest()

            def kept(answer: RefreshOutcome) -> bool:
                hold(isinstance(answer, (FamilyKept, FamilyRotated)), f"kept or rotated, not {answer!r}")
                return isinstance(answer, FamilyKept)

            ask = partial(_present, bench, held, successor, grace_us=GRACE_US)
            await bench.across(rotated_us + GRACE_US, ask, before=kept)
            held = held.next(successor)


async def check_the_predecessor_is_forgiven_to_the_microsecond(bench: Bench) -> None:
    """Within the grace that consumed it, it is answered with the sealed successor; from then on it is reuse."""
    for client in ("", CLIENT):
        held = await _begin(bench, await _signed_in(bench), client=client)
        bench.advance(GRACE_US)
        successor = bench.digest()
        rotated = expect(FamilyRotated, await _present(bench, held, successor, grace_us=GRACE_US))

        def replayed(answer: RefreshOutcome, rotated: FamilyRotated = rotated, successor: str = successor) -> bool:
            if isinstance(answer, FamilyReplayed):
                agree(answer.family, rotated.family, "the family")
                agree(answer.sealed, _sealed(successor), "sealed successor, byte for byte")
                return True
            agree(expect(FamilyReused, answer).family.ref, rotated.family.ref, "the family that was ended")
            return False

        # What later calls say about the grace is not asked: the rotation that consumed the token fixed it.
        ask = partial(_present, bench, held, grace_us=HOUR_US)
        await bench.across(rotated.now_us + GRACE_US, ask, before=replayed)
        agree(expect(FamilyEnded, await _present(bench, held.next(successor))).reason, REASON_REUSED, "reason")


async def check_the_sealed_successor_goes_when_it_is_used(bench: Bench) -> None:
    """Once the successor was presented nobody needs its sealed copy: it is answered no more, and no error is made."""
    held = await _begin(bench, await _signed_in(bench))
    for turn in range(2):
        late, held = held, await _rotated(bench, held)
        for _ in range(2):
            hold(expect(FamilyReplayed, await _present(bench, late)).sealed is not None, "sealed until it is used")
        expect(FamilyKept, await _present(bench, held, store=bench.either(turn), grace_us=GRACE_US))
        for store in (bench.store, bench.other):
            agree(expect(FamilyReplayed, await _present(bench, late, store=store)).sealed, None, "sealed successor")


async def check_presentations_at_once_have_one_successor(bench: Bench) -> None:
    """Of fifty tabs with one token one rotates it; all others receive that one's successor, round after round."""
    for owner in (await _signed_in(bench), None):
        held = await _begin(bench, owner)
        for number in range(ROUNDS):
            bench.advance(GRACE_US)
            successors = [bench.digest() for _ in range(SIMULTANEOUS)]
            calls = [
                partial(_present, bench, held, successor, store=bench.either(n), grace_us=GRACE_US)
                for n, successor in enumerate(successors)
            ]
            answers = await bench.gather(calls)
            winners = [n for n, each in enumerate(answers) if isinstance(each, FamilyRotated)]
            agree(len(winners), 1, f"rotations in round {number}")
            winner = successors[winners[0]]
            agree(expect(FamilyRotated, answers[winners[0]]).family.digest, winner, "the winner's successor")
            for n, each in enumerate(answers):
                if n != winners[0]:
                    replayed = expect(FamilyReplayed, each)
                    agree(replayed.sealed, _sealed(winner), "sealed successor")
                    agree((replayed.family.generation, replayed.family.digest), (number + 2, winner), "the family")
            held = held.next(winner)
        expect(FamilyKept, await _present(bench, held, grace_us=GRACE_US))


async def check_a_refresh_repeated_is_the_same_refresh(bench: Bench) -> None:
    """A refresh whose answer was lost may be sent again, at once or later: it is no reuse and moves no deadline."""
    for grace_us in (GRACE_US, 0):
        held = await _begin(bench, await _signed_in(bench))
        bench.advance(GRACE_US)
        successor = bench.digest()
        calls = [partial(_present, bench, held, successor, store=bench.either(n), grace_us=grace_us) for n in range(20)]
        answers = [expect(FamilyRotated, each) for each in await bench.gather(calls)]
        first = answers[0].family
        for each in answers:
            agree(each.family, first, "the family in each answer")
        bench.advance(2 * GRACE_US)
        again = await _present(bench, held, successor, grace_us=grace_us)
        agree(expect(FamilyRotated, again).family, first, "the answer after the grace")
        expect(FamilyKept, await _present(bench, held.next(successor), grace_us=HOUR_US))
        expect(FamilyReused, await _present(bench, held, bench.digest(), grace_us=grace_us))


async def check_a_token_never_issued_ends_nothing(bench: Bench) -> None:
    """Every mixture of generations and digests that no token of the family has: unknown, and nothing changes."""
    session = await _signed_in(bench)
    for owner in (session, None):
        first = await _begin(bench, owner)
        hostile = [(0, ""), (0, first.digest), (0, bench.digest()), (2, first.digest), (1, ""), (1, bench.digest())]
        for generation, digest in hostile:
            answer = await _present(bench, replace(first, generation=generation, digest=digest))
            hold(isinstance(answer, FamilyUnknown), f"generation {generation} of 1 is unknown: {answer!r}")
        second = await _rotated(bench, first)
        third = await _rotated(bench, second)
        seen = expect(Live, await bench.load(session)).seen_us
        bench.advance(1000)
        hostile = [
            (3, second.digest),
            (3, first.digest),
            (3, ""),
            (2, third.digest),
            (2, first.digest),
            (2, ""),
            (2, bench.digest()),
            (4, third.digest),
            (4, second.digest),
            (4, bench.digest()),
            (2**24 - 1, third.digest),
        ]
        for age in ("within the grace", "after the grace"):
            for generation, digest in hostile:
                answer = await _present(bench, replace(first, generation=generation, digest=digest))
                hold(isinstance(answer, FamilyUnknown), f"generation {generation} of 3, {age}: {answer!r}")
            agree(expect(Live, await bench.load(session)).seen_us, seen, "the session's last activity")
            bench.advance(GRACE_US)
        expect(FamilyRotated, await _present(bench, third, grace_us=GRACE_US))


async def check_a_family_that_is_not_there_is_unknown(bench: Bench) -> None:
    """No session, no family, and a family of one kind asked for as the other: all unknown."""
    session, twin = await _signed_in(bench), await _signed_in(bench)
    held, alone = await _begin(bench, session), await _begin(bench, None)
    refs = (
        replace(held.ref, root=bench.handle()),
        replace(held.ref, root=twin.ref.handle),
        replace(held.ref, tag=held.ref.tag ^ 1),
        replace(held.ref, name="AAAAAAAA"),
        replace(held.ref, of_session=False),
        replace(alone.ref, of_session=True),
        replace(alone.ref, name="AAAAAAAA"),
        replace(alone.ref, tag=alone.ref.tag ^ 1),
    )
    for ref in refs:
        for each in (held, alone):
            answer = await _present(bench, replace(each, ref=ref))
            hold(isinstance(answer, FamilyUnknown), f"{ref} is unknown: {answer!r}")
    for each in (held, alone):
        expect(FamilyKept, await _present(bench, each, grace_us=HOUR_US))


async def check_reuse_ends_family_and_session_of_the_first_party(bench: Bench) -> None:
    """A stolen token that was spent ends what it descends from and nothing else; the session is on the denylist."""
    for generations in (1, 2, 3):
        subject = f"ann-{generations}"
        session, bystander = await _signed_in(bench, subject), await _signed_in(bench, subject)
        stolen = await _begin(bench, session, subject=subject)
        sister = await _begin(bench, session, subject=subject, client=CLIENT)
        others = [await _begin(bench, each, subject=subject) for each in (bystander, None)]
        held = stolen
        for _ in range(generations):
            held = await _rotated(bench, held)
        bench.advance(GRACE_US)
        position = (await _followed(bench, None))[1]
        reused = expect(FamilyReused, await _present(bench, stolen, grace_us=GRACE_US, deny_us=HOUR_US))
        agree((reused.family.ref, reused.session), (stolen.ref, session.ref), "what was ended")
        ended = expect(Ended, await bench.load(session))
        agree((ended.reason, ended.at_us), (REASON_REUSED, reused.now_us), "the session's end")
        for each in (stolen, held, sister):
            over = expect(FamilyEnded, await _present(bench, each, store=bench.other))
            agree((over.reason, over.at_us), (REASON_REUSED, reused.now_us), "the family's end")
        agree((await _followed(bench, position))[0], [_denied(session.ref, reused.now_us + HOUR_US)], "denylist")
        expect(Live, await bench.load(bystander))
        for each in others:
            expect(FamilyRotated, await _present(bench, each, grace_us=GRACE_US))


async def check_reuse_by_a_third_party_ends_the_family_alone(bench: Bench) -> None:
    """Another client's leak signs nobody out: session and sister families go on, and nobody is denied."""
    session = await _signed_in(bench)
    sister = await _begin(bench, session)
    for owner in (session, None):
        stolen = await _begin(bench, owner, client=CLIENT, idle_us=HOUR_US)
        held = await _rotated(bench, await _rotated(bench, stolen))
        reused = expect(FamilyReused, await _present(bench, stolen, deny_us=HOUR_US))
        agree((reused.family.ref, reused.session), (stolen.ref, None), "what was ended")
        bench.advance(MINUTE_US)
        await _sweep_all(bench)
        for each in (stolen, held):
            over = expect(FamilyEnded, await _present(bench, each, store=bench.other))
            agree((over.reason, over.at_us), (REASON_REUSED, reused.now_us), "the family's end")
        expect(Live, await bench.load(session))
        agree((await _followed(bench, None))[0], [], "denylist")
    expect(FamilyRotated, await _present(bench, sister))


async def check_reuse_of_a_family_that_stands_alone(bench: Bench) -> None:
    """Without a session there is none to end, for the first party either."""
    session = await _signed_in(bench)
    stolen = await _begin(bench, None)
    held = await _rotated(bench, await _rotated(bench, stolen))
    agree(expect(FamilyReused, await _present(bench, stolen, deny_us=HOUR_US)).session, None, "session")
    agree(expect(FamilyEnded, await _present(bench, held)).reason, REASON_REUSED, "reason")
    expect(Live, await bench.load(session))
    agree((await _followed(bench, None))[0], [], "denylist")


async def check_a_spent_grace_is_not_forgiven(bench: Bench) -> None:
    """The grace is for the immediate predecessor: one generation older is reuse, however young."""
    held = await _begin(bench, await _signed_in(bench))
    second = await _rotated(bench, held)
    expect(FamilyReplayed, await _present(bench, held))
    expect(FamilyRotated, await _present(bench, second, grace_us=0))
    expect(FamilyReused, await _present(bench, held))


async def check_reuse_found_at_once_is_found_by_one(bench: Bench) -> None:
    """Of twenty thieves one ends the family, and the holder who rotates meanwhile keeps nothing."""
    for client in ("", CLIENT):
        stolen = await _begin(bench, await _signed_in(bench), client=client)
        held = await _rotated(bench, await _rotated(bench, stolen))
        calls = [partial(_present, bench, stolen, bench.digest(), store=bench.either(n)) for n in range(20)]
        calls.insert(bench.below(20), partial(_present, bench, held, successor := bench.digest(), grace_us=0))
        answers = await bench.gather(calls)
        agree(sum(isinstance(each, FamilyReused) for each in answers), 1, "calls that ended the family")
        for each in answers:
            if not isinstance(each, (FamilyReused, FamilyRotated)):
                agree(expect(FamilyEnded, each).reason, REASON_REUSED, "reason")
        for token in (held, held.next(successor)):
            agree(expect(FamilyEnded, await _present(bench, token)).reason, REASON_REUSED, "reason")


async def check_a_wrong_holder_writes_nothing(bench: Bench) -> None:
    """A thief without the key, or another client, learns nothing and ends nothing, not even by reuse."""
    session = await _signed_in(bench)
    for client in ("", CLIENT):
        first = await _begin(bench, session, client=client, key="the key")
        second = await _rotated(bench, first)
        third = await _rotated(bench, second)
        seen = expect(Live, await bench.load(session)).seen_us
        bench.advance(1000)
        for token in (first, second, third, replace(third, digest=bench.digest())):
            for thief in (
                replace(token, client="another"),
                replace(token, client="" if client else "*"),
                replace(token, key="another"),
                replace(token, key=""),
            ):
                for grace_us in (0, HOUR_US):
                    expect(WrongHolder, await _present(bench, thief, grace_us=grace_us, deny_us=HOUR_US))
        agree(expect(Live, await bench.load(session)).seen_us, seen, "the session's last activity")
        replayed = expect(FamilyReplayed, await _present(bench, second))
        agree(replayed.sealed, _sealed(third.digest), "sealed successor")
        expect(FamilyKept, await _present(bench, third, grace_us=GRACE_US))
    agree((await _followed(bench, None))[0], [], "denylist")


async def check_a_family_ends_at_the_microsecond(bench: Bench) -> None:
    """Its idle time counts from its last rotation, its absolute deadline from its creation."""
    session = await _signed_in(bench, idle_us=DAY_US)
    for owner in (session, None):
        idle = await _begin(bench, owner, idle_us=10 * MINUTE_US)
        bench.advance(8 * MINUTE_US)
        idle = await _rotated(bench, idle)
        rotated_us = expect(FamilyKept, await _present(bench, idle, grace_us=HOUR_US)).family.rotated_us
        await _ends_across(bench, idle, rotated_us + 10 * MINUTE_US, "idle_timeout")
        old = await _begin(bench, owner, idle_us=HOUR_US, absolute_us=HOUR_US)
        absolute_us = expect(FamilyKept, await _present(bench, old, grace_us=HOUR_US)).family.absolute_us
        bench.advance(50 * MINUTE_US)
        old = await _rotated(bench, old)
        await _ends_across(bench, old, absolute_us, "absolute_timeout")
    expect(Live, await bench.load(session))


async def check_a_family_ends_with_its_sessions_deadline(bench: Bench) -> None:
    """From the microsecond of the session's deadline nothing of it rotates, whatever the family's own times are."""
    idle = await _signed_in(bench, idle_us=10 * MINUTE_US)
    held = await _begin(bench, idle)
    seen = expect(Live, await bench.load(idle)).seen_us
    await _ends_across(bench, held, seen + 10 * MINUTE_US, "idle_timeout")
    old = await _signed_in(bench, absolute_us=10 * MINUTE_US)
    held = await _begin(bench, old)
    await _ends_across(bench, held, (await _record(bench, old)).absolute_us, "absolute_timeout")


async def check_a_refresh_is_activity_of_its_session(bench: Bench) -> None:
    """Rotated, kept and replayed move the last activity to the call's time; the answer tells the one before."""
    session = await _signed_in(bench, idle_us=10 * MINUTE_US)
    first = await _begin(bench, session)
    before = expect(Live, await bench.load(session)).seen_us
    bench.advance(8 * MINUTE_US)
    second = bench.digest()
    presentations: tuple[tuple[type[FamilyRotated | FamilyKept | FamilyReplayed], Held], ...] = (
        (FamilyRotated, first),
        (FamilyReplayed, first),
        (FamilyKept, first.next(second)),
        (FamilyReplayed, first),
    )
    for kind, token in presentations:
        successor = second if kind is FamilyRotated else bench.digest()
        answer = expect(kind, await _present(bench, token, successor, grace_us=8 * MINUTE_US - 1))
        agree(answer.seen_us, before, f"the activity before, in {kind.__name__}")
        before = answer.now_us
        agree(expect(Live, await bench.other.load(session.ref, session.digest)).seen_us, before, "the last activity")
        bench.advance(MINUTE_US)
    bench.advance(8 * MINUTE_US)
    expect(FamilyRotated, await _present(bench, first.next(second)))
    alone = await _present(bench, await _begin(bench, None), grace_us=0)
    agree(expect(FamilyRotated, alone).seen_us, 0, "activity without a session")


# -- how families end with others ----------------------------------------------------------------------------------


async def check_a_family_dies_with_its_session(bench: Bench) -> None:
    """Logout, eviction, replacement, a cut, the idle timeout: no token of the session works, and the reason is told."""
    tag, owner = tag_of("ann"), bench.new_session().owner

    async def evict(session: NewSession) -> None:
        expect(Admitted, await bench.store.admit(bench.new_session(), maximum=1, on_limit="evict_oldest"))

    async def supersede(session: NewSession) -> None:
        new = bench.new_session()
        expect(Admitted, await bench.store.admit(new, maximum=9, on_limit="refuse", supersedes=session.ref))

    async def idle(session: NewSession) -> None:
        bench.advance(HOUR_US)
        expect(Gone, await bench.store.expire_idle(session.ref))

    async def late_logout(session: NewSession) -> None:
        bench.advance(HOUR_US)
        await bench.store.revoke(session.ref, reason="logout")

    ways: tuple[tuple[str, Callable[[NewSession], Coroutine[Any, Any, object]]], ...] = (
        ("logout", lambda session: bench.store.revoke(session.ref, reason="logout")),
        (REASON_EVICTED, evict),
        (REASON_SUPERSEDED, supersede),
        ("password changed", lambda session: bench.store.revoke_owner(tag, owner, reason="password changed")),
        ("idle_timeout", idle),
        ("idle_timeout", late_logout),
    )
    tokens: list[Held] = []
    for reason, end in ways:
        session = await _signed_in(bench)
        held = [await _begin(bench, session, client=client) for client in ("", CLIENT)]
        tokens = [*held, *[await _rotated(bench, each) for each in held]]
        await end(session)
        for store in (bench.store, bench.other):
            for each in tokens:
                over = expect(FamilyEnded, await _present(bench, each, store=store, deny_us=HOUR_US))
                agree(over.reason, reason, "reason")
                hold(over.at_us <= over.now_us, "an end lies in the past")
        await bench.store.revoke_owner(tag, owner, reason="end of the round")
    agree((await _followed(bench, None))[0], [], "denylist")
    bench.advance(40 * DAY_US)
    await _sweep_all(bench)
    for each in tokens:
        hold(not _works(await _present(bench, each)), "nothing works when the tombstone is gone")


async def check_a_rotated_session_keeps_its_families(bench: Bench) -> None:
    """A new id, with new privileges even, is the same session: its families go on and show the record as it is now."""
    session = await _signed_in(bench)
    held = await _begin(bench, session)
    for authority in (None, '{"acr":"gold"}'):
        successor = bench.digest()
        answer = await bench.store.rotate_id(
            session.ref,
            old_digest=session.digest,
            new_digest=successor,
            sealed=b"s",
            alias_us=0,
            authority=authority,
        )
        expect(Rotated, answer)
        session = replace(session, digest=successor)
        held = await _rotated(bench, held)
        kept = expect(FamilyKept, await _present(bench, held, grace_us=HOUR_US))
        agree(kept.session, await _record(bench, session), "the session")


async def check_refresh_against_logout_at_once(bench: Bench) -> None:
    """Rotations, replays and new families run while the session is ended: afterwards nothing of it works."""
    for _ in range(ROUNDS):
        session = await _signed_in(bench)
        first = await _begin(bench, session)
        second = await _rotated(bench, first)
        bench.advance(GRACE_US // 2)
        successors = [bench.digest() for _ in range(12)]
        begun = [bench.new_family(session) for _ in range(4)]
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
            partial(_present, bench, second, successor, store=bench.either(n), grace_us=GRACE_US // 2)
            for n, successor in enumerate(successors)
        ]
        calls.extend(partial(bench.either(n).create_family, new) for n, new in enumerate(begun))
        calls.insert(bench.below(16), partial(bench.other.revoke, session.ref, reason="logout"))
        for answer in await bench.gather(calls):
            if isinstance(answer, (FamilyEnded, Gone)):
                agree(answer.reason, "logout", "reason")
        tokens = [first, second, *(second.next(each) for each in successors)]
        tokens.extend(Held(new.ref, 1, new.digest) for new in begun)
        for number, token in enumerate(tokens):
            answer = await _present(bench, token, store=bench.either(number), grace_us=HOUR_US)
            agree(expect(FamilyEnded, answer).reason, "logout", "reason")
        agree(expect(Ended, await bench.load(session)).reason, "logout", "reason")


async def check_refresh_and_commits_at_once_lose_nothing(bench: Bench) -> None:
    """Refreshing and writing fields of one session meet without loss on either side."""
    session = await _signed_in(bench)
    held = await _begin(bench, session)
    successor = bench.digest()
    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
        partial(bench.put, session.ref, f"f{n}", str(n)) for n in range(10)
    ]
    calls.insert(5, partial(_present, bench, held, successor, grace_us=0))
    answers = await bench.gather(calls)
    agree(sum(isinstance(each, Committed) for each in answers), 10, "commits")
    agree(sum(isinstance(each, FamilyRotated) for each in answers), 1, "rotations")
    live = expect(Live, await bench.load(session)).session
    agree((live.version, dict(live.fields)), (11, {f"f{n}": str(n) for n in range(10)}), "the record")
    expect(FamilyKept, await _present(bench, held.next(successor), grace_us=HOUR_US))


async def check_a_cut_ends_families_that_stand_alone(bench: Bench) -> None:
    """Signing out everywhere reaches them, with the cut's reason and for good; those of others and later ones live."""
    kept = await _signed_in(bench)
    of_kept, of_other = await _begin(bench, kept), await _begin(bench, None, subject="bob")
    alone = [await _begin(bench, None, client=client) for client in ("", CLIENT)]
    later = [await _rotated(bench, each) for each in alone]
    cut = await bench.store.revoke_owner(
        kept.ref.tag, kept.owner, reason="password changed", keep=kept.ref, deny_us=HOUR_US
    )
    agree(cut.ended, (), "sessions that this call ended")
    begun = bench.new_family(None)
    created = expect(FamilyCreated, await bench.other.create_family(begun)).family
    hold(created.created_us > cut.now_us, "a family begun after the cut is dated after it")
    for each in (*alone, *later):
        over = expect(FamilyEnded, await _present(bench, each, store=bench.other))
        agree(over.reason, "password changed", "reason")
        hold(over.at_us <= over.now_us, "an end lies in the past")
    for each in (of_kept, of_other):
        expect(FamilyRotated, await _present(bench, each))
    bench.advance(2 * TOMBSTONE_US)
    await _sweep_all(bench)
    for each in (*alone, *later):
        hold(not _works(await _present(bench, each)), "a family that was cut off does not come back")
    expect(FamilyRotated, await _present(bench, Held(begun.ref, 1, begun.digest)))


async def check_a_later_cut_leaves_the_first_reason(bench: Bench) -> None:
    """Of a family that stands alone the first cut's reason and time stay; one begun since has the next one's."""
    owner = bench.new_family(None).owner
    held: list[Held] = []
    told: list[tuple[str, int]] = []
    for number in range(4):
        held.append(await _begin(bench, None))
        bench.advance(MINUTE_US)
        for reason in (f"cut {number}", f"cut {number} again"):
            await bench.either(number).revoke_owner(tag_of("ann"), owner, reason=reason)
            over = [expect(FamilyEnded, await _present(bench, each)) for each in held]
            agree([each.reason for each in over], [f"cut {turn}" for turn in range(number + 1)], "reasons")
            told += [(each.reason, each.at_us) for each in over[len(told) :]]
            agree([(each.reason, each.at_us) for each in over], told, "reasons and times")
            bench.advance(HOUR_US)


async def check_a_cut_against_new_families_at_once(bench: Bench) -> None:
    """No family slips through: what is not dated after the cut never works again."""
    families = [bench.new_family(None) for _ in range(40)]
    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
        partial(bench.either(n).create_family, new) for n, new in enumerate(families)
    ]
    cut_off = partial(bench.store.revoke_owner, tag_of("ann"), families[0].owner, reason="password changed")
    calls.insert(20, cut_off)
    answers = await bench.gather(calls)
    (cut,) = (each.now_us for each in answers if isinstance(each, RevokedMany))
    made = [each.family for each in answers if isinstance(each, FamilyCreated)]
    agree(len(made), len(families), "families that were begun")
    for family in made:
        answer = await _present(bench, Held(family.ref, 1, family.digest))
        if isinstance(answer, FamilyEnded):
            agree(answer.reason, "password changed", "reason")
        else:
            hold(_works(answer), f"a family works, or was cut off: {answer!r}")
            hold(family.created_us > cut, f"begun at {family.created_us}, working after the cut at {cut}")


async def check_a_clock_that_steps_back_lets_no_family_through(bench: Bench) -> None:
    """The store's clock is set back after a cut: what begins then lives, and the next cut ends it all the same."""
    owner = bench.new_family(None).owner
    await bench.store.revoke_owner(tag_of("ann"), owner, reason="first")
    bench.clock.offset_us -= MINUTE_US
    held = await _begin(bench, None)
    expect(FamilyKept, await _present(bench, held, grace_us=HOUR_US))
    await bench.store.revoke_owner(tag_of("ann"), owner, reason="second")
    hold(not _works(await _present(bench, held)), "a family that was cut off does not work")


async def check_nothing_brings_an_ended_family_back(bench: Bench) -> None:
    """Creating it again, rotating it again, sweeping: an ended family stays ended for its reason."""
    session = await _signed_in(bench)
    for owner in (session, None):
        new = bench.new_family(owner, client=CLIENT)
        expect(FamilyCreated, await bench.store.create_family(new))
        first = Held(new.ref, 1, new.digest, CLIENT)
        held = await _rotated(bench, await _rotated(bench, first))
        expect(FamilyReused, await _present(bench, first))
        for attempt in range(2):
            with suppress(StoreUnavailable):
                await bench.either(attempt).create_family(new)
            await _sweep_all(bench)
            for token in (first, held):
                agree(expect(FamilyEnded, await _present(bench, token)).reason, REASON_REUSED, "reason")


async def check_an_interrupted_refresh_loses_no_token(bench: Bench) -> None:
    """A caller that goes away mid-call: the old token works, or its successor does; never neither, never reuse."""
    for owned in (True, False):
        for turns in range(12):
            # A family a turn, and a session of its own: a call that was abandoned may still arrive, and one that
            # comes a grace and two rotations late is rightly taken for reuse, which ends all that the session has.
            held = await _begin(bench, await _signed_in(bench) if owned else None)
            bench.advance(GRACE_US)
            lost, retried = bench.digest(), bench.digest()
            call = partial(_present, bench, held, lost, store=bench.either(turns), grace_us=GRACE_US)
            await bench.interrupted(call, turns=turns)
            answer = await _present(bench, held, retried, grace_us=GRACE_US)
            if isinstance(answer, FamilyReplayed):
                agree(answer.sealed, _sealed(lost), "sealed successor of the call that was lost")
                held = held.next(lost)
            else:
                expect(FamilyRotated, answer)
                held = held.next(retried)
            expect(FamilyKept, await _present(bench, held, grace_us=GRACE_US))


async def check_sweeping_takes_only_families_that_are_over(bench: Bench) -> None:
    """What is over goes in bounded steps; what still decides something stays, grace and all."""
    session = await _signed_in(bench, idle_us=DAY_US)
    owners = (session, None)
    over = [await _begin(bench, owner, idle_us=10 * MINUTE_US) for owner in owners for _ in range(3)]
    over += [await _begin(bench, owner, absolute_us=10 * MINUTE_US) for owner in owners for _ in range(3)]
    bench.advance(10 * MINUTE_US)
    first = [await _begin(bench, owner) for owner in owners]
    bench.advance(GRACE_US)
    second = [each.next(bench.digest()) for each in first]
    for old, new in zip(first, second, strict=True):
        expect(FamilyRotated, await _present(bench, old, new.digest, grace_us=GRACE_US))
    await _sweep_all(bench, limit=2)
    for held in over:
        answer = await _present(bench, held)
        hold(isinstance(answer, (FamilyUnknown, FamilyEnded)), f"a family that is over: {answer!r}")
    for old, new in zip(first, second, strict=True):
        agree(expect(FamilyReplayed, await _present(bench, old)).sealed, _sealed(new.digest), "sealed successor")
    bench.advance(GRACE_US)
    await _sweep_all(bench)
    for old, new in zip(first, second, strict=True):
        expect(FamilyKept, await _present(bench, new, grace_us=HOUR_US))
        expect(FamilyReused, await _present(bench, old))
        agree(expect(FamilyEnded, await _present(bench, new)).reason, REASON_REUSED, "reason")


# -- standing ------------------------------------------------------------------------------------------------------


async def check_standing_follows_the_session(bench: Bench) -> None:
    """An access token stands while its session is alive; then the reason is told, by whatever id it began."""
    session, other = await _signed_in(bench), await _signed_in(bench, idle_us=10 * MINUTE_US)
    for each in (session, other):
        agree((await bench.other.standing(each.ref, "jti")).why, None, "why it must not be accepted")
    successor = bench.digest()
    rotate = partial(bench.store.rotate_id, session.ref, old_digest=session.digest, new_digest=successor)
    expect(Rotated, await rotate(sealed=b"", alias_us=0, authority="{}"))
    agree((await bench.store.standing(session.ref, "jti")).why, None, "why, after a rotation of the id")
    ended = await bench.store.revoke(session.ref, reason="ünusual ☃ activity", deny_us=HOUR_US)
    for store in (bench.store, bench.other):
        standing = await store.standing(session.ref, "jti")
        agree((standing.why, standing.at_us), ("ünusual ☃ activity", ended.now_us), "why and since when")
    agree((await bench.store.standing(bench.new_session().ref, "jti")).why, "unknown", "why, of no session")
    seen = expect(Live, await bench.load(other)).seen_us

    def stands(answer: object) -> bool:
        why = getattr(answer, "why", "")
        hold(why in (None, "idle_timeout"), f"why: {why!r}")
        return why is None

    await bench.across(seen + 10 * MINUTE_US, lambda: bench.store.standing(other.ref, "jti"), before=stands)
    agree(expect(Live, await bench.load(other)).seen_us, seen, "asking is no activity")


async def check_standing_ends_with_the_absolute_deadline(bench: Bench) -> None:
    """At the microsecond of the absolute deadline no token of the session stands."""
    session = await _signed_in(bench, absolute_us=10 * MINUTE_US)
    deadline = (await _record(bench, session)).absolute_us

    def stands(answer: object) -> bool:
        why = getattr(answer, "why", "")
        hold(why in (None, "absolute_timeout"), f"why: {why!r}")
        return why is None

    await bench.across(deadline, lambda: bench.store.standing(session.ref, "jti"), before=stands)


async def check_the_end_of_an_absolute_deadline_is_that_deadline(bench: Bench) -> None:
    """Past the absolute deadline it is told as the reason and as the time, for a session and for a family alone."""
    session = await _signed_in(bench, idle_us=5 * MINUTE_US, absolute_us=10 * MINUTE_US)
    held = await _begin(bench, session)
    alone = await _begin(bench, None, idle_us=5 * MINUTE_US, absolute_us=10 * MINUTE_US)
    deadline = (await _record(bench, session)).absolute_us
    of_alone = expect(FamilyKept, await _present(bench, alone, grace_us=HOUR_US)).family.absolute_us
    bench.advance(20 * MINUTE_US)
    ended, over = await _present(bench, held), await _present(bench, alone)
    standing = await bench.store.standing(session.ref, "jti")
    # A store may have forgotten it by now, but must not tell another end.
    for answer, moment in ((ended, deadline), (over, of_alone)):
        if isinstance(answer, FamilyEnded):
            agree((answer.reason, answer.at_us), ("absolute_timeout", moment), "reason and time")
        else:
            expect(FamilyUnknown, answer)
    if standing.why != "unknown":
        agree((standing.why, standing.at_us), ("absolute_timeout", deadline), "why and since when")


async def check_a_denied_token_does_not_stand(bench: Bench) -> None:
    """A denied `jti` is denied to the microsecond of `until_us`, before and after its session's end; no other is."""
    session = await _signed_in(bench)
    until = await bench.store.ping() + 10 * MINUTE_US
    await bench.store.deny(session.ref.tag, Denial(kind="jti", id="a", until_us=until))
    await bench.store.deny(session.ref.tag, Denial(kind="jti", id="b", until_us=until + HOUR_US))
    await bench.store.deny(0, Denial(kind="kid", id="c", until_us=until))
    agree((await bench.other.standing(session.ref, "b")).why, "denied", "why, of another denied one")
    for jti in ("c", "A", "", session_denial_id(session.ref)):
        agree((await bench.other.standing(session.ref, jti)).why, None, f"why, of {jti!r}")
    # The other kinds are placed at tag 0, where sessions live too.
    neighbour = replace(bench.new_session(), ref=SessionRef(0, bench.handle()))
    await bench.created(neighbour)
    agree((await bench.other.standing(neighbour.ref, "c")).why, None, "why, of a token named like a denied key")

    def stands_not(answer: object) -> bool:
        why = getattr(answer, "why", "")
        hold(why in (None, "denied"), f"why: {why!r}")
        return why is not None

    await _sweep_all(bench)
    await bench.across(until, lambda: bench.store.standing(session.ref, "a"), before=stands_not)
    await _sweep_all(bench)
    await bench.store.revoke(session.ref, reason="logout")
    agree((await bench.store.standing(session.ref, "b")).why, "denied", "why, when its session has ended too")
    agree((await bench.store.standing(session.ref, "a")).why, "logout", "why, after the denial's time")
    gone = SessionRef(session.ref.tag, bench.handle())
    agree((await bench.store.standing(gone, "b")).why, "denied", "why, when there is no session")


async def check_hostile_bytes_have_no_standing(bench: Bench) -> None:
    """A session that cannot be read carries no token and no family, and it can still be denied."""
    corrupt = bench.corrupt
    if corrupt is None:
        raise NotImplementedError("this store keeps no bytes: leave NEEDS_BYTES out")
    for number, raw in enumerate((b"", b"\xff\xfe\x80", b"{}", b"[" * 10_000)):
        session = await _signed_in(bench)
        held = await _begin(bench, session)
        await corrupt(session.ref, raw)
        what, jti = f"beside bytes {raw[:20]!r}", f"jti {number}"
        agree((await bench.store.standing(session.ref, jti)).why, "unreadable", f"why, {what}")
        expect(Gone, await bench.store.create_family(bench.new_family(session)))
        answer = await _present(bench, held)
        hold(isinstance(answer, (FamilyEnded, FamilyUnknown)), f"a refresh {what}: {answer!r}")
        position = (await _followed(bench, None))[1]
        revoked = await bench.store.revoke(session.ref, reason="logout", deny_us=HOUR_US)
        agree((await _followed(bench, position))[0], [_denied(session.ref, revoked.now_us + HOUR_US)], "denylist")
        await bench.store.deny(session.ref.tag, Denial(kind="jti", id=jti, until_us=revoked.now_us + HOUR_US))
        agree((await bench.store.standing(session.ref, jti)).why, "denied", f"why, {what}")


# -- the denylist --------------------------------------------------------------------------------------------------


async def check_the_denylist_keeps_every_kind_in_order(bench: Bench) -> None:
    """What was denied in one place comes back as it went in, in that order; a repeat harms nobody."""
    now = await bench.store.ping()
    denials = [
        Denial(kind="kid", id="2026-01/é☃", until_us=now + HOUR_US),
        Denial(kind="sub", id="Zoë 🦉:{a}*'\"\\", until_us=now + HOUR_US, not_before_us=now - 7),
        Denial(kind="client_sub", id="https://client.example\nann", until_us=now + HOUR_US, not_before_us=now),
        Denial(kind="all", id="", until_us=now + 2 * HOUR_US, not_before_us=now + 1),
        Denial(kind="sid", id=session_denial_id(bench.new_session().ref), until_us=now + HOUR_US),
    ]
    for number, each in enumerate(denials):
        await bench.either(number).deny(0, each)
    for store in (bench.store, bench.other):
        page = expect(DenialPage, await store.denials(after=None, limit=100))
        agree((list(page.entries), page.more), (denials, False), "denylist")
        hold(page.now_us >= now, "a page carries the store's clock")
    session = bench.new_session()
    placed = Denial(kind="jti", id="a jti", until_us=now + HOUR_US)
    await bench.store.deny(session.ref.tag, placed)
    entries, position = await _followed(bench, None)
    agree(sorted(map(repr, entries)), sorted(map(repr, [*denials, placed])), "denylist")
    agree([each for each in entries if each.kind != "jti"], denials, "order within one place")
    await bench.store.deny(session.ref.tag, placed)
    agree(set((await _followed(bench, position))[0]) <= {placed}, True, "a repeat adds nothing new")
    agree((await bench.store.standing(session.ref, "a jti")).why, "denied", "why, after the repeat")


async def check_the_denylist_is_read_in_pages(bench: Bench) -> None:
    """However small the pages: all entries, each once, in order; then nothing until something is denied."""
    start = expect(DenialPage, await bench.store.denials(after=None, limit=5))
    agree((start.entries, start.more), ((), False), "an empty denylist")
    until = await bench.store.ping() + HOUR_US
    denials = [Denial(kind="kid", id=f"key {n}", until_us=until) for n in range(7)]
    for each in denials:
        await bench.store.deny(0, each)
    for limit in (1, 2, 6, 7, 8):
        for after in (None, start.position):
            entries, end = await _followed(bench, after, limit=limit)
            agree(entries, denials, f"entries in pages of {limit}")
            for store in (bench.store, bench.other):
                page = expect(DenialPage, await store.denials(after=end, limit=limit))
                agree((page.entries, page.more), ((), False), "after the end")
                agree((await _followed(bench, page.position))[0], [], "after a page without entries")
    middle = expect(DenialPage, await bench.store.denials(after=None, limit=3))
    agree(list(middle.entries) + (await _followed(bench, middle.position))[0], denials, "both sides of a position")
    another = Denial(kind="kid", id="another", until_us=until)
    position = (await _followed(bench, None))[1]
    await bench.other.deny(0, another)
    agree((await _followed(bench, position))[0], [another], "what came later")


async def check_followers_of_the_denylist_miss_nothing(bench: Bench) -> None:
    """Readers follow while others deny and revoke at once: no entry appears behind a position that was given out."""
    for _ in range(3):
        until = await bench.store.ping() + DAY_US
        sessions = [await _signed_in(bench, f"user-{n}") for n in range(12)]
        denials = [Denial(kind="kid", id=bench.handle(), until_us=until) for _ in range(24)]
        position = (await _followed(bench, None))[1]

        async def follow(store: Store, after: str = position) -> tuple[list[Denial], str]:
            found: list[Denial] = []
            for _ in range(20):
                page = expect(DenialPage, await store.denials(after=after, limit=3))
                found.extend(page.entries)
                after = page.position
            return found, after

        calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
            partial(bench.either(n).deny, 0, each) for n, each in enumerate(denials)
        ]
        for number, session in enumerate(sessions):
            end = partial(bench.either(number).revoke, session.ref, reason="logout", deny_us=DAY_US)
            calls.insert(3 * number, end)
        for number in range(4):
            calls.insert(bench.below(len(calls)), partial(follow, bench.either(number)))
        wanted = {each.id for each in denials} | {session_denial_id(each.ref) for each in sessions}
        followers = [each for each in await bench.gather(calls) if isinstance(each, tuple)]
        agree(len(followers), 4, "followers")
        for found, after in followers:
            rest = (await _followed(bench, after))[0]
            missed = wanted - {each.id for each in (*found, *rest)}
            agree(missed, set[str](), "entries that a follower never saw")


async def check_an_entry_is_told_until_its_time_exactly(bench: Bench) -> None:
    """Sweeping never takes an entry that still decides; from `until_us` it is left out, and positions stay good."""
    now = await bench.store.ping()
    empty = expect(DenialPage, await bench.store.denials(after=None, limit=5)).position
    long = Denial(kind="sub", id="ann", until_us=now + DAY_US, not_before_us=now)
    short = [Denial(kind="kid", id=f"key {n}", until_us=now + 10 * MINUTE_US) for n in range(3)]
    for each in (short[0], long, *short[1:]):
        await bench.store.deny(0, each)
    position = (await _followed(bench, None))[1]

    def told(page: DenialPage | PositionLost) -> bool:
        entries = list(expect(DenialPage, page).entries)
        hold(entries in ([short[0], long, *short[1:]], [long]), f"all together or none: {entries!r}")
        return len(entries) == 4

    await _sweep_all(bench)
    await bench.across(now + 10 * MINUTE_US, lambda: bench.store.denials(after=empty, limit=9), before=told)
    await _sweep_all(bench)
    for after in (None, empty):
        for limit in (1, 9):
            agree((await _followed(bench, after, limit=limit))[0], [long], "what still decides")
    bench.advance(DAY_US)
    await _sweep_all(bench)
    for after in (None, empty, position):
        agree((await _followed(bench, after))[0], [], "when everything is over")
    another = replace(long, until_us=long.until_us + DAY_US)
    await bench.store.deny(0, another)
    for after in (None, empty, position):
        agree((await _followed(bench, after))[0], [another], "after a position whose entries are all over")


async def check_a_position_of_another_log_is_lost(bench: Bench) -> None:
    """Texts that are no position, and one that lies ahead of the log: begin again, never silence."""
    until = await bench.store.ping() + HOUR_US
    for number in range(3):
        await bench.store.deny(0, Denial(kind="kid", id=f"key {number}", until_us=until))
    position = (await _followed(bench, None))[1]
    hostile = [
        "",
        "x",
        "-1",
        "0x10",
        " ",
        "1e5",
        "é☃",
        "a\x00b",
        "9" * 19,
        "9" * 400,
        "*",
        "$",
        "+",
        "{}",
        position + "x",
    ]
    hostile.append("x" + position)
    numbers = list(re.finditer("[0-9]+", position))
    if numbers:
        last = numbers[-1]
        hostile.append(position[: last.start()] + str(int(last[0]) + 1_000_000) + position[last.end() :])
    for after in hostile:
        answer = await bench.store.denials(after=after, limit=10)
        hold(isinstance(answer, PositionLost), f"{after[:40]!r} is no position: {answer!r}")


async def check_the_longer_denial_decides(bench: Bench) -> None:
    """Denied twice, a token is denied until the later time, in whichever order; followers are told of it."""
    session = await _signed_in(bench)
    now = await bench.store.ping()
    short = Denial(kind="jti", id="a", until_us=now + 10 * MINUTE_US)
    for number, order in enumerate(((0, HOUR_US), (HOUR_US, 0))):
        jti = f"jti {number}"
        position = (await _followed(bench, None))[1]
        for more_us in order:
            await bench.store.deny(session.ref.tag, replace(short, id=jti, until_us=short.until_us + more_us))
        told = (await _followed(bench, position))[0]
        agree(max(each.until_us for each in told), short.until_us + HOUR_US, "the latest time told")
        agree({each.id for each in told}, {jti}, "what was told")
    extended = (await _followed(bench, None))[1]
    await bench.store.deny(session.ref.tag, replace(short, id="jti 0", until_us=short.until_us + 2 * HOUR_US))
    (told_again,) = (await _followed(bench, extended))[0]
    agree(told_again.until_us, short.until_us + 2 * HOUR_US, "an extension is told to those who had read before")
    bench.advance(20 * MINUTE_US)
    await _sweep_all(bench)
    for jti in ("jti 0", "jti 1"):
        agree((await bench.store.standing(session.ref, jti)).why, "denied", f"why, of {jti}, after the shorter time")


# -- what the session verbs deny -----------------------------------------------------------------------------------


async def check_revoke_denies_whether_or_not_it_ended(bench: Bench) -> None:
    """Alive, idle, ended before or never there: with `deny_us` the session is on the denylist from the call's time."""
    alive, idle, over = await _signed_in(bench), await _signed_in(bench, idle_us=MINUTE_US), await _signed_in(bench)
    await bench.store.revoke(over.ref, reason="logout")
    bench.advance(MINUTE_US)
    agree((await _followed(bench, None))[0], [], "denylist without deny_us")
    position: str | None = None
    for session, ended in ((alive, True), (alive, False), (idle, False), (over, False), (bench.new_session(), False)):
        revoked = await bench.store.revoke(session.ref, reason="late", deny_us=HOUR_US)
        agree(revoked.ended, ended, "revoke ended it")
        entries, position = await _followed(bench, position)
        agree(entries, [_denied(session.ref, revoked.now_us + HOUR_US)], "denylist")
        bench.advance(1000)
    agree(expect(Ended, await bench.load(over)).reason, "logout", "reason")


async def check_admit_denies_whom_it_ends(bench: Bench) -> None:
    """Evicted and superseded sessions are on the denylist; a refused sign-in and the survivors put nobody there."""
    first, second, third = [await _signed_in(bench) for _ in range(3)]
    refused = await bench.store.admit(bench.new_session(), maximum=1, on_limit="refuse", deny_us=HOUR_US)
    expect(LimitReached, refused)
    expect(Admitted, await bench.store.admit(bench.new_session(), maximum=9, on_limit="refuse", deny_us=HOUR_US))
    agree((await _followed(bench, None))[0], [], "denylist when nobody had to go")
    new = bench.new_session()
    answer = await bench.store.admit(new, maximum=2, on_limit="evict_oldest", supersedes=third.ref, deny_us=HOUR_US)
    admitted = expect(Admitted, answer)
    agree(admitted.evicted, (first.ref, second.ref), "sessions that gave way")
    entries, position = await _followed(bench, None)
    wanted = {_denied(each.ref, admitted.now_us + HOUR_US) for each in (first, second, third)}
    agree((len(entries), set(entries)), (3, wanted), "denylist")
    await bench.store.admit(bench.new_session(), maximum=1, on_limit="evict_oldest")
    agree((await _followed(bench, position))[0], [], "denylist without deny_us")


async def check_revoke_owner_denies_whom_it_ends(bench: Bench) -> None:
    """Every session it ends is on the denylist; the one kept, one that had ended, and other people's are not."""
    kept, over, stranger = await _signed_in(bench), await _signed_in(bench), await _signed_in(bench, "bob")
    await bench.store.revoke(over.ref, reason="logout")
    mine = [await _signed_in(bench) for _ in range(4)]
    revoke = partial(bench.store.revoke_owner, kept.ref.tag, kept.owner, reason="password changed")
    cut = await revoke(keep=kept.ref, deny_us=HOUR_US)
    agree(set(cut.ended), {each.ref for each in mine}, "sessions that this call ended")
    entries, position = await _followed(bench, None)
    wanted = {_denied(each.ref, cut.now_us + HOUR_US) for each in mine}
    agree((len(entries), set(entries)), (len(mine), wanted), "denylist")
    agree((await revoke()).ended, (kept.ref,), "sessions that a call without keep ended")
    agree((await _followed(bench, position))[0], [], "denylist without deny_us")
    expect(Live, await bench.load(stranger))


async def check_denials_of_revokes_at_once_are_all_told(bench: Bench) -> None:
    """Every one of many simultaneous logouts is on the denylist, also those of one session."""
    sessions = [await _signed_in(bench, f"user-{n % 5}") for n in range(20)]
    calls = [
        partial(bench.either(n).revoke, each.ref, reason="logout", deny_us=HOUR_US) for n, each in enumerate(sessions)
    ]
    calls.extend(partial(bench.either(n).revoke, sessions[0].ref, reason="logout", deny_us=HOUR_US) for n in range(5))
    answers = await bench.gather(calls)
    agree(sum(each.ended for each in answers), 20, "revokes that ended a session")
    told = {each.id for each in (await _followed(bench, None, limit=6))[0]}
    agree(told, {session_denial_id(each.ref) for each in sessions}, "denylist")


# -- the key ring --------------------------------------------------------------------------------------------------


async def check_the_ring_is_replaced_by_version(bench: Bench) -> None:
    """Written over the version that was read and over no other; up to 256 KiB of any bytes; it outlives a restart."""
    agree(await bench.store.read_ring(), None, "the ring before there is one")
    agree(await bench.store.write_ring(b"too early", expected=1), False, "written over a ring that is not there")
    agree(await bench.store.read_ring(), None, "the ring before there is one")
    rings = [bytes(range(256)), b"\x00", bytes(reversed(range(256))) * (RING_OCTETS // 256)]
    for version, ring in enumerate(rings):
        agree(await bench.either(version).write_ring(ring, expected=version), True, "written")
        for store in (bench.store, bench.other):
            agree(await store.read_ring() == (version + 1, ring), True, f"ring {version + 1} comes back")
        for stale in {0, version, version + 2}:
            for packed in (b"late", ring):
                agree(await bench.other.write_ring(packed, expected=stale), False, f"written at {stale}")
    await bench.store.close()
    await bench.store.open()
    agree(await bench.store.read_ring() == (len(rings), rings[-1]), True, "the ring after opening again")


async def check_ring_writers_at_once_have_one_winner(bench: Bench) -> None:
    """Of twenty rotations of the keys at once one is kept, and every loser knows."""
    for version in range(3):
        rings = [bench.draw(32) * 40 for _ in range(20)]
        calls = [partial(bench.either(n).write_ring, ring, expected=version) for n, ring in enumerate(rings)]
        answers = await bench.gather(calls)
        agree(sum(answers), 1, f"writers that won at version {version}")
        for store in (bench.store, bench.other):
            agree(await store.read_ring() == (version + 1, rings[answers.index(True)]), True, "the winner's ring")


# -- how these checks work -----------------------------------------------------------------------------------------


async def _signed_in(bench: Bench, subject: str = "ann", **wishes: Any) -> NewSession:
    new = bench.new_session(subject, **wishes)
    await bench.created(new)
    return new


async def _record(bench: Bench, session: NewSession) -> StoredSession:
    return expect(Live, await bench.load(session)).session


async def _begin(bench: Bench, session: NewSession | None, *, subject: str = "ann", **wishes: Any) -> Held:
    new = bench.new_family(session, subject, **wishes)
    expect(FamilyCreated, await bench.store.create_family(new))
    bench.advance(1000)
    return Held(new.ref, FIRST_GENERATION, new.digest, new.client, new.key)


async def _present(
    bench: Bench,
    held: Held,
    successor: str | None = None,
    *,
    store: Store | None = None,
    grace_us: int = 0,
    deny_us: int = 0,
) -> RefreshOutcome:
    fresh = bench.digest() if successor is None else successor
    return await (store or bench.store).rotate_refresh(
        held.ref,
        generation=held.generation,
        digest=held.digest,
        successor=fresh,
        sealed=_sealed(fresh),
        grace_us=grace_us,
        client=held.client,
        key=held.key,
        deny_us=deny_us,
    )


async def _rotated(bench: Bench, held: Held) -> Held:
    """Let the token grow as old as the grace, and rotate it."""
    bench.advance(GRACE_US)
    successor = bench.digest()
    expect(FamilyRotated, await _present(bench, held, successor, grace_us=GRACE_US))
    return held.next(successor)


async def _ends_across(bench: Bench, held: Held, moment_us: int, reason: str) -> None:
    """Hold that the family ends at this moment. It is asked for with a token of nobody, which moves no deadline."""

    def before(answer: RefreshOutcome) -> bool:
        if isinstance(answer, FamilyEnded):
            agree(answer.reason, reason, "reason")
            hold(answer.at_us <= answer.now_us, "an end lies in the past")
        else:
            expect(FamilyUnknown, answer)
        return isinstance(answer, FamilyUnknown)

    await bench.across(moment_us, lambda: _present(bench, replace(held, digest=bench.digest())), before=before)
    agree(expect(FamilyEnded, await _present(bench, held, store=bench.other, grace_us=DAY_US)).reason, reason, "reason")


async def _followed(bench: Bench, after: str | None, *, limit: int = 100) -> tuple[list[Denial], str]:
    """All entries after a position, and the position at the end."""
    found: list[Denial] = []
    for number in range(10_000):
        page = expect(DenialPage, await bench.either(number).denials(after=after, limit=limit))
        hold(len(page.entries) <= limit, f"a page holds at most {limit} entries")
        found.extend(page.entries)
        if not page.more:
            return found, page.position
        after = page.position
    raise ContractBroken("a denylist must come to an end")


async def _sweep_all(bench: Bench, *, limit: int = 50) -> None:
    for _ in range(10_000):
        removed = await bench.store.sweep(limit=limit)
        hold(0 <= removed <= limit, "sweep removes at most as many as it was told")
        if removed == 0:
            return
    raise ContractBroken("sweeping must come to an end")


def _works(answer: RefreshOutcome) -> bool:
    return isinstance(answer, (FamilyRotated, FamilyKept, FamilyReplayed))


def _sealed(successor: str) -> bytes:
    """Sealed successors are any bytes; these tell whose they are."""
    return bytes(range(256)) + successor.encode()


def _denied(ref: SessionRef, until_us: int) -> Denial:
    return Denial(kind="sid", id=session_denial_id(ref), until_us=until_us)


def _as_written(new: NewFamily, created_us: int) -> StoredFamily:
    return StoredFamily(
        ref=new.ref,
        generation=FIRST_GENERATION,
        digest=new.digest,
        owner=new.owner,
        subject=new.subject,
        client=new.client,
        key=new.key,
        grant=new.grant,
        created_us=created_us,
        rotated_us=created_us,
        idle_us=new.idle_us,
        absolute_us=created_us + new.absolute_us,
    )


CHECKS: Final = (
    check_a_family_keeps_what_it_was_given,
    check_create_family_repeated_answers_alike,
    check_create_family_is_not_repeated_later,
    check_create_family_refuses_a_name_in_use,
    check_no_family_begins_on_a_session_that_is_over,
    check_one_family_too_many_drops_the_oldest,
    check_one_family_too_many_drops_those_that_are_over_first,
    check_families_begun_at_once_keep_the_limit,
    check_a_rotation_makes_the_successor_current,
    check_a_young_token_is_kept_to_the_microsecond,
    check_the_predecessor_is_forgiven_to_the_microsecond,
    check_the_sealed_successor_goes_when_it_is_used,
    check_presentations_at_once_have_one_successor,
    check_a_refresh_repeated_is_the_same_refresh,
    check_a_token_never_issued_ends_nothing,
    check_a_family_that_is_not_there_is_unknown,
    check_reuse_ends_family_and_session_of_the_first_party,
    check_reuse_by_a_third_party_ends_the_family_alone,
    check_reuse_of_a_family_that_stands_alone,
    check_a_spent_grace_is_not_forgiven,
    check_reuse_found_at_once_is_found_by_one,
    check_a_wrong_holder_writes_nothing,
    check_a_family_ends_at_the_microsecond,
    check_a_family_ends_with_its_sessions_deadline,
    check_a_refresh_is_activity_of_its_session,
    check_a_family_dies_with_its_session,
    check_a_rotated_session_keeps_its_families,
    check_refresh_against_logout_at_once,
    check_refresh_and_commits_at_once_lose_nothing,
    check_a_cut_ends_families_that_stand_alone,
    check_a_later_cut_leaves_the_first_reason,
    check_a_cut_against_new_families_at_once,
    check_a_clock_that_steps_back_lets_no_family_through,
    check_nothing_brings_an_ended_family_back,
    check_an_interrupted_refresh_loses_no_token,
    check_sweeping_takes_only_families_that_are_over,
    check_standing_follows_the_session,
    check_standing_ends_with_the_absolute_deadline,
    check_the_end_of_an_absolute_deadline_is_that_deadline,
    check_a_denied_token_does_not_stand,
    check_hostile_bytes_have_no_standing,
    check_the_denylist_keeps_every_kind_in_order,
    check_the_denylist_is_read_in_pages,
    check_followers_of_the_denylist_miss_nothing,
    check_an_entry_is_told_until_its_time_exactly,
    check_a_position_of_another_log_is_lost,
    check_the_longer_denial_decides,
    check_revoke_denies_whether_or_not_it_ended,
    check_admit_denies_whom_it_ends,
    check_revoke_owner_denies_whom_it_ends,
    check_denials_of_revokes_at_once_are_all_told,
    check_the_ring_is_replaced_by_version,
    check_ring_writers_at_once_have_one_winner,
)
NEEDS_BYTES: Final = frozenset((check_hostile_bytes_have_no_standing,))
