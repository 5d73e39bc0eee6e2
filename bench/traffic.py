"""Requests as a browser sends them, handed to an application without a server, and who is behind them.

One template for every candidate: same path, same headers, seven cookies of which one is the candidate's own. Decides
what a fair request is; knows no candidate.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any
from uuid import UUID

from coatcheck import AsyncCoatcheck, Coatcheck
from coatcheck.session import SendCookie

SESSIONS = 1_000
"""As many take turns: with one, every cache would be hot."""

HOST = "shop.example"
OTHER_COOKIES = (
    "_ga=GA1.2.1234567890.1700000000; _gid=GA1.2.987654321.1763900000; theme=dark; lang=ko; "
    "cart=3.41.c7f0; consent=analytics%3D0%26ads%3D0"
)
# A request that carries its credential in a header sends the seventh cookie as well.
SEVENTH = "seen=1"
BROWSER = (
    ("host", HOST),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/156.0 Safari/537.36"),
    ("accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    ("accept-language", "ko-KR,ko;q=0.9,en;q=0.8"),
    ("accept-encoding", "gzip, deflate, br"),
    ("sec-fetch-site", "same-origin"),
    ("sec-fetch-mode", "navigate"),
    ("sec-fetch-dest", "document"),
)

Pairs = Sequence[tuple[str, str]]


class NotMeasured(Exception):
    """A candidate does not do what it is measured for: it lets the wrong one in, or the right one not."""


def subject(number: int) -> str:
    """Whom session `number` is about; as long for every candidate."""
    return str(UUID(int=0x5EED_0000_0000_4000_8000_0000_0000_0000 + number))


def short_subject(number: int) -> str:
    """A subject of eight octets, as a row number would be."""
    return f"u{number:07d}"


def with_cookie(pair: str) -> Pairs:
    """The headers of a request whose credential is the cookie `pair` (name=value)."""
    first, rest = OTHER_COOKIES.split("; ", 1)
    return (*BROWSER, ("cookie", f"{first}; {rest.replace('; cart', f'; {pair}; cart')}"))


def with_bearer(token: str) -> Pairs:
    """The headers of a request whose credential is a bearer token."""
    return (*BROWSER, ("authorization", f"Bearer {token}"), ("cookie", f"{OTHER_COOKIES}; {SEVENTH}"))


def forged(credential: str) -> str:
    """A credential with one letter changed, in its middle: what ends it may be padding that nobody reads."""
    middle = len(credential) * 3 // 4
    other = "A" if credential[middle] != "A" else "B"
    return credential[:middle] + other + credential[middle + 1 :]


# -- ASGI -----------------------------------------------------------------------------------------------------------


def scope_of(headers: Pairs, path: str = "/me") -> dict[str, Any]:
    """A connection as an ASGI server describes it."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
        "client": ("203.0.113.7", 40_000),
        "server": (HOST, 443),
    }


async def receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def _ignore(message: Any) -> None:
    return None


def asgi_runner(loop: asyncio.AbstractEventLoop, app: Any, requests: Sequence[Pairs]) -> Callable[[int], None]:
    """Hand `app` the requests in turn."""
    turn = cycle([scope_of(headers) for headers in requests])

    async def many(count: int) -> None:
        for _ in range(count):
            await app(next(turn).copy(), receive, _ignore)

    return lambda count: loop.run_until_complete(many(count))


async def asgi_answer(app: Any, headers: Pairs, path: str = "/me") -> tuple[int, bytes, list[str]]:
    """Status, body and Set-Cookie values of one request."""
    status, body = 0, b""
    cookies: list[str] = []

    async def send(message: Any) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            status = message["status"]
            cookies.extend(value.decode() for name, value in message["headers"] if name.lower() == b"set-cookie")
        else:
            body += message.get("body", b"")

    await app(scope_of(headers, path), receive, send)
    return status, body, cookies


# -- WSGI -----------------------------------------------------------------------------------------------------------


def environ_of(headers: Pairs, path: str = "/me") -> dict[str, Any]:
    """A request as a WSGI server describes it."""
    return {
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": "",
        "SERVER_NAME": HOST,
        "SERVER_PORT": "443",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "203.0.113.7",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "https",
        "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": False,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        **{f"HTTP_{name.upper().replace('-', '_')}": value for name, value in headers},
    }


def wsgi_runner(app: Any, requests: Sequence[Pairs], path: str = "/me") -> Callable[[int], None]:
    """Hand `app` the requests in turn; each body is read to its end and closed, as servers do."""
    turn = cycle([environ_of(headers, path) for headers in requests])

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    def many(count: int) -> None:
        for _ in range(count):
            body = app(next(turn).copy(), start_response)
            for _chunk in body:
                pass
            close = getattr(body, "close", None)
            if close is not None:
                close()

    return many


def wsgi_answer(app: Any, headers: Pairs, path: str = "/me") -> tuple[int, bytes, list[str]]:
    """Status, body and Set-Cookie values of one request."""
    status = 0
    cookies: list[str] = []

    def start_response(line: str, fields: Any, exc_info: Any = None) -> Any:
        nonlocal status
        status = int(line[:3])
        cookies.extend(value for name, value in fields if name.lower() == "set-cookie")

    body = app(environ_of(headers, path), start_response)
    read = b"".join(body)
    close = getattr(body, "close", None)
    if close is not None:
        close()
    return status, read, cookies


# -- checked before and after a measurement -------------------------------------------------------------------------


def hold_answer(name: str, answer: tuple[int, bytes, list[str]], number: int) -> None:
    """The right one was let in, as whom they are. Raises: NotMeasured."""
    status, body, _ = answer
    if status != 200 or body.decode() != subject(number):
        raise NotMeasured(f"{name}: answered {status} {body[:80]!r} to session {number}")


def hold_refusal(name: str, answer: tuple[int, bytes, list[str]]) -> None:
    """The wrong one was not let in. Raises: NotMeasured."""
    status, body, _ = answer
    if status not in (401, 403):
        raise NotMeasured(f"{name}: answered {status} {body[:80]!r} to a credential that is wrong")


# -- our own sessions -----------------------------------------------------------------------------------------------

CLAIMS = {"role": "editor", "plan": "team", "lang": "ko"}
FIELDS = {"cart": "3.41.c7f0", "theme": "dark"}


async def sign_in_async(
    coat: AsyncCoatcheck,
    numbers: Sequence[int],
    *,
    at_once: int = 32,
    bare: bool = True,
    name: Callable[[int], str] = subject,
) -> list[str]:
    """Sessions for these numbers, as cookie values in their order. Not `bare`: with claims and two fields."""
    values = [""] * len(numbers)
    due = iter(range(len(numbers)))

    async def worker() -> None:
        for place in due:
            session = coat.session(None)
            if bare:
                await session.login(name(numbers[place]))
            else:
                await session.load()
                for field, value in FIELDS.items():
                    session[field] = value
                await session.login(name(numbers[place]), claims=CLAIMS, keep=tuple(FIELDS))
            values[place] = _value(session.cookie_action)

    await asyncio.gather(*(worker() for _ in range(min(at_once, len(numbers)))))
    return values


def sign_in(coat: Coatcheck, count: int) -> list[str]:
    """`count` sessions, as cookie values."""
    values = []
    for number in range(count):
        session = coat.session(None)
        session.login(subject(number))
        values.append(_value(session.cookie_action))
    return values


def cookie_pair(coat: AsyncCoatcheck | Coatcheck, value: str) -> str:
    """The cookie a browser sends for one of our sessions."""
    return f"{coat.settings.session_cookie.name}={value}"


def _value(action: object) -> str:
    if not isinstance(action, SendCookie):
        raise NotMeasured("the sign-in made no cookie")
    return action.id.text
