"""An admin panel whose second sign-in throws the first one out, and whose page says why.

Decides nothing about sessions: limits, lifetimes and the comparison of places are those of the profile `admin`. What
is left to the application are two addresses, a page, and the cookie by which it knows a browser again.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime, timedelta
from typing import Final

from flask import Flask, Response, make_response, redirect, render_template, request
from werkzeug.wrappers import Response as Answer

from coatcheck import Coatcheck, Profile, Session, Settings, device_of, settings_of
from coatcheck.session import SessionEnd
from coatcheck.web.wsgi import CoatcheckMiddleware, session_of
from examples.story.accounts import ROLE, USER_ID, is_right

ROW: Final = Profile.named("admin")
DEVICE_COOKIE: Final = "panel_device"

_WHY: Final = {
    "session_limit": "Signed in on another device",
    "idle_timeout": "Nobody has used this panel for a while",
    "absolute_timeout": "A sign-in lasts no longer than half a day",
    "logout": "Signed out",
}


def settings(public_url: str) -> Settings:
    """The row of the table, as settings."""
    return settings_of(ROW, Settings(public_url=public_url, device_cookie=DEVICE_COOKIE))


def create_app(coat: Coatcheck) -> Flask:
    """The panel."""
    app = Flask(__name__)
    app.wsgi_app = CoatcheckMiddleware(app.wsgi_app, coat)  # type: ignore[method-assign]

    @app.get("/")
    def panel() -> str | Answer:
        me = session().principal
        if me is None:
            return sign_in_page(why(session().ended), 401)
        return render_template("panel.html", me=me, session=session(), since=clock_time(me.auth_time))

    @app.post("/login")
    def login() -> Answer:
        if not is_right(request.form.get("username"), request.form.get("password")):
            return sign_in_page("Name or password are not right", 401)
        device = request.cookies.get(DEVICE_COOKIE) or secrets.token_urlsafe(24)
        session().login(USER_ID, claims={"role": ROLE}, device=device_of(device))
        answer = redirect("/", code=303)
        # It proves nothing; it only lets a sign-in with a browser never seen before be told from one at home.
        answer.set_cookie(
            DEVICE_COOKIE,
            device,
            max_age=timedelta(days=400),
            httponly=True,
            samesite="Lax",
            secure=coat.settings.is_https,
        )
        return answer

    @app.post("/logout")
    def logout() -> Answer:
        session().logout()
        return redirect("/", code=303)

    return app


def session() -> Session:
    """The session of the request Flask is handling."""
    return session_of(request.environ)


def sign_in_page(notice: str, status: int) -> Response:
    """The form, with a word on what happened."""
    return make_response(render_template("sign_in.html", notice=notice), status)


def why(end: SessionEnd | None) -> str:
    """What somebody reads whose session is over: what happened, when, and where the sign-in came from that took its
    place. Empty for who had none."""
    if end is None:
        return ""
    parts = [_WHY.get(end.reason, f"Ended: {end.reason}"), clock_time(end.at)]
    return ", ".join(parts if end.network is None else [*parts, end.network])


def clock_time(seconds: float) -> str:
    """Hour and minute, in one time zone for all: the two browsers may stand in different ones."""
    return f"{datetime.fromtimestamp(seconds, UTC):%H:%M} UTC"
