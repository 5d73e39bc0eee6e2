"""python -m examples.microservices [--ports GATEWAY SERVER ORDERS PAYMENTS]."""

from __future__ import annotations

import sys

from examples.microservices.run import main

sys.exit(main())
