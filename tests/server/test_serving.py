# ruff: noqa: S104 - 0.0.0.0 is here to be refused

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coatcheck.errors import ConfigurationError
from coatcheck.server.bounded_http import MAX_HEAD_OCTETS
from coatcheck.server.serving import check_start, listen, write_private
from coatcheck.server.settings import ServerSettings
from tests.server.command_parts import COMMAND, PASSWORD, Server, call, clean_environment, process, serving
from tests.servers.processes import until

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(directory=tmp_path) as started:
        yield started


def port_of(server: Server) -> int:
    return int(server.address.rpartition(":")[2])


def raw(server: Server, data: bytes, *, more: Callable[[], bytes] | None = None) -> bytes:
    """Send octets as they are, and `more` of them until the server has had enough; its whole answer."""
    with socket.create_connection(("127.0.0.1", port_of(server)), timeout=30) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            while more is not None:
                connection.sendall(more())
        answer = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                answer += piece
    return answer


# -- starting ------------------------------------------------------------------------------------------------------


def test_a_server_says_where_it_is_and_hides_the_set_up_link_in_a_private_file(server: Server, tmp_path: Path) -> None:
    home = tmp_path / ".coatcheck"
    link_file = home / "setup-link"
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", server.address)
    assert f"State is kept in: {home}" in server.lines
    assert [line for line in server.lines if str(link_file) in line]
    assert stat.S_IMODE(link_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    link = link_file.read_text().strip()
    assert re.fullmatch(rf"{server.address}/setup/[A-Za-z0-9_-]{{44}}", link)
    # Whoever reads the log must not be able to become the administrator.
    assert link.rpartition("/")[2] not in server.child.log.read_text()
    assert call(server.address, link.removeprefix(server.address))[0] == 200
    assert len([line for line in server.lines if line.startswith("warning: ")]) == 1


def test_a_server_tells_nothing_about_itself_and_believes_no_forwarded_scheme(server: Server) -> None:
    _, _, headers = call(server.address, "/health/live", headers={"x-forwarded-proto": "https"})
    assert "server" not in headers
    assert "strict-transport-security" not in headers
    assert "date" in headers


def test_sigterm_ends_a_server_with_status_0_and_takes_no_file_along(tmp_path: Path) -> None:
    with serving(directory=tmp_path) as server:
        server.child.send(signal.SIGTERM)
        assert server.child._process.wait(timeout=20) == 0
    assert "Traceback" not in server.child.log.read_text()
    assert sorted(path.name for path in (tmp_path / ".coatcheck").iterdir()) == [
        "coatcheck.db",
        "server.key",
        "setup-link",
    ]


def test_a_request_under_way_is_answered_before_the_end(tmp_path: Path) -> None:
    body = json.dumps({"username": "minsu", "password": PASSWORD}).encode()
    head = (
        f"POST /api/login HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()
    with serving(directory=tmp_path) as server:
        port = port_of(server)
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head + body[:10])
            # The server has read the head once it has answered somebody who came later.
            assert call(server.address, "/health/live")[0] == 200
            server.child.send(signal.SIGTERM)

            def refuses() -> bool:
                try:
                    with socket.create_connection(("127.0.0.1", port), timeout=1):
                        return False
                except ConnectionRefusedError:
                    return True

            until(refuses, within=10, what="no new connection is taken")
            connection.sendall(body[10:])
            assert connection.recv(65536).startswith(b"HTTP/1.1 401 ")
        assert server.child._process.wait(timeout=20) == 0


def test_a_terminal_sees_the_link_and_no_file_keeps_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0"],
        cwd=tmp_path,
        env=clean_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):
        while b"/setup/" not in shown or not shown.endswith(b"\n"):
            piece = os.read(ours, 4096)
            assert piece
            shown += piece
    assert not (tmp_path / ".coatcheck" / "setup-link").exists()
    # Ctrl-C is a way to stop, not an error.
    child.send_signal(signal.SIGINT)
    with suppress(OSError):
        while os.read(ours, 4096):
            pass
    os.close(ours)
    assert child.wait(timeout=20) == 0, shown
    assert re.search(rb"http://127\.0\.0\.1:[0-9]+/setup/[A-Za-z0-9_-]{44}\r\n", shown)


def test_json_is_one_object_without_the_link(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [*COMMAND, "serve", "--port", "0", "--json"],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    with child.stdout:
        told = json.loads(child.stdout.readline())
        child.send_signal(signal.SIGTERM)
        assert child.stdout.read() == ""
    assert child.wait(timeout=20) == 0
    assert told.keys() == {"address", "home", "set_up_file"}


def test_a_port_that_is_taken_is_one_line_and_touches_no_state(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    done = process("serve", "--port", str(port_of(server)), directory=other)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("coatcheck: port: ")
    assert "--port" in line
    assert list(other.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--host", "0.0.0.0"), "public_url"),
        (("--host", "0.0.0.0", "--public-url", "https://id.example"), "--trusted-proxy"),
        (("--host", "0.0.0.0", "--public-url", "https://id.example", "--store", "memory:"), "memory:"),
        (("--host", "0.0.0.0", "--public-url", "https://id.example", "--store", "redis://x"), "database"),
        (("--host", "192.0.2.1", "--insecure-http"), "no address of this machine"),
        (("--host", "nowhere.invalid", "--insecure-http"), "host: "),
        (("--port", "65536"), "port: "),
        (("--home", "/dev/null"), "home: "),
        (("--public-url", "https://id.example/path"), "public_url"),
        (("--store", "sqlite:////no/where.db"), "/no"),
    ],
)
def test_what_must_not_start_says_why_in_one_line(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = process("serve", "--port", "0", *words, directory=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert line.startswith("coatcheck: ")
    assert told in line


def test_a_file_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    (tmp_path / ".coatcheck").mkdir(mode=0o755)
    done = process("serve", "--port", "0", directory=tmp_path)
    assert done.returncode == 2
    assert "chmod 700" in done.stderr.splitlines()[-1]
    (tmp_path / ".coatcheck").chmod(0o700)
    (tmp_path / ".coatcheck" / "server.key").write_bytes(b"k" * 32)
    (tmp_path / ".coatcheck" / "server.key").chmod(0o644)
    done = process("serve", "--port", "0", directory=tmp_path)
    assert done.returncode == 2
    assert "chmod 600" in done.stderr.splitlines()[-1]


def test_a_store_that_does_not_answer_is_status_1_and_no_trace(tmp_path: Path) -> None:
    done = process("serve", "--port", "0", "--store", "redis://:sesame@127.0.0.1:1", directory=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert len([line for line in done.stderr.splitlines() if line.startswith("coatcheck: ")]) == 1
    assert "Traceback" not in done.stderr
    assert "sesame" not in done.stderr


@pytest.mark.servers
def test_a_postgresql_without_tables_makes_serve_name_the_command(
    postgres_database: str, namespace: str, tmp_path: Path
) -> None:
    flags = ("--database", postgres_database, "--namespace", namespace)
    done = process("serve", "--port", "0", *flags, directory=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "coatcheck migrate" in done.stderr.splitlines()[-1]
    assert len([line for line in done.stderr.splitlines() if not line.startswith("warning: ")]) == 1
    assert process("migrate", *flags, directory=tmp_path).returncode == 0
    with serving(*flags, directory=tmp_path) as server:
        assert call(server.address, "/health/ready")[0] == 200


# -- several on one home -------------------------------------------------------------------------------------------


def test_two_servers_on_one_home_share_accounts_and_sessions(tmp_path: Path) -> None:
    with serving(directory=tmp_path, name="a") as one, serving(directory=tmp_path, name="b") as two:
        added = process(
            "user", "add", "minsu", "--role", "admin", "--password-stdin", directory=tmp_path, stdin=PASSWORD
        )
        assert added.returncode == 0, added.stderr
        status, told, headers = call(one.address, "/api/login", {"username": "minsu", "password": PASSWORD})
        assert status == 200
        cookie = "; ".join(line.partition(";")[0] for line in headers.get_all("set-cookie", []))
        status, me, _ = call(two.address, "/api/me", headers={"cookie": cookie})
        assert (status, me["session"]["sid"]) == (200, told["session"]["sid"])
        ended = process("session", "revoke", told["session"]["sid"], "--json", directory=tmp_path)
        assert json.loads(ended.stdout) == {"ended": 1}
        for server in (one, two):
            status, problem, _ = call(server.address, "/api/me", headers={"cookie": cookie})
            assert (status, problem["code"]) == (401, "session_ended")
    # The link is void once there is an administrator, and the next start removes it.
    with serving(directory=tmp_path, name="c") as three:
        assert not (tmp_path / ".coatcheck" / "setup-link").exists()
        assert not any("administrator" in line for line in three.lines)


def test_servers_that_start_together_on_an_empty_home_all_start(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [*COMMAND, "serve", "--port", "0", "--json"],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    told: list[Any] = []
    for child in children:
        assert child.stdout is not None
        assert child.stderr is not None
        line = child.stdout.readline()
        child.send_signal(signal.SIGTERM)
        errors = child.communicate(timeout=60)[1]
        assert child.returncode == 0, errors
        told.append(json.loads(line))
    assert len({each["address"] for each in told}) == 4


# -- bounds --------------------------------------------------------------------------------------------------------


def test_a_head_of_the_largest_size_is_read_and_one_octet_more_is_refused(server: Server) -> None:
    def request(size: int) -> bytes:
        # What is counted: the target, and each field with four octets for its punctuation.
        counted = len("/health/live") + len("host") + len("a") + 4 + len("connection") + len("close") + 4 + len("x") + 4
        filler = b"y" * (size - counted)
        return b"GET /health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: " + filler + b"\r\n\r\n"

    assert raw(server, request(MAX_HEAD_OCTETS)).startswith(b"HTTP/1.1 200 ")
    assert raw(server, request(MAX_HEAD_OCTETS + 1)).startswith(b"HTTP/1.1 431 ")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"GET /health/live HTTP/1.1\r\nhost: a\r\nx: ", b"y" * 4096),
        (b"GET /", b"y" * 4096),
        (b"GET /health/live HTTP/1.1\r\n", b"x: y\r\n" * 512),
        # CVE-2024-22019: chunk extensions without end.
        (b"POST /api/login HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x=y;" * 1024),
        (b"POST /api/login HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 4096),
    ],
    ids=["field", "target", "fields", "chunk-extension", "trailer"],
)
def test_a_request_without_end_is_cut_off(server: Server, start: bytes, piece: bytes) -> None:
    sent = 0

    def more() -> bytes:
        nonlocal sent
        sent += len(piece)
        # Socket buffers on both sides take some megabytes before anybody can notice that nothing is read.
        assert sent < 64 * 1024 * 1024
        return piece

    raw(server, start, more=more)
    assert call(server.address, "/health/live")[0] == 200


@pytest.mark.parametrize("data", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n"])
def test_what_is_no_http_is_refused_and_the_server_lives(server: Server, data: bytes) -> None:
    assert raw(server, data).startswith(b"HTTP/1.1 400 ")
    assert call(server.address, "/health/live")[0] == 200
    assert "Traceback" not in server.child.log.read_text()


# -- parts ---------------------------------------------------------------------------------------------------------


def test_warnings_before_a_start_name_what_is_weak() -> None:
    assert "development" in check_start(ServerSettings())[0]
    assert len(check_start(ServerSettings())) == 1
    assert "everybody on the way" in check_start(ServerSettings(host="192.0.2.1", insecure_http=True))[0]
    (about_proxies,) = check_start(ServerSettings(public_url="https://id.example"))
    assert "--trusted-proxy" in about_proxies
    assert check_start(ServerSettings(public_url="https://id.example", trusted_proxies=("127.0.0.1",))) == ()


def test_a_public_address_without_a_named_proxy_does_not_start() -> None:
    with pytest.raises(ConfigurationError, match="trusted_proxies"):
        check_start(ServerSettings(host="0.0.0.0", public_url="https://id.example"))
    named = ServerSettings(host="0.0.0.0", public_url="https://id.example", trusted_proxies=("10.0.0.1",))
    assert check_start(named) == ()


def test_all_addresses_of_a_name_get_the_same_free_port() -> None:
    listeners = listen("localhost", 0)
    try:
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
        with pytest.raises(ConfigurationError, match="is taken"):
            listen("localhost", listeners[0].getsockname()[1])
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("host", ["a" * 300, "a..b", "\udc80", "exa mple"])
def test_a_host_that_is_no_name_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="host: "):
        listen(host, 0)


def test_a_private_file_is_replaced_whole_and_no_link_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "secret"
    path.symlink_to(victim)
    write_private(path, "new\n")
    assert (victim.read_text(), path.read_text()) == ("mine", "new\n")
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["secret", "victim"]
