"""The servers themselves: each starts, can be hurt in the ways tests need, and leaves nothing behind."""

from __future__ import annotations

import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from playwright.sync_api import Browser, BrowserContext, Page

from tests.servers.nginx import Nginx
from tests.servers.ports import CLUSTER_BUS_OFFSET, free_port, reserve_port
from tests.servers.postgres import Postgres
from tests.servers.processes import Child, ServerFailed, until
from tests.servers.relay import Relay
from tests.servers.resp import RespConnection
from tests.servers.valkey import SLOTS, ValkeyCluster, ValkeySentinel, ValkeySingle

pytestmark = pytest.mark.servers

ROOT = Path(__file__).parents[2]


class TestPorts:
    def test_two_reservations_never_share_a_port(self) -> None:
        reservations = [reserve_port() for _ in range(50)]
        assert len({reservation.port for reservation in reservations}) == 50
        for reservation in reservations:
            reservation.release()

    def test_the_cluster_bus_port_exists(self) -> None:
        assert free_port() + CLUSTER_BUS_OFFSET < 65_536


class TestProcesses:
    def test_a_server_that_dies_at_once_fails_with_its_log(self, tmp_path: Path) -> None:
        child = Child([sys.executable, "-c", "print('no such setting'); raise SystemExit(3)"], log=tmp_path / "log")
        with pytest.raises(ServerFailed, match=r"status 3\nno such setting"):
            child.await_ready(lambda: False)

    def test_a_server_that_never_gets_ready_is_ended(self, tmp_path: Path) -> None:
        child = Child([sys.executable, "-c", "import signal; signal.pause()"], log=tmp_path / "log")
        with pytest.raises(ServerFailed, match="ready: not within"):
            child.await_ready(lambda: False, within=0.05)
        assert not child.running

    @pytest.mark.parametrize("ending", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit"])
    def test_no_way_for_the_program_to_end_leaves_a_server_or_its_directory(self, ending: str) -> None:
        program = f"""
import os, signal
from tests.servers.valkey import ValkeySingle
server = ValkeySingle()
server.start()
server.freeze()
print(server.node.child.pid, server.node.directory.path, flush=True)
{ending}
"""
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
        pid, directory = ended.stdout.split()
        until(lambda: not _exists(int(pid)), within=10.0, what="server gone")
        until(lambda: not Path(directory).exists(), within=10.0, what="directory gone")


class TestValkeySingle:
    def test_its_version_is_known_and_it_answers(self, every_valkey: ValkeySingle) -> None:
        assert every_valkey.version.startswith(("Valkey ", "Redis "))
        assert every_valkey.url == f"redis://127.0.0.1:{every_valkey.node.port}/0"
        assert every_valkey.node.ask("PING") == b"PONG"

    def test_restart_keeps_the_data(self, valkey_single: ValkeySingle, namespace: str) -> None:
        valkey_single.node.ask("SET", namespace, "kept")
        pids = valkey_single.pids
        valkey_single.restart()
        assert valkey_single.node.ask("GET", namespace) == b"kept"
        assert not set(pids) & set(valkey_single.pids)

    def test_kill_loses_no_acknowledged_write(self, valkey_single: ValkeySingle, namespace: str) -> None:
        with RespConnection(valkey_single.node.port) as connection:
            for number in range(200):
                connection.command("RPUSH", namespace, number)
            valkey_single.kill()
        with pytest.raises(ConnectionRefusedError):
            valkey_single.node.ask("PING")
        valkey_single.ensure_running()
        assert valkey_single.node.ask("LLEN", namespace) == 200

    def test_frozen_it_accepts_and_does_not_answer(self, valkey_single: ValkeySingle) -> None:
        valkey_single.freeze()
        with RespConnection(valkey_single.node.port, timeout=0.05) as connection, pytest.raises(TimeoutError):
            connection.command("PING")
        valkey_single.thaw()
        assert valkey_single.node.ask("PING") == b"PONG"

    def test_record_shows_a_script_as_one_command(self, valkey_single: ValkeySingle, namespace: str) -> None:
        with valkey_single.record() as commands:
            valkey_single.node.ask("SET", namespace, 'a "quoted" word')
            valkey_single.node.ask("EVAL", "redis.call('GET', KEYS[1]) return redis.call('DEL', KEYS[1])", 1, namespace)
            valkey_single.node.ask("PING")
        assert [command.name for command in commands] == ["SET", "EVAL"]
        assert commands[0].arguments[0] == namespace

    def test_command_count_includes_what_a_script_does(self, valkey_single: ValkeySingle, namespace: str) -> None:
        before = valkey_single.command_count()
        valkey_single.node.ask("EVAL", "return redis.call('GET', KEYS[1])", 1, namespace)
        valkey_single.node.ask("PING")
        assert valkey_single.command_count() - before == 2
        assert valkey_single.command_count(ignore=()) > valkey_single.command_count()

    def test_flush_leaves_nothing(self) -> None:
        with ValkeySingle() as server:
            server.node.ask("SET", "key", "value")
            server.flush()
            assert server.node.ask("DBSIZE") == 0


@pytest.mark.xdist_group("cluster")
class TestValkeyCluster:
    def test_three_primaries_serve_all_slots(self, valkey_cluster: ValkeyCluster) -> None:
        fields = valkey_cluster.nodes[0].ask_fields("CLUSTER", "INFO")
        assert fields["cluster_state"] == "ok"
        assert fields["cluster_size"] == "3"
        assert fields["cluster_slots_ok"] == str(SLOTS)
        assert len(valkey_cluster.pids) == 3
        ports = ",".join(f"127.0.0.1:{node.port}" for node in valkey_cluster.nodes)
        assert valkey_cluster.url == f"redis+cluster://{ports}"

    def test_node_of_is_the_node_that_takes_the_key(self, valkey_cluster: ValkeyCluster, namespace: str) -> None:
        owners = set()
        before = valkey_cluster.command_count()
        for number in range(30):
            key = f"{namespace}:{number}"
            # A wrong node would answer MOVED, which is an error.
            assert valkey_cluster.node_of(key).ask("SET", key, number) == b"OK"
            owners.add(valkey_cluster.node_of(key).port)
        assert len(owners) == 3
        assert valkey_cluster.command_count() - before == 30

    def test_a_killed_node_comes_back_with_its_data(self, valkey_cluster: ValkeyCluster, namespace: str) -> None:
        node = valkey_cluster.node_of(namespace)
        node.ask("SET", namespace, "kept")
        node.kill()
        assert len(valkey_cluster.pids) == 2
        valkey_cluster.ensure_running()
        assert node.ask("GET", namespace) == b"kept"

    def test_record_sees_every_node_and_flush_empties_them(self, valkey_cluster: ValkeyCluster, namespace: str) -> None:
        with valkey_cluster.record() as commands:
            for number in range(10):
                valkey_cluster.node_of(f"{namespace}:{number}").ask("SET", f"{namespace}:{number}", "")
        assert len(commands) == 10
        valkey_cluster.flush()
        assert [node.ask("DBSIZE") for node in valkey_cluster.nodes] == [0, 0, 0]


@pytest.mark.xdist_group("cluster")
class TestValkeySentinel:
    def test_the_sentinels_name_the_primary(self, valkey_sentinel: ValkeySentinel) -> None:
        ports = ",".join(f"127.0.0.1:{node.port}" for node in valkey_sentinel.sentinels)
        assert valkey_sentinel.url == f"redis+sentinel://{ports}/sessions/0"
        assert valkey_sentinel.primary is not valkey_sentinel.replica
        assert len(valkey_sentinel.pids) == 5

    def test_failover_swaps_within_ten_seconds_and_keeps_the_data(
        self, valkey_sentinel: ValkeySentinel, namespace: str
    ) -> None:
        primary, replica = valkey_sentinel.primary, valkey_sentinel.replica
        primary.ask("SET", namespace, "kept")
        began = time.monotonic()
        valkey_sentinel.failover()
        assert time.monotonic() - began < 10.0
        assert (valkey_sentinel.primary, valkey_sentinel.replica) == (replica, primary)
        assert replica.ask("GET", namespace) == b"kept"
        valkey_sentinel.failover()
        assert valkey_sentinel.primary is primary

    def test_the_replica_takes_over_from_a_killed_primary(self, valkey_sentinel: ValkeySentinel) -> None:
        primary, replica = valkey_sentinel.primary, valkey_sentinel.replica
        primary.kill()
        valkey_sentinel.await_promotion(replica)
        valkey_sentinel.ensure_running()
        assert (valkey_sentinel.primary, valkey_sentinel.replica) == (replica, primary)

    def test_restart_leaves_the_roles_as_they_were(self, valkey_sentinel: ValkeySentinel, namespace: str) -> None:
        primary = valkey_sentinel.primary
        primary.ask("SET", namespace, "kept")
        valkey_sentinel.restart()
        assert valkey_sentinel.primary.ask("GET", namespace) == b"kept"


class TestPostgres:
    def test_it_answers_on_tcp_and_on_its_socket(self, postgres: Postgres) -> None:
        with psycopg.connect(postgres.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        socket_address = f"host={postgres.socket_directory} port={postgres.port} user=postgres"
        with psycopg.connect(socket_address, dbname="postgres") as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)

    def test_it_never_runs_as_root(self, postgres: Postgres) -> None:
        assert all(os.stat(f"/proc/{pid}").st_uid != 0 for pid in postgres.pids)

    def test_each_database_is_empty_and_gone_afterwards(self, postgres: Postgres) -> None:
        with postgres.database() as first, postgres.database() as second:
            assert first != second
            with psycopg.connect(first) as connection:
                connection.execute("CREATE TABLE only_here (id int)")
            with psycopg.connect(second) as connection:
                assert connection.execute("SELECT to_regclass('only_here')").fetchone() == (None,)
        with pytest.raises(psycopg.OperationalError, match="does not exist"):
            psycopg.connect(first)

    @pytest.mark.parametrize("hurt", [Postgres.restart, Postgres.kill])
    def test_committed_data_survives(
        self, postgres: Postgres, postgres_database: str, hurt: Callable[[Postgres], None]
    ) -> None:
        with psycopg.connect(postgres_database) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS id")
        hurt(postgres)
        postgres.ensure_running()
        with psycopg.connect(postgres_database) as connection:
            assert connection.execute("SELECT id FROM kept").fetchone() == (7,)

    def test_frozen_it_accepts_and_does_not_answer(self, postgres: Postgres, postgres_database: str) -> None:
        with psycopg.connect(postgres_database, autocommit=True) as connection:
            postgres.freeze()
            connection.pgconn.send_query(b"SELECT 1")
            assert select.select([connection.pgconn.socket], [], [], 0.05) == ([], [], [])
            postgres.thaw()
            results = iter(connection.pgconn.get_result, None)
            assert [result.get_value(0, 0) for result in results if result is not None] == [b"1"]

    def test_statements_are_counted_exactly_for_each_database(self, postgres: Postgres) -> None:
        with postgres.database() as ours, postgres.database() as others:
            name = ours.rpartition("/")[2]
            with psycopg.connect(ours, autocommit=True) as here, psycopg.connect(others) as there:
                before = postgres.statement_count(name)
                with postgres.record(name) as statements:
                    here.execute("SELECT 1,\n  2")
                    here.execute("SELECT %s::int", [3])
                    there.execute("SELECT 4")
                    with here.transaction():
                        here.execute("SELECT 5")
                expected = ["SELECT 1,\n  2", "SELECT $1::int", "BEGIN", "SELECT 5", "COMMIT"]
                assert statements == expected
                assert postgres.statement_count(name) - before == 5


class TestNginx:
    def test_it_proxies_large_bodies_and_reloads(self, nginx_with: Callable[..., Nginx]) -> None:
        inner, outer = free_port(), free_port()
        echo = f"server {{ listen 127.0.0.1:{inner}; location / {{ return 200 $http_content_length; }} }}"
        proxy = f"""
            server {{
                listen 127.0.0.1:{outer};
                location / {{ proxy_pass http://127.0.0.1:{inner}; }}
            }}"""
        server = nginx_with(echo + proxy, ports=[inner, outer])
        # Larger than memory buffers: the worker must be able to write its temporary files.
        assert _request(outer, "POST", body=b"x" * 500_000) == (200, b"500000")
        server.reload(f"server {{ listen 127.0.0.1:{outer}; return 204; }}")
        assert _request(outer, "GET") == (204, b"")

    def test_a_faulty_configuration_is_refused_and_the_old_one_kept(self, nginx_with: Callable[..., Nginx]) -> None:
        port = free_port()
        server = nginx_with(f"server {{ listen 127.0.0.1:{port}; return 204; }}", ports=[port])
        with pytest.raises(ServerFailed, match="nonsense"):
            server.reload("nonsense on;")
        assert _request(port, "GET") == (204, b"")
        with pytest.raises(ServerFailed, match="nonsense"):
            nginx_with("nonsense on;", ports=[port])


class TestRelay:
    def test_it_carries_both_ways(self, relay: Callable[[int], Relay], valkey_single: ValkeySingle) -> None:
        through = relay(valkey_single.node.port)
        value = os.urandom(300_000)
        with RespConnection(through.port) as connection:
            assert connection.command("ECHO", value) == value
            assert (through.accepted, through.open_connections) == (1, 1)
        until(lambda: through.open_connections == 0, within=5.0, what="close carried over")
        assert through.address_in("redis://user:pw@127.0.0.1:1/0?a=b") == (
            f"redis://user:pw@127.0.0.1:{through.port}/0?a=b"
        )

    def test_cut_resets_the_open_and_carries_the_new(
        self, relay: Callable[[int], Relay], valkey_single: ValkeySingle
    ) -> None:
        through = relay(valkey_single.node.port)
        with RespConnection(through.port) as connection:
            connection.command("PING")
            through.cut()
            with pytest.raises(ConnectionError):
                connection.read()
        with RespConnection(through.port) as connection:
            assert connection.command("PING") == b"PONG"

    def test_swallow_is_a_black_hole(self, relay: Callable[[int], Relay], valkey_single: ValkeySingle) -> None:
        through = relay(valkey_single.node.port)
        with socket.create_connection(("127.0.0.1", through.port), timeout=5.0) as old:
            old.sendall(b"PING\r\n")
            assert old.recv(100) == b"+PONG\r\n"
            through.swallow()
            with socket.create_connection(("127.0.0.1", through.port), timeout=5.0) as new:
                for client in (old, new):
                    client.sendall(b"PING\r\n")
                assert select.select([old, new], [], [], 0.05) == ([], [], [])
                until(lambda: through.swallowed == 12, within=5.0, what="both requests swallowed")
                through.forward()
                # What a connection has lost cannot come back: its client has to begin again.
                for client in (old, new):
                    with pytest.raises(ConnectionResetError):
                        client.recv(100)

    def test_hold_delivers_late_and_complete(
        self, relay: Callable[[int], Relay], valkey_single: ValkeySingle, namespace: str
    ) -> None:
        through = relay(valkey_single.node.port)
        through.hold()
        client = socket.create_connection(("127.0.0.1", through.port), timeout=5.0)
        with client:
            through.await_accepted(1)
            client.sendall(b"INCR %s\r\n" % namespace.encode())
            assert valkey_single.node.ask("EXISTS", namespace) == 0
            through.forward()
            assert client.recv(100) == b":1\r\n"

    def test_swallowed_answers_mean_executed_requests(
        self, relay: Callable[[int], Relay], valkey_single: ValkeySingle, namespace: str
    ) -> None:
        through = relay(valkey_single.node.port)
        with RespConnection(through.port, timeout=0.2) as connection:
            connection.command("PING")
            through.swallow_answers()
            with pytest.raises(TimeoutError):
                connection.command("INCR", namespace)
            assert valkey_single.node.ask("GET", namespace) == b"1"

    def test_refuse_is_a_dead_process(self, relay: Callable[[int], Relay], valkey_single: ValkeySingle) -> None:
        through = relay(valkey_single.node.port)
        with RespConnection(through.port) as connection:
            connection.command("PING")
            through.refuse()
            with pytest.raises(ConnectionError):
                connection.read()
        with pytest.raises(ConnectionRefusedError):
            RespConnection(through.port)
        through.forward()
        with RespConnection(through.port) as connection:
            assert connection.command("PING") == b"PONG"

    @pytest.mark.parametrize("allowed", [0, 1, 6])
    def test_reset_after_lets_exactly_so_many_bytes_through(
        self, relay: Callable[[int], Relay], valkey_single: ValkeySingle, allowed: int
    ) -> None:
        through = relay(valkey_single.node.port)
        through.reset_after(allowed)
        with socket.create_connection(("127.0.0.1", through.port), timeout=5.0) as client:
            client.sendall(b"PING\r\n")
            received = b""
            with pytest.raises(ConnectionResetError):  # noqa: PT012  the bytes before the reset are the point
                while piece := client.recv(100):
                    received += piece
        assert received == b"+PONG\r\n"[:allowed]
        with RespConnection(through.port) as connection:
            assert connection.command("PING") == b"PONG"

    def test_an_answer_at_the_limit_is_not_reset(
        self, relay: Callable[[int], Relay], valkey_single: ValkeySingle
    ) -> None:
        through = relay(valkey_single.node.port)
        with RespConnection(through.port) as connection:
            through.reset_after(len(b"+PONG\r\n"))
            assert connection.command("PING") == b"PONG"
            with pytest.raises(ConnectionError):
                connection.command("PING")

    def test_a_dead_target_resets_the_client(self, relay: Callable[[int], Relay]) -> None:
        through = relay(free_port())
        # The reset may meet the client while it is still connecting.
        with (
            pytest.raises(ConnectionResetError),
            socket.create_connection(("127.0.0.1", through.port), timeout=5.0) as client,
        ):
            client.recv(1)


@pytest.mark.browser
class TestChromium:
    def test_it_renders_a_page_and_keeps_profiles_apart(
        self, new_context: Callable[..., BrowserContext], nginx_with: Callable[..., Nginx]
    ) -> None:
        port = free_port()
        answer = """add_header Content-Type "text/html; charset=utf-8";
            add_header Set-Cookie "seen=1; Secure; HttpOnly";
            return 200 "<title>t</title><h1>로그인 $http_cookie</h1>";"""
        nginx_with(f"server {{ listen 127.0.0.1:{port}; default_type text/html; {answer} }}", ports=[port])
        first, second = new_context(locale="ko-KR").new_page(), new_context().new_page()
        for _ in range(2):
            first.goto(f"http://shop.localhost:{port}/")
        second.goto(f"http://shop.localhost:{port}/")
        assert first.locator("h1").inner_text() == "로그인 seen=1"
        assert second.locator("h1").inner_text().strip() == "로그인"

    def test_nothing_but_loopback_exists_for_it(self, page: Page) -> None:
        from playwright.sync_api import Error

        with pytest.raises(Error, match="ERR_NAME_NOT_RESOLVED"):
            page.goto("http://example.com/")

    def test_its_version_is_known(self, browser: Browser) -> None:
        assert int(browser.version.split(".")[0]) > 100


def _request(port: int, method: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10.0)
    try:
        connection.request(method, "/", body=body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIG_DFL)
    except ProcessLookupError:
        return False
    # A zombie has ended; whether anybody collects it is not ours to say.
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"
