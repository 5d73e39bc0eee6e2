"""The OpenAPI 3.1 document, from the same table that serves the requests.

Decides nothing: every path, body, answer and error in it is one that `routes.endpoint` and `web.problems` produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

import msgspec

from coatcheck import __version__
from coatcheck.errors import (
    BodyTooLarge,
    CoatcheckError,
    CrossOriginRefused,
    RequestRefused,
    StoreUnavailable,
    Throttled,
    UnsupportedMediaType,
)
from coatcheck.server.routes import ApiRoute


class Problem(msgspec.Struct):
    """A refusal (RFC 9457); `code` is stable."""

    type: str
    title: str
    status: int
    code: str


def document(routes: Iterable[ApiRoute], *, title: str, cookie: str, tokens: bool) -> dict[str, Any]:
    """Describe the API; `cookie` is the name of the session cookie, `tokens` whether access tokens are taken too."""
    rows = tuple(routes)
    types = sorted(
        {row.reply for row in rows} | {row.body for row in rows if row.body is not None},
        key=lambda each: each.__name__,
    )
    schemas, components = msgspec.json.schema_components([*types, Problem], ref_template="#/components/schemas/{name}")
    schema_of = dict(zip([*types, Problem], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in rows:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row, schema_of, tokens=tokens)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "session": {"type": "apiKey", "in": "cookie", "name": cookie},
                **({"access_token": {"type": "http", "scheme": "bearer", "bearerFormat": "at+jwt"}} if tokens else {}),
            },
        },
    }


def _operation(row: ApiRoute, schema_of: dict[type, Any], *, tokens: bool) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": row.handler.__name__,
        "summary": row.summary,
        "responses": {
            "200": {"description": "Done", "content": {"application/json": {"schema": schema_of[row.reply]}}},
            **({"202": _accepted(schema_of[row.reply])} if row.may_accept else {}),
            **_problems(row, schema_of[Problem]),
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", row.path)
    ]
    parameters += [
        {
            "name": name,
            "in": "query",
            "required": parameter.required,
            "description": parameter.text,
            "schema": dict(parameter.schema),
        }
        for name, parameter in row.query.items()
    ]
    if parameters:
        operation["parameters"] = parameters
    if row.body is not None:
        operation["requestBody"] = {
            "required": row.body_required,
            "content": {"application/json": {"schema": schema_of[row.body]}},
        }
    if row.signed_in:
        operation["security"] = [{"session": []}, *([{"access_token": []}] if tokens else [])]
    return operation


def _accepted(schema: Any) -> dict[str, Any]:
    return {"description": "Accepted; done once the store is back", "content": {"application/json": {"schema": schema}}}


def _problems(row: ApiRoute, schema: Any) -> dict[str, Any]:
    errors: list[type[CoatcheckError]] = [*row.errors, StoreUnavailable]
    if row.method != "GET":
        errors.append(CrossOriginRefused)
    if row.body is not None:
        errors += [RequestRefused, UnsupportedMediaType, BodyTooLarge]
    # By code, so that a subclass without a code of its own is named once.
    answers: dict[int, dict[str, bool]] = {}
    for error in errors:
        answers.setdefault(error.status, {})[error.code] = issubclass(error, _WAITING)
    return {
        str(status): {
            "description": ", ".join(f"`{code}`" for code in waits),
            "content": {"application/problem+json": {"schema": schema}},
            **({"headers": {"Retry-After": _retry_after(always=all(waits.values()))}} if any(waits.values()) else {}),
        }
        for status, waits in sorted(answers.items())
    }


def _retry_after(*, always: bool) -> dict[str, Any]:
    return {"description": "Seconds to wait", "required": always, "schema": {"type": "integer", "minimum": 1}}


_WAITING: Final = (Throttled, StoreUnavailable)
