"""What several tasks of one request do to one session object, and signing out with a cookie that does not count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from coatcheck import AsyncCoatcheck, Coatcheck, SessionGone
from coatcheck.session import SendCookie
from coatcheck.testing import FakeSystem
from coatcheck.web.asgi import CoatcheckMiddleware, session_of

NAME = "__Host-Http-session"


def id_of(session: Any) -> str:
    action = session.cookie_action
    assert isinstance(action, SendCookie)
    return action.id.text


@pytest.fixture
def coat() -> Coatcheck:
    return Coatcheck("memory:", system=FakeSystem())


def during(coat: AsyncCoatcheck, verb: str, act: Callable[[], Any]) -> None:
    """Do something once while a verb of the store is under way."""
    store: Any = coat.engine.store
    real = getattr(store, verb)
    done = False

    async def slow(*asked: Any, **more: Any) -> Any:
        nonlocal done
        answer = await real(*asked, **more)
        if not done:
            done = True
            waited = act()
            if asyncio.iscoroutine(waited):
                await waited
        return answer

    setattr(store, verb, slow)


@pytest.mark.anyio
async def test_a_field_written_while_a_commit_waits_is_written_by_the_next() -> None:
    async with AsyncCoatcheck("memory:", system=FakeSystem()) as coat:
        session = coat.session(None)
        await session.login("50")
        session.update(a=1, d=1)
        await session.commit()
        held = id_of(session)

        def write_more() -> None:
            session["b"] = 2
            del session["d"]
            session["a"] = 4

        session["a"] = 3
        during(coat, "commit", write_more)
        await session.commit()
        await session.commit()
        again = coat.session(held)
        await again.load()
        assert dict(again) == dict(session) == {"a": 4, "b": 2}


@pytest.mark.anyio
async def test_a_load_that_ends_after_a_login_does_not_undo_it() -> None:
    async with AsyncCoatcheck("memory:", system=FakeSystem()) as coat:
        first = coat.session(None)
        await first.load()
        first["cart"] = ["coat"]
        await first.commit()
        session = coat.session(id_of(first))
        during(coat, "load", lambda: session.login("50"))
        await session.load()
        assert session.subject == "50"
        await session.logout()
        assert (await coat.list_sessions("50")).items == ()


@pytest.mark.parametrize("presented", ["E" * 64, "junk", None])
def test_recheck_refuses_what_was_never_a_session(coat: Coatcheck, presented: str | None) -> None:
    with coat, pytest.raises(SessionGone, match="absent"):
        coat.session(presented).recheck()


def test_recheck_of_a_session_that_was_not_loaded_says_why_it_is_gone(coat: Coatcheck) -> None:
    with coat:
        session = coat.session(None)
        session.login("50")
        held = id_of(session)
        coat.session(held).recheck()
        coat.revoke_subject("50", reason="stolen laptop")
        with pytest.raises(SessionGone, match="stolen laptop"):
            coat.session(held).recheck()


def test_signing_out_with_an_id_that_was_rotated_away_ends_the_session(coat: Coatcheck) -> None:
    with coat:
        session = coat.session(None)
        session.login("50")
        old = id_of(session)
        session.rotate(claims={"role": "admin"})
        coat.session(old).logout()
        assert coat.session(id_of(session)).ended is not None


def test_signing_out_with_an_id_from_before_a_sign_in_leaves_the_sign_in_alone(coat: Coatcheck) -> None:
    with coat:
        anonymous = coat.session(None)
        anonymous["cart"] = []
        anonymous.commit()
        planted = id_of(anonymous)
        session = coat.session(planted)
        session.login("50")
        coat.session(planted).logout()
        assert coat.session(id_of(session)).subject == "50"


async def ask(coat: AsyncCoatcheck, act: str, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = session_of(scope)
        await session.load()
        if act == "logout":
            await session.logout()
        elif act == "write":
            session["x"] = 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    scope = {"type": "http", "method": "POST", "path": "/", "scheme": "https", "headers": headers}
    await CoatcheckMiddleware(app, coat)(scope, receive, send)
    found: list[tuple[bytes, bytes]] = sent[0]["headers"]
    return found


@pytest.mark.anyio
@pytest.mark.parametrize(
    "headers",
    [
        lambda pair: [(b"authorization", b"Basic c3RhZ2luZzo="), (b"cookie", pair)],
        lambda pair: [(b"cookie", pair + b"; " + pair)],
        lambda pair: [(b"cookie", f"{NAME}=planted; ".encode() + pair)],
        lambda pair: [(b"cookie", b"big=" + b"x" * 20_000 + b"; " + pair)],
    ],
)
async def test_signing_out_ends_a_session_whose_cookie_does_not_count(
    headers: Callable[[bytes], list[tuple[bytes, bytes]]],
) -> None:
    async with AsyncCoatcheck("memory:", system=FakeSystem()) as coat:
        session = coat.session(None)
        await session.login("50")
        pair = f"{NAME}={id_of(session)}".encode()
        await ask(coat, "logout", headers(pair))
        assert (await coat.list_sessions("50")).items == ()


@pytest.mark.anyio
async def test_a_cookie_that_was_not_read_is_not_written_over() -> None:
    async with AsyncCoatcheck("memory:", system=FakeSystem()) as coat:
        session = coat.session(None)
        await session.login("50")
        pair = f"{NAME}={id_of(session)}".encode()
        answered = await ask(coat, "write", [(b"authorization", b"Bearer x"), (b"cookie", pair)])
        assert not [value for name, value in answered if name == b"set-cookie"]
        again = coat.session(id_of(session))
        await again.load()
        assert again.subject == "50"


@pytest.mark.anyio
async def test_text_in_the_store_that_cannot_be_read_is_absent_everywhere() -> None:
    async with AsyncCoatcheck("memory:", system=FakeSystem()) as coat:
        session = coat.session(None)
        await session.login("50")
        session.update(good=1, bad=2)
        await session.commit()
        again = coat.session(id_of(session))
        await again.load()
        again._stored = {**again._stored, "bad": '{"$":"python/object"}'}
        assert dict(again) == {"good": 1}
        assert ("bad" in again, len(again), again.get("bad")) == (False, 1, None)


def test_a_version_can_be_asked_for_and_insisted_on(coat: Coatcheck) -> None:
    from coatcheck.errors import SessionConflict

    with coat:
        session = coat.session(None)
        session.login("50")
        assert session.version == 1
        other = coat.session(id_of(session))
        other["a"] = 1
        other.commit(expected=1)
        assert other.version == 2
        session["a"] = 2
        with pytest.raises(SessionConflict):
            session.commit(expected=1)
