"""An issuer on the loopback address whose every answer a test decides, and a desk that sees what became of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from coatcheck.core.access_token import mint_access_token
from coatcheck.primitives.jwk import SigningKey
from coatcheck.testing import FakeSystem
from coatcheck.verifier import Verifier
from coatcheck.verifier.follower import Follower, _Errand, _Stream
from coatcheck.verifier.knowledge import Knowledge

WAIT = 20.0
CREDENTIAL = "feed-credential-of-orders"
AUDIENCE = "orders"
LONGEST = 900

Hook = Callable[["Handler"], None]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    issuer: Issuer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A verifier that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    """One connection. `server.issuer` decides."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.server.issuer.answer(self)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def reply(self, status: int, body: bytes = b"", kind: str = "application/json", **fields: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()


class Issuer:
    """Publishes keys and revocations as docs say, unless a hook says otherwise."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys = list(keys)
        self.entries: list[dict[str, object]] = []
        self.first = 0
        self.era = "e1"
        self.page = 1000
        self.lag = 0.0
        self.longest: float = LONGEST
        self.max_age = 600
        self.credential = CREDENTIAL
        self.on_keys: Hook | None = None
        self.on_poll: Hook | None = None
        self.on_stream: Hook | None = None
        self.asked: list[tuple[str, str]] = []
        self.streams: list[Handler] = []
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.issuer = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT)

    # What it is asked.

    def answer(self, handler: Handler) -> None:
        path = urlsplit(handler.path).path
        streaming = handler.headers.get("Accept") == "text/event-stream"
        kind = "keys" if path == "/.well-known/jwks.json" else "stream" if streaming else "poll"
        with self.changed:
            self.asked.append((kind, handler.path))
            self.changed.notify_all()
        hook = {"keys": self.on_keys, "poll": self.on_poll, "stream": self.on_stream}[kind]
        if hook is not None:
            hook(handler)
        elif kind == "keys":
            self.give_keys(handler)
        elif handler.headers.get("Authorization") != f"Bearer {self.credential}":
            handler.reply(401)
        elif kind == "poll":
            self.give_page(handler)
        else:
            self.give_stream(handler)

    def count(self, kind: str) -> int:
        with self.changed:
            return sum(1 for asked, _ in self.asked if asked == kind)

    def wait_asked(self, kind: str, times: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: sum(1 for asked, _ in self.asked if asked == kind) >= times, WAIT)

    # What it says.

    def jwks(self) -> bytes:
        return json.dumps({"keys": [key.verifying.public_jwk() for key in self.keys]}).encode()

    def give_keys(self, handler: Handler) -> None:
        body = self.jwks()
        tag = f'"{hash(body)}"'
        fields = {"Cache_Control": f"public, max-age={self.max_age}", "ETag": tag}
        if handler.headers.get("If-None-Match") == tag:
            handler.send_response(304)
            for name, value in fields.items():
                handler.send_header(name.replace("_", "-"), value)
            handler.end_headers()
        else:
            handler.reply(200, body, "application/jwk-set+json", **fields)

    def body(self, entries: list[dict[str, object]], cursor: str, *, more: bool = False) -> bytes:
        page = {"cursor": cursor, "more": more, "lag": self.lag, "longest": self.longest, "entries": entries}
        return json.dumps(page).encode()

    def give_page(self, handler: Handler) -> None:
        asked = parse_qs(urlsplit(handler.path).query)
        start = self.first
        if "after" in asked:
            era, _, position = asked["after"][0].partition(":")
            start = int(position)
            if era != self.era or start < self.first:
                handler.reply(410, b'{"code":"cursor_lost"}', "application/problem+json")
                return
        size = min(self.page, int(asked["limit"][0]))
        entries = self.entries[start : start + size]
        end = start + len(entries)
        handler.reply(200, self.body(entries, f"{self.era}:{end}", more=end < len(self.entries)))

    def give_stream(self, handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.chunk(b":\n\n")
        with self.changed:
            self.streams.append(handler)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.closing.is_set() or handler not in self.streams)
        handler.close_connection = True

    def wait_stream(self) -> Handler:
        with self.changed:
            assert self.changed.wait_for(lambda: self.streams, WAIT)
            return self.streams[-1]

    def end_streams(self) -> None:
        with self.changed:
            self.streams.clear()
            self.changed.notify_all()

    def push(self, *entries: dict[str, object]) -> None:
        """Revoke, and say so on the stream alone."""
        handler = self.wait_stream()
        data = self.body(list(entries), "whatever")
        handler.chunk(b"event: revoked\nid: whatever\ndata: " + data + b"\n\n")


class Desk:
    """What the thread of a verifier has done, to be waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changed = threading.Condition()
        self.done: list[str] = []
        for owner, name in (
            (Knowledge, "confirm"),
            (Knowledge, "take"),
            (Knowledge, "take_pushed"),
            (Knowledge, "use_keys"),
            (_Stream, "_open"),
            (Follower, "_turn"),
            (_Errand, "fail"),
            (_Errand, "succeed"),
        ):
            monkeypatch.setattr(owner, name, self._noting(getattr(owner, name), name))

    def _noting(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noted(this: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return method(this, *arguments, **options)
            finally:
                said = name
                if name == "fail":
                    said = f"fail: {this.name}: {arguments[0]}"
                elif name == "succeed":
                    said = f"succeed: {this.name}"
                elif name == "_turn":
                    said = f"_turn {id(this)}"
                with self.changed:
                    self.done.append(said)
                    self.changed.notify_all()

        return noted

    def count(self, what: str) -> int:
        with self.changed:
            return sum(1 for one in self.done if one.startswith(what))

    def wait(self, what: str, times: int = 1) -> None:
        """Until something has been done so often in all."""
        with self.changed:
            found = self.changed.wait_for(lambda: sum(1 for one in self.done if one.startswith(what)) >= times, WAIT)
            assert found, self.done

    def wait_again(self, what: str, act: Callable[[], object], times: int = 1) -> None:
        """Act, and wait until something is done as often once more."""
        before = self.count(what)
        act()
        self.wait(what, before + times)


class Bench:
    """A verifier with a clock that only a test moves."""

    def __init__(self, issuer: Issuer, desk: Desk) -> None:
        self.issuer = issuer
        self.desk = desk
        self.system = FakeSystem()
        self._made: list[Verifier] = []

    def verifier(self, **options: Any) -> Verifier:
        settings: dict[str, Any] = {"audience": AUDIENCE, "feed_credential": CREDENTIAL, "system": self.system}
        made = Verifier(self.issuer.url, **(settings | options))
        self._made.append(made)
        return made

    def ready(self, **options: Any) -> Verifier:
        made = self.verifier(**options)
        made.start()
        assert made.wait_until_ready(WAIT)
        return made

    def following(self, **options: Any) -> Verifier:
        """One that is ready, and whose stream is open."""
        before, streams = self.desk.count("_open"), len(self.issuer.streams)
        made = self.ready(**options)
        self.desk.wait("_open", before + 1)
        if self.issuer.on_stream is None:
            # It is open for the verifier before the issuer has put it on its list.
            with self.issuer.changed:
                assert self.issuer.changed.wait_for(lambda: len(self.issuer.streams) > streams, WAIT)
        return made

    def turn(self, seconds: float) -> None:
        """Let time pass once every question has its answer, and let the threads notice."""
        self.settle()
        self.jump(seconds)

    def jump(self, seconds: float) -> None:
        """Let time pass whatever is on its way."""
        self.system.advance(seconds)
        self.nudge()

    def settle(self) -> None:
        """Wait until nothing more will happen before a test acts."""
        for _ in range(2):
            # The turn that is under way may have looked before something came; the next one has not.
            for made in self._made:
                if made._follower is not None and made.status.running:
                    self.desk.wait_again(f"_turn {id(made._follower)}", made._follower._bell.ring)
        with self.desk.changed:
            assert self.desk.changed.wait_for(self._is_calm, WAIT), self.desk.done

    def _is_calm(self) -> bool:
        now = self.system.elapsed()
        for made in self._made:
            if made._follower is None or not made.status.running:
                continue
            for errand in made._follower._errands:
                if isinstance(errand, _Stream) and (errand._opened or not made._known.feed.is_complete):
                    continue
                if errand.sent is not None or errand.due <= now:
                    return False
        return True

    def nudge(self) -> None:
        for made in self._made:
            if made._follower is not None:
                made._follower._bell.ring()

    def mint(self, key: SigningKey | None = None, **claims: Any) -> str:
        now = self.system.now_us() // 1_000_000
        said: dict[str, Any] = {
            "issuer": self.issuer.url,
            "subject": "50",
            "audience": AUDIENCE,
            "client_id": "web",
            "sid": "the-session",
            "jti": "the-token",
            "issued_at": now,
            "expires_at": now + LONGEST,
            "scopes": ("read",),
            "auth_time": now,
            "acr": None,
            "amr": ("pwd",),
            "claims": {"role": '"admin"'},
        }
        return mint_access_token(key or self.issuer.keys[0], **(said | claims))

    @property
    def until(self) -> float:
        """A time at which no denial of a test is over."""
        return self.system.now_us() / 1_000_000 + LONGEST + 60

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for made in self._made:
            made.close()
