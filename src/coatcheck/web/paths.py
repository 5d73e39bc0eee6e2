"""Which requests a list of paths means.

Decides what `exclude=` and `sensitive=` of the gateways cover. A path that whatever routes it might read differently
is never excluded and always sensitive: both err to the safe side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

_DOTS: Final = frozenset({".", ".."})


def is_excluded(path: str, exclude: Sequence[str]) -> bool:
    """Whether a path lies at or below one of the excluded ones (`/static` means `/static` and `/static/…`).

    A path with dot segments never does: what routes it may see `/static/../account` as something else.
    """
    for each in exclude:
        if path == each or path.startswith(each.rstrip("/") + "/"):
            return not _DOTS & set(path.split("/"))
    return False


def is_sensitive(path: str, sensitive: Sequence[str]) -> bool:
    """Whether a path lies at or below one of the sensitive ones, or might to whatever routes it: with dot segments,
    doubled slashes or escapes in it nobody can be sure, so it counts as sensitive."""
    unsure = bool(_DOTS & set(path.split("/"))) or "//" in path or "\\" in path or "%" in path
    return bool(sensitive) and (unsure or is_excluded(path, sensitive))
