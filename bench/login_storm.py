"""Does a storm of sign-ins hold up everybody else on the same event loop, and what becomes of the excess?

One real server on SQLite, in this process: its middlewares, limits, accounts, one thread that hashes (argon2id, 19 MiB,
two passes) behind a queue with a bound. A task that wants to wake up every millisecond notes how late it is, in phases
that take turns: nobody comes; nobody comes, but one thread hashes all the time, which shows what the machine does to
any loop beside a busy thread; and a storm. There several times as many people sign in each second as one thread can
hash for, each from an address of his own, so that nothing but the queue holds them back; one in five mistypes, and one
address guesses at many accounts until its own limit is reached. They come when they come, and wait for nobody.

Then the same storm meets a queue with sixteen threads: what the setting is for. Decides nothing about how late is too
late.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import urlsplit

from bench.harness import Answer, Figure, Figures
from bench.traffic import NotMeasured
from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, parse_password
from coatcheck.server.app import create_app
from coatcheck.server.password_hashing import HashingQueue, PasswordHasher
from coatcheck.server.service import Service, build
from coatcheck.server.settings import ServerSettings

PASSWORD: Final = "tangled lamp under rivers 7"
ACCOUNTS: Final = 400
TICK_SECONDS: Final = 0.001
PHASE_SECONDS: Final = 1.5
PHASES: Final = 4
CROWDED_PHASES: Final = 1
A_SECOND: Final = 150
GUESSER: Final = "203.0.113.66"
PATIENCE_SECONDS: Final = 60.0


def run(*, rounds: int, full: bool) -> list[Answer]:
    """One table for the queue as it is, one for a queue as it should not be."""
    times = 6 if full else 1
    crowded = HashingQueue(threads=16, waiting=128)
    # A warning for each sign-in that is refused is right in a server; here it would be measured as well.
    logging.disable(logging.ERROR)
    try:
        return [
            asyncio.run(_measure(HashingQueue(), PHASES * times, "the default queue, one thread")),
            asyncio.run(_measure(crowded, CROWDED_PHASES * times, "sixteen threads")),
        ]
    finally:
        logging.disable(logging.NOTSET)


@dataclass(kw_only=True)
class Seen:
    """What the phases came to; of each phase, how late the loop was each time it came round, in seconds."""

    quiet: list[list[float]] = field(default_factory=list)
    hashing: list[list[float]] = field(default_factory=list)
    stormy: list[list[float]] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    waits: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    under_way: int = 0
    most_under_way: int = 0
    most_waiting: int = 0
    without_retry_after: int = 0


class Storm:
    """Who signs in, and as whom."""

    def __init__(self, service: Service, app: Any, seen: Seen) -> None:
        self._app = app
        self._seen = seen
        self._hasher = service.hasher
        self._origin = service.settings.browser_url
        self._turn = count()
        self._chance = Random(20261123)

    async def blow(self, seconds: float) -> None:
        """Let people sign in for so long, then wait until everybody has an answer."""
        begun = time.perf_counter()
        under_way: list[asyncio.Task[None]] = []
        while (gone := time.perf_counter() - begun) < seconds:
            while len(under_way) < gone * A_SECOND:
                under_way.append(asyncio.create_task(self._one(next(self._turn))))
            await asyncio.sleep(self._chance.random() * 2 / A_SECOND)
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*under_way)

    async def _one(self, number: int) -> None:
        guesses = number % 5 == 4
        address = GUESSER if guesses else f"198.18.{number // 250 % 250}.{number % 250 + 1}"
        password = "not it, not it at all" if guesses or number % 5 == 0 else PASSWORD
        begun = time.perf_counter()
        self._seen.under_way += 1
        self._seen.most_under_way = max(self._seen.most_under_way, self._seen.under_way)
        status, headers = await _post(
            self._app, self._origin, address, {"username": _name(number % ACCOUNTS), "password": password}
        )
        self._seen.under_way -= 1
        taken = time.perf_counter() - begun
        self._seen.most_waiting = max(self._seen.most_waiting, self._hasher.waiting)
        self._seen.statuses[status] += 1
        (self._seen.waits if status in (200, 401) else self._seen.refusals).append(taken)
        if status in (429, 503) and b"retry-after" not in headers:
            self._seen.without_retry_after += 1


async def _measure(queue: HashingQueue, phases: int, name: str) -> Figures:
    seen = Seen()
    with TemporaryDirectory() as directory:
        service = build(ServerSettings(home=Path(directory) / "home"))
        object.__setattr__(service, "hasher", PasswordHasher(queue=queue))
        app = create_app(service)
        async with app.router.lifespan_context(app):
            await _fill(service)
            storm = Storm(service, app, seen)
            # Once before it counts: what is imported, compiled and opened at first use.
            await _once(storm, seen)
            gc.collect()
            gc.freeze()
            try:
                for _ in range(phases):
                    async with _ticking(seen.quiet):
                        await asyncio.sleep(PHASE_SECONDS)
                    async with _ticking(seen.hashing):
                        await _hash_alone(service)
                    async with _ticking(seen.stormy):
                        await storm.blow(PHASE_SECONDS)
            finally:
                gc.unfreeze()
            bound = service.hasher.capacity
    return _table(name, queue, bound, phases, seen)


async def _hash_alone(service: Service) -> None:
    """Hash one after the other in the server's own thread, for one phase."""
    secret = Password(PASSWORD.encode())
    begun = time.perf_counter()
    while time.perf_counter() - begun < PHASE_SECONDS:
        await service.hasher.hash(secret, known_device=True)


async def _once(storm: Storm, seen: Seen) -> None:
    await storm.blow(0.2)
    if not seen.statuses[200]:
        raise NotMeasured(f"nobody could sign in: {dict(seen.statuses)}")
    seen.statuses.clear()
    seen.waits.clear()
    seen.refusals.clear()


def _table(name: str, queue: HashingQueue, bound: int, phases: int, seen: Seen) -> Figures:
    quiet, hashing, stormy = ([_p99(late) for late in each] for each in (seen.quiet, seen.hashing, seen.stormy))
    beyond = statistics.median(storm - 2 * still for storm, still in zip(stormy, quiet, strict=True))
    ours = statistics.median(storm - alone for storm, alone in zip(stormy, hashing, strict=True))
    strangers = bound - bound // 4
    came, refused = sum(seen.statuses.values()), seen.statuses[429] + seen.statuses[503]
    others = came - refused - seen.statuses[200] - seen.statuses[401]
    rows = [
        _lateness("quiet", seen.quiet),
        _lateness("one thread hashes, nobody comes", seen.hashing),
        _lateness("storm", seen.stormy),
        Figure(name="storm less twice quiet, p99", value=beyond, unit="ms", note="median of the phases"),
        Figure(name="storm less one thread that hashes, p99", value=ours, unit="ms", note="median of the phases"),
        Figure(name="sign-ins tried", value=came, unit="", note=f"{came / (phases * PHASE_SECONDS):.0f} a second"),
        Figure(name="answered 200", value=seen.statuses[200], unit=""),
        Figure(name="answered 401", value=seen.statuses[401], unit=""),
        Figure(name="refused with 503", value=seen.statuses[503], unit="", note="the queue is full"),
        Figure(name="refused with 429", value=seen.statuses[429], unit="", note="too many from that address"),
        Figure(name="answered anything else", value=others, unit=""),
        Figure(name="refused without Retry-After", value=seen.without_retry_after, unit=""),
        Figure(name="most hashes under way or waiting", value=seen.most_waiting, unit="", note=f"room for {strangers}"),
        Figure(name="most requests under way", value=seen.most_under_way, unit=""),
        Figure(name="an answer after a hash, p50", value=_median(seen.waits), unit="ms"),
        Figure(name="an answer after a hash, p99", value=_p99(seen.waits), unit="ms"),
    ]
    if len(seen.refusals) > 1:
        rows.append(Figure(name="a refusal, p50", value=_median(seen.refusals), unit="ms"))
    return Figures(
        question=f"A login storm on a serving event loop: {name}",
        rows=tuple(rows),
        facts={
            "phases": f"{phases} of each, {PHASE_SECONDS:g} s and until everybody has an answer, in turn",
            "threads that hash": queue.threads,
            "room in the queue": f"{bound}, a quarter of it for devices that are known",
            "the loop is to wake up": f"every {TICK_SECONDS * 1000:g} ms",
        },
    )


def _lateness(phase: str, phases: Sequence[Sequence[float]]) -> Figure:
    late = [each for times in phases for each in times]
    note = f"median of the phases; of all {len(late):,} times half {_median(late):.2f}, longest {max(late) * 1000:.0f}"
    return Figure(
        name=f"event loop late, {phase}, p99", value=statistics.median(map(_p99, phases)), unit="ms", note=note
    )


def _median(values: Sequence[float]) -> float:
    return statistics.median(values) * 1000


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98] * 1000


@asynccontextmanager
async def _ticking(phases: list[list[float]]) -> AsyncIterator[None]:
    """Within: note how much later than wished the loop comes round."""
    late: list[float] = []
    phases.append(late)

    async def tick() -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            late.append(max(0.0, time.perf_counter() - due))

    ticker = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticker.cancel()


# -- accounts and requests ------------------------------------------------------------------------------------------


def _name(number: int) -> str:
    return f"visitor{number:04d}"


async def _fill(service: Service) -> None:
    """Accounts, all with one password: hashing it for each of them would take longer than the storm."""
    secret = parse_password(PASSWORD, policy=service.passwords)
    if not isinstance(secret, Password):
        raise NotMeasured("the benchmark's own password is refused")
    stored = await service.hasher.hash(secret, known_device=True)
    for number in range(ACCOUNTS):
        name = parse_user_name(_name(number))
        if not isinstance(name, UserName):
            raise NotMeasured("the benchmark's own names are refused")
        await service.accounts.create_user(name, role="user", password_hash=stored)


async def _post(app: Any, origin: str, address: str, body: dict[str, str]) -> tuple[int, frozenset[bytes]]:
    """Sign in over the JSON interface; the status, and which headers came with it."""
    octets, host = json.dumps(body).encode(), urlsplit(origin).netloc
    status, names = 0, frozenset[bytes]()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": octets, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, names
        if message["type"] == "http.response.start":
            status, names = message["status"], frozenset(name.lower() for name, _ in message["headers"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": urlsplit(origin).scheme,
        "path": "/api/login",
        "raw_path": b"/api/login",
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", host.encode()),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(octets)).encode()),
            (b"user-agent", b"curl/8.5.0"),
        ],
        "client": (address, 40_000),
        "server": (host.partition(":")[0], 80),
    }
    await app(scope, receive, send)
    return status, names
