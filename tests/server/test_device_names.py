"""What a browser calls itself, in words a person knows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.server.device_names import MAX_READ, UNKNOWN, device_name

MOZILLA = "Mozilla/5.0"
KHTML = "AppleWebKit/537.36 (KHTML, like Gecko)"


@pytest.mark.parametrize(
    ("user_agent", "name"),
    [
        (f"{MOZILLA} (X11; Linux x86_64) {KHTML} Chrome/150.0.0.0 Safari/537.36", "Chrome on Linux"),
        (f"{MOZILLA} (X11; Linux x86_64) {KHTML} HeadlessChrome/150.0.0.0 Safari/537.36", "Chrome on Linux"),
        (f"{MOZILLA} (X11; CrOS x86_64 14541.0.0) {KHTML} Chrome/150.0.0.0 Safari/537.36", "Chrome on ChromeOS"),
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
        ("", UNKNOWN),
        ("<script>alert(1)</script>", UNKNOWN),
        ("x" * MAX_READ + "Chrome/1 Linux", UNKNOWN),
    ],
)
def test_browsers_are_named_as_people_know_them(user_agent: str, name: str) -> None:
    assert device_name(user_agent) == name


@given(st.text())
def test_nothing_of_a_hostile_text_comes_out(text: str) -> None:
    name = device_name(text)
    assert name == UNKNOWN or name.replace(" on ", " ").replace(".", "").replace(" ", "").isalpha()


def test_a_huge_text_costs_nothing() -> None:
    assert device_name("(" * 50_000_000) == UNKNOWN
