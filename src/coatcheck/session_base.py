"""One request's view of one session: what both colours share.

Decides when the session is read, which fields have changed, and what the response has to carry. Effects (`login`,
`logout`, `rotate`) act at once; fields are written once, at `commit()`. A session object belongs to one request: it
must never be shared between requests, and the blocking one not between threads.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import wraps
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeAlias, TypeVar, cast

from coatcheck.core.access_token import AccessToken
from coatcheck.core.admission import cause_of
from coatcheck.core.freshness import FOR_EVER, NEVER
from coatcheck.core.ids import IdKeys, SessionId, SessionRef, parse_session_id, parse_sid
from coatcheck.core.near_session import NearSession
from coatcheck.core.ports import REASON_SUPERSEDED, Changes, Choice
from coatcheck.core.profiles import OutagePolicy
from coatcheck.core.refresh_token import parse_refresh_token
from coatcheck.core.session import (
    SECOND_US,
    Authority,
    StoredSession,
    check_reason,
    decode_claims,
)
from coatcheck.core.sign_in import SignIn, check_amr, check_claims
from coatcheck.core.values import RESERVED, Json, Storable, check_name, decode_value, encode_value
from coatcheck.deadlines import Allowance
from coatcheck.engine import Engine
from coatcheck.errors import (
    CoatcheckError,
    Forbidden,
    LoginRequired,
    PlaceRefused,
    RefreshInvalid,
    SessionClosed,
    SessionEnded,
    SessionGone,
    SessionLimitReached,
    SessionNotLoaded,
    StepUpRequired,
    StoreUnavailable,
    TokenInvalid,
    Unconfirmed,
    ValueRefused,
)
from coatcheck.issuer import Exchanged, IssuedTokens
from coatcheck.operations.login import OldSession, SignInRefused
from coatcheck.operations.resume import Resumed
from coatcheck.places import ClientPlace
from coatcheck.settings import SessionLimit

log: Final = logging.getLogger("coatcheck")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is asking, on one request. `auth_time` is Unix seconds."""

    subject: str
    sid: str
    claims: Mapping[str, Json] = field(default_factory=dict)
    scopes: tuple[str, ...] = ()
    acr: str | None = None
    amr: tuple[str, ...] = ()
    auth_time: float = 0.0


def principal_of(token: AccessToken) -> Principal:
    """Who is asking with an access token that was accepted."""
    return Principal(
        subject=token.subject,
        sid=token.sid or "",
        claims=token.claims,
        scopes=token.scopes,
        acr=token.acr,
        amr=token.amr,
        auth_time=token.auth_time,
    )


@dataclass(frozen=True, slots=True)
class SessionEnd:
    """Why and when (Unix seconds) the session this request came with has ended. `network`: where the sign-in came from
    that took its place, if that is why."""

    reason: str
    at: float
    network: str | None = None


@dataclass(frozen=True, slots=True)
class SendCookie:
    """The response sets the session cookie. `persistent`: it outlives the browser."""

    id: SessionId
    persistent: bool


@dataclass(frozen=True, slots=True)
class ClearCookie:
    """The response deletes the session cookie: somebody signed out on purpose."""


@dataclass(frozen=True, slots=True)
class SendRefresh:
    """The response sets the refresh cookie, for at most `max_age`."""

    text: str = field(repr=False)
    max_age: timedelta


@dataclass(frozen=True, slots=True)
class ClearRefresh:
    """The response deletes the refresh cookie: somebody signed out on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a sign-in says about the sessions that are there already; see `login`."""

    limit: SessionLimit | None = None
    replaces: str | None = None
    shown: tuple[str, ...] | None = None
    end: tuple[str, ...] = ()

    def choice(self, keys: IdKeys) -> Choice | None:
        """What was chosen, in the store's terms; None where nothing was. Raises: ValueRefused."""
        if self.shown is None:
            if self.end:
                raise ValueRefused("end: needs shown, all sessions that were chosen from")
            return None
        if not set(self.end) <= set(self.shown):
            raise ValueRefused("end: a session that was not shown")
        refs = {sid: parse_sid(keys, sid) for sid in self.shown}
        handles = {sid: ref.handle for sid, ref in refs.items() if ref is not None}
        if len(handles) < len(refs):
            raise ValueRefused("shown: not a session of this store")
        return Choice(shown=frozenset(handles.values()), ending=frozenset(handles[sid] for sid in self.end))


def admission(
    limit: SessionLimit | None, replaces: str | None, shown: Sequence[str] | None, end: Sequence[str]
) -> Admission:
    """What an application said. Raises: ValueRefused."""
    if isinstance(shown, str) or isinstance(end, str):
        raise ValueRefused("shown, end: tuples of sids")
    return Admission(limit=limit, replaces=replaces, shown=None if shown is None else tuple(shown), end=tuple(end))


CookieAction: TypeAlias = SendCookie | ClearCookie
RefreshAction: TypeAlias = SendRefresh | ClearRefresh
Carrier: TypeAlias = Literal["cookie", "body"]


def _end_of(reason: str, at_us: int) -> SessionEnd:
    cause, network = cause_of(reason)
    return SessionEnd(cause, at_us / SECOND_US, network)


def _in_time(
    work: Callable[Concatenate[SessionBase, P], Awaitable[T]],
) -> Callable[Concatenate[SessionBase, P], Coroutine[Any, Any, T]]:
    """All store work of one request together has one deadline: what one step used the next one lacks."""

    @wraps(work)
    async def in_time(session: SessionBase, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if session.lasting:
            return await work(session, *args, **kwargs)
        with session.allowance.piece():
            return await work(session, *args, **kwargs)

    return in_time


class SessionBase(MutableMapping[str, Json]):
    """What both colours share: the mapping of fields and everything that can be read without waiting."""

    # What a session has before anything happened. Here rather than in `__init__`: most requests do no more than look
    # who is asking, and setting thirty attributes would cost them more than finding the session does.
    _aside: tuple[bytes, ...] = ()
    _bearer: bytes | None = None
    _refresh_cookie: bytes | None = None
    _refresh_aside: tuple[bytes, ...] = ()
    _outage: OutagePolicy | None = None
    _near: NearSession | None = None
    _token: AccessToken | None = None
    _token_refused: TokenInvalid | None = None
    _cookie: CookieAction | None = None
    _refresh_action: RefreshAction | None = None
    _replaced: SessionRef | None = None
    _id: SessionId | None = None
    _record: StoredSession | None = None
    _authority: Authority = Authority()
    _seen_us: int = 0
    _end: SessionEnd | None = None
    _store_failure: StoreUnavailable | None = None
    _stored: Mapping[str, str] = {}
    _loaded = False
    _accessed = False
    _closed = False
    _may_create = True
    _unavailable = False
    _through_outage = False
    _held: Resumed | None = None
    _refused_until: float | None = None
    _logout_pending = False
    _login_begun = False
    _signed_in_here = False
    _allowance: Allowance | None = None
    _vouched_until = NEVER
    _had_copy = False
    lasting = False
    """Whether this outlives a request (a socket, a job): then each step has a deadline of its own."""

    def __init__(
        self,
        engine: Engine,
        presented: bytes | None,
        where: Callable[[], ClientPlace],
        *,
        aside: tuple[bytes, ...] = (),
        bearer: bytes | None = None,
        refresh: bytes | None = None,
        refresh_aside: tuple[bytes, ...] = (),
        outage: OutagePolicy | None = None,
    ) -> None:
        """`presented` is the cookie that counts. `aside` are cookie values that came but do not count (twins, or
        beside an Authorization header): only signing out looks at them. `where` is asked when a session is made.
        `bearer` is the access token that came instead of a cookie, looked at only where tokens are on; `refresh` the
        refresh cookie, `refresh_aside` those that came but do not count. `outage`: what to do when the store is away,
        if not what the settings say."""
        self._engine = engine
        self._presented = presented
        self._where = where
        self._values: dict[str, Json] = {}
        self._deleted: set[str] = set()
        if aside:
            self._aside = aside
            # A cookie that came and was not read must not be written over by a new anonymous session.
            self._may_create = False
        if outage is not None:
            self._outage = outage
        if engine.tokens is not None:
            self._bearer = bearer
        if refresh is not None or refresh_aside:
            # Also where tokens are off by now: `exchange` takes the session up, signing out ends it.
            self._refresh_cookie = refresh
            self._refresh_aside = refresh_aside

    # -- reading ---------------------------------------------------------------------------------------------------

    @property
    def is_loaded(self) -> bool:
        """Whether the store has been asked."""
        return self._loaded

    @property
    def is_signed_in(self) -> bool:
        """Whether somebody is signed in."""
        near = self._look()
        if near is not None:
            return near.subject is not None
        record = self._read()
        return self._token is not None or (record is not None and record.owner != "")

    @property
    def sid(self) -> str | None:
        """The public handle of this session, or None when there is none. It survives rotation of the id."""
        record = self._read()
        if self._token is not None:
            return self._token.sid
        return None if record is None else self._engine.sid(record.ref)

    @property
    def subject(self) -> str | None:
        """Who is signed in, or None."""
        near = self._look()
        if near is not None:
            return near.subject
        record = self._read()
        if self._token is not None:
            return self._token.subject
        return record.subject if record is not None and record.owner else None

    @property
    def near(self) -> NearSession | None:
        """What this process has kept of the session, if that alone answered: for who keeps what he made of it for as
        long as this very object is what answers."""
        return self._look()

    @property
    def principal(self) -> Principal | None:
        """Who is asking, or None: by the session cookie, or by an access token, never by both."""
        record = self._read()
        if self._token is not None:
            return principal_of(self._token)
        if record is None or not record.owner:
            return None
        return Principal(
            subject=record.subject,
            sid=self._engine.sid(record.ref),
            claims=self.claims,
            scopes=self._authority.scopes,
            acr=self._authority.acr,
            amr=self._authority.amr,
            auth_time=record.auth_us / SECOND_US,
        )

    @property
    def claims(self) -> Mapping[str, Json]:
        """Facts fixed at sign-in; a copy. Changed only by `rotate(claims=...)`."""
        self._read()
        if self._token is not None:
            return dict(self._token.claims)
        try:
            return decode_claims(self._authority.claims)
        except ValueError:
            # Claims that cannot be read back prove nothing.
            return {}

    @property
    def scopes(self) -> tuple[str, ...]:
        """What the sign-in may be used for."""
        self._read()
        return self._authority.scopes if self._token is None else self._token.scopes

    @property
    def acr(self) -> str | None:
        """Authentication context class of the sign-in (OpenID Connect Core s2)."""
        self._read()
        return self._authority.acr if self._token is None else self._token.acr

    @property
    def amr(self) -> tuple[str, ...]:
        """Methods of the sign-in (RFC 8176)."""
        self._read()
        return self._authority.amr if self._token is None else self._token.amr

    @property
    def auth_time(self) -> float | None:
        """When the subject signed in, Unix seconds by the store's clock, or None."""
        record = self._read()
        if self._token is not None:
            return self._token.auth_time
        return record.auth_us / SECOND_US if record is not None and record.auth_us else None

    @property
    def version(self) -> int | None:
        """Raised by every commit; for `commit(expected=...)`. None when there is no session."""
        record = self._read()
        return None if record is None else record.version

    @property
    def created_at(self) -> float | None:
        """When the session began, Unix seconds, or None."""
        record = self._read()
        return None if record is None else record.created_us / SECOND_US

    @property
    def last_seen_at(self) -> float | None:
        """Last activity the store knows of, Unix seconds, or None. Late by up to 1/20 of the idle timeout."""
        return None if self._read() is None else self._seen_us / SECOND_US

    @property
    def expires_at(self) -> float | None:
        """When the session ends if nothing more happens, Unix seconds, or None; of an access token, when that ends."""
        record = self._read()
        if self._token is not None:
            return float(self._token.expires_at)
        return None if record is None else min(record.absolute_us, self._seen_us + record.idle_us) / SECOND_US

    @property
    def through_outage(self) -> bool:
        """Whether the store is away and this is what was known when it was last heard of (`outage="near"`). A session
        that was ended since may still be here: sensitive acts refuse it."""
        self._read()
        return self._through_outage

    @property
    def logout_pending(self) -> bool:
        """Whether a sign-out of this request waits on this node until the store is back: answer 202."""
        return self._logout_pending

    @property
    def wants_proof_of(self) -> str | None:
        """The subject who has to prove himself (`step_up`) before this session goes on; until then nobody is signed
        in, and no field is read or written. None: nothing is asked for."""
        self._read()
        return None if self._held is None else self._held.session.subject

    @property
    def may_be_taken_up(self) -> bool:
        """Whether nobody is signed in and a genuine refresh token came, which `exchange` may turn into a session. Asks
        nobody, and says nothing about whose it is or whether it still counts."""
        record = self._read()
        if record is not None or self._held is not None or self._refused_until is not None or self._end is not None:
            return False
        engine, value = self._engine, self._refresh_cookie
        return value is not None and engine.knows_keys and parse_refresh_token(engine.keys, value) is not None

    @property
    def ended(self) -> SessionEnd | None:
        """Why the session this request came with is over, or None."""
        self._read()
        return self._end

    def require_login(self) -> Principal:
        """The principal. Raises: StepUpRequired where the same person has to prove himself once more, PlaceRefused
        where the session is refused from this place, TokenInvalid for an access token that is not accepted,
        SessionEnded with the reason while it is known, else LoginRequired."""
        principal = self.principal
        if principal is not None:
            return principal
        self._check_place()
        if self._token_refused is not None:
            raise self._token_refused
        if self._end is not None:
            raise SessionEnded(self._end.reason, self._end.at, self._end.network)
        raise LoginRequired(bearer=self._engine.tokens is not None)

    def _check_place(self) -> None:
        if self._held is not None:
            raise StepUpRequired("the session is used from another place, or was")
        if self._refused_until is not None:
            raise PlaceRefused(self._refused_until)

    # -- the mapping -----------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Json:
        self._read()
        if name in self._values:
            return self._values[name]
        if name in self._deleted or name not in self._stored:
            raise KeyError(name)
        try:
            value = decode_value(self._stored[name])
        except ValueError as broken:
            raise KeyError(name) from broken
        self._values[name] = value
        return value

    def __setitem__(self, name: str, value: Storable) -> None:
        self._read()
        self._write_field()
        encode_value(value)
        self._values[check_name(name)] = cast(Json, value)
        self._deleted.discard(name)

    def __delitem__(self, name: str) -> None:
        self._read()
        self._write()
        if name not in self:
            raise KeyError(name)
        self._values.pop(name, None)
        if name in self._stored:
            self._deleted.add(name)

    def __iter__(self) -> Iterator[str]:
        self._read()
        # Text in the store that cannot be read back counts as absent, here as everywhere.
        yield from [name for name in self._stored if name in self]
        yield from [name for name in self._values if name not in self._stored]

    def __len__(self) -> int:
        self._read()
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        self._read()
        if not isinstance(name, str):
            return False
        try:
            self[name]
        except KeyError:
            return False
        return True

    def __repr__(self) -> str:
        if not self._loaded:
            return f"<{type(self).__name__} not loaded>"
        return f"<{type(self).__name__} {self.sid or 'none'}>"

    # -- what the web layer asks -----------------------------------------------------------------------------------

    @property
    def accessed(self) -> bool:
        """Whether anybody looked at the session on this request."""
        return self._accessed

    @property
    def modified(self) -> bool:
        """Whether fields wait to be written, nested changes included."""
        return self._loaded and bool(self._changed() or self._deleted)

    @property
    def is_quiet(self) -> bool:
        """Whether the response may go out as it is: nothing to write, no cookie to send, no failure to tell."""
        return (
            self._cookie is None
            and self._refresh_action is None
            and self._store_failure is None
            and not self._login_begun
            and not self._deleted
            and (not self._values or not self._may_have_changed())
        )

    @property
    def cookie_action(self) -> CookieAction | None:
        """What the response has to do about the cookie."""
        return self._cookie

    @property
    def refresh_action(self) -> RefreshAction | None:
        """What the response has to do about the refresh cookie."""
        return self._refresh_action

    @property
    def store_failure(self) -> StoreUnavailable | None:
        """The failure that kept this session from being read, if there was one."""
        return self._store_failure

    @property
    def persistent(self) -> bool:
        """Whether the cookie outlives the browser."""
        if self._near is not None:
            self._open()
        return self._authority.persistent

    def withhold_cookies(self) -> None:
        """Send no cookie with this response: the client is no browser, or what it was given is void already."""
        self._cookie = self._refresh_action = None

    def close(self) -> None:
        """The response has begun: nothing can be written any more."""
        self._closed = True

    @property
    def unfinished_login(self) -> bool:
        """Whether a `login()` was called whose result nobody waited for."""
        return self._login_begun

    def vouched_until(self) -> float | None:
        """Until when (`System.elapsed`) a connection that lasts may go on with what was known here, at most a lease
        from now; None: ask `still_lives` first. Infinite where nobody is signed in. Asks nobody.

        For after the response has begun: nobody signs in on it any more.
        """
        system = self._engine.system
        if not self._loaded:
            if self._presented is None and self._bearer is None:
                return FOR_EVER
            # Nobody has looked who it is; who looks later asks then.
            return system.elapsed() + self._engine.settings.lease.total_seconds()
        if self._token is None:
            if (self._record is None or not self._record.owner) and (self._near is None or self._near.subject is None):
                return FOR_EVER
            near = self._engine.peek(self._credential())
            if near is not None and self._is_where_last(near):
                self._had_copy = True
                return min(near.line.until, system.elapsed() + self._engine.settings.lease.total_seconds())
            if self._had_copy:
                # Thrown away: something was told about the session. Once, or every look would ask where none is kept.
                self._had_copy = False
                self._vouched_until = NEVER
        return self._vouched_until if system.elapsed() < self._vouched_until else None

    @property
    def allowance(self) -> Allowance:
        """What is left of the time this request may spend on the store."""
        if self._allowance is None:
            self._allowance = Allowance(self._engine.settings.store_deadline.total_seconds())
        return self._allowance

    # -- inside ----------------------------------------------------------------------------------------------------

    def _read(self) -> StoredSession | None:
        self._accessed = True
        if not self._loaded:
            self._load_now()
        if self._near is not None:
            self._open()
        return self._record

    def _look(self) -> NearSession | None:
        """Look at the session; a copy of it that tells who is asking, if it came from one and was not opened yet."""
        self._accessed = True
        if not self._loaded:
            self._load_now()
        return self._near

    def _peek(self) -> bool:
        """Load from the near copy, if this process may believe it now. Asks nobody."""
        if self._loaded:
            return True
        if self._presented is None or self._bearer is not None:
            return False
        engine = self._engine
        near = engine.peek(self._presented)
        if near is None:
            return False
        if not self._is_where_last(near):
            # Perhaps another place than the last one: by the whole record, which is here.
            return False
        self._near, self._store_failure, self._loaded = near, None, True
        return True

    def _is_where_last(self, near: NearSession) -> bool:
        """Whether this request comes from where the last one did that was let in, if places count."""
        if self._engine.binding is None or near.subject is None:
            return True
        mark = self._where().mark
        return near.place == mark or not mark

    def _open(self) -> None:
        """Unpack what was peeked: most requests need no more than its subject."""
        near, self._near = self._near, None
        if near is not None and self._presented is not None:
            self._adopt(self._engine.reopen(near, self._presented))

    def _load_now(self) -> None:
        if self._store_failure is not None:
            raise self._store_failure
        raise SessionNotLoaded

    def _write(self) -> None:
        if self._closed:
            raise SessionClosed("the response has begun; write before it, or call commit() earlier")

    def _write_field(self) -> None:
        self._write()
        if self._bearer is not None:
            raise ValueRefused("fields belong to the session cookie; this request came with an access token")

    def _changed(self) -> dict[str, str]:
        changed: dict[str, str] = {}
        for name, value in self._values.items():
            text = encode_value(value)
            if self._stored.get(name) != text:
                changed[name] = text
        return changed

    def _may_have_changed(self) -> bool:
        try:
            return bool(self._changed())
        except CoatcheckError:
            # A value that cannot be kept: told where fields are written, not to whoever sends the response.
            return True

    def _view(self) -> dict[str, str]:
        view = {name: text for name, text in self._stored.items() if name not in self._deleted}
        view.update(self._changed())
        return view

    @_in_time
    async def _load(self) -> None:
        self._accessed = True
        if self._peek():
            if self._near is not None:
                self._open()
            return
        if self._bearer is not None:
            await self._load_bearer(self._bearer)
            return
        if self._presented is None:
            self._loaded = True
            return
        asked = self._engine.system.elapsed()
        try:
            found = await self._engine.resume(self._presented, outage=self._outage, place=self._where)
        except StoreUnavailable as lost:
            self._store_failure = lost
            raise
        self._store_failure = None
        if self.is_loaded:
            # Another task of this request signed in or out meanwhile; what was read before that is history.
            return
        if isinstance(found, Resumed) and found.wants_proof:
            self._may_create = False
            self._held = found
        elif isinstance(found, Resumed):
            self._adopt(found)
            self._vouch(asked)
            if found.id.text.encode("ascii") != self._presented:
                self._cookie = SendCookie(found.id, found.authority.persistent)
        else:
            self._may_create = found.why == "unknown"
            self._unavailable = found.why == "unavailable"
            self._replaced = found.lives_as
            if found.why == "ended":
                self._end = _end_of(found.reason, found.at_us)
            elif found.why == "elsewhere":
                self._refused_until = found.at_us / SECOND_US
        self._loaded = True

    async def _load_bearer(self, token: bytes) -> None:
        self._may_create = False
        asked = self._engine.system.elapsed()
        try:
            self._token = await self._engine.verify(token)
            self._vouch(asked)
        except TokenInvalid as refused:
            log.info("coatcheck: %s", refused.detail)
            self._token_refused = refused
        except StoreUnavailable as lost:
            self._store_failure = lost
            raise
        self._store_failure = None
        self._loaded = True

    def _adopt(self, found: Resumed) -> None:
        self._id = found.id
        self._through_outage = found.through_outage
        self._record = found.session
        self._authority = found.authority
        self._seen_us = found.seen_us
        self._stored = {name: text for name, text in found.session.fields.items() if not name.startswith(RESERVED)}

    def _forget(self) -> None:
        self._token = self._token_refused = self._bearer = self._near = self._held = self._refused_until = None
        self._id = None
        self._record = None
        self._authority = Authority()
        self._stored = {}
        self._values = {}
        self._deleted = set()

    @_in_time
    async def _commit(self, expected: int | None = None) -> None:
        if not self._loaded:
            return
        put = self._changed()
        if not put and not self._deleted:
            return
        self._write()
        if self._record is None:
            await self._create(put)
            return
        deleted = frozenset(self._deleted)
        done = await self._engine.commit(self._record.ref, Changes(put=put, delete=deleted), expected)
        # What another task of this request wrote while this one waited is not in the store yet, and stays pending.
        self._stored = {name: text for name, text in self._stored.items() if name not in deleted} | put
        self._deleted -= deleted
        self._note_version(done.version)

    def _note_version(self, version: int) -> None:
        # Another task of this request may have signed out meanwhile: then there is nothing to note.
        if self._record is not None:
            self._record = replace(self._record, version=version)

    async def _create(self, fields: dict[str, str]) -> None:
        if self._unavailable:
            raise StoreUnavailable("fields cannot be kept: this request goes on without a session, the store is away")
        if not self._may_create:
            raise SessionGone("replaced" if self._end is None else self._end.reason)
        id_, created = await self._engine.create_anonymous(fields, self._where())
        self._id, self._record, self._seen_us = id_, created.session, created.now_us
        self._stored = dict(fields)
        self._cookie = SendCookie(id_, persistent=False)

    @_in_time
    async def _login(self, wanted: SignIn, keep: tuple[str, ...], admission: Admission) -> None:
        self._login_begun = False
        await self._load()
        self._write()
        if self._unavailable:
            # What this browser has already could not be looked at, and nobody may be signed in twice in one browser.
            raise StoreUnavailable("nobody can sign in while the store is away")
        view = self._view()
        kept = {name: view[name] for name in keep if name in view}
        record = self._record if self._held is None else self._held.session
        old = None if record is None else OldSession(ref=record.ref, owner=record.owner)
        engine = self._engine
        settings = engine.settings
        limit = settings.admission if admission.limit is None else settings.admission_under(admission.limit)
        await engine.ready()
        outcome = await engine.login(
            replace(wanted, fields=kept),
            self._where(),
            old,
            limit=limit,
            replaces=None if admission.replaces is None else parse_sid(engine.keys, admission.replaces),
            choice=admission.choice(engine.keys),
        )
        if isinstance(outcome, SignInRefused):
            raise SessionLimitReached(outcome.sids, ask=limit.on_reached == "ask")
        signed_in, authority = outcome
        try:
            await self._end_others(REASON_SUPERSEDED)
        except BaseException:
            # Nobody may be signed in twice in one browser: the new session goes rather than an old one stays.
            await self._engine.revoke_unsent(signed_in.session.ref)
            raise
        self._forget()
        self._id, self._record, self._authority = signed_in.id, signed_in.session, authority
        self._seen_us = signed_in.now_us
        self._stored = kept
        self._end = None
        self._cookie = SendCookie(signed_in.id, wanted.persistent)
        self._signed_in_here = True

    @_in_time
    async def _logout(self, reason: str, refresh_token: str | None) -> None:
        check_reason(reason)
        self._write()
        # Somebody asked to be signed out: this browser's cookie goes whatever the store says.
        self._cookie = ClearCookie()
        if self._engine.tokens is not None or self._refresh_cookie is not None or self._refresh_aside:
            self._refresh_action = ClearRefresh()
        try:
            await self._end_all(reason, refresh_token)
        except StoreUnavailable as lost:
            if not await self._sign_out_later(reason, refresh_token, away=not isinstance(lost, Unconfirmed)):
                raise
            self._logout_pending = self._loaded = True
            self._store_failure = None
            self._end = SessionEnd(reason, self._engine.system.now_us() / SECOND_US)
        self._cookie = ClearCookie()
        self._forget()
        self._may_create = True
        self._signed_in_here = self._unavailable = False

    async def _end_all(self, reason: str, refresh_token: str | None) -> None:
        """End what this browser carries, whatever kind of credential it is. Raises: StoreUnavailable."""
        await self._load()
        if self._unavailable or (self._end is not None and self._engine.has_promised(self._presented)):
            # The second time is like the first: it does not hold everywhere yet.
            raise StoreUnavailable("the store is away")
        token = self._token if self._bearer is None or self._token is not None else self._past_token(self._bearer)
        if token is not None and token.sid is not None:
            await self._engine.revoke_sid(token.sid, reason)
        elif self._record is not None:
            await self._engine.revoke(self._record.ref, reason)
            self._end = SessionEnd(reason, self._engine.system.now_us() / SECOND_US)
        elif self._held is not None:
            await self._engine.revoke(self._held.session.ref, reason)
        elif self._replaced is not None:
            # A genuine id whose session lives on under another one: whoever held it wants it ended.
            await self._engine.revoke(self._replaced, reason)
        await self._end_others(reason)
        if refresh_token is not None:
            await self._end_refresh(refresh_token.encode("utf-8", "replace"), reason)

    async def _sign_out_later(self, reason: str, refresh_token: str | None, *, away: bool) -> bool:
        """Keep this sign-out on the node until the store is back. False where there is no journal, or where nobody can
        tell yet which credentials are genuine: the keys of ids are in the store. Raises: StoreUnavailable."""
        engine = self._engine
        if not engine.knows_keys:
            return False
        keys = engine.keys
        held = [value for value in (self._presented, *self._aside) if value is not None]
        ids = [parse_session_id(keys, value) for value in held]
        refs = {id_.ref for id_ in ids if id_ is not None} | ({self._id.ref} if self._id is not None else set())
        tokens = [value for value in (self._refresh_cookie, *self._refresh_aside) if value is not None]
        if refresh_token is not None:
            tokens.append(refresh_token.encode("utf-8", "replace"))
        for value in tokens:
            presented = parse_refresh_token(keys, value)
            if presented is not None and presented.family.session is not None:
                refs.add(presented.family.session)
        token = None if self._bearer is None else self._past_token(self._bearer)
        if token is not None and token.sid is not None:
            of_token = parse_sid(keys, token.sid)
            refs |= set() if of_token is None else {of_token}
        return await engine.sign_out_later(refs, reason, away=away)

    def _past_token(self, token: bytes) -> AccessToken | None:
        # Somebody who signs out with an access token that has just expired means its session all the same.
        try:
            return self._engine.issuer.inspect(token)
        except TokenInvalid:
            return None

    async def _end_others(self, reason: str) -> None:
        """End what this browser has besides the credential that counts: its session is over, too."""
        for value in self._aside:
            found = await self._engine.resume(value, outage="refuse")
            if isinstance(found, Resumed):
                await self._engine.revoke(found.session.ref, reason)
        held = () if self._refresh_cookie is None else (self._refresh_cookie,)
        for value in (*held, *self._refresh_aside):
            await self._end_refresh(value, reason)

    async def _end_refresh(self, value: bytes, reason: str) -> None:
        presented = parse_refresh_token(await self._engine.ready(), value)
        if presented is None or (self._record is not None and presented.family.session == self._record.ref):
            return
        # After a restart a browser may have nothing but this. Exchanging it proves that it is genuine.
        try:
            _, held = await self._engine.spend(value)
        except (RefreshInvalid, SessionEnded):
            return
        await self._engine.revoke(held.session.ref, reason)

    @_in_time
    async def _tokens(self, audience: str | None, carrier: Carrier) -> IssuedTokens:
        self._write()
        await self._load()
        if self._bearer is not None:
            raise Forbidden("tokens are made from a session, not from an access token: call login(), or refresh()")
        self._check_place()
        if self._record is None or not self._record.owner:
            raise LoginRequired
        issued = await self._engine.issue(self._record, self._authority, audience)
        return self._hand_out(issued, carrier)

    @_in_time
    async def _refresh(self, token: str | None, audience: str | None) -> IssuedTokens:
        self._accessed = True
        self._write()
        carrier: Carrier = "cookie" if token is None else "body"
        value = self._refresh_cookie if token is None else token.encode("utf-8", "replace")
        if value is None:
            raise RefreshInvalid("no refresh cookie came")
        done = await self._engine.refresh(value, audience)
        try:
            await self._engine.judge_refresh(done, self._where)
        except (StepUpRequired, PlaceRefused, StoreUnavailable):
            # The token it came with is consumed. Its successor alone is good for nothing but to be refused here, and
            # without it the browser would be taken for a thief when it asks the next time.
            if carrier == "cookie":
                self._hand_out(done, carrier)
            raise
        return self._hand_out(done, carrier)

    @_in_time
    async def _exchange(self, token: str | None, audience: str | None, carrier: Carrier) -> IssuedTokens | None:
        self._write()
        tokens_on = self._engine.tokens is not None
        if tokens_on and token is not None:
            return await self._refresh(token, audience)
        await self._load()
        if self.subject is None:
            await self._take_up(self._refresh_cookie if token is None else token.encode("utf-8", "replace"))
        return await self._tokens(audience, carrier) if tokens_on else None

    async def _take_up(self, value: bytes | None) -> None:
        if value is None or self._held is not None or self._refused_until is not None:
            # A session that is asked for a proof, or refused from here, is not got around by its other credential.
            self.require_login()
            return
        found = await self._engine.take_up(value, self._where)
        self._forget()
        self._adopt(found)
        self._end, self._unavailable, self._may_create = None, False, True
        self._cookie = SendCookie(found.id, found.authority.persistent)
        if value is self._refresh_cookie and self._engine.tokens is None:
            # Spent; and it would only be asked for once more when the session cookie is gone.
            self._refresh_action = ClearRefresh()

    def _hand_out(self, issued: Exchanged, carrier: Carrier) -> IssuedTokens:
        tokens = issued.tokens
        if carrier == "body" or tokens.refresh_token is None:
            return tokens
        # The one the browser has is not sent again: a slow answer would overwrite a newer cookie.
        if issued.is_new:
            # Not longer than the session can live: a cookie that outlives what it stands for helps nobody.
            left = issued.session.absolute_us // SECOND_US - tokens.issued_at
            self._refresh_action = SendRefresh(tokens.refresh_token, timedelta(seconds=max(0, left)))
        return replace(tokens, refresh_token=None)

    @_in_time
    async def _rotate(self, claims: Mapping[str, object] | None) -> None:
        await self._load()
        self._write()
        self._check_place()
        if self._id is None or self._record is None:
            raise LoginRequired
        authority = None
        if claims is not None:
            if not self._record.owner:
                raise LoginRequired("only a signed-in session has claims")
            authority = replace(self._authority, claims=check_claims(claims))
        done = await self._engine.rotate(self._id, self._record.subject, authority)
        self._id = done.id
        if authority is not None:
            self._authority = authority
        if done.version:
            self._record = replace(self._record, version=done.version)
        self._cookie = SendCookie(done.id, self._authority.persistent)

    @_in_time
    async def _step_up(self, amr: Sequence[str], acr: str | None) -> None:
        await self._load()
        self._write()
        if self._refused_until is not None:
            raise PlaceRefused(self._refused_until)
        if self._held is not None:
            id_ = self._held.id
        elif self._id is None or self._record is None or not self._record.owner:
            raise LoginRequired
        else:
            id_ = self._id
        found = await self._engine.step_up(id_, self._where(), amr=check_amr(amr), acr=acr)
        # The old id is dead, whatever comes after.
        self._cookie = SendCookie(found.id, found.authority.persistent)
        if found.wants_proof:
            self._forget()
            self._held, self._may_create = found, False
            raise StoreUnavailable("that this place was proven could not be written; it is asked once more")
        self._adopt(found)
        self._held, self._may_create = None, True

    @_in_time
    async def _recheck(self) -> None:
        self._accessed = True
        if not self._loaded or self._near is not None:
            await self._load()
        if self._bearer is not None and self._token is not None:
            try:
                self._token = await self._engine.verify(self._bearer)
            except TokenInvalid as refused:
                raise SessionGone(cause_of(refused.cause)[0]) from refused
            return
        if self._unavailable:
            raise StoreUnavailable("whether the session lives cannot be told while the store is away")
        if self._id is None:
            raise SessionGone("absent" if self._end is None else self._end.reason)
        # As the store has it now: who asks this cannot wait for a lease.
        found = await self._engine.resume(self._id.text.encode("ascii"), consistent=True, place=self._where)
        if not isinstance(found, Resumed):
            if found.why == "elsewhere":
                raise PlaceRefused(found.at_us / SECOND_US)
            raise SessionGone(cause_of(found.reason)[0] or found.why)
        if found.wants_proof:
            raise StepUpRequired("the session is used from another place, or was, since this request began")

    @_in_time
    async def still_lives(self) -> bool:
        """Whether whoever signed in is still signed in, for a connection that lasts: as a new request with the same
        credential would find it. After True it is vouched for until a lease after the question; after False `ended`
        tells why. Of an access token it asks the store; else nothing is asked while a near copy may be believed.

        Where the outage policy goes on with what was known it is True for as long. Raises: StoreUnavailable.
        """
        asked = self._engine.system.elapsed()
        if self._token is not None and self._bearer is not None:
            try:
                await self._engine.verify(self._bearer)
            except TokenInvalid as refused:
                log.info("coatcheck: %s", refused.detail)
                self._end = _end_of(refused.cause, self._engine.system.now_us())
                return False
        else:
            if self._near is not None:
                self._open()
            if self._record is None:
                return True
            found = await self._engine.resume(self._credential(), outage=self._outage, place=self._where)
            if isinstance(found, Resumed) and found.wants_proof:
                self._end = SessionEnd("step_up_required", self._engine.system.now_us() / SECOND_US)
                return False
            if not isinstance(found, Resumed):
                if found.why == "unavailable":
                    raise StoreUnavailable("the store is away, and nobody is signed in while it is")
                if found.why == "elsewhere":
                    self._end = SessionEnd("place_refused", self._engine.system.now_us() / SECOND_US)
                    return False
                self._end = _end_of(found.reason or found.why, found.at_us or self._engine.system.now_us())
                return False
            # Another request may have rotated the id: an alias is followed while it lasts.
            self._id = found.id
            self._through_outage = found.through_outage
        self._vouch(asked)
        return True

    def _vouch(self, asked: float) -> None:
        # From the question, not from the answer: that may have been on its way while the session ended.
        until = asked + self._engine.settings.lease.total_seconds()
        if self._record is not None:
            # The answer may itself have come from a copy, through an outage too: no longer than what that rests on.
            until = min(until, self._engine.vouches_until(self._record.ref))
        self._vouched_until = until

    def _credential(self) -> bytes:
        """What a new request of this browser would present."""
        return (self._presented or b"") if self._id is None else self._id.text.encode("ascii")

    async def prefetch(self) -> None:
        """Ask the store ahead of a handler that cannot wait. This is no look: a store that is away is told at the
        first touch, and a handler that never touches the session does not notice."""
        accessed = self._accessed
        try:
            if not self._peek():
                await self._load()
        except StoreUnavailable as lost:
            log.info("coatcheck: a session could not be loaded ahead: %s", lost.detail)
        self._accessed = accessed

    async def finish(self) -> None:
        """Write what waits, just before the response begins. For the web layer and for jobs."""
        await self._commit()

    @_in_time
    async def abandon(self) -> None:
        """The response will never carry the cookie: take a sign-in of this request back, drop the fields."""
        self._closed = True
        if self._signed_in_here and self._record is not None:
            await self._engine.revoke_unsent(self._record.ref)
