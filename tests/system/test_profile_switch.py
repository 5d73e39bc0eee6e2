"""A deployment moves from `admin` to `b2c` and back while people are using it, and nobody is signed out.

Two `coatcheck serve` processes on one store are restarted under the other profile, one after the other, so that for a
while both profiles answer. Every client does what the how-to page says (`docs/how-to/change-profile.md`): it goes on
with what it has, and asks `POST /api/exchange` when that is not taken. It tries again only where nobody answered at
all, because the server it asked was being restarted; any other answer than that it is signed in counts as a failure.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

import pytest

from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, parse_password
from coatcheck.core.profiles import PROFILES
from coatcheck.server.service import build
from coatcheck.server.settings import ServerSettings
from tests.server.command_parts import COMMAND
from tests.servers.ports import LOOPBACK, PortReservation, reserve_port
from tests.servers.processes import Child, accepts, until

PEOPLE: Final = 40
THREADS: Final = 8
PASSWORD = "tangled lamp under rivers 7"
COOKIE = "coatcheck_session"
REFRESH = "coatcheck_refresh"
ADMIN = PROFILES["admin"]
TURNS = 3
"""Requests each person has made, at the least, before the next server is restarted."""

pytestmark = pytest.mark.xdist_group("profile-switch")


@dataclass(frozen=True)
class Answer:
    status: int
    body: Any
    cookies: Mapping[str, str]


class Deployment:
    """Two servers on one store, and the profile that each of them has at the moment."""

    def __init__(self, home: Path, log: Path, ports: tuple[PortReservation, ...], where: tuple[str, ...]) -> None:
        self.home = home
        self._log = log
        self._where = where
        self._ports = ports
        self._children: dict[int, Child] = {}
        self.ports = tuple(each.port for each in ports)

    def start(self, profile: str, *ports: int) -> None:
        """Start the servers of these ports side by side, and wait until all are ready."""
        for port in ports:
            self._launch(port, profile)
        for port in ports:
            self._await_ready(port)

    def _launch(self, port: int, profile: str) -> None:
        self._children[port] = Child(
            [
                *COMMAND, "serve", "--port", str(port), "--profile", profile, "--home", str(self.home), *self._where,
                "--public-url", f"http://{LOOPBACK}:{self.ports[0]}",
            ],
            log=self._log,
            environment={"COATCHECK_SERVER_KEY": "5b" * 32},
        )  # fmt: skip

    def _await_ready(self, port: int) -> None:
        self._children[port].await_ready(lambda: accepts(port) and ask(port, "GET", "/health/ready").status == 200)

    def restart(self, port: int, profile: str) -> None:
        self._children[port].stop()
        self.start(profile, port)

    def stop(self) -> None:
        # Both are told before either is waited for.
        for child in self._children.values():
            if child.running:
                child.send(signal.SIGTERM)
        for child in self._children.values():
            child.stop()
        for reserved in self._ports:
            reserved.release()

    def told(self) -> set[str]:
        """Every kind of event in the audit log."""
        with closing(sqlite3.connect(self.home / "coatcheck.db")) as connection:
            return {kind for (kind,) in connection.execute("SELECT type FROM coatcheck_audit")}


def ask(port: int, method: str, path: str, *, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    connection = HTTPConnection(LOOPBACK, port, timeout=10)
    given = {"user-agent": "Mozilla/5.0 Firefox/150.0", **(headers or {})}
    if body is not None:
        given["content-type"] = "application/json"
    try:
        connection.request(method, path, None if body is None else json.dumps(body), given)
        answer = connection.getresponse()
        text = answer.read()
        cookies: dict[str, str] = {}
        for line in answer.headers.get_all("set-cookie") or []:
            name, _, value = line.partition(";")[0].partition("=")
            cookies[name] = value
        return Answer(answer.status, json.loads(text) if text else None, cookies)
    finally:
        connection.close()


@dataclass
class Person:
    """Somebody with one browser or client. `is_app`: its pages use tokens where they can; `is_native`: it is no browser
    and keeps its tokens itself; `forgets`: its session cookie is lost whenever there is a refresh token to go on with,
    as by closing the browser."""

    name: str
    deployment: Deployment
    is_app: bool
    is_native: bool
    forgets: bool
    cookies: dict[str, str] = field(default_factory=dict)
    access: str | None = None
    refresh: str | None = None
    sid: str = ""
    turns: int = 0
    exchanges: Counter[str] = field(default_factory=Counter)

    def sign_in(self) -> None:
        answer = self._ask("POST", "/api/login", body={"username": self.name, "password": PASSWORD})
        assert answer.status == 200, answer
        self.sid = answer.body["session"]["sid"]

    def turn(self) -> None:
        """One request that needs somebody signed in."""
        told: list[Answer] = []
        for _ in range(6):
            # The other server may have the other profile: what one gave, the other one does not take.
            bearer = {"authorization": f"Bearer {self.access}"} if self.access is not None else {}
            answer = self._ask("GET", "/api/me", headers=bearer)
            if answer.status == 200:
                assert answer.body["session"]["sid"] == self.sid, answer
                self.turns += 1
                if self.is_app and self.access is None:
                    # What an application's page does when it is opened: are there tokens to be had by now?
                    self._exchange()
                return
            told.append(answer)
            assert answer.status == 401, answer
            # Ended is ended. Everything else says that this server takes another kind of credential.
            assert answer.body["code"] in ("login_required", "invalid_token"), answer
            self._exchange()
        raise AssertionError(f"{self.name} is signed in nowhere: {told}")

    def _exchange(self) -> None:
        body: dict[str, str] | None = None
        if self.is_native:
            body = {"carrier": "body"} if self.refresh is None else {"carrier": "body", "refresh_token": self.refresh}
        answer = self._ask("POST", "/api/exchange", body=body)
        assert answer.status == 200, answer
        assert answer.body["sid"] == self.sid, answer
        self.access = answer.body.get("access_token")
        self.exchanges["to tokens" if self.access else "to a session" if COOKIE in answer.cookies else "nothing"] += 1
        if self.is_native:
            self.refresh = answer.body.get("refresh_token", self.refresh if self.access else None)
            if self.refresh is not None:
                self.cookies.pop(COOKIE, None)
        elif self.forgets and REFRESH in self.cookies:
            self.cookies.pop(COOKIE, None)

    def _ask(self, method: str, path: str, *, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
        """Ask either server; the other one where nobody answers at all."""
        ports = self.deployment.ports if self.turns % 2 else self.deployment.ports[::-1]
        for port in (*ports, *ports):
            given = dict(headers or {})
            if self.cookies:
                given["cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
            try:
                answer = ask(port, method, path, body=body, headers=given)
            except ConnectionError:
                continue
            for name, value in answer.cookies.items():
                if value:
                    self.cookies[name] = value
                else:
                    self.cookies.pop(name, None)
            return answer
        raise AssertionError("no server answers, and one of the two always should")


class Load:
    """Everybody at once, until the end of the block; the first failure of anybody is raised there."""

    def __init__(self, people: list[Person]) -> None:
        self.people = people
        self.failed: list[BaseException] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(people[n::THREADS],)) for n in range(THREADS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=30)
        if self.failed:
            raise self.failed[0]

    def _work(self, mine: list[Person]) -> None:
        try:
            while not self._over.is_set():
                for person in mine:
                    person.turn()
        except BaseException as wrong:
            self.failed.append(wrong)

    def everybody_goes_on(self) -> None:
        """Wait until everybody has been served several times more."""
        wanted = {person.name: person.turns + TURNS for person in self.people}
        until(
            lambda: bool(self.failed) or all(person.turns >= wanted[person.name] for person in self.people),
            within=60,
            what="everybody served",
        )
        assert not self.failed, self.failed[0]


@contextmanager
def deployed(tmp_path: Path, *where: str) -> Iterator[Deployment]:
    home = tmp_path / "home"
    asyncio.run(add_people(home))
    deployment = Deployment(home, tmp_path / "servers.log", (reserve_port(), reserve_port()), where)
    try:
        deployment.start("admin", *deployment.ports)
        yield deployment
    finally:
        deployment.stop()


async def add_people(home: Path) -> None:
    """An account for everybody; all have one password, whose hash is computed once."""
    service = build(ServerSettings(home=home))
    await service.open()
    try:
        secret = parse_password(PASSWORD, policy=service.passwords)
        assert isinstance(secret, Password)
        stored = await service.hasher.hash(secret, known_device=True)
        for number in range(PEOPLE):
            name = parse_user_name(f"person{number}")
            assert isinstance(name, UserName)
            await service.accounts.create_user(name, role="user", password_hash=stored)
    finally:
        await service.close()


def walk(tmp_path: Path, *where: str) -> None:
    with deployed(tmp_path, *where) as deployment:
        first, second = deployment.ports
        people = [
            Person(
                name=f"person{number}",
                deployment=deployment,
                is_app=number % 4 != 0,
                is_native=number % 4 == 2,
                forgets=number % 4 == 3,
            )
            for number in range(PEOPLE)
        ]
        late = Person(name=people[0].name, deployment=deployment, is_app=False, is_native=False, forgets=False)
        for person in people:
            person.sign_in()
        with Load(people) as load:
            load.everybody_goes_on()
            for profile in ("b2c", "admin"):
                for port in (first, second):
                    deployment.restart(port, profile)
                    # While the two differ, and when they agree again.
                    load.everybody_goes_on()
                if profile == "b2c":
                    assert all(person.access is not None for person in people if person.is_app)
                    late.sign_in()
                    assert ends_after(second, late) > ADMIN.absolute_timeout.total_seconds()
        assert all(person.access is None and COOKIE in person.cookies for person in people)
        assert all(person.exchanges["to tokens"] for person in people if person.is_app)
        assert all(person.exchanges["to a session"] for person in people if person.is_native or person.forgets)
        assert not {"session.ended", "refresh.reused"} & deployment.told()
        tightening_holds(deployment, people[0], late)


def tightening_holds(deployment: Deployment, early: Person, late: Person) -> None:
    """Whoever signed in under the looser profile is under the stricter one as soon as that is back."""
    for each in (early, late):
        # Two sessions are one too many for a new sign-in, and no reason to end either of them.
        each.turn()
        assert 0 < ends_after(deployment.ports[0], each) <= ADMIN.idle_timeout.total_seconds()
    newest = Person(name=early.name, deployment=deployment, is_app=False, is_native=False, forgets=False)
    newest.sign_in()
    for each in (early, late):
        over = ask(deployment.ports[0], "GET", "/api/me", headers={"cookie": f"{COOKIE}={each.cookies[COOKIE]}"})
        assert (over.status, over.body["code"], over.body["reason"]) == (401, "session_ended", "session_limit")


def ends_after(port: int, person: Person) -> float:
    """In how many seconds this session ends if nothing more happens."""
    answer = ask(port, "GET", "/api/me", headers={"cookie": f"{COOKIE}={person.cookies[COOKIE]}"})
    assert answer.status == 200, answer
    found: float = answer.body["session"]["expires_at"] - time.time()
    return found


def test_on_one_sqlite_file(tmp_path: Path) -> None:
    walk(tmp_path)


@pytest.mark.servers
def test_on_valkey(tmp_path: Path, valkey_single: Any) -> None:
    valkey_single.flush()
    walk(tmp_path, "--store", valkey_single.url)
