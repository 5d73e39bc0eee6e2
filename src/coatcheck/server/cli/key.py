"""`coatcheck key`: keys for settings."""

from __future__ import annotations

import click

from coatcheck.server.cli.output import emit, json_option, talk
from coatcheck.system import REAL


@click.group()
def key() -> None:
    """Make keys."""


@key.command(
    epilog="""\b
Example:
  (umask 077 && coatcheck key new > server.key)
  COATCHECK_SERVER_KEY_FILE=server.key coatcheck serve --store redis://cache …"""
)
@json_option
def new(as_json: bool) -> None:
    """Make a server key, for servers that share a store."""
    made = REAL.random(32).hex()
    emit({"server_key": made}, made, as_json=as_json)
    talk("Give every server of one store this key, by COATCHECK_SERVER_KEY_FILE; it is kept nowhere else.")
