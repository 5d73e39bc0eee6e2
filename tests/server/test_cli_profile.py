"""`coatcheck profile`: every word of it is what the code decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from coatcheck import AsyncCoatcheck
from coatcheck.core.profiles import PROFILES, UNENFORCED
from coatcheck.server.settings import ServerSettings
from coatcheck.settings import reach_of
from coatcheck.stores.memory import MemoryStore
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem
from tests.manager.conftest import id_of
from tests.server.command_parts import answer, refused, run


def test_every_profile_is_listed_with_whether_it_runs() -> None:
    found = answer("profile", "list")["profiles"]
    assert [each["name"] for each in found] == list(PROFILES)
    assert {each["name"] for each in found if each["runs"]} == {n for n, p in PROFILES.items() if not p.awaits}
    lines = run("profile", "list").stdout.splitlines()
    assert len(lines) == 1 + len(PROFILES)
    assert lines[0].split() == ["PROFILE", "FOR", "WHAT", "IT", "IS", "RUNS"]


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_is_shown_with_its_row_its_costs_and_its_reach(name: str) -> None:
    profile, found = PROFILES[name], answer("profile", "show", name)
    decided = found["decisions"]
    assert decided["idle_timeout"] == profile.idle_timeout.total_seconds()
    assert decided["max_sessions"] == profile.max_sessions
    assert decided["binding"]["on_mismatch"] == profile.binding.on_mismatch
    assert ("access_lifetime" in decided) is profile.carries_tokens
    assert found["runs"] is not bool(profile.awaits)
    assert found["awaits"] == (profile.awaits or None)
    assert set(found["not_enforced"]) == set(UNENFORCED)
    assert [cost["commands"] for cost in found["costs"]][:2] == [0, 1]
    text = run("profile", "show", name).stdout
    for field in decided:
        assert field in text
    assert ("a server does not start with it yet" in text) is bool(profile.awaits)
    assert text.count("not enforced yet") == len(UNENFORCED)


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if not profile.awaits])
def test_the_reach_that_is_shown_is_that_of_a_server_of_the_profile(name: str) -> None:
    late = answer("profile", "show", name)["reach_seconds"]
    settings = ServerSettings(profile=name, audiences=("orders",)).sessions(None)
    longest = max(late["on a server"], late.get("on a server without its store", 0.0))
    assert longest == reach_of(settings).total_seconds()
    assert ("with an access token at a verifier" in late) is (settings.tokens is not None)


def test_a_profile_compared_with_itself_decides_the_same() -> None:
    assert answer("profile", "diff", "bank", "bank")["differences"] == {}
    assert run("profile", "diff", "bank", "bank").stdout == "they decide the same\n"


def test_a_comparison_says_when_each_difference_applies() -> None:
    tighter = answer("profile", "diff", "b2c", "admin")["differences"]
    assert tighter["idle_timeout"] == {"from": 604800.0, "to": 1800.0, "applies": "at once"}
    assert tighter["access_lifetime"]["to"] is None
    looser = answer("profile", "diff", "admin", "b2c")["differences"]
    assert looser["idle_timeout"]["applies"] == looser["absolute_timeout"]["applies"] == "to new sign-ins"
    assert looser["max_sessions"] == {"from": 1, "to": 10, "applies": "to new sign-ins"}
    assert "same_site" not in looser
    assert set(looser) == set(tighter)


@pytest.mark.parametrize("words", [("show", "shop"), ("diff", "admin", "shop"), ("diff", "shop", "admin")])
def test_a_profile_nobody_knows_is_one_line_and_status_2(words: tuple[str, ...]) -> None:
    assert refused("profile", *words) == "coatcheck: profile: one of admin, b2c, bank, microservices, oauth"


def test_a_hostile_name_moves_no_cursor() -> None:
    assert "\x1b" not in refused("profile", "show", "\x1b[2Jadmin")


@pytest.mark.parametrize("name", ["admin", "b2c"])
@pytest.mark.anyio
async def test_what_requests_cost_is_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {cost["request"]: cost["commands"] for cost in answer("profile", "show", name)["costs"]}
    settings = ServerSettings(profile=name).sessions(None)
    system = FakeSystem()
    said: list[str] = []
    for verb in ("load", "admit", "create_family", "rotate_refresh", "revoke"):
        monkeypatch.setattr(MemoryStore, verb, counted(getattr(MemoryStore, verb), verb, said))
    store = open_store("memory:", colour="async", system=system)
    coat = AsyncCoatcheck(store, settings=replace(settings, journal=None), system=system)
    try:
        session = coat.session(None)
        await session.login("50")
        tokens = await session.tokens() if settings.tokens is not None else None
        assert told(said) == found["a sign-in"]
        cookie = id_of(session)
        await coat.session(cookie).load()
        assert told(said) == found["a session it has not met, or that has changed"]
        await coat.session(cookie).load()
        assert told(said) == found["a session this process knows"]
        if tokens is not None and tokens.refresh_token is not None:
            system.advance(60)
            await coat.refresh(tokens.refresh_token)
            assert told(said) == found["a refresh"]
        live = coat.session(cookie)
        await live.load()
        told(said)
        await live.logout()
        assert told(said) == found["a sign-out"]
    finally:
        await coat.close()


def counted(verb: Callable[..., Any], name: str, said: list[str]) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        said.append(name)
        return await verb(*args, **kwargs)

    return call


def told(said: list[str]) -> int:
    """How many since the last time."""
    many = len(said)
    said.clear()
    return many
