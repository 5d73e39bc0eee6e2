"""What a person typed into a form of ours.

Decides how a form is read: its media type, its size before it is parsed, UTF-8 alone, and that a field which comes
twice is refused rather than chosen from (ASVS 15.3.7).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request

from coatcheck.errors import RequestRefused, UnsupportedMediaType
from coatcheck.server.routes import read_body

MAX_FORM: Final = 48 * 1024
"""Octets: three passwords of 1024 characters, each of four octets and percent-encoded, and what goes with them."""

MAX_FIELDS: Final = 8


async def read_form(request: Request, *, most: int = MAX_FIELDS) -> Mapping[str, str]:
    """The fields of a form, at most so many. Raises: UnsupportedMediaType, BodyTooLarge, RequestRefused."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise UnsupportedMediaType("not a form of ours")
    body = await read_body(request, limit=MAX_FORM)
    try:
        pairs = parse_qsl(
            body.decode("utf-8"),
            keep_blank_values=True,
            encoding="utf-8",
            errors="strict",
            max_num_fields=most,
        )
    except ValueError as broken:
        raise RequestRefused("form: cannot be read") from broken
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise RequestRefused("form: a field came twice")
    return fields
