"""From settings to a server that answers: the socket first, then the parts, then the word that it is ready.

Decides what a server refuses to start with, how it is bound and drained, and where the set-up link goes: to a
terminal, or to a file only its owner can read, never into a log. Every failure to start is one of this package's
errors with its cure; the process ends by return, so that the command line decides the exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final
from urllib.parse import urlsplit

import uvicorn

from coatcheck.core.network import is_loopback
from coatcheck.errors import CoatcheckError, ConfigurationError
from coatcheck.server.app import create_app
from coatcheck.server.bounded_http import BoundedHttp
from coatcheck.server.pages import SET_UP_FILE
from coatcheck.server.service import Service, build, prepare_home
from coatcheck.server.settings import ServerSettings
from coatcheck.web.asgi import App, Message, Receive, Scope, Send

log = logging.getLogger("coatcheck.server")

MAX_CONNECTIONS: Final = 1000
"""Connections at once; the next is answered 503. Below the usual limit of open files."""

KEEP_ALIVE_SECONDS: Final = 15
DRAIN_SECONDS: Final = 10
"""How long requests under way may take after the process was asked to stop."""

_BACKLOG: Final = 1024


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Ready:
    """A server that answers. One of `set_up_link` and `set_up_file` is there while no administrator exists."""

    address: str
    home: Path
    set_up_link: str | None
    set_up_file: Path | None


def check_start(settings: ServerSettings) -> tuple[str, ...]:
    """Warnings to give before this server starts. Raises: ConfigurationError when it must not start."""
    https = settings.sessions(None).is_https
    warnings: list[str] = []
    if not https and is_loopback(urlsplit(settings.browser_url).hostname or ""):
        warnings.append(
            "plain http for this machine alone: the session cookie has its development name, without Secure"
        )
    elif not https:
        warnings.append("plain http: everybody on the way can read passwords and take the session cookie")
    if https and not settings.trusted_proxies:
        # This server speaks no TLS, so somebody in front of it does, and every client would have that address.
        if not is_loopback(settings.host):
            raise ConfigurationError(
                "trusted_proxies: public_url is https, so a proxy stands in front; name its address or network with "
                "--trusted-proxy, or every client looks like the proxy and shares one limit on sign-in attempts"
            )
        warnings.append(
            "no trusted proxy is named, so every client looks like the proxy and limits by network are off: "
            "--trusted-proxy 127.0.0.1"
        )
    return tuple(warnings)


def serve(settings: ServerSettings, *, announce: Callable[[Ready], None], to_terminal: bool) -> None:
    """Serve until SIGTERM or SIGINT, and return when what was under way is answered.

    `announce` is called once, when connections are answered. Raises: ConfigurationError (an unsafe setting, a port that
    is taken, tables that are not up to date), StoreUnavailable.
    """
    listeners = listen(settings.host, settings.port)
    with contextlib.ExitStack() as behind:
        for listener in listeners:
            behind.enter_context(listener)
        settings = replace(settings, port=int(listeners[0].getsockname()[1]))
        service = build(settings)

        async def tell() -> None:
            announce(await _ready(service, to_terminal=to_terminal))

        app = _Starting(create_app(service, on_ready=tell))
        server = _Server(
            uvicorn.Config(
                app,
                http=BoundedHttp,
                ws="none",
                loop="auto",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                # X-Forwarded-For is read by the session middleware, which believes configured proxies alone.
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=DRAIN_SECONDS,
                backlog=_BACKLOG,
            ),
            service,
        )
        # A start that fails ends in SystemExit(3), or in a return in older releases; the cause is in `app`.
        with contextlib.suppress(SystemExit):
            server.run(sockets=listeners)
        if app.failure is not None:
            raise app.failure


def listen(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for every address of a host; port 0 takes a free one, the same for all.

    They listen before anything else is done: of two servers on one port the second must not touch any state.
    Raises: ConfigurationError with the cure.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as broken:
        raise ConfigurationError(f"host: {host!r} is no address of this machine and no name for one") from broken
    listeners: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            listener = socket.socket(family, kind, protocol)
            listeners.append(listener)
            if os.name == "posix":
                # Without it a restart waits for connections that are still in TIME_WAIT.
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((address[0], port, *address[2:]))
            port = int(listener.getsockname()[1])
            listener.listen(_BACKLOG)
            listener.setblocking(False)
    except OSError as broken:
        for listener in listeners:
            listener.close()
        raise ConfigurationError(_why_not_bound(host, port, broken)) from broken
    return listeners


def write_private(path: Path, text: str) -> None:
    """Write a file only its owner can read, in one step: nobody ever sees half of it or another mode."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


async def _ready(service: Service, *, to_terminal: bool) -> Ready:
    settings = service.settings
    home = settings.home.absolute()
    file = home / SET_UP_FILE
    token = await service.set_up.issue()
    link = None if token is None else f"{settings.browser_url}/setup/{token.text}"
    if link is None or to_terminal:
        # An older link does not work any more; a file that says otherwise only confuses.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            file.unlink()
    else:
        prepare_home(home)
        write_private(file, f"{link}\n")
    return Ready(
        address=settings.browser_url,
        home=home,
        set_up_link=link if to_terminal else None,
        set_up_file=None if link is None or to_terminal else file,
    )


def _why_not_bound(host: str, port: int, broken: OSError) -> str:
    import errno

    if broken.errno == errno.EADDRINUSE:
        return (
            f"port: {port} on {host} is taken; stop what listens there, or choose another with --port (0: a free one)"
        )
    if broken.errno == errno.EACCES:
        return f"port: this user may not listen on {port}; choose one above 1023 with --port"
    if broken.errno == errno.EADDRNOTAVAIL:
        return f"host: {host} is no address of this machine"
    return f"host: cannot listen on {host} port {port}: {broken.strerror}"


class _Server(uvicorn.Server):
    """uvicorn's server, ended by SIGTERM as by a request: quietly, with status 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams of the feed first: they would be waited for as if they were requests under way."""
        await self._service.revocations.stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # uvicorn raises a signal again when it has shut down, and the process would end as if it had been killed.
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop taking connections, answer what is under way; at a second Ctrl-C do not wait for it."""
        log.info("stopping")
        super().handle_exit(sig, frame)


class _Starting:
    """Keeps the reason why a start failed, so that it is told as one line and not as a trace."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.failure: CoatcheckError | OSError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; only the start is watched."""
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "lifespan.startup.complete"
            kept: dict[str, Any] = dict(message)
            if not begun and kept.get("type") == "lifespan.startup.failed":
                # The trace is in here; whoever raised it told us below what it means.
                kept["message"] = ""
            await send(kept)

        try:
            await self._app(scope, receive, watched)
        except (CoatcheckError, OSError) as failure:
            if begun:
                raise
            self.failure = failure
