"""What gateways are told about who is signed in: nobody else is told, and nothing but the session decides."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode
from collections.abc import MutableMapping
from typing import Any, Final
from urllib.parse import unquote

import httpx2 as httpx
import pytest
from starlette.testclient import TestClient

from coatcheck.core.forwarded import GATEWAYS, cookies_without, identity_text, is_trusted_peer, parse_rules
from coatcheck.core.network import parse_proxies
from coatcheck.errors import ConfigurationError
from coatcheck.server.forward import IDENTITY_HEADERS, MAX_PEERS
from coatcheck.server.settings import ServerSettings
from tests.server.conftest import BROWSER, COOKIE, PASSWORD, REFRESH, MakeSite, Site
from tests.server.test_outage import MakeOutpost, take_away
from tests.server.test_outage import make_outpost as make_outpost

GATEWAY = "127.0.0.1"
METHOD_OF: Final = {
    "nginx": "x-original-method",
    "traefik": "x-forwarded-method",
    "caddy": "x-forwarded-method",
    "envoy": None,
}
LET_IN: Final = {"nginx": 204, "traefik": 204, "caddy": 204, "envoy": 200}
HOSTILE_PATHS: Final = (
    "/public/../admin",
    "/public/%2e%2e/admin",
    "/public/..%2fadmin",
    "/public/..;/admin",
    "//admin",
    "/%2fadmin",
    "/admin;/../public",
    "/admin%00",
    "/admin%0d%0aRemote-User:root",
    "/health/live",
    "/favicon.ico?x=/public#/health",
    "\\admin",
)


@pytest.fixture
def gated(make_site: MakeSite) -> Site:
    made = make_site(forward=True, trusted_proxies=(GATEWAY,), forward_rules=("staff=admin+editor",))
    made.add_user()
    return made


def signed_in(site: Site, name: str = "minsu") -> str:
    cookie = site.signed_in(name).cookies.get(COOKIE)
    assert cookie is not None
    return cookie


def jar_of(site: Site, name: str = "minsu") -> list[tuple[str, str]]:
    """All that a browser brings along: the session is bound to the device cookie beside it."""
    return [("cookie", "; ".join(f"{key}={value}" for key, value in site.signed_in(name).cookies.items()))]


def ask(
    site: Site,
    gateway: str,
    *,
    cookie: str | None = None,
    rule: str = "",
    below: str = "",
    method: str = "GET",
    peer: str = GATEWAY,
    headers: list[tuple[str, str]] | None = None,
    told: bool = True,
) -> httpx.Response:
    """One question of a gateway, as it asks."""
    given = list(headers or [])
    named = METHOD_OF[gateway]
    if named is not None and told:
        given.append((named, method))
    if cookie is not None:
        given.append(("cookie", f"{COOKIE}={cookie}"))
    client = site.client(peer=peer)
    asked = method if gateway == "envoy" else "GET"
    return client.request(asked, f"/forward/{gateway}{rule and f':{rule}'}{below}", headers=given)


def status_of(site: Site, path: str, headers: list[tuple[bytes, bytes]]) -> int:
    """What a path is answered that no client would send as it is."""
    found: list[int] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            found.append(message["status"])

    scope = {
        "type": "http",
        "method": "GET",
        "scheme": "http",
        "path": unquote(path),
        "raw_path": path.encode("ascii"),
        "query_string": b"",
        "headers": headers,
        "client": (GATEWAY, 1),
        "server": ("127.0.0.1", 8000),
    }
    site.call(site.app, scope, receive, send)
    return found[0]


def nobody_comes_in(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.headers
    assert answer.content == b""
    assert not {name.lower() for name in IDENTITY_HEADERS} & set(answer.headers)
    assert "set-cookie" not in answer.headers


# -- who is told what ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_gateway_is_told_who_is_signed_in_by_headers_and_an_empty_body(gated: Site, gateway: str) -> None:
    user = gated.add_user("ratia", role="admin")
    cookie = signed_in(gated, "ratia")
    answer = ask(gated, gateway, cookie=cookie)
    assert (answer.status_code, answer.content) == (LET_IN[gateway], b"")
    assert answer.headers["remote-user"] == user.id
    assert answer.headers["remote-name"] == "ratia"
    assert answer.headers["remote-roles"] == "admin"
    assert answer.headers["remote-level"] == "pwd"
    assert len(answer.headers["remote-session"]) == 28
    assert cookie not in str(answer.headers)
    assert answer.headers["cache-control"] == "no-store"
    assert "authorization" not in answer.headers


@pytest.mark.parametrize("gateway", GATEWAYS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND"])
def test_any_method_is_answered(gated: Site, gateway: str, method: str) -> None:
    assert ask(gated, gateway, cookie=signed_in(gated), method=method).status_code == LET_IN[gateway]


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_nobody_is_401_with_a_challenge(gated: Site, gateway: str) -> None:
    answer = ask(gated, gateway)
    nobody_comes_in(answer, 401)
    assert answer.headers["www-authenticate"].startswith("Cookie")
    nobody_comes_in(ask(gated, gateway, cookie="x" * 64), 401)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_session_that_has_ended_is_401_at_once(gated: Site, gateway: str) -> None:
    client = gated.signed_in()
    cookie = client.cookies.get(COOKIE)
    assert ask(gated, gateway, cookie=cookie).status_code == LET_IN[gateway]
    assert client.post("/api/logout").status_code == 200
    nobody_comes_in(ask(gated, gateway, cookie=cookie), 401)


def test_the_cookie_of_a_sign_in_that_waits_stays_here_too(gated: Site) -> None:
    jar = f"{COOKIE}={signed_in(gated)}; {gated.service.continue_cookie.wire_name.decode()}=half; app=1"
    assert ask(gated, "traefik", headers=[("cookie", jar)]).headers["cookie"] == "app=1"


def test_what_was_told_of_a_session_is_not_told_any_more_when_it_has_ended(make_outpost: MakeOutpost) -> None:
    site, _ = make_outpost(forward=True, trusted_proxies=(GATEWAY,), forward_rules=("staff=admin",))
    user = site.add_user(role="admin")
    jar = jar_of(site)
    for _ in range(2):
        assert ask(site, "nginx", headers=jar, rule="staff").headers["remote-roles"] == "admin"
    assert site.call(site.service.coat.revoke_subject, user.id, reason="test").ended == 1
    nobody_comes_in(ask(site, "nginx", headers=jar, rule="staff"), 401)


def test_a_warm_request_asks_the_store_nothing(make_outpost: MakeOutpost) -> None:
    site, store = make_outpost(forward=True, trusted_proxies=(GATEWAY,))
    site.add_user()
    jar = jar_of(site)
    assert ask(site, "nginx", headers=jar).status_code == 204
    # Within the lease: what is kept near needs no word of the store.
    store.take_away("frozen")
    for gateway in GATEWAYS:
        assert ask(site, gateway, headers=jar).status_code == LET_IN[gateway]


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_copied_cookie_gets_nobody_in_and_its_owner_is_led_to_prove_himself(
    make_site: MakeSite, gateway: str
) -> None:
    site = make_site(forward=True, trusted_proxies=(GATEWAY,), bind_network="prefix", on_mismatch="block")
    site.add_user()
    home, page = ("x-forwarded-for", "198.51.100.7"), ("accept", "text/html")
    owner = site.client(peer=GATEWAY)
    owner.post("/api/login", json={"username": "minsu", "password": PASSWORD}, headers=dict([home])).raise_for_status()
    jar = [("cookie", "; ".join(f"{key}={value}" for key, value in owner.cookies.items())), page]
    assert ask(site, gateway, headers=[*jar, home]).status_code == LET_IN[gateway]
    nobody_comes_in(ask(site, gateway, headers=[*jar, ("x-forwarded-for", "203.0.113.9")]), 403)
    asked = ask(site, gateway, headers=[*jar, home])
    if gateway == "nginx":
        # Its error_page shows the sign-in page, which asks for the proof.
        nobody_comes_in(asked, 401)
    else:
        assert (asked.status_code, asked.headers["location"]) == (302, f"{site.base_url}/login")
    nobody_comes_in(ask(site, gateway, headers=[*jar[:1], home]), 401)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_while_the_store_is_away_it_is_503_with_the_time_to_wait(make_site: MakeSite, gateway: str) -> None:
    site = make_site(forward=True, trusted_proxies=(GATEWAY,), near_copies=0)
    site.add_user()
    cookie = signed_in(site)
    site.store.off = None
    answer = ask(site, gateway, cookie=cookie, headers=[("accept", "text/html")])
    nobody_comes_in(answer, 503)
    assert answer.headers["retry-after"] == "3"


# -- roles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_rule_lets_in_its_roles_alone(gated: Site, gateway: str) -> None:
    gated.add_user("ratia", role="admin")
    nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), rule="staff"), 403)
    assert ask(gated, gateway, cookie=signed_in(gated, "ratia"), rule="staff").status_code == LET_IN[gateway]
    nobody_comes_in(ask(gated, gateway, rule="staff"), 401)


@pytest.mark.parametrize("rule", ["Staff", "staff:", "nobody", "staff%20", "staf%66"])
def test_a_rule_that_is_not_configured_lets_nobody_in(gated: Site, rule: str) -> None:
    nobody_comes_in(ask(gated, "nginx", cookie=signed_in(gated), rule=rule), 404)


def test_a_rule_is_never_served_from_what_was_known_before_an_outage(make_outpost: MakeOutpost) -> None:
    outpost = make_outpost(
        forward=True, trusted_proxies=(GATEWAY,), forward_rules=("staff=user",), profile="b2c", outage="near"
    )
    site, _ = outpost
    site.add_user()
    jar = jar_of(site)
    assert ask(site, "nginx", headers=jar, rule="staff").status_code == 204
    take_away(outpost)
    assert ask(site, "nginx", headers=jar).status_code == 204
    nobody_comes_in(ask(site, "nginx", headers=jar, rule="staff"), 503)


@pytest.mark.parametrize("text", ["staff", "Staff=a", "s=", "=a", "s=a+", "s=a,b", "s=a b", "s=a\r\nb", "9=a", "any=*"])
def test_a_bad_rule_stops_the_start_and_names_the_field(text: str) -> None:
    with pytest.raises(ConfigurationError, match="forward_rules"):
        ServerSettings(forward_rules=(text,))


def test_two_rules_of_one_name_and_too_many_stop_the_start() -> None:
    with pytest.raises(ConfigurationError, match="twice"):
        parse_rules(["a=b", "a=c"])
    assert len(parse_rules(f"r{number}=a" for number in range(64))) == 64
    with pytest.raises(ConfigurationError, match="at most 64"):
        parse_rules(f"r{number}=a" for number in range(65))


# -- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"forward": True}, "--trusted-proxy"),
        ({"forward_rules": ("a=b",)}, "--forward"),
        ({"forward_audience": "orders"}, "--forward"),
        ({"forward": True, "trusted_proxies": (GATEWAY,), "forward_audience": "orders"}, "b2c"),
        (
            {"forward": True, "trusted_proxies": (GATEWAY,), "forward_audience": "orders", "profile": "b2c"},
            "--audience orders",
        ),
        (
            {
                "forward": True,
                "trusted_proxies": (GATEWAY,),
                "forward_audience": "http://127.0.0.1:8000",
                "audiences": ("http://127.0.0.1:8000",),
                "profile": "b2c",
            },
            "not this server",
        ),
    ],
)
def test_a_server_that_anybody_could_ask_refuses_to_start_and_names_the_cure(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        ServerSettings(**settings).sessions(bytes(32))


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_without_the_setting_there_are_no_such_addresses(make_site: MakeSite, gateway: str) -> None:
    site = make_site(trusted_proxies=(GATEWAY,))
    site.add_user()
    nobody_comes_in(ask(site, gateway, cookie=signed_in(site)), 404)


@pytest.mark.parametrize("peer", ["203.0.113.9", "127.0.0.2", "::1", "testclient", ""])
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_who_is_no_trusted_proxy_is_refused_whatever_it_sends(gated: Site, gateway: str, peer: str) -> None:
    forged = [
        ("x-forwarded-for", GATEWAY),
        ("x-real-ip", GATEWAY),
        ("forwarded", f"for={GATEWAY}"),
        ("x-forwarded-host", "127.0.0.1"),
    ]
    cookie = signed_in(gated)
    nobody_comes_in(ask(gated, gateway, cookie=cookie, peer=peer, headers=forged), 403)
    nobody_comes_in(ask(gated, gateway, cookie=cookie, peer=peer, rule="unknown"), 403)


def test_a_proxy_is_trusted_by_its_address_in_any_of_its_spellings() -> None:
    proxies = parse_proxies(["10.0.0.0/30", "fd00::7"])
    assert [is_trusted_peer(peer, proxies) for peer in ("10.0.0.0", "10.0.0.3", "::ffff:10.0.0.1", "fd00:0::7")] == [
        True,
        True,
        True,
        True,
    ]
    assert not any(is_trusted_peer(peer, proxies) for peer in ("10.0.0.4", "fd00::8", "10.0.0.1.example", "", None))


def test_what_is_remembered_of_peers_is_bounded(gated: Site) -> None:
    for number in range(MAX_PEERS + 8):
        assert ask(gated, "nginx", peer=f"10.1.{number // 256}.{number % 256}").status_code == 403
    assert ask(gated, "nginx", cookie=signed_in(gated)).status_code == 204


@pytest.mark.parametrize("entry", ["0.0.0.0/0", "::/0"])
def test_oauth2_proxy_cve_2026_76835_trusting_everybody_is_refused_at_the_start(entry: str) -> None:
    with pytest.raises(ConfigurationError, match="trust every client"):
        ServerSettings(forward=True, trusted_proxies=(entry,))


# -- what may not decide -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_identity_headers_that_come_in_are_never_believed(gated: Site, gateway: str) -> None:
    forged = [(name, "root") for name in IDENTITY_HEADERS]
    nobody_comes_in(ask(gated, gateway, headers=forged), 401)
    answer = ask(gated, gateway, cookie=signed_in(gated), headers=forged)
    assert answer.status_code == LET_IN[gateway]
    assert "root" not in str(answer.headers)
    assert all(len(answer.headers.get_list(name)) == 1 for name in IDENTITY_HEADERS)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_oauth2_proxy_cve_2025_64484_underscore_and_case_twins_of_headers_mean_nothing(
    gated: Site, gateway: str
) -> None:
    twins = [("remote_user", "root"), ("REMOTE-USER", "root"), ("x_original_method", "GET"), ("x_forwarded_for", "1")]
    nobody_comes_in(ask(gated, gateway, headers=twins), 401)
    named = METHOD_OF[gateway]
    if named is not None:
        underscored = [(named.replace("-", "_"), "GET")]
        nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), told=False, headers=underscored), 403)


@pytest.mark.parametrize("agent", ["GoogleHC/1.0", "kube-probe/1.29", "ELB-HealthChecker/2.0", ""])
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_oauth2_proxy_cve_2026_34457_a_health_checkers_user_agent_opens_nothing(
    gated: Site, gateway: str, agent: str
) -> None:
    nobody_comes_in(ask(gated, gateway, headers=[("user-agent", agent)]), 401)


@pytest.mark.parametrize("query", ["?x=/public", "?rule=any", "?roles=admin", "?next=//evil", "?%2fhealth%2flive"])
def test_oauth2_proxy_cve_2025_54576_no_query_opens_anything(gated: Site, query: str) -> None:
    cookie = signed_in(gated)
    for gateway in GATEWAYS:
        nobody_comes_in(ask(gated, gateway, below=query), 401)
        uri = [("x-forwarded-uri", f"/admin{query}")]
        nobody_comes_in(ask(gated, gateway, cookie=cookie, rule="staff", below=query, headers=uri), 403)


@pytest.mark.parametrize("path", HOSTILE_PATHS)
def test_oathkeeper_cve_2026_33494_no_spelling_of_a_path_opens_anything(gated: Site, path: str) -> None:
    cookie = signed_in(gated)
    for gateway in ("nginx", "traefik", "caddy"):
        told = [("x-forwarded-uri", path), ("x-original-url", f"http://127.0.0.1{path}")]
        nobody_comes_in(ask(gated, gateway, headers=told), 401)
        nobody_comes_in(ask(gated, gateway, cookie=cookie, rule="staff", headers=told), 403)
    if path.startswith("/"):
        nobody_comes_in(ask(gated, "envoy", below=path.partition("#")[0]), 401)
        nobody_comes_in(ask(gated, "envoy", cookie=cookie, rule="staff", below=path.partition("#")[0]), 403)


@pytest.mark.parametrize(
    "address",
    [
        "/forward/nginx/",
        "/forward/nginx/x",
        "/forward/nginx:staff/..",
        "/forward/caddy/../nginx",
        "/forward/%6eginx",
        "/%66orward/nginx",
        "/forward/nginx;",
        "/forward//nginx",
        "/forward/",
        "/forward",
        "/forward/NGINX",
    ],
)
def test_an_address_that_is_spelled_in_another_way_is_no_address(gated: Site, address: str) -> None:
    headers = [(b"x-original-method", b"GET"), (b"cookie", f"{COOKIE}={signed_in(gated)}".encode())]
    assert status_of(gated, "/forward/nginx", headers) == 204
    assert status_of(gated, address, headers) == 404


def test_oauth2_proxy_cve_2026_40575_a_forged_x_forwarded_uri_opens_nothing(gated: Site) -> None:
    for uri in ("/login", "/static/coatcheck.css", "/health/live", "/.well-known/jwks.json"):
        for gateway in GATEWAYS:
            told = [("x-forwarded-uri", uri), ("x-original-url", f"{gated.base_url}{uri}")]
            nobody_comes_in(ask(gated, gateway, headers=told), 401)


def test_next_js_cve_2025_29927_no_header_of_a_client_skips_the_check(gated: Site) -> None:
    skip = [
        ("x-middleware-subrequest", "middleware:middleware:middleware"),
        ("x-original-uri", "/public"),
        ("x-rewrite-url", "/public"),
        ("x-auth-request-user", "root"),
        ("x-forwarded-user", "root"),
        ("x-http-method-override", "OPTIONS"),
    ]
    for gateway in GATEWAYS:
        nobody_comes_in(ask(gated, gateway, headers=skip), 401)
        nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), rule="staff", headers=skip), 403)


def test_oathkeeper_cve_2021_32701_and_2026_33496_an_answer_is_never_another_rules(gated: Site) -> None:
    cookie = signed_in(gated)
    for _ in range(2):
        assert ask(gated, "nginx", cookie=cookie).status_code == 204
        nobody_comes_in(ask(gated, "nginx", cookie=cookie, rule="staff"), 403)


def test_authentik_cve_2024_47070_a_forged_x_forwarded_for_changes_nothing(gated: Site) -> None:
    cookie = signed_in(gated)
    for chain in ("127.0.0.1", "127.0.0.1, 127.0.0.1", "not an address", "203.0.113.7, 127.0.0.1", "," * 2000):
        nobody_comes_in(ask(gated, "nginx", headers=[("x-forwarded-for", chain)]), 401)
        nobody_comes_in(ask(gated, "nginx", cookie=cookie, peer="10.9.9.9", headers=[("x-forwarded-for", chain)]), 403)


def test_starlette_cve_2026_48710_a_hostile_host_decides_nothing(gated: Site) -> None:
    for host in ("evil.example", "127.0.0.1/forward/nginx?", "127.0.0.1:8000@evil.example", "a b", "[::1", "x" * 300):
        for gateway in GATEWAYS:
            nobody_comes_in(ask(gated, gateway, headers=[("host", host)]), 401)
            told = [("host", host), ("accept", "text/html"), ("x-forwarded-host", host), ("x-forwarded-uri", "/a")]
            answer = ask(gated, gateway, headers=told)
            assert answer.status_code == (401 if gateway == "nginx" else 302)
            assert answer.headers.get("location", f"{gated.base_url}/login") == f"{gated.base_url}/login"


@pytest.mark.parametrize(
    "name",
    [
        "x-original-method",
        "x-original-url",
        "x-forwarded-method",
        "x-forwarded-uri",
        "x-forwarded-host",
        "x-forwarded-proto",
    ],
)
@pytest.mark.parametrize("gateway", GATEWAYS)
def test_a_header_of_the_gateway_that_came_twice_is_refused(gated: Site, gateway: str, name: str) -> None:
    twice = [(name, "GET"), (name, "GET")]
    nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), headers=twice), 403)


@pytest.mark.parametrize("gateway", ["nginx", "traefik", "caddy"])
def test_a_gateway_that_does_not_tell_the_method_is_refused(gated: Site, gateway: str) -> None:
    nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), told=False), 403)
    named = METHOD_OF[gateway]
    assert named is not None
    nobody_comes_in(ask(gated, gateway, cookie=signed_in(gated), told=False, headers=[(named, "")]), 403)


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_an_unsafe_request_of_another_site_does_not_reach_what_is_behind(gated: Site, gateway: str) -> None:
    cookie = signed_in(gated)
    for headers in (
        [("sec-fetch-site", "cross-site")],
        [("sec-fetch-site", "same-site")],
        [("origin", "https://evil.example")],
    ):
        nobody_comes_in(ask(gated, gateway, cookie=cookie, method="POST", headers=headers), 403)
        handshake = [*headers, ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")]
        nobody_comes_in(ask(gated, gateway, cookie=cookie, headers=handshake), 403)
        assert ask(gated, gateway, cookie=cookie, headers=headers).status_code == LET_IN[gateway]
    own = [("sec-fetch-site", "same-origin"), ("origin", gated.base_url)]
    assert ask(gated, gateway, cookie=cookie, method="POST", headers=own).status_code == LET_IN[gateway]


def test_two_session_cookies_are_nobody(gated: Site) -> None:
    cookie = signed_in(gated)
    nobody_comes_in(ask(gated, "nginx", headers=[("cookie", f"{COOKIE}={cookie}; {COOKIE}={cookie}")]), 401)


def test_beside_an_authorization_header_the_cookie_does_not_count(gated: Site) -> None:
    nobody_comes_in(ask(gated, "nginx", cookie=signed_in(gated), headers=[("authorization", "Basic eDp5")]), 401)


# -- the way to the sign-in page -----------------------------------------------------------------------------------


def told_about(gateway: str, site: Site, uri: str) -> tuple[list[tuple[str, str]], str]:
    host = site.base_url.partition("//")[2]
    html = [("accept", BROWSER["accept"])]
    if gateway == "envoy":
        return [*html, ("host", host), ("x-forwarded-proto", "http")], uri
    return [*html, ("x-forwarded-uri", uri), ("x-forwarded-host", host), ("x-forwarded-proto", "http")], ""


@pytest.mark.parametrize("gateway", ["traefik", "caddy", "envoy"])
def test_a_person_is_sent_to_sign_in_and_back(gated: Site, gateway: str) -> None:
    headers, below = told_about(gateway, gated, "/reports/7?month=3&year=1")
    answer = ask(gated, gateway, headers=headers, below=below)
    nobody_comes_in(answer, 302)
    assert answer.headers["location"] == f"{gated.base_url}/login?next=/reports/7%3Fmonth%3D3%26year%3D1"


@pytest.mark.parametrize(
    "uri", ["//evil.example", "/\\evil", "/a%0d%0ab", "/x/../y", "/login", "https://evil.example/"]
)
@pytest.mark.parametrize("gateway", ["traefik", "caddy"])
def test_a_hostile_address_is_no_place_to_return_to(gated: Site, gateway: str, uri: str) -> None:
    headers, _ = told_about(gateway, gated, uri)
    assert ask(gated, gateway, headers=headers).headers["location"] == f"{gated.base_url}/login"


@pytest.mark.parametrize(("name", "value"), [("x-forwarded-host", "evil.example"), ("x-forwarded-proto", "https")])
def test_the_address_of_another_origin_is_no_place_to_return_to(gated: Site, name: str, value: str) -> None:
    headers, _ = told_about("caddy", gated, "/reports")
    changed = [(each, value if each == name else text) for each, text in headers]
    assert ask(gated, "caddy", headers=changed).headers["location"] == f"{gated.base_url}/login"


@pytest.mark.parametrize("gateway", ["traefik", "caddy", "envoy"])
def test_a_program_or_a_form_is_told_401_and_not_sent_anywhere(gated: Site, gateway: str) -> None:
    for accept in ("application/json", "*/*", "application/json, text/html;q=0.5", "x" * 2000):
        nobody_comes_in(ask(gated, gateway, headers=[("accept", accept)]), 401)
    nobody_comes_in(ask(gated, gateway, method="POST", headers=[("accept", "text/html")]), 401)


def test_nginx_is_never_sent_anywhere(gated: Site) -> None:
    nobody_comes_in(ask(gated, "nginx", headers=[("accept", "text/html")]), 401)


# -- cookies and tokens for what is behind ------------------------------------------------------------------------


@pytest.mark.parametrize("gateway", ["traefik", "envoy"])
def test_the_service_behind_gets_its_own_cookies_and_none_of_ours(gated: Site, gateway: str) -> None:
    cookie = signed_in(gated)
    lines = [("cookie", f"theme=dark; {COOKIE}={cookie};{REFRESH}=r ;  coatcheck_device=d"), ("cookie", "a=1")]
    answer = ask(gated, gateway, headers=lines)
    assert answer.status_code == LET_IN[gateway]
    assert answer.headers["cookie"] == "theme=dark; a=1"
    # It is there also when nothing is left, so that it takes the place of what the client sent.
    assert ask(gated, gateway, cookie=cookie).headers["cookie"] == ""


def test_cookies_are_taken_out_by_their_exact_name() -> None:
    ours = frozenset({b"s", b"r"})
    assert cookies_without([b"s=1; ss=2; s =3;\tr=4; xs=5; =s; S=6"], ours) == b"ss=2; xs=5; =s; S=6"
    assert cookies_without([b"", b";;", b"s"], ours) == b""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ratia", b"ratia"),
        ("민수", b"%EB%AF%BC%EC%88%98"),
        ("a%20b", b"a%2520b"),
        ("a\r\nX: y,z;\x00", b"a%0D%0AX:%20y%2Cz%3B%00"),
        ('"{$x}"', b"%22%7B$x%7D%22"),
    ],
)
def test_identity_in_a_header_is_plain_and_never_ambiguous(text: str, value: bytes) -> None:
    assert identity_text(text) == value


def claims_of(token: str) -> dict[str, Any]:
    payload = token.split(".")[1]
    found: dict[str, Any] = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    return found


@pytest.fixture
def issuing(make_site: MakeSite) -> Site:
    made = make_site(
        forward=True, trusted_proxies=(GATEWAY,), profile="b2c", audiences=("orders",), forward_audience="orders"
    )
    made.add_user()
    return made


@pytest.mark.parametrize("gateway", GATEWAYS)
def test_the_service_behind_gets_a_token_of_a_minute_for_its_audience(issuing: Site, gateway: str) -> None:
    answer = ask(issuing, gateway, cookie=signed_in(issuing))
    scheme, _, token = answer.headers["authorization"].partition(" ")
    claims = claims_of(token)
    now = issuing.clock.now_us() / 1e6
    assert scheme == "Bearer"
    assert (claims["iss"], claims["aud"]) == (issuing.base_url, "orders")
    assert (claims["sub"], claims["sid"]) == (answer.headers["remote-user"], answer.headers["remote-session"])
    assert claims["role"] == "user"
    assert claims["exp"] - claims["iat"] == 60
    # By the time the session was surely known to live: a lease ago at most, and never in the future.
    assert now - 2.5 <= claims["iat"] <= now - 1
    assert issuing.service.coat.engine.issuer.inspect(token).subject == claims["sub"]


def test_a_token_for_the_service_behind_opens_neither_the_server_nor_the_gateway(issuing: Site) -> None:
    token = ask(issuing, "nginx", cookie=signed_in(issuing)).headers["authorization"]
    assert issuing.client(headers={"authorization": token}).get("/api/me").status_code == 401
    answer = ask(issuing, "nginx", headers=[("authorization", token)])
    nobody_comes_in(answer, 401)
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_an_access_token_lets_in_until_its_session_ends_and_is_never_passed_on(issuing: Site) -> None:
    client: TestClient = issuing.client()
    signed = client.post("/api/login", json={"username": "minsu", "password": PASSWORD}).json()
    bearer = [("authorization", f"Bearer {signed['access_token']}")]
    answer = ask(issuing, "traefik", headers=bearer)
    assert answer.status_code == 204
    assert answer.headers["remote-session"] == signed["session"]["sid"]
    assert signed["access_token"] not in answer.headers["authorization"]
    assert client.post("/api/logout").status_code == 200
    nobody_comes_in(ask(issuing, "traefik", headers=bearer), 401)


def test_no_token_is_signed_through_an_outage(make_outpost: MakeOutpost) -> None:
    outpost = make_outpost(
        forward=True, trusted_proxies=(GATEWAY,), profile="b2c", audiences=("orders",), forward_audience="orders"
    )
    site, _ = outpost
    site.add_user()
    cookie = signed_in(site)
    assert "authorization" in ask(site, "nginx", cookie=cookie).headers
    take_away(outpost)
    nobody_comes_in(ask(site, "nginx", cookie=cookie), 503)


def test_a_token_never_outlives_its_session(issuing: Site) -> None:
    client = issuing.signed_in()
    cookie = client.cookies.get(COOKIE)
    ends = client.get("/api/me").json()["session"]["expires_at"]
    issuing.clock.advance(ends - issuing.clock.now_us() / 1e6 - 30)
    claims = claims_of(ask(issuing, "nginx", cookie=cookie).headers["authorization"].partition(" ")[2])
    assert claims["exp"] <= ends


def test_answers_are_counted_by_address_and_status_and_invented_addresses_together(gated: Site) -> None:
    ask(gated, "nginx", cookie=signed_in(gated), rule="staff")
    gated.client().get("/forward/invented-by-somebody")
    metrics = gated.client().get("/metrics").text
    assert 'coatcheck_request_duration_seconds_count{route="/forward/nginx:staff",status="403"} 1.0' in metrics
    assert 'route="/forward/other",status="404"} 1.0' in metrics
    assert "invented" not in metrics
