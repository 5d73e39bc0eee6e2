"""FastAPI: the session and the user as dependencies, and in the OpenAPI document.

Decides what a dependency gives and when it refuses; loading happens there, because there code can wait. Errors stay
exceptions of ours: the middleware turns them into problem documents, so a handler of the application for
`CoatcheckError` comes first. Nothing about cookies may be decided here.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from fastapi import Depends
from fastapi.openapi.models import APIKey, APIKeyIn
from fastapi.requests import HTTPConnection
from fastapi.security import SecurityScopes
from fastapi.security.base import SecurityBase
from starlette.applications import Starlette

from coatcheck.errors import ConfigurationError, Forbidden
from coatcheck.manager import AsyncCoatcheck
from coatcheck.session import AsyncSession, Principal
from coatcheck.web.asgi import CoatcheckMiddleware, session_of

_NOT_IN_A_COMPONENT_NAME: Final = re.compile(r"[^A-Za-z0-9._-]")


class Auth:
    """The dependencies of one `AsyncCoatcheck`.

    `session`, `user` and `optional_user` are made once and stay the same objects, so `app.dependency_overrides`
    finds them. `sign_in_url` is where people sign in; the Authorize dialog of /docs then links to it. Several may
    live in one application, each with a cookie name of its own.
    """

    session: Callable[..., Awaitable[AsyncSession]]
    """Dependency: the loaded session of this request. Raises: StoreUnavailable."""

    user: Callable[..., Awaitable[Principal]]
    """Dependency: who is signed in, with the scopes of `Security(auth.user, scopes=[...])`. Raises: LoginRequired or
    SessionEnded (401), Forbidden (403) when a scope is missing, StoreUnavailable (503)."""

    optional_user: Callable[..., Awaitable[Principal | None]]
    """Dependency: who is signed in, or None. Raises: StoreUnavailable."""

    def __init__(self, coat: AsyncCoatcheck, *, sign_in_url: str | None = None) -> None:
        if not isinstance(coat, AsyncCoatcheck):
            raise ConfigurationError("coat: FastAPI needs an AsyncCoatcheck, Coatcheck is for WSGI")
        self.coat: AsyncCoatcheck = coat
        self.scheme: SessionScheme = SessionScheme(coat, sign_in_url=sign_in_url)
        self.session = _session(coat)
        self.user = _user(self.scheme)
        self.optional_user = _optional_user(self.session)

    def install(self, app: Starlette, *, exclude: Iterable[str] = ()) -> None:
        """Add the middleware to an application that has not started. A second time changes nothing.

        Raises: ConfigurationError when another installation uses the same cookie name.
        """
        name = self.coat.settings.session_cookie.name
        for present in app.user_middleware:
            other = present.kwargs.get("coat")
            if other is self.coat:
                return
            if isinstance(other, AsyncCoatcheck) and other.settings.session_cookie.name == name:
                raise ConfigurationError(
                    f"cookie: two installations in one application share the name {name!r}; give one of them "
                    "Settings(cookie=CookieSettings(name=...))"
                )
        app.add_middleware(CoatcheckMiddleware, coat=self.coat, exclude=tuple(exclude))


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


async def _load(coat: AsyncCoatcheck, connection: HTTPConnection) -> AsyncSession:
    session = session_of(connection.scope, coat=coat)
    await session.load()
    return session


def _session(coat: AsyncCoatcheck) -> Callable[..., Awaitable[AsyncSession]]:
    async def session(connection: HTTPConnection) -> AsyncSession:
        return await _load(coat, connection)

    return session


def _user(scheme: SessionScheme) -> Callable[..., Awaitable[Principal]]:
    async def user(scopes: SecurityScopes, session: AsyncSession = Depends(scheme)) -> Principal:
        principal = session.require_login()
        missing = [scope for scope in scopes.scopes if scope not in principal.scopes]
        if missing:
            raise Forbidden(f"scopes are missing: {' '.join(missing)}")
        return principal

    return user


def _optional_user(session: Callable[..., Awaitable[AsyncSession]]) -> Callable[..., Awaitable[Principal | None]]:
    async def optional_user(session: AsyncSession = Depends(session)) -> Principal | None:
        return session.principal

    return optional_user
