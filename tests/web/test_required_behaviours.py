"""What every pairing of store and gateway owes: no lost write, no ghost session, no adopted id, no idle command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from coatcheck import CookieSettings
from coatcheck.core.cookie import MAX_PAIR_BYTES, render_set_cookie
from coatcheck.core.ports import Live
from coatcheck.errors import CookieTooLarge
from coatcheck.session import AsyncSession, SendCookie, Session
from tests.web.faces import COOKIE, Ask, Browser, Reply, World

pytestmark = pytest.mark.anyio


def standard(world: World) -> None:
    """The views most tests need."""

    @world.view("/login")
    async def login(ask: Ask) -> str:
        await ask.do(ask.session.login("50", claims={"role": "admin"}, keep=("cart",)))
        return "in"

    @world.view("/logout")
    async def logout(ask: Ask) -> str:
        await ask.do(ask.session.logout())
        return "out"

    @world.view("/who")
    async def who(ask: Ask) -> str:
        return str((await ask.load()).subject)

    @world.view("/cart")
    async def cart(ask: Ask) -> str:
        session = await ask.load()
        session.setdefault("cart", [])
        items: Any = session["cart"]
        items.append("coat")
        return str(len(items))

    @world.view("/see")
    async def see(ask: Ask) -> str:
        return msgspec.json.encode(dict(await ask.load())).decode()

    @world.view("/rotate")
    async def rotate(ask: Ask) -> str:
        await ask.do(ask.session.rotate())
        return "rotated"

    @world.view("/static")
    async def static(ask: Ask) -> str:
        return "same for all"


async def signed_in(world: World) -> Browser:
    browser = world.browser()
    assert (await browser.post("/login")).status == 200
    assert browser.cookie is not None
    return browser


async def cookie_only(world: World, cookie: str | None) -> Browser:
    """Another tab or program with this cookie, whatever the browser gets meanwhile."""
    return Browser(world.face, cookie)


async def test_sign_in_is_known_on_the_next_request_and_sign_out_ends_it(world: World) -> None:
    standard(world)
    browser = await signed_in(world)
    cookie = browser.cookie
    assert (await browser.get("/who")).text == "50"
    assert (await browser.post("/logout")).text == "out"
    assert browser.cookie is None
    assert (await (await cookie_only(world, cookie)).get("/who")).text == "None"


async def test_two_writers_of_different_fields_both_keep_their_write(world: World) -> None:
    # R1
    standard(world)
    browser = await signed_in(world)
    other = await cookie_only(world, browser.cookie)

    @world.view("/fast")
    async def fast(ask: Ask) -> str:
        (await ask.load())["fast"] = 1
        return "done"

    @world.view("/slow")
    async def slow(ask: Ask) -> str:
        session = await ask.load()
        session["slow"] = 1
        await other.post("/fast")
        return "done"

    assert (await browser.post("/slow")).status == 200
    assert (await browser.get("/see")).text == '{"fast":1,"slow":1}'


async def test_a_slow_reader_does_not_undo_a_write(world: World) -> None:
    # R2
    standard(world)
    browser = await signed_in(world)
    other = await cookie_only(world, browser.cookie)

    @world.view("/slow")
    async def slow(ask: Ask) -> str:
        session = await ask.load()
        assert dict(session) == {}
        await other.post("/cart")
        return str(dict(session))

    assert (await browser.get("/slow")).text == "{}"
    assert (await browser.get("/see")).text == '{"cart":["coat"]}'


@pytest.mark.parametrize(("method", "status"), [("POST", 409), ("GET", 200)])
async def test_a_slow_writer_does_not_survive_a_logout(world: World, method: str, status: int) -> None:
    # R3
    standard(world)
    browser = await signed_in(world)
    cookie = browser.cookie
    other = await cookie_only(world, cookie)

    @world.view("/slow")
    async def slow(ask: Ask) -> str:
        (await ask.load())["note"] = "late"
        await other.post("/logout")
        return "done"

    answer = await browser.request(method, "/slow", {"Sec-Fetch-Site": "same-origin"})
    assert answer.status == status
    assert answer.all("set-cookie") == []
    if status == 409:
        assert answer.problem["code"] == "session_gone"
    late = await cookie_only(world, cookie)
    assert (await late.get("/who")).text == "None"
    assert (await late.get("/see")).text == "{}"
    page = await world.coat.engine.store.scan(after=None, limit=10)
    assert page.sessions == ()


async def test_a_slow_reader_does_not_survive_a_logout(world: World) -> None:
    # R4
    standard(world)
    browser = await signed_in(world)
    other = await cookie_only(world, browser.cookie)

    @world.view("/slow")
    async def slow(ask: Ask) -> str:
        session = await ask.load()
        await other.post("/logout")
        return str(session.subject)

    answer = await browser.get("/slow")
    assert (answer.text, answer.all("set-cookie")) == ("50", [])
    assert (await browser.get("/who")).text == "None"


async def test_a_planted_id_of_nobody_is_never_adopted(world: World) -> None:
    # R5
    standard(world)
    keys = await world.coat.engine.ready()
    planted = world.coat.engine.new_session_id(keys).text
    for value in (planted, "A" * 64, planted[:-1], planted + "A", "%00", ""):
        browser = await cookie_only(world, value)
        assert (await browser.get("/who")).text == "None"
        answer = await browser.post("/cart")
        assert answer.status == 200
        assert browser.cookie not in (value, None)
        assert (await (await cookie_only(world, value)).get("/see")).text == "{}"


async def test_three_concurrent_rotations_end_in_one_live_session(world: World) -> None:
    # R9
    standard(world)
    browser = await signed_in(world)
    tabs = [await cookie_only(world, browser.cookie) for _ in range(3)]

    @world.view("/slow")
    async def slow(ask: Ask) -> str:
        await ask.load()
        if depth := len(waiting):
            waiting.pop()
            assert (await tabs[depth].post("/slow")).status == 200
        await ask.do(ask.session.rotate())
        return "rotated"

    waiting = [1, 2]
    assert (await tabs[0].post("/slow")).status == 200
    assert len({tab.cookie for tab in tabs}) == 1
    assert tabs[0].cookie != browser.cookie
    for tab in tabs:
        assert (await tab.get("/who")).text == "50"
    # The tab that was on its way with the old id is led on; after the alias nobody is.
    late = await cookie_only(world, browser.cookie)
    assert (await late.get("/who")).text == "50"
    assert late.cookie == tabs[0].cookie
    world.advance(11)
    gone = await cookie_only(world, browser.cookie)
    answer = await gone.get("/who")
    assert (answer.text, answer.all("set-cookie")) == ("None", [])


async def test_untouched_requests_cost_no_store_command(world: World) -> None:
    # R10
    standard(world)
    browser = await signed_in(world)
    world.store.forget()
    for _ in range(100):
        answer = await browser.get("/static")
        assert answer.all("set-cookie") + answer.all("vary") + answer.all("cache-control") == []
    assert world.store.verbs == []


async def test_a_hundred_reads_cost_at_most_a_hundred_loads_and_no_write(world: World) -> None:
    # R10
    standard(world)
    browser = await signed_in(world)
    world.store.forget()
    for _ in range(100):
        assert (await browser.get("/who")).text == "50"
    assert set(world.store.verbs) <= {"load"}
    assert len(world.store.verbs) <= 100


async def test_requests_without_a_cookie_leave_nothing_in_the_store(world: World) -> None:
    # CVE-2015-5143: anonymous requests created rows.
    standard(world)
    await world.coat.engine.ready()
    world.store.forget()
    for _ in range(50):
        answer = await world.browser().get("/who")
        assert answer.all("set-cookie") == []
    assert world.store.verbs == []


async def test_a_nested_change_is_kept(world: World) -> None:
    # R11
    standard(world)
    browser = await signed_in(world)
    assert [(await browser.post("/cart")).text for _ in range(3)] == ["1", "2", "3"]
    assert (await browser.get("/see")).text == '{"cart":["coat","coat","coat"]}'


async def test_a_record_over_its_limit_is_refused_and_keeps_what_it_had(world: World) -> None:
    # R12: what cannot be kept raises at the write; nothing is cut silently.
    standard(world)
    browser = await signed_in(world)
    await browser.post("/cart")

    @world.view("/much")
    async def much(ask: Ask) -> str:
        (await ask.load())["much"] = "x" * world.settings.max_field_octets
        return "kept"

    answer = await browser.post("/much")
    assert (answer.status, answer.problem["code"]) == (413, "record_too_large")
    assert (await browser.get("/see")).text == '{"cart":["coat"]}'


def test_an_oversize_cookie_raises_when_it_is_written() -> None:
    # R12
    settings = CookieSettings()
    with pytest.raises(CookieTooLarge):
        render_set_cookie(settings, "x" * (MAX_PAIR_BYTES - len(settings.name) + 1))
    assert render_set_cookie(settings, "x" * (MAX_PAIR_BYTES - len(settings.name)))


@pytest.mark.parametrize(
    "hostile",
    [
        "cos\nsystem\n(S'true'\ntR.",
        "[" * 10_000,
        '{"claims":7}',
        '{"scopes":[1]}',
        "null",
        "\x00",
        "",
    ],
)
async def test_hostile_bytes_in_the_store_are_nobody_and_an_event(world: World, hostile: str) -> None:
    # R13
    standard(world)
    browser = await signed_in(world)

    def tamper(loaded: Any) -> Any:
        return _with_authority(loaded, hostile) if isinstance(loaded, Live) else loaded

    world.store.tamper = tamper
    world.events.clear()
    answer = await browser.get("/who")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "None", [])
    assert "session.record_unreadable" in world.events.kinds()


@pytest.mark.parametrize("raw", [b"cos\nsystem\n(S'true'\ntR.", b"\x80\x04\x95", b"{", b"\xff" * 100, b""])
async def test_bytes_written_over_a_session_are_nobody_and_an_event(world: World, raw: bytes) -> None:
    # R13: whoever can write to the store must not run code here, nor become somebody.
    if world.write_over is None:
        return
    standard(world)
    browser = await signed_in(world)
    world.write_over(world.ref_of(browser.cookie), raw)
    world.events.clear()
    answer = await browser.get("/who")
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "None", [])
    assert world.events.kinds() == ["session.record_unreadable"]


async def test_a_hostile_field_in_the_store_is_absent(world: World) -> None:
    # R13
    standard(world)
    browser = await signed_in(world)
    await browser.post("/cart")

    def tamper(loaded: Any) -> Any:
        return _with_fields(loaded, {"cart": "!!python/object:os.system"}) if isinstance(loaded, Live) else loaded

    world.store.tamper = tamper

    @world.view("/get")
    async def get(ask: Ask) -> str:
        return str((await ask.load()).get("cart"))

    assert (await browser.get("/get")).text == "None"
    assert (await browser.get("/who")).text == "50"


def _with_authority(loaded: Live, text: str) -> Live:
    return replace(loaded, session=replace(loaded.session, authority=text))


def _with_fields(loaded: Live, fields: dict[str, str]) -> Live:
    return replace(loaded, session=replace(loaded.session, fields=fields))


async def test_deleting_the_cookie_carries_the_attributes_of_setting_it(world: World) -> None:
    # R15: a __Host- cookie that is deleted without Secure and Path=/ stays.
    standard(world)
    browser = world.browser()
    given = (await browser.post("/login")).one("set-cookie")
    taken = (await browser.post("/logout")).one("set-cookie")
    assert given is not None
    assert taken is not None
    attributes = given.split("; ")[1:]
    assert {"Secure", "Path=/", "HttpOnly", "SameSite=Lax"} == set(attributes)
    assert taken.split("; ") == [f"{COOKIE}=", *attributes, "Max-Age=0", "Expires=Thu, 01 Jan 1970 00:00:00 GMT"]


async def test_a_sign_in_that_replaces_an_anonymous_session_costs_two_commands(world: World) -> None:
    standard(world)
    browser = world.browser()
    await browser.post("/cart")
    anonymous = browser.cookie

    @world.view("/login")
    async def login(ask: Ask) -> str:
        await ask.load()
        world.store.forget()
        await ask.do(ask.session.login("50", keep=("cart",)))
        return "in"

    await browser.post("/login")
    assert world.store.verbs == ["admit", "revoke"]
    assert browser.cookie != anonymous
    assert (await browser.get("/see")).text == '{"cart":["coat"]}'


async def test_a_sign_in_over_the_same_subject_costs_one_command(world: World) -> None:
    standard(world)
    browser = await signed_in(world)
    first = browser.cookie

    @world.view("/login")
    async def login(ask: Ask) -> str:
        await ask.load()
        world.store.forget()
        await ask.do(ask.session.login("50"))
        return "in"

    await browser.post("/login")
    assert world.store.verbs == ["admit"]
    assert (await (await cookie_only(world, first)).get("/who")).text == "None"


async def test_an_id_known_before_sign_in_never_leads_to_the_signed_in_session(world: World) -> None:
    # Session fixation: the attacker gives the victim an id, waits for the sign-in, and comes with the id.
    standard(world)
    attacker = world.browser()
    await attacker.post("/cart")
    planted = attacker.cookie
    victim = await cookie_only(world, planted)
    await victim.post("/login")
    assert victim.cookie != planted
    for _ in range(2):
        again = await cookie_only(world, planted)
        assert (await again.get("/who")).text == "None"
        assert again.cookie == planted
        world.advance(60)


async def test_the_alias_of_a_rotation_just_before_sign_in_leads_nowhere(world: World) -> None:
    # Session fixation through the rotation alias, and through an alias chosen by the attacker's own rotation.
    standard(world)
    attacker = world.browser()
    await attacker.post("/cart")
    planted = attacker.cookie
    victim = await cookie_only(world, planted)
    await victim.post("/rotate")
    rotated = victim.cookie
    assert rotated != planted
    await victim.post("/login")
    for known in (planted, rotated):
        again = await cookie_only(world, known)
        answer = await again.get("/who")
        assert (answer.text, answer.all("set-cookie")) == ("None", [])
    assert (await victim.get("/who")).text == "50"


async def test_new_claims_end_the_old_id_at_once(world: World) -> None:
    standard(world)

    @world.view("/promote")
    async def promote(ask: Ask) -> str:
        await ask.do(ask.session.rotate(claims={"role": "root"}))
        return str(ask.session.claims["role"])

    browser = await signed_in(world)
    old = browser.cookie
    assert (await browser.post("/promote")).text == "root"
    stale = await cookie_only(world, old)
    assert (await stale.get("/who")).text == "None"
    assert (await browser.get("/who")).text == "50"


async def test_a_session_that_was_ended_says_why(world: World) -> None:
    standard(world)

    @world.view("/must")
    async def must(ask: Ask) -> str:
        return (await ask.load()).require_login().subject

    browser = await signed_in(world)
    assert (await browser.get("/must")).text == "50"
    done = await world.do(world.coat.revoke_subject("50", reason="stolen laptop"))
    assert (done.ended, done.reach_elapsed) == (1, True)
    answer = await browser.get("/must")
    assert (answer.status, answer.problem["code"], answer.problem["reason"]) == (401, "session_ended", "stolen laptop")
    assert answer.all("set-cookie") == []
    assert answer.one("www-authenticate") == 'Cookie realm="session"'
    nobody = await world.browser().get("/must")
    assert (nobody.status, nobody.problem["code"]) == (401, "login_required")


@pytest.mark.parametrize(("method", "status"), [("POST", 409), ("GET", 200)])
async def test_no_session_is_made_in_the_place_of_one_that_was_ended(world: World, method: str, status: int) -> None:
    # SEMANTICS 4: a cookie that was ours and is over is neither deleted nor replaced; only a sign-in does that.
    standard(world)
    browser = await signed_in(world)
    cookie = browser.cookie
    await world.do(world.coat.revoke_subject("50", reason="stolen laptop"))
    world.store.forget()
    answer = await browser.request(method, "/cart", {"Sec-Fetch-Site": "same-origin"})
    assert (answer.status, answer.all("set-cookie")) == (status, [])
    assert "create" not in world.store.verbs
    assert (await browser.post("/login")).status == 200
    assert browser.cookie not in (cookie, None)
    assert (await browser.get("/who")).text == "50"


async def test_idle_and_absolute_timeouts_end_a_session(world: World) -> None:
    standard(world)
    browser = await signed_in(world)
    idle = world.settings.idle_timeout.total_seconds()
    absolute = world.settings.absolute_timeout.total_seconds()
    passed = 0.0
    while passed + idle * 0.95 < absolute - 60:
        world.advance(idle * 0.95)
        passed += idle * 0.95
        assert (await browser.get("/who")).text == "50"
    world.advance(absolute - passed)
    assert (await browser.get("/who")).text == "None"
    idle_one = await signed_in(world)
    world.advance(idle)
    assert (await idle_one.get("/who")).text == "None"


async def test_a_session_works_the_same_through_both_colours_of_a_job(world: World) -> None:
    standard(world)
    browser = await signed_in(world)
    assert browser.cookie is not None
    session: Session | AsyncSession = world.coat.session(browser.cookie)
    await world.do(session.load())
    assert session.subject == "50"
    session["from"] = "job"
    await world.do(session.commit())
    assert (await browser.get("/see")).text == '{"from":"job"}'
    fresh = world.coat.session(None)
    await world.do(fresh.login("51"))
    assert isinstance(fresh.cookie_action, SendCookie)
    assert (await (await cookie_only(world, fresh.cookie_action.id.text)).get("/who")).text == "51"


async def test_a_redirect_after_sign_in_carries_the_cookie(world: World) -> None:
    standard(world)

    @world.view("/login")
    async def login(ask: Ask) -> Reply:
        await ask.do(ask.session.login("50"))
        return Reply(status=303, headers=(("Location", "/who"),))

    browser = world.browser()
    assert (await browser.post("/login")).status == 303
    assert (await browser.get("/who")).text == "50"
