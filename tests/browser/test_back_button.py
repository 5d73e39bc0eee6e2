"""After sign-out the back button shows nothing private.

Playwright switches the back/forward cache off by default, and then this passes with any header: here it is on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.browser.conftest import NAME, PASSWORD, Served
from tests.browser.test_first_steps import set_up, sign_in
from tests.conftest import not_here
from tests.servers import chromium
from tests.servers.missing import ServerMissing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def real_browser() -> Iterator[Browser]:
    """A browser that keeps pages for the back button, as people's browsers do."""
    try:
        with chromium.launched(without=["--disable-back-forward-cache"]) as launched:
            yield launched
    except ServerMissing as missing:
        not_here(str(missing))


@pytest.fixture(params=[True, False], ids=["with JavaScript", "without JavaScript"])
def script(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def page(real_browser: Browser, script: bool) -> Iterator[Page]:
    context = real_browser.new_context(locale="en-US", java_script_enabled=script)
    yield context.new_page()
    context.close()


def sign_out(page: Page) -> None:
    assert NAME in page.locator("main").inner_text()
    page.get_by_role("navigation").get_by_role("button", name="Sign out").click()
    page.wait_for_url("**/login?signed_out")
    assert [cookie.get("name") for cookie in page.context.cookies()] == ["coatcheck_device"]


def expect_nothing_private_behind(page: Page) -> None:
    # "commit": a page restored from memory never fires the load event that is waited for otherwise.
    page.go_back(wait_until="commit")
    page.wait_for_url("**/login?next=/account")
    page.locator("#username").wait_for()
    assert NAME not in page.content()
    assert page.locator("table").count() == 0


def test_after_a_set_up_and_a_sign_out(served: Served, page: Page) -> None:
    set_up(page, served)
    sign_out(page)
    expect_nothing_private_behind(page)


def test_after_a_sign_in_and_a_sign_out(served: Served, page: Page) -> None:
    set_up(page, served)
    sign_out(page)
    sign_in(page, served)
    page.wait_for_url("**/account")
    sign_out(page)
    expect_nothing_private_behind(page)


def test_after_some_clicks_and_a_sign_out(served: Served, page: Page) -> None:
    set_up(page, served)
    page.get_by_role("link", name="Account").click()
    page.locator("table").wait_for()
    sign_out(page)
    expect_nothing_private_behind(page)


def test_after_a_new_password_and_a_sign_out(served: Served, page: Page) -> None:
    set_up(page, served)
    page.locator("#current").fill(PASSWORD)
    page.locator("#new").fill("seven brittle umbrellas hum")
    page.locator("#again").fill("seven brittle umbrellas hum")
    page.get_by_role("button", name="Change the password").click()
    page.get_by_role("status").wait_for()
    sign_out(page)
    expect_nothing_private_behind(page)


def test_ending_the_present_session_in_the_list_is_a_sign_out_too(served: Served, page: Page) -> None:
    set_up(page, served)
    page.locator("tbody button").click()
    page.wait_for_url("**/login?signed_out")
    expect_nothing_private_behind(page)


def test_after_the_session_was_ended_from_elsewhere(served: Served, real_browser: Browser) -> None:
    """No cookie changes here, so the browser alone would show the page again: the script does not let it."""
    contexts = [real_browser.new_context(locale="en-US") for _ in range(2)]
    one, two = (context.new_page() for context in contexts)
    set_up(one, served)
    sign_in(two, served)
    two.wait_for_url("**/account")
    one.reload()
    one.get_by_role("button", name="End all others").click()
    one.get_by_role("status").wait_for()
    two.get_by_role("link", name="Coatcheck").click()
    two.get_by_text("You were signed out").wait_for()
    expect_nothing_private_behind(two)
    for context in contexts:
        context.close()
