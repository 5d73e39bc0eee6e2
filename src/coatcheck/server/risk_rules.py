"""Which rules about risk a server goes by: those of a file, else those of its profile.

Decides what each profile asks for where the operator says nothing, and reads a file of rules: bounded, TOML, one line
with the cure for everything that is wrong in it. It must never judge; `core/risk.py` does.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from coatcheck.core.risk import Rule, Rules, TravelRule, parse_rules
from coatcheck.errors import ConfigurationError

MAX_OCTETS: Final = 64 * 1024

NO_RULES: Final = parse_rules({})

_NEW_BROWSER: Final = Rules(
    new_device=Rule(),
    new_country=None,
    impossible_travel=None,
    velocity=None,
    id_guessing=None,
    refresh_reuse=None,
)

PROFILE_RULES: Final[Mapping[str, Rules]] = {
    "admin": _NEW_BROWSER,
    "b2c": _NEW_BROWSER,
    "bank": Rules(
        new_device=Rule(),
        new_country=Rule(outcome="step_up"),
        impossible_travel=TravelRule(outcome="step_up"),
        velocity=None,
        id_guessing=None,
        refresh_reuse=None,
    ),
    "oauth": _NEW_BROWSER,
}
"""What each profile asks for; a profile that is not here asks for nothing: programs have no device cookie, and each of
their sign-ins would look new."""


def rules_of(profile: str, file: Path | None) -> Rules:
    """The rules of a file, and those of the profile where there is none. Raises: ConfigurationError."""
    return PROFILE_RULES.get(profile, NO_RULES) if file is None else read_rules(file)


def read_rules(file: Path) -> Rules:
    """The rules of a TOML file: only those that it names are on.

    Raises: ConfigurationError, which names the file, or the table and the member.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_OCTETS + 1)
    except OSError as broken:
        raise ConfigurationError(f"risk rules: {file} cannot be read: {broken.strerror}") from broken
    if len(text) > MAX_OCTETS:
        raise ConfigurationError(f"risk rules: {file} is larger than {MAX_OCTETS} octets")
    try:
        tables = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as broken:
        raise ConfigurationError(f"risk rules: {file} is no TOML: {broken}") from broken
    return parse_rules(tables)
