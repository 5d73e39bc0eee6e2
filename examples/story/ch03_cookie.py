"""Step 3: the cookie as a note on the forehead.

`plain()` believes `user=ratia` and so believes `user=admin` as well. `signed()` adds a signature: now nobody can
change the note, but the server cannot take it back either. A copy that somebody made before the logout works until it
runs out.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from examples.story.accounts import is_right

LIFETIME = 3600


class Credentials(BaseModel):
    username: str
    password: str


def plain() -> FastAPI:
    """A server that believes what it reads."""
    return _application(write=lambda user: user, read=lambda note: note)


def signed(key: bytes, *, clock: Callable[[], float] = time.time) -> FastAPI:
    """A server that signs the note and its expiry, and checks both."""

    def seal(text: str) -> str:
        return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()

    def write(user: str) -> str:
        text = f"{user}.{int(clock()) + LIFETIME}"
        return f"{text}.{seal(text)}"

    def read(note: str) -> str | None:
        text, _, mark = note.rpartition(".")
        if not hmac.compare_digest(mark.encode(), seal(text).encode()):
            return None
        user, _, expires = text.rpartition(".")
        return user if clock() < int(expires) else None

    return _application(write=write, read=read)


def _application(*, write: Callable[[str], str], read: Callable[[str], str | None]) -> FastAPI:
    app = FastAPI()

    @app.post("/login")
    async def login(credentials: Credentials) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        response = JSONResponse({"message": "Login successful"})
        response.set_cookie("user", write(credentials.username), max_age=LIFETIME, httponly=True, samesite="lax")
        return response

    @app.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        note = request.cookies.get("user")
        user = None if note is None else read(note)
        if user is None:
            return JSONResponse({"message": "Login required"}, status_code=401)
        return JSONResponse({"message": "Dashboard data", "user": {"name": user}})

    @app.post("/logout")
    async def logout() -> Response:
        response = JSONResponse({"message": "Logout complete"})
        response.delete_cookie("user")
        return response

    return app


if __name__ == "__main__":
    import secrets

    import uvicorn

    uvicorn.run(signed(secrets.token_bytes(32)), port=3000)
