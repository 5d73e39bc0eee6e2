"""What the Redis store keeps, under which keys and for how long, and what each verb costs.

Observed past the store, by the test servers' own client: a fault of the driver cannot hide itself.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import msgspec
import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import IdKeys, SessionRef, owner_of
from coatcheck.core.ports import (
    TOMBSTONE_US,
    Absent,
    Activity,
    Admitted,
    Aliased,
    Changes,
    Colour,
    Committed,
    Converged,
    Ended,
    Gone,
    Live,
    RateLimit,
    RecordLimits,
    Rotated,
    Unreadable,
)
from coatcheck.core.session import SECOND_US, NewSession
from coatcheck.errors import ConfigurationError, StoreUnavailable, ValueRefused
from coatcheck.primitives.digest import sha256_text
from coatcheck.stores.conformance import CHECKS, NEEDS_BYTES, Bench, Check, Clock, run_check
from coatcheck.stores.open import waits_of
from coatcheck.stores.options import StoreOptions
from coatcheck.stores.redis import RedisStore
from coatcheck.stores.redis.calls import ASIDE, SCRIPTS, all_scripts
from coatcheck.stores.redis.dispatch import Script
from coatcheck.stores.redis.nodes import parse_target
from coatcheck.system import REAL
from tests.servers.resp import ReplyError
from tests.servers.valkey import ValkeyCluster, ValkeyServers, ValkeySingle

T = TypeVar("T")
pytestmark = pytest.mark.servers

HOUR_US = 3600 * SECOND_US
# In a record: seconds that end in a century.
_LONG = 5_000_000_000
DAY_US = 24 * HOUR_US
WIDE = RecordLimits(octets=1 << 16, fields=100)
# How long after its last moment the server may still keep a key, in milliseconds, with room for a slow machine.
SLACK_MS = 120_000
ROOM_MS = 30_000


@dataclass(kw_only=True)
class Desk:
    """A store of one colour on a running server, and a look behind it."""

    servers: ValkeyServers
    namespace: str
    colour: Colour
    runner: asyncio.Runner | None
    clock: Clock = field(default_factory=Clock)
    random: random.Random = field(default_factory=lambda: random.Random(7))

    def __post_init__(self) -> None:
        self.store = self.another()

    def another(self, url: str = "", **options: Any) -> RedisStore:
        settings: dict[str, Any] = {"deadline": 30.0, "namespace": self.namespace, **options}
        waits = waits_of(self.colour)
        told = StoreOptions(colour=self.colour, waits=waits, system=REAL, clock_offset_us=self.clock, **settings)
        return RedisStore(url or self.servers.url, told)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_blocking(work) if self.runner is None else self.runner.run(work)

    def new(self, subject: str | None = "ann", *, tag: int = 0x1A2B, **changes: Any) -> NewSession:
        values: dict[str, Any] = {
            "ref": SessionRef(tag, sha256_text(self.random.randbytes(8))[:16]),
            "digest": sha256_text(self.random.randbytes(8)),
            "owner": owner_of("", subject),
            "subject": subject or "",
            "idle_us": HOUR_US,
            "absolute_us": 30 * DAY_US,
            "authority": '{"tenant":""}',
            "fields": {"a": "1"},
        }
        return NewSession(**{**values, **changes})

    def created(self, subject: str | None = "ann", **changes: Any) -> NewSession:
        new = self.new(subject, **changes)
        self.run(self.store.create(new))
        return new

    def load(self, new: NewSession) -> object:
        return self.run(self.store.load(new.ref, new.digest))

    def key(self, ref: SessionRef, kind: str, name: str | None = None) -> str:
        name = ref.handle if name is None else name
        # Of an owner a key has the beginning.
        return f"{self.namespace}:{kind}:{{{ref.tag:04x}}}{name[:16] if kind in 'uca' else name}"

    def ask(self, key: str, command: str, *words: str | int | bytes) -> Any:
        """One command about a key, at the node that has it."""
        node = self.servers.node_of(key) if isinstance(self.servers, ValkeyCluster) else self.servers.primaries[0]
        return node.ask(*command.split(), key, *words)

    def all_keys(self) -> set[str]:
        """All keys of this name space."""
        found: set[str] = set()
        for node in self.servers.primaries:
            reply = node.ask("KEYS", f"{self.namespace}:*")
            assert isinstance(reply, list)
            found |= {key.decode() for key in reply if isinstance(key, bytes)}
        return found

    def commands(self, work: Callable[[], Coroutine[Any, Any, object]]) -> list[str]:
        """What a verb sends once the connection and the scripts are there."""
        with self.servers.record(ignore={"ping", "info", "echo"}) as seen:
            self.run(work())
        return [each.name for each in seen]


@pytest.fixture(params=["blocking", "async"])
def colour(request: pytest.FixtureRequest) -> Colour:
    chosen: Colour = request.param
    return chosen


def _desk(servers: ValkeyServers, namespace: str, colour: Colour) -> Iterator[Desk]:
    runner = asyncio.Runner() if colour == "async" else None
    desk = Desk(servers=servers, namespace=namespace, colour=colour, runner=runner)
    desk.run(desk.store.open())
    yield desk
    desk.run(desk.store.close())
    if runner is not None:
        runner.close()


@pytest.fixture
def desk(valkey_single: ValkeySingle, namespace: str, colour: Colour) -> Iterator[Desk]:
    yield from _desk(valkey_single, namespace, colour)


@pytest.fixture
def cluster_desk(valkey_cluster: ValkeyCluster, namespace: str, colour: Colour) -> Iterator[Desk]:
    yield from _desk(valkey_cluster, namespace, colour)


# -- what verbs cost -----------------------------------------------------------------------------------------------


def test_every_verb_is_one_command_once_warm(desk: Desk) -> None:
    store, first, second = desk.store, desk.created(), desk.new()
    ref = first.ref
    activity = Activity(ref=ref, owner=first.owner, seen_us=1)
    limit = RateLimit(attempts=3, period=60.0)
    rotated: dict[str, Any] = {"old_digest": first.digest, "new_digest": "n" * 43, "sealed": b"s", "alias_us": 1000}
    changes = Changes(put={"b": "2"})
    verbs: dict[str, Callable[[], Coroutine[Any, Any, object]]] = {
        "load": lambda: store.load(ref, first.digest),
        "load by another digest": lambda: store.load(ref, "x" * 43),
        "create": lambda: store.create(desk.new()),
        "admit": lambda: store.admit(second, maximum=1, on_limit="evict_oldest"),
        "commit": lambda: store.commit(second.ref, changes, limits=WIDE),
        "touch": lambda: store.touch([activity]),
        "rotate_id": lambda: store.rotate_id(ref, **rotated),
        "expire_idle": lambda: store.expire_idle(ref),
        "list_by_owner": lambda: store.list_by_owner(ref.tag, first.owner, after=None, limit=10),
        "revoke": lambda: store.revoke(ref, reason="logout"),
        "revoke_owner": lambda: store.revoke_owner(ref.tag, first.owner, reason="logout"),
        "id_keys": lambda: store.id_keys(IdKeys(b"a" * 32, b"b" * 32)),
        "hit": lambda: store.hit("key", limit),
    }
    for name, verb in verbs.items():
        assert desk.commands(verb) == ["EVALSHA"], name
    assert desk.commands(store.ping) == ["TIME"]
    assert desk.commands(lambda: store.clear("key")) == ["DEL"]


def test_a_batch_of_touches_is_one_command_a_slot(desk: Desk) -> None:
    sessions = [desk.created(f"user-{n}", tag=7) for n in range(20)]
    other = desk.created("else", tag=8)
    batch = [Activity(ref=each.ref, owner=each.owner, seen_us=1) for each in [*sessions, other]]
    assert desk.commands(lambda: desk.store.touch(batch)) == ["EVALSHA", "EVALSHA"]
    assert desk.commands(lambda: desk.store.touch([])) == []


def test_loading_writes_nothing_at_the_server(desk: Desk) -> None:
    new = desk.created()
    fields = ("cmdstat_set", "cmdstat_zadd", "cmdstat_pexpire", "cmdstat_del", "cmdstat_expire", "cmdstat_getex")
    node = desk.servers.primaries[0]
    before = node.ask_fields("INFO", "commandstats")
    for digest in (new.digest, "x" * 43):
        desk.run(desk.store.load(new.ref, digest))
    after = node.ask_fields("INFO", "commandstats")
    assert [after.get(name) for name in fields] == [before.get(name) for name in fields]


def test_activity_does_not_touch_the_sessions_key(desk: Desk) -> None:
    # Every near copy of a session is thrown away when its key changes, its expiry included.
    new = desk.created()
    key = desk.key(new.ref, "s")
    before = (desk.ask(key, "GET"), desk.ask(key, "PEXPIRETIME"))
    desk.clock.offset_us += 60 * SECOND_US
    now = desk.run(desk.store.ping())
    desk.run(desk.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=now)]))
    assert (desk.ask(key, "GET"), desk.ask(key, "PEXPIRETIME")) == before
    assert int(float(desk.ask(desk.key(new.ref, "u", new.owner), "ZSCORE", new.ref.handle))) == now


def test_a_server_that_forgot_its_scripts_is_given_them_again(desk: Desk) -> None:
    new = desk.created()
    for node in desk.servers.primaries:
        node.ask("SCRIPT", "FLUSH")
    assert desk.commands(lambda: desk.store.load(new.ref, new.digest)) == ["EVALSHA", "SCRIPT", "EVALSHA"]
    assert desk.commands(lambda: desk.store.load(new.ref, new.digest)) == ["EVALSHA"]


@pytest.mark.xdist_group("cluster")
def test_a_cluster_that_forgot_its_scripts_is_given_them_again(cluster_desk: Desk) -> None:
    sessions = [cluster_desk.created(f"user-{n}", tag=n * 1000) for n in range(12)]
    for node in cluster_desk.servers.primaries:
        node.ask("SCRIPT", "FLUSH")
    cluster_desk.clock.offset_us += 60 * SECOND_US
    now = cluster_desk.run(cluster_desk.store.ping())
    batch = [Activity(ref=each.ref, owner=each.owner, seen_us=now) for each in sessions]
    cluster_desk.run(cluster_desk.store.touch(batch))
    for each in sessions:
        live = cluster_desk.load(each)
        assert isinstance(live, Live)
        assert live.seen_us == now


# -- keys and their ends -------------------------------------------------------------------------------------------


def test_the_key_layout_is_as_written(desk: Desk) -> None:
    new = desk.created()
    rotation = desk.store.rotate_id(
        new.ref, old_digest=new.digest, new_digest="n" * 43, sealed=b"\x00\xff", alias_us=HOUR_US
    )
    assert isinstance(desk.run(rotation), Rotated)
    desk.run(desk.store.revoke_owner(new.ref.tag, new.owner, reason="logout", keep=new.ref))
    desk.run(desk.store.id_keys(IdKeys(b"a" * 32, b"b" * 32)))
    desk.run(desk.store.hit("login:ann", RateLimit(attempts=3, period=60.0)))
    limit = hashlib.sha256(b"login:ann").digest()
    assert desk.all_keys() == {
        f"{desk.namespace}:s:{{1a2b}}{new.ref.handle}",
        f"{desk.namespace}:u:{{1a2b}}{new.owner[:16]}",
        f"{desk.namespace}:c:{{1a2b}}{new.owner[:16]}",
        f"{desk.namespace}:r:{{1a2b}}{new.ref.handle}",
        f"{desk.namespace}:keys",
        f"{desk.namespace}:{{l:{_base64(limit)[:22]}}}:l",
    }


def test_nothing_usable_is_stored(desk: Desk) -> None:
    # A digest opens nothing, and an alias is sealed by its caller; the store adds no other copy of either.
    new = desk.created(fields={"f": '"v"'})
    owner = owner_of("", "ann")[:16]
    times = [_created_us(desk, new), 0, 3600, 30 * 86400]
    assert _record(desk, new) == [1, 1, new.digest, owner, "ann", *times, '{"tenant":""}', ["f", '"v"'], []]


def test_an_owner_that_the_subject_does_not_lead_to_is_stored_whole(desk: Desk) -> None:
    # Under a tenant, and whatever else a caller may choose to name an owner by.
    for owner in (owner_of("tenant", "ann"), "o", "o" * 16, owner_of("", "ann")[:15] + "~"):
        new = desk.created(owner=owner)
        assert _record(desk, new)[3] == owner
        live = desk.load(new)
        assert isinstance(live, Live)
        assert live.session.owner == owner
        assert desk.ask(desk.key(new.ref, "u", owner), "ZSCORE", new.ref.handle) is not None
        ended = desk.run(desk.store.revoke_owner(new.ref.tag, owner, reason="logout"))
        assert ended.ended == (new.ref,)


def test_an_anonymous_session_has_no_time_of_sign_in(desk: Desk) -> None:
    new = desk.created(None)
    assert _record(desk, new)[6] == -1
    live = desk.load(new)
    assert isinstance(live, Live)
    assert (live.session.auth_us, live.session.owner) == (0, "")


@pytest.mark.parametrize("length", [0, 1, 999_999, SECOND_US, SECOND_US + 1, 1 << 32, (1 << 50) + 1])
def test_every_length_comes_back_exactly(length: int, desk: Desk) -> None:
    new = desk.new(idle_us=length, absolute_us=length)
    session = desk.run(desk.store.create(new)).session
    live = desk.load(new)
    assert isinstance(live, Live)
    assert live.session == session
    assert (live.session.idle_us, live.session.absolute_us) == (length, session.created_us + length)


@pytest.mark.parametrize(
    ("idle_us", "absolute_us"), [(SECOND_US, HOUR_US), (SECOND_US + 1, HOUR_US), (HOUR_US, SECOND_US - 1)]
)
def test_a_session_ends_in_the_very_microsecond_of_its_deadline(idle_us: int, absolute_us: int, desk: Desk) -> None:
    # The server's clock cannot be stopped, so the script is told another.
    new, life = desk.created(idle_us=idle_us, absolute_us=absolute_us), min(idle_us, absolute_us)
    frozen = all_scripts()["expire_idle"].source.replace("redis.call('TIME')", "{0, 0}")
    for offset, word in ((life - 1, b"alive"), (life, b"gone")):
        key, now = desk.key(new.ref, "s"), _created_us(desk, new) + offset
        answer = desk.servers.nodes[0].ask("EVAL", frozen, 1, key, now)
        assert isinstance(answer, list)
        assert answer[0] == word


@pytest.mark.parametrize(
    "digest", ["", "x", "n" * 43, "é" * 43, "=" * 43, "A" * 42 + "B", "x" * 44, "\ud800", sha256_text(b"")[:42] + "\n"]
)
def test_what_is_no_digest_of_ours_opens_nothing_and_breaks_nothing(digest: str, desk: Desk) -> None:
    # Decoding forgives: of four spellings of the last character only one is ours.
    new = desk.created(digest="A" * 43)
    assert isinstance(desk.run(desk.store.load(new.ref, digest)), Absent)
    assert isinstance(desk.load(new), Live)


@pytest.mark.parametrize("raw", [bytes(32), b"\xff" * 32, b"}:s:{1a2b}" + bytes(22), b"\xd9\x20" * 16])
def test_any_32_octets_may_be_a_digest(raw: bytes, desk: Desk) -> None:
    new = desk.created(digest=_base64(raw)[:43])
    assert desk.ask(desk.key(new.ref, "s"), "GET")[3:37] == b"\xd9\x20" + raw
    live = desk.load(new)
    assert isinstance(live, Live)
    assert live.session.digest == new.digest


def test_keys_outlive_their_deadlines_by_two_minutes_at_most(desk: Desk) -> None:
    def left(key: str) -> int:
        answer = desk.ask(key, "PTTL")
        assert isinstance(answer, int)
        return answer

    def around(key: str, wanted_ms: int) -> bool:
        return wanted_ms + SLACK_MS - ROOM_MS < left(key) <= wanted_ms + SLACK_MS

    short, long = desk.created(absolute_us=2 * HOUR_US), desk.created(absolute_us=3 * DAY_US)
    assert around(desk.key(short.ref, "s"), 2 * 3_600_000)
    assert around(desk.key(long.ref, "s"), 3 * 86_400_000)
    assert around(desk.key(long.ref, "u", long.owner), 3 * 86_400_000)
    third = desk.created(absolute_us=HOUR_US)
    assert around(desk.key(third.ref, "u", third.owner), 3 * 86_400_000), "the latest of all members"
    desk.run(desk.store.commit(short.ref, Changes(put={"b": "2"}), limits=WIDE))
    assert around(desk.key(short.ref, "s"), 2 * 3_600_000), "a commit prolongs nothing"
    desk.run(
        desk.store.rotate_id(long.ref, old_digest=long.digest, new_digest="n", sealed=b"", alias_us=10 * SECOND_US)
    )
    assert 0 < left(desk.key(long.ref, "r")) <= 10_000
    for each, wanted in ((short, 2 * 3_600_000), (long, TOMBSTONE_US // 1000)):
        desk.run(desk.store.revoke(each.ref, reason="logout"))
        assert around(desk.key(each.ref, "s"), wanted), "a tombstone, never past the absolute deadline"
    assert left(desk.key(long.ref, "r")) == -2, "a logout ends the alias"
    desk.run(desk.store.hit("key", RateLimit(attempts=10, period=100.0), cost=2))
    (limit,) = (key for key in desk.all_keys() if key.endswith(":l"))
    assert 20_000 - ROOM_MS < left(limit) <= 20_000, "gone when it is full again"


def test_the_index_of_anonymous_sessions_does_not_grow(desk: Desk) -> None:
    for _ in range(30):
        desk.created(None, idle_us=HOUR_US)
        desk.clock.offset_us += HOUR_US // 2
    index = desk.key(SessionRef(0x1A2B, ""), "u", "")
    assert desk.ask(index, "ZCARD") <= 4


@pytest.mark.xdist_group("cluster")
def test_all_keys_of_a_subject_share_a_slot(cluster_desk: Desk) -> None:
    new = cluster_desk.created()
    slots = {cluster_desk.ask(cluster_desk.key(new.ref, kind), "CLUSTER KEYSLOT") for kind in "surc"}
    assert len(slots) == 1


def test_two_name_spaces_do_not_see_each_other(desk: Desk) -> None:
    new = desk.created()
    other = desk.another(namespace=desk.namespace + "x")
    assert isinstance(desk.run(other.load(new.ref, new.digest)), Absent)
    page = desk.run(other.scan(after=None, limit=10))
    assert page.sessions == ()
    assert len(desk.run(desk.store.scan(after=None, limit=10)).sessions) == 1
    desk.run(other.close())


# -- older and newer releases, hostile hands -----------------------------------------------------------------------


def test_members_of_a_newer_release_survive_a_commit_and_a_rotation(desk: Desk) -> None:
    new = desk.created()
    key = desk.key(new.ref, "s")
    newer = msgspec.msgpack.encode(["newer", [1, 2]])[1:]
    stored = desk.ask(key, "GET")
    assert stored[0] == 0x9C, "an array of twelve"
    desk.ask(key, "SET", b"\x9e" + stored[1:] + newer)
    assert isinstance(
        desk.run(desk.store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE)),
        Committed,
    )
    rotation = desk.store.rotate_id(new.ref, old_digest=new.digest, new_digest="n", sealed=b"", alias_us=0)
    assert isinstance(desk.run(rotation), Rotated)
    stored = desk.ask(key, "GET")
    assert (stored[0], stored[-len(newer) :]) == (0x9E, newer)
    assert isinstance(desk.run(desk.store.load(new.ref, "n")), Live)


def test_times_stay_exact_to_the_microsecond(desk: Desk) -> None:
    # Lua numbers are doubles, and its shortest way to print one would round a microsecond of this century away.
    desk.clock.offset_us += 40 * 365 * DAY_US + 1
    new = desk.created(absolute_us=10 * 365 * DAY_US + 3, idle_us=9 * 365 * DAY_US + 7)
    live = desk.load(new)
    assert isinstance(live, Live)
    assert live.session.absolute_us - live.session.created_us == 10 * 365 * DAY_US + 3
    assert live.session.idle_us == 9 * 365 * DAY_US + 7
    assert live.seen_us == live.session.created_us


@pytest.mark.parametrize("check", [pytest.param(each, id=each.__name__) for each in CHECKS if each in NEEDS_BYTES])
def test_hostile_bytes(check: Check, desk: Desk) -> None:
    async def corrupt(ref: SessionRef, raw: bytes) -> None:
        desk.ask(desk.key(ref, "s"), "SET", raw)

    bench = Bench(store=desk.store, other=desk.another(), clock=desk.clock, stopped=False, corrupt=corrupt)
    desk.run(run_check(check, bench))


@pytest.mark.parametrize(
    "stored",
    [
        [1, 1, "d", "o", b"\xff\xfe", 1, 0, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, _LONG, "a", [b"\xff", "x"], []],
        [1, 1, "d", b"\xff", "s", 1, 0, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, _LONG, "a", ["odd"], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, _LONG, "a", {"name": "text"}, []],
        [1, 1, "d", "o", "s", 1, None, _LONG, _LONG, "a", [], []],
        [1, "1", "d", "o", "s", 1, 0, _LONG, _LONG, "a", [], []],
        [2, 1, "d", "o", "s", 1, 0, _LONG, _LONG, "a", [], []],
        [1, 1.5, "d", "o", "s", 1, 0, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", -1, 0, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, -2, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0.5, _LONG, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, 0.0000001, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, 0.0000001, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, -0.5, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, 1 << 63, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, 1 << 63, _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, -(1 << 53), "a", [], []],
        [1, 1, "d", "o", "s", 1 << 53, 0, _LONG, 1, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, float("nan"), _LONG, "a", [], []],
        [1, 1, "d", "o", "s", 1, 0, _LONG, float("inf"), "a", [], []],
        [1, 1, "d", "o", "s", 1e300, 0, _LONG, _LONG, "a", [], []],
        [1, "ended"],
        [1, "ended", 7, 1, 1, "d", 1],
        [1, "ended", "logout", 1, 1e300, "d", 1, 0],
        [1, "ended", "logout", float("nan"), 1, "d", 1, 0],
        [1, "ended", "logout", 1, 1, "d", 0.5, 0],
        [1, "ended", "logout", 1, 1, "d", 1, -1],
    ],
    ids=range(28),
)
def test_a_record_of_another_shape_is_unreadable(stored: list[object], desk: Desk) -> None:
    new = desk.new()
    raw = _as_packed_by_a_script(stored)
    desk.ask(desk.key(new.ref, "s"), "SET", raw)
    assert isinstance(desk.run(desk.store.load(new.ref, "d")), Unreadable)
    page = desk.run(desk.store.scan(after=None, limit=10))
    assert page.sessions == ()
    # Nor does any verb fail over it.
    desk.run(desk.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=1)]))
    desk.run(desk.store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE))
    desk.run(desk.store.expire_idle(new.ref))
    desk.run(desk.store.revoke(new.ref, reason="logout", deny_us=HOUR_US))
    desk.run(desk.store.sweep(limit=10))


def _thorough(desk: Desk) -> RedisStore:
    """A store whose `load` never takes the short way."""
    source = all_scripts()["load"].source.replace(
        "local answers = {now}", "plain = function() end local answers = {now}"
    )
    store = desk.another()
    store._scripts = {
        **store._scripts,
        "load": Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()),
    }
    return store


def _answer(answer: Any) -> object:
    return replace(answer, now_us=0)


def test_the_short_way_of_load_answers_what_the_long_way_does(desk: Desk) -> None:
    thorough, store = _thorough(desk), desk.store
    cases: dict[str, tuple[NewSession, type]] = {"alive": (desk.created("a"), Live), "nobody": (desk.new("b"), Absent)}

    def case(name: str, kind: type, subject: str | None = None, **changes: Any) -> NewSession:
        cases[name] = desk.created(name if subject is None else subject or None, **changes), kind
        return cases[name][0]

    case("anonymous", Live, "")
    case("under a tenant", Live, owner=owner_of("tenant", "t"))
    case("a handle as digest", Live, digest="d" * 32)
    case("a strange digest", Live, digest="é")
    case("a digest that is no text", Unreadable, digest="\ud800")
    case("over by itself", Live, idle_us=0, absolute_us=0)
    desk.ask(desk.key((lost := case("index lost", Live)).ref, "u", lost.owner), "DEL")
    desk.ask(desk.key((other := case("index of another type", Live)).ref, "u", other.owner), "DEL")
    desk.ask(desk.key(other.ref, "u", other.owner), "SET", "x")
    odd = case("a last activity that no verb wrote", Live)
    desk.ask(desk.key(odd.ref, "u", odd.owner), "ZADD", "1.5", odd.ref.handle)
    desk.run(store.revoke(case("ended", Ended).ref, reason="logout"))
    desk.run(store.revoke_owner((cut := case("cut off", Ended)).ref.tag, cut.owner, reason="logout"))
    raised = case("cut off beside the index", Ended)
    at_us = _created_us(desk, raised) + 1
    desk.ask(desk.key(raised.ref, "c", raised.owner), "SET", msgspec.msgpack.encode([at_us, "logout", ""]))
    spared = case("spared by a cut", Live)
    desk.run(store.revoke_owner(spared.ref.tag, spared.owner, reason="logout", keep=spared.ref))
    for name, content in (("a cut of another type", None), ("a cut that cannot be read", "x")):
        new = case(name, Live)
        key = desk.key(new.ref, "c", new.owner)
        desk.ask(key, "LPUSH", "x") if content is None else desk.ask(key, "SET", content)
    for name, answered, alias_us in (("rotated", Aliased, HOUR_US), ("replaced", Absent, 0)):
        new = case(name, answered)
        desk.run(store.rotate_id(new.ref, old_digest=new.digest, new_digest="n" * 43, sealed=b"s", alias_us=alias_us))
    newer = case("of a newer release", Live)
    packed = desk.ask(desk.key(newer.ref, "s"), "GET")
    desk.ask(desk.key(newer.ref, "s"), "SET", b"\x9d" + packed[1:] + b"\x01")
    for name, bytes_ in {
        "octets behind": packed + b"\x01",
        "cut short": packed[:-1],
        "a member too few": b"\x9b" + packed[1:-1],
        "its last member a number": packed[:-1] + b"\x01",
        "of another schema": packed[:1] + b"\x02" + packed[2:],
        "empty": b"",
    }.items():
        desk.ask(desk.key(case(name, Unreadable, digest=newer.digest).ref, "s"), "SET", bytes_)
    for name, (new, kind) in cases.items():
        short, long = (desk.run(each.load(new.ref, new.digest)) for each in (store, thorough))
        assert isinstance(short, kind), name
        assert _answer(short) == _answer(long), name
    desk.run(thorough.close())


def test_a_key_of_another_type_is_nobody_and_stops_nobody(desk: Desk) -> None:
    first, second = desk.created(), desk.created()
    desk.ask(desk.key(first.ref, "s"), "DEL")
    desk.ask(desk.key(first.ref, "s"), "LPUSH", "not a session")
    assert isinstance(desk.load(first), Unreadable)
    gone = desk.run(desk.store.commit(first.ref, Changes(put={"b": "2"}), limits=WIDE))
    assert isinstance(gone, Gone)
    assert gone.reason == "unreadable"
    for kind, name in (("u", second.owner), ("c", second.owner), ("r", second.ref.handle)):
        key = desk.key(second.ref, kind, name)
        desk.ask(key, "DEL")
        desk.ask(key, "LPUSH", "something else")
    assert isinstance(desk.load(second), Live)
    assert isinstance(desk.run(desk.store.load(second.ref, "x")), Absent)
    committed = desk.run(desk.store.commit(second.ref, Changes(put={"b": "2"}), limits=WIDE))
    assert isinstance(committed, Committed)
    third = desk.new()
    assert isinstance(desk.run(desk.store.admit(third, maximum=5, on_limit="refuse")), Admitted)
    rotation = desk.store.rotate_id(second.ref, old_digest=second.digest, new_digest="n", sealed=b"s", alias_us=HOUR_US)
    assert isinstance(desk.run(rotation), Rotated)
    assert isinstance(desk.load(second), Aliased)
    assert desk.run(desk.store.revoke(second.ref, reason="logout")).ended
    ended = desk.run(desk.store.revoke_owner(third.ref.tag, third.owner, reason="logout"))
    assert ended.ended == (third.ref,)
    assert isinstance(desk.run(desk.store.expire_idle(first.ref)), Gone)


def test_a_lost_index_ends_nobody_early_and_prolongs_nobody(desk: Desk) -> None:
    new = desk.created()
    index = desk.key(new.ref, "u", new.owner)
    desk.ask(index, "DEL")
    assert isinstance(desk.load(new), Live)
    desk.clock.offset_us += HOUR_US // 2
    now = desk.run(desk.store.ping())
    desk.run(desk.store.touch([Activity(ref=new.ref, owner=new.owner, seen_us=now)]))
    live = desk.load(new)
    assert isinstance(live, Live)
    assert live.seen_us == now
    assert desk.ask(index, "PTTL") > 0
    desk.ask(index, "DEL")
    desk.clock.offset_us += HOUR_US // 2
    assert isinstance(desk.run(desk.store.expire_idle(new.ref)), Gone)


def test_a_cut_ends_what_the_index_has_lost(desk: Desk) -> None:
    new = desk.created()
    desk.ask(desk.key(new.ref, "u", new.owner), "DEL")
    answer = desk.run(desk.store.revoke_owner(new.ref.tag, new.owner, reason="password changed"))
    assert answer.ended == ()
    ended = desk.load(new)
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.at_us) == ("password changed", answer.now_us)
    assert isinstance(desk.run(desk.store.commit(new.ref, Changes(put={"b": "2"}), limits=WIDE)), Gone)
    assert not desk.run(desk.store.revoke(new.ref, reason="logout")).ended


def test_a_cut_changes_no_earlier_reason(desk: Desk) -> None:
    idle = desk.created()
    desk.clock.offset_us += HOUR_US
    desk.run(desk.store.revoke_owner(idle.ref.tag, idle.owner, reason="password changed"))
    gone = desk.run(desk.store.expire_idle(idle.ref))
    assert isinstance(gone, Gone)
    assert gone.reason == "idle_timeout"


def test_a_clock_that_went_back_behind_a_cut_wakes_no_idle_session(desk: Desk) -> None:
    idle = desk.created()
    desk.clock.offset_us += HOUR_US
    desk.run(desk.store.revoke_owner(idle.ref.tag, idle.owner, reason="logout"))
    desk.clock.offset_us -= 20 * SECOND_US
    assert isinstance(desk.run(desk.store.commit(idle.ref, Changes(put={"b": "2"}), limits=WIDE)), Gone)


def test_a_clock_that_went_back_wakes_nobody(desk: Desk) -> None:
    # A replica that takes over may be behind: a session created there must not look older than the cut.
    old = desk.created()
    cut = desk.run(desk.store.revoke_owner(old.ref.tag, old.owner, reason="logout"))
    desk.clock.offset_us -= 20 * SECOND_US
    new = desk.new()
    created = desk.run(desk.store.create(new))
    assert created.session.created_us > cut.now_us
    assert isinstance(desk.load(new), Live)
    assert isinstance(desk.load(old), Ended)


def test_keys_of_ids_that_are_none_are_refused_and_kept(desk: Desk) -> None:
    desk.ask(f"{desk.namespace}:keys", "SET", b"something else")
    with pytest.raises(StoreUnavailable, match="does not hold the keys"):
        desk.run(desk.store.id_keys(IdKeys(b"a" * 32, b"b" * 32)))
    assert desk.ask(f"{desk.namespace}:keys", "GET") == b"something else"


@pytest.mark.parametrize("stored", [b"", b"nan", b"inf", b"-1", b"1e300", b"\xff", b"9" * 100])
def test_a_hostile_limit_locks_nobody_out_for_ever(stored: bytes, desk: Desk) -> None:
    limit = RateLimit(attempts=2, period=60.0)
    desk.run(desk.store.hit("key", limit))
    (key,) = (each for each in desk.all_keys() if each.endswith(":l"))
    desk.ask(key, "SET", stored)
    hit = desk.run(desk.store.hit("key", limit))
    assert hit.retry_after <= 60.0
    desk.clock.offset_us += 60 * SECOND_US
    assert desk.run(desk.store.hit("key", limit)).allowed


def test_converging_needs_the_alias_of_the_immediate_predecessor(desk: Desk) -> None:
    new = desk.created()
    for old, successor in ((new.digest, "b"), ("b", "c")):
        rotation = desk.store.rotate_id(
            new.ref, old_digest=old, new_digest=successor, sealed=successor.encode(), alias_us=HOUR_US
        )
        assert isinstance(desk.run(rotation), Rotated)
    answers = [
        desk.run(desk.store.rotate_id(new.ref, old_digest=old, new_digest="z", sealed=b"z", alias_us=HOUR_US))
        for old in (new.digest, "b")
    ]
    assert isinstance(answers[0], Gone)
    assert isinstance(answers[1], Converged)
    assert answers[1].sealed == b"c"


# -- walks ---------------------------------------------------------------------------------------------------------


def test_a_scan_goes_on_from_its_cursor_in_another_process(desk: Desk) -> None:
    made = {desk.created(f"user-{n}", tag=n * 331 % 65536).ref for n in range(150)}
    desk.ask(f"{desk.namespace}:s:{{0000}}short", "SET", b"a key of somebody else")
    found: list[SessionRef] = []
    after: str | None = None
    for _ in range(1000):
        store = desk.another()
        page = desk.run(store.scan(after=after, limit=4))
        desk.run(store.close())
        assert len(page.sessions) <= 4
        found += [each.session.ref for each in page.sessions]
        after = page.cursor
        if after is None:
            break
    assert set(found) == made
    assert len(found) == len(made)


def test_a_scan_begins_a_node_again_when_another_process_answers(desk: Desk) -> None:
    # A cursor of SCAN is a place in one process's table: in another's it would skip sessions.
    made = {desk.created(f"user-{n}", tag=n).ref for n in range(40)}
    page = desk.run(desk.store.scan(after=None, limit=5))
    assert page.cursor is not None
    slot, _, rest = page.cursor.split(".", 2)
    found = {each.session.ref for each in page.sessions}
    after: str | None = f"{slot}.deadbeef.{rest}"
    while after is not None:
        page = desk.run(desk.store.scan(after=after, limit=5))
        found |= {each.session.ref for each in page.sessions}
        after = page.cursor
    assert found == made


@pytest.mark.xdist_group("cluster")
def test_a_scan_walks_every_primary(cluster_desk: Desk) -> None:
    made = {cluster_desk.created(f"user-{n}", tag=n * 997 % 65536).ref for n in range(60)}
    found: list[SessionRef] = []
    after: str | None = None
    for _ in range(1000):
        page = cluster_desk.run(cluster_desk.store.scan(after=after, limit=7))
        found += [each.session.ref for each in page.sessions]
        after = page.cursor
        if after is None:
            break
    assert sorted(each.handle for each in found) == sorted(each.handle for each in made)


@pytest.mark.parametrize(
    "cursor", ["16385..0", "0.deadbeef.18446744073709551616", "0..", "0.dead.0", "0..0.1a2bshort", "0..0" + "." * 9]
)
def test_a_scan_refuses_what_it_never_gave(cursor: str, desk: Desk) -> None:
    with pytest.raises(ValueRefused):
        desk.run(desk.store.scan(after=cursor, limit=1))


def test_a_sweep_takes_a_bite_and_goes_on(desk: Desk) -> None:
    over = [desk.created(f"user-{n}", tag=n, idle_us=HOUR_US) for n in range(25)]
    desk.clock.offset_us += HOUR_US + TOMBSTONE_US
    alive = desk.created("alive")
    bites = [desk.run(desk.store.sweep(limit=10)) for _ in range(4)]
    assert bites == [10, 10, 5, 0]
    assert isinstance(desk.load(alive), Live)
    assert isinstance(desk.load(over[0]), Absent)


# -- what a URL may say --------------------------------------------------------------------------------------------


def test_urls_of_every_shape_are_read() -> None:
    single = parse_target("rediss://user:p%40ss@redis.example:6380/3?ssl_ca_certs=/ca.pem")
    assert (single.shape, single.seeds, single.database) == ("single", (("redis.example", 6380),), 3)
    assert (single.credentials.username, single.credentials.password) == ("user", "p@ss")
    assert single.tls == {"ssl_ca_certs": "/ca.pem"}
    assert parse_target("valkey://").seeds == (("localhost", 6379),)
    assert parse_target("valkeys://h").tls == {}
    assert parse_target("redis://:secret@[::1]:7").seeds == (("::1", 7),)
    assert parse_target("redis://:secret@h").credentials.password == "secret"
    sentinel = parse_target("redis+sentinel://u:p@a:1,b,[::1]:3/sessions/2?sentinel_password=q&tls=true")
    assert (sentinel.shape, sentinel.service, sentinel.database) == ("sentinel", "sessions", 2)
    assert sentinel.seeds == (("a", 1), ("b", 26379), ("::1", 3))
    assert sentinel.sentinel_credentials.password == "q"
    assert sentinel.tls == {}
    cluster = parse_target("redis+cluster://a:1,b:2")
    assert (cluster.shape, cluster.seeds, cluster.database) == ("cluster", (("a", 1), ("b", 2)), 0)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@a,b",
        "redis://:hunter2@a:port",
        "redis://:hunter2@a:0",
        "redis://:hunter2@a:65536",
        "redis://:hunter2@a/db",
        "redis://:hunter2@a/1/2",
        "redis://:hunter2@a/-1",
        "redis://:hunter2@a?socket_timeout=9",
        "redis://:hunter2@a?tls",
        "redis://:hunter2@a?tls=maybe",
        "rediss://:hunter2@a?tls=false",
        "redis://:hunter2@a?ssl_ca_certs=x",
        "redis+sentinel://:hunter2@a",
        "redis+sentinel://:hunter2@a/service/x",
        "redis+cluster://:hunter2@a/1",
        "redis://:hunter2@[::1",
    ],
)
def test_a_url_that_says_something_else_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_target(url)
    assert "hunter2" not in f"{refused.value} {refused.value.__cause__}"
    assert "hunter2" not in repr(refused.value)


def test_a_target_never_shows_a_password() -> None:
    assert "hunter2" not in repr(parse_target("redis+sentinel://u:hunter2@a/s?sentinel_password=hunter2"))


def test_every_script_is_known_by_name(valkey_single: ValkeySingle) -> None:
    from importlib.resources import files

    folder = files("coatcheck.stores.redis").joinpath("lua")
    beginnings = {part for parts in SCRIPTS.values() for part in parts} | {name for name, *_ in ASIDE.values()}
    assert {each.name for each in folder.iterdir()} == {f"{name}.lua" for name in {*SCRIPTS, *beginnings}}
    for name, script in all_scripts().items():
        try:
            valkey_single.node.ask("SCRIPT", "LOAD", script.source)
        except ReplyError as refused:
            pytest.fail(f"{name}: {refused}")


def test_a_session_costs_what_it_did(desk: Desk) -> None:
    """Four hundred octets for a subject with three claims, three fields and one session, its index included.

    An allocator may give each of its three parts 16 more than it was asked for, where a chunk was used before.
    """
    if desk.colour == "async":
        return
    claims = '{"claims":{"role":"\\"admin\\"","name":"\\"Ada Lovelace\\"","plan":"\\"pro\\""}}'
    fields = {"cart": '["a","b"]', "locale": '"de-DE"', "theme": '"dark"'}
    new = desk.created("user-00000001", authority=claims, fields=fields, idle_us=1800 * SECOND_US)
    record = desk.ask(desk.key(new.ref, "s"), "MEMORY USAGE")
    index = desk.ask(desk.key(new.ref, "u", new.owner), "MEMORY USAGE")
    assert record + index <= 400 + 3 * 16


def _record(desk: Desk, new: NewSession) -> list[Any]:
    """A stored record by its members, the digest as text again."""
    packed = desk.ask(desk.key(new.ref, "s"), "GET")
    assert isinstance(packed, bytes)
    assert packed[3:5] == b"\xd9\x20", "a digest is 32 octets"
    members = msgspec.msgpack.decode(packed[:3] + b"\xa0" + packed[37:])
    assert isinstance(members, list)
    members[2] = _base64(packed[5:37])[:43]
    return members


def _created_us(desk: Desk, new: NewSession) -> int:
    live = desk.load(new)
    assert isinstance(live, Live)
    return live.session.created_us


def _base64(raw: bytes) -> str:
    from base64 import urlsafe_b64encode

    return urlsafe_b64encode(raw).decode()


def _as_packed_by_a_script(stored: list[object]) -> bytes:
    """Scripts pack every string as text, whatever bytes are in it."""
    packed = msgspec.msgpack.encode(stored)
    return packed.replace(b"\xc4\x02\xff\xfe", b"\xa2\xff\xfe").replace(b"\xc4\x01\xff", b"\xa1\xff")
