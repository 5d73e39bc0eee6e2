"""A load balancer in one process: every request goes to the next server. For trying steps 6 and 7 by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send


def round_robin(servers: Sequence[FastAPI]) -> FastAPI:
    """One ASGI application in front of several."""
    front = FastAPI()
    turn = cycle(servers)

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        await next(turn)(scope, receive, send)

    front.mount("/", forward)
    return front


def serve(servers: Sequence[FastAPI], *, port: int) -> None:
    """Serve until interrupted."""
    uvicorn.run(round_robin(servers), port=port)
