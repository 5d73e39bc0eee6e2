"""Step 7: the same three servers on one store. A login on one is a login on all, and so is a logout.

.venv/bin/python -m examples.story.ch07_shared_store redis://127.0.0.1:6379
"""

from __future__ import annotations

from fastapi import FastAPI

from coatcheck import AsyncCoatcheck, Settings
from examples.story.dashboard_app import create_app


def create_servers(store: str, settings: Settings | None = None) -> list[FastAPI]:
    """Three servers that ask one vault."""
    return [create_app(AsyncCoatcheck(store, settings=settings), server=name) for name in "ABC"]


if __name__ == "__main__":
    import sys

    from examples.story.balancer import serve

    store = sys.argv[1] if len(sys.argv) > 1 else "sqlite:///story.db"
    serve(create_servers(store, Settings(public_url="http://127.0.0.1:3000")), port=3000)
