"""What does it cost to find our cookie, normal and hostile?"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from http.cookies import CookieError, SimpleCookie

from starlette.requests import cookie_parser

from bench.harness import Candidate, Result, compare
from coatcheck.core.cookie import CookieSettings, find_cookie, render_set_cookie

NAME = CookieSettings().wire_name
VALUE = b"E" * 64
NORMAL = b"; ".join(
    [b"_ga=GA1.2.1234567890.1700000000", b"theme=dark", b"lang=ko", NAME + b"=" + VALUE, b"cart=3", b"seen=1", b"ab=x"]
)
HOSTILE = b'a="' + b'\\"' * 8_000 + b'"'
HEADERS = {"7 cookies, as a browser sends them": NORMAL, "16 KB of quotes and backslashes": HOSTILE}


def run(*, rounds: int, full: bool) -> list[Result]:
    results = []
    for title, header in HEADERS.items():
        text = header.decode("latin-1")
        hostile = header is not NORMAL
        results.append(
            compare(
                f"Find one cookie: {title}",
                [
                    Candidate(name="coatcheck find_cookie", run=_repeat(partial(find_cookie, [header], NAME))),
                    Candidate(
                        name="Starlette cookie_parser",
                        run=_repeat(partial(cookie_parser, text)),
                        repeat=1 if hostile else 100,
                    ),
                    Candidate(
                        name="http.cookies.SimpleCookie",
                        run=_repeat(partial(_simple, text)),
                        repeat=1 if hostile else 100,
                    ),
                ],
                rounds=3 if hostile else rounds,
                cpu=True,
            )
        )
    settings = CookieSettings()
    results.append(
        compare(
            "Render Set-Cookie",
            [Candidate(name="coatcheck", run=_repeat(lambda: render_set_cookie(settings, "E" * 64)), repeat=1000)],
            rounds=rounds,
            cpu=True,
        )
    )
    return results


def _simple(text: str) -> None:
    try:
        SimpleCookie(text)
    except CookieError:
        return


def _repeat(work: Callable[[], object]) -> Callable[[int], None]:
    def run_many(count: int) -> None:
        for _ in range(count):
            work()

    return run_many
