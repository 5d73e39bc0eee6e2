"""How a server process starts, proves that it is ready, suffers and ends.

A child lives in its own process group (Ctrl-C in the terminal is not for it), writes one log file
and is known to the guardian. Signals go to process ids found by descent from the child, never to
a name. Nothing here sleeps and hopes: every wait asks a question, has a bound, and ends at once
when the child dies.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import guardian
from tests.servers.ports import LOOPBACK

_POLL_SECONDS = 0.005
_pause = threading.Event().wait


class ServerFailed(Exception):
    """A server died or did not become ready in time; the message ends with its log."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """The operating-system user a child runs as."""

    uid: int
    gid: int


def unprivileged() -> Account | None:
    """The account for servers that refuse root; `None` when we are not root and can run them ourselves."""
    if os.geteuid() != 0:
        return None
    nobody = pwd.getpwnam("nobody")
    return Account(uid=nobody.pw_uid, gid=nobody.pw_gid)


def until(question: Callable[[], bool], *, within: float, what: str) -> None:
    """Ask until the answer is yes. A question that raises OSError has answered no.

    Raises: TimeoutError after `within` seconds, naming `what` was waited for.
    """
    deadline = time.monotonic() + within
    while True:
        with contextlib.suppress(OSError):
            if question():
                return
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what}: not within {within:g} s")
        _pause(_POLL_SECONDS)


def accepts(port: int) -> bool:
    """Whether something on this loopback port accepts a connection."""
    with socket.create_connection((LOOPBACK, port), timeout=1.0):
        return True


class ServerDirectory:
    """A private temporary directory that does not outlive the program."""

    def __init__(self, kind: str, owner: Account | None = None) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{kind}-"))
        guardian.watch_directory(self.path)
        if owner is not None:
            os.chown(self.path, owner.uid, owner.gid)

    def remove(self) -> None:
        """Delete the directory; fine when it is gone."""
        shutil.rmtree(self.path, ignore_errors=True)


class Child:
    """One server process with its descendants and its log."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        log: Path,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        account: Account | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.log = log
        self.frozen = False
        self._stop_signal = stop_signal
        self._name = Path(command[0]).name
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=None if environment is None else {**os.environ, **environment},
                process_group=0,
                user=None if account is None else account.uid,
                group=None if account is None else account.gid,
                extra_groups=None if account is None else [],
            )
        guardian.watch_group(self.pid, stop_signal)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pids(self) -> list[int]:
        """The child and its living descendants, the child first; empty when it has ended."""
        return [self.pid, *_descendants(self.pid)] if self.running else []

    @property
    def running(self) -> bool:
        """Whether the process exists; a frozen one does."""
        return self._process.poll() is None

    def await_ready(self, question: Callable[[], bool], *, within: float = 20.0) -> None:
        """Wait until the server itself says that it is ready.

        Raises: ServerFailed when it dies first or takes longer than `within` seconds; it is then
        stopped.
        """

        def ready_or_dead() -> bool:
            return not self.running or question()

        try:
            until(ready_or_dead, within=within, what=f"{self._name} ready")
        except TimeoutError as late:
            self.kill()
            raise ServerFailed(f"{late}\n{self.tail()}") from late
        if not self.running:
            guardian.forget_group(self.pid)
            raise ServerFailed(f"{self._name} ended with status {self._process.returncode}\n{self.tail()}")

    def send(self, number: signal.Signals) -> None:
        """Signal the process itself, not its descendants."""
        self._process.send_signal(number)

    def freeze(self) -> None:
        """Stop the process and its descendants where they are: the kernel still accepts connections, nobody answers."""
        # The parent first, so that no new descendant appears behind the list.
        self.send(signal.SIGSTOP)
        self.frozen = True
        for pid in _descendants(self.pid):
            _signal(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on; fine when it is not frozen."""
        if self.running:
            for pid in reversed(self.pids):
                _signal(pid, signal.SIGCONT)
        self.frozen = False

    def kill(self) -> None:
        """kill -9 the process and its descendants, and wait until all are gone; fine when they are."""
        if self.running:
            family = self.pids
            for pid in family:
                _signal(pid, signal.SIGKILL)
            self._process.wait()
            until(lambda: not any(map(_alive, family[1:])), within=10.0, what=f"{self._name} gone")
        guardian.forget_group(self.pid)
        self.frozen = False

    def stop(self, *, within: float = 10.0) -> None:
        """End the server in its own orderly way, by force after `within` seconds; fine when it has ended."""
        if self.running:
            self.send(self._stop_signal)
            self.thaw()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=within)
        self.kill()

    def tail(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _descendants(root: int) -> list[int]:
    """All living descendants, parents before their children."""
    children: dict[int, list[int]] = {}
    for pid, parent, state in _process_table():
        if state not in "ZX":
            children.setdefault(parent, []).append(pid)
    found = list(children.get(root, []))
    for pid in found:
        found += children.get(pid, [])
    return found


def _alive(pid: int) -> bool:
    # A zombie has ended; in a container without an init nobody may ever collect it.
    return any(row[0] == pid and row[2] not in "ZX" for row in _process_table())


def _process_table() -> list[tuple[int, int, str]]:
    """(process id, parent's id, state letter) of every process we may see."""
    table: list[tuple[int, int, str]] = []
    if Path("/proc/self/stat").exists():
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    # The second field is the name in parentheses and may hold spaces.
                    fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                    table.append((int(entry), int(fields[1]), fields[0]))
        return table
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,state="], capture_output=True, text=True, check=True)
    for line in listing.stdout.splitlines():
        pid, parent, state = line.split()
        table.append((int(pid), int(parent), state[0]))
    return table
