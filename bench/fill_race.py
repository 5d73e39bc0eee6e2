"""Does a fill that a change overtook ever stay? The near copy against a naive cache over the same feed.

Twenty readers read 200 sessions while a writer, another node, changes them under their hands: each session in its turn
is written several times, and everybody reads around the place where the writer is. After each of six rounds all
readers have read every session once more and everything that was told has arrived; then what is kept is compared with
the store. What differs would be served until it ends by itself.

The naive cache does what most do: it asks the store, and keeps the answer when it comes; what is told empties the
entry. Its line tells it the same, and carries its reads too, as the near copy's does. The same readers read both in
the same turns. Decides nothing about how often is too often.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import Final

from bench.harness import Answer, Figure, Figures
from bench.traffic import NotMeasured, sign_in_async
from coatcheck import AsyncCoatcheck, Settings
from coatcheck.core.ids import SessionId, parse_session_id
from coatcheck.core.near_session import unpack
from coatcheck.core.ports import Changes, Committed, Feed, Live, RecordLimits, Store
from coatcheck.stores.near import NearStore
from coatcheck.stores.open import open_store
from tests.servers.valkey import ValkeySingle

READERS: Final = 20
SESSIONS: Final = 200
ROUNDS: Final = 6
WRITES: Final = 3
AROUND: Final = 3
"""So many sessions before and after the writer's place are read."""

_LIMITS: Final = RecordLimits(octets=4096, fields=8)


def run(*, rounds: int, full: bool) -> list[Answer]:
    """One table."""
    with ValkeySingle() as valkey:
        return [asyncio.run(_torture(valkey.url, valkey.version, ROUNDS * (10 if full else 1)))]


def settings() -> Settings:
    """The settings of both nodes: the defaults."""
    return Settings(namespace="bench", server_key=b"k" * 32)


class NaiveCache:
    """The version of each session that was read; a listener as `core.ports` wants one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.feed: Feed = store.feed(self, lease=settings().lease.total_seconds())
        self.kept: dict[str, int] = {}
        self.reads = 0

    async def read(self, id_: SessionId) -> None:
        """From the cache, else from the store, and then it is in the cache."""
        if id_.ref.handle in self.kept:
            return
        self.reads += 1
        found = await self._store.load(id_.ref, id_.digest)
        if isinstance(found, Live):
            self.kept[id_.ref.handle] = found.session.version

    def changed(self, handle: str) -> None:
        """See `core.ports.Listener`."""
        self.kept.pop(handle, None)

    def cut_off(self, tag: int) -> None:
        """See `core.ports.Listener`."""
        self.kept.clear()

    def emptied(self) -> None:
        """See `core.ports.Listener`."""
        self.kept.clear()


@dataclass(kw_only=True)
class Tally:
    """What the rounds found: how many copies were compared with the store, and how many were not what it holds."""

    compared: int = 0
    stale: int = 0


class Torture:
    """The two caches, the writer's store, and where the writer is."""

    def __init__(self, near: NearStore, naive: NaiveCache, writer: Store, ids: list[SessionId]) -> None:
        self.near = near
        self.naive = naive
        self.writer = writer
        self.ids = ids
        self.place = 0
        self.writing = False
        self.writes = 0
        self.found = {"near": Tally(), "naive": Tally()}

    async def round(self, chance: Random) -> None:
        """Write every session, read around it, and compare at the end."""
        chance.shuffle(self.ids)
        self.place, self.writing = 0, True
        readers = [asyncio.create_task(self._read(Random(chance.random()))) for _ in range(READERS)]
        await self._write()
        self.writing = False
        await asyncio.gather(*readers)
        await self._arrive()
        # A session that nobody has a copy of proves nothing.
        for id_ in self.ids:
            await self._both(id_)
        await self._arrive()
        for id_ in self.ids:
            await self._compare(id_)

    async def _write(self) -> None:
        for place, id_ in enumerate(self.ids):
            self.place = place
            for number in range(WRITES):
                done = await self.writer.commit(id_.ref, Changes(put={"n": f'"{number}"'}), limits=_LIMITS)
                if not isinstance(done, Committed):
                    raise NotMeasured(f"a living session could not be written to: {done}")
                self.writes += 1

    async def _read(self, chance: Random) -> None:
        while self.writing:
            place = self.place + chance.randint(-AROUND, AROUND)
            if 0 <= place < len(self.ids):
                await self._both(self.ids[place], naive_first=chance.random() < 0.5)
            # What was answered from memory has let nobody else have a turn.
            await asyncio.sleep(0)

    async def _both(self, id_: SessionId, *, naive_first: bool = False) -> None:
        if naive_first:
            await self.naive.read(id_)
        if self.near.peek(id_.text.encode()) is None:
            await self.near.load(id_.ref, id_.digest)
        if not naive_first:
            await self.naive.read(id_)

    async def _arrive(self) -> None:
        """Wait for one answer on each line: what was told before it has arrived then."""
        await self.near.beat()
        await self.naive.feed.beat()

    async def _compare(self, id_: SessionId) -> None:
        truth = await self.writer.load(id_.ref, id_.digest)
        if not isinstance(truth, Live):
            raise NotMeasured(f"a living session cannot be read: {truth}")
        held = self.near.peek(id_.text.encode())
        versions = {
            "near": None if held is None else unpack(held, id_.ref.handle).version,
            "naive": self.naive.kept.get(id_.ref.handle),
        }
        for name, version in versions.items():
            if version is not None:
                self.found[name].compared += 1
                self.found[name].stale += version != truth.session.version


async def _torture(url: str, version: str, rounds: int) -> Figures:
    async with AsyncExitStack() as stack:
        coat = await stack.enter_async_context(AsyncCoatcheck(url, settings=settings()))
        near = coat.engine.near
        if near is None:
            raise NotMeasured("there are no near copies to torture")
        stores = [open_store(url, colour="async", namespace=settings().namespace) for _ in range(2)]
        for store in stores:
            await store.open()
            stack.push_async_callback(store.close)
        naive = NaiveCache(stores[0])
        stack.push_async_callback(naive.feed.close)
        await naive.feed.beat()
        ids = [_id(coat, value) for value in await sign_in_async(coat, range(SESSIONS))]
        torture = Torture(near, naive, stores[1], ids)
        chance = Random(20261123)
        for _ in range(rounds):
            await torture.round(chance)
    ours, control = torture.found["near"], torture.found["naive"]
    return Figures(
        question=f"Copies that stay stale after a race between reading and writing: {version}",
        rows=(
            Figure(name="near copies that are stale", value=ours.stale, unit="", note=f"of {ours.compared:,} compared"),
            Figure(
                name="entries of the naive cache that are stale",
                value=control.stale,
                unit="",
                note=f"of {control.compared:,} compared",
            ),
            Figure(name="reads that the near copy sent", value=near.reads, unit="", note=f"{near.hits:,} hits"),
            Figure(name="reads that the naive cache sent", value=naive.reads, unit=""),
            Figure(name="writes", value=torture.writes, unit="", note="by another node"),
        ),
        facts={"readers": READERS, "sessions": SESSIONS, "rounds": rounds, "writes of a session a round": WRITES},
    )


def _id(coat: AsyncCoatcheck, value: str) -> SessionId:
    id_ = parse_session_id(coat.engine.keys, value.encode())
    if id_ is None:
        raise NotMeasured("an id that was just made cannot be read")
    return id_
