"""Revocations reach a verifier, and silence ends its trust."""

from __future__ import annotations

import logging
import threading
from datetime import timedelta
from typing import Any

import pytest

from coatcheck.errors import FeedSilent, TokenInvalid
from coatcheck.primitives.jwk import SigningKey
from coatcheck.verifier import Verifier
from coatcheck.verifier.follower import Follower
from tests.verifier.issuer import WAIT, Bench, Handler, Issuer

MICROSECOND = timedelta(microseconds=1)


def cause(verifier: Verifier, token: str) -> str:
    with pytest.raises(TokenInvalid) as refused:
        verifier.verify(token)
    return refused.value.cause


def poll(bench: Bench, seconds: float = 2.0) -> None:
    """Let the next poll happen, and wait for what it told."""
    bench.settle()
    bench.desk.wait_again("confirm", lambda: bench.turn(seconds))


# -- revoked -------------------------------------------------------------------------------------------------------


def test_a_revoke_is_seen_through_the_stream_at_once(bench: Bench) -> None:
    verifier, text, other = bench.following(), bench.mint(), bench.mint(sid="another", jti="another")
    verifier.verify(text)
    verifier.verify(other)
    polls = bench.issuer.count("poll")
    bench.desk.wait_again(
        "take_pushed", lambda: bench.issuer.push({"kind": "sid", "sid": "the-session", "until": bench.until})
    )
    assert [cause(verifier, text), cause(verifier, text)] == ["denied_sid", "denied_sid"]
    assert verifier.verify(other).subject
    assert bench.issuer.count("poll") == polls, "no time has passed: only the stream can have told it"


def test_a_revoke_is_seen_by_the_next_poll_where_there_is_no_stream(bench: Bench) -> None:
    bench.issuer.on_stream = lambda handler: handler.reply(404)
    verifier, text = bench.ready(), bench.mint()
    bench.desk.wait("fail: the stream")
    verifier.verify(text)
    bench.issuer.entries.append({"kind": "jti", "iss": bench.issuer.url, "jti": "the-token", "until": bench.until})
    poll(bench)
    assert cause(verifier, text) == "denied_jti"


def test_every_kind_of_entry_denies_cached_and_new_tokens(bench: Bench) -> None:
    verifier = bench.following()
    later = bench.system.now_us() / 1_000_000 + 1
    until = bench.until
    kinds: list[tuple[dict[str, object], dict[str, Any]]] = [
        ({"kind": "sid", "sid": "a"}, {"sid": "a", "jti": "1"}),
        ({"kind": "jti", "iss": bench.issuer.url, "jti": "b"}, {"jti": "b"}),
        ({"kind": "sub", "sub": "c", "not_before": later}, {"subject": "c", "jti": "2"}),
        ({"kind": "client_sub", "client_id": "d", "sub": "50", "not_before": later}, {"client_id": "d", "jti": "3"}),
    ]
    for entry, claims in kinds:
        seen, unseen = bench.mint(**claims), bench.mint(**claims, scopes=("write",))
        verifier.verify(seen)
        bench.desk.wait_again("take_pushed", lambda entry=entry: bench.issuer.push(entry | {"until": until}))  # type: ignore[misc]
        assert cause(verifier, seen) == cause(verifier, unseen) == f"denied_{entry['kind']}"
    untouched = bench.mint()
    assert verifier.verify(untouched).subject
    bench.desk.wait_again(
        "take_pushed", lambda: bench.issuer.push({"kind": "all", "not_before": later, "until": until})
    )
    assert cause(verifier, untouched) == "denied_all"
    bench.system.advance(1.0)
    assert verifier.verify(bench.mint(jti="after")).subject, "issued after the cut"


def test_a_denied_key_takes_every_token_it_signed_with_it(
    bench: Bench, signing_keys: tuple[SigningKey, SigningKey]
) -> None:
    bench.issuer.keys = list(signing_keys)
    verifier = bench.following()
    lost, kept = bench.mint(signing_keys[0]), bench.mint(signing_keys[1], jti="other")
    verifier.verify(lost)
    verifier.verify(kept)
    bench.desk.wait_again(
        "take_pushed",
        lambda: bench.issuer.push({"kind": "kid", "kid": signing_keys[0].kid, "until": bench.until + 7200}),
    )
    assert cause(verifier, lost) == "unknown_key"
    assert verifier.verify(kept).subject
    assert verifier.status.keys == 1
    # Although the issuer still publishes it.
    bench.issuer.keys.reverse()
    bench.desk.wait_again("use_keys", lambda: bench.turn(3600.0))
    poll(bench)
    assert verifier.status.keys == 1


def test_unknown_kinds_are_passed_over_with_one_warning(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.issuer.entries = [{"kind": "planet", "until": "never"}, {"kind": "sid", "sid": "a", "until": bench.until}]
    with caplog.at_level(logging.WARNING, "coatcheck"):
        verifier = bench.following()
        bench.issuer.entries.append({"kind": "planet"})
        poll(bench)
    assert verifier.status.entries == 1
    assert caplog.text.count("does not know") == 1


def test_a_snapshot_comes_in_pages_and_counts_only_when_it_is_complete(bench: Bench) -> None:
    bench.issuer.entries = [{"kind": "sid", "sid": f"s{n}", "until": bench.until} for n in range(25)]
    bench.issuer.page = 10
    last = threading.Event()

    def hold_the_last(handler: Handler) -> None:
        if "after=e1%3A20" in handler.path:
            last.wait(WAIT)
        bench.issuer.give_page(handler)

    bench.issuer.on_poll = hold_the_last
    verifier = bench.verifier()
    verifier.start()
    bench.issuer.wait_asked("poll", 3)
    assert verifier.status.entries == 20
    bench.desk.wait("use_keys")
    with pytest.raises(FeedSilent):
        verifier.verify(bench.mint())
    last.set()
    assert verifier.wait_until_ready(WAIT)
    assert verifier.status.entries == 25
    assert verifier.verify(bench.mint()).subject


def test_a_lost_cursor_leads_to_a_new_snapshot_and_old_entries_count_until_it_is_there(bench: Bench) -> None:
    bench.issuer.entries = [{"kind": "sid", "sid": "the-session", "until": bench.until}]
    verifier, text = bench.following(), bench.mint()
    held = threading.Event()

    def hold_the_snapshot(handler: Handler) -> None:
        if "after" not in handler.path:
            held.wait(WAIT)
        bench.issuer.give_page(handler)

    bench.issuer.on_poll = hold_the_snapshot
    # Another store: it knows of other revocations, under other positions.
    bench.issuer.era = "e2"
    bench.issuer.entries = [{"kind": "sid", "sid": "another", "until": bench.until}]
    polls = bench.issuer.count("poll")
    bench.turn(2.0)
    bench.issuer.wait_asked("poll", polls + 2)
    assert cause(verifier, text) == "denied_sid"
    bench.desk.wait_again("confirm", held.set)
    assert verifier.verify(text).subject, "the complete snapshot took the place of the old list"
    assert cause(verifier, bench.mint(sid="another")) == "denied_sid"


def test_two_verifiers_hear_of_the_same_revoke(bench: Bench) -> None:
    first = bench.following()
    second = bench.following(audience="billing")
    texts = bench.mint(), bench.mint(audience="billing")
    first.verify(texts[0])
    second.verify(texts[1])
    with pytest.raises(TokenInvalid):
        second.verify(texts[0])
    bench.issuer.entries.append({"kind": "sid", "sid": "the-session", "until": bench.until})
    bench.desk.wait_again("confirm", lambda: bench.turn(2.0), times=2)
    assert cause(first, texts[0]) == cause(second, texts[1]) == "denied_sid"


def test_a_denial_that_is_over_is_forgotten(bench: Bench) -> None:
    bench.issuer.entries = [{"kind": "sid", "sid": "a", "until": bench.until}]
    verifier = bench.following()
    assert verifier.status.entries == 1
    poll(bench, LONGEST_AND_LEEWAY)
    poll(bench)
    assert verifier.status.entries == 0


LONGEST_AND_LEEWAY = 961.0


# -- silence -------------------------------------------------------------------------------------------------------


def test_the_lease_ends_exactly_when_the_server_has_not_answered_for_so_long(bench: Bench) -> None:
    verifier, text = bench.ready(), bench.mint()
    verifier.verify(text)
    bench.system.advance(timedelta(seconds=5) - MICROSECOND)
    assert verifier.verify(text).subject
    before = verifier.status
    bench.system.advance(MICROSECOND)
    for sensitive in (False, True):
        with pytest.raises(FeedSilent, match="too long"):
            verifier.verify(text, sensitive=sensitive)
    assert (before.fresh, verifier.status.fresh) == (True, False)
    assert verifier.status.feed_age == pytest.approx(5.0)


def test_serving_through_silence_ends_at_its_bound_and_never_covers_sensitive_tokens(bench: Bench) -> None:
    verifier, text = bench.ready(on_silence="serve"), bench.mint()
    bench.system.advance(timedelta(seconds=5) - MICROSECOND)
    assert verifier.verify(text, sensitive=True).subject
    bench.system.advance(MICROSECOND)
    with pytest.raises(FeedSilent):
        verifier.verify(text, sensitive=True)
    bench.system.advance(timedelta(seconds=55) - MICROSECOND)
    assert verifier.verify(text).subject
    bench.system.advance(MICROSECOND)
    with pytest.raises(FeedSilent):
        verifier.verify(text)


def test_the_lease_counts_from_the_question_and_not_from_the_answer(bench: Bench) -> None:
    verifier, text = bench.following(), bench.mint()
    held = threading.Event()

    def hold(handler: Handler) -> None:
        held.wait(WAIT)
        bench.issuer.give_page(handler)

    bench.issuer.on_poll = hold
    polls = bench.issuer.count("poll")
    bench.turn(2.0)
    bench.issuer.wait_asked("poll", polls + 1)
    bench.system.advance(1.0)
    bench.desk.wait_again("confirm", held.set)
    assert verifier.status.feed_age == pytest.approx(1.0)
    bench.system.advance(timedelta(seconds=4) - MICROSECOND)
    assert verifier.verify(text).subject
    bench.system.advance(MICROSECOND)
    with pytest.raises(FeedSilent):
        verifier.verify(text)


def test_what_the_server_lags_behind_shortens_the_lease(bench: Bench) -> None:
    bench.issuer.lag = 3.0
    verifier, text = bench.ready(), bench.mint()
    bench.system.advance(timedelta(seconds=2) - MICROSECOND)
    assert verifier.verify(text).subject
    bench.system.advance(MICROSECOND)
    with pytest.raises(FeedSilent):
        verifier.verify(text)


def test_a_stream_that_talks_makes_nothing_fresh(bench: Bench) -> None:
    verifier, text = bench.following(), bench.mint()
    bench.issuer.on_poll = lambda handler: handler.reply(503)
    bench.desk.wait_again("fail: the revocation feed", lambda: bench.turn(2.0))
    bench.desk.wait_again(
        "take_pushed", lambda: bench.issuer.push({"kind": "sid", "sid": "another", "until": bench.until})
    )
    bench.system.advance(3.0)
    with pytest.raises(FeedSilent):
        verifier.verify(text)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (401, b"", "the credential was refused (401)"),
        (403, b"", "the credential was refused (403)"),
        (503, b"", "the answer was 503"),
        (500, b"{}", "the answer was 500"),
        (204, b"", "the answer was 204"),
        (200, b"", "it is not a page"),
        (200, b"<html>", "it is not a page"),
        (200, b"[" * 100_000, "it is not a page"),
        (200, b"\xff\xfe", "it is not a page"),
        (200, b'{"cursor":"a","more":false,"lag":-1,"longest":900,"entries":[]}', "it is not a page"),
        (200, b'{"cursor":"a","more":false,"lag":1e999,"longest":900,"entries":[]}', "it is not a page"),
        (200, b'{"cursor":"a\\r\\nX: 1","more":false,"lag":0,"longest":900,"entries":[]}', "its cursor"),
        (200, b'{"cursor":"a","more":false,"lag":0,"longest":900,"entries":[{"kind":"sid"}]}', "it is not a page"),
        (200, b'{"cursor":"e1:0","more":true,"lag":0,"longest":900,"entries":[]}', "goes on where it began"),
        (200, b" " * (4 * 1024 * 1024 + 1), "longer than"),
    ],
)
def test_whatever_else_comes_makes_nothing_fresh_and_kills_nothing(
    bench: Bench, status: int, body: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    verifier, text = bench.following(), bench.mint()
    bench.issuer.on_poll = lambda handler: handler.reply(status, body)
    with caplog.at_level(logging.WARNING, "coatcheck"):
        bench.desk.wait_again("fail: the revocation feed", lambda: bench.turn(2.0))
        bench.desk.wait_again("fail: the revocation feed", lambda: bench.turn(2.0))
    assert caplog.text.count("the revocation feed: ") == 1, "said once, not at each poll"
    assert says in caplog.text
    bench.system.advance(1.0)
    with pytest.raises(FeedSilent):
        verifier.verify(text)
    assert verifier.status.running
    bench.issuer.on_poll = None
    poll(bench, 10.0)
    assert verifier.verify(text).subject


def test_a_wrong_credential_is_never_fresh_and_never_repeated_in_a_log(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "coatcheck"):
        verifier = bench.verifier(feed_credential="wrong-credential")
        verifier.start()
        bench.desk.wait("use_keys")
        bench.desk.wait("fail: the revocation feed: the credential was refused (401)")
    with pytest.raises(FeedSilent):
        verifier.verify(bench.mint())
    assert "wrong-credential" not in caplog.text
    assert verifier.status.running


def test_pauses_grow_while_nothing_is_answered(bench: Bench) -> None:
    bench.following()
    bench.issuer.on_poll = lambda handler: handler.reply(503)
    bench.desk.wait_again("fail: the revocation feed", lambda: bench.turn(2.0))
    polls = bench.issuer.count("poll")
    for _ in range(100):
        bench.desk.wait_again("_turn", lambda: bench.turn(0.01))
    assert 1 <= bench.issuer.count("poll") - polls <= 6


# -- the thread ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_thread_lets_the_lease_run_out_and_a_start_brings_it_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifier, text = bench.following(), bench.mint()
    verifier.verify(text)
    with monkeypatch.context() as patched:

        def die(self: Follower) -> None:
            raise SystemExit

        patched.setattr(Follower, "_turn", die)
        bench.nudge()
        thread = verifier._thread
        assert thread is not None
        thread.join(WAIT)
        assert not thread.is_alive()
    assert verifier.verify(text).subject, "what was confirmed counts to its end"
    assert not verifier.status.running
    bench.system.advance(5.0)
    with pytest.raises(FeedSilent):
        verifier.verify(text)
    verifier.start()
    assert verifier.wait_until_ready(WAIT)
    assert verifier.verify(text).subject


def test_an_error_of_our_own_does_not_kill_the_thread(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    verifier, text = bench.following(), bench.mint()
    with monkeypatch.context() as patched:

        def broken(*arguments: object) -> None:
            raise ZeroDivisionError

        patched.setattr("coatcheck.verifier.follower.read_page", broken)
        bench.desk.wait_again("fail: the revocation feed: an error of this program", lambda: bench.turn(2.0))
    assert verifier.status.running
    assert "ZeroDivisionError" in caplog.text
    poll(bench)
    assert verifier.verify(text).subject


def test_a_frozen_thread_lets_the_lease_run_out(bench: Bench) -> None:
    verifier, text = bench.following(), bench.mint()
    frozen, go_on = threading.Event(), threading.Event()

    def freeze(handler: Handler) -> None:
        frozen.set()
        go_on.wait(WAIT)
        bench.issuer.give_page(handler)

    bench.issuer.on_poll = freeze
    bench.turn(2.0)
    assert frozen.wait(WAIT)
    bench.system.advance(3.0)
    with pytest.raises(FeedSilent):
        verifier.verify(text)
    go_on.set()


def test_many_threads_verify_while_revocations_come(bench: Bench) -> None:
    verifier = bench.following(cache_size=8)
    texts = [bench.mint(sid=f"s{n}", jti=f"t{n}") for n in range(16)]
    failures: list[BaseException] = []
    denied: list[str] = []
    stop = threading.Event()

    def work(mine: str) -> None:
        try:
            while not stop.is_set():
                verifier.verify(mine)
        except TokenInvalid as refused:
            denied.append(refused.cause)
        except BaseException as broken:
            failures.append(broken)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for number in range(16):
        bench.issuer.push({"kind": "sid", "sid": f"s{number}", "until": bench.until})
    for thread in threads:
        thread.join(WAIT)
    stop.set()
    assert not failures
    assert denied == ["denied_sid"] * 16


def test_an_issuer_that_restarts_is_found_again(bench: Bench, issuer: Issuer) -> None:
    verifier, text = bench.following(), bench.mint()
    bench.desk.wait_again("fail: the stream of revocations: the stream ended", issuer.end_streams)
    issuer.entries.append({"kind": "sid", "sid": "the-session", "until": bench.until})
    bench.desk.wait_again("_open", lambda: bench.turn(1.6))
    poll(bench)
    assert cause(verifier, text) == "denied_sid"
