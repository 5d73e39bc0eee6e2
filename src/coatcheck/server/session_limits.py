"""What happens when somebody has as many sessions as he may have.

Decides which limit holds for whom (the profile's, or that of the account's role), what is shown of the sessions that
fill it, and when a sign-in that would throw another one out has to ask first:

- The limit itself is kept by the store, in the command that creates the session; nothing here is trusted for it.
- A browser that signs in again replaces its own session, which is known by the device cookie.
- `refuse` and `ask` answer with the list and a word to go on with (`continuing.py`). Both let whoever has just given
  the password end any of the sessions, so nobody can lock an owner out by being there first; under `refuse` an event
  says so.
- Two browsers that throw each other out three times in ten minutes are no mistake: one of them is a thief, and each
  would win for as long as it tries. From then on, until ten minutes after the first of the three, nobody throws a young
  session out without having been shown it.

It must never be reached before the password was right.
"""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from coatcheck.core.ports import REASON_EVICTED, RateLimit
from coatcheck.core.session import SECOND_US
from coatcheck.core.user_agent import device_name
from coatcheck.errors import LoginRequired, OpenSession, RequestRefused, SessionLimitReached
from coatcheck.events import Event, EventKind
from coatcheck.manager import SessionSummary
from coatcheck.primitives.digest import keyed, sha256_text
from coatcheck.server.accounts import User
from coatcheck.server.continuing import (
    CONTINUE_LIFE,
    NONCE_SIZE,
    PROOF_LIFE,
    SECRET_BYTES,
    Standstill,
    continue_secret,
    open_standstill,
    seal_standstill,
)
from coatcheck.server.service import Service
from coatcheck.session import AsyncSession, Carrier
from coatcheck.settings import SessionLimit

CONTEST_EVICTIONS: Final = 3
CONTEST_PERIOD: Final = timedelta(minutes=10)

_WINDOW: Final = RateLimit(attempts=1, period=CONTEST_PERIOD.total_seconds())
_ONCE: Final = RateLimit(attempts=1, period=2 * CONTINUE_LIFE.total_seconds())


class Halted(SessionLimitReached):
    """A sign-in that can go on. `cookie` is the value that binds its word to the browser, `filling` are the sessions
    that were shown, oldest first, and `surplus` how many of them have to give way at least."""

    def __init__(
        self, reached: SessionLimitReached, *, cookie: str, filling: Sequence[SessionSummary], surplus: int
    ) -> None:
        super().__init__(reached.sids, ask=reached.ask)
        self.cookie: str = cookie
        self.filling: tuple[SessionSummary, ...] = tuple(filling)
        self.surplus: int = surplus


def limit_of(service: Service, role: str) -> SessionLimit:
    """How many sessions somebody of this role may have, and what the next sign-in gets."""
    maximum, on_limit = service.settings.decided.limit_of(role)
    wanted = None if maximum is None else SessionLimit(maximum=maximum, on_reached=on_limit)
    return service.coat.settings.admission_under(wanted)


async def open_sessions(service: Service, subject: str) -> list[SessionSummary]:
    """Every session of somebody, oldest first. Raises: StoreUnavailable."""
    found: list[SessionSummary] = []
    cursor: str | None = None
    while True:
        page = await service.coat.list_sessions(subject, after=cursor)
        found.extend(page.items)
        cursor = page.cursor
        if cursor is None:
            return found


def own_session(sessions: Sequence[SessionSummary], device: str | None) -> str | None:
    """The newest session of this browser, which a new one replaces."""
    if device is None:
        return None
    return next((each.sid for each in reversed(sessions) if each.device == device), None)


async def check_contest(
    service: Service,
    session: AsyncSession,
    user: User,
    sessions: Sequence[SessionSummary],
    *,
    limit: SessionLimit,
    returning: bool,
    network: str | None,
) -> None:
    """Let a sign-in throw out whom it will, unless two browsers keep doing it to each other.

    `sessions` are those that count. `returning`: this browser has signed in to the account before. Counted is a browser
    that comes back and throws out a session that is not older than `CONTEST_PERIOD`. Raises: SessionLimitReached when
    that has happened `CONTEST_EVICTIONS` times in the last `CONTEST_PERIOD`; StoreUnavailable.
    """
    surplus = len(sessions) + 1 - limit.maximum
    young = service.system.now_us() / SECOND_US - CONTEST_PERIOD.total_seconds()
    if limit.on_reached != "evict_oldest" or not any(each.created_at > young for each in sessions[: max(0, surplus)]):
        return
    keys = [_window_key(service, user, number) for number in range(CONTEST_EVICTIONS)]
    # More than such a limit ever holds: never taken, and the answer tells whether there would be room.
    taken = [(await service.store.hit(key, _WINDOW, cost=2)).remaining == 0 for key in reversed(keys)]
    if all(taken):
        raise SessionLimitReached(tuple(each.sid for each in sessions), ask=True)
    end = session.ended
    if not returning and (end is None or end.reason != REASON_EVICTED):
        return
    for number, key in enumerate(keys, start=1):
        if (await service.store.hit(key, _WINDOW)).allowed:
            if number == CONTEST_EVICTIONS:
                service.coat.engine.publish(_event(service, "session.eviction_contest", user, network, number))
            return


def halt(
    service: Service,
    reached: SessionLimitReached,
    user: User,
    sessions: Sequence[SessionSummary],
    *,
    proved_us: int,
    device: str,
    carrier: Carrier,
    audience: str | None,
) -> Halted:
    """What somebody is told who may choose: the sessions that fill the limit, and a word to go on with.

    `sessions` are listed after the refusal; one that ended in between is not shown, and not waited for.
    """
    filling = [each for each in sessions if each.sid in reached.sids]
    standstill = Standstill(
        user=user.id,
        password_changed_us=user.password_changed_us,
        proved_us=proved_us,
        expires_us=service.system.now_us() + int(CONTINUE_LIFE.total_seconds() * SECOND_US),
        shown=tuple(each.sid for each in filling),
        device=device,
        carrier=carrier,
        audience=audience,
    )
    cookie = continue_secret(service.system.random(SECRET_BYTES))
    surplus = max(0, len(filling) + 1 - limit_of(service, user.role).maximum)
    halted = Halted(reached, cookie=cookie, filling=filling, surplus=surplus)
    halted.sessions = tuple(
        OpenSession(
            sid=each.sid,
            created_at=each.created_at,
            last_seen_at=each.last_seen_at,
            network=each.network,
            device=device_name(each.user_agent),
        )
        for each in filling
    )
    halted.continue_with = seal_standstill(
        standstill,
        cookie=cookie.encode("ascii"),
        key=service.continue_key,
        nonce=service.system.random(NONCE_SIZE),
    )
    return halted


async def resume_at(service: Service, word: str, cookie: str | None, *, ending: Sequence[str]) -> Standstill:
    """Spend a word: of any number of callers exactly one gets what it carries.

    Raises: LoginRequired for a word that is not ours, is over, was used, or belongs to another browser;
    RequestRefused for a session that was not shown (the word is not spent); StoreUnavailable.
    """
    now_us = service.system.now_us()
    bound = "" if cookie is None else cookie
    found = open_standstill(word, cookie=bound.encode("latin-1", "replace"), key=service.continue_key, now_us=now_us)
    if found is None or now_us >= found.proved_us + int(PROOF_LIFE.total_seconds() * SECOND_US):
        raise LoginRequired("continue: not ours, over, or of another browser")
    # Before the word is spent: whoever names a session that he was not shown has made a mistake, and may mend it.
    if not set(ending) <= set(found.shown):
        raise RequestRefused("end: a session that was not shown")
    if not (await service.store.hit(f"continue:{sha256_text(word.encode('ascii'))}", _ONCE)).allowed:
        raise LoginRequired("continue: used before")
    return found


def overruled(service: Service, user: User, network: str | None, ended: int) -> Event:
    """The notice that somebody ended sessions which a limit of `refuse` had protected."""
    return _event(service, "session.limit_overruled", user, network, ended)


def _window_key(service: Service, user: User, number: int) -> str:
    # Keyed, as all names of limits are: who reads the store must not learn who is quarrelling.
    digest = keyed(user.id.encode(), key=service.continue_key, size=18, purpose=b"cc-evict")
    return f"evict:{number}:{urlsafe_b64encode(digest).decode('ascii')}"


def _event(service: Service, kind: EventKind, user: User, network: str | None, ended: int) -> Event:
    data: dict[str, str | int | float | bool] = {"ended": ended}
    if network is not None:
        data["network"] = network
    return Event(kind=kind, at=service.system.now_us() / SECOND_US, subject=user.id, data=data)
