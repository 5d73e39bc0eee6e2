"""`coatcheck doctor`: what is wrong or weak here, and the cure."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import asdict
from typing import Any

import click

from coatcheck.server.cli.options import FLAGS, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option


@click.command()
@setting_flags(*FLAGS)
@json_option
def doctor(as_json: bool, **flags: Any) -> None:
    """Look for what is wrong or weak, and say the cure. Changes nothing; status 1 when something is wrong."""
    from coatcheck.server.doctor import examine

    logging.getLogger("coatcheck").setLevel(logging.CRITICAL)
    checks = asyncio.run(examine(gathered(flags).settings, environ=os.environ))
    lines: list[str] = []
    for check in checks:
        lines.append(f"{check.status:<4}  {check.name}: {check.found}")
        if check.cure:
            lines.append(f"      cure: {check.cure}")
    failed = any(check.status == "fail" for check in checks)
    emit(
        {"status": "fail" if failed else "ok", "checks": [asdict(check) for check in checks]},
        *lines,
        as_json=as_json,
    )
    if failed:
        raise click.exceptions.Exit(1)
