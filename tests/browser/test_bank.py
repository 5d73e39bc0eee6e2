"""The profile `bank` in a browser: a link from another site, and a session that was copied to another machine.

A real server process and a real Chromium; where somebody comes from is told by X-Forwarded-For, which the server
believes of this machine. `127.0.0.1` and `localhost` are two sites.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coatcheck.server.texts import Language, say
from tests.browser.conftest import NAME, PASSWORD
from tests.servers.ports import LOOPBACK, free_port
from tests.servers.processes import Child, accepts

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Request

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("browser-bank")]

OpenContext = Callable[..., "BrowserContext"]

HOME, AWAY, AWAY_NETWORK = "203.0.113.7", "198.51.100.66", "198.51.100.0/24"


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with one account."""
    directory = tmp_path_factory.mktemp("bank")
    coatcheck, home, port = [sys.executable, "-m", "coatcheck"], directory / "home", free_port()
    subprocess.run(
        [*coatcheck, "user", "add", NAME, "--role", "admin", "--password-stdin", "--home", str(home)],
        input=PASSWORD,
        text=True,
        check=True,
        capture_output=True,
        cwd=directory,
        timeout=60,
    )
    # The limit is set aside: each test signs in anew.
    command = [*coatcheck, "serve", "--profile", "bank", "--on-limit", "allow", "--trusted-proxy", LOOPBACK]
    process = Child(
        [*command, "--port", str(port), "--home", str(home)], log=directory / "serve.log", directory=directory
    )
    try:
        process.await_ready(partial(accepts, port), within=60)
        yield f"http://{LOOPBACK}:{port}"
    finally:
        process.stop()


@pytest.fixture
def another_site(bank: str, tmp_path: Path) -> Iterator[str]:
    """A page on another site that links to the account."""
    (tmp_path / "index.html").write_text(f'<!doctype html><title>Another</title><a href="{bank}/account">bank</a>')
    handler = partial(_Quiet, directory=str(tmp_path))
    with ThreadingHTTPServer((LOOPBACK, 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://localhost:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


def page_at(new_context: OpenContext, address: str, **options: object) -> Page:
    options.setdefault("locale", "en-US")
    return new_context(extra_http_headers={"X-Forwarded-For": address}, **options).new_page()


@pytest.mark.parametrize("script", [True, False], ids=["with JavaScript", "without JavaScript"])
def test_a_link_on_another_site_leads_whoever_is_signed_in_to_the_account(
    bank: str, another_site: str, new_context: OpenContext, script: bool
) -> None:
    page = page_at(new_context, HOME, java_script_enabled=script)
    sign_in(page, bank)
    page.goto(another_site)
    page.get_by_role("link", name="bank").click()
    page.wait_for_url("**/account?arrived")
    assert page.locator("h1").inner_text() == say("account.title", "en")
    # A reload of it is no second arrival.
    page.reload()
    assert page.locator("h1").inner_text() == say("account.title", "en")


def test_a_stranger_who_comes_by_a_link_is_kept_waiting_once(
    bank: str, another_site: str, new_context: OpenContext
) -> None:
    page = page_at(new_context, HOME)
    asked: list[str] = []

    def note(request: Request) -> None:
        if request.is_navigation_request() and request.url.startswith(bank):
            asked.append(request.url.removeprefix(bank))

    page.on("request", note)
    page.goto(another_site)
    page.get_by_role("link", name="bank").click()
    page.wait_for_url(re.compile(r"/login\?next="))
    assert page.locator("h1").inner_text() == say("sign_in.title", "en")
    assert asked == ["/account", "/account?arrived", "/login?next=/account%3Farrived"]


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_owner_confirms_that_it_is_him_and_reads_what_happened(
    bank: str, new_context: OpenContext, language: Language
) -> None:
    owner = page_at(new_context, HOME, locale=language)
    sign_in(owner, bank)
    thief = page_at(new_context, AWAY, locale=language)
    thief.context.add_cookies(owner.context.cookies())  # type: ignore[arg-type]
    thief.goto(f"{bank}/account")
    assert say("refused_here.title", language) in thief.locator("main").inner_text()
    assert NAME not in thief.content()

    owner.goto(f"{bank}/account")
    owner.wait_for_url("**/login/confirm?next=/account")
    assert owner.locator("h1").inner_text() == say("confirm.title", language)
    assert AWAY_NETWORK in owner.locator("main").inner_text()
    owner.locator("#password").fill("not the one at all")
    owner.get_by_role("button", name=say("confirm.submit", language)).click()
    assert owner.get_by_role("alert").inner_text() == say("confirm.wrong", language)
    owner.locator("#password").fill(PASSWORD)
    owner.get_by_role("button", name=say("confirm.submit", language)).click()
    owner.wait_for_url("**/account")
    assert say("told.block", language, place=AWAY_NETWORK) in owner.locator("main").inner_text()


def sign_in(page: Page, bank: str) -> None:
    page.goto(f"{bank}/login")
    page.locator("#username").fill(NAME)
    page.locator("#password").fill(PASSWORD)
    page.locator("main button").click()
    page.wait_for_url("**/account")
