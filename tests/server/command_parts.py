"""What the tests of the command line share: running it as a user does, a server process, sessions to look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from coatcheck.manager import Coatcheck
from coatcheck.places import ClientPlace
from coatcheck.server.cli.root import coatcheck
from coatcheck.session import SendCookie
from coatcheck.settings import Settings
from tests.servers.processes import Child

PASSWORD = "tangled lamp under rivers 7"
OTHER_PASSWORD = "seven brittle umbrellas hum"
COMMAND = (sys.executable, "-m", "coatcheck")


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The test's environment without settings that happen to be in it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COATCHECK_")}
    return {**kept, **(extra or {})}


def run(*words: str, stdin: str | bytes | None = None, env: Mapping[str, str] | None = None) -> Result:
    """One command in this process."""
    return CliRunner(env=env).invoke(coatcheck, list(words), input=stdin, prog_name="coatcheck")


def answer(*words: str, stdin: str | None = None, status: int = 0) -> Any:
    """What a command prints with `--json`."""
    result = run(*words, "--json", stdin=stdin)
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def refused(*words: str, stdin: str | bytes | None = None, status: int = 2) -> str:
    """The one line of a command that must fail; nothing is on stdout."""
    result = run(*words, stdin=stdin)
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("coatcheck: ")
    return lines[0]


def process(
    *words: str, directory: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """One command as a process of its own, to its end."""
    return subprocess.run(
        [*COMMAND, *words],
        cwd=directory,
        env=clean_environment(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def sign_in(store: str, subject: str, *, user_agent: str = "") -> tuple[str, str]:
    """A session on a store, as a browser would have it: its public handle and its secret id."""
    with Coatcheck(store, settings=Settings(public_url="http://127.0.0.1:8000")) as coat:
        session = coat.session(None, place=ClientPlace(address="203.0.113.7", user_agent=user_agent))
        session.login(subject)
        assert session.sid is not None
        assert isinstance(session.cookie_action, SendCookie)
        return session.sid, session.cookie_action.id.text


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server process that answers."""

    child: Child
    address: str
    lines: Sequence[str]


@contextmanager
def serving(
    *words: str, directory: Path, name: str = "server", env: Mapping[str, str] | None = None
) -> Iterator[Server]:
    """`coatcheck serve` on a free port, from the word that it is ready until the end of the block."""
    log = directory / f"{name}.log"
    child = Child([*COMMAND, "serve", "--port", "0", *words], log=log, directory=directory, environment=env)
    try:
        child.await_ready(lambda: "State is kept in:" in log.read_text())
        lines = log.read_text().splitlines()
        (address,) = [line.partition(": ")[2] for line in lines if line.startswith("Coatcheck is ready: ")]
        child.await_ready(lambda: call(address, "/health/ready")[0] == 200)
        yield Server(child=child, address=address, lines=log.read_text().splitlines())
    finally:
        child.stop()


def call(
    address: str, path: str, body: object = None, *, headers: Mapping[str, str] | None = None
) -> tuple[int, Any, Message]:
    """One HTTP call: status, JSON (or None) and headers."""
    data = None if body is None else json.dumps(body).encode()
    given = {"content-type": "application/json", **(headers or {})} if data is not None else dict(headers or {})
    request = urllib.request.Request(f"{address}{path}", data=data, headers=given)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, _json(response.read()), response.headers
    except urllib.error.HTTPError as error:
        with error:
            return error.code, _json(error.read()), error.headers


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
