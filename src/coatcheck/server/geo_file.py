"""Tables of addresses from files in the MaxMind format.

Decides only that a missing reader or a file that is none of these is one line with its cure. The files are the
operator's: none comes with this package, and nothing is ever fetched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from coatcheck.core.geo import MaxMindGeography
from coatcheck.errors import ConfigurationError


@contextmanager
def geography_of(files: Sequence[Path]) -> Iterator[MaxMindGeography]:
    """The tables of these files, open until the end of the block; the first one that tells a member decides it.

    Raises: ConfigurationError.
    """
    try:
        maxminddb: Any = import_module("maxminddb")
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            "geo: tables of addresses need their reader: pip install 'coatcheck[geo]'"
        ) from missing
    with ExitStack() as behind:
        readers: list[Any] = []
        for file in files:
            try:
                readers.append(behind.enter_context(maxminddb.open_database(str(file))))
            except (maxminddb.InvalidDatabaseError, OSError, ValueError) as broken:
                raise ConfigurationError(f"geo: {file} is no table in the MaxMind format that can be read") from broken
        yield MaxMindGeography(readers)
