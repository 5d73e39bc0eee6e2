"""Errors as problem documents (RFC 9457).

Decides the body and headers of a refusal; the text gives nothing away and the cause stays in the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from coatcheck.errors import (
    CoatcheckError,
    LoginRequired,
    PasswordUnacceptable,
    PlaceRefused,
    ScopesMissing,
    SessionEnded,
    SessionLimitReached,
    StepUpRequired,
    StoreUnavailable,
    Throttled,
    TokenInvalid,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemAnswer:
    """A complete answer: status, headers (lower-case names) and body."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def problem(error: CoatcheckError, *, title: str | None = None) -> ProblemAnswer:
    """The answer for an error; `title` may be a translation of the error's own."""
    members: dict[str, object] = {
        "type": f"urn:coatcheck:problem:{error.code}",
        "title": error.title if title is None else title,
        "status": error.status,
        "code": error.code,
    }
    headers = [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
    headers += [(b"www-authenticate", challenge) for challenge in _challenges(error)]
    match error:
        case SessionEnded():
            members["reason"] = error.reason
            members["at"] = error.at
            if error.network is not None:
                members["network"] = error.network
        case PlaceRefused():
            members["until"] = error.until
        case PasswordUnacceptable():
            members["reason"] = error.reason
        case SessionLimitReached():
            members["sessions"] = error.sessions or [{"sid": sid} for sid in error.sids]
            members["ask"] = error.ask
            if error.continue_with is not None:
                members["continue"] = error.continue_with
        case StoreUnavailable() | Throttled():
            headers.append((b"retry-after", str(error.retry_after).encode("ascii")))
        case _:
            pass
    body = msgspec.json.encode(members)
    headers.append((b"content-length", str(len(body)).encode("ascii")))
    return ProblemAnswer(status=error.status, headers=headers, body=body)


def _challenges(error: CoatcheckError) -> list[bytes]:
    """What a 401 asks for (RFC 9110 s15.5.2), and a 403 that lacks scopes (RFC 6750 s3.1) or a proof (RFC 9470 s3)."""
    match error:
        case TokenInvalid():
            return [b'Bearer error="invalid_token"']
        case LoginRequired():
            # Browsers ask nobody anything for a scheme they do not know. A request without credentials gets no error
            # code (RFC 6750 s3.1).
            return [b'Cookie realm="session"', *([b'Bearer realm="session"'] if error.bearer else [])]
        case StepUpRequired():
            return [b'Bearer error="insufficient_user_authentication"']
        case ScopesMissing():
            return [b'Bearer error="insufficient_scope", scope="' + " ".join(error.scopes).encode("ascii") + b'"']
        case _:
            return []


def is_answer(error: CoatcheckError) -> bool:
    """Whether an error that left a handler is an answer for the client rather than a mistake of the application."""
    return error.status < 500 or isinstance(error, StoreUnavailable)
