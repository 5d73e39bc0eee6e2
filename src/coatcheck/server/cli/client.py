"""`coatcheck client`: services that may follow what is denied.

Decides that a credential is shown once, alone on standard output, so that it can go into a file nobody else reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from coatcheck.server.cli.options import WHERE, gathered, setting_flags
from coatcheck.server.cli.output import Failed, emit, json_option, moment, table, talk

if TYPE_CHECKING:
    from coatcheck.server.clients import Client
    from coatcheck.server.settings import ServerSettings

_SECOND_US: Final = 1_000_000


@click.group()
def client() -> None:
    """Let services follow what is denied."""


@client.command(
    epilog="""\b
Example:
  (umask 077 && coatcheck client add orders > feed.credential)

\b
The service hands it to its verifier:
  Verifier("https://id.example", audience="orders", feed_credential=…)"""
)
@click.argument("name")
@setting_flags(*WHERE)
@json_option
def add(name: str, as_json: bool, **flags: Any) -> None:
    """Make a service's credential for the revocation feed, and show it once."""
    from coatcheck.server.cli.work import run

    credential = run(_add(gathered(flags).settings, name))
    emit({"client": name, "feed_credential": credential}, credential, as_json=as_json)
    talk(
        f"Shown this once, and kept nowhere: give it to {name} as a secret, for "
        "Verifier(issuer, audience=…, feed_credential=…). It reads what is denied and opens nothing else."
    )


@client.command("list")
@setting_flags(*WHERE)
@json_option
def list_(as_json: bool, **flags: Any) -> None:
    """List the services that have a credential."""
    from coatcheck.server.cli.work import run

    found = run(_list(gathered(flags).settings))
    emit(
        {"clients": [{"name": each.name, "created_at": each.created_us / _SECOND_US} for each in found]},
        *table(("NAME", "CREATED"), [(each.name, moment(each.created_us / _SECOND_US)) for each in found]),
        as_json=as_json,
    )
    if not found:
        talk("no service has a credential yet: coatcheck client add NAME")


@client.command()
@click.argument("name")
@setting_flags(*WHERE)
@json_option
def remove(name: str, as_json: bool, **flags: Any) -> None:
    """Take a service's credential away: it opens nothing from the next request on."""
    from coatcheck.server.cli.work import run

    if not run(_remove(gathered(flags).settings, name)):
        raise Failed(f"no client has the name {name}; `coatcheck client list` shows the names")
    emit({"removed": name}, f"removed {name}", as_json=as_json)


async def _add(settings: ServerSettings, name: str) -> str:
    from coatcheck.server.cli.work import working

    async with working(settings) as service:
        return await service.clients.add(name)


async def _list(settings: ServerSettings) -> tuple[Client, ...]:
    from coatcheck.server.cli.work import working

    async with working(settings) as service:
        return await service.clients.list()


async def _remove(settings: ServerSettings, name: str) -> bool:
    from coatcheck.server.cli.work import working

    async with working(settings) as service:
        return await service.clients.remove(name)
