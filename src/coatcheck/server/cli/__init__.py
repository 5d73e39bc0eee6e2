"""The command line. One file a verb or group of verbs; `root.py` puts them together.

Decides only that an installation without the server's parts says so in one line. A verb's file, and with it the
server, is imported when the verb is used: `coatcheck --help` loads nothing but click.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line on the process's arguments; exits 0 when it is done, 1 when it failed, 2 on bad input."""
    try:
        from coatcheck.server.cli.root import coatcheck
    except ModuleNotFoundError as missing:
        if missing.name != "click":
            raise
        sys.stderr.write("coatcheck: the command line needs its parts: pip install 'coatcheck[server]'\n")
        sys.exit(2)
    coatcheck(prog_name="coatcheck")
