from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial

import psycopg
import pytest

from coatcheck.core.names import NameRefused, parse_user_name
from coatcheck.core.throttle import Attempt, ThrottlePolicy
from coatcheck.errors import StoreUnavailable, Throttled, ValueRefused
from coatcheck.events import Event
from coatcheck.server.accounts import Accounts, User
from coatcheck.server.audit import (
    MAX_ENVELOPE_CHARACTERS,
    MAX_READ,
    AuditLog,
    account_created,
    account_disabled,
    login_failed,
    login_throttled,
    password_changed,
)
from coatcheck.server.database_port import Database
from coatcheck.server.one_time import SetUpLinks
from coatcheck.server.password_hashing import HashParameters, PasswordHasher, Wrong
from coatcheck.server.sign_in_limits import SignInLimits
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem
from tests.server.account_parts import at_once, name_of, opened, password_of, servers

pytestmark = pytest.mark.anyio

AT = 1_800_000_000.25


def event(subject: str | None = None, **data: str | float | bool) -> Event:
    return Event(kind="login.failed", at=AT, subject=subject, data=data)


async def test_events_come_back_as_their_envelopes_in_order(log: AuditLog) -> None:
    events = [event(number=n) for n in range(3)]
    await log.append(events)
    await log.append([Event(kind="session.created", at=AT, sid="S" * 28, subject="U" * 22)])
    read = await log.read()
    assert [entry.envelope for entry in read] == [
        *(each.envelope() for each in events),
        {"v": 1, "type": "session.created", "at": AT, "sid": "S" * 28, "subject": "U" * 22, "data": {}},
    ]
    positions = [entry.position for entry in read]
    assert positions == sorted(set(positions))


async def test_reading_on_from_a_position_misses_and_repeats_nothing(log: AuditLog) -> None:
    await log.append([event(number=n) for n in range(250)])
    seen: list[object] = []
    after = 0
    while page := await log.read(after=after, limit=7):
        after = page[-1].position
        seen += [entry.envelope["data"] for entry in page]
    assert seen == [{"number": n} for n in range(250)]
    assert await log.read(after=after) == ()


async def test_appending_nothing_writes_nothing(log: AuditLog) -> None:
    await log.append([])
    assert await log.read() == ()


async def test_of_many_writers_no_event_is_lost_and_a_reader_behind_them_misses_none(url: str) -> None:
    # A position must not become visible before the ones below it, or who reads on from it never sees those.
    async with servers(url) as databases:
        logs = [AuditLog(each) for each in databases]
        seen: list[object] = []

        async def write(number: int) -> int:
            await logs[number % 2].append([event(number=number), event(number=-number)])
            return number

        async def follow() -> int:
            after = 0
            while len(seen) < 100:
                page = await logs[2].read(after=after)
                if page:
                    after = page[-1].position
                seen.extend(entry.envelope["data"] for entry in page)
            return 0

        calls: list[Callable[[], Awaitable[int]]] = [follow, *(partial(write, n) for n in range(1, 51))]
        await at_once(calls)
        assert sorted(json.dumps(each) for each in seen) == sorted(
            json.dumps({"number": sign * n}) for n in range(1, 51) for sign in (1, -1)
        )


@pytest.mark.servers
async def test_a_writer_waits_for_the_one_before_it_to_commit(postgres_database: str) -> None:
    # Without it position 2 is visible while 1 is not, and who has read 2 never sees 1.
    async with opened(postgres_database) as database, opened(postgres_database, deadline=0.3) as impatient:
        async with await psycopg.AsyncConnection.connect(postgres_database) as first:
            await first.execute("insert into coatcheck_audit (at_us, type, envelope) values (0, 'x', '{}')")
            with pytest.raises(StoreUnavailable):
                await AuditLog(impatient).append([event()])
            assert await AuditLog(database).read() == ()
            await first.commit()
        await AuditLog(impatient).append([event()])
        positions = [entry.position for entry in await AuditLog(database).read()]
        assert len(positions) == 2


@pytest.mark.parametrize("statement", ["update {namespace}_audit set type = 'x'", "delete from {namespace}_audit"])
async def test_the_database_refuses_to_change_or_delete_an_event(
    log: AuditLog, database: Database, statement: str
) -> None:
    await log.append([event()])
    with pytest.raises(StoreUnavailable):
        await database.fetch(statement)
    assert len(await log.read()) == 1


async def test_the_database_refuses_to_empty_the_log(log: AuditLog, database: Database) -> None:
    await log.append([event()])
    if database.dialect == "postgres":
        with pytest.raises(StoreUnavailable):
            await database.fetch("truncate {namespace}_audit")
    assert len(await log.read()) == 1


@pytest.mark.parametrize(
    "hostile",
    ["a\r\nb", "a\x1b[31mb", "a\u2028b", '"},{"v":1', "a\x00b", "a\ud800b", "</script>", "%s?{namespace}", "한국어"],
)
async def test_hostile_text_stays_one_line_of_ascii(log: AuditLog, database: Database, hostile: str) -> None:
    await log.append([event(subject=hostile, what=hostile)])
    ((line,),) = await database.fetch("select envelope from {namespace}_audit")
    assert isinstance(line, str)
    assert line.isascii()
    assert line.isprintable()
    (entry,) = await log.read()
    assert entry.envelope["data"] == {"what": hostile}
    assert entry.envelope["subject"] == hostile


async def test_numbers_that_json_does_not_know_become_text(log: AuditLog) -> None:
    await log.append([event(a=float("nan"), b=float("inf"), c=1.5, d=True)])
    (entry,) = await log.read()
    assert entry.envelope["data"] == {"a": "nan", "b": "inf", "c": 1.5, "d": True}


async def test_a_huge_event_is_kept_without_its_data(log: AuditLog) -> None:
    room = MAX_ENVELOPE_CHARACTERS - len(json.dumps(event(what="").envelope(), separators=(",", ":")))
    await log.append([event(what="x" * room), event(what="x" * (room + 1))])
    kept, cut = await log.read()
    assert kept.envelope["data"] == {"what": "x" * room}
    assert cut.envelope["data"] == {"truncated": True}
    with pytest.raises(ValueRefused):
        await log.append([event(subject="x" * MAX_ENVELOPE_CHARACTERS)])


@pytest.mark.parametrize(("after", "limit"), [(-1, 1), (2**63, 1), (0, 0), (0, MAX_READ + 1)])
async def test_a_page_outside_the_bounds_is_refused(log: AuditLog, after: int, limit: int) -> None:
    with pytest.raises(ValueRefused):
        await log.read(after=after, limit=limit)


async def test_a_row_that_is_no_envelope_is_an_error_of_ours(log: AuditLog, database: Database) -> None:
    await database.fetch("insert into {namespace}_audit (at_us, type, envelope) values (0, 'x', '[1]')")
    with pytest.raises(StoreUnavailable):
        await log.read()


async def test_no_password_token_or_typed_name_reaches_the_log_or_the_tables(log: AuditLog, database: Database) -> None:
    # Canaries through the whole of the accounts layer, also where people type them by mistake (ASVS 16.2.5).
    right, wrong, new = "canary one in the mine", "canary two in the mine", "canary three in the mine"
    in_the_wrong_field = "canary-four-in-the-name-field"
    system = FakeSystem()
    accounts, links = Accounts(database, system=system), SetUpLinks(database, system=system)
    store = open_store("memory:", colour="async", system=system)
    limits = SignInLimits(store, policy=ThrottlePolicy(), key=bytes(32))
    hasher = PasswordHasher(parameters=HashParameters(memory_kib=12 * 1024, passes=3), system=system)
    await hasher.open()
    await store.open()
    try:
        token = await links.issue()
        assert token is not None
        assert await links.consume(token.text)
        admin = await accounts.create_first_administrator(
            name_of("root"), password_hash=await hasher.hash(password_of(right))
        )
        assert isinstance(admin, User)
        await log.append([account_created(admin, at=AT, by="set_up")])
        for typed_name, typed in (("root", wrong), (in_the_wrong_field, wrong), ("root " + right, wrong)):
            name = parse_user_name(typed_name)
            user = None if isinstance(name, NameRefused) else await accounts.find_by_name(name)
            verdict = await hasher.verify(user, password_of(typed))
            assert isinstance(verdict, Wrong)
            await log.append([login_failed(user, at=AT, why=verdict.why, network="192.0.2.1")])
        attempt = Attempt(account=in_the_wrong_field, address=None)
        for _ in range(10):
            await limits.reserve(attempt)
        with pytest.raises(Throttled) as throttled:
            await limits.reserve(attempt)
        await log.append([login_throttled(at=AT, retry_after=throttled.value.retry_after, network=None)])
        changed = await accounts.set_password(admin.id, await hasher.hash(password_of(new)))
        assert changed is not None
        await log.append([password_changed(changed, at=AT), account_disabled(changed, at=AT)])
    finally:
        await hasher.close()
        await store.close()
    stored = str([entry.envelope for entry in await log.read()])
    assert stored.count("login.failed") == 3
    for table in ("users", "one_time", "audit", "nobody", "migrations"):
        stored += str(await database.fetch(f"select * from {{namespace}}_{table}"))
    assert "canary" not in stored
    assert token.text not in stored
    in_log = str([entry.envelope for entry in await log.read()])
    assert "argon2" not in in_log
    assert "root" not in in_log
