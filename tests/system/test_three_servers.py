"""Three `coatcheck serve` processes behind a real nginx: one sign-in, known on all of them, ended on all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from coatcheck.server.settings import ServerSettings
from tests.servers.ports import free_port
from tests.servers.processes import Child, accepts

PASSWORD = "seven quiet otters fold paper"
COOKIE = "coatcheck_session"
REACH = ServerSettings().lease.total_seconds()

pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("three-servers")]


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    headers: dict[str, str]

    @property
    def cookie(self) -> str:
        return self.headers["set-cookie"].split(";")[0]


def ask(port: int, method: str, path: str, *, cookie: str = "", body: Any = None) -> Answer:
    connection = HTTPConnection("127.0.0.1", port, timeout=10)
    headers = {"Cookie": cookie} if cookie else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
        found: dict[str, str] = {}
        for name, value in answer.getheaders():
            # The device cookie comes second; the session's is the one these tests follow.
            found.setdefault(name.lower(), value)
            if name.lower() == "set-cookie" and value.startswith(COOKIE):
                found["set-cookie"] = value
        return Answer(answer.status, json.loads(text) if text else None, found)
    finally:
        connection.close()


def coatcheck(*words: str, password: str | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coatcheck", *words],
        input=password,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONWARNINGS": "default"},
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def three_servers(tmp_path: Path, *, store: str, database: str | None, public_port: int) -> Iterator[dict[int, Child]]:
    home = tmp_path / "home"
    where = ["--home", str(home), "--store", store, *(["--database", database] if database else [])]
    if database is not None or store.startswith("postgresql"):
        coatcheck("migrate", *where)
    coatcheck("user", "add", "ratia", "--role", "admin", "--password-stdin", *where, password=PASSWORD + "\n")
    with ExitStack() as stack:
        servers: dict[int, Child] = {}
        for number in range(3):
            port = free_port()
            child = Child(
                [
                    sys.executable, "-m", "coatcheck", "serve", "--port", str(port), *where,
                    "--public-url", f"http://127.0.0.1:{public_port}",
                ],
                log=tmp_path / f"server-{number}.log",
            )  # fmt: skip
            stack.callback(child.stop)
            servers[port] = child
        for port, child in servers.items():
            child.await_ready(lambda port=port: is_ready(port))  # type: ignore[misc]
        yield servers


def is_ready(port: int) -> bool:
    if not accepts(port):
        return False
    try:
        return ask(port, "GET", "/health/ready").status == 200
    except OSError:
        return False


def nginx_configuration(public_port: int, ports: list[int]) -> str:
    upstreams = "\n".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=30s;" for port in ports)
    return f"""
        upstream coatcheck {{ {upstreams} }}
        server {{
            listen 127.0.0.1:{public_port};
            location / {{
                proxy_pass http://coatcheck;
                proxy_http_version 1.1;
                proxy_set_header Host $host;
                proxy_set_header X-Forwarded-For $remote_addr;
                proxy_next_upstream error timeout;
                proxy_connect_timeout 2s;
                add_header X-Upstream $upstream_addr always;
            }}
        }}
    """


def walk(tmp_path: Path, nginx_with: Callable[..., Any], *, store: str, database: str | None = None) -> None:
    public = free_port()
    with three_servers(tmp_path, store=store, database=database, public_port=public) as servers:
        nginx_with(nginx_configuration(public, list(servers)), ports=[public])
        signed_in = ask(public, "POST", "/api/login", body={"username": "ratia", "password": PASSWORD})
        assert signed_in.status == 200, signed_in
        held = signed_in.cookie
        served: Counter[str] = Counter()
        for _ in range(300):
            answer = ask(public, "GET", "/api/me", cookie=held)
            assert answer.status == 200, answer
            assert answer.body["user"]["name"] == "ratia"
            served[answer.headers["x-upstream"]] += 1
        assert set(served) == {f"127.0.0.1:{port}" for port in servers}
        assert min(served.values()) >= 50

        killed, *others = servers
        servers[killed].kill()
        for _ in range(30):
            assert ask(public, "GET", "/api/me", cookie=held).status == 200, "a dead server signs nobody out"

        assert ask(others[0], "POST", "/api/logout", cookie=held).status == 200
        reached = time.monotonic() + REACH
        for port in others:
            # Told by push, as a rule within milliseconds; what is promised is that a request which is sent after the
            # reach is refused.
            is_last = False
            while (refused := ask(port, "GET", "/api/me", cookie=held)).status == 200 and not is_last:
                is_last = time.monotonic() >= reached
            assert (refused.status, refused.body["code"]) == (401, "session_ended")
        assert ask(public, "GET", "/api/me", cookie=held).status == 401


def test_on_one_valkey(tmp_path: Path, nginx_with: Callable[..., Any], valkey_single: Any) -> None:
    valkey_single.flush()
    walk(tmp_path, nginx_with, store=valkey_single.url)


def test_on_a_cluster(tmp_path: Path, nginx_with: Callable[..., Any], valkey_cluster: Any) -> None:
    valkey_cluster.flush()
    walk(tmp_path, nginx_with, store=valkey_cluster.url)


def test_through_sentinel(tmp_path: Path, nginx_with: Callable[..., Any], valkey_sentinel: Any) -> None:
    valkey_sentinel.flush()
    walk(tmp_path, nginx_with, store=valkey_sentinel.url)


def test_on_postgresql(tmp_path: Path, nginx_with: Callable[..., Any], postgres_database: str) -> None:
    walk(tmp_path, nginx_with, store=postgres_database, database=postgres_database)
