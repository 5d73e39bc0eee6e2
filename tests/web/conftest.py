"""`world`: both gateways over every store that serves a whole fleet or one process."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from coatcheck import Settings
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Colour, SessionStore
from coatcheck.stores.conformance import Clock
from coatcheck.stores.open import open_store, waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.system import REAL, System
from tests.stores.conftest import BACKENDS, Backend, stores_database
from tests.web.faces import World

# A fixture, found by its name here.
__all__ = ["stores_database"]

COLOURS: tuple[Colour, ...] = ("blocking", "async")
GATEWAYS = {"blocking": "wsgi", "async": "asgi"}
# A Cluster and a Sentinel group pass the conformance suite; what lies above the store cannot tell them apart.
SERVED = tuple(backend for backend in BACKENDS if backend.group is None)


def _worlds() -> list[Any]:
    return [
        pytest.param(
            (backend, colour),
            id=f"{GATEWAYS[colour]}-{backend.name}",
            marks=[pytest.mark.servers] if backend.server else [],
        )
        for backend in SERVED
        for colour in COLOURS
    ]


@pytest.fixture(params=_worlds())
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """An application behind a gateway, over a store of its own."""
    backend, colour = cast(tuple[Backend, Colour], request.param)
    server = request.getfixturevalue(backend.server) if backend.server else None
    url = backend.address(server, tmp_path)
    namespace = f"t{secrets.token_hex(5)}"
    clock = Clock()

    def make(colour: Colour, system: System) -> SessionStore:
        options = StoreOptions(
            colour=colour,
            waits=waits_of(colour),
            system=system if backend.stopped else REAL,
            namespace=namespace,
            deadline=30.0,
            clock_offset_us=clock,
        )
        return backend.make(url, options)

    def advance(seconds: float) -> None:
        if not backend.stopped:
            clock.offset_us += int(seconds * 1_000_000)

    def write_over(ref: SessionRef, raw: bytes) -> None:
        assert backend.corrupt is not None
        backend.corrupt(url, server, namespace, ref, raw)

    world = World(colour, make, advance_store=advance, write_over=write_over if backend.corrupt else None)
    if backend.prepare is not None:
        await backend.prepare(world.store.inner)
    yield world
    await world.close()


@pytest.fixture(params=COLOURS, ids=["wsgi", "asgi"])
async def make_world(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., World]]:
    """`make_world(settings)`: either gateway over memory, for what does not depend on the store."""
    made: list[World] = []

    def make(settings: Settings | None = None) -> World:
        world = World(
            request.param,
            lambda colour, system: open_store("memory:", colour=colour, system=system),
            settings=settings,
        )
        made.append(world)
        return world

    yield make
    for world in made:
        await world.close()


@pytest.fixture
def small(make_world: Callable[..., World]) -> World:
    """A world over memory with ordinary settings."""
    return make_world()
