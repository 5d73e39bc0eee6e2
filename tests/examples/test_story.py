"""The story's applications do what their steps say, the failures included."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from coatcheck import AsyncCoatcheck, Coatcheck, ConfigurationError, CookieSettings, Settings
from coatcheck.testing import FakeSystem
from examples.story import (
    ch03_cookie,
    ch05_memory_session,
    ch06_three_servers,
    ch07_shared_store,
    ch08_cookie_attributes,
    ch09_fixation,
)

RIGHT = {"username": "ratia", "password": "secret"}
WRONG = {"username": "ratia", "password": "guess"}
COOKIE = "__Host-Http-session"
DASHBOARD = {"message": "Dashboard data", "user": {"id": 50, "role": "admin"}}


def client(app: Any) -> TestClient:
    return TestClient(app, base_url="https://shop.test")


def test_step_3_a_plain_cookie_is_believed_whatever_it_says() -> None:
    with client(ch03_cookie.plain()) as browser:
        assert browser.get("/dashboard").status_code == 401
        assert browser.post("/login", json=RIGHT).json() == {"message": "Login successful"}
        assert browser.get("/dashboard").json()["user"] == {"name": "ratia"}
        forged = browser.get("/dashboard", headers={"cookie": "user=admin"})
        assert forged.json()["user"]["name"] in ("admin", "ratia")
        browser.cookies.clear()
        assert browser.get("/dashboard", headers={"cookie": "user=admin"}).json()["user"] == {"name": "admin"}


def test_step_3_a_signed_cookie_cannot_be_changed_but_not_taken_back_either() -> None:
    now = [1_000_000.0]
    with client(ch03_cookie.signed(b"k" * 32, clock=lambda: now[0])) as browser:
        assert browser.post("/login", json=WRONG).status_code == 401
        browser.post("/login", json=RIGHT)
        copied = browser.cookies["user"]
        assert browser.get("/dashboard").status_code == 200
        browser.post("/logout")
        browser.cookies.clear()
        replay = {"cookie": f"user={copied}"}
        assert browser.get("/dashboard", headers=replay).status_code == 200, "the copy outlives the logout"
        changed = {"cookie": f"user=admin{copied[5:]}"}
        assert browser.get("/dashboard", headers=changed).status_code == 401
        now[0] += ch03_cookie.LIFETIME
        assert browser.get("/dashboard", headers=replay).status_code == 401


def test_step_5_a_session_gives_the_articles_answers_and_can_be_taken_back() -> None:
    coat = Coatcheck("memory:")
    browser = ch05_memory_session.create_app(coat).test_client()
    assert browser.get("/dashboard").status_code == 401
    assert browser.post("/login", json=WRONG).get_json() == {"message": "Authentication failed"}
    signed_in = browser.post("/login", json=RIGHT)
    assert signed_in.get_json() == {"message": "Login successful"}
    key = signed_in.headers["Set-Cookie"].split(";")[0]
    assert "ratia" not in key
    assert "50" not in key.split("=")[0]
    held = {"Cookie": key}
    assert browser.get("/dashboard", headers=held).get_json() == DASHBOARD
    assert browser.post("/logout", headers=held).get_json() == {"message": "Logout complete"}
    assert browser.get("/dashboard", headers=held).status_code == 401, "a copy of the key opens nothing any more"


def test_step_6_three_servers_with_their_own_memory_lose_the_login() -> None:
    servers = ch06_three_servers.create_servers()
    with client(servers[0]) as a, client(servers[1]) as b, client(servers[2]) as c:
        a.post("/login", json=RIGHT)
        held = {"cookie": f"{COOKIE}={a.cookies[COOKIE]}"}
        statuses = [server.get("/dashboard", headers=held).status_code for server in (a, b, c)]
    assert statuses == [200, 401, 401]


def test_step_7_on_a_shared_store_the_login_is_known_and_ended_everywhere(tmp_path: Path) -> None:
    servers = ch07_shared_store.create_servers(f"sqlite:///{tmp_path / 'story.db'}")
    with client(servers[0]) as a, client(servers[1]) as b, client(servers[2]) as c:
        a.post("/login", json=RIGHT)
        held = {"cookie": f"{COOKIE}={a.cookies[COOKIE]}"}
        answers = [server.get("/dashboard", headers=held).json() for server in (a, b, c)]
        assert [answer["server"] for answer in answers] == ["A", "B", "C"]
        assert all(answer["user"] == DASHBOARD["user"] for answer in answers)
        b.post("/logout", headers=held)
        assert [server.get("/dashboard", headers=held).status_code for server in (a, b, c)] == [401, 401, 401]


@pytest.mark.servers
def test_step_7_the_same_on_a_real_valkey(valkey_single: Any, namespace: str) -> None:
    servers = ch07_shared_store.create_servers(valkey_single.url, Settings(namespace=namespace))
    with client(servers[0]) as a, client(servers[1]) as b, client(servers[2]) as c:
        a.post("/login", json=RIGHT)
        held = {"cookie": f"{COOKIE}={a.cookies[COOKIE]}"}
        assert [server.get("/dashboard", headers=held).status_code for server in (a, b, c)] == [200, 200, 200]
        c.post("/logout", headers=held)
        assert [server.get("/dashboard", headers=held).status_code for server in (a, b, c)] == [401, 401, 401]


@pytest.mark.parametrize(
    ("cookie", "attributes"),
    [
        (ch08_cookie_attributes.SAFE, {"Path=/", "Secure", "HttpOnly", "SameSite=Lax"}),
        (ch08_cookie_attributes.STRICT, {"Path=/", "Secure", "HttpOnly", "SameSite=Strict"}),
        (
            ch08_cookie_attributes.SHARED,
            {"Path=/", "Secure", "HttpOnly", "SameSite=Lax", "Domain=example.com", "Max-Age=604800"},
        ),
        (ch08_cookie_attributes.EMBEDDED, {"Path=/", "Secure", "HttpOnly", "SameSite=None", "Partitioned"}),
    ],
)
def test_step_8_every_attribute_is_sent_and_sent_again_when_the_cookie_is_deleted(
    cookie: CookieSettings, attributes: set[str]
) -> None:
    with client(ch08_cookie_attributes.create(cookie)) as browser:
        signed_in = browser.post("/login", json=RIGHT).headers["set-cookie"]
        pair, *sent = signed_in.split("; ")
        assert set(sent) == attributes
        gone = browser.post("/logout", headers={"cookie": pair}).headers["set-cookie"]
        assert {part for part in attributes if not part.startswith("Max-Age")} <= set(gone.split("; "))
        assert "Max-Age=0" in gone.split("; ")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"same_site": "None", "secure": False, "name": "s"}, "secure"),
        ({"domain": "example.com"}, "domain"),
        ({"path": "/shop"}, "path"),
        ({"http_only": False}, "http_only"),
        ({"max_age": timedelta(days=401)}, "max_age"),
    ],
)
def test_step_8_a_combination_a_browser_would_drop_is_refused_by_name(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        CookieSettings(**wrong)


def test_step_9_the_naive_application_falls_for_a_planted_id() -> None:
    with client(ch09_fixation.naive()) as anybody:
        planted = {"cookie": "SID=attacker123"}
        anybody.post("/login", json=RIGHT, headers=planted)
        anybody.cookies.clear()
        assert anybody.get("/dashboard", headers=planted).status_code == 200, "the attacker is in"


def test_step_9_a_planted_id_never_leads_to_the_session() -> None:
    coat = AsyncCoatcheck("memory:", system=FakeSystem())
    with client(ch09_fixation.regenerated(coat)) as anybody:
        for planted in ("attacker123", "A" * 64):
            held = {"cookie": f"{COOKIE}={planted}"}
            anybody.post("/login", json=RIGHT, headers=held)
            anybody.cookies.clear()
            assert anybody.get("/dashboard", headers=held).status_code == 401
        anybody.post("/cart/soap")
        own = anybody.cookies[COOKIE]
        anybody.cookies.clear()
        planted_own = {"cookie": f"{COOKIE}={own}"}
        signed_in = anybody.post("/login", json=RIGHT, headers=planted_own)
        assert own not in signed_in.headers["set-cookie"]
        anybody.cookies.clear()
        assert anybody.get("/dashboard", headers=planted_own).status_code == 401, "a genuine id planted before"
