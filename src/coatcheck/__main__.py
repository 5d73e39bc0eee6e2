"""`python -m coatcheck` is the command line."""

from __future__ import annotations

from coatcheck.server.cli import main

if __name__ == "__main__":
    main()
