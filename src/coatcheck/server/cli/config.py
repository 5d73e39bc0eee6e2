"""`coatcheck config`: what the settings are, where each came from, whether they fit together.

It must never print a secret: keys and tokens are shown as set or not, and URLs without their passwords.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from coatcheck.server.cli.options import FLAGS, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option, table

if TYPE_CHECKING:
    from coatcheck.server.settings import ServerSettings

_HIDDEN: Final = "***"
_SECRET_WORDS: Final = re.compile(r"pass|secret|token|key|credential", re.IGNORECASE)


@click.group()
def config() -> None:
    """Show and check the settings."""


@config.command()
@setting_flags(*FLAGS)
@json_option
def show(as_json: bool, **flags: Any) -> None:
    """Show every setting and where it came from; secrets are not shown."""
    found = gathered(flags)
    values = shown(found.settings)
    emit(
        {"settings": {name: {"value": values[name], "source": found.sources[name]} for name in values}},
        *table(
            ("SETTING", "VALUE", "FROM"),
            [(name, _text(values[name]), found.sources[name]) for name in values],
        ),
        as_json=as_json,
    )


@config.command()
@setting_flags(*FLAGS)
@json_option
def check(as_json: bool, **flags: Any) -> None:
    """Check the settings without connecting to anything; status 2 when something is wrong."""
    from coatcheck.server.database import open_database
    from coatcheck.server.serving import check_start
    from coatcheck.server.settings import unknown_variables
    from coatcheck.stores.open import open_store

    settings = gathered(flags).settings
    open_database(settings.database_url, namespace=settings.namespace)
    deadline = settings.store_deadline.total_seconds()
    open_store(settings.store_url, colour="async", namespace=settings.namespace, deadline=deadline)
    unknown = [f"{name} is no setting of the server" for name in unknown_variables(os.environ)]
    warnings = [*unknown, *check_start(settings)]
    emit(
        {"status": "ok", "warnings": list(warnings)},
        "the settings are fine",
        *(f"warning: {line}" for line in warnings),
        as_json=as_json,
    )


def shown(settings: ServerSettings) -> dict[str, object]:
    """Every setting in effect, as it may be shown to anybody."""
    from coatcheck.server.settings import SECRETS

    values: dict[str, object] = {}
    for name, value in vars(settings).items():
        if name in SECRETS:
            values[name] = None if value is None else "(set)"
        elif isinstance(value, timedelta):
            values[name] = value.total_seconds()
        elif isinstance(value, Path):
            values[name] = str(value)
        elif isinstance(value, tuple):
            values[name] = [redacted(str(each)) for each in value]
        else:
            values[name] = value
    values |= {
        "database": redacted(settings.database_url),
        "store": redacted(settings.store_url),
        "public_url": redacted(settings.browser_url),
    }
    return values


def redacted(url: str) -> str:
    """A URL without its passwords. What cannot be read is not shown at all."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _HIDDEN
    if parts.netloc and "@" in f"{parts.path}{parts.query}{parts.fragment}":
        # A `#`, `?` or `/` inside the password: what was read as host and path is a piece of it.
        return f"{parts.scheme}://{_HIDDEN}"
    user, at, place = parts.netloc.rpartition("@")
    if at:
        name, colon, _ = user.partition(":")
        # Without a colon it may be a name or a token, and only its owner knows.
        user = f"{name}:{_HIDDEN}" if colon else _HIDDEN
    start = f"{parts.scheme}://{user}{at}{place}{parts.path}" if parts.netloc else url.partition("?")[0]
    query = "&".join(
        f"{name}={_HIDDEN}" if _SECRET_WORDS.search(name) else f"{name}{equals}{value}"
        for name, equals, value in (each.partition("=") for each in parts.query.split("&"))
    )
    return f"{start}?{query}" if query else start


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
