"""Which sessions an administrator means.

One rule for lists and for filtered revokes, applied to sessions a store has already found alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from coatcheck.core.ports import Seen
from coatcheck.core.session import SECOND_US, Authority
from coatcheck.errors import ValueRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFilter:
    """Every given condition must hold. Times are Unix seconds, both exclusive.

    `network` is an address or a network (`203.0.113.0/24`). `signed_in=None` means anonymous sessions as well.
    """

    subject: str | None = None
    network: str | None = None
    created_before: float | None = None
    seen_before: float | None = None
    signed_in: bool | None = True

    def __post_init__(self) -> None:
        if self.network is not None:
            try:
                ip_network(self.network, strict=False)
            except ValueError as broken:
                raise ValueRefused("network: not an address or a network") from broken

    def matches(self, seen: Seen, authority: Authority) -> bool:
        """Whether the filter means this session."""
        session = seen.session
        return (
            (self.subject is None or (session.owner != "" and session.subject == self.subject))
            and (self.signed_in is None or (session.owner != "") == self.signed_in)
            and (self.created_before is None or session.created_us < self.created_before * SECOND_US)
            and (self.seen_before is None or seen.seen_us < self.seen_before * SECOND_US)
            and (self.network is None or _in_network(authority, self.network))
        )


def _in_network(authority: Authority, text: str) -> bool:
    network = ip_network(text, strict=False)
    for address in authority.networks.values():
        try:
            if ip_address(address) in network:
                return True
        except ValueError:
            continue
    return False
