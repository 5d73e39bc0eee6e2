"""Step 6: three servers that lose the login.

Each keeps its sessions in its own memory. The load balancer sends the next request to another one, and that one has
never heard of the session: "Who are you?"
"""

from __future__ import annotations

from fastapi import FastAPI

from coatcheck import AsyncCoatcheck, Settings
from examples.story.dashboard_app import create_app


def create_servers(settings: Settings | None = None) -> list[FastAPI]:
    """Three servers that share nothing."""
    return [create_app(AsyncCoatcheck("memory:", settings=settings), server=name) for name in "ABC"]


if __name__ == "__main__":
    from examples.story.balancer import serve

    serve(create_servers(Settings(public_url="http://127.0.0.1:3000")), port=3000)
