"""The server key of an embedded store: a file beside the data, never inside it.

Decides that whoever gets hold of the stored data alone (a backup, a copied database) cannot open the sealed
successors in it. It must never overwrite a key, and never use one that other users of the machine can read.
"""

from __future__ import annotations

import os
import stat
from secrets import token_hex
from typing import Final

from coatcheck.errors import ConfigurationError, StoreUnavailable

KEY_BYTES: Final = 32


def read_or_make_key(path: str, candidate: bytes) -> bytes:
    """The key in the file; `candidate` becomes it where there is no file.

    Of several callers at once, in any number of processes, exactly one candidate wins and all receive it.
    Raises: ConfigurationError for a key that others can read or that is not a key, StoreUnavailable.
    """
    if len(candidate) != KEY_BYTES:
        raise ValueError(f"a server key has {KEY_BYTES} bytes")
    try:
        key = _read(path)
        if key is None:
            _make(path, candidate)
            key = _read(path)
    except OSError as error:
        raise StoreUnavailable(f"the server key {path} cannot be read or written: {error.strerror}") from error
    if key is None:
        raise StoreUnavailable(f"the server key {path} disappeared while it was made")
    return key


def _read(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return None
    try:
        # Looked at through the descriptor: what is checked is what is read.
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ConfigurationError(f"the server key {path} is not a plain file: move it away")
        if os.name == "posix" and stat.S_IMODE(state.st_mode) & 0o077:
            raise ConfigurationError(f"the server key {path} can be read by others: chmod 600 {path}")
        key = os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(key) != KEY_BYTES:
        raise ConfigurationError(
            f"the server key {path} does not have {KEY_BYTES} bytes: restore it, or remove it to have a new one "
            "(links of rotated ids are lost, nobody is signed out)"
        )
    return key


def _make(path: str, candidate: bytes) -> None:
    draft = f"{path}.{token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        try:
            os.write(descriptor, candidate)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        # A link, unlike a rename, fails where there is a key already, and the name never shows half a key.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(draft)
    _sync_folder(os.path.dirname(path))


def _sync_folder(folder: str) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
