"""Profiles are choices that check themselves; a server takes them over field by field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from datetime import timedelta
from typing import Any

import pytest

from coatcheck import Profile
from coatcheck.core.binding import BindingPolicy
from coatcheck.core.profiles import PROFILES, SHORT_TOKEN, UNENFORCED, RoleLimit, costs_of
from coatcheck.errors import ConfigurationError
from coatcheck.server.settings import OVERRIDES, ServerSettings
from coatcheck.settings import SessionLimit, Settings, TokenSettings

HTTPS = "https://id.example"
RUNNING = [name for name, profile in PROFILES.items() if not profile.awaits]
WAITING = [name for name, profile in PROFILES.items() if profile.awaits]
BLOCKING = BindingPolicy(network="prefix", on_mismatch="block")


def server(name: str, **more: Any) -> ServerSettings:
    if PROFILES[name].carries == "audience_tokens":
        more.setdefault("audiences", ("orders",))
    return ServerSettings(profile=name, **more)


def refusal(profile: Profile, **changes: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        replace(profile, **changes)
    return caught.value.detail


# -- the table -----------------------------------------------------------------------------------------------------


def test_a_profile_is_found_by_its_own_name() -> None:
    assert list(PROFILES) == ["admin", "b2c", "bank", "microservices", "oauth"]
    for name, profile in PROFILES.items():
        assert Profile.named(name) is profile
        assert name == profile.name
        assert profile.version >= 1
        assert profile.summary
        assert profile.audience


@pytest.mark.parametrize(
    ("name", "carries", "idle", "absolute", "signed_in_twice", "same_site", "outage"),
    [
        ("admin", "session", 30, 12 * 60, (1, "evict_oldest"), "Lax", "refuse"),
        ("b2c", "tokens", 7 * 24 * 60, 30 * 24 * 60, (10, "evict_oldest"), "Lax", "near"),
        ("bank", "session", 5, 60, (1, "refuse"), "Strict", "refuse"),
        ("microservices", "audience_tokens", 30, 12 * 60, (None, "allow"), "Lax", "near"),
        ("oauth", "tokens", 7 * 24 * 60, 30 * 24 * 60, (None, "allow"), "Lax", "refuse"),
    ],
)
def test_each_row_of_the_table_is_decided(
    name: str, carries: str, idle: int, absolute: int, signed_in_twice: object, same_site: str, outage: str
) -> None:
    profile = PROFILES[name]
    assert (profile.carries, profile.same_site, profile.outage) == (carries, same_site, outage)
    assert profile.carries_tokens is (carries != "session")
    assert (profile.idle_timeout, profile.absolute_timeout) == (timedelta(minutes=idle), timedelta(minutes=absolute))
    assert profile.limit_of("admin") == profile.limit_of(None) == signed_in_twice
    assert not profile.persistent


def test_only_the_bank_turns_a_request_from_elsewhere_away() -> None:
    assert PROFILES["bank"].binding.on_mismatch == "block"
    assert PROFILES["bank"].binding.network == "prefix"
    assert {name for name, each in PROFILES.items() if each.binding.on_mismatch != "notify"} == {"bank"}


def test_the_profile_of_the_provider_says_that_it_follows() -> None:
    assert "follows with the provider" in PROFILES["oauth"].summary


@pytest.mark.parametrize("profile", PROFILES.values(), ids=lambda profile: profile.name)
def test_no_profile_contradicts_itself(profile: Profile) -> None:
    assert replace(profile) == profile
    Settings(
        idle_timeout=profile.idle_timeout,
        absolute_timeout=profile.absolute_timeout,
        tokens=TokenSettings(access_lifetime=profile.access_lifetime) if profile.carries_tokens else None,
        outage=profile.outage,
        public_url=HTTPS,
    )


def test_a_profile_cannot_be_changed_while_a_server_runs() -> None:
    for each in fields(Profile):
        with pytest.raises(FrozenInstanceError):
            setattr(PROFILES["admin"], each.name, None)


def test_what_is_said_not_to_be_enforced_is_a_field() -> None:
    assert set(UNENFORCED) <= {each.name for each in fields(Profile)}


def test_costs_name_tokens_only_where_there_are_some() -> None:
    for profile in PROFILES.values():
        assert any("refresh" in cost.request for cost in costs_of(profile)) is profile.carries_tokens


# -- contradictions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("admin", {"idle_timeout": timedelta(hours=12, microseconds=1)}, "idle_timeout: must not be longer than abs"),
        ("admin", {"absolute_timeout": timedelta(minutes=29)}, "idle_timeout: must not be longer than absolute_timeou"),
        ("admin", {"idle_timeout": timedelta(0)}, "idle_timeout: from 1 second to 400 days"),
        ("admin", {"absolute_timeout": timedelta(days=401)}, "absolute_timeout: from 1 second to 400 days"),
        ("admin", {"step_up": timedelta(0)}, "step_up: from 1 second"),
        ("admin", {"idle_timeout": 1800}, "idle_timeout: a timedelta, such as"),
        ("b2c", {"idle_timeout": timedelta(minutes=14)}, "access_lifetime: must not be longer than idle_timeout"),
        ("b2c", {"access_lifetime": timedelta(days=8)}, "access_lifetime: must not be longer than idle_timeout"),
        ("microservices", {"access_lifetime": timedelta(minutes=16)}, "access_lifetime: tokens of one audience are sh"),
        ("admin", {"on_limit": "refuse", "max_sessions": None}, "on_limit: refuse needs a limit"),
        ("admin", {"on_limit": "ask", "max_sessions": None}, "on_limit: ask needs a limit"),
        ("admin", {"on_limit": "evict_oldest", "max_sessions": None}, "on_limit: evict_oldest needs a limit"),
        ("admin", {"on_limit": "allow"}, "max_sessions: a limit that allows the next sign-in is none"),
        ("admin", {"on_limit": "maybe"}, "on_limit: one of allow, evict_oldest, refuse, ask"),
        ("admin", {"max_sessions": 0}, "max_sessions: at least 1"),
        ("bank", {"outage": "near"}, "outage: near serves requests that nobody can block"),
        ("b2c", {"binding": BLOCKING}, "outage: near serves requests that nobody can block"),
        ("b2c", {"binding": replace(BLOCKING, on_mismatch="revoke")}, "outage: near serves requests that nobody can"),
        ("admin", {"carries": "paper"}, "carries: one of session, tokens, audience_tokens"),
        ("admin", {"same_site": "None"}, "same_site: one of Strict, Lax"),
        ("admin", {"outage": "hope"}, "outage: one of refuse, near, anonymous"),
        ("admin", {"name": "back office"}, "name: letters, digits"),
        ("admin", {"version": 0}, "version: 1 or more"),
    ],
    ids=str,
)
def test_a_contradiction_is_refused_by_its_field_and_the_cure(name: str, changes: dict[str, Any], told: str) -> None:
    assert refusal(PROFILES[name], **changes).startswith(told)


def test_limits_of_time_hold_at_their_exact_bounds() -> None:
    admin, services = PROFILES["admin"], PROFILES["microservices"]
    assert replace(admin, idle_timeout=admin.absolute_timeout).idle_timeout == timedelta(hours=12)
    assert replace(admin, idle_timeout=timedelta(seconds=1)).idle_timeout == timedelta(seconds=1)
    assert replace(services, access_lifetime=SHORT_TOKEN).access_lifetime == SHORT_TOKEN
    refusal(services, access_lifetime=SHORT_TOKEN + timedelta(microseconds=1))


def test_where_no_token_is_handed_out_its_lifetime_contradicts_nothing() -> None:
    assert replace(PROFILES["admin"], idle_timeout=timedelta(minutes=5)).access_lifetime == timedelta(minutes=15)


def test_binding_that_only_asks_for_more_may_go_on_through_an_outage() -> None:
    assert replace(PROFILES["b2c"], binding=replace(BLOCKING, on_mismatch="step_up")).outage == "near"
    assert replace(PROFILES["b2c"], binding=BindingPolicy(on_mismatch="block")).outage == "near", "it compares nothing"


def test_a_role_has_the_limit_of_its_own() -> None:
    shop = replace(
        PROFILES["b2c"],
        role_limits=(
            RoleLimit(role="admin", max_sessions=1, on_limit="refuse"),
            RoleLimit(role="kiosk", max_sessions=None, on_limit="allow"),
        ),
    )
    assert shop.limit_of("admin") == (1, "refuse")
    assert shop.limit_of("kiosk") == (None, "allow")
    assert shop.limit_of("user") == (10, "evict_oldest")


@pytest.mark.parametrize(
    ("limits", "told"),
    [
        ([("admin", 1, "maybe")], "role_limits: 'admin': on_limit: one of allow"),
        ([("admin", None, "refuse")], "role_limits: 'admin': on_limit: refuse needs a limit"),
        ([("admin", 0, "refuse")], "role_limits: 'admin': max_sessions: at least 1"),
        ([("admin", 1, "ask"), ("admin", 2, "ask")], "role_limits: one role stands there twice"),
    ],
    ids=str,
)
def test_a_limit_of_a_role_is_checked_like_the_profiles_own(limits: list[Any], told: str) -> None:
    roles = tuple(RoleLimit(role=role, max_sessions=most, on_limit=answer) for role, most, answer in limits)
    assert refusal(PROFILES["b2c"], role_limits=roles).startswith(told)


# -- a server ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RUNNING)
def test_a_server_takes_over_what_its_profile_says(name: str) -> None:
    profile = PROFILES[name]
    settings = server(name).sessions(None)
    assert (settings.idle_timeout, settings.absolute_timeout) == (profile.idle_timeout, profile.absolute_timeout)
    assert settings.outage == profile.outage
    assert settings.session_cookie.same_site == profile.same_site
    assert (settings.tokens is not None) == profile.carries_tokens
    if settings.tokens is not None:
        assert settings.tokens.access_lifetime == profile.access_lifetime
    if profile.max_sessions is None:
        assert settings.limit is None
    else:
        assert settings.limit == SessionLimit(maximum=profile.max_sessions, on_reached=profile.on_limit)


@pytest.mark.parametrize("name", WAITING)
def test_a_profile_that_cannot_keep_its_promise_yet_does_not_start(name: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        server(name).sessions(None)
    assert caught.value.detail.startswith(f"profile: {name} needs what this release does not have: ")
    assert "take another one" in caught.value.detail


def test_every_field_can_be_overridden() -> None:
    settings = ServerSettings(
        profile="b2c",
        idle_timeout=timedelta(hours=1),
        absolute_timeout=timedelta(hours=2),
        access_lifetime=timedelta(minutes=1),
        same_site="Strict",
        max_sessions=3,
        on_limit="ask",
        outage="anonymous",
        reuse_grace=timedelta(seconds=5),
        token_algorithm="EdDSA",
        audiences=("orders", "shop"),
    ).sessions(None)
    assert (settings.idle_timeout, settings.absolute_timeout) == (timedelta(hours=1), timedelta(hours=2))
    assert settings.limit == SessionLimit(maximum=3, on_reached="ask")
    assert settings.session_cookie.same_site == "Strict"
    assert settings.outage == "anonymous"
    assert settings.tokens == TokenSettings(
        access_lifetime=timedelta(minutes=1),
        reuse_grace=timedelta(seconds=5),
        algorithm="EdDSA",
        audiences=("orders", "shop"),
    )


def test_what_a_server_overrides_are_fields_of_a_profile_and_the_rest_stays() -> None:
    assert set(OVERRIDES) <= {each.name for each in fields(Profile)} & {each.name for each in fields(ServerSettings)}
    assert ServerSettings(profile="b2c").decided == PROFILES["b2c"]
    changed = ServerSettings(profile="b2c", max_sessions=2).decided
    assert changed == replace(PROFILES["b2c"], max_sessions=2)


@pytest.mark.parametrize(("url", "name"), [(HTTPS, "__Host-Http-session"), (None, "coatcheck_session")])
def test_the_cookie_of_a_strict_server_keeps_the_name_that_its_address_gives_it(url: str | None, name: str) -> None:
    cookie = ServerSettings(public_url=url, same_site="Strict").sessions(None).session_cookie
    assert (cookie.name, cookie.same_site, cookie.secure) == (name, "Strict", url is not None)


def test_allowing_every_sign_in_sets_the_limit_of_the_profile_aside() -> None:
    assert ServerSettings(on_limit="allow").sessions(None).limit is None
    with pytest.raises(ConfigurationError, match="max_sessions: a limit that allows"):
        ServerSettings(on_limit="allow", max_sessions=3).sessions(None)


def test_a_profile_that_would_serve_near_copies_refuses_where_there_are_none() -> None:
    assert ServerSettings(profile="b2c", near_copies=0).sessions(None).outage == "refuse"
    with pytest.raises(ConfigurationError, match="outage: near needs near_copies"):
        ServerSettings(profile="b2c", near_copies=0, outage="near").sessions(None)


def test_services_that_have_no_audience_do_not_start() -> None:
    with pytest.raises(ConfigurationError, match=r"audiences: .* name them with --audience"):
        ServerSettings(profile="microservices").sessions(None)


@pytest.mark.parametrize("name", ["", "B2C", "bank ", "none"])
def test_a_profile_nobody_knows_is_refused_by_naming_those_that_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match="profile: one of admin, b2c, bank, microservices, oauth"):
        ServerSettings(profile=name)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("idle_timeout", timedelta(minutes=5), r"^access_lifetime: .* \(profile b2c\)$"),
        ("idle_timeout", timedelta(days=31), r"^idle_timeout: .* \(profile b2c\)$"),
        ("access_lifetime", timedelta(days=8), r"^access_lifetime: .* \(profile b2c\)$"),
        ("access_lifetime", timedelta(0), r"^access_lifetime: "),
        ("access_lifetime", timedelta(seconds=5), r"^tokens.access_lifetime: "),
        ("max_sessions", 0, r"^max_sessions: at least 1"),
        ("max_sessions", 101, r"^limit: larger than max_sessions_per_subject"),
        ("on_limit", "later", r"^on_limit: one of "),
        ("same_site", "None", r"^same_site: one of "),
        ("reuse_grace", timedelta(seconds=301), r"^tokens.reuse_grace"),
        ("token_algorithm", "none", r"^tokens.algorithm"),
        ("token_algorithm", "es256", r"^tokens.algorithm"),
        ("audiences", ("a b",), r"^tokens.audiences"),
    ],
    ids=str,
)
def test_an_override_that_weakens_or_contradicts_does_not_start(field: str, value: object, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        ServerSettings(profile="b2c", **{field: value}).sessions(None)  # type: ignore[arg-type]
