"""What a verifier accepts, and the order in which it refuses."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from coatcheck.core.access_token import MAX_TOKEN
from coatcheck.errors import ConfigurationError, FeedSilent, TokenInvalid
from coatcheck.primitives.jwk import SigningKey
from coatcheck.verifier import Verifier
from tests.verifier.issuer import AUDIENCE, CREDENTIAL, LONGEST, Bench

MICROSECOND = timedelta(microseconds=1)


def cause(verifier: Verifier, token: Any, **options: Any) -> str:
    with pytest.raises(TokenInvalid) as refused:
        verifier.verify(token, **options)
    return refused.value.cause


def test_a_good_token_is_read(bench: Bench) -> None:
    verifier, text = bench.ready(), bench.mint()
    token = verifier.verify(text)
    assert (token.subject, token.sid, token.scopes, token.claims["role"]) == ("50", "the-session", ("read",), "admin")
    assert verifier.verify(text.encode()) is token, "text and octets are one token"
    assert verifier.status.cached == 1


def test_a_token_seen_before_costs_no_signature_check(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    verifier, text = bench.ready(), bench.mint()
    token = verifier.verify(text)
    monkeypatch.setattr("coatcheck.verifier.face.verify_access_token", None)
    assert verifier.verify(text) is token


def test_nothing_is_accepted_before_the_first_snapshot(bench: Bench) -> None:
    bench.issuer.on_poll = lambda handler: handler.reply(503)
    verifier, text = bench.verifier(), bench.mint()
    with pytest.raises(FeedSilent, match="no keys"):
        verifier.verify(text)
    verifier.start()
    bench.desk.wait("succeed: the issuer's keys")
    bench.desk.wait("fail: the revocation feed: the answer was 503")
    with pytest.raises(FeedSilent, match="not known yet"):
        verifier.verify(text)
    assert not verifier.status.fresh
    assert verifier.status.feed_age is None
    bench.issuer.on_poll = None
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0))
    assert verifier.verify(text).subject


def test_a_bad_token_is_refused_even_when_nothing_could_be_accepted(bench: Bench) -> None:
    verifier = bench.ready()
    bench.system.advance(5.0)
    assert cause(verifier, bench.mint()[:-4] + "AAAA") in ("signature", "spelling")


def test_a_cached_token_ends_at_its_end(bench: Bench) -> None:
    verifier, text = bench.ready(on_silence="serve", silence_bound=timedelta(hours=1), leeway=30), bench.mint()
    verifier.verify(text)
    bench.system.advance(timedelta(seconds=LONGEST + 30) - MICROSECOND)
    assert verifier.verify(text).subject
    bench.system.advance(MICROSECOND)
    assert cause(verifier, text) == "expired"


def test_a_clock_that_is_set_forward_ends_cached_tokens_at_once(bench: Bench) -> None:
    verifier, text = bench.ready(), bench.mint()
    verifier.verify(text)
    bench.system.step_clock(LONGEST)
    assert cause(verifier, text) == "expired"


def test_an_expired_token_is_a_401_although_the_feed_is_silent(bench: Bench) -> None:
    verifier, text = bench.ready(), bench.mint()
    verifier.verify(text)
    bench.system.advance(LONGEST)
    assert cause(verifier, text) == "expired"


@pytest.mark.parametrize(
    "token",
    [
        "",
        ".",
        "..",
        "a.b.c",
        "\ud800",
        "é" * 20,
        "\0" * 100,
        b"",
        b"\xff\xfe..",
        b"a" * (MAX_TOKEN + 1),
        "a" * (MAX_TOKEN + 1),
        "a" * 10_000_000,
        None,
        7,
        object(),
        bytearray(b"a.b.c"),
        ["a", "b"],
    ],
)
def test_garbage_is_a_token_invalid_and_nothing_else(bench: Bench, token: Any) -> None:
    verifier = bench.ready()
    assert cause(verifier, token) in ("shape", "size", "header", "spelling")
    assert verifier.status.cached == 0


def test_another_audience_another_issuer_and_another_key_are_refused(
    bench: Bench, signing_keys: tuple[SigningKey, SigningKey]
) -> None:
    verifier = bench.ready()
    assert cause(verifier, bench.mint(audience="billing")) == "audience"
    assert cause(verifier, bench.mint(issuer="https://id.example")) == "issuer"
    assert cause(verifier, bench.mint(signing_keys[1])) == "unknown_key"
    assert verifier.verify(bench.mint(audience=("billing", AUDIENCE))).subject


def test_a_token_that_outlives_what_denials_live_for_is_refused(bench: Bench) -> None:
    # A denial is dropped after the longest lifetime the issuer states: this token would come back to life then.
    verifier = bench.ready()
    now = bench.system.now_us() // 1_000_000
    text = bench.mint(expires_at=now + LONGEST + 1)
    assert [cause(verifier, text), cause(verifier, text)] == ["lifetime", "lifetime"]


def test_the_cache_is_bounded(bench: Bench) -> None:
    verifier = bench.ready(cache_size=3)
    for number in range(10):
        verifier.verify(bench.mint(jti=f"token-{number}"))
    assert verifier.status.cached == 3


def test_a_closed_verifier_accepts_nothing_and_may_be_started_again(bench: Bench) -> None:
    verifier, text = bench.ready(), bench.mint()
    thread = verifier._thread
    verifier.verify(text)
    verifier.close()
    verifier.close()
    assert thread is not None
    assert not thread.is_alive()
    with pytest.raises(FeedSilent):
        verifier.verify(text)
    assert not verifier.status.running
    with verifier:
        verifier.start()
        assert verifier.wait_until_ready(20)
        assert verifier.verify(text).subject


def test_a_repr_shows_no_credential(bench: Bench) -> None:
    assert CREDENTIAL not in repr(bench.verifier())
    assert CREDENTIAL not in repr(bench.ready().status)


def test_without_revocations_only_keys_are_fetched(bench: Bench) -> None:
    verifier, text = bench.ready(feed_credential=None, without_revocations=True), bench.mint()
    bench.system.advance(LONGEST - 1)
    assert verifier.verify(text, sensitive=True).subject
    assert (bench.issuer.count("poll"), bench.issuer.count("stream")) == (0, 0)
    assert verifier.status.feed_age is None
    assert verifier.status.fresh


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"feed_credential": None}, "feed_credential"),
        ({"feed_credential": CREDENTIAL, "without_revocations": True}, "without_revocations"),
        ({"feed_credential": "two words"}, "feed_credential"),
        ({"feed_credential": "a\r\nX-Admin: 1"}, "feed_credential"),
        ({"feed_credential": ""}, "feed_credential"),
        ({"audience": ()}, "audience"),
        ({"audience": ("",)}, "audience"),
        ({"audience": (1,)}, "audience"),
        ({"audience": None}, "audience"),
        ({"leeway": 61}, "leeway"),
        ({"leeway": -1}, "leeway"),
        ({"leeway": 0.5}, "leeway"),
        ({"cache_size": 0}, "cache_size"),
        ({"cache_size": 1_000_001}, "cache_size"),
        ({"on_silence": "ignore"}, "on_silence"),
        ({"feed_lease": 5}, "feed_lease"),
        ({"feed_lease": timedelta(seconds=0.2)}, "feed_lease"),
        ({"feed_lease": timedelta(seconds=301)}, "feed_lease"),
        ({"silence_bound": timedelta(seconds=4)}, "silence_bound"),
        ({"silence_bound": timedelta(hours=2)}, "silence_bound"),
        ({"jwks_url": "http://id.example/keys"}, "jwks_url"),
        ({"feed_url": "https://user:pass@id.example/"}, "feed_url"),
    ],
)
def test_a_setting_that_is_unsafe_or_contradictory_is_refused_by_name(options: dict[str, Any], names: str) -> None:
    settings: dict[str, Any] = {"audience": AUDIENCE, "feed_credential": CREDENTIAL}
    with pytest.raises(ConfigurationError, match=names) as refused:
        Verifier("https://id.example", **(settings | options))
    assert CREDENTIAL not in refused.value.detail


@pytest.mark.parametrize(
    "issuer",
    [
        "http://id.example",
        "http://localhost.example",
        "http://127.0.0.1.example",
        "http://10.0.0.1",
        "ftp://id.example",
        "id.example",
        "https://",
        "https://id.example/#x",
        "https://id .example",
        "https://id.example\r\nHost: other",
        "https://id.example:99999",
        "https://me@id.example",
        "",
        None,
    ],
)
def test_an_issuer_that_others_could_answer_for_is_refused(issuer: Any) -> None:
    with pytest.raises(ConfigurationError):
        Verifier(issuer, audience=AUDIENCE, feed_credential=CREDENTIAL)


@pytest.mark.parametrize("issuer", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:80/", "https://a.b/c"])
def test_https_and_this_machine_are_taken(issuer: str) -> None:
    assert not Verifier(issuer, audience=[AUDIENCE, "billing"], feed_credential=CREDENTIAL).status.running
