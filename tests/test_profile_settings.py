"""What a profile becomes: each decision in its field, once, and the same one that a server makes of it."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from coatcheck import CookieSettings, SessionLimit, Settings, TokenSettings
from coatcheck.core.binding import BindingPolicy
from coatcheck.core.profiles import PROFILES, Profile
from coatcheck.errors import ConfigurationError
from coatcheck.profile_settings import DEVELOPMENT_DEVICE_COOKIE, DEVICE_COOKIE, settings_of
from coatcheck.server.settings import ServerSettings

LOCAL = "http://127.0.0.1:8000"
RUNNING = [profile for profile in PROFILES.values() if not profile.awaits]


def base_for(profile: Profile, url: str = LOCAL) -> Settings:
    tokens = TokenSettings(audiences=("orders",)) if profile.carries_tokens else None
    return Settings(public_url=url, tokens=tokens)


@pytest.mark.parametrize("url", [LOCAL, "https://id.example"])
@pytest.mark.parametrize("profile", RUNNING, ids=lambda profile: profile.name)
def test_an_application_decides_as_a_server_of_its_profile(profile: Profile, url: str) -> None:
    ours = settings_of(profile, base_for(profile, url))
    theirs = ServerSettings(profile=profile.name, public_url=url, audiences=("orders",)).sessions(None)
    for name in (
        "profile",
        "profile_version",
        "idle_timeout",
        "absolute_timeout",
        "limit",
        "session_cookie",
        "refresh_cookie",
        "tokens",
        "outage",
        "origins",
    ):
        assert getattr(ours, name) == getattr(theirs, name) or (name == "tokens" and not profile.carries_tokens), name
    assert ours.binding == profile.binding


def test_the_device_cookie_has_the_name_that_a_server_gives_it() -> None:
    profile = Profile.named("b2c")
    assert settings_of(profile, base_for(profile)).device_cookie == DEVELOPMENT_DEVICE_COOKIE
    assert settings_of(profile, base_for(profile, "https://id.example")).device_cookie == DEVICE_COOKIE
    assert settings_of(profile, replace(base_for(profile), device_cookie="mine")).device_cookie == "mine"
    blind = replace(profile, binding=BindingPolicy())
    assert settings_of(blind, base_for(profile)).device_cookie is None


def test_without_a_base_it_is_the_defaults_under_the_profile() -> None:
    found = settings_of(Profile.named("admin"))
    assert found.limit == SessionLimit(maximum=1, on_reached="evict_oldest")
    assert found.namespace == Settings().namespace


def test_a_decision_is_changed_in_the_profile() -> None:
    stricter = replace(Profile.named("admin"), idle_timeout=timedelta(minutes=10), same_site="Strict")
    found = settings_of(stricter, Settings(public_url="https://id.example"))
    assert found.idle_timeout == timedelta(minutes=10)
    assert found.session_cookie == CookieSettings(same_site="Strict")


def test_what_the_profile_does_not_decide_stays() -> None:
    profile = Profile.named("b2c")
    tokens = TokenSettings(issuer="https://id.example", algorithm="EdDSA", reuse_grace=timedelta(seconds=7))
    base = Settings(namespace="shop", server_key=bytes(32), tokens=tokens, lease=timedelta(seconds=2))
    found = settings_of(profile, base)
    assert (found.namespace, found.server_key, found.lease) == ("shop", bytes(32), timedelta(seconds=2))
    assert found.tokens == replace(tokens, access_lifetime=profile.access_lifetime)


@pytest.mark.parametrize(
    ("base", "field"),
    [
        (Settings(idle_timeout=timedelta(minutes=29)), "idle_timeout"),
        (Settings(absolute_timeout=timedelta(hours=1)), "absolute_timeout"),
        (Settings(limit=SessionLimit(maximum=5)), "limit"),
        (Settings(outage="near"), "outage"),
        (Settings(binding=BindingPolicy(user_agent=True)), "binding"),
        (Settings(cookie=CookieSettings(same_site="Strict")), "cookie.same_site"),
        (Settings(public_url=LOCAL, tokens=TokenSettings()), "tokens"),
    ],
)
def test_a_base_that_decides_what_the_profile_does_is_refused(base: Settings, field: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field}: ") as refused:
        settings_of(Profile.named("admin"), base)
    assert "leave" in refused.value.detail


def test_a_lifetime_of_the_base_is_refused_and_the_profiles_own_is_none() -> None:
    profile = Profile.named("microservices")
    for lifetime, accepted in ((timedelta(minutes=5), True), (timedelta(minutes=4), False)):
        base = Settings(public_url=LOCAL, tokens=TokenSettings(audiences=("a",), access_lifetime=lifetime))
        if accepted:
            assert settings_of(profile, base).tokens == base.tokens
        else:
            with pytest.raises(ConfigurationError, match=r"^tokens\.access_lifetime: "):
                settings_of(profile, base)


def test_a_service_without_audiences_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^tokens\.audiences: "):
        settings_of(Profile.named("microservices"), Settings(public_url=LOCAL))


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if profile.awaits])
def test_a_profile_that_cannot_run_says_what_it_waits_for(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^profile: ") as refused:
        settings_of(Profile.named(name))
    assert PROFILES[name].awaits in refused.value.detail
