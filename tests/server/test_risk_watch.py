"""The rules about risk at work: who is told, who is refused, who never is, and that a replay decides the same."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from coatcheck.core.geo import NOWHERE, Location
from coatcheck.core.risk import History, parse_rules
from coatcheck.errors import ConfigurationError, SignInBlocked, StoreUnavailable
from coatcheck.events import Event
from coatcheck.server.risk_history import Kept
from coatcheck.server.risk_rules import MAX_OCTETS, NO_RULES, PROFILE_RULES, read_rules, rules_of
from coatcheck.server.risk_watch import MAX_TRIES, RiskWatch, shown_network
from coatcheck.server.settings import ServerSettings
from coatcheck.settings import Settings
from tests.server.command_parts import answer
from tests.server.conftest import COOKIE, PASSWORD, REFRESH, MakeSite, Site

SEOUL, BUSAN, PARIS = "203.0.113.7", "203.0.113.99", "198.51.100.23"
LOGIN = {"username": "minsu", "password": PASSWORD}
WRONG = {"username": "minsu", "password": "wrong wrong wrong wrong"}

Ruled = Callable[..., Site]


class Table:
    """Two networks that a table of addresses knows."""

    def locate(self, address: str) -> Location:
        if address.startswith("203.0.113."):
            return Location(country="KR", position=(37.5665, 126.978), asn=64496)
        if address.startswith("198.51.100."):
            return Location(country="FR", position=(48.8566, 2.3522), asn=64497)
        return NOWHERE


@pytest.fixture
def ruled(make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ruled:
    """`ruled(text)` starts a server with these rules, a table of addresses and an account."""
    sessions = ServerSettings.sessions

    def with_table(settings: ServerSettings, server_key: bytes | None, **_: object) -> Settings:
        return replace(sessions(settings, server_key), geography=Table())

    def make(text: str, **settings: Any) -> Site:
        monkeypatch.setattr(ServerSettings, "sessions", with_table)
        file = tmp_path / "rules.toml"
        file.write_text(text, "utf-8")
        site = make_site(risk_rules=file, **settings)
        site.add_user()
        return site

    return make


def at(site: Site, peer: str, like: TestClient | None = None) -> TestClient:
    """A visitor at this address; with `like` it is the same browser, which has moved."""
    client = site.client(peer=peer)
    if like is not None:
        client.cookies.update(like.cookies)
    return client


def signs_in(client: TestClient, body: dict[str, str] | None = None) -> int:
    return client.post("/api/login", json=body or LOGIN).status_code


def log_of(site: Site, kind: str = "risk.decided") -> list[dict[str, Any]]:
    """The audit log's events of one kind, as of now."""
    site.call(site.service.risk.settle)
    site.call(site.service._trail._write)
    found = [dict(entry.envelope) for entry in site.call(site.service.audit.read, limit=1000)]
    return [each for each in found if each["type"] == kind]


def decided(site: Site) -> list[tuple[str, str, str]]:
    """What was judged, what followed, and why."""
    found = [each["data"] for each in log_of(site)]
    return [(each["judged"], each["outcome"], each["reasons"]) for each in found]


# -- told ------------------------------------------------------------------------------------------------------------


def test_a_second_browser_is_told_once_and_the_first_is_not(site: Site) -> None:
    user = site.add_user()
    first, second = at(site, SEOUL), at(site, PARIS)
    assert [signs_in(each) for each in (first, second, first, second)] == [200] * 4
    [told] = log_of(site)
    assert told["subject"] == user.id
    assert told["data"] == {
        "judged": "sign_in",
        "outcome": "notify",
        "reasons": "new_device",
        "new_device.known": 1,
        "network": "198.51.100.0/24",
    }


def test_a_sign_in_tells_what_a_replay_needs_and_no_cookie(ruled: Ruled) -> None:
    site = ruled("")
    client = at(site, SEOUL)
    assert signs_in(client) == 200
    [event] = log_of(site, "session.signed_in")
    device = event["data"].pop("device")
    assert event["data"] == {"network": SEOUL, "country": "KR"}
    text = json.dumps(event)
    assert len(device) == 24
    assert all(value not in text and device not in value for value in client.cookies.values())


def test_a_browser_that_is_known_writes_nothing_and_one_without_rules_reads_nothing(
    ruled: Ruled, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ruled("[new_device]\n")
    client = at(site, SEOUL)
    assert signs_in(client) == 200
    asked: list[str] = []
    fetch = site.service.database.fetch

    async def noted(sql: str, *parameters: Any) -> Any:
        if "risk_history" in sql:
            asked.append(sql.split()[0])
        return await fetch(sql, *parameters)

    monkeypatch.setattr(site.service.database, "fetch", noted)
    assert signs_in(client) == 200
    assert client.get("/api/me").status_code == 200
    assert asked == ["select"]
    watch = site.service.risk
    off = RiskWatch(site.service.coat, watch._histories, rules=NO_RULES, system=site.clock)
    site.call(off.admit, "ann", address=SEOUL, device="a", known=False)
    site.call(off.note_failure, "ann", named="ann", address=SEOUL)
    assert asked == ["select"]


def test_a_cookie_from_before_the_history_began_is_no_new_browser(site: Site) -> None:
    site.add_user()
    old, new = at(site, SEOUL), at(site, SEOUL)
    assert [signs_in(old), signs_in(new)] == [200, 200]
    site.call(site.service.database.fetch, "delete from {namespace}_risk_history")
    assert [signs_in(new), signs_in(old)] == [200, 200]
    assert decided(site) == [("sign_in", "notify", "new_device")]


def test_a_device_cookie_of_another_account_is_worth_nothing(site: Site) -> None:
    site.add_user()
    site.add_user("thief")
    thief = at(site, PARIS)
    assert signs_in(at(site, SEOUL)) == 200
    assert signs_in(thief, {**LOGIN, "username": "thief"}) == 200
    assert signs_in(thief) == 200
    assert decided(site) == [("sign_in", "notify", "new_device")]


def test_of_many_sign_ins_at_once_that_are_new_in_one_way_exactly_one_is_told(ruled: Ruled) -> None:
    site = ruled('[new_country]\noutcome = "step_up"\n')
    home = at(site, SEOUL)
    assert signs_in(home) == 200
    moved = [at(site, PARIS, home) for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(signs_in, moved)) == [200] * 6
    assert decided(site) == [("sign_in", "step_up", "new_country")]


# -- refused ---------------------------------------------------------------------------------------------------------

ABROAD = '[new_country]\noutcome = "block"\nblock_for = 900\n'


def test_a_thief_with_the_password_is_refused_for_a_while_and_the_owner_never_is(ruled: Ruled) -> None:
    site = ruled(ABROAD)
    owner, thief = at(site, SEOUL), at(site, PARIS)
    assert signs_in(owner) == 200
    refused = thief.post("/api/login", json=LOGIN)
    assert (refused.status_code, refused.json()["code"]) == (403, "sign_in_blocked")
    assert refused.headers["retry-after"] == "900"
    assert "set-cookie" not in refused.headers
    # Not by signing in to another account of his first, and not by waiting for less than the whole time.
    site.add_user("thief")
    assert signs_in(thief, {**LOGIN, "username": "thief"}) == 200
    site.clock.advance(899.5)
    again = thief.post("/api/login", json=LOGIN)
    assert (again.status_code, again.headers["retry-after"]) == (403, "1")
    assert decided(site) == [("sign_in", "block", "new_country")]
    assert owner.get("/api/me").status_code == 200
    # The owner on a journey: told, let in, and the thief's refusal stands.
    assert signs_in(at(site, PARIS, owner)) == 200
    assert decided(site)[1:] == [("sign_in", "step_up", "new_country")]
    assert signs_in(thief) == 403
    site.clock.advance(0.5)
    assert signs_in(thief) == 200
    assert len(log_of(site, "session.signed_in")) == 4
    assert [each["data"]["why"] for each in log_of(site, "login.failed")] == ["blocked"] * 3


def test_a_refusal_tells_nothing_to_who_has_not_the_password(ruled: Ruled) -> None:
    site = ruled(ABROAD)
    assert signs_in(at(site, SEOUL)) == 200
    thief = at(site, PARIS)
    before = thief.post("/api/login", json=WRONG)
    assert signs_in(thief) == 403
    after, nobody = (thief.post("/api/login", json={**WRONG, "username": name}) for name in ("minsu", "nobody"))
    assert before.status_code == after.status_code == nobody.status_code == 401
    assert before.content == after.content == nobody.content


@pytest.mark.parametrize(
    ("language", "told", "wrong"),
    [
        ("en", "Signing in from here is refused for 15 min. A browser you have used before can sign in.", "attempts"),
        (
            "ko",
            "여기에서는 15분 동안 로그인할 수 없습니다. 전에 로그인한 적이 있는 브라우저에서는 로그인할 수 있습니다.",
            "시도",
        ),
    ],
)
def test_the_page_says_how_long_it_refuses_and_blames_nobody_for_trying_often(
    ruled: Ruled, language: str, told: str, wrong: str
) -> None:
    site = ruled(ABROAD)
    assert signs_in(at(site, SEOUL)) == 200
    browser = at(site, PARIS)
    browser.headers.update({"accept": "text/html", "accept-language": language})
    refused = browser.post("/login", data=LOGIN)
    assert (refused.status_code, refused.headers["retry-after"]) == (403, "900")
    assert told in refused.text
    assert wrong not in refused.text
    assert COOKIE not in browser.cookies


def test_forwarding_headers_of_nobody_in_particular_make_no_place(ruled: Ruled) -> None:
    # Behind a proxy that nobody named everybody has its address: that must refuse nobody.
    site = ruled(ABROAD)
    assert signs_in(at(site, SEOUL)) == 200
    stranger = at(site, PARIS)
    stranger.headers["x-forwarded-for"] = SEOUL
    assert signs_in(stranger) == 200
    assert decided(site) == []


VELOCITY = '[velocity]\noutcome = "block"\nblock_for = 900\nattempts = 4\nwindow = 600\n'


def test_failures_slow_unknown_browsers_and_never_the_owners_own(ruled: Ruled) -> None:
    site = ruled(VELOCITY)
    owner = at(site, SEOUL)
    assert signs_in(owner) == 200
    guesser = at(site, PARIS)
    assert [signs_in(guesser, WRONG) for _ in range(3)] == [401] * 3
    assert decided(site) == [("sign_in_failed", "block", "velocity")]
    assert signs_in(at(site, BUSAN)) == 403
    assert signs_in(owner) == 200
    assert owner.get("/api/me").status_code == 200
    # He goes on guessing for as long as it lasts, and it does not last longer for that.
    site.clock.advance(450)
    assert [signs_in(guesser, WRONG) for _ in range(3)] == [401] * 3
    site.clock.advance(450)
    assert signs_in(at(site, BUSAN)) == 200
    assert len(decided(site)) == 1


def test_unlocking_an_account_lets_unknown_browsers_in_at_once(ruled: Ruled) -> None:
    site = ruled(VELOCITY)
    assert signs_in(at(site, SEOUL)) == 200
    guesser = at(site, PARIS)
    assert [signs_in(guesser, WRONG) for _ in range(3)] == [401] * 3
    assert signs_in(at(site, BUSAN)) == 403
    answer("user", "unlock", "minsu", "--home", str(site.service.settings.home))
    assert signs_in(at(site, BUSAN)) == 200
    assert len(decided(site)) == 1


def test_a_name_that_nobody_has_asks_the_database_as_much_as_one_that_somebody_has(
    ruled: Ruled, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ruled(VELOCITY)
    asked: list[str] = []
    fetch = site.service.database.fetch

    async def noted(sql: str, *parameters: Any) -> Any:
        if "risk_history" in sql:
            asked.append(sql)
        return await fetch(sql, *parameters)

    monkeypatch.setattr(site.service.database, "fetch", noted)

    def statements(name: str) -> list[str]:
        asked.clear()
        signs_in(at(site, PARIS), {**WRONG, "username": name})
        return list(asked)

    for _ in range(5):
        assert statements("minsu") == statements("nobody") != []
    assert len(decided(site)) == 1
    # A refusal stands, and nothing is counted: that must not be told from a name that was never tried.
    assert len(statements("minsu")) == len(statements("somebody else")) == 2


def test_revoke_ends_all_other_sessions_and_lets_the_new_one_in(ruled: Ruled) -> None:
    site = ruled('[new_country]\noutcome = "revoke"\n')
    one, two = at(site, SEOUL), at(site, BUSAN)
    assert [signs_in(one), signs_in(two)] == [200, 200]
    moved = at(site, PARIS, one)
    assert signs_in(moved) == 200
    assert moved.get("/api/me").status_code == 200
    for each in (one, two):
        refused = each.get("/api/me")
        assert (refused.status_code, refused.json()["reason"]) == (401, "unusual_sign_in")
    assert decided(site) == [("sign_in", "revoke", "new_country")]


def test_failures_end_no_session(ruled: Ruled) -> None:
    site = ruled('[velocity]\noutcome = "revoke"\nattempts = 2\nblock_for = 60\n')
    owner = at(site, SEOUL)
    assert signs_in(owner) == 200
    assert signs_in(at(site, PARIS), WRONG) == 401
    [told] = log_of(site)
    assert (told["data"]["outcome"], told["data"]["instead_of"]) == ("block", "revoke")
    assert owner.get("/api/me").status_code == 200


def test_travel_faster_than_an_airliner_is_told_and_the_operator_is_the_limit(ruled: Ruled) -> None:
    site = ruled("[impossible_travel]\n")
    browser = at(site, SEOUL)
    assert signs_in(browser) == 200
    site.clock.advance(9 * 3600)
    assert signs_in(at(site, PARIS, browser)) == 200
    site.clock.advance(11 * 3600)
    assert signs_in(browser) == 200
    assert decided(site) == [("sign_in", "step_up", "impossible_travel")]


def test_a_refresh_token_that_comes_again_refuses_new_browsers_for_a_while(ruled: Ruled) -> None:
    site = ruled('[refresh_reuse]\noutcome = "block"\nblock_for = 60\n', profile="b2c", reuse_grace=timedelta(0))
    owner = at(site, SEOUL)
    assert signs_in(owner) == 200
    copied = owner.cookies[REFRESH]
    site.clock.advance(60)
    assert owner.post("/api/refresh").status_code == 200
    site.clock.advance(60)
    thief = at(site, PARIS)
    thief.cookies.set(REFRESH, copied)
    assert thief.post("/api/refresh").json()["code"] == "refresh_reused"
    assert decided(site) == [("refresh_reused", "block", "refresh_reuse")]
    assert signs_in(at(site, BUSAN)) == 403
    assert signs_in(owner) == 200
    site.clock.advance(60)
    assert signs_in(at(site, BUSAN)) == 200


def test_what_would_end_sessions_is_owed_while_the_store_is_away(ruled: Ruled) -> None:
    site = ruled('[new_country]\noutcome = "revoke"\n')
    home = at(site, SEOUL)
    assert signs_in(home) == 200
    site.store.off = frozenset({"revoke_owner", "revoke_all", "revoke_subject"})
    moved = at(site, PARIS, home)
    assert signs_in(moved) == 503
    site.store.off = frozenset()
    site.call(site.service.coat.engine.maintain)
    assert home.get("/api/me").status_code == 401


# -- many at once, and a database that does not answer ---------------------------------------------------------------


class Contended:
    """Histories that somebody else always writes first."""

    def __init__(self) -> None:
        self.tries = 0

    async def read(self, subject: str) -> Kept:
        return Kept(history=History(devices=("a",), countries=("KR",)), version=self.tries + 1)

    async def replace(self, subject: str, history: History, *, read: Kept) -> bool:
        self.tries += 1
        return False


@pytest.mark.parametrize(("outcome", "fails"), [("notify", False), ("step_up", True)])
def test_a_decision_that_cannot_be_written_fails_closed_where_it_does_more_than_tell(
    site: Site, outcome: str, fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    contended: Any = Contended()
    rules = parse_rules({"new_device": {"outcome": outcome}})
    watch = RiskWatch(site.service.coat, contended, rules=rules, system=site.clock)
    with caplog.at_level(logging.WARNING, "coatcheck.server"):
        if fails:
            with pytest.raises(StoreUnavailable):
                site.call(watch.admit, "ann", address=SEOUL, device="b", known=False)
        else:
            site.call(watch.admit, "ann", address=SEOUL, device="b", known=False)
            assert "too many of one account at once" in caplog.text
    assert contended.tries == MAX_TRIES


def test_an_event_about_nobody_is_no_reuse(ruled: Ruled) -> None:
    site = ruled("[refresh_reuse]\n[id_guessing]\n")

    async def hear() -> None:
        site.service.risk.hear(Event(kind="refresh.reused", at=0.0))
        site.service.risk.hear(Event(kind="session_id.forged", at=0.0, data={"octets": 3}))
        site.service.risk.hear(Event(kind="session.created", at=0.0))

    site.call(hear)
    assert decided(site) == []


def test_a_network_is_shown_without_the_last_part_of_its_address() -> None:
    assert shown_network("203.0.113.7") == "203.0.113.0/24"
    assert shown_network("2001:db8::1:2:3:4") == "2001:db8::/64"


def test_the_error_says_how_long() -> None:
    assert (SignInBlocked(3).status, SignInBlocked(3).retry_after) == (403, 3)


# -- rules -----------------------------------------------------------------------------------------------------------


def test_a_profile_has_rules_until_a_file_takes_their_place(tmp_path: Path) -> None:
    assert rules_of("admin", None) == rules_of("b2c", None) == parse_rules({"new_device": {"outcome": "notify"}})
    assert rules_of("microservices", None) == NO_RULES
    bank = PROFILE_RULES["bank"]
    assert bank.new_device is not None
    assert bank.new_country is not None
    assert bank.impossible_travel is not None
    assert bank.velocity is None
    file = tmp_path / "rules.toml"
    file.write_text("[velocity]\n")
    assert rules_of("bank", file) == parse_rules({"velocity": {}})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        (b"\xff", "is no TOML"),
        (b"[velocity", "is no TOML"),
        (b"#" * (MAX_OCTETS + 1), "is larger than"),
        (b"a = " + b"[" * 5000, "is no TOML"),
        (b"[moons]", "risk.moons: no rule of this name"),
    ],
)
def test_a_file_of_rules_that_cannot_be_used_stops_the_start_with_its_name(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "rules.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        read_rules(file)
    assert told in refused.value.detail


# -- a replay decides what was decided -------------------------------------------------------------------------------

EVERY_RULE = """
[new_device]
[new_country]
outcome = "block"
block_for = 120
[impossible_travel]
[velocity]
attempts = 6
window = 300
block_for = 200
"""


def test_a_replay_of_what_happened_gives_the_decisions_that_were_taken(
    ruled: Ruled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = ruled(EVERY_RULE)
    owner, thief = at(site, SEOUL), at(site, PARIS)

    def step(client: TestClient, expected: int, pause: float) -> None:
        assert signs_in(client, WRONG if expected == 401 else LOGIN) == expected
        site.clock.advance(pause)

    step(owner, 200, 60)
    step(at(site, BUSAN), 200, 60)
    step(thief, 403, 10)
    step(thief, 403, 200)
    step(owner, 200, 5)
    step(at(site, PARIS, owner), 200, 300)
    for _ in range(6):
        step(thief, 401, 5)
    step(at(site, BUSAN), 403, 1)
    step(owner, 200, 300)
    step(at(site, BUSAN), 200, 1)
    happened = [(round(each["at"], 3), {**each["data"], "network": None}) for each in log_of(site)]
    assert [(each["judged"], each["outcome"], each["reasons"]) for _, each in happened] == [
        ("sign_in", "notify", "new_device"),
        ("sign_in", "block", "new_device new_country impossible_travel"),
        ("sign_in", "step_up", "new_country impossible_travel"),
        ("sign_in_failed", "block", "velocity"),
        ("sign_in", "step_up", "impossible_travel"),
        ("sign_in", "notify", "new_device"),
    ]
    monkeypatch.setattr("coatcheck.server.geo_file.geography_of", lambda files: nullcontext(Table()))
    home, rules = str(site.service.settings.home), str(tmp_path / "rules.toml")
    done = answer("risk", "replay", "--home", home, "--rules", rules, "--geo", "city.mmdb")
    about = {"position", "at", "sid", "subject"}
    replayed = [
        (round(each["at"], 3), {"network": None, **{name: each[name] for name in each if name not in about}})
        for each in done["decisions"]
    ]
    assert replayed == happened
    assert (done["refused"], done["more"]) == (2, False)
