"""What a project begins with: it is written, it works as it is, and nothing that was there is lost."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from argon2 import PasswordHasher

from coatcheck.core.profiles import PROFILES
from coatcheck.server.cli.init import FRAMEWORKS, GATEWAYS, TARGETS
from coatcheck.server.cli.proxy_config import WRITERS
from coatcheck.server.settings import gather
from coatcheck.settings import parse_server_key
from tests.server.command_parts import answer, clean_environment, refused, run
from tests.servers.nginx import find_nginx

SERVED = ("server", *GATEWAYS)
RUNNING = [name for name, profile in PROFILES.items() if not profile.awaits]
AWAITING = [name for name, profile in PROFILES.items() if profile.awaits]
FILES = {
    "fastapi": {"app.py", "test_app.py"},
    "starlette": {"app.py", "test_app.py"},
    "wsgi": {"app.py", "test_app.py"},
    "server": {"coatcheck.toml", "test_server.py"},
    "nginx": {"nginx.conf", "coatcheck.toml", "test_server.py"},
    "traefik": {"traefik.yaml", "coatcheck.toml", "test_server.py"},
    "caddy": {"Caddyfile", "coatcheck.toml", "test_server.py"},
    "envoy": {"envoy.yaml", "coatcheck.toml", "test_server.py"},
}
HOSTILE_NAMES = [
    "with space",
    "quote'\"quote",
    "$(touch pwned)",
    "-rf",
    "percent%2e",
    "{{ 7 * 7 }}",
    "new\nline",
    "\x1b[2J",
    "외투",
]


@pytest.fixture(autouse=True)
def _empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("argon2.PasswordHasher", partial(PasswordHasher, time_cost=1, memory_cost=8, parallelism=1))
    for name in list(os.environ):
        if name.startswith("COATCHECK_"):
            monkeypatch.delenv(name)
    before = os.umask(0o022)
    yield
    os.umask(before)


def wish(profile: str, target: str, *more: str) -> list[str]:
    """The command for one project."""
    audience = ["--audience", "orders"] if PROFILES[profile].carries == "audience_tokens" else []
    return ["init", "--profile", profile, "--for", target, *audience, *more]


def made(profile: str, target: str, *more: str) -> Path:
    """A project of that name."""
    told = answer(*wish(profile, target, "--directory", f"{profile}_{target}", *more))
    return Path(told["directory"])


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def pytest_of(*directories: Path) -> subprocess.CompletedProcess[str]:
    """The tests of projects as their owners run them, all in one process, with pytest alone: none of the plugins that
    this suite has. Passwords are hashed cheaply there; where there is a key, the application is imported with it
    first."""
    code = """
import argon2, functools, os, sys, pytest
argon2.PasswordHasher = functools.partial(argon2.PasswordHasher, time_cost=1, memory_cost=8, parallelism=1)
failed = 0
for directory in sys.argv[1:]:
    os.chdir(directory)
    if os.path.exists("server.key"):
        sys.path.insert(0, directory)
        import app
        sys.path.remove(directory)
    for name in ("app", "test_app", "test_server"):
        sys.modules.pop(name, None)
    strict = ["-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    failed |= pytest.main(["-q", "-p", "no:cacheprovider", *strict, "--rootdir", directory, directory])
    for name in ("app", "test_app", "test_server"):
        sys.modules.pop(name, None)
    sys.path.remove(directory)
sys.exit(failed)
"""
    return subprocess.run(
        [sys.executable, "-B", "-c", code, *(str(each.resolve()) for each in directories)],
        env=clean_environment({"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


# -- what is written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("profile", RUNNING)
def test_every_profile_is_written_for_everything_it_can_be_written_for(profile: str, target: str) -> None:
    told = answer(*wish(profile, target))
    key = "server.key" if target in FRAMEWORKS else ".coatcheck/server.key"
    assert set(told["written"]) == {*FILES[target], ".gitignore", key}
    assert told["kept"] == []
    assert set(everything(Path())) == set(told["written"])
    for path in Path().glob("*.py"):
        text = path.read_text("utf-8")
        ast.parse(text)
        assert max(map(len, text.splitlines())) <= 120
        assert "\n\n\n\n" not in text
    if target in SERVED:
        assert tomllib.loads(Path("coatcheck.toml").read_text("utf-8"))["profile"] == profile
        assert answer("config", "check")["status"] == "ok"
        settings = gather({}, {}, Path()).settings
        assert settings.forward is (target in GATEWAYS)
    if target in WRITERS:
        printed = run("proxy-config", target)
        assert printed.exit_code == 0, printed.stderr
        kept = "".join(Path(name).read_text("utf-8") for name in FILES[target] - {"coatcheck.toml", "test_server.py"})
        # A template of Caddy and Envoy is YAML or braces: compared without what a deeper block adds in front.
        lines = {line.strip() for line in kept.splitlines()}
        assert {line.strip() for line in printed.stdout.splitlines() if "ssl" not in line} <= lines | {""}


def test_the_test_of_every_project_passes_as_it_is() -> None:
    projects = [made(profile, framework) for profile in RUNNING for framework in FRAMEWORKS]
    # Where the tests run there may be no key, because it is in no repository; and browsers may come over https.
    elsewhere = made("b2c", "starlette", "--directory", "elsewhere", "--public-url", "https://shop.example")
    (elsewhere / "server.key").unlink()
    behind = [made("b2c", "nginx", "--audience", "orders"), made("admin", "envoy")]
    done = pytest_of(*projects, elsewhere, *behind)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" passed") == len(projects) + 1 + len(behind)
    for project in behind:
        assert not (project / ".coatcheck" / "coatcheck.db").exists(), "it has users of its own"


@pytest.mark.servers
def test_nginx_reads_its_file_where_it_stands() -> None:
    directory = Path("a project").absolute()
    answer(*wish("admin", "nginx", "--directory", str(directory)))
    words: list[str | Path] = [find_nginx(), "-p", directory, "-c", directory / "nginx.conf", "-t"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    left = {path.name for path in directory.iterdir()} - FILES["nginx"] - {".gitignore", ".coatcheck"}
    assert all(name.startswith(".nginx-") for name in left), left
    assert ".nginx-*" in (directory / ".gitignore").read_text().splitlines()


def test_settings_of_the_shell_do_not_reach_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATCHECK_PROFILE", "b2c")
    monkeypatch.setenv("COATCHECK_PUBLIC_URL", "https://elsewhere.example")
    answer("init", "--for", "nginx")
    assert tomllib.loads(Path("coatcheck.toml").read_text())["profile"] == "admin"
    assert "elsewhere" not in Path("nginx.conf").read_text()


def test_one_audience_behind_a_gateway_gets_a_token() -> None:
    one = tomllib.loads((made("b2c", "caddy", "--audience", "orders") / "coatcheck.toml").read_text())
    assert (one["audiences"], one["forward_audience"]) == (["orders"], "orders")
    two = tomllib.loads((made("b2c", "envoy", "--audience", "a", "--audience", "b") / "coatcheck.toml").read_text())
    assert two["audiences"] == ["a", "b"]
    assert "forward_audience" not in two


def test_an_https_address_goes_into_everything_that_names_it() -> None:
    url = "https://id.example"
    assert f'"{url}"' in (made("admin", "fastapi", "--public-url", url) / "app.py").read_text()
    behind = made("admin", "nginx", "--public-url", url, "--trusted-proxy", "10.0.0.5")
    assert tomllib.loads((behind / "coatcheck.toml").read_text())["trusted_proxies"] == ["10.0.0.5"]
    assert "listen 0.0.0.0:443 ssl;" in (behind / "nginx.conf").read_text()


# -- keys and the first account ------------------------------------------------------------------------------------


def test_a_key_is_for_its_owner_alone_and_in_no_repository() -> None:
    app, server = made("admin", "wsgi"), made("admin", "server")
    assert stat.S_IMODE((app / "server.key").stat().st_mode) == 0o600
    assert len(parse_server_key((app / "server.key").read_text())) == 32
    assert "server.key" in (app / ".gitignore").read_text().splitlines()
    assert stat.S_IMODE((server / ".coatcheck").stat().st_mode) == 0o700
    assert stat.S_IMODE((server / ".coatcheck" / "server.key").stat().st_mode) == 0o600
    assert ".coatcheck/" in (server / ".gitignore").read_text().splitlines()


def test_every_project_has_a_key_and_a_password_of_its_own() -> None:
    told = [answer(*wish("admin", "wsgi", "--directory", name)) for name in ("one", "two")]
    assert told[0]["account"]["password"] != told[1]["account"]["password"]
    assert Path("one/server.key").read_text() != Path("two/server.key").read_text()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_password_is_said_once_and_written_nowhere(framework: str) -> None:
    password = answer(*wish("admin", framework))["account"]["password"].encode()
    assert len(password) >= 24
    assert not any(password in content for content in everything(Path()).values())


def test_the_first_password_has_a_hash_of_full_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("argon2.PasswordHasher", PasswordHasher)
    password = answer(*wish("admin", "wsgi"))["account"]["password"]
    (kept,) = re.findall(r'"(\$argon2id\$[^"]+)"', Path("app.py").read_text())
    assert PasswordHasher().verify(kept, password)
    assert not PasswordHasher().check_needs_rehash(kept)


def test_the_key_stays_when_everything_else_is_replaced() -> None:
    for target in ("wsgi", "server"):
        before = everything(made("admin", target))
        told = answer(*wish("admin", target, "--directory", f"admin_{target}", "--force"))
        key = "server.key" if target == "wsgi" else ".coatcheck/server.key"
        assert set(told["kept"]) == {key, ".gitignore"}
        assert everything(Path(f"admin_{target}"))[key] == before[key]
        assert set(everything(Path(f"admin_{target}"))) == set(before)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda key: key.chmod(0o644), "chmod 600"),
        (lambda key: key.write_text("no key at all"), "is no server key"),
        (lambda key: (key.rename("away"), key.symlink_to("away")), "is no plain file"),
        (lambda key: (key.unlink(), key.mkdir()), "is no plain file"),
    ],
)
def test_a_key_that_is_none_is_told_and_not_replaced(spoil: object, says: str) -> None:
    made("admin", "wsgi")
    key = Path("admin_wsgi/server.key")
    assert callable(spoil)
    spoil(key)
    state = key.lstat().st_mode
    assert says in refused(*wish("admin", "wsgi", "--directory", "admin_wsgi", "--force"))
    assert key.lstat().st_mode == state


# -- what is there already -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_no_file_is_overwritten_and_nothing_is_written_beside_it(target: str) -> None:
    for name in sorted(FILES[target]):
        directory = Path(name.replace(".", "_"))
        directory.mkdir()
        (directory / name).write_text("mine")
        said = refused(*wish("admin", target, "--directory", str(directory)))
        assert f"{directory / name}: is there already" in said
        assert "--force" in said
        assert everything(directory) == {name: b"mine"}


def test_a_link_that_leads_nowhere_is_not_written_through() -> None:
    Path("app.py").symlink_to("elsewhere.py")
    assert "is there already" in refused(*wish("admin", "wsgi"))
    assert "is there already" in refused(*wish("admin", "wsgi", "--force"))
    assert not Path("elsewhere.py").exists()


def test_force_replaces_a_link_and_not_what_it_leads_to() -> None:
    Path("precious.py").write_text("mine")
    Path("app.py").symlink_to("precious.py")
    answer(*wish("admin", "wsgi", "--force"))
    assert Path("precious.py").read_text() == "mine"
    assert not Path("app.py").is_symlink()


def test_what_is_ignored_already_stays_and_is_named_once() -> None:
    Path(".gitignore").write_text("mine\nserver.key")
    answer(*wish("admin", "wsgi"))
    lines = Path(".gitignore").read_text().splitlines()
    assert lines[:2] == ["mine", "server.key"]
    assert len(lines) == len(set(lines))
    assert "*.db" in lines


def test_a_gitignore_that_is_a_link_is_not_written_through() -> None:
    Path("shared").write_text("theirs\n")
    Path(".gitignore").symlink_to("shared")
    assert "is a link" in refused(*wish("admin", "wsgi"))
    assert everything(Path()) == {"shared": b"theirs\n", ".gitignore": b"theirs\n"}


def test_a_home_that_others_can_enter_is_told_with_its_cure() -> None:
    Path(".coatcheck").mkdir(mode=0o755)
    assert "chmod 700" in refused(*wish("admin", "server"))


# -- hostile and contradicting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_hostile_directory_is_a_name_and_nothing_else(name: str) -> None:
    told = run(*wish("admin", "server", "--directory", name))
    assert told.exit_code == 0, told.stderr
    assert "\x1b" not in told.stdout
    assert {path.name for path in Path().iterdir()} == {name}
    if name.isprintable():
        (step,) = [line.strip() for line in told.stdout.splitlines() if line.strip().startswith("cd ")]
        done = subprocess.run(["/bin/sh", "-c", f"{step} && ls"], capture_output=True, text=True, check=True)
        assert "coatcheck.toml" in done.stdout
        assert not Path("pwned").exists()


def test_a_file_is_no_directory() -> None:
    Path("file").write_text("mine")
    assert "file" in refused(*wish("admin", "wsgi", "--directory", "file"))
    assert Path("file").read_text() == "mine"


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("profile", AWAITING)
def test_a_profile_that_cannot_run_is_refused_with_the_reason(profile: str, target: str) -> None:
    assert PROFILES[profile].awaits in refused(*wish(profile, target))
    assert everything(Path()) == {}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--profile", "microservices", "--for", "fastapi"), "audience: the profile microservices has an audience for"),
        (("--profile", "microservices", "--for", "nginx"), "as --audience orders"),
        (("--for", "server", "--audience", "orders"), "audience: the profile admin hands out no tokens"),
        (("--profile", "b2c", "--for", "server", "--audience", 'a "b'), "audiences"),
        (("--for", "fastapi", "--application", "127.0.0.1:3000"), "application: is what a gateway protects"),
        (("--for", "nginx", "--application", "127.0.0.1:3000;"), "application: an address and a port"),
        (("--for", "wsgi", "--trusted-proxy", "127.0.0.1"), "trusted_proxy: is a setting of the server"),
        (("--for", "nginx", "--trusted-proxy", "the one"), "trusted_proxies"),
        (("--for", "server", "--public-url", "http://shop.example"), "public_url: http is for this machine alone"),
        (("--for", "starlette", "--public-url", "http://shop.example"), "public_url: http is for this machine alone"),
        (("--for", "envoy", "--public-url", "http://127.0.0.1:8000"), "public_url: is the address of the server"),
        (("--profile", "shop", "--for", "server"), "profile: one of"),
    ],
)
def test_what_does_not_fit_together_is_one_line_with_the_cure(words: tuple[str, ...], says: str) -> None:
    assert says in refused("init", *words)
    assert everything(Path()) == {}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "url",
    [
        "https://a;b",
        'https://a"b',
        "https://a\nb",
        "https://a b",
        "https://a{b}",
        "https://a$host",
        "https://a`b",
        "https://a#b",
        "https://user@a",
        "https://a/path",
        "https://外套.example",
        "javascript:alert(1)",
        "https://[",
        "https://a:99999",
        "",
    ],
)
def test_an_address_that_would_say_more_than_an_address_is_refused(target: str, url: str) -> None:
    assert "public_url" in refused(*wish("admin", target, "--public-url", url))
    assert everything(Path()) == {}


def test_the_verb_without_a_target_names_them_all() -> None:
    said = run("init").stderr
    assert all(target in said for target in TARGETS)


@pytest.mark.parametrize("target", GATEWAYS)
def test_what_is_tried_behind_a_gateway_is_not_the_directory_with_the_keys(target: str) -> None:
    (step,) = [step for step in answer(*wish("admin", target))["next"] if "http.server" in step]
    assert '--directory "$(mktemp -d)"' in step


def test_every_command_of_the_how_to_page_writes_what_its_table_says() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "start-a-project.md").read_text("utf-8")
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("coatcheck init ")]
    assert len(commands) == 3
    for words in commands:
        assert answer(*words)["written"]
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]+) \|", page, flags=re.MULTILINE))
    assert {target: set(re.findall(r"`([^`]+)`", files)) for target, files in rows.items()} == FILES


def test_json_has_everything_that_is_printed() -> None:
    told = json.loads(run(*wish("b2c", "fastapi", "--directory", "shop", "--json")).stdout)
    assert set(told) == {"directory", "written", "kept", "next", "account"}
    assert told["next"][0] == "cd shop"
    assert "account" not in answer(*wish("b2c", "server"))
