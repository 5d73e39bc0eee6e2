"""What a browser calls itself: in words a person knows ("Chrome on Linux"), and as the family a session is bound to.

Decides from short tables of plain substrings, first match first; no regular expression is run on a hostile text. People
and programs read one table: a browser that is added is known to both. What people read are words of the tables alone,
so a `User-Agent` can neither break a page nor put words into it. A family is kept in sessions and compared with what
older releases wrote: a word that stands here as a family must never change. Both are hints; nothing here may ever
prove anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

MAX_USER_AGENT_CHARACTERS: Final = 512
"""What is read of a `User-Agent`."""

UNKNOWN_DEVICE: Final = "Unknown device"

_PRODUCT_CHARACTERS: Final = 24
_PRODUCT: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


class _Browser(NamedTuple):
    part: str
    name: str
    # The same as the name if it is not said; empty for one that counts as what else its text names.
    family: str | None = None


# Browsers name the ones they descend from as well, so descendants stand above their ancestors.
_BROWSERS: Final = (
    _Browser("Whale/", "Whale"),
    _Browser("KAKAOTALK", "KakaoTalk"),
    _Browser("NAVER(", "NAVER"),
    _Browser("SamsungBrowser/", "Samsung Internet", family="Samsung"),
    _Browser("Vivaldi/", "Vivaldi"),
    _Browser("OPR/", "Opera"),
    _Browser("EdgiOS/", "Edge"),
    _Browser("EdgA/", "Edge"),
    _Browser("Edg/", "Edge"),
    _Browser("FxiOS/", "Firefox"),
    _Browser("Firefox/", "Firefox"),
    _Browser("CriOS/", "Chrome"),
    _Browser("Chromium/", "Chromium", family=""),
    # HeadlessChrome/ ends alike.
    _Browser("Chrome/", "Chrome"),
    _Browser("Safari/", "Safari"),
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

_NAMES: Final = tuple((each.part, each.name) for each in _BROWSERS)
_FAMILIES: Final = tuple(
    (each.part, family) for each in _BROWSERS if (family := each.name if each.family is None else each.family)
)

MAX_FAMILY_CHARACTERS: Final = (
    max(_PRODUCT_CHARACTERS, *(len(family) for _, family in _FAMILIES)) + 1 + max(len(name) for _, name in _SYSTEMS)
)
"""The longest family; all of it is ASCII."""


# -- for people ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Browser or program, and system; `None` where the text does not tell."""

    browser: str | None
    system: str | None


def read_device(user_agent: str) -> Device:
    """What a `User-Agent` tells. Never raises; reads at most `MAX_USER_AGENT_CHARACTERS`."""
    text = user_agent[:MAX_USER_AGENT_CHARACTERS]
    for start, program in _PROGRAMS:
        if text.startswith(start):
            return Device(browser=program, system=None)
    return Device(browser=_first(_NAMES, text), system=_first(_SYSTEMS, text))


def device_name(user_agent: str) -> str:
    """The device in English ("Chrome on Linux"), for lists of somebody's sessions. Never raises, and holds nothing of
    the text itself."""
    device = read_device(user_agent)
    if device.browser is not None and device.system is not None:
        return f"{device.browser} on {device.system}"
    return device.browser or device.system or UNKNOWN_DEVICE


# -- for comparing -------------------------------------------------------------------------------------------------


def agent_family(user_agent: str) -> str:
    """Browser and system without versions ("Chrome/Windows"), or the product of a program ("curl"); "" for nothing.

    Plain substrings and the first word alone: no text can make it slow, and only ASCII letters, digits and `._-/` leave
    it. A version that changes is the same family; a browser copied to another system is not.
    """
    text = user_agent[:MAX_USER_AGENT_CHARACTERS]
    system = _first(_SYSTEMS, text)
    browser = _first(_FAMILIES, text) or _product(text)
    return f"{browser}/{system}" if system else browser


def _first(table: tuple[tuple[str, str], ...], text: str) -> str | None:
    return next((name for part, name in table if part in text), None)


def _product(text: str) -> str:
    word = text.lstrip(" \t")[:_PRODUCT_CHARACTERS]
    end = next((at for at, each in enumerate(word) if each not in _PRODUCT), len(word))
    # Something else than a word, but something: two of these are alike, and neither is like a browser.
    return word[:end] or ("-" if text else "")
