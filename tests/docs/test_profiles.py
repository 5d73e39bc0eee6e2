"""The page about profiles is what the code decides."""

from __future__ import annotations

from dataclasses import fields

from coatcheck.core.profiles import PROFILES, SHORT_TOKEN, UNENFORCED, Profile
from coatcheck.server.cli.serve import serve
from coatcheck.server.settings import BINDING, OVERRIDES
from tests.docs.test_reference import REFERENCE, rows

PAGE = (REFERENCE / "profiles.md").read_text("utf-8")
DESCRIBING = {"name", "version", "summary", "audience", "awaits"}


def test_every_row_is_the_profile() -> None:
    assert rows(PAGE, "profile", "for") == [
        [
            f"`{each.name}`",
            each.audience,
            f"`{each.carries}`",
            f"{int(each.idle_timeout.total_seconds())} s",
            f"{int(each.absolute_timeout.total_seconds())} s",
            f"{int(each.access_lifetime.total_seconds())} s" if each.carries_tokens else "none",
            each.same_site,
            f"{each.max_sessions or 'any'}, `{each.on_limit}`",
            f"`{each.outage}`",
            "not yet" if each.awaits else "yes",
        ]
        for each in PROFILES.values()
    ]
    assert f"longer than {int(SHORT_TOKEN.total_seconds())} s where" in PAGE
    assert not any(each.persistent for each in PROFILES.values())


def test_every_field_is_described_with_the_setting_that_takes_its_place() -> None:
    found = {
        row[0].strip("`"): {each.strip("`") for each in row[2].split(", ") if each}
        for row in rows(PAGE, "field", "decides")
    }
    assert set(found) == {each.name for each in fields(Profile)} - DESCRIBING
    settings = {name: {name} for name in OVERRIDES} | {"role_limits": {"role_limits"}, "binding": set(BINDING)}
    assert {name: flags for name, flags in found.items() if flags} == {
        name: {_spelling(each) for each in several} for name, several in settings.items()
    }


def _spelling(setting: str) -> str:
    """The flag of a setting, as `serve --help` has it."""
    option = next(each for each in serve.params if each.name == setting)
    return option.opts[0]


def test_what_is_not_enforced_is_named() -> None:
    told = PAGE.partition("The field ")[2].partition(" is shown")[0].split()
    assert {name.strip("`,") for name in told} - {"and"} == set(UNENFORCED)
