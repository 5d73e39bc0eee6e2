"""Which loopback port a server gets.

Ports lie below the ephemeral range, so that no outgoing connection takes one between the choice
and the bind, and below 55535 with room for the cluster bus at port + 10000. A port is reserved by
a lock on a file, which the kernel gives back however the program ends: two test workers never
choose the same one, even while its server is down for a restart.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

LOOPBACK = "127.0.0.1"
CLUSTER_BUS_OFFSET = 10_000

_FIRST, _LAST = 11_000, 21_999
_random = random.SystemRandom()


class PortReservation:
    """A loopback port that no other reservation holds until `release()`."""

    def __init__(self, port: int, lock: int) -> None:
        self.port = port
        self._lock: int | None = lock

    def release(self) -> None:
        """Give the port back; fine to call twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def reserve_port() -> PortReservation:
    """Reserve a free port whose cluster bus port is free as well.

    Raises: OSError when several thousand attempts found none.
    """
    locks = Path(tempfile.gettempdir()) / f"test-ports-{os.getuid()}"
    locks.mkdir(mode=0o700, exist_ok=True)
    for _ in range(5_000):
        port = _random.randint(_FIRST, _LAST)
        lock = os.open(locks / str(port), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        if _can_bind(port) and _can_bind(port + CLUSTER_BUS_OFFSET):
            return PortReservation(port, lock)
        os.close(lock)
    raise OSError(f"no free loopback port between {_FIRST} and {_LAST}")


def free_port() -> int:
    """A port reserved for as long as this program lives, for servers started elsewhere."""
    return reserve_port().port


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As every server here does; without it, connections in TIME_WAIT would look like a server.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
