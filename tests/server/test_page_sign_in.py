"""Signing in and out by the form, and the reason why a session is over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from tests.server.conftest import COOKIE, NEW_PASSWORD, PASSWORD, Site
from tests.server.page_parts import Seen

LOGIN = {"username": "minsu", "password": PASSWORD}
CHANGE = {"current": PASSWORD, "new": NEW_PASSWORD, "again": NEW_PASSWORD}


@pytest.fixture
def minsu(site: Site) -> TestClient:
    """A browser signed in as `minsu`."""
    site.add_user("minsu")
    return site.at_account("minsu")


# Signing in.


def test_signing_in_leads_to_the_account(site: Site) -> None:
    site.add_user("minsu")
    browser = site.browser()
    answer = browser.post("/login", data=LOGIN)
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")
    assert "Signed in as minsu" in browser.get("/account").text


def test_the_form_helps_password_managers(site: Site) -> None:
    fields = {each["name"]: each for each in Seen(site.browser().get("/login").text).all("input")}
    assert fields["username"]["autocomplete"] == "username"
    assert fields["password"]["autocomplete"] == "current-password"
    assert fields["password"]["type"] == "password"
    assert "autofocus" in fields["username"]
    # A limit here would cut a longer password without a word.
    assert "maxlength" not in fields["password"]


def test_a_refusal_keeps_the_name_and_says_the_same_for_every_cause(site: Site) -> None:
    site.add_user("minsu")
    gone = site.add_user("Minsu2")
    site.call(site.service.accounts.disable, gone.id)
    pages = []
    for name in ("minsu", "Minsu2", "nobody"):
        answer = site.browser().post("/login", data={"username": name, "password": "wrong words"})
        assert answer.status_code == 401
        assert "wrong words" not in answer.text
        field = next(each for each in Seen(answer.text).all("input") if each["name"] == "username")
        assert field["value"] == name
        assert 'role="alert">Name or password are not right.' in answer.text
        pages.append(answer.text.replace(name, "-"))
    assert len(set(pages)) == 1


def test_what_was_typed_as_name_is_shown_escaped_and_bounded(site: Site) -> None:
    name = '"><script>alert(1)</script>' + "x" * 500
    answer = site.browser().post("/login", data={"username": name, "password": "x"})
    assert "<script" not in answer.text
    assert "&#34;&gt;&lt;script&gt;" in answer.text
    assert "x" * 129 not in answer.text


def test_too_many_attempts_have_to_wait_and_are_told_how_long(site: Site) -> None:
    browser = site.browser()
    limit = site.service.throttle.unknown_devices.attempts
    for _ in range(limit):
        assert browser.post("/login", data={"username": "minsu", "password": "x"}).status_code == 401
    answer = browser.post("/login", data={"username": "minsu", "password": "x"})
    assert answer.status_code == 429
    assert f"try again in {answer.headers['retry-after']} s" in answer.text


@pytest.mark.parametrize(
    ("goal", "location"),
    [
        ("/account?x=1", "/account?x=1"),
        ("/", "/"),
        ("//evil.example", "/account"),
        ("/\\evil.example", "/account"),
        ("/%09/evil.example", "/account"),
        ("https://evil.example/", "/account"),
        ("/a\r\nset-cookie: a=b", "/account"),
        ("/login", "/account"),
    ],
)
def test_after_signing_in_nobody_is_sent_to_another_site(site: Site, goal: str, location: str) -> None:
    site.add_user("minsu")
    answer = site.browser().post("/login", data={**LOGIN, "next": goal})
    assert answer.headers["location"] == location
    hidden = [
        each
        for each in Seen(site.browser().get("/login", params={"next": goal}).text).all("input")
        if each["name"] == "next"
    ]
    assert [each["value"] for each in hidden] == ([goal] if goal == location else [])


def test_whoever_is_signed_in_already_is_told_and_may_go_on_or_be_somebody_else(site: Site, minsu: TestClient) -> None:
    text = minsu.get("/login?next=/account?x=1").text
    assert "You are signed in as minsu." in text
    assert 'href="/account?x=1"' in text
    site.add_user("other")
    minsu.post("/login", data={**LOGIN, "username": "other"})
    assert "Signed in as other" in minsu.get("/account").text


def test_signing_out_ends_the_session_and_says_so(site: Site, minsu: TestClient) -> None:
    stolen = site.client(headers={"cookie": f"{COOKIE}={minsu.cookies[COOKIE]}"})
    answer = minsu.post("/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?signed_out")
    assert "You are signed out." in minsu.get(answer.headers["location"]).text
    assert stolen.get("/api/me").status_code == 401
    assert minsu.get("/account").headers["location"] == "/login?next=/account"


def test_a_sign_out_changes_more_cookies_than_a_sign_in(site: Site) -> None:
    """Else Chromium shows the page behind the sign-in again when somebody goes back (`signed_out`)."""
    site.add_user("minsu")
    browser = site.browser()
    came = browser.post("/login", data=LOGIN).headers.get_list("set-cookie")
    left = browser.post("/logout").headers.get_list("set-cookie")
    assert all("HttpOnly" in each for each in came + left)
    assert (len(came), len(left)) == (2, 3)
    assert [each.partition("=")[0] for each in left] == ["coatcheck_device_left", "coatcheck_device_left", COOKIE]
    assert "Max-Age=1" in left[0]
    assert "Max-Age=0" in left[1]


def test_sign_out_is_on_every_page_of_whoever_is_signed_in(minsu: TestClient) -> None:
    for path in ("/", "/account", "/login"):
        assert 'action="/logout"' in minsu.get(path).text


# Why a session is over.


def ended_by_limit(site: Site, user_id: str) -> str:
    site.call(site.service.coat.revoke_subject, user_id, reason="session_limit")
    return "You signed in on another device"


def ended_by_idleness(site: Site, user_id: str) -> str:
    site.clock.advance(1800)
    return "for a while"


def ended_by_age(site: Site, user_id: str) -> str:
    site.clock.advance(12 * 3600)
    return "longest time"


def ended_by_himself(site: Site, user_id: str) -> str:
    site.call(site.service.coat.revoke_subject, user_id, reason="ended_by_user")
    return "from another device"


def ended_by_a_new_password(site: Site, user_id: str) -> str:
    site.call(site.service.coat.revoke_subject, user_id, reason="password_changed")
    return "password of this account was changed"


def ended_by_an_administrator(site: Site, user_id: str) -> str:
    site.call(site.service.coat.revoke_subject, user_id, reason="stolen <b>laptop</b>")
    return "stolen &lt;b&gt;laptop&lt;/b&gt;"


@pytest.mark.parametrize(
    "end",
    [
        ended_by_limit,
        ended_by_idleness,
        ended_by_age,
        ended_by_himself,
        ended_by_a_new_password,
        ended_by_an_administrator,
    ],
)
def test_the_page_says_why_a_session_has_ended(site: Site, end: Callable[[Site, str], str]) -> None:
    user = site.add_user("minsu")
    browser = site.at_account("minsu")
    words = end(site, user.id)
    moved = browser.get("/account")
    assert (moved.status_code, moved.headers["location"]) == (303, "/login?next=/account")
    text = browser.get(moved.headers["location"]).text
    assert "You were signed out" in text
    assert words in text
    assert "<time datetime=" in text
    # Looking at it ends nothing and clears nothing; signing in works from here.
    assert browser.post("/login", data=LOGIN).status_code == 303


def test_a_form_that_is_sent_after_the_end_leads_to_the_reason(site: Site) -> None:
    user = site.add_user("minsu")
    browser = site.at_account("minsu")
    site.call(site.service.coat.revoke_subject, user.id, reason="ended_by_user")
    answer = browser.post("/account/password", data=CHANGE)
    assert (answer.status_code, answer.headers["location"]) == (303, "/login")
    assert "set-cookie" not in answer.headers
