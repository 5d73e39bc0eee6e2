"""`coatcheck risk replay`: what rules would have done about the past."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coatcheck.events import Event, EventKind
from coatcheck.server.audit import AuditLog
from coatcheck.server.database import open_database
from tests.server.command_parts import answer, refused, run

STORE = "sqlite:///.coatcheck/coatcheck.db"
AT = 1_800_000_000.0


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("COATCHECK_"):
            monkeypatch.delenv(name)
    logger = logging.getLogger("coatcheck")
    level = logger.level
    answer("migrate")
    yield
    logger.setLevel(level)


def event(kind: EventKind, at: float, subject: str | None = "50", **data: str) -> Event:
    return Event(kind=kind, at=AT + at, subject=subject, data=data)


def happened(*events: Event) -> None:
    async def write() -> None:
        database = open_database(STORE)
        await database.open()
        try:
            await AuditLog(database).append(events)
        finally:
            await database.close()

    asyncio.run(write())


def rules(text: str) -> Path:
    file = Path("rules.toml")
    file.write_text(text, "utf-8")
    return file


def test_a_replay_shows_what_the_rules_would_have_done_and_to_whom() -> None:
    happened(
        event("session.signed_in", 0, device="a", network="203.0.113.7"),
        event("session.signed_in", 60, subject="51", device="b", network="203.0.113.7"),
        event("session.signed_in", 120, device="b", network="198.51.100.1"),
        event("account.password_changed", 130),
        event("refresh.reused", 180),
    )
    done = answer("risk", "replay")
    assert (done["read"], done["judged"], done["without_place"], done["more"]) == (5, 4, 0, False)
    assert done["outcomes"] == {"notify": 1, "revoke": 1}
    assert [(each["at"], each["subject"], each["reasons"]) for each in done["decisions"]] == [
        (AT + 120, "50", "new_device"),
        (AT + 180, "50", "refresh_reuse"),
    ]
    printed = run("risk", "replay")
    assert "notify" in printed.stdout
    assert "203.0.113.7" not in printed.stdout
    assert "4 of 5 events judged: 1 notify, 1 revoke" in printed.stderr


def test_rules_of_a_file_are_the_only_ones_that_are_on() -> None:
    # The one at second 4 meets the refusal, which is over at second 63.
    happened(*(event("login.failed", at, why="wrong") for at in (0, 1, 2, 3, 4, 63)), event("refresh.reused", 99))
    file = rules('[velocity]\noutcome = "block"\nblock_for = 60\nattempts = 4\n')
    done: Any = answer("risk", "replay", "--rules", str(file))
    assert done["outcomes"] == {"block": 2}
    assert [(each["at"], each["velocity.attempts"]) for each in done["decisions"]] == [(AT + 3, 4), (AT + 63, 5)]
    shortened = answer("risk", "replay", "--rules", str(file), "--limit", "1")
    assert (len(shortened["decisions"]), shortened["more"], shortened["outcomes"]) == (1, True, {"block": 2})


def test_only_failures_at_the_door_are_counted() -> None:
    happened(
        event("login.failed", 0, why="wrong_current_password"),
        event("login.failed", 1, why="changed_meanwhile"),
        event("login.failed", 2, why="wrong"),
        event("login.failed", 3, why="wrong"),
    )
    done = answer("risk", "replay", "--rules", str(rules('[velocity]\noutcome = "notify"\nattempts = 2\n')))
    assert (done["judged"], [each["at"] for each in done["decisions"]]) == (2, [AT + 3])


def test_sign_ins_behind_a_refusal_are_taken_for_not_made() -> None:
    file = rules('[new_country]\noutcome = "block"\nblock_for = 60\n')
    happened(
        event("session.signed_in", 0, device="a", network="203.0.113.7", country="KR"),
        event("session.signed_in", 10, device="b", network="198.51.100.1", country="FR"),
        event("session.signed_in", 20, device="c", network="198.51.100.1", country="KR"),
        event("session.signed_in", 21, device="d", network="198.51.100.2", country="KR"),
        event("session.signed_in", 22, device="a", network="198.51.100.1", country="FR"),
    )
    done = answer("risk", "replay", "--rules", str(file))
    assert done["refused"] == 1
    assert [(each["at"], each["outcome"], each.get("instead_of")) for each in done["decisions"]] == [
        (AT + 10, "block", None),
        (AT + 22, "step_up", "block"),
    ]
    assert "1 sign-ins would have met a refusal" in run("risk", "replay", "--rules", str(file)).stderr


def test_the_rules_of_the_server_are_those_of_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    happened(event("refresh.reused", 0))
    assert answer("risk", "replay")["outcomes"] == {"revoke": 1}
    monkeypatch.setenv("COATCHECK_RISK_RULES", str(rules("[refresh_reuse]\n")))
    assert answer("risk", "replay")["outcomes"] == {"notify": 1}
    monkeypatch.setenv("COATCHECK_RISK_RULES", "nowhere.toml")
    assert "risk rules: nowhere.toml cannot be read" in refused("risk", "replay")


def test_sign_ins_that_tell_no_place_are_counted_and_said() -> None:
    happened(event("session.signed_in", 0), event("session.signed_in", 1, network="\x1b[2J"))
    assert answer("risk", "replay")["without_place"] == 2
    assert "2 sign-ins do not tell where from" in run("risk", "replay").stderr


def test_a_replay_changes_nothing() -> None:
    happened(event("refresh.reused", 0))
    assert answer("risk", "replay") == answer("risk", "replay")


@pytest.mark.parametrize(
    ("text", "told"), [("[teleport]\n", "risk.teleport: no rule of this name"), ("[velocity\n", "is no TOML")]
)
def test_bad_rules_are_refused_in_one_line(text: str, told: str) -> None:
    assert told in refused("risk", "replay", "--rules", str(rules(text)))


def test_rules_that_are_not_there_are_refused_by_their_name() -> None:
    assert "nowhere.toml" in refused("risk", "replay", "--rules", "nowhere.toml")


def test_without_the_reader_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "maxminddb", None)
    assert "pip install 'coatcheck[geo]'" in refused("risk", "replay", "--geo", "city.mmdb")
