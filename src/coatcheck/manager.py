"""The two faces: `Coatcheck` for blocking code, `AsyncCoatcheck` for asynchronous code.

Each method is one line over the engine; names and meanings are the same in both colours, and a test compares them.
Nothing may be decided here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

from coatcheck.blocking import run_blocking
from coatcheck.core.access_token import AccessToken
from coatcheck.core.filter import SessionFilter
from coatcheck.core.ports import Colour, Seen, SessionStore, Store, Waits
from coatcheck.core.session import SECOND_US, Authority, check_reason, check_subject, tightened
from coatcheck.engine import Engine
from coatcheck.errors import ConfigurationError, ValueRefused
from coatcheck.events import Event
from coatcheck.issuer import IssuedTokens
from coatcheck.keeper import AsyncKeeper, BlockingKeeper, Keeper
from coatcheck.operations.revoke import Found
from coatcheck.places import ClientPlace
from coatcheck.session import AsyncSession, Session
from coatcheck.settings import Settings, settings_from_env
from coatcheck.stores.near import NearLimits, NearStore
from coatcheck.stores.open import open_store, waits_of
from coatcheck.system import REAL, System

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSummary:
    """One session as lists show it. Times are Unix seconds; never an id or a token."""

    sid: str
    subject: str | None
    created_at: float
    last_seen_at: float
    expires_at: float
    network: str | None
    user_agent: str
    scopes: tuple[str, ...]
    persistent: bool
    device: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page(Generic[T]):
    """Some items, and the cursor to pass as `after` for more; `None` at the end. A page may be short and go on."""

    items: tuple[T, ...]
    cursor: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Revocation:
    """How many sessions ended. `reach_elapsed`: nobody can still be accepting any of them."""

    ended: int
    reach_elapsed: bool


class _Face:
    """What both faces share: building the engine."""

    _colour: Colour

    def __init__(
        self,
        store: str | SessionStore,
        *,
        settings: Settings | None = None,
        on_event: Callable[[Event], None] | None = None,
        system: System = REAL,
    ) -> None:
        self.settings: Settings = Settings() if settings is None else settings
        if isinstance(store, str):
            store = open_store(
                store,
                colour=self._colour,
                namespace=self.settings.namespace,
                deadline=self.settings.store_deadline.total_seconds(),
                replicas=self.settings.replicas,
                system=system,
            )
        if store.colour != self._colour:
            raise ConfigurationError(
                f"store: {type(self).__name__} needs a store of the {self._colour} colour, this one is "
                f"{store.colour}; pass the URL and it is opened in the right one"
            )
        waits = waits_of(self._colour)
        store = with_near_copies(store, self.settings, waits=waits, system=system)
        self.engine: Engine = Engine(store, self.settings, system, waits=waits, on_event=on_event, poke=self._poke)
        self._keeper: Keeper = (
            AsyncKeeper(self.engine.tick, lambda: self.engine.wants_upkeep)
            if self._colour == "async"
            else BlockingKeeper(self.engine.tick, lambda: self.engine.wants_upkeep)
        )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Self:
        """Build from `COATCHECK_*` environment variables. Raises: ConfigurationError naming the variable."""
        store, settings = settings_from_env(os.environ if environ is None else environ)
        return cls(store, settings=settings)

    def _poke(self) -> None:
        self._keeper.poke()

    async def _close(self) -> None:
        await self._keeper.stop()
        await self.engine.close()

    def _where(self, place: ClientPlace | None) -> Callable[[], ClientPlace]:
        binding = self.engine.binding
        if place is not None and binding is not None:
            place = binding.marked(place.address, place.user_agent, place.device)
        return lambda: place or ClientPlace()

    def _page(self, found: Found) -> Page[SessionSummary]:
        return Page(
            items=tuple(self._summary(seen, authority) for seen, authority in found.sessions),
            cursor=found.cursor,
        )

    def _summary(self, seen: Seen, authority: Authority) -> SessionSummary:
        life = self.settings.life
        session = tightened(seen.session, idle_us=life.idle_us, absolute_us=life.absolute_us)
        return SessionSummary(
            sid=self.engine.sid(session.ref),
            subject=session.subject if session.owner else None,
            created_at=session.created_us / SECOND_US,
            last_seen_at=seen.seen_us / SECOND_US,
            expires_at=min(session.absolute_us, seen.seen_us + session.idle_us) / SECOND_US,
            network=authority.networks.get("4") or authority.networks.get("6"),
            user_agent=authority.user_agent,
            scopes=authority.scopes,
            persistent=authority.persistent,
            device=authority.device_id,
        )

    async def _revoke_session(self, sid: str, reason: str, wait: bool) -> Revocation:
        return await self._reached(await self.engine.revoke_sid(sid, check_reason(reason)), wait)

    async def _revoke_subject(self, subject: str, reason: str, keep_sid: str | None, wait: bool) -> Revocation:
        ended = await self.engine.revoke_subject(check_subject(subject), check_reason(reason), keep_sid)
        return await self._reached(ended, wait)

    async def _revoke_where(self, filter_: SessionFilter, reason: str, wait: bool) -> Revocation:
        if not isinstance(filter_, SessionFilter):
            raise ValueRefused("revoke_where takes a SessionFilter")
        return await self._reached(await self.engine.revoke_where(filter_, check_reason(reason)), wait)

    async def _reached(self, ended: int, wait: bool) -> Revocation:
        reach = self.engine.reach.total_seconds()
        if wait and reach:
            await self.engine.waits.sleep(reach)
        return Revocation(ended=ended, reach_elapsed=wait or not reach)

    async def _refresh(self, token: str, audience: str | None) -> IssuedTokens:
        return (await self.engine.refresh(_presented(token) or b"", audience)).tokens

    async def _list(self, subject: str, after: str | None, limit: int) -> Page[SessionSummary]:
        filter_ = SessionFilter(subject=check_subject(subject))
        return self._page(await self.engine.find(filter_, after, limit))

    async def _find(self, filter_: SessionFilter, after: str | None, limit: int) -> Page[SessionSummary]:
        return self._page(await self.engine.find(filter_, after, limit))


class Coatcheck(_Face):
    """Login state for blocking code: WSGI applications, jobs, scripts. Safe to share between threads."""

    _colour = "blocking"

    def start(self) -> None:
        """Connect now rather than at first use. Raises: StoreUnavailable, ConfigurationError."""
        run_blocking(self.engine.start())

    def close(self) -> None:
        """Write what waits and let go of the store."""
        run_blocking(self._close())

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def session(self, session_id: str | None, *, place: ClientPlace | None = None) -> Session:
        """A session outside a web framework: for jobs, sockets and tests. It loads at the first touch. Where the
        settings compare places (`binding`), only a `place` is compared; a job has none."""
        session = Session(self.engine, _presented(session_id), self._where(place))
        session.lasting = True
        return session

    def refresh(self, token: str, *, audience: str | None = None) -> IssuedTokens:
        """Exchange a refresh token outside a web framework. Raises: RefreshInvalid, RefreshReused, SessionEnded,
        ValueRefused, StoreUnavailable."""
        return run_blocking(self._refresh(token, audience))

    def verify(self, token: str) -> AccessToken:
        """Check an access token; the store is asked whether its session lives. Raises: TokenInvalid,
        StoreUnavailable."""
        return run_blocking(self.engine.verify(_presented(token) or b""))

    def deny_token(self, token: str) -> None:
        """Refuse one access token from now on, here and at every `Verifier`; its session goes on. Raises:
        TokenInvalid for one that is not ours, StoreUnavailable."""
        run_blocking(self.engine.deny_token(_presented(token) or b""))

    def list_sessions(self, subject: str, *, after: str | None = None, limit: int = 100) -> Page[SessionSummary]:
        """Alive sessions of a subject, oldest first. Raises: StoreUnavailable, ValueRefused."""
        return run_blocking(self._list(subject, after, limit))

    def find_sessions(
        self, filter_: SessionFilter, *, after: str | None = None, limit: int = 100
    ) -> Page[SessionSummary]:
        """Alive sessions the filter means, in the store's order. For administration."""
        return run_blocking(self._find(filter_, after, limit))

    def revoke_session(self, sid: str, *, reason: str, wait: bool = False) -> Revocation:
        """End one session by its public handle; fine when there is none. With `wait`, returns after one reach."""
        return run_blocking(self._revoke_session(sid, reason, wait))

    def revoke_subject(
        self, subject: str, *, reason: str, keep_sid: str | None = None, wait: bool = False
    ) -> Revocation:
        """End every session of a subject but `keep_sid`, those being created at this moment included."""
        return run_blocking(self._revoke_subject(subject, reason, keep_sid, wait))

    def revoke_where(self, filter_: SessionFilter, *, reason: str, wait: bool = False) -> Revocation:
        """End every session the filter means that was created before this call. Safe to repeat."""
        return run_blocking(self._revoke_where(filter_, reason, wait))


class AsyncCoatcheck(_Face):
    """Login state for asynchronous code: ASGI applications. Safe to share between tasks and event loops."""

    _colour = "async"

    async def start(self) -> None:
        """Connect now rather than at first use. Raises: StoreUnavailable, ConfigurationError."""
        await self.engine.start()

    async def close(self) -> None:
        """Write what waits and let go of the store."""
        await self._close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def session(self, session_id: str | None, *, place: ClientPlace | None = None) -> AsyncSession:
        """A session outside a web framework: for jobs, sockets and tests. Load it first. Where the settings compare
        places (`binding`), only a `place` is compared; a job has none."""
        session = AsyncSession(self.engine, _presented(session_id), self._where(place))
        session.lasting = True
        return session

    async def refresh(self, token: str, *, audience: str | None = None) -> IssuedTokens:
        """Exchange a refresh token outside a web framework. Raises: RefreshInvalid, RefreshReused, SessionEnded,
        ValueRefused, StoreUnavailable."""
        return await self._refresh(token, audience)

    async def verify(self, token: str) -> AccessToken:
        """Check an access token; the store is asked whether its session lives. Raises: TokenInvalid,
        StoreUnavailable."""
        return await self.engine.verify(_presented(token) or b"")

    async def deny_token(self, token: str) -> None:
        """Refuse one access token from now on, here and at every `Verifier`; its session goes on. Raises:
        TokenInvalid for one that is not ours, StoreUnavailable."""
        await self.engine.deny_token(_presented(token) or b"")

    async def list_sessions(self, subject: str, *, after: str | None = None, limit: int = 100) -> Page[SessionSummary]:
        """Alive sessions of a subject, oldest first. Raises: StoreUnavailable, ValueRefused."""
        return await self._list(subject, after, limit)

    async def find_sessions(
        self, filter_: SessionFilter, *, after: str | None = None, limit: int = 100
    ) -> Page[SessionSummary]:
        """Alive sessions the filter means, in the store's order. For administration."""
        return await self._find(filter_, after, limit)

    async def revoke_session(self, sid: str, *, reason: str, wait: bool = False) -> Revocation:
        """End one session by its public handle; fine when there is none. With `wait`, returns after one reach."""
        return await self._revoke_session(sid, reason, wait)

    async def revoke_subject(
        self, subject: str, *, reason: str, keep_sid: str | None = None, wait: bool = False
    ) -> Revocation:
        """End every session of a subject but `keep_sid`, those being created at this moment included."""
        return await self._revoke_subject(subject, reason, keep_sid, wait)

    async def revoke_where(self, filter_: SessionFilter, *, reason: str, wait: bool = False) -> Revocation:
        """End every session the filter means that was created before this call. Safe to repeat."""
        return await self._revoke_where(filter_, reason, wait)


def with_near_copies(store: SessionStore, settings: Settings, *, waits: Waits, system: System) -> SessionStore:
    """Put near copies in front of a store that tells what changes; of another one every check reads."""
    if not settings.near_copies or isinstance(store, NearStore) or not hasattr(store, "feed"):
        return store
    limits = NearLimits(
        entries=settings.near_copies,
        octets=settings.near_octets,
        lease=settings.lease.total_seconds(),
        deadline=settings.store_deadline.total_seconds(),
        idle_us=settings.life.idle_us,
        absolute_us=settings.life.absolute_us,
    )
    return NearStore(cast(Store, store), waits=waits, system=system, limits=limits)


def _presented(session_id: str | None) -> bytes | None:
    # What is no ASCII was never ours; it must be refused like any other forgery, not by an exception.
    return None if session_id is None else session_id.encode("ascii", "replace")
