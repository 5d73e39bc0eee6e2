"""Step 5: the session. The server keeps a vault in its memory, the browser gets a meaningless key to it."""

from __future__ import annotations

from typing import Any

from flask import Flask, request

from coatcheck import Coatcheck, Session, Settings
from coatcheck.web.wsgi import CoatcheckMiddleware, session_of
from examples.story.accounts import ROLE, USER_ID, is_right


def create_app(coat: Coatcheck) -> Flask:
    """The article's application, in Flask."""
    app = Flask(__name__)
    app.wsgi_app = CoatcheckMiddleware(app.wsgi_app, coat)  # type: ignore[method-assign]

    @app.post("/login")
    def login() -> Any:
        sent = request.get_json()
        if not is_right(sent.get("username"), sent.get("password")):
            return {"message": "Authentication failed"}, 401
        session().login(USER_ID, claims={"role": ROLE})
        return {"message": "Login successful"}

    @app.get("/dashboard")
    def dashboard() -> Any:
        principal = session().principal
        if principal is None:
            return {"message": "Login required"}, 401
        return {"message": "Dashboard data", "user": {"id": int(principal.subject), "role": principal.claims["role"]}}

    @app.post("/logout")
    def logout() -> Any:
        session().logout()
        return {"message": "Logout complete"}

    return app


def session() -> Session:
    """The session of the request Flask is handling."""
    return session_of(request.environ)


if __name__ == "__main__":
    create_app(Coatcheck("memory:", settings=Settings(public_url="http://127.0.0.1:3000"))).run(port=3000)
