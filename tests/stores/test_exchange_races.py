"""One refresh token in many hands at once where tokens are off by now: one session goes on, under one id.

Two servers with one key on one store, through the real faces. The stores' clock is moved, so nobody waits for a grace.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from coatcheck import CoatcheckError, RefreshReused, Settings
from coatcheck.session import SendCookie
from tests.stores.conftest import Place
from tests.stores.test_token_races import GRACE_US, SETTINGS, Nodes, do, durable, nodes_on, sign_in

CALLERS = 12
# Without near copies: here what one server has ended is over on the other at once, and not within the reach.
OFF = replace(SETTINGS, tokens=None, near_copies=0)


@asynccontextmanager
async def deployment(place: Place, off: Settings = OFF) -> AsyncIterator[tuple[Nodes, Any, list[Any]]]:
    """A server with tokens, and two without them, on one store."""
    async with nodes_on(place, count=1) as nodes:
        (issuing,) = nodes.all
        nodes.settings = off
        without = [nodes.node(nodes.store()) for _ in range(2)]
        for each in without:
            await do(each.start())
        yield nodes, issuing, without


async def take_up(node: Any, token: str) -> str | CoatcheckError:
    """The session id that a refresh token is exchanged for; a refusal is an answer like any other."""
    session = node.session(None)
    try:
        assert await do(session.exchange(token)) is None
    except CoatcheckError as refused:
        return refused
    assert isinstance(session.cookie_action, SendCookie)
    return session.cookie_action.id.text


async def sid_of(node: Any, cookie: str) -> str | None:
    session = node.session(cookie)
    await do(session.load())
    found: str | None = session.sid
    return found


@durable
@pytest.mark.parametrize("age_us", [0, GRACE_US])
def test_everybody_at_once_gets_one_id_and_it_is_the_only_one(place: Place, age_us: int) -> None:
    place.run(everybody_at_once(place, age_us))


async def everybody_at_once(place: Place, age_us: int) -> None:
    async with deployment(place) as (nodes, issuing, without):
        session, issued = await sign_in(issuing, "50")
        before = session.cookie_action.id.text
        assert issued.refresh_token is not None
        nodes.advance(age_us)
        calls = [partial(take_up, without[turn % 2], issued.refresh_token) for turn in range(CALLERS)]
        ids = set(map(str, await nodes.at_once(calls)))
        assert len(ids) == 1
        (cookie,) = ids
        for node in (issuing, *without):
            assert await sid_of(node, cookie) == issued.sid
        nodes.advance(GRACE_US // 2)
        assert await take_up(without[0], issued.refresh_token) == cookie, "an answer that was lost is asked for again"
        assert nodes.events.of("refresh.reused") == []
        if age_us:
            assert await sid_of(without[1], before) is None
            nodes.advance(GRACE_US // 2)
            assert isinstance(await take_up(without[1], issued.refresh_token), RefreshReused)
            assert await sid_of(without[0], cookie) is None


@durable
def test_a_server_with_another_key_neither_goes_on_nor_takes_the_session_away(place: Place) -> None:
    place.run(another_key(place))


async def another_key(place: Place) -> None:
    async with deployment(place) as (nodes, issuing, without):
        _, issued = await sign_in(issuing, "50")
        assert issued.refresh_token is not None
        nodes.advance(GRACE_US)
        nodes.settings = replace(OFF, server_key=b"k" * 32)
        strange = nodes.node(nodes.store())
        first = await take_up(without[0], issued.refresh_token)
        # What was sealed under the other key cannot be read: it neither goes on nor takes the session away.
        assert isinstance(await take_up(strange, issued.refresh_token), CoatcheckError)
        assert await sid_of(without[0], str(first)) == issued.sid
