"""`coatcheck profile`: the decisions behind a name, their costs, how late a revoke is seen, what a switch changes.

Decides the words alone; the decisions stand in `core/profiles.py`. What this release prints and does not carry out yet
is marked, and so is a profile that a server would not start with. It must never ask a store or read a setting.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import click

from coatcheck.server.cli.output import emit, json_option, table

if TYPE_CHECKING:
    from coatcheck.core.profiles import Cost, Profile

_TALK: Final = ("name", "version", "summary", "audience", "awaits")
"""Fields that describe a profile and decide nothing."""

_FOR_TOKENS: Final = "access_lifetime"
_APPLIES: Final = {
    "idle_timeout": ("at once", "to new sign-ins"),
    "absolute_timeout": ("at once", "to new sign-ins"),
    "access_lifetime": ("to the next token", "to the next token"),
    "outage": ("at once", "at once"),
    "step_up": ("at once", "at once"),
    "binding": ("at once", "at once"),
}
"""When a field that became stricter applies, and one that became looser; every other one at the next sign-in."""

_WHEN_SIGNING_IN: Final = "to new sign-ins"


@click.group()
def profile() -> None:
    """List the profiles, show one, compare two."""


@profile.command("list")
@json_option
def list_profiles(as_json: bool) -> None:
    """List the profiles and whom each is for."""
    from coatcheck.core.profiles import PROFILES

    found = tuple(PROFILES.values())
    emit(
        {
            "profiles": [
                {"name": each.name, "version": each.version, "for": each.audience, "summary": each.summary}
                | {"runs": not each.awaits}
                for each in found
            ]
        },
        *table(
            ("PROFILE", "FOR", "WHAT IT IS", "RUNS"),
            [(each.name, each.audience, each.summary, "not yet" if each.awaits else "yes") for each in found],
        ),
        as_json=as_json,
    )


@profile.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show what a profile decides, what it costs and how late a revoke is seen."""
    from coatcheck.core.profiles import UNENFORCED, Profile, costs_of

    found = Profile.named(name)
    values, costs, reach = decisions(found), costs_of(found), _reach(found)
    pending = {field: why for field, why in UNENFORCED.items() if field in values}
    emit(
        {
            "name": found.name,
            "version": found.version,
            "summary": found.summary,
            "for": found.audience,
            "runs": not found.awaits,
            "awaits": found.awaits or None,
            "decisions": values,
            "not_enforced": pending,
            "costs": [asdict(cost) for cost in costs],
            "reach_seconds": reach,
        },
        f"{found.name} (version {found.version}): {found.summary}",
        f"for {found.audience}",
        *((f"a server does not start with it yet, it needs {found.awaits}",) if found.awaits else ()),
        "",
        *table(
            ("DECISION", "VALUE", ""),
            [(field, _words(value), "not enforced yet" if field in pending else "") for field, value in values.items()],
        ),
        "",
        *table(
            ("REQUEST", "STORE COMMANDS", ""),
            [(cost.request, str(cost.commands), _note(cost)) for cost in costs],
        ),
        "",
        *table(
            ("AFTER A REVOKE NOBODY IS LET IN", "LATER THAN"), [(where, f"{late:g} s") for where, late in reach.items()]
        ),
        as_json=as_json,
    )


@profile.command()
@click.argument("before", metavar="A")
@click.argument("after", metavar="B")
@json_option
def diff(before: str, after: str, as_json: bool) -> None:
    """Compare two profiles, and say when each difference applies to people who are signed in."""
    from coatcheck.core.profiles import Profile

    first, second = Profile.named(before), Profile.named(after)
    one, other = decisions(first), decisions(second)
    differing = [field for field in dict.fromkeys((*one, *other)) if one.get(field) != other.get(field)]
    applies = {field: _applies(field, one.get(field), other.get(field)) for field in differing}
    lines = table(
        ("DECISION", first.name.upper(), second.name.upper(), "APPLIES"),
        [(field, _words(one.get(field)), _words(other.get(field)), applies[field]) for field in differing],
    )
    emit(
        {
            "from": first.name,
            "to": second.name,
            "differences": {
                field: {"from": one.get(field), "to": other.get(field), "applies": applies[field]}
                for field in differing
            },
        },
        *(lines or ("they decide the same",)),
        as_json=as_json,
    )


def decisions(found: Profile) -> dict[str, object]:
    """What a profile decides, field by field, as JSON has it: durations in seconds. A token that is not handed out has
    no lifetime."""
    values: dict[str, object] = {}
    for each in fields(found):
        value: object = getattr(found, each.name)
        if each.name in _TALK or (each.name == _FOR_TOKENS and not found.carries_tokens):
            continue
        if isinstance(value, timedelta):
            value = value.total_seconds()
        elif each.name == "binding":
            value = asdict(found.binding)
        elif each.name == "role_limits":
            value = [asdict(limit) for limit in found.role_limits]
        values[each.name] = value
    return values


def _reach(found: Profile) -> dict[str, float]:
    """How late, in seconds, with the other settings at their defaults."""
    from coatcheck.settings import Settings, TokenSettings, reach_of, told_after

    settings = Settings(outage=found.outage)
    late = {"on a server": settings.lease.total_seconds()}
    if found.outage == "near":
        late["on a server without its store"] = reach_of(settings).total_seconds()
    if found.carries_tokens:
        verifiers = TokenSettings().verifier_lease.total_seconds()
        late["with an access token at a verifier"] = told_after(verifiers).total_seconds()
    return late


def _note(cost: Cost) -> str:
    often = "" if cost.at_most_every is None else f"at most once in {_span(cost.at_most_every)}"
    return ", ".join(filter(None, (often, cost.note)))


def _applies(field: str, before: object, after: object) -> str:
    tighter, looser = _APPLIES.get(field, (_WHEN_SIGNING_IN, _WHEN_SIGNING_IN))
    if isinstance(before, float) and isinstance(after, float):
        return tighter if after < before else looser
    return tighter


def _words(value: object) -> str:
    if value is None or value == []:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _span(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_part(part)}" for name, part in value.items())
    if isinstance(value, list):
        return "; ".join(map(_words, value))
    return str(value)


def _part(value: object) -> str:
    return _words(value) if isinstance(value, bool) or value is None else str(value)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        # In tenths, where they are exact: 8.4 h is easier to read than 30240 s.
        if seconds >= size and not seconds * 10 % size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:g} s"
