"""`coatcheck migrate`: bring the tables of the server and of the session store up to this release."""

from __future__ import annotations

import asyncio
from typing import Any

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option, talk


@click.command(
    epilog="""\b
Examples:
  coatcheck migrate --database postgresql://coatcheck@db/coatcheck
  coatcheck migrate --check || echo "run coatcheck migrate before the new release\""""
)
@click.option("--check", is_flag=True, help="Change nothing; status 1 when something is missing.")
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be applied.")
@setting_flags(*WHERE)
@json_option
def migrate(check: bool, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Bring the database up to this release. Safe to repeat, and from several machines at once."""
    from coatcheck.server.upgrade import make_ready, upgrade

    settings = gathered(flags).settings
    only_look = check or dry_run
    if not only_look:
        make_ready(settings)
    components = asyncio.run(upgrade(settings, dry_run=only_look))
    word = "missing" if only_look else "applied"
    done = [f"{component.name}: {word} {each}" for component in components for each in component.migrations]
    emit({word: {each.name: list(each.migrations) for each in components}}, *done, as_json=as_json)
    if not done:
        talk("the database is up to date")
    if check and done:
        raise click.exceptions.Exit(1)
