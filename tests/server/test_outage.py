"""The store of a whole server is away: what each address answers, and what becomes of a sign-out."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from httpx2 import Response
from starlette.testclient import TestClient

from coatcheck.core.ports import Store
from coatcheck.server import service as services
from coatcheck.server.app import OUTAGE, create_app
from coatcheck.server.settings import JOURNAL, ServerSettings
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem
from tests.manager.test_outage import GRACE, LEASE, STEP, NoKeeper, Removable, Silence
from tests.manager.test_outage import silence as silence
from tests.server.conftest import COOKIE, NEW_PASSWORD, PASSWORD, REFRESH, Site, Switch


class Owned(Removable):
    """The store of one server: it goes with it."""

    async def close(self) -> None:
        cut, self.before = self.fed, lambda verb: None
        if cut is not None:
            cut.cut()
        closed: Any = self.inner
        await closed.close()


Outpost = tuple[Site, Owned]
MakeOutpost = Callable[..., Outpost]


@pytest.fixture
def make_outpost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeOutpost]:
    """`make_outpost(profile=...)`: a server with near copies, and its store, which can be taken away."""
    with ExitStack() as stack:

        def make(*, seed: bytes = b"coatcheck", **settings: Any) -> Outpost:
            clock = FakeSystem(seed=seed)
            monkeypatch.setattr(services, "open_store", lambda url, **more: Owned(open_store(url, **more), clock))
            service = services.build(ServerSettings(home=tmp_path / "home", **settings), system=clock)
            service.coat._keeper = NoKeeper()
            removable = cast(Owned, service.store)
            app = create_app(service)
            base_url = service.settings.browser_url
            first = stack.enter_context(TestClient(app, base_url=base_url, raise_server_exceptions=False))
            site = Site(
                app=app,
                service=replace(service, store=cast(Store, removable)),
                clock=clock,
                store=cast(Switch, removable),
                accounts=cast(Switch, service.accounts),
                first=first,
                base_url=base_url,
            )
            return site, removable

        yield make


@pytest.fixture
def outpost(make_outpost: MakeOutpost) -> Outpost:
    """A server of the profile that serves its near copies through an outage."""
    return make_outpost(profile="b2c")


def known(site: Site, name: str = "minsu") -> TestClient:
    """Somebody who is signed in and whom this process knows."""
    client = site.signed_in(name)
    assert client.get("/api/me").status_code == 200
    return client


def take_away(outpost: Outpost, silence: Silence = "cut") -> None:
    """The store is away, and the lease has run out."""
    site, removable = outpost
    removable.take_away(silence)
    site.clock.advance(LEASE)


def is_refused(answer: Response) -> bool:
    """Whether this is the 503 that costs nobody a cookie."""
    if answer.status_code != 503:
        return False
    assert answer.headers["retry-after"] == "1"
    return "set-cookie" not in answer.headers


def cleared(answer: Response) -> set[str]:
    """The cookies that an answer deletes."""
    lines = answer.headers.get_list("set-cookie")
    return {line.split("=")[0] for line in lines if "Max-Age=0" in line.split("; ")}


def kept(home: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(home / JOURNAL / "sign-outs-coatcheck.db")) as connection:
        return connection.execute("select handle, reason from sign_outs").fetchall()


def home_of(outpost: Outpost) -> Path:
    return outpost[0].service.settings.home


# -- what is answered ------------------------------------------------------------------------------------------------


def test_the_profile_says_whether_near_copies_serve_an_outage(make_outpost: MakeOutpost, silence: Silence) -> None:
    outpost = site, removable = make_outpost(profile="b2c")
    site.add_user()
    client = known(site)
    take_away(outpost, silence)
    answer = client.get("/api/me")
    assert (answer.status_code, answer.json()["user"]["name"]) == (200, "minsu")
    assert "set-cookie" not in answer.headers
    site.clock.advance(GRACE - STEP)
    assert client.get("/api/me").status_code == 200
    site.clock.advance(STEP)
    assert is_refused(client.get("/api/me"))
    removable.bring_back()
    assert client.get("/api/me").status_code == 200


@pytest.mark.parametrize("settings", [{"profile": "admin"}, {"profile": "b2c", "outage": "refuse"}], ids=str)
def test_a_back_office_refuses(make_outpost: MakeOutpost, settings: dict[str, str]) -> None:
    outpost = site, _ = make_outpost(**settings)
    site.add_user()
    client = known(site)
    take_away(outpost)
    assert is_refused(client.get("/api/me"))
    assert COOKIE in client.cookies


def test_anonymous_shows_the_start_page_of_nobody(make_outpost: MakeOutpost) -> None:
    outpost = site, removable = make_outpost(profile="admin", outage="anonymous")
    site.add_user(role="admin")
    browser = site.at_account()
    assert "minsu" in browser.get("/").text
    take_away(outpost)
    answer = browser.get("/")
    assert "minsu" not in answer.text
    assert COOKIE in browser.cookies
    removable.bring_back()
    assert "minsu" in browser.get("/").text


@pytest.mark.parametrize("policy", ["near", "anonymous"])
def test_what_changes_an_account_or_administers_refuses_whatever_the_settings_say(
    make_outpost: MakeOutpost, silence: Silence, policy: str
) -> None:
    outpost = site, _ = make_outpost(profile="b2c", outage=policy)
    site.add_user(role="admin")
    client, browser = known(site), site.at_account()
    assert browser.get("/account").status_code == 200
    sid = client.get("/api/me").json()["session"]["sid"]
    take_away(outpost, silence)
    new = {"current": PASSWORD, "new": NEW_PASSWORD}
    answers = {
        "own list": client.get("/api/sessions"),
        "one of them": client.delete(f"/api/sessions/{sid}"),
        "the others": client.delete("/api/sessions?scope=others"),
        "all": client.delete("/api/sessions?scope=all"),
        "password": client.post("/api/password", json=new),
        "sessions": client.get("/api/admin/sessions"),
        "revoke": client.post("/api/admin/revoke", json={"sid": sid, "reason": "admin"}),
        "events": client.get("/api/admin/events"),
        "page": browser.get("/account"),
        "page: end": browser.post("/account/sessions/end", data={"sid": sid}),
        "page: end others": browser.post("/account/sessions/end-others"),
        "page: password": browser.post("/account/password", data=new),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 503)
    assert all(is_refused(answer) for answer in answers.values())
    assert not (home_of(outpost) / JOURNAL).exists(), "none of these is a sign-out that may wait"


def test_the_addresses_that_always_refuse_are_those_of_the_server(outpost: Outpost) -> None:
    assert set(OUTAGE.values()) == {"refuse"}
    paths = {getattr(route, "path", "") for route in outpost[0].app.routes}
    for path in paths:
        if path.startswith(("/api/admin", "/api/password", "/api/sessions", "/account", "/setup", "/console")):
            assert any(path == each or path.startswith(f"{each}/") for each in OUTAGE), path


def test_signing_in_and_refreshing_are_refused_and_cost_nobody_a_cookie(outpost: Outpost, silence: Silence) -> None:
    site, removable = outpost
    site.add_user()
    client = known(site)
    take_away(outpost, silence)
    assert is_refused(client.post("/api/refresh"))
    assert is_refused(site.client().post("/api/login", json={"username": "minsu", "password": PASSWORD}))
    assert REFRESH in client.cookies
    removable.bring_back()
    assert client.post("/api/refresh").status_code == 200


def test_the_server_is_alive_and_not_ready(outpost: Outpost) -> None:
    site, removable = outpost
    take_away(outpost)
    assert site.client().get("/health/live").status_code == 200
    assert site.client().get("/health/ready").status_code == 503
    removable.bring_back()
    assert site.client().get("/health/ready").status_code == 200


# -- signing out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["refuse", "near", "anonymous"])
def test_a_sign_out_is_accepted_and_its_cookies_go(make_outpost: MakeOutpost, silence: Silence, policy: str) -> None:
    outpost = site, removable = make_outpost(profile="b2c", outage=policy)
    site.add_user()
    client = known(site)
    thief = site.client()
    thief.cookies.update(client.cookies)
    cookie = client.cookies[COOKIE]
    take_away(outpost, silence)
    answer = client.post("/api/logout")
    assert (answer.status_code, answer.json()["code"]) == (202, "logout_pending")
    assert cleared(answer) >= {COOKIE, REFRESH}
    assert kept(home_of(outpost)) == [(cookie[4:20], "logout")]
    raw = (home_of(outpost) / JOURNAL / "sign-outs-coatcheck.db").read_bytes()
    assert cookie[20:52].encode() not in raw
    # Who copied the cookies before has nothing here any more, and nothing anywhere once the store is back.
    refused = thief.get("/api/me")
    assert (refused.status_code, refused.json()["code"]) == (401, "session_ended")
    removable.bring_back()
    assert thief.post("/api/refresh").status_code == 401
    assert kept(home_of(outpost)) == []
    assert thief.get("/api/me").json()["reason"] == "logout"


def test_the_answer_is_in_the_caller_s_language(outpost: Outpost) -> None:
    site, _ = outpost
    site.add_user()
    one, other = known(site), known(site)
    take_away(outpost)
    english = one.post("/api/logout", headers={"accept-language": "en"}).json()
    korean = other.post("/api/logout", headers={"accept-language": "ko"}).json()
    assert english["message"] != korean["message"]
    assert english["code"] == korean["code"] == "logout_pending"


@pytest.mark.parametrize("carried", ["bearer", "body", "refresh cookie"])
def test_a_program_s_sign_out_is_accepted_as_well(outpost: Outpost, carried: str) -> None:
    site, removable = outpost
    site.add_user()
    program = site.client()
    tokens = program.post("/api/login", json={"username": "minsu", "password": PASSWORD, "carrier": "body"}).json()
    bearer = {"authorization": f"Bearer {tokens['access_token']}"}
    assert program.get("/api/me", headers=bearer).status_code == 200
    take_away(outpost)
    leaving = site.client()
    if carried == "bearer":
        answer = leaving.post("/api/logout", headers=bearer)
    elif carried == "body":
        answer = leaving.post("/api/logout", json={"refresh_token": tokens["refresh_token"]})
    else:
        answer = leaving.post("/api/logout", headers={"cookie": f"{REFRESH}={tokens['refresh_token']}"})
    assert answer.status_code == 202
    assert len(kept(home_of(outpost))) == 1
    removable.bring_back()
    assert program.get("/api/me", headers=bearer).status_code == 401


def test_the_page_goes_on_to_the_sign_in_page(outpost: Outpost) -> None:
    site, removable = outpost
    site.add_user()
    browser = site.at_account()
    assert browser.get("/").status_code == 200
    take_away(outpost)
    answer = browser.post("/logout")
    assert (answer.status_code, answer.headers["location"]) == (303, "/login?signed_out")
    assert cleared(answer) >= {COOKIE, REFRESH}
    assert len(kept(home_of(outpost))) == 1
    assert "signed out" in browser.get("/login?signed_out").text
    removable.bring_back()
    assert browser.get("/account").status_code == 303


@pytest.mark.parametrize("path", ["/api/logout", "/logout"])
def test_a_sign_out_that_cannot_be_kept_is_503_with_the_cookies_cleared(outpost: Outpost, path: str) -> None:
    site, _ = outpost
    site.add_user()
    browser = site.at_account()
    (home_of(outpost) / JOURNAL).write_text("in the way")
    take_away(outpost)
    answer = browser.post(path)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert cleared(answer) >= {COOKIE, REFRESH}
    assert "in the way" not in answer.text
    assert str(home_of(outpost)) not in answer.text


def test_ending_one_s_own_session_by_its_name_never_says_done_before_it_is(outpost: Outpost) -> None:
    """Within the lease the near copy is still believed, so the address alone does not refuse."""
    site, removable = outpost
    site.add_user()
    client = known(site)
    sid = client.get("/api/me").json()["session"]["sid"]
    removable.take_away("frozen")
    answer = client.delete(f"/api/sessions/{sid}")
    assert answer.status_code in (202, 503)


def test_a_server_that_starts_carries_out_what_the_last_one_left(make_outpost: MakeOutpost) -> None:
    outpost = site, _ = make_outpost(profile="b2c")
    site.add_user()
    client = known(site)
    cookies = dict(client.cookies)
    take_away(outpost)
    assert client.post("/api/logout").status_code == 202
    # The first one is still there, without its store, and never comes back to it.
    again, _ = make_outpost(profile="b2c", seed=b"another")
    assert kept(home_of(outpost)) == []
    other = again.client()
    other.cookies.update(cookies)
    assert other.get("/api/me").json()["reason"] == "logout"


def test_logs_and_the_audit_trail_hold_no_secret(outpost: Outpost, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    site, removable = outpost
    site.add_user(role="admin")
    client, admin = known(site), known(site)
    secrets = [client.cookies[COOKIE][20:52], client.cookies[REFRESH][28:60]]
    take_away(outpost)
    client.get("/api/me")
    client.get("/api/sessions")
    client.post("/api/logout")
    removable.bring_back()
    told = admin.get("/api/admin/events").text + caplog.text + "".join(repr(each.__dict__) for each in caplog.records)
    assert "session.sign_out_kept" in told
    for secret in secrets:
        assert secret not in told
