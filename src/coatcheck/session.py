"""What a handler holds: `Session` in blocking code, `AsyncSession` in asynchronous code.

Each method is one line over `SessionBase`, with the same names and meanings in both colours; a test compares them.
Nothing may be decided here.
"""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence

from coatcheck.blocking import run_blocking
from coatcheck.core.sign_in import check_keep, sign_in
from coatcheck.issuer import IssuedTokens
from coatcheck.session_base import (
    Carrier,
    ClearCookie,
    ClearRefresh,
    Principal,
    SendCookie,
    SendRefresh,
    SessionBase,
    SessionEnd,
    admission,
    principal_of,
)
from coatcheck.settings import SessionLimit

__all__ = [
    "AsyncSession",
    "Carrier",
    "ClearCookie",
    "ClearRefresh",
    "IssuedTokens",
    "Principal",
    "SendCookie",
    "SendRefresh",
    "Session",
    "SessionBase",
    "SessionEnd",
    "principal_of",
]


class Session(SessionBase):
    """A session in blocking code. It loads itself at the first touch."""

    def _load_now(self) -> None:
        if not self._peek():
            run_blocking(self._load())

    def load(self) -> None:
        """Find out now: nothing is asked for a session this process knows, one command else. Raises:
        StoreUnavailable."""
        self._accessed = True
        self._load_now()

    def commit(self, *, expected: int | None = None) -> None:
        """Write changed fields now: at most one command, none when nothing changed.

        Per field the last writer wins; fields of other requests are untouched. With `expected` it writes only over
        that version. Raises: SessionGone, SessionConflict, RecordTooLarge, StoreUnavailable.
        """
        run_blocking(self._commit(expected))

    def recheck(self) -> None:
        """Ask the store whether the session still lives, before an act that cannot be undone. Raises: SessionGone."""
        run_blocking(self._recheck())

    def tokens(self, *, audience: str | None = None, carrier: Carrier = "cookie") -> IssuedTokens:
        """Make tokens of this session: an access token to hand out, and a refresh token in its cookie.

        With `carrier="body"` the refresh token is in what is returned, for clients that are no browser. Raises:
        LoginRequired, Forbidden (this request came with an access token), SessionGone, ValueRefused for an audience
        that is not in the settings, StoreUnavailable, ConfigurationError where tokens are off.
        """
        return run_blocking(self._tokens(audience, carrier))

    def refresh(self, token: str | None = None, *, audience: str | None = None) -> IssuedTokens:
        """Exchange the refresh cookie of this request, or a `token` that came in its body.

        Of any number of callers at once with one token all get the same successor. Raises: RefreshInvalid,
        RefreshReused (a consumed token came again: its session is over), SessionEnded with the reason, ValueRefused,
        StoreUnavailable, ConfigurationError where tokens are off.
        """
        return run_blocking(self._refresh(token, audience))

    def exchange(
        self, token: str | None = None, *, audience: str | None = None, carrier: Carrier = "cookie"
    ) -> IssuedTokens | None:
        """Turn what this request carries into what the settings hand out by now. The `sid` stays.

        Where tokens are on, the session of the cookie becomes tokens, as by `tokens`. Where nobody is signed in by a
        cookie, the refresh cookie (or a `token`, from a client that is no browser) becomes its session again, under a
        new id; it is spent by that. Returns None where tokens are off; fine when there is nothing to turn.

        Of any number of exchanges of one refresh token, at once or again within its grace, all that are answered are
        answered with one id. Raises: LoginRequired, Forbidden (this request came with an access token),
        RefreshInvalid, RefreshReused, SessionEnded, SessionGone, StepUpRequired, PlaceRefused, ValueRefused,
        StoreUnavailable.
        """
        return run_blocking(self._exchange(token, audience, carrier))

    def step_up(self, *, amr: Sequence[str] = ("pwd",), acr: str | None = None) -> None:
        """Whoever this session belongs to has just proven himself once more, by the methods `amr`: it goes on under a
        new id, and the old one is dead at once. Also where `wants_proof_of` asked for it: then this place is one of the
        subject's from now on. Refresh tokens from before are dead too: where there are tokens, call
        `tokens()` for new ones.

        Raises: LoginRequired where there is no such session, SessionGone, StoreUnavailable, ValueRefused.
        """
        run_blocking(self._step_up(amr, acr))

    def rotate(self, *, claims: Mapping[str, object] | None = None) -> None:
        """Give the session a new id; with `claims` also new claims, and the old id is dead at once.

        Simultaneous plain rotations end with one id. Raises: SessionGone, LoginRequired, StoreUnavailable.
        """
        run_blocking(self._rotate(claims))

    def logout(self, *, reason: str = "logout", refresh_token: str | None = None) -> None:
        """End the session for good, everywhere, and clear the cookies. Fine when nobody is signed in.

        Whatever credential this request carries counts: session cookie, access token, refresh cookie, or a
        `refresh_token` that came in its body.
        """
        run_blocking(self._logout(reason, refresh_token))

    def login(
        self,
        subject: str,
        *,
        claims: Mapping[str, object] = {},
        scopes: Sequence[str] = (),
        amr: Sequence[str] = ("pwd",),
        acr: str | None = None,
        keep: Sequence[str] = (),
        persistent: bool = False,
        limit: SessionLimit | None = None,
        device: str | None = None,
        replaces: str | None = None,
        shown: Sequence[str] | None = None,
        end: Sequence[str] = (),
    ) -> None:
        """Sign `subject` in under a new id. Fields that are not named in `keep` are dropped.

        `limit` takes the place of `Settings.limit` for this sign-in. `device` is a name of the browser that outlives
        its sessions, kept in the session; None: that of `Settings.device_cookie`, where sessions are bound to it.
        `replaces` is the `sid` of an older session of the subject in that browser, which gives way and does not count.
        `shown` and `end` go on after `SessionLimitReached`: those of its `sids` that are in `end` are ended with the
        sign-in, in one command, or it is raised again if the sessions are not exactly those that were shown.

        Call it after every factor was checked. Raises: SessionLimitReached, StoreUnavailable, ValueRefused.
        """
        wanted = sign_in(subject, claims, scopes, amr, acr, persistent, device)
        run_blocking(self._login(wanted, check_keep(keep), admission(limit, replaces, shown, end)))


class AsyncSession(SessionBase):
    """A session in asynchronous code. Load it where you can wait: `await session.load()`."""

    async def load(self) -> None:
        """Find out now: nothing is asked for a session this process knows, one command else. Raises:
        StoreUnavailable."""
        self._accessed = True
        if not self._peek():
            await self._load()

    async def commit(self, *, expected: int | None = None) -> None:
        """Write changed fields now: at most one command, none when nothing changed.

        Per field the last writer wins; fields of other requests are untouched. With `expected` it writes only over
        that version. Raises: SessionGone, SessionConflict, RecordTooLarge, StoreUnavailable.
        """
        await self._commit(expected)

    async def recheck(self) -> None:
        """Ask the store whether the session still lives, before an act that cannot be undone. Raises: SessionGone."""
        await self._recheck()

    async def tokens(self, *, audience: str | None = None, carrier: Carrier = "cookie") -> IssuedTokens:
        """Make tokens of this session: an access token to hand out, and a refresh token in its cookie.

        With `carrier="body"` the refresh token is in what is returned, for clients that are no browser. Raises:
        LoginRequired, Forbidden (this request came with an access token), SessionGone, ValueRefused for an audience
        that is not in the settings, StoreUnavailable, ConfigurationError where tokens are off.
        """
        return await self._tokens(audience, carrier)

    async def refresh(self, token: str | None = None, *, audience: str | None = None) -> IssuedTokens:
        """Exchange the refresh cookie of this request, or a `token` that came in its body.

        Of any number of callers at once with one token all get the same successor. Raises: RefreshInvalid,
        RefreshReused (a consumed token came again: its session is over), SessionEnded with the reason, ValueRefused,
        StoreUnavailable, ConfigurationError where tokens are off.
        """
        return await self._refresh(token, audience)

    async def exchange(
        self, token: str | None = None, *, audience: str | None = None, carrier: Carrier = "cookie"
    ) -> IssuedTokens | None:
        """Turn what this request carries into what the settings hand out by now. The `sid` stays.

        Where tokens are on, the session of the cookie becomes tokens, as by `tokens`. Where nobody is signed in by a
        cookie, the refresh cookie (or a `token`, from a client that is no browser) becomes its session again, under a
        new id; it is spent by that. Returns None where tokens are off; fine when there is nothing to turn.

        Of any number of exchanges of one refresh token, at once or again within its grace, all that are answered are
        answered with one id. Raises: LoginRequired, Forbidden (this request came with an access token),
        RefreshInvalid, RefreshReused, SessionEnded, SessionGone, StepUpRequired, PlaceRefused, ValueRefused,
        StoreUnavailable.
        """
        return await self._exchange(token, audience, carrier)

    async def step_up(self, *, amr: Sequence[str] = ("pwd",), acr: str | None = None) -> None:
        """Whoever this session belongs to has just proven himself once more, by the methods `amr`: it goes on under a
        new id, and the old one is dead at once. Also where `wants_proof_of` asked for it: then this place is one of the
        subject's from now on. Refresh tokens from before are dead too: where there are tokens, call
        `tokens()` for new ones.

        Raises: LoginRequired where there is no such session, SessionGone, StoreUnavailable, ValueRefused.
        """
        await self._step_up(amr, acr)

    async def rotate(self, *, claims: Mapping[str, object] | None = None) -> None:
        """Give the session a new id; with `claims` also new claims, and the old id is dead at once.

        Simultaneous plain rotations end with one id. Raises: SessionGone, LoginRequired, StoreUnavailable.
        """
        await self._rotate(claims)

    async def logout(self, *, reason: str = "logout", refresh_token: str | None = None) -> None:
        """End the session for good, everywhere, and clear the cookies. Fine when nobody is signed in.

        Whatever credential this request carries counts: session cookie, access token, refresh cookie, or a
        `refresh_token` that came in its body.
        """
        await self._logout(reason, refresh_token)

    def login(
        self,
        subject: str,
        *,
        claims: Mapping[str, object] = {},
        scopes: Sequence[str] = (),
        amr: Sequence[str] = ("pwd",),
        acr: str | None = None,
        keep: Sequence[str] = (),
        persistent: bool = False,
        limit: SessionLimit | None = None,
        device: str | None = None,
        replaces: str | None = None,
        shown: Sequence[str] | None = None,
        end: Sequence[str] = (),
    ) -> Coroutine[None, None, None]:
        """Sign `subject` in under a new id. Fields that are not named in `keep` are dropped.

        `limit` takes the place of `Settings.limit` for this sign-in. `device` is a name of the browser that outlives
        its sessions, kept in the session; None: that of `Settings.device_cookie`, where sessions are bound to it.
        `replaces` is the `sid` of an older session of the subject in that browser, which gives way and does not count.
        `shown` and `end` go on after `SessionLimitReached`: those of its `sids` that are in `end` are ended with the
        sign-in, in one command, or it is raised again if the sessions are not exactly those that were shown.

        Call it after every factor was checked, and await it: a login nobody awaited is an error when the request
        ends. Raises: SessionLimitReached, StoreUnavailable, ValueRefused.
        """
        wanted = sign_in(subject, claims, scopes, amr, acr, persistent, device)
        kept, admitted = check_keep(keep), admission(limit, replaces, shown, end)
        # Marked before the coroutine runs, so that a forgotten `await` is noticed.
        self._login_begun = True
        return self._login(wanted, kept, admitted)
