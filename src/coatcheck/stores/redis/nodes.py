"""Which Redis or Valkey node to ask: what a store URL says, and who is primary now.

Decides the accepted URLs and, for each of the three shapes (one server, Sentinel, Cluster), the address of the
primary that serves a slot. It never opens a connection: whoever asks hands in the means to. It must never name a
replica, because a replica may still answer a session that was ended, and never let a password into a text.
"""

from __future__ import annotations

import time
from binascii import crc_hqx
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from coatcheck.errors import ConfigurationError

SLOTS: Final = 16384
DEFAULT_PORT: Final = 6379
DEFAULT_SENTINEL_PORT: Final = 26379

# How often a map that is known to be old is asked for at most: a dead node must not slow the slots of the others.
_REFRESH_SECONDS: Final = 0.2
_SHAPES: Final = {"redis+sentinel": "sentinel", "redis+cluster": "cluster"}
_OPTIONS: Final = frozenset(
    {"tls", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "sentinel_username", "sentinel_password"}
)

Address: TypeAlias = tuple[str, int]
Reply: TypeAlias = "bytes | int | list[Reply] | None"
Ask: TypeAlias = Callable[[Address, Sequence[str], float], Awaitable[Reply]]
"""Send one command to one address until a moment of the monotonic clock. Raises: NodeFailed."""


class NodeFailed(Exception):
    """A node could not be asked. `sent` is whether it may have carried out what it was told."""

    def __init__(self, detail: str, *, sent: bool) -> None:
        super().__init__(detail)
        self.sent = sent


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Credentials:
    """Who we are to a server; never printed."""

    username: str | None = None
    password: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a store URL says."""

    shape: Literal["single", "sentinel", "cluster"]
    seeds: tuple[Address, ...]
    service: str
    database: int
    credentials: Credentials
    sentinel_credentials: Credentials
    tls: Mapping[str, str] | None


class Nodes(Protocol):
    """Knowledge of the primaries. Plain data: shared by threads, event loops and forks."""

    async def primary_of(self, slot: int, ask: Ask, until: float) -> Address:
        """The primary of a slot. Raises: NodeFailed."""
        ...

    async def primaries(self, ask: Ask, until: float) -> Sequence[tuple[int, Address]]:
        """Every primary with the first slot it serves, in the order of the slots. Raises: NodeFailed."""
        ...

    def moved(self, slot: int, address: Address) -> None:
        """A node named another one as the owner of a slot."""
        ...

    def doubt(self, address: Address) -> bool:
        """This node failed or is no primary any more; true when asking again may find another one."""
        ...

    async def recheck(self, ask: Ask, until: float) -> Address | None:
        """Whom one sentinel, another one each time, names as primary now; `None` where nobody can say."""
        ...


def parse_target(url: str) -> Target:
    """Read a store URL. Raises: ConfigurationError, which never repeats the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        # Python repeats the whole URL in its error, password included: the cause must not travel along.
        raise ConfigurationError("store: the redis URL cannot be read") from None
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise ConfigurationError(f"store: unknown option {min(unknown)[:40]!r} in the redis URL")
    scheme = parts.scheme.lower()
    shape = _SHAPES.get(scheme, "single")
    account, _, hosts = parts.netloc.rpartition("@")
    seeds = _seeds(hosts, DEFAULT_SENTINEL_PORT if shape == "sentinel" else DEFAULT_PORT)
    path = [unquote(piece) for piece in parts.path.split("/") if piece]
    service = path.pop(0) if shape == "sentinel" and path else ""
    if shape == "sentinel" and not service:
        raise ConfigurationError("store: redis+sentinel:// needs a service name: .../service or .../service/db")
    if shape == "single" and len(seeds) != 1:
        raise ConfigurationError("store: several hosts need redis+sentinel:// or redis+cluster://")
    if len(path) > (0 if shape == "cluster" else 1) or not all(piece.isdecimal() for piece in path):
        raise ConfigurationError("store: a redis URL ends with a database number at most, a Cluster's with none")
    return Target(
        shape="sentinel" if shape == "sentinel" else "cluster" if shape == "cluster" else "single",
        seeds=seeds,
        service=service,
        database=int(path[0]) if path else 0,
        credentials=_credentials(account),
        sentinel_credentials=Credentials(
            username=options.get("sentinel_username"), password=options.get("sentinel_password")
        ),
        tls=_tls(scheme, options),
    )


def nodes_of(target: Target) -> Nodes:
    """The knowledge that fits the shape; it starts with what the URL says."""
    if target.shape == "cluster":
        return _Cluster(target.seeds)
    if target.shape == "sentinel":
        return _Sentinel(target.seeds, target.service)
    return _Single(target.seeds[0])


def slot_of(hash_tag: str) -> int:
    """The slot of every key with this text between braces."""
    return crc_hqx(hash_tag.encode("ascii"), 0) % SLOTS


def _seeds(hosts: str, default_port: int) -> tuple[Address, ...]:
    seeds: list[Address] = []
    for item in hosts.split(","):
        host, colon, port = item.rpartition(":")
        if not colon or item.endswith("]"):
            host, port = item, str(default_port)
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigurationError("store: a port in the redis URL is not a number from 1 to 65535")
        seeds.append((unquote(host).strip("[]") or "localhost", int(port)))
    return tuple(seeds)


def _credentials(account: str) -> Credentials:
    username, _, password = account.partition(":")
    return Credentials(username=unquote(username) or None, password=unquote(password) or None)


def _tls(scheme: str, options: Mapping[str, str]) -> Mapping[str, str] | None:
    wanted = options.get("tls", "true" if scheme in ("rediss", "valkeys") else "false")
    if wanted not in ("true", "false"):
        raise ConfigurationError("store: tls in the redis URL is true or false")
    files = {name: value for name, value in options.items() if name.startswith("ssl_")}
    if wanted == "false" and (files or scheme in ("rediss", "valkeys")):
        raise ConfigurationError("store: the redis URL asks for TLS and refuses it")
    return files if wanted == "true" else None


class _Single:
    def __init__(self, address: Address) -> None:
        self._address = address

    async def primary_of(self, slot: int, ask: Ask, until: float) -> Address:
        return self._address

    async def primaries(self, ask: Ask, until: float) -> Sequence[tuple[int, Address]]:
        return ((0, self._address),)

    def moved(self, slot: int, address: Address) -> None:
        return None

    def doubt(self, address: Address) -> bool:
        return False

    async def recheck(self, ask: Ask, until: float) -> Address | None:
        return None


class _Sentinel:
    def __init__(self, sentinels: Sequence[Address], service: str) -> None:
        self._sentinels = list(sentinels)
        self._question = ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service)
        self._primary: Address | None = None

    async def primary_of(self, slot: int, ask: Ask, until: float) -> Address:
        primary = self._primary
        if primary is None:
            primary = self._primary = await self._discover(ask, until)
        return primary

    async def primaries(self, ask: Ask, until: float) -> Sequence[tuple[int, Address]]:
        return ((0, await self.primary_of(0, ask, until)),)

    def moved(self, slot: int, address: Address) -> None:
        return None

    def doubt(self, address: Address) -> bool:
        self._primary = None
        return True

    async def recheck(self, ask: Ask, until: float) -> Address | None:
        sentinel = self._sentinels[0]
        # One that was cut off together with an old primary names that one for ever: the others have their turn.
        _last(self._sentinels, sentinel)
        try:
            named = _named(await ask(sentinel, self._question, until))
        except NodeFailed:
            return None
        if named is not None and named != self._primary:
            self._primary = None
        return named

    async def _discover(self, ask: Ask, until: float) -> Address:
        cause: NodeFailed | None = None
        for tried, sentinel in enumerate(tuple(self._sentinels)):
            try:
                reply = await ask(sentinel, self._question, _share(until, max(1, len(self._sentinels) - tried)))
            except NodeFailed as failed:
                cause = failed
                _last(self._sentinels, sentinel)
                continue
            named = _named(reply)
            if named is not None:
                return named
        raise NodeFailed("no sentinel names a primary of the service", sent=False) from cause


def _named(reply: Reply) -> Address | None:
    match reply:
        case [bytes(host), bytes(port)] if port.isdigit():
            return host.decode(), int(port)
        case _:
            return None


class _Cluster:
    def __init__(self, seeds: Sequence[Address]) -> None:
        self._seeds = list(seeds)
        self._owners: list[Address | None] = []
        self._first: list[tuple[int, Address]] | None = None
        self._stale = False
        self._refreshed = 0.0

    async def primary_of(self, slot: int, ask: Ask, until: float) -> Address:
        await self._know(ask, until)
        owner = self._owners[slot]
        if owner is None:
            self._stale = True
            raise NodeFailed(f"no primary of the Cluster serves slot {slot}", sent=False)
        return owner

    async def primaries(self, ask: Ask, until: float) -> Sequence[tuple[int, Address]]:
        await self._know(ask, until)
        known = self._first
        if known is None:
            first: dict[Address, int] = {}
            for slot, owner in enumerate(self._owners):
                if owner is not None:
                    first.setdefault(owner, slot)
            known = self._first = [(slot, owner) for owner, slot in first.items()]
        return known

    def moved(self, slot: int, address: Address) -> None:
        if self._owners:
            self._owners[slot] = address
        self._first, self._stale = None, True

    def doubt(self, address: Address) -> bool:
        if address in self._seeds:
            _last(self._seeds, address)
        self._stale = True
        return True

    async def recheck(self, ask: Ask, until: float) -> Address | None:
        return None

    async def _know(self, ask: Ask, until: float) -> None:
        if self._owners and not self._stale:
            return
        now = time.monotonic()
        if self._owners and now - self._refreshed < _REFRESH_SECONDS:
            return
        self._refreshed = now
        try:
            # An old map still serves most slots: half the time is left for the command itself.
            await self._discover(ask, now + (until - now) / 2 if self._owners else until)
        except NodeFailed:
            if not self._owners:
                raise

    async def _discover(self, ask: Ask, until: float) -> None:
        cause: NodeFailed | None = None
        for tried, seed in enumerate(tuple(self._seeds)):
            try:
                reply = await ask(seed, ("CLUSTER", "SLOTS"), _share(until, max(1, len(self._seeds) - tried)))
            except NodeFailed as failed:
                cause = failed
                _last(self._seeds, seed)
                continue
            owners = _owners(reply, seed)
            if owners is not None:
                self._owners, self._first, self._stale = owners, None, False
                self._seeds = list(dict.fromkeys([*(each for each in owners if each), *self._seeds]))
                return
        raise NodeFailed("no node of the Cluster tells its slots", sent=False) from cause


def _owners(reply: Reply, asked: Address) -> list[Address | None] | None:
    """Read CLUSTER SLOTS; `None` when the node does not know a Cluster."""
    owners: list[Address | None] = [None] * SLOTS
    if not isinstance(reply, list) or not reply:
        return None
    for row in reply:
        match row:
            case [int(first), int(last), [host, int(port), *_], *_] if 0 <= first <= last < SLOTS:
                # An empty or unknown host means: the one you have asked.
                known = isinstance(host, bytes) and host not in (b"", b"?")
                name = host.decode() if isinstance(host, bytes) and known else asked[0]
                owners[first : last + 1] = [(name, port)] * (last + 1 - first)
            case _:
                return None
    return owners


def _share(until: float, left: int) -> float:
    """Until when one of so many addresses may be asked, so that a dead host leaves time for the others."""
    now = time.monotonic()
    return now + (until - now) / left


def _last(addresses: list[Address], failed: Address) -> None:
    if failed in addresses:
        addresses.remove(failed)
        addresses.append(failed)
