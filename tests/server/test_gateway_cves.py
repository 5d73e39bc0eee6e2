"""Known holes of gateways and of what they ask, tried against our answers: one test for each kind.

What `test_forward.py` names is not repeated here. Requests go to the ASGI app as octets, because the worst of them no
client would send. A gateway is assumed to have done what its hole made it do: dropped a header, passed one on, sent one
twice.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Final
from urllib.parse import unquote_to_bytes

import pytest

from coatcheck.core.forwarded import GATEWAYS
from coatcheck.server.cli.proxy_config import WRITERS, plan
from coatcheck.server.forward import IDENTITY_HEADERS
from coatcheck.server.settings import ServerSettings
from coatcheck.session import SendCookie
from tests.server.conftest import COOKIE, PASSWORD, MakeSite, Site

GATEWAY: Final = "127.0.0.1"
METHOD_OF: Final = {"nginx": b"x-original-method", "traefik": b"x-forwarded-method", "caddy": b"x-forwarded-method"}
PAGE: Final = (b"accept", b"text/html")
FOREIGN: Final = (b"sec-fetch-site", b"cross-site")
IDENTITY: Final = {name.lower().encode() for name in IDENTITY_HEADERS}
FORGOTTEN: Final = (
    (b"x-forwarded-prefix", b"/static"),
    (b"x-forwarded-port", b"443"),
    (b"x-forwarded-server", b"trusted"),
    (b"x-envoy-original-path", b"/static/coatcheck.css"),
    (b"x-envoy-internal", b"true"),
    (b"x-envoy-external-address", b"127.0.0.1"),
    (b"x-real-ip", b"127.0.0.1"),
    (b"forwarded", b"for=127.0.0.1;host=evil.example;proto=https"),
)
READ: Final = (
    b"cookie",
    b"authorization",
    b"origin",
    b"sec-fetch-site",
    b"host",
    b"accept",
    b"user-agent",
    b"x-forwarded-for",
    b"x-forwarded-uri",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-original-method",
    b"x-forwarded-method",
    b"sec-websocket-key",
)
ADDRESSES: Final = (
    b"/admin#/public",
    b"/admin%23/public",
    b"/public#/../admin",
    b"/public/..;/admin",
    b"/public;x=1/..;y/admin",
    b"/../envoy",
    b"/..%2fenvoy",
    b"/../../forward/envoy",
    b"/%2e%2e/envoy",
    b"/..;/envoy",
    b"/\\..\\envoy",
    b"/a\x00b",
    b"//evil.example/",
    b"/?#:staff",
    b"/" + b"a/" * 4000,
)
GOALS: Final = (
    b"https://evil.example/",
    b"//evil.example",
    b"/\\evil.example",
    b"/%09/evil.example",
    b"/\t/evil.example",
    b"/%0a/evil.example",
    b"/%0d/evil.example",
    b"/%0b/evil.example",
    b"/%5cevil.example",
    b"/a/../\\evil.example",
    b"/%2f/evil.example",
    b"/.evil.example/..",
    b"javascript:alert(1)",
)
Pairs = list[tuple[bytes, bytes]]


@dataclass(frozen=True, kw_only=True)
class Told:
    """One answer. No name may be in it twice but those that HTTP lets repeat."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def let_in(self) -> bool:
        """Whether the gateway passes the request on; whoever is let in is named by every header, and nobody else."""
        found = self.status in (200, 204)
        assert self.body == b""
        assert found == (self.headers.keys() >= IDENTITY)
        assert found or not self.headers.keys() & IDENTITY
        assert self.headers[b"cache-control"] == b"no-store"
        assert b"set-cookie" not in self.headers
        return found


def ask(
    site: Site, gateway: str, *headers: tuple[bytes, bytes], rule: str = "", below: bytes = b"", method: bytes = b"GET"
) -> Told:
    """One question of a gateway, octet by octet; `method` is what the gateway says of it."""
    given = list(headers)
    if gateway in METHOD_OF and METHOD_OF[gateway] not in dict(given):
        given.append((METHOD_OF[gateway], method))
    raw, _, query = below.partition(b"?")
    return send(
        site,
        f"/forward/{gateway}{rule and f':{rule}'}".encode() + raw,
        given,
        query=query,
        method=method if gateway == "envoy" else b"GET",
    )


def send(site: Site, raw_path: bytes, headers: Pairs, *, query: bytes = b"", method: bytes = b"GET") -> Told:
    messages: list[MutableMapping[str, Any]] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body is not to be read")

    async def take(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method.decode("latin-1"),
        "scheme": "http",
        "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
        "client": (GATEWAY, 1),
        "server": ("127.0.0.1", 8000),
    }
    site.call(site.app, scope, receive, take)
    start = messages[0]
    names = [name for name, _ in start["headers"]]
    assert len(names) == len(set(names)), names
    assert all(name == name.lower() and not {10, 13, 0} & set(value) for name, value in start["headers"])
    return Told(
        status=start["status"],
        headers=dict(start["headers"]),
        body=b"".join(each.get("body", b"") for each in messages[1:]),
    )


@pytest.fixture
def gated(make_site: MakeSite) -> Site:
    made = make_site(forward=True, trusted_proxies=(GATEWAY,), forward_rules=("staff=admin",))
    made.add_user()
    return made


def cookie_of(site: Site, name: str = "minsu") -> tuple[bytes, bytes]:
    return b"cookie", f"{COOKIE}={site.signed_in(name).cookies[COOKIE]}".encode()


def opened(site: Site, subject: str, **claims: Any) -> tuple[bytes, bytes]:
    """The cookie of a session that the sign-in pages would never make."""

    async def make() -> str:
        session = site.service.coat.session(None)
        await session.login(subject, claims=claims)
        assert isinstance(session.cookie_action, SendCookie)
        return session.cookie_action.id.text

    return b"cookie", f"{COOKIE}={site.call(make)}".encode()


# -- identity headers ----------------------------------------------------------------------------------------------


def test_caddy_cve_2026_30851_no_identity_header_is_ever_missing_so_none_of_a_client_stays(gated: Site) -> None:
    """Stale identity: a gateway copies only the headers that an answer has, so one that is missing leaves the client's.
    Caddy CVE-2026-30851 (GHSA-7r4p-vjf4-gxv4). What somebody does not have is told as an empty value."""
    for gateway in GATEWAYS:
        told = ask(gated, gateway, opened(gated, "50"), *((name, b"root") for name in IDENTITY))
        assert told.let_in
        assert told.headers[b"remote-user"] == b"50"
        assert (told.headers[b"remote-name"], told.headers[b"remote-roles"]) == (b"", b"")
        assert b"root" not in told.headers.values()
        if gateway in ("traefik", "envoy"):
            assert told.headers[b"cookie"] == b""


def test_envoy_cve_2023_27493_nothing_in_an_identity_starts_another_header(gated: Site) -> None:
    """Response splitting: properties of a request that a gateway puts into headers unescaped. Envoy CVE-2023-27493."""
    hostile = "50\r\nRemote-Roles: admin\r\n\r\nGET /admin HTTP/1.1"
    for gateway in GATEWAYS:
        told = ask(
            gated, gateway, opened(gated, hostile, name=f"a\x00\n{hostile}", roles=["a,admin", "b\r\nc", "\u2028"])
        )
        assert told.let_in
        assert told.headers[b"remote-user"].startswith(b"50%0D%0ARemote-Roles:%20admin%0D%0A")
        assert told.headers[b"remote-roles"].split(b",") == [b"%E2%80%A8", b"a%2Cadmin", b"b%0D%0Ac"]
        assert ask(gated, gateway, opened(gated, "50", roles=["a,admin", "staff"]), rule="staff").status == 403


def test_traefik_ghsa_5m6w_wvh7_57vm_and_caddy_ghsa_f59h_q822_g45g_an_alias_with_an_underscore_is_another_header(
    gated: Site,
) -> None:
    """Alias smuggling: a gateway cleans `X-Forwarded-Proto` and passes `X_Forwarded_Proto` on. Traefik
    GHSA-5m6w-wvh7-57vm, Caddy GHSA-f59h-q822-g45g, Traefik CVE-2026-33433 (another case)."""
    cookie = cookie_of(gated)
    host = gated.base_url.partition("//")[2].encode()
    aliases = [
        (b"x_forwarded_proto", b"http"),
        (b"x_forwarded_host", host),
        (b"x_forwarded_uri", b"/reports"),
        (b"x_original_method", b"GET"),
        (b"x_forwarded_method", b"GET"),
        (b"remote_user", b"root"),
        (b"remote_roles", b"admin"),
        (b"coatcheck_session", cookie[1].partition(b"=")[2]),
        (b"sec_fetch_site", b"same-origin"),
    ]
    for gateway in GATEWAYS:
        assert ask(gated, gateway, *aliases).status == 401
        assert ask(gated, gateway, *aliases, cookie, rule="staff").status == 403
        assert ask(gated, gateway, *aliases, cookie, FOREIGN, method=b"POST").status == 403
        # None of them makes up for a header that the gateway did not send, or is taken for one that came twice.
        location = ask(gated, gateway, *aliases, PAGE).headers.get(b"location")
        assert location == (None if gateway == "nginx" else f"{gated.base_url}/login".encode())
        if gateway in METHOD_OF:
            assert ask(gated, gateway, *aliases, cookie, (METHOD_OF[gateway], b"")).status == 403
        assert ask(gated, gateway, *aliases, cookie).let_in


# -- headers of the gateway that a client drops, doubles or makes up --------------------------------------------------


def test_traefik_cve_2024_45410_oathkeeper_ghsa_w9mr_28mw_j8hg_what_a_client_lets_the_gateway_drop_opens_nothing(
    gated: Site,
) -> None:
    """Hop-by-hop abuse: `Connection: X-Forwarded-Host` makes a gateway drop what it has just set. Traefik
    CVE-2024-45410, Oathkeeper GHSA-w9mr-28mw-j8hg, Fabio CVE-2025-48865. Whatever is missing, it is never more that is
    let in, and a person is never led elsewhere."""
    host = gated.base_url.partition("//")[2].encode()
    for gateway in GATEWAYS:
        method = [(METHOD_OF[gateway], b"GET")] if gateway in METHOD_OF else []
        full = [
            (b"x-forwarded-host", host),
            (b"host", host),
            (b"x-forwarded-proto", b"http"),
            (b"x-forwarded-uri", b"/r"),
        ]
        path = f"/forward/{gateway}".encode()
        for gone in (b"host", b"x-forwarded-host", b"x-forwarded-proto", b"x-forwarded-uri", *dict(method)):
            hop = (b"connection", b"close, " + gone)
            left = [(name, value) for name, value in [*full, *method] if name != gone]
            for headers in ([*left, hop], [*left, hop, PAGE]):
                told = send(gated, path, headers)
                assert not told.let_in
                assert told.headers.get(b"location", f"{gated.base_url}/login".encode()).startswith(
                    f"{gated.base_url}/login".encode()
                )
            assert send(gated, path + b":staff", [*left, hop, cookie_of(gated)]).status == 403
        if method:
            assert send(gated, path, [*full, cookie_of(gated)]).status == 403


def test_traefik_cve_2026_35051_and_2026_54764_envoy_cve_2023_27487_a_header_that_the_gateway_forgot_decides_nothing(
    gated: Site,
) -> None:
    """Pass-through: a gateway does not clean one of the headers about the request. Traefik CVE-2026-35051
    (`X-Forwarded-Prefix`), CVE-2026-54764 (`X-Forwarded-Port`), Envoy CVE-2023-27487 (`x-envoy-original-path`)."""
    cookie = cookie_of(gated)
    for gateway in GATEWAYS:
        for header in FORGOTTEN:
            assert ask(gated, gateway, header).status == 401
            assert ask(gated, gateway, header, cookie, rule="staff").status == 403
            assert ask(gated, gateway, header, cookie, FOREIGN, method=b"DELETE").status == 403
            location = ask(gated, gateway, header, PAGE, below=b"/r" if gateway == "envoy" else b"").headers.get(
                b"location"
            )
            assert location in (None, f"{gated.base_url}/login".encode())
            assert ask(gated, gateway, header, cookie).headers == ask(gated, gateway, cookie).headers


def test_oathkeeper_ghsa_vhr5_ggp3_qq85_a_claimed_scheme_chooses_no_other_rule_cookie_or_origin(
    make_site: MakeSite,
) -> None:
    """`X-Forwarded-Proto` chooses the rule, whoever sent it. Oathkeeper GHSA-vhr5-ggp3-qq85. Here it names no cookie
    without the prefix of https, and makes no page of http one of ours."""
    site = make_site(
        forward=True, trusted_proxies=(GATEWAY,), forward_rules=("staff=admin",), public_url="https://id.example"
    )
    site.add_user()
    jar = site.signed_in().cookies
    (name,) = [name for name in jar if name.endswith("session")]
    assert name.startswith("__Host-")
    cookie = (b"cookie", f"{name}={jar[name]}".encode())
    plain = (b"cookie", f"{COOKIE}={jar[name]}".encode())
    for gateway in GATEWAYS:
        for scheme in (b"http", b"https", b"HTTPS", b"https, http", b"ws", b""):
            told = (b"x-forwarded-proto", scheme)
            assert ask(site, gateway, told, plain).status == 401
            assert ask(site, gateway, told, cookie, rule="staff").status == 403
            assert ask(site, gateway, told, cookie, (b"origin", b"http://id.example"), method=b"POST").status == 403
            assert ask(site, gateway, told, cookie, (b"origin", b"https://id.example"), method=b"POST").let_in


def test_envoy_cve_2021_32777_of_a_header_that_comes_twice_no_single_value_decides(gated: Site) -> None:
    """Two values of one header, of which a gateway tells one and the application reads the other. Envoy
    CVE-2021-32777."""
    gated.add_user("ratia", role="admin")
    mine, admin = cookie_of(gated), cookie_of(gated, "ratia")
    for gateway in GATEWAYS:
        for pair in ((mine, admin), (admin, mine), (mine, (b"cookie", COOKIE.encode() + b"="))):
            assert not ask(gated, gateway, *pair).let_in
            assert not ask(gated, gateway, *pair, rule="staff").let_in
        assert not ask(gated, gateway, mine, (b"authorization", b"Basic eDp5"), (b"authorization", b"")).let_in
        same, own = (b"sec-fetch-site", b"same-origin"), (b"origin", gated.base_url.encode())
        evil = (b"origin", b"https://evil.example")
        for pair in ((same, FOREIGN), (FOREIGN, same), (own, evil), (evil, own)):
            assert ask(gated, gateway, mine, *pair, method=b"POST").status == 403
        if gateway in METHOD_OF:
            named = METHOD_OF[gateway]
            for first, second in ((b"GET", b"POST"), (b"POST", b"GET")):
                assert ask(gated, gateway, mine, FOREIGN, (named, first), (named, second)).status == 403


def test_envoy_cve_2023_27488_octets_that_are_no_utf_8_are_refused_and_never_an_error_that_lets_in(gated: Site) -> None:
    """A header that the answering side cannot read becomes an error, and the error a yes. Envoy CVE-2023-27488."""
    values = (b"\xff\xfe", b"\xc3\x28", b"a\x80=b;\xa0" + COOKIE.encode() + b"=x", b"\xed\xa0\x80")
    for gateway in GATEWAYS:
        for name, value in product(READ, values):
            for headers, method in product(([], [PAGE], [FOREIGN]), (b"GET", b"POST")):
                told = ask(gated, gateway, (name, value), *headers, method=method)
                assert not told.let_in
                assert told.status in (302, 401, 403)


def test_allauth_65_14_1_an_address_that_a_client_writes_into_the_chain_is_not_where_it_is(
    make_site: MakeSite,
) -> None:
    """Forged `X-Forwarded-For`: the first entry is taken for the client, though anybody may write it. allauth 65.14.1.
    A copied cookie does not count from elsewhere because its thief claims to be at home."""
    site = make_site(forward=True, trusted_proxies=(GATEWAY,), bind_network="prefix", on_mismatch="block")
    site.add_user()
    home, thief, agent = "198.51.100.7", "203.0.113.9", (b"user-agent", b"curl/8.5.0")
    sent = {"username": "minsu", "password": PASSWORD}
    chains: list[tuple[bool, tuple[str, ...]]] = [
        (True, (home,)),
        (True, (f"{thief}, {home}",)),
        (False, (thief,)),
        (False, (f"{home}, {thief}",)),
        (False, (f"127.0.0.1, {home},{home}, {thief}",)),
        (False, (home, thief)),
    ]
    for is_home, chain in chains:
        # Of its own: once a session was seen elsewhere, its owner has to prove himself.
        owner = site.client(peer=GATEWAY)
        owner.post("/api/login", json=sent, headers={"x-forwarded-for": home}).raise_for_status()
        jar = (b"cookie", "; ".join(f"{key}={value}" for key, value in owner.cookies.items()).encode())
        told = ask(site, "caddy", jar, agent, *((b"x-forwarded-for", each.encode()) for each in chain))
        assert told.let_in == is_home, chain


# -- addresses and methods -----------------------------------------------------------------------------------------


def test_envoy_cve_2021_32779_and_2026_73511_no_part_of_an_address_leads_to_another_rule(
    gated: Site,
) -> None:
    """Path confusion: a fragment (Envoy CVE-2021-32779) or a parameter of a segment (CVE-2026-73511) is read in one way
    by who judges and in another by who answers. Envoy alone appends the address to ours."""
    cookie, host = cookie_of(gated), (b"host", gated.base_url.partition("//")[2].encode())
    for below in ADDRESSES:
        assert ask(gated, "envoy", below=below).status == 401
        assert ask(gated, "envoy", cookie, below=below, rule="staff").status == 403
        location = ask(gated, "envoy", host, PAGE, below=below).headers[b"location"]
        assert location == f"{gated.base_url}/login".encode()
        for gateway in ("nginx", "traefik", "caddy"):
            assert not ask(gated, gateway, cookie, below=below).let_in
            assert ask(gated, gateway, cookie, (b"x-forwarded-uri", below), rule="staff").status == 403


def test_envoy_cve_2026_73547_a_connect_without_an_address_is_judged_as_any_unsafe_method(gated: Site) -> None:
    """A `CONNECT` has no path, and a WebSocket over HTTP/2 (RFC 8441) no `Sec-WebSocket-Key`. Envoy CVE-2026-73547."""
    cookie = cookie_of(gated)
    for gateway in GATEWAYS:
        assert ask(gated, gateway, method=b"CONNECT").status == 401
        assert ask(gated, gateway, cookie, FOREIGN, method=b"CONNECT").status == 403
        assert ask(gated, gateway, cookie, (b"origin", b"https://evil.example"), method=b"CONNECT").status == 403
        assert ask(gated, gateway, PAGE, method=b"CONNECT").status == 401


def test_cross_site_websocket_hijacking_a_handshake_counts_as_unsafe_whatever_it_calls_itself(gated: Site) -> None:
    """A page of another site opens a WebSocket with the cookies of its visitor (CWE-1385). A handshake is a `GET`."""
    cookie, evil = cookie_of(gated), (b"origin", b"https://evil.example")
    for gateway in GATEWAYS:
        for key in (b"dGhlIHNhbXBsZSBub25jZQ==", b"", b"x"):
            handshake = [cookie, (b"sec-websocket-key", key), (b"upgrade", b"websocket"), (b"connection", b"Upgrade")]
            for where in (evil, FOREIGN, (b"origin", b"null"), (b"origin", gated.base_url.encode() + b".evil.example")):
                assert ask(gated, gateway, *handshake, where).status == 403
            assert ask(gated, gateway, *handshake[1:], evil).status in (401, 403)
            assert ask(gated, gateway, *handshake, (b"origin", gated.base_url.encode())).let_in


def test_asvs_3_5_2_a_method_that_a_client_claims_makes_no_other_one_of_what_was_sent(gated: Site) -> None:
    """Method override: an unsafe request is judged as a safe one (ASVS 3.5.2). Only the exact names of safe methods
    are safe."""
    cookie = cookie_of(gated)
    names = (b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-original-http-method")
    claims = [(name, b"GET") for name in names]
    for gateway in GATEWAYS:
        assert ask(gated, gateway, cookie, FOREIGN, *claims, below=b"", method=b"POST").status == 403
        for method in (b"get", b"GET ", b" GET", b"GETS", b"GET,POST", b"HEAD\x00", b"\xffGET", b"TRACE2", b"PATCH"):
            assert ask(gated, gateway, cookie, FOREIGN, method=method).status == 403, method


# -- the way to the sign-in page -------------------------------------------------------------------------------------


def test_oauth2_proxy_cve_2020_5233_2020_4037_and_2020_11053_a_person_is_never_led_to_another_host(
    gated: Site,
) -> None:
    """Open redirect by an address to return to: `rd`, `X-Auth-Request-Redirect`, or white space between slashes.
    oauth2-proxy CVE-2020-5233, CVE-2020-4037, CVE-2020-11053, Gitea GHSA-j5r2-4c8j-xc3m."""
    here = gated.base_url.encode() + b"/login"
    host = gated.base_url.partition("//")[2].encode()
    origin = [(b"x-forwarded-host", host), (b"x-forwarded-proto", b"http")]
    for goal in GOALS:
        ways = [(b"x-auth-request-redirect", goal), (b"x-redirect", goal), (b"referer", goal)]
        for gateway in ("traefik", "caddy"):
            assert ask(gated, gateway, *ways, PAGE, below=b"?rd=" + goal).headers[b"location"] == here
            told = ask(gated, gateway, *ways, *origin, (b"x-forwarded-uri", goal), PAGE, below=b"?rd=" + goal)
            assert told.headers[b"location"] == here
        below = goal if goal.startswith(b"/") else b"/" + goal
        told = ask(gated, "envoy", (b"host", host), (b"x-forwarded-proto", b"http"), PAGE, below=below)
        assert told.headers[b"location"] == here
    # And whoever asks for it at the page itself stays on this host.
    for goal, leads in ((b"/reports", "/reports"), (b"//evil.example", "/account"), (b"/\t/evil.example", "/account")):
        form = {"username": "minsu", "password": PASSWORD, "next": goal.decode()}
        answer = gated.browser().post("/login", data=form)
        assert (answer.status_code, answer.headers["location"]) == (303, leads)


# -- who it was before ---------------------------------------------------------------------------------------------


def test_oauth2_proxy_ghsa_f24x_5g9q_753f_a_cookie_from_before_the_sign_in_is_nobody_afterwards(gated: Site) -> None:
    """Session fixation: a stale or planted cookie is kept at the sign-in. oauth2-proxy GHSA-f24x-5g9q-753f. The
    gateway is told of the new one alone, also where it knew the old one a moment ago."""
    ratia = gated.add_user("ratia", role="admin")
    client = gated.signed_in()
    old = (b"cookie", f"{COOKIE}={client.cookies[COOKIE]}".encode())
    planted = (b"cookie", f"{COOKIE}={'x' * 43}".encode())
    for gateway in GATEWAYS:
        assert ask(gated, gateway, old).let_in
        assert not ask(gated, gateway, planted).let_in
    client.post("/api/login", json={"username": "ratia", "password": PASSWORD}).raise_for_status()
    new = (b"cookie", f"{COOKIE}={client.cookies[COOKIE]}".encode())
    for gateway in GATEWAYS:
        assert ask(gated, gateway, old).status == 401
        assert ask(gated, gateway, old, rule="staff").status == 401
        assert ask(gated, gateway, new, rule="staff").headers[b"remote-user"] == ratia.id.encode()


def test_flask_cve_2023_30861_no_answer_of_any_kind_may_be_kept_for_somebody_else(gated: Site) -> None:
    """A cache between gateway and server hands one person's answer to another. Flask CVE-2023-30861."""
    cookie = cookie_of(gated)
    answers = [
        ask(gated, "caddy", cookie),
        ask(gated, "envoy", cookie),
        ask(gated, "caddy", PAGE),
        ask(gated, "caddy"),
        ask(gated, "caddy", cookie, rule="staff"),
        ask(gated, "caddy", cookie, rule="nobody"),
    ]
    gated.store.off = None
    # Another session, of which no copy is near.
    answers.append(ask(gated, "caddy", (b"cookie", f"{COOKIE}={'A' * 43}".encode())))
    found = [each.status for each in answers]
    assert found[:6] == [204, 200, 302, 401, 403, 404]
    assert found[6] in (401, 503)
    assert all(each.headers[b"cache-control"] == b"no-store" for each in answers)
    assert not any({b"etag", b"last-modified", b"expires", b"age"} & each.headers.keys() for each in answers)


# -- what gateways are told to do --------------------------------------------------------------------------------------


def printed(gateway: str) -> str:
    settings = ServerSettings(forward=True, trusted_proxies=(GATEWAY,), public_url="http://127.0.0.1:8080")
    return WRITERS[gateway](plan(settings, application="127.0.0.1:3000"))


@pytest.mark.parametrize(("gateway", "shows"), [("nginx", '"~*^websocket$"'), ("caddy", "header_regexp Upgrade")])
def test_h2c_smuggling_only_a_websocket_gets_through_as_an_upgrade(gateway: str, shows: str) -> None:
    """`Upgrade: h2c` that gets through is a tunnel in which nobody is asked again and every identity header is the
    client's (h2c smuggling). Envoy lets no upgrade through of itself."""
    text = printed(gateway)
    assert shows in text
    assert "proxy_set_header Upgrade $http_upgrade" not in text


def test_oathkeeper_ghsa_w9mr_28mw_j8hg_connection_does_not_take_the_identity_away_again() -> None:
    """`Connection: Remote-User` makes a gateway drop the header that it has just put in, and the application sees a
    request of nobody. nginx and Envoy do not; Caddy has to refuse it."""
    assert "header_regexp Connection" in printed("caddy")


def test_envoy_takes_the_authorization_from_the_application_alone() -> None:
    """Clients with an access token, and verifiers that fetch revocations, ask the server itself through Envoy."""
    _, of_server, of_application = printed("envoy").split("- match: ")
    assert 'request_headers_to_remove: ["authorization"]' in of_application
    assert "request_headers_to_remove" not in of_server
