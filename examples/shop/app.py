"""A shop whose page keeps its access token in memory, and whose customers see and end the devices they use.

Decides nothing about sessions and tokens: those are the profile `b2c`. The addresses below `/api/` answer what the
browser client (`js/`) asks for, so the page has to know nothing of refreshing. A token must never be written where a
script could find it again: no storage, no cookie that scripts see, no page.

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

import secrets
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    IssuedTokens,
    Principal,
    Profile,
    Settings,
    TokenSettings,
    device_name,
    device_of,
    settings_of,
)
from coatcheck.errors import InvalidCredentials, NotFound
from coatcheck.web.fastapi import Auth
from examples.story.accounts import USER_ID, is_right

ROW: Final = Profile.named("b2c")
DEVICE_COOKIE: Final = "shop_device"

_PAGES: Final = Path(__file__).parent / "pages"
# The page runs no script but its own, and nobody frames it: a token in memory is safe from thieves who come later, not
# from a stranger's script inside the page.
_PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "cache-control": "no-cache",
}


class Credentials(BaseModel):
    username: str
    password: str


class Order(BaseModel):
    item: str


def settings(public_url: str) -> Settings:
    """The row of the table, as settings."""
    return settings_of(ROW, Settings(public_url=public_url, device_cookie=DEVICE_COOKIE, tokens=TokenSettings()))


def create_app(coat: AsyncCoatcheck) -> FastAPI:
    """The shop."""
    app = FastAPI()
    auth = Auth(coat)
    auth.install(app)
    bought: dict[str, list[str]] = {}

    @app.post("/api/login")
    async def login(
        sent: Credentials, request: Request, session: Annotated[AsyncSession, Depends(auth.session)]
    ) -> Response:
        if not is_right(sent.username, sent.password):
            raise InvalidCredentials
        device = request.cookies.get(DEVICE_COOKIE) or secrets.token_urlsafe(24)
        await session.login(USER_ID, claims={"name": sent.username}, persistent=True, device=device_of(device))
        answer = JSONResponse(_members(await session.tokens()))
        answer.set_cookie(
            DEVICE_COOKIE,
            device,
            max_age=int(timedelta(days=400).total_seconds()),
            httponly=True,
            samesite="lax",
            secure=coat.settings.is_https,
        )
        return answer

    @app.post("/api/refresh")
    async def refresh(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        return JSONResponse(_members(await session.refresh()))

    @app.post("/api/logout")
    async def logout(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        await session.logout()
        return JSONResponse({"message": "Signed out"})

    @app.get("/api/orders")
    async def orders(me: Annotated[Principal, Depends(auth.user)]) -> Response:
        return JSONResponse({"name": me.claims["name"], "orders": bought.get(me.subject, [])})

    @app.post("/api/orders")
    async def buy(order: Order, me: Annotated[Principal, Depends(auth.user)]) -> Response:
        bought.setdefault(me.subject, []).append(order.item)
        return JSONResponse({"orders": bought[me.subject]})

    @app.get("/api/sessions")
    async def devices(me: Annotated[Principal, Depends(auth.user)]) -> Response:
        found = await coat.list_sessions(me.subject)
        return JSONResponse(
            [
                {
                    "sid": each.sid,
                    "device": device_name(each.user_agent),
                    "network": each.network,
                    "since": each.created_at,
                    "current": each.sid == me.sid,
                }
                for each in found.items
            ]
        )

    @app.delete("/api/sessions/{sid}")
    async def end(sid: str, me: Annotated[Principal, Depends(auth.user)]) -> Response:
        # Looked for among one's own: a stranger's handle is as unknown as an invented one.
        if sid not in {each.sid for each in (await coat.list_sessions(me.subject)).items}:
            raise NotFound
        await coat.revoke_session(sid, reason="ended_by_user")
        return JSONResponse({"ended": 1})

    @app.get("/")
    async def page() -> Response:
        return Response((_PAGES / "shop.html").read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    @app.get("/shop.js")
    async def script() -> Response:
        return Response((_PAGES / "shop.js").read_bytes(), media_type="text/javascript", headers=_PAGE_HEADERS)

    @app.get("/coatcheck.js")
    async def client() -> Response:
        """The browser client, as the package brings it."""
        found = files("coatcheck.server").joinpath("static", "coatcheck.js").read_bytes()
        return Response(found, media_type="text/javascript", headers=_PAGE_HEADERS)

    return app


def _members(issued: IssuedTokens) -> dict[str, Any]:
    return {"access_token": issued.access_token, "token_type": "Bearer", "expires_in": issued.expires_in}
