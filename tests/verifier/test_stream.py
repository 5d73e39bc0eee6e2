"""Chunks and events come out the same however the network cuts them, and within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.denylist import MAX_PAGE_OCTETS
from coatcheck.verifier.stream import Chunks, Events, StreamBroken

EVENTS = b': hello\r\n\r\nevent: revoked\nid: 1\ndata: {"a": 1}\n\n:\nevent:other\ndata:x\n\ndata\n\nid: 2\n\n'
READ = [(b"revoked", b'{"a": 1}'), (b"other", b"x"), (b"", b"")]


def cut(octets: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(octets)) for place in places} | {len(octets)})
    return [octets[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def in_chunks(parts: list[bytes]) -> bytes:
    return b"".join(b"%X;x=y\r\n%s\r\n" % (len(part), part) for part in parts if part) + b"0\r\n\r\n"


@given(st.lists(st.integers(0, 200)), st.lists(st.integers(0, 300)))
def test_events_are_the_same_however_they_are_cut(chunks: list[int], pieces: list[int]) -> None:
    unframe, events = Chunks(), Events()
    found = [
        event for piece in cut(in_chunks(cut(EVENTS, chunks)), pieces) for event in events.take(unframe.take(piece))
    ]
    assert found == READ
    assert unframe.ended


@pytest.mark.parametrize(
    "octets", [b"x\r\n", b"-1\r\n", b"\r\n", b"1\r\nab\r\n", b"fffffffff\r\n", b"1" * 257, b" 1\r\n"]
)
def test_broken_framing_is_refused(octets: bytes) -> None:
    with pytest.raises(StreamBroken):
        Chunks().take(octets)


def test_nothing_counts_after_the_last_chunk() -> None:
    unframe = Chunks()
    assert unframe.take(b"1\r\na\r\n0\r\n\r\n5\r\nextra") == b"a"
    assert unframe.take(b"more") == b""


def test_a_line_is_bounded_with_and_without_an_end() -> None:
    for end in (b"", b"\n"):
        with pytest.raises(StreamBroken):
            list(Events().take(b"x" * (MAX_PAGE_OCTETS + 65) + end))
    assert list(Events().take(b"data: " + b"x" * MAX_PAGE_OCTETS + b"\n\n"))


def test_many_lines_of_data_are_refused() -> None:
    with pytest.raises(StreamBroken):
        list(Events().take(b"data: a\ndata: b\n\n"))
