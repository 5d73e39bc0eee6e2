"""What can go wrong, as one tree: `CoatcheckError` > family > cause.

Decides the stable `code`, the HTTP status and the client's text of every failure. The text gives nothing away;
what an operator needs stands in `detail`, which is for logs alone. Absence is never an error here: operations
return outcomes for it. This file must never import anything of the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class CoatcheckError(Exception):
    """Root of everything this package raises on purpose.

    `code` is stable and public; `title` is safe to show to anybody; `detail` is for logs and may name settings,
    fields and hosts, but never a secret.
    """

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Something went wrong."

    def __init__(self, detail: str = "") -> None:
        super().__init__(detail or self.title)
        self.detail: str = detail or self.title


class ConfigurationError(CoatcheckError):
    """A setting is unsafe or contradicts another one; the detail names the field and the cure."""

    code = "configuration"
    title = "The service is not configured correctly."


class MigrationRequired(ConfigurationError):
    """The database schema is older than this release; `coatcheck migrate` brings it up."""

    code = "migration_required"


class StoreUnavailable(CoatcheckError):
    """The store did not answer within its deadline, or refused. Nobody is signed out by this."""

    code = "store_unavailable"
    status = 503
    title = "The service is busy. Please try again in a moment."

    def __init__(self, detail: str = "", *, retry_after: int = 1) -> None:
        super().__init__(detail)
        self.retry_after: int = retry_after


class OutcomeUnknown(StoreUnavailable):
    """A write was sent but its answer never came: it may or may not have happened. Repeating it is safe."""


class Unconfirmed(OutcomeUnknown):
    """Done, but fewer replicas have confirmed it than `Settings.replicas` asks for: a failover may forget it."""


class SessionError(CoatcheckError):
    """Family of what can go wrong with one session."""

    code = "session"


class LoginRequired(SessionError):
    """Nobody is signed in on this request. `bearer`: an access token would have been looked at, too."""

    code = "login_required"
    status = 401
    title = "Please sign in."

    def __init__(self, detail: str = "", *, bearer: bool = False) -> None:
        super().__init__(detail)
        self.bearer: bool = bearer


class SessionEnded(LoginRequired):
    """This session was ended; `reason` says why, as recorded by whoever ended it, and `at` when (Unix seconds).

    `network` is where the sign-in came from that took its place, if that is why, and if it is known.
    """

    code = "session_ended"
    title = "This session has ended. Please sign in again."

    def __init__(self, reason: str, at: float, network: str | None = None) -> None:
        super().__init__(f"session ended: {reason}")
        self.reason: str = reason
        self.at: float = at
        self.network: str | None = network


class SessionGone(SessionError):
    """The session ended while this request was running; nothing was written and nothing was created."""

    code = "session_gone"
    status = 409
    title = "This session ended while the request was running."

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session is gone: {reason}")
        self.reason: str = reason


class SessionConflict(SessionError):
    """A commit that asked for one exact version met another."""

    code = "session_conflict"
    status = 409
    title = "The session was changed by another request."

    def __init__(self, version: int) -> None:
        super().__init__(f"the session is at version {version}")
        self.version: int = version


class SessionClosed(SessionError):
    """The session was written after the response had begun; call `commit()` earlier."""

    code = "session_closed"


class SessionNotLoaded(SessionError):
    """An asynchronous session was touched before it was loaded."""

    code = "session_not_loaded"

    def __init__(self) -> None:
        super().__init__(
            "this session is not loaded: `await session.load()` first, or take it from the FastAPI dependency "
            "`auth.session`, which loads it"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSession:
    """One of the sessions that fill a limit, as whoever has proven to be their subject may see it; times are Unix
    seconds."""

    sid: str
    created_at: float
    last_seen_at: float
    network: str | None
    device: str


class SessionLimitReached(SessionError):
    """The subject has as many sessions as it may have, and the limit says to refuse or to ask.

    `sids` are the sessions that count, oldest first; `login(shown=error.sids, end=[...])` ends some of them instead.
    A server adds what a client needs to go on: the list, and `continue_with`, which is good for nothing but that.
    """

    code = "session_limit"
    status = 409
    title = "You are signed in on too many devices."

    def __init__(self, sids: tuple[str, ...], *, ask: bool) -> None:
        super().__init__(f"{len(sids)} sessions are open")
        self.sids: tuple[str, ...] = sids
        self.ask: bool = ask
        self.sessions: tuple[OpenSession, ...] = ()
        self.continue_with: str | None = None


class ValueRefused(SessionError):
    """A field, claim, name or text cannot be kept: wrong type, too deep or too large. The detail says which."""

    code = "value_refused"
    status = 400
    title = "A value is not acceptable."


class RecordTooLarge(ValueRefused):
    """The session would grow over its limit of bytes or fields; nothing was written."""

    code = "record_too_large"
    status = 413
    title = "The session holds too much."


class CookieTooLarge(CoatcheckError):
    """Name and value of a cookie pass 4096 octets; browsers would drop it silently (RFC 6265bis s5.6)."""

    code = "cookie_too_large"


class Forbidden(CoatcheckError):
    """Signed in, and still not allowed."""

    code = "forbidden"
    status = 403
    title = "You may not do this."


class StepUpRequired(Forbidden):
    """Signed in, but it has to be proven once more that it is the same person (RFC 9470 s3): by `session.step_up`."""

    code = "step_up_required"
    title = "Please confirm that it is you."


class PlaceRefused(Forbidden):
    """The session belongs to another place than this request comes from; refused until `until` (Unix seconds)."""

    code = "place_refused"
    title = "This session was opened elsewhere and cannot be used from here."

    def __init__(self, until: float) -> None:
        super().__init__("a session was presented away from its place")
        self.until: float = until


class ScopesMissing(Forbidden):
    """The credential is good, and not for this; `scopes` are those that are needed (RFC 6750 s3.1)."""

    def __init__(self, scopes: tuple[str, ...]) -> None:
        super().__init__(f"scopes are missing: {' '.join(scopes)}")
        self.scopes: tuple[str, ...] = scopes


class CrossOriginRefused(Forbidden):
    """An unsafe request came from another site; `reason` names the rule."""

    code = "cross_origin"
    title = "This request came from another site."

    def __init__(self, reason: str) -> None:
        super().__init__(f"cross-origin request refused: {reason}")
        self.reason: str = reason


class TokenInvalid(CoatcheckError):
    """An access token that is not accepted. `cause` is for the log: the client's text is the same for every cause."""

    code = "invalid_token"
    status = 401
    title = "The access token is not valid."

    def __init__(self, cause: str) -> None:
        super().__init__(f"access token refused: {cause}")
        self.cause: str = cause


class FeedSilent(StoreUnavailable):
    """A verifier has not heard from its issuer for too long to vouch for any token."""

    code = "revocations_unknown"


class RefreshInvalid(CoatcheckError):
    """A refresh token that is not accepted: none came, it was never ours, or another client holds it."""

    code = "refresh_invalid"
    status = 401
    title = "Please sign in again."

    def __init__(self, cause: str) -> None:
        super().__init__(f"refresh token refused: {cause}")
        self.cause: str = cause


class RefreshReused(RefreshInvalid):
    """A refresh token was presented after it had been exchanged; everything that descends from it is over."""

    code = "refresh_reused"

    def __init__(self) -> None:
        super().__init__("it had been exchanged before")


class Throttled(CoatcheckError):
    """Too many attempts; `retry_after` is seconds."""

    code = "throttled"
    status = 429
    title = "Too many attempts. Please wait a moment."

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"throttled for {retry_after} s")
        self.retry_after: int = retry_after


class SignInBlocked(Throttled):
    """The password was right, and a rule about risk refuses this browser for a while: `retry_after` seconds. One that
    has signed in to the account before is not refused."""

    code = "sign_in_blocked"
    status = 403
    title = "Signing in from here is refused for a while. A browser you have used before can sign in."


class InvalidCredentials(CoatcheckError):
    """Name or password are not right, or the account may not sign in: the text is the same for all of it."""

    code = "invalid_credentials"
    status = 401
    title = "Name or password are not right."


class RequestRefused(CoatcheckError):
    """Family of requests that were not even looked at."""

    code = "bad_request"
    status = 400
    title = "This request cannot be read."


class BodyTooLarge(RequestRefused):
    """The body is larger than this address takes."""

    code = "body_too_large"
    status = 413
    title = "This request is too large."


class UnsupportedMediaType(RequestRefused):
    """The body is of another kind than this address takes."""

    code = "unsupported_media_type"
    status = 415
    title = "Send JSON with Content-Type: application/json."


class CursorLost(RequestRefused):
    """A place in the revocation feed that this store does not know: begin with a snapshot."""

    code = "cursor_lost"
    status = 410
    title = "Begin again with a snapshot."


class NotFound(RequestRefused):
    """There is nothing here, or nothing that this caller may know of."""

    code = "not_found"
    status = 404
    title = "There is nothing here."


class MethodNotAllowed(RequestRefused):
    """This address takes other methods."""

    code = "method_not_allowed"
    status = 405
    title = "This address does not take that method."


class PasswordUnacceptable(RequestRefused):
    """A new password breaks a rule; `reason` says which, as the standards ask (NIST SP 800-63B-4 s3.1.1)."""

    code = "password_unacceptable"
    status = 422
    title = "This password cannot be used."

    def __init__(self, reason: str) -> None:
        super().__init__(f"password refused: {reason}")
        self.reason: str = reason
