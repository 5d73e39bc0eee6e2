"""The JSON API: what each call does. Names, answers and errors are a promise to clients.

Decides who may do what: everything here but sign-in and sign-out needs a session, `/api/admin/` needs the role
`admin`. A public handle that belongs to somebody else answers like one that never existed.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from coatcheck.core.filter import SessionFilter
from coatcheck.core.user_agent import device_name
from coatcheck.errors import (
    Forbidden,
    InvalidCredentials,
    LoginRequired,
    NotFound,
    PasswordUnacceptable,
    PlaceRefused,
    RefreshInvalid,
    RefreshReused,
    RequestRefused,
    SessionEnded,
    SessionGone,
    SessionLimitReached,
    SignInBlocked,
    StepUpRequired,
    Throttled,
    TokenInvalid,
    ValueRefused,
)
from coatcheck.manager import SessionSummary
from coatcheck.server.exchanging import exchange
from coatcheck.server.routes import Answered, ApiRoute, Call, Parameter, Reply, Wire
from coatcheck.server.service import Service
from coatcheck.server.session_limits import open_sessions
from coatcheck.server.sign_in import Welcome, change_password, continue_sign_in, refresh, sign_in
from coatcheck.server.step_up import step_up
from coatcheck.server.texts import say
from coatcheck.session import AsyncSession, Carrier, IssuedTokens, Principal

REASON_BY_USER: Final = "ended_by_user"


class LoginBody(Wire, frozen=True):
    """Name and password. `carrier`: `body` hands the refresh token out in the answer, for clients that are no
    browser. `audience`: the service the access token is for, one of the server's audiences."""

    username: str
    password: str
    carrier: Carrier = "cookie"
    audience: str | None = None


class ContinueBody(Wire, frozen=True):
    """What a 409 `session_limit` gave to go on with, and the sessions of its list that are to be ended."""

    continue_with: str = msgspec.field(name="continue")
    end: list[str]


class RefreshBody(Wire, frozen=True):
    """Nothing, where a cookie carries the refresh token; else the token itself. `audience` as at sign-in."""

    carrier: Carrier = "cookie"
    refresh_token: str | None = None
    audience: str | None = None


class ExchangeBody(Wire, frozen=True):
    """Nothing, where a cookie carries the session or the refresh token. `carrier`: `body` for clients that are no
    browser, which send a refresh token along or get one back. `audience` as at sign-in."""

    carrier: Carrier = "cookie"
    refresh_token: str | None = None
    audience: str | None = None


class StepUpBody(Wire, frozen=True):
    """The password of the account whose session it is."""

    password: str


class LogoutBody(Wire, frozen=True):
    """The refresh token, from a client without a cookie; its session ends."""

    refresh_token: str | None = None


class PasswordBody(Wire, frozen=True):
    """The present password and the new one. `carrier` as at sign-in: with tokens a new password brings new ones."""

    current: str
    new: str
    carrier: Carrier = "cookie"


class FilterBody(Wire, frozen=True):
    """Which sessions are meant; every given member must hold. Times are Unix seconds."""

    subject: str | None = None
    network: str | None = None
    created_before: float | None = None
    seen_before: float | None = None


class RevokeBody(Wire, frozen=True):
    """Exactly one of `sid`, `subject`, `filter` and `all`, and the reason that is kept and shown."""

    reason: str
    sid: str | None = None
    subject: str | None = None
    filter: FilterBody | None = None
    all: bool = False


class UserReply(Reply, frozen=True):
    """The account."""

    id: str
    name: str
    role: str


class SessionReply(Reply, frozen=True):
    """The session of this request; `expires_at` is Unix seconds."""

    sid: str
    expires_at: float


class TokenReply(Reply, frozen=True):
    """An answer that hands out tokens where the profile has them, and has none of these members elsewhere."""

    access_token: str | msgspec.UnsetType = msgspec.UNSET
    token_type: str | msgspec.UnsetType = msgspec.UNSET
    expires_in: int | msgspec.UnsetType = msgspec.UNSET
    refresh_token: str | msgspec.UnsetType = msgspec.UNSET


class LoginReply(TokenReply, frozen=True, kw_only=True):
    """Signed in."""

    message: str
    user: UserReply
    session: SessionReply


class StepUpReply(TokenReply, frozen=True, kw_only=True):
    """Proven: the session goes on, under a new cookie; refresh tokens from before are dead."""

    message: str
    session: SessionReply


class RefreshReply(Reply, frozen=True):
    """A new access token. `refresh_token` is there for clients without a cookie, when there is a new one."""

    access_token: str
    token_type: str
    expires_in: int
    refresh_token: str | msgspec.UnsetType = msgspec.UNSET


class ExchangeReply(TokenReply, frozen=True, kw_only=True):
    """The public handle of the session that goes on, which is the same, and tokens where the profile has them."""

    sid: str


class MeReply(Reply, frozen=True):
    """Who is signed in."""

    user: UserReply
    session: SessionReply


class MessageReply(Reply, frozen=True):
    """Done; or `code` says what is still to come."""

    message: str
    code: str | msgspec.UnsetType = msgspec.UNSET


class SessionItem(Reply, frozen=True):
    """One session as lists show it. Times are Unix seconds; never an id or a token."""

    sid: str
    created_at: float
    last_seen_at: float
    expires_at: float
    network: str | None
    device: str
    current: bool


class SessionsReply(Reply, frozen=True):
    """One's own sessions."""

    sessions: list[SessionItem]


class AdminSessionItem(Reply, frozen=True):
    """One session as administrators see it."""

    sid: str
    subject: str | None
    created_at: float
    last_seen_at: float
    expires_at: float
    network: str | None
    device: str


class AdminSessionsReply(Reply, frozen=True):
    """A page; pass `cursor` back for more. A page may be empty and still go on."""

    sessions: list[AdminSessionItem]
    cursor: str | None


class EndedReply(Reply, frozen=True):
    """How many sessions this call ended."""

    ended: int


class PasswordReply(TokenReply, frozen=True, kw_only=True):
    """How many other sessions ended, and new tokens where the profile has them."""

    ended: int


class EventItem(Reply, frozen=True):
    """One audit event, version `v` of the envelope; `at` is Unix seconds."""

    v: int
    type: str
    at: float
    sid: str | None
    subject: str | None
    data: dict[str, str | int | float | bool]


class EventsReply(Reply, frozen=True):
    """Audit events, oldest first; pass `after` back for more."""

    events: list[EventItem]
    after: int


async def login(call: Call) -> Answered:
    """Sign in."""
    body: LoginBody = call.body
    _check_carrier(call, body.carrier)
    _check_audience(call, body.audience)
    try:
        welcome = await sign_in(
            call.service,
            call.session,
            call.caller,
            name=body.username,
            password=body.password,
            carrier=body.carrier,
            audience=body.audience,
        )
    finally:
        if body.carrier == "body":
            call.session.withhold_cookies()
    return _welcome(call, welcome)


async def continue_login(call: Call) -> Answered:
    """Go on with a sign-in that met a limit."""
    body: ContinueBody = call.body
    welcome = await continue_sign_in(
        call.service,
        call.session,
        call.caller,
        word=body.continue_with,
        ending=body.end,
        from_browser=call.from_browser,
    )
    if welcome.carrier == "body":
        call.session.withhold_cookies()
    return _welcome(call, welcome)


async def prove_again(call: Call) -> Answered:
    """Prove once more that it is the same person."""
    body: StepUpBody = call.body
    tokens = await step_up(call.service, call.session, call.caller, password=body.password)
    return Answered(
        reply=StepUpReply(
            message=say("api.step_up", call.language), session=_session(call.session), **_token_members(tokens)
        )
    )


async def refresh_tokens(call: Call) -> Answered:
    """Exchange a refresh token."""
    if call.service.coat.settings.tokens is None:
        raise NotFound("this profile hands out no tokens")
    body: RefreshBody = call.body or RefreshBody()
    _check_carrier(call, body.carrier)
    if (body.carrier == "body") != (body.refresh_token is not None):
        raise RequestRefused("refresh_token: belongs to carrier body, and to nothing else")
    tokens = await refresh(call.service, call.session, body.refresh_token, audience=body.audience)
    return Answered(reply=RefreshReply(**_token_members(tokens)))


async def exchange_credential(call: Call) -> Answered:
    """Turn a session cookie into tokens and back."""
    body: ExchangeBody = call.body or ExchangeBody()
    _check_audience(call, body.audience)
    if body.carrier == "body" and call.from_browser:
        raise RequestRefused("carrier: body is for clients that are no browser")
    if body.carrier == "cookie" and body.refresh_token is not None:
        raise RequestRefused("refresh_token: belongs to carrier body, and to nothing else")
    done = await exchange(call.service, call.session, body.refresh_token, audience=body.audience, carrier=body.carrier)
    return Answered(reply=ExchangeReply(sid=done.sid, **_token_members(done.tokens)))


async def me(call: Call) -> Answered:
    """Who is signed in."""
    principal = call.session.require_login()
    return Answered(reply=MeReply(user=_user(principal), session=_session(call.session)))


async def logout(call: Call) -> Answered:
    """Sign out; fine when nobody is signed in."""
    body: LogoutBody | None = call.body
    await call.session.logout(refresh_token=None if body is None else body.refresh_token)
    if call.session.logout_pending:
        reply = MessageReply(message=say("api.logout_pending", call.language), code="logout_pending")
        return Answered(reply=reply, accepted=True)
    return Answered(reply=MessageReply(message=say("api.logout", call.language)))


async def sessions(call: Call) -> Answered:
    """One's own sessions, oldest first."""
    principal = call.session.require_login()
    items = [
        SessionItem(
            sid=each.sid,
            created_at=each.created_at,
            last_seen_at=each.last_seen_at,
            expires_at=each.expires_at,
            network=each.network,
            device=device_name(each.user_agent),
            current=each.sid == principal.sid,
        )
        for each in await own_sessions(call.service, principal)
    ]
    return Answered(reply=SessionsReply(sessions=items))


async def end_session(call: Call) -> Answered:
    """End one of one's own sessions."""
    ended = await end_own_session(call.service, call.session, call.path["sid"])
    return Answered(reply=EndedReply(ended=ended), accepted=call.session.logout_pending)


async def end_sessions(call: Call) -> Answered:
    """End all other sessions, or all."""
    scope = call.query.get("scope")
    principal = call.session.require_login()
    if scope not in ("others", "all"):
        raise RequestRefused("scope: others or all")
    keep = principal.sid if scope == "others" else None
    done = await call.service.coat.revoke_subject(principal.subject, reason=REASON_BY_USER, keep_sid=keep)
    if scope == "all":
        await call.session.logout()
    return Answered(reply=EndedReply(ended=done.ended))


async def password(call: Call) -> Answered:
    """Change one's own password."""
    body: PasswordBody = call.body
    _check_carrier(call, body.carrier)
    try:
        changed = await change_password(
            call.service, call.session, call.caller, current=body.current, new=body.new, carrier=body.carrier
        )
    finally:
        if body.carrier == "body":
            call.session.withhold_cookies()
    return Answered(reply=PasswordReply(ended=changed.ended, **_token_members(changed.tokens)))


async def admin_sessions(call: Call) -> Answered:
    """Sessions of everybody."""
    require_admin(call.session)
    before = call.query.get("before")
    filter_ = SessionFilter(
        subject=call.query.get("subject") or None,
        network=call.query.get("network") or None,
        created_before=None if before is None else _number("before", before),
    )
    limit = _whole("limit", call.query.get("limit", "100"))
    page = await call.service.coat.find_sessions(filter_, after=call.query.get("cursor") or None, limit=limit)
    items = [
        AdminSessionItem(
            sid=each.sid,
            subject=each.subject,
            created_at=each.created_at,
            last_seen_at=each.last_seen_at,
            expires_at=each.expires_at,
            network=each.network,
            device=device_name(each.user_agent),
        )
        for each in page.items
    ]
    return Answered(reply=AdminSessionsReply(sessions=items, cursor=page.cursor))


async def admin_revoke(call: Call) -> Answered:
    """End sessions of anybody."""
    require_admin(call.session)
    body: RevokeBody = call.body
    chosen = [body.sid is not None, body.subject is not None, body.filter is not None, body.all]
    if chosen.count(True) != 1:
        raise RequestRefused("give exactly one of sid, subject, filter and all")
    coat = call.service.coat
    if body.sid is not None:
        done = await coat.revoke_session(body.sid, reason=body.reason)
    elif body.subject is not None:
        done = await coat.revoke_subject(body.subject, reason=body.reason)
    elif body.filter is not None:
        meant = body.filter
        if meant == FilterBody():
            raise RequestRefused("filter: at least one condition; everybody is `all`")
        filter_ = SessionFilter(
            subject=meant.subject,
            network=meant.network,
            created_before=meant.created_before,
            seen_before=meant.seen_before,
        )
        done = await coat.revoke_where(filter_, reason=body.reason)
    else:
        done = await coat.revoke_where(SessionFilter(), reason=body.reason)
    return Answered(reply=EndedReply(ended=done.ended))


async def admin_events(call: Call) -> Answered:
    """The audit log."""
    require_admin(call.session)
    after = _whole("after", call.query.get("after", "0"))
    entries = await call.service.audit.read(after=after, limit=100)
    return Answered(
        reply=EventsReply(
            events=[msgspec.convert(entry.envelope, EventItem) for entry in entries],
            after=entries[-1].position if entries else after,
        )
    )


async def own_sessions(service: Service, principal: Principal) -> list[SessionSummary]:
    """Every session of the caller, oldest first."""
    return await open_sessions(service, principal.subject)


async def end_own_session(service: Service, session: AsyncSession, sid: str) -> int:
    """End one session if it is the caller's own; its subject never changes, so looking first is no race.

    Raises: LoginRequired, NotFound.
    """
    principal = session.require_login()
    if sid == principal.sid:
        await session.logout(reason=REASON_BY_USER)
        return 1
    if sid not in {each.sid for each in await own_sessions(service, principal)}:
        raise NotFound("no such session of this user")
    done = await service.coat.revoke_session(sid, reason=REASON_BY_USER)
    return done.ended


def require_admin(session: AsyncSession) -> Principal:
    """The principal, if it may administer. Raises: LoginRequired, Forbidden."""
    principal = session.require_login()
    if principal.claims.get("role") != "admin":
        raise Forbidden("needs the role admin")
    return principal


def _welcome(call: Call, welcome: Welcome) -> Answered:
    reply = LoginReply(
        message=say("api.login", call.language),
        user=UserReply(id=welcome.user.id, name=welcome.user.name, role=welcome.user.role),
        session=_session(call.session),
        **_token_members(welcome.tokens),
    )
    return Answered(reply=reply, cookies=() if welcome.carrier == "body" else (welcome.device_cookie,))


def _token_members(tokens: IssuedTokens | None) -> dict[str, Any]:
    if tokens is None:
        return {}
    return {
        "access_token": tokens.access_token,
        "token_type": tokens.token_type,
        "expires_in": tokens.expires_in,
        "refresh_token": tokens.refresh_token or msgspec.UNSET,
    }


def _check_carrier(call: Call, carrier: Carrier) -> None:
    if carrier != "body":
        return
    if call.service.coat.settings.tokens is None:
        raise RequestRefused("carrier: this profile hands out no tokens")
    if call.from_browser:
        # In a page any script could read it; that is what the cookie is for.
        raise RequestRefused("carrier: body is for clients that are no browser")


def _check_audience(call: Call, audience: str | None) -> None:
    # Before anybody is signed in, not when the token is made.
    if audience is None:
        return
    if call.service.coat.settings.tokens is None:
        raise RequestRefused("audience: this profile hands out no tokens")
    call.service.coat.engine.issuer.check_audience(audience)


def _user(principal: Principal) -> UserReply:
    return UserReply(
        id=principal.subject,
        name=str(principal.claims.get("name", "")),
        role=str(principal.claims.get("role", "")),
    )


def _session(session: AsyncSession) -> SessionReply:
    return SessionReply(sid=session.sid or "", expires_at=session.expires_at or 0.0)


def _number(name: str, text: str) -> float:
    try:
        value = float(text) if len(text) <= 32 else float("nan")
    except ValueError:
        value = float("nan")
    if not 0 <= value < 2**53:
        raise RequestRefused(f"{name}: not a number in range")
    return value


def _whole(name: str, text: str) -> int:
    value = _number(name, text)
    if not value.is_integer():
        raise RequestRefused(f"{name}: not a whole number")
    return int(value)


_SIGNED_IN: Final = (LoginRequired, SessionEnded, TokenInvalid, StepUpRequired, PlaceRefused)
_ADMIN: Final = (*_SIGNED_IN, Forbidden)

ROUTES: Final = (
    ApiRoute(
        method="POST",
        path="/api/login",
        handler=login,
        summary="Sign in with name and password",
        body=LoginBody,
        reply=LoginReply,
        errors=(InvalidCredentials, Throttled, SignInBlocked, SessionLimitReached, ValueRefused),
        signed_in=False,
    ),
    ApiRoute(
        method="POST",
        path="/api/login/continue",
        handler=continue_login,
        summary="Go on after session_limit: end exactly these sessions and sign in",
        body=ContinueBody,
        reply=LoginReply,
        errors=(InvalidCredentials, LoginRequired, SessionLimitReached),
        signed_in=False,
    ),
    ApiRoute(
        method="POST",
        path="/api/step-up",
        handler=prove_again,
        summary="Prove by the password that it is the same person; the session goes on under a new cookie",
        body=StepUpBody,
        reply=StepUpReply,
        errors=(
            LoginRequired,
            SessionEnded,
            TokenInvalid,
            PlaceRefused,
            Forbidden,
            InvalidCredentials,
            SessionGone,
            Throttled,
        ),
    ),
    ApiRoute(
        method="POST",
        path="/api/refresh",
        handler=refresh_tokens,
        summary="A new access token for the refresh token",
        body=RefreshBody,
        body_required=False,
        reply=RefreshReply,
        errors=(NotFound, RefreshInvalid, RefreshReused, SessionEnded, ValueRefused),
        signed_in=False,
        loads=False,
    ),
    ApiRoute(
        method="POST",
        path="/api/exchange",
        handler=exchange_credential,
        summary="Turn a session cookie into tokens and back, once the profile has changed",
        body=ExchangeBody,
        body_required=False,
        reply=ExchangeReply,
        errors=(*_SIGNED_IN, RefreshInvalid, RefreshReused, SessionGone, Forbidden, ValueRefused),
        signed_in=False,
    ),
    ApiRoute(method="GET", path="/api/me", handler=me, summary="Who is signed in", reply=MeReply, errors=_SIGNED_IN),
    ApiRoute(
        method="POST",
        path="/api/logout",
        handler=logout,
        summary="Sign out",
        body=LogoutBody,
        body_required=False,
        reply=MessageReply,
        may_accept=True,
        signed_in=False,
        loads=False,
    ),
    ApiRoute(
        method="GET",
        path="/api/sessions",
        handler=sessions,
        summary="Own sessions",
        reply=SessionsReply,
        errors=_SIGNED_IN,
    ),
    ApiRoute(
        method="DELETE",
        path="/api/sessions/{sid}",
        handler=end_session,
        summary="End one of one's own sessions",
        reply=EndedReply,
        may_accept=True,
        errors=(*_SIGNED_IN, NotFound),
    ),
    ApiRoute(
        method="DELETE",
        path="/api/sessions",
        handler=end_sessions,
        summary="End all other sessions, or all",
        reply=EndedReply,
        query={"scope": Parameter(text="which", schema={"enum": ["others", "all"]}, required=True)},
        errors=(*_SIGNED_IN, RequestRefused),
    ),
    ApiRoute(
        method="POST",
        path="/api/password",
        handler=password,
        summary="Change one's own password; ends the other sessions",
        body=PasswordBody,
        reply=PasswordReply,
        errors=(*_SIGNED_IN, InvalidCredentials, PasswordUnacceptable, SessionGone, Throttled),
    ),
    ApiRoute(
        method="GET",
        path="/api/admin/sessions",
        handler=admin_sessions,
        summary="Sessions of everybody, for administrators",
        reply=AdminSessionsReply,
        query={
            "subject": Parameter(text="id of an account", schema={"type": "string"}),
            "network": Parameter(text="address or network, as 203.0.113.0/24", schema={"type": "string"}),
            "before": Parameter(text="created before, Unix seconds", schema={"type": "number", "minimum": 0}),
            "cursor": Parameter(text="from the page before", schema={"type": "string"}),
            "limit": Parameter(text="how many at most", schema={"type": "integer", "minimum": 1, "maximum": 1000}),
        },
        errors=(*_ADMIN, RequestRefused, ValueRefused),
    ),
    ApiRoute(
        method="POST",
        path="/api/admin/revoke",
        handler=admin_revoke,
        summary="End sessions of anybody, for administrators",
        body=RevokeBody,
        reply=EndedReply,
        errors=(*_ADMIN, ValueRefused),
    ),
    ApiRoute(
        method="GET",
        path="/api/admin/events",
        handler=admin_events,
        summary="Audit events, for administrators",
        reply=EventsReply,
        query={"after": Parameter(text="position of the last event seen", schema={"type": "integer", "minimum": 0})},
        errors=(*_ADMIN, RequestRefused),
    ),
)
