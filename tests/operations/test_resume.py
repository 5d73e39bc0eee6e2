"""What a loaded record means for a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coatcheck.core.ids import SessionId, owner_of, successor_of
from coatcheck.core.ports import REASON_SUPERSEDED, Activity, Aliased, Live, Unreadable
from coatcheck.operations.resume import LifeLimits, NotResumed, Resumed, Resumption, resume
from coatcheck.operations.rotate import rotate
from tests.operations.conftest import ABSOLUTE_US, IDLE_US, LIFE, SERVER_KEY, Desk

US = 1_000_000


def look(desk: Desk, id_: SessionId, *, limits: LifeLimits = LIFE, server_key: bytes | None = SERVER_KEY) -> Resumption:
    return desk.run(resume(desk.store, desk.keys, id_, limits=limits, server_key=server_key))


def turn(desk: Desk, id_: SessionId, *, alias_s: int = 10) -> SessionId:
    done = desk.run(
        rotate(
            desk.store,
            desk.keys,
            old=id_,
            new=successor_of(desk.keys, id_, secret=desk.system.random(24)),
            server_key=SERVER_KEY,
            nonce=desk.system.random(12),
            alias_us=alias_s * US,
            authority=None,
        )
    )
    return done.id


def why(found: Resumption) -> str:
    return "alive" if isinstance(found, Resumed) else found.why


def test_a_living_session_resumes_in_one_command(desk: Desk) -> None:
    id_ = desk.created()
    found = look(desk, id_)
    assert isinstance(found, Resumed)
    assert (found.id, found.session.subject) == (id_, "50")
    assert desk.wrapped.verbs == ["load"]


def test_what_was_never_there_is_unknown(desk: Desk) -> None:
    id_, _ = desk.new()
    assert look(desk, id_) == NotResumed(why="unknown")


@pytest.mark.parametrize(("after_us", "alive"), [(IDLE_US - 1, True), (IDLE_US, False), (IDLE_US + 1, False)])
def test_the_idle_timeout_is_exact_and_leaves_a_tombstone(desk: Desk, after_us: int, alive: bool) -> None:
    id_ = desk.created()
    desk.system.advance(after_us / US)
    found = look(desk, id_)
    assert isinstance(found, Resumed) is alive
    if isinstance(found, NotResumed):
        assert (found.why, found.reason) == ("ended", "idle_timeout")
        assert desk.wrapped.verbs == ["load", "expire_idle"]
        assert why(look(desk, id_)) == "ended"


def test_the_absolute_timeout_is_exact(desk: Desk) -> None:
    id_ = desk.created()
    begun = desk.system.now_us()
    for _ in range(ABSOLUTE_US // IDLE_US):
        desk.system.advance((IDLE_US - 1) / US)
        seen = Activity(ref=id_.ref, owner=owner_of("", "50"), seen_us=desk.system.now_us())
        desk.run(desk.store.touch([seen]))
    desk.system.advance((begun + ABSOLUTE_US - 1 - desk.system.now_us()) / US)
    assert why(look(desk, id_)) == "alive"
    desk.system.advance(0.000001)
    found = look(desk, id_)
    assert found == NotResumed(why="ended", reason="absolute_timeout", at_us=begun + ABSOLUTE_US)


def test_activity_written_meanwhile_keeps_the_session(desk: Desk) -> None:
    # The record was read before another node's activity arrived: the store looks once more and decides for all.
    id_ = desk.created()
    desk.system.advance(IDLE_US / US)
    stale = desk.system.now_us()

    def older(loaded: Any) -> Any:
        return replace(loaded, seen_us=loaded.seen_us - IDLE_US, now_us=stale) if isinstance(loaded, Live) else loaded

    fresh = desk.created()
    desk.wrapped.tamper = older
    assert why(look(desk, fresh)) == "alive"
    assert desk.wrapped.verbs == ["load", "expire_idle"]
    desk.wrapped.tamper = None
    assert why(look(desk, id_)) == "ended"


def test_stricter_settings_apply_at_once_and_looser_ones_do_not(desk: Desk) -> None:
    id_ = desk.created()
    desk.system.advance(300)
    strict = LifeLimits(idle_us=300 * US, absolute_us=ABSOLUTE_US)
    found = look(desk, id_, limits=strict)
    assert isinstance(found, NotResumed)
    assert found.reason == "idle_timeout"
    assert desk.wrapped.verbs == ["load"], "a node with stricter settings ends it for itself, not for all"
    shorter = LifeLimits(idle_us=IDLE_US, absolute_us=300 * US)
    assert why(look(desk, id_, limits=shorter)) == "ended"
    loose = LifeLimits(idle_us=IDLE_US * 10, absolute_us=ABSOLUTE_US * 10)
    desk.system.advance(299)
    assert why(look(desk, id_, limits=loose)) == "alive"
    desk.system.advance(1)
    assert why(look(desk, id_, limits=loose)) == "ended"


def test_a_revoked_session_says_why_and_a_superseded_one_does_not(desk: Desk) -> None:
    first, second = desk.created(), desk.created()
    desk.run(desk.store.revoke(first.ref, reason="stolen laptop"))
    desk.run(desk.store.revoke(second.ref, reason=REASON_SUPERSEDED))
    assert look(desk, first) == NotResumed(why="ended", reason="stolen laptop", at_us=desk.system.now_us())
    assert look(desk, second) == NotResumed(why="replaced")


def test_a_rotated_id_leads_on_while_its_alias_lives(desk: Desk) -> None:
    old = desk.created()
    new = turn(desk, old)
    found = look(desk, old)
    assert isinstance(found, Resumed)
    assert found.id.text == new.text
    desk.system.advance(9.999999)
    assert why(look(desk, old)) == "alive"
    desk.system.advance(0.000001)
    late = look(desk, old)
    assert isinstance(late, NotResumed)
    assert late.why == "replaced"
    assert [event.kind for event in late.events] == ["session_id.replaced"]
    assert why(look(desk, new)) == "alive"


@pytest.mark.parametrize("server_key", [None, b"o" * 32])
def test_an_alias_opens_with_the_server_key_alone(desk: Desk, server_key: bytes | None) -> None:
    # A backup of the store plus one spent id must not open the living session.
    old = desk.created()
    turn(desk, old)
    assert look(desk, old, server_key=server_key) == NotResumed(why="replaced", lives_as=old.ref)


def test_an_alias_moved_between_sessions_opens_nothing(desk: Desk) -> None:
    victim, attacker = desk.created("50"), desk.created("66")
    turn(desk, victim)
    sealed = desk.run(desk.store.load(victim.ref, victim.digest))
    assert isinstance(sealed, Aliased)
    turn(desk, attacker)
    desk.wrapped.tamper = lambda loaded: replace(loaded, sealed=sealed.sealed, session=sealed.session)
    assert look(desk, attacker) == NotResumed(why="replaced", lives_as=attacker.ref)


def test_two_rotations_end_the_alias_of_the_first(desk: Desk) -> None:
    first = desk.created()
    second = turn(desk, first)
    third = turn(desk, second)
    assert why(look(desk, first)) == "replaced"
    assert why(look(desk, second)) == "alive"
    assert why(look(desk, third)) == "alive"


def test_unreadable_bytes_are_nobody_and_an_event(desk: Desk) -> None:
    id_ = desk.created()
    for broken in (
        lambda loaded: Unreadable(detail="x" * 1000, now_us=loaded.now_us),
        lambda loaded: replace(loaded, session=replace(loaded.session, authority='{"scopes":7}')),
    ):
        desk.wrapped.tamper = broken
        found = look(desk, id_)
        assert isinstance(found, NotResumed)
        assert found.why == "unknown"
        [event] = found.events
        assert event.kind == "session.record_unreadable"
        assert len(str(event.data["detail"])) <= 200


# -- a shorter idle timeout, taken up while sessions are in use -------------------------------------------------------

STRICT_US = 60 * US
UNWRITTEN_US = IDLE_US // 20 + US
"""How much later than the store knows a session may have been used under the recorded timeout."""


def taken_up(since_us: int, *, idle_us: int = STRICT_US, absolute_us: int = ABSOLUTE_US) -> LifeLimits:
    return LifeLimits(idle_us=idle_us, absolute_us=absolute_us, since_us=since_us)


@pytest.mark.parametrize(("after_us", "alive"), [(STRICT_US - 1, True), (STRICT_US, False)])
def test_who_was_in_use_when_limits_were_tightened_has_the_whole_new_timeout(
    desk: Desk, after_us: int, alive: bool
) -> None:
    id_ = desk.created()
    desk.system.advance(UNWRITTEN_US / US - 1)
    since = desk.system.now_us()
    desk.system.advance(after_us / US)
    found = look(desk, id_, limits=taken_up(since))
    assert isinstance(found, Resumed) is alive
    assert desk.wrapped.verbs == (["load", "touch"] if alive else ["load"])


def test_a_use_that_was_presumed_is_written_down_and_counts_from_then_on(desk: Desk) -> None:
    id_ = desk.created()
    desk.system.advance(20)
    limits = taken_up(desk.system.now_us())
    desk.system.advance(50)
    found = look(desk, id_, limits=limits)
    assert isinstance(found, Resumed)
    assert found.seen_us == found.now_us == desk.system.now_us()
    desk.system.advance((STRICT_US - 1) / US)
    assert why(look(desk, id_, limits=limits)) == "alive"
    desk.system.advance(0.000001)
    late = look(desk, id_, limits=limits)
    assert isinstance(late, NotResumed)
    assert (late.reason, late.at_us) == ("idle_timeout", desk.system.now_us())


def test_nobody_is_presumed_to_have_been_there_longer_than_a_use_stays_unwritten(desk: Desk) -> None:
    id_ = desk.created()
    last = desk.system.now_us() + UNWRITTEN_US
    desk.system.advance((UNWRITTEN_US + STRICT_US - 1) / US)
    # Taken up this very moment: it can still be in use.
    assert why(look(desk, id_, limits=taken_up(desk.system.now_us()))) == "alive"
    other = desk.created()
    desk.system.advance((UNWRITTEN_US + STRICT_US) / US)
    assert why(look(desk, other, limits=taken_up(desk.system.now_us()))) == "ended"
    assert last < desk.system.now_us()


def test_a_presumed_use_outlives_neither_recorded_deadline(desk: Desk) -> None:
    id_ = desk.created()
    begun = desk.system.now_us()
    desk.system.advance((IDLE_US - 1) / US)
    nearly = taken_up(begun + UNWRITTEN_US, idle_us=IDLE_US - 1)
    assert why(look(desk, id_, limits=nearly)) == "alive"
    other = desk.created()
    begun = desk.system.now_us()
    desk.system.advance(IDLE_US / US)
    assert why(look(desk, other, limits=taken_up(begun + UNWRITTEN_US, idle_us=IDLE_US - 1))) == "ended"
    third = desk.created()
    begun = desk.system.now_us()
    desk.system.advance(STRICT_US / US)
    found = look(desk, third, limits=taken_up(begun + US, absolute_us=STRICT_US))
    assert isinstance(found, NotResumed)
    assert found.reason == "absolute_timeout"


def test_limits_that_have_always_held_presume_nothing(desk: Desk) -> None:
    id_ = desk.created()
    desk.system.advance(STRICT_US / US)
    assert why(look(desk, id_, limits=taken_up(0))) == "ended"
    assert desk.wrapped.verbs == ["load"]
