"""May this request change something, or did another site send it? Decided without a token.

Decides from `Sec-Fetch-Site`, and from `Origin` where a browser does not send the former; a page's script can
set neither. It must never look at cookies (a request that signs somebody in has none yet), never trust a
sibling host, and never compare with `Host` when the public origins are known. It guards no GET, because a GET
changes nothing, and it is no help against a script injected into our own page.

Known weaknesses: plain http carries no `Sec-Fetch-Site`, so all rests on `Origin` there; and where no public
origin is configured, a name that an attacker points at our address (DNS rebinding) is its own origin and
passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from ipaddress import AddressValueError, IPv6Address
from typing import Final, TypeAlias

from coatcheck.errors import ConfigurationError

SAFE_METHODS: Final = frozenset(("GET", "HEAD", "OPTIONS"))
"""Pass unseen. Names are exact, as methods are case-sensitive (RFC 9110 s9.1). TRACE is safe by its RFC and
yet not here: no browser sends it for a page, so nobody is hurt when it is looked at."""

MAX_ORIGIN_BYTES: Final = 512
"""A longer `Origin` is malformed: scheme, host of 253 octets and port need far less."""


class Refusal(StrEnum):
    """Why a request was refused. The values are stable: events and logs carry them."""

    CROSS_SITE = "cross_site"
    """The browser says that another site has sent it, or had a hand in it by a redirect."""
    SAME_SITE = "same_site"
    """The browser says that a sibling host, or another port of ours, has sent it."""
    FETCH_SITE_UNKNOWN = "fetch_site_unknown"
    """`Sec-Fetch-Site` holds none of the four values we know."""
    FETCH_SITE_REPEATED = "fetch_site_repeated"
    """`Sec-Fetch-Site` came more than once."""
    ORIGIN_REPEATED = "origin_repeated"
    """`Origin` came more than once."""
    ORIGIN_NULL = "origin_null"
    """`Origin: null`, and no `Sec-Fetch-Site` to say whose page it was."""
    ORIGIN_MALFORMED = "origin_malformed"
    """`Origin` is not one serialized origin (RFC 6454 s6.2)."""
    ORIGIN_FOREIGN = "origin_foreign"
    """`Origin` is neither ours nor trusted."""
    HOST_UNUSABLE = "host_unusable"
    """No public origin is configured, and scheme and `Host` do not make one."""


@dataclass(frozen=True, slots=True)
class Passed:
    """Nothing speaks against the request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Answer 403 and do nothing else."""

    reason: Refusal


Decision: TypeAlias = Passed | Refused

_PASSED: Final = Passed()


@dataclass(frozen=True, kw_only=True)
class OriginPolicy:
    """Whose pages may change something here. Checked when built; safe to share between threads.

    Raises: ConfigurationError, whose detail names the field and the cure.
    """

    public_origins: frozenset[str] = frozenset()
    """Where browsers reach us, as `https://login.example`. Empty: scheme and `Host` of the request are
    believed, which is right only for development and behind a proxy that sets both."""

    trusted_origins: frozenset[str] = frozenset()
    """Other origins whose pages may send unsafe requests. Each of them can act as the signed-in user,
    wherever the cookie is sent; an injected script over there is an injected script here."""

    def __post_init__(self) -> None:
        for origin in self.normal_public_origins:
            if not origin.startswith((b"http://", b"https://")):
                raise ConfigurationError("public_origins: must begin with https://, or http:// in development")
        _ = self.normal_trusted_origins

    @cached_property
    def normal_public_origins(self) -> frozenset[bytes]:
        """`public_origins` in the one spelling that is compared."""
        return _checked("public_origins", self.public_origins)

    @cached_property
    def normal_trusted_origins(self) -> frozenset[bytes]:
        """`trusted_origins` in the one spelling that is compared."""
        return _checked("trusted_origins", self.trusted_origins)


def check_origin(
    policy: OriginPolicy,
    *,
    method: str,
    websocket: bool,
    sec_fetch_site: Sequence[bytes],
    origin: Sequence[bytes],
    scheme: str,
    host: bytes | None,
) -> Decision:
    """Decide whether a request may change something: any unsafe method, any WebSocket handshake.

    `sec_fetch_site` and `origin` are all values of the headers of that name, empty when there is none.
    `scheme` and `host` (the `Host` header) are read only when no public origin is configured; `ws` and `wss`
    count as `http` and `https`. Whether a cookie came does not matter. Never raises, whatever the bytes are.
    """
    if method in SAFE_METHODS and not websocket:
        return _PASSED
    # A second value is never a browser's. Two readers that each take another one of them would disagree.
    if len(sec_fetch_site) > 1:
        return Refused(reason=Refusal.FETCH_SITE_REPEATED)
    if len(origin) > 1:
        return Refused(reason=Refusal.ORIGIN_REPEATED)
    # Sec-Fetch-Site comes first: our own form under `Referrer-Policy: no-referrer` has `Origin: null`.
    if sec_fetch_site:
        return _by_fetch_site(policy, sec_fetch_site[0], origin)
    if not origin:
        # Browsers send Origin with every unsafe request and every handshake: this is a program, and nobody's
        # cookies ride along against their owner's will.
        return _PASSED
    return _by_origin(policy, origin[0], scheme, host)


def _by_fetch_site(policy: OriginPolicy, site: bytes, origin: Sequence[bytes]) -> Decision:
    # `none` is the user's own doing: a typed address, a bookmark.
    if site == b"same-origin" or site == b"none":
        return _PASSED
    if origin and _normal_origin(origin[0]) in policy.normal_trusted_origins:
        return _PASSED
    # `same-site` is not ours: even a Strict cookie goes along from a sibling host, whoever runs it.
    return Refused(reason=_REFUSED_SITES.get(site, Refusal.FETCH_SITE_UNKNOWN))


def _by_origin(policy: OriginPolicy, value: bytes, scheme: str, host: bytes | None) -> Decision:
    if value == b"null":
        # Without Sec-Fetch-Site there is no telling our page from a sandboxed frame of anybody's.
        return Refused(reason=Refusal.ORIGIN_NULL)
    origin = _normal_origin(value)
    if origin is None:
        return Refused(reason=Refusal.ORIGIN_MALFORMED)
    if origin in policy.normal_trusted_origins:
        return _PASSED
    if policy.normal_public_origins:
        return _PASSED if origin in policy.normal_public_origins else Refused(reason=Refusal.ORIGIN_FOREIGN)
    own = _own_origin(scheme, host)
    if own is None:
        return Refused(reason=Refusal.HOST_UNUSABLE)
    return _PASSED if origin == own else Refused(reason=Refusal.ORIGIN_FOREIGN)


def _own_origin(scheme: str, host: bytes | None) -> bytes | None:
    web_scheme = _WEB_SCHEMES.get(scheme)
    return None if web_scheme is None or host is None else _normal_origin(web_scheme + b"://" + host)


def _checked(where: str, origins: Iterable[str]) -> frozenset[bytes]:
    normal = set[bytes]()
    for text in origins:
        # `null` and `*` fail here as well: any sandboxed frame is `null`. The message leaves out what stands
        # before an `@`, which may be a password.
        origin = _normal_origin(text.encode("utf-8", "surrogatepass"))
        if origin is None:
            raise ConfigurationError(
                f"{where}: {text.rpartition('@')[2]!r} is not an origin; write scheme://host[:port] without "
                "path, user or final dot, and international names in their xn-- form"
            )
        normal.add(origin)
    return frozenset(normal)


def _normal_origin(value: bytes) -> bytes | None:
    """Scheme and host in lower case, default port dropped; None for all that is not exactly one origin."""
    if len(value) > MAX_ORIGIN_BYTES:
        return None
    # The whole value must match: a path, `user@`, a second value or a line end is never cut off to fit.
    match = _ORIGIN.fullmatch(value)
    if match is None:
        return None
    scheme, host, port = match["scheme"].lower(), match["host"].lower(), match["port"]
    if host.startswith(b"["):
        try:
            host = b"[%s]" % IPv6Address(host[1:-1].decode("ascii")).compressed.encode("ascii")
        except AddressValueError:
            return None
    if port is None or port == _DEFAULT_PORTS.get(scheme):
        return scheme + b"://" + host
    return None if int(port) > 65535 else scheme + b"://" + host + b":" + port


# No final dot: `a.example.` is another origin than `a.example` to a browser, and the same host to DNS.
_ORIGIN: Final = re.compile(
    rb"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"
    rb"(?P<host>[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\])"
    rb"(?::(?P<port>[1-9][0-9]{0,4}))?"
)
_DEFAULT_PORTS: Final[dict[bytes, bytes]] = {b"http": b"80", b"https": b"443"}
_WEB_SCHEMES: Final[dict[str, bytes]] = {"http": b"http", "https": b"https", "ws": b"http", "wss": b"https"}
_REFUSED_SITES: Final[dict[bytes, Refusal]] = {
    b"cross-site": Refusal.CROSS_SITE,
    b"same-site": Refusal.SAME_SITE,
}
