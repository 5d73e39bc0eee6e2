"""Profiles are choices, checked by the settings that are made of them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from datetime import timedelta

import pytest

from coatcheck.core.profiles import PROFILES, Profile
from coatcheck.errors import ConfigurationError
from coatcheck.server.settings import ServerSettings
from coatcheck.settings import Settings, TokenSettings

HTTPS = "https://id.example"


def test_a_profile_is_found_by_its_own_name() -> None:
    assert set(PROFILES) == {"admin", "b2c"}
    assert all(name == profile.name for name, profile in PROFILES.items())
    assert all(profile.version >= 1 and profile.summary for profile in PROFILES.values())


def test_the_back_office_is_short_and_has_the_cookie_alone() -> None:
    profile = PROFILES["admin"]
    assert not profile.carries_tokens
    assert (profile.idle_timeout, profile.absolute_timeout) == (timedelta(minutes=30), timedelta(hours=12))


def test_the_consumer_service_carries_tokens_and_lasts() -> None:
    profile = PROFILES["b2c"]
    assert profile.carries_tokens
    assert (profile.idle_timeout, profile.absolute_timeout) == (timedelta(days=7), timedelta(days=30))
    assert profile.access_lifetime == timedelta(minutes=15)


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_no_profile_contradicts_itself(profile: Profile) -> None:
    assert timedelta(0) < profile.access_lifetime <= profile.idle_timeout <= profile.absolute_timeout
    tokens = TokenSettings(access_lifetime=profile.access_lifetime)
    Settings(
        idle_timeout=profile.idle_timeout,
        absolute_timeout=profile.absolute_timeout,
        tokens=tokens,
        public_url=HTTPS,
    )


def test_a_profile_cannot_be_changed_while_a_server_runs() -> None:
    for each in fields(Profile):
        with pytest.raises(FrozenInstanceError):
            setattr(PROFILES["admin"], each.name, None)


@pytest.mark.parametrize("name", PROFILES)
def test_a_server_takes_over_what_its_profile_says(name: str) -> None:
    profile = PROFILES[name]
    settings = ServerSettings(profile=name).sessions(None)
    assert (settings.idle_timeout, settings.absolute_timeout) == (profile.idle_timeout, profile.absolute_timeout)
    assert (settings.tokens is not None) == profile.carries_tokens
    if settings.tokens is not None:
        assert settings.tokens.access_lifetime == profile.access_lifetime


def test_every_field_can_be_overridden() -> None:
    settings = ServerSettings(
        profile="b2c",
        idle_timeout=timedelta(hours=1),
        absolute_timeout=timedelta(hours=2),
        access_lifetime=timedelta(minutes=1),
        reuse_grace=timedelta(seconds=5),
        token_algorithm="EdDSA",
        audiences=("orders", "shop"),
    ).sessions(None)
    assert (settings.idle_timeout, settings.absolute_timeout) == (timedelta(hours=1), timedelta(hours=2))
    assert settings.tokens == TokenSettings(
        access_lifetime=timedelta(minutes=1),
        reuse_grace=timedelta(seconds=5),
        algorithm="EdDSA",
        audiences=("orders", "shop"),
    )


@pytest.mark.parametrize("name", ["", "B2C", "bank ", "none"])
def test_a_profile_nobody_knows_is_refused_by_naming_those_that_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match="profile: one of admin, b2c"):
        ServerSettings(profile=name)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("idle_timeout", timedelta(minutes=5), "tokens.access_lifetime"),
        ("access_lifetime", timedelta(days=8), "tokens.access_lifetime"),
        ("access_lifetime", timedelta(0), "tokens.access_lifetime"),
        ("reuse_grace", timedelta(seconds=301), "tokens.reuse_grace"),
        ("token_algorithm", "none", "tokens.algorithm"),
        ("token_algorithm", "es256", "tokens.algorithm"),
        ("audiences", ("a b",), "tokens.audiences"),
    ],
)
def test_an_override_that_weakens_or_contradicts_does_not_start(field: str, value: object, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        ServerSettings(profile="b2c", **{field: value}).sessions(None)  # type: ignore[arg-type]
