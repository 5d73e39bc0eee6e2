"""Checks of `commit` and `touch`: writes merge, limits are exact, and nothing is ever written to the dead."""

from __future__ import annotations

from functools import partial
from typing import Final

from coatcheck.core.ports import (
    Absent,
    Activity,
    Changes,
    Committed,
    Conflict,
    Ended,
    Gone,
    Live,
    Oversized,
    RecordLimits,
)
from coatcheck.stores.conformance.bench import HOUR_US, MINUTE_US, WIDE, Bench, agree, expect


async def check_two_writers_of_different_fields_both_survive(bench: Bench) -> None:
    """Twenty requests at once, each writing its own field: nothing is lost (R1)."""
    new = bench.new_session(fields={"kept": '"☃"'})
    await bench.created(new)
    calls = [partial(bench.either(n).commit, new.ref, Changes(put={f"f{n}": str(n)}), limits=WIDE) for n in range(20)]
    versions = sorted(expect(Committed, each).version for each in await bench.gather(calls))
    agree(versions, list(range(2, 22)), "versions, each given once")
    session = expect(Live, await bench.load(new)).session
    agree(dict(session.fields), {"kept": '"☃"'} | {f"f{n}": str(n) for n in range(20)}, "fields")
    agree(session.version, 21, "version")


async def check_a_slow_reader_undoes_nothing(bench: Bench) -> None:
    """A request that read before a write and writes nothing leaves the write alone (R2)."""
    new = bench.new_session(fields={"a": "1"})
    await bench.created(new)
    expect(Live, await bench.other.load(new.ref, new.digest))
    expect(Committed, await bench.put(new.ref, "a", "2"))
    now = await bench.store.ping()
    await bench.other.touch([Activity(ref=new.ref, owner=new.owner, seen_us=now)])
    session = expect(Live, await bench.load(new)).session
    agree((dict(session.fields), session.version), ({"a": "2"}, 2), "fields and version")


async def check_the_last_writer_of_a_field_wins(bench: Bench) -> None:
    """Without `expected` nobody is refused; the field holds the later value, on both nodes."""
    new = bench.new_session()
    await bench.created(new)
    for number in range(4):
        store = bench.either(number)
        answer = await store.commit(new.ref, Changes(put={"a": str(number)}), limits=WIDE)
        agree(expect(Committed, answer).version, number + 2, "version")
    agree(dict(expect(Live, await bench.load(new)).session.fields), {"a": "3"}, "fields")


async def check_commit_puts_and_deletes_only_what_it_names(bench: Bench) -> None:
    """Named fields change; deleting what is not there is fine; owner, times and digest stay."""
    new = bench.new_session(fields={"a": "1", "b": "2", "{c}:*": "3", "ü": "4"})
    created = await bench.created(new)
    bench.advance(MINUTE_US)
    changes = Changes(put={"b": "20", "d": '"\\u2603☃"'}, delete=frozenset({"a", "ü", "never"}))
    expect(Committed, await bench.store.commit(new.ref, changes, limits=WIDE))
    live = expect(Live, await bench.load(new))
    agree(dict(live.session.fields), {"b": "20", "{c}:*": "3", "d": '"\\u2603☃"'}, "fields")
    before = created.session
    for name in ("ref", "digest", "owner", "subject", "created_us", "auth_us", "absolute_us", "authority"):
        agree(getattr(live.session, name), getattr(before, name), name)
    agree(live.seen_us, before.created_us, "last activity, which only touch moves")


async def check_commit_can_empty_a_record(bench: Bench) -> None:
    """A session without a field is a session."""
    new = bench.new_session(fields={"a": "1"})
    await bench.created(new)
    expect(Committed, await bench.store.commit(new.ref, Changes(delete=frozenset({"a"})), limits=WIDE))
    agree(dict(expect(Live, await bench.load(new)).session.fields), {}, "fields")
    expect(Committed, await bench.put(new.ref, "b", "1"))
    agree(dict(expect(Live, await bench.load(new)).session.fields), {"b": "1"}, "fields")


async def check_commit_never_creates(bench: Bench) -> None:
    """A write to a session that never was leaves no trace."""
    ghost = bench.new_session()
    agree(expect(Gone, await bench.put(ghost.ref, "a", "1")).reason, "unknown", "reason")
    agree(expect(Absent, await bench.load(ghost)).why, "unknown", "the session that never was")


async def check_a_late_commit_leaves_no_ghost(bench: Bench) -> None:
    """A slow writer against a logout: the session stays ended and nothing of the write is kept (R3)."""
    new = bench.new_session()
    await bench.created(new)
    await bench.store.revoke(new.ref, reason="logout")
    agree(expect(Gone, await bench.put(new.ref, "a", "1")).reason, "logout", "reason")
    answer = await bench.other.commit(new.ref, Changes(put={"a": "1"}), limits=WIDE, expected=1)
    agree(expect(Gone, answer).reason, "logout", "reason, with a version expected")
    agree(expect(Ended, await bench.load(new)).reason, "logout", "reason")
    agree(await bench.handles_of("ann"), [], "alive sessions")


async def check_expected_version_is_exact(bench: Bench) -> None:
    """Only the very version is written over; the answer names the one that is there."""
    new = bench.new_session(fields={"a": "1"})
    await bench.created(new)
    for wrong in (0, 2, 3):
        answer = await bench.store.commit(new.ref, Changes(put={"a": "9"}), limits=WIDE, expected=wrong)
        agree(expect(Conflict, answer).version, 1, "version in the conflict")
    answer = await bench.store.commit(new.ref, Changes(put={"a": "2"}), limits=WIDE, expected=1)
    agree(expect(Committed, answer).version, 2, "version")
    session = expect(Live, await bench.load(new)).session
    agree((dict(session.fields), session.version), ({"a": "2"}, 2), "fields and version")


async def check_one_of_many_with_the_same_expectation_wins(bench: Bench) -> None:
    """Compare and set: of twenty at once exactly one writes, and the record is that one's."""
    new = bench.new_session()
    await bench.created(new)
    calls = [
        partial(bench.either(n).commit, new.ref, Changes(put={f"f{n}": "1"}), limits=WIDE, expected=1)
        for n in range(20)
    ]
    answers = await bench.gather(calls)
    winners = [n for n, each in enumerate(answers) if isinstance(each, Committed)]
    agree(len(winners), 1, "winners")
    for number, each in enumerate(answers):
        if number not in winners:
            agree(expect(Conflict, each).version, 2, "version in the conflict")
    session = expect(Live, await bench.load(new)).session
    agree((dict(session.fields), session.version), ({f"f{winners[0]}": "1"}, 2), "fields and version")


async def check_octet_limit_is_exact(bench: Bench) -> None:
    """Names and encoded values count in octets of UTF-8, all fields together, after the merge."""
    # 1 + 3 octets are there; the name has 2 octets, so the value fits with exactly 14.
    new = bench.new_session(fields={"a": '"x"'})
    await bench.created(new)
    limits = RecordLimits(octets=20, fields=10)
    longer = Changes(put={"é": '"' + "ü" * 6 + 'x"'})
    expect(Oversized, await bench.store.commit(new.ref, longer, limits=limits))
    session = expect(Live, await bench.load(new)).session
    agree((dict(session.fields), session.version), ({"a": '"x"'}, 1), "fields and version after a refusal")
    expect(Committed, await bench.store.commit(new.ref, Changes(put={"é": '"' + "ü" * 6 + '"'}), limits=limits))
    expect(Oversized, await bench.store.commit(new.ref, Changes(put={"b": ""}), limits=limits))
    swapped = Changes(put={"b": '"y"'}, delete=frozenset({"a"}))
    expect(Committed, await bench.store.commit(new.ref, swapped, limits=limits))
    replaced = Changes(put={"b": '"y"'})
    expect(Committed, await bench.store.commit(new.ref, replaced, limits=limits))


async def check_field_limit_is_exact(bench: Bench) -> None:
    """At the limit a field may be replaced or exchanged, not added."""
    new = bench.new_session(fields={"a": "1", "b": "1"})
    await bench.created(new)
    limits = RecordLimits(octets=1000, fields=3)
    expect(Committed, await bench.store.commit(new.ref, Changes(put={"c": "1"}), limits=limits))
    expect(Oversized, await bench.store.commit(new.ref, Changes(put={"d": "1"}), limits=limits))
    expect(Committed, await bench.store.commit(new.ref, Changes(put={"a": "2"}), limits=limits))
    exchanged = Changes(put={"d": "1"}, delete=frozenset({"a"}))
    expect(Committed, await bench.store.commit(new.ref, exchanged, limits=limits))
    agree(dict(expect(Live, await bench.load(new)).session.fields), {"b": "1", "c": "1", "d": "1"}, "fields")


async def check_limits_hold_when_writers_meet(bench: Bench) -> None:
    """Twenty writers of one field each under a limit of five fields: five get in."""
    new = bench.new_session()
    await bench.created(new)
    limits = RecordLimits(octets=1000, fields=5)
    calls = [partial(bench.either(n).commit, new.ref, Changes(put={f"f{n}": "1"}), limits=limits) for n in range(20)]
    answers = await bench.gather(calls)
    agree(sum(isinstance(each, Committed) for each in answers), 5, "writers that got in")
    agree(sum(isinstance(each, Oversized) for each in answers), 15, "writers that were refused")
    agree(len(expect(Live, await bench.load(new)).session.fields), 5, "fields")


async def check_touch_moves_forward_only(bench: Bench) -> None:
    """An older time changes nothing; the record and its version stay as they are."""
    new = bench.new_session()
    created = (await bench.created(new)).session
    bench.advance(10 * MINUTE_US)
    for minutes, wanted in ((5, 5), (3, 5), (5, 5), (6, 6), (-1, 6)):
        seen = created.created_us + minutes * MINUTE_US
        await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
        live = expect(Live, await bench.other.load(new.ref, new.digest))
        agree(live.seen_us, created.created_us + wanted * MINUTE_US, f"last activity after touching {minutes}")
        agree(live.session, created, "the record")


async def check_touch_never_passes_the_stores_clock(bench: Bench) -> None:
    """A node whose clock is ahead cannot prolong a session: activity counts at most as now."""
    new = bench.new_session(idle_us=HOUR_US)
    await bench.created(new)
    bench.advance(MINUTE_US)
    early = await bench.store.ping()
    await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=early + 10 * HOUR_US)])
    live = expect(Live, await bench.load(new))
    agree(early <= live.seen_us <= live.now_us, True, f"last activity {live.seen_us} is the time of the touch")


async def check_touch_takes_a_batch(bench: Bench) -> None:
    """Each session of a batch for itself: the dead and the unknown among them do no harm."""
    sessions = [bench.new_session(subject) for subject in ("ann", "bob", None, "cid")]
    for each in sessions:
        await bench.created(each)
    await bench.store.revoke(sessions[1].ref, reason="logout")
    never = bench.new_session("dan")
    bench.advance(MINUTE_US)
    now = await bench.store.ping()
    await bench.store.touch([Activity(ref=s.ref, owner=s.owner, seen_us=now) for s in [*sessions, never]])
    await bench.store.touch([])
    for each in (sessions[0], sessions[2], sessions[3]):
        agree(expect(Live, await bench.load(each)).seen_us, now, "last activity")
    agree(expect(Ended, await bench.load(sessions[1])).reason, "logout", "reason")
    expect(Absent, await bench.load(never))


async def check_touches_at_once_keep_the_latest(bench: Bench) -> None:
    """Of simultaneous touches the latest time stays, whichever arrives last."""
    new = bench.new_session()
    await bench.created(new)
    bench.advance(MINUTE_US)
    now = await bench.store.ping()
    times = [now - 1000 * n for n in range(20)]
    times.sort(key=lambda _: bench.draw(8))
    calls = [
        partial(bench.either(n).touch, [Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
        for n, seen in enumerate(times)
    ]
    await bench.gather(calls)
    agree(expect(Live, await bench.load(new)).seen_us, now, "last activity")


CHECKS: Final = (
    check_two_writers_of_different_fields_both_survive,
    check_a_slow_reader_undoes_nothing,
    check_the_last_writer_of_a_field_wins,
    check_commit_puts_and_deletes_only_what_it_names,
    check_commit_can_empty_a_record,
    check_commit_never_creates,
    check_a_late_commit_leaves_no_ghost,
    check_expected_version_is_exact,
    check_one_of_many_with_the_same_expectation_wins,
    check_octet_limit_is_exact,
    check_field_limit_is_exact,
    check_limits_hold_when_writers_meet,
    check_touch_moves_forward_only,
    check_touch_never_passes_the_stores_clock,
    check_touch_takes_a_batch,
    check_touches_at_once_keep_the_latest,
)
