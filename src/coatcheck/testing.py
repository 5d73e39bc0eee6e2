"""For the tests of applications: a clock to turn, sign-in without a form, captured events, a budget of commands.

Nothing here may be used to serve people: the fake system's randomness can be foretold.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final

from coatcheck.core.ports import SessionStore
from coatcheck.events import Event, EventKind
from coatcheck.manager import AsyncCoatcheck, Coatcheck
from coatcheck.session import SendCookie

DEFAULT_START_US = 1_800_000_000_000_000


class FakeSystem:
    """A clock that only moves when told, and random bytes that repeat from run to run."""

    def __init__(self, *, start_us: int = DEFAULT_START_US, seed: bytes = b"coatcheck") -> None:
        self._now_us = start_us
        self._elapsed = 0.0
        self._seed = seed
        self._drawn = 0

    def now_us(self) -> int:
        """Wall clock, Unix microseconds."""
        return self._now_us

    def elapsed(self) -> float:
        """Seconds since the fake system was made."""
        return self._elapsed

    def random(self, size: int) -> bytes:
        """`size` bytes, never the same twice from one fake system."""
        self._drawn += 1
        return hashlib.shake_256(self._seed + self._drawn.to_bytes(8, "big")).digest(size)

    def advance(self, by: timedelta | float) -> None:
        """Move time forward (seconds or a timedelta)."""
        span = by if isinstance(by, timedelta) else timedelta(seconds=by)
        if span < timedelta(0):
            raise ValueError("time moves forward; use step_clock for a clock that was set back")
        self._now_us += span // timedelta(microseconds=1)
        self._elapsed += span.total_seconds()

    def step_clock(self, by: timedelta | float) -> None:
        """Set the wall clock forward or back, as an operator or NTP might; no time passes."""
        span = by if isinstance(by, timedelta) else timedelta(seconds=by)
        self._now_us += span // timedelta(microseconds=1)


class CapturedEvents:
    """Collects events: pass it as `on_event`."""

    def __init__(self) -> None:
        self.all: list[Event] = []

    def __call__(self, event: Event) -> None:
        """Keep one event."""
        self.all.append(event)

    def kinds(self) -> list[EventKind]:
        """What happened, in order."""
        return [event.kind for event in self.all]

    def of(self, kind: EventKind) -> list[Event]:
        """The events of one kind."""
        return [event for event in self.all if event.kind == kind]

    def clear(self) -> None:
        """Forget everything so far."""
        self.all.clear()


def login_as(
    client: Any,
    coat: Coatcheck | AsyncCoatcheck,
    subject: str,
    *,
    claims: Mapping[str, object] | None = None,
    scopes: Sequence[str] = (),
) -> str:
    """Sign `subject` in on a test client without a form; returns the session's `sid`.

    `client` is Starlette's, FastAPI's or Flask's test client, or one of httpx. The session is a real one in the
    store. The client must speak https (`TestClient(app, base_url="https://testserver")`) or the application must
    have an http `public_url`: else a client drops the cookies it is given later. Inside an asynchronous test use
    `async_login_as`.
    """
    if isinstance(coat, AsyncCoatcheck):
        return asyncio.run(async_login_as(client, coat, subject, claims=claims, scopes=scopes))
    session = coat.session(None)
    session.login(subject, claims=claims or {}, scopes=scopes)
    return _give_cookie(client, coat.settings.session_cookie.name, session.cookie_action, session.sid)


async def async_login_as(
    client: Any,
    coat: AsyncCoatcheck,
    subject: str,
    *,
    claims: Mapping[str, object] | None = None,
    scopes: Sequence[str] = (),
) -> str:
    """`login_as` for an asynchronous application."""
    session = coat.session(None)
    await session.login(subject, claims=claims or {}, scopes=scopes)
    return _give_cookie(client, coat.settings.session_cookie.name, session.cookie_action, session.sid)


@contextmanager
def command_budget(coat: Coatcheck | AsyncCoatcheck, at_most: int) -> Iterator[Counted]:
    """Fail when the store is asked more than `at_most` times inside. Activity in the background counts as well."""
    engine = coat.engine
    # Behind the near copies, where there are any: what they answer is no command.
    place: Any = engine if engine.near is None else engine.near
    name = "store" if engine.near is None else "behind"
    store = getattr(place, name)
    counted = Counted(store)
    setattr(place, name, counted)
    try:
        yield counted
    finally:
        setattr(place, name, store)
    if counted.commands > at_most:
        raise AssertionError(f"{counted.commands} store commands, {at_most} allowed: {', '.join(counted.verbs)}")


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self.verbs: list[str] = []

    @property
    def commands(self) -> int:
        """How many verbs were called."""
        return len(self.verbs)

    def __getattr__(self, name: str) -> Any:
        """Pass a verb on, and count it."""
        found = getattr(self._store, name)
        if name in _VERBS:
            self.verbs.append(name)
        return found


_VERBS: Final = frozenset(
    {
        "ping",
        "id_keys",
        "create",
        "admit",
        "load",
        "commit",
        "touch",
        "rotate_id",
        "expire_idle",
        "revoke",
        "revoke_owner",
        "list_by_owner",
        "scan",
        "sweep",
        "create_family",
        "rotate_refresh",
        "standing",
        "deny",
        "denials",
        "read_ring",
        "write_ring",
    }
)


def _give_cookie(client: Any, name: str, action: object, sid: str | None) -> str:
    if not isinstance(action, SendCookie) or sid is None:
        raise AssertionError("the sign-in made no cookie")
    if hasattr(client, "set_cookie"):
        client.set_cookie(name, action.id.text)
        return sid
    host = getattr(getattr(client, "base_url", None), "host", "") or ""
    jar = client.cookies.jar
    for old in [cookie for cookie in jar if cookie.name == name]:
        jar.clear(old.domain, old.path, old.name)
    # Where a Set-Cookie of this host would go: else a later one stands beside ours, and two count as none.
    client.cookies.set(name, action.id.text, domain=host if not host or "." in host else f"{host}.local")
    return sid
