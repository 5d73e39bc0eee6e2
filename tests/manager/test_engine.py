"""The engine: lazy activity, sign-ins nobody heard the end of, keys that are looked at again, opening and closing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import pytest

from coatcheck import SessionFilter, Settings, StoreUnavailable
from coatcheck.core.ids import owner_of
from coatcheck.core.ports import Activity, SessionStore
from coatcheck.engine import KEY_CHECK_SECONDS, MAX_UNKNOWN
from coatcheck.errors import OutcomeUnknown
from coatcheck.places import ClientPlace
from tests.manager.conftest import Bench, id_of

pytestmark = pytest.mark.anyio


async def seen_at(bench: Bench) -> float:
    [summary] = (await bench.do(bench.coat.list_sessions("50"))).items
    return float(summary.last_seen_at)


def touches(bench: Bench) -> int:
    return bench.store.verbs.count("touch")


async def test_use_is_not_written_while_the_stored_time_is_young(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    quiet = bench.coat.settings.idle_timeout.total_seconds() / 20
    bench.store.forget()
    bench.system.advance(quiet)
    for _ in range(10):
        await bench.load(cookie)
    assert not bench.waits()
    await bench.coat.engine.maintain()
    assert touches(bench) == 0


async def test_use_is_written_once_a_batch_when_the_stored_time_is_older(bench: Bench) -> None:
    cookies = [id_of(await bench.sign_in("50")), id_of(await bench.sign_in("51"))]
    bench.store.forget()
    bench.system.advance(bench.coat.settings.idle_timeout.total_seconds() / 20 + 0.000001)
    for cookie in cookies * 50:
        await bench.load(cookie)
    assert touches(bench) == 0
    assert bench.waits()
    await bench.coat.engine.maintain()
    assert touches(bench) == 1
    assert not bench.waits()
    assert await seen_at(bench) == bench.system.now_us() / 1_000_000


async def test_use_in_the_last_tenth_is_written_at_once(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    bench.store.forget()
    bench.system.advance(bench.coat.settings.idle_timeout.total_seconds() * 0.9)
    await bench.load(cookie)
    assert touches(bench) == 1
    assert not bench.waits()
    assert await seen_at(bench) == bench.system.now_us() / 1_000_000


async def test_a_session_in_use_never_ends_early(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    idle = bench.coat.settings.idle_timeout.total_seconds()
    for _ in range(20):
        bench.system.advance(idle * 0.999)
        assert (await bench.load(cookie)).subject == "50"


async def test_activity_moves_forward_only(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    bench.system.advance(600)
    await bench.load(cookie)
    await bench.coat.engine.maintain()
    forward = await seen_at(bench)
    # A node whose batch is late tells an older time.
    ref = (await bench.load(cookie))._record.ref  # type: ignore[union-attr]
    old = Activity(ref=ref, owner=owner_of("", "50"), seen_us=int((forward - 300) * 1_000_000))
    await bench.store.touch([old])
    assert await seen_at(bench) == forward


async def test_activity_of_a_session_that_ended_is_not_written(bench: Bench) -> None:
    session = await bench.sign_in("50")
    bench.system.advance(600)
    again = await bench.load(id_of(session))
    assert bench.waits()
    await bench.do(again.logout())
    assert not bench.waits()


async def test_activity_waits_through_an_outage(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    bench.system.advance(600)
    await bench.load(cookie)
    at = bench.system.now_us() / 1_000_000
    bench.store.away = frozenset()
    with pytest.raises(StoreUnavailable):
        await bench.coat.engine.maintain()
    assert bench.waits()
    bench.store.away = None
    bench.system.advance(5)
    await bench.coat.engine.maintain()
    assert await seen_at(bench) == at


async def test_much_activity_is_written_in_parts_and_what_failed_waits_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After an outage so much may wait that one command for all of it would pass the deadline, each time again.
    monkeypatch.setattr("coatcheck.engine.TOUCHES_AT_ONCE", 2)
    cookies = [id_of(await bench.sign_in(str(number))) for number in range(5)]
    bench.system.advance(600)
    for cookie in cookies:
        await bench.load(cookie)
    written: list[int] = []
    touch = bench.store.touch

    async def touch_twice(activities: Sequence[Activity]) -> None:
        if len(written) == 2:
            raise OutcomeUnknown("no answer")
        written.append(len(activities))
        await touch(activities)

    monkeypatch.setattr(bench.store, "touch", touch_twice)
    with pytest.raises(StoreUnavailable):
        await bench.coat.engine.maintain()
    assert written == [2, 2]
    assert bench.waits()
    monkeypatch.undo()
    bench.store.forget()
    await bench.coat.engine.maintain()
    assert touches(bench) == 1
    assert not bench.waits()
    now = bench.system.now_us() / 1_000_000
    page = await bench.do(bench.coat.find_sessions(SessionFilter()))
    assert [each.last_seen_at for each in page.items] == [now] * 5


async def test_closing_writes_what_waits_and_a_store_that_is_away_does_not_stop_it(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    cookie = id_of(await bench.sign_in("50"))
    bench.system.advance(600)
    await bench.load(cookie)
    bench.store.forget()
    await bench.do(bench.coat.close())
    assert touches(bench) == 1
    bench.system.advance(600)
    await bench.load(cookie)
    bench.store.away = frozenset()
    with caplog.at_level(logging.WARNING, "coatcheck"):
        await bench.do(bench.coat.close())
    assert "last activity could not be written" in caplog.text


async def test_closing_twice_and_asking_afterwards_is_fine(bench: Bench) -> None:
    cookie = id_of(await bench.sign_in("50"))
    await bench.do(bench.coat.close())
    await bench.do(bench.coat.close())
    assert (await bench.load(cookie)).subject == "50"
    await bench.do(bench.coat.start())
    await bench.do(bench.coat.start())


async def test_a_sign_in_without_an_answer_is_revoked_later(bench: Bench) -> None:
    await bench.coat.engine.ready()
    bench.store.answers_lost = frozenset({"admit"})
    with pytest.raises(OutcomeUnknown):
        await bench.sign_in("50")
    bench.store.answers_lost = frozenset()
    assert await bench.subjects() == ["50"]
    await bench.coat.engine.maintain()
    assert await bench.subjects() == []
    bench.store.forget()
    await bench.coat.engine.maintain()
    assert bench.store.verbs == []


async def test_a_sign_in_that_was_never_received_is_revoked_in_vain(bench: Bench) -> None:
    await bench.coat.engine.ready()
    bench.store.away = frozenset({"admit"})
    with pytest.raises(StoreUnavailable):
        await bench.sign_in("50")
    bench.store.away = None
    await bench.coat.engine.maintain()
    assert not bench.waits()
    assert await bench.subjects() == []
    assert (await bench.sign_in("50")).subject == "50"


async def test_what_could_not_be_ended_is_tried_again(bench: Bench) -> None:
    await bench.coat.engine.ready()
    bench.store.answers_lost = frozenset({"admit"})
    with pytest.raises(OutcomeUnknown):
        await bench.sign_in("50")
    bench.store.answers_lost = frozenset()
    bench.store.away = frozenset({"revoke"})
    with pytest.raises(StoreUnavailable):
        await bench.coat.engine.maintain()
    assert bench.waits()
    bench.store.away = None
    await bench.coat.engine.maintain()
    assert await bench.subjects() == []


async def test_the_list_of_unknown_sign_ins_is_bounded(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    await bench.coat.engine.ready()
    bench.store.away = frozenset({"admit"})
    for _ in range(MAX_UNKNOWN + 5):
        with pytest.raises(StoreUnavailable):
            await bench.sign_in("50")
    bench.store.away = None
    bench.store.forget()
    await bench.coat.engine.maintain()
    assert bench.store.verbs.count("revoke") == MAX_UNKNOWN


async def test_the_keys_are_looked_at_again_now_and_then(make_bench: Callable[..., Bench]) -> None:
    # A store that was emptied makes new keys; a node that went on with the old ones would refuse everybody.
    bench = make_bench()
    await bench.coat.engine.ready()
    bench.store.forget()
    bench.system.advance(KEY_CHECK_SECONDS - 0.001)
    await bench.coat.engine.maintain()
    assert bench.store.verbs == []
    bench.system.advance(0.001)
    await bench.coat.engine.maintain()
    # And whether somebody issues tokens of our sessions by now, whose end would have to be told.
    assert bench.store.verbs == ["id_keys", "read_ring"]


async def test_upkeep_before_the_first_contact_asks_nothing(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    await bench.coat.engine.maintain()
    assert bench.store.verbs == []
    with pytest.raises(RuntimeError):
        _ = bench.coat.engine.keys


async def test_starting_warns_about_what_will_surprise(
    make_bench: Callable[..., Bench], caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_bench()

    async def none(candidate: bytes) -> None:
        return None

    inner: Any = bench.store.inner
    inner.local_key = none
    with caplog.at_level(logging.WARNING, "coatcheck"):
        await bench.do(bench.coat.start())
    assert "no other process will know them" in caplog.text
    assert "no server_key" in caplog.text


async def test_without_a_server_key_a_rotated_id_ends_at_once(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()

    async def none(candidate: bytes) -> None:
        return None

    inner: Any = bench.store.inner
    inner.local_key = none
    session = await bench.sign_in("50")
    old = id_of(session)
    await bench.do(session.rotate())
    assert (await bench.load(old)).subject is None
    assert (await bench.load(id_of(session))).subject == "50"


async def test_tightened_limits_apply_to_sessions_at_once(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    cookie = id_of(await bench.sign_in("50"))
    # Ten minutes, and what of a use under the old settings may not have been written.
    bench.system.advance(600 + 91)
    kind = type(bench.coat)
    strict = kind(
        cast(SessionStore, bench.store),
        settings=Settings(idle_timeout=timedelta(minutes=10)),
        system=bench.system,
    )
    session = strict.session(cookie)
    await bench.do(session.load())
    assert session.ended is not None
    assert session.ended.reason == "idle_timeout"
    assert (await bench.load(cookie)).subject == "50", "a node with the old settings goes on"


async def test_events_carry_the_stores_time(bench: Bench) -> None:
    bench.system.advance(123)
    await bench.sign_in("50", place=ClientPlace(address="203.0.113.7"))
    [event] = bench.events.of("session.signed_in")
    assert event.at == bench.system.now_us() / 1_000_000
    assert event.subject == "50"
    assert event.envelope()["v"] == 1
