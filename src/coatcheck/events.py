"""What happened, as frozen records with one envelope.

Decides the names of events and the form they leave in. An event never carries a secret: sessions are named by
`sid`, never by their id. Operations return events with their outcome; only the engine publishes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

ENVELOPE_VERSION: Final = 1

EventKind = Literal[
    "session.created",
    "session.signed_in",
    "session.rotated",
    "session.ended",
    "session.limit_reached",
    "session.limit_overruled",
    "session.eviction_contest",
    "session.sign_out_kept",
    "session.record_unreadable",
    "session_id.duplicated",
    "session_id.forged",
    "session_id.replaced",
    "token.issued",
    "token.denied",
    "refresh.exchanged",
    "refresh.reused",
    "refresh.wrong_holder",
    "key.published",
    "key.withdrawn",
    "request.cross_origin_refused",
    "store.unavailable",
    "risk.decided",
    "login.failed",
    "login.throttled",
    "account.created",
    "account.disabled",
    "account.enabled",
    "account.unlocked",
    "account.password_changed",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing that happened.

    `at` is Unix seconds by the store's clock where a store answered, else by the node's. `data` holds plain text
    and numbers only, bounded by whoever made the event.
    """

    kind: EventKind
    at: float
    sid: str | None = None
    subject: str | None = None
    data: Mapping[str, str | int | float | bool] = field(default_factory=dict)

    def envelope(self) -> dict[str, object]:
        """The form that leaves the process (logs, audit table, hooks), version 1 of the envelope."""
        return {
            "v": ENVELOPE_VERSION,
            "type": self.kind,
            "at": round(self.at, 6),
            "sid": self.sid,
            "subject": self.subject,
            "data": dict(self.data),
        }
