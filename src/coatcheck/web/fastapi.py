"""FastAPI: the session and the user as dependencies, and in the OpenAPI document.

Decides what a dependency gives and when it refuses; loading happens there, because there code can wait. Errors stay
exceptions of ours: the middleware turns them into problem documents, so a handler of the application for
`CoatcheckError` comes first. Nothing about cookies may be decided here.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Final

from fastapi import Depends
from fastapi.openapi.models import APIKey, APIKeyIn, HTTPBearer
from fastapi.requests import HTTPConnection
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.applications import Starlette

from coatcheck.core.profiles import OutagePolicy
from coatcheck.errors import ConfigurationError
from coatcheck.manager import AsyncCoatcheck
from coatcheck.session import AsyncSession, Principal
from coatcheck.verifier import Verifier
from coatcheck.web.asgi import BEARER_KEY, CoatcheckMiddleware, VerifierMiddleware, bearer_of, session_of
from coatcheck.web.bearer import Bearer, require_scopes

_NOT_IN_A_COMPONENT_NAME: Final = re.compile(r"[^A-Za-z0-9._-]")


class Auth:
    """The dependencies of one `AsyncCoatcheck`, or of a `Verifier` in a service that holds no store.

    All of them are made once and stay the same objects, so `app.dependency_overrides` finds them. `sign_in_url` is
    where people sign in; the Authorize dialog of /docs then links to it. Several may live in one application, each
    with a cookie name of its own. Over a `Verifier` there is no session, and `session` raises ConfigurationError.
    """

    session: Callable[..., Awaitable[AsyncSession]]
    """Dependency: the loaded session of this request. Raises: StoreUnavailable."""

    user: Callable[..., Awaitable[Principal]]
    """Dependency: who is asking, with the scopes of `Security(auth.user, scopes=[...])`. Raises: LoginRequired,
    SessionEnded or TokenInvalid (401), ScopesMissing (403), StoreUnavailable or FeedSilent (503)."""

    optional_user: Callable[..., Awaitable[Principal | None]]
    """Dependency: who is asking, or None. Raises: StoreUnavailable; over a `Verifier` also TokenInvalid."""

    sensitive_user: Callable[..., Awaitable[Principal]]
    """Dependency: like `user`, for acts that must not rest on an old list of revocations."""

    def __init__(self, coat: AsyncCoatcheck | Verifier, *, sign_in_url: str | None = None) -> None:
        self.scheme: SessionScheme | BearerScheme
        self.coat: AsyncCoatcheck | Verifier = coat
        if isinstance(coat, Verifier):
            self.scheme = BearerScheme()
            self.session = _no_session
            self.user = _token_user(self.scheme, sensitive=False)
            self.sensitive_user = _token_user(self.scheme, sensitive=True)
            self.optional_user = _optional_token_user(self.scheme)
            return
        if not isinstance(coat, AsyncCoatcheck):
            raise ConfigurationError("coat: FastAPI needs an AsyncCoatcheck or a Verifier, Coatcheck is for WSGI")
        self.scheme = SessionScheme(coat, sign_in_url=sign_in_url)
        self.session = _session(coat)
        also = BearerScheme() if coat.settings.tokens is not None else None
        self.user = _user(self.scheme, also)
        # With a store at hand every check asks it: nothing is older for one route than for another.
        self.sensitive_user = self.user
        self.optional_user = _optional_user(self.session)

    def install(
        self,
        app: Starlette,
        *,
        exclude: Iterable[str] = (),
        outage: Mapping[str, OutagePolicy] = MappingProxyType({}),
    ) -> None:
        """Add the middleware to an application that has not started. A second time changes nothing. `outage`: paths for
        which the settings' word on a store that is away does not hold.

        Raises: ConfigurationError when another installation uses the same cookie name.
        """
        coat = self.coat
        if isinstance(coat, Verifier):
            if not any(present.kwargs.get("verifier") is coat for present in app.user_middleware):
                app.add_middleware(VerifierMiddleware, verifier=coat, optional=True, exclude=tuple(exclude))
            return
        name = coat.settings.session_cookie.name
        for present in app.user_middleware:
            other = present.kwargs.get("coat")
            if other is coat:
                return
            if isinstance(other, AsyncCoatcheck) and other.settings.session_cookie.name == name:
                raise ConfigurationError(
                    f"cookie: two installations in one application share the name {name!r}; give one of them "
                    "Settings(cookie=CookieSettings(name=...))"
                )
        app.add_middleware(CoatcheckMiddleware, coat=coat, exclude=tuple(exclude), outage=outage)


class SessionScheme(SecurityBase):
    """The session cookie as OpenAPI describes it; as a dependency it gives the loaded session.

    The cookie is out of reach for scripts, the dialog of /docs included: its text says that signing in on this site
    is what authorizes, because the browser sends the cookie along with "Try it out".
    """

    def __init__(self, coat: AsyncCoatcheck, *, sign_in_url: str | None) -> None:
        name = coat.settings.session_cookie.name
        where = "on this site" if sign_in_url is None else f"[here]({sign_in_url})"
        self._coat = coat
        self.model = APIKey.model_validate(
            {
                "in": APIKeyIn.cookie,
                "name": name,
                "description": (
                    f"Sign in {where}, in this browser; nothing needs to be typed in below. "
                    "The browser then sends the session cookie with every request."
                ),
            }
        )
        self.scheme_name = _NOT_IN_A_COMPONENT_NAME.sub("_", name)

    async def __call__(self, connection: HTTPConnection) -> AsyncSession:
        """Load the session. Raises: StoreUnavailable; RuntimeError where `install` is missing."""
        return await _load(self._coat, connection)


class BearerScheme(SecurityBase):
    """An access token as OpenAPI describes it. As a dependency it gives the request's bearer, if a `Verifier` reads
    it; beside a session it only describes."""

    def __init__(self) -> None:
        self.model = HTTPBearer(bearerFormat="at+jwt", description="An access token (RFC 9068).")
        self.scheme_name = "access_token"

    async def __call__(self, connection: HTTPConnection) -> Bearer | None:
        """The bearer of this request."""
        found: Bearer | None = connection.scope.get(BEARER_KEY)
        return found


async def _no_session() -> AsyncSession:
    raise ConfigurationError("auth.session: a service over a Verifier holds no sessions; use auth.user")


def _token_user(scheme: BearerScheme, *, sensitive: bool) -> Callable[..., Awaitable[Principal]]:
    async def user(scopes: SecurityScopes, connection: HTTPConnection, _: Bearer | None = Depends(scheme)) -> Principal:
        return require_scopes(bearer_of(connection.scope).principal(sensitive=sensitive), scopes.scopes)

    return user


def _optional_token_user(scheme: BearerScheme) -> Callable[..., Awaitable[Principal | None]]:
    async def optional_user(connection: HTTPConnection, _: Bearer | None = Depends(scheme)) -> Principal | None:
        return bearer_of(connection.scope).optional_principal

    return optional_user


async def _load(coat: AsyncCoatcheck, connection: HTTPConnection) -> AsyncSession:
    session = session_of(connection.scope, coat=coat)
    await session.load()
    return session


def _session(coat: AsyncCoatcheck) -> Callable[..., Awaitable[AsyncSession]]:
    async def session(connection: HTTPConnection) -> AsyncSession:
        return await _load(coat, connection)

    return session


def _user(scheme: SessionScheme, also: BearerScheme | None) -> Callable[..., Awaitable[Principal]]:
    if also is None:

        async def user(scopes: SecurityScopes, session: AsyncSession = Depends(scheme)) -> Principal:
            return require_scopes(session.require_login(), scopes.scopes)

        return user

    async def user_by_either(
        scopes: SecurityScopes, session: AsyncSession = Depends(scheme), _: Bearer | None = Depends(also)
    ) -> Principal:
        return require_scopes(session.require_login(), scopes.scopes)

    return user_by_either


def _optional_user(session: Callable[..., Awaitable[AsyncSession]]) -> Callable[..., Awaitable[Principal | None]]:
    async def optional_user(session: AsyncSession = Depends(session)) -> Principal | None:
        return session.principal

    return optional_user
