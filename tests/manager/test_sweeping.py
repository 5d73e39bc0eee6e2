"""Whoever leaves something behind in a store cleans up after it, without being asked."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from coatcheck import Coatcheck, Settings
from coatcheck.blocking import run_blocking
from coatcheck.engine import SWEEP_SECONDS
from coatcheck.testing import FakeSystem, command_budget

DAY = timedelta(days=1)


@pytest.fixture(params=["memory", "sqlite"])
def coat(request: pytest.FixtureRequest, tmp_path: Path) -> Coatcheck:
    url = "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'sessions.db'}"
    return Coatcheck(url, settings=Settings(rotation_alias=timedelta(seconds=10)), system=FakeSystem())


def clock_of(coat: Coatcheck) -> FakeSystem:
    assert isinstance(coat.engine.system, FakeSystem)
    return coat.engine.system


def wants_upkeep(coat: Coatcheck) -> bool:
    return coat.engine.wants_upkeep


def upkeep(coat: Coatcheck) -> list[str]:
    with command_budget(coat, at_most=9) as counted:
        run_blocking(coat.engine.maintain())
    return [verb for verb in counted.verbs if verb not in ("id_keys", "read_ring")]


def test_a_process_that_only_reads_never_sweeps(coat: Coatcheck) -> None:
    with coat:
        assert coat.session(None).subject is None
        assert not wants_upkeep(coat)
        clock_of(coat).advance(SWEEP_SECONDS)
        assert upkeep(coat) == []


def test_a_sign_in_is_followed_by_one_sweep_a_minute_later_and_not_earlier(coat: Coatcheck) -> None:
    with coat:
        coat.session(None).login("50")
        clock_of(coat).advance(SWEEP_SECONDS - 0.001)
        assert upkeep(coat) == []
        assert wants_upkeep(coat)
        clock_of(coat).advance(0.001)
        assert upkeep(coat) == ["sweep"]
        assert not wants_upkeep(coat)
        clock_of(coat).advance(SWEEP_SECONDS)
        assert upkeep(coat) == []


def test_what_the_sweep_removes_is_gone_from_the_store(coat: Coatcheck) -> None:
    with coat:
        coat.session(None).login("50")
        clock_of(coat).advance(2 * DAY)
        coat.session(None).login("51")
        clock_of(coat).advance(SWEEP_SECONDS)
        assert upkeep(coat) == ["sweep"]
        assert run_blocking(coat.engine.store.sweep(limit=10)) == 0, "nothing was left for a second one"


def test_a_rotation_just_before_a_sweep_asks_for_another(coat: Coatcheck) -> None:
    with coat:
        session = coat.session(None)
        session.login("50")
        clock_of(coat).advance(SWEEP_SECONDS - 1)
        session.rotate()
        clock_of(coat).advance(1)
        assert upkeep(coat) == ["sweep"]
        assert wants_upkeep(coat), "the sealed successor was still within its window"
        clock_of(coat).advance(SWEEP_SECONDS)
        assert upkeep(coat) == ["sweep"]
        assert not wants_upkeep(coat)


def test_what_ends_faster_than_one_sweep_takes_is_swept_again_at_once(
    coat: Coatcheck, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coatcheck.engine.SWEEP_LIMIT", 2)
    with coat:
        for _ in range(3):
            session = coat.session(None)
            session.login("50")
            session.logout()
        clock_of(coat).advance(2 * DAY)
        assert upkeep(coat) == ["sweep"]
        assert wants_upkeep(coat)
        # A second later, not a minute.
        clock_of(coat).advance(1)
        assert upkeep(coat) == ["sweep"]
        assert not wants_upkeep(coat)
