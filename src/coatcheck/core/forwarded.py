"""What a gateway says about the request it asks for, and which of it may be believed.

Decides who may ask at all (the peer of the connection, never a header), what a request to a forward-auth address must
bring, which rule an address means, and what identity looks like in a header. The decision itself rests on a session
and a rule's roles alone: no path, query, host or browser name of the request behind the gateway is ever part of it, so
there is nothing to walk around (CVE-2025-54576, CVE-2026-33494, CVE-2026-34457, CVE-2025-29927).

It must never look a name up and never normalise an address: of two readings a hostile one would be the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Final, Literal, TypeAlias
from urllib.parse import quote

from coatcheck.core.network import Network
from coatcheck.errors import ConfigurationError

Gateway: TypeAlias = Literal["nginx", "traefik", "caddy", "envoy"]

GATEWAYS: Final[tuple[Gateway, ...]] = ("nginx", "traefik", "caddy", "envoy")
MAX_RULES: Final = 64

_METHOD_OF: Final[Mapping[Gateway, bytes | None]] = {
    "nginx": b"x-original-method",
    "traefik": b"x-forwarded-method",
    "caddy": b"x-forwarded-method",
    # Envoy asks with the method and the address of the request itself.
    "envoy": None,
}
# What a gateway sets for one request, so that two of one name are one of somebody else's.
_ONCE: Final = frozenset(
    {
        b"x-original-method",
        b"x-original-url",
        b"x-forwarded-method",
        b"x-forwarded-uri",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"host",
    }
)
_NOTED: Final = _ONCE | {b"sec-websocket-key", b"accept"}
_RULE: Final = re.compile(r"([a-z][a-z0-9-]{0,31})=([A-Za-z0-9_.-]{1,64}(?:\+[A-Za-z0-9_.-]{1,64}){0,15})")
# Printable, and with no meaning in a header, a list or a shell: everything else is escaped.
_PLAIN: Final = "@!$&'*+=:~._-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Who is let in. `name` is empty for everybody who is signed in; else one of `roles` is needed."""

    name: str = ""
    roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The request behind the gateway, as far as it is told. `address` is path and query, raw, or `None`."""

    method: str
    websocket: bool
    accept: bytes | None
    scheme: bytes | None
    host: bytes | None
    address: bytes | None


Unclear: TypeAlias = Literal["no_method", "header_repeated"]
"""Why a request to a forward-auth address tells nothing that can be relied on."""


def parse_rules(texts: Iterable[str]) -> tuple[Rule, ...]:
    """Read `name=role+role`. Raises: ConfigurationError for a bad rule, or two of one name."""
    rules: dict[str, Rule] = {}
    for text in texts:
        found = _RULE.fullmatch(text)
        if found is None:
            raise ConfigurationError(
                f"forward_rules: {text[:80]!r} is no rule; write a name in small letters and the roles it lets in, as "
                "staff=admin+editor"
            )
        if found[1] in rules:
            raise ConfigurationError(f"forward_rules: {found[1]!r} is there twice")
        rules[found[1]] = Rule(name=found[1], roles=frozenset(found[2].split("+")))
    if len(rules) > MAX_RULES:
        raise ConfigurationError(f"forward_rules: at most {MAX_RULES}")
    return tuple(rules.values())


def is_trusted_peer(peer: str | None, proxies: Sequence[Network]) -> bool:
    """Whether the other end of a connection is a configured proxy. What its headers say is not asked."""
    try:
        address = ip_address(peer or "")
    except ValueError:
        return False
    if address.version == 6:
        address = address.ipv4_mapped or address
    return any(address.version == network.version and address in network for network in proxies)


def read_asked(
    gateway: Gateway, *, method: str, below: bytes, headers: Iterable[tuple[bytes, bytes]]
) -> Asked | Unclear:
    """What a gateway tells. `method` and `below` are those of its own question: `below` is what follows the address.

    A header that a gateway sets once and that is there twice makes everything unclear. Twins with an underscore are
    other names and mean nothing here (CVE-2025-64484).
    """
    told: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _NOTED:
            if name in told and name in _ONCE:
                return "header_repeated"
            told[name] = value
    named = _METHOD_OF[gateway]
    if named is not None:
        given = told.get(named)
        if not given:
            return "no_method"
        method = given.decode("latin-1")
    is_envoy = gateway == "envoy"
    return Asked(
        method=method,
        websocket=b"sec-websocket-key" in told,
        accept=told.get(b"accept"),
        scheme=told.get(b"x-forwarded-proto"),
        host=told.get(b"host" if is_envoy else b"x-forwarded-host"),
        address=below if is_envoy else told.get(b"x-forwarded-uri"),
    )


@lru_cache(maxsize=1024)
def identity_text(text: str) -> bytes:
    """Text as the value of an identity header: percent-escaped UTF-8 where it is not plain ASCII.

    Two texts never give one value: `%` itself is escaped. No line end, comma or control character is left.
    """
    return quote(text, safe=_PLAIN).encode("ascii")


def cookies_without(values: Sequence[bytes], names: frozenset[bytes]) -> bytes:
    """The `Cookie` header for the service behind: every pair but those of these names, in order."""
    return b"; ".join(
        pair
        for value in values
        for pair in (each.strip(b" \t") for each in value.split(b";"))
        if pair and pair.partition(b"=")[0].strip(b" \t") not in names
    )
