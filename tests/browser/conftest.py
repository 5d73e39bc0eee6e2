"""A real server process of our own command line, on a free port, with its state in the test's directory."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.servers.processes import Child

NAME = "haneul"
PASSWORD = "tangled lamp under rivers 7"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that answers."""

    address: str
    set_up_link: str


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """`coatcheck serve`, started as an operator does who has no terminal."""
    home, log = tmp_path / "home", tmp_path / "serve.log"
    command = [sys.executable, "-m", "coatcheck", "serve", "--port", "0", "--home", str(home), "--json"]
    # Several browsers of one person, which the profile of a back office does not allow.
    command += ["--on-limit", "allow"]
    process = Child(command, log=log, directory=tmp_path)
    try:
        process.await_ready(lambda: _announced(log) is not None, within=60)
        said = _announced(log)
        assert said is not None
        yield Served(address=said["address"], set_up_link=Path(said["set_up_file"]).read_text().strip())
    finally:
        process.stop()


def _announced(log: Path) -> dict[str, str] | None:
    for line in log.read_text().splitlines():
        if line.startswith("{") and line.endswith("}"):
            found: dict[str, str] = json.loads(line)
            return found
    return None
