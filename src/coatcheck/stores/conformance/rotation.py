"""Checks of `rotate_id`: one successor for everybody, and an old id that dies when it was promised to."""

from __future__ import annotations

from functools import partial
from typing import Final

from coatcheck.core.ports import (
    Absent,
    Aliased,
    Changes,
    Committed,
    Converged,
    Ended,
    Gone,
    Live,
    Loaded,
    Rotated,
)
from coatcheck.core.session import NewSession
from coatcheck.stores.conformance.bench import MINUTE_US, WIDE, Bench, agree, expect, hold

SEALED: Final = bytes(range(256))
"""Sealed successors are any bytes."""


async def check_rotation_moves_the_session_to_a_new_id(bench: Bench) -> None:
    """The new id opens the same session; only digest and version changed."""
    new = bench.new_session(fields={"a": "1"})
    before = (await bench.created(new)).session
    successor = bench.digest()
    rotated = await _rotate(bench, new, successor)
    agree(expect(Rotated, rotated).version, 2, "version")
    session = expect(Live, await bench.other.load(new.ref, successor)).session
    agree((session.digest, session.version), (successor, 2), "digest and version")
    for name in (
        "ref",
        "owner",
        "subject",
        "created_us",
        "auth_us",
        "idle_us",
        "absolute_us",
        "authority",
        "fields",
    ):
        agree(getattr(session, name), getattr(before, name), name)
    agree(await bench.handles_of("ann"), [new.ref.handle], "alive sessions")
    expect(Committed, await bench.store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE, expected=2))


async def check_the_old_id_is_answered_with_its_successor(bench: Bench) -> None:
    """A late tab with the old cookie gets the session, and the sealed successor byte for byte."""
    new = bench.new_session(fields={"a": "1"})
    await bench.created(new)
    expect(Rotated, await _rotate(bench, new, bench.digest()))
    expect(Committed, await bench.put(new.ref, "a", "2"))
    aliased = expect(Aliased, await bench.other.load(new.ref, new.digest))
    agree(aliased.sealed, SEALED, "sealed successor")
    agree((dict(aliased.session.fields), aliased.session.version), ({"a": "2"}, 3), "fields and version")


async def check_the_alias_ends_to_the_microsecond(bench: Bench) -> None:
    """At the end of its window the old id opens nothing, and no rotation converges on it any more."""
    new = bench.new_session()
    await bench.created(new)
    rotated = expect(Rotated, await _rotate(bench, new, bench.digest()))
    moment = rotated.now_us + MINUTE_US

    def aliased(answer: Loaded) -> bool:
        if isinstance(answer, Absent):
            agree(answer.why, "replaced", "an id whose alias has run out")
        else:
            expect(Aliased, answer)
        return isinstance(answer, Aliased)

    await bench.across(moment, lambda: bench.load(new), before=aliased)
    agree(expect(Gone, await _rotate(bench, new, bench.digest())).reason, "replaced", "a late rotation")


async def check_convergence_ends_with_the_alias(bench: Bench) -> None:
    """Until the last microsecond of the window late rotations converge, then they are refused."""
    new = bench.new_session()
    await bench.created(new)
    rotated = expect(Rotated, await _rotate(bench, new, bench.digest()))

    def converged(answer: object) -> bool:
        if isinstance(answer, Gone):
            agree(answer.reason, "replaced", "reason")
        else:
            agree(expect(Converged, answer).sealed, SEALED, "sealed successor")
        return isinstance(answer, Converged)

    await bench.across(
        rotated.now_us + MINUTE_US,
        lambda: _rotate(bench, new, bench.digest(), sealed=b"late"),
        before=converged,
    )


async def check_rotation_without_an_alias(bench: Bench) -> None:
    """With a window of nothing the old id is dead at once, and a second rotation from it is refused."""
    new = bench.new_session()
    await bench.created(new)
    expect(Rotated, await _rotate(bench, new, bench.digest(), alias_us=0))
    agree(expect(Absent, await bench.load(new)).why, "replaced", "the old id")
    agree(expect(Gone, await _rotate(bench, new, bench.digest(), alias_us=0)).reason, "replaced", "reason")


async def check_rotations_at_once_end_in_one_id(bench: Bench) -> None:
    """Twenty regenerations of one cookie at once: one wins, all others receive that one's successor (R9)."""
    new = bench.new_session()
    await bench.created(new)
    successors = [bench.digest() for _ in range(20)]
    calls = [
        partial(
            bench.either(n).rotate_id,
            new.ref,
            old_digest=new.digest,
            new_digest=successor,
            sealed=successor.encode(),
            alias_us=MINUTE_US,
        )
        for n, successor in enumerate(successors)
    ]
    answers = await bench.gather(calls)
    winners = [n for n, each in enumerate(answers) if isinstance(each, Rotated)]
    agree(len(winners), 1, "rotations that won")
    winner = successors[winners[0]]
    for number, each in enumerate(answers):
        if number not in winners:
            agree(expect(Converged, each).sealed, winner.encode(), "sealed successor")
    agree(expect(Live, await bench.store.load(new.ref, winner)).session.version, 2, "version")
    for successor in successors:
        if successor != winner:
            expect(Absent, await bench.store.load(new.ref, successor))


async def check_new_authority_kills_the_old_id_at_once(bench: Bench) -> None:
    """When privileges change there is no alias: a stolen old cookie must not be carried along."""
    new = bench.new_session(fields={"a": "1"})
    await bench.created(new)
    successor = bench.digest()
    rotated = await _rotate(bench, new, successor, authority='{"acr":"gold"}')
    agree(expect(Rotated, rotated).version, 2, "version")
    agree(expect(Absent, await bench.load(new)).why, "replaced", "the old id")
    session = expect(Live, await bench.store.load(new.ref, successor)).session
    agree((session.authority, dict(session.fields)), ('{"acr":"gold"}', {"a": "1"}), "authority and fields")
    agree(expect(Gone, await _rotate(bench, new, bench.digest())).reason, "replaced", "rotation of the old id")


async def check_new_authority_kills_earlier_aliases(bench: Bench) -> None:
    """An alias that was still open closes with the change, or its holder would gain the new privileges."""
    new = bench.new_session()
    await bench.created(new)
    second, third = bench.digest(), bench.digest()
    expect(Rotated, await _rotate(bench, new, second))
    expect(Aliased, await bench.load(new))
    answer = await bench.store.rotate_id(
        new.ref,
        old_digest=second,
        new_digest=third,
        sealed=SEALED,
        alias_us=MINUTE_US,
        authority='{"acr":"gold"}',
    )
    expect(Rotated, answer)
    for dead in (new.digest, second):
        agree(expect(Absent, await bench.store.load(new.ref, dead)).why, "replaced", "an earlier id")
    expect(Live, await bench.store.load(new.ref, third))


async def check_a_change_of_authority_never_converges(bench: Bench) -> None:
    """A successor chosen by a plain rotation does not carry the privileges: that must not look like success."""
    new = bench.new_session()
    await bench.created(new)
    second = bench.digest()
    expect(Rotated, await _rotate(bench, new, second))
    answer = await _rotate(bench, new, bench.digest(), authority='{"acr":"gold"}')
    agree(expect(Gone, answer).reason, "replaced", "reason")
    session = expect(Live, await bench.store.load(new.ref, second)).session
    agree(session.authority, new.authority, "authority")


async def check_only_one_change_of_authority_wins(bench: Bench) -> None:
    """Of simultaneous changes from one id one is made; the id it chose is the only one that lives."""
    new = bench.new_session()
    await bench.created(new)
    successors = [bench.digest() for _ in range(10)]
    calls = [
        partial(
            bench.either(n).rotate_id,
            new.ref,
            old_digest=new.digest,
            new_digest=successor,
            sealed=b"",
            alias_us=MINUTE_US,
            authority=f'{{"acr":"{n}"}}',
        )
        for n, successor in enumerate(successors)
    ]
    answers = await bench.gather(calls)
    winners = [n for n, each in enumerate(answers) if isinstance(each, Rotated)]
    agree(len(winners), 1, "changes that won")
    session = expect(Live, await bench.store.load(new.ref, successors[winners[0]])).session
    agree((session.authority, session.version), (f'{{"acr":"{winners[0]}"}}', 2), "authority and version")


async def check_a_rotation_repeated_is_the_same_rotation(bench: Bench) -> None:
    """A rotation whose answer was lost may be sent again: its caller must not be locked out."""
    authorities = (None, '{"acr":"gold"}')
    for authority in authorities:
        new = bench.new_session()
        await bench.created(new)
        successor = bench.digest()
        expect(Rotated, await _rotate(bench, new, successor, authority=authority))
        again = await _rotate(bench, new, successor, authority=authority)
        if authority is None and isinstance(again, Converged):
            agree(again.sealed, SEALED, "sealed successor")
        else:
            agree(expect(Rotated, again).version, 2, "version")
        agree(expect(Live, await bench.store.load(new.ref, successor)).session.version, 2, "version")


async def check_ids_in_a_row(bench: Bench) -> None:
    """After two rotations only the last id is current; no earlier one is ever live again."""
    new = bench.new_session()
    await bench.created(new)
    second, third = bench.digest(), bench.digest()
    expect(Rotated, await _rotate(bench, new, second))
    answer = await bench.store.rotate_id(
        new.ref, old_digest=second, new_digest=third, sealed=b"third", alias_us=MINUTE_US
    )
    agree(expect(Rotated, answer).version, 3, "version")
    agree(expect(Aliased, await bench.store.load(new.ref, second)).sealed, b"third", "sealed successor")
    first = await bench.load(new)
    hold(
        isinstance(first, Aliased) or (isinstance(first, Absent) and first.why == "replaced"),
        f"the first id is an alias or replaced: {first!r}",
    )
    expect(Live, await bench.store.load(new.ref, third))


async def check_a_wrong_id_rotates_nothing(bench: Bench) -> None:
    """Without the current secret a rotation is refused and changes nothing."""
    new = bench.new_session()
    await bench.created(new)
    answer = await bench.store.rotate_id(
        new.ref, old_digest=bench.digest(), new_digest=bench.digest(), sealed=SEALED, alias_us=MINUTE_US
    )
    agree(expect(Gone, answer).reason, "replaced", "reason")
    agree(expect(Live, await bench.load(new)).session.version, 1, "version")


async def check_a_rotation_after_logout_is_refused(bench: Bench) -> None:
    """A late rotation wakes nobody, and a logout after a rotation ends every id of the session."""
    late, early = bench.new_session(), bench.new_session()
    await bench.created(late)
    await bench.created(early)
    await bench.store.revoke(late.ref, reason="logout")
    successor = bench.digest()
    agree(expect(Gone, await _rotate(bench, late, successor)).reason, "logout", "reason")
    agree(expect(Ended, await bench.store.load(late.ref, successor)).reason, "logout", "the refused successor")
    second = bench.digest()
    expect(Rotated, await _rotate(bench, early, second))
    await bench.store.revoke(early.ref, reason="logout")
    for digest in (early.digest, second):
        agree(expect(Ended, await bench.other.load(early.ref, digest)).reason, "logout", "reason")
    agree(expect(Gone, await _rotate(bench, early, bench.digest())).reason, "logout", "no alias is left")


async def _rotate(
    bench: Bench,
    new: NewSession,
    successor: str,
    *,
    sealed: bytes = SEALED,
    alias_us: int = MINUTE_US,
    authority: str | None = None,
) -> Rotated | Converged | Gone:
    return await bench.store.rotate_id(
        new.ref,
        old_digest=new.digest,
        new_digest=successor,
        sealed=sealed,
        alias_us=alias_us,
        authority=authority,
    )


CHECKS: Final = (
    check_rotation_moves_the_session_to_a_new_id,
    check_the_old_id_is_answered_with_its_successor,
    check_the_alias_ends_to_the_microsecond,
    check_convergence_ends_with_the_alias,
    check_rotation_without_an_alias,
    check_rotations_at_once_end_in_one_id,
    check_new_authority_kills_the_old_id_at_once,
    check_new_authority_kills_earlier_aliases,
    check_a_change_of_authority_never_converges,
    check_only_one_change_of_authority_wins,
    check_a_rotation_repeated_is_the_same_rotation,
    check_ids_in_a_row,
    check_a_wrong_id_rotates_nothing,
    check_a_rotation_after_logout_is_refused,
)
