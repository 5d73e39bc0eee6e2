"""Turning a session cookie into tokens and back, once the profile has changed.

    1 what came is turned into what the profile hands out   session.exchange          401, 403, 409, 503
    2 the account may still sign in                         Accounts.get              401 session_ended

The session stays the same one: its `sid`, its age, its limits. It must never begin a session, and never hand anything
out for one that its own credential does not lead to.
"""

from __future__ import annotations

from dataclasses import dataclass

from coatcheck.core.session import SECOND_US
from coatcheck.errors import LoginRequired, SessionEnded
from coatcheck.server.service import Service
from coatcheck.server.sign_in import REASON_DISABLED
from coatcheck.session import AsyncSession, Carrier, IssuedTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """What a browser or client goes on with: its session, and tokens where the profile has them."""

    sid: str
    tokens: IssuedTokens | None


async def exchange(
    service: Service,
    session: AsyncSession,
    token: str | None = None,
    *,
    audience: str | None = None,
    carrier: Carrier = "cookie",
) -> Exchanged:
    """Turn the cookie of this request, or a refresh `token` that came in its body, into what the profile hands out.

    Raises: LoginRequired, Forbidden, RefreshInvalid, RefreshReused, SessionEnded, SessionGone, StepUpRequired,
    PlaceRefused, ValueRefused, StoreUnavailable.
    """
    tokens = await session.exchange(token, audience=audience, carrier=carrier)
    subject, sid = (session.subject, session.sid) if tokens is None else (tokens.subject, tokens.sid)
    if subject is None or sid is None:
        raise LoginRequired
    user = await service.accounts.get(subject)
    if user is None or user.is_disabled:
        # First: nothing new must leave with the answer, not even when the store is away now.
        session.withhold_cookies()
        await service.coat.revoke_session(sid, reason=REASON_DISABLED)
        raise SessionEnded(REASON_DISABLED, service.system.now_us() / SECOND_US)
    return Exchanged(sid=sid, tokens=tokens)
