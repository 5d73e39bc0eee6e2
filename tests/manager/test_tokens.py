"""Tokens of a session in both colours: issued, exchanged, checked, denied; keys that come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import pytest

from coatcheck import (
    ConfigurationError,
    IssuedTokens,
    LoginRequired,
    RefreshInvalid,
    RefreshReused,
    SessionGone,
    Settings,
    TokenInvalid,
    TokenSettings,
)
from coatcheck.core.denylist import KEYS_AT_MOST
from coatcheck.core.key_ring import MAX_KEYS
from coatcheck.core.ports import Colour, SessionStore
from coatcheck.errors import SessionEnded, StoreUnavailable, ValueRefused
from coatcheck.operations.keys import retire_all
from coatcheck.testing import FakeSystem
from tests.manager.conftest import Bench

pytestmark = pytest.mark.anyio

LONG = Settings(
    public_url="https://id.example",
    idle_timeout=timedelta(days=7),
    absolute_timeout=timedelta(days=30),
    tokens=TokenSettings(audiences=("orders",)),
)
GRACE = 30


@pytest.fixture(params=["memory", "sqlite"])
async def desk(request: pytest.FixtureRequest, colour: Colour, tmp_path: Path) -> AsyncIterator[Bench]:
    """A node whose sessions have tokens."""
    url = "memory:" if request.param == "memory" else f"sqlite:///{tmp_path / 'sessions.db'}"
    bench = Bench(colour, url, LONG)
    yield bench
    bench.store.away = None
    await bench.do(bench.coat.close())


async def tokens_of(bench: Bench, subject: str = "50", **more: Any) -> IssuedTokens:
    session = await bench.sign_in(subject, **more)
    found: IssuedTokens = await bench.do(session.tokens(carrier="body"))
    return found


async def refreshed(bench: Bench, token: str | None) -> IssuedTokens:
    assert token is not None
    found: IssuedTokens = await bench.do(bench.coat.refresh(token))
    return found


async def check(bench: Bench, token: str) -> Any:
    return await bench.do(bench.coat.verify(token))


# -- issuing -------------------------------------------------------------------------------------------------------


async def test_a_token_says_what_the_sign_in_proved(desk: Bench) -> None:
    issued = await tokens_of(desk, claims={"role": "admin"}, scopes=("read",), amr=("pwd", "otp"), acr="2")
    found = await check(desk, issued.access_token)
    assert (found.subject, found.issuer, found.audience) == ("50", "https://id.example", ("https://id.example",))
    assert (dict(found.claims), found.scopes, found.amr, found.acr) == (
        {"role": "admin"},
        ("read",),
        ("pwd", "otp"),
        "2",
    )
    assert (found.sid, found.client_id) == (issued.sid, "first-party")
    assert (issued.expires_in, found.expires_at - found.issued_at) == (900, 900)
    assert found.auth_time == desk.system.now_us() // 1_000_000


async def test_signing_in_and_issuing_cost_one_command_each(desk: Bench) -> None:
    await desk.do(desk.coat.start())
    session = await desk.sign_in("50")
    desk.store.forget()
    await desk.do(session.tokens())
    assert desk.store.verbs == ["create_family"]


async def test_a_token_never_outlives_its_session(desk: Bench) -> None:
    session = await desk.sign_in("50")
    desk.system.advance(timedelta(days=6, hours=23))
    for _ in range(4):
        issued = await desk.do(session.tokens(carrier="body"))
        assert await desk.do(desk.coat.refresh(issued.refresh_token))
        desk.system.advance(timedelta(days=5, hours=18, minutes=10))
    desk.system.advance(timedelta(minutes=9))
    left = timedelta(days=30) - timedelta(days=29, hours=23, minutes=49)
    issued = await desk.do(session.tokens(carrier="body"))
    assert issued.expires_in == left.total_seconds()


async def test_nobody_and_somebody_anonymous_get_no_tokens(desk: Bench) -> None:
    session = desk.coat.session(None)
    await desk.do(session.load())
    with pytest.raises(LoginRequired):
        await desk.do(session.tokens())
    session["cart"] = 1
    await desk.do(session.commit())
    with pytest.raises(LoginRequired):
        await desk.do(session.tokens())


async def test_an_ended_session_gets_no_tokens(desk: Bench) -> None:
    session = await desk.sign_in("50")
    await desk.do(desk.coat.revoke_subject("50", reason="stolen laptop"))
    with pytest.raises(SessionGone):
        await desk.do(session.tokens())


async def test_an_audience_has_to_be_in_the_settings(desk: Bench) -> None:
    session = await desk.sign_in("50")
    issued = await desk.do(session.tokens(audience="orders", carrier="body"))
    # It is for the other service: this one refuses it (RFC 9068 s4).
    with pytest.raises(TokenInvalid):
        await check(desk, issued.access_token)
    desk.store.forget()
    with pytest.raises(ValueRefused):
        await desk.do(session.tokens(audience="billing"))
    assert desk.store.verbs == []


async def test_a_claim_with_a_registered_name_is_refused_at_sign_in(desk: Bench) -> None:
    session = desk.coat.session(None)
    with pytest.raises(ValueRefused, match="aud"):
        await desk.do(session.login("50", claims={"aud": "everybody"}))
    await desk.do(session.login("50"))
    with pytest.raises(ValueRefused, match="exp"):
        await desk.do(session.rotate(claims={"exp": 1}))


@pytest.mark.parametrize(
    "more",
    [
        {"scopes": tuple(f"scope-{number:03}-{'x' * 100}" for number in range(64))},
        {"claims": {"bulk": "x" * 4000}, "scopes": tuple("s" * 100 + str(number) for number in range(20))},
        {"acr": "x" * 5000},
    ],
)
async def test_what_no_access_token_could_carry_is_refused_at_sign_in(more: dict[str, Any], desk: Bench) -> None:
    # Found out at a refresh it would cost the client its refresh token.
    session = desk.coat.session(None)
    with pytest.raises(ValueRefused):
        await desk.do(session.login("50", **more))
    assert (await desk.do(desk.coat.list_sessions("50"))).items == ()


async def test_new_claims_must_fit_beside_what_is_there(desk: Bench) -> None:
    session = await desk.sign_in("50", scopes=tuple(f"{'s' * 100}{number}" for number in range(30)))
    issued = await desk.do(session.tokens(carrier="body"))
    with pytest.raises(ValueRefused):
        await desk.do(session.rotate(claims={"bulk": "x" * 4000}))
    assert (await refreshed(desk, issued.refresh_token)).subject == "50"


async def test_in_the_last_second_of_a_session_there_are_no_tokens(desk: Bench) -> None:
    desk.system.advance(0.5)
    issued = await tokens_of(desk)
    for _ in range(4):
        desk.system.advance(timedelta(days=6))
        issued = await refreshed(desk, issued.refresh_token)
    desk.system.advance(timedelta(days=6) - timedelta(milliseconds=100))
    with pytest.raises(SessionEnded) as ended:
        await refreshed(desk, issued.refresh_token)
    assert ended.value.reason == "absolute_timeout"


async def test_no_text_of_a_token_is_in_a_repr(desk: Bench) -> None:
    issued = await tokens_of(desk)
    for text in (issued.access_token, issued.refresh_token):
        assert text is not None
        assert text not in repr(issued)


async def test_without_token_settings_the_error_says_how_to_turn_them_on(bench: Bench) -> None:
    session = await bench.sign_in("50")
    with pytest.raises(ConfigurationError, match="TokenSettings"):
        await bench.do(session.tokens())
    with pytest.raises(ConfigurationError, match="TokenSettings"):
        await bench.do(bench.coat.refresh("x"))


# -- exchanging ----------------------------------------------------------------------------------------------------


async def test_a_token_younger_than_the_grace_stays(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(timedelta(seconds=GRACE) - timedelta(microseconds=1))
    again = await refreshed(desk, issued.refresh_token)
    assert again.refresh_token == issued.refresh_token
    assert again.access_token != issued.access_token


async def test_everybody_who_presents_it_within_the_grace_gets_the_same_successor(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(GRACE)
    first = await refreshed(desk, issued.refresh_token)
    desk.system.advance(timedelta(seconds=GRACE) - timedelta(microseconds=1))
    second = await refreshed(desk, issued.refresh_token)
    assert first.refresh_token == second.refresh_token != issued.refresh_token


async def test_a_lost_answer_signs_nobody_out(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(GRACE)
    desk.store.answers_lost = frozenset({"rotate_refresh"})
    with pytest.raises(StoreUnavailable):
        await refreshed(desk, issued.refresh_token)
    desk.store.answers_lost = frozenset()
    again = await refreshed(desk, issued.refresh_token)
    desk.system.advance(GRACE)
    assert (await refreshed(desk, again.refresh_token)).subject == "50"


async def test_a_straggler_behind_a_used_successor_is_forgiven_and_gets_no_token(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(GRACE)
    successor = await refreshed(desk, issued.refresh_token)
    await refreshed(desk, successor.refresh_token)
    late = await refreshed(desk, issued.refresh_token)
    assert late.refresh_token is None
    assert (await check(desk, late.access_token)).subject == "50"
    assert (await refreshed(desk, successor.refresh_token)).refresh_token == successor.refresh_token


async def test_second_use_after_the_grace_ends_session_and_family(desk: Bench) -> None:
    issued, other = await tokens_of(desk), await tokens_of(desk)
    desk.system.advance(GRACE)
    successor = await refreshed(desk, issued.refresh_token)
    desk.system.advance(GRACE)
    desk.events.clear()
    with pytest.raises(RefreshReused):
        await refreshed(desk, issued.refresh_token)
    assert desk.events.kinds() == ["refresh.reused", "session.ended"]
    assert desk.events.all[1].data["reason"] == "refresh_reused"
    assert {event.sid for event in desk.events.all} == {issued.sid}
    with pytest.raises(SessionEnded) as ended:
        await refreshed(desk, successor.refresh_token)
    assert ended.value.reason == "refresh_reused"
    with pytest.raises(TokenInvalid):
        await check(desk, successor.access_token)
    # Another session of the same person is another matter.
    assert (await refreshed(desk, other.refresh_token)).sid == other.sid


@pytest.mark.parametrize("grace", [0, 300])
async def test_the_grace_is_a_setting(grace: int, make_bench: Any) -> None:
    tokens = TokenSettings(reuse_grace=timedelta(seconds=grace))
    desk = make_bench(replace(LONG, tokens=tokens))
    issued = await tokens_of(desk)
    desk.system.advance(grace)
    await refreshed(desk, issued.refresh_token)
    if grace:
        desk.system.advance(timedelta(seconds=grace) - timedelta(microseconds=1))
        assert (await refreshed(desk, issued.refresh_token)).subject == "50"
        desk.system.advance(timedelta(microseconds=1))
    with pytest.raises(RefreshReused):
        await refreshed(desk, issued.refresh_token)


async def test_an_invented_token_costs_no_command(desk: Bench) -> None:
    issued = await tokens_of(desk)
    assert issued.refresh_token is not None
    desk.store.forget()
    for text in (
        "",
        "x" * 88,
        issued.refresh_token[:-1],
        issued.refresh_token[:-1] + "!",
        issued.access_token,
        "ü" * 88,
    ):
        with pytest.raises(RefreshInvalid):
            await refreshed(desk, text)
    assert desk.store.verbs == []


async def test_an_exchange_is_one_command_and_counts_as_activity(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(timedelta(days=6))
    desk.store.forget()
    again = await refreshed(desk, issued.refresh_token)
    # The ring had grown old; a second exchange shows the cost of the exchange alone.
    assert desk.store.verbs == ["read_ring", "rotate_refresh"]
    desk.store.forget()
    await refreshed(desk, again.refresh_token)
    assert desk.store.verbs == ["rotate_refresh"]
    desk.system.advance(timedelta(days=6))
    assert (await refreshed(desk, again.refresh_token)).subject == "50"


async def test_rotation_never_extends_the_absolute_lifetime(desk: Bench) -> None:
    token = (await tokens_of(desk)).refresh_token
    for _ in range(29):
        desk.system.advance(timedelta(days=1))
        token = (await refreshed(desk, token)).refresh_token
    desk.system.advance(timedelta(days=1) - timedelta(microseconds=1))
    token = (await refreshed(desk, token)).refresh_token
    desk.system.advance(timedelta(microseconds=1))
    with pytest.raises(SessionEnded) as ended:
        await refreshed(desk, token)
    assert ended.value.reason == "absolute_timeout"


async def test_a_stricter_limit_of_today_ends_an_older_family(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(timedelta(days=2))
    stricter = replace(LONG, idle_timeout=timedelta(days=1))
    kind = type(desk.coat)
    today = kind(cast(SessionStore, desk.store), settings=stricter, system=desk.system)
    with pytest.raises(SessionEnded) as ended:
        await desk.do(today.refresh(issued.refresh_token or ""))
    assert ended.value.reason == "idle_timeout"


@pytest.mark.parametrize("how", ["logout", "revoke_session", "revoke_subject", "evicted"])
async def test_whatever_ends_the_session_ends_its_tokens(how: str, desk: Bench) -> None:
    session = await desk.sign_in("50")
    issued = await desk.do(session.tokens(carrier="body"))
    desk.system.advance(1)
    match how:
        case "logout":
            await desk.do(session.logout())
        case "revoke_session":
            await desk.do(desk.coat.revoke_session(issued.sid, reason="gone"))
        case "revoke_subject":
            await desk.do(desk.coat.revoke_subject("50", reason="gone"))
        case _:
            for _ in range(LONG.max_sessions_per_subject):
                await desk.sign_in("50")
    with pytest.raises(SessionEnded):
        await refreshed(desk, issued.refresh_token)
    with pytest.raises(TokenInvalid):
        await check(desk, issued.access_token)
    page = await desk.coat.engine.issuer.denials(after=None, limit=1000)
    assert desk.coat.engine.issuer.ring.longest == 900
    assert [(each.kind, each.until_us - page.now_us) for each in page.entries] == [("sid", 960_000_000)]  # type: ignore[union-attr]


async def test_a_new_id_or_new_claims_leave_the_tokens_alone(desk: Bench) -> None:
    session = await desk.sign_in("50", claims={"role": "user"})
    issued = await desk.do(session.tokens(carrier="body"))
    await desk.do(session.rotate())
    await desk.do(session.rotate(claims={"role": "admin"}))
    again = await refreshed(desk, issued.refresh_token)
    assert dict((await check(desk, again.access_token)).claims) == {"role": "admin"}


# -- checking and denying ------------------------------------------------------------------------------------------


async def test_a_token_is_refused_from_its_expiry_on(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(timedelta(seconds=900) - timedelta(microseconds=1))
    assert await check(desk, issued.access_token)
    desk.system.advance(timedelta(microseconds=1))
    with pytest.raises(TokenInvalid):
        await check(desk, issued.access_token)


async def test_a_check_costs_one_command_and_an_invented_token_none(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.store.forget()
    await check(desk, issued.access_token)
    assert desk.store.verbs == ["standing"]
    desk.store.forget()
    for text in ("", "a.b.c", issued.access_token[:-2], issued.refresh_token or "", "ü.ü.ü"):
        with pytest.raises(TokenInvalid):
            await check(desk, text)
    assert desk.store.verbs == []


async def test_one_denied_token_leaves_the_session_and_its_next_token(desk: Bench) -> None:
    issued = await tokens_of(desk)
    await desk.do(desk.coat.deny_token(issued.access_token))
    with pytest.raises(TokenInvalid):
        await check(desk, issued.access_token)
    again = await refreshed(desk, issued.refresh_token)
    assert await check(desk, again.access_token)
    page = await desk.coat.engine.issuer.denials(after=None, limit=10)
    assert [(each.kind, each.until_us) for each in page.entries] == [("jti", (issued.expires_at + 60) * 1_000_000)]  # type: ignore[union-attr]


async def test_an_expired_token_can_still_be_denied_and_an_invented_one_cannot(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.system.advance(timedelta(hours=1))
    await desk.do(desk.coat.deny_token(issued.access_token))
    with pytest.raises(TokenInvalid):
        await desk.do(desk.coat.deny_token("a.b.c"))


async def test_any_application_on_the_store_knows_how_late_verifiers_hear(
    make_bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = TokenSettings(verifier_lease=timedelta(minutes=5))
    desk = make_bench(replace(LONG, server_key=b"k" * 32, tokens=slow))
    await desk.do(desk.coat.start())
    plain = type(desk.coat)(desk.store, settings=replace(LONG, tokens=None), system=desk.system)
    await desk.do(plain.start())
    assert plain.engine.reach == desk.coat.engine.reach == timedelta(minutes=5, seconds=1)


async def test_a_revoke_that_waits_returns_when_no_verifier_can_still_accept(
    desk: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    class Waits:
        async def sleep(self, seconds: float) -> None:
            slept.append(seconds)

    monkeypatch.setattr(desk.coat.engine, "waits", Waits())
    issued = await tokens_of(desk)
    done = await desk.do(desk.coat.revoke_session(issued.sid, reason="gone"))
    # Verifiers that did not hear the stream learn of it within their lease, and the server's own.
    assert (done.ended, done.reach_elapsed, slept) == (1, False, [])
    done = await desk.do(desk.coat.revoke_subject("50", reason="gone", wait=True))
    assert (done.reach_elapsed, slept) == (True, [6.0])


async def test_a_store_that_is_away_vouches_for_nothing(desk: Bench) -> None:
    issued = await tokens_of(desk)
    desk.store.away = frozenset()
    with pytest.raises(StoreUnavailable):
        await check(desk, issued.access_token)
    with pytest.raises(StoreUnavailable):
        await refreshed(desk, issued.refresh_token)
    desk.store.away = None
    assert (await check(desk, issued.access_token)).subject == "50"
    assert (await refreshed(desk, issued.refresh_token)).subject == "50"


# -- keys ----------------------------------------------------------------------------------------------------------


async def test_a_new_key_signs_after_its_time_and_no_token_is_refused(desk: Bench) -> None:
    issued = await tokens_of(desk)
    issuer = desk.coat.engine.issuer
    old = issuer.ring.keys[0].kid
    kid, _ = await issuer.rotate_key()
    assert kid.encode() in issuer.published().document
    ahead = TokenSettings().publish_ahead
    desk.system.advance(ahead - timedelta(seconds=1))
    before = await refreshed(desk, issued.refresh_token)
    desk.system.advance(timedelta(seconds=1))
    after = await refreshed(desk, before.refresh_token)
    # GHSA-4grg-w6v8-c28g: after a rotation still signed with the old key.
    assert (kid_of(before.access_token), kid_of(after.access_token)) == (old, kid)
    assert await check(desk, issued.access_token)
    assert await check(desk, after.access_token)


async def test_a_withdrawn_key_is_refused_at_once_and_told_to_verifiers(desk: Bench) -> None:
    issued = await tokens_of(desk)
    issuer = desk.coat.engine.issuer
    await issuer.retire_key(kid_of(issued.access_token))
    with pytest.raises(TokenInvalid):
        await check(desk, issued.access_token)
    again = await refreshed(desk, issued.refresh_token)
    assert await check(desk, again.access_token)
    page = await issuer.denials(after=None, limit=10)
    assert [(each.kind, each.id) for each in page.entries] == [("kid", kid_of(issued.access_token))]  # type: ignore[union-attr]
    with pytest.raises(ValueRefused):
        await issuer.retire_key("nobody's")


async def test_keys_rotate_by_themselves_when_their_period_ends(make_bench: Any) -> None:
    desk = make_bench(replace(LONG, tokens=TokenSettings(key_period=timedelta(days=10))))
    token = (await tokens_of(desk)).refresh_token
    kids = set[str]()
    for _ in range(4):
        desk.system.advance(timedelta(days=6))
        issued = await refreshed(desk, token)
        token = issued.refresh_token
        kids.add(kid_of(issued.access_token))
    assert len(kids) == 2


async def test_every_server_goes_on_with_the_one_ring_that_stands(desk: Bench) -> None:
    await desk.do(desk.coat.start())
    other = type(desk.coat)(cast(SessionStore, desk.store), settings=LONG, system=FakeSystem(seed=b"other"))
    await desk.do(other.start())
    assert other.engine.issuer.ring == desk.coat.engine.issuer.ring
    issued = await tokens_of(desk)
    assert await desk.do(other.verify(issued.access_token))


async def test_another_server_key_opens_no_ring_and_says_so(make_bench: Any) -> None:
    desk = make_bench(replace(LONG, server_key=b"a" * 32))
    await desk.do(desk.coat.start())
    other = type(desk.coat)(desk.store, settings=replace(LONG, server_key=b"b" * 32), system=desk.system)
    with pytest.raises(ConfigurationError, match="server_key"):
        await desk.do(other.start())


@pytest.mark.parametrize("algorithm", ["ES256", "EdDSA", "RS256", "HS256"])
async def test_every_algorithm_on_request(algorithm: Any, make_bench: Any) -> None:
    desk = make_bench(replace(LONG, tokens=TokenSettings(algorithm=algorithm)))
    issued = await tokens_of(desk)
    assert await check(desk, issued.access_token)
    published = desk.coat.engine.issuer.published().document
    # An HS256 key is a secret and never published.
    assert (b'"keys":[]' in published) == (algorithm == "HS256")
    assert b'"d"' not in published


async def test_a_ring_of_the_other_kind_is_left_alone(make_bench: Any) -> None:
    # CVE-2022-29217 begins where a public key and a secret stand in one ring.
    desk = make_bench(replace(LONG, server_key=b"k" * 32))
    issued = await tokens_of(desk)
    settings = replace(LONG, tokens=TokenSettings(algorithm="HS256"), server_key=b"k" * 32)
    other = type(desk.coat)(desk.store, settings=settings, system=desk.system)
    with pytest.raises(ConfigurationError, match="retire --all"):
        await desk.do(other.start())
    assert (await check(desk, issued.access_token)).subject == "50"
    await retire_all(desk.store)
    await desk.do(other.start())
    assert [key.algorithm for key in other.engine.issuer.ring.keys] == ["HS256"]
    # The client refreshes and goes on.
    assert (await desk.do(other.refresh(issued.refresh_token))).subject == "50"


async def test_a_server_with_another_server_key_writes_nothing_into_the_ring(make_bench: Any) -> None:
    desk = make_bench(replace(LONG, server_key=b"a" * 32))
    await desk.do(desk.coat.start())
    before = await desk.store.read_ring()
    # Rotation is due, and another algorithm wanted: both would make a key that the others cannot open.
    desk.system.advance(timedelta(days=31))
    settings = replace(LONG, server_key=b"b" * 32, tokens=TokenSettings(algorithm="EdDSA"))
    other = type(desk.coat)(desk.store, settings=settings, system=desk.system)
    with pytest.raises(ConfigurationError, match="server_key"):
        await desk.do(other.start())
    assert await desk.store.read_ring() == before


async def test_servers_that_disagree_about_the_algorithm_fill_a_ring_and_stop_nobody(make_bench: Any) -> None:
    day = timedelta(hours=24)
    desk = make_bench(replace(LONG, server_key=b"k" * 32, tokens=TokenSettings(access_lifetime=day)))
    settings = replace(LONG, server_key=b"k" * 32, tokens=TokenSettings(algorithm="EdDSA", access_lifetime=day))
    other = type(desk.coat)(desk.store, settings=settings, system=desk.system)
    for _ in range(60):
        desk.system.advance(200)
        for coat in (desk.coat, other):
            session = coat.session(None)
            await desk.do(session.login("50"))
            assert (await desk.do(session.tokens())).expires_in == 86400
    assert len(desk.coat.engine.issuer.ring.keys) == MAX_KEYS


async def test_a_longer_life_counts_only_when_every_server_denies_for_as_long(make_bench: Any) -> None:
    desk = make_bench(replace(LONG, server_key=b"k" * 32))
    await desk.do(desk.coat.start())
    settings = replace(LONG, server_key=b"k" * 32, tokens=TokenSettings(access_lifetime=timedelta(hours=24)))
    other = type(desk.coat)(desk.store, settings=settings, system=desk.system)

    async def life() -> int:
        session = other.session(None)
        await desk.do(session.login("50"))
        seconds: int = (await desk.do(session.tokens())).expires_in
        return seconds

    assert await life() == 900
    desk.system.advance(timedelta(seconds=60) - timedelta(microseconds=1))
    assert await life() == 900
    desk.system.advance(timedelta(microseconds=1))
    assert await life() == 86400
    # The first server has done nothing but sessions since, and denies for as long all the same.
    session = await desk.sign_in("51")
    await desk.do(session.logout())
    page = await desk.coat.engine.issuer.denials(after=None, limit=10)
    assert {each.until_us - page.now_us for each in page.entries} == {(86400 + 60) * 1_000_000}


async def test_a_server_behind_the_clock_of_its_store_refuses_no_fresh_token(make_bench: Any) -> None:
    desk = make_bench(replace(LONG, server_key=b"k" * 32))
    issued = await tokens_of(desk)
    late = type(desk.coat)(desk.store, settings=desk.coat.settings, system=Behind(desk.system, seconds=5))
    assert (await desk.do(late.verify(issued.access_token))).subject == "50"
    desk.system.advance(900)
    # And it accepts none that is over by the clock that made it.
    with pytest.raises(TokenInvalid, match="expired"):
        await desk.do(late.verify(issued.access_token))


async def test_a_withdrawn_key_is_denied_until_no_verifier_can_have_it_cached(desk: Bench) -> None:
    issued = await tokens_of(desk)
    issuer = desk.coat.engine.issuer
    await issuer.retire_key(kid_of(issued.access_token))
    page = await issuer.denials(after=None, limit=10)
    (entry,) = page.entries  # type: ignore[union-attr]
    assert entry.until_us - page.now_us == (900 + 60 + KEYS_AT_MOST) * 1_000_000


async def test_a_token_for_another_service_can_be_denied_here(desk: Bench) -> None:
    session = await desk.sign_in("50")
    issued = await desk.do(session.tokens(audience="orders"))
    await desk.do(desk.coat.deny_token(issued.access_token))
    page = await desk.coat.engine.issuer.denials(after=None, limit=10)
    assert [each.kind for each in page.entries] == ["jti"]  # type: ignore[union-attr]


async def test_an_application_without_tokens_tells_verifiers_all_the_same(desk: Bench) -> None:
    issued = await tokens_of(desk)
    plain = type(desk.coat)(cast(SessionStore, desk.store), settings=replace(LONG, tokens=None), system=desk.system)
    await desk.do(plain.start())
    await desk.do(plain.revoke_session(issued.sid, reason="by the console"))
    page = await desk.coat.engine.issuer.denials(after=None, limit=10)
    assert [each.kind for each in page.entries] == ["sid"]  # type: ignore[union-attr]
    assert (await desk.do(plain.revoke_session(issued.sid, reason="again"))).reach_elapsed is False


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"algorithm": "none"}, "algorithm"),
        ({"access_lifetime": timedelta(seconds=9)}, "access_lifetime"),
        ({"access_lifetime": timedelta(hours=24, seconds=1)}, "access_lifetime"),
        ({"access_lifetime": timedelta(seconds=10.5)}, "access_lifetime"),
        ({"reuse_grace": timedelta(seconds=301)}, "reuse_grace"),
        ({"reuse_grace": timedelta(seconds=-1)}, "reuse_grace"),
        ({"leeway": timedelta(seconds=61)}, "leeway"),
        ({"key_period": timedelta(minutes=5)}, "key_period"),
        ({"keys_max_age": timedelta(hours=23), "key_period": timedelta(hours=24)}, "key_period"),
        ({"issuer": "id.example"}, "issuer"),
        ({"issuer": "https://id.example?x"}, "issuer"),
        ({"audience": "with space"}, "audience"),
        ({"audiences": "orders"}, "audiences"),
        ({"client_id": ""}, "client_id"),
    ],
)
def test_token_settings_check_themselves(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        TokenSettings(**wrong)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"tokens\.issuer"):
        Settings(tokens=TokenSettings())
    with pytest.raises(ConfigurationError, match="access_lifetime"):
        Settings(public_url="https://id.example", tokens=TokenSettings(access_lifetime=timedelta(hours=1)))
    assert Settings(tokens=TokenSettings(issuer="https://id.example")).issuer == "https://id.example"
    assert LONG.refresh_cookie.name == "__Host-Http-refresh"
    assert LONG.refresh_cookie.same_site == "Strict"


class Behind:
    """The clock of a server that is late."""

    def __init__(self, system: FakeSystem, *, seconds: int) -> None:
        self._system = system
        self._late_us = seconds * 1_000_000

    def now_us(self) -> int:
        return self._system.now_us() - self._late_us

    def elapsed(self) -> float:
        return self._system.elapsed()

    def random(self, size: int) -> bytes:
        return self._system.random(size)


def kid_of(token: str) -> str:
    import base64
    import json

    header = token.split(".")[0]
    kid: str = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))["kid"]
    return kid
