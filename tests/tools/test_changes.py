"""Every change fragment has a topic, a kind that the changelog knows, and something to say."""

import re
from pathlib import Path

CHANGES = Path(__file__).resolve().parents[2] / "changes"
KINDS = ("added", "changed", "deprecated", "removed", "fixed", "security")


def test_every_fragment_is_named_and_written_as_described() -> None:
    for path in CHANGES.iterdir():
        if path.name == "README.md":
            continue
        assert re.fullmatch(rf"[a-z0-9]+(-[a-z0-9]+)*\.({'|'.join(KINDS)})\.md", path.name), path.name
        text = path.read_text("utf-8")
        assert text.strip(), path.name
        assert not text.startswith("#"), path.name


def test_the_description_names_every_kind() -> None:
    described = (CHANGES / "README.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", described, re.M) == list(KINDS)
