"""Start the server with the profile `bank` on this machine, say what to type, and stop it again.

One machine plays two: the server believes X-Forwarded-For of this machine alone, as it would believe a proxy's, so a
header decides where a request comes from. Everything lives in a directory that is deleted at the end, by Ctrl-C, by
SIGTERM or after an hour. No setting of the shell reaches the server: a demonstration must not find its way to the
database of somebody.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

NAME: Final = "ratia"
PASSWORD: Final = "seven quiet otters fold paper"
HOME: Final = "203.0.113.7"
AWAY: Final = "198.51.100.66"

_ROOT: Final = Path(__file__).parents[2]
_COATCHECK: Final = (sys.executable, "-m", "coatcheck")
_READY_SECONDS: Final = 30.0
_STOP_SECONDS: Final = 10.0
_POLL_SECONDS: Final = 0.05

WATCH: Final = """\
Bank  {url}   (name {name}, password {password})

The owner signs in at home and sees that it is him:

  json='Content-Type: application/json'
  home='X-Forwarded-For: {home}'
  away='X-Forwarded-For: {away}'
  curl -i -c owner -H "$home" -H "$json" {url}/api/login -d '{{"username":"{name}","password":"{password}"}}'
  curl -i -b owner -c owner -H "$home" {url}/api/me

A thief copies his cookies, all of them, and uses them on another machine. His very first request is refused, and not
even the password opens this session from there:

  cp owner thief
  curl -i -b thief -H "$away" {url}/api/me
  curl -i -b thief -H "$away" -H "$json" {url}/api/step-up -d '{{"password":"{password}"}}'

The owner is asked at his next request, gives the password, and goes on in the same session:

  curl -i -b owner -c owner -H "$home" {url}/api/me
  curl -i -b owner -c owner -H "$home" -H "$json" {url}/api/step-up -d '{{"password":"{password}"}}'
  curl -i -b owner -c owner -H "$home" {url}/api/me

What the thief has is worth nothing any more, wherever he takes it; and the owner's account says what happened:

  curl -i -b thief -H "$home" {url}/api/me
  curl -s -b owner -H "$home" {url}/account | grep 'refused there'

The same with a browser: sign in at {url}, copy its cookies into a curl as above with "$away", then look again.
Ctrl-C ends it; so does an hour.
"""


class Failed(Exception):
    """The server did not start, or ended by itself."""


class Server:
    """A `coatcheck serve` of our own, with its log."""

    def __init__(self, directory: Path, port: int) -> None:
        self._log = directory / "server.log"
        self._port = port
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *_COATCHECK, "serve", "--profile", "bank", "--port", str(port), "--home", str(directory / "home"),
                    "--trusted-proxy", "127.0.0.1",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=_clean(),
                # It hears no Ctrl-C of the terminal: it is told to end when this program does.
                process_group=0,
            )  # fmt: skip

    def await_ready(self) -> None:
        """Wait until it answers. Raises: Failed."""
        deadline = time.monotonic() + _READY_SECONDS
        while not self._answers():
            self.check()
            if time.monotonic() > deadline:
                raise Failed(f"the server does not answer:\n{self._tail()}")
            time.sleep(_POLL_SECONDS)

    def check(self) -> None:
        """Raises: Failed when it has ended."""
        if self._process.poll() is not None:
            raise Failed(f"the server ended:\n{self._tail()}")

    def stop(self) -> None:
        """End it; by force when it takes too long."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, HTTPException):
            connection.request("GET", "/health/ready")
            return connection.getresponse().status == 200
        return False

    def _tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-10:])


@contextmanager
def running(port: int) -> Iterator[tuple[Server, str]]:
    """The server for the length of the block, with what there is to say about it. Raises: Failed."""
    with TemporaryDirectory(prefix="coatcheck-bank-") as made:
        directory = Path(made)
        _add_user(directory)
        server = Server(directory, port)
        try:
            server.await_ready()
            url = f"http://127.0.0.1:{port}"
            yield server, WATCH.format(url=url, name=NAME, password=PASSWORD, home=HOME, away=AWAY)
        finally:
            server.stop()


def _add_user(directory: Path) -> None:
    # An administrator, so that the start page does not wait for one to be set up.
    done = subprocess.run(
        [
            *_COATCHECK, "user", "add", NAME, "--role", "admin", "--password-stdin",
            "--home", str(directory / "home"),
        ],
        input=PASSWORD,
        text=True,
        capture_output=True,
        check=False,
        timeout=_READY_SECONDS,
        cwd=directory,
        env=_clean(),
    )  # fmt: skip
    if done.returncode:
        raise Failed(done.stderr)


def _clean() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COATCHECK_")}
    # It runs in another directory, so that no coatcheck.toml of this one is read.
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run until Ctrl-C, SIGTERM or the end of the time; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m examples.bank")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=60.0)
    given = parser.parse_args()
    # Both by name: whoever starts this in the background of a script hands down that Ctrl-C is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        with running(given.port) as (server, watch):
            print(watch, flush=True)
            end = time.monotonic() + given.minutes * 60
            while time.monotonic() < end:
                server.check()
                time.sleep(1)
    except KeyboardInterrupt:
        return 0
    except Failed as failed:
        print(failed, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
