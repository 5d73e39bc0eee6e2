"""How the hash-pinned locks in `requirements/` are made, and what a lock may contain.

A lock names exact versions and hashes and nothing else: no registry address, no path, no index
option. Where packages come from is the choice of the machine that installs, not of this repository.
This file never installs anything; `environment.py` does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

# In order: serve.lock is resolved under the versions of dev.lock, so that an environment made from
# dev.lock also satisfies `./run serve`.
ORDER: Final = ("installer", "dev", "serve")

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==[^\s;\\]+(?: ; [^\\]+?)?(?P<more> \\)?")
_HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?P<more> \\)?")


def lock_path(root: Path, name: str) -> Path:
    """Where the lock called `name` is kept under the checkout `root`."""
    return root / "requirements" / f"{name}.lock"


def compile_command(root: Path, uv: Path, name: str, *, upgrade: bool) -> list[str]:
    """The command, run in `root`, that resolves `requirements/<name>.in` into its lock.

    Without `upgrade` the versions of the present lock are kept wherever they still fit.
    """
    command = [str(uv), "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    # Headers and annotations repeat the command line and the paths of the machine that ran it.
    command += ["--generate-hashes", "--no-header", "--no-annotate", "--no-emit-package", "coatcheck"]
    if upgrade:
        command.append("--upgrade")
    if name == "dev":
        command += ["--group", "dev"]
    if name == "serve":
        command += ["--constraint", "requirements/dev.lock"]
    output = lock_path(root, name).relative_to(root).as_posix()
    return [*command, f"requirements/{name}.in", "--output-file", output]


def locked_names(text: str) -> set[str]:
    """The normalised names that a lock pins.

    Raises: ValueError for any line that is not a pin or a hash, and for a pin without a hash: an
    address or an index option smuggled into a lock would redirect every installation.
    """
    names: set[str] = set()
    hash_due = False
    for number, line in enumerate(text.splitlines(), start=1):
        pin = _REQUIREMENT.fullmatch(line)
        match = pin or _HASH.fullmatch(line)
        if match is None or (pin is None) is not hash_due:
            raise ValueError(f"line {number} is neither a pinned requirement nor its hash: {line!r}")
        if pin is not None:
            names.add(normalised(pin["name"]))
        hash_due = match["more"] is not None
        if pin is not None and not hash_due:
            raise ValueError(f"line {number} pins without a hash: {line!r}")
    if hash_due:
        raise ValueError("the last requirement ends in the middle of its hashes")
    return names


def normalised(name: str) -> str:
    """A distribution name in the spelling registries compare (the name normalisation of PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
