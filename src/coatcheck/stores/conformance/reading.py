"""Checks of `load` and of the two deadlines: what is answered, and until which microsecond."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from dataclasses import replace
from typing import Final

from coatcheck.core.ids import group_of
from coatcheck.core.near_session import unpack
from coatcheck.core.ports import Absent, Activity, Changes, Committed, Ended, Gone, Live, Loaded
from coatcheck.core.session import cause_of_death
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.conformance.bench import HOUR_US, MINUTE_US, WIDE, Bench, agree, expect, hold


async def check_an_unknown_id_is_absent_and_never_adopted(bench: Bench) -> None:
    """A planted id is not somebody's session, before and after every verb was tried on it (R5)."""
    planted = bench.new_session()
    agree(expect(Absent, await bench.load(planted)).why, "unknown", "an id that never was")
    agree(expect(Gone, await bench.put(planted.ref, "a", "1")).reason, "unknown", "commit")
    await bench.store.touch([Activity(ref=planted.ref, owner=planted.owner, seen_us=await bench.store.ping())])
    rotated = await bench.store.rotate_id(
        planted.ref, old_digest=planted.digest, new_digest=bench.digest(), sealed=b"s", alias_us=MINUTE_US
    )
    agree(expect(Gone, rotated).reason, "unknown", "rotate_id")
    agree(expect(Gone, await bench.store.expire_idle(planted.ref)).reason, "unknown", "expire_idle")
    agree((await bench.store.revoke(planted.ref, reason="logout")).ended, False, "revoke ended it")
    agree(expect(Absent, await bench.load(planted)).why, "unknown", "an id that never was, afterwards")
    agree(await bench.handles_of("ann"), [], "alive sessions")
    agree((await bench.store.scan(after=None, limit=100)).sessions, (), "sessions of everybody")


async def check_another_secret_does_not_open_a_session(bench: Bench) -> None:
    """The handle is public; without the digest of the current id the answer holds nothing of the session."""
    new = bench.new_session()
    await bench.created(new)
    for digest in (bench.digest(), "", new.digest[:-1], new.digest + "A", new.digest.lower()):
        agree(
            expect(Absent, await bench.store.load(new.ref, digest)).why,
            "replaced",
            f"load by digest {digest!r}",
        )


async def check_an_ended_session_is_answered_whatever_the_digest(bench: Bench) -> None:
    """A tombstone tells its reason and time to the holder of any id of the session."""
    new = bench.new_session()
    created = await bench.created(new)
    revoked = await bench.store.revoke(new.ref, reason="logout")
    for digest in (new.digest, bench.digest()):
        ended = expect(Ended, await bench.other.load(new.ref, digest))
        agree(ended.reason, "logout", "reason")
        hold(created.now_us <= ended.at_us <= revoked.now_us, "a tombstone carries the time of the end")


async def check_load_writes_nothing(bench: Bench) -> None:
    """Readers change neither version nor last activity nor fields, so they can undo nobody's write (R2, R4)."""
    new = bench.new_session(fields={"a": "1"})
    created = await bench.created(new)
    bench.advance(10 * MINUTE_US)
    for _ in range(5):
        live = expect(Live, await bench.load(new))
        agree(live.session, created.session, "the record")
        agree(live.seen_us, created.session.created_us, "last activity")


async def check_peek_knows_nothing_wrong(bench: Bench) -> None:
    """`peek` may not know; what it knows is what `load` answers, and never an ended session."""
    new = bench.new_session()
    value = group_of(new.ref.tag) + new.ref.handle.encode("ascii") + urlsafe_b64encode(bench.draw(32) + b"=")
    new = replace(new, digest=sha256_text(value))
    await bench.created(new)
    for _ in range(2):
        known = bench.store.peek(value)
        found = expect(Live, await bench.load(new)).session
        hold(known is None or unpack(known, new.ref.handle) == found, "peek agrees with load")
    agree(bench.store.peek(value[:-4] + b"AAAA"), None, "peek with another secret")
    await bench.store.revoke(new.ref, reason="logout")
    agree(bench.store.peek(value), None, "peek after this store's own revoke")


async def check_idle_timeout_to_the_microsecond(bench: Bench) -> None:
    """Alive until the last microsecond before `seen + idle`, ended at it."""
    new = bench.new_session(idle_us=10 * MINUTE_US)
    created = await bench.created(new)
    await _ends_at(bench, created.session.created_us + 10 * MINUTE_US, new.ref.handle, "idle_timeout")


async def check_idle_timeout_counts_from_the_last_activity(bench: Bench) -> None:
    """A touch moves the idle deadline by as much as it moved the last activity."""
    new = bench.new_session(idle_us=10 * MINUTE_US)
    created = await bench.created(new)
    seen = created.session.created_us + 4 * MINUTE_US
    await bench.move_to(created.session.created_us + 9 * MINUTE_US)
    await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
    await _ends_at(bench, seen + 10 * MINUTE_US, new.ref.handle, "idle_timeout")


async def check_absolute_timeout_to_the_microsecond(bench: Bench) -> None:
    """The absolute deadline comes however much the session is used."""
    new = bench.new_session(idle_us=HOUR_US, absolute_us=HOUR_US)
    created = await bench.created(new)
    await bench.move_to(created.session.created_us + 30 * MINUTE_US)
    seen = created.session.created_us + 30 * MINUTE_US
    await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
    await _ends_at(bench, created.session.created_us + HOUR_US, new.ref.handle, "absolute_timeout")


async def check_load_lets_the_caller_judge(bench: Bench) -> None:
    """A record past its idle timeout is still read, with all that is needed to see that it is over."""
    new = bench.new_session(idle_us=10 * MINUTE_US)
    created = await bench.created(new)

    def alive(answer: Loaded) -> bool:
        live = expect(Live, answer)
        return cause_of_death(live.session, seen_us=live.seen_us, now_us=live.now_us) is None

    deadline = created.session.created_us + 10 * MINUTE_US
    await bench.across(deadline, lambda: bench.load(new), before=alive)


async def _ends_at(bench: Bench, deadline_us: int, handle: str, reason: str) -> None:
    """The only session of `ann` dies at this moment in every verb that cares; dead, it is in no list."""
    (seen,) = await bench.alive_of("ann")
    session = seen.session
    agree(session.ref.handle, handle, "the alive session")
    tag, owner = session.ref.tag, session.owner

    def committed(answer: object) -> bool:
        if isinstance(answer, Gone):
            agree(answer.reason, reason, "reason")
        else:
            expect(Committed, answer)
        return isinstance(answer, Committed)

    await bench.across(
        deadline_us,
        lambda: bench.store.commit(session.ref, Changes(put={"a": "1"}), limits=WIDE),
        before=committed,
    )
    agree((await bench.store.list_by_owner(tag, owner, after=None, limit=10)).sessions, (), "list_by_owner")
    agree((await bench.store.scan(after=None, limit=10)).sessions, (), "scan")
    rotated = await bench.store.rotate_id(
        session.ref, old_digest=session.digest, new_digest=bench.digest(), sealed=b"s", alias_us=MINUTE_US
    )
    agree(expect(Gone, rotated).reason, reason, "rotate_id")
    await bench.store.touch([Activity(ref=session.ref, owner=owner, seen_us=deadline_us)])
    agree(expect(Gone, await bench.put(session.ref, "a", "2")).reason, reason, "commit after a late touch")
    revoked = await bench.store.revoke(session.ref, reason="logout")
    agree(revoked.ended, False, "revoke ended it")
    agree(expect(Gone, await bench.put(session.ref, "a", "2")).reason, reason, "commit after a late revoke")
    agree(expect(Gone, await bench.store.expire_idle(session.ref)).reason, reason, "expire_idle")
    agree(expect(Ended, await bench.other.load(session.ref, session.digest)).reason, reason, "reason on record")


CHECKS: Final = (
    check_an_unknown_id_is_absent_and_never_adopted,
    check_another_secret_does_not_open_a_session,
    check_an_ended_session_is_answered_whatever_the_digest,
    check_load_writes_nothing,
    check_peek_knows_nothing_wrong,
    check_idle_timeout_to_the_microsecond,
    check_idle_timeout_counts_from_the_last_activity,
    check_absolute_timeout_to_the_microsecond,
    check_load_lets_the_caller_judge,
)
