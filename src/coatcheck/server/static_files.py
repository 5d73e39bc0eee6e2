"""The few files that pages link to: style, icon and scripts.

Decides that they are read once, from the package, and served under a name with their digest, so that a browser may
keep them for ever and gets new ones with a new release. No path of a request ever reaches the file system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from coatcheck.errors import NotFound
from coatcheck.primitives.digest import sha256_text

_TYPES: Final = {
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_NAMES: Final = ("back.js", "coatcheck.css", "coatcheck.js", "icon.svg")
_IMPORTING: Final = ("session.js",)
"""Scripts that import others by their plain name, and find them under the name with the digest."""
_FOR_EVER: Final = "public, max-age=31536000, immutable"


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticFile:
    """One file: where it is served, what it is, its octets."""

    address: str
    media_type: str
    octets: bytes


def load_static_files() -> Mapping[str, StaticFile]:
    """All files by their plain name."""
    found = {name: _file(name, _octets(name)) for name in _NAMES}
    for name in _IMPORTING:
        octets = _octets(name)
        for other, file in found.items():
            octets = octets.replace(f'"./{other}"'.encode(), f'"{file.address}"'.encode())
        found[name] = _file(name, octets)
    return found


def static_route(found: Mapping[str, StaticFile]) -> BaseRoute:
    """The route that serves them."""
    by_address = {file.address: file for file in found.values()}

    async def serve(request: Request) -> Response:
        file = by_address.get(f"/static/{request.path_params['name']}")
        if file is None:
            raise NotFound("no such file")
        return Response(file.octets, media_type=file.media_type, headers={"cache-control": _FOR_EVER})

    return Route("/static/{name}", serve, methods=["GET"])


def _octets(name: str) -> bytes:
    return files("coatcheck.server").joinpath("static", name).read_bytes()


def _file(name: str, octets: bytes) -> StaticFile:
    stem, ending = name.rsplit(".", 1)
    address = f"/static/{stem}.{sha256_text(octets)[:12]}.{ending}"
    return StaticFile(address=address, media_type=_TYPES[ending], octets=octets)
