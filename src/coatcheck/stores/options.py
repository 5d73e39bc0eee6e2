"""What every store is told when it is made."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from coatcheck.core.ports import Colour, Waits
from coatcheck.errors import ConfigurationError
from coatcheck.system import System

_NAMESPACE: Final = re.compile(r"[a-z][a-z0-9_]{0,31}")


def _no_offset() -> int:
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreOptions:
    """Colour, waits, clock and name space of one store.

    `deadline` bounds each verb, in seconds. `replicas` have to confirm the end of a session before it counts, where
    the store can ask them (Redis and Valkey). `clock_offset_us` is added to the store's clock inside every verb: a
    lever for tests, because a server's own clock cannot be handed in.
    """

    colour: Colour
    waits: Waits
    system: System
    namespace: str = "coatcheck"
    deadline: float = 2.0
    replicas: int = 0
    clock_offset_us: Callable[[], int] = _no_offset

    def __post_init__(self) -> None:
        if not _NAMESPACE.fullmatch(self.namespace):
            raise ConfigurationError(
                "namespace: use 1 to 32 lower-case letters, digits and underscores, starting with a letter"
            )
        if not 0 < self.deadline <= 60:
            raise ConfigurationError("store_deadline: between 0 and 60 seconds")
        if self.replicas < 0:
            raise ConfigurationError("replicas: not negative")
