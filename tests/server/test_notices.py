"""What the owner of an account is told: his own events, the latest ones, in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from coatcheck.core.binding import OUTCOMES
from coatcheck.core.session import MAX_SUBJECT_BYTES
from coatcheck.errors import ValueRefused
from coatcheck.events import Event, EventKind
from coatcheck.server.audit import MAX_READ, AuditLog
from coatcheck.server.notices import MAX_TOLD, TOLD, TOLD_FOR, told_to_owner
from coatcheck.server.texts import Language
from tests.server.account_parts import opened
from tests.server.conftest import Site

pytestmark = pytest.mark.anyio

AT = 1_800_000_000.25
ME, OTHER = "U" * 22, "V" * 22


def event(number: int = 0, *, subject: str | None = ME, kind: EventKind = "risk.decided", at: float = AT) -> Event:
    return Event(kind=kind, at=at, subject=subject, data={"number": number})


async def numbers(log: AuditLog, **asked: Any) -> list[object]:
    asked = {"kinds": TOLD, "since": 0.0, **asked}
    found = await log.of_subject(ME, **asked)
    data: list[Any] = [each.envelope["data"] for each in found]
    return [each["number"] for each in data]


async def test_the_latest_come_first_and_nobody_elses_at_all(log: AuditLog) -> None:
    await log.append(
        [
            event(1),
            event(2, subject=OTHER),
            event(3, subject=None),
            event(4, kind="session.signed_in"),
            event(5, kind="session.limit_overruled", at=AT + 1),
            event(6),
        ]
    )
    assert await numbers(log) == [5, 6, 1]
    assert await numbers(log, limit=1) == [5]
    assert await numbers(log, kinds=("session.signed_in",)) == [4]


@pytest.mark.parametrize(("since", "found"), [(AT, [1]), (AT + 0.000001, [])])
async def test_the_beginning_of_the_time_counts_to_the_microsecond(
    log: AuditLog, since: float, found: list[int]
) -> None:
    await log.append([event(1)])
    assert await numbers(log, since=since) == found


@pytest.mark.parametrize("asked", [{"limit": 0}, {"limit": MAX_READ + 1}, {"kinds": ()}])
async def test_a_question_outside_the_bounds_is_refused(log: AuditLog, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueRefused):
        await numbers(log, **asked)


@pytest.mark.parametrize("subject", ["x" * MAX_SUBJECT_BYTES, "x" * 9000, "a\x00b", "a\ud800b", "a\nb", "한" * 255])
async def test_no_subject_keeps_an_event_out_of_the_log(log: AuditLog, subject: str) -> None:
    # An index has a longest entry and text its characters; an event that cannot be written would hold up all others.
    await log.append([event(1, subject=subject), event(2)])
    assert len(await log.read()) == 2
    assert await numbers(log) == [2]


async def test_it_is_found_by_an_index_and_not_by_reading_the_log(tmp_path: Path) -> None:
    # PostgreSQL reads a small table whole, whatever indexes it has; the index is the same.
    async with opened(f"sqlite:///{tmp_path / 'log.db'}") as database:
        plan = await database.fetch(
            "explain query plan select position, envelope from {namespace}_audit where subject = ? "
            "and type in (?, ?, ?) and at_us >= ? order by at_us desc, position desc limit ?",
            ME,
            *TOLD,
            0,
            MAX_TOLD,
        )
    assert "using index coatcheck_audit_of_subject (subject=? and type=? and at_us>?)" in str(plan).lower()


# -- the words -----------------------------------------------------------------------------------------------------

DECIDED: list[dict[str, str | int | float | bool]] = [
    {"judged": "request", "outcome": outcome, "differs": "network", "network": "198.51.100.0/24"}
    for outcome in OUTCOMES
]
OTHERS: list[tuple[dict[str, str | int | float | bool], str]] = [
    ({"judged": "request", "outcome": "notify", "new_family": "6", "network": "2001:db8::/64"}, "2001:db8::/64"),
    ({"judged": "sign_in", "outcome": "step_up", "reasons": "new_country new_device"}, "country"),
    ({"judged": "sign_in_failed", "outcome": "block", "reasons": "velocity", "network": "198.51.100.0/24"}, "Wrong"),
    ({"judged": "sign_in", "outcome": "notify", "reasons": "of a newer release"}, "unusual"),
    ({"judged": "request", "outcome": "block", "differs": "device", "device": "none"}, "another browser"),
    ({"judged": "request", "outcome": "a newer one"}, ""),
    ({"truncated": True}, ""),
    ({}, ""),
]


@pytest.mark.parametrize("language", get_args(Language))
def test_every_event_that_is_told_has_words_and_says_where(site: Site, language: Language) -> None:
    user = site.add_user()
    at = site.clock.now_us() / 1e6
    texts = []
    for data in [*DECIDED, *(data for data, _ in OTHERS)]:
        site.call(site.service.audit.append, [Event(kind="risk.decided", at=at, subject=user.id, data=data)])
        (told,) = site.call(told_to_owner, site.service, user.id, language)[:1]
        texts.append(told.text)
        at += 1
        site.clock.advance(1)
    assert all("198.51.100.0/24" in text for text in texts[: len(DECIDED)])
    if language == "en":
        for (_, words), text in zip(OTHERS, texts[len(DECIDED) :], strict=True):
            assert words in text
        assert len(set(texts)) >= len(OUTCOMES)
    kinds: tuple[EventKind, ...] = ("session.limit_overruled", "session.eviction_contest")
    for kind in kinds:
        ended: dict[str, str | int | float | bool] = {"ended": 2, "network": "198.51.100.23"}
        site.call(site.service.audit.append, [Event(kind=kind, at=at, subject=user.id, data=ended)])
        assert "198.51.100.23" in site.call(told_to_owner, site.service, user.id, language)[0].text
        at += 1


def test_only_the_latest_are_told_and_old_ones_are_forgotten(site: Site) -> None:
    user = site.add_user()
    now = site.clock.now_us() / 1e6
    data = {"judged": "request", "outcome": "block", "network": "198.51.100.0/24"}
    oldest = now - TOLD_FOR.total_seconds()
    told = [Event(kind="risk.decided", at=oldest + number, subject=user.id, data=data) for number in (-1, 0)]
    site.call(site.service.audit.append, told)
    assert len(site.call(told_to_owner, site.service, user.id, "en")) == 1
    site.call(site.service.audit.append, told[1:] * MAX_TOLD)
    assert len(site.call(told_to_owner, site.service, user.id, "en")) == MAX_TOLD
