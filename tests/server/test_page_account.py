"""The page of one's own account: sessions and the password."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.server.conftest import COOKIE, NEW_PASSWORD, PASSWORD, Site
from tests.server.page_parts import rows_of, sids_of

LOGIN = {"username": "minsu", "password": PASSWORD}
CHANGE = {"current": PASSWORD, "new": NEW_PASSWORD, "again": NEW_PASSWORD}
SAFARI = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) Version/18.0 Safari/604.1"


@pytest.fixture
def minsu(site: Site) -> TestClient:
    """A browser signed in as `minsu`."""
    site.add_user("minsu")
    return site.at_account("minsu")


# The account.


def test_the_account_shows_where_when_and_what_and_which_one_is_this(site: Site, minsu: TestClient) -> None:
    site.clock.advance(60)
    phone = site.client(peer="203.0.113.7", headers={"user-agent": SAFARI})
    phone.post("/login", data=LOGIN)
    text = minsu.get("/account").text
    first, second = rows_of(text)
    for words in ("Chrome on Linux", "This one", "127.0.0.1", "15 Jan 2027, 08:00 UTC", "2027-01-15T08:00:00Z"):
        assert words in first
    for words in ("Safari on iPhone", "203.0.113.7", "2027-01-15T08:01:00Z"):
        assert words in second
    assert "This one" not in second
    for client in (minsu, phone):
        assert client.cookies[COOKIE] not in text


def test_a_hostile_user_agent_puts_nothing_on_the_page(site: Site, minsu: TestClient) -> None:
    other = site.client(headers={"user-agent": "<script>alert(1)</script>" + "x" * 3000})
    other.post("/login", data=LOGIN)
    text = minsu.get("/account").text
    assert "Unknown device" in text
    assert "alert(1)" not in text


def test_ending_one_session_signs_that_browser_out_and_is_said_once(site: Site, minsu: TestClient) -> None:
    other = site.at_account("minsu")
    answer = minsu.post("/account/sessions/end", data={"sid": sids_of(minsu.get("/account").text)[1]})
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")
    assert "The session was ended." in minsu.get("/account").text
    assert "The session was ended." not in minsu.get("/account").text
    assert other.get("/account").status_code == 303
    assert "from another device" in other.get("/login").text


def test_ending_this_session_signs_out(minsu: TestClient) -> None:
    answer = minsu.post("/account/sessions/end", data={"sid": sids_of(minsu.get("/account").text)[0]})
    assert answer.headers["location"] == "/login?signed_out"
    assert COOKIE not in minsu.cookies


def test_ending_all_others_keeps_this_one(site: Site, minsu: TestClient) -> None:
    others = [site.at_account("minsu") for _ in range(2)]
    assert minsu.post("/account/sessions/end-others", data={"x": ""}).status_code == 303
    text = minsu.get("/account").text
    assert "2 sessions were ended." in text
    assert len(rows_of(text)) == 1
    assert "end-others" not in text
    assert [each.get("/account").status_code for each in others] == [303, 303]


def test_a_foreign_an_invented_and_an_ended_session_get_the_same_answer(site: Site, minsu: TestClient) -> None:
    site.add_user("other")
    other = site.at_account("other")
    foreign = sids_of(other.get("/account").text)[0]
    answers = [minsu.post("/account/sessions/end", data={"sid": sid}) for sid in (foreign, "x" * len(foreign), "")]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1
    assert "had ended already" in answers[0].text
    assert other.get("/account").status_code == 200


def test_a_new_password_is_confirmed_and_ends_the_others(site: Site, minsu: TestClient) -> None:
    other, before = site.at_account("minsu"), minsu.cookies[COOKIE]
    assert minsu.post("/account/password", data=CHANGE).status_code == 303
    assert "The password was changed." in minsu.get("/account").text
    assert minsu.cookies[COOKIE] != before
    assert other.get("/account").status_code == 303
    assert site.browser().post("/login", data={**LOGIN, "password": NEW_PASSWORD}).status_code == 303


@pytest.mark.parametrize(
    ("typed", "status", "words"),
    [
        ({"current": "wrong"}, 401, "current password is not right"),
        ({"again": "something else entirely"}, 422, "not the same"),
        ({"new": "short", "again": "short"}, 422, "at least 15 characters"),
        ({"new": "passwordpassword1", "again": "passwordpassword1"}, 422, "first that are guessed"),
        ({"new": "", "again": ""}, 422, "at least 15 characters"),
    ],
)
def test_a_refused_password_is_explained_and_changes_nothing(
    site: Site, minsu: TestClient, typed: dict[str, str], status: int, words: str
) -> None:
    answer = minsu.post("/account/password", data={**CHANGE, **typed})
    assert answer.status_code == status
    assert words in answer.text
    assert NEW_PASSWORD not in answer.text
    assert site.browser().post("/login", data=LOGIN).status_code == 303


def test_guessing_the_present_password_has_to_wait_too(minsu: TestClient, site: Site) -> None:
    limit = site.service.throttle.unknown_devices.attempts
    answers = [minsu.post("/account/password", data={**CHANGE, "current": f"guess {n}"}) for n in range(limit + 1)]
    assert answers[-1].status_code == 429
    assert "retry-after" in answers[-1].headers
    assert "Too many attempts" in answers[-1].text


@pytest.mark.parametrize(
    "path", ["/account", "/account/sessions/end", "/account/sessions/end-others", "/account/password"]
)
def test_the_account_is_for_whoever_is_signed_in(site: Site, path: str) -> None:
    answer = site.browser().request("GET" if path == "/account" else "POST", path, data={"a": ""})
    assert answer.status_code == 303
    assert answer.headers["location"].startswith("/login")
