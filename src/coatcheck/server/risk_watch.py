"""The rules about risk at work: what a running server asks them, and how it carries out what they decide.

    what happens                              asked                       what may follow
    a sign-in with the right password         `admit`, before its session  told; refused (403); other sessions end
    a sign-in with a wrong one                `note_failure`               unknown browsers are refused for a while
    a refresh token that comes again          `hear`, afterwards           the same; the store has ended the session
    session ids that were never ours          `hear`, at once              the network is refused for a while

A step-up at a sign-in is met by the password that was given this moment. Each decision is told once, in an event with
its reasons: a history is replaced only on the version it was judged by, and who was second judges again. Nothing here
speaks before a password was right, and a name nobody has costs what a wrong password costs. No session that is genuine,
and no browser that has signed in to the account before, is ever refused here (SEMANTICS 8).

It must never be asked for a request of a session that is in its place: that costs nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from base64 import urlsafe_b64encode
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from coatcheck.core.binding import severity
from coatcheck.core.geo import NOWHERE
from coatcheck.core.network import network_of
from coatcheck.core.risk import (
    ACCEPTED,
    Decision,
    Figure,
    History,
    Kind,
    Observation,
    Rules,
    Verdict,
    at_the_door,
    explain,
    remember,
)
from coatcheck.core.session import SECOND_US
from coatcheck.errors import SignInBlocked, StoreUnavailable, Throttled
from coatcheck.events import Event
from coatcheck.manager import AsyncCoatcheck
from coatcheck.primitives.digest import keyed
from coatcheck.server.guesses import Guesses
from coatcheck.server.risk_history import RiskHistories
from coatcheck.system import System

log = logging.getLogger("coatcheck.server")

REASON_RISK: Final = "unusual_sign_in"
"""Why sessions ended that a rule with `revoke` ended at a sign-in."""

WHY_BLOCKED: Final = "blocked"
"""What `login.failed` says of a sign-in whose password was right, and that a rule refused."""

MAX_TRIES: Final = 16
"""How often a sign-in is judged anew because another one of the same account was remembered first."""

_PLACE_BYTES: Final = 12


class RiskWatch:
    """The rules of one server, for tasks of one event loop. Several servers share what is remembered, through the
    database; what is counted of session ids each one counts for itself."""

    def __init__(self, coat: AsyncCoatcheck, histories: RiskHistories, *, rules: Rules, system: System) -> None:
        self.rules: Final = rules
        self.guesses: Final = Guesses(rules.id_guessing)
        self._coat = coat
        self._histories = histories
        self._system = system
        self._tasks: set[asyncio.Task[None]] = set()
        by_account = (
            rules.new_device,
            rules.new_country,
            rules.impossible_travel,
            rules.velocity,
            rules.refresh_reuse,
        )
        self._judges = any(rule is not None for rule in by_account)
        self._sternest = max((severity(rule.outcome) for rule in by_account if rule is not None), default=0)

    # -- sign-ins ----------------------------------------------------------------------------------------------------

    async def admit(self, subject: str, *, address: str | None, device: str | None, known: bool) -> None:
        """Judge a sign-in whose password was right this moment. Returns if it may go on.

        `address` is None where it cannot be believed. `device` is what a session keeps of the browser
        (`core.device.device_of`); `known`: its cookie proves that it has signed in to this very account before. Exact
        under concurrency: of any number of sign-ins for which one thing is new, one is told. Raises: SignInBlocked;
        StoreUnavailable, also where a rule does more than tell and what it decided could not be written.
        """
        if not self._judges:
            return
        observation = self._observe("sign_in", address, device)
        verdict = await self._judge(subject, observation, known=known)
        decision = verdict.decision
        if decision is not None and decision.reasons:
            self._tell(subject, observation, decision, address)
            if decision.outcome == "revoke":
                await self._end_sessions(subject)
        if verdict.refused_until:
            self._tell_blocked(subject, observation, address)
            raise SignInBlocked(max(1, math.ceil(verdict.refused_until - observation.at)))

    async def note_failure(self, subject: str | None, *, named: str, address: str | None) -> None:
        """Count a sign-in whose password was wrong; `subject` is None where nobody has the name.

        A name that nobody has is counted too, for nobody: the time an answer takes must not tell it from one that
        somebody has. Raises: StoreUnavailable.
        """
        if self.rules.velocity is None:
            return
        observation = self._observe("sign_in_failed", address, None)
        verdict = await self._judge(subject or self._nobody(named), observation, known=False, always=True)
        decision = verdict.decision
        if subject is not None and decision is not None and decision.reasons:
            self._tell(subject, observation, decision, address)

    async def lift(self, subject: str) -> None:
        """See `RiskHistories.lift`."""
        await self._histories.lift(subject)

    async def _judge(self, subject: str, observation: Observation, *, known: bool, always: bool = False) -> Verdict:
        """Judge by what is remembered, and remember. `always`: write even where nothing has changed."""
        tries = 0
        while True:
            read = await self._histories.read(subject)
            history = read.history
            if known and observation.device:
                # The cookie's word is better than what is remembered, which is bounded and began one day.
                seen = Observation(kind="sign_in", at=observation.at, device=observation.device)
                history = remember(history, seen, ACCEPTED)
            verdict = at_the_door(self.rules, history, observation)
            kept = self._needed(verdict.history)
            if kept == read.history and not always:
                return verdict
            if await self._histories.replace(subject, kept, read=read):
                return verdict
            tries += 1
            if tries == MAX_TRIES:
                break
        if self._sternest > severity("notify") and observation.kind == "sign_in":
            raise StoreUnavailable("a sign-in could not be judged: too many of one account at once")
        log.warning("coatcheck: a sign-in is not remembered by the rules about risk: too many of one account at once")
        return verdict

    def _needed(self, history: History) -> History:
        """What rules that are on will ask for: nothing is written for the others."""
        if self.rules.velocity is None and history.counts:
            history = replace(history, counts={})
        if self.rules.impossible_travel is None and history.located is not None:
            history = replace(history, located=None, located_at=0.0)
        return history

    async def _end_sessions(self, subject: str) -> None:
        try:
            await self._coat.revoke_subject(subject, reason=REASON_RISK)
        except StoreUnavailable:
            # It is remembered as done, so it has to be: also if whoever signs in does not try again.
            self._coat.engine.owe_revocation(subject, REASON_RISK, None)
            raise

    # -- what the engine tells -----------------------------------------------------------------------------------------

    def hear(self, event: Event) -> None:
        """Take one event of the engine; never waits. Call it in the server's event loop."""
        if event.kind == "session_id.forged":
            self._note_guess(event)
        elif event.kind == "refresh.reused" and event.subject is not None and self.rules.refresh_reuse is not None:
            task = asyncio.get_running_loop().create_task(self._note_reuse(event.subject, event.at))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def settle(self) -> None:
        """Wait until everything that was heard has been judged."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _note_reuse(self, subject: str, at: float) -> None:
        observation = Observation(kind="refresh_reused", at=at)
        try:
            verdict = await self._judge(subject, observation, known=False)
        except StoreUnavailable as lost:
            log.warning("coatcheck: a refresh token that came again is not judged: %s", lost.detail)
            return
        if verdict.decision is not None and verdict.decision.reasons:
            self._tell(subject, observation, verdict.decision, None)

    def _note_guess(self, event: Event) -> None:
        network = event.data.get("network")
        if not self.guesses.counts or not isinstance(network, str):
            return
        told = self.guesses.note(network_of(network), event.at)
        if told is not None:
            data = {**told, "network": shown_network(network)}
            self._coat.engine.publish(Event(kind="risk.decided", at=event.at, data=data))

    def check_network(self, address: str | None) -> None:
        """Let nobody on who comes from a network that guesses at session ids, for as long as it is refused.

        Not to be asked for a genuine session, nor for a browser that the account knows. Raises: Throttled.
        """
        if not self.guesses.refuses or address is None:
            return
        now = self._system.now_us() / SECOND_US
        until = self.guesses.refused_until(network_of(address), now)
        if until:
            raise Throttled(max(1, math.ceil(until - now)))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _observe(self, kind: Kind, address: str | None, device: str | None) -> Observation:
        geography = self._coat.settings.geography
        return Observation(
            kind=kind,
            at=self._system.now_us() / SECOND_US,
            device=device,
            location=NOWHERE if geography is None or address is None else geography.locate(address),
            place="" if address is None else self._place(network_of(address)),
        )

    def _place(self, network: str) -> str:
        # Keyed, as all names of limits are: who reads the database must not learn where somebody is.
        digest = keyed(network.encode("ascii"), key=self._key, size=_PLACE_BYTES, purpose=b"cc-place")
        return urlsafe_b64encode(digest).decode("ascii")

    def _nobody(self, named: str) -> str:
        # No id of an account has such a sign in it. Several, or all invented names together would wait for one row.
        digest = keyed(named.encode("utf-8", "surrogatepass"), key=self._key, size=1, purpose=b"cc-nobod")
        return f"?{digest.hex()}"

    @property
    def _key(self) -> bytes:
        # The store's own key never changes and never leaves it, so nothing has to be configured.
        return self._coat.engine.keys.check_key

    def _tell(self, subject: str, observation: Observation, decision: Decision, address: str | None) -> None:
        data = explain(observation, decision)
        if address is not None:
            data["network"] = shown_network(address)
        self._coat.engine.publish(Event(kind="risk.decided", at=observation.at, subject=subject, data=data))

    def _tell_blocked(self, subject: str, observation: Observation, address: str | None) -> None:
        # An empty device: none that the account knows. A replay needs it, and the address in full.
        data: dict[str, Figure] = {"why": WHY_BLOCKED, "device": ""}
        if address is not None:
            data["network"] = address
        self._coat.engine.publish(Event(kind="login.failed", at=observation.at, subject=subject, data=data))


def shown_network(address: str) -> str:
    """The network of an address as its owner is told: its /24 or /64, never the address in full."""
    return network_of(address) if ":" in address else str(ip_network((address, 24), strict=False))
