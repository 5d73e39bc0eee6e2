"""Which requests a list of paths means.

Decides what `exclude=`, `sensitive=` and `outage=` of the gateways cover. A path that whatever routes it might read
differently is never excluded, always sensitive, and refused while the store is away: all err to the safe side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, get_args

from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import ConfigurationError

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
    return bool(sensitive) and (_is_unsure(path) or is_excluded(path, sensitive))


def outage_paths(given: Mapping[str, OutagePolicy], *, otherwise: OutagePolicy) -> tuple[tuple[str, OutagePolicy], ...]:
    """What `outage=` says, the longest path first: it is the one that counts. Raises: ConfigurationError.

    `otherwise` is what the settings say. Whoever revokes may be another process, a job or the command line, and knows
    the reach from the settings alone: so `near` must stand there, and single paths may only be stricter.
    """
    for path, policy in given.items():
        if not path.startswith("/") or policy not in get_args(OutagePolicy):
            raise ConfigurationError(f"outage: paths with one of {', '.join(get_args(OutagePolicy))}")
        if policy == "near" and otherwise != "near":
            raise ConfigurationError(
                'outage: near on a path needs Settings(outage="near"), or nobody could tell how late a revoke is seen; '
                'say {"/": "refuse"} for the other paths'
            )
    return tuple(sorted(given.items(), key=lambda each: len(each[0]), reverse=True))


def outage_of(path: str, paths: Sequence[tuple[str, OutagePolicy]]) -> OutagePolicy | None:
    """What a path gets while the store is away; None where the settings decide."""
    if not paths:
        return None
    if _is_unsure(path):
        return "refuse"
    return next((policy for each, policy in paths if is_excluded(path, (each,))), None)


def _is_unsure(path: str) -> bool:
    return bool(_DOTS & set(path.split("/"))) or "//" in path or "\\" in path or "%" in path
