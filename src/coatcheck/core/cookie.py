"""The session cookie on the wire: find it in a request, write it, delete it (RFC 6265bis).

Decides which bytes of a `Cookie` header are our cookie, and every byte of its `Set-Cookie`. Works on bytes
from end to end. It must never strip anything but SP and HTAB, never choose between two cookies of one name,
never write a value that a browser would drop or cut, and never delete with other attributes than it has set.
What the value means is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Final, Literal, TypeAlias

from coatcheck.errors import ConfigurationError, CookieTooLarge, ValueRefused

MAX_COOKIE_BYTES: Final = 16 * 1024
"""All `Cookie` headers of a request together, in octets; one octet more and none of them is looked into."""

MAX_TWINS: Final = 4
MAX_SEARCHED_BYTES: Final = 64 * 1024
MAX_PAIR_BYTES: Final = 4096
"""Name and value together, in octets (RFC 6265bis s5.6): a browser drops a larger cookie without a word."""

MAX_ATTRIBUTE_BYTES: Final = 1024
"""One attribute value, in octets (RFC 6265bis s5.6): a browser ignores a larger one."""

MAX_AGE_LIMIT: Final = timedelta(days=400)
"""The longest life a browser grants a cookie (RFC 6265bis s5.5)."""

SameSite: TypeAlias = Literal["Strict", "Lax", "None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The cookie came exactly once; `value` is as received, quotes included, and no id until checked."""

    value: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Missing:
    """No cookie of this name came."""


@dataclass(frozen=True, slots=True)
class Duplicated:
    """The name came more than once, perhaps tossed by a sibling host: treat as none, and raise an event."""


@dataclass(frozen=True, slots=True)
class Oversized:
    """The headers pass `MAX_COOKIE_BYTES` and were not looked into: treat as none."""


CookieLookup: TypeAlias = Found | Missing | Duplicated | Oversized

_MISSING: Final = Missing()
_DUPLICATED: Final = Duplicated()
_OVERSIZED: Final = Oversized()
_PAIR_BEGINS: Final = (b"", b"; ")


def find_cookie(values: Sequence[bytes], name: bytes) -> CookieLookup:
    """Look for one cookie by its exact name, in time linear in the size of the headers.

    `values` are the raw values of all `Cookie` headers in the order of arrival (HTTP/2 clients send several,
    RFC 9113 s8.2.3); WSGI has one, as Latin-1. `name` is a token, such as `CookieSettings.wire_name`. Pairs
    end at `;` and nowhere else: double quotes hide nothing, and a comma is part of a value, so that headers
    which a WSGI server has joined by commas give no id at all rather than a wrong one. Never raises, whatever
    the bytes are.
    """
    header = values[0] if len(values) == 1 else b";".join(values)
    if len(header) > MAX_COOKIE_BYTES:
        return _OVERSIZED
    value: bytes | None = None
    at = header.find(name)
    while at >= 0:
        # One look at the whole pair the hit lies in, then on to the next pair: the name may stand in another
        # cookie's value or end another cookie's name, and a value full of it must not be scanned again and
        # again (CVE-2024-7592).
        start = header.rfind(b";", 0, at) + 1
        end = header.find(b";", at)
        if end < 0:
            end = len(header)
        left, equals, right = header[start:end].partition(b"=")
        # SP and HTAB alone: a general strip() turns b"\xa0__Host-sid", which any sibling host may set, into
        # b"__Host-sid". Without `=` the pair is a nameless cookie and belongs to no name (CVE-2023-23934).
        if equals and left.strip(b" \t") == name:
            if value is not None:
                # A sibling host or a script can add a twin with a longer path, and the order tells nothing.
                return _DUPLICATED
            value = right.strip(b" \t")
        at = header.find(name, end + 1)
    return _MISSING if value is None else Found(value=value)


def sole_value(header: bytes, name: bytes) -> bytes | None:
    """The value of a cookie in the one `Cookie` header of a request, as browsers write it; None where it is not there
    or where somebody has to look closely: `find_cookie`, which finds the same."""
    if len(header) > MAX_COOKIE_BYTES:
        return None
    parts = header.split(name, 2)
    # The name stands there once, at the beginning of a pair.
    if len(parts) != 2 or parts[1][:1] != b"=" or parts[0][-2:] not in _PAIR_BEGINS:
        return None
    value = parts[1][1:]
    if b";" in value:
        value = value[: value.index(b";")]
    return value.strip(b" \t")


def every_value(values: Sequence[bytes], name: bytes) -> tuple[bytes, ...]:
    """All values a name was carried with, up to `MAX_TWINS`; for signing out alone, where a doubtful cookie must not
    stay alive. Nothing else may act on what it returns: which of them is ours cannot be told."""
    found: list[bytes] = []
    for header in values:
        for pair in header[:MAX_SEARCHED_BYTES].split(b";"):
            left, equals, right = pair.partition(b"=")
            if equals and left.strip(b" \t") == name:
                found.append(right.strip(b" \t"))
                if len(found) == MAX_TWINS:
                    return tuple(found)
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class CookieSettings:
    """Name and attributes of one cookie. Checked when built; safe to share between threads.

    The defaults are right for https. Whatever is weakened must be consistent: a name prefix promises
    attributes, and a browser silently drops a cookie that breaks the promise.

    Raises: ConfigurationError, whose detail names the field and the cure.
    """

    name: str = "__Host-Http-session"
    """Exact name. `__Host-` keeps sibling hosts from planting it, `Http-` keeps scripts from setting it. Two
    applications on one host need two names. Without a prefix both protections are gone."""

    domain: str | None = None
    """None: this host alone. A domain shares the cookie with every host below it, and each of them can read
    it and plant another one; it rules out the `__Host-` prefixes."""

    path: str = "/"
    """Where the cookie is sent. Not a protection: pages on other paths of the host can still reach it."""

    secure: bool = True
    """Send over https only. False puts the cookie in clear on the wire; only for http on a loopback host."""

    http_only: bool = True
    """Hide the cookie from scripts. False hands it to any script that gets into the page."""

    same_site: SameSite = "Lax"
    """`Lax`: also sent when somebody arrives by a link. `Strict`: only from our own pages; a visitor who
    arrives by a link looks signed out. `None`: sent from every site; only for embedding, and it needs
    `secure`."""

    max_age: timedelta | None = None
    """How long the browser keeps the cookie, in whole seconds. None: until the browser is closed."""

    partitioned: bool = False
    """Keep one cookie per embedding site (CHIPS). For embedded use, with `same_site="None"`."""

    def __post_init__(self) -> None:
        if not _TOKEN.fullmatch(self.name):
            raise ConfigurationError(
                "cookie.name: must be an RFC 6265 token; use letters, digits and any of !#$%&'*+-.^_`|~"
            )
        if len(self.name) > MAX_PAIR_BYTES:
            raise ConfigurationError(
                f"cookie.name: leaves no room for a value within {MAX_PAIR_BYTES} octets; use a shorter name"
            )
        # CR, LF and `;` in an attribute would write further attributes or headers (CVE-2026-0672,
        # CVE-2026-3644, CVE-2026-16052, and tornado before 6.5.5).
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ConfigurationError(
                "cookie.domain: must be an ASCII host name such as example.com, without a dot before or "
                "behind; write international names in their xn-- form, or leave the field out"
            )
        if not _PATH.fullmatch(self.path):
            raise ConfigurationError(
                "cookie.path: must begin with / and hold visible ASCII without a semicolon; percent-encode the rest"
            )
        for where, text in (("domain", self.domain or ""), ("path", self.path)):
            if len(text) > MAX_ATTRIBUTE_BYTES:
                raise ConfigurationError(
                    f"cookie.{where}: browsers ignore more than {MAX_ATTRIBUTE_BYTES} octets; shorten it"
                )
        if self.same_site not in _SAME_SITE:
            raise ConfigurationError("cookie.same_site: must be exactly Strict, Lax or None")
        if self.same_site == "None" and not self.secure:
            raise ConfigurationError("cookie.same_site: None needs secure=True; set it, or use Lax")
        if self.partitioned and not self.secure:
            raise ConfigurationError("cookie.partitioned: needs secure=True; set it, or leave partitioned out")
        if self.max_age is not None:
            _check_max_age(self.max_age)
        self._check_prefix()

    def _check_prefix(self) -> None:
        # Browsers compare prefixes without regard to case (RFC 6265bis s5.4), so `__host-` binds as well.
        name = self.name.lower()
        for prefix, field_name, kept, cure in (
            ("__secure-", "secure", self.secure, "secure=True"),
            ("__host-", "secure", self.secure, "secure=True"),
            ("__host-", "path", self.path == "/", 'path="/"'),
            ("__host-", "domain", self.domain is None, "domain=None"),
            ("__http-", "secure", self.secure, "secure=True"),
            ("__http-", "http_only", self.http_only, "http_only=True"),
            ("__host-http-", "http_only", self.http_only, "http_only=True"),
        ):
            if name.startswith(prefix) and not kept:
                raise ConfigurationError(
                    f"cookie.{field_name}: a browser drops {self.name!r} without it; set {cure}, "
                    "or choose a name without a prefix"
                )

    @cached_property
    def wire_name(self) -> bytes:
        """The name as `find_cookie` wants it."""
        return self.name.encode("ascii")

    @cached_property
    def wire_attributes(self) -> bytes:
        """Every attribute but the lifetime, as written on the wire; the same for setting and for deleting.

        A deletion that differs in Path, Domain, Secure or Partitioned leaves the cookie where it was.
        """
        parts = [f"; Path={self.path}"]
        if self.domain is not None:
            parts.append(f"; Domain={self.domain}")
        if self.secure:
            parts.append("; Secure")
        if self.http_only:
            parts.append("; HttpOnly")
        parts.append(f"; SameSite={self.same_site}")
        if self.partitioned:
            parts.append("; Partitioned")
        return "".join(parts).encode("ascii")

    @cached_property
    def wire_lifetime(self) -> bytes:
        """`max_age` as written on the wire; empty for a cookie that goes when the browser is closed."""
        return b"" if self.max_age is None else _max_age_attribute(self.max_age)


def render_set_cookie(settings: CookieSettings, value: str, *, max_age: timedelta | None = None) -> bytes:
    """Write the value of a `Set-Cookie` header.

    `value` is RFC 6265 cookie-octets; it is never quoted or escaped. `max_age` takes the place of
    `settings.max_age` for this one cookie (a login that is to be remembered); its fractions of a second are
    cut off.

    Raises: CookieTooLarge above `MAX_PAIR_BYTES` for name and value; ValueRefused for an octet that cannot
    stand in a cookie value, without repeating the value; ConfigurationError for a `max_age` under a second or
    above the limit.
    """
    # ASCII first: encode("ascii") would put the value, which is a secret, into the exception it raises.
    if not value.isascii():
        raise ValueRefused("a cookie value must be ASCII")
    octets = value.encode("ascii")
    if octets.translate(None, _COOKIE_OCTETS):
        raise ValueRefused(
            "a cookie value must not hold control characters, space, quote, comma, semicolon or backslash"
        )
    size = len(settings.wire_name) + len(octets)
    if size > MAX_PAIR_BYTES:
        raise CookieTooLarge(f"cookie {settings.name!r}: {size} octets of name and value, {MAX_PAIR_BYTES} at most")
    if max_age is None:
        return _render(settings, octets, settings.wire_lifetime)
    _check_max_age(max_age)
    return _render(settings, octets, _max_age_attribute(max_age))


def render_delete_cookie(settings: CookieSettings) -> bytes:
    """Write the value of a `Set-Cookie` header that removes the cookie `render_set_cookie` has set."""
    # Expires as well, for clients that do not know Max-Age.
    return _render(settings, b"", b"; Max-Age=0; Expires=Thu, 01 Jan 1970 00:00:00 GMT")


def _render(settings: CookieSettings, octets: bytes, lifetime: bytes) -> bytes:
    return b"%b=%b%b%b" % (settings.wire_name, octets, settings.wire_attributes, lifetime)


def _check_max_age(max_age: timedelta) -> None:
    # Under a second would be written as Max-Age=0, which deletes the cookie that is being set.
    if not timedelta(seconds=1) <= max_age <= MAX_AGE_LIMIT:
        raise ConfigurationError(
            f"cookie.max_age: must be from one second to {MAX_AGE_LIMIT.days} days; use None for a cookie "
            "that goes when the browser is closed"
        )


def _max_age_attribute(max_age: timedelta) -> bytes:
    return b"; Max-Age=%d" % (max_age // timedelta(seconds=1))


_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_DOMAIN: Final = re.compile(r"[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*")
_PATH: Final = re.compile(r"/[!-:<-~]*")
_SAME_SITE: Final = frozenset[str](("Strict", "Lax", "None"))
# RFC 6265 s4.1.1 cookie-octet: visible ASCII without DQUOTE, comma, semicolon and backslash.
_COOKIE_OCTETS: Final = bytes(octet for octet in range(0x21, 0x7F) if octet not in b'",;\\')
