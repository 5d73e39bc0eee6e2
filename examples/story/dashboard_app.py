"""The article's three routes over any store, in FastAPI: steps 6 to 9 use it.

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

from typing import Annotated

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from coatcheck import AsyncCoatcheck, AsyncSession, Principal
from coatcheck.web.fastapi import Auth
from examples.story.accounts import ROLE, USER_ID, is_right


class Credentials(BaseModel):
    username: str
    password: str


def create_app(coat: AsyncCoatcheck, *, server: str = "A") -> FastAPI:
    """One server; `server` is what it calls itself in its answers."""
    app = FastAPI()
    auth = Auth(coat)
    auth.install(app)

    @app.post("/login")
    async def login(credentials: Credentials, session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        await session.login(USER_ID, claims={"role": ROLE}, keep=("cart",))
        return JSONResponse({"message": "Login successful", "server": server})

    @app.post("/cart/{item}")
    async def add(item: str, session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        cart = session.get("cart")
        session["cart"] = [*(cart if isinstance(cart, list) else []), item]
        return JSONResponse({"cart": session["cart"], "server": server})

    @app.get("/dashboard")
    async def dashboard(me: Annotated[Principal | None, Depends(auth.optional_user)]) -> Response:
        if me is None:
            return JSONResponse({"message": "Login required", "server": server}, status_code=401)
        user = {"id": int(me.subject), "role": me.claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user, "server": server})

    @app.post("/logout")
    async def logout(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        await session.logout()
        return JSONResponse({"message": "Logout complete"})

    return app
