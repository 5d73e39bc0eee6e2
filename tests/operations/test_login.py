"""Sign-in: one new session, the old one over, and what happens when the second command fails."""

from __future__ import annotations

from typing import Any

import pytest

from coatcheck.core.ids import SessionId, owner_of, sid_of
from coatcheck.core.ports import REASON_EVICTED, REASON_SUPERSEDED, Ended, Live
from coatcheck.errors import StoreUnavailable
from coatcheck.operations.login import OldSession, SignedIn, SignInRefused, login
from tests.operations.conftest import Desk


def sign_in(
    desk: Desk, subject: str, old: OldSession | None = None, *, maximum: int = 10, on_limit: Any = "evict_oldest"
) -> SignedIn | SignInRefused:
    id_, new = desk.new(subject)
    return desk.run(login(desk.store, desk.keys, id_=id_, new=new, old=old, maximum=maximum, on_limit=on_limit))


def old_of(id_: SessionId, subject: str | None) -> OldSession:
    return OldSession(ref=id_.ref, owner=owner_of("", subject))


def reason_of(desk: Desk, id_: SessionId) -> str | None:
    found = desk.run(desk.store.load(id_.ref, id_.digest))
    return found.reason if isinstance(found, Ended) else None if isinstance(found, Live) else type(found).__name__


def test_a_first_sign_in_is_one_command(desk: Desk) -> None:
    done = sign_in(desk, "50")
    assert isinstance(done, SignedIn)
    assert desk.wrapped.verbs == ["admit"]
    assert [event.kind for event in done.events] == ["session.signed_in"]
    assert reason_of(desk, done.id) is None


def test_the_same_subject_again_supersedes_in_one_command(desk: Desk) -> None:
    old = desk.created("50")
    done = sign_in(desk, "50", old_of(old, "50"), maximum=1, on_limit="refuse")
    assert isinstance(done, SignedIn)
    assert desk.wrapped.verbs == ["admit"]
    assert reason_of(desk, old) == REASON_SUPERSEDED


@pytest.mark.parametrize("before", [None, "51"])
def test_anothers_session_is_superseded_by_a_second_command(desk: Desk, before: str | None) -> None:
    old = desk.created(before)
    done = sign_in(desk, "50", old_of(old, before))
    assert isinstance(done, SignedIn)
    assert desk.wrapped.verbs == ["admit", "revoke"]
    assert reason_of(desk, old) == REASON_SUPERSEDED
    assert done.id.ref != old.ref


def test_a_signed_in_session_that_cannot_be_ended_takes_the_new_one_back(desk: Desk) -> None:
    old = desk.created("51")
    id_, new = desk.new("50")
    revoke = desk.wrapped.inner.revoke
    answers = iter([False, True])

    async def sometimes(ref: Any, *, reason: str, deny_us: int = 0) -> Any:
        if not next(answers):
            raise StoreUnavailable("the first one fails")
        return await revoke(ref, reason=reason, deny_us=deny_us)

    desk.wrapped.revoke = sometimes  # type: ignore[attr-defined]
    with pytest.raises(StoreUnavailable):
        desk.run(
            login(desk.store, desk.keys, id_=id_, new=new, old=old_of(old, "51"), maximum=10, on_limit="evict_oldest")
        )
    assert reason_of(desk, id_) == REASON_SUPERSEDED
    assert reason_of(desk, old) is None


def test_an_anonymous_session_that_cannot_be_ended_does_not_stop_the_sign_in(desk: Desk) -> None:
    old = desk.created(None)
    desk.wrapped.away = frozenset({"revoke"})
    assert isinstance(sign_in(desk, "50", old_of(old, None)), SignedIn)


def test_a_refused_sign_in_writes_nothing_and_names_who_is_there(desk: Desk) -> None:
    there = desk.created("50")
    old = desk.created(None)
    done = sign_in(desk, "50", old_of(old, None), maximum=1, on_limit="refuse")
    assert isinstance(done, SignInRefused)
    assert done.sids == (sid_of(desk.keys, there.ref),)
    assert desk.wrapped.verbs == ["admit"]
    assert reason_of(desk, old) is None


def test_whoever_has_to_give_way_is_told_about(desk: Desk) -> None:
    oldest = desk.created("50")
    desk.system.advance(1)
    desk.created("50")
    desk.system.advance(1)
    done = sign_in(desk, "50", maximum=2)
    assert [(event.kind, event.sid) for event in done.events] == [
        ("session.ended", sid_of(desk.keys, oldest.ref)),
        ("session.signed_in", sid_of(desk.keys, done.id.ref) if isinstance(done, SignedIn) else None),
    ]
    assert reason_of(desk, oldest) == REASON_EVICTED
