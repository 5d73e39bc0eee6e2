"""What a sign-in gets when there are as many sessions as there may be, and how it goes on."""

from __future__ import annotations

import html
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import pytest
from starlette.testclient import TestClient

from coatcheck.core.ports import RateLimit
from coatcheck.core.profiles import Profile, RoleLimit, costs_of
from coatcheck.core.throttle import ThrottlePolicy
from coatcheck.server.app import create_app
from coatcheck.server.continuing import CONTINUE_LIFE, PROOF_LIFE
from coatcheck.server.settings import ServerSettings
from tests.server.conftest import BROWSER, COOKIE, NEW_PASSWORD, PASSWORD, MakeSite, Site

SEOUL, BUSAN, JEJU = "203.0.113.7", "198.51.100.23", "192.0.2.99"
LOGIN = {"username": "minsu", "password": PASSWORD}


def make(make_site: MakeSite, on_limit: str, maximum: int | None = 1, **settings: Any) -> Site:
    site = make_site(on_limit=on_limit, max_sessions=maximum, **settings)
    site.add_user()
    return site


def several(site: Site, count: int) -> list[TestClient]:
    """Browsers that have signed in one after the other, each from another network."""
    clients = []
    for _, peer in zip(range(count), (SEOUL, BUSAN, JEJU), strict=False):
        site.clock.advance(1)
        clients.append(site.signed_in(peer=peer))
    return clients


def log_in(client: TestClient) -> Any:
    return client.post("/api/login", json=LOGIN)


def go_on(client: TestClient, refused: Any, *sids: str) -> Any:
    return client.post("/api/login/continue", json={"continue": refused.json()["continue"], "end": list(sids)})


def sids_of(refused: Any) -> list[str]:
    return [each["sid"] for each in refused.json()["sessions"]]


def kinds(site: Site) -> list[str]:
    site.call(site.service._trail._write)
    return [str(each.envelope["type"]) for each in site.call(site.service.audit.read, limit=1000)]


# -- the four answers ----------------------------------------------------------------------------------------------


def test_allow_lets_any_number_in(make_site: MakeSite) -> None:
    site = make(make_site, "allow", None)
    clients = [site.signed_in() for _ in range(4)]
    assert [client.get("/api/me").status_code for client in clients] == [200] * 4


def test_the_newest_throws_the_oldest_out_and_the_oldest_learns_when_and_where_from(make_site: MakeSite) -> None:
    site = make(make_site, "evict_oldest")
    first = site.signed_in(peer=SEOUL)
    site.clock.advance(60)
    second = site.signed_in(peer=BUSAN)
    refused = first.get("/api/me")
    assert (refused.status_code, refused.json()["code"]) == (401, "session_ended")
    assert (refused.json()["reason"], refused.json()["network"]) == ("session_limit", BUSAN)
    assert abs(refused.json()["at"] - site.clock.now_us() / 1e6) < 5
    assert second.get("/api/me").status_code == 200


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_of_whoever_was_thrown_out_says_why_when_and_where_from(make_site: MakeSite, language: str) -> None:
    site = make(make_site, "evict_oldest")
    site.add_user("boss", role="admin")
    first = site.at_account(accept_language=language)
    site.signed_in(peer=BUSAN)
    for address in ("/login", "/"):
        text = first.get(address).text
        assert BUSAN in text
        assert ("another device" if language == "en" else "다른 기기") in text
        assert "<time datetime=" in text


@pytest.mark.parametrize("on_limit", ["refuse", "ask"])
def test_refuse_and_ask_tell_who_is_there_and_end_nobody(make_site: MakeSite, on_limit: str) -> None:
    site = make(make_site, on_limit)
    first = site.client(peer=SEOUL, headers={"user-agent": BROWSER["user-agent"]})
    assert log_in(first).status_code == 200
    refused = log_in(site.client(peer=BUSAN))
    body = refused.json()
    assert (refused.status_code, body["code"], body["ask"]) == (409, "session_limit", on_limit == "ask")
    (found,) = body["sessions"]
    assert set(found) == {"sid", "created_at", "last_seen_at", "network", "device"}
    assert found["sid"] == first.get("/api/me").json()["session"]["sid"]
    assert (found["network"], found["device"]) == (SEOUL, "Chrome on Linux")
    assert "set-cookie" in refused.headers
    assert COOKIE not in refused.headers["set-cookie"]


@pytest.mark.parametrize("on_limit", ["refuse", "ask"])
def test_whoever_gave_the_password_may_end_the_other_session_and_is_in(make_site: MakeSite, on_limit: str) -> None:
    # The attack: a thief signs in first, and a limit that refuses keeps the owner out for as long as the thief likes.
    site = make(make_site, on_limit)
    thief = site.signed_in(peer=BUSAN)
    owner = site.client(peer=SEOUL)
    refused = log_in(owner)
    done = go_on(owner, refused, *sids_of(refused))
    assert (done.status_code, done.json()["user"]["name"]) == (200, "minsu")
    assert owner.get("/api/me").status_code == 200
    assert thief.get("/api/me").json()["reason"] == "session_limit"
    assert ("session.limit_overruled" in kinds(site)) is (on_limit == "refuse")


def test_exactly_the_chosen_ones_end(make_site: MakeSite) -> None:
    site = make(make_site, "ask", 3)
    clients = several(site, 3)
    new = site.client()
    refused = log_in(new)
    assert go_on(new, refused, sids_of(refused)[1]).status_code == 200
    assert [client.get("/api/me").status_code for client in clients] == [200, 401, 200]


def test_too_few_chosen_is_the_same_answer_again_and_ends_nobody(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    first, new = site.signed_in(), site.client()
    refused = go_on(new, log_in(new))
    assert (refused.status_code, refused.json()["code"]) == (409, "session_limit")
    assert first.get("/api/me").status_code == 200
    assert go_on(new, refused, *sids_of(refused)).status_code == 200


def test_another_set_of_sessions_is_shown_again_before_anything_ends(make_site: MakeSite) -> None:
    site = make(make_site, "ask", 2)
    one, two = several(site, 2)
    new = site.client()
    refused = log_in(new)
    two.post("/api/logout")
    site.clock.advance(1)
    three = site.signed_in()
    again = go_on(new, refused, sids_of(refused)[0])
    assert again.status_code == 409
    assert sids_of(again)[0] == sids_of(refused)[0]
    assert sids_of(again)[1] == three.get("/api/me").json()["session"]["sid"]
    assert one.get("/api/me").status_code == 200
    assert go_on(new, again, sids_of(again)[0]).status_code == 200


def test_a_role_has_its_own_limit(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = RoleLimit(role="admin", max_sessions=1, on_limit="refuse")
    decided = replace(Profile.named("b2c"), role_limits=(strict,))
    monkeypatch.setattr(ServerSettings, "decided", property(lambda _: decided))
    site = make_site()
    site.add_user("minsu")
    site.add_user("boss", role="admin")
    assert [log_in(site.client()).status_code for _ in range(3)] == [200] * 3
    answers = [site.client().post("/api/login", json={**LOGIN, "username": "boss"}) for _ in range(2)]
    assert [each.status_code for each in answers] == [200, 409]


# -- the same browser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_limit", ["refuse", "ask", "evict_oldest"])
def test_a_browser_that_lost_its_session_cookie_replaces_its_own_session(make_site: MakeSite, on_limit: str) -> None:
    site = make(make_site, on_limit, 2)
    other = site.signed_in()
    browser = site.signed_in()
    before = browser.get("/api/me").json()["session"]["sid"]
    del browser.cookies[COOKIE]
    assert log_in(browser).status_code == 200
    found = other.get("/api/sessions").json()["sessions"]
    assert len(found) == 2
    assert before not in [each["sid"] for each in found]


def test_signing_in_again_in_one_browser_is_no_second_session(make_site: MakeSite) -> None:
    site = make(make_site, "refuse")
    browser = site.signed_in()
    assert [log_in(browser).status_code for _ in range(3)] == [200] * 3


def test_a_device_cookie_of_another_account_replaces_nothing(make_site: MakeSite) -> None:
    site = make(make_site, "refuse")
    site.add_user("jiwoo")
    minsu, jiwoo = site.signed_in("minsu"), site.signed_in("jiwoo")
    stranger = site.client()
    for name, value in jiwoo.cookies.items():
        if name != COOKIE:
            stranger.cookies.set(name, value)
    assert log_in(stranger).status_code == 409
    assert minsu.get("/api/me").status_code == 200


# -- the word ------------------------------------------------------------------------------------------------------


def test_a_word_works_once(make_site: MakeSite) -> None:
    site = make(make_site, "ask", 2)
    several(site, 2)
    new = site.client()
    refused = log_in(new)
    assert go_on(new, refused, sids_of(refused)[0]).status_code == 200
    again = go_on(new, refused, sids_of(refused)[1])
    assert (again.status_code, again.json()["code"]) == (401, "login_required")


def test_of_many_that_spend_one_word_at_once_one_gets_in(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    site.signed_in()
    new = site.client()
    refused = log_in(new)
    clients = []
    for _ in range(8):
        clients.append(site.client())
        clients[-1].cookies.update(new.cookies)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda each: go_on(each, refused, *sids_of(refused)).status_code, clients))
    assert sorted(answers) == [200] + [401] * 7


@pytest.mark.parametrize(("left_us", "status"), [(1, 200), (0, 401)])
def test_a_word_works_for_two_minutes(make_site: MakeSite, left_us: int, status: int) -> None:
    site = make(make_site, "ask")
    site.signed_in()
    new = site.client()
    began = site.clock.now_us()
    refused = log_in(new)
    assert site.clock.now_us() == began
    site.clock.advance(CONTINUE_LIFE.total_seconds() - left_us / 1e6)
    assert go_on(new, refused, *sids_of(refused)).status_code == status


def test_the_password_counts_for_ten_minutes_however_many_words_there_are(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    site.signed_in()
    new = site.client()
    refused = log_in(new)
    step = CONTINUE_LIFE - timedelta(seconds=1)
    for _ in range(PROOF_LIFE // step):
        site.clock.advance(step.total_seconds())
        refused = go_on(new, refused)
        assert refused.status_code == 409
    site.clock.advance(step.total_seconds())
    assert go_on(new, refused, *sids_of(refused)).status_code == 401


def test_a_word_is_worth_nothing_in_another_browser(make_site: MakeSite) -> None:
    # The attack: the word leaks (a log, a shoulder), the cookie does not. Nor does a cookie of the thief's own help.
    site = make(make_site, "ask")
    first, new, thief = site.signed_in(), site.client(), site.client()
    refused = log_in(new)
    assert go_on(thief, refused, *sids_of(refused)).status_code == 401
    site.add_user("thief")
    site.signed_in("thief")
    own = thief.post("/api/login", json={**LOGIN, "username": "thief"})
    assert own.status_code == 409
    assert go_on(thief, refused, *sids_of(refused)).status_code == 401
    assert first.get("/api/me").status_code == 200
    assert go_on(new, refused, *sids_of(refused)).status_code == 200


def test_only_what_was_shown_can_be_ended(make_site: MakeSite) -> None:
    # The attack: end somebody else's session by its public handle.
    site = make(make_site, "ask")
    site.add_user("victim")
    victim = site.signed_in("victim")
    site.signed_in()
    new = site.client()
    refused = log_in(new)
    theirs = victim.get("/api/me").json()["session"]["sid"]
    answer = go_on(new, refused, *sids_of(refused), theirs)
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert victim.get("/api/me").status_code == 200
    # The mistake did not spend the word.
    assert go_on(new, refused, *sids_of(refused)).status_code == 200


@pytest.mark.parametrize("word", ["", "x", "=", "A" * 64, "A" * 9000, "☃", "../../x", "A" * 63 + "\x00"])
def test_an_invented_word_is_nobody(make_site: MakeSite, word: str) -> None:
    site = make(make_site, "ask")
    client = site.client()
    client.cookies.set("coatcheck_continue", "A" * 43 + "=")
    answer = client.post("/api/login/continue", json={"continue": word, "end": []})
    assert (answer.status_code, answer.json()["code"]) == (401, "login_required")
    assert COOKIE not in client.cookies


def test_a_changed_octet_spoils_a_word(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    site.signed_in()
    new = site.client()
    refused = log_in(new)
    word = refused.json()["continue"]
    for at in (0, 20, len(word) // 2):
        bent = word[:at] + ("A" if word[at] != "A" else "B") + word[at + 1 :]
        assert new.post("/api/login/continue", json={"continue": bent, "end": []}).status_code == 401


def test_a_disabled_account_or_a_new_password_ends_what_was_proven(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    first, new = site.signed_in(), site.client()
    refused = log_in(new)
    site.clock.advance(1)
    assert first.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD}).status_code == 200
    answer = go_on(new, refused, *sids_of(refused))
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_credentials")
    assert first.get("/api/me").status_code == 200


def test_another_site_cannot_go_on(make_site: MakeSite) -> None:
    site = make(make_site, "ask")
    site.signed_in()
    new = site.client()
    refused = log_in(new)
    new.headers["origin"] = "https://evil.example"
    assert go_on(new, refused, *sids_of(refused)).status_code == 403


def test_a_right_password_at_the_limit_does_not_shut_the_door(make_site: MakeSite) -> None:
    site = make(make_site, "refuse")
    site.signed_in()
    strangers = [log_in(site.client(peer=f"203.0.113.{number}")).status_code for number in range(12)]
    assert strangers == [409] * 12


# -- two that throw each other out -------------------------------------------------------------------------------


def test_after_three_mutual_evictions_in_ten_minutes_nobody_is_thrown_out_unseen(make_site: MakeSite) -> None:
    site = make(make_site, "evict_oldest")
    one, two = site.signed_in(peer=SEOUL), site.signed_in(peer=BUSAN)
    for client in (one, two, one):
        site.clock.advance(100)
        assert log_in(client).status_code == 200
    assert kinds(site).count("session.eviction_contest") == 1
    asked = log_in(two)
    assert (asked.status_code, asked.json()["ask"]) == (409, True)
    # Nor somebody who hides that he was here before.
    assert log_in(site.client(peer=JEJU)).status_code == 409
    assert one.get("/api/me").status_code == 200
    assert go_on(two, asked, *sids_of(asked)).status_code == 200
    assert one.get("/api/me").json()["reason"] == "session_limit"


@pytest.mark.parametrize(("left_us", "status"), [(1, 409), (0, 200)])
def test_a_contest_is_three_in_ten_minutes_to_the_microsecond(make_site: MakeSite, left_us: int, status: int) -> None:
    site = make(make_site, "evict_oldest")
    one, two = site.signed_in(), site.signed_in()
    for client, wait in ((one, 0), (two, 200), (one, 200)):
        site.clock.advance(wait)
        assert log_in(client).status_code == 200
    site.clock.advance(200 - left_us / 1e6)
    assert log_in(two).status_code == status


def test_new_devices_one_after_the_other_are_no_contest(make_site: MakeSite) -> None:
    site = make(make_site, "evict_oldest")
    for _ in range(6):
        site.signed_in()
    assert "session.eviction_contest" not in kinds(site)


# -- many at once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on_limit", "maximum"), [("allow", None), ("evict_oldest", 3), ("refuse", 3), ("ask", 3)])
def test_simultaneous_sign_ins_are_exact(make_site: MakeSite, on_limit: str, maximum: int | None) -> None:
    many = 8
    site = make(make_site, on_limit, maximum)
    wide = RateLimit(attempts=10_000, period=60.0)
    service = replace(site.service, throttle=ThrottlePolicy(unknown_devices=wide, network=wide))
    app = create_app(service)
    clients = [TestClient(app, base_url=site.base_url, follow_redirects=False) for _ in range(many)]
    for client in clients:
        client.portal = site.first.portal
    with ThreadPoolExecutor(many) as pool:
        answers = [each.status_code for each in pool.map(log_in, clients)]
    inside = many if maximum is None or on_limit == "evict_oldest" else maximum
    assert sorted(answers) == [200] * inside + [409] * (many - inside)
    alive = sum(client.get("/api/me").status_code == 200 for client in clients)
    assert alive == (many if maximum is None else maximum)


# -- the page ------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_list_and_goes_on_without_a_script(make_site: MakeSite) -> None:
    site = make(make_site, "ask", 2)
    old = several(site, 2)
    browser = site.browser()
    page = browser.post("/login", data={**LOGIN, "next": "/account?x=1"})
    assert page.status_code == 409
    assert "You are signed in elsewhere" in page.text
    assert SEOUL in page.text
    assert BUSAN in page.text
    boxes = re.findall(r'<input type="checkbox"[^>]* name="(end-[^"]+)"( checked)?>', page.text)
    assert [bool(checked) for _, checked in boxes] == [True, False]
    fields = {
        name: html.unescape(value)
        for name, value in re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    }
    done = browser.post("/login/continue", data={**fields, boxes[1][0]: "on"})
    assert (done.status_code, done.headers["location"]) == (303, "/account?x=1")
    assert browser.get("/account").status_code == 200
    assert [client.get("/api/me").status_code for client in old] == [200, 401]
    over = browser.post("/login/continue", data=fields)
    assert over.status_code == 401
    assert "sign in again" in over.text


def test_the_page_shows_the_list_again_when_too_few_were_chosen(make_site: MakeSite) -> None:
    site = make(make_site, "refuse")
    first = site.signed_in()
    browser = site.browser(accept_language="ko")
    page = browser.post("/login", data=LOGIN)
    word = re.search(r'name="continue" value="([^"]+)"', page.text)
    assert word is not None
    again = browser.post("/login/continue", data={"continue": word[1]})
    assert again.status_code == 409
    assert "아무것도 끝내지 않았습니다" in again.text
    assert first.get("/api/me").status_code == 200


def test_the_word_is_bound_by_a_cookie_that_no_script_reads(make_site: MakeSite) -> None:
    site = make(make_site, "ask", public_url="https://id.example")
    site.signed_in()
    cookies = log_in(site.client()).headers.get_list("set-cookie")
    (bound,) = [each for each in cookies if each.startswith("__Host-Http-continue=")]
    for part in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/", "Max-Age=120"):
        assert part in bound


def test_a_client_that_is_no_browser_goes_on_with_the_carrier_it_asked_for(make_site: MakeSite) -> None:
    site = make(make_site, "ask", profile="b2c")
    log_in(site.client())
    client = site.client()
    refused = client.post("/api/login", json={**LOGIN, "carrier": "body"})
    answer = go_on(client, refused, *sids_of(refused))
    assert answer.status_code == 200
    assert {"access_token", "refresh_token"} <= set(cast(dict[str, Any], answer.json()))
    assert COOKIE not in client.cookies


def test_a_sign_in_lists_the_sessions_that_are_there_once_as_the_profile_says_it_costs(make_site: MakeSite) -> None:
    site = make(make_site, "evict_oldest")
    part: Any = site.store.part
    listed: list[str] = []
    list_by_owner = part.list_by_owner

    async def counted(*args: Any, **more: Any) -> Any:
        listed.append("list_by_owner")
        return await list_by_owner(*args, **more)

    part.list_by_owner = counted
    assert log_in(site.client()).status_code == 200
    costs = {cost.request: cost.commands for cost in costs_of(site.service.settings.decided)}
    assert len(listed) == costs["a sign-in at a server, besides"] == 1
