"""Nodes that are asked without pause while something goes wrong, and the judge of what they answered.

A node is a face over a store, in threads of this process or in a process of its own. Each of its sessions is checked
every few milliseconds, through the fault and after it, and every check is written down: when it began and ended on the
boot-time clock, who was found, whether a near copy answered. `Trial` judges by these times alone; nothing here may
wait and hope, and nothing may excuse an answer because the machine was slow, but for the time a check took.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol

from coatcheck import AsyncCoatcheck, Coatcheck, Settings, StoreUnavailable
from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef, parse_session_id
from coatcheck.core.ports import Colour
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from coatcheck.system import REAL
from tests.servers.ports import LOOPBACK
from tests.servers.relay import Relay
from tests.servers.valkey_node import SentinelNode, ValkeyNode

boot: Final = REAL.elapsed
pause: Final = threading.Event().wait

LEASE_SECONDS: Final = 1.0
DEADLINE_SECONDS: Final = 1.0
SLACK_SECONDS: Final = 0.5
"""By how much a thread of this machine may be late besides."""
RECOVERY_SECONDS: Final = 2.0
AWAY: Final = "-"
NOBODY: Final = ""
_ROOT: Final = Path(__file__).resolve().parents[2]
_EVERY_SECONDS: Final = 0.004
_EVERY_AWAY_SECONDS: Final = 0.02
# So many answers from copies one after the other, for each session, count as recovered.
_RUN: Final = 10


@dataclass(frozen=True, slots=True)
class Check:
    """One question about session number `who`: the subject that was found, `NOBODY`, or `AWAY`. `copied`: without the
    store."""

    who: int
    began: float
    ended: float
    copied: bool
    said: str


def until(question: Callable[[], bool], *, within: float, what: str) -> None:
    """Ask now and then until the answer is yes: the readers need the machine. Raises: TimeoutError."""
    end = boot() + within
    while not question():
        if boot() >= end:
            raise TimeoutError(f"{what}: not within {within:g} s")
        pause(0.03)


def settings_of(namespace: str, *, replicas: int = 0) -> Settings:
    """One application for writers and readers."""
    return Settings(
        namespace=namespace,
        store_deadline=timedelta(seconds=DEADLINE_SECONDS),
        lease=timedelta(seconds=LEASE_SECONDS),
        server_key=bytes(32),
        public_url="https://shop.example",
        replicas=replicas,
    )


# -- nodes -----------------------------------------------------------------------------------------------------------


class Node(Protocol):
    """Somebody who checks sessions."""

    name: str

    @property
    def checks(self) -> Sequence[Check]:
        """Every check until now, in the order in which they ended for each session."""
        ...

    def close(self) -> None:
        """Check no more."""
        ...


def ask_blocking(coat: Coatcheck, who: int, cookie: str) -> Check:
    """One check, as a request of a WSGI application makes it."""
    began = boot()
    copied = coat.engine.peek(cookie.encode()) is not None
    session = coat.session(cookie)
    # Like a request, and unlike a job: all it asks the store shares one deadline.
    session.lasting = False
    try:
        session.load()
        said = session.subject or NOBODY
    except StoreUnavailable:
        said = AWAY
    return Check(who, began, boot(), copied, said)


async def ask_async(coat: AsyncCoatcheck, who: int, cookie: str) -> Check:
    """One check, as a request of an ASGI application makes it."""
    began = boot()
    copied = coat.engine.peek(cookie.encode()) is not None
    session = coat.session(cookie)
    session.lasting = False
    try:
        await session.load()
        said = session.subject or NOBODY
    except StoreUnavailable:
        said = AWAY
    return Check(who, began, boot(), copied, said)


class Watcher:
    """A node in this process: one thread a session in the blocking colour, one task a session in the other."""

    def __init__(
        self,
        name: str,
        url: str,
        colour: Colour,
        settings: Settings,
        *,
        offset_us: Callable[[], int] | None = None,
        note: Callable[[Check], object] | None = None,
        sweeps: bool = False,
    ) -> None:
        """`sweeps`: one thread or task goes through all sessions in turn, and leaves out those that are over."""
        self.name = name
        self.colour = colour
        self._found: list[Check] = []
        self._note = self._found.append if note is None else note
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._halt: asyncio.Event | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._cookies: list[str] = []
        self._sweeps = sweeps
        self.retired: set[int] = set()
        """Sessions that are not checked any more."""
        deadline = settings.store_deadline.total_seconds()
        store = open_store(
            url, colour=colour, namespace=settings.namespace, deadline=deadline, clock_offset_us=offset_us
        )
        self.coat: Coatcheck | AsyncCoatcheck
        if colour == "blocking":
            self.coat = Coatcheck(store, settings=settings)
            self.coat.start()
        else:
            self.coat = AsyncCoatcheck(store, settings=settings)
            ready = threading.Event()
            self._threads.append(threading.Thread(target=lambda: asyncio.run(self._live(ready)), daemon=True))
            self._threads[0].start()
            assert ready.wait(10), f"{name} did not start"

    @property
    def checks(self) -> Sequence[Check]:
        """See `Node`."""
        return self._found[:]

    def watch(self, cookies: Iterable[str]) -> None:
        """Check these sessions too, from now on. Who sweeps is given all of them at once."""
        if self._sweeps:
            self._cookies += cookies
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin_sweep)
            else:
                self._threads.append(threading.Thread(target=self._sweep, daemon=True))
                self._threads[-1].start()
            return
        for cookie in cookies:
            who = len(self._cookies)
            self._cookies.append(cookie)
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._begin, who, cookie)
            else:
                thread = threading.Thread(target=self._ask_on, args=(who, cookie), daemon=True)
                self._threads.append(thread)
                thread.start()

    def close(self) -> None:
        """See `Node`."""
        self._stop.set()
        if self._loop is not None and self._halt is not None:
            self._loop.call_soon_threadsafe(self._halt.set)
        for thread in self._threads:
            thread.join(timeout=20)
            assert not thread.is_alive(), f"{self.name}: a check never ended"
        if isinstance(self.coat, Coatcheck):
            self.coat.close()

    def _ask_on(self, who: int, cookie: str) -> None:
        assert isinstance(self.coat, Coatcheck)
        while not self._stop.is_set() and who not in self.retired:
            check = ask_blocking(self.coat, who, cookie)
            self._note(check)
            self._stop.wait(_EVERY_SECONDS if check.copied else _EVERY_AWAY_SECONDS)

    def _sweep(self) -> None:
        assert isinstance(self.coat, Coatcheck)
        left = dict(enumerate(self._cookies))
        while not self._stop.wait(_EVERY_SECONDS):
            for who, cookie in list(left.items()):
                check = ask_blocking(self.coat, who, cookie)
                self._note(check)
                if check.said == NOBODY:
                    del left[who]

    def _begin_sweep(self) -> None:
        assert self._loop is not None
        self._tasks.append(self._loop.create_task(self._sweep_async()))

    async def _sweep_async(self) -> None:
        assert isinstance(self.coat, AsyncCoatcheck)
        left = dict(enumerate(self._cookies))
        while not self._stop.is_set():
            await asyncio.sleep(_EVERY_SECONDS)
            for who, cookie in list(left.items()):
                check = await ask_async(self.coat, who, cookie)
                self._note(check)
                if check.said == NOBODY:
                    del left[who]

    async def _live(self, ready: threading.Event) -> None:
        assert isinstance(self.coat, AsyncCoatcheck)
        self._halt = asyncio.Event()
        await self.coat.start()
        self._loop = asyncio.get_running_loop()
        ready.set()
        await self._halt.wait()
        await asyncio.gather(*self._tasks)
        await self.coat.close()

    def _begin(self, who: int, cookie: str) -> None:
        assert self._loop is not None
        self._tasks.append(self._loop.create_task(self._ask_on_async(who, cookie)))

    async def _ask_on_async(self, who: int, cookie: str) -> None:
        assert isinstance(self.coat, AsyncCoatcheck)
        while not self._stop.is_set() and who not in self.retired:
            check = await ask_async(self.coat, who, cookie)
            self._note(check)
            await asyncio.sleep(_EVERY_SECONDS if check.copied else _EVERY_AWAY_SECONDS)


class _Told:
    """What a process writes down, as far as it was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: list[Check] = []
        self._at = 0

    def read(self) -> Sequence[Check]:
        """All checks until now."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._at)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._at += len(whole) + 1
                self._found += [_parsed(line) for line in whole.decode().split("\n")]
        return self._found[:]


def _parsed(line: str) -> Check:
    who, began, ended, copied, said = line.split(" ")
    return Check(int(who), float(began), float(ended), copied == "1", said)


class Process:
    """A node in a process of its own. `forks`: it warms up, forks, and both watch; `child` is the other one."""

    def __init__(
        self,
        name: str,
        url: str,
        colour: Colour,
        namespace: str,
        cookies: Sequence[str],
        directory: Path,
        *,
        forks: bool = False,
    ) -> None:
        self.name = name
        self.child = _Child(f"{name}, the child", _Told(directory / f"{secrets.token_hex(4)}.child"))
        self._told = _Told(directory / f"{secrets.token_hex(4)}.checks")
        plan = {
            "url": url,
            "colour": colour,
            "namespace": namespace,
            "cookies": list(cookies),
            "out": str(self._told.path),
            "child": str(self.child.told.path) if forks else None,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.near_parts", json.dumps(plan)],
            stdin=subprocess.PIPE,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )

    @property
    def checks(self) -> Sequence[Check]:
        """See `Node`."""
        assert self._process.poll() is None or self._process.returncode == 0, f"{self.name} died"
        return self._told.read()

    def stop(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """See `Node`."""
        self.go_on()
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            assert self._process.wait(timeout=20) == 0, f"{self.name} failed"
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()


@dataclass
class _Child:
    """What the child of a forked node tells."""

    name: str
    told: _Told

    @property
    def checks(self) -> Sequence[Check]:
        """See `Node`."""
        return self.told.read()

    def close(self) -> None:
        """Its parent ends it."""


def main(plan: Mapping[str, Any]) -> None:
    """Be a node until stdin ends."""
    mutex = threading.Lock()
    out = Path(plan["out"]).open("w", buffering=1)  # noqa: SIM115  it is the process's own

    def note(check: Check) -> None:
        line = f"{check.who} {check.began:.6f} {check.ended:.6f} {int(check.copied)} {check.said}\n"
        with mutex:
            out.write(line)

    node = Watcher("", plan["url"], plan["colour"], settings_of(plan["namespace"]), note=note)
    child = 0
    if plan["child"] is not None:
        assert isinstance(node.coat, Coatcheck)
        for who, cookie in enumerate(plan["cookies"]):
            until(lambda w=who, c=cookie: _is_copied(node, w, c), within=10.0, what="warm")  # type: ignore[misc]
        child = os.fork()
        if child == 0:
            out = Path(plan["child"]).open("w", buffering=1)  # noqa: SIM115
    node.watch(plan["cookies"])
    sys.stdin.buffer.read()
    node.close()
    if plan["child"] is not None and child == 0:
        os._exit(0)
    if child:
        assert os.waitpid(child, 0)[1] == 0


def _is_copied(node: Watcher, who: int, cookie: str) -> bool:
    assert isinstance(node.coat, Coatcheck)
    return ask_blocking(node.coat, who, cookie).copied


# -- the network of the readers --------------------------------------------------------------------------------------

_FEED_MARKS: Final = (b"TRACKING", b"coatcheck feed")


class Passage(Relay):
    """A relay that knows feeds from other connections, and that servers name each other by ports."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.names: Mapping[int, int] = {}
        self._feeds: set[int] = set()
        self._faults: dict[str, str] = {}
        self._kept: dict[int, bytes] = {}

    def harm(self, kind: str, fault: str) -> None:
        """From now on `feed` or `commands` connections are `reset`, or `swallow`ed, or their answers end after one
        byte (`stump`), or are kept for `let_out()` (`keep`); until `forward()`."""

        def order() -> None:
            self._faults[kind] = fault
            if fault == "reset":
                for pair in list(self._pairs):
                    if self._kind(pair) == kind:
                        self._reset(pair)

        self._do(order)

    def let_out(self) -> None:
        """Deliver the answers that were kept, whatever is done with others."""

        def order() -> None:
            for pair in list(self._pairs):
                if kept := self._kept.pop(id(pair), b""):
                    self._deliver(pair.client, kept)

        self._do(order)

    def forward(self) -> None:
        """See `Relay.forward`. What was kept comes first."""
        self.let_out()
        self._do(self._faults.clear)
        super().forward()

    def _kind(self, pair: Any) -> str:
        return "feed" if id(pair) in self._feeds else "commands"

    def _close(self, pair: Any) -> None:
        super()._close(pair)
        self._feeds.discard(id(pair))
        self._kept.pop(id(pair), None)

    def _read(self, pair: Any, end: Any) -> None:
        data = end.socket.recv(65_536)
        if not data:
            end.ended = True
            return
        if end.is_client and any(mark in data for mark in _FEED_MARKS):
            self._feeds.add(id(pair))
        fault = self._faults.get(self._kind(pair))
        if not end.is_client:
            data = self._renamed(data)
        if fault == "reset":
            self._reset(pair)
        elif fault == "swallow":
            pair.damaged = True
            self.swallowed += len(data)
        elif fault == "keep" and not end.is_client:
            self._kept[id(pair)] = self._kept.get(id(pair), b"") + data
        elif fault == "stump" and not end.is_client:
            self._deliver(pair.client, data[:1])
            self._reset(pair)
        else:
            pair.other(end).pending += data

    def _renamed(self, data: bytes) -> bytes:
        for port, name in self.names.items():
            data = re.sub(rb"(?<![0-9])%d(?![0-9])" % port, b"%d" % name, data)
        return data


class Gate:
    """All relays that stand between readers and the servers behind one URL."""

    def __init__(self, url: str, ports: Sequence[int], names: Mapping[int, int] | None = None) -> None:
        """`names`: further ports under which a server is known."""
        self.passages = {port: Passage(port) for port in ports}
        known = {port: passage.port for port, passage in self.passages.items()}
        known |= {other: self.passages[port].port for other, port in (names or {}).items()}
        for passage in self.passages.values():
            passage.names = known
            passage.start()
        self.url = re.sub(r"(?<=:)[0-9]+", lambda found: str(known.get(int(found[0]), found[0])), url)
        self._held: threading.Thread | None = None
        self._free = threading.Event()

    def harm(self, kind: str, fault: str) -> None:
        """See `Passage.harm`, at all of them; `kind` may be `all`."""
        for passage in self.passages.values():
            for each in ("feed", "commands") if kind == "all" else (kind,):
                passage.harm(each, fault)

    def let_out(self) -> None:
        """See `Passage.let_out`."""
        for passage in self.passages.values():
            passage.let_out()

    def hold(self) -> None:
        """Nothing gets through, and nothing is lost."""
        for passage in self.passages.values():
            passage.hold()

    def slow(self, seconds: float) -> None:
        """Everything waits for up to so long, each way."""
        self._free.clear()

        def hold_and_let_go() -> None:
            while not self._free.is_set():
                self.hold()
                self._free.wait(seconds)
                self._pass()
                self._free.wait(0.005)

        self._held = threading.Thread(target=hold_and_let_go, daemon=True)
        self._held.start()

    def forward(self) -> None:
        """Everything gets through."""
        if self._held is not None:
            self._free.set()
            self._held.join()
            self._held = None
        self._pass()

    def close(self) -> None:
        """Take them down."""
        self.forward()
        for passage in self.passages.values():
            passage.close()

    def _pass(self) -> None:
        for passage in self.passages.values():
            passage.forward()


# -- the judge -------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Trial:
    """One writer, some readers, sessions that stay and sessions that are ended, and what has to hold."""

    name: str
    url: str
    """Where the writer finds the store."""
    far: str
    """Where the readers find it."""
    namespace: str
    directory: Path
    dice: Random
    offset_us: int = 0
    subjects: list[str] = field(default_factory=list)
    cookies: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    revoked: dict[int, float] = field(default_factory=dict)
    stays: list[int] = field(default_factory=list)
    pauses: list[tuple[float, float]] = field(default_factory=list)
    over: float = 0.0
    recovered: dict[str, float] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        if self.url.startswith("postgresql"):
            migrating: Any = open_store(self.url, colour="blocking", namespace=self.namespace)
            run_blocking(migrating.migrate())
            run_blocking(migrating.close())
        self.writer = self._write_with(0)

    def _write_with(self, replicas: int) -> Coatcheck:
        store = open_store(
            self.url,
            colour="blocking",
            namespace=self.namespace,
            deadline=DEADLINE_SECONDS,
            replicas=replicas,
            clock_offset_us=lambda: self.offset_us,
        )
        writer = Coatcheck(store, settings=settings_of(self.namespace, replicas=replicas))
        writer.start()
        return writer

    def require_replicas(self, count: int) -> None:
        """From now on the writer's revokes count only when so many replicas have them."""
        self.writer.close()
        self.writer = self._write_with(count)

    def close(self) -> None:
        """Stop everybody."""
        with contextlib.ExitStack() as all_of_them:
            all_of_them.callback(self.writer.close)
            for node in self.nodes:
                all_of_them.callback(node.close)

    # -- sessions ----------------------------------------------------------------------------------------------------

    def sign_in(self, count: int = 1, *, subject: str | None = None, stays: bool = False) -> list[int]:
        """So many sessions, each of a subject of its own unless one is named; their numbers."""
        numbers: list[int] = []
        for _ in range(count):
            who = len(self.cookies)
            name = subject or f"person{who}"
            session = self.writer.session(None)
            session.login(name)
            action = session.cookie_action
            assert isinstance(action, SendCookie)
            self.subjects.append(name)
            self.cookies.append(action.id.text)
            numbers.append(who)
        if stays:
            self.stays += numbers
        return numbers

    def ref(self, who: int) -> SessionRef:
        """Where a session is in the store."""
        parsed = parse_session_id(self.writer.engine.keys, self.cookies[who].encode())
        assert parsed is not None
        return parsed.ref

    def revoke(self, who: int, *, within: float = 20.0) -> None:
        """End a session. While the store cannot be asked, it is tried again: what counts is when it has returned."""
        sid = self.writer.engine.sid(self.ref(who))

        def is_done() -> bool:
            try:
                return self.writer.revoke_session(sid, reason="stolen").ended >= 0
            except StoreUnavailable:
                return False

        until(is_done, within=within, what=f"{self.name}: a revoke that is answered")
        self.revoked[who] = boot()

    # -- readers -----------------------------------------------------------------------------------------------------

    def read_here(self, url: str | None = None, *, colours: Sequence[Colour] = ("blocking", "async")) -> list[Watcher]:
        """A reader of each colour in this process."""
        made: list[Watcher] = []
        for colour in colours:
            node = Watcher(
                f"{self.name}, {colour} reader {len(self.nodes)}",
                url or self.far,
                colour,
                settings_of(self.namespace),
                offset_us=lambda: self.offset_us,
            )
            node.retired = self.retired
            self.nodes.append(node)
            made.append(node)
            node.watch(self.cookies)
        return made

    def sweep_here(self) -> list[Watcher]:
        """A reader of each colour in this process that goes through all sessions in turn, without relays."""
        made: list[Watcher] = []
        colours: tuple[Colour, ...] = ("blocking", "async")
        for colour in colours:
            node = Watcher(f"{self.name}, {colour} sweeper", self.url, colour, settings_of(self.namespace), sweeps=True)
            self.nodes.append(node)
            made.append(node)
            node.watch(self.cookies)
        return made

    def read_apart(self, *, forks: bool = False, colours: Sequence[Colour] = ("blocking", "async")) -> list[Process]:
        """A reader of each colour in a process of its own."""
        made: list[Process] = []
        for colour in colours:
            name = f"{self.name}, {colour} process {len(self.nodes)}"
            process = Process(name, self.far, colour, self.namespace, self.cookies, self.directory, forks=forks)
            made.append(process)
            self.nodes.append(process)
            if forks:
                self.nodes.append(process.child)
        return made

    def more(self) -> None:
        """The readers of this process check sessions that were added, too."""
        for node in self.nodes:
            if isinstance(node, Watcher):
                node.watch(self.cookies[len(node._cookies) :])

    def retire(self) -> None:
        """Readers of this process ask no more about sessions that are over: the next round needs the machine."""
        self.retired |= self.revoked.keys()

    # -- time --------------------------------------------------------------------------------------------------------

    def warm(self, *, within: float = 15.0) -> None:
        """Wait until every reader answers for every living session from its copies."""
        since = boot()
        alive = [who for who in range(len(self.cookies)) if who not in self.revoked]
        for node in self.nodes:
            until(
                lambda node=node: self._run_of_copies(node, since, alive) is not None,  # type: ignore[misc]
                within=within,
                what=f"{node.name} answers from copies",
            )

    def at_any_phase(self) -> None:
        """Somewhere between two heartbeats."""
        pause(self.dice.random() * 0.35)

    def last(self, seconds: float) -> None:
        """The fault goes on for so long."""
        pause(seconds)

    def recover(self, *, within: float = 10.0) -> None:
        """The fault is over: wait until every reader answers from its copies again, and note when it began to."""
        self.over = boot()
        for node in self.nodes:
            found: list[float] = []

            def has_recovered(node: Node = node, found: list[float] = found) -> bool:
                at = self._run_of_copies(node, self.over, self.stays)
                found += [] if at is None else [at]
                return at is not None

            try:
                until(has_recovered, within=within, what=f"{node.name} recovers")
            except TimeoutError as never:
                raise AssertionError(f"{never}; {self._lately(node)}") from never
            self.recovered[node.name] = found[0] - self.over
            assert found[0] - self.over <= RECOVERY_SECONDS, f"{node.name}: took {found[0] - self.over:.2f} s"

    def _run_of_copies(self, node: Node, since: float, whose: Sequence[int]) -> float | None:
        """When the latest unbroken run of answers from copies began, if it is long enough for each of them."""
        runs = dict.fromkeys(whose, 0)
        begins = dict.fromkeys(whose, since)
        ended: set[int] = set()
        for check in reversed(node.checks):
            if check.ended < since or len(ended) == len(runs):
                break
            if check.who not in runs or check.who in ended:
                continue
            if check.began >= since and check.copied and check.said == self.subjects[check.who]:
                runs[check.who] += 1
                begins[check.who] = check.began
            else:
                ended.add(check.who)
        if any(run < _RUN for run in runs.values()):
            return None
        return max(begins.values(), default=since)

    # -- judging -----------------------------------------------------------------------------------------------------

    def await_refusals(self, *, within: float = 5.0) -> None:
        """Wait until every reader was asked about every ended session later than a lease after its end, and has said
        that it is over."""

        wanted = self.revoked.keys() - self.retired
        earliest = min((self.revoked[who] for who in wanted), default=0.0)

        def asked(node: Node) -> bool:
            late: set[int] = set()
            for each in reversed(node.checks):
                if each.ended < earliest:
                    break
                if each.said == NOBODY and each.began > self.revoked.get(each.who, float("inf")) + LEASE_SECONDS:
                    late.add(each.who)
            return late >= wanted

        for node in self.nodes:
            try:
                until(lambda node=node: asked(node), within=within, what=f"{node.name} refuses")  # type: ignore[misc]
            except TimeoutError as never:
                raise AssertionError(f"{never}; {self._lately(node)}") from never

    def await_told(self, who: int, *, within: float = 3.0) -> None:
        """Wait until every reader has found this session ended."""

        def knows(node: Node) -> bool:
            return next((each.said for each in reversed(node.checks) if each.who == who), "?") == NOBODY

        for node in self.nodes:
            until(lambda node=node: knows(node), within=within, what=f"{node.name} knows")  # type: ignore[misc]

    def judge(self, *, signs_out: bool = False) -> None:
        """What must hold of every check, whatever went wrong. `signs_out`: the store lost its sessions."""
        for node in self.nodes:
            checks = node.checks
            assert checks, node.name
            for each in checks:
                self._judge(node, each, signs_out)

    def _judge(self, node: Node, each: Check, signs_out: bool) -> None:
        name = f"{node.name}: session {each.who} at {each.began:.3f}"
        mine = self.subjects[each.who]
        assert each.said in (mine, NOBODY, AWAY), f"{name} was answered as {each.said!r}, and is {mine!r}'s"
        ended = self.revoked.get(each.who)
        if each.said == mine and ended is not None:
            late = each.began - ended
            assert late <= LEASE_SECONDS, f"{name} was accepted by a check that began {late:.3f} s after its end"
        if each.said == NOBODY and ended is None and not signs_out:
            raise AssertionError(f"{name} was signed out (the fault was over at {self.over:.3f})")
        stopped = sum(max(0.0, min(each.ended, end) - max(each.began, begin)) for begin, end in self.pauses)
        took = each.ended - each.began - stopped
        assert took <= DEADLINE_SECONDS + SLACK_SECONDS, f"{name} took {took:.2f} s"

    def _lately(self, node: Node) -> str:
        latest = {check.who: check for check in node.checks}
        return f"ended: {self.revoked}; now {boot():.3f}; at last: {list(latest.values())}"


# -- a group that can be divided -------------------------------------------------------------------------------------


class Divided:
    """A primary, a replica and a sentinel; the primary can be cut off together with the readers behind `gate`.

    The others know the primary by the port of `bridge`, the one way there is between the two sides.
    """

    def __init__(self, *, down_after_ms: int, lag: int | None) -> None:
        """`lag`: min-replicas-max-lag in seconds with min-replicas-to-write 1; None leaves both unset."""
        careful = {} if lag is None else {"min-replicas-to-write": "1", "min-replicas-max-lag": str(lag)}
        self.old = ValkeyNode(settings=careful)
        self.bridge = Relay(self.old.port)
        self.new = ValkeyNode(settings={"replicaof": f"{LOOPBACK} {self.bridge.port}"})
        self.sentinel = SentinelNode()
        self.sentinel.instruct(
            [
                f"sentinel monitor sessions {LOOPBACK} {self.bridge.port} 1",
                f"sentinel down-after-milliseconds sessions {down_after_ms}",
                "sentinel failover-timeout sessions 3000",
            ]
        )
        self.url = f"redis+sentinel://{LOOPBACK}:{self.sentinel.port}/sessions/0"
        ports = [self.old.port, self.new.port, self.sentinel.port]
        self.gate = Gate(self.url, ports, {self.bridge.port: self.old.port})

    def start(self) -> None:
        """Wait until the sentinel knows the replica and the replica follows."""
        self.bridge.start()
        for node in (self.old, self.new, self.sentinel):
            node.start()
        self.sentinel.hurry()
        until(self._is_whole, within=15.0, what="primary, replica and sentinel know each other")

    def divide(self) -> None:
        """The old primary and the readers on one side, the replica and the sentinel on the other."""
        self.bridge.swallow()
        for node in (self.new, self.sentinel):
            for kind in ("feed", "commands"):
                self.gate.passages[node.port].harm(kind, "swallow")

    def await_promotion(self) -> None:
        """Wait until the replica is the primary on its side."""
        until(self._is_promoted, within=20.0, what="the replica is promoted")

    def unite(self) -> None:
        """The sides meet again."""
        self.bridge.forward()
        self.gate.forward()

    def close(self) -> None:
        """End everything."""
        self.gate.close()
        for node in (self.sentinel, self.new, self.old):
            node.close()
        self.bridge.close()

    def _is_whole(self) -> bool:
        follows = self.new.ask_fields("INFO", "replication").get("master_link_status") == "up"
        known = self.sentinel.ask("SENTINEL", "REPLICAS", "sessions")
        takes_writes = self.old.ask_fields("INFO", "replication").get("min_slaves_good_slaves", "1") != "0"
        return follows and takes_writes and isinstance(known, list) and len(known) == 1

    def _is_promoted(self) -> bool:
        named = self.sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "sessions")
        named_new = isinstance(named, list) and named[1] == str(self.new.port).encode()
        return named_new and self.new.ask_fields("INFO", "replication")["role"] == "master"


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
