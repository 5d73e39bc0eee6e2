"""A process that has only a `Verifier`: it follows a real server and refuses what was ended there within a second.

Three kinds of processes: `coatcheck serve`, the command line, and a service that imports `coatcheck.verifier` alone.
The service answers questions line by line and measures by its own clock, from the moment it is told that the revoke
has returned; it asks again and again and never longer than it was allowed to.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
from base64 import urlsafe_b64decode
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

from tests.servers.ports import free_port
from tests.servers.processes import Child

pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("verifier-process")]

NAME = "ratia"
PASSWORD = "seven quiet otters fold paper"
WITHIN = 1.0
LEASE = 1.5
COATCHECK = (sys.executable, "-m", "coatcheck")

SERVICE = r"""
import json, sys, threading, time
from datetime import timedelta
from coatcheck.verifier import Verifier

for absent in ("stores", "engine", "manager", "issuer", "operations", "server", "session", "web"):
    assert not [name for name in sys.modules if f"{name}.".startswith(f"coatcheck.{absent}.")], absent
assert not {"sqlite3", "asyncio", "redis", "psycopg", "starlette"} & set(sys.modules)

from coatcheck.errors import CoatcheckError

options = json.loads(sys.stdin.readline())
options["feed_lease"] = timedelta(seconds=options["feed_lease"])
pause = threading.Event().wait

def judge(token):
    try:
        verifier.verify(token)
        return {"answer": "accepted", "cause": ""}
    except CoatcheckError as refused:
        return {"answer": refused.code, "cause": getattr(refused, "cause", "")}

def until(wanted, token, within):
    began = time.monotonic()
    while True:
        is_over = time.monotonic() - began > within
        found = judge(token)
        if found["answer"] == wanted or is_over:
            return {**found, "seconds": time.monotonic() - began}
        pause(0.001)

with Verifier(**options) as verifier:
    assert verifier.wait_until_ready(20)
    for line in sys.stdin:
        print(json.dumps(until(**json.loads(line))), flush=True)
"""


class Service:
    """The second process."""

    def __init__(self, issuer: str, credential: str, *, lease: float = 5.0, below: str | None = None) -> None:
        """`below`: the server it follows, if that is not the issuer's own address."""
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVICE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        options = {"issuer": issuer, "audience": issuer, "feed_credential": credential, "feed_lease": lease}
        if below is not None:
            options |= {"jwks_url": f"{below}/.well-known/jwks.json", "feed_url": f"{below}/revocations"}
        self._write(options)

    def expect(self, answer: str, token: str, *, within: float = 0.0) -> tuple[float, str]:
        """Ask about a token until this is the answer; returns after how many seconds it was, and the cause."""
        self._write({"wanted": answer, "token": token, "within": within})
        assert self._process.stdout is not None
        found = json.loads(self._process.stdout.readline())
        assert found["answer"] == answer, found
        return found["seconds"], found["cause"]

    def _write(self, line: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps(line)}\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            try:
                status = self._process.wait(timeout=20)
            finally:
                self._process.kill()
        assert status == 0


class Server:
    """A `coatcheck serve --profile b2c` on a port of its own, which can be killed and started again."""

    def __init__(
        self, directory: Path, *flags: str, issuer: str | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.issuer = issuer or self.address
        self._command = [
            *COATCHECK,
            "serve",
            "--profile",
            "b2c",
            "--max-sessions",
            "20",
            "--port",
            str(self.port),
            "--public-url",
            self.issuer,
        ]
        self._command += flags
        self._log = directory / f"server-{self.port}.log"
        self._environment = environment
        self.start()

    def start(self) -> None:
        self.child = Child(self._command, log=self._log, environment=self._environment)
        self.child.await_ready(lambda: self.ask("GET", "/health/ready")[0] == 200)

    def ask(self, method: str, path: str, *, bearer: str = "", body: Any = None) -> tuple[int, Any]:
        """Status, and JSON or text."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers.get_content_type() else text
        finally:
            connection.close()

    def sign_in(self) -> dict[str, Any]:
        status, tokens = self.ask(
            "POST", "/api/login", body={"username": NAME, "password": PASSWORD, "carrier": "body"}
        )
        assert status == 200, tokens
        return dict(tokens)

    def refresh(self, refresh_token: str) -> dict[str, Any]:
        status, tokens = self.ask("POST", "/api/refresh", body={"refresh_token": refresh_token, "carrier": "body"})
        assert status == 200, tokens
        return dict(tokens)

    def revoke(self, administrator: Mapping[str, Any], sid: str) -> None:
        what = {"sid": sid, "reason": "left"}
        done = self.ask("POST", "/api/admin/revoke", bearer=administrator["access_token"], body=what)
        assert done == (200, {"ended": 1})

    def counted(self) -> Counter[str]:
        """Refresh tokens that were presented since the start, by what became of them."""
        pattern = r'^coatcheck_token_refreshes_total\{result="(\w+)"\} (\S+)$'
        found = re.findall(pattern, str(self.ask("GET", "/metrics")[1]), re.MULTILINE)
        return Counter({result: int(float(number)) for result, number in found})

    def kids(self) -> list[str]:
        return [key["kid"] for key in self.ask("GET", "/.well-known/jwks.json")[1]["keys"]]


def coatcheck(*words: str, stdin: str = "", environment: Mapping[str, str] | None = None) -> Any:
    """One command to its end; what it prints with --json."""
    done = subprocess.run(
        [*COATCHECK, *words, "--json"],
        input=stdin,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@contextmanager
def serving(directory: Path) -> Iterator[tuple[Server, str, list[str]]]:
    """A server with an administrator; also a feed credential, and the flags that lead the command line to it."""
    where = ["--home", str(directory / "home")]
    coatcheck("user", "add", NAME, "--role", "admin", "--password-stdin", *where, stdin=PASSWORD)
    credential = coatcheck("client", "add", "orders", *where)["feed_credential"]
    server = Server(directory, *where)
    try:
        yield server, credential, where
    finally:
        server.child.stop()


def test_ten_revoked_sessions_are_refused_within_a_second(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, credential, _), Service(server.issuer, credential) as service:
        administrator = server.sign_in()
        sessions = [server.sign_in() for _ in range(10)]
        for each in sessions:
            service.expect("accepted", each["access_token"])
        delays = []
        for number, each in enumerate(sessions):
            server.revoke(administrator, each["session"]["sid"])
            seconds, cause = service.expect("invalid_token", each["access_token"], within=WITHIN)
            assert cause == "denied_sid"
            delays.append(seconds)
            for other in sessions[number + 1 :]:
                service.expect("accepted", other["access_token"])
        service.expect("accepted", administrator["access_token"])
        print("refused after (ms):", *(f"{seconds * 1000:.1f}" for seconds in delays))
        assert max(delays) <= WITHIN


def test_a_server_that_is_killed_lets_nobody_in_until_it_is_back(tmp_path: Path) -> None:
    with serving(tmp_path) as (server, credential, where), Service(server.issuer, credential, lease=LEASE) as service:
        stays, leaves = server.sign_in(), server.sign_in()
        for each in (stays, leaves):
            service.expect("accepted", each["access_token"])
        server.child.kill()
        silent, _ = service.expect("revocations_unknown", stays["access_token"], within=LEASE)
        print(f"silent {silent:.3f} s after the kill, with a lease of {LEASE} s")
        # What is ended while nobody tells it counts from the first word on.
        coatcheck("session", "revoke", leaves["session"]["sid"], *where)
        service.expect("revocations_unknown", leaves["access_token"])
        server.start()
        back, _ = service.expect("accepted", stays["access_token"], within=10)
        print(f"accepted again {back:.3f} s after the server was ready")
        service.expect("invalid_token", leaves["access_token"])


def test_a_key_that_is_rotated_and_withdrawn_on_the_command_line(tmp_path: Path) -> None:
    """A server that runs reads the ring again within 30 seconds; this one is started anew instead of waited for."""
    with serving(tmp_path) as (server, credential, where):
        tokens = server.sign_in()
        (old,) = server.kids()
        new = coatcheck("key", "rotate", *where)["key"]["kid"]
        server.child.kill()
        server.start()
        assert set(server.kids()) == {old, new}
        with Service(server.issuer, credential, lease=LEASE) as service:
            # The new one is published, so that every verifier has it before it signs; until then the old one does.
            again = server.refresh(tokens["refresh_token"])
            assert [kid_of(each["access_token"]) for each in (tokens, again)] == [old, old]
            for each in (tokens, again):
                service.expect("accepted", each["access_token"])
            assert coatcheck("key", "retire", old, "--yes", *where) == {"retired": old, "signing": new}
            seconds, cause = service.expect("invalid_token", tokens["access_token"], within=WITHIN)
            print(f"refused {seconds * 1000:.1f} ms after the withdrawal: {cause}")
            service.expect("invalid_token", again["access_token"])
            server.child.kill()
            server.start()
            assert server.kids() == [new]
            after = server.refresh(tokens["refresh_token"])["access_token"]
            assert kid_of(after) == new
            service.expect("accepted", after, within=10)
            service.expect("invalid_token", again["access_token"])


def kid_of(token: str) -> str:
    """The key that signed a token, as its header names it."""
    header = token.partition(".")[0]
    return str(json.loads(urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"])


def test_two_servers_on_one_valkey_refresh_in_turn_and_a_revoke_on_one_reaches_who_follows_the_other(
    tmp_path: Path, valkey_single: Any
) -> None:
    valkey_single.flush()
    where = ["--home", str(tmp_path / "home"), "--store", valkey_single.url]
    environment = {"COATCHECK_SERVER_KEY": secrets.token_hex(32)}
    add = ("user", "add", NAME, "--role", "admin", "--password-stdin", *where)
    coatcheck(*add, stdin=PASSWORD, environment=environment)
    credential = coatcheck("client", "add", "orders", *where, environment=environment)["feed_credential"]
    with ExitStack() as stack:
        # Without grace every exchange is a rotation: each server goes on where the other one has left off.
        flags = [*where, "--reuse-grace", "0"]
        one = Server(tmp_path, *flags, environment=environment)
        stack.callback(lambda: one.child.stop())
        two = Server(tmp_path, *flags, issuer=one.issuer, environment=environment)
        stack.callback(lambda: two.child.stop())
        service = stack.enter_context(Service(one.issuer, credential, below=two.address))

        administrator = one.sign_in()
        tokens = two.sign_in()
        sid, seen = tokens["session"]["sid"], {tokens["refresh_token"]}
        for turn in range(20):
            tokens = (one, two)[turn % 2].refresh(tokens["refresh_token"])
            seen.add(tokens["refresh_token"])
            service.expect("accepted", tokens["access_token"])
        assert len(seen) == 21
        assert (one.counted(), two.counted()) == ({"rotated": 10}, {"rotated": 10})

        one.revoke(administrator, sid)
        seconds, cause = service.expect("invalid_token", tokens["access_token"], within=WITHIN)
        print(f"refused {seconds * 1000:.1f} ms after the revoke on the other server: {cause}")
        for server in (one, two):
            body = {"refresh_token": tokens["refresh_token"], "carrier": "body"}
            status, problem = server.ask("POST", "/api/refresh", body=body)
            assert (status, problem["code"], problem["reason"]) == (401, "session_ended", "left")
        service.expect("accepted", administrator["access_token"])
