"""The Redis store when servers, networks and callers misbehave: it ends in time, says what it knows, and recovers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import socketserver
import ssl
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trustme

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef, owner_of
from coatcheck.core.ports import Activity, Changes, Colour, Committed, Live, RecordLimits, Revoked
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.driver import CONNECTIONS_PER_NODE
from coatcheck.stores.redis.nodes import slot_of
from coatcheck.system import REAL
from tests.servers.ports import LOOPBACK, reserve_port
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeySingle

T = TypeVar("T")
pytestmark = pytest.mark.servers

DEADLINE = 0.5
# What a busy machine may add to a deadline before a test calls it missed.
ROOM = 0.4
WIDE = RecordLimits(octets=1 << 16, fields=100)
Run = Callable[[Coroutine[Any, Any, T]], T]


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    chosen: Colour = request.param
    return chosen


@pytest.fixture
def run(colour: Colour) -> Iterator[Run[Any]]:
    if colour == "blocking":
        yield run_blocking
        return
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def stores(colour: Colour, namespace: str, run: Run[Any]) -> Iterator[Callable[..., RedisStore]]:
    """`stores(url)` makes a store that is closed after the test."""
    made: list[RedisStore] = []

    def make(url: str, *, deadline: float = DEADLINE) -> RedisStore:
        made.append(_store(url, colour, namespace, deadline))
        return made[-1]

    yield make
    for store in made:
        run(store.close())


def _store(url: str, colour: Colour, namespace: str, deadline: float = DEADLINE) -> RedisStore:
    options = StoreOptions(colour=colour, waits=waits_of(colour), system=REAL, namespace=namespace, deadline=deadline)
    return RedisStore(url, options)


def _new(subject: str = "ann", *, tag: int = 0x1A2B, **changes: Any) -> NewSession:
    values: dict[str, Any] = {
        "ref": SessionRef(tag, sha256_text(subject.encode())[:16]),
        "digest": sha256_text(b"id of " + subject.encode()),
        "owner": owner_of("", subject),
        "subject": subject,
        "idle_us": 3600 * SECOND_US,
        "absolute_us": 86400 * SECOND_US,
        "authority": "{}",
        "fields": {"me": f'"{subject}"'},
    }
    return NewSession(**{**values, **changes})


def _commit(store: RedisStore, new: NewSession) -> Coroutine[Any, Any, object]:
    return store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE)


def _failing(run: Run[Any], work: Coroutine[Any, Any, object]) -> StoreUnavailable:
    """The failure of a verb, which came within the deadline."""
    began = time.monotonic()
    with pytest.raises(StoreUnavailable) as caught:
        run(work)
    assert time.monotonic() - began < DEADLINE + ROOM
    return caught.value


# -- every verb ends, and says what it knows -----------------------------------------------------------------------

Fault = Callable[[Relay], None]
NEVER_ANSWERED: dict[str, Fault] = {
    "black hole": Relay.swallow,
    "held": Relay.hold,
    "answers lost": Relay.swallow_answers,
    "cut after one byte": lambda relay: relay.reset_after(1),
    "cut before the first byte": lambda relay: relay.reset_after(0),
}


@pytest.mark.parametrize("fault", NEVER_ANSWERED.values(), ids=NEVER_ANSWERED.keys())
def test_a_lost_answer_ends_in_time(
    fault: Fault,
    valkey_single: ValkeySingle,
    relay: Callable[[int], Relay],
    stores: Callable[..., RedisStore],
    run: Run[Any],
) -> None:
    between = relay(valkey_single.node.port)
    store = stores(between.address_in(valkey_single.url))
    new = _new()
    run(store.create(new))
    fault(between)
    failure = _failing(run, store.load(new.ref, new.digest))
    assert not isinstance(failure, OutcomeUnknown), "a read has no outcome"
    between.forward()
    assert isinstance(run(store.load(new.ref, new.digest)), Live), "the next verb works at once"
    fault(between)
    assert isinstance(_failing(run, _commit(store, new)), OutcomeUnknown), "it may have been written"
    between.forward()
    assert isinstance(run(_commit(store, new)), Committed)


def test_a_black_hole_for_new_connections_ends_in_time(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    between = relay(valkey_single.node.port)
    between.swallow()
    # With a database number the driver has to speak before the verb does.
    store = stores(between.address_in(valkey_single.url)[:-1] + "1")
    failure = _failing(run, _commit(store, _new()))
    assert not isinstance(failure, OutcomeUnknown), "the command was never sent"
    assert not isinstance(_failing(run, store.open()), OutcomeUnknown)


def test_a_refused_connection_is_told_at_once(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    between = relay(valkey_single.node.port)
    store = stores(between.address_in(valkey_single.url))
    new = _new()
    run(store.create(new))
    between.refuse()
    for work in (store.load(new.ref, new.digest), _commit(store, new), store.open()):
        failure = _failing(run, work)
        assert not isinstance(failure, OutcomeUnknown)
        assert failure.__cause__ is not None
    between.forward()
    # So many have opened the breaker.
    _until_it_works(run, lambda: _commit(store, new))


def test_a_frozen_server_holds_nobody(
    valkey_single: ValkeySingle, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    store = stores(valkey_single.url)
    new = _new()
    run(store.create(new))
    valkey_single.freeze()
    assert not isinstance(_failing(run, store.load(new.ref, new.digest)), OutcomeUnknown)
    assert isinstance(_failing(run, store.revoke(new.ref, reason="logout")), OutcomeUnknown)
    valkey_single.thaw()
    answer = run(store.revoke(new.ref, reason="logout"))
    assert isinstance(answer, Revoked), "repeating is safe"


def test_connections_that_were_cut_while_idle_cost_no_verb(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    between = relay(valkey_single.node.port)
    store = stores(between.address_in(valkey_single.url))
    new = _new()
    run(store.create(new))
    for _ in range(3):
        between.cut()
        assert isinstance(run(_commit(store, new)), Committed)


# -- a server that says strange things -----------------------------------------------------------------------------


class _Parrot(socketserver.ThreadingTCPServer):
    """Answers everything with one line, in pieces of one byte when it drips."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self, answer: Callable[[bytes], bytes], *, drip: float = 0.0) -> None:
        self.answer = answer
        self.drip = drip
        self.stopped = threading.Event()
        self.port = reserve_port()
        super().__init__((LOOPBACK, self.port.port), _Speaker)

    def __enter__(self) -> _Parrot:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()
        self.port.release()

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port.port}"


class _Speaker(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        parrot = self.server
        assert isinstance(parrot, _Parrot)
        with contextlib.suppress(OSError):
            while data := self.request.recv(1 << 20):
                answer = parrot.answer(data)
                if not parrot.drip:
                    self.request.sendall(answer)
                    continue
                for byte in answer:
                    if parrot.stopped.wait(parrot.drip):
                        return
                    self.request.sendall(bytes([byte]))


def test_an_answer_that_drips_does_not_add_up(stores: Callable[..., RedisStore], run: Run[Any]) -> None:
    # Each byte comes well within a limit for single reads.
    with _Parrot(lambda _: b"$100\r\n" + b"x" * 100 + b"\r\n", drip=DEADLINE / 5) as parrot:
        store = stores(f"redis://{parrot.address}")
        new = _new()
        _failing(run, store.load(new.ref, new.digest))
        assert isinstance(_failing(run, _commit(store, new)), OutcomeUnknown)


REFUSALS = (
    b"-LOADING Redis is loading the dataset in memory",
    b"-NOAUTH Authentication required.",
    b"-NOPERM this user has no permissions to run the 'evalsha' command",
    b"-READONLY You can't write against a read only replica.",
    b"-ERR Error running script (call to f_0): @user_script:1: -READONLY You can't write against a read only replica.",
    b"-OOM command not allowed when used memory > 'maxmemory'.",
    b"-CLUSTERDOWN The cluster is down",
    b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.",
    b"-MISCONF Redis is configured to save RDB snapshots",
    b"-NOREPLICAS Not enough good replicas to write.",
    b"-BUSY Redis is busy running a script.",
    b"-TRYAGAIN Multiple keys request during rehashing of slot",
    b"-NOSCRIPT No matching script.",
    b"-ERR max number of clients reached",
    b"-ERR unknown command",
    b"-WRONGTYPE Operation against a key holding the wrong kind of value",
)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda line: line.split()[0].decode())
def test_a_refusal_is_a_store_that_is_away_and_nothing_was_written(
    refusal: bytes, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    with _Parrot(lambda data: (refusal + b"\r\n") * _count(data)) as parrot:
        store = stores(f"redis://{parrot.address}")
        failure = _failing(run, _commit(store, _new()))
    assert not isinstance(failure, OutcomeUnknown)
    assert failure.__cause__ is not None
    assert failure.status == 503


@pytest.mark.parametrize("word", ["MOVED", "ASK"])
def test_redirections_in_circles_come_to_an_end(word: str, stores: Callable[..., RedisStore], run: Run[Any]) -> None:
    with _Parrot(lambda data: b"") as parrot:
        line = f"-{word} 0 {parrot.address}\r\n".encode()
        slots = f"*1\r\n*3\r\n:0\r\n:16383\r\n*2\r\n$9\r\n{LOOPBACK}\r\n:{parrot.port.port}\r\n".encode()
        parrot.answer = lambda data: slots if b"SLOTS" in data else line * _count(data)
        store = stores(f"redis+cluster://{parrot.address}")
        failure = _failing(run, _commit(store, _new()))
    assert not isinstance(failure, OutcomeUnknown)


@pytest.mark.parametrize(
    "answer",
    [b"+OK\r\n", b":1\r\n", b"$-1\r\n", b"*1\r\n$4\r\nlive\r\n", b"*2\r\n:1\r\n+a\r\n", b"HTTP/1.1 400\r\n\r\n"],
)
def test_an_answer_of_another_kind_is_a_store_that_is_away(
    answer: bytes, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    with _Parrot(lambda data: answer) as parrot:
        store = stores(f"redis://{parrot.address}")
        new = _new()
        _failing(run, store.load(new.ref, new.digest))


def test_no_password_is_in_any_text(stores: Callable[..., RedisStore], run: Run[Any]) -> None:
    # Servers and proxies that do not know AUTH repeat what follows it.
    echo = b"-ERR unknown command 'AUTH', with args beginning with: 'user' 'hunter2'\r\n"
    with _Parrot(lambda data: echo) as parrot:
        store = stores(f"redis://user:hunter2@{parrot.address}")
        failure = _failing(run, _commit(store, _new()))
    shown = "".join(traceback.format_exception(failure))
    assert "unknown command" in shown
    assert "hunter2" not in shown


def test_a_wrong_password_and_a_missing_right_are_told(
    valkey_single: ValkeySingle, stores: Callable[..., RedisStore], run: Run[Any], namespace: str
) -> None:
    node = valkey_single.node
    node.ask("ACL", "SETUSER", namespace, "on", ">hunter2", "~*", "+@all", "-evalsha")
    try:
        url = valkey_single.url.replace("redis://", f"redis://{namespace}:%s@")
        wrong = _failing(run, _commit(stores(url % "hunter3"), _new()))
        assert "WRONGPASS" in str(wrong) or "invalid username-password" in str(wrong)
        missing = _failing(run, _commit(stores(url % "hunter2"), _new()))
        assert "NOPERM" in str(missing)
        assert "hunter" not in f"{wrong} {missing}"
    finally:
        node.ask("ACL", "DELUSER", namespace)


def test_a_full_server_refuses_writes_and_still_reads(
    valkey_single: ValkeySingle, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    store = stores(valkey_single.url)
    new = _new()
    run(store.create(new))
    valkey_single.node.ask("CONFIG", "SET", "maxmemory", "1")
    try:
        failure = _failing(run, _commit(store, new))
        assert not isinstance(failure, OutcomeUnknown)
        assert isinstance(run(store.load(new.ref, new.digest)), Live)
    finally:
        valkey_single.node.ask("CONFIG", "SET", "maxmemory", "0")
    live = run(store.load(new.ref, new.digest))
    assert live.session.version == 1, "nothing of the refused write"


# -- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def behind_tls(valkey_single: ValkeySingle, tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Port of a server that speaks TLS, and the certificate to trust: the test servers have no TLS of their own."""
    authority = trustme.CA()
    trusted = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(trusted))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(LOOPBACK, valkey_single.node.port)
        await asyncio.gather(pipe(reader, back), pipe(there, writer))

    reservation = reserve_port()
    ready, ended = threading.Event(), asyncio.Event()
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        server = await asyncio.start_server(carry, LOOPBACK, reservation.port, ssl=context)
        ready.set()
        await ended.wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(timeout=10)
    yield reservation.port, trusted
    loops[0].call_soon_threadsafe(ended.set)
    thread.join()
    reservation.release()


def test_tls_is_spoken_and_certificates_are_checked(
    behind_tls: tuple[int, Path], stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    port, trusted = behind_tls
    store = stores(f"rediss://localhost:{port}?ssl_ca_certs={trusted}", deadline=5.0)
    new = _new()
    run(store.create(new))
    assert isinstance(run(_commit(store, new)), Committed)
    unknown = stores(f"rediss://localhost:{port}", deadline=5.0)
    other_name = stores(f"valkeys://{LOOPBACK}:{port}?ssl_ca_certs={trusted}", deadline=5.0)
    for refused in (unknown, other_name):
        with pytest.raises(StoreUnavailable, match=r"(?i)certificate"):
            run(refused.ping())


def test_a_silent_tls_server_holds_nobody(
    behind_tls: tuple[int, Path], relay: Callable[[int], Relay], stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    port, trusted = behind_tls
    between = relay(port)
    between.swallow()
    _failing(run, stores(f"rediss://localhost:{between.port}?ssl_ca_certs={trusted}").ping())


# -- callers that go away ------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_cancelled_verb_never_leaves_its_answer_to_the_next(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], namespace: str, seed: int, full: bool
) -> None:
    # CVE-2023-28858: the connection went back to the pool, and the next caller read the last caller's answer.
    between = relay(valkey_single.node.port)
    store = _store(between.address_in(valkey_single.url), "async", namespace, 10.0)
    sessions = [_new(f"user-{n}", tag=n) for n in range(8)]
    for each in sessions:
        await store.create(each)
    chance = random.Random(seed)

    async def tagged(new: NewSession) -> None:
        live = await store.load(new.ref, new.digest)
        assert isinstance(live, Live)
        assert live.session.fields["me"] == f'"{new.subject}"'

    for _ in range(2000 if full else 300):
        tasks = [asyncio.ensure_future(tagged(chance.choice(sessions))) for _ in range(6)]
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        for task in tasks[:3]:
            task.cancel()
        # At once, while answers for those who left may still be on their way.
        tasks += [asyncio.ensure_future(tagged(chance.choice(sessions))) for _ in range(6)]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, asyncio.CancelledError), result
    await store.close()


@pytest.mark.anyio
async def test_an_answer_that_comes_after_its_caller_left_is_read_by_nobody(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], namespace: str
) -> None:
    between = relay(valkey_single.node.port)
    store = _store(between.address_in(valkey_single.url), "async", namespace, 10.0)
    first, second = _new("first"), _new("second")
    for each in (first, second):
        await store.create(each)
    between.hold()
    left = asyncio.ensure_future(store.load(first.ref, first.digest))
    for _ in range(20):
        await asyncio.sleep(0)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    between.forward()
    live = await store.load(second.ref, second.digest)
    assert isinstance(live, Live)
    assert live.session.subject == "second"
    await store.close()


@pytest.mark.anyio
async def test_many_callers_share_a_bounded_number_of_connections(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], namespace: str
) -> None:
    between = relay(valkey_single.node.port)
    store = _store(between.address_in(valkey_single.url), "async", namespace, 20.0)
    new = _new()
    await store.create(new)
    answers = await asyncio.gather(*(store.load(new.ref, new.digest) for _ in range(500)))
    assert all(isinstance(each, Live) for each in answers)
    assert between.accepted <= CONNECTIONS_PER_NODE
    await store.close()


@pytest.mark.anyio
async def test_callers_who_wait_for_a_connection_wait_within_their_deadline(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], namespace: str
) -> None:
    between = relay(valkey_single.node.port)
    store = _store(between.address_in(valkey_single.url), "async", namespace)
    new = _new()
    await store.create(new)
    between.hold()
    began = time.monotonic()
    answers = await asyncio.gather(
        *(store.load(new.ref, new.digest) for _ in range(3 * CONNECTIONS_PER_NODE)), return_exceptions=True
    )
    assert all(isinstance(each, StoreUnavailable) for each in answers)
    assert time.monotonic() - began < DEADLINE + 2 * ROOM
    between.forward()
    # So many have opened the breaker.
    live: object = None
    give_up = time.monotonic() + 2.0
    while not isinstance(live, Live) and time.monotonic() < give_up:
        with contextlib.suppress(StoreUnavailable):
            live = await store.load(new.ref, new.digest)
        await asyncio.sleep(0.01)
    assert isinstance(live, Live)
    await store.close()


# -- event loops and forks -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_store_outlives_the_event_loops_it_is_used_in(valkey_single: ValkeySingle, namespace: str) -> None:
    store = _store(valkey_single.url, "async", namespace)
    new = _new()

    async def create() -> None:
        await store.create(new)

    async def load() -> None:
        assert isinstance(await store.load(new.ref, new.digest), Live)

    asyncio.run(create())
    for _ in range(3):
        asyncio.run(load())
    failures: list[BaseException] = []
    together = threading.Barrier(4)

    async def often() -> None:
        together.wait(timeout=30)
        for _ in range(50):
            await load()
        await store.close()

    def loop() -> None:
        try:
            asyncio.run(often())
        except StoreUnavailable:
            # Another loop's `close` may take a connection that was about to be used.
            return
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=loop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    # What closed loops left behind is collected here, where its warnings are expected.
    gc.collect()


FORKED = """
    import asyncio, os, sys
    from coatcheck.blocking import run_blocking
    from coatcheck.core.ids import SessionRef
    from coatcheck.core.ports import Live
    from coatcheck.core.session import NewSession
    from coatcheck.stores.open import waits_of
    from coatcheck.stores.options import StoreOptions
    from coatcheck.stores.redis import RedisStore
    from coatcheck.system import REAL
    url, namespace, colour = sys.argv[1:]
    options = StoreOptions(colour=colour, waits=waits_of(colour), system=REAL, namespace=namespace, deadline=5.0)
    store = RedisStore(url, options)
    new = NewSession(ref=SessionRef(1, "h" * 16), digest="d", owner="o", subject="s", idle_us=10**10,
                     absolute_us=10**11, authority="{}", fields={})
    async def load():
        assert isinstance(await store.load(new.ref, new.digest), Live)
    if colour == "blocking":
        run = run_blocking
    else:
        runner = asyncio.Runner()
        run = runner.run
    run(store.create(new))
    run(load())
    children = []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            try:
                for _ in range(20):
                    if colour == "blocking":
                        run_blocking(load())
                    else:
                        asyncio.run(load())
                import gc
                gc.collect()
            except BaseException as failure:
                print("child", repr(failure), file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(pid)
        for _ in range(20):
            run(load())
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    for _ in range(20):
        run(load())
    run(store.close())
    print(codes)
"""


def test_a_fork_shares_no_connection(
    valkey_single: ValkeySingle, relay: Callable[[int], Relay], colour: Colour, namespace: str
) -> None:
    between = relay(valkey_single.node.port)
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            textwrap.dedent(FORKED),
            between.address_in(valkey_single.url),
            namespace,
            colour,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "[0, 0, 0]"), ran.stderr
    if colour == "blocking":
        # One connection for the parent throughout, one for each child: nobody had to connect again.
        assert between.accepted == 4


# -- failovers and slots that move ---------------------------------------------------------------------------------


@pytest.mark.xdist_group("cluster")
def test_after_a_failover_verbs_work_again(
    valkey_sentinel: ValkeySentinel, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    store = stores(valkey_sentinel.url, deadline=2.0)
    new = _new()
    run(store.create(new))
    for _ in range(2):
        valkey_sentinel.failover()
        _until_it_works(run, lambda: _commit(store, new))
        assert isinstance(run(store.load(new.ref, new.digest)), Live)


@pytest.mark.xdist_group("cluster")
def test_after_a_primary_died_verbs_work_again(
    valkey_sentinel: ValkeySentinel, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    store = stores(valkey_sentinel.url, deadline=1.0)
    new = _new()
    run(store.create(new))
    replica = valkey_sentinel.replica
    until(lambda: replica.ask("DBSIZE") != 0, within=5.0, what="the replica has the session")
    valkey_sentinel.primary.kill()
    _until_it_works(run, lambda: store.load(new.ref, new.digest))
    assert isinstance(run(_commit(store, new)), Committed)


@pytest.mark.xdist_group("cluster")
def test_a_frozen_sentinel_leaves_time_for_the_others(
    valkey_sentinel: ValkeySentinel, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    valkey_sentinel.sentinels[0].freeze()
    try:
        store = stores(valkey_sentinel.url, deadline=2.0)
        run(store.create(_new()))
    finally:
        valkey_sentinel.sentinels[0].thaw()


@pytest.mark.xdist_group("cluster")
def test_a_replica_is_never_asked_even_if_a_sentinel_names_it(
    valkey_sentinel: ValkeySentinel, stores: Callable[..., RedisStore], run: Run[Any]
) -> None:
    port = str(valkey_sentinel.replica.port)
    line = f"*2\r\n$9\r\n{LOOPBACK}\r\n${len(port)}\r\n{port}\r\n".encode()
    with _Parrot(lambda data: line) as liar:
        store = stores(f"redis+sentinel://{liar.address}/sessions")
        new = _new()
        failure = _failing(run, store.load(new.ref, new.digest))
    assert "not a primary" in str(failure)


@pytest.mark.xdist_group("cluster")
def test_a_node_that_is_away_does_not_stop_the_others(
    valkey_cluster: ValkeyCluster, stores: Callable[..., RedisStore], run: Run[Any], namespace: str
) -> None:
    store = stores(valkey_cluster.url)
    sessions = [_new(f"user-{n}", tag=n * 1500) for n in range(30)]
    for each in sessions:
        run(store.create(each))
    frozen = valkey_cluster.nodes[0]
    owners = {each.subject: valkey_cluster.node_of(f"{{{each.ref.tag:04x}}}") for each in sessions}
    now = run(store.ping())
    batch = [Activity(ref=each.ref, owner=each.owner, seen_us=now) for each in sessions]
    frozen.freeze()
    try:
        _failing(run, store.touch(batch))
        for each in sessions:
            if owners[each.subject] is not frozen:
                live = run(store.load(each.ref, each.digest))
                assert live.seen_us == now, "touched although another node was away"
    finally:
        valkey_cluster.thaw()
    run(store.touch(batch))


@pytest.mark.xdist_group("cluster")
def test_a_slot_that_moves_is_followed(
    valkey_cluster: ValkeyCluster, stores: Callable[..., RedisStore], run: Run[Any], namespace: str
) -> None:
    store = stores(valkey_cluster.url, deadline=2.0)
    new = _new("mover", tag=0xBEEF)
    run(store.create(new))
    slot = slot_of("beef")
    source = valkey_cluster.node_of("{beef}")
    target = next(node for node in valkey_cluster.nodes if node is not source)
    source_id, target_id = (node.ask("CLUSTER", "MYID") for node in (source, target))
    assert isinstance(source_id, bytes)
    assert isinstance(target_id, bytes)
    try:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        assert isinstance(run(_commit(store, new)), Committed), "still at the source"
        keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100)
        assert isinstance(keys, list)
        for key in keys:
            assert isinstance(key, bytes)
            source.ask("MIGRATE", LOOPBACK, target.port, key, 0, 5000)
        assert isinstance(run(_commit(store, new)), Committed), "ASK: moved, but not yet owned"
        assert isinstance(run(store.load(new.ref, new.digest)), Live)
    finally:
        for node in (target, source, *valkey_cluster.nodes):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)
    assert isinstance(run(_commit(store, new)), Committed), "MOVED: owned by the target"
    live = run(store.load(new.ref, new.digest))
    assert live.session.version == 4
    _give_back(valkey_cluster, slot, source, target, source_id)
    assert isinstance(run(_commit(store, new)), Committed), "and back again"


def _give_back(cluster: ValkeyCluster, slot: int, source: Any, target: Any, source_id: bytes) -> None:
    target_id = target.ask("CLUSTER", "MYID")
    # The epoch with which the target took the slot has to be known to everybody, the source above all: taking it back
    # the source chooses a newer one, and no late word of the target's can take the slot, and its keys, away again.
    _agree(cluster, slot, target_id)
    source.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", target_id)
    target.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", source_id)
    for key in target.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
        target.ask("MIGRATE", LOOPBACK, source.port, key, 0, 5000)
    for node in (source, target, *cluster.nodes):
        node.ask("CLUSTER", "SETSLOT", slot, "NODE", source_id)
    _agree(cluster, slot, source_id)


def _agree(cluster: ValkeyCluster, slot: int, owner: bytes) -> None:
    def agreed() -> bool:
        return all(_sees(node, slot) == (owner, owner) for node in cluster.nodes)

    until(agreed, within=20.0, what="every node says who serves the slot, with the newest epoch")


def _sees(node: Any, slot: int) -> tuple[bytes, bytes]:
    """Who serves a slot in the eyes of a node, and whose epoch is the newest."""
    epochs: dict[bytes, int] = {}
    owner = b""
    for line in node.ask("CLUSTER", "NODES").splitlines():
        name, _, _, _, _, _, epoch, _, *ranges = line.split()
        epochs[name] = int(epoch)
        for each in ranges:
            first, _, last = each.partition(b"-")
            if first.isdigit() and int(first) <= slot <= int(last or first):
                owner = name
    newest = max(epochs, key=lambda name: epochs[name])
    return owner, newest


def _until_it_works(run: Run[Any], verb: Callable[[], Coroutine[Any, Any, object]]) -> None:
    def works() -> bool:
        try:
            run(verb())
        except StoreUnavailable:
            return False
        return True

    until(works, within=10.0, what="the verb works again")


def _count(data: bytes) -> int:
    """How many commands are in a packet: each starts with the number of its words."""
    return max(1, sum(line.startswith(b"*") and line[1:].isdigit() for line in data.split(b"\r\n")))
