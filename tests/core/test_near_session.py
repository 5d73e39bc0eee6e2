"""What is unpacked is what was packed, it stays small, and it never holds an id."""

from __future__ import annotations

import gc
import sys
import threading
import tracemalloc
from array import array
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.freshness import Fill, Line, NearTable
from coatcheck.core.ids import GROUP_OF, KEY_OF, IdKeys, SessionRef, mint_session_id, owner_of
from coatcheck.core.near_session import MARK, UNMARKED, NearSession, pack, unpack
from coatcheck.core.session import NewSession, StoredSession
from coatcheck.primitives.digest import sha256_text

KEYS = IdKeys(b"t" * 32, b"c" * 32)
ID = mint_session_id(KEYS, tag=0xBEEF, handle=b"h" * 12, secret=b"s" * 24)
FILL = Fill(Line(5.0), 100.0, 0)

SIGNED_IN = NewSession(
    ref=ID.ref,
    digest=ID.digest,
    owner=owner_of("", "ann"),
    subject="ann",
    idle_us=3_600_000_000,
    absolute_us=86_400_000_000,
    authority='{"acr":"gold"}',
    fields={"cart": "[1,2]", "ü": '"☃"'},
).at(1_800_000_000_000_000)
ANONYMOUS = replace(SIGNED_IN, owner="", subject="", auth_us=0, authority="{}", fields={})


def packed(session: StoredSession, *, seen_us: int = 7) -> NearSession:
    near = pack(session, fill=FILL, seen_us=seen_us, until=200.0, ends=300.0)
    assert near is not None
    return near


# Text of any script that has a form in UTF-8.
texts = st.text(st.characters(codec="utf-8"), max_size=30)
# Pieces of what is shortened, and the signs that stand for them.
pieces = st.sampled_from(
    [
        '{"authentications":[["',
        ']],"amr":["',
        '"],"claims":{"',
        '":"\\"',
        '\\"","',
        '\\""}',
        '"user_agent":"',
        '"networks":{"',
        '"profile":"',
        '"persistent":true',
        "\\",
        '"',
        "é",
        "\x7f",
        *map(chr, range(32)),
    ]
)
authorities = texts | st.lists(pieces, max_size=12).map("".join)
moments = st.integers(min_value=0, max_value=2**63 - 1)
digests = st.binary(min_size=32, max_size=32).map(lambda raw: sha256_text(raw))


@given(
    session=st.builds(
        StoredSession,
        schema=st.integers(min_value=1, max_value=9),
        version=moments,
        ref=st.just(ID.ref),
        digest=digests,
        owner=digests,
        subject=texts.filter(bool),
        created_us=moments,
        auth_us=moments,
        idle_us=moments,
        absolute_us=moments,
        authority=authorities,
        fields=st.dictionaries(texts, texts, max_size=5),
    ),
    anonymous=st.booleans(),
)
def test_unpacking_makes_the_very_record_that_was_packed(session: StoredSession, anonymous: bool) -> None:
    if anonymous:
        session = replace(session, owner="", subject="")
    near = packed(session)
    assert unpack(near, session.ref.handle) == session
    assert near.subject == (None if anonymous else session.subject)


@pytest.mark.parametrize("sign", [chr(code) for code in range(32)])
def test_an_authority_that_begins_with_a_sign_of_ours_is_not_read_as_one(sign: str) -> None:
    for authority in (sign, sign + SIGNED_IN.authority, sign + sign):
        session = replace(SIGNED_IN, authority=authority)
        assert unpack(packed(session), ID.ref.handle) == session


@pytest.mark.parametrize("seen_us", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_the_last_activity_can_be_moved_and_nothing_else_moves_with_it(seen_us: int) -> None:
    near = packed(SIGNED_IN, seen_us=seen_us)
    assert near.seen_us == seen_us
    near.seen_us = 9
    assert near.seen_us == 9
    near.seen_us = seen_us
    assert near.seen_us == seen_us
    assert unpack(near, ID.ref.handle) == SIGNED_IN


@pytest.mark.parametrize("seen_us", [-1, 2**64])
def test_a_last_activity_that_no_clock_tells_is_not_kept(seen_us: int) -> None:
    assert pack(SIGNED_IN, fill=FILL, seen_us=seen_us, until=200.0, ends=300.0) is None


@pytest.mark.parametrize("tag", [0, 1, 0xFFFF])
def test_the_place_of_the_session_comes_back(tag: int) -> None:
    session = replace(SIGNED_IN, ref=SessionRef(tag, ID.ref.handle))
    assert unpack(packed(session), ID.ref.handle).ref == session.ref


def test_a_copy_says_what_most_requests_ask_for_without_being_unpacked() -> None:
    near = packed(SIGNED_IN)
    assert (near.subject, near.seen_us, near.until, near.ends) == ("ann", 7, 200.0, 300.0)
    assert (near.line, near.since) == (FILL.line, 100.0)
    assert near.digest == sha256(ID.text.encode()).digest()


def test_a_copy_holds_neither_the_id_nor_its_secret_part() -> None:
    near = packed(SIGNED_IN)
    assert ID.text.encode() not in near.packed
    assert ID.text[20:52].encode() not in near.packed
    assert b"s" * 24 not in near.packed
    assert ID.text not in repr(near)


@pytest.mark.parametrize(
    "strange",
    [
        {"owner": "abcde"},
        {"owner": "!" * 43},
        {"owner": "ü" * 43},
        {"owner": "A" * 42},
        {"owner": "A" * 44},
        {"owner": "A" * 43 + "="},
        {"owner": "A" * 42 + "B"},
        {"owner": " " + "A" * 42},
        {"digest": "short"},
        {"digest": "A" * 42 + "\n"},
        {"digest": ID.digest + "A"},
        {"owner": "", "subject": "ann"},
    ],
    ids=repr,
)
def test_a_record_that_somebody_wrote_by_hand_is_not_kept(strange: dict[str, str]) -> None:
    session = replace(SIGNED_IN, **strange)  # type: ignore[arg-type]
    assert pack(session, fill=FILL, seen_us=7, until=200.0, ends=300.0) is None


def test_copies_share_no_fields_with_the_record_or_with_each_other() -> None:
    fields = dict(SIGNED_IN.fields)
    near = packed(replace(SIGNED_IN, fields=fields))
    fields["cart"] = "changed"
    first, second = unpack(near, ID.ref.handle), unpack(near, ID.ref.handle)
    assert first.fields["cart"] == "[1,2]"
    assert first.fields is not second.fields


@pytest.mark.parametrize("session", [SIGNED_IN, ANONYMOUS], ids=["signed in", "anonymous"])
def test_a_copy_is_counted_with_at_least_what_it_takes(session: StoredSession) -> None:
    near = packed(session)
    parts = (near, near.digest, near.packed, near.subject, near.seen_us, near.until, near.ends, near.since, near.size)
    assert near.size >= sum(sys.getsizeof(part) for part in parts if part is not None)
    assert near.size <= 600 + len(near.packed)


# Just so many that the dictionary has grown for the last of them, which is when it has most room to spare.
MANY = 21_900
FEWER = 2_740
"""The same, an eighth as many: for what need not be weighed to the octet."""


def as_read(number: int, subject: str) -> StoredSession:
    """A session as a store's answer brings it: nothing in it is shared with another. With three claims, two fields."""
    return replace(
        SIGNED_IN,
        ref=SessionRef(number % 0x10000, urlsafe_b64encode(number.to_bytes(12, "big")).decode("ascii")),
        digest=sha256_text(b"%d" % number),
        owner=owner_of("", subject),
        subject=subject,
        auth_us=SIGNED_IN.created_us,
        absolute_us=SIGNED_IN.created_us + 43_200_000_000,
        authority='{"authentications":[["pwd",1795473388.554764,1]],"amr":["pwd"],"claims":'
        '{"role":"\\"editor\\"","plan":"\\"team\\"","lang":"\\"ko\\""}}',
        fields={"cart": '"3.41.c7f0"', "theme": '"dark"'},
    )


def read(table: NearTable[NearSession], line: Line, numbers: range, *, subject: str = "u%07d") -> None:
    for number in numbers:
        session, at = as_read(number, subject % number), 100.0 + number / MANY
        key = session.ref.handle.encode("ascii")
        fill = table.begin(key, line, at, slot=0 if line.marks is None else 1000 + number % 3000)
        seen_us = session.created_us + number
        assert table.settle(key, fill, pack(session, fill=fill, seen_us=seen_us, until=at + 60, ends=at + 1800))


def weighed(many: int, *, marks: Sequence[int] | None = None, subject: str = "u%07d") -> tuple[float, float, float]:
    """Octets of a copy: as they were read, after as many again have pushed them out, and what is said of them."""
    table: NearTable[NearSession] = NearTable(
        entries=many, octets=10**9, key_of=KEY_OF, group_of=GROUP_OF, mutex=threading.Lock()
    )
    line = Line(5.0, marks=marks)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        read(table, line, range(many), subject=subject)
        first = tracemalloc.get_traced_memory()[0] - before
        read(table, line, range(many, 2 * many), subject=subject)
        later = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(table) == many
    return first / many, later / many, table.size / many


def test_a_copy_takes_at_most_600_octets() -> None:
    first, later, counted = weighed(MANY)
    assert first <= 600
    assert later <= counted


@pytest.mark.parametrize("subject", ["%07d" + "u" * 248, "%07d" + "ü" * 124])
def test_what_is_said_of_the_size_holds_for_long_subjects_and_lines_with_marks(subject: str) -> None:
    first, later, counted = weighed(FEWER, marks=array("Q", [1 << 60]) * 4096, subject=subject)
    assert first <= later <= counted


def test_the_garbage_collector_does_not_visit_copies() -> None:
    assert not gc.is_tracked(packed(SIGNED_IN))


@given(st.binary(min_size=MARK, max_size=MARK), st.integers(0, 2**63), st.booleans())
def test_the_mark_of_a_place_and_the_last_activity_change_nothing_else(mark: bytes, seen_us: int, first: bool) -> None:
    near = packed(SIGNED_IN)
    assert near.place == UNMARKED
    size = len(near.packed)
    for marks in (first, not first):
        if marks:
            near.place = mark
        else:
            near.seen_us = seen_us
    assert (near.place, near.seen_us, len(near.packed)) == (mark, seen_us, size)
    assert unpack(near, ID.ref.handle) == SIGNED_IN
