"""Valkey in the three shapes a store meets it: single server, Sentinel group, Cluster.

Every shape is a context manager with the same face (`ValkeyServers`): `url`, `pids`, `nodes`,
`flush()`, `command_count()`, `record()`, `freeze()`, `thaw()`, `kill()`, `restart()`. The shapes
decide how the nodes are put together, and nothing about keys.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.ports import CLUSTER_BUS_OFFSET, LOOPBACK
from tests.servers.processes import until
from tests.servers.resp import ClientCommand, ReplyError
from tests.servers.valkey_node import CONNECTION_COMMANDS, SentinelNode, ValkeyNode

SLOTS = 16_384


class ValkeyServers(ABC):
    """What the three shapes have in common."""

    def __init__(self) -> None:
        self.start_seconds = 0.0

    @property
    @abstractmethod
    def url(self) -> str:
        """The address in the form a store takes it."""

    @property
    @abstractmethod
    def nodes(self) -> Sequence[ValkeyNode]:
        """Every process that holds data, running or not."""

    @property
    def primaries(self) -> Sequence[ValkeyNode]:
        """The nodes that take writes now."""
        return self.nodes

    @property
    def pids(self) -> list[int]:
        """The processes that exist now."""
        return [pid for node in self._processes for pid in node.pids]

    @property
    def version(self) -> str:
        """For people: `Valkey 9.1.2` or `Redis 7.0.15`."""
        fields = self.nodes[0].ask_fields("INFO", "server")
        if "valkey_version" in fields:
            return f"Valkey {fields['valkey_version']}"
        return f"Redis {fields['redis_version']}"

    def flush(self) -> None:
        """Delete all data, expired or not, on every primary."""
        for node in self.primaries:
            node.ask("FLUSHALL")

    def command_count(self, *, ignore: Collection[str] = CONNECTION_COMMANDS) -> int:
        """Commands the primaries have executed, those inside scripts included; compare two calls."""
        return sum(node.command_count(ignore=ignore) for node in self.primaries)

    @contextlib.contextmanager
    def record(self, *, ignore: Collection[str] = CONNECTION_COMMANDS) -> Iterator[list[ClientCommand]]:
        """Record what clients send to the primaries; the list is filled when the block ends.

        A script counts as the one command that called it. Names in `ignore` are lower case.
        """
        monitors = [node.monitor() for node in self.primaries]
        commands: list[ClientCommand] = []
        try:
            yield commands
        finally:
            for monitor in monitors:
                commands += [seen for seen in monitor.finish() if seen.name.lower() not in ignore]

    def freeze(self) -> None:
        """All primaries stop answering; connections stay open."""
        for node in self.primaries:
            node.freeze()

    def thaw(self) -> None:
        """Undo `freeze()`."""
        for node in self.nodes:
            if node.frozen:
                node.thaw()
        self.await_ready()

    def kill(self) -> None:
        """kill -9 every process."""
        for node in self._processes:
            node.kill()

    def restart(self) -> None:
        """Stop and start every process with its data."""
        for node in self._processes:
            node.child.stop()
        self.ensure_running()

    def ensure_running(self) -> None:
        """Repair whatever a test did; costs next to nothing when all is well."""
        hurt = [node for node in self._processes if node.frozen or not node.running]
        for node in hurt:
            if node.frozen:
                node.thaw()
            else:
                node.start(wait=False)
        for node in hurt:
            node.await_ready()
        if hurt:
            self.await_ready()

    @abstractmethod
    def await_ready(self) -> None:
        """Wait until the nodes, all running, serve together."""

    def start(self) -> None:
        """Start everything and wait until it serves. Raises: ServerFailed, TimeoutError."""
        began = time.perf_counter()
        try:
            for node in self._processes:
                node.start(wait=False)
            for node in self._processes:
                node.await_ready()
            self._join()
            self.await_ready()
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def close(self) -> None:
        """End every process and delete the data."""
        for node in self._processes:
            node.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _processes(self) -> Sequence[ValkeyNode]:
        return self.nodes

    def _join(self) -> None:  # noqa: B027  a shape of independent nodes has nothing to join
        """Introduce the fresh nodes to each other."""


class ValkeySingle(ValkeyServers):
    """One server: `redis://127.0.0.1:port/0`."""

    def __init__(self, *, binary: Path | None = None) -> None:
        super().__init__()
        self.node = ValkeyNode(binary=binary)

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.node.port}/0"

    @property
    def nodes(self) -> Sequence[ValkeyNode]:
        return (self.node,)

    def await_ready(self) -> None:
        self.node.await_ready()


class ValkeyCluster(ValkeyServers):
    """Primaries that share the slots evenly, without replicas: `redis+cluster://127.0.0.1:p1,...`.

    A node that does not answer for `node_timeout_ms` is held for failed, and then the whole
    cluster refuses commands, as it does in production by default.
    """

    def __init__(self, *, primaries: int = 3, node_timeout_ms: int = 2_000, binary: Path | None = None) -> None:
        super().__init__()
        settings = {"cluster-enabled": "yes", "cluster-node-timeout": str(node_timeout_ms)}
        self._nodes = tuple(ValkeyNode(settings=settings, binary=binary) for _ in range(primaries))

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{LOOPBACK}:{node.port}" for node in self._nodes)

    @property
    def nodes(self) -> Sequence[ValkeyNode]:
        return self._nodes

    def node_of(self, key: str | bytes) -> ValkeyNode:
        """The node that serves the slot of `key`."""
        slot = self._nodes[0].ask("CLUSTER", "KEYSLOT", key)
        assert isinstance(slot, int)
        for node, (first, last) in zip(self._nodes, self._slot_ranges(), strict=True):
            if first <= slot <= last:
                return node
        raise AssertionError(f"slot {slot} has no node")

    def await_ready(self) -> None:
        until(self._agrees, within=20.0, what="cluster_state:ok on every node")

    def _join(self) -> None:
        first = self._nodes[0]
        for epoch, (node, (start, end)) in enumerate(zip(self._nodes, self._slot_ranges(), strict=True), start=1):
            node.ask("CLUSTER", "ADDSLOTSRANGE", start, end)
            # Distinct epochs from the start, or the nodes first have to settle who is who.
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
            if node is not first:
                first.ask("CLUSTER", "MEET", LOOPBACK, node.port, node.port + CLUSTER_BUS_OFFSET)

    def _slot_ranges(self) -> list[tuple[int, int]]:
        bounds = [SLOTS * index // len(self._nodes) for index in range(len(self._nodes) + 1)]
        return [(start, end - 1) for start, end in itertools.pairwise(bounds)]

    def _agrees(self) -> bool:
        for node in self._nodes:
            fields = node.ask_fields("CLUSTER", "INFO")
            if fields["cluster_state"] != "ok" or fields["cluster_size"] != str(len(self._nodes)):
                return False
        return True


class ValkeySentinel(ValkeyServers):
    """A primary, a replica and three sentinels: `redis+sentinel://127.0.0.1:s1,.../service/0`.

    Failure is noticed after `down_after_ms`; that setting, and the short periods set for the
    sentinels, hold for every later failover too.
    """

    def __init__(
        self,
        *,
        service: str = "sessions",
        sentinels: int = 3,
        down_after_ms: int = 500,
        binary: Path | None = None,
    ) -> None:
        super().__init__()
        self.service = service
        self._down_after_ms = down_after_ms
        first = ValkeyNode(binary=binary)
        second = ValkeyNode(settings={"replicaof": f"{LOOPBACK} {first.port}"}, binary=binary)
        self._nodes = (first, second)
        self.sentinels: Sequence[SentinelNode] = self._configure_sentinels(sentinels, binary)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/{self.service}/0"

    @property
    def nodes(self) -> Sequence[ValkeyNode]:
        return self._nodes

    @property
    def primary(self) -> ValkeyNode:
        """The node that the sentinels name."""
        reply = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        assert isinstance(reply, list)
        port = reply[1]
        assert isinstance(port, bytes)
        return next(node for node in self._nodes if node.port == int(port))

    @property
    def replica(self) -> ValkeyNode:
        """The other node."""
        primary = self.primary
        return next(node for node in self._nodes if node is not primary)

    @property
    def primaries(self) -> Sequence[ValkeyNode]:
        return (self.primary,)

    def failover(self) -> None:
        """Swap primary and replica without losing an acknowledged write; ends when both have settled.

        Raises: TimeoutError when the group has not settled after ten seconds.
        """
        before, after = self.primary, self.replica
        # Replication is asynchronous: what the replica has not seen, a failover would lose.
        offset = int(before.ask_fields("INFO", "replication")["master_repl_offset"])
        until(lambda: _offset(after) >= offset, within=10.0, what="replica up to date")

        def swapped() -> bool:
            # Asked again when refused or given up; never once it is done, which would swap them back.
            if self._names(self.sentinels[0], before):
                self._ask_failover()
            return self._is_promoted(after)

        until(swapped, within=10.0, what=f"failover to port {after.port}")
        self.await_ready()

    def await_promotion(self, node: ValkeyNode) -> None:
        """Wait until every sentinel names `node` as primary and it takes writes.

        Raises: TimeoutError after ten seconds.
        """
        until(lambda: self._is_promoted(node), within=10.0, what=f"port {node.port} promoted")

    def await_ready(self) -> None:
        # A primary that was replaced comes back as a primary; a test that wants that starts the node itself.
        self._demote(self.replica)
        until(self._settled, within=20.0, what="primary, replica and sentinels in agreement")

    @property
    def _processes(self) -> Sequence[ValkeyNode]:
        return (*self._nodes, *self.sentinels)

    def _configure_sentinels(self, count: int, binary: Path | None) -> tuple[SentinelNode, ...]:
        """Sentinels that know each other beforehand; finding out takes them seconds."""
        primary, replica = self._nodes
        identities = [secrets.token_hex(20) for _ in range(count)]
        sentinels = tuple(SentinelNode(binary=binary) for _ in range(count))
        for rank, (sentinel, identity) in enumerate(zip(sentinels, identities, strict=True)):
            # One sentinel notices first and alone may call the vote (which takes a majority): when
            # all notice at once each votes for itself, and the next attempt is six seconds away.
            quorum, down_after = 1, self._down_after_ms + 400 * rank
            lines = [
                f"sentinel myid {identity}",
                f"sentinel monitor {self.service} {LOOPBACK} {primary.port} {quorum}",
                f"sentinel down-after-milliseconds {self.service} {down_after}",
                f"sentinel failover-timeout {self.service} 3000",
                f"sentinel known-replica {self.service} {LOOPBACK} {replica.port}",
            ]
            lines += [
                f"sentinel known-sentinel {self.service} {LOOPBACK} {other.port} {name}"
                for other, name in zip(sentinels, identities, strict=True)
                if other is not sentinel
            ]
            sentinel.instruct(lines)
        return sentinels

    def _demote(self, node: ValkeyNode) -> None:
        # The sentinels would say the same, two seconds later.
        node.ask("REPLICAOF", LOOPBACK, self.primary.port)

    def _ask_failover(self) -> None:
        try:
            self.sentinels[0].ask("SENTINEL", "FAILOVER", self.service)
        except ReplyError as refusal:
            # Under way already, or the sentinels are not over the last one yet.
            if not str(refusal).startswith(("INPROG", "NOGOODSLAVE")):
                raise

    def _is_promoted(self, node: ValkeyNode) -> bool:
        named = all(self._names(sentinel, node) for sentinel in self.sentinels)
        return named and node.ask_fields("INFO", "replication")["role"] == "master"

    def _settled(self) -> bool:
        for sentinel in self.sentinels:
            sentinel.hurry()
        primary = self.primary
        if not all(self._names(sentinel, primary) and self._is_whole(sentinel) for sentinel in self.sentinels):
            return False
        if primary.ask_fields("INFO", "replication")["role"] != "master":
            return False
        followed = self.replica.ask_fields("INFO", "replication")
        return (
            followed["role"] == "slave"
            and followed["master_port"] == str(primary.port)
            and followed["master_link_status"] == "up"
        )

    def _names(self, sentinel: ValkeyNode, node: ValkeyNode) -> bool:
        reply = sentinel.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return reply == [LOOPBACK.encode(), str(node.port).encode()]

    def _is_whole(self, sentinel: ValkeyNode) -> bool:
        """Whether this sentinel holds the service for healthy and has a quorum."""
        try:
            sentinel.ask("SENTINEL", "CKQUORUM", self.service)
        except ReplyError:
            return False
        flags = _pairs(sentinel.ask("SENTINEL", "MASTER", self.service))["flags"]
        replicas = sentinel.ask("SENTINEL", "REPLICAS", self.service)
        assert isinstance(replicas, list)
        return flags == "master" and [_pairs(replica)["flags"] for replica in replicas] == ["slave"]


def _offset(node: ValkeyNode) -> int:
    return int(node.ask_fields("INFO", "replication").get("slave_repl_offset", "-1"))


def _pairs(reply: object) -> dict[str, str]:
    assert isinstance(reply, list)
    words = [word.decode() for word in reply if isinstance(word, bytes)]
    return dict(zip(words[::2], words[1::2], strict=True))
