"""What verbs print: data on stdout, talk on stderr, JSON where it was asked for.

Decides that nothing somebody else wrote (a name, a browser's name for itself) can move the cursor, colour a line or
add one: every control character is shown as its escape.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import IO, Any

import click


def printable(text: str) -> str:
    """The text with every character that is none to look at as its escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def emit(data: Mapping[str, object], *lines: str, as_json: bool) -> None:
    """Print the result: as one JSON object, or as these lines."""
    if as_json:
        # ASCII: a terminal in another encoding shows it, and no character of it can be a control character.
        click.echo(json.dumps(data, ensure_ascii=True, allow_nan=False))
    else:
        for line in lines:
            click.echo(printable(line))


def talk(line: str) -> None:
    """Say something that is not the result."""
    click.echo(printable(line), err=True)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Rows in columns; no line when there is no row."""
    if not rows:
        return ()
    cells = [tuple(heads), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return tuple(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )


def moment(seconds: float) -> str:
    """A time as people read it, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%MZ")


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    """`--json`, which every verb has."""
    decorated: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
    return decorated


class Failed(click.ClickException):
    """It could not be done: one line on stderr, and status 1."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the line."""
        click.echo(f"coatcheck: {printable(self.message)}", file=file or sys.stderr)


class Refused(Failed):
    """The request or a setting is wrong: one line on stderr, and status 2."""

    exit_code = 2
