"""Step 9: session fixation.

The attacker visits, gets a valid session id, and plants it in the victim's browser. The victim signs in. `naive()`
keeps the id and only writes the user into it, so the attacker is now signed in as well. Coatcheck gives every sign-in
a new session under a new id, and an id it never issued is never used.
"""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from coatcheck import AsyncCoatcheck
from examples.story.accounts import ROLE, USER_ID, is_right
from examples.story.dashboard_app import Credentials, create_app


def naive() -> FastAPI:
    """What the article's author built first. Do not copy it."""
    app = FastAPI()
    vault: dict[str, dict[str, Any]] = {}

    @app.middleware("http")
    async def session(request: Request, call_next: Any) -> Response:
        sid = request.cookies.get("SID") or secrets.token_urlsafe(16)
        request.state.session = vault.setdefault(sid, {})
        response: Response = await call_next(request)
        response.set_cookie("SID", sid)
        return response

    @app.post("/login")
    async def login(credentials: Credentials, request: Request) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        request.state.session.update(user_id=USER_ID, role=ROLE)
        return JSONResponse({"message": "Login successful"})

    @app.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        if "user_id" not in request.state.session:
            return JSONResponse({"message": "Login required"}, status_code=401)
        return JSONResponse({"message": "Dashboard data", "user": {"id": int(USER_ID), "role": ROLE}})

    return app


def regenerated(coat: AsyncCoatcheck) -> FastAPI:
    """The same routes on Coatcheck: the id changes at sign-in, nothing else is needed."""
    return create_app(coat)
