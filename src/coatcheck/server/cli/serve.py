"""`coatcheck serve`: run the server in this process.

Decides what is said when it is ready. The set-up link is a secret: it is printed to a terminal only, because anything
else that reads this output is likely to keep it.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from coatcheck.server.cli.options import FLAGS, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option, printable, talk

if TYPE_CHECKING:
    from coatcheck.server.serving import Ready


@click.command(
    epilog="""\b
Examples:
  coatcheck serve
  coatcheck serve --port 0 --home /var/lib/coatcheck
  coatcheck serve --host 0.0.0.0 --public-url https://id.example --trusted-proxy 10.0.0.0/24 \\
      --database postgresql://coatcheck@db/coatcheck --store redis://cache

\b
Secrets are never flags: COATCHECK_SERVER_KEY_FILE (see `coatcheck key new`) and
COATCHECK_METRICS_TOKEN_FILE name files that hold them."""
)
@setting_flags(*FLAGS)
@click.option("-v", "--verbose", is_flag=True, help="Log every event to stderr, not only what needs attention.")
@json_option
def serve(verbose: bool, as_json: bool, **flags: Any) -> None:
    """Run the server."""
    settings = gathered(flags).settings
    from coatcheck.server import serving
    from coatcheck.server.settings import unknown_variables

    _log(verbose)
    for name in unknown_variables(os.environ):
        talk(f"warning: {name} is no setting of the server, so it changes nothing; `coatcheck config show` lists them")
    for warning in serving.check_start(settings):
        talk(f"warning: {warning}")
    to_terminal = sys.stdout.isatty() and not as_json
    serving.serve(settings, announce=lambda ready: _announce(ready, as_json=as_json), to_terminal=to_terminal)


def _announce(ready: Ready, *, as_json: bool) -> None:
    data: dict[str, object] = {"address": ready.address, "home": str(ready.home)}
    lines = [f"Coatcheck is ready: {ready.address}", f"State is kept in: {ready.home}"]
    if ready.set_up_link is not None:
        lines.append(f"Make the first administrator (works once, for 24 hours): {ready.set_up_link}")
    if ready.set_up_file is not None:
        data["set_up_file"] = str(ready.set_up_file)
        lines.append(f"The link that makes the first administrator is in: {ready.set_up_file}")
    emit(data, *lines, as_json=as_json)
    sys.stdout.flush()


class _OneLine(logging.Formatter):
    """One line a record: what came from outside cannot forge another (ASVS 16.4.1). Traces stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


def _log(verbose: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("coatcheck").setLevel(logging.INFO if verbose else logging.WARNING)
    # Its pool tells every attempt; what became of them is told once, by whoever asked.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    # "Application startup failed" says less than the line that tells why.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").addFilter(lambda record: "startup failed" not in record.getMessage())
