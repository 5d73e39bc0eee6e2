# ruff: noqa: S104 - 0.0.0.0 is here to be refused

from __future__ import annotations

import os
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from coatcheck.errors import ConfigurationError
from coatcheck.server.cli.options import FLAGS
from coatcheck.server.settings import SECRETS, ServerSettings, gather, unknown_variables
from coatcheck.stores.sqlite.driver import path_of

KEY = "ab" * 32


def _seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


# Field: (default, as a flag, in the environment, in the file), and what the last three mean.
FIELDS: dict[str, tuple[Any, Any, str, str, Any, Any, Any]] = {
    "host": ("127.0.0.1", "127.0.0.2", "127.0.0.3", '"127.0.0.4"', "127.0.0.2", "127.0.0.3", "127.0.0.4"),
    "port": (8000, "1", "2", "3", 1, 2, 3),
    "home": (Path(".coatcheck"), "a", "b", '"c"', Path("a"), Path("b"), Path("c")),
    "database": (None, "sqlite:///a", "sqlite:///b", '"sqlite:///c"', "sqlite:///a", "sqlite:///b", "sqlite:///c"),
    "store": (None, "sqlite:///a", "memory:", '"sqlite:///c"', "sqlite:///a", "memory:", "sqlite:///c"),
    "public_url": (
        None,
        "https://a.example",
        "https://b.example",
        '"https://c.example"',
        "https://a.example",
        "https://b.example",
        "https://c.example",
    ),
    "name": ("Coatcheck", "A", "나", '"C"', "A", "나", "C"),
    "namespace": ("coatcheck", "a", "b", '"c"', "a", "b", "c"),
    "profile": ("admin", "b2c", "b2c", '"b2c"', "b2c", "b2c", "b2c"),
    "access_lifetime": (None, "10", "20", "30", _seconds(10), _seconds(20), _seconds(30)),
    "same_site": (None, "Strict", "Lax", '"Strict"', "Strict", "Lax", "Strict"),
    "max_sessions": (None, "1", "2", "3", 1, 2, 3),
    "on_limit": (None, "ask", "allow", '"refuse"', "ask", "allow", "refuse"),
    "reuse_grace": (_seconds(30), "0", "10", "300", _seconds(0), _seconds(10), _seconds(300)),
    "token_algorithm": ("ES256", "EdDSA", "RS256", '"HS256"', "EdDSA", "RS256", "HS256"),
    "audiences": ((), ("a", "b"), "c, d", '["e"]', ("a", "b"), ("c", "d"), ("e",)),
    "idle_timeout": (None, "1", "2.5", "3", _seconds(1), _seconds(2.5), _seconds(3)),
    "absolute_timeout": (None, "1", "2", "3.5", _seconds(1), _seconds(2), _seconds(3.5)),
    "store_deadline": (timedelta(seconds=2), "1", "0.5", "3", _seconds(1), _seconds(0.5), _seconds(3)),
    "near_copies": (100_000, "0", "10", "20", 0, 10, 20),
    "lease": (timedelta(seconds=1), "2", "0.5", "3", _seconds(2), _seconds(0.5), _seconds(3)),
    "outage": (None, "near", "anonymous", '"refuse"', "near", "anonymous", "refuse"),
    "outage_grace": (timedelta(seconds=60), "2", "0.5", "3", _seconds(2), _seconds(0.5), _seconds(3)),
    "replicas": (0, "1", "2", "3", 1, 2, 3),
    "trusted_proxies": (
        (),
        ("10.0.0.1", "10.0.0.2"),
        "10.0.0.3, 10.0.0.4",
        '["10.0.0.5"]',
        ("10.0.0.1", "10.0.0.2"),
        ("10.0.0.3", "10.0.0.4"),
        ("10.0.0.5",),
    ),
    "trusted_origins": (
        (),
        ("https://a.example",),
        "https://b.example,https://c.example",
        '["https://d.example"]',
        ("https://a.example",),
        ("https://b.example", "https://c.example"),
        ("https://d.example",),
    ),
    "role_limits": (
        (),
        ("a=1:ask",),
        "b=allow, c=2:refuse",
        '["d=3:ask"]',
        ("a=1:ask",),
        ("b=allow", "c=2:refuse"),
        ("d=3:ask",),
    ),
    "persistent": (None, "yes", "no", "true", True, False, True),
    "bind_network": (None, "off", "exact", '"prefix"', "off", "exact", "prefix"),
    "bind_user_agent": (None, "no", "yes", "false", False, True, False),
    "bind_device": (None, "no", "yes", "false", False, True, False),
    "on_mismatch": (None, "notify", "step_up", '"step_up"', "notify", "step_up", "step_up"),
    "block_for": (None, "60", "120", "180", 60, 120, 180),
    "geo": ((), ("a", "b"), "c, d", '["e"]', ("a", "b"), ("c", "d"), ("e",)),
    "risk_rules": (None, "a.toml", "b.toml", '"c.toml"', Path("a.toml"), Path("b.toml"), Path("c.toml")),
    "forward": (False, True, "no", "true", True, False, True),
    "forward_rules": ((), ("a=b",), "c=d+e, f=g", '["h=i"]', ("a=b",), ("c=d+e", "f=g"), ("h=i",)),
    "forward_audience": (None, "a", "b", '"c"', "a", "b", "c"),
    "insecure_http": (False, True, "no", "true", True, False, True),
    "server_key": (None, KEY, "cd" * 32, f'"{"ef" * 32}"', KEY, "cd" * 32, "ef" * 32),
    "metrics_token": (None, "a", "b", '"c"', "a", "b", "c"),
}


def write(directory: Path, text: str) -> None:
    (directory / "coatcheck.toml").write_text(text, "utf-8")


def refusal(directory: Path, environ: dict[str, str] | None = None, **flags: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        gather(flags, environ or {}, directory)
    return caught.value.detail


def test_every_field_is_in_the_table_of_this_file() -> None:
    assert set(FIELDS) == {each.name for each in fields(ServerSettings)}


@pytest.mark.parametrize("field", FIELDS)
def test_a_flag_beats_the_environment_which_beats_the_file_which_beats_the_default(field: str, tmp_path: Path) -> None:
    default, flag, variable, text, from_flag, from_environment, from_file = FIELDS[field]

    def value(flags: dict[str, object], environ: dict[str, str]) -> tuple[object, str]:
        found = gather(flags, environ, tmp_path)
        return getattr(found.settings, field), found.sources[field]

    assert value({}, {}) == (default, "default")
    write(tmp_path, f"{field} = {text}\n")
    assert value({}, {}) == (from_file, "file")
    environ = {f"COATCHECK_{field.upper()}": variable}
    assert value({}, environ) == (from_environment, "environment")
    assert value({field: flag}, environ) == (from_flag, "flag")


def test_every_field_but_secrets_has_a_flag() -> None:
    assert set(FLAGS) == set(FIELDS) - SECRETS


@pytest.mark.parametrize("field", sorted(SECRETS))
def test_a_secret_is_read_from_the_file_a_variable_names_and_never_shown(field: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(f"{KEY}\n")
    found = gather({}, {f"COATCHECK_{field.upper()}_FILE": str(secret)}, tmp_path)
    assert getattr(found.settings, field) == KEY
    assert KEY not in repr(found)


def test_an_empty_variable_is_no_variable(tmp_path: Path) -> None:
    found = gather({}, {"COATCHECK_PORT": "", "COATCHECK_SERVER_KEY_FILE": ""}, tmp_path)
    assert found.sources["port"] == found.sources["server_key"] == "default"


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_secret_that_cannot_be_read_is_named_by_its_variable(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    told = refusal(tmp_path, {"COATCHECK_SERVER_KEY_FILE": str(tmp_path / "key")})
    assert told == "COATCHECK_SERVER_KEY_FILE: cannot be read"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prot = 1", "unknown setting 'prot'"),
        ("port = ", "coatcheck.toml: "),
        ("port = true", "port (from the file)"),
        ("port = 80.5", "port (from the file)"),
        ("name = 5", "name (from the file)"),
        ("name = ['a']", "name (from the file)"),
        ('home = "a\\u0000b"', "home (from the file)"),
        ("insecure_http = 'maybe'", "insecure_http (from the file)"),
        ("trusted_proxies = 5", "trusted_proxies (from the file)"),
        ("idle_timeout = nan", "idle_timeout (from the file)"),
        ("idle_timeout = 1e300", "idle_timeout (from the file)"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_source(text: str, told: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    assert told in refusal(tmp_path)


def test_a_settings_file_that_is_named_must_exist_and_one_that_is_not_need_not(tmp_path: Path) -> None:
    assert gather({}, {}, tmp_path).sources["port"] == "default"
    assert "there is no such file" in refusal(tmp_path, {"COATCHECK_CONFIG": str(tmp_path / "other.toml")})
    (tmp_path / "other.toml").write_text("port = 7")
    assert gather({}, {"COATCHECK_CONFIG": str(tmp_path / "other.toml")}, tmp_path).settings.port == 7


def test_a_settings_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "coatcheck.toml").mkdir()
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_beyond_its_range_is_refused(port: int) -> None:
    assert ServerSettings(port=0).port == 0
    assert ServerSettings(port=65535).port == 65535
    with pytest.raises(ConfigurationError, match="port"):
        ServerSettings(port=port)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        # Anybody on the way could take the cookie.
        ({"host": "0.0.0.0"}, "host: "),
        ({"host": "192.0.2.1"}, "host: "),
        ({"public_url": "http://id.example"}, "host: "),
        ({"host": "192.0.2.1", "public_url": "http://127.0.0.1:8000"}, "host: "),
        # Nobody knows which origin forms will come from.
        ({"host": "0.0.0.0", "insecure_http": True}, "public_url: "),
        ({"host": "::", "insecure_http": True}, "public_url: "),
        ({"host": "", "insecure_http": True}, "public_url: "),
        # Every server would have its own users for the same sessions.
        ({"host": "0.0.0.0", "public_url": "https://id.example", "store": "redis://cache"}, "database: "),
        ({"host": "0.0.0.0", "public_url": "https://id.example", "store": "memory:"}, "store: "),
        ({"host": "0.0.0.0", "public_url": "https://id.example", "store": "MEMORY:"}, "store: "),
        ({"public_url": "http://["}, "public_url: "),
        ({"trusted_proxies": ("0.0.0.0/0",)}, "trusted_proxies: "),
        ({"trusted_proxies": ("nginx",)}, "trusted_proxies: "),
        ({"name": ""}, "name: "),
        ({"name": "a" * 61}, "name: "),
        ({"name": "a\x1b[31m"}, "name: "),
    ],
)
def test_unsafe_settings_are_refused_by_the_name_of_the_field(given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ServerSettings(**given)
    assert caught.value.detail.startswith(told)


@pytest.mark.parametrize("store", ["redis://[broken", "postgresql://[::1"])
def test_a_url_that_cannot_be_read_is_no_crash(store: str) -> None:
    ServerSettings(store=store, database="sqlite:///a.db")
    with pytest.raises(ConfigurationError):
        ServerSettings(store=store, host="0.0.0.0", public_url="https://id.example")


def test_plain_http_beyond_this_machine_can_be_had_by_saying_so() -> None:
    settings = ServerSettings(host="192.0.2.1", insecure_http=True)
    assert settings.browser_url == "http://192.0.2.1:8000"
    assert not settings.sessions(None).is_https


def test_the_browsers_address_follows_from_host_and_port() -> None:
    assert ServerSettings(host="::1").browser_url == "http://[::1]:8000"
    assert ServerSettings(public_url="https://id.example/").browser_url == "https://id.example"


@pytest.mark.parametrize("name", ["plain", "with space", "a%20b", "what?", "piece#1", "한글"])
def test_a_home_directory_may_have_any_name(name: str, tmp_path: Path) -> None:
    settings = ServerSettings(home=tmp_path / name)
    assert path_of(settings.database_url) == os.path.join(tmp_path, name, "coatcheck.db")
    assert settings.store_url == settings.database_url


def test_a_relative_home_is_below_the_working_directory() -> None:
    assert path_of(ServerSettings(home=Path("a/b")).database_url) == os.path.abspath("a/b/coatcheck.db")


def test_a_mistyped_variable_is_told_before_the_server_starts() -> None:
    environ = {"COATCHECK_IDLE_TIMOUT": "5", "COATCHECK_PORT": "1", "COATCHECK_SERVER_KEY_FILE": "/k", "PATH": "/bin"}
    assert unknown_variables(environ) == ("COATCHECK_IDLE_TIMOUT",)
