"""The live demonstration: real processes over real stores, what is measured, and that nothing stays behind."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import pytest

from coatcheck.server.cli.demo import demo
from coatcheck.server.demo.measuring import Stage
from coatcheck.server.demo.messages import Revoke, Revoked, SignedIn, SignIn, Warm, Warmed, Watched, Watching
from coatcheck.server.demo.nodes import Node
from coatcheck.server.demo.page import TEXTS
from tests.server.command_parts import COMMAND, call, clean_environment, process, refused
from tests.servers.ports import LOOPBACK, free_port
from tests.servers.processes import until
from tests.servers.valkey import ValkeySingle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "watch-a-revocation.md"
LEASE = 1.0
WITHIN = 20.0


def measured(directory: Path, *words: str) -> Any:
    """What a whole run prints as JSON; it must have ended well and left nothing."""
    done = process("demo", "--json", *words, directory=directory, env={"TMPDIR": str(directory)})
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert not [each["node"] for each in told["nodes"] if is_alive(each["process"])]
    assert list(directory.iterdir()) == []
    return told


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def check_that_nothing_is_lost(told: Any) -> None:
    assert (told["rounds"], told["lost"], len(told["nodes"])) == (3, 0, 2)
    assert [each["ended_on"] for each in told["each"]] == [1, 2, 1]
    for node in told["nodes"]:
        assert 0 < node["last_ms"] <= node["worst_ms"] < LEASE * 1000 + 500
        assert node["median_ms"] <= node["worst_ms"]
        assert (node["lost"], node["commands_asked"], node["feed"]) == (0, 0, "heard")
        assert node["warm_checks"] >= 100


def test_on_a_file_every_node_refuses_and_nothing_is_left(tmp_path: Path) -> None:
    told = measured(tmp_path, "--nodes", "2", "--rounds", "3")
    assert told["store"] == "sqlite"
    check_that_nothing_is_lost(told)


@pytest.mark.servers
def test_on_valkey_every_node_refuses_and_nothing_is_left(tmp_path: Path, valkey_single: ValkeySingle) -> None:
    told = measured(tmp_path, "--nodes", "2", "--rounds", "3", "--store", valkey_single.url)
    assert told["store"] in ("redis", "valkey")
    check_that_nothing_is_lost(told)


@pytest.mark.servers
def test_tables_are_made_on_postgresql(tmp_path: Path, postgres_database: str) -> None:
    check_that_nothing_is_lost(measured(tmp_path, "--nodes", "2", "--rounds", "3", "--store", postgres_database))


def test_a_node_that_hears_nothing_refuses_when_its_lease_is_over(tmp_path: Path) -> None:
    told = measured(tmp_path, "--cut", "--nodes", "2", "--rounds", "1", "--lease", "0.6")
    ending, cut = told["nodes"]
    assert (ending["feed"], ending["rounds"], ending["last_ms"]) == ("heard", 0, None)
    assert (cut["feed"], cut["rounds"], cut["lost"]) == ("cut", 1, 0)
    # It was heard of just before the revoke: nearly the whole lease is left, and it is used.
    assert cut["last_ms"] > 100


def test_without_json_there_is_a_line_a_round_and_a_table(tmp_path: Path) -> None:
    done = process("demo", "--nodes", "2", "--rounds", "1", directory=tmp_path, env={"TMPDIR": str(tmp_path)})
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert lines[0].startswith("2 processes over one store: ")
    assert lines[1:3] == [f"node {n} knows the session: 100 checks, commands asked = 0" for n in (1, 2)]
    assert re.fullmatch(r"round 1: ended on node 1 in [\d.]+ ms; refused by node 2 [\d.]+ ms", lines[3])
    assert lines[4].split()[:5] == ["node", "process", "rounds", "last", "median"]
    assert lines[6].endswith("0     near copy, 0 commands")
    assert lines[7:] == ["sessions ended: 1, refusals measured: 1, refusals lost: 0"]
    assert "\x1b" not in done.stdout


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "cure"),
    [
        (("--nodes", "0"), "--nodes 4"),
        (("--nodes", "1"), "--nodes 4"),
        (("--nodes", "17"), "--nodes 4"),
        (("--rounds", "0"), "--rounds 20"),
        (("--rounds", "1001"), "--rounds 20"),
        (("--lease", "0"), "--lease 1"),
        (("--lease", "nan"), "--lease 1"),
        (("--page", "--port", "65536"), "0 (a free one)"),
        (("--store", "memory:"), "leave --store out"),
        (("--store", "MEMORY:"), "leave --store out"),
        (("--store", "nothing"), "use one of memory, sqlite"),
        (("--store", "sqlite:////not/there/demo.db"), "mkdir -p /not/there"),
    ],
)
def test_what_makes_no_sense_is_one_line_with_the_cure(words: tuple[str, ...], cure: str) -> None:
    assert cure in refused("demo", *words)


@pytest.mark.parametrize("scheme", ["redis", "postgresql"])
def test_a_store_that_does_not_answer_is_one_line_without_its_password(scheme: str) -> None:
    line = refused("demo", "--store", f"{scheme}://someone:hushhush@{LOOPBACK}:{free_port()}/0")
    assert "see that it runs" in line
    assert "hushhush" not in line


# -- the end -------------------------------------------------------------------------------------------------------


@contextmanager
def started(directory: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A demonstration that goes on until it is ended."""
    child = subprocess.Popen(
        [*COMMAND, "demo", "--nodes", "2", *words],
        cwd=directory,
        env=clean_environment({"TMPDIR": str(directory)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def line_of(pipe: IO[str] | None) -> str:
    assert pipe is not None
    return pipe.readline()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_whatever_ends_it_no_process_and_no_file_is_left(number: signal.Signals, tmp_path: Path) -> None:
    with started(tmp_path, "--rounds", "1000") as child:
        pids = [int(word) for word in re.findall(r"\d+", line_of(child.stdout).partition(":")[2])]
        assert len(pids) == 2
        while not line_of(child.stdout).startswith("round 1:"):
            pass
        assert all(map(is_alive, pids))
        assert len(list(tmp_path.iterdir())) == 1
        child.send_signal(number)
        _, told = child.communicate(timeout=WITHIN)
        if number == signal.SIGKILL:
            assert child.returncode == -signal.SIGKILL
        else:
            assert child.returncode == 1
            assert re.fullmatch(r"coatcheck: stopped after \d+ of 1000 rounds\n", told)
        until(lambda: not any(map(is_alive, pids)), within=WITHIN, what="the end of the nodes")
        until(lambda: list(tmp_path.iterdir()) == [], within=WITHIN, what="the end of the files")


def test_a_node_that_dies_ends_the_demonstration_with_one_line(tmp_path: Path) -> None:
    with started(tmp_path, "--rounds", "1000") as child:
        pids = [int(word) for word in re.findall(r"\d+", line_of(child.stdout).partition(":")[2])]
        os.kill(pids[1], signal.SIGKILL)
        _, told = child.communicate(timeout=WITHIN)
        assert (child.returncode, told) == (1, "coatcheck: node 2 has ended by itself\n")
        assert not any(map(is_alive, pids))


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_ends_the_session_for_its_own_address_alone(tmp_path: Path) -> None:
    with started(tmp_path, "--page", "--rounds", "1", "--json") as child:
        address = line_of(child.stderr).partition(": ")[2].strip()
        assert address.startswith(f"http://{LOOPBACK}:")
        with urllib.request.urlopen(f"{address}/events", timeout=WITHIN) as events:

            def rows_when(wanted: str) -> list[str]:
                while True:
                    line = events.readline()
                    assert line, "the stream has ended"
                    if line.startswith(b"data: {"):
                        view = json.loads(line.removeprefix(b"data: "))
                        states = [row["state"] for row in view["rows"]]
                        if states == wanted.split() and view["rounds"].startswith(("1", "2")):
                            return [row["last"] for row in view["rows"]]

            rows_when("in in")
            for strange in (
                {"origin": "https://evil.example"},
                {"origin": "null"},
                {"sec-fetch-site": "cross-site"},
                {"sec-fetch-site": "same-site"},
                {"host": "evil.example"},
                {"host": f"rebound.example:{address.rpartition(':')[2]}"},
            ):
                assert call(address, "/end", {}, headers=strange)[0] == 403, strange
            assert call(address, "/", headers={"host": "evil.example"})[0] == 403
            assert call(address, "/events", headers={"host": "evil.example"})[0] == 403
            assert call(address, "/end")[0] == 405
            assert call(address, "/end", {}, headers={"origin": address, "sec-fetch-site": "same-origin"})[0] == 200
            assert [last.endswith(" ms") for last in rows_when("out here")] == [True, False]
            rows_when("in in")
        child.send_signal(signal.SIGINT)
        told, _ = child.communicate(timeout=WITHIN)
        assert child.returncode == 0
        assert (json.loads(told)["rounds"], json.loads(told)["lost"]) == (2, 0)


def test_the_page_speaks_two_languages_and_runs_nothing_inline(tmp_path: Path) -> None:
    with started(tmp_path, "--page", "--rounds", "1", "--cut", "--json") as child:
        address = line_of(child.stderr).partition(": ")[2].strip()
        for language, button in (("en", "End the session"), ("ko-KR,ko;q=0.9", "세션 끝내기")):
            request = urllib.request.Request(address, headers={"accept-language": language})
            with urllib.request.urlopen(request, timeout=WITHIN) as answer:
                text = answer.read().decode()
                policy = answer.headers["content-security-policy"]
            assert button in text
            assert f'<html lang="{language[:2]}">' in text
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert not re.search(r"<style|<script(?![^>]* src=)| style=| on\w+=", text)
            for link in re.findall(r'(?:src|href)="(/[^"]+)"', text):
                assert call(address, link)[0] == 200, link
        assert call(address, "/demo/page.py")[0] == 404
        assert call(address, "/demo/..%2fpage.py")[0] == 404


def test_both_languages_of_the_page_take_the_same_values() -> None:
    for english, korean in TEXTS.values():
        assert sorted(re.findall(r"{\w+}", english)) == sorted(re.findall(r"{\w+}", korean))


# -- the judgement -------------------------------------------------------------------------------------------------


class Scripted:
    """A node that answers what it was told to."""

    def __init__(self, number: int, found: Watched) -> None:
        self.number, self.pid, self.found = number, 0, found
        self.heard: list[object] = []

    def tell(self, order: object) -> None:
        self.heard = [Watching(), self.found]

    async def hear(self, wanted: type[Any], *, seconds: float = 0.0) -> Any:
        answer = self.heard.pop(0)
        assert isinstance(answer, wanted)
        return answer

    async def ask(self, order: object, wanted: type[Any]) -> Any:
        match order:
            case SignIn():
                return SignedIn(id="id", sid="sid")
            case Warm():
                return Warmed(checks=1, near=1, commands=0)
            case Revoke():
                return Revoked(sent_at=100.0, answered_at=100.5, refused=True)
            case _:
                raise AssertionError(order)


@pytest.mark.parametrize(
    ("refused_at", "accepted_at", "again", "lost"),
    [
        (100.25, 100.2, 0, 0),
        (101.5, 100.999, 0, 0),
        (101.5, 101.0, 0, 1),
        (100.25, 100.2, 1, 1),
        (None, 100.2, 0, 1),
    ],
    ids=["in time", "a slow store after the lease", "accepted a lease later", "taken back", "never refused"],
)
def test_a_refusal_counts_as_lost_when_it_never_came_was_late_or_was_taken_back(
    refused_at: float | None, accepted_at: float, again: int, lost: int
) -> None:
    found = Watched(refused_at=refused_at, accepted_at=accepted_at, checks=1, near=1, commands=1, again=again)
    nodes = cast("list[Node]", [Scripted(1, found), Scripted(2, found)])
    stage = Stage(nodes, lease=LEASE, cut=False)

    async def one_round() -> None:
        await stage.sign_in()
        assert stage.is_signed_in
        assert await stage.end() is not None
        assert await stage.end() is None, "nobody is signed in"

    asyncio.run(one_round())
    assert stage.lost == stage.tallies[2].lost == lost
    assert stage.tallies[2].delays == ([] if refused_at is None else [refused_at - 100.0])
    assert stage.ended_on == 1


# -- the how-to page -----------------------------------------------------------------------------------------------


def test_every_command_of_the_how_to_page_is_one_that_is_understood() -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert {language for language, _ in blocks} == {"sh"}
    lines = [line for _, body in blocks for line in body.splitlines()]
    assert len(lines) == 7
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["coatcheck", "demo"]
        demo.make_context("demo", words[2:]).close()
