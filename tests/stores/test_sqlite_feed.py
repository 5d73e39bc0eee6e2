"""What a near copy is told about one SQLite file: by other processes, by other tools, by writers that die."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import Line, NearTable
from coatcheck.core.ids import GROUP_OF, KEY_OF, IdKeys, SessionId, mint_session_id
from coatcheck.core.near_session import NearSession, pack
from coatcheck.core.ports import Activity, Changes, Colour, Feed, Live, RateLimit, RecordLimits
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.sqlite import SqliteStore
from coatcheck.stores.sqlite import driver as driver_module
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.words import SLOTS, Words, identity_of

WIDE = RecordLimits(octets=1 << 20, fields=1000)
HOUR_US = 3600 * SECOND_US
TAG = 4096 + 7
OWNER = "o" * 43
KEYS = IdKeys(b"t" * 32, b"c" * 32)
NO_NEWS_YET = 60.0


class MovableSystem:
    """Both clocks stand still until a test moves them."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now_us(self) -> int:
        return 1_800_000_000_000_000 + int((self.seconds - 1000.0) * SECOND_US)

    def elapsed(self) -> float:
        return self.seconds

    def random(self, size: int) -> bytes:
        return os.urandom(size)


@dataclass
class Told:
    """A listener that writes down what it hears."""

    heard: list[object] = field(default_factory=list)

    def changed(self, handle: str) -> None:
        self.heard.append(handle)

    def cut_off(self, tag: int) -> None:
        self.heard.append(tag)

    def emptied(self) -> None:
        self.heard.append("emptied")


@dataclass
class Desk:
    """One file, in one colour, and a near table over it."""

    colour: Colour
    path: Path
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    system: MovableSystem = field(default_factory=MovableSystem)
    offset_us: int = 0
    table: NearTable[NearSession] = field(
        default_factory=lambda: NearTable(
            entries=1000, octets=1 << 20, key_of=KEY_OF, group_of=GROUP_OF, mutex=threading.Lock()
        )
    )

    def opened(self, *, deadline: float = 20.0) -> SqliteStore:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=self.system,
            deadline=deadline,
            clock_offset_us=lambda: self.offset_us,
        )
        store = SqliteStore(f"sqlite:///{self.path}", options)
        self.run(store.open())
        return store

    def watched(self, store: SqliteStore, told: Told | None = None) -> tuple[Feed, Line]:
        feed = store.feed(told or Told(), lease=1.0)
        line = self.run(feed.renew(TAG))
        assert line is not None
        return feed, line

    def sql(self, statement: str, *values: object) -> list[Any]:
        """What an administrator's shell does to the file beside the store."""
        with closing(sqlite3.connect(self.path, isolation_level=None)) as connection:
            return connection.execute(statement, values).fetchall()

    def keep(self, store: SqliteStore, feed: Feed, id_: SessionId) -> bool:
        """Read a session as a near store does; whether a copy is kept."""
        line, slot = feed.line(id_.ref.tag), feed.slot(id_.ref.tag)
        assert line is not None
        now = self.system.elapsed()
        fill = self.table.begin(id_.ref.handle.encode(), line, now, slot=slot)
        found = self.run(store.load(id_.ref, id_.digest))
        near = None
        if isinstance(found, Live):
            near = pack(found.session, fill=fill, seen_us=found.seen_us, until=now + 3600, ends=now + 3600)
        return self.table.settle(id_.ref.handle.encode(), fill, near)

    def believes(self, id_: SessionId) -> bool:
        return self.table.look(id_.text.encode(), self.system.elapsed()) is not None


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    path = tmp_path / "sessions.db"
    if request.param == "blocking":
        yield Desk(colour="blocking", path=path, run=run_blocking)
        return
    with asyncio.Runner() as runner:
        yield Desk(colour="async", path=path, run=runner.run)


@pytest.fixture
def blocking(tmp_path: Path) -> Desk:
    return Desk(colour="blocking", path=tmp_path / "sessions.db", run=run_blocking)


def session_id(number: int = 0, *, tag: int = TAG) -> SessionId:
    return mint_session_id(KEYS, tag=tag, handle=number.to_bytes(12, "big"), secret=bytes(24))


def new_session(id_: SessionId, **more: Any) -> NewSession:
    values: dict[str, Any] = {
        "ref": id_.ref,
        "digest": id_.digest,
        "owner": OWNER,
        "subject": "ann",
        "idle_us": HOUR_US,
        "absolute_us": 24 * HOUR_US,
        "authority": "{}",
        "fields": {"cart": "1"},
    }
    return NewSession(**{**values, **more})


def commit(store: SqliteStore, id_: SessionId) -> Coroutine[Any, Any, object]:
    return store.commit(id_.ref, Changes(put={"cart": "2"}), limits=WIDE)


def word(line: Line, tag: int = TAG) -> int:
    assert line.marks is not None
    return line.marks[tag % SLOTS]


# -- what changes a word -------------------------------------------------------------------------------------------


def _evict(store: SqliteStore, id_: SessionId) -> Coroutine[Any, Any, object]:
    return store.admit(new_session(session_id(50)), maximum=1, on_limit="evict_oldest")


def _supersede(store: SqliteStore, id_: SessionId) -> Coroutine[Any, Any, object]:
    return store.admit(new_session(session_id(51)), maximum=9, on_limit="allow", supersedes=id_.ref)


def _rotate(store: SqliteStore, id_: SessionId) -> Coroutine[Any, Any, object]:
    return store.rotate_id(id_.ref, old_digest=id_.digest, new_digest="n" * 43, sealed=b"s", alias_us=SECOND_US)


async def _reuse(store: SqliteStore, id_: SessionId) -> None:
    ref = FamilyRef(tag=id_.ref.tag, of_session=True, root=id_.ref.handle, name="f" * 16)
    await store.create_family(
        NewFamily(
            ref=ref,
            digest="d1",
            owner=OWNER,
            subject="ann",
            client="",
            key="",
            grant="{}",
            idle_us=HOUR_US,
            absolute_us=HOUR_US,
        )
    )
    for generation, digest, successor in ((1, "d1", "d2"), (2, "d2", "d3"), (1, "d1", "d4")):
        await store.rotate_refresh(
            ref, generation=generation, digest=digest, successor=successor, sealed=b"", grace_us=0, client="", key=""
        )


CHANGING: dict[str, Callable[[SqliteStore, SessionId], Coroutine[Any, Any, object]]] = {
    "commit": commit,
    "rotate_id": _rotate,
    "revoke": lambda store, id_: store.revoke(id_.ref, reason="logout"),
    "revoke_owner": lambda store, id_: store.revoke_owner(TAG, OWNER, reason="logout"),
    "an eviction": _evict,
    "a supersession": _supersede,
    "a reused refresh token": _reuse,
}


@pytest.mark.parametrize("verb", CHANGING)
def test_what_changes_a_session_has_changed_its_word_before_it_returns(desk: Desk, verb: str) -> None:
    store, other = desk.opened(), desk.opened()
    feed, line = desk.watched(store)
    id_ = session_id()
    desk.run(other.create(new_session(id_)))
    assert desk.keep(store, feed, id_)
    before = word(line)
    assert desk.believes(id_)
    desk.run(CHANGING[verb](other, id_))
    assert word(line) != before
    assert word(line) % 2 == 0
    assert not desk.believes(id_)
    # And it was announced: nothing else is thrown away at the next beat.
    desk.run(feed.beat())
    assert feed.line(TAG) is line


def test_idle_ends_and_sweeps_change_the_word(desk: Desk) -> None:
    store = desk.opened()
    first, second = session_id(1), session_id(2)
    for each in (first, second):
        desk.run(store.create(new_session(each)))
    desk.system.seconds += 3601
    feed, line = desk.watched(store)
    before = word(line)
    desk.run(store.expire_idle(first.ref))
    after = word(line)
    assert after != before
    desk.system.seconds += 30 * 3600
    assert desk.run(store.sweep(limit=10)) == 2
    assert word(line) != after
    desk.run(feed.beat())
    assert feed.line(TAG) is line


def test_use_and_new_sessions_change_no_word_and_cost_no_copy(desk: Desk) -> None:
    store, other = desk.opened(), desk.opened()
    told = Told()
    feed, line = desk.watched(store, told)
    id_ = session_id()
    desk.run(other.create(new_session(id_)))
    assert desk.keep(store, feed, id_)
    for number in range(1, 20):
        desk.system.seconds += 0.5
        desk.run(other.touch([Activity(ref=id_.ref, owner=OWNER, seen_us=desk.system.now_us())]))
        desk.run(other.create(new_session(session_id(number))))
        desk.run(other.admit(new_session(session_id(100 + number)), maximum=100, on_limit="refuse"))
        desk.run(other.hit("key", RateLimit(attempts=5, period=60.0)))
        desk.run(feed.beat())
        assert desk.believes(id_)
    assert feed.line(TAG) is line
    assert told.heard == []


def test_what_changes_nothing_says_nothing(desk: Desk) -> None:
    store = desk.opened()
    _, line = desk.watched(store)
    id_ = session_id()
    desk.run(store.create(new_session(id_)))
    desk.run(store.revoke(id_.ref, reason="logout"))
    before = word(line)
    desk.run(store.revoke(id_.ref, reason="again"))
    desk.run(commit(store, id_))
    desk.run(store.revoke_owner(TAG, OWNER, reason="again"))
    assert word(line) == before


def test_sessions_of_other_slots_keep_their_copies(desk: Desk) -> None:
    store = desk.opened()
    feed, _ = desk.watched(store)
    here, there, alike = session_id(1), session_id(2, tag=8), session_id(3, tag=7)
    for each in (here, there, alike):
        desk.run(store.create(new_session(each)))
        assert desk.keep(store, feed, each)
    assert feed.slot(TAG) == 7 == feed.slot(7)
    desk.run(commit(store, here))
    assert (desk.believes(here), desk.believes(there), desk.believes(alike)) == (False, True, False)


# -- writers that are at it, fail or die ---------------------------------------------------------------------------


_WRITER = """
import os, sys, time
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.stores import open_store
from coatcheck.stores.sqlite.connection import Connection
from coatcheck.stores.sqlite.words import Words

def stop():
    print("there", flush=True)
    sys.stdin.readline()

real_open, real_close = Words.open, Words.close

def opening(self, slots, *, until):
    opened = real_open(self, slots, until=until)
    if sys.argv[4] == "written":
        stop()
    return opened

def closing(self, opened, *, until):
    if sys.argv[4] == "committed":
        stop()
    return real_close(self, opened, until=until)

Words.open, Words.close = opening, closing
store = open_store(sys.argv[1], colour="blocking", deadline=30)
run_blocking(store.open())
run_blocking(store.revoke(SessionRef(int(sys.argv[2]), sys.argv[3]), reason="logout"))
print("done", flush=True)
"""


@contextmanager
def writer(desk: Desk, id_: SessionId, stops: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that revokes a session and stops on its way."""
    arguments = [sys.executable, "-c", _WRITER, f"sqlite:///{desk.path}", str(id_.ref.tag), id_.ref.handle, stops]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == ("done\n" if stops == "nowhere" else "there\n")
            yield process
        finally:
            process.kill()


def kept_session(desk: Desk, store: SqliteStore, feed: Feed) -> SessionId:
    id_ = session_id()
    desk.run(store.create(new_session(id_)))
    assert desk.keep(store, feed, id_)
    assert desk.believes(id_)
    return id_


def test_another_process_changes_the_word_before_its_verb_returns(blocking: Desk) -> None:
    store = blocking.opened()
    feed, line = blocking.watched(store)
    id_ = kept_session(blocking, store, feed)
    with writer(blocking, id_, "nowhere"):
        assert word(line) % 2 == 0
        assert not blocking.believes(id_)
    blocking.run(feed.beat())
    assert feed.line(TAG) is line


@pytest.mark.parametrize("stops", ["written", "committed"])
def test_while_another_process_writes_the_word_is_odd_and_nothing_is_kept(blocking: Desk, stops: str) -> None:
    store = blocking.opened()
    feed, line = blocking.watched(store)
    id_ = kept_session(blocking, store, feed)
    other = session_id(9)
    with writer(blocking, id_, stops) as process:
        assert word(line) % 2 == 1
        assert not blocking.believes(id_)
        assert not blocking.keep(store, feed, id_)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert word(line) % 2 == 0
    blocking.run(store.create(new_session(other)))
    assert blocking.keep(store, feed, other)


def test_a_fill_that_a_write_overtook_is_not_kept(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    fill = desk.table.begin(id_.ref.handle.encode(), line, desk.system.elapsed(), slot=feed.slot(TAG))
    found = desk.run(store.load(id_.ref, id_.digest))
    desk.run(commit(store, id_))
    near = pack(found.session, fill=fill, seen_us=found.seen_us, until=9e9, ends=9e9)
    assert not desk.table.settle(id_.ref.handle.encode(), fill, near)


@pytest.mark.parametrize("stops", ["written", "committed"])
def test_a_writer_that_is_killed_leaves_no_stale_copy_and_nobody_stuck(desk: Desk, stops: str) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    with writer(desk, id_, stops) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert word(line) % 2 == 1
    assert not desk.believes(id_)
    found = desk.run(store.load(id_.ref, id_.digest))
    assert isinstance(found, Live) is (stops == "written")
    desk.run(feed.beat())
    assert word(line) % 2 == 1
    # What is odd for the second time is closed.
    desk.run(feed.beat())
    assert word(line) % 2 == 0
    assert not desk.believes(id_)
    other = session_id(9)
    desk.run(store.create(new_session(other)))
    assert desk.keep(store, feed, other)


def test_nothing_is_closed_under_a_writer_that_lives(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    with writer(desk, id_, "written") as process:
        odd = word(line)
        for _ in range(4):
            desk.run(feed.beat())
        assert word(line) == odd
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert not desk.believes(id_)


def test_a_repair_before_the_writer_ends_hides_nothing(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    with writer(desk, id_, "committed") as process:
        desk.run(feed.beat())
        desk.run(feed.beat())
        repaired = word(line)
        assert repaired % 2 == 0
        assert not desk.believes(id_)
        assert not desk.keep(store, feed, id_), "it is ended"
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    assert word(line) == repaired, "who is late closes only what he opened"


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_of_unknown_outcome_closes_its_word(desk: Desk, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    before = word(line)

    class Failing(Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql == "commit":
                if when == "after":
                    super().execute(sql)
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *values)

    with monkeypatch.context() as patch:
        patch.setattr(driver_module, "Connection", Failing)
        other = desk.opened()
        with pytest.raises(OutcomeUnknown):
            desk.run(commit(other, id_))
        desk.run(other.close())
    assert word(line) != before
    assert word(line) % 2 == 0
    assert not desk.believes(id_)
    assert desk.keep(store, feed, id_)


def test_work_that_raises_after_it_wrote_changes_no_word(blocking: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    store = blocking.opened()
    feed, line = blocking.watched(store)
    id_ = kept_session(blocking, store, feed)
    before = word(line)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store._denials, "add_session", fail)
    with pytest.raises(KeyboardInterrupt):
        blocking.run(store.revoke(id_.ref, reason="logout"))
    assert word(line) == before
    assert blocking.believes(id_)


# -- the words themselves ------------------------------------------------------------------------------------------


def two_mappings(tmp_path: Path) -> tuple[Words, Words]:
    path = tmp_path / "any.db"
    path.touch()
    identity = identity_of(str(path))
    assert identity is not None
    first, second = Words.of(str(path), identity), Words.of(str(path), identity)
    assert first is not None
    assert second is not None
    return first, second


def soon() -> float:
    return time.monotonic() + 10.0


def test_a_late_writer_does_not_close_what_the_next_one_opened(tmp_path: Path) -> None:
    late, quick = two_mappings(tmp_path)
    opened = late.open({5}, until=soon())
    again = quick.open({5}, until=soon())
    assert opened is not None
    assert again is not None
    late.close(opened, until=soon())
    assert quick.marks[5] == again[5]
    quick.close(again, until=soon())
    assert late.marks[5] % 2 == 0
    assert late.being_written() == {}


def test_without_the_lock_nothing_is_opened_and_nothing_is_closed(tmp_path: Path) -> None:
    first, second = two_mappings(tmp_path)
    opened = first.open({0, SLOTS - 1}, until=soon())
    assert opened is not None
    with second._locked(soon()) as locked:
        assert locked
        assert first.open({3}, until=0.0) is None
        first.close(opened, until=0.0)
    assert second.being_written() == opened
    assert sorted(opened) == [0, SLOTS - 1]
    assert second.marks[3] == 0


def test_words_never_come_back(tmp_path: Path) -> None:
    words, _ = two_mappings(tmp_path)
    seen = {words.marks[1]}
    for _ in range(200):
        opened = words.open({1}, until=soon())
        assert opened is not None
        seen.add(words.marks[1])
        words.close(opened, until=soon())
        seen.add(words.marks[1])
    assert len(seen) == 401


def test_a_writer_that_cannot_announce_in_time_writes_nothing(blocking: Desk) -> None:
    store = blocking.opened(deadline=0.2)
    feed, _ = blocking.watched(store)
    id_ = kept_session(blocking, store, feed)
    identity = identity_of(str(blocking.path))
    assert identity is not None
    words = Words.of(str(blocking.path), identity)
    assert words is not None
    with words._locked(soon()), pytest.raises(StoreUnavailable, match="nothing was written"):
        blocking.run(commit(store, id_))
    found = blocking.run(store.load(id_.ref, id_.digest))
    assert found.session.fields == {"cart": "1"}


def test_the_word_file_is_private_and_lies_beside_its_database(desk: Desk) -> None:
    store = desk.opened()
    desk.watched(store)
    [path] = [each for each in desk.path.parent.iterdir() if "-words-" in each.name]
    state = desk.path.stat()
    assert path.name == f"sessions.db-words-{state.st_dev:x}-{state.st_ino:x}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == 64 + 8 * SLOTS


@pytest.mark.parametrize("harm", ["others can write", "a link", "too short", "another kind", "a folder"])
def test_words_that_cannot_be_trusted_are_no_words(desk: Desk, harm: str) -> None:
    store = desk.opened()
    feed, _ = desk.watched(store)
    desk.run(feed.close())
    desk.run(store.close())
    [path] = [each for each in desk.path.parent.iterdir() if "-words-" in each.name]
    if harm == "others can write":
        path.chmod(0o666)
    elif harm == "too short":
        os.truncate(path, 4096)
    elif harm == "another kind":
        path.write_bytes(b"ccwords9" + path.read_bytes()[8:])
    else:
        path.rename(path.with_name("moved"))
        if harm == "a link":
            path.symlink_to(path.with_name("moved"))
        else:
            path.mkdir()
    store = desk.opened()
    feed = store.feed(Told(), lease=1.0)
    assert desk.run(feed.renew(TAG)) is None
    assert feed.line(TAG) is None
    id_ = session_id()
    desk.run(store.create(new_session(id_)))
    desk.run(commit(store, id_))
    assert desk.sql("select changed, announced from coatcheck_changes") == [(1, 0)]


# -- other tools, other files --------------------------------------------------------------------------------------


FOREIGN = {
    "an end": "update coatcheck_sessions set ended_us = 1, reason = 'x'",
    "a removal": "delete from coatcheck_sessions",
    "a changed field": "update coatcheck_sessions set fields = '{}', version = version + 1",
    "a shorter life": "update coatcheck_sessions set absolute_us = 1",
    "a replaced row": "insert or replace into coatcheck_sessions select * from coatcheck_sessions",
}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_change_by_another_tool_is_noticed_within_one_beat(desk: Desk, change: str) -> None:
    store = desk.opened()
    told = Told()
    feed, line = desk.watched(store, told)
    id_ = kept_session(desk, store, feed)
    desk.sql(FOREIGN[change])
    desk.run(feed.beat())
    assert not desk.believes(id_)
    assert line.broken
    assert told.heard == ["emptied"]
    after = feed.line(TAG)
    assert after is not None
    assert after is not line
    desk.run(feed.beat())
    assert feed.line(TAG) is after, "it is noticed once"


def test_an_announced_change_does_not_hide_a_foreign_one(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_, other = kept_session(desk, store, feed), session_id(2, tag=9)
    desk.run(store.create(new_session(other)))
    desk.sql("update coatcheck_sessions set ended_us = 1 where tag = ?", id_.ref.tag)
    for _ in range(3):
        desk.run(commit(store, other))
    desk.run(feed.beat())
    assert line.broken
    assert not desk.believes(id_)


def test_use_noted_by_another_tool_costs_no_copy(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    desk.sql("update coatcheck_sessions set seen_us = seen_us + 1, due_us = due_us + 1")
    desk.run(feed.beat())
    assert feed.line(TAG) is line
    assert desk.believes(id_)


def test_nothing_is_believed_longer_than_a_lease_without_a_beat(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    desk.sql("delete from coatcheck_sessions")
    desk.system.seconds += 0.999
    assert desk.believes(id_)
    desk.system.seconds = 1001.0
    assert not desk.believes(id_)
    assert not line.broken
    assert feed.line(TAG) is line


def test_a_beat_keeps_the_lease_from_the_moment_it_was_sent(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    desk.system.seconds += 0.7
    desk.run(feed.beat())
    assert line.confirmed == desk.system.seconds
    assert line.until == desk.system.seconds + 1.0


def test_a_backup_put_into_the_same_file_is_another_store(desk: Desk, tmp_path: Path) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    with closing(sqlite3.connect(desk.path)) as now, closing(sqlite3.connect(tmp_path / "old")) as old:
        now.backup(old)
        desk.run(commit(store, id_))
        assert desk.keep(store, feed, id_)
        desk.run(feed.beat())
        old.backup(now)
    desk.run(feed.beat())
    assert not desk.believes(id_)
    after = feed.line(TAG)
    assert after is not None
    assert after.source != line.source


def test_a_replaced_file_ends_the_line_and_is_read_from_then_on(desk: Desk, tmp_path: Path) -> None:
    store = desk.opened()
    told = Told()
    feed, line = desk.watched(store, told)
    id_ = kept_session(desk, store, feed)
    elsewhere = Desk(colour=desk.colour, path=tmp_path / "new.db", run=desk.run, system=desk.system)
    replacement = elsewhere.opened()
    other = session_id(2)
    desk.run(replacement.create(new_session(other)))
    desk.run(replacement.close())
    # With its log, as one has to: SQLite would read the old log into the new file.
    for ending in ("-wal", "-shm"):
        desk.path.with_name(desk.path.name + ending).unlink()
    os.replace(elsewhere.path, desk.path)
    desk.run(feed.beat())
    after = feed.line(TAG)
    assert line.broken
    assert after is not None
    assert after.source != line.source
    assert told.heard == ["emptied"]
    assert not desk.believes(id_)
    assert not isinstance(desk.run(store.load(id_.ref, id_.digest)), Live)
    assert isinstance(desk.run(store.load(other.ref, other.digest)), Live)
    assert desk.keep(store, feed, other)
    desk.run(commit(store, other))
    assert not desk.believes(other), "this store writes into the new file, and tells in its words"


def test_a_file_of_an_older_release_is_brought_up_before_it_is_watched(desk: Desk) -> None:
    store = desk.opened()
    for kind in ("changed", "removed", "overwritten"):
        desk.sql(f"drop trigger coatcheck_sessions_{kind}")
    desk.sql("drop table coatcheck_changes")
    desk.run(store.close())
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    desk.run(commit(store, id_))
    assert not desk.believes(id_)
    assert not line.broken


def test_a_file_that_is_gone_is_not_made_again(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    desk.path.rename(desk.path.with_name("away"))
    desk.run(feed.beat())
    assert feed.line(TAG) is None
    assert line.broken
    assert not desk.believes(id_)
    assert not desk.path.exists()


def test_a_word_file_that_was_removed_and_made_anew_is_noticed(desk: Desk) -> None:
    store, other = desk.opened(), desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    [path] = [each for each in desk.path.parent.iterdir() if "-words-" in each.name]
    path.unlink()
    # This store maps the words for the first time: it speaks where nobody listens.
    desk.run(commit(other, id_))
    desk.run(feed.beat())
    assert line.broken
    assert not desk.believes(id_)
    assert desk.keep(store, feed, id_)
    # From now on all use the new one, who had the old one too.
    desk.run(commit(store, id_))
    assert not desk.believes(id_)
    after = feed.line(TAG)
    desk.run(feed.beat())
    assert feed.line(TAG) is after


def test_a_damaged_count_is_no_line_and_no_error(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    desk.sql("update coatcheck_changes set changed = 'many'")
    desk.run(feed.beat())
    assert line.broken
    assert feed.line(TAG) is None
    desk.sql("update coatcheck_changes set changed = 5, announced = 2")
    desk.run(feed.beat())
    assert feed.line(TAG) is not None


# -- clock, questions, threads and forks ---------------------------------------------------------------------------


def test_a_step_of_the_stores_clock_ends_the_line(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    desk.offset_us = 2 * SECOND_US
    desk.run(feed.beat())
    assert feed.line(TAG) is line
    desk.offset_us = -SECOND_US // 1000
    desk.run(feed.beat())
    assert line.broken
    assert feed.line(TAG) is not None


def test_a_feed_of_a_store_that_is_not_open_has_no_line(desk: Desk) -> None:
    store = desk.opened()
    desk.run(store.close())
    feed = store.feed(Told(), lease=1.0)
    assert desk.run(feed.renew(TAG)) is None
    desk.run(feed.beat())
    assert feed.line(TAG) is None
    desk.run(store.open())
    assert desk.run(feed.renew(TAG)) is feed.line(TAG) is not None


def test_after_a_failure_it_is_not_asked_at_once_again(desk: Desk) -> None:
    store = desk.opened()
    feed = store.feed(Told(), lease=1.0)
    away = desk.path.with_name("away")
    desk.path.rename(away)
    assert desk.run(feed.renew(TAG)) is None
    away.rename(desk.path)
    desk.system.seconds += 0.249
    assert desk.run(feed.renew(TAG)) is None
    desk.system.seconds = 1000.25
    assert desk.run(feed.renew(TAG)) is not None


def test_a_closed_feed_cuts_its_line_and_connects_again_when_used(desk: Desk) -> None:
    store = desk.opened()
    feed, line = desk.watched(store)
    id_ = kept_session(desk, store, feed)
    desk.run(feed.close())
    assert line.broken
    assert feed.line(TAG) is None
    assert not desk.believes(id_)
    assert desk.run(feed.renew(TAG)) is not None


def test_a_line_is_confirmed_while_another_process_holds_the_write_lock(desk: Desk) -> None:
    store = desk.opened(deadline=2.0)
    feed, line = desk.watched(store)
    with closing(sqlite3.connect(desk.path, isolation_level=None)) as holder:
        holder.execute("begin immediate")
        desk.system.seconds += 0.5
        began = time.monotonic()
        desk.run(feed.beat())
        assert time.monotonic() - began < 1.0
        assert line.confirmed == desk.system.seconds
        holder.execute("rollback")


def test_while_one_thread_asks_the_others_get_no_answer(blocking: Desk) -> None:
    store = blocking.opened()
    asked, answer, answers = threading.Event(), threading.Event(), []
    real = store._changes.tally

    def slowly(connection: sqlite3.Connection) -> Any:
        asked.set()
        assert answer.wait(NO_NEWS_YET)
        return real(connection)

    store._changes.tally = slowly  # type: ignore[method-assign]
    feed = store.feed(Told(), lease=1.0)
    thread = threading.Thread(target=lambda: answers.append(run_blocking(feed.renew(TAG))))
    thread.start()
    assert asked.wait(NO_NEWS_YET)
    assert run_blocking(feed.renew(TAG)) is None
    answer.set()
    thread.join()
    assert answers == [feed.line(TAG)]
    assert answers != [None]


def test_threads_that_write_and_beat_together_keep_the_line(blocking: Desk) -> None:
    store = blocking.opened()
    feed, line = blocking.watched(store)
    ids = [session_id(number, tag=number) for number in range(2)]
    for each in ids:
        blocking.run(store.create(new_session(each)))
    failures: list[BaseException] = []

    def work(id_: SessionId) -> None:
        try:
            for _ in range(40):
                run_blocking(commit(store, id_))
                assert not blocking.believes(id_)
                blocking.keep(store, feed, id_)
                run_blocking(feed.beat())
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(each,)) for each in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert feed.line(TAG) is line


_FORK = """
import os, sys
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.stores import open_store

class Told:
    def changed(self, handle): pass
    def cut_off(self, tag): pass
    def emptied(self): pass

store = open_store(sys.argv[1], colour="blocking", deadline=30)
run_blocking(store.open())
feed = store.feed(Told(), lease=1000.0)
line = run_blocking(feed.renew(7))
before = line.marks[7]
read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        assert feed.line(7) is None
        mine = run_blocking(feed.renew(7))
        assert mine is not None and mine is not line and line.broken
        run_blocking(store.revoke(SessionRef(7, sys.argv[2]), reason="logout"))
        assert mine.marks[7] != before
        os.write(write, b"1")
    finally:
        os._exit(0)
os.close(write)
assert os.read(read, 1) == b"1"
os.waitpid(child, 0)
assert line.marks[7] != before and line.marks[7] % 2 == 0
run_blocking(feed.beat())
assert feed.line(7) is line
print("sound")
"""


def test_after_a_fork_the_child_asks_anew_and_the_parent_goes_on(blocking: Desk) -> None:
    store = blocking.opened()
    id_ = session_id(tag=7)
    blocking.run(store.create(new_session(id_)))
    done = subprocess.run(
        [sys.executable, "-c", _FORK, f"sqlite:///{blocking.path}", id_.ref.handle],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("sound\n", "")


# -- torture -------------------------------------------------------------------------------------------------------


_TORTURE = """
import mmap, os, random, struct, sys, threading
from base64 import urlsafe_b64decode
from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import NearTable
from coatcheck.core.ids import GROUP_OF, KEY_OF, IdKeys, group_of, mint_session_id
from coatcheck.core.near_session import pack, unpack
from coatcheck.core.ports import Activity, Changes, Committed, Live, RecordLimits
from coatcheck.stores import open_store
from coatcheck.system import REAL

class Told:
    def changed(self, handle): pass
    def cut_off(self, tag): pass
    def emptied(self): pass

url, ledger_path, place, processes, sessions, rounds = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
with open(ledger_path, "r+b") as file:
    ledger = memoryview(mmap.mmap(file.fileno(), 0)).cast("Q")
keys = IdKeys(b"t" * 32, b"c" * 32)
ids = [mint_session_id(keys, tag=n % 2, handle=n.to_bytes(12, "big"), secret=bytes(24)) for n in range(sessions)]
store = open_store(url, colour="blocking", deadline=30)
run_blocking(store.open())
feed = store.feed(Told(), lease=5.0)
table = NearTable(entries=100, octets=1 << 20, key_of=KEY_OF, group_of=GROUP_OF, mutex=threading.Lock())
limits = RecordLimits(octets=1000, fields=10)
chance = random.Random(place)
hits = 0
print("ready", flush=True)
sys.stdin.readline()
for number in range(rounds):
    which = chance.randrange(sessions)
    id_ = ids[which]
    key = id_.ref.handle.encode()
    if number % 25 == 0:
        run_blocking(feed.beat())
    if number % 10 == 0:
        run_blocking(store.touch([Activity(ref=id_.ref, owner="o" * 43, seen_us=REAL.now_us())]))
    if chance.random() < 0.15:
        done = run_blocking(store.commit(id_.ref, Changes(put={"n": str(number)}), limits=limits))
        assert isinstance(done, Committed), done
        ledger[place * sessions + which] = done.version
        continue
    # Whoever wrote these has been told so: nobody may see less from here on.
    least = max(ledger[each * sessions + which] for each in range(processes))
    now = REAL.elapsed()
    held = table.look(id_.text.encode(), now)
    if held is not None:
        hits += 1
        version = unpack(held, id_.ref.handle).version
        assert version >= least, f"believed {version}, {least} was there"
        continue
    line = feed.line(id_.ref.tag) or run_blocking(feed.renew(id_.ref.tag))
    if line is None:
        continue
    slot = feed.slot(id_.ref.tag)
    fill = table.begin(key, line, now, slot=slot)
    found = run_blocking(store.load(id_.ref, id_.digest))
    assert isinstance(found, Live) and found.session.version >= least
    near = pack(found.session, fill=fill, seen_us=found.seen_us, until=now + 60, ends=now + 60)
    table.settle(key, fill, near)
print(hits, flush=True)
"""


def test_four_processes_never_believe_what_another_has_overwritten(blocking: Desk, tmp_path: Path) -> None:
    processes, sessions, rounds = 4, 4, 1500
    store = blocking.opened()
    for number in range(sessions):
        id_ = mint_session_id(KEYS, tag=number % 2, handle=number.to_bytes(12, "big"), secret=bytes(24))
        blocking.run(store.create(new_session(id_, absolute_us=10**17, idle_us=10**17)))
    ledger = tmp_path / "ledger"
    ledger.write_bytes(bytes(8 * processes * sessions))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _TORTURE, f"sqlite:///{blocking.path}", str(ledger)]
            + [str(each) for each in (place, processes, sessions, rounds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for place in range(processes)
    ]
    for each in running:
        assert each.stdout is not None
        assert each.stdout.readline() == "ready\n"
    for each in running:
        assert each.stdin is not None
        each.stdin.write("go\n")
        each.stdin.flush()
    answers = [each.communicate(timeout=120) for each in running]
    assert [error for _, error in answers] == [""] * processes
    # Words that speak too often would pass too: copies must have been of use.
    assert sum(int(hits) for hits, _ in answers) > rounds // 2
