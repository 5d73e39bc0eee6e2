"""Signing in with a password: the order of everything that is checked.

    1 name and password can be read       parse_user_name, parse_password
    2 there is room for another attempt    SignInLimits.reserve                 429 throttled
    3 the attempt is counted               Accounts.count_failure
    4 the password is right                PasswordHasher.verify, always one hash  401 invalid_credentials
    5 no rule about risk speaks against it RiskWatch.admit                       403 sign_in_blocked
    6 the session is created               session_limits, session.login        409 session_limit
    7 the account may still sign in        Accounts.get, after the session       401 invalid_credentials
    8 tokens, where the profile has them   session.tokens

Nothing in an answer, nor the work done for it, tells whether an account exists, is disabled or needs recovery. Step 7
comes after step 6 so that disabling an account and signing in to it cannot slip past each other: one of the two sees
the other. Whoever meets a limit in step 6 may go on from there (`continue_sign_in`), by the same steps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from coatcheck.core.cookie import render_set_cookie
from coatcheck.core.device import DEVICE_RANDOM_BYTES, KnownDevice, device_of, mint_device, parse_device
from coatcheck.core.names import UserName, parse_user_name
from coatcheck.core.passwords import Password, PasswordRefused, check_new_password, parse_password
from coatcheck.core.session import SECOND_US
from coatcheck.core.throttle import Attempt, needs_recovery
from coatcheck.errors import (
    InvalidCredentials,
    NotFound,
    PasswordUnacceptable,
    RequestRefused,
    SessionEnded,
    SessionGone,
    SessionLimitReached,
    StoreUnavailable,
    Throttled,
)
from coatcheck.server.accounts import User
from coatcheck.server.audit import login_failed, login_throttled, password_changed
from coatcheck.server.password_hashing import Verified
from coatcheck.server.service import Service
from coatcheck.server.session_limits import (
    check_contest,
    halt,
    limit_of,
    open_sessions,
    overruled,
    own_session,
    resume_at,
)
from coatcheck.server.sign_in_limits import Reserved
from coatcheck.session import AsyncSession, Carrier, IssuedTokens, Principal

log = logging.getLogger("coatcheck.server")

REASON_DISABLED = "account_disabled"
REASON_PASSWORD = "password_changed"  # noqa: S105 - a reason, not a password
REASON_UNCHECKED = "sign_in_unchecked"
WHY_WRONG = "wrong"
KEPT_FIELDS = ("next",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Where an attempt came from. `device` and `continuing` are the raw values of those cookies. `sid` names the
    session whose cookie came, also while nobody is signed in on it; that proves nothing."""

    address: str | None
    forged_address: bool
    device: str | None = field(repr=False)
    continuing: str | None = field(default=None, repr=False)
    sid: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """Signed in; `device_cookie` is a Set-Cookie value to send along, `tokens` what the profile hands out."""

    user: User
    device_cookie: bytes = field(repr=False)
    tokens: IssuedTokens | None
    carrier: Carrier = "cookie"


async def sign_in(
    service: Service,
    session: AsyncSession,
    caller: Caller,
    *,
    name: object,
    password: object,
    carrier: Carrier = "cookie",
    audience: str | None = None,
) -> Welcome:
    """Sign somebody in on this session.

    Raises: InvalidCredentials, Throttled, SignInBlocked, Halted (a SessionLimitReached), StoreUnavailable.
    """
    named, secret = parse_user_name(name), parse_password(password, policy=service.passwords)
    account = named.key if isinstance(named, UserName) else str(name)[:256]
    device = parse_device(caller.device, account, key=service.device_key) if caller.device else None
    # Behind a proxy that nobody named everybody has its address.
    address = None if caller.forged_address else caller.address
    if device is None:
        service.risk.check_network(address)
    reserved = await reserve_attempt(service, caller, account, device)
    user = await service.accounts.find_by_name(named) if isinstance(named, UserName) else None
    verified = await verify_password(service, user, secret, known_device=device is not None)
    if user is None or verified is None:
        await service.risk.note_failure(None if user is None else user.id, named=account, address=address)
        refuse_credentials(service, caller, user, WHY_WRONG)
    if verified.needs_rehash and user.password_hash is not None and isinstance(secret, Password):
        newer = await service.hasher.hash(secret, known_device=device is not None)
        await service.accounts.replace_hash(user.id, old=user.password_hash, new=newer)
    proof = _Proof(
        user=user,
        proved_us=service.system.now_us(),
        device=caller.device if caller.device and device is not None else new_device(service, user),
        known=device is not None,
        carrier=carrier,
        audience=audience,
        reserved=reserved,
    )
    await service.risk.admit(user.id, address=address, device=device_of(proof.device), known=proof.known)
    return await _enter(service, session, caller, proof)


async def continue_sign_in(
    service: Service,
    session: AsyncSession,
    caller: Caller,
    *,
    word: str,
    ending: Sequence[str],
    from_browser: bool = True,
) -> Welcome:
    """Go on with a sign-in that met a limit: end exactly these of the sessions that were shown, and sign in.

    Raises: Halted when the sessions are not those that were shown any more, or when it would still be too many;
    LoginRequired (see `session_limits.resume_at`), RequestRefused, InvalidCredentials when the account was changed
    meanwhile, StoreUnavailable.
    """
    stopped = await resume_at(service, word, caller.continuing, ending=ending)
    if stopped.carrier == "body" and from_browser:
        raise RequestRefused("continue: belongs to a client that is no browser")
    user = await service.accounts.get(stopped.user)
    if user is None or user.is_disabled or user.password_changed_us != stopped.password_changed_us:
        refuse_credentials(service, caller, user, "changed_meanwhile")
    proof = _Proof(
        user=user,
        proved_us=stopped.proved_us,
        device=stopped.device,
        known=True,
        carrier=stopped.carrier,
        audience=stopped.audience,
    )
    return await _enter(service, session, caller, proof, shown=stopped.shown, ending=tuple(ending))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """Somebody has given the right password, at `proved_us`, in the browser with the cookie value `device`. `known`:
    it may have sessions of the account already. `reserved`: the attempt, where this is still its request."""

    user: User
    proved_us: int
    device: str = field(repr=False)
    known: bool
    carrier: Carrier
    audience: str | None
    reserved: Reserved | None = None


async def _enter(
    service: Service,
    session: AsyncSession,
    caller: Caller,
    proof: _Proof,
    *,
    shown: tuple[str, ...] | None = None,
    ending: tuple[str, ...] = (),
) -> Welcome:
    """Steps 6 to 8."""
    user, limit = proof.user, limit_of(service, proof.user.role)
    # What a client that keeps no cookies is not given cannot be looked for later on.
    kept = proof.device if proof.carrier == "cookie" else caller.device
    device = device_of(kept) if kept else None
    there = await open_sessions(service, user.id) if proof.known or limit.on_reached == "evict_oldest" else []
    replaced = own_session(there, device)
    try:
        if shown is None:
            counted = [each for each in there if each.sid not in (replaced, session.sid)]
            await check_contest(
                service, session, user, counted, limit=limit, returning=proof.known, network=caller.address
            )
        await session.login(
            user.id,
            claims={"name": user.name, "role": user.role},
            amr=("pwd",),
            keep=KEPT_FIELDS,
            persistent=service.settings.decided.persistent,
            limit=limit,
            device=device,
            replaces=replaced,
            shown=shown,
            end=ending,
        )
    except SessionLimitReached as reached:
        if proof.reserved is not None:
            # The password was right: coming here often must not shut the door on who may end the other sessions.
            await service.limits.succeeded(proof.reserved)
        raise halt(
            service,
            reached,
            user,
            await open_sessions(service, user.id),
            proved_us=proof.proved_us,
            device=proof.device,
            carrier=proof.carrier,
            audience=proof.audience,
        ) from reached
    if ending and limit.on_reached == "refuse":
        service.coat.engine.publish(overruled(service, user, caller.address, len(ending)))
    try:
        now = await service.accounts.get(user.id)
        if now is None or now.is_disabled or now.password_changed_us != user.password_changed_us:
            await session.logout(reason=REASON_DISABLED)
            refuse_credentials(service, caller, user, "changed_meanwhile")
        await service.accounts.clear_failures(user.id)
        if proof.reserved is not None:
            await service.limits.succeeded(proof.reserved)
        tokens = await first_tokens(service, session, carrier=proof.carrier, audience=proof.audience)
    except StoreUnavailable:
        # Step 7 was not answered, so nobody may be let in: fail closed (ASVS 16.5.3).
        await session.logout(reason=REASON_UNCHECKED)
        raise
    cookie = render_set_cookie(service.device_cookie, proof.device)
    return Welcome(user=user, device_cookie=cookie, tokens=tokens, carrier=proof.carrier)


async def first_tokens(
    service: Service, session: AsyncSession, *, carrier: Carrier = "cookie", audience: str | None = None
) -> IssuedTokens | None:
    """The tokens of a session that was just made; None where the profile hands out none.

    Raises: ValueRefused for an audience that is not in the settings, StoreUnavailable.
    """
    if service.coat.settings.tokens is None:
        return None
    return await session.tokens(carrier=carrier, audience=audience)


async def refresh(
    service: Service, session: AsyncSession, token: str | None, *, audience: str | None = None
) -> IssuedTokens:
    """Exchange a refresh token, and look at the account once more: disabling it must reach everything it has
    (CVE-2026-43983, GHSA-6rrr-78xp-5jp8).

    Raises: NotFound where the profile hands out no tokens, RefreshInvalid, RefreshReused, SessionEnded,
    StoreUnavailable.
    """
    if service.coat.settings.tokens is None:
        raise NotFound("this profile hands out no tokens")
    tokens = await session.refresh(token, audience=audience)
    user = await service.accounts.get(tokens.subject)
    if user is None or user.is_disabled:
        # First: the new token must not leave with the answer, not even when the store is away now.
        session.withhold_cookies()
        await service.coat.revoke_session(tokens.sid, reason=REASON_DISABLED)
        raise SessionEnded(REASON_DISABLED, _now(service))
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class PasswordChanged:
    """How many other sessions ended, and new tokens where the profile has them."""

    ended: int
    tokens: IssuedTokens | None


async def change_password(
    service: Service,
    session: AsyncSession,
    caller: Caller,
    *,
    current: object,
    new: object,
    carrier: Carrier = "cookie",
) -> PasswordChanged:
    """Change the password of whoever is signed in, and leave nothing alive that was signed in with the old one but
    this browser, under new credentials.

    Raises: LoginRequired, InvalidCredentials, PasswordUnacceptable, SessionGone when the session was ended meanwhile
    (the new password stands), Throttled, StoreUnavailable.
    """
    principal = session.require_login()
    user = await service.accounts.get(principal.subject)
    if user is None:
        raise InvalidCredentials("the account is gone")
    secret = parse_password(current, policy=service.passwords)
    wanted = acceptable_password(service, new, names=(user.name,))
    # A thief with an open session must not be able to guess the password here faster than at the door; and strangers
    # at the door must not keep the owner from changing it. So the session has a bucket of its own.
    reserved = await reserve_attempt(service, replace(caller, address=None), f"{user.name_key}\x00{principal.sid}")
    if await verify_password(service, user, secret, known_device=True) is None:
        refuse_credentials(service, caller, user, "wrong_current_password")
    # Before and after: if this one fails nothing has changed, and who slips in between is ended by the second.
    ended = await service.coat.revoke_subject(user.id, reason=REASON_PASSWORD, keep_sid=principal.sid)
    stored = await service.hasher.hash(wanted, known_device=True)
    changed = await service.accounts.set_password(user.id, stored, expected=user.password_hash)
    if changed is None:
        raise InvalidCredentials("the password was changed by somebody else meanwhile")
    await service.limits.succeeded(reserved)
    service.coat.engine.publish(password_changed(changed, at=_now(service)))
    try:
        late = (await service.coat.revoke_subject(user.id, reason=REASON_PASSWORD, keep_sid=principal.sid)).ended
    except StoreUnavailable:
        service.coat.engine.owe_revocation(user.id, REASON_PASSWORD, principal.sid)
        late = 0
    # Where tokens are off, too: it may have refresh tokens from when they were on, which `exchange` still takes.
    tokens = await _begin_anew(service, session, principal, changed, caller, carrier=carrier)
    return PasswordChanged(ended=ended.ended + late, tokens=tokens)


async def _begin_anew(
    service: Service, session: AsyncSession, principal: Principal, user: User, caller: Caller, *, carrier: Carrier
) -> IssuedTokens | None:
    """A session of its own for who has just proven the password; the one before ends with every copy of its cookie,
    its refresh token and its access tokens. A new id alone would leave those two alive."""
    # Exactly one caller ends it. Whoever did so before us (a sign-out, an administrator) must not be overruled.
    before = await service.coat.revoke_session(principal.sid, reason=REASON_PASSWORD)
    if not before.ended:
        raise SessionGone(REASON_PASSWORD)
    await session.login(
        principal.subject,
        claims=dict(principal.claims),
        scopes=principal.scopes,
        amr=principal.amr,
        acr=principal.acr,
        keep=KEPT_FIELDS,
        persistent=session.persistent,
        device=None if caller.device is None else device_of(caller.device),
    )
    try:
        # As at the door (step 7): disabling and this cannot slip past each other.
        now = await service.accounts.get(user.id)
        if now is None or now.is_disabled or now.password_changed_us != user.password_changed_us:
            await session.logout(reason=REASON_DISABLED)
            raise InvalidCredentials("the account was changed meanwhile")
        return await first_tokens(service, session, carrier=carrier)
    except StoreUnavailable:
        await session.logout(reason=REASON_UNCHECKED)
        raise


def acceptable_password(service: Service, typed: object, *, names: tuple[str, ...]) -> Password:
    """A new password that may be had. Raises: PasswordUnacceptable."""
    wanted = parse_password(typed, policy=service.passwords)
    if isinstance(wanted, PasswordRefused):
        raise PasswordUnacceptable(wanted.reason)
    refused = check_new_password(wanted, policy=service.passwords, names=names)
    if refused is not None:
        raise PasswordUnacceptable(refused.reason)
    return wanted


def new_device(service: Service, user: User) -> str:
    """A value for the cookie by which a browser is known as one that has signed in to this account."""
    return mint_device(user.name_key, key=service.device_key, random=service.system.random(DEVICE_RANDOM_BYTES))


async def reserve_attempt(
    service: Service, caller: Caller, account: str, device: KnownDevice | None = None
) -> Reserved:
    """Step 2: charge the attempt. `account` names the bucket of who is not on a known device.

    Raises: Throttled, and tells the audit log; StoreUnavailable.
    """
    if caller.forged_address:
        log.warning(
            "sign-in with forwarding headers from a peer that is no trusted proxy: its network limit is off; "
            "name your proxies in trusted_proxies"
        )
    attempt = Attempt(
        account=account,
        address=caller.address,
        device=device,
        forwarded_by_untrusted_peer=caller.forged_address,
    )
    try:
        return await service.limits.reserve(attempt)
    except Throttled as refused:
        service.coat.engine.publish(
            login_throttled(at=_now(service), retry_after=refused.retry_after, network=caller.address)
        )
        raise


async def verify_password(
    service: Service, user: User | None, secret: Password | PasswordRefused, *, known_device: bool
) -> Verified | None:
    """Steps 3 and 4: one counted failure and one hash computation, whoever it is; the count is taken back after a
    success. None: the password is not right, or the account may not sign in. Raises: StoreUnavailable."""
    failures = await service.accounts.count_failure(user)
    barred = user is None or user.is_disabled or needs_recovery(failures, policy=service.throttle)
    unreadable = isinstance(secret, PasswordRefused)
    judged = Password(b"\xff") if isinstance(secret, PasswordRefused) else secret
    try:
        verdict = await service.hasher.verify(None if barred or unreadable else user, judged, known_device=known_device)
    except StoreUnavailable:
        await service.accounts.uncount_failure(user)
        raise
    if not isinstance(verdict, Verified):
        return None
    # Right: whatever goes wrong from here on, it was no failure of whoever knows the password.
    await service.accounts.uncount_failure(user)
    return verdict


def refuse_credentials(service: Service, caller: Caller, user: User | None, why: str) -> NoReturn:
    """Tell the audit log why, and the client nothing of it. Raises: InvalidCredentials."""
    service.coat.engine.publish(login_failed(user, at=_now(service), why=why, network=caller.address))
    raise InvalidCredentials(f"sign-in refused: {why}")


def _now(service: Service) -> float:
    return service.system.now_us() / SECOND_US
