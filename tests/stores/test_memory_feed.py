"""What a near copy is told about the sessions of its own process."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.freshness import FOR_EVER, Line
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Activity, Changes, Colour, Feed, RecordLimits
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.stores.memory import MemoryStore
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from tests.stores.conftest import StoppedSystem

WIDE = RecordLimits(octets=1000, fields=10)
HOUR_US = 3600 * SECOND_US
OWNER = "o" * 43


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
    """An open store with a feed on it, in one colour."""

    run: Callable[[Coroutine[Any, Any, Any]], Any]
    colour: Colour
    told: Told = field(default_factory=Told)
    offset_us: int = 0

    def __post_init__(self) -> None:
        self.store = MemoryStore(
            StoreOptions(
                colour=self.colour,
                waits=waits_of(self.colour),
                system=StoppedSystem(),
                clock_offset_us=lambda: self.offset_us,
            )
        )
        self.run(self.store.open())
        self.feed: Feed = self.store.feed(self.told, lease=1.0)

    def line(self) -> Line:
        line = self.run(self.feed.renew(7))
        assert isinstance(line, Line)
        return line

    def create(self, number: int, *, owner: str = OWNER) -> SessionRef:
        new = new_session(number, owner=owner)
        self.run(self.store.create(new))
        return new.ref


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    if request.param == "blocking":
        yield Desk(run_blocking, "blocking")
        return
    with asyncio.Runner() as runner:
        yield Desk(runner.run, "async")


def new_session(number: int, *, owner: str = OWNER) -> NewSession:
    return NewSession(
        ref=SessionRef(7, f"{number:016d}"),
        digest=f"{number:043d}",
        owner=owner,
        subject="ann",
        idle_us=HOUR_US,
        absolute_us=24 * HOUR_US,
        authority="{}",
        fields={},
    )


def test_the_lease_never_runs_out_and_there_are_no_marks(desk: Desk) -> None:
    assert desk.feed.line(7) is None
    line = desk.line()
    assert line.until == FOR_EVER
    assert line.is_fresh(1e18)
    assert line.marks is None
    assert desk.feed.slot(7) == 0
    desk.run(desk.feed.beat())
    desk.feed.drain()
    assert desk.feed.line(65535) is line


def test_whoever_changes_a_session_has_told_of_it_before_the_verb_returns(desk: Desk) -> None:
    desk.line()
    store, heard = desk.store, desk.told.heard
    one, two, three, four = (desk.create(number) for number in range(4))
    assert heard == []
    desk.run(store.commit(one, Changes(put={"a": "1"}), limits=WIDE))
    assert heard == [one.handle]
    desk.run(
        store.rotate_id(one, old_digest=f"{0:043d}", new_digest="n" * 43, sealed=b"", alias_us=0, authority='{"a":1}')
    )
    assert heard == [one.handle] * 2
    desk.run(store.revoke(one, reason="logout"))
    assert heard == [one.handle] * 3
    desk.run(store.admit(new_session(9), maximum=9, on_limit="allow", supersedes=two))
    assert heard[3:] == [two.handle]
    desk.run(store.admit(new_session(10), maximum=3, on_limit="evict_oldest"))
    assert heard[4:] == [three.handle]
    desk.run(store.revoke_owner(7, OWNER, reason="logout"))
    assert sorted(map(str, heard[5:])) == [four.handle, f"{9:016d}", f"{10:016d}"]


def test_idle_ends_and_removals_are_told(desk: Desk) -> None:
    one, two = desk.create(1), desk.create(2)
    desk.offset_us = HOUR_US
    desk.line()
    desk.run(desk.store.expire_idle(one))
    assert desk.told.heard == [one.handle]
    desk.offset_us = 30 * HOUR_US
    assert desk.run(desk.store.sweep(limit=10)) == 2
    assert sorted(map(str, desk.told.heard[1:])) == [one.handle, two.handle]


def test_use_new_sessions_and_what_changes_nothing_are_not_told(desk: Desk) -> None:
    desk.line()
    ref = desk.create(1)
    desk.run(desk.store.touch([Activity(ref=ref, owner=OWNER, seen_us=2**60)]))
    desk.run(desk.store.commit(ref, Changes(), limits=WIDE, expected=99))
    desk.run(desk.store.revoke(SessionRef(7, "x" * 16), reason="logout"))
    desk.run(desk.store.expire_idle(ref))
    assert desk.told.heard == []


def test_every_feed_is_told_and_a_closed_one_no_more(desk: Desk) -> None:
    ref, other = desk.create(1), Told()
    feed = desk.store.feed(other, lease=1.0)
    line = desk.line()
    second = desk.run(feed.renew(7))
    desk.run(feed.close())
    assert second.broken
    assert not line.broken
    desk.run(desk.store.commit(ref, Changes(put={"a": "1"}), limits=WIDE))
    assert (desk.told.heard, other.heard) == ([ref.handle], [])
    assert desk.run(feed.renew(7)) is not None
    desk.run(desk.store.commit(ref, Changes(put={"a": "2"}), limits=WIDE))
    assert (desk.told.heard, other.heard) == ([ref.handle] * 2, [ref.handle])


def test_a_step_of_the_clock_ends_the_line(desk: Desk) -> None:
    line = desk.line()
    desk.offset_us = 2 * SECOND_US
    assert desk.line() is line
    desk.offset_us = 4 * SECOND_US + 1000
    assert desk.line() is not line
    assert line.broken


def test_a_closed_store_has_no_line(desk: Desk) -> None:
    line = desk.line()
    desk.run(desk.store.close())
    assert desk.feed.line(7) is None
    assert desk.run(desk.feed.renew(7)) is None
    assert line.broken
    desk.run(desk.store.open())
    assert desk.line() is not line


_FORK = """
import os
from coatcheck.blocking import run_blocking
from coatcheck.stores import open_store
from tests.stores.test_memory_feed import Told

store = open_store("memory:", colour="blocking")
run_blocking(store.open())
feed = store.feed(Told(), lease=1.0)
line = run_blocking(feed.renew(7))
child = os.fork()
if child == 0:
    sound = feed.line(7) is None and run_blocking(feed.renew(7)) is None and line.broken
    run_blocking(feed.close())
    os._exit(0 if sound else 1)
assert os.waitpid(child, 0)[1] == 0
assert feed.line(7) is line and not line.broken
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_has_no_line() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
