"""The SQLite store beyond the contract: files and their modes, hostile rows, erasure, other processes, kill -9."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from base64 import urlsafe_b64encode
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import IdKeys, SessionRef
from coatcheck.core.ports import (
    Absent,
    Activity,
    Admitted,
    Aliased,
    Changes,
    Colour,
    Committed,
    Ended,
    Gone,
    Live,
    RateLimit,
    RecordLimits,
    Revoked,
    Rotated,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import ConfigurationError, StoreUnavailable, ValueRefused
from coatcheck.stores.conformance import CHECKS, NEEDS_BYTES, Bench, Check, Clock, run_check
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite import SqliteStore
from coatcheck.stores.sqlite.driver import path_of
from coatcheck.stores.sqlite.statements import COLUMNS
from tests.stores.conftest import StoppedSystem

T = TypeVar("T")
WIDE = RecordLimits(octets=1 << 20, fields=1000)
DAY_US = 24 * 3600 * SECOND_US
HOUR_US = 3600 * SECOND_US


@dataclass(frozen=True, kw_only=True)
class Desk:
    """One file and a way to run coroutines over it, in one colour."""

    colour: Colour
    path: Path
    clock: Clock
    run: Callable[[Coroutine[Any, Any, Any]], Any]

    def store(self, *, deadline: float = 20.0, url: str | None = None) -> SqliteStore:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=StoppedSystem(),
            deadline=deadline,
            clock_offset_us=self.clock,
        )
        return SqliteStore(f"sqlite:///{self.path}" if url is None else url, options)

    def opened(self, *, deadline: float = 20.0) -> SqliteStore:
        store = self.store(deadline=deadline)
        self.run(store.open())
        return store

    def sql(self, statement: str, *values: object) -> list[Any]:
        """What an administrator's shell does to the file beside the store."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            connection.text_factory = bytes
            return connection.execute(statement, values).fetchall()


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    path, clock = tmp_path / "sessions.db", Clock()
    if request.param == "blocking":
        yield Desk(colour="blocking", path=path, clock=clock, run=run_blocking)
        return
    with asyncio.Runner() as runner:
        yield Desk(colour="async", path=path, clock=clock, run=runner.run)


def new_session(number: int = 0, *, tag: int = 7, owner: str = "o" * 43, **more: Any) -> NewSession:
    handle = urlsafe_b64encode(number.to_bytes(12, "big")).decode()
    values: dict[str, Any] = {
        "ref": SessionRef(tag, handle),
        "digest": f"digest-of-session-number-{number:018d}",
        "owner": owner,
        "subject": "ann",
        "idle_us": HOUR_US,
        "absolute_us": 30 * DAY_US,
        "authority": '{"tenant":"authority-text"}',
        "fields": {"cart": '"field-text"'},
    }
    return NewSession(**{**values, **more})


# -- the URL and the file ------------------------------------------------------------------------------------------


def test_relative_and_absolute_paths_are_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert path_of("sqlite:///app.db") == str(tmp_path / "app.db")
    assert path_of("sqlite:////srv/app.db") == "/srv/app.db"
    assert path_of("sqlite:////srv/a%20b%3F.db") == "/srv/a b?.db"
    assert path_of("SQLite:///data/app.db") == str(tmp_path / "data/app.db")


@pytest.mark.parametrize(
    ("url", "cure"),
    [
        ("sqlite:", "memory:"),
        ("sqlite://", "memory:"),
        ("sqlite:///", "memory:"),
        ("sqlite::memory:", "memory:"),
        ("sqlite:///:memory:", "memory:"),
        ("sqlite://app.db", "three slashes"),
        ("sqlite://srv/app.db", "three slashes"),
        ("sqlite:app.db", "sqlite:///app.db"),
        ("sqlite:////srv/", "sqlite:///app.db"),
        ("sqlite:///a%00b", "sqlite:///app.db"),
        ("sqlite:///app.db?mode=ro", "no options"),
        ("sqlite:///app.db#x", "no options"),
    ],
)
def test_other_urls_are_refused_with_the_cure(url: str, cure: str) -> None:
    with pytest.raises(ConfigurationError, match=cure):
        path_of(url)


def test_everything_that_is_made_belongs_to_the_owner_alone(desk: Desk) -> None:
    before = os.umask(0)
    try:
        store = desk.opened()
        desk.run(store.create(new_session()))
        desk.run(store.local_key(b"k" * 32))
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in desk.path.parent.iterdir()}
        desk.run(store.close())
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(["sessions.db", "sessions.db-wal", "sessions.db-shm", "sessions.db.key"], 0o600)


def test_file_names_that_mean_something_in_a_uri_are_only_names(desk: Desk) -> None:
    odd = desk.path.parent / "a b?mode=ro#%41.db"
    store = desk.store(url=f"sqlite:///{str(odd).replace('%', '%25').replace('?', '%3F').replace('#', '%23')}")
    desk.run(store.open())
    desk.run(store.close())
    assert odd.exists()


def test_a_missing_folder_is_named_with_the_cure(desk: Desk) -> None:
    with pytest.raises(ConfigurationError, match="mkdir -p"):
        desk.run(desk.store(url=f"sqlite:///{desk.path.parent}/missing/app.db").open())
    with pytest.raises(ConfigurationError, match="is a folder"):
        desk.run(desk.store(url=f"sqlite:///{desk.path.parent}").open())


def test_a_file_of_another_kind_is_left_alone(desk: Desk) -> None:
    desk.path.write_bytes(b"these are my holiday photographs" * 100)
    with pytest.raises(StoreUnavailable, match="not a database") as caught:
        desk.run(desk.store().open())
    assert isinstance(caught.value.__cause__, sqlite3.Error)
    assert desk.path.read_bytes().startswith(b"these are my holiday")


def test_a_newer_schema_is_refused_and_a_changed_one_too(desk: Desk) -> None:
    desk.run(desk.opened().close())
    desk.sql("insert into coatcheck_migrations values ('store', 99, 'later', 'x', 0)")
    with pytest.raises(ConfigurationError, match="newer release"):
        desk.run(desk.store().open())
    desk.sql("delete from coatcheck_migrations where number = 99")
    desk.sql("update coatcheck_migrations set checksum = 'x'")
    with pytest.raises(ConfigurationError, match="another text"):
        desk.run(desk.store().open())


def test_verbs_of_a_store_that_is_not_open_are_refused(desk: Desk) -> None:
    store = desk.store()
    with pytest.raises(StoreUnavailable, match="not open"):
        desk.run(store.ping())
    assert not desk.path.exists()


# -- the server key ------------------------------------------------------------------------------------------------


def test_the_key_lies_beside_the_data_and_not_in_it(desk: Desk) -> None:
    store = desk.opened()
    assert desk.run(store.local_key(b"first candidate of thirty-two by")) == b"first candidate of thirty-two by"
    assert desk.run(store.local_key(b"2" * 32)) == b"first candidate of thirty-two by"
    desk.run(store.close())
    assert b"first candidate" not in desk.path.read_bytes()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610])
def test_a_key_that_others_can_reach_is_refused(desk: Desk, mode: int) -> None:
    store = desk.opened()
    desk.run(store.local_key(b"1" * 32))
    key = desk.path.with_name("sessions.db.key")
    key.chmod(mode)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        desk.run(store.local_key(b"2" * 32))
    key.chmod(0o400)
    assert desk.run(store.local_key(b"2" * 32)) == b"1" * 32
    desk.run(store.close())


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33])
def test_half_a_key_is_refused_and_never_replaced(desk: Desk, content: bytes) -> None:
    key = desk.path.with_name("sessions.db.key")
    key.write_bytes(content)
    key.chmod(0o600)
    store = desk.opened()
    with pytest.raises(ConfigurationError, match="32 bytes"):
        desk.run(store.local_key(b"2" * 32))
    assert key.read_bytes() == content
    desk.run(store.close())


def test_a_key_that_is_no_file_is_refused(desk: Desk) -> None:
    os.mkfifo(desk.path.with_name("sessions.db.key"), 0o600)
    store = desk.opened()
    with pytest.raises(ConfigurationError, match="not a plain file"):
        desk.run(store.local_key(b"2" * 32))
    desk.run(store.close())


# -- hostile rows --------------------------------------------------------------------------------------------------


HOSTILE: tuple[object, ...] = (
    None,
    b"",
    b"\x00\xff",
    "\x00",
    "text",
    "[]",
    "{}",
    '{"a":1}',
    "[" * 100_000,
    -1,
    2**63 - 1,
    -(2**63),
    1.5,
    float("inf"),
)


@pytest.mark.parametrize("column", [each for each in COLUMNS if each not in ("tag", "handle")])
def test_any_value_in_any_column_raises_nothing_and_stops_nobody(desk: Desk, column: str) -> None:
    store = desk.opened()
    neighbour = new_session(1)
    desk.run(store.create(neighbour))
    for number, value in enumerate((*HOSTILE, None), start=2):
        new = new_session(number)
        desk.run(store.create(new))
        try:
            if number == len(HOSTILE) + 2:
                # Text that is not UTF-8 cannot be bound, only made.
                statement = f"update coatcheck_sessions set {column} = cast(x'ff80' as text) where handle = ?"
                desk.sql(statement, new.ref.handle)
            else:
                desk.sql(f"update coatcheck_sessions set {column} = ? where handle = ?", value, new.ref.handle)
        except sqlite3.IntegrityError:
            assert value is None
        _use_everything(desk, store, new)
        assert isinstance(desk.run(store.load(neighbour.ref, neighbour.digest)), Live), value
    desk.clock.offset_us += 60 * DAY_US
    desk.run(store.sweep(limit=1000))
    assert desk.run(store.sweep(limit=1000)) == 0
    desk.run(store.close())


def _use_everything(desk: Desk, store: SqliteStore, new: NewSession) -> None:
    ref, run = new.ref, desk.run
    loaded = run(store.load(ref, new.digest))
    assert isinstance(loaded, (Live, Aliased, Ended, Absent, Unreadable))
    run(store.touch([Activity(ref=ref, owner=new.owner, seen_us=run(store.ping()))]))
    run(store.list_by_owner(ref.tag, new.owner, after=None, limit=5))
    run(store.scan(after=None, limit=5))
    written = run(store.commit(ref, Changes(put={"a": "1"}), limits=WIDE))
    assert isinstance(written, (Committed, Gone))
    turned = run(store.rotate_id(ref, old_digest=new.digest, new_digest="n" * 43, sealed=b"s", alias_us=1))
    assert isinstance(turned, (Rotated, Gone))
    run(store.expire_idle(ref))
    run(store.revoke(ref, reason="logout"))
    # Whatever it was, it is nobody's session now.
    for digest in (new.digest, "n" * 43, ""):
        assert not isinstance(run(store.load(ref, digest)), (Live, Aliased))
    run(store.sweep(limit=1000))


@pytest.mark.parametrize("check", [check for check in CHECKS if check in NEEDS_BYTES])
def test_the_contract_about_hostile_bytes(desk: Desk, check: Check) -> None:
    async def corrupt(ref: SessionRef, raw: bytes) -> None:
        values = [name for name in COLUMNS if name not in ("tag", "handle", "owner", "due_us", "ended_us", "reason")]
        assignments = ", ".join(f"{name} = :raw" for name in values)
        with closing(sqlite3.connect(desk.path, isolation_level=None)) as connection:
            connection.execute(
                f"update coatcheck_sessions set {assignments} where tag = :tag and handle = :handle",
                {"raw": raw, "tag": ref.tag, "handle": ref.handle},
            )

    bench = Bench(store=desk.store(), other=desk.store(), clock=desk.clock, stopped=True, corrupt=corrupt)
    desk.run(run_check(check, bench))


def test_a_record_of_a_newer_release_is_unreadable_and_can_still_be_ended(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.sql("update coatcheck_sessions set schema = 2")
    assert "schema 2" in desk.run(store.load(new.ref, new.digest)).detail
    # Ending it here must also end it for the node that can read it.
    assert desk.run(store.revoke(new.ref, reason="logout")) == Revoked(ended=True, now_us=desk.run(store.ping()))
    desk.sql("update coatcheck_sessions set schema = 1")
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Ended)
    desk.run(store.close())


def test_damaged_id_keys_are_never_replaced(desk: Desk) -> None:
    store = desk.opened()
    keys = IdKeys(b"a" * 32, b"b" * 32)
    assert desk.run(store.id_keys(keys)) == keys
    desk.sql("update coatcheck_meta set value = x'00' where key = 'id_keys'")
    with pytest.raises(StoreUnavailable, match="damaged"):
        desk.run(store.id_keys(keys))
    assert desk.sql("select value from coatcheck_meta where key = 'id_keys'") == [(b"\x00",)]
    desk.run(store.close())


@pytest.mark.parametrize("value", [b"\xff", "x", 1.5, -1, 2**63 - 1, -(2**63)])
def test_hostile_cuts_and_rates_raise_nothing(desk: Desk, value: object) -> None:
    store, new = desk.opened(), new_session()
    limit = RateLimit(attempts=2, period=60)
    desk.run(store.revoke_owner(new.ref.tag, new.owner, reason="logout"))
    desk.run(store.hit("k", limit))
    desk.sql("update coatcheck_owners set cut_us = ?", value)
    desk.sql("update coatcheck_rate_limits set tat_us = ?", value)
    desk.run(store.create(new))
    assert desk.run(store.hit("k", limit)).allowed
    desk.run(store.revoke_owner(new.ref.tag, new.owner, reason="logout"))
    desk.run(store.sweep(limit=10))
    desk.run(store.close())


@pytest.mark.parametrize("after", ["", ".", "1.", ".A", "1.A'", "-1.A", "1" * 19 + ".A", "1.A\n", "1.A" + "B" * 64])
def test_other_cursors_are_refused(desk: Desk, after: str) -> None:
    store = desk.opened()
    with pytest.raises(ValueRefused):
        desk.run(store.list_by_owner(7, "o" * 43, after=after, limit=5))
    with pytest.raises(ValueRefused):
        desk.run(store.scan(after=after, limit=5))
    desk.run(store.close())


# -- what must not stay --------------------------------------------------------------------------------------------


def test_an_ended_session_leaves_nothing_it_held_in_the_file(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    held = (new.digest, "authority-text", "field-text", "sealed-successor", new.owner)
    desk.run(store.create(new))
    desk.run(
        store.rotate_id(
            new.ref, old_digest=new.digest, new_digest="n" * 43, sealed=b"sealed-successor", alias_us=HOUR_US
        )
    )
    desk.run(store.close())
    before = desk.path.read_bytes()
    assert all(text.encode() in before for text in held)
    desk.run(store.open())
    desk.run(store.revoke(new.ref, reason="logout"))
    desk.run(store.close())
    after = desk.path.read_bytes()
    assert [text for text in (*held, "n" * 43) if text.encode() in after] == []
    assert not desk.path.with_name("sessions.db-wal").exists()


def test_a_sealed_successor_is_erased_when_its_grace_is_over(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    rotation = store.rotate_id(
        new.ref, old_digest=new.digest, new_digest="n" * 43, sealed=b"sealed-successor", alias_us=30 * SECOND_US
    )
    desk.run(rotation)
    desk.clock.offset_us += 30 * SECOND_US - 1
    assert desk.run(store.sweep(limit=10)) == 0
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Aliased)
    desk.clock.offset_us += 1
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Absent)
    assert desk.run(store.sweep(limit=10)) == 0
    assert desk.sql("select sealed, prev_digest from coatcheck_sessions") == [(None, None)]
    assert isinstance(desk.run(store.load(new.ref, "n" * 43)), Live)
    desk.run(store.close())


def test_rate_limit_keys_are_not_kept_in_clear(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.hit("login:ann@example.org:192.0.2.7", RateLimit(attempts=3, period=60)))
    desk.run(store.close())
    assert b"192.0.2.7" not in desk.path.read_bytes()


def test_sweep_forgets_old_cuts_and_idle_rates(desk: Desk) -> None:
    store = desk.opened()
    for number in range(450):
        desk.run(store.hit(f"k{number}", RateLimit(attempts=1, period=60)))
    desk.run(store.revoke_owner(7, "o" * 43, reason="logout"))
    desk.clock.offset_us += DAY_US - 1
    for _ in range(3):
        assert desk.run(store.sweep(limit=10)) == 0
    assert desk.sql("select (select count(*) from coatcheck_rate_limits), count(*) from coatcheck_owners") == [(0, 1)]
    desk.clock.offset_us += 1
    desk.run(store.sweep(limit=10))
    assert desk.sql("select count(*) from coatcheck_owners") == [(0,)]
    desk.run(store.close())


def test_a_touched_session_is_put_off_and_not_removed(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    used = desk.run(store.ping()) + HOUR_US - 1
    desk.clock.offset_us += HOUR_US - 1
    desk.run(store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=used)]))
    desk.clock.offset_us += DAY_US + 1
    assert desk.run(store.sweep(limit=10)) == 0
    assert desk.sql("select due_us from coatcheck_sessions") == [(used + HOUR_US + DAY_US,)]
    desk.clock.offset_us += HOUR_US - 1
    assert desk.run(store.sweep(limit=10)) == 1
    desk.run(store.close())


def test_a_clock_that_is_set_back_revives_nobody(desk: Desk) -> None:
    store, idle, revoked = desk.opened(), new_session(1), new_session(2)
    desk.run(store.create(idle))
    desk.clock.offset_us += 2 * HOUR_US
    desk.run(store.create(revoked))
    desk.run(store.revoke_owner(7, "o" * 43, reason="logout"))
    desk.run(store.revoke(idle.ref, reason="logout"))
    desk.clock.offset_us -= 2 * HOUR_US
    assert desk.run(store.load(idle.ref, idle.digest)).reason == "idle_timeout"
    assert desk.run(store.load(revoked.ref, revoked.digest)).reason == "logout"
    late = desk.run(store.create(new_session(3)))
    assert late.session.created_us > desk.run(store.ping()) + HOUR_US
    desk.run(store.close())


def test_a_repeated_sign_in_answers_alike_even_after_its_session_was_ended(desk: Desk) -> None:
    store = desk.opened()
    old, new = new_session(1), new_session(2)
    desk.run(store.create(old))
    first = desk.run(store.admit(new, maximum=1, on_limit="evict_oldest"))
    assert first.evicted == (old.ref,)
    assert desk.run(store.admit(new, maximum=1, on_limit="evict_oldest")) == first
    desk.run(store.revoke(new.ref, reason="logout"))
    assert desk.run(store.admit(new, maximum=1, on_limit="evict_oldest")) == first
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Ended)
    with pytest.raises(StoreUnavailable, match="handle in use"):
        desk.run(store.create(new_session(2, digest="other")))
    desk.run(store.close())


# -- trouble -------------------------------------------------------------------------------------------------------


def test_a_locked_database_is_unavailable_within_the_deadline_and_can_be_read(desk: Desk) -> None:
    store, new = desk.opened(deadline=2.0), new_session()
    desk.run(store.create(new))
    with closing(sqlite3.connect(desk.path, isolation_level=None)) as other:
        other.execute("begin immediate")
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="locked"):
            desk.run(store.revoke(new.ref, reason="logout"))
        # Below the five seconds that the driver would wait by itself; a busy machine may add to the two.
        assert time.monotonic() - began < 4.5
        assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
        other.execute("rollback")
    assert desk.run(store.revoke(new.ref, reason="logout")).ended
    desk.run(store.close())


def test_a_lock_that_is_let_go_in_time_is_waited_for(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    script = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('begin immediate')"
    script += "; print('locked', flush=True); sys.stdin.readline(); c.execute('commit')"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(desk.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert desk.run(store.create(new)).session.ref == new.ref
    holder.communicate(timeout=20)
    desk.run(store.close())


def test_a_full_disk_is_unavailable_with_its_cause_and_nothing_is_half_written(desk: Desk) -> None:
    store = desk.opened()
    driver = store._driver
    desk.run(driver.aside(lambda c: c.execute("pragma max_page_count=40").fetchall()))
    number = -1

    def fill() -> None:
        nonlocal number
        for number in range(100):
            desk.run(store.create(new_session(number, fields={"x": "y" * 4000})))

    with pytest.raises(StoreUnavailable, match="full") as caught:
        fill()
    assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
    assert isinstance(desk.run(store.load(new_session(number).ref, "")), Absent)
    # The connection that failed was given up; the next has no such limit.
    assert isinstance(desk.run(store.admit(new_session(number), maximum=1, on_limit="allow")), Admitted)
    desk.run(store.close())


def test_a_damaged_page_is_unavailable_and_not_absent(desk: Desk) -> None:
    store = desk.opened()
    for number in range(50):
        desk.run(store.create(new_session(number, fields={"x": "y" * 1000})))
    desk.run(store.close())
    with desk.path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (desk.path.stat().st_size - 4096))
    with pytest.raises(StoreUnavailable, match="malformed") as caught:
        desk.run(_open_and_load(store, new_session(3)))
    assert isinstance(caught.value.__cause__, sqlite3.DatabaseError)
    desk.run(store.close())


async def _open_and_load(store: SqliteStore, new: NewSession) -> None:
    await store.open()
    await store.load(new.ref, new.digest)


# -- other processes -----------------------------------------------------------------------------------------------

_PROCESS = """
import sys
from coatcheck.blocking import run_blocking as run
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Changes, RecordLimits
from coatcheck.core.session import NewSession
from coatcheck.stores.open import open_store
store = open_store(sys.argv[1], colour="blocking", deadline=20)
run(store.open())
wide = RecordLimits(octets=1 << 20, fields=1 << 20)

def new(handle):
    hour = 3600 * 1_000_000
    return NewSession(ref=SessionRef(7, handle), digest="d" * 43, owner="o" * 43, subject="ann", idle_us=hour,
                      absolute_us=hour, authority="{}", fields={})
"""


def _start(desk: Desk, then: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS + then, f"sqlite:///{desk.path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _real(desk: Desk) -> SqliteStore:
    """A store on the machine's clock, like the other process's."""
    from coatcheck.system import REAL

    options = StoreOptions(colour=desk.colour, waits=waits_of(desk.colour), system=REAL, deadline=20.0)
    return SqliteStore(f"sqlite:///{desk.path}", options)


def test_what_one_process_does_the_other_sees_at_once(desk: Desk) -> None:
    other = _start(
        desk,
        """
for line in sys.stdin:
    verb, handle = line.split()
    ref = SessionRef(7, handle)
    if verb == "create": run(store.create(new(handle)))
    if verb == "commit": run(store.commit(ref, Changes(put={"from": '"other"'}), limits=wide))
    if verb == "revoke": run(store.revoke(ref, reason="elsewhere"))
    print(verb, type(run(store.load(ref, "d" * 43))).__name__, flush=True)
""",
    )
    assert other.stdin is not None
    assert other.stdout is not None
    store = _real(desk)
    desk.run(store.open())
    for verb, seen in (("create", "Live"), ("commit", "Live"), ("revoke", "Ended"), ("create", "Ended")):
        other.stdin.write(f"{verb} {'A' * 16}\n")
        other.stdin.flush()
        assert other.stdout.readline() == f"{verb} {seen}\n"
        loaded = desk.run(store.load(SessionRef(7, "A" * 16), "d" * 43))
        assert type(loaded).__name__ == seen
        if verb == "commit":
            assert loaded.session.fields == {"from": '"other"'}
    other.communicate(timeout=20)
    assert other.returncode == 0
    assert desk.run(store.load(SessionRef(7, "A" * 16), "")).reason == "elsewhere"
    desk.run(store.close())


def test_two_processes_commit_to_one_session_and_nothing_is_lost(desk: Desk) -> None:
    store = _real(desk)
    desk.run(store.open())
    ref = SessionRef(7, "A" * 16)
    desk.run(store.create(new_session(ref=ref, fields={})))
    script = """
for number in range(50):
    run(store.commit(SessionRef(7, "A" * 16), Changes(put={f"%s{number}": "1"}), limits=wide))
"""
    others = [_start(desk, script % name) for name in "ab"]
    for number in range(50):
        desk.run(store.commit(ref, Changes(put={f"c{number}": "1"}), limits=WIDE))
    for each in others:
        each.communicate(timeout=60)
        assert each.returncode == 0
    session = desk.run(store.load(ref, new_session().digest)).session
    assert session.version == 151
    assert set(session.fields) == {f"{name}{number}" for name in "abc" for number in range(50)}
    desk.run(store.close())


def test_a_killed_writer_loses_nothing_it_was_told_and_holds_nobody_up(desk: Desk) -> None:
    for round_ in range(3):
        writer = _start(
            desk,
            f"""
handle = "{round_}" * 16
run(store.create(new(handle)))
for number in range(1_000_000):
    run(store.commit(SessionRef(7, handle), Changes(put={{f"n{{number % 200}}": str(number)}}), limits=wide))
    print(number, flush=True)
""",
        )
        assert writer.stdout is not None
        told = -1
        for line in writer.stdout:
            told = int(line)
            if told == 100 + 37 * round_:
                writer.send_signal(signal.SIGKILL)
                break
        writer.communicate(timeout=20)
        assert writer.returncode == -signal.SIGKILL
        store = _real(desk)
        desk.run(store.open())
        loaded = desk.run(store.load(SessionRef(7, f"{round_}" * 16), "d" * 43))
        written = max(int(text) for text in loaded.session.fields.values())
        # More may have been written than was told, never less, and nothing by half.
        assert told <= written
        assert loaded.session.version == written + 2
        assert desk.run(store.revoke(loaded.session.ref, reason="logout")).ended
        desk.run(store.close())
