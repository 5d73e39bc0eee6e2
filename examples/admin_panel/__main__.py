"""Serve the panel on this machine until Ctrl-C: python -m examples.admin_panel [--port 3000]."""

from __future__ import annotations

import argparse
import logging

from coatcheck import Coatcheck, Event
from examples.admin_panel.app import create_app, settings

WATCH = """\
Admin panel: {address}   (name ratia, password secret)

  1. Sign in.
  2. Sign in once more in a private window or in another browser.
  3. Look again in the first one: it is signed out, and says when and from where somebody else came in.

What happens to the sessions is printed here. Ctrl-C ends it.
"""


def tell(event: Event) -> None:
    """One line for each thing that happened."""
    details = " ".join(f"{name}={value}" for name, value in event.data.items())
    print(f"{event.kind} {event.sid or ''} {details}".rstrip(), flush=True)


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(prog="python -m examples.admin_panel")
    parser.add_argument("--port", type=int, default=3000)
    port = parser.parse_args().port
    address = f"http://127.0.0.1:{port}"
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with Coatcheck("memory:", settings=settings(address), on_event=tell) as coat:
        print(WATCH.format(address=address), flush=True)
        create_app(coat).run(port=port)


if __name__ == "__main__":
    main()
