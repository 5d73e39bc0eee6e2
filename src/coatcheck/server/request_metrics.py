"""How long requests take, by route and status.

The label is the route's own pattern, never the path: an invented path must not make a new time series.
"""

from __future__ import annotations

import time

from coatcheck.server.metrics import Metrics
from coatcheck.web.asgi import App, Message, Receive, Scope, Send


class RequestMetrics:
    """ASGI middleware that measures."""

    def __init__(self, app: App, *, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Measure one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).observe(time.perf_counter() - begun)
