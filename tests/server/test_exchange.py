"""One deployment under two profiles, one after the other: what a browser or a client holds becomes what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from starlette.testclient import TestClient

from coatcheck.core.profiles import PROFILES
from coatcheck.places import ClientPlace
from tests.server.conftest import BROWSER, COOKIE, NEW_PASSWORD, PASSWORD, REFRESH, MakeSite, Site

GRACE = 30
HOST = "127.0.0.1"
SECOND = timedelta(seconds=1)
MICROSECOND = timedelta(microseconds=1)
IDLE = PROFILES["admin"].idle_timeout
ABSOLUTE = PROFILES["admin"].absolute_timeout
LOGIN = {"username": "minsu", "password": PASSWORD}


@dataclass(frozen=True)
class Deployment:
    """The same home directory served under both profiles; their clocks are turned together."""

    admin: Site
    b2c: Site

    def advance(self, time: timedelta | float) -> None:
        self.admin.clock.advance(time)
        self.b2c.clock.advance(time)


@pytest.fixture
def deployment(make_site: MakeSite) -> Deployment:
    b2c = make_site(profile="b2c")
    b2c.add_user("minsu")
    return Deployment(admin=make_site(profile="admin", seed=b"the other one"), b2c=b2c)


def visitor(site: Site, cookies: Mapping[str, str], *, browser: bool = False) -> TestClient:
    """Somebody with these cookies and no others."""
    made = site.browser() if browser else site.client()
    for name, value in cookies.items():
        made.cookies.set(name, value, domain=HOST)
    return made


def refused(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def set_cookies(answer: Any) -> dict[str, str]:
    return {line.partition("=")[0]: line for line in answer.headers.get_list("set-cookie")}


def sid_at(site: Site, client: TestClient) -> str:
    """The session this visitor has on this server."""
    answer = visitor(site, dict(client.cookies)).get("/api/me")
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["session"]["sid"]
    return found


def native(site: Site) -> tuple[str, str]:
    """A client that is no browser signs in: its refresh token and its `sid`."""
    answer = site.client().post("/api/login", json={**LOGIN, "carrier": "body"})
    assert answer.status_code == 200, answer.text
    return answer.json()["refresh_token"], answer.json()["session"]["sid"]


def by_body(site: Site, token: str, **headers: str) -> Any:
    return site.client(headers=headers).post("/api/exchange", json={"carrier": "body", "refresh_token": token})


def kinds(site: Site) -> list[str]:
    return [entry.envelope["type"] for entry in site.call(site.service.audit.read, after=0, limit=1000)]


# From a session cookie to tokens.


def test_a_session_cookie_becomes_tokens_and_stays_a_session_cookie(deployment: Deployment) -> None:
    browser = deployment.admin.signed_in("minsu")
    sid, cookie = sid_at(deployment.admin, browser), browser.cookies[COOKIE]
    later = visitor(deployment.b2c, dict(browser.cookies))
    answer = later.post("/api/exchange")
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"sid", "access_token", "token_type", "expires_in"}
    assert (answer.json()["sid"], answer.json()["token_type"]) == (sid, "Bearer")
    assert set(set_cookies(answer)) == {REFRESH}, "the session cookie is good as it is"
    assert answer.headers["cache-control"] == "no-store"
    token = answer.json()["access_token"]
    me = deployment.b2c.client().get("/api/me", headers={"authorization": f"Bearer {token}"})
    assert (me.status_code, me.json()["session"]["sid"]) == (200, sid)
    assert later.post("/api/refresh").status_code == 200
    assert sid_at(deployment.b2c, visitor(deployment.b2c, {COOKIE: cookie})) == sid


def test_the_tokens_of_an_exchange_live_no_longer_than_the_session_they_came_from(deployment: Deployment) -> None:
    browser = deployment.admin.signed_in("minsu")
    deployment.advance(timedelta(minutes=20))
    later = visitor(deployment.b2c, dict(browser.cookies))
    refresh = set_cookies(later.post("/api/exchange"))[REFRESH]
    left = ABSOLUTE - timedelta(minutes=20)
    assert f"Max-Age={int(left.total_seconds())};" in f"{refresh};"
    # Loosening is for new sign-ins: half an hour without a request is still the end of this one.
    deployment.advance(IDLE)
    assert refused(later.post("/api/refresh")) == (401, "session_ended")


def test_a_native_client_with_a_session_cookie_gets_both_tokens_in_the_body(deployment: Deployment) -> None:
    browser = deployment.admin.signed_in("minsu")
    later = visitor(deployment.b2c, dict(browser.cookies))
    answer = later.post("/api/exchange", json={"carrier": "body"})
    assert set(answer.json()) == {"sid", "access_token", "token_type", "expires_in", "refresh_token"}
    assert "set-cookie" not in answer.headers


def test_an_audience_is_one_of_the_settings_or_nothing_is_exchanged(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", audiences=("orders",))
    site.add_user("minsu")
    client = site.signed_in("minsu")
    assert client.post("/api/exchange", json={"audience": "orders"}).status_code == 200
    assert refused(client.post("/api/exchange", json={"audience": "elsewhere"})) == (400, "value_refused")


def test_an_access_token_is_turned_into_nothing(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    token = client.post("/api/refresh").json()["access_token"]
    answer = client.post("/api/exchange", headers={"authorization": f"Bearer {token}"})
    assert refused(answer) == (403, "forbidden")
    assert "set-cookie" not in answer.headers


# From a refresh token to a session cookie.


def test_a_refresh_cookie_becomes_a_session_cookie_and_goes(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    sid, before = sid_at(deployment.b2c, client), client.cookies[COOKIE]
    deployment.advance(GRACE)
    later = visitor(deployment.admin, {REFRESH: client.cookies[REFRESH]})
    answer = later.post("/api/exchange")
    assert (answer.status_code, answer.json()) == (200, {"sid": sid})
    cookies = set_cookies(answer)
    assert set(cookies) == {COOKIE, REFRESH}
    assert "Max-Age=0" in cookies[REFRESH]
    assert later.cookies[COOKIE] not in answer.text
    assert later.cookies[COOKIE] != before
    assert sid_at(deployment.admin, later) == sid
    assert visitor(deployment.admin, {COOKIE: before}).get("/api/me").status_code == 401, "the old id is dead at once"


def test_a_session_cookie_that_counts_is_all_there_is_to_it(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    later = visitor(deployment.admin, dict(client.cookies))
    deployment.advance(GRACE)
    answer = later.post("/api/exchange")
    assert (answer.status_code, answer.json()) == (200, {"sid": sid_at(deployment.admin, client)})
    assert "set-cookie" not in answer.headers
    # And nothing was spent by it.
    alone = visitor(deployment.admin, {REFRESH: client.cookies[REFRESH]})
    assert alone.post("/api/exchange").status_code == 200


def test_a_native_client_gets_a_session_cookie_for_its_refresh_token(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    client = deployment.admin.client()
    answer = client.post("/api/exchange", json={"carrier": "body", "refresh_token": token})
    assert (answer.status_code, answer.json()) == (200, {"sid": sid})
    assert set(set_cookies(answer)) == {COOKIE}
    assert sid_at(deployment.admin, client) == sid


def test_with_tokens_on_a_refresh_cookie_alone_becomes_both(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    sid = sid_at(deployment.b2c, client)
    deployment.advance(GRACE)
    later = visitor(deployment.b2c, {REFRESH: client.cookies[REFRESH]})
    answer = later.post("/api/exchange")
    assert (answer.status_code, answer.json()["sid"]) == (200, sid)
    assert set(set_cookies(answer)) == {COOKIE, REFRESH}
    assert later.cookies[REFRESH] != client.cookies[REFRESH]
    assert sid_at(deployment.b2c, later) == sid
    assert later.post("/api/refresh").status_code == 200


def test_with_tokens_on_a_refresh_token_in_the_body_is_refreshed(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    deployment.advance(GRACE)
    answer = by_body(deployment.b2c, token)
    assert set(answer.json()) == {"sid", "access_token", "token_type", "expires_in", "refresh_token"}
    assert answer.json()["sid"] == sid
    assert "set-cookie" not in answer.headers


def test_there_and_back_and_there_again_the_sid_stays(deployment: Deployment) -> None:
    jar = dict(deployment.admin.signed_in("minsu").cookies)
    sid = sid_at(deployment.admin, visitor(deployment.admin, jar))
    for _ in range(3):
        tokens = visitor(deployment.b2c, jar)
        assert tokens.post("/api/exchange").json()["sid"] == sid
        deployment.advance(GRACE)
        back = visitor(deployment.admin, {REFRESH: tokens.cookies[REFRESH]})
        assert back.post("/api/exchange").json() == {"sid": sid}
        jar = {COOKIE: back.cookies[COOKIE]}
        deployment.advance(GRACE)
    assert kinds(deployment.admin).count("session.ended") == 0


# One refresh token, more than once.


@pytest.mark.parametrize("age", [0, GRACE])
def test_two_exchanges_of_one_token_give_one_id(deployment: Deployment, age: int) -> None:
    token, sid = native(deployment.b2c)
    deployment.advance(age)
    first, second = by_body(deployment.admin, token), by_body(deployment.admin, token)
    assert first.json() == second.json() == {"sid": sid}
    assert first.cookies[COOKIE] == second.cookies[COOKIE]
    assert sid_at(deployment.admin, visitor(deployment.admin, {COOKIE: first.cookies[COOKIE]})) == sid


def test_an_exchange_just_before_and_one_just_after_the_grace_give_one_id(deployment: Deployment) -> None:
    token, _ = native(deployment.b2c)
    deployment.advance(GRACE * SECOND - MICROSECOND)
    young = by_body(deployment.admin, token)
    deployment.advance(MICROSECOND)
    assert by_body(deployment.admin, token).cookies[COOKIE] == young.cookies[COOKIE]


def test_the_race_between_the_two_commands_ends_in_one_id(deployment: Deployment) -> None:
    token, _ = native(deployment.b2c)
    deployment.advance(GRACE * SECOND - MICROSECOND)
    engine = deployment.admin.service.coat.engine
    store: Any = deployment.admin.store.part
    found: list[str] = []
    rotate: Callable[..., Any] = store.rotate_id

    async def overtaken(ref: Any, **more: Any) -> Any:
        # Between the exchange of the other request and its new id, this one comes and goes.
        store.rotate_id = rotate
        deployment.advance(MICROSECOND)
        found.append((await engine.take_up(token.encode(), ClientPlace)).id.text)
        return await rotate(ref, **more)

    store.rotate_id = overtaken
    answer = by_body(deployment.admin, token)
    # The late one names an id that the other has replaced: it gets none, and asks again.
    assert refused(answer) == (409, "session_gone")
    again = by_body(deployment.admin, token)
    assert [again.cookies[COOKIE]] == found


def test_who_comes_again_after_the_grace_ends_the_session(deployment: Deployment) -> None:
    token, _ = native(deployment.b2c)
    deployment.advance(GRACE)
    held = by_body(deployment.admin, token).cookies[COOKIE]
    deployment.advance(GRACE * SECOND - MICROSECOND)
    assert by_body(deployment.admin, token).cookies[COOKIE] == held
    deployment.advance(MICROSECOND)
    assert refused(by_body(deployment.admin, token)) == (401, "refresh_reused")
    ended = visitor(deployment.admin, {COOKIE: held}).get("/api/me")
    assert (refused(ended), ended.json()["reason"]) == ((401, "session_ended"), "refresh_reused")


def test_an_id_that_died_with_a_proof_does_not_come_back(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    first = visitor(deployment.admin, {COOKIE: by_body(deployment.admin, token).cookies[COOKIE]})
    stolen = first.cookies[COOKIE]
    deployment.advance(1)
    proven = first.post("/api/step-up", json={"password": PASSWORD})
    assert proven.status_code == 200, proven.text
    assert proven.json()["session"]["sid"] == sid
    # Neither it, nor the token that it came from.
    assert refused(by_body(deployment.admin, token)) == (401, "refresh_invalid")
    assert visitor(deployment.admin, {COOKIE: stolen}).get("/api/me").status_code == 401
    assert first.get("/api/me").status_code == 200


def test_a_tab_that_refreshes_on_a_server_that_still_has_tokens_goes_on(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    deployment.advance(GRACE)
    token = client.cookies[REFRESH]
    assert visitor(deployment.admin, {REFRESH: token}).post("/api/exchange").status_code == 200
    assert visitor(deployment.b2c, {REFRESH: token}).post("/api/refresh").status_code == 200
    assert "refresh.reused" not in kinds(deployment.admin)


def test_a_store_that_is_away_between_the_two_commands_signs_nobody_out(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    deployment.advance(GRACE)
    deployment.admin.store.off = frozenset({"rotate_id"})
    assert refused(by_body(deployment.admin, token)) == (503, "store_unavailable")
    deployment.admin.store.off = frozenset()
    assert by_body(deployment.admin, token).json() == {"sid": sid}


def test_a_new_password_leaves_no_refresh_token_of_before(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    owner = visitor(deployment.admin, dict(client.cookies))
    assert owner.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD}).status_code == 200
    assert refused(by_body(deployment.admin, client.cookies[REFRESH])) == (401, "session_ended")
    assert owner.get("/api/me").status_code == 200


# What is refused.


@pytest.mark.parametrize("profile", ["admin", "b2c"])
def test_who_has_nothing_has_nothing_to_exchange(make_site: MakeSite, profile: str) -> None:
    answer = make_site(profile=profile).client().post("/api/exchange")
    assert refused(answer) == (401, "login_required")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("token", ["", "x", "A" * 88, "\u00e9" * 88, "x" * 10_000])
def test_an_invented_refresh_token_costs_the_store_nothing(deployment: Deployment, token: str) -> None:
    deployment.admin.store.off = frozenset({"rotate_refresh"})
    assert refused(by_body(deployment.admin, token)) == (401, "refresh_invalid")


def test_the_refresh_token_of_an_ended_session_says_why(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    deployment.b2c.call(deployment.b2c.service.coat.revoke_session, sid, reason="stolen laptop")
    answer = by_body(deployment.admin, token)
    assert (refused(answer), answer.json()["reason"]) == ((401, "session_ended"), "stolen laptop")
    assert "set-cookie" not in answer.headers


def test_a_disabled_account_goes_on_nowhere(deployment: Deployment) -> None:
    token, sid = native(deployment.b2c)
    user = deployment.b2c.call(deployment.b2c.service.accounts.list_users, after=None, limit=1)[0]
    deployment.b2c.call(deployment.b2c.service.accounts.disable, user.id)
    answer = by_body(deployment.admin, token)
    assert refused(answer) == (401, "session_ended")
    assert "set-cookie" not in answer.headers
    assert deployment.admin.call(deployment.admin.service.coat.list_sessions, user.id).items == ()
    assert sid


@pytest.mark.parametrize("headers", [{"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}])
@pytest.mark.parametrize("path", ["/api/exchange", "/login/go-on"])
def test_a_foreign_page_exchanges_nothing(deployment: Deployment, headers: dict[str, str], path: str) -> None:
    client = deployment.b2c.signed_in("minsu")
    forged = visitor(deployment.admin, {REFRESH: client.cookies[REFRESH]})
    answer = forged.post(path, headers=headers)
    assert refused(answer) == (403, "cross_origin")
    assert COOKIE not in forged.cookies


@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://127.0.0.1:8000"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}],
)
@pytest.mark.parametrize("profile", ["admin", "b2c"])
def test_a_page_never_carries_a_refresh_token_in_a_body(
    deployment: Deployment, profile: str, headers: dict[str, str]
) -> None:
    token, _ = native(deployment.b2c)
    site = deployment.admin if profile == "admin" else deployment.b2c
    assert refused(by_body(site, token, **headers)) == (400, "bad_request")


@pytest.mark.parametrize(
    "body", [{"refresh_token": "x"}, {"carrier": "cookie", "refresh_token": "x"}, {"carrier": "post"}, {"sid": "x"}, []]
)
def test_other_bodies_are_refused(deployment: Deployment, body: Any) -> None:
    assert refused(deployment.admin.client().post("/api/exchange", json=body)) == (400, "bad_request")


def test_twins_of_the_refresh_cookie_are_not_believed(deployment: Deployment) -> None:
    token = deployment.b2c.signed_in("minsu").cookies[REFRESH]
    client = deployment.admin.client(headers={"cookie": f"{REFRESH}={token}; {REFRESH}={token[::-1]}"})
    assert refused(client.post("/api/exchange")) == (401, "login_required")


def test_beside_an_authorization_header_no_cookie_counts(deployment: Deployment) -> None:
    token = deployment.b2c.signed_in("minsu").cookies[REFRESH]
    client = deployment.admin.client(headers={"cookie": f"{REFRESH}={token}", "authorization": "Bearer x"})
    assert refused(client.post("/api/exchange")) == (401, "login_required")


# Tightening.


@pytest.mark.parametrize("way", ["by a refresh token", "by the session cookie"])
def test_who_was_active_a_moment_before_the_switch_stays_whatever_was_noted(make_site: MakeSite, way: str) -> None:
    b2c = make_site(profile="b2c")
    b2c.add_user("minsu")
    client = b2c.signed_in("minsu")
    sid = sid_at(b2c, client)
    b2c.clock.advance(2 * IDLE)
    # Under seven days of idle timeout nothing is noted for hours: for all the store knows, this was no use.
    assert client.get("/api/me").status_code == 200
    held = {REFRESH: client.cookies[REFRESH]} if way == "by a refresh token" else dict(client.cookies)
    admin = make_site(profile="admin", seed=b"the other one", start_us=b2c.clock.now_us())
    answer = visitor(admin, held).post("/api/exchange")
    assert (answer.status_code, answer.json()) == (200, {"sid": sid})


@pytest.mark.parametrize(("silence", "lives"), [(IDLE - MICROSECOND, True), (IDLE, False)])
def test_the_idle_timeout_of_today_counts_for_a_refresh_token_too(
    deployment: Deployment, silence: timedelta, lives: bool
) -> None:
    token, _ = native(deployment.b2c)
    deployment.advance(silence)
    for _ in range(2):
        # The second time is like the first: being refused is no use of the session.
        answer = by_body(deployment.admin, token)
        assert answer.status_code == 200 if lives else refused(answer) == (401, "session_ended")


@pytest.mark.parametrize(("age", "lives"), [(ABSOLUTE - MICROSECOND, True), (ABSOLUTE, False)])
def test_the_absolute_timeout_of_today_counts_for_a_refresh_token_too(
    deployment: Deployment, age: timedelta, lives: bool
) -> None:
    token, _ = native(deployment.b2c)
    step = timedelta(minutes=20)
    while age > step:
        deployment.advance(step)
        age -= step
        answer = deployment.b2c.client().post("/api/refresh", json={"carrier": "body", "refresh_token": token})
        token = answer.json().get("refresh_token", token)
    deployment.advance(age)
    answer = by_body(deployment.admin, token)
    assert answer.status_code == 200 if lives else refused(answer) == (401, "session_ended")


# Pages.


@pytest.fixture
def left(deployment: Deployment) -> TestClient:
    """A browser that has nothing but its refresh cookie, on a server without tokens."""
    token = deployment.b2c.signed_in("minsu").cookies[REFRESH]
    deployment.advance(GRACE)
    return visitor(deployment.admin, {REFRESH: token}, browser=True)


@pytest.mark.parametrize(("path", "goal"), [("/", "/"), ("/login", None), ("/login?next=/account?x=1", "/account?x=1")])
def test_a_page_that_is_asked_for_with_a_refresh_cookie_alone_shows_one_button(
    deployment: Deployment, left: TestClient, path: str, goal: str | None
) -> None:
    answer = left.get(path)
    assert answer.status_code == 200
    assert 'action="/login/go-on"' in answer.text
    assert "set-cookie" not in answer.headers, "looking at a page exchanges nothing"
    assert "minsu" not in answer.text, "whose it is is told to whoever presses it"
    assert (f'name="next" value="{goal}"' in answer.text) is (goal is not None)
    sent = {"origin": deployment.admin.base_url, "sec-fetch-site": "same-origin"}
    done = left.post("/login/go-on", data={"next": goal or ""}, headers=sent)
    assert (done.status_code, done.headers["location"]) == (303, goal or "/account")
    assert "minsu" in left.get("/").text
    assert REFRESH not in left.cookies


def test_an_account_page_leads_there_and_back(left: TestClient) -> None:
    sent = left.get("/account")
    assert (sent.status_code, sent.headers["location"]) == (303, "/login?next=/account")
    assert 'name="next" value="/account"' in left.get(sent.headers["location"]).text


def test_the_page_speaks_korean(left: TestClient) -> None:
    assert "계속하기" in left.get("/", headers={"accept-language": "ko"}).text


def test_somebody_else_gets_the_form_all_the_same(left: TestClient) -> None:
    assert 'href="/login?anew&amp;next=/"' in left.get("/").text
    assert 'name="password"' in left.get("/login?anew&next=/").text


@pytest.mark.parametrize("value", ["", "x", "A" * 88, "x" * 5_000])
def test_a_refresh_cookie_that_never_was_ours_changes_no_page(deployment: Deployment, value: str) -> None:
    deployment.admin.signed_in("minsu")
    browser = deployment.admin.client(headers={**BROWSER, "cookie": f"{REFRESH}={value}"})
    assert 'name="password"' in browser.get("/login").text


def test_a_button_that_is_pressed_too_late_says_so_and_leads_to_the_form(
    deployment: Deployment, left: TestClient
) -> None:
    user = deployment.b2c.call(deployment.b2c.service.accounts.list_users, after=None, limit=1)[0]
    deployment.b2c.call(deployment.b2c.service.coat.revoke_subject, user.id, reason="stolen laptop")
    over = left.post("/login/go-on", data={"next": "/account"})
    assert over.status_code == 401
    assert "stolen laptop" in over.text
    assert 'href="/login?anew&amp;next=/account"' in over.text


@pytest.mark.parametrize("goal", ["//evil.example", "/\\evil.example", "https://evil.example", "/%09/evil.example"])
def test_the_button_leads_to_no_other_site(left: TestClient, goal: str) -> None:
    assert left.post("/login/go-on", data={"next": goal}).headers["location"] == "/account"


def test_pressing_it_twice_is_fine(left: TestClient) -> None:
    token = left.cookies[REFRESH]
    assert left.post("/login/go-on", data={"next": "/"}).status_code == 303
    held = left.cookies[COOKIE]
    left.cookies.set(REFRESH, token, domain=HOST)
    left.cookies.delete(COOKIE)
    assert left.post("/login/go-on", data={"next": "/"}).status_code == 303
    assert left.cookies[COOKIE] == held


# Signing out and in.


def test_signing_out_ends_what_a_refresh_cookie_alone_still_leads_to(deployment: Deployment, left: TestClient) -> None:
    token = left.cookies[REFRESH]
    gone = left.post("/logout")
    assert "Max-Age=0" in set_cookies(gone)[REFRESH]
    assert refused(by_body(deployment.admin, token)) == (401, "session_ended")


def test_signing_in_as_somebody_else_leaves_nobody_behind(deployment: Deployment, left: TestClient) -> None:
    token = left.cookies[REFRESH]
    deployment.admin.add_user("haneul")
    assert left.post("/login", data={"username": "haneul", "password": PASSWORD}).status_code == 303
    assert by_body(deployment.admin, token).status_code == 401


def test_a_refresh_cookie_beside_a_session_cookie_goes_when_somebody_signs_out(deployment: Deployment) -> None:
    client = deployment.b2c.signed_in("minsu")
    later = visitor(deployment.admin, dict(client.cookies))
    cookies = set_cookies(later.post("/api/logout"))
    assert {COOKIE, REFRESH} <= set(cookies)
    assert refused(by_body(deployment.admin, client.cookies[REFRESH])) == (401, "session_ended")
