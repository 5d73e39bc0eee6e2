"""Starlette's own names over our sessions: `request.session`, `request.user`, `request.auth`, `@requires`.

Those names cannot wait, so the session is loaded ahead of the handler. Decides what they mean; everything about
cookies and commits is `web.asgi`'s. Loading ahead must never fail a request that does not look at its session.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from starlette.authentication import AuthCredentials, BaseUser

from coatcheck.core.profiles import OutagePolicy
from coatcheck.manager import AsyncCoatcheck
from coatcheck.session import AsyncSession, Principal
from coatcheck.web import asgi
from coatcheck.web.bearer import Bearer

SIGNED_IN: str = "authenticated"
"""The scope that everybody who is signed in has: `@requires("authenticated")`."""


class SessionUser(BaseUser):
    """`request.user`: whoever is signed in, or nobody. It looks at the session when it is asked, not before."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def is_authenticated(self) -> bool:
        """Whether somebody is signed in. Raises: StoreUnavailable when that cannot be known."""
        return self._session.is_signed_in

    @property
    def display_name(self) -> str:
        """The claim `name`, else the subject; empty for nobody."""
        name = self._session.claims.get("name")
        return name if isinstance(name, str) and name else self.identity

    @property
    def identity(self) -> str:
        """The subject; empty for nobody."""
        return self._session.subject or ""

    @property
    def subject(self) -> str | None:
        """The subject, or None."""
        return self._session.subject

    @property
    def principal(self) -> Principal | None:
        """Everything known about who is asking, or None."""
        return self._session.principal


class SessionCredentials(AuthCredentials):
    """`request.auth`: the scopes of the sign-in, and `authenticated`."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def scopes(self) -> list[str]:
        """Looked up when it is asked. Raises: StoreUnavailable when it cannot be known."""
        return [SIGNED_IN, *self._session.scopes] if self._session.is_signed_in else []

    @scopes.setter
    def scopes(self, scopes: Sequence[str]) -> None:
        raise AttributeError("scopes are fixed at sign-in: session.login(..., scopes=(...))")


class CoatcheckMiddleware(asgi.CoatcheckMiddleware):
    """`web.asgi.CoatcheckMiddleware` that also fills `session`, `user` and `auth` for Starlette.

    With `autoload` the session is loaded ahead of the handler: no store command without a cookie, one with it. A
    store that is away raises `StoreUnavailable` where the handler touches one of the three, and nowhere else. Without
    `autoload` a handler awaits `request.session.load()` first. `request.session` is the `AsyncSession` itself, so
    `await request.session.login("50")` works as well.
    """

    def __init__(
        self,
        app: asgi.App,
        coat: AsyncCoatcheck,
        *,
        autoload: bool = True,
        exclude: Iterable[str] = (),
        outage: Mapping[str, OutagePolicy] = MappingProxyType({}),
    ) -> None:
        super().__init__(app, coat, exclude=exclude, outage=outage)
        self.autoload = autoload

    async def prepare(self, session: AsyncSession, scope: asgi.Scope) -> None:
        """Put Starlette's names into the scope."""
        scope["session"] = session
        scope["user"] = SessionUser(session)
        scope["auth"] = SessionCredentials(session)
        if self.autoload:
            await session.prefetch()


class TokenUser(BaseUser):
    """`request.user` in a service that holds no store: whoever the access token names, or nobody."""

    def __init__(self, principal: Principal | None) -> None:
        self.principal = principal

    @property
    def is_authenticated(self) -> bool:
        """Whether an access token was accepted."""
        return self.principal is not None

    @property
    def display_name(self) -> str:
        """The claim `name`, else the subject; empty for nobody."""
        name = None if self.principal is None else self.principal.claims.get("name")
        return name if isinstance(name, str) and name else self.identity

    @property
    def identity(self) -> str:
        """The subject; empty for nobody."""
        return "" if self.principal is None else self.principal.subject


class VerifierMiddleware(asgi.VerifierMiddleware):
    """`web.asgi.VerifierMiddleware` that also fills `user` and `auth` for Starlette and its `@requires`."""

    def prepare(self, bearer: Bearer, scope: asgi.Scope) -> None:
        """Put Starlette's names into the scope. Raises: TokenInvalid for a bad token, FeedSilent."""
        principal = bearer.optional_principal
        scope["user"] = TokenUser(principal)
        scope["auth"] = AuthCredentials([] if principal is None else [SIGNED_IN, *principal.scopes])
