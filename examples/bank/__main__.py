"""python -m examples.bank [--port 8000] [--minutes 60]."""

from __future__ import annotations

import sys

from examples.bank.run import main

sys.exit(main())
