"""A server without room, and addresses nobody should write down: nothing is lost, nothing is repeated."""

from __future__ import annotations

import traceback

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ports import Activity, LimitReached
from coatcheck.errors import ConfigurationError, StoreUnavailable
from coatcheck.stores.conformance import Bench, Clock
from coatcheck.stores.open import open_store
from tests.servers.valkey import ValkeySingle

MINUTE_US = 60 * 1_000_000


@pytest.mark.servers
def test_a_server_without_room_never_costs_a_subject_the_index_of_its_sessions() -> None:
    # ZADD is refused for lack of memory while DEL is allowed: whoever takes that refusal for a key of another type
    # deletes the index, signs the other sessions out and lets one too many in.
    with ValkeySingle() as valkey:
        clock = Clock()
        store = open_store(valkey.url, colour="blocking", clock_offset_us=clock)
        run_blocking(store.open())
        bench = Bench(store=store, other=store, clock=clock, stopped=False)
        sessions = [bench.new_session("ann") for _ in range(3)]
        for new in sessions:
            run_blocking(bench.created(new))
        valkey.nodes[0].ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        valkey.nodes[0].ask("CONFIG", "SET", "maxmemory", "1")
        clock.offset_us += MINUTE_US
        used = Activity(ref=sessions[0].ref, owner=sessions[0].owner, seen_us=run_blocking(store.ping()))
        with pytest.raises(StoreUnavailable):
            run_blocking(store.touch([used]))
        valkey.nodes[0].ask("CONFIG", "SET", "maxmemory", "0")
        page = run_blocking(store.list_by_owner(used.ref.tag, used.owner, after=None, limit=10))
        assert {each.session.ref for each in page.sessions} == {new.ref for new in sessions}
        refused = run_blocking(store.admit(bench.new_session("ann"), maximum=3, on_limit="refuse"))
        assert isinstance(refused, LimitReached)
        run_blocking(store.close())


@pytest.mark.parametrize("scheme", ["redis", "rediss", "valkey"])
def test_a_password_that_makes_an_address_unreadable_is_not_repeated(scheme: str) -> None:
    # Python's parser refuses characters that turn into separators under NFKC, and quotes the whole address.
    password = "geheim\N{FULLWIDTH COLON}x"
    with pytest.raises(ConfigurationError) as refused:
        open_store(f"{scheme}://user:{password}@127.0.0.1:1", colour="blocking")
    assert password not in "".join(traceback.format_exception(refused.value))
