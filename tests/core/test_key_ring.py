"""The life of a key: published, signing, retired, gone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coatcheck.core.access_token import MAX_LEEWAY
from coatcheck.core.key_ring import (
    LEARNING_SECONDS,
    MAX_KEYS,
    KeyRing,
    RingKey,
    added,
    is_mixed,
    is_rotation_due,
    newest_first,
    noted,
    pack_ring,
    seal_key,
    trimmed,
    unpack_ring,
    unseal_key,
    withdrawn,
)

NOW = 1_800_000_000
AHEAD = 390
LONGEST = 900


def key(kid: str) -> RingKey:
    return RingKey(kid=kid, algorithm="ES256", sealed=b"sealed", published_at=0, signs_at=0)


def ring_of(*moments: int) -> KeyRing:
    keys = tuple(replace(key(f"k{n}"), published_at=at - AHEAD, signs_at=at) for n, at in enumerate(moments))
    return KeyRing(keys=keys, longest=LONGEST)


def test_the_first_key_signs_at_once() -> None:
    ring = added(KeyRing(longest=LONGEST), key("a"), now=NOW, ahead=AHEAD)
    signing = ring.signing(NOW)
    assert signing is not None
    assert (signing.kid, ring.state(signing, NOW)) == ("a", "signing")


def test_a_later_key_signs_only_after_every_verifier_could_have_fetched_it() -> None:
    ring = added(KeyRing(longest=LONGEST), key("a"), now=NOW, ahead=AHEAD)
    ring = added(ring, key("b"), now=NOW, ahead=AHEAD)
    second = ring.find("b")
    assert second is not None
    assert ring.state(second, NOW + AHEAD - 1) == "published"
    assert ring.signing(NOW + AHEAD - 1) == ring.find("a")
    assert ring.state(second, NOW + AHEAD) == "signing"
    first = ring.find("a")
    assert first is not None
    assert ring.state(first, NOW + AHEAD) == "retired"


def test_a_retired_key_verifies_until_its_longest_token_has_expired_everywhere() -> None:
    ring = ring_of(NOW, NOW + 1000)
    until = NOW + 1000 + LONGEST + MAX_LEEWAY
    assert ring.verifies_until(ring.keys[0]) == until
    assert ring.verifies_until(ring.keys[1]) is None
    assert trimmed(ring, now=until - 1) == ring
    assert [each.kid for each in trimmed(ring, now=until).keys] == ["k1"]


def test_while_a_key_waits_no_other_is_published() -> None:
    ring = added(ring_of(NOW), key("b"), now=NOW, ahead=AHEAD)
    with pytest.raises(ValueError, match="waiting"):
        added(ring, key("c"), now=NOW + AHEAD - 1, ahead=AHEAD)
    assert added(ring, key("c"), now=NOW + AHEAD, ahead=AHEAD).waiting(NOW + AHEAD) is not None


def test_a_ring_has_a_bound() -> None:
    with pytest.raises(ValueError, match="already"):
        added(ring_of(*range(NOW - MAX_KEYS + 1, NOW + 1)), key("more"), now=NOW, ahead=AHEAD)


def test_the_withdrawn_signing_key_hands_over_at_once() -> None:
    ring = added(ring_of(NOW - 10), key("b"), now=NOW, ahead=AHEAD)
    rest = withdrawn(ring, "k0", now=NOW + 1)
    signing = rest.signing(NOW + 1)
    assert signing is not None
    assert (signing.kid, signing.signs_at) == ("b", NOW + 1)
    assert rest.find("k0") is None


def test_the_only_key_cannot_be_withdrawn_and_an_unknown_one_neither() -> None:
    with pytest.raises(ValueError, match="add another"):
        withdrawn(ring_of(NOW), "k0", now=NOW)
    with pytest.raises(ValueError, match="no such key"):
        withdrawn(ring_of(NOW), "other", now=NOW)


def test_a_withdrawn_retired_key_leaves_the_signing_one_alone() -> None:
    ring = ring_of(NOW, NOW + 10)
    assert withdrawn(ring, "k0", now=NOW + 20).keys == ring.keys[1:]


def test_rotation_is_due_so_that_the_next_key_signs_when_the_period_ends() -> None:
    ring, period = ring_of(NOW), 10_000

    def due(now: int) -> bool:
        return is_rotation_due(ring, now=now, period=period, ahead=AHEAD, algorithm="ES256")

    assert not due(NOW + period - AHEAD - 1)
    assert due(NOW + period - AHEAD)
    waiting = added(ring, key("b"), now=NOW + period - AHEAD, ahead=AHEAD)
    assert not is_rotation_due(waiting, now=NOW + period - 1, period=period, ahead=AHEAD, algorithm="ES256")
    assert is_rotation_due(KeyRing(), now=NOW, period=period, ahead=AHEAD, algorithm="ES256")


def test_another_algorithm_is_a_reason_to_rotate() -> None:
    assert is_rotation_due(ring_of(NOW), now=NOW, period=10_000, ahead=AHEAD, algorithm="EdDSA")


def test_symmetric_and_asymmetric_keys_never_stand_in_one_ring() -> None:
    assert is_mixed(ring_of(NOW), "HS256")
    assert not is_mixed(ring_of(NOW), "EdDSA")
    assert is_mixed(KeyRing(keys=(replace(key("s"), algorithm="HS256"),)), "ES256")


def test_a_longer_life_is_kept_back_until_every_server_has_learned_of_it() -> None:
    ring = noted(ring_of(NOW), lifetime=3600, verifier_lease=5.0, now=NOW)
    assert (ring.longest, ring.before, ring.raised_at) == (3600, LONGEST, NOW)
    assert ring.lifetime(3600, NOW + LEARNING_SECONDS - 1) == LONGEST
    assert ring.lifetime(600, NOW) == 600
    assert ring.lifetime(3600, NOW + LEARNING_SECONDS) == 3600
    # The very first tokens of a store have nobody to wait for.
    assert noted(KeyRing(), lifetime=3600, verifier_lease=0.0, now=NOW).lifetime(3600, NOW) == 3600


def test_what_is_known_of_lives_and_leases_never_shrinks() -> None:
    ring = noted(ring_of(NOW), lifetime=60, verifier_lease=5.0, now=NOW)
    assert (ring.longest, ring.verifier_lease) == (LONGEST, 5.0)
    assert noted(ring, lifetime=60, verifier_lease=0.3, now=NOW) == ring


def test_a_private_key_opens_with_its_server_key_and_its_name_alone() -> None:
    sealed = replace(key("a"), sealed=seal_key(b"private", kid="a", server_key=b"s" * 32, nonce=b"n" * 12))
    assert unseal_key(sealed, server_key=b"s" * 32) == b"private"
    assert b"private" not in sealed.sealed
    assert unseal_key(sealed, server_key=b"z" * 32) is None
    # Two sealed keys swapped in the store: each opens under its own name only.
    assert unseal_key(replace(sealed, kid="b"), server_key=b"s" * 32) is None


def test_the_stored_form_comes_back() -> None:
    ring = ring_of(NOW, NOW + 5)
    assert unpack_ring(pack_ring(ring)) == ring
    assert [each.kid for each in newest_first(ring.keys)] == ["k1", "k0"]


@given(st.binary(max_size=300))
def test_other_bytes_are_no_ring(packed: bytes) -> None:
    with pytest.raises(ValueError, match="not a key ring"):
        unpack_ring(packed)


def test_a_ring_with_one_name_twice_is_refused() -> None:
    twice = replace(ring_of(NOW), keys=(ring_of(NOW).keys[0],) * 2)
    with pytest.raises(ValueError, match="not a key ring"):
        unpack_ring(pack_ring(twice))


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_at_every_moment_exactly_one_key_signs_and_its_predecessor_still_verifies(steps: list[int]) -> None:
    ring, now = KeyRing(longest=LONGEST), NOW
    for number, step in enumerate(steps):
        now += step
        if ring.waiting(now) is None and len(trimmed(ring, now=now).keys) < MAX_KEYS:
            before = ring.signing(now)
            ring = added(ring, key(f"k{number}"), now=now, ahead=AHEAD)
            assert before is None or ring.signing(now) == before
        signing = ring.signing(now)
        assert signing is not None
        assert [ring.state(each, now) for each in ring.keys].count("signing") == 1
        for each in ring.keys:
            until = ring.verifies_until(each)
            # Whatever it signed last is still accepted when it has just been relieved.
            assert until is None or until >= each.signs_at + LONGEST
