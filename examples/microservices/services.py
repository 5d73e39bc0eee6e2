"""Two services that hold no store and ask nobody: orders and payments.

Each accepts the tokens that name it as their audience and no others, so a token that orders has seen opens nothing at
payments. A `Verifier` checks them in memory; its one thread follows what the server revokes. Neither service must ever
ask the server anything on behalf of a request.

No postponed annotations here: FastAPI could not resolve `auth`, which is local to the function.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Final

import uvicorn
from fastapi import Depends, FastAPI, Response

from coatcheck import Principal, Verifier
from coatcheck.web.fastapi import Auth


def orders(verifier: Verifier) -> FastAPI:
    """What somebody has ordered."""
    app, auth = _service(verifier)

    @app.get("/orders")
    async def mine(me: Annotated[Principal, Depends(auth.user)]) -> dict[str, object]:
        return {"service": "orders", "of": me.subject, "session": me.sid}

    return app


def payments(verifier: Verifier) -> FastAPI:
    """Money leaves here, so nothing may rest on a list of revocations that is too old."""
    app, auth = _service(verifier)

    @app.post("/payments")
    async def pay(me: Annotated[Principal, Depends(auth.sensitive_user)]) -> dict[str, object]:
        return {"service": "payments", "by": me.subject, "session": me.sid}

    return app


SERVICES: Final[Mapping[str, Callable[[Verifier], FastAPI]]] = {"orders": orders, "payments": payments}
"""The services by their names, which are their audiences as well."""


def _service(verifier: Verifier) -> tuple[FastAPI, Auth]:
    app, auth = FastAPI(), Auth(verifier)
    auth.install(app)

    @app.get("/health")
    async def health() -> Response:
        """Whether tokens can be judged here at all."""
        return Response(status_code=204 if verifier.status.fresh else 503)

    return app, auth


def main() -> None:
    """Serve one of them: NAME PORT, the rest from the environment, where other users of this machine do not see it."""
    name, port = sys.argv[1:]
    server = os.environ["SERVER"]
    verifier = Verifier(
        os.environ["ISSUER"],
        audience=name,
        feed_credential=os.environ["FEED_CREDENTIAL"],
        # The issuer's public name is the gateway's; keys and revocations are fetched inside, from the server itself.
        jwks_url=f"{server}/.well-known/jwks.json",
        feed_url=f"{server}/revocations",
    )
    uvicorn.run(SERVICES[name](verifier), port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
