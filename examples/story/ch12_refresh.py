"""Step 12: a short access token and a long refresh token.

The access token lives for minutes in the memory of the page; the refresh token lies in an HttpOnly cookie and gets the
next one. `naive()` is the article's version. Its refresh token stays the same for seven days:

- **A copied cookie is good for seven days**, beside its owner's, and nobody ever notices.
- **Logout leaves the access token alive** for the rest of its quarter of an hour.
- **The store holds the tokens themselves**, so whoever reads it is signed in as everybody.

`on_coatcheck()` answers the same addresses. Each refresh token is exchanged once, and its successor replaces it. When
an exchanged one turns up again, somebody has a copy; which of the two is the thief nobody can tell, so the login ends
for both (RFC 9700 s4.14.2). Two tabs and a lost answer look like that for a moment, so within the reuse grace
(`TokenSettings.reuse_grace`) the predecessor is answered with the same successor. The store holds digests.

The article's diagram waits for a 401 and its code sends a 403; see step 10.

.venv/bin/python -m examples.story.ch12_refresh [naive]

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

import secrets
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from coatcheck import AsyncCoatcheck, AsyncSession, Principal, Settings, TokenSettings
from coatcheck.web.fastapi import Auth
from examples.story.accounts import ROLE, USER_ID, is_right
from examples.story.ch10_jwt import bearer, sign, verify
from examples.story.dashboard_app import Credentials

ACCESS_SECRET = b"access-secret"
REFRESH_SECRET = b"refresh-secret"
ACCESS_SECONDS = 15 * 60
REFRESH_SECONDS = 7 * 24 * 3600


def naive(*, clock: Callable[[], float] = time.time) -> FastAPI:
    """What the article's author built. Do not copy it."""
    app = FastAPI()
    refresh_tokens: dict[str, dict[str, Any]] = {}
    app.state.refresh_tokens = refresh_tokens

    def access_token() -> str:
        claims = {"userId": int(USER_ID), "role": ROLE, "exp": int(clock()) + ACCESS_SECONDS}
        return sign(claims, key=ACCESS_SECRET)

    @app.post("/login")
    async def login(credentials: Credentials) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        claims = {"userId": int(USER_ID), "tokenId": secrets.token_hex(16), "exp": int(clock()) + REFRESH_SECONDS}
        token = sign(claims, key=REFRESH_SECRET)
        refresh_tokens[token] = {"userId": int(USER_ID), "createdAt": clock()}
        response = JSONResponse({"accessToken": access_token()})
        response.set_cookie(
            "refreshToken", token, max_age=REFRESH_SECONDS, httponly=True, secure=True, samesite="strict"
        )
        return response

    @app.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        token = bearer(request)
        claims = None if token is None else verify(token, now=clock(), key=ACCESS_SECRET)
        if claims is None:
            return Response(status_code=401 if token is None else 403)
        user = {"userId": claims["userId"], "role": claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user})

    @app.post("/refresh")
    async def refresh(request: Request) -> Response:
        token = request.cookies.get("refreshToken")
        if token is None:
            return Response(status_code=401)
        if token not in refresh_tokens or verify(token, now=clock(), key=REFRESH_SECRET) is None:
            return Response(status_code=403)
        return JSONResponse({"accessToken": access_token()})

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        refresh_tokens.pop(request.cookies.get("refreshToken", ""), None)
        response = JSONResponse({"message": "Logout complete"})
        response.delete_cookie("refreshToken")
        return response

    return app


def settings(public_url: str) -> Settings:
    """The article's lifetimes: seven days without a visit, thirty in all, a quarter of an hour for an access token."""
    return Settings(
        public_url=public_url,
        idle_timeout=timedelta(days=7),
        absolute_timeout=timedelta(days=30),
        tokens=TokenSettings(access_lifetime=timedelta(minutes=15)),
    )


def on_coatcheck(coat: AsyncCoatcheck) -> FastAPI:
    """The same addresses on Coatcheck. `coat` needs `Settings(tokens=TokenSettings())`."""
    app = FastAPI()
    auth = Auth(coat)
    auth.install(app)

    @app.post("/login")
    async def login(credentials: Credentials, session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        await session.login(USER_ID, claims={"role": ROLE}, persistent=True)
        issued = await session.tokens()
        return JSONResponse({"accessToken": issued.access_token})

    @app.get("/dashboard")
    async def dashboard(me: Annotated[Principal, Depends(auth.user)]) -> Response:
        user = {"userId": int(me.subject), "role": me.claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user})

    @app.post("/refresh")
    async def refresh(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        issued = await session.refresh()
        return JSONResponse({"accessToken": issued.access_token})

    @app.post("/logout")
    async def logout(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        await session.logout()
        return JSONResponse({"message": "Logout complete"})

    return app


if __name__ == "__main__":
    import sys

    import uvicorn

    coat = AsyncCoatcheck("memory:", settings=settings("http://127.0.0.1:3000"))
    uvicorn.run(naive() if "naive" in sys.argv else on_coatcheck(coat), port=3000)
