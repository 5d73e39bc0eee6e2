"""Tokens in PostgreSQL beyond the contract: one statement a verb, the order of entries, what is at rest, upgrades."""

from __future__ import annotations

import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import psycopg
import pytest

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    REASON_REUSED,
    Denial,
    DenialPage,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Gone,
    PositionLost,
    WrongHolder,
    session_denial_id,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.stores.conformance import together
from coatcheck.stores.migrations import COMPONENT_STORE, load_migrations
from coatcheck.stores.postgres import PostgresStore
from coatcheck.stores.postgres.migrations import apply_postgres
from coatcheck.stores.postgres.tokens import MAX_RING_BYTES
from tests.servers.postgres import Postgres
from tests.stores.postgres_desk import DAY_US, HOUR_US, SHORT, Desk, desks, new_session

pytestmark = pytest.mark.servers

GRACE_US = 30 * SECOND_US
SEALED = b"sealed-successor"


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> Iterator[Desk]:
    yield from desks(request.param, postgres, postgres_database)


def digest(number: int) -> str:
    return f"digest-of-refresh-token-{number:019d}"


def new_family(of: NewSession | None, number: int = 0, **more: Any) -> NewFamily:
    name = urlsafe_b64encode(number.to_bytes(6, "big")).decode()
    values: dict[str, Any] = {
        "ref": FamilyRef(7, "r" * 16, name, False) if of is None else FamilyRef(of.ref.tag, of.ref.handle, name),
        "digest": digest(1),
        "owner": "o" * 43,
        "subject": "subject-text",
        "client": "client-text",
        "key": "key-text",
        "grant": "grant-text",
        "idle_us": DAY_US,
        "absolute_us": 30 * DAY_US,
    }
    return NewFamily(**{**values, **more})


def present(
    store: PostgresStore, new: NewFamily, generation: int, *, successor: int | None = None, **more: Any
) -> Coroutine[Any, Any, Any]:
    values: dict[str, Any] = {
        "generation": generation,
        "digest": digest(generation),
        "successor": digest(generation + 1 if successor is None else successor),
        "sealed": SEALED,
        "grace_us": GRACE_US,
        "client": new.client,
        "key": new.key,
    }
    return store.rotate_refresh(new.ref, **{**values, **more})


def followed(desk: Desk, store: PostgresStore, after: str | None) -> tuple[list[Denial], str]:
    page = desk.run(store.denials(after=after, limit=1000))
    assert isinstance(page, DenialPage)
    assert not page.more
    return list(page.entries), page.position


def numbered(desk: Desk) -> str:
    """The end of the log."""
    ((end,),) = desk.sql("SELECT max(entry) FROM coatcheck_denials")
    return str(end)


def a_key(number: int, *, until_us: int = 2**61) -> Denial:
    return Denial(kind="kid", id=f"key-{number}", until_us=until_us)


# -- one round trip ----------------------------------------------------------------------------------------------------


def test_every_token_verb_is_exactly_one_statement(desk: Desk) -> None:
    store, new, newer = desk.opened(), new_session(1), new_session(2)
    desk.run(store.create(new))
    family = new_family(new, client="", key="")
    verbs: list[tuple[str, Callable[[], Coroutine[Any, Any, Any]]]] = [
        ("create_family", partial(store.create_family, family)),
        ("kept", partial(present, store, family, 1)),
        ("rotated", partial(present, store, family, 1, grace_us=0)),
        ("standing", partial(store.standing, new.ref, "jti")),
        ("reused", partial(present, store, family, 1, successor=9, deny_us=HOUR_US)),
        ("admit", partial(store.admit, newer, maximum=1, on_limit="evict_oldest", deny_us=HOUR_US)),
        ("revoke", partial(store.revoke, newer.ref, reason="logout", deny_us=HOUR_US)),
        ("revoke_owner", partial(store.revoke_owner, 7, new.owner, reason="logout", deny_us=HOUR_US)),
        ("deny", partial(store.deny, 0, a_key(1))),
        ("denials", partial(store.denials, after=None, limit=10)),
        ("a position that is none", partial(store.denials, after="x", limit=10)),
        ("write_ring", partial(store.write_ring, b"ring", expected=0)),
        ("read_ring", store.read_ring),
        ("sweep", partial(store.sweep, limit=10)),
    ]
    counts: dict[str, int] = {}
    for name, verb in verbs:
        with desk.server.record(desk.database) as statements:
            desk.run(verb())
        counts[name] = len(statements)
    assert counts == {name: 1 for name, _ in verbs}


# -- the order of the denylist -----------------------------------------------------------------------------------------


def test_nothing_is_numbered_while_an_earlier_entry_is_not_committed(desk: Desk) -> None:
    # Were it numbered, a follower could pass the earlier entry and never be told of it.
    store, hasty = desk.opened(), desk.opened(deadline=SHORT)
    desk.run(store.deny(0, a_key(1)))
    _, position = followed(desk, store, None)
    with psycopg.connect(desk.url) as connection:
        connection.execute("SELECT coatcheck_deny('kid', '{slow}', 9000000000000000, 0, coatcheck_clock(0))")
        with pytest.raises(StoreUnavailable):
            desk.run(hasty.deny(0, a_key(2)))
        assert followed(desk, store, position) == ([], position)
        connection.commit()
    entries, later = followed(desk, store, position)
    assert [each.id for each in entries] == ["slow"]
    desk.run(store.deny(0, a_key(3)))
    assert [each.id for each in followed(desk, store, later)[0]] == ["key-3"]


def test_an_entry_that_was_rolled_back_leaves_no_hole_to_wait_for(desk: Desk) -> None:
    store = desk.opened()
    with psycopg.connect(desk.url) as connection:
        connection.execute("SELECT coatcheck_deny('kid', '{never}', 9000000000000000, 0, 5)")
        connection.rollback()
    assert followed(desk, store, None) == ([], "0")
    desk.run(store.deny(0, a_key(1)))
    assert followed(desk, store, "0") == ([a_key(1)], numbered(desk))


def test_a_follower_beside_many_writers_is_told_everything_in_order(desk: Desk) -> None:
    store, other = desk.opened(), desk.opened()
    told: list[Denial] = []

    async def follow() -> None:
        after: str | None = None
        while len(told) < 120:
            page = await other.denials(after=after, limit=7)
            assert isinstance(page, DenialPage)
            told.extend(page.entries)
            after = page.position

    async def work() -> None:
        # The last of its thread: nothing that it waits for comes after it.
        calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [partial(store.deny, 0, a_key(n)) for n in range(120)]
        await together(desk.colour, [*calls, follow])

    desk.run(work())
    numbered = desk.sql("SELECT id FROM coatcheck_denials ORDER BY entry")
    assert [(each.id,) for each in told] == numbered
    assert len(set(numbered)) == 120


def test_an_older_snapshot_may_not_number_entries(desk: Desk) -> None:
    # A pooler may hand over a session with another isolation level; the end of the log would be that of before a wait.
    desk.opened()
    with psycopg.connect(desk.url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with pytest.raises(psycopg.errors.RaiseException, match="read committed"):
            connection.execute("SELECT coatcheck_deny('kid', '{a}', 1, 0, 1)")


def test_verbs_of_one_owner_that_deny_never_wait_for_each_other_in_a_circle(desk: Desk) -> None:
    store, other = desk.opened(), desk.opened()
    sessions = [new_session(number) for number in range(12)]
    families = [new_family(each, n, client="", key="") for n, each in enumerate(sessions)]
    alone = [new_family(None, number) for number in range(6)]
    for each in sessions:
        desk.run(store.create(each))
    for family in (*families, *alone):
        desk.run(store.create_family(family))
        desk.run(present(store, family, 1, grace_us=0))

    async def work() -> list[Any]:
        calls: list[Callable[[], Coroutine[Any, Any, Any]]] = []
        for number, (session, family) in enumerate(zip(sessions, families, strict=True)):
            pick = (store, other)[number % 2]
            calls += [
                partial(present, pick, family, 1, successor=9, deny_us=HOUR_US),
                partial(pick.revoke, session.ref, reason="logout", deny_us=HOUR_US),
                partial(pick.admit, new_session(100 + number), maximum=3, on_limit="evict_oldest", deny_us=HOUR_US),
                partial(pick.create_family, new_family(session, 200 + number)),
                partial(present, pick, alone[number % 6], 2, grace_us=0),
                partial(pick.sweep, limit=5),
                partial(pick.deny, 0, a_key(number)),
            ]
            if number % 4 == 0:
                calls.append(partial(pick.revoke_owner, 7, session.owner, reason="everywhere", deny_us=HOUR_US))
        return await together(desk.colour, calls)

    desk.run(work())
    denied = {each.id for each in followed(desk, store, None)[0]}
    assert {session_denial_id(each.ref) for each in sessions} <= denied
    assert desk.sql("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
    assert desk.sql(
        "SELECT count(*) FROM coatcheck_families f JOIN coatcheck_sessions s ON s.handle = f.root"
        " WHERE f.of_session AND s.ended_us IS NOT NULL"
    ) == [(0,)]


def test_only_the_very_same_denial_is_not_written_twice(desk: Desk) -> None:
    store = desk.opened()
    denials = [
        Denial(kind="sub", id="ann", until_us=2**60 + more, not_before_us=5 + later)
        for more, later in ((0, 0), (-1, 0), (0, 1))
    ]
    for each in denials * 2:
        desk.run(store.deny(0, each))
    assert followed(desk, store, None)[0] == denials


def test_what_is_denied_after_a_restore_lies_behind_every_position(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.deny(0, a_key(1)))
    behind = numbered(desk)
    desk.sql("CREATE TABLE backup AS SELECT * FROM coatcheck_denials")
    for number in range(2, 5):
        desk.run(store.deny(0, a_key(number)))
    ahead = numbered(desk)
    desk.sql("DELETE FROM coatcheck_denials")
    desk.sql("INSERT INTO coatcheck_denials SELECT * FROM backup")
    assert isinstance(desk.run(store.denials(after=ahead, limit=10)), PositionLost)
    for number in (11, 12):
        desk.run(store.deny(0, a_key(number)))
    for position in (ahead, behind):
        assert followed(desk, store, position)[0] == [a_key(11), a_key(12)]


def test_a_clock_that_was_set_back_numbers_on(desk: Desk) -> None:
    store = desk.opened()
    desk.clock.offset_us = HOUR_US
    desk.run(store.deny(0, a_key(1)))
    first = int(numbered(desk))
    desk.clock.offset_us = 0
    new = new_session(owner="p" * 43)
    desk.run(store.create(new))
    desk.run(store.create(new_session(2, owner="p" * 43)))
    desk.run(store.revoke_owner(7, new.owner, reason="everywhere", deny_us=HOUR_US))
    assert int(numbered(desk)) == first + 2
    desk.clock.offset_us = 2 * HOUR_US
    before = desk.run(store.ping())
    desk.run(store.deny(0, a_key(2)))
    assert before <= int(numbered(desk)) <= desk.run(store.ping())


def test_a_swept_denylist_goes_on_numbering_where_it_was(desk: Desk) -> None:
    store = desk.opened()
    now_us = desk.run(store.ping())
    for number in range(5):
        desk.run(store.deny(0, a_key(number, until_us=now_us + HOUR_US)))
    assert desk.run(store.sweep(limit=100)) == 0
    desk.clock.offset_us = 2 * HOUR_US
    assert desk.run(store.sweep(limit=3)) == 3
    assert desk.run(store.sweep(limit=3)) == 1
    ((end,),) = desk.sql("SELECT entry FROM coatcheck_denials")
    for after in (None, "0", "3", f"{end - 1}", f"{end}"):
        assert followed(desk, store, after) == ([], f"{end}")
    assert isinstance(desk.run(store.denials(after=f"{end + 1}", limit=1)), PositionLost)
    desk.run(store.deny(0, a_key(6)))
    assert followed(desk, store, f"{end}") == ([a_key(6)], numbered(desk))
    desk.run(store.sweep(limit=100))
    assert desk.sql("SELECT id FROM coatcheck_denials") == [("key-6",)]


# -- hostile texts and rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a\x00b", "\x01a", "\x00\x01b\x01", "é☃🦉", "'; DROP TABLE x; --", "x" * 100_000])
def test_any_text_can_be_denied_and_comes_back(desk: Desk, text: str) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    denial = Denial(kind="jti", id=text, until_us=2**60)
    assert desk.run(store.standing(new.ref, text)).why is None
    desk.run(store.deny(7, denial))
    assert followed(desk, store, None)[0] == [denial]
    assert desk.run(store.standing(new.ref, text)).why == "denied"
    assert desk.run(store.standing(new.ref, text + "x")).why is None


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\x01a", "é☃🦉", "'; DROP TABLE x; --", "x" * 100_000])
def test_any_text_names_a_client_or_a_key(desk: Desk, text: str) -> None:
    store = desk.opened()
    new = new_family(None, client=text, key=text)
    desk.run(store.create_family(new))
    assert isinstance(desk.run(present(store, new, 1, client=text + "x")), WrongHolder)
    assert isinstance(desk.run(present(store, new, 1, key="")), WrongHolder)
    rotated = desk.run(present(store, new, 1, grace_us=0))
    assert isinstance(rotated, FamilyRotated)
    assert (rotated.family.client, rotated.family.key) == (text, text)


@pytest.mark.parametrize("text", ["a\ud800", "\udfff", "a\x00"])
def test_what_postgresql_cannot_keep_is_refused_before_it_is_sent(desk: Desk, text: str) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    attempts: list[Coroutine[Any, Any, Any]] = [
        store.revoke(new.ref, reason=text, deny_us=HOUR_US),
        store.revoke_owner(7, new.owner, reason=text, deny_us=HOUR_US),
        store.create_family(new_family(new, subject=text)),
    ]
    if "\x00" not in text:
        attempts += [
            store.standing(new.ref, text),
            store.deny(0, Denial(kind="sub", id=text, until_us=2**60)),
            store.create_family(new_family(new, client=text)),
            present(store, new_family(new), 1, client=text),
            present(store, new_family(new), 1, key=text),
        ]
    with desk.server.record(desk.database) as statements:
        for attempt in attempts:
            with pytest.raises(ValueRefused, match="surrogate"):
                desk.run(attempt)
    assert statements == []


def test_a_grant_is_any_text(desk: Desk) -> None:
    store = desk.opened()
    new = new_family(None, grant='\x00"\\\x01é🦉')
    assert isinstance(desk.run(store.create_family(new)), FamilyCreated)
    assert desk.run(present(store, new, 1)).family.grant == new.grant


def test_a_kind_of_a_newer_release_is_passed_over(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.deny(0, a_key(1)))
    made = "SELECT max(entry) + 1, 9000000000000000, 0, 'planet', 'earth' FROM coatcheck_denials"
    desk.sql(f"INSERT INTO coatcheck_denials {made}")
    desk.run(store.deny(0, a_key(2)))
    assert followed(desk, store, None) == ([a_key(1), a_key(2)], numbered(desk))


@pytest.mark.parametrize("number", [-1, 2**62, 2**63 - 1])
def test_times_of_a_family_that_would_overflow_cannot_be_stored(desk: Desk, number: int) -> None:
    store, new = desk.opened(), new_family(None)
    desk.run(store.create_family(new))
    for column in ("created_us", "rotated_us", "idle_us", "absolute_us", "due_us"):
        with pytest.raises(psycopg.errors.CheckViolation):
            desk.sql(f"UPDATE coatcheck_families SET {column} = %s", number)
    with pytest.raises(StoreUnavailable):
        desk.run(store.create_family(new_family(None, 2, idle_us=number)))


def test_a_session_that_cannot_be_read_carries_nothing(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    family = new_family(new)
    desk.run(store.create_family(family))
    desk.sql("UPDATE coatcheck_sessions SET schema_number = 2")
    assert desk.run(store.standing(new.ref, "jti")).why == "unreadable"
    assert desk.run(store.create_family(new_family(new, 2))).reason == "unreadable"
    assert isinstance(desk.run(present(store, family, 1)), FamilyUnknown)
    # An end that was given this name is an end all the same.
    desk.run(store.revoke(new.ref, reason="unreadable"))
    assert desk.run(present(store, family, 1)).reason == "unreadable"


def test_a_name_under_another_tag_is_not_the_family(desk: Desk) -> None:
    store, new = desk.opened(), new_family(None)
    desk.run(store.create_family(new))
    elsewhere = new_family(None, ref=FamilyRef(8, new.ref.root, new.ref.name, False))
    assert isinstance(desk.run(present(store, elsewhere, 1)), FamilyUnknown)
    of_session = new_family(None, ref=FamilyRef(7, new.ref.root, new.ref.name, True))
    assert isinstance(desk.run(present(store, of_session, 1)), FamilyUnknown)
    with pytest.raises(StoreUnavailable, match="random source"):
        desk.run(store.create_family(elsewhere))


def test_a_ring_that_is_too_large_is_refused_before_it_is_sent(desk: Desk) -> None:
    store = desk.opened()
    with desk.server.record(desk.database) as statements, pytest.raises(ValueRefused):
        desk.run(store.write_ring(b"x" * (MAX_RING_BYTES + 1), expected=0))
    assert statements == []
    assert desk.run(store.write_ring(b"x" * MAX_RING_BYTES, expected=0))
    assert desk.run(store.read_ring()) == (1, b"x" * MAX_RING_BYTES)


# -- what is kept ------------------------------------------------------------------------------------------------------


def sealed_at_rest(desk: Desk) -> list[Any]:
    found = "SELECT e.sealed FROM coatcheck_families f LEFT JOIN coatcheck_seals e USING (root, of_session, name)"
    return [row for (row,) in desk.sql(f"{found} ORDER BY name")]


def test_a_sealed_successor_is_at_rest_only_while_it_may_be_asked_for(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    used, unused, graceless = (new_family(new, number) for number in range(3))
    for each in (used, unused, graceless):
        desk.run(store.create_family(each))
    desk.clock.offset_us = GRACE_US
    for each in (used, unused):
        assert isinstance(desk.run(present(store, each, 1)), FamilyRotated)
    assert isinstance(desk.run(present(store, graceless, 1, grace_us=0)), FamilyRotated)
    assert sealed_at_rest(desk) == [SEALED, SEALED, None]
    assert isinstance(desk.run(present(store, used, 2)), FamilyKept)
    assert sealed_at_rest(desk) == [None, SEALED, None]
    desk.run(store.sweep(limit=10))
    assert desk.run(present(store, unused, 1, successor=9)).sealed == SEALED
    assert desk.run(present(store, used, 1, successor=9)).sealed is None
    desk.clock.offset_us = 2 * GRACE_US + SECOND_US
    assert desk.run(store.sweep(limit=10)) == 0
    assert sealed_at_rest(desk) == [None, None, None]
    assert desk.sql("SELECT count(*) FROM coatcheck_seals") == [(0,)]
    # What looked at them once is not looking at them again.
    assert desk.sql("SELECT count(*) FROM coatcheck_families WHERE due_us < created_us + 86400000000") == [(0,)]
    assert isinstance(desk.run(present(store, unused, 1)), FamilyRotated)
    assert isinstance(desk.run(present(store, unused, 1, successor=9)), FamilyReused)


def test_an_ended_family_knows_its_holder_and_keeps_nothing_it_was_granted(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    reused, cut = new_family(new, 1), new_family(None, 2)
    for each in (reused, cut):
        desk.run(store.create_family(each))
        desk.run(present(store, each, 1, grace_us=0))
        desk.run(present(store, each, 2, grace_us=0))
        desk.run(present(store, each, 3, grace_us=GRACE_US))
    assert desk.run(present(store, reused, 1)).session is None
    desk.run(store.revoke_owner(7, cut.owner, reason="everywhere", keep=new.ref))
    assert desk.run(present(store, reused, 4)).reason == REASON_REUSED
    assert desk.run(present(store, cut, 4)).reason == "everywhere"
    assert isinstance(desk.run(present(store, cut, 4, key="stolen elsewhere")), WrongHolder)
    assert desk.sql("SELECT count(*) FROM coatcheck_seals") == [(0,)]
    ((one,), (two,)) = desk.sql("SELECT f::text FROM coatcheck_families f")
    for secret in ("o" * 43, "subject-text", "grant-text", SEALED.hex()):
        assert secret not in one + two
    desk.clock.offset_us = DAY_US - SECOND_US
    assert desk.run(store.sweep(limit=10)) == 0
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(2,)]
    desk.clock.offset_us = DAY_US + SECOND_US
    assert desk.run(store.sweep(limit=10)) == 2
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(0,)]


def test_whatever_ends_a_session_leaves_no_family_of_it(desk: Desk) -> None:
    store = desk.opened()
    ends: list[Callable[[NewSession], Coroutine[Any, Any, Any]]] = [
        lambda new: store.revoke(new.ref, reason="logout"),
        lambda new: store.revoke_owner(7, new.owner, reason="everywhere"),
        lambda new: store.admit(new_session(500), maximum=1, on_limit="evict_oldest"),
        lambda new: store.admit(new_session(501), maximum=9, on_limit="allow", supersedes=new.ref),
    ]
    for number, end in enumerate(ends):
        new = new_session(number, owner=f"{number}" * 43 if number < 2 else "o" * 43)
        desk.run(store.create(new))
        for each in range(3):
            desk.run(store.create_family(new_family(new, each)))
            desk.run(present(store, new_family(new, each), 1, grace_us=0))
            desk.run(present(store, new_family(new, each), 2, grace_us=DAY_US))
        desk.run(end(new))
        for table in ("families", "seals"):
            assert desk.sql(f"SELECT count(*) FROM coatcheck_{table}") == [(0,)], number
    idle, forgotten = new_session(10), new_session(11)
    for new in (idle, forgotten):
        desk.run(store.create(new))
        desk.run(store.create_family(new_family(new, idle_us=40 * DAY_US, absolute_us=40 * DAY_US)))
    desk.clock.offset_us = 2 * HOUR_US
    assert isinstance(desk.run(store.expire_idle(idle.ref)), Gone)
    assert desk.sql("SELECT root FROM coatcheck_families") == [(forgotten.ref.handle,)]
    desk.clock.offset_us = 31 * DAY_US
    desk.run(store.sweep(limit=100))
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(0,)]


def test_a_session_keeps_only_its_newest_families(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    families = [new_family(new, number) for number in range(MAX_FAMILIES + 1)]
    for each in families[:-1]:
        desk.run(store.create_family(each))
    # All of one microsecond: then the name decides.
    desk.sql("UPDATE coatcheck_families SET created_us = (SELECT max(created_us) FROM coatcheck_families)")
    desk.run(store.create_family(families[-1]))
    left = [name for (name,) in desk.sql("SELECT name FROM coatcheck_families")]
    assert sorted(left) == sorted(each.ref.name for each in families[1:])


def test_a_family_too_many_drops_those_that_are_over_before_a_live_one(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    live, ended = new_family(new, 100), new_family(new, 101)
    for each in (live, ended, *(new_family(new, n, idle_us=HOUR_US // 4) for n in range(MAX_FAMILIES - 2))):
        desk.run(store.create_family(each))
    for generation, successor in ((1, 2), (2, 3), (1, 9)):
        desk.run(present(store, ended, generation, successor=successor, grace_us=0))
    assert desk.run(present(store, ended, 3)).reason == REASON_REUSED
    # What is over stays until its place is needed.
    desk.clock.offset_us = HOUR_US // 2
    assert isinstance(desk.run(present(store, ended, 3)), FamilyEnded)
    desk.run(store.create_family(new_family(new, 102)))
    assert isinstance(desk.run(present(store, ended, 3)), FamilyUnknown)
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(2,)]
    assert isinstance(desk.run(present(store, live, 1)), FamilyRotated)


def test_a_creation_that_comes_again_after_its_token_was_exchanged_or_ended_is_refused(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    rotated, ended = new_family(new, 1), new_family(None, 2)
    for each in (rotated, ended):
        first = desk.run(store.create_family(each))
        assert desk.run(store.create_family(each)).family == first.family
    assert isinstance(desk.run(present(store, rotated, 1, grace_us=0)), FamilyRotated)
    desk.run(store.revoke_owner(7, ended.owner, reason="everywhere", keep=new.ref))
    for each in (rotated, ended):
        with pytest.raises(StoreUnavailable, match="random source"):
            desk.run(store.create_family(each))
    assert isinstance(desk.run(present(store, rotated, 2)), FamilyKept)


def test_a_family_that_came_from_elsewhere_is_under_the_cut(desk: Desk) -> None:
    # Restored from a backup: it was not there to be ended, so its owner's cut is kept and compared.
    store, new = desk.opened(), new_family(None)
    desk.run(store.create_family(new))
    desk.sql("CREATE TABLE backup AS SELECT * FROM coatcheck_families")
    desk.run(store.revoke_owner(7, new.owner, reason="password changed"))
    desk.sql("DELETE FROM coatcheck_families")
    desk.sql("INSERT INTO coatcheck_families SELECT * FROM backup")
    ((cut_us,),) = desk.sql("SELECT cut_us FROM coatcheck_cuts")
    for offset_us in (0, 3 * DAY_US):
        # Past its idle time too: the cut is what is told.
        desk.clock.offset_us = offset_us
        answer = desk.run(present(store, new, 1))
        assert isinstance(answer, FamilyEnded)
        assert (answer.reason, answer.at_us) == ("password changed", cut_us)
        if offset_us == 0:
            desk.sql("UPDATE coatcheck_families SET due_us = absolute_us")
            desk.clock.offset_us = 2 * DAY_US
            desk.run(store.sweep(limit=10))
    desk.sql("UPDATE coatcheck_families SET due_us = 0")
    desk.run(store.sweep(limit=10))
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(0,)]
    assert desk.sql("SELECT count(*) FROM coatcheck_cuts") == [(0,)]


def test_a_sweep_passes_over_families_that_somebody_holds(desk: Desk) -> None:
    store = desk.opened()
    for number in range(3):
        desk.run(store.create_family(new_family(None, number)))
    desk.clock.offset_us = 2 * DAY_US
    with psycopg.connect(desk.url) as connection:
        connection.execute("SELECT 1 FROM coatcheck_families ORDER BY name LIMIT 1 FOR UPDATE")
        assert desk.run(store.sweep(limit=10)) == 2
    assert desk.run(store.sweep(limit=10)) == 1


# -- waiting and writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", ["families", "seals"])
@pytest.mark.parametrize("verb", ["rotate", "create"])
def test_who_waited_for_a_sweep_past_the_end_of_the_session_is_told_so(desk: Desk, verb: str, held: str) -> None:
    # Judged before the wait, a token would be exchanged after the end of its session.
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    family = new_family(new)
    for number in range(MAX_FAMILIES):
        desk.run(store.create_family(new_family(new, number)))
    desk.run(present(store, family, 1, grace_us=0))
    desk.run(present(store, family, 2, grace_us=1))
    end = desk.run(store.ping()) + 300_000
    desk.sql("UPDATE coatcheck_sessions SET absolute_us = %s", end)
    with psycopg.connect(desk.url) as connection, ThreadPoolExecutor(1) as beside:
        # As a sweep holds them.
        connection.execute(f"SELECT 1 FROM coatcheck_{held} FOR UPDATE".encode())

        def let_go() -> None:
            while connection.execute("SELECT coatcheck_clock(0) < %s", (end,)).fetchone() == (True,):
                pass
            connection.commit()

        released = beside.submit(let_go)
        if verb == "rotate":
            answer = desk.run(present(store, family, 3, grace_us=0))
            assert isinstance(answer, FamilyEnded)
            assert (answer.reason, answer.at_us) == ("absolute_timeout", end)
        elif held == "families":
            answer = desk.run(store.create_family(new_family(new, 100)))
            assert isinstance(answer, Gone)
            assert answer.reason == "absolute_timeout"
        else:
            # A creation needs no seal and waits for none.
            answer = desk.run(store.create_family(new_family(new, 100)))
            assert isinstance(answer, FamilyCreated)
        assert isinstance(answer, FamilyCreated) is (answer.now_us < end)
        released.result()


def test_a_rotation_writes_no_index_of_the_families(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    families = [new_family(new, number) for number in range(5)]
    for each in families:
        desk.run(store.create_family(each))
    for generation in (1, 2, 3):
        desk.clock.offset_us += GRACE_US
        desk.run(store.sweep(limit=100))
        for each in families:
            assert isinstance(desk.run(present(store, each, generation)), FamilyRotated)
    desk.run(store.close())
    with psycopg.connect(desk.url, autocommit=True) as connection:
        # The counts of a connection that has ended are told at once; those of others with their next report.
        counts = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'coatcheck_families'"
        until = time.monotonic() + 10
        while (told := connection.execute(counts).fetchone()) != (15, 15):
            assert time.monotonic() < until, told


def test_no_kind_of_rows_keeps_another_from_being_swept(desk: Desk) -> None:
    store = desk.opened()
    now_us = desk.run(store.ping())
    for number in range(8):
        desk.run(store.create(new_session(number, absolute_us=SECOND_US)))
    for number in range(3):
        desk.run(store.create_family(new_family(None, number, absolute_us=SECOND_US)))
        desk.run(store.deny(0, a_key(number, until_us=now_us + SECOND_US)))
    desk.clock.offset_us = HOUR_US
    assert desk.run(store.sweep(limit=4)) == 4
    for table, left in (("sessions", 4), ("families", 0), ("denials", 1)):
        assert desk.sql(f"SELECT count(*) FROM coatcheck_{table}") == [(left,)], table
    assert [desk.run(store.sweep(limit=4)) for _ in range(2)] == [4, 0]


@pytest.mark.parametrize("waiting", ["seals", "limits", "cuts"])
def test_a_sweep_answers_its_limit_while_more_of_anything_is_waiting(desk: Desk, waiting: str) -> None:
    store = desk.opened()
    made = {
        "seals": "INSERT INTO coatcheck_seals SELECT 1, false, 'r' || g, 'n', 'x' FROM generate_series(1, 41) g",
        "limits": "INSERT INTO coatcheck_limits SELECT 1, 1, 'k' || g FROM generate_series(1, 41) g",
        "cuts": "INSERT INTO coatcheck_cuts SELECT 1, 7, 'o' || g, '', 'r' FROM generate_series(1, 3) g",
    }
    desk.sql(made[waiting])
    assert [desk.run(store.sweep(limit=2)) for _ in range(2)] == [2, 0]
    assert desk.sql(f"SELECT count(*) FROM coatcheck_{waiting}") == [(0,)]


# -- upgrades ----------------------------------------------------------------------------------------------------------


def migrate_first(desk: Desk) -> None:
    first = load_migrations("coatcheck.stores", "postgres")[:1]

    async def work(run: Any) -> object:
        return await apply_postgres(run, first, component=COMPONENT_STORE, namespace="coatcheck")

    async def change() -> None:
        await desk.store()._driver.change(work)

    desk.run(change())


def test_a_process_of_the_release_before_goes_on_during_an_upgrade(desk: Desk) -> None:
    create = (
        "SELECT outcome, handles FROM coatcheck_create(7, %s, %s, %s, 's', 3600000000::bigint, 86400000000::bigint,"
        " '{{}}', '{{}}'::jsonb, {maximum}, true, NULL, 'superseded', 'session_limit', 86400000000::bigint, 0::bigint)"
    )
    migrate_first(desk)
    old = [new_session(number) for number in range(4)]
    with psycopg.connect(desk.url, autocommit=True) as connection:
        # Prepared on the server, as a process that has been running for a while has it.
        connection.prepare_threshold = 0

        def earlier(statement: str, *values: object) -> Any:
            return connection.execute(statement.encode(), values).fetchone()

        for each in old[:2]:
            made = earlier(create.format(maximum="NULL"), each.ref.handle, each.digest, each.owner)
            assert made == ("created", [])
        revoke = "SELECT * FROM coatcheck_revoke(7, %s, 'logout', 86400000000::bigint, 0::bigint)"
        assert earlier(revoke, old[0].ref.handle)[0] is True
        assert desk.run(desk.store().migrate()) == ("0002_tokens", "0003_feed", "0004_choice")
        store = desk.store()
        desk.run(store.open())
        families = {each.ref: new_family(each) for each in old}
        assert isinstance(desk.run(store.create_family(families[old[1].ref])), FamilyCreated)
        made = earlier(create.format(maximum="1::bigint"), old[2].ref.handle, old[2].digest, old[2].owner)
        assert made == ("created", [old[1].ref.handle])
        assert desk.run(present(store, families[old[1].ref], 1)).reason == "session_limit"
        for each in old[2:]:
            desk.run(store.create(each))
            desk.run(store.create_family(families[each.ref]))
        assert earlier(revoke, old[2].ref.handle)[0] is True
        ended = earlier(
            "SELECT handles FROM coatcheck_revoke_owner(7, %s, 'all', NULL, 86400000000::bigint, 0::bigint)",
            old[3].owner,
        )
        assert ended == ([old[3].ref.handle],)
        assert earlier("SELECT coatcheck_sweep(10::bigint, 86400000000::bigint, 0::bigint)") == (0,)
    assert desk.sql("SELECT count(*) FROM coatcheck_families") == [(0,)]
    # It knows of no tokens: what it ends is not denied.
    assert followed(desk, store, None) == ([], "0")


def test_a_denied_session_is_named_with_four_digits_of_its_tag(desk: Desk) -> None:
    store = desk.opened()
    refs = [SessionRef(tag, "h" * 16) for tag in (0, 10, 65535)]
    until = [desk.run(store.revoke(each, reason="logout", deny_us=HOUR_US)).now_us + HOUR_US for each in refs]
    wanted = [Denial(kind="sid", id=session_denial_id(each), until_us=us) for each, us in zip(refs, until, strict=True)]
    assert followed(desk, store, None)[0] == wanted


def test_replayed_is_answered_to_many_at_once_with_one_successor(desk: Desk) -> None:
    store, other, new = desk.opened(), desk.opened(), new_session()
    desk.run(store.create(new))
    family = new_family(new, client="", key="")
    desk.run(store.create_family(family))
    desk.clock.offset_us = GRACE_US

    async def work() -> list[Any]:
        calls = [partial(present, (store, other)[n % 2], family, 1, successor=10 + n) for n in range(60)]
        return await together(desk.colour, calls)

    answers = desk.run(work())
    (winner,) = [each for each in answers if isinstance(each, FamilyRotated)]
    others = [each for each in answers if isinstance(each, FamilyReplayed)]
    assert len(others) == 59
    assert {(each.family.digest, each.sealed) for each in others} == {(winner.family.digest, SEALED)}
