"""Checks of `revoke`, `expire_idle`, `revoke_owner` and tombstones: what has ended stays ended."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from coatcheck.core.ports import (
    TOMBSTONE_US,
    Activity,
    Alive,
    Changes,
    Committed,
    Created,
    Ended,
    Gone,
    Live,
    Loaded,
    Revoked,
    RevokedMany,
    Rotated,
)
from coatcheck.core.session import NewSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance.bench import (
    DAY_US,
    HOUR_US,
    MINUTE_US,
    WIDE,
    Bench,
    agree,
    expect,
    hold,
    tag_of,
)


async def check_revoke_ends_once_and_keeps_the_first_reason(bench: Bench) -> None:
    """The first revoke ended it; a second one is fine, says so, and changes no reason."""
    new = bench.new_session()
    await bench.created(new)
    agree((await bench.store.revoke(new.ref, reason="ünusual ☃ activity")).ended, True, "revoke ended it")
    bench.advance(MINUTE_US)
    agree((await bench.other.revoke(new.ref, reason="logout")).ended, False, "a second revoke ended it")
    agree(expect(Ended, await bench.load(new)).reason, "ünusual ☃ activity", "reason")


async def check_one_of_many_revokes_ended_it(bench: Bench) -> None:
    """Of twenty at once exactly one says that it ended the session, and its reason is on record."""
    new = bench.new_session()
    await bench.created(new)
    calls = [partial(bench.either(n).revoke, new.ref, reason=f"reason {n}") for n in range(20)]
    answers = await bench.gather(calls)
    winners = [n for n, each in enumerate(answers) if each.ended]
    agree(len(winners), 1, "revokes that ended it")
    agree(expect(Ended, await bench.load(new)).reason, f"reason {winners[0]}", "reason")


async def check_nothing_brings_an_ended_session_back(bench: Bench) -> None:
    """After logout every verb that writes is tried, with the genuine ids: the tombstone and its reason stay."""
    new = bench.new_session(fields={"a": "1"})
    created = await bench.created(new)
    await bench.store.revoke(new.ref, reason="logout")
    now = created.now_us + MINUTE_US
    bench.advance(MINUTE_US)

    async def creates() -> None:
        try:
            await bench.other.create(new)
        except StoreUnavailable:
            return

    async def admits() -> None:
        try:
            await bench.other.admit(new, maximum=5, on_limit="refuse")
        except StoreUnavailable:
            return

    activity = Activity(ref=new.ref, owner=new.owner, seen_us=now)
    rotate = partial(
        bench.store.rotate_id, new.ref, old_digest=new.digest, new_digest=bench.digest(), sealed=b"s", alias_us=1000
    )
    attempts: tuple[tuple[str, Callable[[], Coroutine[Any, Any, object]]], ...] = (
        ("commit", partial(bench.put, new.ref, "a", "2")),
        ("touch", partial(bench.store.touch, [activity])),
        ("rotate_id", rotate),
        ("rotate_id with authority", partial(rotate, authority="{}")),
        ("create", creates),
        ("admit", admits),
        ("expire_idle", partial(bench.store.expire_idle, new.ref)),
        ("revoke", partial(bench.store.revoke, new.ref, reason="other")),
        ("revoke_owner", partial(bench.store.revoke_owner, new.ref.tag, new.owner, reason="other")),
        ("sweep", partial(bench.store.sweep, limit=100)),
    )
    for name, attempt in attempts:
        await attempt()
        agree(expect(Ended, await bench.load(new)).reason, "logout", f"reason after {name}")
        agree(await bench.handles_of("ann"), [], f"alive sessions after {name}")


async def check_logout_against_writers_at_once(bench: Bench) -> None:
    """Commits, touches, rotations and repeated creates run while the session is ended: none outlives it."""
    for _ in range(5):
        new = bench.new_session(fields={"a": "1"})
        created = await bench.created(new)
        activity = Activity(ref=new.ref, owner=new.owner, seen_us=created.now_us)
        calls: list[Callable[[], Coroutine[Any, Any, object]]] = []
        for n in range(6):
            store = bench.either(n)
            calls.append(partial(store.commit, new.ref, Changes(put={f"f{n}": "1"}), limits=WIDE))
            calls.append(partial(store.touch, [activity]))
            calls.append(partial(store.load, new.ref, new.digest))
        calls.append(
            partial(
                bench.other.rotate_id,
                new.ref,
                old_digest=new.digest,
                new_digest=bench.digest(),
                sealed=b"s",
                alias_us=MINUTE_US,
            )
        )
        calls.insert(bench.below(12), partial(bench.store.revoke, new.ref, reason="logout"))
        answers = await bench.gather(calls)
        ended = [each for each in answers if isinstance(each, Revoked)]
        agree([each.ended for each in ended], [True], "the revoke ended it")
        for store in (bench.store, bench.other):
            agree(expect(Ended, await store.load(new.ref, new.digest)).reason, "logout", "reason")
        expect(Gone, await bench.put(new.ref, "a", "2"))
        agree(await bench.handles_of("ann"), [], "alive sessions")


async def check_expire_idle_reads_the_last_activity_again(bench: Bench) -> None:
    """A node that thinks a session is idle is told that another one saw it; nothing ends."""
    new = bench.new_session(idle_us=10 * MINUTE_US)
    created = (await bench.created(new)).session
    seen = created.created_us + 9 * MINUTE_US
    await bench.move_to(seen)
    await bench.other.touch([Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
    bench.advance(5 * MINUTE_US)
    agree(expect(Alive, await bench.store.expire_idle(new.ref)).seen_us, seen, "last activity")
    expect(Live, await bench.load(new))


async def check_expire_idle_ends_at_the_microsecond(bench: Bench) -> None:
    """It ends what is over, from the very moment of the deadline, and leaves a tombstone."""
    new = bench.new_session(idle_us=10 * MINUTE_US)
    created = (await bench.created(new)).session

    def alive(answer: object) -> bool:
        if isinstance(answer, Gone):
            agree(answer.reason, "idle_timeout", "reason")
        else:
            expect(Alive, answer)
        return isinstance(answer, Alive)

    deadline = created.created_us + 10 * MINUTE_US
    await bench.across(deadline, lambda: bench.store.expire_idle(new.ref), before=alive)
    agree(expect(Ended, await bench.other.load(new.ref, new.digest)).reason, "idle_timeout", "reason")
    agree(expect(Gone, await bench.store.expire_idle(new.ref)).reason, "idle_timeout", "reason, asked again")
    agree((await bench.store.revoke(new.ref, reason="logout")).ended, False, "a later revoke ended it")


async def check_expire_idle_ends_what_is_too_old(bench: Bench) -> None:
    """A session past its absolute deadline is ended for that reason."""
    new = bench.new_session(idle_us=HOUR_US, absolute_us=HOUR_US)
    created = (await bench.created(new)).session
    await bench.move_to(created.created_us + HOUR_US)
    agree(expect(Gone, await bench.store.expire_idle(new.ref)).reason, "absolute_timeout", "reason")


async def check_a_tombstone_outlives_late_requests(bench: Bench) -> None:
    """For 24 hours the reason is answered, however often the store is swept; then nothing lives under the id."""
    new = bench.new_session()
    await bench.created(new)
    revoked = await bench.store.revoke(new.ref, reason="logout")
    await bench.move_to(revoked.now_us + TOMBSTONE_US - 10_000_000)
    await _sweep_all(bench)
    agree(expect(Ended, await bench.load(new)).reason, "logout", "reason just before the tombstone may go")
    expect(Gone, await bench.put(new.ref, "a", "1"))
    bench.advance(DAY_US)
    await _sweep_all(bench)
    hold(not isinstance(await bench.load(new), Live), "an ended session is never live")
    expect(Gone, await bench.put(new.ref, "a", "1"))
    agree(await bench.handles_of("ann"), [], "alive sessions")


async def check_a_tombstone_lasts_until_the_absolute_deadline(bench: Bench) -> None:
    """Where the absolute deadline comes before 24 hours the tombstone stays until then."""
    new = bench.new_session(absolute_us=HOUR_US)
    created = (await bench.created(new)).session
    await bench.store.revoke(new.ref, reason="logout")
    await bench.move_to(created.absolute_us - 10_000_000)
    await _sweep_all(bench)
    agree(expect(Ended, await bench.load(new)).reason, "logout", "reason before the absolute deadline")
    await bench.move_to(created.absolute_us)
    hold(not isinstance(await bench.load(new), Live), "an ended session is never live")


async def check_revoke_owner_ends_every_session_of_a_subject(bench: Bench) -> None:
    """All of one subject, none of another, not those that had ended before."""
    mine = [bench.new_session() for _ in range(5)]
    theirs = bench.new_session("bob")
    for each in [*mine, theirs]:
        await bench.created(each)
    await bench.store.revoke(mine[0].ref, reason="logout")
    answer = await _revoke_owner(bench)
    agree(set(answer.ended), {each.ref for each in mine[1:]}, "sessions that this call ended")
    agree(expect(Ended, await bench.load(mine[0])).reason, "logout", "reason of the one that had ended before")
    for each in mine[1:]:
        agree(expect(Ended, await bench.load(each)).reason, "password changed", "reason")
        agree(expect(Gone, await bench.put(each.ref, "a", "1")).reason, "password changed", "commit")
    expect(Live, await bench.load(theirs))
    agree(await bench.handles_of("ann"), [], "alive sessions")
    agree((await _revoke_owner(bench)).ended, (), "sessions that a second call ended")


async def check_revoke_owner_keeps_one(bench: Bench) -> None:
    """`keep` lives on in every verb, under its old time of creation."""
    kept, other = bench.new_session(), bench.new_session()
    await bench.created(kept)
    await bench.created(other)
    answer = await _revoke_owner(bench, keep=kept)
    agree(answer.ended, (other.ref,), "sessions that this call ended")
    expect(Live, await bench.load(kept))
    expect(Committed, await bench.put(kept.ref, "a", "1"))
    bench.advance(MINUTE_US)
    now = await bench.store.ping()
    await bench.store.touch([Activity(ref=kept.ref, owner=kept.owner, seen_us=now)])
    agree(expect(Live, await bench.other.load(kept.ref, kept.digest)).seen_us, now, "last activity")
    agree(expect(Alive, await bench.store.expire_idle(kept.ref)).seen_us, now, "last activity")
    agree(await bench.handles_of("ann"), [kept.ref.handle], "alive sessions")
    rotated = await bench.store.rotate_id(
        kept.ref, old_digest=kept.digest, new_digest=bench.digest(), sealed=b"s", alias_us=0, authority="{}"
    )
    expect(Rotated, rotated)
    agree((await _revoke_owner(bench)).ended, (kept.ref,), "sessions that a call without keep ended")


async def check_revoke_owner_changes_no_earlier_end(bench: Bench) -> None:
    """Sessions that were idle or too old before the call keep that reason, the one that is to be kept included."""
    idle = [bench.new_session(idle_us=5 * MINUTE_US) for _ in range(2)]
    old = bench.new_session(idle_us=HOUR_US, absolute_us=9 * MINUTE_US)
    alive = bench.new_session(idle_us=HOUR_US)
    for each in (*idle, old, alive):
        await bench.created(each)
    bench.advance(10 * MINUTE_US)
    agree((await _revoke_owner(bench, keep=idle[0])).ended, (alive.ref,), "sessions that this call ended")
    agree((await _revoke_owner(bench)).ended, (), "sessions that a second call ended")
    for each, reason in ((idle[0], "idle_timeout"), (idle[1], "idle_timeout"), (old, "absolute_timeout")):
        agree(expect(Gone, await bench.put(each.ref, "a", "1")).reason, reason, "commit")
        agree(expect(Gone, await bench.store.expire_idle(each.ref)).reason, reason, "expire_idle")
        agree(expect(Ended, await bench.load(each)).reason, reason, "reason")
    agree(expect(Ended, await bench.load(alive)).reason, "password changed", "reason")


async def check_a_session_after_the_cut_is_dated_after_it(bench: Bench) -> None:
    """Signing in right after `revoke_owner`, in the same microsecond even, works; the next cut ends that too."""
    for _ in range(3):
        old, new = bench.new_session(), bench.new_session()
        await bench.store.create(old)
        cut = await _revoke_owner(bench)
        expect(Ended, await bench.load(old))
        created = await bench.other.create(new)
        hold(created.session.created_us > cut.now_us, "a session after the cut is created after it")
        expect(Live, await bench.load(new))
        agree(await bench.handles_of("ann"), [new.ref.handle], "alive sessions")
        agree((await _revoke_owner(bench)).ended, (new.ref,), "sessions that the next cut ended")
        expect(Ended, await bench.load(new))


async def check_a_clock_that_steps_back_lets_nobody_through(bench: Bench) -> None:
    """The store's clock is set back after a cut: what is created then is dated after every cut all the same."""
    cut = await _revoke_owner(bench)
    bench.clock.offset_us -= MINUTE_US
    for _ in range(2):
        new = bench.new_session()
        created = await bench.other.create(new)
        hold(created.session.created_us > cut.now_us, "a session after the cut is created after it")
        expect(Live, await bench.load(new))
        agree((await _revoke_owner(bench)).ended, (new.ref,), "sessions that the next cut ended")
        expect(Ended, await bench.load(new))


async def check_revoke_owner_against_creates_at_once(bench: Bench) -> None:
    """No sign-in slips through: what is not dated after the cut is never answered alive again."""
    before = [bench.new_session() for _ in range(10)]
    during = [bench.new_session() for _ in range(60)]
    for each in before:
        await bench.store.create(each)
    revoke = partial(bench.store.revoke_owner, tag_of("ann"), before[0].owner, reason="password changed")
    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
        partial(bench.either(n).create, new) for n, new in enumerate(during)
    ]
    calls.insert(30, revoke)
    answers = await bench.gather(calls)
    (cut,) = (each.now_us for each in answers if isinstance(each, RevokedMany))
    made = [each.session for each in answers if isinstance(each, Created)]
    agree(len(made), len(during), "sessions that were created")
    for new in before:
        expect(Ended, await bench.load(new))
    alive: set[str] = set()
    for session in made:
        loaded = await bench.other.load(session.ref, session.digest)
        if isinstance(loaded, Live):
            hold(session.created_us > cut, f"created at {session.created_us}, alive after the cut at {cut}")
            alive.add(session.ref.handle)
        else:
            agree(expect(Ended, loaded).reason, "password changed", "reason")
    agree(set(await bench.handles_of("ann")), alive, "alive sessions")
    agree({ref.handle for ref in (await _revoke_owner(bench)).ended}, alive, "sessions that the next cut ended")


async def check_revoke_owner_repeated_at_once(bench: Bench) -> None:
    """Of simultaneous calls each session is ended by exactly one."""
    sessions = [bench.new_session() for _ in range(12)]
    for each in sessions:
        await bench.created(each)
    calls = [
        partial(bench.either(n).revoke_owner, tag_of("ann"), sessions[0].owner, reason=f"reason {n}") for n in range(8)
    ]
    answers = await bench.gather(calls)
    ended = [(ref, n) for n, each in enumerate(answers) for ref in each.ended]
    agree(sorted(ref.handle for ref, _ in ended), sorted(s.ref.handle for s in sessions), "ended sessions")
    by_handle = {each.ref: each for each in sessions}
    for ref, number in ended:
        loaded: Loaded = await bench.load(by_handle[ref])
        agree(expect(Ended, loaded).reason, f"reason {number}", "reason")


async def check_a_live_session_is_not_ended_for_being_old(bench: Bench) -> None:
    """A cut of one subject does not reach the sessions of another with the same tag."""
    ann = bench.new_session()
    twin = bench.new_session("bob")
    twin = NewSession(
        **{name: getattr(twin, name) for name in NewSession.__dataclass_fields__ if name != "ref"},
        ref=type(ann.ref)(ann.ref.tag, twin.ref.handle),
    )
    await bench.created(ann)
    await bench.created(twin)
    agree((await _revoke_owner(bench)).ended, (ann.ref,), "sessions that this call ended")
    expect(Live, await bench.load(twin))


async def _revoke_owner(bench: Bench, *, keep: NewSession | None = None) -> RevokedMany:
    owner = bench.new_session().owner
    return await bench.store.revoke_owner(
        tag_of("ann"), owner, reason="password changed", keep=None if keep is None else keep.ref
    )


async def _sweep_all(bench: Bench) -> None:
    for _ in range(10_000):
        removed = await bench.store.sweep(limit=50)
        hold(0 <= removed <= 50, "sweep removes at most as many as it was told")
        if removed == 0:
            return
    hold(False, "sweeping comes to an end")


CHECKS: Final = (
    check_revoke_ends_once_and_keeps_the_first_reason,
    check_one_of_many_revokes_ended_it,
    check_nothing_brings_an_ended_session_back,
    check_logout_against_writers_at_once,
    check_expire_idle_reads_the_last_activity_again,
    check_expire_idle_ends_at_the_microsecond,
    check_expire_idle_ends_what_is_too_old,
    check_a_tombstone_outlives_late_requests,
    check_a_tombstone_lasts_until_the_absolute_deadline,
    check_revoke_owner_ends_every_session_of_a_subject,
    check_revoke_owner_keeps_one,
    check_revoke_owner_changes_no_earlier_end,
    check_a_session_after_the_cut_is_dated_after_it,
    check_a_clock_that_steps_back_lets_nobody_through,
    check_revoke_owner_against_creates_at_once,
    check_revoke_owner_repeated_at_once,
    check_a_live_session_is_not_ended_for_being_old,
)
