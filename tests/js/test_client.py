"""What the browser client does, in a real Chromium, against a small server that keeps the protocol and nothing more.

The server writes down every request, can hold an answer back after it has acted, and can be told what to answer next.
Nothing here sleeps: a race is made by holding an answer, and time passes by moving the clocks of a page.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from tests.servers.processes import until
from tests.servers.relay import Relay

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page

pytestmark = pytest.mark.browser

CLIENT = Path(__file__).parents[2] / "src/coatcheck/server/static/coatcheck.js"
REFRESH = "/api/refresh"
THINGS = "/api/things"
WITHIN = 20.0


# The server.


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    authorization: str | None
    cookie: str | None
    body: bytes


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to give."""

    status: int = 200
    members: Mapping[str, object] = field(default_factory=dict)
    headers: tuple[tuple[str, str], ...] = ()
    # Bytes of the body that arrive before the connection breaks.
    cut_after: int | None = None


def problem(status: int, code: str, *headers: tuple[str, str], **members: object) -> Answer:
    return Answer(status=status, members={"code": code, "status": status, **members}, headers=headers)


BEARER = ("WWW-Authenticate", 'Bearer realm="shop", error="invalid_token"')


class Site:
    """Sign-in, refresh with rotation and reuse detection, sign-out and one protected resource.

    `grace`: the immediate predecessor of a refresh token gets the same successor (RFC 9700 s4.14.2 allows it).
    `expires_in`: seconds an access token is said to live; it is accepted until `deny_tokens()`.
    """

    def __init__(self) -> None:
        self.grace = False
        self.expires_in: float = 600
        self.seen: list[Seen] = []
        self._changed = threading.Condition()
        self._held: dict[str, threading.Event] = {}
        self._next: defaultdict[str, deque[Answer]] = defaultdict(deque)
        self._generation: int | None = None
        self._over: Answer | None = None
        self._issued = 0
        self._accepted: set[str] = set()
        site = self

        class Handler(_Handler):
            owner = site

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        for gate in self._held.values():
            gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    # Orders.

    def answer_next(self, path: str, *answers: Answer) -> None:
        self._next[path].extend(answers)

    @contextlib.contextmanager
    def holding(self, path: str) -> Iterator[None]:
        """Requests are carried out, and their answers wait until the block ends."""
        gate = self._held[path] = threading.Event()
        try:
            yield
        finally:
            del self._held[path]
            gate.set()

    def deny_tokens(self) -> None:
        self._accepted.clear()

    def end_session(self, code: str, **members: object) -> None:
        self._over = problem(401, code, **members)
        self._accepted.clear()

    # Questions.

    def count(self, path: str) -> int:
        return len(self.to(path))

    def to(self, path: str) -> list[Seen]:
        return [each for each in self.seen if each.path == path]

    def await_count(self, path: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(path) >= count, WITHIN), self.seen

    # What it does.

    def carry_out(self, request: Seen) -> Answer:
        with self._changed:
            answer = self._next[request.path].popleft() if self._next[request.path] else self._decide(request)
            self.seen.append(request)
            self._changed.notify_all()
        gate = self._held.get(request.path)
        if gate is not None:
            gate.wait(WITHIN)
        return answer

    def _decide(self, request: Seen) -> Answer:
        match request.path:
            case "/api/login" | "/api/login/continue":
                self._generation, self._over = 0, None
                signed_in = self._tokens()
                user = {"message": "Signed in.", "user": {"name": "haneul"}}
                return Answer(members={**user, **signed_in.members}, headers=signed_in.headers)
            case "/api/refresh":
                return self._refresh(SimpleCookie(request.cookie or "").get("rt"))
            case "/api/logout":
                self.end_session("session_ended", reason="logout")
                return Answer(members={"message": "Signed out."}, headers=(("Set-Cookie", "rt=; Path=/; Max-Age=0"),))
            case "/api/things":
                if request.authorization is None:
                    return problem(401, "login_required")
                if request.authorization.removeprefix("Bearer ") in self._accepted:
                    return Answer(members={"things": [], "sent": request.body.decode()})
                return problem(401, "invalid_token", BEARER)
            case _:
                return problem(404, "not_found")

    def _refresh(self, cookie: Any) -> Answer:
        if self._over is not None:
            return self._over
        if cookie is None or self._generation is None:
            return problem(401, "refresh_invalid")
        presented = int(cookie.value)
        if presented == self._generation:
            self._generation += 1
        elif not (self.grace and presented == self._generation - 1):
            self.end_session("refresh_reused")
            return problem(401, "refresh_reused")
        return self._tokens()

    def _tokens(self) -> Answer:
        self._issued += 1
        token = f"access-token-{self._issued}"
        self._accepted.add(token)
        return Answer(
            members={"access_token": token, "token_type": "Bearer", "expires_in": self.expires_in},
            headers=(("Set-Cookie", f"rt={self._generation}; Path=/; HttpOnly; SameSite=Strict"),),
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    # Several tabs connect at once.
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(address, handler)
        self._open: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self) -> None:
        # A browser keeps its connections; their threads end with them.
        for request in list(self._open):
            with contextlib.suppress(OSError):
                request.shutdown(socket.SHUT_RDWR)
        super().server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    owner: ClassVar[Site]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(200, "text/html", b"<!doctype html><title>shop</title><link rel=icon href=data:,>")
        elif path == "/coatcheck.js":
            self._send(200, "text/javascript", CLIENT.read_bytes())
        elif self.command == "OPTIONS":
            self._send(204, "text/plain", b"")
        else:
            request = Seen(
                method=self.command,
                path=path,
                authorization=self.headers.get("authorization"),
                cookie=self.headers.get("cookie"),
                body=body,
            )
            answer = self.owner.carry_out(request)
            kind = "application/json" if answer.status < 400 else "application/problem+json"
            octets = json.dumps(answer.members).encode()
            self._send(answer.status, kind, octets, *answer.headers, cut_after=answer.cut_after)

    do_POST = do_PUT = do_OPTIONS = do_GET

    def _send(
        self, status: int, kind: str, body: bytes, *headers: tuple[str, str], cut_after: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "authorization, content-type")
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut_after])
        self.close_connection = self.close_connection or cut_after is not None

    def log_message(self, format: str, *args: object) -> None:
        """The site keeps its own log."""


@pytest.fixture
def site() -> Iterator[Site]:
    served = Site()
    yield served
    served.close()


@pytest.fixture
def foreign() -> Iterator[Site]:
    """A site of another origin, which lets anybody call it."""
    served = Site()
    yield served
    served.close()


# The tabs.

_OPEN = """async (options) => {
  const { createClient, CoatcheckError } = await import("/coatcheck.js");
  globalThis.heard = [];
  globalThis.client = createClient({
    ...options,
    onSignedIn: (detail) => heard.push(["in", detail]),
    onSignedOut: (detail) => heard.push(["out", detail]),
  });
  globalThis.CoatcheckError = CoatcheckError;
  globalThis.get = async (path = "/api/things", init) => (await client.fetch(path, init)).status;
  globalThis.refusal = async (promise) => {
    const failure = await promise.then(() => null, (reason) => reason);
    return failure && { name: failure.name, code: failure.code, status: failure.status, wait: failure.retryAfter };
  };
}"""

NO_LOCKS = "Object.defineProperty(navigator, 'locks', { value: undefined });"
NO_CHANNEL = "delete globalThis.BroadcastChannel;"


class Tab:
    """A page with a client."""

    def __init__(self, page: Page, address: str, **options: object) -> None:
        self.page = page
        page.goto(address)
        page.evaluate(_OPEN, options)

    def do(self, expression: str, argument: object = None) -> Any:
        """The settled value of an expression."""
        return self.page.evaluate(f"async (argument) => ({expression})", argument)

    def start(self, expression: str) -> None:
        """Begin, and do not wait for the end."""
        self.page.evaluate(f"() => {{ globalThis.begun = ({expression}); begun.catch(() => 0); }}")

    def finish(self) -> Any:
        return self.page.evaluate("() => begun")

    @property
    def heard(self) -> list[list[Any]]:
        found: list[list[Any]] = self.page.evaluate("() => heard")
        return found

    def await_heard(self, what: str) -> Any:
        """The detail of the first event of this kind."""
        self.page.wait_for_function("(what) => heard.some(([kind]) => kind === what)", arg=what)
        return next(detail for kind, detail in self.heard if kind == what)

    def await_queue(self, waiting: int) -> None:
        """Until so many wait for the lock."""
        self.page.wait_for_function(
            "async (waiting) => (await navigator.locks.query()).pending.length === waiting", arg=waiting
        )

    def pass_time(self, *, steady: float = 0, wall: float = 0) -> None:
        """Move the clocks of the page, in seconds."""
        self.page.evaluate(
            """([steady, wall]) => {
              const [now, date] = [performance.now.bind(performance), Date.now];
              performance.now = () => now() + steady * 1000;
              Date.now = () => date() + wall * 1000;
            }""",
            [steady, wall],
        )


@pytest.fixture
def context(new_context: Callable[..., BrowserContext]) -> BrowserContext:
    """One profile, whose tabs share cookies, locks and channels."""
    return new_context()


@pytest.fixture
def tab(context: BrowserContext, site: Site) -> Tab:
    """A tab in which nobody has signed in."""
    return Tab(context.new_page(), site.address)


@pytest.fixture
def signed_in(tab: Tab) -> Tab:
    """A tab in which somebody has signed in."""
    sign_in(tab)
    return tab


def sign_in(tab: Tab) -> Any:
    return tab.do("client.login({ username: 'haneul', password: 'tangled lamp' })")


def reloaded(context: BrowserContext, site: Site, count: int) -> list[Tab]:
    """Tabs that share a login and know nothing of it yet, as after a restart of the browser."""
    first = Tab(context.new_page(), site.address)
    sign_in(first)
    first.page.close()
    return [Tab(context.new_page(), site.address) for _ in range(count)]


# Signing in.


def test_login_signs_in_and_hands_out_no_token(site: Site, tab: Tab) -> None:
    assert tab.do("client.isSignedIn") is False
    assert sign_in(tab) == {"message": "Signed in.", "user": {"name": "haneul"}}
    assert tab.do("client.isSignedIn") is True
    assert tab.heard == [["in", {"elsewhere": False}]]
    assert tab.do("get()") == 200
    assert site.count(REFRESH) == 0


def test_a_refused_login_says_why_and_how_long_to_wait(site: Site, tab: Tab) -> None:
    site.answer_next("/api/login", problem(401, "invalid_credentials"))
    site.answer_next("/api/login", problem(429, "throttled", ("Retry-After", "7")))
    refused = [tab.do("refusal(client.login({ username: 'haneul', password: 'x' }))") for _ in range(2)]
    assert refused == [
        {"name": "CoatcheckError", "code": "invalid_credentials", "status": 401, "wait": 0},
        {"name": "CoatcheckError", "code": "throttled", "status": 429, "wait": 7},
    ]
    assert tab.do("client.isSignedIn") is False
    assert tab.heard == []


def test_a_login_goes_on_after_the_session_limit(site: Site, tab: Tab) -> None:
    site.answer_next("/api/login", problem(409, "session_limit", sessions=["a", "b"], ask=True))
    assert tab.do("refusal(client.login({ username: 'haneul', password: 'x' }))")["code"] == "session_limit"
    tab.do("client.login({ continue: 'c', end: ['a'] })")
    assert site.to("/api/login/continue")[0].body == b'{"continue":"c","end":["a"]}'
    assert tab.do("get()") == 200


def test_a_login_in_one_tab_signs_the_others_in_and_says_that_it_was_elsewhere(
    context: BrowserContext, site: Site, tab: Tab
) -> None:
    other = Tab(context.new_page(), site.address)
    sign_in(tab)
    assert other.await_heard("in") == {"elsewhere": True}
    assert other.do("get()") == 200
    assert site.count(REFRESH) == 0


def test_a_second_login_is_news_in_a_tab_that_shows_the_first_person(
    context: BrowserContext, site: Site, signed_in: Tab
) -> None:
    other = Tab(context.new_page(), site.address)
    sign_in(other)
    signed_in.page.wait_for_function("() => heard.length === 2")
    assert signed_in.heard[1] == ["in", {"elsewhere": True}]


def test_a_reload_finds_the_login_again(context: BrowserContext, site: Site) -> None:
    (tab,) = reloaded(context, site, 1)
    assert tab.do("client.refresh()") is True
    assert tab.do("client.isSignedIn") is True
    assert tab.heard == [["in", {"elsewhere": False}]]


def test_an_answer_without_a_new_cookie_is_as_good(context: BrowserContext, site: Site) -> None:
    (tab,) = reloaded(context, site, 1)
    site.answer_next(REFRESH, Answer(members={"access_token": "t", "token_type": "Bearer", "expires_in": 60}))
    assert tab.do("client.refresh()") is True
    assert tab.do("client.refresh()") is True


def test_a_visitor_is_not_told_that_a_login_has_ended_and_costs_one_look(site: Site, tab: Tab) -> None:
    assert [tab.do("get()") for _ in range(3)] == [401, 401, 401]
    assert [each.authorization for each in site.to(THINGS)] == [None, None, None]
    # Twice, because a refusal may be the fault of a race.
    assert site.count(REFRESH) == 2
    assert tab.heard == []


# One refresh for all.


def test_twenty_fetches_at_once_make_one_refresh(context: BrowserContext, site: Site) -> None:
    (tab,) = reloaded(context, site, 1)
    with site.holding(REFRESH):
        tab.start("Promise.all(Array.from({ length: 20 }, () => get()))")
        site.await_count(REFRESH, 1)
    assert tab.finish() == [200] * 20
    assert (site.count(REFRESH), site.count(THINGS)) == (1, 20)


def test_twenty_refusals_at_once_make_one_refresh(site: Site, signed_in: Tab) -> None:
    site.deny_tokens()
    assert signed_in.do("Promise.all(Array.from({ length: 20 }, () => get()))") == [200] * 20
    assert site.count(REFRESH) == 1


@pytest.mark.parametrize("count", [2, 6])
def test_tabs_at_once_make_one_refresh(context: BrowserContext, site: Site, count: int) -> None:
    tabs = reloaded(context, site, count)
    with site.holding(REFRESH):
        for tab in tabs:
            tab.start("get()")
        site.await_count(REFRESH, 1)
        tabs[0].await_queue(count - 1)
    assert [tab.finish() for tab in tabs] == [200] * count
    assert site.count(REFRESH) == 1


@pytest.mark.parametrize("count", [2, 6])
def test_tabs_without_locks_all_stay_signed_in(context: BrowserContext, site: Site, count: int) -> None:
    """Nothing holds them apart here: the grace of the server does."""
    site.grace = True
    context.add_init_script(NO_LOCKS)
    tabs = reloaded(context, site, count)
    # A browser opens six connections to a host: one stays free for what follows.
    racing = min(count, 5)
    with site.holding(REFRESH):
        for tab in tabs:
            tab.start("get()")
        site.await_count(REFRESH, racing)
    assert [tab.finish() for tab in tabs] == [200] * count
    assert racing <= site.count(REFRESH) <= count
    assert all(kind == "in" for tab in tabs for kind, _ in tab.heard)


@pytest.mark.parametrize("count", [2, 6])
def test_tabs_without_a_channel_refresh_one_after_the_other(context: BrowserContext, site: Site, count: int) -> None:
    context.add_init_script(NO_CHANNEL)
    tabs = reloaded(context, site, count)
    with site.holding(REFRESH):
        for tab in tabs:
            tab.start("get()")
        site.await_count(REFRESH, 1)
        tabs[0].await_queue(count - 1)
    assert [tab.finish() for tab in tabs] == [200] * count
    # Each with the successor of the one before: no server grace was needed.
    assert [each.cookie for each in site.to(REFRESH)] == [f"rt={number}" for number in range(count)]


def test_without_locks_and_channel_one_tab_still_makes_one_refresh(context: BrowserContext, site: Site) -> None:
    context.add_init_script(NO_LOCKS + NO_CHANNEL)
    (tab,) = reloaded(context, site, 1)
    assert tab.do("Promise.all(Array.from({ length: 20 }, () => get()))") == [200] * 20
    assert site.count(REFRESH) == 1
    tab.do("client.logout()")
    assert tab.do("client.isSignedIn") is False


def test_a_race_lost_to_another_tab_is_tried_once_more_with_the_cookie_as_it_is_now(
    context: BrowserContext, site: Site
) -> None:
    (tab,) = reloaded(context, site, 1)
    site.answer_next(REFRESH, problem(401, "refresh_invalid"))
    assert tab.do("get()") == 200
    assert site.count(REFRESH) == 2


def test_a_tab_closed_in_mid_refresh_holds_up_nobody(context: BrowserContext, site: Site) -> None:
    site.grace = True
    closing, waiting = reloaded(context, site, 2)
    with site.holding(REFRESH):
        closing.start("get()")
        site.await_count(REFRESH, 1)
        waiting.start("get()")
        waiting.await_queue(1)
        closing.page.close()
        site.await_count(REFRESH, 2)
    assert waiting.finish() == 200
    assert [kind for kind, _ in waiting.heard] == ["in"]


# The wire.


def test_an_answer_lost_on_the_wire_signs_nobody_out(
    context: BrowserContext, site: Site, relay: Callable[[int], Relay]
) -> None:
    """The server has rotated and the browser has not heard: it comes with the old cookie, and gets the same again."""
    site.grace = True
    wire = relay(site.port)
    tab = Tab(context.new_page(), f"http://127.0.0.1:{wire.port}")
    sign_in(tab)
    wire.swallow_answers()
    tab.start("client.refresh().catch((failure) => failure.code)")
    until(lambda: wire.swallowed > 0, within=WITHIN, what="an answer lost")
    wire.forward()
    # Chromium may send the request again by itself; both ways are fine.
    assert tab.finish() in (True, "unavailable")
    assert tab.do("client.refresh()") is True
    assert tab.do("get()") == 200
    assert {each.cookie for each in site.to(REFRESH)[:2]} == {"rt=0"}
    assert [kind for kind, _ in tab.heard] == ["in"]


def test_half_an_answer_signs_nobody_out(site: Site, signed_in: Tab) -> None:
    whole = {"access_token": "never read", "token_type": "Bearer", "expires_in": 600}
    site.answer_next(REFRESH, Answer(members=whole, cut_after=20))
    assert signed_in.do("refusal(client.refresh())")["code"] == "unavailable"
    assert signed_in.do("client.isSignedIn") is True
    assert signed_in.do("client.refresh()") is True


def test_no_network_signs_nobody_out(context: BrowserContext, site: Site, relay: Callable[[int], Relay]) -> None:
    wire = relay(site.port)
    tab = Tab(context.new_page(), f"http://127.0.0.1:{wire.port}")
    sign_in(tab)
    wire.refuse()
    unavailable = {"name": "CoatcheckError", "code": "unavailable", "status": 0, "wait": 0}
    assert tab.do("refusal(client.refresh())") == unavailable
    assert tab.do("client.isSignedIn") is True
    wire.forward()
    assert tab.do("client.refresh()") is True
    assert [kind for kind, _ in tab.heard] == ["in"]


@pytest.mark.parametrize("status", [200, 403, 404, 429, 500, 502, 503])
def test_no_other_answer_than_a_known_refusal_signs_out(site: Site, signed_in: Tab, status: int) -> None:
    site.answer_next(REFRESH, Answer(status=status, members={"page": "of a proxy"}))
    refused = signed_in.do("refusal(client.refresh())")
    assert (refused["code"], refused["status"]) == ("unavailable", status)
    assert signed_in.do("client.isSignedIn") is True
    assert signed_in.do("client.refresh()") is True


def test_a_401_that_is_not_ours_does_not_sign_out(site: Site, signed_in: Tab) -> None:
    site.answer_next(REFRESH, Answer(status=401, members={"error": "a gateway wants a password"}))
    assert signed_in.do("refusal(client.refresh())")["status"] == 401
    assert signed_in.do("client.isSignedIn") is True


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks_in_every_tab(context: BrowserContext, site: Site) -> None:
    asking, waiting = reloaded(context, site, 2)
    site.answer_next(REFRESH, problem(503, "store_unavailable", ("Retry-After", "5")))
    with site.holding(REFRESH):
        asking.start("refusal(get())")
        site.await_count(REFRESH, 1)
        waiting.start("refusal(get())")
        waiting.await_queue(1)
    assert asking.finish() == {"name": "CoatcheckError", "code": "store_unavailable", "status": 503, "wait": 5}
    assert waiting.finish() == {"name": "CoatcheckError", "code": "unavailable", "status": 503, "wait": 5}
    assert asking.do("refusal(get())")["code"] == "unavailable"
    assert (site.count(REFRESH), site.count(THINGS)) == (1, 0)
    asking.pass_time(steady=5)
    assert asking.do("get()") == 200
    assert all(kind == "in" for kind, _ in asking.heard + waiting.heard)


def test_a_token_that_still_lives_is_used_while_the_server_is_busy(site: Site, signed_in: Tab) -> None:
    site.answer_next(REFRESH, problem(503, "store_unavailable"))
    signed_in.pass_time(steady=599)
    assert signed_in.do("get()") == 200
    assert site.count(REFRESH) == 1


def test_a_token_that_is_over_is_not_sent_while_the_server_is_busy(site: Site, signed_in: Tab) -> None:
    site.answer_next(REFRESH, problem(503, "store_unavailable"))
    signed_in.pass_time(steady=600)
    assert signed_in.do("refusal(get())")["status"] == 503
    assert site.count(THINGS) == 0


# Time.


def test_a_token_is_renewed_before_its_end_and_not_earlier(site: Site, signed_in: Tab) -> None:
    signed_in.pass_time(steady=560)
    assert signed_in.do("get()") == 200
    assert site.count(REFRESH) == 0
    signed_in.pass_time(steady=10)
    assert signed_in.do("get()") == 200
    assert site.count(REFRESH) == 1


def test_a_laptop_that_slept_refreshes_on_first_use(site: Site, signed_in: Tab) -> None:
    """The steady clock stood still meanwhile."""
    signed_in.pass_time(wall=8 * 3600)
    assert signed_in.do("get()") == 200
    assert [each.path for each in site.seen] == ["/api/login", REFRESH, THINGS]


def test_a_wall_clock_that_was_set_back_does_not_lengthen_a_token(site: Site, signed_in: Tab) -> None:
    signed_in.pass_time(steady=600, wall=-86_400)
    assert signed_in.do("get()") == 200
    assert [each.path for each in site.seen] == ["/api/login", REFRESH, THINGS]


def test_a_token_shorter_than_the_margin_is_not_renewed_for_every_request(site: Site, tab: Tab) -> None:
    site.expires_in = 20
    sign_in(tab)
    assert [tab.do("get()") for _ in range(3)] == [200, 200, 200]
    assert site.count(REFRESH) == 0
    tab.pass_time(steady=10)
    assert tab.do("get()") == 200
    assert site.count(REFRESH) == 1


# What is sent again.


def test_a_refused_token_is_renewed_and_the_request_sent_once_more_with_its_body(site: Site, signed_in: Tab) -> None:
    site.deny_tokens()
    post = "client.fetch('/api/things', { method: 'POST', body: 'seven coats' }).then((answer) => answer.json())"
    assert signed_in.do(post) == {"things": [], "sent": "seven coats"}
    assert [each.body for each in site.to(THINGS)] == [b"seven coats", b"seven coats"]
    assert len({each.authorization for each in site.to(THINGS)}) == 2


@pytest.mark.parametrize("code", ["invalid_token", "login_required", "session_ended"])
def test_a_refusal_is_known_by_its_code_where_the_header_is_hidden(site: Site, signed_in: Tab, code: str) -> None:
    site.answer_next(THINGS, problem(401, code))
    assert signed_in.do("get()") == 200
    assert site.count(REFRESH) == 1


def test_a_persistent_refusal_ends_after_one_refresh_and_one_more_attempt(site: Site, signed_in: Tab) -> None:
    site.answer_next(THINGS, *[problem(401, "invalid_token", BEARER)] * 2)
    assert signed_in.do("get()") == 401
    assert (site.count(REFRESH), site.count(THINGS)) == (1, 2)


@pytest.mark.parametrize(
    "answer",
    [
        problem(403, "forbidden"),
        problem(403, "invalid_token", BEARER),
        problem(401, "step_up_required", ("WWW-Authenticate", 'Bearer error="insufficient_user_authentication"')),
        problem(401, "invalid_credentials"),
        Answer(status=401, headers=(("WWW-Authenticate", 'DPoP error="use_dpop_nonce"'),)),
    ],
    ids=["403", "403 that lies", "step-up", "wrong password", "another scheme"],
)
def test_any_other_refusal_is_the_callers(site: Site, signed_in: Tab, answer: Answer) -> None:
    site.answer_next(THINGS, answer)
    assert signed_in.do("get()") == answer.status
    assert (site.count(REFRESH), site.count(THINGS)) == (0, 1)


def test_a_stream_is_not_sent_twice(site: Site, signed_in: Tab) -> None:
    """Chromium streams over HTTP/2 alone, so what would be sent is counted in the page."""
    sent = signed_in.do(
        """(async () => {
          const { createClient } = await import("/coatcheck.js");
          let attempts = 0;
          const other = createClient({
            fetch: (input, init) => {
              if (!(input instanceof Request)) return fetch(input, init);
              attempts++;
              const headers = { "www-authenticate": 'Bearer error="invalid_token"' };
              return Promise.resolve(new Response("", { status: 401, headers }));
            },
          });
          const body = new Blob(["seven coats"]).stream();
          const { status } = await other.fetch("/api/things", { method: "POST", body, duplex: "half" });
          return [status, attempts];
        })()"""
    )
    assert sent == [401, 1]
    # The first for the new client, the second because of the refusal: the next request has a good token.
    assert site.count(REFRESH) == 2


def test_a_request_that_owns_its_body_is_not_sent_twice(site: Site, signed_in: Tab) -> None:
    """Whether a stream is behind it cannot be seen."""
    site.deny_tokens()
    post = "get(new Request('/api/things', { method: 'POST', body: 'seven coats' }))"
    assert signed_in.do(post) == 401
    assert site.count(THINGS) == 1
    assert signed_in.do(post) == 200


def test_a_request_without_a_body_is_sent_again(site: Site, signed_in: Tab) -> None:
    site.deny_tokens()
    assert signed_in.do("get(new Request('/api/things'))") == 200
    assert site.count(THINGS) == 2


def test_a_request_given_up_while_it_waits_for_a_token_is_never_sent(context: BrowserContext, site: Site) -> None:
    (tab,) = reloaded(context, site, 1)
    with site.holding(REFRESH):
        tab.page.evaluate("() => { globalThis.given = new AbortController(); }")
        tab.start("refusal(get('/api/things', { signal: given.signal }))")
        site.await_count(REFRESH, 1)
        tab.page.evaluate("() => given.abort()")
        assert tab.finish()["name"] == "AbortError"
    assert tab.do("get()") == 200
    assert (site.count(REFRESH), site.count(THINGS)) == (1, 1)


# The end of a login.


def test_logout_reaches_the_other_tabs(context: BrowserContext, site: Site, signed_in: Tab) -> None:
    others = [Tab(context.new_page(), site.address) for _ in range(2)]
    assert [other.do("get()") for other in others] == [200, 200]
    signed_in.do("client.logout()")
    for other in others:
        assert other.await_heard("out") == {"code": "logout", "reason": None, "elsewhere": True}
        assert other.do("client.isSignedIn") is False
        assert other.do("get()") == 401
    assert signed_in.await_heard("out") == {"code": "logout", "reason": None, "elsewhere": False}
    assert [each.authorization for each in site.to(THINGS)][-2:] == [None, None]
    assert [len([kind for kind, _ in tab.heard if kind == "out"]) for tab in (signed_in, *others)] == [1, 1, 1]


def test_logout_without_a_channel_is_seen_at_the_next_use(context: BrowserContext, site: Site) -> None:
    context.add_init_script(NO_CHANNEL)
    one, two = reloaded(context, site, 2)
    assert [one.do("get()"), two.do("get()")] == [200, 200]
    one.do("client.logout()")
    assert two.do("get()") == 401
    assert two.await_heard("out") == {"code": "session_ended", "reason": "logout", "elsewhere": True}


def test_a_refresh_under_way_in_another_tab_does_not_undo_a_logout(
    context: BrowserContext, site: Site, signed_in: Tab
) -> None:
    other = Tab(context.new_page(), site.address)
    with site.holding(REFRESH):
        other.start("client.refresh()")
        site.await_count(REFRESH, 1)
        signed_in.start("client.logout()")
        assert other.await_heard("out")["elsewhere"] is True
    signed_in.finish()
    assert other.finish() is False
    assert [tab.do("client.isSignedIn") for tab in (signed_in, other)] == [False, False]
    assert site.seen[-1].path == "/api/logout"


def test_a_token_told_too_late_does_not_outlive_a_logout(context: BrowserContext, site: Site) -> None:
    """A tab may have told its new token just before it heard of the logout."""
    one, two = (Tab(context.new_page(), site.address, channel="shop") for _ in range(2))
    sign_in(one)
    two.await_heard("in")
    with site.holding("/api/logout"):
        one.start("client.logout()")
        site.await_count("/api/logout", 1)
        two.await_heard("out")
        late = "{ kind: 'token', token: 'late', lifetime: 600_000, wall: Date.now() }"
        two.do(f"new BroadcastChannel('shop').postMessage({late})")
        for tab in (one, two):
            tab.page.wait_for_function("() => client.isSignedIn")
    one.finish()
    two.page.wait_for_function("() => !client.isSignedIn")
    assert one.do("client.isSignedIn") is False


def test_a_logout_that_did_not_reach_the_server_says_so_and_can_be_repeated(site: Site, signed_in: Tab) -> None:
    site.answer_next("/api/logout", problem(503, "store_unavailable", ("Retry-After", "1")))
    assert signed_in.do("refusal(client.logout())")["code"] == "store_unavailable"
    assert signed_in.do("client.isSignedIn") is False
    signed_in.do("client.logout()")
    assert [kind for kind, _ in signed_in.heard] == ["in", "out"]


def test_a_logout_with_a_token_that_is_no_longer_accepted_still_ends_the_session(site: Site, signed_in: Tab) -> None:
    site.answer_next("/api/logout", problem(401, "invalid_token", BEARER))
    signed_in.do("client.logout()")
    first, second = site.to("/api/logout")
    assert (first.authorization, second.authorization) == ("Bearer access-token-1", None)


@pytest.mark.parametrize(
    ("code", "reason", "elsewhere"),
    [
        ("session_ended", "signed in on another device", True),
        ("session_ended", None, True),
        ("refresh_reused", None, True),
        ("refresh_invalid", None, False),
    ],
)
def test_the_reason_is_told_in_every_tab(
    context: BrowserContext, site: Site, signed_in: Tab, code: str, reason: str | None, elsewhere: bool
) -> None:
    tabs = [signed_in, *(Tab(context.new_page(), site.address) for _ in range(3))]
    assert [tab.do("get()") for tab in tabs] == [200] * 4
    site.seen.clear()
    site.end_session(code, reason=reason)
    assert signed_in.do("get()") == 401
    for tab in tabs:
        assert tab.await_heard("out") == {"code": code, "reason": reason, "elsewhere": elsewhere}
    assert site.count(REFRESH) == (2 if code == "refresh_invalid" else 1)


def test_after_the_end_nothing_is_refreshed_until_somebody_signs_in(site: Site, signed_in: Tab) -> None:
    site.end_session("session_ended", reason="admin")
    assert [signed_in.do("get()") for _ in range(3)] == [401, 401, 401]
    assert site.count(REFRESH) == 1
    sign_in(signed_in)
    assert signed_in.do("get()") == 200


def test_a_reloaded_page_learns_why_it_was_signed_out(context: BrowserContext, site: Site) -> None:
    (tab,) = reloaded(context, site, 1)
    site.end_session("session_ended", reason="admin")
    assert tab.do("client.refresh()") is False
    assert tab.heard == [["out", {"code": "session_ended", "reason": "admin", "elsewhere": True}]]


def test_a_page_that_comes_back_from_memory_asks_anew(site: Site, signed_in: Tab) -> None:
    site.end_session("session_ended", reason="logout")
    signed_in.do("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    assert signed_in.await_heard("out")["reason"] == "logout"


def test_listeners_hear_and_stop_hearing(signed_in: Tab) -> None:
    signed_in.do(
        """(() => {
          globalThis.caught = [];
          const gone = () => caught.push("gone");
          client.addEventListener("signedout", (event) => caught.push(event.detail.code));
          client.addEventListener("signedout", gone);
          client.removeEventListener("signedout", gone);
        })()"""
    )
    signed_in.do("client.logout()")
    assert signed_in.do("caught") == ["logout"]


def test_a_closed_client_sends_nothing_and_the_login_goes_on(
    context: BrowserContext, site: Site, signed_in: Tab
) -> None:
    other = Tab(context.new_page(), site.address)
    signed_in.do("client.close()")
    assert signed_in.do("refusal(get())")["code"] == "closed"
    assert signed_in.do("refusal(client.login({}))")["code"] == "closed"
    assert signed_in.do("client.isSignedIn") is False
    assert other.do("get()") == 200
    assert [each.path for each in site.seen] == ["/api/login", REFRESH, THINGS]


# Who gets to see the token.

_FIND = """async (token) => {
  const found = [];
  const look = (where, text) => { if (String(text).includes(token)) found.push(where); };
  look("localStorage", JSON.stringify(localStorage));
  look("sessionStorage", JSON.stringify(sessionStorage));
  look("cookie", document.cookie);
  look("history", JSON.stringify(history.state) + location.href + name);
  look("DOM", document.documentElement.outerHTML);
  if ((await indexedDB.databases()).length) found.push("indexedDB");
  if ((await caches.keys()).length) found.push("caches");
  const known = new Set();
  let queue = [[globalThis, "window"]];
  while (queue.length) {
    const [it, path] = queue.pop();
    if (known.has(it)) continue;
    known.add(it);
    for (const key of Reflect.ownKeys(it)) {
      let value;
      try { value = it[key]; } catch { continue; }
      if (typeof value === "string") look(`${path}.${String(key)}`, value);
      if (typeof value === "function") look(`${path}.${String(key)}`, value);
      if (value && /^(object|function)$/.test(typeof value)) queue.push([value, `${path}.${String(key)}`]);
    }
    try { const parent = Object.getPrototypeOf(it); if (parent) queue.push([parent, path]); } catch {}
  }
  return [found, known.has(globalThis.client), known.size];
}"""


def test_the_token_is_nowhere_in_storage_page_or_window(site: Site, signed_in: Tab) -> None:
    signed_in.do("client.refresh()")
    assert signed_in.do("get()") == 200
    sent = site.to(THINGS)[0].authorization
    assert sent is not None
    token = sent.removeprefix("Bearer ")
    found, saw_client, looked_at = signed_in.page.evaluate(_FIND, token)
    assert found == []
    assert saw_client
    assert looked_at > 1000
    # The search finds what is there.
    signed_in.page.evaluate("(token) => { globalThis.leak = { deep: { inside: token } }; }", token)
    assert signed_in.page.evaluate(_FIND, token)[0] == ["window.leak.deep.inside"]


def test_a_foreign_origin_never_gets_the_token_nor_causes_a_refresh(
    site: Site, foreign: Site, context: BrowserContext
) -> None:
    (tab,) = reloaded(context, site, 1)
    assert tab.do("get(argument)", foreign.address + THINGS) == 401
    assert tab.do("get(new Request(argument))", foreign.address + THINGS) == 401
    assert [each.authorization for each in foreign.seen] == [None, None]
    assert site.count(REFRESH) == 0


def test_another_scheme_host_or_port_is_another_origin(site: Site, context: BrowserContext) -> None:
    """`localhost` reaches the same server and is somebody else."""
    (tab,) = reloaded(context, site, 1)
    assert tab.do("client.refresh()") is True
    assert tab.do("get(argument)", f"http://localhost:{site.port}{THINGS}") == 401
    assert tab.do("get(argument)", f"http://user.localhost:{site.port}{THINGS}") == 401
    assert [each.authorization for each in site.to(THINGS)] == [None, None]


def test_a_planted_base_element_does_not_lead_the_token_away(site: Site, foreign: Site, signed_in: Tab) -> None:
    signed_in.page.evaluate(
        "(href) => document.head.append(Object.assign(document.createElement('base'), { href }))", foreign.address
    )
    assert signed_in.do("get('/api/things')") == 401
    assert signed_in.do("client.refresh()") is True
    assert [each.path for each in foreign.seen] == [THINGS]
    assert foreign.seen[0].authorization is None


def test_an_address_that_changes_between_two_readings_gets_no_token(site: Site, foreign: Site, signed_in: Tab) -> None:
    site.deny_tokens()
    outcome = signed_in.do(
        """(() => {
          let readings = 0;
          const address = { toString: () => (readings++ ? argument : "/api/things") };
          return refusal(client.fetch(address));
        })()""",
        foreign.address + THINGS,
    )
    assert outcome["name"] == "TypeError"
    assert foreign.seen == []


def test_a_listed_origin_gets_the_token(site: Site, foreign: Site, context: BrowserContext) -> None:
    tab = Tab(context.new_page(), site.address, origins=[foreign.address])
    sign_in(tab)
    assert tab.do("get(argument)", foreign.address + THINGS) == 401
    assert [each.authorization for each in foreign.to(THINGS)] == ["Bearer access-token-1", "Bearer access-token-2"]
    assert site.count(REFRESH) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_does_not_carry_the_token_away(site: Site, foreign: Site, signed_in: Tab, status: int) -> None:
    site.answer_next(THINGS, Answer(status=status, headers=(("Location", foreign.address + THINGS),)))
    assert signed_in.do("refusal(get())")["name"] == "TypeError"
    assert foreign.seen == []


@pytest.mark.parametrize("mode", ["error", "manual"])
def test_the_callers_own_stricter_redirect_mode_stands(site: Site, foreign: Site, signed_in: Tab, mode: str) -> None:
    site.answer_next(THINGS, Answer(status=302, headers=(("Location", foreign.address + THINGS),)))
    outcome = signed_in.do(
        "client.fetch('/api/things', { redirect: argument }).then((answer) => answer.type, () => 'refused')", mode
    )
    assert outcome == {"error": "refused", "manual": "opaqueredirect"}[mode]
    assert foreign.seen == []


def test_a_redirect_of_the_refresh_itself_is_not_followed(site: Site, foreign: Site, signed_in: Tab) -> None:
    site.answer_next(REFRESH, Answer(status=307, headers=(("Location", foreign.address + REFRESH),)))
    assert signed_in.do("refusal(client.refresh())")["code"] == "unavailable"
    assert foreign.seen == []


def test_the_callers_own_authorization_is_left_alone(site: Site, signed_in: Tab) -> None:
    assert signed_in.do("get('/api/things', { headers: { Authorization: 'Bearer mine' } })") == 401
    assert [each.authorization for each in site.to(THINGS)] == ["Bearer mine"]
    assert site.count(REFRESH) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"base": "https://evil.test/"},
        {"base": "//evil.test/"},
        {"origins": ["https://api.shop.test/"]},
        {"origins": ["api.shop.test"]},
        {"origins": ["*"]},
        {"origins": ["null"]},
        {"origins": ["data:text/html,x"]},
    ],
    ids=str,
)
def test_options_that_would_lead_the_token_astray_are_refused(tab: Tab, options: dict[str, object]) -> None:
    refused = "import('/coatcheck.js').then(({ createClient }) => { createClient(argument); return 'taken'; })"
    assert tab.do(f"{refused}.catch((failure) => failure.name)", options) == "TypeError"


def test_a_base_below_the_root_is_used_for_every_call(site: Site, context: BrowserContext) -> None:
    tab = Tab(context.new_page(), site.address, base="/sso")
    assert tab.do("refusal(client.refresh())")["code"] == "not_found"
    assert tab.do("refusal(client.login({}))")["code"] == "not_found"
    assert tab.do("refusal(client.logout())")["code"] == "not_found"
    assert [each.path for each in site.seen] == ["/sso/api/refresh", "/sso/api/login", "/sso/api/logout"]
