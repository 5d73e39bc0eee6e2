"""Session ids that were never ours: who guesses is refused for a while, and nobody else is."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from coatcheck.core.risk import CountRule
from coatcheck.server.guess_guard import GuessGuard
from coatcheck.server.guesses import MAX_NETWORKS, MAX_REFUSED, MAX_TOLD, TOLD_PERIOD, Guesses
from tests.server.conftest import COOKIE, PASSWORD, REFRESH, MakeSite, Site

GUESSER, OTHER = "198.51.100.23", "203.0.113.7"
RULES = '[id_guessing]\noutcome = "block"\nattempts = 5\nwindow = 60\nblock_for = 300\n'
FORGED = "A" * 60
AT = 1_800_000_000.0


@pytest.fixture
def guarded(make_site: MakeSite, tmp_path: Path) -> Site:
    (tmp_path / "rules.toml").write_text(RULES)
    return make_site(risk_rules=tmp_path / "rules.toml", profile="b2c", trusted_proxies=("192.0.2.1",))


def guess(site: Site, times: int = 1, *, peer: str = GUESSER, behind: str = "") -> list[int]:
    """Answers to invented ids; `behind`: what the peer says of whom it forwards."""
    forwarded = {"x-forwarded-for": behind} if behind else {}
    client = site.client(peer=peer, headers={"cookie": f"{COOKIE}={FORGED}", **forwarded})
    return [client.get("/api/me").status_code for _ in range(times)]


def moved(site: Site, browser: TestClient, *names: str) -> TestClient:
    """The same browser behind the guesser's address, with these cookies alone."""
    client = site.client(peer=GUESSER)
    for name in names:
        client.cookies.set(name, browser.cookies[name])
    return client


def decisions(site: Site) -> list[dict[str, object]]:
    site.call(site.service._trail._write)
    found = [entry.envelope for entry in site.call(site.service.audit.read, limit=1000)]
    return [dict(each["data"]) for each in found if each["type"] == "risk.decided"]


def test_whoever_guesses_is_refused_at_the_limit_for_as_long_as_the_rule_says(guarded: Site) -> None:
    assert guess(guarded, 7) == [401] * 5 + [429] * 2
    refused = guarded.client(peer=GUESSER).get("/api/me")
    assert (refused.json()["code"], refused.headers["retry-after"]) == ("throttled", "300")
    guarded.clock.advance(299.9)
    assert guess(guarded) == [429]
    guarded.clock.advance(0.1)
    assert guess(guarded) == [401]
    assert decisions(guarded) == [
        {
            "judged": "id_forged",
            "outcome": "block",
            "reasons": "id_guessing",
            "block_for": 300,
            "id_guessing.attempts": 5,
            "id_guessing.window": 60,
            "network": "198.51.100.0/24",
        }
    ]


def test_a_refused_guess_asks_no_store(guarded: Site) -> None:
    guess(guarded, 5)
    guarded.store.off = None
    assert guess(guarded, 2) == [429, 429]


def test_a_genuine_session_is_never_refused_whatever_its_neighbours_do(guarded: Site) -> None:
    guarded.add_user()
    browser = guarded.signed_in(peer=OTHER)
    token = browser.post("/api/refresh").json()["access_token"]
    guess(guarded, 6)
    assert moved(guarded, browser, COOKIE).get("/api/me").status_code == 200
    assert moved(guarded, browser, REFRESH).post("/api/refresh").status_code == 200
    bearer = guarded.client(peer=GUESSER, headers={"authorization": f"Bearer {token}"})
    assert bearer.get("/api/me").status_code == 200
    assert browser.get("/api/me").status_code == 200
    assert guess(guarded, peer=OTHER) == [401]


def test_no_credential_beside_a_forged_one_helps(guarded: Site) -> None:
    guarded.add_user()
    browser = guarded.signed_in(peer=OTHER)
    guess(guarded, 5)
    ours, refresh = browser.cookies[COOKIE], browser.cookies[REFRESH]
    for cookie in (
        f"{COOKIE}={FORGED}; {COOKIE}={ours}",
        f"{COOKIE}={ours}; {COOKIE}={FORGED}",
        f"{COOKIE}={FORGED}; {REFRESH}={refresh}",
        f"{COOKIE}={ours[:-1]}",
        "",
    ):
        assert guarded.client(peer=GUESSER, headers={"cookie": cookie}).get("/api/me").status_code == 429
    beside = guarded.client(peer=GUESSER, headers={"cookie": f"{COOKIE}={ours}", "authorization": "Bearer forged"})
    assert beside.get("/api/me").status_code == 429


def test_behind_a_guesser_only_a_browser_that_the_account_knows_signs_in(guarded: Site) -> None:
    guarded.add_user()
    browser = guarded.signed_in(peer=OTHER)
    body = {"username": "minsu", "password": PASSWORD}
    guess(guarded, 5)
    assert guarded.client(peer=GUESSER).get("/login").status_code == 200
    assert guarded.client(peer=GUESSER).post("/api/login", json=body).status_code == 429
    known = moved(guarded, browser, guarded.service.device_cookie.name)
    assert known.post("/api/login", json=body).status_code == 200
    guarded.clock.advance(300)
    assert guarded.client(peer=GUESSER).post("/api/login", json=body).status_code == 200


def test_health_and_static_files_are_always_answered(guarded: Site) -> None:
    guess(guarded, 5)
    client = guarded.client(peer=GUESSER)
    for path in ("/health/live", "/openapi.json", "/.well-known/jwks.json"):
        assert client.get(path).status_code == 200
    # No way around by a path that something else might read as one of them.
    assert client.get("/static/%2e%2e/api/me").status_code == 429
    head = client.head("/account")
    assert (head.status_code, head.content) == (429, b"")


def test_clients_behind_one_trusted_proxy_are_told_apart(guarded: Site) -> None:
    assert guess(guarded, 6, peer="192.0.2.1", behind=GUESSER) == [401] * 5 + [429]
    assert guess(guarded, peer="192.0.2.1", behind=OTHER) == [401]
    assert guess(guarded) == [429]


def test_forwarding_headers_of_a_proxy_nobody_named_refuse_nobody_behind_it(guarded: Site) -> None:
    assert guess(guarded, 9, peer="192.0.2.99", behind=OTHER) == [401] * 9
    assert guess(guarded, peer=OTHER) == [401]


def test_an_ipv6_guesser_has_one_network_of_all_its_addresses(guarded: Site) -> None:
    assert [guess(guarded, peer=f"2001:db8::{number}") for number in range(1, 7)] == [[401]] * 5 + [[429]]
    assert guess(guarded, peer="2001:db8:0:1::1") == [401]


def test_without_the_rule_nothing_stands_in_the_way_of_a_request(site: Site, guarded: Site) -> None:
    def guards(one: Site) -> bool:
        return any(each.cls is GuessGuard for each in one.app.user_middleware)  # type: ignore[comparison-overlap]

    assert (guards(site), guards(guarded)) == (False, True)
    assert not guarded.service.risk.guesses.refuses


# -- counting --------------------------------------------------------------------------------------------------------


def test_a_notice_refuses_nobody_and_is_told_once_for_a_whole_count() -> None:
    guesses = Guesses(CountRule(outcome="notify", block_for=0, attempts=3, window=60))
    told = [guesses.note("n", AT + number) is not None for number in range(7)]
    assert told == [False, False, True, False, False, True, False]
    assert not guesses.refuses


@pytest.mark.parametrize(("late", "speaks"), [(59.9, True), (60.0, False)])
def test_guesses_count_within_the_window_to_its_very_end(late: float, speaks: bool) -> None:
    guesses = Guesses(CountRule(attempts=2, window=60, block_for=10))
    assert guesses.note("n", AT) is None
    assert (guesses.note("n", AT + late) is not None) is guesses.refuses is speaks


def test_a_refusal_is_over_at_its_very_end() -> None:
    guesses = Guesses(CountRule(attempts=2, window=60, block_for=10))
    assert [guesses.note("n", AT) is not None for _ in range(2)] == [False, True]
    assert guesses.refused_until("n", AT + 9.999) == AT + 10
    assert guesses.refused_until("n", AT + 10) == 0.0
    assert not guesses.refuses


def test_what_is_counted_and_who_is_refused_is_bounded_and_the_log_is_not_flooded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    guesses = Guesses(CountRule(attempts=2, window=60, block_for=100))
    with caplog.at_level(logging.WARNING, "coatcheck.server"):
        told = sum(guesses.note(str(number // 2), AT + number / 1000) is not None for number in range(3000))
    assert told == MAX_TOLD
    assert "too many were told of lately" in caplog.text
    assert len(guesses._refused) == MAX_REFUSED
    assert guesses.refused_until("0", AT + 3) == 0.0
    assert guesses.refused_until("1499", AT + 3) > 0.0
    for number in range(MAX_NETWORKS + 10):
        guesses.note(f"n{number}", AT)
    assert len(guesses._seen) == MAX_NETWORKS
    later = AT + 3 + TOLD_PERIOD
    assert [guesses.note("late", later) is not None for _ in range(2)] == [False, True]
    assert list(guesses._refused) != []


def test_a_rule_that_is_off_counts_nothing() -> None:
    assert not Guesses(None).counts
    assert Guesses(CountRule()).counts
