"""The OpenAPI document: complete, and true to what the server answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import schemathesis
import schemathesis.checks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.routing import Route
from starlette.testclient import TestClient

from coatcheck.server.api import ROUTES
from tests.server.conftest import COOKIE, MakeSite, Site

EXAMPLES = 15
# A schema cannot say what a password, a cursor or a network is.
NOT_SAYABLE = [schemathesis.checks.positive_data_acceptance]


@pytest.fixture
def described(site: Site) -> dict[str, Any]:
    found: dict[str, Any] = site.client().get("/openapi.json").json()
    return found


def test_every_api_route_is_described_and_nothing_else(site: Site, described: dict[str, Any]) -> None:
    served = {
        (method.lower(), route.path)
        for route in site.app.routes
        if isinstance(route, Route) and route.path.startswith("/api/")
        for method in (route.methods or set()) - {"HEAD"}
    }
    told = {(method, path) for path, item in described["paths"].items() for method in item}
    assert told == served == {(row.method.lower(), row.path) for row in ROUTES}


def test_operation_ids_are_unique_and_every_reference_leads_somewhere(described: dict[str, Any]) -> None:
    operations = [operation for item in described["paths"].values() for operation in item.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    for reference in re.findall(r"'\$ref': '#/components/schemas/(\w+)'", str(described)):
        assert reference in described["components"]["schemas"]


def test_bodies_that_come_in_allow_no_unknown_member(described: dict[str, Any]) -> None:
    schemas = described["components"]["schemas"]
    for name in ("LoginBody", "RefreshBody", "PasswordBody", "RevokeBody", "FilterBody"):
        assert schemas[name]["additionalProperties"] is False


def test_the_session_cookie_is_named_as_it_is_sent(make_site: MakeSite) -> None:
    https = make_site(public_url="https://id.example").client().get("/openapi.json").json()
    assert https["components"]["securitySchemes"]["session"]["name"] == "__Host-Http-session"


def test_the_development_cookie_is_named_too(described: dict[str, Any]) -> None:
    assert described["components"]["securitySchemes"]["session"] == {"type": "apiKey", "in": "cookie", "name": COOKIE}


def test_what_hands_out_tokens_needs_no_body_and_names_no_member_that_may_be_absent(described: dict[str, Any]) -> None:
    assert described["paths"]["/api/refresh"]["post"]["requestBody"]["required"] is False
    assert described["paths"]["/api/login"]["post"]["requestBody"]["required"] is True
    schemas = described["components"]["schemas"]
    assert set(schemas["LoginReply"]["required"]) == {"message", "user", "session"}
    assert set(schemas["RefreshReply"]["required"]) == {"access_token", "token_type", "expires_in"}


def test_an_access_token_is_described_where_it_is_taken(make_site: MakeSite, described: dict[str, Any]) -> None:
    b2c = make_site(profile="b2c").client().get("/openapi.json").json()
    schemes = b2c["components"]["securitySchemes"]
    (name,) = set(schemes) - {"session"}
    assert (schemes[name]["type"], schemes[name]["scheme"]) == ("http", "bearer")
    assert {name: []} in b2c["paths"]["/api/me"]["get"]["security"]
    assert set(described["components"]["securitySchemes"]) == {"session"}


def test_a_refusal_by_a_rule_about_risk_is_described_where_it_is_answered(described: dict[str, Any]) -> None:
    refused = {
        path: found
        for path, item in described["paths"].items()
        for operation in item.values()
        if "sign_in_blocked" in (found := operation["responses"].get("403", {"description": ""}))["description"]
    }
    # A sign-in that goes on at the limit of sessions was judged when its password was given, and is not judged again.
    assert set(refused) == {"/api/login"}
    # Cross-origin requests are refused with this status too, and have nothing to wait for.
    assert refused["/api/login"]["headers"]["Retry-After"]["required"] is False
    assert described["paths"]["/api/login"]["post"]["responses"]["429"]["headers"]["Retry-After"]["required"] is True
    assert "headers" not in described["paths"]["/api/login/continue"]["post"]["responses"]["403"]


ROWS = [
    *(pytest.param("admin", row, id=f"{row.method} {row.path}") for row in ROUTES),
    *(
        pytest.param("b2c", row, id=f"{row.method} {row.path} with tokens")
        for row in ROUTES
        if row.path in ("/api/login", "/api/refresh", "/api/me")
    ),
]


@pytest.mark.parametrize(("profile", "row"), ROWS)
def test_whatever_is_sent_the_answer_is_a_described_one(make_site: MakeSite, profile: str, row: Any) -> None:
    """Generated requests, right and wrong ones, by whoever has signed in as an administrator and by nobody."""
    site = make_site(profile=profile)
    site.add_user("haneul", role="admin")
    described = site.client().get("/openapi.json").json()
    # The cookie is given or left out below; an invented one would stand in for neither.
    described["paths"][row.path][row.method.lower()].pop("security", None)
    schema = schemathesis.openapi.from_dict(described)
    operation = schema[row.path][row.method]
    admin = site.signed_in("haneul")
    cookies = "; ".join(f"{name}={value}" for name, value in admin.cookies.items())
    seen: set[int] = set()
    wanted = st.one_of(
        operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE),
        operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE),
    )

    @given(case=wanted, known=st.booleans())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large),
    )
    def check(case: Any, known: bool) -> None:
        headers = {"cookie": cookies} if known else {}
        client: TestClient = site.client(headers=headers)
        sent = case.as_transport_kwargs(base_url=site.base_url)
        answer = client.request(
            sent["method"],
            sent["url"],
            params=sent.get("params"),
            json=sent.get("json"),
            content=sent.get("data"),
            headers={name: value for name, value in dict(sent["headers"] or {}).items() if name.lower() != "cookie"},
        )
        seen.add(answer.status_code)
        assert answer.status_code != 500
        case.validate_response(answer, excluded_checks=NOT_SAYABLE)

    check()
    assert seen
