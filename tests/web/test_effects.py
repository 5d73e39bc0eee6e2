"""What a response makes of a sign-in, a sign-out and changed fields: when they count, when they are taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

from coatcheck import AsyncSession, Forbidden, Session, SessionClosed, SessionNotLoaded, Settings
from coatcheck.errors import SessionConflict
from coatcheck.events import Event
from tests.web.faces import Ask, Reply, World
from tests.web.test_required_behaviours import signed_in, standard

pytestmark = pytest.mark.anyio


async def alive(world: World, subject: str) -> int:
    return len((await world.do(world.coat.list_sessions(subject))).items)


@pytest.mark.parametrize(
    ("status", "kept"), [(200, True), (303, True), (404, True), (499, True), (500, False), (503, False)]
)
async def test_fields_are_dropped_on_a_server_error_and_only_then(small: World, status: int, kept: bool) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/write")
    async def write(ask: Ask) -> Reply:
        (await ask.load())["note"] = 1
        return Reply(status=status)

    small.store.forget()
    assert (await browser.post("/write")).status == status
    assert ("commit" in small.store.verbs) is kept
    assert (await browser.get("/see")).text == ('{"note":1}' if kept else "{}")


async def test_fields_are_dropped_when_the_view_raises(small: World) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/crash")
    async def crash(ask: Ask) -> Reply:
        (await ask.load())["note"] = 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await browser.post("/crash")

    @small.view("/forbid")
    async def forbid(ask: Ask) -> Reply:
        (await ask.load())["note"] = 1
        raise Forbidden("not yours")

    answer = await browser.post("/forbid")
    assert (answer.status, answer.problem["code"]) == (403, "forbidden")
    assert "not yours" not in answer.text
    assert (await browser.get("/see")).text == "{}"


async def test_no_anonymous_session_is_made_for_a_failed_answer(small: World) -> None:
    @small.view("/crash")
    async def crash(ask: Ask) -> Reply:
        (await ask.load())["note"] = 1
        return Reply(status=500)

    browser = small.browser()
    answer = await browser.post("/crash")
    assert (answer.all("set-cookie"), "create" in small.store.verbs) == ([], False)


async def test_an_exception_after_a_sign_in_revokes_the_new_session(world: World) -> None:
    @world.view("/login")
    async def login(ask: Ask) -> Reply:
        await ask.do(ask.session.login("50"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await world.browser().post("/login")
    assert await alive(world, "50") == 0


async def test_the_revoke_after_an_exception_is_made_good_when_the_store_is_away(small: World) -> None:
    @small.view("/login")
    async def login(ask: Ask) -> Reply:
        await ask.do(ask.session.login("50"))
        small.store.away = frozenset()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await small.browser().post("/login")
    small.store.away = None
    assert await alive(small, "50") == 1
    await small.maintain()
    assert await alive(small, "50") == 0


async def test_the_cookie_of_a_sign_in_is_sent_whatever_status_follows(small: World) -> None:
    standard(small)

    @small.view("/login")
    async def login(ask: Ask) -> Reply:
        await ask.do(ask.session.login("50"))
        return Reply(status=500)

    @small.view("/refuse")
    async def refuse(ask: Ask) -> Reply:
        await ask.do(ask.session.login("51"))
        raise Forbidden

    browser = small.browser()
    assert (await browser.post("/login")).status == 500
    assert (await browser.get("/who")).text == "50"
    other = small.browser()
    assert (await other.post("/refuse")).status == 403
    assert (await other.get("/who")).text == "51"


async def test_signing_in_again_keeps_only_what_is_named(small: World) -> None:
    standard(small)

    @small.view("/plant")
    async def plant(ask: Ask) -> str:
        session = await ask.load()
        session["cart"] = ["coat"]
        session["role"] = "root"
        return "planted"

    browser = small.browser()
    await browser.post("/plant")
    await browser.post("/login")
    assert (await browser.get("/see")).text == '{"cart":["coat"]}'


async def test_sign_in_and_out_in_one_request_leaves_nobody(small: World) -> None:
    standard(small)

    @small.view("/both")
    async def both(ask: Ask) -> str:
        await ask.do(ask.session.login("50"))
        await ask.do(ask.session.logout())
        return str(ask.session.subject)

    browser = small.browser()
    assert (await browser.post("/both")).text == "None"
    assert browser.cookie is None
    assert await alive(small, "50") == 0


async def test_sign_out_of_nobody_is_fine(small: World) -> None:
    standard(small)
    await small.coat.engine.ready()
    small.store.forget()
    assert (await small.browser().post("/logout")).status == 200
    assert small.store.verbs == []


async def test_writing_after_the_response_has_begun_is_refused(small: World) -> None:
    standard(small)
    browser = await signed_in(small)
    refused: list[str] = []

    @small.view("/stream")
    async def stream(ask: Ask) -> Reply:
        session = await ask.load()
        session["before"] = 1

        def chunks() -> Iterator[bytes]:
            # A generator's code before its first chunk runs before the head over WSGI, after it over ASGI.
            yield b"one"
            try:
                session["after"] = 1
            except SessionClosed as closed:
                refused.append(closed.detail)
            yield b"two"

        return Reply(chunks=chunks)

    assert (await browser.post("/stream")).text == "onetwo"
    assert len(refused) == 1
    assert "commit()" in refused[0]
    assert (await browser.get("/see")).text == '{"before":1}'


async def test_a_stream_commits_before_its_first_octet(small: World) -> None:
    standard(small)
    browser = await signed_in(small)
    seen: list[list[str]] = []

    @small.view("/stream")
    async def stream(ask: Ask) -> Reply:
        (await ask.load())["before"] = 1
        small.store.forget()

        def chunks() -> Iterator[bytes]:
            if small.colour == "async":
                seen.append(list(small.store.verbs))
            yield b"one"
            seen.append(list(small.store.verbs))
            yield b"two"

        return Reply(chunks=chunks)

    await browser.post("/stream")
    assert seen[-1] == seen[0] == ["commit"]


async def test_commit_writes_early_and_the_end_writes_nothing_more(small: World) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/early")
    async def early(ask: Ask) -> str:
        session = await ask.load()
        session["a"] = 1
        small.store.forget()
        await ask.do(session.commit())
        await ask.do(session.commit())
        return str(session.modified)

    assert (await browser.post("/early")).text == "False"
    assert small.store.verbs == ["commit"]


async def test_a_commit_that_expects_a_version_conflicts(small: World) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/strict")
    async def strict(ask: Ask) -> str:
        session = await ask.load()
        session["a"] = 1
        try:
            await ask.do(session.commit(expected=99))
        except SessionConflict as conflict:
            return f"at {conflict.version}"
        raise AssertionError

    answer = await browser.get("/strict")
    assert answer.text == "at 1"


async def test_recheck_notices_an_end_that_came_meanwhile(small: World) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/pay")
    async def pay(ask: Ask) -> str:
        session = await ask.load()
        await ask.do(session.recheck())
        await small.do(small.coat.revoke_subject("50", reason="fraud"))
        await ask.do(session.recheck())
        return "paid"

    answer = await browser.post("/pay")
    assert (answer.status, answer.problem["code"]) == (409, "session_gone")


async def test_a_mistake_in_a_value_is_refused_where_it_is_written(small: World) -> None:
    standard(small)
    browser = await signed_in(small)

    @small.view("/wrong")
    async def wrong(ask: Ask) -> str:
        session = await ask.load()
        cast(Any, session)["x"] = object()
        return "kept"

    answer = await browser.post("/wrong")
    assert (answer.status, answer.problem["code"]) == (400, "value_refused")


async def test_a_number_as_subject_is_a_type_error_that_names_the_cure(small: World) -> None:
    @small.view("/login")
    async def login(ask: Ask) -> str:
        await ask.do(ask.session.login(cast(Any, 50)))
        return "in"

    with pytest.raises(TypeError, match=r"str\(user\.id\)"):
        await small.browser().post("/login")


async def test_remembering_sets_a_lifetime_on_the_cookie(small: World) -> None:
    @small.view("/login")
    async def login(ask: Ask) -> str:
        await ask.do(ask.session.login("50", persistent=True))
        return "in"

    @small.view("/rotate")
    async def rotate(ask: Ask) -> str:
        await ask.do(ask.session.rotate())
        return "new"

    browser = small.browser()
    for path in ("/login", "/rotate"):
        line = (await browser.post(path)).one("set-cookie")
        assert line is not None
        assert f"Max-Age={12 * 3600}" in line


async def test_an_unloaded_asynchronous_session_names_both_cures(make_world: Callable[..., World]) -> None:
    world = make_world()
    if world.colour == "blocking":
        session = world.coat.session(None)
        assert isinstance(session, Session)
        assert session.subject is None, "a blocking session loads itself"
        return

    @world.view("/forgot")
    async def forgot(ask: Ask) -> str:
        return str(ask.session.subject)

    with pytest.raises(SessionNotLoaded, match=r"await session\.load\(\).*auth\.session"):
        await world.browser().get("/forgot")


@pytest.mark.parametrize("status", [200, 500])
async def test_a_sign_in_nobody_awaited_is_an_error_at_the_end(make_world: Callable[..., World], status: int) -> None:
    world = make_world()
    forgotten: list[Any] = []

    @world.view("/login")
    async def login(ask: Ask) -> Reply:
        assert isinstance(ask.session, AsyncSession)
        forgotten.append(ask.session.login("50"))
        return Reply(status=status)

    if world.colour == "blocking":
        return
    with pytest.raises(RuntimeError, match="never awaited"):
        await world.browser().post("/login")
    forgotten[0].close()
    assert await alive(world, "50") == 0


async def test_a_listener_that_raises_is_logged_and_stops_nothing(
    small: World, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(event: Event) -> None:
        raise ZeroDivisionError

    standard(small)
    coat = small.another(on_event=broken)
    session = coat.session(None)
    await small.do(session.login("50"))
    assert session.subject == "50"
    assert "the on_event listener failed on session.signed_in" in caplog.text
    await small.do(coat.close())


async def test_events_tell_the_story_and_hold_no_secret(make_world: Callable[..., World]) -> None:
    world = make_world(Settings())
    standard(world)
    browser = await signed_in(world)
    cookies = [browser.cookie]
    await browser.post("/rotate")
    cookies.append(browser.cookie)
    await browser.post("/logout")
    assert world.events.kinds() == ["session.signed_in", "session.rotated", "session.ended"]
    assert len({event.sid for event in world.events.all}) == 1
    told = repr(world.events.all) + repr([event.envelope() for event in world.events.all])
    for cookie in cookies:
        assert cookie is not None
        assert cookie not in told
        assert cookie[20:52] not in told


async def test_a_session_shows_no_secret_of_its_own(small: World) -> None:
    session = small.coat.session(None)
    assert "not loaded" in repr(session)
    await small.do(session.login("50"))
    assert session.cookie_action is not None
    assert session.cookie_action.id.text[20:] not in repr(session) + repr(session.cookie_action)  # type: ignore[union-attr]
    assert repr(session) == f"<{type(session).__name__} {session.sid}>"
