"""What a browser calls itself: in words a person knows, and as the family a session is bound to."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.binding import BindingPolicy, Place, Surveyor, unpack_place
from coatcheck.core.user_agent import (
    MAX_FAMILY_CHARACTERS,
    MAX_USER_AGENT_CHARACTERS,
    UNKNOWN_DEVICE,
    agent_family,
    device_name,
)

MOZILLA = "Mozilla/5.0"
KHTML = "AppleWebKit/537.36 (KHTML, like Gecko)"


@pytest.mark.parametrize(
    ("user_agent", "name"),
    [
        (f"{MOZILLA} (X11; Linux x86_64) {KHTML} Chrome/150.0.0.0 Safari/537.36", "Chrome on Linux"),
        (f"{MOZILLA} (X11; Linux x86_64) {KHTML} HeadlessChrome/150.0.0.0 Safari/537.36", "Chrome on Linux"),
        (f"{MOZILLA} (X11; CrOS x86_64 14541.0.0) {KHTML} Chrome/150.0.0.0 Safari/537.36", "Chrome on ChromeOS"),
        (f"{MOZILLA} (X11; Linux x86_64) {KHTML} Chromium/150 Chrome/150 Safari/537.36", "Chromium on Linux"),
        (f"{MOZILLA} (Windows NT 10.0; Win64; x64) {KHTML} Chrome/150 Safari/537.36 Edg/150", "Edge on Windows"),
        (f"{MOZILLA} (Windows NT 10.0; Win64; x64) {KHTML} Chrome/150 Whale/4.30 Safari/537.36", "Whale on Windows"),
        (f"{MOZILLA} (Windows NT 10.0; Win64; x64) {KHTML} Chrome/150 Safari/537.36 OPR/120", "Opera on Windows"),
        (f"{MOZILLA} (Windows NT 10.0; Win64; x64; rv:140.0) Gecko/20100101 Firefox/140.0", "Firefox on Windows"),
        (
            f"{MOZILLA} (iPhone; CPU iPhone OS 18_0 like Mac OS X) AppleWebKit/605.1.15 Version/18.0 Safari/604.1",
            "Safari on iPhone",
        ),
        (f"{MOZILLA} (iPhone; CPU iPhone OS 18_0 like Mac OS X) CriOS/150 Safari/604.1", "Chrome on iPhone"),
        (f"{MOZILLA} (iPad; CPU OS 18_0 like Mac OS X) FxiOS/140 Safari/605.1", "Firefox on iPad"),
        (f"{MOZILLA} (Macintosh; Intel Mac OS X 10_15_7) Version/18.0 Safari/605.1.15", "Safari on macOS"),
        (
            f"{MOZILLA} (Linux; Android 15; K) {KHTML} SamsungBrowser/28 Chrome/150 Mobile Safari/537.36",
            "Samsung Internet on Android",
        ),
        (f"{MOZILLA} (Linux; Android 15; K) {KHTML} Chrome/150 Mobile Safari KAKAOTALK 2", "KakaoTalk on Android"),
        ("curl/8.5.0", "curl"),
        ("python-httpx/0.28", "Python"),
        ("Go-http-client/2.0", "Go"),
        ("SomethingNew/1.0 (Linux)", "Linux"),
        ("Firefox/1", "Firefox"),
        ("", UNKNOWN_DEVICE),
        ("<script>alert(1)</script>", UNKNOWN_DEVICE),
        ("x" * MAX_USER_AGENT_CHARACTERS + "Chrome/1 Linux", UNKNOWN_DEVICE),
    ],
)
def test_browsers_are_named_as_people_know_them(user_agent: str, name: str) -> None:
    assert device_name(user_agent) == name


@given(st.text())
def test_nothing_of_a_hostile_text_comes_out(text: str) -> None:
    name = device_name(text)
    assert name == UNKNOWN_DEVICE or name.replace(" on ", " ").replace(".", "").replace(" ", "").isalpha()


def test_a_huge_text_costs_nothing() -> None:
    assert device_name("(" * 50_000_000) == UNKNOWN_DEVICE


# -- families ------------------------------------------------------------------------------------------------------

CHROME = f"{MOZILLA} (Windows NT 10.0; Win64; x64) {KHTML} Chrome/{{}} Safari/537.36"


@pytest.mark.parametrize(
    ("user_agent", "family"),
    [
        (CHROME.format("142.0"), "Chrome/Windows"),
        (CHROME.format("143.0"), "Chrome/Windows"),
        (CHROME.format("142.0") + " Edg/142.0", "Edge/Windows"),
        (f"{MOZILLA} (iPhone; CPU iPhone OS 26_0 like Mac OS X) Version/26.0 Safari/604.1", "Safari/iPhone"),
        ("curl/8.17.0", "curl"),
        ("MyShop/3.2 (Android 16)", "MyShop/Android"),
        ("", ""),
        (" ", "-"),
        ("\r\nset-cookie: x", "-"),
        ("<script>alert(1)</script>", "-"),
        ("a" * 10_000_000, "a" * 24),
        ("x" * MAX_USER_AGENT_CHARACTERS + "Chrome/1 Linux", "x" * 24),
        ("가나다", "-"),
        ("\ud800", "-"),
    ],
)
def test_only_a_family_of_plain_letters_leaves_a_user_agent(user_agent: str, family: str) -> None:
    assert agent_family(user_agent) == family


# As 0.1 wrote them into sessions. A line may be added; none may change, or whoever is signed in seems to have moved.
STORED = {
    "Chrome/150 Whale/4": "Whale",
    "Chrome/150 Mobile Safari KAKAOTALK 2": "KakaoTalk",
    "Chrome/150 NAVER(inapp; search)": "NAVER",
    "SamsungBrowser/28 Chrome/150": "Samsung",
    "Chrome/150 Safari/537 Vivaldi/7": "Vivaldi",
    "Chrome/150 Safari/537 OPR/120": "Opera",
    "EdgiOS/150 Safari/605": "Edge",
    "Chrome/150 Safari/537 EdgA/150": "Edge",
    "Chrome/150 Safari/537 Edg/150": "Edge",
    "FxiOS/140 Safari/605": "Firefox",
    "Gecko/20100101 Firefox/140": "Firefox",
    "CriOS/150 Safari/604": "Chrome",
    "Chromium/150 Chrome/150 Safari/537": "Chrome",
    "Chromium/150 Safari/537": "Safari",
    "Chromium/150": "Mozilla",
    "HeadlessChrome/150 Safari/537": "Chrome",
    "Chrome/150 Safari/537": "Chrome",
    "Version/18 Safari/605": "Safari",
}
SYSTEMS = {
    "iPhone; CPU iPhone OS 18_0 like Mac OS X": "iPhone",
    "iPad; CPU OS 18_0 like Mac OS X": "iPad",
    "Linux; Android 15; K": "Android",
    "X11; CrOS x86_64 14541.0.0": "ChromeOS",
    "Windows NT 10.0; Win64; x64": "Windows",
    "Macintosh; Intel Mac OS X 10_15_7": "macOS",
    "X11; Linux x86_64": "Linux",
    "X11; OpenBSD amd64": "Unix",
}


@pytest.mark.parametrize("browser", STORED)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_family_that_is_in_a_session_is_written_alike_for_ever(browser: str, system: str) -> None:
    surveyor = Surveyor(BindingPolicy(user_agent=True))
    found = surveyor.seen(None, f"{MOZILLA} ({system}) {browser}", None)
    assert found == Place(agent=f"{STORED[browser]}/{SYSTEMS[system]}".encode())


@given(st.text())
def test_every_family_fits_into_a_packed_place(text: str) -> None:
    family = agent_family(text)
    assert len(family) <= MAX_FAMILY_CHARACTERS
    place = Place(agent=family.encode("ascii"))
    assert unpack_place(place.pack()) == place


def test_the_longest_family_fits_into_a_packed_place() -> None:
    family = agent_family("a" * 99 + " CrOS")
    assert len(family) == MAX_FAMILY_CHARACTERS
    place = Place(agent=family.encode("ascii"))
    assert unpack_place(place.pack()) == place
