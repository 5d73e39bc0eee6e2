from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coatcheck.core.key_ring import KeyRing, RingKey
from coatcheck.server.doctor import (
    FAIL_OFFSET,
    LONGEST_ACCESS,
    WARN_OFFSET,
    Check,
    clock_check,
    examine,
    judge_postgresql,
    key_checks,
)
from coatcheck.server.service import build
from coatcheck.server.settings import ServerSettings
from coatcheck.settings import TokenSettings
from coatcheck.stores.redis.durability import Durability, SentinelReading, findings, reading_of
from coatcheck.testing import FakeSystem
from tests.server.command_parts import PASSWORD, answer, run
from tests.servers.valkey import ValkeyCluster, ValkeySentinel, ValkeySingle
from tests.servers.valkey_node import ValkeyNode

HTTPS: dict[str, Any] = {"public_url": "https://id.example", "trusted_proxies": ("127.0.0.1",)}
WEAK = ServerSettings(
    profile="b2c",
    store="redis://127.0.0.1:1",
    token_algorithm="HS256",
    reuse_grace=timedelta(0),
    access_lifetime=timedelta(hours=2),
)


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("COATCHECK_"):
            monkeypatch.delenv(name)
    logger = logging.getLogger("coatcheck")
    level = logger.level
    yield
    logger.setLevel(level)


async def found(settings: ServerSettings, environ: dict[str, str] | None = None) -> dict[str, Check]:
    return {check.name: check for check in await examine(settings, environ=environ or {})}


def made(*words: str) -> None:
    answer("user", "add", "minsu", "--role", "admin", "--password-stdin", *words, stdin=PASSWORD)


@pytest.mark.anyio
async def test_before_the_first_start_nothing_is_wrong_and_nothing_is_made() -> None:
    checks = await found(ServerSettings())
    assert not any(check.status == "fail" for check in checks.values())
    assert checks["database"].status == checks["store"].status == "warn"
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.anyio
async def test_whatever_is_not_fine_has_a_cure() -> None:
    plain = (ServerSettings(), ServerSettings(store="redis://127.0.0.1:1"), ServerSettings(**HTTPS))
    for settings in (*plain, WEAK, ServerSettings(replicas=1, near_copies=0)):
        for check in (await found(settings)).values():
            assert (check.status == "ok") == (check.cure == ""), check


def test_a_whole_installation_behind_https_has_nothing_to_mend() -> None:
    made()
    run("migrate")
    words = ("--public-url", "https://id.example", "--trusted-proxy", "127.0.0.1")
    checks = answer("doctor", *words)["checks"]
    assert {check["status"] for check in checks} == {"ok"}, checks
    assert run("doctor", *words).stdout.count("cure") == 0


def test_files_that_others_can_read_are_wrong_and_the_status_says_so() -> None:
    made()
    Path(".coatcheck").chmod(0o755)
    Path(".coatcheck/server.key").chmod(0o640)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["status"] == "fail"
    by_name = {check["name"]: check for check in told["checks"]}
    assert by_name["home directory"]["cure"] == "chmod 700 .coatcheck"
    assert by_name["key file"]["cure"] == "chmod 600 .coatcheck/server.key"
    plain = run("doctor")
    assert plain.exit_code == 1
    assert "fail  key file: others can use .coatcheck/server.key (mode 0640)" in plain.stdout


@pytest.mark.anyio
async def test_a_mistyped_variable_is_found() -> None:
    environ = {"COATCHECK_PUBLIC_ULR": "x", "COATCHECK_SERVER_KEY_FILE": "x", "COATCHECK_CONFIG": "x", "HOME": "x"}
    check = (await found(ServerSettings(), environ))["environment"]
    assert check.status == "warn"
    assert check.found.endswith(": COATCHECK_PUBLIC_ULR")


@pytest.mark.parametrize(
    ("name", "given", "status"),
    [
        ("public address", {}, "warn"),
        ("public address", {"insecure_http": True, "host": "192.0.2.1"}, "fail"),
        ("public address", {"insecure_http": True, "public_url": "http://id.example"}, "fail"),
        ("public address", HTTPS, "ok"),
        ("session cookie", {}, "warn"),
        ("session cookie", HTTPS, "ok"),
        ("session cookie", {"idle_timeout": timedelta(days=1)}, "fail"),
        ("trusted proxies", {}, "ok"),
        ("trusted proxies", {"public_url": "https://id.example"}, "warn"),
        ("trusted proxies", {"trusted_proxies": ("10.0.0.0/8",)}, "ok"),
        ("trusted proxies", {"trusted_proxies": ("10.0.0.0/7",)}, "warn"),
        ("trusted proxies", {"trusted_proxies": ("2001:db8::/16",)}, "ok"),
        ("trusted proxies", {"trusted_proxies": ("2001:db8::/15",)}, "warn"),
        ("metrics", {}, "ok"),
        ("metrics", {"metrics_token": "a" * 15}, "warn"),
        ("metrics", {"metrics_token": "a" * 16}, "ok"),
        ("server key", {}, "ok"),
        ("server key", {"store": "redis://127.0.0.1:1"}, "warn"),
        ("server key", {"store": "redis://127.0.0.1:1", "server_key": "ab" * 32}, "ok"),
        ("server key", {"store": "redis://127.0.0.1:1", "profile": "b2c"}, "fail"),
        ("server key", {"store": "redis://127.0.0.1:1", "profile": "b2c", "server_key": "ab" * 32}, "ok"),
        ("server key", {"profile": "b2c"}, "ok"),
        ("key file", {"server_key": "ab" * 32}, "ok"),
        ("tokens", {}, "ok"),
        ("tokens", {"profile": "b2c"}, "ok"),
        ("tokens", {"profile": "b2c", "token_algorithm": "none"}, "fail"),
        ("tokens", {"profile": "b2c", "reuse_grace": timedelta(seconds=301)}, "fail"),
        ("session cookie", {"profile": "b2c", "reuse_grace": timedelta(seconds=301)}, "warn"),
        ("token algorithm", {"profile": "b2c"}, "ok"),
        ("token algorithm", {"profile": "b2c", "token_algorithm": "HS256"}, "warn"),
        ("access token lifetime", {"profile": "b2c", "access_lifetime": LONGEST_ACCESS}, "ok"),
        (
            "access token lifetime",
            {"profile": "b2c", "access_lifetime": LONGEST_ACCESS + timedelta(seconds=1)},
            "warn",
        ),
        ("reuse grace", {"profile": "b2c"}, "ok"),
        ("reuse grace", {"profile": "b2c", "reuse_grace": timedelta(seconds=1)}, "ok"),
        ("reuse grace", {"profile": "b2c", "reuse_grace": timedelta(0)}, "warn"),
        ("store", {"store": "memory:"}, "warn"),
        ("store", {"store": "redis://127.0.0.1:1"}, "fail"),
        ("store", {"store": "mysql://127.0.0.1:1"}, "fail"),
        ("store", {"store": "sqlite:///no/where.db"}, "warn"),
        ("database", {"database": "redis://127.0.0.1:1"}, "fail"),
    ],
)
@pytest.mark.anyio
async def test_each_check_judges_its_setting(name: str, given: dict[str, Any], status: str) -> None:
    assert (await found(ServerSettings(**given)))[name].status == status


@pytest.mark.anyio
async def test_no_secret_is_told() -> None:
    settings = ServerSettings(
        server_key="ab" * 32,
        metrics_token="sesame",
        store="redis://:sesame@127.0.0.1:1",
        database="postgresql://door:sesame@127.0.0.1:1/x",
        store_deadline=ServerSettings().store_deadline / 10,
    )
    told = repr(await found(settings))
    assert "sesame" not in told
    assert "abab" not in told


def test_an_administrator_is_looked_for() -> None:
    run("migrate")
    by_name = {check["name"]: check for check in answer("doctor")["checks"]}
    assert by_name["administrator"]["status"] == "warn"
    assert "set-up link" in by_name["administrator"]["cure"]
    made()
    by_name = {check["name"]: check for check in answer("doctor")["checks"]}
    assert by_name["administrator"]["status"] == "ok"
    run("user", "disable", "minsu")
    by_name = {check["name"]: check for check in answer("doctor")["checks"]}
    assert by_name["administrator"]["status"] == "warn"
    assert "user enable" in by_name["administrator"]["cure"]


def test_a_file_that_is_no_database_is_wrong_in_both_places() -> None:
    Path(".coatcheck").mkdir(mode=0o700)
    Path(".coatcheck/coatcheck.db").write_text("a letter, and no database at all\n" * 20)
    by_name = {check["name"]: check for check in answer("doctor", status=1)["checks"]}
    assert by_name["database"]["status"] == by_name["store"]["status"] == "fail"


@pytest.mark.parametrize(
    ("component", "name", "missing"), [("store", "store", "0001_sessions"), ("server", "database", "0001_accounts")]
)
def test_a_file_of_an_older_release_is_told_and_not_changed(component: str, name: str, missing: str) -> None:
    run("migrate")
    with sqlite3.connect(".coatcheck/coatcheck.db") as connection:
        connection.execute("delete from coatcheck_migrations where component = ?", (component,))
    connection.close()
    for _ in range(2):
        by_name = {check["name"]: check for check in answer("doctor")["checks"]}
        assert by_name[name]["status"] == "warn"
        assert missing in by_name[name]["found"]


# -- the key ring --------------------------------------------------------------------------------------------------

TOKENS = TokenSettings()
PERIOD, AHEAD = int(TOKENS.key_period.total_seconds()), int(TOKENS.publish_ahead.total_seconds())


def ring(*signs_at: int) -> KeyRing:
    keys = (RingKey(kid=f"k{at}", algorithm="ES256", sealed=b"", published_at=0, signs_at=at) for at in signs_at)
    return KeyRing(keys=tuple(keys), longest=900)


@pytest.mark.parametrize(
    ("signs_at", "now", "name", "status"),
    [
        ((1000,), 1000, "signing key", "ok"),
        ((1000,), 1000 + PERIOD, "signing key", "ok"),
        ((1000,), 1000 + PERIOD + 0.000001, "signing key", "warn"),
        ((1000,), 999, "signing key", "warn"),
        ((1000, 2000 + AHEAD), 2000, "waiting key", "ok"),
        ((1000, 2001 + AHEAD), 2000, "waiting key", "warn"),
    ],
)
def test_a_key_that_signs_or_waits_too_long_is_told(
    signs_at: tuple[int, ...], now: float, name: str, status: str
) -> None:
    by_name = {check.name: check for check in key_checks(ring(*signs_at), ServerSettings(profile="b2c"), now=now)}
    assert by_name[name].status == status
    assert (status == "ok") == (by_name[name].cure == "")


def test_a_ring_is_readable_with_the_servers_key_alone() -> None:
    made()
    run("migrate")
    words = ("doctor", "--profile", "b2c")
    assert by_name(answer(*words))["key ring"]["status"] == "ok"
    assert answer("key", "list")["keys"] == []
    run("key", "rotate")
    checks = by_name(answer(*words))
    assert (checks["key ring"]["status"], checks["signing key"]["status"]) == ("ok", "ok")
    run("key", "rotate")
    assert by_name(answer(*words))["waiting key"]["status"] == "ok"
    assert "key ring" not in by_name(answer("doctor"))

    before = [each["kid"] for each in answer("key", "list")["keys"]]
    key = Path(".coatcheck/server.key")
    kept = key.read_bytes()
    for wrong in (bytes(32), b"short", None):
        key.unlink()
        if wrong is not None:
            key.write_bytes(wrong)
            key.chmod(0o600)
        check = by_name(answer(*words, status=1))["key ring"]
        assert (check["status"], "server" in check["cure"]) == ("fail", True)
        # A doctor changes nothing: it makes no key where one is missing.
        assert key.exists() == (wrong is not None)
        key.write_bytes(kept)
        key.chmod(0o600)
    assert [each["kid"] for each in answer("key", "list")["keys"]] == before


def test_a_ring_that_is_damaged_is_wrong_and_does_not_hide_the_store() -> None:
    made()
    run("key", "rotate")
    with sqlite3.connect(".coatcheck/coatcheck.db") as connection:
        connection.execute("update coatcheck_ring set packed = x'7b7d'")
    connection.close()
    checks = by_name(answer("doctor", "--profile", "b2c", status=1))
    assert (checks["store"]["status"], checks["key ring"]["status"]) == ("ok", "fail")


def by_name(told: Any) -> dict[str, Any]:
    return {check["name"]: check for check in told["checks"]}


# -- the store's clock ---------------------------------------------------------------------------------------------


class Ticking(FakeSystem):
    """A machine whose clock stands at `readings`, one after the other."""

    def __init__(self, *readings: float) -> None:
        super().__init__()
        self._readings = [round(each * 1_000_000) for each in readings]

    def now_us(self) -> int:
        return self._readings.pop(0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("offset", "status"),
    [
        (0.0, "ok"),
        (WARN_OFFSET, "ok"),
        (WARN_OFFSET + 0.000001, "warn"),
        (FAIL_OFFSET, "warn"),
        (FAIL_OFFSET + 0.000001, "fail"),
    ],
)
@pytest.mark.anyio
async def test_the_stores_clock_is_judged_exactly_at_the_limits(offset: float, status: str, sign: int) -> None:
    async def ping() -> int:
        return round((1000 + sign * offset) * 1_000_000)

    assert (await clock_check(ping, Ticking(1000, 1000))).status == status


@pytest.mark.anyio
async def test_a_slow_answer_is_no_wrong_clock() -> None:
    async def ping() -> int:
        return 1_001_000_000

    assert (await clock_check(ping, Ticking(1000, 1040))).found == "0.0 s from this machine's"


@pytest.mark.servers
def test_a_real_valkey_is_reachable_and_its_clock_is_compared(valkey_single: ValkeySingle, namespace: str) -> None:
    made()
    by_name = {
        check["name"]: check
        for check in answer("doctor", "--store", valkey_single.url, "--namespace", namespace)["checks"]
    }
    assert by_name["store"]["status"] == by_name["store clock"]["status"] == "ok"
    assert by_name["server key"]["status"] == "warn"


@pytest.mark.servers
def test_a_shared_ring_needs_the_servers_key(
    valkey_single: ValkeySingle, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made()
    flags = ("--store", valkey_single.url, "--namespace", namespace)
    words = ("doctor", "--profile", "b2c", *flags)
    monkeypatch.setenv("COATCHECK_SERVER_KEY", "ab" * 32)
    answer("key", "rotate", *flags)
    checks = by_name(answer(*words))
    assert {checks[name]["status"] for name in ("key ring", "signing key", "server key")} == {"ok"}
    monkeypatch.setenv("COATCHECK_SERVER_KEY", "cd" * 32)
    assert "another server key" in by_name(answer(*words, status=1))["key ring"]["found"]
    monkeypatch.delenv("COATCHECK_SERVER_KEY")
    checks = by_name(answer(*words, status=1))
    assert {checks[name]["status"] for name in ("key ring", "server key")} == {"fail"}
    assert "coatcheck key new" in checks["server key"]["cure"]


@pytest.mark.servers
def test_a_postgresql_without_tables_is_wrong_until_it_is_migrated(postgres_database: str, namespace: str) -> None:
    flags = ("--database", postgres_database, "--namespace", namespace)
    by_name = {check["name"]: check for check in answer("doctor", *flags, status=1)["checks"]}
    for name in ("database", "store"):
        assert (by_name[name]["status"], by_name[name]["cure"]) == ("fail", "coatcheck migrate")
    run("migrate", *flags)
    by_name = {check["name"]: check for check in answer("doctor", *flags, status=1)["checks"]}
    assert {by_name[name]["status"] for name in ("database", "store", "store clock")} == {"ok"}
    # The server of the tests is quick and forgets, which is what a doctor is for.
    assert (by_name["durability"]["status"], by_name["durability"]["cure"]) == ("fail", "fsync = on")


# -- what a revoke is worth ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "a revoke holds everywhere within 1 s"),
        ({"near_copies": 0}, "a revoke holds everywhere at once"),
        ({"lease": timedelta(milliseconds=2500)}, "a revoke holds everywhere within 2.5 s"),
        ({"outage": "near"}, "a revoke holds everywhere within 1 s, on a node without its store within 61 s"),
        (
            {"outage": "near", "outage_grace": timedelta(0)},
            "a revoke holds everywhere within 1 s, on a node without its store within 1 s",
        ),
        (
            {"profile": "b2c", "outage": "refuse"},
            "a revoke holds everywhere within 1 s; for an access token at a verifier within 6 s",
        ),
    ],
)
@pytest.mark.anyio
async def test_the_reach_of_a_revoke_is_told_whatever_the_store(given: dict[str, Any], words: str) -> None:
    for store in (None, "memory:", "redis://127.0.0.1:1"):
        told = (await found(ServerSettings(**given, store=store)))["reach"]
        assert told == Check(name="reach", status="ok", found=words)


def test_the_journal_is_looked_for_where_it_will_be() -> None:
    def told() -> tuple[str, str]:
        check = by_name(answer("doctor"))["journal"]
        return check["status"], check["found"]

    waiting = "sign-outs wait in .coatcheck/journal while the store is away"
    assert told() == ("ok", f"{waiting}, made when it is first needed")
    Path(".coatcheck/journal").mkdir(mode=0o700, parents=True)
    Path(".coatcheck").chmod(0o700)
    assert told() == ("ok", waiting)
    Path(".coatcheck/journal").rmdir()
    Path(".coatcheck/journal").write_text("a letter")
    refused = ".coatcheck/journal cannot be written: a sign-out while the store is away is refused"
    assert told() == ("warn", refused)


def test_a_file_keeps_what_it_answered_and_asks_no_replicas() -> None:
    run("migrate")
    checks = by_name(answer("doctor"))
    assert checks["durability"]["status"] == "ok"
    assert "replicas" not in checks
    assert by_name(answer("doctor", "--replicas", "1"))["replicas"]["status"] == "warn"


@pytest.mark.parametrize(
    ("told", "standbys", "status", "words"),
    [
        (("on", "on", "on", ""), 0, "ok", "is on the disk before it is answered"),
        (("on", "on", "on", "ANY 1 (a, b)"), 2, "ok", "ANY 1 (a, b)"),
        (("on", "on", "remote_apply", "a"), 1, "ok", "a"),
        (("on", "on", "local", "a"), 1, "warn", "not waited for"),
        (("on", "on", "on", ""), 1, "warn", "not waited for"),
        (("on", "on", "off", "a"), 1, "warn", "synchronous_commit is off"),
        (("on", "off", "off", ""), 0, "warn", "full_page_writes is off"),
        (("off", "off", "off", ""), 0, "fail", "fsync is off"),
    ],
)
def test_each_setting_of_postgresql_is_judged(
    told: tuple[str, str, str, str], standbys: int, status: str, words: str
) -> None:
    check = judge_postgresql(*told, standbys=standbys)
    assert (check.status, words in check.found) == (status, True), check
    assert (check.status == "ok") == (check.cure == "")


@pytest.mark.servers
def test_a_valkey_that_may_forget_is_wrong_and_one_that_may_not_is_not(
    valkey_single: ValkeySingle, namespace: str
) -> None:
    made()
    words = ("doctor", "--store", valkey_single.url, "--namespace", namespace)
    names = ("append-only file", "eviction", "replicas", "reach", "output buffers", "store version")
    node = valkey_single.node
    try:
        node.ask("CONFIG", "SET", "appendfsync", "everysec")
        checks = by_name(answer(*words))
        assert {checks[name]["status"] for name in names} == {"ok"}, checks
        node.ask("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        node.ask("CONFIG", "SET", "maxmemory", "1gb")
        node.ask("CONFIG", "SET", "appendonly", "no")
        checks = by_name(answer(*words, "--replicas", "1", status=1))
        assert {checks[name]["status"] for name in names[:3]} == {"fail"}
        assert "every end of a session is refused" in checks["replicas"]["found"]
        assert "fail  append-only file: off: a server that is restarted forgets" in run(*words).stdout
    finally:
        for name, value in (
            ("appendfsync", "no"),
            ("maxmemory-policy", "noeviction"),
            ("maxmemory", "0"),
            ("appendonly", "yes"),
        ):
            node.ask("CONFIG", "SET", name, value)


@pytest.mark.servers
@pytest.mark.xdist_group("cluster")
def test_under_sentinel_and_on_a_cluster_a_split_brain_is_told(
    valkey_sentinel: ValkeySentinel, valkey_cluster: ValkeyCluster, namespace: str
) -> None:
    made()
    checks = by_name(answer("doctor", "--namespace", namespace, "--store", valkey_sentinel.url, "--replicas", "1"))
    assert checks["replicas"]["status"] == "ok"
    assert (checks["reach"]["status"], "unbounded in a split brain" in checks["reach"]["found"]) == ("warn", True)
    checks = by_name(answer("doctor", "--namespace", namespace, "--store", valkey_cluster.url))
    assert checks["reach"]["found"].endswith("in a split brain 3 s (cluster-node-timeout is 2 s)")


def test_the_server_hands_the_replicas_to_its_store() -> None:
    service = build(ServerSettings(store="redis://127.0.0.1:1", replicas=2, server_key="ab" * 32))
    assert service.store._options.replicas == 2  # type: ignore[attr-defined]


# -- the page about it ---------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parents[2] / "docs/how-to/redis-durability.md").read_text("utf-8")


def blocks(language: str) -> list[list[str]]:
    """Every block of the page in this language, as lines."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in found]


@pytest.mark.servers
def test_the_settings_of_the_page_leave_a_server_with_nothing_to_mend() -> None:
    settings = dict(line.split(" ", 1) for line in blocks("conf")[0])
    ((look,), (serve,)) = blocks("sh")
    made()
    node = ValkeyNode(settings=settings)
    try:
        node.start()
        here = f"redis://127.0.0.1:{node.port}"
        checks = by_name(answer(*look.replace("redis://127.0.0.1:6379", here).split()[1:]))
    finally:
        node.close()
    for name in ("append-only file", "eviction", "replicas", "reach", "output buffers", "store version"):
        assert checks[name]["status"] == "ok", checks[name]
    assert "64mb" not in checks["output buffers"]["found"], "the server counts in octets"
    flags = serve.split()[2:]
    assert answer("config", "show", *flags)["settings"]["replicas"]["value"] in (1, "1")


def test_the_settings_of_the_page_bound_a_split_brain_exactly() -> None:
    _, servers, sentinels = blocks("conf")
    told = dict(line.split(" ") for line in servers)
    down_after = int(sentinels[0].rpartition(" ")[2])
    reading = reading_of("a:1", {"slave0": "state=online"}, told)

    def reach(milliseconds: int) -> str:
        sentinel = SentinelReading(name="s:1", down_after=milliseconds / 1000, promotable=1)
        group = Durability(shape="sentinel", servers=(reading,), sentinels=(sentinel,))
        return {each.name: each for each in findings(group, replicas=1, lease=1, reach=1, usual="")}["reach"].status

    assert (reach(down_after), reach(down_after - 1)) == ("ok", "warn")
