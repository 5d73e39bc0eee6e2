"""`desk`: what an operation takes, over a memory store whose clock is handed in; stepped, because it never waits."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator, Mapping
from typing import Any, TypeVar, cast

import pytest

from coatcheck.blocking import run_blocking
from coatcheck.core.ids import IdKeys, SessionId, mint_session_id, owner_of, random_tag, subject_tag
from coatcheck.core.ports import RecordLimits, SessionStore
from coatcheck.core.session import Authority, NewSession, encode_authority
from coatcheck.operations.resume import LifeLimits
from coatcheck.stores.open import open_store
from coatcheck.testing import FakeSystem
from tests.web.faces import Store

T = TypeVar("T")
IDLE_US = 600_000_000
ABSOLUTE_US = 3_600_000_000
LIMITS = RecordLimits(octets=1000, fields=10)
LIFE = LifeLimits(idle_us=IDLE_US, absolute_us=ABSOLUTE_US)
SERVER_KEY = b"s" * 32


class Desk:
    """A store, its keys, and new sessions for it."""

    def __init__(self) -> None:
        self.system = FakeSystem()
        self.wrapped = Store(open_store("memory:", colour="blocking", system=self.system))
        self.store = cast(SessionStore, self.wrapped)
        self.run(self.store.open())
        self.keys: IdKeys = self.run(self.store.id_keys(IdKeys(b"t" * 32, b"c" * 32)))
        self.wrapped.forget()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_blocking(work)

    def new(
        self,
        subject: str | None = "50",
        *,
        fields: Mapping[str, str] | None = None,
        claims: Mapping[str, str] | None = None,
    ) -> tuple[SessionId, NewSession]:
        tag = random_tag(self.system.random(2)) if subject is None else subject_tag(self.keys, "", subject)
        id_ = mint_session_id(self.keys, tag=tag, handle=self.system.random(12), secret=self.system.random(24))
        return id_, NewSession(
            ref=id_.ref,
            digest=id_.digest,
            owner=owner_of("", subject),
            subject=subject or "",
            idle_us=IDLE_US,
            absolute_us=ABSOLUTE_US,
            authority=encode_authority(Authority(claims=claims or {})),
            fields=fields or {},
        )

    def created(self, subject: str | None = "50", **more: Any) -> SessionId:
        """A session that lives in the store."""
        id_, new = self.new(subject, **more)
        self.run(self.store.create(new))
        self.wrapped.forget()
        return id_


@pytest.fixture
def desk() -> Iterator[Desk]:
    """Nothing in it yet."""
    desk = Desk()
    yield desk
    desk.run(desk.store.close())
