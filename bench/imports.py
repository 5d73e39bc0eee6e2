"""How long do the imports take that a user waits for? Each in a fresh interpreter; the bare interpreter is first."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from bench.harness import Candidate, Result, compare

STATEMENTS = {
    "bare interpreter": "pass",
    "import coatcheck": "import coatcheck",
    "a blocking application": "from coatcheck import Coatcheck; from coatcheck.web.wsgi import CoatcheckMiddleware",
    "an asynchronous application": "from coatcheck import AsyncCoatcheck; import coatcheck.web.asgi",
    "coatcheck --help": "import sys; sys.argv = ['coatcheck', '--help']; from coatcheck.server.cli import main; main()",
}


def run(*, rounds: int, full: bool) -> list[Result]:
    candidates = [Candidate(name=name, run=_start(code), repeat=1) for name, code in STATEMENTS.items()]
    return [compare("Start an interpreter and import", candidates, rounds=max(5, rounds))]


def _start(code: str) -> Callable[[int], None]:
    def many(count: int) -> None:
        for _ in range(count):
            subprocess.run([sys.executable, "-c", code], check=False, stdout=subprocess.DEVNULL)

    return many
