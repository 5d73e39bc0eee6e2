"""The JSON API under hostile input, without its store, and in other people's hands."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from coatcheck.server.routes import MAX_BODY
from tests.server.conftest import COOKIE, PASSWORD, Site, spoil_journal

LOGIN = {"username": "minsu", "password": PASSWORD}


@pytest.fixture
def minsu(site: Site) -> TestClient:
    """A program signed in as `minsu`, who is a user."""
    site.add_user("minsu")
    return site.signed_in("minsu")


# Bodies nobody sends by mistake.

HOSTILE_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"minsu"',
    b"\xff\xfe",
    b'{"username":"minsu"}',
    b'{"username":1,"password":"x"}',
    b'{"username":null,"password":null}',
    b'{"username":["minsu"],"password":{"$ne":""}}',
    b'{"username":"minsu","password":"x","role":"admin"}',
    b'{"username":"minsu","password":"x"} {}',
    b'{"username":"\xed\xa0\x80","password":"x"}',
    b'{"username":"\\ud800","password":"x"}',
    b"[" * 10_000,
    b'{"a":' * 3_000,
    b'{"username":' + b"9" * 10_000 + b"}",
]


@pytest.mark.parametrize("body", HOSTILE_BODIES)
def test_a_hostile_body_is_a_400_and_nothing_else(site: Site, body: bytes) -> None:
    answer = site.client().post("/api/login", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["code"] == "bad_request"
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_secret_in_the_place_of_a_name_stays_out_of_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({**LOGIN, f"{PASSWORD} canary": 1}).encode()
    with caplog.at_level(logging.DEBUG):
        answer = site.client().post("/api/login", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "canary" not in caplog.text
    assert "unknown field" in caplog.text, "what was wrong with the body is told"


def test_a_member_that_comes_twice_is_refused(site: Site) -> None:
    site.add_user("minsu")
    body = b'{"username":"somebody","username":"minsu","password":"%s"}' % PASSWORD.encode()
    answer = site.client().post("/api/login", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/json", "application/jsonp", "json"]
)
def test_only_json_is_read_because_other_types_cross_origins_without_a_preflight(site: Site, kind: str | None) -> None:
    site.add_user("minsu")
    headers = {} if kind is None else {"content-type": kind}
    answer = site.client().post("/api/login", content=json.dumps(LOGIN).encode(), headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"])
def test_parameters_of_the_media_type_do_not_matter(site: Site, kind: str) -> None:
    site.add_user("minsu")
    answer = site.client().post("/api/login", content=json.dumps(LOGIN).encode(), headers={"content-type": kind})
    assert answer.status_code == 200


def _body_of(octets: int) -> bytes:
    body = json.dumps(LOGIN).encode()
    return body + b" " * (octets - len(body))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("octets", "status"), [(MAX_BODY, 200), (MAX_BODY + 1, 413)])
def test_a_body_is_read_up_to_its_limit_and_no_octet_further(
    site: Site, octets: int, status: int, chunked: bool
) -> None:
    site.add_user("minsu")
    whole = _body_of(octets)

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(whole), 1000):
            yield whole[start : start + 1000]

    answer = site.client().post(
        "/api/login", content=pieces() if chunked else whole, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    if status == 413:
        assert answer.json()["code"] == "body_too_large"


def test_a_declared_size_over_the_limit_is_refused_before_anything_is_read(site: Site) -> None:
    headers = {"content-type": "application/json", "content-length": "9" * 30}
    answer = site.client().post("/api/login", content=b"{}", headers=headers)
    assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "abc", "1e3", "+5", "٣"])
def test_a_size_that_is_no_number_is_refused(site: Site, length: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", length.encode())]
    answer = site.client().post("/api/login", content=b"{}", headers=headers)
    assert answer.status_code == 400


# The store is away.


def test_login_while_the_store_is_away_is_a_503_without_a_cookie(site: Site) -> None:
    site.add_user("minsu")
    site.store.off = None
    answer = site.client().post("/api/login", json=LOGIN)
    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "3"
    assert "set-cookie" not in answer.headers


def test_a_store_that_is_away_signs_nobody_out(site: Site, minsu: TestClient) -> None:
    site.store.off = None
    answer = minsu.get("/api/me")
    assert answer.status_code == 503
    assert "set-cookie" not in answer.headers
    site.store.off = frozenset()
    assert minsu.get("/api/me").status_code == 200


def test_logout_that_cannot_be_kept_is_a_503_that_clears_the_cookie(site: Site, minsu: TestClient) -> None:
    spoil_journal(site)
    site.store.off = None
    answer = minsu.post("/api/logout")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "Max-Age=0" in answer.headers["set-cookie"]


def test_a_sign_in_that_cannot_be_checked_at_the_end_lets_nobody_in(site: Site) -> None:
    user = site.add_user("minsu")
    site.accounts.off = frozenset({"get"})
    client = site.client()
    answer = client.post("/api/login", json=LOGIN)
    assert answer.status_code == 503
    assert COOKIE not in client.cookies
    site.accounts.off = frozenset()
    assert site.call(site.service.coat.list_sessions, user.id).items == ()


# Other people's ways to get in.


def test_a_call_from_another_site_is_refused_before_anything_is_looked_at(site: Site, minsu: TestClient) -> None:
    for headers in (
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
    ):
        answer = minsu.post("/api/logout", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_origin")
    assert minsu.get("/api/me").status_code == 200


def test_a_refusal_of_the_session_middleware_is_told_in_korean_too(site: Site) -> None:
    headers = {"origin": "https://evil.example", "accept-language": "ko"}
    answer = site.client().post("/api/logout", headers=headers)
    assert answer.json()["title"] == "다른 사이트에서 보낸 요청이라 처리하지 않았습니다."


@pytest.mark.parametrize("name", ["x-http-method-override", "x-method-override", "x-http-method"])
def test_no_header_changes_the_method(minsu: TestClient, name: str) -> None:
    answer = minsu.get("/api/sessions", headers={name: "DELETE"})
    assert answer.status_code == 200
    assert len(minsu.get("/api/sessions?_method=DELETE&scope=all").json()["sessions"]) == 1


def test_an_authorization_header_takes_the_cookie_out_of_play(minsu: TestClient) -> None:
    answer = minsu.get("/api/me", headers={"authorization": "Bearer whatever"})
    assert (answer.status_code, answer.json()["code"]) == (401, "login_required")


def test_a_cookie_that_comes_twice_counts_as_none(site: Site, minsu: TestClient) -> None:
    mine = minsu.cookies[COOKIE]
    tossed = site.client(headers={"cookie": f"{COOKIE}={mine}; {COOKIE}={mine}"})
    assert tossed.get("/api/me").status_code == 401
