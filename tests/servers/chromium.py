"""A real Chromium, driven by Playwright, that can reach loopback and nothing else.

Playwright's blocking interface keeps an event loop running in the thread that uses it, so a
browser must be closed before anything else in that thread runs one: keep it for a test module at
most, never for a whole run.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.servers.missing import ServerMissing

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser_arguments(hosts: Mapping[str, int] | None = None) -> list[str]:
    """Command-line switches; `hosts` maps `name:port` patterns to loopback ports.

    `{"*.test:443": 8443}` lets `https://shop.test/` reach a server on port 8443 without a hosts file.
    """
    rules = [f"MAP {pattern} 127.0.0.1:{port}" for pattern, port in (hosts or {}).items()]
    # Everything else does not exist: neither a test nor the browser itself talks to the outside.
    rules += ["MAP * ~NOTFOUND", "EXCLUDE 127.0.0.1", "EXCLUDE localhost", "EXCLUDE *.localhost"]
    arguments = [
        "--host-resolver-rules=" + ", ".join(rules),
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--no-default-browser-check",
    ]
    if os.geteuid() == 0:
        # Chromium refuses to start as root with its sandbox. Only our own pages are opened.
        arguments.append("--no-sandbox")
    return arguments


def find_browser() -> Path:
    """`$BROWSER_BIN`, else a Chromium or Chrome on PATH. Raises: ServerMissing."""
    chosen = os.environ.get("BROWSER_BIN")
    if chosen:
        if os.access(chosen, os.X_OK):
            return Path(chosen)
        raise ServerMissing(f"no browser: BROWSER_BIN names {chosen}, which cannot be run")
    for name in _NAMES:
        path = shutil.which(name) or shutil.which(f"/usr/bin/{name}")
        if path is not None:
            return Path(path)
    raise ServerMissing(f"no browser: BROWSER_BIN is not set and none of {', '.join(_NAMES)} is on PATH")


def version_of(binary: Path) -> str:
    """For people: `Chromium 156.0.8078.79`."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return " ".join(said.stdout.split()[:2])


@contextlib.contextmanager
def launched(
    *, arguments: Sequence[str] = (), without: Sequence[str] = (), hosts: Mapping[str, int] | None = None
) -> Iterator[Browser]:
    """A headless browser for the length of the block.

    `arguments` are added to ours; `without` names switches of Playwright's to leave away, such as
    `--disable-back-forward-cache`. Raises: ServerMissing.
    """
    binary = find_browser()
    with _playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=binary,
            args=[*browser_arguments(hosts), *arguments],
            ignore_default_args=list(without) or None,
        )
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def launched_with_profile(
    profile: Path,
    *,
    arguments: Sequence[str] = (),
    without: Sequence[str] = (),
    hosts: Mapping[str, int] | None = None,
) -> Iterator[BrowserContext]:
    """A browser that keeps its state in the directory `profile`, as a person's does. Raises: ServerMissing."""
    binary = find_browser()
    with _playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=binary,
            args=[*browser_arguments(hosts), *arguments],
            ignore_default_args=list(without) or None,
        )
        try:
            yield context
        finally:
            context.close()


def _playwright() -> contextlib.AbstractContextManager[Playwright]:
    try:
        # Late: its import is slow, and whoever starts only a Valkey need not have it.
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError as missing:
        raise ServerMissing("no browser: the playwright package is not installed") from missing
    return sync_playwright()
