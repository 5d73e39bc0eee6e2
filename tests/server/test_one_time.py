from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from coatcheck.server.accounts import Accounts
from coatcheck.server.database_port import Database
from coatcheck.server.one_time import LIFE_US, TOKEN_CHARACTERS, SetUpLinks, SetUpToken
from coatcheck.testing import FakeSystem
from tests.server.account_parts import DIALECTS, HASH, at_once, name_of, opened, servers, url_for, user_of

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
def links(database: Database, system: FakeSystem) -> SetUpLinks:
    return SetUpLinks(database, system=system)


async def issued(links: SetUpLinks) -> SetUpToken:
    token = await links.issue()
    assert token is not None
    return token


async def test_a_link_works_once(links: SetUpLinks) -> None:
    token = await issued(links)
    assert len(token.text) == TOKEN_CHARACTERS
    assert await links.peek(token.text)
    assert await links.peek(token.text)
    assert await links.consume(token.text)
    assert not await links.peek(token.text)
    assert not await links.consume(token.text)


async def test_of_fifty_who_present_it_exactly_one_is_let_in(url: str) -> None:
    async with servers(url) as databases:
        people = [SetUpLinks(each, system=FakeSystem()) for each in databases]
        token = await issued(people[0])
        let_in = await at_once([partial(people[n % 3].consume, token.text) for n in range(50)])
        assert let_in.count(True) == 1


async def test_a_link_ends_after_a_day_to_the_microsecond(links: SetUpLinks, system: FakeSystem) -> None:
    token = await issued(links)
    assert token.expires_us == system.now_us() + LIFE_US
    system.step_clock(LIFE_US / 1_000_000 - 0.000001)
    assert await links.peek(token.text)
    system.step_clock(0.000001)
    assert not await links.peek(token.text)
    assert not await links.consume(token.text)


async def test_each_start_voids_the_link_before(links: SetUpLinks) -> None:
    first, second = await issued(links), await issued(links)
    assert first.text != second.text
    assert not await links.consume(first.text)
    assert await links.consume(second.text)


async def test_a_spent_link_is_followed_by_a_new_one_while_there_is_no_administrator(links: SetUpLinks) -> None:
    # Whoever spent it may have closed the browser before the account was made.
    spent = await issued(links)
    await links.consume(spent.text)
    again = await issued(links)
    assert not await links.consume(spent.text)
    assert await links.consume(again.text)


async def test_no_link_works_or_is_issued_once_there_is_an_administrator(links: SetUpLinks, database: Database) -> None:
    accounts = Accounts(database, system=FakeSystem(seed=b"accounts"))
    await user_of(accounts, "somebody")
    token = await issued(links)
    await user_of(accounts, "root", role="admin")
    assert not await links.peek(token.text)
    assert not await links.consume(token.text)
    assert await links.issue() is None


async def test_of_many_servers_that_start_together_one_link_works(url: str) -> None:
    async with servers(url) as databases:
        people = [SetUpLinks(each, system=FakeSystem(seed=bytes([n]))) for n, each in enumerate(databases)]
        tokens = await at_once([people[n % 3].issue for n in range(30)])
        assert len({token.text for token in tokens if token is not None}) == 30
        working = [await people[0].peek(token.text) for token in tokens if token is not None]
        assert working.count(True) == 1


async def test_only_the_digest_is_stored(links: SetUpLinks, database: Database) -> None:
    token = await issued(links)
    rows = await database.fetch("select * from {namespace}_one_time")
    assert len(rows) == 1
    assert token.text not in str(rows)
    assert token.text not in repr(token)


@pytest.mark.parametrize(
    "text",
    ["", "A" * 43, "A" * 44, "A" * 45, "c" * 43 + "\n", "c" * 43 + "\x00", "\ud800" * 44, "é" * 44, "c" * 1_000_000],
)
async def test_what_is_no_token_is_refused(links: SetUpLinks, text: str) -> None:
    await issued(links)
    assert not await links.peek(text)
    assert not await links.consume(text)


async def test_changing_any_character_voids_the_token(links: SetUpLinks) -> None:
    token = await issued(links)
    for place, character in enumerate(token.text):
        changed = token.text[:place] + ("A" if character != "A" else "B") + token.text[place + 1 :]
        assert not await links.peek(changed)
    assert await links.peek(token.text)


async def test_the_first_administrator_is_made_by_one_link_and_one_person(url: str) -> None:
    # The whole of the set-up, fifty times at once: one account, whoever was first.
    async with servers(url) as databases:
        links = [SetUpLinks(each, system=FakeSystem()) for each in databases]
        people = [Accounts(each, system=FakeSystem(seed=bytes([n]))) for n, each in enumerate(databases)]
        token = await issued(links[0])

        async def set_up(number: int) -> bool:
            if not await links[number % 3].consume(token.text):
                return False
            await people[number % 3].create_first_administrator(name_of(f"admin{number}"), password_hash=HASH)
            return True

        made = await at_once([partial(set_up, n) for n in range(50)])
        assert made.count(True) == 1
        assert [user.role for user in await people[0].list_users()] == ["admin"]
