"""Ends what a dead program left running; a process of its own, told of each child on its input.

End of input means that the program is gone, whatever the cause: return, exception, crash, kill -9.
A parent-death signal would not do: it follows the thread that started the child and exists on
Linux only. This file must run alone (`python -I -S guardian.py`) and never touch a process that
was not named to it.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path


class _Line:
    """The open line to this program's guardian; a forked copy of the program opens its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def say(self, *words: object) -> None:
        """Tell the guardian one line; the first call starts it."""
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    cwd="/",
                )
                self._owner = os.getpid()
                atexit.register(self._hang_up)
            assert self._process.stdin is not None
            self._process.stdin.write("\t".join(map(str, words)).encode() + b"\n")
            self._process.stdin.flush()

    def _hang_up(self) -> None:
        # Waiting lets a program that ends in order leave nothing behind for the next one to meet.
        if self._process is not None and self._owner == os.getpid():
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


_line = _Line()


def watch_group(group: int, stop_signal: signal.Signals) -> None:
    """Have the process group ended after this program: first by `stop_signal`, then by SIGKILL."""
    _line.say("group", group, int(stop_signal))


def forget_group(group: int) -> None:
    """The group has been ended; its number may soon belong to someone else."""
    _line.say("ended", group)


def watch_directory(directory: Path) -> None:
    """Have the directory removed after this program."""
    _line.say("directory", directory)


def main() -> None:
    """Follow the input to its end, then end the groups and remove the directories still listed."""
    # Ctrl-C in the terminal is meant for the program; its end is what counts here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: dict[int, int] = {}
    directories: list[Path] = []
    for line in sys.stdin:
        match line.rstrip("\n").split("\t"):
            case ["group", group, stop_signal]:
                groups[int(group)] = int(stop_signal)
            case ["ended", group]:
                groups.pop(int(group), None)
            case ["directory", directory]:
                directories.append(Path(directory))
            case _:
                raise ValueError(line)
    for group, stop_signal in groups.items():
        _signal_group(group, stop_signal)
        _signal_group(group, signal.SIGCONT)
    _wait(lambda: not any(_exists(group) for group in groups), seconds=5.0)
    for group in groups:
        _signal_group(group, signal.SIGKILL)
    _wait(lambda: not any(_exists(group) for group in groups), seconds=1.0)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
        # A zombie has ended, even if its parent (the program, or an init that does not care) never asks.
        return Path(f"/proc/{group}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (ProcessLookupError, PermissionError):
        return False
    except FileNotFoundError:
        # No /proc on this system, or the leader has gone before the rest of its group.
        return True


def _wait(done: Callable[[], bool], *, seconds: float) -> None:
    for _ in range(int(seconds / 0.05)):
        if done():
            return
        select.select([], [], [], 0.05)


if __name__ == "__main__":
    main()
