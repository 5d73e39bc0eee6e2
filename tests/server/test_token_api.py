"""Tokens over HTTP: what a sign-in hands out, how it is exchanged, and what ends it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from starlette.testclient import TestClient

from coatcheck.server.api import RefreshBody
from coatcheck.server.routes import MAX_BODY
from tests.server.conftest import BROWSER, COOKIE, NEW_PASSWORD, PASSWORD, REFRESH, MakeSite, Site

LOGIN = {"username": "minsu", "password": PASSWORD}
BODY_LOGIN = {**LOGIN, "carrier": "body"}
JSON = {"content-type": "application/json"}
LIFETIME = 15 * 60
GRACE = 30
HTTPS = "https://id.example"
TOKEN_MEMBERS = {"access_token", "token_type", "expires_in", "refresh_token"}
COOKIE_CHALLENGE = 'Cookie realm="session"'
CHALLENGES = [COOKIE_CHALLENGE, 'Bearer realm="session"']
INVALID = ['Bearer error="invalid_token"']


@pytest.fixture
def minsu(b2c: Site) -> TestClient:
    """A program with a cookie jar that has signed in as `minsu`."""
    b2c.add_user("minsu")
    return b2c.signed_in("minsu")


def native(site: Site, name: str = "minsu") -> tuple[str, str]:
    """A client that is no browser signs in: its access token and its refresh token."""
    answer = site.client().post("/api/login", json={**BODY_LOGIN, "username": name})
    assert answer.status_code == 200, answer.text
    return answer.json()["access_token"], answer.json()["refresh_token"]


def body_refresh(site: Site, token: str, **headers: str) -> Any:
    return site.client().post("/api/refresh", json={"carrier": "body", "refresh_token": token}, headers=headers)


def cookie_refresh(site: Site, token: str) -> Any:
    return site.client(headers={"cookie": f"{REFRESH}={token}"}).post("/api/refresh")


def bearer(site: Site, token: str, path: str = "/api/me", *, method: str = "GET", **headers: str) -> Any:
    return site.client().request(method, path, headers={"authorization": f"Bearer {token}", **headers})


def refused(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


def set_cookies(answer: Any) -> dict[str, str]:
    """Every Set-Cookie by its name."""
    return {line.partition("=")[0]: line for line in answer.headers.get_list("set-cookie")}


def events(site: Site) -> list[Any]:
    found: list[Any] = [entry.envelope for entry in site.call(site.service.audit.read, after=0, limit=1000)]
    return found


# Signing in.


def test_a_sign_in_hands_out_an_access_token_and_a_refresh_cookie_beside_the_session(b2c: Site) -> None:
    b2c.add_user("minsu")
    answer = b2c.client().post("/api/login", json=LOGIN)
    body = answer.json()
    assert set(body) == {"message", "user", "session", "access_token", "token_type", "expires_in"}
    assert (body["token_type"], body["expires_in"]) == ("Bearer", LIFETIME)
    assert body["access_token"].count(".") == 2
    cookies = set_cookies(answer)
    assert set(cookies) == {COOKIE, REFRESH, "coatcheck_device"}
    parts = {part.strip() for part in cookies[REFRESH].split(";")[1:]}
    # 30 days: the absolute timeout of the session it belongs to.
    assert parts == {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={30 * 86400}"}
    assert answer.cookies[REFRESH] not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_over_https_the_refresh_cookie_has_a_name_no_other_host_and_no_script_can_set(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", public_url=HTTPS)
    site.add_user("minsu")
    cookies = set_cookies(site.client().post("/api/login", json=LOGIN))
    assert set(cookies) == {"__Host-Http-session", "__Host-Http-refresh", "__Host-Http-device"}
    parts = {part.strip() for part in cookies["__Host-Http-refresh"].split(";")[1:]}
    assert parts == {"HttpOnly", "SameSite=Strict", "Path=/", "Secure", f"Max-Age={30 * 86400}"}


def test_without_tokens_in_the_profile_an_answer_has_none_of_their_members(site: Site) -> None:
    site.add_user("minsu")
    answer = site.client().post("/api/login", json=LOGIN)
    assert not TOKEN_MEMBERS & set(answer.json())
    assert set(set_cookies(answer)) == {COOKIE, "coatcheck_device"}


@pytest.mark.parametrize("sent", [{}, {"json": {}}, {"json": {"carrier": "body", "refresh_token": "x"}}])
def test_without_tokens_in_the_profile_there_is_nothing_to_refresh(site: Site, sent: dict[str, Any]) -> None:
    assert refused(site.client().post("/api/refresh", **sent)) == (404, "not_found")


def test_a_client_that_is_no_browser_gets_both_tokens_and_no_cookie_at_all(b2c: Site) -> None:
    b2c.add_user("minsu")
    answer = b2c.client().post("/api/login", json=BODY_LOGIN)
    assert set(answer.json()) == {"message", "user", "session", *TOKEN_MEMBERS}
    assert "set-cookie" not in answer.headers
    assert bearer(b2c, answer.json()["access_token"]).status_code == 200


def test_a_body_sign_in_beside_an_old_cookie_sets_and_clears_none(b2c: Site, minsu: TestClient) -> None:
    assert "set-cookie" not in minsu.post("/api/login", json=BODY_LOGIN).headers
    wrong = minsu.post("/api/login", json={**BODY_LOGIN, "password": "wrong"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)


def test_a_body_sign_in_that_cannot_be_checked_at_the_end_sets_no_cookie(b2c: Site) -> None:
    user = b2c.add_user("minsu")
    b2c.accounts.off = frozenset({"get"})
    answer = b2c.client().post("/api/login", json=BODY_LOGIN)
    assert (answer.status_code, "set-cookie" in answer.headers) == (503, False)
    b2c.accounts.off = frozenset()
    assert b2c.call(b2c.service.coat.list_sessions, user.id).items == ()


@pytest.mark.parametrize("verb", ["create_family"])
def test_a_sign_in_whose_tokens_cannot_be_kept_lets_nobody_in(b2c: Site, verb: str) -> None:
    user = b2c.add_user("minsu")
    b2c.store.off = frozenset({verb})
    client = b2c.client()
    assert refused(client.post("/api/login", json=LOGIN)) == (503, "store_unavailable")
    assert not {COOKIE, REFRESH} & set(client.cookies)
    b2c.store.off = frozenset()
    assert b2c.call(b2c.service.coat.list_sessions, user.id).items == ()


@pytest.mark.parametrize("path", ["/api/login", "/api/refresh"])
@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://127.0.0.1:8000"}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}],
)
def test_a_page_never_gets_a_refresh_token_where_scripts_can_read_it(
    b2c: Site, path: str, headers: dict[str, str]
) -> None:
    b2c.add_user("minsu")
    _, token = native(b2c)
    body = BODY_LOGIN if path == "/api/login" else {"carrier": "body", "refresh_token": token}
    answer = b2c.client().post(path, json=body, headers=headers)
    assert refused(answer) == (400, "bad_request")
    assert "set-cookie" not in answer.headers


def test_a_body_carrier_needs_a_profile_with_tokens(site: Site) -> None:
    site.add_user("minsu")
    answer = site.client().post("/api/login", json=BODY_LOGIN)
    assert refused(answer) == (400, "bad_request")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("carrier", ["header", "", None, 1, ["body"]])
def test_a_carrier_that_is_none_is_refused(b2c: Site, carrier: object) -> None:
    b2c.add_user("minsu")
    assert refused(b2c.client().post("/api/login", json={**LOGIN, "carrier": carrier})) == (400, "bad_request")


# Pages.


def test_the_sign_in_page_sets_the_refresh_cookie_and_signing_out_takes_it_away(b2c: Site) -> None:
    b2c.add_user("minsu")
    browser = b2c.browser()
    done = browser.post("/login", data={"username": "minsu", "password": PASSWORD})
    assert done.status_code == 303
    assert {COOKIE, REFRESH} <= set(set_cookies(done))
    token = browser.cookies[REFRESH]
    gone = browser.post("/logout")
    assert gone.status_code == 303
    for name in (COOKIE, REFRESH):
        assert "Max-Age=0" in set_cookies(gone)[name]
    assert refused(cookie_refresh(b2c, token)) == (401, "session_ended")


def test_the_set_up_page_sets_the_refresh_cookie_too(b2c: Site) -> None:
    browser = b2c.browser()
    form = {"username": "haneul", "password": PASSWORD, "again": PASSWORD}
    done = browser.post(b2c.set_up_path(), data=form)
    assert done.status_code == 303, done.text
    assert {COOKIE, REFRESH} <= set(set_cookies(done))
    assert browser.post("/api/refresh").status_code == 200


def test_pages_of_a_profile_without_tokens_set_no_refresh_cookie(site: Site) -> None:
    site.add_user("minsu")
    done = site.browser().post("/login", data={"username": "minsu", "password": PASSWORD})
    assert not any("refresh" in name for name in set_cookies(done))


def test_the_refresh_cookie_alone_opens_no_page(b2c: Site, minsu: TestClient) -> None:
    browser = b2c.client(headers={**BROWSER, "cookie": f"{REFRESH}={minsu.cookies[REFRESH]}"})
    assert browser.get("/account").status_code == 303


# Refreshing by cookie.


@pytest.mark.parametrize("sent", [{}, {"json": {}}, {"json": {"carrier": "cookie"}}])
def test_a_refresh_by_cookie_needs_no_body(b2c: Site, minsu: TestClient, sent: dict[str, Any]) -> None:
    b2c.clock.advance(GRACE + 1)
    before = minsu.cookies[REFRESH]
    answer = minsu.post("/api/refresh", **sent)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"access_token", "token_type", "expires_in"}
    assert answer.json()["expires_in"] == LIFETIME
    assert set(set_cookies(answer)) == {REFRESH}
    assert minsu.cookies[REFRESH] != before
    assert answer.headers["cache-control"] == "no-store"
    # What is left of 30 days.
    assert f"Max-Age={30 * 86400 - GRACE - 1};" in f"{set_cookies(answer)[REFRESH]};"


def test_a_young_refresh_cookie_is_kept_and_not_sent_again(b2c: Site, minsu: TestClient) -> None:
    b2c.clock.advance(GRACE - 0.000001)
    answer = minsu.post("/api/refresh")
    assert answer.status_code == 200
    assert "set-cookie" not in answer.headers
    b2c.clock.advance(0.000001)
    assert REFRESH in set_cookies(minsu.post("/api/refresh"))


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "text/json"])
def test_other_types_than_json_are_refused_with_and_without_a_body(minsu: TestClient, kind: str) -> None:
    for content in (b"{}", b""):
        answer = minsu.post("/api/refresh", content=content, headers={"content-type": kind})
        assert refused(answer) == (415, "unsupported_media_type")


def test_a_body_without_a_type_is_refused(minsu: TestClient) -> None:
    assert refused(minsu.post("/api/refresh", content=b"{}")) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff",
        b'{"carrier":"cookie","carrier":"cookie"}',
        b'{"refresh_token":"a","carrier":"body","refresh_token":"b"}',
        b'{"audience":7}',
        b'{"resource":"https://api.example"}',
        b'{"refresh_token":7,"carrier":"body"}',
        b'{"refresh_token":"\\ud800","carrier":"body"}',
        b"[" * 5000,
    ],
)
def test_a_hostile_body_is_refused_and_exchanges_nothing(b2c: Site, minsu: TestClient, body: bytes) -> None:
    b2c.clock.advance(GRACE + 1)
    answer = minsu.post("/api/refresh", content=body, headers=JSON)
    assert refused(answer) == (400, "bad_request")
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_is_bounded_with_and_without_a_type(minsu: TestClient, chunked: bool) -> None:
    whole = b"{}" + b" " * MAX_BODY

    def pieces() -> Iterator[bytes]:
        yield whole[:100]
        yield whole[100:]

    for headers in (JSON, {}):
        answer = minsu.post("/api/refresh", content=pieces() if chunked else whole, headers=headers)
        assert refused(answer) == (413, "body_too_large")


def test_get_exchanges_nothing(minsu: TestClient) -> None:
    answer = minsu.get("/api/refresh")
    assert refused(answer) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "headers", [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "same-site"}]
)
def test_another_site_cannot_make_a_browser_exchange_its_token(
    b2c: Site, minsu: TestClient, headers: dict[str, str]
) -> None:
    b2c.clock.advance(GRACE + 1)
    answer = minsu.post("/api/refresh", headers=headers)
    assert refused(answer) == (403, "cross_origin")
    assert "set-cookie" not in answer.headers


# Refreshing by body.


def test_a_client_that_is_no_browser_gets_the_next_token_in_the_body(b2c: Site) -> None:
    b2c.add_user("minsu")
    _, first = native(b2c)
    b2c.clock.advance(GRACE + 1)
    answer = body_refresh(b2c, first)
    assert set(answer.json()) == TOKEN_MEMBERS
    assert "set-cookie" not in answer.headers
    second = answer.json()["refresh_token"]
    assert second != first
    # A lost answer: the same token again within the grace gives the same successor.
    assert body_refresh(b2c, first).json()["refresh_token"] == second


@pytest.mark.parametrize(
    "body",
    [
        {"carrier": "body"},
        {"carrier": "body", "refresh_token": None},
        {"refresh_token": "x"},
        {"carrier": "cookie", "refresh_token": "x"},
    ],
)
def test_a_token_and_its_carrier_come_together_or_not_at_all(minsu: TestClient, body: dict[str, Any]) -> None:
    answer = minsu.post("/api/refresh", json=body)
    assert refused(answer) == (400, "bad_request")


def test_a_token_in_the_body_counts_and_a_cookie_beside_it_does_not(b2c: Site, minsu: TestClient) -> None:
    b2c.add_user("haneul")
    access, token = native(b2c, "haneul")
    answer = minsu.post("/api/refresh", json={"carrier": "body", "refresh_token": token})
    assert bearer(b2c, answer.json()["access_token"]).json()["user"]["name"] == "haneul"
    assert "set-cookie" not in answer.headers
    assert bearer(b2c, access).status_code == 200


# Refusals.


def test_every_refusal_of_a_refresh_token_reads_alike_and_only_the_log_knows_why(
    b2c: Site, caplog: pytest.LogCaptureFixture
) -> None:
    b2c.add_user("minsu")
    _, genuine = native(b2c)
    forged = genuine[:-1] + ("A" if genuine[-1] != "A" else "B")
    with caplog.at_level(logging.DEBUG):
        answers = [b2c.client().post("/api/refresh")]
        answers += [cookie_refresh(b2c, each) for each in (forged, "x", "x" * 5000, genuine + "A", genuine[::-1])]
        answers += [body_refresh(b2c, each) for each in (forged, "", "é" * 44)]
        twice = b2c.client(headers={"cookie": f"{REFRESH}={genuine}; {REFRESH}={genuine}"})
        answers.append(twice.post("/api/refresh"))
    assert {refused(answer) for answer in answers} == {(401, "refresh_invalid")}
    assert len({answer.content for answer in answers}) == 1
    assert set(answers[0].json()) == {"type", "title", "status", "code"}
    assert not any("set-cookie" in answer.headers for answer in answers)
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "no refresh cookie came" in told
    assert "unknown" in told
    assert genuine not in told
    assert body_refresh(b2c, genuine).status_code == 200, "an invented token ends no family"


def test_a_consumed_token_that_comes_again_ends_its_session_and_no_other(b2c: Site) -> None:
    user = b2c.add_user("minsu")
    b2c.add_user("haneul", role="admin")
    stolen_access, stolen = native(b2c)
    other_access, other = native(b2c)
    b2c.clock.advance(GRACE + 1)
    newest = body_refresh(b2c, stolen).json()
    b2c.clock.advance(GRACE + 1)
    again = body_refresh(b2c, stolen)
    assert refused(again) == (401, "refresh_reused")
    assert set(again.json()) == {"type", "title", "status", "code"}
    # The thief's and the owner's tokens are all over, the access tokens too.
    ended = body_refresh(b2c, newest["refresh_token"])
    assert (*refused(ended), ended.json()["reason"]) == (401, "session_ended", "refresh_reused")
    for token in (stolen_access, newest["access_token"]):
        assert refused(bearer(b2c, token)) == (401, "invalid_token")
    assert bearer(b2c, other_access).status_code == 200
    assert body_refresh(b2c, other).status_code == 200
    # The administrator sees what happened.
    admin = b2c.signed_in("haneul")
    listed = admin.get("/api/admin/events").json()["events"]
    assert ("refresh.reused", user.id) in {(each["type"], each["subject"]) for each in listed}
    (end,) = [each for each in listed if each["type"] == "session.ended" and each["subject"] == user.id]
    assert end["data"]["reason"] == "refresh_reused"
    assert end["sid"] is not None


def test_the_last_instant_of_the_grace_forgives_and_the_next_does_not(b2c: Site) -> None:
    b2c.add_user("minsu")
    _, first = native(b2c)
    b2c.clock.advance(GRACE)
    assert body_refresh(b2c, first).json()["refresh_token"] != first
    b2c.clock.advance(GRACE - 0.000001)
    assert body_refresh(b2c, first).status_code == 200
    b2c.clock.advance(0.000001)
    assert refused(body_refresh(b2c, first)) == (401, "refresh_reused")


@pytest.mark.parametrize("carrier", ["cookie", "body"])
def test_a_disabled_user_is_out_at_the_next_refresh_with_everything_he_has(b2c: Site, carrier: str) -> None:
    user = b2c.add_user("minsu")
    access, token = native(b2c)
    b2c.clock.advance(GRACE + 1)
    b2c.call(b2c.service.accounts.disable, user.id)
    answer = cookie_refresh(b2c, token) if carrier == "cookie" else body_refresh(b2c, token)
    assert (*refused(answer), answer.json()["reason"]) == (401, "session_ended", "account_disabled")
    assert "set-cookie" not in answer.headers
    assert not TOKEN_MEMBERS & set(answer.json())
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    b2c.call(b2c.service.accounts.enable, user.id)
    assert refused(body_refresh(b2c, token)) == (401, "session_ended"), "what has ended does not come back"


def test_a_disabled_user_gets_no_token_when_the_revoke_that_goes_with_it_fails(b2c: Site) -> None:
    user = b2c.add_user("minsu")
    _, token = native(b2c)
    b2c.clock.advance(GRACE + 1)
    b2c.call(b2c.service.accounts.disable, user.id)
    b2c.store.off = frozenset({"revoke"})
    answer = cookie_refresh(b2c, token)
    assert refused(answer) == (503, "store_unavailable")
    assert "set-cookie" not in answer.headers


def test_a_deleted_user_is_out_at_the_next_refresh(b2c: Site) -> None:
    user = b2c.add_user("minsu")
    access, token = native(b2c)
    b2c.call(b2c.service.database.fetch, "delete from {namespace}_users where id = ? returning id", user.id)
    answer = body_refresh(b2c, token)
    assert refused(answer) == (401, "session_ended")
    assert refused(bearer(b2c, access)) == (401, "invalid_token")


def test_a_changed_password_ends_the_tokens_of_the_other_sessions(b2c: Site, minsu: TestClient) -> None:
    access, token = native(b2c)
    changed = minsu.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD})
    assert set(changed.json()) == {"ended", "access_token", "token_type", "expires_in"}
    assert changed.json()["ended"] == 1
    assert bearer(b2c, changed.json()["access_token"]).status_code == 200
    answer = body_refresh(b2c, token)
    assert (*refused(answer), answer.json()["reason"]) == (401, "session_ended", "password_changed")
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    assert minsu.post("/api/refresh").status_code == 200


def test_a_changed_password_leaves_every_copy_behind_that_was_made_before(b2c: Site) -> None:
    b2c.add_user("minsu")
    owner = b2c.client()
    access = owner.post("/api/login", json=LOGIN).json()["access_token"]
    copies = dict(owner.cookies)
    b2c.clock.advance(GRACE + 1)
    changed = owner.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD})
    assert changed.status_code == 200
    assert {COOKIE, REFRESH} <= set(set_cookies(changed))
    assert refused(cookie_refresh(b2c, copies[REFRESH]))[0] == 401
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    assert b2c.client(headers={"cookie": f"{COOKIE}={copies[COOKIE]}"}).get("/api/me").status_code == 401
    # The owner's browser goes on.
    assert owner.get("/api/me").json()["user"]["name"] == "minsu"
    refreshed = owner.post("/api/refresh").json()["access_token"]
    assert bearer(b2c, refreshed).status_code == 200
    assert len(owner.get("/api/sessions").json()["sessions"]) == 1


def test_a_password_changed_with_an_access_token_leaves_no_copy_of_its_session_alive(b2c: Site) -> None:
    b2c.add_user("minsu")
    browser = b2c.client()
    access = browser.post("/api/login", json=LOGIN).json()["access_token"]
    copies = dict(browser.cookies)
    other_access, _ = native(b2c)
    # As the browser client sends it: the bearer counts, the cookies ride along.
    answer = browser.post(
        "/api/password",
        json={"current": PASSWORD, "new": NEW_PASSWORD},
        headers={"authorization": f"Bearer {access}"},
    )
    assert (answer.status_code, answer.json()["ended"]) == (200, 1)
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    assert refused(bearer(b2c, other_access)) == (401, "invalid_token")
    assert refused(cookie_refresh(b2c, copies[REFRESH]))[0] == 401
    assert b2c.client(headers={"cookie": f"{COOKIE}={copies[COOKIE]}"}).get("/api/me").status_code == 401
    # The browser has new ones.
    assert browser.get("/api/me").status_code == 200
    assert browser.post("/api/refresh").status_code == 200


def test_a_client_that_is_no_browser_gets_new_tokens_with_its_new_password(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, token = native(b2c)
    answer = b2c.client().post(
        "/api/password",
        json={"current": PASSWORD, "new": NEW_PASSWORD, "carrier": "body"},
        headers={"authorization": f"Bearer {access}"},
    )
    assert answer.status_code == 200
    assert set_cookies(answer) == {}
    assert body_refresh(b2c, token).status_code == 401
    assert body_refresh(b2c, answer.json()["refresh_token"]).status_code == 200
    assert bearer(b2c, answer.json()["access_token"]).status_code == 200


@pytest.mark.parametrize("how", ["disabled", "ended", "signed out"])
def test_a_new_password_brings_no_ended_session_back(
    b2c: Site, minsu: TestClient, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = minsu.get("/api/me").json()
    hashing = b2c.service.hasher.hash

    async def meanwhile(*args: Any, **more: Any) -> Any:
        if how == "disabled":
            await b2c.service.accounts.disable(session["user"]["id"])
            await b2c.service.coat.revoke_subject(session["user"]["id"], reason="account_disabled")
        else:
            await b2c.service.coat.revoke_session(session["session"]["sid"], reason="logout")
        return await hashing(*args, **more)

    monkeypatch.setattr(b2c.service.hasher, "hash", meanwhile)
    answer = minsu.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD})
    assert refused(answer) == (409, "session_gone")
    assert COOKIE not in set_cookies(answer)
    assert minsu.get("/api/me").status_code == 401


def test_an_access_token_can_be_asked_for_another_service(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", audiences=("orders",))
    site.add_user("minsu")
    client = site.client()
    signed_in = client.post("/api/login", json={**LOGIN, "audience": "orders"})
    # It is for that service, and not for this one.
    assert refused(bearer(site, signed_in.json()["access_token"])) == (401, "invalid_token")
    refreshed = client.post("/api/refresh", json={"audience": "orders"})
    assert refused(bearer(site, refreshed.json()["access_token"])) == (401, "invalid_token")
    assert bearer(site, client.post("/api/refresh").json()["access_token"]).status_code == 200


@pytest.mark.parametrize("profile", ["admin", "b2c"])
def test_an_audience_nobody_configured_signs_nobody_in(make_site: MakeSite, profile: str) -> None:
    site = make_site(profile=profile)
    site.add_user("minsu")
    answer = site.client().post("/api/login", json={**LOGIN, "audience": "orders"})
    assert answer.status_code == 400
    assert set_cookies(answer) == {}


def test_a_client_that_is_no_browser_signs_out_with_its_refresh_token(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, token = native(b2c)
    assert b2c.client().post("/api/logout", json={"refresh_token": token}).status_code == 200
    assert refused(body_refresh(b2c, token)) == (401, "session_ended")
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    assert b2c.client().post("/api/logout", json={"refresh_token": "x" * 88}).status_code == 200


@pytest.mark.parametrize("by", ["self", "administrator", "everybody", "operator", "limit"])
def test_an_ended_session_refreshes_no_more_and_its_access_token_is_refused(b2c: Site, by: str) -> None:
    user = b2c.add_user("minsu")
    b2c.add_user("haneul", role="admin")
    access, token = native(b2c)
    sid = bearer(b2c, access).json()["session"]["sid"]
    reason = "because"
    if by == "self":
        reason = "logout"
        assert bearer(b2c, access, "/api/logout", method="POST").status_code == 200
    elif by == "operator":
        b2c.call(b2c.service.coat.revoke_session, sid, reason=reason)
    elif by == "limit":
        reason = "session_limit"
        b2c.clock.advance(1)
        for _ in range(b2c.service.coat.settings.admission.maximum):
            session = b2c.service.coat.session(None)
            b2c.call(session.login, user.id)
    else:
        chosen = {"sid": sid} if by == "administrator" else {"all": True}
        b2c.signed_in("haneul").post("/api/admin/revoke", json={"reason": reason, **chosen})
    answer = body_refresh(b2c, token)
    assert refused(answer) == (401, "session_ended")
    assert answer.json()["reason"] == reason
    refusal = bearer(b2c, access)
    assert refused(refusal) == (401, "invalid_token")
    assert refusal.headers.get_list("www-authenticate") == INVALID


def test_a_store_that_is_away_refuses_nothing_for_good(b2c: Site, minsu: TestClient) -> None:
    access, _ = native(b2c)
    b2c.store.off = None
    for answer in (minsu.post("/api/refresh"), bearer(b2c, access)):
        assert refused(answer) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "3"
        assert "set-cookie" not in answer.headers
    b2c.store.off = frozenset()
    assert minsu.post("/api/refresh").status_code == 200
    assert bearer(b2c, access).status_code == 200


# Access tokens.


def test_an_access_token_is_a_credential_of_its_own(b2c: Site) -> None:
    user = b2c.add_user("minsu")
    access, _ = native(b2c)
    answer = bearer(b2c, access)
    assert answer.json()["user"] == {"id": user.id, "name": "minsu", "role": "user"}
    assert {"Cookie", "Authorization"} <= {
        each.strip() for each in ",".join(answer.headers.get_list("vary")).split(",")
    }
    (listed,) = bearer(b2c, access, "/api/sessions").json()["sessions"]
    assert listed["current"]
    assert listed["sid"] == answer.json()["session"]["sid"]
    assert bearer(b2c, access, "/api/logout", method="POST").status_code == 200
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    # Idempotent: nobody is signed in by a token that is over, and that is what was asked for.
    assert bearer(b2c, access, "/api/logout", method="POST").status_code == 200


def test_an_access_token_is_good_until_its_end_and_not_at_it(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, _ = native(b2c)
    b2c.clock.advance(LIFETIME - 0.000001)
    assert bearer(b2c, access).status_code == 200
    b2c.clock.advance(0.000001)
    assert refused(bearer(b2c, access)) == (401, "invalid_token")


def test_beside_a_bearer_the_cookie_is_ignored_even_if_the_bearer_is_bad(b2c: Site, minsu: TestClient) -> None:
    b2c.add_user("haneul")
    access, _ = native(b2c, "haneul")
    good = minsu.get("/api/me", headers={"authorization": f"Bearer {access}"})
    assert good.json()["user"]["name"] == "haneul"
    for value in (
        "Bearer nonsense",
        "Bearer",
        "Bearer  ",
        "Basic bWluc3U6eA==",
        f"Bearer {access} x",
        f"DPoP {access}",
    ):
        bad = minsu.get("/api/me", headers={"authorization": value})
        assert bad.status_code == 401, value
        assert bad.json()["code"] in ("invalid_token", "login_required")
        assert "set-cookie" not in bad.headers
    twice = minsu.get("/api/me", headers=[("authorization", f"Bearer {access}"), ("authorization", "Bearer x")])
    assert refused(twice) == (401, "invalid_token")
    assert minsu.get("/api/me").json()["user"]["name"] == "minsu"


def test_challenges_name_what_would_help(b2c: Site) -> None:
    nobody = b2c.client().get("/api/me")
    assert refused(nobody) == (401, "login_required")
    assert nobody.headers.get_list("www-authenticate") == CHALLENGES
    bad = bearer(b2c, "nonsense")
    assert refused(bad) == (401, "invalid_token")
    assert bad.headers.get_list("www-authenticate") == INVALID


def test_where_tokens_are_off_no_challenge_names_them(site: Site) -> None:
    answer = site.client().get("/api/me")
    assert answer.headers.get_list("www-authenticate") == [COOKIE_CHALLENGE]


def test_a_refresh_token_is_no_access_token_and_no_session_and_the_other_way_round(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, token = native(b2c)
    assert refused(bearer(b2c, token)) == (401, "invalid_token")
    assert refused(body_refresh(b2c, access)) == (401, "refresh_invalid")
    cookie = b2c.client(headers={"cookie": f"{COOKIE}={token}"})
    assert refused(cookie.get("/api/me")) == (401, "login_required")


def test_one_denied_token_is_refused_and_its_session_goes_on(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, token = native(b2c)
    b2c.call(b2c.service.coat.deny_token, access)
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    answer = body_refresh(b2c, token)
    assert bearer(b2c, answer.json()["access_token"]).status_code == 200


def test_an_access_token_of_a_user_administers_nothing(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, _ = native(b2c)
    assert refused(bearer(b2c, access, "/api/admin/sessions")) == (403, "forbidden")


def test_all_own_sessions_end_by_an_access_token(b2c: Site) -> None:
    b2c.add_user("minsu")
    access, token = native(b2c)
    other, _ = native(b2c)
    assert bearer(b2c, access, "/api/sessions?scope=all", method="DELETE").json() == {"ended": 2}
    for each in (access, other):
        assert refused(bearer(b2c, each)) == (401, "invalid_token")
    assert refused(body_refresh(b2c, token)) == (401, "session_ended")


def test_signing_out_by_cookie_ends_the_tokens_and_clears_both_cookies(b2c: Site) -> None:
    b2c.add_user("minsu")
    client = b2c.client()
    access = client.post("/api/login", json=LOGIN).json()["access_token"]
    token = client.cookies[REFRESH]
    cookies = set_cookies(client.post("/api/logout"))
    assert all("Max-Age=0" in cookies[name] for name in (COOKIE, REFRESH))
    assert refused(bearer(b2c, access)) == (401, "invalid_token")
    assert refused(cookie_refresh(b2c, token)) == (401, "session_ended")


def test_a_browser_that_has_only_its_refresh_cookie_left_can_sign_out_with_it(b2c: Site, minsu: TestClient) -> None:
    token = minsu.cookies[REFRESH]
    left = b2c.client(headers={"cookie": f"{REFRESH}={token}"})
    assert "Max-Age=0" in set_cookies(left.post("/api/logout"))[REFRESH]
    assert refused(minsu.get("/api/me")) == (401, "session_ended")


# What is never told.


def test_no_token_is_in_any_log_line_or_event(b2c: Site, caplog: pytest.LogCaptureFixture) -> None:
    b2c.add_user("minsu")
    b2c.add_user("haneul", role="admin")
    with caplog.at_level(logging.DEBUG):
        secrets: set[str] = set()
        access, token = native(b2c)
        secrets |= {access, token}
        browser = b2c.client()
        secrets.add(browser.post("/api/login", json=LOGIN).json()["access_token"])
        secrets |= {browser.cookies[REFRESH], browser.cookies[COOKIE]}
        b2c.clock.advance(GRACE + 1)
        newer = body_refresh(b2c, token).json()
        secrets |= {newer["access_token"], newer["refresh_token"]}
        secrets.add(browser.post("/api/refresh").json()["access_token"])
        secrets.add(browser.cookies[REFRESH])
        b2c.clock.advance(GRACE + 1)
        assert refused(body_refresh(b2c, token)) == (401, "refresh_reused")
        assert refused(body_refresh(b2c, newer["refresh_token"])) == (401, "session_ended")
        # Somebody mistakes one place for another.
        bearer(b2c, token)
        bearer(b2c, access)
        body_refresh(b2c, access)
        b2c.client(headers={"cookie": f"{COOKIE}={token}"}).get("/api/me")
        b2c.client().post("/api/refresh", json={"carrier": "cookie", "refresh_token": token})
        b2c.client().post("/api/refresh", content=f'{{"{token}":1}}'.encode(), headers=JSON)
        b2c.client().get(f"/revocations?after={token}", headers={"authorization": f"Bearer {token}"})
        browser.post("/api/logout")
        assert b2c.signed_in("haneul").get("/api/admin/events").status_code == 200
    told = "\n".join(
        f"{record.getMessage()} {record.__dict__!r}" for record in caplog.records if record.name != "httpx2"
    )
    told += json.dumps(events(b2c))
    # The middle of a token is enough to recognize it; the beginning of a JWT is the same in all.
    parts = {part for secret in secrets for part in secret.split(".")[-1:]}
    found = [part for part in parts if part[8:40] in told]
    assert not found


def test_bodies_with_tokens_have_a_redacted_representation() -> None:
    body = msgspec.convert({"carrier": "body", "refresh_token": "canary"}, RefreshBody)
    assert "canary" not in repr(body)


# Settings.


def test_lifetimes_come_from_the_settings(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", access_lifetime=timedelta(minutes=5), reuse_grace=timedelta(0))
    site.add_user("minsu")
    answer = site.client().post("/api/login", json=BODY_LOGIN)
    assert answer.json()["expires_in"] == 300
    token = answer.json()["refresh_token"]
    assert body_refresh(site, token).json()["refresh_token"] != token
    assert refused(body_refresh(site, token)) == (401, "refresh_reused"), "without a grace nothing is forgiven"
