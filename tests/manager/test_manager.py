"""Both faces: the same names, and what lists, filters and revokes promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

import pytest

from coatcheck import (
    AsyncCoatcheck,
    AsyncSession,
    Coatcheck,
    ConfigurationError,
    Event,
    Page,
    Revocation,
    Session,
    SessionFilter,
    SessionLimit,
    SessionLimitReached,
    SessionSummary,
    Settings,
)
from coatcheck.core.ports import SessionStore
from coatcheck.errors import ValueRefused
from coatcheck.places import ClientPlace
from coatcheck.session import SendCookie
from coatcheck.stores.open import open_store
from tests.manager.conftest import Bench, id_of

DUNDERS = {"__enter__": "__aenter__", "__exit__": "__aexit__"}


# -- two colours, one surface --------------------------------------------------------------------------------------


def surface(kind: type) -> dict[str, Any]:
    """Public names with their kind and parameters; what differs is only whether one waits."""
    found: dict[str, Any] = {}
    for name in dir(kind):
        if name.startswith("_") and name not in DUNDERS and name not in DUNDERS.values():
            continue
        member = inspect.getattr_static(kind, name)
        name = {value: key for key, value in DUNDERS.items()}.get(name, name)
        if isinstance(member, property):
            found[name] = "property"
        elif isinstance(member, classmethod):
            found[name] = str(inspect.signature(member.__func__))
        elif callable(member):
            signature = inspect.signature(member)
            found[name] = [str(parameter) for parameter in signature.parameters.values()]
    return found


@pytest.mark.parametrize(("blocking", "asynchronous"), [(Coatcheck, AsyncCoatcheck), (Session, AsyncSession)])
def test_both_colours_have_the_same_names_and_parameters(blocking: type, asynchronous: type) -> None:
    assert surface(blocking) == surface(asynchronous)


@pytest.mark.parametrize(("blocking", "asynchronous"), [(Coatcheck, AsyncCoatcheck), (Session, AsyncSession)])
def test_both_colours_say_the_same_in_their_documentation(blocking: type, asynchronous: type) -> None:
    # These differ on purpose: what has to be awaited, and when it loads.
    differing = {"login", "session"}
    for name, member in vars(blocking).items():
        if inspect.isfunction(member) and not name.startswith("_") and name not in differing:
            assert inspect.getdoc(member) == inspect.getdoc(getattr(asynchronous, name)), name


@pytest.mark.parametrize("kind", [Coatcheck, AsyncCoatcheck])
def test_a_store_of_the_other_colour_is_refused(kind: Callable[..., Any]) -> None:
    other = open_store("memory:", colour="async" if kind is Coatcheck else "blocking")
    with pytest.raises(ConfigurationError, match=r"^store: .*colour"):
        kind(other)


@pytest.mark.parametrize("url", ["", "nothing", "mysql://db", "http://x:secret@y"])
def test_an_unknown_store_is_refused_without_repeating_the_url(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^store: ") as refused:
        Coatcheck(url)
    assert "secret" not in refused.value.detail


def test_from_env_builds_a_working_face() -> None:
    with Coatcheck.from_env({"COATCHECK_STORE": "memory:", "COATCHECK_NAMESPACE": "shop"}) as coat:
        assert coat.settings.namespace == "shop"
        assert coat.revoke_subject("50", reason="stolen laptop", wait=True) == Revocation(ended=0, reach_elapsed=True)


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COATCHECK_STORE", "memory:")
    monkeypatch.setenv("COATCHECK_IDLE_TIMEOUT", "60")
    assert AsyncCoatcheck.from_env().settings.idle_timeout.total_seconds() == 60


# -- lists ---------------------------------------------------------------------------------------------------------

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore::pytest.PytestWarning")]


async def test_a_summary_shows_the_session_and_no_secret(bench: Bench) -> None:
    place = ClientPlace(address="203.0.113.7", user_agent="Firefox")
    session = await bench.sign_in("50", place=place, scopes=("read",), persistent=True)
    start = bench.system.now_us() / 1_000_000
    [summary] = (await bench.do(bench.coat.list_sessions("50"))).items
    assert summary == SessionSummary(
        sid=str(session.sid),
        subject="50",
        created_at=start,
        last_seen_at=start,
        expires_at=start + bench.coat.settings.idle_timeout.total_seconds(),
        network="203.0.113.7",
        user_agent="Firefox",
        scopes=("read",),
        persistent=True,
    )
    # CVE-2020-5224: the session list showed the keys of other sessions.
    assert id_of(session)[20:] not in repr(summary)


async def test_an_absolute_deadline_shows_in_the_summary(bench: Bench) -> None:
    await bench.sign_in("50")
    settings = bench.coat.settings
    idle, absolute = settings.idle_timeout.total_seconds(), settings.absolute_timeout.total_seconds()
    session_id = id_of(await bench.sign_in("51"))
    for _ in range(int(absolute / idle)):
        bench.system.advance(idle * 0.99)
        await bench.load(session_id)
        await bench.coat.engine.maintain()
    [summary] = (await bench.do(bench.coat.list_sessions("51"))).items
    assert summary.expires_at == summary.created_at + absolute
    assert (await bench.do(bench.coat.list_sessions("50"))).items == ()


async def test_a_subjects_list_is_paged_oldest_first(bench: Bench) -> None:
    sids = []
    for _ in range(5):
        sids.append((await bench.sign_in("50")).sid)
        bench.system.advance(1)
    await bench.sign_in("51")
    listed: list[str] = []
    cursor: str | None = None
    while True:
        page: Page[SessionSummary] = await bench.do(bench.coat.list_sessions("50", after=cursor, limit=2))
        listed += [each.sid for each in page.items]
        cursor = page.cursor
        if cursor is None:
            break
    assert listed == sids


@pytest.mark.parametrize("limit", [0, 1001, -1])
async def test_a_page_has_a_size(bench: Bench, limit: int) -> None:
    with pytest.raises(ValueRefused):
        await bench.do(bench.coat.list_sessions("50", limit=limit))
    with pytest.raises(ValueRefused):
        await bench.do(bench.coat.find_sessions(SessionFilter(), limit=limit))


@pytest.mark.parametrize("cursor", ["", "x", "0' OR 1=1", "9" * 40, "\x00"])
async def test_an_invented_cursor_is_refused(bench: Bench, cursor: str) -> None:
    # GO-2026-4807: an injection through the pagination token.
    with pytest.raises(ValueRefused):
        await bench.do(bench.coat.list_sessions("50", after=cursor))
    with pytest.raises(ValueRefused):
        await bench.do(bench.coat.find_sessions(SessionFilter(), after=cursor))


async def fleet(bench: Bench) -> dict[str, float]:
    """Four sessions a minute apart; returns when each began."""
    began: dict[str, float] = {}
    for subject, address in (("a", "203.0.113.7"), ("b", "203.0.113.8"), ("c", "2001:db8::1"), ("d", None)):
        began[subject] = bench.system.now_us() / 1_000_000
        await bench.sign_in(subject, place=ClientPlace(address=address))
        bench.system.advance(60)
    anonymous = bench.coat.session(None)
    await bench.do(anonymous.load())
    anonymous["cart"] = 1
    await bench.do(anonymous.commit())
    return began


@pytest.mark.parametrize(
    ("make", "meant"),
    [
        (lambda began: SessionFilter(), ["a", "b", "c", "d"]),
        (lambda began: SessionFilter(signed_in=None), ["None", "a", "b", "c", "d"]),
        (lambda began: SessionFilter(signed_in=False), ["None"]),
        (lambda began: SessionFilter(subject="b"), ["b"]),
        (lambda began: SessionFilter(subject="nobody"), []),
        (lambda began: SessionFilter(network="203.0.113.0/24"), ["a", "b"]),
        (lambda began: SessionFilter(network="203.0.113.8"), ["b"]),
        (lambda began: SessionFilter(network="2001:db8::/32"), ["c"]),
        (lambda began: SessionFilter(created_before=began["c"]), ["a", "b"]),
        (lambda began: SessionFilter(seen_before=began["b"]), ["a"]),
        (lambda began: SessionFilter(network="203.0.113.0/24", created_before=began["b"]), ["a"]),
    ],
)
async def test_a_filter_means_whom_all_its_conditions_fit(
    bench: Bench, make: Callable[[dict[str, float]], SessionFilter], meant: list[str]
) -> None:
    filter_ = make(await fleet(bench))
    page = await bench.do(bench.coat.find_sessions(filter_))
    assert sorted(str(each.subject) for each in page.items) == meant


def test_a_filter_with_a_wrong_network_is_refused() -> None:
    with pytest.raises(ValueRefused):
        SessionFilter(network="not an address")


# -- revokes -------------------------------------------------------------------------------------------------------


async def test_revoke_by_sid_ends_one_session_and_is_fine_when_absent(bench: Bench) -> None:
    session = await bench.sign_in("50")
    await bench.sign_in("50")
    sid = str(session.sid)
    bench.events.clear()
    assert await bench.do(bench.coat.revoke_session(sid, reason="lost")) == Revocation(ended=1, reach_elapsed=True)
    assert (await bench.do(bench.coat.revoke_session(sid, reason="again"))).ended == 0
    for unknown in ("", "x" * 28, id_of(session)):
        assert (await bench.do(bench.coat.revoke_session(unknown, reason="lost", wait=True))).ended == 0
    assert [(event.kind, event.sid, event.data) for event in bench.events.all] == [
        ("session.ended", sid, {"reason": "lost"})
    ]
    again = await bench.load(id_of(session))
    assert again.ended is not None
    assert (again.ended.reason, again.ended.at) == ("lost", bench.system.now_us() / 1_000_000)


async def test_revoke_of_a_subject_may_keep_one(bench: Bench) -> None:
    kept = await bench.sign_in("50")
    for _ in range(3):
        await bench.sign_in("50")
    await bench.sign_in("51")
    done = await bench.do(bench.coat.revoke_subject("50", reason="password changed", keep_sid=kept.sid))
    assert done.ended == 3
    assert await bench.subjects() == ["50", "51"]
    assert (await bench.load(id_of(kept))).subject == "50"
    assert (await bench.do(bench.coat.revoke_subject("50", reason="all"))).ended == 1


@pytest.mark.parametrize("keep", ["", "x" * 28, "never ours"])
async def test_keeping_a_session_that_was_never_ours_is_refused_and_ends_nothing(bench: Bench, keep: str) -> None:
    await bench.sign_in("50")
    with pytest.raises(ValueRefused, match="keep_sid"):
        await bench.do(bench.coat.revoke_subject("50", reason="x", keep_sid=keep))
    assert await bench.subjects() == ["50"]


async def test_keeping_anothers_session_ends_all_of_the_subject(bench: Bench) -> None:
    other = await bench.sign_in("51")
    await bench.sign_in("50")
    assert (await bench.do(bench.coat.revoke_subject("50", reason="x", keep_sid=other.sid))).ended == 1
    assert await bench.subjects() == ["51"]


async def test_a_filtered_revoke_ends_whom_it_means_and_is_safe_to_repeat(bench: Bench) -> None:
    await fleet(bench)
    filter_ = SessionFilter(network="203.0.113.0/24")
    assert (await bench.do(bench.coat.revoke_where(filter_, reason="attack", wait=True))).ended == 2
    assert (await bench.do(bench.coat.revoke_where(filter_, reason="attack"))).ended == 0
    assert await bench.subjects() == [None, "c", "d"]


async def test_a_filtered_revoke_walks_many_pages(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(Settings(max_sessions_per_subject=1000))
    for number in range(450):
        await bench.sign_in(f"user {number}")
    assert (await bench.do(bench.coat.revoke_where(SessionFilter(), reason="all"))).ended == 450
    assert await bench.subjects() == []


async def test_a_filtered_revoke_takes_nothing_but_a_filter(bench: Bench) -> None:
    with pytest.raises(ValueRefused):
        await bench.do(bench.coat.revoke_where(cast(Any, "50"), reason="x"))


@pytest.mark.parametrize("reason", ["", "x" * 201, "line\nbreak", "\x1b[31m", cast(Any, None)])
async def test_a_reason_is_short_and_printable(bench: Bench, reason: str) -> None:
    # It is shown to people and written to logs.
    session = await bench.sign_in("50")
    for work in (
        lambda: bench.coat.revoke_session(str(session.sid), reason=reason),
        lambda: bench.coat.revoke_subject("50", reason=reason),
        lambda: bench.coat.revoke_where(SessionFilter(), reason=reason),
        lambda: session.logout(reason=reason),
    ):
        with pytest.raises(ValueRefused):
            await bench.do(work())
    assert await bench.subjects() == ["50"]


# -- limits and sessions -------------------------------------------------------------------------------------------


async def test_the_oldest_session_gives_way(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(Settings(limit=SessionLimit(maximum=2)))
    first = await bench.sign_in("50")
    bench.system.advance(1)
    await bench.sign_in("50")
    bench.events.clear()
    await bench.sign_in("50")
    assert len((await bench.do(bench.coat.list_sessions("50"))).items) == 2
    gone = await bench.load(id_of(first))
    assert gone.ended is not None
    assert gone.ended.reason == "session_limit"
    assert [(event.kind, event.sid) for event in bench.events.all[:1]] == [("session.ended", first.sid)]


@pytest.mark.parametrize("reached", ["refuse", "ask"])
async def test_a_limit_may_refuse_and_leaves_everything_as_it_was(
    make_bench: Callable[..., Bench], reached: Any
) -> None:
    bench = make_bench(Settings(limit=SessionLimit(maximum=1, on_reached=reached)))
    first = await bench.sign_in("50")
    with pytest.raises(SessionLimitReached) as refused:
        await bench.sign_in("50")
    assert (refused.value.sids, refused.value.ask) == ((first.sid,), reached == "ask")
    # The same browser again takes its own place.
    again = await bench.load(id_of(first))
    await bench.do(again.login("50"))
    assert len((await bench.do(bench.coat.list_sessions("50"))).items) == 1


async def test_a_refused_sign_in_goes_on_by_ending_what_was_shown(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(Settings(limit=SessionLimit(maximum=2, on_reached="refuse")))
    first = await bench.sign_in("50")
    bench.system.advance(1)
    second = await bench.sign_in("50")
    with pytest.raises(SessionLimitReached) as refused:
        await bench.sign_in("50")
    shown = refused.value.sids
    assert shown == (first.sid, second.sid)
    new = await bench.load(None)
    for wrong in (shown[:1], (*shown, shown[0][:-1] + "~")):
        with pytest.raises((SessionLimitReached, ValueRefused)):
            await bench.do(new.login("50", shown=wrong, end=shown[:1]))
    with pytest.raises(ValueRefused, match="not shown"):
        await bench.do(new.login("50", shown=shown[:1], end=shown))
    with pytest.raises(ValueRefused, match="needs shown"):
        await bench.do(new.login("50", end=shown))
    await bench.do(new.login("50", shown=shown, end=shown[1:]))
    assert [each.sid for each in (await bench.do(bench.coat.list_sessions("50"))).items] == [first.sid, new.sid]


async def test_one_sign_in_may_have_a_limit_of_its_own_and_replace_a_session_of_its_browser(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(Settings())
    old = await bench.load(None)
    await bench.do(old.login("50", device="kitchen"))
    (listed,) = (await bench.do(bench.coat.list_sessions("50"))).items
    assert (listed.sid, listed.device) == (old.sid, "kitchen")
    strict = SessionLimit(maximum=1, on_reached="refuse")
    new = await bench.load(None)
    with pytest.raises(SessionLimitReached):
        await bench.do(new.login("50", limit=strict))
    await bench.do(new.login("50", limit=strict, replaces=old.sid))
    assert [each.sid for each in (await bench.do(bench.coat.list_sessions("50"))).items] == [new.sid]
    with pytest.raises(ValueRefused, match="device"):
        await bench.do(new.login("50", device="a b"))


async def test_tenants_keep_equal_subjects_apart(make_bench: Callable[..., Bench]) -> None:
    north = make_bench(Settings(tenant="north"))
    await north.sign_in("50")
    kind = AsyncCoatcheck if north.colour == "async" else Coatcheck
    south = kind(cast(Any, north.store), settings=Settings(tenant="south"), system=north.system)
    assert (await north.do(south.list_sessions("50"))).items == ()
    assert (await north.do(south.revoke_subject("50", reason="x"))).ended == 0
    assert await north.subjects() == ["50"]


async def test_a_session_knows_what_was_proven(bench: Bench) -> None:
    bench.system.advance(5)
    at = bench.system.now_us() / 1_000_000
    made = await bench.sign_in(
        "50", claims={"role": "admin", "teams": [1, 2]}, scopes=("a", "b"), amr=("pwd", "otp"), acr="2"
    )
    bench.system.advance(5)
    for session in (made, await bench.load(id_of(made))):
        principal = session.principal
        assert principal is not None
        assert (session.is_signed_in, session.is_loaded, session.subject) == (True, True, "50")
        assert (session.claims, session.scopes) == ({"role": "admin", "teams": [1, 2]}, ("a", "b"))
        assert (session.amr, session.acr) == (("pwd", "otp"), "2")
        assert (session.auth_time, session.created_at, session.last_seen_at) == (at, at, at)
        assert session.expires_at == at + bench.coat.settings.idle_timeout.total_seconds()
        assert (principal.sid, principal.auth_time, principal.claims) == (session.sid, at, session.claims)


async def test_nobody_has_no_attributes(bench: Bench) -> None:
    for cookie in (None, "A" * 64, "not even close", "\udc80"):
        session = await bench.load(cookie)
        assert not session.is_signed_in
        assert (session.subject, session.sid, session.principal, session.ended) == (None, None, None, None)
        assert (session.auth_time, session.created_at, session.last_seen_at, session.expires_at) == (None,) * 4
        assert (dict(session), dict(session.claims), session.scopes, session.amr, session.acr) == ({}, {}, (), (), None)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scopes": "read"},
        {"scopes": ("with space",)},
        {"scopes": ("",)},
        {"scopes": tuple(str(n) for n in range(65))},
        {"amr": ()},
        {"amr": "pwd"},
        {"amr": ("\n",)},
        {"claims": {"": 1}},
        {"claims": {"x": "y" * 5000}},
        {"claims": {str(n): n for n in range(33)}},
        {"claims": {"x": object()}},
        {"keep": "cart"},
        {"keep": tuple(str(n) for n in range(17))},
    ],
)
async def test_a_sign_in_checks_what_it_is_told_before_anything_happens(bench: Bench, wrong: dict[str, Any]) -> None:
    await bench.coat.engine.ready()
    bench.store.forget()
    session = bench.coat.session(None)
    with pytest.raises(ValueRefused):
        await bench.do(session.login("50", **wrong))
    assert bench.store.verbs == []
    assert not session.unfinished_login


async def test_rotation_keeps_the_sid_and_never_the_id(bench: Bench) -> None:
    session = await bench.sign_in("50")
    sid, first = session.sid, id_of(session)
    session["a"] = 1
    await bench.do(session.rotate())
    assert session.sid == sid
    assert id_of(session) != first
    await bench.do(session.commit())
    again = await bench.load(id_of(session))
    assert (again.sid, dict(again)) == (sid, {"a": 1})


async def test_a_context_manager_opens_and_closes(colour: str) -> None:
    events: list[Event] = []
    if colour == "blocking":
        with Coatcheck("memory:", on_event=events.append) as coat:
            coat.session(None).login("50")
    else:
        async with AsyncCoatcheck("memory:", on_event=events.append) as coat:
            await coat.session(None).login("50")
    assert [event.kind for event in events] == ["session.signed_in"]


async def test_a_store_that_tells_what_changes_need_not_keep_tokens() -> None:
    class SessionsAlone:
        def __init__(self) -> None:
            self.inner = open_store("memory:", colour="async")

        def __getattr__(self, name: str) -> object:
            if name in ("rotate_refresh", "read_ring", "standing"):
                raise AttributeError(name)
            return getattr(self.inner, name)

    coat = AsyncCoatcheck(cast(SessionStore, SessionsAlone()))
    session = coat.session(None)
    await session.login("50")
    assert isinstance(session.cookie_action, SendCookie)
    again = coat.session(session.cookie_action.id.text)
    await again.load()
    assert again.subject == "50"
    assert coat.engine.near is not None
    await coat.close()
