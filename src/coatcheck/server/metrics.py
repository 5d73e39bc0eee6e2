"""Counters for operators, in the Prometheus format.

Decides their names (one prefix, base units) and that no label ever holds a user, an address or a session.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coatcheck import __version__
from coatcheck.core.session import SECOND_US
from coatcheck.events import Event
from coatcheck.stores.near import NearStore

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
        self.near_hits: Final = Gauge(
            "coatcheck_near_hits", "Checks answered from a near copy, about.", registry=self.registry
        )
        self.near_reads: Final = Gauge("coatcheck_near_reads", "Sessions read from the store.", registry=self.registry)
        self.near_copies: Final = Gauge(
            "coatcheck_near_copies", "Near copies and their places.", registry=self.registry
        )
        self.near_octets: Final = Gauge(
            "coatcheck_near_octets", "What near copies take, about.", registry=self.registry
        )
        self.near_staleness: Final = Gauge(
            "coatcheck_near_staleness_seconds",
            "How long ago the store was last heard of, for the line that was last used. Above the lease every check "
            "reads the store.",
            registry=self.registry,
        )
        self.store_clock_offset: Final = Gauge(
            "coatcheck_store_clock_offset_seconds", "The store's clock less this machine's.", registry=self.registry
        )
        self.reach: Final = Gauge(
            "coatcheck_reach_seconds",
            "How late after a revoke a session may still be accepted.",
            registry=self.registry,
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

    def set_near(self, near: NearStore, *, now_us: int) -> None:
        """What is known near, at this moment."""
        self.near_hits.set(near.hits)
        self.near_reads.set(near.reads)
        self.near_copies.set(len(near.table))
        self.near_octets.set(near.table.size)
        self.near_staleness.set(near.staleness)
        if near.reads:
            self.store_clock_offset.set((near.store_clock_us() - now_us) / SECOND_US)

    def render(self) -> bytes:
        """The text a scraper reads."""
        return generate_latest(self.registry)
