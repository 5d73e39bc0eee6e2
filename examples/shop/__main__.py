"""Serve the shop on this machine until Ctrl-C: python -m examples.shop [--port 3000]."""

from __future__ import annotations

import argparse

import uvicorn

from coatcheck import AsyncCoatcheck
from examples.shop.app import create_app, settings

WATCH = """\
Shop: {address}   (name ratia, password secret)

  1. Sign in, and look where a script would look for the token: local storage, session storage, document.cookie.
  2. Reload, or open a second tab: the refresh cookie signs you in, and one tab refreshes for both.
  3. Sign in in another browser or a private window. Each sees both devices; sign the other one out, then use it.

Ctrl-C ends it.
"""


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m examples.shop")
    parser.add_argument("--port", type=int, default=3000)
    port = parser.parse_args().port
    address = f"http://127.0.0.1:{port}"
    print(WATCH.format(address=address), flush=True)
    uvicorn.run(create_app(AsyncCoatcheck("memory:", settings=settings(address))), port=port, log_level="warning")


if __name__ == "__main__":
    main()
