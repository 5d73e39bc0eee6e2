"""The checkout's own virtual environment: when it is stale and how it is brought up to date.

Decides from a stamp (lock, pyproject, interpreter, place) whether anything has to be installed, so
that a start with nothing to do costs a few file reads. Installs from hash-pinned locks only.
It must never touch an environment outside `.venv`, never take packages away from a larger
environment because a smaller one was asked for, and never let two starts install at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

import locks

OLDEST_PYTHON: Final = (3, 11)
_INSTALLER_TIMEOUT: Final = 30 * 60

Selection = Literal["serve", "dev"]


class CannotPrepare(Exception):
    """The environment cannot be made; the text is one line that names the cure."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What the environment was made from; equal stamps mean there is nothing to do."""

    selection: Selection
    python: str
    root: str
    lock: str
    project: str


@dataclass(frozen=True, kw_only=True)
class Work:
    """What has to be done to reach `stamp`; linking the checkout is always part of it."""

    stamp: Stamp
    create: bool
    install: bool


def refusal(version: tuple[int, int], executable: str) -> str | None:
    """One line telling why this interpreter cannot be used, or None when it can."""
    if version >= OLDEST_PYTHON:
        return None
    needed = ".".join(map(str, OLDEST_PYTHON))
    found = ".".join(map(str, version))
    return f"Python {needed} or later is needed; {executable} is {found}. Install one and run again."


def wanted_stamp(root: Path, selection: Selection) -> Stamp:
    """The stamp of an environment that is up to date with the checkout."""
    return Stamp(
        selection=selection,
        python=f"{platform.python_implementation()} {platform.python_version()}",
        root=str(root),
        lock=_digest(locks.lock_path(root, selection)),
        project=_digest(root / "pyproject.toml"),
    )


def read_stamp(path: Path) -> Stamp | None:
    """The stamp at `path`; None when there is none or it cannot be understood."""
    try:
        stored = json.loads(path.read_bytes())
        stamp = Stamp(**stored)
    except (OSError, ValueError, TypeError):
        return None
    return stamp if stamp.selection in ("serve", "dev") else None


def decide(present: Stamp | None, wanted: Callable[[Selection], Stamp], asked: Selection) -> Work | None:
    """What to do so that `asked` works; None when everything is there already.

    A `dev` environment serves as well, so it stays one: `./run serve` between two test runs must
    not cost a re-installation.
    """
    keep: Selection = "dev" if present is not None and present.selection == "dev" else asked
    target = wanted(keep)
    if present == target:
        return None
    if present is None:
        return Work(stamp=target, create=False, install=True)
    # Another interpreter, or a tree that was moved: scripts and links inside point elsewhere.
    create = present.python != target.python or present.root != target.root
    install = create or present.lock != target.lock or present.selection != target.selection
    return Work(stamp=target, create=create, install=install)


class Environment:
    """`.venv` of the checkout at `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.scripts = self.folder / ("Scripts" if sys.platform == "win32" else "bin")
        self._stamp = self.folder / "coatcheck-stamp.json"
        self._log = self.folder / "install.log"

    def program(self, name: str) -> Path:
        """The path of a program installed in the environment."""
        return self.scripts / (f"{name}.exe" if sys.platform == "win32" else name)

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.program("python")

    def variables(self, outer: Mapping[str, str]) -> dict[str, str]:
        """`outer` changed so that programs find the environment first."""
        inner = {name: value for name, value in outer.items() if name not in ("PYTHONHOME", "PYTHON")}
        inner["VIRTUAL_ENV"] = str(self.folder)
        inner["PATH"] = os.pathsep.join([str(self.scripts), outer.get("PATH", os.defpath)])
        return inner

    def prepare(self, asked: Selection) -> None:
        """Return once everything `asked` needs is installed; quick when it already is.

        Safe to call from several processes at once: one installs, the others wait and then look
        again. Raises: CannotPrepare.
        """
        if self._work(asked) is None:
            return
        with _only_one(self.root / ".venv.lock"):
            work = self._work(asked)
            if work is not None:
                self._carry_out(work)

    def prepare_installer(self) -> Path:
        """The path of `uv` in the environment, installed when it is missing. Raises: CannotPrepare."""
        uv = self.program("uv")
        if not uv.exists():
            with _only_one(self.root / ".venv.lock"):
                if not self.python.exists():
                    self._create()
                if not self._install_uv():
                    raise CannotPrepare(f"uv could not be installed; see {self._log}.")
        return uv

    def _work(self, asked: Selection) -> Work | None:
        present = read_stamp(self._stamp) if self.python.exists() else None
        try:
            return decide(present, lambda selection: wanted_stamp(self.root, selection), asked)
        except FileNotFoundError as missing:
            raise CannotPrepare(f"{missing.filename} is missing; restore it from the repository.") from missing

    def _carry_out(self, work: Work) -> None:
        # Removed first: an installation that is cut off must be seen as none.
        self._stamp.unlink(missing_ok=True)
        steps: list[tuple[str, Callable[[], object]]] = []
        create = work.create or not self._is_usable()
        if create:
            steps.append((f"making .venv with Python {platform.python_version()}", self._create))
        if create or not self.program("uv").exists():
            steps.append(("installing the installer (uv)", self._install_uv))
        if create or work.install:
            lock = locks.lock_path(self.root, work.stamp.selection)
            count = len(locks.locked_names(lock.read_text("utf-8")))
            steps.append((f"installing up to {count} packages from {lock.name}", lambda: self._install(lock)))
        steps.append(("linking coatcheck", self._link))
        for number, (text, step) in enumerate(steps, start=1):
            say(f"[{number}/{len(steps)}] {text}")
            step()
        self._stamp.write_text(json.dumps(asdict(work.stamp), indent=1) + "\n", "utf-8")

    def _is_usable(self) -> bool:
        import subprocess

        if not self.python.exists():
            return False
        try:
            done = subprocess.run([self.python, "-c", "import pip"], capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def _create(self) -> None:
        import importlib.util
        import subprocess

        base = getattr(sys, "_base_executable", None) or sys.executable
        if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise CannotPrepare(
                f"{base} has no venv module; on Debian and Ubuntu: apt install python{version}-venv, then run again."
            )
        if self.folder.is_dir() and self.folder.resolve() in Path(base).resolve().parents:
            raise CannotPrepare("this interpreter lives in .venv; remove that folder and run again.")
        shutil.rmtree(self.folder, ignore_errors=True)
        done = subprocess.run(
            [base, "-m", "venv", str(self.folder)], capture_output=True, text=True, timeout=600, check=False
        )
        if done.returncode != 0:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no reason given"]
            raise CannotPrepare(f"{base} -m venv {self.folder} failed: {last[0]}")

    def _install_uv(self) -> bool:
        return self._run(self._pip("install", "--require-hashes", "-r", self._lock("installer")))

    def _install(self, lock: Path) -> None:
        # uv may be missing for this platform, and it does not read pip's configuration (a company's
        # index, say), so pip has the last word.
        if self._run([*self._uv("sync"), "--require-hashes", str(lock)]):
            return
        if not self._run(self._pip("install", "--require-hashes", "-r", str(lock))):
            raise CannotPrepare(f"the packages of {lock.name} could not be installed; see {self._log}.")

    def _link(self) -> None:
        # The build backend comes from the lock: an isolated build would download it again, unlocked.
        options = ["--no-deps", "--no-build-isolation", "-e", str(self.root)]
        if self._run([*self._uv("install"), *options]):
            return
        if not self._run(self._pip("install", *options)):
            raise CannotPrepare(f"coatcheck itself could not be linked into .venv; see {self._log}.")

    def _lock(self, name: str) -> str:
        return str(locks.lock_path(self.root, name))

    def _uv(self, verb: str) -> list[str]:
        return [str(self.program("uv")), "pip", verb, "--python", str(self.python)]

    def _pip(self, verb: str, *options: str) -> list[str]:
        return [
            *(str(self.python), "-m", "pip", verb, "--disable-pip-version-check", "--no-input"),
            *("--retries", "2", *options),
        ]

    def _run(self, command: list[str]) -> bool:
        """Run an installer with its output in the log; False when it failed for a local reason."""
        import subprocess

        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            try:
                done = subprocess.run(
                    command,
                    cwd=self.root,
                    env=self.variables(os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=_INSTALLER_TIMEOUT,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as failure:
                log.write(f"{failure}\n")
                return False
        if done.returncode == 0:
            return True
        with self._log.open(encoding="utf-8", errors="replace") as log:
            log.seek(start)
            output = log.read()
        if command[1:3] == ["-m", "pip"] and is_network_failure(output):
            raise CannotPrepare(
                "the package index cannot be reached; connect to the network "
                "(or point PIP_INDEX_URL at a mirror) and run again."
            )
        return False


_NETWORK_SIGNS: Final = (
    "name resolution",
    "name or service not known",
    "nodename nor servname",
    "getaddrinfo failed",
    "connection refused",
    "connection reset",
    "connection timed out",
    "read timed out",
    "network is unreachable",
    "no route to host",
    "failed to establish a new connection",
    "connectionerror",
    "connecttimeout",
    "cannot connect to proxy",
    "error sending request",
    "dns error",
)


def is_network_failure(output: str) -> bool:
    """True when an installer's output says that it could not reach its index."""
    lowered = output.lower()
    return any(sign in lowered for sign in _NETWORK_SIGNS)


def say(text: str) -> None:
    """Talk to the person: on standard error, so that standard output stays with the command."""
    print(f"run: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _only_one(path: Path) -> Generator[None]:
    """Hold the installation lock; the system releases it should this process die."""
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another ./run is installing; waiting for it")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
