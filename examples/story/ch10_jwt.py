"""Step 10: the server keeps nothing, the token says it all.

`naive()` is what the article's author built: who you are goes into a text (a JWT), the server signs it and forgets it.
Any server with the key can check it without asking anybody. The price stands in the tests beside this file:

- **Signed is not encrypted.** Anybody who holds the text reads it: base64 is a spelling, no lock.
- **It cannot be taken back.** `POST /logout` has nothing to delete. A copy works until the text itself says that it is
  over, and so does a role that was withdrawn meanwhile.
- **One key for signing and checking.** Whoever can check can sign. A key that is a phrase is guessed from one token,
  on the attacker's own machine, without one request.

`on_coatcheck()` answers the same addresses. Its token is signed with a private key that was drawn and not thought up
(ES256), and it names its session (`sid`), so ending the session ends the token.

**401, not 403.** The article answers 403 to a token that has expired or was changed. We answer 401 with
`WWW-Authenticate: Bearer error="invalid_token"` (RFC 6750 s3.1): "sign in, or refresh, and come again". 403 means "I
know who you are, and you may not", so a client that believes it gives up instead of refreshing; the article's own
diagram in chapter 12 waits for a 401 as well. 403 is left for a good token that lacks a scope.

.venv/bin/python -m examples.story.ch10_jwt [naive]

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

import hmac
import json
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse

from coatcheck import AsyncCoatcheck, AsyncSession, Principal, Settings, TokenSettings
from coatcheck.web.fastapi import Auth
from examples.story.accounts import ROLE, USER_ID, is_right
from examples.story.dashboard_app import Credentials

SECRET_KEY = b"super-secret-key-change-in-production"
LIFETIME = 3600


def sign(claims: dict[str, Any], *, key: bytes = SECRET_KEY) -> str:
    """A JWT by hand: HS256, header and payload in base64url. Do not copy it."""
    signed = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(claims)}"
    return f"{signed}.{_spell(hmac.digest(key, signed.encode(), 'sha256'))}"


def verify(token: str, *, now: float, key: bytes = SECRET_KEY) -> dict[str, Any] | None:
    """What a JWT says, if its signature is right and it has not expired. Do not copy it.

    It decodes the signature before it compares, as most libraries do; step 11 shows what that is good for.
    """
    try:
        header, payload, signature = token.split(".")
        wanted = hmac.digest(key, f"{header}.{payload}".encode(), "sha256")
        if not hmac.compare_digest(_decode(signature), wanted):
            return None
        claims: dict[str, Any] = json.loads(_decode(payload))
    except ValueError:
        return None
    return claims if now < claims["exp"] else None


def bearer(request: Request) -> str | None:
    """The text behind `Authorization: Bearer`, as the article finds it."""
    words = request.headers.get("authorization", "").split(" ")
    return words[1] if len(words) > 1 else None


def naive(*, clock: Callable[[], float] = time.time) -> FastAPI:
    """What the article's author built. Do not copy it."""
    app = FastAPI()

    @app.post("/login")
    async def login(credentials: Credentials) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        claims = {"userId": int(USER_ID), "role": ROLE, "exp": int(clock()) + LIFETIME}
        return JSONResponse({"accessToken": sign(claims)})

    @app.get("/dashboard")
    async def dashboard(request: Request) -> Response:
        token = bearer(request)
        if token is None:
            return Response(status_code=401)
        claims = verify(token, now=clock())
        if claims is None:
            return Response(status_code=403)
        user = {"userId": claims["userId"], "role": claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user})

    @app.post("/logout")
    async def logout() -> Response:
        # Nothing is kept here, so there is nothing to delete: the client is asked to forget.
        return JSONResponse({"message": "Logout complete"})

    return app


def on_coatcheck(coat: AsyncCoatcheck) -> FastAPI:
    """The same addresses on Coatcheck. `coat` needs `Settings(tokens=TokenSettings())`."""
    app = FastAPI()
    auth = Auth(coat)
    auth.install(app)

    @app.post("/login")
    async def login(credentials: Credentials, session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        if not is_right(credentials.username, credentials.password):
            return JSONResponse({"message": "Authentication failed"}, status_code=401)
        await session.login(USER_ID, claims={"role": ROLE})
        issued = await session.tokens(carrier="body")
        # This client has a token and wants no cookie; step 12 is for browsers.
        session.withhold_cookies()
        return JSONResponse({"accessToken": issued.access_token})

    @app.get("/dashboard")
    async def dashboard(me: Annotated[Principal, Depends(auth.user)]) -> Response:
        user = {"userId": int(me.subject), "role": me.claims["role"]}
        return JSONResponse({"message": "Dashboard data", "user": user})

    @app.post("/logout")
    async def logout(session: Annotated[AsyncSession, Depends(auth.session)]) -> Response:
        await session.logout()
        return JSONResponse({"message": "Logout complete"})

    return app


def _encode(value: object) -> str:
    return _spell(json.dumps(value, separators=(",", ":")).encode())


def _spell(octets: bytes) -> str:
    return urlsafe_b64encode(octets).decode().rstrip("=")


def _decode(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


if __name__ == "__main__":
    import sys

    import uvicorn

    here = Settings(public_url="http://127.0.0.1:3000", tokens=TokenSettings())
    uvicorn.run(naive() if "naive" in sys.argv else on_coatcheck(AsyncCoatcheck("memory:", settings=here)), port=3000)
