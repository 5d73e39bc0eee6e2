"""How late does a revoke reach each of four processes, and is one ever lost?

Four nodes keep near copies of all sessions and go on checking them; a fifth process ends the sessions one by one.
Before each revoke or after it, as it falls, the same process tells four bare subscribers something, which do nothing
else than note when they hear it: redis-py's publish and subscribe on Valkey, NOTIFY and LISTEN on PostgreSQL. Both
delays run from just before the command is sent, on the boot clock, which all processes of a machine share. SQLite has
no messages, so nothing to compare with.

A session counts as refused by a node when a check of it is not answered from the copy any more and the store, asked
then or at the end, says that it is over. Decides nothing about how good that is.

`python -m bench.revocations KIND URL` is one of the processes: it reads what to watch as one line of JSON, answers
"ready", and after another line tells what it saw.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final

import psycopg
from redis.asyncio import Redis as AsyncRedis

from bench.check import read_all
from bench.harness import Answer, Figure, Figures
from bench.traffic import NotMeasured, sign_in_async
from coatcheck import AsyncCoatcheck, Coatcheck, Settings
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import parse_session_id
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.near import NearStore
from coatcheck.stores.open import open_store
from coatcheck.system import REAL
from tests.servers.postgres import Postgres
from tests.servers.valkey import ValkeySingle

PARTS = ("valkey", "threads", "postgres", "sqlite")

NODES: Final = 4
THREADS: Final = 4
CHANNEL: Final = "bench_revocations"
NEIGHBOURS: Final = 8
"""So many sessions before and after the one that is next are checked each time."""

ASKED_SHARE: Final = 0.1
"""For so many revokes more, before the others, each node asks the store at once, as when a request comes."""

MOST_SECONDS: Final = 8.0
"""After so long a busy machine is let off the rest, where nothing is said of how many revokes there must be."""

BETWEEN_SECONDS: Final = 0.002
SETTLE_SECONDS: Final = 1.5
PATIENCE_SECONDS: Final = 60.0

now: Final = REAL.elapsed


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What watches, how often each node checks in seconds, and which subscriber it is held against."""

    node: str
    pace: float
    control: str | None
    about: str


KINDS: Final = {
    "valkey": Kind(node="tasks", pace=0.005, control="subscribe", about="asyncio"),
    "threads": Kind(node="threads", pace=0.001, control="subscribe", about=f"{THREADS} threads in each process"),
    "postgres": Kind(node="tasks", pace=0.005, control="listen", about="asyncio"),
    "sqlite": Kind(node="untold", pace=0.0005, control=None, about="asyncio"),
}


def run(*, rounds: int, full: bool, part: str) -> list[Answer]:
    """One store's table."""
    count = (2_000 if part == "valkey" else 300) * (5 if full else 1)
    most = None if full or part == "valkey" else MOST_SECONDS
    with ExitStack() as stack:
        if part == "sqlite":
            url, version = f"sqlite:///{Path(stack.enter_context(TemporaryDirectory())) / 'sessions.db'}", "SQLite"
        elif part == "postgres":
            server = stack.enter_context(Postgres(log_statements=False))
            url, version = server.create_database(), f"{server.version}, fsync off"
            store = open_store(url, colour="blocking", namespace=settings().namespace)
            run_blocking(getattr(store, "migrate")())  # noqa: B009
            run_blocking(store.close())
        else:
            valkey = stack.enter_context(ValkeySingle())
            url, version = valkey.url, valkey.version
        return [asyncio.run(_measure(KINDS[part], url, version, count, most))]


def settings() -> Settings:
    """The settings of every process here: the defaults."""
    return Settings(namespace="bench", server_key=b"k" * 32)


# -- the process that revokes ---------------------------------------------------------------------------------------


class Watcher:
    """One of the processes that watch."""

    def __init__(self, kind: str, url: str, watched: Sequence[object]) -> None:
        words = [sys.executable, "-m", "bench.revocations", kind, url]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._say(json.dumps(watched))

    def _say(self, line: str) -> None:
        if self._process.stdin is None:
            raise NotMeasured("a watching process cannot be spoken to")
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _heard(self) -> str:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            raise NotMeasured(f"a watching process ended with {self._process.wait(PATIENCE_SECONDS)}")
        return line

    def await_ready(self) -> None:
        """Wait until it watches. Raises: NotMeasured."""
        self._heard()

    def finish(self, revoked: int) -> dict[str, Any]:
        """What it saw; so many were ended. Raises: NotMeasured."""
        self._say(str(revoked))
        seen: dict[str, Any] = json.loads(self._heard())
        return seen

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


Tell = Callable[[int], Awaitable[object]]


async def _measure(kind: Kind, url: str, version: str, count: int, most: float | None) -> Figures:
    asked = int(count * ASKED_SHARE)
    total = asked + count
    async with AsyncExitStack() as stack:
        coat = await stack.enter_async_context(AsyncCoatcheck(url, settings=settings()))
        # Some are never ended: their copies must go on being believed.
        values = await sign_in_async(coat, range(total + NEIGHBOURS))
        sids = [_sid(coat, value) for value in values]
        tell = await _teller(stack, kind, url)
        watched = {"values": values, "total": total, "asked": asked, "pace": kind.pace}
        nodes = [Watcher(kind.node, url, [watched]) for _ in range(NODES)]
        subscribers = [Watcher(kind.control, url, [total]) for _ in range(NODES)] if kind.control else []
        for each in (*nodes, *subscribers):
            stack.callback(each.close)
        for each in (*nodes, *subscribers):
            await asyncio.to_thread(each.await_ready)
        gc.collect()
        gc.freeze()
        try:
            sent, returned, told = await _revoke_all(coat, sids[:total], tell, most, asked * 2)
        finally:
            gc.unfreeze()
        await asyncio.sleep(SETTLE_SECONDS)
        seen = [await asyncio.to_thread(each.finish, len(sent)) for each in nodes]
        heard = [(await asyncio.to_thread(each.finish, len(sent)))["heard"][: len(sent)] for each in subscribers]
    return _table(kind, version, asked, sent, returned, told, seen, heard)


def _sid(coat: AsyncCoatcheck, value: str) -> str:
    id_ = parse_session_id(coat.engine.keys, value.encode())
    if id_ is None:
        raise NotMeasured("an id that was just made cannot be read")
    return coat.engine.sid(id_.ref)


async def _teller(stack: AsyncExitStack, kind: Kind, url: str) -> Tell | None:
    """How subscribers are told a number."""
    if kind.control == "subscribe":
        client = AsyncRedis.from_url(url)
        stack.push_async_callback(client.aclose)
        return lambda number: client.publish(CHANNEL, str(number))
    if kind.control == "listen":
        connection = await psycopg.AsyncConnection.connect(url, autocommit=True)
        stack.push_async_callback(connection.close)
        return lambda number: connection.execute("SELECT pg_notify(%s, %s)", (CHANNEL, str(number)))
    return None


async def _revoke_all(
    coat: AsyncCoatcheck, sids: Sequence[str], tell: Tell | None, most: float | None, fewest: int
) -> tuple[list[float], list[float], list[float]]:
    """When each revoke was sent and when it returned, and when the subscribers were told.

    After `most` seconds there are no more, but `fewest` at least.
    """
    sent, returned, told = [], [], []
    chance, begun = Random(20261123), now()
    for number, sid in enumerate(sids):
        if most is not None and number >= fewest and now() - begun > most:
            break
        order = ("revoke", "tell") if chance.random() < 0.5 else ("tell", "revoke")
        for what in order:
            if what == "revoke":
                sent.append(now())
                await coat.revoke_session(sid, reason="bench")
                returned.append(now())
            elif tell is not None:
                told.append(now())
                await tell(number)
            await asyncio.sleep(BETWEEN_SECONDS * (1 + chance.random()))
    return sent, returned, told


# -- what came of it ------------------------------------------------------------------------------------------------


def _table(
    kind: Kind,
    version: str,
    asked: int,
    sent: Sequence[float],
    returned: Sequence[float],
    told: Sequence[float],
    seen: Sequence[dict[str, Any]],
    heard: Sequence[Sequence[float | None]],
) -> Figures:
    total = len(sent)
    lost = sum(each is None for node in seen for each in node["gone"][:total])
    lost += sum(node["accepted_at_end"] for node in seen)
    ours = _delays(sent[asked:], [node["gone"][asked:] for node in seen])
    rows = [
        Figure(name="revokes lost", value=lost, unit="", note=f"of {total:,} on {len(seen)} processes"),
        *_spread("a node's copy is gone", *ours),
    ]
    if heard:
        control = _delays(told[asked:], [each[asked:] for each in heard])
        name = "redis-py subscriber" if kind.control == "subscribe" else "psycopg listener"
        rows += _spread(f"a bare {name} has heard", *control)
        for what, index in (("each", 0), (f"last of {NODES}", 1)):
            ratio = statistics.median(ours[index]) / statistics.median(control[index])
            rows.append(Figure(name=f"ratio of the medians, {what}", value=ratio, unit="", note="ours to the bare"))
        missed = sum(each is None for node in heard for each in node)
        rows.append(Figure(name="messages the subscribers missed", value=missed, unit=""))
    rows += _spread("the store's refusal is there", *_delays(sent[:asked], [node["answered"] for node in seen]))
    taken = [(end - begun) * 1000 for begun, end in zip(sent, returned, strict=True)]
    rows += [
        Figure(name="the revoke has returned, median", value=statistics.median(taken), unit="ms"),
        Figure(name="the revoke has returned, p99", value=_p99(taken), unit="ms"),
    ]
    late = [
        (accepted - sent[place], accepted > returned[place])
        for node in seen
        for place, accepted in enumerate(node["accepted"][:total])
        if accepted is not None and accepted > sent[place]
    ]
    checks = sum(node["checks"] for node in seen)
    rows += [
        Figure(
            name="latest check that a copy answered after the revoke was sent",
            value=max((delay for delay, _ in late), default=0.0) * 1000,
            unit="ms",
            note=f"{len(late)} of {checks:,} checks; {sum(after for _, after in late)} of them after it had returned",
        ),
        Figure(
            name="checks of living sessions that no copy answered",
            value=sum(node["cold"] for node in seen),
            unit="",
            note="while somebody wrote, the file was read" if kind.node == "untold" else "",
        ),
    ]
    if kind.node == "tasks":
        rows.append(Figure(name="copies gone because the feed told so", value=sum(n["told"] for n in seen), unit=""))
    return Figures(
        question=f"A revoke reaches {NODES} processes: {version}, {kind.about}",
        rows=tuple(rows),
        facts={
            "near copies in each process": f"{len(seen[0]['gone']):,}, all warm",
            "revokes": f"{asked} with the store asked at once; then {total - asked:,}, each "
            f"{BETWEEN_SECONDS * 1000:g} ms or more after the one before",
            "each node checks": f"every {kind.pace * 1000:g} ms",
            "its lease": f"{settings().lease.total_seconds():g} s",
        },
    )


def _delays(begun: Sequence[float], ends: Sequence[Sequence[float | None]]) -> tuple[list[float], list[float]]:
    """In milliseconds: of each node, and of the last node of each."""
    each, last = [], []
    for place, sent in enumerate(begun):
        there = [end[place] for end in ends]
        known = [(at - sent) * 1000 for at in there if at is not None]
        each += known
        if len(known) == len(there):
            last.append(max(known))
    if not last:
        raise NotMeasured("nothing reached all processes")
    return each, last


def _spread(name: str, each: Sequence[float], last: Sequence[float]) -> list[Figure]:
    return [
        Figure(name=f"{name}, median", value=statistics.median(each), unit="ms", note=f"{len(each):,} times"),
        Figure(name=f"{name}, p99", value=_p99(each), unit="ms"),
        Figure(name=f"{name}, last of {NODES}, median", value=statistics.median(last), unit="ms"),
        Figure(name=f"{name}, last of {NODES}, p99", value=_p99(last), unit="ms"),
    ]


def _p99(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


# -- the processes that watch ---------------------------------------------------------------------------------------


class Watch:
    """What one node saw of each session, by its place in the order in which they are ended. Threads may share it."""

    def __init__(self, watched: dict[str, Any]) -> None:
        self.values: list[str] = watched["values"]
        self.total: int = watched["total"]
        self.asked: int = watched["asked"]
        self.pace: float = watched["pace"]
        self.octets = [value.encode() for value in self.values]
        self.places = {value[4:20]: place for place, value in enumerate(self.values)}
        self.gone: list[float | None] = [None] * len(self.values)
        self.answered: list[float | None] = [None] * len(self.values)
        self.accepted: list[float | None] = [None] * len(self.values)
        self.front = self.checks = self.cold = self.told = self.accepted_at_end = 0
        self.watching = False

    def near(self, coat: AsyncCoatcheck | Coatcheck, then: Callable[[int], None]) -> NearStore:
        """The node's near copies, with this watch told when one of them is thrown away."""
        near = coat.engine.near
        if near is None:
            raise NotMeasured("there are no near copies to watch")
        forget = near.changed

        def changed(handle: str) -> None:
            forget(handle)
            place = self.places.get(handle)
            if self.watching and place is not None and self.gone[place] is None:
                self.told += 1
                if near.peek(self.octets[place]) is None:
                    self.gone[place] = now()
                    then(place)

        near.changed = changed  # type: ignore[method-assign]
        return near

    def cold_values(self, near: NearStore) -> list[str]:
        """The sessions that no copy answers for."""
        return [value for value, octets in zip(self.values, self.octets, strict=True) if near.peek(octets) is None]

    def hold_warm(self, near: NearStore) -> None:
        """Raises: NotMeasured when it is not all of them that the copies answer for."""
        cold = len(self.cold_values(near))
        if cold:
            raise NotMeasured(f"{cold} sessions that were read 50 times are not known")

    def around(self) -> range:
        """Which sessions to check now: those that were ended last and those that are next."""
        while self.front < self.total and self.gone[self.front] is not None:
            self.front += 1
        return range(max(0, self.front - NEIGHBOURS), min(len(self.values), self.front + NEIGHBOURS))

    def look(self, near: NearStore, place: int) -> float | None:
        """Check one session from its copy; when it was not answered from there, when that was known."""
        begun = now()
        self.checks += 1
        if near.peek(self.octets[place]) is not None:
            # Read late it would be younger than the check.
            self.accepted[place] = begun
            return None
        return now()

    def is_open(self, place: int) -> bool:
        """Whether the store is to be asked about a session that no copy answers for."""
        return self.gone[place] is None or (place < self.asked and self.answered[place] is None)

    def refused(self, place: int, unanswered: float) -> None:
        """The store says that the session is over, after a check that no copy answered."""
        if self.gone[place] is None:
            self.gone[place] = unanswered
        if self.answered[place] is None:
            self.answered[place] = now()

    def report(self) -> str:
        """Everything seen, as one line."""
        names = ("gone", "answered", "accepted", "checks", "cold", "told", "accepted_at_end")
        return json.dumps({name: getattr(self, name) for name in names})


async def _tasks(url: str, watch: Watch, *, told: bool) -> None:
    """A node with one event loop. Not `told`: it has to look, as often as its pace says."""
    coat = AsyncCoatcheck(url, settings=settings())
    await coat.start()
    asking: set[asyncio.Task[None]] = set()

    async def confirm(place: int, unanswered: float) -> None:
        session = coat.session(watch.values[place])
        try:
            await session.load()
        except StoreUnavailable:
            # Nobody was let in, but it is no answer either: the next look asks again.
            return
        if session.subject is None:
            watch.refused(place, unanswered)
        else:
            watch.cold += 1

    def heard(place: int) -> None:
        if place < watch.asked:
            asking.add(asyncio.get_running_loop().create_task(confirm(place, now())))

    near = watch.near(coat, heard)
    for _ in range(50):
        with suppress(StoreUnavailable):
            await read_all(coat, watch.cold_values(near), at_once=4)
        await asyncio.sleep(0.002)
    watch.hold_warm(near)

    async def look() -> None:
        while watch.watching:
            places = watch.around()
            for place in places if told else (watch.front,):
                unanswered = watch.look(near, place)
                if unanswered is not None and watch.is_open(place):
                    await confirm(place, unanswered)
            await asyncio.sleep(watch.pace)

    watch.watching = True
    looking = asyncio.create_task(look())
    _freeze()
    revoked = int(await asyncio.to_thread(sys.stdin.readline))
    watch.watching = False
    await asyncio.gather(looking, *asking)
    for place in range(revoked):
        session = coat.session(watch.values[place])
        await session.load()
        watch.accepted_at_end += session.subject is not None
    print(watch.report(), flush=True)
    await coat.close()


def _threads(url: str, watch: Watch) -> None:
    """A node with several threads, each of which checks at the same pace."""
    coat = Coatcheck(url, settings=settings())
    coat.start()
    near = watch.near(coat, lambda _: None)
    for _ in range(50):
        with suppress(StoreUnavailable):
            for value in watch.cold_values(near):
                coat.session(value).require_login()
    watch.hold_warm(near)

    def ask(place: int, unanswered: float) -> None:
        try:
            subject = coat.session(watch.values[place]).subject
        except StoreUnavailable:
            return
        if subject is None:
            watch.refused(place, unanswered)
        else:
            watch.cold += 1

    def look() -> None:
        while watch.watching:
            for place in watch.around():
                unanswered = watch.look(near, place)
                if unanswered is not None and watch.is_open(place):
                    ask(place, unanswered)
            time.sleep(watch.pace)

    watch.watching = True
    looking = [threading.Thread(target=look) for _ in range(THREADS)]
    for each in looking:
        each.start()
    try:
        _freeze()
        revoked = int(sys.stdin.readline())
    finally:
        watch.watching = False
        for each in looking:
            each.join()
    for value in watch.values[:revoked]:
        watch.accepted_at_end += coat.session(value).subject is not None
    print(watch.report(), flush=True)
    coat.close()


async def _subscribe(url: str, count: int) -> None:
    heard: list[float | None] = [None] * count
    client = AsyncRedis.from_url(url)
    subscription = client.pubsub(ignore_subscribe_messages=True)
    await subscription.subscribe(CHANNEL)

    async def listen() -> None:
        async for message in subscription.listen():
            heard[int(message["data"])] = now()

    await _listening(listen(), heard)
    await client.aclose()


async def _listen(url: str, count: int) -> None:
    heard: list[float | None] = [None] * count
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(f"LISTEN {CHANNEL}")

        async def listen() -> None:
            async for message in connection.notifies():
                heard[int(message.payload)] = now()

        await _listening(listen(), heard)


async def _listening(listen: Any, heard: list[float | None]) -> None:
    """Listen until there is another line on the input; wake up in between as often as a node does."""

    async def wake_up() -> None:
        # Nothing to wait for: waking up is what it is for.
        while True:  # noqa: ASYNC110
            await asyncio.sleep(KINDS["valkey"].pace)

    tasks = [asyncio.create_task(listen), asyncio.create_task(wake_up())]
    _freeze()
    await asyncio.to_thread(sys.stdin.readline)
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps({"heard": heard}), flush=True)


def _freeze() -> None:
    gc.collect()
    gc.freeze()
    print("ready", flush=True)


def main() -> None:
    """One of the processes that watch."""
    kind, url = sys.argv[1:]
    # A whole run's worth of remarks about sessions that have ended is no news.
    logging.disable(logging.WARNING)
    (watched,) = json.loads(sys.stdin.readline())
    match kind:
        case "tasks" | "untold":
            asyncio.run(_tasks(url, Watch(watched), told=kind == "tasks"))
        case "threads":
            _threads(url, Watch(watched))
        case "subscribe":
            asyncio.run(_subscribe(url, watched))
        case _:
            asyncio.run(_listen(url, watched))


if __name__ == "__main__":
    main()
