"""Step 8: the attributes of the cookie, and what each one stops.

| attribute | stops |
|---|---|
| HttpOnly | a planted script that reads `document.cookie` (XSS) |
| Secure | somebody on the same wireless network who listens |
| SameSite | another site that sends a form with your cookie (CSRF) |
| `__Host-` in the name | a sibling host that plants its own cookie under this name |

A combination that contradicts itself is refused where it is written down, not silently by the browser later.
"""

from __future__ import annotations

from datetime import timedelta

from fastapi import FastAPI

from coatcheck import AsyncCoatcheck, CookieSettings, Settings
from examples.story.dashboard_app import create_app

SAFE = CookieSettings()
"""`__Host-Http-session`: Secure, HttpOnly, SameSite=Lax, Path=/, no Domain."""

STRICT = CookieSettings(same_site="Strict")
"""For a bank: not sent when somebody arrives by a link; that visitor looks signed out."""

SHARED = CookieSettings(name="__Secure-session", domain="example.com", max_age=timedelta(days=7))
"""The article's example: shared across subdomains for seven days. Every host below example.com can read and plant it,
so the `__Host-` prefix is gone."""

EMBEDDED = CookieSettings(same_site="None", partitioned=True)
"""For a widget inside other sites: None needs Secure, and Partitioned keeps one cookie per embedding site."""


def create(cookie: CookieSettings) -> FastAPI:
    """The dashboard with one of these cookies."""
    return create_app(AsyncCoatcheck("memory:", settings=Settings(cookie=cookie)))
