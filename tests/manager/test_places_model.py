"""Two nodes, an owner, and a thief who copies cookies: whatever the order, the rules of places hold.

The model knows what was decided about each place, who has proven himself where, and which ids are dead. Hypothesis
moves requests, proofs, writes, clocks and failures of the store about; each answer and each event is compared.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from coatcheck import Settings, StoreUnavailable
from coatcheck.blocking import run_blocking
from coatcheck.core.binding import BindingPolicy, Outcome
from coatcheck.errors import LoginRequired, PlaceRefused, SessionEnded, StepUpRequired
from coatcheck.places import ClientPlace
from coatcheck.session import Session
from tests.manager.conftest import id_of
from tests.manager.test_places import AWAY, BLOCK_FOR, HOME, HOME_SIX, Pair

PLACES: dict[str, ClientPlace] = {
    "home": HOME,
    "home, other address": replace(HOME, address="198.51.100.99"),
    "six": HOME_SIX,
    "away": AWAY,
    "further away": replace(AWAY, address="192.0.2.1"),
}
FAR = ("away", "further away")
ALIAS = 10
REFUSALS = {"step_up": "step_up_required", "block": "place_refused", "revoke": "other_place"}


class Places(RuleBasedStateMachine):
    """What may happen, and what must come of it."""

    site: Pair
    outcome: Outcome

    @initialize(outcome=st.sampled_from(["notify", "step_up", "block", "revoke"]))
    def begin(self, outcome: Outcome) -> None:
        policy = BindingPolicy(network="prefix", user_agent=True, on_mismatch=outcome, block_for=BLOCK_FOR)
        chosen = Settings(
            binding=policy, server_key=b"k" * 32, idle_timeout=timedelta(days=300), absolute_timeout=timedelta(days=400)
        )
        self.site = Pair("blocking", chosen)
        self.outcome = outcome
        self.cookie = run_blocking(self.site.sign_in())
        self.stolen = self.cookie
        self.dead: set[str] = set()
        self.alias: tuple[str, float] | None = None
        self.decided: dict[str, float] = {}
        """Until when a decision about a far place stands."""
        self.proven: set[str] = set()
        self.challenged = self.six = self.over = False
        self.told = 0
        self.failing = False
        self.fields: dict[str, int] = {}

    # -- what is expected -----------------------------------------------------------------------------------------

    @property
    def now(self) -> float:
        return self.site.system.elapsed()

    def leads_on(self, cookie: str) -> bool:
        return cookie == self.cookie or (
            self.alias is not None and self.alias[0] == cookie and self.now < self.alias[1]
        )

    def expect(self, name: str) -> tuple[set[str], int]:
        """What a request with an id that lives may be told, and how many events come of it; the model moves on."""
        if name == "six" and not self.six:
            if self.challenged:
                return {"step_up_required"}, 0
            if not self.failing:
                self.six = True
                return {"ann"}, 1
            return {"ann"}, 0
        if name not in FAR:
            return {"step_up_required" if self.challenged else "ann"}, 0
        if name in self.proven and self.outcome in ("notify", "step_up"):
            return {"ann"}, 0
        answer = {REFUSALS.get(self.outcome, "ann")}
        if self.decided.get(name, -1.0) > self.now:
            # What stands is noted once a minute, and where that fails nobody gets in either.
            return (answer | {"503"} if self.failing and self.outcome != "notify" else answer), 0
        if self.failing:
            return (answer if self.outcome == "notify" else {"503"}), 0
        self.decided[name] = self.now + BLOCK_FOR if self.outcome == "block" else float("inf")
        self.challenged = self.challenged or self.outcome == "block"
        self.over = self.outcome == "revoke"
        return answer, 1

    def ask(self, cookie: str, name: str, node: int) -> tuple[Session, str]:
        session: Any = self.site.nodes[node].session(cookie, place=PLACES[name])
        try:
            session.load()
        except StoreUnavailable:
            return session, "503"
        try:
            return session, session.require_login().subject
        except (PlaceRefused, StepUpRequired) as refused:
            assert (session.subject, session.is_signed_in, list(session)) == (None, False, [])
            return session, refused.code
        except SessionEnded as ended:
            return session, ended.reason
        except LoginRequired:
            return session, "login_required"

    def checked(self, cookie: str, name: str, node: int) -> tuple[Session, str]:
        """One request, compared with the model."""
        if self.leads_on(cookie):
            expected, events = ({"other_place"}, 0) if self.over else self.expect(name)
        else:
            # An id that is dead says nothing of the session, also where that has ended.
            expected, events = {"login_required", "other_place"} if self.over else {"login_required"}, 0
        session, answer = self.ask(cookie, name, node)
        assert answer in expected, (name, node, answer, expected)
        self.told += events
        return session, answer

    # -- what happens ---------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(sorted(PLACES)), node=st.integers(0, 1))
    def owner_asks(self, name: str, node: int) -> None:
        session, answer = self.checked(self.cookie, name, node)
        if answer == "ann":
            assert dict(session) == self.fields

    @rule(name=st.sampled_from(sorted(PLACES)), node=st.integers(0, 1))
    def thief_asks(self, name: str, node: int) -> None:
        session, answer = self.checked(self.stolen, name, node)
        if answer != "ann":
            # Whoever is refused gets no id, the one that lives least of all.
            assert session.cookie_action is None

    @rule()
    def thief_copies(self) -> None:
        self.stolen = self.cookie

    @rule(name=st.sampled_from(sorted(PLACES)), node=st.integers(0, 1))
    def owner_proves_himself(self, name: str, node: int) -> None:
        session, answer = self.checked(self.cookie, name, node)
        if answer not in ("ann", "step_up_required"):
            return
        writes = (
            (name == "six" and not self.six)
            or (name not in FAR and (self.challenged or (self.six and name != "six")))
            or (name in FAR and name not in self.proven)
        )
        try:
            session.step_up(amr=("otp",))
        except StoreUnavailable:
            assert self.failing
            assert writes or name in FAR
            proven = False
        else:
            proven = True
            assert session.subject == "ann"
        self.dead.add(self.cookie)
        if self.alias is not None:
            self.dead.add(self.alias[0])
        self.cookie, self.alias = id_of(session), None
        if not proven:
            return
        if name in FAR:
            self.proven.add(name)
            self.decided.pop(name, None)
        else:
            self.challenged = False
            # A network that was only told of does not stay when the proof is given elsewhere.
            self.six = name == "six"

    @rule(node=st.integers(0, 1), value=st.integers(0, 5))
    def owner_writes(self, node: int, value: int) -> None:
        session, answer = self.checked(self.cookie, "home", node)
        if answer != "ann" or self.failing:
            return
        session["f"] = value
        session.commit()
        self.fields = {"f": value}

    @rule(node=st.integers(0, 1))
    def owner_rotates(self, node: int) -> None:
        session, answer = self.checked(self.cookie, "home", node)
        if answer != "ann":
            return
        session.rotate()
        if self.alias is not None:
            self.dead.add(self.alias[0])
        self.alias = (self.cookie, self.now + ALIAS)
        self.cookie = id_of(session)

    @rule(seconds=st.sampled_from([0.5, 11.0, 61.0, 450.0, 900.0]))
    def time_passes(self, seconds: float) -> None:
        self.site.system.advance(seconds)

    @rule(node=st.integers(0, 1))
    def a_node_forgets(self, node: int) -> None:
        near = self.site.nodes[node].engine.near
        assert near is not None
        near.emptied()

    @precondition(lambda self: not self.failing)
    @rule()
    def writes_fail(self) -> None:
        self.site.store.away = frozenset({"commit"})
        self.failing = True

    @precondition(lambda self: self.failing)
    @rule()
    def writes_are_back(self) -> None:
        self.site.store.away = frozenset()
        self.failing = False

    # -- what always holds ----------------------------------------------------------------------------------------

    @invariant()
    def one_event_for_each_decision(self) -> None:
        assert len(self.site.decided()) == self.told

    @invariant()
    def an_id_that_is_dead_stays_dead(self) -> None:
        for cookie in list(self.dead)[-2:]:
            for node in range(2):
                assert self.ask(cookie, "home", node)[1] in ("login_required", "other_place")

    @invariant()
    def the_owner_is_signed_out_by_no_policy_but_revoke(self) -> None:
        answer = self.ask(self.cookie, "home", 0)[1]
        assert answer in ({"ann", "step_up_required"} if self.outcome != "revoke" else {"ann", "other_place"})
        assert (answer == "step_up_required") == (self.challenged and not self.over)

    def teardown(self) -> None:
        if hasattr(self, "site"):
            run_blocking(self.site.close())


def test_places_of_two_nodes_behave_like_the_model(full: bool, seed: int) -> None:
    found = settings(
        max_examples=1500 if full else 150,
        stateful_step_count=40,
        deadline=None,
        database=None,
        # Explaining a failure takes a minute; the steps say enough.
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
    )
    run_state_machine_as_test(seeded(seed)(Places), settings=found)
