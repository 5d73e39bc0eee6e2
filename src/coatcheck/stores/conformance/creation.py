"""Checks of `create` and `admit`: written once, exactly as given, and never more than the limit allows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

from coatcheck.core.ports import (
    REASON_EVICTED,
    REASON_SUPERSEDED,
    Absent,
    Admitted,
    Changes,
    Choice,
    Committed,
    Created,
    Ended,
    LimitReached,
    Live,
    OnLimit,
)
from coatcheck.core.session import SCHEMA, NewSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance.bench import (
    HOUR_US,
    WIDE,
    Bench,
    ContractBroken,
    agree,
    expect,
    hold,
)

SIMULTANEOUS: Final = 200


async def check_create_keeps_what_it_was_given(bench: Bench) -> None:
    """Every member comes back as it went in; the times are the store's."""
    fields = {"cart": '[1,"two"]', "näme ☃": '"line\\nbreak"', "{tag}:*'\"": '""', "$": '{"a":null}'}
    new = bench.new_session("Zoë 🦉", fields=fields, authority='{"claims":{"a":"\\"b\\""},"x":[]}')
    early = await bench.store.ping()
    created = await bench.store.create(new)
    session = created.session
    hold(early <= session.created_us <= created.now_us, "a session is created at the store's time")
    agree(session, new.at(session.created_us), "the record")
    agree((session.schema, session.version), (SCHEMA, 1), "schema and version")
    for store in (bench.store, bench.other):
        live = expect(Live, await store.load(new.ref, new.digest))
        agree(live.session, session, "the record that was read")
        agree(live.seen_us, session.created_us, "the last activity of a new session")
        hold(live.now_us >= created.now_us, "answers carry the store's clock")


async def check_an_anonymous_session_has_no_owner(bench: Bench) -> None:
    """Nobody proved anything: no owner, no subject, no time of authentication."""
    new = bench.new_session(None, fields={"cart": "[]"})
    await bench.store.create(new)
    session = expect(Live, await bench.load(new)).session
    agree((session.owner, session.subject, session.auth_us), ("", "", 0), "owner, subject, time of sign-in")
    agree(dict(session.fields), {"cart": "[]"}, "fields")


async def check_create_repeated_answers_alike(bench: Bench) -> None:
    """A call whose answer was lost may be sent again: one session, the same answer, nothing written over."""
    new = bench.new_session(fields={"a": "1"})
    first = await bench.created(new)
    again = await bench.other.create(new)
    agree(again.session, first.session, "the repeated answer")
    expect(Committed, await bench.put(new.ref, "a", "2"))
    bench.advance(1000)
    third = await bench.store.create(new)
    agree(third.session.created_us, first.session.created_us, "the time of creation")
    session = expect(Live, await bench.load(new)).session
    agree((session.version, dict(session.fields)), (2, {"a": "2"}), "the record after a late repeat")
    agree(await bench.handles_of("ann"), [new.ref.handle], "the subject's sessions")


async def check_create_repeated_at_once_makes_one_session(bench: Bench) -> None:
    """Twenty deliveries of one call are one call."""
    new = bench.new_session()
    answers = await bench.gather([partial(bench.either(n).create, new) for n in range(20)])
    agree(len({expect(Created, each).session.created_us for each in answers}), 1, "different answers")
    agree(await bench.handles_of("ann"), [new.ref.handle], "the subject's sessions")


async def check_create_refuses_a_handle_in_use(bench: Bench) -> None:
    """A second session never takes the place of a first: the broken random source is an exception."""
    new = bench.new_session(fields={"mine": "1"})
    await bench.created(new)
    thief = bench.new_session(fields={"theirs": "1"})
    thief = NewSession(
        **{name: getattr(thief, name) for name in NewSession.__dataclass_fields__ if name != "ref"},
        ref=new.ref,
    )
    try:
        answer: object = await bench.other.create(thief)
    except StoreUnavailable:
        answer = None
    agree(answer, None, "the answer for a handle in use")
    agree(dict(expect(Live, await bench.load(new)).session.fields), {"mine": "1"}, "the first session's fields")


async def check_admit_allows_any_number(bench: Bench) -> None:
    """`allow` creates whatever the maximum says, and ends nobody."""
    for count in range(1, 4):
        admitted = expect(Admitted, await _admit(bench, bench.new_session(), 1, "allow"))
        agree(admitted.evicted, (), "sessions that gave way")
        agree(len(await bench.handles_of("ann")), count, "alive sessions")


async def check_admit_keeps_what_it_was_given(bench: Bench) -> None:
    """The record of an admitted session is the one that `create` would have written."""
    new = bench.new_session(fields={"näme": '"☃"'})
    admitted = expect(Admitted, await bench.store.admit(new, maximum=3, on_limit="refuse"))
    agree(admitted.session, new.at(admitted.session.created_us), "the record")
    agree(expect(Live, await bench.load(new)).session, admitted.session, "the record that was read")


async def check_admit_evicts_the_oldest(bench: Bench) -> None:
    """The oldest by creation go, however recently they were used; they leave a tombstone that says why."""
    old = [bench.new_session() for _ in range(3)]
    for each in old:
        await bench.created(each)
    bench.advance(1000)
    new = bench.new_session()
    admitted = expect(Admitted, await _admit(bench, new, 2, "evict_oldest"))
    agree(admitted.evicted, (old[0].ref, old[1].ref), "sessions that gave way")
    for each in old[:2]:
        agree(expect(Ended, await bench.load(each)).reason, REASON_EVICTED, "reason")
    agree(await bench.handles_of("ann"), [old[2].ref.handle, new.ref.handle], "alive sessions")


async def check_admit_refuses_and_asks_at_the_limit(bench: Bench) -> None:
    """One below the limit is admitted; at the limit nothing is written and the alive sessions are named."""
    refusals: tuple[OnLimit, ...] = ("refuse", "ask")
    for on_limit in refusals:
        subject = f"ann-{on_limit}"
        alive = [bench.new_session(subject) for _ in range(2)]
        for each in alive:
            expect(Admitted, await _admit(bench, each, 2, on_limit))
        extra = bench.new_session(subject)
        reached = expect(LimitReached, await _admit(bench, extra, 2, on_limit))
        agree(reached.alive, tuple(each.ref for each in alive), "alive sessions in the answer, oldest first")
        agree(expect(Absent, await bench.load(extra)).why, "unknown", "the session that was refused")
        agree(len(await bench.handles_of(subject)), 2, "alive sessions")
        expect(Admitted, await _admit(bench, extra, 3, on_limit))


async def check_admit_counts_only_the_alive_of_this_owner(bench: Bench) -> None:
    """Sessions that ended, by revoke or by either deadline, and those of other people, take no place."""
    for subject in ("bob", "bob", "bob"):
        await bench.created(bench.new_session(subject))
    await bench.created(bench.new_session(idle_us=HOUR_US))
    await bench.created(bench.new_session(idle_us=10 * HOUR_US, absolute_us=HOUR_US))
    ended = bench.new_session()
    await bench.created(ended)
    await bench.store.revoke(ended.ref, reason="logout")
    bench.advance(HOUR_US)
    admitted = expect(Admitted, await _admit(bench, bench.new_session(), 1, "evict_oldest"))
    agree(admitted.evicted, (), "sessions that gave way")
    expect(LimitReached, await _admit(bench, bench.new_session(), 1, "refuse"))


async def check_admit_supersedes_without_counting(bench: Bench) -> None:
    """The session a sign-in replaces ends with the sign-in, and its place is free for it."""
    old, new = bench.new_session(), bench.new_session()
    await bench.created(old)
    admitted = expect(Admitted, await bench.store.admit(new, maximum=1, on_limit="refuse", supersedes=old.ref))
    agree(admitted.evicted, (), "sessions that gave way to the limit")
    agree(expect(Ended, await bench.load(old)).reason, REASON_SUPERSEDED, "reason")
    agree(await bench.handles_of("ann"), [new.ref.handle], "alive sessions")


async def check_admit_at_the_limit_supersedes_nothing(bench: Bench) -> None:
    """When nothing is written, the session that was to be replaced lives on."""
    old, third, new = bench.new_session(), bench.new_session(), bench.new_session()
    await bench.created(old)
    await bench.created(third)
    reached = expect(LimitReached, await bench.store.admit(new, maximum=1, on_limit="refuse", supersedes=old.ref))
    hold(third.ref in reached.alive, "the session that fills the limit is named")
    expect(Live, await bench.load(old))


async def check_admit_supersedes_what_is_gone_or_unknown(bench: Bench) -> None:
    """A session that ended before keeps its first reason; one that never was is no hindrance."""
    old, new = bench.new_session(), bench.new_session()
    await bench.created(old)
    await bench.store.revoke(old.ref, reason="logout")
    expect(Admitted, await bench.store.admit(new, maximum=1, on_limit="refuse", supersedes=old.ref))
    agree(expect(Ended, await bench.load(old)).reason, "logout", "reason")
    never, newer = bench.new_session(), bench.new_session()
    expect(Admitted, await bench.store.admit(newer, maximum=2, on_limit="refuse", supersedes=never.ref))
    agree(expect(Absent, await bench.load(never)).why, "unknown", "the session that never was")


async def check_admit_repeated_answers_like_the_first_call(bench: Bench) -> None:
    """A sign-in whose answer was lost may be sent again at the limit: it does not evict or refuse itself."""
    old = bench.new_session("eve")
    await bench.created(old)
    evicting = bench.new_session("eve")
    first = expect(Admitted, await _admit(bench, evicting, 1, "evict_oldest"))
    again = expect(Admitted, await _admit(bench, evicting, 1, "evict_oldest"))
    agree(again.session.created_us, first.session.created_us, "the time of creation")
    hold(again.evicted in ((), first.evicted), f"a repeat evicts nobody else: {again.evicted!r}")
    agree(await bench.handles_of("eve"), [evicting.ref.handle], "alive sessions")

    refusing = bench.new_session("una")
    expect(Admitted, await _admit(bench, refusing, 1, "refuse"))
    expect(Admitted, await _admit(bench, refusing, 1, "refuse"))
    agree(await bench.handles_of("una"), [refusing.ref.handle], "alive sessions")


async def check_admit_is_exact_when_evicting_at_once(bench: Bench) -> None:
    """200 sign-ins at once under a limit of one leave exactly one; every other one knows that it was evicted."""
    sessions = [bench.new_session() for _ in range(SIMULTANEOUS)]
    answers = await _admit_together(bench, sessions, 1, "evict_oldest")
    evicted = [ref for each in answers for ref in expect(Admitted, each).evicted]
    alive = await bench.handles_of("ann")
    agree(len(alive), 1, "alive sessions")
    agree(len(evicted), SIMULTANEOUS - 1, "evictions")
    agree(len(set(evicted)), SIMULTANEOUS - 1, "different evicted sessions")
    for each in sessions:
        loaded = await bench.load(each)
        if each.ref.handle in alive:
            expect(Live, loaded)
        else:
            agree(expect(Ended, loaded).reason, REASON_EVICTED, "reason")


async def check_admit_is_exact_when_refusing_at_once(bench: Bench) -> None:
    """200 sign-ins at once under a limit: exactly the limit gets in, and the others wrote nothing."""
    refusals: tuple[OnLimit, ...] = ("refuse", "ask")
    for maximum, on_limit in zip((1, 5), refusals, strict=True):
        subject = f"ann-{on_limit}"
        sessions = [bench.new_session(subject) for _ in range(SIMULTANEOUS)]
        answers = await _admit_together(bench, sessions, maximum, on_limit)
        inside = {each.session.ref.handle for each in answers if isinstance(each, Admitted)}
        agree(len(inside), maximum, "sessions that were admitted")
        agree(set(await bench.handles_of(subject)), inside, "alive sessions")
        outside = [each for each in sessions if each.ref.handle not in inside]
        for each in outside[:20]:
            agree(expect(Absent, await bench.load(each)).why, "unknown", "a refused session")


async def check_admit_is_exact_when_allowing_at_once(bench: Bench) -> None:
    """200 sign-ins at once that are all allowed: all are in, and nobody gave way."""
    sessions = [bench.new_session() for _ in range(SIMULTANEOUS)]
    answers = await _admit_together(bench, sessions, 1, "allow")
    agree([expect(Admitted, each).evicted for each in answers], [()] * SIMULTANEOUS, "sessions that gave way")
    agree(set(await bench.handles_of("ann")), {each.ref.handle for each in sessions}, "alive sessions")


async def check_admit_with_a_choice_ends_exactly_what_was_chosen(bench: Bench) -> None:
    """Not the oldest but the chosen ones give way, with the reason that was given, whatever the limit answers else."""
    answers: tuple[OnLimit, ...] = ("allow", "evict_oldest", "refuse", "ask")
    for on_limit in answers:
        subject = f"ann-{on_limit}"
        old = [bench.new_session(subject) for _ in range(3)]
        for each in old:
            await bench.created(each)
        new = bench.new_session(subject)
        choice = _choice(old, old[2], old[1])
        admitted = expect(
            Admitted, await bench.store.admit(new, maximum=3, on_limit=on_limit, choice=choice, reason="chosen ☃")
        )
        agree(admitted.evicted, (old[1].ref, old[2].ref), "sessions that gave way, oldest first")
        for each in old[1:]:
            agree(expect(Ended, await bench.load(each)).reason, "chosen ☃", "reason")
        agree(await bench.handles_of(subject), [old[0].ref.handle, new.ref.handle], "alive sessions")
        again = await bench.other.admit(new, maximum=3, on_limit=on_limit, choice=choice, reason="chosen ☃")
        agree(expect(Admitted, again).session, admitted.session, "the repeated answer")
        agree(len(await bench.handles_of(subject)), 2, "alive sessions after a repeat")


async def check_admit_with_a_choice_of_nobody_needs_room(bench: Bench) -> None:
    """Nobody is ended where nobody was chosen: below the limit that is enough, at the limit nothing is written."""
    old = [bench.new_session() for _ in range(2)]
    for each in old:
        await bench.created(each)
    for maximum in (1, 2):
        refused = await bench.store.admit(bench.new_session(), maximum=maximum, on_limit="allow", choice=_choice(old))
        agree(expect(LimitReached, refused).alive, (old[0].ref, old[1].ref), f"alive sessions, {maximum} allowed")
    few = await bench.store.admit(bench.new_session(), maximum=1, on_limit="evict_oldest", choice=_choice(old, old[0]))
    expect(LimitReached, few)
    admitted = await bench.store.admit(bench.new_session(), maximum=3, on_limit="refuse", choice=_choice(old))
    agree(expect(Admitted, admitted).evicted, (), "sessions that gave way")


async def check_admit_with_a_choice_refuses_another_set(bench: Bench) -> None:
    """One session more or less than was shown, or one chosen that is not among them: nothing is written."""
    old = [bench.new_session() for _ in range(3)]
    gone, stranger = bench.new_session(), bench.new_session("bob")
    for each in (*old, gone, stranger):
        await bench.created(each)
    await bench.store.revoke(gone.ref, reason="logout")
    wrong = {
        "one more lives": _choice(old[:2], old[0]),
        "one less lives": _choice([*old, gone], old[0]),
        "one ended meanwhile, and was chosen": _choice([*old, gone], gone),
        "another one lives instead": _choice([*old[:2], gone], old[0]),
        "somebody else's was shown": _choice([*old, stranger], old[0]),
        "somebody else's was chosen": _choice(old, old[0], stranger),
        "one that is gone was chosen": _choice(old, old[0], gone),
        "nothing was shown": _choice([]),
    }
    for why, choice in wrong.items():
        new = bench.new_session()
        answer = await bench.store.admit(new, maximum=9, on_limit="evict_oldest", choice=choice)
        agree(expect(LimitReached, answer).alive, tuple(each.ref for each in old), f"alive sessions: {why}")
        agree(expect(Absent, await bench.load(new)).why, "unknown", f"the session that was refused: {why}")
    expect(Live, await bench.load(stranger))
    agree(len(await bench.handles_of("ann")), 3, "alive sessions")


async def check_admit_with_a_choice_supersedes_beside_it(bench: Bench) -> None:
    """The session this browser carried is no part of what is shown; it goes with the chosen ones or stays with them."""
    own, first, second, new = (bench.new_session() for _ in range(4))
    for each in (own, first, second):
        await bench.created(each)
    refused = await bench.store.admit(
        new, maximum=1, on_limit="ask", supersedes=own.ref, choice=_choice([own, first, second], first, second)
    )
    agree(expect(LimitReached, refused).alive, (first.ref, second.ref), "alive sessions that count")
    expect(Live, await bench.load(own))
    admitted = await bench.store.admit(
        new, maximum=2, on_limit="ask", supersedes=own.ref, choice=_choice([first, second], first)
    )
    agree(expect(Admitted, admitted).evicted, (first.ref,), "sessions that gave way")
    agree(expect(Ended, await bench.load(own)).reason, REASON_SUPERSEDED, "reason")
    agree(expect(Ended, await bench.load(first)).reason, REASON_EVICTED, "reason")
    agree(await bench.handles_of("ann"), [second.ref.handle, new.ref.handle], "alive sessions")


async def check_admit_with_a_choice_is_exact_at_once(bench: Bench) -> None:
    """200 that were shown the same session and chose to end it: one of them does, the others learn who is in now."""
    old = bench.new_session()
    await bench.created(old)
    sessions = [bench.new_session() for _ in range(SIMULTANEOUS)]
    answers = await _admit_together(bench, sessions, 1, "ask", choice=_choice([old], old))
    inside = [each for each in answers if isinstance(each, Admitted)]
    agree([each.evicted for each in inside], [(old.ref,)], "who gave way to whoever was admitted")
    winner = inside[0].session.ref
    agree(await bench.handles_of("ann"), [winner.handle], "alive sessions")
    refused = [expect(LimitReached, each).alive for each in answers if not isinstance(each, Admitted)]
    agree(refused, [(winner,)] * (SIMULTANEOUS - 1), "what the others were told")


async def check_admit_at_once_never_loses_a_repeat(bench: Bench) -> None:
    """Ten sign-ins, each delivered three times at once, under a limit of ten: all ten are in."""
    sessions = [bench.new_session() for _ in range(10)]
    answers = await _admit_together(bench, sessions * 3, 10, "refuse")
    for each in answers:
        expect(Admitted, each)
    agree(len(await bench.handles_of("ann")), 10, "alive sessions")


async def check_a_new_session_can_be_used_at_once(bench: Bench) -> None:
    """What was created is alive for every verb, on the other node too."""
    new = bench.new_session()
    await bench.store.create(new)
    expect(Committed, await bench.other.commit(new.ref, Changes(put={"a": "1"}), limits=WIDE, expected=1))
    agree(expect(Live, await bench.load(new)).session.version, 2, "version")


async def _admit(bench: Bench, new: NewSession, maximum: int, on_limit: OnLimit) -> Admitted | LimitReached:
    answer = await bench.store.admit(new, maximum=maximum, on_limit=on_limit)
    bench.advance(1000)
    return answer


def _choice(shown: Sequence[NewSession], *ending: NewSession) -> Choice:
    return Choice(
        shown=frozenset(each.ref.handle for each in shown), ending=frozenset(each.ref.handle for each in ending)
    )


async def _admit_together(
    bench: Bench, sessions: list[NewSession], maximum: int, on_limit: OnLimit, *, choice: Choice | None = None
) -> list[Admitted | LimitReached]:
    calls = [
        partial(bench.either(n).admit, new, maximum=maximum, on_limit=on_limit, choice=choice)
        for n, new in enumerate(sessions)
    ]
    answers = await bench.gather(calls)
    if len(answers) != len(sessions):
        raise ContractBroken("every call has an answer")
    return answers


CHECKS: Final = (
    check_create_keeps_what_it_was_given,
    check_an_anonymous_session_has_no_owner,
    check_create_repeated_answers_alike,
    check_create_repeated_at_once_makes_one_session,
    check_create_refuses_a_handle_in_use,
    check_a_new_session_can_be_used_at_once,
    check_admit_allows_any_number,
    check_admit_keeps_what_it_was_given,
    check_admit_evicts_the_oldest,
    check_admit_refuses_and_asks_at_the_limit,
    check_admit_counts_only_the_alive_of_this_owner,
    check_admit_supersedes_without_counting,
    check_admit_at_the_limit_supersedes_nothing,
    check_admit_supersedes_what_is_gone_or_unknown,
    check_admit_repeated_answers_like_the_first_call,
    check_admit_is_exact_when_evicting_at_once,
    check_admit_is_exact_when_refusing_at_once,
    check_admit_at_once_never_loses_a_repeat,
    check_admit_is_exact_when_allowing_at_once,
    check_admit_with_a_choice_ends_exactly_what_was_chosen,
    check_admit_with_a_choice_of_nobody_needs_room,
    check_admit_with_a_choice_refuses_another_set,
    check_admit_with_a_choice_supersedes_beside_it,
    check_admit_with_a_choice_is_exact_at_once,
)
