"""What a response says to browsers and caches, and what a request cannot make us do, whatever bytes it sends."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coatcheck import Settings
from coatcheck.stores.open import open_store
from coatcheck.web.paths import is_excluded
from tests.web.faces import COOKIE, Ask, Browser, Reply, World
from tests.web.test_required_behaviours import signed_in, standard

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("path", ["/who", "/cart", "/login", "/logout", "/rotate"])
async def test_every_answer_that_read_or_set_a_session_is_kept_from_caches(small: World, path: str) -> None:
    # CVE-2023-30861, GHSA-68rp-wp8r-4726, PYSEC-2026-50: a shared cache served one user's page, or cookie, to others.
    standard(small)
    browser = await signed_in(small)
    answer = await browser.post(path)
    assert (answer.status, answer.one("vary"), answer.one("cache-control")) == (200, "Cookie", "no-store")


async def test_an_answer_without_a_session_says_nothing_about_it(small: World) -> None:
    standard(small)
    browser = await signed_in(small)
    answer = await browser.get("/static")
    assert answer.headers == [("Content-Type", "text/plain")]


@pytest.mark.parametrize(
    ("path", "stated", "sent"),
    [
        ("/read", "public, max-age=600", "no-store"),
        ("/read", "max-age=600", "no-store"),
        ("/read", "no-store, max-age=0", "no-store, max-age=0"),
        ("/read", "private, max-age=60", "private, max-age=60"),
        ("/read", 'private="x-field", max-age=60', "no-store"),
        ("/set", "private, max-age=60", "no-store"),
        ("/set", "public", "no-store"),
    ],
)
async def test_an_answer_that_called_itself_public_is_overruled(
    small: World, path: str, stated: str, sent: str
) -> None:
    headers = (("Cache-Control", stated), ("Vary", "Accept-Encoding"))

    @small.view("/read")
    async def read(ask: Ask) -> Reply:
        return Reply(body=str((await ask.load()).subject), headers=headers)

    @small.view("/set")
    async def set_(ask: Ask) -> Reply:
        await ask.do(ask.session.login("50"))
        return Reply(headers=headers)

    answer = await small.browser().post(path)
    assert answer.one("cache-control") == sent
    assert answer.all("vary") == ["Accept-Encoding", "Cookie"]


@pytest.mark.parametrize("vary", ["Cookie", "Accept, cookie", "*"])
async def test_a_vary_that_is_there_is_not_repeated(small: World, vary: str) -> None:
    @small.view("/read")
    async def read(ask: Ask) -> Reply:
        return Reply(body=str((await ask.load()).subject), headers=(("Vary", vary),))

    assert (await small.browser().get("/read")).all("vary") == [vary]


async def test_a_shared_cache_never_hands_one_user_to_another(small: World) -> None:
    standard(small)
    kept: dict[str, str] = {}

    async def through_the_cache(browser: Browser, path: str) -> str:
        # As lenient as a cache may be: it keeps whatever does not forbid it.
        if path in kept:
            return kept[path]
        answer = await browser.get(path)
        if "no-store" not in (answer.one("cache-control") or ""):
            kept[path] = answer.text
        return answer.text

    alice, nobody = await signed_in(small), small.browser()
    assert await through_the_cache(alice, "/who") == "50"
    assert await through_the_cache(nobody, "/who") == "None"
    await through_the_cache(alice, "/static")
    assert kept == {"/static": "same for all"}


async def test_the_cookie_is_sent_only_when_it_changed(small: World) -> None:
    standard(small)
    browser = await signed_in(small)
    for path in ("/who", "/cart", "/see", "/static", "/cart"):
        assert (await browser.post(path)).all("set-cookie") == [], path
    before = browser.cookie
    assert len((await browser.post("/rotate")).all("set-cookie")) == 1
    assert browser.cookie != before


async def test_a_cookie_that_came_twice_counts_as_none(small: World) -> None:
    # Cookie tossing: a sibling host adds a twin, and which comes first tells nothing.
    standard(small)
    browser = await signed_in(small)
    small.events.clear()
    twice = f"{COOKIE}={browser.cookie}; {COOKIE}={browser.cookie}".encode()
    answer = await small.face.request("GET", "/who", headers=[(b"cookie", twice)])
    assert answer.text == "None"
    assert small.events.kinds() == ["session_id.duplicated"]
    again = [(b"cookie", f"{COOKIE}={browser.cookie}".encode())] * 2
    assert (await small.face.request("GET", "/who", headers=again)).text == "None"


async def test_a_forged_id_costs_no_store_command_and_is_told(small: World) -> None:
    standard(small)
    await small.coat.engine.ready()
    small.store.forget()
    answer = await Browser(small.face, "A" * 64).get("/who")
    assert (answer.text, answer.all("set-cookie")) == ("None", [])
    assert small.events.kinds() == ["session_id.forged"]
    assert small.store.verbs == []


@pytest.mark.parametrize("authorization", ["Bearer good", "Bearer", "Basic eDp5", "", "garbage"])
async def test_with_an_authorization_header_the_cookie_is_not_read(small: World, authorization: str) -> None:
    # Two credentials are never merged, and a bad one does not fall back to the other.
    standard(small)
    browser = await signed_in(small)
    small.store.forget()
    assert (await browser.get("/who", {"Authorization": authorization})).text == "None"
    assert small.store.verbs == []


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE", "post", "BREW"])
@pytest.mark.parametrize("origin", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}])
async def test_an_unsafe_request_of_another_site_does_not_reach_the_application(
    small: World, method: str, origin: dict[str, str]
) -> None:
    standard(small)
    for cookie in (None, (await signed_in(small)).cookie):
        browser = Browser(small.face, cookie)
        small.events.clear()
        small.store.forget()
        answer = await browser.request(method, "/static", origin)
        assert (answer.status, answer.problem["code"]) == (403, "cross_origin")
        assert answer.all("set-cookie") == []
        assert small.events.kinds() == ["request.cross_origin_refused"]
        assert small.store.verbs == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_a_safe_request_of_another_site_passes(small: World, method: str) -> None:
    standard(small)
    answer = await small.browser().request(method, "/static", {"Sec-Fetch-Site": "cross-site"})
    assert answer.status == 200


async def test_own_and_programs_requests_pass(small: World) -> None:
    standard(small)
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, {"Origin": "https://app.example"}):
        assert (await small.browser().request("POST", "/static", headers)).status == 200


async def test_the_public_origin_is_compared_and_not_the_host(make_world: Callable[..., World]) -> None:
    # CVE-2026-48710: a decision built on Host follows whoever sends it.
    world = make_world(Settings(public_url="https://shop.example"))
    standard(world)
    browser = world.browser()
    assert (await browser.request("POST", "/static", {"Origin": "https://shop.example"})).status == 200
    assert (await browser.request("POST", "/static", {"Origin": "https://app.example"})).status == 403


async def test_a_refusal_of_a_head_request_has_no_body(small: World) -> None:
    @small.view("/must")
    async def must(ask: Ask) -> str:
        return (await ask.load()).require_login().subject

    answer = await small.browser().request("HEAD", "/must")
    assert (answer.status, answer.body) == (401, b"")


async def test_an_excluded_path_is_left_alone(small: World) -> None:
    standard(small)
    face = small.face_of(small.coat, exclude=("/static", "/health/"))
    with pytest.raises(RuntimeError, match="exclude="):
        await face.request("GET", "/static", headers=[])


def test_exclusion_means_the_path_and_what_is_below() -> None:
    exclude = ("/static", "/health/")
    for path in ("/static", "/static/", "/static/a.css", "/health/", "/health/live"):
        assert is_excluded(path, exclude), path
    for path in ("/", "/statics", "/account", "/static/../account", "/static/./../account", "/STATIC", "/health"):
        assert not is_excluded(path, exclude), path


async def test_the_client_is_recorded_and_forwarding_is_believed_from_proxies_alone(
    make_world: Callable[..., World],
) -> None:
    for proxies, network in (((), "203.0.113.7"), (("203.0.113.0/24",), "198.51.100.1")):
        world = make_world(Settings(trusted_proxies=proxies))
        standard(world)
        agent = "Mozilla/5.0 " + "x" * 1000
        await world.browser().post("/login", {"X-Forwarded-For": "198.51.100.1", "User-Agent": agent})
        [summary] = (await world.do(world.coat.list_sessions("50"))).items
        assert summary.network == network
        assert summary.user_agent == agent[:256]


NAMES = st.sampled_from(
    [b"cookie", b"authorization", b"origin", b"sec-fetch-site", b"host", b"x-forwarded-for", b"user-agent"]
)
# What an HTTP parser lets through: no CR, LF or NUL.
BYTES = st.binary(max_size=80).map(lambda raw: raw.translate(None, b"\r\n\x00"))
COOKIES = st.lists(
    st.one_of(
        BYTES,
        st.sampled_from(
            [
                COOKIE.encode() + b"=" + b"A" * 64,
                COOKIE.encode() + b'="' + b"A" * 64 + b'"',
                b"\xa0" + COOKIE.encode() + b"=x",
                b"=" + COOKIE.encode(),
                COOKIE.encode(),
                b"; ; ;=;",
            ]
        ),
    ),
    max_size=4,
).map(b"; ".join)


@pytest.mark.parametrize("colour", ["blocking", "async"])
@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "OPTIONS", "DELETE"]),
    cookie=COOKIES,
    rest=st.lists(st.tuples(NAMES, BYTES), max_size=4),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_makes_a_server_error_or_a_session(
    colour: str, method: str, cookie: bytes, rest: list[tuple[bytes, bytes]]
) -> None:
    # CVE-2023-23934, CVE-2024-7592 and their kin. Over WSGI, and over ASGI stepped by hand: memory never waits.
    world = World(
        "blocking" if colour == "blocking" else "async",
        lambda c, system: open_store("memory:", colour=c, system=system),
    )
    standard(world)
    work = world.face.request(method, "/who", headers=[(b"cookie", cookie), *rest])
    try:
        work.send(None)
    except StopIteration as finished:
        answer = finished.value
    else:
        raise AssertionError("a request over memory does not wait")
    assert answer.status in (200, 403)
    assert answer.all("set-cookie") == []
    if answer.status == 200:
        assert answer.text == "None"


@pytest.mark.parametrize("size", [16 * 1024 + 1, 1 << 20])
async def test_a_huge_header_is_not_looked_into(small: World, size: int) -> None:
    standard(small)
    browser = await signed_in(small)
    small.store.forget()
    huge = f"{COOKIE}={browser.cookie}; x=".encode() + b"x" * size
    answer = await small.face.request("GET", "/who", headers=[(b"cookie", huge)])
    assert (answer.status, answer.text, answer.all("set-cookie")) == (200, "None", [])
    assert small.store.verbs == []
    for name in (b"user-agent", b"x-forwarded-for", b"origin", b"host", b"authorization"):
        answer = await small.face.request("GET", "/who", headers=[(name, b"x" * size)])
        assert answer.status == 200


async def test_no_value_of_ours_can_break_a_header_line(small: World) -> None:
    # CVE-2026-0672, CVE-2026-3644: control characters or `;` in an attribute write further headers.
    standard(small)
    for path in ("/login", "/rotate", "/logout"):
        browser = await signed_in(small)
        line = (await browser.post(path)).one("set-cookie")
        assert line is not None
        assert line.isascii()
        assert line.isprintable()
        assert line.count(f"{COOKIE}=") == 1


async def test_a_development_address_uses_a_cookie_that_http_can_carry(make_world: Callable[..., World]) -> None:
    world = make_world(Settings(public_url="http://localhost:8000"))
    standard(world)
    browser = Browser(world.face, name="coatcheck_session")
    line = (await browser.request("POST", "/login", {"Origin": "http://localhost:8000"})).one("set-cookie")
    assert line is not None
    assert line.split("; ")[1:] == ["Path=/", "HttpOnly", "SameSite=Lax"]
    assert (await browser.get("/who")).text == "50"
