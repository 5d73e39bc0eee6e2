"""The row "shop": `python -m examples.shop` in a real Chromium. Tokens in memory, several devices, two tabs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.servers.ports import free_port
from tests.servers.processes import Child, accepts

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("rows-shop")]

OpenContext = Callable[..., "BrowserContext"]

ROOT = Path(__file__).parents[2]
PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1"
LAPTOP = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"

_KEPT = """async () => ({
  storage: localStorage.length + sessionStorage.length + (await indexedDB.databases()).length
    + (await caches.keys()).length,
  cookie: document.cookie,
  page: document.documentElement.outerHTML + location.href + JSON.stringify(history.state),
  window: JSON.stringify(Object.keys(window).map((name) => {
    try { return String(window[name]) } catch { return "" }
  })),
})"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a shop, started by the command that its README names."""
    port, directory = free_port(), tmp_path_factory.mktemp("shop")
    child = Child(
        [sys.executable, "-m", "examples.shop", "--port", str(port)], log=directory / "shop.log", directory=ROOT
    )
    try:
        child.await_ready(lambda: accepts(port))
        yield f"http://127.0.0.1:{port}"
    finally:
        child.stop()


def sign_in(page: Page, shop: str, *, password: str = "secret") -> None:
    page.set_default_timeout(10_000)
    page.goto(shop)
    page.get_by_label("Name").fill("ratia")
    page.get_by_label("Password").fill(password)
    page.get_by_role("button", name="Sign in").click()


def buy(page: Page, item: str) -> None:
    page.get_by_role("button", name=item).click()


def devices(page: Page, count: int) -> list[str]:
    page.locator("#devices li").nth(count - 1).wait_for()
    return page.locator("#devices li").all_inner_texts()


def test_each_device_is_listed_and_one_that_is_signed_out_from_another_says_so(
    shop: str, new_context: OpenContext
) -> None:
    phone = new_context(user_agent=PHONE).new_page()
    laptop = new_context(user_agent=LAPTOP).new_page()
    sign_in(phone, shop, password="guess")
    assert phone.get_by_role("alert").inner_text() == "Name or password are not right."
    sign_in(phone, shop)
    buy(phone, "umbrella")
    phone.get_by_text("umbrella", exact=True).wait_for()
    sign_in(laptop, shop)
    one, two = devices(laptop, 2)
    assert one.startswith("Safari on iPhone, 127.0.0.1, since ")
    assert two.startswith("Firefox on Linux, 127.0.0.1, since ")
    assert ("this one" in one, "this one" in two) == (False, True)

    laptop.get_by_role("button", name="Sign it out").click()
    laptop.locator("#devices li").nth(1).wait_for(state="detached")
    buy(phone, "raincoat")
    phone.get_by_role("alert").get_by_text("You signed this device out from another one.").wait_for()
    assert phone.locator("#shop").is_hidden()
    assert "umbrella" not in phone.locator("#orders").inner_html()

    buy(laptop, "raincoat")
    laptop.get_by_text("raincoat", exact=True).wait_for()
    assert laptop.locator("#orders li").all_inner_texts() == ["umbrella", "raincoat"]


def test_the_token_is_in_memory_alone_and_a_reload_has_it_again_by_the_refresh_cookie(
    shop: str, new_context: OpenContext
) -> None:
    context = new_context()
    page = context.new_page()
    with page.expect_response("**/api/login") as signed_in:
        sign_in(page, shop)
    devices(page, 1)
    cookies = {str(cookie.get("name")): cookie for cookie in context.cookies()}
    assert set(cookies) == {"coatcheck_session", "coatcheck_refresh", "shop_device"}
    assert all(cookie.get("httpOnly") for cookie in cookies.values())
    assert cookies["coatcheck_refresh"].get("sameSite") == "Strict"
    secrets = [signed_in.value.json()["access_token"], *(str(cookie.get("value")) for cookie in cookies.values())]
    kept = page.evaluate(_KEPT)
    assert (kept["storage"], kept["cookie"]) == (0, "")
    assert not [secret for secret in secrets if secret in kept["page"] + kept["window"]]

    with page.expect_request("**/api/orders") as asked:
        page.reload()
    assert asked.value.headers["authorization"].startswith("Bearer ey")
    assert len(devices(page, 1)) >= 1
    # A script that somebody got into the page does not run.
    page.evaluate("() => document.body.append(Object.assign(document.createElement('script'), {textContent: 'x = 1'}))")
    assert page.evaluate("() => typeof x") == "undefined"


def test_a_second_tab_is_signed_in_by_itself_and_both_are_signed_out_at_once(
    shop: str, new_context: OpenContext
) -> None:
    context = new_context()
    one, two = context.new_page(), context.new_page()
    sign_in(one, shop)
    devices(one, 1)
    two.goto(shop)
    devices(two, 1)
    with one.expect_response("**/api/logout"):
        one.get_by_role("button", name="Sign out", exact=True).click()
    two.get_by_role("alert").get_by_text("You signed out in another tab.").wait_for()
    assert one.locator("#sign-in").is_visible()
    assert one.locator("#notice").is_hidden()
    one.reload()
    one.locator("#sign-in").wait_for()
