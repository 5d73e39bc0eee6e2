"""Passwords before they are hashed: one form, its bounds, and which new ones are refused.

Decides what the hash sees (NFC, UTF-8, the whole of it: NIST SP 800-63B-4 s3.1.1.2, ASVS 6.2.8), the length limits,
and the blocklist of ASVS 6.2.4 and 6.2.11. The blocklist is a rule instead of a copied list: a password that is
made of very few obvious pieces (common words, keyboard walks, runs, years, the account's own name) is what guessing
programs try first. There are no rules of composition and no changes by the calendar (ASVS 6.2.5, 6.2.10): spaces and
symbols are as good as letters. It must never keep, log or shorten a password.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from coatcheck.errors import ConfigurationError

PasswordRefusal = Literal[
    "not_text", "not_unicode", "too_short", "too_long", "repeated", "common", "context", "blocked"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordPolicy:
    """Limits of new passwords; lengths are code points after NFC.

    `minimum`: 15 where the password is the only factor (NIST); not below 8, which asks for a second factor.
    `maximum`: bounds the work on one request; at least 64 must be allowed.
    `context`: words of the service, refused as passwords; the account's name is added by the caller.
    `blocked`: whole passwords known to be compromised, compared without regard to case.
    """

    minimum: int = 15
    maximum: int = 1024
    context: tuple[str, ...] = ("coatcheck",)
    blocked: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 8 <= self.minimum <= 64:
            raise ConfigurationError("password.minimum: 8 to 64 code points, 15 without a second factor")
        if not 64 <= self.maximum <= 4096:
            raise ConfigurationError("password.maximum: 64 to 4096 code points")
        object.__setattr__(self, "blocked", frozenset(_fold(word) for word in self.blocked))


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Password:
    """A password in the one form that is hashed: `octets` is NFC in UTF-8. Never shown."""

    octets: bytes

    def __repr__(self) -> str:
        return "Password(redacted)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordRefused:
    """Why a text cannot be a password; `reason` is stable and is shown to whoever chose it (NIST asks for it)."""

    reason: PasswordRefusal


def parse_password(typed: object, *, policy: PasswordPolicy) -> Password | PasswordRefused:
    """Bring a typed password into the form that is hashed. Never raises, and costs little whatever comes.

    The upper limit holds for the text as received and after NFC, which runs only on what is within it.
    """
    if not isinstance(typed, str):
        return PasswordRefused(reason="not_text")
    # Ten megabytes must be refused before they are normalised or hashed; NFC is quadratic in combining marks.
    if len(typed) > policy.maximum:
        return PasswordRefused(reason="too_long")
    normal = unicodedata.normalize("NFC", typed)
    if len(normal) > policy.maximum:
        return PasswordRefused(reason="too_long")
    try:
        return Password(normal.encode("utf-8"))
    except UnicodeEncodeError:
        return PasswordRefused(reason="not_unicode")


def check_new_password(
    password: Password, *, policy: PasswordPolicy, names: Iterable[str] = ()
) -> PasswordRefused | None:
    """Judge a password somebody wants to have; `None` when it may be had.

    `names` are words of the account: its name, its e-mail address.
    """
    text = password.octets.decode("utf-8")
    if len(text) < policy.minimum:
        return PasswordRefused(reason="too_short")
    folded = _fold(text)
    if folded in policy.blocked:
        return PasswordRefused(reason="blocked")
    if not any(character.isalnum() or character in string.punctuation for character in folded):
        # Spaces and pictures alone are outside what the rules below know; any character may be used (ASVS 6.2.5).
        return None
    unit = _smallest_period(folded)
    if len(unit) <= _SHORT_PERIOD and len(unit) * 2 <= len(folded):
        return PasswordRefused(reason="repeated")
    if _is_obvious(unit, _COMMON_WORDS):
        return PasswordRefused(reason="common")
    if _is_obvious(unit, _COMMON_WORDS | _context_words((*policy.context, *names))):
        return PasswordRefused(reason="context")
    return None


# -- what guessing programs try first ------------------------------------------------------------------------------

_OBVIOUS_PIECES: Final = 4
"""A password of at most so many obvious pieces is refused; a character that belongs to none is a piece by itself."""

_SHORT_PERIOD: Final = 6
_SHORTEST_WALK: Final = 3
_SHORTEST_CONTEXT_WORD: Final = 3
_YEAR: Final = re.compile(r"(?:19|20)[0-9]{2}")

_SEPARATORS: Final = re.compile(r"[\s_.-]+")

# Ways along which fingers and heads walk, forwards and backwards (`_TRACKS`).
_WAYS: Final = (
    "01234567890123456789",
    "abcdefghijklmnopqrstuvwxyzabcdefghijklmnopqrstuvwxyz",
    "qwertyuiopasdfghjklzxcvbnm",
    "azertyuiopqsdfghjklmwxcvbn",
    "qazwsxedcrfvtgbyhnujmikolp",
    "1qaz2wsx3edc4rfv5tgb6yhn7ujm8ik9ol0p",
    "q1w2e3r4t5y6u7i8o9p0",
    "1q2w3e4r5t6y7u8i9o0p",
    "!@#$%^&*()_+",
    "ㅂㅈㄷㄱㅅㅛㅕㅑㅐㅔㅁㄴㅇㄹㅎㅗㅓㅏㅣㅋㅌㅊㅍㅠㅜㅡ",
    "가나다라마바사아자차카타파하",
)

# Words, not passwords: what makes the lists long is their repetition and combination, which `_pieces` sees through.
# Korean ones also as they come out of a keyboard left in Latin.
_WORDS: Final = """
password passwort passwd pass secret secure security login logon welcome admin administrator root user guest test
testing default change changeme letmein open access master system server computer internet private public account
iloveyou love lovely loveme baby angel princess prince sunshine flower butterfly summer winter spring autumn monday
friday january december monkey dragon tiger lion eagle shadow ninja wizard batman superman spiderman pokemon starwars
football baseball basketball hockey soccer golf chelsea liverpool arsenal barcelona
michael jordan jennifer jessica daniel charlie thomas andrew joshua ashley nicole michelle
freedom whatever trustno hello money lucky happy family friend friends forever jesus christ
cheese chocolate cookie coffee pepper ginger banana orange purple silver golden diamond
qwerty azerty qwertz google facebook samsung windows apple iphone android
this that is am my the a new old correct horse battery staple your you me please enter
비밀번호 사랑해 대한민국 안녕하세요 관리자 qlalfqjsgh tkfkdgo eogksalsrnr dkssudgktpdy rhksflwk
"""


_SWAPS: Final = str.maketrans("@4301!$57", "aaeoiisst")


def _plain(text: str) -> str:
    """Undo the letter swaps that everybody makes (`p@ssw0rd`)."""
    return text.translate(_SWAPS)


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


_COMMON_WORDS: Final = frozenset(_fold(word) for word in _WORDS.split())
_TRACKS: Final = tuple(track for way in _WAYS for track in (_fold(way), _fold(way[::-1])))


def _is_obvious(unit: str, words: frozenset[str]) -> bool:
    # Also without what stands between words: `correct horse battery staple` is one guess, not seven pieces.
    return _pieces(unit, words) <= _OBVIOUS_PIECES or _pieces(_SEPARATORS.sub("", unit), words) <= _OBVIOUS_PIECES


def _context_words(texts: Iterable[str]) -> frozenset[str]:
    words: set[str] = set()
    for text in texts:
        folded = _fold(text)
        local = folded.partition("@")[0]
        words.update((folded, local, *re.split(r"[\W_]+", folded)))
    return frozenset(word for word in words if len(word) >= _SHORTEST_CONTEXT_WORD)


def _smallest_period(text: str) -> str:
    """The shortest unit whose repetition (the last time perhaps cut short) is the text; linear time."""
    borders = [0] * len(text)
    border = 0
    for index in range(1, len(text)):
        while border and text[index] != text[border]:
            border = borders[border - 1]
        if text[index] == text[border]:
            border += 1
        borders[index] = border
    return text[: len(text) - borders[-1]] if text else text


def _pieces(text: str, words: frozenset[str]) -> int:
    """The least number of obvious pieces a text is made of; it stops counting above the limit."""
    longest = max(map(len, words), default=0)
    plain = _plain(text)
    # Level by level: `reached` holds every place that so many pieces can lead to.
    reached, seen = {0}, {0}
    for count in range(_OBVIOUS_PIECES + 1):
        if len(text) in reached:
            return count
        ends = {end for start in reached for end in _ends(text, plain, start, words, longest)}
        reached = ends - seen
        seen |= reached
    return _OBVIOUS_PIECES + 1


def _ends(text: str, plain: str, start: int, words: frozenset[str], longest: int) -> set[int]:
    """Where a piece that begins at `start` may end."""
    if start >= len(text):
        return set()
    ends = {start + 1}
    run = start
    while run < len(text) and text[run] == text[start]:
        run += 1
    ends.add(run)
    if _YEAR.match(text, start):
        ends.add(start + 4)
    for end in range(start + 1, min(len(text), start + longest) + 1):
        if text[start:end] in words or plain[start:end] in words:
            ends.add(end)
    for track in _TRACKS:
        end = start + _SHORTEST_WALK
        while end <= len(text) and text[start:end] in track:
            ends.add(end)
            end += 1
    return ends
