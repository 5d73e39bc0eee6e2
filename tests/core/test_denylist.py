"""The denylist: which tokens it names, until when, and what a page of the feed may say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core import denylist
from coatcheck.core.access_token import MAX_LEEWAY, AccessToken
from coatcheck.core.denylist import (
    MAX_PAGE_ENTRIES,
    MAX_PAGE_OCTETS,
    ClientCut,
    Denylist,
    DenylistFull,
    Entry,
    EveryoneCut,
    FeedPage,
    FeedReader,
    KeyDenied,
    PageRefused,
    SessionDenied,
    SubjectCut,
    TokenDenied,
    denial_us,
    entry_of,
    read_page,
    token_denial_until_us,
)
from coatcheck.core.ids import SessionRef
from coatcheck.core.ports import Denial, DenialKind, session_denial_id

ISSUER = "https://id.example"
NOW = 1_800_000_000.0
UNTIL = NOW + 960
MICROSECOND = 1 / 1_000_000
IAT = 1_799_999_000


def token(**claims: Any) -> AccessToken:
    said: dict[str, Any] = {
        "issuer": ISSUER,
        "subject": "50",
        "audience": ("orders",),
        "client_id": "web",
        "id": "the-token",
        "sid": "the-session",
        "issued_at": IAT,
        "expires_at": IAT + 900,
        "scopes": (),
        "auth_time": 0.0,
        "acr": None,
        "amr": (),
        "claims": {},
    }
    return AccessToken(**(said | claims))


def listed(*entries: Entry) -> Denylist:
    made = Denylist(ISSUER)
    for entry in entries:
        made.add(entry)
    return made


def page(*entries: Entry, cursor: str = "c1", more: bool = False, longest: float = 900.0) -> FeedPage:
    return FeedPage(cursor=cursor, more=more, lag=0.0, longest=longest, entries=entries, unknown=frozenset())


# -- how long ------------------------------------------------------------------------------------------------------


def test_denials_outlive_their_tokens_by_the_largest_leeway() -> None:
    assert denial_us(900) == (900 + MAX_LEEWAY) * 1_000_000
    assert token_denial_until_us(1_800_000_000) == (1_800_000_000 + MAX_LEEWAY) * 1_000_000


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (SessionDenied(sid="the-session", until=UNTIL), "sid"),
        (TokenDenied(iss=ISSUER, jti="the-token", until=UNTIL), "jti"),
        (SubjectCut(sub="50", not_before=IAT + 1, until=UNTIL), "sub"),
        (ClientCut(client_id="web", sub="50", not_before=IAT + 1, until=UNTIL), "client_sub"),
        (EveryoneCut(not_before=IAT + 1, until=UNTIL), "all"),
    ],
)
def test_an_entry_denies_until_its_time_and_not_at_it(entry: Entry, why: str) -> None:
    entries = listed(entry)
    assert entries.why(token(), now=0.0) == why
    assert entries.why(token(), now=UNTIL - MICROSECOND) == why
    assert entries.why(token(), now=UNTIL) is None
    assert (entries.prune(now=UNTIL - MICROSECOND), len(entries)) == (0, 1)
    assert (entries.prune(now=UNTIL), len(entries)) == (1, 0)


@pytest.mark.parametrize(
    "other",
    [
        {"sid": "another", "id": "another", "subject": "51", "client_id": "app", "issued_at": IAT + 1},
        {"sid": None, "id": "another", "subject": "51"},
        {"sid": None, "id": "another", "issued_at": IAT + 1},
    ],
)
def test_other_tokens_pass(other: dict[str, Any]) -> None:
    entries = listed(
        SessionDenied(sid="the-session", until=UNTIL),
        TokenDenied(iss=ISSUER, jti="the-token", until=UNTIL),
        SubjectCut(sub="50", not_before=IAT + 1, until=UNTIL),
        ClientCut(client_id="web", sub="50", not_before=IAT + 1, until=UNTIL),
    )
    assert entries.why(token(**other), now=NOW) is None


def test_a_cut_denies_what_was_issued_before_it_and_not_what_was_issued_at_it() -> None:
    for not_before, why in ((float(IAT), None), (IAT + MICROSECOND, "sub")):
        assert listed(SubjectCut(sub="50", not_before=not_before, until=UNTIL)).why(token(), now=NOW) == why


def test_ids_of_another_issuer_name_nothing_here() -> None:
    entries = listed(TokenDenied(iss="https://other.example", jti="the-token", until=UNTIL))
    assert entries.why(token(), now=NOW) is None
    assert len(entries) == 0


def test_client_and_subject_cannot_be_confused() -> None:
    # With both in one text, ("a", "b\nc") and ("a\nb", "c") would be one.
    entries = listed(ClientCut(client_id="web", sub="50", not_before=IAT + 1, until=UNTIL))
    assert entries.why(token(client_id="web\n50", subject=""), now=NOW) is None
    first_party = listed(ClientCut(client_id="", sub="50", not_before=IAT + 1, until=UNTIL))
    assert first_party.why(token(client_id=""), now=NOW) == "client_sub"
    assert first_party.why(token(), now=NOW) is None


def test_a_denied_key_is_named_until_its_time() -> None:
    entries = listed(KeyDenied(kid="k1", until=UNTIL))
    assert entries.denies_key("k1", now=UNTIL - MICROSECOND)
    assert not entries.denies_key("k1", now=UNTIL)
    assert not entries.denies_key("k2", now=NOW)
    assert entries.prune(now=UNTIL) == 1


_entries: st.SearchStrategy[Entry] = st.one_of(
    st.builds(SessionDenied, sid=st.sampled_from(["the-session", "b"]), until=st.floats(0, 2e9)),
    st.builds(TokenDenied, iss=st.just(ISSUER), jti=st.sampled_from(["the-token", "b"]), until=st.floats(0, 2e9)),
    st.builds(
        SubjectCut, sub=st.sampled_from(["50", "b"]), not_before=st.floats(IAT - 9, IAT + 9), until=st.floats(0, 2e9)
    ),
    st.builds(EveryoneCut, not_before=st.floats(IAT - 9, IAT + 9), until=st.floats(0, 2e9)),
    st.builds(KeyDenied, kid=st.sampled_from(["k1", "k2"]), until=st.floats(0, 2e9)),
)


@given(st.lists(_entries, max_size=8), st.randoms(), st.floats(0, 2e9))
def test_more_entries_never_make_a_denied_token_pass_and_order_does_not_matter(
    entries: list[Entry], random: Any, now: float
) -> None:
    alone = any(listed(entry).why(token(), now=now) is not None for entry in entries)
    together = listed(*entries)
    if alone:
        assert together.why(token(), now=now) is not None
    shuffled = [*entries, *entries]
    random.shuffle(shuffled)
    assert listed(*shuffled).why(token(), now=now) == together.why(token(), now=now)
    together.prune(now=now)
    assert (together.why(token(), now=now) is not None) >= alone


def test_a_full_list_says_so() -> None:
    entries = Denylist(ISSUER, limit=2)
    entries.add(SessionDenied(sid="a", until=UNTIL))
    entries.add(SessionDenied(sid="a", until=UNTIL))
    entries.add(EveryoneCut(not_before=0.0, until=UNTIL))
    with pytest.raises(DenylistFull):
        entries.add(KeyDenied(kid="a", until=UNTIL))


# -- what is said --------------------------------------------------------------------------------------------------


def told(*entries: object, **members: Any) -> bytes:
    said: dict[str, Any] = {"cursor": "c1", "more": False, "lag": 0.5, "longest": 900, "entries": list(entries)}
    return json.dumps(said | members).encode()


@pytest.mark.parametrize(
    ("kind", "name", "entry"),
    [
        ("sid", session_denial_id(SessionRef(0xAF, "handle")), SessionDenied(sid="sid of 175 handle", until=UNTIL)),
        ("jti", "t", TokenDenied(iss=ISSUER, jti="t", until=UNTIL)),
        ("sub", "a\nb", SubjectCut(sub="a\nb", not_before=NOW + 0.25, until=UNTIL)),
        ("client_sub", "web\n5\n0", ClientCut(client_id="web", sub="5\n0", not_before=NOW + 0.25, until=UNTIL)),
        ("client_sub", "\n50", ClientCut(client_id="", sub="50", not_before=NOW + 0.25, until=UNTIL)),
        ("all", "", EveryoneCut(not_before=NOW + 0.25, until=UNTIL)),
        ("kid", "k", KeyDenied(kid="k", until=UNTIL)),
    ],
)
def test_what_a_store_says_is_what_a_verifier_reads(kind: DenialKind, name: str, entry: Entry) -> None:
    denial = Denial(kind=kind, id=name, until_us=int(UNTIL * 1_000_000), not_before_us=int((NOW + 0.25) * 1_000_000))
    said = entry_of(denial, issuer=ISSUER, sid_of=lambda ref: f"sid of {ref.tag} {ref.handle}")
    found = read_page(told(said))
    assert found.entries == (entry,)
    assert (found.cursor, found.more, found.lag, found.longest) == ("c1", False, 0.5, 900.0)


def test_kinds_of_a_later_release_are_named_and_decide_nothing() -> None:
    found = read_page(told({"kind": "planet", "sid": 7}, {"kind": "sid", "sid": "a", "until": 1, "new": True}))
    assert found.unknown == {"planet"}
    assert found.entries == (SessionDenied(sid="a", until=1.0),)


@pytest.mark.parametrize(
    "octets",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"x" * (MAX_PAGE_OCTETS + 1),
        told(cursor=""),
        told(cursor="c" * 513),
        told(cursor="a b"),
        told(cursor="a\r\nb"),
        told(cursor="é"),
        told(cursor=7),
        told(more="no"),
        told(lag=-0.1),
        told(lag="0"),
        told(longest=0),
        told(entries={}),
        told().replace(b"0.5", b"1e999"),
        told().replace(b"0.5", b"NaN"),
        told().replace(b"900", b"1e999"),
        told("sid"),
        told({}),
        told({"kind": 1}),
        told({"kind": "k" * 65}),
        told({"kind": "sid", "sid": "a"}),
        told({"kind": "sid", "until": 1}),
        told({"kind": "sid", "sid": "", "until": 1}),
        told({"kind": "sid", "sid": "a" * 1025, "until": 1}),
        told({"kind": "sid", "sid": "a", "until": "1"}),
        told({"kind": "sid", "sid": "a", "until": None}),
        told({"kind": "sid", "sid": "a", "until": 7.25}).replace(b"7.25", b"1e999"),
        told({"kind": "jti", "jti": "a", "until": 1}),
        told({"kind": "sub", "sub": "a", "until": 1}),
        told({"kind": "all", "until": 1}),
        told({"kind": "kid", "until": 1}),
        told(*({"kind": "x"} for _ in range(MAX_PAGE_ENTRIES + 1))),
    ],
)
def test_what_is_no_page_is_refused_whole(octets: bytes) -> None:
    with pytest.raises(PageRefused) as refused:
        read_page(octets)
    assert len(str(refused.value)) < 100


@given(st.binary(max_size=200))
def test_no_octets_raise_anything_else(octets: bytes) -> None:
    with pytest.raises(PageRefused):
        read_page(octets)


def test_a_page_of_the_largest_size_is_read() -> None:
    octets = told(*({"kind": "x"} for _ in range(MAX_PAGE_ENTRIES)))
    assert read_page(octets + b" " * (MAX_PAGE_OCTETS - len(octets))).unknown == {"x"}


# -- following -----------------------------------------------------------------------------------------------------

DENIED = SessionDenied(sid="the-session", until=UNTIL)
OTHER = SessionDenied(sid="another", until=UNTIL)


def test_a_snapshot_counts_page_by_page_and_is_complete_at_its_end() -> None:
    reader = FeedReader(ISSUER)
    assert (reader.cursor, reader.is_complete, reader.version) == (None, False, 0)
    assert not reader.take(page(DENIED, cursor="c1", more=True))
    assert not reader.is_complete
    assert reader.denied.why(token(), now=NOW) == "sid"
    assert reader.take(page(OTHER, cursor="c2"))
    assert (reader.cursor, reader.is_complete, len(reader.denied)) == ("c2", True, 2)


def test_old_entries_count_until_the_new_snapshot_is_complete() -> None:
    reader = FeedReader(ISSUER)
    reader.take(page(DENIED))
    reader.lose()
    assert (reader.cursor, reader.is_complete) == (None, False)
    reader.take(page(OTHER, cursor="d1", more=True))
    assert reader.denied.why(token(), now=NOW) == "sid"
    assert len(reader.denied) == 2
    reader.take(page(cursor="d2"))
    assert reader.denied.why(token(), now=NOW) is None
    assert reader.denied.why(token(sid="another"), now=NOW) == "sid"


def test_what_is_pushed_while_a_snapshot_is_read_outlives_it() -> None:
    reader = FeedReader(ISSUER)
    reader.take(page())
    reader.lose()
    reader.take_pushed(page(DENIED, cursor="elsewhere"))
    assert reader.cursor is None, "the stream moves nobody forward"
    reader.take(page())
    assert reader.denied.why(token(), now=NOW) == "sid"


def test_a_snapshot_that_is_lost_midway_begins_again() -> None:
    reader = FeedReader(ISSUER)
    reader.take(page(OTHER, more=True))
    reader.lose()
    assert reader.take(page(DENIED))
    assert len(reader.denied) == 1


def test_the_version_rises_with_every_change_and_with_nothing_else() -> None:
    reader = FeedReader(ISSUER)
    reader.take(page())
    first = reader.version
    reader.take(page(cursor="c2"))
    assert reader.version == first
    reader.take(page(DENIED, cursor="c3"))
    assert reader.version == first + 1
    reader.take(page(cursor="c4", longest=1800.0))
    assert (reader.version, reader.longest) == (first + 2, 1800.0)
    reader.take_pushed(page(OTHER))
    assert reader.version == first + 3


def test_a_page_that_leads_nowhere_is_refused() -> None:
    reader = FeedReader(ISSUER)
    reader.take(page(cursor="c1", more=True))
    with pytest.raises(PageRefused):
        reader.take(page(cursor="c1", more=True))


def test_more_than_fits_is_never_complete_and_what_fits_counts() -> None:
    reader = FeedReader(ISSUER, limit=1)
    for _ in range(2):
        with pytest.raises(DenylistFull):
            reader.take(page(DENIED, OTHER))
        assert not reader.is_complete
        assert reader.cursor is None
        assert reader.denied.why(token(), now=NOW) == "sid"
    assert reader.version > 0


def test_asking_pages_fit_their_bounds() -> None:
    assert denylist.PAGE_ENTRIES <= MAX_PAGE_ENTRIES
    longest = {"kind": "client_sub", "client_id": "x" * 1024, "sub": "\U0001f511" * 1024, "not_before": 1, "until": 1}
    octets = json.dumps(longest, ensure_ascii=False).encode()
    assert len(octets) * denylist.PAGE_ENTRIES < MAX_PAGE_OCTETS
