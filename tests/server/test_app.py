"""The whole application: its addresses, the headers of every answer, health, metrics, and what a crash tells."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from tests.server.conftest import PASSWORD, MakeSite, Site

EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "x-frame-options": "DENY",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
ADDRESSES = [
    ("GET", "/", 200),
    ("HEAD", "/", 200),
    ("GET", "/login", 200),
    ("GET", "/account", 303),
    ("GET", "/setup/x", 404),
    ("GET", "/nothing", 404),
    ("PUT", "/login", 405),
    ("POST", "/logout", 303),
    ("GET", "/api/me", 401),
    ("POST", "/api/login", 415),
    ("GET", "/api/nothing", 404),
    ("GET", "/openapi.json", 200),
    ("GET", "/health/live", 200),
    ("GET", "/health/ready", 200),
    ("GET", "/metrics", 200),
    ("GET", "/static/nothing.css", 404),
]


class Raw:
    """One request below HTTP clients, which repair what they are given: bytes in, messages out."""

    def __init__(self, site: Site, path: str, *, method: str = "GET", headers: list[tuple[bytes, bytes]]) -> None:
        self.messages: list[dict[str, Any]] = []
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode("utf-8", "surrogateescape"),
            "query_string": b"",
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        site.call(site.app, scope, self.receive, self.send)

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(self, message: Any) -> None:
        self.messages.append(dict(message))

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])


# Every answer.


@pytest.mark.parametrize("pages", [False, True])
def test_every_answer_has_the_security_headers(site: Site, pages: bool) -> None:
    client = site.browser() if pages else site.client()
    for method, path, status in ADDRESSES:
        answer = client.request(method, path)
        assert (method, path, answer.status_code) == (method, path, 401 if path == "/account" and not pages else status)
        assert {name: answer.headers.get(name) for name in EVERYWHERE} == EVERYWHERE
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert "strict-transport-security" not in answer.headers
        assert "server" not in answer.headers


def test_over_https_every_answer_says_that_it_stays_so(make_site: MakeSite) -> None:
    site = make_site(public_url="https://id.example")
    for method, path, _ in ADDRESSES:
        answer = site.client().request(method, path)
        assert answer.headers["strict-transport-security"] == "max-age=31536000; includeSubDomains"


def test_errors_are_pages_for_browsers_and_problem_documents_for_programs(site: Site) -> None:
    kinds = {
        ("/nothing", "text/html,*/*;q=0.8"): "text/html; charset=utf-8",
        ("/nothing", "text/html;q=0.5,application/json"): "application/problem+json",
        ("/nothing", "*/*"): "application/problem+json",
        ("/nothing", "text/html" + "," * 2000): "application/problem+json",
        ("/nothing", ""): "application/problem+json",
        ("/api/nothing", "text/html"): "application/problem+json",
        ("/health/nothing", "text/html"): "application/problem+json",
        ("/static/nothing", "text/html"): "application/problem+json",
        ("/apiary", "text/html"): "text/html; charset=utf-8",
    }
    for (path, accept), kind in kinds.items():
        answer = site.client(headers={"accept": accept}).get(path)
        assert answer.status_code == 404
        assert (path, accept[:30], answer.headers["content-type"]) == (path, accept[:30], kind)


def test_a_problem_document_is_complete(site: Site) -> None:
    answer = site.client().get("/api/nothing")
    assert answer.json() == {
        "type": "urn:coatcheck:problem:not_found",
        "title": "There is nothing here.",
        "status": 404,
        "code": "not_found",
    }
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/login", "GET, HEAD, POST"),
        ("/logout", "POST"),
        ("/api/login", "POST"),
        ("/api/sessions", "DELETE, GET, HEAD"),
        ("/health/live", "GET, HEAD"),
    ],
)
@pytest.mark.parametrize("method", ["PUT", "PATCH", "TRACE", "OPTIONS", "FOO"])
def test_a_wrong_method_is_told_which_ones_are_right(site: Site, path: str, allowed: str, method: str) -> None:
    answer = site.client().request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/login/", "/api/me/", "//login", "/LOGIN", "/api//me", "/./login", "/login;x=1"])
def test_an_address_has_one_spelling(site: Site, path: str) -> None:
    raw = Raw(site, path, headers=[(b"host", b"evil.example"), (b"accept", b"application/json")])
    assert raw.status == 404
    assert b"location" not in raw.headers


@pytest.mark.parametrize(
    "path", ["/\x00", "/\udcff", "/%", "/%zz", "/a\r\nb: c", "/api/sessions/\udcff\x00", "/" + "a" * 100_000, "/٣"]
)
@pytest.mark.parametrize("accept", [b"text/html", b"application/json"])
def test_a_hostile_path_is_not_found(site: Site, path: str, accept: bytes) -> None:
    raw = Raw(site, path, headers=[(b"host", b"x"), (b"accept", accept)])
    assert raw.status == 404 or (raw.status == 405 and path.startswith("/api/sessions/"))


@pytest.mark.parametrize("host", [b"", b"evil.example", b"a@b:c", b"\xff\xfe", b"[::1", b"x" * 9000])
def test_no_host_header_ever_appears_in_an_answer(site: Site, host: bytes) -> None:
    for path in ("/", "/login", "/login/", "/account", "/nothing", "/openapi.json"):
        raw = Raw(site, path, headers=[(b"host", host), (b"accept", b"text/html")])
        whole = repr(raw.messages)
        assert raw.status in (200, 303, 404)
        assert "evil.example" not in whole
        assert b"http" not in raw.headers.get(b"location", b"")


def test_two_hosts_or_none_do_no_harm(site: Site) -> None:
    assert Raw(site, "/login", headers=[]).status == 200
    assert Raw(site, "/login", headers=[(b"host", b"a"), (b"host", b"b")]).status == 200


def test_hostile_header_bytes_do_no_harm(site: Site) -> None:
    for name in (b"accept-language", b"accept", b"user-agent", b"cookie", b"x-forwarded-for", b"content-type"):
        for value in (b"\xff" * 100, b"\x00", b"," * 60_000, b";" * 60_000, b"q=" * 1000, b"a" * 60_000):
            raw = Raw(site, "/login", headers=[(b"host", b"x"), (name, value)])
            assert raw.status == 200, (name, value[:10])


# A crash.


@pytest.mark.parametrize("accept", ["text/html", "application/json"])
def test_a_crash_tells_nothing_and_has_every_header(site: Site, accept: str, caplog: pytest.LogCaptureFixture) -> None:
    async def crash(_: Request) -> Response:
        raise RuntimeError("secret of the inside")

    site.app.router.routes.append(Route("/crash", crash))
    answer = site.client(headers={"accept": accept}).get("/crash")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "Something went wrong." in answer.text
    assert {name: answer.headers.get(name) for name in EVERYWHERE} == EVERYWHERE
    assert answer.headers["cache-control"] == "no-store"
    # The operator is told, with the trace.
    assert any(record.exc_info is not None for record in caplog.records)


def test_a_crash_after_a_sign_in_signs_nobody_in(site: Site) -> None:
    user = site.add_user("minsu")

    async def crash(request: Request) -> Response:
        session = request.scope["coatcheck.exchange"].session
        await session.login(user.id)
        raise RuntimeError

    site.app.router.routes.append(Route("/crash", crash))
    answer = site.client().get("/crash")
    assert answer.status_code == 500
    assert "set-cookie" not in answer.headers
    assert site.call(site.service.coat.list_sessions, user.id).items == ()


# Health.


def test_ready_says_what_it_looked_at(site: Site) -> None:
    answer = site.client().get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {
        "status": "ok",
        "checks": [
            {"name": "store", "status": "ok"},
            {"name": "database", "status": "ok"},
            {"name": "running", "status": "ok"},
        ],
    }
    assert answer.headers["cache-control"] == "no-store"


def test_a_store_that_is_away_makes_the_server_unready_and_not_dead(site: Site) -> None:
    site.store.off = None
    answer = site.client().get("/health/ready")
    assert answer.status_code == 503
    assert answer.json()["checks"][0] == {"name": "store", "status": "store_unavailable"}
    assert site.client().get("/health/live").status_code == 200
    site.store.off = frozenset()
    assert site.client().get("/health/ready").status_code == 200


def test_health_and_metrics_set_no_cookie_and_read_none(site: Site) -> None:
    site.add_user("minsu")
    client = site.signed_in("minsu")
    site.store.off = None
    for path in ("/health/live", "/metrics", "/openapi.json"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "set-cookie" not in answer.headers


# Metrics.


def test_metrics_count_by_route_and_never_by_path_or_person(site: Site) -> None:
    site.add_user("minsu")
    client = site.signed_in("minsu", peer="203.0.113.7")
    client.delete("/api/sessions/invented-sid-123")
    client.post("/api/login", json={"username": "minsu", "password": "x"})
    site.client().get("/nothing/at/all")
    text = site.client().get("/metrics").text
    assert 'coatcheck_logins_total{method="password",result="ok"} 1.0' in text
    assert 'coatcheck_logins_total{method="password",result="failed"} 1.0' in text
    assert 'route="/api/sessions/{sid}",status="404"' in text
    assert 'route="other",status="404"' in text
    for secret in ("minsu", "203.0.113.7", "invented-sid-123", "/nothing/at/all", PASSWORD):
        assert secret not in text


@pytest.mark.parametrize(("peer", "status"), [("127.0.0.1", 200), ("::1", 200), ("127.9.9.9", 200), ("10.0.0.1", 403)])
def test_metrics_are_for_this_machine_alone(site: Site, peer: str, status: int) -> None:
    assert site.client(peer=peer).get("/metrics").status_code == status


@pytest.mark.parametrize("name", ["forwarded", "via", "x-forwarded-for", "x-forwarded-proto", "x-real-ip"])
def test_what_a_proxy_on_this_machine_passes_on_is_not_from_this_machine(site: Site, name: str) -> None:
    assert site.client(headers={name: "127.0.0.1"}).get("/metrics").status_code == 403


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer scrape-me-7", 200),
        ("Bearer scrape-me-8", 403),
        ("Bearer scrape-me-7 ", 200),
        ("bearer scrape-me-7", 403),
        ("scrape-me-7", 403),
        ("", 403),
        ("Bearer \xff", 403),
    ],
)
def test_with_a_token_metrics_are_for_whoever_knows_it(make_site: MakeSite, given: str, status: int) -> None:
    site = make_site(metrics_token="scrape-me-7")
    headers = {} if not given else {"authorization": given}
    client: TestClient = site.client(peer="203.0.113.7")
    answer = client.get("/metrics", headers=[(n.encode(), v.encode("latin-1").strip()) for n, v in headers.items()])
    assert answer.status_code == status
    # Being local is no substitute for the token.
    assert site.client().get("/metrics").status_code == 403
