"""The first thing a person does, from the printed link to the forced sign-out of another browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from tests.browser.conftest import NAME, PASSWORD, Served

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = pytest.mark.browser

OpenContext = Callable[..., "BrowserContext"]

PHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1"


def set_up(page: Page, served: Served) -> None:
    page.goto(served.set_up_link)
    page.get_by_label("Name").fill(NAME)
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.get_by_label("The same password again").fill(PASSWORD)
    page.get_by_role("button", name="Create and sign in").click()
    page.wait_for_url("**/account")


def sign_in(page: Page, served: Served, *, password: str = PASSWORD) -> None:
    page.goto(f"{served.address}/login")
    page.locator("#username").fill(NAME)
    page.locator("#password").fill(password)
    page.locator("main button").click()


def rows(page: Page) -> list[str]:
    return page.locator("tbody tr").all_inner_texts()


@pytest.mark.parametrize("script", [True, False], ids=["with JavaScript", "without JavaScript"])
def test_from_the_link_to_ending_another_browsers_session(
    served: Served, new_context: OpenContext, script: bool
) -> None:
    one = new_context(java_script_enabled=script, locale="en-US").new_page()
    two = new_context(java_script_enabled=script, locale="en-US", user_agent=PHONE).new_page()

    one.goto(served.address)
    assert one.locator("h1").inner_text() == "Almost ready"
    set_up(one, served)
    assert len(rows(one)) == 1

    # The link works once.
    two.goto(served.set_up_link)
    assert two.locator("h1").inner_text() == "This link does not work"

    sign_in(two, served, password="something else")
    assert two.get_by_role("alert").inner_text() == "Name or password are not right."
    assert two.locator("#username").input_value() == NAME
    two.locator("#password").fill(PASSWORD)
    two.get_by_role("button", name="Sign in").click()
    two.wait_for_url("**/account")

    one.reload()
    mine, other = rows(one)
    assert "Chrome on" in mine
    assert "This one" in mine
    assert "Safari on iPhone" in other
    assert "This one" not in other

    one.get_by_role("button", name=re.compile("End the session: Safari on iPhone")).click()
    one.wait_for_url("**/account")
    assert one.get_by_role("status").inner_text() == "The session was ended."
    assert len(rows(one)) == 1

    # The other one learns it at its next click, and is told why.
    two.get_by_role("link", name="Account").click()
    two.wait_for_url("**/login?next=/account")
    told = two.get_by_role("status").inner_text()
    assert "You were signed out" in told
    assert "You ended this session from another device" in told

    # And from there back to where it was going.
    two.locator("#username").fill(NAME)
    two.locator("#password").fill(PASSWORD)
    two.get_by_role("button", name="Sign in").click()
    two.wait_for_url("**/account")
    assert len(rows(two)) == 2


def test_a_form_that_is_sent_from_a_signed_out_page_leads_to_the_reason(
    served: Served, new_context: OpenContext
) -> None:
    one, two = new_context(locale="en-US").new_page(), new_context(locale="en-US").new_page()
    set_up(one, served)
    sign_in(two, served)
    two.wait_for_url("**/account")
    one.reload()
    one.get_by_role("button", name="End all others").click()
    one.wait_for_url("**/account")
    two.get_by_role("button", name="End all others").click()
    two.wait_for_url("**/login")
    assert "from another device" in two.get_by_role("status").inner_text()
    one.reload()
    assert len(rows(one)) == 1


def test_a_new_password_works_at_once_and_the_old_one_no_more(served: Served, new_context: OpenContext) -> None:
    one, two = new_context(locale="en-US").new_page(), new_context(locale="en-US").new_page()
    set_up(one, served)
    newer = "seven brittle umbrellas hum"
    one.locator("#current").fill(PASSWORD)
    one.locator("#new").fill(newer)
    one.locator("#again").fill(newer)
    one.get_by_role("button", name="Change the password").click()
    one.wait_for_url("**/account")
    assert "The password was changed." in one.get_by_role("status").inner_text()
    sign_in(two, served)
    assert two.get_by_role("alert").is_visible()
    sign_in(two, served, password=newer)
    two.wait_for_url("**/account")


def test_a_korean_browser_gets_korean_pages(served: Served, new_context: OpenContext) -> None:
    page = new_context(locale="ko-KR").new_page()
    page.goto(served.address)
    assert page.locator("h1").inner_text() == "거의 준비되었습니다"
    page.goto(served.set_up_link)
    page.get_by_label("이름").fill("하늘")
    page.get_by_label("비밀번호", exact=True).fill(PASSWORD)
    page.get_by_label("비밀번호 확인").fill(PASSWORD)
    page.get_by_role("button", name="만들고 로그인하기").click()
    page.wait_for_url("**/account")
    assert page.locator("html").get_attribute("lang") == "ko"
    assert "하늘님으로 로그인됨" in page.locator("main").inner_text()
    page.get_by_role("button", name="로그아웃").first.click()
    page.wait_for_url("**/login?signed_out")
    assert page.get_by_role("status").inner_text() == "로그아웃했습니다."


@pytest.mark.parametrize("width", [320, 390, 1280])
@pytest.mark.parametrize("locale", ["en-US", "ko-KR"])
def test_no_page_has_to_be_scrolled_sideways(served: Served, new_context: OpenContext, width: int, locale: str) -> None:
    page = new_context(locale=locale, viewport={"width": width, "height": 700}).new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))

    def fits() -> None:
        wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
        assert wide[0] <= wide[1], page.url

    for path in ("/", "/login", "/setup/x"):
        page.goto(served.address + path)
        fits()
    page.goto(served.set_up_link)
    fits()
    page.locator("#username").fill("a" * 128)
    page.locator("#password").fill(PASSWORD)
    page.locator("#again").fill(PASSWORD)
    page.locator("main button").click()
    page.wait_for_url("**/account")
    fits()
    page.goto(served.address)
    fits()
    # The content security policy found nothing to refuse.
    assert [each for each in complaints if "Content Security Policy" in each] == []


def test_the_whole_way_can_be_gone_with_the_keyboard(served: Served, new_context: OpenContext) -> None:
    page = new_context(locale="en-US").new_page()
    page.goto(served.set_up_link)
    for text in (NAME, PASSWORD, PASSWORD):
        page.keyboard.type(text)
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/account")
    outline: Any = page.locator("nav a").evaluate(
        "link => { link.focus(); return getComputedStyle(link).outlineStyle }"
    )
    assert outline == "solid"
