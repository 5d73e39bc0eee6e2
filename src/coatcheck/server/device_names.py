"""What a browser calls itself, in two words a person knows: "Chrome on Linux".

Decides from a short table of plain substrings, first match first. Only words of the table ever leave this file, so a
hostile `User-Agent` can neither break a page nor put words into it; no regular expression is run on it. The answer is
a hint for people and must never be used to decide anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_READ: Final = 512
UNKNOWN: Final = "Unknown device"

# Browsers name the ones they descend from as well, so descendants stand above their ancestors.
_BROWSERS: Final = (
    ("Whale/", "Whale"),
    ("KAKAOTALK", "KakaoTalk"),
    ("NAVER(", "NAVER"),
    ("SamsungBrowser/", "Samsung Internet"),
    ("Vivaldi/", "Vivaldi"),
    ("OPR/", "Opera"),
    ("EdgiOS/", "Edge"),
    ("EdgA/", "Edge"),
    ("Edg/", "Edge"),
    ("FxiOS/", "Firefox"),
    ("Firefox/", "Firefox"),
    ("CriOS/", "Chrome"),
    ("Chromium/", "Chromium"),
    ("HeadlessChrome/", "Chrome"),
    ("Chrome/", "Chrome"),
    ("Safari/", "Safari"),
)
_SYSTEMS: Final = (
    ("iPhone", "iPhone"),
    ("iPad", "iPad"),
    ("Android", "Android"),
    ("CrOS", "ChromeOS"),
    ("Windows", "Windows"),
    ("Macintosh", "macOS"),
    ("Linux", "Linux"),
    ("X11", "Unix"),
)
_PROGRAMS: Final = (
    ("curl/", "curl"),
    ("Wget/", "Wget"),
    ("HTTPie/", "HTTPie"),
    ("python-httpx/", "Python"),
    ("python-requests/", "Python"),
    ("Python-urllib/", "Python"),
    ("Python/", "Python"),
    ("Go-http-client/", "Go"),
    ("okhttp/", "OkHttp"),
    ("node", "Node.js"),
    ("PostmanRuntime/", "Postman"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Browser or program, and system; `None` where the text does not tell."""

    browser: str | None
    system: str | None


def read_device(user_agent: str) -> Device:
    """What a `User-Agent` tells. Never raises; reads at most `MAX_READ` characters."""
    text = user_agent[:MAX_READ]
    for start, program in _PROGRAMS:
        if text.startswith(start):
            return Device(browser=program, system=None)
    return Device(browser=_first(_BROWSERS, text), system=_first(_SYSTEMS, text))


def device_name(user_agent: str) -> str:
    """The device in English, for programs; pages say it in the reader's language."""
    device = read_device(user_agent)
    if device.browser is not None and device.system is not None:
        return f"{device.browser} on {device.system}"
    return device.browser or device.system or UNKNOWN


def _first(table: tuple[tuple[str, str], ...], text: str) -> str | None:
    return next((name for part, name in table if part in text), None)
