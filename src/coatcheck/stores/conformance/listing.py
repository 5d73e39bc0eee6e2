"""Checks of `list_by_owner`, `scan` and `sweep`: complete, in order, never the dead, and harmless."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from coatcheck.core.ports import Absent, Activity, Ended, Gone, Live
from coatcheck.core.session import NewSession
from coatcheck.errors import ValueRefused
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

HOSTILE_CURSORS: Final = (
    "",
    " ",
    "nonsense!",
    "\x00",
    "\ud800",
    "é",
    "-1",
    "٣",
    "'; DROP TABLE session; --",
    "{}*:\r\n",
    "../../etc/passwd",
    "A" * 5000,
)


async def check_a_list_is_oldest_first_page_by_page(bench: Bench) -> None:
    """Every alive session once, in order of creation, whatever the size of a page."""
    sessions = [bench.new_session() for _ in range(7)]
    for each in sessions:
        await bench.created(each)
    await bench.created(bench.new_session("bob"))
    wanted = [each.ref.handle for each in sessions]
    for limit in (1, 3, 6, 7, 8, 100):
        agree(await bench.handles_of("ann", limit=limit), wanted, f"handles in pages of {limit}")


async def check_a_list_shows_sessions_as_they_are(bench: Bench) -> None:
    """Fields, version and last activity in a list are those that `load` answers."""
    new = bench.new_session(fields={"a": "1"})
    created = (await bench.created(new)).session
    bench.advance(MINUTE_US)
    await bench.put(new.ref, "b", '"☃"')
    seen = created.created_us + MINUTE_US // 2
    await bench.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=seen)])
    live = expect(Live, await bench.load(new))
    (listed,) = await bench.alive_of("ann")
    agree((listed.session, listed.seen_us), (live.session, seen), "the session in the list")
    (scanned,) = (await bench.store.scan(after=None, limit=10)).sessions
    agree((scanned.session, scanned.seen_us), (live.session, seen), "the session in the scan")


async def check_sessions_of_one_moment_are_all_listed(bench: Bench) -> None:
    """Paging loses and repeats nobody where many sessions were created at the same time."""
    sessions = [bench.new_session() for _ in range(30)]
    await bench.gather([partial(bench.either(n).create, new) for n, new in enumerate(sessions)])
    wanted = sorted(each.ref.handle for each in sessions)
    for limit in (1, 7, 30):
        agree(sorted(await bench.handles_of("ann", limit=limit)), wanted, f"handles in pages of {limit}")


async def check_lists_never_show_the_dead(bench: Bench) -> None:
    """After many ends of every kind the index holds exactly the living (R14)."""
    kinds: dict[str, list[NewSession]] = {"alive": [], "idle": [], "old": [], "revoked": [], "evicted": []}
    for kind in ["evicted"] * 8 + ["idle", "old", "revoked", "alive"] * 8:
        new = bench.new_session(
            idle_us=HOUR_US if kind == "idle" else 20 * HOUR_US,
            absolute_us=2 * HOUR_US if kind == "old" else 30 * DAY_US,
        )
        kinds[kind].append(new)
        await bench.created(new)
    for each in kinds["revoked"]:
        await bench.store.revoke(each.ref, reason="logout")
    for each in kinds["evicted"]:
        newest = bench.new_session(idle_us=20 * HOUR_US)
        now_alive = len(await bench.handles_of("ann"))
        admitted = await bench.store.admit(newest, maximum=now_alive, on_limit="evict_oldest")
        bench.advance(1000)
        agree(getattr(admitted, "evicted", None), (each.ref,), "sessions that gave way")
        kinds["alive"].append(newest)
    bench.advance(2 * HOUR_US)
    for each in kinds["idle"][:4]:
        expect(Gone, await bench.store.expire_idle(each.ref))
    wanted = sorted(each.ref.handle for each in kinds["alive"])
    agree(sorted(await bench.handles_of("ann", limit=3)), wanted, "handles in the list")
    agree(sorted(await _scan_all(bench, limit=5)), wanted, "handles in the scan")
    await bench.store.sweep(limit=1000)
    agree(sorted(await bench.handles_of("ann")), wanted, "handles in the list after a sweep")


async def check_a_list_of_nobody_is_empty(bench: Bench) -> None:
    """A subject without sessions has one empty page."""
    nobody = bench.new_session("nobody")
    page = await bench.store.list_by_owner(nobody.ref.tag, nobody.owner, after=None, limit=10)
    agree((page.sessions, page.cursor), ((), None), "page")
    agree(await _scan_all(bench, limit=10), [], "handles in the scan of an empty store")


async def check_bad_cursors_are_refused(bench: Bench) -> None:
    """What this store never gave is refused as a value, whatever it is made of."""
    new = bench.new_session()
    await bench.created(new)
    for cursor in HOSTILE_CURSORS:
        for name, page in (
            ("list_by_owner", bench.store.list_by_owner(tag_of("ann"), new.owner, after=cursor, limit=10)),
            ("scan", bench.store.scan(after=cursor, limit=10)),
        ):
            try:
                answer: object = await page
            except ValueRefused:
                continue
            raise ContractBroken(f"{name} took the cursor {cursor[:30]!r}: {answer!r}")


async def check_a_scan_finds_everybody(bench: Bench) -> None:
    """Sessions of all owners and of none, in small pages, while others come and go."""
    stayers = [bench.new_session(f"user-{n}" if n % 3 else None) for n in range(57)]
    leavers = [bench.new_session(f"user-{n}") for n in range(10)]
    await bench.gather([partial(bench.either(n).create, new) for n, new in enumerate([*stayers, *leavers])])
    for each in leavers[:5]:
        await bench.store.revoke(each.ref, reason="logout")
    dead = {each.ref.handle for each in leavers[:5]}
    found: list[str] = []
    after: str | None = None
    for round_number in range(10_000):
        page = await bench.other.scan(after=after, limit=7)
        hold(len(page.sessions) <= 7, "a page holds at most as many as it was told")
        found.extend(each.session.ref.handle for each in page.sessions)
        if round_number < 8:
            await bench.created(bench.new_session(f"late-{round_number}"))
            await bench.store.revoke(leavers[5 + round_number % 5].ref, reason="logout")
        after = page.cursor
        if after is None:
            break
    missing = {each.ref.handle for each in stayers} - set(found)
    agree(missing, set(), "sessions that were alive throughout and not found")
    agree(dead & set(found), set(), "ended sessions in the scan")


async def check_a_scan_beside_creates_at_once(bench: Bench) -> None:
    """Pages read while sessions are created miss none that was there before."""
    stayers = [bench.new_session(f"user-{n}") for n in range(30)]
    for each in stayers:
        await bench.created(each)
    coming = [bench.new_session(f"user-{n}") for n in range(30)]
    scans: list[list[str]] = []

    async def scan() -> object:
        scans.append(await _scan_all(bench, limit=4))
        return None

    async def create(number: int) -> object:
        return await bench.either(number).create(coming[number])

    calls: list[Callable[[], Coroutine[Any, Any, object]]] = [scan, *(partial(create, n) for n in range(30)), scan]
    await bench.gather(calls)
    for found in scans:
        agree({each.ref.handle for each in stayers} - set(found), set(), "sessions that were not found")


async def check_sweep_removes_only_what_decides_nothing(bench: Bench) -> None:
    """The alive, fresh tombstones and sessions that died a moment ago answer as before."""
    alive, ended, idle = bench.new_session(), bench.new_session(), bench.new_session(idle_us=MINUTE_US)
    kept = bench.new_session("bob")
    for each in (alive, ended, idle, kept):
        await bench.created(each)
    await bench.store.revoke(ended.ref, reason="logout")
    await bench.store.revoke_owner(kept.ref.tag, kept.owner, reason="password changed", keep=kept.ref)
    bench.advance(2 * MINUTE_US)
    for _ in range(3):
        removed = await bench.store.sweep(limit=1000)
        hold(0 <= removed <= 1000, "sweep says how many it removed")
    agree(expect(Live, await bench.load(alive)).session.version, 1, "version of the alive session")
    expect(Live, await bench.load(kept))
    agree(expect(Ended, await bench.load(ended)).reason, "logout", "reason of the ended session")
    agree(expect(Gone, await bench.put(idle.ref, "a", "1")).reason, "idle_timeout", "reason of the idle session")
    agree(await bench.handles_of("ann"), [alive.ref.handle], "alive sessions")


async def check_sweep_comes_to_an_end(bench: Bench) -> None:
    """After every deadline small sweeps clear everything that is over, and spare the one that is not."""
    over = [bench.new_session(f"user-{n}", idle_us=HOUR_US, absolute_us=3 * HOUR_US) for n in range(20)]
    alive = bench.new_session(idle_us=20 * DAY_US)
    for each in [*over, alive]:
        await bench.created(each)
    for each in over[:10]:
        await bench.store.revoke(each.ref, reason="logout")
    bench.advance(2 * DAY_US)
    for _ in range(1000):
        removed = await bench.store.sweep(limit=3)
        hold(0 <= removed <= 3, "sweep removes at most as many as it was told")
        if removed == 0:
            break
    else:
        raise ContractBroken("sweeping comes to an end")
    for each in over:
        loaded = await bench.load(each)
        # A store whose own clock removes records may keep them until then; what it answers must be the end.
        hold(isinstance(loaded, (Absent, Ended, Live)), f"a session that is over: {loaded!r}")
        expect(Gone, await bench.put(each.ref, "a", "1"))
    expect(Live, await bench.load(alive))
    agree(await _scan_all(bench, limit=10), [alive.ref.handle], "handles in the scan")


async def _scan_all(bench: Bench, *, limit: int) -> list[str]:
    found: list[str] = []
    after: str | None = None
    for _ in range(10_000):
        page = await bench.store.scan(after=after, limit=limit)
        hold(len(page.sessions) <= limit, f"a page holds at most {limit} sessions")
        found.extend(each.session.ref.handle for each in page.sessions)
        after = page.cursor
        if after is None:
            return found
    raise ContractBroken("a scan must come to an end")


CHECKS: Final = (
    check_a_list_is_oldest_first_page_by_page,
    check_a_list_shows_sessions_as_they_are,
    check_sessions_of_one_moment_are_all_listed,
    check_lists_never_show_the_dead,
    check_a_list_of_nobody_is_empty,
    check_bad_cursors_are_refused,
    check_a_scan_finds_everybody,
    check_a_scan_beside_creates_at_once,
    check_sweep_removes_only_what_decides_nothing,
    check_sweep_comes_to_an_end,
)
