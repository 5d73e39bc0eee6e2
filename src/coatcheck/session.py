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
    principal_of,
)

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
    ) -> None:
        """Sign `subject` in under a new id. Fields that are not named in `keep` are dropped.

        Call it after every factor was checked. Raises: SessionLimitReached, StoreUnavailable, ValueRefused.
        """
        run_blocking(self._login(sign_in(subject, claims, scopes, amr, acr, persistent), check_keep(keep)))


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
    ) -> Coroutine[None, None, None]:
        """Sign `subject` in under a new id. Fields that are not named in `keep` are dropped.

        Call it after every factor was checked, and await it: a login nobody awaited is an error when the request
        ends. Raises: SessionLimitReached, StoreUnavailable, ValueRefused.
        """
        wanted = sign_in(subject, claims, scopes, amr, acr, persistent)
        kept = check_keep(keep)
        # Marked before the coroutine runs, so that a forgotten `await` is noticed.
        self._login_begun = True
        return self._login(wanted, kept)
