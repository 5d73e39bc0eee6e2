"""Commit writes what changed and never creates; rotation ends with one successor."""

from __future__ import annotations

from typing import Any

import pytest

from coatcheck.core.ids import SessionId, successor_of
from coatcheck.core.ports import Changes, Live, RecordLimits
from coatcheck.core.session import Authority, encode_authority
from coatcheck.errors import RecordTooLarge, SessionConflict, SessionGone
from coatcheck.operations.commit import commit, create_anonymous
from coatcheck.operations.rotate import NewId, rotate
from tests.operations.conftest import LIMITS, SERVER_KEY, Desk


def fields_of(desk: Desk, id_: SessionId) -> dict[str, str]:
    found = desk.run(desk.store.load(id_.ref, id_.digest))
    assert isinstance(found, Live)
    return dict(found.session.fields)


def turn(
    desk: Desk,
    old: SessionId,
    *,
    server_key: bytes | None = SERVER_KEY,
    alias_us: int = 10_000_000,
    authority: str | None = None,
) -> NewId:
    return desk.run(
        rotate(
            desk.store,
            desk.keys,
            old=old,
            new=successor_of(desk.keys, old, secret=desk.system.random(24)),
            server_key=server_key,
            nonce=desk.system.random(12),
            alias_us=alias_us,
            authority=authority,
        )
    )


def test_a_commit_is_one_command_and_touches_its_own_fields_alone(desk: Desk) -> None:
    id_ = desk.created(fields={"a": "1", "b": "2", "c": "3"})
    done = desk.run(commit(desk.store, id_.ref, Changes(put={"b": "20"}, delete=frozenset({"c"})), limits=LIMITS))
    assert done.version == 2
    assert desk.wrapped.verbs == ["commit"]
    assert fields_of(desk, id_) == {"a": "1", "b": "20"}


def test_a_commit_never_creates(desk: Desk) -> None:
    id_, _ = desk.new()
    with pytest.raises(SessionGone) as gone:
        desk.run(commit(desk.store, id_.ref, Changes(put={"a": "1"}), limits=LIMITS))
    assert gone.value.reason == "unknown"
    ended = desk.created()
    desk.run(desk.store.revoke(ended.ref, reason="logout"))
    with pytest.raises(SessionGone) as gone:
        desk.run(commit(desk.store, ended.ref, Changes(put={"a": "1"}), limits=LIMITS))
    assert gone.value.reason == "logout"


def test_a_commit_over_another_version_conflicts(desk: Desk) -> None:
    id_ = desk.created()
    desk.run(commit(desk.store, id_.ref, Changes(put={"a": "1"}), limits=LIMITS, expected=1))
    with pytest.raises(SessionConflict) as conflict:
        desk.run(commit(desk.store, id_.ref, Changes(put={"a": "2"}), limits=LIMITS, expected=1))
    assert conflict.value.version == 2
    assert fields_of(desk, id_) == {"a": "1"}


@pytest.mark.parametrize(("octets", "fits"), [(10, True), (9, False)])
def test_the_limit_of_octets_is_exact_and_counts_the_merged_record(desk: Desk, octets: int, fits: bool) -> None:
    id_ = desk.created(fields={"a": "1234"})
    # a + 1234 + é (two octets) + 123
    limits = RecordLimits(octets=octets, fields=2)
    work = commit(desk.store, id_.ref, Changes(put={"é": "123"}), limits=limits)
    if fits:
        assert desk.run(work).version == 2
        return
    with pytest.raises(RecordTooLarge):
        desk.run(work)
    assert fields_of(desk, id_) == {"a": "1234"}


@pytest.mark.parametrize(("octets", "fields", "fits"), [(4, 2, True), (3, 2, False), (4, 1, False)])
def test_an_anonymous_session_obeys_the_same_limits(desk: Desk, octets: int, fields: int, fits: bool) -> None:
    id_, new = desk.new(None, fields={"a": "1", "b": "2"})
    work = create_anonymous(desk.store, desk.keys, new, limits=RecordLimits(octets=octets, fields=fields))
    if fits:
        created, event = desk.run(work)
        assert (created.session.owner, event.kind) == ("", "session.created")
        assert fields_of(desk, id_) == {"a": "1", "b": "2"}
        return
    with pytest.raises(RecordTooLarge):
        desk.run(work)
    assert desk.wrapped.verbs == []


def test_simultaneous_rotations_converge_on_the_first_successor(desk: Desk) -> None:
    old = desk.created()
    first = turn(desk, old)
    others = [turn(desk, old) for _ in range(3)]
    assert {each.id.text for each in others} == {first.id.text}
    assert [event.kind for event in first.events] == ["session.rotated"]
    assert all(each.events == () and each.version == 0 for each in others)
    assert desk.wrapped.verbs == ["rotate_id"] * 4


@pytest.mark.parametrize(("server_key", "alias_us"), [(None, 10_000_000), (SERVER_KEY, 0)])
def test_without_an_alias_the_second_rotation_is_refused(desk: Desk, server_key: bytes | None, alias_us: int) -> None:
    old = desk.created()
    turn(desk, old, server_key=server_key, alias_us=alias_us)
    with pytest.raises(SessionGone) as gone:
        turn(desk, old, server_key=server_key, alias_us=alias_us)
    assert gone.value.reason == "replaced"


def test_a_change_of_authority_leaves_no_alias_and_ends_an_earlier_one(desk: Desk) -> None:
    # Privilege fixation: an id known before the step up must not gain what comes after it.
    first = desk.created()
    second = turn(desk, first)
    third = turn(desk, second.id, authority=encode_authority(Authority(acr="2")))
    for old in (first, second.id):
        with pytest.raises(SessionGone):
            turn(desk, old)
    found = desk.run(desk.store.load(third.id.ref, third.id.digest))
    assert isinstance(found, Live)
    assert '"acr":"2"' in found.session.authority


def test_a_change_of_authority_hands_no_alias_to_the_store(desk: Desk) -> None:
    old = desk.created()
    given: list[tuple[bytes, int]] = []
    rotate_id = desk.wrapped.inner.rotate_id

    async def noted(*ref: Any, **asked: Any) -> Any:
        given.append((asked["sealed"], asked["alias_us"]))
        return await rotate_id(*ref, **asked)

    desk.wrapped.rotate_id = noted  # type: ignore[attr-defined]
    second = turn(desk, old)
    turn(desk, second.id, authority=encode_authority(Authority(acr="2")))
    assert len(given[0][0]) > 64
    assert given[0][1] == 10_000_000
    assert given[1] == (b"", 0)


def test_a_change_of_authority_does_not_converge(desk: Desk) -> None:
    old = desk.created()
    turn(desk, old)
    with pytest.raises(SessionGone):
        turn(desk, old, authority=encode_authority(Authority(acr="2")))


def test_an_ended_session_does_not_rotate(desk: Desk) -> None:
    old = desk.created()
    desk.run(desk.store.revoke(old.ref, reason="logout"))
    with pytest.raises(SessionGone) as gone:
        turn(desk, old)
    assert gone.value.reason == "logout"
