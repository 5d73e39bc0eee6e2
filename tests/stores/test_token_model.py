"""Every store against one simple model of refresh families: tokens of all ages in several hands, and what ends them.

The model is written from SEMANTICS 5 and the table of `core.ports.TokenStore` alone: it shares no rule with any store,
and knows only what the answers and the clock tell. Where the contract leaves a choice, it accepts each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from coatcheck.core.ports import (
    Admitted,
    Denial,
    DenialPage,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    Gone,
    WrongHolder,
    session_denial_id,
)
from coatcheck.core.refresh_token import NewFamily, StoredFamily
from coatcheck.core.session import NewSession
from coatcheck.stores.conformance import Bench
from coatcheck.stores.conformance.bench import tag_of
from tests.stores.conftest import Place

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
SUBJECTS = ("ann", "bob")
# Holders: the first party, two clients, and one that proved a key.
HOLDERS = (("", ""), ("", ""), ("shop", ""), ("shop", "k" * 43), ("bank", ""))
MOST = 18

indexes = st.integers(min_value=0, max_value=11)
denials = st.sampled_from((0, 16 * MINUTE, 16 * MINUTE, HOUR))
graces = st.sampled_from((30 * SECOND, 30 * SECOND, 30 * SECOND, 30 * SECOND, 30 * SECOND, 0, 5 * MINUTE))
# How old the current token is when one is presented.
ages = st.sampled_from((0, 1, SECOND, 10 * SECOND, 30 * SECOND - 1, 30 * SECOND, 5 * MINUTE))


@dataclass(eq=False)
class Login:
    """What the model knows of one session."""

    new: NewSession
    created: int
    seen: int
    reason: str = ""
    ended: int = 0
    jtis: dict[str, int] = field(default_factory=dict)

    @property
    def absolute_end(self) -> int:
        return self.created + self.new.absolute_us

    @property
    def idle_end(self) -> int:
        return self.seen + self.new.idle_us

    def end(self, now: int) -> str | None:
        """Why it is over at this moment, or nothing."""
        if self.reason:
            return self.reason
        if now >= self.absolute_end:
            return "absolute_timeout"
        return "idle_timeout" if now >= self.idle_end else None

    def reasons(self, now: int) -> set[str]:
        """What may be told as the reason; "unknown" once a store need not remember it."""
        assert self.end(now) is not None
        over = self.ended if self.reason else min(self.idle_end, self.absolute_end)
        told = {self.reason} if self.reason else timeouts(self.idle_end, self.absolute_end, now)
        return told | ({"unknown"} if now >= min(over + DAY, self.absolute_end) else set())


@dataclass(eq=False)
class Lineage:
    """What the model knows of one family: the digest of every generation, the first one first."""

    new: NewFamily
    login: Login | None
    created: int
    rotated: int
    digests: list[str]
    grace_end: int = 0
    sealed: bytes | None = None
    reason: str = ""

    @property
    def generation(self) -> int:
        return len(self.digests)

    @property
    def idle_end(self) -> int:
        return self.rotated + self.new.idle_us

    @property
    def absolute_end(self) -> int:
        return self.created + self.new.absolute_us

    def stored(self) -> StoredFamily:
        return StoredFamily(
            ref=self.new.ref,
            generation=self.generation,
            digest=self.digests[-1],
            owner=self.new.owner,
            subject=self.new.subject,
            client=self.new.client,
            key=self.new.key,
            grant=self.new.grant,
            created_us=self.created,
            rotated_us=self.rotated,
            idle_us=self.new.idle_us,
            absolute_us=self.absolute_end,
        )


def timeouts(idle_end: int, absolute_end: int, now: int) -> set[str]:
    """Which deadlines have passed; which of two a store names is its own affair."""
    return {name for name, end in (("idle_timeout", idle_end), ("absolute_timeout", absolute_end)) if now >= end}


class TokenMachine(RuleBasedStateMachine):
    """Random verbs; after each one the store must have answered what the model says."""

    def __init__(self, place: Place, bench: Bench, example: int) -> None:
        super().__init__()
        self.place, self.bench, self.example = place, bench, example
        self.logins: list[Login] = []
        self.families: list[Lineage] = []
        # Cuts of an owner: when, and why.
        self.cuts: dict[str, list[tuple[int, str]]] = {}
        # Until when each name has to be on the denylist; and until when a store may keep it there, because the owner
        # was cut off again: it cannot know whether the first call's entry arrived.
        self.denied: dict[tuple[str, str], int] = {}
        self.longer: dict[tuple[str, str], set[int]] = {}
        self.turn = 0
        self.start = self.do(self.follow_from(None))[1]

    # The store that is asked changes from verb to verb: both openings must show one truth.
    @property
    def store(self) -> Any:
        self.turn += 1
        return self.bench.either(self.turn)

    def do(self, work: Any) -> Any:
        return self.place.run(work)

    def name(self, subject: str) -> str:
        return f"{subject}-{self.example}"

    def alive_of(self, subject: str, now: int) -> list[Login]:
        own = [each for each in self.logins if each.new.subject == self.name(subject) and each.end(now) is None]
        return sorted(own, key=lambda each: each.created)

    def over(self, family: Lineage, now: int) -> set[str]:
        """Why a family is over, whatever its session; nothing while it goes on."""
        cuts = () if family.login is not None else self.cuts.get(family.new.owner, ())
        cut = {reason for at, reason in cuts if family.created <= at}
        return {family.reason} if family.reason else cut or timeouts(family.idle_end, family.absolute_end, now)

    def pick(self, number: int) -> Lineage:
        """A family: most times one that goes on, and there is always one."""
        now = self.do(self.store.ping())
        going: list[Lineage] = []
        ended: list[Lineage] = []
        for each in self.families:
            gone = each.login is not None and each.login.end(now) is not None
            (ended if gone or self.over(each, now) else going).append(each)
        if not going:
            self.first()
            return self.families[-1 - number % 3]
        chosen = ended if ended and number % 5 == 0 else going
        return chosen[number % len(chosen)]

    def deny(self, login: Login, now: int, deny_us: int) -> None:
        if deny_us:
            self.note("sid", session_denial_id(login.new.ref), now + deny_us)

    def note(self, kind: str, name: str, until: int) -> None:
        self.denied[kind, name] = max(until, self.denied.get((kind, name), 0))

    def close(self, login: Login, reason: str, now: int) -> None:
        assert login.end(now) is None
        login.reason, login.ended = reason, now

    # -- sessions and families begin ---------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        """Somebody is signed in on three devices, with a family each: two of our own and one of a client's."""
        for idle, holder in ((3 * DAY, ("", "")), (2 * HOUR, ("", "")), (20 * DAY, ("shop", ""))):
            self.sign_in("ann", idle, 30 * DAY, 100, 0)
            self.begin(len(self.logins) - 1, holder, 20 * DAY, 40 * DAY)

    @rule(
        subject=st.sampled_from(SUBJECTS),
        idle=st.sampled_from((10 * MINUTE, 2 * HOUR, 3 * DAY, 20 * DAY)),
        absolute=st.sampled_from((5 * HOUR, 30 * DAY)),
        maximum=st.sampled_from((100, 100, 1, 2)),
        deny_us=denials,
    )
    def sign_in(self, subject: str, idle: int, absolute: int, maximum: int, deny_us: int) -> None:
        new = self.bench.new_session(self.name(subject), idle_us=idle, absolute_us=absolute)
        answer = self.do(self.store.admit(new, maximum=maximum, on_limit="evict_oldest", deny_us=deny_us))
        assert isinstance(answer, Admitted)
        now, alive = answer.now_us, self.alive_of(subject, answer.now_us)
        evicted = alive[: max(0, len(alive) + 1 - maximum)]
        assert [ref.handle for ref in answer.evicted] == [each.new.ref.handle for each in evicted]
        for each in evicted:
            self.close(each, "session_limit", now)
            self.deny(each, now, deny_us)
        created = answer.session.created_us
        self.logins.append(Login(new, created, created))
        # No two sessions of one age: which of them is the older one is nobody's rule.
        self.bench.advance(10)

    @precondition(lambda self: self.logins)
    @rule(
        number=indexes,
        holder=st.sampled_from(HOLDERS),
        idle=st.sampled_from((HOUR, 20 * DAY)),
        absolute=st.sampled_from((6 * HOUR, 40 * DAY)),
    )
    def begin(self, number: int, holder: tuple[str, str], idle: int, absolute: int) -> None:
        login = self.logins[number % len(self.logins)]
        # How the oldest family gives way is held elsewhere.
        if sum(each.login is login for each in self.families) >= MOST:
            return
        client, key = holder
        self.begun(self.bench.new_family(login.new, client=client, key=key, idle_us=idle, absolute_us=absolute), login)

    @rule(
        subject=st.sampled_from(SUBJECTS),
        holder=st.sampled_from(HOLDERS[2:]),
        idle=st.sampled_from((HOUR, 20 * DAY)),
        absolute=st.sampled_from((6 * HOUR, 40 * DAY)),
    )
    def begin_alone(self, subject: str, holder: tuple[str, str], idle: int, absolute: int) -> None:
        client, key = holder
        self.begun(
            self.bench.new_family(None, self.name(subject), client=client, key=key, idle_us=idle, absolute_us=absolute),
            None,
        )

    def begun(self, new: NewFamily, login: Login | None) -> None:
        answer = self.do(self.store.create_family(new))
        if login is not None and login.end(answer.now_us) is not None:
            assert isinstance(answer, Gone)
            assert answer.reason in login.reasons(answer.now_us)
            return
        assert isinstance(answer, FamilyCreated)
        created = answer.family.created_us
        family = Lineage(new, login, created, created, [new.digest])
        assert answer.family == family.stored()
        # At the store's time, but later than every cut of its owner; with a session that makes no difference.
        cut = max((at for at, _ in self.cuts.get(new.owner, ())), default=0)
        assert created in {max(answer.now_us, cut + 1), answer.now_us if login is not None else 0}
        assert answer.session == (None if login is None else login.new.at(login.created))
        self.families.append(family)
        self.bench.advance(10)

    # -- tokens are presented ----------------------------------------------------------------------------------

    @precondition(lambda self: self.families)
    @rule(number=indexes, grace=graces, age=ages)
    def present_the_current_one(self, number: int, grace: int, age: int) -> None:
        self.present(self.pick(number), "current", grace, age)

    @precondition(lambda self: self.families)
    @rule(
        number=indexes,
        token=st.sampled_from(("predecessor", "predecessor", "again", "older")),
        grace=graces,
        age=ages,
        deny_us=denials,
    )
    def present_an_earlier_one(self, number: int, token: str, grace: int, age: int, deny_us: int) -> None:
        self.present(self.pick(number), token, grace, age, deny_us=deny_us)

    @precondition(lambda self: self.families)
    @rule(number=indexes, grace=graces, gap=ages, first=st.booleans(), deny_us=denials)
    def present_two(self, number: int, grace: int, gap: int, first: bool, deny_us: int) -> None:
        """Two holders of one token, one after the other; between them, perhaps, the successor is used."""
        family = self.pick(number)
        self.present(family, "current", grace, 30 * SECOND)
        if first:
            self.present(family, "current", grace, 0)
        self.present(family, "predecessor", grace, gap, deny_us=deny_us)

    @precondition(lambda self: self.families)
    @rule(
        number=indexes,
        token=st.sampled_from(
            ("current, another secret", "predecessor, another secret", "older, another secret", "mixed", "later")
        ),
        grace=graces,
        age=ages,
        deny_us=denials,
    )
    def present_an_invented_one(self, number: int, token: str, grace: int, age: int, deny_us: int) -> None:
        self.present(self.pick(number), token, grace, age, deny_us=deny_us)

    @precondition(lambda self: self.families)
    @rule(
        number=indexes,
        token=st.sampled_from(("current", "predecessor", "older")),
        stranger=st.sampled_from((("mallory", ""), ("", "m" * 43), ("mallory", "k" * 43))),
        age=ages,
    )
    def present_as_somebody_else(self, number: int, token: str, stranger: tuple[str, str], age: int) -> None:
        self.present(self.pick(number), token, 30 * SECOND, age, holder=stranger)

    def present(
        self,
        family: Lineage,
        token: str,
        grace: int,
        age: int,
        *,
        holder: tuple[str, str] | None = None,
        deny_us: int = 0,
    ) -> None:
        # So old is its current token when it comes; on a clock that cannot be stopped, a little older.
        self.bench.advance(max(0, family.rotated + age - self.do(self.store.ping())))
        generation, digest, successor = self.drawn(family, token)
        client, key = holder or (family.new.client, family.new.key)
        answer = self.do(
            self.store.rotate_refresh(
                family.new.ref,
                generation=generation,
                digest=digest,
                successor=successor,
                sealed=b"sealed " + successor.encode(),
                grace_us=grace,
                client=client,
                key=key,
                deny_us=deny_us,
            )
        )
        if self.refused(family, answer, client, key):
            return
        now, genuine = answer.now_us, family.digests
        if generation == family.generation and digest == genuine[-1]:
            self.current(family, answer, successor, grace)
        elif generation >= family.generation or (generation == family.generation - 1 and digest != genuine[-2]):
            assert isinstance(answer, FamilyUnknown)
        elif generation == family.generation - 1 and successor == genuine[-1]:
            assert isinstance(answer, FamilyRotated)
            assert answer.family == family.stored()
            self.used(family, answer)
        elif generation == family.generation - 1 and now < family.grace_end:
            assert isinstance(answer, FamilyReplayed)
            assert (answer.family, answer.sealed) == (family.stored(), family.sealed)
            self.used(family, answer)
        else:
            assert isinstance(answer, FamilyReused), f"{answer!r} for generation {generation} of {family.generation}"
            assert answer.family.ref == family.new.ref
            self.reused(family, answer, deny_us)

    def drawn(self, family: Lineage, token: str) -> tuple[int, str, str]:
        """Generation and digest to present, and the successor to propose."""
        known, latest, fresh = family.digests, family.generation, self.bench.digest()
        before = max(1, latest - 1)
        older = max(1, latest - 2 - self.turn % 3)
        match token:
            case "current":
                return latest, known[-1], fresh
            case "predecessor":
                return before, known[before - 1], fresh
            case "again":
                return before, known[before - 1], known[-1] if latest > 1 else fresh
            case "older":
                return older, known[older - 1], fresh
            case "older, another secret":
                return older, self.bench.digest(), fresh
            case "current, another secret":
                return latest, self.bench.digest(), fresh
            case "predecessor, another secret":
                return before, self.bench.digest(), fresh
            case "mixed":
                return latest, known[before - 1], fresh
            case _:
                return latest + 1, known[-1], fresh

    def refused(self, family: Lineage, answer: Any, client: str, key: str) -> bool:
        """Whether session or family are over or somebody else's, and then the answer says so."""
        now, login = answer.now_us, family.login
        if login is not None and login.end(now) is not None:
            reasons = login.reasons(now)
            if isinstance(answer, FamilyUnknown):
                assert "unknown" in reasons, f"forgotten: {reasons}"
                return True
            assert isinstance(answer, FamilyEnded), f"{answer!r} of a session that is over: {reasons}"
            assert answer.reason in reasons
            assert answer.at_us <= now
            assert not login.reason or answer.at_us == login.ended
            return True
        natural = timeouts(family.idle_end, family.absolute_end, now)
        # What is over by its own deadlines a store may have forgotten.
        if natural and isinstance(answer, FamilyUnknown):
            return True
        if (client, key) != (family.new.client, family.new.key):
            assert isinstance(answer, WrongHolder)
            return True
        reasons = self.over(family, now)
        if not reasons:
            return False
        assert isinstance(answer, FamilyEnded), f"{answer!r} of a family that is over: {reasons}"
        assert answer.reason in reasons
        assert answer.at_us <= now
        return True

    def current(self, family: Lineage, answer: Any, successor: str, grace: int) -> None:
        now = answer.now_us
        if now < family.rotated + grace:
            assert isinstance(answer, FamilyKept)
            family.sealed = None
        else:
            assert isinstance(answer, FamilyRotated)
            family.digests.append(successor)
            family.rotated, family.grace_end = now, now + grace
            family.sealed = b"sealed " + successor.encode() if grace else None
        assert answer.family == family.stored()
        self.used(family, answer)

    def used(self, family: Lineage, answer: Any) -> None:
        """The session came along, with its last activity before this call, which is now."""
        login = family.login
        if login is None:
            assert (answer.session, answer.seen_us) == (None, 0)
            return
        assert answer.session == login.new.at(login.created)
        assert answer.seen_us == login.seen
        login.seen = max(login.seen, answer.now_us)

    def reused(self, family: Lineage, answer: Any, deny_us: int) -> None:
        login, now = family.login, answer.now_us
        if login is None or family.new.client:
            assert answer.session is None
            family.reason, family.sealed = "refresh_reused", None
            return
        assert answer.session == login.new.ref
        self.close(login, "refresh_reused", now)
        self.deny(login, now, deny_us)

    # -- sessions end, tokens are denied -----------------------------------------------------------------------

    # Ends are the rarer events: what they end has to grow first.
    @precondition(lambda self: self.logins)
    @rule(number=indexes, reason=st.sampled_from(("", "", "logout", "stolen")), deny_us=denials)
    def revoke(self, number: int, reason: str, deny_us: int) -> None:
        if not reason:
            return
        login = self.logins[number % len(self.logins)]
        answer = self.do(self.store.revoke(login.new.ref, reason=reason, deny_us=deny_us))
        assert answer.ended == (login.end(answer.now_us) is None)
        if answer.ended:
            self.close(login, reason, answer.now_us)
        self.deny(login, answer.now_us, deny_us)

    @rule(
        subject=st.sampled_from(SUBJECTS),
        keep=st.none() | indexes,
        reason=st.sampled_from(("", "", "", "password changed", "signed out")),
        deny_us=denials,
    )
    def revoke_owner(self, subject: str, keep: int | None, reason: str, deny_us: int) -> None:
        if not reason:
            return
        own = [each for each in self.logins if each.new.subject == self.name(subject)]
        kept = None if keep is None or not own else own[keep % len(own)]
        owner = self.bench.new_session(self.name(subject)).owner
        answer = self.do(
            self.store.revoke_owner(
                tag_of(self.name(subject)),
                owner,
                reason=reason,
                keep=None if kept is None else kept.new.ref,
                deny_us=deny_us,
            )
        )
        now = answer.now_us
        ended = [each for each in self.alive_of(subject, now) if each is not kept]
        assert {ref.handle for ref in answer.ended} == {each.new.ref.handle for each in ended}
        for each in ended:
            self.close(each, reason, now)
            self.deny(each, now, deny_us)
        for each in own:
            if deny_us and each.reason:
                self.longer.setdefault(("sid", session_denial_id(each.new.ref)), set()).add(now + deny_us)
        # "Created until now": a family made after an earlier cut at this very time carries a later one.
        alone = [each.created for each in self.families if each.login is None and each.new.owner == owner]
        self.cuts.setdefault(owner, []).append((max([now, *alone]), reason))

    @precondition(lambda self: self.logins)
    @rule(number=indexes, lasts=st.sampled_from((MINUTE, HOUR)), again=st.booleans())
    def deny_token(self, number: int, lasts: int, again: bool) -> None:
        login = self.logins[number % len(self.logins)]
        jti = next(iter(login.jtis)) if again and login.jtis else self.bench.handle()
        until = self.do(self.store.ping()) + lasts
        self.do(self.store.deny(login.new.ref.tag, Denial(kind="jti", id=jti, until_us=until)))
        login.jtis[jti] = max(until, login.jtis.get(jti, 0))
        self.note("jti", jti, until)

    @precondition(lambda self: self.logins)
    @rule(number=indexes, which=indexes)
    def standing(self, number: int, which: int) -> None:
        login = self.logins[number % len(self.logins)]
        names = [*login.jtis, self.bench.handle()]
        jti = names[which % len(names)]
        answer = self.do(self.store.standing(login.new.ref, jti))
        now = answer.now_us
        if now < login.jtis.get(jti, 0):
            assert answer.why == "denied"
        elif login.end(now) is None:
            assert answer.why is None
        else:
            assert answer.why in login.reasons(now)

    @rule()
    def follow(self) -> None:
        found, _ = self.do(self.follow_from(self.start))
        now = self.do(self.store.ping())
        told: dict[tuple[str, str], int] = {}
        for each in found:
            told[each.kind, each.id] = max(each.until_us, told.get((each.kind, each.id), 0))
        for name, until in self.denied.items():
            if until > now:
                assert name in told, f"{name} is not denied"
        own = {session_denial_id(each.new.ref) for each in self.logins}.union(*(each.jtis for each in self.logins))
        for name, until in told.items():
            if name[1] not in own:
                # Of an earlier example: a sweep may tell again what a store cannot know to have arrived.
                continue
            assert name in self.denied, f"{name} was never denied"
            # Never shorter than was asked for, and longer only by a call that asked for it.
            wanted = self.denied[name]
            assert until == wanted or (until > wanted and until in self.longer.get(name, ())) or until <= now

    async def follow_from(self, position: str | None) -> tuple[list[Denial], str]:
        found: list[Denial] = []
        while True:
            page = await self.bench.either(len(found)).denials(after=position, limit=50)
            assert isinstance(page, DenialPage)
            found += page.entries
            position = page.position
            if not page.more:
                return found, position

    # -- time passes -------------------------------------------------------------------------------------------

    @rule(by=st.sampled_from((1, SECOND, 15 * SECOND, 5 * MINUTE, HOUR, 3 * HOUR, DAY)))
    def advance(self, by: int) -> None:
        self.bench.advance(by)

    @rule()
    def sweep(self) -> None:
        assert 0 <= self.do(self.store.sweep(limit=10_000)) <= 10_000


@pytest.mark.timeout(600)
def test_families_of_every_store_are_the_model(place: Place, seed: int, long_form: bool) -> None:
    bench = place.bench(seed=seed)
    examples = 0

    def machine() -> TokenMachine:
        nonlocal examples
        examples += 1
        return TokenMachine(place, bench, examples)

    count = 25 if place.networked else 40 if place.backend.name == "sqlite" else 100
    place.run(bench.store.open())
    place.run(bench.other.open())
    try:
        # A factory serves as well as a class; the annotation knows only classes.
        run_state_machine_as_test(
            seeded(seed)(machine),  # type: ignore[arg-type]
            settings=settings(
                max_examples=count * (10 if long_form else 1),
                stateful_step_count=50,
                deadline=None,
                database=None,
                # Making a failure shorter takes thousands of runs: worth it where a run takes milliseconds.
                phases=(Phase.generate,) if place.networked and not long_form else (Phase.generate, Phase.shrink),
                suppress_health_check=(
                    HealthCheck.filter_too_much,
                    HealthCheck.too_slow,
                    HealthCheck.data_too_large,
                    HealthCheck.large_base_example,
                ),
            ),
        )
    finally:
        place.run(bench.other.close())
        place.run(bench.store.close())
