"""Every store against one simple model, over random sequences of verbs.

The model is written from the text of the contract alone: it shares no rule with any store, and it knows only what
the answers and the clock tell. Where the contract leaves a choice, the model accepts each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    Absent,
    Activity,
    Admitted,
    Aliased,
    Alive,
    Changes,
    Committed,
    Conflict,
    Converged,
    Ended,
    Gone,
    LimitReached,
    Live,
    OnLimit,
    Oversized,
    RecordLimits,
    Rotated,
)
from coatcheck.core.session import NewSession
from coatcheck.errors import StoreUnavailable
from coatcheck.stores.conformance import Bench
from tests.stores.conftest import Place

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
SUBJECTS = ("ann", "bob")

indexes = st.integers(min_value=0, max_value=7)


@dataclass(eq=False)
class Known:
    """What the model knows of one session."""

    new: NewSession
    created: int
    seen: int
    fields: dict[str, str]
    authority: str
    version: int = 1
    digest: str = ""
    # Every id before the current one: what it is answered with, and until when; the latest comes last.
    earlier: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    reason: str = ""
    ended: int = 0

    @property
    def ref(self) -> SessionRef:
        return self.new.ref

    @property
    def idle_end(self) -> int:
        return self.seen + self.new.idle_us

    @property
    def absolute_end(self) -> int:
        return self.created + self.new.absolute_us

    def end(self, now: int) -> str | None:
        """Why it is over at this moment, or nothing."""
        if self.reason:
            return self.reason
        if now >= self.absolute_end:
            return "absolute_timeout"
        return "idle_timeout" if now >= self.idle_end else None

    def reasons(self, now: int) -> set[str]:
        """What a verb may give as the reason why it is over; a store need not remember it for ever."""
        over = self.ended if self.reason else min(self.idle_end, self.absolute_end)
        wanted = self.end(now)
        assert wanted is not None
        forgotten = now >= min(over + DAY, self.absolute_end)
        # Which deadline a store saw first is its own affair once both have passed.
        both = {"idle_timeout", "absolute_timeout"} if not self.reason and now >= self.idle_end else set()
        return {wanted} | both | ({"unknown"} if forgotten else set())


class StoreMachine(RuleBasedStateMachine):
    """Random verbs; after each one the store must have answered what the model says."""

    def __init__(self, place: Place, bench: Bench, example: int) -> None:
        super().__init__()
        self.place, self.bench, self.example = place, bench, example
        self.sessions: list[Known] = []
        self.turn = 0

    # The store that is asked changes from verb to verb: both openings must show one truth.
    @property
    def store(self) -> Any:
        self.turn += 1
        return self.bench.either(self.turn)

    def do(self, work: Any) -> Any:
        return self.place.run(work)

    def pick(self, number: int) -> Known:
        return self.sessions[number % len(self.sessions)]

    def of(self, subject: str) -> list[Known]:
        return [each for each in self.sessions if each.new.subject == f"{subject}-{self.example}"]

    def alive_of(self, subject: str, now: int) -> list[Known]:
        alive = [each for each in self.of(subject) if each.end(now) is None]
        return sorted(alive, key=lambda each: each.created)

    def fresh(self, subject: str | None, idle: int, absolute: int) -> NewSession:
        name = None if subject is None else f"{subject}-{self.example}"
        return self.bench.new_session(name, fields={"a": "1"}, idle_us=idle, absolute_us=absolute)

    def learn(self, new: NewSession, answer: Any) -> None:
        session = answer.session
        assert session == new.at(session.created_us)
        assert answer.now_us <= session.created_us <= answer.now_us + 1000
        known = Known(
            new=new,
            created=session.created_us,
            seen=session.created_us,
            fields=dict(new.fields),
            authority=new.authority,
            digest=new.digest,
        )
        self.sessions.append(known)
        # No two sessions of one age: which of them is the older one is nobody's rule.
        self.bench.advance(10)

    def close(self, known: Known, reason: str, now: int) -> None:
        assert not known.reason
        known.reason, known.ended = reason, now

    @rule(
        subject=st.sampled_from((*SUBJECTS, None)),
        idle=st.sampled_from((5 * MINUTE, HOUR, 3 * DAY)),
        absolute=st.sampled_from((15 * MINUTE, 5 * HOUR, 30 * DAY)),
    )
    def create(self, subject: str | None, idle: int, absolute: int) -> None:
        new = self.fresh(subject, idle, absolute)
        self.learn(new, self.do(self.store.create(new)))

    @precondition(lambda self: self.sessions)
    @rule(number=indexes)
    def create_again(self, number: int) -> None:
        known = self.pick(number)
        now = self.do(self.store.ping())
        if known.end(now) is not None and "unknown" in known.reasons(now):
            return
        try:
            answer = self.do(self.store.create(known.new))
        except StoreUnavailable:
            assert known.reason or known.earlier, "the same call repeated was refused"
        else:
            assert answer.session.created_us == known.created

    @rule(
        subject=st.sampled_from(SUBJECTS),
        maximum=st.integers(min_value=1, max_value=3),
        on_limit=st.sampled_from(("allow", "evict_oldest", "refuse", "ask")),
        replaced=st.none() | indexes,
    )
    def admit(self, subject: str, maximum: int, on_limit: OnLimit, replaced: int | None) -> None:
        new = self.fresh(subject, HOUR, 30 * DAY)
        own = self.of(subject)
        old = None if replaced is None or not own else own[replaced % len(own)]
        answer = self.do(
            self.store.admit(new, maximum=maximum, on_limit=on_limit, supersedes=None if old is None else old.ref)
        )
        now = answer.now_us
        counted = [each for each in self.alive_of(subject, now) if each is not old]
        if on_limit in ("refuse", "ask") and len(counted) >= maximum:
            assert isinstance(answer, LimitReached)
            assert {each.ref for each in counted} <= set(answer.alive)
            assert set(answer.alive) <= {each.ref for each in self.alive_of(subject, now)}
            return
        assert isinstance(answer, Admitted)
        surplus = max(0, len(counted) + 1 - maximum) if on_limit == "evict_oldest" else 0
        assert [ref.handle for ref in answer.evicted] == [each.ref.handle for each in counted[:surplus]]
        for each in counted[:surplus]:
            self.close(each, "session_limit", now)
        if old is not None and old.end(now) is None:
            self.close(old, "superseded", now)
        self.learn(new, answer)

    @precondition(lambda self: self.sessions)
    @rule(number=indexes, which=st.sampled_from(("current", "first", "latest", "wrong")))
    def load(self, number: int, which: str) -> None:
        known = self.pick(number)
        digest = {
            "current": known.digest,
            "first": known.new.digest,
            "latest": next(reversed(known.earlier), known.digest),
            "wrong": self.bench.digest(),
        }[which]
        answer = self.do(self.store.load(known.ref, digest))
        now = answer.now_us
        if isinstance(answer, Ended):
            assert known.end(now) is not None
            assert answer.reason in known.reasons(now)
            assert answer.at_us <= now
        elif isinstance(answer, Absent) and answer.why == "unknown":
            assert known.end(now) is not None
            assert "unknown" in known.reasons(now)
        else:
            assert not known.reason, f"ended for {known.reason} and answered {answer!r}"
            self.compare(known, digest, answer)

    def compare(self, known: Known, digest: str, answer: Any) -> None:
        now = answer.now_us
        if isinstance(answer, Absent):
            assert digest != known.digest
            if known.earlier and digest == next(reversed(known.earlier)):
                assert now >= known.earlier[digest][1], "the alias ran out early"
            return
        if isinstance(answer, Aliased):
            sealed, until = known.earlier[digest]
            assert answer.sealed == sealed
            assert now < until, "the alias was kept too long"
        else:
            assert isinstance(answer, Live)
            assert digest == known.digest
        assert answer.session.version == known.version
        if known.end(now) is None:
            assert answer.seen_us == known.seen
        else:
            # Past a deadline the last activity decides nothing any more, and a store may have let go of it; but it
            # must never look later than it was, or a dead session could seem alive.
            assert known.created <= answer.seen_us <= known.seen
        assert (answer.session.digest, answer.session.authority) == (known.digest, known.authority)
        assert dict(answer.session.fields) == known.fields
        assert answer.session.created_us == known.created
        assert answer.session.absolute_us == known.absolute_end

    @precondition(lambda self: self.sessions)
    @rule(
        number=indexes,
        put=st.dictionaries(st.sampled_from(("a", "b", "ü")), st.sampled_from(("1", '"☃"', '""')), max_size=2),
        delete=st.frozensets(st.sampled_from(("a", "c", "ü")), max_size=2),
        expected=st.sampled_from((None, None, 0, 1)),
        octets=st.sampled_from((1000, 1000, 5, 6, 9)),
        names=st.sampled_from((1000, 1, 2)),
    )
    def commit(
        self,
        number: int,
        put: dict[str, str],
        delete: frozenset[str],
        expected: int | None,
        octets: int,
        names: int,
    ) -> None:
        known = self.pick(number)
        changes = Changes(put=put, delete=delete - put.keys())
        answer = self.do(
            self.store.commit(
                known.ref,
                changes,
                limits=RecordLimits(octets=octets, fields=names),
                expected=None if expected is None else known.version - expected,
            )
        )
        if self.over(known, answer):
            return
        if expected:
            assert isinstance(answer, Conflict)
            assert answer.version == known.version
            return
        merged = dict(known.fields)
        for name in changes.delete:
            merged.pop(name, None)
        merged.update(put)
        size = len("".join(merged.keys()).encode()) + len("".join(merged.values()).encode())
        if size > octets or len(merged) > names:
            assert isinstance(answer, Oversized)
            return
        assert isinstance(answer, Committed)
        known.fields = merged
        known.version += 1
        assert answer.version == known.version

    def over(self, known: Known, answer: Any) -> bool:
        """Whether the session is over, and then the answer says so for the right reason."""
        if known.end(answer.now_us) is None:
            return False
        assert isinstance(answer, Gone), f"{answer!r} of a session that ended for {known.end(answer.now_us)}"
        assert answer.reason in known.reasons(answer.now_us)
        return True

    @precondition(lambda self: self.sessions)
    @rule(number=indexes, minutes=st.sampled_from((-90, -3, -1, 0, 100)), others=st.booleans())
    def touch(self, number: int, minutes: int, others: bool) -> None:
        known = self.pick(number)
        before = self.do(self.store.ping())
        seen = before + minutes * MINUTE
        batch = [known, *(each for each in self.sessions if others and each is not known)]
        self.do(self.store.touch([Activity(ref=each.ref, owner=each.new.owner, seen_us=seen) for each in batch]))
        for each in batch:
            if each.end(before) is not None:
                continue
            wanted = max(each.seen, min(seen, before))
            answer = self.do(self.store.load(each.ref, each.digest))
            assert isinstance(answer, Live)
            # Only a time in the future is cut to the store's clock, which may have gone on since it was read.
            late = answer.now_us if minutes > 0 and not self.bench.stopped else wanted
            assert wanted <= answer.seen_us <= late
            each.seen = answer.seen_us

    @precondition(lambda self: self.sessions)
    @rule(
        number=indexes,
        which=st.sampled_from(("current", "current", "latest", "wrong")),
        window=st.sampled_from((0, MINUTE, 10 * MINUTE)),
        authority=st.sampled_from((None, None, '{"acr":"gold"}')),
    )
    def rotate(self, number: int, which: str, window: int, authority: str | None) -> None:
        known = self.pick(number)
        latest = next(reversed(known.earlier), known.digest)
        old = {"current": known.digest, "latest": latest, "wrong": self.bench.digest()}[which]
        successor = self.bench.digest()
        answer = self.do(
            self.store.rotate_id(
                known.ref,
                old_digest=old,
                new_digest=successor,
                sealed=successor.encode(),
                alias_us=window,
                authority=authority,
            )
        )
        now = answer.now_us
        if self.over(known, answer):
            return
        if old == known.digest:
            assert isinstance(answer, Rotated)
            known.version += 1
            assert answer.version == known.version
            if authority is None:
                known.earlier[old] = (successor.encode(), now + window)
            else:
                known.authority = authority
                known.earlier = dict.fromkeys((*known.earlier, old), (b"", 0))
            known.digest = successor
        elif old in known.earlier and now < known.earlier[old][1] and authority is None:
            assert isinstance(answer, Converged)
            assert answer.sealed == known.earlier[old][0]
        else:
            assert isinstance(answer, Gone)
            assert answer.reason == "replaced"
        self.load(number, "latest")
        self.load(number, "current")

    @precondition(lambda self: self.sessions)
    @rule(number=indexes)
    def expire_idle(self, number: int) -> None:
        known = self.pick(number)
        answer = self.do(self.store.expire_idle(known.ref))
        if not self.over(known, answer):
            assert isinstance(answer, Alive)
            assert answer.seen_us == known.seen
        elif answer.reason != "unknown" and not known.reason:
            over = known.idle_end if answer.reason == "idle_timeout" else known.absolute_end
            self.close(known, answer.reason, over)

    @precondition(lambda self: self.sessions)
    @rule(number=indexes, reason=st.sampled_from(("logout", "stolen")))
    def revoke(self, number: int, reason: str) -> None:
        known = self.pick(number)
        answer = self.do(self.store.revoke(known.ref, reason=reason))
        alive = known.end(answer.now_us) is None
        assert answer.ended == alive
        if alive:
            self.close(known, reason, answer.now_us)

    @rule(subject=st.sampled_from(SUBJECTS), keep=st.none() | indexes)
    def revoke_owner(self, subject: str, keep: int | None) -> None:
        own = self.of(subject)
        kept = None if keep is None or not own else own[keep % len(own)]
        template = self.fresh(subject, HOUR, HOUR)
        answer = self.do(
            self.store.revoke_owner(
                template.ref.tag,
                template.owner,
                reason="password changed",
                keep=None if kept is None else kept.ref,
            )
        )
        ended = [each for each in self.alive_of(subject, answer.now_us) if each is not kept]
        assert {ref.handle for ref in answer.ended} == {each.ref.handle for each in ended}
        for each in ended:
            self.close(each, "password changed", answer.now_us)

    @rule(subject=st.sampled_from(SUBJECTS), limit=st.sampled_from((1, 2, 100)))
    def list_by_owner(self, subject: str, limit: int) -> None:
        listed = self.do(self.bench.alive_of(f"{subject}-{self.example}", limit=limit))
        now = self.do(self.store.ping())
        alive = self.alive_of(subject, now)
        assert [each.session.ref.handle for each in listed] == [each.ref.handle for each in alive]
        for known, seen in zip(alive, listed, strict=True):
            assert dict(seen.session.fields) == known.fields
            assert (seen.session.version, seen.seen_us) == (known.version, known.seen)

    @rule(by=st.sampled_from((1, MINUTE, 4 * MINUTE, 5 * MINUTE - 10, 10 * MINUTE, HOUR, 5 * HOUR, DAY)))
    def advance(self, by: int) -> None:
        self.bench.advance(by)

    @rule()
    def sweep(self) -> None:
        assert 0 <= self.do(self.store.sweep(limit=10_000)) <= 10_000


@pytest.mark.timeout(600)
def test_a_store_is_its_model(place: Place, seed: int, long_form: bool) -> None:
    bench = place.bench(seed=seed)
    examples = 0

    def machine() -> StoreMachine:
        nonlocal examples
        examples += 1
        return StoreMachine(place, bench, examples)

    count = 20 if place.networked else 40 if place.backend.name == "sqlite" else 150
    place.run(bench.store.open())
    place.run(bench.other.open())
    # A factory serves as well as a class; the annotation knows only classes.
    run_state_machine_as_test(
        seeded(seed)(machine),  # type: ignore[arg-type]
        settings=settings(
            max_examples=count * (10 if long_form else 1),
            stateful_step_count=40,
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
    place.run(bench.other.close())
    place.run(bench.store.close())
