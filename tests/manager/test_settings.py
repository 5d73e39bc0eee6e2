"""Settings check themselves; the error names the field or the variable, and never repeats a secret."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from coatcheck import AsyncCoatcheck, Coatcheck, ConfigurationError, CookieSettings, SessionLimit, Settings
from coatcheck.settings import DEVELOPMENT_COOKIE, parse_server_key, settings_from_env

SECOND = timedelta(seconds=1)
WRONG: list[tuple[str, Any]] = [
    ("idle_timeout", timedelta(0)),
    ("idle_timeout", timedelta(milliseconds=999)),
    ("idle_timeout", timedelta(hours=13)),
    ("idle_timeout", 30),
    ("absolute_timeout", timedelta(days=400, microseconds=1)),
    ("absolute_timeout", None),
    ("store_deadline", 2.0),
    ("rotation_alias", timedelta(seconds=-1)),
    ("rotation_alias", timedelta(seconds=30, microseconds=1)),
    ("server_key", b"short"),
    ("server_key", b"x" * 33),
    ("server_key", "x" * 32),
    ("max_fields", 0),
    ("max_field_octets", 0),
    ("max_sessions_per_subject", 0),
    ("limit", SessionLimit(maximum=101)),
    ("public_url", "shop.example"),
    ("public_url", "ftp://shop.example"),
    ("public_url", "https://"),
    ("public_url", "https://shop.example/path"),
    ("public_url", "https://shop.example?query"),
    ("public_url", "https://[::1"),
    ("public_url", "https://exa mple"),
    ("public_url", "https://user:secret@shop.example"),
    ("public_url", "https://shop.example:99999"),
    ("public_url", "http://shop.example"),
    ("trusted_origins", frozenset({"*"})),
    ("trusted_origins", frozenset({"null"})),
    ("trusted_proxies", ("0.0.0.0/0",)),
    ("trusted_proxies", ("::/0",)),
    ("trusted_proxies", ("proxy.internal",)),
    ("cookie", CookieSettings(name="plain", secure=False)),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}-{place}" for place, (name, _) in enumerate(WRONG)])
def test_a_wrong_setting_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Settings(**cast(Any, {name: value}))
    assert refused.value.detail.startswith(name)
    assert "secret" not in refused.value.detail.replace("server_key", "")


@pytest.mark.parametrize(
    ("name", "value"), [("namespace", "Upper"), ("namespace", ""), ("store_deadline", timedelta(seconds=61))]
)
def test_what_only_a_store_can_judge_is_refused_when_it_is_opened(name: str, value: object) -> None:
    for kind in (Coatcheck, AsyncCoatcheck):
        with pytest.raises(ConfigurationError, match=f"^{name}"):
            kind("memory:", settings=Settings(**cast(Any, {name: value})))


@pytest.mark.parametrize("limit", [{"maximum": 0}, {"maximum": 1, "on_reached": "explode"}])
def test_a_wrong_limit_is_refused_by_name(limit: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"^limit"):
        SessionLimit(**limit)


@pytest.mark.parametrize(
    "right",
    [
        {"idle_timeout": SECOND, "absolute_timeout": SECOND},
        {"idle_timeout": timedelta(days=400), "absolute_timeout": timedelta(days=400)},
        {"rotation_alias": timedelta(0)},
        {"rotation_alias": timedelta(seconds=30)},
        {"limit": SessionLimit(maximum=100)},
        {"server_key": bytes(32)},
    ],
)
def test_a_setting_at_its_limit_is_accepted(right: dict[str, Any]) -> None:
    assert isinstance(Settings(**right), Settings)


def test_settings_cannot_be_changed_and_show_no_secret() -> None:
    settings = Settings(server_key=b"\xaa" * 32)
    with pytest.raises(AttributeError):
        settings.tenant = "other"  # type: ignore[misc]
    assert "aa" not in repr(settings).replace("namespace", "")
    assert "server_key" not in repr(settings)


@pytest.mark.parametrize(
    ("url", "name", "secure"),
    [
        (None, "__Host-Http-session", True),
        ("https://shop.example", "__Host-Http-session", True),
        ("https://localhost:8443/", "__Host-Http-session", True),
        ("http://localhost:8000", DEVELOPMENT_COOKIE, False),
        ("http://127.0.0.1", DEVELOPMENT_COOKIE, False),
        ("http://[::1]:8000", DEVELOPMENT_COOKIE, False),
    ],
)
def test_the_public_url_fixes_the_cookie(url: str | None, name: str, secure: bool) -> None:
    cookie = Settings(public_url=url).session_cookie
    assert (cookie.name, cookie.secure) == (name, secure)


def test_plain_http_elsewhere_has_to_be_asked_for() -> None:
    settings = Settings(public_url="http://10.0.0.7", insecure_http_for_development=True)
    assert settings.session_cookie.name == DEVELOPMENT_COOKIE


def test_a_secure_cookie_of_ones_own_does_not_go_with_http() -> None:
    with pytest.raises(ConfigurationError, match=r"^cookie\.secure"):
        Settings(public_url="http://localhost", cookie=CookieSettings())


@pytest.mark.parametrize("reached", ["allow", "evict_oldest", "refuse", "ask"])
def test_the_admission_never_passes_the_upper_bound(reached: Any) -> None:
    assert Settings().admission == SessionLimit(maximum=100, on_reached="evict_oldest")
    asked = Settings(limit=SessionLimit(maximum=3, on_reached=reached)).admission
    assert asked == (
        SessionLimit(maximum=100, on_reached="evict_oldest")
        if reached == "allow"
        else SessionLimit(maximum=3, on_reached=reached)
    )


def test_everything_can_come_from_the_environment(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("ab" * 32 + "\n")
    store, settings = settings_from_env(
        {
            "COATCHECK_STORE": "redis://cache",
            "COATCHECK_DATABASE": "postgresql://elsewhere",
            "COATCHECK_NAMESPACE": "shop",
            "COATCHECK_TENANT": "north",
            "COATCHECK_PUBLIC_URL": "https://shop.example",
            "COATCHECK_IDLE_TIMEOUT": "600",
            "COATCHECK_ABSOLUTE_TIMEOUT": "3600",
            "COATCHECK_STORE_DEADLINE": "0.5",
            "COATCHECK_ROTATION_ALIAS": "0",
            "COATCHECK_TRUSTED_PROXIES": "10.0.0.0/8, ::1",
            "COATCHECK_TRUSTED_ORIGINS": "https://admin.example",
            "COATCHECK_SERVER_KEY_FILE": str(key),
        }
    )
    assert store == "redis://cache"
    assert settings == Settings(
        namespace="shop",
        tenant="north",
        public_url="https://shop.example",
        idle_timeout=timedelta(minutes=10),
        absolute_timeout=timedelta(hours=1),
        store_deadline=timedelta(milliseconds=500),
        rotation_alias=timedelta(0),
        trusted_proxies=("10.0.0.0/8", "::1"),
        trusted_origins=frozenset({"https://admin.example"}),
        server_key=b"\xab" * 32,
    )


def test_the_store_defaults_to_the_database() -> None:
    assert settings_from_env({"COATCHECK_DATABASE": "sqlite:///app.db"}) == ("sqlite:///app.db", Settings())


@pytest.mark.parametrize("word", ["1", "true", "YES"])
def test_plain_http_can_be_asked_for_by_environment(word: str) -> None:
    environ = {
        "COATCHECK_STORE": "memory:",
        "COATCHECK_PUBLIC_URL": "http://10.0.0.7",
        "COATCHECK_INSECURE_HTTP_FOR_DEVELOPMENT": word,
    }
    assert settings_from_env(environ)[1].insecure_http_for_development


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({}, "COATCHECK_STORE"),
        ({"COATCHECK_STORE": ""}, "COATCHECK_STORE"),
        ({"COATCHECK_IDLE_TIMEOUT": "soon"}, "COATCHECK_IDLE_TIMEOUT"),
        ({"COATCHECK_IDLE_TIMEOUT": "nan"}, "COATCHECK_IDLE_TIMEOUT"),
        ({"COATCHECK_ABSOLUTE_TIMEOUT": "1e30"}, "COATCHECK_ABSOLUTE_TIMEOUT"),
        ({"COATCHECK_IDLE_TIMEOUT": "0"}, "idle_timeout"),
        ({"COATCHECK_SERVER_KEY": "topsecret"}, "server_key"),
        ({"COATCHECK_SERVER_KEY": "aa" * 31}, "server_key"),
        ({"COATCHECK_SERVER_KEY_FILE": "/nowhere/key"}, "COATCHECK_SERVER_KEY_FILE"),
        ({"COATCHECK_TRUSTED_PROXIES": "0.0.0.0/0"}, "trusted_proxies"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        settings_from_env({"COATCHECK_STORE": "memory:", **environ} if environ else {})
    assert named in refused.value.detail
    assert "topsecret" not in refused.value.detail


def test_a_server_key_is_64_hexadecimal_digits() -> None:
    assert parse_server_key(" " + "0F" * 32 + "\n") == b"\x0f" * 32
    with pytest.raises(ConfigurationError):
        parse_server_key("zz" * 32)
