"""What is remembered of an account: its stored form, and that of many writers one is first. On both dialects."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from coatcheck.core.geo import Location
from coatcheck.core.risk import (
    MAX_ATTEMPTS,
    MAX_COUNTRIES,
    MAX_DEVICES,
    MAX_REFUSALS,
    History,
    Refusal,
)
from coatcheck.errors import StoreUnavailable
from coatcheck.server.database_port import Database
from coatcheck.server.risk_history import MAX_CHARACTERS, RiskHistories, pack_history, unpack_history
from coatcheck.testing import FakeSystem
from tests.server.account_parts import DIALECTS, at_once, opened, servers, url_for

pytestmark = pytest.mark.anyio

FULL = History(
    devices=tuple(f"{number:024}" for number in range(MAX_DEVICES)),
    countries=tuple(f"A{chr(65 + number % 26)}" for number in range(MAX_COUNTRIES)),
    located=Location(country="KR", position=(37.5665, 126.978), radius_km=20.5, asn=64496),
    located_at=1_800_000_000.123456,
    counts={"velocity": tuple(1_800_000_000.123456 + number for number in range(MAX_ATTEMPTS))},
    refused=tuple(Refusal(place=f"{number:016}", until=1_800_000_000.5) for number in range(MAX_REFUSALS)),
)


@pytest.fixture(params=DIALECTS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return url_for(request, tmp_path)


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    async with opened(url) as opened_one:
        yield opened_one


def test_a_full_history_is_read_back_and_takes_a_quarter_of_what_may_be_stored() -> None:
    text = pack_history(FULL)
    assert unpack_history(text) == FULL
    assert len(text) < MAX_CHARACTERS / 4
    assert unpack_history(pack_history(History())) == History()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"v":2}',
        '{"v":1,"devices":[1]}',
        '{"v":1,"refused":[["a"]]}',
        "[" * 30_000,
        " " * 40_000,
    ],
)
def test_a_text_that_nobody_wrote_is_no_history(text: str) -> None:
    assert unpack_history(text) is None


def test_what_a_newer_release_counts_is_left_out() -> None:
    assert unpack_history('{"v":1,"counts":{"moons":[1.0],"velocity":[2.0]},"more":1}') == History(
        counts={"velocity": (2.0,)}
    )


async def test_a_history_is_replaced_only_on_the_version_that_was_read(database: Database) -> None:
    histories = RiskHistories(database, system=FakeSystem())
    nothing = await histories.read("ann")
    assert (nothing.history, nothing.version) == (History(), 0)
    assert await histories.replace("ann", FULL, read=nothing)
    assert not await histories.replace("ann", History(), read=nothing)
    first = await histories.read("ann")
    assert (first.history, first.version) == (FULL, 1)
    assert await histories.replace("ann", History(devices=("a",)), read=first)
    assert not await histories.replace("ann", FULL, read=first)
    assert (await histories.read("ann")).history == History(devices=("a",))
    assert (await histories.read("bob")).version == 0


async def test_lifting_forgets_refusals_and_counts_and_no_browser(database: Database) -> None:
    histories = RiskHistories(database, system=FakeSystem())
    await histories.lift("ann")
    assert (await histories.read("ann")).version == 0
    await histories.replace("ann", FULL, read=await histories.read("ann"))
    await histories.lift("ann")
    await histories.lift("ann")
    kept = await histories.read("ann")
    assert (kept.history, kept.version) == (replace(FULL, refused=(), counts={}), 2)


async def test_a_row_that_nobody_wrote_is_refused_and_not_forgotten(database: Database) -> None:
    histories = RiskHistories(database, system=FakeSystem())
    await histories.replace("ann", FULL, read=await histories.read("ann"))
    await database.fetch("update {namespace}_risk_history set history = ?", '{"v":9}')
    with pytest.raises(StoreUnavailable, match="risk histories"):
        await histories.read("ann")


@pytest.mark.parametrize("begun", [False, True])
async def test_of_many_servers_that_replace_at_once_exactly_one_is_first(url: str, begun: bool) -> None:
    async with servers(url) as databases:
        histories = [RiskHistories(each, system=FakeSystem()) for each in databases] * 4
        if begun:
            await histories[0].replace("ann", FULL, read=await histories[0].read("ann"))
        read = await histories[0].read("ann")
        changed = [History(devices=(str(number),)) for number in range(len(histories))]
        answers = await at_once(
            [partial(each.replace, "ann", history, read=read) for each, history in zip(histories, changed, strict=True)]
        )
        assert sorted(answers) == [False] * 11 + [True]
        assert (await histories[0].read("ann")).history == changed[answers.index(True)]
