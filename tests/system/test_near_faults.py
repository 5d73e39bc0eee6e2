"""What readers with near copies do while their store, their network or they themselves are harmed.

A writer reaches the store directly; readers of both colours stand behind relays, or are processes of their own, and are
asked for every session without pause, through the fault and after it. However it goes wrong: nobody is taken for
somebody else, no check that begins later than a lease after a revoke returned accepts the session, no check lasts
longer than the store's deadline, nobody else is signed out, and copies answer again within two seconds of the end.
docs/reference/faults.md lists every fault, store and test. `--full` freezes for ten seconds and repeats every fault at
twenty random moments; the seed is printed.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from coatcheck import AsyncCoatcheck
from coatcheck.blocking import run_blocking
from coatcheck.stores.open import open_store
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.durability import findings, read_durability
from coatcheck.stores.redis.nodes import slot_of
from tests.servers.ports import LOOPBACK
from tests.servers.postgres import Postgres
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeyServers
from tests.servers.valkey_node import ValkeyNode
from tests.system.near_parts import (
    AWAY,
    LEASE_SECONDS,
    NOBODY,
    Divided,
    Gate,
    Node,
    Trial,
    Watcher,
    boot,
    settings_of,
    until,
)

pytestmark = [pytest.mark.servers, pytest.mark.timeout(1800)]

_SERVERS = {
    "postgres": "postgres",
    "valkey": "valkey_single",
    "sentinel": "valkey_sentinel",
    "cluster": "valkey_cluster",
}


def on(*names: str) -> pytest.MarkDecorator:
    """These stores. Those that share the Sentinel group or the Cluster run in one worker."""
    marks = {name: [pytest.mark.xdist_group("cluster")] if name in ("sentinel", "cluster") else [] for name in names}
    return pytest.mark.parametrize("stage", [pytest.param(name, marks=marks[name]) for name in names], indirect=True)


networked = on("postgres", "valkey", "sentinel", "cluster")
durable = on("sqlite", "postgres", "valkey", "sentinel", "cluster")


@pytest.fixture
def thorough(full: bool) -> bool:
    """Whether the long form was asked for."""
    return full or os.environ.get("COATCHECK_TEST_FULL") == "1"


class Stage:
    """A store with the relays before it, and the trial on it."""

    def __init__(self, name: str, server: Any, url: str, directory: Path, dice: Random, namespace: str) -> None:
        self.name = name
        self.server = server
        self.gate: Gate | None = None if name == "sqlite" else Gate(url, _ports(name, server))
        far = url if self.gate is None else self.gate.url
        self.trial = Trial(name, url, far, namespace, directory, dice)

    @property
    def relays(self) -> Gate:
        """What stands before the servers."""
        assert self.gate is not None
        return self.gate

    def close(self) -> None:
        """Stop the readers, then the relays."""
        try:
            if self.gate is not None:
                self.gate.forward()
            self.trial.close()
        finally:
            if self.gate is not None:
                self.gate.close()


def _ports(name: str, server: Any) -> list[int]:
    if name == "postgres":
        return [server.port]
    assert isinstance(server, ValkeyServers)
    sentinels = server.sentinels if isinstance(server, ValkeySentinel) else ()
    return [node.port for node in (*server.nodes, *sentinels)]


@pytest.fixture
def stage(request: pytest.FixtureRequest, tmp_path: Path, seed: int, namespace: str, full: bool) -> Iterator[Stage]:
    """The store a test names."""
    name: str = request.param
    dice = Random(f"{seed}-{request.node.name}")
    with ExitStack() as stack:
        server: Any = None
        if name == "sqlite":
            url = f"sqlite:///{tmp_path / 'sessions.db'}"
        else:
            server = request.getfixturevalue(_SERVERS[name])
            url = stack.enter_context(server.database()) + "?sslmode=disable" if name == "postgres" else server.url
        made = Stage(name, server, url, tmp_path, dice, namespace)
        stack.callback(made.close)
        yield made


@contextmanager
def aside(work: Callable[[], object]) -> Iterator[None]:
    """Something that happens meanwhile; it has ended, and did not fail, when the block is left."""
    with ThreadPoolExecutor(1) as helper:
        begun = helper.submit(work)
        yield
        begun.result(timeout=60)


def go_through(
    trial: Trial, begin: Callable[[], object], end: Callable[[], object], *, seconds: float, rounds: int
) -> None:
    """One session is ended just before the fault, one during it, one after it; two others stay."""
    trial.sign_in(2, stays=True)
    trial.read_here()
    for _ in range(rounds):
        before, during, after = trial.sign_in(3)
        trial.more()
        trial.warm()
        trial.at_any_phase()
        trial.revoke(before)
        begin()
        # Where the writer cannot reach the store either, it goes on trying.
        with aside(partial(trial.revoke, during)):
            trial.last(seconds)
            end()
            trial.recover()
        trial.await_refusals()
        trial.revoke(after)
        trial.await_told(after)
        trial.retire()
    trial.judge()


def _rounds(thorough: bool) -> int:
    return 20 if thorough else 1


def _rounds_apart(thorough: bool) -> int:
    # A process is told of all its sessions when it starts, and asks about them to the end.
    return 5 if thorough else 1


def _cutting_by_turns(stage: Stage, kind: str) -> Callable[[], None]:
    """Reset and swallowed by turns, and which of the two comes first is left to chance."""
    harms = itertools.cycle(stage.trial.dice.sample(("reset", "swallow"), 2))
    return lambda: stage.relays.harm(kind, next(harms))


# -- the network -----------------------------------------------------------------------------------------------------


@networked
def test_a_feed_that_is_cut_while_commands_get_through(stage: Stage, thorough: bool) -> None:
    """The copies of the reader are told nothing any more, and nothing else shows it."""
    begin = _cutting_by_turns(stage, "feed")
    go_through(stage.trial, begin, stage.relays.forward, seconds=1.2, rounds=_rounds(thorough))


@networked
def test_commands_that_are_cut_while_the_feed_gets_through(stage: Stage, thorough: bool) -> None:
    """What is told still counts at once; what is not known cannot be asked."""
    begin = _cutting_by_turns(stage, "commands")
    go_through(stage.trial, begin, stage.relays.forward, seconds=1.2, rounds=_rounds(thorough))


@networked
def test_an_answer_to_a_heartbeat_that_comes_late(stage: Stage, thorough: bool) -> None:
    """It was given before the session was ended and arrives long after; what was told behind it never does."""
    trial = stage.trial
    trial.sign_in(2, stays=True)
    trial.read_here()
    for _ in range(_rounds(thorough)):
        (ended,) = trial.sign_in()
        trial.more()
        trial.warm()
        trial.at_any_phase()
        stage.relays.harm("feed", "keep")
        # A heartbeat goes out every third of a lease.
        trial.last(0.4)
        stage.relays.harm("feed", "swallow")
        trial.revoke(ended)
        trial.last(0.45)
        stage.relays.let_out()
        trial.last(0.85)
        stage.relays.forward()
        trial.recover()
        trial.await_refusals()
        trial.retire()
    trial.judge()


@networked
def test_replies_that_are_cut_after_one_byte(stage: Stage, thorough: bool) -> None:
    """Every connection ends within its first answer: no half answer is ever taken for a whole one."""
    begin = partial(stage.relays.harm, "all", "stump")
    go_through(stage.trial, begin, stage.relays.forward, seconds=1.2, rounds=_rounds(thorough))


@networked
def test_a_slow_link(stage: Stage, thorough: bool) -> None:
    """Everything is late, each way, by up to a ninth of a second."""
    begin = partial(stage.relays.slow, 0.11)
    go_through(stage.trial, begin, stage.relays.forward, seconds=1.5, rounds=_rounds(thorough))


# -- the store -------------------------------------------------------------------------------------------------------


@networked
def test_a_store_that_is_frozen(stage: Stage, thorough: bool) -> None:
    """SIGSTOP of every primary. The sentinels promote the replica meanwhile, and the old primary wakes up and still
    thinks that it is one: what it acknowledges then is lost, so the writer wants a replica to have it too."""
    freezing = (10.0, 3) if thorough else (1.5, 1)
    promoted: list[object] = []

    def begin() -> None:
        if isinstance(stage.server, ValkeySentinel):
            promoted[:] = [stage.server.replica]
        stage.server.freeze()

    def end() -> None:
        if isinstance(stage.server, ValkeySentinel):
            (node,) = promoted
            stage.server.await_promotion(node)  # type: ignore[arg-type]
            for each in stage.server.nodes:
                if each.frozen:
                    each.thaw()
            # A replica again, which the sentinels would make of it some seconds later.
            stage.server.await_ready()
        else:
            stage.server.thaw()

    if isinstance(stage.server, ValkeySentinel):
        stage.trial.require_replicas(1)
    go_through(stage.trial, begin, end, seconds=freezing[0], rounds=freezing[1])


@on("sqlite")
def test_a_file_that_another_process_holds_locked(stage: Stage, thorough: bool) -> None:
    """Somebody stopped in the middle of a transaction: nothing can be written, everything can be read."""
    trial = stage.trial
    trial.sign_in(2, stays=True)
    ended = trial.sign_in(3 * _rounds_apart(thorough))
    trial.read_apart()
    path = trial.url.removeprefix("sqlite:///")
    for before, during, after in zip(ended[::3], ended[1::3], ended[2::3], strict=True):
        trial.warm()
        trial.at_any_phase()
        trial.revoke(before)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("begin immediate")
            other.execute(f"update {trial.namespace}_sessions set seen_us = seen_us")
            with aside(partial(trial.revoke, during)):
                trial.last(1.2)
                other.execute("rollback")
                trial.recover()
        trial.await_refusals()
        trial.revoke(after)
        trial.await_told(after)
    trial.judge()


@networked
def test_a_restart_with_its_data(stage: Stage, thorough: bool) -> None:
    """Every process ends and starts again on what it has written; another run is another store until it is read."""
    go_through(stage.trial, lambda: None, stage.server.restart, seconds=0.1, rounds=3 if thorough else 1)


@on("valkey", "sentinel", "cluster")
def test_a_restart_without_its_data(stage: Stage) -> None:
    """The data is gone: whoever was signed in is not, and who signs in afterwards stays so."""
    trial = stage.trial
    lost = trial.sign_in(3)
    trial.read_here()
    trial.warm()
    trial.at_any_phase()
    stage.server.kill()
    _note_loss(trial, lost)
    for node in stage.server.nodes:
        shutil.rmtree(node.directory.path / "appendonlydir")
    stage.server.ensure_running()
    _go_on_after_loss(trial)


def test_a_database_that_is_restored_from_a_backup(
    tmp_path: Path, seed: int, namespace: str, request: pytest.FixtureRequest
) -> None:
    """A PostgreSQL server comes back with the files it had before anybody was signed in."""
    dice = Random(f"{seed}-{request.node.name}")
    with Postgres() as server, ExitStack() as stack:
        stage = Stage("postgres", server, f"{server.url}?sslmode=disable", tmp_path, dice, namespace)
        stack.callback(stage.close)
        trial = stage.trial
        data = server.directory.path / "data"
        server.child.stop()
        _copy(data, data.with_name("backup"))
        server.ensure_running()
        lost = trial.sign_in(3)
        trial.read_here()
        trial.warm()
        trial.at_any_phase()
        server.kill()
        _note_loss(trial, lost)
        shutil.rmtree(data)
        data.with_name("backup").rename(data)
        server.ensure_running()
        _go_on_after_loss(trial)


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    for each in (source, *source.rglob("*")):
        copied, owner = target / each.relative_to(source), each.stat()
        os.chown(copied, owner.st_uid, owner.st_gid)


def _note_loss(trial: Trial, lost: list[int]) -> None:
    trial.revoked.update(dict.fromkeys(lost, boot()))


def _go_on_after_loss(trial: Trial) -> None:
    trial.over = boot()
    trial.sign_in(2, stays=True)
    trial.more()
    trial.recover()
    trial.await_refusals()
    trial.judge(signs_out=True)


@on("sqlite")
def test_a_file_that_is_put_back_from_a_backup(stage: Stage) -> None:
    """Whoever signed in since the backup is signed out; who had before stays signed in."""
    trial = stage.trial
    path = Path(trial.url.removeprefix("sqlite:///"))
    trial.sign_in(2, stays=True)
    backup = path.with_name("backup.db")
    with closing(sqlite3.connect(path)) as now, closing(sqlite3.connect(backup)) as then:
        now.backup(then)
    lost = trial.sign_in(2)
    trial.read_apart()
    trial.warm()
    trial.at_any_phase()
    # With its log, as one has to: SQLite would read the old log into the new file.
    for ending in ("-wal", "-shm"):
        path.with_name(path.name + ending).unlink(missing_ok=True)
    os.replace(backup, path)
    _note_loss(trial, lost)
    trial.recover()
    trial.await_refusals()
    trial.judge()


@durable
def test_a_record_deleted_in_the_stores_own_shell(stage: Stage, thorough: bool) -> None:
    """Nobody who writes past the product is unheard: the session is over within a lease."""
    trial = stage.trial
    trial.sign_in(2, stays=True)
    deleted = trial.sign_in(_rounds_apart(thorough))
    if stage.name == "sqlite":
        trial.read_apart()
    else:
        trial.read_here()
    trial.warm()
    for who in deleted:
        trial.at_any_phase()
        _delete(stage, who)
        trial.revoked[who] = boot()
        trial.await_told(who)
    trial.recover()
    trial.await_refusals()
    trial.judge()


def _delete(stage: Stage, who: int) -> None:
    trial, server = stage.trial, stage.server
    ref = trial.ref(who)
    match stage.name:
        case "sqlite":
            with closing(sqlite3.connect(trial.url.removeprefix("sqlite:///"), isolation_level=None)) as shell:
                gone = shell.execute(f"delete from {trial.namespace}_sessions where handle = ?", (ref.handle,))
                assert gone.rowcount == 1
        case "postgres":
            import psycopg

            with psycopg.connect(trial.url, autocommit=True) as console:
                done = console.execute(
                    f"DELETE FROM {trial.namespace}_sessions WHERE handle = %s".encode(), (ref.handle,)
                )
                assert done.rowcount == 1
        case _:
            key = f"{trial.namespace}:s:{{{ref.tag:04x}}}{ref.handle}"
            node = server.node_of(key) if isinstance(server, ValkeyCluster) else server.primaries[0]
            assert node.ask("DEL", key) == 1


@durable
def test_many_revokes_at_once_of_which_none_is_lost(stage: Stage, thorough: bool) -> None:
    """As many as the writer can send, while both readers go through all sessions without pause."""
    trial, count = stage.trial, 10_000 if thorough else 1_000
    if stage.name == "sqlite":
        # Each is on the disk before it is answered.
        count = 2_000 if thorough else 300

    async def in_a_pipeline(work: Callable[[AsyncCoatcheck, int], Any], numbers: list[int]) -> None:
        store = open_store(trial.url, colour="async", namespace=trial.namespace, deadline=30.0)
        async with AsyncCoatcheck(store, settings=settings_of(trial.namespace)) as coat:
            for first in range(0, len(numbers), 200):
                await asyncio.gather(*(work(coat, who) for who in numbers[first : first + 200]))

    async def sign_in(coat: AsyncCoatcheck, who: int) -> None:
        session = coat.session(None)
        await session.login(f"person{who}")
        trial.cookies[who] = session.cookie_action.id.text  # type: ignore[union-attr]

    async def revoke(coat: AsyncCoatcheck, who: int) -> None:
        assert (await coat.revoke_session(coat.engine.sid(trial.ref(who)), reason="stolen")).ended == 1
        trial.revoked[who] = boot()

    everybody = list(range(count + 20))
    trial.subjects = [f"person{who}" for who in everybody]
    trial.cookies = [""] * len(everybody)
    asyncio.run(in_a_pipeline(sign_in, everybody))
    trial.stays = everybody[count:]
    for node in trial.sweep_here():
        until(partial(_has_found, node, len(everybody), copied=True), within=60.0, what=f"{node.name} has copies")
    began = boot()
    asyncio.run(in_a_pipeline(revoke, everybody[:count]))
    print(f"{stage.name}: {count / (boot() - began):.0f} revokes a second")
    for reader in trial.nodes:
        until(partial(_has_found, reader, count, copied=False), within=30.0, what=f"{reader.name} has heard of each")
    trial.judge()


def _has_found(node: Node, count: int, *, copied: bool) -> bool:
    """Whether so many sessions were answered from copies, or were found ended."""
    return len({each.who for each in node.checks if (each.copied if copied else each.said == NOBODY)}) == count


# -- one node --------------------------------------------------------------------------------------------------------


@durable
def test_a_reader_that_is_stopped_beyond_its_lease(stage: Stage, thorough: bool) -> None:
    """SIGSTOP of the reader's process, as a hypervisor or a laptop's lid does; what was told meanwhile waits unread."""
    trial = stage.trial
    trial.sign_in(2, stays=True)
    ended = trial.sign_in(2 * _rounds_apart(thorough))
    processes = trial.read_apart()
    for before, during in zip(ended[::2], ended[1::2], strict=True):
        trial.warm()
        trial.at_any_phase()
        trial.revoke(before)
        stopped = boot()
        for process in processes:
            process.stop()
        trial.revoke(during)
        trial.last(LEASE_SECONDS + 0.3)
        for process in processes:
            process.go_on()
        trial.pauses.append((stopped, boot()))
        trial.recover()
        trial.await_refusals()
    trial.judge()


@durable
def test_a_clock_of_the_store_that_is_stepped(stage: Stage, thorough: bool) -> None:
    """By ten minutes, forwards and back or the other way round; no session is old enough to end by it."""
    trial = stage.trial
    step = trial.dice.choice((-600, 600)) * 1_000_000

    def step_once() -> None:
        trial.offset_us += step

    def step_back() -> None:
        trial.offset_us -= step

    go_through(trial, step_once, step_back, seconds=0.7, rounds=_rounds(thorough))


@durable
def test_a_fork_after_warm_up(stage: Stage) -> None:
    """As a server does that loads the application before it forks: parent and child answer, each with a feed of its
    own."""
    trial = stage.trial
    trial.sign_in(2, stays=True)
    (ended,) = trial.sign_in()
    trial.read_apart(forks=True, colours=("blocking",))
    trial.warm()
    trial.at_any_phase()
    trial.revoke(ended)
    trial.await_told(ended)
    trial.recover()
    trial.await_refusals()
    trial.judge()


# -- who is the primary ----------------------------------------------------------------------------------------------


def _await_replica(server: ValkeySentinel) -> None:
    """What the replica has not seen is lost by the store, not by us."""

    def has_all() -> bool:
        written = server.primary.ask_fields("INFO", "replication")["master_repl_offset"]
        return int(server.replica.ask_fields("INFO", "replication").get("slave_repl_offset", "-1")) >= int(written)

    until(has_all, within=10.0, what="the replica has everything")


@on("sentinel")
def test_a_primary_that_is_killed_under_sentinel(stage: Stage, thorough: bool) -> None:
    """kill -9: the replica takes over, and what it is told counts."""
    server = stage.server
    promoted: list[Any] = []

    def begin() -> None:
        # The one that was killed the last time is the replica now.
        server.ensure_running()
        _await_replica(server)
        promoted[:] = [server.replica]
        server.primary.kill()

    def end() -> None:
        server.await_promotion(promoted[0])

    go_through(stage.trial, begin, end, seconds=0.5, rounds=5 if thorough else 1)


@contextmanager
def divided(trial_of: Callable[[str, str], Trial], **settings: Any) -> Iterator[tuple[Divided, Trial]]:
    group = Divided(**settings)
    with ExitStack() as stack:
        stack.callback(group.close)
        group.start()
        trial = trial_of(group.url, group.gate.url)
        stack.callback(trial.close)
        stack.callback(group.unite)
        yield group, trial


@pytest.fixture
def trial_of(tmp_path: Path, seed: int, namespace: str, request: pytest.FixtureRequest) -> Callable[[str, str], Trial]:
    """A trial at two addresses: the writer's and the readers'."""
    return lambda url, far: Trial("sentinel", url, far, namespace, tmp_path, Random(f"{seed}-{request.node.name}"))


def _reach_as_the_doctor_says_it(url: str) -> str:
    store = RedisStore(url, _options())
    run_blocking(store.open())
    try:
        durability = run_blocking(read_durability(store._dispatcher))
    finally:
        run_blocking(store.close())
    found = findings(durability, replicas=0, lease=LEASE_SECONDS, reach=LEASE_SECONDS, usual="one lease")
    return next(each.found for each in found if each.name == "reach")


def _options() -> Any:
    from coatcheck.stores.open import waits_of
    from coatcheck.stores.options import StoreOptions
    from coatcheck.system import REAL

    return StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL)


def test_an_old_primary_that_needs_its_replica_is_believed_for_one_lease(
    trial_of: Callable[[str, str], Trial],
) -> None:
    """The readers are cut off together with the old primary, and the session is ended at the new one."""
    with divided(trial_of, down_after_ms=4_200, lag=2) as (group, trial):
        assert _reach_as_the_doctor_says_it(group.url) == "one lease, in a split brain too"
        trial.sign_in(2, stays=True)
        (ended,) = trial.sign_in()
        trial.read_here()
        trial.read_here(group.url)
        trial.warm()
        until(lambda: _offsets_agree(group), within=10.0, what="the replica has everything")
        trial.at_any_phase()
        group.divide()
        group.await_promotion()
        trial.revoke(ended)
        trial.last(LEASE_SECONDS + 0.2)
        group.unite()
        trial.recover()
        trial.await_refusals()
        trial.judge()


def test_an_old_primary_that_needs_no_replica_is_believed_until_the_sides_meet(
    trial_of: Callable[[str, str], Trial], capsys: pytest.CaptureFixture[str]
) -> None:
    """What the other test is for: the same split without `min-replicas-to-write`. The doctor says so beforehand."""
    with divided(trial_of, down_after_ms=500, lag=None) as (group, trial):
        assert "unbounded in a split brain" in _reach_as_the_doctor_says_it(group.url)
        trial.sign_in(2, stays=True)
        (ended,) = trial.sign_in()
        beyond = trial.read_here()
        here = trial.read_here(group.url)
        trial.warm()
        until(lambda: _offsets_agree(group), within=10.0, what="the replica has everything")
        group.divide()
        group.await_promotion()
        trial.revoke(ended)
        trial.last(LEASE_SECONDS + 0.5)
        for node in here:
            assert not _accepted_late(trial, node, ended), "on the new primary's side it is one lease all the same"
        seen = max((late for node in beyond for late in _accepted_late(trial, node, ended)), default=0.0)
        group.unite()
        trial.recover()
        trial.await_told(ended)
        with capsys.disabled():
            print(f"\nsplit brain without min-replicas-to-write: accepted {seen:.1f} s after the end, as documented")


def _offsets_agree(group: Divided) -> bool:
    written = int(group.old.ask_fields("INFO", "replication")["master_repl_offset"])
    return int(group.new.ask_fields("INFO", "replication").get("slave_repl_offset", "-1")) >= written


def _accepted_late(trial: Trial, node: Watcher, who: int) -> list[float]:
    ended = trial.revoked[who] + LEASE_SECONDS
    return [
        each.began - trial.revoked[who]
        for each in node.checks
        if each.who == who and each.said == trial.subjects[who] and each.began > ended
    ]


@on("cluster")
def test_a_primary_that_is_cut_off_from_its_cluster(stage: Stage) -> None:
    """As in a split brain: it takes no writes once it has missed the others, and is believed for a lease after that."""
    trial, cluster = stage.trial, stage.server
    assert isinstance(cluster, ValkeyCluster)
    kept = trial.sign_in(12, stays=True)
    alone = cluster.node_of(f"{{{trial.ref(kept[0]).tag:04x}}}")
    theirs = [who for who in kept if cluster.node_of(f"{{{trial.ref(who).tag:04x}}}") is alone]
    nodes = trial.read_here()
    trial.warm()
    lost = boot()
    for node in cluster.nodes:
        if node is not alone:
            node.freeze()
    until(partial(_is_down, alone), within=10.0, what="the cluster is down")
    # It pings each of the others every half of the timeout at least, and then waits for a whole one.
    assert boot() - lost <= 1.5 * _NODE_TIMEOUT_SECONDS + 1.0
    stopped = boot()
    trial.last(LEASE_SECONDS + 0.2)
    for reader in nodes:
        late = [each for each in reader.checks if each.who in theirs and each.began > stopped + LEASE_SECONDS]
        assert late, reader.name
        assert all(each.said == AWAY for each in late), reader.name
    cluster.thaw()
    trial.recover()
    trial.judge()


_NODE_TIMEOUT_SECONDS = 2.0


def _is_down(node: ValkeyNode) -> bool:
    return node.ask_fields("CLUSTER", "INFO")["cluster_state"] == "fail"


@on("cluster")
def test_a_slot_that_moves_to_another_node(stage: Stage, thorough: bool) -> None:
    """Key by key, as an operator's tool does it: one of a subject's two sessions is ended when it has half moved."""
    trial, cluster = stage.trial, stage.server
    assert isinstance(cluster, ValkeyCluster)
    trial.sign_in(1, stays=True)
    trial.sign_in(subject="mover", stays=True)
    trial.read_here()
    for _ in range(3 if thorough else 1):
        before, during, after = (trial.sign_in(subject="mover")[0] for _ in range(3))
        trial.more()
        trial.warm()
        slot = slot_of(f"{trial.ref(during).tag:04x}")
        source = cluster.node_of(f"{{{trial.ref(during).tag:04x}}}")
        target = trial.dice.choice([node for node in cluster.nodes if node is not source])
        trial.revoke(before)
        try:
            _move(trial, slot, source, target, partial(trial.revoke, during))
            for node in (target, source, *cluster.nodes):
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", _id(target))
            trial.recover()
            trial.await_refusals()
            trial.revoke(after)
            trial.await_told(after)
        finally:
            _move(trial, slot, target, source, lambda: None)
            for node in (source, target, *cluster.nodes):
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", _id(source))
        trial.recover()
    trial.judge()


def _id(node: Any) -> bytes:
    found = node.ask("CLUSTER", "MYID")
    assert isinstance(found, bytes)
    return found


def _move(trial: Trial, slot: int, source: Any, target: Any, half_way: Callable[[], object]) -> None:
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", _id(source))
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", _id(target))
    keys = source.ask("CLUSTER", "GETKEYSINSLOT", slot, 1000)
    for number, key in enumerate(keys):
        if number == len(keys) // 2:
            trial.last(0.3)
            half_way()
            trial.last(0.3)
        source.ask("MIGRATE", LOOPBACK, target.port, key, 0, 5000)
