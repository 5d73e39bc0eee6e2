"""The way to PostgreSQL: deadlines, servers that go and come, forks, loops, cancelled callers, secrets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ports import (
    Activity,
    Committed,
    Live,
)
from coatcheck.core.session import NewSession
from coatcheck.errors import ConfigurationError, OutcomeUnknown, StoreUnavailable
from coatcheck.stores.conformance import together
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.postgres import PostgresStore
from coatcheck.stores.postgres.driver import parse_address
from coatcheck.stores.postgres.pool import MAX_CONNECTIONS
from coatcheck.system import REAL
from tests.servers.postgres import Postgres
from tests.servers.processes import until
from tests.servers.relay import Relay
from tests.stores.postgres_desk import DAY_US, SHORT, SLACK, Desk, commit, desks, new_session, within

pytestmark = pytest.mark.servers


@pytest.fixture(params=["blocking", "async"])
def desk(request: pytest.FixtureRequest, postgres: Postgres, postgres_database: str) -> Iterator[Desk]:
    yield from desks(request.param, postgres, postgres_database)


# -- deadlines ---------------------------------------------------------------------------------------------------------


def test_a_frozen_server_holds_nobody_beyond_the_deadline(desk: Desk) -> None:
    store, new = desk.opened(deadline=SHORT), new_session()
    desk.run(store.create(new))
    desk.server.freeze()
    # The first meets an open connection, the second has to make one.
    for _ in range(2):
        with pytest.raises(StoreUnavailable) as read:
            within(SHORT + SLACK, lambda: desk.run(store.load(new.ref, new.digest)))
        assert not isinstance(read.value, OutcomeUnknown)
    desk.server.thaw()
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
    desk.server.freeze()
    with pytest.raises(OutcomeUnknown):
        within(SHORT + SLACK, lambda: desk.run(commit(store, new)))
    # Nothing was sent this time: there was no connection to send it over.
    with pytest.raises(StoreUnavailable) as unsent:
        within(SHORT + SLACK, lambda: desk.run(commit(store, new)))
    assert not isinstance(unsent.value, OutcomeUnknown)
    desk.server.thaw()
    assert isinstance(desk.run(commit(store, new)), Committed)


def test_a_held_row_ends_the_wait_with_a_certain_answer(desk: Desk) -> None:
    store, new = desk.opened(deadline=SHORT), new_session()
    desk.run(store.create(new))
    with psycopg.connect(desk.url) as holder:
        holder.execute("SELECT * FROM coatcheck_sessions FOR UPDATE")
        for verb in (
            partial(commit, store, new),
            partial(store.revoke, new.ref, reason="logout"),
            partial(store.revoke_owner, 7, new.owner, reason="logout"),
            partial(store.admit, new_session(2), maximum=1, on_limit="evict_oldest"),
            partial(store.touch, [Activity(ref=new.ref, owner=new.owner, seen_us=2**60)]),
        ):
            with pytest.raises(StoreUnavailable, match=r"lock timeout|statement timeout") as held:
                within(SHORT + SLACK, partial(desk.call, verb))
            # The server said that it gave up, so nothing was written.
            assert not isinstance(held.value, OutcomeUnknown)
        # Neither readers nor the sweeper wait.
        assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
        desk.clock.offset_us = 40 * DAY_US
        assert desk.run(store.sweep(limit=10)) == 0
        desk.clock.offset_us = 0
    assert isinstance(desk.run(commit(store, new)), Committed)


def test_an_owner_held_by_another_session_ends_the_wait_too(desk: Desk) -> None:
    store, new = desk.opened(deadline=SHORT), new_session()
    with psycopg.connect(desk.url) as holder:
        holder.execute(b"SELECT coatcheck_hold_owner(7, %s)", ("o" * 43,))
        with pytest.raises(StoreUnavailable):
            within(SHORT + SLACK, lambda: desk.run(store.create(new)))
        assert isinstance(desk.run(store.create(new_session(1, owner="p" * 43))).session.created_us, int)
    desk.run(store.create(new))


def test_a_black_hole_ends_at_the_deadline(desk: Desk, relay: Callable[[int], Relay]) -> None:
    between = relay(desk.server.port)
    store, new = desk.opened(deadline=SHORT, url=between.address_in(desk.url)), new_session()
    desk.run(store.create(new))
    between.swallow()
    with pytest.raises(OutcomeUnknown):
        within(SHORT + SLACK, lambda: desk.run(commit(store, new)))
    with pytest.raises(StoreUnavailable, match="no connection"):
        within(SHORT + SLACK, lambda: desk.run(store.load(new.ref, new.digest)))
    between.forward()
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)


def test_a_write_whose_answer_is_lost_has_an_unknown_outcome(desk: Desk, relay: Callable[[int], Relay]) -> None:
    between = relay(desk.server.port)
    store, new = desk.opened(deadline=SHORT, url=between.address_in(desk.url)), new_session()
    desk.run(store.ping())
    between.swallow_answers()
    with pytest.raises(OutcomeUnknown):
        desk.run(store.create(new))
    between.forward()
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)
    # Repeating it is safe.
    assert desk.run(store.create(new)).session.version == 1
    assert desk.sql("SELECT count(*) FROM coatcheck_sessions") == [(1,)]


def test_a_connection_cut_in_mid_answer_is_an_unknown_outcome_and_then_forgotten(
    desk: Desk, relay: Callable[[int], Relay]
) -> None:
    between = relay(desk.server.port)
    store, new = desk.opened(url=between.address_in(desk.url)), new_session()
    desk.run(store.create(new))
    between.reset_after(3)
    with pytest.raises(OutcomeUnknown):
        desk.run(commit(store, new))
    assert isinstance(desk.run(commit(store, new)), Committed)


def test_a_full_house_turns_callers_away_at_the_deadline(desk: Desk) -> None:
    store, waiting = desk.opened(), desk.opened(deadline=SHORT)
    sessions = [new_session(number, owner="") for number in range(MAX_CONNECTIONS + 6)]
    for each in sessions:
        desk.run(store.create(each))
    with psycopg.connect(desk.url) as holder:
        holder.execute("SELECT * FROM coatcheck_sessions FOR UPDATE")

        async def refused(new: NewSession) -> str:
            try:
                await commit(waiting, new)
            except StoreUnavailable as error:
                return str(error)
            return "written"

        async def work() -> list[str]:
            return await together(desk.colour, [partial(refused, each) for each in sessions])

        answers: list[str] = []
        within(SHORT + SLACK, lambda: answers.extend(desk.run(work())))
    assert "written" not in answers
    assert isinstance(desk.run(commit(waiting, sessions[0])), Committed)


# -- servers that go and come ------------------------------------------------------------------------------------------


def test_the_first_call_after_a_restart_succeeds(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))

    async def fill() -> None:
        await together(desk.colour, [store.ping] * 50)

    for verb in (partial(store.load, new.ref, new.digest), partial(commit, store, new)):
        desk.run(fill())
        desk.server.restart()
        # Several connections are dead now; none of them may be handed out, and no write may be of unknown outcome.
        assert isinstance(desk.run(verb()), (Live, Committed))


def test_a_refused_connection_is_known_at_once_and_recovers_soon(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.server.kill()
    for _ in range(5):
        with pytest.raises(StoreUnavailable) as away:
            within(SLACK, lambda: desk.run(store.load(new.ref, new.digest)))
        assert not isinstance(away.value, OutcomeUnknown)
        assert "\n" not in str(away.value)
    with pytest.raises(StoreUnavailable) as unsent:
        desk.run(store.migrate())
    assert not isinstance(unsent.value, OutcomeUnknown)
    desk.server.ensure_running()

    def answers() -> bool:
        try:
            return isinstance(desk.run(store.load(new.ref, new.digest)), Live)
        except StoreUnavailable:
            # So many have opened the breaker.
            return False

    until(answers, within=2.0, what="the store answers again")


def test_a_backend_ended_by_an_administrator_costs_one_call_at_most(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'coatcheck'")
    with psycopg.connect(desk.url, autocommit=True) as connection:
        for _ in range(1000):
            rows = connection.execute("SELECT 1 FROM pg_stat_activity WHERE application_name = 'coatcheck'").fetchall()
            if not rows:
                break
    assert isinstance(desk.run(commit(store, new)), Committed)


def test_a_read_only_server_is_left_for_another(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.sql(f'ALTER DATABASE "{desk.database}" SET default_transaction_read_only = on')
    fresh = desk.store()
    desk.run(fresh.open())
    assert isinstance(desk.run(fresh.load(new.ref, new.digest)), Live)
    with pytest.raises(StoreUnavailable, match="read-only") as refused:
        desk.run(commit(fresh, new))
    assert not isinstance(refused.value, OutcomeUnknown)
    with psycopg.connect(desk.url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f'ALTER DATABASE "{desk.database}" RESET default_transaction_read_only'.encode())
    # The connection that refused was not kept: the next one finds the new state.
    assert isinstance(desk.run(commit(fresh, new)), Committed)


# -- processes, loops and cancelled callers ----------------------------------------------------------------------------

FORKING = """
import os, sys
from coatcheck.blocking import run_blocking as run
from coatcheck.core.ports import Live
from coatcheck.stores.open import open_store
from coatcheck.stores.conformance import Bench, Clock

store = open_store(sys.argv[1], colour="blocking")
bench = Bench(store=store, other=store, clock=Clock(), stopped=False)
new = bench.new_session()
run(store.open())
run(store.create(new))
backend = lambda: run(store._driver.ask("SELECT pg_backend_pid()", writes=False))
before = backend()
inherited = [link._connection.pgconn.socket for pool in store._driver._pools.values() for link, _ in pool._idle]
child = os.fork()
if child == 0:
    good = isinstance(run(store.load(new.ref, new.digest)), Live) and backend() != before
    for number in inherited:
        # Closed by the first verb of the child, unless its new connection has taken the number.
        now = [link._connection.pgconn.socket for pool in store._driver._pools.values() for link, _ in pool._idle]
        try:
            os.fstat(number)
            good = good and number in now
        except OSError:
            pass
    run(store.close())
    os._exit(0 if good else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
after = backend()
live = isinstance(run(store.load(new.ref, new.digest)), Live)
run(store.close())
sys.exit(0 if status == 0 and before == after and live else 10 + status)
"""


def test_a_fork_shares_no_connection(postgres_database: str) -> None:
    maker = PostgresStore(postgres_database, StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL))
    run_blocking(maker.migrate())
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING, postgres_database],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_one_store_serves_several_event_loops(postgres_database: str) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=REAL))
    new = new_session()

    async def prepare() -> None:
        await store.migrate()
        await store.open()
        await store.create(new)

    asyncio.run(prepare())
    for _ in range(3):
        assert isinstance(asyncio.run(store.load(new.ref, new.digest)), Live)
    asyncio.run(store.close())
    assert store._driver._pools == {}


@pytest.mark.anyio
async def test_cancelled_callers_lose_no_connection_and_leave_no_answer(postgres_database: str) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=REAL))
    await store.migrate()
    sessions = [new_session(number, fields={"me": f'"{number}"'}) for number in range(4)]
    for each in sessions:
        await store.create(each)
    for turns in range(40):
        # Twice at once, and the second cancellation may come while the first is being obeyed.
        tasks = [asyncio.ensure_future(store.load(each.ref, each.digest)) for each in sessions]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for number, each in enumerate(sessions):
            loaded = await store.load(each.ref, each.digest)
            assert isinstance(loaded, Live)
            assert loaded.session.fields["me"] == f'"{number}"'
    # Every place is free again: as many as there are can be held at the same time.
    answers = await asyncio.gather(*(store.ping() for _ in range(3 * MAX_CONNECTIONS)))
    assert len(answers) == 3 * MAX_CONNECTIONS
    await store.close()


@pytest.mark.anyio
async def test_a_caller_cancelled_on_a_frozen_server_leaves_at_once(postgres: Postgres, postgres_database: str) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="async", waits=waits_of("async"), system=REAL))
    await store.migrate()
    await store.ping()
    postgres.freeze()
    task = asyncio.ensure_future(store.ping())
    for _ in range(20):
        await asyncio.sleep(0)
    began = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 0.5
    postgres.thaw()
    await store.ping()
    await store.close()


def test_a_closed_store_may_be_used_again(desk: Desk) -> None:
    store, new = desk.opened(), new_session()
    desk.run(store.create(new))
    desk.run(store.close())
    desk.run(store.close())
    desk.run(store.open())
    assert isinstance(desk.run(store.load(new.ref, new.digest)), Live)


def test_threads_that_arrive_together_make_one_pool(postgres_database: str) -> None:
    store = PostgresStore(postgres_database, StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL))
    barrier = threading.Barrier(16)
    answers: list[int] = []

    def visit() -> None:
        barrier.wait(timeout=30)
        answers.extend(row[0] for row in run_blocking(store._driver.ask("SELECT 1", writes=False)))

    threads = [threading.Thread(target=visit) for _ in range(16)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(timeout=30)
    assert answers == [1] * 16
    assert len(store._driver._pools) == 1
    run_blocking(store.close())


# -- secrets -----------------------------------------------------------------------------------------------------------

PASSWORD = "hunter2-Tr0ub4dor"


def _everything(error: BaseException) -> str:
    texts = []
    chain: BaseException | None = error
    while chain is not None:
        texts.append(f"{chain!r} {chain} {getattr(chain, 'detail', '')}")
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return "\n".join(texts)


def test_no_error_repeats_a_password(desk: Desk, relay: Callable[[int], Relay]) -> None:
    between = relay(desk.server.port)
    address = between.address_in(desk.url).replace("postgres@", f"postgres:{PASSWORD}@")
    store, new = desk.opened(deadline=SHORT, url=address), new_session()
    errors: list[BaseException] = []

    def failing(call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        with pytest.raises((StoreUnavailable, ConfigurationError)) as failed:
            desk.run(call())
        errors.append(failed.value)

    between.swallow()
    failing(partial(store.load, new.ref, new.digest))
    failing(partial(store.load, new.ref, new.digest))
    between.refuse()
    failing(partial(store.load, new.ref, new.digest))
    failing(store.migrate)
    between.forward()
    failing(desk.store(url=address + "_nowhere").open)
    failing(desk.store(url=address, namespace="fresh").open)
    failing(desk.store(url=address.replace("postgres:", f"{PASSWORD}:")).open)
    for error in errors:
        text = _everything(error).replace(f'role "{PASSWORD}"', "")
        assert PASSWORD not in text or f'user "{PASSWORD}"' in text
    assert PASSWORD not in repr(store) + repr(store.__dict__) + repr(parse_address(address))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://ann:{PASSWORD}/x@localhost/db",
        f"postgresql://ann:2345/{PASSWORD}@localhost/db",
        f"postgresql://ann:{PASSWORD}@localhost:port{PASSWORD}/db?nonsense={PASSWORD}",
        f"postgresql://ann:{PASSWORD}@localhost/db?connect_timeout={PASSWORD}&what={PASSWORD}",
        f"postgresql://ann:{PASSWORD}%zz@localhost/db",
        f"postgresql://ann:{PASSWORD}@[localhost/db",
    ],
)
def test_an_unreadable_url_is_not_repeated(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        PostgresStore(url, StoreOptions(colour="blocking", waits=waits_of("blocking"), system=REAL))
    assert PASSWORD not in _everything(refused.value)
