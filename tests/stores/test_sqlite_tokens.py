"""Tokens in the SQLite file beyond the contract: what stays at rest, hostile rows, one step or none, kill -9."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    REASON_REUSED,
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
    Live,
    PositionLost,
    RefreshOutcome,
    Standing,
    WrongHolder,
    session_denial_id,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.stores.conformance import Clock
from coatcheck.stores.migrations import COMPONENT_STORE, load_migrations
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite import SqliteStore
from coatcheck.stores.sqlite.migrations import apply_sqlite
from coatcheck.stores.sqlite.statements import FAMILY_COLUMNS
from coatcheck.system import REAL
from tests.stores.test_sqlite import DAY_US, HOSTILE, HOUR_US, Desk, new_session

GRACE_US = 30 * SECOND_US
SEALED = b"sealed-successor-of-a-token"


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    path, clock = tmp_path / "sessions.db", Clock()
    if request.param == "blocking":
        yield Desk(colour="blocking", path=path, clock=clock, run=run_blocking)
        return
    with asyncio.Runner() as runner:
        yield Desk(colour="async", path=path, clock=clock, run=runner.run)


def token(number: int) -> str:
    """The digest of one generation's token."""
    return f"digest-of-refresh-token-number-{number:012d}"


def new_family(session: NewSession | None, number: int = 0, **more: Any) -> NewFamily:
    name = urlsafe_b64encode(number.to_bytes(6, "big")).decode()
    if session is None:
        ref = FamilyRef(7, urlsafe_b64encode(number.to_bytes(12, "little")).decode(), name, of_session=False)
    else:
        ref = FamilyRef(session.ref.tag, session.ref.handle, name)
    values: dict[str, Any] = {
        "ref": ref,
        "digest": token(1),
        "owner": "o" * 43,
        "subject": "subject-text",
        "client": "",
        "key": "",
        "grant": '{"scope":"grant-text"}',
        "idle_us": 10 * DAY_US,
        "absolute_us": 20 * DAY_US,
    }
    return NewFamily(**{**values, **more})


def present(desk: Desk, store: SqliteStore, family: NewFamily, generation: int, **more: Any) -> RefreshOutcome:
    """Present the genuine token of a generation."""
    values: dict[str, Any] = {
        "generation": generation,
        "digest": token(generation),
        "successor": token(generation + 1),
        "sealed": SEALED,
        "grace_us": GRACE_US,
        "client": family.client,
        "key": family.key,
    }
    outcome: RefreshOutcome = desk.run(store.rotate_refresh(family.ref, **{**values, **more}))
    return outcome


def begun(desk: Desk, store: SqliteStore, session: NewSession | None, number: int = 0, **more: Any) -> NewFamily:
    """A family whose first token is older than the grace."""
    family = new_family(session, number, **more)
    assert isinstance(desk.run(store.create_family(family)), FamilyCreated)
    desk.clock.offset_us += GRACE_US
    return family


def signed_in(desk: Desk, store: SqliteStore, number: int = 0, **more: Any) -> NewSession:
    new = new_session(number, **more)
    desk.run(store.create(new))
    return new


def families(desk: Desk) -> int:
    (count,) = desk.sql("select count(*) from coatcheck_families")[0]
    return int(count)


# -- the file ------------------------------------------------------------------------------------------------------


def test_a_file_of_the_first_release_gets_the_tables_and_keeps_its_sessions(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.run(store.close())
    for table in ("families", "denials", "ring"):
        desk.sql(f"drop table coatcheck_{table}")
    desk.sql("delete from coatcheck_migrations where number > 1")
    desk.run(store.open())
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
    assert isinstance(desk.run(store.create_family(new_family(new))), FamilyCreated)
    desk.run(store.close())


def test_the_tables_can_be_made_by_hand_in_another_name_space(tmp_path: Path) -> None:
    migrations = load_migrations("coatcheck.stores", "sqlite")
    with closing(sqlite3.connect(tmp_path / "m.db", isolation_level=None)) as connection:
        for namespace in ("one", "two"):
            apply_sqlite(connection, migrations, component=COMPONENT_STORE, namespace=namespace, now_us=1)
        connection.execute("insert into two_denials (kind, id, until_us, not_before_us) values ('a','',9,0)")
        # Each log counts its own entries.
        assert connection.execute("select name, seq from sqlite_sequence").fetchall() == [("two_denials", 1)]


def test_every_write_about_tokens_survives_a_power_loss(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    levels: list[int] = []
    write = store._driver.write

    async def watched(work: Callable[[sqlite3.Connection], Any], *, durable: bool = True) -> Any:
        def seen(connection: sqlite3.Connection) -> Any:
            levels.append(connection.execute("pragma synchronous").fetchall()[0][0])
            return work(connection)

        return await write(seen, durable=durable)

    desk.run(store.sweep(limit=10))
    monkeypatch.setattr(store._driver, "write", watched)
    family = begun(desk, store, session)
    assert isinstance(present(desk, store, family, 1), FamilyRotated)
    assert isinstance(present(desk, store, family, 2), FamilyKept)
    desk.run(store.deny(0, Denial(kind="all", id="", until_us=2**60, not_before_us=1)))
    assert desk.run(store.write_ring(b"ring", expected=0))
    desk.run(store.revoke(session.ref, reason="logout", deny_us=1))
    assert levels == [2] * 6
    desk.run(store.close())


# -- what must not stay --------------------------------------------------------------------------------------------


def test_an_ended_session_leaves_nothing_of_its_families_in_the_file(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    family = begun(desk, store, session)
    present(desk, store, family, 1)
    desk.run(store.close())
    held = (token(1), token(2), SEALED.decode(), "grant-text", "subject-text")
    before = desk.path.read_bytes()
    assert [text for text in held if text.encode() not in before] == []
    desk.run(store.open())
    desk.run(store.revoke(session.ref, reason="logout"))
    desk.run(store.close())
    after = desk.path.read_bytes()
    assert [text for text in held if text.encode() in after] == []


def test_a_reused_family_that_goes_on_as_a_tombstone_holds_no_token(desk: Desk) -> None:
    store = desk.opened()
    family = begun(desk, store, signed_in(desk, store), client="a third party")
    present(desk, store, family, 1)
    desk.clock.offset_us += GRACE_US
    assert isinstance(present(desk, store, family, 1, successor="another"), FamilyReused)
    desk.run(store.close())
    after = desk.path.read_bytes()
    held = (token(1), token(2), SEALED.decode(), "grant-text", "subject-text")
    assert [text for text in held if text.encode() in after] == []
    desk.run(store.open())
    ended = present(desk, store, family, 2)
    assert isinstance(ended, FamilyEnded)
    assert ended.reason == REASON_REUSED
    assert isinstance(present(desk, store, family, 2, client="somebody else"), WrongHolder)
    desk.run(store.close())


def test_a_sealed_successor_is_erased_when_it_was_used(desk: Desk) -> None:
    store = desk.opened()
    family = begun(desk, store, signed_in(desk, store))
    present(desk, store, family, 1)
    replayed = present(desk, store, family, 1, successor="another")
    assert isinstance(replayed, FamilyReplayed)
    assert replayed.sealed == SEALED
    assert isinstance(present(desk, store, family, 2), FamilyKept)
    assert desk.sql("select sealed from coatcheck_families") == [(None,)]
    replayed = present(desk, store, family, 1, successor="another")
    assert isinstance(replayed, FamilyReplayed)
    assert replayed.sealed is None
    desk.run(store.close())
    assert SEALED not in desk.path.read_bytes()


def test_a_sweep_erases_every_sealed_successor_at_the_end_of_its_grace_whatever_its_limit(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    made = [begun(desk, store, session, number) for number in range(3)]
    for family in made:
        assert isinstance(present(desk, store, family, 1), FamilyRotated)
    last = desk.run(store.ping()) + GRACE_US
    desk.clock.offset_us += GRACE_US - 1
    assert desk.run(store.sweep(limit=1)) == 0
    assert desk.sql("select count(*) from coatcheck_families where sealed is not null") == [(3,)]
    desk.clock.offset_us += 1
    assert desk.run(store.ping()) == last
    assert desk.run(store.sweep(limit=1)) == 0
    assert desk.sql("select count(*) from coatcheck_families where sealed is not null") == [(0,)]
    desk.run(store.close())
    assert SEALED not in desk.path.read_bytes()


def test_without_a_grace_no_successor_is_kept_for_a_moment(desk: Desk) -> None:
    store = desk.opened()
    family = begun(desk, store, signed_in(desk, store))
    assert isinstance(present(desk, store, family, 1, grace_us=0), FamilyRotated)
    assert desk.sql("select sealed from coatcheck_families") == [(None,)]
    desk.run(store.close())


@pytest.mark.parametrize("end", ["revoke", "revoke_owner", "expire_idle", "late revoke", "evict", "supersede", "reuse"])
def test_whatever_ends_a_session_removes_its_families_in_the_same_step(desk: Desk, end: str) -> None:
    store = desk.opened()
    session, other = signed_in(desk, store, 1), signed_in(desk, store, 2, owner="p" * 43)
    for number in range(3):
        begun(desk, store, session, number)
    spared = begun(desk, store, other)
    before = desk.run(store.denials(after=None, limit=10)).position
    if end in ("late revoke", "expire_idle"):
        desk.clock.offset_us += HOUR_US
    match end:
        case "revoke" | "late revoke":
            desk.run(store.revoke(session.ref, reason="logout", deny_us=HOUR_US))
        case "revoke_owner":
            desk.run(store.revoke_owner(7, session.owner, reason="logout", deny_us=HOUR_US))
        case "expire_idle":
            assert isinstance(desk.run(store.expire_idle(session.ref)), Gone)
        case "evict":
            desk.run(store.admit(new_session(3), maximum=1, on_limit="evict_oldest", deny_us=HOUR_US))
        case "supersede":
            new = new_session(3)
            desk.run(store.admit(new, maximum=1, on_limit="refuse", supersedes=session.ref, deny_us=HOUR_US))
        case _:
            family = new_family(session)
            assert isinstance(present(desk, store, family, 1), FamilyRotated)
            desk.clock.offset_us += GRACE_US
            reused = present(desk, store, family, 1, successor="another", deny_us=HOUR_US)
            assert isinstance(reused, FamilyReused)
            assert reused.session == session.ref
    assert isinstance(desk.run(store.load(session.ref, session.digest)), Ended)
    assert families(desk) == 1
    assert desk.sql("select root from coatcheck_families") == [(spared.ref.root.encode(),)]
    now = desk.run(store.ping())
    denied = Denial(kind="sid", id=session_denial_id(session.ref), until_us=now + HOUR_US)
    page = desk.run(store.denials(after=before, limit=10))
    assert page.entries == (() if end == "expire_idle" else (denied,))
    desk.run(store.close())


def test_a_session_that_a_sweep_removes_takes_its_families_along(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store, absolute_us=DAY_US)
    begun(desk, store, session, absolute_us=365 * DAY_US, idle_us=365 * DAY_US)
    desk.clock.offset_us += DAY_US
    assert desk.run(store.sweep(limit=1)) == 1
    assert families(desk) == 0
    desk.run(store.close())


def test_families_and_denials_that_are_over_are_swept_at_their_microsecond(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store, idle_us=90 * DAY_US, absolute_us=90 * DAY_US)
    used = begun(desk, store, session, 1, idle_us=DAY_US)
    start = desk.run(store.ping()) - GRACE_US
    begun(desk, store, session, 2, idle_us=DAY_US, client="a third party")
    begun(desk, store, None, 3, absolute_us=DAY_US + 2 * GRACE_US)
    assert isinstance(present(desk, store, used, 1), FamilyRotated)
    desk.run(store.revoke_owner(7, "o" * 43, reason="logout", keep=session.ref))
    desk.run(store.deny(0, Denial(kind="jti", id="a", until_us=start + DAY_US)))

    def left(moment: int) -> tuple[int, int, int]:
        desk.clock.offset_us += moment - desk.run(store.ping())
        removed = desk.run(store.sweep(limit=100))
        return removed, families(desk), desk.sql("select count(*) from coatcheck_denials")[0][0]

    # Rotation has put the first one off; the entry of the list decides nothing any more.
    assert left(start + DAY_US - 1) == (0, 3, 1)
    assert left(start + DAY_US) == (1, 3, 0)
    assert left(start + DAY_US + GRACE_US - 1) == (0, 3, 0)
    assert left(start + DAY_US + GRACE_US) == (1, 2, 0)
    # Both the rotated one and the one that was ended by the cut, which is kept as long as it would have lived.
    assert left(start + DAY_US + 3 * GRACE_US - 1) == (0, 2, 0)
    assert left(start + DAY_US + 3 * GRACE_US) == (1, 1, 0)
    assert left(start + DAY_US + 4 * GRACE_US) == (1, 0, 0)
    assert isinstance(desk.run(store.load(session.ref, session.digest)), Live)
    desk.run(store.close())


def test_a_sweep_in_many_batches_keeps_to_its_limit(desk: Desk) -> None:
    store = desk.opened()
    until = desk.run(store.ping()) + 1
    for number in range(7):
        desk.run(store.deny(0, Denial(kind="jti", id=f"{number}", until_us=until)))
        desk.run(store.create_family(new_family(None, number, idle_us=1)))
    desk.clock.offset_us += 1
    # Five of each kind went at a time.
    assert [desk.run(store.sweep(limit=5)) for _ in range(3)] == [5, 4, 0]
    desk.run(store.close())


def test_many_sessions_that_are_over_do_not_keep_families_and_denials_from_being_swept(desk: Desk) -> None:
    store = desk.opened()
    until = desk.run(store.ping()) + SECOND_US
    for number in range(12):
        signed_in(desk, store, number, absolute_us=SECOND_US)
    for number in range(3):
        desk.run(store.create_family(new_family(None, number, idle_us=1)))
        desk.run(store.deny(0, Denial(kind="jti", id=f"{number}", until_us=until)))
    desk.clock.offset_us += SECOND_US
    assert desk.run(store.sweep(limit=4)) == 4
    assert desk.sql("select count(*) from coatcheck_sessions") == [(8,)]
    assert families(desk) == 0
    assert desk.sql("select count(*) from coatcheck_denials") == [(0,)]
    assert [desk.run(store.sweep(limit=4)) for _ in range(3)] == [4, 4, 0]
    desk.run(store.close())


def test_a_sweep_looks_at_more_rate_limits_than_one_batch(desk: Desk) -> None:
    store = desk.opened()
    for number in range(450):
        desk.sql("insert into coatcheck_rate_limits values (?, 0)", f"{number:043d}")
    desk.run(store.sweep(limit=500))
    assert desk.sql("select count(*) from coatcheck_rate_limits") == [(0,)]
    desk.run(store.close())


# -- families ------------------------------------------------------------------------------------------------------


def test_a_repeated_creation_answers_alike_while_its_token_is_current_and_drops_nobody(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    made = [new_family(session, number) for number in range(MAX_FAMILIES)]
    first = [desk.run(store.create_family(each)) for each in made]
    desk.clock.offset_us += GRACE_US
    assert [desk.run(store.create_family(each)).family for each in made] == [each.family for each in first]
    assert isinstance(present(desk, store, made[0], 1), FamilyRotated)
    assert families(desk) == MAX_FAMILIES
    rotated = desk.run(store.create_family(new_family(session, MAX_FAMILIES)))
    assert isinstance(rotated, FamilyCreated)
    # All are of one age: the name decides. However recently it was used, the first one goes.
    assert isinstance(present(desk, store, made[0], 2), FamilyUnknown)
    assert families(desk) == MAX_FAMILIES
    desk.run(store.close())


def test_a_creation_that_comes_again_after_its_token_was_exchanged_or_ended_is_refused(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    rotated, ended = begun(desk, store, session, 1), begun(desk, store, None, 2)
    assert isinstance(present(desk, store, rotated, 1), FamilyRotated)
    desk.run(store.revoke_owner(7, ended.owner, reason="logout", keep=session.ref))
    for family in (rotated, ended):
        with pytest.raises(StoreUnavailable, match="random source"):
            desk.run(store.create_family(family))
    assert isinstance(present(desk, store, rotated, 2), FamilyKept)
    desk.run(store.close())


def test_a_family_too_many_drops_those_that_are_over_before_a_live_one(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    live = begun(desk, store, session, 99)
    made = [begun(desk, store, session, number, idle_us=HOUR_US // 2) for number in range(MAX_FAMILIES - 2)]
    stolen = begun(desk, store, session, 98, client="a third party")
    assert isinstance(present(desk, store, stolen, 1, grace_us=0), FamilyRotated)
    assert isinstance(present(desk, store, stolen, 1, successor="another"), FamilyReused)
    last = desk.run(store.create_family(made[-1])).family.rotated_us + HOUR_US // 2
    desk.clock.offset_us += last - 1 - desk.run(store.ping())
    desk.run(store.create_family(new_family(session, 200)))
    # At the last microsecond of its idle time the youngest of them lives; the others and the ended one are gone.
    names = {name for (name,) in desk.sql("select name from coatcheck_families")}
    kept = (live, made[-1], new_family(session, 200))
    assert names == {each.ref.name.encode() for each in kept}
    for number in range(300, 300 + MAX_FAMILIES - 3):
        desk.run(store.create_family(new_family(session, number)))
    desk.clock.offset_us += 1
    desk.run(store.create_family(new_family(session, 400)))
    assert isinstance(present(desk, store, made[-1], 1), FamilyUnknown)
    assert isinstance(present(desk, store, live, 1), FamilyRotated)
    desk.run(store.close())


def test_a_family_made_in_the_microsecond_of_a_cut_falls_to_the_next_cut(desk: Desk) -> None:
    store = desk.opened()
    for number in range(3):
        desk.run(store.revoke_owner(7, "o" * 43, reason=f"cut {number}"))
        family = new_family(None, number)
        created = desk.run(store.create_family(family)).family
        assert created.created_us == desk.run(store.ping()) + 1 + number
        assert isinstance(present(desk, store, family, 1, grace_us=HOUR_US), FamilyKept)
    desk.run(store.revoke_owner(7, "o" * 43, reason="the last cut"))
    answers = [present(desk, store, new_family(None, number), 1) for number in range(3)]
    now = desk.run(store.ping())
    reasons = ("cut 1", "cut 2", "the last cut")
    assert answers == [FamilyEnded(reason=reason, at_us=now, now_us=now) for reason in reasons]
    desk.run(store.close())


def test_a_family_that_stands_alone_is_no_family_of_a_session_with_that_handle(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    alone = begun(desk, store, None, ref=FamilyRef(7, session.ref.handle, "samename", of_session=False))
    bound = begun(desk, store, session, ref=FamilyRef(7, session.ref.handle, "samename"), digest=token(5))
    desk.run(store.revoke(session.ref, reason="logout"))
    assert isinstance(present(desk, store, bound, 1, digest=token(5)), FamilyEnded)
    assert isinstance(present(desk, store, alone, 1), FamilyRotated)
    desk.run(store.close())


# -- one step or none ----------------------------------------------------------------------------------------------


def test_a_revoke_whose_denial_cannot_be_written_ends_nothing(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    family = begun(desk, store, session)
    assert isinstance(present(desk, store, family, 1), FamilyRotated)
    desk.clock.offset_us += GRACE_US
    desk.sql("create trigger full before insert on coatcheck_denials begin select raise(abort, 'no room'); end")
    attempts: tuple[Callable[[], object], ...] = (
        lambda: desk.run(store.revoke(session.ref, reason="logout", deny_us=1)),
        lambda: desk.run(store.revoke_owner(7, session.owner, reason="logout", deny_us=1)),
        lambda: desk.run(store.admit(new_session(3), maximum=1, on_limit="evict_oldest", deny_us=1)),
        lambda: present(desk, store, family, 1, successor="another", deny_us=1),
    )
    for attempt in attempts:
        with pytest.raises(StoreUnavailable, match="no room"):
            attempt()
    assert isinstance(desk.run(store.load(session.ref, session.digest)), Live)
    assert isinstance(present(desk, store, family, 2), FamilyRotated)
    desk.sql("drop trigger full")
    assert desk.run(store.revoke(session.ref, reason="logout", deny_us=1)).ended
    desk.run(store.close())


# -- the log -------------------------------------------------------------------------------------------------------


def test_a_position_is_never_given_out_twice_even_when_the_log_is_empty_again(desk: Desk) -> None:
    store = desk.opened()
    empty = desk.run(store.denials(after=None, limit=10))
    assert (empty.entries, empty.position, empty.more) == ((), "0", False)
    now = desk.run(store.ping())
    until = now + 10
    # Of one microsecond: each is numbered after the one before, the first with the time.
    for name in "abc":
        desk.run(store.deny(0, Denial(kind="kid", id=name, until_us=until)))
    end = str(now + 2)
    desk.clock.offset_us += 10
    assert desk.run(store.sweep(limit=10)) == 3
    desk.run(store.close())
    desk.run(store.open())
    after = desk.run(store.denials(after="0", limit=10))
    assert (after.entries, after.position) == ((), end)
    late = Denial(kind="kid", id="d", until_us=until + 10)
    # A clock that was set back numbers on.
    desk.clock.offset_us -= HOUR_US
    desk.run(store.deny(0, late))
    for position in ("0", "1", end, empty.position):
        page = desk.run(store.denials(after=position, limit=10))
        assert (page.entries, page.position) == ((late,), str(now + 3))
    assert isinstance(desk.run(store.denials(after=str(now + 4), limit=10)), PositionLost)
    desk.run(store.close())


@pytest.mark.parametrize("after", ["", "-1", "+1", "01", "1.0", " 1", "1\n", "٣", "x", "1" * 19, "9" * 5000, "1-1"])
def test_other_positions_are_lost_and_raise_nothing(desk: Desk, after: str) -> None:
    store = desk.opened()
    desk.run(store.deny(0, Denial(kind="kid", id="a", until_us=2**60)))
    assert isinstance(desk.run(store.denials(after=after, limit=10)), PositionLost)
    desk.run(store.close())


def test_the_same_entry_again_makes_the_log_no_longer_and_a_later_one_does(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    for _ in range(3):
        desk.run(store.revoke(session.ref, reason="logout", deny_us=HOUR_US))
    assert len(desk.run(store.denials(after=None, limit=10)).entries) == 1
    desk.clock.offset_us += 1
    desk.run(store.revoke(session.ref, reason="logout", deny_us=HOUR_US))
    first, second = desk.run(store.denials(after=None, limit=10)).entries
    assert second.until_us == first.until_us + 1
    desk.run(store.close())


def test_an_old_backup_put_back_is_noticed_by_who_has_read_further(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.deny(0, Denial(kind="kid", id="a", until_us=2**60)))
    desk.run(store.close())
    backup = desk.path.read_bytes()
    desk.run(store.open())
    desk.run(store.deny(0, Denial(kind="kid", id="b", until_us=2**60)))
    position = desk.run(store.denials(after=None, limit=10)).position
    desk.run(store.close())
    desk.path.write_bytes(backup)
    desk.run(store.open())
    assert isinstance(desk.run(store.denials(after=position, limit=10)), PositionLost)
    desk.run(store.close())


def test_what_is_denied_after_an_old_backup_was_put_back_lies_behind_every_position(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.deny(0, Denial(kind="kid", id="a", until_us=2**60)))
    behind = desk.run(store.denials(after=None, limit=10)).position
    desk.run(store.close())
    backup = desk.path.read_bytes()
    desk.run(store.open())
    for number in range(5):
        desk.run(store.deny(0, Denial(kind="kid", id=f"lost {number}", until_us=2**60)))
    ahead = desk.run(store.denials(after=None, limit=10)).position
    desk.run(store.close())
    desk.path.write_bytes(backup)
    # A restore takes longer than as many microseconds as there were entries.
    desk.clock.offset_us += SECOND_US
    desk.run(store.open())
    later = [Denial(kind="kid", id=f"new {number}", until_us=2**60) for number in range(2)]
    for each in later:
        desk.run(store.deny(0, each))
    for position in (ahead, behind):
        assert desk.run(store.denials(after=position, limit=10)).entries == tuple(later)
    desk.run(store.close())


def test_standing_tells_a_denied_token_from_an_ended_session(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    denied = desk.run(store.ping())
    desk.run(store.deny(7, Denial(kind="jti", id="a", until_us=denied + HOUR_US)))
    desk.clock.offset_us += 5
    now = desk.run(store.ping())
    assert desk.run(store.standing(session.ref, "a")) == Standing(why="denied", at_us=0, now_us=now)
    assert desk.run(store.standing(session.ref, "b")) == Standing(why=None, at_us=0, now_us=now)
    desk.clock.offset_us += HOUR_US - 5
    now = desk.run(store.ping())
    assert desk.run(store.standing(session.ref, "a")) == Standing(why="idle_timeout", at_us=now, now_us=now)
    desk.run(store.close())


# -- hostile texts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "é☃🦉", "'; drop table x; --"])
def test_any_text_names_a_client_a_key_or_a_token(desk: Desk, text: str) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    family = begun(desk, store, session, client=text, key=text)
    assert isinstance(present(desk, store, family, 1, client=text + "x"), WrongHolder)
    assert isinstance(present(desk, store, family, 1, key=""), WrongHolder)
    rotated = present(desk, store, family, 1)
    assert isinstance(rotated, FamilyRotated)
    assert (rotated.family.client, rotated.family.key) == (text, text)
    desk.run(store.deny(7, Denial(kind="jti", id=text, until_us=2**60)))
    assert desk.run(store.standing(session.ref, text)).why == "denied"
    desk.run(store.revoke(session.ref, reason=text))
    assert desk.run(store.standing(session.ref, "")).why == text
    desk.run(store.close())


def test_half_of_a_surrogate_pair_is_refused_and_writes_nothing(desk: Desk) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    family = begun(desk, store, session)
    bad = "a\ud800"
    attempts: tuple[Callable[[], object], ...] = (
        lambda: desk.run(store.create_family(new_family(session, 2, client=bad))),
        lambda: desk.run(store.deny(0, Denial(kind="sub", id=bad, until_us=2**60))),
        lambda: desk.run(store.standing(session.ref, bad)),
        lambda: desk.run(store.revoke(session.ref, reason=bad, deny_us=HOUR_US)),
        lambda: desk.run(store.revoke_owner(7, session.owner, reason=bad, deny_us=HOUR_US)),
    )
    for attempt in attempts:
        with pytest.raises(ValueRefused, match="surrogate"):
            attempt()
    # Nobody's family is of such a client or key.
    assert isinstance(present(desk, store, family, 1, client=bad), WrongHolder)
    assert isinstance(present(desk, store, family, 1, key=bad), WrongHolder)
    assert desk.run(store.denials(after=None, limit=10)).entries == ()
    assert isinstance(present(desk, store, family, 1), FamilyRotated)
    desk.run(store.close())


# -- hostile rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", [*FAMILY_COLUMNS, "due_us"])
def test_any_value_in_any_column_of_a_family_raises_nothing_and_stops_nobody(desk: Desk, column: str) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    neighbour = begun(desk, store, session, 1)
    # NULL is refused by most columns; text that is not UTF-8 cannot be bound, only made.
    for number, value in enumerate((*HOSTILE, "not UTF-8"), start=2):
        for owner in (session, None):
            family = begun(desk, store, owner, number, client="a third party")
            made = "cast(x'ff80' as text)" if value == "not UTF-8" else "?"
            statement = f"update coatcheck_families set {column} = {made} where name = ? and of_session = ?"
            values = [] if value == "not UTF-8" else [value]
            try:
                desk.sql(statement, *values, family.ref.name, int(family.ref.of_session))
            except sqlite3.IntegrityError:
                assert value is None
            for generation in (1, 2, 1, 0, 3):
                outcome = present(desk, store, family, generation)
                assert outcome.now_us == desk.run(store.ping()), value
            desk.run(store.revoke_owner(7, family.owner, reason="logout", keep=session.ref))
    assert isinstance(present(desk, store, neighbour, 1), FamilyRotated)
    desk.clock.offset_us += 60 * DAY_US
    while desk.run(store.sweep(limit=1000)):
        pass
    desk.run(store.close())


@pytest.mark.parametrize("column", ["kind", "id", "until_us", "not_before_us"])
def test_any_value_in_any_column_of_the_denylist_raises_nothing_and_hides_no_other_entry(
    desk: Desk, column: str
) -> None:
    store = desk.opened()
    session = signed_in(desk, store)
    after = None
    for number, value in enumerate((*HOSTILE, "not UTF-8")):
        damaged = Denial(kind="jti", id=f"d{number}", until_us=2**60)
        whole = Denial(kind="jti", id=f"w{number}", until_us=2**60)
        desk.run(store.deny(7, damaged))
        made = "cast(x'ff80' as text)" if value == "not UTF-8" else "?"
        values = [] if value == "not UTF-8" else [value]
        try:
            desk.sql(f"update coatcheck_denials set {column} = {made} where id = ?", *values, damaged.id)
        except sqlite3.IntegrityError:
            assert value is None
        desk.run(store.deny(7, whole))
        page = desk.run(store.denials(after=after, limit=10))
        assert page.entries[-1] == whole
        after = page.position
        assert desk.run(store.standing(session.ref, whole.id)).why == "denied"
        assert desk.run(store.standing(session.ref, damaged.id)).why in ("denied", None)
    # One entry a page: a damaged one is passed over, not met for ever.
    found: list[Denial] = []
    page = desk.run(store.denials(after=None, limit=1))
    while page.more:
        found += page.entries
        page = desk.run(store.denials(after=page.position, limit=1))
    found += page.entries
    assert [each.id for each in found if each.id.startswith("w")] == [f"w{n}" for n in range(len(HOSTILE) + 1)]
    desk.run(store.sweep(limit=1000))
    desk.run(store.close())


def test_a_log_whose_end_was_tampered_with_is_lost_and_raises_nothing(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.deny(0, Denial(kind="kid", id="a", until_us=2**60)))
    for value in ("x", -1, 2**63 - 1, None, b"\xff"):
        desk.sql("update sqlite_sequence set seq = ?", value)
        assert isinstance(desk.run(store.denials(after="1", limit=10)), PositionLost), value
        assert isinstance(desk.run(store.denials(after=None, limit=10)), DenialPage), value
    desk.run(store.close())


def test_a_damaged_ring_is_never_replaced_in_passing(desk: Desk) -> None:
    store = desk.opened()
    assert desk.run(store.read_ring()) is None
    assert desk.run(store.write_ring(b"first", expected=0))
    assert desk.run(store.read_ring()) == (1, b"first")
    for column, value in (("version", "x"), ("version", 0), ("packed", 7)):
        desk.sql(f"update coatcheck_ring set {column} = ?", value)
        with pytest.raises(StoreUnavailable, match="restore a backup"):
            desk.run(store.read_ring())
        assert not desk.run(store.write_ring(b"another", expected=0))
        desk.sql("update coatcheck_ring set version = 1, packed = x'00'")
    assert desk.run(store.read_ring()) == (1, b"\x00")
    desk.run(store.close())


def test_a_ring_has_at_most_256_kib_and_an_old_one_does_not_stay_in_the_file(desk: Desk) -> None:
    store = desk.opened()
    assert desk.run(store.write_ring(b"old sealed ring" * 10, expected=0))
    with pytest.raises(ValueRefused, match="262144"):
        desk.run(store.write_ring(b"x" * (256 * 1024 + 1), expected=1))
    assert desk.run(store.write_ring(b"x" * 256 * 1024, expected=1))
    assert desk.run(store.write_ring(b"new", expected=2))
    assert not desk.run(store.write_ring(b"newer", expected=2))
    assert desk.run(store.read_ring()) == (3, b"new")
    desk.run(store.close())
    assert b"old sealed ring" not in desk.path.read_bytes()


# -- other processes -----------------------------------------------------------------------------------------------

_PROCESS = """
import sys
from coatcheck.blocking import run_blocking as run
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Denial
from coatcheck.core.refresh_token import FamilyRef
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite import SqliteStore
from coatcheck.system import REAL

offset = 0
store = SqliteStore(sys.argv[1], StoreOptions(
    colour="blocking", waits=waits_of("blocking"), system=REAL, deadline=20, clock_offset_us=lambda: offset))
run(store.open())

def token(number):
    return f"digest-of-refresh-token-number-{number:012d}"

def rotate(ref, number, successor, grace_us):
    return run(store.rotate_refresh(ref, generation=number, digest=token(number), successor=successor,
        sealed=b"sealed " + successor.encode(), grace_us=grace_us, client="", key=""))
"""


def _start(desk: Desk, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS + then, f"sqlite:///{desk.path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _real(desk: Desk) -> SqliteStore:
    """A store on the machine's clock and the desk's offset, like the other process's."""
    options = StoreOptions(
        colour=desk.colour, waits=waits_of(desk.colour), system=REAL, deadline=20.0, clock_offset_us=desk.clock
    )
    store = SqliteStore(f"sqlite:///{desk.path}", options)
    desk.run(store.open())
    return store


def test_a_process_killed_between_rotations_leaves_the_old_or_the_new_token_working(desk: Desk) -> None:
    """Its clock goes on by one grace a rotation, so that each token is old enough to be exchanged."""
    store = _real(desk)
    for round_ in range(4):
        desk.clock.offset_us = 0
        session = signed_in(desk, store, round_, idle_us=900 * DAY_US, absolute_us=900 * DAY_US)
        family = new_family(session, idle_us=900 * DAY_US, absolute_us=900 * DAY_US)
        desk.run(store.create_family(family))
        writer = _start(
            desk,
            f"""
ref = FamilyRef(7, {family.ref.root!r}, {family.ref.name!r})
for number in range(1, 1_000_000):
    offset += {HOUR_US}
    assert type(rotate(ref, number, token(number + 1), {HOUR_US})).__name__ == "FamilyRotated"
    print(number + 1, flush=True)
""",
        )
        assert writer.stdout is not None
        told = 0
        for line in writer.stdout:
            # Read to the end: it goes on telling until the signal arrives.
            if line.endswith("\n"):
                told = int(line)
            if told == 20 + 17 * round_:
                writer.send_signal(signal.SIGKILL)
        _, complaint = writer.communicate(timeout=20)
        assert writer.returncode == -signal.SIGKILL, complaint
        # The time of the rotation that was cut off, if it had begun: `told` had been exchanged `told - 1` times.
        desk.clock.offset_us = told * HOUR_US
        answer = present(desk, store, family, told, successor=f"another {round_}", grace_us=HOUR_US)
        if isinstance(answer, FamilyReplayed):
            # It was written and never told: the holder of the old token learns the new one, and that works.
            assert answer.sealed == b"sealed " + token(told + 1).encode()
            assert isinstance(present(desk, store, family, told + 1, grace_us=HOUR_US), FamilyKept)
        else:
            assert isinstance(answer, FamilyRotated)
        assert answer.family.generation == told + 1
        assert isinstance(desk.run(store.load(session.ref, session.digest)), Live)
    desk.run(store.close())


def test_of_two_processes_with_one_token_exactly_one_rotates(desk: Desk) -> None:
    store = _real(desk)
    session = signed_in(desk, store)
    made = [new_family(session, number) for number in range(MAX_FAMILIES)]
    for family in made:
        desk.run(store.create_family(family))
    desk.clock.offset_us = HOUR_US // 2
    script = f"""
offset = {HOUR_US // 2}
sys.stdin.readline()
for name in {[each.ref.name for each in made]!r}:
    print(type(rotate(FamilyRef(7, {session.ref.handle!r}, name), 1, "%s" + name, {GRACE_US})).__name__)
"""
    others = [_start(desk, script % name) for name in "ab"]
    for each in others:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    mine = [type(present(desk, store, each, 1, successor=f"c{each.ref.name}")).__name__ for each in made]
    answers = [mine, *(each.communicate(timeout=60)[0].split() for each in others)]
    assert [each.returncode for each in others] == [0, 0]
    for three in zip(*answers, strict=True):
        assert sorted(three) == ["FamilyReplayed", "FamilyReplayed", "FamilyRotated"]
    desk.run(store.close())


def test_who_follows_the_log_while_processes_write_misses_nothing(desk: Desk) -> None:
    store = _real(desk)
    script = """
for number in range(100):
    run(store.deny(0, Denial(kind="jti", id=f"%s{number}", until_us=2**60)))
"""
    others = [_start(desk, script % name) for name in "ab"]
    found: list[str] = []
    position = None
    while True:
        ended = all(each.poll() is not None for each in others)
        page = desk.run(store.denials(after=position, limit=7))
        found += [each.id for each in page.entries]
        position = page.position
        if ended and not page.more:
            break
    for each in others:
        each.communicate(timeout=60)
        assert each.returncode == 0
    assert sorted(found) == sorted(f"{name}{number}" for name in "ab" for number in range(100))
    for name in "ab":
        assert [each for each in found if each.startswith(name)] == [f"{name}{number}" for number in range(100)]
    desk.run(store.close())


def test_a_session_ended_elsewhere_ends_its_tokens_here_at_once(desk: Desk) -> None:
    store = _real(desk)
    session = signed_in(desk, store)
    family = new_family(session)
    desk.run(store.create_family(family))
    assert desk.run(store.standing(session.ref, "a")).why is None
    script = f'run(store.revoke(SessionRef(7, {session.ref.handle!r}), reason="elsewhere", deny_us=60_000_000))'
    other = _start(desk, script)
    other.communicate(timeout=20)
    assert other.returncode == 0
    standing = desk.run(store.standing(session.ref, "a"))
    assert standing.why == "elsewhere"
    ended = present(desk, store, family, 1)
    assert isinstance(ended, FamilyEnded)
    assert (ended.reason, ended.at_us) == ("elsewhere", standing.at_us)
    (denied,) = desk.run(store.denials(after=None, limit=10)).entries
    assert denied == Denial(
        kind="sid", id=session_denial_id(SessionRef(7, session.ref.handle)), until_us=standing.at_us + 60 * SECOND_US
    )
    desk.run(store.close())
