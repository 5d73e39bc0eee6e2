"""Each call of the JSON API: what it answers, whom it refuses, and what it never tells."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from coatcheck.server.api import ROUTES
from tests.server.conftest import CHROME, COOKIE, NEW_PASSWORD, PASSWORD, MakeSite, Site

LOGIN = {"username": "minsu", "password": PASSWORD}
ADMIN = "haneul"
ADMIN_CALLS = [(row.method, row.path) for row in ROUTES if row.path.startswith("/api/admin/")]
SIGNED_IN_CALLS = [(row.method, row.path.replace("{sid}", "s")) for row in ROUTES if row.signed_in]
BODIES = {
    "/api/password": {"current": "a", "new": "b"},
    "/api/admin/revoke": {"reason": "x", "all": True},
    "/api/step-up": {"password": "a"},
}


@pytest.fixture
def minsu(site: Site) -> TestClient:
    """A program signed in as `minsu`, who is a user."""
    site.add_user("minsu")
    return site.signed_in("minsu")


@pytest.fixture
def admin(site: Site) -> TestClient:
    """A program signed in as `haneul`, who is an administrator."""
    site.add_user(ADMIN, role="admin")
    return site.signed_in(ADMIN)


# Signing in.


def test_login_answers_with_user_session_and_cookie(site: Site) -> None:
    user = site.add_user("minsu")
    answer = site.client().post("/api/login", json=LOGIN)
    body = answer.json()
    assert answer.status_code == 200
    assert body["message"] == "Login successful"
    assert body["user"] == {"id": user.id, "name": "minsu", "role": "user"}
    assert set(body["session"]) == {"sid", "expires_at"}
    # The idle timeout ends it first.
    assert body["session"]["expires_at"] == site.clock.now_us() / 1e6 + 1800
    cookie = next(each for each in answer.headers.get_list("set-cookie") if each.startswith(COOKIE))
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert answer.cookies[COOKIE] not in answer.text


def test_login_over_https_sets_a_host_cookie_that_no_script_can_set(make_site: MakeSite) -> None:
    site = make_site(public_url="https://id.example")
    site.add_user("minsu")
    answer = site.client().post("/api/login", json=LOGIN)
    names = [each.split("=")[0] for each in answer.headers.get_list("set-cookie")]
    assert sorted(names) == ["__Host-Http-device", "__Host-Http-session"]
    assert all("Secure" in each for each in answer.headers.get_list("set-cookie"))
    assert answer.headers["strict-transport-security"].startswith("max-age=31536000")


def test_a_name_is_found_whatever_its_spelling(site: Site) -> None:
    site.add_user("MinSu")
    answer = site.client().post("/api/login", json={"username": " minsu ", "password": PASSWORD})
    assert answer.status_code == 200
    assert answer.json()["user"]["name"] == "MinSu"


def test_unknown_wrong_and_disabled_get_the_same_bytes(site: Site) -> None:
    site.add_user("minsu")
    gone = site.add_user("gone")
    site.call(site.service.accounts.disable, gone.id)
    attempts = [
        {"username": "nobody", "password": PASSWORD},
        {"username": "minsu", "password": "wrong"},
        {"username": "gone", "password": PASSWORD},
        {"username": "two words", "password": PASSWORD},
        {"username": "", "password": ""},
        {"username": "minsu", "password": "x" * 2000},
    ]
    answers = [site.client().post("/api/login", json=each) for each in attempts]
    assert {answer.status_code for answer in answers} == {401}
    assert len({answer.content for answer in answers}) == 1
    assert len({str(sorted(answer.headers.multi_items())) for answer in answers}) == 1
    assert answers[0].json()["code"] == "invalid_credentials"
    assert "set-cookie" not in answers[0].headers


def test_the_eleventh_attempt_on_an_account_has_to_wait(site: Site) -> None:
    site.add_user("minsu")
    client = site.client()
    limit = site.service.throttle.unknown_devices.attempts
    codes = [client.post("/api/login", json={**LOGIN, "password": "wrong"}).status_code for _ in range(limit)]
    assert codes == [401] * limit
    refused = client.post("/api/login", json=LOGIN)
    assert refused.status_code == 429
    assert refused.json()["code"] == "throttled"
    wait = int(refused.headers["retry-after"])
    assert 1 <= wait <= 90
    site.clock.advance(wait)
    assert client.post("/api/login", json=LOGIN).status_code == 200


def test_an_unknown_account_is_throttled_like_a_known_one(site: Site) -> None:
    client = site.client()
    limit = site.service.throttle.unknown_devices.attempts
    codes = [
        client.post("/api/login", json={"username": "nobody", "password": "x"}).status_code for _ in range(limit + 1)
    ]
    assert codes == [401] * limit + [429]


def test_a_stranger_who_guesses_does_not_keep_the_owners_browser_out(site: Site) -> None:
    site.add_user("minsu")
    owner, stranger = site.signed_in("minsu"), site.client(peer="203.0.113.9")
    attempts = range(site.service.throttle.unknown_devices.attempts + 1)
    codes = [stranger.post("/api/login", json={**LOGIN, "password": "wrong"}).status_code for _ in attempts]
    assert codes[-1] == 429
    assert owner.post("/api/login", json=LOGIN).status_code == 200


def test_signing_in_again_ends_the_session_before(site: Site, minsu: TestClient) -> None:
    before = minsu.cookies[COOKIE]
    assert minsu.post("/api/login", json=LOGIN).status_code == 200
    after = minsu.cookies[COOKIE]
    assert after != before
    old = site.client(headers={"cookie": f"{COOKIE}={before}"})
    assert old.get("/api/me").status_code == 401
    assert minsu.get("/api/me").status_code == 200


def test_a_planted_id_is_never_adopted(site: Site) -> None:
    site.add_user("minsu")
    victim = site.client(headers={"cookie": f"{COOKIE}=planted-by-somebody"})
    answer = victim.post("/api/login", json=LOGIN)
    assert answer.cookies[COOKIE] != "planted-by-somebody"
    attacker = site.client(headers={"cookie": f"{COOKIE}=planted-by-somebody"})
    assert attacker.get("/api/me").status_code == 401


def test_a_disabled_user_is_signed_out_by_the_revoke_that_goes_with_it(site: Site) -> None:
    user = site.add_user("minsu")
    client = site.signed_in("minsu")
    site.call(site.service.accounts.disable, user.id)
    site.call(site.service.coat.revoke_subject, user.id, reason="account_disabled")
    answer = client.get("/api/me")
    assert (answer.status_code, answer.json()["code"]) == (401, "session_ended")
    assert answer.json()["reason"] == "account_disabled"
    assert client.post("/api/login", json=LOGIN).json()["code"] == "invalid_credentials"


def test_messages_come_in_the_language_that_was_asked_for(site: Site) -> None:
    site.add_user("minsu")
    client = site.client(headers={"accept-language": "ko-KR,ko;q=0.9,en;q=0.5"})
    assert client.post("/api/login", json={**LOGIN, "password": "x"}).json()["title"] == (
        "이름이나 비밀번호가 맞지 않습니다."
    )
    assert client.post("/api/login", json=LOGIN).json()["message"] == "로그인했습니다"
    assert client.post("/api/logout").json()["message"] == "로그아웃했습니다"


# Who is signed in, and signing out.


def test_me_tells_user_and_session(site: Site, minsu: TestClient) -> None:
    body = minsu.get("/api/me").json()
    assert body["user"]["name"] == "minsu"
    assert set(body["session"]) == {"sid", "expires_at"}


def test_logout_ends_the_session_everywhere_and_clears_the_cookie(site: Site, minsu: TestClient) -> None:
    stolen = site.client(headers={"cookie": f"{COOKIE}={minsu.cookies[COOKIE]}"})
    answer = minsu.post("/api/logout")
    assert (answer.status_code, answer.json()) == (200, {"message": "Logout complete"})
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert COOKIE not in minsu.cookies
    gone = stolen.get("/api/me")
    assert (gone.status_code, gone.json()["code"], gone.json()["reason"]) == (401, "session_ended", "logout")


def test_logout_of_nobody_is_fine(site: Site) -> None:
    client = site.client()
    assert client.post("/api/logout").status_code == 200
    assert client.post("/api/logout").status_code == 200


@pytest.mark.parametrize(("seconds", "status"), [(1799.999999, 200), (1800, 401)])
def test_a_session_ends_exactly_at_its_idle_timeout(site: Site, minsu: TestClient, seconds: float, status: int) -> None:
    site.clock.advance(seconds)
    answer = minsu.get("/api/me")
    assert answer.status_code == status
    if status == 401:
        assert answer.json()["reason"] == "idle_timeout"


@pytest.mark.parametrize(("method", "path"), SIGNED_IN_CALLS)
def test_nobody_gets_nothing(site: Site, method: str, path: str) -> None:
    answer = site.client().request(method, path, json=BODIES.get(path))
    assert (answer.status_code, answer.json()["code"]) == (401, "login_required")
    assert answer.headers["www-authenticate"] == 'Cookie realm="session"'


# One's own sessions.


def test_sessions_list_where_when_and_what_and_never_an_id(site: Site) -> None:
    site.add_user("minsu")
    one = site.signed_in("minsu")
    site.clock.advance(60)
    two = site.client(peer="203.0.113.7", headers={"user-agent": CHROME})
    two.post("/api/login", json=LOGIN)
    answer = one.get("/api/sessions")
    first, second = answer.json()["sessions"]
    assert set(first) == {"sid", "created_at", "last_seen_at", "expires_at", "network", "device", "current"}
    assert (first["device"], first["network"], first["current"]) == ("curl", "127.0.0.1", True)
    assert (second["device"], second["network"], second["current"]) == ("Chrome on Linux", "203.0.113.7", False)
    assert second["created_at"] - first["created_at"] == 60
    for client in (one, two):
        secret = client.cookies[COOKIE]
        assert secret not in answer.text
        assert secret[-20:] not in answer.text


def test_ending_one_session_signs_that_browser_out_and_no_other(site: Site, minsu: TestClient) -> None:
    other, third = site.signed_in("minsu"), site.signed_in("minsu")
    sid = other.get("/api/me").json()["session"]["sid"]
    assert minsu.delete(f"/api/sessions/{sid}").json() == {"ended": 1}
    gone = other.get("/api/me")
    assert (gone.json()["code"], gone.json()["reason"]) == ("session_ended", "ended_by_user")
    assert third.get("/api/me").status_code == minsu.get("/api/me").status_code == 200


def test_ending_ones_present_session_clears_the_cookie(minsu: TestClient) -> None:
    sid = minsu.get("/api/me").json()["session"]["sid"]
    answer = minsu.delete(f"/api/sessions/{sid}")
    assert answer.json() == {"ended": 1}
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert minsu.get("/api/me").json()["code"] == "login_required"


def test_a_foreign_session_looks_as_if_it_never_existed(site: Site, minsu: TestClient) -> None:
    site.add_user("other")
    other = site.signed_in("other")
    sid = other.get("/api/me").json()["session"]["sid"]
    foreign, invented = minsu.delete(f"/api/sessions/{sid}"), minsu.delete(f"/api/sessions/{'x' * len(sid)}")
    assert foreign.status_code == invented.status_code == 404
    assert foreign.content == invented.content
    assert other.get("/api/me").status_code == 200


@pytest.mark.parametrize("sid", ["%00", "%2e%2e", "'", "%F0%9F%98%80", "%ff%fe", "a" * 5000, "%0d%0aset-cookie:a=b"])
def test_a_hostile_sid_is_not_found(minsu: TestClient, sid: str) -> None:
    answer = minsu.delete(f"/api/sessions/{sid}")
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_ending_the_others_keeps_this_one(site: Site, minsu: TestClient) -> None:
    others = [site.signed_in("minsu") for _ in range(3)]
    assert minsu.delete("/api/sessions?scope=others").json() == {"ended": 3}
    assert [each.get("/api/me").status_code for each in others] == [401] * 3
    assert minsu.get("/api/me").status_code == 200


def test_ending_all_ends_this_one_too(site: Site, minsu: TestClient) -> None:
    other = site.signed_in("minsu")
    answer = minsu.delete("/api/sessions?scope=all")
    assert answer.json() == {"ended": 2}
    assert "Max-Age=0" in answer.headers["set-cookie"]
    assert other.get("/api/me").status_code == minsu.get("/api/me").status_code == 401


@pytest.mark.parametrize("query", ["", "?scope=", "?scope=everyone", "?scope=all&scope=nobody", "?Scope=all"])
def test_ending_several_needs_a_scope_that_is_known(minsu: TestClient, query: str) -> None:
    answer = minsu.delete(f"/api/sessions{query}")
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")
    assert minsu.get("/api/me").status_code == 200


# The password.


def test_a_new_password_ends_the_other_sessions_and_changes_the_id_of_this_one(site: Site, minsu: TestClient) -> None:
    other, before = site.signed_in("minsu"), minsu.cookies[COOKIE]
    answer = minsu.post("/api/password", json={"current": PASSWORD, "new": NEW_PASSWORD})
    assert (answer.status_code, answer.json()) == (200, {"ended": 1})
    assert minsu.cookies[COOKIE] != before
    assert minsu.get("/api/me").status_code == 200
    assert other.get("/api/me").json()["reason"] == "password_changed"
    fresh = site.client()
    assert fresh.post("/api/login", json=LOGIN).status_code == 401
    assert fresh.post("/api/login", json={**LOGIN, "password": NEW_PASSWORD}).status_code == 200


def test_a_new_password_needs_the_present_one(site: Site, minsu: TestClient) -> None:
    answer = minsu.post("/api/password", json={"current": "wrong", "new": NEW_PASSWORD})
    assert (answer.status_code, answer.json()["code"]) == (401, "invalid_credentials")
    assert site.client().post("/api/login", json=LOGIN).status_code == 200


def test_an_open_session_cannot_guess_the_password_faster_than_the_door(site: Site, minsu: TestClient) -> None:
    limit = site.service.throttle.unknown_devices.attempts
    bodies = [{"current": f"guess {n}", "new": NEW_PASSWORD} for n in range(limit + 1)]
    codes = [minsu.post("/api/password", json=body).status_code for body in bodies]
    assert codes[-1] == 429
    assert set(codes[:-1]) <= {401, 429}


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("a" * 14, "too_short"),
        ("abc" * 5, "repeated"),
        ("x" * 1025, "too_long"),
        ("passwordpassword1", "common"),
        ("minsuminsuminsu!", "context"),
    ],
)
def test_a_refused_password_says_which_rule_it_breaks(minsu: TestClient, wanted: str, reason: str) -> None:
    answer = minsu.post("/api/password", json={"current": PASSWORD, "new": wanted})
    assert (answer.status_code, answer.json()["code"], answer.json()["reason"]) == (
        422,
        "password_unacceptable",
        reason,
    )


# Administration.


@pytest.mark.parametrize(("method", "path"), ADMIN_CALLS)
def test_a_user_is_no_administrator(minsu: TestClient, method: str, path: str) -> None:
    answer = minsu.request(method, path, json=BODIES.get(path))
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert minsu.get("/api/me").status_code == 200


def test_administrators_see_everybodys_sessions_and_no_id(site: Site, admin: TestClient, minsu: TestClient) -> None:
    answer = admin.get("/api/admin/sessions")
    found = answer.json()
    assert {each["subject"] for each in found["sessions"]} == {
        admin.get("/api/me").json()["user"]["id"],
        minsu.get("/api/me").json()["user"]["id"],
    }
    assert minsu.cookies[COOKIE] not in answer.text


def test_the_administrators_list_can_be_narrowed_and_paged(site: Site, admin: TestClient) -> None:
    user = site.add_user("minsu")
    for peer in ("198.51.100.1", "198.51.100.2", "203.0.113.5"):
        site.signed_in("minsu", peer=peer)
    of_user = admin.get("/api/admin/sessions", params={"subject": user.id}).json()["sessions"]
    of_network = admin.get("/api/admin/sessions", params={"network": "198.51.100.0/24"}).json()["sessions"]
    assert (len(of_user), len(of_network)) == (3, 2)
    seen: list[str] = []
    cursor = ""
    for _ in range(20):
        found = admin.get("/api/admin/sessions", params={"limit": "2", **({"cursor": cursor} if cursor else {})}).json()
        seen += [each["sid"] for each in found["sessions"]]
        if found["cursor"] is None:
            break
        cursor = found["cursor"]
    assert len(seen) == len(set(seen)) == 4


def test_created_before_is_exclusive(site: Site, admin: TestClient) -> None:
    at = site.clock.now_us() / 1e6
    assert admin.get("/api/admin/sessions", params={"before": repr(at)}).json()["sessions"] == []
    assert len(admin.get("/api/admin/sessions", params={"before": repr(at + 1e-3)}).json()["sessions"]) == 1


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=many",
        "limit=1.5",
        "limit=nan",
        "limit=-1",
        "limit=1e400",
        "before=yesterday",
        "before=-1",
        "before=inf",
        f"before={'9' * 400}",
        "network=everywhere",
        "network=10.0.0.0/99",
        "cursor=%00",
        "cursor=not-a-cursor",
        f"cursor={'x' * 9000}",
    ],
)
def test_a_query_that_means_nothing_is_refused(admin: TestClient, query: str) -> None:
    answer = admin.get(f"/api/admin/sessions?{query}")
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] in ("bad_request", "value_refused")


@pytest.mark.parametrize("by", ["sid", "subject", "filter", "older"])
def test_administrators_end_sessions_and_the_reason_is_told(admin: TestClient, minsu: TestClient, by: str) -> None:
    mine = minsu.get("/api/me").json()
    choices: dict[str, dict[str, object]] = {
        "sid": {"sid": mine["session"]["sid"]},
        "subject": {"subject": mine["user"]["id"]},
        "filter": {"filter": {"subject": mine["user"]["id"]}},
        "older": {"filter": {"subject": mine["user"]["id"], "created_before": 4e9, "seen_before": 4e9}},
    }
    body = {**choices[by], "reason": "stolen laptop"}
    assert admin.post("/api/admin/revoke", json=body).json() == {"ended": 1}
    assert minsu.get("/api/me").json()["reason"] == "stolen laptop"
    assert admin.post("/api/admin/revoke", json=body).json() == {"ended": 0}


def test_ending_all_ends_the_administrators_own_session_too(admin: TestClient, minsu: TestClient) -> None:
    answer = admin.post("/api/admin/revoke", json={"all": True, "reason": "incident"})
    assert answer.json() == {"ended": 2}
    assert minsu.get("/api/me").status_code == admin.get("/api/me").status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        {"reason": "x"},
        {"reason": "x", "all": False},
        {"reason": "x", "sid": "a", "all": True},
        {"reason": "x", "subject": "a", "filter": {}},
        {"reason": "", "all": True},
        {"reason": "x" * 201, "all": True},
        {"reason": "two\nlines", "all": True},
        {"all": True},
        {"reason": "x", "subject": ""},
        {"reason": "x", "subject": "\x00"},
        {"reason": "x", "subject": "a" * 256},
        {"reason": "x", "filter": {"network": "nowhere"}},
        {"reason": "x", "filter": {"nobody": "knows"}},
    ],
)
def test_a_revoke_that_means_nothing_ends_nothing(
    admin: TestClient, minsu: TestClient, body: dict[str, object]
) -> None:
    answer = admin.post("/api/admin/revoke", json=body)
    assert answer.status_code == 400, answer.text
    assert minsu.get("/api/me").status_code == admin.get("/api/me").status_code == 200


def test_the_audit_log_tells_what_happened_in_order_and_no_secret(site: Site, admin: TestClient) -> None:
    site.add_user("minsu")
    site.client().post("/api/login", json={**LOGIN, "password": "hunter-two-in-the-log"})
    site.signed_in("minsu").post("/api/logout")
    site.call(site.service._trail._write)
    answer = admin.get("/api/admin/events")
    found = answer.json()
    kinds = [event["type"] for event in found["events"]]
    wanted = ["session.signed_in", "login.failed", "session.signed_in", "session.ended"]
    assert [kind for kind in kinds if kind in wanted] == wanted
    for secret in (PASSWORD, "hunter-two-in-the-log", admin.cookies[COOKIE]):
        assert secret not in answer.text
    later = admin.get("/api/admin/events", params={"after": found["after"]}).json()
    assert later == {"events": [], "after": found["after"]}


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "1e99", "nan", "9" * 50])
def test_a_position_that_means_nothing_is_refused(admin: TestClient, after: str) -> None:
    assert admin.get("/api/admin/events", params={"after": after}).status_code == 400
