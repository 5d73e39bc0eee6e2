"""Whose address a request came from, and what part of it counts.

Decides the client's address from the peer and `X-Forwarded-For`: forwarding headers count only when the peer is a
configured proxy, and are read from the right, past configured proxies only (CVE-2024-47070, allauth 65.14.1: forged
headers believed). It must never look a name up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final, TypeAlias

from coatcheck.errors import ConfigurationError

MAX_FORWARDED_OCTETS: Final = 1024

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientAddress:
    """`address` is `None` when it cannot be known. `forged` says that somebody sent forwarding headers without
    being a configured proxy: then the address is the peer's, and may be a proxy nobody configured."""

    address: str | None
    forged: bool


def parse_proxies(proxies: Iterable[str]) -> tuple[Network, ...]:
    """Read the configured proxies. Raises: ConfigurationError for a bad entry, or for one that trusts everybody."""
    networks: list[Network] = []
    for text in proxies:
        try:
            network = ip_network(text, strict=False)
        except ValueError as broken:
            raise ConfigurationError(f"trusted_proxies: {text!r} is no address or network") from broken
        # CVE-2026-76835: a default that trusted 0.0.0.0/0 believed every client.
        if network.prefixlen == 0:
            raise ConfigurationError(f"trusted_proxies: {text!r} would trust every client; name your proxies")
        networks.append(network)
    return tuple(networks)


def client_address(peer: str | None, forwarded_for: Sequence[bytes], proxies: tuple[Network, ...]) -> ClientAddress:
    """The address of the client. `forwarded_for` holds the values of every X-Forwarded-For line, in order."""
    direct = _address(peer) if peer is not None else None
    if direct is None:
        return ClientAddress(address=None, forged=bool(forwarded_for))
    if not _trusted(direct, proxies):
        return ClientAddress(address=str(direct), forged=bool(forwarded_for))
    if not forwarded_for:
        return ClientAddress(address=str(direct), forged=False)
    # Only the end counts: what our proxies have added stands there, whatever a client has put in front of it.
    line = b",".join(forwarded_for)
    if len(line) > MAX_FORWARDED_OCTETS:
        # The first entry of what is left may have been cut in two, and half an address is another address.
        line = line[-MAX_FORWARDED_OCTETS:].partition(b",")[2]
    nearest = direct
    for hop in reversed(line.split(b",")):
        found = _address(hop.strip(b" \t").decode("latin-1"))
        if found is None:
            # An unreadable hop ends the chain of trust: nothing left of it can be believed.
            return ClientAddress(address=str(nearest), forged=True)
        nearest = found
        if not _trusted(found, proxies):
            break
    return ClientAddress(address=str(nearest), forged=False)


def is_loopback(host: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    address = _address(host.strip("[]"))
    return address is not None and address.is_loopback


def network_of(address: str) -> str:
    """The network that counts for limits: the address itself for IPv4, its /64 for IPv6."""
    parsed = ip_address(address)
    return str(parsed) if parsed.version == 4 else str(ip_network((parsed, 64), strict=False))


def family_of(address: str) -> str:
    """`"4"` or `"6"`."""
    return str(ip_address(address).version)


def _address(text: str) -> Address | None:
    try:
        parsed = ip_address(text)
    except ValueError:
        return None
    # ::ffff:203.0.113.7 is the same client as 203.0.113.7.
    return parsed.ipv4_mapped or parsed if parsed.version == 6 else parsed


def _trusted(address: Address, proxies: tuple[Network, ...]) -> bool:
    return any(address.version == network.version and address in network for network in proxies)
