"""A page of the `b2c` profile keeps its login: two tabs at one moment, a tab closed, an answer lost, a session ended.

A real server process, a real Chromium, and between them a relay that holds, swallows or cuts what it carries. Nothing
waits for time to pass: tokens are made older in the server's own database, one statement in place of 31 seconds, so
that the next refresh is a real rotation under the default grace of 30. What the server did is read from its /metrics.
"""

from __future__ import annotations

import contextlib
import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from http.cookies import SimpleCookie
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

import coatcheck.server
from coatcheck.server.texts import Language, say, say_reason
from tests.browser.conftest import NAME, PASSWORD, Served
from tests.browser.test_first_steps import sign_in
from tests.servers.ports import free_port
from tests.servers.processes import Child, until
from tests.servers.relay import Relay

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Response

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser-tokens")]

OpenContext = Callable[..., "BrowserContext"]

REFRESH = "**/api/refresh"
OTHER = "minsu"
ROUNDS = 50
GRACE = 30
REFRESH_COOKIE = "coatcheck_refresh"
SCRIPTS = Path(coatcheck.server.__file__).parent / "static"
NO_LOCKS = "Object.defineProperty(navigator, 'locks', { value: undefined });"


@dataclass(frozen=True, kw_only=True)
class Site(Served):
    """A server behind a relay. `port` is its own, past the relay."""

    home: Path
    port: int
    relay: Relay

    def ask(self, method: str, path: str, *, bearer: str = "", body: object = None) -> tuple[int, Any]:
        """A program that is no browser, past the relay: status, and JSON or text."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=10)
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            is_json = "json" in answer.headers.get_content_type()
            return answer.status, json.loads(text) if is_json else text
        finally:
            connection.close()

    def counted(self) -> Counter[str]:
        """Refresh tokens that were presented since the start, by what became of them."""
        found = re.findall(
            r'^coatcheck_token_refreshes_total\{result="(\w+)"\} (\S+)$',
            str(self.ask("GET", "/metrics")[1]),
            re.MULTILINE,
        )
        return Counter({result: int(float(number)) for result, number in found})

    def age_tokens(self) -> None:
        """Every refresh token is a second older than the grace from here on: the next exchange rotates it."""
        with contextlib.closing(sqlite3.connect(self.home / "coatcheck.db", timeout=10)) as database, database:
            database.execute("update coatcheck_families set rotated_us = rotated_us - ?", ((GRACE + 1) * 1_000_000,))


@contextlib.contextmanager
def serving(directory: Path, *flags: str) -> Iterator[Site]:
    """`coatcheck serve --profile b2c` with an administrator and a user, reached through a relay."""
    home, log, port = directory / "home", directory / "serve.log", free_port()
    coatcheck = [sys.executable, "-m", "coatcheck"]
    for name, role in ((NAME, "admin"), (OTHER, "user")):
        added = [*coatcheck, "user", "add", name, "--role", role, "--password-stdin", "--home", str(home)]
        subprocess.run(added, input=PASSWORD, text=True, capture_output=True, check=True, timeout=60, cwd=directory)
    with Relay(port) as relay:
        address = f"http://127.0.0.1:{relay.port}"
        command = [*coatcheck, "serve", "--profile", "b2c", "--port", str(port), "--home", str(home), *flags]
        child = Child([*command, "--public-url", address], log=log, directory=directory)
        site = Site(address=address, set_up_link="", home=home, port=port, relay=relay)
        try:
            child.await_ready(lambda: site.ask("GET", "/health/ready")[0] == 200, within=60)
            yield site
        finally:
            child.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The profile as it comes."""
    with serving(tmp_path_factory.mktemp("site")) as served:
        yield served


@pytest.fixture(scope="module")
def graceless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Every exchange rotates, and a token that comes a second time ends the session."""
    with serving(tmp_path_factory.mktemp("graceless"), "--reuse-grace", "0") as served:
        yield served


@pytest.fixture(autouse=True)
def _carry_on(site: Site) -> Iterator[None]:
    yield
    site.relay.forward()


_OPEN = """async (address) => {
  const { createClient } = await import(address);
  globalThis.client = createClient();
  globalThis.heard = [];
  client.addEventListener("signedout", (event) => heard.push(event.detail));
}"""


class Tab:
    """An account page, with a second client beside the page's own: both share one login."""

    def __init__(self, page: Page) -> None:
        self.page = page
        page.evaluate(_OPEN, address_of(page, "coatcheck"))
        self._sent: list[str] = []
        wire = page.context.new_cdp_session(page)
        # The headers as they go out, cookies and all: the browser tells them when it writes to the connection.
        wire.on("Network.requestWillBeSentExtraInfo", self._note)
        wire.send("Network.enable")

    def _note(self, event: Any) -> None:
        cookies = SimpleCookie(event["headers"].get("Cookie", ""))
        if REFRESH_COOKIE in cookies:
            self._sent.append(cookies[REFRESH_COOKIE].value)

    def do(self, expression: str) -> Any:
        """The settled value of an expression."""
        return self.page.evaluate(f"async () => ({expression})")

    def start(self, expression: str) -> None:
        """Begin, and do not wait for the end."""
        self.page.evaluate(f"() => {{ globalThis.begun = ({expression}); begun.catch(() => 0); }}")

    def finish(self) -> Any:
        """The value, or the code of the refusal."""
        return self.page.evaluate("() => begun.catch((failure) => failure.code)")

    def send_refresh(self) -> str:
        """Begin to refresh; returns the refresh token that went out."""
        self._sent.clear()
        self.start("client.refresh()")
        # Events arrive with the answers to other questions.
        until(lambda: self.do("true") and bool(self._sent), within=10, what="the request on the wire")
        return self._sent[0]

    def await_turn(self) -> None:
        """Until this tab, or the other one, waits for the lock."""
        self.page.wait_for_function("async () => (await navigator.locks.query()).pending.length === 1")

    def come_back(self) -> None:
        """Somebody looks at the tab again."""
        self.page.evaluate("() => document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))")

    def expect_signed_in(self) -> None:
        assert self.do("client.refresh()") is True
        assert self.do("client.fetch('/api/me').then((answer) => answer.status)") == 200
        assert self.do("heard") == []
        assert self.page.locator(".signed-out").count() == 0
        assert NAME in self.page.locator("main").inner_text()


def address_of(page: Page, stem: str) -> str:
    """Where a script was served: the page's own, or one that it imports."""
    session = page.locator("script[type=module]").get_attribute("src")
    assert session is not None
    text = str(page.evaluate("async (address) => (await fetch(address)).text()", session))
    (found,) = re.findall(rf'"(/static/{stem}\.[\w-]{{12}}\.js)"', f'"{session}"\n{text}')
    return str(found)


def two_tabs(context: BrowserContext, site: Site) -> tuple[Tab, Tab]:
    """Two tabs of one browser in which somebody has signed in on the page."""
    first, second = sign_in_here(context.new_page(), site), context.new_page()
    with second.expect_response("**/api/me") as answered:
        second.goto(f"{site.address}/account")
    # To its end: a relay that is told to swallow or to cut from here on must not meet the rest of it.
    answered.value.finished()
    return Tab(first), Tab(second)


def sign_in_here(page: Page, site: Site) -> Page:
    """Sign in on the page, and let the account page have its token."""
    with page.expect_response("**/api/me") as answered:
        sign_in(page, site)
        page.wait_for_url("**/account")
    answered.value.finished()
    return page


# The page and its script.


def test_the_account_page_gets_its_token_by_the_served_client_under_a_strict_policy(
    site: Site, new_context: OpenContext
) -> None:
    page = new_context(locale="en-US").new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    answers: dict[str, Response] = {}

    def note(response: Response) -> None:
        answers.setdefault(urlsplit(response.url).path, response)

    page.on("response", note)
    sign_in_here(page, site)

    for stem in ("session", "coatcheck"):
        served = answers[address_of(page, stem)]
        assert served.headers["cache-control"] == "public, max-age=31536000, immutable"
        assert served.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answers[address_of(page, "coatcheck")].body() == (SCRIPTS / "coatcheck.js").read_bytes()
    # No other path leads to the client: its plain name is nowhere.
    assert site.ask("GET", "/static/coatcheck.js")[0] == 404

    policy = dict(
        part.strip().split(" ", 1) for part in answers["/account"].headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)

    token = answers["/api/refresh"].json()["access_token"]
    asked = answers["/api/me"].request.all_headers()
    assert asked["authorization"] == f"Bearer {token}"
    assert answers["/api/me"].status == 200
    assert complaints == []

    # The policy is enforced, not only sent: a script that somebody got into the page does not run.
    page.evaluate(
        "() => document.body.append(Object.assign(document.createElement('script'), { textContent: 'injected = 1' }))"
    )
    assert page.evaluate("() => typeof injected") == "undefined"
    assert "Content Security Policy" in complaints[0]


_FIND = """async (secrets) => {
  const found = new Set();
  const look = (where, text) => secrets.some((secret) => String(text).includes(secret)) && found.add(where);
  look("localStorage", JSON.stringify(localStorage));
  look("sessionStorage", JSON.stringify(sessionStorage));
  look("cookie", document.cookie);
  look("history", JSON.stringify(history.state) + location.href + name + document.referrer);
  look("DOM", document.documentElement.outerHTML);
  look("timing", JSON.stringify(performance.getEntries()));
  if ((await indexedDB.databases()).length) found.add("indexedDB");
  if ((await caches.keys()).length) found.add("caches");
  const known = new Set();
  const queue = [[globalThis, "window"]];
  while (queue.length) {
    const [it, path] = queue.pop();
    if (known.has(it)) continue;
    known.add(it);
    for (const key of Reflect.ownKeys(it)) {
      let value;
      try { value = it[key]; } catch { continue; }
      if (/^(string|function)$/.test(typeof value)) look(`${path}.${String(key)}`, value);
      if (value && /^(object|function)$/.test(typeof value)) queue.push([value, `${path}.${String(key)}`]);
    }
    try { const parent = Object.getPrototypeOf(it); if (parent) queue.push([parent, path]); } catch {}
  }
  return [[...found], known.size];
}"""


def test_no_script_finds_a_token_in_storage_cookies_page_or_window(site: Site, new_context: OpenContext) -> None:
    context = new_context(locale="en-US")
    page = context.new_page()
    with page.expect_response(REFRESH) as refreshed:
        sign_in_here(page, site)
    kept = {cookie.get("name"): cookie for cookie in context.cookies()}
    assert set(kept) == {"coatcheck_session", REFRESH_COOKIE, "coatcheck_device"}
    assert all(cookie.get("httpOnly") for cookie in kept.values())
    assert kept[REFRESH_COOKIE].get("sameSite") == "Strict"
    secrets = [refreshed.value.json()["access_token"], *(cookie.get("value") for cookie in kept.values())]
    assert "refresh_token" not in refreshed.value.json()

    found, looked_at = page.evaluate(_FIND, secrets)
    assert found == []
    assert looked_at > 1000
    # The search finds what is there.
    page.evaluate("(token) => { globalThis.leak = { deep: { inside: token } }; }", secrets[0])
    assert page.evaluate(_FIND, secrets)[0] == ["window.leak.deep.inside"]


# Two tabs at the same moment.


def test_two_tabs_without_locks_present_one_old_token_fifty_times(site: Site, new_context: OpenContext) -> None:
    """Counted: 50 rotations, and 50 times the other tab got the same successor. Both requests of a round were on the
    wire, with the same refresh token, before the server saw either."""
    context = new_context(locale="en-US")
    context.add_init_script(NO_LOCKS)
    one, two = two_tabs(context, site)
    assert one.do("navigator.locks") is None
    before, presented = site.counted(), set[str]()
    for _ in range(ROUNDS):
        site.age_tokens()
        site.relay.hold()
        tokens = {one.send_refresh(), two.send_refresh()}
        assert len(tokens) == 1
        presented |= tokens
        site.relay.forward()
        assert [one.finish(), two.finish()] == [True, True]
    assert site.counted() - before == {"rotated": ROUNDS, "replayed": ROUNDS}
    assert len(presented) == ROUNDS
    one.expect_signed_in()
    two.expect_signed_in()


def test_two_tabs_without_locks_present_one_young_token_fifty_times(site: Site, new_context: OpenContext) -> None:
    """Counted: 100 exchanges that kept the token, because it was younger than the grace."""
    context = new_context(locale="en-US")
    context.add_init_script(NO_LOCKS)
    one, two = two_tabs(context, site)
    before, presented = site.counted(), set[str]()
    for _ in range(ROUNDS):
        site.relay.hold()
        presented |= {one.send_refresh(), two.send_refresh()}
        site.relay.forward()
        assert [one.finish(), two.finish()] == [True, True]
    assert site.counted() - before == {"kept": 2 * ROUNDS}
    assert len(presented) == 1
    one.expect_signed_in()
    two.expect_signed_in()


def test_two_tabs_with_locks_take_turns_fifty_times(site: Site, new_context: OpenContext) -> None:
    """Counted: 50 rotations and nothing beside them, because the tab that waited was told the answer of the other."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    before = site.counted()
    for turn in range(ROUNDS):
        first, second = (one, two) if turn % 2 else (two, one)
        site.age_tokens()
        site.relay.hold()
        first.send_refresh()
        second.start("client.refresh()")
        second.await_turn()
        site.relay.forward()
        assert [first.finish(), second.finish()] == [True, True]
    assert site.counted() - before == {"rotated": ROUNDS}
    one.expect_signed_in()
    two.expect_signed_in()


def test_with_locks_even_a_server_without_grace_signs_nobody_out(graceless: Site, new_context: OpenContext) -> None:
    """Counted: at least 50 rotations, and no exchange of another kind: a server without grace knows no other."""
    one, two = two_tabs(new_context(locale="en-US"), graceless)
    before = graceless.counted()
    for _ in range(ROUNDS):
        one.start("client.refresh()")
        two.start("client.refresh()")
        assert [one.finish(), two.finish()] == [True, True]
    counted = graceless.counted() - before
    assert set(counted) == {"rotated"}
    assert ROUNDS <= counted["rotated"] <= 2 * ROUNDS
    one.expect_signed_in()
    two.expect_signed_in()


# What is lost on the way.


def test_a_tab_closed_while_its_answer_is_lost_signs_nobody_out(site: Site, new_context: OpenContext) -> None:
    """The server has rotated, the browser never hears of it, and the tab that asked is gone."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    before, swallowed, old = site.counted(), site.relay.swallowed, held_token(one)
    site.age_tokens()
    site.relay.swallow_answers()
    one.send_refresh()
    until(lambda: (site.counted() - before)["rotated"] == 1, within=10, what="the exchange")
    # The server counts before it answers: an answer that is still to come would be carried by `forward()`.
    until(lambda: site.relay.swallowed > swallowed, within=10, what="the answer in the relay")
    one.page.close()
    assert held_token(two) == old
    site.relay.forward()
    two.expect_signed_in()
    counted = site.counted() - before
    assert counted["rotated"] == 1
    assert counted["replayed"] >= 1, counted
    assert set(counted) <= {"rotated", "replayed", "kept"}


def test_a_tab_closed_with_the_answer_before_it_lets_the_waiting_tab_go_on(
    site: Site, new_context: OpenContext
) -> None:
    """The browser has the answer and its cookie, the tab has not read it and closes while it holds the lock."""
    context = new_context(locale="en-US")
    one, two = two_tabs(context, site)
    before = site.counted()
    site.age_tokens()
    hold = context.new_cdp_session(one.page)
    hold.send("Fetch.enable", {"patterns": [{"urlPattern": "*/api/refresh", "requestStage": "Response"}]})
    held: list[object] = []
    hold.on("Fetch.requestPaused", lambda event: held.append(event))
    one.start("client.refresh()")
    two.page.wait_for_function("async () => (await navigator.locks.query()).held.length === 1")
    two.start("client.refresh()")
    two.await_turn()
    until(lambda: (site.counted() - before)["rotated"] == 1, within=10, what="the exchange")
    until(lambda: one.do("true") and len(held) == 1, within=10, what="the answer in the browser")
    one.page.close()
    assert two.finish() is True
    assert site.counted() - before == {"rotated": 1, "kept": 1}
    two.expect_signed_in()


def held_token(tab: Tab) -> str:
    """The refresh token that the browser has now."""
    (found,) = [cookie.get("value") for cookie in tab.page.context.cookies() if cookie.get("name") == REFRESH_COOKIE]
    assert found is not None
    return found


@pytest.mark.parametrize("arrives", [0, 200])
def test_an_answer_cut_before_the_next_token_signs_nobody_out(
    site: Site, new_context: OpenContext, arrives: int
) -> None:
    """The server has rotated, the connection breaks with a few octets of the answer.

    A browser sends the request again by itself, also a POST, when a connection it had kept breaks so early: what the
    server then sees is a token that is spent already, and counted is that it was answered and not taken for theft.
    """
    one, two = two_tabs(new_context(locale="en-US"), site)
    before, old = site.counted(), held_token(one)
    site.age_tokens()
    site.relay.reset_after(arrives)
    assert one.send_refresh() == old
    one.finish()
    one.expect_signed_in()
    two.expect_signed_in()
    counted = site.counted() - before
    assert counted["rotated"] == 1
    assert counted["replayed"] >= 1
    assert set(counted) <= {"rotated", "replayed", "kept"}


def test_an_answer_cut_in_its_body_signs_nobody_out(site: Site, new_context: OpenContext) -> None:
    """The cookie has arrived and the access token has not: the page says so, and asks again with the new one."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    before, old = site.counted(), held_token(one)
    site.age_tokens()
    site.relay.reset_after(1000)
    one.send_refresh()
    assert one.finish() == "unavailable"
    assert held_token(one) != old
    assert one.do("heard") == []
    one.expect_signed_in()
    two.expect_signed_in()
    assert site.counted() - before == {"rotated": 1, "kept": 2}


def test_a_network_that_goes_away_with_the_answer_signs_nobody_out(site: Site, new_context: OpenContext) -> None:
    """Nothing of the answer arrives and nothing can be sent again: the browser is left with the spent token."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    before, old = site.counted(), held_token(one)
    site.age_tokens()
    site.relay.swallow_answers()
    one.send_refresh()
    until(lambda: (site.counted() - before)["rotated"] == 1, within=10, what="the exchange")
    site.relay.refuse()
    assert one.finish() == "unavailable"
    assert two.do("client.refresh().catch((failure) => failure.code)") == "unavailable"
    assert held_token(one) == old
    for tab in (one, two):
        tab.come_back()
        assert tab.do("heard") == []
        assert tab.page.locator(".signed-out").count() == 0
    site.relay.forward()
    two.expect_signed_in()
    one.expect_signed_in()
    assert held_token(one) != old
    counted = site.counted() - before
    assert (counted["rotated"], counted["replayed"]) == (1, 1)
    assert set(counted) <= {"rotated", "replayed", "kept"}


# Somebody ends the session.


def revoke(site: Site, **what: str) -> None:
    """An administrator's own client, which is no browser, ends a session."""
    welcome = {"username": NAME, "password": PASSWORD, "carrier": "body"}
    status, tokens = site.ask("POST", "/api/login", body=welcome)
    assert status == 200
    status, ended = site.ask("POST", "/api/admin/revoke", bearer=tokens["access_token"], body=what)
    assert (status, ended) == (200, {"ended": 1})


@pytest.mark.parametrize(
    ("language", "reason"),
    [("en", "account_disabled"), ("en", "<b>lost</b> phone $&"), ("ko", "account_disabled"), ("ko", "분실한 휴대폰")],
)
def test_an_administrator_ends_the_session_and_both_tabs_say_why(
    site: Site, new_context: OpenContext, language: Language, reason: str
) -> None:
    one, two = two_tabs(new_context(locale={"en": "en-US", "ko": "ko-KR"}[language]), site)
    (sid,) = {tab.do("client.fetch('/api/me').then((answer) => answer.json())")["session"]["sid"] for tab in (one, two)}
    for tab in (one, two):
        tab.do("globalThis.same = true")
    revoke(site, sid=sid, reason=reason)

    # One is looked at again; the other one is told by it.
    one.come_back()
    for tab in (one, two):
        notice = tab.page.get_by_role("alert")
        notice.wait_for()
        assert notice.locator("h1").inner_text() == say("ended.title", language)
        assert notice.locator("p:visible").all_text_contents() == [
            say_reason(reason, language),
            say("ended.sign_in", language),
        ]
        assert NAME not in tab.page.locator("main").inner_text()
        assert tab.page.locator("table, nav, form").count() == 0
        assert tab.do("same") is True
        assert tab.do("heard") == [{"code": "session_ended", "reason": reason, "elsewhere": True}]
    assert [tab.page.locator(".signed-out").count() for tab in (one, two)] == [1, 1]
    # From there back in.
    one.page.get_by_role("link", name=say("ended.sign_in", language)).click()
    one.page.wait_for_url("**/login")


def test_a_tab_in_use_says_it_as_well(site: Site, new_context: OpenContext) -> None:
    """Nobody comes back to it: the page itself sends a request, and every tab hears what it is told."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    me = one.do("client.fetch('/api/me').then((answer) => answer.json())")
    revoke(site, sid=me["session"]["sid"], reason="account_disabled")
    assert one.do("client.fetch('/api/sessions').then((answer) => answer.status)") == 401
    for tab in (one, two):
        tab.page.get_by_role("alert").get_by_text(say_reason("account_disabled", "en")).wait_for()


def test_a_sign_out_on_the_page_of_one_tab_is_said_in_the_other(site: Site, new_context: OpenContext) -> None:
    one, two = two_tabs(new_context(locale="en-US"), site)
    one.page.get_by_role("navigation").get_by_role("button", name="Sign out").click()
    one.page.wait_for_url("**/login?signed_out")
    two.come_back()
    notice = two.page.get_by_role("alert")
    notice.wait_for()
    assert notice.locator("h1").inner_text() == "You were signed out"
    assert "{" not in notice.inner_text()


def test_a_tab_of_a_login_that_another_one_has_followed_is_left(site: Site, new_context: OpenContext) -> None:
    """Its forms would act for whoever has signed in since."""
    one, two = two_tabs(new_context(locale="en-US"), site)
    one.page.get_by_role("navigation").get_by_role("button", name="Sign out").click()
    one.page.wait_for_url("**/login?signed_out")
    one.page.locator("#username").fill(OTHER)
    one.page.locator("#password").fill(PASSWORD)
    one.page.locator("main button").click()
    one.page.wait_for_url("**/account")
    two.come_back()
    two.page.wait_for_url(f"{site.address}/")
    assert f"Hello, {OTHER}" in two.page.locator("main").inner_text()
