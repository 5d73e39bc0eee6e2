"""The end of a session that replicas have to confirm: refused where they do not, never lost; and what servers say of
how they keep what is written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    Admitted,
    Alive,
    Changes,
    Colour,
    Committed,
    Denial,
    Ended,
    FamilyEnded,
    FamilyReused,
    FamilyRotated,
    Gone,
    Live,
    Revoked,
)
from coatcheck.core.refresh_token import NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.manager import Coatcheck
from coatcheck.settings import Settings
from coatcheck.stores.conformance import Bench, Clock
from coatcheck.stores.conformance.bench import HOUR_US, WIDE
from coatcheck.stores.open import open_store, waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.dispatch import Call, Dispatcher, _Task
from coatcheck.stores.redis.durability import (
    Durability,
    Finding,
    SentinelReading,
    ServerReading,
    findings,
    reading_of,
)
from coatcheck.stores.redis.nodes import slot_of
from coatcheck.system import REAL
from tests.servers.ports import CLUSTER_BUS_OFFSET, LOOPBACK
from tests.servers.processes import until
from tests.servers.resp import ReplyError
from tests.servers.valkey import ValkeyCluster, ValkeySentinel
from tests.servers.valkey_node import ValkeyNode

DEADLINE = 0.4
# What a busy machine may add to a deadline before a test calls it missed.
ROOM = 0.4
# A replica that is well confirms long before this.
PATIENT = 10.0
GRACE_US = 30 * SECOND_US
DENY_US = 900 * SECOND_US
REPLICA = "master_link_status"


@dataclass
class Pair:
    """A primary and the replica that follows it."""

    primary: ValkeyNode
    replica: ValkeyNode

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.primary.port}/0"

    def mend(self) -> None:
        """The replica follows, and the primary holds it for well."""
        if self.replica.frozen:
            self.replica.thaw()
        until(lambda: follows(self.primary, self.replica), within=10.0, what="the replica to follow")


def follows(primary: ValkeyNode, replica: ValkeyNode) -> bool:
    if replica.ask_fields("INFO", "replication").get(REPLICA) != "up":
        return False
    return "state=online" in primary.ask_fields("INFO", "replication").get("slave0", "")


@pytest.fixture(scope="module")
def two() -> Iterator[Pair]:
    with ExitStack() as stack:
        primary = ValkeyNode()
        stack.callback(primary.close)
        primary.start()
        replica = ValkeyNode(settings={"replicaof": f"{LOOPBACK} {primary.port}"})
        stack.callback(replica.close)
        replica.start()
        pair = Pair(primary, replica)
        pair.mend()
        yield pair


@pytest.fixture
def pair(two: Pair) -> Iterator[Pair]:
    yield two
    two.mend()


@dataclass
class Desk:
    """Stores of one colour and name space, closed after the test."""

    colour: Colour
    namespace: str
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    clock: Clock = field(default_factory=Clock)
    made: list[RedisStore] = field(default_factory=list)

    def store(self, url: str, *, replicas: int = 1, deadline: float = DEADLINE) -> RedisStore:
        options = StoreOptions(
            colour=self.colour,
            waits=waits_of(self.colour),
            system=REAL,
            namespace=self.namespace,
            deadline=deadline,
            replicas=replicas,
            clock_offset_us=self.clock,
        )
        self.made.append(RedisStore(url, options))
        self.run(self.made[-1].open())
        return self.made[-1]

    def bench(self, url: str) -> Bench:
        """Two stores that want one replica: an impatient one and a patient one."""
        return Bench(store=self.store(url), other=self.store(url, deadline=PATIENT), clock=self.clock, stopped=False)

    def refused(self, work: Coroutine[Any, Any, object]) -> OutcomeUnknown:
        """The failure of a verb that no replica confirmed, which came within the deadline."""
        began = time.monotonic()
        with pytest.raises(OutcomeUnknown, match=r"0 of 1 replicas of .* repeat it") as caught:
            self.run(work)
        assert time.monotonic() - began < DEADLINE + ROOM
        return caught.value


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, namespace: str) -> Iterator[Desk]:
    yield from at_desk(request.param, namespace)


@pytest.fixture
def blocking(namespace: str) -> Iterator[Desk]:
    yield from at_desk("blocking", namespace)


def at_desk(colour: Colour, namespace: str) -> Iterator[Desk]:
    with asyncio.Runner() as runner:
        desk = Desk(colour, namespace, run_blocking if colour == "blocking" else runner.run)
        yield desk
        for store in desk.made:
            desk.run(store.close())


def session_key(namespace: str, ref: SessionRef) -> str:
    return f"{namespace}:s:{{{ref.tag:04x}}}{ref.handle}"


# -- every verb that ends something --------------------------------------------------------------------------------


@dataclass
class Scene:
    """What a verb ends: a session with a family. There is a second session of the subject, and a third may follow."""

    session: NewSession
    family: NewFamily
    third: NewSession

    async def present(self, store: RedisStore, successor: str) -> object:
        """Exchange the first token of the family."""
        return await store.rotate_refresh(
            self.family.ref,
            generation=1,
            digest=self.family.digest,
            successor=successor * 43,
            sealed=b"sealed",
            grace_us=GRACE_US,
            client="",
            key="",
            deny_us=DENY_US,
        )


async def set_scene(bench: Bench) -> Scene:
    session, second = bench.new_session(), bench.new_session()
    for new in (session, second):
        await bench.created(new)
    family = bench.new_family(session)
    await bench.other.create_family(family)
    scene = Scene(session=session, family=family, third=bench.new_session())
    bench.clock.offset_us += GRACE_US
    assert isinstance(await scene.present(bench.other, "S"), FamilyRotated)  # type: ignore[arg-type]
    bench.clock.offset_us += GRACE_US
    return scene


Verb = Callable[[Scene, RedisStore], Coroutine[Any, Any, object]]


async def expire(scene: Scene, store: RedisStore) -> object:
    return await store.expire_idle(scene.session.ref)


def denial(kind: Any, name: str) -> Verb:
    async def deny(scene: Scene, store: RedisStore) -> object:
        until_us = await store.ping() + DENY_US
        await store.deny(scene.session.ref.tag, Denial(kind=kind, id=name, until_us=until_us))
        return None

    return deny


def admission(*, maximum: int, replacing: bool) -> Verb:
    async def admit(scene: Scene, store: RedisStore) -> object:
        supersedes = scene.session.ref if replacing else None
        return await store.admit(scene.third, maximum=maximum, on_limit="evict_oldest", supersedes=supersedes)

    return admit


ENDING: dict[str, tuple[Verb, object]] = {
    "revoke": (lambda scene, store: store.revoke(scene.session.ref, reason="logout"), Revoked),
    "revoke and deny": (
        lambda scene, store: store.revoke(scene.session.ref, reason="logout", deny_us=DENY_US),
        Revoked,
    ),
    "revoke_owner": (
        lambda scene, store: store.revoke_owner(scene.session.ref.tag, scene.session.owner, reason="logout"),
        object,
    ),
    "admit that evicts": (admission(maximum=2, replacing=False), Admitted),
    "admit that supersedes": (admission(maximum=10, replacing=True), Admitted),
    "reuse of a refresh token": (lambda scene, store: scene.present(store, "T"), (FamilyReused, FamilyEnded)),
    "expire_idle": (expire, Gone),
    "deny a session": (denial("sid", "A" * 22), object),
    "deny a token": (denial("jti", "token-7"), object),
}


@pytest.mark.servers
@pytest.mark.parametrize("name", ENDING)
def test_what_no_replica_confirmed_is_refused_and_its_repetition_counts(name: str, pair: Pair, blocking: Desk) -> None:
    verb, kind = ENDING[name]
    bench = blocking.bench(pair.url)
    scene = blocking.run(set_scene(bench))
    if name == "expire_idle":
        bench.clock.offset_us += 2 * HOUR_US
    pair.replica.freeze()
    blocking.refused(verb(scene, bench.store))  # type: ignore[arg-type]
    # Another connection has written nothing, and the verb has nothing left to write: WAIT alone would say yes.
    blocking.refused(verb(scene, blocking.store(pair.url)))
    pair.mend()
    answer = blocking.run(verb(scene, bench.other))  # type: ignore[arg-type]
    assert isinstance(answer, kind)  # type: ignore[arg-type]
    key = session_key(blocking.namespace, scene.session.ref)
    assert pair.replica.ask("DUMP", key) == pair.primary.ask("DUMP", key), "what the verb ended is at the replica"


@pytest.mark.servers
def test_both_colours_refuse_and_repeat_alike(pair: Pair, desk: Desk) -> None:
    bench = desk.bench(pair.url)
    new = bench.new_session()
    desk.run(bench.created(new))
    pair.replica.freeze()
    desk.refused(bench.store.revoke(new.ref, reason="logout"))
    assert isinstance(desk.run(bench.store.load(new.ref, new.digest)), Ended), "ended here, and perhaps not for good"
    pair.mend()
    assert desk.run(bench.other.revoke(new.ref, reason="logout")).ended is False, "the first call did it"


@pytest.mark.servers
def test_what_ends_nothing_waits_for_no_replica(pair: Pair, blocking: Desk) -> None:
    bench = blocking.bench(pair.url)
    scene = blocking.run(set_scene(bench))
    store, run = bench.store, blocking.run
    pair.replica.freeze()
    began = time.monotonic()
    run(store.create(bench.new_session("another")))
    run(store.admit(bench.new_session(), maximum=10, on_limit="evict_oldest"))
    assert isinstance(run(store.commit(scene.session.ref, Changes(put={"a": "1"}), limits=WIDE)), Committed)
    assert isinstance(run(store.expire_idle(scene.session.ref)), Alive)
    assert isinstance(run(store.load(scene.session.ref, scene.session.digest)), Live)
    assert time.monotonic() - began < DEADLINE, "nobody has waited"


@pytest.mark.servers
def test_where_no_replica_is_asked_for_none_is_waited_for(pair: Pair, blocking: Desk) -> None:
    store = blocking.store(pair.url, replicas=0)
    bench = Bench(store=store, other=store, clock=blocking.clock, stopped=False)
    scene = blocking.run(set_scene(bench))
    pair.replica.freeze()
    pair.primary.ask("CONFIG", "RESETSTAT")
    for name in ("revoke", "revoke_owner", "deny a session"):
        blocking.run(ENDING[name][0](scene, store))
    assert "cmdstat_wait" not in pair.primary.ask_fields("INFO", "commandstats")


@pytest.mark.servers
def test_a_server_that_wants_more_replicas_than_it_has_ends_nothing(pair: Pair, desk: Desk) -> None:
    bench = desk.bench(pair.url)
    new = bench.new_session()
    desk.run(bench.created(new))
    pair.primary.ask("CONFIG", "SET", "min-replicas-to-write", 2)
    try:
        for store in (bench.store, desk.store(pair.url, replicas=0)):
            with pytest.raises(StoreUnavailable, match="NOREPLICAS") as caught:
                desk.run(store.revoke(new.ref, reason="logout"))
            assert not isinstance(caught.value, OutcomeUnknown), "it was refused before anything was written"
        assert isinstance(desk.run(bench.store.load(new.ref, new.digest)), Live)
    finally:
        pair.primary.ask("CONFIG", "SET", "min-replicas-to-write", 0)
    assert desk.run(bench.other.revoke(new.ref, reason="logout")).ended


@pytest.mark.servers
def test_a_user_who_may_not_wait_is_told_that_it_is_not_known(pair: Pair, blocking: Desk) -> None:
    pair.primary.ask("ACL", "SETUSER", "door", "on", ">sesame", "~*", "&*", "+@all", "-wait")
    try:
        store = blocking.store(f"redis://door:sesame@{LOOPBACK}:{pair.primary.port}/0")
        bench = Bench(store=store, other=store, clock=blocking.clock, stopped=False)
        new = bench.new_session()
        blocking.run(bench.created(new))
        with pytest.raises(OutcomeUnknown, match="whether replicas have it cannot be asked"):
            blocking.run(store.revoke(new.ref, reason="logout"))
    finally:
        pair.primary.ask("ACL", "DELUSER", "door")


@pytest.mark.servers
def test_the_setting_reaches_the_store(pair: Pair, namespace: str) -> None:
    settings = Settings(namespace=namespace, replicas=2, store_deadline=timedelta(seconds=DEADLINE))
    with Coatcheck(pair.url, settings=settings) as coat, pytest.raises(StoreUnavailable, match="1 of 2 replicas"):
        coat.revoke_subject("ann", reason="logout")


def test_a_number_below_zero_is_no_number_of_replicas() -> None:
    with pytest.raises(ConfigurationError, match="replicas"):
        open_store("memory:", colour="blocking", replicas=-1)


# -- Sentinel and Cluster ------------------------------------------------------------------------------------------


@pytest.mark.servers
@pytest.mark.xdist_group("cluster")
def test_under_sentinel_a_revoke_is_refused_until_the_replica_is_back(
    valkey_sentinel: ValkeySentinel, blocking: Desk
) -> None:
    bench = blocking.bench(valkey_sentinel.url)
    new = bench.new_session()
    blocking.run(bench.created(new))
    replica = valkey_sentinel.replica
    replica.freeze()
    blocking.refused(bench.store.revoke(new.ref, reason="logout"))
    replica.thaw()
    valkey_sentinel.await_ready()
    blocking.run(bench.other.revoke(new.ref, reason="logout"))
    # What was confirmed is what the replica knows when it has taken over.
    valkey_sentinel.failover()
    ended = blocking.run(bench.other.load(new.ref, new.digest))
    assert isinstance(ended, Ended)


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(primaries=1) as cluster:
        yield cluster


@pytest.mark.servers
def test_on_a_cluster_a_revoke_and_its_denial_are_refused_until_there_is_a_replica(
    small_cluster: ValkeyCluster, blocking: Desk
) -> None:
    bench = blocking.bench(small_cluster.url)
    new = bench.new_session()
    blocking.run(bench.created(new))
    blocking.refused(bench.store.revoke(new.ref, reason="logout", deny_us=DENY_US))
    (primary,) = small_cluster.nodes
    replica = ValkeyNode(settings={"cluster-enabled": "yes", "cluster-node-timeout": "2000"})
    try:
        replica.start()
        primary.ask("CLUSTER", "MEET", LOOPBACK, replica.port, replica.port + CLUSTER_BUS_OFFSET)
        identity = primary.ask("CLUSTER", "MYID")
        assert isinstance(identity, bytes)

        def joined() -> bool:
            try:
                return replica.ask("CLUSTER", "REPLICATE", identity) == b"OK"
            except ReplyError:
                return False

        until(joined, within=10.0, what="the replica to know its primary")
        until(lambda: follows(primary, replica), within=10.0, what="the replica to follow")
        blocking.run(bench.other.revoke(new.ref, reason="logout", deny_us=DENY_US))
        page = blocking.run(bench.other.denials(after=None, limit=10))
        assert [entry.kind for entry in page.entries] == ["sid"]
        kept = [node.ask("DBSIZE") for node in (replica, primary)]
        assert kept[0] == kept[1] != 0
    finally:
        replica.close()


@pytest.mark.servers
@pytest.mark.xdist_group("cluster")
def test_while_a_slot_moves_the_replicas_of_the_node_that_has_the_session_are_asked(
    valkey_cluster: ValkeyCluster, blocking: Desk
) -> None:
    bench = blocking.bench(valkey_cluster.url)
    new = bench.new_session("mover")
    blocking.run(bench.created(new))
    tag = f"{new.ref.tag:04x}"
    slot, source = slot_of(tag), valkey_cluster.node_of(f"{{{tag}}}")
    target = next(node for node in valkey_cluster.nodes if node is not source)
    source_id, target_id = (node.ask("CLUSTER", "MYID") for node in (source, target))
    assert isinstance(source_id, bytes)
    assert isinstance(target_id, bytes)
    try:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
        # These primaries have no replicas; what counts is that they, and nobody else, were asked for them.
        refused = blocking.refused(bench.store.revoke(new.ref, reason="logout"))
        assert str(source.port) in refused.detail
    finally:
        for node in (source, target):
            node.ask("CLUSTER", "SETSLOT", slot, "STABLE")


def test_a_session_that_was_moved_is_confirmed_where_it_was_moved_to() -> None:
    # ASKING holds for one command: without a second one the proof would be sent back to where the session was.
    options = StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL, replicas=1)
    task = _Task(0, Call(slot=0, words=("PING",), confirm="k"), asked=("127.0.0.1", 1))
    proof = Dispatcher("redis+cluster://127.0.0.1:1", options)._proof(task, time.monotonic() + DEADLINE)
    assert [words[0] for words in proof] == ["ASKING", "EVAL", "WAIT"]


# -- what servers say ----------------------------------------------------------------------------------------------

GOOD = {
    "appendonly": "yes",
    "appendfsync": "everysec",
    "maxmemory": "0",
    "maxmemory-policy": "noeviction",
    "client-output-buffer-limit": "normal 0 0 0",
}


def judged(durability: Durability, *, replicas: int = 0, lease: float = 1.0, reach: float = 1.0) -> dict[str, Finding]:
    found = findings(durability, replicas=replicas, lease=lease, reach=reach, usual="within 1 s")
    for each in found:
        assert (each.status == "ok") == (each.cure == ""), each
    return {each.name: each for each in found}


@pytest.mark.servers
@pytest.mark.parametrize(
    ("changes", "name", "status", "words"),
    [
        ({}, "append-only file", "ok", "everysec"),
        ({"appendfsync": "always"}, "append-only file", "ok", "always"),
        ({"appendfsync": "no"}, "append-only file", "warn", "half a minute"),
        ({"appendonly": "no", "save": "60 1"}, "append-only file", "fail", "since its last snapshot (save 60 1)"),
        ({"appendonly": "no", "save": ""}, "append-only file", "fail", "every session and revocation"),
        ({}, "eviction", "ok", "forgets nothing"),
        ({"maxmemory-policy": "volatile-lru"}, "eviction", "warn", "no maxmemory yet"),
        ({"maxmemory-policy": "volatile-ttl", "maxmemory": "100mb"}, "eviction", "fail", "may come back"),
        ({"maxmemory-policy": "allkeys-lru", "maxmemory": "100mb"}, "eviction", "fail", "everybody is signed out"),
        ({}, "output buffers", "ok", "no limit"),
        ({"maxmemory": "100mb"}, "output buffers", "warn", "fill the server's memory"),
        ({"client-output-buffer-limit": "normal 1mb 1mb 60"}, "output buffers", "ok", "1048576 1048576 60"),
    ],
)
def test_each_setting_of_a_real_server_is_told(
    changes: dict[str, str], name: str, status: str, words: str, pair: Pair, blocking: Desk
) -> None:
    store = blocking.store(pair.url)
    for setting, value in {**GOOD, **changes}.items():
        pair.primary.ask("CONFIG", "SET", setting, value)
    try:
        found = judged(blocking.run(store.durability()))[name]
    finally:
        for setting, value in {**GOOD, "save": "", "appendfsync": "no"}.items():
            pair.primary.ask("CONFIG", "SET", setting, value)
    assert (found.status, words in found.found) == (status, True), found


@pytest.mark.servers
@pytest.mark.parametrize(
    ("wanted", "status", "words"),
    [(0, "warn", "may forget"), (1, "ok", "1 have to confirm"), (2, "fail", "every end of a session is refused")],
)
def test_the_replicas_that_are_there_are_compared_with_those_that_are_wanted(
    wanted: int, status: str, words: str, pair: Pair, blocking: Desk
) -> None:
    durability = blocking.run(blocking.store(pair.url).durability())
    found = judged(durability, replicas=wanted)["replicas"]
    assert (found.status, words in found.found) == (status, True), found
    assert judged(durability)["store version"].status == "ok"
    assert judged(durability)["reach"] == Finding(name="reach", status="ok", found="within 1 s")


@pytest.mark.servers
def test_a_server_that_hides_its_settings_is_read_as_far_as_it_tells(pair: Pair, desk: Desk) -> None:
    pair.primary.ask("ACL", "SETUSER", "managed", "on", ">sesame", "~*", "&*", "+@all", "-config")
    try:
        store = desk.store(f"redis://managed:sesame@{LOOPBACK}:{pair.primary.port}/0")
        durability = desk.run(store.durability())
    finally:
        pair.primary.ask("ACL", "DELUSER", "managed")
    found = judged(durability, replicas=1)
    assert found["append-only file"].status == "warn"
    assert found["append-only file"].found == "on; appendfsync cannot be read"
    assert found["eviction"].status == found["replicas"].status == "ok", "INFO tells these"
    assert found["output buffers"].found == "cannot be read"


@pytest.mark.servers
@pytest.mark.xdist_group("cluster")
def test_under_sentinel_the_reach_is_bounded_only_where_an_old_primary_stops_in_time(
    valkey_sentinel: ValkeySentinel, blocking: Desk
) -> None:
    # One that does not answer says nothing, and hides nobody.
    url = valkey_sentinel.url.replace("//", f"//{LOOPBACK}:1,")
    store = blocking.store(url, deadline=PATIENT)
    primary = valkey_sentinel.primary

    def asked() -> Finding:
        durability = blocking.run(store.durability())
        assert [each.promotable for each in durability.sentinels] == [1, 1, 1]
        return judged(durability, replicas=1)["reach"]

    bad = asked()
    assert bad.status == "warn"
    assert "unbounded in a split brain: min-replicas-to-write is 0 and 1 can be promoted" in bad.found
    assert "min-replicas-to-write 1 and min-replicas-max-lag 2" in bad.cure
    assert "down-after-milliseconds above 4000" in bad.cure
    try:
        for name, value in (("min-replicas-to-write", 1), ("min-replicas-max-lag", 2)):
            primary.ask("CONFIG", "SET", name, value)
        assert "is not below down-after-milliseconds 500" in asked().found
        for sentinel in valkey_sentinel.sentinels:
            sentinel.ask("SENTINEL", "SET", valkey_sentinel.service, "down-after-milliseconds", 4001)
        assert asked() == Finding(name="reach", status="ok", found="within 1 s, in a split brain too")
    finally:
        primary.ask("CONFIG", "SET", "min-replicas-to-write", 0)
        primary.ask("CONFIG", "SET", "min-replicas-max-lag", 10)
        for rank, sentinel in enumerate(valkey_sentinel.sentinels):
            sentinel.ask("SENTINEL", "SET", valkey_sentinel.service, "down-after-milliseconds", 500 + 400 * rank)


@pytest.mark.servers
def test_on_a_cluster_the_reach_is_the_node_timeout_and_the_lease(small_cluster: ValkeyCluster, blocking: Desk) -> None:
    durability = blocking.run(blocking.store(small_cluster.url).durability())
    found = judged(durability, reach=1.5)["reach"]
    assert found.status == "ok"
    assert found.found == "within 1 s; in a split brain 3.5 s (cluster-node-timeout is 2 s)"


# -- exactly at the limits -----------------------------------------------------------------------------------------

SERVER = ServerReading(
    name="a:1",
    version="Valkey 9.1.2",
    is_old=False,
    replicas=2,
    appendonly=True,
    appendfsync="always",
    maxmemory=0,
    maxmemory_policy="noeviction",
    min_replicas_to_write=2,
    min_replicas_max_lag=8,
)
GROUP = Durability(
    shape="sentinel",
    servers=(SERVER,),
    sentinels=(
        SentinelReading(name="s:1", down_after=30.0, promotable=2),
        SentinelReading(name="s:2", down_after=10.001, promotable=1),
    ),
)


@pytest.mark.parametrize(
    ("changes", "lease", "bounded"),
    [
        ({}, 1.0, True),
        ({}, 1.001, False),
        ({"min_replicas_max_lag": 9}, 1.0, False),
        ({"min_replicas_max_lag": 9}, 0.0, True),
        ({"min_replicas_max_lag": 0}, 1.0, False),
        ({"min_replicas_to_write": 1}, 1.0, False),
        ({"min_replicas_to_write": 3}, 1.0, False),
        ({"min_replicas_to_write": None}, 1.0, False),
        ({"min_replicas_max_lag": None}, 1.0, False),
    ],
)
def test_the_slowest_replica_and_the_hastiest_sentinel_decide(
    changes: dict[str, Any], lease: float, bounded: bool
) -> None:
    group = replace(GROUP, servers=(replace(SERVER, **changes),))
    reach = judged(group, replicas=2, lease=lease)["reach"]
    assert reach.status == ("ok" if bounded else "warn"), reach
    assert ("unbounded in a split brain" in reach.found) is not bounded
    if not bounded and lease == 1.0:
        assert reach.cure == "on every server min-replicas-to-write 2 and min-replicas-max-lag 8"


def test_sentinels_that_say_nothing_bound_nothing_and_no_replica_is_no_split_brain() -> None:
    assert "no sentinel tells" in judged(replace(GROUP, sentinels=()))["reach"].found
    alone = replace(GROUP, sentinels=(SentinelReading(name="s:1", down_after=1.0, promotable=0),))
    assert judged(alone)["reach"].status == "ok"


def test_a_cluster_that_hides_its_timeout_is_told_and_the_longest_counts() -> None:
    first, second = replace(SERVER, node_timeout=15.0), replace(SERVER, name="b:2", node_timeout=5.0)
    cluster = Durability(shape="cluster", servers=(first, second))
    assert "in a split brain 16 s (cluster-node-timeout is 15 s)" in judged(cluster, replicas=2)["reach"].found
    hidden = replace(cluster, servers=(first, replace(second, node_timeout=None)))
    assert judged(hidden, replicas=2)["reach"].status == "warn"


def test_of_several_servers_the_worst_is_told_by_name() -> None:
    bad = replace(SERVER, name="b:2", maxmemory=1, maxmemory_policy="allkeys-lru", append_fails=True, replicas=0)
    found = judged(Durability(shape="cluster", servers=(SERVER, bad)), replicas=1)
    for name in ("eviction", "append-only file", "replicas"):
        assert found[name].status == "fail"
        assert found[name].found.startswith("b:2: "), found[name]
    assert found["store version"].found == "Valkey 9.1.2"


@pytest.mark.parametrize(
    ("info", "version", "is_old"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16", True),
        ({"redis_version": "6.2.0"}, "Redis 6.2.0", False),
        ({"redis_version": "7.2.4", "valkey_version": "8.0.0"}, "Valkey 8.0.0", False),
        ({"redis_version": "x.y"}, "Redis x.y", False),
        ({}, "Redis ?", False),
    ],
)
def test_versions_are_judged_exactly_at_the_oldest(info: dict[str, str], version: str, is_old: bool) -> None:
    reading = reading_of("a:1", info, {})
    assert (reading.version, reading.is_old) == (version, is_old)
    assert judged(Durability(shape="single", servers=(reading,)))["store version"].status == (
        "fail" if is_old else "ok"
    )


@pytest.mark.parametrize(
    "hostile",
    [
        {"maxmemory": "-1", "min-replicas-to-write": "many", "cluster-node-timeout": "٣"},
        {"client-output-buffer-limit": "normal 0", "appendonly": "", "save": "\x1b[2J"},
        {"client-output-buffer-limit": "replica 0 0 0"},
    ],
)
def test_what_a_strange_server_tells_is_not_taken_for_numbers(hostile: dict[str, str]) -> None:
    reading = reading_of("a:1", {"slave0": "", "slaves": "state=online", "slave9999": "state=wait"}, hostile)
    numbers = (reading.maxmemory, reading.min_replicas_to_write, reading.node_timeout, reading.buffers)
    assert (*numbers, reading.replicas) == (None, None, None, None, 0)
    judged(Durability(shape="single", servers=(reading,)))
