"""What Redis and Valkey servers say of how they keep what is written, and what of it can lose a revocation.

Decides which settings are read and what each of them means: a write that a server forgets is a session that comes back.
Reading changes nothing. It must never fail because a server does not tell its settings: many managed ones forbid
CONFIG, and then that is what is said. What a single INFO tells is taken from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from coatcheck.errors import StoreUnavailable
from coatcheck.stores.redis.dispatch import Dispatcher
from coatcheck.stores.redis.nodes import Address, Reply

Status = Literal["ok", "warn", "fail"]

OLDEST: Final = (6, 2)
"""The oldest release of Redis this store speaks to."""

LAG_STEP_SECONDS: Final = 1.0
"""A server counts the lag of its replicas once a second."""

_SETTINGS: Final = (
    "appendonly",
    "appendfsync",
    "save",
    "maxmemory",
    "maxmemory-policy",
    "min-replicas-to-write",
    "min-replicas-max-lag",
    "client-output-buffer-limit",
    "cluster-node-timeout",
)
_USUAL_LAG_SECONDS: Final = 10
_LEAST_LAG_SECONDS: Final = 2
_UNLIMITED: Final = "0 0 0"
_BUFFERS: Final = "client-output-buffer-limit normal 64mb 16mb 60"
_RANK: Final[Mapping[Status, int]] = {"ok": 0, "warn": 1, "fail": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look found. `cure` is empty when there is nothing to do."""

    name: str
    status: Status
    found: str
    cure: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReading:
    """What one primary says of itself. What is `None` cannot be read."""

    name: str
    version: str
    is_old: bool
    replicas: int
    append_fails: bool = False
    appendonly: bool | None = None
    appendfsync: str | None = None
    save: str | None = None
    maxmemory: int | None = None
    maxmemory_policy: str | None = None
    min_replicas_to_write: int | None = None
    min_replicas_max_lag: int | None = None
    buffers: str | None = None
    """What the server keeps for an ordinary client that does not read: hard limit, soft limit and its seconds."""
    node_timeout: float | None = None
    """Seconds; of a Cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SentinelReading:
    """After how many seconds one sentinel holds the primary for down, and how many replicas it may promote."""

    name: str
    down_after: float
    promotable: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """Every primary, and every sentinel that answered."""

    shape: Literal["single", "sentinel", "cluster"]
    servers: tuple[ServerReading, ...]
    sentinels: tuple[SentinelReading, ...] = ()


async def read_durability(dispatcher: Dispatcher) -> Durability:
    """Ask every primary and sentinel. Each has one deadline. Raises: StoreUnavailable when a primary is away."""
    servers: list[ServerReading] = []
    for _, address in await dispatcher.primaries(dispatcher.until()):
        (told,) = await dispatcher.at(address, ("INFO",), until=dispatcher.until())
        servers.append(reading_of(_name(address), _fields(told), await _configured(dispatcher, address)))
    target = dispatcher.target
    sentinels: list[SentinelReading] = []
    if target.shape == "sentinel":
        for address in target.seeds:
            sentinel = await _sentinel(dispatcher, address, target.service)
            if sentinel is not None:
                sentinels.append(sentinel)
    return Durability(shape=target.shape, servers=tuple(servers), sentinels=tuple(sentinels))


def reading_of(name: str, info: Mapping[str, str], configured: Mapping[str, str]) -> ServerReading:
    """One server from what INFO and CONFIG GET told; both may lack anything."""
    version = info.get("valkey_version") or info.get("redis_version", "")
    appendonly = configured.get("appendonly") or {"0": "no", "1": "yes"}.get(info.get("aof_enabled", ""))
    timeout = _number(configured.get("cluster-node-timeout"))
    return ServerReading(
        name=name,
        version=f"{'Valkey' if 'valkey_version' in info else 'Redis'} {version or '?'}",
        is_old="valkey_version" not in info and _is_old(version),
        replicas=sum("state=online" in text.split(",") for key, text in info.items() if _is_replica(key)),
        append_fails=info.get("aof_last_write_status", "ok") != "ok",
        appendonly=None if appendonly is None else appendonly == "yes",
        appendfsync=configured.get("appendfsync"),
        save=configured.get("save"),
        maxmemory=_number(configured.get("maxmemory", info.get("maxmemory"))),
        maxmemory_policy=configured.get("maxmemory-policy", info.get("maxmemory_policy")),
        min_replicas_to_write=_number(configured.get("min-replicas-to-write")),
        min_replicas_max_lag=_number(configured.get("min-replicas-max-lag")),
        buffers=_normal(configured.get("client-output-buffer-limit", "")),
        node_timeout=None if timeout is None else timeout / 1000,
    )


def findings(durability: Durability, *, replicas: int, lease: float, reach: float, usual: str) -> tuple[Finding, ...]:
    """What holds and what does not. `replicas` is the setting; `lease` and `reach` are seconds, and `usual` says in
    words how late a revoke is heard while everything works."""
    servers = durability.servers
    return (
        _all("store version", servers, _version),
        _all("append-only file", servers, _append_only_file),
        _all("eviction", servers, _eviction),
        _all("replicas", servers, lambda server: _replicas(server, replicas, durability)),
        _all("output buffers", servers, _buffers),
        _reach(durability, lease=lease, reach=reach, usual=usual),
    )


# -- one server ----------------------------------------------------------------------------------------------------

_Verdict = tuple[Status, str, str]


def _all(name: str, servers: Sequence[ServerReading], judge: Callable[[ServerReading], _Verdict]) -> Finding:
    """The worst that is true of any server, and of which; one sentence where it is true of all."""
    verdicts = [(server.name, judge(server)) for server in servers]
    status, found, cure = max((verdict for _, verdict in verdicts), key=lambda each: _RANK[each[0]])
    if len({verdict for _, verdict in verdicts}) > 1:
        worst = [f"{name}: {text}" for name, (rank, text, _) in verdicts if rank == status]
        found = "; ".join(worst) if status != "ok" else found
    return Finding(name=name, status=status, found=found, cure=cure)


def _version(server: ServerReading) -> _Verdict:
    if server.is_old:
        least = ".".join(map(str, OLDEST))
        return "fail", f"{server.version} is too old", f"Redis {least} or later, or Valkey"
    return "ok", server.version, ""


def _append_only_file(server: ServerReading) -> _Verdict:
    if server.appendonly is None:
        cure = "see where the server is managed that appendonly is yes, or that a restart forgets nothing"
        return "warn", "cannot be read", cure
    if not server.appendonly:
        what = "every revocation since its last snapshot" if server.save != "" else "every session and revocation"
        snapshots = f" (save {server.save})" if server.save else ""
        cure = "CONFIG SET appendonly yes, appendfsync everysec, then CONFIG REWRITE"
        return "fail", f"off: a server that is restarted forgets {what}{snapshots}", cure
    if server.append_fails:
        return "fail", "on, but it cannot be written", "see the server's log; is the disk full?"
    match server.appendfsync:
        case None:
            cure = "see where the server is managed that appendfsync is everysec or always"
            return "warn", "on; appendfsync cannot be read", cure
        case "always":
            return "ok", "on, always: what was answered is on the disk", ""
        case "everysec":
            lost = "a machine that loses power forgets two seconds at most, a server that is killed nothing"
            return "ok", f"on, everysec: {lost}", ""
        case other:
            lost = "a machine that loses power forgets about half a minute, revocations with it"
            return "warn", f"on, but appendfsync is {other}: {lost}", "CONFIG SET appendfsync everysec, or always"


def _eviction(server: ServerReading) -> _Verdict:
    policy = server.maxmemory_policy
    if policy is None:
        cure = "see where the server is managed that maxmemory-policy is noeviction"
        return "warn", "maxmemory-policy cannot be read", cure
    if policy == "noeviction":
        return "ok", "noeviction: a full server refuses writes and forgets nothing", ""
    cure = "CONFIG SET maxmemory-policy noeviction, then CONFIG REWRITE; a server that is also a cache needs two"
    if server.maxmemory == 0:
        return "warn", f"{policy}, and no maxmemory yet: with one, sessions that were ended may come back", cure
    lost = "tombstones, cuts and denied tokens, and sessions that were ended may come back"
    if policy.startswith("allkeys"):
        lost = f"{lost}; if it drops the keys of ids, everybody is signed out"
    return "fail", f"{policy}: a full server drops {lost}", cure


def _replicas(server: ServerReading, wanted: int, durability: Durability) -> _Verdict:
    connected = server.replicas
    takers = max((each.promotable for each in durability.sentinels), default=connected)
    if wanted > connected:
        found = f"{wanted} have to confirm and {connected} are connected: every end of a session is refused"
        return "fail", found, "bring the replicas back, or lower --replicas"
    if not takers:
        return "ok", "none: there is nobody to take over, or to confirm", ""
    if wanted < takers:
        found = f"{wanted} of {takers} have to confirm: a failover may forget the latest revocations"
        return "warn", found, f"--replicas {takers}: the end of a session is then refused rather than lost"
    return "ok", f"{wanted} have to confirm the end of a session, {connected} are connected", ""


def _buffers(server: ServerReading) -> _Verdict:
    if server.buffers is None:
        return "ok", "cannot be read", ""
    if server.buffers != _UNLIMITED:
        return "ok", f"normal {server.buffers}: a node that does not read is cut off and reads the store again", ""
    if server.maxmemory:
        found = "no limit for normal clients: one node that does not read can fill the server's memory"
        return "warn", found, f"CONFIG SET {_BUFFERS}, then CONFIG REWRITE"
    return "ok", "no limit for normal clients, and no maxmemory that one could fill", ""


# -- all of them ---------------------------------------------------------------------------------------------------


def _reach(durability: Durability, *, lease: float, reach: float, usual: str) -> Finding:
    """How late a revoke can be heard when two servers both think they are the primary (SEMANTICS 2)."""
    name = "reach"
    match durability.shape:
        case "single":
            return Finding(name=name, status="ok", found=usual)
        case "cluster":
            timeouts = [server.node_timeout for server in durability.servers]
            known = [timeout for timeout in timeouts if timeout is not None]
            if len(known) < len(timeouts):
                found = f"{usual}; in a split brain {reach:g} s and cluster-node-timeout, which cannot be read"
                cure = "see where the Cluster is managed how long cluster-node-timeout is"
                return Finding(name=name, status="warn", found=found, cure=cure)
            longest = max(known, default=0.0)
            found = f"{usual}; in a split brain {longest + reach:g} s (cluster-node-timeout is {longest:g} s)"
            return Finding(name=name, status="ok", found=found)
        case "sentinel":
            return _under_sentinel(name, durability, lease, usual)


def _under_sentinel(name: str, durability: Durability, lease: float, usual: str) -> Finding:
    unbounded = f"{usual}, and unbounded in a split brain"
    if not durability.sentinels:
        cure = "see that the sentinels in --store answer SENTINEL MASTER and SENTINEL REPLICAS"
        return Finding(name=name, status="warn", found=f"{unbounded}: no sentinel tells what it does", cure=cure)
    promotable = max(sentinel.promotable for sentinel in durability.sentinels)
    down_after = min(sentinel.down_after for sentinel in durability.sentinels)
    if not promotable:
        return Finding(name=name, status="ok", found=f"{usual}; no replica can be promoted")
    (server, *_) = durability.servers
    least, lag = server.min_replicas_to_write, server.min_replicas_max_lag
    wrong: list[str] = []
    if least is None or lag is None:
        wrong.append("min-replicas-to-write and min-replicas-max-lag cannot be read")
    else:
        if least != promotable:
            wrong.append(f"min-replicas-to-write is {least} and {promotable} can be promoted")
        if not lag:
            wrong.append("min-replicas-max-lag is 0, which switches it off")
        elif lag + LAG_STEP_SECONDS + lease >= down_after:
            wrong.append(
                f"min-replicas-max-lag {lag} s + {LAG_STEP_SECONDS:g} s + lease {lease:g} s is not below "
                f"down-after-milliseconds {down_after * 1000:g}"
            )
    if not wrong:
        return Finding(name=name, status="ok", found=f"{usual}, in a split brain too")
    # The longest lag that fits below what the sentinels have; where none does they have to be more patient.
    room = math.ceil(down_after - LAG_STEP_SECONDS - lease) - 1
    longest = max(_LEAST_LAG_SECONDS, min(room, _USUAL_LAG_SECONDS))
    cure = f"on every server min-replicas-to-write {promotable} and min-replicas-max-lag {longest}"
    if longest > room:
        patience = (longest + LAG_STEP_SECONDS + lease) * 1000
        cure = f"{cure}; on every sentinel down-after-milliseconds above {patience:g}"
    return Finding(name=name, status="warn", found=f"{unbounded}: {'; '.join(wrong)}", cure=cure)


# -- reading -------------------------------------------------------------------------------------------------------


async def _configured(dispatcher: Dispatcher, address: Address) -> dict[str, str]:
    try:
        # One by one: before Redis 7 CONFIG GET takes one name.
        commands = [("CONFIG", "GET", name) for name in _SETTINGS]
        replies = await dispatcher.at(address, *commands, until=dispatcher.until())
    except StoreUnavailable:
        return {}
    found: dict[str, str] = {}
    for reply in replies:
        found.update(_pairs(reply))
    return found


async def _sentinel(dispatcher: Dispatcher, address: Address, service: str) -> SentinelReading | None:
    questions = [("SENTINEL", word, service) for word in ("MASTER", "REPLICAS")]
    try:
        primary, replicas = await dispatcher.at(address, *questions, until=dispatcher.until(), sentinel=True)
    except StoreUnavailable:
        return None
    down_after = _number(_pairs(primary).get("down-after-milliseconds"))
    if down_after is None or not isinstance(replicas, list):
        return None
    told = [_pairs(replica) for replica in replicas]
    # One that is away now may be promoted when it is back.
    promotable = sum(each.get("slave-priority", each.get("replica-priority")) != "0" for each in told)
    return SentinelReading(name=_name(address), down_after=down_after / 1000, promotable=promotable)


def _name(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def _fields(reply: Reply) -> dict[str, str]:
    """The `name:value` lines of INFO."""
    text = reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""
    pairs = (line.partition(":") for line in text.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def _pairs(reply: Reply) -> dict[str, str]:
    """A flat list of names and values."""
    words = [each.decode("utf-8", "replace") if isinstance(each, bytes) else "" for each in _list(reply)]
    return dict(zip(words[::2], words[1::2], strict=False))


def _list(reply: Reply) -> list[Reply]:
    return reply if isinstance(reply, list) else []


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _normal(limits: str) -> str | None:
    """`0 0 0` out of `normal 0 0 0 replica 268435456 …`."""
    words = limits.split()
    place = words.index("normal") + 1 if "normal" in words else len(words)
    found = words[place : place + 3]
    return " ".join(found) if len(found) == 3 else None


def _is_replica(key: str) -> bool:
    return key.startswith("slave") and key[5:].isdigit()


def _is_old(version: str) -> bool:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return bool(numbers) and numbers < OLDEST
