"""Where to go after signing in: an address of this very server, or none.

Decides by an allow-list, because everything else is a list of what browsers are known to misread today: `//evil`,
`/\\evil`, `/%09/evil`, `/<tab>/evil`, `https:evil`, `/@evil` (CWE-601, ASVS 3.7.2). The path takes no percent sign at
all; a query may hold escapes, which no browser ever takes for a host.
"""

from __future__ import annotations

import re
from typing import Final

MAX_CHARACTERS: Final = 1024

_SEGMENT: Final = "[A-Za-z0-9_~-][A-Za-z0-9._~-]*"
# A slash stands between any two segments, so there is one way to match and no backtracking.
_PATH: Final = re.compile(f"/(?:{_SEGMENT}(?:/{_SEGMENT})*/?)?")
_QUERY: Final = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@/?%-]*")
# Addresses that would lead in a circle, or act at once.
_NOT_A_GOAL: Final = frozenset({"login", "logout", "setup", "static", "api"})


def parse_return_path(text: str | None) -> str | None:
    """The address if it is one of ours, else `None`. Takes time linear in at most `MAX_CHARACTERS`."""
    if text is None or len(text) > MAX_CHARACTERS:
        return None
    path, question, query = text.partition("?")
    if not _PATH.fullmatch(path) or (question and not _QUERY.fullmatch(query)):
        return None
    return None if path.split("/", 2)[1] in _NOT_A_GOAL else text
