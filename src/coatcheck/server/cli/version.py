"""`coatcheck version`."""

from __future__ import annotations

import platform

import click

from coatcheck import __version__
from coatcheck.server.cli.output import emit, json_option


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Say which release this is."""
    python = platform.python_version()
    emit({"coatcheck": __version__, "python": python}, f"coatcheck {__version__}", as_json=as_json)
