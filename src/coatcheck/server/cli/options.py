"""One flag for every setting that is no secret, and settings from the flags of a verb.

Decides the spelling of flags alone; what they mean and whether they fit together stands in `server/settings.py`. A
secret is never a flag: the arguments of a process can be read by everybody on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

if TYPE_CHECKING:
    from coatcheck.server.settings import Gathered

F = TypeVar("F", bound=Callable[..., Any])


def _flag(field: str, spelling: str, metavar: str, text: str, **more: Any) -> Callable[[Any], Any]:
    return click.option(spelling, field, metavar=metavar, default=None, help=text, **more)


FLAGS: Final = {
    "host": _flag("host", "--host", "ADDRESS", "Address to listen on.  [127.0.0.1]"),
    "port": _flag("port", "--port", "NUMBER", "Port to listen on; 0 takes a free one.  [8000]"),
    "home": _flag("home", "--home", "DIR", "Directory for database and keys.  [.coatcheck]"),
    "database": _flag("database", "--database", "URL", "Users and audit log: sqlite:///… or postgresql://…"),
    "store": _flag("store", "--store", "URL", "Sessions: any store URL.  [the database]"),
    "public_url": _flag("public_url", "--public-url", "URL", "Where browsers reach the server, as https://id.example."),
    "name": _flag("name", "--name", "TEXT", "The name people see on pages.  [Coatcheck]"),
    "namespace": _flag("namespace", "--namespace", "NAME", "Prefix of all tables and keys.  [coatcheck]"),
    "profile": _flag(
        "profile", "--profile", "NAME", "What is decided in one word; see `coatcheck profile list`.  [admin]"
    ),
    "idle_timeout": _flag(
        "idle_timeout", "--idle-timeout", "SECONDS", "Ends a session without a request.  [as the profile says]"
    ),
    "absolute_timeout": _flag(
        "absolute_timeout",
        "--absolute-timeout",
        "SECONDS",
        "Ends a session this long after sign-in.  [as the profile says]",
    ),
    "access_lifetime": _flag(
        "access_lifetime", "--access-lifetime", "SECONDS", "How long an access token lives.  [as the profile says]"
    ),
    "same_site": _flag("same_site", "--same-site", "POLICY", "Session cookie: Lax or Strict.  [as the profile says]"),
    "max_sessions": _flag(
        "max_sessions", "--max-sessions", "NUMBER", "Sessions of one person at once.  [as the profile says]"
    ),
    "on_limit": _flag(
        "on_limit",
        "--on-limit",
        "ANSWER",
        "The next sign-in then: allow, evict_oldest, refuse, ask.  [as the profile says]",
    ),
    "reuse_grace": _flag(
        "reuse_grace", "--reuse-grace", "SECONDS", "Forgives a refresh token that was just exchanged.  [30]"
    ),
    "token_algorithm": _flag(
        "token_algorithm", "--token-algorithm", "NAME", "Signs access tokens: ES256, EdDSA, RS256, HS256.  [ES256]"
    ),
    "audiences": _flag(
        "audiences",
        "--audience",
        "NAME",
        "A service that access tokens may be asked for; may be repeated.",
        multiple=True,
    ),
    "store_deadline": _flag(
        "store_deadline", "--store-deadline", "SECONDS", "All store work of a request lasts no longer.  [2]"
    ),
    "near_copies": _flag("near_copies", "--near-copies", "NUMBER", "Sessions kept near; 0: always ask.  [100000]"),
    "lease": _flag("lease", "--lease", "SECONDS", "How long a near copy counts without news from the store.  [1]"),
    "outage": _flag("outage", "--outage", "POLICY", "Store away: refuse, near or anonymous.  [as the profile says]"),
    "outage_grace": _flag("outage_grace", "--outage-grace", "SECONDS", "How long `near` goes on.  [60]"),
    "replicas": _flag("replicas", "--replicas", "NUMBER", "Replicas that must confirm the end of a session.  [0]"),
    "trusted_proxies": _flag(
        "trusted_proxies",
        "--trusted-proxy",
        "ADDRESS",
        "A reverse proxy in front, or its network; may be repeated.",
        multiple=True,
    ),
    "trusted_origins": _flag(
        "trusted_origins",
        "--trusted-origin",
        "ORIGIN",
        "Another origin whose pages may send forms; may be repeated.",
        multiple=True,
    ),
    "role_limits": _flag(
        "role_limits",
        "--role-limit",
        "ROLE=RULE",
        "Sessions of one role, as admin=1:refuse or guest=allow; may be repeated.  [as the profile says]",
        multiple=True,
    ),
    "persistent": _flag(
        "persistent", "--persistent", "YES|NO", "The cookie outlives the browser's window.  [as the profile says]"
    ),
    "bind_network": _flag(
        "bind_network",
        "--bind-network",
        "RULE",
        "Binds a session to its network: off, exact, prefix, asn, country.  [as the profile says]",
    ),
    "bind_user_agent": _flag(
        "bind_user_agent", "--bind-user-agent", "YES|NO", "Binds it to its browser's family.  [as the profile says]"
    ),
    "bind_device": _flag(
        "bind_device", "--bind-device", "YES|NO", "Binds it to the device cookie.  [as the profile says]"
    ),
    "on_mismatch": _flag(
        "on_mismatch",
        "--on-mismatch",
        "OUTCOME",
        "Elsewhere then: notify, step_up, block, revoke.  [as the profile says]",
    ),
    "block_for": _flag("block_for", "--block-for", "SECONDS", "How long a place is blocked.  [as the profile says]"),
    "geo": _flag("geo", "--geo", "FILE", "A table of addresses (.mmdb); may be repeated.", multiple=True),
    "risk_rules": _flag("risk_rules", "--risk-rules", "FILE", "Rules about risk, as TOML.  [as the profile says]"),
    "forward": click.option(
        "--forward",
        "forward",
        is_flag=True,
        default=None,
        help="Answer gateways (nginx, Traefik, Caddy, Envoy) at /forward/….",
    ),
    "forward_rules": _flag(
        "forward_rules",
        "--forward-rule",
        "NAME=ROLES",
        "Lets in some roles alone, as staff=admin+editor; may be repeated.",
        multiple=True,
    ),
    "forward_audience": _flag(
        "forward_audience", "--forward-audience", "NAME", "The service behind the gateway gets a token for it."
    ),
    "insecure_http": click.option(
        "--insecure-http",
        "insecure_http",
        is_flag=True,
        default=None,
        help="Serve plain http beyond this machine: anybody on the way can take the cookie.",
    ),
}

WHERE: Final = ("home", "database", "store", "namespace")
"""The flags that say whose users and sessions a verb means."""


def setting_flags(*fields: str) -> Callable[[F], F]:
    """Give a verb the flags of these settings."""

    def decorate(command: F) -> F:
        decorated: Any = command
        for field in reversed(fields):
            decorated = FLAGS[field](decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


def gathered(flags: dict[str, Any]) -> Gathered:
    """Settings from these flags, the environment and the file in the working directory.

    Raises: ConfigurationError.
    """
    from coatcheck.server.settings import gather

    # A flag that may be repeated and was not given is an empty tuple.
    given = {field: value for field, value in flags.items() if value not in (None, ())}
    return gather(given, os.environ, Path.cwd())
