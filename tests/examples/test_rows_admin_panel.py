"""The row "admin panel": the second sign-in throws the first one out, and its page says why."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from flask.testing import FlaskClient

from coatcheck import Coatcheck, Profile
from coatcheck.testing import CapturedEvents, FakeSystem
from examples.admin_panel.app import DEVICE_COOKIE, create_app, settings

RIGHT = {"username": "ratia", "password": "secret"}
SITE = "https://panel.test"
OFFICE, ELSEWHERE = "198.51.100.4", "203.0.113.7"
MORNING = datetime(2026, 11, 24, 9, 30, tzinfo=UTC)


@pytest.fixture
def clock() -> FakeSystem:
    return FakeSystem(start_us=int(MORNING.timestamp()) * 1_000_000)


@pytest.fixture
def events() -> CapturedEvents:
    return CapturedEvents()


@pytest.fixture
def panel(clock: FakeSystem, events: CapturedEvents) -> Iterator[Panel]:
    with Coatcheck("memory:", settings=settings(SITE), on_event=events, system=clock) as coat:
        yield Panel(coat)


class Panel:
    """The application, and browsers that come to it: each has an address and a cookie jar of its own."""

    def __init__(self, coat: Coatcheck) -> None:
        self.coat = coat
        self._app = create_app(coat)

    def browser(self, address: str) -> Browser:
        return Browser(self._app.test_client(), address)


class Browser:
    def __init__(self, client: FlaskClient, address: str) -> None:
        self.client = client
        self._from = {"REMOTE_ADDR": address}

    def look(self) -> tuple[int, str]:
        answer = self.client.get("/", base_url=SITE, environ_overrides=self._from)
        return answer.status_code, answer.text

    def send(self, path: str, form: dict[str, str] | None = None, **headers: str) -> int:
        answer = self.client.post(path, data=form, base_url=SITE, environ_overrides=self._from, headers=headers)
        return answer.status_code


def test_the_second_sign_in_throws_the_first_one_out_and_its_page_says_when_and_from_where(
    panel: Panel, clock: FakeSystem
) -> None:
    first, second = panel.browser(OFFICE), panel.browser(ELSEWHERE)
    assert first.send("/login", RIGHT) == 303
    assert "signed in at 09:30 UTC" in first.look()[1]

    clock.advance(timedelta(minutes=28))
    assert first.look()[0] == 200
    clock.advance(timedelta(minutes=4))
    assert second.send("/login", RIGHT) == 303
    status, page = first.look()
    assert status == 401
    assert '<p role="alert">Signed in on another device, 10:02 UTC, 203.0.113.7.</p>' in page
    assert second.look()[0] == 200
    assert len(panel.coat.list_sessions("50").items) == 1

    # It goes on saying so, and whoever was thrown out may come back: then it is the other one who reads it.
    assert "Signed in on another device" in first.look()[1]
    assert first.send("/login", RIGHT) == 303
    assert "Signed in on another device, 10:02 UTC, 198.51.100.4." in second.look()[1]


def test_the_page_says_too_when_nobody_has_used_the_panel_or_a_day_is_over(panel: Panel, clock: FakeSystem) -> None:
    browser = panel.browser(OFFICE)
    browser.send("/login", RIGHT)
    clock.advance(Profile.named("admin").idle_timeout)
    assert "Nobody has used this panel for a while" in browser.look()[1]

    browser.send("/login", RIGHT)
    # In the last tenth of the idle time a visit is noted at once, not in a batch a second later.
    visit, whole = timedelta(minutes=28), Profile.named("admin").absolute_timeout
    for _ in range(whole // visit):
        clock.advance(visit)
        assert browser.look()[0] == 200
    clock.advance(whole % visit)
    assert "A sign-in lasts no longer than half a day" in browser.look()[1]


def test_a_wrong_password_throws_nobody_out_and_a_stranger_is_told_nothing(panel: Panel) -> None:
    inside, stranger = panel.browser(OFFICE), panel.browser(ELSEWHERE)
    inside.send("/login", RIGHT)
    assert stranger.send("/login", {**RIGHT, "password": "guess"}) == 401
    assert inside.look()[0] == 200
    status, page = stranger.look()
    assert status == 401
    assert "alert" not in page


def test_a_form_on_another_site_signs_nobody_out(panel: Panel) -> None:
    browser = panel.browser(OFFICE)
    browser.send("/login", RIGHT)
    assert browser.send("/logout", Origin="https://evil.test") == 403
    assert browser.look()[0] == 200
    assert browser.send("/logout", Origin=SITE) == 303
    assert browser.look()[0] == 401


def test_a_browser_keeps_its_device_cookie_and_another_one_with_the_session_is_noticed(
    panel: Panel, events: CapturedEvents
) -> None:
    browser, thief = panel.browser(OFFICE), panel.browser(ELSEWHERE)
    browser.send("/login", RIGHT)
    device = browser.client.get_cookie(DEVICE_COOKIE, "panel.test")
    assert device is not None
    assert device.secure
    assert device.http_only
    browser.send("/login", RIGHT)
    again = browser.client.get_cookie(DEVICE_COOKIE, "panel.test")
    assert again is not None
    assert again.value == device.value
    browser.look()
    assert events.of("risk.decided") == []

    name = panel.coat.settings.session_cookie.name
    copied = browser.client.get_cookie(name, "panel.test")
    assert copied is not None
    thief.client.set_cookie(name, copied.value, domain="panel.test", secure=True)
    thief.look()
    (decided,) = events.of("risk.decided")
    assert decided.subject == "50"
