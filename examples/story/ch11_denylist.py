"""Step 11: a list of tokens that must not be accepted although they verify.

`naive()` is the article's blacklist: a set of token *texts*. It stops the text it was given and nothing else:

- **A respelled token walks past.** One token has many texts. The last character of an HS256 signature carries two bits
  that mean nothing, padding may be added, and of an ES256 signature `(r, s)` there is a twin `(r, n - s)` that verifies
  in the libraries we tried. The set knows one text; the check accepts them all.
- **Only who holds the text can put it there.** The security team of the article's story does not have it.
- **The other tokens of the same login are still good**, and nothing ever leaves the set.

`on_coatcheck()` denies by name. Every token carries `jti`, its own name, and `sid`, that of its session; both are under
the signature, so a token cannot be respelled around them, and of each token one spelling alone is accepted in the
first place. `POST /logout` ends the session: one entry, and every token of it is refused. `POST /deny` refuses this one
token, while the session goes on. Each entry goes when the last token it could mean has expired.

.venv/bin/python -m examples.story.ch11_denylist [naive]

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from coatcheck import AsyncCoatcheck, Principal, Settings, TokenSettings
from coatcheck.web.fastapi import Auth
from examples.story import ch10_jwt
from examples.story.accounts import ROLE, USER_ID, is_right
from examples.story.ch10_jwt import LIFETIME, bearer, sign, verify
from examples.story.dashboard_app import Credentials


def naive(*, clock: Callable[[], float] = time.time) -> FastAPI:
    """What the article's author built. Do not copy it."""
    app = FastAPI()
    blacklist: set[str] = set()
    app.state.blacklist = blacklist

    @app.post("/login")
    async def login(credentials: Credentials) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        claims = {"userId": int(USER_ID), "role": ROLE, "exp": int(clock()) + LIFETIME}
        return JSONResponse({"accessToken": sign(claims)})

    @app.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        token = bearer(request)
        if token in blacklist:
            return JSONResponse({"message": "Logged out token"}, status_code=403)
        claims = None if token is None else verify(token, now=clock())
        if claims is None:
            return Response(status_code=403)
        user = {"userId": claims["userId"], "role": claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user})

    @app.post("/logout")
    async def logout(request: Request) -> Response:
        token = bearer(request)
        if token is None or verify(token, now=clock()) is None:
            return Response(status_code=403)
        blacklist.add(token)
        return JSONResponse({"message": "Logout complete"})

    return app


def on_coatcheck(coat: AsyncCoatcheck) -> FastAPI:
    """Step 10's addresses, where logout already works, and one that denies a single token."""
    app = ch10_jwt.on_coatcheck(coat)
    auth = Auth(coat)

    @app.post("/deny")
    async def deny(me: Annotated[Principal, Depends(auth.user)], request: Request) -> Response:
        await coat.deny_token(bearer(request) or "")
        return JSONResponse({"message": "This token is refused from now on", "session": me.sid})

    return app


if __name__ == "__main__":
    import sys

    import uvicorn

    here = Settings(public_url="http://127.0.0.1:3000", tokens=TokenSettings())
    uvicorn.run(naive() if "naive" in sys.argv else on_coatcheck(AsyncCoatcheck("memory:", settings=here)), port=3000)
