"""`coatcheck init`: one short file that works under a profile, a key and a test, in a directory of one's own.

Decides what a new project begins with. Everything that is going to be written is settled, and checked as a server or
an application would check it, before the first octet is. It must never overwrite a key, replace a file that nobody has
allowed it to replace, or write a password down: the first account's is printed once, and the file has its hash.
"""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import click

from coatcheck.server.cli.output import Refused, emit, json_option, talk
from coatcheck.system import REAL

if TYPE_CHECKING:
    from coatcheck.core.profiles import Profile
    from coatcheck.server.settings import ServerSettings

FRAMEWORKS: Final = ("fastapi", "starlette", "wsgi")
GATEWAYS: Final = ("nginx", "traefik", "caddy", "envoy")
TARGETS: Final = (*FRAMEWORKS, "server", *GATEWAYS)

ACCOUNT: Final = "demo"
HOME: Final = ".coatcheck"
KEY: Final = "server.key"

_LOCAL: Final = "127.0.0.1"
_ALONE: Final = "   # in a terminal of its own"
_BEHIND: Final = f"{_LOCAL}:3000"
_APPLICATION_URL: Final = f"http://{_LOCAL}:8000"
_GATEWAY_URL: Final = f"http://{_LOCAL}:8080"
_CERTIFICATE: Final = "/etc/ssl/certs/coatcheck.pem"
_CERTIFICATE_KEY: Final = "/etc/ssl/private/coatcheck.key"
_GATEWAY_FILES: Final = {
    "nginx": "nginx.conf",
    "traefik": "traefik.yaml",
    "caddy": "Caddyfile",
    "envoy": "envoy.yaml",
}
_METHOD_HEADERS: Final = {
    "nginx": ', X_Original_Method="GET"',
    "traefik": ', X_Forwarded_Method="GET"',
    "caddy": ', X_Forwarded_Method="GET"',
    "envoy": "",
}
# As Python source, for the test; Traefik has no such command.
_CHECKS: Final = {
    "nginx": '["nginx", "-p", str(HERE), "-c", str(HERE / "nginx.conf"), "-t"]',
    "caddy": '["caddy", "validate", "--adapter", "caddyfile", "--config", "Caddyfile"]',
    "envoy": '["envoy", "--mode", "validate", "-c", "envoy.yaml"]',
    "traefik": "",
}
_IGNORED: Final = {
    "framework": (KEY, "*.db", "*.db-*", "*.db.key", "jar", "__pycache__/", ".pytest_cache/"),
    "server": (f"{HOME}/", "__pycache__/", ".pytest_cache/"),
    "nginx": (f"{HOME}/", ".nginx-*", "__pycache__/", ".pytest_cache/"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What was asked for."""

    profile: Profile
    target: str
    public_url: str | None
    audiences: tuple[str, ...]
    application: str | None
    trusted_proxies: tuple[str, ...]

    @property
    def is_gateway(self) -> bool:
        """Whether an application is put behind a gateway."""
        return self.target in GATEWAYS


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a project begins with: texts by the names of their files, what to type next, and what to be warned of."""

    files: Mapping[str, str]
    ignored: tuple[str, ...]
    next_steps: tuple[str, ...]
    warnings: tuple[str, ...] = ()


@click.command(
    epilog="""\b
Examples:
  coatcheck init --profile b2c --for fastapi --directory shop
  coatcheck init --profile microservices --for server --audience orders --audience payments
  coatcheck init --profile admin --for nginx --application 127.0.0.1:3000

\b
`coatcheck profile list` prints the profiles. A file that is there is left alone, unless --force is
given; a key is never replaced."""
)
@click.option(
    "--profile", "name", metavar="NAME", default="admin", show_default=True, help="What is decided, in one word."
)
@click.option("--for", "target", type=click.Choice(TARGETS), required=True, help="What to write.")
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Where; it is made if it is not there.  [here]",
)
@click.option("--public-url", metavar="URL", default=None, help="Where browsers will come.  [this machine]")
@click.option("--audience", "audiences", metavar="NAME", multiple=True, help="A service for tokens; may be repeated.")
@click.option("--application", metavar="HOST:PORT", default=None, help=f"What a gateway protects.  [{_BEHIND}]")
@click.option(
    "--trusted-proxy",
    "trusted_proxies",
    metavar="ADDRESS",
    multiple=True,
    help="Where the gateway's connections come from; may be repeated.  [127.0.0.1]",
)
@click.option("--force", is_flag=True, help="Replace files that are there already, but no key.")
@json_option
def init(
    name: str,
    target: str,
    directory: Path,
    public_url: str | None,
    audiences: tuple[str, ...],
    application: str | None,
    trusted_proxies: tuple[str, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Write a small project that works: one file, a key and a test."""
    from coatcheck.core.profiles import Profile

    wish = Wish(
        profile=Profile.named(name),
        target=target,
        public_url=public_url,
        audiences=tuple(dict.fromkeys(audiences)),
        application=application,
        trusted_proxies=trusted_proxies,
    )
    password = REAL.random(12).hex()
    start = plan(wish, password)
    written, kept = lay_out(directory, start, has_home=target not in FRAMEWORKS, force=force)
    for line in start.warnings:
        talk(f"warning: {line}")
    steps = start.next_steps if directory.resolve() == Path.cwd() else (_change_to(directory), *start.next_steps)
    account = {"account": {"name": ACCOUNT, "password": password}} if target in FRAMEWORKS else {}
    emit(
        {"directory": str(directory.absolute()), "written": written, "kept": kept, "next": list(steps), **account},
        *(f"wrote  {each}" for each in written),
        *(f"kept   {each}" for each in kept),
        *([f"Sign in as {ACCOUNT} with the password {password}; it is kept nowhere."] if account else []),
        "Next:",
        *(f"  {step}" for step in steps),
        as_json=as_json,
    )


# -- what is written -----------------------------------------------------------------------------------------------


def plan(wish: Wish, password: str) -> Start:
    """What the project begins with. Raises: ConfigurationError, Refused, naming the field and the cure."""
    _check(wish)
    if wish.target in FRAMEWORKS:
        return _application(wish, password)
    return _server(wish)


def _check(wish: Wish) -> None:
    """What can be told of the wish by itself. Raises: Refused."""
    from coatcheck.core.network import is_loopback

    profile = wish.profile
    if profile.awaits:
        raise Refused(
            f"profile: {profile.name} needs what this release does not have: {profile.awaits}; take another one "
            "(`coatcheck profile list`)"
        )
    if wish.audiences and not profile.carries_tokens:
        raise Refused(
            f"audience: the profile {profile.name} hands out no tokens; leave --audience out, or take --profile b2c"
        )
    if profile.carries == "audience_tokens" and not wish.audiences:
        raise Refused(
            f"audience: the profile {profile.name} has an audience for each service; name them, as --audience orders"
        )
    if wish.public_url == "":
        raise Refused("public_url: is empty; give the address that browsers type, or leave it out")
    if wish.public_url is not None and wish.public_url.startswith("http:"):
        # What else is wrong with it is told by the settings that are made of it.
        with suppress(ValueError):
            host = urlsplit(wish.public_url).hostname
            if host and not is_loopback(host):
                raise Refused("public_url: http is for this machine alone; give the https address that browsers type")
    if wish.application is not None and not wish.is_gateway:
        raise Refused("application: is what a gateway protects; leave it out, or take --for nginx")
    if wish.trusted_proxies and wish.target in FRAMEWORKS:
        raise Refused(
            "trusted_proxy: is a setting of the server; leave it out, and give Settings(trusted_proxies=...) in app.py"
        )


def _application(wish: Wish, password: str) -> Start:
    from argon2 import PasswordHasher

    from coatcheck.profile_settings import settings_of
    from coatcheck.settings import Settings, TokenSettings

    profile, url = wish.profile, (wish.public_url or _APPLICATION_URL).rstrip("/")
    tokens = TokenSettings(audiences=wish.audiences) if wish.audiences else None
    settings = settings_of(profile, Settings(public_url=url, tokens=tokens))
    port = urlsplit(url).port or 8000
    run = "python app.py" if wish.target == "wsgi" else f"uvicorn app:app --port {port} --no-proxy-headers"
    values: dict[str, object] = {
        "profile": profile,
        "public_url": _literal(url),
        "port": port,
        "run": run,
        "account": ACCOUNT,
        "password_hash": PasswordHasher().hash(password),
        "audiences": _tuple(wish.audiences),
        "first_audience": wish.audiences[0] if wish.audiences else "",
        "by_audience": profile.carries == "audience_tokens",
        "devices": settings.device_cookie is not None,
        "proves": profile.binding.compares and profile.binding.on_mismatch in ("step_up", "block"),
        "access_seconds": int(profile.access_lifetime.total_seconds()),
    }
    credentials = json.dumps({"name": ACCOUNT, "password": password})
    return Start(
        files={
            "app.py": _rendered(f"{wish.target}.py", values),
            "test_app.py": _rendered("test_wsgi.py" if wish.target == "wsgi" else "test_asgi.py", values),
        },
        ignored=_IGNORED["framework"],
        next_steps=(
            _install(wish.target),
            "python -m pytest",
            f"{run}{_ALONE}",
            f"curl -c jar -H 'Content-Type: application/json' -d '{credentials}' {url}/login",
            f"curl -b jar {url}/dashboard",
        ),
    )


def _server(wish: Wish) -> Start:
    from coatcheck.server.serving import check_start
    from coatcheck.server.settings import ServerSettings

    gateway = wish.target if wish.is_gateway else ""
    url = wish.public_url or (_GATEWAY_URL if gateway else None)
    forward_audience = wish.audiences[0] if gateway and len(wish.audiences) == 1 else None
    proxies = wish.trusted_proxies or ((_LOCAL,) if gateway else ())
    settings = ServerSettings(
        profile=wish.profile.name,
        public_url=url,
        audiences=wish.audiences,
        trusted_proxies=proxies,
        forward=bool(gateway),
        forward_audience=forward_audience,
    )
    warnings = check_start(settings)
    tls = gateway and urlsplit(settings.browser_url).scheme == "https"
    values: dict[str, object] = {
        "profile": wish.profile,
        "gateway": gateway,
        "public_url": "" if url is None else _literal(url),
        "audiences": wish.audiences,
        "audience_list": json.dumps(wish.audiences),
        "trusted_proxies": json.dumps(proxies) if proxies else "",
        "forward_audience": "" if forward_audience is None else _literal(forward_audience),
        "method_header": _METHOD_HEADERS.get(gateway, ""),
        "let_in": 200 if gateway == "envoy" else 204,
        "checks": _CHECKS.get(gateway, ""),
        "certificate": _CERTIFICATE if tls else "",
    }
    files = {
        "coatcheck.toml": _rendered("coatcheck.toml", values),
        "test_server.py": _rendered("test_server.py", values),
    }
    steps = [
        'pip install "coatcheck[server]" pytest',
        "coatcheck config check",
        "python -m pytest",
        "coatcheck user add YOUR_NAME --role admin",
        f"coatcheck serve{_ALONE}",
    ]
    if gateway:
        application = wish.application or _BEHIND
        printed = _configuration(gateway, settings, application)
        files = {
            _GATEWAY_FILES[gateway]: _rendered("nginx.conf", {"printed": printed}) if gateway == "nginx" else printed,
            **files,
        }
        if tls:
            steps.append(f"# the certificate belongs into {_CERTIFICATE}, its key into {_CERTIFICATE_KEY}")
        if wish.application is None:
            # From an empty directory: this one has keys in it, and not everything comes through the gateway.
            port = _BEHIND.rpartition(":")[2]
            steps.append(f'python -m http.server {port} --bind {_LOCAL} --directory "$(mktemp -d)"{_ALONE}; protected')
        steps += [f"{_run_gateway(gateway, settings)}{_ALONE}", f"open {settings.browser_url}"]
    return Start(
        files=files,
        ignored=_IGNORED["nginx" if gateway == "nginx" else "server"],
        next_steps=tuple(steps),
        warnings=warnings,
    )


def _configuration(gateway: str, settings: ServerSettings, application: str) -> str:
    from coatcheck.server.cli.proxy_config import WRITERS
    from coatcheck.server.cli.proxy_config import plan as plan_proxy

    made = plan_proxy(settings, application=application, certificate=_CERTIFICATE, key=_CERTIFICATE_KEY)
    if gateway == "nginx":
        return "\n".join(f"    {line}" if line else "" for line in WRITERS[gateway](made).splitlines())
    return WRITERS[gateway](made)


def _run_gateway(gateway: str, settings: ServerSettings) -> str:
    if gateway == "traefik":
        where = urlsplit(settings.browser_url)
        address = f":{where.port or 443}" if where.scheme == "https" else f"{where.hostname}:{where.port or 80}"
        return f"traefik --entryPoints.web.address={address} --providers.file.filename=traefik.yaml"
    return {
        "nginx": 'nginx -p "$PWD" -c "$PWD/nginx.conf" -g "daemon off;"',
        "caddy": "caddy run --adapter caddyfile --config Caddyfile",
        "envoy": "envoy -c envoy.yaml",
    }[gateway]


def _install(target: str) -> str:
    if target == "wsgi":
        return 'pip install "coatcheck[server]" pytest'
    return f'pip install "coatcheck[{target},server]" pytest httpx2'


def _rendered(name: str, values: Mapping[str, object]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(  # noqa: S701 - source and settings, no page; what comes from outside is a literal
        loader=PackageLoader("coatcheck.server.cli", "starts"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template(f"{name}.jinja").render(values)


def _literal(text: str) -> str:
    """Text as a string of Python and of TOML alike."""
    return json.dumps(text)


def _tuple(items: Sequence[str]) -> str:
    """Texts as a tuple of Python; empty for none."""
    return f"({', '.join(map(_literal, items))}{',' if len(items) == 1 else ''})" if items else ""


def _change_to(directory: Path) -> str:
    text = str(directory)
    return f"cd {'-- ' if text.startswith('-') else ''}{shlex.quote(text)}"


# -- writing it ----------------------------------------------------------------------------------------------------


def lay_out(directory: Path, start: Start, *, has_home: bool, force: bool) -> tuple[list[str], list[str]]:
    """Write a project; returns what was written and what was there and is kept.

    The key is ignored before it exists. Raises: Refused for what is there already, before anything is written.
    """
    for name in start.files:
        path = directory / name
        if os.path.lexists(path) and not (force and path.is_file()):
            cure = "move it away" if force else "move it away, choose another --directory, or give --force"
            raise Refused(f"{path}: is there already; {cure}")
    directory.mkdir(parents=True, exist_ok=True)
    written: list[str] = []
    kept: list[str] = []
    (written if _ignore(directory / ".gitignore", start.ignored) else kept).append(".gitignore")
    name, is_new = _key_of_home(directory / HOME) if has_home else _key_file(directory / KEY)
    (written if is_new else kept).append(name)
    for name, text in start.files.items():
        _write(directory / name, text, force=force)
        written.append(name)
    return written, kept


def _write(path: Path, text: str, *, force: bool) -> None:
    """Write a file whose name nobody has; with `force` in the place of the one that has it, never half of it."""
    draft = path.with_name(f".{path.name}.{REAL.random(8).hex()}") if force else path
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as taken:
        raise Refused(f"{path}: has just appeared; nothing of it was changed") from taken
    if force:
        draft.replace(path)


def _ignore(path: Path, wanted: Sequence[str]) -> bool:
    """Name files that belong into no repository; what is there stays. Whether anything was added."""
    if path.is_symlink():
        raise Refused(f"{path}: is a link, and what it leads to is not ours to change; move it away")
    present = path.read_text("utf-8", "surrogateescape") if path.exists() else ""
    missing = [line for line in wanted if line not in present.splitlines()]
    if not missing:
        return False
    gap = "\n" if present and not present.endswith("\n") else ""
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(gap + "".join(f"{line}\n" for line in missing))
    return True


def _key_file(path: Path) -> tuple[str, bool]:
    """A server key as text, for its owner alone. Raises: Refused for a file that is there and is no such key."""
    from coatcheck.errors import ConfigurationError
    from coatcheck.settings import parse_server_key

    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        state = path.lstat()
        if not stat.S_ISREG(state.st_mode):
            raise Refused(f"{path}: is no plain file; move it away") from None
        if os.name == "posix" and stat.S_IMODE(state.st_mode) & 0o077:
            raise Refused(f"{path}: can be read by others; run: chmod 600 {shlex.quote(str(path))}") from None
        try:
            parse_server_key(path.read_text("ascii", "replace"))
        except ConfigurationError:
            raise Refused(f"{path}: is no server key, and a key is never replaced; move it away") from None
        return KEY, False
    with os.fdopen(handle, "w", encoding="ascii") as file:
        file.write(f"{REAL.random(32).hex()}\n")
    return KEY, True


def _key_of_home(home: Path) -> tuple[str, bool]:
    """The key a server finds by itself. Raises: ConfigurationError for a directory or a key that others can read."""
    from coatcheck.server.service import KEY_FILE, prepare_home
    from coatcheck.stores.sqlite.key_file import KEY_BYTES, read_or_make_key

    prepare_home(home)
    candidate = REAL.random(KEY_BYTES)
    return f"{HOME}/{KEY_FILE}", read_or_make_key(str(home / KEY_FILE), candidate) == candidate
