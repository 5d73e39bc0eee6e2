"""Checks of what a store is: its keys, its clock, its closing and opening, cancelled calls and hostile bytes."""

from __future__ import annotations

from functools import partial
from typing import Final

from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.ports import Absent, Activity, Changes, Committed, Ended, Gone, Live, Unreadable
from coatcheck.core.session import SECOND_US
from coatcheck.stores.conformance.bench import HOUR_US, MINUTE_US, WIDE, Bench, agree, expect, hold

HOSTILE_BYTES: Final = (
    b"",
    b"\x00",
    b"\xff\xfe\x80",
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b"{" * 2000,
    b"[" * 100_000,
    b'{"schema":1}',
    b'{"schema":999,"version":"x","digest":null}',
    b"1e999999",
    b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
    b"cos\nsystem\n(S'id'\ntR.",
    b"\xc1" * 64,
)


async def check_id_keys_have_one_winner(bench: Bench) -> None:
    """Of twenty first callers at once one candidate wins, everybody receives it, and it never changes."""
    candidates = [IdKeys(bench.draw(32), bench.draw(32)) for _ in range(20)]
    calls = [partial(bench.either(n).id_keys, each) for n, each in enumerate(candidates)]
    answers = await bench.gather(calls)
    agree(len({each.pack() for each in answers}), 1, "different keys")
    hold(answers[0] in candidates, "the keys are one of the candidates")
    later = IdKeys(b"\x00" * 32, b"\xff" * 32)
    for store in (bench.store, bench.other):
        hold(await store.id_keys(later) == answers[0], "later candidates change nothing")


async def check_the_local_key_is_made_once(bench: Bench) -> None:
    """An embedded store keeps the first key it is given; a store without one says so every time."""
    first = await bench.store.local_key(b"1" * 32)
    for store, candidate in ((bench.store, b"2"), (bench.other, b"3")):
        agree(await store.local_key(candidate * 32) == first, True, "the key stays the same")
    hold(first is None or len(first) == 32, "a local key has 32 bytes")


async def check_the_clock_follows_its_lever(bench: Bench) -> None:
    """Tests can move the store's clock, and every answer carries it, in microseconds."""
    new = bench.new_session()
    await bench.created(new)
    early = await bench.store.ping()
    bench.advance(HOUR_US // 2)
    for store in (bench.store, bench.other):
        live = expect(Live, await store.load(new.ref, new.digest))
        for now in (await store.ping(), live.now_us):
            hold(0 <= now - early - HOUR_US // 2 < 30 * SECOND_US, f"{now} is half an hour after {early}")


async def check_colour_and_name_are_told(bench: Bench) -> None:
    """Both openings of a store agree about its colour and about who else sees it."""
    agree(bench.other.colour, bench.store.colour, "colour")
    agree(bench.other.shared, bench.store.shared, "shared")
    hold(bench.store is not bench.other or not bench.store.shared, "a shared store is opened twice")


async def check_opening_again_is_safe(bench: Bench) -> None:
    """Opening an open store changes nothing; closing twice is fine; a store that is opened again goes on."""
    new = bench.new_session()
    keys = await bench.store.id_keys(IdKeys(b"a" * 32, b"b" * 32))
    await bench.created(new)
    await bench.store.revoke(new.ref, reason="logout")
    other = bench.new_session()
    await bench.created(other)
    await bench.store.open()
    expect(Live, await bench.load(other))
    await bench.store.close()
    await bench.store.close()
    await bench.store.open()
    expect(Live, await bench.load(other))
    agree(expect(Ended, await bench.load(new)).reason, "logout", "reason after opening again")
    hold(await bench.store.id_keys(IdKeys(b"c" * 32, b"d" * 32)) == keys, "the keys of ids outlive a restart")


async def check_a_cancelled_call_leaves_answers_in_step(bench: Bench) -> None:
    """A caller that goes away mid-call must not leave its answer to the next one."""
    sessions = [bench.new_session(f"user-{n}", fields={"me": f'"{n}"'}) for n in range(12)]
    for each in sessions:
        await bench.created(each)
    for turns in range(24):
        new = sessions[turns % 12]
        store = bench.either(turns)
        await bench.interrupted(partial(store.load, new.ref, new.digest), turns=turns)
        write = partial(store.commit, new.ref, Changes(put={"you": "1"}), limits=WIDE)
        await bench.interrupted(write, turns=turns)
        for number, each in enumerate(sessions[:4]):
            live = expect(Live, await store.load(each.ref, each.digest))
            agree(live.session.fields["me"], f'"{number}"', "the answer belongs to the question")


async def check_hostile_bytes_are_nobody(bench: Bench) -> None:
    """Bytes in the store that are no session: no exception, no session, no harm to the neighbours (R13)."""
    corrupt = bench.corrupt
    if corrupt is None:
        raise NotImplementedError("this store keeps no bytes: leave NEEDS_BYTES out")
    neighbour = bench.new_session()
    await bench.created(neighbour)
    for raw in HOSTILE_BYTES:
        new = bench.new_session()
        created = await bench.created(new)
        await corrupt(new.ref, raw)
        what = f"bytes {raw[:20]!r}"
        for answer in (await bench.load(new), await bench.other.load(new.ref, "")):
            hold(isinstance(answer, Unreadable), f"{what} are unreadable, not {answer!r}")
        expect(Gone, await bench.put(new.ref, "a", "1"))
        rotated = await bench.store.rotate_id(
            new.ref, old_digest=new.digest, new_digest=bench.digest(), sealed=b"s", alias_us=MINUTE_US
        )
        expect(Gone, rotated)
        await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=created.now_us)])
        expect(Gone, await bench.store.expire_idle(new.ref))
        agree(await bench.handles_of("ann"), [neighbour.ref.handle], f"alive sessions beside {what}")
        page = await bench.store.scan(after=None, limit=1000)
        agree([each.session.ref for each in page.sessions], [neighbour.ref], f"scan beside {what}")
        await bench.store.revoke(new.ref, reason="logout")
        after = await bench.load(new)
        hold(isinstance(after, (Ended, Unreadable, Absent)), f"{what} after a revoke: {after!r}")
    await bench.store.revoke_owner(neighbour.ref.tag, neighbour.owner, reason="logout")
    await bench.store.sweep(limit=1000)
    expect(Ended, await bench.load(neighbour))


async def check_hostile_bytes_do_not_stop_a_sign_in(bench: Bench) -> None:
    """Somebody with an unreadable session can still sign in under a limit, and be signed out everywhere."""
    corrupt = bench.corrupt
    if corrupt is None:
        raise NotImplementedError("this store keeps no bytes: leave NEEDS_BYTES out")
    broken, new = bench.new_session(), bench.new_session()
    await bench.created(broken)
    await corrupt(broken.ref, b"\xff\x00")
    await bench.store.admit(new, maximum=1, on_limit="evict_oldest", supersedes=SessionRef(new.ref.tag, "A" * 16))
    expect(Live, await bench.load(new))
    expect(Committed, await bench.put(new.ref, "a", "1"))
    await bench.store.revoke_owner(new.ref.tag, new.owner, reason="logout")
    expect(Ended, await bench.load(new))


CHECKS: Final = (
    check_id_keys_have_one_winner,
    check_the_local_key_is_made_once,
    check_the_clock_follows_its_lever,
    check_colour_and_name_are_told,
    check_opening_again_is_safe,
    check_a_cancelled_call_leaves_answers_in_step,
    check_hostile_bytes_are_nobody,
    check_hostile_bytes_do_not_stop_a_sign_in,
)
NEEDS_BYTES: Final = frozenset((check_hostile_bytes_are_nobody, check_hostile_bytes_do_not_stop_a_sign_in))
