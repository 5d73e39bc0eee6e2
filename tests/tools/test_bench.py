"""What the benchmark reports rests on these: rounds, ratios, what is kept, and a load that counts what it got."""

from __future__ import annotations

import json
import types
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import __main__ as front
from bench.harness import (
    FEWEST_ROUNDS,
    Answer,
    Candidate,
    Figure,
    Figures,
    Rate,
    Rates,
    Result,
    Row,
    compare,
    load,
    save,
    share,
    show,
)
from bench.load import Connection, Load
from bench.traffic import (
    SEVENTH,
    NotMeasured,
    forged,
    hold_answer,
    hold_refusal,
    subject,
    with_bearer,
    with_cookie,
)

ROW = Row(name="ours", median_us=2.0, low_us=1.0, high_us=3.0, ratio=1.5, over_us=1.0, adds=1.0, cpu_ratio=1.4)
ANSWERS: list[Answer] = [
    Result(question="how long", rows=(ROW,), rounds=9, facts={"sessions": 1000}, yardstick="ours"),
    Rates(
        question="how many", rows=(Rate(name="bare", median=9.5, low=9.0, high=10.0, ratio=1.0, p50_ms=1.0),), rounds=3
    ),
    Figures(question="how much", rows=(Figure(name="a session", value=412.5, unit="octets"),)),
]


def _spin(count: int) -> None:
    for _ in range(count):
        sum(range(50))


def _spin_more(count: int) -> None:
    _spin(count * 20)


def test_every_group_has_a_module() -> None:
    for group in (*front.GROUPS, *front.ONLY_FULL):
        assert find_spec(f"bench.{group}") is not None, group


def test_the_default_run_keeps_below_a_quarter_of_an_hour() -> None:
    assert sum(front.GROUPS.values()) < 15 * 60


def test_what_coatcheck_adds_is_the_measure_of_what_the_others_add() -> None:
    found = compare(
        "?",
        [
            Candidate(name="bare", run=lambda count: None, repeat=50),
            Candidate(name="ours", run=_spin, repeat=50),
            Candidate(name="theirs", run=_spin_more, repeat=50),
        ],
        rounds=9,
        yardstick="ours",
    )
    bare, ours, theirs = found.rows
    assert bare.ratio == 1
    assert bare.adds == 0
    assert ours.adds == 1
    assert theirs.adds is not None
    assert theirs.adds > 5


def test_what_costs_nothing_is_no_measure() -> None:
    found = compare("?", [Candidate(name="bare", run=_spin)], rounds=1, yardstick="bare")
    assert found.rows[0].adds is None


def test_a_share_that_is_used_up_still_pays_for_the_fewest_rounds() -> None:
    with share(0):
        assert compare("?", [Candidate(name="bare", run=_spin)], rounds=99).rounds == FEWEST_ROUNDS
    with share(None):
        assert compare("?", [Candidate(name="bare", run=_spin)], rounds=7).rounds == 7


def test_a_candidate_is_prepared_before_every_timed_run() -> None:
    steps: list[str] = []
    candidate = Candidate(name="x", run=lambda _: steps.append("run"), prepare=lambda: steps.append("prepare"))
    compare("?", [candidate], rounds=2)
    assert steps == ["prepare", "run"] * 3


def test_what_was_kept_is_read_back_as_it_was(tmp_path: Path) -> None:
    where, found = load(save(ANSWERS, tmp_path, "x"))
    assert found == ANSWERS
    assert [show(each, where) for each in found] == [show(each) for each in ANSWERS]


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"results": []}))
    with pytest.raises(ValueError, match="another version"):
        load(path)


def test_every_table_says_when_and_on_what_it_was_taken() -> None:
    for answer in ANSWERS:
        text = show(answer)
        assert "CPython" in text
        assert "cores" in text
        assert "starlette " in text


class Group(types.ModuleType):
    """A group that counts how often it was measured."""

    def __init__(self) -> None:
        super().__init__("group")
        self.runs = 0

    def run(self, *, rounds: int, full: bool) -> list[Answer]:
        self.runs += 1
        return ANSWERS


def test_a_full_run_does_not_measure_again_what_is_finished_unless_it_is_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group = Group()
    for again, runs in ((False, 1), (False, 1), (True, 2)):
        front.run_part(group, "", "group", tmp_path, full=True, again=again)
        assert group.runs == runs
        assert "how much" in capsys.readouterr().out


def test_a_default_run_always_measures(tmp_path: Path) -> None:
    group = Group()
    for _ in range(2):
        front.run_part(group, "", "group", tmp_path, full=False, again=False)
    assert group.runs == 2


def test_a_run_that_was_killed_leaves_no_half_answer(tmp_path: Path) -> None:
    group = Group()
    (tmp_path / "group.partial").write_text("{")
    front.run_part(group, "", "group", tmp_path, full=True, again=False)
    assert group.runs == 1
    assert load(tmp_path / "group.json")[1] == ANSWERS


# -- what a fair request is -----------------------------------------------------------------------------------------


def test_every_request_carries_seven_cookies() -> None:
    for headers in (with_cookie("sid=x"), with_bearer("token")):
        assert dict(headers)["cookie"].count("=") == 7
    assert SEVENTH in dict(with_bearer("token"))["cookie"]
    assert "; sid=x;" in dict(with_cookie("sid=x"))["cookie"]


def test_a_forged_credential_differs_in_one_letter_that_is_not_the_last() -> None:
    for credential in ("A" * 64, "name=" + "b" * 43):
        wrong = forged(credential)
        different = [place for place, pair in enumerate(zip(credential, wrong, strict=True)) if len(set(pair)) == 2]
        assert len(different) == 1
        assert different[0] < len(credential) - 2


def test_a_candidate_that_lets_the_wrong_one_in_is_not_measured() -> None:
    hold_answer("x", (200, subject(3).encode(), []), 3)
    hold_refusal("x", (401, b"", []))
    with pytest.raises(NotMeasured):
        hold_answer("x", (200, subject(4).encode(), []), 3)
    with pytest.raises(NotMeasured):
        hold_answer("x", (401, b"", []), 3)
    with pytest.raises(NotMeasured):
        hold_refusal("x", (200, subject(3).encode(), []))


# -- the load that stands in for wrk --------------------------------------------------------------------------------


class Wire:
    """What a connection writes."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent.append(data)

    def close(self) -> None:
        self.closed = True


def test_the_next_request_waits_for_the_whole_answer() -> None:
    burst, wire = Load([b"one", b"two"]), Wire()
    connection = Connection(burst)
    connection.connection_made(wire)
    for piece in (b"HTTP/1.1 200 OK\r\nContent-Le", b"ngth: 4\r\n\r", b"\n12", b"3"):
        connection.data_received(piece)
        assert wire.sent == [b"one"]
    connection.data_received(b"4")
    assert wire.sent == [b"one", b"two"]
    assert len(burst.seconds) == 1
    assert not burst.refused


def test_a_refusal_is_counted_and_so_is_a_lost_connection() -> None:
    burst, wire = Load([b"one"]), Wire()
    connection = Connection(burst)
    connection.connection_made(wire)
    connection.data_received(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n")
    connection.connection_lost(None)
    assert (burst.refused, burst.lost) == (1, 1)


def test_an_answer_without_a_body_is_whole_at_once_and_nothing_is_asked_after_the_end() -> None:
    burst, wire = Load([b"one"]), Wire()
    connection = Connection(burst)
    connection.connection_made(wire)
    burst.over = True
    connection.data_received(b"HTTP/1.1 204 No Content\r\n\r\n")
    connection.connection_lost(None)
    assert wire.sent == [b"one"]
    assert wire.closed
    assert (burst.refused, burst.lost) == (0, 0)
