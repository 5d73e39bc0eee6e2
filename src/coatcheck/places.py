"""Places as one application sees them: the policy, what reads it, and marks that make a matching request cheap.

Decides what of a request is looked at (`ClientPlace`) and how it becomes a mark: eight octets that are equal where the
places are, under a key of this process, so that a near copy can say "as last time" without keeping an address. It must
never decide what follows from another place: `core/binding.py` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from coatcheck.core.binding import Surveyor
from coatcheck.core.freshness import BoundedTable
from coatcheck.core.near_session import MARK
from coatcheck.operations.place import Seen

_REMEMBERED: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientPlace:
    """Where a request came from: the client's address if it is known, what its browser calls itself, and the device
    as its sessions name it (`core.device.device_of`).

    `mark` stands for all of it, where an application compares places; empty elsewhere.
    """

    address: str | None = None
    user_agent: str = ""
    device: str | None = None
    mark: bytes = b""


class Binding:
    """The policy of one application at work. Threads may share it."""

    def __init__(self, surveyor: Surveyor, key: bytes) -> None:
        """`key`: 16 random bytes of this process alone, so that nobody can aim at a mark."""
        self.surveyor: Final = surveyor
        self._key: Final = key
        self.known: BoundedTable[ClientPlace] = BoundedTable(_REMEMBERED)
        """Places by the raw header fields they were read from: reading them takes longer than checking a session."""

    def marked(self, address: str | None, user_agent: str, device: str | None) -> ClientPlace:
        """A place with its mark."""
        packed = self.surveyor.seen(address, user_agent, device).pack()
        mark = blake2b(packed, key=self._key, digest_size=MARK).digest()
        return ClientPlace(address=address, user_agent=user_agent, device=device, mark=mark)

    def seen(self, place: ClientPlace) -> Seen:
        """The place as the policy sees it."""
        return Seen(place=self.surveyor.seen(place.address, place.user_agent, place.device), address=place.address)
