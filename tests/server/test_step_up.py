"""Proving once more that it is the same person, in the server: the profile `bank` from a stolen cookie to the proof.

Where a request comes from is told by X-Forwarded-For of a trusted proxy, which every client here sits behind.
"""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import pytest
from starlette.testclient import TestClient

from coatcheck.core.binding import BindingPolicy, Surveyor
from coatcheck.events import Event
from coatcheck.places import Binding
from coatcheck.server.arrival import MARK
from coatcheck.server.texts import Language, say
from tests.server.conftest import BROWSER, CHROME, COOKIE, PASSWORD, REFRESH, MakeSite, Site
from tests.server.page_parts import Seen

HOME, AWAY, ELSEWHERE = "203.0.113.7", "198.51.100.66", "192.0.2.99"
AWAY_NETWORK = "198.51.100.0/24"
LOGIN = {"username": "minsu", "password": PASSWORD}
PROOF = {"password": PASSWORD}
BLOCK_SECONDS = 900
THIEVES = 20


@pytest.fixture
def bank(make_site: MakeSite) -> Site:
    site = make_site(profile="bank", on_limit="refuse", max_sessions=1, trusted_proxies=("127.0.0.1",))
    site.add_user()
    site.add_user("root", role="admin")
    return site


def at(site: Site, address: str, **headers: str) -> TestClient:
    return site.client(headers={"x-forwarded-for": address, "user-agent": CHROME, **headers})


def browser_at(site: Site, address: str, language: str = "en") -> TestClient:
    return at(site, address, **{"accept": BROWSER["accept"], "accept-language": language})


def copy_of(site: Site, owner: TestClient, address: str = AWAY, *, browser: bool = False) -> TestClient:
    """Another machine with every cookie and header of the owner's browser."""
    thief = browser_at(site, address) if browser else at(site, address)
    for cookie in owner.cookies.jar:
        thief.cookies.jar.set_cookie(cookie)
    return thief


def owner_of(site: Site, address: str = HOME) -> TestClient:
    owner = at(site, address)
    assert owner.post("/api/login", json=LOGIN).status_code == 200
    return owner


def code(answer: Any) -> tuple[int, str]:
    return answer.status_code, answer.json().get("code", "")


def events(site: Site, kind: str = "risk.decided") -> list[dict[str, Any]]:
    site.call(site.service._trail._write)
    entries = site.call(site.service.audit.read, limit=1000)
    return [dict(each.envelope) for each in entries if each.envelope["type"] == kind]


def ask_elsewhere(site: Site) -> None:
    """From here on another place is asked for the password rather than refused."""
    policy = BindingPolicy(network="prefix", user_agent=True, device=True, on_mismatch="step_up")
    engine: Any = site.service.coat.engine
    engine.binding = Binding(Surveyor(policy), bytes(16))


# -- the story of the bank -----------------------------------------------------------------------------------------


def test_a_copied_cookie_is_refused_at_its_first_request_and_the_owner_stays_in_after_a_proof(bank: Site) -> None:
    owner = owner_of(bank)
    before = owner.get("/api/me").json()
    thief = copy_of(bank, owner)

    refused = thief.get("/api/me")
    assert code(refused) == (403, "place_refused")
    assert refused.json()["until"] == pytest.approx(bank.clock.now_us() / 1e6 + BLOCK_SECONDS, abs=5)
    for secret in ("minsu", before["user"]["id"], before["session"]["sid"], HOME, "203.0.113"):
        assert secret not in refused.text
    assert "set-cookie" not in refused.headers

    assert code(owner.get("/api/me")) == (403, "step_up_required")
    proven = owner.post("/api/step-up", json=PROOF)
    assert proven.status_code == 200, proven.text
    assert set(proven.json()) == {"message", "session"}
    assert proven.json()["session"]["sid"] == before["session"]["sid"]
    assert owner.cookies[COOKIE] != thief.cookies[COOKIE]
    assert owner.get("/api/me").json()["user"] == before["user"]

    # The copy is dead wherever it is taken, and does not disturb anybody any more.
    for address in (AWAY, HOME, ELSEWHERE):
        assert copy_of(bank, thief, address).get("/api/me").status_code == 401
    assert owner.get("/api/me").status_code == 200
    (event,) = events(bank)
    assert (event["sid"], event["subject"]) == (before["session"]["sid"], before["user"]["id"])
    assert (event["data"]["outcome"], event["data"]["network"]) == ("block", AWAY_NETWORK)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_owner_is_led_to_the_proof_told_why_and_told_again_on_his_account(bank: Site, language: Language) -> None:
    owner = browser_at(bank, HOME, language)
    assert owner.post("/login", data=LOGIN).status_code == 303
    copy_of(bank, owner).get("/api/me")
    events(bank)

    for path, leads_to in (("/account", "/login/confirm?next=/account"), ("/", "/login")):
        sent = owner.get(path)
        assert (sent.status_code, sent.headers["location"]) == (303, leads_to)
        page = owner.get(sent.headers["location"])
        assert (page.status_code, page.headers["cache-control"]) == (200, "no-store")
        assert say("confirm.title", language) in page.text
        assert AWAY_NETWORK in page.text
        assert "<time datetime=" in page.text
        # Whose session it is nobody is told before the proof; nor does any script run.
        assert "minsu" not in page.text
        assert Seen(page.text).all("script") == []
        assert [each["name"] for each in Seen(page.text).all("input") if each.get("type") == "password"] == ["password"]

    wrong = owner.post("/login/confirm", data={"password": "not the one I know", "next": "/account"})
    assert wrong.status_code == 401
    assert say("confirm.wrong", language) in wrong.text
    right = owner.post("/login/confirm", data={"password": PASSWORD, "next": "/account"})
    assert (right.status_code, right.headers["location"]) == (303, "/account")
    account = owner.get("/account")
    assert account.status_code == 200
    assert say("account.told", language) in account.text
    assert say("told.block", language, place=AWAY_NETWORK) in account.text


def test_a_refused_browser_is_told_how_long_and_may_only_sign_in_anew(bank: Site) -> None:
    owner = owner_of(bank)
    bank.add_user("jiwoo")
    thief = copy_of(bank, owner, browser=True)
    for path in ("/", "/account"):
        sent = thief.get(path)
        assert (sent.status_code, sent.headers["location"].partition("?")[0]) == (303, "/login")
    page = thief.get("/login")
    assert page.status_code == 200
    assert say("refused_here.text", "en", count=15) in page.text
    assert say("confirm.title", "en") not in page.text
    for secret in ("minsu", HOME, "203.0.113"):
        assert secret not in page.text
    bank.clock.advance(120)
    assert say("refused_here.text", "en", count=13) in thief.get("/login").text
    # No way round by the page of the proof.
    assert thief.get("/login/confirm").headers["location"] == "/login"
    assert thief.post("/login/confirm", data=PROOF).headers["location"] == "/login"
    # Somebody else who sits there can still use the place.
    assert thief.post("/login", data={"username": "jiwoo", "password": PASSWORD}).status_code == 303
    assert "jiwoo" in thief.get("/account").text
    assert code(owner.get("/api/me")) == (403, "step_up_required"), "the owner's own session goes on"


def test_of_many_first_requests_at_once_all_are_refused_and_one_event_tells_of_it(bank: Site) -> None:
    owner = owner_of(bank)
    thieves = [copy_of(bank, owner) for _ in range(THIEVES)]
    gate = Barrier(THIEVES)

    def first_request(thief: TestClient) -> tuple[int, str]:
        gate.wait()
        return code(thief.get("/api/me"))

    with ThreadPoolExecutor(THIEVES) as pool:
        assert set(pool.map(first_request, thieves)) == {(403, "place_refused")}
    assert len(events(bank)) == 1


def test_a_refused_place_cannot_prove_anything_not_even_with_the_password(bank: Site) -> None:
    # The attack: whoever has the cookie guesses the password by the proof, or keeps the owner out of it by guessing.
    owner = owner_of(bank)
    thief = copy_of(bank, owner)
    for typed in (PASSWORD, *["guess number one or so"] * 15):
        assert code(thief.post("/api/step-up", json={"password": typed})) == (403, "place_refused")
    assert events(bank, "login.failed") == []
    assert owner.post("/api/step-up", json=PROOF).status_code == 200


def test_signing_out_is_open_to_who_is_asked_for_a_proof(bank: Site) -> None:
    owner = browser_at(bank, HOME)
    owner.post("/login", data=LOGIN)
    copy_of(bank, owner).get("/api/me")
    assert 'action="/logout"' in owner.get("/login").text
    assert owner.post("/logout").headers["location"] == "/login?signed_out"
    again = at(bank, ELSEWHERE)
    assert again.post("/api/login", json=LOGIN).status_code == 200, "the session is over, so the limit has room"


# -- the proof itself ----------------------------------------------------------------------------------------------


def test_whoever_is_signed_in_may_prove_himself_at_any_time_and_every_copy_is_dead(site: Site) -> None:
    site.add_user()
    owner = site.signed_in()
    old = copy_of(site, owner)
    assert owner.post("/api/step-up", json=PROOF).status_code == 200
    assert owner.get("/api/me").status_code == 200
    assert old.get("/api/me").status_code == 401
    browser = site.at_account()
    assert say("confirm.again", "en") in browser.get("/login/confirm").text
    assert browser.post("/login/confirm", data=PROOF).headers["location"] == "/account"
    assert browser.post("/login/confirm", data={**PROOF, "next": "//evil.example"}).headers["location"] == "/account"


def test_nobody_and_an_access_token_have_nothing_to_prove(b2c: Site) -> None:
    b2c.add_user()
    assert code(b2c.client().post("/api/step-up", json=PROOF)) == (401, "login_required")
    signed = b2c.client().post("/api/login", json=LOGIN).json()
    bearer = {"authorization": f"Bearer {signed['access_token']}"}
    assert code(b2c.client().post("/api/step-up", json=PROOF, headers=bearer)) == (403, "forbidden")


@pytest.mark.parametrize("body", [{}, {"password": 7}, {"password": "x", "more": 1}, [], "x"])
def test_a_body_that_is_no_proof_is_refused(site: Site, body: object) -> None:
    site.add_user()
    assert code(site.signed_in().post("/api/step-up", json=body)) == (400, "bad_request")


@pytest.mark.parametrize("typed", ["", "wrong wrong wrong wrong", "\x00", "x" * 5000, "\ud800"])
def test_what_cannot_be_the_password_is_simply_wrong(site: Site, typed: str) -> None:
    site.add_user()
    client = site.signed_in()
    body = json.dumps({"password": typed}).encode()
    answer = client.post("/api/step-up", content=body, headers={"content-type": "application/json"})
    assert code(answer) in ((401, "invalid_credentials"), (400, "bad_request"))
    assert client.get("/api/me").status_code == 200


def test_guessing_is_slowed_in_a_bucket_of_the_session_and_the_door_stays_open(site: Site) -> None:
    user = site.add_user()
    client = site.signed_in()
    wrong = {"password": "not the one at all"}
    limit = site.service.throttle.unknown_devices.attempts
    for _ in range(limit):
        assert code(client.post("/api/step-up", json=wrong)) == (401, "invalid_credentials")
    waiting = client.post("/api/step-up", json=PROOF)
    assert code(waiting) == (429, "throttled")
    assert int(waiting.headers["retry-after"]) > 0
    # The form of the password is the same door.
    changing = {"current": PASSWORD, "new": "seven brittle umbrellas hum"}
    assert code(client.post("/api/password", json=changing)) == (429, "throttled")
    assert client.post("/api/login", json=LOGIN).status_code == 200
    assert {each["subject"] for each in events(site, "login.failed")} == {user.id}


def test_a_right_password_clears_what_was_counted(site: Site) -> None:
    site.add_user()
    client = site.signed_in()
    tries = site.service.throttle.unknown_devices.attempts - 1
    for _ in range(2):
        for _ in range(tries):
            assert client.post("/api/step-up", json={"password": "not the one at all"}).status_code == 401
        assert client.post("/api/step-up", json=PROOF).status_code == 200


def test_an_account_that_is_disabled_meanwhile_proves_nothing(bank: Site) -> None:
    owner = owner_of(bank)
    copy_of(bank, owner).get("/api/me")
    accounts: Any = bank.accounts.part
    looked = []

    async def get(user_id: str) -> object:
        found = await accounts.get(user_id)
        looked.append(user_id)
        # Between the password and the last look at the account.
        return found if len(looked) == 1 else replace(found, disabled_us=1)

    class Meanwhile:
        def __getattr__(self, name: str) -> object:
            return get if name == "get" else getattr(accounts, name)

    bank.accounts.part = Meanwhile()
    assert code(owner.post("/api/step-up", json=PROOF)) == (401, "invalid_credentials")
    assert len(looked) == 2
    bank.accounts.part = accounts
    assert owner.get("/api/me").status_code == 401


def test_a_proof_whose_last_look_at_the_account_fails_lets_nobody_in(bank: Site) -> None:
    owner = owner_of(bank)
    copy_of(bank, owner).get("/api/me")
    bank.accounts.off = frozenset({"clear_failures"})
    assert owner.post("/api/step-up", json=PROOF).status_code == 503
    bank.accounts.off = frozenset()
    assert owner.get("/api/me").status_code == 401


def test_of_many_proofs_at_once_none_leaves_two_cookies_alive(bank: Site) -> None:
    owner = owner_of(bank)
    copy_of(bank, owner).get("/api/me")
    tabs = [copy_of(bank, owner, HOME) for _ in range(4)]
    gate = Barrier(len(tabs))

    def prove(tab: TestClient) -> int:
        gate.wait()
        return tab.post("/api/step-up", json=PROOF).status_code

    with ThreadPoolExecutor(len(tabs)) as pool:
        done = list(pool.map(prove, tabs))
    assert done.count(200) == 1, done
    assert sum(tab.get("/api/me").status_code == 200 for tab in tabs) == 1


# -- another place that is asked rather than refused ---------------------------------------------------------------


def test_another_place_that_is_asked_is_told_nothing_of_the_owner_and_gets_in_by_the_password(bank: Site) -> None:
    owner = owner_of(bank)
    first = copy_of(bank, owner, ELSEWHERE)
    first.get("/api/me")
    assert owner.post("/api/step-up", json=PROOF).status_code == 200
    ask_elsewhere(bank)
    traveller = copy_of(bank, owner, browser=True)
    assert traveller.get("/account").headers["location"] == "/login/confirm?next=/account"
    page = traveller.get("/login/confirm").text
    events(bank)
    assert page == traveller.get("/login/confirm").text, "also when the log has it"
    assert say("confirm.elsewhere", "en") in page
    for told in ("minsu", "192.0.2", "203.0.113", "198.51.100"):
        assert told not in page
    assert traveller.post("/login/confirm", data=PROOF).status_code == 303
    assert traveller.get("/account").status_code == 200
    assert owner.get("/api/me").status_code == 401, "the one before has the old cookie"


# -- arriving from another site ------------------------------------------------------------------------------------

FROM_ANOTHER_SITE = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.mark.parametrize(
    ("path", "again"),
    [
        ("/login", f"/login?{MARK}"),
        ("/account", f"/account?{MARK}"),
        ("/login?next=/account", f"/login?next=/account&{MARK}"),
        ('/login?next="><script>', f"/login?next=%22%3E%3Cscript%3E&{MARK}"),
        ("/setup/a%22b%3Cc", f"/setup/a%22b%3Cc?{MARK}"),
        ("/login?;url=//evil.example", f"/login?;url=//evil.example&{MARK}"),
    ],
)
def test_whoever_comes_from_another_site_without_the_strict_cookie_looks_again_from_here(
    bank: Site, path: str, again: str
) -> None:
    page = browser_at(bank, HOME).get(path, headers=FROM_ANOTHER_SITE)
    assert page.status_code == 200
    seen = Seen(page.text)
    (refresh,) = [each["content"] for each in seen.all("meta") if each.get("http-equiv") == "refresh"]
    assert refresh == f"0; url={again}"
    assert again in [each.get("href") for each in seen.all("a")]
    assert seen.all("script") == []


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {**FROM_ANOTHER_SITE, "sec-fetch-mode": "cors"},
        {**FROM_ANOTHER_SITE, "cookie": f"{COOKIE}=x"},
    ],
)
def test_nobody_else_is_kept_waiting(bank: Site, headers: dict[str, str]) -> None:
    page = browser_at(bank, HOME).get("/login", headers=headers)
    assert say("sign_in.title", "en") in page.text
    assert "http-equiv" not in page.text


def test_it_happens_once_and_where_the_cookie_is_strict_alone(bank: Site, site: Site) -> None:
    arriving = browser_at(bank, HOME).get(f"/login?{MARK}", headers=FROM_ANOTHER_SITE)
    assert "http-equiv" not in arriving.text
    assert "http-equiv" not in site.browser().get("/login", headers=FROM_ANOTHER_SITE).text
    assert bank.client().get("/api/me", headers=FROM_ANOTHER_SITE).status_code == 401


# -- what the owner is told ----------------------------------------------------------------------------------------


def test_the_account_is_shown_also_while_nobody_can_tell_what_happened(site: Site) -> None:
    site.add_user()
    browser = site.at_account()
    assert say("account.told", "en") not in browser.get("/account").text, "nothing has happened"
    site.call(site.service.database.fetch, "alter table {namespace}_audit rename to {namespace}_gone")
    page = browser.get("/account")
    assert page.status_code == 200
    assert say("account.told_missing", "en") in page.text
    site.call(site.service.database.fetch, "alter table {namespace}_gone rename to {namespace}_audit")


def test_nobody_is_told_what_happened_to_somebody_else(site: Site) -> None:
    site.add_user()
    other = site.add_user("jiwoo")
    data = {"judged": "request", "outcome": "block", "network": AWAY_NETWORK}
    site.call(
        site.service.audit.append,
        [Event(kind="risk.decided", at=site.clock.now_us() / 1e6, subject=other.id, data=data)],
    )
    assert AWAY_NETWORK not in site.at_account("minsu").get("/account").text
    assert re.search(r"refused there: 198\.51\.100\.0/24", site.at_account("jiwoo").get("/account").text)


@pytest.fixture
def watched(make_site: MakeSite) -> Site:
    """Tokens, and places that are refused: a profile that somebody made of two."""
    made = make_site(
        profile="b2c",
        outage="refuse",
        bind_network="prefix",
        on_mismatch="block",
        trusted_proxies=("127.0.0.1",),
    )
    made.add_user()
    return made


def test_a_copied_refresh_token_is_dead_after_the_proof_and_the_owner_has_a_new_one(watched: Site) -> None:
    owner = owner_of(watched)
    thief = copy_of(watched, owner, "203.0.113.99")
    del thief.cookies[COOKIE]
    watched.clock.advance(120)
    proven = owner.post("/api/step-up", json=PROOF)
    assert proven.status_code == 200
    assert proven.json()["access_token"]
    # Same network, same browser by all that can be seen: only the token itself tells.
    for way in ("/api/exchange", "/api/refresh"):
        refused = thief.post(way)
        assert (refused.status_code, refused.json()["code"]) == (401, "refresh_invalid")
    assert owner.post("/api/refresh").status_code == 200
    assert owner.get("/api/me").status_code == 200


def test_a_refresh_that_was_refused_does_not_make_a_thief_of_the_owner_who_proves_himself(watched: Site) -> None:
    owner = owner_of(watched)
    thief = copy_of(watched, owner)
    del thief.cookies[REFRESH]
    watched.clock.advance(120)
    # The copy is refused, and its owner is asked for a proof from now on.
    assert thief.get("/api/me").status_code == 403
    for _ in range(3):
        refused = owner.post("/api/refresh")
        assert (refused.status_code, refused.json()["code"]) == (403, "step_up_required")
        # Longer than the grace of a token that was consumed.
        watched.clock.advance(120)
    assert owner.post("/api/step-up", json=PROOF).status_code == 200
    watched.clock.advance(120)
    assert owner.post("/api/refresh").status_code == 200
    assert owner.get("/api/me").status_code == 200


def test_a_client_without_cookies_is_not_looked_for_by_a_cookie_it_was_never_given(make_site: MakeSite) -> None:
    site = make_site(profile="b2c", on_mismatch="step_up")
    site.add_user()
    token = site.client().post("/api/login", json={**LOGIN, "carrier": "body"}).json()["refresh_token"]
    site.clock.advance(120)
    answer = site.client().post("/api/refresh", json={"carrier": "body", "refresh_token": token})
    assert answer.status_code == 200, answer.text
    assert events(site) == []


def test_the_page_hands_out_the_new_refresh_token_as_well(watched: Site) -> None:
    owner = watched.browser(**{"x-forwarded-for": HOME})
    assert owner.post("/login", data=LOGIN).status_code == 303
    before = owner.cookies[REFRESH]
    watched.clock.advance(120)
    assert owner.post("/login/confirm", data=PROOF).status_code == 303
    assert owner.cookies[REFRESH] != before
    assert owner.post("/api/refresh").status_code == 200
