"""The row "bank": `python -m examples.bank`, and the very commands that it prints, typed in their order.

Two machines are two X-Forwarded-For headers, which the server believes of its own machine alone.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.bank.run import AWAY, NAME
from tests.servers.ports import free_port
from tests.servers.processes import Child, until

ROOT = Path(__file__).parents[2]
EXPECTED = [
    ("the owner signs in", "200", "Login successful"),
    ("it is him", "200", NAME),
    ("the thief's first request", "403", "place_refused"),
    ("the thief knows the password", "403", "place_refused"),
    ("the owner is asked", "403", "step_up_required"),
    ("he gives the password", "200", "Confirmed"),
    ("he is in", "200", NAME),
    ("the copy is dead where the owner is, too", "401", "login_required"),
]


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[list[str]]:
    """What the example prints to be typed; it is ended by Ctrl-C."""
    log = tmp_path / "log"
    child = Child([sys.executable, "-m", "examples.bank", "--port", str(free_port())], log=log, directory=ROOT)
    try:
        child.await_ready(lambda: "Ctrl-C ends it" in log.read_text(), within=60)
        yield re.findall(r"^  (.+)$", log.read_text(), re.MULTILINE)
        child.send(signal.SIGINT)
        until(lambda: not child.running, within=20, what="the end by Ctrl-C")
        assert "Traceback" not in log.read_text()
    finally:
        child.stop()


def test_a_copied_cookie_is_blocked_at_its_first_request_and_the_owner_is_told_and_stays_in(
    commands: list[str], tmp_path: Path
) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        missing = "NOT RUN: the commands of the bank need curl and bash"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    typed = subprocess.run(
        ["bash", "-c", "\n".join(commands)], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    answers = re.split(r"HTTP/1\.1 (?=\d{3} )", typed)[1:]
    assert len(answers) == len(EXPECTED)
    for (step, status, words), answer in zip(EXPECTED, answers, strict=True):
        assert answer.startswith(status), (step, answer)
        assert words in answer, (step, answer)
    _, before, first, second, _, proven, after, _ = answers
    assert sid_of(before) == sid_of(proven) == sid_of(after), "he stays in the same session"
    for refused in (first, second):
        assert NAME not in refused
        assert sid_of(before) not in refused
        assert "set-cookie" not in refused.lower()
    assert f"{AWAY.rpartition('.')[0]}.0/24" in answers[-1], "the account says where it was refused"


def sid_of(answer: str) -> str:
    found = re.search(r'"sid":"([^"]+)"', answer)
    assert found is not None, answer
    return found[1]
