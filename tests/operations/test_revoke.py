"""Ends and lists: a cut in time, pages, and records that cannot be read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from coatcheck.core.filter import SessionFilter
from coatcheck.core.ids import sid_of
from coatcheck.core.ports import StoredPage
from coatcheck.errors import StoreUnavailable, ValueRefused
from coatcheck.operations import revoke as revoking
from coatcheck.operations.revoke import HalfDone, find, revoke_page, revoke_session, revoke_subject
from tests.operations.conftest import Desk


def subjects(desk: Desk) -> list[str]:
    page = desk.run(find(desk.store, desk.keys, SessionFilter(), tenant="", after=None, limit=1000))
    return sorted(seen.session.subject for seen, _ in page.sessions)


def test_a_revoke_is_one_command_and_one_event(desk: Desk) -> None:
    id_ = desk.created()
    first = desk.run(revoke_session(desk.store, desk.keys, id_.ref, reason="lost"))
    again = desk.run(revoke_session(desk.store, desk.keys, id_.ref, reason="other"))
    assert desk.wrapped.verbs == ["revoke", "revoke"]
    assert (first.ended, again.ended) == (1, 0)
    assert [(event.sid, event.data) for event in first.events] == [(sid_of(desk.keys, id_.ref), {"reason": "lost"})]
    assert again.events == ()


def test_a_subjects_revoke_is_one_command(desk: Desk) -> None:
    kept = desk.created()
    for _ in range(3):
        desk.created()
    desk.created("51")
    desk.wrapped.forget()
    done = desk.run(revoke_subject(desk.store, desk.keys, tenant="", subject="50", reason="password", keep=kept.ref))
    assert desk.wrapped.verbs == ["revoke_owner"]
    assert (done.ended, len(done.events)) == (3, 3)
    assert {event.subject for event in done.events} == {"50"}
    assert subjects(desk) == ["50", "51"]


def test_a_filtered_revoke_spares_what_began_after_its_cut(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revoking, "PAGE", 2)
    for number in range(4):
        desk.created(f"old {number}")
    desk.system.advance(1)
    scan = desk.wrapped.inner.scan
    newcomers = iter(["new 1", "new 2"])

    async def while_others_sign_in(*, after: str | None, limit: int) -> StoredPage:
        # Between two pages somebody signs in, again and again: the walk must end, and spare them.
        name = next(newcomers, None)
        if name is not None:
            desk.system.advance(1)
            await desk.wrapped.inner.create(desk.new(name)[1])
        return await scan(after=after, limit=limit)

    desk.wrapped.scan = while_others_sign_in  # type: ignore[attr-defined]
    ended, cursor, more = 0, None, True
    cut_us = desk.run(desk.store.ping())
    while more:
        done, cursor = desk.run(
            revoke_page(desk.store, desk.keys, SessionFilter(), tenant="", reason="all", cut_us=cut_us, after=cursor)
        )
        ended, more = ended + done.ended, cursor is not None
    assert ended == 4
    assert subjects(desk) == ["new 1", "new 2"]


def test_what_was_ended_is_told_even_if_the_store_goes_away_in_the_middle(desk: Desk) -> None:
    for number in range(5):
        desk.created(str(number))
    revoke, calls = desk.wrapped.inner.revoke, iter(range(99))

    async def away_after_three(ref: Any, **asked: Any) -> Any:
        if next(calls) == 3:
            raise StoreUnavailable("away")
        return await revoke(ref, **asked)

    desk.wrapped.revoke = away_after_three  # type: ignore[attr-defined]
    cut_us = desk.run(desk.store.ping())
    with pytest.raises(HalfDone) as lost:
        desk.run(
            revoke_page(desk.store, desk.keys, SessionFilter(), tenant="", reason="all", cut_us=cut_us, after=None)
        )
    assert lost.value.ending.ended == 3
    assert [event.kind for event in lost.value.ending.events] == ["session.ended"] * 3
    assert len(subjects(desk)) == 2


def test_with_a_subject_the_index_is_read_and_not_the_store(desk: Desk) -> None:
    desk.created()
    desk.created("51")
    desk.wrapped.forget()
    page = desk.run(find(desk.store, desk.keys, SessionFilter(subject="50"), tenant="", after=None, limit=10))
    assert [seen.session.subject for seen, _ in page.sessions] == ["50"]
    assert desk.wrapped.verbs == ["list_by_owner"]


def test_an_unreadable_record_is_in_no_list(desk: Desk) -> None:
    desk.created()
    desk.created("51")
    scan = desk.wrapped.inner.scan

    async def broken(**asked: Any) -> StoredPage:
        page = await scan(**asked)
        first, *rest = page.sessions
        return replace(page, sessions=(replace(first, session=replace(first.session, authority="[")), *rest))

    desk.wrapped.scan = broken  # type: ignore[attr-defined]
    assert subjects(desk) == ["51"]


@pytest.mark.parametrize(("limit", "fine"), [(0, False), (1, True), (1000, True), (1001, False)])
def test_the_size_of_a_page_has_limits(desk: Desk, limit: int, fine: bool) -> None:
    work = find(desk.store, desk.keys, SessionFilter(), tenant="", after=None, limit=limit)
    if fine:
        assert desk.run(work).sessions == ()
        return
    with pytest.raises(ValueRefused):
        desk.run(work)
