"""What is unpacked is what was packed, it stays small, and it never holds an id."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.freshness import Fill, Line
from coatcheck.core.ids import IdKeys, SessionRef, mint_session_id, owner_of
from coatcheck.core.near_session import NearSession, pack, unpack
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


def packed(session: StoredSession) -> NearSession:
    near = pack(session, fill=FILL, seen_us=7, until=200.0, ends=300.0)
    assert near is not None
    return near


# Text of any script that has a form in UTF-8.
texts = st.text(st.characters(codec="utf-8"), max_size=30)
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
        authority=texts,
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


def test_the_garbage_collector_does_not_visit_copies() -> None:
    assert not gc.is_tracked(packed(SIGNED_IN))
