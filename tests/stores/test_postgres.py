"""The PostgreSQL store beyond the contract: one statement a verb, exactness, hostile rows, what is kept."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from coatcheck.core.ids import IdKeys
from coatcheck.core.ports import (
    Activity,
    Admitted,
    Aliased,
    Changes,
    Committed,
    Converged,
    Ended,
    Gone,
    LimitReached,
    Oversized,
    RateLimit,
    RecordLimits,
    Revoked,
    Rotated,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance import together
from coatcheck.stores.postgres.pool import MAX_CONNECTIONS
from tests.servers.postgres import Postgres
from tests.stores.postgres_desk import DAY_US, HOUR_US, Desk, commit, desks, new_session

pytestmark = pytest.mark.servers


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> Iterator[Desk]:
    yield from desks(request.param, postgres, postgres_database)


# -- one round trip ----------------------------------------------------------------------------------------------------


def test_every_verb_is_exactly_one_statement(desk: Desk) -> None:
    store, new, newer = desk.opened(), new_session(1), new_session(2)
    keys = IdKeys(b"a" * 32, b"b" * 32)
    rotation: dict[str, Any] = {
        "old_digest": newer.digest,
        "new_digest": "n" * 43,
        "sealed": b"s",
        "alias_us": SECOND_US,
    }
    verbs: list[tuple[str, Callable[[], Coroutine[Any, Any, Any]]]] = [
        ("ping", store.ping),
        ("id_keys", partial(store.id_keys, keys)),
        ("create", partial(store.create, new)),
        ("admit", partial(store.admit, newer, maximum=1, on_limit="evict_oldest")),
        ("load", partial(store.load, newer.ref, newer.digest)),
        ("commit", partial(commit, store, newer)),
        ("touch", partial(store.touch, [Activity(ref=newer.ref, owner=newer.owner, seen_us=1)] * 50)),
        ("touch nothing", partial(store.touch, [])),
        ("rotate_id", partial(store.rotate_id, newer.ref, **rotation)),
        ("expire_idle", partial(store.expire_idle, newer.ref)),
        ("list_by_owner", partial(store.list_by_owner, 7, new.owner, after=None, limit=10)),
        ("scan", partial(store.scan, after=None, limit=10)),
        ("revoke", partial(store.revoke, newer.ref, reason="logout")),
        ("revoke_owner", partial(store.revoke_owner, 7, new.owner, reason="logout")),
        ("sweep", partial(store.sweep, limit=10)),
        ("hit", partial(store.hit, "key", RateLimit(attempts=1, period=1.0))),
        ("clear", partial(store.clear, "key")),
        ("local_key", partial(store.local_key, b"k" * 32)),
    ]
    counts: dict[str, int] = {}
    for name, verb in verbs:
        with desk.server.record(desk.database) as statements:
            desk.run(verb())
        counts[name] = len(statements)
    assert counts == {name: 0 if name in ("touch nothing", "local_key") else 1 for name, _ in verbs}


def test_a_thousand_calls_share_a_few_connections(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))

    async def work() -> None:
        await together(desk.colour, [partial(store.load, new.ref, new.digest)] * 1000)

    desk.run(work())
    ((connections,),) = desk.sql(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'coatcheck'", desk.database
    )
    assert 1 <= connections <= MAX_CONNECTIONS


# -- exactness ---------------------------------------------------------------------------------------------------------


def test_two_hundred_simultaneous_sign_ins_leave_one_session(desk: Desk) -> None:
    # The database's own defaults must not matter: with serializable snapshots the count would be of before the wait.
    desk.sql(f'ALTER DATABASE "{desk.database}" SET default_transaction_isolation = serializable')
    desk.sql(f'ALTER DATABASE "{desk.database}" SET synchronous_commit = off')
    store, other = desk.opened(), desk.opened()
    sessions = [new_session(number) for number in range(200)]

    async def work() -> list[Any]:
        calls = [
            partial((store, other)[number % 2].admit, new, maximum=1, on_limit="evict_oldest")
            for number, new in enumerate(sessions)
        ]
        return await together(desk.colour, calls)

    answers = desk.run(work())
    assert all(isinstance(each, Admitted) for each in answers)
    assert len(desk.run(store.list_by_owner(7, "o" * 43, after=None, limit=100)).sessions) == 1
    assert sum(len(each.evicted) for each in answers) == 199


def test_creates_beside_a_revocation_are_before_or_after_it(desk: Desk) -> None:
    store, other = desk.opened(), desk.opened()
    for attempt in range(5):
        sessions = [new_session(100 * attempt + number) for number in range(40)]

        async def work(sessions: list[NewSession] = sessions) -> list[Any]:
            calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [partial(store.create, each) for each in sessions]
            calls.insert(20, partial(other.revoke_owner, 7, "o" * 43, reason="password changed"))
            return await together(desk.colour, calls)

        desk.run(work())
        ((cut,),) = desk.sql("SELECT cut_us FROM coatcheck_cuts")
        for new in sessions:
            loaded = desk.run(store.load(new.ref, new.digest))
            assert isinstance(loaded, Ended) or loaded.session.created_us > cut
        desk.run(store.revoke_owner(7, "o" * 43, reason="over"))


def test_a_record_that_came_from_elsewhere_is_under_the_cut(desk: Desk) -> None:
    # Restored from a backup, or written by a tool: no lock has ordered it, so every verb compares it with the cut.
    store, new, kept = desk.opened(), new_session(1), new_session(2)
    created = desk.run(store.create(new)).session.created_us
    desk.run(store.create(kept))
    desk.sql("CREATE TABLE backup AS SELECT * FROM coatcheck_sessions")
    desk.run(store.revoke_owner(7, new.owner, reason="password changed", keep=kept.ref))
    desk.sql("DELETE FROM coatcheck_sessions WHERE handle = %s", new.ref.handle)
    desk.sql("INSERT INTO coatcheck_sessions SELECT * FROM backup WHERE handle = %s", new.ref.handle)
    loaded = desk.run(store.load(new.ref, new.digest))
    assert isinstance(loaded, Ended)
    assert (loaded.reason, loaded.at_us >= created) == ("password changed", True)
    assert desk.run(commit(store, new)).reason == "password changed"
    rotation: dict[str, Any] = {"old_digest": new.digest, "new_digest": "n" * 43, "sealed": b"", "alias_us": 0}
    assert desk.run(store.rotate_id(new.ref, **rotation)).reason == "password changed"
    page = desk.run(store.list_by_owner(7, new.owner, after=None, limit=10))
    assert [each.session.ref for each in page.sessions] == [kept.ref]
    assert [each.session.ref for each in desk.run(store.scan(after=None, limit=10)).sessions] == [kept.ref]
    assert isinstance(desk.run(commit(store, kept)), Committed)
    admitted = desk.run(store.admit(new_session(3), maximum=2, on_limit="refuse"))
    assert isinstance(admitted, Admitted)
    assert isinstance(desk.run(store.expire_idle(new.ref)), Gone)
    assert desk.sql("SELECT reason FROM coatcheck_sessions WHERE handle = %s", new.ref.handle) == [
        ("password changed",)
    ]


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [
        "schema_number = 2",
        "schema_number = 0",
        "fields = 'null'",
        "fields = '[]'",
        "fields = '\"text\"'",
        "fields = '{\"a\": 1}'",
        'fields = \'{"a": ["b"]}\'',
        'fields = \'{"a": {"b": "c"}}\'',
    ],
)
def test_a_row_that_cannot_be_read_is_nobody(desk: Desk, damage: str) -> None:
    store, new, neighbour = desk.opened(), new_session(1), new_session(2)
    desk.run(store.create(new))
    desk.run(store.create(neighbour))
    desk.sql(f"UPDATE coatcheck_sessions SET {damage} WHERE handle = %s", new.ref.handle)
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Unreadable)
    assert desk.run(commit(store, new)).reason == "unreadable"
    assert desk.run(store.expire_idle(new.ref)).reason == "unreadable"
    rotation: dict[str, Any] = {"old_digest": new.digest, "new_digest": "n" * 43, "sealed": b"", "alias_us": 0}
    assert desk.run(store.rotate_id(new.ref, **rotation)).reason == "unreadable"
    for page in (
        desk.run(store.list_by_owner(7, new.owner, after=None, limit=10)),
        desk.run(store.scan(after=None, limit=10)),
    ):
        assert [each.session.ref for each in page.sessions] == [neighbour.ref]
    # A newer release may well read it: a logout ends it for that one too.
    assert desk.run(store.revoke(new.ref, reason="logout")).ended
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Ended)


def test_everything_everywhere_ends_what_only_a_newer_release_can_read(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.sql("UPDATE coatcheck_sessions SET schema_number = 2")
    assert desk.run(store.revoke_owner(7, new.owner, reason="logout")).ended == (new.ref,)


@pytest.mark.parametrize("number", [-1, 2**62, 2**63 - 1])
def test_times_that_would_overflow_cannot_be_stored(desk: Desk, number: int) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    for column in ("created_us", "seen_us", "idle_us", "absolute_us", "due_us"):
        with pytest.raises(psycopg.errors.CheckViolation):
            desk.sql(f"UPDATE coatcheck_sessions SET {column} = %s", number)
    with pytest.raises(StoreUnavailable):
        desk.run(store.create(new_session(2, idle_us=number)))


def test_a_tombstone_keeps_nothing_the_session_held(desk: Desk) -> None:
    store, new = desk.opened(), new_session(1)
    desk.run(store.create(new))
    rotation: dict[str, Any] = {"new_digest": "n" * 43, "sealed": b"sealed-bytes", "alias_us": HOUR_US}
    assert isinstance(desk.run(store.rotate_id(new.ref, old_digest=new.digest, **rotation)), Rotated)
    desk.run(store.revoke(new.ref, reason="logout"))
    ((text,),) = desk.sql("SELECT s::text FROM coatcheck_sessions s")
    for secret in (new.digest, "n" * 43, new.owner, new.subject, "authority-text", "field-text", b"sealed-bytes".hex()):
        assert secret not in text
    # And still it knows a repeated create from another one.
    again = new_session(2)
    desk.run(store.create(again))
    desk.run(store.revoke(again.ref, reason="logout"))
    assert desk.run(store.create(again)).session.version == 1
    with pytest.raises(StoreUnavailable, match="random source"):
        desk.run(store.create(new_session(2, digest="another")))
    assert isinstance(desk.run(store.load(again.ref, again.digest)), Ended)


def test_what_was_sealed_for_a_rotation_is_gone_after_its_grace(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))

    def rotate(successor: str) -> Coroutine[Any, Any, Any]:
        return store.rotate_id(
            new.ref, old_digest=new.digest, new_digest=successor, sealed=b"sealed", alias_us=30 * SECOND_US
        )

    rotated = desk.run(rotate("n" * 43))
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Aliased)
    assert isinstance(desk.run(rotate("n" * 43)), Rotated)
    desk.run(store.sweep(limit=10))
    assert isinstance(desk.run(rotate("m" * 43)), Converged)
    desk.clock.offset_us = 31 * SECOND_US
    assert desk.run(store.load(new.ref, new.digest)).why == "replaced"
    desk.run(store.sweep(limit=10))
    assert desk.sql("SELECT alias_sealed, alias_digest, alias_until_us FROM coatcheck_sessions") == [(None, None, None)]
    live = desk.run(store.load(new.ref, "n" * 43))
    assert (live.session.version, rotated.version) == (2, 2)


def test_names_with_nul_come_back_and_count_as_they_are(desk: Desk) -> None:
    fields = {"\x00": '"a"', "\x01": '"b"', "\x01a": '"c"', "\x00\x01b\x01": '"d"', "\\u0001": '"\\u0001\\u0000"'}
    store, new = desk.opened(), new_session(fields=fields)
    desk.run(store.create(new))
    assert desk.run(store.load(new.ref, new.digest)).session.fields == fields
    octets = sum(len(name.encode()) + len(text.encode()) for name, text in fields.items())
    exact = RecordLimits(octets=octets, fields=len(fields))
    same = Changes(put={"\x00": '"a"'})
    assert isinstance(desk.run(store.commit(new.ref, same, limits=exact)), Committed)
    tight = RecordLimits(octets=octets - 1, fields=len(fields))
    assert isinstance(desk.run(store.commit(new.ref, same, limits=tight)), Oversized)
    gone = Changes(delete=frozenset({"\x00", "\x01a"}))
    assert isinstance(desk.run(store.commit(new.ref, gone, limits=exact)), Committed)
    assert set(desk.run(store.load(new.ref, new.digest)).session.fields) == set(fields) - {"\x00", "\x01a"}


def test_a_sweep_takes_counters_and_cuts_that_decide_nothing(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.run(store.revoke_owner(7, new.owner, reason="logout", keep=new.ref))
    for number in range(5):
        desk.run(store.hit(f"key-{number}", RateLimit(attempts=3, period=60.0)))
    desk.clock.offset_us = 30 * SECOND_US
    desk.run(store.hit("key-0", RateLimit(attempts=3, period=60.0), cost=3))
    desk.run(store.sweep(limit=100))
    assert desk.sql("SELECT count(*) FROM coatcheck_limits") == [(5,)]
    desk.clock.offset_us = 61 * SECOND_US
    desk.run(store.hit("key-0", RateLimit(attempts=3, period=60.0), cost=2))
    desk.run(store.sweep(limit=100))
    assert desk.sql("SELECT count(*) FROM coatcheck_limits") == [(1,)]
    assert desk.sql("SELECT count(*) FROM coatcheck_cuts") == [(1,)]
    desk.clock.offset_us = 31 * DAY_US
    assert desk.run(store.sweep(limit=100)) == 1
    assert desk.sql("SELECT count(*) FROM coatcheck_limits") == [(0,)]
    assert desk.sql("SELECT count(*) FROM coatcheck_cuts") == [(0,)]
    assert desk.sql("SELECT count(*) FROM coatcheck_sessions") == [(0,)]


def test_a_scan_passes_a_thousand_tombstones_page_by_page(desk: Desk) -> None:
    store = desk.opened()
    for number in (1, 5000):
        desk.run(store.create(new_session(number)))
    desk.run(store.create(new_session(10, owner="p" * 43)))
    desk.run(store.revoke(new_session(10).ref, reason="logout"))
    desk.sql(
        "INSERT INTO coatcheck_sessions SELECT t.version, t.created_us, t.auth_us, t.seen_us, t.idle_us, t.absolute_us,"
        " t.due_us, t.ended_us, t.alias_until_us, t.tag, t.schema_number, 'AAAAAAAAAAAB' || lpad(n::text, 4, '0'),"
        " t.owner, t.digest, t.subject, t.authority, t.fields, t.reason, t.alias_digest, t.alias_sealed, t.evicted"
        " FROM coatcheck_sessions t, generate_series(1, 2500) n WHERE t.ended_us IS NOT NULL"
    )
    found, after, pages = [], None, 0
    while pages < 10:
        page = desk.run(store.scan(after=after, limit=5))
        found += [each.session.ref.handle for each in page.sessions]
        after, pages = page.cursor, pages + 1
        if after is None:
            break
    assert found == sorted(new_session(number).ref.handle for number in (1, 5000))
    assert 2 <= pages <= 4


def test_a_limit_that_is_reached_names_who_is_alive(desk: Desk) -> None:
    store = desk.opened()
    sessions = [new_session(number) for number in range(3)]
    for each in sessions:
        desk.run(store.create(each))
    answer = desk.run(store.admit(new_session(9), maximum=3, on_limit="ask", supersedes=None))
    assert isinstance(answer, LimitReached)
    assert set(answer.alive) == {each.ref for each in sessions}
    assert isinstance(desk.run(store.revoke(sessions[0].ref, reason="logout")), Revoked)
    assert isinstance(desk.run(store.admit(new_session(9), maximum=3, on_limit="ask")), Admitted)
