"""Proving by the password, once more, that it is the same person.

    1 the session asks for it, or is signed in   session                        401, 403 place_refused
    2 there is room for another attempt          the session's own bucket       429 throttled
    3 the password is right                      as at the door                 401 invalid_credentials
    4 the session goes on under a new id         session.step_up                409 session_gone
    5 the account may still sign in              Accounts.get, after the id     401 invalid_credentials
    6 new tokens                                 sign_in.first_tokens           503 store_unavailable

The session stays the same one (its `sid`, its age, its limits); every copy of its cookie and of its refresh tokens is
dead, and where the profile has tokens there are new ones. It must never look at
a password for a place that is refused: whoever holds a copied cookie there gets nothing to guess at.
"""

from __future__ import annotations

from dataclasses import replace

from coatcheck.core.passwords import parse_password
from coatcheck.errors import Forbidden, InvalidCredentials, StoreUnavailable
from coatcheck.server.service import Service
from coatcheck.server.sign_in import (
    REASON_DISABLED,
    REASON_UNCHECKED,
    Caller,
    first_tokens,
    refuse_credentials,
    reserve_attempt,
    verify_password,
)
from coatcheck.session import AsyncSession, IssuedTokens


async def step_up(service: Service, session: AsyncSession, caller: Caller, *, password: object) -> IssuedTokens | None:
    """Let the session of this request go on under a new id, if the password is that of its account; its new tokens,
    where the profile has them, the refresh token in its cookie.

    Raises: PlaceRefused, LoginRequired, SessionEnded; Forbidden for a request with an access token; Throttled;
    InvalidCredentials; SessionGone when it was ended meanwhile; StoreUnavailable.
    """
    subject = session.wants_proof_of
    if subject is None:
        subject = session.require_login().subject
        if session.version is None:
            raise Forbidden("an access token cannot be proven again: sign in, or come with the session cookie")
    user = await service.accounts.get(subject)
    if user is None:
        raise InvalidCredentials("the account is gone")
    secret = parse_password(password, policy=service.passwords)
    # One bucket with the form that changes the password: whoever holds the cookie guesses at neither faster than at
    # the door, and strangers at the door do not keep the owner out of here.
    reserved = await reserve_attempt(
        service, replace(caller, address=None), f"{user.name_key}\x00{session.sid or caller.sid}"
    )
    if await verify_password(service, user, secret, known_device=True) is None:
        refuse_credentials(service, caller, user, "wrong_proof")
    await session.step_up(amr=("pwd",))
    try:
        now = await service.accounts.get(user.id)
        if now is None or now.is_disabled or now.password_changed_us != user.password_changed_us:
            await session.logout(reason=REASON_DISABLED)
            refuse_credentials(service, caller, user, "changed_meanwhile")
        await service.accounts.clear_failures(user.id)
        await service.limits.succeeded(reserved)
        return await first_tokens(service, session)
    except StoreUnavailable:
        # As at the door: what was not answered lets nobody in (ASVS 16.5.3).
        await session.logout(reason=REASON_UNCHECKED)
        raise
