"""The table of rows in the examples' README: every profile has one, and every command is there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from coatcheck.core.profiles import PROFILES

README = Path(__file__).parents[2] / "examples" / "README.md"
ROW = re.compile(r"^\| [^|]+ \| `(?P<profile>\w+)` \| (?P<command>[^|]+) \| (?P<watch>[^|]+) \|$", re.MULTILINE)


def test_every_profile_has_a_row_whose_command_exists_or_says_what_it_waits_for() -> None:
    rows = {found["profile"]: found for found in ROW.finditer(README.read_text())}
    assert list(rows) == list(PROFILES)
    for name, found in rows.items():
        command = re.fullmatch(r"`python -m (examples\.\w+)`", found["command"])
        if command is None:
            assert PROFILES[name].awaits, name
            assert PROFILES[name].awaits in found["watch"]
        else:
            assert find_spec(f"{command[1]}.__main__") is not None, command[0]
