"""What the Redis store keeps for tokens, for how long, at what cost, and how a Cluster's denylist misses nothing.

Observed past the store, by the test servers' own client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import (
    MAX_FAMILIES,
    TOMBSTONE_US,
    Admitted,
    Denial,
    DenialPage,
    Ended,
    FamilyCreated,
    FamilyEnded,
    FamilyKept,
    FamilyReplayed,
    FamilyReused,
    FamilyRotated,
    FamilyUnknown,
    PositionLost,
    RefreshOutcome,
    session_denial_id,
)
from coatcheck.core.refresh_token import FamilyRef, NewFamily
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import OutcomeUnknown, StoreUnavailable, ValueRefused
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.conformance import Bench, Clock
from coatcheck.stores.open import open_store
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.nodes import slot_of
from coatcheck.stores.redis.tokens import MAX_RING_OCTETS
from tests.servers.ports import LOOPBACK
from tests.servers.valkey import ValkeyCluster, ValkeySingle
from tests.stores.test_redis import DAY_US, HOUR_US, ROOM_MS, SLACK_MS, Desk

pytestmark = pytest.mark.servers

GRACE_US = 10 * SECOND_US
SEALED = bytes(range(256)) + b"the sealed successor"


class TokenDesk(Desk):
    """A desk with families and denials."""

    @property
    def log(self) -> str:
        return f"{self.namespace}:{{log}}:d"

    def family(self, session: NewSession | None = None, **changes: Any) -> NewFamily:
        name = sha256_text(self.random.randbytes(8))[:8]
        root = sha256_text(self.random.randbytes(8))[:16]
        ref = FamilyRef(0x1A2B, root, name, of_session=False)
        if session is not None:
            ref = FamilyRef(session.ref.tag, session.ref.handle, name)
        values: dict[str, Any] = {
            "ref": ref,
            "digest": sha256_text(self.random.randbytes(8)),
            "owner": self.new().owner if session is None else session.owner,
            "subject": "ann",
            "client": "",
            "key": "",
            "grant": '{"scope":"profile"}',
            "idle_us": 10 * DAY_US,
            "absolute_us": 30 * DAY_US,
        }
        return NewFamily(**{**values, **changes})

    def begun(self, session: NewSession | None = None, **changes: Any) -> NewFamily:
        new = self.family(session, **changes)
        assert isinstance(self.run(self.store.create_family(new)), FamilyCreated)
        return new

    def refresh(self, new: NewFamily, generation: int, digest: str, successor: str, **changes: Any) -> RefreshOutcome:
        told: dict[str, Any] = {"sealed": SEALED, "grace_us": GRACE_US, "client": new.client, "key": new.key, **changes}
        store: RedisStore = told.pop("store", self.store)
        return self.run(
            store.rotate_refresh(new.ref, generation=generation, digest=digest, successor=successor, **told)
        )

    def rotated(self, new: NewFamily) -> NewFamily:
        """Its first rotation, once it is as old as the grace."""
        self.clock.offset_us += GRACE_US
        assert isinstance(self.refresh(new, 1, new.digest, "second"), FamilyRotated)
        return new

    def told(self, after: str | None = None) -> list[Denial]:
        page = self.run(self.store.denials(after=after, limit=1000))
        assert isinstance(page, DenialPage)
        assert not page.more
        return list(page.entries)

    def denied_ids(self) -> list[str]:
        return [each.id for each in self.told()]

    def stored(self, key: str) -> bytes:
        dumped = self.ask(key, "DUMP")
        assert isinstance(dumped, bytes)
        return dumped


def _token_desk(servers: Any, namespace: str) -> Iterator[TokenDesk]:
    desk = TokenDesk(servers=servers, namespace=namespace, colour="blocking", runner=None)
    desk.run(desk.store.open())
    yield desk
    desk.run(desk.store.close())


@pytest.fixture
def desk(valkey_single: ValkeySingle, namespace: str) -> Iterator[TokenDesk]:
    yield from _token_desk(valkey_single, namespace)


@pytest.fixture
def cluster_desk(valkey_cluster: ValkeyCluster, namespace: str) -> Iterator[TokenDesk]:
    yield from _token_desk(valkey_cluster, namespace)


def _jti(name: str, until_us: int) -> Denial:
    return Denial(kind="jti", id=name, until_us=until_us)


# -- what verbs cost -----------------------------------------------------------------------------------------------


def test_every_verb_of_tokens_is_one_command_once_warm(desk: TokenDesk) -> None:
    store, session = desk.store, desk.created()
    new, ref = desk.begun(session), session.ref
    refresh: dict[str, Any] = {"sealed": SEALED, "grace_us": 0, "client": "", "key": "", "deny_us": HOUR_US}
    until_us = desk.run(store.ping()) + HOUR_US
    verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "create_family": lambda: store.create_family(desk.family(session)),
        "create_family alone": lambda: store.create_family(desk.family()),
        "rotate_refresh": lambda: store.rotate_refresh(
            new.ref, generation=1, digest=new.digest, successor="b", **refresh
        ),
        "standing": lambda: store.standing(ref, "jti"),
        "deny a token": lambda: store.deny(ref.tag, _jti("jti", until_us)),
        "deny a key": lambda: store.deny(0, Denial(kind="kid", id="k", until_us=until_us)),
        "denials": lambda: store.denials(after=None, limit=10),
        "write_ring": lambda: store.write_ring(b"ring", expected=0),
        "reuse": lambda: store.rotate_refresh(new.ref, generation=1, digest=new.digest, successor="c", **refresh),
        "revoke": lambda: store.revoke(ref, reason="logout", deny_us=HOUR_US),
        "revoke_owner": lambda: store.revoke_owner(ref.tag, session.owner, reason="logout", deny_us=HOUR_US),
        "admit": lambda: store.admit(desk.new(), maximum=1, on_limit="evict_oldest", deny_us=HOUR_US),
    }
    for name, verb in verbs.items():
        assert desk.commands(verb) == ["EVALSHA"], name
    assert desk.commands(store.read_ring) == ["HMGET"]


@pytest.mark.xdist_group("cluster")
def test_only_a_denial_costs_a_cluster_a_second_command(cluster_desk: TokenDesk) -> None:
    desk, store = cluster_desk, cluster_desk.store
    session = desk.created()
    new = desk.begun(session)
    desk.clock.offset_us += GRACE_US
    refresh: dict[str, Any] = {"digest": new.digest, "sealed": SEALED, "grace_us": 0, "client": "", "key": ""}
    rotate = lambda: store.rotate_refresh(new.ref, generation=1, successor="b", deny_us=HOUR_US, **refresh)  # noqa: E731
    desk.run(store.denials(after=None, limit=1))
    assert desk.commands(rotate) == ["EVALSHA"]
    assert desk.commands(lambda: store.standing(session.ref, "jti")) == ["EVALSHA"]
    assert desk.commands(lambda: store.revoke(session.ref, reason="logout")) == ["EVALSHA"]
    assert desk.commands(lambda: store.revoke(session.ref, reason="logout", deny_us=HOUR_US)) == ["EVALSHA"] * 2


def test_a_refresh_does_not_touch_the_sessions_key(desk: TokenDesk) -> None:
    # Every near copy of a session is thrown away when its key changes, its expiry included.
    session = desk.created()
    new, key = desk.begun(session), desk.key(session.ref, "s")
    before = (desk.ask(key, "GET"), desk.ask(key, "PEXPIRETIME"))
    desk.rotated(new)
    assert isinstance(desk.refresh(new, 2, "second", "third"), FamilyKept)
    assert isinstance(desk.refresh(new, 1, new.digest, "other"), FamilyReplayed)
    assert (desk.ask(key, "GET"), desk.ask(key, "PEXPIRETIME")) == before


# -- keys and their ends -------------------------------------------------------------------------------------------


def test_the_keys_of_tokens_are_as_written(desk: TokenDesk) -> None:
    session = desk.created()
    bound, alone = desk.rotated(desk.begun(session)), desk.begun()
    until_us = desk.run(desk.store.ping()) + HOUR_US
    desk.run(desk.store.deny(0x1A2B, _jti("t-1", until_us)))
    desk.run(desk.store.write_ring(b"\x00\xff", expected=0))
    assert desk.all_keys() == {
        f"{desk.namespace}:s:{{1a2b}}{session.ref.handle}",
        f"{desk.namespace}:u:{{1a2b}}{session.owner[:16]}",
        f"{desk.namespace}:f:{{1a2b}}{session.ref.handle}",
        f"{desk.namespace}:n:{{1a2b}}{session.ref.handle}:{bound.ref.name}",
        f"{desk.namespace}:g:{{1a2b}}{alone.ref.root}",
        f"{desk.namespace}:a:{{1a2b}}{alone.owner[:16]}",
        f"{desk.namespace}:j:{{1a2b}}t-1",
        desk.log,
        f"{desk.namespace}:ring",
    }
    assert desk.ask(f"{desk.namespace}:ring", "HGETALL") == [b"version", b"1", b"packed", b"\x00\xff"]
    (entry,) = desk.ask(desk.log, "XRANGE", "-", "+")
    assert entry[1] == [b"kind", b"jti", b"id", b"t-1", b"until", str(until_us).encode(), b"not_before", b"0"]


def test_a_sealed_successor_rests_nowhere_beyond_its_grace(desk: TokenDesk) -> None:
    # An old backup and one spent token must not open the live one.
    session = desk.created()
    new = desk.rotated(desk.begun(session))
    hidden = desk.key(session.ref, "n", f"{session.ref.handle}:{new.ref.name}")
    assert 0 < desk.ask(hidden, "PTTL") <= GRACE_US // 1000
    assert all(SEALED[:40] not in desk.stored(key) for key in desk.all_keys() - {hidden})
    assert isinstance(desk.refresh(new, 2, "second", "third"), FamilyKept)
    assert hidden not in desk.all_keys(), "used: it goes at once"


@pytest.mark.parametrize("ending", ["revoke", "revoke_owner", "admit", "expire_idle", "reuse", "sweep"])
def test_whatever_ends_a_session_takes_its_families_and_their_secrets(ending: str, desk: TokenDesk) -> None:
    session, store = desk.created(), desk.store
    ref, new = session.ref, desk.rotated(desk.begun(session))
    desk.begun(session)
    if ending in ("expire_idle", "sweep"):
        desk.clock.offset_us += HOUR_US + (TOMBSTONE_US if ending == "sweep" else 0)
    if ending == "reuse":
        desk.clock.offset_us += GRACE_US
        assert isinstance(desk.refresh(new, 1, new.digest, "thief"), FamilyReused)
    else:
        verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
            "revoke": lambda: store.revoke(ref, reason="logout"),
            "revoke_owner": lambda: store.revoke_owner(ref.tag, session.owner, reason="logout"),
            "admit": lambda: store.admit(desk.new(), maximum=1, on_limit="evict_oldest"),
            "expire_idle": lambda: store.expire_idle(ref),
            "sweep": lambda: store.sweep(limit=10),
        }
        desk.run(verbs[ending]())
    assert not [key for key in desk.all_keys() if ":f:" in key or ":n:" in key]


def test_families_go_with_the_deadline_they_cannot_outlive(desk: TokenDesk) -> None:
    def around(key: str, wanted_us: int) -> bool:
        left, wanted_ms = desk.ask(key, "PTTL"), wanted_us // 1000
        return bool(wanted_ms + SLACK_MS - ROOM_MS < left <= wanted_ms + SLACK_MS)

    session, alone = desk.created(absolute_us=3 * DAY_US), desk.begun(absolute_us=2 * DAY_US)
    desk.rotated(desk.begun(session, absolute_us=60 * DAY_US))
    assert around(desk.key(session.ref, "f"), 3 * DAY_US)
    assert around(desk.key(SessionRef(alone.ref.tag, alone.ref.root), "g"), 2 * DAY_US)
    until_us = desk.run(desk.store.ping()) + HOUR_US
    desk.run(desk.store.deny(0x1A2B, _jti("t", until_us)))
    assert around(desk.key(session.ref, "j", "t"), HOUR_US)
    assert desk.ask(desk.log, "PTTL") == -1, "the log's last id is what its positions are compared with"


def test_a_cut_stays_as_long_as_any_family_it_ends(desk: TokenDesk) -> None:
    new = desk.begun(absolute_us=90 * DAY_US)
    cut = desk.key(SessionRef(new.ref.tag, ""), "c", new.owner)
    desk.run(desk.store.revoke_owner(new.ref.tag, new.owner, reason="password changed"))
    assert desk.ask(cut, "PTTL") > 89 * DAY_US // 1000
    # A later family of a short life does not shorten it.
    desk.begun(absolute_us=HOUR_US)
    desk.run(desk.store.revoke_owner(new.ref.tag, new.owner, reason="logout"))
    assert desk.ask(cut, "PTTL") > 89 * DAY_US // 1000
    assert isinstance(desk.refresh(new, 1, new.digest, "b"), FamilyEnded)


def test_cuts_are_remembered_while_they_end_a_family_and_no_more_than_some(desk: TokenDesk) -> None:
    def remembered() -> list[object]:
        raw = desk.ask(cut, "GET")
        assert isinstance(raw, bytes)
        *_, known = msgspec.msgpack.decode(raw)
        assert isinstance(known, list)
        return known[1::3]

    def sign_out(reason: str) -> None:
        desk.run(desk.store.revoke_owner(first.ref.tag, first.owner, reason=reason))
        desk.clock.offset_us += SECOND_US

    first = desk.begun(absolute_us=DAY_US)
    cut = desk.key(SessionRef(first.ref.tag, ""), "c", first.owner)
    sign_out("first")
    for number in range(40):
        sign_out(f"nobody {number}")
    assert remembered() == [b"first"] or remembered() == ["first"]
    second = desk.begun(absolute_us=30 * DAY_US)
    sign_out("second")
    desk.clock.offset_us += 2 * DAY_US
    sign_out("later")
    assert [str(each) for each in remembered()] == ["second"], "the first one's family is over"
    for number in range(40):
        desk.begun()
        sign_out(f"cut {number}")
    assert len(remembered()) == 32
    answer = desk.refresh(second, 1, second.digest, "b")
    assert isinstance(answer, FamilyEnded)
    assert answer.reason == "cut 8", "of those that were forgotten the oldest that is known is told"


def test_a_session_keeps_its_twenty_families_in_one_key(desk: TokenDesk) -> None:
    session = desk.created()
    for _ in range(MAX_FAMILIES + 3):
        desk.begun(session)
    assert desk.ask(desk.key(session.ref, "f"), "HLEN") == MAX_FAMILIES


def test_a_sweep_takes_families_whose_time_is_over_bite_by_bite(desk: TokenDesk) -> None:
    session = desk.created(idle_us=30 * DAY_US)
    for _ in range(5):
        desk.begun(session, idle_us=HOUR_US)
        desk.begun(idle_us=HOUR_US)
    kept = desk.begun(session)
    desk.clock.offset_us += HOUR_US
    bites = [desk.run(desk.store.sweep(limit=3)) for _ in range(6)]
    assert max(bites) <= 3
    assert (sum(bites), bites[-1]) == (10, 0)
    assert desk.ask(desk.key(session.ref, "f"), "HKEYS") == [kept.ref.name.encode()]
    assert not [key for key in desk.all_keys() if ":g:" in key]


def test_a_scan_refuses_a_cursor_of_a_sweep(desk: TokenDesk) -> None:
    with pytest.raises(ValueRefused):
        desk.run(desk.store.scan(after="0..0:1a2bAAAAAAAAAAAAAAAA", limit=1))


# -- the log -------------------------------------------------------------------------------------------------------


def test_an_entry_is_never_removed_before_its_time(desk: TokenDesk) -> None:
    # A short entry after a long one, and before it: what is removed depends on nobody else's time.
    now = desk.run(desk.store.ping())
    long = Denial(kind="kid", id="long", until_us=now + 30 * DAY_US)
    for number in range(3):
        desk.run(desk.store.deny(0, _jti(f"short-{number}", now + HOUR_US)))
    desk.run(desk.store.deny(0, long))
    for number in range(3, 6):
        desk.run(desk.store.deny(0, _jti(f"short-{number}", now + HOUR_US)))
    desk.run(desk.store.sweep(limit=10))
    assert desk.ask(desk.log, "XLEN") == 7
    position = desk.run(desk.store.denials(after=None, limit=100))
    assert isinstance(position, DenialPage)
    desk.clock.offset_us += 2 * HOUR_US
    desk.run(desk.store.deny(0, _jti("later", now + 3 * HOUR_US)))
    assert desk.ask(desk.log, "XLEN") == 5, "the old ones at the head go with the next entry"
    desk.run(desk.store.sweep(limit=10))
    assert desk.ask(desk.log, "XLEN") == 2, "those behind a longer one go with a sweep"
    assert desk.denied_ids() == ["long", "later"]
    assert [each.id for each in desk.told(position.position)] == ["later"]


def test_a_log_of_many_short_entries_does_not_grow(desk: TokenDesk) -> None:
    for number in range(60):
        now = desk.run(desk.store.ping())
        desk.run(desk.store.deny(0, _jti(f"t-{number}", now + SECOND_US)))
        desk.clock.offset_us += SECOND_US
    assert desk.ask(desk.log, "XLEN") <= 3


def test_a_position_survives_what_it_stood_on(desk: TokenDesk) -> None:
    now = desk.run(desk.store.ping())
    desk.run(desk.store.deny(0, _jti("t", now + HOUR_US)))
    page = desk.run(desk.store.denials(after=None, limit=10))
    assert isinstance(page, DenialPage)
    desk.clock.offset_us += HOUR_US
    desk.run(desk.store.sweep(limit=10))
    assert desk.ask(desk.log, "XLEN") == 0
    assert desk.told(page.position) == []
    desk.run(desk.store.deny(0, _jti("u", now + 2 * HOUR_US)))
    assert [each.id for each in desk.told(page.position)] == ["u"]


@pytest.mark.parametrize(
    "after",
    ["", "0", "-", "+", "$", "(0-0", "0-0 ", "00-0", "0--1", "1-1\n", "9" * 20 + "-0", "9" * 23 + "-0", "x-y", "٣-٣"],
)
def test_a_position_that_was_never_given_out_is_lost(after: str, desk: TokenDesk) -> None:
    now = desk.run(desk.store.ping())
    desk.run(desk.store.deny(0, _jti("t", now + HOUR_US)))
    assert isinstance(desk.run(desk.store.denials(after=after, limit=10)), PositionLost)


def test_a_log_that_was_lost_with_its_server_says_so(desk: TokenDesk) -> None:
    now = desk.run(desk.store.ping())
    desk.run(desk.store.deny(0, _jti("t", now + HOUR_US)))
    page = desk.run(desk.store.denials(after=None, limit=10))
    assert isinstance(page, DenialPage)
    desk.ask(desk.log, "DEL")
    assert isinstance(desk.run(desk.store.denials(after=page.position, limit=10)), PositionLost)
    assert desk.told() == []


def test_a_follower_ahead_of_a_restored_log_begins_again_and_misses_nothing(desk: TokenDesk) -> None:
    until_us = desk.run(desk.store.ping()) + HOUR_US
    desk.run(desk.store.deny(0, _jti("kept", until_us)))
    backup = desk.stored(desk.log)
    desk.run(desk.store.deny(0, _jti("lost", until_us)))
    page = desk.run(desk.store.denials(after=None, limit=10))
    assert isinstance(page, DenialPage)
    desk.ask(desk.log, "RESTORE", 0, backup, "REPLACE")
    while desk.run(desk.store.ping()) // 1000 <= int(page.position.partition("-")[0]):
        """A restore takes longer than the rest of a millisecond."""
    assert isinstance(desk.run(desk.store.denials(after=page.position, limit=10)), PositionLost)
    assert desk.denied_ids() == ["kept"]
    desk.run(desk.store.deny(0, _jti("new", until_us)))
    assert [each.id for each in desk.told(page.position)] == ["new"], "an id is the time it was given out at"


def test_sweeps_catch_up_with_a_log_of_thousands(desk: TokenDesk) -> None:
    # As many expire in a minute of a busy service; the engine asks again while a sweep takes all that it may.
    now, session = desk.run(desk.store.ping()), desk.created(absolute_us=HOUR_US)
    desk.run(desk.store.deny(0, Denial(kind="kid", id="long", until_us=now + 30 * DAY_US)))
    fill = "for i = 1, 5000 do redis.call('XADD', KEYS[1], '*', 'kind', 'jti', 'id', i, 'until', ARGV[1]) end"
    desk.servers.nodes[0].ask("EVAL", fill, 1, desk.log, now + HOUR_US)
    desk.clock.offset_us += HOUR_US
    bites = [desk.run(desk.store.sweep(limit=500))]
    while bites[-1] == 500:
        bites.append(desk.run(desk.store.sweep(limit=500)))
    assert sum(bites) == 5001, "a session too"
    assert desk.ask(desk.log, "XLEN") == 1
    assert desk.ask(desk.key(session.ref, "s"), "EXISTS") == 0


def test_pages_of_a_long_log_have_a_position_to_go_on_from(desk: TokenDesk) -> None:
    now = desk.run(desk.store.ping())
    for number in range(300):
        desk.ask(desk.log, "XADD", "*", "kind", "jti", "id", f"t-{number}", "until", now + HOUR_US, "not_before", 0)
    found: list[str] = []
    after: str | None = None
    while True:
        page = desk.run(desk.store.denials(after=after, limit=7))
        assert isinstance(page, DenialPage)
        assert len(page.entries) <= 7
        found += [each.id for each in page.entries]
        after = page.position
        if not page.more:
            break
    assert found == [f"t-{number}" for number in range(300)]


# -- hostile hands, older and newer releases -----------------------------------------------------------------------


def test_members_of_a_newer_release_survive_a_rotation(desk: TokenDesk) -> None:
    session = desk.created()
    new, key = desk.begun(session), desk.key(session.ref, "f")
    stored = msgspec.msgpack.decode(desk.ask(key, "HGET", new.ref.name))
    desk.ask(key, "HSET", new.ref.name, msgspec.msgpack.encode([*stored, "newer", [1, 2]]))
    desk.rotated(new)
    assert msgspec.msgpack.decode(desk.ask(key, "HGET", new.ref.name))[-2:] == ["newer", [1, 2]]


@pytest.mark.parametrize(
    "raw", [b"", b"\xff\xfe", b"{}", b"\x91" * 50, msgspec.msgpack.encode([1, 1, "d"])], ids=range(5)
)
def test_a_family_that_cannot_be_read_is_nobodys(raw: bytes, desk: TokenDesk) -> None:
    session = desk.created()
    for new, kind, name in ((desk.begun(session), "f", session.ref.handle), (desk.begun(), "g", "")):
        desk.ask(desk.key(session.ref, kind, name or new.ref.root), "HSET", new.ref.name, raw)
        assert isinstance(desk.refresh(new, 1, new.digest, "b"), FamilyUnknown)
        with pytest.raises(StoreUnavailable):
            desk.run(desk.store.create_family(new))
    # Nor does it stop the sweep, which takes it away.
    assert desk.run(desk.store.sweep(limit=10)) == 2


def test_a_family_with_text_that_is_none_is_nobodys(desk: TokenDesk) -> None:
    session = desk.created()
    new, key = desk.begun(session), desk.key(session.ref, "f")
    damaged = desk.ask(key, "HGET", new.ref.name).replace(b"profile", b"\xff\xfe\xff\xfe\xff\xfe\xff")
    desk.ask(key, "HSET", new.ref.name, damaged)
    assert isinstance(desk.refresh(new, 1, new.digest, "b"), FamilyUnknown)


def test_a_key_of_another_type_stops_no_verb_of_tokens(desk: TokenDesk) -> None:
    session, store = desk.created(), desk.store
    new = desk.rotated(desk.begun(session))
    ref, now = session.ref, desk.run(store.ping())
    spoiled = [(desk.key(ref, "n", f"{ref.handle}:{new.ref.name}"), "RPUSH"), (desk.log, "SADD")]
    spoiled += [(desk.key(ref, "c", session.owner), "RPUSH"), (desk.key(ref, "a", session.owner), "RPUSH")]
    for key, command in spoiled:
        desk.ask(key, "DEL")
        desk.ask(key, command, "not ours")
    replayed = desk.refresh(new, 1, new.digest, "b")
    assert isinstance(replayed, FamilyReplayed)
    assert replayed.sealed is None
    assert desk.told() == []
    assert isinstance(desk.run(store.denials(after="1-1", limit=1)), PositionLost)
    alone = desk.begun()
    assert isinstance(desk.refresh(alone, 1, alone.digest, "b"), FamilyKept)
    desk.run(store.deny(0, _jti("t", now + HOUR_US)))
    assert desk.denied_ids() == ["t"]
    desk.ask(desk.key(ref, "f"), "DEL")
    desk.ask(desk.key(ref, "f"), "RPUSH", "not ours")
    assert isinstance(desk.refresh(new, 2, "second", "third"), FamilyUnknown)
    desk.begun(session)
    desk.ask(desk.key(ref, "j", "u"), "RPUSH", "not ours")
    assert desk.run(store.standing(ref, "u")).why == "unreadable", "somebody denied it, and until when is lost"
    desk.run(store.deny(ref.tag, _jti("u", now + HOUR_US)))
    assert desk.run(store.standing(ref, "u")).why == "denied"
    assert desk.run(store.revoke(ref, reason="logout", deny_us=HOUR_US)).ended


@pytest.mark.parametrize(
    "entry",
    [
        ("kind", "jti"),
        ("other", "x", "members", "y", "entirely", "z", "here", "!"),
        ("kind", "newer", "id", "x", "until", "9999999999999999", "not_before", "0"),
        ("kind", "jti", "id", "x", "until", "soon", "not_before", "0"),
    ],
)
def test_an_entry_of_another_shape_hides_no_other(entry: tuple[str, ...], desk: TokenDesk) -> None:
    now = desk.run(desk.store.ping())
    desk.run(desk.store.deny(0, _jti("before", now + HOUR_US)))
    desk.ask(desk.log, "XADD", "*", *entry)
    desk.run(desk.store.deny(0, _jti("after", now + HOUR_US)))
    assert desk.denied_ids() == ["before", "after"]


@pytest.mark.parametrize("name", ["}:s:x{", "}{1a2b}", "a b\n*?[", "", "\ud800", "é" * 300])
def test_a_denied_token_may_have_any_name(name: str, desk: TokenDesk) -> None:
    session = desk.created()
    until_us = desk.run(desk.store.ping()) + HOUR_US
    desk.run(desk.store.deny(session.ref.tag, _jti(name, until_us)))
    assert desk.run(desk.store.standing(session.ref, name)).why == "denied"
    assert desk.denied_ids() == [name]


def test_a_tombstone_of_the_release_before_is_read(desk: TokenDesk) -> None:
    session = desk.created()
    now = desk.run(desk.store.ping())
    old = msgspec.msgpack.encode([1, "ended", "logout", now, now + HOUR_US, session.digest, now])
    desk.ask(desk.key(session.ref, "s"), "SET", old)
    assert isinstance(desk.load(session), Ended)
    assert not desk.run(desk.store.revoke(session.ref, reason="again", deny_us=HOUR_US)).ended
    assert desk.run(desk.store.standing(session.ref, "t")).why == "logout"


def test_bytes_that_are_no_ring_are_refused_and_kept(desk: TokenDesk) -> None:
    key = f"{desk.namespace}:ring"
    for spoil in (("SET", "not a ring"), ("HSET", "version", "x", "packed", "y"), ("HSET", "packed", "y")):
        desk.ask(key, "DEL")
        desk.ask(key, *spoil)
        before = desk.stored(key)
        with pytest.raises(StoreUnavailable):
            desk.run(desk.store.read_ring())
        with contextlib.suppress(StoreUnavailable):
            assert not desk.run(desk.store.write_ring(b"new", expected=0))
        assert desk.stored(key) == before


def test_a_ring_that_is_too_large_never_leaves(desk: TokenDesk) -> None:
    with pytest.raises(ValueRefused):
        desk.run(desk.store.write_ring(bytes(MAX_RING_OCTETS + 1), expected=0))
    assert desk.run(desk.store.read_ring()) is None


def test_the_same_ring_written_again_is_not_at_its_version(desk: TokenDesk) -> None:
    assert desk.run(desk.store.write_ring(b"one", expected=0))
    assert not desk.run(desk.store.write_ring(b"one", expected=0))
    assert desk.run(desk.store.read_ring()) == (1, b"one")


def test_a_full_server_still_ends_and_denies() -> None:
    # A thief must not stay because somebody filled the memory.
    with ValkeySingle() as valkey:
        clock = Clock()
        store = open_store(valkey.url, colour="blocking", clock_offset_us=clock)
        run_blocking(store.open())
        bench = Bench(store=store, other=store, clock=clock, stopped=False)
        sessions = [bench.new_session("ann") for _ in range(2)]
        for new in sessions:
            run_blocking(bench.created(new))
        valkey.nodes[0].ask("CONFIG", "SET", "maxmemory-policy", "noeviction")
        valkey.nodes[0].ask("CONFIG", "SET", "maxmemory", "1")
        gone = sessions[0].ref
        assert run_blocking(store.revoke(gone, reason="logout", deny_us=HOUR_US)).ended
        assert not run_blocking(store.revoke(gone, reason="logout", deny_us=HOUR_US)).ended
        page = run_blocking(store.denials(after=None, limit=10))
        assert isinstance(page, DenialPage)
        assert [each.id for each in page.entries] == [session_denial_id(gone)] * 2
        run_blocking(store.close())


# -- a Cluster: two steps ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _log_away(desk: TokenDesk) -> Iterator[None]:
    """The node of the log stands still, for as long as one short verb tries."""
    node = desk.servers.node_of(desk.log)  # type: ignore[attr-defined]
    node.freeze()
    try:
        yield
    finally:
        node.thaw()
        # What was sent to it meanwhile is carried out before the second of these is answered.
        for _ in range(2):
            node.ask("PING")


def _elsewhere(desk: TokenDesk) -> int:
    """A tag whose node is not the log's."""
    cluster = desk.servers
    assert isinstance(cluster, ValkeyCluster)
    log = cluster.node_of(desk.log)
    return next(tag for tag in range(100) if cluster.node_of(f"{{{tag:04x}}}") is not log)


@pytest.fixture
def hasty(cluster_desk: TokenDesk) -> Iterator[RedisStore]:
    """A second process on the Cluster that gives up early."""
    store = cluster_desk.another(deadline=0.4)
    cluster_desk.run(store.open())
    yield store
    cluster_desk.run(store.close())


@pytest.mark.xdist_group("cluster")
def test_an_entry_the_log_did_not_take_goes_with_the_next_denial(cluster_desk: TokenDesk, hasty: RedisStore) -> None:
    desk = cluster_desk
    first, second = (desk.created(tag=_elsewhere(desk)) for _ in range(2))
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(hasty.revoke(first.ref, reason="logout", deny_us=HOUR_US))
    assert isinstance(desk.load(first), Ended), "the first step stands"
    desk.ask(desk.log, "DEL")
    desk.run(hasty.revoke(second.ref, reason="logout", deny_us=HOUR_US))
    assert desk.denied_ids() == [session_denial_id(each.ref) for each in (first, second)]


@pytest.mark.xdist_group("cluster")
@pytest.mark.parametrize("ending", ["revoke", "revoke_owner", "admit", "superseded", "reuse"])
def test_a_crash_between_the_two_steps_is_healed_by_a_sweep(
    ending: str, cluster_desk: TokenDesk, hasty: RedisStore
) -> None:
    desk = cluster_desk
    session = desk.created(tag=_elsewhere(desk))
    ref, new = session.ref, desk.rotated(desk.begun(session))
    desk.clock.offset_us += GRACE_US
    sign_in: dict[str, Any] = {"new": desk.new(tag=ref.tag), "deny_us": HOUR_US}
    verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "revoke": lambda: hasty.revoke(ref, reason="logout", deny_us=HOUR_US),
        "revoke_owner": lambda: hasty.revoke_owner(ref.tag, session.owner, reason="logout", deny_us=HOUR_US),
        "admit": lambda: hasty.admit(maximum=1, on_limit="evict_oldest", **sign_in),
        "superseded": lambda: hasty.admit(maximum=9, on_limit="refuse", supersedes=ref, **sign_in),
        "reuse": lambda: hasty.rotate_refresh(
            new.ref,
            generation=1,
            digest=new.digest,
            successor="thief",
            sealed=b"",
            grace_us=0,
            client="",
            key="",
            deny_us=HOUR_US,
        ),
    }
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(verbs[ending]())
    now = desk.run(desk.store.ping())
    desk.ask(desk.log, "DEL")
    # Another process: what the first one remembered is lost with it.
    desk.run(desk.store.sweep(limit=10))
    (entry,) = desk.told()
    assert entry.id == session_denial_id(ref)
    assert now + HOUR_US - 60 * SECOND_US < entry.until_us <= now + HOUR_US
    desk.run(desk.store.sweep(limit=10))
    assert len(desk.told()) == 1, "told once, the tombstone owes nothing more"


@pytest.mark.xdist_group("cluster")
def test_a_call_repeated_by_another_process_makes_up_for_the_entry(cluster_desk: TokenDesk, hasty: RedisStore) -> None:
    desk, tag = cluster_desk, _elsewhere(cluster_desk)
    first, second = desk.created(tag=tag), desk.created(tag=tag)
    new = desk.new(tag=tag)
    one: dict[str, Any] = {"maximum": 1, "on_limit": "evict_oldest", "supersedes": second.ref, "deny_us": HOUR_US}
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(hasty.admit(new, **one))
    desk.ask(desk.log, "DEL")
    again = desk.run(desk.store.admit(new, **one))
    assert isinstance(again, Admitted)
    assert again.evicted == (first.ref,)
    assert set(desk.denied_ids()) == {session_denial_id(each.ref) for each in (first, second)}
    cut: dict[str, Any] = {"reason": "password changed", "deny_us": HOUR_US}
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(hasty.revoke_owner(tag, new.owner, **cut))
    desk.ask(desk.log, "DEL")
    assert desk.run(desk.store.revoke_owner(tag, new.owner, **cut)).ended == ()
    assert desk.denied_ids() == [session_denial_id(new.ref)]
    desk.clock.offset_us += HOUR_US
    desk.ask(desk.log, "DEL")
    desk.run(desk.store.revoke_owner(tag, new.owner, **cut))
    assert desk.denied_ids() == [], "what an earlier cut owed is over with its time"


@pytest.mark.xdist_group("cluster")
def test_a_token_is_denied_where_it_is_asked_for_before_the_log_hears_of_it(
    cluster_desk: TokenDesk, hasty: RedisStore
) -> None:
    desk = cluster_desk
    session = desk.created(tag=_elsewhere(desk))
    until_us = desk.run(desk.store.ping()) + HOUR_US
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(hasty.deny(session.ref.tag, _jti("t", until_us)))
    assert desk.run(desk.store.standing(session.ref, "t")).why == "denied"


@pytest.mark.xdist_group("cluster")
def test_a_tombstone_that_owes_an_entry_outlives_the_sessions_deadline(
    cluster_desk: TokenDesk, hasty: RedisStore
) -> None:
    desk = cluster_desk
    session = desk.created(tag=_elsewhere(desk), absolute_us=60 * SECOND_US)
    with _log_away(desk), pytest.raises(OutcomeUnknown):
        desk.run(hasty.revoke(session.ref, reason="logout", deny_us=HOUR_US))
    desk.ask(desk.log, "DEL")
    desk.clock.offset_us += 10 * 60 * SECOND_US
    assert desk.run(desk.store.sweep(limit=10)) == 0
    assert desk.denied_ids() == [session_denial_id(session.ref)]
    assert desk.run(desk.store.sweep(limit=10)) == 1


@contextlib.contextmanager
def _moving(cluster: ValkeyCluster, tag: int) -> Iterator[Callable[..., None]]:
    """The slot of a tag is on its way, and keys go when they are told to; in the end it is back where it was."""
    name = f"{{{tag:04x}}}"
    slot, source = slot_of(name[1:-1]), cluster.node_of(name)
    target = next(node for node in cluster.nodes if node is not source)
    source_id, target_id = (node.ask("CLUSTER", "MYID") for node in (source, target))

    def move(*keys: str) -> None:
        for key in keys:
            source.ask("MIGRATE", LOOPBACK, target.port, key, 0, 5000)

    try:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)  # type: ignore[arg-type]
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)  # type: ignore[arg-type]
        yield move
    finally:
        # Given up rather than completed: the slot changes its owner at no time, so no gossip is waited for.
        source.ask("CLUSTER", "SETSLOT", slot, "STABLE")
        for key in target.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):  # type: ignore[union-attr]
            target.ask("MIGRATE", LOOPBACK, source.port, key, 0, 5000, "REPLACE")  # type: ignore[arg-type]
        target.ask("CLUSTER", "SETSLOT", slot, "STABLE")


@pytest.mark.xdist_group("cluster")
def test_a_slot_on_its_way_never_makes_a_family_unknown_or_a_cut_forgotten(
    cluster_desk: TokenDesk, hasty: RedisStore
) -> None:
    desk, tag = cluster_desk, 0xBEEF
    cluster = desk.servers
    assert isinstance(cluster, ValkeyCluster)
    session = desk.created(tag=tag)
    ref = session.ref
    bound, alone = desk.begun(session), desk.family()
    alone = replace(alone, ref=replace(alone.ref, tag=tag))
    assert isinstance(desk.run(desk.store.create_family(alone)), FamilyCreated)
    until_us = desk.run(desk.store.ping()) + HOUR_US
    desk.run(desk.store.deny(tag, _jti("t", until_us)))
    with _moving(cluster, tag) as move:
        move(desk.key(ref, "f"), desk.key(ref, "j", "t"))
        with pytest.raises(StoreUnavailable):
            desk.refresh(bound, 1, bound.digest, "b", store=hasty)
        assert desk.run(hasty.standing(ref, "t")).why == "denied"
        assert desk.run(hasty.standing(ref, "u")).why is None
        move(desk.key(ref, "s"), desk.key(ref, "u", session.owner))
        assert isinstance(desk.refresh(bound, 1, bound.digest, "b", store=hasty, grace_us=HOUR_US), FamilyKept)
        assert desk.run(hasty.standing(ref, "t")).why == "denied"
        assert desk.run(hasty.standing(ref, "u")).why is None
        # The cut of the owner cannot be seen from where the family still is.
        assert isinstance(desk.refresh(alone, 1, alone.digest, "b", store=hasty, grace_us=HOUR_US), FamilyKept)
    assert isinstance(desk.refresh(alone, 1, alone.digest, "b"), FamilyKept)


@pytest.mark.xdist_group("cluster")
def test_a_cut_that_did_not_move_yet_ends_the_family_that_did(cluster_desk: TokenDesk, hasty: RedisStore) -> None:
    # Who was signed out everywhere must not come back because a slot moves.
    desk, tag = cluster_desk, 0xBEEF
    cluster = desk.servers
    assert isinstance(cluster, ValkeyCluster)
    new = desk.family()
    new = replace(new, ref=replace(new.ref, tag=tag))
    place = SessionRef(tag, "")
    family, cut = desk.key(place, "g", new.ref.root), desk.key(place, "c", new.owner)
    assert isinstance(desk.run(desk.store.create_family(new)), FamilyCreated)
    desk.run(desk.store.revoke_owner(tag, new.owner, reason="password changed"))
    for first in (family, cut):
        with _moving(cluster, tag) as move:
            move(first)
            answer = desk.refresh(new, 1, new.digest, "b", store=hasty)
            assert isinstance(answer, FamilyEnded)
            assert answer.reason == "password changed"


@pytest.mark.xdist_group("cluster")
@pytest.mark.parametrize("moved", [False, True], ids=["at the source", "at the target"])
@pytest.mark.parametrize("of_session", [False, True], ids=["alone", "of a session"])
def test_a_rotation_while_a_slot_moves_is_forgiven_like_any_other(
    cluster_desk: TokenDesk, hasty: RedisStore, of_session: bool, moved: bool
) -> None:
    desk, tag = cluster_desk, 0xBEEF
    cluster = desk.servers
    assert isinstance(cluster, ValkeyCluster)
    session = desk.created(tag=tag) if of_session else None
    new = desk.family(session)
    new = replace(new, ref=replace(new.ref, tag=tag))
    assert isinstance(desk.run(desk.store.create_family(new)), FamilyCreated)
    desk.clock.offset_us += GRACE_US
    root = new.ref.root
    keys = [desk.key(SessionRef(tag, ""), kind, root) for kind in ("sf" if of_session else "g")]
    if session is not None:
        keys.append(desk.key(session.ref, "u", session.owner))
    with _moving(cluster, tag) as move:
        if moved:
            move(*keys)
        assert isinstance(desk.refresh(new, 1, new.digest, "second", store=hasty), FamilyRotated)
        late = desk.refresh(new, 1, new.digest, "other", store=hasty)
        assert isinstance(late, FamilyReplayed)
        assert late.sealed == SEALED
        if not moved:
            move(*keys)
            late = desk.refresh(new, 1, new.digest, "other", store=hasty)
            assert isinstance(late, FamilyReplayed)
            assert late.sealed == SEALED, "put where the family was to come"
        assert isinstance(desk.refresh(new, 2, "second", "third", store=hasty), FamilyKept)
        late = desk.refresh(new, 1, new.digest, "other", store=hasty)
        assert isinstance(late, FamilyReplayed)
        assert late.sealed is None


@pytest.mark.xdist_group("cluster")
def test_signing_out_everywhere_again_and_again_tells_of_each_session_at_most_twice(cluster_desk: TokenDesk) -> None:
    # On a Cluster a repeated call makes up for one that was cut off; it must not tell of all that ever ended.
    desk, calls = cluster_desk, 30
    for _ in range(calls):
        session = desk.created()
        desk.run(desk.store.revoke_owner(session.ref.tag, session.owner, reason="logout", deny_us=HOUR_US))
    page = desk.run(desk.store.denials(after=None, limit=1000))
    assert isinstance(page, DenialPage)
    assert calls <= len(page.entries) < 2 * calls
