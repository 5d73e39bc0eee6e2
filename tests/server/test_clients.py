"""Clients: programs that may follow the revocation feed, each with a credential that is kept nowhere."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from coatcheck.errors import ConfigurationError, StoreUnavailable
from coatcheck.server.clients import CREDENTIAL_CHARACTERS, KIND_FEED, SECRET_BYTES, Client, Clients
from coatcheck.server.database_port import Database
from coatcheck.testing import FakeSystem
from tests.server.account_parts import DIALECTS, at_once, opened, servers, url_for

pytestmark = pytest.mark.anyio


@pytest.fixture(params=DIALECTS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_for(request, tmp_path)


@pytest.fixture
def system() -> FakeSystem:
    return FakeSystem()


@pytest.fixture
async def database(url: str, system: FakeSystem) -> AsyncIterator[Database]:
    async with opened(url, system=system) as database:
        yield database


@pytest.fixture
def clients(database: Database, system: FakeSystem) -> Clients:
    return Clients(database, system=system)


def of_kind(kind: int) -> str:
    return urlsafe_b64encode(bytes((kind,)) + b"s" * SECRET_BYTES).decode()


async def test_a_credential_names_its_client_and_says_what_it_is(clients: Clients, system: FakeSystem) -> None:
    credential = await clients.add("orders")
    assert len(credential) == CREDENTIAL_CHARACTERS
    assert urlsafe_b64decode(credential)[0] == KIND_FEED
    assert await clients.find(credential) == Client(name="orders", created_us=system.now_us())


async def test_the_database_keeps_the_digest_alone(database: Database, clients: Clients) -> None:
    credential = await clients.add("orders")
    rows = await database.fetch("select * from {namespace}_clients")
    assert len(rows) == 1
    assert credential[2:] not in repr(rows)
    assert credential not in repr(clients)


async def test_every_client_has_its_own_credential(clients: Clients) -> None:
    orders, shop = await clients.add("orders"), await clients.add("shop")
    assert orders != shop
    assert [(await clients.find(each) or Client(name="", created_us=0)).name for each in (orders, shop)] == [
        "orders",
        "shop",
    ]


async def test_clients_are_listed_by_name_with_their_time_and_without_a_secret(
    clients: Clients, system: FakeSystem
) -> None:
    assert await clients.list() == ()
    first = system.now_us()
    await clients.add("shop")
    system.advance(1)
    await clients.add("orders")
    assert await clients.list() == (
        Client(name="orders", created_us=first + 1_000_000),
        Client(name="shop", created_us=first),
    )


async def test_a_name_that_is_taken_changes_nothing(clients: Clients) -> None:
    credential = await clients.add("orders")
    with pytest.raises(ConfigurationError, match="orders is taken"):
        await clients.add("orders")
    assert await clients.find(credential) is not None
    assert len(await clients.list()) == 1


async def test_of_many_who_add_one_name_exactly_one_gets_a_credential(url: str) -> None:
    async with servers(url) as databases:
        # Each server draws its own randomness.
        shared = [
            Clients(database, system=FakeSystem(seed=bytes((number,)))) for number, database in enumerate(databases)
        ]

        async def add(clients: Clients) -> str | None:
            try:
                return await clients.add("orders")
            except ConfigurationError:
                return None

        given = [each for each in await at_once([partial(add, clients) for clients in shared]) if each is not None]
        assert len(given) == 1
        assert await shared[0].find(given[0]) is not None


async def test_a_removed_client_opens_nothing_and_never_again(clients: Clients) -> None:
    old = await clients.add("orders")
    assert await clients.remove("orders")
    assert await clients.find(old) is None
    assert not await clients.remove("orders")
    new = await clients.add("orders")
    assert new != old
    assert await clients.find(old) is None
    assert await clients.find(new) is not None


@pytest.mark.parametrize("name", ["a", "A.b-c_d", "0", "x" * 64])
async def test_a_name_of_letters_digits_and_marks_is_taken(clients: Clients, name: str) -> None:
    assert (await clients.find(await clients.add(name))) is not None


@pytest.mark.parametrize(
    "name", ["", " ", "x" * 65, ".a", "-a", "_a", "a b", "a\n", "a\x00", "é", "a/b", "' or 1=1 --", "a\ud800"]
)
async def test_a_name_that_could_be_mistaken_for_something_else_is_refused(clients: Clients, name: str) -> None:
    with pytest.raises(ConfigurationError, match="a name is"):
        await clients.add(name)
    assert await clients.list() == ()


async def test_whatever_is_presented_is_found_only_when_it_is_a_credential(clients: Clients) -> None:
    good = await clients.add("orders")
    hostile = [
        "",
        "x",
        good[:-1],
        good + "A",
        f" {good}",
        f"{good}\n",
        good.swapcase(),
        good[:-1] + ("A" if good[-1] != "A" else "B"),
        of_kind(KIND_FEED),
        of_kind(KIND_FEED + 1),
        "=" * CREDENTIAL_CHARACTERS,
        "é" * CREDENTIAL_CHARACTERS,
        "\ud800" * CREDENTIAL_CHARACTERS,
        "\x00" * CREDENTIAL_CHARACTERS,
        good[:-2] + "+/",
        "x" * 1_000_000,
    ]
    assert [await clients.find(each) for each in hostile] == [None] * len(hostile)


async def test_what_has_another_shape_costs_no_look_up(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    async def asked(*_: object) -> None:
        raise StoreUnavailable("asked")

    monkeypatch.setattr(clients._database, "fetch", asked)
    assert await clients.find("x" * 43) is None
    assert await clients.find(of_kind(KIND_FEED + 1)) is None
    with pytest.raises(StoreUnavailable):
        await clients.find(of_kind(KIND_FEED))


async def test_a_database_that_is_away_is_told(url: str, system: FakeSystem) -> None:
    async with opened(url, system=system) as database:
        clients = Clients(database, system=system)
        credential = await clients.add("orders")
        await database.fetch("drop table {namespace}_clients")
        for verb in (clients.list(), clients.add("shop"), clients.remove("orders"), clients.find(credential)):
            with pytest.raises(StoreUnavailable):
                await verb
