"""Session ids that were never ours, counted by the network they come from.

Decides when a network is refused for guessing, and for how long; the rule itself is `id_guessing` of `core/risk.py`.
Each server counts for itself, in memory and bounded: an invented id must not cost a store anything. Nothing is counted
where the rule is off, and nobody is refused by what he did in another network.
"""

from __future__ import annotations

import logging
from typing import Final

from coatcheck.core.freshness import BoundedTable
from coatcheck.core.risk import CountRule, Figure, History, Observation, Rules, decide, explain, remember

log = logging.getLogger("coatcheck.server")

MAX_NETWORKS: Final = 4096
"""Networks that are counted at once; the one that began first is forgotten first."""

MAX_REFUSED: Final = 1024
"""Networks that are refused at once; one more takes the place of the one that would be let in first."""

MAX_TOLD: Final = 60
TOLD_PERIOD: Final = 3600.0
"""Of so many refusals in so many seconds an event tells: anybody can cause them, from as many networks as he has, and
the audit log is never emptied."""


class Guesses:
    """The guesses of one process. Times are Unix seconds."""

    def __init__(self, rule: CountRule | None) -> None:
        self._rules = Rules(
            new_device=None,
            new_country=None,
            impossible_travel=None,
            velocity=None,
            id_guessing=rule,
            refresh_reuse=None,
        )
        self._seen: BoundedTable[History] = BoundedTable(MAX_NETWORKS)
        self._refused: dict[str, float] = {}
        self._told: list[float] = []

    @property
    def counts(self) -> bool:
        """Whether the rule is on."""
        return self._rules.id_guessing is not None

    @property
    def refuses(self) -> bool:
        """Whether any network may be refused now: what every request asks first."""
        return bool(self._refused)

    def note(self, network: str, at: float) -> dict[str, Figure] | None:
        """Count one invented id. The data of an event when the rule has spoken and somebody is to be told."""
        observation = Observation(kind="id_forged", at=at)
        history = self._seen.get(network) or History()
        decision = decide(self._rules, history, observation)
        if not decision.reasons:
            self._seen.put(network, remember(history, observation, decision))
            return None
        # Counted anew from here: one refusal is told once, not with every guess that follows.
        self._seen.put(network, History())
        if decision.block_for:
            self._refuse(network, at + decision.block_for, at)
        self._told = [each for each in self._told if at - TOLD_PERIOD < each <= at]
        if len(self._told) >= MAX_TOLD:
            log.warning("a network guesses at session ids; too many were told of lately for one more event")
            return None
        self._told.append(at)
        return explain(observation, decision)

    def refused_until(self, network: str, at: float) -> float:
        """Until when a network is refused; 0: it is not. At that very moment it is not any more."""
        until = self._refused.get(network, 0.0)
        if until and at >= until:
            self._refused.pop(network, None)
            return 0.0
        return until

    def _refuse(self, network: str, until: float, at: float) -> None:
        self._refused[network] = until
        if len(self._refused) > MAX_REFUSED:
            self._refused = {name: end for name, end in self._refused.items() if at < end}
        while len(self._refused) > MAX_REFUSED:
            del self._refused[min(self._refused, key=self._refused.__getitem__)]
