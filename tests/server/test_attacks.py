"""Attacks on a running server, one test each, named after what the attacker hopes for."""

from __future__ import annotations

import logging

import pytest
from starlette.testclient import TestClient

from coatcheck.server.api import LoginBody, PasswordBody
from coatcheck.server.sign_in import Caller
from tests.server.conftest import COOKIE, NEW_PASSWORD, PASSWORD, MakeSite, Site

CHANGE = {"current": PASSWORD, "new": NEW_PASSWORD}


def thief_of(site: Site, owner: TestClient) -> TestClient:
    thief = site.client(peer="203.0.113.9")
    thief.cookies.set(COOKIE, owner.cookies[COOKIE])
    assert thief.get("/api/me").status_code == 200
    return thief


def guess(client: TestClient, name: str, times: int) -> list[int]:
    return [
        client.post("/api/login", json={"username": name, "password": f"wrong wrong wrong {number}"}).status_code
        for number in range(times)
    ]


def test_a_stolen_cookie_does_not_follow_the_owner_through_a_password_change(site: Site) -> None:
    site.add_user()
    owner = site.signed_in()
    thief = thief_of(site, owner)
    assert owner.post("/api/password", json=CHANGE).status_code == 200
    assert owner.get("/api/me").status_code == 200
    # Within the window of a plain rotation: the old id must lead nowhere, and no new one may be handed out.
    site.clock.advance(1)
    refused = thief.get("/api/me")
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers


def test_a_password_change_that_cannot_end_other_sessions_changes_nothing(site: Site) -> None:
    site.add_user()
    owner, thief = site.signed_in(), site.signed_in()
    site.store.off = frozenset({"revoke_owner"})
    assert owner.post("/api/password", json=CHANGE).status_code == 503
    site.store.off = frozenset()
    assert owner.post("/api/password", json=CHANGE).status_code == 200, "it can be repeated with the old password"
    assert thief.get("/api/me").status_code == 401


def test_a_stranger_at_the_door_does_not_keep_the_owner_from_changing_his_password(site: Site) -> None:
    site.add_user()
    owner = site.signed_in()
    assert 429 in guess(site.client(peer="203.0.113.9"), "minsu", 12)
    assert owner.post("/api/password", json=CHANGE).status_code == 200


def test_a_thief_with_a_session_cannot_guess_the_password_without_end(site: Site) -> None:
    site.add_user()
    thief = site.signed_in()
    statuses = [
        thief.post("/api/password", json={"current": f"wrong wrong wrong {number}", "new": NEW_PASSWORD}).status_code
        for number in range(12)
    ]
    assert statuses == [401] * 10 + [429] * 2


def test_a_right_password_is_never_counted_as_a_failure(site: Site) -> None:
    user = site.add_user()
    owner = site.signed_in()
    for _ in range(3):
        assert owner.post("/api/password", json={"current": PASSWORD, "new": "short"}).status_code == 422
    site.store.off = frozenset({"admit"})
    for _ in range(3):
        assert site.client().post("/api/login", json={"username": "minsu", "password": PASSWORD}).status_code == 503
    site.store.off = frozenset()
    assert site.call(site.service.accounts.get, user.id).failures == 0


def test_junk_in_front_of_a_forwarded_address_does_not_switch_the_network_limit_off(make_site: MakeSite) -> None:
    site = make_site(trusted_proxies=("10.0.0.1",))
    junk = {"x-forwarded-for": "9" * 1100 + ", 203.0.113.10"}
    client = site.client(peer="10.0.0.1", headers=junk)
    statuses = [guess(client, f"victim{number}", 1)[0] for number in range(102)]
    assert statuses == [401] * 100 + [429] * 2


def test_forwarding_headers_of_a_stranger_are_told_loudly(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="coatcheck.server"):
        guess(site.client(peer="203.0.113.9", headers={"x-forwarded-for": "1.2.3.4"}), "minsu", 1)
    assert any("trusted_proxies" in record.getMessage() for record in caplog.records)


def test_what_anybody_can_cause_fills_no_table(site: Site) -> None:
    def entries() -> int:
        return len(site.call(site.service.audit.read, after=0, limit=1000))

    client = site.client()
    before = entries()
    for _ in range(20):
        client.get("/api/me", headers={"cookie": f"{COOKIE}={'E' * 64}"})
        client.get("/api/me", headers={"cookie": f"{COOKIE}=a; {COOKIE}=b"})
        client.post("/api/logout", headers={"origin": "https://evil.test"})
    assert entries() == before


def test_a_filter_that_means_everybody_is_refused(site: Site) -> None:
    site.add_user("boss", role="admin")
    boss = site.signed_in("boss")
    refused = boss.post("/api/admin/revoke", json={"reason": "typo", "filter": {}})
    assert (refused.status_code, refused.json()["code"]) == (400, "bad_request")
    assert boss.get("/api/me").status_code == 200


def test_a_body_cannot_forge_a_line_of_the_log(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="coatcheck"):
        site.client().post(
            "/api/login",
            content=b'{"a\\ncoatcheck: session.signed_in root": 1}',
            headers={"content-type": "application/json"},
        )
    assert not any("\n" in record.getMessage() for record in caplog.records)


def test_no_password_or_device_cookie_shows_in_a_representation() -> None:
    secret = "tangled lamp"
    shown = [
        LoginBody(username="a", password=secret),
        PasswordBody(current=secret, new=secret),
        Caller(address=None, forged_address=False, device=secret),
    ]
    assert secret not in repr(shown)
