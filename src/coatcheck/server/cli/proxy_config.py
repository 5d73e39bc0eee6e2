"""`coatcheck proxy-config`: a working configuration of a gateway in front of an application.

Decides what each gateway is told to do: ask for every request, take the client's own identity headers away before the
answer's are put in, keep our cookies from the application, and leave the addresses of sign-in to the server. What is
printed follows the settings, so it is printed where the server's settings are. It must never print a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from coatcheck.server.cli.options import FLAGS, gathered, setting_flags
from coatcheck.server.cli.output import emit, json_option

if TYPE_CHECKING:
    from coatcheck.server.settings import ServerSettings

OURS: Final = ("login", "logout", "account", "setup", "static", "api")
"""First segments of the addresses that belong to the server, beside the application's."""

FOR_VERIFIERS: Final = ("/.well-known/jwks.json", "/revocations")

_EVERYWHERE: Final = "0.0.0.0"  # noqa: S104 - a gateway is meant to be reached
_ADDRESS: Final = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}")
_PATH: Final = re.compile(r"/[A-Za-z0-9/._-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a configuration is made of. Addresses are `host:port`; `cookies` are names that stay on this side."""

    listen: str
    server: str
    application: str
    public_url: str
    rule: str
    cookies: tuple[str, ...]
    has_tokens: bool
    sends_token: bool
    certificate: str
    key: str

    @property
    def tls(self) -> bool:
        """Whether browsers come over https."""
        return self.public_url.startswith("https:")

    @property
    def host(self) -> str:
        """The public host, without a port."""
        return urlsplit(self.public_url).hostname or ""

    @property
    def site(self) -> str:
        """The public host, with its port if it has one of its own."""
        return urlsplit(self.public_url).netloc

    @property
    def ours(self) -> str:
        """An expression for paths of the server. A path that is only like one of them belongs to the application."""
        exact = "|".join(re.escape(path[1:]) for path in FOR_VERIFIERS) if self.has_tokens else ""
        return f"^/(?:(?:{'|'.join(OURS)})(?:/.*)?{'|' + exact if exact else ''})$"

    @property
    def headers(self) -> tuple[str, ...]:
        """The identity headers."""
        from coatcheck.server.forward import IDENTITY_HEADERS

        return IDENTITY_HEADERS

    @property
    def copied(self) -> tuple[str, ...]:
        """The headers of an answer that the application gets."""
        return (*self.headers, "Authorization") if self.sends_token else self.headers

    @property
    def cookie_names(self) -> str:
        """An expression for the names of our cookies."""
        return "|".join(re.escape(name).replace("\\-", "-") for name in self.cookies)

    def address(self, gateway: str) -> str:
        """The path a gateway asks at."""
        return f"/forward/{gateway}:{self.rule}" if self.rule else f"/forward/{gateway}"


@click.command(
    epilog="""\b
Examples:
  coatcheck proxy-config nginx --application 127.0.0.1:3000 --public-url https://id.example
  coatcheck proxy-config caddy --application 127.0.0.1:3000 --rule staff

\b
It prints what the settings of the server say: run it where they are, or give the same flags.
docs/how-to/behind-a-gateway.md explains every line."""
)
@click.argument("gateway", type=click.Choice(["nginx", "traefik", "caddy", "envoy"]))
@click.option("--application", metavar="HOST:PORT", default="127.0.0.1:3000", help="What the gateway protects.")
@click.option("--listen", metavar="HOST:PORT", default=None, help="Where the gateway listens.  [public_url]")
@click.option("--rule", metavar="NAME", default="", help="One of forward_rules.  [everybody who is signed in]")
@click.option("--certificate", metavar="PATH", default="/etc/ssl/certs/coatcheck.pem", help="For https.")
@click.option("--certificate-key", metavar="PATH", default="/etc/ssl/private/coatcheck.key", help="For https.")
@click.option("--keep-session-cookie", is_flag=True, help="The application reads the session by itself.")
@setting_flags(*FLAGS)
@json_option
def proxy_config(
    gateway: str,
    application: str,
    listen: str | None,
    rule: str,
    certificate: str,
    certificate_key: str,
    keep_session_cookie: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Print the configuration of nginx, Traefik, Caddy or Envoy in front of an application."""
    settings = gathered(flags).settings
    made = plan(
        settings,
        application=application,
        listen=listen,
        rule=rule,
        certificate=certificate,
        key=certificate_key,
        keep_session_cookie=keep_session_cookie,
    )
    text = WRITERS[gateway](made)
    emit({"gateway": gateway, "configuration": text}, *text.splitlines(), as_json=as_json)


def plan(
    settings: ServerSettings,
    *,
    application: str,
    listen: str | None = None,
    rule: str = "",
    certificate: str = "",
    key: str = "",
    keep_session_cookie: bool = False,
) -> Plan:
    """What the configuration has to say. Raises: ConfigurationError for settings the server would not start with, or
    for text that does not belong into a configuration file."""
    from coatcheck.core.forwarded import parse_rules
    from coatcheck.errors import ConfigurationError
    from coatcheck.profile_settings import DEVELOPMENT_DEVICE_COOKIE, DEVICE_COOKIE
    from coatcheck.server.service import CONTINUE_COOKIE, DEVELOPMENT_CONTINUE_COOKIE

    # A key is no part of a configuration file; any will do to check everything else.
    sessions = settings.sessions(bytes(32))
    if not settings.forward:
        raise ConfigurationError("forward: is off, so every request would be refused; give --forward")
    url = urlsplit(settings.browser_url)
    found = listen or f"{_EVERYWHERE if url.scheme == 'https' else url.hostname}:{url.port or _port(url.scheme)}"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    for name, address in (("application", application), ("listen", found)):
        if not _ADDRESS.fullmatch(address):
            raise ConfigurationError(f"{name}: an address and a port, as 127.0.0.1:3000")
    for path in (certificate, key):
        if path and not _PATH.fullmatch(path):
            raise ConfigurationError("certificate: an absolute path of plain characters")
    if found == f"{host}:{settings.port}":
        raise ConfigurationError(
            "public_url: is the address of the server itself, where the gateway should listen; give the gateway's with "
            "--public-url, or another --port to the server"
        )
    if rule and rule not in {each.name for each in parse_rules(settings.forward_rules)}:
        raise ConfigurationError("rule: none of forward_rules; add it with --forward-rule NAME=ROLES")
    device = DEVICE_COOKIE if sessions.is_https else DEVELOPMENT_DEVICE_COOKIE
    continuing = CONTINUE_COOKIE if sessions.is_https else DEVELOPMENT_CONTINUE_COOKIE
    cookies = [sessions.refresh_cookie.name, device, continuing]
    return Plan(
        listen=found,
        server=f"{host}:{settings.port}",
        application=application,
        public_url=settings.browser_url,
        rule=rule,
        cookies=tuple(cookies if keep_session_cookie else [sessions.session_cookie.name, *cookies]),
        has_tokens=sessions.tokens is not None,
        sends_token=settings.forward_audience is not None,
        certificate=certificate,
        key=key,
    )


def nginx(made: Plan) -> str:
    """For an `include` inside the `http` block."""
    copies = "\n".join(
        f"        auth_request_set ${_variable(name)} $upstream_http_{name.lower().replace('-', '_')};\n"
        f"        proxy_set_header {name} ${_variable(name)};"
        for name in made.copied
    )
    names = made.cookie_names
    strips = "\n".join(
        f"map ${before} ${after} {{\n"
        f"    default ${before};\n"
        f'    "~^(?<{after}_a>(?:.*;)?) *(?:{names})=[^;]*(?:; *(?<{after}_b>.*))?$" "${after}_a${after}_b";\n'
        "}"
        for before, after in (
            ("http_cookie", "coatcheck_cookie_1"),
            *((f"coatcheck_cookie_{step}", f"coatcheck_cookie_{step + 1}") for step in range(1, len(made.cookies))),
        )
    )
    last = f"coatcheck_cookie_{len(made.cookies)}"
    tls = f"    ssl_certificate {made.certificate};\n    ssl_certificate_key {made.key};\n" if made.tls else ""
    # An access token is for the server; the application gets one of its own, or none.
    authorization = "" if made.sends_token else '        proxy_set_header Authorization "";\n'
    return f"""\
# Coatcheck behind nginx: include this inside the http block.
upstream coatcheck {{
    server {made.server};
    keepalive 32;
}}

# The address to return to after signing in: a plain path, or none.
map $request_uri $coatcheck_next {{
    default "";
    "~^(?<coatcheck_path>/[A-Za-z0-9._~/-]*)" $coatcheck_path;
}}
map $http_accept $coatcheck_wants_page {{
    default 0;
    "~text/html" 1;
}}
# A WebSocket and nothing else: any other upgrade, as h2c, would be a tunnel in which nobody is asked again.
map $http_upgrade $coatcheck_upgrade {{
    default "";
    "~*^websocket$" websocket;
}}
map $coatcheck_upgrade $coatcheck_connection {{
    default upgrade;
    "" "";
}}

# Our own cookies stay on this side. One pass takes one of them; what came twice goes with all the others.
{strips}
map ${last} $coatcheck_cookie {{
    default ${last};
    "~(?:^|;) *(?:{names})=" "";
}}

server {{
    listen {made.listen}{" ssl" if made.tls else ""};
    server_name {made.host};
{tls}    # Remote_User is not Remote-User, but applications read it as such: nginx drops such names.
    underscores_in_headers off;
    ignore_invalid_headers on;

    location / {{
        auth_request /_coatcheck;
{copies}
{authorization}        proxy_set_header Cookie $coatcheck_cookie;
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $remote_addr;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-Host $host;
        proxy_set_header Upgrade $coatcheck_upgrade;
        proxy_set_header Connection $coatcheck_connection;
        proxy_http_version 1.1;
        proxy_pass http://{made.application};
        error_page 401 = @coatcheck_sign_in;
        # nginx makes 500 of everything but 2xx, 401 and 403, also of the 503 of a store that is away.
        error_page 500 =503 @coatcheck_away;
    }}

    location = /_coatcheck {{
        internal;
        proxy_pass http://coatcheck{made.address("nginx")};
        proxy_pass_request_body off;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Content-Length "";
        proxy_set_header Host $host;
        proxy_set_header X-Original-Method $request_method;
        proxy_set_header X-Original-URL "";
        proxy_set_header X-Forwarded-Method "";
        proxy_set_header X-Forwarded-Uri "";
        proxy_set_header X-Forwarded-Host $host;
        proxy_set_header X-Forwarded-Proto $scheme;
        proxy_set_header X-Forwarded-For $remote_addr;
    }}

    location @coatcheck_sign_in {{
        if ($coatcheck_wants_page = 0) {{
            return 401;
        }}
        return 302 {made.public_url}/login?next=$coatcheck_next;
    }}

    location @coatcheck_away {{
        add_header Retry-After 1 always;
        return 503;
    }}

    # Signing in, signing out and one's own account are the server's.
    location ~ {made.ours} {{
        proxy_pass http://coatcheck;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_set_header Host $host;
        proxy_set_header X-Forwarded-For $remote_addr;
    }}
}}
"""


def caddy(made: Plan) -> str:
    """A Caddyfile."""
    site = f"https://{made.site}" if made.tls else f"http://{made.site}"
    where = made.listen.rpartition(":")[0].strip("[]")
    bind = "" if where == _EVERYWHERE else f"    bind {where}\n"
    tls = f"    tls {made.certificate} {made.key}\n" if made.tls else ""
    # Names with an underscore are other headers to Caddy and the same ones to many an application.
    taken = sorted({spelling for name in (*made.headers,) for spelling in (name, name.replace("-", "_"))})
    strips = "\n".join(f"            request_header -{name}" for name in taken)
    names = made.cookie_names
    authorization = "" if made.sends_token else "                header_up -Authorization\n"
    return f"""\
# Coatcheck behind Caddy 2.
{{
    admin off
}}

{site} {{
{bind}{tls}\
    @ours path_regexp {made.ours}
    handle @ours {{
        reverse_proxy {made.server} {{
            header_up X-Forwarded-For {{remote_host}}
        }}
    }}

    handle {{
        # A WebSocket and nothing else: any other upgrade, as h2c, would be a tunnel in which nobody is asked again.
        @tunnel {{
            header Upgrade *
            not header_regexp Upgrade "(?i)^websocket$"
        }}
        # What Connection names Caddy drops, after it was put in.
        @dropped header_regexp Connection "(?i)(?:^|[, \\t])(?:remote-|authorization|cookie)"
        # In this order and not in Caddy's own, which would take the headers of the answer away again.
        route {{
            respond @tunnel 400
            respond @dropped 400
            # What a client says about who it is goes before anything is asked: Caddy before 2.11.2 keeps it.
{strips}
            forward_auth {made.server} {{
                uri {made.address("caddy")}
                header_up X-Forwarded-For {{remote_host}}
                header_up -X-Original-Method
                header_up -X-Original-URL
                copy_headers {" ".join(made.copied)}
            }}
            reverse_proxy {made.application} {{
                header_up Cookie "(?:^|; *)(?:{names})=[^;]*" ""
                header_up Cookie "^; *" ""
                header_up X-Forwarded-For {{remote_host}}
{authorization}            }}
        }}
    }}
}}
"""


def traefik(made: Plan) -> str:
    """A dynamic configuration (the file provider of Traefik 3)."""
    taken = [spelling for name in made.headers for spelling in dict.fromkeys((name, name.replace("-", "_")))]
    strips = "\n".join(f'          {name}: ""' for name in taken)
    copied = "\n".join(f"          - {name}" for name in (*made.copied, "Cookie"))
    middlewares = ["coatcheck-strip", "coatcheck-auth"]
    after = ""
    if not made.sends_token:
        middlewares.append("coatcheck-keep")
        after = """
    # An access token of the client is for the server alone.
    coatcheck-keep:
      headers:
        customRequestHeaders:
          Authorization: ""
"""
    tls = "\n      tls: {}" if made.tls else ""
    certificates = f"""
tls:
  certificates:
    - certFile: {made.certificate}
      keyFile: {made.key}
"""
    return f"""\
# Coatcheck behind Traefik 3: a file of the file provider. The entry point listens on {made.listen}.
http:
  routers:
    coatcheck:
      rule: "Host(`{made.host}`) && PathRegexp(`{made.ours}`)"
      priority: 100
      service: coatcheck{tls}
    application:
      rule: "Host(`{made.host}`)"
      priority: 1
      middlewares: [{", ".join(middlewares)}]
      service: application{tls}

  middlewares:
    # What a client says about who it is goes before anything is asked.
    coatcheck-strip:
      headers:
        customRequestHeaders:
{strips}
          X-Original-Method: ""
          X-Original-URL: ""
    coatcheck-auth:
      forwardAuth:
        address: "http://{made.server}{made.address("traefik")}"
        # With true a client could choose the method we are told.
        trustForwardHeader: false
        # The answer's Cookie takes the place of the client's: without ours.
        authResponseHeaders:
{copied}
{after}
  services:
    coatcheck:
      loadBalancer:
        servers:
          - url: "http://{made.server}"
    application:
      loadBalancer:
        servers:
          - url: "http://{made.application}"
{certificates if made.tls else ""}"""


def envoy(made: Plan) -> str:
    """A static configuration (Envoy 1.30 or newer)."""
    strips = "\n".join(
        f"                          - remove: {name}"
        for name in (*(each.lower() for each in made.headers), "x-original-method", "x-original-url")
    )
    copied = "\n".join(f"                          - exact: {name.lower()}" for name in (*made.copied, "Cookie"))
    authorization = (
        "" if made.sends_token else '                          request_headers_to_remove: ["authorization"]\n'
    )
    tls = f"""\
          transport_socket:
            name: envoy.transport_sockets.tls
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
              common_tls_context:
                tls_certificates:
                  - certificate_chain: {{filename: {made.certificate}}}
                    private_key: {{filename: {made.key}}}
"""
    return f"""\
# Coatcheck behind Envoy.
static_resources:
  listeners:
    - name: public
      address: {_socket(made.listen)}
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.\
HttpConnectionManager
                stat_prefix: public
                use_remote_address: true
                # One reading of an address: the one that is judged is the one the application gets.
                normalize_path: true
                merge_slashes: true
                path_with_escaped_slashes_action: REJECT_REQUEST
                common_http_protocol_options:
                  # Remote_User is not Remote-User, but applications read it as such.
                  headers_with_underscores_action: REJECT_REQUEST
                http_filters:
                  # What a client says about who it is goes before anything is asked.
                  - name: envoy.filters.http.header_mutation
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
                      mutations:
                        request_mutations:
{strips}
                  - name: envoy.filters.http.ext_authz
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz
                      # Nobody is let in because the server could not be asked.
                      failure_mode_allow: false
                      status_on_error: {{code: ServiceUnavailable}}
                      allowed_headers:
                        patterns:
                          - exact: cookie
                          - exact: authorization
                          - exact: origin
                          - exact: accept
                          - prefix: sec-fetch-
                          - exact: sec-websocket-key
                          - exact: x-forwarded-for
                          - exact: x-forwarded-proto
                          - exact: user-agent
                      http_service:
                        server_uri: {{uri: "http://{made.server}", cluster: coatcheck, timeout: 5s}}
                        path_prefix: {made.address("envoy")}
                        authorization_response:
                          allowed_upstream_headers:
                            patterns:
{_indented(copied, 4)}
                          allowed_client_headers:
                            patterns:
                              - exact: location
                              - exact: www-authenticate
                              - exact: retry-after
                              - exact: cache-control
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
                route_config:
                  virtual_hosts:
                    - name: public
                      domains: ["{made.host}", "{made.host}:*"]
                      routes:
                        - match: {{safe_regex: {{regex: '{made.ours}'}}}}
                          route: {{cluster: coatcheck}}
                          typed_per_filter_config:
                            envoy.filters.http.ext_authz:
                              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute
                              disabled: true
                        - match: {{prefix: "/"}}
                          route: {{cluster: application}}
{authorization}\
{tls if made.tls else ""}\
  clusters:
{_cluster("coatcheck", made.server)}
{_cluster("application", made.application)}
"""


WRITERS: Final[Mapping[str, Callable[[Plan], str]]] = {
    "nginx": nginx,
    "traefik": traefik,
    "caddy": caddy,
    "envoy": envoy,
}


def _port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _variable(header: str) -> str:
    return f"coatcheck_{header.lower().replace('-', '_')}"


def _indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line for line in text.splitlines())


def _socket(address: str) -> str:
    host, _, port = address.rpartition(":")
    return f"{{socket_address: {{address: '{host.strip('[]')}', port_value: {port}}}}}"


def _cluster(name: str, address: str) -> str:
    return f"""\
    - name: {name}
      type: STRICT_DNS
      connect_timeout: 2s
      load_assignment:
        cluster_name: {name}
        endpoints:
          - lb_endpoints:
              - endpoint: {{address: {_socket(address)}}}"""
