"""Tokens behind both gateways: the refresh cookie, the bearer, and that two credentials are never merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest

from coatcheck import IssuedTokens, Settings, TokenSettings
from tests.web.faces import Answer, Ask, Face, Reply, World

pytestmark = pytest.mark.anyio

REFRESH = "__Host-Http-refresh"
SETTINGS = Settings(
    public_url="https://app.example",
    idle_timeout=timedelta(days=7),
    absolute_timeout=timedelta(days=30),
    server_key=b"k" * 32,
    tokens=TokenSettings(),
)


@dataclass
class Jar:
    """A browser that keeps every cookie, and an access token in memory."""

    face: Face
    cookies: dict[str, str] = field(default_factory=dict)
    access: str = ""

    async def ask(self, method: str, path: str, **headers: str) -> Answer:
        raw = [(name.lower().replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        if self.cookies:
            raw.append((b"cookie", "; ".join(f"{name}={value}" for name, value in self.cookies.items()).encode()))
        answer = await self.face.request(method, path, headers=[*raw, (b"sec-fetch-site", b"same-origin")])
        for line in answer.all("set-cookie"):
            pair, *attributes = line.split("; ")
            name, _, value = pair.partition("=")
            if "Max-Age=0" in attributes:
                self.cookies.pop(name, None)
            else:
                self.cookies[name] = value
        return answer

    async def bearer(self, method: str, path: str) -> Answer:
        return await self.ask(method, path, Authorization=f"Bearer {self.access}")


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world: World = make_world(SETTINGS)

    @world.view("/login")
    async def login(ask: Ask) -> str:
        await ask.do(ask.session.login("50", claims={"role": "admin"}, scopes=("read",)))
        tokens: IssuedTokens = await ask.do(ask.session.tokens())
        assert tokens.refresh_token is None
        return tokens.access_token

    @world.view("/refresh")
    async def refresh(ask: Ask) -> str:
        tokens: IssuedTokens = await ask.do(ask.session.refresh())
        return tokens.access_token

    @world.view("/me")
    async def me(ask: Ask) -> str:
        await ask.load()
        principal = ask.session.require_login()
        return f"{principal.subject} {principal.claims['role']} {principal.scopes} {principal.sid == ask.session.sid}"

    @world.view("/logout")
    async def logout(ask: Ask) -> str:
        await ask.do(ask.session.logout())
        return "bye"

    @world.view("/write")
    async def write(ask: Ask) -> str:
        session = await ask.load()
        session["cart"] = 1
        return "written"

    @world.view("/more")
    async def more(ask: Ask) -> str:
        await ask.load()
        tokens: IssuedTokens = await ask.do(ask.session.tokens(carrier="body"))
        return tokens.refresh_token or ""

    @world.view("/recheck")
    async def recheck(ask: Ask) -> str:
        await ask.load()
        if ask.method == "POST":
            await ask.do(world.coat.revoke_subject("50", reason="meanwhile"))
        await ask.do(ask.session.recheck())
        return f"{ask.session.expires_at}"

    @world.view("/plain")
    async def plain(ask: Ask) -> Reply:
        return Reply(body="nothing looked at")

    return world


async def signed_in(world: World) -> Jar:
    jar = Jar(world.face)
    jar.access = (await jar.ask("POST", "/login")).text
    return jar


async def test_the_refresh_cookie_is_for_our_own_pages_and_out_of_reach_of_scripts(world: World) -> None:
    answer = await Jar(world.face).ask("POST", "/login")
    (line,) = [each for each in answer.all("set-cookie") if each.startswith(f"{REFRESH}=")]
    assert set(line.split("; ")[1:]) == {"Path=/", "Secure", "HttpOnly", "SameSite=Strict", "Max-Age=2592000"}
    assert answer.one("cache-control") == "no-store"
    assert set(answer.all("vary")) == {"Cookie", "Authorization"}


async def test_a_bearer_and_a_cookie_name_the_same_person(world: World) -> None:
    jar = await signed_in(world)
    by_cookie = await jar.ask("GET", "/me")
    by_bearer = await Jar(world.face, access=jar.access).bearer("GET", "/me")
    assert by_cookie.text == by_bearer.text == "50 admin ('read',) True"


async def test_beside_a_bad_bearer_the_cookie_is_not_read(world: World) -> None:
    jar = await signed_in(world)
    for value in ("Bearer x.y.z", "Bearer", "Basic YTpi", "Bearer " + "a" * 9000):
        answer = await jar.ask("GET", "/me", Authorization=value)
        assert (answer.status, answer.problem["code"]) == (401, "invalid_token")
        assert answer.one("www-authenticate") == 'Bearer error="invalid_token"'
        # The text is the same for every cause.
        assert answer.problem["title"] == "The access token is not valid."
        assert answer.all("set-cookie") == []
    assert (await jar.ask("GET", "/me")).status == 200


async def test_without_credentials_both_are_asked_for_and_no_error_is_named(world: World) -> None:
    answer = await Jar(world.face).ask("GET", "/me")
    assert answer.problem["code"] == "login_required"
    assert answer.all("www-authenticate") == ['Cookie realm="session"', 'Bearer realm="session"']


async def test_a_bearer_has_no_fields_and_makes_no_session(world: World) -> None:
    jar = await signed_in(world)
    answer = await Jar(world.face, access=jar.access).bearer("POST", "/write")
    assert (answer.status, answer.problem["code"]) == (400, "value_refused")
    assert answer.all("set-cookie") == []


async def test_a_stolen_access_token_never_becomes_a_refresh_token(world: World) -> None:
    jar = await signed_in(world)
    thief = Jar(world.face, access=jar.access)
    answer = await thief.bearer("POST", "/more")
    assert (answer.status, answer.problem["code"]) == (403, "forbidden")
    # CVE-2026-101023, CVE-2026-82469: nor does it pass for one.
    thief.cookies[REFRESH] = jar.access
    assert (await thief.ask("POST", "/refresh")).problem["code"] == "refresh_invalid"
    assert (await thief.bearer("POST", "/refresh")).problem["code"] == "refresh_invalid"


async def test_a_refresh_token_is_no_bearer(world: World) -> None:
    jar = await signed_in(world)
    answer = await Jar(world.face, access=jar.cookies[REFRESH]).bearer("GET", "/me")
    assert answer.problem["code"] == "invalid_token"


async def test_a_young_token_is_not_sent_again(world: World) -> None:
    jar = await signed_in(world)
    held = jar.cookies[REFRESH]
    answer = await jar.ask("POST", "/refresh")
    # A slow answer that sets the old cookie again would overwrite a newer one.
    assert answer.all("set-cookie") == []
    assert jar.cookies[REFRESH] == held
    assert (await Jar(world.face, access=answer.text).bearer("GET", "/me")).status == 200


async def test_two_tabs_that_refresh_at_once_both_stay_signed_in(world: World) -> None:
    jar = await signed_in(world)
    other = Jar(world.face, dict(jar.cookies))
    for _ in range(3):
        world.advance(30)
        answers = [await jar.ask("POST", "/refresh"), await other.ask("POST", "/refresh")]
        assert [answer.status for answer in answers] == [200, 200]
        assert jar.cookies[REFRESH] == other.cookies[REFRESH]


async def test_reuse_after_the_grace_is_told_and_clears_no_cookie(world: World) -> None:
    jar = await signed_in(world)
    thief = Jar(world.face, dict(jar.cookies))
    world.advance(30)
    await jar.ask("POST", "/refresh")
    world.advance(30)
    answer = await thief.ask("POST", "/refresh")
    assert (answer.status, answer.problem["code"]) == (401, "refresh_reused")
    # Only a logout clears cookies: a late answer must not destroy a newer sign-in.
    assert answer.all("set-cookie") == []
    told = await jar.ask("POST", "/refresh")
    assert (told.problem["code"], told.problem["reason"]) == ("session_ended", "refresh_reused")
    assert (await jar.bearer("GET", "/me")).problem["code"] == "invalid_token"
    assert (await jar.ask("GET", "/me")).problem["code"] == "session_ended"


async def test_without_a_refresh_cookie_there_is_nothing_to_exchange(world: World) -> None:
    world_asked = await Jar(world.face).ask("POST", "/refresh")
    assert (world_asked.status, world_asked.problem["code"]) == (401, "refresh_invalid")
    twins = Jar(world.face, {REFRESH: "x"})
    answer = await twins.ask("POST", "/refresh", Cookie=f"{REFRESH}=y")
    assert answer.problem["code"] == "refresh_invalid"


@pytest.mark.parametrize("carried", ["session", "refresh", "bearer", "all"])
async def test_signing_out_with_any_credential_ends_all_of_them(carried: str, world: World) -> None:
    jar = await signed_in(world)
    leaving = Jar(world.face, access=jar.access)
    if carried in ("session", "all"):
        leaving.cookies["__Host-Http-session"] = jar.cookies["__Host-Http-session"]
    if carried in ("refresh", "all"):
        leaving.cookies[REFRESH] = jar.cookies[REFRESH]
    answer = await (leaving.bearer if carried in ("bearer", "all") else leaving.ask)("POST", "/logout")
    assert answer.status == 200
    cleared = {line.partition("=")[0] for line in answer.all("set-cookie") if "Max-Age=0" in line}
    assert cleared == {"__Host-Http-session", REFRESH}
    assert (await jar.ask("POST", "/refresh")).problem["code"] == "session_ended"
    assert (await jar.bearer("GET", "/me")).problem["code"] == "invalid_token"
    assert (await jar.ask("GET", "/me")).problem["code"] == "session_ended"


async def test_an_access_token_that_has_just_expired_still_signs_out(world: World) -> None:
    jar = await signed_in(world)
    world.advance(901)
    assert (await jar.bearer("GET", "/me")).status == 401
    await Jar(world.face, access=jar.access).bearer("POST", "/logout")
    assert (await jar.ask("POST", "/refresh")).problem["code"] == "session_ended"


async def test_signing_out_looks_at_every_refresh_cookie_that_came(world: World) -> None:
    jar = await signed_in(world)
    twins = Jar(world.face, {REFRESH: jar.cookies[REFRESH]})
    await twins.ask("POST", "/logout", Cookie=f"{REFRESH}=planted")
    assert (await jar.ask("POST", "/refresh")).problem["code"] == "session_ended"


async def test_beside_a_bearer_the_refresh_cookie_is_not_read(world: World) -> None:
    alice, bob = await signed_in(world), await signed_in(world)
    mixed = Jar(world.face, {REFRESH: bob.cookies[REFRESH]}, access=alice.access)
    assert (await mixed.bearer("POST", "/refresh")).problem["code"] == "refresh_invalid"


async def test_a_sign_in_ends_whoever_was_signed_in_in_this_browser(world: World) -> None:
    # A's session cookie ended with the browser, the refresh cookie outlived it; then B signs in.
    jar = await signed_in(world)
    before = Jar(world.face, dict(jar.cookies), access=jar.access)
    del jar.cookies["__Host-Http-session"]
    await jar.ask("POST", "/login")
    assert (await before.ask("POST", "/refresh")).problem["code"] == "refresh_invalid"
    assert (await before.bearer("GET", "/me")).problem["code"] == "invalid_token"
    assert (await before.ask("GET", "/me")).status == 401
    assert (await jar.ask("GET", "/me")).status == 200


async def test_when_the_one_before_cannot_be_ended_nobody_is_signed_in(world: World) -> None:
    jar = await signed_in(world)
    before = Jar(world.face, dict(jar.cookies))
    del jar.cookies["__Host-Http-session"]
    world.store.away = frozenset({"rotate_refresh"})
    answer = await jar.ask("POST", "/login")
    world.store.away = None
    assert (answer.status, answer.all("set-cookie")) == (503, [])
    assert (await before.ask("GET", "/me")).status == 200
    page = await world.do(world.coat.list_sessions("50"))
    assert len(page.items) == 1


async def test_a_forged_refresh_cookie_signs_nobody_out(world: World) -> None:
    jar = await signed_in(world)
    held = jar.cookies[REFRESH]
    for forged in (held[:30] + ("A" if held[30] != "A" else "B") + held[31:], "x" * 88):
        await Jar(world.face, {REFRESH: forged}).ask("POST", "/logout")
    assert (await jar.ask("POST", "/refresh")).status == 200


async def test_a_bearer_can_be_checked_again_before_what_cannot_be_undone(world: World) -> None:
    jar = await signed_in(world)
    assert float((await jar.bearer("GET", "/recheck")).text) == world.system.now_us() / 1_000_000 + 900
    assert (await jar.bearer("POST", "/recheck")).problem["code"] == "session_gone"


async def test_a_store_that_is_away_signs_nobody_out(world: World) -> None:
    jar = await signed_in(world)
    world.store.away = frozenset({"rotate_refresh", "standing"})
    for answer in (await jar.ask("POST", "/refresh"), await jar.bearer("GET", "/me")):
        assert answer.status == 503
        assert answer.one("retry-after") is not None
        assert answer.all("set-cookie") == []
    world.store.away = None
    assert (await jar.ask("POST", "/refresh")).status == 200


async def test_a_request_that_looks_at_nothing_asks_nothing(world: World) -> None:
    jar = await signed_in(world)
    world.store.forget()
    for answer in (await jar.ask("GET", "/plain"), await jar.bearer("GET", "/plain")):
        assert answer.all("vary") == []
    assert world.store.verbs == []


async def test_where_tokens_are_off_a_bearer_is_nothing_and_the_cookie_still_does_not_count(
    make_world: Callable[..., Any],
) -> None:
    world: World = make_world()

    @world.view("/me")
    async def me(ask: Ask) -> str:
        await ask.load()
        return ask.session.require_login().subject

    answer = await Jar(world.face, access="x.y.z").bearer("GET", "/me")
    assert answer.problem["code"] == "login_required"
    assert answer.one("www-authenticate") == 'Cookie realm="session"'
