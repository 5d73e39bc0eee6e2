"""The issuer's keys: fetched with care, kept through failures, never asked for by strangers."""

from __future__ import annotations

import base64
import json
import logging

import pytest

from coatcheck.core.denylist import KEYS_AT_MOST
from coatcheck.errors import FeedSilent, TokenInvalid
from coatcheck.primitives.jwk import SigningKey
from coatcheck.verifier import Verifier
from coatcheck.verifier.follower import COOL_DOWN, KEYS_AT_LEAST
from coatcheck.verifier.knowledge import MISSING_SECONDS
from tests.verifier.issuer import Bench, Handler

Keys = tuple[SigningKey, SigningKey]


def refused(verifier: Verifier, token: str) -> str:
    with pytest.raises(TokenInvalid) as caught:
        verifier.verify(token)
    return caught.value.cause


def invented(bench: Bench, number: int, keys: Keys) -> str:
    """A token that names a key nobody has."""
    stranger = keys[1]
    header = stranger.header
    text = bench.mint(stranger)
    made = json.dumps({"alg": "EdDSA", "kid": f"invented-{number}", "typ": "at+jwt"}, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(made).rstrip(b"=").decode() + text[len(header) :]


def test_a_storm_of_unknown_kids_costs_one_fetch_a_cool_down(bench: Bench, signing_keys: Keys) -> None:
    verifier = bench.following()
    assert bench.issuer.count("keys") == 1
    for number in range(500):
        assert refused(verifier, invented(bench, number, signing_keys)) == "unknown_key"
    bench.desk.wait_again("_turn", bench.nudge)
    assert bench.issuer.count("keys") == 1, "the cool-down counts from the first fetch"
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(COOL_DOWN))
    for number in range(500, 1000):
        assert refused(verifier, invented(bench, number, signing_keys)) == "unknown_key"
    bench.desk.wait_again("confirm", lambda: bench.turn(COOL_DOWN - 1))
    assert bench.issuer.count("keys") == 2
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(1.0))
    assert bench.issuer.count("keys") == 3


def test_the_same_unknown_kid_is_no_reason_twice(bench: Bench, signing_keys: Keys) -> None:
    verifier, text = bench.following(), invented(bench, 1, signing_keys)
    assert refused(verifier, text) == "unknown_key"
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(COOL_DOWN))
    assert refused(verifier, text) == "unknown_key"
    bench.desk.wait_again("confirm", lambda: bench.turn(COOL_DOWN))
    assert bench.issuer.count("keys") == 2
    bench.desk.wait_again("confirm", lambda: bench.turn(MISSING_SECONDS - COOL_DOWN))
    # The refusal itself wakes the thread: what it then does is awaited from before.
    bench.desk.wait_again("succeed: the issuer's keys", lambda: refused(verifier, text))
    assert bench.issuer.count("keys") == 3


def test_without_its_only_key_a_verifier_asks_until_there_is_another(bench: Bench, signing_keys: Keys) -> None:
    verifier, token = bench.following(), bench.mint()
    assert verifier.verify(token).subject == "50"
    denied: dict[str, object] = {"kind": "kid", "kid": signing_keys[0].kid, "until": bench.until}
    bench.desk.wait_again("take_pushed", lambda: bench.issuer.push(denied))
    with pytest.raises(FeedSilent):
        verifier.verify(token)
    # The issuer publishes the withdrawn key a little longer: once more nothing that could be used.
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(COOL_DOWN))
    bench.issuer.keys[:] = [signing_keys[1]]
    bench.desk.wait_again("use_keys", lambda: bench.turn(COOL_DOWN))
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(bench.mint(signing_keys[1])).subject == "50"


def test_a_key_that_was_published_late_is_found_after_the_cool_down(bench: Bench, signing_keys: Keys) -> None:
    verifier, text = bench.following(), bench.mint(signing_keys[1])
    bench.issuer.keys.append(signing_keys[1])
    assert refused(verifier, text) == "unknown_key"
    bench.desk.wait_again("use_keys", lambda: bench.turn(COOL_DOWN))
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(text).subject


@pytest.mark.parametrize(("max_age", "seconds"), [(0, KEYS_AT_LEAST), (600, 600.0), (999_999_999, KEYS_AT_MOST)])
def test_max_age_is_honoured_between_bounds(bench: Bench, max_age: int, seconds: float) -> None:
    bench.issuer.max_age = max_age
    bench.following()
    bench.desk.wait_again("confirm", lambda: bench.turn(seconds - 0.001))
    assert bench.issuer.count("keys") == 1
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(0.001))
    assert bench.issuer.count("keys") == 2


def test_unchanged_keys_are_answered_304_and_keep_what_they_have_proven(bench: Bench) -> None:
    verifier, text = bench.following(), bench.mint()
    verifier.verify(text)
    bench.desk.wait_again("succeed: the issuer's keys", lambda: bench.turn(600.0))
    assert bench.desk.count("use_keys") == 1
    assert verifier.status.cached == 1
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(text).subject


def test_a_new_key_keeps_the_cache_and_a_removed_one_empties_it(bench: Bench, signing_keys: Keys) -> None:
    verifier, text = bench.following(), bench.mint(signing_keys[0])
    verifier.verify(text)
    bench.issuer.keys = list(signing_keys)
    bench.desk.wait_again("use_keys", lambda: bench.turn(600.0))
    assert (verifier.status.keys, verifier.status.cached) == (2, 1)
    bench.issuer.keys = [signing_keys[1]]
    bench.desk.wait_again("use_keys", lambda: bench.turn(600.0))
    assert (verifier.status.keys, verifier.status.cached) == (1, 0)
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert refused(verifier, bench.mint(signing_keys[0])) == "unknown_key"


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (302, b"", "text/html", "a redirect is not followed"),
        (307, b"", "application/json", "a redirect is not followed"),
        (304, b"", "application/json", "the answer was 304"),
        (404, b"", "application/json", "the answer was 404"),
        (200, b'{"keys":[]}' + b" " * 1024 * 1024, "application/json", "longer than 65536 octets"),
        (200, b"{}", "application/json", ""),
        (200, b'{"keys":[]}', "application/json", ""),
        (200, b'{"keys":[{"kty":"oct","kid":"a","k":"' + b"A" * 64 + b'"}]}', "application/json", ""),
        (200, b"<html>", "text/html", "the answer is no JWK Set"),
    ],
)
def test_what_is_no_key_set_takes_no_good_key_away(
    bench: Bench, status: int, body: bytes, kind: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere: list[str] = []

    def answer(handler: Handler) -> None:
        elsewhere.append(handler.path)
        handler.reply(status, body, kind, Location=f"{bench.issuer.url}/elsewhere", ETag='"bad"')

    verifier, text = bench.following(), bench.mint()
    bench.issuer.on_keys = answer
    # Without its mark the answer 304 means nothing.
    verifier._follower._keys._etag = None  # type: ignore[union-attr]
    with caplog.at_level(logging.WARNING, "coatcheck"):
        bench.desk.wait_again("fail: the issuer's keys", lambda: bench.turn(600.0))
    assert says in caplog.text
    assert verifier.status.keys == 1
    assert set(elsewhere) == {"/.well-known/jwks.json"}
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(text).subject


def test_keys_that_never_come_do_not_stop_the_feed(bench: Bench) -> None:
    bench.issuer.on_keys = lambda handler: handler.reply(500)
    verifier = bench.verifier()
    verifier.start()
    bench.desk.wait("fail: the issuer's keys")
    bench.desk.wait("confirm")
    assert not verifier.wait_until_ready(0.0)
    bench.issuer.on_keys = None
    bench.desk.wait_again("use_keys", lambda: bench.turn(1.0))
    assert verifier.wait_until_ready(20)
