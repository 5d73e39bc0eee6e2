"""Counters for operators, in the Prometheus format.

Decides their names (one prefix, base units) and that no label ever holds a user, an address or a session.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coatcheck import __version__
from coatcheck.events import Event

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_REASONS: Final = frozenset(
    {
        "logout",
        "superseded",
        "session_limit",
        "idle_timeout",
        "absolute_timeout",
        "ended_by_user",
        "password_changed",
        "account_disabled",
        "refresh_reused",
    }
)


class Metrics:
    """One process's counters."""

    def __init__(self) -> None:
        self.registry: Final = CollectorRegistry()
        self.events: Final = Counter("coatcheck_events", "What happened, by kind.", ["kind"], registry=self.registry)
        self.logins: Final = Counter(
            "coatcheck_logins", "Sign-in attempts.", ["method", "result"], registry=self.registry
        )
        self.refreshes: Final = Counter(
            "coatcheck_token_refreshes", "Refresh tokens that were presented.", ["result"], registry=self.registry
        )
        self.reuse: Final = Counter(
            "coatcheck_refresh_reuse_detected", "Consumed refresh tokens that came again.", registry=self.registry
        )
        self.ended: Final = Counter(
            "coatcheck_sessions_ended", "Sessions that were ended, by reason.", ["reason"], registry=self.registry
        )
        self.requests: Final = Histogram(
            "coatcheck_request_duration_seconds", "Answered requests.", ["route", "status"], registry=self.registry
        )
        self.hash_queue: Final = Gauge(
            "coatcheck_password_hash_queue", "Password hashes under way or waiting.", registry=self.registry
        )
        self.audit_dropped: Final = Gauge(
            "coatcheck_audit_events_dropped", "Events the audit log never got.", registry=self.registry
        )
        Gauge("coatcheck_build_info", "This release.", ["version"], registry=self.registry).labels(__version__).set(1)

    def count(self, event: Event) -> None:
        """Count one event."""
        self.events.labels(event.kind).inc()
        match event.kind:
            case "session.signed_in":
                self.logins.labels("password", "ok").inc()
            case "login.failed":
                self.logins.labels("password", "failed").inc()
            case "login.throttled":
                self.logins.labels("password", "throttled").inc()
            case "refresh.exchanged":
                self.refreshes.labels(str(event.data.get("how", ""))).inc()
            case "refresh.reused":
                self.refreshes.labels("reused").inc()
                self.reuse.inc()
            case "session.ended":
                # Reasons may be an operator's own words: those are one label together.
                reason = str(event.data.get("reason", ""))
                self.ended.labels(reason if reason in _REASONS else "other").inc()
            case _:
                pass

    def render(self) -> bytes:
        """The text a scraper reads."""
        return generate_latest(self.registry)
