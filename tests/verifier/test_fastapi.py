"""FastAPI over a `Verifier`: dependencies and their description.

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

from typing import Annotated

from fastapi import Depends, FastAPI, Security
from fastapi.testclient import TestClient

from coatcheck import AsyncSession, Principal
from coatcheck.web.fastapi import Auth
from tests.verifier.issuer import Bench


def test_fastapi_gives_the_principal_and_describes_the_bearer(bench: Bench) -> None:
    auth = Auth(bench.ready())
    app = FastAPI()
    auth.install(app)
    auth.install(app)

    @app.get("/me")
    async def me(user: Annotated[Principal, Depends(auth.user)]) -> str:
        return f"{user.subject} {user.sid}"

    @app.get("/orders")
    async def orders(user: Annotated[Principal, Security(auth.user, scopes=["orders"])]) -> str:
        return user.subject

    @app.get("/maybe")
    async def maybe(user: Annotated[Principal | None, Depends(auth.optional_user)]) -> bool:
        return user is not None

    @app.get("/transfer")
    async def transfer(user: Annotated[Principal, Depends(auth.sensitive_user)]) -> str:
        return user.subject

    @app.get("/session")
    async def session(session: Annotated[AsyncSession, Depends(auth.session)]) -> None:
        """Never gets there."""

    assert len(app.user_middleware) == 1
    with TestClient(app, raise_server_exceptions=False) as client:
        good = {"Authorization": f"Bearer {bench.mint()}"}
        assert client.get("/me", headers=good).json() == "50 the-session"
        assert client.get("/me").json()["code"] == "login_required"
        assert client.get("/orders", headers=good).headers["www-authenticate"].endswith('scope="orders"')
        assert client.get("/maybe").json() is False
        assert client.get("/maybe", headers={"Authorization": "Bearer x"}).status_code == 401
        assert client.get("/transfer", headers=good).json() == "50"
        assert client.get("/session", headers=good).status_code == 500
        described = client.get("/openapi.json").json()
    assert described["components"]["securitySchemes"]["access_token"]["scheme"] == "bearer"
    assert described["paths"]["/orders"]["get"]["security"] == [{"access_token": ["orders"]}]
