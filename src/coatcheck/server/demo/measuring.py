"""Sign in, warm every node, end the session on one, and measure when each other node refuses it.

Decides what a delay is: from just before the revoke was sent to the moment the first refusal is at hand, the way to the
store that it took included. Decides too what counts as lost: a node that never refuses, one that accepts the session
again after it had refused, and one that still accepts it a lease after the revoke was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from coatcheck.server.demo.messages import (
    Cut,
    Done,
    Mend,
    Revoke,
    Revoked,
    SignedIn,
    SignIn,
    Warm,
    Warmed,
    Watch,
    Watched,
    Watching,
)
from coatcheck.server.demo.nodes import DemoFailed, Node

PATIENCE_SECONDS: Final = 3.0
"""How long beyond the lease a node is waited for before its refusal counts as lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one node saw of one revoke. `delay` in seconds; None when the refusal was lost."""

    node: int
    delay: float | None
    near: int
    commands: int
    is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One revoke. `took`: seconds until the node that ended the session had its answer."""

    number: int
    ended_on: int
    took: float
    seen: tuple[Seen, ...]


@dataclass(slots=True, kw_only=True)
class Tally:
    """One node over all rounds. `warm_commands`: how often it asked the store in `warm_checks` checks when warm."""

    node: int
    pid: int
    is_cut: bool
    delays: list[float] = field(default_factory=list)
    lost: int = 0
    warm_checks: int = 0
    warm_commands: int = 0

    @property
    def last(self) -> float | None:
        """The latest delay."""
        return self.delays[-1] if self.delays else None

    @property
    def middle(self) -> float | None:
        """The median delay."""
        return median(self.delays) if self.delays else None

    @property
    def worst(self) -> float | None:
        """The longest delay."""
        return max(self.delays) if self.delays else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """The sample user's session. The id is a secret of this process and its nodes."""

    id: str = field(repr=False)
    sid: str


class Stage:
    """The nodes and what was measured. One thing at a time; `told` is called after each step, and with each refusal."""

    def __init__(self, nodes: list[Node], *, lease: float, cut: bool) -> None:
        self.nodes: Final = nodes
        self.lease: Final = lease
        self.cut: Final = nodes[-1] if cut else None
        self.rounds: Final[list[Round]] = []
        self.tallies: Final = {
            node.number: Tally(node=node.number, pid=node.pid, is_cut=node is self.cut) for node in nodes
        }
        self.ended_on: int | None = None
        """The node where the latest revoke was sent; None while the session lives."""
        self.refused: Final[dict[int, float | None]] = {}
        """Who has refused the latest session, and how late (seconds); None where the refusal was lost."""
        self.told: Callable[[], None] = lambda: None
        self._session: Session | None = None
        self._turn = asyncio.Lock()

    @property
    def is_signed_in(self) -> bool:
        """Whether there is a session to end."""
        return self._session is not None

    @property
    def lost(self) -> int:
        """Refusals that were lost, over all nodes and rounds."""
        return sum(tally.lost for tally in self.tallies.values())

    async def sign_in(self) -> None:
        """Sign the sample user in on the first node and warm all of them; nothing to do while somebody is signed in.
        Raises: DemoFailed."""
        async with self._turn:
            if self._session is not None:
                return
            new = await self.nodes[0].ask(SignIn(), SignedIn)
            self._session = Session(id=new.id, sid=new.sid)
            await self._warm(self._session)
            self.ended_on = None
            self.refused.clear()
            self.told()

    async def end(self) -> Round | None:
        """End the session on one node, the next one each time, and measure on all others. None when nobody is signed
        in: of several callers at once the first one ends it. Raises: DemoFailed."""
        async with self._turn:
            session, self._session = self._session, None
            if session is None:
                return None
            await self._warm(session)
            able = [node for node in self.nodes if node is not self.cut]
            ending = able[len(self.rounds) % len(able)]
            others = [node for node in self.nodes if node is not ending]
            if self.cut is not None:
                await self.cut.ask(Cut(), Done)
            for node in others:
                node.tell(Watch(id=session.id, seconds=self.lease + PATIENCE_SECONDS))
            for node in others:
                await node.hear(Watching)
            self.ended_on = ending.number
            revoked = await ending.ask(Revoke(id=session.id, sid=session.sid), Revoked)
            if not revoked.refused:
                self.tallies[ending.number].lost += 1
            seen = await asyncio.gather(*(self._seen(node, revoked.sent_at) for node in others))
            if self.cut is not None:
                await self.cut.ask(Mend(), Done)
            done = Round(
                number=len(self.rounds) + 1,
                ended_on=ending.number,
                took=revoked.answered_at - revoked.sent_at,
                seen=tuple(seen),
            )
            self.rounds.append(done)
            self.told()
            return done

    async def _warm(self, session: Session) -> None:
        warmed = await asyncio.gather(*(node.ask(Warm(id=session.id), Warmed) for node in self.nodes))
        for node, found in zip(self.nodes, warmed, strict=True):
            tally = self.tallies[node.number]
            tally.warm_checks += found.checks
            tally.warm_commands += found.commands

    async def _seen(self, node: Node, sent_at: float) -> Seen:
        found = await node.hear(Watched, seconds=self.lease + 2 * PATIENCE_SECONDS)
        if found.refused_at is not None and found.refused_at < sent_at:
            raise DemoFailed(f"node {node.number} refused the session before anybody ended it")
        # The last yes was given not before that check began: a check that began a lease later is one too many.
        late = found.accepted_at - sent_at >= self.lease
        delay = None if found.refused_at is None else found.refused_at - sent_at
        tally = self.tallies[node.number]
        if delay is None or late or found.again:
            tally.lost += 1
        if delay is not None:
            tally.delays.append(delay)
        self.refused[node.number] = delay
        self.told()
        return Seen(node=node.number, delay=delay, near=found.near, commands=found.commands, is_cut=node is self.cut)
